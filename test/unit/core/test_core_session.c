/* Core: sessions and leases, waiting for futures, their expiry, draining and closing. */
#include "unit/core/core_help.h"

static void start(struct env *e, uint64_t lease, uint64_t poll, uint64_t ttl, uint64_t unread)
{
    struct tb_core_options o = {.session_lease_ms = lease,
                                .long_poll_ms = poll,
                                .result_ttl_ms = ttl,
                                .result_unread_ttl_ms = unread};
    env_start(e, &o);
}

static void test_waits(void **state)
{
    (void)state;
    struct env e;
    start(&e, 0, 20, 0, 0);
    char id[100], r[400];
    make_model(&e, 0, 8, id);
    must_submit(&e, op_fb(id, 1, 1, NULL), r);
    struct waited a, b, c;
    /* the deadline: pending */
    wait_on(&e, r, &a);
    assert_int_equal(a.calls, 0);
    RUN_UNTIL(&e.loop, a.calls);
    assert_int_equal(a.state, TB_FUTURE_PENDING);
    assert_string_equal(a.queue, "active");
    assert_string_equal(a.reason, "");
    /* many wait; one goes away; the others are called once each */
    wait_on(&e, r, &a);
    wait_on(&e, r, &b);
    wait_on(&e, r, &c);
    assert_int_equal(stats(&e).waiters, 3);
    tb_core_unwait(e.core, &b.w);
    tb_core_unwait(e.core, &b.w);
    assert_int_equal(stats(&e).waiters, 2);
    fake_step(e.engine);
    assert_int_equal(a.calls, 1);
    assert_int_equal(b.calls, 0);
    assert_int_equal(c.calls, 1);
    assert_int_equal(a.state, TB_FUTURE_DONE);
    tb_core_unwait(e.core, &a.w); /* too late, harmless */
    /* ready: at once, and again */
    wait_on(&e, r, &a);
    assert_int_equal(a.calls, 1);
    tb_core_delivered(e.core, r, strlen(r));
    wait_on(&e, r, &a);
    assert_int_equal(a.state, TB_FUTURE_DONE);
    /* a gap is told */
    must_submit(&e, op_fb(id, 3, 1, NULL), r);
    wait_on(&e, r, &a);
    RUN_UNTIL(&e.loop, a.calls);
    assert_int_equal(a.state, TB_FUTURE_PENDING);
    assert_string_equal(a.reason, "waiting for seq_id 2");
    env_stop(&e);
}

static void test_unknown_ids(void **state)
{
    (void)state;
    struct env e;
    start(&e, 0, 0, 0, 0);
    static const struct {
        const char *id;
        enum tb_future_state want;
    } cases[] = {
        {"sess-0123456789abcdef:train:0:1", TB_FUTURE_GONE},
        {"sess-0123456789abcdef:train:0:create", TB_FUTURE_GONE},
        {"sess-0123456789abcdef:sample:3:1000000000000000000", TB_FUTURE_GONE},
        {"sess-0123456789abcdef:sample:3:create", TB_FUTURE_UNKNOWN},
        {"sess-0123456789abcdef:loss:3:create", TB_FUTURE_GONE},
        {"sess-0123456789abcdef:loss:3:1", TB_FUTURE_UNKNOWN},
        {"sess-0123456789abcdef:train:0", TB_FUTURE_UNKNOWN},
        {"sess-0123456789abcdef:train:0:1:2", TB_FUTURE_UNKNOWN},
        {"sess-0123456789abcdef:train:x:1", TB_FUTURE_UNKNOWN},
        {"sess-0123456789ABCDEF:train:0:1", TB_FUTURE_UNKNOWN},
        {"sess-0123456789abcde:train:0:1", TB_FUTURE_UNKNOWN},
        {"sess-0123456789abcdef:other:0:1", TB_FUTURE_UNKNOWN},
        {"sess-0123456789abcdef:train::1", TB_FUTURE_UNKNOWN},
        {"sess-0123456789abcdef:train:0:", TB_FUTURE_UNKNOWN},
        {"", TB_FUTURE_UNKNOWN},
        {"nonsense", TB_FUTURE_UNKNOWN},
    };
    for (size_t i = 0; i < TB_ARRAY_LEN(cases); i++) {
        struct waited a;
        wait_on(&e, cases[i].id, &a);
        assert_int_equal(a.calls, 1);
        if (a.state != cases[i].want) fail_msg("%s: %d", cases[i].id, a.state);
    }
    tb_core_delivered(e.core, "nonsense", 8);
    env_stop(&e);
}

