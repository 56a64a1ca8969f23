/*
 * The gradient of causal attention over packed sequences. With S = scale q k^T, P = exp(S - lse),
 * dP = dout v^T and delta = sum(dout out) of each query row,
 *
 *     dS = P (dP - delta) scale,   dv = P^T dout,   dk = dS^T q,   dq = dS k,
 *
 * dk and dv summed over the query heads of their group. P is made again from lse, a tile at a time.
 * Three kernels, in this order:
 *
 *   k_record   what a query row contributes: dout as bf16, delta and lse. It lies in the row's dq,
 *              which nobody needs before the last kernel writes it: no other memory is taken.
 *   k_keys     dk and dv: a block owns a tile of keys and walks the heads of the group and, from
 *              its diagonal down, the tiles of queries that see it.
 *   k_queries  dq: a block owns a tile of queries of a head, reads its records, and walks the tiles
 *              of keys that it sees.
 *
 * Owners share nothing and walk in order, and tiles count from their sequence's start: a sequence's
 * bits depend on nothing but the sequence.
 *
 * bf16: a warp owns 16 rows. The accumulators of its two products with the walked tile become, with
 * P and dS rounded to bf16, the left operands of the next ones, without leaving the registers.
 * float32: tiles of 16 rows and plain FMA.
 *
 * Owner: nothing; staged tiles are used by the kernels queued here. Thread: the backend's caller.
 */
#include "cuda/attn.cuh"

#define MAX_HEAD_DIM 256
#define MIN_HEAD_DIM 4    /* a record fits in a row of dq */
#define MAX_TILES    2048 /* of a launch */

template <typename act> struct bwd {
    int n_head, n_kv_head, hd, window;
    float scale;
    bool vec; /* rows can be copied in 16 bytes */
    const act *q, *k, *v, *out;
    const float *lse, *dout;
    float *dq, *dk, *dv;
};

/* Rows [first, ...) of the sequence in the batch's rows [row, row + n). */
struct tile {
    int row, n, first;
};

/* Where a record has delta, and lse after it: behind dout as bf16. */
__device__ static inline int record_stats(int hd)
{
    return (hd + 1) / 2;
}
__device__ static inline bool sees(int window, int query, int key)
{
    return key <= query && (window <= 0 || key > query - window);
}
/* Whether one of nq queries sees one of nk keys. */
__device__ static inline bool meet(int window, int query, int nq, int key, int nk)
{
    return key < query + nq && (window <= 0 || key + nk - 1 > query - window);
}
/* The end of the queries that see a key up to `last`. */
__device__ static inline int query_end(int window, int n, int last)
{
    return window > 0 && window < n - last ? last + window : n;
}
/* From a score and dP to P and dS, in place. */
__device__ static inline void to_grad(float *s, float *dp, float scale, float delta, float lse,
                                      bool seen)
{
    float p = expf(*s * scale - lse);
    *dp = seen ? p * (*dp - delta) * scale : 0;
    *s = seen ? p : 0;
}

/* One warp a row. */
template <typename act>
__global__ static void k_record(struct bwd<act> a, const struct tile *tiles, int rows)
{
    const struct tile t = tiles[blockIdx.x];
    int lane = (int)threadIdx.x % TB_WARP, n_warps = (int)blockDim.x / TB_WARP;
    for (int i = (int)threadIdx.x / TB_WARP; i < rows && t.first + i < t.n; i += n_warps) {
        size_t row = (size_t)(t.row + t.first + i) * (size_t)a.n_head + blockIdx.y;
        size_t at = row * (size_t)a.hd;
        float delta = 0, *record = a.dq + at;
        for (int d = lane; d < a.hd; d += TB_WARP) {
            float x = a.dout[at + (size_t)d];
            delta = fmaf(x, load_act(a.out + at + d), delta);
            if (sizeof(act) == sizeof(bf16)) store_act((bf16 *)(void *)record + d, x);
        }
        delta = warp_sum(delta);
        int at_stats = record_stats(a.hd) + lane; /* the other two are copied with them */
        if (lane < 4 && at_stats < a.hd)
            record[at_stats] = lane == 0 ? delta : lane == 1 ? a.lse[row] : 0;
    }
}

