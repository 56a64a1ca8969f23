/* Training: gradients against differences, batch invariance to the bit, failures, optimizer,
 * adapters. */
#include "helper.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "model/pass.h"
#include "util/mem.h"

static double directional_loss(struct tb_model *m, struct tb_adapter *a, const float *p,
                               int64_t from, int64_t n, const float *dir, double h,
                               const int32_t *tokens, int len)
{
    size_t bytes = tb_adapter_flat_bytes(a);
    float *q = tb_malloc(bytes);
    memcpy(q, p, bytes);
    for (int64_t i = 0; i < n; i++)
        q[from + i] += (float)h * dir[i];
    m->be->ops->upload(m->be, a->p, q, bytes);
    tb_adapter_refresh_act(a);
    struct tb_op *op = op_cross_entropy(tokens, len, false);
    run_train(m, a, op);
    double loss = metric(op, "loss:sum");
    tb_op_destroy(op);
    tb_free(q);
    return loss;
}

/* Each tensor along its own gradient: dL/dh = |g|. */
static void test_gradient_by_differences(void **state)
{
    (void)state;
    for (size_t k = 0; k < N_SHAPES; k++) {
        struct tb_model *m = open_model(backend_f32(), &shapes[k], NULL);
        struct tb_adapter *a = random_adapter(m, 3, 5, 0.2f);
        int32_t tokens[24];
        random_tokens(tokens, 24, shapes[k].vocab, 3);
        struct tb_op *op = op_cross_entropy(tokens, 24, true);
        run_train(m, a, op);
        tb_op_destroy(op);
        float *g = grad_of(a), *p = params_of(a);
        double worst = 0;
        for (int i = 0; i < a->layout->n_modules; i++) {
            const struct tb_lora_slot *s = &a->layout->slots[i];
            const int64_t from[2] = {s->a, s->b}, n[2] = {s->b - s->a, 3LL * s->n_out};
            for (int t = 0; t < 2; t++) {
                double norm = 0;
                for (int64_t j = 0; j < n[t]; j++)
                    norm += (double)g[from[t] + j] * (double)g[from[t] + j];
                norm = sqrt(norm);
                assert_true(norm > 0);
                double h = 0.05 / (norm * norm); /* moves the loss by 0.05 */
                double d = (directional_loss(m, a, p, from[t], n[t], g + from[t], h, tokens, 24) -
                            directional_loss(m, a, p, from[t], n[t], g + from[t], -h, tokens, 24)) /
                           (2 * h);
                double e = fabs(d - norm * norm) / (norm * norm + 1e-2);
                worst = fmax(worst, e);
                if (e > 2e-2)
                    fail_msg("module %d tensor %d: %g, by differences %g", i, t, norm * norm, d);
            }
        }
        print_message("%s: worst relative difference %.2g\n", shapes[k].arch, worst);
        tb_free(g);
        tb_free(p);
        tb_adapter_free(a);
        tb_model_free(m);
    }
}

/* An op alone, and in the middle of others of other adapters and ranks: the same bits. */
static void packing(struct tb_backend *be, const struct shape *s)
{
    struct tb_model *m = open_model(be, s, NULL);
    struct tb_adapter *a = random_adapter(m, 4, 1, 0.1f), *b = random_adapter(m, 4, 1, 0.1f);
    struct tb_adapter *c = random_adapter(m, 7, 2, 0.1f), *d = random_adapter(m, 1, 3, 0.1f);
    struct tb_op *alone = batch_op(s, 1, true, false), *alone2 = batch_op(s, 2, true, true);
    run_train(m, a, alone);
    run_train(m, a, alone2);
    struct tb_op *ops[6] = {batch_op(s, 5, true, false),  batch_op(s, 1, true, false),
                            batch_op(s, 7, false, false), batch_op(s, 8, true, true),
                            batch_op(s, 2, true, true),   batch_op(s, 1, false, false)};
    struct tb_adapter *as[6] = {c, b, d, c, b, b};
    run_ops(m, as, ops, 6);
    for (int i = 0; i < 6; i++)
        assert_int_equal(ops[i]->error.code, 0);
    same_outputs(alone, ops[1]);
    same_outputs(alone2, ops[4]);
    same_outputs(alone, ops[5]); /* forward within the batch */
    same_grads(a, b);
    assert_false(d->has_grad);
    for (int i = 0; i < 6; i++)
        tb_op_destroy(ops[i]);
    tb_op_destroy(alone);
    tb_op_destroy(alone2);
    tb_adapter_free(a);
    tb_adapter_free(b);
    tb_adapter_free(c);
    tb_adapter_free(d);
    tb_model_free(m);
}

