/*
 * Embedding, SwiGLU, rounding and adding: nothing but reads and writes, a quad a thread.
 *
 * Owner: nothing. Thread: the backend's caller.
 */
#include "cuda/quad.cuh"

/* ---- embedding */

/* A checkpoint's float16, widened exactly: its exponent is moved by a product, which also
 * normalizes what is subnormal in float16. */
struct f16 {
    uint16_t bits;
};
__device__ static inline float load_act(const f16 *p)
{
    uint32_t sign = (uint32_t)(p->bits & 0x8000u) << 16, size = (uint32_t)(p->bits & 0x7fffu) << 13;
    if (size >= 0x7c00u << 13) size |= 0x7f800000u; /* infinite or NaN, and stays so */
    return __uint_as_float(__float_as_uint(__uint_as_float(size) * 0x1p112f) | sign);
}

template <bool vec, typename T>
__global__ static void k_embed(const T *table, const int32_t *tokens, int dim, int pieces, float *x)
{
    row_place at = row_place_of(pieces);
    if (at.i >= dim) return;
    quad q = load_quad<vec>(table + (size_t)tokens[at.t] * dim, at.i, dim);
    store_quad<vec>(x + at.t * dim, at.i, dim, q);
}

template <typename T>
static void embed_from(struct tb_cuda *c, const T *table, const int32_t *tokens, int n, int dim,
                       float *x)
{
    row_grid g = row_grid_of(dim);
    TB_VEC(whole_quads(dim, table, x), vec,
           TB_LAUNCH(c, (k_embed<vec, T>), n * g.pieces, g.threads, 0, table, tokens, dim, g.pieces,
                     x));
}

static void embed(struct tb_backend *be, const void *table, enum tb_dtype dtype,
                  const int32_t *tokens, int T, int dim, float *x)
{
    struct tb_cuda *c = tb_cuda(be);
    if (T == 0) return;
    const int32_t *ids = (const int32_t *)tb_cuda_stage(c, tokens, (size_t)T * sizeof(*tokens));
    if (!ids) return;
    switch (dtype) {
    case TB_F32: embed_from(c, (const float *)table, ids, T, dim, x); break;
    case TB_BF16: embed_from(c, (const bf16 *)table, ids, T, dim, x); break;
    case TB_F16: embed_from(c, (const f16 *)table, ids, T, dim, x); break;
    }
}

/* ---- SwiGLU */

/* From a product's float32 or from what was kept of it: the values are rounded either way. */
template <bool vec, typename in, typename act>
__global__ static void k_swiglu(const in *gu, int F, int pieces, act *a, act *keep)
{
    row_place at = row_place_of(pieces);
    if (at.i >= F) return;
    size_t row = at.t * 2 * F;
    quad g = round_quad<act>(load_quad<vec>(gu + row, at.i, F));
    quad u = round_quad<act>(load_quad<vec>(gu + row + F, at.i, F));
    if (keep) {
        store_quad<vec>(keep + row, at.i, F, g);
        store_quad<vec>(keep + row + F, at.i, F, u);
    }
    for (int e = 0; e < 4; e++)
        g.v[e] = g.v[e] / (1.0f + expf(-g.v[e])) * u.v[e];
    store_quad<vec>(a + at.t * F, at.i, F, g);
}

static void swiglu(struct tb_backend *be, const float *gu, int T, int F, void *a, void *gu_act)
{
    if (T == 0) return;
    row_grid g = row_grid_of(F);
    TB_ACT(be, act,
           TB_VEC(whole_quads(F, gu, a, gu_act), vec,
                  TB_LAUNCH(tb_cuda(be), (k_swiglu<vec, float, act>), T * g.pieces, g.threads, 0,
                            gu, F, g.pieces, (act *)a, (act *)gu_act)));
}

static void swiglu_again(struct tb_backend *be, const void *gu_act, int T, int F, void *a)
{
    if (T == 0) return;
    row_grid g = row_grid_of(F);
    TB_ACT(be, act,
           TB_VEC(whole_quads(F, gu_act, a), vec,
                  TB_LAUNCH(tb_cuda(be), (k_swiglu<vec, act, act>), T * g.pieces, g.threads, 0,
                            (const act *)gu_act, F, g.pieces, (act *)a, (act *)NULL)));
}

template <bool vec, typename act>
__global__ static void k_swiglu_bwd(const act *gu, const float *da, int F, int pieces, act *dgu)
{
    row_place at = row_place_of(pieces);
    if (at.i >= F) return;
    size_t row = at.t * 2 * F;
    quad g = load_quad<vec>(gu + row, at.i, F), u = load_quad<vec>(gu + row + F, at.i, F),
         d = load_quad<vec>(da + at.t * F, at.i, F);
    for (int e = 0; e < 4; e++) {
        float sig = 1.0f / (1.0f + expf(-g.v[e])), x = g.v[e];
        g.v[e] = d.v[e] * u.v[e] * sig * (1.0f + x * (1.0f - sig));
        u.v[e] = d.v[e] * x * sig;
    }
    store_quad<vec>(dgu + row, at.i, F, g);
    store_quad<vec>(dgu + row + F, at.i, F, u);
}

static void swiglu_bwd(struct tb_backend *be, const void *gu_act, const float *da, int T, int F,
                       void *dgu)
{
    if (T == 0) return;
    row_grid g = row_grid_of(F);
    TB_ACT(be, act,
           TB_VEC(whole_quads(F, gu_act, da, dgu), vec,
                  TB_LAUNCH(tb_cuda(be), (k_swiglu_bwd<vec, act>), T * g.pieces, g.threads, 0,
                            (const act *)gu_act, da, F, g.pieces, (act *)dgu)));
}

/* ---- flat arrays */

template <bool vec, typename act> __global__ static void k_to_act(const float *x, size_t n, act *y)
{
    size_t i = flat_place();
    if (i < n) store_quad<vec>(y, i, n, load_quad<vec>(x, i, n));
}

static void to_act(struct tb_backend *be, const float *x, size_t n, void *y)
{
    if (n == 0) return;
    TB_ACT(be, act,
           TB_VEC(whole_quads(n, x, y), vec,
                  TB_LAUNCH(tb_cuda(be), (k_to_act<vec, act>), flat_grid(n), TB_FLAT_THREADS, 0, x,
                            n, (act *)y)));
}

template <bool vec> __global__ static void k_add(float *y, const float *x, size_t n)
{
    size_t i = flat_place();
    if (i < n)
        store_quad<vec>(y, i, n, add_quads(load_quad<vec>(y, i, n), load_quad<vec>(x, i, n)));
}

static void add(struct tb_backend *be, float *y, const float *x, size_t n)
{
    if (n == 0) return;
    TB_VEC(whole_quads(n, y, x), vec,
           TB_LAUNCH(tb_cuda(be), (k_add<vec>), flat_grid(n), TB_FLAT_THREADS, 0, y, x, n));
}

void tb_cuda_elem_ops(struct tb_backend_ops *o)
{
    o->embed = embed;
    o->swiglu = swiglu;
    o->swiglu_again = swiglu_again;
    o->swiglu_bwd = swiglu_bwd;
    o->to_act = to_act;
    o->add = add;
}
