/*
 * RMSNorm of rows, and what lies between the q, k, v product and attention: RMSNorm of heads and
 * rope; forward and backward. How many threads share a row's or a head's sum depends on its width
 * only.
 *
 * Owner: nothing. Thread: the backend's caller.
 */
#include <string.h>

#include "cuda/quad.cuh"

__device__ static inline float rstd_of(float sum_squares, int dim, float eps)
{
    return 1.0f / sqrtf(sum_squares / (float)dim + eps);
}

/* Adds q's squares to s. */
__device__ static inline float add_squares(float s, quad q)
{
    for (int e = 0; e < 4; e++)
        s = fmaf(q.v[e], q.v[e], s);
    return s;
}

/* Adds d * w * x to s. */
__device__ static inline float add_products(float s, quad d, quad w, quad x)
{
    for (int e = 0; e < 4; e++)
        s = fmaf(d.v[e] * w.v[e], x.v[e], s);
    return s;
}

/* The norm's derivative: rstd (d w - x c) with c = rstd^2 mean(d w x). */
__device__ static inline quad norm_bwd(quad d, quad w, quad x, float rstd, float c)
{
    for (int e = 0; e < 4; e++)
        d.v[e] = rstd * (d.v[e] * w.v[e] - x.v[e] * c);
    return d;
}

/* ---- rows: a block a row, four quads a thread up to 8192; what is read again is in the cache */

/* Quads i, i + step, i + 2 step and i + 3 step of a row, whose loads run together; zeros beyond
 * the row. */
template <bool vec>
__device__ static inline void load_quads(quad q[4], const float *p, int i, int step, int n)
{
#pragma unroll
    for (int k = 0; k < 4; k++, i += step)
        q[k] = i < n ? load_quad<vec>(p, i, n) : quad{};
}
template <bool vec, typename T>
__device__ static inline void store_quads(T *p, int i, int step, int n, const quad q[4])
{
#pragma unroll
    for (int k = 0; k < 4; k++, i += step)
        if (i < n) store_quad<vec>(p, i, n, q[k]);
}

#define ROW_THREADS 512 /* at most */

static int row_threads(int dim)
{
    int threads = TB_WARP * div_up(dim, 16 * TB_WARP);
    return threads < ROW_THREADS ? threads : ROW_THREADS;
}

template <bool vec, typename act>
__global__ static void __launch_bounds__(ROW_THREADS)
    k_rmsnorm(const float *__restrict__ x, const float *__restrict__ w, int dim, float eps,
              act *__restrict__ y, float *__restrict__ rstd)
{
    int first = 4 * (int)threadIdx.x, step = 4 * (int)blockDim.x;
    float s = 0;
    x += (size_t)blockIdx.x * dim;
    y += (size_t)blockIdx.x * dim;
    quad q[4], f[4];
    for (int i = first; i < dim; i += 4 * step) {
        load_quads<vec>(q, x, i, step, dim);
        for (int k = 0; k < 4; k++)
            s = add_squares(s, q[k]);
    }
    float r = rstd_of(block_sum(s), dim, eps);
    if (rstd && threadIdx.x == 0) rstd[blockIdx.x] = r;
    for (int i = first; i < dim; i += 4 * step) {
        load_quads<vec>(q, x, i, step, dim);
        load_quads<vec>(f, w, i, step, dim);
        for (int e = 0; e < 16; e++)
            q[e / 4].v[e % 4] = q[e / 4].v[e % 4] * r * f[e / 4].v[e % 4];
        store_quads<vec>(y, i, step, dim, q);
    }
}

static void rmsnorm(struct tb_backend *be, const float *x, const float *w, int T, int dim,
                    float eps, void *y, float *rstd)
{
    if (T == 0) return;
    TB_ACT(be, act,
           TB_VEC(whole_quads(dim, x, w, y), vec,
                  TB_LAUNCH(tb_cuda(be), (k_rmsnorm<vec, act>), T, row_threads(dim), 0, x, w, dim,
                            eps, (act *)y, rstd)));
}

template <bool vec>
__global__ static void __launch_bounds__(ROW_THREADS)
    k_rmsnorm_bwd(const float *__restrict__ x, const float *__restrict__ w,
                  const float *__restrict__ rstd, const float *__restrict__ dy, int dim,
                  float *__restrict__ dx)
{
    int first = 4 * (int)threadIdx.x, step = 4 * (int)blockDim.x;
    float s = 0, r = rstd[blockIdx.x];
    x += (size_t)blockIdx.x * dim;
    dy += (size_t)blockIdx.x * dim;
    dx += (size_t)blockIdx.x * dim;
    for (int i = first; i < dim; i += step)
        s = add_products(s, load_quad<vec>(dy, i, dim), load_quad<vec>(w, i, dim),
                         load_quad<vec>(x, i, dim));
    float c = block_sum(s) / (float)dim * r * r;
    for (int i = first; i < dim; i += step) {
        quad d = norm_bwd(load_quad<vec>(dy, i, dim), load_quad<vec>(w, i, dim),
                          load_quad<vec>(x, i, dim), r, c);
        store_quad<vec>(dx, i, dim, add_quads(load_quad<vec>(dx, i, dim), d));
    }
}

