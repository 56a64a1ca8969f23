/*
 * The host side of the CUDA backend under the emulation: the memory pool, copies through the
 * staging ring, products whose rows do not depend on the batch, captured steps, a lost device.
 */
#include "../unit/backend/common.h"
#include "cuda/host.h"
#include "emu.h"

static struct tb_backend *open_nth(int device, enum tb_dtype act, size_t limit)
{
    struct tb_backend *be = NULL;
    struct tb_error err = {0};
    struct tb_backend_options o = {.act = act, .mem_limit = limit, .device = device};
    if (tb_backend_cuda_create(&be, &o, &err)) fail_msg("%s", err.msg);
    return be;
}

static struct tb_backend *open_device(enum tb_dtype act, size_t limit)
{
    return open_nth(0, act, limit);
}

static int pick(int n) /* uniform in [0, n) */
{
    int i = (int)((rnd() + 1) / 2 * (float)n);
    return i < n ? i : n - 1;
}

/* ---- pool */

#define UNIT  TB_CUDA_ALIGN
#define UNITS 1000

/* Which units of the pool are taken, and what the pool must say about the rest. */
static void check_pool(const struct tb_cuda_pool *p, const bool *taken)
{
    size_t n = 0, run = 0, longest = 0;
    for (int i = 0; i < UNITS; i++) {
        run = taken[i] ? 0 : run + 1;
        n += !taken[i];
        longest = run > longest ? run : longest;
    }
    assert_int_equal(tb_cuda_pool_free_bytes(p), n * UNIT);
    assert_int_equal(tb_cuda_pool_longest(p), longest * UNIT);
}

/* The lowest of the shortest free runs of at least n units; -1: none. */
static int best_fit(const bool *taken, int n)
{
    int best = -1, best_len = UNITS + 1;
    for (int i = 0; i < UNITS;) {
        int len = 0;
        while (i + len < UNITS && !taken[i + len])
            len++;
        if (len >= n && len < best_len) {
            best = i;
            best_len = len;
        }
        i += len + 1;
    }
    return best;
}

static void test_pool(void **state)
{
    static char base[UNITS * UNIT];
    static bool taken[UNITS];
    struct {
        char *p;
        size_t bytes;
    } live[200];
    struct tb_cuda_pool *pool = NULL;
    int n = 0;
    assert_int_equal(tb_cuda_pool_create(&pool, base, sizeof(base) + 100, NULL), 0);
    for (int step = 0; step < 20000; step++) {
        bool grow = n == 0 || (n < 200 && pick(100) < (step / 1000 % 2 ? 40 : 60));
        if (grow) {
            size_t bytes = (size_t)pick(pick(10) ? 2000 : 60000) + (size_t)(pick(4) != 0);
            int units = bytes ? (int)((bytes + UNIT - 1) / UNIT) : 1, at = best_fit(taken, units);
            char *p = tb_cuda_pool_take(pool, bytes);
            assert_ptr_equal(p, at < 0 ? NULL : base + (size_t)at * UNIT);
            for (int i = 0; p && i < units; i++)
                taken[at + i] = true;
            if (p) {
                live[n].p = p;
                live[n++].bytes = bytes;
            }
        } else {
            int i = pick(n);
            size_t at = (size_t)(live[i].p - base) / UNIT;
            tb_cuda_pool_give(pool, live[i].p, live[i].bytes);
            for (size_t k = 0; k == 0 || k * UNIT < live[i].bytes; k++)
                taken[at + k] = false;
            live[i] = live[--n];
        }
        check_pool(pool, taken);
    }
    while (n--)
        tb_cuda_pool_give(pool, live[n].p, live[n].bytes);
    assert_int_equal(tb_cuda_pool_longest(pool), sizeof(base));
    assert_null(tb_cuda_pool_take(pool, SIZE_MAX));
    tb_cuda_pool_destroy(pool);
}

