/*
 * Model: a base model on a backend, LoRA adapters over it, and the two things one does with them:
 * training passes and sampling steps. What is written here is what engine/ and store/ use.
 *
 *   tb_model            base weights, config, tokenizer; immutable after load; shared by all
 * adapters tb_adapter          a trainable LoRA: parameters, gradients, moments (flat float32
 * arrays) tb_adapter_version  an immutable published copy of an adapter's compute-dtype weights,
 *                       reference-counted; what sampling uses (NULL = the base model)
 *   tb_seq              one sequence being sampled: its tokens, KV pages and random stream
 *
 * Thread: all calls on one model, its adapters, versions and sequences come from one thread at a
 * time (the lane's work function), except tb_model_load (any thread, once) and the getters of
 * immutable facts (tb_model_info), which any thread may use after load.
 */
#ifndef TB_MODEL_MODEL_H
#define TB_MODEL_MODEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "backend/backend.h"
#include "op/op.h"
#include "op/state.h"
#include "tokenizer/tokenizer.h"
#include "util/error.h"

struct tb_model;
struct tb_adapter;
struct tb_adapter_version;
struct tb_seq;
struct tb_pager;
struct tb_graph; /* model/custom/graph.h */

struct tb_model_options {
    int max_rank;    /* 256 */
    int max_context; /* 0 = the config's max_position_embeddings */
    /* Of the KV page pool. 0 = an eighth of the memory divided by kv_shares, the models that are
     * to have as much; no more than the backend's default, nor than 64 full contexts need. */
    size_t kv_bytes;
    int kv_shares;
    size_t logits_bytes; /* largest block of logits held at once; 0 = the backend's default */
    /* Activations of one micro-batch in training; a datum that needs more is refused. 0 = the
     * backend's default, and more for a datum longer than that. */
    size_t activation_bytes;
    int shard_tokens;       /* of an op in training, below; 0 = the backend's */
    struct tb_pager *pager; /* model/pager.h; NULL: nothing goes to files. Outlives the model */
};

struct tb_model_info {
    const char *name; /* the served name */
    const char *dir;
    const char *arch; /* "Qwen3ForCausalLM" */
    int vocab;        /* rows of the head */
    int hidden, n_layers, n_heads, n_kv_heads, head_dim, ffn;
    int max_context;
    int max_rank;
    int n_eos;
    const int32_t *eos; /* generation_config.json, else config.json, plus the tokenizer's */
    const struct tb_tokenizer *tokenizer; /* NULL when the folder has none that is served, */
    const char *no_tokenizer;             /* and then why */
    size_t weight_bytes;                  /* memory held by base weights now */
    int kv_pages_total;
};

/* Loads a Hugging Face folder. A folder that cannot be served gives one line naming the key or
 * tensor. */
int tb_model_load(struct tb_model **out, struct tb_backend *be, const char *name, const char *dir,
                  const struct tb_model_options *options, struct tb_error *err);
void tb_model_free(
    struct tb_model *m); /* accepts NULL; adapters, versions and sequences must be gone */
const struct tb_model_info *tb_model_info(const struct tb_model *m);

/* Bytes in memory now; adapters and versions that are alive, and how many of these are in files. */
struct tb_model_usage {
    size_t weights, adapters, versions, kv, workspaces;
    int n_adapters, n_versions, adapters_out, versions_out;
};
struct tb_model_usage tb_model_usage(const struct tb_model *m);

/* ---- adapters */
/* A seeded fresh adapter: A ~ U(-1/sqrt(in), 1/sqrt(in)) by Philox keyed by (seed, tensor name), B
 * = 0. */
int tb_adapter_create(struct tb_adapter **out, struct tb_model *m,
                      const struct tb_lora_config *config, struct tb_error *err);
/* Makes an adapter from, or overwrites one with, a saved state; with_optimizer also restores m, v
 * and step (an error if the state has none), else they start at zero; gradients are cleared. A
 * mismatch of rank, flags or shapes is TB_EINVAL naming it, and changes nothing. */
