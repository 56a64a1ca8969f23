/*
 * The Ollama face: /api/generate, /api/chat, /api/tags, /api/show, /api/ps, /api/version. Thread:
 * the loop's, decoding in the pool.
 */
#include <jansson.h>
#include <math.h>
#include <string.h>

#include "api/llm/llm.h"
#include "util/clock.h"
#include "util/mem.h"

#define VERSION "0.6.0" /* of the API that is spoken here */

enum kind { GENERATE, CHAT };

struct own {
    const char *done_reason; /* "load" or "unload": nothing is sampled */
};

static void put_time(struct tb_json_out *j, const char *key, int64_t wall_us)
{
    char text[TB_TIME_TEXT];
    tb_clock_format(wall_us, text);
    tb_jout_str(j, key, text);
}

static void refuse(struct tb_http_request *req, const struct tb_error *e)
{
    struct tb_buf b;
    struct tb_json_out j;
    tb_api_answer_begin(&b, &j);
    tb_jout_str(&j, "error", e->msg);
    tb_jout_object_end(&j);
    tb_api_answer(req, tb_error_status(e->code), &b);
}

static void broken(struct tb_llm *l, const struct tb_error *e)
{
    struct tb_json_out j;
    tb_jout_init(&j, &l->out);
    tb_jout_object(&j, NULL);
    tb_jout_str(&j, "error", e->msg);
    tb_jout_object_end(&j);
    tb_buf_puts(&l->out, "\n");
    tb_llm_send(l);
}

/* ---- decoding */

static int decode_options(struct tb_llm *l, const struct tb_json *root, struct tb_error *err)
{
    static const char *const unserved[] = {"mirostat", "num_keep"};
    struct tb_sample *s = &l->sample;
    struct tb_json o;
    int64_t seed = 0;
    int32_t num_ctx = 0, last_n = 64, predict = -1;
    float typical = 1, tail_free = 1, tau = 0, eta = 0; /* tau and eta are mirostat's */
    int rc = tb_json_object(root, "options", false, &o, err);
    s->temperature = 0.8f;
    s->top_k = 40;
    s->top_p = 0.9f;
    if (rc || !o.v) return rc;
    if ((rc = tb_llm_int32(&o, "num_predict", -2, INT32_MAX, &predict, err)) ||
        (rc = tb_llm_float(&o, "temperature", 0, 100, &s->temperature, err)) ||
        (rc = tb_llm_int32(&o, "top_k", -1, INT32_MAX, &s->top_k, err)) ||
        (rc = tb_llm_float(&o, "top_p", 0, 1, &s->top_p, err)) ||
        (rc = tb_llm_float(&o, "min_p", 0, 1, &s->min_p, err)) ||
        (rc = tb_llm_float(&o, "typical_p", 0, 1, &typical, err)) ||
        (rc = tb_llm_float(&o, "tfs_z", 0, 100, &tail_free, err)) ||
        (rc = tb_llm_float(&o, "mirostat_tau", 0, 100, &tau, err)) ||
        (rc = tb_llm_float(&o, "mirostat_eta", 0, 100, &eta, err)) ||
        (rc = tb_llm_float(&o, "repeat_penalty", 0.01, 100, &s->repetition_penalty, err)) ||
        (rc = tb_llm_int32(&o, "repeat_last_n", -1, INT32_MAX, &last_n, err)) ||
        (rc = tb_llm_float(&o, "presence_penalty", -2, 2, &s->presence_penalty, err)) ||
        (rc = tb_llm_float(&o, "frequency_penalty", -2, 2, &s->frequency_penalty, err)) ||
        (rc = tb_json_int(&o, "seed", false, INT64_MIN, INT64_MAX, &seed, err)) ||
        (rc = tb_json_bool(&o, "ignore_eos", false, &s->ignore_eos, err)) ||
        (rc = tb_llm_int32(&o, "num_ctx", 0, INT32_MAX, &num_ctx, err)) ||
        (rc = tb_llm_stops(l, &o, "stop", TB_MAX_STOPS, err)) ||
        (rc = tb_llm_refuse(&o, unserved, TB_ARRAY_LEN(unserved), err)))
        return rc;
    if (typical < 1)
        return tb_error_set(err, TB_EUNSUPPORTED, "options.typical_p: is not served here");
    if (tail_free < 1)
        return tb_error_set(err, TB_EUNSUPPORTED, "options.tfs_z: is not served here");
    if (s->top_k == 0) s->top_k = -1;
    if (s->top_p <= 0) s->top_p = 1;
    s->max_tokens = predict > 0 ? predict : -1;
    s->repetition_last_n = TB_MAX(last_n, 0); /* -1: all of the context, which is our 0 */
    if (last_n == 0) s->repetition_penalty = 0;
    struct tb_json v;
    s->has_seed = tb_json_find(&o, "seed", &v);
    s->seed = (uint64_t)seed;
    return 0;
}

