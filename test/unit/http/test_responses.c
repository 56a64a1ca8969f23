/*
 * Answers: heads, HEAD, bodies that are copied or owned, streams in both protocol versions, refused
 * header values.
 */
#include "fixture.h"

#include <stdio.h>
#include <sys/socket.h>

#define GET(path) "GET " path " HTTP/1.1\r\nHost: a\r\n\r\n"

static unsigned n_freed;

static void count_free(void *p)
{
    n_freed++;
    tb_free(p);
}

enum { BIG = 20 << 20 };

static void handler(void *arg, struct tb_http_request *req)
{
    static const struct tb_http_field fields[] = {{"X-A", "1"}, {"X-B", "two words"}};
    static const struct tb_http_field closing[] = {{"Connection", "close"}};
    static const struct tb_http_field bad[][1] = {
        {{"X", "a\r\nSet-Cookie: b"}},
        {{"X", "a\nb"}},
        {{"X\r\nY", "a"}},
        {{"", "a"}},
        {{"X Y", "a"}},
        {{"X:", "a"}},
        {{"Content-Length", "3"}},
        {{"X", "a\x01"}},
        {{"transfer-encoding", "chunked"}},
    };
    struct tb_span p = req->path;
    if (tb_span_eq(p, "/fields")) {
        tb_http_respond(req, 201, "text/plain", "body", 4, fields, 2);
    } else if (tb_span_eq(p, "/close")) {
        tb_http_respond(req, 200, "text/plain", "body", 4, closing, 1);
    } else if (tb_span_starts(p, "/status/")) {
        uint64_t status = 0;
        assert_true(tb_span_u64((struct tb_span){p.p + 8, p.n - 8}, &status));
        tb_http_respond(req, (int)status, "text/plain", "body", 4, NULL, 0);
    } else if (tb_span_eq(p, "/owned")) {
        char *big = tb_malloc(BIG);
        memset(big, 'o', BIG);
        tb_http_respond_owned(req, 200, NULL, big, BIG, count_free, big, NULL, 0);
    } else if (tb_span_eq(p, "/small-owned")) {
        char *s = tb_strdup("abc");
        tb_http_respond_owned(req, 200, NULL, s, 3, tb_free, s, NULL, 0);
    } else if (tb_span_eq(p, "/copied")) {
        char *big = tb_malloc(BIG);
        memset(big, 'c', BIG);
        tb_http_respond(req, 200, NULL, big, BIG, NULL, 0);
        tb_free(big);
    } else if (tb_span_eq(p, "/bad-type")) {
        tb_http_respond(req, 200, "text/plain\r\nX: y", "body", 4, NULL, 0);
    } else if (tb_span_starts(p, "/bad/")) {
        unsigned i = (unsigned)(p.p[5] - '0');
        assert_true(i < TB_ARRAY_LEN(bad));
        tb_http_respond(req, 200, "text/plain", "body", 4, bad[i], 1);
    } else if (tb_span_eq(p, "/bad-stream")) {
        tb_http_stream_begin(req, 200, "text/plain", bad[0], 1);
        tb_http_stream_chunk(req, "abc", 3);
        tb_http_stream_end(req);
    } else if (tb_span_eq(p, "/stream")) {
        tb_http_stream_begin(req, 200, "text/plain", fields, 2);
        tb_http_stream_chunk(req, "ab", 2);
        tb_http_stream_chunk(req, "", 0); /* must not end it */
        tb_http_stream_chunk(req, "c", 1);
        tb_http_stream_end(req);
    } else if (tb_span_eq(p, "/stream-empty")) {
        tb_http_stream_begin(req, 200, "text/plain", NULL, 0);
        tb_http_stream_end(req);
    } else {
        fx_hold(arg, req);
    }
}

static void exchange(struct client *c, const char *method, const char *path, struct reply *r)
{
    char text[256];
    snprintf(text, sizeof(text), "%s %s HTTP/1.1\r\nHost: a\r\n\r\n", method, path);
    client_puts(c, text);
    client_reply(c, r, strcmp(method, "HEAD") == 0);
}

