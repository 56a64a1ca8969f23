/*
 * Causal attention over packed rows and over pages, and the page pool.
 *
 * ORDER OF SUMS. Keys are cut into splits of SPLIT positions from position 0. Within a split an
 * online softmax walks blocks of keys and gives a maximum m, a sum l and a weighted sum of values;
 * join_factors() adds the splits of a row one after the other. A block or a split that a row does
 * not see changes nothing of the row's. So these give the same bits:
 *
 *   walking    a block of threads has a tile of query rows and walks all splits, joining each to
 *              the sums before it, which wait in a slot of scratch memory;
 *   spreading  every split of a tile has a block of its own that leaves its sums in scratch
 *              memory; k_join joins them. This is for tiles of few rows: a single sequence that
 *              decodes keeps many multiprocessors busy.
 *
 * A tile holds rows (query, head of the group) of one sequence and one kv head, so that its keys
 * are read once for all of them. The bf16 tile gives a warp 16 or 32 rows: scores on tensor cores,
 * their weights as bf16 from registers to the second product. The float32 one gives a warp 4 rows,
 * a lane one key, then some dimensions. While scores are made values are on their way, and while
 * values are summed the next keys are.
 *
 * A page of the pool: [k, v][kv head][token][head_dim].
 *
 * Owner: nothing; what is staged or in scratch is used by the kernels queued here. Thread: the
 * backend's caller.
 */
#include <limits.h>
#include <math.h>
#include <string.h>

#include "cuda/attn.cuh"
#include "util/mem.h"

#define SPLIT        512 /* keys; a multiple of every tile's KEYS */
#define FEW          16  /* rows that a small tile has room for */
#define MAX_HD       256
#define MAX_TASKS    2048 /* of a launch */
#define THREADS      128  /* of k_kv_write */
#define JOIN_THREADS 256
#define JOIN_AHEAD   8 /* splits whose loads run together */

/* ---- what kernels are told */

struct call {
    const void *q, *k, *v, *pool;
    const int32_t *pages;
    void *out;
    float *lse;     /* or NULL */
    float *scratch; /* slots, or rows of partial sums: hd sums, m and l */
    int n_head, nk, group, hd, window;
    float scale; /* of scores to powers of two */
    bool vec;    /* rows can be copied in 16 bytes */
};

/* A tile and the keys that a block of threads walks for it. Rows are numbered from the sequence's
 * first query: row f is head f % group of query f / group. */
struct task {
    int row, pos;   /* the sequence's first query: row of the batch, position */
    int n, first;   /* the sequence's rows, and the tile's first */
    int pages;      /* where its page numbers begin; -1: keys are the batch's rows */
    int key0, key1; /* of no split that the tile does not see; key0 begins a block of keys */
    int part;       /* its first row of partial sums (for kv head 0); -1: writes the output */
};

__device__ static inline int position_of(const call &a, const task &t, int f)
{
    return t.pos + min(f, t.n - 1) / a.group;
}
/* Of row f in q and out, in heads. */
__device__ static inline size_t head_of(const call &a, const task &t, int h, int f)
{
    return (size_t)(t.row + f / a.group) * a.n_head + h * a.group + f % a.group;
}
/* Where a page has the keys (or values) of a kv head. */
__device__ static inline size_t page_at(int nk, int hd, int page, bool value, int h)
{
    return (((size_t)page * 2 + value) * nk + h) * TB_KV_PAGE * hd;
}
__device__ static inline float *partial_row(const call &a, int part, int h)
{
    return a.scratch + ((size_t)part * a.nk + h) * (a.hd + 2);
}

/* ---- softmax */

/* Stands in for a maximum of nothing: exp2f(-inf - 0) is 0. */
__device__ static inline float finite_max(float m)
{
    return m == -INFINITY ? 0 : m;
}
/* The factor for what was summed, when keys with maximum `top` follow. */
__device__ static inline float rescale(float *m, float top)
{
    float old = *m;
    *m = fmaxf(old, top);
    return exp2f(old - finite_max(*m));
}
/* The sums of earlier splits, with maximum *m, become old * them + add * those of the next split,
 * with maximum m_split. */
