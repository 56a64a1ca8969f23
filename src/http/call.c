/*
 * In-process calls: an exchange without a connection, whose answer is collected in memory. Handing
 * over and delivering both happen in the server's wake callback, never inside of a caller's call.
 *
 * Owner: the server, in one of its three lists (new, open, done) until the callback has been
 * called, which happens exactly once. Thread: the loop's.
 */
#include <string.h>

#include "http/internal.h"
#include "util/log.h"

static void call_destroy(struct tb_http_call *k)
{
    k->server->n_calls--;
    tb_list_del(&k->node);
    tb_http_exchange_free(k->x);
    tb_arena_fini(&k->arena);
    tb_buf_fini(&k->body);
    tb_free(k);
}

int tb_http_server_call(struct tb_http_server *s, enum tb_http_method method, const char *target,
                        const struct tb_http_field *fields, size_t n_fields, const void *body,
                        size_t body_len, tb_http_reply_cb cb, void *arg, struct tb_error *err)
{
    if (s->state != TB_HTTP_RUNNING) {
        return tb_error_set(err, TB_ECANCELED, "the HTTP server is stopping");
    }
    if (body_len > s->options.max_body) {
        return tb_error_set(err, TB_ETOOBIG,
                            "request body of %zu bytes is too large: the limit is %zu", body_len,
                            s->options.max_body);
    }
    struct tb_http_exchange *x = tb_http_exchange_create(s);
    struct tb_http_request *req = &x->req;
    req->method = method;
    req->received_ms = tb_clock_ms();
    x->head = method == TB_HTTP_HEAD;
    const char *own = tb_arena_strdup(&req->arena, target);
    const char *why = tb_http_target_set(req, own, strlen(own));
    if (why) {
        tb_http_exchange_free(x);
        return tb_error_set(err, TB_EINVAL, "%s", why);
    }
    req->headers = tb_arena_calloc(&req->arena, n_fields + 1, sizeof(*req->headers));
    req->n_headers = n_fields;
    for (size_t i = 0; i < n_fields; i++) {
        req->headers[i].name = tb_span_str(tb_arena_strdup(&req->arena, fields[i].name));
        req->headers[i].value = tb_span_str(tb_arena_strdup(&req->arena, fields[i].value));
    }
    if (body_len) {
        x->body_mem = tb_try_malloc(body_len);
        if (!x->body_mem) {
            tb_http_exchange_free(x);
            return tb_error_set(err, TB_ENOMEM, "out of memory for the request body");
        }
        memcpy(x->body_mem, body, body_len);
        req->body = (struct tb_span){x->body_mem, body_len};
    }
    struct tb_http_call *k = tb_calloc(1, sizeof(*k));
    k->server = s;
    k->x = x;
    k->cb = cb;
    k->arg = arg;
    tb_arena_init(&k->arena);
    tb_buf_init(&k->body, SIZE_MAX / 2);
    x->call = k;
    s->n_calls++;
    tb_list_push(&s->calls_new, &k->node);
    tb_http_server_wake(s);
    return 0;
}

void tb_http_call_reply(struct tb_http_exchange *x, int status, const char *content_type,
                        const struct tb_http_field *fields, size_t n_fields)
{
    struct tb_http_call *k = x->call;
    k->status = status;
    k->headers = tb_arena_calloc(&k->arena, n_fields + 1, sizeof(*k->headers));
    if (content_type) {
        k->headers[k->n_headers++] = (struct tb_http_header){
            TB_SPAN_LIT("Content-Type"), tb_span_str(tb_arena_strdup(&k->arena, content_type))};
    }
    for (size_t i = 0; i < n_fields; i++) {
        k->headers[k->n_headers++] =
            (struct tb_http_header){tb_span_str(tb_arena_strdup(&k->arena, fields[i].name)),
                                    tb_span_str(tb_arena_strdup(&k->arena, fields[i].value))};
    }
}

void tb_http_call_body(struct tb_http_exchange *x, const void *p, size_t n)
{
    tb_buf_append(&x->call->body, p, n);
}

/* From open to done. */
static void call_finish(struct tb_http_call *k)
{
    tb_list_del(&k->node);
    tb_list_push(&k->server->calls_done, &k->node);
    tb_http_server_wake(k->server);
}

static void call_fail(struct tb_http_call *k, int status, const char *json)
{
    k->status = status;
    k->headers = NULL;
    k->n_headers = 0;
    tb_buf_reset(&k->body);
    tb_buf_puts(&k->body, json);
}

void tb_http_call_done(struct tb_http_exchange *x)
{
    struct tb_http_call *k = x->call;
    k->x = NULL;
    x->call = NULL;
    x->finished = true;
    if (!x->in_handler) tb_http_exchange_free(x);
    if (k->body.failed) {
        call_fail(k, 503,
                  "{\"detail\": \"out of memory\", \"message\": \"out of memory\", "
                  "\"category\": \"server\"}");
    }
    call_finish(k);
}

void tb_http_call_cut(struct tb_http_exchange *x)
{
    call_fail(x->call, 500,
              "{\"detail\": \"the answer broke off\", \"message\": \"the answer broke off\", "
              "\"category\": \"server\"}");
    tb_http_call_done(x);
}

void tb_http_calls_deliver(struct tb_http_server *s)
{
    struct tb_list done;
    tb_list_init(&done);
    tb_list_move(&done, &s->calls_done);
    for (struct tb_list *it; (it = tb_list_pop(&done));) {
        struct tb_http_call *k = TB_LIST_ENTRY(it, struct tb_http_call, node);
        struct tb_http_reply reply = {k->status, k->headers, k->n_headers, {k->body.p, k->body.n}};
        k->cb(k->arg, &reply);
        call_destroy(k);
    }
}

void tb_http_calls_run(struct tb_http_server *s)
{
    for (struct tb_list *it; s->state != TB_HTTP_CLOSING && (it = tb_list_pop(&s->calls_new));) {
        struct tb_http_call *k = TB_LIST_ENTRY(it, struct tb_http_call, node);
        tb_list_push(&s->calls_open, &k->node);
        tb_http_exchange_hand_over(k->x);
    }
    if (s->state != TB_HTTP_CLOSING) tb_http_calls_deliver(s);
}

void tb_http_calls_abort(struct tb_http_server *s)
{
    static const char json[] = "{\"detail\": \"the server is stopping\", "
                               "\"message\": \"the server is stopping\", \"category\": \"server\"}";
    tb_list_move(&s->calls_open, &s->calls_new);
    for (struct tb_list *it; (it = tb_list_pop(&s->calls_open));) {
        struct tb_http_call *k = TB_LIST_ENTRY(it, struct tb_http_call, node);
        struct tb_http_exchange *x = k->x;
        k->x = NULL;
        call_fail(k, 503, json);
        tb_list_push(&s->calls_done, &k->node);
        if (x) tb_http_exchange_abort(x);
    }
    if (!tb_list_empty(&s->calls_done)) tb_http_server_wake(s);
}
