/*
 * One model on several GPUs of the emulation: an op's shards are computed on all of them, to the
 * bits of one, also when a device is lost meanwhile or the engine closes. Built once more with CPU
 * backends in the place of GPUs (TB_NO_CUDA), for ThreadSanitizer.
 */
#include <stdlib.h>
#include <string.h>

#include "engine_fixture.h"

enum { MOST_DEVICES = 4, N_ADAPTERS = 2, SHAPE = 1 };
#ifdef TB_NO_CUDA
enum { CLOSE_STEP = 1 };
#else
enum { CLOSE_STEP = 5 }; /* the emulation is slow */
#endif

static int n_devices = MOST_DEVICES;

static void open_engine(struct fixture *f, int n)
{
    static const int devices[MOST_DEVICES] = {0, 1, 2, 3};
    *f = (struct fixture){.dir = random_model(&shapes[SHAPE], 4, 0.2f)};
    struct tb_engine_model model = {.name = "a", .dir = f->dir};
    struct tb_engine_options o = {.models = &model,
                                  .n_models = 1,
                                  .backend = "cuda",
                                  .dtype = "f32",
                                  .n_threads = 1,
                                  .memory = (uint64_t)256 << 20,
                                  .devices = devices,
                                  .n_devices = n,
                                  .shard_tokens = 30};
    CHECK_OK(create_engine(f, &o, &check_err));
}

static struct tb_task *submit(struct fixture *f, enum tb_task_type type, int adapter,
                              struct tb_op *op)
{
    uint64_t id = (uint64_t)adapter;
    struct tb_task *t = make_task(f, type, 10 + id, 20 + id, 5 + id, op);
    t->with_optimizer = type == TB_TASK_EXPORT;
    return submit_task(f, t);
}

static void create(struct fixture *f, int adapter)
{
    struct tb_task *t = submit(f, TB_TASK_ADAPTER_CREATE, adapter, NULL);
    wait_all(f);
    assert_int_equal(t->error.code, 0);
    drop(t);
}

static struct tb_op *big(uint64_t from, bool backward, bool ratio)
{
    return batch_op(&shapes[SHAPE], from, backward, ratio);
}

/* What one adapter gives: two ops that accumulate, a step, and what it is then. */
enum { TRAIN, TRAIN2, OPTIM, FORWARD, EXPORT, N_TASKS };

static void submit_all(struct fixture *f, struct tb_task *t[N_TASKS], int adapter)
{
    uint64_t from = 3 + (uint64_t)adapter;
    t[TRAIN] = submit(f, TB_TASK_TRAIN, adapter, big(from, true, false));
    t[TRAIN2] = submit(f, TB_TASK_TRAIN, adapter, big(from + 5, true, true));
    t[OPTIM] = submit(f, TB_TASK_OPTIM, adapter, op_adam(1e-2));
    t[FORWARD] = submit(f, TB_TASK_TRAIN, adapter, big(from, false, false));
    t[EXPORT] = submit(f, TB_TASK_EXPORT, adapter, NULL);
}

static void same_tasks(struct tb_task *const a[N_TASKS], struct tb_task *const b[N_TASKS])
{
    for (int i = 0; i < N_TASKS; i++) {
        assert_int_equal(tb_task_error(a[i])->code, 0);
        if (tb_task_error(b[i])->code) fail_msg("%s", tb_task_error(b[i])->msg);
    }
    for (int i = TRAIN; i <= FORWARD; i++) {
        const struct tb_result *x = &a[i]->op->result, *y = &b[i]->op->result;
        assert_int_equal(x->n_metrics, y->n_metrics);
        for (int k = 0; k < x->n_metrics; k++)
            assert_memory_equal(&x->metrics[k].value, &y->metrics[k].value, sizeof(double));
        if (i != OPTIM) same_outputs(a[i]->op, b[i]->op);
    }
    const struct tb_adapter_state *x = a[EXPORT]->state, *y = b[EXPORT]->state;
    size_t bytes = (size_t)x->n_floats * sizeof(float);
    assert_memory_equal(x->p, y->p, bytes);
    assert_memory_equal(x->m, y->m, bytes);
    assert_memory_equal(x->v, y->v, bytes);
}

static uint64_t shares_of(struct fixture *f)
{
    struct tb_engine_stats s;
    tb_engine_stats(f->engine, &s);
    return s.shares;
}

/* All adapters at once on n devices; returns the shares that were computed. */
static uint64_t run(int n, struct tb_task *t[N_ADAPTERS][N_TASKS])
{
    struct fixture f;
    open_engine(&f, n);
    for (int i = 0; i < N_ADAPTERS; i++)
        create(&f, i);
    for (int i = 0; i < N_ADAPTERS; i++)
        submit_all(&f, t[i], i);
    wait_all(&f);
    uint64_t shares = shares_of(&f);
    close_engine(&f);
    return shares;
}

