/* The model against PyTorch's numbers: every run of every fixture in float32, the losses in bf16
 * too. */
#include "helper.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "util/mem.h"

static const char *const models[] = {"qwen3", "qwen2", "llama"};
static const char *const runs[] = {
    "zero_cross_entropy", "cross_entropy",       "cross_entropy_signed",
    "cross_entropy_topk", "importance_sampling", "ppo_default",
    "ppo_tight",          "cispo_default",       "cispo_upper",
    "cispo_two_sided",    "dro_beta05",          "gspo_wide",
    "gspo_tight",
};

static double at(const json_t *v, size_t i, size_t k)
{
    const json_t *e = json_array_get(v, i / k);
    return json_number_value(json_is_array(e) ? json_array_get(e, i % k) : e);
}

/* Greatest |ours - theirs| over the tensors of a file, each relative to its own largest value. */
static double compare_flat(struct tb_adapter *a, const float *ours, const char *path,
                           const char *prefix)
{
    struct tb_adapter_state *s;
    double worst = 0;
    CHECK_OK(tb_adapter_export(a, false, &s, &check_err));
    for (int i = 0; i < s->n_tensors; i++) {
        const struct tb_state_tensor *t = &s->tensors[i];
        char name[256];
        size_t n;
        snprintf(name, sizeof(name), "%sbase_model.model.%s", prefix, t->name);
        float *want = load_tensor(path, name, &n);
        assert_int_equal(n, (size_t)t->rows * (size_t)t->cols);
        double big = 0, diff = 0;
        for (size_t j = 0; j < n; j++) {
            big = fmax(big, fabs((double)want[j]));
            diff = fmax(diff, fabs((double)want[j] - (double)ours[(size_t)t->offset + j]));
        }
        if (big > 0)
            worst = fmax(worst, diff / big);
        else
            assert_true(diff == 0);
        tb_free(want);
    }
    tb_adapter_state_destroy(s);
    return worst;
}

static void check_outputs(const struct tb_op *op, const json_t *run, double tol, double *worst)
{
    const json_t *outs = json_object_get(run, "outputs");
    assert_int_equal(op->result.n_outputs, (int)json_array_size(outs));
    for (int i = 0; i < op->result.n_outputs; i++) {
        const struct tb_output *o = &op->result.outputs[i];
        const json_t *want = json_object_get(json_array_get(outs, (size_t)i), "logprobs");
        size_t k = o->k ? (size_t)o->k : 1;
        assert_int_equal((size_t)o->n, json_array_size(want));
        for (size_t j = 0; j < (size_t)o->n * k; j++) {
            double d = fabs(at(want, j, k) - (double)o->logprobs[j]);
            if (d > *worst) *worst = d;
            assert_true(d <= tol);
        }
    }
}

/* Greatest errors allowed: of logprobs, of the loss beside 1 + itself, of a tensor's gradient
 * beside its largest value. */
struct tolerance {
    double logprobs, loss, gradient;
    bool no_clip; /* no gradients of ppo: a ratio near its bounds may fall on their other side */
};

