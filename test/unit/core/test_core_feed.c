/*
 * Feeds: cursors, acknowledgments, clones, long polls and their ends; cancel and join.
 */
#include "unit/core/core_help.h"

struct fed {
    struct tb_feed_waiter w;
    int calls, code;
    size_t n, n_failed;
    uint64_t cursor;
    char first[200], last[200];
};

static void on_feed(struct tb_feed_waiter *w, const struct tb_error *err,
                    const struct tb_feed_event *ev, size_t n, uint64_t cursor)
{
    struct fed *f = w->arg;
    f->calls++;
    f->code = err->code;
    f->n = n;
    f->cursor = cursor;
    for (size_t i = 0; i < n; i++)
        f->n_failed += ev[i].op->error.code != 0;
    copy_text(f->first, sizeof(f->first), n ? ev[0].request_id : NULL);
    copy_text(f->last, sizeof(f->last), n ? ev[n - 1].request_id : NULL);
}

static void poll_feed(struct env *e, const char *sampler, int64_t clone, uint64_t prev,
                      uint64_t timeout_ms, struct fed *f)
{
    memset(f, 0, sizeof(*f));
    f->w.cb = on_feed;
    f->w.arg = f;
    tb_core_feed_wait(e->core, e->tenant, sampler, clone, prev, timeout_ms, &f->w);
}

static int setup(void **state)
{
    struct env *e = tb_calloc(1, sizeof(*e));
    static const struct tb_core_options o = {.long_poll_ms = 60000};
    env_start(e, &o);
    *state = e;
    return 0;
}

static int teardown(void **state)
{
    env_stop(*state);
    tb_free(*state);
    return 0;
}

static void sampler_and(struct env *e, int n, char id[100], char reqs[][400])
{
    copy_text(id, 100, open_sampler(e, e->session, 0, "m0", NULL).id);
    for (int i = 0; i < n; i++)
        must_submit(e, op_sample(id, i), reqs[i]);
}

static void test_cursor(void **state)
{
    struct env *e = *state;
    char id[100], r[3][400];
    struct fed f;
    sampler_and(e, 3, id, r);
    poll_feed(e, id, 0, 0, 0, &f);
    assert_int_equal(f.calls, 1);
    assert_int_equal(f.n, 0);
    assert_int_equal(f.cursor, 0);

    poll_feed(e, id, 0, 0, UINT64_MAX, &f);
    assert_int_equal(f.calls, 0);
    assert_int_equal(stats(e).waiters, 1);
    assert_true(fake_step(e->engine)); /* the first end wakes the poll */
    assert_int_equal(f.calls, 1);
    assert_int_equal(f.n, 1);
    assert_int_equal(f.cursor, 1);
    assert_string_equal(f.first, r[0]);
    assert_int_equal(stats(e).waiters, 0);

    assert_true(fake_step(e->engine));
    assert_true(fake_step(e->engine));
    poll_feed(e, id, 0, 0, UINT64_MAX, &f); /* the answer was lost: the same poll again */
    assert_int_equal(f.n, 3);
    assert_string_equal(f.first, r[0]);
    assert_string_equal(f.last, r[2]);
    assert_int_equal(f.cursor, 3);
    poll_feed(e, id, 0, 2, UINT64_MAX, &f);
    assert_int_equal(f.n, 1);
    assert_string_equal(f.first, r[2]);
    poll_feed(e, id, 0, 1, 0, &f); /* 2 was acknowledged */
    assert_int_equal(f.n, 1);
    assert_int_equal(f.cursor, 3);
    poll_feed(e, id, 0, 3, 0, &f);
    assert_int_equal(f.n, 0);
    assert_int_equal(f.cursor, 3);
    poll_feed(e, id, 0, 99, 0, &f); /* beyond all events */
    assert_int_equal(f.cursor, 3);

    struct waited a = result(e, r[1]); /* acknowledged is not freed */
    assert_int_equal(a.state, TB_FUTURE_DONE);
    assert_int_equal(stats(e).futures_done, 3);
    tb_core_retrieved(e->core, e->tenant, r[1], strlen(r[1]));
    tb_core_retrieved(e->core, e->tenant, r[1], strlen(r[1]));
    assert_int_equal(stats(e).futures_done, 2);
    assert_int_equal(result(e, r[1]).state, TB_FUTURE_GONE);
    assert_int_equal(result(e, r[2]).state, TB_FUTURE_DONE);
}

