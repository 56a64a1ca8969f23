/*
 * Training jobs of the Tinkerbell face: their ops run one after the other, and the result is what
 * the original tells of one (train.h). Thread: the loop's; results are read in the pool.
 */
#include <math.h>
#include <string.h>

#include "api/tinkerbell/train.h"

/* ---- results, read in the pool */

static double metric(const struct tb_result *r, const char *key)
{
    for (int32_t i = 0; i < r->n_metrics; i++)
        if (strcmp(r->metrics[i].key, key) == 0) return r->metrics[i].value;
    return 0;
}

static const float *input(const struct tb_datum *d, const char *name, int32_t n)
{
    for (int32_t i = 0; i < d->n_inputs; i++) {
        const struct tb_tensor *x = &d->inputs[i];
        if (strcmp(x->name, name) == 0 && x->type == TB_TENSOR_F32 && x->n == n) return x->data.f32;
    }
    return NULL;
}

static void measure_sample(const struct tb_bell_train *t, int32_t i, const struct tb_output *out,
                           struct tb_bell_means *m)
{
    const struct tb_datum *d = &t->data[i];
    const float *weights = input(d, "weights", out->n);
    const float *q = input(d, "logprobs", out->n), *adv = input(d, "advantages", out->n);
    const bool *padding = t->padding ? t->padding[i] : NULL;
    struct tb_bell_means s = {.ratio_min = INFINITY};
    if (out->k > 0) return; /* several targets a position have no one logprob */
    for (int32_t k = 0; k < out->n; k++) {
        if (padding && padding[k]) continue;
        double weight = weights ? (double)weights[k] : 1, logprob = (double)out->logprobs[k];
        s.tokens++;
        s.weighted += weight > 0;
        s.nll -= weight * logprob;
        if (!q || !adv) continue;
        double ratio = exp(logprob - (double)q[k]);
        s.advantage += (double)adv[k];
        s.ratio += ratio;
        s.ratio_max = fmax(s.ratio_max, ratio);
        s.ratio_min = fmin(s.ratio_min, ratio);
        s.clipped += ratio < 0.8 || ratio > 1.2;
    }
    double nll = s.weighted > 0 ? s.nll / s.weighted : 0;
    m->tokens += s.tokens / t->n;
    m->weighted += s.weighted / t->n;
    m->nll += nll / t->n;
    m->perplexity += exp(nll) / t->n;
    m->has_ratios = q && adv;
    if (!m->has_ratios || s.tokens == 0) return;
    m->advantage += s.advantage / s.tokens / t->n;
    m->ratio += s.ratio / s.tokens / t->n;
    m->ratio_max += s.ratio_max / t->n;
    m->ratio_min += s.ratio_min / t->n;
    m->clipped += s.clipped / s.tokens / t->n;
}

static void put_metrics(struct tb_json_out *o, const struct tb_bell_train *t, double loss)
{
    const struct tb_bell_means *m = &t->means;
    tb_jout_object(o, "metrics");
    tb_jout_double(o, "loss:sum", loss);
    tb_jout_double(o, "num_tokens", m->tokens);
    if (strcmp(t->loss_fn, "cross_entropy") == 0 && !t->rewards) {
        tb_jout_double(o, "mean_nll", m->nll);
        tb_jout_double(o, "num_weighted_tokens", m->weighted);
        tb_jout_double(o, "perplexity", m->perplexity);
    }
    if (m->has_ratios) {
        bool is = strcmp(t->loss_fn, "importance_sampling") == 0;
        tb_jout_double(o, "mean_advantage", m->advantage);
        tb_jout_double(o, is ? "mean_importance_ratio" : "mean_ratio", m->ratio);
        tb_jout_double(o, is ? "max_importance_ratio" : "max_ratio", m->ratio_max);
        tb_jout_double(o, is ? "min_importance_ratio" : "min_ratio", m->ratio_min);
        if (!is) tb_jout_double(o, "clip_fraction", m->clipped);
    }
    if (t->kl_coeff > 0) {
        tb_jout_double(o, "kl_div", t->kl);
        tb_jout_double(o, "kl_penalty", t->kl_coeff * t->kl);
    }
    tb_jout_object_end(o);
}

/* Means over samples of sums over tokens, as in the original. With kl_coeff the loss that was
 * computed holds the weight of the divergence; it is told apart here. */
static void answer(struct tb_bell_job *j)
{
    const struct tb_bell_train *t = j->own;
    struct tb_json_out o = tb_bell_result(j);
    double base = t->loss_sum / t->n, penalty = t->kl_coeff * t->kl;
    tb_jout_double(&o, "loss", base + penalty);
    if (t->rewards) {
        tb_jout_double(&o, "base_loss", base);
        tb_jout_double(&o, "kl_penalty", penalty);
    }
    tb_jout_int(&o, "num_samples", t->n);
    tb_jout_str(&o, "model_id", j->model_id);
    tb_jout_str(&o, "backend", "tinkerbell");
    put_metrics(&o, t, base + penalty);
    tb_jout_object(&o, "loss_fn_outputs");
    tb_jout_str(&o, "loss_fn", t->loss_fn);
    if (t->rewards) {
        tb_jout_double(&o, "avg_loss", base);
        tb_jout_double(&o, "kl_div", t->kl);
        tb_jout_double(&o, "kl_coeff", t->kl_coeff);
    }
    tb_jout_object_end(&o);
    tb_jout_object_end(&o);
    tb_bell_done(j);
}

