/*
 * Operations that make tensors: casts and copies, constants, ranges, one-hot, and joining. See
 * custom.h.
 *
 * Owner: the run's arena. Thread: the run's.
 */
#include <math.h>
#include <string.h>

#include "model/custom/custom.h"
#include "util/mem.h"

/* ---- casts and copies */

static int run_same(struct tb_grun *r, struct tb_gvalue *out)
{
    return tb_gout(r, out, tb_garg_tensor(r, 0));
}

static int run_detach(struct tb_grun *r, struct tb_gvalue *out)
{
    return tb_gout(r, out, tb_gt_detach(r, tb_garg_tensor(r, 0)));
}

/* p: the type */
static int run_cast(struct tb_grun *r, struct tb_gvalue *out)
{
    return tb_gout(r, out, tb_gt_cast(r, tb_garg_tensor(r, 0), *(const enum tb_gtype *)r->op->p));
}

static int run_type_as(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0), *y = x ? tb_garg_tensor(r, 1) : NULL;
    return y ? tb_gout(r, out, tb_gt_cast(r, x, y->type)) : r->rc;
}

/* input, dtype, then a dtype, a device or another tensor, in any order */
static int run_to(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    if (!x) return r->rc;
    enum tb_gtype type = x->type;
    const struct tb_gvalue *list = &r->args[1];
    for (int i = 0; list->kind == TB_GV_LIST && i < list->list.n; i++) {
        const struct tb_gvalue *v = &list->list.v[i];
        if (v->kind == TB_GV_DTYPE)
            type = v->type;
        else if (v->kind == TB_GV_TENSOR)
            type = v->t->type;
        else if (v->kind != TB_GV_OTHER && v->kind != TB_GV_STR && v->kind != TB_GV_BOOL &&
                 v->kind != TB_GV_NONE)
            return tb_gfail(r, TB_EINVAL, "cannot convert to %s", tb_gkind_name(v));
    }
    if (tb_garg_type(r, 2, &type)) return r->rc;
    return tb_gout(r, out, tb_gt_cast(r, x, type));
}

/* ---- constants */

static const double zero = 0, one = 1;

/* input, fill (for *full), dtype; p: the value, NULL: the argument's */
static int run_like(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    double v = r->op->p ? *(const double *)r->op->p : 0;
    int arg = r->op->p ? 1 : 2;
    if (!x || (!r->op->p && tb_garg_double(r, 1, &v))) return r->rc;
    enum tb_gtype type = x->type;
    if (tb_garg_type(r, arg, &type)) return r->rc;
    struct tb_gtensor *y = tb_gt_like(r, type, x);
    if (y) tb_gt_fill(y, v);
    return tb_gout(r, out, y);
}

static int filled(struct tb_grun *r, int size_arg, int type_arg, enum tb_gtype type, double v,
                  struct tb_gvalue *out)
{
    int64_t shape[TB_G_RANK];
    int n;
    if (tb_garg_ints(r, size_arg, TB_G_RANK, shape, &n) || tb_garg_type(r, type_arg, &type))
        return r->rc;
    struct tb_gtensor *y = tb_gt_new(r, type, TB_MAX(n, 0), shape);
    if (y) tb_gt_fill(y, v);
    return tb_gout(r, out, y);
}

/* x.new_zeros(size, dtype) */
static int run_new(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    return x ? filled(r, 1, 2, x->type, *(const double *)r->op->p, out) : r->rc;
}

static int run_new_full(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    double v = 0;
    if (!x || tb_garg_double(r, 2, &v)) return r->rc;
    return filled(r, 1, 3, x->type, v, out);
}

static int run_zeros(struct tb_grun *r, struct tb_gvalue *out)
{
    return filled(r, 0, 1, TB_GT_F32, *(const double *)r->op->p, out);
}

static int run_full(struct tb_grun *r, struct tb_gvalue *out)
{
    double v = 0;
    if (tb_garg_double(r, 1, &v)) return r->rc;
    enum tb_gtype type = r->args[1].kind == TB_GV_INT    ? TB_GT_INT
                         : r->args[1].kind == TB_GV_BOOL ? TB_GT_BOOL
                                                         : TB_GT_F32;
    return filled(r, 0, 2, type, v, out);
}

