/*
 * Sample ops: validation, samples and their stops, results. See sampling.h and model.h.
 *
 * Owner: the caller of tb_sampling_create. Thread: the model's.
 */
#include "model/sampling.h"

#include <math.h>
#include <string.h>

#include "util/clock.h"
#include "util/limits.h"
#include "util/mem.h"

/* ---- validation */

static int check_tokens(const struct tb_model *m, const struct tb_sample *r, struct tb_error *err)
{
    if (r->n_prompt < 1) return tb_error_set(err, TB_EINVAL, "prompt is empty");
    for (int i = 0; i < r->n_prompt; i++)
        if (r->prompt[i] < 0 || r->prompt[i] >= m->cfg.vocab)
            return tb_error_set(err, TB_EINVAL,
                                "prompt at position %d is %d; token ids are from 0 to %d", i,
                                r->prompt[i], m->cfg.vocab - 1);
    return 0;
}

static int check_edits(const struct tb_model *m, const struct tb_sample *r, struct tb_error *err)
{
    const struct {
        const char *name;
        float value;
    } penalties[] = {{"presence_penalty", r->presence_penalty},
                     {"frequency_penalty", r->frequency_penalty},
                     {"repetition_penalty", r->repetition_penalty}};
    for (size_t i = 0; i < TB_ARRAY_LEN(penalties); i++)
        if (!isfinite(penalties[i].value))
            return tb_error_set(err, TB_EINVAL, "%s is %g; it must be finite", penalties[i].name,
                                (double)penalties[i].value);
    if (r->repetition_penalty < 0)
        return tb_error_set(err, TB_EINVAL, "repetition_penalty is %g; it must be above 0",
                            (double)r->repetition_penalty);
    if (r->repetition_last_n < 0)
        return tb_error_set(err, TB_EINVAL, "repetition_last_n is %d; it must not be negative",
                            r->repetition_last_n);
    if (r->n_logit_bias < 0 || r->n_logit_bias > TB_MAX_LOGIT_BIAS)
        return tb_error_set(err, TB_EINVAL, "logit_bias has %d tokens; at most %d are allowed",
                            r->n_logit_bias, TB_MAX_LOGIT_BIAS);
    for (int i = 0; i < r->n_logit_bias; i++) {
        int32_t id = r->logit_bias_tokens[i];
        if (id < 0 || id >= m->cfg.vocab)
            return tb_error_set(err, TB_EINVAL, "logit_bias names token %d; ids are from 0 to %d",
                                id, m->cfg.vocab - 1);
        if (!isfinite(r->logit_bias[i]))
            return tb_error_set(err, TB_EINVAL, "logit_bias of token %d is %g; it must be finite",
                                id, (double)r->logit_bias[i]);
    }
    return 0;
}

