/*
 * The engine over two GPUs, of the emulation or real (one, where there is no other): models go to
 * them in turn and compute the same on each; when a device is lost, what needs it fails with its
 * error, and the engine goes on answering.
 */
#include <stdlib.h>
#include <string.h>

#include "engine_fixture.h"

enum { N_MODELS = 3 };

static struct tb_engine_options options_of(struct tb_engine_model models[N_MODELS], const char *dir,
                                           const int *devices, int n_devices)
{
    static const char *const names[N_MODELS] = {"a", "b", "c"};
    for (int i = 0; i < N_MODELS; i++)
        models[i] = (struct tb_engine_model){.name = names[i], .dir = dir};
    return (struct tb_engine_options){.models = models,
                                      .n_models = N_MODELS,
                                      .backend = n_devices ? "cuda" : "cpu",
                                      .dtype = "f32",
                                      .n_threads = 1,
                                      .memory = (uint64_t)256 << 20,
                                      .devices = devices,
                                      .n_devices = n_devices};
}

static void open_engine(struct fixture *f, const int *devices, int n_devices)
{
    struct tb_engine_model models[N_MODELS];
    f->dir = random_model(&shapes[1], 4, 0.2f);
    struct tb_engine_options o = options_of(models, f->dir, devices, n_devices);
    CHECK_OK(create_engine(f, &o, &check_err));
}

static struct tb_task *submit(struct fixture *f, enum tb_task_type type, int model,
                              struct tb_op *op)
{
    struct tb_task *t = make_task(f, type, 10 + (uint64_t)model, 20 + (uint64_t)model, 5, op);
    t->model = model;
    return submit_task(f, t);
}

static int code_of(struct tb_task *t)
{
    int code = tb_task_error(t)->code;
    if (code == TB_EDEVICE) {
        assert_non_null(strstr(tb_task_error(t)->msg, " is lost: "));
        assert_int_equal(tb_error_category(code), TB_CAT_SERVER);
    }
    return code;
}

struct answers {
    float train[70], sample[9];
    int32_t tokens[9];
};

/* Trains an adapter of each model and samples from it. */
static void run_models(struct fixture *f, struct answers out[N_MODELS])
{
    enum { N = 5 };
    struct tb_task *t[N_MODELS][N];
    const int32_t prompt[] = {3, 1, 4, 1, 5, 9};
    for (int m = 0; m < N_MODELS; m++) {
        t[m][0] = submit(f, TB_TASK_ADAPTER_CREATE, m, NULL);
        t[m][1] = submit(f, TB_TASK_TRAIN, m, batch_op(&shapes[1], 3, true, false));
        t[m][2] = submit(f, TB_TASK_OPTIM, m, op_adam(1e-2));
        t[m][3] = submit(f, TB_TASK_PUBLISH, m, NULL);
    }
    wait_all(f);
    for (int m = 0; m < N_MODELS; m++)
        t[m][4] = submit(f, TB_TASK_SAMPLE, m, op_sample(prompt, 6, 9, 77));
    wait_all(f);
    for (int m = 0; m < N_MODELS; m++) {
        for (int i = 0; i < N; i++)
            if (code_of(t[m][i])) fail_msg("%s", tb_task_error(t[m][i])->msg);
        const struct tb_sequence *s = t[m][4]->op->result.sequences;
        assert_int_equal(s->n, 9);
        memcpy(out[m].train, t[m][1]->op->result.outputs[0].logprobs, sizeof(out[m].train));
        memcpy(out[m].sample, s->logprobs, sizeof(out[m].sample));
        memcpy(out[m].tokens, s->tokens, sizeof(out[m].tokens));
        for (int i = 0; i < N; i++)
            drop(t[m][i]);
    }
}

