/*
 * Samplers (sampling sessions) and the versions of weights that they are pinned to.
 *
 * A version that comes from a checkpoint is loaded once and shared by all samplers of that path, as
 * long as the checkpoint's row is the same. The last sampler that lets go of a version frees it in
 * the engine. Thread: the loop's.
 */
#include <stdio.h>
#include <string.h>

#include "core/core_internal.h"
#include "util/clock.h"
#include "util/mem.h"

struct creator { /* of a sampling session, waiting for the checkpoint's row */
    struct tb_list node;
    tb_core_sampler_cb cb;
    void *arg;
    struct tb_error err; /* the answer: this or */
    char *id;
};

static void sampler_pump(struct tb_core_sampler *sp);

/* ---- versions */

struct tb_core_version *tb_version_new(struct tb_core *c, int engine_model, uint64_t id)
{
    struct tb_core_version *v = tb_calloc(1, sizeof(*v));
    v->core = c;
    v->refs = 1;
    v->id = id;
    v->engine_model = engine_model;
    v->state = TB_VERSION_LOADING;
    tb_list_init(&v->samplers);
    return v;
}

static void version_unmap(struct tb_core_version *v)
{
    if (v->mapped) tb_map_del(&v->core->versions, v->path, strlen(v->path));
    v->mapped = false;
}

void tb_version_put(struct tb_core_version *v)
{
    if (!v || --v->refs) return;
    version_unmap(v);
    if (v->state == TB_VERSION_READY) {
        struct tb_task *t = tb_core_task(TB_TASK_VERSION_FREE, v->engine_model);
        t->version_id = v->id;
        tb_core_run_free(v->core, t);
    }
    tb_free(v->path);
    tb_free(v);
}

void tb_target_put(struct tb_core_target *t)
{
    if (!t || --t->refs) return;
    tb_version_put(t->version);
    tb_free(t);
}

/* The load has ended, one way or the other; its own reference goes. */
static void version_settled(struct tb_core_version *v, const struct tb_error *e)
{
    tb_copy_end(v->core, &v->copy);
    if (e->code) {
        v->state = TB_VERSION_FAILED;
        v->error = *e;
        version_unmap(v); /* the next one tries again */
    } else {
        v->state = TB_VERSION_READY;
    }
    TB_LIST_FOREACH_SAFE (n, tmp, &v->samplers)
        sampler_pump(TB_LIST_ENTRY(n, struct tb_core_sampler, in_version));
    tb_version_put(v);
}

static void version_task_done(struct tb_task *t)
{
    struct tb_core_version *v = t->arg;
    struct tb_core *c = v->core;
    c->n_async--;
    version_settled(v, tb_task_error(t));
    tb_task_destroy(t);
    tb_core_leave(c);
}

static void version_read(void *arg, const struct tb_error *err, const struct tb_ckpt_row *row,
                         struct tb_adapter_state *state)
{
    struct tb_core_version *v = arg;
    struct tb_core *c = v->core;
    struct tb_error e = *err;
    c->n_async--;
    if (!e.code) {
        v->time_us = row->time_us; /* it may have been written anew since the row was read */
        if (v->refs == 1) tb_error_set(&e, TB_ECANCELED, "nobody uses it any more");
    }
    if (e.code) {
        tb_adapter_state_destroy(state);
        version_settled(v, &e);
    } else {
        struct tb_task *t = tb_core_task(TB_TASK_VERSION_LOAD, v->engine_model);
        t->version_id = v->id;
        t->state = state;
        t->lora = state->lora;
        t->cb = version_task_done;
        t->arg = v;
        c->n_async++;
        tb_engine_submit(c->engine, t);
    }
    tb_core_leave(c);
}

static void version_load(struct tb_core_copy *y)
{
    struct tb_core_version *v = TB_CONTAINER_OF(y, struct tb_core_version, copy);
    v->core->n_async++;
    tb_store_read_ckpt(v->core->store, v->reader, v->path, false, version_read, v);
}

/* A version of the checkpoint that row describes and reader, a tenant, may read, with a reference
 * for the caller. */
