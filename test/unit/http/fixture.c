/* See fixture.h. */
#include "fixture.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

#include "util/clock.h"

uint64_t fx_ms(void)
{
    return tb_clock_ms();
}

void fx_start(struct fixture *f, const struct tb_http_options *options, tb_http_handler handler)
{
    struct tb_error err = {0};
    signal(SIGPIPE, SIG_IGN);
    memset(f, 0, sizeof(*f));
    tb_list_init(&f->clients);
    tb_buf_init(&f->log, 1 << 20);
    assert_int_equal(uv_loop_init(&f->loop), 0);
    assert_int_equal(tb_http_server_create(&f->s, &f->loop, options, handler, f, &err), 0);
    int rc = tb_http_server_listen(f->s, "127.0.0.1", 0, &f->port, &err);
    if (rc) fail_msg("%s", err.msg);
    assert_true(f->port > 0);
}

static void closed(void *arg)
{
    struct fixture *f = arg;
    f->n_closed++;
}

void fx_stop(struct fixture *f)
{
    if (f->s) {
        tb_http_server_close(f->s, closed, f);
        FX_UNTIL(f, f->n_closed == 1);
        f->s = NULL;
    }
    while (!tb_list_empty(&f->clients)) {
        client_close(TB_LIST_ENTRY(f->clients.next, struct client, node));
    }
    assert_int_equal(uv_run(&f->loop, UV_RUN_NOWAIT), 0);
    assert_int_equal(uv_loop_close(&f->loop), 0);
    tb_buf_fini(&f->log);
}

struct tb_http_stats fx_stats(struct fixture *f)
{
    struct tb_http_stats st;
    tb_http_server_stats(f->s, &st);
    return st;
}

static bool client_read(struct client *c)
{
    static char buf[256 * 1024];
    if (c->eof) return false;
    ssize_t n = recv(c->fd, buf, sizeof(buf), MSG_DONTWAIT);
    if (n > 0) {
        assert_int_equal(tb_buf_append(&c->in, buf, (size_t)n), 0);
        return true;
    }
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return false;
    c->eof = true;
    c->reset = n < 0;
    return true;
}

void fx_turn(struct fixture *f)
{
    struct tb_http_stats a, b;
    bool moved = false;
    if (f->s) tb_http_server_stats(f->s, &a);
    uv_run(&f->loop, UV_RUN_NOWAIT);
    if (f->s && !f->n_closed) {
        tb_http_server_stats(f->s, &b);
        moved = memcmp(&a, &b, sizeof(a)) != 0;
    }
    TB_LIST_FOREACH (it, &f->clients) {
        moved |= client_read(TB_LIST_ENTRY(it, struct client, node));
    }
    if (!moved) poll(NULL, 0, 1);
}

/* ---- handlers */

void fx_echo(void *arg, struct tb_http_request *req)
{
    static const char *const names[] = {"OTHER", "GET",    "HEAD",  "POST",
                                        "PUT",   "DELETE", "PATCH", "OPTIONS"};
    struct fixture *f = arg;
    assert_true(req->path.n > 0 && req->path.p[0] == '/');
    char *line = tb_arena_printf(&req->arena, "%s %.*s?%.*s %.*s", names[req->method],
                                 (int)req->path.n, req->path.p, (int)req->query.n, req->query.p,
                                 (int)req->body.n, req->body.p ? req->body.p : "");
    tb_buf_puts(&f->log, line);
    tb_buf_puts(&f->log, "\n");
    tb_http_respond(req, 200, "text/plain", line, strlen(line), NULL, 0);
}

static void held_abort(struct tb_http_request *req)
{
    struct fixture *f = ((void **)req->user)[0];
    struct tb_http_request **slot = ((void **)req->user)[1];
    assert_ptr_equal(*slot, req);
    *slot = NULL;
    f->n_aborted++;
}

void fx_hold(void *arg, struct tb_http_request *req)
{
    struct fixture *f = arg;
    assert_true(f->n_held < TB_ARRAY_LEN(f->held));
    void **user = tb_arena_alloc(&req->arena, 2 * sizeof(*user));
    user[0] = f;
    user[1] = &f->held[f->n_held];
    req->user = user;
    req->on_abort = held_abort;
    f->held[f->n_held++] = req;
}

/* ---- clients */

struct client *client_open(struct fixture *f)
{
    struct client *c = tb_calloc(1, sizeof(*c));
    c->f = f;
    tb_buf_init(&c->in, 1u << 30);
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    assert_true(c->fd >= 0);
    int on = 1;
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)f->port)};
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    uint64_t before = fx_stats(f).connections_total;
    int rc = connect(c->fd, (struct sockaddr *)&a, sizeof(a));
    if (rc < 0) assert_int_equal(errno, EINPROGRESS);
    tb_list_push(&f->clients, &c->node);
    /* Clients beyond the server's limit may be dropped without being counted. */
    FX_UNTIL(f, fx_stats(f).connections_total > before || c->eof);
    return c;
}

void client_close(struct client *c)
{
    tb_list_del(&c->node);
    close(c->fd);
    tb_buf_fini(&c->in);
    tb_free(c);
}

void client_reset(struct client *c)
{
    struct linger l = {1, 0};
    setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &l, sizeof(l));
    client_close(c);
}

