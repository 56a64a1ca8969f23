/*
 * What a step of sampling does with a block of logits: edits of rows, draws, scores of prompts
 * (sample_step.h).
 *
 * Owner: nothing. Thread: the model's.
 */
#include <math.h>
#include <string.h>

#include "model/sample_step.h"
#include "model/train.h"
#include "util/philox.h"

#define TB_ALT_STREAM 1 /* Philox stream of prompt_alt_tokens; 0 draws the samples */

bool tb_step_edits_logits(const struct tb_sample *r)
{
    return r->filter || r->n_logit_bias || r->presence_penalty || r->frequency_penalty ||
           (r->repetition_penalty && r->repetition_penalty != 1);
}

static struct tb_draw draw_of(const struct tb_seq *q)
{
    const struct tb_sample *r = q->s->req;
    return (struct tb_draw){r->temperature, r->top_k, r->top_p,
                            tb_philox_draw(q->s->seed, (uint32_t)q->index, (uint32_t)q->n_gen, 0),
                            r->min_p};
}

static struct tb_logit_edit *edit_of(struct tb_step *st, int32_t id, int *n)
{
    if (!st->edit_at[id]) {
        st->edits[*n] = (struct tb_logit_edit){.id = id, .repeat = 1};
        st->edit_at[id] = ++*n;
    }
    return &st->edits[st->edit_at[id] - 1];
}

/* Fills st->edits for the next token of q; returns how many. */
static int make_edits(struct tb_step *st, const struct tb_seq *q)
{
    const struct tb_sample *r = q->s->req;
    int n = 0, total = tb_seq_tokens(q);
    for (int i = 0; i < r->n_logit_bias; i++)
        edit_of(st, r->logit_bias_tokens[i], &n)->bias = r->logit_bias[i];
    if (r->repetition_penalty && r->repetition_penalty != 1) {
        int from = r->repetition_last_n ? TB_MAX(total - r->repetition_last_n, 0) : 0;
        for (int at = from; at < total; at++)
            edit_of(st, tb_seq_token(q, at), &n)->repeat = r->repetition_penalty;
    }
    if (r->presence_penalty || r->frequency_penalty) {
        for (int i = 0; i < q->n_gen; i++)
            edit_of(st, q->gen[i], &n)->minus += 1;
        for (int i = 0; i < n; i++)
            if (st->edits[i].minus > 0)
                st->edits[i].minus =
                    r->presence_penalty + r->frequency_penalty * st->edits[i].minus;
    }
    for (int i = 0; i < n; i++)
        st->edit_at[st->edits[i].id] = 0;
    return n;
}

/* Fills st->allow from the op's filter; false when the op has failed. */
static bool make_allow(struct tb_step *st, const struct tb_seq *q)
{
    const struct tb_model *m = st->m;
    struct tb_token_filter *f = q->s->req->filter;
    size_t words = (size_t)(m->cfg.vocab + 63) / 64;
    bool may_end = false, any = false;
    const uint64_t *mask = f->mask(f, q->filter_state, q->s->max_tokens - q->n_gen, &may_end);
    if (!mask) {
        tb_sampling_fail(q->s, TB_ENOMEM,
                         "the states of the sample's grammar take more than they may");
        return false;
    }
    memcpy(st->allow, mask, words * sizeof(*mask));
    for (int i = 0; may_end && q->s->eos_stops && i < m->info.n_eos; i++)
        if (m->eos[i] < m->cfg.vocab) st->allow[m->eos[i] / 64] |= (uint64_t)1 << (m->eos[i] % 64);
    for (size_t i = 0; i < words; i++)
        any |= st->allow[i] != 0;
    if (!any) tb_sampling_fail(q->s, TB_EINVAL, "the sample's grammar allows no token");
    return any;
}

/* A copy of q's row, changed for its next draw; false when the op has failed. */
static bool make_edited(struct tb_step *st, const struct tb_seq *q, const float *logits,
                        float *copy)
{
    const struct tb_backend_ops *ops = st->m->be->ops;
    int V = st->m->cfg.vocab;
    bool filter = q->s->req->filter != NULL;
    if (filter && !make_allow(st, q)) return false;
    int n = make_edits(st, q);
    ops->copy(st->m->be, copy, logits, (size_t)V * sizeof(*logits));
    ops->edit_logits(st->m->be, copy, V, st->edits, n, filter ? st->allow : NULL);
    return true;
}

static const float *top_lps(const struct tb_step *st, int row)
{
    return st->top_lps + (size_t)row * (size_t)st->top;
}

