/*
 * Results in protobuf: ForwardBackwardOutput and SampleResponse. The messages point at the result's
 * arrays; only what must lie together (a record's logprobs) is copied before packing. Pure.
 */
#include <string.h>

#include "api/tinker/tinker.h"
#include "util/mem.h"
#include "wire/proto.h"
#include "wire/tinker_public.pb-c.h"

#define DTYPE_F32 TINKER_PUBLIC__DTYPE__DTYPE_FLOAT32
#define DTYPE_I32 TINKER_PUBLIC__DTYPE__DTYPE_INT32

static ProtobufCBinaryData bytes(const void *p, size_t n)
{
    return (ProtobufCBinaryData){n, (uint8_t *)(uintptr_t)p};
}

static size_t elements(const struct tb_output *o)
{
    return (size_t)o->n * (size_t)(o->k ? o->k : 1);
}

/* ---- ForwardBackwardOutput */

struct record { /* outputs with the same number of targets per position */
    TinkerPublic__ArrayRecord pb;
    TinkerPublic__ArrayRecord__FieldsEntry field, *fields[1];
    TinkerPublic__BatchedTensor tensor;
    int64_t k;
};

static int fill_record(struct record *r, const struct tb_output *o, size_t n, struct tb_arena *a,
                       struct tb_error *err)
{
    int64_t *offsets = tb_arena_try_array(a, n + 1, sizeof(*offsets));
    if (!offsets) return tb_error_set(err, TB_ENOMEM, "no memory for %zu offsets", n);
    offsets[0] = 0;
    for (size_t i = 0; i < n; i++)
        offsets[i + 1] = offsets[i] + (int64_t)(elements(&o[i]) * sizeof(float));
    size_t total = (size_t)offsets[n];
    const char *data = (const char *)o[0].logprobs;
    if (n > 1) { /* one datum lies together already */
        char *p = tb_arena_try_alloc(a, total);
        if (!p) return tb_error_set(err, TB_ENOMEM, "no memory for outputs of %zu bytes", total);
        for (size_t i = 0; i < n; i++)
            if (elements(&o[i]))
                memcpy(p + offsets[i], o[i].logprobs, elements(&o[i]) * sizeof(float));
        data = p;
    }
    tinker_public__array_record__init(&r->pb);
    tinker_public__array_record__fields_entry__init(&r->field);
    tinker_public__batched_tensor__init(&r->tensor);
    r->k = o[0].k;
    r->tensor.data = bytes(data, total);
    r->tensor.offsets = bytes(offsets, (n + 1) * sizeof(*offsets));
    r->tensor.dtype = DTYPE_F32;
    r->tensor.trailing_shape = &r->k;
    r->tensor.n_trailing_shape = r->k ? 1 : 0;
    r->field.key = (char *)(uintptr_t) "logprobs";
    r->field.value = &r->tensor;
    r->fields[0] = &r->field;
    r->pb.fields = r->fields;
    r->pb.n_fields = 1;
    r->pb.num_datums = (int64_t)n;
    return 0;
}

int tb_encode_output_proto(const struct tb_op *op, void **out, size_t *out_n, struct tb_error *err)
{
    const struct tb_result *res = &op->result;
    struct tb_arena a;
    int rc = 0;
    tb_arena_init(&a);
    size_t n = (size_t)res->n_outputs, n_records = 0, n_metrics = (size_t)res->n_metrics;
    struct record *records = tb_arena_try_array(&a, n, sizeof(*records));
    TinkerPublic__ArrayRecord **list = tb_arena_try_array(&a, n, sizeof(*list));
    TinkerPublic__ForwardBackwardOutput__MetricsEntry *metrics =
        tb_arena_try_array(&a, n_metrics, sizeof(*metrics));
    TinkerPublic__ForwardBackwardOutput__MetricsEntry **metric_list =
        tb_arena_try_array(&a, n_metrics, sizeof(*metric_list));
    if (!records || !list || !metrics || !metric_list) {
        rc = tb_error_set(err, TB_ENOMEM, "no memory for %zu outputs", n);
        goto done;
    }
    for (size_t i = 0, run; i < n; i += run) {
        for (run = 1; i + run < n && res->outputs[i + run].k == res->outputs[i].k;)
            run++;
        rc = fill_record(&records[n_records], &res->outputs[i], run, &a, err);
        if (rc) goto done;
        list[n_records] = &records[n_records].pb;
        n_records++;
    }
    for (size_t i = 0; i < n_metrics; i++) {
        tinker_public__forward_backward_output__metrics_entry__init(&metrics[i]);
        metrics[i].key = (char *)(uintptr_t)res->metrics[i].key;
        metrics[i].value = res->metrics[i].value;
        metric_list[i] = &metrics[i];
    }
    TinkerPublic__ForwardBackwardOutput pb;
    tinker_public__forward_backward_output__init(&pb);
    pb.loss_fn_output_type = (char *)(uintptr_t) "ArrayRecord";
    pb.loss_fn_outputs = list;
    pb.n_loss_fn_outputs = n_records;
    pb.metrics = metric_list;
    pb.n_metrics = n_metrics;
    rc = tb_proto_pack(&pb.base, out, out_n, err);
done:
    tb_arena_fini(&a);
    return rc;
}

