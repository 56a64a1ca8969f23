/*
 * Reductions over any set of dimensions, and their derivatives. Each keeps the reduced dimensions
 * at size 1 while it works; sums run in double in the order of the elements. See custom.h.
 *
 * Owner: the run's arena. Thread: the run's.
 */
#include <math.h>
#include <string.h>

#include "model/custom/custom.h"
#include "util/mem.h"

unsigned tb_gt_all_dims(const struct tb_gtensor *x)
{
    return (1u << x->rank) - 1;
}

static int dims_of(struct tb_grun *r, int arg, const struct tb_gtensor *x, unsigned *dims)
{
    int64_t list[TB_G_RANK];
    int n, d;
    *dims = tb_gt_all_dims(x);
    if (tb_garg_ints(r, arg, TB_G_RANK, list, &n)) return r->rc;
    if (n > 0) *dims = 0;
    for (int i = 0; i < n; i++) {
        if (tb_gdim(r, list[i], x->rank, &d)) return r->rc;
        if (x->rank == 0) continue;
        if (*dims & (1u << d)) return tb_gfail(r, TB_EINVAL, "dimension %d is there twice", d);
        *dims |= 1u << d;
    }
    return 0;
}

/* Shape of the result with reduced dimensions of size 1. */
static struct tb_gtensor *kept(struct tb_grun *r, enum tb_gtype type, const struct tb_gtensor *x,
                               unsigned dims)
{
    int64_t shape[TB_G_RANK];
    for (int d = 0; d < x->rank; d++)
        shape[d] = dims & (1u << d) ? 1 : x->shape[d];
    return tb_gt_new(r, type, x->rank, shape);
}

static struct tb_gtensor *finish(struct tb_grun *r, struct tb_gtensor *y, unsigned dims, bool keep)
{
    int64_t shape[TB_G_RANK];
    int rank = 0;
    if (!y || r->rc) return NULL;
    if (keep || !dims) return y;
    for (int d = 0; d < y->rank; d++)
        if (!(dims & (1u << d))) shape[rank++] = y->shape[d];
    return tb_gt_view(r, y, rank, shape);
}

/* Walks x (ix) and its reduction y (iy) together; the body is one statement. */
#define EACH(x, y)                                                                                 \
    int64_t st_[2][TB_G_RANK];                                                                     \
    struct tb_gwalk w_;                                                                            \
    tb_gt_strides(x, (x)->rank, st_[0]);                                                           \
    tb_gt_strides(y, (x)->rank, st_[1]);                                                           \
    for (tb_gwalk_init(&w_, (x)->rank, (x)->shape, 2, st_); w_.left > 0; tb_gwalk_next(&w_))       \
        for (int64_t j_ = 0, ix = w_.at[0], iy = w_.at[1]; j_ < w_.len;                            \
             j_++, ix += w_.in[0], iy += w_.in[1])

static void clear(struct tb_gtensor *t, double v)
{
    for (int64_t i = 0; i < t->n; i++)
        t->f[i] = v;
}

static void round_all(struct tb_gtensor *t)
{
    for (int64_t i = 0; i < t->n; i++)
        t->f[i] = tb_ground(t->type, t->f[i]);
}

static double *scratch(struct tb_grun *r, int64_t n, double v)
{
    double *p = tb_galloc(r, n, sizeof(*p));
    for (int64_t i = 0; p && i < n; i++)
        p[i] = v;
    return p;
}

/* ---- sum, mean */

static int back_sum(struct tb_grun *r, struct tb_gstep *s)
{
    double *g = tb_gt_grad(r, s->a);
    if (!g) return r->rc;
    EACH(s->a, s->out) g[ix] += s->out->g[iy] * s->d[0];
    return 0;
}

