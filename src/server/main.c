/*
 * The daemon: options, signals, one line when ready, an orderly end. All that a library must not do
 * to its host (signals, stdout, process limits, the environment) happens here and nowhere else.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "server/options.h"
#include "tinkerbell.h"
#include "util/log.h"
#include "util/mem.h"

#define DRAIN_GRACE_MS 10000
#define EXIT_USAGE     2

struct daemon {
    uv_loop_t loop;
    uv_signal_t sigterm, sigint;
    tb_server_t *server;
    bool draining, closing;
};

static void on_closed(void *arg)
{
    struct daemon *d = arg;
    uv_close((uv_handle_t *)&d->sigterm, NULL);
    uv_close((uv_handle_t *)&d->sigint, NULL);
}

static void close_server(struct daemon *d)
{
    if (d->closing) return;
    d->closing = true;
    tb_server_close(d->server, on_closed, d);
}

static void on_drained(void *arg)
{
    close_server(arg);
}

static void on_signal(uv_signal_t *h, int signum)
{
    struct daemon *d = h->data;
    if (d->draining) {
        tb_log(TB_LOG_WARN, "server", "signal %d again: cutting connections", signum);
        close_server(d);
        return;
    }
    d->draining = true;
    tb_log(TB_LOG_INFO, "server", "signal %d: draining", signum);
    tb_server_drain(d->server, DRAIN_GRACE_MS, on_drained, d);
}

/* Thousands of long polls are thousands of sockets. */
static void raise_file_limit(void)
{
    struct rlimit r;
    if (getrlimit(RLIMIT_NOFILE, &r) == 0 && r.rlim_cur < r.rlim_max) {
        r.rlim_cur = r.rlim_max;
        if (setrlimit(RLIMIT_NOFILE, &r))
            tb_log(TB_LOG_WARN, "server", "cannot raise RLIMIT_NOFILE");
    }
}

static int die(int code, const char *text)
{
    fprintf(stderr, "tinkerbell: %s\n", text);
    return code;
}

static int serve(struct tb_cli *cli)
{
    struct daemon d = {0};
    char err[TB_ERROR_SIZE];
    char pool[16];
    int port;

    snprintf(pool, sizeof(pool), "%d", TB_POOL_THREADS + 1 + TB_MAX(cli->options.n_devices, 1));
    setenv("UV_THREADPOOL_SIZE", pool, 0);
    signal(SIGPIPE, SIG_IGN);
    raise_file_limit();
    if (uv_loop_init(&d.loop)) return die(1, "cannot create the event loop");

    if (tb_server_create(&d.server, &d.loop, &cli->options, err)) {
        uv_loop_close(&d.loop);
        return die(EXIT_USAGE, err);
    }
    uv_signal_init(&d.loop, &d.sigterm);
    uv_signal_init(&d.loop, &d.sigint);
    d.sigterm.data = d.sigint.data = &d;
    uv_signal_start(&d.sigterm, on_signal, SIGTERM);
    uv_signal_start(&d.sigint, on_signal, SIGINT);

    int rc = 0;
    if (tb_server_listen(d.server, cli->host, cli->port, &port, err)) {
        rc = die(EXIT_USAGE, err);
        close_server(&d);
    } else {
        bool v6 = strchr(cli->host, ':') != NULL;
        printf("tinkerbell: listening on http://%s%s%s:%d\n", v6 ? "[" : "", cli->host,
               v6 ? "]" : "", port);
        fflush(stdout);
    }
    uv_run(&d.loop, UV_RUN_DEFAULT);
    if (uv_loop_close(&d.loop)) tb_log(TB_LOG_ERROR, "server", "handles were left on the loop");
    return rc;
}

int main(int argc, char **argv)
{
    struct tb_cli cli;
    struct tb_error err = {0};

    int rc = 0;
    if (tb_cli_parse(&cli, argc, argv, &err)) {
        rc = die(EXIT_USAGE, err.msg);
    } else if (cli.command == TB_COMMAND_HELP) {
        tb_cli_help(stdout, cli.help_serve);
    } else if (cli.command == TB_COMMAND_VERSION) {
        printf("tinkerbell %s\n", tb_version());
    } else {
        tb_log_set(cli.log_level, NULL, NULL);
        rc = serve(&cli);
    }
    tb_cli_fini(&cli);
    return rc;
}
