/*
 * Connections: order of pipelined answers, disconnects while a request waits, bounded reading
 * ahead, answers that must reach a client that still sends, drain, close, and thousands of idle
 * long polls.
 */
#include "fixture.h"

#include <stdio.h>
#include <sys/resource.h>
#include <sys/socket.h>

#define GET(path) "GET " path " HTTP/1.1\r\nHost: a\r\n\r\n"

static void answer(struct fixture *f, unsigned i, const char *body)
{
    struct tb_http_request *req = f->held[i];
    assert_non_null(req);
    f->held[i] = NULL;
    tb_http_respond(req, 200, "text/plain", body, strlen(body), NULL, 0);
}

/* ---- pipelining */

static void test_one_request_at_a_time(void **state)
{
    struct fixture f;
    fx_start(&f, NULL, fx_hold);
    struct client *c = client_open(&f);
    client_puts(c, GET("/1") GET("/2") GET("/3"));
    for (unsigned i = 0; i < 3; i++) {
        FX_UNTIL(&f, f.n_held == i + 1);
        for (int k = 0; k < 5; k++)
            fx_turn(&f);
        assert_int_equal(f.n_held, i + 1); /* the next waits for the answer */
        assert_false(client_has_reply(c));
        assert_int_equal(f.held[i]->path.p[1], '1' + (int)i);
        answer(&f, i, "x");
        client_expect(c, 200, "x");
    }
    fx_stop(&f);
}

static void test_reading_ahead_is_bounded(void **state)
{
    struct fixture f;
    fx_start(&f, NULL, fx_hold);
    struct client *c = client_open(&f);
    client_puts(c, GET("/first"));
    FX_UNTIL(&f, f.n_held == 1);
    uint64_t before = fx_stats(&f).bytes_in;
    /* Much more than the sockets' buffers would be taken if the server read on. */
    enum { REQUESTS = 400000 };
    struct tb_buf junk;
    tb_buf_init(&junk, 64 << 20);
    for (int i = 0; i < REQUESTS; i++)
        tb_buf_puts(&junk, GET("/next"));
    size_t n = junk.n;
    for (size_t at = 0, idle = 0; at < n && idle < 50;) {
        ssize_t k = send(c->fd, junk.p + at, n - at, MSG_DONTWAIT | MSG_NOSIGNAL);
        idle = k > 0 ? 0 : idle + 1;
        if (k > 0) at += (size_t)k;
        fx_turn(&f);
    }
    assert_int_equal(fx_stats(&f).bytes_in - before, TB_MAX_PIPELINED_BYTES);
    assert_int_equal(f.n_held, 1);
    answer(&f, 0, "first");
    client_expect(c, 200, "first");
    FX_UNTIL(&f, f.n_held == 2); /* and goes on */
    for (unsigned i = 1; i < 1000; i++) {
        FX_UNTIL(&f, f.n_held > i);
        answer(&f, i, "next");
        client_expect(c, 200, "next");
    }
    assert_true(fx_stats(&f).bytes_in - before >= 999 * 30);
    tb_buf_fini(&junk);
    fx_stop(&f);
}

/* ---- disconnects */

static void test_disconnect_aborts(void **state)
{
    struct fixture f;
    fx_start(&f, NULL, fx_hold);
    for (unsigned i = 0; i < 4; i++) {
        struct client *c = client_open(&f);
        client_puts(c, GET("/x"));
        FX_UNTIL(&f, f.n_held == i + 1);
        assert_int_equal(fx_stats(&f).requests_open, 1);
        switch (i) {
        case 0: client_close(c); break;
        case 1: client_reset(c); break;
        case 2: shutdown(c->fd, SHUT_WR); break; /* a half-close counts as leaving */
        default:
            client_puts(c, GET("/read-ahead"));
            FX_UNTIL(&f,
                     fx_stats(&f).bytes_in == 4 * strlen(GET("/x")) + strlen(GET("/read-ahead")));
            client_close(c);
        }
        FX_UNTIL(&f, f.n_aborted == i + 1);
        assert_null(f.held[i]);
        FX_UNTIL(&f, fx_stats(&f).connections_open == 0);
        assert_int_equal(fx_stats(&f).requests_open, 0);
    }
    assert_int_equal(f.n_held, 4);
    fx_stop(&f);
}

static struct tb_http_request *orphan;

