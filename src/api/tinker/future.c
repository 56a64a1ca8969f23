/*
 * retrieve_future: a long poll that is answered when core has the result, or with try_again at the
 * deadline. The waiter is ours from tb_core_wait until its callback or tb_core_unwait; a client
 * that goes away takes it back through on_abort. Large results are encoded in the uv pool, while
 * core holds the op for us.
 */
#include <string.h>

#include "api/tinker/tinker.h"
#include "util/clock.h"
#include "util/mem.h"

enum {
    ENCODE_INLINE = 64 * 1024, /* bytes of numbers */
    /* From this size on a client that can is told the size first and fetches the payload when it
     * has room. */
    METADATA_FROM = 1 << 20,
};

struct poll {
    struct tb_waiter w;
    struct tb_api *a;
    struct tb_http_request *req;
    bool metadata_only, proto, tinkex;
    char id[TB_MAX_ID * 2 + 1];
};

static void forget(struct tb_http_request *req)
{
    struct poll *p = req->user;
    tb_core_unwait(tb_api_core(p->a), &p->w);
    tb_free(p);
}

static void answer_pending(struct poll *p, const char *queue_state, const char *reason)
{
    struct tb_buf b;
    struct tb_json_out j;
    tb_api_answer_begin(&b, &j);
    tb_jout_str(&j, "type", "try_again");
    tb_jout_str(&j, "request_id", p->id);
    tb_jout_str(&j, "queue_state", queue_state ? queue_state : "active");
    if (reason) tb_jout_str(&j, "queue_state_reason", reason);
    tb_jout_object_end(&j);
    tb_api_answer(p->req, 408, &b);
}

/* The Python SDK wants a text under "error" and tinkex an object (each fails on the other's form).
 */
static void answer_failed(struct poll *p, const struct tb_error *e)
{
    struct tb_buf b;
    struct tb_json_out j;
    const char *category = tb_category_name(tb_error_category(e->code));
    const char *text = e->msg[0] ? e->msg : tb_error_name(e->code);
    tb_api_answer_begin(&b, &j);
    if (p->tinkex) {
        tb_jout_str(&j, "status", "failed");
        tb_jout_object(&j, "error");
        tb_jout_str(&j, "message", text);
        tb_jout_str(&j, "category", category);
        tb_jout_object_end(&j);
    } else {
        tb_jout_str(&j, "error", text);
    }
    tb_jout_str(&j, "category", category);
    tb_jout_object_end(&j);
    tb_core_delivered(tb_api_core(p->a), p->id, strlen(p->id));
    tb_api_answer(p->req, 200, &b);
}

static void answer_size(struct poll *p, size_t n)
{
    struct tb_buf b;
    struct tb_json_out j;
    tb_api_answer_begin(&b, &j);
    tb_jout_str(&j, "status", "complete_metadata");
    tb_jout_int(&j, "response_payload_size", (int64_t)n);
    tb_jout_object_end(&j);
    tb_api_answer(p->req, 200, &b);
}

/* A result on its way into bytes. */
struct encoding {
    uv_work_t work;
    struct poll *p;
    const struct tb_op *op;
    bool proto;
    void *payload;
    size_t n;
    int rc;
    struct tb_error err;
};

static void encode(struct encoding *s)
{
    if (s->proto) {
        s->rc = s->op->type == TB_OP_SAMPLE
                    ? tb_encode_sample_proto(s->op, &s->payload, &s->n, &s->err)
                    : tb_encode_output_proto(s->op, &s->payload, &s->n, &s->err);
        return;
    }
    struct tb_buf b;
    struct tb_json_out j;
    tb_buf_init(&b, TB_API_MAX_ANSWER);
    tb_jout_init(&j, &b);
    tb_encode_result_json(s->op, s->p->tinkex, &j);
    if (b.failed)
        s->rc = tb_error_set(&s->err, TB_ENOMEM, "the result does not fit into memory as JSON");
    s->payload = tb_buf_steal(&b, &s->n);
}

