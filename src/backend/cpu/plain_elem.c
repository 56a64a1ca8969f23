/*
 * Embedding, norms, rope, SwiGLU and the optimizer in plain C (see plain_product.c).
 */
#include <math.h>

#include "backend/cpu/cpu.h"

static void plain_embed(struct tb_backend *be, const void *table, enum tb_dtype dtype,
                        const int32_t *tokens, int T, int dim, float *x)
{
    for (int t = 0; t < T; t++)
        for (int i = 0; i < dim; i++)
            x[(size_t)t * (size_t)dim + (size_t)i] =
                tb_load(dtype, table, (size_t)tokens[t] * (size_t)dim + (size_t)i);
}

static float rstd_of(const float *x, int dim, float eps)
{
    double s = 0;
    for (int i = 0; i < dim; i++)
        s += (double)x[i] * (double)x[i];
    return (float)(1.0 / sqrt(s / dim + (double)eps));
}

static void plain_rmsnorm(struct tb_backend *be, const float *x, const float *w, int T, int dim,
                          float eps, void *y, float *rstd)
{
    for (int t = 0; t < T; t++) {
        const float *r = x + (size_t)t * (size_t)dim;
        float q = rstd_of(r, dim, eps);
        if (rstd) rstd[t] = q;
        for (int i = 0; i < dim; i++)
            tb_store(be->act, y, (size_t)t * (size_t)dim + (size_t)i, r[i] * q * w[i]);
    }
}

/* dx (+)= d(norm)(dy) for one row */
static void norm_row_bwd(const float *x, const float *w, float rstd, const float *dy, int dim,
                         float *dx, bool add)
{
    double s = 0;
    for (int i = 0; i < dim; i++)
        s += (double)dy[i] * (double)w[i] * (double)x[i] * (double)rstd;
    float c = (float)(s / dim);
    for (int i = 0; i < dim; i++) {
        float d = rstd * (dy[i] * w[i] - x[i] * rstd * c);
        dx[i] = add ? dx[i] + d : d;
    }
}

static void plain_rmsnorm_bwd(struct tb_backend *be, const float *x, const float *w,
                              const float *rstd, const float *dy, int T, int dim, float *dx)
{
    for (int t = 0; t < T; t++) {
        size_t o = (size_t)t * (size_t)dim;
        norm_row_bwd(x + o, w, rstd[t], dy + o, dim, dx + o, true);
    }
}

/* One head: norm (norm may be NULL), then rope, from and to float32 [hd]. */
static void head_fwd(const float *in, int hd, const float *norm, float eps, const float *c,
                     const float *s, int rope_dim, float *out)
{
    float q = norm ? rstd_of(in, hd, eps) : 1;
    int half = rope_dim / 2;
    for (int i = 0; i < hd; i++)
        out[i] = norm ? in[i] * q * norm[i] : in[i];
    for (int i = 0; i < half; i++) {
        float a = out[i], b = out[i + half];
        out[i] = a * c[i] - b * s[i];
        out[i + half] = b * c[i] + a * s[i];
    }
}

#define MAX_HD 1024

static void plain_qkv_post(struct tb_backend *be, const struct tb_attn_shape *sh, const float *raw,
                           int T, const int32_t *pos, const float *cos, const float *sin,
                           int rope_dim, const float *q_norm, const float *k_norm, float eps,
                           void *q, void *k, void *v, void *raw_act)
{
    int hd = sh->head_dim, nh = sh->n_head, nk = sh->n_kv_head;
    size_t in_w = (size_t)(nh + 2 * nk) * (size_t)hd, half = (size_t)rope_dim / 2;
    float in[MAX_HD], out[MAX_HD];
    for (int t = 0; t < T; t++) {
        for (int h = 0; h < nh + nk; h++) {
            const float *norm = h < nh ? q_norm : k_norm;
            for (int i = 0; i < hd; i++) {
                size_t at = (size_t)(h * hd + i);
                in[i] = raw[(size_t)t * in_w + at];
                if (raw_act)
                    tb_store(be->act, raw_act, (size_t)t * (size_t)((nh + nk) * hd) + at, in[i]);
                /* rounded whether or not it is kept, so that training and sampling agree */
                if (norm && be->act == TB_BF16) in[i] = tb_bf16_to_f32(tb_f32_to_bf16(in[i]));
            }
            head_fwd(in, hd, norm, eps, cos + (size_t)pos[t] * half, sin + (size_t)pos[t] * half,
                     rope_dim, out);
            for (int i = 0; i < hd; i++) {
                if (h < nh)
                    tb_store(be->act, q,
                             ((size_t)t * (size_t)nh + (size_t)h) * (size_t)hd + (size_t)i, out[i]);
                else
                    tb_store(be->act, k,
                             ((size_t)t * (size_t)nk + (size_t)(h - nh)) * (size_t)hd + (size_t)i,
                             out[i]);
            }
        }
        for (int i = 0; i < nk * hd; i++)
            tb_store(be->act, v, (size_t)t * (size_t)(nk * hd) + (size_t)i,
                     raw[(size_t)t * in_w + (size_t)((nh + nk) * hd + i)]);
    }
}

