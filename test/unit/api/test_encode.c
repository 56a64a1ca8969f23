/* Results: the golden bytes that the SDK was seen to decode, the other fields, and the JSON forms.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "api/tinker/tinker.h"
#include "util/mem.h"
#include "wire/proto.h"
#include "wire/tinker_public.pb-c.h"

static void assert_hex(const void *p, size_t n, const char *hex)
{
    char *got = tb_malloc(2 * n + 1);
    for (size_t i = 0; i < n; i++)
        snprintf(got + 2 * i, 3, "%02x", ((const uint8_t *)p)[i]);
    assert_string_equal(got, hex);
    tb_free(got);
}

static void assert_json_for(const struct tb_op *op, bool tinkex, const char *want)
{
    struct tb_buf b;
    struct tb_json_out j;
    tb_buf_init(&b, 1 << 20);
    tb_jout_init(&j, &b);
    tb_encode_result_json(op, tinkex, &j);
    assert_string_equal(b.p, want);
    tb_buf_fini(&b);
}

static void assert_json(const struct tb_op *op, const char *want)
{
    assert_json_for(op, false, want);
}

static struct tb_op *output_op(void)
{
    static float a[] = {-1, -2}, b[] = {-3};
    static struct tb_output o[] = {{2, 0, a}, {1, 0, b}};
    static struct tb_metric m[] = {{"loss:sum", 6}};
    struct tb_op *op = tb_op_create(TB_OP_FORWARD_BACKWARD);
    op->result.outputs = o;
    op->result.n_outputs = 2;
    op->result.metrics = m;
    op->result.n_metrics = 1;
    return op;
}

static void test_output_golden(void **state)
{
    (void)state;
    struct tb_op *op = output_op();
    struct tb_error e;
    void *p;
    size_t n;
    assert_int_equal(tb_encode_output_proto(op, &p, &n, &e), 0);
    assert_hex(
        p, n,
        "0a0b41727261795265636f7264123a12360a086c6f6770726f6273122a0a0c000080bf000000c0000040c0"
        "12180000000000000000080000000000"
        "00000c00000000000000180118021a130a086c6f73733a73756d110000000000001840");
    tb_free(p);
    assert_json(op, "{\"loss_fn_output_type\":\"ArrayRecord\",\"loss_fn_outputs\":["
                    "{\"logprobs\":{\"data\":[-1.0,-2.0],\"dtype\":\"float32\",\"shape\":[2]}},"
                    "{\"logprobs\":{\"data\":[-3.0],\"dtype\":\"float32\",\"shape\":[1]}}],"
                    "\"metrics\":{\"loss:sum\":6.0},\"type\":\"forward_backward\"}");
    tb_op_destroy(op);
}

static TinkerPublic__ForwardBackwardOutput *output_of(struct tb_arena *a, const struct tb_op *op)
{
    struct tb_error e;
    void *p;
    size_t n;
    ProtobufCMessage *m = NULL;
    assert_int_equal(tb_encode_output_proto(op, &p, &n, &e), 0);
    assert_int_equal(tb_proto_unpack(&tinker_public__forward_backward_output__descriptor, a, p, n,
                                     SIZE_MAX, &m, &e),
                     0);
    tb_free(p);
    return (TinkerPublic__ForwardBackwardOutput *)m;
}

/* Outputs of different K cannot share a record; none at all is no record. */
static void test_output_ragged(void **state)
{
    (void)state;
    float v[] = {-1, -2, -3, -4, -5, -6, -7};
    struct tb_output o[] = {{1, 2, v}, {2, 2, v}, {3, 0, v + 4}, {1, 3, v}, {0, 3, NULL}};
    struct tb_op *op = tb_op_create(TB_OP_FORWARD);
    struct tb_arena a;
    tb_arena_init(&a);
    op->result.outputs = o;
    op->result.n_outputs = 5;
    TinkerPublic__ForwardBackwardOutput *m = output_of(&a, op);
    assert_int_equal(m->n_loss_fn_outputs, 3);
    const TinkerPublic__ArrayRecord *r = m->loss_fn_outputs[0];
    assert_int_equal(r->num_datums, 2);
    assert_string_equal(r->fields[0]->key, "logprobs");
    assert_int_equal(r->fields[0]->value->data.len, 6 * sizeof(float));
    assert_memory_equal(r->fields[0]->value->data.data, v, 2 * sizeof(float));
    assert_memory_equal(r->fields[0]->value->data.data + 8, v, 4 * sizeof(float));
    assert_int_equal(r->fields[0]->value->n_trailing_shape, 1);
    assert_int_equal(r->fields[0]->value->trailing_shape[0], 2);
    assert_int_equal(m->loss_fn_outputs[1]->num_datums, 1);
    assert_int_equal(m->loss_fn_outputs[1]->fields[0]->value->n_trailing_shape, 0);
    r = m->loss_fn_outputs[2];
    assert_int_equal(r->num_datums, 2);
    assert_int_equal(r->fields[0]->value->offsets.len, 3 * sizeof(int64_t));
    op->result.n_outputs = 0;
    assert_int_equal(output_of(&a, op)->n_loss_fn_outputs, 0);
    tb_arena_fini(&a);
    tb_op_destroy(op);
}

