/*
 * The backend's table of functions: what a device must be able to do for model/ to run on it. The
 * CPU (backend/cpu/) and CUDA (cuda/) implement it; model/ is written once over it.
 *
 * Memory is the backend's: `void *` below is memory got from ops->alloc unless a parameter says
 * "host". Pointer arithmetic on it is allowed; dereferencing it is not (except on the CPU, in
 * tests). "act" is the backend's activation type, be->act: bf16 (TB_BF16) or float32 (TB_F32). It
 * is the type of everything that a matrix product reads. Products, norms' statistics, softmax,
 * logits, gradients and the residual stream are float32.
 *
 * Batches are packed: T rows (tokens) of several sequences after each other, without padding.
 *
 * BATCH INVARIANCE. What a row computes never depends on which or how many other rows share the
 * call: the order of every sum over K (a product's inner dimension), over keys (attention) and over
 * a row (norms, softmax) is fixed by the weight's or the row's own shape. Sums over rows
 * (gradients) run in row order inside each span given by the caller, and spans are added in the
 * order given. Results do not depend on the number of threads.
 *
 * Thread: one at a time (a lane's work function); the backend spreads work over its own threads and
 * is synchronous to the caller on the CPU; on CUDA it queues on the stream, and download/sync wait.
 * Errors: functions returning int give TB_ENOMEM/TB_EDEVICE with err filled; void functions cannot
 * fail on the CPU (CUDA records a sticky device error that ops->sync returns).
 */
#ifndef TB_BACKEND_BACKEND_H
#define TB_BACKEND_BACKEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "util/error.h"

enum tb_dtype { TB_F32 = 0, TB_BF16 = 1, TB_F16 = 2 };
static inline size_t tb_dtype_size(enum tb_dtype t)
{
    return t == TB_F32 ? 4 : 2;
}

#define TB_KV_PAGE 16 /* tokens of a KV page */

struct tb_backend;
struct tb_weight; /* a frozen matrix [n_out, n_in] packed for products; opaque */

/* One LoRA module of one adapter: y += scale * (x A^T) B^T. */
struct tb_lora_mat {
    const void *a; /* [rank, n_in]  act */
    const void *b; /* [n_out, rank] act */
    int rank;
    float scale; /* alpha / rank */
};
/* Rows [row, row + n) of a packed batch use mat (never NULL: rows without adapter have no span).
 * Spans are sorted, do not overlap. */
struct tb_lora_span {
    int row, n;
    const struct tb_lora_mat *mat;
    /* backward only: where the span's gradient goes; NULL = not wanted (frozen rows). float32,
     * added to. */
    float *ga; /* [rank, n_in] */
    float *gb; /* [n_out, rank] */
};

#define TB_LORA_TERMS 3 /* of a product at most: q, k, v */

/* A LoRA module's part in a (stacked) product: u = x A^T of its spans, and where its outputs lie.
 */
struct tb_lora_term {
    const struct tb_lora_span *spans;
    int n_spans;
    void *u; /* act, stride ldu: lora_down writes it */
    int ldu;
    int col, n_out;
};

/* One sequence of a packed batch for attention. */
struct tb_attn_seq {
    int row, n;           /* its query rows [row, row + n) */
    int pos;              /* position of its first query row; keys are positions 0 .. pos + n - 1 */
    const int32_t *pages; /* host; page numbers of positions 0..pos+n-1; NULL: keys are the batch's
                             own rows k, v (then pos == 0: training) */
};
struct tb_attn_shape {
    int n_head, n_kv_head, head_dim;
    float scale; /* 1 / sqrt(head_dim) */
    int window;  /* sliding window in tokens (a query sees keys pos-window+1 .. pos); 0 = all */
};

/* What the calls of one pass may ask for at most. */
struct tb_pass_size {
    struct tb_attn_shape attn;
    int rows, rank, vocab;
};

struct tb_adamw {
    float lr, beta1, beta2, eps, weight_decay;
    float grad_scale;   /* from clipping; 1 = none */
    float bias1, bias2; /* 1 - beta1^t, 1 - beta2^t */
};

