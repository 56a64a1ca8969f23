/* The daemon's command line. See options.h. */
#include "server/options.h"

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "api/api.h"
#include "util/limits.h"
#include "util/mem.h"

/* ---- values */

static int parse_u64(const char *name, const char *text, uint64_t min, uint64_t max, bool suffix,
                     uint64_t *out, struct tb_error *err)
{
    char *end;
    errno = 0;
    unsigned long long v = strtoull(text, &end, 10);
    uint64_t unit = 1;
    if (!isdigit((unsigned char)text[0]) || errno) goto bad;
    if (suffix && *end) {
        switch (toupper((unsigned char)*end++)) {
        case 'K': unit = 1ull << 10; break;
        case 'M': unit = 1ull << 20; break;
        case 'G': unit = 1ull << 30; break;
        case 'T': unit = 1ull << 40; break;
        default: goto bad;
        }
        if (*end == 'i') end++;
        if (*end == 'B' || *end == 'b') end++;
    }
    if (*end || __builtin_mul_overflow(v, unit, &v) || v < min || v > max) goto bad;
    *out = v;
    return 0;
bad:
    return tb_error_set(err, TB_EINVAL, "%s %s: expected a whole number from %llu to %llu%s", name,
                        text, (unsigned long long)min, (unsigned long long)max,
                        suffix ? ", with K, M, G or T for a unit" : "");
}

static int parse_int(const char *name, const char *text, int min, int max, int *out,
                     struct tb_error *err)
{
    uint64_t v = 0;
    int rc = parse_u64(name, text, (uint64_t)min, (uint64_t)max, false, &v, err);
    if (!rc) *out = (int)v;
    return rc;
}

static int parse_choice(const char *name, const char *text, const char *const *choices,
                        const char **out, struct tb_error *err)
{
    for (int i = 0; choices[i]; i++) {
        if (strcmp(choices[i], text) == 0) {
            *out = choices[i];
            return 0;
        }
    }
    char list[128] = "";
    for (int i = 0; choices[i]; i++) {
        size_t n = strlen(list);
        snprintf(list + n, sizeof(list) - n, "%s%s", i ? ", " : "", choices[i]);
    }
    return tb_error_set(err, TB_EINVAL, "%s %s: expected one of %s", name, text, list);
}

/* ---- options */

static int set_model(struct tb_cli *c, const char *name, const char *text, struct tb_error *err)
{
    tb_options_t *o = &c->options;
    if (o->n_models == TB_MAX_MODELS)
        return tb_error_set(err, TB_EINVAL, "%s: at most %d models", name, TB_MAX_MODELS);
    char *copy = tb_strdup(text); /* freed by tb_cli_fini */
    char *dir = strchr(copy, '=');
    if (!dir || dir == copy || !dir[1]) {
        tb_free(copy);
        return tb_error_set(err, TB_EINVAL,
                            "%s %s: expected NAME=DIR[,tokenizer=ID][,renderer=NAME]", name, text);
    }
    *dir++ = '\0';
    tb_model_option_t *m = &o->models[o->n_models];
    const struct {
        const char *key;
        const char **value;
    } more[] = {{",tokenizer=", &m->tokenizer}, {",renderer=", &m->renderer}};
    char *at[TB_ARRAY_LEN(more)];
    for (size_t i = 0; i < TB_ARRAY_LEN(more); i++) {
        *more[i].value = NULL;
        if ((at[i] = strstr(dir, more[i].key))) *more[i].value = at[i] + strlen(more[i].key);
    }
    for (size_t i = 0; i < TB_ARRAY_LEN(more); i++) {
        if (at[i]) *at[i] = '\0';
        if (!*more[i].value || (*more[i].value)[0]) continue;
        tb_error_set(err, TB_EINVAL, "%s %s: %s is empty", name, text, more[i].key + 1);
        tb_free(copy);
        return TB_EINVAL;
    }
    m->name = copy;
    m->dir = dir;
    o->n_models++;
    return 0;
}

