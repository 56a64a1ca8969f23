/*
 * The Tinker face in a server without sockets: real http/, api/ and store/, a core of the test's
 * own. Routes, keys, statuses, the forms of every answer, and decoding in the pool.
 */
#include "unit/store/store_help.h"

#include "api/api.h"
#include "unit/api/fake_core.h"
#include "util/buf.h"

struct reply {
    bool done;
    int status;
    char type[64], allow[64], authenticate[64], retry[16];
    char *body;
    size_t n;
};

static uv_loop_t loop;
static struct tb_api *api;
static struct tb_http_server *http;
static struct reply last;
static char *dir;

static void on_reply(void *arg, const struct tb_http_reply *r)
{
    (void)arg;
    last.done = true;
    last.status = r->status;
    for (size_t i = 0; i < r->n_headers; i++) {
        char *to = tb_span_ieq(r->headers[i].name, "Content-Type")       ? last.type
                   : tb_span_ieq(r->headers[i].name, "Allow")            ? last.allow
                   : tb_span_ieq(r->headers[i].name, "WWW-Authenticate") ? last.authenticate
                   : tb_span_ieq(r->headers[i].name, "Retry-After")      ? last.retry
                                                                         : NULL;
        size_t room = to == last.retry ? sizeof(last.retry) : sizeof(last.type);
        if (to) snprintf(to, room, "%.*s", (int)r->headers[i].value.n, r->headers[i].value.p);
    }
    last.body = tb_strndup(r->body.p ? r->body.p : "", r->body.n);
    last.n = r->body.n;
}

static void send_call(enum tb_http_method m, const char *target, const struct tb_http_field *f,
                      size_t n_fields, const void *body, size_t n)
{
    struct tb_error e = {0};
    tb_free(last.body);
    last = (struct reply){0};
    if (tb_http_server_call(http, m, target, f, n_fields, body, n, on_reply, NULL, &e))
        fail_msg("%s", e.msg);
}

static void call_with(enum tb_http_method m, const char *target, const struct tb_http_field *f,
                      size_t n_fields, const void *body, size_t n)
{
    send_call(m, target, f, n_fields, body, n);
    RUN_UNTIL(&loop, last.done);
}

static const struct tb_http_field KEY = {"X-API-Key", "tml-one"};

static void post(const char *path, const char *json)
{
    char target[512];
    snprintf(target, sizeof(target), "/api/v1/%s", path);
    call_with(TB_HTTP_POST, target, &KEY, 1, json, strlen(json));
}

static void get(const char *path)
{
    char target[512];
    snprintf(target, sizeof(target), "/api/v1/%s", path);
    call_with(TB_HTTP_GET, target, &KEY, 1, NULL, 0);
}

static void expect(int status, const char *body)
{
    if (last.status != status || strcmp(last.body, body) != 0)
        fail_msg("got %d %s\nwanted %d %s", last.status, last.body, status, body);
    assert_string_equal(last.type, "application/json");
}

static void expect_part(int status, const char *part)
{
    if (last.status != status || !strstr(last.body, part))
        fail_msg("got %d %s\nwanted %d with %s", last.status, last.body, status, part);
}

/* An immediate refusal, in the form that all clients understand. */
static void expect_error(int status, const char *text, const char *category)
{
    char want[1024];
    snprintf(want, sizeof(want), "{\"detail\":\"%s\",\"message\":\"%s\",\"category\":\"%s\"}", text,
             text, category);
    expect(status, want);
}

/* ---- set-up */

static void put_rows(struct tb_store *s)
{
    struct tb_session_row session = {.tenant = TB_TENANT_DEFAULT,
                                     .id = "sess-1",
                                     .tags_json = "[]",
                                     .user_metadata_json = "{\"a\":1}",
                                     .display_name = "d",
                                     .created_us = 1000000,
                                     .last_seen_us = 1000000,
                                     .status = "active"};
    struct tb_run_row run = {.tenant = TB_TENANT_DEFAULT,
                             .id = "sess-1:train:0",
                             .session_id = "sess-1",
                             .base_model = "tiny",
                             .lora = {.rank = 8, .alpha = 32, .train_attn = true},
                             .user_metadata_json = "{\"s\":\"x\",\"n\":1,\"o\":{\"k\":[1]}}",
                             .created_us = 1000000,
                             .last_request_us = 1700000000123456};
    struct tb_sampler_row sampler = {.tenant = TB_TENANT_DEFAULT,
                                     .id = "sess-1:sample:1",
                                     .session_id = "sess-1",
                                     .base_model = "tiny",
                                     .created_us = 1};
    tb_store_put_session(s, &session);
    tb_store_put_run(s, &run);
    tb_store_put_sampler(s, &sampler);
}

static void on_written(void *arg, const struct tb_error *err, const struct tb_ckpt_row *row)
{
    (void)row;
    if (err && err->code) fail_msg("%s", err->msg);
    *(bool *)arg = true;
}

static void write_ckpt(enum tb_ckpt_kind kind, const char *name)
{
    bool done = false;
    struct tb_ckpt_write w = {
        .tenant = TB_TENANT_DEFAULT, .run_id = "sess-1:train:0", .name = name, .kind = kind};
    struct tb_adapter_state *state = make_state(2, 1, kind == TB_CKPT_TRAINING);
    tb_store_write_ckpt(fake.store, &w, state, on_written, &done);
    RUN_UNTIL(&loop, done);
}

static int set_up(void **state)
{
    (void)state;
    static const char *const keys[] = {"tml-other=them", "tml-one"};
    struct tb_error e = {0};
    assert_int_equal(uv_loop_init(&loop), 0);
    dir = make_dir();
    fake = (struct tb_core){.state = TB_FUTURE_PENDING};
    if (tb_store_open(&fake.store, &loop, dir, &e)) fail_msg("%s", e.msg);
    put_rows(fake.store);
    struct tb_api_options ao = {.api_keys = keys,
                                .n_api_keys = 2,
                                .loopback = true,
                                .max_body = 64 << 20,
                                .version = "9.9"};
    assert_int_equal(tb_api_create(&api, &loop, &fake, &ao, &e), 0);
    struct tb_http_options ho = {.max_body = 64 << 20};
    if (tb_http_server_create(&http, &loop, &ho, tb_api_handle, api, &e)) fail_msg("%s", e.msg);
    tb_api_set_http(api, http);
    return 0;
}

