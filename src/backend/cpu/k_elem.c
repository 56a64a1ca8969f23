/*
 * Embedding, norms, rope, SwiGLU, sums and the optimizer, fast. Sums over a row run lane by lane in
 * order, lanes added at the end.
 */
#include "backend/cpu/k.h"

/* ---- loops over rows or elements, shared out in pieces of fixed size */

#define PIECE 32768 /* elements worth a task */

struct rows {
    void (*fn)(const void *arg, int first, int n);
    const void *arg;
    int T, chunk;
};

static void rows_task(void *arg, int task, int thread)
{
    const struct rows *r = arg;
    int first = task * r->chunk;
    r->fn(r->arg, first, imin(r->chunk, r->T - first));
}

static void for_rows(struct tb_backend *be, void (*fn)(const void *arg, int first, int n),
                     const void *arg, int T, size_t width)
{
    struct rows r = {fn, arg, T, 1};
    if (width < PIECE) r.chunk = (int)(PIECE / (width ? width : 1));
    tb_team_run(tb_cpu(be)->team, rows_task, &r, (T + r.chunk - 1) / r.chunk);
}

struct flat {
    void (*fn)(const void *arg, size_t first, size_t n);
    const void *arg;
    size_t n;
};

static void flat_task(void *arg, int task, int thread)
{
    const struct flat *f = arg;
    size_t first = (size_t)task * PIECE, left = f->n - first;
    f->fn(f->arg, first, left < PIECE ? left : PIECE);
}

static void for_flat(struct tb_backend *be, void (*fn)(const void *arg, size_t first, size_t n),
                     const void *arg, size_t n)
{
    struct flat f = {fn, arg, n};
    tb_team_run(tb_cpu(be)->team, flat_task, &f, (int)((n + PIECE - 1) / PIECE));
}

/* ---- embedding */

struct embed {
    const void *table;
    enum tb_dtype dtype;
    const int32_t *tokens;
    int dim;
    float *x;
};

static void embed_rows(const void *arg, int first, int n)
{
    const struct embed *e = arg;
    for (int t = first; t < first + n; t++) {
        size_t at = (size_t)e->tokens[t] * (size_t)e->dim;
        float *x = e->x + (size_t)t * (size_t)e->dim;
        if (e->dtype == TB_F32)
            memcpy(x, (const float *)e->table + at, (size_t)e->dim * sizeof(float));
        else
            for (int i = 0; i < e->dim; i++)
                x[i] = tb_load(e->dtype, e->table, at + (size_t)i);
    }
}

static void embed(struct tb_backend *be, const void *table, enum tb_dtype dtype,
                  const int32_t *tokens, int T, int dim, float *x)
{
    struct embed e = {table, dtype, tokens, dim, x};
    for_rows(be, embed_rows, &e, T, (size_t)dim);
}

/* ---- RMSNorm */

static float row_rstd(const float *x, int dim, float eps)
{
    vf s = vf_zero();
    EACH(i, m, dim)
    {
        vf v = vf_loadn(x + i, m);
        s = vf_fma(v, v, s);
    }
    return 1.0f / sqrtf(vf_hsum(s) / (float)dim + eps);
}

struct norm {
    const float *x, *w, *dy;
    float *rstd, *dx;
    const float *rstd_in;
    act_t *y;
    int dim;
    float eps;
};

static void norm_rows(const void *arg, int first, int n)
{
    const struct norm *a = arg;
    for (int t = first; t < first + n; t++) {
        size_t at = (size_t)t * (size_t)a->dim;
        float q = row_rstd(a->x + at, a->dim, a->eps);
        if (a->rstd) a->rstd[t] = q;
        vf vq = vf_set1(q);
        EACH(i, m, a->dim)
        {
            vf v = vf_mul(vf_mul(vf_loadn(a->x + at + i, m), vq), vf_loadn(a->w + i, m));
            va_storen(a->y + at + i, v, m);
        }
    }
}

static void rmsnorm(struct tb_backend *be, const float *x, const float *w, int T, int dim,
                    float eps, void *y, float *rstd)
{
    struct norm a = {.x = x, .w = w, .rstd = rstd, .y = y, .dim = dim, .eps = eps};
    for_rows(be, norm_rows, &a, T, (size_t)dim);
}

