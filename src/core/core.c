/*
 * Core: creation, options, engine tasks, the tick, statistics, closing. See core.h.
 */
#include <stdio.h>
#include <string.h>

#include "core/core_internal.h"
#include "util/clock.h"
#include "util/log.h"
#include "util/mem.h"

static void close_if_idle(struct tb_core *c);

/* ---- creation */

static void tick(uv_timer_t *t)
{
    struct tb_core *c = t->data;
    uint64_t now = tb_clock_ms();
    tb_futures_expire(c, now);
    tb_samplers_tick(c, now);
    tb_sessions_tick(c, now);
    tb_core_leave(c);
}

static uint64_t pick(uint64_t v, uint64_t def)
{
    return v ? v : def;
}

int tb_core_create(struct tb_core **out, uv_loop_t *loop, struct tb_engine *engine,
                   struct tb_store *store, const struct tb_core_options *o, struct tb_error *err)
{
    static const struct tb_core_options none = {0};
    if (!o) o = &none;
    (void)err; /* nothing fails today */
    struct tb_core *c = tb_calloc(1, sizeof(*c));
    c->loop = loop;
    c->engine = engine;
    c->store = store;
    c->o.session_lease_ms = pick(o->session_lease_ms, TB_SESSION_LEASE_MS);
    c->o.long_poll_ms = pick(o->long_poll_ms, TB_LONG_POLL_MS);
    c->o.result_ttl_ms = pick(o->result_ttl_ms, TB_RESULT_TTL_MS);
    c->o.result_unread_ttl_ms = pick(o->result_unread_ttl_ms, TB_RESULT_UNREAD_TTL_MS);
    c->o.max_queued_bytes = pick(o->max_queued_bytes, TB_MAX_QUEUED_BYTES);
    c->o.tenant_rate = o->tenant_rate;
    c->o.tenant_burst = pick(o->tenant_burst, o->tenant_rate);
    c->o.tenant_queued_bytes = o->tenant_queued_bytes;
    c->o.tenant_pending = o->tenant_pending;
    struct tb_map *maps[] = {&c->session_map, &c->model_map,    &c->sampler_map,
                             &c->future_map,  &c->session_keys, &c->idem,
                             &c->versions,    &c->by_address,   &c->opened};
    for (size_t i = 0; i < TB_ARRAY_LEN(maps); i++)
        tb_map_init(maps[i]);
    tb_list_init(&c->sessions);
    tb_list_init(&c->tenants);
    tb_list_init(&c->waiters);
    tb_list_init(&c->unread);
    tb_list_init(&c->read);
    tb_list_init(&c->resolved);
    tb_list_init(&c->answers);
    tb_list_init(&c->changed);
    tb_list_init(&c->feed_waiters);
    tb_list_init(&c->copies);
    uv_timer_init(loop, &c->wait_timer);
    uv_timer_init(loop, &c->feed_timer);
    uv_timer_init(loop, &c->tick_timer);
    c->wait_timer.data = c->feed_timer.data = c->tick_timer.data = c;
    c->open_handles = 3;
    uint64_t least =
        TB_MIN(c->o.session_lease_ms, TB_MIN(c->o.result_ttl_ms, c->o.result_unread_ttl_ms));
    uint64_t every = TB_MIN(TB_MAX(least / 4, 1), 1000);
    uv_timer_start(&c->tick_timer, tick, every, every);
    *out = c;
    return 0;
}

struct tb_store *tb_core_store(struct tb_core *c)
{
    return c->store;
}

struct tb_engine *tb_core_engine(struct tb_core *c)
{
    return c->engine;
}

int tb_core_n_models(const struct tb_core *c)
{
    return tb_engine_n_models(c->engine);
}

void tb_core_served_model(const struct tb_core *c, int i, struct tb_served_model *out)
{
    const struct tb_model_info *info = tb_engine_model_info(c->engine, i);
    *out = (struct tb_served_model){.name = info->name,
                                    .dir = info->dir,
                                    .arch = info->arch,
                                    .tokenizer = tb_engine_model_tokenizer(c->engine, i),
                                    .max_context = info->max_context,
                                    .max_rank = info->max_rank,
                                    .vocab = info->vocab,
                                    .lora_width = tb_core_lora_width(info),
                                    .n_eos = info->n_eos,
                                    .eos = info->eos,
                                    .text = info->tokenizer,
                                    .no_text = info->no_tokenizer};
}

void tb_core_stats(const struct tb_core *c, struct tb_core_stats *out)
{
    *out = c->stats;
    out->models = c->model_map.n;
    out->samplers = c->sampler_map.n;
    out->queued_bytes = c->queued_bytes;
    out->copy_bytes = c->copy_bytes;
}

