/*
 * The port's one handler (see api.h): embedder's routes, then the faces' tables, authentication,
 * errors. A new face is one row in FACES. Thread: the loop's.
 */
#include "api/api.h"

#include <string.h>

#include "api/internal.h"
#include "api/llm/llm.h"
#include "api/tinker/tinker.h"
#include "api/tinkerbell/tinkerbell.h"
#include "util/clock.h"
#include "util/log.h"
#include "util/mem.h"

static const struct tb_face *const FACES[] = {&tb_face_tinkerbell, &tb_face_tinker,
                                              &tb_face_openai,     &tb_face_ollama,
                                              &tb_face_llamacpp,   &tb_face_admin};

struct tb_api_own_route {
    struct tb_api_own_route *next;
    enum tb_http_method method;
    char *path;
    tb_api_route_cb cb;
    void *arg;
};

/* ---- life */

static char *keep(struct tb_api *a, const char *s)
{
    return s ? tb_arena_strdup(&a->strings, s) : NULL;
}

static void finish(struct tb_api *a)
{
    void (*cb)(void *) = a->close_cb;
    void *arg = a->close_arg;
    while (a->own) {
        struct tb_api_own_route *r = a->own;
        a->own = r->next;
        tb_free(r->path);
        tb_free(r);
    }
    tb_tinker_downloads_fini(a);
    tb_bell_destroy(a->bell);
    tb_llm_models_destroy(a->llm);
    tb_arena_fini(&a->strings);
    tb_free(a);
    if (cb) cb(arg);
}

int tb_api_create(struct tb_api **out, uv_loop_t *loop, struct tb_core *core,
                  const struct tb_api_options *o, struct tb_error *err)
{
    struct tb_api *a = tb_calloc(1, sizeof(*a));
    a->loop = loop;
    a->core = core;
    a->started_us = tb_clock_wall_us();
    tb_arena_init(&a->strings);
    a->o = *o;
    a->o.api_keys = NULL; /* see a->keys */
    a->o.public_url = keep(a, o->public_url);
    a->o.version = keep(a, o->version ? o->version : "0");
    tb_map_init(&a->downloads);
    tb_list_init(&a->downloads_by_age);
    tb_bell_create(a);
    int rc = tb_api_keys_init(a, o->api_keys, o->n_api_keys, err);
    if (!rc) rc = tb_llm_models_create(a, o->renderers, err);
    if (rc) {
        finish(a);
        return rc;
    }
    *out = a;
    return 0;
}

void tb_api_set_remote(struct tb_api *a)
{
    a->o.loopback = false;
}

void tb_api_set_http(struct tb_api *a, const struct tb_http_server *http)
{
    a->http = http;
}

void tb_api_close(struct tb_api *a, void (*cb)(void *arg), void *arg)
{
    a->close_cb = cb;
    a->close_arg = arg;
    a->closing = true;
    if (a->pending == 0) finish(a);
}

void tb_api_work_begin(struct tb_api *a)
{
    a->pending++;
}

void tb_api_work_end(struct tb_api *a)
{
    TB_BUG_ON(a->pending == 0);
    if (--a->pending == 0 && a->closing) finish(a);
}

int tb_api_add_route(struct tb_api *a, enum tb_http_method method, const char *path,
                     tb_api_route_cb cb, void *arg, struct tb_error *err)
{
    if (!path || path[0] != '/' || !cb)
        return tb_error_set(err, TB_EINVAL, "route path \"%s\" does not begin with /",
                            path ? path : "");
    for (struct tb_api_own_route *r = a->own; r; r = r->next)
        if (r->method == method && strcmp(r->path, path) == 0)
            return tb_error_set(err, TB_EEXIST, "route %s is there already", path);
    struct tb_api_own_route *r = tb_calloc(1, sizeof(*r));
    *r = (struct tb_api_own_route){a->own, method, tb_strdup(path), cb, arg};
    a->own = r;
    return 0;
}

struct tb_core *tb_api_core(struct tb_api *a)
{
    return a->core;
}

const struct tb_api_options *tb_api_options_get(const struct tb_api *a)
{
    return &a->o;
}

uv_loop_t *tb_api_loop(struct tb_api *a)
{
    return a->loop;
}

/* ---- dispatch */

const char *tb_api_method_name(enum tb_http_method m)
{
    static const char *const names[] = {
        [TB_HTTP_GET] = "GET",         [TB_HTTP_HEAD] = "HEAD",     [TB_HTTP_POST] = "POST",
        [TB_HTTP_PUT] = "PUT",         [TB_HTTP_DELETE] = "DELETE", [TB_HTTP_PATCH] = "PATCH",
        [TB_HTTP_OPTIONS] = "OPTIONS",
    };
    return (size_t)m < TB_ARRAY_LEN(names) && names[m] ? names[m] : "this method";
}