/* dx = (add ? dx : 0) + d(norm)(dy) of one row */
INLINE void norm_row_bwd(const float *x, const float *w, float rstd, const float *dy, int dim,
                         float *dx, bool add)
{
    vf s = vf_zero();
    EACH(i, m, dim)
    s = vf_fma(vf_mul(vf_loadn(dy + i, m), vf_loadn(w + i, m)), vf_loadn(x + i, m), s);
    vf c = vf_set1(vf_hsum(s) / (float)dim * rstd * rstd), q = vf_set1(rstd);
    EACH(i, m, dim)
    {
        vf d = vf_mul(vf_loadn(dy + i, m), vf_loadn(w + i, m));
        d = vf_mul(q, vf_sub(d, vf_mul(vf_loadn(x + i, m), c)));
        vf_storen(dx + i, add ? vf_add(vf_loadn(dx + i, m), d) : d, m);
    }
}

static void norm_bwd_rows(const void *arg, int first, int n)
{
    const struct norm *a = arg;
    for (int t = first; t < first + n; t++) {
        size_t at = (size_t)t * (size_t)a->dim;
        norm_row_bwd(a->x + at, a->w, a->rstd_in[t], a->dy + at, a->dim, a->dx + at, true);
    }
}

static void rmsnorm_bwd(struct tb_backend *be, const float *x, const float *w, const float *rstd,
                        const float *dy, int T, int dim, float *dx)
{
    struct norm a = {.x = x, .w = w, .dy = dy, .rstd_in = rstd, .dx = dx, .dim = dim};
    for_rows(be, norm_bwd_rows, &a, T, (size_t)dim);
}

/* ---- heads: norm, then rope */

#define MAX_HD 1024

struct heads {
    const struct tb_attn_shape *s;
    const float *raw;
    const int32_t *pos;
    const float *cos, *sin;
    int rope_dim;
    const float *q_norm, *k_norm;
    float eps;
    act_t *q, *k, *v, *raw_act;
    /* backward */
    const float *dq, *dk, *dv;
    const act_t *raw_in;
    act_t *draw;
};

/* out = rope(in), or its inverse (sign -1). */
INLINE void rope(float *x, const float *c, const float *s, int half, float sign)
{
    vf sg = vf_set1(sign);
    EACH(i, m, half)
    {
        vf a = vf_loadn(x + i, m), b = vf_loadn(x + half + i, m), vc = vf_loadn(c + i, m);
        vf vs = vf_mul(vf_loadn(s + i, m), sg);
        vf_storen(x + i, vf_sub(vf_mul(a, vc), vf_mul(b, vs)), m);
        vf_storen(x + half + i, vf_fma(b, vc, vf_mul(a, vs)), m);
    }
}

static void to_act_row(const float *x, act_t *y, int n)
{
    EACH(i, m, n)
    va_storen(y + i, vf_loadn(x + i, m), m);
}

static void heads_rows(const void *arg, int first, int n)
{
    const struct heads *a = arg;
    int hd = a->s->head_dim, nh = a->s->n_head, nk = a->s->n_kv_head, half = a->rope_dim / 2;
    float x[MAX_HD];
    for (int t = first; t < first + n; t++) {
        const float *raw = a->raw + (size_t)t * (size_t)((nh + 2 * nk) * hd);
        const float *c = a->cos + (size_t)a->pos[t] * (size_t)half,
                    *s = a->sin + (size_t)a->pos[t] * (size_t)half;
        if (a->raw_act)
            to_act_row(raw, a->raw_act + (size_t)t * (size_t)((nh + nk) * hd), (nh + nk) * hd);
        for (int h = 0; h < nh + nk; h++) {
            const float *norm = h < nh ? a->q_norm : a->k_norm, *in = raw + h * hd;
            if (norm) { /* from rounded values, kept or not, so that training and sampling agree */
                EACH(i, m, hd)
                vf_storen(x + i, va_round(vf_loadn(in + i, m)), m);
                vf q = vf_set1(row_rstd(x, hd, a->eps));
                EACH(i, m, hd)
                vf_storen(x + i, vf_mul(vf_mul(vf_loadn(x + i, m), q), vf_loadn(norm + i, m)), m);
            } else {
                memcpy(x, in, (size_t)hd * sizeof(float));
            }
            rope(x, c, s, half, 1.0f);
            act_t *out = h < nh ? a->q + ((size_t)t * (size_t)nh + (size_t)h) * (size_t)hd
                                : a->k + ((size_t)t * (size_t)nk + (size_t)(h - nh)) * (size_t)hd;
            to_act_row(x, out, hd);
        }
        to_act_row(raw + (nh + nk) * hd, a->v + (size_t)t * (size_t)(nk * hd), nk * hd);
    }
}