__device__ static inline void join_factors(float *m, float m_split, float *old, float *add)
{
    *old = rescale(m, m_split);
    *add = exp2f(m_split - finite_max(*m));
}
__device__ static inline float inverse(float l)
{
    return l > 0 ? 1.0f / l : l;
}
/* A sum that is -0 on one way is 0 on another: adding 0 makes both 0. */
template <typename act> __device__ static inline void store_out(act *p, float x)
{
    store_act(p, x + 0.0f);
}
__device__ static inline void store_lse(const call &a, size_t head, float m, float l)
{
    if (a.lse) a.lse[head] = fmaf(m, 0.693147180559945f, logf(l));
}

template <int lanes> __device__ static inline float lanes_max(float x)
{
#pragma unroll
    for (int d = 1; d < lanes; d *= 2)
        x = fmaxf(x, __shfl_xor_sync(TB_ALL, x, d));
    return x;
}
template <int lanes> __device__ static inline float lanes_sum(float x)
{
#pragma unroll
    for (int d = 1; d < lanes; d *= 2)
        x += __shfl_xor_sync(TB_ALL, x, d);
    return x;
}

__device__ static inline int lane_id(void)
{
    return (int)threadIdx.x % TB_WARP;
}
__device__ static inline int warp_id(void)
{
    return (int)threadIdx.x / TB_WARP;
}

/* ---- tiles. Of ROWS rows a warp has WARP_ROWS, of which a thread holds N_ROW together with the
 * other of its ROW_LANES lanes: their maxima m, its own part of their sums l, and acc: acc[i] is
 * the sum of the thread's row row_of(i) in dimension dim_of(i). Keys come in blocks of KEYS. Shared
 * memory: queries [ROWS][LD], keys [KEYS][LD], values [KEYS][LD], then what weigh needs; later the
 * sums, [ROWS][LD] floats. LD is so much more than HD that there are no bank conflicts. */

template <int HD, int M /* 16 rows each, of a warp */, int WARPS> struct tile_bf16 {
    typedef bf16 act;
    enum {
        KEYS = 64,
        WARP_ROWS = 16 * M,
        ROWS = WARPS * WARP_ROWS,
        N_ROW = 2 * M,
        ROW_LANES = 4,
        N_WARPS = WARPS,
        LD = HD + 8,
        N_ACC = M * HD / 2,
        SHARED = (ROWS + 2 * KEYS) * LD * 2
    };
    float acc[N_ACC], m[N_ROW], l[N_ROW];
    float s[M * KEYS / 2]; /* scores: as mma's D, tiles [M][KEYS / 8] */

    /* Of the tile: a thread's row r. */
    __device__ static int row(int r)
    {
        return warp_id() * WARP_ROWS + r / 2 * 16 + r % 2 * 8 + lane_id() / 4;
    }
    __device__ static constexpr int row_of(int i) { return i / (HD / 2) * 2 + i % 4 / 2; }
    __device__ static int dim_of(int i) { return i % (HD / 2) / 4 * 8 + lane_id() % 4 * 2 + i % 2; }

    __device__ void score(const bf16 *queries, const bf16 *keys)
    {
        rows_by_rows<M, KEYS, HD, LD>(s, queries + warp_id() * WARP_ROWS * LD, keys);
    }

    /* Scores of keys [key, key + KEYS) to weights, and those times values to the sums. */
    __device__ void weigh(const call &a, const task &t, int key, bool all, const bf16 *values)
    {
        int lane = lane_id();
#pragma unroll
        for (int r = 0; r < N_ROW; r++) {
            float *x = s + r / 2 * (KEYS / 2) + r % 2 * 2, top = -INFINITY, sum = 0;
            if (!all) {
                int pos = position_of(a, t, t.first + row(r)), from = key + lane % 4 * 2;
                int lo = first_key(a.window, pos) - from, hi = pos - from;
#pragma unroll
                for (int i = 0; i < KEYS / 4; i++)
                    if (i / 2 * 8 + i % 2 < lo || i / 2 * 8 + i % 2 > hi)
                        x[i / 2 * 4 + i % 2] = -INFINITY;
            }
#pragma unroll
            for (int i = 0; i < KEYS / 4; i++)
                top = fmaxf(top, x[i / 2 * 4 + i % 2]);
            float before = rescale(&m[r], lanes_max<ROW_LANES>(top) * a.scale);
            float ref = finite_max(m[r]);
#pragma unroll
            for (int i = 0; i < KEYS / 4; i++) {
                float p = exp2f(fmaf(x[i / 2 * 4 + i % 2], a.scale, -ref));
                x[i / 2 * 4 + i % 2] = p;
                sum += p;
            }
            l[r] = fmaf(l[r], before, sum);
#pragma unroll
            for (int i = 0; i < HD / 4; i++)
                acc[r / 2 * (HD / 2) + i / 2 * 4 + r % 2 * 2 + i % 2] *= before;
        }
        add_product<M, HD, KEYS, LD>(acc, s, values);
    }
};