/* How to draw one token from a row of logits (numerics.md 5.1): temperature, then top_k, then
 * top_p, then min_p, then inverse CDF over the filtered distribution in index order with the
 * uniform u. */
struct tb_draw {
    float temperature; /* 0 = argmax, lowest index on ties, filters ignored */
    int top_k;         /* <= 0 off */
    float top_p;       /* 1 = off */
    float u;           /* uniform in [0, 1) */
    float min_p;       /* least probability, as a share of the largest; <= 0 off */
};

/* A change of one logit before a draw: z += bias; z = z > 0 ? z / repeat : z * repeat; z -= minus.
 */
struct tb_logit_edit {
    int32_t id;
    float bias, repeat, minus;
};

enum tb_queue { TB_QUEUE_TRAIN, TB_QUEUE_SAMPLE, TB_N_QUEUES };

struct tb_backend_ops {
    const char *name;               /* "cpu", "cuda" */
    int min_head_dim, max_head_dim; /* of attention; 0: any */
    void (*destroy)(struct tb_backend *be);
    /* One line for people: device, instruction set, threads. */
    void (*describe)(struct tb_backend *be, char *out, size_t n);
    /* Waits for all queued work; 0 or TB_EDEVICE. */
    int (*sync)(struct tb_backend *be, struct tb_error *err);

    /* ---- queues; NULL: the backend has none. What this thread asks for from now on belongs to
     * that queue, and comes after all that was asked for before, on either. A thread calls it
     * before anything else of a turn. */
    void (*use)(struct tb_backend *be, enum tb_queue queue);
    /* Queues work by calling fn(arg), with what it asks for run as one unit where that is faster:
     * part of a step over `rows` sequences that advance by a row each, which neither waits nor
     * hands anything to the host. fn may be called several times; it changes nothing there. */
    void (*step)(struct tb_backend *be, int rows, void (*fn)(void *arg), void *arg);

    /* Lends the kernels memory of their own for calls within that size; it serves until the next is
     * lent. Returns its bytes, which grow with each row at least as much as with the one before;
     * with mem NULL only that. NULL: the backend needs none. */
    size_t (*lend)(struct tb_backend *be, const struct tb_pass_size *size, void *mem);

    /* ---- memory. alloc: 64-byte aligned, not cleared, NULL when there is none left. */
    void *(*alloc)(struct tb_backend *be, size_t bytes);
    void (*free)(struct tb_backend *be, void *p, size_t bytes);
    void (*upload)(struct tb_backend *be, void *dst, const void *host, size_t bytes);
    void (*download)(struct tb_backend *be, void *host, const void *src, size_t bytes);
    void (*copy)(struct tb_backend *be, void *dst, const void *src, size_t bytes);
    /* dst is here; src is of another backend of the same kind, whose work on it is done (synced)
     * and which leaves it as it is until sync has returned here. When it is the other device that
     * fails, only the copy does: 0 or TB_EDEVICE. */
    int (*copy_from)(struct tb_backend *be, void *dst, struct tb_backend *src_be, const void *src,
                     size_t bytes, struct tb_error *err);
    void (*zero)(struct tb_backend *be, void *dst, size_t bytes);

    /* ---- weights. Several matrices with the same n_in may be stacked along n_out into one weight
     * (q,k,v; gate,up): parts are host pointers to row-major [rows[i], n_in] of the given dtype. */
    int (*weight_create)(struct tb_backend *be, int n_parts, const void *const *parts,
                         const enum tb_dtype *dtypes, const int *rows, int n_in,
                         struct tb_weight **out, struct tb_error *err);
    void (*weight_free)(struct tb_backend *be, struct tb_weight *w);
    size_t (*weight_bytes)(const struct tb_weight *w); /* memory held now */
    /* Makes the packing for matmul_bwd (once; later calls return 0 at once). parts as at creation:
     * the caller still has them mapped. */
    int (*weight_prepare_bwd)(struct tb_backend *be, struct tb_weight *w, int n_parts,
                              const void *const *parts, const enum tb_dtype *dtypes,
                              const int *rows, struct tb_error *err);

