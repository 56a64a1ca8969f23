/*
 * What handlers share: requests of one id, requests that wait for a callback of the store or of
 * core, the frame of lists, the client's release. Thread: the loop's.
 */
#include <limits.h>
#include <string.h>

#include "api/tinker/tinker.h"
#include "util/mem.h"

/* ---- calls: the request waits for the callback */

struct call {
    struct tb_api *a;
    struct tb_http_request *req;
};

void *tb_tinker_call(struct tb_api *a, struct tb_http_request *req)
{
    struct call *c = tb_malloc(sizeof(*c));
    *c = (struct call){a, req};
    tb_api_work_begin(a);
    return c;
}

struct tb_http_request *tb_tinker_call_request(void *call, struct tb_api **a)
{
    struct call *c = call;
    *a = c->a;
    return c->req;
}

struct tb_http_request *tb_tinker_call_end(void *call, const struct tb_error *err)
{
    struct call *c = call;
    struct tb_api *a = c->a;
    struct tb_http_request *req = c->req;
    tb_free(c);
    if (err && err->code) {
        tb_api_error(req, err);
        req = NULL;
    }
    tb_api_work_end(a);
    return req;
}

struct tb_http_request *tb_tinker_call_answer(void *call, const struct tb_error *err,
                                              struct tb_buf *b, struct tb_json_out *j)
{
    struct tb_http_request *req = tb_tinker_call_end(call, err);
    if (req) tb_api_answer_begin(b, j);
    return req;
}

void tb_tinker_on_store_done(void *call, const struct tb_error *err)
{
    struct tb_http_request *req = tb_tinker_call_end(call, err);
    if (req) tb_api_answer_empty(req);
}

/* ---- requests */

const char *tb_tinker_body_id(struct tb_api *a, struct tb_http_request *req, const char *key,
                              const char *literal)
{
    struct tb_json_doc doc;
    struct tb_error e = {0};
    const char *id = NULL;
    if (tb_api_body(a, req, false, &doc)) return NULL;
    int rc = tb_json_string(&doc.root, key, true, &req->arena, TB_MAX_ID * 2, &id, &e);
    if (rc == 0 && !*id) rc = tb_error_set(&e, TB_EINVAL, "%s: is empty", key);
    if (rc == 0) rc = tb_tinker_check_type(&doc.root, literal, &e);
    tb_json_free(&doc);
    if (rc) tb_api_error(req, &e);
    return rc ? NULL : id;
}

int tb_tinker_query_page(struct tb_http_request *req, int64_t otherwise, int64_t *limit,
                         int64_t *offset)
{
    int rc = tb_api_query_int(req, "limit", 1, INT32_MAX, otherwise, limit);
    if (rc) return rc;
    *limit = TB_MIN(*limit, 1000);
    return tb_api_query_int(req, "offset", 0, INT64_MAX, 0, offset);
}

int tb_tinker_sdk_minor(const struct tb_http_request *req)
{
    struct tb_span v = tb_http_header_get(req, "X-Stainless-Package-Version");
    if (!tb_span_starts(v, "0.")) return INT_MAX;
    struct tb_span minor = {v.p + 2, 0};
    while (minor.n + 2 < v.n && minor.p[minor.n] >= '0' && minor.p[minor.n] <= '9')
        minor.n++;
    uint64_t n;
    return tb_span_u64(minor, &n) && n < INT_MAX ? (int)n : INT_MAX;
}

bool tb_tinker_is_tinkex(const struct tb_http_request *req)
{
    return tb_span_ieq(tb_http_header_get(req, "X-Stainless-Runtime"), "BEAM") ||
           tb_span_icontains(tb_http_header_get(req, "User-Agent"), "AsyncTinkex");
}

/* ---- lists */

void tb_tinker_list_end(struct tb_http_request *req, struct tb_buf *b, struct tb_json_out *j,
                        const struct tb_page *p)
{
    tb_jout_array_end(j);
    tb_jout_object(j, "cursor");
    tb_jout_int(j, "offset", p->offset);
    tb_jout_int(j, "limit", p->limit);
    tb_jout_int(j, "total_count", p->total);
    tb_jout_object_end(j);
    tb_jout_object_end(j);
    tb_api_answer(req, 200, b);
}