/* What a limit means: exactly that much, or nine tenths of what is free. */
static void test_limits(void **state)
{
    emu_only();
    struct tb_error err = {0};
    struct tb_backend_options o = {.act = TB_BF16, .mem_limit = (size_t)200 << 20};
    struct tb_backend *a = NULL, *b = NULL;
    assert_int_equal(tb_backend_cuda_create(&a, &o, &err), 0);
    assert_int_equal(a->mem_limit, (size_t)200 << 20);
    assert_true(a->mem_used > TB_CUDA_SCRATCH && a->mem_used < a->mem_limit);
    size_t left = a->mem_limit - a->mem_used;
    assert_null(a->ops->alloc(a, left + 1));
    void *p = a->ops->alloc(a, left);
    assert_non_null(p);
    assert_int_equal(a->mem_used, a->mem_limit);
    a->ops->free(a, p, left);
    assert_int_equal(a->mem_limit - a->mem_used, left);
    assert_null(a->ops->alloc(a, SIZE_MAX));
    o.mem_limit = (size_t)1 << 50;
    assert_int_equal(tb_backend_cuda_create(&b, &o, &err), 0);
    size_t most = ((size_t)1 << 30) - ((size_t)200 << 20);
    assert_true(b->mem_limit <= most / 10 * 9 && b->mem_limit > most / 10 * 8);
    b->ops->destroy(b);
    o.mem_limit = (size_t)16 << 20;
    assert_int_equal(tb_backend_cuda_create(&b, &o, &err), TB_ENOMEM);
    assert_non_null(strstr(err.msg, "16.0 MiB"));
    o = (struct tb_backend_options){.act = TB_BF16, .device = 7};
    assert_int_equal(tb_backend_cuda_create(&b, &o, &err), TB_EINVAL);
    assert_non_null(strstr(err.msg, "no CUDA device 7"));
    char line[200];
    a->ops->describe(a, line, sizeof(line));
    assert_non_null(strstr(line, "cuda emulated GPU, bf16, "));
    a->ops->destroy(a);
    setenv("TB_EMU_DEVICES", "0", 1);
    o.device = 0;
    assert_int_equal(tb_backend_cuda_create(&b, &o, &err), TB_EUNSUPPORTED);
    assert_non_null(strstr(err.msg, "no CUDA device can be used: "));
    unsetenv("TB_EMU_DEVICES");
}

/* Blocks that others would give up, one at a time. */
struct hoard {
    struct tb_backend *be;
    void *blocks[64];
    int n;
    size_t bytes;
};
static size_t hoard_reclaimable(void *arg)
{
    const struct hoard *h = arg;
    return (size_t)h->n * h->bytes;
}
static void hoard_reclaim(void *arg, size_t bytes)
{
    struct hoard *h = arg;
    if (bytes > tb_backend_room(h->be)) return;
    while (h->n && !tb_backend_fits(h->be, bytes))
        h->be->ops->free(h->be, h->blocks[--h->n], h->bytes);
}

/* Free memory in pieces: others give up theirs until there is a piece that is long enough. */
static void test_fragments(void **state)
{
    static const struct tb_reclaimer reclaimer = {hoard_reclaimable, hoard_reclaim};
    struct tb_backend *be = open_device(TB_F32, (size_t)256 << 20);
    size_t unit = (be->mem_limit - be->mem_used) / 64 & ~(TB_CUDA_ALIGN - 1);
    void *blocks[64];
    struct hoard h = {.be = be, .bytes = unit};
    for (int i = 0; i < 64; i++)
        assert_non_null(blocks[i] = be->ops->alloc(be, unit));
    for (int i = 0; i < 64; i += 2)
        be->ops->free(be, blocks[i], unit);
    size_t used = be->mem_used;
    assert_true(tb_backend_fits(be, 4 * unit));
    assert_null(be->ops->alloc(be, 4 * unit)); /* it fits, but nowhere */
    assert_int_equal(be->mem_used, used);
    for (int i = 1; i < 64; i += 2)
        h.blocks[h.n++] = blocks[i];
    be->reclaimer = &reclaimer;
    be->reclaimer_arg = &h;
    void *p = be->ops->alloc(be, 4 * unit);
    assert_non_null(p);
    assert_true(h.n > 0 && h.n < 32); /* not more than needed */
    assert_int_equal(be->mem_used, used - (size_t)(32 - h.n) * unit + 4 * unit);
    assert_null(be->ops->alloc(be, 64 * unit)); /* in vain: all stay where they are */
    assert_true(h.n > 0);
    be->ops->destroy(be);
}