template <int HD> struct tile_f32 {
    typedef float act;
    enum {
        KEYS = 32,
        WARP_ROWS = 4,
        N_WARPS = 4,
        ROWS = N_WARPS * WARP_ROWS,
        N_ROW = WARP_ROWS,
        ROW_LANES = 32,
        LD = HD + 4,
        DIMS = HD / 32, /* of a lane */
        N_ACC = N_ROW * DIMS,
        SHARED = ((ROWS + 2 * KEYS) * LD + ROWS * KEYS) * 4
    };
    float acc[N_ACC], m[N_ROW], l[N_ROW], s[N_ROW];

    __device__ static int row(int r) { return warp_id() * WARP_ROWS + r; }
    __device__ static constexpr int row_of(int i) { return i / DIMS; }
    __device__ static int dim_of(int i) { return i % DIMS * 32 + lane_id(); }

    __device__ void score(const float *queries, const float *keys)
    {
        const float *q_row = queries + row(0) * LD, *k_row = keys + lane_id() * LD;
#pragma unroll
        for (int r = 0; r < N_ROW; r++)
            s[r] = 0;
        for (int d = 0; d < HD; d += 4) {
            float4 k = *(const float4 *)(k_row + d);
#pragma unroll
            for (int r = 0; r < N_ROW; r++) {
                float4 q = *(const float4 *)(q_row + r * LD + d);
                s[r] = fmaf(q.w, k.w, fmaf(q.z, k.z, fmaf(q.y, k.y, fmaf(q.x, k.x, s[r]))));
            }
        }
    }

    __device__ void weigh(const call &a, const task &t, int key, bool all, const float *values)
    {
        int lane = lane_id(), j = key + lane;
        float *weights = (float *)values + KEYS * LD + warp_id() * KEYS * N_ROW; /* [key][row] */
#pragma unroll
        for (int r = 0; r < N_ROW; r++) {
            int pos = position_of(a, t, t.first + row(r));
            if (!all && (j < first_key(a.window, pos) || j > pos)) s[r] = -INFINITY;
            float before = rescale(&m[r], lanes_max<ROW_LANES>(s[r]) * a.scale);
            float p = exp2f(fmaf(s[r], a.scale, -finite_max(m[r])));
            weights[lane * N_ROW + r] = p;
            l[r] = fmaf(l[r], before, p);
#pragma unroll
            for (int i = 0; i < DIMS; i++)
                acc[r * DIMS + i] *= before;
        }
        __syncwarp();
        for (int k = 0; k < KEYS; k++) {
            float4 p = *(const float4 *)(weights + k * N_ROW);
#pragma unroll
            for (int i = 0; i < DIMS; i++) {
                float v = values[k * LD + i * 32 + lane];
                acc[0 * DIMS + i] = fmaf(p.x, v, acc[0 * DIMS + i]);
                acc[1 * DIMS + i] = fmaf(p.y, v, acc[1 * DIMS + i]);
                acc[2 * DIMS + i] = fmaf(p.z, v, acc[2 * DIMS + i]);
                acc[3 * DIMS + i] = fmaf(p.w, v, acc[3 * DIMS + i]);
            }
        }
    }
};

/* ---- between global and shared memory, 16 bytes a thread */

template <class T>
__device__ static inline void load_queries(const call &a, const task &t, int h,
                                           typename T::act *queries)
{
    const int per = 16 / sizeof(typename T::act), chunks = (T::LD - per) / per;
    for (int i = (int)threadIdx.x; i < T::ROWS * chunks; i += (int)blockDim.x) {
        int r = i / chunks, d = i % chunks * per, f = min(t.first + r, t.n - 1);
        const typename T::act *from = (const typename T::act *)a.q + head_of(a, t, h, f) * a.hd;
        copy16(queries + r * T::LD + d, from + d, a.hd - d, a.vec);
    }
}

/* TB_KV_PAGE rows ld apart, the first n of them, then zeros. A warp that is alone has much to copy:
 * where rows share its threads evenly each keeps its columns and counts on. */
