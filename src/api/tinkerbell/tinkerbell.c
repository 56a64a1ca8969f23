/*
 * Routes of the Tinkerbell face, which requests to shared paths are its own, and the answers that
 * need no job (see tinkerbell.h). Thread: the loop's.
 */
#include "api/tinkerbell/tinkerbell.h"

#include <stdio.h>
#include <string.h>

/* ---- shared paths: the Tinker API's clients send other bodies (and the SDK its own headers) */

/* Which of the keys comes first at the top level of the JSON object in s; -1: none does, or s is no
 * JSON. Reads no further than that key, or the first MiB: this is the loop's time. */
static int first_key(struct tb_span s, const char *const *keys, size_t n)
{
    int depth = 0;
    bool is_key = false;
    s.n = TB_MIN(s.n, (size_t)1 << 20);
    for (size_t i = 0; i < s.n; i++) {
        char c = s.p[i];
        if (c == '"') {
            size_t from = ++i;
            while (i < s.n && s.p[i] != '"')
                i += s.p[i] == '\\' ? 2 : 1;
            if (i >= s.n) return -1;
            for (size_t k = 0; depth == 1 && is_key && k < n; k++)
                if (tb_span_eq((struct tb_span){s.p + from, i - from}, keys[k])) return (int)k;
            is_key = false;
        } else if (c == '{' || c == '[') {
            is_key = ++depth == 1 && c == '{';
        } else if (c == '}' || c == ']') {
            depth--;
        } else if (c == ',' && depth == 1) {
            is_key = true;
        }
    }
    return -1;
}

static bool plain_json(const struct tb_http_request *req)
{
    return !tb_http_header_get(req, "Content-Encoding").p &&
           !tb_http_header_get(req, "X-Stainless-Lang").p &&
           !tb_span_icontains(tb_http_header_get(req, "Content-Type"), "protobuf");
}

static bool has_data(const struct tb_http_request *req)
{
    static const char *const keys[] = {"data", "forward_backward_input", "forward_input"};
    return plain_json(req) && first_key(req->body, keys, TB_ARRAY_LEN(keys)) == 0;
}

static bool has_no_order(const struct tb_http_request *req)
{
    static const char *const keys[] = {"seq_id", "type"};
    return plain_json(req) && !tb_http_header_get(req, "X-API-Key").p &&
           first_key(req->body, keys, TB_ARRAY_LEN(keys)) < 0;
}

static bool is_prompt_alone(const struct tb_http_request *req)
{
    static const char *const theirs[] = {"sampling_session_id", "seq_id", "type"};
    static const char *const either[] = {"prompts", "model_path"};
    if (!plain_json(req) || first_key(req->body, theirs, TB_ARRAY_LEN(theirs)) >= 0) return false;
    int which = first_key(req->body, either, TB_ARRAY_LEN(either));
    return which == 0 || (which < 0 && !tb_http_header_get(req, "X-API-Key").p);
}

/* ---- jobs */

#define ASYNC_JOB(name, kind)                                                                      \
    static void name##_async(struct tb_api *a, struct tb_http_request *req,                        \
                             const struct tb_route_match *m)                                       \
    {                                                                                              \
        (void)m;                                                                                   \
        tb_bell_begin(a, req, &(kind), false);                                                     \
    }
#define JOB(name, kind)                                                                            \
    ASYNC_JOB(name, kind)                                                                          \
    static void name##_sync(struct tb_api *a, struct tb_http_request *req,                         \
                            const struct tb_route_match *m)                                        \
    {                                                                                              \
        (void)m;                                                                                   \
        tb_bell_begin(a, req, &(kind), true);                                                      \
    }

JOB(forward, tb_bell_forward)
JOB(forward_backward, tb_bell_forward_backward)
JOB(optim_step, tb_bell_optim_step)
JOB(sample, tb_bell_sample)
JOB(add_lora, tb_bell_add_lora)
JOB(remove_lora, tb_bell_remove_lora)
ASYNC_JOB(load_weights, tb_bell_load)
ASYNC_JOB(save_weights, tb_bell_save)
ASYNC_JOB(save_sampler, tb_bell_save_sampler)
ASYNC_JOB(register_loss, tb_bell_register_loss)

