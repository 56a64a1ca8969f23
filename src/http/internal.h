/*
 * What the files of http/ share: the server, a connection, an exchange (one request with its
 * answer) and an in-process call. Nothing outside of http/ includes this.
 *
 *   server ─┬─ listeners
 *           ├─ connections, each in the list of what it waits for (that list's order is the order
 * of │  the deadlines, so the one timer looks at the heads only) └─ calls and orphans connection ──
 * at most one exchange: being read, being answered, or none
 *
 * Ownership: an exchange belongs to its connection or call until it is finished or aborted. If it
 * is aborted while the handler set no on_abort it becomes an orphan: nobody but the handler knows
 * it, and its answer frees it. All memory of a connection goes in the close callback of its uv
 * handle, so code may go on using a connection after tb_http_conn_close within the same call.
 *
 * Thread: the loop's.
 */
#ifndef TB_HTTP_INTERNAL_H
#define TB_HTTP_INTERNAL_H

#include <uv.h>

#include "http/http.h"
#include "http/parser.h"
#include "util/buf.h"
#include "util/clock.h"
#include "util/limits.h"
#include "util/list.h"
#include "util/mem.h"

enum {
    TB_HTTP_BACKLOG = 4096, /* the kernel clamps it to its own limit */
    TB_HTTP_READ_BUF = 64 * 1024,
    TB_HTTP_LINGER_MS = 2000,
    TB_HTTP_TICK_MS = 250,
    TB_HTTP_KEEPALIVE_S = 60,
};

/* What a connection waits for; each kind has one time-out, or none. */
enum tb_http_wait {
    TB_HTTP_WAIT_IDLE,   /* the first byte of the next request */
    TB_HTTP_WAIT_HEADER, /* the last header (and the very first byte of the connection) */
    TB_HTTP_WAIT_BODY,   /* progress of the body */
    TB_HTTP_WAIT_ANSWER, /* the handler; no time-out */
    TB_HTTP_WAIT_WRITE,  /* the client to take bytes */
    TB_HTTP_WAIT_LINGER, /* the client's end of stream after our last answer */
    TB_HTTP_WAITS,
};

enum tb_http_server_state { TB_HTTP_RUNNING, TB_HTTP_DRAINING, TB_HTTP_CLOSING };

struct tb_http_server {
    uv_loop_t *loop;
    struct tb_http_options options;
    tb_http_handler handler;
    void *handler_arg;
    enum tb_http_server_state state;

    struct tb_list listeners;
    struct tb_list waits[TB_HTTP_WAITS];
    unsigned timeout_ms[TB_HTTP_WAITS]; /* 0 = none */
    struct tb_list calls_new, calls_open, calls_done;
    struct tb_list orphans;
    unsigned n_handles, n_listeners, n_conns, n_calls, n_files;

    uv_timer_t tick;
    unsigned tick_ms;
    uv_async_t
        wake; /* runs what must not run inside of a caller's call; referenced while work is due */
    void (*drain_cb)(void *arg);
    void *drain_arg;
    uint64_t drain_deadline;
    void (*close_cb)(void *arg);
    void *close_arg;

    struct tb_buf head; /* scratch for the response head being built */
    int64_t date_sec;
    char date[TB_TIME_TEXT];
    struct tb_http_stats stats;
    char read_buf[TB_HTTP_READ_BUF]; /* shared: libuv hands it back before the next connection reads
                                      */
};

enum tb_http_conn_state {
    TB_HTTP_CONN_READING,
    TB_HTTP_CONN_ANSWERING, /* from the hand-over to the handler to the last byte of the answer */
    TB_HTTP_CONN_LINGER,    /* last answer sent; what still arrives is thrown away */
    TB_HTTP_CONN_CLOSING,
};

struct tb_http_conn {
    uv_tcp_t tcp;
    uv_shutdown_t shutdown;
    struct tb_http_server *server;
    struct tb_list node; /* in server->waits[wait] */
    enum tb_http_wait wait;
    enum tb_http_conn_state state;
    uint64_t deadline; /* uv_now */
    struct tb_http_parser *parser;
    struct tb_http_exchange *x; /* NULL between requests */
    char *ahead;                /* bytes read behind the request being answered */
    size_t ahead_n;
    uint64_t sent;       /* bytes given to libuv */
    uint64_t write_mark; /* bytes the kernel had taken when the write time-out was armed */
    unsigned writes;     /* uv_write requests in flight */
    bool reading;        /* uv_read_start is on */
    bool eof;            /* the client sent its FIN */
    bool pumping;        /* inside of the loop that feeds the parser */
};

