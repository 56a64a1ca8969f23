/*
 * The arguments of the node being evaluated, as types, and its result.
 *
 * Owner: the run's arena. Thread: the run's.
 */
#include <math.h>
#include <string.h>

#include "model/custom/custom.h"

const char *tb_gkind_name(const struct tb_gvalue *v)
{
    switch (v->kind) {
    case TB_GV_ABSENT: return "nothing";
    case TB_GV_NONE: return "None";
    case TB_GV_BOOL: return "a bool";
    case TB_GV_INT: return "an int";
    case TB_GV_FLOAT: return "a float";
    case TB_GV_STR: return "a string";
    case TB_GV_LIST: return "a list";
    case TB_GV_SLICE: return "a slice";
    case TB_GV_ELLIPSIS: return "an ellipsis";
    case TB_GV_DTYPE: return "a dtype";
    case TB_GV_OTHER: return "a device or layout";
    case TB_GV_REF: return "a node";
    case TB_GV_TENSOR: return "a tensor";
    }
    return "nothing";
}

static int wrong(struct tb_grun *r, int i, const char *want)
{
    char name[32];
    return tb_gfail(r, TB_EINVAL, "%s must be %s, not %s", tb_gop_param(r->op, i, name), want,
                    tb_gkind_name(&r->args[i]));
}

bool tb_garg_given(const struct tb_grun *r, int i)
{
    return r->args[i].kind != TB_GV_ABSENT && r->args[i].kind != TB_GV_NONE;
}

bool tb_garg_is_tensor(const struct tb_grun *r, int i)
{
    return r->args[i].kind == TB_GV_TENSOR;
}

int tb_gvalue_int(struct tb_grun *r, const struct tb_gvalue *v, const char *what, int64_t *out)
{
    if (v->kind == TB_GV_INT)
        *out = v->i;
    else if (v->kind == TB_GV_BOOL)
        *out = v->b;
    else if (v->kind == TB_GV_TENSOR && v->t->n == 1 && !tb_gt_is_float(v->t->type))
        *out = v->t->i[0];
    else
        return tb_gfail(r, TB_EINVAL, "%s must be an integer, not %s", what, tb_gkind_name(v));
    return 0;
}

int tb_gvalue_double(struct tb_grun *r, const struct tb_gvalue *v, const char *what, double *out)
{
    if (v->kind == TB_GV_FLOAT)
        *out = v->f;
    else if (v->kind == TB_GV_INT)
        *out = (double)v->i;
    else if (v->kind == TB_GV_BOOL)
        *out = v->b;
    else if (v->kind == TB_GV_TENSOR && v->t->n == 1)
        *out = tb_gt_at(v->t, 0);
    else
        return tb_gfail(r, TB_EINVAL, "%s must be a number, not %s", what, tb_gkind_name(v));
    return 0;
}

int tb_garg_bool(struct tb_grun *r, int i, bool *out)
{
    const struct tb_gvalue *v = &r->args[i];
    if (!tb_garg_given(r, i)) return 0;
    if (v->kind == TB_GV_BOOL)
        *out = v->b;
    else if (v->kind == TB_GV_INT)
        *out = v->i != 0;
    else
        return wrong(r, i, "a bool");
    return 0;
}

int tb_garg_int(struct tb_grun *r, int i, int64_t *out)
{
    char name[32];
    if (!tb_garg_given(r, i)) return 0;
    return tb_gvalue_int(r, &r->args[i], tb_gop_param(r->op, i, name), out);
}

int tb_garg_double(struct tb_grun *r, int i, double *out)
{
    char name[32];
    if (!tb_garg_given(r, i)) return 0;
    return tb_gvalue_double(r, &r->args[i], tb_gop_param(r->op, i, name), out);
}

int tb_garg_str(struct tb_grun *r, int i, const char **out)
{
    if (!tb_garg_given(r, i)) return 0;
    if (r->args[i].kind != TB_GV_STR) return wrong(r, i, "a string");
    *out = r->args[i].s;
    return 0;
}

