/*
 * The llama.cpp face: /completion, /tokenize, /detokenize, /health, /props. Thread: the loop's,
 * decoding in the pool.
 */
#include <jansson.h>
#include <string.h>

#include "api/llm/llm.h"
#include "util/clock.h"
#include "util/mem.h"

enum kind { COMPLETION, TOKENIZE, DETOKENIZE };

struct own {
    bool return_tokens;
    int n_probs;
};

/* ---- errors: {"error": {code, message, type}} */

static void put_error(struct tb_json_out *j, const struct tb_error *e)
{
    int status = tb_error_status(e->code);
    tb_jout_object(j, "error");
    tb_jout_int(j, "code", status);
    tb_jout_str(j, "message", e->msg);
    tb_jout_str(j, "type",
                status == 404   ? "not_found_error"
                : status == 401 ? "authentication_error"
                : status == 503 ? "unavailable_error"
                : status >= 500 ? "server_error"
                                : "invalid_request_error");
    tb_jout_object_end(j);
}

static void refuse(struct tb_http_request *req, const struct tb_error *e)
{
    struct tb_buf b;
    struct tb_json_out j;
    tb_api_answer_begin(&b, &j);
    put_error(&j, e);
    tb_jout_object_end(&j);
    tb_api_answer(req, tb_error_status(e->code), &b);
}

static void event_begin(struct tb_llm *l, struct tb_json_out *j)
{
    tb_buf_puts(&l->out, "data: ");
    tb_jout_init(j, &l->out);
    tb_jout_object(j, NULL);
}

static void event_end(struct tb_llm *l, struct tb_json_out *j)
{
    tb_jout_object_end(j);
    tb_buf_puts(&l->out, "\n\n");
    tb_llm_send(l);
}

static void broken(struct tb_llm *l, const struct tb_error *e)
{
    struct tb_json_out j;
    event_begin(l, &j);
    put_error(&j, e);
    event_end(l, &j);
}

/* ---- decoding */

/* Text, tokens, or both mixed: ["text", 12, 34]. */
static int decode_prompt(struct tb_llm *l, const struct tb_json *v, struct tb_llm_prompt *p,
                         struct tb_error *err)
{
    if (tb_json_is_string(v)) return tb_llm_span(&l->arena, v, &p->text, err);
    if (!tb_json_is_array(v) || tb_json_len(v) == 0)
        return tb_json_fail(v, err, TB_EINVAL, "is neither a string nor a list of tokens");
    int32_t *ids;
    size_t n;
    int rc = tb_json_as_i32s(v, &l->arena, 0, INT32_MAX, &ids, &n, err);
    if (rc) return rc;
    p->tokens = ids;
    p->n_tokens = (int32_t)n;
    return 0;
}

static int decode_prompts(struct tb_llm *l, const struct tb_json *root, struct tb_error *err)
{
    struct tb_json v, one;
    if (!tb_json_find(root, "prompt", &v))
        return tb_error_set(err, TB_EINVAL, "prompt: required, but absent");
    tb_json_at(&v, 0, &one);
    bool many = tb_json_is_array(&v) && !tb_json_is_number(&one);
    size_t n = many ? tb_json_len(&v) : 1;
    if (n == 0 || n > TB_LLM_MAX_PROMPTS)
        return tb_json_fail(&v, err, TB_EINVAL, "%zu prompts are not in 1..%d", n,
                            TB_LLM_MAX_PROMPTS);
    l->n_prompts = (int)n;
    l->prompts = tb_arena_calloc(&l->arena, n, sizeof(*l->prompts));
    for (size_t i = 0; i < n; i++) {
        if (many)
            tb_json_at(&v, i, &one);
        else
            one = v;
        int rc = decode_prompt(l, &one, &l->prompts[i], err);
        if (rc) return rc;
    }
    if (n > 1 && l->stream)
        return tb_json_fail(&v, err, TB_EUNSUPPORTED, "a stream has one prompt");
    return 0;
}

