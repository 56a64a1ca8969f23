/*
 * A request's way (see llm.h): decoded in the pool, its model found, made tokens in the pool, given
 * to core as one sample op for each prompt, and its tokens made text as they come.
 */
#include "api/llm/llm.h"

#include <string.h>

#include "util/clock.h"
#include "util/mem.h"

#define MAX_ANSWER ((size_t)1 << 30)
#define SLOW_READER                                                                                \
    ((size_t)64 << 10) /* bytes of a stream not read yet: text waits, events merge */
#define LARGE_ANSWER ((size_t)64 << 10) /* about; is written in the pool */

static void next_phase(struct tb_llm *l, void (*phase)(struct tb_llm *l), uv_after_work_cb then);

/* While we are inside a loop over l (busy), its end waits for that loop's. */
static void destroy(struct tb_llm *l)
{
    struct tb_api *a = l->a;
    l->dead = true;
    if (l->busy) return;
    for (int i = 0; i < l->n_choices; i++) {
        struct tb_llm_choice *c = &l->choices[i];
        tb_llm_text_fini(&c->text);
        tb_buf_fini(&c->whole);
        tb_free(c->tokens);
        tb_free(c->logprobs);
        tb_free(c->topk_ids);
        tb_free(c->topk_logprobs);
    }
    for (int i = 0; i < l->n_prompts; i++)
        tb_free(l->prompts[i].request_id);
    tb_stop_set_destroy(l->stop_set);
    if (l->grammar) tb_grammar_unref(l->grammar->g);
    tb_buf_fini(&l->out);
    tb_arena_fini(&l->arena);
    tb_free(l);
    tb_api_work_end(a);
}

/* Ends a request that has no answer yet. */
static void refuse(struct tb_llm *l)
{
    l->face->refuse(l->req, &l->err);
    destroy(l);
}

/* Gives up the samples that run; core calls us no more. */
static void cancel(struct tb_llm *l)
{
    for (int i = 0; i < l->n_prompts; i++) {
        struct tb_llm_prompt *p = &l->prompts[i];
        if (!p->request_id || p->over) continue;
        tb_core_unstream(l->a->core, &p->stream);
        tb_core_cancel(l->a->core, l->who, p->request_id, strlen(p->request_id));
        p->over = true;
    }
}

static void on_abort(struct tb_http_request *req)
{
    struct tb_llm *l = req->user;
    l->req = NULL;
    cancel(l);
    destroy(l);
}

/* ---- the answer */

void tb_llm_send(struct tb_llm *l)
{
    if (!l->streaming) {
        static const struct tb_http_field fields[] = {{"Cache-Control", "no-cache"},
                                                      {"X-Accel-Buffering", "no"}};
        l->streaming = true;
        tb_http_stream_begin(l->req, 200, l->face->stream_type, fields, TB_ARRAY_LEN(fields));
    }
    tb_http_stream_chunk(l->req, l->out.p, l->out.n);
    tb_buf_reset(&l->out);
}

static void finish(struct tb_llm *l)
{
    if (l->stream) {
        tb_http_stream_end(l->req);
    } else {
        tb_api_answer(l->req, 200, &l->out);
        tb_buf_init(&l->out, MAX_ANSWER);
    }
    destroy(l);
}

static void on_written(uv_work_t *w, int status)
{
    struct tb_llm *l = TB_CONTAINER_OF(w, struct tb_llm, work);
    if (status) {
        tb_error_set(&l->err, TB_ECANCELED, "the server is stopping");
        refuse(l);
    } else {
        finish(l);
    }
}

/* Whether its text, and what its tokens are told with, make a large answer. */
static bool is_large(const struct tb_llm *l)
{
    enum { ID = 8, LOGPROB = 64 };
    size_t token = l->logprobs ? LOGPROB * (1 + (size_t)l->top_logprobs) : ID, n = 0;
    for (int i = 0; i < l->n_choices; i++) {
        const struct tb_llm_choice *c = &l->choices[i];
        n += c->whole.n + (size_t)c->n * token;
        if (l->echo) n += (size_t)l->prompts[c->prompt].n_tokens * token;
    }
    return n > LARGE_ANSWER;
}