static void check_losses(struct tb_backend *be, struct tolerance tol)
{
    for (size_t i = 0; i < TB_ARRAY_LEN(models); i++) {
        struct tb_model *m = load_oracle(be, models[i]);
        double worst_lp = 0, worst_loss = 0, worst_grad = 0;
        int n_grads = 0;
        for (size_t r = 0; r < TB_ARRAY_LEN(runs); r++) {
            json_t *run = oracle_json(oracle_path("%s/losses/%s.json", models[i], runs[r]));
            const char *an = json_string_value(json_object_get(run, "adapter"));
            struct tb_adapter *a =
                load_adapter(m, oracle_path("%s/%s/adapter_model.safetensors", models[i], an));
            struct tb_op *fwd = op_from_json(run, false, 0, -1),
                         *op = op_from_json(run, true, 0, -1);
            run_train(m, a, fwd);
            assert_false(a->has_grad);
            run_train(m, a, op);
            check_outputs(op, run, tol.logprobs, &worst_lp);
            for (int d = 0; d < op->result.n_outputs; d++) { /* forward gives the same bits */
                const struct tb_output *x = &op->result.outputs[d], *y = &fwd->result.outputs[d];
                assert_memory_equal(x->logprobs, y->logprobs,
                                    (size_t)x->n * (size_t)(x->k ? x->k : 1) * sizeof(float));
            }
            double want =
                json_number_value(json_object_get(json_object_get(run, "metrics"), "loss:sum"));
            double d = fabs(metric(op, "loss:sum") - want) / (1 + fabs(want));
            assert_true(d <= tol.loss);
            assert_true(metric(op, "loss:sum") == metric(fwd, "loss:sum"));
            worst_loss = fmax(worst_loss, d);
            const char *gp = oracle_path("%s/grads/%s.safetensors", models[i], runs[r]);
            bool compared = !tol.no_clip || strncmp(runs[r], "ppo", 3) != 0;
            if (compared && access(gp, F_OK) == 0) {
                float *g = grad_of(a);
                double e = compare_flat(a, g, gp, "");
                if (e > tol.gradient) fail_msg("%s %s: gradient off by %g", models[i], runs[r], e);
                worst_grad = fmax(worst_grad, e);
                n_grads++;
                tb_free(g);
            }
            tb_adapter_free(a);
            tb_op_destroy(fwd);
            tb_op_destroy(op);
            json_decref(run);
        }
        assert_true(n_grads >= 4);
        print_message("%s: logprobs %.2g, loss %.2g, gradients %.2g (%d runs)\n", models[i],
                      worst_lp, worst_loss, worst_grad, n_grads);
        tb_model_free(m);
    }
}

static void test_losses(void **state)
{
    (void)state;
    check_losses(backend_f32(), (struct tolerance){5e-5, 3e-5, 1e-4});
}

/* What rounding to eight bits does to these models; the reference is in float32. */
static void test_losses_bf16(void **state)
{
    (void)state;
    if (!backend_bf16()) skip();
    check_losses(backend_bf16(), (struct tolerance){0.1, 0.1, 0.08, .no_clip = true});
}

/* Parameters after AdamW: tight where the gradient is not noise, else within two steps. */
static void check_params(struct tb_adapter *a, const char *path, const float *g, double lr,
                         int steps)
{
    struct tb_adapter_state *s;
    CHECK_OK(tb_adapter_export(a, false, &s, &check_err));
    for (int i = 0; i < s->n_tensors; i++) {
        const struct tb_state_tensor *t = &s->tensors[i];
        char name[256];
        size_t n;
        snprintf(name, sizeof(name), "base_model.model.%s", t->name);
        float *want = load_tensor(path, name, &n);
        for (size_t j = 0; j < n; j++) {
            size_t k = (size_t)t->offset + j;
            double d = fabs((double)want[j] - (double)s->p[k]);
            double tol =
                fabs((double)g[k]) > 1e-6 * steps ? steps * (1e-6 + 1e-3 * lr) : 2 * lr * steps;
            if (d > tol)
                fail_msg("%s[%zu]: %g, want %g (gradient %g)", t->name, j, (double)s->p[k],
                         (double)want[j], (double)g[k]);
        }
        tb_free(want);
    }
    tb_adapter_state_destroy(s);
}

static struct tb_op *adam_from_json(const json_t *p)
{
    double v[6] = {0};
    const char *const keys[] = {"learning_rate", "beta1",        "beta2",
                                "eps",           "weight_decay", "grad_clip_norm"};
    for (int i = 0; i < 6; i++)
        v[i] = json_number_value(json_object_get(p, keys[i]));
    struct tb_op *op = op_adam(v[0]);
    op->u.optim_step = (struct tb_optim_step){"adamw", v[0], v[1], v[2], v[3], v[4], v[5]};
    return op;
}

static struct tb_op *pick(const json_t *run, const json_t *ids)
{
    int from = (int)json_integer_value(json_array_get(ids, 0));
    return op_from_json(run, true, from, from + (int)json_array_size(ids));
}

