/*
 * A sample op in progress: the prompt's own sequence, which is prefilled once, and the samples that
 * fork from it and share its pages. sampling.c makes, checks and finishes them; sample_step.c runs
 * them.
 *
 * Owner: the engine holds struct tb_sampling; the model lists all of them, oldest first, which is
 * also the order in which they get pages. Thread: the model's.
 */
#ifndef TB_MODEL_SAMPLING_H
#define TB_MODEL_SAMPLING_H

#include "model/internal.h"

#define TB_NO_LOGPROB (-99999.0f) /* padding of top-k cells */

enum tb_seq_state {
    TB_SEQ_WAITING, /* holds no pages; all its tokens are to be computed (again) */
    TB_SEQ_RUNNING,
    TB_SEQ_DONE,
};

struct tb_seq {
    struct tb_sampling *s;
    int index; /* of the sample; -1: the prompt */
    enum tb_seq_state state;
    int n_gen, cap_gen; /* tokens drawn */
    int32_t *gen;
    float *lps;
    int32_t *topk_ids; /* [n_gen, topk_sample_logprobs] or NULL */
    float *topk_lps;
    int n_kv;   /* positions whose keys and values are in pages */
    int n_kept; /* of its pages, from the first: those that the pool keeps for others */
    int n_pages, cap_pages;
    int32_t *pages;
    struct tb_stop_matcher matcher;
    bool stopped;
    int n_told;            /* tokens that tb_sampling_progress has told */
    uint64_t filter_state; /* of the op's token filter */
};

struct tb_sampling {
    struct tb_list node; /* in model->samplings */
    struct tb_model *m;
    struct tb_adapter_version *version; /* NULL: base */
    struct tb_op *op;
    const struct tb_sample *req;
    uint64_t seed;
    int n_prompt, max_tokens;
    bool eos_stops;
    int score_from; /* first prompt row whose logits are wanted; n_prompt - 1: only the last */
    struct tb_stop_set *stops;
    struct tb_seq root;
    bool admitted;       /* the prompt has begun; what was found of it is reported */
    bool forked;         /* the prompt is through; the samples live */
    struct tb_seq *seqs; /* [n_samples] */
    int n_open;          /* samples not done */
    bool done;
    bool chosen; /* in the step at hand */
    bool ready;  /* chosen, and its weights are held */
};

static inline int tb_seq_tokens(const struct tb_seq *q)
{
    return q->s->n_prompt + q->n_gen;
}
static inline int32_t tb_seq_token(const struct tb_seq *q, int at)
{
    return at < q->s->n_prompt ? q->s->req->prompt[at] : q->gen[at - q->s->n_prompt];
}

void tb_seq_release(struct tb_seq *q); /* gives its pages back */
/* Room for n page numbers; false when memory is out. */
bool tb_seq_reserve_pages(struct tb_seq *q, int n);
/* Takes pages that hold this sequence's first tokens, at most `limit` tokens, from those that the
 * pool kept; the sequence must hold none. Room for the page numbers must be there. */
void tb_seq_find_pages(struct tb_seq *q, int limit);
/* Has the pool keep the pages that are full by now. */
void tb_seq_keep_pages(struct tb_seq *q);
/* The prompt's pages become the samples'. */
int tb_sampling_fork(struct tb_sampling *s);
/* Appends a drawn token; topk arrays hold topk_sample_logprobs entries or are NULL. Ends the
 * sample, and with the last one the op, when it is time. */
void tb_seq_accept(struct tb_seq *q, int32_t token, float lp, const int32_t *topk_ids,
                   const float *topk_lps);
void tb_sampling_fail(struct tb_sampling *s, int code, const char *msg);

#endif
