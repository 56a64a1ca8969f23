/* forward_backward in protobuf: the golden request, good and bad tensors, zstd, and broken bytes.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <zstd.h>

#include <cmocka.h>

#include "api/tinker/tinker.h"
#include "util/limits.h"
#include "util/mem.h"
#include "util/philox.h"
#include "wire/proto.h"
#include "wire/tinker_public.pb-c.h"

/* stable_reinforce, CSR targets, spans, config in both maps; as the SDK 0.38.0 wrote it */
static const char GOLDEN[] =
    "0a036d696410011ab2010a0c0a0a0a08010000000200000012570a0d7461726765745f746f6b656e731246123e0a10"
    "0500000000000000070000000000000012180000000000000000010000000000000002000000000000001a10000000"
    "00000000000200000000000000180222020203122b0a077765696768747312200a180000803f0000803f0000803f00"
    "00803f0000803f0000803f1801220202031a080a060a02733118011a0812060a0273311801220812060a0273311802"
    "2210737461626c655f7265696e666f7263652a130a086b6c5f636f656666117b14ae47e17a843f3a150a086b6c5f63"
    "6f6566661209097b14ae47e17a843f";

static size_t unhex(const char *hex, uint8_t **out)
{
    size_t n = strlen(hex) / 2;
    *out = tb_malloc(n);
    for (size_t i = 0; i < n; i++) {
        unsigned v;
        assert_int_equal(sscanf(hex + 2 * i, "%2x", &v), 1);
        (*out)[i] = (uint8_t)v;
    }
    return n;
}

static int decode(const void *p, size_t n, struct tb_op **op, struct tb_error *e)
{
    struct tb_body b = {{p, n}, true, "key-1"};
    *op = NULL;
    return tb_tinker_decode_forward_backward(&b, op, e);
}

static void check_golden(const struct tb_op *op)
{
    const struct tb_forward_backward *fb = &op->u.forward_backward;
    assert_int_equal(op->error.code, 0);
    assert_int_equal(op->type, TB_OP_FORWARD_BACKWARD);
    assert_string_equal(op->model_id, "mid");
    assert_int_equal(op->seq_id, 1);
    assert_string_equal(op->idempotency_key, "key-1");
    assert_string_equal(fb->loss_fn, "stable_reinforce");
    assert_false(fb->forward_only);
    assert_int_equal(fb->n_config, 1);
    assert_string_equal(fb->config[0].key, "kl_coeff");
    assert_false(fb->config[0].is_text);
    assert_true(fb->config[0].number == 0.01);
    assert_int_equal(fb->n_data, 1);
    const struct tb_datum *d = fb->data;
    assert_int_equal(d->n_tokens, 2);
    assert_int_equal(d->tokens[0], 1);
    assert_int_equal(d->tokens[1], 2);
    assert_int_equal(d->n_inputs, 2);
    const struct tb_tensor *t = &d->inputs[0], *w = &d->inputs[1];
    assert_string_equal(t->name, "target_tokens");
    assert_int_equal(t->type, TB_TENSOR_I64);
    assert_int_equal(t->n_dims, 2);
    assert_int_equal(t->shape[0], 2);
    assert_int_equal(t->shape[1], 3);
    static const int64_t want[] = {5, 0, 0, 0, 0, 7};
    assert_int_equal(t->n, 6);
    assert_memory_equal(t->data.i64, want, sizeof(want));
    assert_string_equal(w->name, "weights");
    assert_int_equal(w->type, TB_TENSOR_F32);
    assert_int_equal(w->n, 6);
    for (int i = 0; i < 6; i++)
        assert_true(w->data.f32[i] == 1);
    assert_true(op->body_bytes >= strlen(GOLDEN) / 2);
}

static void test_golden(void **state)
{
    (void)state;
    uint8_t *p;
    size_t n = unhex(GOLDEN, &p);
    struct tb_op *op;
    struct tb_error e = {0};
    assert_int_equal(decode(p, n, &op, &e), 0);
    check_golden(op);
    tb_op_destroy(op);
    tb_free(p);
}