/* ---- bf16 */

/* Sizes for head dimensions up to HD: rows of a tile that a block owns, and of one that it walks.
 * Rows in shared memory have 16 bytes more than they need: against bank conflicts, and for a
 * record's delta and lse. */
template <int HD> struct dims {
    static constexpr int own = HD > 128 ? 32 : 64, step = HD > 128 ? 16 : 32, ld = HD + 8;
    static constexpr int smem = (2 * own + 4 * step) * ld * (int)sizeof(bf16);
    static constexpr int warps = own / 16;
    static constexpr int split = HD > 128 ? 2 : 1; /* warps that share rows of dk and dv */
    static constexpr int query_threads = warps * TB_WARP, key_threads = query_threads * split;
};

/* Copies rows of hd elements, the first `valid` of them, and fills up with zeros. */
template <int HD>
__device__ static void load_rows(bf16 *dst, int rows, const bf16 *src, size_t ld, int valid, int hd,
                                 bool vec)
{
    for (int i = (int)threadIdx.x; i < rows * (HD / 8); i += (int)blockDim.x) {
        int r = i / (HD / 8), c = i % (HD / 8) * 8, n = r < valid ? hd - c : 0;
        const bf16 *from = n > 0 ? src + (size_t)r * ld + c : src;
        bf16 *to = dst + r * dims<HD>::ld + c;
        copy16(to, from, n, vec);
    }
}
template <int HD>
__device__ static void load_records(bf16 *dst, int rows, const struct bwd<bf16> *a, size_t row,
                                    int head, int valid)
{
    size_t ld = (size_t)a->n_head * (size_t)a->hd;
    const float *src = a->dq + row * ld + (size_t)head * (size_t)a->hd;
    load_rows<HD>(dst, rows, (const bf16 *)(const void *)src, 2 * ld, valid, a->hd, a->vec);
    for (int r = (int)threadIdx.x; r < rows; r += (int)blockDim.x) {
        const float *from = r < valid ? src + (size_t)r * ld + record_stats(a->hd) : src;
        float *to = (float *)(void *)(dst + r * dims<HD>::ld + HD);
        copy16(to, from, r < valid ? 2 : 0, a->vec);
    }
}
template <int HD>
__device__ static void load_queries(bf16 *dst, int rows, const struct bwd<bf16> *a, size_t row,
                                    int head, int valid)
{
    size_t ld = (size_t)a->n_head * (size_t)a->hd;
    load_rows<HD>(dst, rows, a->q + row * ld + (size_t)head * (size_t)a->hd, ld, valid, a->hd,
                  a->vec);
}
/* Keys, or values. */
template <int HD>
__device__ static void load_keys(bf16 *dst, int rows, const struct bwd<bf16> *a, const bf16 *src,
                                 size_t row, int head, int valid)
{
    size_t ld = (size_t)a->n_kv_head * (size_t)a->hd;
    load_rows<HD>(dst, rows, src + row * ld + (size_t)head * (size_t)a->hd, ld, valid, a->hd,
                  a->vec);
}
/* Of a product of a warp's 16 rows: the row and column that the thread has in d[i]. */
__device__ static inline int row_of(int i)
{
    return (int)threadIdx.x % TB_WARP / 4 + i % 4 / 2 * 8;
}
__device__ static inline int col_of(int i)
{
    return i / 4 * 8 + (int)threadIdx.x % 4 * 2 + i % 2;
}
/* {delta, lse} of a row that load_records has loaded. */
template <int HD> __device__ static inline const float *stats(const bf16 *records, int row)
{
    return (const float *)(const void *)(records + row * dims<HD>::ld + HD);
}

