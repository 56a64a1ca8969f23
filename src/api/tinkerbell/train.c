/*
 * Training jobs of the Tinkerbell face: conversations (rendered by the model's renderer and trained
 * on every token) and the Tinker API's Datums become forward and forward_backward ops, with the
 * original's RL forms; optim_step (see tinkerbell.h). Thread: prepare runs in the pool.
 */
#include <math.h>
#include <string.h>

#include "api/datum.h"
#include "api/tinkerbell/tinkerbell.h"

struct means { /* over samples, of what each sample's tokens give */
    double tokens, weighted, nll, perplexity;
    bool has_ratios;
    double advantage, ratio, ratio_max, ratio_min, clipped;
};

struct train {
    const struct tb_llm_model *base;
    struct tb_datum *data;
    int32_t n;
    const char *loss_fn; /* as it was asked for */
    const char *op_loss; /* what computes it */
    double kl_coeff;
    bool **padding; /* of each sample, or NULL */
    bool rewards;
    double loss_sum, kl; /* results */
    struct means means;
    float **logprobs;         /* of the first pass, for the divergence */
    const struct tb_op *done; /* held while its result is read */
};

/* ---- data */

/* One value a token, zero; NULL, with err set, when memory is out. */
static struct tb_tensor *add_input(struct tb_bell_job *j, struct tb_datum *d, const char *name,
                                   enum tb_tensor_type type, struct tb_error *err)
{
    void *p = tb_bell_room(&j->arena, (size_t)d->n_tokens, type == TB_TENSOR_F32 ? 4 : 8, err);
    if (!p) return NULL;
    struct tb_tensor *t = &d->inputs[d->n_inputs++];
    *t = (struct tb_tensor){.name = name, .type = type, .n_dims = 1, .n = d->n_tokens};
    t->shape[0] = d->n_tokens;
    if (type == TB_TENSOR_F32)
        t->data.f32 = p;
    else
        t->data.i64 = p;
    return t;
}

static int add_weights(struct tb_bell_job *j, struct tb_datum *d, float value, struct tb_error *err)
{
    const struct tb_tensor *t = add_input(j, d, "weights", TB_TENSOR_F32, err);
    float *p = t ? (float *)(uintptr_t)t->data.f32 : NULL;
    for (int64_t i = 0; p && i < t->n; i++)
        p[i] = value;
    return p ? 0 : TB_ENOMEM;
}

/* All tokens but the last predict the next one, each with the same weight. */
static int conversation(struct tb_bell_job *j, struct train *t, const struct tb_json *list,
                        struct tb_datum *d, struct tb_error *err)
{
    struct tb_chat_message *messages;
    struct tb_ids ids;
    size_t n;
    const struct tb_served_model *m = tb_llm_model_info(t->base);
    int rc = tb_llm_messages(&j->arena, list, &messages, &n, err);
    if (rc || (rc = tb_llm_model_need_text(t->base, err))) return rc;
    tb_ids_init(&ids);
    rc = tb_chat_render(tb_llm_model_renderer(t->base), m->text, messages, n, false, &ids, err);
    if (rc == 0 && ids.n < 2) rc = tb_json_fail(list, err, TB_EINVAL, "has no text");
    if (rc == 0 && ids.n > TB_MAX_DATUM_TOKENS)
        rc = tb_json_fail(list, err, TB_EINVAL, "has more than %d tokens", TB_MAX_DATUM_TOKENS);
    int32_t *tokens = rc ? NULL : tb_bell_room(&j->arena, ids.n, sizeof(*tokens), err);
    if (tokens) {
        memcpy(tokens, ids.p, ids.n * sizeof(*tokens));
        d->tokens = tokens;
        d->n_tokens = (int32_t)ids.n - 1;
        d->inputs = tb_arena_calloc(&j->arena, 4, sizeof(*d->inputs));
    }
    tb_ids_fini(&ids);
    if (!tokens) return rc ? rc : TB_ENOMEM;
    const struct tb_tensor *target = add_input(j, d, "target_tokens", TB_TENSOR_I64, err);
    if (!target) return TB_ENOMEM;
    int64_t *to = (int64_t *)(uintptr_t)target->data.i64;
    for (int32_t i = 0; i < d->n_tokens; i++)
        to[i] = tokens[i + 1];
    return 0;
}

/* Values of one sample for each position, right-padded with zero. */
static int positions(struct tb_bell_job *j, const struct tb_json *lists, size_t i,
                     const struct tb_tensor *out, struct tb_error *err)
{
    struct tb_json one;
    float *v;
    size_t n;
    tb_json_at(lists, i, &one);
    if (!tb_json_is_array(&one))
        return tb_json_fail(&one, err, TB_EINVAL, "is not a list of numbers");
    int rc = tb_json_as_f32s(&one, &j->arena, &v, &n, err);
    if (rc) return rc;
    float *to = (float *)(uintptr_t)out->data.f32;
    memcpy(to, v, TB_MIN(n, (size_t)out->n) * sizeof(*to));
    return 0;
}