static void set_true(void *arg)
{
    *(bool *)arg = true;
}

static int tear_down(void **state)
{
    (void)state;
    bool done = false;
    tb_http_server_close(http, set_true, &done);
    RUN_UNTIL(&loop, done);
    done = false;
    tb_api_close(api, set_true, &done);
    RUN_UNTIL(&loop, done);
    done = false;
    tb_store_close(fake.store, set_true, &done);
    RUN_UNTIL(&loop, done);
    assert_int_equal(uv_loop_close(&loop), 0);
    tb_op_destroy(fake.op);
    remove_dir(dir);
    tb_free(dir);
    tb_free(last.body);
    last = (struct reply){0};
    return 0;
}

/* ---- dispatch and keys */

static void test_routes(void **state)
{
    (void)state;
    get("nothing");
    expect_error(404, "no route /api/v1/nothing", "user");
    get("forward_backward");
    expect_part(405, "GET is not allowed on /api/v1/forward_backward (allowed: POST)");
    assert_string_equal(last.allow, "POST");
    call_with(TB_HTTP_PUT, "/api/v1/training_runs/r/checkpoints/weights/n/publish", &KEY, 1, NULL,
              0);
    assert_int_equal(last.status, 405);
    assert_string_equal(last.allow, "POST, DELETE");
    post("heartbeat", "{}"); /* tinkex asserts that this one does not exist */
    assert_int_equal(last.status, 404);
    call_with(TB_HTTP_HEAD, "/api/v1/healthz", NULL, 0, NULL, 0);
    assert_int_equal(last.status, 200);
    assert_int_equal(last.n, 0);
}

static void test_keys(void **state)
{
    (void)state;
    static const struct {
        struct tb_http_field f;
        int status;
    } cases[] = {
        {{"X-API-Key", "tml-one"}, 200},
        {{"x-api-key", "tml-other"}, 200},
        {{"Authorization", "Bearer tml-one"}, 200},
        {{"Authorization", "bearer  tml-one"}, 200},
        {{"X-API-Key", "tml-on"}, 401},
        {{"X-API-Key", "tml-onetml-one"}, 401},
        {{"X-API-Key", ""}, 401},
        {{"Authorization", "Basic tml-one"}, 401},
        {{"Authorization", "Bearer"}, 401},
        {{"Authorization", "Bearer tml-two"}, 401},
        {{"X-Other", "tml-one"}, 401},
    };
    for (size_t i = 0; i < TB_ARRAY_LEN(cases); i++) {
        call_with(TB_HTTP_POST, "/api/v1/client/config", &cases[i].f, 1, "{}", 2);
        if (last.status != cases[i].status)
            fail_msg("%s: %s gave %d", cases[i].f.name, cases[i].f.value, last.status);
        if (last.status == 401) expect_part(401, "\"category\":\"user\"");
    }
    call_with(TB_HTTP_GET, "/api/v1/healthz", NULL, 0, NULL, 0);
    expect(200, "{\"status\":\"ok\"}");
    call_with(TB_HTTP_GET, "/metrics", NULL, 0, NULL, 0);
    expect_part(200, "tinkerbell_ops_submitted_total{type=\"sample\"} 3\n");
    expect_part(200, "tinkerbell_info{version=\"9.9\"} 1\n");
    expect_part(
        200,
        "# TYPE tinkerbell_sampled_tokens_total counter\ntinkerbell_sampled_tokens_total 11\n");
    expect_part(200, "tinkerbell_busy_seconds_total 2.500000\n");
    expect_part(200, "# HELP tinkerbell_http_requests_total ");
}

static void own_route(void *arg, struct tb_http_request *req)
{
    tb_http_respond(req, 200, "text/plain", arg, strlen(arg), NULL, 0);
}

static void test_own_route(void **state)
{
    (void)state;
    struct tb_error e = {0};
    static char text[] = "mine";
    assert_int_equal(tb_api_add_route(api, TB_HTTP_GET, "/mine", own_route, text, &e), 0);
    assert_int_equal(tb_api_add_route(api, TB_HTTP_GET, "/mine", own_route, text, &e), TB_EEXIST);
    assert_int_equal(tb_api_add_route(api, TB_HTTP_GET, "mine", own_route, text, &e), TB_EINVAL);
    call_with(TB_HTTP_GET, "/mine", &KEY, 1, NULL, 0);
    expect_part(200, "mine");
    call_with(TB_HTTP_GET, "/mine", NULL, 0, NULL, 0);
    assert_int_equal(last.status, 401);
    call_with(TB_HTTP_POST, "/mine", &KEY, 1, NULL, 0);
    assert_int_equal(last.status, 405);
}

/* ---- configuration and sessions */

static void test_config(void **state)
{
    (void)state;
    post("client/config", "{\"sdk_version\":\"0.38.0\"}");
    expect_part(200, "\"proto_write_fwdbwd\":true");
    expect_part(200, "\"proto_compress_fwdbwd\":false");
    expect_part(200, "\"fwdbwd_max_chunk_bytes_count\":16777216"); /* a quarter of max_body */
    expect_part(200, "\"sample_use_retrieve_futures\":true");
    post("client/dynamic_config", "{\"sdk_version\":\"0.38.0\"}");
    expect_part(200, "\"sample_cancel_enabled\":true");
    get("get_server_capabilities");
    expect(
        200,
        "{\"supported_models\":[{\"model_name\":\"tiny\",\"arch\":\"llama\",\"max_context_length\":512,"
        "\"trainable\":true,\"sampleable\":true}]}");
    post("telemetry", "{\"events\":[]}");
    expect(200, "{\"status\":\"accepted\"}");
    post("get_info", "{\"model_id\":\"sess-1:train:0\",\"type\":\"get_info\"}");
    expect(
        200,
        "{\"model_id\":\"sess-1:train:0\",\"model_data\":{\"arch\":\"llama\",\"model_name\":\"tiny\","
        "\"tokenizer_id\":\"/models/tiny\"},\"optimizer_config\":{\"type\":\"adamw\"},"
        "\"is_lora\":true,\"lora_rank\":8,\"model_name\":\"tiny\",\"type\":\"get_info\"}");
    post("get_info", "{\"model_id\":\"x\"}");
    expect_error(404, "no model x", "user");
    post("get_info", "{\"model_id\":\"x\",\"type\":\"info\"}");
    expect_error(400, "type: \\\"info\\\" is not \\\"get_info\\\"", "user");
}