    /* ---- products. y [T, n_out] with row stride ldy (floats). accumulate: y += . bias: [n_out]
     * float32 or NULL. */
    void (*matmul)(struct tb_backend *be, const struct tb_weight *w,
                   const void *x /* act [T,n_in] */, int T, const float *bias, float *y, int ldy,
                   bool accumulate);
    /* The same as matmul and then lora_up of each term on y's columns [col, col + n_out), bit for
     * bit, in one pass over y. NULL: the backend has none. */
    void (*matmul_lora)(struct tb_backend *be, const struct tb_weight *w, const void *x, int T,
                        const float *bias, float *y, int ldy, bool accumulate,
                        const struct tb_lora_term *terms, int n_terms);
    /* dx [T, n_in] (+)= dy [T, n_out] W ; dy is act. */
    void (*matmul_bwd)(struct tb_backend *be, const struct tb_weight *w, const void *dy, int T,
                       float *dx, int ld_dx, bool accumulate);

    /* ---- LoRA over spans; rows outside of the spans are not touched. u is act with row stride ldu
     * and holds x A^T (unscaled), rank values a row. */
    /* Each term's u, of at most TB_LORA_TERMS that share x: col and n_out are not looked at. */
    void (*lora_down)(struct tb_backend *be, const struct tb_lora_term *terms, int n_terms,
                      const void *x, int ldx, int n_in);
    /* y[:, 0..n_out) += scale * u B^T */
    void (*lora_up)(struct tb_backend *be, const struct tb_lora_span *s, int n_spans, const void *u,
                    int ldu, float *y, int ldy, int n_out);
    /* du = scale * dy B (act, stride ldu); gb += scale * dy^T u. dy is act with stride ld_dy. */
    void (*lora_up_bwd)(struct tb_backend *be, const struct tb_lora_span *s, int n_spans,
                        const void *dy, int ld_dy, int n_out, const void *u, void *du, int ldu);
    /* dx += du A; ga += du^T x. dx NULL: only ga. */
    void (*lora_down_bwd)(struct tb_backend *be, const struct tb_lora_span *s, int n_spans,
                          const void *du, int ldu, const void *x, int ldx, int n_in, float *dx,
                          int ld_dx);

    /* ---- elementwise and norms */
    /* x[i,:] = E[token[i],:] ; E is act (or the checkpoint's dtype widened by embed_create) ;
     * tokens host */
    void (*embed)(struct tb_backend *be, const void *table, enum tb_dtype dtype,
                  const int32_t *tokens, int T, int dim, float *x);
    /* y = x * rsqrt(mean(x^2) + eps) * w ; y act [T,dim]; rstd [T] float32 or NULL */
    void (*rmsnorm)(struct tb_backend *be, const float *x, const float *w, int T, int dim,
                    float eps, void *y, float *rstd);
    /* dx += d(norm)(dy) ; dy float32 [T,dim] */
    void (*rmsnorm_bwd)(struct tb_backend *be, const float *x, const float *w, const float *rstd,
                        const float *dy, int T, int dim, float *dx);
    /* From raw = [T, (n_head + 2 n_kv) * hd] float32 (a product's output, biases and LoRA included)
     * to the attention's inputs: optional per-head RMSNorm of q and k (q_norm, k_norm [hd] or
     * NULL), then rope at pos[i] (host) with tables cos, sin [max_pos, rope_dim/2] float32
     * (half-split form; dims beyond rope_dim pass through), stored as act q [T, n_head*hd], k, v
     * [T, n_kv*hd]. If raw_act is not NULL, the raw values of q and k are kept there as act [T,
     * (n_head + n_kv)*hd] for the backward pass (only needed with q_norm). Norms read the
     * rounded values, kept or not, so that training and sampling get the same bits. */
    void (*qkv_post)(struct tb_backend *be, const struct tb_attn_shape *s, const float *raw, int T,
                     const int32_t *pos, const float *cos, const float *sin, int rope_dim,
                     const float *q_norm, const float *k_norm, float eps, void *q, void *k, void *v,
                     void *raw_act);
    /* dq, dk, dv float32 -> draw act [T, (n_head + 2 n_kv)*hd] */
    void (*qkv_post_bwd)(struct tb_backend *be, const struct tb_attn_shape *s, const float *dq,
                         const float *dk, const float *dv, int T, const int32_t *pos,
                         const float *cos, const float *sin, int rope_dim, const float *q_norm,
                         const float *k_norm, float eps, const void *raw_act, void *draw);
    /* gu [T, 2F] float32 = [gate | up] -> a = silu(g) * u, act [T,F]; gu_act: the rounded act copy
     * [T, 2F] kept for backward, or NULL. When gu_act is given, a is computed from the rounded
     * values; and it must be computed from rounded values also when it is not (same bits in
     * training and sampling). */
    void (*swiglu)(struct tb_backend *be, const float *gu, int T, int F, void *a, void *gu_act);
    /* recompute a from gu_act (the same bits as swiglu gave) */
    void (*swiglu_again)(struct tb_backend *be, const void *gu_act, int T, int F, void *a);
    /* dgu act [T, 2F] from da float32 [T,F] */
    void (*swiglu_bwd)(struct tb_backend *be, const void *gu_act, const float *da, int T, int F,
                       void *dgu);
    /* act <- float32, n elements; and float32 += float32 */
    void (*to_act)(struct tb_backend *be, const float *x, size_t n, void *y);
    void (*add)(struct tb_backend *be, float *y, const float *x, size_t n);