static void test_packing(void **state)
{
    (void)state;
    for (size_t k = 0; k < N_SHAPES; k++) {
        packing(backend_f32(), &shapes[k]);
        if (backend_bf16()) packing(backend_bf16(), &shapes[k]);
    }
}

/* However a batch is split, and with layers computed again instead of kept: the same bits. */
static void splitting(struct tb_backend *be, const struct shape *s)
{
    struct tb_model *m = open_model(be, s, NULL);
    struct tb_adapter *a = random_adapter(m, 4, 1, 0.1f);
    struct tb_op *x = batch_op(s, 1, true, false);
    run_train(m, a, x);
    size_t keep = tb_pass_bytes(m, TB_PASS_KEEP, true, 70, 4);
    size_t again = tb_pass_bytes(m, TB_PASS_RECOMPUTE, true, 70, 4);
    assert_true(again < keep);
    const size_t budgets[] = {keep, (keep + again) / 2, again, again - 1};
    for (size_t i = 0; i < TB_ARRAY_LEN(budgets); i++) {
        struct tb_model_options o = {.activation_bytes = budgets[i]};
        struct tb_model *m2 = open_model(be, s, &o);
        struct tb_adapter *b = random_adapter(m2, 4, 1, 0.1f);
        struct tb_op *y = batch_op(s, 1, true, false);
        run_ops(m2, &b, &y, 1);
        if (i < 3) {
            assert_int_equal(y->error.code, 0);
            same_outputs(x, y);
            same_grads(a, b);
        } else { /* the longest datum does not fit at all */
            assert_int_equal(y->error.code, TB_ENOMEM);
            assert_non_null(strstr(y->error.msg, "datum 0: 70 tokens need"));
            assert_int_equal(y->result.n_outputs, 0);
            assert_false(b->has_grad);
        }
        tb_op_destroy(y);
        tb_adapter_free(b);
        tb_model_free(m2);
    }
    /* In micro-batches of few rows, as far as the data are that short. */
    const struct tb_backend_sizes sizes = be->sizes;
    be->sizes.train_rows = 40;
    struct tb_model *m4 = open_model(be, s, NULL);
    struct tb_adapter *few = random_adapter(m4, 4, 1, 0.1f);
    struct tb_op *z = batch_op(s, 1, true, false);
    run_train(m4, few, z);
    assert_true(m4->train_ws.cap < m->train_ws.cap);
    same_outputs(x, z);
    same_grads(a, few);
    tb_op_destroy(z);
    tb_adapter_free(few);
    tb_model_free(m4);
    be->sizes = sizes;
    /* Another block of logits: logprobs keep their bits; the head's gradient is summed in other
     * pieces. */
    struct tb_model_options o = {.logits_bytes = 5 * 4 * (size_t)s->vocab};
    struct tb_model *m3 = open_model(be, s, &o);
    assert_int_equal(m3->head_rows, 5);
    struct tb_adapter *b = random_adapter(m3, 4, 1, 0.1f);
    struct tb_op *y = batch_op(s, 1, true, false);
    run_train(m3, b, y);
    for (int i = 0; i < 4; i++)
        assert_memory_equal(x->result.outputs[i].logprobs, y->result.outputs[i].logprobs,
                            (size_t)x->result.outputs[i].n * sizeof(float));
    float *g = grad_of(a), *h = grad_of(b);
    double diff = 0, norm = 0;
    for (int64_t i = 0; i < a->layout->n_floats; i++) {
        diff += ((double)g[i] - (double)h[i]) * ((double)g[i] - (double)h[i]);
        norm += (double)g[i] * (double)g[i];
    }
    assert_true(sqrt(diff / norm) < (be->act == TB_F32 ? 1e-5 : 1e-2));
    tb_free(g);
    tb_free(h);
    tb_op_destroy(y);
    tb_adapter_free(b);
    tb_model_free(m3);
    tb_op_destroy(x);
    tb_adapter_free(a);
    tb_model_free(m);
}

static void test_splitting(void **state)
{
    (void)state;
    for (size_t k = 0; k < N_SHAPES; k++) {
        splitting(backend_f32(), &shapes[k]);
        if (backend_bf16()) splitting(backend_bf16(), &shapes[k]);
    }
}