static void test_golden_zstd(void **state)
{
    (void)state;
    uint8_t *p, c[1024];
    char *plain;
    size_t n = unhex(GOLDEN, &p), plain_n;
    size_t cn = ZSTD_compress(c, sizeof(c), p, n, 3);
    assert_false(ZSTD_isError(cn));
    struct tb_op *op;
    struct tb_error e = {0};
    assert_int_equal(tb_inflate(TB_ENC_ZSTD, c, cn, 1 << 20, &plain, &plain_n, &e), 0);
    assert_int_equal(decode(plain, plain_n, &op, &e), 0);
    tb_free(plain); /* the op holds nothing of the body */
    check_golden(op);
    tb_op_destroy(op);
    tb_free(p);
}

/* A request with one datum whose parts a test may spoil. */
struct req {
    TinkerPublic__ForwardBackwardRequest r;
    TinkerPublic__Datum d, *data[1];
    TinkerPublic__Chunk c[2], *chunks[2];
    TinkerPublic__EncodedTextChunk text[2];
    TinkerPublic__ImageChunk image;
    TinkerPublic__Datum__LossFnInputsEntry in[2], *ins[2];
    TinkerPublic__Tensor t[2];
    TinkerPublic__SparseCsr csr;
    TinkerPublic__ForwardBackwardRequest__LossFnConfigEntry cfg, *cfgs[1];
    TinkerPublic__ForwardBackwardRequest__LossFnConfigV2Entry v2, *v2s[1];
    TinkerPublic__LossConfigValue value;
    int32_t tokens[4];
    int64_t targets[4];
    float weights[4];
    int64_t shape[3], crow[4], col[4];
};

static ProtobufCBinaryData bytes(const void *p, size_t n)
{
    return (ProtobufCBinaryData){n, (uint8_t *)(uintptr_t)p};
}

static char *lit(const char *s)
{
    return (char *)(uintptr_t)s;
}

static void req_init(struct req *q)
{
    memset(q, 0, sizeof(*q));
    tinker_public__forward_backward_request__init(&q->r);
    tinker_public__datum__init(&q->d);
    tinker_public__image_chunk__init(&q->image);
    tinker_public__sparse_csr__init(&q->csr);
    tinker_public__forward_backward_request__loss_fn_config_entry__init(&q->cfg);
    tinker_public__forward_backward_request__loss_fn_config_v2_entry__init(&q->v2);
    tinker_public__loss_config_value__init(&q->value);
    for (int i = 0; i < 4; i++) {
        q->tokens[i] = i + 1;
        q->targets[i] = i + 2;
        q->weights[i] = -0.5f * (float)i;
    }
    for (int i = 0; i < 2; i++) {
        tinker_public__chunk__init(&q->c[i]);
        tinker_public__encoded_text_chunk__init(&q->text[i]);
        tinker_public__datum__loss_fn_inputs_entry__init(&q->in[i]);
        tinker_public__tensor__init(&q->t[i]);
        q->text[i].tokens = bytes(q->tokens + 2 * i, 8);
        q->c[i].chunk_case = TINKER_PUBLIC__CHUNK__CHUNK_ENCODED_TEXT;
        q->c[i].encoded_text = &q->text[i];
        q->chunks[i] = &q->c[i];
        q->ins[i] = &q->in[i];
        q->in[i].value = &q->t[i];
        q->t[i].encoding_case = TINKER_PUBLIC__TENSOR__ENCODING_DENSE;
    }
    q->in[0].key = lit("target_tokens");
    q->t[0].dense = bytes(q->targets, 32);
    q->t[0].dtype = TINKER_PUBLIC__DTYPE__DTYPE_INT64;
    q->in[1].key = lit("weights");
    q->t[1].dense = bytes(q->weights, 16);
    q->t[1].dtype = TINKER_PUBLIC__DTYPE__DTYPE_FLOAT32;
    q->d.model_input = q->chunks;
    q->d.n_model_input = 2;
    q->d.loss_fn_inputs = q->ins;
    q->d.n_loss_fn_inputs = 2;
    q->data[0] = &q->d;
    q->r.data = q->data;
    q->r.n_data = 1;
    q->r.model_id = lit("m:train:0");
    q->r.seq_id = 3;
    q->r.loss_fn = lit("cross_entropy");
    q->cfgs[0] = &q->cfg;
    q->v2s[0] = &q->v2;
    q->cfg.key = q->v2.key = lit("beta");
    q->v2.value = &q->value;
}