static void keep_without_abort(void *arg, struct tb_http_request *req)
{
    orphan = req;
}

/* A handler without on_abort may answer late, even after the server is gone. */
static void test_orphans(void **state)
{
    for (int how = 0; how < 4; how++) {
        struct fixture f;
        fx_start(&f, NULL, keep_without_abort);
        struct client *c = client_open(&f);
        orphan = NULL;
        client_puts(c, GET("/x"));
        FX_UNTIL(&f, orphan != NULL);
        client_close(c);
        FX_UNTIL(&f, fx_stats(&f).connections_open == 0);
        assert_int_equal(fx_stats(&f).requests_open, 0);
        assert_true(tb_span_eq(orphan->path, "/x"));
        if (how == 3) fx_stop(&f);
        switch (how) {
        case 1:
            tb_http_stream_begin(orphan, 200, "text/plain", NULL, 0);
            tb_http_stream_chunk(orphan, "x", 1);
            assert_int_equal(tb_http_stream_pending(orphan), 0);
            tb_http_stream_end(orphan);
            break;
        case 2: tb_http_respond_file(orphan, "/dev/null", NULL, NULL, 0); break;
        default: tb_http_respond(orphan, 200, NULL, "x", 1, NULL, 0);
        }
        if (how != 3) fx_stop(&f);
    }
}

static void test_half_close_after_immediate_answers(void **state)
{
    struct fixture f;
    fx_start(&f, NULL, fx_echo);
    struct client *c = client_open(&f);
    client_puts(c, GET("/1") GET("/2"));
    shutdown(c->fd, SHUT_WR);
    client_expect(c, 200, "GET /1? ");
    client_expect(c, 200, "GET /2? ");
    client_expect_eof(c);
    assert_false(c->reset);
    fx_stop(&f);
}

static void test_disconnect_in_a_request(void **state)
{
    static const char *const parts[] = {
        "", "GET", "GET / HTTP/1.1\r\nHost: a\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nab"};
    struct fixture f;
    fx_start(&f, NULL, fx_echo);
    for (size_t i = 0; i < TB_ARRAY_LEN(parts); i++) {
        struct client *c = client_open(&f);
        client_send_slowly(c, parts[i], strlen(parts[i]), SIZE_MAX);
        shutdown(c->fd, SHUT_WR);
        client_expect_eof(c);
        client_close(c);
    }
    assert_int_equal(fx_stats(&f).requests_total, 0);
    assert_int_equal(f.log.n, 0);
    fx_stop(&f);
}

/* ---- refusals while the body is still arriving */

static void test_refusal_reaches_a_sending_client(void **state)
{
    struct fixture f;
    fx_start(&f, &(struct tb_http_options){.max_body = 1000}, fx_echo);
    char *data = tb_calloc(1, 8 << 20);
    for (int i = 0; i < 8; i++) {
        struct client *c = client_open(&f);
        client_puts(
            c, i % 2
                   ? "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 8388608\r\n\r\n"
                   : "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n800000\r\n");
        /* Ours sends everything before it reads, as many clients do. */
        assert_true(client_send(c, data, 8 << 20));
        client_expect(c, 413, NULL);
        client_expect_eof(c);
        assert_false(c->reset);
        client_close(c);
    }
    tb_free(data);
    fx_stop(&f);
}

/* ---- limits on connections */

static void test_max_connections(void **state)
{
    struct fixture f;
    fx_start(&f, &(struct tb_http_options){.max_connections = 3}, fx_hold);
    struct client *c[3];
    for (unsigned i = 0; i < 3; i++) {
        c[i] = client_open(&f);
        client_puts(c[i], GET("/"));
        FX_UNTIL(&f, f.n_held == i + 1);
    }
    struct client *more = client_open(&f);
    client_expect(more, 503, NULL);
    client_expect_eof(more);
    client_close(more);
    answer(&f, 1, "x");
    client_expect(c[1], 200, "x");
    client_close(c[1]);
    FX_UNTIL(&f, fx_stats(&f).connections_open == 2);
    more = client_open(&f);
    client_puts(more, GET("/"));
    FX_UNTIL(&f, f.n_held == 4);
    answer(&f, 3, "y");
    client_expect(more, 200, "y");
    /* A flood beyond the limit is dropped without an answer each. */
    for (int i = 0; i < 40; i++)
        client_open(&f);
    assert_true(fx_stats(&f).connections_open <= 3 + 3 / 8 + 8 + 1);
    fx_stop(&f);
}

