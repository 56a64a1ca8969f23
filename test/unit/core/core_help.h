/*
 * Helpers of core's tests: a core on the fake engine and a real store in a folder of its own, ops
 * made in one line, and waiters that remember their answer.
 */
#ifndef TEST_CORE_HELP_H
#define TEST_CORE_HELP_H

#include "unit/store/store_help.h"

#include "core/core.h"
#include "unit/core/fake_engine.h"
#include "util/clock.h"

struct env {
    uv_loop_t loop;
    char *dir;
    struct tb_store *store;
    struct tb_engine *engine;
    struct tb_core *core;
    struct tb_tenant *tenant; /* who all calls are made for, unless a test changes it */
    char session[64];
};

struct waited {
    struct tb_waiter w;
    int calls;
    enum tb_future_state state;
    struct tb_error err;
    double metric;
    int32_t cached;
    bool same_op;
    char path[400], model[100], sampler[100], loss[100], queue[40], reason[100];
};

static inline void copy_text(char *out, size_t n, const char *s)
{
    size_t len = s ? strnlen(s, n - 1) : 0;
    if (len) memcpy(out, s, len);
    out[len] = '\0';
}

static inline void on_wait(struct tb_waiter *w, enum tb_future_state state, const struct tb_op *op,
                           const char *queue_state, const char *reason)
{
    struct waited *a = w->arg;
    a->calls++;
    a->state = state;
    copy_text(a->queue, sizeof(a->queue), queue_state);
    copy_text(a->reason, sizeof(a->reason), reason);
    assert_int_equal(op != NULL, state == TB_FUTURE_DONE || state == TB_FUTURE_FAILED);
    if (!op) return;
    a->err = op->error;
    a->metric = op->result.n_metrics ? op->result.metrics[0].value : -1;
    a->cached = op->result.prompt_cache_hit_tokens;
    copy_text(a->path, sizeof(a->path), op->result.path);
    copy_text(a->model, sizeof(a->model), op->result.model_id);
    copy_text(a->sampler, sizeof(a->sampler), op->result.sampling_session_id);
    copy_text(a->loss, sizeof(a->loss), op->result.loss_id);
}

static inline void wait_on(struct env *e, const char *id, struct waited *a)
{
    memset(a, 0, sizeof(*a));
    a->w.cb = on_wait;
    a->w.arg = a;
    tb_core_wait(e->core, e->tenant, id, strlen(id), &a->w);
}

/* One turn: the loop, then the engine. */
static inline void turn(struct env *e)
{
    if (!fake_step(e->engine)) uv_run(&e->loop, UV_RUN_ONCE);
    uv_run(&e->loop, UV_RUN_NOWAIT);
}

#define TURN_UNTIL(e, cond)                                                                        \
    do {                                                                                           \
        while (!(cond))                                                                            \
            turn(e);                                                                               \
    } while (0)

/* Polls like a client until the result is there. */
static inline struct waited result(struct env *e, const char *id)
{
    struct waited a;
    do {
        wait_on(e, id, &a);
        TURN_UNTIL(e, a.calls);
    } while (a.state == TB_FUTURE_PENDING);
    return a;
}

/* All that the engine and the store have to do. */
static inline void settle(struct env *e)
{
    struct answer a = {0};
    do {
        while (fake_step(e->engine)) {
        }
        a.done = 0;
        tb_store_set_session_project(e->store, TB_TENANT_DEFAULT, "none", "x", on_done,
                                     &a); /* a job behind all others */
        RUN_UNTIL(&e->loop, a.done);
    } while (fake_waiting(e->engine));
}

static inline void env_open(struct env *e, const struct tb_core_options *o)
{
    e->store = store_open(&e->loop, e->dir);
    e->engine = fake_engine_create();
    assert_int_equal(tb_core_create(&e->core, &e->loop, e->engine, e->store, o, NULL), 0);
    e->tenant = tb_core_tenant(e->core, TB_TENANT_DEFAULT);
    struct tb_session_params p = {0};
    const char *id;
    assert_int_equal(tb_core_create_session(e->core, e->tenant, &p, &id, NULL), 0);
    copy_text(e->session, sizeof(e->session), id);
}

/* Closes the way the server does; what the engine still holds goes with its close. */
static inline void env_close(struct env *e)
{
    int closed = 0;
    tb_core_close(e->core, set_flag, &closed);
    TURN_UNTIL(e, closed);
    assert_int_equal(fake_waiting(e->engine), 0);
    assert_int_equal(fake_adapters(e->engine), 0);
    assert_int_equal(fake_versions(e->engine), 0);
    assert_int_equal(fake_losses(e->engine), 0);
    fake_engine_destroy(e->engine);
    store_close(&e->loop, e->store);
}

