/*
 * JSON bodies of ops: what SDKs of all ages send decodes, and bad bodies give an error of the exact
 * code that names field, value and limit: immediately without a place in an order, else in the op.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "api/tinker/tinker.h"
#include "util/mem.h"
#include "util/philox.h"

static struct tb_op *good(tb_decoder decode, const char *json)
{
    struct tb_body b = {tb_span_str(json), false, NULL};
    struct tb_op *op = NULL;
    struct tb_error e = {0};
    if (decode(&b, &op, &e)) fail_msg("%s: %s", json, e.msg);
    if (op->error.code) fail_msg("%s: failed with %s", json, op->error.msg);
    return op;
}

struct bad {
    tb_decoder decode;
    const char *json;
    bool immediate;
    int code;
    const char *msg;
};

static void assert_bad(const struct bad *c)
{
    struct tb_body b = {tb_span_str(c->json), false, NULL};
    struct tb_op *op = NULL;
    struct tb_error e = {0};
    int rc = c->decode(&b, &op, &e);
    if (c->immediate) {
        if (rc == 0) fail_msg("%s: was taken", c->json);
        if (rc != c->code || strcmp(e.msg, c->msg) != 0)
            fail_msg("%s:\n  %d \"%s\"\n  %d \"%s\"", c->json, rc, e.msg, c->code, c->msg);
        return;
    }
    if (rc) fail_msg("%s: refused at once: %s", c->json, e.msg);
    if (op->error.code != c->code || strcmp(op->error.msg, c->msg) != 0)
        fail_msg("%s:\n  %d \"%s\"\n  %d \"%s\"", c->json, op->error.code, op->error.msg, c->code,
                 c->msg);
    tb_op_destroy(op);
}

#define M       "\"model_id\":\"s:train:0\",\"seq_id\":4"
#define CREATE  tb_tinker_decode_create_model
#define FWD     tb_tinker_decode_forward
#define FB      tb_tinker_decode_forward_backward
#define OPTIM   tb_tinker_decode_optim_step
#define LOSS    tb_tinker_decode_create_custom_loss
#define SAVE    tb_tinker_decode_save_weights
#define SAMPLER tb_tinker_decode_save_sampler
#define EXT     tb_tinker_decode_save_external
#define LOAD    tb_tinker_decode_load_weights
#define UNLOAD  tb_tinker_decode_unload_model
#define SAMPLE  tb_tinker_decode_sample
#define S       "\"sampling_session_id\":\"s:sample:0\",\"seq_id\":7"
#define PROMPT  "\"prompt\":{\"chunks\":[{\"tokens\":[1,2,3]}]}"

static void test_create(void **state)
{
    (void)state;
    struct tb_op *op =
        good(CREATE, "{\"session_id\":\"sess-1\",\"model_seq_id\":0,\"base_model\":\"m\","
                     "\"user_metadata\":{\"k\":\"v\"},\"lora_config\":{\"rank\":8,"
                     "\"train_unembed\":true,\"train_mlp\":true,\"train_attn\":false,"
                     "\"seed\":-1},\"optimizer_config\":{\"type\":\"adamw\"},"
                     "\"type\":\"create_model\"}");
    assert_string_equal(op->session_id, "sess-1");
    assert_int_equal(op->model_seq_id, 0);
    assert_null(op->model_id);
    assert_int_equal(op->seq_id, -1);
    const struct tb_create_model *c = &op->u.create_model;
    assert_string_equal(c->base_model, "m");
    assert_int_equal(c->lora.rank, 8);
    assert_true(c->lora.alpha == 32);
    assert_true(c->lora.has_seed && c->lora.seed == UINT64_MAX);
    assert_true(c->lora.train_mlp && c->lora.train_unembed && !c->lora.train_attn);
    assert_string_equal(c->optimizer, "adamw");
    assert_string_equal(c->user_metadata, "{\"k\":\"v\"}");
    tb_op_destroy(op);
    /* 0.1.5: no session; nulls are absent */
    op = good(CREATE, "{\"base_model\":\"m\",\"lora_config\":{\"rank\":4,\"seed\":null},"
                      "\"user_metadata\":null,\"type\":\"create_model\"}");
    assert_null(op->session_id);
    assert_int_equal(op->model_seq_id, 0);
    assert_int_equal(op->u.create_model.lora.rank, 4);
    assert_false(op->u.create_model.lora.has_seed);
    assert_null(op->u.create_model.user_metadata);
    tb_op_destroy(op);
}