struct tb_http_file;
struct tb_http_call;

struct tb_http_exchange {
    struct tb_http_request req;    /* first: the handler's pointer is ours */
    struct tb_http_server *server; /* NULL for an orphan that outlived the server */
    struct tb_http_call *call;
    struct tb_list node; /* in server->orphans */
    char *body_mem;      /* the request's body, when it is not in the arena */
    size_t body_cap;
    void (*free_body)(void *arg); /* of the answer's body */
    void *free_arg;
    struct tb_http_file *file;
    bool head;       /* HEAD: no body in the answer */
    bool http10;     /* no chunks */
    bool handed;     /* the handler has it */
    bool in_handler; /* the handler is on the stack: whoever called it frees the exchange */
    bool answered, streaming, ended, finished, aborted, orphan;
    bool chunked, keep;
    bool broken; /* a stream whose head was refused: its end sends a 500 */
};

struct tb_http_call {
    struct tb_list node;
    struct tb_http_server *server;
    struct tb_http_exchange *x; /* NULL once answered or aborted */
    tb_http_reply_cb cb;
    void *arg;
    struct tb_arena arena;
    struct tb_http_header *headers;
    size_t n_headers;
    int status;
    struct tb_buf body;
};

/* server.c */
void tb_http_server_wake(struct tb_http_server *s);
void tb_http_server_handle_closed(struct tb_http_server *s); /* counts down, may free the server */
void tb_http_server_check(struct tb_http_server *s);

/* conn.c */
void tb_http_conn_accept(struct tb_http_server *s, uv_stream_t *listener);
void tb_http_conn_wait(struct tb_http_conn *c, enum tb_http_wait wait);
void tb_http_conn_expired(struct tb_http_conn *c);
void tb_http_conn_close(struct tb_http_conn *c);
/* Sends what the socket takes at once and queues the rest; the queued rest is copied, except for
 * the last buffer when `stable` says that it lives as long as the exchange. False: the connection
 * is closing. */
bool tb_http_conn_send(struct tb_http_conn *c, uv_buf_t *bufs, unsigned n, bool stable);
/* To be called after a send that may have ended the answer or a part of it. */
void tb_http_conn_sent(struct tb_http_conn *c);

/* request.c */
struct tb_http_exchange *tb_http_exchange_create(struct tb_http_server *s);
void tb_http_exchange_free(struct tb_http_exchange *x);
/* The client is gone: on_abort, then the memory goes; or it becomes an orphan. */
void tb_http_exchange_abort(struct tb_http_exchange *x);
void tb_http_exchange_hand_over(struct tb_http_exchange *x);
/* Splits a request target into path and query. NULL, or why it is refused. */
const char *tb_http_target_set(struct tb_http_request *req, const char *target, size_t n);

/* response.c */
/* Our own answer (a refused request, a time-out, a missing file). The text is a literal of ours. */
void tb_http_respond_error(struct tb_http_exchange *x, int status, const char *text, bool keep);
/* Head for a body of that length that the caller sends itself. False: nothing more to do (no such
 * exchange any more, or a 500 was sent). */
bool tb_http_respond_head(struct tb_http_exchange *x, int status, const char *content_type,
                          uint64_t body_len, const struct tb_http_field *fields, size_t n_fields);
/* True when the exchange may be answered now; otherwise frees an orphan. */
bool tb_http_answer_begin(struct tb_http_exchange *x);

/* file.c */
void tb_http_file_sent(struct tb_http_file *f);   /* the last piece is written */
void tb_http_file_detach(struct tb_http_file *f); /* the exchange goes away */

/* call.c */
void tb_http_call_reply(struct tb_http_exchange *x, int status, const char *content_type,
                        const struct tb_http_field *fields, size_t n_fields);
void tb_http_call_body(struct tb_http_exchange *x, const void *p, size_t n);
void tb_http_call_done(struct tb_http_exchange *x);
void tb_http_call_cut(struct tb_http_exchange *x); /* it cannot become whole: a 500 instead */
void tb_http_calls_run(struct tb_http_server *s);  /* starts the new ones, delivers the done ones */
void tb_http_calls_abort(struct tb_http_server *s); /* answers 503 for all that are open */
void tb_http_calls_deliver(struct tb_http_server *s);

static inline struct tb_http_exchange *tb_http_exchange_of(struct tb_http_request *req)
{
    return TB_CONTAINER_OF(req, struct tb_http_exchange, req);
}

#endif
