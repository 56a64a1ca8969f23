/*
 * Bodies of training jobs: conversations (rendered by the model's renderer and trained on every
 * token) and the Tinker API's Datums become forward and forward_backward ops, with the original's
 * RL forms (train.h). Thread: the pool.
 */
#include <string.h>

#include "api/datum.h"
#include "api/tinkerbell/train.h"

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
static int conversation(struct tb_bell_job *j, struct tb_bell_train *t, const struct tb_json *list,
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
static int policy_inputs(struct tb_bell_job *j, struct tb_bell_train *t, const struct tb_json *in,
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
static int reward_inputs(struct tb_bell_job *j, struct tb_bell_train *t, const struct tb_json *in,
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

static int loss_inputs(struct tb_bell_job *j, struct tb_bell_train *t, const struct tb_json *root,
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

static int make_op(struct tb_bell_job *j, const struct tb_bell_train *t, enum tb_op_type type,
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

int tb_bell_train_prepare(struct tb_bell_job *j, const struct tb_json *root, struct tb_error *err)
{
    struct tb_bell_train *t = j->own = tb_arena_calloc(&j->arena, 1, sizeof(*t));
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
