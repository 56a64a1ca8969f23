/*
 * create_model, unload_model, forward, forward_backward and optim_step: JSON (and the dispatch to
 * protobuf) into ops. Pure; runs in the pool for large bodies.
 */
#include <float.h>
#include <string.h>

#include "api/tinker/tinker.h"
#include "util/mem.h"

/* The family of an optimizer setting; absent is adamw. */
static int check_optimizer(const struct tb_json *root, const char *key, struct tb_arena *a,
                           const char **out, struct tb_error *err)
{
    struct tb_json o, t;
    int rc = tb_json_object(root, key, false, &o, err);
    if (rc || !o.v) return rc;
    const char *type = "adamw";
    rc = tb_json_string(&o, "type", false, a, 64, &type, err);
    if (rc) return rc;
    if (strcmp(type, "adamw") != 0) {
        tb_json_find(&o, "type", &t);
        return tb_json_fail(&t, err, TB_EUNSUPPORTED, "\"%s\" is not supported, only \"adamw\"",
                            type);
    }
    *out = "adamw";
    return 0;
}

/* ---- create_model, unload_model */

static int address_create(const struct tb_json *root, struct tb_op *op, struct tb_error *err)
{
    /* SDK 0.1.5 has no sessions: core makes one, and this is its first model. */
    int rc = tb_json_id(root, "session_id", false, &op->arena, &op->session_id, err);
    if (rc) return rc;
    if (!op->session_id) op->model_seq_id = 0;
    return tb_json_int(root, "model_seq_id", op->session_id != NULL, 0, INT64_MAX,
                       &op->model_seq_id, err);
}

static int rest_create(const struct tb_json *root, struct tb_op *op, struct tb_error *err)
{
    struct tb_create_model *c = &op->u.create_model;
    c->lora = (struct tb_lora_config){
        .rank = 32, .alpha = 32, .train_attn = true, .train_mlp = true, .train_unembed = true};
    c->optimizer = "adamw";
    struct tb_json l;
    int rc = tb_json_id(root, "base_model", true, &op->arena, &c->base_model, err);
    if (rc == 0) rc = tb_json_object(root, "lora_config", false, &l, err);
    if (rc) return rc;
    if (l.v) {
        int64_t rank = c->lora.rank, seed = 0;
        struct tb_json s;
        rc = tb_json_int(&l, "rank", false, 1, INT32_MAX, &rank, err);
        if (rc == 0) rc = tb_json_int(&l, "seed", false, INT64_MIN, INT64_MAX, &seed, err);
        if (rc == 0) rc = tb_json_bool(&l, "train_attn", false, &c->lora.train_attn, err);
        if (rc == 0) rc = tb_json_bool(&l, "train_mlp", false, &c->lora.train_mlp, err);
        if (rc == 0) rc = tb_json_bool(&l, "train_unembed", false, &c->lora.train_unembed, err);
        if (rc) return rc;
        c->lora.rank = (int32_t)rank;
        c->lora.has_seed = tb_json_find(&l, "seed", &s);
        c->lora.seed = (uint64_t)seed;
        if (!c->lora.train_attn && !c->lora.train_mlp && !c->lora.train_unembed)
            return tb_json_fail(
                &l, err, TB_EINVAL,
                "train_attn, train_mlp and train_unembed are all false; at least one "
                "must be true");
    }
    rc = check_optimizer(root, "optimizer_config", &op->arena, &c->optimizer, err);
    if (rc) return rc;
    return tb_json_metadata(root, "user_metadata", false, &op->arena, &c->user_metadata, err);
}

int tb_tinker_decode_create_model(const struct tb_body *b, struct tb_op **out, struct tb_error *err)
{
    return tb_json_op(b, TB_OP_CREATE_MODEL, "create_model", address_create, rest_create, out, err);
}

static int rest_nothing(const struct tb_json *root, struct tb_op *op, struct tb_error *err)
{
    (void)root;
    (void)op;
    (void)err;
    return 0;
}