static struct tb_op *run(struct req *q)
{
    void *p;
    size_t n;
    struct tb_error e = {0};
    struct tb_op *op;
    assert_int_equal(tb_proto_pack(&q->r.base, &p, &n, &e), 0);
    if (decode(p, n, &op, &e)) fail_msg("%s", e.msg);
    tb_free(p);
    return op;
}

static void assert_bad(struct req *q, int code, const char *msg)
{
    struct tb_op *op = run(q);
    if (op->error.code != code || strcmp(op->error.msg, msg) != 0)
        fail_msg("got %d \"%s\", wanted %d \"%s\"", op->error.code, op->error.msg, code, msg);
    assert_string_equal(op->model_id, "m:train:0"); /* it keeps its place in the order */
    assert_int_equal(op->seq_id, 3);
    assert_string_equal(op->idempotency_key, "key-1");
    tb_op_destroy(op);
}

static void test_good(void **state)
{
    (void)state;
    struct req q;
    req_init(&q);
    q.r.forward_only = 1;
    q.r.loss_fn_config = q.cfgs;
    q.r.n_loss_fn_config = 1;
    q.cfg.value = 0.5;
    struct tb_op *op = run(&q);
    const struct tb_forward_backward *fb = &op->u.forward_backward;
    assert_int_equal(op->error.code, 0);
    assert_int_equal(op->type, TB_OP_FORWARD);
    assert_true(fb->forward_only);
    assert_int_equal(fb->data[0].n_tokens, 4); /* two chunks make one input */
    assert_memory_equal(fb->data[0].tokens, q.tokens, sizeof(q.tokens));
    assert_int_equal(fb->data[0].inputs[0].n_dims, 1);
    assert_int_equal(fb->data[0].inputs[0].shape[0], 4);
    assert_memory_equal(fb->data[0].inputs[1].data.f32, q.weights, sizeof(q.weights));
    assert_int_equal(fb->n_config, 1);
    assert_true(fb->config[0].number == 0.5);
    tb_op_destroy(op);
    /* v2 is preferred when it is there, and may hold text */
    q.r.loss_fn_config_v2 = q.v2s;
    q.r.n_loss_fn_config_v2 = 1;
    q.value.value_case = TINKER_PUBLIC__LOSS_CONFIG_VALUE__VALUE_TEXT;
    q.value.text = lit("loss-1");
    op = run(&q);
    assert_true(op->u.forward_backward.config[0].is_text);
    assert_string_equal(op->u.forward_backward.config[0].text, "loss-1");
    tb_op_destroy(op);
}

static void test_bad_datum(void **state)
{
    (void)state;
    struct req q;
    req_init(&q);
    q.c[1].chunk_case = TINKER_PUBLIC__CHUNK__CHUNK_IMAGE;
    q.c[1].image = &q.image;
    assert_bad(&q, TB_EUNSUPPORTED,
               "data[0]: model_input[1]: image chunks are not supported, only encoded_text");
    req_init(&q);
    q.text[0].tokens.len = 7;
    assert_bad(&q, TB_EINVAL, "data[0]: model_input[0].tokens: 7 bytes are no array of int32");
    req_init(&q);
    q.d.n_model_input = 0;
    assert_bad(&q, TB_EINVAL, "data[0]: model_input: has no tokens");
    req_init(&q);
    q.r.n_data = 0;
    assert_bad(&q, TB_EINVAL, "data: 0 datums are not in 1..65536");
    req_init(&q);
    q.r.loss_fn = lit("");
    assert_bad(&q, TB_EINVAL, "loss_fn: \"\" is not the name of a loss");
    req_init(&q);
    q.in[1].key = lit("target_tokens");
    assert_bad(&q, TB_EINVAL, "data[0]: loss_fn_inputs: key \"target_tokens\" comes twice");
    req_init(&q);
    q.r.loss_fn_config = q.cfgs;
    q.r.n_loss_fn_config = 1;
    q.cfg.value = INFINITY;
    assert_bad(&q, TB_ENONFINITE, "loss_fn_config.beta: is not finite");
}

