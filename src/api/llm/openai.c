/*
 * The OpenAI face: /v1/models, /v1/completions, /v1/chat/completions. Thread: the loop's, decoding
 * in the pool.
 */
#include <jansson.h>
#include <math.h>
#include <string.h>

#include "api/llm/llm.h"
#include "util/mem.h"

enum kind { CHAT, TEXT };

struct own {
    bool include_usage;
};

/* ---- errors: {"error": {message, type, param, code}} */

static void put_error(struct tb_json_out *j, const struct tb_error *e)
{
    int status = tb_error_status(e->code);
    const char *type = status == 429   ? "rate_limit_error"
                       : status >= 500 ? "server_error"
                       : status == 401 ? "authentication_error"
                                       : "invalid_request_error";
    const char *colon = strchr(e->msg, ':');
    size_t n = colon ? (size_t)(colon - e->msg) : 0;
    bool field = n && strcspn(e->msg, " ") > n; /* "max_tokens: 0 is not in ..." names a field */
    tb_jout_object(j, "error");
    tb_jout_str(j, "message", e->msg);
    tb_jout_str(j, "type", type);
    if (field)
        tb_jout_strn(j, "param", e->msg, n);
    else
        tb_jout_null(j, "param");
    if (e->code == TB_ENOTFOUND)
        tb_jout_str(j, "code", "model_not_found");
    else if (e->code == TB_ETOOBIG)
        tb_jout_str(j, "code", "context_length_exceeded");
    else
        tb_jout_null(j, "code");
    tb_jout_object_end(j);
}

static void refuse(struct tb_http_request *req, const struct tb_error *e)
{
    struct tb_buf b;
    struct tb_json_out j;
    int status = e->code == TB_ETOOBIG ? 400 : tb_error_status(e->code);
    tb_api_answer_begin(&b, &j);
    put_error(&j, e);
    tb_jout_object_end(&j);
    tb_api_answer(req, status, &b);
}

static void broken(struct tb_llm *l, const struct tb_error *e)
{
    struct tb_json_out j;
    tb_buf_puts(&l->out, "data: ");
    tb_jout_init(&j, &l->out);
    tb_jout_object(&j, NULL);
    put_error(&j, e);
    tb_jout_object_end(&j);
    tb_buf_puts(&l->out, "\n\n");
    tb_llm_send(l);
}

/* ---- decoding */

static int decode_format(struct tb_llm *l, const struct tb_json *root, struct tb_error *err)
{
    struct tb_json format, named, schema;
    const char *type = NULL;
    int rc = tb_json_object(root, "response_format", false, &format, err);
    if (rc || !format.v) return rc;
    if ((rc = tb_json_string(&format, "type", true, &l->arena, 64, &type, err))) return rc;
    if (strcmp(type, "text") == 0) return 0;
    if (strcmp(type, "json_object") == 0) {
        l->json = true;
        return 0;
    }
    if (strcmp(type, "json_schema") != 0)
        return tb_json_fail(&format, err, TB_EINVAL,
                            "type \"%s\" is none of text, json_object and json_schema", type);
    if ((rc = tb_json_object(&format, "json_schema", true, &named, err)) ||
        (rc = tb_json_object(&named, "schema", true, &schema, err)) ||
        (rc = tb_json_as_text(&schema, &l->arena, 1 << 20, &type, err)))
        return rc;
    l->schema = tb_span_str(type);
    return 0;
}

static int decode_thinking(struct tb_llm *l, const struct tb_json *root, struct tb_error *err)
{
    struct tb_json kwargs;
    const char *effort = NULL;
    bool on = true;
    int rc = tb_json_object(root, "chat_template_kwargs", false, &kwargs, err);
    if (rc == 0 && kwargs.v) rc = tb_json_bool(&kwargs, "enable_thinking", false, &on, err);
    if (rc == 0) rc = tb_json_string(root, "reasoning_effort", false, &l->arena, 32, &effort, err);
    l->no_thinking = !on || (effort && strcmp(effort, "none") == 0);
    return rc;
}