template <class T>
__device__ static inline void load_rows(typename T::act *to, const typename T::act *from, size_t ld,
                                        int n, int hd, bool vec)
{
    const int per = 16 / sizeof(typename T::act), chunks = (T::LD - per) / per,
              threads = T::N_WARPS * TB_WARP, step = threads / chunks;
    int r = (int)threadIdx.x / chunks, d = (int)threadIdx.x % chunks * per;
    if (vec && T::N_WARPS == 1 && threads % chunks == 0) {
        to += r * T::LD + d;
        from += r * ld + d;
        if (d >= hd) n = 0;
#pragma unroll
        for (int i = 0; i < TB_KV_PAGE; i += step, from += step * ld)
            copy16_async(to + i * T::LD, from, r + i >= n);
        return;
    }
#pragma unroll 1
    for (int i = (int)threadIdx.x; i < TB_KV_PAGE * chunks; i += threads) {
        r = i / chunks;
        d = i % chunks * per;
        copy16(to + r * T::LD + d, from + r * ld + d, r < n ? hd - d : 0, vec);
    }
}

/* Keys (or values) [key, key + KEYS); zeros from key1. */
template <class T>
__device__ static inline void load_keys(const call &a, const task &t, int h, bool value, int key,
                                        typename T::act *to)
{
    typedef typename T::act act;
#pragma unroll 1
    for (int p = 0; p < T::KEYS / TB_KV_PAGE; p++, key += TB_KV_PAGE, to += TB_KV_PAGE * T::LD) {
        int n = t.key1 - key;
        size_t ld = a.hd;
        const act *from = (const act *)a.pool;
        if (t.pages < 0) {
            ld *= a.nk;
            from = (const act *)(value ? a.v : a.k) + (size_t)(t.row + key) * ld + h * a.hd;
        } else if (n > 0) {
            from += page_at(a.nk, a.hd, a.pages[t.pages + key / TB_KV_PAGE], value, h);
        }
        load_rows<T>(to, from, ld, n, a.hd, a.vec);
    }
}

/* ---- a tile's splits */

template <class T> __device__ static inline void clear(T &x)
{
#pragma unroll
    for (int i = 0; i < T::N_ACC; i++)
        x.acc[i] = 0;
#pragma unroll
    for (int r = 0; r < T::N_ROW; r++) {
        x.m[r] = -INFINITY;
        x.l[r] = 0;
    }
}

/* Joins x to the sums in the slot (none yet: first) and leaves the result in both. */
template <class T> __device__ static inline void join_slot(T &x, float *slot, bool first, bool last)
{
    slot += threadIdx.x; /* every thread has its own numbers */
    const int step = T::N_WARPS * TB_WARP;
    float *m = slot + T::N_ACC * step, *l = m + T::N_ROW * step;
    float old[T::N_ROW], add[T::N_ROW];
#pragma unroll
    for (int r = 0; r < T::N_ROW; r++) {
        float top = first ? -INFINITY : m[r * step];
        join_factors(&top, x.m[r], &old[r], &add[r]);
        x.m[r] = top;
        x.l[r] = fmaf(first ? 0 : l[r * step], old[r], x.l[r] * add[r]);
    }
#pragma unroll
    for (int i = 0; i < T::N_ACC; i++)
        x.acc[i] =
            fmaf(first ? 0 : slot[i * step], old[T::row_of(i)], x.acc[i] * add[T::row_of(i)]);
    if (last) return;
#pragma unroll
    for (int r = 0; r < T::N_ROW; r++) {
        m[r * step] = x.m[r];
        l[r * step] = x.l[r];
    }
#pragma unroll
    for (int i = 0; i < T::N_ACC; i++)
        slot[i * step] = x.acc[i];
}

