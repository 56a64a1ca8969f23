/* Results as JSON: what old SDKs and tinkex read, and the results that have no other form. Pure. */
#include <stdio.h>

#include "api/tinker/tinker.h"

/* An empty cell of a top-k row (the wire's sentinel). */
static bool is_empty(float logprob)
{
    return logprob <= -99999.0f;
}

/* [[id, logprob], …] of a row, null for a row without any */
static void put_topk_rows(struct tb_json_out *j, const char *key, const int32_t *ids,
                          const float *logprobs, int32_t n, int32_t k)
{
    tb_jout_array(j, key);
    for (int32_t i = 0; i < n; i++, ids += k, logprobs += k) {
        if (is_empty(logprobs[0])) {
            tb_jout_null(j, NULL);
            continue;
        }
        tb_jout_array(j, NULL);
        for (int32_t c = 0; c < k && !is_empty(logprobs[c]); c++) {
            tb_jout_array(j, NULL);
            tb_jout_int(j, NULL, ids[c]);
            tb_jout_f32(j, NULL, logprobs[c]);
            tb_jout_array_end(j);
        }
        tb_jout_array_end(j);
    }
    tb_jout_array_end(j);
}

static void put_shape(struct tb_json_out *j, int64_t n, int64_t k)
{
    int64_t shape[2] = {n, k};
    tb_jout_i64s(j, "shape", shape, k ? 2 : 1);
    tb_jout_object_end(j);
}

static void put_f32_tensor(struct tb_json_out *j, const char *key, const float *v, int64_t n,
                           int64_t k)
{
    tb_jout_object(j, key);
    tb_jout_f32s(j, "data", v, (size_t)n * (size_t)(k ? k : 1));
    tb_jout_str(j, "dtype", "float32");
    put_shape(j, n, k);
}

static void put_metrics(struct tb_json_out *j, const struct tb_result *r)
{
    tb_jout_object(j, "metrics");
    for (int32_t i = 0; i < r->n_metrics; i++)
        tb_jout_double(j, r->metrics[i].key, r->metrics[i].value);
    tb_jout_object_end(j);
}

static void put_output(struct tb_json_out *j, const struct tb_result *r)
{
    tb_jout_str(j, "loss_fn_output_type", "ArrayRecord");
    tb_jout_array(j, "loss_fn_outputs");
    for (int32_t i = 0; i < r->n_outputs; i++) {
        tb_jout_object(j, NULL);
        put_f32_tensor(j, "logprobs", r->outputs[i].logprobs, r->outputs[i].n, r->outputs[i].k);
        tb_jout_object_end(j);
    }
    tb_jout_array_end(j);
    put_metrics(j, r);
}

static void put_sample(struct tb_json_out *j, const struct tb_op *op)
{
    const struct tb_result *r = &op->result;
    const struct tb_sample *q = &op->u.sample;
    tb_jout_array(j, "sequences");
    for (int32_t i = 0; i < r->n_sequences; i++) {
        const struct tb_sequence *s = &r->sequences[i];
        tb_jout_object(j, NULL);
        tb_jout_str(j, "stop_reason", s->stopped ? "stop" : "length");
        tb_jout_i32s(j, "tokens", s->tokens, (size_t)s->n);
        if (s->logprobs) tb_jout_f32s(j, "logprobs", s->logprobs, (size_t)s->n);
        if (q->topk_sample_logprobs > 0 && s->topk_ids && s->topk_logprobs)
            put_topk_rows(j, "topk_logprobs", s->topk_ids, s->topk_logprobs, s->n,
                          q->topk_sample_logprobs);
        tb_jout_object_end(j);
    }
    tb_jout_array_end(j);
    if (r->prompt_logprobs)
        tb_jout_f32s(j, "prompt_logprobs", r->prompt_logprobs, (size_t)q->n_prompt);
    if (q->topk_prompt_logprobs > 0 && r->topk_prompt_ids && r->topk_prompt_logprobs)
        put_topk_rows(j, "topk_prompt_logprobs", r->topk_prompt_ids, r->topk_prompt_logprobs,
                      q->n_prompt, q->topk_prompt_logprobs);
    if (q->has_target_prompt_logprobs && r->target_prompt_logprobs)
        put_f32_tensor(j, "target_prompt_logprobs", r->target_prompt_logprobs, q->n_prompt - 1,
                       q->target_prompt_logprobs.shape[1]);
    if (q->prompt_alt_tokens_k > 0 && r->alt_tokens && r->alt_logprobs) {
        int64_t rows = q->n_prompt - 1, k = q->prompt_alt_tokens_k;
        tb_jout_object(j, "prompt_alt_tokens");
        tb_jout_object(j, "tokens");
        tb_jout_i32s(j, "data", r->alt_tokens, (size_t)(rows * k));
        tb_jout_str(j, "dtype", "int64");
        put_shape(j, rows, k);
        put_f32_tensor(j, "logprobs", r->alt_logprobs, rows, k);
        tb_jout_object_end(j);
    }
    tb_jout_int(j, "prompt_cache_hit_tokens", r->prompt_cache_hit_tokens);
}

/* What is not kept has no path, and SDKs up to 0.18 assert that it has none; tinkex refuses a
 * sampler save without one, although it samples by the session's id. So tinkex alone gets a path
 * that nobody can load. */
static void put_path(struct tb_json_out *j, const struct tb_op *op, bool tinkex)
{
    char path[3 * TB_MAX_ID];
    const struct tb_result *r = &op->result;
    if (r->path) {
        tb_jout_str(j, "path", r->path);
    } else if (tinkex && r->sampling_session_id && op->model_id) {
        snprintf(path, sizeof(path), "tinker://%s/sampler_weights/ephemeral-%lld", op->model_id,
                 (long long)op->u.save_weights.sampling_session_seq_id);
        tb_jout_str(j, "path", path);
    }
}

void tb_encode_result_json(const struct tb_op *op, bool tinkex, struct tb_json_out *j)
{
    const struct tb_result *r = &op->result;
    tb_jout_object(j, NULL);
    switch (op->type) {
    case TB_OP_FORWARD:
    case TB_OP_FORWARD_BACKWARD: put_output(j, r); break;
    case TB_OP_OPTIM_STEP: put_metrics(j, r); break;
    case TB_OP_SAMPLE: put_sample(j, op); break;
    case TB_OP_CREATE_MODEL:
    case TB_OP_UNLOAD_MODEL:
        tb_jout_str(j, "model_id", r->model_id ? r->model_id : op->model_id);
        break;
    case TB_OP_CREATE_CUSTOM_LOSS: tb_jout_str(j, "loss_id", r->loss_id); break;
    default: /* the saves and loads */
        put_path(j, op, tinkex);
        if (r->model_id) tb_jout_str(j, "model_id", r->model_id);
        if (r->sampling_session_id) tb_jout_str(j, "sampling_session_id", r->sampling_session_id);
        if (r->size_bytes >= 0) tb_jout_int(j, "size_bytes", r->size_bytes);
        break;
    }
    tb_jout_str(j, "type", tb_op_type_name(op->type));
    tb_jout_object_end(j);
}
