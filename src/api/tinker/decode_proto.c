/*
 * ForwardBackwardRequest: protobuf into an op. The message is unpacked into the op's arena and its
 * packed arrays are used where they lie. Pure; runs in the pool for large bodies.
 */
#include <math.h>
#include <string.h>

#include "api/tinker/tinker.h"
#include "util/mem.h"
#include "wire/proto.h"
#include "wire/tinker_public.pb-c.h"

typedef TinkerPublic__ForwardBackwardRequest request_pb;
typedef TinkerPublic__Datum datum_pb;
typedef TinkerPublic__Tensor tensor_pb;

/* Memory for the messages around the arrays: what TB_MAX_DATA ordinary datums need, and more. */
enum { MESSAGE_BUDGET = 64 << 20 };

static int decode_tokens(const datum_pb *d, struct tb_arena *a, struct tb_datum *out,
                         struct tb_error *err)
{
    size_t total = 0;
    for (size_t i = 0; i < d->n_model_input; i++) {
        const TinkerPublic__Chunk *c = d->model_input[i];
        const char *other = NULL;
        switch (c->chunk_case) {
        case TINKER_PUBLIC__CHUNK__CHUNK_ENCODED_TEXT: break;
        case TINKER_PUBLIC__CHUNK__CHUNK_IMAGE: other = "image"; break;
        case TINKER_PUBLIC__CHUNK__CHUNK_DMEL: other = "dmel"; break;
        default: return tb_error_set(err, TB_EINVAL, "model_input[%zu]: empty chunk", i);
        }
        if (other)
            return tb_error_set(err, TB_EUNSUPPORTED,
                                "model_input[%zu]: %s chunks are not supported, only encoded_text",
                                i, other);
        size_t len = c->encoded_text->tokens.len;
        if (len % sizeof(int32_t))
            return tb_error_set(err, TB_EINVAL,
                                "model_input[%zu].tokens: %zu bytes are no array of int32", i, len);
        total += len / sizeof(int32_t);
    }
    if (total == 0) return tb_error_set(err, TB_EINVAL, "model_input: has no tokens");
    if (total > TB_MAX_DATUM_TOKENS)
        return tb_error_set(err, TB_EINVAL, "model_input: %zu tokens are more than the limit of %d",
                            total, TB_MAX_DATUM_TOKENS);
    out->n_tokens = (int32_t)total;
    if (d->n_model_input == 1) {
        out->tokens = (const int32_t *)(const void *)d->model_input[0]->encoded_text->tokens.data;
        return 0;
    }
    int32_t *t = tb_arena_try_array(a, total, sizeof(*t));
    if (!t) return tb_error_set(err, TB_ENOMEM, "no memory for %zu tokens", total);
    out->tokens = t;
    for (size_t i = 0; i < d->n_model_input; i++) {
        const ProtobufCBinaryData *b = &d->model_input[i]->encoded_text->tokens;
        if (b->len) memcpy(t, b->data, b->len);
        t += b->len / sizeof(*t);
    }
    return 0;
}

/* Bytes as int64 array. */
static int as_i64s(const ProtobufCBinaryData *b, const char *what, const int64_t **out, size_t *n,
                   struct tb_error *err)
{
    if (b->len % sizeof(int64_t))
        return tb_error_set(err, TB_EINVAL, "%s: %zu bytes are no array of int64", what, b->len);
    *out = (const int64_t *)(const void *)b->data;
    *n = b->len / sizeof(int64_t);
    return 0;
}