/* arange(end), arange(start, end), arange(start, end, step) */
static int run_arange(struct tb_grun *r, struct tb_gvalue *out)
{
    double v[3] = {0, 0, 1};
    enum tb_gtype type = TB_GT_INT;
    for (int i = 0; i < 3; i++) {
        if (tb_garg_double(r, i, &v[i])) return r->rc;
        if (r->args[i].kind == TB_GV_FLOAT) type = TB_GT_F32;
    }
    if (!tb_garg_given(r, 1)) {
        v[1] = v[0];
        v[0] = 0;
    }
    if (tb_garg_type(r, 3, &type)) return r->rc;
    double n = ceil((v[1] - v[0]) / v[2]);
    if (!(n >= 0 && n < 1e9) || v[2] == 0)
        return tb_gfail(r, TB_EINVAL, "the bounds and the step do not fit");
    int64_t shape[1] = {(int64_t)n};
    struct tb_gtensor *y = tb_gt_new(r, type, 1, shape);
    for (int64_t i = 0; y && i < y->n; i++) {
        double at = v[0] + (double)i * v[2];
        if (tb_gt_is_float(type))
            y->f[i] = tb_ground(type, at);
        else
            y->i[i] = type == TB_GT_BOOL ? at != 0 : tb_gto_int(at);
    }
    return tb_gout(r, out, y);
}

static int run_one_hot(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    int64_t n = -1, most = -1, shape[TB_G_RANK + 1];
    if (!x || tb_garg_int(r, 1, &n)) return r->rc;
    if (x->type != TB_GT_INT) return tb_gfail(r, TB_EINVAL, "needs int64");
    for (int64_t i = 0; i < x->n; i++) {
        if (x->i[i] < 0) return tb_gfail(r, TB_EINVAL, "class values must not be negative");
        most = TB_MAX(most, x->i[i]);
    }
    if (n < 0) n = most == INT64_MAX ? most : most + 1;
    if (most >= n) return tb_gfail(r, TB_EINVAL, "a class value is not below num_classes");
    memcpy(shape, x->shape, sizeof(x->shape));
    shape[x->rank] = n;
    struct tb_gtensor *y = tb_gt_new(r, TB_GT_INT, x->rank + 1, shape);
    if (!y) return r->rc;
    memset(y->i, 0, (size_t)y->n * sizeof(*y->i));
    for (int64_t i = 0; i < x->n; i++)
        y->i[i * n + x->i[i]] = 1;
    return tb_gout(r, out, y);
}

/* ---- joining */

struct join {
    int n;
    struct tb_gtensor **t;
    int dim;
    enum tb_gtype type;
};

static int join_args(struct tb_grun *r, struct join *j)
{
    const struct tb_gvalue *v = &r->args[0];
    const struct tb_gtensor **all;
    if (v->kind != TB_GV_LIST || v->list.n < 1)
        return tb_gfail(r, TB_EINVAL, "needs a list of tensors");
    j->n = v->list.n;
    j->t = tb_galloc(r, j->n, sizeof(*j->t));
    all = tb_galloc(r, j->n, sizeof(*all));
    if (!j->t || !all) return r->rc;
    for (int i = 0; i < j->n; i++) {
        if (v->list.v[i].kind != TB_GV_TENSOR)
            return tb_gfail(r, TB_EINVAL, "needs a list of tensors, not of %s",
                            tb_gkind_name(&v->list.v[i]));
        all[i] = j->t[i] = v->list.v[i].t;
    }
    j->type = tb_gt_promote(all, j->n);
    return 0;
}

/* Copies between the parts and the whole, row by row; back: the derivatives, adding. */
static void copy_parts(struct tb_gtensor *const *t, int n, int dim, struct tb_gtensor *y, bool back)
{
    int64_t outer = 1, inner = 1, from = 0;
    for (int d = 0; d < y->rank; d++) {
        if (d < dim) outer *= y->shape[d];
        if (d > dim) inner *= y->shape[d];
    }
    for (int i = 0; i < n; i++) {
        int64_t len = t[i]->shape[dim] * inner;
        for (int64_t o = 0; o < outer; o++) {
            int64_t a = o * len, b = o * y->shape[dim] * inner + from;
            if (!back) memcpy(y->i + b, t[i]->i + a, (size_t)len * sizeof(*y->i));
            for (int64_t k = 0; back && t[i]->g && k < len; k++)
                t[i]->g[a + k] += y->g[b + k];
        }
        from += len;
    }
}

static int back_cat(struct tb_grun *r, struct tb_gstep *s)
{
    for (int64_t i = 0; i < s->k[1]; i++)
        if (s->many[i]->needs && !tb_gt_grad(r, s->many[i])) return r->rc;
    copy_parts(s->many, (int)s->k[1], (int)s->k[0], s->out, true);
    return 0;
}

