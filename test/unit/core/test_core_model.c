/* Core: creation, the queue by seq_id, saves and loads, and their failures. */
#include "unit/core/core_help.h"

#include "util/list.h"

#define SUITE(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

static int setup(void **state)
{
    struct env *e = tb_malloc(sizeof(*e));
    env_start(e, NULL);
    *state = e;
    return 0;
}

static int teardown(void **state)
{
    struct env *e = *state;
    env_stop(e);
    tb_free(e);
    return 0;
}

static void test_create(void **state)
{
    struct env *e = *state;
    char req[400], again[400], id[100];
    struct tb_error err = {0};
    must_submit(e, op_create(e->session, 0, 8), req);
    must_submit(e, op_create(e->session, 0, 8), again);
    assert_string_equal(req, again);
    struct waited a = result(e, req);
    assert_int_equal(a.state, TB_FUTURE_DONE);
    snprintf(id, sizeof(id), "%s:train:0", e->session);
    assert_string_equal(a.model, id);
    assert_int_equal(fake_done(e->engine, TB_TASK_ADAPTER_CREATE), 1);
    must_submit(e, op_create(e->session, 0, 8), again);
    assert_string_equal(req, again);

    struct tb_model_answer info;
    assert_int_equal(tb_core_model_info(e->core, e->tenant, id, &info, &err), 0);
    assert_string_equal(info.base_model, "m0");
    assert_string_equal(info.tokenizer_id, "tok0");
    assert_string_equal(info.optimizer, "adamw");
    assert_int_equal(info.lora.rank, 8);
    assert_true(info.lora.alpha == 32);
    assert_int_equal(tb_core_model_info(e->core, e->tenant, "none", &info, &err), TB_ENOTFOUND);

    struct tb_op *op = op_create(e->session, 1, 8);
    op->u.create_model.base_model = "unknown";
    assert_int_equal(submit(e, op, req, &err), TB_EINVAL);
    assert_non_null(strstr(err.msg, "unknown"));
    assert_int_equal(submit(e, op_create(e->session, 1, 0), req, &err), TB_EINVAL);
    assert_int_equal(submit(e, op_create(e->session, 1, 65), req, &err), TB_EINVAL);
    op = op_create(e->session, 1, 8);
    op->u.create_model.lora.train_mlp = false;
    assert_int_equal(submit(e, op, req, &err), TB_EINVAL);
    op = op_create(e->session, 1, 8);
    op->u.create_model.optimizer = "dimuon";
    assert_int_equal(submit(e, op, req, &err), TB_EINVAL);
    assert_int_equal(submit(e, op_create("sess-unknown", 1, 8), req, &err), TB_ENOTFOUND);
    assert_int_equal(submit(e, op_create(e->session, -1, 8), req, &err), TB_EINVAL);
    assert_int_equal(submit(e, op_fb("no such model", 1, 1, NULL), req, &err), TB_ENOTFOUND);
    assert_int_equal(stats(e).models, 1);
}

/* Ids arrive as 5, 6, 4; they run as 4, 5, 6, and nothing before 4 is there. */
static void test_order(void **state)
{
    struct env *e = *state;
    char id[100], r[7][400];
    make_model(e, 0, 8, id);
    must_submit(e, op_fb(id, 1, 1, NULL), r[1]);
    must_submit(e, op_of(TB_OP_OPTIM_STEP, id, 2), r[2]);
    must_submit(e, op_fb(id, 3, 2, NULL), r[3]);
    must_submit(e, op_fb(id, 5, 3, NULL), r[5]);
    must_submit(e, op_of(TB_OP_OPTIM_STEP, id, 6), r[6]);
    assert_int_equal(fake_waiting(e->engine), 3); /* pipelined: results are not waited for */
    settle(e);
    assert_int_equal(result(e, r[3]).state, TB_FUTURE_DONE);
    struct waited a;
    wait_on(e, r[5], &a);
    assert_int_equal(a.calls, 0);
    tb_core_unwait(e->core, &a.w);
    must_submit(e, op_fb(id, 4, 4, NULL), r[4]);
    assert_int_equal(fake_waiting(e->engine), 3);
    a = result(e, r[6]);
    assert_int_equal(a.state, TB_FUTURE_DONE);
    assert_true(a.metric == (double)fake_next_param(fake_next_param(0, 1), 2 + 3 + 4));
    /* the request ids are those that the contract suggests */
    char want[200];
    snprintf(want, sizeof(want), "%s:6", id);
    assert_string_equal(r[6], want);
    assert_int_equal(stats(e).executed[TB_OP_FORWARD_BACKWARD], 4);
    assert_int_equal(stats(e).submitted[TB_OP_FORWARD_BACKWARD], 4);
}

