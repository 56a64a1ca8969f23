/*
 * Many futures at once: retrieve_futures (one long poll for all samples of a sampler's client),
 * cancel_future, join_sampling_session. The waiter is ours from tb_core_feed_wait until its
 * callback or tb_core_feed_unwait; a client that goes away takes it back through on_abort, which
 * cancels nothing. Thread: the loop's.
 */
#include <string.h>

#include "api/tinker/tinker.h"
#include "util/mem.h"

struct batch {
    struct tb_feed_waiter w;
    struct tb_api *a;
    struct tb_http_request *req;
};

static void forget(struct tb_http_request *req)
{
    struct batch *p = req->user;
    tb_core_feed_unwait(tb_api_core(p->a), &p->w);
    tb_free(p);
}

static void on_feed(struct tb_feed_waiter *w, const struct tb_error *err,
                    const struct tb_feed_event *events, size_t n, uint64_t cursor)
{
    struct batch *p = TB_CONTAINER_OF(w, struct batch, w);
    struct tb_http_request *req = p->req;
    struct tb_buf b;
    struct tb_json_out j;
    req->on_abort = NULL;
    req->user = NULL;
    tb_free(p);
    if (err->code) {
        tb_api_error(req, err);
        return;
    }
    tb_api_answer_begin(&b, &j);
    tb_jout_array(&j, "completions");
    for (size_t i = 0; i < n; i++) {
        bool failed = events[i].op->error.code != 0;
        tb_jout_object(&j, NULL);
        tb_jout_str(&j, "state", failed ? "failed" : "finished");
        tb_jout_str(&j, "request_id", events[i].request_id);
        if (!failed)
            tb_jout_int(&j, "response_payload_uncompressed_size",
                        (int64_t)tb_encode_size(events[i].op));
        tb_jout_object_end(&j);
    }
    tb_jout_array_end(&j);
    tb_jout_int(&j, "cursor", (int64_t)cursor);
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}

struct target {
    const char *sampler;
    int64_t clone, prev;
    uint64_t timeout_ms;
    struct tb_json retrieved;
};

static int read_target(struct tb_http_request *req, const struct tb_json *root, struct target *t,
                       struct tb_error *e)
{
    struct tb_json o;
    const char *type = NULL;
    double seconds = -1;
    int rc = tb_json_object(root, "target", true, &o, e);
    if (rc == 0) rc = tb_json_string(&o, "type", true, &req->arena, 64, &type, e);
    if (rc == 0 && strcmp(type, "sampling_session") != 0)
        rc = tb_json_fail(&o, e, TB_EINVAL, "type \"%s\" is not \"sampling_session\"", type);
    if (rc == 0) rc = tb_json_id(&o, "sampling_session_id", true, &req->arena, &t->sampler, e);
    if (rc == 0) rc = tb_json_int(&o, "cloned_sampler_id", false, 0, INT64_MAX, &t->clone, e);
    if (rc == 0) rc = tb_json_int(root, "prev_cursor", false, 0, INT64_MAX, &t->prev, e);
    if (rc == 0) rc = tb_json_double(root, "timeout", false, 0, 1e6, &seconds, e);
    if (rc == 0) rc = tb_json_array(root, "retrieved_request_ids", false, &t->retrieved, e);
    t->timeout_ms = seconds < 0 ? UINT64_MAX : (uint64_t)(seconds * 1000);
    return rc;
}

/* Ids of other samplers are left alone. */
static int free_retrieved(struct tb_api *a, struct tb_http_request *req, const struct target *t,
                          struct tb_error *e)
{
    struct tb_json v;
    const char *id;
    size_t n = strlen(t->sampler);
    for (size_t i = 0; i < tb_json_len(&t->retrieved); i++) {
        tb_json_at(&t->retrieved, i, &v);
        int rc = tb_json_as_string(&v, &req->arena, TB_MAX_ID * 2, &id, e);
        if (rc) return rc;
        if (strncmp(id, t->sampler, n) == 0 && id[n] == ':')
            tb_core_retrieved(tb_api_core(a), tb_api_who(req), id, strlen(id));
    }
    return 0;
}

void tb_tinker_retrieve_futures(struct tb_api *a, struct tb_http_request *req,
                                const struct tb_route_match *m)
{
    struct tb_json_doc doc;
    struct tb_error e = {0};
    struct target t = {0};
    (void)m;
    if (tb_api_body(a, req, false, &doc)) return;
    int rc = read_target(req, &doc.root, &t, &e);
    if (rc == 0) rc = free_retrieved(a, req, &t, &e);
    tb_json_free(&doc);
    if (rc) {
        tb_api_error(req, &e);
        return;
    }
    struct batch *p = tb_calloc(1, sizeof(*p));
    p->a = a;
    p->req = req;
    p->w.cb = on_feed;
    req->user = p;
    req->on_abort = forget;
    tb_core_feed_wait(tb_api_core(a), tb_api_who(req), t.sampler, t.clone, (uint64_t)t.prev,
                      t.timeout_ms, &p->w);
}

/* It may be too late to cancel, and that is fine as well: the answer is always yes. */
void tb_tinker_cancel_future(struct tb_api *a, struct tb_http_request *req,
                             const struct tb_route_match *m)
{
    const char *id = tb_tinker_body_id(a, req, "request_id", NULL);
    (void)m;
    if (!id) return;
    tb_core_cancel(tb_api_core(a), tb_api_who(req), id, strlen(id));
    tb_api_answer_empty(req);
}

void tb_tinker_join_sampling_session(struct tb_api *a, struct tb_http_request *req,
                                     const struct tb_route_match *m)
{
    struct tb_error e = {0};
    int64_t clone = 0;
    const char *id = tb_tinker_body_id(a, req, "sampling_session_id", "join_sampling_session");
    (void)m;
    if (!id) return;
    if (tb_core_join_sampling_session(tb_api_core(a), tb_api_who(req), id, &clone, &e)) {
        tb_api_error(req, &e);
        return;
    }
    struct tb_buf b;
    struct tb_json_out j;
    tb_api_answer_begin(&b, &j);
    tb_jout_int(&j, "client_counter", clone);
    tb_jout_str(&j, "type", "join_sampling_session");
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}