static void test_heads(void **state)
{
    struct fixture f;
    struct reply r;
    char text[128];
    fx_start(&f, NULL, handler);
    struct client *c = client_open(&f);
    exchange(c, "GET", "/fields", &r);
    assert_int_equal(r.status, 201);
    assert_memory_equal(r.head, "HTTP/1.1 201 Created\r\n", 22);
    assert_string_equal(reply_field(&r, "X-A", text, sizeof(text)), "1");
    assert_string_equal(reply_field(&r, "X-B", text, sizeof(text)), "two words");
    assert_string_equal(reply_field(&r, "Content-Type", text, sizeof(text)), "text/plain");
    assert_string_equal(reply_field(&r, "Content-Length", text, sizeof(text)), "4");
    assert_string_equal(reply_field(&r, "Server", text, sizeof(text)), "tinkerbell");
    assert_non_null(reply_field(&r, "Date", text, sizeof(text)));
    assert_int_equal(strlen(text), 29);
    assert_memory_equal(r.body, "body", 4);

    exchange(c, "HEAD", "/fields", &r); /* as GET, without the body */
    assert_int_equal(r.status, 201);
    assert_string_equal(reply_field(&r, "Content-Length", text, sizeof(text)), "4");
    exchange(c, "HEAD", "/stream", &r);
    assert_int_equal(r.status, 200);
    exchange(c, "HEAD", "/small-owned", &r);
    assert_string_equal(reply_field(&r, "Content-Length", text, sizeof(text)), "3");

    static const int without_body[] = {204, 304};
    for (size_t i = 0; i < 2; i++) {
        char path[32];
        snprintf(path, sizeof(path), "/status/%d", without_body[i]);
        exchange(c, "GET", path, &r);
        assert_int_equal(r.status, without_body[i]);
        assert_null(reply_field(&r, "Content-Length", text, sizeof(text)));
    }
    static const int odd[] = {100, 199, 600, 0};
    for (size_t i = 0; i < TB_ARRAY_LEN(odd); i++) {
        char path[32];
        snprintf(path, sizeof(path), "/status/%d", odd[i]);
        exchange(c, "GET", path, &r);
        assert_int_equal(r.status, 500);
    }
    exchange(c, "GET", "/status/499", &r);
    assert_int_equal(r.status, 499);
    exchange(c, "GET", "/close", &r);
    assert_string_equal(reply_field(&r, "Connection", text, sizeof(text)), "close");
    client_expect_eof(c);
    fx_stop(&f);
}

static void test_injection_is_refused(void **state)
{
    struct fixture f;
    struct reply r;
    char text[64];
    fx_start(&f, NULL, handler);
    struct client *c = client_open(&f);
    for (int i = 0; i < 9; i++) {
        char path[32];
        snprintf(path, sizeof(path), "/bad/%d", i);
        exchange(c, "GET", path, &r);
        assert_int_equal(r.status, 500);
        assert_null(reply_field(&r, "Set-Cookie", text, sizeof(text)));
        assert_null(reply_field(&r, "X", text, sizeof(text)));
        assert_non_null(memmem(r.body, r.body_n, "\"category\": \"server\"", 20));
    }
    exchange(c, "GET", "/bad-type", &r);
    assert_int_equal(r.status, 500);
    exchange(c, "GET", "/bad-stream", &r);
    assert_int_equal(r.status, 500);
    exchange(c, "GET", "/fields", &r); /* in step with the client all the while */
    assert_int_equal(r.status, 201);
    fx_stop(&f);
}

static void test_big_bodies(void **state)
{
    struct fixture f;
    struct reply r;
    fx_start(&f, NULL, handler);
    struct client *c = client_open(&f);
    n_freed = 0;
    for (unsigned i = 0; i < 3; i++) {
        exchange(c, "GET", "/owned", &r);
        assert_int_equal(r.body_n, BIG);
        for (size_t k = 0; k < BIG; k += 999)
            assert_int_equal(r.body[k], 'o');
        FX_UNTIL(&f, n_freed == i + 1);
        exchange(c, "GET", "/copied", &r);
        assert_int_equal(r.body_n, BIG);
        for (size_t k = 0; k < BIG; k += 999)
            assert_int_equal(r.body[k], 'c');
        tb_buf_reset(&c->in);
        c->at = 0;
    }
    /* Owned bodies are freed too when the client leaves in the middle, or before. */
    client_puts(c, GET("/owned"));
    FX_UNTIL(&f, c->in.n > 100);
    client_reset(c);
    FX_UNTIL(&f, n_freed == 4);
    c = client_open(&f);
    client_puts(c, GET("/hold"));
    FX_UNTIL(&f, f.n_held == 1);
    f.held[0]->on_abort = NULL;
    client_close(c);
    FX_UNTIL(&f, fx_stats(&f).connections_open == 0);
    char *s = tb_strdup("x");
    tb_http_respond_owned(f.held[0], 200, NULL, s, 1, count_free, s, NULL, 0);
    assert_int_equal(n_freed, 5);
    fx_stop(&f);
}