/* ---- SampleResponse */

static void fill_topk(TinkerPublic__TopkLogprobs *t, const int32_t *ids, const float *logprobs,
                      int32_t length, int32_t k)
{
    size_t n = (size_t)length * (size_t)k;
    tinker_public__topk_logprobs__init(t);
    t->token_ids = bytes(ids, n * sizeof(*ids));
    t->logprobs = bytes(logprobs, n * sizeof(*logprobs));
    t->k = (uint32_t)k;
    t->length = (uint32_t)length;
}

static void fill_tensor(TinkerPublic__Tensor *t, const void *data, TinkerPublic__DType dtype,
                        int64_t shape[2])
{
    tinker_public__tensor__init(t);
    t->encoding_case = TINKER_PUBLIC__TENSOR__ENCODING_DENSE;
    t->dense = bytes(data, (size_t)shape[0] * (size_t)shape[1] * 4);
    t->dtype = dtype;
    t->shape = shape;
    t->n_shape = 2;
}

/* The cells of a CSR request in its order, and its indices again. */
static int fill_sparse(TinkerPublic__Tensor *t, TinkerPublic__SparseCsr *csr,
                       const struct tb_op *op, struct tb_arena *a, int64_t shape[2],
                       struct tb_error *err)
{
    const struct tb_sample *q = &op->u.sample;
    size_t rows = (size_t)shape[0], cols = (size_t)shape[1], n = (size_t)q->target_crow[rows];
    float *v = tb_arena_try_array(a, n, sizeof(*v));
    if (!v) return tb_error_set(err, TB_ENOMEM, "no memory for %zu logprobs", n);
    for (size_t i = 0; i < rows; i++)
        for (int64_t k = q->target_crow[i]; k < q->target_crow[i + 1]; k++)
            v[k] = op->result.target_prompt_logprobs[i * cols + (size_t)q->target_col[k]];
    tinker_public__tensor__init(t);
    tinker_public__sparse_csr__init(csr);
    csr->values = bytes(v, n * sizeof(*v));
    csr->crow_indices = bytes(q->target_crow, (rows + 1) * sizeof(*q->target_crow));
    csr->col_indices = bytes(q->target_col, n * sizeof(*q->target_col));
    t->encoding_case = TINKER_PUBLIC__TENSOR__ENCODING_SPARSE_CSR;
    t->sparse_csr = csr;
    t->dtype = DTYPE_F32;
    t->shape = shape;
    t->n_shape = 2;
    return 0;
}

static void fill_sequence(TinkerPublic__SampledSequence *s, TinkerPublic__TopkLogprobs *topk,
                          const struct tb_sequence *q, int32_t k)
{
    tinker_public__sampled_sequence__init(s);
    s->stop_reason = q->stopped ? TINKER_PUBLIC__STOP_REASON__STOP_REASON_STOP
                                : TINKER_PUBLIC__STOP_REASON__STOP_REASON_LENGTH;
    s->tokens = bytes(q->tokens, (size_t)q->n * sizeof(*q->tokens));
    if (q->logprobs) {
        s->opt_logprobs_case = TINKER_PUBLIC__SAMPLED_SEQUENCE__OPT_LOGPROBS_LOGPROBS;
        s->logprobs = bytes(q->logprobs, (size_t)q->n * sizeof(*q->logprobs));
    }
    if (k > 0 && q->topk_ids && q->topk_logprobs) {
        fill_topk(topk, q->topk_ids, q->topk_logprobs, q->n, k);
        s->topk_sampled_logprobs = topk;
    }
}

