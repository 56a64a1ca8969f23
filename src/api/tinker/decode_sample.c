/* asample: JSON into an op. Pure; memory in the op's arena. */
#include <string.h>

#include "api/tinker/tinker.h"
#include "util/mem.h"

static int address_sample(const struct tb_json *root, struct tb_op *op, struct tb_error *err)
{
    struct tb_arena *a = &op->arena;
    int rc = tb_json_id(root, "sampling_session_id", false, a, &op->sampling_session_id, err);
    if (rc) return rc;
    if (op->sampling_session_id)
        return tb_json_int(root, "seq_id", true, 0, INT64_MAX, &op->seq_id, err);
    /* Before 0.3: the weights themselves. */
    struct tb_sample *s = &op->u.sample;
    rc = tb_json_string(root, "model_path", false, a, 4096, &s->model_path, err);
    if (rc == 0) rc = tb_json_id(root, "base_model", false, a, &s->base_model, err);
    if (rc == 0 && !s->model_path && !s->base_model)
        rc = tb_error_set(err, TB_EINVAL,
                          "sampling_session_id, model_path or base_model: required, but absent");
    return rc;
}

/* "text", ["text", …], [id, …] or a mixture; an empty list switches EOS off too. */
static int decode_stop(const struct tb_json *p, struct tb_arena *a, struct tb_sample *s,
                       struct tb_error *err)
{
    struct tb_json stop, e;
    if (!tb_json_find(p, "stop", &stop)) return 0;
    s->stop_given = true;
    bool list = tb_json_is_array(&stop);
    if (!list && !tb_json_is_string(&stop)) {
        char shown[TB_JSON_SHOW];
        tb_json_show(&stop, shown);
        return tb_json_fail(&stop, err, TB_EINVAL, "%s is not a string or a list", shown);
    }
    size_t n = list ? tb_json_len(&stop) : 1, bytes = 0;
    if (n > TB_MAX_STOPS)
        return tb_json_fail(&stop, err, TB_EINVAL, "%zu entries are more than the limit of %d", n,
                            TB_MAX_STOPS);
    const char **strings = tb_arena_calloc(a, n, sizeof(*strings));
    int32_t *tokens = tb_arena_calloc(a, n, sizeof(*tokens));
    for (size_t i = 0; i < n; i++) {
        if (list)
            tb_json_at(&stop, i, &e);
        else
            e = stop;
        if (tb_json_is_int(&e)) {
            int64_t t;
            int rc = tb_json_as_int(&e, 0, INT32_MAX, &t, err);
            if (rc) return rc;
            tokens[s->n_stop_tokens++] = (int32_t)t;
            continue;
        }
        if (!tb_json_is_string(&e)) {
            char shown[TB_JSON_SHOW];
            tb_json_show(&e, shown);
            return tb_json_fail(&e, err, TB_EINVAL, "%s is not a string or a token id", shown);
        }
        const char *text = NULL;
        int rc = tb_json_as_string(&e, a, TB_MAX_STOP_BYTES, &text, err);
        if (rc) return rc;
        if (!*text) return tb_json_fail(&e, err, TB_EINVAL, "is empty");
        bytes += strlen(text);
        strings[s->n_stop_strings++] = text;
    }
    if (bytes > TB_MAX_STOP_BYTES)
        return tb_json_fail(&stop, err, TB_EINVAL, "%zu bytes are more than the limit of %d", bytes,
                            TB_MAX_STOP_BYTES);
    s->stop_strings = strings;
    s->stop_tokens = tokens;
    return 0;
}

static int decode_params(const struct tb_json *root, struct tb_arena *a, struct tb_sample *s,
                         struct tb_error *err)
{
    struct tb_json p, n;
    int64_t max_tokens = -1, top_k = -1, seed = 0;
    double temperature = 1, top_p = 1;
    int rc = tb_json_object(root, "sampling_params", false, &p, err);
    if (rc) return rc;
    if (p.v) {
        rc = tb_json_int(&p, "max_tokens", false, 1, INT32_MAX, &max_tokens, err);
        if (rc == 0) rc = tb_json_int(&p, "seed", false, INT64_MIN, INT64_MAX, &seed, err);
        if (rc == 0) rc = tb_json_double(&p, "temperature", false, 0, 1e6, &temperature, err);
        if (rc == 0) rc = tb_json_double(&p, "top_p", false, 0, 1, &top_p, err);
        if (rc == 0) rc = tb_json_int(&p, "top_k", false, -1, INT32_MAX, &top_k, err);
        if (rc == 0) rc = decode_stop(&p, a, s, err);
        if (rc) return rc;
        s->has_seed = tb_json_find(&p, "seed", &n);
    }
    if (!((float)top_p > 0)) {
        tb_json_find(&p, "top_p", &n);
        return tb_json_fail(&n, err, TB_EINVAL, "%.12g is not greater than 0", top_p);
    }
    if (top_k == 0) {
        tb_json_find(&p, "top_k", &n);
        return tb_json_fail(&n, err, TB_EINVAL, "0 is neither -1 (off) nor at least 1");
    }
    s->max_tokens = (int32_t)max_tokens;
    s->seed = (uint64_t)seed;
    s->temperature = (float)temperature;
    s->top_p = (float)top_p;
    s->top_k = (int32_t)top_k;
    return 0;
}

