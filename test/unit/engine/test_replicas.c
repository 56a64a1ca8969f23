/*
 * Models with replicas, over a model without numbers: where adapters, versions and samples go, what
 * a lost device changes, which devices are refused. Run under TSan this also checks what several
 * lanes do at the same time.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#include "engine/engine.h"
#include "fake_model.h"
#include "util/mem.h"

struct fixture {
    uv_loop_t loop;
    struct tb_engine *engine;
    int open, failed;
    int last_error;
    bool closed;
};

static const int device_numbers[] = {0, 1, 2, 3};

static int create(struct fixture *f, int n_models, int n_devices, struct tb_error *err)
{
    struct tb_engine_model models[2] = {{.name = "a", .dir = "x"}, {.name = "b", .dir = "y"}};
    struct tb_engine_options o = {.models = models,
                                  .n_models = n_models,
                                  .devices = device_numbers,
                                  .n_devices = n_devices,
                                  .mirror_tokens = 50};
    uv_loop_init(&f->loop);
    return tb_engine_create(&f->engine, &f->loop, &o, err);
}

static int open_engine(void **state, int n_models, int n_devices)
{
    struct fixture *f = tb_calloc(1, sizeof(*f));
    struct tb_error err = {0};
    fake_reset();
    assert_int_equal(create(f, n_models, n_devices, &err), 0);
    *state = f;
    return 0;
}

static int setup_three(void **state)
{
    return open_engine(state, 1, 3);
}

static int setup_two_models(void **state)
{
    return open_engine(state, 2, 4);
}

static void on_closed(void *arg)
{
    ((struct fixture *)arg)->closed = true;
}

static void check_closed(struct fixture *f)
{
    assert_true(f->closed);
    assert_int_equal(f->open, 0); /* every callback came */
    assert_int_equal(uv_loop_close(&f->loop), 0);
    assert_int_equal(fake_live_adapters, 0);
    assert_int_equal(fake_live_versions, 0);
    assert_int_equal(fake_live_samplings, 0);
    assert_int_equal(fake_live_graphs, 0);
    assert_int_equal(fake_loans, 0);
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    tb_engine_close(f->engine, on_closed, f);
    uv_run(&f->loop, UV_RUN_DEFAULT);
    check_closed(f);
    tb_free(f);
    return 0;
}

static void on_done(struct tb_task *t)
{
    struct fixture *f = t->arg;
    int code = tb_task_error(t)->code;
    f->open--;
    f->failed += code != 0;
    if (code) f->last_error = code;
    tb_op_destroy(t->op);
    tb_task_destroy(t);
}

static void submit(struct fixture *f, struct tb_task *t)
{
    t->cb = on_done;
    t->arg = f;
    f->open++;
    tb_engine_submit(f->engine, t);
}

/* A task on an adapter of a model. */
static void on_adapter(struct fixture *f, enum tb_task_type type, int model, uint64_t adapter,
                       uint64_t version)
{
    struct tb_task *t = tb_task_create(type);
    t->model = model;
    t->adapter_id = adapter;
    t->version_id = version;
    t->lora.rank = 4;
    if (type == TB_TASK_OPTIM) t->op = tb_op_create(TB_OP_OPTIM_STEP);
    submit(f, t);
}

static void on_version(struct fixture *f, enum tb_task_type type, int model, uint64_t version)
{
    on_adapter(f, type, model, 0, version);
}

static struct tb_task *sample(struct fixture *f, int model, uint64_t version, int64_t seq,
                              int32_t tokens)
{
    struct tb_task *t = tb_task_create(TB_TASK_SAMPLE);
    t->model = model;
    t->version_id = version;
    t->op = tb_op_create(TB_OP_SAMPLE);
    t->op->seq_id = seq;
    t->op->u.sample.n_samples = 1;
    t->op->u.sample.max_tokens = tokens;
    submit(f, t);
    return t;
}

/* Runs all that was submitted; so many of it must fail. */
static void run(struct fixture *f, int failures)
{
    f->failed = f->last_error = 0;
    while (f->open)
        uv_run(&f->loop, UV_RUN_ONCE);
    assert_int_equal(f->failed, failures);
}

static void adapters_are(int a, int b, int c, int d)
{
    const int want[FAKE_DEVICES] = {a, b, c, d};
    for (int i = 0; i < FAKE_DEVICES; i++)
        assert_int_equal(fake_devices[i].adapters, want[i]);
}