static void rmsnorm_bwd(struct tb_backend *be, const float *x, const float *w, const float *rstd,
                        const float *dy, int T, int dim, float *dx)
{
    if (T == 0) return;
    TB_VEC(whole_quads(dim, x, w, dy, dx), vec,
           TB_LAUNCH(tb_cuda(be), (k_rmsnorm_bwd<vec>), T, row_threads(dim), 0, x, w, rstd, dy, dim,
                     dx));
}

/* ---- heads: 1 to 32 lanes of a warp a head of q, k or v, two quads a lane up to 256 */

#define HEAD_THREADS 128

struct heads {
    int n_head, n_kv, hd, half /* of rope_dim */, lanes;
    int n; /* of all rows */
    const int32_t *pos;
    const float *cos, *sin, *q_norm, *k_norm;
    float eps;
};

/* A head, as its lanes see it. Where there is none left hd and half are 0. */
struct head {
    size_t t;  /* row */
    size_t at; /* of all rows' q, k and v heads */
    int h, hd, half, lane, lanes;
    bool raw_kept;                 /* of q or k */
    const float *cos, *sin, *norm; /* norm may be NULL */
};

__device__ static inline head head_of(const heads &a)
{
    int all = a.n_head + 2 * a.n_kv;
    int at = (int)(blockIdx.x * (blockDim.x / a.lanes) + threadIdx.x / a.lanes);
    head x = {};
    x.lanes = a.lanes;
    if (at >= a.n) return x;
    x.at = at;
    x.t = at / all;
    x.h = at % all;
    x.lane = (int)threadIdx.x % a.lanes;
    x.hd = a.hd;
    if (x.h >= a.n_head + a.n_kv) return x; /* v */
    x.raw_kept = true;
    x.half = a.half;
    x.cos = a.cos + (size_t)a.pos[x.t] * a.half;
    x.sin = a.sin + (size_t)a.pos[x.t] * a.half;
    x.norm = x.h < a.n_head ? a.q_norm : a.k_norm;
    return x;
}

/* Where head x lies in q, k or v. */
template <typename T>
__device__ static inline T *head_in(const heads &a, const head &x, T *q, T *k, T *v)
{
    if (x.h < a.n_head) return q + (x.t * a.n_head + x.h) * a.hd;
    int h = x.h - a.n_head;
    return h < a.n_kv ? k + (x.t * a.n_kv + h) * a.hd : v + (x.t * a.n_kv + h - a.n_kv) * a.hd;
}

/* Where head x, one of q's or k's, lies among the raw values that are kept. */
template <typename T> __device__ static inline T *head_kept(const heads &a, const head &x, T *raw)
{
    return raw + (x.t * (a.n_head + a.n_kv) + x.h) * a.hd;
}

/* Sum over the lanes of each head of a warp. */
__device__ static inline float head_sum(float x, int lanes)
{
    for (int d = lanes / 2; d > 0; d /= 2)
        x += __shfl_xor_sync(TB_ALL, x, d);
    return x;
}

/* put(rope(get)), or with sign -1 its inverse, for this lane's quads of a head: get(from, i, n)
 * gives elements [i, i + 4) of the n that start at the head's element `from`. */
template <bool vec, typename G, typename P>
__device__ static inline void rope(const head &x, float sign, G get, P put)
{
    int half = x.half, rest = x.hd - 2 * half;
    for (int i = 4 * x.lane; i < half; i += 4 * x.lanes) {
        quad a = get(0, i, half), b = get(half, i, half);
        quad c = load_quad<vec>(x.cos, i, half), s = load_quad<vec>(x.sin, i, half);
        for (int e = 0; e < 4; e++) {
            float lo = a.v[e], hi = b.v[e], se = sign * s.v[e];
            a.v[e] = lo * c.v[e] - hi * se;
            b.v[e] = hi * c.v[e] + lo * se;
        }
        put(0, i, half, a);
        put(half, i, half, b);
    }
    for (int i = 4 * x.lane; i < rest; i += 4 * x.lanes)
        put(2 * half, i, rest, get(2 * half, i, rest));
}

template <bool vec, typename act>
__global__ static void k_qkv_post(heads a, const float *__restrict__ raw, act *__restrict__ q,
                                  act *__restrict__ k, act *__restrict__ v,
                                  act *__restrict__ raw_act)
{
    head x = head_of(a);
    const float *in = raw + x.at * a.hd;
    act *out = head_in(a, x, q, k, v);
    act *keep = raw_act && x.raw_kept ? head_kept(a, x, raw_act) : NULL;
    float s = 0;
    if (x.norm)
        for (int i = 4 * x.lane; i < x.hd; i += 4 * x.lanes)
            s = add_squares(s, round_quad<act>(load_quad<vec>(in, i, x.hd)));
    float r = rstd_of(head_sum(s, x.lanes), a.hd, a.eps);
    rope<vec>(
        x, 1.0f,
        [&](int from, int i, int n) {
            quad y = load_quad<vec>(in + from, i, n);
            if (keep) store_quad<vec>(keep + from, i, n, y);
            if (!x.norm) return y;
            quad w = load_quad<vec>(x.norm + from, i, n);
            y = round_quad<act>(y);
            for (int e = 0; e < 4; e++)
                y.v[e] = y.v[e] * r * w.v[e];
            return y;
        },
        [&](int from, int i, int n, quad y) { store_quad<vec>(out + from, i, n, y); });
}