/* Results leave after their time; a repeat of the submit does not run the op again. */
static void test_expiry(void **state)
{
    (void)state;
    struct env e;
    start(&e, 0, 10, 5, 20);
    char id[100], read[400], unread[400], again[400];
    make_model(&e, 0, 8, id);
    must_submit(&e, op_fb(id, 1, 1, NULL), read);
    must_submit(&e, op_fb(id, 2, 1, NULL), unread);
    settle(&e);
    tb_core_delivered(e.core, read, strlen(read));
    struct waited a;
    do {
        turn(&e);
        wait_on(&e, read, &a);
    } while (a.state != TB_FUTURE_GONE);
    do {
        turn(&e);
        wait_on(&e, unread, &a);
    } while (a.state != TB_FUTURE_GONE);
    assert_int_equal(stats(&e).futures_done, 0);
    must_submit(&e, op_fb(id, 1, 1, NULL), again);
    assert_string_equal(read, again);
    assert_int_equal(fake_waiting(e.engine), 0);
    assert_int_equal(fake_done(e.engine, TB_TASK_TRAIN), 2);
    wait_on(&e, again, &a);
    assert_int_equal(a.state, TB_FUTURE_GONE);
    env_stop(&e);
}

static void test_sessions(void **state)
{
    (void)state;
    struct env e;
    start(&e, 0, 0, 0, 0);
    struct tb_error err = {0};
    const char *id;
    char first[100];
    struct tb_session_params p = {.idempotency_key = "key", .tags_json = "[\"t\"]"};
    assert_int_equal(tb_core_create_session(e.core, e.tenant, &p, &id, &err), 0);
    copy_text(first, sizeof(first), id);
    assert_null(strchr(first, '/'));
    assert_int_equal(tb_core_create_session(e.core, e.tenant, &p, &id, &err), 0);
    assert_string_equal(first, id);
    p.idempotency_key = "other";
    assert_int_equal(tb_core_create_session(e.core, e.tenant, &p, &id, &err), 0);
    assert_string_not_equal(first, id);
    assert_int_equal(stats(&e).sessions, 3);
    assert_int_equal(tb_core_heartbeat(e.core, e.tenant, first, &err), 0);
    assert_int_equal(tb_core_heartbeat(e.core, e.tenant, "sess-0123456789abcdef", &err), TB_EGONE);
    assert_int_equal(tb_core_finish_session(e.core, e.tenant, first, "success", NULL, &err), 0);
    assert_int_equal(tb_core_finish_session(e.core, e.tenant, first, "errored", "x", &err), 0);
    assert_int_equal(tb_core_heartbeat(e.core, e.tenant, first, &err), TB_EGONE);
    assert_int_equal(tb_core_finish_session(e.core, e.tenant, "never", NULL, NULL, &err),
                     TB_ENOTFOUND);
    /* one of before a restart has ended anyway */
    assert_int_equal(
        tb_core_finish_session(e.core, e.tenant, "sess-0123456789abcdef", NULL, NULL, &err), 0);
    char r[400];
    assert_int_equal(submit(&e, op_create(first, 0, 8), r, &err), TB_ENOTFOUND);
    struct opened o = open_sampler(&e, first, 0, "m0", NULL);
    assert_int_equal(o.code, TB_ENOTFOUND);
    /* the key of an ended session opens a new one */
    p.idempotency_key = "key";
    assert_int_equal(tb_core_create_session(e.core, e.tenant, &p, &id, &err), 0);
    assert_string_not_equal(first, id);
    env_stop(&e);
}

