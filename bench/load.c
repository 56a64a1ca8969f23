/*
 * Load for a server of the Tinker API, or any HTTP server: keep-alive connections, each with one
 * request in flight, on one thread. Prints one JSON object: rates, latencies, and the CPU time that
 * the server (--pid) and this program took. Every answer is checked; one that is not as it should
 * be counts as an error.
 *
 *     bench/load ops --port P --session ID --model NAME [--clients N] [--seconds S] [--ahead K]
 *     bench/load forward --port P --session ID --model NAME ...
 *     bench/load route --port P [--path /healthz] ...
 *
 * ops      a client has a model of its own with an adapter of rank 1 and steps it: submit
 *          optim_step, retrieve its future, again. With --ahead K: K submits, then K retrieves;
 *          then the rate is that of whole rounds.
 * forward  the same with a forward of one datum of 8 tokens
 * route    GET of a path
 *
 * --polls N first opens N more connections, each with a long poll for one future that cannot finish
 * while the clients run; at the end it lets it finish and waits for the N answers.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum mode { OPS, FORWARD, ROUTE };
enum step { SUBMIT, RETRIEVE, GET, POLL };
enum { ID = 192, REQUEST = 2048, ANSWER = 256 * 1024 };

struct client {
    int fd;
    enum step step;
    char model[ID], (*ids)[ID]; /* [ahead] request ids */
    double *began;              /* [ahead] when they were submitted */
    long seq;
    int submitted, retrieved; /* of this round */
    char in[ANSWER];
    size_t in_n;
};

static enum mode mode;
static int port, ep, n_clients = 1, n_polls, ahead = 1;
static long pid;
static double seconds = 5;
static const char *session, *base_model, *path = "/healthz", *key = "tml-bench";
static char blocked[ID]; /* the future that the polls wait for */

static double *latency;
static size_t n_latency, cap_latency;
static long n_errors, n_rounds;
static double rounds_s;
static int n_answered; /* polls */
static bool measuring;

static void die(const char *what)
{
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void *must(void *p)
{
    if (!p) die("memory");
    return p;
}

static double now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
}

/* An option's value, or a number of /proc. */
static double number(const char *s)
{
    char *end;
    double v = strtod(s, &end);
    if (end != s && !*end && v >= 0 && v < 1e9) return v;
    fprintf(stderr, "load: %s is not a number from 0 on\n", s);
    exit(2);
}

/* ---- one connection: a request out, an answer in */

static int dial(void)
{
    struct sockaddr_in to = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)port),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0) die("socket");
    if (connect(fd, (struct sockaddr *)&to, sizeof(to))) die("connect");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    return fd;
}

static void send_all(int fd, const char *p, int n)
{
    if (send(fd, p, (size_t)n, MSG_NOSIGNAL) != n) die("send"); /* far below a socket's buffer */
}