static void test_sessions(void **state)
{
    (void)state;
    const struct tb_http_field f[] = {KEY, {"X-Idempotency-Key", "k1"}};
    static const char body[] = "{\"tags\":[],\"user_metadata\":{},\"sdk_version\":\"0.38.0\","
                               "\"type\":\"create_session\"}";
    call_with(TB_HTTP_POST, "/api/v1/create_session", f, 2, body, sizeof(body) - 1);
    expect(200, "{\"session_id\":\"sess-1\",\"type\":\"create_session\"}");
    assert_string_equal(fake.session_key, "k1");
    post("create_session", "{\"tags\":[1]}");
    expect_error(400, "tags[0]: 1 is not a string", "user");
    post("create_session", "{\"tags\":[],\"type\":\"x\"}");
    assert_int_equal(last.status, 400);
    post("create_session", "");
    expect_error(400, "body is empty, a JSON object was expected", "user");
    post("session_heartbeat", "{\"session_id\":\"sess-1\"}");
    expect(200, "{\"type\":\"session_heartbeat\"}");
    post("session_heartbeat", "{\"session_id\":\"gone\"}");
    expect_error(410, "session gone is gone", "user");
    post("sessions/sess-1/finish", "{\"reason\":{\"type\":\"errored\"},\"detail\":null}");
    expect(200, "{}");
    assert_string_equal(fake.finish_reason, "errored/-");
    post("sessions/sess-1/finish", "");
    assert_string_equal(fake.finish_reason, "success/-");
    post("sessions/sess-1/finish", "{\"reason\":{\"type\":\"bored\"}}");
    assert_int_equal(last.status, 400);
    post("sessions/other/finish", "{\"reason\":{\"type\":\"success\"}}");
    assert_int_equal(last.status, 404);
    get("sessions");
    expect(200,
           "{\"sessions\":[\"sess-1\"],\"cursor\":{\"offset\":0,\"limit\":20,\"total_count\":1}}");
    get("sessions/sess-1");
    expect(200, "{\"training_run_ids\":[\"sess-1:train:0\"],\"sampler_ids\":[\"sess-1:sample:1\"],"
                "\"user_metadata\":{\"a\":1},\"display_name\":\"d\"}");
    get("sessions/none");
    assert_int_equal(last.status, 404);
    get("sessions?limit=x");
    expect_part(400, "limit: \\\"x\\\" is not an integer");
}

/* ---- submits */

static void test_submits(void **state)
{
    (void)state;
    post("create_model", "{\"session_id\":\"sess-1\",\"model_seq_id\":0,\"base_model\":\"tiny\"}");
    expect(200, "{\"request_id\":\"req-1\",\"model_id\":\"sess-1:train:0\"}");
    post("optim_step", "{\"model_id\":\"sess-1:train:0\",\"seq_id\":1,\"adam_params\":{}}");
    expect(200, "{\"request_id\":\"req-1\"}");
    assert_int_equal(fake.op->type, TB_OP_OPTIM_STEP);
    post("optim_step", "{\"model_id\":\"sess-1:train:0\",\"seq_id\":1}");
    expect(200, "{\"request_id\":\"req-1\"}"); /* it fails in its place */
    assert_int_equal(fake.op->error.code, TB_EINVAL);
    post("asample", "{\"sampling_session_id\":\"s\",\"seq_id\":0,\"num_samples\":2,"
                    "\"prompt\":{\"chunks\":[{\"tokens\":[1]}]},\"sampling_params\":{}}");
    expect(200, "{\"request_id\":\"req-1\",\"sample_sequence_ids\":[\"req-1/0\",\"req-1/1\"]}");
    post("load_weights",
         "{\"session_id\":\"sess-1\",\"model_seq_id\":0,\"path\":\"tinker://r/weights/n\"}");
    expect(200, "{\"request_id\":\"req-1\",\"model_id\":\"sess-1:train:0\"}");
    int n = fake.n_submitted;
    post("asample", "{\"prompt\":{}}");
    assert_int_equal(last.status, 400);
    post("optim_step", "{nonsense");
    expect_part(400, "invalid JSON at line 1");
    assert_int_equal(fake.n_submitted, n);
    tb_error_set(&fake.refuse, TB_EBUSY, "too much is queued");
    post("unload_model", "{\"model_id\":\"m\"}");
    expect_part(429, "\"queue_state\":\"paused_capacity\"");
    assert_string_equal(last.retry, "1");
    tb_error_set(&fake.refuse, TB_ENOTFOUND, "no model m");
    post("unload_model", "{\"model_id\":\"m\"}");
    expect_error(404, "no model m", "user");
    const struct tb_http_field f[] = {KEY, {"Content-Encoding", "br"}};
    call_with(TB_HTTP_POST, "/api/v1/optim_step", f, 2, "x", 1);
    expect_part(400, "Content-Encoding \\\"br\\\" is not supported");
}

/* SDK 0.1.5 knows no sessions: core makes one with the model, found again by the idempotency key.
 */
static void test_model_without_session(void **state)
{
    (void)state;
    const struct tb_http_field f[] = {KEY, {"X-Idempotency-Key", "u:c:1"}};
    static const char body[] = "{\"base_model\":\"tiny\",\"lora_config\":{\"rank\":4}}";
    call_with(TB_HTTP_POST, "/api/v1/create_model", f, 2, body, sizeof(body) - 1);
    expect(200, "{\"request_id\":\"req-1\",\"model_id\":\"sess-1:train:0\"}");
    assert_int_equal(fake.n_sessions, 0);
    assert_null(fake.op->session_id);
    assert_string_equal(fake.op->idempotency_key, "u:c:1");
    assert_int_equal(fake.op->model_seq_id, 0);
}