/* Thirteen tenants whose data go through in random steps, one op given up half way: each has the
 * outputs, loss and gradient that it has alone. */
static void in_steps(struct tb_backend *be, const struct shape *s)
{
    enum { N = 13 };
    struct tb_model *m = open_model(be, s, NULL);
    struct tb_adapter *alone[N], *as[N];
    struct tb_op *want[N], *ops[N];
    struct tb_training *t[N];
    uint64_t random = 12345;
    for (int i = 0; i < N; i++) {
        alone[i] = random_adapter(m, 1 + i % 6, (uint64_t)i, 0.1f);
        as[i] = random_adapter(m, 1 + i % 6, (uint64_t)i, 0.1f);
        want[i] = batch_op(s, (uint64_t)i, i % 4 > 0, i % 3 == 0);
        ops[i] = batch_op(s, (uint64_t)i, i % 4 > 0, i % 3 == 0);
        run_train(m, alone[i], want[i]);
        assert_int_equal(tb_training_create(&t[i], as[i], ops[i], NULL), 0);
    }
    for (int step = 0, open = 1; open; step++) {
        struct tb_train_part parts[N];
        struct tb_error err;
        int n = 0;
        open = 0;
        for (int i = 0; i < N; i++) {
            if (i == 5 && step == 2) { /* two of its four data are through */
                assert_false(tb_training_done(t[i]));
                tb_training_destroy(t[i]);
                t[i] = NULL;
            }
            if (!t[i] || tb_training_done(t[i])) continue;
            open++;
            random = random * 6364136223846793005u + 1442695040888963407u;
            int n_data = i == 5 ? 1 : (int)(random >> 60) % 3;
            if (n_data) parts[n++] = (struct tb_train_part){t[i], n_data};
        }
        if (n) assert_int_equal(tb_model_train(m, parts, n, &err), 0);
    }
    for (int i = 0; i < N; i++) {
        if (i == 5) {
            assert_false(as[i]->has_grad);
        } else {
            same_outputs(want[i], ops[i]);
            double a = metric(want[i], "loss:sum"), b = metric(ops[i], "loss:sum");
            assert_memory_equal(&a, &b, sizeof(a));
            assert_int_equal(as[i]->has_grad, i % 4 > 0);
            if (i % 4) same_grads(alone[i], as[i]);
        }
        tb_training_destroy(t[i]);
        tb_op_destroy(want[i]);
        tb_op_destroy(ops[i]);
        tb_adapter_free(alone[i]);
        tb_adapter_free(as[i]);
    }
    tb_model_free(m);
}

static void test_in_steps(void **state)
{
    (void)state;
    for (size_t k = 0; k < N_SHAPES; k++) {
        in_steps(backend_f32(), &shapes[k]);
        if (backend_bf16()) in_steps(backend_bf16(), &shapes[k]);
    }
}

/* bf16 stays near float32: the same model, adapter and data. */
static void test_bf16_near_f32(void **state)
{
    (void)state;
    if (!backend_bf16()) skip();
    for (size_t k = 0; k < N_SHAPES; k++) {
        struct tb_model *m[2] = {open_model(backend_f32(), &shapes[k], NULL),
                                 open_model(backend_bf16(), &shapes[k], NULL)};
        struct tb_adapter *a[2];
        struct tb_op *op[2];
        float *g[2];
        for (int i = 0; i < 2; i++) {
            a[i] = random_adapter(m[i], 4, 1, 0.1f);
            op[i] = batch_op(&shapes[k], 1, true, false);
            run_train(m[i], a[i], op[i]);
            g[i] = grad_of(a[i]);
        }
        double worst = 0, dot = 0, n0 = 0, n1 = 0;
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < op[0]->result.outputs[i].n; j++)
                worst = fmax(worst, fabs((double)op[0]->result.outputs[i].logprobs[j] -
                                         (double)op[1]->result.outputs[i].logprobs[j]));
        for (int64_t i = 0; i < a[0]->layout->n_floats; i++) {
            dot += (double)g[0][i] * (double)g[1][i];
            n0 += (double)g[0][i] * (double)g[0][i];
            n1 += (double)g[1][i] * (double)g[1][i];
        }
        print_message("%s: bf16 logprobs within %.3g, cosine of the gradients %.6f\n",
                      shapes[k].arch, worst, dot / sqrt(n0 * n1));
        assert_true(worst > 0 && worst < 0.3);
        assert_true(dot / sqrt(n0 * n1) > 0.995);
        assert_true(fabs(sqrt(n1 / n0) - 1) < 0.05);
        for (int i = 0; i < 2; i++) {
            tb_free(g[i]);
            tb_op_destroy(op[i]);
            tb_adapter_free(a[i]);
            tb_model_free(m[i]);
        }
    }
}

