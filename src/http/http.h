/*
 * HTTP/1.1 server: listeners, connections and the request/response pair that handlers see. It knows
 * no API: a single handler gets every request. Parsing is llhttp's (http/parser.c is the only file
 * that includes it); limits are util/limits.h's and the options below.
 *
 * Life of a request: it is handed to the handler when its headers *and* body are complete (bodies
 * are bounded by max_body). The handler answers exactly once, now or later, by one tb_http_respond*
 * call; until then the request, its arena and every span in it stay valid. If the client goes away
 * first, on_abort is called once (when set): the handler forgets the request and must not answer
 * any more. A request lives outside of its connection, so a handler may finish work for an aborted
 * request only on data of its own. Pipelined requests are handed over one at a time, in order.
 *
 * Thread: everything here belongs to the loop's thread. Nothing blocks. As with all of libuv's
 * streams the process must ignore SIGPIPE; that is the program's to do, not the library's.
 */
#ifndef TB_HTTP_HTTP_H
#define TB_HTTP_HTTP_H

#include <stdbool.h>
#include <stdint.h>
#include <uv.h>

#include "util/arena.h"
#include "util/error.h"
#include "util/span.h"

enum tb_http_method {
    TB_HTTP_OTHER = 0,
    TB_HTTP_GET,
    TB_HTTP_HEAD,
    TB_HTTP_POST,
    TB_HTTP_PUT,
    TB_HTTP_DELETE,
    TB_HTTP_PATCH,
    TB_HTTP_OPTIONS,
};

struct tb_http_header {
    struct tb_span name, value; /* name as sent; compare with tb_span_ieq */
};

struct tb_http_conn;

struct tb_http_request {
    struct tb_arena arena; /* the handler's scratch too; freed after the response is written */
    enum tb_http_method method;
    struct tb_span path;  /* percent-decoded, without query; always begins with '/' */
    struct tb_span query; /* raw text after '?', may be empty */
    struct tb_http_header *headers;
    size_t n_headers;
    struct tb_span body; /* as sent (content-encoding not undone) */
    bool keep_alive;
    uint64_t received_ms; /* tb_clock_ms when the headers were complete */

    /* for the handler */
    void (*on_abort)(
        struct tb_http_request *req); /* client gone or server closing before the answer */
    void *user;
    void *client; /* who asks, when it is known */

    struct tb_http_conn *conn; /* private to http/; NULL for in-process calls */
    void *internal;            /* private to http/ */
};

typedef void (*tb_http_handler)(void *arg, struct tb_http_request *req);

struct tb_http_options {
    size_t max_body;            /* bytes; larger bodies are answered 413; 0 = limits.h's default */
    unsigned header_timeout_ms; /* 0 = the default of limits.h, for all time-outs */
    unsigned body_timeout_ms;
    unsigned write_timeout_ms;
    unsigned idle_timeout_ms;
    unsigned max_connections; /* 0 = no limit of ours */
};

struct tb_http_server;

/* handler is called for every complete request. loop is borrowed. */
int tb_http_server_create(struct tb_http_server **out, uv_loop_t *loop,
                          const struct tb_http_options *options, tb_http_handler handler, void *arg,
                          struct tb_error *err);
/* host: an IPv4/IPv6 address or name resolvable at start ("localhost", all of its addresses); port
 * 0 takes a free one, which is written to *bound_port. May be called several times. */
int tb_http_server_listen(struct tb_http_server *s, const char *host, int port, int *bound_port,
                          struct tb_error *err);
/* Stops accepting; idle connections close; running requests are answered with Connection: close.
 * Calls cb when the last connection is gone or, at the latest, after grace_ms, when what remains is
 * cut (on_abort is called for requests without answer). */
void tb_http_server_drain(struct tb_http_server *s, unsigned grace_ms, void (*cb)(void *arg),
                          void *arg);