static void test_bad_tensor(void **state)
{
    (void)state;
    struct req q;
    req_init(&q);
    q.weights[2] = NAN;
    assert_bad(&q, TB_ENONFINITE,
               "data[0]: loss_fn_inputs.weights: element 2 is NaN; all must be finite");
    req_init(&q);
    q.weights[3] = -INFINITY;
    assert_bad(&q, TB_ENONFINITE,
               "data[0]: loss_fn_inputs.weights: element 3 is -Infinity; all must be finite");
    req_init(&q);
    q.t[0].dtype = TINKER_PUBLIC__DTYPE__DTYPE_BFLOAT16;
    assert_bad(
        &q, TB_EUNSUPPORTED,
        "data[0]: loss_fn_inputs.target_tokens: dtype 4 is not supported (1 float32 and 2 int64 "
        "are)");
    req_init(&q);
    q.t[0].dense.len = 30;
    assert_bad(&q, TB_EINVAL,
               "data[0]: loss_fn_inputs.target_tokens: 30 bytes are no array of int64");
    req_init(&q);
    q.t[0].encoding_case = TINKER_PUBLIC__TENSOR__ENCODING__NOT_SET;
    assert_bad(&q, TB_EINVAL,
               "data[0]: loss_fn_inputs.target_tokens: neither dense nor sparse_csr is set");
    req_init(&q);
    q.t[0].shape = q.shape;
    q.t[0].n_shape = 2;
    q.shape[0] = 2;
    q.shape[1] = 3;
    assert_bad(&q, TB_EINVAL,
               "data[0]: loss_fn_inputs.target_tokens: 4 elements do not fill the shape [2, 3]");
    q.shape[0] = -1;
    assert_bad(&q, TB_EINVAL,
               "data[0]: loss_fn_inputs.target_tokens: shape[0] is -1, not in 0..1048576");
    q.shape[0] = 1;
    q.shape[1] = INT64_MAX;
    assert_bad(
        &q, TB_EINVAL,
        "data[0]: loss_fn_inputs.target_tokens: shape[1] is 9223372036854775807, not in 0..4096");
    q.t[0].n_shape = 3;
    assert_bad(
        &q, TB_EINVAL,
        "data[0]: loss_fn_inputs.target_tokens: shape has 3 dimensions; at most 2 are supported");
}

static void csr_init(struct req *q)
{
    req_init(q);
    static const int64_t crow[] = {0, 1, 2}, col[] = {0, 2};
    memcpy(q->crow, crow, sizeof(crow));
    memcpy(q->col, col, sizeof(col));
    q->csr.values = bytes(q->targets, 16);
    q->csr.crow_indices = bytes(q->crow, 24);
    q->csr.col_indices = bytes(q->col, 16);
    q->t[0].encoding_case = TINKER_PUBLIC__TENSOR__ENCODING_SPARSE_CSR;
    q->t[0].sparse_csr = &q->csr;
    q->t[0].shape = q->shape;
    q->t[0].n_shape = 2;
    q->shape[0] = 2;
    q->shape[1] = 3;
}

static void test_csr(void **state)
{
    (void)state;
    struct req q;
    csr_init(&q);
    struct tb_op *op = run(&q);
    static const int64_t want[] = {2, 0, 0, 0, 0, 3};
    assert_int_equal(op->error.code, 0);
    assert_memory_equal(op->u.forward_backward.data[0].inputs[0].data.i64, want, sizeof(want));
    tb_op_destroy(op);
#define AT "data[0]: loss_fn_inputs.target_tokens: "
    q.col[1] = 3;
    assert_bad(&q, TB_EINVAL, AT "col_indices[1] is 3, not in 0..2");
    q.col[1] = -1;
    assert_bad(&q, TB_EINVAL, AT "col_indices[1] is -1, not in 0..2");
    csr_init(&q);
    q.crow[1] = 3;
    assert_bad(&q, TB_EINVAL, AT "crow_indices[1] is 3 after 0");
    csr_init(&q);
    q.crow[1] = -5;
    assert_bad(&q, TB_EINVAL, AT "crow_indices[1] is -5 after 0");
    csr_init(&q);
    q.crow[2] = 1;
    assert_bad(&q, TB_EINVAL,
               AT "crow_indices runs from 0 to 1; it must run from 0 to the number of values, 2");
    csr_init(&q);
    q.crow[1] = 2; /* both in row 0, and not rising */
    q.col[0] = 2;
    assert_bad(&q, TB_EINVAL, AT "col_indices[1] is 2 after 2 in one row; they must rise");
    csr_init(&q);
    q.shape[0] = 3;
    assert_bad(&q, TB_EINVAL, AT "crow_indices has 3 entries; 3 rows need 4");
    csr_init(&q);
    q.csr.col_indices.len = 8;
    assert_bad(&q, TB_EINVAL, AT "col_indices has 1 entries for 2 values");
    csr_init(&q);
    q.t[0].n_shape = 1;
    assert_bad(&q, TB_EINVAL, AT "a sparse tensor needs a shape of 2 dimensions, not 1");
    csr_init(&q);
    q.shape[1] = 0;
    assert_bad(&q, TB_EINVAL, AT "2 values in an empty shape");
}

