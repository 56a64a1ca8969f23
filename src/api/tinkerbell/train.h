/*
 * A training job of the Tinkerbell face: train_data.c reads its body and makes its ops, train.c
 * runs them and answers. Private to these.
 *
 * Owner: it lies in the job's arena. Thread: the pool while the job is prepared or its result is
 * read, else the loop's.
 */
#ifndef TB_API_TINKERBELL_TRAIN_H
#define TB_API_TINKERBELL_TRAIN_H

#include "api/tinkerbell/tinkerbell.h"

struct tb_bell_means { /* over samples, of what each sample's tokens give */
    double tokens, weighted, nll, perplexity;
    bool has_ratios;
    double advantage, ratio, ratio_max, ratio_min, clipped;
};

struct tb_bell_train {
    const struct tb_llm_model *base;
    struct tb_datum *data;
    int32_t n;
    const char *loss_fn; /* as it was asked for */
    const char *op_loss; /* what computes it */
    double kl_coeff;
    bool **padding; /* of each sample, or NULL */
    bool rewards;
    double loss_sum, kl; /* results */
    struct tb_bell_means means;
    float **logprobs;         /* of the first pass, for the divergence */
    const struct tb_op *done; /* held while its result is read */
};

/* Of forward and forward_backward: j->own becomes a struct tb_bell_train, and j->made its ops: the
 * one that was asked for and, with kl_coeff, a forward of the reference. */
int tb_bell_train_prepare(struct tb_bell_job *j, const struct tb_json *root, struct tb_error *err);

#endif