/* Writes the first `valid` of a warp's 16 rows; sum holds columns [col, col + COLS) of hd. */
template <int COLS>
__device__ static void store_rows(float *dst, size_t ld, const float sum[COLS / 2], int col,
                                  int valid, int hd, bool vec)
{
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
        int r = row_of(e), c = col + col_of(e);
        float *to = dst + (size_t)r * ld + c;
        if (r >= valid) continue;
#pragma unroll
        for (int n = 0; n < COLS; n += 8) {
            float x = sum[n / 2 + e], y = sum[n / 2 + e + 1];
            if (vec && c + n < hd) {
                *(float2 *)(void *)(to + n) = make_float2(x, y);
            } else {
                if (c + n < hd) to[n] = x;
                if (c + n + 1 < hd) to[n + 1] = y;
            }
        }
    }
}

template <int HD>
__global__ static void __launch_bounds__(dims<HD>::key_threads)
    k_keys(struct bwd<bf16> a, const struct tile *tiles)
{
    constexpr int own = dims<HD>::own, step = dims<HD>::step, ld = dims<HD>::ld,
                  cols = HD / dims<HD>::split;
    TB_DYN_SHARED(bf16, keys);
    bf16 *values = keys + own * ld, *walked = values + own * ld; /* [2]: queries, records */
    const struct tile t = tiles[blockIdx.x];
    int warp = (int)threadIdx.x / TB_WARP;
    int kv_head = (int)blockIdx.y, group = a.n_head / a.n_kv_head;
    int end = query_end(a.window, t.n, t.first + own - 1);
    int n_steps = div_up(end - t.first, step), total = group * n_steps;
    int mine = warp % dims<HD>::warps * 16, col = warp / dims<HD>::warps * cols;
    float dk[cols / 2] = {}, dv[cols / 2] = {};
    auto fetch = [&](int i) {
        int head = kv_head * group + i / n_steps, query = t.first + i % n_steps * step;
        bf16 *dst = walked + i % 2 * (2 * step * ld);
        load_queries<HD>(dst, step, &a, (size_t)(t.row + query), head, t.n - query);
        load_records<HD>(dst + step * ld, step, &a, (size_t)(t.row + query), head, t.n - query);
    };
    load_keys<HD>(keys, own, &a, a.k, (size_t)(t.row + t.first), kv_head, t.n - t.first);
    load_keys<HD>(values, own, &a, a.v, (size_t)(t.row + t.first), kv_head, t.n - t.first);
    fetch(0);
    copy_async_commit();
    for (int i = 0; i < total; i++) {
        const bf16 *queries = walked + i % 2 * (2 * step * ld), *records = queries + step * ld;
        int query = t.first + i % n_steps * step, key = t.first + mine;
        if (i + 1 < total) fetch(i + 1);
        copy_async_commit();
        copy_async_wait<1>();
        __syncthreads();
        if (key < t.n && meet(a.window, query, step, key, 16)) {
            float s[step / 2], dp[step / 2];
            rows_by_rows<1, step, HD, ld>(s, keys + mine * ld, queries);
            rows_by_rows<1, step, HD, ld>(dp, values + mine * ld, records);
#pragma unroll
            for (int i = 0; i < step / 2; i++) {
                int r = row_of(i), c = col_of(i);
                const float *st = stats<HD>(records, c);
                to_grad(&s[i], &dp[i], a.scale, st[0], st[1], sees(a.window, query + c, key + r));
            }
            add_product<1, cols, step, ld>(dv, s, records + col);
            add_product<1, cols, step, ld>(dk, dp, queries + col);
        }
        __syncthreads();
    }
    size_t ld_kv = (size_t)a.n_kv_head * (size_t)a.hd,
           at = (size_t)(t.row + t.first + mine) * ld_kv + (size_t)kv_head * (size_t)a.hd;
    int valid = t.n - t.first - mine;
    store_rows<cols>(a.dk + at, ld_kv, dk, col, valid, a.hd, a.vec);
    store_rows<cols>(a.dv + at, ld_kv, dv, col, valid, a.hd, a.vec);
}