static void test_forward_backward(void **state)
{
    (void)state;
    struct tb_op *op = good(
        FB,
        "{\"forward_backward_input\":{\"data\":[{\"model_input\":{\"chunks\":[{\"tokens\":[1,2],"
        "\"type\":\"encoded_text\"},{\"tokens\":[3]}]},\"loss_fn_inputs\":{"
        "\"target_tokens\":{\"data\":[2,3,4],\"dtype\":\"int64\"},"
        "\"weights\":{\"data\":[1,-0.5,0],\"dtype\":\"float32\",\"shape\":[3]}}},"
        "{\"model_input\":{\"chunks\":[{\"tokens\":[9,8]}]},\"loss_fn_inputs\":{"
        "\"target_tokens\":{\"data\":[5,7],\"dtype\":\"int64\",\"shape\":[2,3],"
        "\"sparse_crow_indices\":[0,1,2],\"sparse_col_indices\":[0,2]}}}],"
        "\"loss_fn\":\"ppo\",\"loss_fn_config\":{\"clip_low_threshold\":0.8,\"x\":null,"
        "\"loss_id\":\"l\"}}," M "}");
    const struct tb_forward_backward *fb = &op->u.forward_backward;
    assert_int_equal(op->type, TB_OP_FORWARD_BACKWARD);
    assert_string_equal(op->model_id, "s:train:0");
    assert_int_equal(op->seq_id, 4);
    assert_int_equal(fb->n_data, 2);
    assert_int_equal(fb->data[0].n_tokens, 3);
    assert_int_equal(fb->data[0].tokens[2], 3);
    assert_int_equal(fb->data[0].n_inputs, 2);
    assert_true(fb->data[0].inputs[1].data.f32[1] == -0.5f);
    static const int64_t want[] = {5, 0, 0, 0, 0, 7};
    assert_memory_equal(fb->data[1].inputs[0].data.i64, want, sizeof(want));
    assert_int_equal(fb->n_config, 2);
    assert_true(fb->config[0].number == 0.8);
    assert_true(fb->config[1].is_text);
    assert_string_equal(fb->loss_fn, "ppo");
    assert_false(fb->forward_only);
    tb_op_destroy(op);
    op = good(FWD, "{\"forward_input\":{\"data\":[{\"model_input\":{\"chunks\":[{\"tokens\":[1]}]},"
                   "\"loss_fn_inputs\":{}}],\"loss_fn\":\"cross_entropy\",\"loss_fn_config\":null},"
                   "\"model_id\":\"x\"}");
    assert_int_equal(op->type, TB_OP_FORWARD);
    assert_true(op->u.forward_backward.forward_only);
    assert_int_equal(op->seq_id, -1); /* 0.1.5: order of arrival */
    tb_op_destroy(op);
}

static void test_optim(void **state)
{
    (void)state;
    struct tb_op *op = good(OPTIM, "{" M ",\"adam_params\":{\"learning_rate\":0.01}}");
    const struct tb_optim_step *s = &op->u.optim_step;
    assert_true(s->learning_rate == 0.01 && s->beta1 == 0.9 && s->beta2 == 0.95 &&
                s->eps == 1e-12 && s->weight_decay == 0 && s->grad_clip_norm == 0);
    assert_string_equal(s->type, "adamw");
    tb_op_destroy(op);
    op = good(OPTIM,
              "{" M ",\"type\":\"optim_step\",\"adam_params\":{\"learning_rate\":0,\"beta1\":0,"
              "\"beta2\":0.5,\"eps\":1,\"weight_decay\":0.1,\"grad_clip_norm\":1}}");
    assert_true(op->u.optim_step.grad_clip_norm == 1 && op->u.optim_step.beta2 == 0.5);
    tb_op_destroy(op);
}

static void test_custom_loss(void **state)
{
    (void)state;
    struct tb_op *op = good(
        LOSS, "{\"session_id\":\"s\",\"custom_loss_seq_id\":3,\"name\":\"mine\",\"inputs\":[ ],"
              "\"graph\":{\"format\":1, \"nodes\":[1.5]},\"type\":\"create_custom_loss\"}");
    const struct tb_create_custom_loss *l = &op->u.create_custom_loss;
    assert_string_equal(op->session_id, "s");
    assert_int_equal(l->seq_id, 3);
    assert_string_equal(l->name, "mine");
    assert_non_null(strstr(l->text, "\"graph\":{\"format\":1,\"nodes\":[1.5]}"));
    assert_int_equal(l->n_text, strlen(l->text));
    tb_op_destroy(op);
}

