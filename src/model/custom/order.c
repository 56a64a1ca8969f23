/*
 * Operations along one dimension that keep it: running sums and products, sorting. See custom.h.
 *
 * Owner: the run's arena. Thread: the run's.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/custom/custom.h"
#include "util/mem.h"

struct tb_glanes tb_glanes_of(const struct tb_gtensor *x, int dim)
{
    struct tb_glanes l = {1, 1, 1};
    for (int d = 0; d < x->rank; d++) {
        if (d < dim) l.outer *= x->shape[d];
        if (d == dim) l.len = x->shape[d];
        if (d > dim) l.stride *= x->shape[d];
    }
    return l;
}

/* ---- running sums and products */

static int back_cumsum(struct tb_grun *r, struct tb_gstep *s)
{
    struct tb_glanes l = tb_glanes_of(s->a, (int)s->k[0]);
    double *g = tb_gt_grad(r, s->a);
    if (!g) return r->rc;
    for (int64_t o = 0; o < l.outer; o++)
        for (int64_t i = 0; i < l.stride; i++) {
            double sum = 0;
            for (int64_t k = l.len; k-- > 0;) {
                int64_t at = (o * l.len + k) * l.stride + i;
                g[at] += sum += s->out->g[at];
            }
        }
    return 0;
}

/* One lane: before the first zero all that follows counts, at it the products go on without it,
 * after it nothing does. */
static void back_cumprod_lane(const struct tb_gtensor *x, const struct tb_gtensor *y, double *g,
                              int64_t base, struct tb_glanes l)
{
    int64_t zero = 0;
    while (zero < l.len && x->f[base + zero * l.stride] != 0)
        zero++;
    double sum = 0;
    for (int64_t k = zero; k-- > 0;) {
        int64_t at = base + k * l.stride;
        sum += y->g[at] * y->f[at];
        g[at] += sum / x->f[at];
    }
    if (zero == l.len) return;
    double product = zero ? y->f[base + (zero - 1) * l.stride] : 1;
    sum = 0;
    for (int64_t k = zero; k < l.len; k++) {
        int64_t at = base + k * l.stride;
        if (k > zero) product *= x->f[at];
        sum += y->g[at] * product;
    }
    g[base + zero * l.stride] += sum;
}

static int back_cumprod(struct tb_grun *r, struct tb_gstep *s)
{
    struct tb_glanes l = tb_glanes_of(s->a, (int)s->k[0]);
    double *g = tb_gt_grad(r, s->a);
    if (!g) return r->rc;
    for (int64_t o = 0; o < l.outer; o++)
        for (int64_t i = 0; i < l.stride; i++)
            back_cumprod_lane(s->a, s->out, g, o * l.len * l.stride + i, l);
    return 0;
}

/* input, dim, dtype; p: products */
static int run_cum(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    int dim = 0;
    bool product = r->op->p != NULL;
    if (!x) return r->rc;
    enum tb_gtype type = tb_gt_is_float(x->type) ? x->type : TB_GT_INT;
    if (tb_garg_dim(r, 1, x->rank, &dim) || tb_garg_type(r, 2, &type)) return r->rc;
    x = tb_gt_cast(r, x, type);
    struct tb_gtensor *y = x ? tb_gt_like(r, type, x) : NULL;
    if (!y) return r->rc;
    struct tb_glanes l = tb_glanes_of(x, dim);
    for (int64_t o = 0; o < l.outer; o++)
        for (int64_t i = 0; i < l.stride; i++) {
            double f = product;
            uint64_t n = product;
            for (int64_t k = 0; k < l.len; k++) {
                int64_t at = (o * l.len + k) * l.stride + i;
                if (tb_gt_is_float(type)) {
                    f = product ? f * x->f[at] : f + x->f[at];
                    y->f[at] = tb_ground(type, f);
                } else {
                    n = product ? n * (uint64_t)x->i[at] : n + (uint64_t)x->i[at];
                    y->i[at] = (int64_t)n;
                }
            }
        }
    struct tb_gstep *s = tb_gt_step(r, y, x, NULL, NULL, product ? back_cumprod : back_cumsum);
    if (s) s->k[0] = dim;
    return tb_gout(r, out, r->rc ? NULL : y);
}

/* ---- order */

struct order {
    const struct tb_gtensor *x;
    int64_t base, stride;
    bool down;
};