static void deliver(struct encoding *s)
{
    struct poll *p = s->p;
    if (s->rc) {
        tb_api_error(p->req, &s->err);
    } else if (p->metadata_only && s->n >= METADATA_FROM) {
        tb_free(s->payload);
        answer_size(p, s->n);
    } else {
        tb_core_delivered(tb_api_core(p->a), p->id, strlen(p->id));
        tb_http_respond_owned(p->req, 200, s->proto ? "application/x-protobuf" : "application/json",
                              s->payload, s->n, tb_free, s->payload, NULL, 0);
    }
    tb_free(p);
}

static void on_work(uv_work_t *w)
{
    encode(TB_CONTAINER_OF(w, struct encoding, work));
}

static void on_encoded(uv_work_t *w, int status)
{
    struct encoding *s = TB_CONTAINER_OF(w, struct encoding, work);
    struct tb_api *a = s->p->a;
    if (status) s->rc = tb_error_set(&s->err, TB_ECANCELED, "encoding was canceled");
    tb_core_release(s->op);
    deliver(s);
    tb_free(s);
    tb_api_work_end(a);
}

/* Frees p, now or when the pool is done. */
static void answer_done(struct poll *p, const struct tb_op *op)
{
    bool has_proto =
        op->type == TB_OP_FORWARD || op->type == TB_OP_FORWARD_BACKWARD || op->type == TB_OP_SAMPLE;
    struct encoding s = {.p = p, .op = op, .proto = has_proto && p->proto};
    if (tb_encode_size(op) > ENCODE_INLINE) {
        struct encoding *big = tb_malloc(sizeof(*big));
        *big = s;
        if (uv_queue_work(tb_api_loop(p->a), &big->work, on_work, on_encoded) == 0) {
            tb_api_work_begin(p->a);
            tb_core_hold(op);
            return;
        }
        tb_free(big);
    }
    encode(&s);
    deliver(&s);
}

static void on_future(struct tb_waiter *w, enum tb_future_state state, const struct tb_op *op,
                      const char *queue_state, const char *reason)
{
    struct poll *p = TB_CONTAINER_OF(w, struct poll, w);
    struct tb_error e = {0};
    p->req->on_abort = NULL;
    p->req->user = NULL;
    switch (state) {
    case TB_FUTURE_DONE: answer_done(p, op); return;
    case TB_FUTURE_FAILED: answer_failed(p, &op->error); break;
    case TB_FUTURE_PENDING: answer_pending(p, queue_state, reason); break;
    case TB_FUTURE_GONE:
        tb_error_set(&e, TB_EGONE, "request %.200s has expired or was lost with a restart", p->id);
        tb_api_error(p->req, &e);
        break;
    default:
        tb_error_set(&e, TB_ENOTFOUND, "there is no request %.200s", p->id);
        tb_api_error(p->req, &e);
        break;
    }
    tb_free(p);
}

void tb_tinker_retrieve_future(struct tb_api *a, struct tb_http_request *req,
                               const struct tb_route_match *m)
{
    struct tb_json_doc doc;
    struct tb_error e = {0};
    const char *id = NULL;
    bool metadata_only = false;
    (void)m;
    if (tb_api_body(a, req, false, &doc)) return;
    int rc = tb_json_string(&doc.root, "request_id", true, &req->arena, TB_MAX_ID * 2, &id, &e);
    if (rc == 0) rc = tb_json_bool(&doc.root, "allow_metadata_only", false, &metadata_only, &e);
    tb_json_free(&doc);
    if (rc) {
        tb_api_error(req, &e);
        return;
    }
    struct poll *p = tb_calloc(1, sizeof(*p));
    p->a = a;
    p->req = req;
    p->metadata_only = metadata_only;
    p->proto = tb_span_icontains(tb_http_header_get(req, "Accept"), "x-protobuf");
    p->tinkex = tb_tinker_is_tinkex(req);
    memcpy(p->id, id, strlen(id) + 1);
    p->w.cb = on_future;
    req->user = p;
    req->on_abort = forget;
    tb_core_wait(tb_api_core(a), tb_api_who(req), p->id, strlen(p->id),
                 &p->w); /* p may be gone now */
}