/* ---- answers at once */

static void text(struct tb_http_request *req, const char *json)
{
    tb_http_respond(req, 200, "application/json", json, strlen(json), NULL, 0);
}

static void healthz(struct tb_api *a, struct tb_http_request *req, const struct tb_route_match *m)
{
    (void)a;
    (void)m;
    text(req, "{\"status\":\"ok\"}");
}

static void favicon(struct tb_api *a, struct tb_http_request *req, const struct tb_route_match *m)
{
    (void)a;
    (void)m;
    tb_http_respond(req, 204, NULL, NULL, 0, NULL, 0);
}

static void capabilities(struct tb_api *a, struct tb_http_request *req,
                         const struct tb_route_match *m)
{
    const struct tb_llm_model *one;
    struct tb_buf b;
    struct tb_json_out j;
    (void)m;
    tb_api_answer_begin(&b, &j);
    tb_jout_array(&j, "supported_models");
    for (int i = 0; (one = tb_llm_model_at(a, i)); i++) {
        const struct tb_served_model *info = tb_llm_model_info(one);
        tb_jout_object(&j, NULL);
        tb_jout_str(&j, "model_id", info->name);
        tb_jout_str(&j, "model_name", info->name);
        tb_jout_str(&j, "arch", info->arch);
        tb_jout_object_end(&j);
    }
    tb_jout_array_end(&j);
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}

static void get_info(struct tb_api *a, struct tb_http_request *req, const struct tb_route_match *m)
{
    const char *id;
    (void)m;
    if (tb_bell_body_string(req, "model_id", &id)) return;
    const struct tb_bell_adapter *ad = tb_bell_adapter_find(tb_bell_tenant(a, tb_api_who(req)), id);
    const struct tb_llm_model *base = ad ? ad->base : id ? tb_llm_model_find(a, id) : NULL;
    const struct tb_served_model *info = base ? tb_llm_model_info(base) : NULL;
    struct tb_buf b;
    struct tb_json_out j;
    tb_api_answer_begin(&b, &j);
    tb_jout_str(&j, "model_id", id);
    tb_jout_object(&j, "model_data");
    tb_jout_str(&j, "model_name", info ? info->name : id);
    tb_jout_str(&j, "arch", info ? info->arch : "unknown");
    tb_jout_object_end(&j);
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}

static void list_losses(struct tb_api *a, struct tb_http_request *req,
                        const struct tb_route_match *m)
{
    static const char *const known[][2] = {
        {"cross_entropy", "the sum of weighted negative log-probabilities"},
        {"importance_sampling", "policy gradient with the ratio to the sampler's probabilities"},
        {"ppo", "clipped policy gradient"},
        {"cispo", "policy gradient with a clipped, constant ratio"},
        {"dro", "direct reward optimization"}};
    struct tb_buf b;
    struct tb_json_out j;
    size_t it = 0, n;
    const char *name;
    void *v;
    (void)m;
    const struct tb_map *own = &tb_bell_tenant(a, tb_api_who(req))->losses;
    tb_api_answer_begin(&b, &j);
    tb_jout_array(&j, "available_loss_functions");
    for (size_t i = 0; i < TB_ARRAY_LEN(known); i++)
        tb_jout_str(&j, NULL, known[i][0]);
    while (tb_map_next(own, &it, &name, &n, &v))
        tb_jout_str(&j, NULL, v);
    tb_jout_array_end(&j);
    tb_jout_object(&j, "descriptions");
    for (size_t i = 0; i < TB_ARRAY_LEN(known); i++)
        tb_jout_str(&j, known[i][0], known[i][1]);
    it = 0;
    while (tb_map_next(own, &it, &name, &n, &v))
        tb_jout_str(&j, v, "uploaded; never executed here");
    tb_jout_object_end(&j);
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}