static int decode_format(struct tb_llm *l, const struct tb_json *root, struct tb_error *err)
{
    struct tb_json format;
    const char *text;
    if (!tb_json_find(root, "format", &format)) return 0;
    if (tb_json_is_object(&format)) {
        int rc = tb_json_as_text(&format, &l->arena, 1 << 20, &text, err);
        if (rc == 0) l->schema = tb_span_str(text);
        return rc;
    }
    text = json_string_value(format.v);
    if (text && strcmp(text, "json") == 0)
        l->json = true;
    else if (!text || *text)
        return tb_json_fail(&format, err, TB_EINVAL, "is neither \"json\" nor a schema");
    return 0;
}

/* "5m", "-1", 300, 0: how long the model stays loaded, which it does anyway; 0 without a prompt
 * asks to unload. */
static bool asks_unload(const struct tb_json *root)
{
    struct tb_json v;
    if (!tb_json_find(root, "keep_alive", &v)) return false;
    const char *text = json_string_value(v.v);
    return text ? strcmp(text, "0") == 0 : json_is_number(v.v) && fabs(json_number_value(v.v)) <= 0;
}

static int decode_generate(struct tb_llm *l, const struct tb_json *root, struct tb_llm_prompt *p,
                           bool *empty, struct tb_error *err)
{
    static const char *const unserved[] = {"suffix", "template", "images", "context"};
    struct tb_json prompt, system;
    bool raw = false;
    int rc = tb_llm_refuse(root, unserved, TB_ARRAY_LEN(unserved), err);
    if (rc || (rc = tb_json_bool(root, "raw", false, &raw, err))) return rc;
    struct tb_span text = {"", 0}, sys = {NULL, 0};
    if ((tb_json_find(root, "prompt", &prompt) &&
         (rc = tb_llm_span(&l->arena, &prompt, &text, err))) ||
        (tb_json_find(root, "system", &system) &&
         (rc = tb_llm_span(&l->arena, &system, &sys, err))))
        return rc;
    *empty = text.n == 0;
    if (raw) {
        p->text = text;
        return 0;
    }
    p->messages = tb_arena_calloc(&l->arena, 2, sizeof(*p->messages));
    if (sys.n)
        p->messages[p->n_messages++] =
            (struct tb_chat_message){.role = TB_SPAN_LIT("system"), .content = sys};
    p->messages[p->n_messages++] =
        (struct tb_chat_message){.role = TB_SPAN_LIT("user"), .content = text};
    return 0;
}

static int decode(struct tb_llm *l, const struct tb_json *root, struct tb_error *err)
{
    static const char *const unserved[] = {"tools"};
    struct own *own = l->face_own = tb_arena_calloc(&l->arena, 1, sizeof(*own));
    struct tb_json messages, think;
    bool empty = false;
    int rc;
    l->stream = true;
    l->prompts = tb_arena_calloc(&l->arena, 1, sizeof(*l->prompts));
    l->n_prompts = 1;
    if ((rc = tb_json_string(root, "model", true, &l->arena, 4096, &l->model_name, err)) ||
        (rc = tb_json_bool(root, "stream", false, &l->stream, err)) ||
        (rc = tb_json_bool(root, "logprobs", false, &l->logprobs, err)) ||
        (rc = tb_llm_int32(root, "top_logprobs", 0, 20, &l->top_logprobs, err)) ||
        (rc = decode_options(l, root, err)) || (rc = decode_format(l, root, err)) ||
        (rc = tb_llm_refuse(root, unserved, TB_ARRAY_LEN(unserved), err)))
        return rc;
    if (l->top_logprobs && !l->logprobs)
        return tb_error_set(err, TB_EINVAL, "top_logprobs: %d needs logprobs: true",
                            l->top_logprobs);
    if (tb_json_find(root, "think", &think)) l->no_thinking = json_is_false(think.v);
    if (l->kind == GENERATE) {
        rc = decode_generate(l, root, l->prompts, &empty, err);
    } else {
        empty = !tb_json_find(root, "messages", &messages) || tb_json_len(&messages) == 0;
        if (!empty)
            rc = tb_llm_messages(&l->arena, &messages, &l->prompts->messages,
                                 &l->prompts->n_messages, err);
    }
    if (rc == 0 && empty) {
        own->done_reason = asks_unload(root) ? "unload" : "load";
        l->n_prompts = 0;
    }
    return rc;
}

/* ---- encoding */

static void put_head(struct tb_json_out *j, const struct tb_llm *l)
{
    tb_jout_object(j, NULL);
    tb_jout_str(j, "model", l->model_name);
    put_time(j, "created_at", tb_clock_wall_us());
}