int tb_adapter_create_from(struct tb_adapter **out, struct tb_model *m,
                           const struct tb_adapter_state *s, bool with_optimizer,
                           struct tb_error *err);
int tb_adapter_restore(struct tb_adapter *a, const struct tb_adapter_state *s, bool with_optimizer,
                       struct tb_error *err);
/* A copy in host memory; base_model is left to the caller's name. */
int tb_adapter_export(struct tb_adapter *a, bool with_optimizer, struct tb_adapter_state **out,
                      struct tb_error *err);
void tb_adapter_free(struct tb_adapter *a);
const struct tb_lora_config *tb_adapter_config(const struct tb_adapter *a);
size_t tb_adapter_bytes(const struct tb_adapter *a); /* when it is in memory */
int64_t tb_adapter_step(const struct tb_adapter *a);

/* Publishes the current parameters; cheap (copy on write or one copy of the compute-dtype weights).
 */
int tb_adapter_publish(struct tb_adapter *a, struct tb_adapter_version **out, struct tb_error *err);
/* A version straight from a saved state (sampling from a checkpoint). */
int tb_version_create_from(struct tb_adapter_version **out, struct tb_model *m,
                           const struct tb_adapter_state *s, struct tb_error *err);
void tb_version_ref(struct tb_adapter_version *v);
void tb_version_unref(struct tb_adapter_version *v); /* accepts NULL */

/* A version's weights, lent to a model on another device of the same kind. lend: on the version's
 * thread; it keeps the version, in memory and unchanged, until the loan is returned there. borrow:
 * on the other model's thread, meanwhile; makes a version of its own with the same bits. */
struct tb_loan {
    struct tb_adapter_version *version;
    struct tb_backend *be;
    const void *act;
    size_t bytes;
    struct tb_lora_config lora;
};
int tb_version_lend(struct tb_adapter_version *v, struct tb_loan *out, struct tb_error *err);
int tb_version_borrow(struct tb_adapter_version **out, struct tb_model *m,
                      const struct tb_loan *loan, struct tb_error *err);
void tb_loan_return(struct tb_loan *loan);

/* ---- training. A forward or forward_backward op goes through in any number of calls, its data in
 * order; calls mix data of any ops and adapters. How it is split changes no bit. Its gradient is
 * its own until all data are through; then it is added to the adapter's. The adapter's parameters
 * must not change, nor the adapter go, while an op on it is in training. Ops on one adapter begin
 * in their order, and the data of one come before those of the next. */
struct tb_training;

/* Validates op (loss, inputs, shapes, token ids, finite numbers): op->error and its code on
 * failure; nothing is kept then. graph: of loss_fn "custom", else NULL. */
int tb_training_create(struct tb_training **out, struct tb_adapter *a, struct tb_op *op,
                       const struct tb_graph *graph);
/* Gets the memory of the op's gradient, if it has one. The first call of tb_model_train does it,
 * and fails the op when there is none; here TB_ENOMEM changes nothing and may be tried again. */
int tb_training_reserve(struct tb_training *t, struct tb_error *err);
/* Accepts NULL. An op that is not done leaves no trace. */
void tb_training_destroy(struct tb_training *t);
bool tb_training_done(const struct tb_training *t); /* op->result is complete or op->error is set */

struct tb_train_part {
    struct tb_training *training;
    int n_data; /* the next so many of its data */
};
/* One packed pass, split into micro-batches that fit. An op that fails has op->error set, is done
 * and leaves no trace in the gradients; the others are not disturbed. Returns 0, or a negative code
 * for a failure of the whole pass (device lost), with every op's error set. */
int tb_model_train(struct tb_model *m, const struct tb_train_part *parts, int n,
                   struct tb_error *err);