static int check_params(const struct tb_sample *r, struct tb_error *err)
{
    if (!isfinite(r->temperature) || r->temperature < 0)
        return tb_error_set(err, TB_EINVAL, "temperature is %g; it must not be negative",
                            (double)r->temperature);
    if (!(r->top_p > 0) || r->top_p > 1)
        return tb_error_set(err, TB_EINVAL, "top_p is %g; it must be above 0 and at most 1",
                            (double)r->top_p);
    if (!(r->min_p >= 0) || r->min_p > 1)
        return tb_error_set(err, TB_EINVAL, "min_p is %g; it must be from 0 to 1",
                            (double)r->min_p);
    if (r->top_k == 0 || r->top_k < -1)
        return tb_error_set(err, TB_EINVAL, "top_k is %d; it must be -1 (off) or at least 1",
                            r->top_k);
    if (r->max_tokens == 0 || r->max_tokens < -1)
        return tb_error_set(err, TB_EINVAL, "max_tokens is %d; it must be at least 1",
                            r->max_tokens);
    if (r->n_samples < 1 || r->n_samples > TB_MAX_SAMPLES)
        return tb_error_set(err, TB_EINVAL, "num_samples is %d; it must be from 1 to %d",
                            r->n_samples, TB_MAX_SAMPLES);
    const struct {
        const char *name;
        int value;
    } ks[] = {{"topk_prompt_logprobs", r->topk_prompt_logprobs},
              {"topk_sample_logprobs", r->topk_sample_logprobs},
              {"prompt_alt_tokens_k", r->prompt_alt_tokens_k}};
    for (size_t i = 0; i < TB_ARRAY_LEN(ks); i++)
        if (ks[i].value < 0 || ks[i].value > TB_MAX_TOPK_LOGPROBS)
            return tb_error_set(err, TB_EINVAL, "%s is %d; it must be from 0 to %d", ks[i].name,
                                ks[i].value, TB_MAX_TOPK_LOGPROBS);
    if (r->prompt_logprobs_last_n) {
        if (!r->prompt_logprobs)
            return tb_error_set(err, TB_EINVAL, "prompt_logprobs_last_n needs prompt_logprobs");
        if (r->prompt_logprobs_last_n < 1 || r->prompt_logprobs_last_n > r->n_prompt - 1)
            return tb_error_set(
                err, TB_EINVAL,
                "prompt_logprobs_last_n is %d; it must be from 1 to %d, the prompt's length "
                "less one",
                r->prompt_logprobs_last_n, r->n_prompt - 1);
    }
    return 0;
}

static int check_targets(const struct tb_model *m, const struct tb_sample *r, struct tb_error *err)
{
    const struct tb_tensor *t = &r->target_prompt_logprobs;
    if (!r->has_target_prompt_logprobs) return 0;
    if (t->type != TB_TENSOR_I64 || t->n_dims != 2 || t->shape[0] != r->n_prompt - 1 ||
        t->shape[1] < 1 || t->shape[1] > TB_MAX_TARGETS_K || t->n != t->shape[0] * t->shape[1])
        return tb_error_set(err, TB_EINVAL, "target_prompt_logprobs must be int64 of shape [%d, K]",
                            r->n_prompt - 1);
    for (int64_t i = 0; i < t->n; i++)
        if (t->data.i64[i] < -1 || t->data.i64[i] >= m->cfg.vocab)
            return tb_error_set(
                err, TB_EINVAL,
                "target_prompt_logprobs in row %lld is %lld; token ids are from 0 to %d",
                (long long)(i / t->shape[1]), (long long)t->data.i64[i], m->cfg.vocab - 1);
    return 0;
}

/* Decides max_tokens and checks that one sequence fits the context and the pool. */
static int check_room(struct tb_sampling *s, struct tb_error *err)
{
    const struct tb_model *m = s->m;
    const struct tb_sample *r = s->req;
    int limit = m->opt.max_context;
    int64_t want = (int64_t)r->n_prompt + TB_MAX(r->max_tokens, 1);
    if (want > limit)
        return tb_error_set(
            err, TB_EINVAL,
            "Prompt length plus max_tokens exceeds the model's context window: %d + %d > %d",
            r->n_prompt, TB_MAX(r->max_tokens, 1), limit);
    s->max_tokens = r->max_tokens;
    if (r->max_tokens == -1) { /* the last token drawn needs no page */
        int64_t room = TB_MIN((int64_t)limit, (int64_t)m->kv.n_pages * TB_KV_PAGE + 1);
        s->max_tokens = (int)TB_MAX(room - r->n_prompt, 1);
    }
    int need = tb_kv_pages_for((int64_t)r->n_prompt + s->max_tokens - 1);
    if (need > m->kv.n_pages)
        return tb_error_set(err, TB_ENOMEM,
                            "%d tokens need %d KV pages (%zu MiB); the pool has %d (%zu MiB)",
                            r->n_prompt + s->max_tokens - 1, need,
                            (size_t)need * (m->kv.bytes / (size_t)m->kv.n_pages) >> 20,
                            m->kv.n_pages, m->kv.bytes >> 20);
    return 0;
}