/* Writes the tile's rows: partial sums, or the output. All threads are done with shared memory. */
template <class T>
__device__ static inline void leave(const call &a, const task &t, int h, const T &x, float *rows)
{
    bool partial = t.part >= 0;
#pragma unroll
    for (int r = 0; r < T::N_ROW; r++) {
        int row = T::row(r);
        float scale = partial ? 1.0f : inverse(x.l[r]);
#pragma unroll
        for (int i = 0; i < T::N_ACC; i++)
            if (T::row_of(i) == r) rows[row * T::LD + T::dim_of(i)] = x.acc[i] * scale;
        if (t.first + row >= t.n || lane_id() % T::ROW_LANES) continue;
        if (partial) {
            float *stats = partial_row(a, t.part + row, h) + a.hd;
            stats[0] = x.m[r];
            stats[1] = x.l[r];
        } else {
            store_lse(a, head_of(a, t, h, t.first + row), x.m[r], x.l[r]);
        }
    }
    __syncwarp();
    int first = warp_id() * T::WARP_ROWS, end = min(first + T::WARP_ROWS, t.n - t.first);
    for (int row = first; row < end; row++) {
        float *part = partial ? partial_row(a, t.part + row, h) : NULL;
        typename T::act *out = (typename T::act *)a.out + head_of(a, t, h, t.first + row) * a.hd;
        for (int d = lane_id(); d < a.hd; d += TB_WARP) {
            if (partial)
                part[d] = rows[row * T::LD + d];
            else
                store_out(out + d, rows[row * T::LD + d]);
        }
    }
}

template <class T>
__global__ static void __launch_bounds__(T::N_WARPS *TB_WARP, 1)
    k_attention(call a, const task *tasks, int n_tasks)
{
    typedef typename T::act act;
    static_assert(T::ROWS * T::LD * (int)sizeof(float) <= T::SHARED, "the sums fit");
    TB_DYN_SHARED(act, shared);
    act *queries = shared, *keys = queries + T::ROWS * T::LD, *values = keys + T::KEYS * T::LD;
    const int slot_size = (T::N_ACC + 2 * T::N_ROW) * T::N_WARPS * TB_WARP;
    for (int item = (int)blockIdx.x; item < n_tasks * a.nk; item += (int)gridDim.x) {
        const task &t = tasks[item / a.nk]; /* read again and again: registers are short */
        if (t.n == 0) continue;
        int h = item % a.nk, f = t.first + warp_id() * T::WARP_ROWS;
        int from = position_of(a, t, f), to = position_of(a, t, f + T::WARP_ROWS - 1);
        T x;
        load_queries<T>(a, t, h, queries);
        load_keys<T>(a, t, h, false, t.key0, keys);
        copy_async_commit();
        clear(x);
        for (int key = t.key0; key < t.key1; key += T::KEYS) {
            int next = key + T::KEYS;
            bool sees = f < t.n && key <= to && next > first_key(a.window, from);
            copy_async_wait<0>();
            __syncthreads();
            load_keys<T>(a, t, h, true, key, values);
            copy_async_commit();
            if (sees) x.score(queries, keys);
            copy_async_wait<0>();
            __syncthreads();
            if (next < t.key1) load_keys<T>(a, t, h, false, next, keys);
            copy_async_commit();
            bool all = next <= from + 1 && key >= first_key(a.window, to);
            if (sees) x.weigh(a, t, key, all, values);
            if (next < t.key1 && next % SPLIT) continue;
#pragma unroll
            for (int r = 0; r < T::N_ROW; r++)
                x.l[r] = lanes_sum<T::ROW_LANES>(x.l[r]);
            if (t.part < 0)
                join_slot(x, a.scratch + (size_t)blockIdx.x * slot_size,
                          key / SPLIT == t.key0 / SPLIT, next >= t.key1);
            if (next < t.key1) clear(x);
        }
        __syncthreads();
        leave(a, t, h, x, (float *)(void *)shared);
        __syncthreads();
    }
}

/* Joins the splits of tiles of `rows` rows; a warp has 32 dimensions of a row. */
template <typename act>
__global__ static void __launch_bounds__(JOIN_THREADS) k_join(call a, const task *tasks, int rows)
{
    const task t = tasks[blockIdx.x];
    int h = (int)blockIdx.y, lane = lane_id(), pieces = div_up(a.hd, TB_WARP);
    int n_splits = div_up(t.key1, SPLIT) - t.key0 / SPLIT;
    rows = min(rows, t.n - t.first);
    for (int i = warp_id(); i < rows * pieces; i += JOIN_THREADS / TB_WARP) {
        int r = i / pieces, d = i % pieces * TB_WARP + lane, there = min(d, a.hd - 1);
        float acc = 0, m = -INFINITY, l = 0;
        for (int s = 0; s < n_splits; s += JOIN_AHEAD) {
            float x[JOIN_AHEAD], tops[JOIN_AHEAD], sums[JOIN_AHEAD];
#pragma unroll
            for (int j = 0; j < JOIN_AHEAD; j++) {
                const float *part = partial_row(a, t.part + min(s + j, n_splits - 1) * rows + r, h);
                x[j] = part[there];
                tops[j] = part[a.hd];
                sums[j] = part[a.hd + 1];
            }
#pragma unroll
            for (int j = 0; j < JOIN_AHEAD; j++) {
                bool is = s + j < n_splits;
                float old, add;
                join_factors(&m, is ? tops[j] : -INFINITY, &old, &add);
                l = fmaf(l, old, is ? sums[j] * add : 0);
                acc = fmaf(acc, old, is ? x[j] * add : 0);
            }
        }
        size_t head = head_of(a, t, h, t.first + r);
        if (d < a.hd) store_out((act *)a.out + head * a.hd + d, acc * inverse(l));
        if (d == 0) store_lse(a, head, m, l);
    }
}