/* ---- staging */

static void test_staging(void **state)
{
    struct tb_backend *be = open_device(TB_F32, (size_t)400 << 20);
    struct tb_cuda *c = tb_cuda(be);
    size_t total = (size_t)120 << 20, at = 0; /* several times the ring */
    unsigned char *want = malloc(total), *got = malloc(total);
    char *kept = be->ops->alloc(be, total);
    assert_non_null(kept);
    for (size_t i = 0; i < total; i += 8) {
        uint64_t word = (i + 1) * 0x9e3779b97f4a7c15u;
        memcpy(want + i, &word, 8);
    }
    while (at < total) { /* what a call stages stays until it is done, up to twice the most */
        const char *staged[8];
        size_t n[8], room = 2 * TB_CUDA_STAGE, from = at;
        int k = 0;
        for (; k < 8 && room && at < total; k++) {
            n[k] = pick(4) ? (size_t)pick(5000) + 1 : (size_t)pick((int)TB_CUDA_STAGE) + 1;
            n[k] = n[k] < room ? n[k] : room;
            n[k] = n[k] < total - at ? n[k] : total - at;
            assert_non_null(staged[k] = tb_cuda_stage(c, want + at, n[k]));
            assert_int_equal((uintptr_t)staged[k] % TB_CUDA_ALIGN, 0);
            at += n[k];
            room -= n[k];
        }
        for (int i = 0; i < k; from += n[i++]) /* queued now, as kernels would be */
            be->ops->copy(be, kept + from, staged[i], n[i]);
    }
    be->ops->download(be, got, kept, total);
    assert_same_bits("staged", got, want, total);
    be->ops->zero(be, kept, total);
    for (at = 0; at < total;) {
        size_t n = (size_t)pick(30 << 20) + 1;
        n = n < total - at ? n : total - at;
        unsigned char *copy = malloc(n);
        memcpy(copy, want + at, n);
        be->ops->upload(be, kept + at, copy, n);
        memset(copy, 0xee, n); /* the caller's again */
        free(copy);
        at += n;
    }
    memset(got, 0, total);
    for (at = 0; at < total;) {
        size_t n = (size_t)pick(5 << 20) + 1;
        n = n < total - at ? n : total - at;
        be->ops->download(be, got + at, kept + at, n);
        at += n;
    }
    assert_same_bits("uploaded", got, want, total);
    assert_int_equal(be->ops->sync(be, NULL), 0);
    be->ops->download(be, got, kept, 0);
    be->ops->free(be, kept, total);
    be->ops->destroy(be);
    free(want);
    free(got);
}

/* ---- products */

static struct tb_weight *random_weight(struct tb_backend *be, int n_in, int n_out)
{
    float *w = random_f32((size_t)n_in * (size_t)n_out);
    const void *parts[] = {w};
    enum tb_dtype dtype = TB_F32;
    struct tb_weight *out = NULL;
    struct tb_error err = {0};
    if (be->ops->weight_create(be, 1, parts, &dtype, &n_out, n_in, &out, &err))
        fail_msg("%s", err.msg);
    free(w);
    return out;
}

/* Rows in batches of any size, with any stride, have the same bits: the library's first candidate,
 * whose sums depend on the batch, is not taken. */