static int make_stops(struct tb_sampling *s, struct tb_error *err)
{
    const struct tb_sample *r = s->req;
    s->eos_stops =
        !r->ignore_eos && (!r->stop_given || r->n_stop_tokens > 0 || r->n_stop_strings > 0);
    if (r->n_stop_strings == 0) return 0;
    if (r->n_stop_strings < 0 || r->n_stop_strings > TB_MAX_STOPS)
        return tb_error_set(err, TB_EINVAL, "stop has %d strings; at most %d are allowed",
                            r->n_stop_strings, TB_MAX_STOPS);
    struct tb_span spans[TB_MAX_STOPS];
    for (int i = 0; i < r->n_stop_strings; i++)
        spans[i] = tb_span_str(r->stop_strings[i]);
    return tb_stop_set_create(s->m->tokenizer, spans, (size_t)r->n_stop_strings, &s->stops, err);
}

/* ---- result arrays of the prompt */

static int make_prompt_results(struct tb_sampling *s, struct tb_error *err)
{
    const struct tb_sample *r = s->req;
    struct tb_result *out = &s->op->result;
    struct tb_arena *a = &s->op->arena;
    size_t P = (size_t)r->n_prompt, k = (size_t)r->topk_prompt_logprobs;
    size_t K = r->has_target_prompt_logprobs ? (size_t)r->target_prompt_logprobs.shape[1] : 0;
    size_t alt = (size_t)r->prompt_alt_tokens_k;
    bool ok = true;
    s->score_from = r->n_prompt - 1;
    if (r->prompt_logprobs) {
        out->prompt_logprobs = tb_arena_try_array(a, P, sizeof(float));
        ok = ok && out->prompt_logprobs;
        for (size_t i = 0; ok && i < P; i++)
            out->prompt_logprobs[i] = NAN;
        s->score_from = r->prompt_logprobs_last_n ? r->n_prompt - 1 - r->prompt_logprobs_last_n : 0;
    }
    if (k) {
        out->topk_prompt_ids = tb_arena_try_array(a, P * k, sizeof(int32_t));
        out->topk_prompt_logprobs = tb_arena_try_array(a, P * k, sizeof(float));
        ok = ok && out->topk_prompt_ids && out->topk_prompt_logprobs;
        for (size_t i = 0; ok && i < P * k; i++) {
            out->topk_prompt_ids[i] = 0;
            out->topk_prompt_logprobs[i] = TB_NO_LOGPROB;
        }
    }
    if (K) {
        out->target_prompt_logprobs = tb_arena_try_array(a, (P - 1) * K, sizeof(float));
        ok = ok && out->target_prompt_logprobs;
    }
    if (alt) {
        out->alt_tokens = tb_arena_try_array(a, (P - 1) * alt, sizeof(int32_t));
        out->alt_logprobs = tb_arena_try_array(a, (P - 1) * alt, sizeof(float));
        ok = ok && out->alt_tokens && out->alt_logprobs;
    }
    if (k || K || alt) s->score_from = 0;
    return ok ? 0 : tb_error_set(err, TB_ENOMEM, "no memory for the prompt's results");
}

static int init(struct tb_sampling *s, struct tb_error *err)
{
    const struct tb_sample *r = s->req;
    int rc = check_tokens(s->m, r, err);
    if (!rc) rc = check_params(r, err);
    if (!rc) rc = check_edits(s->m, r, err);
    if (!rc) rc = check_targets(s->m, r, err);
    if (!rc) rc = check_room(s, err);
    if (!rc) rc = make_stops(s, err);
    if (!rc) rc = make_prompt_results(s, err);
    if (rc) return rc;
    s->seqs = tb_try_calloc((size_t)r->n_samples, sizeof(*s->seqs));
    if (!s->seqs) return tb_error_set(err, TB_ENOMEM, "no memory for %d samples", r->n_samples);
    for (int i = 0; i < r->n_samples; i++) {
        s->seqs[i].s = s;
        s->seqs[i].index = i;
        if (r->filter) s->seqs[i].filter_state = r->filter->start;
        tb_stop_matcher_init(&s->seqs[i].matcher, s->stops);
    }
    s->n_open = r->n_samples;
    return 0;
}