static void test_streams(void **state)
{
    struct fixture f;
    struct reply r;
    char text[64];
    fx_start(&f, NULL, handler);
    struct client *c = client_open(&f);
    for (int i = 0; i < 3; i++) {
        exchange(c, "GET", "/stream", &r);
        assert_string_equal(reply_field(&r, "Transfer-Encoding", text, sizeof(text)), "chunked");
        assert_null(reply_field(&r, "Content-Length", text, sizeof(text)));
        assert_int_equal(r.body_n, 3);
        assert_memory_equal(r.body, "abc", 3);
        exchange(c, "GET", "/stream-empty", &r);
        assert_int_equal(r.body_n, 0);
    }
    /* Chunks go out when they are said. */
    client_puts(c, GET("/hold"));
    FX_UNTIL(&f, f.n_held == 1);
    tb_http_stream_begin(f.held[0], 200, "text/event-stream", NULL, 0);
    size_t at = c->at;
    FX_UNTIL(&f, memmem(c->in.p + at, c->in.n - at, "\r\n\r\n", 4));
    for (int i = 0; i < 5; i++) {
        tb_http_stream_chunk(f.held[0], "data: x\n\n", 9);
        size_t n = c->in.n;
        FX_UNTIL(&f, c->in.n >= n + 14);
    }
    tb_http_stream_end(f.held[0]);
    client_reply(c, &r, false);
    assert_int_equal(r.body_n, 45);
    client_close(c);
    /* HTTP/1.0: no chunks, the end of the connection ends the body. */
    c = client_open(&f);
    client_puts(c, "GET /stream HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    client_reply(c, &r, false);
    assert_null(reply_field(&r, "Transfer-Encoding", text, sizeof(text)));
    assert_string_equal(reply_field(&r, "Connection", text, sizeof(text)), "close");
    assert_int_equal(r.body_n, 3);
    assert_memory_equal(r.body, "abc", 3);
    fx_stop(&f);
}

/* Back-pressure can be seen, and everything arrives in order. */
static void test_stream_pending(void **state)
{
    struct fixture f;
    struct reply r;
    fx_start(&f, NULL, handler);
    struct client *c = client_open(&f);
    client_puts(c, GET("/hold"));
    FX_UNTIL(&f, f.n_held == 1);
    struct tb_http_request *req = f.held[0];
    assert_int_equal(tb_http_stream_pending(req), 0);
    tb_http_stream_begin(req, 200, NULL, NULL, 0);
    char piece[10000];
    unsigned total = 0;
    while (tb_http_stream_pending(req) < 1 << 20 && total < 10000) {
        memset(piece, 'a' + (int)(total++ % 26), sizeof(piece));
        tb_http_stream_chunk(req, piece, sizeof(piece));
    }
    assert_true(tb_http_stream_pending(req) >= 1 << 20);
    FX_UNTIL(&f, tb_http_stream_pending(req) == 0);
    tb_http_stream_end(req);
    client_reply(c, &r, false);
    assert_int_equal(r.body_n, total * sizeof(piece));
    for (unsigned i = 0; i < total; i++)
        assert_int_equal(r.body[i * sizeof(piece)], 'a' + (int)(i % 26));
    fx_stop(&f);
}

static void test_stream_disconnect(void **state)
{
    struct fixture f;
    fx_start(&f, NULL, handler);
    /* Idle in the middle, and with much unwritten. */
    for (unsigned i = 0; i < 2; i++) {
        struct client *c = client_open(&f);
        client_puts(c, GET("/hold"));
        FX_UNTIL(&f, f.n_held == i + 1);
        tb_http_stream_begin(f.held[i], 200, NULL, NULL, 0);
        char *piece = tb_calloc(1, BIG);
        tb_http_stream_chunk(f.held[i], piece, i ? BIG : 10);
        tb_free(piece);
        client_reset(c);
        FX_UNTIL(&f, f.n_aborted == i + 1);
    }
    /* Chunks between the disconnect and its notice are ignored. */
    struct client *c = client_open(&f);
    client_puts(c, GET("/hold"));
    FX_UNTIL(&f, f.n_held == 3);
    tb_http_stream_begin(f.held[2], 200, NULL, NULL, 0);
    client_reset(c);
    for (int i = 0; i < 100; i++)
        tb_http_stream_chunk(f.held[2], "xyz", 3);
    FX_UNTIL(&f, f.n_aborted == 3);
    assert_int_equal(fx_stats(&f).requests_open, 0);
    fx_stop(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_heads),          cmocka_unit_test(test_injection_is_refused),
        cmocka_unit_test(test_big_bodies),     cmocka_unit_test(test_streams),
        cmocka_unit_test(test_stream_pending), cmocka_unit_test(test_stream_disconnect),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
