/*
 * What the files of model/ share: the model's own structs, LoRA layouts, published versions.
 * Nothing outside model/ includes this but its tests.
 *
 * Owner: struct tb_model owns weights, tables, workspaces and the KV pool. Thread: see model.h.
 */
#ifndef TB_MODEL_INTERNAL_H
#define TB_MODEL_INTERNAL_H

#include "model/config.h"
#include "model/kv.h"
#include "model/model.h"
#include "model/pager.h"
#include "model/safetensors.h"
#include "util/list.h"
#include "util/mem.h"

/* The adapted projections of a layer; module number = layer * TB_N_PROJ + projection. The last
 * module of a model, n_layers * TB_N_PROJ, is the unembedding. */
enum tb_proj { TB_Q, TB_K, TB_V, TB_O, TB_GATE, TB_UP, TB_DOWN, TB_N_PROJ };

struct tb_layer {
    struct tb_weight *qkv, *o, *gate_up, *down;
    float *qkv_bias, *o_bias; /* or NULL */
    float *norm_attn, *norm_mlp;
    float *q_norm, *k_norm; /* or NULL */
    int window;
};

/* Device memory that only grows; what is in it is laid out anew by each pass. */
struct tb_block {
    void *p;
    size_t cap;
    bool busy; /* a pass uses it */
};

struct tb_model {
    struct tb_backend *be;
    struct tb_model_config cfg;
    struct tb_model_options opt;
    struct tb_model_info info;
    char *name, *dir;
    int32_t eos[TB_MAX_EOS + 1];
    struct tb_tokenizer *tokenizer;
    char *no_tokenizer; /* why there is none */
    struct tb_st *st;   /* mapped for as long as the model lives: embeddings, backward packing */

    const void *embed; /* [vocab, hidden] */
    enum tb_dtype embed_dtype;
    void *embed_copy; /* device memory when the device cannot read the mapping */
    size_t embed_bytes;
    struct tb_layer *layers;
    float *norm;
    struct tb_weight *head;
    bool bwd_ready;

    float *rope_cos, *rope_sin; /* [rope_len, head_dim / 2] */
    int rope_len;

    int head_rows;  /* rows of logits held at once */
    int head_piece; /* a datum's rows go through the head in pieces of this many (gradient order) */
    size_t soft_bytes, hard_bytes; /* activations of a micro-batch; of one long datum */
    int shard_tokens; /* an op of more tokens is cut into shards (training.c); 0: never */
    struct tb_block train_ws, sample_ws;
    struct tb_kv kv;
    struct tb_list samplings; /* all live ones, oldest first */
    uint64_t last_serial;     /* of adapter versions */
    struct tb_list in_pager;
    struct tb_model_usage usage; /* of adapters and versions only */
};

static inline int tb_model_n_modules(const struct tb_model *m)
{
    return m->cfg.n_layers * TB_N_PROJ + 1;
}
static inline int tb_model_unembed(const struct tb_model *m)
{
    return m->cfg.n_layers * TB_N_PROJ;
}
static inline int tb_cfg_q(const struct tb_model_config *c) /* width of q */
{
    return c->n_heads * c->head_dim;
}
static inline int tb_cfg_kv(const struct tb_model_config *c) /* width of k, of v */
{
    return c->n_kv_heads * c->head_dim;
}
static inline int tb_cfg_qkv(const struct tb_model_config *c)
{
    return tb_cfg_q(c) + 2 * tb_cfg_kv(c);
}

/* The memory that the backend may take: the base for defaults. */
static inline size_t tb_model_memory(const struct tb_model *m)
{
    return m->be->mem_limit ? m->be->mem_limit : (size_t)tb_mem_machine();
}

/* Packs the weights for the backward product, once. */
int tb_model_prepare_bwd(struct tb_model *m, struct tb_error *err);
/* Makes the rope tables cover positions 0 .. n-1. */
int tb_model_need_rope(struct tb_model *m, int n, struct tb_error *err);
/* Grows b to at least bytes; its content is lost when it grows. */
int tb_block_reserve(struct tb_backend *be, struct tb_block *b, size_t bytes, const char *what,
                     struct tb_error *err);