static void test_thousands_of_long_polls(void **state)
{
    enum { N = 2000 };
    struct rlimit lim;
    getrlimit(RLIMIT_NOFILE, &lim);
    lim.rlim_cur = lim.rlim_max;
    setrlimit(RLIMIT_NOFILE, &lim);
    if (lim.rlim_cur < 2 * N + 100) skip();
    struct fixture f;
    fx_start(&f, NULL, fx_hold);
    static struct client *c[N];
    for (unsigned i = 0; i < N; i++) {
        c[i] = client_open(&f);
        client_puts(c[i], GET("/poll"));
    }
    FX_UNTIL(&f, f.n_held == N);
    assert_int_equal(fx_stats(&f).connections_open, N);
    assert_int_equal(fx_stats(&f).requests_open, N);
    for (unsigned i = 0; i < 100; i++)
        client_close(c[i * 20]); /* some leave */
    FX_UNTIL(&f, f.n_aborted == 100);
    for (unsigned i = 0; i < N; i++) {
        if (f.held[i]) answer(&f, i, "done");
    }
    for (unsigned i = 0; i < N; i++) {
        if (i % 20) client_expect(c[i], 200, "done");
    }
    assert_int_equal(fx_stats(&f).requests_open, 0);
    fx_stop(&f);
}

/* ---- drain and close */

static void count_cb(void *arg)
{
    ++*(unsigned *)arg;
}

static void test_drain_waits_for_answers(void **state)
{
    struct fixture f;
    unsigned drained = 0;
    fx_start(&f, NULL, fx_hold);
    struct client *idle = client_open(&f), *busy = client_open(&f), *part = client_open(&f);
    client_puts(busy, GET("/1") GET("/never"));
    FX_UNTIL(&f, f.n_held == 1);
    client_send_slowly(part, "GET /2 HTTP/1.1\r\nHo", 19, SIZE_MAX);
    tb_http_server_drain(f.s, 60000, count_cb, &drained);
    assert_int_equal(drained, 0);
    client_expect_eof(idle);
    client_puts(part, "st: a\r\n\r\n"); /* begun before: still served */
    FX_UNTIL(&f, f.n_held == 2);
    assert_int_equal(drained, 0);
    answer(&f, 0, "one");
    struct reply r;
    char text[32];
    client_reply(busy, &r, false);
    assert_string_equal(reply_field(&r, "Connection", text, sizeof(text)), "close");
    client_expect_eof(busy); /* without the pipelined one */
    assert_int_equal(drained, 0);
    answer(&f, 1, "two");
    client_expect(part, 200, "two");
    client_close(busy);
    client_close(part);
    FX_UNTIL(&f, drained == 1);
    assert_int_equal(fx_stats(&f).connections_open, 0);
    assert_int_equal(f.n_held, 2);
    assert_int_equal(f.n_aborted, 0);
    fx_stop(&f);
    assert_int_equal(drained, 1);
}

/* Announced as keep-alive before the drain; it must not stay open after it. */
static void test_drain_ends_a_stream_begun_before(void **state)
{
    struct fixture f;
    unsigned drained = 0;
    fx_start(&f, NULL, fx_hold);
    struct client *c = client_open(&f);
    client_puts(c, GET("/1"));
    FX_UNTIL(&f, f.n_held == 1);
    tb_http_stream_begin(f.held[0], 200, "text/plain", NULL, 0);
    tb_http_stream_chunk(f.held[0], "ab", 2);
    tb_http_server_drain(f.s, 600000, count_cb, &drained);
    for (int i = 0; i < 5; i++)
        fx_turn(&f);
    assert_int_equal(drained, 0);
    tb_http_stream_chunk(f.held[0], "c", 1);
    tb_http_stream_end(f.held[0]);
    client_expect(c, 200, "abc");
    client_expect_eof(c);
    client_close(c);
    FX_UNTIL(&f, drained == 1);
    assert_int_equal(f.n_aborted, 0);
    fx_stop(&f);
}

static void test_drain_cuts_after_the_grace(void **state)
{
    struct fixture f;
    unsigned drained = 0;
    fx_start(&f, NULL, fx_hold);
    struct client *c = client_open(&f);
    client_puts(c, GET("/1"));
    FX_UNTIL(&f, f.n_held == 1);
    tb_http_server_drain(f.s, 30, count_cb, &drained);
    FX_UNTIL(&f, drained == 1);
    assert_int_equal(f.n_aborted, 1);
    assert_int_equal(fx_stats(&f).connections_open, 0);
    client_expect_eof(c);
    fx_stop(&f);
}

