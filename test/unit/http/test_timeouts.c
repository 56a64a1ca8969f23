/*
 * Time-outs, with small configured values. What is asserted is what happens, never how soon; and
 * that a request that waits for its answer is never cut.
 */
#include "fixture.h"

#include <stdio.h>
#include <sys/socket.h>

#define GET(path) "GET " path " HTTP/1.1\r\nHost: a\r\n\r\n"

static void test_header_timeout(void **state)
{
    struct fixture f;
    fx_start(&f, &(struct tb_http_options){.header_timeout_ms = 50}, fx_echo);
    struct client *silent = client_open(&f), *part = client_open(&f);
    client_puts(part, "GET / HTTP/1.1\r\nHo");
    client_expect_eof(silent); /* nothing was asked: nothing is said */
    client_expect(part, 408, NULL);
    client_expect_eof(part);
    assert_int_equal(f.log.n, 0);
    /* Dripping bytes buys no time. */
    struct client *drip = client_open(&f);
    uint64_t end = fx_ms() + HANG_MS, last = 0;
    client_puts(drip, "GET /");
    while (!client_has_reply(drip) && fx_ms() < end) {
        if (fx_ms() != last) client_puts(drip, "a"); /* one a millisecond: no URL too long */
        last = fx_ms();
        fx_turn(&f);
    }
    client_expect(drip, 408, NULL);
    fx_stop(&f);
}

static void test_body_timeout(void **state)
{
    struct fixture f;
    fx_start(&f, &(struct tb_http_options){.body_timeout_ms = 60, .header_timeout_ms = 60},
             fx_echo);
    struct client *c = client_open(&f);
    client_puts(c, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc");
    client_expect(c, 408, NULL);
    client_expect_eof(c);
    /* With progress it may take longer than the time-out in all. */
    c = client_open(&f);
    client_puts(c, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 20\r\n\r\n");
    uint64_t begun = fx_ms();
    for (int i = 0; i < 20; i++) {
        uint64_t next = begun + (uint64_t)(i + 1) * 8;
        client_send_slowly(c, "x", 1, 1);
        while (fx_ms() < next)
            fx_turn(&f);
    }
    struct reply r;
    client_reply(c, &r, false);
    assert_true(r.status == 200 || r.status == 408); /* 408 only if this process was held up */
    fx_stop(&f);
}

static void test_idle_timeout(void **state)
{
    struct fixture f;
    fx_start(&f, &(struct tb_http_options){.idle_timeout_ms = 50}, fx_echo);
    struct client *c = client_open(&f);
    client_puts(c, GET("/1"));
    client_expect(c, 200, "GET /1? ");
    client_expect_eof(c);
    FX_UNTIL(&f, fx_stats(&f).connections_open == 0);
    fx_stop(&f);
}

static void test_waiting_has_no_timeout(void **state)
{
    struct fixture f;
    fx_start(&f,
             &(struct tb_http_options){.header_timeout_ms = 20,
                                       .body_timeout_ms = 20,
                                       .write_timeout_ms = 20,
                                       .idle_timeout_ms = 20},
             fx_hold);
    struct client *c = client_open(&f);
    client_puts(c, GET("/1"));
    FX_UNTIL(&f, f.n_held == 1);
    uint64_t end = fx_ms() + 200;
    while (fx_ms() < end)
        fx_turn(&f);
    assert_non_null(f.held[0]);
    struct tb_http_request *req = f.held[0];
    tb_http_stream_begin(req, 200, "text/plain", NULL, 0);
    tb_http_stream_chunk(req, "ab", 2);
    end = fx_ms() + 200; /* a stream that pauses is not idle either */
    while (fx_ms() < end)
        fx_turn(&f);
    assert_non_null(f.held[0]);
    tb_http_stream_chunk(req, "cd", 2);
    tb_http_stream_end(req);
    client_expect(c, 200, "abcd");
    assert_int_equal(f.n_aborted, 0);
    fx_stop(&f);
}

static void big(void *arg, struct tb_http_request *req)
{
    static char body[32 << 20];
    tb_http_respond(req, 200, NULL, body, sizeof(body), NULL, 0);
}

static void test_write_timeout(void **state)
{
    struct fixture f;
    fx_start(&f, &(struct tb_http_options){.write_timeout_ms = 60}, big);
    struct client *c = client_open(&f);
    client_puts(c, GET("/1"));
    tb_list_del(&c->node); /* does not read any more */
    FX_UNTIL(&f, fx_stats(&f).requests_total == 1);
    FX_UNTIL(&f, fx_stats(&f).connections_open == 0);
    tb_list_push(&f.clients, &c->node);
    fx_stop(&f);
}

static void test_write_timeout_of_a_stream(void **state)
{
    struct fixture f;
    fx_start(&f, &(struct tb_http_options){.write_timeout_ms = 60}, fx_hold);
    struct client *c = client_open(&f);
    client_puts(c, GET("/1"));
    FX_UNTIL(&f, f.n_held == 1);
    tb_http_stream_begin(f.held[0], 200, "text/plain", NULL, 0);
    tb_list_del(&c->node);
    char *piece = tb_calloc(1, 1 << 20);
    for (int i = 0; i < 32; i++)
        tb_http_stream_chunk(f.held[0], piece, 1 << 20);
    assert_true(tb_http_stream_pending(f.held[0]) > 0);
    /* Saying more is no progress; the client must take it. */
    uint64_t end = fx_ms() + HANG_MS;
    while (f.n_aborted == 0 && fx_ms() < end) {
        tb_http_stream_chunk(f.held[0], piece, 1);
        fx_turn(&f);
    }
    assert_int_equal(f.n_aborted, 1);
    tb_free(piece);
    tb_list_push(&f.clients, &c->node);
    fx_stop(&f);
}

/* A slow reader that makes progress gets it all. */
static void test_slow_reader(void **state)
{
    struct fixture f;
    fx_start(&f, NULL, big);
    struct client *c = client_open(&f);
    client_puts(c, GET("/1"));
    struct reply r;
    client_reply(c, &r, false);
    assert_int_equal(r.status, 200);
    assert_int_equal(r.body_n, 32 << 20);
    client_puts(c, GET("/2"));
    client_reply(c, &r, false);
    assert_int_equal(r.body_n, 32 << 20);
    fx_stop(&f);
}

static void test_linger_ends(void **state)
{
    struct fixture f;
    fx_start(&f, NULL, fx_echo);
    struct client *c = client_open(&f);
    client_puts(c, "GET /1 HTTP/1.0\r\n\r\n");
    client_expect(c, 200, "GET /1? ");
    client_expect_eof(c);
    /* This client never ends its side. */
    FX_UNTIL(&f, fx_stats(&f).connections_open == 0);
    fx_stop(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_header_timeout), cmocka_unit_test(test_body_timeout),
        cmocka_unit_test(test_idle_timeout),   cmocka_unit_test(test_waiting_has_no_timeout),
        cmocka_unit_test(test_write_timeout),  cmocka_unit_test(test_write_timeout_of_a_stream),
        cmocka_unit_test(test_slow_reader),    cmocka_unit_test(test_linger_ends),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