/* What waits fails, what runs finishes, everything is freed, another session is not touched. */
static void test_finish(void **state)
{
    (void)state;
    struct env e;
    start(&e, 0, 0, 0, 0);
    char id[100], r1[400], r2[400], r3[400], r5[400], other[400], r0[400], old[400];
    struct tb_error err = {0};
    make_model(&e, 0, 8, id);
    must_submit(&e, op_of(TB_OP_FORWARD, id, 1), r0);
    settle(&e);
    copy_text(old, sizeof(old), r0);
    struct tb_session_params p = {0};
    const char *second;
    tb_core_create_session(e.core, e.tenant, &p, &second, NULL);
    must_submit(&e, op_fb(id, 2, 1, NULL), r1);
    must_submit(&e, op_fb(id, 3, 1, NULL), r2);
    must_submit(&e, op_load(id, 4, "tinker://x/weights/y", false), r3);
    must_submit(&e, op_fb(id, 9, 1, NULL), r5);
    must_submit(&e, op_create(second, 0, 8), other);
    struct waited a1, a2, a3, a5;
    wait_on(&e, r1, &a1);
    wait_on(&e, r2, &a2);
    wait_on(&e, r3, &a3);
    wait_on(&e, r5, &a5);
    fake_begin(e.engine);
    assert_int_equal(tb_core_finish_session(e.core, e.tenant, e.session, "success", "done", &err),
                     0);
    assert_int_equal(a3.calls, 1);
    assert_int_equal(a3.state, TB_FUTURE_FAILED);
    assert_int_equal(a3.err.code, TB_ECANCELED);
    assert_int_equal(a5.state, TB_FUTURE_FAILED);
    assert_int_equal(a1.calls, 0);
    settle(&e);
    assert_int_equal(a1.state, TB_FUTURE_DONE); /* it ran */
    assert_int_equal(a2.state, TB_FUTURE_FAILED);
    assert_int_equal(fake_adapters(e.engine), 1); /* the second session's */
    assert_int_equal(result(&e, other).state, TB_FUTURE_DONE);
    assert_int_equal(submit(&e, op_fb(id, 10, 1, NULL), r5, &err), TB_ENOTFOUND);
    wait_on(&e, old, &a1);
    assert_int_equal(a1.state, TB_FUTURE_GONE); /* results of a finished session are dropped */
    wait_on(&e, r3, &a3);
    assert_int_equal(a3.state, TB_FUTURE_FAILED); /* failures can be asked for a while */
    assert_int_equal(stats(&e).models, 1);
    env_stop(&e);
}

/* The session ends while its model is being created, by creation and by load. */
static void test_finish_while_creating(void **state)
{
    (void)state;
    for (int begun = 0; begun < 2; begun++) {
        struct env e;
        start(&e, 0, 0, 0, 0);
        char r[400], id[100], path[300];
        make_model(&e, 0, 8, id);
        must_submit(&e, op_save(TB_OP_SAVE_WEIGHTS, id, 1, "c"), r);
        struct waited a = result(&e, r);
        copy_text(path, sizeof(path), a.path);
        must_submit(&e, op_create(e.session, 1, 8), r);
        wait_on(&e, r, &a);
        if (begun) fake_begin(e.engine);
        struct tb_op *op = op_load(NULL, -1, path, true);
        op->session_id = text(op, e.session);
        op->model_seq_id = 2;
        must_submit(&e, op, r);
        struct waited b;
        wait_on(&e, r, &b);
        tb_core_finish_session(e.core, e.tenant, e.session, "success", NULL, NULL);
        settle(&e);
        settle(&e);
        assert_int_equal(a.state, TB_FUTURE_FAILED);
        assert_int_equal(b.state, TB_FUTURE_FAILED);
        assert_int_equal(fake_adapters(e.engine), 0);
        env_stop(&e);
    }
}