const struct tb_face *tb_api_face(int i)
{
    return i < (int)TB_ARRAY_LEN(FACES) ? FACES[i] : NULL;
}

static void refuse_route(struct tb_http_request *req, unsigned allowed)
{
    if (allowed == 0) {
        struct tb_error e = {0};
        tb_error_set(&e, TB_ENOTFOUND, "no route %.*s", (int)TB_MIN(req->path.n, 200), req->path.p);
        tb_api_error(req, &e);
        return;
    }
    char list[64] = "";
    size_t n = 0;
    for (unsigned m = 0; m < 32; m++) {
        const char *name = tb_api_method_name((enum tb_http_method)m);
        size_t len = strlen(name);
        if (!(allowed & (1u << m)) || n + len + 3 > sizeof(list)) continue;
        if (n) {
            memcpy(list + n, ", ", 2);
            n += 2;
        }
        memcpy(list + n, name, len + 1);
        n += len;
    }
    struct tb_buf b;
    struct tb_json_out j;
    char text[320];
    snprintf(text, sizeof(text), "%s is not allowed on %.*s (allowed: %s)",
             tb_api_method_name(req->method), (int)TB_MIN(req->path.n, 150), req->path.p, list);
    tb_api_answer_begin(&b, &j);
    tb_jout_str(&j, "detail", text);
    tb_jout_str(&j, "message", text);
    tb_jout_str(&j, "category", "user");
    tb_jout_object_end(&j);
    struct tb_http_field allow = {"Allow", list};
    size_t len;
    char *body = tb_buf_steal(&b, &len);
    tb_http_respond_owned(req, 405, "application/json", body, len, tb_free, body, &allow, 1);
}

void tb_api_handle(void *api, struct tb_http_request *req)
{
    struct tb_api *a = api;
    enum tb_http_method method = req->method == TB_HTTP_HEAD ? TB_HTTP_GET : req->method;
    unsigned allowed = 0;
    for (struct tb_api_own_route *r = a->own; r; r = r->next) {
        if (!tb_span_eq(req->path, r->path)) continue;
        if (r->method == req->method || r->method == method) {
            if (tb_api_authorize(a, req))
                r->cb(r->arg, req);
            else
                tb_api_refuse_key(req, NULL);
            return;
        }
        allowed |= 1u << r->method;
    }
    for (size_t f = 0; f < TB_ARRAY_LEN(FACES); f++) {
        for (int i = 0; i < FACES[f]->n_routes; i++) {
            const struct tb_route *r = &FACES[f]->routes[i];
            struct tb_route_match m = {0};
            if (!tb_route_match_path(r->pattern, req->path, &m)) continue;
            if (r->method != method) {
                allowed |= 1u << r->method;
                continue;
            }
            if (r->ours && !r->ours(req)) continue;
            if (!r->open && !tb_api_authorize(a, req))
                tb_api_refuse_key(req, FACES[f]);
            else
                r->handle(a, req, &m);
            return;
        }
    }
    refuse_route(req, allowed);
}

/* ---- answers */

void tb_api_answer_begin(struct tb_buf *b, struct tb_json_out *j)
{
    tb_buf_init(b, TB_API_MAX_ANSWER);
    tb_jout_init(j, b);
    tb_jout_object(j, NULL);
}

void tb_api_answer(struct tb_http_request *req, int status, struct tb_buf *b)
{
    if (b->failed) {
        struct tb_error e = {0};
        tb_buf_fini(b);
        tb_error_set(&e, TB_EINTERNAL, "the answer does not fit into memory");
        tb_api_error(req, &e);
        return;
    }
    size_t n;
    char *p = tb_buf_steal(b, &n);
    tb_http_respond_owned(req, status, "application/json", p, n, tb_free, p, NULL, 0);
}

void tb_api_answer_empty(struct tb_http_request *req)
{
    tb_http_respond(req, 200, "application/json", "{}", 2, NULL, 0);
}

void tb_api_error(struct tb_http_request *req, const struct tb_error *err)
{
    tb_api_error_with(req, err, &(struct tb_http_field){"Retry-After", "1"},
                      tb_error_status(err->code) == 429);
}

void tb_api_error_with(struct tb_http_request *req, const struct tb_error *err,
                       const struct tb_http_field *fields, size_t n_fields)
{
    struct tb_buf b;
    struct tb_json_out j;
    int status = tb_error_status(err->code);
    const char *text = err->msg[0] ? err->msg : tb_error_name(err->code);
    tb_api_answer_begin(&b, &j);
    tb_jout_str(&j, "detail", text);
    tb_jout_str(&j, "message", text);
    tb_jout_str(&j, "category", tb_category_name(tb_error_category(err->code)));
    if (status == 429)
        tb_jout_str(&j, "queue_state",
                    err->code == TB_ERATE ? "paused_rate_limit" : "paused_capacity");
    tb_jout_object_end(&j);
    if (status >= 500)
        tb_log(TB_LOG_ERROR, "api", "%.*s: %s", (int)TB_MIN(req->path.n, 200), req->path.p, text);
    size_t n;
    char *p = tb_buf_steal(&b, &n);
    tb_http_respond_owned(req, status, "application/json", p, n, tb_free, p, fields, n_fields);
}

