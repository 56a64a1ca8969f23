/*
 * Requests in bytes, some of them pipelined. The first byte says where the bytes are split into
 * reads: the parser must find the same requests, and refuse the same, however they arrive.
 */
#include <string.h>

#include "fuzz.h"
#include "http/internal.h"

enum { MAX_BODY = 4096 };

static void put_span(struct tb_buf *log, struct tb_span s)
{
    tb_buf_append(log, s.p, s.n);
    tb_buf_append(log, "\0", 1);
}

static void put_request(struct tb_buf *log, struct tb_http_request *req)
{
    char flags[3] = {(char)('0' + req->method), req->keep_alive ? 'k' : 'c', ' '};
    TB_BUG_ON(req->path.n == 0 || req->path.p[0] != '/');
    TB_BUG_ON(req->body.n > MAX_BODY);
    tb_buf_append(log, flags, sizeof(flags));
    put_span(log, req->path);
    put_span(log, req->query);
    for (size_t i = 0; i < req->n_headers; i++) {
        put_span(log, req->headers[i].name);
        put_span(log, req->headers[i].value);
    }
    put_span(log, req->body);
    put_span(log, tb_http_header_get(req, "content-type"));
    put_span(log, tb_http_query_get(req, "limit"));
}

/* What a connection would see of the bytes, read `step` at a time. */
static void parse(struct tb_buf *log, const char *p, size_t n, size_t step)
{
    struct tb_http_parser *parser = tb_http_parser_create(MAX_BODY);
    struct tb_http_exchange *x = NULL;
    enum tb_http_parse rc = TB_HTTP_PARSE_DONE;
    for (size_t at = 0; at < n && rc != TB_HTTP_PARSE_ERROR;) {
        size_t used, take = TB_MIN(step, n - at);
        if (!x) {
            x = tb_http_exchange_create(NULL);
            tb_http_parser_begin(parser, x);
        }
        rc = tb_http_parser_feed(parser, p + at, take, &used);
        if (rc == TB_HTTP_PARSE_ERROR) {
            const char *text;
            int status = tb_http_parser_error(parser, &text);
            TB_BUG_ON(status < 400 || status > 599 || !text);
            tb_buf_puts(log, "refused"); /* when two things are wrong, either may be named */
            break;
        }
        TB_BUG_ON(used > take || (rc == TB_HTTP_PARSE_MORE && used != take));
        at += used;
        if (rc == TB_HTTP_PARSE_DONE) {
            put_request(log, &x->req);
            tb_http_exchange_free(x);
            x = NULL;
        }
    }
    tb_http_exchange_free(x);
    tb_http_parser_destroy(parser);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    if (n < 1) return 0;
    size_t step = (size_t)data[0] + 1;
    const char *p = (const char *)data + 1;
    struct tb_buf whole, split;
    tb_buf_init(&whole, SIZE_MAX / 2);
    tb_buf_init(&split, SIZE_MAX / 2);
    parse(&whole, p, n - 1, n);
    parse(&split, p, n - 1, step);
    TB_BUG_ON(whole.n != split.n || (whole.n && memcmp(whole.p, split.p, whole.n) != 0));
    tb_buf_fini(&whole);
    tb_buf_fini(&split);
    return 0;
}
