/*
 * One model on three GPUs of the emulation: many tenants' training and samples give the same bits
 * as on one, wherever they are computed, also from mirrors of one version; when a device is lost,
 * those on the others go on; GPUs of several kinds are refused.
 */
#include <stdlib.h>
#include <string.h>

#include "engine_fixture.h"

enum { N_TENANTS = 5, PROMPT = 6, DRAWN = 9 };

static const int device_numbers[] = {0, 1, 2};
static char *model_dir;

static int create(struct fixture *f, int n_devices, uint64_t mirror_tokens, struct tb_error *err)
{
    struct tb_engine_model model = {.name = "a", .dir = model_dir};
    struct tb_engine_options o = {.models = &model,
                                  .n_models = 1,
                                  .backend = "cuda",
                                  .dtype = "f32",
                                  .n_threads = 1,
                                  .memory = f->memory,
                                  .mirror_tokens = mirror_tokens,
                                  .devices = device_numbers,
                                  .n_devices = n_devices};
    return create_engine(f, &o, err);
}

static void open_engine(struct fixture *f, int n_devices, uint64_t mirror_tokens)
{
    struct tb_error err = {0};
    *f = (struct fixture){.memory = (uint64_t)256 << 20};
    if (create(f, n_devices, mirror_tokens, &err)) fail_msg("%s", err.msg);
}

static struct tb_task *submit(struct fixture *f, enum tb_task_type type, uint64_t adapter,
                              uint64_t version, struct tb_op *op)
{
    return submit_task(f, make_task(f, type, adapter, version, adapter, op));
}

/* It must have gone well. */
static void drop_ok(struct tb_task *t)
{
    if (tb_task_error(t)->code) fail_msg("%s", tb_task_error(t)->msg);
    drop(t);
}

static void finish_ok(struct fixture *f, struct tb_task *t)
{
    while (t->cb)
        uv_run(&f->loop, UV_RUN_ONCE);
    drop_ok(t);
}

static struct tb_op *sample_op(uint64_t seed)
{
    static const int32_t prompt[PROMPT] = {3, 1, 4, 1, 5, 9};
    return op_sample(prompt, PROMPT, DRAWN, seed);
}

struct drawn {
    float logprobs[DRAWN];
    int32_t tokens[DRAWN];
};

static void take_sample(struct tb_task *t, struct drawn *out)
{
    if (tb_task_error(t)->code) fail_msg("%s", tb_task_error(t)->msg);
    const struct tb_sequence *s = t->op->result.sequences;
    assert_int_equal(s->n, DRAWN);
    memcpy(out->logprobs, s->logprobs, sizeof(out->logprobs));
    memcpy(out->tokens, s->tokens, sizeof(out->tokens));
    drop(t);
}

struct answers {
    float train[N_TENANTS][70];
    struct drawn own[N_TENANTS], base[N_TENANTS];
};

/* Trains an adapter of each tenant (id: from 1) and samples from it and from the base model. */
static void run_tenants(struct fixture *f, struct answers *out)
{
    enum { N = 4 };
    struct tb_task *t[N_TENANTS][N], *own[N_TENANTS], *base[N_TENANTS];
    for (uint64_t i = 0; i < N_TENANTS; i++) {
        t[i][0] = submit(f, TB_TASK_ADAPTER_CREATE, i + 1, 0, NULL);
        t[i][1] = submit(f, TB_TASK_TRAIN, i + 1, 0, batch_op(&shapes[1], i, true, false));
        t[i][2] = submit(f, TB_TASK_OPTIM, i + 1, 0, op_adam(1e-2));
        t[i][3] = submit(f, TB_TASK_PUBLISH, i + 1, i + 101, NULL);
    }
    wait_all(f);
    for (uint64_t i = 0; i < N_TENANTS; i++) {
        own[i] = submit(f, TB_TASK_SAMPLE, 0, i + 101, sample_op(i));
        base[i] = submit(f, TB_TASK_SAMPLE, 0, 0, sample_op(i));
    }
    wait_all(f);
    for (int i = 0; i < N_TENANTS; i++) {
        const struct tb_output *o = t[i][1]->op->result.outputs;
        memset(out->train[i], 0, sizeof(out->train[i]));
        memcpy(out->train[i], o->logprobs, sizeof(float) * (size_t)TB_MIN(o->n, 70));
        for (int k = 0; k < N; k++)
            drop_ok(t[i][k]);
        take_sample(own[i], &out->own[i]);
        take_sample(base[i], &out->base[i]);
    }
}