static void check_rows(enum tb_dtype act, int n_in, int n_out)
{
    enum { T = 333 };
    struct tb_backend *be = open_device(act, (size_t)256 << 20);
    struct tb_weight *w = random_weight(be, n_in, n_out);
    size_t e = tb_dtype_size(act);
    for (int backward = 0; backward < 2; backward++) {
        int in = backward ? n_out : n_in, out = backward ? n_in : n_out, pads[] = {0, 1, 8};
        size_t row = (size_t)in * e;
        char *x = random_act(act, (size_t)T * (size_t)in);
        float *all = malloc(4 * (size_t)T * (size_t)out);
        if (backward)
            be->ops->matmul_bwd(be, w, x, T, all, out, false);
        else
            be->ops->matmul(be, w, x, T, NULL, all, out, false);
        for (int n = 1; n <= T; n = n * 3 - n / 2) {
            int from = pick(T - n + 1), ld = out + pads[n % 3];
            float *part = malloc(4 * (size_t)n * (size_t)ld);
            if (backward)
                be->ops->matmul_bwd(be, w, x + (size_t)from * row, n, part, ld, false);
            else
                be->ops->matmul(be, w, x + (size_t)from * row, n, NULL, part, ld, false);
            assert_int_equal(be->ops->sync(be, NULL), 0);
            for (int t = 0; t < n; t++)
                assert_same_bits("a row", part + (size_t)t * (size_t)ld,
                                 all + (size_t)(from + t) * (size_t)out, 4 * (size_t)out);
            free(part);
        }
        free(x);
        free(all);
    }
    be->ops->weight_free(be, w);
    be->ops->destroy(be);
}

static void test_rows(void **state)
{
    for (int act = TB_F32; act <= TB_BF16; act++) {
        check_rows((enum tb_dtype)act, 40, 72);
        check_rows((enum tb_dtype)act, 33, 7);
        check_rows((enum tb_dtype)act, 1, 130);
    }
}

static void test_no_candidate(void **state)
{
    emu_only();
    struct tb_backend *be = open_device(TB_BF16, (size_t)256 << 20);
    void *w = random_act(TB_BF16, 60 * 16);
    const void *parts[] = {w};
    enum tb_dtype dtype = TB_BF16;
    struct tb_weight *out = NULL;
    struct tb_error err = {0};
    int rows = 16;
    size_t used = be->mem_used;
    emu_vary_products(2);
    assert_int_equal(be->ops->weight_create(be, 1, parts, &dtype, &rows, 60, &out, &err),
                     TB_EUNSUPPORTED);
    emu_vary_products(1);
    assert_non_null(strstr(err.msg, "rows do not depend on the batch"));
    assert_null(out);
    assert_int_equal(be->mem_used, used);
    assert_false(be->lost);
    assert_int_equal(be->ops->weight_create(be, 1, parts, &dtype, &rows, 60, &out, &err), 0);
    be->ops->weight_free(be, out);
    be->ops->destroy(be);
    free(w);
}

/* The same bytes are staged once, as long as they are there; others never pass for them. */
static void test_staged_again(void **state)
{
    enum { N = 8, MOST = 50000, TURNS = 2000 };
    static unsigned char a[N][MOST], got[MOST];
    struct tb_backend *be = open_device(TB_F32, (size_t)256 << 20);
    struct tb_cuda *c = tb_cuda(be);
    void *kept = be->ops->alloc(be, MOST);
    int n_same = 0;
    const void *last[N] = {NULL};
    for (int i = 0; i < TURNS; i++) {
        int k = pick(N);
        size_t n = MOST - (size_t)(k / 2); /* some have one size */
        bool changes = pick(3) == 0;
        if (changes) a[k][(size_t)pick((int)n)]++;
        const void *p = tb_cuda_stage(c, a[k], n);
        assert_ptr_equal(tb_cuda_stage(c, a[k], n), p);
        n_same += !changes && p == last[k];
        last[k] = p;
        be->ops->copy(be, kept, p, n);
        be->ops->download(be, got, kept, n);
        assert_same_bits("staged", got, a[k], n);
    }
    assert_in_range(n_same, TURNS / 2, TURNS * 3 / 4);
    be->ops->free(be, kept, MOST);
    be->ops->destroy(be);
}

/* ---- steps */

enum { DIM = 48, VOCAB = 100 };