struct tb_gtensor *tb_gt_reduce(struct tb_grun *r, enum tb_greduce k, struct tb_gtensor *x,
                                unsigned dims, bool keep)
{
    if (!x) return NULL;
    if (tb_gwork(r, x->n)) return NULL;
    if (!tb_gt_is_float(x->type)) {
        if (k == TB_GR_MEAN) {
            tb_gfail(r, TB_EINVAL, "needs floats, not %s", tb_gtype_name(x->type));
            return NULL;
        }
        struct tb_gtensor *y = kept(r, TB_GT_INT, x, dims);
        if (!y) return NULL;
        memset(y->i, 0, (size_t)y->n * sizeof(*y->i));
        EACH(x, y) y->i[iy] = (int64_t)((uint64_t)y->i[iy] + (uint64_t)x->i[ix]);
        return finish(r, y, dims, keep);
    }
    struct tb_gtensor *y = kept(r, x->type, x, dims);
    if (!y) return NULL;
    double n = y->n ? (double)(x->n / y->n) : 0;
    clear(y, 0);
    {
        EACH(x, y) y->f[iy] += x->f[ix];
    }
    for (int64_t i = 0; i < y->n && k == TB_GR_MEAN; i++)
        y->f[i] /= n;
    round_all(y);
    struct tb_gstep *s = tb_gt_step(r, y, x, NULL, NULL, back_sum);
    if (s) s->d[0] = k == TB_GR_MEAN ? 1 / n : 1;
    return finish(r, y, dims, keep);
}

/* input, dim, keepdim, dtype */
static int run_sum(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    unsigned dims;
    bool keep = false;
    if (!x || dims_of(r, 1, x, &dims) || tb_garg_bool(r, 2, &keep)) return r->rc;
    enum tb_gtype type = x->type;
    if (tb_garg_type(r, 3, &type)) return r->rc;
    return tb_gout(
        r, out,
        tb_gt_reduce(r, r->op->p ? TB_GR_MEAN : TB_GR_SUM, tb_gt_cast(r, x, type), dims, keep));
}

static int run_count_nonzero(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    unsigned dims;
    if (!x || dims_of(r, 1, x, &dims)) return r->rc;
    x = tb_gt_binary(r, TB_GB_NE, x, tb_gt_int(r, 0), 0);
    return tb_gout(r, out, tb_gt_reduce(r, TB_GR_SUM, x, dims, false));
}

/* ---- prod */

/* aux: products without their zeros, then the counts of zeros */
static int back_prod(struct tb_grun *r, struct tb_gstep *s)
{
    double *g = tb_gt_grad(r, s->a);
    const double *rest = s->aux, *zeros = s->aux + s->out->n;
    if (!g) return r->rc;
    EACH(s->a, s->out)
    {
        double v = s->a->f[ix];
        double d = v != 0 ? (zeros[iy] > 0 ? 0 : rest[iy] / v) : zeros[iy] > 1 ? 0 : rest[iy];
        g[ix] += s->out->g[iy] * d;
    }
    return 0;
}

static int run_prod(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    unsigned dims;
    bool keep = false;
    if (!x || dims_of(r, 1, x, &dims) || tb_garg_bool(r, 2, &keep)) return r->rc;
    enum tb_gtype type = tb_gt_is_float(x->type) ? x->type : TB_GT_INT;
    if (tb_garg_type(r, 3, &type) || !(x = tb_gt_cast(r, x, type))) return r->rc;
    struct tb_gtensor *y = kept(r, type, x, dims);
    if (!y || tb_gwork(r, x->n)) return r->rc;
    if (!tb_gt_is_float(type)) {
        for (int64_t i = 0; i < y->n; i++)
            y->i[i] = 1;
        EACH(x, y) y->i[iy] = (int64_t)((uint64_t)y->i[iy] * (uint64_t)x->i[ix]);
        return tb_gout(r, out, finish(r, y, dims, keep));
    }
    double *rest = scratch(r, 2 * y->n, 0), *zeros = rest + y->n;
    if (!rest) return r->rc;
    for (int64_t i = 0; i < y->n; i++)
        rest[i] = 1;
    {
        EACH(x, y)
        {
            if (x->f[ix] == 0)
                zeros[iy]++;
            else
                rest[iy] *= x->f[ix];
        }
    }
    for (int64_t i = 0; i < y->n; i++)
        y->f[i] = tb_ground(type, zeros[i] > 0 ? rest[i] * 0 : rest[i]);
    struct tb_gstep *s = tb_gt_step(r, y, x, NULL, NULL, back_prod);
    if (s) s->aux = rest;
    return tb_gout(r, out, finish(r, y, dims, keep));
}

