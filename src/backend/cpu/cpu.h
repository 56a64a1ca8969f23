/*
 * The CPU backend's own types, shared by the files of backend/cpu/. Nothing outside includes it but
 * its tests.
 *
 * Owner: struct tb_cpu is made by tb_backend_cpu_create and freed by ops->destroy. Thread: the
 * caller's, one at a time; the team's workers run only inside a call.
 */
#ifndef TB_BACKEND_CPU_CPU_H
#define TB_BACKEND_CPU_CPU_H

#include <string.h>

#include "backend/backend.h"
#include "backend/number.h"

struct tb_team;

enum tb_isa { TB_ISA_PLAIN, TB_ISA_AVX2, TB_ISA_AVX512, TB_ISA_AVX512_BF16 };

/* Memory for a call, of one thread or of all, out of what ops->lend was given. */
struct tb_scratch {
    char *p;
    size_t bytes;
};

/* How much of it the calls of a pass need. */
#define TB_N_SHARED 3
struct tb_needs {
    size_t shared[TB_N_SHARED], own;
};
static inline void tb_need(size_t *most, size_t bytes)
{
    if (bytes > *most) *most = bytes;
}

struct tb_cpu {
    struct tb_backend be; /* first: the table's functions cast */
    struct tb_backend_ops ops;
    enum tb_isa isa;
    struct tb_team *team;
    struct tb_scratch shared[TB_N_SHARED];                                 /* a call's */
    struct tb_scratch *own;                                                /* one a thread */
    void (*needs[5])(const struct tb_pass_size *size, struct tb_needs *n); /* or NULL: none */
};

/* A frozen matrix. fwd: row-major act (plain) or panels of words over n_in (fast); bwd: panels of
 * words over n_out, NULL until weight_prepare_bwd, never set by plain. */
struct tb_weight {
    int n_out, n_in;
    void *fwd, *bwd;
    size_t fwd_bytes, bwd_bytes;
};

static inline struct tb_cpu *tb_cpu(struct tb_backend *be)
{
    return (struct tb_cpu *)(void *)be;
}

/* Tables of functions: each fills what it implements. */
void tb_cpu_memory_ops(struct tb_backend_ops *o);
void tb_plain_product_ops(struct tb_backend_ops *o);
void tb_plain_elem_ops(struct tb_backend_ops *o);
void tb_plain_attn_ops(struct tb_backend_ops *o);
void tb_plain_head_ops(struct tb_backend_ops *o);
#define TB_K_TABLES(target)                                                                        \
    void tb_k_product_ops_##target(struct tb_backend_ops *o);                                      \
    void tb_k_lora_ops_##target(struct tb_backend_ops *o);                                         \
    void tb_k_elem_ops_##target(struct tb_backend_ops *o);                                         \
    void tb_k_attn_ops_##target(struct tb_backend_ops *o);                                         \
    void tb_k_attn_bwd_ops_##target(struct tb_backend_ops *o);                                     \
    void tb_k_head_ops_##target(struct tb_backend_ops *o);                                         \
    void tb_k_draw_ops_##target(struct tb_backend_ops *o);                                         \
    void tb_k_product_needs_##target(const struct tb_pass_size *size, struct tb_needs *n);         \
    void tb_k_lora_needs_##target(const struct tb_pass_size *size, struct tb_needs *n);            \
    void tb_k_attn_needs_##target(const struct tb_pass_size *size, struct tb_needs *n);            \
    void tb_k_attn_bwd_needs_##target(const struct tb_pass_size *size, struct tb_needs *n);        \
    void tb_k_draw_needs_##target(const struct tb_pass_size *size, struct tb_needs *n);
TB_K_TABLES(avx2)
TB_K_TABLES(avx512)
TB_K_TABLES(bf16)

/* Whether the instruction set of that name (NULL = the best here) has bf16 products. */
bool tb_cpu_has_bf16(const char *isa);

/* At least that many bytes of scratch memory, contents undefined; aborts when fewer were lent. Any
 * thread of the team. */
void *tb_scratch_get(const struct tb_scratch *s, size_t bytes);

/* 64-byte aligned, huge pages for big blocks; NULL when there is none left. */
void *tb_cpu_alloc(size_t bytes);
void tb_cpu_free(void *p);
/* The same, counted against be->mem_limit; NULL beyond it. */
void *tb_cpu_take(struct tb_backend *be, size_t bytes);
void tb_cpu_give(struct tb_backend *be, void *p, size_t bytes); /* accepts NULL */

#endif