static void adapters(struct tb_api *a, struct tb_http_request *req, const struct tb_route_match *m)
{
    struct tb_buf b;
    struct tb_json_out j;
    size_t it = 0, n;
    const char *name;
    void *v;
    (void)m;
    tb_api_answer_begin(&b, &j);
    tb_jout_array(&j, "adapters");
    while (tb_map_next(&tb_bell_tenant(a, tb_api_who(req))->adapters, &it, &name, &n, &v)) {
        const struct tb_bell_adapter *ad = v;
        const struct tb_served_model *base = tb_llm_model_info(ad->base);
        tb_jout_object(&j, NULL);
        tb_jout_str(&j, "model_id", ad->name);
        tb_jout_str(&j, "base_model", base->name);
        tb_jout_int(&j, "rank", ad->rank);
        tb_jout_int(&j, "trainable_params", base->lora_width * ad->rank);
        tb_jout_bool(&j, "has_gradients", ad->n_gradients > 0);
        tb_jout_object_end(&j);
    }
    tb_jout_array_end(&j);
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}

static void try_forward_backward(struct tb_api *a, struct tb_http_request *req,
                                 const struct tb_route_match *m)
{
    req->body = TB_SPAN_LIT(
        "{\"model_id\":\"test-model\",\"data\":[[{\"role\":\"user\",\"content\":\"Hello\"},"
        "{\"role\":\"assistant\",\"content\":\"Hi there!\"}]]}");
    forward_backward_sync(a, req, m);
}

static void listing(struct tb_api *a, struct tb_http_request *req, const struct tb_route_match *m);

/* ---- the table */

#define V1 "/api/v1/"
#define GET(p, h)                                                                                  \
    {                                                                                              \
        .method = TB_HTTP_GET, .pattern = (p), .handle = (h)                                       \
    }
#define OPEN(p, h)                                                                                 \
    {                                                                                              \
        .method = TB_HTTP_GET, .pattern = (p), .handle = (h), .open = true                         \
    }
#define POST(p, h)                                                                                 \
    {                                                                                              \
        .method = TB_HTTP_POST, .pattern = (p), .handle = (h)                                      \
    }
#define SHARED(p, h, mine)                                                                         \
    {                                                                                              \
        .method = TB_HTTP_POST, .pattern = (p), .handle = (h), .ours = (mine)                      \
    }

static const struct tb_route ROUTES[] = {
    OPEN("/", listing),
    OPEN("/favicon.ico", favicon),
    OPEN("/healthz", healthz),
    GET("/get_server_capabilities", capabilities),
    POST("/retrieve_future", tb_bell_retrieve),

    SHARED(V1 "forward", forward_sync, has_data),
    SHARED(V1 "forward_backward", forward_backward_sync, has_data),
    SHARED(V1 "optim_step", optim_step_sync, has_no_order),
    POST(V1 "forward_async", forward_async),
    POST(V1 "forward_backward_async", forward_backward_async),
    POST(V1 "optim_step_async", optim_step_async),
    POST(V1 "sample", sample_sync),
    SHARED(V1 "asample", sample_async, is_prompt_alone),
    POST(V1 "add_lora", add_lora_sync),
    POST(V1 "add_lora_async", add_lora_async),
    POST(V1 "remove_lora", remove_lora_sync),
    POST(V1 "remove_lora_async", remove_lora_async),
    POST(V1 "load_weights_async", load_weights_async),
    POST(V1 "save_weights_async", save_weights_async),
    POST(V1 "save_weights_for_sampler_async", save_sampler_async),

    POST("/fwd", forward_async),
    POST("/fwdbwd", forward_backward_async),
    POST("/optim_step", optim_step_async),
    POST("/add_lora", add_lora_async),
    POST("/remove_lora", remove_lora_async),
    POST("/load_weights", load_weights_async),
    POST("/save_weights", save_weights_async),
    POST("/save_weights_for_sampler", save_sampler_async),

    POST("/get_info", get_info),
    POST("/register_custom_loss", register_loss_async),
    GET("/list_loss_functions", list_losses),
    GET("/loss_functions", list_losses),
    GET("/adapters", adapters),
    GET("/test_fwdbwd", try_forward_backward),
};

const struct tb_face tb_face_tinkerbell = {.name = "tinkerbell",
                                           .routes = ROUTES,
                                           .n_routes = TB_ARRAY_LEN(ROUTES),
                                           .error = tb_bell_error};

/* ---- GET /: the original's keys, and every route of every face */