static void end(struct tb_llm *l)
{
    l->ended_ns = tb_clock_ns();
    l->req->on_abort = NULL;
    if (!l->stream && is_large(l)) {
        next_phase(l, l->face->answer, on_written);
        return;
    }
    if (l->face->answer) l->face->answer(l);
    finish(l);
}

static void fail(struct tb_llm *l, const struct tb_error *e)
{
    cancel(l);
    l->err = *e;
    l->req->on_abort = NULL;
    if (!l->streaming) {
        refuse(l);
        return;
    }
    l->face->broken(l, e);
    tb_http_stream_end(l->req);
    destroy(l);
}

/* ---- tokens to text */

/* Room for one more token; false when memory is out. */
static bool grow(struct tb_llm_choice *c, int topk)
{
    if (c->n < c->cap) return true;
    size_t cap = c->cap ? 2 * (size_t)c->cap : 64, k = (size_t)topk;
    struct {
        void **p;
        size_t size;
    } arrays[] = {{(void **)&c->tokens, sizeof(*c->tokens)},
                  {(void **)&c->logprobs, sizeof(*c->logprobs)},
                  {(void **)&c->topk_ids, k * sizeof(*c->topk_ids)},
                  {(void **)&c->topk_logprobs, k * sizeof(*c->topk_logprobs)}};
    for (size_t i = 0; i < TB_ARRAY_LEN(arrays); i++) {
        void *p = arrays[i].size ? tb_try_realloc(*arrays[i].p, cap * arrays[i].size) : NULL;
        if (arrays[i].size && !p) return false;
        *arrays[i].p = p;
    }
    c->cap = (int32_t)cap;
    return true;
}

static int add_token(struct tb_llm *l, struct tb_llm_choice *c, const struct tb_sampled_token *t)
{
    size_t k = (size_t)l->top_logprobs;
    if (!l->first_ns) l->first_ns = tb_clock_ns();
    if (!grow(c, l->top_logprobs)) return TB_ENOMEM;
    size_t at = (size_t)c->n++;
    c->tokens[at] = t->token;
    c->logprobs[at] = t->logprob;
    if (k && t->topk_ids) {
        memcpy(c->topk_ids + at * k, t->topk_ids, k * sizeof(*t->topk_ids));
        memcpy(c->topk_logprobs + at * k, t->topk_logprobs, k * sizeof(*t->topk_logprobs));
    }
    tb_llm_text_feed(&c->text, t->token, &c->whole);
    if (t->last) tb_llm_text_end(&c->text, &c->whole);
    if (c->whole.failed || tb_llm_text_failed(&c->text)) return TB_ENOMEM;
    if (!t->last) return 0;
    c->over = true;
    c->stopped = t->stopped;
    l->n_running--;
    return 0;
}

/* Tells a stream's client what is new of c, unless it reads too slowly: then events merge. */
static void tell(struct tb_llm *l, struct tb_llm_choice *c)
{
    bool news = c->whole.n > c->told || c->over;
    if (!l->stream || !news) return;
    if (!c->over && tb_http_stream_pending(l->req) > SLOW_READER) return;
    l->face->more(l, c);
    c->told = c->whole.n;
    c->n_told = c->n;
}

static void on_tokens(struct tb_core_stream *s, const struct tb_sampled_token *tokens, int32_t n)
{
    struct tb_llm_prompt *p = s->arg;
    struct tb_llm *l = p->llm;
    struct tb_llm_choice *first = &l->choices[(p - l->prompts) * l->n];
    int rc = 0;
    l->busy = true; /* a write may find that the client has gone */
    for (int32_t i = 0; i < n && rc == 0 && !l->dead; i++) {
        struct tb_llm_choice *c = &first[tokens[i].sequence];
        rc = add_token(l, c, &tokens[i]);
        if (rc == 0) tell(l, c);
    }
    l->busy = false;
    if (l->dead) {
        destroy(l);
    } else if (rc) {
        struct tb_error e = {0};
        tb_error_set(&e, rc, "no memory for the tokens that were sampled");
        fail(l, &e);
    }
}

