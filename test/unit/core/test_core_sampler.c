/* Core: sampling sessions, sharing and freeing of versions, samples. */
#include "unit/core/core_help.h"

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

/* A model whose param is next(0, grad); *path is a checkpoint of it when asked for. */
static void trained(struct env *e, int64_t n, int grad, char id[100], char path[400])
{
    char r[400];
    make_model(e, n, 8, id);
    must_submit(e, op_fb(id, 1, grad, NULL), r);
    must_submit(e, op_of(TB_OP_OPTIM_STEP, id, 2), r);
    if (!path) return;
    must_submit(e, op_save(TB_OP_SAVE_WEIGHTS_FOR_SAMPLER, id, 3, "s"), r);
    struct waited a = result(e, r);
    assert_int_equal(a.state, TB_FUTURE_DONE);
    copy_text(path, 400, a.path);
}

static int32_t sample(struct env *e, const char *sampler, int64_t seq)
{
    char r[400];
    must_submit(e, op_sample(sampler, seq), r);
    struct waited a = result(e, r);
    if (a.state != TB_FUTURE_DONE) fail_msg("sample: %s", a.err.msg);
    return a.cached;
}

static void test_base(void **state)
{
    struct env *e = *state;
    struct opened o = open_sampler(e, e->session, 0, "m0", NULL), again;
    assert_int_equal(o.code, 0);
    char want[100];
    snprintf(want, sizeof(want), "%s:sample:0", e->session);
    assert_string_equal(o.id, want);
    again = open_sampler(e, e->session, 0, "m0", NULL);
    assert_string_equal(again.id, o.id);
    assert_int_equal(sample(e, o.id, 0), -1);
    assert_int_equal(open_sampler(e, e->session, 1, "unknown", NULL).code, TB_ENOTFOUND);
    assert_int_equal(open_sampler(e, "unknown", 1, "m0", NULL).code, TB_ENOTFOUND);
    assert_int_equal(open_sampler(e, e->session, 1, "m0", "tinker://a/weights/b").code, TB_EINVAL);
    assert_int_equal(open_sampler(e, e->session, 1, NULL, NULL).code, TB_EINVAL);
    assert_int_equal(open_sampler(e, e->session, -1, "m0", NULL).code, TB_EINVAL);
    assert_int_equal(open_sampler(e, e->session, 1, NULL, "nonsense").code, TB_EINVAL);
    assert_int_equal(open_sampler(e, e->session, 1, NULL, "tinker://a/external_weights/b").code,
                     TB_EINVAL);
    struct opened none = open_sampler(e, e->session, 1, NULL, "tinker://a/weights/b");
    assert_int_equal(none.code, TB_ENOTFOUND);
    assert_non_null(strstr(none.msg, "tinker://a/weights/b"));
    assert_int_equal(open_sampler(e, e->session, 1, "m0", NULL).code,
                     0); /* the number is free again */
    assert_int_equal(stats(e).samplers, 2);
}

static void test_labels(void **state)
{
    struct env *e = *state;
    struct opened o = open_sampler(e, e->session, 0, "m0", NULL);
    char r1[400], r2[400], want[200];
    struct tb_error err = {0};
    must_submit(e, op_sample(o.id, INT64_C(1000000000000000007)), r1);
    must_submit(e, op_sample(o.id, INT64_C(1000000000000000007)), r2);
    assert_string_equal(r1, r2);
    snprintf(want, sizeof(want), "%s:1000000000000000007", o.id);
    assert_string_equal(r1, want);
    must_submit(e, op_sample(o.id, 3), r2); /* no order */
    assert_int_equal(fake_waiting_of(e->engine, TB_TASK_SAMPLE), 2);
    assert_int_equal(result(e, r2).state, TB_FUTURE_DONE);
    assert_int_equal(result(e, r1).state, TB_FUTURE_DONE);
    must_submit(e, op_sample(o.id, 3), r1);
    assert_string_equal(r1, r2);
    assert_int_equal(fake_done(e->engine, TB_TASK_SAMPLE), 2);
    struct tb_op *op = op_sample(o.id, 4);
    tb_error_set(&op->error, TB_EPARSE, "bad params");
    must_submit(e, op, r1);
    struct waited a = result(e, r1);
    assert_int_equal(a.state, TB_FUTURE_FAILED);
    assert_string_equal(a.err.msg, "bad params");
    assert_int_equal(submit(e, op_sample("unknown", 0), r1, &err), TB_ENOTFOUND);
}