static void test_weights(void **state)
{
    (void)state;
    struct tb_op *op = good(SAVE, "{" M ",\"path\":\"c1\",\"ttl_seconds\":3600,\"overwrite\":true,"
                                  "\"user_metadata\":{\"a\":\"b\"},\"type\":\"save_weights\"}");
    const struct tb_save_weights *s = &op->u.save_weights;
    assert_string_equal(s->name, "c1");
    assert_true(s->has_ttl && s->ttl_seconds == 3600 && s->overwrite);
    assert_string_equal(s->user_metadata, "{\"a\":\"b\"}");
    tb_op_destroy(op);
    op = good(SAVE, "{" M ",\"path\":null,\"ttl_seconds\":null}");
    assert_string_equal(op->u.save_weights.name, "seq-000004");
    assert_false(op->u.save_weights.has_ttl);
    tb_op_destroy(op);
    op = good(SAMPLER, "{" M ",\"path\":null,\"sampling_session_seq_id\":2,\"kind\":\"inflight\"}");
    assert_null(op->u.save_weights.name);
    assert_int_equal(op->u.save_weights.sampling_session_seq_id, 2);
    assert_true(op->u.save_weights.inflight);
    tb_op_destroy(op);
    op = good(SAMPLER,
              "{" M ",\"path\":\"s1\",\"sampling_session_seq_id\":null,\"kind\":\"snapshot\"}");
    assert_string_equal(op->u.save_weights.name, "s1");
    assert_int_equal(op->u.save_weights.sampling_session_seq_id, -1);
    tb_op_destroy(op);
    op = good(SAMPLER, "{\"model_id\":\"m\"}"); /* 0.1.5 wants a path of its own */
    assert_non_null(op->u.save_weights.name);
    tb_op_destroy(op);
    op = good(EXT, "{" M ",\"path\":\"e1\",\"age_encryption_recipients\":[]}");
    assert_int_equal(op->type, TB_OP_SAVE_WEIGHTS_EXTERNAL);
    tb_op_destroy(op);
    op = good(LOAD, "{" M ",\"path\":\"tinker://s:train:0/weights/c1\",\"optimizer\":true}");
    assert_true(op->u.load_weights.optimizer);
    assert_int_equal(op->model_seq_id, -1);
    tb_op_destroy(op);
    op =
        good(LOAD,
             "{\"session_id\":\"s\",\"model_seq_id\":1,\"optimizer\":false,\"base_model\":\"b\","
             "\"path\":\"tinker://s:train:0/weights/c1\",\"optimizer_config\":{\"type\":\"adamw\"},"
             "\"weights_access_token\":\"t\"}");
    assert_null(op->model_id);
    assert_string_equal(op->session_id, "s");
    assert_int_equal(op->model_seq_id, 1);
    assert_string_equal(op->u.load_weights.optimizer_type, "adamw");
    assert_string_equal(op->u.load_weights.base_model, "b");
    tb_op_destroy(op);
    op = good(UNLOAD, "{\"model_id\":\"m\",\"type\":\"unload_model\"}");
    assert_int_equal(op->type, TB_OP_UNLOAD_MODEL);
    tb_op_destroy(op);
}