    /* ---- attention. q act [T, n_head*hd] ... out act [T, n_head*hd]; lse [T, n_head] float32 or
     * NULL. Keys are walked in blocks of a fixed size from position 0, the same way for pages and
     * for rows. */
    void (*attention)(struct tb_backend *be, const struct tb_attn_shape *s,
                      const struct tb_attn_seq *seqs, int n_seqs, const void *q, const void *k,
                      const void *v, const void *kv_pages, void *out, float *lse);
    /* training only (pages NULL). dout float32 [T, n_head*hd] -> dq, dk, dv float32 (overwritten).
     */
    void (*attention_bwd)(struct tb_backend *be, const struct tb_attn_shape *s,
                          const struct tb_attn_seq *seqs, int n_seqs, const void *q, const void *k,
                          const void *v, const void *out, const float *lse, const float *dout,
                          float *dq, float *dk, float *dv);
    /* One layer's page pool: n_pages * kv_page_bytes. Writes rows k, v of each sequence at
     * positions pos .. pos+n-1 into its pages. */
    size_t (*kv_page_bytes)(const struct tb_backend *be, const struct tb_attn_shape *s);
    void (*kv_write)(struct tb_backend *be, const struct tb_attn_shape *s,
                     const struct tb_attn_seq *seqs, int n_seqs, const void *k, const void *v,
                     void *kv_pages);

    /* ---- head. logits float32 [T, V] with row stride ldv. */
    /* lse[i] = logsumexp(row i); lp[i*K+j] = logits[i, target[i*K+j]] - lse[i]; host targets may be
     * NULL with K = 0. lse and lp are host memory. A target of -1 gives 0. */
    void (*logprobs)(struct tb_backend *be, const float *logits, int T, int V, int ldv,
                     const int32_t *targets, int K, float *lse, float *lp);
    /* dl[i,v] = sum_j g[i*K+j] * ([v == target] - softmax(row)_v), act [T, V] with stride ldv; g,
     * lse, targets host */
    void (*dlogits)(struct tb_backend *be, const float *logits, int T, int V, int ldv,
                    const float *lse, const int32_t *targets, const float *g, int K, void *dl);
    /* Changes one row: the edits (host, distinct ids), then -inf for every id whose bit id % 64 of
     * allow[id / 64] (host; NULL: all are allowed) is not set. */
    void (*edit_logits)(struct tb_backend *be, float *logits, int V,
                        const struct tb_logit_edit *edits, int n, const uint64_t *allow);
    /* Draws one token a row; tokens, host. */
    void (*draw)(struct tb_backend *be, const float *logits, int T, int V, int ldv,
                 const struct tb_draw *draws, int32_t *tokens);
    /* The k largest (ties: lower id first) ids and log-probabilities of each row, descending, host.
     */
    void (*topk)(struct tb_backend *be, const float *logits, int T, int V, int ldv,
                 const float *lse, int k, int32_t *ids, float *lps);