/* ---- extremes */

/* Whether b takes the place of a; NaN beats all and the first of equals stays. */
static bool beats(double b, double a, bool most)
{
    if (isnan(a)) return false;
    return isnan(b) || (most ? b > a : b < a);
}

/* The derivative is shared evenly among ties. */
static int back_extreme(struct tb_grun *r, struct tb_gstep *s)
{
    struct tb_gtensor *x = s->a, *y = s->out;
    double *g = tb_gt_grad(r, x), *ties = scratch(r, y->n, 0);
    if (!g || !ties) return r->rc;
    {
        EACH(x, y) ties[iy] += x->f[ix] == y->f[iy] || (isnan(x->f[ix]) && isnan(y->f[iy]));
    }
    {
        EACH(x, y)
        if (x->f[ix] == y->f[iy] || (isnan(x->f[ix]) && isnan(y->f[iy])))
            g[ix] += y->g[iy] / ties[iy];
    }
    return 0;
}

static struct tb_gtensor *extreme(struct tb_grun *r, struct tb_gtensor *x, unsigned dims, bool keep,
                                  bool most)
{
    struct tb_gtensor *y = x ? kept(r, x->type, x, dims) : NULL;
    if (!y || tb_gwork(r, x->n)) return NULL;
    if (x->n == 0 && y->n) {
        tb_gfail(r, TB_EINVAL, "an empty tensor has no extreme");
        return NULL;
    }
    if (tb_gt_is_float(x->type)) {
        clear(y, most ? -INFINITY : INFINITY);
        EACH(x, y) if (beats(x->f[ix], y->f[iy], most)) y->f[iy] = x->f[ix];
    } else {
        for (int64_t i = 0; i < y->n; i++)
            y->i[i] = most ? INT64_MIN : INT64_MAX;
        EACH(x, y) if (most ? x->i[ix] > y->i[iy] : x->i[ix] < y->i[iy]) y->i[iy] = x->i[ix];
    }
    tb_gt_step(r, y, x, NULL, NULL, back_extreme);
    return finish(r, y, dims, keep);
}

/* Values and indices of the extremes along a dimension. */
static int extreme_at(struct tb_grun *r, struct tb_gtensor *x, int dim, bool keep, bool most,
                      struct tb_gtensor **values, struct tb_gtensor **indices)
{
    unsigned dims = x->rank ? 1u << dim : 0;
    struct tb_glanes l = tb_glanes_of(x, dim);
    struct tb_gtensor *at = kept(r, TB_GT_INT, x, dims);
    int32_t *map = at ? tb_galloc(r, at->n, sizeof(*map)) : NULL;
    if (!map || tb_gwork(r, x->n)) return r->rc;
    if (l.len == 0) return tb_gfail(r, TB_EINVAL, "an empty dimension has no extreme");
    for (int64_t o = 0; o < l.outer; o++)
        for (int64_t i = 0; i < l.stride; i++) {
            int64_t base = o * l.len * l.stride + i, best = 0;
            for (int64_t k = 1; k < l.len; k++) {
                int64_t a = base + best * l.stride, b = base + k * l.stride;
                if (tb_gt_is_float(x->type) ? beats(x->f[b], x->f[a], most)
                                            : (most ? x->i[b] > x->i[a] : x->i[b] < x->i[a]))
                    best = k;
            }
            at->i[o * l.stride + i] = best;
            map[o * l.stride + i] = (int32_t)(base + best * l.stride);
        }
    *indices = finish(r, at, dims, keep);
    *values = finish(r, tb_gt_pick(r, x, at->rank, at->shape, map, 0), dims, keep);
    return r->rc;
}