/* The result goes with the op. */
static int keep_prompt_logprobs(struct tb_llm_prompt *p, const struct tb_op *op,
                                struct tb_error *err)
{
    struct tb_llm *l = p->llm;
    const struct tb_result *r = &op->result;
    size_t n = (size_t)p->n_tokens, k = (size_t)op->u.sample.topk_prompt_logprobs;
    p->logprobs = tb_arena_try_array(&l->arena, n, sizeof(*p->logprobs));
    p->topk_ids = tb_arena_try_array(&l->arena, n * k + 1, sizeof(*p->topk_ids));
    p->topk_logprobs = tb_arena_try_array(&l->arena, n * k + 1, sizeof(*p->topk_logprobs));
    if (!p->logprobs || !p->topk_ids || !p->topk_logprobs)
        return tb_error_set(err, TB_ENOMEM, "no memory for the logprobs of %zu tokens", n);
    memcpy(p->logprobs, r->prompt_logprobs, n * sizeof(*p->logprobs));
    if (k == 0) return 0;
    memcpy(p->topk_ids, r->topk_prompt_ids, n * k * sizeof(*p->topk_ids));
    memcpy(p->topk_logprobs, r->topk_prompt_logprobs, n * k * sizeof(*p->topk_logprobs));
    return 0;
}

static void on_end(struct tb_core_stream *s, enum tb_future_state state, const struct tb_op *op)
{
    struct tb_llm_prompt *p = s->arg;
    struct tb_llm *l = p->llm;
    struct tb_error e = {0};
    p->over = true;
    if (state == TB_FUTURE_DONE) {
        p->n_cached = op->result.prompt_cache_hit_tokens;
        if (l->echo && l->logprobs) keep_prompt_logprobs(p, op, &e);
    } else {
        if (state == TB_FUTURE_FAILED) e = op->error;
        if (!e.code) tb_error_set(&e, TB_ECANCELED, "the sample was given up by the server");
    }
    tb_core_retrieved(l->a->core, l->who, p->request_id, strlen(p->request_id));
    bool all = true;
    for (int i = 0; i < l->n_prompts; i++)
        all = all && l->prompts[i].over;
    if (e.code)
        fail(l, &e);
    else if (all)
        end(l);
}

/* ---- into core */

static void submit_prompt(struct tb_llm *l, struct tb_llm_prompt *p)
{
    struct tb_op *op = tb_op_create(TB_OP_SAMPLE);
    struct tb_sample *s = &op->u.sample;
    struct tb_ticket ticket;
    const struct tb_served_model *m = tb_llm_model_info(l->model);
    *s = l->sample;
    if (l->model_path)
        s->model_path = tb_arena_strdup(&op->arena, l->model_path);
    else
        s->base_model = m->name;
    s->n_prompt = p->n_tokens;
    int32_t *prompt = tb_arena_try_array(&op->arena, (size_t)p->n_tokens + 1, sizeof(*prompt));
    if (!prompt) {
        tb_op_destroy(op);
        tb_error_set(&l->err, TB_ENOMEM, "no memory for a prompt of %d tokens", (int)p->n_tokens);
        return;
    }
    memcpy(prompt, p->tokens, (size_t)p->n_tokens * sizeof(*prompt));
    s->prompt = prompt;
    s->n_samples = l->n;
    if (s->max_tokens == 0) s->max_tokens = 1; /* a prompt is scored by a step */
    if (s->max_tokens > m->max_context - p->n_tokens)
        s->max_tokens = -1; /* what there is room for */
    if (!s->has_seed) s->seed = tb_random_u64();
    s->has_seed = true;
    s->stop_given = true;
    int32_t *stops = tb_arena_calloc(&op->arena, (size_t)m->n_eos + 1, sizeof(*stops));
    for (int i = 0; i < m->n_eos && !s->ignore_eos; i++)
        stops[s->n_stop_tokens++] = m->eos[i];
    const struct tb_renderer *r = tb_llm_model_renderer(l->model);
    int32_t turn = p->messages && !s->ignore_eos ? tb_renderer_stop_token(r, m->text) : -1;
    if (turn >= 0) stops[s->n_stop_tokens++] = turn;
    s->stop_tokens = stops;
    const char **strings = tb_arena_calloc(&op->arena, l->n_stops + 1, sizeof(*strings));
    for (size_t i = 0; i < l->n_stops; i++)
        strings[i] = tb_arena_strdup(&op->arena, l->stops[i]);
    s->stop_strings = strings;
    s->n_stop_strings = (int32_t)l->n_stops;
    s->topk_sample_logprobs = l->top_logprobs;
    if (l->echo && l->logprobs) {
        s->prompt_logprobs = true;
        s->topk_prompt_logprobs = l->top_logprobs;
    }
    s->stream = true;
    if (l->grammar) s->filter = tb_llm_filter(l->grammar);
    op->body_bytes = (size_t)p->n_tokens * sizeof(*prompt);
    if (tb_core_submit(l->a->core, l->who, op, &ticket, &l->err)) return;
    p->request_id = tb_strdup(ticket.request_id);
    p->stream = (struct tb_core_stream){.tokens = on_tokens, .end = on_end, .arg = p};
}