static void versions_are(int a, int b, int c, int d)
{
    const int want[FAKE_DEVICES] = {a, b, c, d};
    for (int i = 0; i < FAKE_DEVICES; i++)
        assert_int_equal(fake_devices[i].versions, want[i]);
}

/* A new adapter goes where the fewest are, and all its tasks find it there. */
static void test_homes(void **state)
{
    struct fixture *f = *state;
    for (uint64_t id = 1; id <= 7; id++) {
        on_adapter(f, TB_TASK_ADAPTER_CREATE, 0, id, 0);
        on_adapter(f, TB_TASK_OPTIM, 0, id, 0); /* before it is known to be there */
    }
    run(f, 0);
    adapters_are(3, 2, 2, 0);
    for (uint64_t id = 1; id <= 7; id++) {
        on_adapter(f, TB_TASK_OPTIM, 0, id, 0);
        on_adapter(f, TB_TASK_EXPORT, 0, id, 0);
    }
    run(f, 0);
    on_adapter(f, TB_TASK_ADAPTER_FREE, 0, 3, 0);
    run(f, 0);
    adapters_are(3, 2, 1, 0);
    on_adapter(f, TB_TASK_ADAPTER_CREATE, 0, 8, 0);
    on_adapter(f, TB_TASK_ADAPTER_CREATE, 0, 9, 0);
    run(f, 0);
    adapters_are(3, 3, 2, 0);
    on_adapter(f, TB_TASK_OPTIM, 0, 3, 0); /* gone */
    on_adapter(f, TB_TASK_OPTIM, 0, 99, 0);
    on_adapter(f, TB_TASK_OPTIM, 1, 1, 0); /* no such model */
    run(f, 3);
}

/* One whose creation fails does not count, and may be tried again. */
static void test_failed_creation(void **state)
{
    struct fixture *f = *state;
    fake_fail_create = true;
    for (uint64_t id = 1; id <= 2; id++)
        on_adapter(f, TB_TASK_ADAPTER_CREATE, 0, id, 0);
    run(f, 2);
    fake_fail_create = false;
    for (uint64_t id = 1; id <= 3; id++)
        on_adapter(f, TB_TASK_ADAPTER_CREATE, 0, id, 0);
    run(f, 0);
    adapters_are(1, 1, 1, 0);
}

static void test_two_models(void **state)
{
    struct fixture *f = *state;
    assert_int_equal(tb_engine_model_find(f->engine, "b"), 1);
    for (uint64_t id = 1; id <= 6; id++)
        on_adapter(f, TB_TASK_ADAPTER_CREATE, id > 2, id, 0);
    run(f, 0);
    adapters_are(1, 2, 1, 2);
    for (int i = 0; i < 8; i++)
        sample(f, i % 2, 0, i, 10);
    run(f, 0);
    for (int i = 0; i < FAKE_DEVICES; i++)
        assert_int_equal(fake_devices[i].samples, 2);
    for (int i = 0; i < 8; i++)
        assert_int_equal(fake_sampled_on[i] % 2, i % 2);
    on_adapter(f, TB_TASK_OPTIM, 0, 6, 0); /* another model's */
    run(f, 1);
    assert_int_equal(f->last_error, TB_ENOTFOUND);
}

/* What an adapter publishes is where it is; checkpoints go where the fewest versions are. */
static void test_versions(void **state)
{
    struct fixture *f = *state;
    for (uint64_t id = 1; id <= 3; id++)
        on_adapter(f, TB_TASK_ADAPTER_CREATE, 0, id, 0);
    for (uint64_t v = 20; v < 23; v++)
        on_adapter(f, TB_TASK_PUBLISH, 0, 2, v);
    run(f, 0);
    versions_are(0, 3, 0, 0);
    for (uint64_t v = 30; v < 35; v++)
        on_version(f, TB_TASK_VERSION_LOAD, 0, v);
    run(f, 0);
    versions_are(3, 3, 2, 0);
    int64_t seq = 0;
    for (uint64_t v = 20; v < 35; v += v == 22 ? 8 : 1)
        sample(f, 0, v, seq++, 3);
    run(f, 0);
    for (int i = 0; i < 3; i++)
        assert_int_equal(fake_content[i], i + 1);
    for (int i = 3; i < 8; i++)
        for (int k = 0; k < i; k++)
            assert_true(fake_content[i] > 3 && fake_content[i] != fake_content[k]);
    on_adapter(f, TB_TASK_PUBLISH, 0, 2, 20);  /* anew */
    on_adapter(f, TB_TASK_PUBLISH, 0, 99, 21); /* fails: the one before stays */
    on_version(f, TB_TASK_VERSION_FREE, 0, 34);
    on_version(f, TB_TASK_VERSION_FREE, 0, 99); /* unknown ids are no matter */
    run(f, 1);
    versions_are(2, 3, 2, 0);
    sample(f, 0, 20, 8, 3);
    sample(f, 0, 21, 9, 3);
    sample(f, 0, 34, 10, 3);
    sample(f, 0, 99, 11, 3);
    run(f, 2);
    assert_int_equal(f->last_error, TB_ENOTFOUND);
    assert_true(fake_content[8] > 8 && fake_content[9] == 2);
}