static int decode(struct tb_llm *l, const struct tb_json *root, struct tb_error *err)
{
    static const char *const unserved[] = {"grammar",         "mirostat",
                                           "dry_multiplier",  "xtc_probability",
                                           "image_data",      "lora",
                                           "dynatemp_range",  "input_prefix",
                                           "input_suffix",    "t_max_predict_ms",
                                           "n_indent",        "logit_bias",
                                           "samplers",        "min_keep",
                                           "response_fields", "post_sampling_probs"};
    struct own *own = l->face_own = tb_arena_calloc(&l->arena, 1, sizeof(*own));
    struct tb_sample *s = &l->sample;
    struct tb_json schema;
    int64_t seed = -1;
    int32_t predict = -1, last_n = 64, n_probs = 0;
    float typical = 1;
    const char *text;
    int rc;
    s->temperature = 0.8f;
    s->top_k = 40;
    s->top_p = 0.95f;
    s->min_p = 0.05f;
    if ((rc = tb_json_string(root, "model", false, &l->arena, 4096, &l->model_name, err)) ||
        (rc = tb_json_bool(root, "stream", false, &l->stream, err)) ||
        (rc = decode_prompts(l, root, err)) ||
        (rc = tb_llm_int32(root, "max_tokens", -1, INT32_MAX, &predict, err)) ||
        (rc = tb_llm_int32(root, "n_predict", -2, INT32_MAX, &predict, err)) ||
        (rc = tb_llm_float(root, "temperature", 0, 100, &s->temperature, err)) ||
        (rc = tb_llm_int32(root, "top_k", -1, INT32_MAX, &s->top_k, err)) ||
        (rc = tb_llm_float(root, "top_p", 0, 1, &s->top_p, err)) ||
        (rc = tb_llm_float(root, "min_p", 0, 1, &s->min_p, err)) ||
        (rc = tb_llm_float(root, "typical_p", 0, 1, &typical, err)) ||
        (rc = tb_llm_float(root, "repeat_penalty", 0.01, 100, &s->repetition_penalty, err)) ||
        (rc = tb_llm_int32(root, "repeat_last_n", -1, INT32_MAX, &last_n, err)) ||
        (rc = tb_llm_float(root, "presence_penalty", -2, 2, &s->presence_penalty, err)) ||
        (rc = tb_llm_float(root, "frequency_penalty", -2, 2, &s->frequency_penalty, err)) ||
        (rc = tb_json_int(root, "seed", false, INT64_MIN, INT64_MAX, &seed, err)) ||
        (rc = tb_llm_int32(root, "n_probs", 0, 100, &n_probs, err)) ||
        (rc = tb_json_bool(root, "return_tokens", false, &own->return_tokens, err)) ||
        (rc = tb_json_bool(root, "ignore_eos", false, &s->ignore_eos, err)) ||
        (rc = tb_llm_stops(l, root, "stop", TB_MAX_STOPS, err)) ||
        (rc = tb_json_object(root, "json_schema", false, &schema, err)) ||
        (rc = tb_llm_refuse(root, unserved, TB_ARRAY_LEN(unserved), err)))
        return rc;
    if (typical < 1) return tb_error_set(err, TB_EUNSUPPORTED, "typical_p: is not served here");
    if (schema.v) {
        if ((rc = tb_json_as_text(&schema, &l->arena, 1 << 20, &text, err))) return rc;
        l->schema = tb_span_str(text);
    }
    l->top_logprobs = own->n_probs = n_probs;
    if (s->top_k == 0) s->top_k = -1;
    if (s->top_p <= 0) s->top_p = 1;
    if (predict == 0) return tb_error_set(err, TB_EUNSUPPORTED, "n_predict: 0 samples nothing");
    s->max_tokens = predict > 0 ? predict : -1;
    s->repetition_last_n = TB_MAX(last_n, 0);
    if (last_n == 0) s->repetition_penalty = 0;
    s->has_seed = seed >= 0; /* -1: any */
    s->seed = (uint64_t)seed;
    return 0;
}

/* ---- encoding */