static void test_sample(void **state)
{
    (void)state;
    struct tb_op *op = good(
        SAMPLE, "{\"num_samples\":2," PROMPT ",\"sampling_params\":{\"max_tokens\":3,\"seed\":5,"
                "\"stop\":[\"a\",13,\"b\"],\"temperature\":0.5,\"top_k\":-1,\"top_p\":1.0},"
                "\"sampling_session_id\":\"s:sample:0\",\"seq_id\":1000000000000000000,"
                "\"prompt_logprobs\":true,\"topk_prompt_logprobs\":2,\"topk_sample_logprobs\":1,"
                "\"prompt_alt_tokens_k\":2,\"prompt_logprobs_last_n\":2,"
                "\"record_stability_info\":false,\"target_prompt_logprobs\":{\"data\":[5,-1],"
                "\"dtype\":\"int64\",\"shape\":[2,1]},\"type\":\"sample\"}");
    const struct tb_sample *s = &op->u.sample;
    assert_true(op->seq_id == 1000000000000000000);
    assert_int_equal(s->n_samples, 2);
    assert_int_equal(s->n_prompt, 3);
    assert_int_equal(s->max_tokens, 3);
    assert_true(s->has_seed && s->seed == 5);
    assert_true(s->temperature == 0.5f && s->top_p == 1 && s->top_k == -1);
    assert_true(s->stop_given);
    assert_int_equal(s->n_stop_tokens, 1);
    assert_int_equal(s->stop_tokens[0], 13);
    assert_int_equal(s->n_stop_strings, 2);
    assert_string_equal(s->stop_strings[1], "b");
    assert_true(s->prompt_logprobs);
    assert_int_equal(s->prompt_logprobs_last_n, 2);
    assert_int_equal(s->topk_prompt_logprobs, 2);
    assert_int_equal(s->topk_sample_logprobs, 1);
    assert_int_equal(s->prompt_alt_tokens_k, 2);
    assert_true(s->has_target_prompt_logprobs);
    assert_int_equal(s->target_prompt_logprobs.shape[1], 1);
    assert_true(s->target_prompt_logprobs.data.i64[1] == -1);
    tb_op_destroy(op);
    /* defaults; a CSR target asks only for its listed cells */
    op = good(
        SAMPLE,
        "{" S "," PROMPT ",\"sampling_params\":{\"max_tokens\":null,\"stop\":null},"
        "\"prompt_logprobs\":null,\"target_prompt_logprobs\":{\"data\":[9],\"dtype\":\"int64\","
        "\"shape\":[2,2],\"sparse_crow_indices\":[0,0,1],\"sparse_col_indices\":[1]}}");
    s = &op->u.sample;
    assert_int_equal(s->n_samples, 1);
    assert_int_equal(s->max_tokens, -1);
    assert_false(s->stop_given);
    assert_false(s->has_seed);
    assert_true(s->temperature == 1 && s->top_p == 1);
    static const int64_t want[] = {-1, -1, -1, 9};
    assert_memory_equal(s->target_prompt_logprobs.data.i64, want, sizeof(want));
    assert_int_equal(s->target_crow[2], 1);
    assert_int_equal(s->target_col[0], 1);
    tb_op_destroy(op);
    op = good(SAMPLE, "{" S "," PROMPT ",\"sampling_params\":{\"stop\":[]}}");
    assert_true(op->u.sample.stop_given && op->u.sample.n_stop_strings == 0);
    tb_op_destroy(op);
    op = good(SAMPLE, "{" S "," PROMPT ",\"sampling_params\":{\"stop\":\"x\"}}");
    assert_int_equal(op->u.sample.n_stop_strings, 1);
    tb_op_destroy(op);
    op = good(SAMPLE, "{\"model_path\":\"tinker://a/weights/b\"," PROMPT "}"); /* 0.1.5 */
    assert_null(op->sampling_session_id);
    assert_string_equal(op->u.sample.model_path, "tinker://a/weights/b");
    tb_op_destroy(op);
}

#define FBI(datum) "{\"forward_backward_input\":{\"data\":[" datum "],\"loss_fn\":\"ppo\"}," M "}"
#define IN(inputs)                                                                                 \
    FBI("{\"model_input\":{\"chunks\":[{\"tokens\":[1]}]},\"loss_fn_inputs\":{" inputs "}}")
#define W          "forward_backward_input.data[0].loss_fn_inputs.w"
#define SP(params) "{" S "," PROMPT ",\"sampling_params\":{" params "}}"
#define TOKENS(t)  "{" S ",\"prompt\":{\"chunks\":[" t "]}}"
#define SX(extra)  "{" S "," PROMPT "," extra "}"
#define SESS       "\"session_id\":\"s\",\"model_seq_id\":0,\"base_model\":\"m\""