/* ---- shards */

static const struct tb_model_options in_shards = {.shard_tokens = 30}; /* three of batch_op's */

static void run_share(struct tb_model *m, struct tb_training *t)
{
    struct tb_train_part part = {t, 1};
    struct tb_error err;
    while (!tb_training_done(t) && !tb_training_waits(t))
        assert_int_equal(tb_model_train(m, &part, 1, &err), 0);
}

/* Shards computed by three devices, in any order of time, some of them at home after all: the bits
 * of one device. */
static void shares(const char *dtype, const struct shape *s, bool backward, bool ratio,
                   bool no_memory)
{
    struct tb_backend *be[3] = {new_backend(dtype), new_backend(dtype), new_backend(dtype)};
    struct tb_model *m[3];
    struct tb_training *t, *share[3] = {NULL};
    struct tb_adapter_version *ver;
    struct tb_loan loan;
    struct tb_error err = {0};
    for (int i = 0; i < 3; i++)
        m[i] = open_model(be[i], s, &in_shards);
    struct tb_adapter *a = random_adapter(m[0], 4, 1, 0.1f);
    struct tb_adapter *alone = random_adapter(m[0], 4, 1, 0.1f);
    CHECK_OK(tb_adapter_publish(a, &ver, &check_err));
    CHECK_OK(tb_version_lend(ver, &loan, &check_err));
    tb_version_unref(ver);
    struct tb_op *want = batch_op(s, 1, backward, ratio), *op = batch_op(s, 1, backward, ratio);
    run_train(m[0], alone, want);

    assert_int_equal(tb_training_create(&t, a, op, NULL), 0);
    assert_int_equal(tb_training_n_shards(t), 3);
    assert_int_equal(tb_training_shard_end(t, 0), 1);
    assert_int_equal(tb_training_shard_end(t, 1), 3);
    assert_int_equal(tb_training_shard_end(t, 2), 4);
    tb_training_compute_to(t, 1);
    assert_false(tb_training_waits(t));
    for (int i = 2; i > 0; i--) {
        CHECK_OK(tb_version_borrow(&ver, m[i], &loan, &check_err));
        tb_training_share(&share[i], t, ver, i, i + 1);
        tb_version_unref(ver);
        bool fails = i == 1 && no_memory;
        if (fails) fail_device_alloc(be[i], 1);
        run_share(m[i], share[i]);
        if (fails) fail_device_alloc(be[i], 0);
    }
    struct tb_train_part home = {t, 4};
    assert_int_equal(tb_model_train(m[0], &home, 1, &err), 0);
    assert_true(tb_training_waits(t));
    assert_false(a->has_grad);
    if (no_memory) {
        assert_int_equal(tb_training_error(share[1])->code, TB_ENOMEM);
        assert_int_equal(tb_training_collect(t, share[1], &err), TB_ENOMEM);
        tb_training_compute_to(t, 2);
        assert_false(tb_training_waits(t));
        assert_int_equal(tb_model_train(m[0], &home, 1, &err), 0);
        assert_true(tb_training_waits(t));
    } else {
        assert_int_equal(tb_training_collect(t, share[1], &err), 0);
    }
    assert_false(tb_training_done(t));
    assert_int_equal(tb_training_collect(t, share[2], &err), 0);
    assert_true(tb_training_done(t));
    assert_int_equal(op->error.code, 0);
    same_outputs(want, op);
    double x = metric(want, "loss:sum"), y = metric(op, "loss:sum");
    assert_memory_equal(&x, &y, sizeof(x));
    assert_int_equal(a->has_grad, backward);
    if (backward) same_grads(alone, a);

    tb_loan_return(&loan);
    tb_training_destroy(t);
    tb_op_destroy(want);
    tb_op_destroy(op);
    tb_adapter_free(alone);
    tb_adapter_free(a);
    for (int i = 0; i < 3; i++) {
        tb_training_destroy(share[i]);
        tb_model_free(m[i]);
        be[i]->ops->destroy(be[i]);
    }
}

