/*
 * The frame of JSON ops and the parts that several of them share. Pure; memory in the op's arena.
 */
#include <string.h>

#include "api/tinker/tinker.h"
#include "util/mem.h"

static const char *copy(struct tb_arena *a, const char *s)
{
    return s ? tb_arena_strdup(a, s) : NULL;
}

struct tb_op *tb_op_failed(struct tb_op *op, const struct tb_error *e)
{
    struct tb_op *f = tb_op_create(op->type);
    f->session_id = copy(&f->arena, op->session_id);
    f->model_seq_id = op->model_seq_id;
    f->model_id = copy(&f->arena, op->model_id);
    f->sampling_session_id = copy(&f->arena, op->sampling_session_id);
    f->seq_id = op->seq_id;
    f->idempotency_key = copy(&f->arena, op->idempotency_key);
    f->error = *e;
    switch (op->type) { /* what is read of an op that will never run */
    case TB_OP_SAMPLE: f->u.sample.n_samples = op->u.sample.n_samples; break;
    case TB_OP_SAVE_WEIGHTS_FOR_SAMPLER: f->u.save_weights.sampling_session_seq_id = -1; break;
    default: break;
    }
    tb_op_destroy(op);
    return f;
}

int tb_json_id(const struct tb_json *obj, const char *key, bool required, struct tb_arena *a,
               const char **out, struct tb_error *err)
{
    const char *s = NULL;
    int rc = tb_json_string(obj, key, required, a, TB_MAX_ID, &s, err);
    if (rc || !s) return rc;
    struct tb_json n;
    tb_json_find(obj, key, &n);
    if (!*s) return tb_json_fail(&n, err, TB_EINVAL, "is empty");
    for (const char *p = s; *p; p++)
        if ((unsigned char)*p < 0x20 || *p == 0x7f)
            return tb_json_fail(&n, err, TB_EINVAL, "holds a control character");
    *out = s;
    return 0;
}

int tb_json_address_model(const struct tb_json *root, struct tb_op *op, struct tb_error *err)
{
    int rc = tb_json_id(root, "model_id", true, &op->arena, &op->model_id, err);
    return rc ? rc : tb_json_int(root, "seq_id", false, 1, INT64_MAX, &op->seq_id, err);
}

int tb_tinker_check_type(const struct tb_json *root, const char *literal, struct tb_error *err)
{
    struct tb_json n;
    char shown[TB_JSON_SHOW];
    if (!literal || !tb_json_find(root, "type", &n)) return 0;
    tb_json_show(&n, shown);
    size_t len = strlen(literal);
    if (tb_json_is_string(&n) && shown[0] == '"' && strncmp(shown + 1, literal, len) == 0 &&
        strcmp(shown + 1 + len, "\"") == 0)
        return 0;
    return tb_json_fail(&n, err, TB_EINVAL, "%s is not \"%s\"", shown, literal);
}

int tb_json_op(const struct tb_body *b, enum tb_op_type type, const char *literal,
               tb_json_part address, tb_json_part rest, struct tb_op **out, struct tb_error *err)
{
    struct tb_json_doc doc;
    if (b->proto)
        return tb_error_set(err, TB_EPARSE, "a JSON body was expected, not application/x-protobuf");
    int rc = tb_json_parse(&doc, b->bytes.p, b->bytes.n, err);
    if (rc) return rc;
    struct tb_op *op = tb_op_create(type);
    if (!tb_json_is_object(&doc.root)) {
        rc = tb_error_set(err, TB_EPARSE, "body is not a JSON object");
        goto fail;
    }
    if (b->idempotency_key) op->idempotency_key = tb_arena_strdup(&op->arena, b->idempotency_key);
    rc = address(&doc.root, op, err);
    if (rc) goto fail;
    struct tb_error e = {0};
    rc = tb_tinker_check_type(&doc.root, literal, &e);
    if (rc == 0) rc = rest(&doc.root, op, &e);
    if (rc) {
        bool ordered = op->seq_id >= 0 && (op->model_id || op->sampling_session_id);
        if (!ordered) {
            if (err) *err = e;
            goto fail;
        }
        op = tb_op_failed(op, &e);
    }
    tb_json_free(&doc);
    op->body_bytes = TB_MAX(b->bytes.n, op->arena.total);
    *out = op;
    return 0;

fail:
    tb_op_destroy(op);
    tb_json_free(&doc);
    return rc;
}