static const struct bad CASES[] = {
    /* not even an address: immediate */
    {OPTIM, "", true, TB_EPARSE, "body is empty, a JSON object was expected"},
    {OPTIM, "[]", true, TB_EPARSE, "body is not a JSON object"},
    {OPTIM, "{\"seq_id\":1}", true, TB_EINVAL, "model_id: required, but absent"},
    {OPTIM, "{\"model_id\":\"\",\"seq_id\":1}", true, TB_EINVAL, "model_id: is empty"},
    {OPTIM, "{\"model_id\":3,\"seq_id\":1}", true, TB_EINVAL, "model_id: 3 is not a string"},
    {OPTIM, "{\"model_id\":\"a\\nb\",\"seq_id\":1}", true, TB_EINVAL,
     "model_id: holds a control character"},
    {OPTIM, "{\"model_id\":\"m\",\"seq_id\":0}", true, TB_EINVAL, "seq_id: 0 is less than 1"},
    {OPTIM, "{\"model_id\":\"m\",\"seq_id\":1.5}", true, TB_EINVAL,
     "seq_id: 1.5 is not an integer"},
    {OPTIM, "{\"model_id\":\"m\",\"seq_id\":\"1\"}", true, TB_EINVAL,
     "seq_id: \"1\" is not an integer"},
    {OPTIM, "{\"model_id\":\"m\",\"seq_id\":9223372036854775808}", true, TB_EPARSE,
     "seq_id: 9223372036854775808 is out of the range of a 64-bit integer"},
    {OPTIM, "{\"model_id\":\"m\"}", true, TB_EINVAL, "adam_params: required, but absent"},
    {OPTIM, "{" M ",\"adam_params\":{\"learning_rate\":NaN}}", true, TB_EPARSE,
     "invalid JSON at line 1, column 69: invalid token near 'NaN'"},
    /* in its place: through the future */
    {OPTIM, "{" M "}", false, TB_EINVAL, "adam_params: required, but absent"},
    {OPTIM, "{" M ",\"type\":\"optim\",\"adam_params\":{}}", false, TB_EINVAL,
     "type: \"optim\" is not \"optim_step\""},
    {LOSS, "{}", true, TB_EINVAL, "session_id: required, but absent"},
    {LOSS, "{\"session_id\":\"s\"}", true, TB_EINVAL, "custom_loss_seq_id: required, but absent"},
    {LOSS, "{\"session_id\":\"s\",\"custom_loss_seq_id\":0}", true, TB_EINVAL,
     "name: required, but absent"},
    {LOSS,
     "{\"session_id\":\"s\",\"custom_loss_seq_id\":0,\"name\":\"n\",\"type\":\"create_loss\"}",
     true, TB_EINVAL, "type: \"create_loss\" is not \"create_custom_loss\""},
    {OPTIM, "{" M ",\"adam_params\":{\"learning_rate\":-1}}", false, TB_EINVAL,
     "adam_params.learning_rate: -1 is less than 0"},
    {OPTIM, "{" M ",\"adam_params\":{\"learning_rate\":\"1e-4\"}}", false, TB_EINVAL,
     "adam_params.learning_rate: \"1e-4\" is not a number"},
    {OPTIM, "{" M ",\"adam_params\":{\"beta1\":1.5}}", false, TB_EINVAL,
     "adam_params.beta1: 1.5 is not in 0..1"},
    {OPTIM, "{" M ",\"adam_params\":{\"beta2\":1}}", false, TB_EINVAL,
     "adam_params.beta2: 1 is not less than 1"},
    {OPTIM, "{" M ",\"optimizer_params\":{\"type\":\"dimuon\",\"learning_rate\":0.1}}", false,
     TB_EUNSUPPORTED, "optimizer_params.type: \"dimuon\" is not supported, only \"adamw\""},

    {CREATE, "{\"session_id\":\"s\",\"base_model\":\"m\"}", true, TB_EINVAL,
     "model_seq_id: required, but absent"},
    {CREATE, "{\"session_id\":\"s\",\"model_seq_id\":0}", true, TB_EINVAL,
     "base_model: required, but absent"},
    {CREATE, "{" SESS ",\"type\":\"create\"}", true, TB_EINVAL,
     "type: \"create\" is not \"create_model\""},
    {CREATE, "{" SESS ",\"lora_config\":{\"rank\":0}}", true, TB_EINVAL,
     "lora_config.rank: 0 is not in 1..2147483647"},
    {CREATE, "{" SESS ",\"lora_config\":{\"rank\":\"8\"}}", true, TB_EINVAL,
     "lora_config.rank: \"8\" is not an integer"},
    {CREATE, "{" SESS ",\"lora_config\":7}", true, TB_EINVAL, "lora_config: 7 is not an object"},
    {CREATE,
     "{" SESS ",\"lora_config\":{\"rank\":8,\"train_attn\":false,\"train_mlp\":false,"
     "\"train_unembed\":false}}",
     true, TB_EINVAL,
     "lora_config: train_attn, train_mlp and train_unembed are all false; at least one must be true"},
    {CREATE, "{" SESS ",\"lora_config\":{\"seed\":18446744073709551615}}", true, TB_EPARSE,
     "seed: 18446744073709551615 is out of the range of a 64-bit integer"},
    {CREATE, "{" SESS ",\"optimizer_config\":{\"type\":\"dimuon\",\"version\":1}}", true,
     TB_EUNSUPPORTED, "optimizer_config.type: \"dimuon\" is not supported, only \"adamw\""},
    {CREATE, "{" SESS ",\"user_metadata\":[]}", true, TB_EINVAL,
     "user_metadata: an array of 0 is not an object"},

    {FB, "{" M "}", false, TB_EINVAL, "forward_backward_input: required, but absent"},
    {FB, "{\"forward_backward_input\":{\"data\":[],\"loss_fn\":\"ppo\"}," M "}", false, TB_EINVAL,
     "forward_backward_input.data: 0 datums are not in 1..65536"},
    {FB, "{\"forward_backward_input\":{\"data\":[]}," M "}", false, TB_EINVAL,
     "forward_backward_input.loss_fn: required, but absent"},
    {FB, FBI("null"), false, TB_EINVAL, "forward_backward_input.data[0]: null is not an object"},
    {FB, FBI("{\"loss_fn_inputs\":{}}"), false, TB_EINVAL,
     "forward_backward_input.data[0].model_input: required, but absent"},
    {FB, FBI("{\"model_input\":{\"chunks\":[]},\"loss_fn_inputs\":{}}"), false, TB_EINVAL,
     "forward_backward_input.data[0].model_input: has no tokens"},
    {FB,
     FBI("{\"model_input\":{\"chunks\":[{\"data\":\"aGk=\",\"format\":\"png\"}]},\"loss_fn_inputs\":{}}"),
     false, TB_EUNSUPPORTED,
     "forward_backward_input.data[0].model_input.chunks[0]: \"image\" chunks are not supported, only "
     "\"encoded_text\""},
    {FB, IN("\"w\":{\"data\":[1]}"), false, TB_EINVAL, W ".dtype: required, but absent"},
    {FB, IN("\"w\":{\"data\":[1],\"dtype\":\"float16\"}"), false, TB_EUNSUPPORTED,
     W ".dtype: \"float16\" is not supported (\"float32\" and \"int64\" are)"},
    {FB, IN("\"w\":{\"data\":[1.5],\"dtype\":\"int64\"}"), false, TB_EINVAL,
     W ".data[0]: 1.5 is not an integer"},
    {FB, IN("\"w\":{\"data\":[null],\"dtype\":\"float32\"}"), false, TB_EINVAL,
     W ".data[0]: null is not a number"},
    {FB, IN("\"w\":{\"data\":[1e300],\"dtype\":\"float32\"}"), false, TB_ENONFINITE,
     W ".data[0]: 1e+300 is out of the range of a float32"},
    {FB, IN("\"w\":{\"data\":[1,2],\"dtype\":\"float32\",\"shape\":[3]}"), false, TB_EINVAL,
     W ": 2 elements do not fill the shape [3]"},
    {FB, IN("\"w\":{\"data\":[1,2],\"dtype\":\"float32\",\"shape\":[1,1,2]}"), false, TB_EINVAL,
     W ": shape has 3 dimensions; at most 2 are supported"},
    {FB,
     IN("\"w\":{\"data\":[1],\"dtype\":\"int64\",\"shape\":[1,1],\"sparse_crow_indices\":[0,1]}"),
     false, TB_EINVAL, W ": sparse_crow_indices and sparse_col_indices go together"},
    {FB,
     IN("\"w\":{\"data\":[1],\"dtype\":\"int64\",\"shape\":[1,1],\"sparse_crow_indices\":[0,1],"
        "\"sparse_col_indices\":[1]}"),
     false, TB_EINVAL, W ": col_indices[0] is 1, not in 0..0"},
    {FB,
     "{\"forward_backward_input\":{\"data\":[],\"loss_fn\":\"ppo\",\"loss_fn_config\":{\"beta\":true}}," M
     "}",
     false, TB_EINVAL, "forward_backward_input.loss_fn_config.beta: true is not a number"},

    {SAVE, "{" M ",\"path\":\"a\",\"ttl_seconds\":60}", false, TB_EINVAL,
     "ttl_seconds: 60 is not in 3600..315360000"},
    {SAVE, "{" M ",\"path\":\"a\",\"overwrite\":1}", false, TB_EINVAL,
     "overwrite: 1 is not true or false"},
    {SAVE, "{" M ",\"path\":\"a\",\"user_metadata\":{\"k\":1}}", false, TB_EINVAL,
     "user_metadata.k: 1 is not a string"},
    {SAMPLER, "{" M ",\"kind\":\"live\",\"sampling_session_seq_id\":0}", false, TB_EINVAL,
     "kind: \"live\" is neither \"snapshot\" nor \"inflight\""},
    {EXT, "{" M ",\"path\":\"a\",\"age_encryption_recipients\":[\"age1\"]}", false, TB_EUNSUPPORTED,
     "age_encryption_recipients: encryption is not supported"},
    {LOAD, "{}", true, TB_EINVAL, "model_id, or session_id and model_seq_id: required, but absent"},
    {LOAD, "{" M "}", false, TB_EINVAL, "path: required, but absent"},
    {LOAD,
     "{" M
     ",\"path\":\"tinker://r/weights/n\",\"optimizer\":true,\"optimizer_config\":{\"type\":\"adamw\"}}",
     false, TB_EINVAL,
     "optimizer_config: goes only with optimizer: false; with true the checkpoint's is restored"},
    {LOAD, "{" M ",\"path\":\"tinker://r/weights/n\",\"optimizer_config\":{\"type\":\"dimuon\"}}",
     false, TB_EUNSUPPORTED, "optimizer_config: type \"dimuon\" is not supported, only \"adamw\""},

    {SAMPLE, "{" PROMPT "}", true, TB_EINVAL,
     "sampling_session_id, model_path or base_model: required, but absent"},
    {SAMPLE, "{\"sampling_session_id\":\"s\"," PROMPT "}", true, TB_EINVAL,
     "seq_id: required, but absent"},
    {SAMPLE, "{\"sampling_session_id\":\"s\",\"seq_id\":-1," PROMPT "}", true, TB_EINVAL,
     "seq_id: -1 is less than 0"},
    {SAMPLE, "{" S "}", false, TB_EINVAL, "prompt: required, but absent"},
    {SAMPLE, TOKENS(""), false, TB_EINVAL, "prompt: has no tokens"},
    {SAMPLE, TOKENS("{\"tokens\":[1,-2]}"), false, TB_EINVAL,
     "prompt.chunks[0].tokens[1]: -2 is not in 0..2147483647"},
    {SAMPLE, TOKENS("{\"tokens\":[1,4294967296]}"), false, TB_EINVAL,
     "prompt.chunks[0].tokens[1]: 4294967296 is not in 0..2147483647"},
    {SAMPLE, TOKENS("{\"location\":\"x\",\"format\":\"png\"}"), false, TB_EUNSUPPORTED,
     "prompt.chunks[0]: \"image_asset_pointer\" chunks are not supported, only \"encoded_text\""},
    {SAMPLE, SX("\"num_samples\":0"), false, TB_EINVAL, "num_samples: 0 is not in 1..1024"},
    {SAMPLE, SP("\"max_tokens\":0"), false, TB_EINVAL,
     "sampling_params.max_tokens: 0 is not in 1..2147483647"},
    {SAMPLE, SP("\"temperature\":-0.5"), false, TB_EINVAL,
     "sampling_params.temperature: -0.5 is not in 0..1000000"},
    {SAMPLE, SP("\"top_p\":1.5"), false, TB_EINVAL, "sampling_params.top_p: 1.5 is not in 0..1"},
    {SAMPLE, SP("\"top_p\":0"), false, TB_EINVAL, "sampling_params.top_p: 0 is not greater than 0"},
    {SAMPLE, SP("\"top_k\":0"), false, TB_EINVAL,
     "sampling_params.top_k: 0 is neither -1 (off) nor at least 1"},
    {SAMPLE, SP("\"top_k\":-2"), false, TB_EINVAL,
     "sampling_params.top_k: -2 is not in -1..2147483647"},
    {SAMPLE, SP("\"seed\":9223372036854775808"), true, TB_EPARSE,
     "seed: 9223372036854775808 is out of the range of a 64-bit integer"},
    {SAMPLE, SP("\"seed\":1.0"), false, TB_EINVAL, "sampling_params.seed: 1 is not an integer"},
    {SAMPLE, SP("\"stop\":[\"\"]"), false, TB_EINVAL, "sampling_params.stop[0]: is empty"},
    {SAMPLE, SP("\"stop\":[1.5]"), false, TB_EINVAL,
     "sampling_params.stop[0]: 1.5 is not a string or a token id"},
    {SAMPLE, SP("\"stop\":7"), false, TB_EINVAL,
     "sampling_params.stop: 7 is not a string or a list"},
    {SAMPLE, SX("\"topk_prompt_logprobs\":5000"), false, TB_EINVAL,
     "topk_prompt_logprobs: 5000 is not in 0..1024"},
    {SAMPLE, SX("\"record_stability_info\":true"), false, TB_EUNSUPPORTED,
     "record_stability_info: true is not supported"},
    {SAMPLE, SX("\"prompt_logprobs_last_n\":1"), false, TB_EINVAL,
     "prompt_logprobs_last_n: needs prompt_logprobs: true"},
    {SAMPLE, SX("\"prompt_logprobs\":true,\"prompt_logprobs_last_n\":3"), false, TB_EINVAL,
     "prompt_logprobs_last_n: 3 is not in 1..2"},
    {SAMPLE, SX("\"target_prompt_logprobs\":{\"data\":[1],\"dtype\":\"int64\",\"shape\":[1,1]}"),
     false, TB_EINVAL,
     "target_prompt_logprobs: shape is not [2, K]: one row for each prompt token after the first"},
    {SAMPLE,
     SX("\"target_prompt_logprobs\":{\"data\":[1,2],\"dtype\":\"float32\",\"shape\":[2,1]}"), false,
     TB_EINVAL, "target_prompt_logprobs: dtype is not int64"},
    {SAMPLE, SX("\"type\":\"asample\""), false, TB_EINVAL, "type: \"asample\" is not \"sample\""},
};