template <int HD>
__global__ static void __launch_bounds__(dims<HD>::query_threads)
    k_queries(struct bwd<bf16> a, const struct tile *tiles)
{
    constexpr int own = dims<HD>::own, step = dims<HD>::step, ld = dims<HD>::ld;
    TB_DYN_SHARED(bf16, queries);
    bf16 *records = queries + own * ld, *walked = records + own * ld; /* [2]: keys, values */
    const struct tile t = tiles[gridDim.x - 1 - blockIdx.x]; /* those with more keys first */
    int warp = (int)threadIdx.x / TB_WARP;
    int head = (int)blockIdx.y, kv_head = head / (a.n_head / a.n_kv_head);
    int begin = first_key(a.window, t.first) / step * step, end = min(t.n, t.first + own);
    int mine = warp * 16, query = t.first + mine;
    float dq[HD / 2] = {};
    auto fetch = [&](int key) {
        bf16 *dst = walked + key / step % 2 * (2 * step * ld);
        load_keys<HD>(dst, step, &a, a.k, (size_t)(t.row + key), kv_head, t.n - key);
        load_keys<HD>(dst + step * ld, step, &a, a.v, (size_t)(t.row + key), kv_head, t.n - key);
    };
    load_queries<HD>(queries, own, &a, (size_t)(t.row + t.first), head, t.n - t.first);
    load_records<HD>(records, own, &a, (size_t)(t.row + t.first), head, t.n - t.first);
    fetch(begin);
    copy_async_commit();
    for (int key = begin; key < end; key += step) {
        const bf16 *keys = walked + key / step % 2 * (2 * step * ld), *values = keys + step * ld;
        if (key + step < end) fetch(key + step);
        copy_async_commit();
        copy_async_wait<1>();
        __syncthreads();
        if (query < t.n && meet(a.window, query, 16, key, step)) {
            float s[step / 2], dp[step / 2];
            rows_by_rows<1, step, HD, ld>(s, queries + mine * ld, keys);
            rows_by_rows<1, step, HD, ld>(dp, records + mine * ld, values);
#pragma unroll
            for (int i = 0; i < step / 2; i++) {
                int r = row_of(i), c = col_of(i);
                const float *st = stats<HD>(records, mine + r);
                to_grad(&s[i], &dp[i], a.scale, st[0], st[1], sees(a.window, query + r, key + c));
            }
            add_product<1, HD, step, ld>(dq, dp, keys);
        }
        __syncthreads();
    }
    size_t ld_q = (size_t)a.n_head * (size_t)a.hd,
           at = (size_t)(t.row + query) * ld_q + (size_t)head * (size_t)a.hd;
    store_rows<HD>(a.dq + at, ld_q, dq, 0, t.n - query, a.hd, a.vec);
}

/* ---- float32: 16 x 16 threads, thread (r, c) */

#define F32_TILE 16
#define F32_COLS (MAX_HEAD_DIM / F32_TILE) /* of a thread: c, c + 16, ... */

/* Shared memory: four tiles of rows, their strides odd, then P and dS. */
static __host__ __device__ int f32_stride(int hd)
{
    return div_up(hd, F32_TILE) * F32_TILE + 1;
}
static int f32_smem(int hd)
{
    return (4 * F32_TILE * f32_stride(hd) + 2 * F32_TILE * (F32_TILE + 1)) * (int)sizeof(float);
}