static void qkv_post(struct tb_backend *be, const struct tb_attn_shape *s, const float *raw, int T,
                     const int32_t *pos, const float *cos, const float *sin, int rope_dim,
                     const float *q_norm, const float *k_norm, float eps, void *q, void *k, void *v,
                     void *raw_act)
{
    struct heads a = {.s = s,
                      .raw = raw,
                      .pos = pos,
                      .cos = cos,
                      .sin = sin,
                      .rope_dim = rope_dim,
                      .q_norm = q_norm,
                      .k_norm = k_norm,
                      .eps = eps,
                      .q = q,
                      .k = k,
                      .v = v,
                      .raw_act = raw_act};
    for_rows(be, heads_rows, &a, T, (size_t)((s->n_head + 2 * s->n_kv_head) * s->head_dim));
}

static void heads_bwd_rows(const void *arg, int first, int n)
{
    const struct heads *a = arg;
    int hd = a->s->head_dim, nh = a->s->n_head, nk = a->s->n_kv_head, half = a->rope_dim / 2;
    float x[MAX_HD], d[MAX_HD], g[MAX_HD];
    for (int t = first; t < first + n; t++) {
        const float *c = a->cos + (size_t)a->pos[t] * (size_t)half,
                    *s = a->sin + (size_t)a->pos[t] * (size_t)half;
        act_t *draw = a->draw + (size_t)t * (size_t)((nh + 2 * nk) * hd);
        for (int h = 0; h < nh + nk; h++) {
            const float *norm = h < nh ? a->q_norm : a->k_norm;
            const float *src =
                h < nh ? a->dq + ((size_t)t * (size_t)nh + (size_t)h) * (size_t)hd
                       : a->dk + ((size_t)t * (size_t)nk + (size_t)(h - nh)) * (size_t)hd;
            memcpy(d, src, (size_t)hd * sizeof(float));
            rope(d, c, s, half, -1.0f);
            if (norm) {
                const act_t *in = a->raw_in + (size_t)t * (size_t)((nh + nk) * hd) + h * hd;
                EACH(i, m, hd)
                vf_storen(x + i, va_loadn(in + i, m), m);
                norm_row_bwd(x, norm, row_rstd(x, hd, a->eps), d, hd, g, false);
            }
            to_act_row(norm ? g : d, draw + h * hd, hd);
        }
        to_act_row(a->dv + (size_t)t * (size_t)(nk * hd), draw + (nh + nk) * hd, nk * hd);
    }
}

static void qkv_post_bwd(struct tb_backend *be, const struct tb_attn_shape *s, const float *dq,
                         const float *dk, const float *dv, int T, const int32_t *pos,
                         const float *cos, const float *sin, int rope_dim, const float *q_norm,
                         const float *k_norm, float eps, const void *raw_act, void *draw)
{
    struct heads a = {.s = s,
                      .pos = pos,
                      .cos = cos,
                      .sin = sin,
                      .rope_dim = rope_dim,
                      .q_norm = q_norm,
                      .k_norm = k_norm,
                      .eps = eps,
                      .dq = dq,
                      .dk = dk,
                      .dv = dv,
                      .raw_in = raw_act,
                      .draw = draw};
    for_rows(be, heads_bwd_rows, &a, T, (size_t)((s->n_head + 2 * s->n_kv_head) * s->head_dim));
}

/* ---- SwiGLU */