int tb_garg_type(struct tb_grun *r, int i, enum tb_gtype *out)
{
    if (!tb_garg_given(r, i)) return 0;
    if (r->args[i].kind != TB_GV_DTYPE) return wrong(r, i, "a dtype");
    *out = r->args[i].type;
    return 0;
}

int tb_garg_ints(struct tb_grun *r, int i, int max, int64_t *out, int *n)
{
    char name[32];
    const struct tb_gvalue *v = &r->args[i];
    *n = -1;
    if (!tb_garg_given(r, i)) return 0;
    tb_gop_param(r->op, i, name);
    if (v->kind == TB_GV_LIST && v->list.n == 1 &&
        (v->list.v[0].kind == TB_GV_LIST || v->list.v[0].kind == TB_GV_NONE))
        v = &v->list.v[0];
    if (v->kind == TB_GV_NONE) return 0;
    if (v->kind != TB_GV_LIST) {
        *n = 1;
        return tb_gvalue_int(r, v, name, out);
    }
    if (v->list.n > max)
        return tb_gfail(r, TB_EINVAL, "%s has %d entries; at most %d are supported", name,
                        v->list.n, max);
    int rc = 0;
    for (int k = 0; k < v->list.n && !rc; k++)
        rc = tb_gvalue_int(r, &v->list.v[k], name, &out[k]);
    *n = v->list.n;
    return rc;
}

int tb_gdim(struct tb_grun *r, int64_t dim, int rank, int *out)
{
    int n = rank ? rank : 1; /* a number has dimension 0 and -1 */
    if (dim < -n || dim >= n)
        return tb_gfail(r, TB_EINVAL, "dimension %lld is out of range for %d dimensions",
                        (long long)dim, rank);
    *out = (int)(dim < 0 ? dim + n : dim);
    return 0;
}

int tb_garg_dim(struct tb_grun *r, int i, int rank, int *dim)
{
    int64_t d = *dim;
    int rc = tb_garg_int(r, i, &d);
    return rc ? rc : tb_gdim(r, d, rank, dim);
}

struct tb_gtensor *tb_garg_tensor(struct tb_grun *r, int i)
{
    if (r->args[i].kind == TB_GV_TENSOR) return r->args[i].t;
    wrong(r, i, "a tensor");
    return NULL;
}

struct tb_gtensor *tb_garg_operand(struct tb_grun *r, int i)
{
    const struct tb_gvalue *v = &r->args[i];
    if (v->kind == TB_GV_TENSOR) return v->t;
    if (v->kind == TB_GV_FLOAT) return tb_gt_number(r, v->f);
    if (v->kind == TB_GV_INT) return tb_gt_int(r, v->i);
    if (v->kind == TB_GV_BOOL) {
        struct tb_gtensor *t = tb_gt_new(r, TB_GT_BOOL, 0, NULL);
        if (t) {
            t->i[0] = v->b;
            t->weak = true;
        }
        return t;
    }
    wrong(r, i, "a tensor or a number");
    return NULL;
}

int tb_gout(struct tb_grun *r, struct tb_gvalue *out, struct tb_gtensor *t)
{
    if (!t) return r->rc;
    *out = (struct tb_gvalue){.kind = TB_GV_TENSOR, .t = t};
    return 0;
}

int tb_gout_pair(struct tb_grun *r, struct tb_gvalue *out, struct tb_gtensor *values,
                 struct tb_gtensor *indices)
{
    struct tb_gvalue *v;
    if (!values || !indices || !(v = tb_galloc(r, 2, sizeof(*v)))) return r->rc;
    v[0] = (struct tb_gvalue){.kind = TB_GV_TENSOR, .t = values};
    v[1] = (struct tb_gvalue){.kind = TB_GV_TENSOR, .t = indices};
    *out = (struct tb_gvalue){.kind = TB_GV_LIST, .named = true};
    out->list.v = v;
    out->list.n = 2;
    return 0;
}

void tb_gout_int(struct tb_gvalue *out, int64_t v)
{
    *out = (struct tb_gvalue){.kind = TB_GV_INT, .i = v};
}

void tb_gout_bool(struct tb_gvalue *out, bool v)
{
    *out = (struct tb_gvalue){.kind = TB_GV_BOOL, .b = v};
}