/* target_tokens[i] replaces what the conversation says; -100 is padding, whose advantage is 0. */
static int targets(struct tb_bell_job *j, const struct tb_json *lists, size_t i, struct tb_datum *d,
                   bool *padding, struct tb_error *err)
{
    struct tb_json one;
    int64_t *v;
    size_t n;
    tb_json_at(lists, i, &one);
    if (!tb_json_is_array(&one))
        return tb_json_fail(&one, err, TB_EINVAL, "is not a list of tokens");
    int rc = tb_json_as_i64s(&one, &j->arena, &v, &n, err);
    if (rc) return rc;
    int64_t *to = (int64_t *)(uintptr_t)d->inputs[0].data.i64;
    for (int32_t k = 0; k < d->n_tokens; k++) {
        padding[k] = (size_t)k >= n || v[k] == -100;
        if (!padding[k]) to[k] = v[k];
    }
    return 0;
}

/* importance_sampling and ppo with lists for each sample. */
static int policy_inputs(struct tb_bell_job *j, struct train *t, const struct tb_json *in,
                         struct tb_error *err)
{
    struct tb_json target, logprobs, advantages;
    t->padding = tb_bell_room(&j->arena, (size_t)t->n, sizeof(*t->padding), err);
    if (!t->padding) return TB_ENOMEM;
    int rc = tb_json_array(in, "target_tokens", true, &target, err);
    if (rc == 0) rc = tb_json_array(in, "logprobs", true, &logprobs, err);
    if (rc == 0) rc = tb_json_array(in, "advantages", true, &advantages, err);
    for (int32_t i = 0; rc == 0 && i < t->n; i++) {
        struct tb_datum *d = &t->data[i];
        bool *padding = tb_bell_room(&j->arena, (size_t)d->n_tokens, sizeof(*padding), err);
        const struct tb_tensor *q = add_input(j, d, "logprobs", TB_TENSOR_F32, err);
        const struct tb_tensor *adv = add_input(j, d, "advantages", TB_TENSOR_F32, err);
        if (!padding || !q || !adv) return TB_ENOMEM;
        t->padding[i] = padding;
        if ((rc = targets(j, &target, (size_t)i, d, padding, err)) ||
            (rc = positions(j, &logprobs, (size_t)i, q, err)) ||
            (rc = positions(j, &advantages, (size_t)i, adv, err)))
            break;
        float *to = (float *)(uintptr_t)adv->data.f32;
        for (int32_t k = 0; k < d->n_tokens; k++)
            if (padding[k]) to[k] = 0;
    }
    t->op_loss = t->loss_fn;
    return rc;
}

/* rewards: -reward * log-probability of each token, plus kl_coeff times the divergence from the
 * base model, whose gradient is that of the log-probability: both are weights of cross_entropy. */
static int reward_inputs(struct tb_bell_job *j, struct train *t, const struct tb_json *in,
                         struct tb_error *err)
{
    struct tb_json list;
    float *rewards;
    size_t n;
    int rc = tb_json_array(in, "rewards", true, &list, err);
    if (rc == 0) rc = tb_json_as_f32s(&list, &j->arena, &rewards, &n, err);
    if (rc == 0) rc = tb_json_double(in, "kl_coeff", false, 0, 1e6, &t->kl_coeff, err);
    if (rc) return rc;
    if (n == 0) return tb_json_fail(&list, err, TB_EINVAL, "is empty");
    for (int32_t i = 0; rc == 0 && i < t->n; i++) {
        float reward = rewards[n == (size_t)t->n ? (size_t)i : 0];
        rc = add_weights(j, &t->data[i], reward - (float)t->kl_coeff, err);
    }
    t->rewards = true;
    t->op_loss = "cross_entropy";
    return rc;
}

static int loss_inputs(struct tb_bell_job *j, struct train *t, const struct tb_json *root,
                       struct tb_error *err)
{
    struct tb_json in, v;
    int rc = tb_json_object(root, "loss_fn_inputs", false, &in, err);
    if (rc) return rc;
    if (in.v && tb_json_find(&in, "rewards", &v)) return reward_inputs(j, t, &in, err);
    if (strcmp(t->loss_fn, "cross_entropy") == 0) {
        for (int32_t i = 0; rc == 0 && i < t->n; i++)
            rc = add_weights(j, &t->data[i], 1, err);
        return rc;
    }
    if (strcmp(t->loss_fn, "importance_sampling") == 0 || strcmp(t->loss_fn, "ppo") == 0) {
        if (in.v) return policy_inputs(j, t, &in, err);
        return tb_error_set(err, TB_EINVAL, "loss_fn_inputs: required for %s, but absent",
                            t->loss_fn);
    }
    return 0; /* one of the Tinker API's, or unknown: the model says so */
}