static void test_duplicates(void **state)
{
    struct env *e = *state;
    char id[100], r[400], again[400];
    struct tb_error err = {0};
    make_model(e, 0, 8, id);
    must_submit(e, op_fb(id, 1, 1, NULL), r);
    must_submit(e, op_fb(id, 1, 1000, NULL), again); /* while it runs */
    assert_string_equal(r, again);
    settle(e);
    must_submit(e, op_fb(id, 1, 1000, NULL), again); /* after it ran */
    assert_string_equal(r, again);
    must_submit(e, op_fb(id, 3, 5, NULL), r);
    must_submit(e, op_fb(id, 3, 1000, NULL), again); /* while it is blocked */
    assert_string_equal(r, again);
    must_submit(e, op_of(TB_OP_OPTIM_STEP, id, 2), r);
    must_submit(e, op_of(TB_OP_OPTIM_STEP, id, 4), r);
    struct waited a = result(e, r);
    assert_true(a.metric == (double)fake_next_param(fake_next_param(0, 1), 5));
    assert_int_equal(fake_done(e->engine, TB_TASK_TRAIN), 2);
    assert_int_equal(submit(e, op_fb(id, 0, 1, NULL), r, &err), TB_EINVAL);
    assert_int_equal(submit(e, op_fb(id, -7, 1, NULL), r, &err), TB_EINVAL);
    assert_int_equal(submit(e, op_fb(id, INT64_MAX, 1, NULL), r, &err), TB_EINVAL);
}

/* A failed op fails alone and has consumed its number; so does one that the decoder refused. */
static void test_failures(void **state)
{
    struct env *e = *state;
    char id[100], r[6][400];
    make_model(e, 0, 8, id);
    must_submit(e, op_fb(id, 1, 1, NULL), r[1]);
    must_submit(e, op_fb(id, 2, 1000, "fail"), r[2]);
    struct tb_op *op = op_fb(id, 3, 1000, NULL);
    tb_error_set(&op->error, TB_EPARSE, "bad tensor");
    must_submit(e, op, r[3]);
    op = op_of(TB_OP_OPTIM_STEP, id, 4);
    op->u.optim_step.type = "dimuon";
    must_submit(e, op, r[4]);
    must_submit(e, op_of(TB_OP_OPTIM_STEP, id, 5), r[5]);
    struct waited a = result(e, r[5]);
    assert_int_equal(a.state, TB_FUTURE_DONE);
    assert_true(a.metric == (double)fake_next_param(0, 1));
    a = result(e, r[2]);
    assert_int_equal(a.state, TB_FUTURE_FAILED);
    assert_int_equal(a.err.code, TB_EINVAL);
    assert_string_equal(a.err.msg, "loss fail");
    a = result(e, r[3]);
    assert_int_equal(a.state, TB_FUTURE_FAILED);
    assert_string_equal(a.err.msg, "bad tensor");
    a = result(e, r[4]);
    assert_int_equal(a.err.code, TB_EINVAL);
    assert_non_null(strstr(a.err.msg, "dimuon"));
    assert_int_equal(result(e, r[1]).state, TB_FUTURE_DONE);
    assert_int_equal(stats(e).failed[TB_OP_FORWARD_BACKWARD], 2);
}

