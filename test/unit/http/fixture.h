/*
 * A server on a free port and raw clients, all on one loop and one thread: fx_turn runs the loop
 * once and lets the clients read. Waiting ends with a failed assertion after HANG_MS, which is no
 * timing assertion but a guard against hanging.
 */
#ifndef TB_TEST_HTTP_FIXTURE_H
#define TB_TEST_HTTP_FIXTURE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "http/http.h"
#include "util/buf.h"
#include "util/limits.h"
#include "util/list.h"
#include "util/mem.h"

enum { HANG_MS = 60000 };

struct fixture {
    uv_loop_t loop;
    struct tb_http_server *s;
    int port;
    struct tb_buf log; /* what handlers saw, see fx_echo */
    struct tb_list clients;
    struct tb_http_request *held[4096]; /* requests of fx_hold, NULL once aborted */
    unsigned n_held, n_aborted;
    unsigned n_closed; /* by the server's close callback */
};

struct client {
    struct tb_list node;
    struct fixture *f;
    int fd;
    struct tb_buf in;
    size_t at; /* up to here replies were taken */
    bool eof;  /* the server's end of stream, or a reset */
    bool reset;
};

struct reply {
    int status;
    char head[8192];
    char *body; /* in the client's buffer's place, valid until the next reply */
    size_t body_n;
};

void fx_start(struct fixture *f, const struct tb_http_options *options, tb_http_handler handler);
void fx_stop(struct fixture *f); /* asserts that nothing is left on the loop */
void fx_turn(struct fixture *f);
uint64_t fx_ms(void);
struct tb_http_stats fx_stats(struct fixture *f);

/* Waits for a condition on the fixture. */
#define FX_UNTIL(f, cond)                                                                          \
    do {                                                                                           \
        uint64_t fx_end = fx_ms() + HANG_MS;                                                       \
        while (!(cond)) {                                                                          \
            if (fx_ms() > fx_end) fail_msg("hangs waiting for %s", #cond);                         \
            fx_turn(f);                                                                            \
        }                                                                                          \
    } while (0)

/* Handlers. Echo answers 200 with a line "METHOD path?query body" and appends it to the log; hold
 * keeps the request in f->held with an on_abort. */
void fx_echo(void *arg, struct tb_http_request *req);
void fx_hold(void *arg, struct tb_http_request *req);

struct client *client_open(struct fixture *f);
void client_close(struct client *c);
void client_reset(struct client *c); /* closes with a RST */
/* False: the server cut the connection. */
bool client_send(struct client *c, const void *p, size_t n);
void client_puts(struct client *c, const char *s);
/* Sends `step` bytes at a time, each taken by the server before the next. Stops when it closes. */
void client_send_slowly(struct client *c, const void *p, size_t n, size_t step);
void client_reply(struct client *c, struct reply *r, bool head_only);
bool client_has_reply(struct client *c);
void client_expect(struct client *c, int status, const char *body);
void client_expect_eof(struct client *c); /* and that nothing more came */
const char *reply_field(const struct reply *r, const char *name, char *out, size_t size);

#endif