static int decode_tensor(const tensor_pb *t, struct tb_arena *a, struct tb_tensor *out,
                         struct tb_error *err)
{
    struct tb_raw_tensor raw = {.shape = t->shape, .n_shape = t->n_shape};
    size_t size;
    switch (t->dtype) {
    case TINKER_PUBLIC__DTYPE__DTYPE_FLOAT32:
        raw.type = TB_TENSOR_F32;
        size = sizeof(float);
        break;
    case TINKER_PUBLIC__DTYPE__DTYPE_INT64:
        raw.type = TB_TENSOR_I64;
        size = sizeof(int64_t);
        break;
    default:
        return tb_error_set(err, TB_EUNSUPPORTED,
                            "dtype %d is not supported (1 float32 and 2 int64 are)", (int)t->dtype);
    }
    const ProtobufCBinaryData *values = NULL;
    if (t->encoding_case == TINKER_PUBLIC__TENSOR__ENCODING_DENSE) {
        values = &t->dense;
    } else if (t->encoding_case == TINKER_PUBLIC__TENSOR__ENCODING_SPARSE_CSR) {
        raw.sparse = true;
        values = &t->sparse_csr->values;
        int rc = as_i64s(&t->sparse_csr->crow_indices, "crow_indices", &raw.crow, &raw.n_crow, err);
        if (rc == 0)
            rc = as_i64s(&t->sparse_csr->col_indices, "col_indices", &raw.col, &raw.n_col, err);
        if (rc) return rc;
    } else {
        return tb_error_set(err, TB_EINVAL, "neither dense nor sparse_csr is set");
    }
    if (values->len % size)
        return tb_error_set(err, TB_EINVAL, "%zu bytes are no array of %s", values->len,
                            raw.type == TB_TENSOR_F32 ? "float32" : "int64");
    raw.values = values->data;
    raw.n_values = values->len / size;
    return tb_tensor_finish(&raw, a, out, err);
}

static int decode_datum(const datum_pb *d, struct tb_arena *a, struct tb_datum *out,
                        struct tb_error *err)
{
    int rc = decode_tokens(d, a, out, err);
    if (rc) return rc;
    if (d->n_loss_fn_inputs > TB_MAX_LOSS_INPUTS)
        return tb_error_set(err, TB_EINVAL,
                            "loss_fn_inputs: %zu entries are more than the limit of %d",
                            d->n_loss_fn_inputs, TB_MAX_LOSS_INPUTS);
    out->n_inputs = (int32_t)d->n_loss_fn_inputs;
    out->inputs = tb_arena_calloc(a, d->n_loss_fn_inputs, sizeof(*out->inputs));
    for (size_t i = 0; i < d->n_loss_fn_inputs; i++) {
        const char *key = d->loss_fn_inputs[i]->key;
        if (strlen(key) > TB_MAX_NAME)
            return tb_error_set(err, TB_EINVAL, "loss_fn_inputs: key \"%.64s…\" is longer than %d",
                                key, TB_MAX_NAME);
        for (size_t k = 0; k < i; k++)
            if (strcmp(out->inputs[k].name, key) == 0)
                return tb_error_set(err, TB_EINVAL, "loss_fn_inputs: key \"%s\" comes twice", key);
        out->inputs[i].name = key;
        if (!d->loss_fn_inputs[i]->value)
            return tb_error_set(err, TB_EINVAL, "loss_fn_inputs.%s: has no value", key);
        rc = decode_tensor(d->loss_fn_inputs[i]->value, a, &out->inputs[i], err);
        if (rc) return tb_error_prefix(err, "loss_fn_inputs.%s", key);
    }
    return 0; /* the provenance spans serve only features that we refuse by name */
}

