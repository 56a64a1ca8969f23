/*
 * A connection: reads into the server's one buffer, feeds the parser, hands over one request at a
 * time and writes its answer.
 *
 *   READING ──request complete──► ANSWERING ──last byte written──► READING (keep-alive) or LINGER
 *
 * While a request is being answered reading goes on, to notice that the client left; what arrives
 * is kept in `ahead`, and reading stops when that is full. A client's end of stream while a request
 * waits for its answer counts as leaving.
 *
 * LINGER: closing a socket with unread input makes the kernel send a reset, which can destroy our
 * last answer on its way. So we end our side, throw away what still comes, and close at the
 * client's end.
 *
 * Memory: the struct and everything below it go in the close callback. Thread: the loop's.
 */
#include <string.h>

#include "http/internal.h"
#include "util/log.h"

struct queued_write {
    uv_write_t req;
    struct tb_http_conn *conn;
    char data[];
};

static void pump(struct tb_http_conn *c);

/* Bytes that the kernel took. */
static uint64_t written(const struct tb_http_conn *c)
{
    return c->sent - uv_stream_get_write_queue_size((const uv_stream_t *)&c->tcp);
}

void tb_http_conn_wait(struct tb_http_conn *c, enum tb_http_wait wait)
{
    struct tb_http_server *s = c->server;
    c->wait = wait;
    c->deadline = uv_now(s->loop) + s->timeout_ms[wait];
    if (wait == TB_HTTP_WAIT_WRITE) c->write_mark = written(c);
    tb_list_del(&c->node);
    tb_list_push(&s->waits[wait], &c->node);
}

/* The handler has nothing more to add. */
static bool answer_complete(const struct tb_http_exchange *x)
{
    return x && x->answered && (!x->streaming || x->ended);
}

/* ---- closing */

static void conn_closed(uv_handle_t *h)
{
    struct tb_http_conn *c = TB_CONTAINER_OF((uv_tcp_t *)h, struct tb_http_conn, tcp);
    struct tb_http_server *s = c->server;
    if (c->x) tb_http_exchange_abort(c->x);
    tb_http_parser_destroy(c->parser);
    tb_free(c->ahead);
    tb_free(c);
    s->n_conns--;
    tb_http_server_handle_closed(s);
}

void tb_http_conn_close(struct tb_http_conn *c)
{
    if (c->state == TB_HTTP_CONN_CLOSING) return;
    c->state = TB_HTTP_CONN_CLOSING;
    tb_list_del(&c->node);
    uv_close((uv_handle_t *)&c->tcp, conn_closed);
}

static void shutdown_cb(uv_shutdown_t *req, int status)
{
    struct tb_http_conn *c = TB_CONTAINER_OF(req, struct tb_http_conn, shutdown);
    if (status < 0) tb_http_conn_close(c);
}

static void alloc_cb(uv_handle_t *h, size_t hint, uv_buf_t *buf);
static void read_cb(uv_stream_t *stream, ssize_t n, const uv_buf_t *buf);

static void reading(struct tb_http_conn *c, bool on)
{
    if (c->reading == on || c->state == TB_HTTP_CONN_CLOSING) return;
    c->reading = on;
    if (!on) {
        uv_read_stop((uv_stream_t *)&c->tcp);
    } else if (uv_read_start((uv_stream_t *)&c->tcp, alloc_cb, read_cb)) {
        tb_http_conn_close(c);
    }
}

static void ahead_drop(struct tb_http_conn *c)
{
    tb_free(c->ahead);
    c->ahead = NULL;
    c->ahead_n = 0;
}

static void linger(struct tb_http_conn *c)
{
    if (c->eof || uv_shutdown(&c->shutdown, (uv_stream_t *)&c->tcp, shutdown_cb)) {
        tb_http_conn_close(c);
        return;
    }
    c->state = TB_HTTP_CONN_LINGER;
    ahead_drop(c);
    tb_http_conn_wait(c, TB_HTTP_WAIT_LINGER);
    reading(c, true);
}

/* ---- writing */

static void write_cb(uv_write_t *req, int status)
{
    struct queued_write *w = TB_CONTAINER_OF(req, struct queued_write, req);
    struct tb_http_conn *c = w->conn;
    c->writes--;
    tb_free(w);
    if (c->state == TB_HTTP_CONN_CLOSING) return;
    if (status < 0) {
        tb_http_conn_close(c);
        return;
    }
    tb_http_conn_sent(c);
}

