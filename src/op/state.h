/*
 * Adapter state: a LoRA adapter's tensors in host memory, float32, in Tinker's names
 * (numerics.md 3.4, without the "base_model.model." prefix:
 * "model.layers.0.self_attn.q_proj.lora_A.weight"). It is how weights cross between engine/ and
 * store/: the engine exports or imports it, the store writes or reads checkpoint folders of it.
 *
 * Owner: whoever holds the pointer (one owner, or reference-counted by the holder's own means).
 * Immutable once filled. Thread: any, one at a time.
 */
#ifndef TB_OP_STATE_H
#define TB_OP_STATE_H

#include <stdint.h>

#include "op/op.h"

struct tb_state_tensor {
    const char *name;
    int32_t rows, cols; /* A: [rank, n_in], B: [n_out, rank] */
    int64_t offset;     /* floats from the start of p, m and v */
};

struct tb_adapter_state {
    struct tb_arena arena;      /* names, the tensor table */
    const char *base_model;     /* the served name */
    struct tb_lora_config lora; /* rank, alpha, flags, seed */
    int64_t step;               /* optimizer steps done (t) */
    int32_t n_tensors;
    struct tb_state_tensor *tensors; /* in the model's fixed order */
    int64_t n_floats;
    float *p;     /* [n_floats] parameters; tb_free */
    float *m, *v; /* moments or NULL: saved without optimizer */
};

struct tb_adapter_state *tb_adapter_state_create(void);
void tb_adapter_state_destroy(struct tb_adapter_state *s); /* accepts NULL */

#endif