/* A snapshot stays what it was while training goes on; an ephemeral save leaves nothing on disk. */
static void test_ephemeral(void **state)
{
    struct env *e = *state;
    char id[100], r[400], again[400], want[100];
    trained(e, 0, 5, id, NULL);
    must_submit(e, op_publish(id, 3, 0, false), r);
    must_submit(e, op_publish(id, 3, 0, false), again);
    assert_string_equal(r, again);
    must_submit(e, op_fb(id, 4, 9, NULL), again);
    must_submit(e, op_of(TB_OP_OPTIM_STEP, id, 5), again);
    assert_int_equal(fake_waiting(e->engine), 5); /* pipelined with the training */
    struct waited a = result(e, r);
    snprintf(want, sizeof(want), "%s:sample:0", e->session);
    assert_string_equal(a.sampler, want);
    assert_string_equal(a.path, "");
    settle(e);
    assert_int_equal(sample(e, want, 0), fake_next_param(0, 5));
    must_submit(e, op_publish(id, 6, 1, false), r);
    a = result(e, r);
    assert_int_equal(sample(e, a.sampler, 0), fake_next_param(fake_next_param(0, 5), 9));
    assert_int_equal(sample(e, want, 1), fake_next_param(0, 5));
    assert_int_equal(fake_versions(e->engine), 2);
    /* clients that count create_sampling_session apart, or by model, find nobody else's sampler */
    struct opened o = open_sampler(e, e->session, 1, "m0", NULL);
    assert_int_equal(o.code, 0);
    assert_string_not_equal(o.id, a.sampler);
    snprintf(want, sizeof(want), "%s:sample:", e->session);
    assert_memory_equal(o.id, want, strlen(want));
    assert_string_equal(open_sampler(e, e->session, 1, "m0", NULL).id, o.id);
    assert_int_equal(sample(e, o.id, 0), -1); /* the base model */
    must_submit(e, op_publish(id, 7, 1, false), r);
    struct waited b = result(e, r);
    assert_int_equal(b.state, TB_FUTURE_DONE);
    assert_string_not_equal(b.sampler, a.sampler);
    assert_string_not_equal(b.sampler, o.id);
    settle(e);
    assert_int_equal(fake_versions(e->engine), 3);
    tb_core_finish_session(e->core, e->tenant, e->session, "success", NULL, NULL);
    settle(e);
    assert_int_equal(fake_versions(e->engine), 0);
    assert_int_equal(stats(e).samplers, 0);
}

/* Inflight samplers of a model share one target, which later inflight saves move. */
static void test_inflight(void **state)
{
    struct env *e = *state;
    char id[100], r[400], s0[100], snap[100];
    trained(e, 0, 5, id, NULL);
    must_submit(e, op_publish(id, 3, 0, true), r);
    struct waited a = result(e, r);
    copy_text(s0, sizeof(s0), a.sampler);
    must_submit(e, op_publish(id, 4, 1, false), r);
    a = result(e, r);
    copy_text(snap, sizeof(snap), a.sampler);
    assert_int_equal(sample(e, s0, 0), fake_next_param(0, 5));
    must_submit(e, op_of(TB_OP_OPTIM_STEP, id, 5), r);
    must_submit(e, op_publish(id, 6, 2, true), r);
    a = result(e, r);
    int64_t now = fake_next_param(fake_next_param(0, 5), 0);
    assert_int_equal(sample(e, a.sampler, 0), now);
    assert_int_equal(sample(e, s0, 1), now);
    assert_int_equal(sample(e, snap, 0), fake_next_param(0, 5));
    settle(e);
    assert_int_equal(fake_versions(e->engine), 2);
    struct tb_op *op = op_publish(id, 7, -1, true);
    op->u.save_weights.name = "x";
    must_submit(e, op, r);
    assert_int_equal(result(e, r).err.code, TB_EINVAL);
}

