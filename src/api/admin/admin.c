/* The operator's face: GET /metrics in Prometheus' text form, without a key. (/healthz is in the
 * Tinkerbell face.) */
#include "api/internal.h"
#include "util/mem.h"

static void put_type(struct tb_buf *b, const char *name, const char *type, const char *help)
{
    tb_buf_printf(b, "# HELP tinkerbell_%s %s\n# TYPE tinkerbell_%s %s\n", name, help, name, type);
}

static void put_gauge(struct tb_buf *b, const char *name, const char *help, uint64_t v)
{
    put_type(b, name, "gauge", help);
    tb_buf_printf(b, "tinkerbell_%s %llu\n", name, (unsigned long long)v);
}

static void put_counter(struct tb_buf *b, const char *name, const char *help, uint64_t v)
{
    put_type(b, name, "counter", help);
    tb_buf_printf(b, "tinkerbell_%s %llu\n", name, (unsigned long long)v);
}

static void put_by_type(struct tb_buf *b, const char *name, const char *help,
                        const uint64_t v[TB_OP_N_TYPES])
{
    put_type(b, name, "counter", help);
    for (int t = 0; t < TB_OP_N_TYPES; t++)
        tb_buf_printf(b, "tinkerbell_%s{type=\"%s\"} %llu\n", name,
                      tb_op_type_name((enum tb_op_type)t), (unsigned long long)v[t]);
}

static void put_http(struct tb_buf *b, const struct tb_http_server *server)
{
    struct tb_http_stats s = {0};
    tb_http_server_stats(server, &s);
    put_gauge(b, "http_connections", "Open connections.", s.connections_open);
    put_gauge(b, "http_requests", "Requests without an answer yet.", s.requests_open);
    put_counter(b, "http_connections_total", "Connections accepted.", s.connections_total);
    put_counter(b, "http_requests_total", "Requests received.", s.requests_total);
    put_counter(b, "http_received_bytes_total", "Bytes read from clients.", s.bytes_in);
    put_counter(b, "http_sent_bytes_total", "Bytes written to clients.", s.bytes_out);
}

static void put_seconds(struct tb_buf *b, uint64_t us)
{
    tb_buf_printf(b, " %llu.%06llu\n", (unsigned long long)(us / 1000000),
                  (unsigned long long)(us % 1000000));
}

static void put_queue(struct tb_buf *b, const char *name, const struct tb_queue_stats *q)
{
    tb_buf_printf(b, "tinkerbell_%s{kind=\"%s\"}", name, q->kind);
}

static void put_queues(struct tb_buf *b, const struct tb_queue_stats *q)
{
    put_type(b, "tasks_waiting", "gauge", "Tasks that the models have not begun.");
    for (int i = 0; i < TB_N_QUEUES; i++) {
        put_queue(b, "tasks_waiting", &q[i]);
        tb_buf_printf(b, " %llu\n", (unsigned long long)q[i].waiting);
    }
    put_type(b, "tasks_running", "gauge", "Tasks being computed.");
    for (int i = 0; i < TB_N_QUEUES; i++) {
        put_queue(b, "tasks_running", &q[i]);
        tb_buf_printf(b, " %llu\n", (unsigned long long)q[i].running);
    }
    put_type(b, "queue_wait_seconds", "summary", "Time that tasks waited before they began.");
    for (int i = 0; i < TB_N_QUEUES; i++) {
        put_queue(b, "queue_wait_seconds_sum", &q[i]);
        put_seconds(b, q[i].wait_us);
        put_queue(b, "queue_wait_seconds_count", &q[i]);
        tb_buf_printf(b, " %llu\n", (unsigned long long)q[i].begun);
    }
    put_type(b, "queue_wait_seconds_max", "gauge", "The longest of these times since the start.");
    for (int i = 0; i < TB_N_QUEUES; i++) {
        put_queue(b, "queue_wait_seconds_max", &q[i]);
        put_seconds(b, q[i].wait_us_max);
    }
}

