/*
 * The CUDA backend's life: the choice of a device, what it must have, the table of functions, and
 * what happens when it is lost.
 *
 * A call that fails makes the device lost for good: CUDA's context does not come back in a process.
 * From then on nothing is queued any more, what is downloaded is zeros, and ops->sync tells the
 * first failure, so that every op that needed the device fails with it.
 *
 * Owner: see cuda.h. Thread: create and destroy on any one thread.
 */
#include <stdio.h>

#include "cuda/host.h"
#include "util/log.h"

#define LEAST_MAJOR 8 /* compute capability: bf16 tensor cores, cp.async */
/* Enough for the products, and for what it costs to bring a gradient from another device. */
#define SHARD_TOKENS 4096

void tb_cuda_fail(struct tb_cuda *c, const char *what, const char *why)
{
    if (c->capturing) {
        if (!c->capture_failed)
            snprintf(c->not_captured, sizeof(c->not_captured), "%s: %s", what, why);
        c->capture_failed = true;
        return;
    }
    if (c->lost.code) return;
    c->be.lost = true;
    tb_error_set(&c->lost, TB_EDEVICE, "CUDA device %d (%s) is lost: %s: %s", c->device, c->name,
                 what, why);
    tb_log(TB_LOG_ERROR, "cuda", "%s", c->lost.msg);
}

bool tb_cuda_ok(struct tb_cuda *c, cudaError_t e, const char *what)
{
    if (e) {
        (void)cudaGetLastError(); /* or the thread's next launch, on any device, has failed too */
        tb_cuda_fail(c, what, cudaGetErrorString(e));
    }
    return !e && !c->lost.code && !c->capture_failed;
}

/* ---- sizes of steps */

/* A product reads its weight once for all rows, so from some hundred rows on arithmetic bounds it;
 * 2,048 also give every multiprocessor several tiles of a product as narrow as the residual stream,
 * and each launch enough to do. More would gain little, and a sample that comes while a step trains
 * waits for it: 8B takes 4 operations a parameter and row, 67 TFLOP, an eighth of a second at half
 * a PFLOPS.
 *
 * 8B keeps 4.3 MB of activations a row: with them and a block of logits, a step takes 10 GiB, which
 * is less than a sixth of what an 80 GB device lends. Smaller ones cut a step into micro-batches.
 * The block holds the logits of nearly all rows of a step, but never more than a 64th of the
 * memory, as training and sampling have one each. */
static struct tb_backend_sizes sizes_of(size_t memory)
{
    const size_t least = (size_t)64 << 20, most = (size_t)1 << 30;
    return (struct tb_backend_sizes){.train_rows = 2048,
                                     .prefill_rows = 2048,
                                     .activation_bytes = SIZE_MAX,
                                     .activation_part = 6,
                                     .logits_bytes = TB_MIN(TB_MAX(memory / 64, least), most),
                                     .kv_bytes = SIZE_MAX};
}

/* ---- the device */

static int open_device(struct tb_cuda *c, int device, struct tb_error *err)
{
    struct cudaDeviceProp p;
    int n = 0;
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e || n == 0)
        return tb_error_set(err, TB_EUNSUPPORTED, "no CUDA device can be used: %s%s",
                            cudaGetErrorString(e ? e : cudaErrorNoDevice),
                            e == cudaErrorInsufficientDriver ? ", or there is no driver" : "");
    c->device = device;
    if (device < 0 || device >= n)
        return tb_error_set(err, TB_EINVAL, "there is no CUDA device %d; there %s %d, from 0",
                            device, n == 1 ? "is" : "are", n);
    if ((e = cudaGetDeviceProperties(&p, c->device)) || (e = cudaSetDevice(c->device)))
        return tb_error_set(err, TB_EUNSUPPORTED, "CUDA device %d cannot be used: %s", c->device,
                            cudaGetErrorString(e));
    snprintf(c->name, sizeof(c->name), "%.63s", p.name);
    if (p.major < LEAST_MAJOR)
        return tb_error_set(err, TB_EUNSUPPORTED,
                            "CUDA device %d (%s) has compute capability %d.%d; %d.0 is the least "
                            "that is supported",
                            c->device, c->name, p.major, p.minor, LEAST_MAJOR);
    c->n_sm = p.multiProcessorCount;
    snprintf(c->kind, sizeof(c->kind), "%s, %d multiprocessors", c->name, c->n_sm);
    c->be.kind = c->kind;
    c->smem_block = p.sharedMemPerBlockOptin;
    c->total_bytes = p.totalGlobalMem;
    return 0;
}