/* ---- host: tiles of sequences to launches */

/* Tasks that wait to be launched together. */
struct launch {
    struct task tasks[MAX_TASKS];
    struct task joins[MAX_TASKS]; /* tiles with partial sums */
    int n_tasks, n_joins, n_parts /* rows of partial sums, for one kv head */;
};

static int max_parts(const struct tb_cuda *c, const struct call *a)
{
    size_t n = c->scratch_bytes / (sizeof(float) * (size_t)(a->hd + 2) * (size_t)a->nk);
    return n < INT_MAX ? (int)n : INT_MAX;
}

/* In a step that is captured there are somewhat more tasks, the last of them of no rows: as many in
 * most steps, though sequences grow. */
static void fill_up(const struct tb_cuda *c, struct task *tasks, int *n)
{
    int end = (int)tb_cuda_steady((size_t)*n);
    while (c->capturing && *n < TB_MIN(end, MAX_TASKS))
        tasks[(*n)++] = {};
}

template <class T> static void flush(struct tb_cuda *c, const struct call *a, struct launch *l)
{
    const size_t slot_bytes = (T::N_ACC + 2 * T::N_ROW) * T::N_WARPS * TB_WARP * sizeof(float);
    const struct task *tasks = NULL, *joins = NULL;
    fill_up(c, l->tasks, &l->n_tasks);
    fill_up(c, l->joins, &l->n_joins);
    int blocks = l->n_tasks * a->nk;
    if (l->n_tasks)
        tasks = (const struct task *)tb_cuda_stage(c, l->tasks, l->n_tasks * sizeof(*tasks));
    if (l->n_joins)
        joins = (const struct task *)tb_cuda_stage(c, l->joins, l->n_joins * sizeof(*joins));
    else
        blocks = TB_MIN(blocks, (int)(c->scratch_bytes / slot_bytes));
    if (tasks)
        TB_LAUNCH(c, k_attention<T>, blocks, T::N_WARPS * TB_WARP, T::SHARED, *a, tasks,
                  l->n_tasks);
    if (joins)
        TB_LAUNCH(c, k_join<typename T::act>, dim3(l->n_joins, a->nk), JOIN_THREADS, 0, *a, joins,
                  (int)T::ROWS);
    l->n_tasks = l->n_joins = l->n_parts = 0;
}

/* Rows [first, first + rows) of a sequence. */
template <class T>
static void add_tile(struct tb_cuda *c, const struct call *a, struct launch *l,
                     const struct tb_attn_seq *q, int pages, int first, int rows, bool spread)
{
    int from = q->pos + first / a->group, end = q->pos + (first + rows - 1) / a->group + 1;
    struct task t = {q->row, q->pos, q->n * a->group, first, pages, 0, end, -1};
    t.key0 = first_key(a->window, from) / T::KEYS * T::KEYS;
    int n_splits = div_up(end, SPLIT) - t.key0 / SPLIT;
    spread = spread && n_splits > 1;
    int n = spread ? n_splits : 1, n_parts = spread ? n_splits * rows : 0;
    if (n > MAX_TASKS - l->n_tasks || n_parts > max_parts(c, a) - l->n_parts) flush<T>(c, a, l);
    if (!spread) {
        l->tasks[l->n_tasks++] = t;
        return;
    }
    t.part = l->n_parts;
    l->n_parts += n_parts;
    l->joins[l->n_joins++] = t;
    for (; t.key0 < end; t.key0 = t.key1, t.part += rows) {
        t.key1 = TB_MIN((t.key0 / SPLIT + 1) * SPLIT, end);
        l->tasks[l->n_tasks++] = t;
    }
}