static void test_lease(void **state)
{
    (void)state;
    struct env e;
    start(&e, 200, 60000, 0,
          0); /* long beside what a busy machine may hold us up between two calls */
    char id[100], r[400], stuck[400];
    make_model(&e, 0, 8, id);
    must_submit(&e, op_fb(id, 1, 1, NULL), r);
    struct waited a, b;
    /* work in the engine keeps the session, however long it takes */
    uint64_t until = tb_clock_ms() + 600;
    RUN_UNTIL(&e.loop, tb_clock_ms() > until);
    assert_int_equal(tb_core_heartbeat(e.core, e.tenant, e.session, NULL), 0);
    settle(&e);
    wait_on(&e, r, &a);
    assert_int_equal(a.state, TB_FUTURE_DONE);
    /* heartbeats keep it without work */
    until = tb_clock_ms() + 600;
    while (tb_clock_ms() < until) {
        if (tb_core_heartbeat(e.core, e.tenant, e.session, NULL))
            fail_msg("ended in spite of heartbeats");
        uv_run(&e.loop, UV_RUN_NOWAIT);
    }
    /* what waits behind a gap fails after a lease, also when the client is there */
    must_submit(&e, op_fb(id, 3, 1, NULL), stuck);
    wait_on(&e, stuck, &b);
    while (b.state != TB_FUTURE_FAILED) {
        assert_int_equal(tb_core_heartbeat(e.core, e.tenant, e.session, NULL), 0);
        uv_run(&e.loop, UV_RUN_ONCE);
    }
    assert_non_null(strstr(b.err.msg, "seq_id 2"));
    must_submit(&e, op_fb(id, 4, 1, NULL), r); /* and work goes on behind it */
    settle(&e);
    wait_on(&e, r, &a);
    assert_int_equal(a.state, TB_FUTURE_DONE);
    /* without a client the session ends then */
    must_submit(&e, op_fb(id, 6, 1, NULL), stuck);
    wait_on(&e, stuck, &b);
    while (b.state != TB_FUTURE_FAILED)
        uv_run(&e.loop, UV_RUN_ONCE);
    assert_non_null(strstr(b.err.msg, "seq_id 5"));
    while (stats(&e).sessions)
        turn(&e);
    settle(&e);
    assert_int_equal(tb_core_heartbeat(e.core, e.tenant, e.session, NULL), TB_EGONE);
    assert_int_equal(fake_adapters(e.engine), 0);
    assert_int_equal(stats(&e).models, 0);
    env_stop(&e);
}

/* Another tenant finds nothing, and its keys and limits are its own. */
static void test_tenants(void **state)
{
    (void)state;
    struct env e;
    struct tb_error err = {0};
    struct tb_core_options o = {.tenant_rate = 1, .tenant_burst = 6, .tenant_pending = 3};
    env_start(&e, &o);
    struct tb_tenant *us = e.tenant, *them = tb_core_tenant(e.core, "them");
    assert_ptr_equal(tb_core_tenant(e.core, "them"), them);
    assert_string_equal(tb_tenant_name(them), "them");
    char id[100], r[400], again[400];
    make_model(&e, 0, 8, id);
    must_submit(&e, op_fb(id, 1, 1, NULL), r);
    settle(&e);

    e.tenant = them;
    struct tb_model_answer info;
    struct waited a;
    assert_int_equal(tb_core_heartbeat(e.core, them, e.session, &err), TB_EGONE);
    assert_int_equal(tb_core_model_info(e.core, them, id, &info, &err), TB_ENOTFOUND);
    assert_int_equal(submit(&e, op_fb(id, 2, 1, NULL), r, &err), TB_ENOTFOUND);
    assert_int_equal(tb_core_finish_session(e.core, them, e.session, "success", NULL, &err), 0);
    snprintf(again, sizeof(again), "%s:1", id);
    wait_on(&e, again, &a);
    assert_int_equal(a.state, TB_FUTURE_GONE);
    assert_int_equal(tb_core_heartbeat(e.core, us, e.session, &err), 0);

    e.tenant = us;
    wait_on(&e, again, &a);
    assert_int_equal(a.state, TB_FUTURE_DONE);
    /* three may wait, but what is in turn comes in */
    for (int i = 3; i < 6; i++)
        must_submit(&e, op_fb(id, i, 1, NULL), r);
    assert_int_equal(submit(&e, op_fb(id, 6, 1, NULL), again, &err), TB_EBUSY);
    assert_non_null(strstr(err.msg, "tenant default"));
    must_submit(&e, op_fb(id, 2, 1, NULL), again);
    settle(&e);
    wait_on(&e, r, &a);
    assert_int_equal(a.state, TB_FUTURE_DONE);
    /* submits come in faster than a token a second, so one will be refused */
    int64_t next = 6;
    int rc;
    while ((rc = submit(&e, op_fb(id, next, 1, NULL), r, &err)) == 0 && next < 1000) {
        next++;
        settle(&e);
    }
    assert_int_equal(rc, TB_ERATE);
    assert_int_equal(tb_error_status(rc), 429);
    must_submit(&e, op_fb(id, 5, 1, NULL), again); /* a repeat costs nothing */
    while (submit(&e, op_fb(id, next, 1, NULL), r, &err) == TB_ERATE)
        uv_run(&e.loop, UV_RUN_ONCE);
    settle(&e);
    wait_on(&e, r, &a);
    assert_int_equal(a.state, TB_FUTURE_DONE);
    env_stop(&e);
}

