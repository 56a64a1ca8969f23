/*
 * Byte-exact requests: what is accepted, what is refused and with which status. Every case is
 * delivered three times: in one piece, one byte at a time, and those that keep the connection all
 * pipelined.
 */
#include "fixture.h"

#include <stdio.h>
#include <sys/socket.h>

#include "util/philox.h"

#define H "Host: a\r\n"

enum { MAX_BODY = 2000 };

struct request_case {
    const char *name, *bytes;
    int status;
    bool close;      /* the server closes afterwards */
    const char *log; /* what the handler saw; NULL: it was not called */
    size_t n;        /* of bytes, when they hold a NUL */
};

static const struct request_case cases[] = {
    {"plain", "GET / HTTP/1.1\r\n" H "\r\n", 200, false, "GET /? "},
    {"query", "GET /a/b?x=1&y=%20 HTTP/1.1\r\n" H "\r\n", 200, false, "GET /a/b?x=1&y=%20 "},
    {"escapes", "GET /a%20b%2Fc%C3%A9%25 HTTP/1.1\r\n" H "\r\n", 200, false,
     "GET /a b/c\xc3\xa9%? "},
    {"absolute form", "GET http://h:80/p?q HTTP/1.1\r\n" H "\r\n", 200, false, "GET /p?q "},
    {"absolute form without path", "GET http://h HTTP/1.1\r\n" H "\r\n", 200, false, "GET /? "},
    {"absolute form with query only", "GET http://h?q=1 HTTP/1.1\r\n" H "\r\n", 200, false,
     "GET /?q=1 "},
    {"options *", "OPTIONS * HTTP/1.1\r\n" H "\r\n", 200, false, "OPTIONS /*? "},
    {"empty line first", "\r\n\r\nGET /x HTTP/1.1\r\n" H "\r\n", 200, false, "GET /x? "},
    {"other method", "PROPFIND /x HTTP/1.1\r\n" H "\r\n", 200, false, "OTHER /x? "},
    {"delete", "DELETE /x HTTP/1.1\r\n" H "\r\n", 200, false, "DELETE /x? "},
    {"empty host", "GET /x HTTP/1.1\r\nHost:\r\n\r\n", 200, false, "GET /x? "},
    {"host with port", "GET /x HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n", 200, false, "GET /x? "},
    {"http/1.0", "GET /x HTTP/1.0\r\n\r\n", 200, true, "GET /x? "},
    {"http/1.0 keep-alive", "GET /x HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", 200, false,
     "GET /x? "},
    {"connection close", "GET /x HTTP/1.1\r\n" H "Connection: Close\r\n\r\n", 200, true,
     "GET /x? "},
    {"upgrade is ignored",
     "GET /x HTTP/1.1\r\n" H
     "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: A\r\n\r\n",
     200, false, "GET /x? "},
    {"upgrade with a body",
     "POST /x HTTP/1.1\r\n" H
     "Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 3\r\n\r\nabc",
     200, false, "POST /x? abc"},
    {"body", "POST /x HTTP/1.1\r\n" H "Content-Length: 5\r\n\r\nhello", 200, false,
     "POST /x? hello"},
    {"put", "PUT /x HTTP/1.1\r\n" H "Content-Length: 2\r\n\r\nhi", 200, false, "PUT /x? hi"},
    {"patch", "PATCH /x HTTP/1.1\r\n" H "Content-Length: 2\r\n\r\nhi", 200, false, "PATCH /x? hi"},
    {"get with body", "GET /x HTTP/1.1\r\n" H "Content-Length: 2\r\n\r\nhi", 200, false,
     "GET /x? hi"},
    {"empty body", "POST /x HTTP/1.1\r\n" H "Content-Length: 0\r\n\r\n", 200, false, "POST /x? "},
    {"no length", "POST /x HTTP/1.1\r\n" H "\r\n", 200, false, "POST /x? "},
    {"body that looks like a folded line",
     "POST /x HTTP/1.1\r\n" H "Content-Length: 9\r\n\r\n a\n b\r\n c", 200, false,
     "POST /x?  a\n b\r\n c"},
    {"body that looks like a request",
     "POST /x HTTP/1.1\r\n" H "Content-Length: 18\r\n\r\nGET / HTTP/1.1\r\n\r\n", 200, false,
     "POST /x? GET / HTTP/1.1\r\n\r\n"},
    {"chunked",
     "POST /x HTTP/1.1\r\n" H
     "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n",
     200, false, "POST /x? hello world"},
    {"chunked, capitals, extension",
     "POST /x HTTP/1.1\r\n" H "Transfer-Encoding: Chunked\r\n\r\nA;a=b\r\n0123456789\r\n0\r\n\r\n",
     200, false, "POST /x? 0123456789"},
    {"chunked, empty", "POST /x HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 200,
     false, "POST /x? "},
    {"chunked, trailers",
     "POST /x HTTP/1.1\r\n" H
     "Transfer-Encoding: chunked\r\n\r\n2\r\n\n \r\n0\r\nX-Sum: 1\r\nContent-Length: 9\r\n\r\n",
     200, false, "POST /x? \n "},
    {"expectation without a body", "GET /x HTTP/1.1\r\n" H "Expect: 100-continue\r\n\r\n", 200,
     false, "GET /x? "},
    {"http/1.0 ignores expectations",
     "POST /x HTTP/1.0\r\nExpect: magic\r\nContent-Length: 1\r\nConnection: keep-alive\r\n\r\nz",
     200, false, "POST /x? z"},
    {"odd but valid headers",
     "GET /x HTTP/1.1\r\n" H "a:\r\nB:  v \t \r\nx-obs: \xe9\xff\r\n!#$%&'*+-.^_`|~: y\r\n\r\n",
     200, false, "GET /x? "},

    {"no host", "GET /x HTTP/1.1\r\n\r\n", 400, true, NULL},
    {"two hosts", "GET /x HTTP/1.1\r\n" H "host: b\r\n\r\n", 400, true, NULL},
    {"host with a slash", "GET /x HTTP/1.1\r\nHost: a/b\r\n\r\n", 400, true, NULL},
    {"host with a space", "GET /x HTTP/1.1\r\nHost: a b\r\n\r\n", 400, true, NULL},
    {"folded header", "GET /x HTTP/1.1\r\n" H "A: b\r\n c\r\n\r\n", 400, true, NULL},
    {"folded by tab", "GET /x HTTP/1.1\r\n" H "A: b\r\n\tc\r\n\r\n", 400, true, NULL},
    {"folded content-length", "POST /x HTTP/1.1\r\n" H "Content-Length:\r\n 5\r\n\r\nhello", 400,
     true, NULL},
    {"folded transfer-encoding",
     "POST /x HTTP/1.1\r\n" H "Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", 400, true, NULL},
    {"folded first line", "GET /x HTTP/1.1\r\n " H "\r\n", 400, true, NULL},
    {"folded trailer",
     "POST /x HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n0\r\nA: b\r\n c\r\n\r\n", 400,
     true, NULL},
    {"bare line feeds", "GET /x HTTP/1.1\nHost: a\n\n", 400, true, NULL},
    {"bare line feed after a header", "GET /x HTTP/1.1\r\nHost: a\nB: c\r\n\r\n", 400, true, NULL},
    {"bare carriage returns", "GET /x HTTP/1.1\rHost: a\r\r", 400, true, NULL},
    {"carriage return in a value", "GET /x HTTP/1.1\r\n" H "A: b\rc: d\r\n\r\n", 400, true, NULL},
    {"space before the colon", "GET /x HTTP/1.1\r\n" H "A : b\r\n\r\n", 400, true, NULL},
    {"space in the name", "GET /x HTTP/1.1\r\n" H "A b: c\r\n\r\n", 400, true, NULL},
    {"no colon", "GET /x HTTP/1.1\r\n" H "Abc\r\n\r\n", 400, true, NULL},
    {"empty name", "GET /x HTTP/1.1\r\n" H ": b\r\n\r\n", 400, true, NULL},
    {"empty name and value", "GET /x HTTP/1.1\r\n" H ":\r\n\r\n", 400, true, NULL},
    {"empty name first", "GET /x HTTP/1.1\r\n: b\r\n" H "\r\n", 400, true, NULL},
    {"NUL in a value", "GET /x HTTP/1.1\r\n" H "A: b\0c\r\n\r\n", 400, true, NULL, 37},
    {"control character in a value",
     "GET /x HTTP/1.1\r\n" H "A: b\x01"
     "c\r\n\r\n",
     400, true, NULL},
    {"length and chunks",
     "POST /x HTTP/1.1\r\n" H "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
     400, true, NULL},
    {"chunks and length",
     "POST /x HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
     400, true, NULL},
    {"two lengths", "POST /x HTTP/1.1\r\n" H "Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
     400, true, NULL},
    {"two equal lengths",
     "POST /x HTTP/1.1\r\n" H "Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", 400, true,
     NULL},
    {"length with a sign", "POST /x HTTP/1.1\r\n" H "Content-Length: +5\r\n\r\nhello", 400, true,
     NULL},
    {"negative length", "POST /x HTTP/1.1\r\n" H "Content-Length: -5\r\n\r\nhello", 400, true,
     NULL},
    {"hex length", "POST /x HTTP/1.1\r\n" H "Content-Length: 0x5\r\n\r\nhello", 400, true, NULL},
    {"length list", "POST /x HTTP/1.1\r\n" H "Content-Length: 5,5\r\n\r\nhello", 400, true, NULL},
    {"length with a space", "POST /x HTTP/1.1\r\n" H "Content-Length: 1 5\r\n\r\nhello", 400, true,
     NULL},
    {"empty length", "POST /x HTTP/1.1\r\n" H "Content-Length:\r\n\r\nhello", 400, true, NULL},
    {"length overflow",
     "POST /x HTTP/1.1\r\n" H "Content-Length: 18446744073709551621\r\n\r\nhello", 400, true, NULL},
    {"unknown coding", "POST /x HTTP/1.1\r\n" H "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501,
     true, NULL},
    {"gzip coding", "POST /x HTTP/1.1\r\n" H "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
     501, true, NULL},
    {"chunked not last",
     "POST /x HTTP/1.1\r\n" H "Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n", 400, true, NULL},
    {"chunked twice",
     "POST /x HTTP/1.1\r\n" H
     "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
     400, true, NULL},
    {"chunks in http/1.0", "POST /x HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400,
     true, NULL},
    {"chunk size is no number", "POST /x HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\nzz\r\n",
     400, true, NULL},
    {"hex prefix",
     "POST /x HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n0x5\r\nhello\r\n0\r\n\r\n", 400,
     true, NULL},
    {"negative chunk", "POST /x HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n-1\r\n", 400,
     true, NULL},
    {"space before a chunk size",
     "POST /x HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n 5\r\nhello", 400, true, NULL},
    {"chunk size overflow",
     "POST /x HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n10000000000000005\r\nhello", 400,
     true, NULL},
    {"chunk longer than said",
     "POST /x HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n4\r\nhello\r\n0\r\n\r\n", 400,
     true, NULL},
    {"bare line feed in chunks",
     "POST /x HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n5\nhello", 400, true, NULL},
    {"http/2.0", "GET /x HTTP/2.0\r\n" H "\r\n", 505, true, NULL},
    {"http/1.2", "GET /x HTTP/1.2\r\n" H "\r\n", 505, true, NULL},
    {"http/3.0", "GET /x HTTP/3.0\r\n" H "\r\n", 505, true, NULL},
    {"http/2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, true, NULL},
    {"version without a dot", "GET /x HTTP/11\r\n" H "\r\n", 400, true, NULL},
    {"version with a tail", "GET /x HTTP/1.1x\r\n" H "\r\n", 400, true, NULL},
    {"no protocol", "GET /x FTP/1.1\r\n" H "\r\n", 400, true, NULL},
    {"lower-case method", "get /x HTTP/1.1\r\n" H "\r\n", 400, true, NULL},
    {"unknown method", "FETCH /x HTTP/1.1\r\n" H "\r\n", 400, true, NULL},
    {"TLS", "\x16\x03\x01\x02", 400, true, NULL},
    {"connect", "CONNECT a:80 HTTP/1.1\r\n" H "\r\n", 501, true, NULL},
    {"get *", "GET * HTTP/1.1\r\n" H "\r\n", 400, true, NULL},
    {"target without a slash", "GET x HTTP/1.1\r\n" H "\r\n", 400, true, NULL},
    {"other scheme", "GET ftp://h/x HTTP/1.1\r\n" H "\r\n", 400, true, NULL},
    {"half an escape", "GET /%4 HTTP/1.1\r\n" H "\r\n", 400, true, NULL},
    {"no escape", "GET /%zz HTTP/1.1\r\n" H "\r\n", 400, true, NULL},
    {"escaped NUL", "GET /%00 HTTP/1.1\r\n" H "\r\n", 400, true, NULL},
    {"escaped latin-1", "GET /%e9 HTTP/1.1\r\n" H "\r\n", 400, true, NULL},
    {"escaped surrogate", "GET /%ED%A0%80 HTTP/1.1\r\n" H "\r\n", 400, true, NULL},
    {"overlong escape", "GET /%C0%AF HTTP/1.1\r\n" H "\r\n", 400, true, NULL},
    {"fragment", "GET /x#y HTTP/1.1\r\n" H "\r\n", 400, true, NULL},
    {"raw bytes in the target", "GET /\xc3\xa9 HTTP/1.1\r\n" H "\r\n", 400, true, NULL},
    {"tab in the target", "GET /a\tb HTTP/1.1\r\n" H "\r\n", 400, true, NULL},
    {"unknown expectation", "POST /x HTTP/1.1\r\n" H "Expect: magic\r\nContent-Length: 1\r\n\r\nz",
     417, true, NULL},
    {"too long a body", "POST /x HTTP/1.1\r\n" H "Content-Length: 2001\r\n\r\n", 413, true, NULL},
    {"absurd length", "POST /x HTTP/1.1\r\n" H "Content-Length: 18446744073709551615\r\n\r\n", 413,
     true, NULL},
    {"too long a chunk", "POST /x HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n7d1\r\n", 413,
     true, NULL},
    {"too long a body with an expectation",
     "POST /x HTTP/1.1\r\n" H "Expect: 100-continue\r\nContent-Length: 2001\r\n\r\n", 413, true,
     NULL},
};

static size_t case_len(const struct request_case *k)
{
    return k->n ? k->n : strlen(k->bytes);
}

static void check_reply(struct client *c, const struct request_case *k)
{
    struct reply r;
    char text[128];
    client_reply(c, &r, false);
    if (r.status != k->status) {
        fail_msg("%s: status %d instead of %d: %.*s", k->name, r.status, k->status, (int)r.body_n,
                 r.body);
    }
    assert_non_null(reply_field(&r, "Content-Length", text, sizeof(text)));
    assert_non_null(reply_field(&r, "Date", text, sizeof(text)));
    assert_non_null(reply_field(&r, "Server", text, sizeof(text)));
    assert_string_equal(reply_field(&r, "Connection", text, sizeof(text)),
                        k->close ? "close" : "keep-alive");
    if (k->log) {
        if (r.body_n != strlen(k->log) || memcmp(r.body, k->log, r.body_n) != 0) {
            fail_msg("%s: the handler saw '%.*s'", k->name, (int)r.body_n, r.body);
        }
        return;
    }
    assert_string_equal(reply_field(&r, "Content-Type", text, sizeof(text)), "application/json");
    char body[512];
    assert_true(r.body_n > 0 && r.body_n < sizeof(body));
    memcpy(body, r.body, r.body_n);
    body[r.body_n] = '\0';
    char detail[256], message[256], category[16];
    int end = 0;
    assert_int_equal(
        sscanf(
            body,
            "{\"detail\": \"%255[^\"]\", \"message\": \"%255[^\"]\", \"category\": \"%15[a-z]\"}%n",
            detail, message, category, &end),
        3);
    assert_int_equal(end, r.body_n);
    assert_string_equal(detail, message);
    assert_string_equal(category, k->status >= 500 ? "server" : "user");
}

static void run_alone(size_t step)
{
    struct fixture f;
    fx_start(&f, &(struct tb_http_options){.max_body = MAX_BODY}, fx_echo);
    for (size_t i = 0; i < TB_ARRAY_LEN(cases); i++) {
        const struct request_case *k = &cases[i];
        tb_buf_reset(&f.log);
        struct client *c = client_open(&f);
        client_send_slowly(c, k->bytes, case_len(k), step);
        check_reply(c, k);
        char want[256] = "";
        if (k->log) snprintf(want, sizeof(want), "%s\n", k->log);
        assert_string_equal(f.log.p ? f.log.p : "", want);
        if (k->close) {
            client_expect_eof(c);
            assert_false(c->reset);
        } else {
            client_puts(c, "GET /after HTTP/1.1\r\n" H "\r\n"); /* the framing is intact */
            client_expect(c, 200, "GET /after? ");
        }
        client_close(c);
    }
    FX_UNTIL(&f, fx_stats(&f).connections_open == 0);
    assert_int_equal(fx_stats(&f).requests_open, 0);
    fx_stop(&f);
}

static void test_in_one_piece(void **state)
{
    run_alone(SIZE_MAX);
}

static void test_one_byte_at_a_time(void **state)
{
    run_alone(1);
}

static void test_seven_bytes_at_a_time(void **state)
{
    run_alone(7);
}

/* All that keep the connection, ten times over, in pieces that end anywhere; then one that is
 * refused. */
static void test_pipelined(void **state)
{
    struct tb_buf all;
    tb_buf_init(&all, 1 << 20);
    enum { ROUNDS = 10 };
    for (int round = 0; round < ROUNDS; round++) {
        for (size_t i = 0; i < TB_ARRAY_LEN(cases); i++) {
            if (!cases[i].close) tb_buf_append(&all, cases[i].bytes, case_len(&cases[i]));
        }
    }
    tb_buf_puts(&all, "GET /bad HTTP/1.1\r\n\r\nGET /never HTTP/1.1\r\n" H "\r\n");
    static const size_t steps[] = {SIZE_MAX, 1000, 61};
    for (size_t s = 0; s < TB_ARRAY_LEN(steps); s++) {
        struct fixture f;
        fx_start(&f, &(struct tb_http_options){.max_body = MAX_BODY}, fx_echo);
        struct client *c = client_open(&f);
        if (steps[s] == SIZE_MAX) {
            client_send(c, all.p, all.n);
        } else {
            client_send_slowly(c, all.p, all.n, steps[s]);
        }
        for (int round = 0; round < ROUNDS; round++) {
            for (size_t i = 0; i < TB_ARRAY_LEN(cases); i++) {
                if (!cases[i].close) check_reply(c, &cases[i]);
            }
        }
        client_expect(c, 400, NULL);
        client_expect_eof(c);
        assert_null(strstr(f.log.p, "never"));
        fx_stop(&f);
    }
    tb_buf_fini(&all);
}

static void one(struct fixture *f, const char *bytes, size_t n, int status, const char *detail)
{
    for (int slow = 0; slow < 2; slow++) {
        struct client *c = client_open(f);
        if (slow) {
            client_send_slowly(c, bytes, n, 97);
        } else {
            client_send(c, bytes, n);
        }
        struct reply r;
        client_reply(c, &r, false);
        assert_int_equal(r.status, status);
        if (detail) assert_non_null(memmem(r.body, r.body_n, detail, strlen(detail)));
        client_close(c);
    }
}

static void test_limits(void **state)
{
    struct fixture f;
    fx_start(&f, &(struct tb_http_options){.max_body = MAX_BODY}, fx_echo);
    struct tb_buf b;
    tb_buf_init(&b, 1 << 20);

    /* the target */
    for (int over = 0; over < 2; over++) {
        tb_buf_reset(&b);
        tb_buf_puts(&b, "GET /");
        for (int i = 0; i < TB_MAX_URL - 1 + over; i++)
            tb_buf_puts(&b, "u");
        tb_buf_puts(&b, " HTTP/1.1\r\n" H "\r\n");
        one(&f, b.p, b.n, over ? 414 : 200, over ? "target is too long" : NULL);
    }
    /* the number of headers */
    for (int over = 0; over < 2; over++) {
        tb_buf_reset(&b);
        tb_buf_puts(&b, "GET / HTTP/1.1\r\n" H);
        for (int i = 0; i < TB_MAX_HEADERS - 1 + over; i++)
            tb_buf_printf(&b, "h%d: v\r\n", i);
        tb_buf_puts(&b, "\r\n");
        one(&f, b.p, b.n, over ? 431 : 200, over ? "too many headers" : NULL);
    }
    /* their bytes, at the exact border */
    for (int over = 0; over < 2; over++) {
        tb_buf_reset(&b);
        tb_buf_puts(&b, "GET / HTTP/1.1\r\n" H "big: ");
        while (b.n < (size_t)TB_MAX_HEADER_BYTES - 4 + (size_t)over)
            tb_buf_puts(&b, "x");
        tb_buf_puts(&b, "\r\n\r\n");
        one(&f, b.p, b.n, over ? 431 : 200, over ? "headers are too large" : NULL);
    }
    /* an endless header line is refused before its end */
    tb_buf_reset(&b);
    tb_buf_puts(&b, "GET / HTTP/1.1\r\nbig: ");
    while (b.n < (size_t)TB_MAX_HEADER_BYTES + 1)
        tb_buf_puts(&b, "x");
    one(&f, b.p, b.n, 431, NULL);
    /* trailers count as headers */
    tb_buf_reset(&b);
    tb_buf_puts(&b, "POST / HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n0\r\nbig: ");
    while (b.n < (size_t)TB_MAX_HEADER_BYTES + 10)
        tb_buf_puts(&b, "x");
    one(&f, b.p, b.n, 431, NULL);
    /* chunk extensions */
    tb_buf_reset(&b);
    tb_buf_puts(&b, "POST / HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n1;a=");
    for (int i = 0; i < 17 * 1024; i++)
        tb_buf_puts(&b, "x");
    one(&f, b.p, b.n, 413, "chunk extensions");
    /* the body, at the exact border, in both framings */
    for (int over = 0; over < 2; over++) {
        tb_buf_reset(&b);
        tb_buf_printf(&b, "POST / HTTP/1.1\r\n" H "Content-Length: %d\r\n\r\n", MAX_BODY + over);
        for (int i = 0; i < MAX_BODY + over; i++)
            tb_buf_puts(&b, "b");
        one(&f, b.p, b.n, over ? 413 : 200,
            over ? "2001 bytes is too large: the limit is 2000" : NULL);
        tb_buf_reset(&b);
        tb_buf_puts(&b, "POST / HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n");
        for (int i = 0; i < MAX_BODY / 100; i++) {
            tb_buf_puts(&b, "64\r\n");
            for (int k = 0; k < 100; k++)
                tb_buf_puts(&b, "c");
            tb_buf_puts(&b, "\r\n");
        }
        tb_buf_puts(&b, over ? "1\r\nx\r\n0\r\n\r\n" : "0\r\n\r\n");
        one(&f, b.p, b.n, over ? 413 : 200,
            over ? "2001 bytes is too large: the limit is 2000" : NULL);
    }
    tb_buf_fini(&b);
    fx_stop(&f);
}

/* ---- 100-continue */

static void test_continue(void **state)
{
    struct fixture f;
    fx_start(&f, &(struct tb_http_options){.max_body = MAX_BODY}, fx_echo);
    struct client *c = client_open(&f);
    for (int i = 0; i < 3; i++) {
        struct reply r;
        client_puts(c,
                    "POST /x HTTP/1.1\r\n" H "Expect: 100-Continue\r\nContent-Length: 5\r\n\r\n");
        client_reply(c, &r, true);
        assert_string_equal(r.head, "HTTP/1.1 100 Continue\r\n\r\n");
        client_puts(c, "hello");
        client_expect(c, 200, "POST /x? hello");
    }
    /* chunked */
    struct reply r;
    client_puts(c, "POST /x HTTP/1.1\r\n" H
                   "Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n");
    client_reply(c, &r, true);
    assert_int_equal(r.status, 100);
    client_puts(c, "2\r\nhi\r\n0\r\n\r\n");
    client_expect(c, 200, "POST /x? hi");
    /* who does not wait is not told */
    client_puts(c,
                "POST /x HTTP/1.1\r\n" H "Expect: 100-continue\r\nContent-Length: 5\r\n\r\nhello");
    client_expect(c, 200, "POST /x? hello");
    fx_stop(&f);
}

/* ---- what handlers see */

static unsigned n_seen;

static void inspect(void *arg, struct tb_http_request *req)
{
    n_seen++;
    assert_int_equal(req->n_headers, 5);
    assert_true(tb_span_eq(req->headers[1].name, "X-One"));
    assert_true(
        tb_span_eq(tb_http_header_get(req, "x-one"), "first")); /* trimmed; the first of two */
    struct tb_span empty = tb_http_header_get(req, "x-empty");
    assert_non_null(empty.p);
    assert_int_equal(empty.n, 0);
    assert_null(tb_http_header_get(req, "x-none").p);
    assert_true(tb_span_eq(tb_http_query_get(req, "a"), "1 2"));
    assert_true(tb_span_eq(tb_http_query_get(req, "b c"), "\xc3\xa9&="));
    assert_true(tb_span_eq(tb_http_query_get(req, "odd"), "%zz%4"));
    struct tb_span flag = tb_http_query_get(req, "flag");
    assert_non_null(flag.p);
    assert_int_equal(flag.n, 0);
    assert_null(tb_http_query_get(req, "none").p);
    assert_null(tb_http_query_get(req, "").p);
    assert_int_equal(req->method, TB_HTTP_GET);
    assert_true(req->keep_alive);
    assert_true(req->received_ms > 0);
    tb_http_respond(req, 204, NULL, NULL, 0, NULL, 0);
}

static void test_helpers(void **state)
{
    static const char bytes[] =
        "GET /x?a=1+2&a=3&flag&b%20c=%C3%A9%26%3d&odd=%zz%4 HTTP/1.1\r\n" H
        "X-One: \t first \t\r\nX-One: second\r\nx-empty: \r\nlast: x\r\n\r\n";
    struct fixture f;
    fx_start(&f, NULL, inspect);
    n_seen = 0;
    for (size_t step = 1; step < sizeof(bytes); step = step * 2 + 1) {
        struct client *c = client_open(&f);
        client_send_slowly(c, bytes, sizeof(bytes) - 1, step);
        struct reply r;
        char text[32];
        client_reply(c, &r, false);
        assert_int_equal(r.status, 204);
        assert_null(reply_field(&r, "Content-Length", text, sizeof(text)));
        client_close(c);
    }
    assert_int_equal(n_seen, 6);
    fx_stop(&f);
}

/* ---- memory */

static size_t body_seen;

static void count_body(void *arg, struct tb_http_request *req)
{
    body_seen = req->body.n;
    for (size_t i = 0; i < req->body.n; i += 4099) {
        assert_int_equal((unsigned char)req->body.p[i], (i * 7) & 0xff);
    }
    tb_http_respond(req, 200, NULL, NULL, 0, NULL, 0);
}

static void test_big_bodies(void **state)
{
    struct fixture f;
    fx_start(&f, NULL, count_body);
    static const size_t sizes[] = {1, 1023, 1024, 1025, 65535, 65536, 65537, 1000003, 16 << 20};
    char *data = tb_malloc(sizes[TB_ARRAY_LEN(sizes) - 1]);
    for (size_t i = 0; i < sizes[TB_ARRAY_LEN(sizes) - 1]; i++)
        data[i] = (char)(i * 7);
    struct client *c = client_open(&f);
    for (size_t i = 0; i < TB_ARRAY_LEN(sizes); i++) {
        char head[128];
        snprintf(head, sizeof(head), "POST / HTTP/1.1\r\n" H "Content-Length: %zu\r\n\r\n",
                 sizes[i]);
        client_puts(c, head);
        client_send(c, data, sizes[i]);
        client_expect(c, 200, "");
        assert_int_equal(body_seen, sizes[i]);
        client_puts(c, "POST / HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n");
        size_t at = 0;
        for (size_t piece = 1; at < sizes[i]; piece = piece * 3 + 1) {
            size_t k = TB_MIN(piece, sizes[i] - at);
            snprintf(head, sizeof(head), "%zx\r\n", k);
            client_puts(c, head);
            client_send(c, data + at, k);
            client_puts(c, "\r\n");
            at += k;
        }
        client_puts(c, "0\r\n\r\n");
        client_expect(c, 200, "");
        assert_int_equal(body_seen, sizes[i]);
    }
    tb_free(data);
    fx_stop(&f);
}

/* Each allocation whose size the client decides fails once: the answer is 503 or the connection is
 * closed, and the server goes on. */
static void test_failing_allocations(void **state)
{
    struct fixture f;
    fx_start(&f, NULL, fx_echo);
    unsigned n_503 = 0, n_200 = 0;
    for (long k = 1; k < 12; k++) {
        struct client *c = client_open(&f);
        struct tb_buf b;
        tb_buf_init(&b, 1 << 20);
        tb_buf_puts(&b, "POST /x HTTP/1.1\r\n" H);
        for (int i = 0; i < 40; i++)
            tb_buf_printf(&b, "header-%d: some longer value for it\r\n", i);
        tb_buf_puts(&b, "Content-Length: 3000\r\n\r\n");
        for (int i = 0; i < 3000; i++)
            tb_buf_puts(&b, "x");
        /* The client's buffer may not be what fails. */
        tb_buf_reserve(&c->in, 100000);
        tb_mem_fail_after(k);
        client_send(c, b.p, b.n);
        struct reply r;
        client_reply(c, &r, false);
        tb_mem_fail_after(0);
        n_503 += r.status == 503;
        n_200 += r.status == 200;
        assert_true(r.status == 503 || r.status == 200);
        client_close(c);
        tb_buf_fini(&b);
    }
    assert_true(n_503 >= 3);
    assert_true(n_200 >= 1);
    fx_stop(&f);
}

/* ---- mutations */

/* Everything that the server says and its handler sees, but for what may differ with the delivery.
 */
static void transcript(struct fixture *f, const char *bytes, size_t n, size_t step,
                       struct tb_buf *out)
{
    tb_buf_reset(&f->log);
    tb_buf_reset(out);
    struct client *c = client_open(f);
    client_send_slowly(c, bytes, n, step);
    shutdown(c->fd, SHUT_WR);
    FX_UNTIL(f, c->eof);
    assert_false(c->reset);
    /* Dates differ, and so may "100 Continue" and which of two faults is named. */
    static const struct {
        const char *begin;
        char end;
    } skip[] = {{"HTTP/1.1 100 Continue\r\n\r", '\n'},
                {"Date: ", '\n'},
                {"Content-Length: ", '\n'},
                {"{\"detail\": ", '}'}};
    for (size_t i = 0; i < c->in.n; i++) {
        const char *p = c->in.p + i;
        size_t left = c->in.n - i;
        bool skipped = false;
        for (size_t k = 0; k < TB_ARRAY_LEN(skip) && !skipped; k++) {
            size_t n_skip = strlen(skip[k].begin);
            if (left <= n_skip || memcmp(p, skip[k].begin, n_skip) != 0) continue;
            const char *to = memchr(p + n_skip, skip[k].end, left - n_skip);
            if (to) i += (size_t)(to - p);
            skipped = true;
        }
        if (!skipped) tb_buf_append(out, p, 1);
    }
    tb_buf_puts(out, "\n---\n");
    tb_buf_append(out, f->log.p, f->log.n);
    client_close(c);
}

/* What is wrong first is said, though llhttp only stumbles over what follows. */
static void test_first_fault(void **state)
{
    struct fixture f;
    struct reply r;
    (void)state;
    fx_start(&f, NULL, fx_echo);
    struct client *c = client_open(&f);
    client_puts(c, "GET /x HTTP/1.1\r\n" H "A: b\r\n c\r\n: d\r\n\r\n");
    client_reply(c, &r, false);
    assert_int_equal(r.status, 400);
    assert_non_null(memmem(r.body, r.body_n, "folded header line", 18));
    client_expect_eof(c);
    fx_stop(&f);
}

/* Damaged requests: whatever becomes of them, it does not depend on how the bytes are split. */
static void test_mutations(void **state)
{
    enum { N = 1500 };
    struct fixture f;
    struct tb_buf whole, split, bytes;
    tb_buf_init(&whole, 1 << 20);
    tb_buf_init(&split, 1 << 20);
    tb_buf_init(&bytes, 1 << 20);
    fx_start(&f, &(struct tb_http_options){.max_body = MAX_BODY}, fx_echo);
    static const char spice[] = "\r\n\t :;,=%/?#0aZ\0\x7f\xff";
    for (uint32_t i = 0; i < N; i++) {
        uint32_t ctr[4] = {i}, key[2] = {2026, 1}, r[4];
        tb_philox4x32(ctr, key, r);
        tb_buf_reset(&bytes);
        for (int k = 0; k < 2; k++) {
            const struct request_case *one_case = &cases[r[k] % TB_ARRAY_LEN(cases)];
            tb_buf_append(&bytes, one_case->bytes, case_len(one_case));
        }
        for (uint32_t k = 0; k < 1 + i % 3; k++) {
            size_t at = (r[2] >> (k * 3)) % bytes.n;
            ctr[1] = k + 1;
            tb_philox4x32(ctr, key, r);
            char c = spice[r[0] % (sizeof(spice) - 1)];
            switch (r[1] % 3) {
            case 0: bytes.p[at] = c; break;
            case 1: /* drop one */
                memmove(bytes.p + at, bytes.p + at + 1, bytes.n - at - 1);
                bytes.n--;
                break;
            default: /* insert one */
                tb_buf_append(&bytes, "x", 1);
                memmove(bytes.p + at + 1, bytes.p + at, bytes.n - at - 1);
                bytes.p[at] = c;
            }
        }
        transcript(&f, bytes.p, bytes.n, SIZE_MAX, &whole);
        transcript(&f, bytes.p, bytes.n, 1 + r[3] % 5, &split);
        if (whole.n != split.n || memcmp(whole.p, split.p, whole.n) != 0) {
            fail_msg("case %u: %.*s\n=== whole: %s\n=== split: %s", i, (int)bytes.n, bytes.p,
                     whole.p, split.p);
        }
    }
    FX_UNTIL(&f, fx_stats(&f).connections_open == 0);
    assert_int_equal(fx_stats(&f).requests_open, 0);
    fx_stop(&f);
    tb_buf_fini(&whole);
    tb_buf_fini(&split);
    tb_buf_fini(&bytes);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_in_one_piece),
        cmocka_unit_test(test_one_byte_at_a_time),
        cmocka_unit_test(test_seven_bytes_at_a_time),
        cmocka_unit_test(test_pipelined),
        cmocka_unit_test(test_first_fault),
        cmocka_unit_test(test_mutations),
        cmocka_unit_test(test_limits),
        cmocka_unit_test(test_continue),
        cmocka_unit_test(test_helpers),
        cmocka_unit_test(test_big_bodies),
        cmocka_unit_test(test_failing_allocations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