static struct tb_core_version *version_of(struct tb_core *c, const char *reader,
                                          const struct tb_ckpt_row *row, int engine_model)
{
    struct tb_core_version *v = tb_map_get(&c->versions, row->path, strlen(row->path));
    if (v && v->time_us == row->time_us) {
        v->refs++;
        return v;
    }
    if (v) version_unmap(v); /* older contents; its samplers keep it */
    v = tb_version_new(c, engine_model, ++c->next_version);
    v->path = tb_strdup(row->path);
    v->time_us = row->time_us;
    v->mapped = true;
    v->reader = reader;
    tb_map_put(&c->versions, v->path, strlen(v->path), v);
    v->refs++; /* of the load */
    size_t bytes = tb_copy_bytes(c, engine_model, row->lora.rank, false);
    if (tb_copy_begin(c, &v->copy, bytes, version_load)) version_load(&v->copy);
    return v;
}

/* ---- samplers */

struct tb_core_sampler *tb_sampler_find(const struct tb_core *c, const struct tb_tenant *who,
                                        const char *id)
{
    struct tb_core_sampler *sp = id ? tb_map_get(&c->sampler_map, id, strlen(id)) : NULL;
    return sp && sp->session->tenant == who ? sp : NULL;
}

static struct tb_core_sampler *sampler_new(struct tb_core_session *s, const char *id)
{
    struct tb_core_sampler *sp = tb_calloc(1, sizeof(*sp));
    sp->core = s->core;
    sp->session = s;
    sp->id = tb_strdup(id);
    sp->engine_model = -1;
    sp->used_ms = tb_clock_ms();
    tb_list_init(&sp->in_version);
    tb_list_init(&sp->waiting);
    tb_list_init(&sp->creators);
    tb_list_init(&sp->feeds);
    tb_list_push(&s->samplers, &sp->in_session);
    tb_map_put(&s->core->sampler_map, sp->id, strlen(sp->id), sp);
    return sp;
}

void tb_sampler_free_id(struct tb_core_session *s, int64_t n, char out[TB_ID_BYTES])
{
    snprintf(out, TB_ID_BYTES, "%s:sample:%lld", s->id, (long long)n);
    while (tb_sampler_find(s->core, s->tenant, out))
        snprintf(out, TB_ID_BYTES, "%s:sample:%lld", s->id, (long long)s->next_spare++);
}

static void sampler_put_row(const struct tb_core_sampler *sp)
{
    struct tb_sampler_row row = {.id = sp->id,
                                 .tenant = sp->session->tenant->name,
                                 .session_id = sp->session->id,
                                 .base_model = sp->base_model,
                                 .model_path = sp->model_path,
                                 .created_us = tb_clock_wall_us()};
    tb_store_put_sampler(sp->core->store, &row);
}

static void sampler_open_base(struct tb_core_sampler *sp, int engine_model, const char *name)
{
    sp->engine_model = engine_model;
    sp->base_model = tb_strdup(name);
    sampler_put_row(sp);
}

struct tb_core_sampler *tb_sampler_publish(struct tb_core_model *m, const char *id,
                                           struct tb_core_version *v, struct tb_core_target *t)
{
    struct tb_core_sampler *sp = sampler_new(m->session, id);
    sp->version = v;
    sp->target = t;
    sampler_open_base(sp, m->engine_model, m->base_model);
    return sp;
}

void tb_sampler_maybe_free(struct tb_core_sampler *sp)
{
    if (!sp->ended || sp->n_pending || sp->looking) return;
    tb_free(sp->model_path);
    tb_free(sp->base_model);
    tb_free(sp->id);
    tb_free(sp);
}

static void fail_waiting(struct tb_core_sampler *sp, const struct tb_error *e)
{
    for (struct tb_list *n; (n = tb_list_pop(&sp->waiting));) {
        struct tb_future *f = TB_LIST_ENTRY(n, struct tb_future, in_queue);
        if (f->op->error.code)
            tb_future_finish(f);
        else
            tb_future_fail(f, e);
    }
}

/* Those who asked for the session get their answer on the way out of core. */
static void answer_creators(struct tb_core_sampler *sp, const struct tb_error *e)
{
    TB_LIST_FOREACH (n, &sp->creators) {
        struct creator *w = TB_LIST_ENTRY(n, struct creator, node);
        if (e)
            w->err = *e;
        else
            w->id = tb_strdup(sp->id);
    }
    tb_list_move(&sp->core->answers, &sp->creators);
}