static void put_probs(struct tb_json_out *j, const struct tb_llm *l, const struct tb_llm_choice *c,
                      int32_t from)
{
    if (l->top_logprobs)
        tb_llm_put_logprobs(j, "completion_probabilities", l, c, from,
                            TB_LLM_TOKEN_ID | TB_LLM_TOKEN_BYTES);
}

static void put_tokens(struct tb_json_out *j, const struct tb_llm *l, const struct tb_llm_choice *c,
                       int32_t from)
{
    const struct own *own = l->face_own;
    tb_jout_array(j, "tokens");
    for (int32_t i = from; (own->return_tokens || l->stream) && i < c->n; i++)
        tb_jout_int(j, NULL, c->tokens[i]);
    tb_jout_array_end(j);
}

static void put_rate(struct tb_json_out *j, const char *what, int64_t n, uint64_t ns)
{
    char key[32];
    double ms = (double)ns / 1e6;
    snprintf(key, sizeof(key), "%s_n", what);
    tb_jout_int(j, key, n);
    snprintf(key, sizeof(key), "%s_ms", what);
    tb_jout_double(j, key, ms);
    snprintf(key, sizeof(key), "%s_per_second", what);
    tb_jout_double(j, key, ms > 0 ? (double)n * 1e3 / ms : 0);
}

static void put_settings(struct tb_json_out *j, const struct tb_llm *l)
{
    const struct tb_sample *s = &l->sample;
    tb_jout_object(j, "generation_settings");
    tb_jout_int(j, "n_predict", s->max_tokens);
    tb_jout_f32(j, "temperature", s->temperature);
    tb_jout_int(j, "top_k", s->top_k);
    tb_jout_f32(j, "top_p", s->top_p);
    tb_jout_f32(j, "min_p", s->min_p);
    tb_jout_array(j, "stop");
    for (size_t i = 0; i < l->n_stops; i++)
        tb_jout_str(j, NULL, l->stops[i]);
    tb_jout_array_end(j);
    tb_jout_object_end(j);
}

/* All of a choice, or what ends its stream. */
static void put_choice(struct tb_json_out *j, struct tb_llm *l, struct tb_llm_choice *c)
{
    const struct tb_llm_prompt *p = &l->prompts[c->prompt];
    uint64_t first = l->first_ns ? l->first_ns : l->ended_ns;
    int hit = c->text.stop.hit;
    tb_jout_int(j, "index", c->index);
    tb_jout_strn(j, "content", c->whole.p, l->stream ? 0 : c->whole.n);
    put_tokens(j, l, c, l->stream ? c->n : 0);
    tb_jout_int(j, "id_slot", 0);
    tb_jout_bool(j, "stop", true);
    tb_jout_str(j, "model", l->model_name ? l->model_name : tb_llm_model_info(l->model)->name);
    tb_jout_int(j, "tokens_predicted", c->n);
    tb_jout_int(j, "tokens_evaluated", p->n_tokens);
    put_settings(j, l);
    if (p->text.p)
        tb_jout_strn(j, "prompt", p->text.p, p->text.n);
    else
        tb_jout_i32s(j, "prompt", p->tokens, (size_t)p->n_tokens);
    tb_jout_bool(j, "has_new_line", memchr(c->whole.p, '\n', c->whole.n) != NULL);
    tb_jout_bool(j, "truncated", false);
    tb_jout_str(j, "stop_type", hit >= 0 ? "word" : c->stopped ? "eos" : "limit");
    tb_jout_str(j, "stopping_word", hit >= 0 ? l->stops[hit] : "");
    tb_jout_int(j, "tokens_cached", p->n_cached);
    tb_jout_object(j, "timings");
    put_rate(j, "prompt", p->n_tokens, first - l->submitted_ns);
    put_rate(j, "predicted", c->n, l->ended_ns - first);
    tb_jout_object_end(j);
    if (!l->stream) put_probs(j, l, c, 0);
}