static int decode_chat(struct tb_llm *l, const struct tb_json *root, struct tb_error *err)
{
    struct tb_json messages;
    int32_t top = 0;
    int rc = tb_json_array(root, "messages", true, &messages, err);
    if (rc) return rc;
    l->prompts = tb_arena_calloc(&l->arena, 1, sizeof(*l->prompts));
    l->n_prompts = 1;
    if ((rc = tb_llm_messages(&l->arena, &messages, &l->prompts->messages, &l->prompts->n_messages,
                              err)) ||
        (rc = tb_json_bool(root, "logprobs", false, &l->logprobs, err)) ||
        (rc = tb_llm_int32(root, "top_logprobs", 0, 20, &top, err)) ||
        (rc = decode_thinking(l, root, err)))
        return rc;
    if (top && !l->logprobs)
        return tb_error_set(err, TB_EINVAL, "top_logprobs: %d needs logprobs: true", (int)top);
    l->top_logprobs = top;
    if ((rc = tb_llm_int32(root, "max_tokens", 1, INT32_MAX, &l->sample.max_tokens, err)))
        return rc;
    return tb_llm_int32(root, "max_completion_tokens", 1, INT32_MAX, &l->sample.max_tokens, err);
}

static int decode_prompt(struct tb_llm *l, const struct tb_json *v, struct tb_llm_prompt *p,
                         struct tb_error *err)
{
    size_t n = 0;
    if (tb_json_is_string(v)) return tb_llm_span(&l->arena, v, &p->text, err);
    if (!tb_json_is_array(v))
        return tb_json_fail(v, err, TB_EINVAL, "is neither a string nor a list of tokens");
    int32_t *ids;
    int rc = tb_json_as_i32s(v, &l->arena, 0, INT32_MAX, &ids, &n, err);
    if (rc) return rc;
    if (n == 0) return tb_json_fail(v, err, TB_EINVAL, "is empty");
    p->tokens = ids;
    p->n_tokens = (int32_t)n;
    return 0;
}

static int decode_text(struct tb_llm *l, const struct tb_json *root, struct tb_error *err)
{
    static const char *const unserved[] = {"suffix"};
    struct tb_json prompt, one;
    int32_t logprobs = -1, best_of = 0;
    int rc;
    l->sample.max_tokens = 16;
    if ((rc = tb_llm_int32(root, "max_tokens", 0, INT32_MAX, &l->sample.max_tokens, err)) ||
        (rc = tb_llm_int32(root, "logprobs", 0, 20, &logprobs, err)) ||
        (rc = tb_llm_int32(root, "best_of", 1, TB_MAX_SAMPLES, &best_of, err)) ||
        (rc = tb_json_bool(root, "echo", false, &l->echo, err)) ||
        (rc = tb_llm_refuse(root, unserved, TB_ARRAY_LEN(unserved), err)))
        return rc;
    l->logprobs = logprobs >= 0;
    l->top_logprobs = TB_MAX(logprobs, 0);
    if (best_of && best_of != l->n)
        return tb_error_set(err, TB_EUNSUPPORTED,
                            "best_of: %d is not n (%d); all samples are given", (int)best_of, l->n);
    if (l->sample.max_tokens == 0 && !l->echo)
        return tb_error_set(err, TB_EINVAL, "max_tokens: 0 is for echo: true only");
    if (!tb_json_find(root, "prompt", &prompt))
        return tb_error_set(err, TB_EINVAL, "prompt: required, but absent");
    bool many = tb_json_is_array(&prompt);
    if (many) {
        tb_json_at(&prompt, 0, &one);
        many = !tb_json_is_number(&one);
    }
    l->n_prompts = many ? (int)TB_MIN(tb_json_len(&prompt), (size_t)INT32_MAX) : 1;
    if (l->n_prompts == 0 || l->n_prompts > TB_LLM_MAX_PROMPTS)
        return tb_json_fail(&prompt, err, TB_EINVAL, "%d prompts are not in 1..%d", l->n_prompts,
                            TB_LLM_MAX_PROMPTS);
    l->prompts = tb_arena_calloc(&l->arena, (size_t)l->n_prompts, sizeof(*l->prompts));
    for (int i = 0; i < l->n_prompts; i++) {
        if (many)
            tb_json_at(&prompt, (size_t)i, &one);
        else
            one = prompt;
        if ((rc = decode_prompt(l, &one, &l->prompts[i], err))) return rc;
    }
    return 0;
}