void tb_core_compute_stats(const struct tb_core *c, struct tb_compute_stats *out)
{
    struct tb_engine_stats e = {0};
    tb_engine_stats(c->engine, &e);
    *out = (struct tb_compute_stats){.train_tokens = e.train_tokens,
                                     .shares = e.shares,
                                     .sample_positions = e.sample_rows,
                                     .sampled_tokens = c->sampled_tokens,
                                     .steps = e.steps,
                                     .kv_pages = e.kv.n_pages,
                                     .kv_free = e.kv.n_free,
                                     .kv_cached = e.kv.n_cached,
                                     .kv_preempted = e.kv.n_preempted,
                                     .prompt_tokens = e.kv.n_lookup_tokens,
                                     .prompt_hit_tokens = e.kv.n_hit_tokens,
                                     .memory_limit = e.memory.limit,
                                     .adapters = e.memory.n_adapters,
                                     .adapters_out = e.memory.adapters_out,
                                     .versions = e.memory.n_versions,
                                     .versions_out = e.memory.versions_out,
                                     .page_ins = e.memory.page_ins,
                                     .page_outs = e.memory.page_outs,
                                     .busy_us = e.busy_us};
    static const char *const kinds[] = {
        [TB_WORK_TRAIN] = "train", [TB_WORK_SAMPLE] = "sample", [TB_WORK_OTHER] = "other"};
    for (int i = 0; i < TB_N_QUEUES; i++) {
        const struct tb_work_stats *w = &e.work[i];
        out->queues[i] = (struct tb_queue_stats){kinds[i], w->waiting, w->running,
                                                 w->begun, w->wait_us, w->wait_us_max};
    }
    const struct tb_memory_stats *m = &e.memory;
    const struct tb_memory_use use[] = {{"weights", m->weights},       {"adapters", m->adapters},
                                        {"versions", m->versions},     {"kv", m->kv},
                                        {"workspaces", m->workspaces}, {"other", m->used}};
    _Static_assert(TB_ARRAY_LEN(use) == TB_N_MEMORY, "all kinds of memory");
    memcpy(out->memory, use, sizeof(use));
    for (int i = 0; i < TB_N_MEMORY - 1; i++)
        out->memory[TB_N_MEMORY - 1].bytes -= use[i].bytes;
}

_Static_assert(TB_N_QUEUES == TB_N_WORKS, "a queue for each kind of work");

/* ---- the way out of every entry */

void tb_core_leave(struct tb_core *c)
{
    if (c->leaving) return; /* an outer call of this function goes on with the list */
    c->leaving = true;
    while (!tb_list_empty(&c->resolved) || !tb_list_empty(&c->answers) ||
           !tb_list_empty(&c->changed) || tb_copies_go(c)) {
        tb_futures_resolve(c);
        tb_feeds_answer(c);
        tb_samplers_answer(c);
    }
    c->leaving = false;
    if (c->closing) close_if_idle(c);
}

/* ---- engine tasks */

struct tb_task *tb_core_task(enum tb_task_type type, int engine_model)
{
    struct tb_task *t = tb_task_create(type);
    t->model = engine_model;
    return t;
}

static void future_task_done(struct tb_task *t)
{
    struct tb_future *f = t->arg;
    struct tb_core *c = f->core;
    c->n_async--;
    f->task = NULL;
    f->step(f, t);
    tb_task_destroy(t);
    tb_core_leave(c);
}

void tb_core_run(struct tb_future *f, struct tb_task *t,
                 void (*step)(struct tb_future *f, struct tb_task *t))
{
    t->cb = future_task_done;
    t->arg = f;
    f->task = t;
    f->step = step;
    f->core->n_async++;
    tb_engine_submit(f->core->engine, t);
}

static void free_task_done(struct tb_task *t)
{
    struct tb_core *c = t->arg;
    c->n_async--;
    const struct tb_error *e = tb_task_error(t);
    if (e->code) tb_log(TB_LOG_WARN, "core", "engine task failed: %s", e->msg);
    tb_task_destroy(t);
    tb_core_leave(c);
}

void tb_core_run_free(struct tb_core *c, struct tb_task *t)
{
    t->cb = free_task_done;
    t->arg = c;
    c->n_async++;
    tb_engine_submit(c->engine, t);
}

/* ---- submits */

int tb_core_admit(struct tb_core *c, struct tb_tenant *t, const struct tb_op *op, bool in_turn,
                  struct tb_error *err)
{
    size_t max = c->o.max_queued_bytes;
    int rc = 0;
    if (c->queued_bytes && !in_turn &&
        (op->body_bytes > max || c->queued_bytes > max - op->body_bytes))
        rc = tb_error_set(
            err, TB_EBUSY,
            "the server's queues are full (%zu bytes wait, %zu are allowed); try again",
            c->queued_bytes, max);
    else
        rc = tb_tenant_admit(c, t, op, in_turn, err);
    if (rc) {
        t->refusal = rc;
        t->refused_ms = tb_clock_ms();
    }
    return rc;
}