/* One load for all samplers of a checkpoint; samples wait for it; the last sampler frees it. */
static void test_sharing(void **state)
{
    struct env *e = *state;
    char id[100], path[400], r1[400], r2[400];
    trained(e, 0, 5, id, path);
    struct tb_session_params p = {0};
    const char *other;
    char second[64];
    tb_core_create_session(e->core, e->tenant, &p, &other, NULL);
    copy_text(second, sizeof(second), other);
    struct opened a = open_sampler(e, e->session, 0, NULL, path);
    struct opened b = open_sampler(e, second, 0, NULL, path);
    assert_int_equal(a.code, 0);
    assert_int_equal(b.code, 0);
    must_submit(e, op_sample(a.id, 0), r1);
    must_submit(e, op_sample(b.id, 0), r2);
    assert_int_equal(fake_waiting_of(e->engine, TB_TASK_SAMPLE), 0);
    assert_int_equal(result(e, r1).cached, fake_next_param(0, 5));
    assert_int_equal(result(e, r2).cached, fake_next_param(0, 5));
    assert_int_equal(fake_done(e->engine, TB_TASK_VERSION_LOAD), 1);
    assert_int_equal(fake_versions(e->engine), 1);
    struct opened c = open_sampler(e, second, 1, NULL, path);
    assert_int_equal(sample(e, c.id, 0), fake_next_param(0, 5));
    assert_int_equal(fake_done(e->engine, TB_TASK_VERSION_LOAD), 1);
    tb_core_finish_session(e->core, e->tenant, e->session, "success", NULL, NULL);
    settle(e);
    assert_int_equal(fake_versions(e->engine), 1);
    tb_core_finish_session(e->core, e->tenant, second, "success", NULL, NULL);
    settle(e);
    assert_int_equal(fake_versions(e->engine), 0);
}

/* A checkpoint written anew is another version; the old samplers keep what they had. */
static void test_overwritten(void **state)
{
    struct env *e = *state;
    char id[100], path[400], r[400];
    trained(e, 0, 5, id, path);
    struct opened a = open_sampler(e, e->session, 0, NULL, path);
    assert_int_equal(sample(e, a.id, 0), fake_next_param(0, 5));
    must_submit(e, op_of(TB_OP_OPTIM_STEP, id, 4), r);
    struct tb_op *op = op_save(TB_OP_SAVE_WEIGHTS_FOR_SAMPLER, id, 5, "s");
    op->u.save_weights.overwrite = true;
    must_submit(e, op, r);
    assert_int_equal(result(e, r).state, TB_FUTURE_DONE);
    struct opened b = open_sampler(e, e->session, 1, NULL, path);
    assert_int_equal(sample(e, b.id, 0), fake_next_param(fake_next_param(0, 5), 0));
    assert_int_equal(sample(e, a.id, 1), fake_next_param(0, 5));
    assert_int_equal(fake_versions(e->engine), 2);
}

