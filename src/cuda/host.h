/*
 * What the host files of cuda/ share; kernels see cuda.h only.
 *
 * Owner and thread: as in cuda.h. Nothing here outlives struct tb_cuda.
 */
#ifndef TB_CUDA_HOST_H
#define TB_CUDA_HOST_H

#include "cuda/cuda.h"

#define TB_CUDA_ALIGN ((size_t)256) /* of all device memory that is given out */

static inline size_t tb_cuda_round_up(size_t bytes)
{
    return (bytes + TB_CUDA_ALIGN - 1) & ~(TB_CUDA_ALIGN - 1);
}

/* backend.c: the device is lost because of `what`; the first reason stays. */
void tb_cuda_fail(struct tb_cuda *c, const char *what, const char *why);

/* pool.c: device memory from one piece of `bytes`, cut and joined on the host. take gives NULL when
 * no free piece is as long; both round bytes up, and neither counts them. */
int tb_cuda_pool_create(struct tb_cuda_pool **out, void *base, size_t bytes, struct tb_error *err);
void tb_cuda_pool_destroy(struct tb_cuda_pool *p); /* accepts NULL; base is the caller's */
void *tb_cuda_pool_take(struct tb_cuda_pool *p, size_t bytes);
void tb_cuda_pool_give(struct tb_cuda_pool *p, void *at, size_t bytes);
size_t tb_cuda_pool_free_bytes(const struct tb_cuda_pool *p);
size_t tb_cuda_pool_longest(const struct tb_cuda_pool *p); /* free piece */
/* The table's alloc and free. */
void *tb_cuda_alloc(struct tb_backend *be, size_t bytes);
void tb_cuda_free(struct tb_backend *be, void *p, size_t bytes);

/* staging.c */
int tb_cuda_ring_create(struct tb_cuda *c, struct tb_error *err);
void tb_cuda_ring_destroy(struct tb_cuda *c);
/* What is staged while a step is captured gathers in memory of its own. Before a capture: waits
 * until the last graph has read what was staged for it; after it: copies it all to the device, for
 * the graph that is queued next; when that is queued. */
bool tb_cuda_ring_capture(struct tb_cuda *c);
void tb_cuda_ring_send(struct tb_cuda *c);
void tb_cuda_ring_sent(struct tb_cuda *c);

/* product.c */
int tb_cuda_plans_create(struct tb_cuda *c, struct tb_error *err);
void tb_cuda_plans_destroy(struct tb_cuda *c);

/* queue.c */
int tb_cuda_queues_create(struct tb_cuda *c, struct tb_error *err);
void tb_cuda_queues_destroy(struct tb_cuda *c);

#endif
