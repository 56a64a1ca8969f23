/*
 * sample and asample of the Tinkerbell face, and the losses that clients upload (see tinkerbell.h).
 * Thread: prepare runs in the pool.
 */
#include <string.h>

#include "api/datum.h"
#include "api/tinkerbell/tinkerbell.h"

struct part { /* one prompt */
    struct tb_bell_job *j;
    const int32_t *tokens;
    int32_t n_tokens;
    struct tb_core_stream stream;
    char *request_id;
    struct tb_sequence *sequences; /* copies in the job's arena */
    int32_t n_sequences;
    struct tb_error err;
};

struct sample {
    const struct tb_llm_model *base;
    struct part *parts;
    int n_parts, n_running;
    const char *sampler_id; /* NULL: the base model */
    uint64_t changes;       /* of the adapter, when its publishing was submitted */
    struct tb_sample params;
};

/* ---- the body */

/* A prompt in words is a user's turn. */
static int encode(struct tb_bell_job *j, const struct sample *s, struct tb_span text,
                  struct part *out, struct tb_error *err)
{
    const struct tb_served_model *m = tb_llm_model_info(s->base);
    struct tb_chat_message user = {.role = TB_SPAN_LIT("user"), .content = text};
    struct tb_ids ids;
    int rc = tb_llm_model_need_text(s->base, err);
    if (rc) return rc;
    tb_ids_init(&ids);
    rc = tb_chat_render(tb_llm_model_renderer(s->base), m->text, &user, 1, true, &ids, err);
    if (rc == 0) {
        int32_t *tokens = tb_bell_room(&j->arena, ids.n, sizeof(*tokens), err);
        if (tokens && ids.n) memcpy(tokens, ids.p, ids.n * sizeof(*tokens));
        out->tokens = tokens;
        out->n_tokens = (int32_t)ids.n;
        if (!tokens) rc = TB_ENOMEM;
    }
    tb_ids_fini(&ids);
    return rc;
}

static int prompts(struct tb_bell_job *j, struct sample *s, const struct tb_json *root,
                   struct tb_error *err)
{
    struct tb_json v, one;
    const char *text;
    int rc;
    bool many = tb_json_find(root, "prompts", &v) && tb_json_is_array(&v);
    bool tokens = !v.v && tb_json_find(root, "prompt", &v) && tb_json_is_object(&v);
    size_t n = many ? tb_json_len(&v) : 1;
    if (n == 0 || n > TB_LLM_MAX_PROMPTS)
        return tb_error_set(err, TB_EINVAL, "prompts: %zu are not in 1..%d", n, TB_LLM_MAX_PROMPTS);
    s->n_parts = (int)n;
    s->parts = tb_arena_calloc(&j->arena, n, sizeof(*s->parts));
    if (tokens)
        return tb_json_tokens(&v, &j->arena, &s->parts[0].tokens, &s->parts[0].n_tokens, err);
    for (size_t i = 0; i < n; i++) {
        if (many)
            tb_json_at(&v, i, &one);
        else
            one = v;
        text = "Hello"; /* the original's, when there is nothing */
        if (one.v && (rc = tb_json_as_string(&one, &j->arena, TB_MAX_BODY_DEFAULT, &text, err)))
            return rc;
        if ((rc = encode(j, s, tb_span_str(text), &s->parts[i], err))) return rc;
    }
    return 0;
}

static int make_op(struct tb_bell_job *j, const struct sample *s, const struct part *p,
                   struct tb_error *err)
{
    struct tb_op *op = tb_bell_make(j, TB_OP_SAMPLE);
    size_t n = (size_t)p->n_tokens;
    int32_t *tokens = tb_bell_room(&op->arena, n, sizeof(*tokens), err);
    if (!tokens) return TB_ENOMEM;
    if (n) memcpy(tokens, p->tokens, n * sizeof(*tokens));
    op->u.sample = s->params;
    op->u.sample.prompt = tokens;
    op->u.sample.n_prompt = p->n_tokens;
    op->body_bytes = op->arena.total;
    return 0;
}

