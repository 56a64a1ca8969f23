/*
 * The optimizer over an adapter's flat arrays: the sum of squares and AdamW.
 *
 * Owner: nothing. Thread: the backend's caller.
 */
#include "cuda/quad.cuh"

/* ---- sum of squares: of pieces of fixed size, then of the pieces in order, by one block */

#define PIECE   16384
#define THREADS 256

template <bool vec> __global__ static void k_piece_squares(const float *g, size_t n, double *part)
{
    size_t from = (size_t)blockIdx.x * PIECE, left = n - from;
    int m = left < PIECE ? (int)left : PIECE;
    double s = 0;
#pragma unroll 4
    for (int i = 4 * (int)threadIdx.x; i < m; i += 4 * THREADS) {
        quad q = load_quad<vec>(g + from, i, m);
        for (int e = 0; e < 4; e++)
            s += (double)q.v[e] * (double)q.v[e]; /* the product is exact */
    }
    s = block_sum(s);
    if (threadIdx.x == 0) part[blockIdx.x] = s;
}

__global__ static void k_sum(const double *part, int n, double *sum)
{
    double s = 0;
    for (int i = (int)threadIdx.x; i < n; i += THREADS)
        s += part[i];
    s = block_sum(s);
    if (threadIdx.x == 0) *sum = s;
}

/* The scratch memory holds the pieces' sums of 256 GiB of gradient. */
static double sum_squares(struct tb_backend *be, const float *g, size_t n)
{
    struct tb_cuda *c = tb_cuda(be);
    double *part = (double *)c->scratch, sum = 0;
    int pieces = (int)((n + PIECE - 1) / PIECE);
    if (n == 0) return 0;
    TB_VEC(whole_quads(n, g), vec,
           TB_LAUNCH(c, (k_piece_squares<vec>), pieces, THREADS, 0, g, n, part));
    TB_LAUNCH(c, k_sum, 1, THREADS, 0, part, pieces, part + pieces);
    tb_cuda_fetch(c, &sum, part + pieces, sizeof(sum));
    return sum;
}

/* ---- AdamW */

template <bool vec>
__global__ static void k_adamw(struct tb_adamw o, float *p, float *m, float *v, const float *g,
                               size_t n)
{
    size_t i = flat_place();
    if (i >= n) return;
    quad qp = load_quad<vec>(p, i, n), qm = load_quad<vec>(m, i, n), qv = load_quad<vec>(v, i, n),
         qg = load_quad<vec>(g, i, n);
    float decay = 1.0f - o.lr * o.weight_decay;
    for (int e = 0; e < 4; e++) {
        float x = qg.v[e] * o.grad_scale;
        float m1 = o.beta1 * qm.v[e] + (1.0f - o.beta1) * x;
        float v1 = o.beta2 * qv.v[e] + (1.0f - o.beta2) * x * x;
        qm.v[e] = m1;
        qv.v[e] = v1;
        qp.v[e] = qp.v[e] * decay - o.lr * (m1 / o.bias1) / (sqrtf(v1 / o.bias2) + o.eps);
    }
    store_quad<vec>(p, i, n, qp);
    store_quad<vec>(m, i, n, qm);
    store_quad<vec>(v, i, n, qv);
}

static void adamw(struct tb_backend *be, const struct tb_adamw *o, float *p, float *m, float *v,
                  const float *g, size_t n)
{
    if (n == 0) return;
    TB_VEC(whole_quads(n, p, m, v, g), vec,
           TB_LAUNCH(tb_cuda(be), (k_adamw<vec>), flat_grid(n), TB_FLAT_THREADS, 0, *o, p, m, v, g,
                     n));
}

void tb_cuda_optim_ops(struct tb_backend_ops *o)
{
    o->sum_squares = sum_squares;
    o->adamw = adamw;
}