    /* ---- optimizer, over flat float32 arrays of n elements */
    /* Sum of squares in float64 in a fixed order; infinite or NaN entries make it so. */
    double (*sum_squares)(struct tb_backend *be, const float *g, size_t n);
    /* p, m, v updated in place from g (g is not changed) */
    void (*adamw)(struct tb_backend *be, const struct tb_adamw *o, float *p, float *m, float *v,
                  const float *g, size_t n);
};

/* How much at a time suits a device: enough to keep it busy, and no more, as whoever comes next
 * waits for the step that runs. A backend sets them when it is made; they may change before a model
 * is loaded. No result depends on them. Where memory is short, steps are smaller. */
struct tb_backend_sizes {
    int train_rows;   /* of a training step, and of a micro-batch */
    int prefill_rows; /* of a sampling step: rows of prompts, beside one a decoding sequence */
    /* A micro-batch's activations: at most so many bytes, and one part of so many of the memory. */
    size_t activation_bytes;
    int activation_part;
    size_t logits_bytes; /* held at once */
    size_t kv_bytes;     /* of the KV pages of a model, unless they are asked for */
};

struct tb_backend {
    const struct tb_backend_ops *ops;
    struct tb_backend_sizes sizes;
    const char *kind; /* of device, for people; backends of one kind and dtype give the same bits */
    int shard_tokens; /* of training ops, whose gradients depend on it (model.h); 0: no shards */
    enum tb_dtype act;
    int n_threads;
    size_t mem_limit; /* bytes that alloc, weights and charges may take in all; 0 = no limit */
    size_t mem_used;  /* bytes they hold now */
    const struct tb_reclaimer *reclaimer; /* or NULL */
    void *reclaimer_arg;
    struct tb_error reclaim_error; /* why less was freed than there was to free */
    bool lost; /* the device failed for good: nothing runs any more, what comes from it since is
                  zeros, and sync says why */
};

/* Who can free memory when the limit is reached: model/pager.h. */
struct tb_reclaimer {
    size_t (*reclaimable)(void *arg); /* bytes that could be freed */
    /* Frees until `bytes` more fit under the limit; else sets be->reclaim_error. */
    void (*reclaim)(void *arg, size_t bytes);
};

static inline void tb_backend_use(struct tb_backend *be, enum tb_queue queue)
{
    if (be->ops->use) be->ops->use(be, queue);
}
static inline void tb_backend_step(struct tb_backend *be, int rows, void (*fn)(void *arg),
                                   void *arg)
{
    if (be->ops->step)
        be->ops->step(be, rows, fn, arg);
    else
        fn(arg);
}

static inline bool tb_backend_fits(const struct tb_backend *be, size_t bytes)
{
    return !be->mem_limit || (bytes <= be->mem_limit && be->mem_used <= be->mem_limit - bytes);
}
/* Bytes that could be had now: what is free and what could be freed. */
size_t tb_backend_room(const struct tb_backend *be);
/* Counts bytes against the limit, frees others' when it must; false: they do not fit. alloc and
 * weight_create do so themselves; for memory of other kinds the caller does. */
bool tb_backend_charge(struct tb_backend *be, size_t bytes);
void tb_backend_uncharge(struct tb_backend *be, size_t bytes);
/* TB_ENOMEM with what was needed and what there is: "<what> need 5.0 MiB; ...". */
int tb_backend_no_memory(const struct tb_backend *be, struct tb_error *err, size_t bytes,
                         const char *what);

struct tb_backend_options {
    enum tb_dtype act;
    size_t mem_limit; /* 0 = none: an allocation fails when the machine has no more */
    int n_threads;    /* 0 = all cores */
    const char *isa;  /* NULL = best; "plain", "avx2", "avx512", "avx512_bf16": tests force one */
    int device;       /* cuda: its number, from 0 */
};

/* What --backend and --dtype mean on this machine. name: "auto", "cpu", "cuda"; dtype: "auto",
 * "bf16", "f32". Errors are one clear line. */
int tb_backend_create(struct tb_backend **out, const char *name, const char *dtype,
                      const struct tb_backend_options *options, struct tb_error *err);
int tb_backend_cpu_create(struct tb_backend **out, const struct tb_backend_options *options,
                          struct tb_error *err);

#endif