template <bool vec, typename act>
__global__ static void k_qkv_post_bwd(heads a, const float *dq, const float *dk, const float *dv,
                                      const act *raw_act, act *draw)
{
    head x = head_of(a);
    const float *in = head_in(a, x, dq, dk, dv);
    const act *raw = x.norm ? head_kept(a, x, raw_act) : NULL;
    act *out = draw + x.at * a.hd;
    float squares = 0, products = 0;
    auto get = [&](int from, int i, int n) { return load_quad<vec>(in + from, i, n); };
    if (x.norm)
        rope<vec>(x, -1.0f, get, [&](int from, int i, int n, quad d) {
            quad y = load_quad<vec>(raw + from, i, n);
            squares = add_squares(squares, y);
            products = add_products(products, d, load_quad<vec>(x.norm + from, i, n), y);
        });
    float r = rstd_of(head_sum(squares, x.lanes), a.hd, a.eps);
    float c = head_sum(products, x.lanes) / (float)a.hd * r * r;
    rope<vec>(x, -1.0f, get, [&](int from, int i, int n, quad d) {
        if (x.norm)
            d = norm_bwd(d, load_quad<vec>(x.norm + from, i, n), load_quad<vec>(raw + from, i, n),
                         r, c);
        store_quad<vec>(out + from, i, n, d);
    });
}

/* Stages the positions; false when nothing can be launched. */
static bool heads_init(struct heads *a, struct tb_cuda *c, const struct tb_attn_shape *s, int T,
                       const int32_t *pos, const float *cos, const float *sin, int rope_dim,
                       const float *q_norm, const float *k_norm, float eps)
{
    int lanes = 1, n = T * (s->n_head + 2 * s->n_kv_head);
    while (lanes < TB_WARP && lanes * 8 < s->head_dim)
        lanes *= 2;
    pos = (const int32_t *)tb_cuda_stage(c, pos, (size_t)T * sizeof(*pos));
    memset(a, 0, sizeof(*a)); /* its padding is compared too */
    a->n_head = s->n_head;
    a->n_kv = s->n_kv_head;
    a->hd = s->head_dim;
    a->half = rope_dim / 2;
    a->lanes = lanes;
    a->n = n;
    a->pos = pos;
    a->cos = cos;
    a->sin = sin;
    a->q_norm = q_norm;
    a->k_norm = k_norm;
    a->eps = eps;
    return pos != NULL;
}

static int heads_grid(const struct heads *a)
{
    return div_up(a->n, HEAD_THREADS / a->lanes);
}

template <typename... P> static bool heads_whole(const struct heads *a, P... p)
{
    return a->half % 4 == 0 && whole_quads(a->hd, a->cos, a->sin, a->q_norm, a->k_norm, p...);
}

static void qkv_post(struct tb_backend *be, const struct tb_attn_shape *s, const float *raw, int T,
                     const int32_t *pos, const float *cos, const float *sin, int rope_dim,
                     const float *q_norm, const float *k_norm, float eps, void *q, void *k, void *v,
                     void *raw_act)
{
    struct tb_cuda *c = tb_cuda(be);
    struct heads a;
    if (T == 0 || !heads_init(&a, c, s, T, pos, cos, sin, rope_dim, q_norm, k_norm, eps)) return;
    TB_ACT(be, act,
           TB_VEC(heads_whole(&a, raw, q, k, v, raw_act), vec,
                  TB_LAUNCH(c, (k_qkv_post<vec, act>), heads_grid(&a), HEAD_THREADS, 0, a, raw,
                            (act *)q, (act *)k, (act *)v, (act *)raw_act)));
}

static void qkv_post_bwd(struct tb_backend *be, const struct tb_attn_shape *s, const float *dq,
                         const float *dk, const float *dv, int T, const int32_t *pos,
                         const float *cos, const float *sin, int rope_dim, const float *q_norm,
                         const float *k_norm, float eps, const void *raw_act, void *draw)
{
    struct tb_cuda *c = tb_cuda(be);
    struct heads a;
    if (T == 0 || !heads_init(&a, c, s, T, pos, cos, sin, rope_dim, q_norm, k_norm, eps)) return;
    TB_ACT(be, act,
           TB_VEC(heads_whole(&a, dq, dk, dv, raw_act, draw), vec,
                  TB_LAUNCH(c, (k_qkv_post_bwd<vec, act>), heads_grid(&a), HEAD_THREADS, 0, a, dq,
                            dk, dv, (const act *)raw_act, (act *)draw)));
}

void tb_cuda_norm_ops(struct tb_backend_ops *o)
{
    o->rmsnorm = rmsnorm;
    o->rmsnorm_bwd = rmsnorm_bwd;
    o->qkv_post = qkv_post;
    o->qkv_post_bwd = qkv_post_bwd;
}
