/*
 * Answers: the head, whole bodies and streams. A head is built in the server's scratch buffer and
 * goes out with the body in one write; only what the socket does not take at once is copied.
 *
 * Owner: the exchange (see internal.h); it may be freed by any call here that completes the answer.
 * Thread: the loop's.
 */
#include <stdio.h>
#include <string.h>

#include "http/internal.h"
#include "util/log.h"

static const char *reason(int status)
{
    switch (status) {
    case 200: return "OK";
    case 201: return "Created";
    case 202: return "Accepted";
    case 204: return "No Content";
    case 206: return "Partial Content";
    case 301: return "Moved Permanently";
    case 302: return "Found";
    case 303: return "See Other";
    case 304: return "Not Modified";
    case 307: return "Temporary Redirect";
    case 308: return "Permanent Redirect";
    case 400: return "Bad Request";
    case 401: return "Unauthorized";
    case 402: return "Payment Required";
    case 403: return "Forbidden";
    case 404: return "Not Found";
    case 405: return "Method Not Allowed";
    case 406: return "Not Acceptable";
    case 408: return "Request Timeout";
    case 409: return "Conflict";
    case 410: return "Gone";
    case 411: return "Length Required";
    case 412: return "Precondition Failed";
    case 413: return "Content Too Large";
    case 414: return "URI Too Long";
    case 415: return "Unsupported Media Type";
    case 416: return "Range Not Satisfiable";
    case 417: return "Expectation Failed";
    case 422: return "Unprocessable Content";
    case 425: return "Too Early";
    case 426: return "Upgrade Required";
    case 428: return "Precondition Required";
    case 429: return "Too Many Requests";
    case 431: return "Request Header Fields Too Large";
    case 500: return "Internal Server Error";
    case 501: return "Not Implemented";
    case 502: return "Bad Gateway";
    case 503: return "Service Unavailable";
    case 504: return "Gateway Timeout";
    case 505: return "HTTP Version Not Supported";
    case 507: return "Insufficient Storage";
    default: break;
    }
    switch (status / 100) {
    case 2: return "Success";
    case 3: return "Redirection";
    case 4: return "Client Error";
    default: return "Server Error";
    }
}

/* ---- the head */

static bool is_token(const char *s)
{
    if (!*s) return false;
    for (; *s; s++) {
        unsigned char c = (unsigned char)*s;
        bool alnum = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
        if (!alnum && !strchr("!#$%&'*+-.^_`|~", c)) return false;
    }
    return true;
}

static bool is_value(const char *s)
{
    for (; *s; s++) {
        unsigned char c = (unsigned char)*s;
        if ((c < 0x20 && c != '\t') || c == 0x7F) return false;
    }
    return true;
}

static bool fields_ok(const char *content_type, const struct tb_http_field *fields, size_t n)
{
    if (content_type && !is_value(content_type)) return false;
    for (size_t i = 0; i < n; i++) {
        if (!is_token(fields[i].name) || !is_value(fields[i].value)) return false;
        struct tb_span name = tb_span_str(fields[i].name);
        /* A second length would let the next answer be forged as well as a line feed does. */
        if (tb_span_ieq(name, "content-length") || tb_span_ieq(name, "transfer-encoding")) {
            return false;
        }
    }
    return true;
}

static void put(struct tb_buf *b, const char *s, size_t n)
{
    tb_buf_append(b, s, n);
}

#define PUT_LIT(b, s) put(b, s, sizeof(s) - 1)

static void put_str(struct tb_buf *b, const char *s)
{
    put(b, s, strlen(s));
}

static void put_u64(struct tb_buf *b, uint64_t v)
{
    char text[20];
    size_t at = sizeof(text);
    do {
        text[--at] = (char)('0' + v % 10);
    } while (v /= 10);
    put(b, text + at, sizeof(text) - at);
}

static const char *date(struct tb_http_server *s)
{
    int64_t now = tb_clock_wall_us();
    if (now / 1000000 != s->date_sec) {
        s->date_sec = now / 1000000;
        tb_clock_http_date(now, s->date);
    }
    return s->date;
}

static bool has_body(int status)
{
    return status != 204 && status != 304;
}

/* Builds the head in server->head. `length`: of the body, or -1 for a stream. False if it does not
 * fit. */