/* The oldest SDK sends no numbers: arrival order, repeats known by their key. */
static void test_arrival_order(void **state)
{
    struct env *e = *state;
    char req[400], again[400], id[100];
    struct tb_op *op = op_create(NULL, -1, 8);
    op->idempotency_key = "k0";
    must_submit(e, op, req);
    op = op_create(NULL, -1, 8);
    op->idempotency_key = "k0";
    must_submit(e, op, again);
    assert_string_equal(req, again);
    struct waited a = result(e, req);
    assert_int_equal(a.state, TB_FUTURE_DONE);
    copy_text(id, sizeof(id), a.model);
    for (int i = 0; i < 3; i++) {
        op = i == 2 ? op_of(TB_OP_OPTIM_STEP, id, -1) : op_fb(id, -1, i + 1, NULL);
        char key[8];
        snprintf(key, sizeof(key), "k%d", i + 1);
        op->idempotency_key = text(op, key);
        must_submit(e, op, req);
        op = op_fb(id, -1, 1000, NULL);
        op->idempotency_key = text(op, key);
        must_submit(e, op, again);
        assert_string_equal(req, again);
    }
    assert_true(result(e, req).metric == (double)fake_next_param(0, 3));
    must_submit(e, op_of(TB_OP_OPTIM_STEP, id, -1), req); /* without a key: always new */
    must_submit(e, op_of(TB_OP_OPTIM_STEP, id, -1), again);
    assert_string_not_equal(req, again);
    assert_int_equal(result(e, again).state, TB_FUTURE_DONE);
}

/* Saves capture their place in the order while later compute runs on; loads run alone. */
static void test_barriers(void **state)
{
    struct env *e = *state;
    char id[100], r[9][400], path[200];
    make_model(e, 0, 8, id);
    snprintf(path, sizeof(path), "tinker://%s/weights/c1", id);
    must_submit(e, op_fb(id, 1, 7, NULL), r[1]);
    must_submit(e, op_of(TB_OP_OPTIM_STEP, id, 2), r[2]);
    must_submit(e, op_save(TB_OP_SAVE_WEIGHTS, id, 3, "c1"), r[3]);
    must_submit(e, op_fb(id, 4, 9, NULL), r[4]);
    must_submit(e, op_of(TB_OP_OPTIM_STEP, id, 5), r[5]);
    must_submit(e, op_load(id, 6, path, true), r[6]);
    must_submit(e, op_fb(id, 7, 2, NULL), r[7]);
    must_submit(e, op_of(TB_OP_OPTIM_STEP, id, 8), r[8]);
    assert_int_equal(fake_waiting(e->engine), 5); /* up to the load, the export among them */
    for (int i = 0; i < 5; i++)
        assert_true(fake_step(e->engine));
    assert_int_equal(fake_waiting(e->engine), 0); /* the save is being written: the load waits */
    struct waited a = result(e, r[3]);
    assert_int_equal(a.state, TB_FUTURE_DONE);
    assert_string_equal(a.path, path);
    a = result(e, r[5]);
    assert_true(a.metric == (double)fake_next_param(fake_next_param(0, 7), 9));
    while (fake_waiting_of(e->engine, TB_TASK_ADAPTER_LOAD) == 0)
        uv_run(&e->loop, UV_RUN_ONCE);
    assert_int_equal(fake_waiting(e->engine), 1); /* alone */
    a = result(e, r[6]);
    assert_int_equal(a.state, TB_FUTURE_DONE);
    assert_string_equal(a.path, path);
    assert_string_equal(a.model, id);
    a = result(e, r[8]);
    assert_true(a.metric == (double)fake_next_param(fake_next_param(0, 7), 2));
}