static int compare(const void *pa, const void *pb, void *ctx)
{
    const struct order *o = ctx;
    int32_t a = *(const int32_t *)pa, b = *(const int32_t *)pb;
    int64_t ia = o->base + a * o->stride, ib = o->base + b * o->stride;
    int c;
    if (tb_gt_is_float(o->x->type)) {
        double va = o->x->f[ia], vb = o->x->f[ib];
        c = isnan(va) || isnan(vb) ? (int)isnan(va) - (int)isnan(vb) : (va > vb) - (va < vb);
    } else {
        c = (o->x->i[ia] > o->x->i[ib]) - (o->x->i[ia] < o->x->i[ib]);
    }
    if (o->down) c = -c;
    return c ? c : (a > b) - (a < b); /* stable */
}

/* The first k elements along dim in order. */
static int sorted(struct tb_grun *r, struct tb_gtensor *x, int dim, int64_t k, bool down,
                  struct tb_gtensor **values, struct tb_gtensor **indices)
{
    struct tb_glanes l = tb_glanes_of(x, dim);
    int64_t shape[TB_G_RANK] = {0};
    memcpy(shape, x->shape, sizeof(shape));
    if (k < 0 || k > l.len)
        return tb_gfail(r, TB_EINVAL, "k is %lld of %lld elements", (long long)k, (long long)l.len);
    if (x->rank) shape[dim] = k;
    struct tb_gtensor *at = tb_gt_new(r, TB_GT_INT, x->rank, shape);
    int32_t *map = at ? tb_galloc(r, at->n, sizeof(*map)) : NULL;
    int32_t *lane = tb_galloc(r, l.len, sizeof(*lane));
    if (!map || !lane || tb_gwork(r, 32 * x->n)) return r->rc;
    for (int64_t o = 0; o < l.outer; o++)
        for (int64_t i = 0; i < l.stride; i++) {
            struct order ord = {x, o * l.len * l.stride + i, l.stride, down};
            for (int64_t j = 0; j < l.len; j++)
                lane[j] = (int32_t)j;
            qsort_r(lane, (size_t)l.len, sizeof(*lane), compare, &ord);
            for (int64_t j = 0; j < k; j++) {
                int64_t to = (o * k + j) * l.stride + i;
                at->i[to] = lane[j];
                map[to] = (int32_t)(ord.base + lane[j] * l.stride);
            }
        }
    *indices = at;
    *values = tb_gt_pick(r, x, x->rank, shape, map, 0);
    return r->rc;
}

/* input, dim, descending; p: indices only */
static int run_sort(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0), *values, *indices;
    int dim = -1;
    bool down = false;
    if (!x || tb_garg_bool(r, 2, &down)) return r->rc;
    int64_t d = -1;
    if (tb_garg_int(r, 1, &d) || tb_gdim(r, d, x->rank, &dim)) return r->rc;
    if (sorted(r, x, dim, tb_glanes_of(x, dim).len, down, &values, &indices)) return r->rc;
    return r->op->p ? tb_gout(r, out, indices) : tb_gout_pair(r, out, values, indices);
}

/* input, k, dim, largest */
static int run_topk(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0), *values, *indices;
    int64_t k = 0, d = -1;
    int dim;
    bool largest = true;
    if (!x || tb_garg_int(r, 1, &k) || tb_garg_int(r, 2, &d) || tb_gdim(r, d, x->rank, &dim) ||
        tb_garg_bool(r, 3, &largest) || sorted(r, x, dim, k, largest, &values, &indices))
        return r->rc;
    return tb_gout_pair(r, out, values, indices);
}

#define SECOND "2" /* the other kind of a row, as in reduce.c */

static const struct tb_gop ops[] = {
    {"torch.cumsum .cumsum", "input dim ?dtype !out", run_cum, NULL},
    {"torch.cumprod .cumprod", "input dim ?dtype !out", run_cum, SECOND},
    {"torch.sort .sort", "input ?dim ?descending ~stable", run_sort, NULL},
    {"torch.argsort .argsort", "input ?dim ?descending ~stable", run_sort, SECOND},
    {"torch.topk .topk", "input k ?dim ?largest ~sorted", run_topk, NULL},
};

const struct tb_gops tb_gops_order = {ops, (int)TB_ARRAY_LEN(ops)};