static bool head_build(struct tb_http_exchange *x, int status, const char *content_type,
                       int64_t length, const struct tb_http_field *fields, size_t n_fields)
{
    struct tb_http_server *s = x->server;
    struct tb_buf *b = &s->head;
    x->keep = x->req.keep_alive && s->state == TB_HTTP_RUNNING;
    for (size_t i = 0; i < n_fields; i++) {
        if (tb_span_ieq(tb_span_str(fields[i].name), "connection") &&
            tb_span_icontains(tb_span_str(fields[i].value), "close")) {
            x->keep = false;
        }
    }
    if (length < 0) {
        x->chunked = !x->http10 && has_body(status);
        if (x->http10) x->keep = false; /* the body ends with the connection */
    }
    tb_buf_reset(b);
    PUT_LIT(b, "HTTP/1.1 ");
    put_u64(b, (uint64_t)status);
    PUT_LIT(b, " ");
    put_str(b, reason(status));
    PUT_LIT(b, "\r\nServer: tinkerbell\r\nDate: ");
    put_str(b, date(s));
    if (content_type) {
        PUT_LIT(b, "\r\nContent-Type: ");
        put_str(b, content_type);
    }
    if (has_body(status) && length >= 0) {
        PUT_LIT(b, "\r\nContent-Length: ");
        put_u64(b, (uint64_t)length);
    } else if (x->chunked) {
        PUT_LIT(b, "\r\nTransfer-Encoding: chunked");
    }
    if (x->keep) {
        PUT_LIT(b, "\r\nConnection: keep-alive\r\n");
    } else {
        PUT_LIT(b, "\r\nConnection: close\r\n");
    }
    for (size_t i = 0; i < n_fields; i++) {
        if (tb_span_ieq(tb_span_str(fields[i].name), "connection")) continue;
        put_str(b, fields[i].name);
        PUT_LIT(b, ": ");
        put_str(b, fields[i].value);
        PUT_LIT(b, "\r\n");
    }
    PUT_LIT(b, "\r\n");
    return !b->failed;
}

static size_t error_json(char *out, size_t size, int status, const char *text)
{
    const char *category = status >= 500 ? "server" : "user";
    int n = snprintf(out, size, "{\"detail\": \"%s\", \"message\": \"%s\", \"category\": \"%s\"}",
                     text, text, category);
    return n < 0 ? 0 : TB_MIN((size_t)n, size - 1);
}

/* Sends the whole answer. `stable`: body lives as long as the exchange. */
static void send_whole(struct tb_http_exchange *x, int status, const char *content_type,
                       const void *body, size_t n, bool stable, const struct tb_http_field *fields,
                       size_t n_fields)
{
    char text[512];
    if (status < 200 || status > 599 || !fields_ok(content_type, fields, n_fields) ||
        (!x->call && !head_build(x, status, content_type, (int64_t)n, fields, n_fields))) {
        tb_log(TB_LOG_ERROR, "http", "refused to send an answer with an invalid head");
        status = 500;
        content_type = "application/json";
        n = error_json(text, sizeof(text), status, "invalid response header");
        body = text;
        stable = false;
        fields = NULL;
        n_fields = 0;
        if (!x->call) head_build(x, status, content_type, (int64_t)n, NULL, 0);
    }
    bool with_body = has_body(status) && !x->head && n > 0;
    if (x->call) {
        tb_http_call_reply(x, status, content_type, fields, n_fields);
        if (with_body) tb_http_call_body(x, body, n);
        tb_http_call_done(x);
        return;
    }
    struct tb_http_conn *c = x->req.conn;
    uv_buf_t bufs[2] = {{.base = x->server->head.p, .len = x->server->head.n}};
    unsigned n_bufs = 1;
    if (with_body) bufs[n_bufs++] = (uv_buf_t){.base = (char *)(uintptr_t)body, .len = n};
    if (tb_http_conn_send(c, bufs, n_bufs, stable && with_body)) tb_http_conn_sent(c);
}

/* ---- answers by handlers */

static void respond(struct tb_http_request *req, int status, const char *content_type,
                    const void *body, size_t n, void (*free_body)(void *), void *body_arg,
                    const struct tb_http_field *fields, size_t n_fields)
{
    struct tb_http_exchange *x = tb_http_exchange_of(req);
    if (!tb_http_answer_begin(x)) {
        if (free_body) free_body(body_arg);
        return;
    }
    x->free_body = free_body;
    x->free_arg = body_arg;
    send_whole(x, status, content_type, body, n, free_body != NULL, fields, n_fields);
}

void tb_http_respond(struct tb_http_request *req, int status, const char *content_type,
                     const void *body, size_t body_len, const struct tb_http_field *fields,
                     size_t n_fields)
{
    respond(req, status, content_type, body, body_len, NULL, NULL, fields, n_fields);
}