struct work {
    struct tb_backend *be;
    struct tb_weight *w;
    float *table, *x, *y;
    const int32_t *tokens;
    int T;
    size_t extra;                        /* bytes staged besides */
    int n_calls, n_captured, n_compared; /* of which captured or compared, compared */
};

static void queue_work(void *arg)
{
    struct work *k = arg;
    struct tb_cuda *c = tb_cuda(k->be);
    const struct tb_backend_ops *o = k->be->ops;
    k->n_calls++;
    k->n_captured += c->capturing;
    k->n_compared += c->comparing;
    char *extra = k->extra ? calloc(1, TB_CUDA_STAGE) : NULL;
    for (size_t at = 0; at < k->extra; at += TB_CUDA_STAGE, extra[0]++)
        (void)tb_cuda_stage(c, extra, TB_CUDA_STAGE);
    free(extra);
    o->embed(k->be, k->table, TB_F32, k->tokens, k->T, DIM, k->x);
    o->copy(k->be, k->y, k->x, sizeof(float) * (size_t)k->T * DIM);
    o->matmul(k->be, k->w, k->x, k->T, NULL, k->y, DIM, true);
    if (k->T > 5) o->add(k->be, k->y, k->x, (size_t)k->T * DIM); /* another graph */
}

/* A step as one unit computes what its calls compute. */
static void check_step(struct work *k)
{
    const struct tb_backend_ops *o = k->be->ops;
    size_t n = sizeof(float) * (size_t)k->T * DIM;
    float *got = malloc(n), *want = malloc(n);
    int32_t tokens[64];
    k->tokens = tokens;
    for (int t = 0; t < k->T; t++)
        tokens[t] = pick(VOCAB);
    o->use(k->be, TB_QUEUE_TRAIN);
    o->zero(k->be, k->y, n);
    queue_work(k);
    o->download(k->be, want, k->y, n);
    k->n_calls = k->n_captured = k->n_compared = 0;
    o->use(k->be, TB_QUEUE_SAMPLE);
    o->zero(k->be, k->y, n);
    o->step(k->be, k->T, queue_work, k);
    memset(tokens, 0xee, sizeof(tokens));
    o->download(k->be, got, k->y, n);
    assert_int_equal(o->sync(k->be, NULL), 0);
    assert_same_bits("a step", got, want, n);
    free(got);
    free(want);
}

/* Whatever its size and form; one that asks for what the last one did is not captured again. */
static void test_steps(void **state)
{
    struct tb_backend *be = open_device(TB_F32, (size_t)256 << 20);
    const struct tb_backend_ops *o = be->ops;
    const size_t bytes = sizeof(float) * 64 * DIM;
    struct work k = {.be = be, .w = random_weight(be, DIM, DIM)};
    k.table = o->alloc(be, sizeof(float) * VOCAB * DIM);
    k.x = o->alloc(be, bytes);
    k.y = o->alloc(be, bytes);
    float *table = random_f32(VOCAB * DIM);
    o->upload(be, k.table, table, sizeof(float) * VOCAB * DIM);
    for (int i = 0; i < 30; i++) {
        k.T = 1 + (i * 7) % 40;
        k.extra = i % 10 == 9 ? 3 * TB_CUDA_STAGE : 0; /* more than a captured step may stage */
        for (int n = 0; n < 4; n++) {
            float *x = k.x;
            if (n == 3) k.x = o->alloc(be, bytes); /* the same calls, of another buffer */
            check_step(&k);
            /* compared, then plain; captured; as it was; plain again */
            assert_int_equal(k.n_compared, 1);
            assert_int_equal(k.n_calls, n == 2 && !k.extra ? 1 : 2);
            assert_int_equal(k.n_captured, n == 1 && !k.extra ? 2 : 1);
            if (n < 3) continue;
            o->free(be, k.x, bytes);
            k.x = x;
        }
    }
    o->use(be, TB_QUEUE_TRAIN);
    o->weight_free(be, k.w);
    o->destroy(be);
    free(table);
}

