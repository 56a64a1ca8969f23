/*
 * The server: listeners, the one timer, drain and close. See internal.h for who owns what.
 *
 * Nothing calls back from inside of the caller's call: what is due at once (a finished drain,
 * in-process calls) waits for the `wake` handle. Thread: the loop's.
 */
#include <stdio.h>
#include <string.h>

#include "http/internal.h"
#include "util/log.h"

struct listener {
    uv_tcp_t tcp;
    struct tb_http_server *server;
    struct tb_list node;
};

static bool work_due(const struct tb_http_server *s)
{
    return s->n_calls > 0 || s->drain_cb;
}

void tb_http_server_wake(struct tb_http_server *s)
{
    if (s->state == TB_HTTP_CLOSING) return;
    uv_ref((uv_handle_t *)&s->wake);
    uv_async_send(&s->wake);
}

static void drained(struct tb_http_server *s)
{
    if (!s->drain_cb || s->n_conns || s->n_calls || s->n_listeners) return;
    void (*cb)(void *) = s->drain_cb;
    s->drain_cb = NULL;
    cb(s->drain_arg);
}

static void wake_cb(uv_async_t *h)
{
    struct tb_http_server *s = TB_CONTAINER_OF(h, struct tb_http_server, wake);
    tb_http_calls_run(s);
    if (s->state == TB_HTTP_DRAINING) drained(s);
    if (s->state != TB_HTTP_CLOSING && !work_due(s)) uv_unref((uv_handle_t *)&s->wake);
}

/* Called whenever something that a drain or a close waits for is gone. */
void tb_http_server_check(struct tb_http_server *s)
{
    if (s->state == TB_HTTP_DRAINING && s->drain_cb) tb_http_server_wake(s);
    if (s->state != TB_HTTP_CLOSING || s->n_handles || s->n_files) return;
    tb_http_calls_deliver(s);
    TB_LIST_FOREACH_SAFE (it, tmp, &s->orphans) {
        struct tb_http_exchange *x = TB_LIST_ENTRY(it, struct tb_http_exchange, node);
        tb_list_del(it);
        x->server = NULL;
    }
    void (*cb)(void *) = s->close_cb;
    void *arg = s->close_arg;
    tb_buf_fini(&s->head);
    tb_free(s);
    if (cb) cb(arg);
}

void tb_http_server_handle_closed(struct tb_http_server *s)
{
    TB_BUG_ON(s->n_handles == 0);
    s->n_handles--;
    tb_http_server_check(s);
}

static void own_handle_closed(uv_handle_t *h)
{
    tb_http_server_handle_closed(h->data);
}

static void listener_closed(uv_handle_t *h)
{
    struct listener *l = TB_CONTAINER_OF((uv_tcp_t *)h, struct listener, tcp);
    struct tb_http_server *s = l->server;
    s->n_listeners--;
    tb_free(l);
    tb_http_server_handle_closed(s);
}

static void listener_close(struct listener *l)
{
    tb_list_del(&l->node);
    uv_close((uv_handle_t *)&l->tcp, listener_closed);
}

static void listeners_close(struct tb_http_server *s)
{
    TB_LIST_FOREACH_SAFE (it, tmp, &s->listeners) {
        listener_close(TB_LIST_ENTRY(it, struct listener, node));
    }
}

/* ---- time */

static void conns_close(struct tb_http_server *s, bool idle_only)
{
    for (int k = 0; k < TB_HTTP_WAITS; k++) {
        TB_LIST_FOREACH_SAFE (it, tmp, &s->waits[k]) {
            struct tb_http_conn *c = TB_LIST_ENTRY(it, struct tb_http_conn, node);
            if (idle_only && (c->state != TB_HTTP_CONN_READING || c->x)) continue;
            tb_http_conn_close(c);
        }
    }
}

static void tick_cb(uv_timer_t *t)
{
    struct tb_http_server *s = TB_CONTAINER_OF(t, struct tb_http_server, tick);
    uint64_t now = uv_now(s->loop);
    for (int k = 0; k < TB_HTTP_WAITS; k++) {
        if (s->timeout_ms[k] == 0) continue;
        /* Each list is in the order of its deadlines. Who is given more time goes to its tail. */
        while (!tb_list_empty(&s->waits[k])) {
            struct tb_http_conn *c = TB_LIST_ENTRY(s->waits[k].next, struct tb_http_conn, node);
            if (c->deadline > now) break;
            tb_http_conn_expired(c);
        }
    }
    if (s->state == TB_HTTP_DRAINING && s->drain_cb && now >= s->drain_deadline) {
        conns_close(s, false);
        tb_http_calls_abort(s);
    }
    bool draining = s->state == TB_HTTP_DRAINING && s->drain_cb;
    if (s->state != TB_HTTP_CLOSING && s->n_conns == 0 && !draining) uv_timer_stop(t);
}