/* All device memory that the backend will ever use: the limit, or nine tenths of what is free when
 * there is none or it is more than there is. */
static int open_pool(struct tb_cuda *c, size_t limit, struct tb_error *err)
{
    size_t free_bytes = 0, total = 0;
    cudaError_t e = cudaMemGetInfo(&free_bytes, &total);
    if (e)
        return tb_error_set(err, TB_EUNSUPPORTED, "CUDA device %d: its memory is not known: %s",
                            c->device, cudaGetErrorString(e));
    bool by_limit = limit && limit <= free_bytes;
    size_t bytes = by_limit ? limit : free_bytes / 10 * 9;
    bytes &= ~(TB_CUDA_ALIGN - 1);
    if ((e = cudaMalloc(&c->memory, bytes)))
        return tb_error_set(err, TB_ENOMEM, "CUDA device %d: %zu MiB cannot be had: %s", c->device,
                            bytes >> 20, cudaGetErrorString(e));
    c->be.mem_limit = bytes;
    c->be.sizes = sizes_of(bytes);
    tb_log(TB_LOG_INFO, "cuda", "device %d (%s): %zu MiB of %zu MiB that are free%s", c->device,
           c->name, bytes >> 20, free_bytes >> 20,
           by_limit ? ""
           : limit  ? ": nine tenths, as the limit is more than there is"
                    : ": nine tenths, as there is no limit");
    return tb_cuda_pool_create(&c->pool, c->memory, bytes, err);
}

/* ---- life */

static void destroy(struct tb_backend *be)
{
    struct tb_cuda *c = tb_cuda(be);
    if (!c) return;
    (void)cudaSetDevice(c->device);
    (void)cudaDeviceSynchronize();
    tb_cuda_queues_destroy(c);
    tb_cuda_plans_destroy(c);
    tb_cuda_ring_destroy(c);
    tb_cuda_free(be, c->scratch, c->scratch_bytes);
    tb_cuda_pool_destroy(c->pool);
    if (c->memory) (void)cudaFree(c->memory);
    (void)cudaGetLastError(); /* this device's failures are none of another one's */
    tb_free(c);
}

static void describe(struct tb_backend *be, char *out, size_t n)
{
    const struct tb_cuda *c = tb_cuda(be);
    snprintf(out, n, "cuda %s, %s, %d multiprocessors, %zu GiB", c->name,
             be->act == TB_BF16 ? "bf16" : "f32", c->n_sm, c->total_bytes >> 30);
}

static void fill_ops(struct tb_cuda *c)
{
    struct tb_backend_ops *o = &c->ops;
    o->name = "cuda";
    o->destroy = destroy;
    o->describe = describe;
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
    c->be.ops = o;
}

/* Fails where the module has no code for this device's kind. */
static int try_kernel(struct tb_cuda *c, struct tb_error *err)
{
    c->ops.zero(&c->be, c->scratch, sizeof(float));
    c->ops.add(&c->be, c->scratch, c->scratch, 1);
    return c->ops.sync(&c->be, err);
}

int tb_backend_cuda_create(struct tb_backend **out, const struct tb_backend_options *options,
                           struct tb_error *err)
{
    struct tb_cuda *c = tb_calloc(1, sizeof(*c));
    *out = NULL;
    c->be.act = options ? options->act : TB_BF16;
    c->be.shard_tokens = SHARD_TOKENS;
    fill_ops(c);
    int rc = open_device(c, options ? options->device : 0, err);
    if (!rc) rc = open_pool(c, options ? options->mem_limit : 0, err);
    if (!rc) rc = tb_cuda_queues_create(c, err);
    if (!rc) rc = tb_cuda_ring_create(c, err);
    if (!rc && !(c->scratch = tb_cuda_alloc(&c->be, TB_CUDA_SCRATCH)))
        rc = tb_backend_no_memory(&c->be, err, TB_CUDA_SCRATCH, "the kernels' buffers");
    if (c->scratch) c->scratch_bytes = TB_CUDA_SCRATCH;
    if (!rc) rc = tb_cuda_plans_create(c, err);
    if (!rc) rc = try_kernel(c, err);
    if (rc) {
        destroy(&c->be);
        return rc;
    }
    *out = &c->be;
    return 0;
}