static int n_pages_of(const struct tb_attn_seq *q)
{
    return q->pages ? div_up(q->pos + q->n, TB_KV_PAGE) : 0;
}

/* Sequences with min to max rows. Tiles are spread when they have few rows each or are too few to
 * keep the device busy, but walk where the sums of one tile's splits would not fit in scratch
 * memory. */
template <class T>
static void run_tiles(struct tb_cuda *c, const struct call *a, const struct tb_attn_seq *seqs,
                      int n_seqs, int min, int max)
{
    int n_tiles = 0, pages = 0, longest = 0;
    for (int i = 0; i < n_seqs; i++) {
        int rows = seqs[i].n * a->group;
        if (rows < min || rows > max) continue;
        n_tiles += div_up(rows, T::ROWS);
        longest = TB_MAX(longest, seqs[i].pos + seqs[i].n);
    }
    if (!n_tiles || !TB_ALLOW_SHARED(c, k_attention<T>, T::SHARED)) return;
    int n_splits = div_up(longest, SPLIT), tile_rows = TB_MIN((int)T::ROWS, max);
    bool spread = (max <= FEW || n_tiles * a->nk < 2 * c->n_sm) && n_splits <= MAX_TASKS &&
                  n_splits * tile_rows <= max_parts(c, a);
    struct launch l;
    l.n_tasks = l.n_joins = l.n_parts = 0; /* the lists are long, and a step has many layers */
    for (int i = 0; i < n_seqs; pages += n_pages_of(&seqs[i]), i++) {
        int rows = seqs[i].n * a->group;
        if (rows < min || rows > max) continue;
        /* those with more keys first */
        for (int first = (rows - 1) / T::ROWS * T::ROWS; first >= 0; first -= T::ROWS)
            add_tile<T>(c, a, &l, &seqs[i], seqs[i].pages ? pages : -1, first,
                        TB_MIN((int)T::ROWS, rows - first), spread);
    }
    flush<T>(c, a, &l);
}

template <int HD>
static void run(struct tb_cuda *c, const struct call *a, const struct tb_attn_seq *seqs, int n)
{
    if (c->be.act == TB_BF16) {
        run_tiles<tile_bf16<HD, 1, 1>>(c, a, seqs, n, 1, FEW);
        run_tiles<tile_bf16<HD, (HD > 128 ? 1 : 2), 4>>(c, a, seqs, n, FEW + 1, INT_MAX);
    } else {
        run_tiles<tile_f32<HD>>(c, a, seqs, n, 1, INT_MAX);
    }
}

/* The page numbers of n sequences, at most TB_CUDA_STAGE bytes, on the device; NULL: it is lost. */
static const int32_t *stage_pages(struct tb_cuda *c, const struct tb_attn_seq *seqs, int n,
                                  int n_pages)
{
    int32_t *all = (int32_t *)tb_malloc((size_t)n_pages * sizeof(*all)), *at = all;
    for (int i = 0; i < n; i++) {
        int k = n_pages_of(&seqs[i]);
        if (k) memcpy(at, seqs[i].pages, (size_t)k * sizeof(*all));
        at += k;
    }
    const void *staged = tb_cuda_stage(c, all, (size_t)n_pages * sizeof(*all));
    tb_free(all);
    return (const int32_t *)staged;
}

