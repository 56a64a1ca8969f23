/*
 * Jobs of the Tinkerbell face: the body is read in the pool, then ops run one after the other, and
 * the result is kept for those who ask (see tinkerbell.h). Thread: the loop's.
 */
#include <stdio.h>
#include <string.h>

#include "api/tinkerbell/tinkerbell.h"
#include "util/clock.h"

/* ---- answers; errors are {"detail": text} */

void tb_bell_detail(struct tb_http_request *req, int status, const char *text)
{
    struct tb_buf b;
    struct tb_json_out j;
    tb_api_answer_begin(&b, &j);
    tb_jout_str(&j, "detail", text);
    tb_jout_object_end(&j);
    tb_api_answer(req, status, &b);
}

/* What the original's framework calls it, with a 500 for all but "not found" and "no key". */
void tb_bell_error(struct tb_http_request *req, const struct tb_error *e)
{
    int status = tb_error_status(e->code);
    if (status == 401 || status == 429) {
        tb_bell_detail(req, status, e->msg);
        return;
    }
    const char *name = status == 400 ? "400 Bad Request" : "500 Internal Server Error";
    tb_bell_detail(req, 500, tb_arena_printf(&req->arena, "%s: %s", name, e->msg));
}

static void answer_failed(struct tb_http_request *req, const char *what, const struct tb_error *e)
{
    tb_bell_detail(
        req, 500,
        tb_arena_printf(&req->arena, "500 Internal Server Error: %s failed: %s", what, e->msg));
}

static void answer_result(struct tb_http_request *req, const struct tb_bell_job *j)
{
    tb_http_respond(req, 200, "application/json", j->result.p, j->result.n, NULL, 0);
}

/* ---- life */

static void drop_made(struct tb_bell_job *j)
{
    while (!tb_list_empty(&j->made))
        tb_op_destroy(tb_bell_take(j));
}

static void destroy(struct tb_bell_job *j)
{
    tb_list_del(&j->node);
    tb_map_del(&j->a->bell->jobs, j->id, strlen(j->id));
    drop_made(j);
    tb_free(j->request_id);
    tb_buf_fini(&j->result);
    tb_arena_fini(&j->arena);
    tb_free(j);
}

/* The client of a sync request has gone: the job runs on. */
static void on_abort(struct tb_http_request *req)
{
    struct tb_bell_job *j = req->user;
    j->req = NULL;
}

static void over(struct tb_bell_job *j)
{
    struct tb_bell_tenant *t = j->tenant;
    struct tb_http_request *req = j->req;
    j->over = true;
    drop_made(j);
    tb_arena_fini(&j->arena);
    tb_list_push(&t->over, &j->node);
    t->n_over++;
    t->over_bytes += j->result.n;
    if (req) {
        j->req = NULL;
        req->on_abort = NULL;
        if (j->err.code)
            answer_failed(req, j->kind->title, &j->err);
        else
            answer_result(req, j);
    }
    while (t->n_over > TB_BELL_JOBS || (t->over_bytes > TB_BELL_RESULTS && t->n_over > 1)) {
        struct tb_bell_job *oldest = TB_LIST_ENTRY(t->over.next, struct tb_bell_job, node);
        t->n_over--;
        t->over_bytes -= oldest->result.n;
        destroy(oldest);
    }
}

struct tb_json_out tb_bell_result(struct tb_bell_job *j)
{
    struct tb_json_out out;
    tb_jout_init(&out, &j->result);
    tb_jout_object(&out, NULL);
    return out;
}

void tb_bell_done(struct tb_bell_job *j)
{
    if (j->result.failed) tb_error_set(&j->err, TB_ENOMEM, "no memory for the result");
    over(j);
}

void tb_bell_fail(struct tb_bell_job *j, const struct tb_error *e)
{
    j->err = *e;
    over(j);
}

/* ---- work */

void *tb_bell_room(struct tb_arena *a, size_t n, size_t size, struct tb_error *err)
{
    void *p = tb_arena_try_array(a, n + 1, size);
    if (p)
        memset(p, 0, (n + 1) * size);
    else
        tb_error_set(err, TB_ENOMEM, "no memory for %zu values", n);
    return p;
}

static void on_work(uv_work_t *w)
{
    struct tb_bell_job *j = TB_CONTAINER_OF(w, struct tb_bell_job, work);
    j->in_pool(j);
}

static void on_worked(uv_work_t *w, int status)
{
    struct tb_bell_job *j = TB_CONTAINER_OF(w, struct tb_bell_job, work);
    struct tb_api *a = j->a;
    if (status) tb_error_set(&j->err, TB_ECANCELED, "the server is stopping");
    j->then(j);
    tb_api_work_end(a);
}