static void test_shares(void **state)
{
    (void)state;
    for (size_t k = 0; k < N_SHAPES; k++) {
        const char *dtype = k % 2 && backend_bf16() ? "bf16" : "f32";
        shares(dtype, &shapes[k], true, false, false);
        shares(dtype, &shapes[k], true, true, true);
        shares(dtype, &shapes[k], false, k == 0, k == 1);
    }
}

/* A number that is not finite in a share's data fails the op as it would on one device. */
static void test_share_fails_the_op(void **state)
{
    (void)state;
    struct tb_model *m = open_model(backend_f32(), &shapes[0], &in_shards);
    struct tb_adapter *a = random_adapter(m, 4, 1, 0.1f);
    struct tb_op *alone = batch_op(&shapes[0], 1, true, true),
                 *op = batch_op(&shapes[0], 1, true, true);
    struct tb_op *both[2] = {alone, op};
    for (int i = 0; i < 2; i++) {
        struct tb_datum *d = &both[i]->u.forward_backward.data[2];
        float *q = tb_arena_calloc(&both[i]->arena, 33, sizeof(*q));
        q[7] = -3e38f;
        both[i]->u.forward_backward.loss_fn = "importance_sampling";
        for (int j = 0; j < d->n_inputs; j++)
            if (!strcmp(d->inputs[j].name, "logprobs")) d->inputs[j].data.f32 = q;
    }
    run_ops(m, &a, &alone, 1);
    assert_int_equal(alone->error.code, TB_ENONFINITE);
    struct tb_training *t, *share;
    struct tb_error err;
    assert_int_equal(tb_training_create(&t, a, op, NULL), 0);
    tb_training_compute_to(t, 1);
    tb_training_share(&share, t, a->cur, 1, 3);
    run_share(m, share);
    assert_int_equal(op->error.code, 0);
    run_share(m, t);
    assert_true(tb_training_waits(t));
    assert_int_equal(tb_training_collect(t, share, &err), 0);
    assert_true(tb_training_done(t));
    assert_int_equal(op->error.code, TB_ENONFINITE);
    assert_string_equal(op->error.msg, alone->error.msg);
    assert_int_equal(op->result.n_outputs, 0);
    assert_false(a->has_grad);
    tb_training_destroy(share);
    tb_training_destroy(t);
    tb_op_destroy(alone);
    tb_op_destroy(op);
    tb_adapter_free(a);
    tb_model_free(m);
}

/* Shards differ from one long sum by rounding only, and never where the op has one. */
static void test_shards_near_one_sum(void **state)
{
    (void)state;
    const struct tb_model_options one = {.shard_tokens = 1000};
    const struct tb_model_options *o[3] = {NULL, &in_shards, &one};
    float *g[3];
    int64_t n = 0;
    for (int i = 0; i < 3; i++) {
        struct tb_model *m = open_model(backend_f32(), &shapes[0], o[i]);
        struct tb_adapter *a = random_adapter(m, 4, 1, 0.1f);
        struct tb_op *op = batch_op(&shapes[0], 1, true, false);
        m->shard_tokens = i ? o[i]->shard_tokens : 0;
        run_train(m, a, op);
        g[i] = grad_of(a);
        n = a->layout->n_floats;
        tb_op_destroy(op);
        tb_adapter_free(a);
        tb_model_free(m);
    }
    double most = 0, worst = 0;
    int64_t differ = 0;
    for (int64_t i = 0; i < n; i++) {
        most = fmax(most, fabs((double)g[0][i]));
        worst = fmax(worst, fabs((double)g[0][i] - (double)g[1][i]));
        differ += g[0][i] < g[1][i] || g[0][i] > g[1][i];
    }
    assert_memory_equal(g[0], g[2], (size_t)n * 4);
    assert_true(differ > 0);
    assert_true(worst < 1e-6 * most);
    for (int i = 0; i < 3; i++)
        tb_free(g[i]);
}

/* ---- failures */