int tb_tinker_decode_unload_model(const struct tb_body *b, struct tb_op **out, struct tb_error *err)
{
    return tb_json_op(b, TB_OP_UNLOAD_MODEL, "unload_model", tb_json_address_model, rest_nothing,
                      out, err);
}

/* ---- forward, forward_backward */

int tb_json_datum(const struct tb_json *d, struct tb_arena *a, struct tb_datum *out,
                  struct tb_error *err)
{
    struct tb_json input, tensors, t;
    int rc = tb_json_object(d, "model_input", true, &input, err);
    if (rc == 0) rc = tb_json_tokens(&input, a, &out->tokens, &out->n_tokens, err);
    if (rc == 0) rc = tb_json_object(d, "loss_fn_inputs", true, &tensors, err);
    if (rc) return rc;
    size_t n = tb_json_len(&tensors);
    if (n > TB_MAX_LOSS_INPUTS)
        return tb_json_fail(&tensors, err, TB_EINVAL, "%zu entries are more than the limit of %d",
                            n, TB_MAX_LOSS_INPUTS);
    out->inputs = tb_arena_calloc(a, n, sizeof(*out->inputs));
    void *it = NULL;
    while (tb_json_next(&tensors, &it, &t)) {
        struct tb_tensor *x = &out->inputs[out->n_inputs];
        if (strlen(t.key) > TB_MAX_NAME)
            return tb_json_fail(&t, err, TB_EINVAL, "the key is longer than %d bytes", TB_MAX_NAME);
        x->name = tb_arena_strdup(a, t.key);
        rc = tb_json_tensor(&t, a, 0, x, err);
        if (rc) return rc;
        out->n_inputs++;
    }
    return 0;
}

static int decode_config(const struct tb_json *input, struct tb_arena *a,
                         struct tb_forward_backward *fb, struct tb_error *err)
{
    struct tb_json c, v;
    int rc = tb_json_object(input, "loss_fn_config", false, &c, err);
    if (rc || !c.v) return rc;
    size_t n = tb_json_len(&c);
    if (n > TB_MAX_LOSS_INPUTS)
        return tb_json_fail(&c, err, TB_EINVAL, "%zu entries are more than the limit of %d", n,
                            TB_MAX_LOSS_INPUTS);
    fb->config = tb_arena_calloc(a, n, sizeof(*fb->config));
    void *it = NULL;
    while (tb_json_next(&c, &it, &v)) {
        struct tb_config_value *x = &fb->config[fb->n_config];
        x->key = tb_arena_strdup(a, v.key);
        x->is_text = tb_json_is_string(&v);
        rc = x->is_text ? tb_json_as_string(&v, a, 4096, &x->text, err)
                        : tb_json_as_double(&v, -DBL_MAX, DBL_MAX, &x->number, err);
        if (rc) return rc;
        fb->n_config++;
    }
    return 0;
}

static int rest_forward_backward(const struct tb_json *root, struct tb_op *op, struct tb_error *err)
{
    struct tb_forward_backward *fb = &op->u.forward_backward;
    fb->forward_only = op->type == TB_OP_FORWARD;
    struct tb_json input, data, d;
    int rc = tb_json_object(root, fb->forward_only ? "forward_input" : "forward_backward_input",
                            true, &input, err);
    if (rc == 0)
        rc = tb_json_string(&input, "loss_fn", true, &op->arena, TB_MAX_NAME, &fb->loss_fn, err);
    if (rc == 0) rc = decode_config(&input, &op->arena, fb, err);
    if (rc == 0) rc = tb_json_array(&input, "data", true, &data, err);
    if (rc) return rc;
    size_t n = tb_json_len(&data);
    if (n == 0 || n > TB_MAX_DATA)
        return tb_json_fail(&data, err, TB_EINVAL, "%zu datums are not in 1..%d", n, TB_MAX_DATA);
    fb->data = tb_arena_calloc(&op->arena, n, sizeof(*fb->data));
    fb->n_data = (int32_t)n;
    for (size_t i = 0; i < n; i++) {
        tb_json_at(&data, i, &d);
        rc = tb_json_datum(&d, &op->arena, &fb->data[i], err);
        if (rc) return rc;
    }
    return 0;
}