void tb_bell_work(struct tb_bell_job *j, void (*work)(struct tb_bell_job *j),
                  void (*then)(struct tb_bell_job *j))
{
    j->in_pool = work;
    j->then = then;
    tb_api_work_begin(j->a);
    int rc = uv_queue_work(j->a->loop, &j->work, on_work, on_worked);
    if (rc) on_worked(&j->work, rc);
}

/* ---- ops */

struct tb_op *tb_bell_make(struct tb_bell_job *j, enum tb_op_type type)
{
    struct tb_op *op = tb_op_create(type);
    tb_list_push(&j->made, &op->node);
    return op;
}

struct tb_op *tb_bell_take(struct tb_bell_job *j)
{
    return TB_LIST_ENTRY(tb_list_pop(&j->made), struct tb_op, node);
}

/* A forward_backward left no gradient, or a step took none. A gradient that is not finite is gone.
 */
static void on_op_failed(struct tb_bell_job *j, const struct tb_error *e)
{
    struct tb_bell_adapter *ad = tb_bell_adapter_find(j->tenant, j->model_id);
    bool gone = j->n_gradients > 0 && e->code == TB_ENONFINITE;
    if (j->n_gradients && !gone && ad && ad->epoch == j->epoch) ad->n_gradients += j->n_gradients;
    tb_bell_fail(j, e);
}

static void on_op(struct tb_core_stream *s, enum tb_future_state state, const struct tb_op *op)
{
    struct tb_bell_job *j = s->arg;
    struct tb_error e = {0};
    char *id = j->request_id;
    j->request_id = NULL;
    if (state == TB_FUTURE_FAILED) e = op->error;
    if (state != TB_FUTURE_DONE && !e.code)
        tb_error_set(&e, TB_EGONE, "the server gave the operation up");
    if (e.code)
        on_op_failed(j, &e);
    else
        j->step(j, op);
    tb_core_delivered(tb_api_core(j->a), id, strlen(id));
    tb_free(id);
}

bool tb_bell_run(struct tb_bell_job *j, struct tb_op *op,
                 void (*step)(struct tb_bell_job *j, const struct tb_op *op))
{
    struct tb_core *core = tb_api_core(j->a);
    struct tb_tenant *who = j->tenant->who;
    struct tb_ticket t;
    struct tb_error e = {0};
    int64_t seq = op->seq_id;
    op->body_bytes = op->arena.total;
    j->step = step;
    if (tb_core_submit(core, who, op, &t, &e)) {
        /* nobody has taken the number, so it must not be left out */
        if (j->adapter && j->adapter->next_seq == seq + 1) j->adapter->next_seq = seq;
        on_op_failed(j, &e);
        return false;
    }
    j->request_id = tb_strdup(t.request_id);
    j->stream = (struct tb_core_stream){.end = on_op, .arg = j};
    tb_core_stream(core, who, j->request_id, strlen(j->request_id), &j->stream);
    return true;
}

/* ---- the body */

static void prepare(uv_work_t *w)
{
    struct tb_bell_job *j = TB_CONTAINER_OF(w, struct tb_bell_job, work);
    struct tb_json_doc doc = {0};
    char *plain;
    int rc = tb_api_inflate(j->a, j->encoding, &j->body, &plain, &j->err);
    if (rc == 0) rc = tb_json_parse(&doc, j->body.p, j->body.n, &j->err);
    if (rc == 0 && !tb_json_is_object(&doc.root))
        rc = tb_error_set(&j->err, TB_EPARSE, "the body is not a JSON object");
    if (rc == 0) rc = j->kind->prepare(j, &doc.root, &j->err);
    if (rc) j->err.code = rc;
    tb_json_free(&doc);
    tb_free(plain);
}

static void answer_submitted(struct tb_bell_job *j)
{
    struct tb_http_request *req = j->req;
    struct tb_buf b;
    struct tb_json_out o;
    j->req = NULL;
    tb_api_answer_begin(&b, &o);
    tb_jout_str(&o, "request_id", j->id);
    if (j->kind == &tb_bell_register_loss)
        tb_jout_str(&o, "loss_name", j->loss_name ? j->loss_name : "unknown");
    else
        tb_jout_str(&o, "model_id", j->echo ? j->echo : "unknown");
    tb_jout_object_end(&o);
    tb_api_answer(req, 200, &b);
}

static void on_prepared(uv_work_t *w, int status)
{
    struct tb_bell_job *j = TB_CONTAINER_OF(w, struct tb_bell_job, work);
    struct tb_api *a = j->a;
    if (status) tb_error_set(&j->err, TB_ECANCELED, "the server is stopping");
    j->body = (struct tb_span){NULL, 0};
    if (j->err.code == TB_EPARSE || status) { /* no job at all */
        struct tb_http_request *req = j->req;
        struct tb_error e = j->err;
        destroy(j);
        tb_bell_error(req, &e);
    } else {
        if (!j->sync) {
            answer_submitted(j);
        } else if (tb_http_request_gone(j->req)) {
            answer_failed(j->req, j->kind->title, &j->err);
            j->req = NULL;
        } else {
            j->req->user = j;
            j->req->on_abort = on_abort;
        }
        if (j->err.code)
            over(j);
        else
            j->kind->start(j);
    }
    tb_api_work_end(a);
}