void tb_samplers_answer(struct tb_core *c)
{
    for (struct tb_list *n; (n = tb_list_pop(&c->answers));) {
        struct creator *w = TB_LIST_ENTRY(n, struct creator, node);
        w->cb(w->arg, &w->err, w->id);
        tb_free(w->id);
        tb_free(w);
    }
}

static void sampler_unkey(struct tb_core_sampler *sp)
{
    if (!sp->key) return;
    tb_map_del(&sp->core->by_address, sp->key, strlen(sp->key));
    tb_free(sp->key);
    sp->key = NULL;
}

static void sampler_unopen(struct tb_core_sampler *sp)
{
    if (!sp->opened) return;
    tb_map_del(&sp->core->opened, sp->opened, strlen(sp->opened));
    tb_free(sp->opened);
    sp->opened = NULL;
}

/* Takes the sampler out of every table; it is freed when nothing of it runs. Its struct may be gone
 * on return. */
static void sampler_close(struct tb_core_sampler *sp, const struct tb_error *e)
{
    fail_waiting(sp, e);
    sp->ended = true;
    tb_map_del(&sp->core->sampler_map, sp->id, strlen(sp->id));
    tb_list_del(&sp->in_session);
    tb_list_del(&sp->in_version);
    sampler_unkey(sp);
    sampler_unopen(sp);
    tb_feeds_end(sp);
    tb_version_put(sp->version);
    tb_target_put(sp->target);
    sp->version = NULL;
    sp->target = NULL;
    answer_creators(sp, e);
    tb_sampler_maybe_free(sp);
}

void tb_sampler_end(struct tb_core_sampler *sp, const char *message)
{
    struct tb_error e;
    tb_error_set(&e, TB_ECANCELED, "sampling session %s has ended: %s", sp->id, message);
    sampler_close(sp, &e);
}

void tb_core_end_sampling_session(struct tb_core *c, struct tb_tenant *who, const char *sampler_id)
{
    struct tb_core_sampler *sp = tb_sampler_find(c, who, sampler_id);
    if (sp) tb_sampler_end(sp, "its client let it go");
    tb_core_leave(c);
}

/* ---- opening by checkpoint path */

static void row_read(void *arg, const struct tb_error *err, const struct tb_ckpt_row *row)
{
    struct tb_core_sampler *sp = arg;
    struct tb_core *c = sp->core;
    struct tb_error e = *err;
    c->n_async--;
    sp->looking = false;
    if (sp->ended) {
        tb_sampler_maybe_free(sp);
        tb_core_leave(c);
        return;
    }
    int engine_model = -1;
    if (!e.code) {
        engine_model = tb_engine_model_find(c->engine, row->base_model);
        if (engine_model < 0)
            tb_error_set(&e, TB_EINVAL, "%s was trained on %s, which is not served here", row->path,
                         row->base_model);
    }
    if (e.code) {
        sampler_close(sp, &e);
    } else {
        sp->version = version_of(c, sp->session->tenant->name, row, engine_model);
        tb_list_push(&sp->version->samplers, &sp->in_version);
        sampler_open_base(sp, engine_model, row->base_model);
        sampler_pump(sp);
        answer_creators(sp, NULL);
    }
    tb_core_leave(c);
}

static void sampler_open_path(struct tb_core_sampler *sp, const char *path)
{
    sp->model_path = tb_strdup(path);
    sp->looking = true;
    sp->core->n_async++;
    tb_store_get_ckpt(sp->core->store, sp->session->tenant->name, path, row_read, sp);
}

static int check_address(struct tb_core *c, const char *base, const char *path, int *engine_model,
                         struct tb_error *err)
{
    *engine_model = -1;
    if (!base == !path)
        return tb_error_set(err, TB_EINVAL,
                            "exactly one of base_model and model_path must be given");
    if (base) {
        *engine_model = tb_engine_model_find(c->engine, base);
        return *engine_model >= 0 ? 0 : tb_core_no_base_model(c, TB_ENOTFOUND, base, err);
    }
    struct tb_tinker_path p;
    int rc = tb_tinker_path_parse(path, strlen(path), &p, err);
    if (!rc && p.kind == TB_CKPT_EXTERNAL)
        rc = tb_error_set(err, TB_EINVAL, "%s holds external weights, which cannot be sampled from",
                          path);
    return rc;
}

