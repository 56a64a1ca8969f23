/*
 * A pass: one packed batch of rows going through the layers, for training or for sampling. It lays
 * its buffers out in one block of device memory, so that nothing is allocated between layers.
 *
 * Three kinds, which compute the same bits:
 *   TB_PASS_INFER      nothing is kept; the residual stream is updated in place
 *   TB_PASS_KEEP       every layer keeps what its backward pass reads
 *   TB_PASS_RECOMPUTE  only the residual stream is kept; a layer is run again before its backward
 * pass
 *
 * Owner: struct tb_pass borrows everything; its host scratch is freed by tb_pass_fini. Thread: the
 * model's.
 */
#ifndef TB_MODEL_PASS_H
#define TB_MODEL_PASS_H

#include "model/internal.h"

enum tb_pass_kind { TB_PASS_INFER, TB_PASS_KEEP, TB_PASS_RECOMPUTE };

struct tb_saved {          /* of one layer, for its backward pass; T rows each */
    void *raw;             /* act [T, q + kv]: q, k before their norms; only with qk_norm */
    void *q, *k, *v, *att; /* act */
    void *gu;              /* act [T, 2 ffn] */
    void *u[TB_N_PROJ];    /* act [T, ru]: x A^T of each adapted projection */
    float *lse;            /* [T, heads] */
};

struct tb_pass {
    struct tb_model *m;
    enum tb_pass_kind kind;
    int T;                       /* rows */
    int ru;                      /* stride of the u buffers: the largest rank, 0 without adapters */
    const int32_t *tokens, *pos; /* host [T] */
    const struct tb_attn_seq *seqs; /* host */
    int n_seqs;
    bool paged;                      /* keys live in the model's KV pages */
    const struct tb_lora_rows *lora; /* forward: adjacent rows of one version are one run */
    int n_lora;
    const struct tb_lora_rows *grads; /* backward: one run a datum */
    int n_grads;
    bool grad_attn, grad_mlp, grad_unembed; /* what some run of grads trains */

    /* ---- laid out by tb_pass_layout */
    struct tb_block *block;     /* busy until tb_pass_fini */
    void *kernels;              /* lent to the backend */
    struct tb_lora_span *spans; /* host scratch */
    struct tb_saved *saved;     /* host; n_layers of them (KEEP) or one */
    float **x;                  /* host; residual stream before each layer, n_layers + 1 pointers */
    float **x_mid;              /* host; after attention, n_layers pointers */
    void *h, *a;                /* act [T, hidden], [T, ffn] */
    float *raw, *gu;            /* [T, qkv], [T, 2 ffn] */
    /* head */
    void *xn;          /* act [T, hidden]: final norm's output */
    float *rstd_final; /* [T] */
    float *logits;     /* [head_rows, vocab]; INFER: a row more, sampling changes copies of rows */
    void *u_head;      /* act [head_rows, ru] */
    /* backward */
    float *dx, *dh;      /* [T, hidden] */
    void *dy;            /* act [T, hidden] */
    float *rstd;         /* [T] */
    float *da;           /* [T, ffn] */
    void *dgu;           /* act [T, 2 ffn] */
    float *dao;          /* [T, q] */
    float *dq, *dk, *dv; /* [T, q], [T, kv], [T, kv] */
    void *draw;          /* act [T, qkv] */
    void *du;            /* act [max(T, head_rows), ru] */
    float *dxn;          /* [T, hidden] */
    void *dl, *xg, *ug;  /* act [head_rows, vocab], [head_rows, hidden], [head_rows, ru] */
    float *dxg;          /* [head_rows, hidden] */
};

/* Bytes that a pass of T rows takes. */
size_t tb_pass_bytes(struct tb_model *m, enum tb_pass_kind kind, bool backward, int T, int ru);
/* Reserves block and lays the buffers out. p->m, kind, T, ru, lora and grads are set. */
int tb_pass_init(struct tb_pass *p, struct tb_block *block, bool backward, struct tb_error *err);
void tb_pass_fini(struct tb_pass *p);

/* Embedding and all layers; the result is x[n_layers]. */
void tb_pass_forward(struct tb_pass *p);
/* Layer l from x[l] into saved slot s, ending in x[l + 1] (RECOMPUTE in the backward: again). */
void tb_pass_layer(struct tb_pass *p, int l, struct tb_saved *s, float *x_in, float *x_mid,
                   float *x_out);
/* From dx, the gradient of x[n_layers], down to the lowest layer that trains. */
void tb_pass_backward(struct tb_pass *p);

struct tb_attn_shape tb_pass_shape(const struct tb_pass *p, int layer);
int tb_pass_spans(struct tb_pass *p, int module, bool backward); /* into p->spans */

#endif