static void queue_odd_rows(void *arg)
{
    struct work *k = arg;
    k->n_calls++;
    k->be->ops->matmul(k->be, k->w, k->x, k->T, NULL, k->y, DIM + 1, false);
}

/* A product that must be tried first is not part of a captured step: it is asked for again. */
static void test_new_product(void **state)
{
    enum { T = 40 };
    struct tb_backend *be = open_device(TB_F32, (size_t)256 << 20);
    const struct tb_backend_ops *o = be->ops;
    float *x = random_f32(T * DIM), all[T * (DIM + 1)], one[DIM];
    struct work k = {.be = be, .w = random_weight(be, DIM, DIM), .T = T};
    const int32_t tokens[T] = {0};
    k.table = k.x = o->alloc(be, sizeof(float) * T * DIM);
    k.y = o->alloc(be, sizeof(all));
    k.tokens = tokens;
    o->use(be, TB_QUEUE_SAMPLE);
    o->step(be, T, queue_work, &k);
    o->upload(be, k.x, x, sizeof(float) * T * DIM);
    k.n_calls = 0;
    o->step(be, T, queue_odd_rows, &k);
    assert_int_equal(k.n_calls, 2);
    o->download(be, all, k.y, sizeof(all));
    o->matmul(be, k.w, k.x + 3 * DIM, 1, NULL, k.y, DIM, false);
    o->download(be, one, k.y, sizeof(one));
    assert_int_equal(o->sync(be, NULL), 0);
    assert_same_bits("a row", all + 3 * (DIM + 1), one, sizeof(one));
    o->weight_free(be, k.w);
    o->destroy(be);
    free(x);
}

/* ---- a lost device */

/* Everything that hands something to the host, after some work; 0 when all went well. */
static int use_device(struct tb_backend *be, const struct work *k, const float *table,
                      const float *want, struct tb_error *err)
{
    const struct tb_backend_ops *o = be->ops;
    const int32_t tokens[3] = {5, 0, VOCAB - 1};
    struct work mine = *k;
    float got[3 * DIM];
    mine.tokens = tokens;
    mine.T = 3;
    memset(got, 0xee, sizeof(got));
    o->use(be, TB_QUEUE_SAMPLE);
    o->upload(be, k->table, table, sizeof(float) * VOCAB * DIM);
    for (int i = 0; i < 3; i++)
        o->step(be, 3, queue_work, &mine);
    o->download(be, got, k->y, sizeof(got));
    o->use(be, TB_QUEUE_TRAIN);
    int rc = o->sync(be, err);
    if (rc == 0) {
        assert_same_bits("what a working device gives", got, want, sizeof(got));
    } else {
        assert_int_equal(rc, TB_EDEVICE);
        assert_true(be->lost);
        for (int i = 0; i < 3 * DIM; i++)
            assert_true(memcmp(got, want, sizeof(got)) == 0 || (got[i] >= 0 && got[i] <= 0));
    }
    return rc;
}

static void test_lost(void **state)
{
    emu_only();
    float *table = random_f32(VOCAB * DIM), want[3 * DIM];
    bool lost = true;
    for (long after = 0; lost; after++) {
        rng_state = 1000;
        struct tb_backend *be = open_device(TB_F32, (size_t)256 << 20);
        struct tb_error err = {0}, again = {0};
        struct work k = {.be = be, .w = random_weight(be, DIM, DIM)};
        k.table = be->ops->alloc(be, sizeof(float) * VOCAB * DIM);
        k.x = be->ops->alloc(be, sizeof(float) * 3 * DIM);
        k.y = be->ops->alloc(be, sizeof(float) * 3 * DIM);
        if (after == 0) {
            const int32_t tokens[3] = {5, 0, VOCAB - 1};
            be->ops->upload(be, k.table, table, sizeof(float) * VOCAB * DIM);
            k.tokens = tokens;
            k.T = 3;
            queue_work(&k);
            be->ops->download(be, want, k.y, sizeof(want));
        }
        emu_fail_after(after);
        lost = use_device(be, &k, table, want, &err) != 0 || after == 0;
        if (be->lost) {
            assert_non_null(strstr(err.msg, "CUDA device 0 (emulated GPU) is lost: "));
            assert_int_equal(use_device(be, &k, table, want, &again), TB_EDEVICE);
            assert_string_equal(err.msg, again.msg); /* the first reason stays */
            const void *parts[] = {table};
            enum tb_dtype dtype = TB_F32;
            struct tb_weight *w = NULL;
            int rows = VOCAB;
            assert_int_equal(be->ops->weight_create(be, 1, parts, &dtype, &rows, DIM, &w, &again),
                             TB_EDEVICE);
            void *p = be->ops->alloc(be, 1000); /* memory is the host's book-keeping */
            assert_non_null(p);
            be->ops->free(be, p, 1000);
        }
        be->ops->weight_free(be, k.w);
        be->ops->destroy(be);
        emu_fail_after(0);
        assert_true(after < 200);
    }
    free(table);
}