static void put_pair(struct tb_json_out *j, const char *key, const char *const (*pairs)[2],
                     size_t n)
{
    tb_jout_object(j, key);
    for (size_t i = 0; i < n; i++)
        tb_jout_str(j, pairs[i][0], pairs[i][1]);
    tb_jout_object_end(j);
}

static void put_endpoints(struct tb_json_out *j)
{
    static const char *const train_sync[][2] = {{"forward", "POST " V1 "forward"},
                                                {"forward_backward", "POST " V1 "forward_backward"},
                                                {"optim_step", "POST " V1 "optim_step"}};
    static const char *const train_async[][2] = {
        {"forward", "POST " V1 "forward_async"},
        {"forward_backward", "POST " V1 "forward_backward_async"},
        {"optim_step", "POST " V1 "optim_step_async"}};
    static const char *const sampling[][2] = {{"sync", "POST " V1 "sample"},
                                              {"async", "POST " V1 "asample"}};
    static const char *const lora_sync[][2] = {{"add", "POST " V1 "add_lora"},
                                               {"remove", "POST " V1 "remove_lora"}};
    static const char *const lora_async[][2] = {{"add", "POST " V1 "add_lora_async"},
                                                {"remove", "POST " V1 "remove_lora_async"}};
    static const char *const weights[][2] = {
        {"load", "POST " V1 "load_weights_async"},
        {"save", "POST " V1 "save_weights_async"},
        {"save_for_sampler", "POST " V1 "save_weights_for_sampler_async"}};
    tb_jout_object(j, "endpoints");
    tb_jout_str(j, "health", "GET /healthz");
    tb_jout_str(j, "capabilities", "GET /get_server_capabilities");
    tb_jout_str(j, "futures", "POST /retrieve_future");
    tb_jout_object(j, "training");
    put_pair(j, "sync", train_sync, TB_ARRAY_LEN(train_sync));
    put_pair(j, "async", train_async, TB_ARRAY_LEN(train_async));
    tb_jout_object_end(j);
    put_pair(j, "sampling", sampling, TB_ARRAY_LEN(sampling));
    tb_jout_object(j, "lora");
    put_pair(j, "sync", lora_sync, TB_ARRAY_LEN(lora_sync));
    put_pair(j, "async", lora_async, TB_ARRAY_LEN(lora_async));
    tb_jout_object_end(j);
    tb_jout_object(j, "weights");
    put_pair(j, "async", weights, TB_ARRAY_LEN(weights));
    tb_jout_object_end(j);
    tb_jout_object(j, "legacy");
    tb_jout_str(j, "note",
                "/fwd, /fwdbwd, /optim_step, /add_lora, /remove_lora, /load_weights, "
                "/save_weights and /save_weights_for_sampler are the async routes");
    tb_jout_object_end(j);
    tb_jout_object_end(j);
}

static void listing(struct tb_api *a, struct tb_http_request *req, const struct tb_route_match *m)
{
    struct tb_buf b;
    struct tb_json_out j;
    const struct tb_face *f;
    (void)m;
    tb_api_answer_begin(&b, &j);
    tb_jout_str(&j, "name", "tinkerbell");
    tb_jout_str(&j, "version", tb_api_options_get(a)->version);
    tb_jout_str(&j, "documentation", "docs/tinkerbell.md");
    put_endpoints(&j);
    tb_jout_object(&j, "pattern");
    tb_jout_str(&j, "async",
                "answers with request_id at once; POST /retrieve_future tells 202 "
                "while it runs, 200 with the result, 500 when it failed");
    tb_jout_str(&j, "sync", "answers with the result");
    tb_jout_object_end(&j);
    tb_jout_object(&j, "routes");
    for (int i = 0; (f = tb_api_face(i)); i++) {
        tb_jout_array(&j, f->name);
        for (int k = 0; k < f->n_routes; k++) {
            char line[128];
            snprintf(line, sizeof(line), "%s %s", tb_api_method_name(f->routes[k].method),
                     f->routes[k].pattern);
            tb_jout_str(&j, NULL, line);
        }
        tb_jout_array_end(&j);
    }
    tb_jout_object_end(&j);
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}
