/*
 * The server as a whole: makes engine, store, core, api and http in that order, and takes them down
 * in the reverse one. It is the implementation of include/tinkerbell.h. Everything is on the loop's
 * thread.
 */
#include "tinkerbell.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/api.h"
#include "core/core.h"
#include "engine/engine.h"
#include "http/http.h"
#include "server/options.h"
#include "store/store.h"
#include "util/limits.h"
#include "util/log.h"
#include "util/mem.h"

#ifndef TB_VERSION
#    define TB_VERSION "unknown"
#endif

#define STORE_SWEEP_MS 60000

struct host_route {
    struct host_route *next;
    tb_route_cb cb;
    void *arg;
};

struct tb_server {
    uv_loop_t *loop;
    struct tb_engine *engine;
    struct tb_store *store;
    struct tb_core *core;
    struct tb_api *api;
    struct tb_http_server *http;
    uv_timer_t sweep;
    bool sweep_open;
    struct host_route *routes;
    struct tb_arena strings; /* copies of the options' strings */
    const char *call_key;    /* an accepted key for in-process calls, or NULL */
    void (*drain_cb)(void *arg);
    void *drain_arg;
    void (*close_cb)(void *arg);
    void *close_arg;
};

const char *tb_version(void)
{
    return TB_VERSION;
}

void tb_options_init(tb_options_t *o)
{
    memset(o, 0, sizeof(*o));
    o->backend = "auto";
    o->dtype = "auto";
    o->data_dir = "tinkerbell-data";
    o->max_rank = 256;
    o->max_body = TB_MAX_BODY_DEFAULT;
    o->long_poll_ms = TB_LONG_POLL_MS;
    o->session_lease_ms = TB_SESSION_LEASE_MS;
}

int tb_options_add_model(tb_options_t *o, const char *name, const char *dir)
{
    if (o->n_models == TB_MAX_MODELS) return TB_EINVAL;
    o->models[o->n_models++] = (tb_model_option_t){.name = name, .dir = dir};
    return 0;
}

static tb_log_line_cb log_line_cb; /* set before threads start, like the level */

static void log_line(void *arg, enum tb_log_level level, const char *module, const char *text)
{
    log_line_cb(arg, (int)level, module, text);
}

void tb_set_log(int level, tb_log_line_cb cb, void *arg)
{
    log_line_cb = cb;
    tb_log_set((enum tb_log_level)level, cb ? log_line : NULL, arg);
}

static int copy_error(char out[TB_ERROR_SIZE], const struct tb_error *e)
{
    if (out) snprintf(out, TB_ERROR_SIZE, "%s", e->msg);
    return e->code ? e->code : TB_EINTERNAL;
}

/* ---- create */

static const char *keep(tb_server_t *s, const char *text)
{
    return text ? tb_arena_strdup(&s->strings, text) : NULL;
}

static int create_engine(tb_server_t *s, const tb_options_t *o, struct tb_error *err)
{
    struct tb_engine_model models[TB_MAX_MODELS];
    if (o->n_models < 1 || o->n_models > TB_MAX_MODELS)
        return tb_error_set(err, TB_EINVAL, "%d models given; 1 to %d can be served", o->n_models,
                            TB_MAX_MODELS);
    for (int i = 0; i < o->n_models; i++) {
        models[i].name = o->models[i].name;
        /* Clients on this machine are told the folder as tokenizer, so it must not be relative. A
         * folder that is not there is told by the model's own loading. */
        char *real = realpath(o->models[i].dir, NULL);
        models[i].dir = keep(s, real ? real : o->models[i].dir);
        free(real);
        models[i].tokenizer = o->models[i].tokenizer;
        for (int j = 0; j < i; j++) {
            if (strcmp(models[j].name, models[i].name) == 0)
                return tb_error_set(err, TB_EINVAL, "model name %s is given twice", models[i].name);
        }
    }
    if (o->n_devices < 0 || o->n_devices > TB_MAX_DEVICES)
        return tb_error_set(err, TB_EINVAL, "%d devices given; at most %d can be used",
                            o->n_devices, TB_MAX_DEVICES);
    struct tb_engine_options eo = {.models = models,
                                   .n_models = o->n_models,
                                   .backend = o->backend,
                                   .dtype = o->dtype,
                                   .n_threads = o->n_threads,
                                   .devices = o->devices,
                                   .n_devices = o->n_devices,
                                   .max_rank = o->max_rank,
                                   .max_context = o->max_context,
                                   .memory = o->memory,
                                   .kv_memory = o->kv_memory,
                                   .paging_dir =
                                       tb_arena_printf(&s->strings, "%s/paging", o->data_dir)};
    return tb_engine_create(&s->engine, s->loop, &eo, err);
}