void tb_core_create_sampling_session(struct tb_core *c, struct tb_tenant *who,
                                     const struct tb_sampling_session_params *p,
                                     tb_core_sampler_cb cb, void *arg)
{
    struct tb_error err = {0};
    int engine_model = -1;
    struct tb_core_session *s;
    if (c->closing)
        tb_error_set(&err, TB_EBUSY, "the server is stopping");
    else if (tb_session_get(c, who, p->session_id, &s, &err) == 0 && p->seq_id < 0)
        tb_error_set(&err, TB_EINVAL, "sampling_session_seq_id must be a number from 0 on");
    if (!err.code) check_address(c, p->base_model, p->model_path, &engine_model, &err);
    if (err.code) {
        cb(arg, &err, NULL);
        return;
    }
    tb_session_seen(s);
    char id[TB_ID_BYTES], key[TB_ID_BYTES];
    int nk = snprintf(key, sizeof(key), "%s %lld", s->id, (long long)p->seq_id);
    struct tb_core_sampler *sp = tb_map_get(&c->opened, key, (size_t)nk);
    if (!sp) {
        tb_sampler_free_id(s, p->seq_id, id);
        sp = sampler_new(s, id);
        sp->opened = tb_strdup(key);
        tb_map_put(&c->opened, sp->opened, (size_t)nk, sp);
        if (p->base_model)
            sampler_open_base(sp, engine_model, p->base_model);
        else
            sampler_open_path(sp, p->model_path);
    }
    if (!sp->looking) {
        cb(arg, &err, sp->id);
        return;
    }
    struct creator *w = tb_calloc(1, sizeof(*w));
    w->cb = cb;
    w->arg = arg;
    tb_list_push(&sp->creators, &w->node);
}

/* ---- samples addressed by base model or path alone (before sampling sessions existed) */

static int sampler_by_address(struct tb_core *c, struct tb_tenant *who, const struct tb_op *op,
                              struct tb_core_sampler **out, struct tb_error *err)
{
    const struct tb_sample *q = &op->u.sample;
    int engine_model;
    int rc = check_address(c, q->base_model, q->model_path, &engine_model, err);
    if (rc) return rc;
    char *key = tb_tenant_scoped(who, q->base_model ? q->base_model : q->model_path);
    struct tb_core_sampler *sp = tb_map_get(&c->by_address, key, strlen(key));
    if (sp) {
        tb_free(key);
    } else {
        if (!who->anonymous) who->anonymous = tb_session_create(c, who, NULL, true);
        char id[TB_ID_BYTES];
        snprintf(id, sizeof(id), "%s:sample:%llu", who->anonymous->id,
                 (unsigned long long)c->next_anonymous++);
        sp = sampler_new(who->anonymous, id);
        sp->key = key;
        tb_map_put(&c->by_address, sp->key, strlen(sp->key), sp);
        if (q->base_model)
            sampler_open_base(sp, engine_model, q->base_model);
        else
            sampler_open_path(sp, q->model_path);
    }
    *out = sp;
    return 0;
}

void tb_sampler_path_changed(struct tb_core *c, const char *path)
{
    TB_LIST_FOREACH (n, &c->tenants) { /* whoever samples from it */
        char *key = tb_tenant_scoped(TB_LIST_ENTRY(n, struct tb_tenant, node), path);
        struct tb_core_sampler *sp = tb_map_get(&c->by_address, key, strlen(key));
        if (sp) sampler_unkey(sp); /* the tick ends it when it has been idle for a while */
        tb_free(key);
    }
}

void tb_samplers_tick(struct tb_core *c, uint64_t now_ms)
{
    TB_LIST_FOREACH (t, &c->tenants) {
        const struct tb_tenant *who = TB_LIST_ENTRY(t, struct tb_tenant, node);
        if (!who->anonymous) continue;
        TB_LIST_FOREACH_SAFE (n, tmp, &who->anonymous->samplers) {
            struct tb_core_sampler *sp = TB_LIST_ENTRY(n, struct tb_core_sampler, in_session);
            bool idle = sp->n_pending == 0 && !sp->looking && now_ms > sp->used_ms &&
                        now_ms - sp->used_ms > c->o.session_lease_ms;
            if (idle) tb_sampler_end(sp, "it was not used for a while");
        }
    }
}