/* amax, amin; p: most */
static int run_extreme(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    unsigned dims;
    bool keep = false;
    if (!x || dims_of(r, 1, x, &dims) || tb_garg_bool(r, 2, &keep)) return r->rc;
    return tb_gout(r, out, extreme(r, x, dims, keep, r->op->p != NULL));
}

/* max, min: input | input, dim, keepdim | input, other */
static int run_max(struct tb_grun *r, struct tb_gvalue *out)
{
    bool most = r->op->p != NULL, keep = false;
    struct tb_gtensor *x = tb_garg_tensor(r, 0), *values, *indices;
    int dim = 0, other = tb_garg_is_tensor(r, 1) ? 1 : 3;
    if (!x) return r->rc;
    if (tb_garg_given(r, other) && tb_garg_is_tensor(r, other))
        return tb_gout(r, out,
                       tb_gt_binary(r, most ? TB_GB_MAX : TB_GB_MIN, x, r->args[other].t, 0));
    if (!tb_garg_given(r, 1)) return tb_gout(r, out, extreme(r, x, tb_gt_all_dims(x), false, most));
    if (tb_garg_dim(r, 1, x->rank, &dim) || tb_garg_bool(r, 2, &keep) ||
        extreme_at(r, x, dim, keep, most, &values, &indices))
        return r->rc;
    return tb_gout_pair(r, out, values, indices);
}

static int run_argmax(struct tb_grun *r, struct tb_gvalue *out)
{
    bool keep = false;
    struct tb_gtensor *x = tb_garg_tensor(r, 0), *values, *indices;
    int dim = 0;
    if (!x || tb_garg_bool(r, 2, &keep)) return r->rc;
    if (!tb_garg_given(r, 1)) {
        int64_t flat[1] = {x->n};
        if (keep) return tb_gfail(r, TB_EUNSUPPORTED, "keepdim needs dim here");
        x = tb_gt_view(r, x, 1, flat);
    } else if (tb_garg_dim(r, 1, x->rank, &dim)) {
        return r->rc;
    }
    if (!x || extreme_at(r, x, dim, keep, r->op->p != NULL, &values, &indices)) return r->rc;
    return tb_gout(r, out, indices);
}

/* any, all; p: all */
static int run_any(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    unsigned dims;
    bool keep = false, all = r->op->p != NULL;
    if (!x || dims_of(r, 1, x, &dims) || tb_garg_bool(r, 2, &keep)) return r->rc;
    struct tb_gtensor *y = kept(r, TB_GT_BOOL, x, dims);
    if (!y || tb_gwork(r, x->n)) return r->rc;
    for (int64_t i = 0; i < y->n; i++)
        y->i[i] = all;
    EACH(x, y)
    {
        bool v = tb_gt_is_float(x->type) ? x->f[ix] != 0 : x->i[ix] != 0;
        y->i[iy] = all ? y->i[iy] && v : y->i[iy] || v;
    }
    return tb_gout(r, out, finish(r, y, dims, keep));
}

/* ---- var, std */

/* aux: means; d: 1 / (n - correction), whether std */
static int back_var(struct tb_grun *r, struct tb_gstep *s)
{
    struct tb_gtensor *y = s->out;
    double *g = tb_gt_grad(r, s->a);
    if (!g) return r->rc;
    EACH(s->a, y)
    {
        double gy = s->d[1] == 0 ? y->g[iy] : y->f[iy] == 0 ? 0 : y->g[iy] / (2 * y->f[iy]);
        g[ix] += gy * 2 * s->d[0] * (s->a->f[ix] - s->aux[iy]);
    }
    return 0;
}

