/*
 * Losses: a table of rows, each a name, the inputs and settings it takes, and a function from
 * target logprobs to loss and dL/dlogprob (numerics: sums over positions and data, never means).
 * Adding a loss is adding a row.
 *
 * Owner: the caller; prepared inputs live in the arena given. Thread: any.
 */
#ifndef TB_MODEL_LOSS_H
#define TB_MODEL_LOSS_H

#include <stdbool.h>
#include <stdint.h>

#include "op/op.h"
#include "util/arena.h"
#include "util/error.h"

/* A datum's inputs, checked: [n] or, for targets, weights, logprobs out and g, [n, k]. */
struct tb_loss_inputs {
    int n, k;
    bool two_d; /* outputs keep the shape [n, k] */
    const int32_t *targets;
    const float *weights;  /* NULL: ones */
    const float *logprobs; /* q, the sampler's */
    const float *advantages;
    const float *mask;          /* sequence_ratio_mask */
    const float *lo_at, *hi_at; /* per-position thresholds or NULL */
    double lo, hi, beta;
};

struct tb_loss {
    const char *name;
    bool unsupported; /* known, but not served */
    bool custom;      /* a graph of the client's (custom/graph.h) in the place of eval */
    bool whole;       /* dL/dlogprob of a position depends on the datum's other logprobs */
    bool two_d;       /* accepts targets [n, k] */
    unsigned required, optional; /* bits of enum tb_loss_input beyond target_tokens */
    double lo, hi, beta;         /* defaults of the settings */
    unsigned settings;           /* bits of enum tb_loss_setting */
    /* Positions i0 <= i < i1: adds to *loss and fills g[i0*k .. i1*k) with dL/dlogprob from lp
     * [n*k]. On a number that is not finite returns that position, else -1. whole losses get i0 =
     * 0, i1 = n. */
    int (*eval)(const struct tb_loss_inputs *in, int i0, int i1, const float *lp, float *g,
                double *loss);
};

enum tb_loss_input {
    TB_IN_WEIGHTS = 1,
    TB_IN_LOGPROBS = 2,
    TB_IN_ADVANTAGES = 4,
    TB_IN_MASK = 8,
    TB_IN_LO = 16,
    TB_IN_HI = 32,
};
enum tb_loss_setting { TB_SET_LO = 1, TB_SET_HI = 2, TB_SET_BETA = 4 };

int tb_loss_find(const char *name, const struct tb_loss **out, struct tb_error *err);
/* Checks all data of a forward or forward_backward against the loss and the model's limits; out has
 * fb->n_data entries. Errors name the tensor, the datum and the position. */
int tb_loss_prepare(const struct tb_loss *loss, const struct tb_forward_backward *fb, int vocab,
                    int max_context, struct tb_arena *arena, struct tb_loss_inputs *out,
                    struct tb_error *err);

#endif