/* A sample goes where the fewest tokens are to be drawn, however many samples these are of. */
static void test_base_samples(void **state)
{
    struct fixture *f = *state;
    static const int tokens[] = {100, 10, 50, 10, 10, 10, 1, 200, 20, -1, 30};
    static const int want[] = {0, 1, 2, 1, 1, 1, 1, 1, 2, -1, 0};
    for (int i = 0; i < 11; i++)
        sample(f, 0, 0, i, tokens[i]);
    run(f, 1); /* the fake model does not know -1; for the engine it is a whole context */
    for (int i = 0; i < 11; i++)
        assert_int_equal(fake_sampled_on[i], want[i]);
    for (int i = 20; i < 23; i++)
        sample(f, 0, 0, i, 5); /* what was in flight has ended */
    run(f, 0);
    for (int i = 20; i < 23; i++)
        assert_int_equal(fake_sampled_on[i], i - 20);
}

/* A lost device keeps what it has, and gets no more while another lives. */
static void test_lost(void **state)
{
    struct fixture *f = *state;
    for (uint64_t id = 1; id <= 3; id++)
        on_adapter(f, TB_TASK_ADAPTER_CREATE, 0, id, 0);
    run(f, 0);
    fake_devices[0].lost = true;
    on_adapter(f, TB_TASK_OPTIM, 0, 1, 0);
    run(f, 1);
    assert_int_equal(f->last_error, TB_EDEVICE);
    for (uint64_t id = 4; id <= 7; id++)
        on_adapter(f, TB_TASK_ADAPTER_CREATE, 0, id, 0);
    for (int i = 0; i < 4; i++)
        sample(f, 0, 0, i, 10);
    on_version(f, TB_TASK_VERSION_LOAD, 0, 30);
    run(f, 0);
    adapters_are(1, 3, 3, 0);
    assert_int_equal(fake_devices[0].samples, 0);
    on_adapter(f, TB_TASK_OPTIM, 0, 1, 0);
    on_adapter(f, TB_TASK_ADAPTER_FREE, 0, 1, 0);
    run(f, 1);
    fake_devices[1].lost = fake_devices[2].lost = true;
    for (int i = 0; i < 3; i++)
        sample(f, 0, 0, i, 10);
    run(f, 3);
    sample(f, 0, 0, 3, 10);
    on_adapter(f, TB_TASK_ADAPTER_CREATE, 0, 8, 0);
    run(f, 2);
    assert_int_equal(f->last_error, TB_EDEVICE);
}

static void test_kinds(void **state)
{
    struct fixture f = {0};
    struct tb_error err = {0};
    fake_reset();
    fake_last_kind = "other";
    assert_int_equal(create(&f, 1, 4, &err), TB_EINVAL);
    assert_string_equal(err.msg, "--devices: GPU 0 (fake) and GPU 3 (other) share a model, so they "
                                 "must be of one kind");
    assert_int_equal(uv_loop_close(&f.loop), 0);
    assert_int_equal(create(&f, 2, 4, &err), TB_EINVAL);
    assert_non_null(strstr(err.msg, "GPU 1 (fake) and GPU 3 (other)"));
    assert_int_equal(uv_loop_close(&f.loop), 0);
}

/* ---- mirrors. Version 20 is adapter 1's, at home on device 0. */

static int setup_version(void **state)
{
    setup_three(state);
    on_adapter(*state, TB_TASK_ADAPTER_CREATE, 0, 1, 0);
    on_adapter(*state, TB_TASK_PUBLISH, 0, 1, 20);
    run(*state, 0);
    return 0;
}

static int teardown_version(void **state)
{
    fake_hold = FAKE_HOLD_NONE; /* of a test that failed */
    return teardown(state);
}

static void sampled_on(int64_t seq, int device, int content)
{
    assert_int_equal(fake_sampled_on[seq], device);
    assert_int_equal(fake_content[seq], content);
}