static int create_api(tb_server_t *s, const tb_options_t *o, struct tb_error *err)
{
    if (o->n_api_keys < 0 || o->n_api_keys > TB_MAX_API_KEYS)
        return tb_error_set(err, TB_EINVAL, "%d API keys given; at most %d are accepted",
                            o->n_api_keys, TB_MAX_API_KEYS);
    struct tb_span key, tenant;
    if (o->n_api_keys) { /* calls of the host are made with the first */
        if (tb_api_key_split(o->api_keys[0], &key, &tenant, err)) return err->code;
        s->call_key = tb_arena_strndup(&s->strings, key.p, key.n);
    }
    const char *renderers[TB_MAX_MODELS];
    for (int i = 0; i < o->n_models; i++)
        renderers[i] = o->models[i].renderer;
    struct tb_api_options ao = {.api_keys = o->api_keys,
                                .n_api_keys = o->n_api_keys,
                                .renderers = renderers,
                                .public_url = o->public_url,
                                .loopback = true,
                                .max_body = (size_t)o->max_body,
                                .version = TB_VERSION};
    return tb_api_create(&s->api, s->loop, s->core, &ao, err);
}

static void on_sweep(uv_timer_t *t)
{
    tb_server_t *s = t->data;
    tb_store_sweep(s->store);
}

static void run_out(uv_loop_t *loop, const bool *done)
{
    while (!*done)
        uv_run(loop, UV_RUN_ONCE);
}

static void set_true(void *arg)
{
    *(bool *)arg = true;
}

int tb_server_create(tb_server_t **out, uv_loop_t *loop, const tb_options_t *o,
                     char errbuf[TB_ERROR_SIZE])
{
    struct tb_error err = {0};
    int rc;
    tb_server_t *s = tb_calloc(1, sizeof(*s));
    s->loop = loop;
    tb_arena_init(&s->strings);

    /* The store first: it is quick, and a data folder in use should be told before models are
     * loaded. */
    if ((rc = tb_store_open(&s->store, loop, o->data_dir, &err))) goto fail;
    if ((rc = create_engine(s, o, &err))) goto fail;
    struct tb_core_options co = {.long_poll_ms = o->long_poll_ms,
                                 .session_lease_ms = o->session_lease_ms,
                                 .tenant_rate = o->tenant_rate,
                                 .tenant_burst = o->tenant_burst,
                                 .tenant_queued_bytes = o->tenant_queue,
                                 .tenant_pending = o->tenant_pending};
    if ((rc = tb_core_create(&s->core, loop, s->engine, s->store, &co, &err))) goto fail;
    if ((rc = create_api(s, o, &err))) goto fail;
    struct tb_http_options ho = {.max_body = (size_t)o->max_body};
    if ((rc = tb_http_server_create(&s->http, loop, &ho, tb_api_handle, s->api, &err))) goto fail;
    tb_api_set_http(s->api, s->http);
    if ((rc = uv_timer_init(loop, &s->sweep))) {
        tb_error_set(&err, rc, "cannot create a timer: %s", uv_strerror(rc));
        goto fail;
    }
    s->sweep.data = s;
    s->sweep_open = true;
    uv_timer_start(&s->sweep, on_sweep, STORE_SWEEP_MS, STORE_SWEEP_MS);
    uv_unref((uv_handle_t *)&s->sweep);
    *out = s;
    return 0;

fail:
    copy_error(errbuf, &err);
    rc = err.code ? err.code : rc;
    {
        bool done = false;
        tb_server_close(s, set_true, &done);
        run_out(loop, &done);
    }
    return rc;
}