/* ---- requests */

int tb_api_inflate(const struct tb_api *a, enum tb_encoding enc, struct tb_span *body, char **own,
                   struct tb_error *err)
{
    size_t max = TB_MIN(a->o.max_body, (size_t)TB_MAX_INFLATE_RATIO_BODY);
    *own = NULL;
    if (enc == TB_ENC_IDENTITY) return 0;
    int rc = tb_inflate(enc, body->p, body->n, max, own, &body->n, err);
    body->p = *own;
    return rc;
}

int tb_api_body_parse(struct tb_http_request *req, bool optional, struct tb_json_doc *doc,
                      struct tb_error *err)
{
    enum { SMALL = 1 << 20 };
    enum tb_encoding enc;
    char *plain = NULL;
    struct tb_span body = req->body;
    *doc = (struct tb_json_doc){0};
    int rc = tb_encoding_parse(tb_http_header_get(req, "Content-Encoding"), &enc, err);
    if (rc) goto out;
    if (enc != TB_ENC_IDENTITY) {
        rc = tb_inflate(enc, body.p, body.n, SMALL, &plain, &body.n, err);
        if (rc) goto out;
        body.p = plain;
    }
    if (body.n == 0 && optional) body = TB_SPAN_LIT("{}");
    if (body.n > SMALL)
        rc =
            tb_error_set(err, TB_ETOOBIG,
                         "body of %zu bytes exceeds the limit of %d for this route", body.n, SMALL);
    else
        rc = tb_json_parse(doc, body.p, body.n, err);
    if (rc == 0 && !tb_json_is_object(&doc->root)) {
        tb_json_free(doc);
        rc = tb_error_set(err, TB_EPARSE, "body is not a JSON object");
    }
out:
    tb_free(plain);
    return rc;
}

int tb_api_body(struct tb_api *a, struct tb_http_request *req, bool optional,
                struct tb_json_doc *doc)
{
    struct tb_error e = {0};
    int rc = tb_api_body_parse(req, optional, doc, &e);
    (void)a;
    if (rc) tb_api_error(req, &e);
    return rc;
}

int tb_api_query_int(struct tb_http_request *req, const char *name, int64_t min, int64_t max,
                     int64_t otherwise, int64_t *out)
{
    struct tb_span v = tb_http_query_get(req, name);
    *out = otherwise;
    if (!v.p || v.n == 0) return 0;
    int64_t n;
    struct tb_error e = {0};
    if (tb_span_i64(v, &n) && n >= min && n <= max) {
        *out = n;
        return 0;
    }
    tb_error_set(&e, TB_EINVAL, "%s: \"%.*s\" is not an integer in %lld..%lld", name,
                 (int)TB_MIN(v.n, 64), v.p, (long long)min, (long long)max);
    tb_api_error(req, &e);
    return TB_EINVAL;
}

const char *tb_api_text(struct tb_http_request *req, struct tb_span s)
{
    return tb_arena_strndup(&req->arena, s.p ? s.p : "", s.n);
}

const char *tb_api_idempotency_key(struct tb_http_request *req)
{
    struct tb_span s = tb_http_header_get(req, "X-Idempotency-Key");
    return s.n > 0 && s.n <= TB_MAX_ID ? tb_api_text(req, s) : NULL;
}

/* A scheme or host from a header goes into URLs only when it looks like one. */
static bool is_host(struct tb_span s)
{
    if (s.n == 0 || s.n > 255) return false;
    for (size_t i = 0; i < s.n; i++) {
        char c = s.p[i];
        if (!((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
              strchr(".-_:[]", c)) ||
            !c)
            return false;
    }
    return true;
}

const char *tb_api_base_url(struct tb_api *a, struct tb_http_request *req)
{
    if (a->o.public_url) {
        size_t n = strlen(a->o.public_url);
        while (n && a->o.public_url[n - 1] == '/')
            n--;
        return tb_arena_strndup(&req->arena, a->o.public_url, n);
    }
    struct tb_span proto = tb_http_header_get(req, "X-Forwarded-Proto");
    struct tb_span host = tb_http_header_get(req, "X-Forwarded-Host");
    if (!is_host(host)) host = tb_http_header_get(req, "Host");
    if (!is_host(host)) host = TB_SPAN_LIT("127.0.0.1");
    return tb_arena_printf(&req->arena, "%s://%.*s", tb_span_ieq(proto, "https") ? "https" : "http",
                           (int)host.n, host.p);
}