static inline void env_start(struct env *e, const struct tb_core_options *o)
{
    memset(e, 0, sizeof(*e));
    uv_loop_init(&e->loop);
    e->dir = make_dir();
    env_open(e, o);
}

static inline void env_stop(struct env *e)
{
    env_close(e);
    assert_int_equal(uv_loop_close(&e->loop), 0);
    remove_dir(e->dir);
    tb_free(e->dir);
}

/* ---- ops */

static inline const char *text(struct tb_op *op, const char *s)
{
    return s ? tb_arena_strdup(&op->arena, s) : NULL;
}

static inline struct tb_op *op_of(enum tb_op_type type, const char *model, int64_t seq)
{
    struct tb_op *op = tb_op_create(type);
    op->model_id = text(op, model);
    op->seq_id = seq;
    op->body_bytes = 100;
    if (type == TB_OP_OPTIM_STEP) op->u.optim_step.type = "adamw";
    return op;
}

static inline struct tb_op *op_fb(const char *model, int64_t seq, int n, const char *loss)
{
    struct tb_op *op = op_of(TB_OP_FORWARD_BACKWARD, model, seq);
    op->u.forward_backward.n_data = n;
    op->u.forward_backward.loss_fn = loss;
    return op;
}

static inline struct tb_op *op_create(const char *session, int64_t n, int32_t rank)
{
    struct tb_op *op = tb_op_create(TB_OP_CREATE_MODEL);
    op->session_id = text(op, session);
    op->model_seq_id = n;
    op->body_bytes = 50;
    op->u.create_model.base_model = "m0";
    op->u.create_model.lora = (struct tb_lora_config){.rank = rank, .train_mlp = true};
    op->u.create_model.optimizer = "adamw";
    return op;
}

static inline struct tb_op *op_save(enum tb_op_type type, const char *model, int64_t seq,
                                    const char *name)
{
    struct tb_op *op = op_of(type, model, seq);
    op->u.save_weights.name = text(op, name);
    op->u.save_weights.sampling_session_seq_id = -1;
    return op;
}

static inline struct tb_op *op_publish(const char *model, int64_t seq, int64_t n, bool inflight)
{
    struct tb_op *op = op_save(TB_OP_SAVE_WEIGHTS_FOR_SAMPLER, model, seq, NULL);
    op->u.save_weights.sampling_session_seq_id = n;
    op->u.save_weights.inflight = inflight;
    return op;
}

static inline struct tb_op *op_load(const char *model, int64_t seq, const char *path,
                                    bool optimizer)
{
    struct tb_op *op = op_of(TB_OP_LOAD_WEIGHTS, model, seq);
    op->u.load_weights.path = text(op, path);
    op->u.load_weights.optimizer = optimizer;
    return op;
}

static inline struct tb_op *op_sample(const char *sampler, int64_t seq)
{
    struct tb_op *op = tb_op_create(TB_OP_SAMPLE);
    op->sampling_session_id = text(op, sampler);
    op->seq_id = seq;
    op->body_bytes = 100;
    return op;
}

/* Submits and returns the request id, copied to out. */
static inline int submit(struct env *e, struct tb_op *op, char out[400], struct tb_error *err)
{
    struct tb_ticket t;
    int rc = tb_core_submit(e->core, e->tenant, op, &t, err);
    if (!rc) copy_text(out, 400, t.request_id);
    return rc;
}

static inline void must_submit(struct env *e, struct tb_op *op, char out[400])
{
    struct tb_error err = {0};
    if (submit(e, op, out, &err)) fail_msg("submit: %s", err.msg);
}

/* Creates model n of the environment's session and waits for it. */
static inline void make_model(struct env *e, int64_t n, int32_t rank, char id[100])
{
    char req[400];
    must_submit(e, op_create(e->session, n, rank), req);
    struct waited a = result(e, req);
    assert_int_equal(a.state, TB_FUTURE_DONE);
    copy_text(id, 100, a.model);
}

struct opened {
    int calls, code;
    char id[100], msg[300];
};

static inline void on_opened(void *arg, const struct tb_error *err, const char *id)
{
    struct opened *o = arg;
    o->calls++;
    o->code = err->code;
    copy_text(o->msg, sizeof(o->msg), err->msg);
    copy_text(o->id, sizeof(o->id), id);
}

static inline struct opened open_sampler(struct env *e, const char *session, int64_t seq,
                                         const char *base, const char *path)
{
    struct opened o = {0};
    struct tb_sampling_session_params p = {
        .session_id = session, .seq_id = seq, .base_model = base, .model_path = path};
    tb_core_create_sampling_session(e->core, e->tenant, &p, on_opened, &o);
    RUN_UNTIL(&e->loop, o.calls); /* without the engine: loading is not waited for */
    return o;
}

static inline struct tb_core_stats stats(struct env *e)
{
    struct tb_core_stats s;
    tb_core_stats(e->core, &s);
    return s;
}

#endif