int tb_sampling_create(struct tb_sampling **out, struct tb_model *m,
                       struct tb_adapter_version *version, struct tb_op *op)
{
    struct tb_sampling *s = tb_calloc(1, sizeof(*s));
    s->m = m;
    s->op = op;
    s->req = &op->u.sample;
    s->n_prompt = s->req->n_prompt;
    s->seed = s->req->has_seed ? s->req->seed : tb_random_u64();
    s->root.s = s;
    s->root.index = -1;
    tb_list_init(&s->node);
    int rc = init(s, &op->error);
    if (rc) {
        memset(&op->result, 0, sizeof(op->result));
        tb_sampling_destroy(s);
        return rc;
    }
    if (version) {
        tb_version_ref(version);
        version->sampled = true;
        s->version = version;
    }
    tb_list_push(&m->samplings, &s->node);
    *out = s;
    return 0;
}

static void seq_fini(struct tb_seq *q)
{
    tb_seq_release(q);
    tb_free(q->gen);
    tb_free(q->lps);
    tb_free(q->topk_ids);
    tb_free(q->topk_lps);
    tb_free(q->pages);
    tb_stop_matcher_fini(&q->matcher);
}

void tb_sampling_destroy(struct tb_sampling *s)
{
    if (!s) return;
    tb_list_del(&s->node);
    seq_fini(&s->root);
    for (int i = 0; s->seqs && i < s->req->n_samples; i++)
        seq_fini(&s->seqs[i]);
    tb_free(s->seqs);
    tb_stop_set_destroy(s->stops);
    tb_version_unref(s->version);
    tb_free(s);
}

bool tb_sampling_done(const struct tb_sampling *s)
{
    return s->done;
}

bool tb_sampling_begun(const struct tb_sampling *s)
{
    return s->admitted;
}

/* ---- sequences */

void tb_seq_release(struct tb_seq *q)
{
    for (int i = q->n_pages; i-- > 0;) /* from the last: see prefix.h */
        tb_kv_unref(&q->s->m->kv, q->pages[i]);
    q->n_pages = 0;
    q->n_kv = 0;
    q->n_kept = 0;
}

/* What its page number `at` is kept under; the pages before it are. */
static struct tb_prefix_key page_key(const struct tb_seq *q, int at)
{
    const struct tb_adapter_version *v = q->s->version;
    struct tb_prefix_key key = {.serial = v ? v->serial : 0,
                                .tenant = q->s->op->tenant,
                                .parent = at ? q->pages[at - 1] : TB_PREFIX_NONE};
    for (int i = 0; i < TB_KV_PAGE; i++)
        key.tokens[i] = tb_seq_token(q, at * TB_KV_PAGE + i);
    return key;
}

void tb_seq_find_pages(struct tb_seq *q, int limit)
{
    TB_BUG_ON(q->n_pages);
    for (; q->n_pages < limit / TB_KV_PAGE; q->n_pages++) {
        struct tb_prefix_key key = page_key(q, q->n_pages);
        int32_t page = tb_kv_find(&q->s->m->kv, &key);
        if (page < 0) break;
        q->pages[q->n_pages] = page;
    }
    q->n_kept = q->n_pages;
    q->n_kv = q->n_pages * TB_KV_PAGE;
}

void tb_seq_keep_pages(struct tb_seq *q)
{
    for (; q->n_kept < q->n_kv / TB_KV_PAGE; q->n_kept++) {
        struct tb_prefix_key key = page_key(q, q->n_kept);
        q->pages[q->n_kept] = tb_kv_keep(&q->s->m->kv, &key, q->pages[q->n_kept]);
    }
}