static int set_listen(struct tb_cli *c, const char *name, const char *text, struct tb_error *err)
{
    const char *colon = strrchr(text, ':');
    size_t n = colon ? (size_t)(colon - text) : 0;
    if (!colon || n == 0 || n >= sizeof(c->host))
        return tb_error_set(err, TB_EINVAL, "%s %s: expected HOST:PORT, as in 127.0.0.1:8000", name,
                            text);
    const char *host = text;
    if (host[0] == '[' && host[n - 1] == ']') { /* [::1]:8000 */
        host++;
        n -= 2;
    }
    memcpy(c->host, host, n);
    c->host[n] = '\0';
    return parse_int(name, colon + 1, 0, 65535, &c->port, err);
}

static int set_key(struct tb_cli *c, const char *name, const char *text, struct tb_error *err)
{
    struct tb_span key, tenant;
    if (c->options.n_api_keys == TB_MAX_API_KEYS)
        return tb_error_set(err, TB_EINVAL, "%s: at most %d keys", name, TB_MAX_API_KEYS);
    if (tb_api_key_split(text, &key, &tenant, err)) return tb_error_prefix(err, "%s", name);
    c->options.api_keys[c->options.n_api_keys++] = text;
    return 0;
}

/* One KEY[=TENANT] a line; empty lines and those that begin with # say nothing. */
static int set_key_file(struct tb_cli *c, const char *name, const char *text, struct tb_error *err)
{
    enum { MAX = 1 << 20 };
    if (c->key_file) return tb_error_set(err, TB_EINVAL, "%s: only one file", name);
    FILE *f = fopen(text, "re");
    if (!f)
        return tb_error_set(err, TB_EINVAL, "%s %s: cannot be opened: %s", name, text,
                            strerror(errno));
    c->key_file = tb_malloc(MAX + 1);
    size_t n = fread(c->key_file, 1, MAX, f);
    bool bad = ferror(f) || n == MAX || memchr(c->key_file, '\0', n);
    fclose(f);
    if (bad)
        return tb_error_set(err, TB_EINVAL, "%s %s: cannot be read as lines of text", name, text);
    c->key_file[n] = '\0';
    int number = 0, before = c->options.n_api_keys;
    char *line, *rest = c->key_file;
    while ((line = strsep(&rest, "\n"))) {
        number++;
        line += strspn(line, " \t\r");
        for (size_t len = strlen(line); len && isspace((unsigned char)line[len - 1]);)
            line[--len] = '\0';
        if (!*line || *line == '#') continue;
        if (set_key(c, name, line, err)) return tb_error_prefix(err, "line %d of %s", number, text);
    }
    if (c->options.n_api_keys == before)
        return tb_error_set(err, TB_EINVAL, "%s %s: there is no key in it", name, text);
    return 0;
}

/* N or N:BURST */
static int set_tenant_rate(struct tb_cli *c, const char *name, const char *text,
                           struct tb_error *err)
{
    const uint64_t most = 1000000;
    tb_options_t *o = &c->options;
    char rate[32];
    const char *colon = strchr(text, ':');
    size_t n = colon ? (size_t)(colon - text) : strlen(text);
    snprintf(rate, sizeof(rate), "%.*s", (int)n, text);
    int rc = parse_u64(name, rate, 1, most, false, &o->tenant_rate, err);
    if (!rc && colon) rc = parse_u64(name, colon + 1, 1, most, false, &o->tenant_burst, err);
    return rc;
}

static int set_tenant_queue(struct tb_cli *c, const char *name, const char *text,
                            struct tb_error *err)
{
    return parse_u64(name, text, 1024, 1ull << 50, true, &c->options.tenant_queue, err);
}

static int set_tenant_pending(struct tb_cli *c, const char *name, const char *text,
                              struct tb_error *err)
{
    return parse_u64(name, text, 1, 1ull << 32, false, &c->options.tenant_pending, err);
}

static int set_data(struct tb_cli *c, const char *name, const char *text, struct tb_error *err)
{
    c->options.data_dir = text;
    return text[0] ? 0 : tb_error_set(err, TB_EINVAL, "%s: expected a folder", name);
}

static int set_backend(struct tb_cli *c, const char *name, const char *text, struct tb_error *err)
{
    static const char *const choices[] = {"auto", "cpu", "cuda", NULL};
    return parse_choice(name, text, choices, &c->options.backend, err);
}

static int set_dtype(struct tb_cli *c, const char *name, const char *text, struct tb_error *err)
{
    static const char *const choices[] = {"auto", "bf16", "f32", NULL};
    return parse_choice(name, text, choices, &c->options.dtype, err);
}