static void test_damaged_checkpoint(void **state)
{
    struct env *e = *state;
    char id[100], path[400], dir[600], file[700], r[400];
    trained(e, 0, 5, id, path);
    assert_int_equal(tb_store_ckpt_dir(e->store, path, dir, sizeof(dir), NULL), 0);
    snprintf(file, sizeof(file), "%s/adapter_model.safetensors", dir);
    assert_int_equal(truncate(file, 100), 0);
    struct opened a = open_sampler(e, e->session, 0, NULL, path);
    assert_int_equal(a.code, 0); /* the row is there */
    for (int i = 0; i < 2; i++) {
        must_submit(e, op_sample(a.id, i), r);
        struct waited w = result(e, r);
        assert_int_equal(w.state, TB_FUTURE_FAILED);
        assert_int_equal(w.err.code, TB_ECORRUPT);
        assert_non_null(strstr(w.err.msg, "adapter_model.safetensors"));
    }
    assert_int_equal(fake_versions(e->engine), 0);
}

/* Clients before sampling sessions name a base model or a path in every sample. */
static void test_by_address(void **state)
{
    struct env *e = *state;
    char id[100], path[400], r[400], again[400];
    struct tb_error err = {0};
    trained(e, 0, 5, id, path);
    struct tb_op *op;
    for (int i = 0; i < 3; i++) {
        op = op_sample(NULL, -1);
        op->u.sample.model_path = text(op, path);
        op->idempotency_key = i == 1 ? "same" : NULL;
        must_submit(e, op, r);
        if (i == 1) {
            op = op_sample(NULL, -1);
            op->u.sample.model_path = text(op, path);
            op->idempotency_key = "same";
            must_submit(e, op, again);
            assert_string_equal(r, again);
        }
        assert_int_equal(result(e, r).cached, fake_next_param(0, 5));
    }
    assert_int_equal(fake_done(e->engine, TB_TASK_VERSION_LOAD), 1);
    assert_int_equal(fake_done(e->engine, TB_TASK_SAMPLE), 3);
    op = op_sample(NULL, -1);
    op->u.sample.base_model = "m1";
    must_submit(e, op, r);
    assert_int_equal(result(e, r).cached, -1);
    op = op_sample(NULL, -1);
    op->u.sample.model_path = "tinker://a/weights/none";
    must_submit(e, op, r);
    struct waited w = result(e, r);
    assert_int_equal(w.state, TB_FUTURE_FAILED);
    assert_int_equal(w.err.code, TB_ENOTFOUND);
    assert_int_equal(submit(e, op_sample(NULL, -1), r, &err), TB_EINVAL);
    op = op_sample(NULL, -1);
    op->u.sample.base_model = "unknown";
    assert_int_equal(submit(e, op, r, &err), TB_ENOTFOUND);
    /* overwriting is seen, though the client has no session to open anew */
    must_submit(e, op_of(TB_OP_OPTIM_STEP, id, 4), r);
    op = op_save(TB_OP_SAVE_WEIGHTS_FOR_SAMPLER, id, 5, "s");
    op->u.save_weights.overwrite = true;
    must_submit(e, op, r);
    assert_int_equal(result(e, r).state, TB_FUTURE_DONE);
    op = op_sample(NULL, -1);
    op->u.sample.model_path = text(op, path);
    must_submit(e, op, r);
    assert_int_equal(result(e, r).cached, fake_next_param(fake_next_param(0, 5), 0));
}

static void test_idle_addresses(void **state)
{
    struct env *e = *state;
    char id[100], path[400], r[400];
    trained(e, 0, 5, id, path);
    env_close(e);
    struct tb_core_options o = {.session_lease_ms = 20};
    env_open(e, &o);
    struct tb_op *op = op_sample(NULL, -1);
    op->u.sample.model_path = text(op, path);
    must_submit(e, op, r);
    assert_int_equal(result(e, r).cached, fake_next_param(0, 5));
    assert_int_equal(stats(e).samplers, 1);
    TURN_UNTIL(e, stats(e).samplers == 0);
    settle(e);
    assert_int_equal(fake_versions(e->engine), 0);
    op = op_sample(NULL, -1);
    op->u.sample.model_path = text(op, path);
    must_submit(e, op, r);
    assert_int_equal(result(e, r).cached, fake_next_param(0, 5));
}