static int decode(struct tb_llm *l, const struct tb_json *root, struct tb_error *err)
{
    static const char *const unserved[] = {"tools",      "functions",  "audio",
                                           "modalities", "prediction", "web_search_options"};
    struct own *own = l->face_own = tb_arena_calloc(&l->arena, 1, sizeof(*own));
    struct tb_sample *s = &l->sample;
    struct tb_json options;
    int64_t seed = 0;
    int rc;
    if ((rc = tb_json_string(root, "model", true, &l->arena, 4096, &l->model_name, err)) ||
        (rc = tb_llm_int32(root, "n", 1, TB_MAX_SAMPLES, &l->n, err)) ||
        (rc = l->kind == CHAT ? decode_chat(l, root, err) : decode_text(l, root, err)) ||
        (rc = tb_llm_float(root, "temperature", 0, 2, &s->temperature, err)) ||
        (rc = tb_llm_float(root, "top_p", 0, 1, &s->top_p, err)) ||
        (rc = tb_llm_int32(root, "top_k", -1, INT32_MAX, &s->top_k, err)) ||
        (rc = tb_llm_float(root, "min_p", 0, 1, &s->min_p, err)) ||
        (rc = tb_llm_float(root, "presence_penalty", -2, 2, &s->presence_penalty, err)) ||
        (rc = tb_llm_float(root, "frequency_penalty", -2, 2, &s->frequency_penalty, err)) ||
        (rc = tb_llm_float(root, "repetition_penalty", 0.01, 100, &s->repetition_penalty, err)) ||
        (rc = tb_json_int(root, "seed", false, INT64_MIN, INT64_MAX, &seed, err)) ||
        (rc = tb_json_bool(root, "stream", false, &l->stream, err)) ||
        (rc = tb_json_bool(root, "ignore_eos", false, &s->ignore_eos, err)) ||
        (rc = tb_json_object(root, "stream_options", false, &options, err)) ||
        (rc = tb_llm_stops(l, root, "stop", 16, err)) ||
        (rc = tb_llm_logit_bias(l, root, "logit_bias", err)) ||
        (rc = decode_format(l, root, err)) ||
        (rc = tb_llm_refuse(root, unserved, TB_ARRAY_LEN(unserved), err)))
        return rc;
    if (s->top_p <= 0) return tb_error_set(err, TB_EINVAL, "top_p: 0 is not greater than 0");
    if (s->top_k == 0) s->top_k = -1;
    s->has_seed = tb_json_find(root, "seed", &(struct tb_json){0});
    s->seed = (uint64_t)seed;
    if (options.v &&
        (rc = tb_json_bool(&options, "include_usage", false, &own->include_usage, err)))
        return rc;
    if (l->stream && l->echo)
        return tb_error_set(err, TB_EUNSUPPORTED, "echo: is not served in a stream");
    return 0;
}

/* ---- encoding */

/* "logprobs" of a chat's tokens from .. c->n */
static void put_chat_logprobs(struct tb_json_out *j, const struct tb_llm *l,
                              const struct tb_llm_choice *c, int32_t from)
{
    if (!l->logprobs) {
        tb_jout_null(j, "logprobs");
        return;
    }
    tb_jout_object(j, "logprobs");
    tb_llm_put_logprobs(j, "content", l, c, from, TB_LLM_TOKEN_BYTES | TB_LLM_TOKEN_TOPS);
    tb_jout_object_end(j);
}

struct run { /* tokens of a text completion: of the prompt, or sampled */
    int32_t n;
    const int32_t *tokens;
    const float *logprobs;
    const int32_t *topk_ids;
    const float *topk_logprobs;
};