/* N,N,...: each once */
static int set_devices(struct tb_cli *c, const char *name, const char *text, struct tb_error *err)
{
    tb_options_t *o = &c->options;
    o->n_devices = 0;
    for (const char *at = text;; at++) {
        char *end;
        long n = isdigit((unsigned char)*at) ? strtol(at, &end, 10) : -1;
        if (n < 0 || n >= 1024 || (*end && *end != ','))
            return tb_error_set(err, TB_EINVAL, "%s %s: expected numbers of GPUs, as in 0,1", name,
                                text);
        for (int i = 0; i < o->n_devices; i++)
            if (o->devices[i] == n)
                return tb_error_set(err, TB_EINVAL, "%s %s: %ld is given twice", name, text, n);
        if (o->n_devices == TB_MAX_DEVICES)
            return tb_error_set(err, TB_EINVAL, "%s %s: at most %d", name, text, TB_MAX_DEVICES);
        o->devices[o->n_devices++] = (int)n;
        at = end;
        if (!*at) return 0;
    }
}

static int set_threads(struct tb_cli *c, const char *name, const char *text, struct tb_error *err)
{
    return parse_int(name, text, 1, 1024, &c->options.n_threads, err);
}

static int set_max_rank(struct tb_cli *c, const char *name, const char *text, struct tb_error *err)
{
    return parse_int(name, text, 1, 4096, &c->options.max_rank, err);
}

static int set_max_context(struct tb_cli *c, const char *name, const char *text,
                           struct tb_error *err)
{
    return parse_int(name, text, 1, 1 << 24, &c->options.max_context, err);
}

static int set_memory(struct tb_cli *c, const char *name, const char *text, struct tb_error *err)
{
    return parse_u64(name, text, 1 << 20, 1ull << 50, true, &c->options.memory, err);
}

static int set_kv_memory(struct tb_cli *c, const char *name, const char *text, struct tb_error *err)
{
    return parse_u64(name, text, 1 << 20, 1ull << 50, true, &c->options.kv_memory, err);
}

static int set_max_body(struct tb_cli *c, const char *name, const char *text, struct tb_error *err)
{
    return parse_u64(name, text, 1024, 1ull << 40, true, &c->options.max_body, err);
}

static int set_long_poll(struct tb_cli *c, const char *name, const char *text, struct tb_error *err)
{
    uint64_t s = 0;
    int rc = parse_u64(name, text, 1, 40, false, &s, err);
    if (!rc) c->options.long_poll_ms = s * 1000;
    return rc;
}

static int set_lease(struct tb_cli *c, const char *name, const char *text, struct tb_error *err)
{
    uint64_t s = 0;
    int rc = parse_u64(name, text, 1, 7 * 24 * 3600, false, &s, err);
    if (!rc) c->options.session_lease_ms = s * 1000;
    return rc;
}

static int set_public_url(struct tb_cli *c, const char *name, const char *text,
                          struct tb_error *err)
{
    size_t n = strlen(text);
    if ((strncmp(text, "http://", 7) != 0 && strncmp(text, "https://", 8) != 0) ||
        text[n - 1] == '/')
        return tb_error_set(err, TB_EINVAL,
                            "%s %s: expected http://… or https://… without a final /", name, text);
    c->options.public_url = text;
    return 0;
}

static int set_log_level(struct tb_cli *c, const char *name, const char *text, struct tb_error *err)
{
    if (tb_log_level_parse(text, &c->log_level) == 0) return 0;
    return tb_error_set(err, TB_EINVAL, "%s %s: expected one of error, warn, info, debug, trace",
                        name, text);
}

static int set_no_auth(struct tb_cli *c, const char *name, const char *text, struct tb_error *err)
{
    c->no_auth = true;
    return 0;
}