static void more(struct tb_llm *l, struct tb_llm_choice *c)
{
    struct tb_json_out j;
    if (c->whole.n == c->told && c->n == c->n_told) return;
    event_begin(l, &j);
    tb_jout_int(&j, "index", c->index);
    tb_jout_strn(&j, "content", c->whole.p + c->told, c->whole.n - c->told);
    put_tokens(&j, l, c, c->n_told);
    tb_jout_bool(&j, "stop", false);
    put_probs(&j, l, c, c->n_told);
    event_end(l, &j);
}

static void answer(struct tb_llm *l)
{
    struct tb_json_out j;
    if (l->stream) {
        event_begin(l, &j);
        put_choice(&j, l, l->choices);
        event_end(l, &j);
        return;
    }
    tb_jout_init(&j, &l->out);
    if (l->n_prompts > 1) tb_jout_array(&j, NULL);
    for (int i = 0; i < l->n_choices; i++) {
        tb_jout_object(&j, NULL);
        put_choice(&j, l, &l->choices[i]);
        tb_jout_object_end(&j);
    }
    if (l->n_prompts > 1) tb_jout_array_end(&j);
}

static const struct tb_llm_face FACE = {.stream_type = "text/event-stream",
                                        .decode = decode,
                                        .refuse = refuse,
                                        .broken = broken,
                                        .more = more,
                                        .answer = answer};

static void completion(struct tb_api *a, struct tb_http_request *req,
                       const struct tb_route_match *m)
{
    (void)m;
    tb_llm_begin(a, req, &FACE, COMPLETION);
}

/* ---- /tokenize, /detokenize: nothing is sampled */

struct text_job {
    struct tb_span content;
    bool add_special, parse_special, with_pieces;
    int32_t *ids;
    size_t n;
};

static int decode_text_job(struct tb_llm *l, const struct tb_json *root, struct tb_error *err)
{
    struct text_job *x = l->face_own = tb_arena_calloc(&l->arena, 1, sizeof(*x));
    struct tb_json v;
    int rc = tb_json_string(root, "model", false, &l->arena, 4096, &l->model_name, err);
    if (rc) return rc;
    if (l->kind == DETOKENIZE) {
        rc = tb_json_array(root, "tokens", true, &v, err);
        return rc ? rc : tb_json_as_i32s(&v, &l->arena, 0, INT32_MAX, &x->ids, &x->n, err);
    }
    x->parse_special = true;
    if ((rc = tb_json_bool(root, "add_special", false, &x->add_special, err)) ||
        (rc = tb_json_bool(root, "parse_special", false, &x->parse_special, err)) ||
        (rc = tb_json_bool(root, "with_pieces", false, &x->with_pieces, err)))
        return rc;
    if (!tb_json_find(root, "content", &v))
        return tb_error_set(err, TB_EINVAL, "content: required, but absent");
    return tb_llm_span(&l->arena, &v, &x->content, err);
}

/* [{id, piece}]; a piece that is no text is a list of bytes. */
static void put_pieces(struct tb_json_out *j, const struct tb_ids *ids,
                       const struct tb_tokenizer *t)
{
    tb_jout_array(j, "tokens");
    for (size_t i = 0; i < ids->n; i++) {
        struct tb_span s;
        tb_tokenizer_token_bytes(t, ids->p[i], &s);
        tb_jout_object(j, NULL);
        tb_jout_int(j, "id", ids->p[i]);
        if (tb_utf8_valid(s.p, s.n))
            tb_jout_strn(j, "piece", s.p, s.n);
        else
            tb_llm_put_bytes(j, "piece", s);
        tb_jout_object_end(j);
    }
    tb_jout_array_end(j);
}

static int put_ids(struct tb_json_out *j, const struct text_job *x, const struct tb_tokenizer *t,
                   struct tb_error *err)
{
    struct tb_ids ids;
    unsigned flags =
        (x->add_special ? TB_ENCODE_TEMPLATE : 0) | (x->parse_special ? 0 : TB_ENCODE_PLAIN);
    tb_ids_init(&ids);
    int rc = tb_tokenizer_encode(t, x->content, flags, &ids, err);
    if (rc == 0 && x->with_pieces)
        put_pieces(j, &ids, t);
    else if (rc == 0)
        tb_jout_i32s(j, "tokens", ids.p, ids.n);
    tb_ids_fini(&ids);
    return rc;
}