void tb_bell_begin(struct tb_api *a, struct tb_http_request *req, const struct tb_bell_kind *kind,
                   bool sync)
{
    enum tb_encoding encoding;
    struct tb_error e = {0};
    if (tb_encoding_parse(tb_http_header_get(req, "Content-Encoding"), &encoding, &e)) {
        tb_bell_error(req, &e);
        return;
    }
    struct tb_bell_job *j = tb_calloc(1, sizeof(*j));
    j->a = a;
    j->tenant = tb_bell_tenant(a, tb_api_who(req));
    j->kind = kind;
    j->req = req;
    j->sync = sync;
    j->body = req->body;
    j->encoding = encoding;
    j->lora = (struct tb_lora_config){.rank = 16,
                                      .alpha = 32,
                                      .has_seed = true, /* 0, so that what is repeated repeats */
                                      .train_attn = true,
                                      .train_mlp = true,
                                      .train_unembed = true};
    tb_list_init(&j->node);
    tb_list_init(&j->made);
    tb_arena_init(&j->arena);
    tb_buf_init(&j->result, TB_API_MAX_ANSWER);
    do {
        snprintf(j->id, sizeof(j->id), "future_%08x", (unsigned)tb_random_u64());
    } while (tb_map_get(&a->bell->jobs, j->id, strlen(j->id)));
    tb_map_put(&a->bell->jobs, j->id, strlen(j->id), j);
    tb_api_work_begin(a);
    int rc = uv_queue_work(a->loop, &j->work, prepare, on_prepared);
    if (rc) on_prepared(&j->work, rc);
}

int tb_bell_body_string(struct tb_http_request *req, const char *key, const char **out)
{
    struct tb_json_doc doc;
    struct tb_error e = {0};
    *out = NULL;
    int rc = tb_api_body_parse(req, false, &doc, &e);
    if (rc == 0) rc = tb_json_string(&doc.root, key, false, &req->arena, TB_MAX_ID, out, &e);
    tb_json_free(&doc);
    if (rc) tb_bell_error(req, &e);
    return rc;
}

/* ---- /retrieve_future: an answer at once, readable any number of times */

void tb_bell_retrieve(struct tb_api *a, struct tb_http_request *req, const struct tb_route_match *m)
{
    static const char pending[] = "{\"status\":\"pending\"}";
    const char *id;
    (void)m;
    if (tb_bell_body_string(req, "request_id", &id)) return;
    if (!id) {
        struct tb_error e = {0};
        tb_error_set(&e, TB_EINVAL, "request_id is required");
        tb_bell_error(req, &e);
        return;
    }
    struct tb_bell_job *j = tb_map_get(&a->bell->jobs, id, strlen(id));
    if (!j || j->tenant->who != tb_api_who(req))
        tb_bell_detail(req, 404, "Not Found");
    else if (!j->over)
        tb_http_respond(req, 202, "application/json", pending, sizeof(pending) - 1, NULL, 0);
    else if (j->err.code)
        answer_failed(req, "Job", &j->err);
    else
        answer_result(req, j);
}

/* ---- the face's state */

void tb_bell_create(struct tb_api *a)
{
    a->bell = tb_calloc(1, sizeof(*a->bell));
    tb_map_init(&a->bell->tenants);
    tb_map_init(&a->bell->jobs);
}

void tb_bell_destroy(struct tb_bell *b)
{
    size_t it = 0, n;
    const char *key;
    void *v;
    if (!b) return;
    while (tb_map_next(&b->jobs, &it, &key, &n, &v)) {
        struct tb_bell_job *j = v;
        if (!j->over && j->request_id) tb_core_unstream(tb_api_core(j->a), &j->stream);
        if (!j->over && j->kind == &tb_bell_sample) tb_bell_sample_forget(j);
        destroy(j);
    }
    it = 0;
    while (tb_map_next(&b->tenants, &it, &key, &n, &v)) {
        struct tb_bell_tenant *t = v;
        size_t k = 0;
        while (tb_map_next(&t->adapters, &k, &key, &n, &v))
            tb_bell_adapter_free(v);
        k = 0;
        while (tb_map_next(&t->losses, &k, &key, &n, &v))
            tb_free(v);
        tb_map_fini(&t->adapters);
        tb_map_fini(&t->losses);
        tb_free(t->session_id);
        tb_free(t);
    }
    tb_map_fini(&b->tenants);
    tb_map_fini(&b->jobs);
    tb_free(b);
}