static void test_failed_op_leaves_no_trace(void **state)
{
    (void)state;
    struct tb_model *m = open_model(backend_f32(), &shapes[0], NULL);
    struct tb_adapter *a = random_adapter(m, 4, 1, 0.1f), *b = random_adapter(m, 4, 1, 0.1f);
    struct tb_op *good = batch_op(&shapes[0], 1, true, true),
                 *ref = batch_op(&shapes[0], 1, true, true);
    good->u.forward_backward.loss_fn = ref->u.forward_backward.loss_fn = "importance_sampling";
    run_train(m, b, ref);
    struct tb_op *bad = batch_op(&shapes[0], 2, true, true),
                 *good2 = batch_op(&shapes[0], 3, true, false);
    bad->u.forward_backward.loss_fn = "importance_sampling";
    /* exp(l + 1000) overflows in the third datum */
    float *q = (float *)(uintptr_t)bad->u.forward_backward.data[2].inputs[1].data.f32;
    assert_string_equal(bad->u.forward_backward.data[2].inputs[1].name, "logprobs");
    q[6] = -1000;
    struct tb_op *ops[3] = {bad, good, good2};
    struct tb_adapter *as[3] = {a, a, a};
    run_ops(m, as, ops, 3);
    assert_int_equal(bad->error.code, TB_ENONFINITE);
    assert_non_null(
        strstr(bad->error.msg, "datum 2: importance_sampling is not finite at position 6"));
    assert_int_equal(bad->result.n_outputs, 0);
    assert_int_equal(good->error.code, 0);
    same_outputs(good, ref);
    struct tb_op *ref2 = batch_op(&shapes[0], 3, true, false);
    run_train(m, b, ref2);
    same_grads(a, b);
    tb_op_destroy(ref2);
    for (int i = 0; i < 3; i++)
        tb_op_destroy(ops[i]);
    tb_op_destroy(ref);
    /* A zero advantage with the same ratio is no error. */
    struct tb_op *zero = batch_op(&shapes[0], 2, true, true);
    zero->u.forward_backward.loss_fn = "ppo";
    ((float *)(uintptr_t)zero->u.forward_backward.data[2].inputs[1].data.f32)[0] = -1000;
    run_train(m, a, zero);
    tb_op_destroy(zero);
    tb_adapter_free(a);
    tb_adapter_free(b);
    tb_model_free(m);
}

static void device_memory_runs_out(struct tb_model *m)
{
    struct tb_lora_config c = {4, 32, true, 1, true, true, true};
    struct tb_adapter *a = NULL;
    struct tb_error err = {0};
    for (long n = 1; n <= 2; n++) { /* parameters, their rounded copy */
        fail_device_alloc(m->be, n);
        assert_int_equal(tb_adapter_create(&a, m, &c, &err), TB_ENOMEM);
        fail_device_alloc(m->be, 0);
    }
    a = random_adapter(m, 4, 1, 0.1f);
    struct tb_op *op = batch_op(&shapes[0], 1, true, false);
    run_train(m, a, op);
    struct tb_adapter_version *v;
    CHECK_OK(tb_adapter_publish(a, &v, &check_err));
    float *p = params_of(a);
    for (long n = 1; n <= 3; n++) { /* two moments, the version that may be written */
        struct tb_op *z = op_adam(0.01);
        fail_device_alloc(m->be, 1);
        tb_adapter_optim_step(a, z);
        fail_device_alloc(m->be, 0);
        assert_int_equal(z->error.code, TB_ENOMEM);
        assert_int_equal(tb_adapter_step(a), 0);
        assert_true(a->has_grad);
        float *q = params_of(a);
        assert_memory_equal(p, q, tb_adapter_flat_bytes(a));
        tb_free(q);
        tb_op_destroy(z);
        if (n == 1) /* let the moments come */
            a->mom = m->be->ops->alloc(m->be, tb_adapter_flat_bytes(a)),
            m->be->ops->zero(m->be, a->mom, tb_adapter_flat_bytes(a));
        if (n == 2)
            a->var = m->be->ops->alloc(m->be, tb_adapter_flat_bytes(a)),
            m->be->ops->zero(m->be, a->var, tb_adapter_flat_bytes(a));
    }
    struct tb_op *z = op_adam(0.01);
    tb_adapter_optim_step(a, z);
    assert_int_equal(z->error.code, 0);
    tb_op_destroy(z);
    tb_free(p);
    tb_op_destroy(op);
    tb_version_unref(v);
    tb_adapter_free(a);
}