static void hold(enum fake_hold at)
{
    fake_hold = (int)at;
}

static void wait_held(struct fixture *f)
{
    while (fake_hold && fake_held != fake_hold)
        uv_run(&f->loop, UV_RUN_NOWAIT);
}

static void wait_returned(struct fixture *f)
{
    while (fake_loans)
        uv_run(&f->loop, UV_RUN_NOWAIT);
}

/* Samples of version 20 for devices 0, 1, 2, 0, 1, 2, when nothing else is to be drawn. */
static void sample_six(struct fixture *f, int64_t seq)
{
    for (int64_t i = 0; i < 6; i++)
        sample(f, 0, 20, seq + i, 60);
}

/* Samples are drawn where the version is, and there is more of it when that is worth it. */
static void test_mirrors(void **state)
{
    struct fixture *f = *state;
    struct tb_engine_stats s;
    sample(f, 0, 20, 0, 40);
    sample(f, 0, 20, 1, 9);
    run(f, 0);
    versions_are(1, 0, 0, 0); /* little to draw */
    hold(FAKE_HOLD_LEND);
    sample_six(f, 10);
    tb_engine_stats(f->engine, &s); /* the first may have begun */
    assert_in_range(s.work[TB_WORK_SAMPLE].waiting, 5, 6);
    hold(FAKE_HOLD_NONE);
    run(f, 0);
    for (int i = 0; i < 6; i++)
        sampled_on(10 + i, i % 3, 1);
    versions_are(1, 1, 1, 0);
    sample_six(f, 20); /* nothing waits for mirrors any more */
    run(f, 0);
    for (int i = 0; i < 6; i++)
        sampled_on(20 + i, i % 3, 1);
    sample(f, 0, 20, 26, 9);
    sample(f, 0, 20, 27, 9);
    run(f, 0);
    sampled_on(27, 1, 1);
    tb_engine_stats(f->engine, &s);
    assert_int_equal(s.work[TB_WORK_SAMPLE].waiting, 0);
    assert_int_equal(s.tasks_done[TB_TASK_SAMPLE], 16);
    on_version(f, TB_TASK_VERSION_FREE, 0, 20);
    run(f, 0);
    sample(f, 0, 20, 30, 60);
    run(f, 1);
}

/* Published or loaded anew, at any point of a loan: samples before it see the old weights, those
 * after it the new ones. */
static void test_anew(void **state)
{
    struct fixture *f = *state;
    int64_t seq = 0;
    for (int k = 0; k < 24; k++, seq += 20) {
        hold((enum fake_hold)(k % 4));
        sample_six(f, seq);
        wait_held(f);
        if (k % 8 >= 4) sample_six(f, seq + 6);
        on_adapter(f, k % 3 ? TB_TASK_PUBLISH : TB_TASK_VERSION_LOAD, 0, 1, 20);
        hold(FAKE_HOLD_NONE);
        run(f, 0);
        for (int i = 0; i < (k % 8 >= 4 ? 12 : 6); i++)
            assert_int_equal(fake_content[seq + i], 2 * k + 1);
        sample_six(f, seq + 12);
        run(f, 0);
        for (int i = 12; i < 18; i++)
            sampled_on(seq + i, i % 3, 2 * k + 2);
        wait_returned(f);
        versions_are(1, 1, 1, 0);
        on_adapter(f, TB_TASK_PUBLISH, 0, 1, 20);
        run(f, 0);
    }
}

/* Freed while samples run on it everywhere, or wait for a mirror: all of them end well. */
static void test_freed(void **state)
{
    struct fixture *f = *state;
    for (int k = 0; k < 8; k++) {
        hold((enum fake_hold)(k % 4));
        sample_six(f, 10 * k);
        wait_held(f);
        on_version(f, TB_TASK_VERSION_FREE, 0, 20);
        sample(f, 0, 20, 10 * k + 6, 60); /* too late */
        hold(FAKE_HOLD_NONE);
        run(f, 1);
        for (int i = 0; i < 6; i++)
            assert_int_equal(fake_content[10 * k + i], k + 1);
        while (fake_live_versions)
            uv_run(&f->loop, UV_RUN_NOWAIT);
        on_adapter(f, TB_TASK_PUBLISH, 0, 1, 20);
        run(f, 0);
    }
}