static void test_saves(void **state)
{
    struct env *e = *state;
    char id[100], r[400], want[300];
    make_model(e, 0, 8, id);
    int64_t seq = 1;
    /* no name: one is made, unique in the run */
    must_submit(e, op_save(TB_OP_SAVE_WEIGHTS, id, seq++, NULL), r);
    struct waited a = result(e, r), b;
    assert_int_equal(a.state, TB_FUTURE_DONE);
    must_submit(e, op_save(TB_OP_SAVE_WEIGHTS, id, seq++, NULL), r);
    b = result(e, r);
    assert_int_equal(b.state, TB_FUTURE_DONE);
    assert_string_not_equal(a.path, b.path);
    must_submit(e, op_save(TB_OP_SAVE_WEIGHTS_FOR_SAMPLER, id, seq++, "s1"), r);
    a = result(e, r);
    snprintf(want, sizeof(want), "tinker://%s/sampler_weights/s1", id);
    assert_string_equal(a.path, want);
    must_submit(e, op_save(TB_OP_SAVE_WEIGHTS_EXTERNAL, id, seq++, "e1"), r);
    a = result(e, r);
    snprintf(want, sizeof(want), "tinker://%s/external_weights/e1", id);
    assert_string_equal(a.path, want);
    /* the name is taken: that save fails, and only that */
    must_submit(e, op_save(TB_OP_SAVE_WEIGHTS_FOR_SAMPLER, id, seq++, "s1"), r);
    a = result(e, r);
    assert_int_equal(a.state, TB_FUTURE_FAILED);
    assert_int_equal(a.err.code, TB_EEXIST);
    assert_int_equal(tb_error_category(a.err.code), TB_CAT_USER);
    struct tb_op *op = op_save(TB_OP_SAVE_WEIGHTS_FOR_SAMPLER, id, seq++, "s1");
    op->u.save_weights.overwrite = true;
    must_submit(e, op, r);
    assert_int_equal(result(e, r).state, TB_FUTURE_DONE);
    must_submit(e, op_save(TB_OP_SAVE_WEIGHTS, id, seq++, "../x"), r);
    assert_int_equal(result(e, r).err.code, TB_EINVAL);
    op = op_save(TB_OP_SAVE_WEIGHTS, id, seq++, "ttl");
    op->u.save_weights.has_ttl = true;
    op->u.save_weights.ttl_seconds = -5;
    must_submit(e, op, r);
    assert_int_equal(result(e, r).err.code, TB_EINVAL);
    must_submit(e, op_fb(id, seq++, 1, NULL), r);
    assert_int_equal(result(e, r).state, TB_FUTURE_DONE);
    /* two saves in flight: one exported copy at a time, both succeed */
    char r2[400];
    must_submit(e, op_save(TB_OP_SAVE_WEIGHTS, id, seq++, "x1"), r);
    must_submit(e, op_save(TB_OP_SAVE_WEIGHTS, id, seq++, "x2"), r2);
    assert_int_equal(fake_waiting_of(e->engine, TB_TASK_EXPORT), 1);
    assert_int_equal(result(e, r2).state, TB_FUTURE_DONE);
    assert_int_equal(result(e, r).state, TB_FUTURE_DONE);
}

static void test_load_failures(void **state)
{
    struct env *e = *state;
    char id[100], other[100], r[400], path[300];
    make_model(e, 0, 8, id);
    make_model(e, 1, 4, other);
    must_submit(e, op_save(TB_OP_SAVE_WEIGHTS_FOR_SAMPLER, id, 1, "s"), r);
    struct waited a = result(e, r);
    copy_text(path, sizeof(path), a.path);
    must_submit(e, op_load(id, 2, path, true), r);
    a = result(e, r);
    assert_int_equal(a.err.code, TB_EINVAL);
    assert_non_null(strstr(a.err.msg, "without optimizer"));
    must_submit(e, op_load(id, 3, "tinker://x/weights/none", false), r);
    assert_int_equal(result(e, r).err.code, TB_ENOTFOUND);
    must_submit(e, op_load(id, 4, "nonsense", false), r);
    assert_int_equal(result(e, r).err.code, TB_EINVAL);
    must_submit(e, op_load(other, 1, path, false), r); /* another rank */
    assert_int_equal(result(e, r).err.code, TB_EINVAL);
    struct tb_op *op = op_load(id, 5, path, true);
    op->u.load_weights.optimizer_type = "adamw";
    must_submit(e, op, r);
    assert_int_equal(result(e, r).err.code, TB_EINVAL);
    op = op_load(id, 6, path, false);
    op->u.load_weights.optimizer_type = "dimuon";
    must_submit(e, op, r);
    assert_int_equal(result(e, r).err.code, TB_EINVAL);
    op = op_load(id, 7, path, false);
    op->u.load_weights.optimizer_type = "adamw";
    must_submit(e, op, r);
    assert_int_equal(result(e, r).state, TB_FUTURE_DONE);
    must_submit(e, op_fb(other, 2, 1, NULL), r);
    assert_int_equal(result(e, r).state, TB_FUTURE_DONE);
}