__device__ static void load_tile(float *dst, const float *src, size_t ld, int valid, int hd)
{
    int r = (int)threadIdx.x / F32_TILE, stride = f32_stride(hd);
    for (int c = (int)threadIdx.x % F32_TILE; c < stride - 1; c += F32_TILE)
        dst[r * stride + c] = r < valid && c < hd ? src[(size_t)r * ld + c] : 0;
}
__device__ static float dot_rows(const float *x, const float *y, int hd)
{
    float sum = 0;
    for (int d = 0; d < hd; d++)
        sum = fmaf(x[d], y[d], sum);
    return sum;
}
/* P and dS of query r and key c of two tiles; record: the query row's, NULL beyond the end. */
__device__ static void f32_grad(const struct bwd<float> *a, const float *q, const float *dout,
                                const float *k, const float *v, const float *record, bool seen,
                                float *p, float *ds)
{
    int st = record_stats(a->hd);
    *p = *ds = 0;
    if (!record || !seen) return;
    *p = dot_rows(q, k, a->hd);
    *ds = dot_rows(dout, v, a->hd);
    to_grad(p, ds, a->scale, record[st], record[st + 1], true);
}
__device__ static void store_tile(float *dst, const float sum[F32_COLS], int hd)
{
    int c = (int)threadIdx.x % F32_TILE;
#pragma unroll
    for (int x = 0; x < F32_COLS; x++)
        if (c + x * F32_TILE < hd) dst[c + x * F32_TILE] = sum[x];
}
/* sum += w[i * step] * rows[i], the 16 rows of a tile in order */
__device__ static inline void f32_accumulate(float sum[F32_COLS], const float *w, int step,
                                             const float *rows, int hd)
{
    int stride = f32_stride(hd);
    for (int i = 0; i < F32_TILE; i++) {
        const float *row = rows + i * stride + (int)threadIdx.x % F32_TILE;
#pragma unroll
        for (int x = 0; x < F32_COLS; x++)
            if (x * F32_TILE < hd) sum[x] = fmaf(w[i * step], row[x * F32_TILE], sum[x]);
    }
}

__global__ static void k_keys_f32(struct bwd<float> a, const struct tile *tiles)
{
    TB_DYN_SHARED(float, keys);
    const struct tile t = tiles[blockIdx.x];
    int r = (int)threadIdx.x / F32_TILE, c = (int)threadIdx.x % F32_TILE, ps = F32_TILE + 1;
    int stride = f32_stride(a.hd), size = F32_TILE * stride;
    float *values = keys + size, *queries = values + size, *douts = queries + size,
          *p = douts + size, *ds = p + F32_TILE * ps;
    int kv_head = (int)blockIdx.y, group = a.n_head / a.n_kv_head;
    size_t hd = (size_t)a.hd, ld = (size_t)a.n_head * hd, ld_kv = (size_t)a.n_kv_head * hd,
           at = (size_t)(t.row + t.first) * ld_kv + (size_t)kv_head * hd;
    int end = query_end(a.window, t.n, t.first + F32_TILE - 1);
    float dk[F32_COLS] = {}, dv[F32_COLS] = {};
    load_tile(keys, a.k + at, ld_kv, t.n - t.first, a.hd);
    load_tile(values, a.v + at, ld_kv, t.n - t.first, a.hd);
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
        for (int query = t.first; query < end; query += F32_TILE) {
            size_t from = (size_t)(t.row + query) * ld + (size_t)head * hd;
            load_tile(queries, a.q + from, ld, t.n - query, a.hd);
            load_tile(douts, a.dout + from, ld, t.n - query, a.hd);
            __syncthreads();
            f32_grad(&a, queries + r * stride, douts + r * stride, keys + c * stride,
                     values + c * stride, query + r < t.n ? a.dq + from + (size_t)r * ld : NULL,
                     sees(a.window, query + r, t.first + c), p + r * ps + c, ds + r * ps + c);
            __syncthreads();
            f32_accumulate(dv, p + r, ps, douts, a.hd);
            f32_accumulate(dk, ds + r, ps, queries, a.hd);
            __syncthreads();
        }
    }
    if (t.first + r >= t.n) return;
    store_tile(a.dk + at + (size_t)r * ld_kv, dk, a.hd);
    store_tile(a.dv + at + (size_t)r * ld_kv, dv, a.hd);
}