static void plain_qkv_post_bwd(struct tb_backend *be, const struct tb_attn_shape *sh,
                               const float *dq, const float *dk, const float *dv, int T,
                               const int32_t *pos, const float *cos, const float *sin, int rope_dim,
                               const float *q_norm, const float *k_norm, float eps,
                               const void *raw_act, void *draw)
{
    int hd = sh->head_dim, nh = sh->n_head, nk = sh->n_kv_head, half = rope_dim / 2;
    size_t out_w = (size_t)(nh + 2 * nk) * (size_t)hd;
    float x[MAX_HD], d[MAX_HD], g[MAX_HD];
    for (int t = 0; t < T; t++) {
        const float *c = cos + (size_t)pos[t] * (size_t)half,
                    *s = sin + (size_t)pos[t] * (size_t)half;
        for (int h = 0; h < nh + nk; h++) {
            const float *norm = h < nh ? q_norm : k_norm;
            const float *src = h < nh
                                   ? dq + ((size_t)t * (size_t)nh + (size_t)h) * (size_t)hd
                                   : dk + ((size_t)t * (size_t)nk + (size_t)(h - nh)) * (size_t)hd;
            for (int i = 0; i < hd; i++)
                d[i] = src[i];
            for (int i = 0; i < half; i++) {
                d[i] = src[i] * c[i] + src[i + half] * s[i];
                d[i + half] = src[i + half] * c[i] - src[i] * s[i];
            }
            if (norm) {
                for (int i = 0; i < hd; i++)
                    x[i] = tb_load(be->act, raw_act,
                                   (size_t)t * (size_t)((nh + nk) * hd) + (size_t)(h * hd + i));
                norm_row_bwd(x, norm, rstd_of(x, hd, eps), d, hd, g, false);
            }
            for (int i = 0; i < hd; i++)
                tb_store(be->act, draw, (size_t)t * out_w + (size_t)(h * hd + i),
                         norm ? g[i] : d[i]);
        }
        for (int i = 0; i < nk * hd; i++)
            tb_store(be->act, draw, (size_t)t * out_w + (size_t)((nh + nk) * hd + i),
                     dv[(size_t)t * (size_t)(nk * hd) + (size_t)i]);
    }
}

static float round_act(enum tb_dtype act, float f)
{
    return act == TB_BF16 ? tb_bf16_to_f32(tb_f32_to_bf16(f)) : f;
}

static float silu(float g)
{
    return g / (1.0f + expf(-g));
}

static void plain_swiglu(struct tb_backend *be, const float *gu, int T, int F, void *a,
                         void *gu_act)
{
    for (int t = 0; t < T; t++) {
        for (int i = 0; i < F; i++) {
            size_t gi = (size_t)t * 2 * (size_t)F + (size_t)i, ui = gi + (size_t)F;
            float g = round_act(be->act, gu[gi]), u = round_act(be->act, gu[ui]);
            if (gu_act) {
                tb_store(be->act, gu_act, gi, g);
                tb_store(be->act, gu_act, ui, u);
            }
            tb_store(be->act, a, (size_t)t * (size_t)F + (size_t)i, silu(g) * u);
        }
    }
}

static void plain_swiglu_again(struct tb_backend *be, const void *gu_act, int T, int F, void *a)
{
    for (int t = 0; t < T; t++) {
        for (int i = 0; i < F; i++) {
            size_t gi = (size_t)t * 2 * (size_t)F + (size_t)i;
            float g = tb_load(be->act, gu_act, gi), u = tb_load(be->act, gu_act, gi + (size_t)F);
            tb_store(be->act, a, (size_t)t * (size_t)F + (size_t)i, silu(g) * u);
        }
    }
}

static void plain_swiglu_bwd(struct tb_backend *be, const void *gu_act, const float *da, int T,
                             int F, void *dgu)
{
    for (int t = 0; t < T; t++) {
        for (int i = 0; i < F; i++) {
            size_t gi = (size_t)t * 2 * (size_t)F + (size_t)i, ui = gi + (size_t)F;
            float g = tb_load(be->act, gu_act, gi), u = tb_load(be->act, gu_act, ui);
            float d = da[(size_t)t * (size_t)F + (size_t)i], sig = 1.0f / (1.0f + expf(-g));
            tb_store(be->act, dgu, gi, d * u * sig * (1.0f + g * (1.0f - sig)));
            tb_store(be->act, dgu, ui, d * g * sig);
        }
    }
}

static void plain_to_act(struct tb_backend *be, const float *x, size_t n, void *y)
{
    for (size_t i = 0; i < n; i++)
        tb_store(be->act, y, i, x[i]);
}

static void plain_add(struct tb_backend *be, float *y, const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        y[i] += x[i];
}

static double plain_sum_squares(struct tb_backend *be, const float *g, size_t n)
{
    double s = 0;
    for (size_t i = 0; i < n; i++)
        s += (double)g[i] * (double)g[i];
    return s;
}

static void plain_adamw(struct tb_backend *be, const struct tb_adamw *o, float *p, float *m,
                        float *v, const float *g, size_t n)
{
    float decay = 1.0f - o->lr * o->weight_decay;
    for (size_t i = 0; i < n; i++) {
        float x = g[i] * o->grad_scale;
        m[i] = o->beta1 * m[i] + (1.0f - o->beta1) * x;
        v[i] = o->beta2 * v[i] + (1.0f - o->beta2) * x * x;
        p[i] = p[i] * decay - o->lr * (m[i] / o->bias1) / (sqrtf(v[i] / o->bias2) + o->eps);
    }
}

void tb_plain_elem_ops(struct tb_backend_ops *o)
{
    o->embed = plain_embed;
    o->rmsnorm = plain_rmsnorm;
    o->rmsnorm_bwd = plain_rmsnorm_bwd;
    o->qkv_post = plain_qkv_post;
    o->qkv_post_bwd = plain_qkv_post_bwd;
    o->swiglu = plain_swiglu;
    o->swiglu_again = plain_swiglu_again;
    o->swiglu_bwd = plain_swiglu_bwd;
    o->to_act = plain_to_act;
    o->add = plain_add;
    o->sum_squares = plain_sum_squares;
    o->adamw = plain_adamw;
}