void tb_block_free(struct tb_backend *be, struct tb_block *b);
/* Workspaces that no pass uses: their bytes; to free them. */
size_t tb_model_idle_workspaces(const struct tb_model *m);
void tb_model_free_workspaces(struct tb_model *m);

/* ---- LoRA. Where each module's A and B lie in the flat arrays p, g, m, v and act. */
struct tb_lora_slot {
    int64_t a, b; /* offset in elements, -1: not adapted */
    int n_in, n_out;
};
struct tb_lora_layout {
    int refs;
    struct tb_lora_config config;
    int n_modules;
    int64_t n_floats;
    struct tb_lora_slot slots[]; /* [n_modules] */
};

struct tb_adapter_version {
    int refs;
    uint64_t serial; /* from 1, never used twice: what these weights are called in the KV pool */
    bool sampled;    /* under this serial: the pool may keep pages of it */
    bool is_cur;     /* of an adapter, which has one of the references */
    struct tb_model *m;
    struct tb_lora_layout *layout;
    struct tb_paged page;
    void *act;                 /* [n_floats] act; NULL while it is out */
    struct tb_lora_mat mats[]; /* [n_modules]; rank 0: not adapted */
};

struct tb_adapter {
    struct tb_model *m;
    struct tb_lora_layout *layout;
    struct tb_adapter_version *cur; /* what training multiplies by; p rounded to act */
    float *p;         /* NULL: it is out, and which arrays it has says `out`, a bit each */
    float *g;         /* NULL or meaningless while !has_grad */
    float *mom, *var; /* NULL: zero */
    bool has_grad;
    int64_t step;
    struct tb_paged page;
    unsigned out;
};

/* Brings an adapter (its arrays and current version), or a version, into memory and keeps it there
 * until it is released. Whoever reads or writes arrays or act holds it. */
int tb_adapter_hold(struct tb_adapter *a, struct tb_error *err);
void tb_adapter_release(struct tb_adapter *a);
int tb_version_hold(struct tb_adapter_version *v, struct tb_error *err);
void tb_version_release(struct tb_adapter_version *v);
void tb_adapter_idle(struct tb_adapter *a); /* nobody holds it */
/* What a hold takes, or keeps from being freed: nothing when it is held. */
size_t tb_adapter_idle_bytes(const struct tb_adapter *a);
size_t tb_version_idle_bytes(const struct tb_adapter_version *v);
/* A new one is held by whoever makes it. */
void tb_adapter_page_init(struct tb_adapter *a);
void tb_version_page_init(struct tb_adapter_version *v);

/* One float32 array of a layout's size, counted as an adapter's. */
size_t tb_lora_flat_bytes(const struct tb_lora_layout *l);
float *tb_lora_alloc_flat(struct tb_model *m, const struct tb_lora_layout *l);
void tb_lora_free_flat(struct tb_model *m, const struct tb_lora_layout *l, float *p);
float *tb_adapter_alloc_flat(struct tb_adapter *a);
void tb_adapter_free_flat(struct tb_adapter *a, float *p);   /* accepts NULL */
size_t tb_version_bytes(const struct tb_adapter_version *v); /* of act */
int tb_version_alloc_act(struct tb_adapter_version *v, struct tb_error *err);
void tb_version_free_act(struct tb_adapter_version *v);

/* Adds (or moves) a finished op's gradient to the adapter's; takes ownership of scratch. */
void tb_adapter_add_grad(struct tb_adapter *a, float *scratch);
size_t tb_adapter_flat_bytes(const struct tb_adapter *a); /* of one float32 array */
/* Makes sure that a->cur may be overwritten (copy on write, else under a new serial); called before
 * p changes. */
int tb_adapter_own_version(struct tb_adapter *a, struct tb_error *err);
void tb_adapter_refresh_act(struct tb_adapter *a); /* a->cur from p */

/* A run of packed rows under one version; grad is the op's flat scratch in a backward pass. */
struct tb_lora_rows {
    int row, n;
    const struct tb_adapter_version *ver; /* NULL: base model */
    float *grad;
};
/* The spans of one module over rows; returns how many. Rows without it have none. */
int tb_lora_spans(const struct tb_lora_rows *rows, int n_rows, int module, bool backward,
                  struct tb_lora_span *out);

#endif