static void put_tops(struct tb_json_out *j, const struct tb_llm *l, const struct run *r)
{
    size_t k = (size_t)l->top_logprobs;
    for (int32_t i = 0; i < r->n; i++) {
        if (isnan(r->logprobs[i]) || !r->topk_ids) {
            tb_jout_null(j, NULL);
            continue;
        }
        tb_jout_object(j, NULL);
        for (size_t t = 0; t < k; t++) {
            struct tb_span s = tb_llm_token_bytes(l, r->topk_ids[(size_t)i * k + t]);
            struct tb_buf key;
            tb_buf_init(&key, TB_API_MAX_ANSWER);
            tb_utf8_append(&key, s.p, s.n);
            tb_jout_f32(j, key.n ? key.p : "", r->topk_logprobs[(size_t)i * k + t]);
            tb_buf_fini(&key);
        }
        tb_jout_object_end(j);
    }
}

/* offset: characters of the tokens before. Returns it for those after. */
static size_t put_text_logprobs(struct tb_json_out *j, const struct tb_llm *l,
                                const struct run *runs, int n_runs, size_t offset)
{
    if (!l->logprobs) {
        tb_jout_null(j, "logprobs");
        return offset;
    }
    tb_jout_object(j, "logprobs");
    tb_jout_array(j, "tokens");
    for (int r = 0; r < n_runs; r++) {
        for (int32_t i = 0; i < runs[r].n; i++) {
            struct tb_span s = tb_llm_token_bytes(l, runs[r].tokens[i]);
            tb_jout_strn(j, NULL, s.p, s.n);
        }
    }
    tb_jout_array_end(j);
    tb_jout_array(j, "token_logprobs");
    for (int r = 0; r < n_runs; r++)
        for (int32_t i = 0; i < runs[r].n; i++)
            tb_jout_f32(j, NULL, runs[r].logprobs[i]); /* a prompt's first has none: null */
    tb_jout_array_end(j);
    if (l->top_logprobs) {
        tb_jout_array(j, "top_logprobs");
        for (int r = 0; r < n_runs; r++)
            put_tops(j, l, &runs[r]);
        tb_jout_array_end(j);
    } else {
        tb_jout_null(j, "top_logprobs");
    }
    tb_jout_array(j, "text_offset");
    for (int r = 0; r < n_runs; r++) {
        for (int32_t i = 0; i < runs[r].n; i++) {
            tb_jout_int(j, NULL, (int64_t)offset);
            struct tb_span s = tb_llm_token_bytes(l, runs[r].tokens[i]);
            offset += tb_utf8_characters(s.p, s.n);
        }
    }
    tb_jout_array_end(j);
    tb_jout_object_end(j);
    return offset;
}

static void put_usage(struct tb_json_out *j, const struct tb_llm *l)
{
    int64_t prompt = 0, sampled = 0, cached = 0;
    for (int i = 0; i < l->n_prompts; i++) {
        prompt += l->prompts[i].n_tokens;
        cached += l->prompts[i].n_cached;
    }
    for (int i = 0; i < l->n_choices; i++)
        sampled += l->choices[i].n;
    if (l->sample.max_tokens == 0) sampled = 0;
    tb_jout_object(j, "usage");
    tb_jout_int(j, "prompt_tokens", prompt);
    tb_jout_int(j, "completion_tokens", sampled);
    tb_jout_int(j, "total_tokens", prompt + sampled);
    tb_jout_object(j, "prompt_tokens_details");
    tb_jout_int(j, "cached_tokens", cached);
    tb_jout_object_end(j);
    tb_jout_object_end(j);
}

static void put_head(struct tb_json_out *j, struct tb_llm *l, bool chunk)
{
    bool chat = l->kind == CHAT;
    tb_jout_object(j, NULL);
    tb_jout_str(j, "id", tb_arena_printf(&l->arena, "%s-%s", chat ? "chatcmpl" : "cmpl", l->id));
    tb_jout_str(j, "object",
                !chat   ? "text_completion"
                : chunk ? "chat.completion.chunk"
                        : "chat.completion");
    tb_jout_int(j, "created", l->created);
    tb_jout_str(j, "model", l->model_name);
}

static void put_finish(struct tb_json_out *j, const struct tb_llm_choice *c)
{
    if (c->over)
        tb_jout_str(j, "finish_reason", c->stopped ? "stop" : "length");
    else
        tb_jout_null(j, "finish_reason");
}