static void test_devices(void **state)
{
    static const int both[] = {1, 0}, one[] = {0};
    int n = emu_devices(2);
    struct fixture two = {0}, single = {0};
    struct answers a[N_MODELS], b[N_MODELS];
    struct tb_engine_stats s;
    open_engine(&two, both + 2 - n, n);
    assert_int_equal(strstr(tb_engine_describe(two.engine), "; cuda ") != NULL, n == 2);
    run_models(&two, a);
    tb_engine_stats(two.engine, &s);
    assert_int_equal(s.memory.limit, (uint64_t)n * 256 << 20);
    assert_int_equal(s.memory.n_adapters, N_MODELS);
    assert_int_equal(s.tasks_done[TB_TASK_SAMPLE], N_MODELS);
    close_engine(&two);
    open_engine(&single, one, 1);
    assert_null(strstr(tb_engine_describe(single.engine), ";"));
    run_models(&single, b);
    close_engine(&single);
    for (int m = 0; m < N_MODELS; m++) {
        assert_memory_equal(&a[m], &b[0], sizeof(a[m]));
        assert_memory_equal(&b[m], &b[0], sizeof(b[m]));
    }
}

static void test_lost(void **state)
{
    emu_only();
    static const int both[] = {0, 1};
    struct fixture f = {0};
    struct answers a[N_MODELS];
    const int32_t prompt[] = {3, 1, 4, 1, 5, 9};
    open_engine(&f, both, 2);
    run_models(&f, a);
    emu_fail_after(1);
    for (int turn = 0; turn < 2; turn++) { /* it stays so when the failures have gone */
        struct tb_task *t[] = {
            submit(&f, TB_TASK_TRAIN, 0, batch_op(&shapes[1], 3, true, false)),
            submit(&f, TB_TASK_OPTIM, 0, op_adam(1e-2)),
            submit(&f, TB_TASK_EXPORT, 0, NULL),
            submit(&f, TB_TASK_SAMPLE, 0, op_sample(prompt, 6, 9, 77)),
            submit(&f, TB_TASK_TRAIN, 1, batch_op(&shapes[1], 3, false, false)),
            submit(&f, TB_TASK_SAMPLE, 1, op_sample(prompt, 6, 9, 77)),
            submit(&f, TB_TASK_PUBLISH, 1, NULL),
        };
        wait_all(&f);
        emu_fail_after(0);
        for (size_t i = 0; i < TB_ARRAY_LEN(t); i++) {
            assert_int_equal(code_of(t[i]), TB_EDEVICE);
            if (t[i]->op) assert_int_equal(t[i]->op->result.n_outputs, 0);
            if (t[i]->op) assert_int_equal(t[i]->op->result.n_metrics, 0);
            if (t[i]->op) assert_int_equal(t[i]->op->result.n_sequences, 0);
            assert_null(t[i]->state);
            drop(t[i]);
        }
    }
    struct tb_task *t[] = {submit(&f, TB_TASK_VERSION_FREE, 0, NULL),
                           submit(&f, TB_TASK_ADAPTER_FREE, 0, NULL),
                           submit(&f, TB_TASK_ADAPTER_CREATE, 2, NULL)};
    wait_all(&f);
    assert_int_equal(code_of(t[0]), 0);
    assert_int_equal(code_of(t[1]), 0);
    assert_int_equal(code_of(t[2]), TB_EDEVICE);
    for (size_t i = 0; i < TB_ARRAY_LEN(t); i++)
        drop(t[i]);
    struct tb_engine_stats s;
    tb_engine_stats(f.engine, &s);
    assert_int_equal(s.memory.n_adapters, N_MODELS - 1);
    close_engine(&f);
}

static void test_refused(void **state)
{
    emu_only();
    static const int seven[] = {0, 7};
    struct tb_engine_model models[N_MODELS];
    struct tb_engine *e = NULL;
    struct tb_error err = {0};
    uv_loop_t loop;
    char *dir = random_model(&shapes[1], 4, 0.2f);
    uv_loop_init(&loop);
    struct tb_engine_options o = options_of(models, dir, seven, 2);
    assert_int_equal(tb_engine_create(&e, &loop, &o, &err), TB_EINVAL);
    assert_string_equal(err.msg, "there is no CUDA device 7; there are 2, from 0");
    o.backend = "cpu";
    assert_int_equal(tb_engine_create(&e, &loop, &o, &err), TB_EINVAL);
    assert_non_null(strstr(err.msg, "--devices"));
    assert_int_equal(uv_loop_close(&loop), 0);
    remove_dir(dir);
}

int main(void)
{
    emu_devices(2);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_devices),
        cmocka_unit_test(test_lost),
        cmocka_unit_test(test_refused),
    };
    return cmocka_run_group_tests_name("cuda engine", tests, NULL, NULL);
}