bool client_send(struct client *c, const void *p, size_t n)
{
    const char *at = p;
    uint64_t end = fx_ms() + HANG_MS;
    while (n > 0) {
        ssize_t k = send(c->fd, at, n, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (k > 0) {
            at += k;
            n -= (size_t)k;
            continue;
        }
        if (errno == EPIPE || errno == ECONNRESET) return false;
        assert_true(errno == EAGAIN);
        if (fx_ms() > end) fail_msg("hangs sending");
        fx_turn(c->f);
    }
    return true;
}

void client_puts(struct client *c, const char *s)
{
    client_send(c, s, strlen(s));
}

void client_send_slowly(struct client *c, const void *p, size_t n, size_t step)
{
    const char *at = p;
    while (n > 0 && !c->eof) {
        size_t k = TB_MIN(n, step);
        uint64_t want = fx_stats(c->f).bytes_in + k;
        client_send(c, at, k);
        FX_UNTIL(c->f, fx_stats(c->f).bytes_in >= want || c->eof);
        at += k;
        n -= k;
    }
}

const char *reply_field(const struct reply *r, const char *name, char *out, size_t size)
{
    for (const char *p = r->head; (p = strstr(p, "\r\n")) && p[2];) {
        p += 2;
        size_t n = strlen(name);
        if (strncasecmp(p, name, n) != 0 || p[n] != ':') continue;
        p += n + 1 + (p[n + 1] == ' ');
        const char *end = strstr(p, "\r\n");
        size_t k = TB_MIN((size_t)(end - p), size - 1);
        memcpy(out, p, k);
        out[k] = '\0';
        return out;
    }
    return NULL;
}

/* Undoes chunks in place. False while they are incomplete. */
static bool unchunk(char *p, size_t n, char **body, size_t *body_n, size_t *used)
{
    if (!p) return false;
    char *out = tb_malloc(n + 1);
    size_t at = 0, k = 0;
    while (at < n) {
        char *lf = memchr(p + at, '\n', n - at);
        if (!lf) break;
        char *end;
        size_t size = strtoul(p + at, &end, 16);
        assert_true(end > p + at && *end == '\r');
        at = (size_t)(lf - p) + 1;
        if (n - at < size + 2) break;
        memcpy(out + k, p + at, size);
        k += size;
        at += size;
        assert_memory_equal(p + at, "\r\n", 2);
        at += 2;
        if (size == 0) {
            memcpy(p, out, k);
            tb_free(out);
            *body = p;
            *body_n = k;
            *used = at;
            return true;
        }
    }
    tb_free(out);
    return false;
}

static __attribute__((noinline)) char *head_end(char *p, size_t n)
{
    return memmem(p, n, "\r\n\r\n", 4);
}

static bool try_reply(struct client *c, struct reply *r, bool head_only)
{
    if (!c->in.p) return false;
    char *p = c->in.p + c->at;
    size_t n = c->in.n - c->at;
    char *end = head_end(p, n);
    if (!end) return false;
    size_t head_n = (size_t)(end - p) + 4;
    assert_true(head_n < sizeof(r->head));
    memcpy(r->head, p, head_n);
    r->head[head_n] = '\0';
    int got = sscanf(r->head, "HTTP/1.1 %3d ", &r->status);
    assert_int_equal(got, 1);
    r->body = p + head_n;
    r->body_n = 0;
    char text[64];
    size_t used = head_n;
    bool none = head_only || r->status == 204 || r->status == 304 || r->status == 100;
    if (!none && reply_field(r, "Content-Length", text, sizeof(text))) {
        r->body_n = strtoul(text, NULL, 10);
        if (n - head_n < r->body_n) return false;
        used += r->body_n;
    } else if (!none && reply_field(r, "Transfer-Encoding", text, sizeof(text))) {
        assert_string_equal(text, "chunked");
        size_t k;
        if (!unchunk(r->body, n - head_n, &r->body, &r->body_n, &k)) return false;
        used += k;
    } else if (!none) {
        if (!c->eof) return false;
        r->body_n = n - head_n;
        used = n;
    }
    c->at += used;
    return true;
}

void client_reply(struct client *c, struct reply *r, bool head_only)
{
    uint64_t end = fx_ms() + HANG_MS;
    while (!try_reply(c, r, head_only)) {
        if (c->eof || fx_ms() > end) {
            fail_msg("no reply, %s; so far: %.200s", c->eof ? "closed" : "hangs",
                     c->in.p ? c->in.p + c->at : "");
        }
        fx_turn(c->f);
    }
}

bool client_has_reply(struct client *c)
{
    return c->in.n > c->at;
}

void client_expect(struct client *c, int status, const char *body)
{
    struct reply r;
    client_reply(c, &r, false);
    if (r.status != status) fail_msg("status %d instead of %d: %.300s", r.status, status, r.head);
    if (!body) return;
    if (r.body_n != strlen(body) || memcmp(r.body, body, r.body_n) != 0) {
        fail_msg("body '%.*s' instead of '%s'", (int)TB_MIN(r.body_n, (size_t)200), r.body, body);
    }
}

void client_expect_eof(struct client *c)
{
    FX_UNTIL(c->f, c->eof);
    if (c->in.n != c->at) fail_msg("unexpected bytes: %.200s", c->in.p + c->at);
}