static void optim_case(const char *model, const char *label)
{
    if (access(oracle_path("%s/optim/%s.json", model, label), F_OK)) return;
    struct tb_model *m = load_oracle(backend_f32(), model);
    struct tb_adapter *a =
        load_adapter(m, oracle_path("%s/adapter_nz/adapter_model.safetensors", model));
    json_t *cfg = oracle_json(oracle_path("%s/optim/%s.json", model, label));
    json_t *ce = oracle_json(oracle_path("%s/losses/cross_entropy.json", model));
    json_t *is = oracle_json(oracle_path("%s/losses/importance_sampling.json", model));
    json_t *params = json_object_get(cfg, "adam_params"), *steps = json_object_get(cfg, "steps");
    double lr = json_number_value(json_object_get(params, "learning_rate"));
    for (size_t i = 0; i < json_array_size(steps); i++) {
        json_t *s = json_array_get(steps, i);
        struct tb_op *x = pick(ce, json_object_get(s, "ce_data"));
        struct tb_op *y = pick(is, json_object_get(s, "is_data"));
        struct tb_op *z = adam_from_json(params);
        run_train(m, a, x);
        run_train(m, a, y);
        float *g = grad_of(a);
        double clip = json_number_value(json_object_get(params, "grad_clip_norm"));
        /* After the first step the paths may part by noise-driven coordinates. */
        double tol = i == 0 ? 3e-5 : 2e-3;
        double l1 = json_number_value(json_object_get(s, "ce_loss_sum"));
        double l2 = json_number_value(json_object_get(s, "is_loss_sum"));
        assert_true(fabs(metric(x, "loss:sum") - l1) <= tol * (1 + fabs(l1)));
        assert_true(fabs(metric(y, "loss:sum") - l2) <= tol * (1 + fabs(l2)));
        tb_adapter_optim_step(a, z);
        assert_int_equal(z->error.code, 0);
        double norm = json_number_value(json_object_get(s, "grad_norm_before_clip"));
        assert_true(fabs(metric(z, "optim/grad_norm") - norm) <= (i ? 2e-3 : 1e-4) * norm);
        assert_int_equal(tb_adapter_step(a), (int64_t)i + 1);
        char path[1024];
        snprintf(path, sizeof(path), "%s",
                 oracle_path("%s/optim/%s_step%zu.safetensors", model, label, i + 1));
        for (int64_t k = 0; k < a->layout->n_floats && clip > 0; k++)
            g[k] *= (float)fmin(1, clip / norm);
        if (i == 0) {
            check_params(a, path, g, lr, 1);
        } else {
            struct tb_adapter_state *st;
            CHECK_OK(tb_adapter_export(a, true, &st, &check_err));
            print_message("%s %s: after step 2: m %.2g, v %.2g, p %.2g of the largest\n", model,
                          label, compare_flat(a, st->m, path, "exp_avg."),
                          compare_flat(a, st->v, path, "exp_avg_sq."),
                          compare_flat(a, st->p, path, ""));
            assert_true(compare_flat(a, st->m, path, "exp_avg.") < 5e-3);
            assert_true(compare_flat(a, st->v, path, "exp_avg_sq.") < 5e-3);
            tb_adapter_state_destroy(st);
        }
        tb_free(g);
        tb_op_destroy(x);
        tb_op_destroy(y);
        tb_op_destroy(z);
    }
    json_decref(cfg);
    json_decref(ce);
    json_decref(is);
    tb_adapter_free(a);
    tb_model_free(m);
}

static void test_optim(void **state)
{
    (void)state;
    for (size_t i = 0; i < TB_ARRAY_LEN(models); i++) {
        optim_case(models[i], "plain");
        optim_case(models[i], "wd_clip");
    }
}

static void test_adamw_scalar(void **state)
{
    (void)state;
    struct tb_backend *be = backend_f32();
    json_t *j = oracle_json(oracle_path("adamw_scalar.json"));
    float p[3], m[3] = {0}, v[3] = {0}, g[3];
    for (size_t i = 0; i < 3; i++)
        p[i] = (float)at(json_object_get(j, "init"), i, 1);
    json_t *steps = json_object_get(j, "steps"), *s;
    double b1 = 0.9, b2 = 0.95;
    size_t n;
    json_array_foreach(steps, n, s)
    {
        for (size_t i = 0; i < 3; i++)
            g[i] = (float)at(json_object_get(s, "grad"), i, 1);
        double t = (double)(n + 1);
        struct tb_adamw o = {0.01f,
                             (float)b1,
                             (float)b2,
                             1e-12f,
                             0.1f,
                             1,
                             (float)(1 - pow(b1, t)),
                             (float)(1 - pow(b2, t))};
        be->ops->adamw(be, &o, p, m, v, g, 3);
        CHECK_OK(be->ops->sync(be, &check_err));
        for (size_t i = 0; i < 3; i++)
            assert_true(fabs((double)p[i] - at(json_object_get(s, "param"), i, 1)) < 1e-6);
    }
    json_decref(j);
}

