/* Until src/cuda/ has all its files: what they will define, weakly. */
#include <stdlib.h>
#include <string.h>

#include "cuda/cuda.h"

#define WEAK __attribute__((weak))

WEAK bool tb_cuda_ok(struct tb_cuda *c, cudaError_t e, const char *what)
{
    if (e && !c->lost.code)
        tb_error_set(&c->lost, TB_EDEVICE, "%s: %s", what, cudaGetErrorString(e));
    return !c->lost.code;
}
static char *staged;
static size_t staged_at;
WEAK const void *tb_cuda_stage(struct tb_cuda *c, const void *host, size_t bytes)
{
    if (!staged) staged = malloc(2 * TB_CUDA_STAGE);
    if (staged_at > TB_CUDA_STAGE) staged_at = 0;
    char *p = memcpy(staged + staged_at, host, bytes);
    staged_at += (bytes + 255) / 256 * 256;
    return c->lost.code ? NULL : p;
}
WEAK void tb_cuda_fetch(struct tb_cuda *c, void *host, const void *device, size_t bytes)
{
    memcpy(host, device, bytes);
}
WEAK void tb_cuda_memory_ops(struct tb_backend_ops *o) {}
WEAK void tb_cuda_product_ops(struct tb_backend_ops *o) {}
WEAK void tb_cuda_queue_ops(struct tb_backend_ops *o) {}
WEAK void tb_cuda_elem_ops(struct tb_backend_ops *o) {}
void tb_cuda_norm_ops(struct tb_backend_ops *o);
void tb_cuda_optim_ops(struct tb_backend_ops *o);
WEAK void tb_cuda_norm_ops(struct tb_backend_ops *o) {}
WEAK void tb_cuda_optim_ops(struct tb_backend_ops *o) {}
WEAK void tb_cuda_lora_ops(struct tb_backend_ops *o) {}
WEAK void tb_cuda_attn_ops(struct tb_backend_ops *o) {}
WEAK void tb_cuda_attn_bwd_ops(struct tb_backend_ops *o) {}
WEAK void tb_cuda_head_ops(struct tb_backend_ops *o) {}
WEAK void tb_cuda_draw_ops(struct tb_backend_ops *o) {}
static void destroy(struct tb_backend *be)
{
    free(tb_cuda(be)->scratch);
    free(be);
}
static int sync_device(struct tb_backend *be, struct tb_error *err)
{
    *err = tb_cuda(be)->lost;
    return err->code;
}
static void *alloc(struct tb_backend *be, size_t bytes)
{
    return aligned_alloc(256, (bytes + 255) / 256 * 256);
}
static void release(struct tb_backend *be, void *p, size_t bytes)
{
    free(p);
}
static void copy(struct tb_backend *be, void *dst, const void *src, size_t bytes)
{
    memcpy(dst, src, bytes);
}
static void zero(struct tb_backend *be, void *dst, size_t bytes)
{
    memset(dst, 0, bytes);
}
int tb_backend_cuda_create(struct tb_backend **out, const struct tb_backend_options *options,
                           struct tb_error *err);
WEAK int tb_backend_cuda_create(struct tb_backend **out, const struct tb_backend_options *options,
                                struct tb_error *err)
{
    struct tb_cuda *c = calloc(1, sizeof(*c));
    struct tb_backend_ops *o = &c->ops;
    c->be.act = options->act;
    c->be.ops = o;
    c->n_sm = 3;
    c->smem_block = 227 << 10;
    c->scratch_bytes = TB_CUDA_SCRATCH;
    c->scratch = malloc(c->scratch_bytes);
    o->name = "cuda";
    o->destroy = destroy;
    o->sync = sync_device;
    o->alloc = alloc;
    o->free = release;
    o->upload = o->download = o->copy = copy;
    o->zero = zero;
    tb_cuda_memory_ops(o);
    tb_cuda_product_ops(o);
    tb_cuda_queue_ops(o);
    tb_cuda_elem_ops(o);
    tb_cuda_norm_ops(o);
    tb_cuda_optim_ops(o);
    tb_cuda_lora_ops(o);
    tb_cuda_attn_ops(o);
    tb_cuda_attn_bwd_ops(o);
    tb_cuda_head_ops(o);
    tb_cuda_draw_ops(o);
    *out = &c->be;
    return 0;
}