/* Closes everything at once; cb when no handle is left and the server's memory is freed. Valid in
 * any state, also while draining (the drain's cb is then not called). */
void tb_http_server_close(struct tb_http_server *s, void (*cb)(void *arg), void *arg);

/* ---- request helpers */
/* First header of that name, or an empty span with p == NULL. */
struct tb_span tb_http_header_get(const struct tb_http_request *req, const char *name);
/* Query parameter, percent-decoded into the arena ('+' is a space); p == NULL when absent. */
struct tb_span tb_http_query_get(struct tb_http_request *req, const char *name);

/* ---- responses: exactly one per request. Header values must not hold CR or LF (they are refused
 * with a 500). Content-Length, Date, Connection and Server are added. One write per response. */
struct tb_http_field {
    const char *name;
    const char *value;
};
/* body is copied (small) or, when free_body is given, owned and freed by free_body(body_arg) after
 * the write. content_type may be NULL when there is no body. */
void tb_http_respond(struct tb_http_request *req, int status, const char *content_type,
                     const void *body, size_t body_len, const struct tb_http_field *fields,
                     size_t n_fields);
void tb_http_respond_owned(struct tb_http_request *req, int status, const char *content_type,
                           void *body, size_t body_len, void (*free_body)(void *arg),
                           void *body_arg, const struct tb_http_field *fields, size_t n_fields);
/* The client went away while no on_abort was set: an answer, which is owed all the same, goes
 * nowhere. */
bool tb_http_request_gone(struct tb_http_request *req);
/* Sends a regular file (with Range: single byte ranges, 206/416), reading it in the uv pool, never
 * whole in memory. 404 when it cannot be opened. */
void tb_http_respond_file(struct tb_http_request *req, const char *path, const char *content_type,
                          const struct tb_http_field *fields, size_t n_fields);
/* Sends bytes that somebody makes, of a known size, in the same way. */
struct tb_http_source {
    uint64_t size;
    int64_t modified_s; /* seconds since 1970 */
    /* In the pool, one call at a time: all n bytes from `at`, or negative. */
    int (*read)(struct tb_http_source *s, uint64_t at, void *to, size_t n);
    void (*free)(struct tb_http_source *s); /* on the loop, when it is not needed any more */
};
void tb_http_respond_source(struct tb_http_request *req, struct tb_http_source *s,
                            const char *content_type, const struct tb_http_field *fields,
                            size_t n_fields);
/* Streaming answer (chunked; HTTP/1.0: until close). begin, then any number of chunks, then end.
 * After on_abort the calls are ignored... the handler must still stop calling.
 * tb_http_stream_pending gives the bytes not yet written, for back-pressure. */
void tb_http_stream_begin(struct tb_http_request *req, int status, const char *content_type,
                          const struct tb_http_field *fields, size_t n_fields);
void tb_http_stream_chunk(struct tb_http_request *req, const void *p, size_t n);
void tb_http_stream_end(struct tb_http_request *req);
size_t tb_http_stream_pending(const struct tb_http_request *req);

/* ---- in-process calls: the same handler without a socket (for embedders and tests). body is
 * copied. cb is called on the loop, never from inside this call; the spans are valid during cb. */
struct tb_http_reply {
    int status;
    const struct tb_http_header *headers;
    size_t n_headers;
    struct tb_span body;
};
typedef void (*tb_http_reply_cb)(void *arg, const struct tb_http_reply *reply);
int tb_http_server_call(struct tb_http_server *s, enum tb_http_method method, const char *target,
                        const struct tb_http_field *fields, size_t n_fields, const void *body,
                        size_t body_len, tb_http_reply_cb cb, void *arg, struct tb_error *err);

/* Counters for /metrics. */
struct tb_http_stats {
    uint64_t connections_total, requests_total, bytes_in, bytes_out;
    unsigned connections_open, requests_open;
};
void tb_http_server_stats(const struct tb_http_server *s, struct tb_http_stats *out);

#endif