static void attention(struct tb_backend *be, const struct tb_attn_shape *s,
                      const struct tb_attn_seq *seqs, int n_seqs, const void *q, const void *k,
                      const void *v, const void *kv_pages, void *out, float *lse)
{
    struct tb_cuda *c = tb_cuda(be);
    int hd = s->head_dim, most = (int)(TB_CUDA_STAGE / sizeof(int32_t));
    if (hd > MAX_HD) {
        tb_cuda_ok(c, cudaErrorInvalidValue, "attention: head_dim");
        return;
    }
    struct call a;
    memset(&a, 0, sizeof(a)); /* its padding is compared too */
    a.q = q;
    a.k = k;
    a.v = v;
    a.pool = kv_pages;
    a.out = out;
    a.lse = lse;
    a.scratch = (float *)c->scratch;
    a.n_head = s->n_head;
    a.nk = s->n_kv_head;
    a.group = s->n_head / s->n_kv_head;
    a.hd = hd;
    a.window = s->window;
    a.scale = (float)((double)s->scale * 1.4426950408889634);
    a.vec = (size_t)hd * tb_dtype_size(be->act) % 16 == 0 && aligned16(q) && aligned16(k) &&
            aligned16(v) && aligned16(kv_pages) && aligned16(out);
    for (int i = 0, n; i < n_seqs; i += n) {
        int n_pages = n_pages_of(&seqs[i]);
        for (n = 1; i + n < n_seqs && n_pages_of(&seqs[i + n]) <= most - n_pages; n++)
            n_pages += n_pages_of(&seqs[i + n]);
        if (n_pages && !(a.pages = stage_pages(c, seqs + i, n, n_pages))) return;
        if (hd <= 32)
            run<32>(c, &a, seqs + i, n);
        else if (hd <= 64)
            run<64>(c, &a, seqs + i, n);
        else if (hd <= 96)
            run<96>(c, &a, seqs + i, n);
        else if (hd <= 128)
            run<128>(c, &a, seqs + i, n);
        else
            run<MAX_HD>(c, &a, seqs + i, n);
    }
}

/* ---- the page pool */

static size_t kv_page_bytes(const struct tb_backend *be, const struct tb_attn_shape *s)
{
    return (size_t)TB_KV_PAGE * 2 * (size_t)s->n_kv_head * (size_t)s->head_dim *
           tb_dtype_size(be->act);
}

/* A row of the batch and where it goes: page * TB_KV_PAGE + token. */
struct slot {
    int row, at;
};

/* A block a row; word: what a thread copies at once. */
template <typename word>
__global__ static void k_kv_write(const slot *slots, const word *k, const word *v, int nk,
                                  int hd /* in words */, word *pool)
{
    const slot s = slots[blockIdx.x];
    int n = nk * hd;
    for (int i = (int)threadIdx.x; i < 2 * n; i += THREADS) {
        bool value = i >= n;
        int e = value ? i - n : i;
        pool[page_at(nk, hd, s.at / TB_KV_PAGE, value, e / hd) + s.at % TB_KV_PAGE * hd + e % hd] =
            (value ? v : k)[(size_t)s.row * n + e];
    }
}

template <typename word>
static void write_rows(struct tb_cuda *c, const struct slot *slots, int n,
                       const struct tb_attn_shape *s, const void *k, const void *v, void *pool)
{
    int hd = (int)((size_t)s->head_dim * tb_dtype_size(c->be.act) / sizeof(word));
    const struct slot *staged =
        n ? (const struct slot *)tb_cuda_stage(c, slots, (size_t)n * sizeof(*slots)) : NULL;
    if (staged)
        TB_LAUNCH(c, k_kv_write<word>, n, THREADS, 0, staged, (const word *)k, (const word *)v,
                  s->n_kv_head, hd, (word *)pool);
}

static void kv_write(struct tb_backend *be, const struct tb_attn_shape *s,
                     const struct tb_attn_seq *seqs, int n_seqs, const void *k, const void *v,
                     void *kv_pages)
{
    struct tb_cuda *c = tb_cuda(be);
    struct slot slots[MAX_TASKS];
    int n = 0;
    bool vec = (size_t)s->head_dim * tb_dtype_size(be->act) % 16 == 0 && aligned16(k) &&
               aligned16(v) && aligned16(kv_pages);
    auto flush_rows = [&] {
        if (vec)
            write_rows<uint4>(c, slots, n, s, k, v, kv_pages);
        else if (be->act == TB_BF16)
            write_rows<uint16_t>(c, slots, n, s, k, v, kv_pages);
        else
            write_rows<float>(c, slots, n, s, k, v, kv_pages);
        n = 0;
    };
    for (int i = 0; i < n_seqs; i++) {
        for (int t = 0; t < seqs[i].n; t++) {
            int pos = seqs[i].pos + t;
            slots[n++] = {seqs[i].row + t,
                          seqs[i].pages[pos / TB_KV_PAGE] * TB_KV_PAGE + pos % TB_KV_PAGE};
            if (n == MAX_TASKS) flush_rows();
        }
    }
    flush_rows();
}

void tb_cuda_attn_ops(struct tb_backend_ops *o)
{
    o->attention = attention;
    o->kv_page_bytes = kv_page_bytes;
    o->kv_write = kv_write;
}