static void put_compute(struct tb_buf *b, const struct tb_core *core)
{
    struct tb_compute_stats s = {0};
    tb_core_compute_stats(core, &s);
    put_queues(b, s.queues);
    put_counter(b, "train_shares_total", "Parts of training ops computed for another device.",
                s.shares);
    put_counter(b, "train_tokens_total", "Tokens of training passes.", s.train_tokens);
    put_counter(b, "sample_positions_total", "Positions computed for samples, prompts included.",
                s.sample_positions);
    put_counter(b, "sampled_tokens_total", "Tokens sampled.", s.sampled_tokens);
    put_counter(b, "steps_total", "Passes through a model.", s.steps);
    put_gauge(b, "kv_pages", "Pages of the KV caches.", s.kv_pages);
    put_gauge(b, "kv_pages_free", "Pages that hold nothing.", s.kv_free);
    put_gauge(b, "kv_pages_cached", "Pages kept for prompts to come, given up when needed.",
              s.kv_cached);
    put_counter(b, "kv_preemptions_total", "Sequences that gave up their pages for older ones.",
                s.kv_preempted);
    put_counter(b, "prompt_tokens_total", "Tokens of prompts that were begun.", s.prompt_tokens);
    put_counter(b, "prompt_cache_hit_tokens_total", "Of these, found in the KV cache.",
                s.prompt_hit_tokens);
    put_gauge(b, "memory_limit_bytes", "What the models may take (--memory).", s.memory_limit);
    put_type(b, "memory_bytes", "gauge", "What they take, by kind.");
    for (int i = 0; i < TB_N_MEMORY; i++)
        tb_buf_printf(b, "tinkerbell_memory_bytes{kind=\"%s\"} %llu\n", s.memory[i].kind,
                      (unsigned long long)s.memory[i].bytes);
    put_gauge(b, "adapters", "Adapters of models.", s.adapters);
    put_gauge(b, "adapters_paged_out", "Of these, in files since memory was short.",
              s.adapters_out);
    put_gauge(b, "versions", "Versions of adapters' weights, the current ones included.",
              s.versions);
    put_gauge(b, "versions_paged_out", "Of these, not in memory.", s.versions_out);
    put_counter(b, "page_ins_total", "Reads of such files.", s.page_ins);
    put_counter(b, "page_outs_total", "Writes of such files.", s.page_outs);
    put_type(b, "busy_seconds_total", "counter", "Time spent computing, summed over devices.");
    tb_buf_printf(b, "tinkerbell_busy_seconds_total");
    put_seconds(b, s.busy_us);
}

static void metrics(struct tb_api *a, struct tb_http_request *req, const struct tb_route_match *m)
{
    struct tb_core_stats s = {0};
    struct tb_buf b;
    (void)m;
    tb_core_stats(tb_api_core(a), &s);
    tb_buf_init(&b, 64 * 1024);
    put_type(&b, "info", "gauge", "The running version.");
    tb_buf_printf(&b, "tinkerbell_info{version=\"%s\"} 1\n", tb_api_options_get(a)->version);
    put_gauge(&b, "sessions", "Live sessions.", s.sessions);
    put_gauge(&b, "models", "Live models.", s.models);
    put_gauge(&b, "samplers", "Live sampling sessions.", s.samplers);
    put_gauge(&b, "futures_pending", "Requests without a result yet.", s.futures_pending);
    put_gauge(&b, "futures_done", "Results that can still be fetched.", s.futures_done);
    put_gauge(&b, "waiters", "Long polls being held.", s.waiters);
    put_gauge(&b, "queued_bytes", "Bytes of requests waiting in queues.", s.queued_bytes);
    put_gauge(&b, "copy_bytes", "Bytes of adapters on their way to or from checkpoints.",
              s.copy_bytes);
    put_by_type(&b, "ops_submitted_total", "Requests taken, by type.", s.submitted);
    put_by_type(&b, "ops_executed_total", "Requests that ran, by type.", s.executed);
    put_by_type(&b, "ops_failed_total", "Requests that failed, by type.", s.failed);
    put_compute(&b, tb_api_core(a));
    if (a->http) put_http(&b, a->http);
    size_t n;
    char *p = tb_buf_steal(&b, &n);
    tb_http_respond_owned(req, 200, "text/plain; version=0.0.4; charset=utf-8", p, n, tb_free, p,
                          NULL, 0);
}

static const struct tb_route ROUTES[] = {
    {.method = TB_HTTP_GET, .pattern = "/metrics", .handle = metrics, .open = true},
};

const struct tb_face tb_face_admin = {"admin", ROUTES, TB_ARRAY_LEN(ROUTES)};
