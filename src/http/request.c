/*
 * Requests as handlers see them (targets, headers, query) and the life of an exchange.
 *
 * Owner: an exchange belongs to its connection or call (see internal.h). Thread: the loop's.
 */
#include <string.h>

#include "http/internal.h"
#include "util/log.h"

/* ---- targets */

static int hex(char c)
{
    if (c >= '0' && c <= '9') return c - '0';
    c |= 0x20;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* Length of the well-formed UTF-8 sequence at p, or 0 (overlong forms and surrogates are refused).
 */
static size_t utf8_len(const unsigned char *p, size_t n)
{
    if (p[0] < 0x80) return 1;
    size_t len = p[0] >= 0xF0 ? 4 : p[0] >= 0xE0 ? 3 : 2;
    if (p[0] < 0xC2 || p[0] > 0xF4 || len > n) return 0;
    for (size_t i = 1; i < len; i++) {
        if ((p[i] & 0xC0) != 0x80) return 0;
    }
    if (p[0] == 0xE0 && p[1] < 0xA0) return 0;
    if (p[0] == 0xED && p[1] > 0x9F) return 0;
    if (p[0] == 0xF0 && p[1] < 0x90) return 0;
    if (p[0] == 0xF4 && p[1] > 0x8F) return 0;
    return len;
}

static const char *path_decode(struct tb_http_request *req, const char *p, size_t n)
{
    char *out = (char *)(uintptr_t)p; /* the target's own copy when nothing is escaped */
    size_t k = n;
    if (memchr(p, '%', n)) {
        out = tb_arena_alloc(&req->arena, n); /* n <= TB_MAX_URL */
        k = 0;
        for (size_t i = 0; i < n; i++) {
            if (p[i] != '%') {
                out[k++] = p[i];
                continue;
            }
            int hi = i + 2 < n ? hex(p[i + 1]) : -1, lo = i + 2 < n ? hex(p[i + 2]) : -1;
            if (hi < 0 || lo < 0) return "malformed escape in the path";
            out[k++] = (char)(hi * 16 + lo);
            i += 2;
        }
    }
    /* Paths end up in error messages and file names. */
    for (size_t i = 0, len; i < k; i += len) {
        if (out[i] == '\0') return "NUL in the path";
        len = utf8_len((const unsigned char *)out + i, k - i);
        if (len == 0) return "path is not UTF-8";
    }
    req->path = (struct tb_span){out, k};
    return NULL;
}

const char *tb_http_target_set(struct tb_http_request *req, const char *target, size_t n)
{
    struct tb_span t = {target, n};
    if (n == 0) return "empty request target";
    if (n > TB_MAX_URL) return "request target is too long";
    if (memchr(target, '#', n)) return "fragment in the request target";
    if (tb_span_eq(t, "*")) {
        if (req->method != TB_HTTP_OPTIONS) return "malformed request target";
        req->path = TB_SPAN_LIT("/*");
        req->query = TB_SPAN_LIT("");
        return NULL;
    }
    if (target[0] != '/') {
        /* The absolute form, as sent to a proxy: its host adds nothing for us. */
        size_t skip = n > 7 && tb_span_ieq((struct tb_span){target, 7}, "http://")    ? 7
                      : n > 8 && tb_span_ieq((struct tb_span){target, 8}, "https://") ? 8
                                                                                      : 0;
        if (skip == 0) return "malformed request target";
        while (skip < n && target[skip] != '/' && target[skip] != '?')
            skip++;
        target += skip;
        n -= skip;
    }
    const char *q = n ? memchr(target, '?', n) : NULL;
    size_t path_n = q ? (size_t)(q - target) : n;
    req->query = q ? (struct tb_span){q + 1, n - path_n - 1} : (struct tb_span){"", 0};
    if (path_n == 0) {
        req->path = TB_SPAN_LIT("/");
        return NULL;
    }
    return path_decode(req, target, path_n);
}

/* ---- helpers for handlers */

struct tb_span tb_http_header_get(const struct tb_http_request *req, const char *name)
{
    for (size_t i = 0; i < req->n_headers; i++) {
        if (tb_span_ieq(req->headers[i].name, name)) return req->headers[i].value;
    }
    return (struct tb_span){NULL, 0};
}

/* application/x-www-form-urlencoded; a malformed escape stands for itself, as in browsers. */
static struct tb_span form_decode(struct tb_arena *arena, struct tb_span in)
{
    char *out = tb_arena_alloc(arena, in.n + 1);
    size_t k = 0;
    for (size_t i = 0; i < in.n; i++) {
        char c = in.p[i];
        if (c == '+') c = ' ';
        if (c == '%' && i + 2 < in.n) {
            int hi = hex(in.p[i + 1]), lo = hex(in.p[i + 2]);
            if (hi >= 0 && lo >= 0) {
                c = (char)(hi * 16 + lo);
                i += 2;
            }
        }
        out[k++] = c;
    }
    out[k] = '\0';
    return (struct tb_span){out, k};
}

struct tb_span tb_http_query_get(struct tb_http_request *req, const char *name)
{
    const char *p = req->query.p, *end = p + req->query.n;
    while (p && p < end) {
        const char *amp = memchr(p, '&', (size_t)(end - p));
        if (!amp) amp = end;
        const char *eq = memchr(p, '=', (size_t)(amp - p));
        struct tb_span key = {p, (size_t)((eq ? eq : amp) - p)};
        bool plain = !memchr(key.p, '%', key.n) && !memchr(key.p, '+', key.n);
        if (tb_span_eq(plain ? key : form_decode(&req->arena, key), name)) {
            struct tb_span value =
                eq ? (struct tb_span){eq + 1, (size_t)(amp - eq - 1)} : (struct tb_span){"", 0};
            return form_decode(&req->arena, value);
        }
        p = amp + 1;
    }
    return (struct tb_span){NULL, 0};
}

/* ---- exchanges */

struct tb_http_exchange *tb_http_exchange_create(struct tb_http_server *s)
{
    struct tb_http_exchange *x = tb_calloc(1, sizeof(*x));
    tb_arena_init(&x->req.arena);
    tb_list_init(&x->node);
    x->server = s;
    return x;
}

void tb_http_exchange_free(struct tb_http_exchange *x)
{
    if (!x) return;
    if (x->server && x->handed && !x->orphan) x->server->stats.requests_open--;
    tb_list_del(&x->node);
    if (x->file) tb_http_file_detach(x->file);
    if (x->free_body) x->free_body(x->free_arg);
    tb_free(x->body_mem);
    tb_arena_fini(&x->req.arena);
    tb_free(x);
}

void tb_http_exchange_hand_over(struct tb_http_exchange *x)
{
    struct tb_http_server *s = x->server;
    s->stats.requests_total++;
    s->stats.requests_open++;
    x->handed = true;
    x->in_handler = true;
    s->handler(s->handler_arg, &x->req);
    x->in_handler = false;
    if (x->finished) tb_http_exchange_free(x);
}

void tb_http_exchange_abort(struct tb_http_exchange *x)
{
    bool unanswered = x->handed && (!x->answered || (x->streaming && !x->ended));
    if (!unanswered) {
        tb_http_exchange_free(x);
        return;
    }
    x->aborted = true;
    x->req.conn = NULL;
    x->call = NULL;
    if (x->req.on_abort) {
        x->req.on_abort(&x->req);
        tb_http_exchange_free(x);
        return;
    }
    x->server->stats.requests_open--;
    x->orphan = true;
    tb_list_push(&x->server->orphans, &x->node);
}

bool tb_http_request_gone(struct tb_http_request *req)
{
    return tb_http_exchange_of(req)->orphan;
}

bool tb_http_answer_begin(struct tb_http_exchange *x)
{
    if (x->orphan) {
        tb_http_exchange_free(x);
        return false;
    }
    if (x->aborted || x->answered) {
        tb_log(TB_LOG_ERROR, "http", "a request was answered %s",
               x->answered ? "twice" : "after its abort");
        return false;
    }
    x->answered = true;
    return true;
}
