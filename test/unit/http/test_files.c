/*
 * Files as answers: whole, by range, missing, not regular, shrinking, and clients that leave.
 */
#include "fixture.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SMALL = 1000, BIG = 9 << 20 };

static char dir[64], small_path[96], big_path[96], empty_path[96], fifo_path[96];

static char byte_at(size_t i)
{
    return (char)(i * 31 + i / 251);
}

static void file_make(const char *path, size_t n)
{
    FILE *fp = fopen(path, "wb");
    assert_non_null(fp);
    for (size_t i = 0; i < n; i++)
        fputc(byte_at(i), fp);
    assert_int_equal(fclose(fp), 0);
}

static int setup(void **state)
{
    snprintf(dir, sizeof(dir), "/tmp/tb-test-http-XXXXXX");
    if (!mkdtemp(dir)) return -1;
    snprintf(small_path, sizeof(small_path), "%s/small", dir);
    snprintf(big_path, sizeof(big_path), "%s/big", dir);
    snprintf(empty_path, sizeof(empty_path), "%s/empty", dir);
    snprintf(fifo_path, sizeof(fifo_path), "%s/fifo", dir);
    file_make(small_path, SMALL);
    file_make(big_path, BIG);
    file_make(empty_path, 0);
    return mkfifo(fifo_path, 0600);
}

static int teardown(void **state)
{
    unlink(small_path);
    unlink(big_path);
    unlink(empty_path);
    unlink(fifo_path);
    return rmdir(dir);
}

static void handler(void *arg, struct tb_http_request *req)
{
    static const struct tb_http_field fields[] = {{"X-A", "1"}};
    static const struct tb_http_field bad[] = {{"X", "a\nb"}};
    if (tb_span_eq(req->path, "/bad")) {
        tb_http_respond_file(req, small_path, "application/octet-stream", bad, 1);
        return;
    }
    char *path = tb_arena_printf(&req->arena, "%s%.*s", dir, (int)req->path.n, req->path.p);
    tb_http_respond_file(req, path, "application/octet-stream", fields, 1);
}

static void ask(struct client *c, const char *method, const char *path, const char *headers,
                struct reply *r)
{
    char text[512];
    snprintf(text, sizeof(text), "%s %s HTTP/1.1\r\nHost: a\r\n%s\r\n", method, path, headers);
    client_puts(c, text);
    client_reply(c, r, strcmp(method, "HEAD") == 0);
}

static void check_bytes(const struct reply *r, size_t first, size_t n)
{
    assert_int_equal(r->body_n, n);
    for (size_t i = 0; i < n; i++) {
        if (r->body[i] != byte_at(first + i)) fail_msg("byte %zu differs", i);
    }
}

static void test_whole(void **state)
{
    struct fixture f;
    struct reply r;
    char text[64];
    fx_start(&f, NULL, handler);
    struct client *c = client_open(&f);
    ask(c, "GET", "/small", "", &r);
    assert_int_equal(r.status, 200);
    assert_string_equal(reply_field(&r, "Accept-Ranges", text, sizeof(text)), "bytes");
    assert_string_equal(reply_field(&r, "X-A", text, sizeof(text)), "1");
    assert_string_equal(reply_field(&r, "Content-Type", text, sizeof(text)),
                        "application/octet-stream");
    assert_non_null(reply_field(&r, "Last-Modified", text, sizeof(text)));
    check_bytes(&r, 0, SMALL);
    ask(c, "GET", "/big", "", &r);
    check_bytes(&r, 0, BIG);
    ask(c, "GET", "/empty", "", &r);
    assert_int_equal(r.status, 200);
    check_bytes(&r, 0, 0);
    ask(c, "HEAD", "/big", "", &r);
    assert_int_equal(r.status, 200);
    snprintf(text, sizeof(text), "%d", BIG);
    char length[32];
    assert_string_equal(reply_field(&r, "Content-Length", length, sizeof(length)), text);
    ask(c, "GET", "/bad", "", &r);
    assert_int_equal(r.status, 500);
    ask(c, "GET", "/small", "", &r); /* still in step */
    check_bytes(&r, 0, SMALL);
    fx_stop(&f);
}

static void test_not_found(void **state)
{
    static const char *const paths[] = {"/none", "/", "/fifo", "/small/x"};
    struct fixture f;
    struct reply r;
    fx_start(&f, NULL, handler);
    struct client *c = client_open(&f);
    for (size_t i = 0; i < TB_ARRAY_LEN(paths); i++) {
        ask(c, "GET", paths[i], "", &r);
        assert_int_equal(r.status, 404);
        assert_non_null(memmem(r.body, r.body_n, "file not found", 14));
    }
    fx_stop(&f);
}