/* Row `row` of the block has drawn. */
static void accept(struct tb_step *st, struct tb_seq *q, int32_t token, float lp, int row)
{
    int k = q->s->req->topk_sample_logprobs;
    for (int i = 0; i < k; i++) { /* padded where the vocabulary is smaller */
        bool there = i < st->top;
        st->k_ids[i] = there ? st->top_ids[(size_t)row * (size_t)st->top + (size_t)i] : 0;
        st->k_lps[i] = there ? top_lps(st, row)[i] : TB_NO_LOGPROB;
    }
    if (st->m->be->lost) return; /* these are no results */
    tb_seq_accept(q, token, lp, st->k_ids, st->k_lps);
}

/* The best of rows [i0, i1) of the block, which all draw. */
static void take_tops(struct tb_step *st, const float *logits, int i0, int i1)
{
    size_t V = (size_t)st->m->cfg.vocab, at = (size_t)i0 * (size_t)st->top;
    if (i1 > i0)
        st->m->be->ops->topk(st->m->be, logits + (size_t)i0 * V, i1 - i0, (int)V, (int)V,
                             st->lse + i0, st->top, st->top_ids + at, st->top_lps + at);
}

/* The best of a prompt's rows [i0, i1) of the block, which follow each other, into its result. */
static void score_tops(struct tb_step *st, const struct tb_step_row *first, const float *logits,
                       int i0, int i1)
{
    const struct tb_sampling *s = first->q->s;
    struct tb_result *out = &s->op->result;
    size_t V = (size_t)st->m->cfg.vocab, k = (size_t)s->req->topk_prompt_logprobs;
    size_t n = TB_MIN(k, V), at = ((size_t)first->pos + 1) * k;
    int rows = n == k ? i1 - i0 : 1; /* at once: results have no gaps then */
    for (int i = i0; i < i1; i += rows, at += k) {
        st->m->be->ops->topk(st->m->be, logits + (size_t)i * V, rows, (int)V, (int)V, st->lse + i,
                             (int)n, out->topk_prompt_ids + at, out->topk_prompt_logprobs + at);
        for (size_t j = n; j < k; j++) {
            out->topk_prompt_ids[at + j] = 0;
            out->topk_prompt_logprobs[at + j] = TB_NO_LOGPROB;
        }
    }
}

/* Row `pos` of a prompt scores the token after it. */
static void score_prompt(struct tb_step *st, const struct tb_step_row *o, const float *logits,
                         float lp)
{
    const struct tb_sampling *s = o->q->s;
    const struct tb_sample *r = s->req;
    struct tb_result *out = &s->op->result;
    const struct tb_backend_ops *ops = st->m->be->ops;
    int V = st->m->cfg.vocab;
    size_t at = (size_t)o->pos;
    float scratch;
    bool wanted =
        !r->prompt_logprobs_last_n || o->pos + 1 >= r->n_prompt - r->prompt_logprobs_last_n;
    if (out->prompt_logprobs && wanted) out->prompt_logprobs[at + 1] = lp;
    if (out->target_prompt_logprobs) {
        size_t K = (size_t)r->target_prompt_logprobs.shape[1];
        for (size_t j = 0; j < K; j++)
            st->k_ids[j] = (int32_t)r->target_prompt_logprobs.data.i64[at * K + j];
        ops->logprobs(st->m->be, logits, 1, V, V, st->k_ids, (int)K, &scratch,
                      out->target_prompt_logprobs + at * K);
    }
    if (out->alt_tokens) {
        size_t k = (size_t)r->prompt_alt_tokens_k;
        int32_t *ids = out->alt_tokens + at * k;
        for (size_t j = 0; j < k; j++) {
            struct tb_draw d = {
                r->temperature, -1, 1,
                tb_philox_draw(s->seed, (uint32_t)j, (uint32_t)(at + 1), TB_ALT_STREAM)};
            ops->draw(st->m->be, logits, 1, V, V, &d, ids + j);
        }
        ops->logprobs(st->m->be, logits, 1, V, V, ids, (int)k, &scratch,
                      out->alt_logprobs + at * k);
    }
}

/* Row `row` of the block is the end of a prompt with several samples: one draw each. */
static void first_draws(struct tb_step *st, struct tb_sampling *s, const float *logits, int row,
                        float *copy)
{
    const struct tb_backend_ops *ops = st->m->be->ops;
    int V = st->m->cfg.vocab;
    if (s->req->topk_sample_logprobs) take_tops(st, logits - (size_t)row * (size_t)V, row, row + 1);
    for (int i = 0; i < s->req->n_samples && !s->done; i++) {
        struct tb_draw d = draw_of(&s->seqs[i]);
        const float *from = logits;
        int32_t token = 0;
        float scratch, lp;
        if (tb_step_edits_logits(s->req)) {
            if (!make_edited(st, &s->seqs[i], logits, copy)) return;
            from = copy;
        }
        ops->draw(st->m->be, from, 1, V, V, &d, &token);
        ops->logprobs(st->m->be, logits, 1, V, V, &token, 1, &scratch, &lp);
        accept(st, &s->seqs[i], token, lp, row);
    }
}

