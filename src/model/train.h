/*
 * What training.c, train.c and head.c share: ops in training and the data of one call in flight.
 *
 * Owner: of struct tb_training the engine, of the rest tb_model_train for the length of the call.
 * Thread: the model's.
 */
#ifndef TB_MODEL_TRAIN_H
#define TB_MODEL_TRAIN_H

#include "model/loss.h"
#include "model/pass.h"

/* A stretch of an op's data with sums of its own; model.h tells what for. */
struct tb_shard {
    int end; /* its data go from the end of the one before to here */
    double loss_sum;
    double *metrics; /* of a custom loss: sums over its data */
    float *grad;     /* of a share: its gradient until it is collected; else NULL */
};

struct tb_training {
    struct tb_model *m;
    struct tb_adapter *adapter;     /* NULL: a share */
    struct tb_adapter_version *ver; /* what it multiplies by; a share has a reference */
    struct tb_op *op;
    struct tb_error *error;    /* the op's; a share's is its own */
    struct tb_arena arena;     /* of what follows */
    struct tb_output *outputs; /* [n_data of the op], in its arena; its result when all is well */
    const struct tb_loss *loss;
    const struct tb_loss_inputs *inputs; /* [n_data of the op] */
    const struct tb_graph *graph;        /* of a custom loss, else NULL */
    double *one;                         /* its metrics of one datum */
    bool backward;
    bool failed, done; /* done: the result is complete, or error is set */

    struct tb_shard *shards;
    int n_shards;  /* of the op */
    int shard;     /* computed now; those before are in the sums, or wait to be collected */
    int end_shard; /* this training computes no shard from here on */
    int n_begun, n_through, n_data; /* data, counted from the op's first; n_data: up to end_shard */

    double loss_sum, *metrics; /* of the shards that are through */
    float *sum;                /* and their gradient, flat, on the device */
    float *scratch;            /* the gradient of the shard that is computed now */
    struct tb_paged page;      /* of sum and scratch */
    unsigned out;              /* which of them are out */
    bool held;                 /* weights and gradients are */
    struct tb_error own_error;
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

/* ---- training.c */

/* Marks the training failed and keeps the first error. */
void tb_train_fail(struct tb_training *t, int code, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* What is computed on, the gradient of the present shard too, stays in memory until release. */
int tb_training_hold(struct tb_training *t, struct tb_error *err);
void tb_training_release(struct tb_training *t);
size_t tb_training_hold_bytes(const struct tb_training *t); /* takes, or keeps from being freed */
/* Whether the next datum is of another shard than those before: they must be through first. */
bool tb_training_at_shard(const struct tb_training *t);
/* One more datum is through, of a training that is held. */
void tb_training_through(struct tb_training *t);
/* All data are through, or it failed: the gradient joins the adapter's, or leaves no trace. */
void tb_training_finish(struct tb_training *t);

/* ---- head.c */

/* Final norm, head in row blocks, logprobs and losses of all runs; with backward also dxn, the
 * gradient of the final norm's output, and the unembedding's LoRA gradients. *any tells whether
 * some dL/dlogprob is not zero. */
int tb_head_train(struct tb_pass *p, struct tb_datum_run *runs, int n_runs, bool backward,
                  bool *any, struct tb_error *err);
/* Logits of rows [row, row + n) of the pass into p->logits; the final norm has run. Spans are
 * clipped from p->lora. */
void tb_head_logits(struct tb_pass *p, int row, int n);

#endif