static int chunk_tokens(const struct tb_json *c, struct tb_arena *a, int32_t **out, size_t *n,
                        struct tb_error *err)
{
    struct tb_json list, t;
    const char *type = NULL;
    int rc = tb_json_string(c, "type", false, a, 64, &type, err);
    if (rc) return rc;
    if (!type) { /* SDKs before 0.18 leave it out */
        if (tb_json_find(c, "data", &t))
            type = "image";
        else if (tb_json_find(c, "location", &t))
            type = "image_asset_pointer";
        else
            type = "encoded_text";
    }
    if (strcmp(type, "encoded_text") != 0)
        return tb_json_fail(c, err, TB_EUNSUPPORTED,
                            "\"%s\" chunks are not supported, only \"encoded_text\"", type);
    rc = tb_json_array(c, "tokens", true, &list, err);
    return rc ? rc : tb_json_as_i32s(&list, a, 0, INT32_MAX, out, n, err);
}

int tb_json_tokens(const struct tb_json *input, struct tb_arena *a, const int32_t **tokens,
                   int32_t *n, struct tb_error *err)
{
    struct tb_json chunks, c;
    int rc = tb_json_array(input, "chunks", true, &chunks, err);
    if (rc) return rc;
    size_t n_chunks = tb_json_len(&chunks), total = 0, len = 0;
    int32_t *one = NULL;
    struct part {
        int32_t *p;
        size_t n;
    } *parts = tb_arena_try_array(a, n_chunks, sizeof(*parts));
    if (!parts) return tb_json_fail(&chunks, err, TB_ENOMEM, "no memory for %zu chunks", n_chunks);
    for (size_t i = 0; i < n_chunks; i++) {
        tb_json_at(&chunks, i, &c);
        rc = chunk_tokens(&c, a, &one, &len, err);
        if (rc) return rc;
        parts[i] = (struct part){one, len};
        total += len;
    }
    if (total == 0) return tb_json_fail(input, err, TB_EINVAL, "has no tokens");
    if (total > TB_MAX_DATUM_TOKENS)
        return tb_json_fail(input, err, TB_EINVAL, "%zu tokens are more than the limit of %d",
                            total, TB_MAX_DATUM_TOKENS);
    *n = (int32_t)total;
    if (n_chunks == 1) {
        *tokens = parts[0].p;
        return 0;
    }
    int32_t *all = tb_arena_try_array(a, total, sizeof(*all));
    if (!all) return tb_json_fail(input, err, TB_ENOMEM, "no memory for %zu tokens", total);
    *tokens = all;
    for (size_t i = 0; i < n_chunks; i++) {
        memcpy(all, parts[i].p, parts[i].n * sizeof(*all));
        all += parts[i].n;
    }
    return 0;
}

int tb_json_metadata(const struct tb_json *obj, const char *key, bool strings_only,
                     struct tb_arena *a, const char **out, struct tb_error *err)
{
    struct tb_json n, v;
    int rc = tb_json_object(obj, key, false, &n, err);
    if (rc || !n.v) return rc;
    void *it = NULL;
    while (strings_only && tb_json_next(&n, &it, &v)) {
        char shown[TB_JSON_SHOW];
        tb_json_show(&v, shown);
        if (!tb_json_is_string(&v))
            return tb_json_fail(&v, err, TB_EINVAL, "%s is not a string", shown);
    }
    return tb_json_as_text(&n, a, TB_MAX_METADATA, out, err);
}