bool tb_seq_reserve_pages(struct tb_seq *q, int n)
{
    if (n <= q->cap_pages) return true;
    int cap = TB_MAX(n, q->cap_pages * 2);
    int32_t *p = tb_try_realloc(q->pages, (size_t)cap * sizeof(*p));
    if (!p) return false;
    q->pages = p;
    q->cap_pages = cap;
    return true;
}

int tb_sampling_fork(struct tb_sampling *s)
{
    struct tb_seq *root = &s->root;
    for (int i = 0; i < s->req->n_samples; i++) {
        struct tb_seq *q = &s->seqs[i];
        if (q->state == TB_SEQ_DONE) continue;
        if (!tb_seq_reserve_pages(q, root->n_pages)) {
            tb_sampling_fail(s, TB_ENOMEM, "no memory for a sample's page table");
            return TB_ENOMEM;
        }
        for (int j = 0; j < root->n_pages; j++) {
            tb_kv_ref(&s->m->kv, root->pages[j]);
            q->pages[j] = root->pages[j];
        }
        q->n_pages = root->n_pages;
        q->n_kv = root->n_kv;
        q->n_kept = root->n_kept;
        q->state = TB_SEQ_RUNNING;
    }
    tb_seq_release(root);
    root->state = TB_SEQ_DONE;
    s->forked = true;
    return 0;
}

void tb_sampling_fail(struct tb_sampling *s, int code, const char *msg)
{
    if (s->done) return;
    s->done = true;
    tb_error_set(&s->op->error, code, "%s", msg);
    memset(&s->op->result, 0, sizeof(s->op->result));
    tb_seq_release(&s->root);
    s->root.state = TB_SEQ_DONE;
    for (int i = 0; i < s->req->n_samples; i++) {
        tb_seq_release(&s->seqs[i]);
        s->seqs[i].state = TB_SEQ_DONE;
    }
}

/* All samples are done: their arrays move into the op's arena. */
static void finish(struct tb_sampling *s)
{
    struct tb_arena *a = &s->op->arena;
    size_t n_samples = (size_t)s->req->n_samples, k = (size_t)s->req->topk_sample_logprobs;
    struct tb_sequence *out = tb_arena_try_array(a, n_samples, sizeof(*out));
    bool ok = out != NULL;
    for (size_t i = 0; i < n_samples && ok; i++) {
        const struct tb_seq *q = &s->seqs[i];
        size_t n = (size_t)q->n_gen;
        out[i] = (struct tb_sequence){.stopped = q->stopped, .n = q->n_gen};
        out[i].tokens = tb_arena_try_array(a, n, sizeof(int32_t));
        out[i].logprobs = tb_arena_try_array(a, n, sizeof(float));
        ok = out[i].tokens && out[i].logprobs;
        if (!ok) break;
        memcpy(out[i].tokens, q->gen, n * sizeof(int32_t));
        memcpy(out[i].logprobs, q->lps, n * sizeof(float));
        if (!k) continue;
        out[i].topk_ids = tb_arena_try_array(a, n * k, sizeof(int32_t));
        out[i].topk_logprobs = tb_arena_try_array(a, n * k, sizeof(float));
        ok = out[i].topk_ids && out[i].topk_logprobs;
        if (!ok) break;
        memcpy(out[i].topk_ids, q->topk_ids, n * k * sizeof(int32_t));
        memcpy(out[i].topk_logprobs, q->topk_lps, n * k * sizeof(float));
    }
    if (!ok) {
        tb_sampling_fail(s, TB_ENOMEM, "no memory for the samples' results");
        return;
    }
    s->op->result.n_sequences = s->req->n_samples;
    s->op->result.sequences = out;
    s->done = true;
}