static void put_text(struct tb_json_out *j, const struct tb_llm *l, const char *p, size_t n)
{
    if (l->kind == GENERATE) {
        tb_jout_strn(j, "response", p, n);
        return;
    }
    tb_jout_object(j, "message");
    tb_jout_str(j, "role", "assistant");
    tb_jout_strn(j, "content", p, n);
    tb_jout_object_end(j);
}

static void put_logprobs(struct tb_json_out *j, const struct tb_llm *l,
                         const struct tb_llm_choice *c, int32_t from)
{
    if (l->logprobs) tb_llm_put_logprobs(j, "logprobs", l, c, from, 0);
}

static void put_stats(struct tb_json_out *j, const struct tb_llm *l, const struct tb_llm_choice *c)
{
    uint64_t first = l->first_ns ? l->first_ns : l->ended_ns;
    tb_jout_int(j, "total_duration", (int64_t)(l->ended_ns - l->received_ns));
    tb_jout_int(j, "load_duration", 0);
    tb_jout_int(j, "prompt_eval_count", l->prompts[0].n_tokens);
    tb_jout_int(j, "prompt_eval_duration", (int64_t)(first - l->submitted_ns));
    tb_jout_int(j, "eval_count", c->n);
    tb_jout_int(j, "eval_duration", (int64_t)(l->ended_ns - first));
}

static void more(struct tb_llm *l, struct tb_llm_choice *c)
{
    struct tb_json_out j;
    if (c->whole.n == c->told && !(l->logprobs && c->n > c->n_told)) return;
    tb_jout_init(&j, &l->out);
    put_head(&j, l);
    put_text(&j, l, c->whole.p + c->told, c->whole.n - c->told);
    put_logprobs(&j, l, c, c->n_told);
    tb_jout_bool(&j, "done", false);
    tb_jout_object_end(&j);
    tb_buf_puts(&l->out, "\n");
    tb_llm_send(l);
}

static void answer(struct tb_llm *l)
{
    const struct own *own = l->face_own;
    struct tb_llm_choice *c = l->choices;
    struct tb_json_out j;
    tb_jout_init(&j, &l->out);
    put_head(&j, l);
    if (own->done_reason || l->stream)
        put_text(&j, l, "", 0);
    else
        put_text(&j, l, c->whole.p, c->whole.n);
    tb_jout_bool(&j, "done", true);
    if (own->done_reason) {
        tb_jout_str(&j, "done_reason", own->done_reason);
    } else {
        tb_jout_str(&j, "done_reason", c->stopped ? "stop" : "length");
        if (!l->stream) put_logprobs(&j, l, c, 0);
        if (l->kind == GENERATE) {
            tb_jout_array(&j, "context");
            for (int32_t i = 0; i < l->prompts[0].n_tokens; i++)
                tb_jout_int(&j, NULL, l->prompts[0].tokens[i]);
            for (int32_t i = 0; i < c->n; i++)
                tb_jout_int(&j, NULL, c->tokens[i]);
            tb_jout_array_end(&j);
        }
        put_stats(&j, l, c);
    }
    tb_jout_object_end(&j);
    if (l->stream) {
        tb_buf_puts(&l->out, "\n");
        tb_llm_send(l);
    }
}

static const struct tb_llm_face FACE = {.stream_type = "application/x-ndjson",
                                        .decode = decode,
                                        .refuse = refuse,
                                        .broken = broken,
                                        .more = more,
                                        .answer = answer};

static void generate(struct tb_api *a, struct tb_http_request *req, const struct tb_route_match *m)
{
    (void)m;
    tb_llm_begin(a, req, &FACE, GENERATE);
}

static void chat(struct tb_api *a, struct tb_http_request *req, const struct tb_route_match *m)
{
    (void)m;
    tb_llm_begin(a, req, &FACE, CHAT);
}

/* ---- models */

static void put_details(struct tb_json_out *j, const struct tb_llm_name *m)
{
    tb_jout_object(j, "details");
    tb_jout_str(j, "parent_model", m->is_checkpoint ? m->base->name : "");
    tb_jout_str(j, "format", "safetensors");
    tb_jout_str(j, "family", m->base->arch);
    tb_jout_array(j, "families");
    tb_jout_str(j, NULL, m->base->arch);
    tb_jout_array_end(j);
    tb_jout_str(j, "parameter_size", "");
    tb_jout_str(j, "quantization_level", "");
    tb_jout_object_end(j);
}

static void put_model(struct tb_json_out *j, const struct tb_llm_name *m)
{
    tb_jout_object(j, NULL);
    tb_jout_str(j, "name", m->name);
    tb_jout_str(j, "model", m->name);
    put_time(j, "modified_at", m->time_us);
    tb_jout_int(j, "size", m->size_bytes);
    tb_jout_str(j, "digest", "");
    put_details(j, m);
}

