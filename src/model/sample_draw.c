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

/* Draws q's next token from a changed copy of its row; nothing when the op has failed. */
static void draw_edited(struct tb_step *st, const struct tb_seq *q, const float *logits,
                        const struct tb_draw *d, int32_t *token)
{
    const struct tb_backend_ops *ops = st->m->be->ops;
    int V = st->m->cfg.vocab;
    bool filter = q->s->req->filter != NULL;
    if (filter && !make_allow(st, q)) return;
    int n = make_edits(st, q);
    ops->copy(st->m->be, st->edit_row, logits, (size_t)V * sizeof(*logits));
    ops->edit_logits(st->m->be, st->edit_row, V, st->edits, n, filter ? st->allow : NULL);
    ops->draw(st->m->be, st->edit_row, 1, V, V, d, token);
}

/* The k best of one row, padded where the vocabulary is smaller. */
static void topk_row(struct tb_step *st, const float *logits, const float *lse, int k, int32_t *ids,
                     float *lps)
{
    int V = st->m->cfg.vocab, n = TB_MIN(k, V);
    st->m->be->ops->topk(st->m->be, logits, 1, V, V, lse, n, ids, lps);
    for (int i = n; i < k; i++) {
        ids[i] = 0;
        lps[i] = -99999.0f;
    }
}

static void accept(struct tb_step *st, struct tb_seq *q, int32_t token, float lp,
                   const float *logits, const float *lse)
{
    int k = q->s->req->topk_sample_logprobs;
    if (k) topk_row(st, logits, lse, k, st->k_ids, st->k_lps);
    if (st->m->be->lost) return; /* these are no results */
    tb_seq_accept(q, token, lp, st->k_ids, st->k_lps);
}

/* Row `pos` of a prompt scores the token after it. */
static void score_prompt(struct tb_step *st, const struct tb_step_row *o, const float *logits,
                         const float *lse, float lp)
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
    if (out->topk_prompt_ids) {
        size_t k = (size_t)r->topk_prompt_logprobs;
        topk_row(st, logits, lse, (int)k, out->topk_prompt_ids + (at + 1) * k,
                 out->topk_prompt_logprobs + (at + 1) * k);
    }
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

/* The end of a prompt with several samples: one draw each from the same row. */
static void first_draws(struct tb_step *st, struct tb_sampling *s, const float *logits,
                        const float *lse)
{
    const struct tb_backend_ops *ops = st->m->be->ops;
    int V = st->m->cfg.vocab;
    for (int i = 0; i < s->req->n_samples && !s->done; i++) {
        struct tb_draw d = draw_of(&s->seqs[i]);
        int32_t token = 0;
        float scratch, lp;
        if (tb_step_edits_logits(s->req))
            draw_edited(st, &s->seqs[i], logits, &d, &token);
        else
            ops->draw(st->m->be, logits, 1, V, V, &d, &token);
        ops->logprobs(st->m->be, logits, 1, V, V, &token, 1, &scratch, &lp);
        accept(st, &s->seqs[i], token, lp, logits, lse);
    }
}

void tb_step_block(struct tb_step *st, struct tb_pass *p, int from, int n)
{
    const struct tb_backend_ops *ops = st->m->be->ops;
    int V = st->m->cfg.vocab;
    /* The block's rows [d0, d1) draw one token each. */
    int d0 = TB_MIN(TB_MAX(st->n_score - from, 0), n);
    int d1 = TB_MIN(TB_MAX(st->n_score + st->n_single - from, 0), n);
    tb_head_logits(p, from, n);
    for (int i = d0; i < d1; i++)
        st->draws[i] = draw_of(st->out[from + i].q);
    if (d1 > d0)
        ops->draw(st->m->be, p->logits + (size_t)d0 * (size_t)V, d1 - d0, V, V, st->draws + d0,
                  st->drawn + d0);
    for (int i = d0; i < d1; i++) {
        const struct tb_seq *q = st->out[from + i].q;
        if (tb_step_edits_logits(q->s->req) && !q->s->done)
            draw_edited(st, q, p->logits + (size_t)i * (size_t)V, &st->draws[i], &st->drawn[i]);
    }
    for (int i = 0; i < d0; i++) {
        const struct tb_step_row *o = &st->out[from + i];
        st->drawn[i] = o->q->s->req->prompt[o->pos + 1];
    }
    for (int i = d1; i < n; i++)
        st->drawn[i] = -1;
    ops->logprobs(st->m->be, p->logits, n, V, V, st->drawn, 1, st->lse, st->lp);
    for (int i = 0; i < n; i++) {
        struct tb_step_row *o = &st->out[from + i];
        const float *row = p->logits + (size_t)i * (size_t)V;
        if (o->q->s->done || st->m->be->lost) continue;
        if (!isfinite(st->lse[i]))
            tb_sampling_fail(o->q->s, TB_ENONFINITE, "the model's logits are not finite");
        else if (i < d0)
            score_prompt(st, o, row, &st->lse[i], st->lp[i]);
        else if (i < d1)
            accept(st, o->q, st->drawn[i], st->lp[i], row, &st->lse[i]);
        else
            first_draws(st, o->q->s, row, &st->lse[i]);
    }
}