static char *long_prompt(size_t tokens, size_t *n)
{
    struct tb_buf b;
    tb_buf_init(&b, 64 << 20);
    tb_buf_puts(
        &b, "{\"sampling_session_id\":\"s\",\"seq_id\":0,\"prompt\":{\"chunks\":[{\"tokens\":[1");
    for (size_t i = 1; i < tokens; i++)
        tb_buf_puts(&b, ",12345");
    tb_buf_puts(&b, "]}]}}");
    return tb_buf_steal(&b, n);
}

/* Large bodies are decoded in the pool, also when the server closes meanwhile. */
static void test_large_bodies(void **state)
{
    (void)state;
    size_t n;
    char *body = long_prompt(100000, &n);
    call_with(TB_HTTP_POST, "/api/v1/asample", &KEY, 1, body, n);
    expect(200, "{\"request_id\":\"req-1\",\"sample_sequence_ids\":[\"req-1/0\"]}");
    assert_int_equal(fake.op->u.sample.n_prompt, 100000);
    assert_true(fake.op->body_bytes >= n);
    body[n - 1] = ' ';
    call_with(TB_HTTP_POST, "/api/v1/asample", &KEY, 1, body, n);
    expect_part(400, "invalid JSON");
    body[n - 1] = '}';
    send_call(TB_HTTP_POST, "/api/v1/asample", &KEY, 1, body, n);
    for (int i = 0; i < 3; i++)
        uv_run(&loop, UV_RUN_NOWAIT); /* handed over, maybe being decoded */
    tb_free(body);
}

/* ---- futures */

static const struct tb_http_field PROTO[] = {{"X-API-Key", "tml-one"},
                                             {"Accept", "application/x-protobuf"}};
static const struct tb_http_field BEAM[] = {{"X-API-Key", "tml-one"},
                                            {"x-stainless-runtime", "BEAM"}};

static void poll_with(const struct tb_http_field *f, const char *json)
{
    call_with(TB_HTTP_POST, "/api/v1/retrieve_future", f, 2, json, strlen(json));
}

static void set_op(enum tb_op_type type)
{
    tb_op_destroy(fake.op);
    fake.op = tb_op_create(type);
}

static void test_future_forms(void **state)
{
    (void)state;
    static const char ask[] = "{\"request_id\":\"sess-1:train:0:1\",\"allow_metadata_only\":true}";
    set_op(TB_OP_OPTIM_STEP);
    fake.state = TB_FUTURE_DONE;
    poll_with(PROTO, ask);
    expect(200, "{\"metrics\":{},\"type\":\"optim_step\"}"); /* has no protobuf form */
    assert_string_equal(fake.last_id, "sess-1:train:0:1");
    assert_int_equal(fake.n_delivered, 1);
    set_op(TB_OP_FORWARD_BACKWARD);
    poll_with(PROTO, ask);
    assert_int_equal(last.status, 200);
    assert_string_equal(last.type, "application/x-protobuf");
    assert_int_equal(last.n, 13);
    assert_int_equal(fake.n_held + fake.n_released, 0); /* small ones are encoded at once */
    poll_with(BEAM, ask);
    expect_part(200, "\"loss_fn_output_type\":\"ArrayRecord\"");
    fake.state = TB_FUTURE_FAILED;
    tb_error_set(&fake.op->error, TB_EINVAL, "bad \"thing\"");
    poll_with(PROTO, ask);
    expect(200, "{\"error\":\"bad \\\"thing\\\"\",\"category\":\"user\"}");
    poll_with(BEAM, ask);
    expect(
        200,
        "{\"status\":\"failed\",\"error\":{\"message\":\"bad \\\"thing\\\"\",\"category\":\"user\"},"
        "\"category\":\"user\"}");
    fake.op->error.code = TB_EINTERNAL;
    poll_with(PROTO, ask);
    expect_part(200, "\"category\":\"server\"");
    fake.state = TB_FUTURE_GONE;
    poll_with(PROTO, ask);
    expect_part(410, "has expired or was lost");
    fake.state = TB_FUTURE_UNKNOWN;
    poll_with(PROTO, ask);
    expect_error(404, "there is no request sess-1:train:0:1", "user");
    poll_with(PROTO, "{}");
    expect_error(400, "request_id: required, but absent", "user");
}

static void test_future_pending(void **state)
{
    (void)state;
    static const char ask[] = "{\"request_id\":\"r\"}";
    send_call(TB_HTTP_POST, "/api/v1/retrieve_future", PROTO, 2, ask, sizeof(ask) - 1);
    RUN_UNTIL(&loop, fake.waiter);
    assert_false(last.done); /* it is held */
    struct tb_waiter *w = fake.waiter;
    fake.waiter = NULL;
    w->cb(w, TB_FUTURE_PENDING, NULL, "paused_capacity", "memory");
    RUN_UNTIL(&loop, last.done);
    expect(408, "{\"type\":\"try_again\",\"request_id\":\"r\",\"queue_state\":\"paused_capacity\","
                "\"queue_state_reason\":\"memory\"}");
    assert_int_equal(fake.n_unwaits, 0);
    assert_int_equal(fake.n_delivered, 0);
    /* the tear-down closes the server under a held poll: it must be taken back */
    send_call(TB_HTTP_POST, "/api/v1/retrieve_future", PROTO, 2, ask, sizeof(ask) - 1);
    RUN_UNTIL(&loop, fake.waiter);
}

static int tear_down_unwaited(void **state)
{
    int rc = tear_down(state);
    return rc || fake.n_unwaits != 1 || fake.waiter ? -1 : 0;
}