static void answer_models(struct tb_http_request *req, const struct tb_error *err,
                          const struct tb_llm_name *names, size_t n, bool running)
{
    struct tb_buf b;
    struct tb_json_out j;
    if (err->code) {
        refuse(req, err);
        return;
    }
    tb_api_answer_begin(&b, &j);
    tb_jout_array(&j, "models");
    for (size_t i = 0; i < n; i++) {
        if (running && names[i].is_checkpoint) continue;
        put_model(&j, &names[i]);
        if (running) {
            put_time(&j, "expires_at", tb_clock_wall_us() + 86400LL * 365 * 1000000);
            tb_jout_int(&j, "size_vram", 0);
        }
        tb_jout_object_end(&j);
    }
    tb_jout_array_end(&j);
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}

static void on_tags(struct tb_api *a, struct tb_http_request *req, const struct tb_error *err,
                    const struct tb_llm_name *names, size_t n)
{
    (void)a;
    answer_models(req, err, names, n, false);
}

static void on_ps(struct tb_api *a, struct tb_http_request *req, const struct tb_error *err,
                  const struct tb_llm_name *names, size_t n)
{
    (void)a;
    answer_models(req, err, names, n, true);
}

static void tags(struct tb_api *a, struct tb_http_request *req, const struct tb_route_match *m)
{
    (void)m;
    tb_llm_list(a, req, on_tags);
}

static void ps(struct tb_api *a, struct tb_http_request *req, const struct tb_route_match *m)
{
    (void)m;
    tb_llm_list(a, req, on_ps);
}

static void on_show(struct tb_api *a, struct tb_http_request *req, const struct tb_error *err,
                    const struct tb_llm_name *m, size_t n)
{
    struct tb_buf b;
    struct tb_json_out j;
    (void)n;
    if (err->code) {
        refuse(req, err);
        return;
    }
    const struct tb_llm_model *served = tb_llm_model_find(a, m->base->name);
    const struct tb_renderer *r = tb_llm_model_renderer(served);
    tb_api_answer_begin(&b, &j);
    tb_jout_str(&j, "modelfile", "");
    tb_jout_str(&j, "parameters", "");
    tb_jout_str(&j, "template", r ? tb_renderer_name(r) : "");
    put_details(&j, m);
    tb_jout_object(&j, "model_info");
    tb_jout_str(&j, "general.architecture", m->base->arch);
    tb_jout_int(&j, tb_arena_printf(&req->arena, "%s.context_length", m->base->arch),
                m->base->max_context);
    tb_jout_int(&j, tb_arena_printf(&req->arena, "%s.vocab_size", m->base->arch), m->base->vocab);
    tb_jout_object_end(&j);
    tb_jout_array(&j, "capabilities");
    tb_jout_str(&j, NULL, "completion");
    tb_jout_array_end(&j);
    put_time(&j, "modified_at", m->time_us);
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}

static void show(struct tb_api *a, struct tb_http_request *req, const struct tb_route_match *m)
{
    struct tb_json_doc doc;
    struct tb_error e = {0};
    const char *name = NULL;
    (void)m;
    int rc = tb_api_body_parse(req, false, &doc, &e);
    if (rc == 0) rc = tb_json_string(&doc.root, "model", false, &req->arena, 4096, &name, &e);
    if (rc == 0 && !name) /* before 0.2 */
        rc = tb_json_string(&doc.root, "name", false, &req->arena, 4096, &name, &e);
    if (rc == 0 && !name) rc = tb_error_set(&e, TB_EINVAL, "model: required, but absent");
    tb_json_free(&doc);
    if (rc)
        refuse(req, &e);
    else
        tb_llm_list_one(a, req, name, on_show);
}

static void version(struct tb_api *a, struct tb_http_request *req, const struct tb_route_match *m)
{
    static const char body[] = "{\"version\":\"" VERSION "\"}";
    (void)a;
    (void)m;
    tb_http_respond(req, 200, "application/json", body, sizeof(body) - 1, NULL, 0);
}

static const struct tb_route ROUTES[] = {
    {.method = TB_HTTP_POST, .pattern = "/api/generate", .handle = generate},
    {.method = TB_HTTP_POST, .pattern = "/api/chat", .handle = chat},
    {.method = TB_HTTP_POST, .pattern = "/api/show", .handle = show},
    {.method = TB_HTTP_GET, .pattern = "/api/tags", .handle = tags},
    {.method = TB_HTTP_GET, .pattern = "/api/ps", .handle = ps},
    {.method = TB_HTTP_GET, .pattern = "/api/version", .handle = version, .open = true},
};

const struct tb_face tb_face_ollama = {
    .name = "ollama", .routes = ROUTES, .n_routes = TB_ARRAY_LEN(ROUTES), .error = refuse};
