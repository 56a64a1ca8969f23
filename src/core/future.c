/*
 * Futures: the table of submitted ops by request id, those who wait for them, and how long results
 * stay. A future owns its op. When it is over it sits in core->unread or core->read, both ordered
 * by expiry. Thread: the loop's.
 */
#include <stdio.h>
#include <string.h>

#include "core/core_internal.h"
#include "util/clock.h"
#include "util/mem.h"
#include "util/span.h"

struct tb_future *tb_future_find(const struct tb_core *c, const char *id, size_t n)
{
    return tb_map_get(&c->future_map, id, n);
}

struct tb_future *tb_future_find_of(const struct tb_core *c, const struct tb_tenant *who,
                                    const char *id, size_t n)
{
    struct tb_future *f = tb_future_find(c, id, n);
    return f && f->session->tenant == who ? f : NULL;
}

static char *scoped_key(const struct tb_tenant *who, const char *scope, const char *key)
{
    return tb_asprintf("%s\n%s\n%s", who->name, scope, key);
}

struct tb_future *tb_future_by_key(const struct tb_core *c, const struct tb_tenant *who,
                                   const char *scope, const char *key)
{
    if (!key) return NULL;
    char *k = scoped_key(who, scope, key);
    struct tb_future *f = tb_map_get(&c->idem, k, strlen(k));
    tb_free(k);
    return f;
}

void tb_future_set_key(struct tb_future *f, const char *scope, const char *key)
{
    if (!key || f->idem) return;
    f->idem = scoped_key(f->session->tenant, scope, key);
    tb_map_put(&f->core->idem, f->idem, strlen(f->idem), f);
}

struct tb_future *tb_future_create(struct tb_core *c, const char *id, struct tb_op *op,
                                   struct tb_core_session *s)
{
    struct tb_future *f = tb_calloc(1, sizeof(*f));
    f->core = c;
    f->id = tb_strdup(id);
    f->op = op;
    f->state = TB_FUTURE_PENDING;
    f->session = s;
    f->seq = op->seq_id;
    op->owner = f;
    tb_list_init(&f->in_queue);
    tb_list_init(&f->in_feed);
    tb_list_init(&f->waiters);
    tb_list_init(&f->in_resolved);
    tb_list_init(&f->in_expiry);
    tb_list_push(&s->futures, &f->in_session);
    s->n_pending++;
    f->queued_bytes = op->body_bytes;
    c->queued_bytes += f->queued_bytes;
    s->tenant->queued_bytes += f->queued_bytes;
    s->tenant->n_pending++;
    c->stats.futures_pending++;
    tb_map_put(&c->future_map, f->id, strlen(f->id), f);
    return f;
}

void tb_future_destroy(struct tb_future *f)
{
    struct tb_core *c = f->core;
    TB_BUG_ON(f->phase != TB_PHASE_OVER || f->busy || !tb_list_empty(&f->waiters) || f->stream);
    tb_map_del(&c->future_map, f->id, strlen(f->id));
    if (f->idem) tb_map_del(&c->idem, f->idem, strlen(f->idem));
    tb_list_del(&f->in_session);
    tb_list_del(&f->in_feed);
    tb_list_del(&f->in_expiry);
    tb_list_del(&f->in_resolved);
    c->held_bytes -= f->held_bytes;
    c->stats.futures_done--;
    tb_op_destroy(f->op);
    tb_free(f->idem);
    tb_free(f->id);
    tb_free(f);
}

void tb_future_drop(struct tb_future *f)
{
    TB_BUG_ON(f->phase != TB_PHASE_OVER);
    if (f->busy || !tb_list_empty(&f->in_resolved))
        f->drop = true;
    else
        tb_future_destroy(f);
}

/* Between the two f stays, and so does its op. */
static void hold(struct tb_future *f)
{
    f->busy++;
}

static void release(struct tb_future *f)
{
    if (--f->busy == 0 && f->drop && tb_list_empty(&f->in_resolved)) tb_future_destroy(f);
}

void tb_core_hold(const struct tb_op *op)
{
    hold(op->owner);
}

void tb_core_release(const struct tb_op *op)
{
    release(op->owner);
}

/* ---- the end of an op */

static const char *dup_text(struct tb_arena *a, const char *s)
{
    return s ? tb_arena_strdup(a, s) : NULL;
}