int tb_server_listen(tb_server_t *s, const char *host, int port, int *bound_port,
                     char errbuf[TB_ERROR_SIZE])
{
    struct tb_error err = {0};
    int rc = tb_http_server_listen(s->http, host, port, bound_port, &err);
    if (rc) return copy_error(errbuf, &err);
    if (!tb_host_is_loopback(host)) tb_api_set_remote(s->api);
    return 0;
}

/* ---- drain and close */

static void on_drained(void *arg)
{
    tb_server_t *s = arg;
    if (s->drain_cb) s->drain_cb(s->drain_arg);
}

void tb_server_drain(tb_server_t *s, unsigned grace_ms, void (*cb)(void *arg), void *arg)
{
    s->drain_cb = cb;
    s->drain_arg = arg;
    tb_core_drain(s->core);
    tb_http_server_drain(s->http, grace_ms, on_drained, s);
}

static void close_done(tb_server_t *s)
{
    void (*cb)(void *) = s->close_cb;
    void *arg = s->close_arg;
    while (s->routes) {
        struct host_route *r = s->routes;
        s->routes = r->next;
        tb_free(r);
    }
    tb_arena_fini(&s->strings);
    tb_free(s);
    if (cb) cb(arg);
}

/* Each step closes one part, the newest first, and goes on from its callback. */
static void close_next(void *arg)
{
    tb_server_t *s = arg;
    if (s->http) {
        struct tb_http_server *h = s->http;
        s->http = NULL;
        tb_http_server_close(h, close_next, s);
    } else if (s->api) {
        struct tb_api *a = s->api;
        s->api = NULL;
        tb_api_close(a, close_next, s);
    } else if (s->core) {
        struct tb_core *c = s->core;
        s->core = NULL;
        tb_core_close(c, close_next, s);
    } else if (s->engine) {
        struct tb_engine *e = s->engine;
        s->engine = NULL;
        tb_engine_close(e, close_next, s);
    } else if (s->store) {
        struct tb_store *st = s->store;
        s->store = NULL;
        tb_store_close(st, close_next, s);
    } else {
        close_done(s);
    }
}

static void on_sweep_closed(uv_handle_t *h)
{
    close_next(h->data);
}

void tb_server_close(tb_server_t *s, void (*cb)(void *arg), void *arg)
{
    s->close_cb = cb;
    s->close_arg = arg;
    if (s->sweep_open) {
        s->sweep_open = false;
        uv_close((uv_handle_t *)&s->sweep, on_sweep_closed);
    } else {
        close_next(s);
    }
}

/* ---- in-process calls */

static int parse_method(const char *text, enum tb_http_method *out)
{
    static const char *const names[] = {
        [TB_HTTP_GET] = "GET", [TB_HTTP_HEAD] = "HEAD",     [TB_HTTP_POST] = "POST",
        [TB_HTTP_PUT] = "PUT", [TB_HTTP_DELETE] = "DELETE", [TB_HTTP_PATCH] = "PATCH",
    };
    for (size_t i = 0; i < TB_ARRAY_LEN(names); i++) {
        if (names[i] && strcmp(names[i], text) == 0) {
            *out = (enum tb_http_method)i;
            return 0;
        }
    }
    return TB_EINVAL;
}

static const char *method_name(enum tb_http_method m)
{
    switch (m) {
    case TB_HTTP_GET: return "GET";
    case TB_HTTP_HEAD: return "HEAD";
    case TB_HTTP_POST: return "POST";
    case TB_HTTP_PUT: return "PUT";
    case TB_HTTP_DELETE: return "DELETE";
    case TB_HTTP_PATCH: return "PATCH";
    case TB_HTTP_OPTIONS: return "OPTIONS";
    default: return "OTHER";
    }
}

struct call {
    tb_reply_cb cb;
    void *arg;
};