/* Core may call back from inside tb_core_stream. */
static void submit(struct tb_llm *l)
{
    l->submitted_ns = tb_clock_ns();
    l->req->user = l;
    l->req->on_abort = on_abort;
    for (int i = 0; i < l->n_prompts && !l->err.code; i++)
        submit_prompt(l, &l->prompts[i]);
    if (l->err.code) {
        struct tb_error e = l->err;
        fail(l, &e);
        return;
    }
    if (l->n_prompts == 0) { /* the face has its answer */
        end(l);
        return;
    }
    l->busy = true;
    for (int i = 0; i < l->n_prompts && !l->dead; i++) {
        struct tb_llm_prompt *p = &l->prompts[i];
        tb_core_stream(l->a->core, l->who, p->request_id, strlen(p->request_id), &p->stream);
    }
    l->busy = false;
    if (l->dead) destroy(l);
}

/* ---- tokens and grammar, in the pool */

static int make_tokens(struct tb_llm *l, struct tb_llm_prompt *p, struct tb_error *err)
{
    const struct tb_served_model *m = tb_llm_model_info(l->model);
    struct tb_ids ids;
    int rc;
    if (p->tokens) return 0;
    tb_ids_init(&ids);
    if (p->messages) {
        const struct tb_renderer *r = tb_llm_model_renderer(l->model);
        if (l->no_thinking) r = tb_renderer_without_thinking(r);
        rc = tb_chat_render(r, m->text, p->messages, p->n_messages, true, &ids, err);
    } else {
        rc = tb_tokenizer_encode(m->text, p->text, TB_ENCODE_TEMPLATE, &ids, err);
    }
    if (rc == 0 && ids.n == 0)
        rc = tb_error_set(err, TB_EINVAL, "the prompt is empty: %s begins with no token of its own",
                          m->name);
    if (rc == 0 && ids.n > INT32_MAX) rc = tb_error_set(err, TB_ETOOBIG, "the prompt is too long");
    int32_t *own = rc ? NULL : tb_arena_try_array(&l->arena, ids.n, sizeof(*own));
    if (rc == 0 && !own) rc = tb_error_set(err, TB_ENOMEM, "no memory for %zu tokens", ids.n);
    if (rc == 0) {
        memcpy(own, ids.p, ids.n * sizeof(*own));
        p->tokens = own;
        p->n_tokens = (int32_t)ids.n;
    }
    tb_ids_fini(&ids);
    return rc;
}