static bool copy_outputs(struct tb_op *to, const struct tb_op *from)
{
    const struct tb_result *r = &from->result;
    struct tb_result *o = &to->result;
    o->outputs = tb_arena_try_array(&to->arena, (size_t)r->n_outputs, sizeof(*o->outputs));
    o->metrics = tb_arena_try_array(&to->arena, (size_t)r->n_metrics, sizeof(*o->metrics));
    if (!o->outputs || !o->metrics) return false;
    for (int32_t i = 0; i < r->n_outputs; i++) {
        o->outputs[i] = r->outputs[i];
        size_t n = (size_t)r->outputs[i].n, k = (size_t)r->outputs[i].k;
        if (!r->outputs[i].logprobs) continue;
        float *p = tb_arena_try_array(&to->arena, n * (k ? k : 1), sizeof(float));
        if (!p) return false;
        memcpy(p, r->outputs[i].logprobs, n * (k ? k : 1) * sizeof(float));
        o->outputs[i].logprobs = p;
    }
    for (int32_t i = 0; i < r->n_metrics; i++) {
        o->metrics[i].key = dup_text(&to->arena, r->metrics[i].key);
        o->metrics[i].value = r->metrics[i].value;
    }
    o->n_outputs = r->n_outputs;
    o->n_metrics = r->n_metrics;
    return true;
}

/* A training op holds its batch, many times the size of its result, and a custom loss its graph;
 * results stay for minutes. So a big one is replaced by an op with the result alone (no data:
 * n_data is 0). */
static void compact(struct tb_future *f)
{
    struct tb_op *old = f->op;
    bool loss = old->type == TB_OP_CREATE_CUSTOM_LOSS;
    if (!loss && old->type != TB_OP_FORWARD && old->type != TB_OP_FORWARD_BACKWARD) return;
    if (old->arena.total < TB_COMPACT_BYTES) return;
    struct tb_op *op = tb_op_create(old->type);
    op->session_id = dup_text(&op->arena, old->session_id);
    op->model_id = dup_text(&op->arena, old->model_id);
    op->seq_id = old->seq_id;
    op->error = old->error;
    op->owner = f;
    if (loss) {
        op->u.create_custom_loss.seq_id = old->u.create_custom_loss.seq_id;
        op->result.loss_id = dup_text(&op->arena, old->result.loss_id);
    } else {
        op->u.forward_backward.loss_fn = dup_text(&op->arena, old->u.forward_backward.loss_fn);
        op->u.forward_backward.forward_only = old->u.forward_backward.forward_only;
    }
    if (!loss && !copy_outputs(op, old)) {
        tb_op_destroy(op); /* no memory for a second copy: keep the first */
        return;
    }
    tb_op_destroy(old);
    f->op = op;
}

/* Results are kept for their time, but not beyond the bound on queued bytes: the oldest of those
 * that were delivered go first. */
static void bound_held(struct tb_core *c)
{
    while (c->held_bytes > c->o.max_queued_bytes && !tb_list_empty(&c->read)) {
        struct tb_future *f = TB_LIST_ENTRY(c->read.next, struct tb_future, in_expiry);
        tb_list_del(&f->in_expiry);
        tb_future_drop(f);
    }
}

static void keep_until(struct tb_future *f, bool was_read)
{
    struct tb_core *c = f->core;
    uint64_t ttl = was_read ? c->o.result_ttl_ms : c->o.result_unread_ttl_ms;
    f->was_read = was_read;
    f->expires_ms = tb_clock_ms() + ttl;
    tb_list_del(&f->in_expiry);
    tb_list_push(was_read ? &c->read : &c->unread, &f->in_expiry);
}

static void leave_queues(struct tb_future *f)
{
    tb_list_del(&f->in_queue);
    if (f->model) {
        if (f->phase == TB_PHASE_RUNNING) f->model->running--;
        f->model->n_pending--;
        if (f->model->barrier == f) f->model->barrier = NULL;
        if (f->model->saving == f) f->model->saving = NULL;
        f->model = NULL;
    }
    if (f->sampler) {
        f->sampler->n_pending--;
        f->sampler = NULL;
    }
}

void tb_future_finish(struct tb_future *f)
{
    struct tb_core *c = f->core;
    TB_BUG_ON(f->phase == TB_PHASE_OVER || f->task);
    struct tb_core_sampler *sp = f->sampler;
    leave_queues(f);
    f->phase = TB_PHASE_OVER;
    f->state = f->op->error.code ? TB_FUTURE_FAILED : TB_FUTURE_DONE;
    c->queued_bytes -= f->queued_bytes;
    f->session->tenant->queued_bytes -= f->queued_bytes;
    f->session->tenant->n_pending--;
    f->queued_bytes = 0;
    tb_copy_end(c, &f->copy);
    c->stats.futures_pending--;
    c->stats.futures_done++;
    if (f->state == TB_FUTURE_FAILED)
        c->stats.failed[f->op->type]++;
    else
        c->stats.executed[f->op->type]++;
    for (int32_t i = 0; f->op->type == TB_OP_SAMPLE && i < f->op->result.n_sequences; i++)
        c->sampled_tokens += (uint64_t)f->op->result.sequences[i].n;
    compact(f);
    f->held_bytes = sizeof(*f) + sizeof(*f->op) + f->op->arena.total;
    c->held_bytes += f->held_bytes;
    f->session->n_pending--;
    keep_until(f, f->session->ended || f->canceled);
    if (sp) tb_feed_add(sp, f);
    tb_list_push(&c->resolved, &f->in_resolved);
    bound_held(c);
}