static const struct option_row {
    const char *name, *value; /* value NULL: a switch */
    int (*set)(struct tb_cli *c, const char *name, const char *text, struct tb_error *err);
    const char *help;
} option_rows[] = {
    {"--model", "NAME=DIR[,tokenizer=ID][,renderer=NAME]", set_model,
     "serve the Hugging Face folder DIR under NAME; may be repeated. ID is what clients\n"
     "are told to load as tokenizer (default: DIR on loopback, else NAME). renderer names how\n"
     "chats become tokens (default: by DIR's chat template): role_colon, llama3, qwen3,\n"
     "qwen3_disable_thinking, qwen3_instruct, qwen3_5, qwen3_5_disable_thinking"},
    {"--listen", "HOST:PORT", set_listen,
     "address to listen on (default 127.0.0.1:8000); port 0 takes a free one"},
    {"--data", "DIR", set_data,
     "metadata and checkpoints; created when missing (default ./tinkerbell-data)"},
    {"--api-key", "KEY[=TENANT]", set_key,
     "accept this key (tml-…); may be repeated. Keys of one TENANT (default: \"default\") share\n"
     "what they make, and see nothing of others'. Without a key, any is accepted on loopback,\n"
     "and other addresses are refused"},
    {"--api-key-file", "FILE", set_key_file,
     "keys that ps should not show: one KEY[=TENANT] a line, # begins a comment"},
    {"--tenant-rate", "N[:BURST]", set_tenant_rate,
     "submits a second that each tenant may make, and how many at once (default: no limit;\n"
     "BURST: N)"},
    {"--tenant-queue", "BYTES", set_tenant_queue,
     "size of a tenant's requests that have no result yet (default: no limit)"},
    {"--tenant-pending", "N", set_tenant_pending,
     "number of a tenant's requests that have no result yet (default: no limit)"},
    {"--no-auth", NULL, set_no_auth,
     "listen beyond loopback without a key: behind a proxy that checks them"},
    {"--backend", "auto|cpu|cuda", set_backend, "device (default auto)"},
    {"--dtype", "auto|bf16|f32", set_dtype,
     "type of weights and products (default auto: bf16 where the CPU has AVX-512 BF16,\n"
     "else f32)"},
    {"--devices", "N[,N...]", set_devices,
     "GPUs to use, by CUDA's numbers; models go to them in turn. With more GPUs than models a\n"
     "model is on several, which share its adapters, samples and large training ops (default: the\n"
     "first)"},
    {"--threads", "N", set_threads, "computing threads (default: all cores)"},
    {"--memory", "BYTES", set_memory,
     "memory to stay within, on each GPU where there are, as 12G; idle adapters go to files when\n"
     "it is short (default: nine tenths of what is there)"},
    {"--kv-memory", "BYTES", set_kv_memory,
     "how much of that is for the KV cache of samples, shared equally by the models: more of them\n"
     "run at once, and more prompts are found again; less leaves more to training (default: an\n"
     "eighth of --memory; on the CPU at most 2G a model)"},
    {"--max-rank", "N", set_max_rank, "largest LoRA rank (default 256)"},
    {"--max-context", "N", set_max_context, "longest sequence (default: the model's own)"},
    {"--max-body", "BYTES", set_max_body, "largest request body (default 256M)"},
    {"--long-poll", "SECONDS", set_long_poll,
     "how long retrieve_future waits before try_again (default 25, at most 40)"},
    {"--session-lease", "SECONDS", set_lease,
     "a session without heartbeat or work ends after this (default 600)"},
    {"--public-url", "URL", set_public_url,
     "base of absolute URLs in answers, behind a proxy (default: from the request)"},
    {"--log-level", "LEVEL", set_log_level, "error, warn, info, debug or trace (default info)"},
};

static const struct option_row *find_option(const char *arg, size_t n)
{
    for (size_t i = 0; i < TB_ARRAY_LEN(option_rows); i++) {
        if (strlen(option_rows[i].name) == n && memcmp(option_rows[i].name, arg, n) == 0)
            return &option_rows[i];
    }
    return NULL;
}

bool tb_host_is_loopback(const char *host)
{
    return strncmp(host, "127.", 4) == 0 || strcmp(host, "::1") == 0 ||
           strcmp(host, "localhost") == 0;
}