/* ---- streams */

static void event_begin(struct tb_llm *l, struct tb_json_out *j)
{
    tb_buf_puts(&l->out, "data: ");
    tb_jout_init(j, &l->out);
    put_head(j, l, true);
}

static void event_end(struct tb_llm *l, struct tb_json_out *j)
{
    tb_jout_object_end(j);
    tb_buf_puts(&l->out, "\n\n");
}

/* One event; role: the first of a chat's choice, which has no text yet. */
static void put_event(struct tb_llm *l, struct tb_llm_choice *c, bool role, bool end)
{
    struct tb_json_out j;
    event_begin(l, &j);
    tb_jout_array(&j, "choices");
    tb_jout_object(&j, NULL);
    tb_jout_int(&j, "index", c->index);
    const char *text = c->whole.p + c->told;
    size_t n = role || end ? 0 : c->whole.n - c->told;
    if (l->kind == CHAT) {
        tb_jout_object(&j, "delta");
        if (role) tb_jout_str(&j, "role", "assistant");
        if (!end) tb_jout_strn(&j, "content", text, n);
        tb_jout_object_end(&j);
        if (!role && !end)
            put_chat_logprobs(&j, l, c, c->n_told);
        else
            tb_jout_null(&j, "logprobs");
    } else {
        int32_t from = end ? c->n : c->n_told;
        size_t k = (size_t)l->top_logprobs * (size_t)from;
        struct run run = {c->n - from, c->tokens + from, c->logprobs + from,
                          l->top_logprobs ? c->topk_ids + k : NULL,
                          l->top_logprobs ? c->topk_logprobs + k : NULL};
        tb_jout_strn(&j, "text", text, n);
        c->offset = put_text_logprobs(&j, l, &run, 1, c->offset);
    }
    if (end)
        put_finish(&j, c);
    else
        tb_jout_null(&j, "finish_reason");
    tb_jout_object_end(&j);
    tb_jout_array_end(&j);
    event_end(l, &j);
}

static void more(struct tb_llm *l, struct tb_llm_choice *c)
{
    if (!c->began && l->kind == CHAT) put_event(l, c, true, false);
    c->began = true;
    if (c->whole.n > c->told || (l->logprobs && c->n > c->n_told)) put_event(l, c, false, false);
    if (c->over) put_event(l, c, false, true);
    tb_llm_send(l);
}

static void end_stream(struct tb_llm *l)
{
    struct tb_json_out j;
    const struct own *own = l->face_own;
    if (own->include_usage) {
        event_begin(l, &j);
        tb_jout_array(&j, "choices");
        tb_jout_array_end(&j);
        put_usage(&j, l);
        event_end(l, &j);
    }
    tb_buf_puts(&l->out, "data: [DONE]\n\n");
    tb_llm_send(l);
}

/* ---- answers */

static void put_text_choice(struct tb_json_out *j, struct tb_llm *l, struct tb_llm_choice *c)
{
    struct tb_llm_prompt *p = &l->prompts[c->prompt];
    struct run runs[2] = {{p->n_tokens, p->tokens, p->logprobs, p->topk_ids, p->topk_logprobs},
                          {c->n, c->tokens, c->logprobs, c->topk_ids, c->topk_logprobs}};
    struct tb_buf text;
    tb_buf_init(&text, TB_API_MAX_ANSWER);
    if (l->echo && tb_tokenizer_decode(tb_llm_model_info(l->model)->text, p->tokens,
                                       (size_t)p->n_tokens, 0, &text))
        l->out.failed = true;      /* the answer as a whole */
    if (l->sample.max_tokens == 0) /* the prompt's scores only; what was sampled is not asked for */
        runs[1].n = 0;
    else
        tb_buf_append(&text, c->whole.p, c->whole.n);
    tb_jout_strn(j, "text", text.n ? text.p : "", text.n);
    tb_buf_fini(&text);
    put_text_logprobs(j, l, l->echo ? runs : runs + 1, l->echo ? 2 : 1, 0);
}