int tb_core_no_base_model(const struct tb_core *c, int code, const char *name, struct tb_error *err)
{
    char served[256] = "";
    size_t n = 0;
    for (int i = 0; i < tb_core_n_models(c) && n < sizeof(served); i++)
        n += (size_t)snprintf(served + n, sizeof(served) - n, "%s%s", i ? ", " : "",
                              tb_engine_model_info(c->engine, i)->name);
    return tb_error_set(err, code, "base model '%.160s' is not served here; served: %s",
                        name ? name : "", served);
}

int tb_core_submit(struct tb_core *c, struct tb_tenant *who, struct tb_op *op,
                   struct tb_ticket *out, struct tb_error *err)
{
    bool kept = false;
    int rc;
    memset(out, 0, sizeof(*out));
    enum tb_op_type type = op->type;
    if (c->closing)
        rc = tb_error_set(err, TB_EBUSY, "the server is stopping");
    else if (type == TB_OP_SAMPLE)
        rc = tb_sampler_submit(c, who, op, out, &kept, err);
    else if (type == TB_OP_CREATE_CUSTOM_LOSS)
        rc = tb_loss_submit(c, who, op, out, &kept, err);
    else if (type == TB_OP_CREATE_MODEL || (type == TB_OP_LOAD_WEIGHTS && !op->model_id))
        rc = tb_model_submit_create(c, who, op, out, &kept, err);
    else
        rc = tb_model_submit(c, who, op, out, &kept, err);
    if (!kept) tb_op_destroy(op);
    if (kept) c->stats.submitted[type]++;
    tb_core_leave(c);
    return rc;
}

void tb_core_cancel(struct tb_core *c, struct tb_tenant *who, const char *request_id, size_t id_len)
{
    struct tb_future *f = tb_future_find_of(c, who, request_id, id_len);
    if (!f || f->phase == TB_PHASE_OVER || f->op->type != TB_OP_SAMPLE) return;
    f->canceled = true;
    if (f->phase == TB_PHASE_RUNNING) {
        if (f->task) tb_engine_cancel(c->engine, f->task);
    } else {
        struct tb_error e;
        tb_error_set(&e, TB_ECANCELED, "the client canceled it");
        tb_future_fail(f, &e);
    }
    tb_core_leave(c);
}

/* ---- closing */

void tb_core_drain(struct tb_core *c)
{
    c->draining = true;
    tb_waiters_all_pending(c);
    tb_feeds_all_pending(c);
}

static void core_free(struct tb_core *c)
{
    size_t it = 0, n;
    const char *key;
    void *v;
    while (tb_map_next(&c->future_map, &it, &key, &n, &v))
        tb_future_destroy(v);
    while (!tb_list_empty(&c->sessions))
        tb_session_destroy(TB_LIST_ENTRY(c->sessions.next, struct tb_core_session, node));
    TB_BUG_ON(c->model_map.n || c->sampler_map.n || c->versions.n || c->by_address.n ||
              c->opened.n);
    struct tb_map *maps[] = {&c->session_map, &c->model_map,    &c->sampler_map,
                             &c->future_map,  &c->session_keys, &c->idem,
                             &c->versions,    &c->by_address,   &c->opened};
    for (size_t i = 0; i < TB_ARRAY_LEN(maps); i++)
        tb_map_fini(maps[i]);
    tb_tenants_destroy(c);
    void (*cb)(void *) = c->close_cb;
    void *arg = c->close_arg;
    tb_free(c);
    if (cb) cb(arg);
}

static void handle_closed(uv_handle_t *h)
{
    struct tb_core *c = h->data;
    if (--c->open_handles == 0) core_free(c);
}

static void close_if_idle(struct tb_core *c)
{
    if (c->closed || c->n_async) return;
    c->closed = true;
    uv_close((uv_handle_t *)&c->wait_timer, handle_closed);
    uv_close((uv_handle_t *)&c->feed_timer, handle_closed);
    uv_close((uv_handle_t *)&c->tick_timer, handle_closed);
}

void tb_core_close(struct tb_core *c, void (*cb)(void *arg), void *arg)
{
    c->closing = true;
    c->close_cb = cb;
    c->close_arg = arg;
    uv_timer_stop(&c->tick_timer);
    tb_core_drain(c);
    TB_LIST_FOREACH (n, &c->sessions) {
        struct tb_core_session *s = TB_LIST_ENTRY(n, struct tb_core_session, node);
        if (!s->ended)
            tb_session_end(s, "cancelled", NULL, "the server stopped", "the server stopped");
    }
    tb_core_leave(c);
}