/* The session ends with samples running, samples that wait for weights, and a session being opened.
 */
static void test_finish(void **state)
{
    struct env *e = *state;
    char id[100], path[400], r1[400], r2[400];
    trained(e, 0, 5, id, path);
    struct opened base = open_sampler(e, e->session, 0, "m0", NULL);
    struct opened by_path = open_sampler(e, e->session, 1, NULL, path), late = {0};
    must_submit(e, op_sample(base.id, 0), r1);
    must_submit(e, op_sample(by_path.id, 0), r2);
    struct waited a, b;
    wait_on(e, r1, &a);
    wait_on(e, r2, &b);
    struct tb_sampling_session_params p = {
        .session_id = e->session, .seq_id = 2, .model_path = path};
    tb_core_create_sampling_session(e->core, e->tenant, &p, on_opened, &late);
    tb_core_finish_session(e->core, e->tenant, e->session, "success", NULL, NULL);
    assert_int_equal(late.calls, 1);
    assert_int_equal(late.code, TB_ECANCELED);
    assert_int_equal(b.state, TB_FUTURE_FAILED);
    settle(e);
    settle(e);
    assert_int_equal(a.state, TB_FUTURE_FAILED);
    assert_int_equal(a.err.code, TB_ECANCELED);
    assert_int_equal(fake_versions(e->engine), 0);
    assert_int_equal(late.calls, 1);
}

struct streamed {
    struct tb_core_stream s;
    struct env *env;
    char id[400];
    int n, ends;
    int32_t tokens[64];
    enum tb_future_state state;
    int code;
    bool leave; /* goes away at the first token */
};

static void on_tokens(struct tb_core_stream *s, const struct tb_sampled_token *tokens, int32_t n)
{
    struct streamed *a = s->arg;
    assert_int_equal(a->ends, 0);
    for (int32_t i = 0; i < n; i++)
        a->tokens[a->n++] = tokens[i].token;
    if (!a->leave) return;
    tb_core_unstream(a->env->core, s);
    tb_core_cancel(a->env->core, a->env->tenant, a->id, strlen(a->id));
}

static void on_end(struct tb_core_stream *s, enum tb_future_state state, const struct tb_op *op)
{
    struct streamed *a = s->arg;
    a->ends++;
    a->state = state;
    a->code = op ? op->error.code : 0;
    if (state == TB_FUTURE_DONE)
        tb_core_retrieved(a->env->core, a->env->tenant, a->id, strlen(a->id));
}

static struct tb_op *op_stream(const char *sampler, int64_t seq)
{
    struct tb_op *op = op_sample(sampler, seq);
    op->u.sample.stream = true;
    return op;
}

static void stream_on(struct env *e, struct streamed *a)
{
    a->env = e;
    a->s = (struct tb_core_stream){.tokens = on_tokens, .end = on_end, .arg = a};
    tb_core_stream(e->core, e->tenant, a->id, strlen(a->id), &a->s);
}