static struct tb_op *op_load_new(struct env *e, int64_t n, const char *path, bool optimizer)
{
    struct tb_op *op = op_load(NULL, -1, path, optimizer);
    op->session_id = text(op, e->session);
    op->model_seq_id = n;
    return op;
}

static void test_create_by_load(void **state)
{
    struct env *e = *state;
    char id[100], id2[100], r[400], again[400], path[300];
    make_model(e, 0, 8, id);
    must_submit(e, op_fb(id, 1, 7, NULL), r);
    must_submit(e, op_of(TB_OP_OPTIM_STEP, id, 2), r);
    must_submit(e, op_save(TB_OP_SAVE_WEIGHTS, id, 3, "c"), r);
    struct waited a = result(e, r);
    copy_text(path, sizeof(path), a.path);
    must_submit(e, op_load_new(e, 1, path, true), r);
    must_submit(e, op_load_new(e, 1, path, true), again);
    assert_string_equal(r, again);
    snprintf(id2, sizeof(id2), "%s:train:1", e->session);
    must_submit(e, op_fb(id2, 1, 2, NULL), again); /* before it exists */
    must_submit(e, op_of(TB_OP_OPTIM_STEP, id2, 2), again);
    a = result(e, r);
    assert_int_equal(a.state, TB_FUTURE_DONE);
    assert_string_equal(a.model, id2);
    assert_string_equal(a.path, path);
    a = result(e, again);
    assert_true(a.metric == (double)fake_next_param(fake_next_param(0, 7), 2));
    struct tb_model_answer info;
    assert_int_equal(tb_core_model_info(e->core, e->tenant, id2, &info, NULL), 0);
    assert_int_equal(info.lora.rank, 8);
    assert_true(info.lora.train_mlp && !info.lora.train_attn);

    struct tb_op *op = op_load_new(e, 2, path, false);
    op->u.load_weights.base_model = "m1";
    must_submit(e, op, r);
    a = result(e, r);
    assert_int_equal(a.err.code, TB_EINVAL);
    op = op_load_new(e, 3, path, false);
    op->u.load_weights.base_model = "m0";
    must_submit(e, op, r);
    assert_int_equal(result(e, r).state, TB_FUTURE_DONE);
    must_submit(e, op_load_new(e, 4, "tinker://gone/weights/x", false), r);
    a = result(e, r);
    assert_int_equal(a.err.code, TB_ENOTFOUND);
    assert_non_null(strstr(a.err.msg, "tinker://gone/weights/x"));
    assert_int_equal(fake_adapters(e->engine), 3);
}

/* Ops before the creation's end wait; when it fails they fail with its message, and so do later
 * ones. */