/* One thread serves two devices: what one of them failed with is not the other's. */
static void test_others_failure(void **state)
{
    emu_only();
    struct tb_backend *a = open_device(TB_F32, (size_t)256 << 20),
                      *b = open_device(TB_F32, (size_t)256 << 20);
    float x[4] = {1, 2, 3, 4}, *p = b->ops->alloc(b, sizeof(x));
    struct tb_error err = {0};
    b->ops->upload(b, p, x, sizeof(x));
    emu_fail_after(1);
    assert_int_equal(a->ops->sync(a, &err), TB_EDEVICE);
    emu_fail_after(0);
    b->ops->add(b, p, p, 4);
    b->ops->download(b, x, p, sizeof(x));
    assert_int_equal(b->ops->sync(b, &err), 0);
    assert_true(a->lost && !b->lost && x[3] == 8);
    a->ops->destroy(a);
    b->ops->destroy(b);
}

/* ---- copies between devices */

struct pair {
    struct tb_backend *a, *b;
    float *pa, *pb; /* [DIM] on each */
};

static struct pair open_pair(void)
{
    struct pair p = {.a = open_nth(0, TB_F32, (size_t)256 << 20),
                     .b = open_nth(1, TB_F32, (size_t)256 << 20)};
    float *x = random_f32(DIM);
    tb_backend_use(p.b, TB_QUEUE_TRAIN);
    p.pb = p.b->ops->alloc(p.b, 4 * DIM);
    p.b->ops->zero(p.b, p.pb, 4 * DIM);
    tb_backend_use(p.a, TB_QUEUE_TRAIN);
    p.pa = p.a->ops->alloc(p.a, 4 * DIM);
    p.a->ops->upload(p.a, p.pa, x, 4 * DIM);
    assert_int_equal(p.a->ops->sync(p.a, NULL), 0);
    tb_backend_use(p.b, TB_QUEUE_TRAIN);
    free(x);
    return p;
}

static void close_pair(struct pair *p)
{
    emu_fail_after(0);
    p->a->ops->destroy(p->a);
    p->b->ops->destroy(p->b);
}

/* It is queued like all else, in the order of both queues, and refused beyond either memory. */
static void test_copy_from(void **state)
{
    emu_only();
    setenv("TB_EMU_DEVICES", "2", 1);
    struct pair p = open_pair();
    const struct tb_backend_ops *o = p.b->ops;
    struct tb_error err = {0};
    float got[DIM], *x = p.pa; /* the emulation's device memory is the host's */
    assert_int_equal(o->copy_from(p.b, p.pb, p.a, p.pa, 4 * DIM, &err), 0);
    assert_true(memcmp(p.pb, x, 4 * DIM) != 0); /* not yet */
    assert_int_equal(o->sync(p.b, NULL), 0);
    assert_memory_equal(p.pb, x, 4 * DIM);
    for (int queue = 0; queue < 2; queue++) {
        o->zero(p.b, p.pb, 4 * DIM);
        assert_int_equal(o->copy_from(p.b, p.pb, p.a, p.pa, 4 * DIM, &err), 0);
        if (queue) o->use(p.b, TB_QUEUE_SAMPLE);
        o->add(p.b, p.pb, p.pb, DIM);
        o->download(p.b, got, p.pb, 4 * DIM);
        for (int i = 0; i < DIM; i++)
            assert_true(got[i] == 2 * x[i]);
    }
    size_t left = p.a->mem_limit;
    assert_int_equal(o->copy_from(p.b, p.pb, p.a, p.pa, left, &err), TB_EDEVICE);
    assert_int_equal(o->copy_from(p.b, p.pa, p.a, p.pa, 4, &err), TB_EDEVICE);
    assert_non_null(strstr(err.msg, "CUDA device 1 cannot copy from device 0: "));
    assert_true(!p.a->lost && !p.b->lost);
    close_pair(&p);
    unsetenv("TB_EMU_DEVICES");
}