static int prepare(struct tb_bell_job *j, const struct tb_json *root, struct tb_error *err)
{
    struct sample *s = j->own = tb_arena_calloc(&j->arena, 1, sizeof(*s));
    struct tb_sample *q = &s->params;
    struct tb_json p;
    int64_t seed = 0;
    int32_t n = 1;
    int rc = tb_json_string(root, "model_id", false, &j->arena, TB_MAX_ID, &j->model_id, err);
    if (rc == 0)
        rc = tb_json_string(root, "base_model", false, &j->arena, TB_MAX_ID, &j->base_model, err);
    if (rc) return rc;
    j->echo = j->base_model;
    if (j->base_model && strcmp(j->base_model, "base") != 0) j->model_id = j->base_model;
    if (!j->model_id) j->model_id = "base";
    s->base = tb_bell_base(j->a, j->model_id);
    if ((rc = prompts(j, s, root, err)) ||
        (rc = tb_json_object(root, "sampling_params", false, &p, err)))
        return rc;
    q->max_tokens = 50;
    q->temperature = q->top_p = 1;
    q->top_k = -1;
    if (p.v &&
        ((rc = tb_llm_int32(&p, "max_tokens", 1, INT32_MAX, &q->max_tokens, err)) ||
         (rc = tb_llm_float(&p, "temperature", 0, 100, &q->temperature, err)) ||
         (rc = tb_llm_float(&p, "top_p", 0, 1, &q->top_p, err)) ||
         (rc = tb_llm_int32(&p, "top_k", -1, INT32_MAX, &q->top_k, err)) ||
         (rc = tb_llm_float(&p, "min_p", 0, 1, &q->min_p, err)) ||
         (rc = tb_llm_float(&p, "repetition_penalty", 0.01, 100, &q->repetition_penalty, err)) ||
         (rc = tb_json_int(&p, "seed", false, INT64_MIN, INT64_MAX, &seed, err)) ||
         (rc = tb_llm_int32(&p, "n", 1, TB_MAX_SAMPLES, &n, err))))
        return rc;
    if ((int64_t)n * s->n_parts > TB_LLM_MAX_CHOICES)
        return tb_error_set(err, TB_EINVAL,
                            "sampling_params.n: %d of each of %d prompts are more than %d", (int)n,
                            s->n_parts, TB_LLM_MAX_CHOICES);
    if (q->top_k == 0) q->top_k = -1;
    if (q->top_p <= 0) q->top_p = 1;
    struct tb_json v;
    q->has_seed = p.v && tb_json_find(&p, "seed", &v);
    q->seed = (uint64_t)seed;
    q->n_samples = n;
    for (int i = 0; rc == 0 && i < s->n_parts; i++)
        rc = make_op(j, s, &s->parts[i], err);
    return rc;
}

/* ---- the answer */

static void put_text(struct tb_bell_job *j, struct tb_json_out *o, const char *key,
                     const struct tb_tokenizer *t, const struct tb_sequence *s)
{
    struct tb_buf text;
    tb_buf_init(&text, TB_API_MAX_ANSWER);
    int rc = t ? tb_tokenizer_decode(t, s->tokens, (size_t)s->n,
                                     TB_DECODE_VISIBLE | TB_DECODE_GOES_ON, &text)
               : 0;
    if (rc) tb_error_set(&j->err, rc, "no memory for the text of %d tokens", (int)s->n);
    tb_jout_strn(o, key, text.n ? text.p : "", text.n);
    tb_buf_fini(&text);
}

/* All that any of the original's backends answers with. In the pool. */
static void put_answer(struct tb_bell_job *j)
{
    const struct sample *s = j->own;
    const struct tb_tokenizer *t = tb_llm_model_info(s->base)->text;
    struct tb_json_out o = tb_bell_result(j);
    put_text(j, &o, "generated_text", t, &s->parts[0].sequences[0]);
    tb_jout_str(&o, "model_id", j->model_id);
    tb_jout_array(&o, "sequences");
    for (int i = 0; i < s->n_parts; i++) {
        for (int32_t k = 0; k < s->parts[i].n_sequences; k++) {
            const struct tb_sequence *q = &s->parts[i].sequences[k];
            tb_jout_object(&o, NULL);
            tb_jout_str(&o, "stop_reason", q->stopped ? "stop" : "length");
            tb_jout_i32s(&o, "tokens", q->tokens, (size_t)q->n);
            tb_jout_f32s(&o, "logprobs", q->logprobs, (size_t)q->n);
            tb_jout_object_end(&o);
        }
    }
    tb_jout_array_end(&o);
    tb_jout_array(&o, "completions");
    for (int i = 0; i < s->n_parts; i++)
        for (int32_t k = 0; k < s->parts[i].n_sequences; k++)
            put_text(j, &o, NULL, t, &s->parts[i].sequences[k]);
    tb_jout_array_end(&o);
    tb_jout_null(&o, "prompt_logprobs");
    tb_jout_object_end(&o);
}

