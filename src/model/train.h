/*
 * What train.c and head.c share: ops in training and the data of one call in flight.
 *
 * Owner: of struct tb_training the engine, of the rest tb_model_train for the length of the call.
 * Thread: the model's.
 */
#ifndef TB_MODEL_TRAIN_H
#define TB_MODEL_TRAIN_H

#include "model/loss.h"
#include "model/pass.h"

struct tb_training {
    struct tb_adapter *adapter;
    struct tb_op *op;
    struct tb_arena arena; /* of what follows */
    const struct tb_loss *loss;
    struct tb_loss_inputs *inputs; /* [n_data] */
    const struct tb_graph *graph;  /* of a custom loss, else NULL */
    double *metrics, *one;         /* [its metrics] sums over the data so far, and of one datum */
    bool backward;
    bool failed, done; /* done: op->result is complete, or op->error is set */
    int n_data, n_begun, n_through;
    double loss_sum;
    float *scratch; /* the op's own gradient, flat, on the device; NULL: not reserved, or out */
    struct tb_paged page; /* of scratch */
    bool held;            /* adapter and scratch are */
};

struct tb_datum_run { /* one datum of a micro-batch */
    struct tb_training *op;
    int index; /* of the datum in its op */
    int row;   /* its first packed row */
    const struct tb_loss_inputs *in;
    float *lp; /* [n, k] in the op's result */
    float *g;  /* [n, k] dL/dlogprob, host scratch; NULL when there is no backward pass */
    double loss;
};

/* Marks the op failed and keeps the first error. */
void tb_train_fail(struct tb_training *t, int code, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* Final norm, head in row blocks, logprobs and losses of all runs; with backward also dxn, the
 * gradient of the final norm's output, and the unembedding's LoRA gradients. *any tells whether
 * some dL/dlogprob is not zero. */
int tb_head_train(struct tb_pass *p, struct tb_datum_run *runs, int n_runs, bool backward,
                  bool *any, struct tb_error *err);
/* Logits of rows [row, row + n) of the pass into p->logits; the final norm has run. Spans are
 * clipped from p->lora. */
void tb_head_logits(struct tb_pass *p, int row, int n);

#endif