__global__ static void k_queries_f32(struct bwd<float> a, const struct tile *tiles)
{
    TB_DYN_SHARED(float, keys);
    const struct tile t = tiles[gridDim.x - 1 - blockIdx.x];
    int r = (int)threadIdx.x / F32_TILE, c = (int)threadIdx.x % F32_TILE, ps = F32_TILE + 1;
    int stride = f32_stride(a.hd), size = F32_TILE * stride;
    float *values = keys + size, *queries = values + size, *douts = queries + size,
          *p = douts + size, *ds = p + F32_TILE * ps;
    int head = (int)blockIdx.y, kv_head = head / (a.n_head / a.n_kv_head);
    size_t hd = (size_t)a.hd, ld = (size_t)a.n_head * hd, ld_kv = (size_t)a.n_kv_head * hd,
           at = (size_t)(t.row + t.first) * ld + (size_t)head * hd;
    const float *record = t.first + r < t.n ? a.dq + at + (size_t)r * ld : NULL;
    int begin = first_key(a.window, t.first) / F32_TILE * F32_TILE;
    float dq[F32_COLS] = {};
    load_tile(queries, a.q + at, ld, t.n - t.first, a.hd);
    load_tile(douts, a.dout + at, ld, t.n - t.first, a.hd);
    for (int key = begin; key < min(t.n, t.first + F32_TILE); key += F32_TILE) {
        size_t from = (size_t)(t.row + key) * ld_kv + (size_t)kv_head * hd;
        load_tile(keys, a.k + from, ld_kv, t.n - key, a.hd);
        load_tile(values, a.v + from, ld_kv, t.n - key, a.hd);
        __syncthreads();
        f32_grad(&a, queries + r * stride, douts + r * stride, keys + c * stride,
                 values + c * stride, record, sees(a.window, t.first + r, key + c), p + r * ps + c,
                 ds + r * ps + c);
        __syncthreads();
        f32_accumulate(dq, ds + r * ps, 1, keys, a.hd);
        __syncthreads();
    }
    if (record) store_tile(a.dq + at + (size_t)r * ld, dq, a.hd);
}

/* ---- the table's function */

/* launch(tiles on the device, n) for the tiles of all sequences, some at a time. */
template <typename F>
static void each_tiles(struct tb_cuda *c, const struct tb_attn_seq *seqs, int n_seqs, int rows,
                       F launch)
{
    struct tile list[MAX_TILES];
    unsigned n = 0;
    auto flush = [&] {
        const struct tile *tiles =
            n ? (const struct tile *)tb_cuda_stage(c, list, n * sizeof(*list)) : NULL;
        if (tiles) launch(tiles, n);
        n = 0;
    };
    for (int i = 0; i < n_seqs; i++) {
        for (int first = 0; first < seqs[i].n; first += rows) {
            list[n++] = {seqs[i].row, seqs[i].n, first};
            if (n == MAX_TILES) flush();
        }
    }
    flush();
}

template <typename act>
static void make_records(struct tb_cuda *c, const struct bwd<act> &a,
                         const struct tb_attn_seq *seqs, int n_seqs, int rows)
{
    each_tiles(c, seqs, n_seqs, rows, [&](const struct tile *tiles, unsigned n) {
        TB_LAUNCH(c, k_record<act>, dim3(n, (unsigned)a.n_head), 4 * TB_WARP, 0, a, tiles, rows);
    });
}