static void drop_all(struct tb_task *t[N_ADAPTERS][N_TASKS])
{
    for (int i = 0; i < N_ADAPTERS; i++)
        for (int k = 0; k < N_TASKS; k++)
            drop(t[i][k]);
}

static void test_same_bits(void **state)
{
    struct tb_task *one[N_ADAPTERS][N_TASKS], *more[N_ADAPTERS][N_TASKS];
    assert_int_equal(run(1, one), 0);
    for (int n = 2; n <= n_devices; n++) {
        /* Three shards an op: two devices give one share away, more two. */
        assert_int_equal(run(n, more), N_ADAPTERS * 3 * TB_MIN(n - 1, 2));
        for (int i = 0; i < N_ADAPTERS; i++)
            same_tasks(one[i], more[i]);
        drop_all(more);
    }
    drop_all(one);
}

#ifndef TB_NO_CUDA
/* The other device fails before, in the middle of, or after its share: the op is done at home. */
static void test_lost(void **state)
{
    struct tb_task *want[N_TASKS], *t[N_TASKS];
    struct fixture f;
    emu_only();
    for (int lose = 0; lose < 2; lose++) {
        open_engine(&f, 2);
        create(&f, 0);
        if (lose) emu_fail_device(1);
        submit_all(&f, lose ? t : want, 0);
        wait_all(&f);
        assert_int_equal(shares_of(&f), lose ? 0 : 3);
        close_engine(&f);
        emu_fail_after(0);
    }
    same_tasks(want, t);
    for (int i = 0; i < N_TASKS; i++) {
        drop(want[i]);
        drop(t[i]);
    }
}

#endif

/* What fails of a datum in a share fails as on one device, and leaves no trace. */
static void test_failure(void **state)
{
    struct fixture f;
    struct tb_task *bad[2], *good[2][N_TASKS];
    for (int k = 0; k < 2; k++) {
        open_engine(&f, 1 + k);
        create(&f, 0);
        struct tb_op *op = big(3, true, true);
        struct tb_datum *d = &op->u.forward_backward.data[3];
        float *q = tb_arena_calloc(&op->arena, 18, sizeof(*q));
        q[7] = -3e38f;
        op->u.forward_backward.loss_fn = "importance_sampling";
        for (int j = 0; j < d->n_inputs; j++)
            if (!strcmp(d->inputs[j].name, "logprobs")) d->inputs[j].data.f32 = q;
        bad[k] = submit(&f, TB_TASK_TRAIN, 0, op);
        submit_all(&f, good[k], 0);
        wait_all(&f);
        close_engine(&f);
        assert_int_equal(op->error.code, TB_ENONFINITE);
        assert_int_equal(op->result.n_outputs, 0);
    }
    assert_string_equal(bad[0]->op->error.msg, bad[1]->op->error.msg);
    same_tasks(good[0], good[1]);
    for (int k = 0; k < 2; k++) {
        drop(bad[k]);
        for (int i = 0; i < N_TASKS; i++)
            drop(good[k][i]);
    }
}

/* Every task comes back, whatever is away when the engine closes. */
static void test_close(void **state)
{
    for (int turns = 0; turns < 40; turns += CLOSE_STEP) {
        struct tb_task *t[N_ADAPTERS][N_TASKS];
        struct fixture f;
        open_engine(&f, TB_MIN(n_devices, 3));
        for (int i = 0; i < N_ADAPTERS; i++)
            create(&f, i);
        for (int i = 0; i < N_ADAPTERS; i++)
            submit_all(&f, t[i], i);
        for (int i = 0; i < turns && f.open; i++)
            uv_run(&f.loop, UV_RUN_NOWAIT);
        if (turns % 2) uv_sleep((unsigned)turns / 2);
        close_engine(&f);
        for (int i = 0; i < N_ADAPTERS; i++) {
            for (int k = 0; k < N_TASKS; k++) {
                int code = tb_task_error(t[i][k])->code;
                assert_true(code == 0 || code == TB_ECANCELED);
            }
        }
        drop_all(t);
    }
}

int main(void)
{
#ifndef TB_NO_CUDA
    n_devices = emu_devices(MOST_DEVICES);
    if (n_devices < 2) return 77; /* skipped */
#endif
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_same_bits),
#ifndef TB_NO_CUDA
        cmocka_unit_test(test_lost),
#endif
        cmocka_unit_test(test_failure),
        cmocka_unit_test(test_close),
    };
    return cmocka_run_group_tests_name("cuda spread", tests, NULL, NULL);
}