/* ---- life */

int tb_http_server_create(struct tb_http_server **out, uv_loop_t *loop,
                          const struct tb_http_options *options, tb_http_handler handler, void *arg,
                          struct tb_error *err)
{
    *out = NULL;
    struct tb_http_server *s = tb_calloc(1, sizeof(*s));
    int rc = uv_async_init(loop, &s->wake, wake_cb);
    if (rc) {
        tb_free(s);
        return tb_error_set(err, rc, "cannot create the HTTP server: %s", uv_strerror(rc));
    }
    uv_timer_init(loop, &s->tick); /* cannot fail */
    uv_unref((uv_handle_t *)&s->wake);
    s->tick.data = s->wake.data = s;
    s->n_handles = 2;
    s->loop = loop;
    if (options) s->options = *options;
    if (s->options.max_body == 0) s->options.max_body = TB_MAX_BODY_DEFAULT;
    s->handler = handler;
    s->handler_arg = arg;
    const struct tb_http_options *o = &s->options;
    unsigned header = o->header_timeout_ms ? o->header_timeout_ms : TB_HTTP_HEADER_TIMEOUT_MS;
    unsigned body = o->body_timeout_ms ? o->body_timeout_ms : TB_HTTP_BODY_TIMEOUT_MS;
    unsigned write = o->write_timeout_ms ? o->write_timeout_ms : TB_HTTP_WRITE_TIMEOUT_MS;
    unsigned idle = o->idle_timeout_ms ? o->idle_timeout_ms : TB_HTTP_IDLE_TIMEOUT_MS;
    s->timeout_ms[TB_HTTP_WAIT_IDLE] = idle;
    s->timeout_ms[TB_HTTP_WAIT_HEADER] = header;
    s->timeout_ms[TB_HTTP_WAIT_BODY] = body;
    s->timeout_ms[TB_HTTP_WAIT_WRITE] = write;
    s->timeout_ms[TB_HTTP_WAIT_LINGER] = TB_HTTP_LINGER_MS;
    unsigned least = TB_MIN(TB_MIN(header, body), TB_MIN(write, idle));
    s->tick_ms = TB_MAX(10u, TB_MIN((unsigned)TB_HTTP_TICK_MS, least / 4));
    for (int k = 0; k < TB_HTTP_WAITS; k++)
        tb_list_init(&s->waits[k]);
    tb_list_init(&s->listeners);
    tb_list_init(&s->calls_new);
    tb_list_init(&s->calls_open);
    tb_list_init(&s->calls_done);
    tb_list_init(&s->orphans);
    tb_buf_init(&s->head, 256 * 1024);
    s->date_sec = -1;
    *out = s;
    return 0;
}

static void connection_cb(uv_stream_t *stream, int status)
{
    struct listener *l = TB_CONTAINER_OF((uv_tcp_t *)stream, struct listener, tcp);
    if (status < 0) {
        tb_log(TB_LOG_WARN, "http", "cannot accept: %s", uv_strerror(status));
        return;
    }
    struct tb_http_server *s = l->server;
    tb_http_conn_accept(s, stream);
    if (s->n_conns && !uv_is_active((uv_handle_t *)&s->tick)) {
        uv_timer_start(&s->tick, tick_cb, s->tick_ms, s->tick_ms);
    }
}

static int port_of(const uv_tcp_t *tcp)
{
    struct sockaddr_storage addr;
    int len = sizeof(addr);
    int rc = uv_tcp_getsockname(tcp, (struct sockaddr *)&addr, &len);
    if (rc) return rc;
    if (addr.ss_family == AF_INET6) return ntohs(((struct sockaddr_in6 *)&addr)->sin6_port);
    return ntohs(((struct sockaddr_in *)&addr)->sin_port);
}