/* Every allocation in turn fails: the op fails, or its gradient is right. */
static void test_out_of_memory(void **state)
{
    (void)state;
    struct tb_model *m = open_model(backend_f32(), &shapes[0], NULL);
    struct tb_adapter *ref = random_adapter(m, 4, 1, 0.1f);
    struct tb_op *want = batch_op(&shapes[0], 1, true, true);
    run_train(m, ref, want);
    int failed = 0;
    for (long n = 1; n < 60; n++) {
        struct tb_adapter *a = random_adapter(m, 4, 1, 0.1f);
        struct tb_op *op = batch_op(&shapes[0], 1, true, true);
        if (n < 50)
            tb_mem_fail_after(n);
        else
            fail_device_alloc(m->be, n - 49);
        tb_block_free(m->be, &m->train_ws);
        run_ops(m, &a, &op, 1);
        if (n < 50)
            tb_mem_fail_after(0);
        else
            fail_device_alloc(m->be, 0);
        if (op->error.code) {
            assert_int_equal(op->error.code, TB_ENOMEM);
            assert_int_equal(op->result.n_outputs, 0);
            assert_false(a->has_grad);
            failed++;
        } else {
            same_outputs(want, op);
            same_grads(ref, a);
        }
        tb_op_destroy(op);
        tb_adapter_free(a);
    }
    assert_true(failed > 10 && failed < 59);
    device_memory_runs_out(m);
    tb_op_destroy(want);
    tb_adapter_free(ref);
    tb_model_free(m);
}

struct bad_case {
    const char *what; /* which change is made */
    int code;
    const char *text;
};

static void set_f32(struct tb_op *op, int datum, int input, int pos, float v)
{
    ((float *)(uintptr_t)op->u.forward_backward.data[datum].inputs[input].data.f32)[pos] = v;
}

static struct tb_op *broken(const char *what)
{
    bool ratio = strncmp(what, "r:", 2) == 0;
    struct tb_op *op = batch_op(&shapes[0], 1, true, ratio);
    struct tb_forward_backward *fb = &op->u.forward_backward;
    struct tb_config_value *c = tb_arena_calloc(&op->arena, 2, sizeof(*c));
    fb->config = c;
    if (ratio) {
        fb->loss_fn = "ppo";
        what += 2;
    }
    if (!strcmp(what, "unknown loss")) fb->loss_fn = "mse";
    if (!strcmp(what, "custom")) fb->loss_fn = "custom";
    if (!strcmp(what, "stable")) fb->loss_fn = "stable_reinforce";
    if (!strcmp(what, "no data")) fb->n_data = 0;
    if (!strcmp(what, "empty")) fb->data[1].n_tokens = 0;
    if (!strcmp(what, "long")) fb->data[1].n_tokens = 201;
    if (!strcmp(what, "token")) ((int32_t *)(uintptr_t)fb->data[2].tokens)[4] = 61;
    if (!strcmp(what, "token<0")) ((int32_t *)(uintptr_t)fb->data[2].tokens)[4] = -1;
    if (!strcmp(what, "target"))
        ((int64_t *)(uintptr_t)fb->data[0].inputs[0].data.i64)[69] = 1LL << 40;
    if (!strcmp(what, "no target")) fb->data[3].inputs[0].name = "targets";
    if (!strcmp(what, "target type")) fb->data[3].inputs[0].type = TB_TENSOR_F32;
    if (!strcmp(what, "target shape")) fb->data[3].inputs[0].n = 17;
    if (!strcmp(what, "weights shape")) fb->data[0].inputs[1].n = 69;
    if (!strcmp(what, "nan")) set_f32(op, 1, 1, 3, NAN);
    if (!strcmp(what, "inf q")) set_f32(op, 1, 1, 3, INFINITY);
    if (!strcmp(what, "no q")) fb->data[1].inputs[1].name = "q";
    if (!strcmp(what, "no A")) fb->data[2].inputs[2].name = "A";
    if (!strcmp(what, "gspo no mask")) {
        fb->loss_fn = "gspo";
        fb->data[2].inputs[3].name = "mask";
    }
    if (!strcmp(what, "gspo zero mask")) {
        fb->loss_fn = "gspo";
        for (int i = 0; i < 33; i++)
            set_f32(op, 2, 3, i, 0);
    }
    if (!strcmp(what, "2-d")) {
        fb->data[0].inputs[0].n_dims = 2;
        fb->data[0].inputs[0].shape[1] = 1;
    }
    if (!strcmp(what, "key"))
        c[fb->n_config++] = (struct tb_config_value){.key = "epsilon", .number = 1};
    if (!strcmp(what, "text"))
        c[fb->n_config++] =
            (struct tb_config_value){.key = "clip_low_threshold", .is_text = true, .text = "x"};
    if (!strcmp(what, "order"))
        c[fb->n_config++] = (struct tb_config_value){.key = "clip_low_threshold", .number = 1.5};
    if (!strcmp(what, "order at")) {
        fb->data[1].inputs[3].name = "clip_low_threshold";
        set_f32(op, 1, 3, 4, 1.25f);
    }
    return op;
}