static void answer_was_put(struct tb_bell_job *j)
{
    struct tb_error e = j->err;
    if (e.code)
        tb_bell_fail(j, &e);
    else
        tb_bell_done(j);
}

static void finish(struct tb_bell_job *j)
{
    const struct sample *s = j->own;
    for (int i = 0; i < s->n_parts; i++) {
        if (s->parts[i].err.code) {
            struct tb_error e = s->parts[i].err;
            tb_bell_fail(j, &e);
            return;
        }
    }
    tb_bell_work(j, put_answer, answer_was_put);
}

/* ---- the samples */

static void keep(struct part *p, const struct tb_result *r)
{
    struct tb_arena *a = &p->j->arena;
    p->n_sequences = r->n_sequences;
    p->sequences = tb_bell_room(a, (size_t)r->n_sequences, sizeof(*p->sequences), &p->err);
    for (int32_t i = 0; p->sequences && i < r->n_sequences; i++) {
        const struct tb_sequence *from = &r->sequences[i];
        struct tb_sequence *to = &p->sequences[i];
        size_t n = (size_t)from->n;
        *to = (struct tb_sequence){.stopped = from->stopped, .n = from->n};
        to->tokens = tb_bell_room(a, n, sizeof(*to->tokens), &p->err);
        to->logprobs = tb_bell_room(a, n, sizeof(*to->logprobs), &p->err);
        if (!to->tokens || !to->logprobs) return;
        memcpy(to->tokens, from->tokens, n * sizeof(*to->tokens));
        memcpy(to->logprobs, from->logprobs, n * sizeof(*to->logprobs));
    }
}

static void on_sample(struct tb_core_stream *stream, enum tb_future_state state,
                      const struct tb_op *op)
{
    struct part *p = stream->arg;
    struct tb_bell_job *j = p->j;
    struct sample *s = j->own;
    if (state == TB_FUTURE_DONE)
        keep(p, &op->result);
    else if (state == TB_FUTURE_FAILED)
        p->err = op->error;
    else
        tb_error_set(&p->err, TB_EGONE, "the server gave the sample up");
    tb_core_retrieved(tb_api_core(j->a), j->tenant->who, p->request_id, strlen(p->request_id));
    tb_free(p->request_id);
    p->request_id = NULL;
    if (--s->n_running == 0) finish(j);
}

void tb_bell_sample_forget(struct tb_bell_job *j)
{
    struct sample *s = j->own;
    for (int i = 0; s && i < s->n_parts; i++) {
        if (!s->parts[i].request_id) continue;
        tb_core_unstream(tb_api_core(j->a), &s->parts[i].stream);
        tb_free(s->parts[i].request_id);
    }
}

/* The next of the ops that prepare made, now that it is known what to sample from. */
static struct tb_op *sample_op(struct tb_bell_job *j, const struct sample *s)
{
    struct tb_op *op = tb_bell_take(j);
    if (j->adapter) {
        op->sampling_session_id = tb_arena_strdup(&op->arena, s->sampler_id);
        op->seq_id = j->adapter->next_sample++;
    } else {
        op->u.sample.base_model = tb_llm_model_info(s->base)->name;
    }
    return op;
}

