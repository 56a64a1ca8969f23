/*
 * A step of sampling (sample_step.c) and its parts: what advances (sample_choose.c) and what comes
 * of the logits (sample_draw.c). Private to these.
 *
 * Owner: struct tb_step lives for one call of tb_model_sample_step. Thread: the model's.
 */
#ifndef TB_MODEL_SAMPLE_STEP_H
#define TB_MODEL_SAMPLE_STEP_H

#include "model/pass.h"
#include "model/sampling.h"

struct tb_step_entry { /* a sequence's rows in this step */
    struct tb_seq *q;
    int n;     /* rows */
    int row;   /* first packed row */
    int order; /* of choice */
    bool last; /* reaches its last token: a draw follows */
};

struct tb_step_row { /* a row whose logits are wanted */
    struct tb_seq *q;
    int row; /* packed */
    int pos; /* position in the sequence */
};

struct tb_step {
    struct tb_model *m;
    int budget;  /* prefill rows */
    int rows;    /* in all, at most */
    int n_ready; /* samplings whose weights are held, and their largest rank */
    int ru;
    int n_running; /* sequences that hold pages */
    int n_fills, cap_fills, n_turns;
    struct tb_step_fill *fills; /* sample_choose.c has these two */
    struct tb_step_turn *turns; /* [n_turns] */
    int n, cap;
    struct tb_step_entry *entries;
    int T;
    int32_t *tokens, *pos;
    struct tb_attn_seq *seqs;
    struct tb_lora_rows *lora, *out_lora;
    int n_out; /* rows with logits: those that score a prompt, then n_single that draw one token
                  each, then ends of prompts with several samples */
    int n_score, n_single;
    struct tb_step_row *out;
    struct tb_draw *draws; /* [head_rows] */
    int32_t *drawn;        /* [head_rows] */
    float *lse, *lp;       /* [head_rows] */
    int32_t *k_ids;        /* [most k] scratch */
    float *k_lps;
    int top;          /* most of topk_sample_logprobs, and no more than the vocabulary; else 0 */
    int32_t *top_ids; /* [head_rows, top]: the best of the rows that draw */
    float *top_lps;
    bool edits_logits; /* some draw does; then there is also */
    struct tb_logit_edit *edits;
    int32_t *edit_at; /* [vocab]: 1 + an id's place in edits, or 0 */
    uint64_t *allow;  /* [vocab / 64 + 1] */
};

/* ---- sample_choose.c */
/* Holds the weights of as many samplings as there is room for, those with pages first, else in the
 * order of precedence, and decides how many rows the step may have. */
void tb_step_hold_weights(struct tb_step *st);
void tb_step_release_weights(struct tb_sampling *const *s, int n);
/* The entries of the step, with pages for their rows. */
void tb_step_choose(struct tb_step *st);

/* ---- sample_draw.c */
bool tb_step_edits_logits(const struct tb_sample *r); /* draws are from a changed row */
/* The head for rows [from, from + n) of st->out, at most head_rows, and what is done with them. */
void tb_step_block(struct tb_step *st, struct tb_pass *p, int from, int n);

#endif