int tb_tinker_decode_forward(const struct tb_body *b, struct tb_op **out, struct tb_error *err)
{
    return tb_json_op(b, TB_OP_FORWARD, "forward", tb_json_address_model, rest_forward_backward,
                      out, err);
}

int tb_tinker_decode_forward_backward(const struct tb_body *b, struct tb_op **out,
                                      struct tb_error *err)
{
    if (b->proto) return tb_proto_forward_backward(b, out, err);
    return tb_json_op(b, TB_OP_FORWARD_BACKWARD, "forward_backward", tb_json_address_model,
                      rest_forward_backward, out, err);
}

/* ---- create_custom_loss: the engine checks the graph, and the future fails with what it says */

static int address_loss(const struct tb_json *root, struct tb_op *op, struct tb_error *err)
{
    int rc = tb_json_id(root, "session_id", true, &op->arena, &op->session_id, err);
    return rc ? rc
              : tb_json_int(root, "custom_loss_seq_id", true, 0, INT64_MAX,
                            &op->u.create_custom_loss.seq_id, err);
}

static int rest_loss(const struct tb_json *root, struct tb_op *op, struct tb_error *err)
{
    struct tb_create_custom_loss *l = &op->u.create_custom_loss;
    int rc = tb_json_string(root, "name", true, &op->arena, 1024, &l->name, err);
    if (rc == 0) rc = tb_json_as_text(root, &op->arena, TB_MAX_LOSS_TEXT, &l->text, err);
    if (rc == 0) l->n_text = strlen(l->text);
    return rc;
}

int tb_tinker_decode_create_custom_loss(const struct tb_body *b, struct tb_op **out,
                                        struct tb_error *err)
{
    return tb_json_op(b, TB_OP_CREATE_CUSTOM_LOSS, "create_custom_loss", address_loss, rest_loss,
                      out, err);
}

/* ---- optim_step */

static int decode_beta(const struct tb_json *p, const char *key, double *out, struct tb_error *err)
{
    struct tb_json n;
    int rc = tb_json_double(p, key, false, 0, 1, out, err);
    if (rc || *out < 1) return rc;
    tb_json_find(p, key, &n);
    return tb_json_fail(&n, err, TB_EINVAL, "1 is not less than 1");
}

static int rest_optim(const struct tb_json *root, struct tb_op *op, struct tb_error *err)
{
    struct tb_optim_step *s = &op->u.optim_step;
    *s = (struct tb_optim_step){
        .type = "adamw", .learning_rate = 1e-4, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-12};
    int rc = check_optimizer(root, "optimizer_params", &op->arena, &s->type, err);
    if (rc) return rc;
    struct tb_json other, p;
    bool named = tb_json_find(root, "optimizer_params", &other);
    rc = tb_json_object(root, named ? "optimizer_params" : "adam_params", true, &p, err);
    if (rc == 0)
        rc = tb_json_double(&p, "learning_rate", false, 0, DBL_MAX, &s->learning_rate, err);
    if (rc == 0) rc = decode_beta(&p, "beta1", &s->beta1, err);
    if (rc == 0) rc = decode_beta(&p, "beta2", &s->beta2, err);
    if (rc == 0) rc = tb_json_double(&p, "eps", false, 0, DBL_MAX, &s->eps, err);
    if (rc == 0) rc = tb_json_double(&p, "weight_decay", false, 0, DBL_MAX, &s->weight_decay, err);
    if (rc == 0)
        rc = tb_json_double(&p, "grad_clip_norm", false, 0, DBL_MAX, &s->grad_clip_norm, err);
    return rc;
}

int tb_tinker_decode_optim_step(const struct tb_body *b, struct tb_op **out, struct tb_error *err)
{
    return tb_json_op(b, TB_OP_OPTIM_STEP, "optim_step", tb_json_address_model, rest_optim, out,
                      err);
}