/* An op of many tokens is cut into shards, by its data alone: each has a gradient of its own, and
 * the op's is their sum in order. So several devices that have the model may compute shards at the
 * same time, to the bits of one device. The op's device computes the first ones, other devices have
 * shares, and it collects these in order:
 *
 *   tb_training_compute_to(t, 2)         2 of t's shards here; then it waits
 *   tb_training_share(&s, t, ver, 2, 4)  on the other device's thread: 2 more, which
 *                                        tb_model_train computes until it is done
 *   tb_training_collect(t, s)            here; t is done when that was the last
 *
 * t, its op and its graph outlive the shares. */
#define TB_MAX_SHARDS 8 /* of an op; bounds the gradients that wait to be collected on a device */
int tb_training_n_shards(const struct tb_training *t);
int tb_training_shard_end(const struct tb_training *t, int shard); /* its data end before this */
void tb_training_compute_to(struct tb_training *t, int shard);     /* only shards before this */
/* Whether it waits for shares to be collected. */
bool tb_training_waits(const struct tb_training *t);
/* Shards [from, to) of `of`, under the same weights on another device. A share that fails says why
 * in tb_training_error. */
void tb_training_share(struct tb_training **out, const struct tb_training *of,
                       struct tb_adapter_version *ver, int from, int to);
const struct tb_error *tb_training_error(const struct tb_training *t);
void tb_training_fail(struct tb_training *t, const struct tb_error *why); /* and it is done */
/* Adds a share that is done, the next in order, while nobody else uses it; then it may be destroyed
 * on its own thread. When it failed for its device's sake (memory, a lost device, a lane that
 * closes), returns that code and changes nothing: tb_training_compute_to its end does its shards
 * here. Any other failure is the op's. */
int tb_training_collect(struct tb_training *t, const struct tb_training *share,
                        struct tb_error *err);

/* AdamW with clipping on the accumulated gradient; fills op->result.metrics or op->error (then p,
 * m, v are untouched). Clears the gradient. */
void tb_adapter_optim_step(struct tb_adapter *a, struct tb_op *op);

/* ---- sampling. An op TB_OP_SAMPLE becomes n_samples sequences that share their prompt. The op
 * must outlive its sequences; results gather in a tb_sampling and move to op->result at the end. */
struct tb_sampling; /* one sample op in progress */

/* Validates op against the model (op->error and its code on failure; nothing is kept then). version
 * NULL = base model; a reference is taken. */
int tb_sampling_create(struct tb_sampling **out, struct tb_model *m,
                       struct tb_adapter_version *version, struct tb_op *op);
/* Frees pages and references. Result arrays already live in the op's arena. */
void tb_sampling_destroy(struct tb_sampling *s);
bool tb_sampling_done(
    const struct tb_sampling *s); /* op->result is complete, or op->error is set */

/* Whether its prompt has got pages. */
bool tb_sampling_begun(const struct tb_sampling *s);
/* The tokens drawn since the last call, of an op that streams; the caller frees it. NULL: none, or
 * no memory to tell them now. */
struct tb_progress *tb_sampling_progress(struct tb_sampling *s);

/* One engine step over the given samplings (any mix of models' adapters): every running sequence
 * advances by one token, and prompts are prefilled by chunks of at most prefill_budget rows in all.
 * Sequences for which no KV pages are free wait (or are preempted and recomputed, to the same
 * bits). n_rows receives the rows computed; 0 means that nothing could run. */
int tb_model_sample_step(struct tb_model *m, struct tb_sampling *const *s, int n,
                         int prefill_budget, int *n_rows, struct tb_error *err);

struct tb_kv_stats {
    uint64_t n_pages, n_free,
        n_cached;         /* cached: hold tokens that nobody uses now; as good as free */
    uint64_t n_preempted; /* sequences sent away and computed again */
    uint64_t n_lookup_tokens, n_hit_tokens; /* of prompts; of these found in pages */
};
void tb_model_kv_stats(const struct tb_model *m, struct tb_kv_stats *sum); /* adds to sum */

#endif