/* ---- ops, made in the pool */

static int copy_datum(struct tb_arena *a, const struct tb_datum *from, struct tb_datum *to,
                      struct tb_error *err)
{
    size_t n = (size_t)from->n_tokens, n_inputs = (size_t)from->n_inputs;
    int32_t *tokens = tb_bell_room(a, n, sizeof(*tokens), err);
    struct tb_tensor *inputs = tb_bell_room(a, n_inputs, sizeof(*inputs), err);
    if (!tokens || !inputs) return TB_ENOMEM;
    if (n) memcpy(tokens, from->tokens, n * sizeof(*tokens));
    *to = *from;
    to->tokens = tokens;
    to->inputs = inputs;
    for (size_t i = 0; i < n_inputs; i++) {
        const struct tb_tensor *x = &from->inputs[i];
        size_t size = x->type == TB_TENSOR_F32 ? sizeof(float) : sizeof(int64_t);
        void *data = tb_bell_room(a, (size_t)x->n, size, err);
        if (!data) return TB_ENOMEM;
        if (x->n) memcpy(data, x->data.f32, (size_t)x->n * size);
        inputs[i] = *x;
        inputs[i].name = tb_arena_strdup(a, x->name);
        inputs[i].data.f32 = data;
    }
    return 0;
}

static int make_op(struct tb_bell_job *j, const struct train *t, enum tb_op_type type,
                   struct tb_error *err)
{
    struct tb_op *op = tb_bell_make(j, type);
    struct tb_forward_backward *fb = &op->u.forward_backward;
    struct tb_datum *data = tb_bell_room(&op->arena, (size_t)t->n, sizeof(*data), err);
    fb->forward_only = type == TB_OP_FORWARD;
    fb->loss_fn = tb_arena_strdup(&op->arena, t->op_loss);
    fb->n_data = t->n;
    fb->data = data;
    int rc = data ? 0 : TB_ENOMEM;
    for (int32_t i = 0; rc == 0 && i < t->n; i++)
        rc = copy_datum(&op->arena, &t->data[i], &data[i], err);
    return rc;
}

static int prepare_train(struct tb_bell_job *j, const struct tb_json *root, struct tb_error *err)
{
    struct train *t = j->own = tb_arena_calloc(&j->arena, 1, sizeof(*t));
    struct tb_json data, one;
    int rc = tb_bell_named(j, root, err);
    if (!j->model_id) j->model_id = "base";
    t->loss_fn = "cross_entropy";
    if (rc == 0) rc = tb_json_string(root, "loss_fn", false, &j->arena, 64, &t->loss_fn, err);
    if (rc == 0) rc = tb_bell_lora(j, root, err);
    if (rc == 0) rc = tb_json_array(root, "data", false, &data, err);
    if (rc) return rc;
    size_t n = data.v ? tb_json_len(&data) : 0;
    if (n == 0 || n > TB_MAX_DATA)
        return tb_error_set(err, TB_EINVAL, "data: %zu samples are not in 1..%d", n, TB_MAX_DATA);
    t->base = tb_bell_base(j->a, j->model_id);
    t->data = tb_bell_room(&j->arena, n, sizeof(*t->data), err);
    if (!t->data) return TB_ENOMEM;
    t->n = (int32_t)n;
    bool chats = false;
    for (size_t i = 0; rc == 0 && i < n; i++) {
        tb_json_at(&data, i, &one);
        bool chat = tb_json_is_array(&one);
        if (i > 0 && chat != chats)
            rc = tb_json_fail(&one, err, TB_EINVAL, "conversations and Datums cannot be mixed");
        chats = chat;
        if (rc == 0)
            rc = chat ? conversation(j, t, &one, &t->data[i], err)
                      : tb_json_datum(&one, &j->arena, &t->data[i], err);
    }
    t->op_loss = t->loss_fn;
    if (rc == 0 && chats) rc = loss_inputs(j, t, root, err);
    bool forward = j->kind == &tb_bell_forward;
    if (rc == 0) rc = make_op(j, t, forward ? TB_OP_FORWARD : TB_OP_FORWARD_BACKWARD, err);
    if (rc == 0 && t->kl_coeff > 0) rc = make_op(j, t, TB_OP_FORWARD, err);
    return rc;
}

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