/* input, dim, unbiased, keepdim, correction; or input, unbiased. p: std */
static int run_var(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    unsigned dims;
    bool keep = false, unbiased = true;
    double correction = 1;
    if (!x) return r->rc;
    if (r->args[1].kind == TB_GV_BOOL) {
        unbiased = r->args[1].b;
        dims = tb_gt_all_dims(x);
    } else if (dims_of(r, 1, x, &dims)) {
        return r->rc;
    }
    if (tb_garg_bool(r, 2, &unbiased) || tb_garg_bool(r, 3, &keep)) return r->rc;
    if (!unbiased) correction = 0;
    if (tb_garg_double(r, 4, &correction)) return r->rc;
    if (!tb_gt_is_float(x->type)) return tb_gfail(r, TB_EINVAL, "needs floats");
    struct tb_gtensor *y = kept(r, x->type, x, dims);
    double *mean = y ? scratch(r, y->n, 0) : NULL;
    if (!mean || tb_gwork(r, 2 * x->n)) return r->rc;
    double n = y->n ? (double)(x->n / y->n) : 0;
    clear(y, 0);
    {
        EACH(x, y) mean[iy] += x->f[ix];
    }
    for (int64_t i = 0; i < y->n; i++)
        mean[i] /= n;
    {
        EACH(x, y) y->f[iy] += (x->f[ix] - mean[iy]) * (x->f[ix] - mean[iy]);
    }
    double scale = 1 / fmax(n - correction, 0);
    for (int64_t i = 0; i < y->n; i++) {
        double v = y->f[i] * scale;
        y->f[i] = tb_ground(y->type, r->op->p ? sqrt(v) : v);
    }
    struct tb_gstep *s = tb_gt_step(r, y, x, NULL, NULL, back_var);
    if (s) {
        s->aux = mean;
        s->d[0] = scale;
        s->d[1] = r->op->p != NULL;
    }
    return tb_gout(r, out, finish(r, y, dims, keep));
}

/* ---- norms */

static int back_norm(struct tb_grun *r, struct tb_gstep *s)
{
    struct tb_gtensor *x = s->a, *y = s->out;
    double *g = tb_gt_grad(r, x), p = s->d[0], *ties = NULL;
    if (!g || p == 0) return r->rc;
    if (isinf(p)) {
        if (!(ties = scratch(r, y->n, 0))) return r->rc;
        EACH(x, y) ties[iy] += fabs(x->f[ix]) == y->f[iy];
    }
    EACH(x, y)
    {
        double v = x->f[ix], n = y->f[iy], d = (double)((v > 0) - (v < 0));
        if (ties)
            d = fabs(v) == n ? d / ties[iy] : 0;
        else if (p == 2)
            d = n == 0 ? 0 : v / n;
        else if (p != 1)
            d = n == 0 || v == 0 ? 0 : d * pow(fabs(v) / n, p - 1);
        g[ix] += y->g[iy] * d;
    }
    return 0;
}

struct tb_gtensor *tb_gt_norm(struct tb_grun *r, struct tb_gtensor *x, double p, unsigned dims,
                              bool keep)
{
    struct tb_gtensor *y = x ? kept(r, x->type, x, dims) : NULL;
    if (!y || tb_gwork(r, x->n)) return NULL;
    if (!tb_gt_is_float(x->type)) {
        tb_gfail(r, TB_EINVAL, "needs floats");
        return NULL;
    }
    clear(y, isinf(p) && p < 0 ? (double)INFINITY : 0);
    {
        EACH(x, y)
        {
            double v = fabs(x->f[ix]);
            if (isinf(p))
                y->f[iy] = beats(v, y->f[iy], p > 0) ? v : y->f[iy];
            else
                y->f[iy] += p == 2 ? v * v : p == 1 ? v : p == 0 ? v != 0 : pow(v, p);
        }
    }
    for (int64_t i = 0; i < y->n; i++) {
        double v = y->f[i];
        y->f[i] = tb_ground(y->type, p == 2                         ? sqrt(v)
                                     : isinf(p) || p == 1 || p == 0 ? v
                                                                    : pow(v, 1 / p));
    }
    struct tb_gstep *s = tb_gt_step(r, y, x, NULL, NULL, back_norm);
    if (s) s->d[0] = p;
    return finish(r, y, dims, keep);
}