static int put_content(struct tb_json_out *j, const struct text_job *x,
                       const struct tb_tokenizer *t, struct tb_error *err)
{
    struct tb_span s;
    struct tb_buf text;
    for (size_t i = 0; i < x->n; i++)
        if (tb_tokenizer_token_bytes(t, x->ids[i], &s))
            return tb_error_set(err, TB_EINVAL, "tokens[%zu]: %d is no token", i, (int)x->ids[i]);
    tb_buf_init(&text, TB_API_MAX_ANSWER);
    int rc = tb_tokenizer_decode(t, x->ids, x->n, 0, &text);
    if (rc)
        tb_error_set(err, rc, "the text does not fit into memory");
    else
        tb_jout_strn(j, "content", text.n ? text.p : "", text.n);
    tb_buf_fini(&text);
    return rc;
}

static int do_text_job(struct tb_llm *l, struct tb_error *err)
{
    const struct tb_tokenizer *t = tb_llm_model_info(l->model)->text;
    struct tb_json_out j;
    tb_jout_init(&j, &l->out);
    tb_jout_object(&j, NULL);
    int rc = l->kind == DETOKENIZE ? put_content(&j, l->face_own, t, err)
                                   : put_ids(&j, l->face_own, t, err);
    tb_jout_object_end(&j);
    return rc;
}

static const struct tb_llm_face TEXT_FACE = {
    .decode = decode_text_job, .prepare = do_text_job, .refuse = refuse};

static void tokenize(struct tb_api *a, struct tb_http_request *req, const struct tb_route_match *m)
{
    (void)m;
    tb_llm_begin(a, req, &TEXT_FACE, TOKENIZE);
}

static void detokenize(struct tb_api *a, struct tb_http_request *req,
                       const struct tb_route_match *m)
{
    (void)m;
    tb_llm_begin(a, req, &TEXT_FACE, DETOKENIZE);
}

/* ---- the rest */

static void health(struct tb_api *a, struct tb_http_request *req, const struct tb_route_match *m)
{
    static const char body[] = "{\"status\":\"ok\"}";
    (void)a;
    (void)m;
    tb_http_respond(req, 200, "application/json", body, sizeof(body) - 1, NULL, 0);
}

static void props(struct tb_api *a, struct tb_http_request *req, const struct tb_route_match *m)
{
    const struct tb_llm_model *model = tb_llm_model_at(a, 0);
    struct tb_buf b;
    struct tb_json_out j;
    (void)m;
    tb_api_answer_begin(&b, &j);
    tb_jout_object(&j, "default_generation_settings");
    tb_jout_int(&j, "n_ctx", model ? tb_llm_model_info(model)->max_context : 0);
    tb_jout_object_end(&j);
    tb_jout_int(&j, "total_slots", 1);
    tb_jout_str(&j, "model_path", model ? tb_llm_model_info(model)->name : "");
    tb_jout_str(&j, "chat_template",
                model && tb_llm_model_renderer(model)
                    ? tb_renderer_name(tb_llm_model_renderer(model))
                    : "");
    tb_jout_str(&j, "build_info", tb_api_options_get(a)->version);
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}

static const struct tb_route ROUTES[] = {
    {.method = TB_HTTP_POST, .pattern = "/completion", .handle = completion},
    {.method = TB_HTTP_POST, .pattern = "/completions", .handle = completion},
    {.method = TB_HTTP_POST, .pattern = "/tokenize", .handle = tokenize},
    {.method = TB_HTTP_POST, .pattern = "/detokenize", .handle = detokenize},
    {.method = TB_HTTP_GET, .pattern = "/health", .handle = health, .open = true},
    {.method = TB_HTTP_GET, .pattern = "/v1/health", .handle = health, .open = true},
    {.method = TB_HTTP_GET, .pattern = "/props", .handle = props},
};

const struct tb_face tb_face_llamacpp = {
    .name = "llama.cpp", .routes = ROUTES, .n_routes = TB_ARRAY_LEN(ROUTES), .error = refuse};
