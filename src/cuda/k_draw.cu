/*
 * Drawing a token from a row of logits, and the k best of a row, without sorting.
 *
 * Weights, exp((z - top) / temperature), are computed in float64 and rounded to whole numbers of a
 * unit so small that the row's sum just fits 64 bits. Their sums are exact, so no order of adding
 * shows in them, atomics and any grid will do.
 *
 * Logits are compared by a key, an unsigned number in their order. Both filters ask for the same:
 * go down from the largest key until the tokens passed weigh so much. For top_k each token weighs 1
 * and k is asked for, for top_p its weight and that part of the sum. The key where that is reached
 * is found in three digits from the top, each by a histogram of the amounts of the keys that agree
 * in the digits before. What is kept are all tokens above that key and so many of those equal to
 * it, lowest ids first. min_p is one comparison more.
 *
 * An id is then found by inverting a running sum in index order: first over the pieces' sums, then
 * within the piece. It gives the drawn token, and before that the last id kept of those equal to
 * the cut.
 *
 * Every step is a launch for a group of rows, with a block for each piece or each row. A row that
 * has no such filter leaves at once.
 *
 * Owner: nothing. Thread: the backend's caller.
 */
#include "cuda/logits.cuh"

#define ROWS    64 /* a group's logits stay in the L2 cache from launch to launch */
#define BUCKETS 2048
#define DIGITS  3

typedef unsigned long long u64; /* the type of CUDA's atomics */

struct row {
    u64 best;     /* key of the largest logit, then ~ of its lowest id */
    u64 missing;  /* a search: the amount that the tokens from here down must add */
    u64 at_cut;   /* kept are the keys above cut, and of those equal to it this many, */
    int32_t last; /* which end with this id */
    uint32_t cut; /* 0: all are kept */
    uint32_t key; /* a search: the digits found */
    int32_t n;    /* topk: the ids gathered */
};

/* A group's rows in the scratch memory. */
struct group {
    const float *logits;
    int V, ldv;
    double unit; /* what a weight of 1 counts */
    const struct tb_draw *draws;
    row *rows;
    u64 *hist; /* [ROWS, BUCKETS] */
    u64 *sums; /* [ROWS, pieces] */
};

/* ---- keys and weights */

__device__ static inline uint32_t key_of(float z)
{
    if (z != z) z = -INFINITY;
    if (z == 0) z = 0; /* -0 and 0 tie */
    uint32_t u = __float_as_uint(z);
    return u >> 31 ? ~u : u | 0x80000000u;
}