static struct tb_gtensor *join(struct tb_grun *r, const struct join *j)
{
    int64_t shape[TB_G_RANK];
    struct tb_gtensor *any = NULL;
    memcpy(shape, j->t[0]->shape, sizeof(shape));
    for (int i = 0; i < j->n; i++) {
        if (!(j->t[i] = tb_gt_cast(r, j->t[i], j->type))) return NULL;
        bool fits = j->t[i]->rank == j->t[0]->rank && j->t[0]->rank > 0;
        for (int d = 0; d < j->t[0]->rank && fits; d++)
            fits = d == j->dim || j->t[i]->shape[d] == shape[d];
        if (!fits ||
            (i && __builtin_add_overflow(shape[j->dim], j->t[i]->shape[j->dim], &shape[j->dim]))) {
            char a[96], b[96];
            tb_gfail(r, TB_EINVAL, "shapes %s and %s cannot be joined", tb_gshape(j->t[0], a),
                     tb_gshape(j->t[i], b));
            return NULL;
        }
        if (j->t[i]->needs) any = j->t[i];
    }
    struct tb_gtensor *y = tb_gt_new(r, j->type, j->t[0]->rank, shape);
    if (!y) return NULL;
    copy_parts(j->t, j->n, j->dim, y, false);
    struct tb_gstep *s = tb_gt_step(r, y, any, NULL, NULL, back_cat);
    if (s) {
        s->many = j->t;
        s->k[0] = j->dim;
        s->k[1] = j->n;
    }
    return r->rc ? NULL : y;
}

static int run_cat(struct tb_grun *r, struct tb_gvalue *out)
{
    struct join j = {0};
    if (join_args(r, &j) || tb_garg_dim(r, 1, j.t[0]->rank, &j.dim)) return r->rc;
    return tb_gout(r, out, join(r, &j));
}

static int run_stack(struct tb_grun *r, struct tb_gvalue *out)
{
    struct join j = {0};
    if (join_args(r, &j)) return r->rc;
    if (tb_garg_dim(r, 1, j.t[0]->rank + 1, &j.dim)) return r->rc;
    for (int i = 0; i < j.n; i++) {
        int64_t shape[TB_G_RANK + 1];
        struct tb_gtensor *t = j.t[i];
        for (int d = 0, k = 0; d <= t->rank; d++)
            shape[d] = d == TB_MIN(j.dim, t->rank) ? 1 : t->shape[k++];
        if (!(j.t[i] = tb_gt_view(r, t, t->rank + 1, shape))) return r->rc;
    }
    return tb_gout(r, out, join(r, &j));
}

static const enum tb_gtype to_f32 = TB_GT_F32, to_f64 = TB_GT_F64, to_int = TB_GT_INT,
                           to_bool = TB_GT_BOOL;

#define MADE "?dtype ~device ~layout ~pin_memory !requires_grad ~memory_format !out"

static const struct tb_gop ops[] = {
    {".contiguous torch.clone .clone .cpu", "input ~memory_format", run_same, NULL},
    {"operator.pos torch.positive .positive", "input", run_same, NULL},
    {"torch.detach .detach", "input", run_detach, NULL},
    {".float", "input ~memory_format", run_cast, &to_f32},
    {".double", "input ~memory_format", run_cast, &to_f64},
    {".int .long", "input ~memory_format", run_cast, &to_int},
    {".bool", "input ~memory_format", run_cast, &to_bool},
    {".type_as", "input other", run_type_as, NULL},
    {".to", "input *other ?dtype ~device ~non_blocking ~copy ~memory_format", run_to, NULL},
    {"torch.ones_like", "input " MADE, run_like, &one},
    {"torch.zeros_like", "input " MADE, run_like, &zero},
    {"torch.full_like", "input fill_value " MADE, run_like, NULL},
    {".new_zeros", "input *size " MADE, run_new, &zero},
    {".new_ones", "input *size " MADE, run_new, &one},
    {".new_full", "input size fill_value " MADE, run_new_full, NULL},
    {"torch.zeros", "*size " MADE, run_zeros, &zero},
    {"torch.ones", "*size " MADE, run_zeros, &one},
    {"torch.full", "size fill_value " MADE, run_full, NULL},
    {"torch.arange", "start ?end ?step " MADE, run_arange, NULL},
    {"torch._C._nn.one_hot torch.nn.functional.one_hot", "tensor ?num_classes", run_one_hot, NULL},
    {"torch.cat torch.concat torch.concatenate", "tensors ?dim !out", run_cat, NULL},
    {"torch.stack", "tensors ?dim !out", run_stack, NULL},
};

const struct tb_gops tb_gops_make = {ops, (int)TB_ARRAY_LEN(ops)};