static void test_creation_failure(void **state)
{
    struct env *e = *state;
    char id[100], r0[400], r1[400], r9[400], r[400];
    must_submit(e, op_create(e->session, 0, 13), r0);
    snprintf(id, sizeof(id), "%s:train:0", e->session);
    must_submit(e, op_fb(id, 1, 1, NULL), r1);
    must_submit(e, op_fb(id, 9, 1, NULL), r9); /* beyond a gap */
    assert_int_equal(fake_waiting(e->engine), 1);
    struct waited a = result(e, r0);
    assert_int_equal(a.state, TB_FUTURE_FAILED);
    assert_string_equal(a.err.msg, "no memory for the adapter");
    assert_int_equal(result(e, r1).state, TB_FUTURE_FAILED);
    assert_string_equal(result(e, r9).err.msg, a.err.msg);
    must_submit(e, op_fb(id, 12, 1, NULL), r);
    assert_string_equal(result(e, r).err.msg, a.err.msg);
    assert_int_equal(fake_done(e->engine, TB_TASK_TRAIN), 0);
    assert_int_equal(tb_core_model_info(e->core, e->tenant, id, &(struct tb_model_answer){0}, NULL),
                     TB_ENOMEM);
    /* a creation that the decoder refused is one that failed */
    struct tb_op *op = op_create(e->session, 1, 8);
    tb_error_set(&op->error, TB_EPARSE, "bad body");
    must_submit(e, op, r);
    assert_string_equal(result(e, r).err.msg, "bad body");
}

static void test_unload(void **state)
{
    struct env *e = *state;
    char id[100], r1[400], r2[400], r4[400], r[400];
    struct tb_error err = {0};
    make_model(e, 0, 8, id);
    must_submit(e, op_fb(id, 1, 1, NULL), r1);
    must_submit(e, op_of(TB_OP_UNLOAD_MODEL, id, -1), r2);
    must_submit(e, op_fb(id, 4, 1, NULL), r4);
    struct waited a = result(e, r2);
    assert_int_equal(a.state, TB_FUTURE_DONE);
    assert_string_equal(a.model, id);
    assert_int_equal(result(e, r1).state, TB_FUTURE_DONE);
    assert_int_equal(result(e, r4).state, TB_FUTURE_FAILED);
    assert_int_equal(fake_adapters(e->engine), 0);
    assert_int_equal(submit(e, op_fb(id, 5, 1, NULL), r, &err), TB_ENOTFOUND);
    assert_int_equal(stats(e).models, 0);
}

static void test_backpressure(void **state)
{
    struct env *e = *state;
    env_close(e);
    struct tb_core_options o = {.max_queued_bytes = 1000};
    env_open(e, &o);
    char id[100], r[400];
    struct tb_error err = {0};
    make_model(e, 0, 8, id);
    struct tb_op *op = op_fb(id, 1, 1, NULL);
    op->body_bytes = 5000; /* alone it is always taken */
    must_submit(e, op, r);
    assert_int_equal(stats(e).queued_bytes, 5000);
    assert_int_equal(submit(e, op_fb(id, 2, 1, NULL), r, &err), TB_EBUSY);
    assert_int_equal(tb_error_status(TB_EBUSY), 429);
    must_submit(e, op_fb(id, 1, 1, NULL), r); /* a repeat costs nothing */
    settle(e);
    assert_int_equal(stats(e).queued_bytes, 0);
    /* full of ops that wait for one that comes last: that one is taken */
    op = op_fb(id, 3, 1, NULL);
    op->body_bytes = 1000;
    must_submit(e, op, r);
    assert_int_equal(submit(e, op_fb(id, 4, 1, NULL), r, &err), TB_EBUSY);
    must_submit(e, op_fb(id, 2, 1, NULL), r);
    settle(e);
    must_submit(e, op_fb(id, 4, 1, NULL), r);
    assert_int_equal(result(e, r).state, TB_FUTURE_DONE);
}

/* A big batch is cut down to its result, which stays whole. */
/* Copies of adapters that would pass the limit together wait, in order, and so does what comes
 * behind them in their models' queues. */
