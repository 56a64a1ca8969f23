/*
 * In-process calls: the same handlers, answers whole, streamed or from files; stopping servers.
 */
#include "fixture.h"

#include <stdio.h>
#include <unistd.h>

struct got {
    unsigned n;
    int status;
    char type[64], field[64], body[256];
    size_t body_n;
    struct fixture *f;
    bool again, close;
};

static void on_reply(void *arg, const struct tb_http_reply *reply);

static void start(struct fixture *f, struct got *g, enum tb_http_method method, const char *target,
                  const char *body)
{
    static const struct tb_http_field fields[] = {{"X-Key", "k"}};
    struct tb_error err = {0};
    unsigned before = g->n;
    int rc =
        tb_http_server_call(f->s, method, target, fields, 1, body, strlen(body), on_reply, g, &err);
    if (rc) fail_msg("%s", err.msg);
    assert_int_equal(g->n, before); /* never from inside */
}

static void closed(void *arg)
{
    struct fixture *f = arg;
    f->n_closed++;
}

static void on_reply(void *arg, const struct tb_http_reply *reply)
{
    struct got *g = arg;
    g->n++;
    g->status = reply->status;
    g->type[0] = g->field[0] = '\0';
    for (size_t i = 0; i < reply->n_headers; i++) {
        char *out = tb_span_ieq(reply->headers[i].name, "content-type") ? g->type : g->field;
        snprintf(out, 64, "%.*s", (int)reply->headers[i].value.n, reply->headers[i].value.p);
    }
    g->body_n = reply->body.n;
    snprintf(g->body, sizeof(g->body), "%.*s", (int)TB_MIN(reply->body.n, (size_t)200),
             reply->body.p ? reply->body.p : "");
    if (g->again) {
        g->again = false;
        start(g->f, g, TB_HTTP_GET, "/again", "");
    }
    if (g->close) tb_http_server_close(g->f->s, closed, g->f);
}

static char file_path[] = "/tmp/tb-test-call-XXXXXX";

/* A source that is read when the test says so. */
static struct {
    struct tb_http_source source;
    uv_sem_t reading, go;
    bool freed;
} slow;

static int slow_read(struct tb_http_source *s, uint64_t at, void *to, size_t n)
{
    (void)s;
    (void)at;
    uv_sem_post(&slow.reading);
    uv_sem_wait(&slow.go);
    memset(to, 'x', n);
    return 0;
}

static void slow_free(struct tb_http_source *s)
{
    (void)s;
    slow.freed = true;
}

static void handler(void *arg, struct tb_http_request *req)
{
    static const struct tb_http_field fields[] = {{"X-A", "1"}};
    assert_null(req->conn);
    assert_true(tb_span_eq(tb_http_header_get(req, "x-key"), "k"));
    if (tb_span_eq(req->path, "/stream")) {
        tb_http_stream_begin(req, 201, "text/plain", fields, 1);
        tb_http_stream_chunk(req, "ab", 2);
        assert_int_equal(tb_http_stream_pending(req), 0);
        tb_http_stream_chunk(req, "cd", 2);
        tb_http_stream_end(req);
    } else if (tb_span_eq(req->path, "/bad")) {
        static const struct tb_http_field bad[] = {{"X", "a\nb"}};
        tb_http_respond(req, 200, NULL, NULL, 0, bad, 1);
    } else if (tb_span_eq(req->path, "/file")) {
        tb_http_respond_file(req, file_path, "text/plain", fields, 1);
    } else if (tb_span_eq(req->path, "/none")) {
        tb_http_respond_file(req, "/nonexistent/x", "text/plain", fields, 1);
    } else if (tb_span_eq(req->path, "/slow")) {
        tb_http_respond_source(req, &slow.source, "text/plain", fields, 1);
    } else if (tb_span_eq(req->path, "/hold")) {
        fx_hold(arg, req);
    } else {
        fx_echo(arg, req);
    }
}

static void test_answers(void **state)
{
    struct fixture f;
    struct got g = {0};
    fx_start(&f, NULL, handler);
    start(&f, &g, TB_HTTP_POST, "/a%20b?q=1", "hello");
    FX_UNTIL(&f, g.n == 1);
    assert_int_equal(g.status, 200);
    assert_string_equal(g.body, "POST /a b?q=1 hello");
    assert_string_equal(g.type, "text/plain");
    start(&f, &g, TB_HTTP_HEAD, "/x", "");
    FX_UNTIL(&f, g.n == 2);
    assert_int_equal(g.body_n, 0);
    start(&f, &g, TB_HTTP_GET, "/stream", "");
    FX_UNTIL(&f, g.n == 3);
    assert_int_equal(g.status, 201);
    assert_string_equal(g.body, "abcd");
    assert_string_equal(g.field, "1");
    start(&f, &g, TB_HTTP_GET, "/bad", "");
    FX_UNTIL(&f, g.n == 4);
    assert_int_equal(g.status, 500);
    start(&f, &g, TB_HTTP_GET, "/none", "");
    FX_UNTIL(&f, g.n == 5);
    assert_int_equal(g.status, 404);

    int fd = mkstemp(file_path);
    assert_true(fd >= 0);
    char *data = tb_calloc(1, 1000000);
    memset(data, 'f', 1000000);
    assert_int_equal(write(fd, data, 1000000), 1000000);
    tb_free(data);
    close(fd);
    start(&f, &g, TB_HTTP_GET, "/file", "");
    FX_UNTIL(&f, g.n == 6);
    assert_int_equal(g.status, 200);
    assert_int_equal(g.body_n, 1000000);
    assert_int_equal(strspn(g.body, "f"), 200);
    unlink(file_path);

    start(&f, &g, TB_HTTP_GET, "/hold", ""); /* answered later */
    FX_UNTIL(&f, f.n_held == 1);
    assert_int_equal(fx_stats(&f).requests_open, 1);
    tb_http_respond(f.held[0], 200, NULL, "later", 5, NULL, 0);
    assert_int_equal(g.n, 6);
    FX_UNTIL(&f, g.n == 7);
    assert_string_equal(g.body, "later");
    assert_int_equal(fx_stats(&f).requests_open, 0);

    g.again = true; /* from inside of the callback */
    g.f = &f;
    start(&f, &g, TB_HTTP_GET, "/x", "");
    FX_UNTIL(&f, g.n == 9);
    assert_string_equal(g.body, "GET /again? ");
    /* An idle server does not keep the loop alive but for its listener. */
    fx_stop(&f);
}