/* The bound port, or a libuv code. port 0: the address's own. */
static int listen_on(struct tb_http_server *s, const struct addrinfo *a, int port)
{
    struct listener *l = tb_calloc(1, sizeof(*l));
    l->server = s;
    uv_tcp_init(s->loop, &l->tcp);
    tb_list_push(&s->listeners, &l->node);
    s->n_listeners++;
    s->n_handles++;
    struct sockaddr_storage addr = {0};
    memcpy(&addr, a->ai_addr, TB_MIN((size_t)a->ai_addrlen, sizeof(addr)));
    in_port_t net = htons((uint16_t)port);
    if (port && addr.ss_family == AF_INET6) ((struct sockaddr_in6 *)&addr)->sin6_port = net;
    if (port && addr.ss_family == AF_INET) ((struct sockaddr_in *)&addr)->sin_port = net;
    int rc = uv_tcp_bind(&l->tcp, (struct sockaddr *)&addr, 0);
    if (rc == 0) rc = uv_listen((uv_stream_t *)&l->tcp, TB_HTTP_BACKLOG, connection_cb);
    if (rc == 0) rc = port_of(&l->tcp);
    if (rc < 0) listener_close(l);
    return rc;
}

int tb_http_server_listen(struct tb_http_server *s, const char *host, int port, int *bound_port,
                          struct tb_error *err)
{
    if (port < 0 || port > 65535) return tb_error_set(err, TB_EINVAL, "invalid port %d", port);
    if (s->state != TB_HTTP_RUNNING) {
        return tb_error_set(err, TB_ECANCELED, "the HTTP server is stopping");
    }
    char service[8];
    snprintf(service, sizeof(service), "%d", port);
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
    uv_getaddrinfo_t query;
    /* Without a callback it resolves at once; this is start-up, nothing else runs yet. */
    int rc = uv_getaddrinfo(s->loop, &query, NULL, host, service, &hints);
    if (rc) {
        return tb_error_set(err, rc, "cannot resolve '%s': %s", host, uv_strerror(rc));
    }
    /* A name may stand for several addresses ("localhost"): all of them, on one port. Some may not
     * exist on this machine; but a port that is taken on one is taken. */
    int bound = 0;
    for (struct addrinfo *a = query.addrinfo; a; a = a->ai_next) {
        int got = listen_on(s, a, bound);
        if (got > 0) {
            if (bound == 0) bound = got;
        } else {
            rc = got;
            if (rc == UV_EADDRINUSE && port != 0) break;
        }
    }
    uv_freeaddrinfo(query.addrinfo);
    if (bound == 0 || (rc == UV_EADDRINUSE && port != 0)) {
        return tb_error_set(err, rc, "cannot listen on %s:%d: %s", host, port, uv_strerror(rc));
    }
    if (bound_port) *bound_port = bound;
    tb_log(TB_LOG_DEBUG, "http", "listening host=%s port=%d", host, bound);
    return 0;
}

static void nothing(void *arg)
{
    (void)arg;
}

void tb_http_server_drain(struct tb_http_server *s, unsigned grace_ms, void (*cb)(void *arg),
                          void *arg)
{
    if (s->state == TB_HTTP_CLOSING) return;
    s->state = TB_HTTP_DRAINING;
    s->drain_cb = cb ? cb : nothing;
    s->drain_arg = arg;
    uv_update_time(s->loop);
    s->drain_deadline = uv_now(s->loop) + grace_ms;
    listeners_close(s);
    conns_close(s, true);
    uv_timer_start(&s->tick, tick_cb, TB_MIN(grace_ms, s->tick_ms), s->tick_ms);
    tb_http_server_wake(s);
}

void tb_http_server_close(struct tb_http_server *s, void (*cb)(void *arg), void *arg)
{
    s->close_cb = cb;
    s->close_arg = arg;
    if (s->state == TB_HTTP_CLOSING) return;
    s->state = TB_HTTP_CLOSING;
    s->drain_cb = NULL;
    listeners_close(s);
    conns_close(s, false);
    tb_http_calls_abort(s); /* before the files that answer them are waited for */
    uv_close((uv_handle_t *)&s->wake, own_handle_closed);
    uv_close((uv_handle_t *)&s->tick, own_handle_closed);
}

void tb_http_server_stats(const struct tb_http_server *s, struct tb_http_stats *out)
{
    *out = s->stats;
    out->connections_open = s->n_conns;
}