static bool grow(struct tb_seq *q)
{
    if (q->n_gen < q->cap_gen) return true;
    size_t cap = (size_t)TB_MIN(TB_MAX(q->cap_gen * 2, 32), q->s->max_tokens);
    size_t k = (size_t)q->s->req->topk_sample_logprobs;
    int32_t *gen = tb_try_realloc(q->gen, cap * sizeof(*gen));
    if (gen) q->gen = gen;
    float *lps = tb_try_realloc(q->lps, cap * sizeof(*lps));
    if (lps) q->lps = lps;
    bool ok = gen && lps;
    if (k) {
        int32_t *ids = tb_try_realloc(q->topk_ids, cap * k * sizeof(*ids));
        if (ids) q->topk_ids = ids;
        float *t = tb_try_realloc(q->topk_lps, cap * k * sizeof(*t));
        if (t) q->topk_lps = t;
        ok = ok && ids && t;
    }
    if (ok) q->cap_gen = (int)cap;
    return ok;
}

/* Token stops, EOS, then stop strings; the matcher is fed every token. */
static bool stops_at(struct tb_seq *q, int32_t token)
{
    const struct tb_sampling *s = q->s;
    bool stop = s->stops && tb_stop_matcher_feed(&q->matcher, token);
    for (int i = 0; i < s->req->n_stop_tokens; i++)
        stop |= s->req->stop_tokens[i] == token;
    for (int i = 0; s->eos_stops && i < s->m->info.n_eos; i++)
        stop |= s->m->eos[i] == token;
    return stop;
}

void tb_seq_accept(struct tb_seq *q, int32_t token, float lp, const int32_t *topk_ids,
                   const float *topk_lps)
{
    struct tb_sampling *s = q->s;
    if (s->done) return;
    if (!grow(q)) {
        tb_sampling_fail(s, TB_ENOMEM, "no memory for a sample's tokens");
        return;
    }
    size_t k = (size_t)s->req->topk_sample_logprobs, at = (size_t)q->n_gen;
    q->gen[at] = token;
    q->lps[at] = lp;
    if (k) {
        memcpy(q->topk_ids + at * k, topk_ids, k * sizeof(*topk_ids));
        memcpy(q->topk_lps + at * k, topk_lps, k * sizeof(*topk_lps));
    }
    q->n_gen++;
    q->stopped = stops_at(q, token);
    struct tb_token_filter *filter = s->req->filter;
    if (filter && !q->stopped)
        q->filter_state = filter->accept(filter, q->filter_state, token, &q->stopped);
    if (!q->stopped && q->n_gen < s->max_tokens) return;
    q->state = TB_SEQ_DONE;
    tb_seq_release(q);
    if (--s->n_open == 0) finish(s);
}

struct tb_progress *tb_sampling_progress(struct tb_sampling *s)
{
    size_t n = 0, k = (size_t)s->req->topk_sample_logprobs;
    if (!s->req->stream || s->op->error.code) return NULL;
    for (int i = 0; i < s->req->n_samples; i++)
        n += (size_t)(s->seqs[i].n_gen - s->seqs[i].n_told);
    if (n == 0) return NULL;
    struct tb_progress *p = tb_try_malloc(
        sizeof(*p) + n * (sizeof(p->tokens[0]) + k * (sizeof(int32_t) + sizeof(float))));
    if (!p) return NULL;
    int32_t *ids = (int32_t *)(void *)(p->tokens + n);
    float *lps = (float *)(void *)(ids + n * k);
    tb_list_init(&p->node);
    p->n = 0;
    for (int i = 0; i < s->req->n_samples; i++) {
        struct tb_seq *q = &s->seqs[i];
        for (; q->n_told < q->n_gen; q->n_told++, ids += k, lps += k) {
            size_t at = (size_t)q->n_told;
            bool last = q->state == TB_SEQ_DONE && q->n_told + 1 == q->n_gen;
            struct tb_sampled_token *t = &p->tokens[p->n++];
            *t = (struct tb_sampled_token){i,
                                           q->gen[at],
                                           q->lps[at],
                                           last,
                                           last && q->stopped,
                                           k ? ids : NULL,
                                           k ? lps : NULL};
            if (!k) continue;
            memcpy(ids, q->topk_ids + at * k, k * sizeof(*ids));
            memcpy(lps, q->topk_lps + at * k, k * sizeof(*lps));
        }
    }
    return p;
}