static void on_reply(void *arg, const struct tb_http_reply *r)
{
    struct call *c = arg;
    char type[128];
    tb_reply_t reply = {.status = r->status, .body = r->body.p, .body_len = r->body.n};
    for (size_t i = 0; i < r->n_headers; i++) {
        if (!tb_span_ieq(r->headers[i].name, "content-type")) continue;
        snprintf(type, sizeof(type), "%.*s", (int)TB_MIN(r->headers[i].value.n, sizeof(type) - 1),
                 r->headers[i].value.p);
        reply.content_type = type;
    }
    if (c->cb) c->cb(c->arg, &reply);
    tb_free(c);
}

int tb_server_call(tb_server_t *s, const char *method, const char *target, const char *body,
                   size_t body_len, tb_reply_cb cb, void *arg, char errbuf[TB_ERROR_SIZE])
{
    struct tb_error err = {0};
    enum tb_http_method m;
    struct tb_http_field fields[3] = {{"Accept", "application/json"}};
    size_t n_fields = 1;

    if (parse_method(method, &m)) {
        tb_error_set(&err, TB_EINVAL, "method %s is not known", method);
        return copy_error(errbuf, &err);
    }
    if (body) fields[n_fields++] = (struct tb_http_field){"Content-Type", "application/json"};
    if (s->call_key) fields[n_fields++] = (struct tb_http_field){"X-API-Key", s->call_key};
    struct call *c = tb_calloc(1, sizeof(*c));
    c->cb = cb;
    c->arg = arg;
    int rc = tb_http_server_call(s->http, m, target, fields, n_fields, body, body_len, on_reply, c,
                                 &err);
    if (rc) {
        tb_free(c);
        return copy_error(errbuf, &err);
    }
    return 0;
}

/* ---- the host's routes */

struct host_request { /* in the request's arena */
    tb_request_t pub;
    struct tb_http_request *req;
    void (*gone_cb)(void *arg);
    void *gone_arg;
};

static void on_host_request(void *arg, struct tb_http_request *req)
{
    struct host_route *r = arg;
    struct host_request *h = tb_arena_calloc(&req->arena, 1, sizeof(*h));
    h->req = req;
    h->pub.method = method_name(req->method);
    h->pub.path = tb_arena_strndup(&req->arena, req->path.p, req->path.n);
    h->pub.query = tb_arena_strndup(&req->arena, req->query.p, req->query.n);
    h->pub.body = req->body.p;
    h->pub.body_len = req->body.n;
    h->pub.internal = h;
    r->cb(r->arg, &h->pub);
}

int tb_server_route(tb_server_t *s, const char *method, const char *path, tb_route_cb cb, void *arg,
                    char errbuf[TB_ERROR_SIZE])
{
    struct tb_error err = {0};
    enum tb_http_method m;
    if (parse_method(method, &m)) {
        tb_error_set(&err, TB_EINVAL, "method %s is not known", method);
        return copy_error(errbuf, &err);
    }
    struct host_route *r = tb_calloc(1, sizeof(*r));
    r->cb = cb;
    r->arg = arg;
    int rc = tb_api_add_route(s->api, m, path, on_host_request, r, &err);
    if (rc) {
        tb_free(r);
        return copy_error(errbuf, &err);
    }
    r->next = s->routes;
    s->routes = r;
    return 0;
}

static void on_host_abort(struct tb_http_request *req)
{
    struct host_request *h = req->user;
    if (h->gone_cb) h->gone_cb(h->gone_arg);
}

void tb_on_gone(tb_request_t *req, void (*cb)(void *arg), void *arg)
{
    struct host_request *h = req->internal;
    h->gone_cb = cb;
    h->gone_arg = arg;
    h->req->user = h;
    h->req->on_abort = on_host_abort;
}

void tb_respond(tb_request_t *req, int status, const char *content_type, const void *body,
                size_t body_len)
{
    struct host_request *h = req->internal;
    tb_http_respond(h->req, status, content_type, body, body_len, NULL, 0);
}