struct reentry {
    struct tb_waiter w;
    struct env *e;
    char id[100];
    int64_t seq;
    int calls;
    char last[400];
};

/* A waiter that submits the next op, waits for it, and at the end finishes the session. */
static void on_reentry(struct tb_waiter *w, enum tb_future_state st, const struct tb_op *op,
                       const char *queue_state, const char *reason)
{
    struct reentry *x = w->arg;
    (void)op;
    (void)queue_state;
    (void)reason;
    assert_int_equal(st, TB_FUTURE_DONE);
    x->calls++;
    if (x->seq == 20) {
        tb_core_finish_session(x->e->core, x->e->tenant, x->e->session, "success", NULL, NULL);
        return;
    }
    must_submit(x->e, op_fb(x->id, x->seq++, 1, NULL), x->last);
    tb_core_wait(x->e->core, x->e->tenant, x->last, strlen(x->last), &x->w);
}

static void test_reentry(void **state)
{
    (void)state;
    struct env e;
    start(&e, 0, 0, 0, 0);
    struct reentry x = {.e = &e, .seq = 2};
    x.w.cb = on_reentry;
    x.w.arg = &x;
    make_model(&e, 0, 8, x.id);
    must_submit(&e, op_fb(x.id, 1, 1, NULL), x.last);
    tb_core_wait(e.core, e.tenant, x.last, strlen(x.last), &x.w);
    settle(&e);
    assert_int_equal(x.calls, 19);
    assert_int_equal(fake_adapters(e.engine), 0);
    env_stop(&e);
}

static void test_drain(void **state)
{
    (void)state;
    struct env e;
    start(&e, 0, 60000, 0, 0);
    char id[100], r[400];
    make_model(&e, 0, 8, id);
    must_submit(&e, op_fb(id, 1, 1, NULL), r);
    struct waited a, b;
    wait_on(&e, r, &a);
    tb_core_drain(e.core);
    assert_int_equal(a.calls, 1);
    assert_int_equal(a.state, TB_FUTURE_PENDING);
    wait_on(&e, r, &b);
    assert_int_equal(b.state, TB_FUTURE_PENDING);
    settle(&e);
    wait_on(&e, r, &b);
    assert_int_equal(b.state, TB_FUTURE_DONE);
    env_stop(&e);
}

/* Closing with everything under way: a creation, training, a save at both stages, a load, samples
 * that run and samples that wait for weights, a gap, and somebody who waits for each. */