static void test_bad(void **state)
{
    (void)state;
    for (size_t i = 0; i < TB_ARRAY_LEN(CASES); i++)
        assert_bad(&CASES[i]);
}

/* The store's words for names and paths, with the field in front. */
static void test_names(void **state)
{
    (void)state;
    static const char *const bad[] = {"../x", ".hidden", "a/b", "", "a b", "\\u0000"};
    for (size_t i = 0; i < TB_ARRAY_LEN(bad); i++) {
        char json[256];
        snprintf(json, sizeof(json), "{" M ",\"path\":\"%s\"}", bad[i]);
        struct tb_body b = {tb_span_str(json), false, NULL};
        struct tb_op *op = NULL;
        struct tb_error e = {0};
        assert_int_equal(SAVE(&b, &op, &e), 0);
        assert_int_equal(op->error.code, TB_EINVAL);
        assert_int_equal(strncmp(op->error.msg, "path: ", 6), 0);
        tb_op_destroy(op);
    }
    struct tb_body b = {
        TB_SPAN_LIT("{\"session_id\":\"s\",\"model_seq_id\":0,\"path\":\"/etc/passwd\"}"), false,
        NULL};
    struct tb_op *op = NULL;
    struct tb_error e = {0};
    assert_int_equal(LOAD(&b, &op, &e), TB_EINVAL);
    assert_int_equal(strncmp(e.msg, "path: ", 6), 0);
}

