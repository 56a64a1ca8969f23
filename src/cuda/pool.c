/*
 * Device memory: one piece taken with cudaMalloc at the start, cut here on the host, so that
 * nothing in a step asks the driver for memory or waits for it.
 *
 * The free ranges are a list in order of address. A range is taken from the start of the shortest
 * one that holds it (the lowest of equal ones); one that comes back joins its neighbours.
 *
 * The limit counts bytes, not where they lie: a block may fit in total and not in one piece. Then
 * the reclaimer is asked for more until a piece is long enough or nothing is left to free, and
 * after that there is no memory.
 *
 * What is freed may still be read by queued work. That is safe: all queues run in the order in
 * which the host filled them (queue.c), so whatever is written to a range by its next holder is
 * queued after, and runs after, all that the last one queued.
 *
 * Owner: struct tb_cuda. Thread: the backend's.
 */
#include <string.h>

#include "cuda/host.h"
#include "util/log.h"

struct range {
    size_t at, bytes;
};

struct tb_cuda_pool {
    char *base;
    size_t bytes, free_bytes;
    struct range *free; /* by address, no two touch */
    size_t n, cap;
};

int tb_cuda_pool_create(struct tb_cuda_pool **out, void *base, size_t bytes, struct tb_error *err)
{
    struct tb_cuda_pool *p = tb_calloc(1, sizeof(*p));
    p->base = base;
    p->bytes = p->free_bytes = bytes & ~(TB_CUDA_ALIGN - 1);
    p->cap = 64;
    p->free = tb_malloc(p->cap * sizeof(*p->free));
    if (p->bytes) p->free[p->n++] = (struct range){0, p->bytes};
    *out = p;
    return 0;
}

void tb_cuda_pool_destroy(struct tb_cuda_pool *p)
{
    if (!p) return;
    tb_free(p->free);
    tb_free(p);
}

void *tb_cuda_pool_take(struct tb_cuda_pool *p, size_t bytes)
{
    size_t want = tb_cuda_round_up(TB_MAX(bytes, 1)), best = SIZE_MAX;
    if (bytes > p->free_bytes) return NULL;
    for (size_t i = 0; i < p->n; i++)
        if (p->free[i].bytes >= want &&
            (best == SIZE_MAX || p->free[i].bytes < p->free[best].bytes))
            best = i;
    if (best == SIZE_MAX) return NULL;
    struct range *r = &p->free[best];
    void *at = p->base + r->at;
    r->at += want;
    r->bytes -= want;
    if (r->bytes == 0) memmove(r, r + 1, (--p->n - best) * sizeof(*r));
    p->free_bytes -= want;
    return at;
}

/* The first free range beyond an offset. */
static size_t find_after(const struct tb_cuda_pool *p, size_t at)
{
    size_t lo = 0, hi = p->n;
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (p->free[mid].at < at)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

void tb_cuda_pool_give(struct tb_cuda_pool *p, void *memory, size_t bytes)
{
    size_t at = (size_t)((char *)memory - p->base), n = tb_cuda_round_up(TB_MAX(bytes, 1));
    size_t i = find_after(p, at);
    struct range *prev = i > 0 ? &p->free[i - 1] : NULL, *next = i < p->n ? &p->free[i] : NULL;
    TB_BUG_ON(at % TB_CUDA_ALIGN || at > p->bytes || n > p->bytes - at);
    TB_BUG_ON((prev && prev->at + prev->bytes > at) || (next && at + n > next->at));
    p->free_bytes += n;
    bool joins_prev = prev && prev->at + prev->bytes == at, joins_next = next && at + n == next->at;
    if (joins_prev && joins_next) {
        prev->bytes += n + next->bytes;
        memmove(next, next + 1, (--p->n - i) * sizeof(*next));
    } else if (joins_prev) {
        prev->bytes += n;
    } else if (joins_next) {
        next->at = at;
        next->bytes += n;
    } else {
        if (p->n == p->cap) {
            p->cap *= 2;
            p->free = tb_realloc(p->free, p->cap * sizeof(*p->free));
        }
        memmove(p->free + i + 1, p->free + i, (p->n++ - i) * sizeof(*p->free));
        p->free[i] = (struct range){at, n};
    }
}

size_t tb_cuda_pool_free_bytes(const struct tb_cuda_pool *p)
{
    return p->free_bytes;
}

size_t tb_cuda_pool_longest(const struct tb_cuda_pool *p)
{
    size_t longest = 0;
    for (size_t i = 0; i < p->n; i++)
        longest = TB_MAX(longest, p->free[i].bytes);
    return longest;
}

/* ---- the table's functions */

/* Makes others give up more than the limit asks for, until a piece is long enough. */
static void *take_after_reclaim(struct tb_cuda *c, size_t bytes)
{
    struct tb_backend *be = &c->be;
    void *at = NULL;
    for (size_t before = SIZE_MAX; !at && be->reclaimer && be->mem_used < before;) {
        before = be->mem_used;
        size_t more = be->mem_limit - be->mem_used + bytes;
        be->reclaim_error.code = 0;
        be->reclaimer->reclaim(be->reclaimer_arg, TB_MIN(more, tb_backend_room(be)));
        at = tb_cuda_pool_take(c->pool, bytes);
    }
    if (!at)
        tb_log(TB_LOG_WARN, "cuda",
               "device %d: no piece of %zu KiB among the %zu KiB that are free; the longest has "
               "%zu KiB",
               c->device, bytes >> 10, tb_cuda_pool_free_bytes(c->pool) >> 10,
               tb_cuda_pool_longest(c->pool) >> 10);
    return at;
}

void *tb_cuda_alloc(struct tb_backend *be, size_t bytes)
{
    struct tb_cuda *c = tb_cuda(be);
    if (bytes > SIZE_MAX - TB_CUDA_ALIGN) return NULL;
    bytes = tb_cuda_round_up(TB_MAX(bytes, 1));
    if (!tb_backend_charge(be, bytes)) return NULL;
    void *at = tb_cuda_pool_take(c->pool, bytes);
    if (at) return at;
    tb_backend_uncharge(be, bytes);
    at = take_after_reclaim(c, bytes);
    if (at) be->mem_used += bytes;
    return at;
}

void tb_cuda_free(struct tb_backend *be, void *p, size_t bytes)
{
    if (!p) return;
    tb_backend_uncharge(be, tb_cuda_round_up(TB_MAX(bytes, 1)));
    tb_cuda_pool_give(tb_cuda(be)->pool, p, bytes);
}