static int decode_config(const request_pb *r, struct tb_arena *a, struct tb_forward_backward *fb,
                         struct tb_error *err)
{
    bool v2 = r->n_loss_fn_config_v2 > 0;
    size_t n = v2 ? r->n_loss_fn_config_v2 : r->n_loss_fn_config;
    if (n > TB_MAX_LOSS_INPUTS)
        return tb_error_set(err, TB_EINVAL,
                            "loss_fn_config: %zu entries are more than the limit of %d", n,
                            TB_MAX_LOSS_INPUTS);
    fb->config = tb_arena_calloc(a, n, sizeof(*fb->config));
    fb->n_config = (int32_t)n;
    for (size_t i = 0; i < n; i++) {
        struct tb_config_value *c = &fb->config[i];
        if (v2) {
            const TinkerPublic__LossConfigValue *v = r->loss_fn_config_v2[i]->value;
            c->key = r->loss_fn_config_v2[i]->key;
            if (v && v->value_case == TINKER_PUBLIC__LOSS_CONFIG_VALUE__VALUE_NUMBER) {
                c->number = v->number;
            } else if (v && v->value_case == TINKER_PUBLIC__LOSS_CONFIG_VALUE__VALUE_TEXT) {
                c->is_text = true;
                c->text = v->text;
            } else {
                return tb_error_set(err, TB_EINVAL, "loss_fn_config.%.64s: has no value", c->key);
            }
        } else {
            c->key = r->loss_fn_config[i]->key;
            c->number = r->loss_fn_config[i]->value;
        }
        if (!c->is_text && !isfinite(c->number))
            return tb_error_set(err, TB_ENONFINITE, "loss_fn_config.%.64s: is not finite", c->key);
    }
    return 0;
}

static int decode_rest(const request_pb *r, struct tb_op *op, struct tb_error *err)
{
    struct tb_forward_backward *fb = &op->u.forward_backward;
    fb->loss_fn = r->loss_fn;
    fb->forward_only = r->forward_only;
    if (strlen(r->loss_fn) == 0 || strlen(r->loss_fn) > TB_MAX_NAME)
        return tb_error_set(err, TB_EINVAL, "loss_fn: \"%.64s\" is not the name of a loss",
                            r->loss_fn);
    if (r->n_data == 0 || r->n_data > TB_MAX_DATA)
        return tb_error_set(err, TB_EINVAL, "data: %zu datums are not in 1..%d", r->n_data,
                            TB_MAX_DATA);
    int rc = decode_config(r, &op->arena, fb, err);
    if (rc) return rc;
    fb->data = tb_arena_calloc(&op->arena, r->n_data, sizeof(*fb->data));
    fb->n_data = (int32_t)r->n_data;
    for (size_t i = 0; i < r->n_data; i++) {
        rc = decode_datum(r->data[i], &op->arena, &fb->data[i], err);
        if (rc) return tb_error_prefix(err, "data[%zu]", i);
    }
    return 0;
}

int tb_proto_forward_backward(const struct tb_body *b, struct tb_op **out, struct tb_error *err)
{
    struct tb_op *op = tb_op_create(TB_OP_FORWARD_BACKWARD);
    request_pb *r = NULL;
    size_t budget;
    if (!tb_mul_size(b->bytes.n, 4, &budget) || !tb_add_size(budget, MESSAGE_BUDGET, &budget))
        budget = SIZE_MAX;
    int rc = tb_proto_unpack(&tinker_public__forward_backward_request__descriptor, &op->arena,
                             b->bytes.p, b->bytes.n, budget, (ProtobufCMessage **)&r, err);
    if (rc) goto fail;
    if (r->model_id[0] == '\0' || strlen(r->model_id) > TB_MAX_ID) {
        rc = tb_error_set(err, TB_EINVAL, "model_id: \"%.64s\" is not a model id", r->model_id);
        goto fail;
    }
    if (r->seq_id < 1) {
        rc = tb_error_set(err, TB_EINVAL, "seq_id: %d is less than 1", r->seq_id);
        goto fail;
    }
    op->type = r->forward_only ? TB_OP_FORWARD : TB_OP_FORWARD_BACKWARD;
    op->model_id = r->model_id;
    op->seq_id = r->seq_id;
    if (b->idempotency_key) op->idempotency_key = tb_arena_strdup(&op->arena, b->idempotency_key);
    struct tb_error e = {0};
    if (decode_rest(r, op, &e)) op = tb_op_failed(op, &e);
    op->body_bytes = TB_MAX(b->bytes.n, op->arena.total);
    *out = op;
    return 0;

fail:
    tb_op_destroy(op);
    return rc;
}