/* input, p, dim, keepdim, dtype; p: a matrix's orders, which are not served */
static int run_norm(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    unsigned dims;
    bool keep = false;
    double p = 2;
    if (!x || dims_of(r, 2, x, &dims) || tb_garg_bool(r, 3, &keep)) return r->rc;
    bool matrix = r->op->p && tb_garg_given(r, 1) && x->rank > 1 && (dims & (dims - 1));
    if (r->args[1].kind == TB_GV_STR) {
        if (strcmp(r->args[1].s, "fro"))
            return tb_gfail(r, TB_EUNSUPPORTED, "norm %.32s is not supported", r->args[1].s);
    } else if (matrix) {
        return tb_gfail(r, TB_EUNSUPPORTED, "orders of matrix norms are not supported");
    } else if (tb_garg_double(r, 1, &p)) {
        return r->rc;
    }
    enum tb_gtype type = x->type;
    if (tb_garg_type(r, 4, &type)) return r->rc;
    return tb_gout(r, out, tb_gt_norm(r, tb_gt_cast(r, x, type), p, dims, keep));
}

/* ---- logsumexp, softmax */

static int back_logsumexp(struct tb_grun *r, struct tb_gstep *s)
{
    struct tb_gtensor *y = s->out;
    double *g = tb_gt_grad(r, s->a);
    if (!g) return r->rc;
    EACH(s->a, y)
    g[ix] += y->g[iy] * exp(s->a->f[ix] - y->f[iy]);
    return 0;
}

/* Sum of exp(x - top) for each lane of dims; tops that are infinite count as 0. */
static double *exp_sums(struct tb_grun *r, const struct tb_gtensor *x, const struct tb_gtensor *y,
                        double **tops)
{
    double *top = scratch(r, y->n, -INFINITY), *sum = scratch(r, y->n, 0);
    if (!top || !sum || tb_gwork(r, 2 * x->n)) return NULL;
    {
        EACH(x, y) if (beats(x->f[ix], top[iy], true)) top[iy] = x->f[ix];
    }
    for (int64_t i = 0; i < y->n; i++)
        if (isinf(top[i])) top[i] = 0;
    EACH(x, y) sum[iy] += exp(x->f[ix] - top[iy]);
    *tops = top;
    return sum;
}

static int run_logsumexp(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    unsigned dims;
    bool keep = false;
    double *top;
    if (!x || dims_of(r, 1, x, &dims) || tb_garg_bool(r, 2, &keep)) return r->rc;
    if (!tb_gt_is_float(x->type)) x = tb_gt_cast(r, x, TB_GT_F32);
    struct tb_gtensor *y = x ? kept(r, x->type, x, dims) : NULL;
    double *sum = y ? exp_sums(r, x, y, &top) : NULL;
    if (!sum) return r->rc;
    for (int64_t i = 0; i < y->n; i++)
        y->f[i] = tb_ground(y->type, log(sum[i]) + top[i]);
    tb_gt_step(r, y, x, NULL, NULL, back_logsumexp);
    return tb_gout(r, out, finish(r, y, dims, keep));
}

/* c: the sums' shape; d: whether logarithms */
static int back_softmax(struct tb_grun *r, struct tb_gstep *s)
{
    struct tb_gtensor *y = s->out;
    double *g = tb_gt_grad(r, s->a), *sum = scratch(r, s->many[0]->n, 0);
    bool logs = s->d[0] != 0;
    if (!g || !sum) return r->rc;
    {
        EACH(y, s->many[0]) sum[iy] += y->g[ix] * (logs ? 1 : y->f[ix]);
    }
    {
        EACH(y, s->many[0])
        g[ix] += logs ? y->g[ix] - exp(y->f[ix]) * sum[iy] : y->f[ix] * (y->g[ix] - sum[iy]);
    }
    return 0;
}