static void test_mutations(void **state)
{
    (void)state;
    static const char text[] =
        "{\"forward_backward_input\":{\"data\":[{\"model_input\":{\"chunks\":[{\"tokens\":[1,2]}]},"
        "\"loss_fn_inputs\":{\"target_tokens\":{\"data\":[5,7],\"dtype\":\"int64\",\"shape\":[2,3],"
        "\"sparse_crow_indices\":[0,1,2],\"sparse_col_indices\":[0,2]}}}],\"loss_fn\":\"ppo\","
        "\"loss_fn_config\":{\"a\":0.5}}," M "}";
    static const char sample[] =
        "{" S "," PROMPT ",\"sampling_params\":{\"max_tokens\":3,\"seed\":5,\"stop\":[\"a\",1],"
        "\"top_k\":2,\"top_p\":0.5},\"num_samples\":2,\"prompt_logprobs\":true,"
        "\"target_prompt_logprobs\":{\"data\":[5,-1],\"dtype\":\"int64\",\"shape\":[2,1]}}";
    const struct {
        tb_decoder decode;
        const char *text;
    } bodies[] = {{FB, text}, {SAMPLE, sample}};
    for (size_t k = 0; k < 2; k++) {
        size_t n = strlen(bodies[k].text);
        int good_n = 0, failed = 0;
        for (uint32_t i = 0; i < 20000; i++) {
            uint32_t ctr[4] = {i, (uint32_t)k, 0, 0}, key[2] = {9, 9}, r[4];
            tb_philox4x32(ctr, key, r);
            char *m = tb_malloc(n);
            memcpy(m, bodies[k].text, n);
            m[r[0] % n] = "0123456789-.,:[]{}\"aeEn"[r[1] % 23];
            if (i & 1) m[r[2] % n] = "0123456789-"[r[3] % 11];
            struct tb_body b = {{m, i % 64 ? n : r[2] % n}, false, NULL};
            struct tb_op *op = NULL;
            struct tb_error e;
            if (bodies[k].decode(&b, &op, &e) == 0) {
                if (op->error.code)
                    failed++;
                else
                    good_n++;
                tb_op_destroy(op);
            }
            tb_free(m);
        }
        assert_true(good_n > 100 && failed > 100);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_create),      cmocka_unit_test(test_forward_backward),
        cmocka_unit_test(test_optim),       cmocka_unit_test(test_weights),
        cmocka_unit_test(test_custom_loss), cmocka_unit_test(test_sample),
        cmocka_unit_test(test_bad),         cmocka_unit_test(test_names),
        cmocka_unit_test(test_mutations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
