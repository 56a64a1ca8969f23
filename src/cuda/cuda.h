/*
 * The CUDA backend's own types, shared by the files of cuda/: C host code and .cu kernels. Nothing
 * outside includes it but its tests.
 *
 * Every function of the table queues its work on c->stream and returns; those that hand something
 * to the host wait for it. A call that fails makes the device lost: c->lost says why, every later
 * call does nothing, and ops->sync returns it.
 *
 * Owner: struct tb_cuda is made by tb_cuda_create and freed by ops->destroy. Device memory is one
 * pool (pool.c); what the kernels need beside their arguments is in it too. Thread: the caller's,
 * one at a time.
 */
#ifndef TB_CUDA_CUDA_H
#define TB_CUDA_CUDA_H

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "backend/backend.h"
#include "util/mem.h"

struct tb_cuda_pool;   /* pool.c */
struct tb_cuda_ring;   /* staging.c */
struct tb_cuda_plans;  /* product.c */
struct tb_cuda_queues; /* queue.c */

struct tb_cuda {
    struct tb_backend be; /* first: the table's functions cast */
    struct tb_backend_ops ops;
    int device;
    char name[64], kind[96];
    int n_sm;            /* multiprocessors */
    size_t smem_block;   /* shared memory that a block may ask for */
    cudaStream_t stream; /* where work is queued now */
    /* Device memory that one call of the table may use while its kernels run; never grows, so a
     * function works through its rows in pieces that fit. */
    void *scratch;
    size_t scratch_bytes; /* at least TB_CUDA_SCRATCH */
    size_t total_bytes;   /* of device memory */
    uint64_t peers;       /* devices, a bit each, that copies have come from */
    void *memory;         /* what the pool cuts up */
    struct tb_cuda_pool *pool;
    struct tb_cuda_ring *ring;
    struct tb_cuda_plans *plans;
    struct tb_cuda_queues *queues;
    struct tb_error lost; /* code 0: the device works */
    /* A step is being captured: nothing runs, and a call that fails only ends the capture. When it
     * is only compared with the last one, calls do no more than change the print. */
    bool capturing, comparing, capture_failed;
    char not_captured[128]; /* why it failed */
    uint64_t print;         /* of what the step has asked for */
};

#define TB_CUDA_SCRATCH ((size_t)32 << 20)

static inline struct tb_cuda *tb_cuda(struct tb_backend *be)
{
    return (struct tb_cuda *)(void *)be;
}

/* Device `options->device`. mem_limit 0, or more than is free: nine tenths of the device's free
 * memory. */
int tb_backend_cuda_create(struct tb_backend **out, const struct tb_backend_options *options,
                           struct tb_error *err);

/* Notes a failed call; the first one stays. False when e is an error or the device is lost. */
bool tb_cuda_ok(struct tb_cuda *c, cudaError_t e, const char *what);

/* A device copy of a host array (positions, spans, ...), for the kernels queued next, which only
 * read it: arrays with the same bytes share one. The host's may be changed at once. Valid for the
 * kernels that this call of the table queues, which may stage 2 * TB_CUDA_STAGE bytes, no array
 * more than TB_CUDA_STAGE; NULL when the device is lost (then nothing may be launched). */
const void *tb_cuda_stage(struct tb_cuda *c, const void *host, size_t bytes);
#define TB_CUDA_STAGE ((size_t)8 << 20)

/* While a step is captured or compared: these bytes are part of what it asks for. */
void tb_cuda_note(struct tb_cuda *c, const void *what, size_t bytes);

/* n or somewhat more, the same for many n that follow each other: sizes of what grows from step to
 * step, so that most steps ask for the same. */
static inline size_t tb_cuda_steady(size_t n)
{
    size_t step = 1;
    while (n / step >= 16)
        step *= 2;
    return (n + step - 1) / step * step;
}

/* Waits for the queued work and copies from the device. Zeroes host when the device is lost. */
void tb_cuda_fetch(struct tb_cuda *c, void *host, const void *device, size_t bytes);

/* Tables of functions: each fills what it implements. */
void tb_cuda_memory_ops(struct tb_backend_ops *o);   /* pool.c, staging.c */
void tb_cuda_product_ops(struct tb_backend_ops *o);  /* product.c: cuBLASLt */
void tb_cuda_queue_ops(struct tb_backend_ops *o);    /* queue.c: streams and graphs */
void tb_cuda_elem_ops(struct tb_backend_ops *o);     /* k_elem.cu */
void tb_cuda_norm_ops(struct tb_backend_ops *o);     /* k_norm.cu */
void tb_cuda_optim_ops(struct tb_backend_ops *o);    /* k_optim.cu */
void tb_cuda_lora_ops(struct tb_backend_ops *o);     /* k_lora.cu */
void tb_cuda_attn_ops(struct tb_backend_ops *o);     /* k_attn.cu */
void tb_cuda_attn_bwd_ops(struct tb_backend_ops *o); /* k_attn_bwd.cu */
void tb_cuda_head_ops(struct tb_backend_ops *o);     /* k_head.cu */
void tb_cuda_draw_ops(struct tb_backend_ops *o);     /* k_draw.cu */

#ifdef __cplusplus
}
#endif

#endif