/* A sample that waits for a mirror can be canceled meanwhile; the others' turn comes. */
static void test_canceled(void **state)
{
    struct fixture *f = *state;
    hold(FAKE_HOLD_BORROW);
    sample(f, 0, 20, 0, 100);
    struct tb_task *t = sample(f, 0, 20, 1, 40);
    sample(f, 0, 20, 2, 1000);
    sample(f, 0, 20, 3, 30);
    wait_held(f);
    tb_engine_cancel(f->engine, t);
    while (f->open > 2) /* the first, and the canceled one */
        uv_run(&f->loop, UV_RUN_ONCE);
    assert_int_equal(f->failed, 1);
    assert_int_equal(f->last_error, TB_ECANCELED);
    hold(FAKE_HOLD_NONE);
    run(f, 0);
    sampled_on(2, 1, 1);
    sampled_on(3, 2, 1);
}

/* Where there is no room, samples go home, and it is not tried again before the version changes. */
static void test_no_room(void **state)
{
    struct fixture *f = *state;
    fake_devices[1].full = fake_devices[2].full = true;
    for (int k = 0; k < 2; k++) {
        sample_six(f, 10 * k);
        run(f, 0);
        for (int i = 0; i < 6; i++)
            sampled_on(10 * k + i, 0, 1);
        fake_devices[1].full = false;
    }
    versions_are(1, 0, 0, 0);
    on_adapter(f, TB_TASK_PUBLISH, 0, 1, 20);
    run(f, 0);
    sample_six(f, 20);
    run(f, 0);
    sampled_on(21, 1, 2);
    sampled_on(22, 0, 2);
    versions_are(1, 1, 0, 0);
}

/* What is on a device that is lost fails; what comes after is drawn on the others. */
static void test_mirror_lost(void **state)
{
    struct fixture *f = *state;
    hold(FAKE_HOLD_BORROW);
    sample(f, 0, 20, 0, 60);
    sample(f, 0, 20, 1, 60);
    wait_held(f);
    fake_devices[1].lost = true; /* while it borrows */
    hold(FAKE_HOLD_NONE);
    run(f, 0);
    sampled_on(1, 0, 1);
    sample_six(f, 10);
    run(f, 0);
    for (int i = 0; i < 6; i++)
        sampled_on(10 + i, i % 2 * 2, 1);
    fake_devices[0].lost = true; /* the home */
    on_adapter(f, TB_TASK_OPTIM, 0, 1, 0);
    run(f, 1);
    sample_six(f, 20);
    run(f, 0);
    for (int i = 0; i < 6; i++)
        sampled_on(20 + i, 2, 1);
    fake_devices[2].lost = true;
    for (int k = 0; k < 2; k++) {
        sample_six(f, 30);
        run(f, 6);
        assert_int_equal(f->last_error, TB_EDEVICE);
    }
}

static void test_home_lost(void **state)
{
    struct fixture *f = *state;
    fake_devices[0].lost = true;
    sample_six(f, 0); /* it cannot lend: they come home */
    run(f, 6);
    assert_int_equal(f->last_error, TB_EDEVICE);
    versions_are(1, 0, 0, 0);
}

/* Closing at any point of a loan: the home waits for it, and every callback comes. */
static void test_close(void **state)
{
    for (int k = 0; k < 4; k++) {
        struct fixture *f = *state;
        hold((enum fake_hold)k);
        sample_six(f, 0);
        wait_held(f);
        tb_engine_close(f->engine, on_closed, f);
        for (int i = 0; k && i < 100; i++)
            uv_run(&f->loop, UV_RUN_NOWAIT);
        assert_true(k == 0 || !f->closed);
        hold(FAKE_HOLD_NONE);
        uv_run(&f->loop, UV_RUN_DEFAULT);
        check_closed(f);
        tb_free(f);
        setup_version(state);
    }
}

int main(void)
{
#define T(name) cmocka_unit_test_setup_teardown(name, setup_three, teardown)
    const struct CMUnitTest tests[] = {
        T(test_homes),
        T(test_failed_creation),
        T(test_versions),
        T(test_base_samples),
        T(test_lost),
        cmocka_unit_test_setup_teardown(test_two_models, setup_two_models, teardown),
        cmocka_unit_test(test_kinds),
#define V(name) cmocka_unit_test_setup_teardown(name, setup_version, teardown_version)
        V(test_mirrors),
        V(test_anew),
        V(test_freed),
        V(test_canceled),
        V(test_no_room),
        V(test_mirror_lost),
        V(test_home_lost),
        V(test_close),
    };
    return cmocka_run_group_tests_name("engine replicas", tests, NULL, NULL);
}