static void test_sft_curve(void **state)
{
    (void)state;
    struct tb_model *m = load_oracle(backend_f32(), "qwen3");
    struct tb_adapter *a =
        load_adapter(m, oracle_path("qwen3/adapter_zero/adapter_model.safetensors"));
    json_t *j = oracle_json(oracle_path("qwen3/sft_curve.json"));
    json_t *want = json_object_get(j, "loss_sum");
    double worst = 0;
    for (size_t i = 0; i < json_array_size(want); i++) {
        struct tb_op *op = op_from_json(j, true, 0, -1),
                     *z = adam_from_json(json_object_get(j, "adam_params"));
        run_train(m, a, op);
        double w = at(want, i, 1), d = fabs(metric(op, "loss:sum") - w) / w;
        double tol = 1e-3 + (2e-2 - 1e-3) * (double)i / 29;
        worst = fmax(worst, d);
        if (d > tol) fail_msg("step %zu: %g, want %g", i, metric(op, "loss:sum"), w);
        tb_adapter_optim_step(a, z);
        assert_int_equal(z->error.code, 0);
        tb_op_destroy(op);
        tb_op_destroy(z);
    }
    print_message("sft curve: worst relative difference %.2g\n", worst);
    json_decref(j);
    tb_adapter_free(a);
    tb_model_free(m);
}

static void int_list(const json_t *v, int32_t *out, size_t cap, int *n)
{
    *n = (int)json_array_size(v);
    assert_true((size_t)*n <= cap);
    for (int i = 0; i < *n; i++)
        out[i] = (int32_t)json_integer_value(json_array_get(v, (size_t)i));
}

static void check_greedy(const struct tb_op *op, const json_t *s, const json_t *want)
{
    const struct tb_sequence *q = &op->result.sequences[0];
    const json_t *toks = json_object_get(want, "tokens"), *lps = json_object_get(want, "logprobs");
    const json_t *margin = json_object_get(s, "top1_minus_top2");
    bool clear = true;
    for (size_t i = 0; i < json_array_size(toks) && clear; i++) {
        clear = json_number_value(json_array_get(margin, i)) >= 1e-3;
        if (!clear) break;
        assert_true((int)i < q->n);
        assert_int_equal(q->tokens[i], json_integer_value(json_array_get(toks, i)));
        assert_true(fabs((double)q->logprobs[i] - at(lps, i, 1)) < 5e-5);
    }
    if (!clear) return;
    assert_int_equal(q->n, (int)json_array_size(toks));
    const char *reason = json_string_value(json_object_get(want, "stop_reason"));
    assert_string_equal(q->stopped ? "stop" : "length", reason);
}

static void check_prompt(const struct tb_op *op, const json_t *s)
{
    const struct tb_result *r = &op->result;
    const json_t *lp = json_object_get(s, "prompt_logprobs"),
                 *tk = json_object_get(s, "topk_prompt_logprobs");
    assert_true(isnan(r->prompt_logprobs[0]));
    for (size_t j = 0; j < 4; j++) {
        assert_int_equal(r->topk_prompt_ids[j], 0);
        assert_true(r->topk_prompt_logprobs[j] == -99999.0f);
    }
    for (size_t i = 1; i < json_array_size(lp); i++) {
        assert_true(fabs((double)r->prompt_logprobs[i] - at(lp, i, 1)) < 5e-5);
        for (size_t j = 0; j < 4; j++) {
            const json_t *cell = json_array_get(json_array_get(tk, i), j);
            assert_int_equal(r->topk_prompt_ids[i * 4 + j],
                             json_integer_value(json_array_get(cell, 0)));
            assert_true(fabs((double)r->topk_prompt_logprobs[i * 4 + j] - at(cell, 1, 1)) < 5e-5);
        }
    }
}