static void test_streams(void **state)
{
    struct env *e = *state;
    struct opened o = open_sampler(e, e->session, 0, "m0", NULL);
    struct streamed a = {0}, b = {.leave = true}, c = {0}, d = {0};
    /* All tokens in order, then the end; the result is gone when the client has it. */
    must_submit(e, op_stream(o.id, 10), a.id);
    stream_on(e, &a);
    fake_progress(e->engine, 2);
    fake_progress(e->engine, 1);
    assert_int_equal(a.n, 3);
    assert_int_equal(a.tokens[2], 10);
    assert_int_equal(a.ends, 0);
    settle(e);
    assert_true(a.ends == 1 && a.state == TB_FUTURE_DONE && a.n == 3);
    stream_on(e, &a);
    assert_true(a.ends == 2 && a.state == TB_FUTURE_GONE);
    copy_text(a.id, sizeof(a.id), "nonsense");
    stream_on(e, &a);
    assert_true(a.ends == 3 && a.state == TB_FUTURE_UNKNOWN);
    /* A client that goes away inside its callback hears no more, and the sample is canceled. */
    must_submit(e, op_stream(o.id, 20), b.id);
    stream_on(e, &b);
    fake_progress(e->engine, 2);
    fake_progress(e->engine, 2);
    struct waited w = result(e, b.id);
    assert_true(b.n == 2 && b.ends == 0);
    assert_int_equal(w.err.code, TB_ECANCELED);
    /* The second stream takes the first one's place; one that comes late gets the end alone. */
    must_submit(e, op_stream(o.id, 30), c.id);
    copy_text(d.id, sizeof(d.id), c.id);
    stream_on(e, &c);
    stream_on(e, &d);
    tb_core_unstream(e->core, &c.s);
    fake_progress(e->engine, 1);
    assert_true(c.n == 0 && d.n == 1);
    settle(e);
    assert_true(c.ends == 0 && d.ends == 1 && d.state == TB_FUTURE_DONE);
    must_submit(e, op_stream(o.id, 40), c.id);
    settle(e);
    stream_on(e, &c);
    assert_true(c.ends == 1 && c.state == TB_FUTURE_DONE && c.n == 0);
    /* The session ends: so does the stream. */
    must_submit(e, op_stream(o.id, 50), d.id);
    d.ends = d.n = 0;
    stream_on(e, &d);
    tb_core_finish_session(e->core, e->tenant, e->session, "success", NULL, NULL);
    settle(e);
    assert_true(d.ends == 1 && d.state == TB_FUTURE_FAILED && d.code == TB_ECANCELED);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

/* A poll says when memory is what a sample waits for. */
static void test_cache_full(void **state)
{
    (void)state;
    struct env e;
    struct tb_core_options o = {.long_poll_ms = 1};
    env_start(&e, &o);
    char r[400];
    struct waited a;
    must_submit(&e, op_sample(open_sampler(&e, e.session, 0, "m0", NULL).id, 0), r);
    for (uint64_t n_free = 0; n_free < 2; n_free++) {
        fake_kv(e.engine, 7, n_free);
        wait_on(&e, r, &a);
        RUN_UNTIL(&e.loop, a.calls);
        assert_int_equal(a.state, TB_FUTURE_PENDING);
        assert_string_equal(a.queue, n_free ? "active" : "paused_capacity");
        assert_int_equal(strstr(a.reason, "all 7 pages") != NULL, n_free == 0);
    }
    settle(&e);
    env_stop(&e);
}

/* A client lets a sampler go: what runs ends well, nothing new begins, others cannot do it. */
static void test_end(void **state)
{
    struct env *e = *state;
    char id[100], r[400];
    struct tb_error err = {0};
    struct tb_ticket t;
    copy_text(id, sizeof(id), open_sampler(e, e->session, 0, "m0", NULL).id);
    tb_core_end_sampling_session(e->core, tb_core_tenant(e->core, "other"), id);
    must_submit(e, op_sample(id, 1), r);
    tb_core_end_sampling_session(e->core, e->tenant, id);
    tb_core_end_sampling_session(e->core, e->tenant, id);
    assert_int_equal(stats(e).samplers, 0);
    assert_int_equal(tb_core_submit(e->core, e->tenant, op_sample(id, 2), &t, &err), TB_ENOTFOUND);
    assert_int_equal(result(e, r).state, TB_FUTURE_DONE);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(test_base),
        T(test_labels),
        T(test_ephemeral),
        T(test_inflight),
        T(test_sharing),
        T(test_overwritten),
        T(test_damaged_checkpoint),
        T(test_by_address),
        T(test_idle_addresses),
        T(test_finish),
        T(test_end),
        T(test_streams),
        cmocka_unit_test(test_cache_full),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
