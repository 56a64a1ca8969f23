/*
 * The daemon's command line: one table of options that parsing and --help share.
 *
 * Owner: strings point into argv or into static storage; model specs are split in place in copies,
 * and keys of a file are in its contents, both freed by tb_cli_fini. Thread: main, before the loop
 * runs.
 */
#ifndef TB_SERVER_OPTIONS_H
#define TB_SERVER_OPTIONS_H

#include <stdbool.h>
#include <stdio.h>

#include "tinkerbell.h"
#include "util/error.h"
#include "util/log.h"

enum tb_command { TB_COMMAND_SERVE, TB_COMMAND_HELP, TB_COMMAND_VERSION };

struct tb_cli {
    enum tb_command command;
    bool help_serve; /* "serve --help" rather than the overview */
    tb_options_t options;
    char host[256];
    int port;
    char *key_file; /* contents; keys point into it */
    bool no_auth;   /* listen beyond loopback without a key */
    enum tb_log_level log_level;
};

/* TB_EINVAL with one line that names the option, the value and what is expected. */
int tb_cli_parse(struct tb_cli *cli, int argc, char **argv, struct tb_error *err);
void tb_cli_fini(struct tb_cli *cli); /* also after a failed parse */
void tb_cli_help(FILE *f, bool serve);
bool tb_host_is_loopback(const char *host);

#endif
