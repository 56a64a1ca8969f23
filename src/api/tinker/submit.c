/*
 * From a request's body to an op in core's hands: small bodies are decoded at once, large or
 * compressed ones in the uv pool. The request stays valid until it is answered (no on_abort is
 * set), so the pool reads its body in place; the loop's thread leaves the request alone meanwhile.
 */
#include <string.h>

#include "api/tinker/tinker.h"
#include "util/mem.h"

enum { DECODE_INLINE = 64 * 1024 };

struct submit {
    uv_work_t work;
    struct tb_api *a;
    struct tb_http_request *req;
    tb_decoder decode;
    struct tb_body body;
    enum tb_encoding encoding;
    struct tb_op *op;
    struct tb_error err;
    int rc;
};

static void decode(struct submit *s)
{
    char *plain;
    s->rc = tb_api_inflate(s->a, s->encoding, &s->body.bytes, &plain, &s->err);
    if (s->rc == 0) s->rc = s->decode(&s->body, &s->op, &s->err);
    tb_free(plain);
}

/* A key of another tenant opens that one's checkpoints. */
static void find_reader(struct submit *s, struct tb_op *op)
{
    struct tb_load_weights *l = &op->u.load_weights;
    if (op->type != TB_OP_LOAD_WEIGHTS || op->error.code || !l->access_token) return;
    struct tb_tenant *t = tb_api_key_tenant(s->a, &op->arena, tb_span_str(l->access_token));
    if (t)
        l->reader = tb_tenant_name(t);
    else
        tb_error_set(&op->error, TB_EFORBIDDEN, "weights_access_token is no key of this server");
}

static void answer(struct tb_http_request *req, enum tb_op_type type, const struct tb_ticket *t,
                   bool creates, int32_t n_samples)
{
    struct tb_buf b;
    struct tb_json_out j;
    char id[2 * TB_MAX_ID];
    tb_api_answer_begin(&b, &j);
    tb_jout_str(&j, "request_id", t->request_id);
    if (creates && t->model_id) tb_jout_str(&j, "model_id", t->model_id);
    if (type == TB_OP_SAMPLE) {
        tb_jout_array(&j, "sample_sequence_ids");
        for (int32_t i = 0; i < n_samples; i++) {
            snprintf(id, sizeof(id), "%s/%d", t->request_id, i);
            tb_jout_str(&j, NULL, id);
        }
        tb_jout_array_end(&j);
    }
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}

static void finish(struct submit *s)
{
    struct tb_op *op = s->op;
    struct tb_ticket t = {0};
    if (s->rc == 0) {
        enum tb_op_type type = op->type;
        bool creates = op->model_seq_id >= 0;
        find_reader(s, op);
        int32_t n_samples = type == TB_OP_SAMPLE ? op->u.sample.n_samples : 0;
        s->op = NULL; /* moves, also when it is refused */
        s->rc = tb_core_submit(tb_api_core(s->a), tb_api_who(s->req), op, &t, &s->err);
        if (s->rc == 0) answer(s->req, type, &t, creates, n_samples);
    }
    if (s->rc) tb_api_error(s->req, &s->err);
    tb_op_destroy(s->op);
}

static void on_work(uv_work_t *w)
{
    decode(TB_CONTAINER_OF(w, struct submit, work));
}

static void on_done(uv_work_t *w, int status)
{
    struct submit *s = TB_CONTAINER_OF(w, struct submit, work);
    struct tb_api *a = s->a;
    if (status) s->rc = tb_error_set(&s->err, TB_ECANCELED, "decoding was canceled");
    finish(s);
    tb_free(s);
    tb_api_work_end(a);
}

void tb_tinker_submit(struct tb_api *a, struct tb_http_request *req, tb_decoder decoder)
{
    struct submit *s = tb_calloc(1, sizeof(*s));
    struct tb_span type = tb_http_header_get(req, "Content-Type");
    s->a = a;
    s->req = req;
    s->decode = decoder;
    s->body = (struct tb_body){.bytes = req->body,
                               .proto = tb_span_icontains(type, "x-protobuf"),
                               .idempotency_key = tb_api_idempotency_key(req)};
    s->rc = tb_encoding_parse(tb_http_header_get(req, "Content-Encoding"), &s->encoding, &s->err);
    if (s->rc == 0 && (req->body.n > DECODE_INLINE || s->encoding != TB_ENC_IDENTITY)) {
        tb_api_work_begin(a);
        int rc = uv_queue_work(tb_api_loop(a), &s->work, on_work, on_done);
        if (rc == 0) return;
        s->rc = tb_error_set(&s->err, TB_EINTERNAL, "cannot queue work: %s", uv_strerror(rc));
        finish(s);
        tb_free(s);
        tb_api_work_end(a);
        return;
    }
    if (s->rc == 0) decode(s);
    finish(s);
    tb_free(s);
}