/* A model's own end of turn is a stop string where it is no token. */
static void add_stop_string(struct tb_llm *l, const char *s)
{
    const char **more = tb_arena_calloc(&l->arena, l->n_stops + 1, sizeof(*more));
    if (l->n_stops) memcpy(more, l->stops, l->n_stops * sizeof(*more));
    more[l->n_stops++] = s;
    l->stops = more;
}

static int make_grammar(struct tb_llm *l, struct tb_error *err)
{
    const struct tb_served_model *m = tb_llm_model_info(l->model);
    l->grammar = tb_arena_calloc(&l->arena, 1, sizeof(*l->grammar));
    int rc = tb_llm_grammar_get(l->model, l->json, l->schema, l->grammar, err);
    if (rc) return rc;
    for (int i = 0; i < l->n_prompts; i++) {
        int64_t room = (int64_t)m->max_context - l->prompts[i].n_tokens;
        if (l->sample.max_tokens >= 0) room = TB_MIN(room, l->sample.max_tokens);
        if (room < (int64_t)l->grammar->shortest)
            return tb_error_set(err, TB_EINVAL,
                                "the shortest answer that fits the schema may take %u tokens, and "
                                "%lld are allowed",
                                l->grammar->shortest, (long long)TB_MAX(room, 0));
    }
    return 0;
}

static void prepare(struct tb_llm *l)
{
    const struct tb_served_model *m = tb_llm_model_info(l->model);
    int rc = tb_llm_model_need_text(l->model, &l->err); /* the answer is text */
    for (int i = 0; rc == 0 && i < l->n_prompts; i++) {
        struct tb_llm_prompt *p = &l->prompts[i];
        rc = make_tokens(l, p, &l->err);
        if (rc == 0 && p->n_tokens >= m->max_context)
            rc = tb_error_set(&l->err, TB_ETOOBIG,
                              "the prompt has %d tokens, and %s has a context of %d",
                              (int)p->n_tokens, m->name, m->max_context);
    }
    const struct tb_renderer *r = tb_llm_model_renderer(l->model);
    if (rc == 0 && l->n_prompts && l->prompts[0].messages && tb_renderer_stop_string(r))
        add_stop_string(l, tb_renderer_stop_string(r));
    if (rc == 0 && l->n_stops) {
        struct tb_span *spans = tb_arena_calloc(&l->arena, l->n_stops, sizeof(*spans));
        for (size_t i = 0; i < l->n_stops; i++)
            spans[i] = tb_span_str(l->stops[i]);
        rc = tb_stop_set_create(m->text, spans, l->n_stops, &l->stop_set, &l->err);
    }
    if (rc == 0 && (l->json || l->schema.p)) rc = make_grammar(l, &l->err);
    if (rc == 0 && l->face->prepare) rc = l->face->prepare(l, &l->err);
    if (rc) l->err.code = rc;
}

static void on_prepared(uv_work_t *w, int status)
{
    struct tb_llm *l = TB_CONTAINER_OF(w, struct tb_llm, work);
    for (int i = 0; i < l->n_prompts; i++)
        l->prompts[i].llm = l;
    if (status) tb_error_set(&l->err, TB_ECANCELED, "the server is stopping");
    if (l->err.code || tb_http_request_gone(l->req)) {
        refuse(l);
        return;
    }
    l->n_choices = l->n_running = l->n_prompts * l->n;
    l->choices = tb_arena_calloc(&l->arena, (size_t)l->n_choices, sizeof(*l->choices));
    for (int i = 0; i < l->n_choices; i++) {
        struct tb_llm_choice *c = &l->choices[i];
        c->index = i;
        c->prompt = i / l->n;
        tb_llm_text_init(&c->text, tb_llm_model_info(l->model)->text, l->stop_set);
        tb_buf_init(&c->whole, MAX_ANSWER);
        tb_buf_puts(&c->whole, "");
    }
    submit(l);
}

/* ---- the model */

static void have_model(struct tb_llm *l)
{
    if (l->model) {
        next_phase(l, prepare, on_prepared);
        return;
    }
    tb_error_set(&l->err, TB_ENOTFOUND, "model '%s' not found", l->model_name ? l->model_name : "");
    refuse(l);
}

