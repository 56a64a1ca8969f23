/*
 * A model on the CUDA backend under the emulation: decode steps as graphs give the bits of plain
 * ones, and when the device is lost at any call, every op either gives what it gives on a device
 * that works or fails with the device's error.
 */
#include <stdlib.h>
#include <string.h>

#include "../unit/model/helper.h"
#include "cuda/cuda.h"
#include "emu.h"
#include "util/mem.h"

static struct tb_backend *open_backend(enum tb_dtype act)
{
    struct tb_backend *be = NULL;
    struct tb_backend_options o = {.act = act, .mem_limit = (size_t)256 << 20};
    CHECK_OK(tb_backend_cuda_create(&be, &o, &check_err));
    return be;
}

/* What an op said: 0 and all its numbers, or its error's code. */
struct said {
    int code;
    uint64_t numbers;
};

static void add(struct said *s, const void *p, size_t n)
{
    for (size_t i = 0; p && i < n; i++)
        s->numbers = (s->numbers ^ ((const unsigned char *)p)[i]) * 0x100000001b3u + i;
}

static struct said of_op(struct tb_op *op)
{
    struct said s = {.code = op->error.code};
    const struct tb_result *r = &op->result;
    size_t k = op->type == TB_OP_SAMPLE ? (size_t)op->u.sample.topk_prompt_logprobs : 0,
           P = op->type == TB_OP_SAMPLE ? (size_t)op->u.sample.n_prompt : 0;
    for (int i = 0; i < r->n_outputs; i++)
        add(&s, r->outputs[i].logprobs, 4 * (size_t)r->outputs[i].n);
    for (int i = 0; i < r->n_metrics; i++)
        add(&s, &r->metrics[i].value, sizeof(r->metrics[i].value));
    for (int i = 0; i < r->n_sequences; i++) {
        const struct tb_sequence *q = &r->sequences[i];
        size_t n = (size_t)q->n, kq = (size_t)op->u.sample.topk_sample_logprobs;
        add(&s, q->tokens, 4 * n);
        add(&s, q->logprobs, 4 * n);
        add(&s, q->topk_ids, 4 * n * kq);
        add(&s, q->topk_logprobs, 4 * n * kq);
    }
    add(&s, r->prompt_logprobs, 4 * P);
    add(&s, r->topk_prompt_ids, 4 * P * k);
    add(&s, r->topk_prompt_logprobs, 4 * P * k);
    if (s.code) assert_int_equal(s.numbers, 0);
    tb_op_destroy(op);
    return s;
}

static struct said train(struct tb_model *m, struct tb_adapter *a, const struct shape *s, bool back)
{
    struct tb_op *op = batch_op(s, 3, back, false);
    struct tb_train_part part = {.n_data = op->u.forward_backward.n_data};
    struct tb_error err = {0};
    CHECK_OK(tb_training_create(&part.training, a, op, NULL));
    int rc = tb_model_train(m, &part, 1, &err);
    assert_true(tb_training_done(part.training));
    if (rc) assert_int_equal(op->error.code, rc);
    tb_training_destroy(part.training);
    return of_op(op);
}

static struct said sample(struct tb_model *m, struct tb_adapter_version *v)
{
    const int32_t prompt[] = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4};
    struct tb_op *op = op_sample(prompt, 20, 5, 7);
    struct tb_sampling *s = NULL;
    struct tb_error err = {0};
    int rows = 0, rc = 0;
    op->u.sample.n_samples = 2;
    op->u.sample.topk_sample_logprobs = 3;
    op->u.sample.topk_prompt_logprobs = 2;
    op->u.sample.prompt_logprobs = true;
    if (!tb_sampling_create(&s, m, v, op)) {
        for (int i = 0; i < 100 && !rc && !tb_sampling_done(s); i++)
            rc = tb_model_sample_step(m, &s, 1, 16, &rows, &err);
        assert_true(tb_sampling_done(s));
        tb_sampling_destroy(s);
    }
    return of_op(op);
}

static struct said export(struct tb_adapter *a)
{
    struct tb_adapter_state *state = NULL;
    struct tb_error err = {0};
    struct said s = {.code = tb_adapter_export(a, true, &state, &err)};
    if (s.code) return s;
    add(&s, state->p, 4 * (size_t)state->n_floats);
    add(&s, state->m, 4 * (size_t)state->n_floats);
    tb_adapter_state_destroy(state);
    return s;
}

enum { OPTIM = 2, N_OPS = 7 };