static void test_validation(void **state)
{
    (void)state;
    static const struct bad_case cases[] = {
        {"unknown loss", TB_EINVAL,
         "loss_fn mse is unknown; there are cross_entropy, importance_sampling"},
        {"custom", TB_EINVAL, "loss_fn_config of custom must be loss_id"},
        {"stable", TB_EUNSUPPORTED, "loss_fn stable_reinforce is not supported"},
        {"no data", TB_EINVAL, "data is empty"},
        {"empty", TB_EINVAL, "datum 1: model_input is empty"},
        {"long", TB_EINVAL,
         "datum 1: model_input has 201 tokens; the model's context window is 200"},
        {"token", TB_EINVAL,
         "datum 2: model_input at position 4 is 61; token ids are from 0 to 60"},
        {"token<0", TB_EINVAL, "datum 2: model_input at position 4 is -1"},
        {"target", TB_EINVAL, "datum 0: target_tokens at position 69 is 1099511627776"},
        {"no target", TB_EINVAL, "datum 3: loss_fn_inputs has no target_tokens"},
        {"target type", TB_EINVAL, "datum 3: target_tokens must be int64"},
        {"target shape", TB_EINVAL, "datum 3: target_tokens has shape [17], expected [18]"},
        {"weights shape", TB_EINVAL, "datum 0: weights has shape [69], expected [70]"},
        {"nan", TB_ENONFINITE, "datum 1: weights is not finite at position 3"},
        {"r:inf q", TB_ENONFINITE, "datum 1: logprobs is not finite at position 3"},
        {"r:no q", TB_EINVAL, "datum 1: loss_fn_inputs has no logprobs, which ppo needs"},
        {"r:no A", TB_EINVAL, "datum 2: loss_fn_inputs has no advantages, which ppo needs"},
        {"r:gspo no mask", TB_EINVAL, "datum 2: loss_fn_inputs has no sequence_ratio_mask"},
        {"r:gspo zero mask", TB_EINVAL, "datum 2: sequence_ratio_mask is zero everywhere"},
        {"r:2-d", TB_EINVAL, "datum 0: target_tokens has two dimensions; ppo takes one"},
        {"key", TB_EINVAL, "loss_fn_config: epsilon is not a key of cross_entropy; allowed: none"},
        {"r:key", TB_EINVAL, "allowed: clip_low_threshold, clip_high_threshold"},
        {"r:text", TB_EINVAL, "clip_low_threshold must be a finite number"},
        {"r:order", TB_EINVAL, "clip_low_threshold 1.5 is above clip_high_threshold 1.2"},
        {"r:order at", TB_EINVAL, "datum 1: clip thresholds 1.25 and 1.2 at position 4"},
    };
    struct tb_model *m = open_model(backend_f32(), &shapes[0], NULL);
    struct tb_adapter *a = random_adapter(m, 4, 1, 0.1f);
    for (size_t i = 0; i < TB_ARRAY_LEN(cases); i++) {
        struct tb_op *op = broken(cases[i].what);
        run_ops(m, &a, &op, 1);
        if (op->error.code != cases[i].code || !strstr(op->error.msg, cases[i].text))
            fail_msg("%s: %d %s", cases[i].what, op->error.code, op->error.msg);
        assert_int_equal(op->result.n_outputs, 0);
        assert_false(a->has_grad);
        tb_op_destroy(op);
    }
    tb_adapter_free(a);
    tb_model_free(m);
}

static int teardown(void **state)
{
    (void)state;
    backends_fini();
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gradient_by_differences),
        cmocka_unit_test(test_packing),
        cmocka_unit_test(test_splitting),
        cmocka_unit_test(test_in_steps),
        cmocka_unit_test(test_bf16_near_f32),
        cmocka_unit_test(test_shares),
        cmocka_unit_test(test_share_fails_the_op),
        cmocka_unit_test(test_shards_near_one_sum),
        cmocka_unit_test(test_failed_op_leaves_no_trace),
        cmocka_unit_test(test_out_of_memory),
        cmocka_unit_test(test_validation),
    };
    return cmocka_run_group_tests_name("model training", tests, NULL, teardown);
}