static void test_close_in_the_middle(void **state)
{
    (void)state;
    for (int stage = 0; stage < 12; stage++) {
        struct env e;
        start(&e, 0, 0, 0, 0);
        char id[100], r[12][400], path[300], sampler[100];
        make_model(&e, 0, 8, id);
        must_submit(&e, op_save(TB_OP_SAVE_WEIGHTS, id, 1, "c"), r[0]);
        struct waited a = result(&e, r[0]), w[12];
        copy_text(path, sizeof(path), a.path);
        must_submit(&e, op_publish(id, 2, 0, false), r[0]);
        a = result(&e, r[0]);
        copy_text(sampler, sizeof(sampler), a.sampler);
        int n = 0;
        must_submit(&e, op_create(e.session, 1, 8), r[n++]);
        must_submit(&e, op_fb(id, 3, 1, NULL), r[n++]);
        must_submit(&e, op_save(TB_OP_SAVE_WEIGHTS, id, 4, "d"), r[n++]);
        must_submit(&e, op_save(TB_OP_SAVE_WEIGHTS, id, 5, "e"), r[n++]);
        must_submit(&e, op_publish(id, 6, 7, true), r[n++]);
        must_submit(&e, op_load(id, 7, path, true), r[n++]);
        must_submit(&e, op_fb(id, 9, 1, NULL), r[n++]);
        must_submit(&e, op_sample(sampler, 0), r[n++]);
        struct opened o = open_sampler(&e, e.session, 1, NULL, path);
        assert_int_equal(o.code, 0);
        must_submit(&e, op_sample(o.id, 0), r[n++]);
        struct opened late = {0};
        struct tb_sampling_session_params p = {
            .session_id = e.session, .seq_id = 2, .model_path = path};
        tb_core_create_sampling_session(e.core, e.tenant, &p, on_opened, &late);
        struct tb_op *op = op_sample(NULL, -1);
        op->u.sample.model_path = text(op, path);
        must_submit(&e, op, r[n++]);
        for (int i = 0; i < n; i++)
            wait_on(&e, r[i], &w[i]);
        for (int i = 0; i < stage; i++) {
            if (i % 2) uv_run(&e.loop, UV_RUN_NOWAIT);
            fake_step(e.engine);
        }
        if (fake_waiting(e.engine)) fake_begin(e.engine);
        env_stop(&e);
        assert_int_equal(late.calls, 1);
        for (int i = 0; i < n; i++)
            assert_int_equal(w[i].calls, 1);
    }
}

/* After a restart checkpoints are there; sessions, models and samplers are not. */
static void test_restart(void **state)
{
    (void)state;
    struct env e;
    start(&e, 0, 0, 0, 0);
    char id[100], r[400], path[300], old[64];
    struct tb_error err = {0};
    make_model(&e, 0, 8, id);
    must_submit(&e, op_fb(id, 1, 3, NULL), r);
    must_submit(&e, op_of(TB_OP_OPTIM_STEP, id, 2), r);
    must_submit(&e, op_save(TB_OP_SAVE_WEIGHTS, id, 3, "c"), r);
    struct waited a = result(&e, r);
    copy_text(path, sizeof(path), a.path);
    copy_text(old, sizeof(old), e.session);
    env_close(&e);
    env_open(&e, NULL);
    assert_int_equal(tb_core_heartbeat(e.core, e.tenant, old, &err), TB_EGONE);
    wait_on(&e, r, &a);
    assert_int_equal(a.state, TB_FUTURE_GONE);
    assert_int_equal(submit(&e, op_fb(id, 4, 1, NULL), r, &err), TB_ENOTFOUND);
    struct tb_op *op = op_load(NULL, -1, path, true);
    op->session_id = text(op, e.session);
    op->model_seq_id = 0;
    must_submit(&e, op, r);
    a = result(&e, r);
    assert_int_equal(a.state, TB_FUTURE_DONE);
    must_submit(&e, op_of(TB_OP_OPTIM_STEP, a.model, 1), r);
    assert_true(result(&e, r).metric == (double)fake_next_param(fake_next_param(0, 3), 0));
    env_stop(&e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_waits),
        cmocka_unit_test(test_unknown_ids),
        cmocka_unit_test(test_expiry),
        cmocka_unit_test(test_sessions),
        cmocka_unit_test(test_finish),
        cmocka_unit_test(test_finish_while_creating),
        cmocka_unit_test(test_lease),
        cmocka_unit_test(test_tenants),
        cmocka_unit_test(test_reentry),
        cmocka_unit_test(test_tenants),
        cmocka_unit_test(test_reentry),
        cmocka_unit_test(test_drain),
        cmocka_unit_test(test_close_in_the_middle),
        cmocka_unit_test(test_restart),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
