/*
 * Sessions: what one client holds, and its lease. An ended session stays as a stub until its last
 * future has expired, so that repeats of finish are answered. Thread: the loop's.
 */
#include <string.h>

#include "core/core_internal.h"
#include "util/clock.h"
#include "util/log.h"
#include "util/mem.h"

struct tb_core_session *tb_session_create(struct tb_core *c, struct tb_tenant *who,
                                          const struct tb_session_params *p, bool anonymous)
{
    struct tb_core_session *s = tb_calloc(1, sizeof(*s));
    char random[TB_SESSION_ID_CHARS + 1];
    tb_random_id(random, TB_SESSION_ID_CHARS);
    s->core = c;
    s->tenant = who;
    s->id = tb_asprintf("sess-%s", random);
    s->anonymous = anonymous;
    s->share = ++c->next_share;
    s->lease_ms = c->o.session_lease_ms;
    if (anonymous && __builtin_mul_overflow(s->lease_ms, TB_ANON_LEASE_FACTOR, &s->lease_ms))
        s->lease_ms = UINT64_MAX;
    if (p && p->lasting) s->lease_ms = UINT64_MAX;
    s->seen_ms = tb_clock_ms();
    s->next_spare = TB_FIRST_SPARE;
    tb_list_init(&s->futures);
    tb_list_init(&s->models);
    tb_list_init(&s->samplers);
    tb_list_init(&s->losses);
    tb_list_push(&c->sessions, &s->node);
    tb_map_put(&c->session_map, s->id, strlen(s->id), s);
    if (p && p->idempotency_key) {
        s->idem = tb_tenant_scoped(who, p->idempotency_key);
        tb_map_put(&c->session_keys, s->idem, strlen(s->idem), s);
    }
    c->stats.sessions++;
    int64_t now = tb_clock_wall_us();
    struct tb_session_row row = {.id = s->id,
                                 .tenant = who->name,
                                 .tags_json = p ? p->tags_json : NULL,
                                 .user_metadata_json = p ? p->user_metadata_json : NULL,
                                 .sdk_version = p ? p->sdk_version : NULL,
                                 .project_id = p ? p->project_id : NULL,
                                 .display_name = p ? p->display_name : NULL,
                                 .created_us = now,
                                 .last_seen_us = now,
                                 .status = "active"};
    tb_store_put_session(c->store, &row);
    return s;
}

int tb_core_create_session(struct tb_core *c, struct tb_tenant *who,
                           const struct tb_session_params *p, const char **id, struct tb_error *err)
{
    if (c->closing) return tb_error_set(err, TB_EBUSY, "the server is stopping");
    struct tb_core_session *s = NULL;
    if (p->idempotency_key) {
        char *key = tb_tenant_scoped(who, p->idempotency_key);
        s = tb_map_get(&c->session_keys, key, strlen(key));
        tb_free(key);
    }
    if (!s) {
        s = tb_session_create(c, who, p, false);
        tb_log(TB_LOG_INFO, "core", "session id=%s tenant=%s sdk=%s", s->id, who->name,
               p->sdk_version ? p->sdk_version : "-");
    }
    tb_session_seen(s);
    *id = s->id;
    return 0;
}

static struct tb_core_session *find_any(const struct tb_core *c, const struct tb_tenant *who,
                                        const char *id)
{
    struct tb_core_session *s = id ? tb_map_get(&c->session_map, id, strlen(id)) : NULL;
    return s && s->tenant == who ? s : NULL;
}

struct tb_core_session *tb_session_find(const struct tb_core *c, const struct tb_tenant *who,
                                        const char *id)
{
    struct tb_core_session *s = find_any(c, who, id);
    return s && !s->ended ? s : NULL;
}

int tb_session_get(const struct tb_core *c, const struct tb_tenant *who, const char *id,
                   struct tb_core_session **out, struct tb_error *err)
{
    *out = tb_session_find(c, who, id);
    if (*out) return 0;
    return tb_error_set(err, TB_ENOTFOUND,
                        "there is no live session '%s': it ended, or the server was restarted",
                        id ? id : "");
}

bool tb_session_id_well_formed(const char *id, size_t n)
{
    static const char lead[] = "sess-";
    const size_t nl = sizeof(lead) - 1;
    if (n != nl + TB_SESSION_ID_CHARS || memcmp(id, lead, nl) != 0) return false;
    for (size_t i = nl; i < n; i++) {
        bool ok = (id[i] >= '0' && id[i] <= '9') || (id[i] >= 'a' && id[i] <= 'z');
        if (!ok) return false;
    }
    return true;
}

void tb_session_seen(struct tb_core_session *s)
{
    s->seen_ms = tb_clock_ms();
}