static int parse_serve(struct tb_cli *c, int argc, char **argv, struct tb_error *err)
{
    for (int i = 0; i < argc; i++) {
        const char *arg = argv[i], *value = NULL;
        if (strcmp(arg, "--help") == 0 || strcmp(arg, "-h") == 0) {
            c->command = TB_COMMAND_HELP;
            c->help_serve = true;
            return 0;
        }
        const char *eq = strchr(arg, '=');
        size_t n = strlen(arg);
        if (strncmp(arg, "--", 2) == 0 && eq) {
            n = (size_t)(eq - arg);
            value = eq + 1;
        }
        const struct option_row *o = find_option(arg, n);
        if (!o)
            return tb_error_set(err, TB_EINVAL, "unknown option %s; see tinkerbell serve --help",
                                arg);
        if (!o->value && value) return tb_error_set(err, TB_EINVAL, "%s takes no value", o->name);
        if (o->value && !value) {
            if (++i == argc)
                return tb_error_set(err, TB_EINVAL, "%s needs a value: %s", o->name, o->value);
            value = argv[i];
        }
        int rc = o->set(c, o->name, value, err);
        if (rc) return rc;
    }
    if (c->options.n_models == 0)
        return tb_error_set(err, TB_EINVAL, "no model given; use --model NAME=DIR");
    if (c->options.n_api_keys == 0 && !c->no_auth && !tb_host_is_loopback(c->host))
        return tb_error_set(err, TB_EINVAL,
                            "--listen %s without --api-key would serve everyone; give a key or "
                            "--no-auth",
                            c->host);
    return 0;
}

int tb_cli_parse(struct tb_cli *c, int argc, char **argv, struct tb_error *err)
{
    memset(c, 0, sizeof(*c));
    tb_options_init(&c->options);
    snprintf(c->host, sizeof(c->host), "127.0.0.1");
    c->port = 8000;
    c->log_level = TB_LOG_INFO;
    if (argc < 2) return tb_error_set(err, TB_EINVAL, "no command; see tinkerbell --help");
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 ||
        strcmp(argv[1], "help") == 0) {
        c->command = TB_COMMAND_HELP;
        return 0;
    }
    if (strcmp(argv[1], "--version") == 0 || strcmp(argv[1], "version") == 0) {
        c->command = TB_COMMAND_VERSION;
        return 0;
    }
    if (strcmp(argv[1], "serve") != 0)
        return tb_error_set(err, TB_EINVAL, "unknown command %s; see tinkerbell --help", argv[1]);
    c->command = TB_COMMAND_SERVE;
    return parse_serve(c, argc - 2, argv + 2, err);
}

void tb_cli_fini(struct tb_cli *c)
{
    for (int i = 0; i < c->options.n_models; i++) {
        char *copy; /* the model's name begins it, its folder lies behind */
        memcpy(&copy, &c->options.models[i].name, sizeof(copy));
        tb_free(copy);
    }
    c->options.n_models = 0;
    tb_free(c->key_file);
    c->key_file = NULL;
}

void tb_cli_help(FILE *f, bool serve)
{
    if (!serve) {
        fputs("tinkerbell: the Tinker training API on your own machine, in one process\n\n"
              "  tinkerbell serve --model NAME=DIR [options]   start the server\n"
              "  tinkerbell serve --help                       its options\n"
              "  tinkerbell --version\n\n"
              "Try it on the demo model of the source tree:\n"
              "  tinkerbell serve --model demo=examples/demo-model --listen 127.0.0.1:8000\n"
              "and, in another terminal, any script that uses the tinker SDK:\n"
              "  TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-local python script.py\n",
              f);
        return;
    }
    fputs(
        "usage: tinkerbell serve --model NAME=DIR [options]\n\n"
        "Serves LoRA training and sampling over the models given. When it can answer, it prints\n"
        "  tinkerbell: listening on http://HOST:PORT\n"
        "on standard output; its log goes to standard error. SIGTERM or SIGINT drains and exits 0\n"
        "(a second one cuts connections); a bad option, model or data folder exits 2.\n\noptions:\n",
        f);
    for (size_t i = 0; i < TB_ARRAY_LEN(option_rows); i++) {
        const struct option_row *o = &option_rows[i];
        fprintf(f, "  %s %s\n", o->name, o->value ? o->value : "");
        const char *line = o->help;
        while (*line) {
            size_t n = strcspn(line, "\n");
            fprintf(f, "        %.*s\n", (int)n, line);
            line += n + (line[n] == '\n');
        }
    }
    fputs(
        "\nexamples:\n"
        "  tinkerbell serve --model demo=examples/demo-model --listen 127.0.0.1:0\n"
        "  tinkerbell serve --model Qwen/Qwen3-0.6B=/models/Qwen3-0.6B,tokenizer=Qwen/Qwen3-0.6B \\\n"
        "      --listen 0.0.0.0:8000 --api-key tml-secret --data /var/lib/tinkerbell\n",
        f);
}