static void test_future_metadata(void **state)
{
    (void)state;
    size_t n = 300000;
    struct tb_output o = {.n = (int32_t)n, .logprobs = tb_calloc(n, sizeof(float))};
    set_op(TB_OP_FORWARD);
    fake.op->result.outputs = &o;
    fake.op->result.n_outputs = 1;
    fake.state = TB_FUTURE_DONE;
    poll_with(PROTO, "{\"request_id\":\"r\",\"allow_metadata_only\":true}");
    expect_part(200, "{\"status\":\"complete_metadata\",\"response_payload_size\":12000");
    unsigned size;
    assert_int_equal(sscanf(strstr(last.body, "size\":") + 6, "%u", &size), 1);
    assert_int_equal(fake.n_delivered, 0);
    poll_with(PROTO, "{\"request_id\":\"r\",\"allow_metadata_only\":false}");
    assert_int_equal(last.status, 200);
    assert_int_equal(last.n, size); /* what was announced */
    assert_int_equal(fake.n_delivered, 1);
    assert_int_equal(fake.n_held, 0);
    assert_int_equal(fake.n_released, 2); /* both were encoded in the pool */
    tb_free(o.logprobs);
}

/* ---- the store's side */

static void test_sampling_sessions(void **state)
{
    (void)state;
    post("create_sampling_session", "{\"session_id\":\"sess-1\",\"sampling_session_seq_id\":1,"
                                    "\"base_model\":\"tiny\",\"model_path\":null}");
    expect(200,
           "{\"sampling_session_id\":\"sess-1:sample:1\",\"type\":\"create_sampling_session\"}");
    post("create_sampling_session",
         "{\"session_id\":\"sess-1\",\"sampling_session_seq_id\":1,\"base_model\":\"huge\"}");
    expect_error(400, "no base model huge", "user");
    post("create_sampling_session", "{\"session_id\":\"sess-1\",\"sampling_session_seq_id\":1}");
    expect_error(400, "exactly one of base_model and model_path must be given", "user");
    post("create_sampling_session",
         "{\"session_id\":\"sess-1\",\"sampling_session_seq_id\":1,\"model_path\":\"/x\"}");
    assert_int_equal(last.status, 400);
    get("samplers/sess-1:sample:1");
    expect(200, "{\"sampler_id\":\"sess-1:sample:1\",\"base_model\":\"tiny\"}");
    get("samplers/sess-1%3Asample%3A1");
    assert_int_equal(last.status, 200);
    get("samplers/none");
    assert_int_equal(last.status, 404);
}

static void test_runs(void **state)
{
    (void)state;
    get("training_runs?limit=5&offset=0&access_scope=owned");
    expect_part(200, "\"cursor\":{\"offset\":0,\"limit\":5,\"total_count\":1}");
    expect_part(200, "\"last_request_time\":\"2023-11-14T22:13:20.123456Z\"");
    expect_part(200, "\"user_metadata\":{\"s\":\"x\",\"n\":\"1\",\"o\":\"{\\\"k\\\":[1]}\"}");
    get("training_runs/sess-1:train:0");
    expect_part(200,
                "{\"training_run_id\":\"sess-1:train:0\",\"base_model\":\"tiny\",\"model_owner\":");
    get("training_runs/none");
    assert_int_equal(last.status, 404);
    get("training_runs?limit=0");
    assert_int_equal(last.status, 400);
}

#define CK "training_runs/sess-1:train:0/checkpoints/"

static void test_checkpoints(void **state)
{
    (void)state;
    write_ckpt(TB_CKPT_TRAINING, "c1");
    write_ckpt(TB_CKPT_EXTERNAL, "e1");
    get("checkpoints");
    expect_part(200, "\"checkpoint_id\":\"weights/c1\",\"checkpoint_type\":\"training\"");
    expect_part(200, "\"checkpoint_type\":\"external\"");
    expect_part(200, "\"tinker_path\":\"tinker://sess-1:train:0/weights/c1\"");
    expect_part(200, "\"total_count\":2");
    const struct tb_http_field old[] = {KEY, {"X-Stainless-Package-Version", "0.25.0"}};
    call_with(TB_HTTP_GET, "/api/v1/checkpoints", old, 2, NULL, 0);
    expect_part(200, "weights/c1");
    assert_null(strstr(last.body, "external"));
    get("training_runs/sess-1:train:0/checkpoints");
    expect_part(200, "\"public\":false");
    post(CK "weights/c1/publish", "");
    expect(200, "{}");
    call_with(TB_HTTP_PUT, "/api/v1/" CK "weights/c1/ttl", &KEY, 1, "{\"ttl_seconds\":7200}", 20);
    expect(200, "{}");
    get("training_runs/sess-1:train:0/checkpoints");
    expect_part(200, "\"public\":true");
    expect_part(200, "\"expires_at\":\"2");
    call_with(TB_HTTP_DELETE, "/api/v1/" CK "weights/c1/publish", &KEY, 1, NULL, 0);
    expect(200, "{}");
    call_with(TB_HTTP_PUT, "/api/v1/" CK "weights/c1/ttl", &KEY, 1, "{\"ttl_seconds\":null}", 20);
    expect(200, "{}");
    call_with(TB_HTTP_PUT, "/api/v1/" CK "weights/c1/ttl", &KEY, 1, "{\"ttl_seconds\":1}", 17);
    expect_error(400, "ttl_seconds: 1 is not in 3600..315360000", "user");
    post("weights_info", "{\"tinker_path\":\"tinker://sess-1:train:0/weights/c1\"}");
    expect_part(200, "\"is_lora\":true,\"lora_rank\":2,\"train_unembed\":");
    post("weights_info", "{\"tinker_path\":\"nope\"}");
    assert_int_equal(last.status, 400);
    call_with(TB_HTTP_DELETE, "/api/v1/" CK "weights/c1", &KEY, 1, NULL, 0);
    expect(200, "{}");
    call_with(TB_HTTP_DELETE, "/api/v1/" CK "weights/c1", &KEY, 1, NULL, 0);
    assert_int_equal(last.status, 404);
    call_with(TB_HTTP_DELETE, "/api/v1/" CK "weights/..", &KEY, 1, NULL, 0);
    assert_int_equal(last.status, 400);
    post("weights_info", "{\"tinker_path\":\"tinker://sess-1:train:0/weights/c1\"}");
    assert_int_equal(last.status, 404);
}