template <int HD>
static void run_bf16(struct tb_cuda *c, const struct bwd<bf16> &a, const struct tb_attn_seq *seqs,
                     int n_seqs)
{
    typedef dims<HD> d;
    if (!TB_ALLOW_SHARED(c, k_keys<HD>, d::smem) || !TB_ALLOW_SHARED(c, k_queries<HD>, d::smem))
        return;
    make_records(c, a, seqs, n_seqs, d::own);
    each_tiles(c, seqs, n_seqs, d::own, [&](const struct tile *tiles, unsigned n) {
        TB_LAUNCH(c, k_keys<HD>, dim3(n, (unsigned)a.n_kv_head), d::key_threads, d::smem, a, tiles);
    });
    each_tiles(c, seqs, n_seqs, d::own, [&](const struct tile *tiles, unsigned n) {
        TB_LAUNCH(c, k_queries<HD>, dim3(n, (unsigned)a.n_head), d::query_threads, d::smem, a,
                  tiles);
    });
}
static void run(struct tb_cuda *c, const struct bwd<bf16> &a, const struct tb_attn_seq *seqs,
                int n_seqs)
{
    if (a.hd <= 32)
        run_bf16<32>(c, a, seqs, n_seqs);
    else if (a.hd <= 64)
        run_bf16<64>(c, a, seqs, n_seqs);
    else if (a.hd <= 96)
        run_bf16<96>(c, a, seqs, n_seqs);
    else if (a.hd <= 128)
        run_bf16<128>(c, a, seqs, n_seqs);
    else
        run_bf16<MAX_HEAD_DIM>(c, a, seqs, n_seqs);
}
static void run(struct tb_cuda *c, const struct bwd<float> &a, const struct tb_attn_seq *seqs,
                int n_seqs)
{
    int smem = f32_smem(a.hd), threads = F32_TILE * F32_TILE;
    if (!TB_ALLOW_SHARED(c, k_keys_f32, smem) || !TB_ALLOW_SHARED(c, k_queries_f32, smem)) return;
    make_records(c, a, seqs, n_seqs, F32_TILE);
    each_tiles(c, seqs, n_seqs, F32_TILE, [&](const struct tile *tiles, unsigned n) {
        TB_LAUNCH(c, k_keys_f32, dim3(n, (unsigned)a.n_kv_head), threads, smem, a, tiles);
    });
    each_tiles(c, seqs, n_seqs, F32_TILE, [&](const struct tile *tiles, unsigned n) {
        TB_LAUNCH(c, k_queries_f32, dim3(n, (unsigned)a.n_head), threads, smem, a, tiles);
    });
}

static void attention_bwd(struct tb_backend *be, const struct tb_attn_shape *s,
                          const struct tb_attn_seq *seqs, int n_seqs, const void *q, const void *k,
                          const void *v, const void *out, const float *lse, const float *dout,
                          float *dq, float *dk, float *dv)
{
    struct tb_cuda *c = tb_cuda(be);
    if (s->head_dim < MIN_HEAD_DIM || s->head_dim > MAX_HEAD_DIM) {
        tb_cuda_ok(c, cudaErrorInvalidValue, "attention_bwd: head_dim");
        return;
    }
    bool vec = s->head_dim % 8 == 0 && aligned16(q) && aligned16(k) && aligned16(v) &&
               aligned16(dq) && aligned16(dk) && aligned16(dv);
    TB_ACT(be, act, {
        struct bwd<act> a;
        a.n_head = s->n_head;
        a.n_kv_head = s->n_kv_head;
        a.hd = s->head_dim;
        a.window = s->window;
        a.scale = s->scale;
        a.vec = vec;
        a.q = (const act *)q;
        a.k = (const act *)k;
        a.v = (const act *)v;
        a.out = (const act *)out;
        a.lse = lse;
        a.dout = dout;
        a.dq = dq;
        a.dk = dk;
        a.dv = dv;
        run(c, a, seqs, n_seqs);
    });
}

void tb_cuda_attn_bwd_ops(struct tb_backend_ops *o)
{
    o->min_head_dim = MIN_HEAD_DIM;
    o->max_head_dim = MAX_HEAD_DIM;
    o->attention_bwd = attention_bwd;
}