/* ---- samples */

static void sample_done(struct tb_future *f, struct tb_task *t)
{
    (void)t;
    struct tb_core_sampler *sp = f->sampler;
    sp->used_ms = tb_clock_ms();
    tb_future_finish(f);
    tb_sampler_maybe_free(sp);
}

static void start_sample(struct tb_core_sampler *sp, struct tb_future *f,
                         const struct tb_core_version *v)
{
    struct tb_task *t = tb_core_task(TB_TASK_SAMPLE, sp->engine_model);
    t->version_id = v ? v->id : 0;
    t->op = f->op;
    t->progress = tb_future_progress;
    f->phase = TB_PHASE_RUNNING;
    tb_core_run(f, t, sample_done);
}

/* Starts the samples that wait, if the weights are there. */
static void sampler_pump(struct tb_core_sampler *sp)
{
    if (sp->looking) return;
    const struct tb_core_version *v = sp->target ? sp->target->version : sp->version;
    if (v && v->state == TB_VERSION_LOADING) return;
    if (v && v->state == TB_VERSION_FAILED) {
        fail_waiting(sp, &v->error);
        return;
    }
    for (struct tb_list *n; (n = tb_list_pop(&sp->waiting));) {
        struct tb_future *f = TB_LIST_ENTRY(n, struct tb_future, in_queue);
        if (f->op->error.code)
            tb_future_finish(f);
        else
            start_sample(sp, f, v);
    }
}

/* The label of an op that brought none: the next that is free. */
static void next_label(struct tb_core_sampler *sp, struct tb_op *op)
{
    struct tb_core *c = sp->core;
    int n;
    do {
        op->seq_id = sp->next_label++;
        n = snprintf(c->scratch, sizeof(c->scratch), "%s:%lld", sp->id, (long long)op->seq_id);
    } while (tb_future_find(c, c->scratch, (size_t)n));
}

int tb_sampler_submit(struct tb_core *c, struct tb_tenant *who, struct tb_op *op,
                      struct tb_ticket *out, bool *kept, struct tb_error *err)
{
    struct tb_core_sampler *sp;
    struct tb_future *f;
    if (op->sampling_session_id) {
        sp = tb_sampler_find(c, who, op->sampling_session_id);
        if (!sp)
            return tb_error_set(err, TB_ENOTFOUND,
                                "there is no live sampling session '%s': its session ended, or the "
                                "server was restarted",
                                op->sampling_session_id);
    } else {
        f = tb_future_by_key(c, who, "sample", op->idempotency_key);
        if (f) {
            out->request_id = f->id;
            return 0;
        }
        int rc = sampler_by_address(c, who, op, &sp, err);
        if (rc) return rc;
    }
    tb_session_seen(sp->session);
    sp->used_ms = tb_clock_ms();
    bool unnumbered = op->seq_id < 0;
    if (!unnumbered) {
        int n = snprintf(c->scratch, sizeof(c->scratch), "%s:%lld", sp->id, (long long)op->seq_id);
        f = tb_future_find(c, c->scratch, (size_t)n);
        if (f) {
            out->request_id = f->id;
            return 0;
        }
    }
    int rc = tb_core_admit(c, who, op, false, err);
    if (rc) return rc;
    if (unnumbered) next_label(sp, op);
    if (!op->u.sample.has_seed) {
        op->u.sample.has_seed = true;
        op->u.sample.seed = tb_random_u64();
    }
    *kept = true;
    op->share = sp->session->share;
    op->tenant = who->number;
    f = tb_future_create(c, c->scratch, op, sp->session);
    if (!op->sampling_session_id) tb_future_set_key(f, "sample", op->idempotency_key);
    f->phase = TB_PHASE_READY;
    f->sampler = sp;
    sp->n_pending++;
    tb_list_push(&sp->waiting, &f->in_queue);
    out->request_id = f->id;
    sampler_pump(sp);
    return 0;
}