static void answer(struct tb_llm *l)
{
    struct tb_json_out j;
    if (l->stream) {
        end_stream(l);
        return;
    }
    tb_jout_init(&j, &l->out);
    put_head(&j, l, false);
    tb_jout_array(&j, "choices");
    for (int i = 0; i < l->n_choices; i++) {
        struct tb_llm_choice *c = &l->choices[i];
        tb_jout_object(&j, NULL);
        tb_jout_int(&j, "index", c->index);
        if (l->kind == CHAT) {
            tb_jout_object(&j, "message");
            tb_jout_str(&j, "role", "assistant");
            tb_jout_strn(&j, "content", c->whole.p, c->whole.n);
            tb_jout_null(&j, "refusal");
            tb_jout_object_end(&j);
            put_chat_logprobs(&j, l, c, 0);
        } else {
            put_text_choice(&j, l, c);
        }
        put_finish(&j, c);
        tb_jout_object_end(&j);
    }
    tb_jout_array_end(&j);
    put_usage(&j, l);
    tb_jout_object_end(&j);
}

static const struct tb_llm_face FACE = {.stream_type = "text/event-stream",
                                        .decode = decode,
                                        .refuse = refuse,
                                        .broken = broken,
                                        .more = more,
                                        .answer = answer};

static void chat(struct tb_api *a, struct tb_http_request *req, const struct tb_route_match *m)
{
    (void)m;
    tb_llm_begin(a, req, &FACE, CHAT);
}

static void text(struct tb_api *a, struct tb_http_request *req, const struct tb_route_match *m)
{
    (void)m;
    tb_llm_begin(a, req, &FACE, TEXT);
}

/* ---- models */

static void put_model(struct tb_json_out *j, const struct tb_llm_name *m)
{
    tb_jout_str(j, "id", m->name);
    tb_jout_str(j, "object", "model");
    tb_jout_int(j, "created", m->time_us / 1000000);
    tb_jout_str(j, "owned_by", m->is_checkpoint ? "user" : "tinkerbell");
    tb_jout_int(j, "max_model_len", m->base->max_context);
}

static void on_models(struct tb_api *a, struct tb_http_request *req, const struct tb_error *err,
                      const struct tb_llm_name *names, size_t n)
{
    struct tb_buf b;
    struct tb_json_out j;
    (void)a;
    if (err->code) {
        refuse(req, err);
        return;
    }
    tb_api_answer_begin(&b, &j);
    tb_jout_str(&j, "object", "list");
    tb_jout_array(&j, "data");
    for (size_t i = 0; i < n; i++) {
        tb_jout_object(&j, NULL);
        put_model(&j, &names[i]);
        tb_jout_object_end(&j);
    }
    tb_jout_array_end(&j);
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}

static void on_model(struct tb_api *a, struct tb_http_request *req, const struct tb_error *err,
                     const struct tb_llm_name *names, size_t n)
{
    struct tb_buf b;
    struct tb_json_out j;
    (void)a;
    (void)n;
    if (err->code) {
        refuse(req, err);
        return;
    }
    tb_api_answer_begin(&b, &j);
    put_model(&j, names);
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}

static void models(struct tb_api *a, struct tb_http_request *req, const struct tb_route_match *m)
{
    (void)m;
    tb_llm_list(a, req, on_models);
}

static void model(struct tb_api *a, struct tb_http_request *req, const struct tb_route_match *m)
{
    tb_llm_list_one(a, req, tb_api_text(req, m->params[0]), on_model);
}

static const struct tb_route ROUTES[] = {
    {.method = TB_HTTP_POST, .pattern = "/v1/chat/completions", .handle = chat},
    {.method = TB_HTTP_POST, .pattern = "/v1/completions", .handle = text},
    {.method = TB_HTTP_GET, .pattern = "/v1/models", .handle = models},
    {.method = TB_HTTP_GET, .pattern = "/v1/models/{*}", .handle = model},
};

const struct tb_face tb_face_openai = {
    .name = "openai", .routes = ROUTES, .n_routes = TB_ARRAY_LEN(ROUTES), .error = refuse};
