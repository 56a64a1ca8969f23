/*
 * The server inside a program of your own: one libuv loop runs a timer and a route of ours beside
 * the Tinker API; an operation is submitted in-process; then everything is shut down with no handle
 * left.
 *
 *   cc embed.c $(pkg-config --cflags --libs tinkerbell libuv) -o embed
 *   ./embed MODEL_DIR DATA_DIR
 *
 * Prints what happens and exits 0 when all of it did.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tinkerbell.h>

struct app {
    uv_loop_t loop;
    uv_timer_t timer;
    tb_server_t *server;
    char session[64];
    int ticks, route_hits, closed;
    int step; /* of the in-process conversation */
    int failed;
};

static void on_reply(void *arg, const tb_reply_t *reply);

static void call(struct app *a, const char *method, const char *target, const char *body)
{
    char err[TB_ERROR_SIZE];
    if (tb_server_call(a->server, method, target, body, body ? strlen(body) : 0, on_reply, a,
                       err)) {
        fprintf(stderr, "embed: %s %s: %s\n", method, target, err);
        exit(1);
    }
}

/* A text field of a small JSON answer; a real program would use its JSON library. */
static int field(const tb_reply_t *reply, const char *name, char *out, size_t out_size)
{
    char key[64], body[4096];
    snprintf(body, sizeof(body), "%.*s", (int)reply->body_len, reply->body ? reply->body : "");
    snprintf(key, sizeof(key), "\"%s\"", name);
    const char *p = strstr(body, key);
    if (!p || !(p = strchr(p + strlen(key), '"'))) return -1;
    size_t n = strcspn(++p, "\"");
    if (n >= out_size) return -1;
    memcpy(out, p, n);
    out[n] = '\0';
    return 0;
}

static void on_closed(void *arg)
{
    struct app *a = arg;
    a->closed = 1;
    uv_close((uv_handle_t *)&a->timer, NULL);
}

/* One step of the conversation for each answer: session → model → its future → our own route → end.
 */
static void on_reply(void *arg, const tb_reply_t *reply)
{
    struct app *a = arg;
    char text[300], body[512];

    printf("embed: answer %d: %d %.*s\n", a->step, reply->status, (int)reply->body_len,
           reply->body ? reply->body : "");
    if (reply->status != 200) a->failed = 1;
    switch (a->failed ? -1 : a->step++) {
    case 0:
        if (field(reply, "session_id", a->session, sizeof(a->session))) break;
        snprintf(body, sizeof(body),
                 "{\"session_id\":\"%s\",\"model_seq_id\":0,\"base_model\":\"demo\","
                 "\"lora_config\":{\"rank\":4,\"seed\":1}}",
                 a->session);
        call(a, "POST", "/api/v1/create_model", body);
        return;
    case 1:
        if (field(reply, "request_id", text, sizeof(text))) break;
        snprintf(body, sizeof(body), "{\"request_id\":\"%s\"}", text);
        call(a, "POST", "/api/v1/retrieve_future", body);
        return;
    case 2:
        if (field(reply, "model_id", text, sizeof(text))) break;
        call(a, "GET", "/hello", NULL);
        return;
    case 3: tb_server_close(a->server, on_closed, a); return;
    default: break;
    }
    a->failed = 1;
    tb_server_close(a->server, on_closed, a);
}

static void on_hello(void *arg, tb_request_t *req)
{
    struct app *a = arg;
    a->route_hits++;
    tb_respond(req, 200, "text/plain", "hello from the host\n", 20);
}

static void on_timer(uv_timer_t *t)
{
    struct app *a = t->data;
    a->ticks++;
}

int main(int argc, char **argv)
{
    struct app a;
    char err[TB_ERROR_SIZE];
    int port;

    if (argc != 3) {
        fprintf(stderr, "usage: embed MODEL_DIR DATA_DIR\n");
        return 2;
    }
    signal(SIGPIPE, SIG_IGN); /* a client that hangs up is an error code, not a signal */
    memset(&a, 0, sizeof(a));
    uv_loop_init(&a.loop);
    uv_timer_init(&a.loop, &a.timer);
    a.timer.data = &a;
    uv_timer_start(&a.timer, on_timer, 1, 1);

    tb_options_t o;
    tb_options_init(&o);
    tb_options_add_model(&o, "demo", argv[1]);
    o.data_dir = argv[2];
    if (tb_server_create(&a.server, &a.loop, &o, err) ||
        tb_server_listen(a.server, "127.0.0.1", 0, &port, err) ||
        tb_server_route(a.server, "GET", "/hello", on_hello, &a, err)) {
        fprintf(stderr, "embed: %s\n", err);
        return 1;
    }
    printf("embed: serving on port %d\n", port);
    call(&a, "POST", "/api/v1/create_session", "{\"sdk_version\":\"embed\",\"tags\":[]}");

    uv_run(&a.loop, UV_RUN_DEFAULT);
    int left = uv_loop_close(&a.loop); /* UV_EBUSY when a handle was left */
    printf("embed: ticks=%d route_hits=%d closed=%d handles_left=%s\n", a.ticks, a.route_hits,
           a.closed, left ? "yes" : "no");
    return !a.failed && a.closed && a.route_hits == 1 && a.ticks > 0 && !left ? 0 : 1;
}