void tb_future_fail(struct tb_future *f, const struct tb_error *e)
{
    f->op->error = *e;
    tb_future_finish(f);
}

void tb_futures_expire(struct tb_core *c, uint64_t now_ms)
{
    struct tb_list *lists[] = {&c->unread, &c->read};
    for (int i = 0; i < 2; i++) {
        while (!tb_list_empty(lists[i])) {
            struct tb_future *f = TB_LIST_ENTRY(lists[i]->next, struct tb_future, in_expiry);
            if (f->expires_ms > now_ms) break;
            tb_list_del(&f->in_expiry);
            tb_future_drop(f);
        }
    }
}

/* ---- waiting */

static void unlink_waiter(struct tb_core *c, struct tb_waiter *w)
{
    tb_list_del(&w->node);
    tb_list_del(&w->deadline_node);
    w->future = NULL;
    c->stats.waiters--;
}

static void end_stream(struct tb_future *f)
{
    struct tb_core_stream *s = f->stream;
    if (!s) return;
    f->stream = NULL;
    s->future = NULL;
    s->end(s, f->state, f->op);
}

/* Calls everybody who waits for a future that is over. Callbacks may come back into core. */
void tb_futures_resolve(struct tb_core *c)
{
    for (struct tb_list *n; (n = tb_list_pop(&c->resolved));) {
        struct tb_future *f = TB_LIST_ENTRY(n, struct tb_future, in_resolved);
        hold(f);
        while (!tb_list_empty(&f->waiters)) {
            struct tb_waiter *w = TB_LIST_ENTRY(f->waiters.next, struct tb_waiter, node);
            unlink_waiter(c, w);
            w->cb(w, f->state, f->op, NULL, NULL);
        }
        end_stream(f);
        release(f);
    }
}

static bool all_digits(const char *p, size_t n)
{
    if (n == 0 || n > 19) return false;
    for (size_t i = 0; i < n; i++) {
        if (p[i] < '0' || p[i] > '9') return false;
    }
    return true;
}

/* sess-XXXXXXXXXXXXXXXX:train:N:create, ...:train:N:M, ...:loss:N:create or ...:sample:N:M */
bool tb_request_id_well_formed(const char *id, size_t n)
{
    const size_t ns = sizeof("sess-") - 1 + TB_SESSION_ID_CHARS;
    if (n <= ns || !tb_session_id_well_formed(id, ns)) return false;
    const char *part[3], *p = id + ns, *end = id + n;
    size_t len[3];
    for (int i = 0; i < 3; i++) {
        if (p == end || *p != ':') return false;
        part[i] = ++p;
        while (p < end && *p != ':')
            p++;
        len[i] = (size_t)(p - part[i]);
    }
    if (p != end || !all_digits(part[1], len[1])) return false;
    struct tb_span kind = {part[0], len[0]}, last = {part[2], len[2]};
    bool train = tb_span_eq(kind, "train"), loss = tb_span_eq(kind, "loss");
    if (!train && !loss && !tb_span_eq(kind, "sample")) return false;
    if (tb_span_eq(last, "create")) return train || loss;
    return !loss && all_digits(last.p, last.n);
}

bool tb_sampler_id_well_formed(const char *id)
{
    char req[TB_ID_BYTES];
    int n = snprintf(req, sizeof(req), "%s:0", id ? id : "");
    return n > 0 && (size_t)n < sizeof(req) && strstr(req, ":sample:") &&
           tb_request_id_well_formed(req, (size_t)n);
}

/* Whether a sample waits for memory. */
static bool cache_full(const struct tb_future *f, char *reason, size_t n)
{
    if (f->phase != TB_PHASE_RUNNING || f->op->type != TB_OP_SAMPLE) return false;
    struct tb_engine_stats s = {0};
    tb_engine_stats(f->core->engine, &s);
    if (s.kv.n_pages == 0 || s.kv.n_free + s.kv.n_cached > 0) return false;
    snprintf(reason, n, "the KV cache is full: all %llu pages are in use",
             (unsigned long long)s.kv.n_pages);
    return true;
}