struct swiglu {
    const float *gu, *da;
    const act_t *gu_in;
    act_t *a, *gu_act;
    int F;
};

INLINE vf sigmoid(vf g)
{
    return vf_div(vf_set1(1.0f), vf_add(vf_set1(1.0f), vf_exp(vf_sub(vf_zero(), g))));
}

INLINE vf silu_mul(vf g, vf u)
{
    return vf_mul(vf_mul(g, sigmoid(g)), u);
}

static void swiglu_rows(const void *arg, int first, int n)
{
    const struct swiglu *w = arg;
    int F = w->F;
    for (int t = first; t < first + n; t++) {
        const float *gu = w->gu + (size_t)t * 2 * (size_t)F;
        act_t *keep = w->gu_act ? w->gu_act + (size_t)t * 2 * (size_t)F : NULL;
        EACH(i, m, F)
        {
            vf g = va_round(vf_loadn(gu + i, m)), u = va_round(vf_loadn(gu + F + i, m));
            if (keep) {
                va_storen(keep + i, g, m);
                va_storen(keep + F + i, u, m);
            }
            va_storen(w->a + (size_t)t * (size_t)F + i, silu_mul(g, u), m);
        }
    }
}

static void swiglu(struct tb_backend *be, const float *gu, int T, int F, void *a, void *gu_act)
{
    struct swiglu w = {.gu = gu, .a = a, .gu_act = gu_act, .F = F};
    for_rows(be, swiglu_rows, &w, T, (size_t)F * 2);
}

static void swiglu_again_rows(const void *arg, int first, int n)
{
    const struct swiglu *w = arg;
    int F = w->F;
    for (int t = first; t < first + n; t++) {
        const act_t *gu = w->gu_in + (size_t)t * 2 * (size_t)F;
        EACH(i, m, F)
        va_storen(w->a + (size_t)t * (size_t)F + i,
                  silu_mul(va_loadn(gu + i, m), va_loadn(gu + F + i, m)), m);
    }
}

static void swiglu_again(struct tb_backend *be, const void *gu_act, int T, int F, void *a)
{
    struct swiglu w = {.gu_in = gu_act, .a = a, .F = F};
    for_rows(be, swiglu_again_rows, &w, T, (size_t)F * 2);
}

static void swiglu_bwd_rows(const void *arg, int first, int n)
{
    const struct swiglu *w = arg;
    int F = w->F;
    vf one = vf_set1(1.0f);
    for (int t = first; t < first + n; t++) {
        const act_t *gu = w->gu_in + (size_t)t * 2 * (size_t)F;
        act_t *dgu = w->a + (size_t)t * 2 * (size_t)F;
        EACH(i, m, F)
        {
            vf g = va_loadn(gu + i, m), u = va_loadn(gu + F + i, m), sig = sigmoid(g);
            vf d = vf_loadn(w->da + (size_t)t * (size_t)F + i, m), ds = vf_mul(d, sig);
            va_storen(dgu + i, vf_mul(vf_mul(ds, u), vf_fma(g, vf_sub(one, sig), one)), m);
            va_storen(dgu + F + i, vf_mul(ds, g), m);
        }
    }
}

static void swiglu_bwd(struct tb_backend *be, const void *gu_act, const float *da, int T, int F,
                       void *dgu)
{
    struct swiglu w = {.gu_in = gu_act, .da = da, .a = dgu, .F = F};
    for_rows(be, swiglu_bwd_rows, &w, T, (size_t)F * 2);
}

/* ---- flat arrays */

struct pair {
    const float *x;
    void *y;
};

static void to_act_flat(const void *arg, size_t first, size_t n)
{
    const struct pair *p = arg;
    to_act_row(p->x + first, (act_t *)p->y + first, (int)n);
}

static void to_act(struct tb_backend *be, const float *x, size_t n, void *y)
{
    struct pair p = {x, y};
    for_flat(be, to_act_flat, &p, n);
}

static void add_flat(const void *arg, size_t first, size_t n)
{
    const struct pair *p = arg;
    float *y = (float *)p->y + first;
    const float *x = p->x + first;
    EACH(i, m, (int)n)
    vf_storen(y + i, vf_add(vf_loadn(y + i, m), vf_loadn(x + i, m)), m);
}