/* The URLs of external weights need no key, and nothing else opens with their token. */
static void test_downloads(void **state)
{
    (void)state;
    write_ckpt(TB_CKPT_EXTERNAL, "e1");
    const struct tb_http_field f[] = {
        KEY, {"X-Forwarded-Proto", "https"}, {"Host", "t.example:81"}};
    call_with(TB_HTTP_GET, "/api/v1/" CK "external_weights/e1/external_weights_urls", f, 3, NULL,
              0);
    expect_part(200, "{\"urls\":{\"adapter_config.json\":\"https://t.example:81/api/v1/downloads/");
    expect_part(200, "\"expires\":\"2");
    const char *at = strstr(last.body, "/api/v1/downloads/");
    char url[256], other[256];
    snprintf(url, sizeof(url), "%.*s", (int)strcspn(at, "\""), at);
    call_with(TB_HTTP_GET, url, NULL, 0, NULL, 0);
    expect_part(200, "\"peft_type\"");
    snprintf(other, sizeof(other), "%.*s/checkpoint.json", (int)(strrchr(url, '/') - url), url);
    call_with(TB_HTTP_GET, other, NULL, 0, NULL, 0);
    assert_int_equal(last.status, 404);
    snprintf(other, sizeof(other), "%.*s/adapter_model.safetensors", (int)(strrchr(url, '/') - url),
             url);
    call_with(TB_HTTP_GET, other, NULL, 0, NULL, 0);
    assert_int_equal(last.status, 200);
    assert_true(last.n > 100);
    call_with(TB_HTTP_GET,
              "/api/v1/downloads/0000000000000000000000000000000000000000/adapter_config.json",
              NULL, 0, NULL, 0);
    assert_int_equal(last.status, 404);
    get(CK "external_weights/none/external_weights_urls");
    assert_int_equal(last.status, 404);
}

/* A tar's members: "name size" lines; checks headers' sums and the end. */
static void read_tar(const char *p, size_t n, char *out, size_t room)
{
    size_t at = 0, k = 0;
    assert_int_equal(n % 512, 0);
    while (at + 512 <= n && p[at]) {
        unsigned sum = 0, want;
        unsigned long long size;
        for (size_t i = 0; i < 512; i++)
            sum += i >= 148 && i < 156 ? ' ' : (unsigned char)p[at + i];
        assert_int_equal(sscanf(p + at + 148, "%6o", &want), 1);
        assert_int_equal(sum, want);
        assert_int_equal(sscanf(p + at + 124, "%11llo", &size), 1);
        assert_memory_equal(p + at + 257, "ustar", 6);
        k += (size_t)snprintf(out + k, room - k, "%s %llu\n", p + at, size);
        at += 512 + ((size_t)size + 511) / 512 * 512;
    }
    assert_int_equal(n - at, 1024);
    for (; at < n; at++)
        assert_int_equal(p[at], 0);
}

static void test_archive(void **state)
{
    (void)state;
    struct stat st;
    char members[1024] = "", line[128], url[256], file[512];
    write_ckpt(TB_CKPT_TRAINING, "c1");
    /* larger than a piece, and not a multiple of a block */
    snprintf(file, sizeof(file), "%s/checkpoints/sess-1:train:0/weights/c1", dir);
    if (stat(file, &st)) fail_msg("%s is not there", file);
    snprintf(file, sizeof(file), "%s/checkpoints/sess-1:train:0/weights/c1/large.bin", dir);
    FILE *f = fopen(file, "wb");
    assert_non_null(f);
    for (int i = 0; i < 700001; i++)
        fputc(i % 251, f);
    fclose(f);
    get(CK "weights/c1/archive");
    expect_part(302, "\"url\":\"http://");
    const char *at = strstr(last.body, "/api/v1/downloads/");
    snprintf(url, sizeof(url), "%.*s", (int)strcspn(at, "\""), at);
    call_with(TB_HTTP_GET, url, NULL, 0, NULL, 0);
    assert_int_equal(last.status, 200);
    read_tar(last.body, last.n, members, sizeof(members));
    static const char *const names[] = {"adapter_config.json ", "adapter_model.safetensors ",
                                        "checkpoint.json ", "optimizer.safetensors "};
    for (size_t i = 0; i < TB_ARRAY_LEN(names); i++)
        assert_non_null(strstr(members, names[i]));
    snprintf(line, sizeof(line), "large.bin %d\n", 700001);
    assert_non_null(strstr(members, line));
    const char *data = memmem(last.body, last.n, "large.bin", 9);
    for (int i = 0; i < 700001; i++)
        assert_int_equal((unsigned char)data[512 + i], i % 251);
    get(CK "weights/none/archive");
    assert_int_equal(last.status, 404);
    /* a file that becomes shorter while it is sent: no whole answer */
    assert_int_equal(truncate(file, 256 << 20), 0);
    send_call(TB_HTTP_GET, url, NULL, 0, NULL, 0);
    for (int i = 0; i < 20; i++) /* each turn reads a piece at most */
        uv_run(&loop, UV_RUN_ONCE);
    assert_int_equal(truncate(file, 0), 0);
    RUN_UNTIL(&loop, last.done);
    expect_part(500, "the answer broke off");
    /* closed in the middle */
    send_call(TB_HTTP_GET, url, NULL, 0, NULL, 0);
    for (int i = 0; i < 3; i++)
        uv_run(&loop, UV_RUN_NOWAIT);
}

static void test_copies_and_search(void **state)
{
    (void)state;
    post("copy_weights", "{\"source_path\":\"tinker://none/weights/x\"}");
    expect_part(404, "tinker://none/weights/x");
    post("copy_weights", "{\"source_path\":\"tinker://a/weights/x\",\"session_id\":\"sess-1\"}");
    expect_part(400, "go together");
    post("sessions/search", "{\"display_name\":\"D\",\"limit\":1}");
    expect(
        200,
        "{\"sessions\":[{\"session_id\":\"sess-1\",\"created_at\":\"1970-01-01T00:00:01.000000Z\","
        "\"owner\":\"default\",\"project_id\":\"default\",\"status\":{\"type\":\"active\"},"
        "\"checkpoints_count\":0,\"checkpoint_storage_bytes\":0,\"display_name\":\"d\","
        "\"user_metadata\":{\"a\":\"1\"}}]}");
    get("audit");
    expect(200, "{\"entries\":[]}");
}