bool tb_http_conn_send(struct tb_http_conn *c, uv_buf_t *bufs, unsigned n, bool stable)
{
    if (c->state == TB_HTTP_CONN_CLOSING) return false;
    uv_stream_t *stream = (uv_stream_t *)&c->tcp;
    int sent = uv_try_write(stream, bufs, n);
    if (sent == UV_EAGAIN) sent = 0;
    if (sent < 0) {
        tb_http_conn_close(c);
        return false;
    }
    size_t skip = (size_t)sent, copy = 0;
    for (unsigned i = 0; i < n; i++) {
        size_t k = TB_MIN(skip, (size_t)bufs[i].len);
        c->server->stats.bytes_out += bufs[i].len;
        c->sent += bufs[i].len;
        bufs[i].base += k;
        bufs[i].len -= k;
        skip -= k;
        if (!stable || i + 1 < n) copy += bufs[i].len;
    }
    size_t kept = stable ? bufs[n - 1].len : 0;
    if (copy + kept == 0) return true;

    struct queued_write *w = tb_try_malloc(sizeof(*w) + copy);
    if (!w) {
        tb_http_conn_close(c);
        return false;
    }
    w->conn = c;
    size_t at = 0;
    for (unsigned i = 0; i < n; i++) {
        if (stable && i + 1 == n) break;
        if (bufs[i].len) memcpy(w->data + at, bufs[i].base, bufs[i].len);
        at += bufs[i].len;
    }
    uv_buf_t rest[2];
    unsigned n_rest = 0;
    if (copy) rest[n_rest++] = (uv_buf_t){.base = w->data, .len = copy};
    if (kept) rest[n_rest++] = bufs[n - 1];
    if (uv_write(&w->req, stream, rest, n_rest, write_cb)) {
        tb_free(w);
        tb_http_conn_close(c);
        return false;
    }
    c->writes++;
    if (c->state == TB_HTTP_CONN_ANSWERING && c->wait != TB_HTTP_WAIT_WRITE) {
        tb_http_conn_wait(c, TB_HTTP_WAIT_WRITE);
    }
    return true;
}

/* The answer is complete and written. */
static void answered(struct tb_http_conn *c)
{
    struct tb_http_exchange *x = c->x;
    bool keep = x->keep && c->server->state == TB_HTTP_RUNNING;
    c->x = NULL;
    x->req.conn = NULL;
    x->finished = true;
    if (!x->in_handler) tb_http_exchange_free(x);
    if (!keep) {
        linger(c);
        return;
    }
    c->state = TB_HTTP_CONN_READING;
    tb_http_conn_wait(c, TB_HTTP_WAIT_IDLE);
    pump(c);
}

void tb_http_conn_sent(struct tb_http_conn *c)
{
    struct tb_http_exchange *x = c->x;
    if (c->state != TB_HTTP_CONN_ANSWERING || !x || c->writes > 0) return;
    if (x->file) {
        tb_http_file_sent(x->file);
    } else if (answer_complete(x)) {
        answered(c);
    } else if (c->wait == TB_HTTP_WAIT_WRITE) {
        tb_http_conn_wait(c, TB_HTTP_WAIT_ANSWER); /* a stream that has nothing to say for now */
    }
}

/* Our own answer to what cannot become a request. */
static void refuse(struct tb_http_conn *c, int status, const char *text)
{
    if (!c->x) c->x = tb_http_exchange_create(c->server);
    c->x->req.conn = c;
    c->state = TB_HTTP_CONN_ANSWERING;
    tb_http_conn_wait(c, TB_HTTP_WAIT_ANSWER);
    tb_http_respond_error(c->x, status, text, false);
}

/* ---- reading */

static void alloc_cb(uv_handle_t *h, size_t hint, uv_buf_t *buf)
{
    struct tb_http_conn *c = TB_CONTAINER_OF((uv_tcp_t *)h, struct tb_http_conn, tcp);
    size_t n = TB_HTTP_READ_BUF;
    if (c->state == TB_HTTP_CONN_ANSWERING) n = TB_MIN(n, TB_MAX_PIPELINED_BYTES - c->ahead_n);
    *buf = (uv_buf_t){.base = c->server->read_buf, .len = n};
}

/* Keeps what belongs to later requests. False: out of memory. */
static bool ahead_add(struct tb_http_conn *c, const char *p, size_t n)
{
    if (n == 0) return true;
    char *mem = tb_try_realloc(c->ahead, c->ahead_n + n);
    if (!mem) return false;
    memcpy(mem + c->ahead_n, p, n);
    c->ahead = mem;
    c->ahead_n += n;
    return true;
}

static void send_continue(struct tb_http_conn *c)
{
    static char text[] = "HTTP/1.1 100 Continue\r\n\r\n";
    uv_buf_t buf = {.base = text, .len = sizeof(text) - 1};
    tb_http_conn_send(c, &buf, 1, false);
}

/* Feeds the parser until the bytes are used up or a request must be answered first. Returns how
 * many were used. Handlers may answer at once, so this is a loop and not a recursion. */