static void run(struct tb_bell_job *j)
{
    struct sample *s = j->own;
    struct tb_core *core = tb_api_core(j->a);
    s->n_running = s->n_parts + 1; /* one for this loop */
    for (int i = 0; i < s->n_parts; i++) {
        struct part *p = &s->parts[i];
        struct tb_ticket t;
        p->j = j;
        if (tb_core_submit(core, j->tenant->who, sample_op(j, s), &t, &p->err)) {
            s->n_running--;
            continue;
        }
        p->request_id = tb_strdup(t.request_id);
        p->stream = (struct tb_core_stream){.end = on_sample, .arg = p};
        tb_core_stream(core, j->tenant->who, p->request_id, strlen(p->request_id), &p->stream);
    }
    if (--s->n_running == 0) finish(j);
}

/* The sampler stays for others as long as the weights are what was published. */
static void published(struct tb_bell_job *j, const struct tb_op *op)
{
    struct sample *s = j->own;
    struct tb_tenant *who = j->tenant->who;
    const char *id = op->result.sampling_session_id;
    struct tb_bell_adapter *ad = tb_bell_adapter_find(j->tenant, j->model_id);
    bool keep_it = false;
    if (ad && strcmp(ad->model_id, op->model_id) == 0) {
        keep_it = ad->changes == s->changes && !ad->sampler_id;
        if (keep_it) ad->sampler_id = tb_strdup(id);
        s->sampler_id = tb_arena_strdup(&j->arena, id);
        j->adapter = ad;
        run(j);
    } else {
        struct tb_error e = {0};
        tb_error_set(&e, TB_EGONE, "%s was removed meanwhile", j->model_id);
        tb_bell_fail(j, &e);
    }
    if (!keep_it) tb_core_end_sampling_session(tb_api_core(j->a), who, id);
}

static void start(struct tb_bell_job *j)
{
    struct sample *s = j->own;
    struct tb_error e = {0};
    j->adapter = tb_bell_adapter_find(j->tenant, j->model_id);
    if (!j->adapter) {
        if (strcmp(j->model_id, "base") != 0 && !tb_llm_model_find(j->a, j->model_id)) {
            tb_error_set(&e, TB_ENOTFOUND, "model '%s' not found", j->model_id);
            tb_bell_fail(j, &e);
        } else {
            run(j);
        }
        return;
    }
    s->base = j->adapter->base;
    if (j->adapter->sampler_id) {
        s->sampler_id = tb_arena_strdup(&j->arena, j->adapter->sampler_id);
        run(j);
        return;
    }
    s->changes = j->adapter->changes;
    struct tb_op *op = tb_bell_op(j, tb_op_create(TB_OP_SAVE_WEIGHTS_FOR_SAMPLER));
    op->u.save_weights.sampling_session_seq_id = j->adapter->next_sampler++;
    tb_bell_run(j, op, published);
}

const struct tb_bell_kind tb_bell_sample = {"Sampling", prepare, start};

/* ---- uploaded losses: kept by name, never executed */

static int prepare_loss(struct tb_bell_job *j, const struct tb_json *root, struct tb_error *err)
{
    const char *code = NULL;
    int rc = tb_json_string(root, "loss_name", true, &j->arena, 64, &j->loss_name, err);
    if (rc == 0)
        rc = tb_json_string(root, "loss_fn_serialized", true, &j->arena, TB_MAX_LOSS_TEXT, &code,
                            err);
    return rc;
}

static void start_loss(struct tb_bell_job *j)
{
    struct tb_map *losses = &j->tenant->losses;
    size_t n = strlen(j->loss_name);
    struct tb_error e = {0};
    if (!tb_map_get(losses, j->loss_name, n)) {
        if (losses->n >= TB_BELL_LOSSES) {
            tb_error_set(&e, TB_EBUSY, "there are %d losses already", TB_BELL_LOSSES);
            tb_bell_fail(j, &e);
            return;
        }
        tb_map_put(losses, j->loss_name, n, tb_strdup(j->loss_name));
    }
    struct tb_json_out o = tb_bell_result(j);
    tb_jout_str(&o, "status", "registered");
    tb_jout_str(&o, "loss_name", j->loss_name);
    tb_jout_str(&o, "message",
                "listed, but uploaded Python code is never executed here: training with it fails; "
                "the Tinker SDK's forward_backward_custom runs a loss on the client");
    tb_jout_object_end(&o);
    tb_bell_done(j);
}

const struct tb_bell_kind tb_bell_register_loss = {"Register custom loss", prepare_loss,
                                                   start_loss};