static void test_tenants(void **state)
{
    (void)state;
    static const struct tb_http_field other = {"X-API-Key", "tml-other"},
                                      none = {"X-API-Key", "tml-otherr"};
    char token[1024];
    get("auth/apikey/me");
    expect_part(200, "{\"key_id\":1,\"name\":\"default\"");
    call_with(TB_HTTP_GET, "/api/v1/auth/apikey/me", &other, 1, NULL, 0);
    expect_part(200, "{\"key_id\":0,\"name\":\"them\"");
    call_with(TB_HTTP_GET, "/api/v1/sessions", &none, 1, NULL, 0);
    assert_int_equal(last.status, 401);

    /* what a key is exchanged for is as good as the key */
    call_with(TB_HTTP_POST, "/api/v1/auth/token", &other, 1, "{}", 2);
    assert_int_equal(sscanf(last.body, "{\"jwt\":\"%1000[^\"]\"}", token), 1);
    struct tb_http_field exchanged = {"X-API-Key", token};
    call_with(TB_HTTP_POST, "/api/v1/session_heartbeat", &exchanged, 1,
              "{\"session_id\":\"sess-1\"}", 23);
    assert_int_equal(last.status, 200);
    assert_string_equal(fake.who->name, "them");
    call_with(TB_HTTP_GET, "/api/v1/sessions", &exchanged, 1, NULL, 0);
    expect_part(200, "\"total_count\":0"); /* the rows are the other tenant's */
    token[strlen(token) - 3] ^= 1;
    call_with(TB_HTTP_GET, "/api/v1/sessions", &exchanged, 1, NULL, 0);
    assert_int_equal(last.status, 401);
    assert_string_equal(last.authenticate, "Bearer error=\"invalid_token\"");

    struct tb_span key, tenant;
    assert_int_equal(tb_api_key_split("tml-a=b=c", &key, &tenant, NULL), 0);
    assert_true(tb_span_eq(key, "tml-a=b") && tb_span_eq(tenant, "c"));
    static const char *const bad[] = {"", "tml-", "sk-x", "tml-a=", "tml-a=b c", "tml-=b"};
    for (size_t i = 0; i < TB_ARRAY_LEN(bad); i++)
        assert_int_equal(tb_api_key_split(bad[i], &key, &tenant, NULL), TB_EINVAL);
}

static void test_batch(void **state)
{
    (void)state;
    post("retrieve_futures",
         "{\"target\":{\"type\":\"sampling_session\",\"sampling_session_id\":\"sess-1:sample:1\","
         "\"cloned_sampler_id\":3},\"prev_cursor\":5,\"timeout\":0.0,"
         "\"retrieved_request_ids\":[\"sess-1:sample:1:4\",\"sess-1:sample:10:1\"]}");
    expect(200, "{\"completions\":[],\"cursor\":5}");
    assert_int_equal(fake.feed_clone, 3);
    assert_int_equal(fake.feed_prev, 5);
    assert_int_equal(fake.feed_timeout, 0);
    assert_string_equal(fake.retrieved, "sess-1:sample:1:4 ");

    static const char held[] =
        "{\"target\":{\"type\":\"sampling_session\",\"sampling_session_id\":\"sess-1:sample:1\"},"
        "\"timeout\":null}";
    send_call(TB_HTTP_POST, "/api/v1/retrieve_futures", &KEY, 1, held, sizeof(held) - 1);
    RUN_UNTIL(&loop, fake.feed);
    assert_false(last.done);
    assert_true(fake.feed_timeout > 60000);
    struct tb_op *ok = tb_op_create(TB_OP_SAMPLE), *bad = tb_op_create(TB_OP_SAMPLE);
    struct tb_sequence seq = {.n = 10};
    ok->result.n_sequences = 1;
    ok->result.sequences = &seq;
    tb_error_set(&bad->error, TB_ECANCELED, "no");
    struct tb_feed_event ev[] = {{"a", ok}, {"b", bad}};
    struct tb_error none = {0};
    fake.feed->cb(fake.feed, &none, ev, 2, 9);
    RUN_UNTIL(&loop, last.done);
    expect(200, "{\"completions\":[{\"state\":\"finished\",\"request_id\":\"a\","
                "\"response_payload_uncompressed_size\":112},"
                "{\"state\":\"failed\",\"request_id\":\"b\"}],\"cursor\":9}");
    tb_op_destroy(ok);
    tb_op_destroy(bad);
    fake.feed = NULL;

    post("retrieve_futures", "{\"target\":{\"type\":\"sampling_session\","
                             "\"sampling_session_id\":\"sess-1:sample:2\"}}");
    expect_part(410, "no sampler sess-1:sample:2");
    post("retrieve_futures", "{\"target\":{\"type\":\"model\",\"sampling_session_id\":\"x\"}}");
    expect_part(400, "is not \\\"sampling_session\\\"");
    post("retrieve_futures", "{}");
    expect_part(400, "target");

    post("cancel_future", "{\"request_id\":\"sess-1:sample:1:7\"}");
    expect(200, "{}");
    assert_string_equal(fake.canceled, "sess-1:sample:1:7");
    post("cancel_future", "{\"request_id\":\"nonsense\"}");
    expect(200, "{}");
    post("join_sampling_session", "{\"sampling_session_id\":\"sess-1:sample:1\"}");
    expect(200, "{\"client_counter\":7,\"type\":\"join_sampling_session\"}");
    post("join_sampling_session", "{\"sampling_session_id\":\"gone\"}");
    expect_part(410, "no gone");
}

/* ---- Tinkerbell's: jobs whose ops end as the test says */

static void bell(const char *path, const char *json)
{
    call_with(TB_HTTP_POST, path, &KEY, 1, json, strlen(json));
}

/* A job that begins with a creation: both streams, the creation's last. */
static void bell_begin(const char *path, const char *json, int n_streams)
{
    send_call(TB_HTTP_POST, path, &KEY, 1, json, strlen(json));
    RUN_UNTIL(&loop, fake.n_streams == n_streams);
}