static void test_sample_golden(void **state)
{
    (void)state;
    int32_t tokens[] = {7, 8};
    float logprobs[] = {-0.5f, -0.25f}, prompt[] = {NAN, -2};
    struct tb_sequence s = {.n = 2, .tokens = tokens, .logprobs = logprobs};
    struct tb_op *op = tb_op_create(TB_OP_SAMPLE);
    struct tb_error e;
    void *p;
    size_t n;
    op->u.sample.n_prompt = 2;
    op->result.sequences = &s;
    op->result.n_sequences = 1;
    op->result.prompt_logprobs = prompt;
    assert_int_equal(tb_encode_sample_proto(op, &p, &n, &e), 0);
    assert_hex(p, n, "0a160801120807000000080000001a08000000bf000080be12080000c07f000000c0");
    tb_free(p);
    assert_json(op, "{\"sequences\":[{\"stop_reason\":\"length\",\"tokens\":[7,8],"
                    "\"logprobs\":[-0.5,-0.25]}],\"prompt_logprobs\":[null,-2.0],"
                    "\"prompt_cache_hit_tokens\":0,\"type\":\"sample\"}");
    tb_op_destroy(op);
}

static void test_sample_scores(void **state)
{
    (void)state;
    int32_t tokens[] = {7}, ids[] = {7, 9}, pids[] = {0, 0, 4, 0}, alt[] = {5};
    float lp[] = {-0.5f}, tlp[] = {-0.5f, -1}, plp[] = {-99999, -99999, -2, -99999}, alp[] = {-3},
          target[] = {-4, 0, -5};
    struct tb_sequence s = {.stopped = true,
                            .n = 1,
                            .tokens = tokens,
                            .logprobs = lp,
                            .topk_ids = ids,
                            .topk_logprobs = tlp};
    struct tb_op *op = tb_op_create(TB_OP_SAMPLE);
    struct tb_sample *q = &op->u.sample;
    struct tb_result *r = &op->result;
    q->n_prompt = 2;
    q->topk_sample_logprobs = q->topk_prompt_logprobs = 2;
    q->prompt_alt_tokens_k = 1;
    q->has_target_prompt_logprobs = true;
    q->target_prompt_logprobs.shape[0] = 1;
    q->target_prompt_logprobs.shape[1] = 3;
    r->sequences = &s;
    r->n_sequences = 1;
    r->topk_prompt_ids = pids;
    r->topk_prompt_logprobs = plp;
    r->alt_tokens = alt;
    r->alt_logprobs = alp;
    r->target_prompt_logprobs = target;
    r->prompt_cache_hit_tokens = 3;
    struct tb_error e;
    struct tb_arena a;
    void *p;
    size_t n;
    ProtobufCMessage *m = NULL;
    tb_arena_init(&a);
    assert_int_equal(tb_encode_sample_proto(op, &p, &n, &e), 0);
    assert_int_equal(
        tb_proto_unpack(&tinker_public__sample_response__descriptor, &a, p, n, SIZE_MAX, &m, &e),
        0);
    tb_free(p);
    const TinkerPublic__SampleResponse *x = (const TinkerPublic__SampleResponse *)m;
    assert_int_equal(x->sequences[0]->stop_reason, 0);
    assert_int_equal(x->sequences[0]->topk_sampled_logprobs->length, 1);
    assert_int_equal(x->sequences[0]->topk_sampled_logprobs->k, 2);
    assert_memory_equal(x->sequences[0]->topk_sampled_logprobs->token_ids.data, ids, sizeof(ids));
    assert_int_equal(x->topk_prompt_logprobs->length, 2);
    assert_memory_equal(x->topk_prompt_logprobs->logprobs.data, plp, sizeof(plp));
    assert_int_equal(x->prompt_cache_hit_tokens, 3);
    assert_int_equal(x->target_prompt_logprobs->n_shape, 2);
    assert_int_equal(x->target_prompt_logprobs->shape[1], 3);
    assert_int_equal(x->target_prompt_logprobs->dtype, 1);
    assert_memory_equal(x->target_prompt_logprobs->dense.data, target, sizeof(target));
    assert_int_equal(x->prompt_alt_tokens->tokens->dtype, 3);
    assert_memory_equal(x->prompt_alt_tokens->tokens->dense.data, alt, sizeof(alt));
    assert_memory_equal(x->prompt_alt_tokens->logprobs->dense.data, alp, sizeof(alp));
    tb_arena_fini(&a);
    assert_json(
        op,
        "{\"sequences\":[{\"stop_reason\":\"stop\",\"tokens\":[7],\"logprobs\":[-0.5],"
        "\"topk_logprobs\":[[[7,-0.5],[9,-1.0]]]}],"
        "\"topk_prompt_logprobs\":[null,[[4,-2.0]]],"
        "\"target_prompt_logprobs\":{\"data\":[-4.0,0.0,-5.0],\"dtype\":\"float32\",\"shape\":[1,3]},"
        "\"prompt_alt_tokens\":{\"tokens\":{\"data\":[5],\"dtype\":\"int64\",\"shape\":[1,1]},"
        "\"logprobs\":{\"data\":[-3.0],\"dtype\":\"float32\",\"shape\":[1,1]}},"
        "\"prompt_cache_hit_tokens\":3,\"type\":\"sample\"}");
    tb_op_destroy(op);
}