/* A life of an adapter, with the n-th call to the device failing from now on (0: none). */
static void run_life(struct tb_backend *be, const struct shape *shape, long fail_after,
                     struct said out[N_OPS])
{
    struct tb_lora_config c = {.rank = 4, .alpha = 8, .has_seed = true, .seed = 5};
    struct tb_model *m = open_model(be, shape, NULL);
    struct tb_adapter *a = NULL;
    struct tb_adapter_version *v = NULL;
    struct tb_error err = {0};
    c.train_attn = c.train_mlp = c.train_unembed = true;
    memset(out, 0, N_OPS * sizeof(*out));
    emu_fail_after(fail_after);
    out[0].code = tb_adapter_create(&a, m, &c, &err);
    if (out[0].code) {
        assert_int_equal(out[0].code, TB_EDEVICE);
        for (int i = 1; i < N_OPS; i++)
            out[i].code = TB_EDEVICE;
    } else {
        out[1] = train(m, a, shape, true);
        struct tb_op *adam = op_adam(1e-2);
        tb_adapter_optim_step(a, adam);
        out[OPTIM] = of_op(adam);
        CHECK_OK(tb_adapter_publish(a, &v, &check_err));
        out[3] = sample(m, v);
        out[4] = train(m, a, shape, false);
        out[5] = sample(m, NULL);
        out[6] = export(a);
        tb_version_unref(v);
        tb_adapter_free(a);
    }
    tb_model_free(m);
}

static void test_lost(void **state)
{
    emu_only();
    struct said want[N_OPS], got[N_OPS];
    struct tb_backend *be = open_backend(TB_BF16);
    run_life(be, &shapes[0], 0, want);
    assert_false(be->lost);
    be->ops->destroy(be);
    for (int i = 0; i < N_OPS; i++)
        assert_int_equal(want[i].code, 0);
    int n_lost = 0;
    bool lost = true;
    for (long n = 1; lost; n += n < 60 ? 5 : n / 10) {
        be = open_backend(TB_BF16);
        run_life(be, &shapes[0], n, got);
        bool failed = false;
        for (int i = 0; i < N_OPS; i++) {
            if (i == OPTIM && failed && !got[i].code) continue; /* no gradient: no device needed */
            failed |= got[i].code != 0;
            assert_int_equal(got[i].code, failed ? TB_EDEVICE : 0);
            if (!failed) assert_int_equal(got[i].numbers, want[i].numbers);
        }
        lost = be->lost;
        assert_int_equal(failed, lost);
        n_lost += lost;
        emu_fail_after(0);
        be->ops->destroy(be);
    }
    assert_true(n_lost > 30);
}

/* The same samples with decode steps captured and plain. */
static void test_graphs(void **state)
{
    for (int i = 0; i < 2 * N_SHAPES; i++) {
        const struct shape *shape = &shapes[i / 2];
        struct tb_op *ops[2][6];
        for (int plain = 0; plain < 2; plain++) {
            struct tb_backend *be = open_backend(i % 2 ? TB_BF16 : TB_F32);
            struct tb_backend_ops table = *be->ops;
            if (plain) table.step = NULL;
            be->ops = &table;
            struct tb_model *m = open_model(be, shape, NULL);
            struct tb_adapter *a = random_adapter(m, 5, 9, 0.2f);
            struct tb_adapter_version *v[6] = {0}, *one = NULL;
            CHECK_OK(tb_adapter_publish(a, &one, &check_err));
            for (int j = 0; j < 6; j++) {
                int32_t prompt[30];
                random_tokens(prompt, 30, shape->vocab, (uint64_t)j);
                ops[plain][j] = op_sample(prompt, 4 + 5 * j, 6 + 7 * j, (uint64_t)j);
                ops[plain][j]->u.sample.n_samples = 1 + j % 2;
                v[j] = j % 3 ? one : NULL;
            }
            run_samples(m, v, ops[plain], 6, 64);
            tb_version_unref(one);
            tb_adapter_free(a);
            tb_model_free(m);
            be->ops->destroy(be);
        }
        for (int j = 0; j < 6; j++) {
            struct said x = of_op(ops[0][j]), y = of_op(ops[1][j]);
            assert_int_equal(x.code, 0);
            assert_int_equal(x.numbers, y.numbers);
        }
    }
}

/* Heads that attention cannot do are refused, and lose no device. */
static void test_head_dim(void **state)
{
    static const int dims[] = {2, 4, 256, 258};
    struct tb_backend *be = open_backend(TB_BF16);
    for (size_t i = 0; i < TB_ARRAY_LEN(dims); i++) {
        struct shape s = shapes[0];
        struct tb_model *m = NULL;
        struct tb_error err = {0};
        s.head_dim = dims[i];
        char *dir = random_model(&s, 3, 0.2f);
        bool served = dims[i] >= 4 && dims[i] <= 256;
        assert_int_equal(tb_model_load(&m, be, "m", dir, NULL, &err), served ? 0 : TB_EUNSUPPORTED);
        if (!served) assert_non_null(strstr(err.msg, "config.json: head_dim "));
        if (!served) assert_non_null(strstr(err.msg, " by the cuda backend; it must be 4 to 256"));
        tb_model_free(m);
        remove_dir(dir);
    }
    assert_int_equal(be->ops->sync(be, &(struct tb_error){0}), 0);
    be->ops->destroy(be);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_head_dim),
        cmocka_unit_test(test_graphs),
        cmocka_unit_test(test_lost),
    };
    return cmocka_run_group_tests_name("cuda model", tests, NULL, NULL);
}