int tb_encode_sample_proto(const struct tb_op *op, void **out, size_t *out_n, struct tb_error *err)
{
    const struct tb_result *res = &op->result;
    const struct tb_sample *q = &op->u.sample;
    struct tb_arena a;
    int rc;
    tb_arena_init(&a);
    size_t n = (size_t)res->n_sequences;
    TinkerPublic__SampledSequence *seqs = tb_arena_try_array(&a, n, sizeof(*seqs));
    TinkerPublic__SampledSequence **list = tb_arena_try_array(&a, n, sizeof(*list));
    TinkerPublic__TopkLogprobs *topk = tb_arena_try_array(&a, n + 1, sizeof(*topk));
    if (!seqs || !list || !topk) {
        rc = tb_error_set(err, TB_ENOMEM, "no memory for %zu sequences", n);
        goto done;
    }
    TinkerPublic__SampleResponse pb;
    tinker_public__sample_response__init(&pb);
    for (size_t i = 0; i < n; i++) {
        fill_sequence(&seqs[i], &topk[i], &res->sequences[i], q->topk_sample_logprobs);
        list[i] = &seqs[i];
    }
    pb.sequences = list;
    pb.n_sequences = n;
    if (res->prompt_logprobs) {
        pb.opt_prompt_logprobs_case =
            TINKER_PUBLIC__SAMPLE_RESPONSE__OPT_PROMPT_LOGPROBS_PROMPT_LOGPROBS;
        pb.prompt_logprobs =
            bytes(res->prompt_logprobs, (size_t)q->n_prompt * sizeof(*res->prompt_logprobs));
    }
    if (q->topk_prompt_logprobs > 0 && res->topk_prompt_ids && res->topk_prompt_logprobs) {
        fill_topk(&topk[n], res->topk_prompt_ids, res->topk_prompt_logprobs, q->n_prompt,
                  q->topk_prompt_logprobs);
        pb.topk_prompt_logprobs = &topk[n];
    }
    pb.prompt_cache_hit_tokens = res->prompt_cache_hit_tokens;
    TinkerPublic__Tensor target, alt_tokens, alt_logprobs;
    TinkerPublic__SparseCsr csr;
    int64_t target_shape[2] = {q->n_prompt - 1, q->target_prompt_logprobs.shape[1]};
    int64_t alt_shape[2] = {q->n_prompt - 1, q->prompt_alt_tokens_k};
    if (q->has_target_prompt_logprobs && res->target_prompt_logprobs) {
        if (q->target_crow) {
            rc = fill_sparse(&target, &csr, op, &a, target_shape, err);
            if (rc) goto done;
        } else {
            fill_tensor(&target, res->target_prompt_logprobs, DTYPE_F32, target_shape);
        }
        pb.target_prompt_logprobs = &target;
    }
    TinkerPublic__PromptAltTokens alt;
    if (q->prompt_alt_tokens_k > 0 && res->alt_tokens && res->alt_logprobs) {
        tinker_public__prompt_alt_tokens__init(&alt);
        fill_tensor(&alt_tokens, res->alt_tokens, DTYPE_I32, alt_shape);
        fill_tensor(&alt_logprobs, res->alt_logprobs, DTYPE_F32, alt_shape);
        alt.tokens = &alt_tokens;
        alt.logprobs = &alt_logprobs;
        pb.prompt_alt_tokens = &alt;
    }
    rc = tb_proto_pack(&pb.base, out, out_n, err);
done:
    tb_arena_fini(&a);
    return rc;
}

uint64_t tb_encode_size(const struct tb_op *op)
{
    const struct tb_result *r = &op->result;
    uint64_t n = 16, cell = sizeof(int32_t) + sizeof(float);
    for (int32_t i = 0; i < r->n_outputs; i++)
        n += (uint64_t)r->outputs[i].n * (uint64_t)TB_MAX(r->outputs[i].k, 1) * sizeof(float);
    if (op->type != TB_OP_SAMPLE) return n;
    const struct tb_sample *q = &op->u.sample;
    uint64_t prompt = (uint64_t)q->n_prompt;
    for (int32_t i = 0; i < r->n_sequences; i++) {
        uint64_t len = (uint64_t)r->sequences[i].n;
        n += 16 + len * cell;
        if (r->sequences[i].topk_ids) n += len * (uint64_t)q->topk_sample_logprobs * cell;
    }
    if (r->prompt_logprobs) n += prompt * sizeof(float);
    if (r->topk_prompt_ids) n += prompt * (uint64_t)q->topk_prompt_logprobs * cell;
    if (r->alt_tokens) n += prompt * (uint64_t)q->prompt_alt_tokens_k * cell;
    if (r->target_prompt_logprobs && q->target_prompt_logprobs.n_dims == 2)
        n += prompt * (uint64_t)q->target_prompt_logprobs.shape[1] * sizeof(float);
    return n;
}