static void test_samples(void **state)
{
    (void)state;
    for (size_t i = 0; i < TB_ARRAY_LEN(models); i++) {
        struct tb_model *m = load_oracle(backend_f32(), models[i]);
        struct tb_adapter *a =
            load_adapter(m, oracle_path("%s/adapter_nz/adapter_model.safetensors", models[i]));
        struct tb_adapter_version *v;
        CHECK_OK(tb_adapter_publish(a, &v, &check_err));
        json_t *j = oracle_json(oracle_path("%s/samples.json", models[i])), *s;
        size_t n;
        json_array_foreach(j, n, s)
        {
            int32_t prompt[256], stop[4];
            int n_prompt, n_stop;
            int_list(json_object_get(s, "prompt"), prompt, 256, &n_prompt);
            json_t *with_stop = json_object_get(s, "with_stop_token");
            int_list(json_object_get(with_stop, "stop"), stop, 4, &n_stop);
            bool base = !strcmp(json_string_value(json_object_get(s, "weights")), "base");
            struct tb_op *op[2] = {op_sample(prompt, n_prompt, 24, 1),
                                   op_sample(prompt, n_prompt, 24, 1)};
            struct tb_adapter_version *vs[2] = {base ? NULL : v, base ? NULL : v};
            op[0]->u.sample.temperature = op[1]->u.sample.temperature = 0;
            op[0]->u.sample.prompt_logprobs = true;
            op[0]->u.sample.topk_prompt_logprobs = 4;
            op[1]->u.sample.stop_tokens = stop;
            op[1]->u.sample.n_stop_tokens = n_stop;
            /* The oracle's samples run past EOS: take the model's away for this test. */
            int n_eos = m->info.n_eos;
            m->info.n_eos = 0;
            run_samples(m, vs, op, 2, 5);
            m->info.n_eos = n_eos;
            check_greedy(op[0], s, s);
            check_prompt(op[0], s);
            check_greedy(op[1], s, with_stop);
            tb_op_destroy(op[0]);
            tb_op_destroy(op[1]);
        }
        json_decref(j);
        tb_version_unref(v);
        tb_adapter_free(a);
        tb_model_free(m);
    }
}

/* All logits of the base model, by way of log-softmax at every token id. */
static void test_base_logits(void **state)
{
    (void)state;
    for (size_t i = 0; i < TB_ARRAY_LEN(models); i++) {
        char path[1024];
        snprintf(path, sizeof(path), "%s",
                 oracle_path("%s/base_activations.safetensors", models[i]));
        struct tb_model *m = load_oracle(backend_f32(), models[i]);
        struct tb_st *st;
        CHECK_OK(tb_st_open(&st, path, &check_err));
        const struct tb_st_tensor *ids = tb_st_find(st, "input_ids");
        const int64_t *id = ids->data;
        int P = (int)ids->shape[0], V = m->cfg.vocab;
        int32_t prompt[64];
        for (int j = 0; j < P; j++)
            prompt[j] = (int32_t)id[j];
        struct tb_op *op = op_sample(prompt, P, 1, 1);
        int64_t *t = tb_arena_calloc(&op->arena, (size_t)((P - 1) * V), sizeof(*t));
        for (int j = 0; j < (P - 1) * V; j++)
            t[j] = j % V;
        op->u.sample.has_target_prompt_logprobs = true;
        op->u.sample.target_prompt_logprobs = (struct tb_tensor){.name = "target_prompt_logprobs",
                                                                 .type = TB_TENSOR_I64,
                                                                 .n_dims = 2,
                                                                 .shape = {P - 1, V},
                                                                 .n = (int64_t)(P - 1) * V,
                                                                 .data.i64 = t};
        run_samples(m, NULL, &op, 1, 4);
        size_t n;
        float *z = load_tensor(path, "logits", &n);
        assert_int_equal(n, (size_t)P * (size_t)V);
        double worst = 0;
        for (int r = 0; r < P - 1; r++) {
            double sum = 0;
            for (int v = 0; v < V; v++)
                sum += exp((double)z[r * V + v]);
            for (int v = 0; v < V; v++)
                worst = fmax(worst, fabs((double)z[r * V + v] - log(sum) -
                                         (double)op->result.target_prompt_logprobs[r * V + v]));
        }
        print_message("%s: all logits within %.2g\n", models[i], worst);
        assert_true(worst < 5e-5);
        tb_free(z);
        tb_st_close(st);
        tb_op_destroy(op);
        tb_model_free(m);
    }
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
        cmocka_unit_test(test_base_logits),  cmocka_unit_test(test_losses),
        cmocka_unit_test(test_losses_bf16),  cmocka_unit_test(test_optim),
        cmocka_unit_test(test_adamw_scalar), cmocka_unit_test(test_sft_curve),
        cmocka_unit_test(test_samples),
    };
    return cmocka_run_group_tests_name("model oracle", tests, NULL, teardown);
}