int tb_core_heartbeat(struct tb_core *c, struct tb_tenant *who, const char *session_id,
                      struct tb_error *err)
{
    struct tb_core_session *s = tb_session_find(c, who, session_id);
    if (!s)
        return tb_error_set(err, TB_EGONE, "session '%s' has ended or is not known to this server",
                            session_id ? session_id : "");
    tb_session_seen(s);
    return 0;
}

/* What waits fails, what runs finishes, results that are ready are dropped, and models, samplers
 * and their weights are freed as soon as nothing of theirs runs. */
void tb_session_end(struct tb_core_session *s, const char *status, const char *reason,
                    const char *detail, const char *message)
{
    struct tb_core *c = s->core;
    s->ended = true;
    s->ended_ms = tb_clock_ms();
    c->stats.sessions--;
    if (s == s->tenant->anonymous) s->tenant->anonymous = NULL;
    if (s->idem) tb_map_del(&c->session_keys, s->idem, strlen(s->idem));
    tb_store_end_session(c->store, s->id, status, reason, detail);
    tb_log(TB_LOG_INFO, "core", "session id=%s ended: %s", s->id, message);

    struct tb_error e;
    tb_error_set(&e, TB_ECANCELED, "the session has ended: %s", message);
    TB_LIST_FOREACH_SAFE (n, tmp, &s->futures) {
        struct tb_future *f = TB_LIST_ENTRY(n, struct tb_future, in_session);
        if (f->phase == TB_PHASE_OVER) {
            tb_future_drop(f);
        } else if (f->phase == TB_PHASE_RUNNING) {
            f->canceled = true;
            if (f->task) tb_engine_cancel(c->engine, f->task);
        } else {
            tb_future_fail(f, &e);
        }
    }
    TB_LIST_FOREACH_SAFE (n, tmp, &s->models)
        tb_model_end(TB_LIST_ENTRY(n, struct tb_core_model, in_session), message);
    TB_LIST_FOREACH_SAFE (n, tmp, &s->samplers)
        tb_sampler_end(TB_LIST_ENTRY(n, struct tb_core_sampler, in_session), message);
    tb_losses_end(s);
}

int tb_core_finish_session(struct tb_core *c, struct tb_tenant *who, const char *session_id,
                           const char *reason, const char *detail, struct tb_error *err)
{
    struct tb_core_session *s = find_any(c, who, session_id);
    /* not in memory, but an id of ours: it ended with a restart, or long ago */
    if (!s && session_id && tb_session_id_well_formed(session_id, strlen(session_id))) return 0;
    if (!s)
        return tb_error_set(err, TB_ENOTFOUND, "there is no session '%s'",
                            session_id ? session_id : "");
    if (!s->ended) tb_session_end(s, "client_finished", reason, detail, "the client finished it");
    tb_core_leave(c);
    return 0;
}

void tb_session_destroy(struct tb_core_session *s)
{
    struct tb_core *c = s->core;
    TB_BUG_ON(!tb_list_empty(&s->futures) || !tb_list_empty(&s->models) ||
              !tb_list_empty(&s->samplers));
    tb_map_del(&c->session_map, s->id, strlen(s->id));
    tb_list_del(&s->node);
    tb_free(s->idem);
    tb_free(s->id);
    tb_free(s);
}

/* A tail behind a seq_id that does not come for as long as a lease will not move any more: its post
 * failed on the client, or the client is gone. */
static void fail_stuck(struct tb_core_session *s, uint64_t now_ms)
{
    TB_LIST_FOREACH (n, &s->models) {
        struct tb_core_model *m = TB_LIST_ENTRY(n, struct tb_core_model, in_session);
        struct tb_error e;
        if (!tb_model_stuck(m)) {
            m->stuck_ms = 0;
        } else if (m->stuck_ms == 0) {
            m->stuck_ms = now_ms;
        } else if (now_ms > m->stuck_ms && now_ms - m->stuck_ms > s->lease_ms) {
            tb_error_set(&e, TB_ECANCELED, "seq_id %lld never came: those behind it are given up",
                         (long long)m->next_seq);
            tb_model_fail_queue(m, &e);
        }
    }
}

void tb_sessions_tick(struct tb_core *c, uint64_t now_ms)
{
    TB_LIST_FOREACH_SAFE (n, tmp, &c->sessions) {
        struct tb_core_session *s = TB_LIST_ENTRY(n, struct tb_core_session, node);
        if (s->ended) {
            bool idle = tb_list_empty(&s->futures) && tb_list_empty(&s->models) &&
                        tb_list_empty(&s->samplers);
            if (idle && now_ms - s->ended_ms > c->o.result_unread_ttl_ms) tb_session_destroy(s);
            continue;
        }
        if (s->n_pending) fail_stuck(s, now_ms);
        if (s == s->tenant->anonymous || now_ms < s->seen_ms || now_ms - s->seen_ms <= s->lease_ms)
            continue;
        if (s->n_pending == 0)
            tb_session_end(s, "cancelled", NULL, "no heartbeat", "no heartbeat came for its lease");
    }
}