static void test_ranges(void **state)
{
    static const struct {
        const char *range;
        int status;
        size_t first, n;
    } cases[] = {
        {"bytes=0-0", 206, 0, 1},
        {"bytes=0-999", 206, 0, 1000},
        {"bytes=10-19", 206, 10, 10},
        {"Bytes=990-", 206, 990, 10},
        {"bytes=990-5000", 206, 990, 10},
        {"bytes=990-18446744073709551615", 206, 990, 10},
        {"bytes=-1", 206, 999, 1},
        {"bytes=-1000", 206, 0, 1000},
        {"bytes=-5000", 206, 0, 1000},
        {"bytes=1000-", 416, 0, 0},
        {"bytes=5000-6000", 416, 0, 0},
        {"bytes=-0", 416, 0, 0},
        /* malformed, or more than one: as if there were none */
        {"bytes=20-10", 200, 0, 1000},
        {"bytes=a-b", 200, 0, 1000},
        {"bytes=", 200, 0, 1000},
        {"bytes=-", 200, 0, 1000},
        {"bytes=1", 200, 0, 1000},
        {"bytes=0-1,5-6", 200, 0, 1000},
        {"bytes=99999999999999999999-", 200, 0, 1000},
        {"lines=0-1", 200, 0, 1000},
    };
    struct fixture f;
    struct reply r;
    char header[128], text[64], want[96];
    fx_start(&f, NULL, handler);
    struct client *c = client_open(&f);
    for (size_t i = 0; i < TB_ARRAY_LEN(cases); i++) {
        snprintf(header, sizeof(header), "Range: %s\r\n", cases[i].range);
        ask(c, "GET", "/small", header, &r);
        if (r.status != cases[i].status) fail_msg("%s: %d", cases[i].range, r.status);
        check_bytes(&r, cases[i].first, cases[i].n);
        const char *range = reply_field(&r, "Content-Range", text, sizeof(text));
        if (r.status == 206) {
            snprintf(want, sizeof(want), "bytes %zu-%zu/1000", cases[i].first,
                     cases[i].first + cases[i].n - 1);
            assert_string_equal(range, want);
        } else if (r.status == 416) {
            assert_string_equal(range, "bytes */1000");
        } else {
            assert_null(range);
        }
    }
    ask(c, "GET", "/empty", "Range: bytes=0-\r\n", &r);
    assert_int_equal(r.status, 416);
    ask(c, "HEAD", "/small", "Range: bytes=0-1\r\n", &r); /* defined for GET only */
    assert_int_equal(r.status, 200);
    /* If-Range: only while the file is the one the client knows. */
    ask(c, "GET", "/small", "Range: bytes=0-1\r\nIf-Range: Sun, 06 Nov 1994 08:49:37 GMT\r\n", &r);
    assert_int_equal(r.status, 200);
    assert_non_null(reply_field(&r, "Last-Modified", text, sizeof(text)));
    snprintf(header, sizeof(header), "Range: bytes=0-1\r\nIf-Range: %s\r\n", text);
    ask(c, "GET", "/small", header, &r);
    assert_int_equal(r.status, 206);
    /* across pieces of reading */
    ask(c, "GET", "/big", "Range: bytes=100000-5000000\r\n", &r);
    assert_int_equal(r.status, 206);
    check_bytes(&r, 100000, 4900001);
    fx_stop(&f);
}

static void shrink(void *arg, struct tb_http_request *req)
{
    tb_http_respond_file(req, big_path, NULL, NULL, 0);
}

/* The announced length cannot be kept: the connection is cut, so that the client notices. */
static void test_shrinking_file(void **state)
{
    struct fixture f;
    fx_start(&f, NULL, shrink);
    struct client *c = client_open(&f);
    tb_list_del(&c->node); /* does not read yet, so the server cannot be done */
    client_puts(c, "GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    FX_UNTIL(&f, fx_stats(&f).bytes_out > 1 << 20);
    assert_int_equal(truncate(big_path, 4096), 0);
    tb_list_push(&f.clients, &c->node);
    FX_UNTIL(&f, c->eof);
    assert_true(c->in.n < BIG);
    file_make(big_path, BIG);
    fx_stop(&f);
}

static void test_clients_that_leave(void **state)
{
    struct fixture f;
    fx_start(&f, NULL, handler);
    for (int i = 0; i < 40; i++) {
        struct client *c = client_open(&f);
        client_puts(c, "GET /big HTTP/1.1\r\nHost: a\r\n\r\n");
        for (int k = 0; k < i; k++)
            fx_turn(&f);
        client_reset(c);
    }
    FX_UNTIL(&f, fx_stats(&f).connections_open == 0);
    assert_int_equal(fx_stats(&f).requests_open, 0);
    /* and the server closes in the middle of some */
    for (int i = 0; i < 10; i++) {
        struct client *c = client_open(&f);
        client_puts(c, "GET /big HTTP/1.1\r\nHost: a\r\n\r\n");
    }
    for (int k = 0; k < 5; k++)
        uv_run(&f.loop, UV_RUN_NOWAIT);
    fx_stop(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_whole),
        cmocka_unit_test(test_not_found),
        cmocka_unit_test(test_ranges),
        cmocka_unit_test(test_shrinking_file),
        cmocka_unit_test(test_clients_that_leave),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