/* ---- a block's rows that draw one token each: [d0, d1). spare: memory behind the block's rows for
 * n_spare changed copies, one at least. */

static void draw_plain(struct tb_step *st, const float *logits, int i0, int i1)
{
    size_t V = (size_t)st->m->cfg.vocab;
    if (i1 > i0)
        st->m->be->ops->draw(st->m->be, logits + (size_t)i0 * V, i1 - i0, (int)V, (int)V,
                             st->draws + i0, st->drawn + i0);
}

/* From changed copies; those of ops that have failed draw in vain. */
static void draw_edited(struct tb_step *st, const struct tb_step_row *out, const float *logits,
                        int i0, int i1, float *spare)
{
    const struct tb_backend_ops *ops = st->m->be->ops;
    size_t V = (size_t)st->m->cfg.vocab;
    for (int i = i0; i < i1; i++) {
        const float *row = logits + (size_t)i * V;
        float *copy = spare + (size_t)(i - i0) * V;
        if (out[i].q->s->done || !make_edited(st, out[i].q, row, copy))
            ops->copy(st->m->be, copy, row, V * sizeof(*row));
    }
    ops->draw(st->m->be, spare, i1 - i0, (int)V, (int)V, st->draws + i0, st->drawn + i0);
}

/* Rows as much alike as can be drawn at once. */
static void draw_rows(struct tb_step *st, const struct tb_step_row *out, const float *logits,
                      int d0, int d1, float *spare, int n_spare)
{
    for (int i = d0, j; i < d1; i = j) {
        bool edited = tb_step_edits_logits(out[i].q->s->req);
        for (j = i + 1; j < d1 && tb_step_edits_logits(out[j].q->s->req) == edited; j++)
            if (edited && j - i == n_spare) break;
        if (edited)
            draw_edited(st, out, logits, i, j, spare);
        else
            draw_plain(st, logits, i, j);
    }
}

/* ---- the best tokens, of rows next to each other at once */

static bool counts(const struct tb_step *st, const struct tb_step_row *o, int i)
{
    return !o->q->s->done && isfinite(st->lse[i]);
}

static void score_top_rows(struct tb_step *st, const struct tb_step_row *out, const float *logits,
                           int n)
{
    for (int i = 0, j; i < n; i = j) {
        const struct tb_seq *q = out[i].q;
        j = i + 1;
        if (!q->s->req->topk_prompt_logprobs || !counts(st, &out[i], i)) continue;
        while (j < n && out[j].q == q && out[j].pos == out[i].pos + j - i && counts(st, &out[j], j))
            j++;
        score_tops(st, &out[i], logits, i, j);
    }
}

static void take_top_rows(struct tb_step *st, const struct tb_step_row *out, const float *logits,
                          int d0, int d1)
{
    for (int i = d0, j; i < d1; i = j) {
        for (j = i; j < d1 && out[j].q->s->req->topk_sample_logprobs && counts(st, &out[j], j); j++)
            ;
        take_tops(st, logits, i, j);
        if (j == i) j++;
    }
}

void tb_step_block(struct tb_step *st, struct tb_pass *p, int from, int n)
{
    const struct tb_backend_ops *ops = st->m->be->ops;
    const struct tb_step_row *out = st->out + from;
    int V = st->m->cfg.vocab, n_spare = st->m->head_rows + 1 - n;
    float *spare = p->logits + (size_t)n * (size_t)V; /* behind the block's rows: one at least */
    /* The block's rows [d0, d1) draw one token each. */
    int d0 = TB_MIN(TB_MAX(st->n_score - from, 0), n);
    int d1 = TB_MIN(TB_MAX(st->n_score + st->n_single - from, 0), n);
    tb_head_logits(p, from, n);
    for (int i = 0; i < d0; i++)
        st->drawn[i] = out[i].q->s->req->prompt[out[i].pos + 1];
    for (int i = d0; i < d1; i++)
        st->draws[i] = draw_of(out[i].q);
    draw_rows(st, out, p->logits, d0, d1, spare, n_spare);
    for (int i = d1; i < n; i++)
        st->drawn[i] = -1;
    ops->logprobs(st->m->be, p->logits, n, V, V, st->drawn, 1, st->lse, st->lp);
    score_top_rows(st, out, p->logits, d0);
    take_top_rows(st, out, p->logits, d0, d1);
    for (int i = 0; i < n; i++) {
        struct tb_sampling *s = out[i].q->s;
        const float *row = p->logits + (size_t)i * (size_t)V;
        if (s->done || st->m->be->lost) continue;
        if (!isfinite(st->lse[i]))
            tb_sampling_fail(s, TB_ENONFINITE, "the model's logits are not finite");
        else if (i < d0)
            score_prompt(st, &out[i], row, st->lp[i]);
        else if (i < d1)
            accept(st, out[i].q, st->drawn[i], st->lp[i], i);
        else
            first_draws(st, s, row, i, spare);
    }
}