static void test_same_bits(void **state)
{
    struct fixture f;
    struct answers *one = tb_calloc(1, sizeof(*one)), *three = tb_calloc(1, sizeof(*three));
    struct tb_engine_stats s;
    open_engine(&f, 1, 0);
    run_tenants(&f, one);
    close_engine(&f);
    open_engine(&f, 3, DRAWN);
    run_tenants(&f, three);
    tb_engine_stats(f.engine, &s);
    assert_int_equal(s.memory.n_adapters, N_TENANTS);
    assert_int_equal(s.memory.limit, (uint64_t)3 * 256 << 20);
    close_engine(&f);
    assert_memory_equal(one, three, sizeof(*one));
    assert_memory_not_equal(one->train[0], one->train[1], sizeof(one->train[0]));
    tb_free(one);
    tb_free(three);
}

/* Adapters 1, 4 are at home on device 0, 2 and 5 on 1, 3 on 2. */
static void test_lost(void **state)
{
    emu_only();
    struct fixture f;
    struct answers *all = tb_calloc(1, sizeof(*all));
    struct drawn again;
    open_engine(&f, 3, 0);
    run_tenants(&f, all);
    emu_fail_device(1);
    for (uint64_t i = 0; i < N_TENANTS; i++) {
        struct tb_task *t = submit(&f, TB_TASK_OPTIM, i + 1, 0, op_adam(1e-2));
        wait_all(&f);
        assert_int_equal(drop(t), i % 3 == 1 ? TB_EDEVICE : 0);
    }
    for (uint64_t i = 0; i < N_TENANTS; i++) {
        struct tb_task *t = submit(&f, TB_TASK_SAMPLE, 0, i + 101, sample_op(i));
        wait_all(&f);
        if (i % 3 == 1) {
            assert_int_equal(drop(t), TB_EDEVICE);
        } else {
            take_sample(t, &again);
            assert_memory_equal(&again, &all->own[i], sizeof(again));
        }
    }
    struct tb_task *base[N_TENANTS], *create[3];
    for (uint64_t i = 0; i < N_TENANTS; i++)
        base[i] = submit(&f, TB_TASK_SAMPLE, 0, 0, sample_op(i));
    for (uint64_t i = 0; i < 3; i++)
        create[i] = submit(&f, TB_TASK_ADAPTER_CREATE, 10 + i, 0, NULL);
    wait_all(&f);
    for (int i = 0; i < N_TENANTS; i++) {
        take_sample(base[i], &again);
        assert_memory_equal(&again, &all->base[i], sizeof(again));
    }
    for (int i = 0; i < 3; i++)
        drop_ok(create[i]);
    close_engine(&f);
    emu_fail_after(0);
    tb_free(all);
}

enum { N_SAMPLES = 12, VERSION = 101 };

static void submit_samples(struct fixture *f, struct tb_task *out[N_SAMPLES])
{
    for (uint64_t i = 0; i < N_SAMPLES; i++)
        out[i] = submit(f, TB_TASK_SAMPLE, 0, VERSION, sample_op(i));
}

static void take_samples(struct tb_task *t[N_SAMPLES], struct drawn out[N_SAMPLES])
{
    for (int i = 0; i < N_SAMPLES; i++)
        take_sample(t[i], &out[i]);
}

/* A step of the optimizer changes the weights, which are published under the same name. */
static void publish(struct fixture *f, uint64_t seed)
{
    struct tb_task *t[] = {submit(f, TB_TASK_TRAIN, 1, 0, batch_op(&shapes[1], seed, true, false)),
                           submit(f, TB_TASK_OPTIM, 1, 0, op_adam(1e-2)),
                           submit(f, TB_TASK_PUBLISH, 1, VERSION, NULL)};
    for (size_t i = 0; i < TB_ARRAY_LEN(t); i++)
        finish_ok(f, t[i]);
}

/* Samples of three states of an adapter, all of one name: the next one comes while those of the
 * last run or wait for mirrors. */
static void sample_states(struct fixture *f, struct drawn out[3][N_SAMPLES])
{
    struct tb_task *t[3][N_SAMPLES];
    finish_ok(f, submit(f, TB_TASK_ADAPTER_CREATE, 1, 0, NULL));
    for (uint64_t i = 0; i < 3; i++) {
        publish(f, i);
        submit_samples(f, t[i]);
    }
    finish_ok(f, submit(f, TB_TASK_VERSION_FREE, 0, VERSION, NULL));
    wait_all(f);
    for (int i = 0; i < 3; i++)
        take_samples(t[i], out[i]);
}

static int n_versions(struct fixture *f)
{
    struct tb_engine_stats s;
    tb_engine_stats(f->engine, &s);
    return (int)s.memory.n_versions;
}