static void test_copies_wait(void **state)
{
    enum { N = 5, COPY = 100 * 8 * 4 }; /* fake model: vocab x rank floats */
    struct env *e = *state;
    env_close(e);
    struct tb_core_options o = {.max_queued_bytes = 6 * COPY};
    env_open(e, &o);
    char id[N][100], saved[N][400], after[N][400], path[600];
    for (int i = 0; i < N; i++) {
        make_model(e, i, 8, id[i]);
        must_submit(e, op_fb(id[i], 1, i + 1, NULL), after[i]);
        must_submit(e, op_of(TB_OP_OPTIM_STEP, id[i], 2), after[i]);
        result(e, after[i]);
    }
    for (int i = 0; i < N; i++) {
        must_submit(e, op_save(TB_OP_SAVE_WEIGHTS, id[i], 3, "c"), saved[i]);
        must_submit(e, op_of(TB_OP_OPTIM_STEP, id[i], 4), after[i]);
    }
    assert_int_equal(fake_waiting_of(e->engine, TB_TASK_EXPORT), 2);
    assert_int_equal(fake_waiting_of(e->engine, TB_TASK_OPTIM), 2); /* of those models */
    assert_int_equal(stats(e).copy_bytes, 6 * COPY);
    for (int i = 0; i < N; i++) {
        struct waited a = result(e, saved[i]);
        assert_int_equal(a.state, TB_FUTURE_DONE);
        assert_true(stats(e).copy_bytes <= 6 * COPY);
        assert_true(result(e, after[i]).metric ==
                    (double)fake_next_param(fake_next_param(0, i + 1), 0));
    }
    assert_int_equal(stats(e).copy_bytes, 0);
    /* Loads count too: one with its moments and four without are more than fit; any four do. */
    char loaded[N][400];
    for (int i = 0; i < N; i++) {
        snprintf(path, sizeof(path), "tinker://%s/weights/c", id[i]);
        must_submit(e, op_load(id[i], 5, path, i == 0), loaded[i]);
    }
    while (fake_waiting_of(e->engine, TB_TASK_ADAPTER_LOAD) < 4)
        uv_run(&e->loop, UV_RUN_ONCE);
    assert_in_range(stats(e).copy_bytes, 4 * COPY, 6 * COPY);
    settle(e);
    for (int i = 0; i < N; i++)
        assert_int_equal(result(e, loaded[i]).state, TB_FUTURE_DONE);
    assert_int_equal(stats(e).copy_bytes, 0);
    /* What waits goes with its session; what alone is beyond the limit goes through. */
    for (int i = 0; i < N; i++)
        must_submit(e, op_save(TB_OP_SAVE_WEIGHTS, id[i], 6, "d"), saved[i]);
    make_model(e, N, 64, id[0]);
    must_submit(e, op_save(TB_OP_SAVE_WEIGHTS, id[0], 1, "big"), saved[0]);
    assert_int_equal(result(e, saved[0]).state, TB_FUTURE_DONE);
    for (int i = 0; i < 3; i++)
        must_submit(e, op_save(TB_OP_SAVE_WEIGHTS, id[i + 1], 7, "e"), saved[i]);
    struct tb_error err = {0};
    assert_int_equal(tb_core_finish_session(e->core, e->tenant, e->session, NULL, NULL, &err), 0);
    settle(e);
    assert_int_equal(stats(e).copy_bytes, 0);
}

static void test_compaction(void **state)
{
    struct env *e = *state;
    char id[100], r[400];
    make_model(e, 0, 8, id);
    struct tb_op *op = op_fb(id, 1, 1, NULL);
    memset(tb_arena_alloc(&op->arena, 1 << 20), 7, 1 << 20);
    must_submit(e, op, r);
    struct waited a = result(e, r), b = result(e, r);
    assert_int_equal(a.state, TB_FUTURE_DONE);
    assert_true(a.metric == b.metric);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        SUITE(test_create),         SUITE(test_order),
        SUITE(test_duplicates),     SUITE(test_failures),
        SUITE(test_arrival_order),  SUITE(test_barriers),
        SUITE(test_saves),          SUITE(test_load_failures),
        SUITE(test_create_by_load), SUITE(test_creation_failure),
        SUITE(test_unload),         SUITE(test_backpressure),
        SUITE(test_compaction),     SUITE(test_copies_wait),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