struct tb_gtensor *tb_gt_softmax(struct tb_grun *r, struct tb_gtensor *x, int dim, bool logs)
{
    if (!x) return NULL;
    if (!tb_gt_is_float(x->type)) {
        tb_gfail(r, TB_EINVAL, "needs floats, not %s", tb_gtype_name(x->type));
        return NULL;
    }
    struct tb_gtensor *shape = kept(r, x->type, x, x->rank ? 1u << dim : 0);
    struct tb_gtensor *y = tb_gt_like(r, x->type, x);
    double *top, *sum = shape && y ? exp_sums(r, x, shape, &top) : NULL;
    if (!sum) return NULL;
    {
        EACH(x, shape)
        {
            double v = x->f[ix] - top[iy];
            y->f[ix] = tb_ground(y->type, logs ? v - log(sum[iy]) : exp(v) / sum[iy]);
        }
    }
    struct tb_gstep *s = tb_gt_step(r, y, x, NULL, NULL, back_softmax);
    if (s) {
        s->d[0] = logs;
        s->many = tb_galloc(r, 1, sizeof(struct tb_gtensor *));
        if (s->many) s->many[0] = shape;
    }
    return r->rc ? NULL : y;
}

/* input, dim, dtype; p: logarithms */
static int run_softmax(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    int dim = 0;
    if (!x) return r->rc;
    if (!tb_garg_given(r, 1)) return tb_gfail(r, TB_EINVAL, "needs dim");
    enum tb_gtype type = x->type;
    if (tb_garg_dim(r, 1, x->rank, &dim) || tb_garg_type(r, 2, &type)) return r->rc;
    return tb_gout(r, out, tb_gt_softmax(r, tb_gt_cast(r, x, type), dim, r->op->p != NULL));
}

/* p of rows that come in two kinds: anything but NULL is the second */
#define SECOND "2"

static const struct tb_gop ops[] = {
    {"torch.sum .sum", "input ?dim ?keepdim ?dtype !out", run_sum, NULL},
    {"torch.mean .mean", "input ?dim ?keepdim ?dtype !out", run_sum, SECOND},
    {"torch.count_nonzero .count_nonzero", "input ?dim", run_count_nonzero, NULL},
    {"torch.prod .prod", "input ?dim ?keepdim ?dtype", run_prod, NULL},
    {"torch.amax .amax", "input ?dim ?keepdim !out", run_extreme, SECOND},
    {"torch.amin .amin", "input ?dim ?keepdim !out", run_extreme, NULL},
    {"torch.max .max", "input ?dim ?keepdim ?other !out", run_max, SECOND},
    {"torch.min .min", "input ?dim ?keepdim ?other !out", run_max, NULL},
    {"torch.argmax .argmax", "input ?dim ?keepdim", run_argmax, SECOND},
    {"torch.argmin .argmin", "input ?dim ?keepdim", run_argmax, NULL},
    {"torch.any .any", "input ?dim ?keepdim !out", run_any, NULL},
    {"torch.all .all", "input ?dim ?keepdim !out", run_any, SECOND},
    {"torch.var .var", "input ?dim ?unbiased ?keepdim ?correction !out", run_var, NULL},
    {"torch.std .std", "input ?dim ?unbiased ?keepdim ?correction !out", run_var, SECOND},
    {"torch.functional.norm torch.norm .norm", "input ?p ?dim ?keepdim ?dtype !out", run_norm,
     NULL},
    {"torch._C._linalg.linalg_norm", "A ?ord ?dim ?keepdim ?dtype !out", run_norm, SECOND},
    {"torch._C._linalg.linalg_vector_norm", "x ?ord ?dim ?keepdim ?dtype !out", run_norm, NULL},
    {"torch.logsumexp torch._C._special.special_logsumexp .logsumexp", "input dim ?keepdim !out",
     run_logsumexp, NULL},
    {"torch.softmax torch.nn.functional.softmax torch._C._special.special_softmax .softmax",
     "input ?dim ?dtype ~_stacklevel", run_softmax, NULL},
    {"torch.log_softmax torch.nn.functional.log_softmax torch._C._special.special_log_softmax "
     ".log_softmax",
     "input ?dim ?dtype ~_stacklevel", run_softmax, SECOND},
};

const struct tb_gops tb_gops_reduce = {ops, (int)TB_ARRAY_LEN(ops)};