static void test_mirrors(void **state)
{
    struct fixture f;
    struct drawn one[3][N_SAMPLES], three[3][N_SAMPLES], again[N_SAMPLES];
    struct tb_task *t[N_SAMPLES];
    open_engine(&f, 1, 0);
    sample_states(&f, one);
    close_engine(&f);
    for (int i = 1; i < 3; i++)
        assert_memory_not_equal(one[0], one[i], sizeof(one[0]));
    open_engine(&f, 3, DRAWN);
    sample_states(&f, three);
    assert_memory_equal(one, three, sizeof(one));
    finish_ok(&f, submit(&f, TB_TASK_PUBLISH, 1, VERSION, NULL));
    for (int k = 0; k < 3; k++) {
        submit_samples(&f, t);
        if (k == 1) tb_engine_cancel(f.engine, t[N_SAMPLES - 1]);
        wait_all(&f);
        if (k == 1) {
            drop(t[N_SAMPLES - 1]);
            t[N_SAMPLES - 1] = submit(&f, TB_TASK_SAMPLE, 0, VERSION, sample_op(N_SAMPLES - 1));
            wait_all(&f);
        }
        take_samples(t, again);
        assert_memory_equal(again, one[2], sizeof(again));
        assert_int_equal(n_versions(&f), 3);
    }
    submit_samples(&f, t); /* while they run */
    close_engine(&f);
    for (int i = 0; i < N_SAMPLES; i++)
        assert_int_equal(drop(t[i]), TB_ECANCELED);
}

/* What is drawn on a mirror whose device is lost fails; what comes after is drawn on the others. */
static void test_lost_mirror(void **state)
{
    emu_only();
    struct fixture f;
    struct drawn first[N_SAMPLES], again[N_SAMPLES];
    struct tb_task *t[N_SAMPLES];
    open_engine(&f, 3, DRAWN);
    finish_ok(&f, submit(&f, TB_TASK_ADAPTER_CREATE, 1, 0, NULL));
    publish(&f, 0);
    submit_samples(&f, t);
    wait_all(&f);
    take_samples(t, first);
    emu_fail_device(2);
    submit_samples(&f, t); /* in turn to each device */
    wait_all(&f);
    for (int i = 0; i < N_SAMPLES; i++)
        assert_int_equal(drop(t[i]), i % 3 == 2 ? TB_EDEVICE : 0);
    submit_samples(&f, t);
    wait_all(&f);
    take_samples(t, again);
    assert_memory_equal(first, again, sizeof(first));
    close_engine(&f);
    emu_fail_after(0);
}

static void test_kinds(void **state)
{
    emu_only();
    struct fixture f = {.memory = (uint64_t)256 << 20};
    struct tb_error err = {0};
    setenv("TB_EMU_NAMES", "GPU A,GPU A,GPU B", 1);
    assert_int_equal(create(&f, 3, 0, &err), TB_EINVAL);
    assert_string_equal(err.msg, "--devices: GPU 0 (GPU A, 3 multiprocessors) and GPU 2 (GPU B, 3 "
                                 "multiprocessors) share a model, so they must be of one kind");
    assert_int_equal(uv_loop_close(&f.loop), 0);
    open_engine(&f, 2, 0);
    close_engine(&f);
    unsetenv("TB_EMU_NAMES");
}

/* Two devices of the emulation, of which the second has what the first has left. */
static void test_memory(void **state)
{
    emu_only();
    struct fixture f = {0};
    struct tb_engine_stats s;
    uint64_t all = (uint64_t)3 << 30, least = (all - all / 10 * 9) / 10 * 9;
    setenv("TB_EMU_MEMORY", "3221225472", 1);
    CHECK_OK(create(&f, 2, 0, &check_err));
    tb_engine_stats(f.engine, &s);
    assert_in_range(s.memory.limit, 2 * least - 1024, 2 * least + 1024);
    close_engine(&f);
    unsetenv("TB_EMU_MEMORY");
}

int main(void)
{
    if (emu_devices(3) < 3) return 77; /* skipped */
    model_dir = random_model(&shapes[1], 4, 0.2f);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_same_bits), cmocka_unit_test(test_lost),
        cmocka_unit_test(test_mirrors),   cmocka_unit_test(test_lost_mirror),
        cmocka_unit_test(test_kinds),     cmocka_unit_test(test_memory),
    };
    int rc = cmocka_run_group_tests_name("cuda replicas", tests, NULL, NULL);
    remove_dir(model_dir);
    return rc;
}