static void add(struct tb_backend *be, float *y, const float *x, size_t n)
{
    struct pair p = {x, y};
    for_flat(be, add_flat, &p, n);
}

static void sum_squares_flat(const void *arg, size_t first, size_t n)
{
    const struct pair *p = arg;
    const float *x = p->x + first;
    struct vd s[4] = {vd_zero(), vd_zero(), vd_zero(), vd_zero()};
    double lanes[4 * VW], sum = 0;
    size_t i = 0;
    for (; i + 4 * VW <= n; i += 4 * VW) {
        UNROLL for (int j = 0; j < 4; j++) s[j] = vd_add_squares(s[j], vf_load(x + i + j * VW));
    }
    for (; i < n; i += VW)
        s[0] = vd_add_squares(s[0], vf_loadn(x + i, n - i < VW ? (int)(n - i) : VW));
    for (int j = 0; j < 4; j++)
        vd_store(lanes + j * VW, s[j]);
    for (int j = 0; j < 4 * VW; j++)
        sum += lanes[j];
    ((double *)p->y)[first / PIECE] = sum;
}

static double sum_squares(struct tb_backend *be, const float *g, size_t n)
{
    enum { PIECES = 2048 };
    double part[PIECES], s = 0;
    for (size_t first = 0; first < n; first += (size_t)PIECES * PIECE) {
        size_t left = n - first, m = left < (size_t)PIECES * PIECE ? left : (size_t)PIECES * PIECE;
        struct pair p = {g + first, part};
        for_flat(be, sum_squares_flat, &p, m);
        for (size_t i = 0; i * PIECE < m; i++)
            s += part[i];
    }
    return s;
}

struct adamw {
    const struct tb_adamw *o;
    float *p, *m, *v;
    const float *g;
};

static void adamw_flat(const void *arg, size_t first, size_t n)
{
    const struct adamw *a = arg;
    const struct tb_adamw *o = a->o;
    float *p = a->p + first, *pm = a->m + first, *pv = a->v + first;
    const float *g = a->g + first;
    vf scale = vf_set1(o->grad_scale), b1 = vf_set1(o->beta1), b2 = vf_set1(o->beta2),
       eps = vf_set1(o->eps);
    vf c1 = vf_set1(1.0f - o->beta1), c2 = vf_set1(1.0f - o->beta2), lr = vf_set1(o->lr);
    vf bias1 = vf_set1(o->bias1), bias2 = vf_set1(o->bias2),
       decay = vf_set1(1.0f - o->lr * o->weight_decay);
    EACH(i, k, (int)n)
    {
        vf x = vf_mul(vf_loadn(g + i, k), scale);
        vf m = vf_fma(b1, vf_loadn(pm + i, k), vf_mul(c1, x));
        vf v = vf_fma(b2, vf_loadn(pv + i, k), vf_mul(vf_mul(c2, x), x));
        vf up = vf_div(vf_mul(lr, vf_div(m, bias1)), vf_add(vf_sqrt(vf_div(v, bias2)), eps));
        vf_storen(pm + i, m, k);
        vf_storen(pv + i, v, k);
        vf_storen(p + i, vf_sub(vf_mul(vf_loadn(p + i, k), decay), up), k);
    }
}

static void adamw(struct tb_backend *be, const struct tb_adamw *o, float *p, float *m, float *v,
                  const float *g, size_t n)
{
    struct adamw a = {o, p, m, v, g};
    for_flat(be, adamw_flat, &a, n);
}

void K(elem_ops)(struct tb_backend_ops *o)
{
    o->embed = embed;
    o->rmsnorm = rmsnorm;
    o->rmsnorm_bwd = rmsnorm_bwd;
    o->qkv_post = qkv_post;
    o->qkv_post_bwd = qkv_post_bwd;
    o->swiglu = swiglu;
    o->swiglu_again = swiglu_again;
    o->swiglu_bwd = swiglu_bwd;
    o->to_act = to_act;
    o->add = add;
    o->sum_squares = sum_squares;
    o->adamw = adamw;
}