/* When the other device is lost only the copy fails; when its own is, it is lost. */
static void test_copy_from_lost(void **state)
{
    emu_only();
    setenv("TB_EMU_DEVICES", "2", 1);
    for (int which = 0; which < 2; which++) {
        struct pair p = open_pair();
        struct tb_error err = {0};
        float got[DIM];
        emu_fail_device(which);
        assert_int_equal(p.b->ops->copy_from(p.b, p.pb, p.a, p.pa, 4 * DIM, &err), TB_EDEVICE);
        assert_non_null(strstr(err.msg, which ? "CUDA device 1 (emulated GPU) is lost: "
                                              : "CUDA device 1 cannot copy from device 0: "));
        assert_int_equal(p.b->lost, which == 1);
        p.b->ops->download(p.b, got, p.pb, 4 * DIM);
        for (int i = 0; i < DIM; i++)
            assert_true(got[i] >= 0 && got[i] <= 0);
        assert_int_equal(p.b->ops->sync(p.b, &err), which ? TB_EDEVICE : 0);
        close_pair(&p);
    }
    unsetenv("TB_EMU_DEVICES");
}

static void test_kind(void **state)
{
    emu_only();
    setenv("TB_EMU_DEVICES", "3", 1);
    setenv("TB_EMU_NAMES", "small,large", 1);
    static const char *const want[] = {"small, 3 multiprocessors", "large, 3 multiprocessors",
                                       "emulated GPU, 3 multiprocessors"};
    for (int i = 0; i < 3; i++) {
        struct tb_backend *be = open_nth(i, TB_F32, (size_t)256 << 20);
        assert_string_equal(be->kind, want[i]);
        be->ops->destroy(be);
    }
    unsetenv("TB_EMU_NAMES");
    unsetenv("TB_EMU_DEVICES");
}

static void test_complete(void **state)
{
    const size_t lend = offsetof(struct tb_backend_ops, lend) / sizeof(void *); /* the CPU's */
    struct tb_backend *be = open_device(TB_BF16, (size_t)256 << 20);
    void *words[sizeof(struct tb_backend_ops) / sizeof(void *)];
    memcpy(words, be->ops, sizeof(words));
    for (size_t i = 0; i < TB_ARRAY_LEN(words); i++)
        if (!words[i] && i != lend) fail_msg("the table's function %zu is missing", i);
    be->ops->destroy(be);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pool),           cmocka_unit_test(test_limits),
        cmocka_unit_test(test_fragments),      cmocka_unit_test(test_staging),
        cmocka_unit_test(test_staged_again),   cmocka_unit_test(test_rows),
        cmocka_unit_test(test_no_candidate),   cmocka_unit_test(test_steps),
        cmocka_unit_test(test_new_product),    cmocka_unit_test(test_lost),
        cmocka_unit_test(test_others_failure), cmocka_unit_test(test_copy_from),
        cmocka_unit_test(test_copy_from_lost), cmocka_unit_test(test_kind),
        cmocka_unit_test(test_complete),
    };
    return cmocka_run_group_tests_name("cuda host", tests, NULL, NULL);
}