static size_t feed(struct tb_http_conn *c, const char *data, size_t n)
{
    size_t at = 0;
    while (at < n && c->state == TB_HTTP_CONN_READING) {
        if (!c->x) {
            /* Some clients end a body with an extra empty line. */
            while (at < n && (data[at] == '\r' || data[at] == '\n'))
                at++;
            if (at == n) break;
            c->x = tb_http_exchange_create(c->server);
            c->x->req.conn = c;
            tb_http_parser_begin(c->parser, c->x);
            tb_http_conn_wait(c, TB_HTTP_WAIT_HEADER);
        }
        size_t used;
        enum tb_http_parse rc = tb_http_parser_feed(c->parser, data + at, n - at, &used);
        at += used;
        switch (rc) {
        case TB_HTTP_PARSE_CONTINUE: send_continue(c); __attribute__((fallthrough));
        case TB_HTTP_PARSE_MORE:
            if (c->state == TB_HTTP_CONN_READING && tb_http_parser_in_body(c->parser)) {
                tb_http_conn_wait(c, TB_HTTP_WAIT_BODY);
            }
            break;
        case TB_HTTP_PARSE_DONE:
            c->state = TB_HTTP_CONN_ANSWERING;
            tb_http_conn_wait(c, TB_HTTP_WAIT_ANSWER);
            tb_http_exchange_hand_over(c->x);
            break;
        case TB_HTTP_PARSE_ERROR: {
            const char *text;
            int status = tb_http_parser_error(c->parser, &text);
            refuse(c, status, text);
            return n;
        }
        }
    }
    return at;
}

/* Goes on after an answer: with the bytes read ahead, then with the socket. */
static void pump(struct tb_http_conn *c)
{
    if (c->pumping || c->state != TB_HTTP_CONN_READING) return;
    c->pumping = true;
    if (c->ahead_n) {
        size_t at = feed(c, c->ahead, c->ahead_n);
        if (at >= c->ahead_n) { /* or linger() dropped it all */
            ahead_drop(c);
        } else if (at) {
            memmove(c->ahead, c->ahead + at, c->ahead_n - at);
            c->ahead_n -= at;
        }
    }
    c->pumping = false;
    if (c->eof && c->state != TB_HTTP_CONN_LINGER) {
        /* Nobody waits for a request that is not answered by now, and no other will come. */
        if (c->state == TB_HTTP_CONN_READING || !answer_complete(c->x)) tb_http_conn_close(c);
        return;
    }
    if (c->ahead_n < TB_MAX_PIPELINED_BYTES) reading(c, true);
}

static void read_end(struct tb_http_conn *c, ssize_t status)
{
    c->eof = true;
    if (status == UV_EOF && c->state == TB_HTTP_CONN_ANSWERING && answer_complete(c->x)) {
        reading(c, false); /* let the answer go out, and those to what was read ahead */
    } else {
        tb_http_conn_close(c);
    }
}

static void read_cb(uv_stream_t *stream, ssize_t n, const uv_buf_t *buf)
{
    struct tb_http_conn *c = TB_CONTAINER_OF((uv_tcp_t *)stream, struct tb_http_conn, tcp);
    if (n == 0 || n == UV_ENOBUFS) return;
    if (n < 0) {
        read_end(c, n);
        return;
    }
    c->server->stats.bytes_in += (uint64_t)n;
    size_t at = 0;
    if (c->state == TB_HTTP_CONN_LINGER) return;
    if (c->state == TB_HTTP_CONN_READING) {
        c->pumping = true;
        at = feed(c, buf->base, (size_t)n);
        c->pumping = false;
    }
    if (c->state != TB_HTTP_CONN_ANSWERING) return;
    if (!ahead_add(c, buf->base + at, (size_t)n - at)) {
        tb_http_conn_close(c);
    } else if (c->ahead_n >= TB_MAX_PIPELINED_BYTES) {
        reading(c, false);
    }
}

/* ---- life */

void tb_http_conn_accept(struct tb_http_server *s, uv_stream_t *listener)
{
    struct tb_http_conn *c = tb_calloc(1, sizeof(*c));
    c->server = s;
    tb_list_init(&c->node);
    int rc = uv_tcp_init(s->loop, &c->tcp);
    if (rc) { /* only when libuv is out of memory for a closed loop */
        tb_free(c);
        return;
    }
    s->n_handles++;
    s->n_conns++;
    c->parser = tb_http_parser_create(s->options.max_body);
    rc = uv_accept(listener, (uv_stream_t *)&c->tcp);
    unsigned max = s->options.max_connections;
    /* Beyond the limit a client is told so; but not an endless number of them at once. */
    if (rc || (max && s->n_conns > max + max / 8 + 8)) {
        tb_http_conn_close(c);
        return;
    }
    s->stats.connections_total++;
    uv_tcp_nodelay(&c->tcp, 1);
    uv_tcp_keepalive(&c->tcp, 1, TB_HTTP_KEEPALIVE_S);
    c->state = TB_HTTP_CONN_READING;
    tb_http_conn_wait(c, TB_HTTP_WAIT_HEADER);
    if (max && s->n_conns > max) {
        refuse(c, 503, "too many connections");
        return;
    }
    reading(c, true);
}

void tb_http_conn_expired(struct tb_http_conn *c)
{
    switch (c->wait) {
    case TB_HTTP_WAIT_HEADER:
    case TB_HTTP_WAIT_BODY:
        if (c->x) {
            refuse(c, 408, "the request did not arrive in time");
        } else {
            tb_http_conn_close(c);
        }
        break;
    case TB_HTTP_WAIT_WRITE:
        if (written(c) != c->write_mark) {
            tb_http_conn_wait(c, TB_HTTP_WAIT_WRITE);
        } else {
            tb_http_conn_close(c);
        }
        break;
    default: tb_http_conn_close(c); break;
    }
}