static void on_ckpt(void *arg, const struct tb_error *err, const struct tb_ckpt_row *row)
{
    struct tb_llm *l = arg;
    if (err->code == TB_ENOTFOUND || err->code == TB_EINVAL) {
        have_model(l);
        return;
    }
    if (err->code) {
        l->err = *err;
        refuse(l);
        return;
    }
    l->model_path = l->model_name;
    l->model = tb_llm_model_find(l->a, row->base_model);
    have_model(l);
}

static void on_decoded(uv_work_t *w, int status)
{
    struct tb_llm *l = TB_CONTAINER_OF(w, struct tb_llm, work);
    if (status) tb_error_set(&l->err, TB_ECANCELED, "the server is stopping");
    if (l->err.code || tb_http_request_gone(l->req)) {
        refuse(l);
    } else if (l->model_name &&
               strncmp(l->model_name, TB_LLM_CHECKPOINT, strlen(TB_LLM_CHECKPOINT)) == 0) {
        tb_store_get_ckpt(tb_core_store(l->a->core), tb_api_tenant(l->req), l->model_name, on_ckpt,
                          l);
    } else {
        l->model = tb_llm_model_find(l->a, l->model_name);
        have_model(l);
    }
}

/* ---- the body, in the pool */

static void decode(struct tb_llm *l)
{
    struct tb_json_doc doc = {0};
    char *plain;
    int rc = tb_api_inflate(l->a, l->body.encoding, &l->body.bytes, &plain, &l->err);
    if (rc == 0) rc = tb_json_parse(&doc, l->body.bytes.p, l->body.bytes.n, &l->err);
    if (rc == 0 && !tb_json_is_object(&doc.root))
        rc = tb_error_set(&l->err, TB_EINVAL, "the body is not a JSON object");
    if (rc == 0) rc = l->face->decode(l, &doc.root, &l->err);
    if (rc == 0 && (int64_t)l->n * l->n_prompts > TB_LLM_MAX_CHOICES)
        rc = tb_error_set(&l->err, TB_EINVAL, "n: %d of each of %d prompts are more than %d", l->n,
                          l->n_prompts, TB_LLM_MAX_CHOICES);
    if (rc) l->err.code = rc;
    tb_json_free(&doc);
    tb_free(plain);
}

static void on_work(uv_work_t *w)
{
    struct tb_llm *l = TB_CONTAINER_OF(w, struct tb_llm, work);
    l->phase(l);
}

static void next_phase(struct tb_llm *l, void (*phase)(struct tb_llm *l), uv_after_work_cb then)
{
    l->phase = phase;
    int rc = uv_queue_work(l->a->loop, &l->work, on_work, then);
    if (rc == 0) return;
    tb_error_set(&l->err, TB_EINTERNAL, "cannot queue work: %s", uv_strerror(rc));
    refuse(l);
}

void tb_llm_begin(struct tb_api *a, struct tb_http_request *req, const struct tb_llm_face *face,
                  int kind)
{
    struct tb_llm *l = tb_calloc(1, sizeof(*l));
    tb_api_work_begin(a);
    l->a = a;
    l->who = tb_api_who(req);
    l->req = req;
    l->face = face;
    l->kind = kind;
    l->n = 1;
    l->sample.temperature = l->sample.top_p = 1;
    l->sample.top_k = l->sample.max_tokens = -1;
    l->created = tb_clock_wall_us() / 1000000;
    l->received_ns = tb_clock_ns();
    tb_random_id(l->id, sizeof(l->id) - 1);
    tb_arena_init(&l->arena);
    tb_buf_init(&l->out, MAX_ANSWER);
    l->body.bytes = req->body;
    if (tb_encoding_parse(tb_http_header_get(req, "Content-Encoding"), &l->body.encoding, &l->err))
        refuse(l);
    else
        next_phase(l, decode, on_decoded);
}