static void test_drain_of_nothing(void **state)
{
    struct fixture f;
    unsigned drained = 0;
    fx_start(&f, NULL, fx_hold);
    tb_http_server_drain(f.s, 0, count_cb, &drained);
    assert_int_equal(drained, 0); /* never from inside of the call */
    FX_UNTIL(&f, drained == 1);
    fx_stop(&f);
}

static void test_close_while_draining(void **state)
{
    struct fixture f;
    unsigned drained = 0;
    fx_start(&f, NULL, fx_hold);
    struct client *c = client_open(&f);
    client_puts(c, GET("/1"));
    FX_UNTIL(&f, f.n_held == 1);
    tb_http_server_drain(f.s, 60000, count_cb, &drained);
    fx_turn(&f);
    fx_stop(&f);
    assert_int_equal(drained, 0);
    assert_int_equal(f.n_aborted, 1);
}

static void on_closed(void *arg)
{
    struct fixture *f = arg;
    f->n_closed++;
}

static void no_answer(struct tb_http_request *req)
{
    ((struct fixture *)req->user)->n_aborted++;
}

static void close_then_answer(void *arg, struct tb_http_request *req)
{
    struct fixture *f = arg;
    f->n_held++;
    req->user = f;
    req->on_abort = no_answer;
    tb_http_server_close(f->s, on_closed, f);
    if (req->path.n > 2) tb_http_respond(req, 200, NULL, "x", 1, NULL, 0);
}

static void test_close_from_a_handler(void **state)
{
    for (int i = 0; i < 2; i++) {
        struct fixture f;
        fx_start(&f, NULL, close_then_answer);
        struct client *c = client_open(&f);
        orphan = NULL;
        client_puts(c,
                    i ? GET("/long") : "HEAD / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        uint64_t end = fx_ms() + HANG_MS;
        while (!f.n_closed && fx_ms() < end)
            uv_run(&f.loop, UV_RUN_NOWAIT);
        assert_int_equal(f.n_closed, 1);
        assert_int_equal(f.n_held, 1);
        assert_int_equal(f.n_aborted, i ? 0 : 1);
        f.s = NULL;
        client_expect_eof(c);
        fx_stop(&f);
    }
}

static void test_listen_errors(void **state)
{
    struct fixture f;
    struct tb_error err = {0};
    int port = 0;
    fx_start(&f, NULL, fx_echo);
    assert_int_equal(tb_http_server_listen(f.s, "127.0.0.1", f.port, &port, &err), UV_EADDRINUSE);
    assert_non_null(strstr(err.msg, "127.0.0.1"));
    assert_int_equal(tb_http_server_listen(f.s, "127.0.0.1", 65536, &port, &err), TB_EINVAL);
    assert_true(tb_http_server_listen(f.s, "no such host", 0, &port, &err) < 0);
    /* A second listener. */
    int first = f.port;
    assert_int_equal(tb_http_server_listen(f.s, "localhost", 0, &f.port, &err), 0);
    assert_int_not_equal(f.port, first);
    f.port = first;
    struct client *c = client_open(&f);
    client_puts(c, GET("/x"));
    client_expect(c, 200, "GET /x? ");
    fx_stop(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_request_at_a_time),
        cmocka_unit_test(test_reading_ahead_is_bounded),
        cmocka_unit_test(test_disconnect_aborts),
        cmocka_unit_test(test_orphans),
        cmocka_unit_test(test_half_close_after_immediate_answers),
        cmocka_unit_test(test_disconnect_in_a_request),
        cmocka_unit_test(test_refusal_reaches_a_sending_client),
        cmocka_unit_test(test_max_connections),
        cmocka_unit_test(test_thousands_of_long_polls),
        cmocka_unit_test(test_drain_waits_for_answers),
        cmocka_unit_test(test_drain_ends_a_stream_begun_before),
        cmocka_unit_test(test_drain_cuts_after_the_grace),
        cmocka_unit_test(test_drain_of_nothing),
        cmocka_unit_test(test_close_while_draining),
        cmocka_unit_test(test_close_from_a_handler),
        cmocka_unit_test(test_listen_errors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