static const struct tb_op *held;

static void hold_it(struct tb_waiter *w, enum tb_future_state state, const struct tb_op *op,
                    const char *queue_state, const char *reason)
{
    on_wait(w, state, op, queue_state, reason);
    tb_core_hold(op);
    held = op;
}

/* What is held stays whole until its release, though its client gave it up. */
static void test_held(void **state)
{
    struct env *e = *state;
    char id[100], r[400];
    copy_text(id, sizeof(id), open_sampler(e, e->session, 0, "m0", NULL).id);
    must_submit(e, op_sample(id, 1), r);
    assert_int_equal(result(e, r).state, TB_FUTURE_DONE);
    struct waited a = {.w = {.cb = hold_it, .arg = &a}};
    tb_core_wait(e->core, e->tenant, r, strlen(r), &a.w);
    assert_int_equal(a.calls, 1);
    tb_core_retrieved(e->core, e->tenant, r, strlen(r));
    assert_int_equal(stats(e).futures_done, 1);
    assert_int_equal(held->seq_id, 1);
    tb_core_release(held);
    assert_int_equal(stats(e).futures_done, 0);
    assert_int_equal(result(e, r).state, TB_FUTURE_GONE);
}

static void test_many(void **state)
{
    struct env *e = *state;
    enum { N = TB_MAX_FEED_EVENTS + 100 };
    char id[100], r[400];
    struct fed f;
    copy_text(id, sizeof(id), open_sampler(e, e->session, 0, "m0", NULL).id);
    for (int i = 0; i < N; i++)
        must_submit(e, op_sample(id, i), r);
    while (fake_step(e->engine)) {
    }
    poll_feed(e, id, 0, 0, UINT64_MAX, &f);
    assert_int_equal(f.n, TB_MAX_FEED_EVENTS);
    assert_int_equal(f.cursor, TB_MAX_FEED_EVENTS);
    poll_feed(e, id, 0, f.cursor, UINT64_MAX, &f);
    assert_int_equal(f.n, 100);
    assert_int_equal(f.cursor, N);
    assert_string_equal(f.last, r);
}

/* Every clone has its own events, whoever chose its block. */
static void test_clones(void **state)
{
    struct env *e = *state;
    char id[100], r[1][400], r1[400], r2[400];
    int64_t clone = 0;
    struct tb_error err = {0};
    struct fed f0, f1;
    sampler_and(e, 1, id, r);
    assert_int_equal(tb_core_join_sampling_session(e->core, e->tenant, id, &clone, &err), 0);
    assert_int_equal(clone, 1);
    must_submit(e, op_sample(id, 2 * TB_CLONE_BLOCK), r2); /* a block that was not asked for */
    must_submit(e, op_sample(id, TB_CLONE_BLOCK + 5), r1);
    poll_feed(e, id, 0, 0, UINT64_MAX, &f0);
    poll_feed(e, id, 1, 0, UINT64_MAX, &f1);
    while (fake_step(e->engine)) {
    }
    assert_string_equal(f0.first, r[0]);
    assert_int_equal(f0.n, 1);
    assert_string_equal(f1.first, r1);
    assert_int_equal(f1.cursor, 1);
    assert_int_equal(tb_core_join_sampling_session(e->core, e->tenant, id, &clone, &err), 0);
    assert_int_equal(clone, 3);
    assert_int_equal(tb_core_join_sampling_session(e->core, e->tenant, "x", &clone, &err),
                     TB_ENOTFOUND);
    assert_int_equal(tb_core_join_sampling_session(e->core, e->tenant,
                                                   "sess-0123456789abcdef:sample:0", &clone, &err),
                     TB_EGONE);
}