/* A small sparse tensor cannot ask for gigabytes. */
static void test_csr_bomb(void **state)
{
    (void)state;
    struct req q;
    csr_init(&q);
    size_t rows = 100000;
    int64_t *crow = tb_calloc(rows + 1, sizeof(*crow));
    q.csr.values.len = q.csr.col_indices.len = 0;
    q.csr.crow_indices = bytes(crow, (rows + 1) * sizeof(*crow));
    q.shape[0] = (int64_t)rows;
    q.shape[1] = TB_MAX_TARGETS_K;
    struct tb_op *op = run(&q);
    assert_int_equal(op->error.code, TB_ETOOBIG);
    assert_non_null(strstr(op->error.msg, "sparse shape [100000, 4096]"));
    tb_op_destroy(op);
    tb_free(crow);
}

/* Without a place in an order the answer is immediate. */
static void test_refused(void **state)
{
    (void)state;
    struct req q;
    struct tb_error e = {0};
    struct tb_op *op;
    void *p;
    size_t n;
    req_init(&q);
    q.r.seq_id = 0;
    tb_proto_pack(&q.r.base, &p, &n, &e);
    assert_int_equal(decode(p, n, &op, &e), TB_EINVAL);
    assert_string_equal(e.msg, "seq_id: 0 is less than 1");
    tb_free(p);
    req_init(&q);
    q.r.model_id = lit("");
    tb_proto_pack(&q.r.base, &p, &n, &e);
    assert_int_equal(decode(p, n, &op, &e), TB_EINVAL);
    tb_free(p);
    assert_int_equal(decode("\x0a\xff", 2, &op, &e), TB_EPARSE);
    struct tb_body b = {TB_SPAN_LIT("{}"), true, NULL};
    assert_int_equal(tb_tinker_decode_optim_step(&b, &op, &e), TB_EPARSE);
}

static void test_mutations(void **state)
{
    (void)state;
    uint8_t *p;
    size_t n = unhex(GOLDEN, &p);
    struct tb_op *op;
    struct tb_error e;
    int good = 0, failed = 0, refused = 0;
    for (size_t cut = 0; cut < n; cut++) {
        uint8_t *exact = tb_malloc(cut + 1); /* ASan sees reads beyond the cut */
        memcpy(exact, p, cut);
        exact = tb_realloc(exact, cut ? cut : 1);
        if (decode(exact, cut, &op, &e) == 0) tb_op_destroy(op);
        tb_free(exact);
    }
    for (uint32_t i = 0; i < 40000; i++) {
        uint32_t ctr[4] = {i, 0, 0, 0}, key[2] = {7, 8}, r[4];
        tb_philox4x32(ctr, key, r);
        uint8_t *m = tb_malloc(n);
        memcpy(m, p, n);
        m[r[0] % n] = (uint8_t)r[1];
        if (i & 1) m[r[2] % n] ^= (uint8_t)(1u << (r[3] % 8));
        int rc = decode(m, n, &op, &e);
        if (rc)
            refused++;
        else if (op->error.code)
            failed++;
        else
            good++;
        if (rc == 0) tb_op_destroy(op);
        tb_free(m);
    }
    tb_free(p);
    assert_true(good > 1000 && failed > 1000 && refused > 1000); /* the test reaches all three */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden),     cmocka_unit_test(test_golden_zstd),
        cmocka_unit_test(test_good),       cmocka_unit_test(test_bad_datum),
        cmocka_unit_test(test_bad_tensor), cmocka_unit_test(test_csr),
        cmocka_unit_test(test_csr_bomb),   cmocka_unit_test(test_refused),
        cmocka_unit_test(test_mutations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