void tb_http_respond_owned(struct tb_http_request *req, int status, const char *content_type,
                           void *body, size_t body_len, void (*free_body)(void *arg),
                           void *body_arg, const struct tb_http_field *fields, size_t n_fields)
{
    respond(req, status, content_type, body, body_len, free_body, body_arg, fields, n_fields);
}

void tb_http_respond_error(struct tb_http_exchange *x, int status, const char *text, bool keep)
{
    char json[512];
    size_t n = error_json(json, sizeof(json), status, text);
    x->answered = true;
    if (!keep) x->req.keep_alive = false;
    tb_log(TB_LOG_DEBUG, "http", "refused status=%d why=%s", status, text);
    send_whole(x, status, "application/json", json, n, false, NULL, 0);
}

bool tb_http_respond_head(struct tb_http_exchange *x, int status, const char *content_type,
                          uint64_t body_len, const struct tb_http_field *fields, size_t n_fields)
{
    if (!fields_ok(content_type, fields, n_fields) ||
        (!x->call && !head_build(x, status, content_type, (int64_t)body_len, fields, n_fields))) {
        send_whole(x, 0, NULL, NULL, 0, false, NULL, 0); /* becomes the 500 */
        return false;
    }
    if (x->call) {
        tb_http_call_reply(x, status, content_type, fields, n_fields);
        return true;
    }
    uv_buf_t buf = {.base = x->server->head.p, .len = x->server->head.n};
    return tb_http_conn_send(x->req.conn, &buf, 1, false);
}

/* ---- streams */

void tb_http_stream_begin(struct tb_http_request *req, int status, const char *content_type,
                          const struct tb_http_field *fields, size_t n_fields)
{
    struct tb_http_exchange *x = tb_http_exchange_of(req);
    if (x->orphan) { /* stays until tb_http_stream_end */
        x->answered = x->streaming = true;
        return;
    }
    if (!tb_http_answer_begin(x)) return;
    if (status < 200 || status > 599 || !fields_ok(content_type, fields, n_fields) ||
        (!x->call && !head_build(x, status, content_type, -1, fields, n_fields))) {
        /* The handler goes on with its stream, so the 500 waits for its end. */
        x->streaming = x->broken = true;
        return;
    }
    x->streaming = true;
    if (x->call) {
        tb_http_call_reply(x, status, content_type, fields, n_fields);
        return;
    }
    if (!has_body(status)) x->head = true;
    uv_buf_t buf = {.base = x->server->head.p, .len = x->server->head.n};
    tb_http_conn_send(req->conn, &buf, 1, false);
}

void tb_http_stream_chunk(struct tb_http_request *req, const void *p, size_t n)
{
    struct tb_http_exchange *x = tb_http_exchange_of(req);
    if (!x->streaming || x->ended || x->aborted || x->broken || x->head || n == 0) return;
    if (x->call) {
        tb_http_call_body(x, p, n);
        return;
    }
    char size[24];
    int k = snprintf(size, sizeof(size), "%zx\r\n", n);
    static char crlf[] = "\r\n";
    uv_buf_t bufs[3] = {
        {.base = size, .len = (size_t)k},
        {.base = (char *)(uintptr_t)p, .len = n},
        {.base = crlf, .len = 2},
    };
    if (x->chunked) {
        tb_http_conn_send(req->conn, bufs, 3, false);
    } else {
        tb_http_conn_send(req->conn, bufs + 1, 1, false);
    }
}

void tb_http_stream_end(struct tb_http_request *req)
{
    struct tb_http_exchange *x = tb_http_exchange_of(req);
    if (x->orphan) {
        tb_http_exchange_free(x);
        return;
    }
    if (!x->streaming || x->ended || x->aborted) return;
    x->ended = true;
    if (x->broken) {
        send_whole(x, 0, NULL, NULL, 0, false, NULL, 0);
        return;
    }
    if (x->call) {
        tb_http_call_done(x);
        return;
    }
    struct tb_http_conn *c = req->conn;
    static char last[] = "0\r\n\r\n";
    uv_buf_t buf = {.base = last, .len = sizeof(last) - 1};
    if (x->chunked && !x->head && !tb_http_conn_send(c, &buf, 1, false)) return;
    tb_http_conn_sent(c);
}

size_t tb_http_stream_pending(const struct tb_http_request *req)
{
    if (!req->conn) return 0;
    return uv_stream_get_write_queue_size((const uv_stream_t *)&req->conn->tcp);
}