static void pending_answer(struct tb_waiter *w, const struct tb_future *f)
{
    char reason[128];
    const char *why = NULL;
    const char *state = tb_tenant_paused(f->core, f->session->tenant, reason, sizeof(reason));
    if (!state && cache_full(f, reason, sizeof(reason))) state = "paused_capacity";
    if (state) {
        why = reason;
    } else if (f->phase == TB_PHASE_BLOCKED && f->model) {
        snprintf(reason, sizeof(reason), "waiting for seq_id %lld", (long long)f->model->next_seq);
        why = reason;
    } else if (f->phase == TB_PHASE_READY && f->model && f->model->state == TB_MODEL_CREATING) {
        why = "waiting for the model to be created";
    } else if (f->phase == TB_PHASE_READY && f->sampler) {
        why = "waiting for the weights to be loaded";
    }
    w->cb(w, TB_FUTURE_PENDING, NULL, state ? state : "active", why);
}

static void arm_wait_timer(struct tb_core *c)
{
    if (c->closed || tb_list_empty(&c->waiters)) return;
    struct tb_waiter *w = TB_LIST_ENTRY(c->waiters.next, struct tb_waiter, deadline_node);
    uint64_t now = tb_clock_ms();
    uv_timer_start(&c->wait_timer, tb_wait_timer, w->deadline_ms > now ? w->deadline_ms - now : 1,
                   0);
}

static void end_waits(struct tb_core *c, uint64_t until_ms)
{
    while (!tb_list_empty(&c->waiters)) {
        struct tb_waiter *w = TB_LIST_ENTRY(c->waiters.next, struct tb_waiter, deadline_node);
        if (w->deadline_ms > until_ms) break;
        struct tb_future *f = w->future;
        unlink_waiter(c, w);
        pending_answer(w, f);
    }
}

void tb_wait_timer(uv_timer_t *t)
{
    struct tb_core *c = t->data;
    end_waits(c, tb_clock_ms());
    arm_wait_timer(c);
    tb_core_leave(c);
}

void tb_waiters_all_pending(struct tb_core *c)
{
    end_waits(c, UINT64_MAX);
}

void tb_core_wait(struct tb_core *c, struct tb_tenant *who, const char *request_id, size_t id_len,
                  struct tb_waiter *w)
{
    tb_list_init(&w->node);
    tb_list_init(&w->deadline_node);
    w->future = NULL;
    struct tb_future *f = tb_future_find_of(c, who, request_id, id_len);
    if (!f) {
        bool ours = tb_request_id_well_formed(request_id, id_len);
        w->cb(w, ours ? TB_FUTURE_GONE : TB_FUTURE_UNKNOWN, NULL, NULL, NULL);
        return;
    }
    tb_session_seen(f->session);
    if (f->phase == TB_PHASE_OVER) {
        hold(f);
        w->cb(w, f->state, f->op, NULL, NULL);
        release(f);
        return;
    }
    if (c->draining) {
        pending_answer(w, f);
        return;
    }
    w->future = f;
    w->deadline_ms = tb_clock_ms() + c->o.long_poll_ms;
    bool first = tb_list_empty(&c->waiters);
    tb_list_push(&f->waiters, &w->node);
    tb_list_push(&c->waiters,
                 &w->deadline_node); /* all wait equally long, so this keeps the order */
    c->stats.waiters++;
    if (first) arm_wait_timer(c);
}

void tb_core_unwait(struct tb_core *c, struct tb_waiter *w)
{
    if (w->future) unlink_waiter(c, w);
}

/* ---- streams */

void tb_future_progress(struct tb_task *t, const struct tb_progress *p)
{
    struct tb_future *f = t->arg;
    struct tb_core *c = f->core;
    struct tb_core_stream *s = f->stream;
    if (s && s->tokens) s->tokens(s, p->tokens, p->n);
    tb_core_leave(c);
}

void tb_core_stream(struct tb_core *c, struct tb_tenant *who, const char *request_id, size_t id_len,
                    struct tb_core_stream *s)
{
    struct tb_future *f = tb_future_find_of(c, who, request_id, id_len);
    s->future = NULL;
    if (!f) {
        bool ours = tb_request_id_well_formed(request_id, id_len);
        s->end(s, ours ? TB_FUTURE_GONE : TB_FUTURE_UNKNOWN, NULL);
        return;
    }
    tb_session_seen(f->session);
    if (f->stream) f->stream->future = NULL;
    f->stream = s;
    s->future = f;
    if (f->phase != TB_PHASE_OVER) return;
    hold(f);
    end_stream(f);
    release(f);
}

void tb_core_unstream(struct tb_core *c, struct tb_core_stream *s)
{
    (void)c;
    if (s->future) s->future->stream = NULL;
    s->future = NULL;
}

void tb_core_delivered(struct tb_core *c, const char *request_id, size_t id_len)
{
    struct tb_future *f = tb_future_find(c, request_id, id_len);
    if (!f || f->phase != TB_PHASE_OVER || f->drop || f->was_read) return;
    keep_until(f, true);
    bound_held(c);
}