__device__ static inline float value_of(uint32_t key)
{
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

/* Of a row: its weights. Those below least count nothing, all others something. */
struct weigher {
    double top, scale, unit, least;
    __device__ u64 operator()(float z) const
    {
        double w = exp(((double)z - top) * scale);
        if (!(w > 0 && w >= least)) return 0;
        u64 x = (u64)(w * unit + 0.5);
        return x ? x : 1;
    }
};
__device__ static inline weigher weigher_of(const group &g, int r, double least)
{
    return {(double)value_of((uint32_t)(g.rows[r].best >> 32)),
            1.0 / (double)g.draws[r].temperature, g.unit, least};
}

/* Is the token drawn by weight, or is it the largest? */
__device__ static inline bool by_weight(const group &g, int r)
{
    return g.draws[r].temperature > 0 && g.draws[r].min_p <= 1 &&
           !isinf(value_of((uint32_t)(g.rows[r].best >> 32)));
}

enum filter { TOP_K, TOP_P };
__host__ __device__ static inline bool cuts(const struct tb_draw &d, enum filter f, int V)
{
    return f == TOP_K ? d.top_k > 0 && d.top_k < V : d.top_p < 1;
}
__device__ static inline bool searched(const group &g, int r, enum filter f)
{
    return cuts(g.draws[r], f, g.V) && (f == TOP_K || by_weight(g, r));
}

/* What is summed over a row in index order. */
enum amount { TIES, WEIGHTS };
__device__ static inline bool summed(const group &g, int r, enum amount a)
{
    return a == TIES ? g.rows[r].cut != 0 : by_weight(g, r);
}

__device__ static inline bool is_kept(const row &w, uint32_t key, int id)
{
    return key > w.cut || (key == w.cut && id <= w.last);
}

/* ---- sums over a block */

/* Of x over the threads up to this one; total: over all. */
__device__ static u64 block_scan(u64 x, u64 *total)
{
    __shared__ u64 part[TB_WARP];
    int warp = (int)threadIdx.x / TB_WARP, lane = (int)threadIdx.x % TB_WARP;
    for (int d = 1; d < TB_WARP; d *= 2) {
        u64 below = __shfl_up_sync(TB_ALL, x, d);
        if (lane >= d) x += below;
    }
    __syncthreads();
    if (lane == TB_WARP - 1) part[warp] = x;
    __syncthreads();
    *total = 0;
    for (int w = 0; w < (int)blockDim.x / TB_WARP; w++) {
        if (w < warp) x += part[w];
        *total += part[w];
    }
    return x;
}

/* The first i of [0, n) whose value brings the running sum above want, and the sum before it; the
 * last that adds something when all do not. Something must add. */
template <typename F> __device__ static int block_find(int n, u64 want, F value, u64 *before)
{
    __shared__ int at;
    __shared__ u64 sum_before;
    int run = div_up(n, (int)blockDim.x), i = (int)threadIdx.x * run,
        end = i + run < n ? i + run : n;
    u64 mine = 0, total;
    for (int j = i; j < end; j++)
        mine += value(j);
    u64 sum = block_scan(mine, &total);
    if (want >= total) want = total - 1;
    if (sum > want && sum - mine <= want) {
        u64 s = sum - mine, x;
        for (; s + (x = value(i)) <= want; i++)
            s += x;
        at = i;
        sum_before = s;
    }
    __syncthreads();
    *before = sum_before;
    return at;
}

/* ---- the largest logit of a row */

__global__ static void k_best(group g)
{
    piece p = my_piece(g.logits, g.V, g.ldv);
    u64 best = 0;
    each_logit(p, [&](float z, int i) {
        u64 x = (u64)key_of(z) << 32 | ~(uint32_t)(p.first + i);
        if (x > best) best = x;
    });
    for (int d = TB_WARP / 2; d > 0; d /= 2) {
        u64 other = __shfl_xor_sync(TB_ALL, best, d);
        if (other > best) best = other;
    }
    if (threadIdx.x % TB_WARP == 0) atomicMax(&g.rows[p.row].best, best);
}

/* ---- the search for the key where a filter cuts */

/* Digit i of a key: bits [shift, above), below those found; lower ones than the last digit's are
 * part of what was found. */
struct digit {
    int shift, above;
};
__device__ static inline digit digit_of(int i)
{
    int above = 32 - 11 * i;
    return {above > 11 ? above - 11 : 0, above};
}

/* Adds x to a bucket in two halves, as shared memory has atomic sums of 32 bits only. */
__device__ static inline void add_amount(uint32_t *low, uint32_t *high, u64 x)
{
    uint32_t l = (uint32_t)x, h = (uint32_t)(x >> 32);
    if (atomicAdd(low, l) + l < l) h++;
    if (h) atomicAdd(high, h);
}

__global__ static void k_hist(group g, enum filter f, int i)
{
    __shared__ uint32_t low[BUCKETS], high[BUCKETS];
    piece p = my_piece(g.logits, g.V, g.ldv);
    if (!searched(g, p.row, f)) return;
    for (int b = (int)threadIdx.x; b < BUCKETS; b += (int)blockDim.x)
        low[b] = high[b] = 0;
    __syncthreads();
    const row w = g.rows[p.row];
    const weigher weigh = weigher_of(g, p.row, 0);
    const digit d = digit_of(i);
    auto add = [&](uint32_t key, u64 x) {
        uint32_t b = key >> d.shift & (BUCKETS - 1);
        if (x) add_amount(&low[b], &high[b], x);
    };
    auto agrees = [&](uint32_t key) { return (u64)(key ^ w.key) >> d.above == 0; };
    each_logit(p, [&](float z, int) {
        uint32_t key = key_of(z);
        if (key > w.cut && agrees(key)) add(key, f == TOP_K ? 1 : weigh(z));
    });
    /* what top_k left of those equal to its cut */
    if (p.first == 0 && threadIdx.x == 0 && w.cut && agrees(w.cut))
        add(w.cut, w.at_cut * weigh(value_of(w.cut)));
    __syncthreads();
    for (int b = (int)threadIdx.x; b < BUCKETS; b += (int)blockDim.x) {
        u64 x = (u64)high[b] << 32 | low[b];
        if (x) atomicAdd(&g.hist[(size_t)p.row * BUCKETS + b], x);
    }
}

/* Finds the digit from the histogram, which it clears; after the last one makes the cut. */
__global__ static void k_select(group g, enum filter f, int i)
{
    int r = (int)blockIdx.x;
    if (!searched(g, r, f)) return;
    row *w = &g.rows[r];
    const struct tb_draw *d = &g.draws[r];
    u64 *hist = g.hist + (size_t)r * BUCKETS, missing = w->missing, above, total, mine = 0;
    if (i == 0) {
        for (int b = (int)threadIdx.x; b < BUCKETS; b += (int)blockDim.x)
            mine += hist[b];
        block_scan(mine, &total);
        missing = f == TOP_K ? (u64)d->top_k : (u64)ceil((double)d->top_p * (double)total);
        if (missing == 0) missing = 1; /* one is always kept */
    }
    int b = BUCKETS - 1 -
            block_find(
                BUCKETS, missing - 1, [=](int j) { return hist[BUCKETS - 1 - j]; }, &above);
    for (int j = (int)threadIdx.x; j < BUCKETS; j += (int)blockDim.x)
        hist[j] = 0;
    if (threadIdx.x != 0) return;
    w->key |= (uint32_t)b << digit_of(i).shift;
    w->missing = missing - above;
    if (i < DIGITS - 1) return;
    u64 each = f == TOP_K ? 1 : weigher_of(g, r, 0)(value_of(w->key));
    w->cut = w->key;
    w->at_cut = (w->missing + each - 1) / each;
    w->key = 0;
}

/* ---- the search for an id */

/* The amount of a token. */
struct counter {
    enum amount what;
    row w;
    weigher weigh;
    __device__ u64 operator()(float z, int id) const
    {
        uint32_t key = key_of(z);
        if (what == TIES) return key == w.cut;
        return is_kept(w, key, id) ? weigh(z) : 0;
    }
};
__device__ static inline counter counter_of(const group &g, int r, enum amount a)
{
    return {a, g.rows[r], weigher_of(g, r, (double)g.draws[r].min_p)};
}

__global__ static void k_sums(group g, enum amount a)
{
    piece p = my_piece(g.logits, g.V, g.ldv);
    if (!summed(g, p.row, a)) return;
    const counter count = counter_of(g, p.row, a);
    u64 mine = 0, total;
    each_logit(p, [&](float z, int i) { mine += count(z, p.first + i); });
    block_scan(mine, &total);
    if (threadIdx.x == 0) g.sums[(size_t)p.row * gridDim.y + blockIdx.y] = total;
}

/* Of ties the last one kept, into the row; of weights the token drawn, into tokens. */
__global__ static void k_find(group g, enum amount a, int n_sums, int32_t *tokens)
{
    int r = (int)blockIdx.x;
    row *w = &g.rows[r];
    if (!summed(g, r, a)) {
        if (a == WEIGHTS && threadIdx.x == 0) tokens[r] = (int32_t) ~(uint32_t)w->best;
        return;
    }
    const u64 *sums = g.sums + (size_t)r * n_sums;
    const counter count = counter_of(g, r, a);
    u64 mine = 0, total, want, before, rest;
    for (int i = (int)threadIdx.x; i < n_sums; i += (int)blockDim.x)
        mine += sums[i];
    block_scan(mine, &total);
    want = a == TIES ? w->at_cut - 1 : (u64)((double)g.draws[r].u * (double)total);
    int i = block_find(
        n_sums, want, [=](int j) { return sums[j]; }, &before);
    piece p = piece_at(g.logits, g.V, g.ldv, r, i);
    int id =
        p.first + block_find(
                      p.n, want - before, [&](int j) { return count(p.z[j], p.first + j); }, &rest);
    if (threadIdx.x != 0) return;
    if (a == TIES)
        w->last = id;
    else
        tokens[r] = id;
}

/* ---- the k best */

/* Gathers what is kept, as key and ~id, in any order. */
__global__ static void k_gather(group g, int k, u64 *list)
{
    piece p = my_piece(g.logits, g.V, g.ldv);
    const row w = g.rows[p.row];
    each_logit(p, [&](float z, int i) {
        uint32_t key = key_of(z), id = (uint32_t)(p.first + i);
        if (!is_kept(w, key, (int)id)) return;
        int at = atomicAdd(&g.rows[p.row].n, 1);
        list[(size_t)p.row * k + at] = (u64)key << 32 | ~id;
    });
}

/* Puts each gathered id at its rank, the number of those before it; n of k places are filled. */
__global__ static void k_rank(const u64 *list, const float *lse, int n, int k, int32_t *ids,
                              float *lps)
{
    int row = (int)blockIdx.x, i = (int)(blockIdx.y * blockDim.x + threadIdx.x), rank = 0;
    list += (size_t)row * k;
    ids += (size_t)row * k;
    lps += (size_t)row * k;
    if (i >= k) return;
    if (i >= n) {
        ids[i] = -1;
        lps[i] = -INFINITY;
        return;
    }
    u64 x = list[i];
    for (int j = 0; j < n; j++)
        rank += list[j] > x;
    ids[rank] = (int32_t) ~(uint32_t)x;
    lps[rank] = value_of((uint32_t)(x >> 32)) - lse[row];
}

/* ---- the table's functions */

static size_t group_bytes(int V)
{
    return ROWS * (sizeof(row) + sizeof(u64) * (size_t)(BUCKETS + n_pieces(V)));
}

/* A group of n <= ROWS rows at the start of the scratch memory; false when the device is lost. */
static bool begin(struct tb_cuda *c, group *g, const float *logits, int n, int V, int ldv,
                  const struct tb_draw *draws)
{
    int spare = 62; /* bits that V weights of 1 may fill */
    while (spare > 12 && V > 1 << (62 - spare))
        spare--;
    g->logits = logits;
    g->V = V;
    g->ldv = ldv;
    g->unit = (double)(1ull << (spare < 50 ? spare : 50));
    g->hist = (u64 *)c->scratch;
    g->sums = g->hist + (size_t)ROWS * BUCKETS;
    g->rows = (row *)(g->sums + (size_t)ROWS * (size_t)n_pieces(V));
    g->draws = (const struct tb_draw *)tb_cuda_stage(c, draws, (size_t)n * sizeof(*draws));
    return g->draws &&
           tb_cuda_ok(c, cudaMemsetAsync(g->hist, 0, group_bytes(V), c->stream), "a draw");
}

/* Blocks of small vocabularies need no more threads than that. */
static int threads_of(int V)
{
    int n = div_up(V, TB_WARP) * TB_WARP;
    return n < PIECE_THREADS ? n : PIECE_THREADS;
}

static void cut(struct tb_cuda *c, const group &g, int n, enum filter f)
{
    for (int i = 0; i < DIGITS; i++) {
        TB_LAUNCH(c, k_hist, piece_grid(n, g.V), threads_of(g.V), 0, g, f, i);
        TB_LAUNCH(c, k_select, n, threads_of(g.V), 0, g, f, i);
    }
}

static void find(struct tb_cuda *c, const group &g, int n, enum amount a, int32_t *tokens)
{
    TB_LAUNCH(c, k_sums, piece_grid(n, g.V), threads_of(g.V), 0, g, a);
    TB_LAUNCH(c, k_find, n, threads_of(g.V), 0, g, a, n_pieces(g.V), tokens);
}

static void draw(struct tb_backend *be, const float *logits, int T, int V, int ldv,
                 const struct tb_draw *draws, int32_t *tokens)
{
    struct tb_cuda *c = tb_cuda(be);
    int32_t *drawn = (int32_t *)((char *)c->scratch + group_bytes(V));
    for (int t = 0; t < T; t += ROWS) {
        group g;
        int n = T - t < ROWS ? T - t : ROWS;
        bool by_k = false, by_p = false;
        for (int i = t; i < t + n; i++) {
            by_k |= cuts(draws[i], TOP_K, V);
            by_p |= cuts(draws[i], TOP_P, V);
        }
        if (!begin(c, &g, logits + (size_t)t * (size_t)ldv, n, V, ldv, draws + t)) break;
        TB_LAUNCH(c, k_best, piece_grid(n, V), threads_of(V), 0, g);
        if (by_k) cut(c, g, n, TOP_K);
        if (by_p) cut(c, g, n, TOP_P);
        if (by_k || by_p) find(c, g, n, TIES, NULL);
        find(c, g, n, WEIGHTS, drawn + t);
    }
    tb_cuda_fetch(c, tokens, drawn, (size_t)T * sizeof(*tokens));
}

static void topk(struct tb_backend *be, const float *logits, int T, int V, int ldv,
                 const float *lse, int k, int32_t *ids, float *lps)
{
    struct tb_cuda *c = tb_cuda(be);
    struct tb_draw draws[ROWS];
    size_t K = (size_t)k, room = c->scratch_bytes - group_bytes(V), bytes = K * (sizeof(u64) + 8);
    int step = bytes * ROWS <= room ? ROWS : (int)(room / bytes);
    for (int i = 0; i < ROWS; i++)
        draws[i] = {.temperature = 1, .top_k = k, .top_p = 1, .u = 0, .min_p = 0};
    for (int t = 0; t < T && k > 0; t += step) {
        group g;
        int n = T - t < step ? T - t : step;
        size_t cells = (size_t)n * K;
        u64 *list = (u64 *)((char *)c->scratch + group_bytes(V));
        int32_t *row_ids = (int32_t *)(list + cells);
        float *row_lps = (float *)(row_ids + cells);
        const float *l = (const float *)tb_cuda_stage(c, lse + t, (size_t)n * 4);
        if (l && begin(c, &g, logits + (size_t)t * (size_t)ldv, n, V, ldv, draws)) {
            if (k < V) {
                cut(c, g, n, TOP_K);
                find(c, g, n, TIES, NULL);
            }
            TB_LAUNCH(c, k_gather, piece_grid(n, V), threads_of(V), 0, g, k, list);
            TB_LAUNCH(c, k_rank, dim3((unsigned)n, (unsigned)div_up(k, PIECE_THREADS)),
                      PIECE_THREADS, 0, (const u64 *)list, l, k < V ? k : V, k, row_ids, row_lps);
        }
        tb_cuda_fetch(c, ids + (size_t)t * K, row_ids, cells * 4);
        tb_cuda_fetch(c, lps + (size_t)t * K, row_lps, cells * 4);
    }
}

void tb_cuda_draw_ops(struct tb_backend_ops *o)
{
    o->draw = draw;
    o->topk = topk;
}