/* The divergence is the mean over samples of the sum of log p - log p_base, p_base from an adapter
 * that is never trained. Without it the loss is that of the rewards alone. */
static void read_reference(struct tb_bell_job *j)
{
    struct tb_bell_train *t = j->own;
    double kl = 0, moved = 0;
    for (int32_t i = 0; i < t->n; i++) {
        const struct tb_output *out = &t->done->result.outputs[i];
        for (int32_t k = 0; k < out->n; k++) {
            kl += (double)t->logprobs[i][k] - (double)out->logprobs[k];
            moved += (double)t->logprobs[i][k];
        }
    }
    t->kl = kl / t->n;
    t->loss_sum -= t->kl_coeff * moved; /* -(r - c) log p -> -r log p */
}

static void read_trained(struct tb_bell_job *j)
{
    struct tb_bell_train *t = j->own;
    const struct tb_result *r = &t->done->result;
    t->loss_sum = metric(r, "loss:sum");
    for (int32_t i = 0; i < t->n; i++)
        measure_sample(t, i, &r->outputs[i], &t->means);
    if (!(t->kl_coeff > 0)) return;
    t->logprobs = tb_bell_room(&j->arena, (size_t)t->n, sizeof(*t->logprobs), &j->err);
    for (int32_t i = 0; t->logprobs && i < t->n; i++) {
        size_t n = (size_t)r->outputs[i].n;
        t->logprobs[i] = tb_bell_room(&j->arena, n, sizeof(float), &j->err);
        if (!t->logprobs[i]) return;
        memcpy(t->logprobs[i], r->outputs[i].logprobs, n * sizeof(float));
    }
}

/* False when j has failed. */
static bool was_read(struct tb_bell_job *j)
{
    struct tb_bell_train *t = j->own;
    struct tb_error e = j->err;
    tb_core_release(t->done);
    if (e.code) tb_bell_fail(j, &e);
    return e.code == 0;
}

static void read_result(struct tb_bell_job *j, const struct tb_op *op,
                        void (*work)(struct tb_bell_job *j), void (*then)(struct tb_bell_job *j))
{
    struct tb_bell_train *t = j->own;
    t->done = op;
    tb_core_hold(op);
    tb_bell_work(j, work, then);
}

static void reference_was_read(struct tb_bell_job *j)
{
    if (was_read(j)) answer(j);
}

static void with_reference(struct tb_bell_job *j, const struct tb_op *op)
{
    read_result(j, op, read_reference, reference_was_read);
}

static void forward_reference(struct tb_bell_job *j)
{
    tb_bell_run(j, tb_bell_op(j, tb_bell_take(j)), with_reference);
}

static void trained_was_read(struct tb_bell_job *j)
{
    const struct tb_bell_train *t = j->own;
    if (!was_read(j)) return;
    if (!(t->kl_coeff > 0)) {
        answer(j);
        return;
    }
    j->lora.rank = 1;
    tb_bell_with_adapter(
        j,
        tb_arena_printf(&j->arena, "%s" TB_BELL_LORA "reference", tb_llm_model_info(t->base)->name),
        forward_reference);
}

static void trained(struct tb_bell_job *j, const struct tb_op *op)
{
    j->n_gradients = 0; /* its gradient stays, whatever becomes of the rest */
    read_result(j, op, read_trained, trained_was_read);
}

static void forward(struct tb_bell_job *j)
{
    tb_bell_run(j, tb_bell_op(j, tb_bell_take(j)), trained);
}

static void forward_backward(struct tb_bell_job *j)
{
    struct tb_bell_adapter *ad = j->adapter;
    j->epoch = ad->epoch;
    j->n_gradients = -1;
    ad->n_gradients++;
    tb_bell_run(j, tb_bell_op(j, tb_bell_take(j)), trained);
}

static void start_forward(struct tb_bell_job *j)
{
    tb_bell_with_adapter(j, j->model_id, forward);
}

static void start_forward_backward(struct tb_bell_job *j)
{
    const struct tb_bell_train *t = j->own;
    if (tb_map_get(&j->tenant->losses, t->loss_fn, strlen(t->loss_fn))) {
        struct tb_error e = {0};
        tb_error_set(&e, TB_EUNSUPPORTED,
                     "loss_fn: \"%s\" was uploaded as Python code, which is never executed here; "
                     "use the Tinker SDK's forward_backward_custom",
                     t->loss_fn);
        tb_bell_fail(j, &e);
        return;
    }
    tb_bell_with_adapter(j, j->model_id, forward_backward);
}

const struct tb_bell_kind tb_bell_forward = {"Forward", tb_bell_train_prepare, start_forward};
const struct tb_bell_kind tb_bell_forward_backward = {"Forward-backward", tb_bell_train_prepare,
                                                      start_forward_backward};