static void measure_sample(const struct train *t, int32_t i, const struct tb_output *out,
                           struct means *m)
{
    const struct tb_datum *d = &t->data[i];
    const float *weights = input(d, "weights", out->n);
    const float *q = input(d, "logprobs", out->n), *adv = input(d, "advantages", out->n);
    const bool *padding = t->padding ? t->padding[i] : NULL;
    struct means s = {.ratio_min = INFINITY};
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

static void put_metrics(struct tb_json_out *o, const struct train *t, double loss)
{
    const struct means *m = &t->means;
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
    const struct train *t = j->own;
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
    struct train *t = j->own;
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
    struct train *t = j->own;
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
    struct train *t = j->own;
    struct tb_error e = j->err;
    tb_core_release(t->done);
    if (e.code) tb_bell_fail(j, &e);
    return e.code == 0;
}

static void read_result(struct tb_bell_job *j, const struct tb_op *op,
                        void (*work)(struct tb_bell_job *j), void (*then)(struct tb_bell_job *j))
{
    struct train *t = j->own;
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
    const struct train *t = j->own;
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
    const struct train *t = j->own;
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

const struct tb_bell_kind tb_bell_forward = {"Forward", prepare_train, start_forward};
const struct tb_bell_kind tb_bell_forward_backward = {"Forward-backward", prepare_train,
                                                      start_forward_backward};

/* ---- optim_step */

static int known_adam(const struct tb_json *params, struct tb_error *err)
{
    static const char *const known[] = {"learning_rate", "beta1", "beta2", "eps", "weight_decay"};
    struct tb_json one;
    for (void *it = NULL; tb_json_next(params, &it, &one);) {
        bool found = false;
        for (size_t i = 0; i < TB_ARRAY_LEN(known); i++)
            found |= strcmp(one.key, known[i]) == 0;
        if (!found) return tb_json_fail(&one, err, TB_EINVAL, "is not a parameter of AdamW here");
    }
    return 0;
}

static int prepare_optim(struct tb_bell_job *j, const struct tb_json *root, struct tb_error *err)
{
    struct tb_optim_step *s = j->own = tb_arena_calloc(&j->arena, 1, sizeof(*s));
    struct tb_json params;
    int rc = tb_bell_named(j, root, err);
    if (!j->model_id) j->model_id = "base";
    *s = (struct tb_optim_step){.type = "adamw",
                                .learning_rate = 5e-4,
                                .beta1 = 0.9,
                                .beta2 = 0.999,
                                .eps = 1e-8,
                                .weight_decay = 0.01};
    if (rc == 0) rc = tb_json_object(root, "adam_params", false, &params, err);
    if (rc || (params.v && (rc = known_adam(&params, err)))) return rc;
    const struct tb_json *from = params.v ? &params : root;
    if ((rc = tb_json_double(from, "learning_rate", false, 0, 1e6, &s->learning_rate, err)) ||
        (rc = tb_json_double(from, "beta1", false, 0, 1, &s->beta1, err)) ||
        (rc = tb_json_double(from, "beta2", false, 0, 1, &s->beta2, err)) ||
        (rc = tb_json_double(from, "eps", false, 0, 1e6, &s->eps, err)) ||
        (rc = tb_json_double(from, "weight_decay", false, 0, 1e6, &s->weight_decay, err)))
        return rc;
    return 0;
}

static void answer_step(struct tb_bell_job *j)
{
    const struct tb_optim_step *s = j->own;
    struct tb_json_out o = tb_bell_result(j);
    tb_jout_object(&o, "metrics");
    tb_jout_double(&o, "learning_rate", s->learning_rate);
    tb_jout_double(&o, "step_completed", 1);
    tb_jout_object_end(&o);
    tb_jout_str(&o, "model_id", j->model_id);
    tb_jout_str(&o, "backend", "tinkerbell");
    tb_jout_object_end(&o);
    tb_bell_done(j);
}

static void stepped(struct tb_bell_job *j, const struct tb_op *op)
{
    (void)op;
    answer_step(j);
}

/* Without gradients there is nothing to do: three forward_backwards may come before three steps. */
static void step(struct tb_bell_job *j)
{
    struct tb_bell_adapter *ad = j->adapter;
    if (ad->n_gradients == 0) {
        answer_step(j);
        return;
    }
    j->n_gradients = ad->n_gradients;
    tb_bell_adapter_no_gradients(ad);
    j->epoch = ad->epoch;
    struct tb_op *op = tb_bell_op(j, tb_op_create(TB_OP_OPTIM_STEP));
    op->u.optim_step = *(const struct tb_optim_step *)j->own;
    if (tb_bell_run(j, op, stepped)) tb_bell_adapter_changed(ad);
}

static void start_optim(struct tb_bell_job *j)
{
    tb_bell_with_adapter(j, j->model_id, step);
}

const struct tb_bell_kind tb_bell_optim_step = {"Optimizer step", prepare_optim, start_optim};