static void test_cancel(void **state)
{
    struct env *e = *state;
    char id[100], r[2][400], model[100], train[400];
    struct fed f;
    struct waited a;
    sampler_and(e, 2, id, r);
    make_model(e, 0, 4, model);
    while (fake_step(e->engine)) {
    }
    must_submit(e, op_sample(id, 2), r[0]);
    must_submit(e, op_sample(id, 3), r[1]);
    must_submit(e, op_fb(model, 1, 1, NULL), train);
    wait_on(e, r[0], &a);
    tb_core_cancel(e->core, e->tenant, r[0], strlen(r[0]));
    tb_core_cancel(e->core, e->tenant, train, strlen(train)); /* training goes on */
    tb_core_cancel(e->core, e->tenant, "none", 4);
    while (fake_step(e->engine)) {
    }
    assert_int_equal(a.calls, 1);
    assert_int_equal(a.err.code, TB_ECANCELED);
    assert_int_equal(result(e, train).state, TB_FUTURE_DONE);
    assert_int_equal(result(e, r[1]).state, TB_FUTURE_DONE);
    tb_core_cancel(e->core, e->tenant, r[1], strlen(r[1])); /* too late */
    assert_int_equal(result(e, r[1]).state, TB_FUTURE_DONE);
    poll_feed(e, id, 0, 2, 0, &f);
    assert_int_equal(f.n, 2);
    assert_int_equal(f.n_failed, 1);
}

/* A sample that waits for its weights has no task to cancel. */
static void test_cancel_waiting(void **state)
{
    struct env *e = *state;
    char model[100], r[400], path[400];
    make_model(e, 0, 4, model);
    must_submit(e, op_save(TB_OP_SAVE_WEIGHTS, model, 1, "a"), r);
    copy_text(path, sizeof(path), result(e, r).path);
    struct opened o = open_sampler(e, e->session, 0, NULL, path);
    must_submit(e, op_sample(o.id, 0), r);
    tb_core_cancel(e->core, e->tenant, r, strlen(r));
    struct waited a;
    wait_on(e, r, &a);
    assert_int_equal(a.calls, 1);
    assert_int_equal(a.err.code, TB_ECANCELED);
    must_submit(e, op_sample(o.id, 1), r);
    assert_int_equal(result(e, r).state, TB_FUTURE_DONE);
}

static void test_ends(void **state)
{
    struct env *e = *state;
    char id[100], r[1][400];
    struct fed f, g, drained;
    sampler_and(e, 1, id, r);
    poll_feed(e, id, 0, 0, UINT64_MAX, &f);
    tb_core_feed_unwait(e->core, &f.w); /* the client went away: the sample runs on */
    poll_feed(e, id, 0, 0, 30, &g);
    while (!g.calls) /* the deadline; the engine does nothing meanwhile */
        uv_run(&e->loop, UV_RUN_ONCE);
    assert_int_equal(g.n, 0);
    assert_int_equal(g.code, 0);
    assert_int_equal(f.calls, 0);
    poll_feed(e, id, 0, 0, UINT64_MAX, &f);
    poll_feed(e, id, 1, 0, UINT64_MAX, &g);
    tb_core_finish_session(e->core, e->tenant, e->session, "success", NULL, NULL);
    assert_int_equal(f.calls, 1);
    assert_int_equal(f.code, TB_EGONE);
    assert_int_equal(g.code, TB_EGONE);
    while (fake_step(e->engine)) {
    }
    poll_feed(e, id, 0, 0, UINT64_MAX, &f);
    assert_int_equal(f.code, TB_EGONE);
    poll_feed(e, id, 0, 7, 0, &f); /* only says what it has read */
    assert_int_equal(f.code, 0);
    assert_int_equal(f.n, 0);
    assert_int_equal(f.cursor, 7);
    poll_feed(e, "nonsense", 0, 0, 0, &f);
    assert_int_equal(f.code, TB_ENOTFOUND);
    assert_int_equal(stats(e).waiters, 0);

    struct tb_session_params p = {0};
    const char *session;
    assert_int_equal(tb_core_create_session(e->core, e->tenant, &p, &session, NULL), 0);
    copy_text(id, sizeof(id), open_sampler(e, session, 0, "m0", NULL).id);
    poll_feed(e, id, 0, 0, UINT64_MAX, &drained);
    tb_core_drain(e->core);
    assert_int_equal(drained.calls, 1);
    assert_int_equal(drained.code, 0);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(test_cursor), T(test_held),           T(test_many), T(test_clones),
        T(test_cancel), T(test_cancel_waiting), T(test_ends),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