static void test_refused(void **state)
{
    struct fixture f;
    struct got g = {0};
    struct tb_error err = {0};
    fx_start(&f, &(struct tb_http_options){.max_body = 10}, handler);
    assert_int_equal(
        tb_http_server_call(f.s, TB_HTTP_GET, "x", NULL, 0, NULL, 0, on_reply, &g, &err),
        TB_EINVAL);
    assert_int_equal(
        tb_http_server_call(f.s, TB_HTTP_GET, "/%0", NULL, 0, NULL, 0, on_reply, &g, &err),
        TB_EINVAL);
    assert_int_equal(
        tb_http_server_call(f.s, TB_HTTP_POST, "/", NULL, 0, "01234567890", 11, on_reply, &g, &err),
        TB_ETOOBIG);
    tb_mem_fail_after(1);
    assert_int_equal(
        tb_http_server_call(f.s, TB_HTTP_POST, "/", NULL, 0, "0", 1, on_reply, &g, &err),
        TB_ENOMEM);
    tb_mem_fail_after(0);
    tb_http_server_drain(f.s, 1000, closed, &f);
    assert_int_equal(
        tb_http_server_call(f.s, TB_HTTP_GET, "/", NULL, 0, NULL, 0, on_reply, &g, &err),
        TB_ECANCELED);
    FX_UNTIL(&f, f.n_closed == 1);
    f.n_closed = 0;
    fx_stop(&f);
    assert_int_equal(g.n, 0);
}

static void test_stopping(void **state)
{
    /* 0: closed with an open call, 1: drained beyond the grace, 2: closed before the call began,
     * 3: closed by a reply's callback while another is open */
    for (int how = 0; how < 4; how++) {
        struct fixture f;
        struct got g = {0}, h = {0};
        unsigned held = 0;
        fx_start(&f, NULL, handler);
        start(&f, &g, TB_HTTP_GET, "/hold", "");
        if (how != 2) FX_UNTIL(&f, f.n_held == (held = 1));
        if (how == 1) {
            tb_http_server_drain(f.s, 20, closed, &f);
            FX_UNTIL(&f, f.n_closed == 1);
            assert_int_equal(g.n, 1);
            f.n_closed = 0;
        }
        if (how == 3) {
            h.close = true;
            h.f = &f;
            start(&f, &h, TB_HTTP_GET, "/x", "");
            uint64_t end = fx_ms() + HANG_MS;
            while (!f.n_closed && fx_ms() < end)
                uv_run(&f.loop, UV_RUN_NOWAIT);
            assert_int_equal(h.n, 1);
            assert_int_equal(f.n_closed, 1);
            f.s = NULL;
        }
        fx_stop(&f);
        assert_int_equal(g.n, 1);
        assert_int_equal(g.status, 503);
        assert_non_null(strstr(g.body, "\"category\": \"server\""));
        assert_int_equal(f.n_aborted, held);
    }
}

/* Closed while the pool reads the last piece of an answer. */
static void test_stopping_in_a_read(void **state)
{
    struct fixture f;
    struct got g = {0};
    slow.source = (struct tb_http_source){.size = 5, .read = slow_read, .free = slow_free};
    assert_int_equal(uv_sem_init(&slow.reading, 0), 0);
    assert_int_equal(uv_sem_init(&slow.go, 0), 0);
    fx_start(&f, NULL, handler);
    start(&f, &g, TB_HTTP_GET, "/slow", "");
    FX_UNTIL(&f, uv_sem_trywait(&slow.reading) == 0);
    tb_http_server_close(f.s, closed, &f);
    fx_turn(&f);
    uv_sem_post(&slow.go);
    FX_UNTIL(&f, f.n_closed == 1);
    f.s = NULL;
    fx_stop(&f);
    assert_true(slow.freed);
    assert_int_equal(g.n, 1);
    assert_int_equal(g.status, 503);
    uv_sem_destroy(&slow.reading);
    uv_sem_destroy(&slow.go);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_answers),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_stopping),
        cmocka_unit_test(test_stopping_in_a_read),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