/* Every JSON result has a type, and never a key that clients take for a state. */
static void test_other_results(void **state)
{
    (void)state;
    struct tb_op *op = tb_op_create(TB_OP_OPTIM_STEP);
    assert_json(op, "{\"metrics\":{},\"type\":\"optim_step\"}");
    op->type = TB_OP_CREATE_MODEL;
    op->model_id = "s:train:0";
    assert_json(op, "{\"model_id\":\"s:train:0\",\"type\":\"create_model\"}");
    op->type = TB_OP_UNLOAD_MODEL;
    assert_json(op, "{\"model_id\":\"s:train:0\",\"type\":\"unload_model\"}");
    op->type = TB_OP_CREATE_CUSTOM_LOSS;
    op->result.loss_id = "s:loss:0";
    assert_json(op, "{\"loss_id\":\"s:loss:0\",\"type\":\"create_custom_loss\"}");
    op->type = TB_OP_SAVE_WEIGHTS;
    op->result.path = "tinker://s:train:0/weights/a";
    assert_json(op, "{\"path\":\"tinker://s:train:0/weights/a\",\"type\":\"save_weights\"}");
    op->type = TB_OP_SAVE_WEIGHTS_EXTERNAL;
    op->result.size_bytes = 5;
    assert_json(op, "{\"path\":\"tinker://s:train:0/weights/a\",\"size_bytes\":5,"
                    "\"type\":\"save_weights_external\"}");
    op->type = TB_OP_SAVE_WEIGHTS_FOR_SAMPLER;
    op->result.size_bytes = -1;
    op->result.sampling_session_id = "s:sample:1";
    assert_json(op,
                "{\"path\":\"tinker://s:train:0/weights/a\",\"sampling_session_id\":\"s:sample:1\","
                "\"type\":\"save_weights_for_sampler\"}");
    op->result.path = NULL; /* ephemeral: only tinkex wants a path all the same */
    op->u.save_weights.sampling_session_seq_id = 1;
    assert_json(op,
                "{\"sampling_session_id\":\"s:sample:1\",\"type\":\"save_weights_for_sampler\"}");
    assert_json_for(
        op, true,
        "{\"path\":\"tinker://s:train:0/sampler_weights/ephemeral-1\","
        "\"sampling_session_id\":\"s:sample:1\",\"type\":\"save_weights_for_sampler\"}");
    op->type = TB_OP_LOAD_WEIGHTS;
    op->result = (struct tb_result){.size_bytes = -1, .path = "p", .model_id = "m"};
    assert_json(op, "{\"path\":\"p\",\"model_id\":\"m\",\"type\":\"load_weights\"}");
    tb_op_destroy(op);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_output_golden), cmocka_unit_test(test_output_ragged),
        cmocka_unit_test(test_sample_golden), cmocka_unit_test(test_sample_scores),
        cmocka_unit_test(test_other_results),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