static struct tb_op failed_op(const char *text)
{
    struct tb_op op = {.type = TB_OP_CREATE_MODEL};
    tb_error_set(&op.error, TB_ENOMEM, "%s", text);
    return op;
}

static void test_bell_creation_fails(void **state)
{
    (void)state;
    struct tb_op failed = failed_op("no room for it"), done = {.type = TB_OP_CREATE_MODEL};
    static const char add[] = "{\"base_model\":\"tiny\"}", save[] = "{\"model_id\":\"mine\"}";
    bell_begin("/api/v1/add_lora", add, 1);
    assert_false(last.done);
    fake_end(fake.streams[0], TB_FUTURE_FAILED, &failed);
    RUN_UNTIL(&loop, last.done);
    expect_part(500, "Add LoRA failed: no room for it");
    bell_begin("/api/v1/add_lora", add, 1);
    fake_end(fake.streams[0], TB_FUTURE_DONE, &done);
    RUN_UNTIL(&loop, last.done);
    expect_part(200, "{\"model_id\":\"tiny_lora_");

    /* its name is free, so the next use makes it again */
    int before = fake.n_submitted;
    bell_begin("/save_weights", save, 2);
    assert_int_equal(fake.n_submitted, before + 2);
    fake_end(fake.streams[1], TB_FUTURE_FAILED, &failed);
    fake_end(fake.streams[0], TB_FUTURE_FAILED, &failed);
    bell_begin("/save_weights", save, 2);
    assert_int_equal(fake.n_submitted, before + 4);
    fake_end(fake.streams[1], TB_FUTURE_DONE, &done);
    fake_end(fake.streams[0], TB_FUTURE_DONE, &done);
    bell_begin("/save_weights", save, 1);
    assert_int_equal(fake.n_submitted, before + 5);
    fake_end(fake.streams[0], TB_FUTURE_DONE, &done);
    RUN_UNTIL(&loop, last.done);
}

/* What was refused has not happened. */
static void test_bell_refused(void **state)
{
    (void)state;
    struct tb_op done = {.type = TB_OP_SAVE_WEIGHTS};
    struct tb_output output = {.n = 2, .logprobs = (float[]){-1, -2}};
    static const char name[] = "{\"model_id\":\"mine\"}",
                      data[] =
                          "{\"model_id\":\"mine\",\"data\":[{\"model_input\":{\"chunks\":[{"
                          "\"type\":\"encoded_text\",\"tokens\":[1,2]}]},\"loss_fn_inputs\":{}}]}";
    bell_begin("/fwdbwd", data, 2);
    fake_end(fake.streams[1], TB_FUTURE_DONE, &done);
    done.result.n_outputs = 1;
    done.result.outputs = &output;
    fake_end(fake.streams[0], TB_FUTURE_DONE, &done);
    RUN_UNTIL(&loop, last.done);

    for (int i = 0; i < 2; i++) { /* the gradients are still to be stepped on */
        int before = fake.n_submitted;
        if (i == 0) tb_error_set(&fake.refuse, TB_EBUSY, "the queue is full");
        bell("/optim_step", name);
        RUN_UNTIL(&loop, fake.n_streams == i && !fake.refuse.code);
        assert_int_equal(fake.n_submitted, before + i);
    }
    assert_int_equal(fake.op->type, TB_OP_OPTIM_STEP);
    fake_end(fake.streams[0], TB_FUTURE_DONE, &done);

    tb_error_set(&fake.refuse, TB_EBUSY, "the queue is full");
    bell("/api/v1/remove_lora", name);
    expect_part(500, "the queue is full");
    call_with(TB_HTTP_GET, "/adapters", &KEY, 1, NULL, 0);
    expect_part(200, "\"mine\"");
    bell_begin("/api/v1/remove_lora", name, 1);
    assert_int_equal(fake.op->type, TB_OP_UNLOAD_MODEL);
    fake_end(fake.streams[0], TB_FUTURE_DONE, &done);
    RUN_UNTIL(&loop, last.done);
    expect(200, "{\"status\":\"deleted\"}");
    call_with(TB_HTTP_GET, "/adapters", &KEY, 1, NULL, 0);
    assert_null(strstr(last.body, "\"mine\""));
}

/* A tenant's results are not pushed out by another's. */
static void test_bell_results_of_tenants(void **state)
{
    (void)state;
    static const struct tb_http_field other = {"X-API-Key", "tml-other"};
    static const char none[] = "{\"model_id\":\"none\"}";
    char theirs[64], first[64], id[16];
    call_with(TB_HTTP_POST, "/remove_lora", &other, 1, none, sizeof(none) - 1);
    assert_int_equal(sscanf(last.body, "{\"request_id\":\"%15[a-z0-9_]", id), 1);
    snprintf(theirs, sizeof(theirs), "{\"request_id\":\"%s\"}", id);
    for (int i = 0; i < 10001; i++) {
        bell("/remove_lora", none);
        if (i == 0) assert_int_equal(sscanf(last.body, "{\"request_id\":\"%15[a-z0-9_]", id), 1);
    }
    snprintf(first, sizeof(first), "{\"request_id\":\"%s\"}", id);
    call_with(TB_HTTP_POST, "/retrieve_future", &other, 1, theirs, strlen(theirs));
    expect(200, "{\"status\":\"deleted\"}");
    bell("/retrieve_future", first);
    assert_int_equal(last.status, 404);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        T(test_routes),
        T(test_keys),
        T(test_own_route),
        T(test_config),
        T(test_sessions),
        T(test_submits),
        T(test_model_without_session),
        T(test_large_bodies),
        T(test_future_forms),
        cmocka_unit_test_setup_teardown(test_future_pending, set_up, tear_down_unwaited),
        T(test_future_metadata),
        T(test_batch),
        T(test_copies_and_search),
        T(test_tenants),
        T(test_sampling_sessions),
        T(test_runs),
        T(test_checkpoints),
        T(test_downloads),
        T(test_archive),
        T(test_bell_creation_fails),
        T(test_bell_refused),
        T(test_bell_results_of_tenants),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