static void post(int fd, const char *route, const char *body)
{
    char text[REQUEST];
    int n = snprintf(text, sizeof(text),
                     "POST /api/v1/%s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nX-API-Key: %s\r\n"
                     "Accept: application/x-protobuf, application/json\r\n"
                     "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                     route, port, key, strlen(body), body);
    send_all(fd, text, n);
}

static void post_retrieve(int fd, const char *id)
{
    char b[2 * ID];
    snprintf(b, sizeof(b), "{\"request_id\":\"%s\",\"allow_metadata_only\":true}", id);
    post(fd, "retrieve_future", b);
}

static void post_step(int fd, const char *model, long seq)
{
    char b[3 * ID];
    snprintf(b, sizeof(b),
             "{\"model_id\":\"%s\",\"seq_id\":%ld,\"adam_params\":{\"learning_rate\":0.0001,"
             "\"beta1\":0.9,\"beta2\":0.95,\"eps\":1e-12},\"type\":\"optim_step\"}",
             model, seq);
    post(fd, "optim_step", b);
}

static void post_forward(int fd, const char *model, long seq)
{
    char b[REQUEST / 2];
    snprintf(b, sizeof(b),
             "{\"model_id\":\"%s\",\"seq_id\":%ld,\"forward_input\":{\"loss_fn\":\"cross_entropy\","
             "\"data\":[{\"model_input\":{\"chunks\":[{\"type\":\"encoded_text\",\"tokens\":"
             "[1,2,3,4,5,6,7,8]}]},\"loss_fn_inputs\":{\"target_tokens\":{\"data\":"
             "[2,3,4,5,6,7,8,9],\"dtype\":\"int64\",\"shape\":[8]},\"weights\":{\"data\":"
             "[1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0],\"dtype\":\"float32\",\"shape\":[8]}}}]},"
             "\"type\":\"forward\"}",
             model, seq);
    post(fd, "forward", b);
}

/* Reads what is there. The status of a whole answer, 0 when more must come, -1 at the end. */
static int receive(struct client *c, const char **body)
{
    ssize_t k = recv(c->fd, c->in + c->in_n, ANSWER - 1 - c->in_n, 0);
    if (k < 0 && (errno == EAGAIN || errno == EINTR)) return 0;
    if (k <= 0) return -1;
    c->in_n += (size_t)k;
    c->in[c->in_n] = 0;
    char *end = strstr(c->in, "\r\n\r\n"), *field = strcasestr(c->in, "\r\nContent-Length:");
    if (!end) return 0;
    size_t head = (size_t)(end + 4 - c->in);
    if (c->in_n < head + (field && field < end ? strtoul(field + 17, NULL, 10) : 0)) return 0;
    *body = c->in + head;
    c->in_n = 0; /* one request is in flight, so nothing follows */
    return (int)strtol(c->in + 9, NULL, 10);
}

/* The text of a member of a flat JSON object. */
static bool member(const char *body, const char *name, char out[ID])
{
    char want[64];
    snprintf(want, sizeof(want), "\"%s\":\"", name);
    const char *p = strstr(body, want);
    size_t n = p ? strcspn(p += strlen(want), "\"") : ID;
    if (n >= ID) return false;
    memcpy(out, p, n);
    out[n] = 0;
    return true;
}

static struct client *client_new(void)
{
    struct client *c = must(calloc(1, sizeof(*c)));
    c->fd = dial();
    return c;
}

/* Waits for the answer to a request of the set-up, and takes one member of it. */
static void expect(struct client *c, const char *name, char out[ID])
{
    const char *body = "";
    int status;
    while ((status = receive(c, &body)) == 0) {
    }
    if (status == 200 && member(body, name, out)) return;
    fprintf(stderr, "load: %d instead of an answer with a %s: %.300s\n", status, name, body);
    exit(1);
}

static void create_model(struct client *c, int number, char model[ID])
{
    char b[REQUEST / 2], id[ID];
    snprintf(b, sizeof(b),
             "{\"session_id\":\"%s\",\"model_seq_id\":%d,\"base_model\":\"%s\",\"lora_config\":{"
             "\"rank\":1,\"seed\":1,\"train_mlp\":false,\"train_unembed\":false},\"type\":"
             "\"create_model\"}",
             session, number, base_model);
    post(c->fd, "create_model", b);
    expect(c, "request_id", id);
    post_retrieve(c->fd, id);
    expect(c, "model_id", model);
}

/* ---- the clients */

static void go(struct client *c)
{
    char get[REQUEST];
    switch (c->step) {
    case SUBMIT:
        c->began[c->submitted] = now();
        (mode == OPS ? post_step : post_forward)(c->fd, c->model, ++c->seq);
        break;
    case RETRIEVE: post_retrieve(c->fd, c->ids[c->retrieved]); break;
    case POLL: post_retrieve(c->fd, blocked); break;
    case GET:
        c->began[0] = now();
        send_all(c->fd, get,
                 snprintf(get, sizeof(get), "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n", path,
                          port));
        break;
    }
}

static void error(int status, const char *body)
{
    if (n_errors++ < 5) fprintf(stderr, "load: error: %d %.300s\n", status, body);
}

static void done(double began)
{
    if (!measuring) return;
    if (n_latency == cap_latency) {
        cap_latency = cap_latency ? 2 * cap_latency : 1 << 16;
        latency = must(realloc(latency, cap_latency * sizeof(*latency)));
    }
    latency[n_latency++] = now() - began;
}

/* Takes the answer of one step and begins the next one. */
static void answered(struct client *c, int status, const char *body)
{
    bool wait = status == 408 && c->step != GET; /* try again */
    bool ok = status == 200 && !strstr(body, "\"error\":");
    if (c->step == SUBMIT && ok) ok = member(body, "request_id", c->ids[c->submitted]);
    if (!ok && !wait) error(status, body);
    switch (wait ? -1 : (int)c->step) {
    case SUBMIT:
        if (ok && ++c->submitted == ahead) c->step = RETRIEVE;
        break;
    case RETRIEVE:
        done(c->began[c->retrieved]);
        if (++c->retrieved < ahead) break;
        if (measuring) {
            n_rounds++;
            rounds_s += now() - c->began[0];
        }
        c->submitted = c->retrieved = 0;
        c->step = SUBMIT;
        break;
    case GET: done(c->began[0]); break;
    case POLL: n_answered++; return;
    default: break;
    }
    go(c);
}

/* Serves events for so long, or until so many polls are answered. */
static void serve(double time, int polls)
{
    struct epoll_event ev[256];
    double until = now() + time;
    while (now() < until && (polls == 0 || n_answered < polls)) {
        int k = epoll_wait(ep, ev, 256, 20);
        for (int i = 0; i < k; i++) {
            struct client *c = ev[i].data.ptr;
            const char *body = "the connection was closed";
            int status = receive(c, &body);
            if (status > 0) answered(c, status, body);
            if (status >= 0) continue;
            error(0, body);
            close(c->fd);
        }
    }
}

static void watch(struct client *c)
{
    struct epoll_event ev = {.events = EPOLLIN, .data.ptr = c};
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    if (epoll_ctl(ep, EPOLL_CTL_ADD, c->fd, &ev)) die("epoll_ctl");
    go(c);
}

/* ---- measuring */

/* A number of /proc/PID/`file`: the `field`-th word, counted from 1 behind the program's name. */
static double server_number(const char *file, int field)
{
    char name[64], text[1024] = "", *rest;
    snprintf(name, sizeof(name), "/proc/%ld/%s", pid, file);
    FILE *f = fopen(name, "r");
    if (!f || !fgets(text, sizeof(text), f)) die(name);
    fclose(f);
    char *p = strrchr(text, ')'); /* the name may hold spaces */
    for (p = strtok_r(p ? p + 1 : text, " ", &rest); p && field > 1; field--)
        p = strtok_r(NULL, " ", &rest);
    return p ? number(p) : 0;
}

static double server_cpu(void)
{
    if (!pid) return 0;
    return (server_number("stat", 12) + server_number("stat", 13)) / (double)sysconf(_SC_CLK_TCK);
}

static double server_mb(void)
{
    return pid ? server_number("statm", 2) * (double)sysconf(_SC_PAGESIZE) / 1e6 : 0;
}

static double own_cpu(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double percentile_ms(double p)
{
    size_t i = (size_t)(p * (double)n_latency);
    return n_latency ? 1e3 * latency[i < n_latency ? i : n_latency - 1] : 0;
}

static void options(int argc, char **argv)
{
    static const struct option names[] = {
        {"port", 1, NULL, 'p'},    {"session", 1, NULL, 's'}, {"model", 1, NULL, 'm'},
        {"clients", 1, NULL, 'c'}, {"seconds", 1, NULL, 't'}, {"ahead", 1, NULL, 'a'},
        {"polls", 1, NULL, 'w'},   {"path", 1, NULL, 'u'},    {"pid", 1, NULL, 'i'},
        {"key", 1, NULL, 'k'},     {NULL, 0, NULL, 0}};
    static const char *const modes[] = {[OPS] = "ops", [FORWARD] = "forward", [ROUTE] = "route"};
    int o, m = 0;
    while ((o = getopt_long(argc, argv, "", names, NULL)) != -1) {
        switch (o) {
        case 'p': port = (int)number(optarg); break;
        case 's': session = optarg; break;
        case 'm': base_model = optarg; break;
        case 'c': n_clients = (int)number(optarg); break;
        case 't': seconds = number(optarg); break;
        case 'a': ahead = (int)number(optarg); break;
        case 'w': n_polls = (int)number(optarg); break;
        case 'u': path = optarg; break;
        case 'i': pid = (long)number(optarg); break;
        case 'k': key = optarg; break;
        default: exit(2);
        }
    }
    while (m < 3 && (optind == argc || strcmp(argv[optind], modes[m])))
        m++;
    mode = (enum mode)m;
    if (m == 3 || port <= 0 || n_clients < 1 || ahead < 1 ||
        ((mode != ROUTE || n_polls) && (!session || !base_model))) {
        fprintf(stderr, "usage: see the top of bench/load.c\n");
        exit(2);
    }
}

int main(int argc, char **argv)
{
    struct rlimit files;
    options(argc, argv);
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    ep = epoll_create1(0);

    struct client *setup = client_new(),
                  **clients = must(calloc((size_t)n_clients, sizeof(*clients)));
    char waiting[ID];
    for (int i = 0; i < n_clients; i++) {
        clients[i] = client_new();
        clients[i]->ids = must(calloc((size_t)ahead, ID));
        clients[i]->began = must(calloc((size_t)ahead, sizeof(double)));
        clients[i]->step = mode == ROUTE ? GET : SUBMIT;
        if (mode != ROUTE) create_model(setup, i, clients[i]->model);
    }
    double mb = server_mb(), polls_mb = 0, polls_s = 0;
    if (n_polls) { /* number 2 waits for number 1 */
        create_model(setup, n_clients, waiting);
        post_step(setup->fd, waiting, 2);
        expect(setup, "request_id", blocked);
        for (int i = 0; i < n_polls; i++) {
            struct client *c = client_new();
            c->step = POLL;
            watch(c);
        }
        serve(1, 0);
        polls_mb = server_mb() - mb;
    }
    for (int i = 0; i < n_clients; i++)
        watch(clients[i]);
    serve(0.3, 0);
    measuring = true;
    double t0 = now(), cpu = server_cpu(), own = own_cpu();
    do
        serve(seconds, 0);
    while (ahead > 1 && n_rounds < n_clients && now() - t0 < 60);
    double t = now() - t0, rate = (double)n_latency / t;
    if (ahead > 1) rate = n_rounds ? n_clients * ahead * (double)n_rounds / rounds_s : 0;
    cpu = server_cpu() - cpu;
    own = own_cpu() - own;
    measuring = false;
    if (n_polls) {
        char id[ID];
        t0 = now();
        post_step(setup->fd, waiting, 1);
        expect(setup, "request_id", id);
        serve(30, n_polls);
        polls_s = now() - t0;
        if (n_answered < n_polls) n_errors += n_polls - n_answered;
    }
    qsort(latency, n_latency, sizeof(*latency), by_size);
    printf("{\"clients\": %d, \"ahead\": %d, \"seconds\": %.3f, \"done\": %zu, \"errors\": %ld, "
           "\"per_second\": %.1f, \"p50_ms\": %.4f, \"p99_ms\": %.4f, \"max_ms\": %.4f, "
           "\"server_cpu_s\": %.2f, \"load_cpu_s\": %.2f, \"polls\": %d, \"polls_mb\": %.1f, "
           "\"polls_answered_s\": %.4f}\n",
           n_clients, ahead, t, n_latency, n_errors, rate, percentile_ms(0.5), percentile_ms(0.99),
           percentile_ms(1), cpu, own, n_polls, polls_mb, polls_s);
    return n_errors ? 1 : 0;
}