static int decode_count(const struct tb_json *root, const char *key, int32_t *out,
                        struct tb_error *err)
{
    int64_t n = 0;
    int rc = tb_json_int(root, key, false, 0, TB_MAX_TOPK_LOGPROBS, &n, err);
    *out = (int32_t)n;
    return rc;
}

static int decode_scoring(const struct tb_json *root, struct tb_op *op, struct tb_error *err)
{
    struct tb_sample *s = &op->u.sample;
    struct tb_json n;
    int64_t last = 0;
    bool record = false;
    int rc = tb_json_bool(root, "prompt_logprobs", false, &s->prompt_logprobs, err);
    if (rc == 0) rc = decode_count(root, "topk_prompt_logprobs", &s->topk_prompt_logprobs, err);
    if (rc == 0) rc = decode_count(root, "topk_sample_logprobs", &s->topk_sample_logprobs, err);
    if (rc == 0) rc = decode_count(root, "prompt_alt_tokens_k", &s->prompt_alt_tokens_k, err);
    if (rc == 0) rc = tb_json_bool(root, "record_stability_info", false, &record, err);
    if (rc == 0 && record) {
        tb_json_find(root, "record_stability_info", &n);
        rc = tb_json_fail(&n, err, TB_EUNSUPPORTED, "true is not supported");
    }
    if (rc) return rc;
    if (tb_json_find(root, "prompt_logprobs_last_n", &n)) {
        if (!s->prompt_logprobs)
            return tb_json_fail(&n, err, TB_EINVAL, "needs prompt_logprobs: true");
        if (s->n_prompt < 2)
            return tb_json_fail(&n, err, TB_EINVAL, "a prompt of one token has no logprobs");
        rc = tb_json_as_int(&n, 1, s->n_prompt - 1, &last, err);
        if (rc) return rc;
        s->prompt_logprobs_last_n = (int32_t)last;
    }
    rc = tb_json_object(root, "target_prompt_logprobs", false, &n, err);
    if (rc || !n.v) return rc;
    struct tb_tensor *t = &s->target_prompt_logprobs;
    rc = tb_json_tensor(&n, &op->arena, -1, t, err);
    if (rc) return rc;
    if (t->type != TB_TENSOR_I64) return tb_json_fail(&n, err, TB_EINVAL, "dtype is not int64");
    if (t->n_dims != 2 || t->shape[0] != s->n_prompt - 1 || t->shape[1] < 1)
        return tb_json_fail(&n, err, TB_EINVAL,
                            "shape is not [%d, K]: one row for each prompt token after the first",
                            s->n_prompt - 1);
    struct tb_json crow, col;
    if (tb_json_find(&n, "sparse_crow_indices", &crow) &&
        tb_json_find(&n, "sparse_col_indices", &col)) {
        int64_t *v = NULL;
        size_t len; /* checked with the tensor */
        rc = tb_json_as_i64s(&crow, &op->arena, &v, &len, err);
        s->target_crow = v;
        if (rc == 0) rc = tb_json_as_i64s(&col, &op->arena, &v, &len, err);
        s->target_col = v;
        if (rc) return rc;
    }
    t->name = "target_prompt_logprobs";
    s->has_target_prompt_logprobs = true;
    return 0;
}

static int rest_sample(const struct tb_json *root, struct tb_op *op, struct tb_error *err)
{
    struct tb_sample *s = &op->u.sample;
    int64_t n_samples = 1;
    struct tb_json prompt;
    int rc = tb_json_int(root, "num_samples", false, 1, TB_MAX_SAMPLES, &n_samples, err);
    s->n_samples = (int32_t)n_samples;
    if (rc == 0) rc = tb_json_object(root, "prompt", true, &prompt, err);
    if (rc == 0) rc = tb_json_tokens(&prompt, &op->arena, &s->prompt, &s->n_prompt, err);
    if (rc == 0) rc = decode_params(root, &op->arena, s, err);
    if (rc == 0) rc = decode_scoring(root, op, err);
    return rc;
}

int tb_tinker_decode_sample(const struct tb_body *b, struct tb_op **out, struct tb_error *err)
{
    return tb_json_op(b, TB_OP_SAMPLE, "sample", address_sample, rest_sample, out, err);
}
