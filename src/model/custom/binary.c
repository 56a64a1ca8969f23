/*
 * Elementwise operations of two tensors, which broadcast: the table of functions with their
 * derivatives, selection by a condition, and the operations made of them. See custom.h.
 *
 * Owner: the run's arena. Thread: the run's.
 */
#include <math.h>
#include <string.h>

#include "model/custom/custom.h"
#include "util/mem.h"

enum {
    TO_BOOL = 1,  /* the result is bool */
    TO_FLOAT = 2, /* integers become float32 */
    NO_FLOAT = 4, /* floats are refused */
    NO_BOOL = 8,  /* bools are refused */
    BOOLS = 16,   /* bools stay bools, else they become int64 */
    LOGICAL = 32, /* operands become bools */
    SELECT = 64,  /* where the derivative is zero nothing flows, not even a NaN */
    LAZY = 128,   /* where the derivative of the result is zero nothing flows */
};

/* ---- functions: value of a and b, derivatives; y is the rounded value, p a parameter */

static double fmod_py(double a, double b)
{
    double m = fmod(a, b);
    return m != 0 && (b < 0) != (m < 0) ? m + b : m;
}
/* As Python: exact remainder first, so that it agrees with %. */
static double floordiv(double a, double b)
{
    if (b == 0) return a / b;
    double m = fmod(a, b), d = (a - m) / b;
    if (m != 0 && (b < 0) != (m < 0)) d -= 1;
    double f = floor(d);
    return d == 0 ? copysign(0, a / b) : d - f > 0.5 ? f + 1 : f;
}
static double power(double a, double b)
{
    return b == 2 ? a * a : b == 1 ? a : pow(a, b);
}
static double logaddexp(double a, double b)
{
    if (isinf(a) && a == b) return a;
    double m = fmax(a, b);
    return isnan(a) || isnan(b) ? a + b : m + log1p(exp(-fabs(a - b)));
}
static double lower(double a, double b)
{
    return isnan(a) ? a : isnan(b) ? b : a < b ? a : b;
}
static double higher(double a, double b)
{
    return isnan(a) ? a : isnan(b) ? b : a > b ? a : b;
}
static double clamp_to(double x, double lo, double hi)
{
    return x < lo ? lo : x > hi ? hi : x;
}
static double huber(double d, double delta)
{
    return d <= delta ? 0.5 * d * d : delta * (d - 0.5 * delta);
}
static double smooth_l1(double d, double beta)
{
    return d < beta ? 0.5 * d * d / beta : d - 0.5 * beta;
}
static double smooth_slope(double d, double beta)
{
    return fabs(d) < beta ? d / beta : tb_gsign(d);
}

#define FN2(name, value, slope_a, slope_b)                                                         \
    static double b_##name(double a, double b, double p)                                           \
    {                                                                                              \
        return value;                                                                              \
    }                                                                                              \
    static double da_##name(double a, double b, double y, double p)                                \
    {                                                                                              \
        return slope_a;                                                                            \
    }                                                                                              \
    static double db_##name(double a, double b, double y, double p)                                \
    {                                                                                              \
        return slope_b;                                                                            \
    }

FN2(add, a + b, 1, 1)
FN2(sub, a - b, 1, -1)
FN2(mul, a *b, b, a)
FN2(div, a / b, 1 / b, -(a / b) / b)
FN2(floordiv, floordiv(a, b), 0, 0)
FN2(mod, fmod_py(a, b), 1, -floor(a / b))
FN2(fmod, fmod(a, b), 1, -trunc(a / b))
FN2(pow, power(a, b), b == 0 ? 0 : b * power(a, b - 1), a == 0 && b >= 0 ? 0 : y * log(a))
FN2(min, lower(a, b), a == b ? 0.5 : !(a > b), a == b ? 0.5 : !(b > a))
FN2(max, higher(a, b), a == b ? 0.5 : !(a < b), a == b ? 0.5 : !(b < a))
FN2(clamp_min, isnan(b) || a < b ? b : a, !(isnan(b) || a < b), isnan(b) || a < b)
FN2(clamp_max, isnan(b) || a > b ? b : a, !(isnan(b) || a > b), isnan(b) || a > b)
FN2(atan2, atan2(a, b), b / (a * a + b * b), -a / (a * a + b * b))
FN2(hypot, hypot(a, b), y == 0 ? 0 : a / y, y == 0 ? 0 : b / y)
FN2(logaddexp, logaddexp(a, b), tb_gsigmoid(a - b), tb_gsigmoid(b - a))
FN2(xlogy, isnan(b) ? b : a == 0 ? 0 : a * log(b), a == 0 && b <= 0 ? 0 : log(b), a / b)
FN2(gt, a > b, 0, 0)
FN2(ge, a >= b, 0, 0)
FN2(lt, a < b, 0, 0)
FN2(le, a <= b, 0, 0)
FN2(eq, a == b, 0, 0)
FN2(ne, a != b, 0, 0)
FN2(land, a != 0 && b != 0, 0, 0)
FN2(lor, a != 0 || b != 0, 0, 0)
FN2(lxor, (a != 0) != (b != 0), 0, 0)
FN2(sq_diff, (a - b) * (a - b), 2 * (a - b), -2 * (a - b))
FN2(abs_diff, fabs(a - b), tb_gsign(a - b), -tb_gsign(a - b))
FN2(huber, huber(fabs(a - b), p), clamp_to(a - b, -p, p), -clamp_to(a - b, -p, p))
FN2(smooth_l1, smooth_l1(fabs(a - b), p), smooth_slope(a - b, p), -smooth_slope(a - b, p))
FN2(bce, (b - 1) * fmax(log1p(-a), -100) - b * fmax(log(a), -100),
    (a - b) / fmax((1 - a) * a, 1e-12), log1p(-a) - log(a))

struct binary {
    double (*f)(double a, double b, double p);
    double (*da)(double a, double b, double y, double p);
    double (*db)(double a, double b, double y, double p);
    unsigned flags;
};

#define ROW2(id, name, fl) [TB_GB_##id] = {b_##name, da_##name, db_##name, fl}
static const struct binary binaries[TB_GB_N] = {
    ROW2(ADD, add, BOOLS),
    ROW2(SUB, sub, NO_BOOL),
    ROW2(MUL, mul, BOOLS),
    ROW2(DIV, div, TO_FLOAT),
    ROW2(FLOORDIV, floordiv, 0),
    ROW2(MOD, mod, 0),
    ROW2(POW, pow, 0),
    ROW2(GT, gt, TO_BOOL),
    ROW2(GE, ge, TO_BOOL),
    ROW2(LT, lt, TO_BOOL),
    ROW2(LE, le, TO_BOOL),
    ROW2(EQ, eq, TO_BOOL),
    ROW2(NE, ne, TO_BOOL),
    ROW2(AND, land, NO_FLOAT | BOOLS),
    ROW2(OR, lor, NO_FLOAT | BOOLS),
    ROW2(XOR, lxor, NO_FLOAT | BOOLS),
    ROW2(FMOD, fmod, 0),
    ROW2(MIN, min, BOOLS | SELECT),
    ROW2(MAX, max, BOOLS | SELECT),
    ROW2(CLAMP_MIN, clamp_min, SELECT),
    ROW2(CLAMP_MAX, clamp_max, SELECT),
    ROW2(ATAN2, atan2, TO_FLOAT),
    ROW2(HYPOT, hypot, TO_FLOAT),
    ROW2(LOGADDEXP, logaddexp, TO_FLOAT),
    ROW2(XLOGY, xlogy, TO_FLOAT | LAZY),
    ROW2(LAND, land, TO_BOOL | LOGICAL),
    ROW2(LOR, lor, TO_BOOL | LOGICAL),
    ROW2(LXOR, lxor, TO_BOOL | LOGICAL),
    ROW2(SQ_DIFF, sq_diff, TO_FLOAT),
    ROW2(ABS_DIFF, abs_diff, TO_FLOAT),
    ROW2(HUBER, huber, TO_FLOAT),
    ROW2(SMOOTH_L1, smooth_l1, TO_FLOAT),
    ROW2(BCE, bce, TO_FLOAT),
};

static int64_t int_pow(int64_t a, int64_t b)
{
    uint64_t y = 1, x = (uint64_t)a;
    for (; b > 0; b >>= 1, x *= x)
        if (b & 1) y *= x;
    return (int64_t)y;
}

/* Integers wrap as in C with -fwrapv; false: a division by zero or a negative power. */
static bool int_binary(enum tb_gbinary k, int64_t a, int64_t b, int64_t *y)
{
    uint64_t ua = (uint64_t)a, ub = (uint64_t)b;
    switch (k) {
    case TB_GB_ADD: *y = (int64_t)(ua + ub); return true;
    case TB_GB_SUB: *y = (int64_t)(ua - ub); return true;
    case TB_GB_MUL: *y = (int64_t)(ua * ub); return true;
    case TB_GB_FLOORDIV:
    case TB_GB_MOD:
    case TB_GB_FMOD: {
        if (b == 0) return false;
        int64_t q = b == -1 ? (int64_t)(0 - ua) : a / b, m = b == -1 ? 0 : a % b;
        bool down = m != 0 && (b < 0) != (m < 0);
        *y = k == TB_GB_FMOD ? m : k == TB_GB_MOD ? (down ? m + b : m) : down ? q - 1 : q;
        return true;
    }
    case TB_GB_POW:
        if (b < 0) return false;
        *y = int_pow(a, b);
        return true;
    case TB_GB_GT: *y = a > b; return true;
    case TB_GB_GE: *y = a >= b; return true;
    case TB_GB_LT: *y = a < b; return true;
    case TB_GB_LE: *y = a <= b; return true;
    case TB_GB_EQ: *y = a == b; return true;
    case TB_GB_NE: *y = a != b; return true;
    case TB_GB_AND: *y = a & b; return true;
    case TB_GB_OR: *y = a | b; return true;
    case TB_GB_XOR: *y = a ^ b; return true;
    case TB_GB_MIN:
    case TB_GB_CLAMP_MAX: *y = a < b ? a : b; return true;
    case TB_GB_MAX:
    case TB_GB_CLAMP_MIN: *y = a > b ? a : b; return true;
    default: *y = binaries[k].f((double)a, (double)b, 0) != 0; return true; /* logical */
    }
}

static int back_binary(struct tb_grun *r, struct tb_gstep *s)
{
    const struct binary *f = s->p;
    struct tb_gtensor *a = s->a, *b = s->b, *y = s->out;
    int64_t st[3][TB_G_RANK];
    struct tb_gwalk w;
    if (f == &binaries[TB_GB_FLOORDIV] && s->d[0] == 0)
        return tb_gfail(r, TB_EINVAL, "has no derivative; detach its operands");
    double *ga = a->needs ? tb_gt_grad(r, a) : NULL;
    double *gb = b->needs ? tb_gt_grad(r, b) : NULL;
    if (r->rc || tb_gwork(r, y->n)) return r->rc;
    bool select = f->flags & SELECT;
    tb_gt_strides(y, y->rank, st[0]);
    tb_gt_strides(a, y->rank, st[1]);
    tb_gt_strides(b, y->rank, st[2]);
    for (tb_gwalk_init(&w, y->rank, y->shape, 3, st); w.left > 0; tb_gwalk_next(&w))
        for (int64_t j = 0; j < w.len; j++) {
            int64_t i = w.at[0] + j * w.in[0], ia = w.at[1] + j * w.in[1],
                    ib = w.at[2] + j * w.in[2];
            double d;
            if (y->g[i] == 0 && (f->flags & LAZY)) continue;
            if (ga && ((d = f->da(a->f[ia], b->f[ib], y->f[i], s->d[0])) != 0 || !select))
                ga[ia] += y->g[i] * d;
            if (gb && ((d = f->db(a->f[ia], b->f[ib], y->f[i], s->d[0])) != 0 || !select))
                gb[ib] += y->g[i] * d;
        }
    return 0;
}

static int types_of(struct tb_grun *r, enum tb_gbinary k, const struct tb_gtensor *const *ab,
                    enum tb_gtype *type)
{
    unsigned flags = binaries[k].flags;
    *type = tb_gt_promote(ab, 2);
    if (flags & LOGICAL) *type = TB_GT_BOOL;
    if ((flags & NO_FLOAT) && tb_gt_is_float(*type))
        return tb_gfail(r, TB_EINVAL, "is not defined for floats");
    if ((flags & NO_BOOL) && *type == TB_GT_BOOL)
        return tb_gfail(r, TB_EINVAL, "is not defined for bool tensors");
    if ((flags & TO_FLOAT) && !tb_gt_is_float(*type)) *type = TB_GT_F32;
    if (*type == TB_GT_BOOL && !(flags & (BOOLS | LOGICAL | TO_BOOL))) *type = TB_GT_INT;
    return 0;
}

struct tb_gtensor *tb_gt_binary(struct tb_grun *r, enum tb_gbinary k, struct tb_gtensor *a,
                                struct tb_gtensor *b, double param)
{
    const struct binary *f = &binaries[k];
    const struct tb_gtensor *ab[] = {a, b};
    int64_t shape[TB_G_RANK], st[3][TB_G_RANK];
    int rank;
    enum tb_gtype type;
    struct tb_gwalk w;
    if (!a || !b || types_of(r, k, ab, &type) || tb_gt_broadcast(r, ab, 2, &rank, shape))
        return NULL;
    a = tb_gt_cast(r, a, type);
    b = tb_gt_cast(r, b, type);
    if (!a || !b) return NULL;
    struct tb_gtensor *y = tb_gt_new(r, (f->flags & TO_BOOL) ? TB_GT_BOOL : type, rank, shape);
    if (!y) return NULL;
    bool floats = tb_gt_is_float(type), ok = true;
    tb_gt_strides(y, rank, st[0]);
    tb_gt_strides(a, rank, st[1]);
    tb_gt_strides(b, rank, st[2]);
    for (tb_gwalk_init(&w, rank, shape, 3, st); w.left > 0; tb_gwalk_next(&w))
        for (int64_t j = 0; j < w.len; j++) {
            int64_t i = w.at[0] + j * w.in[0], ia = w.at[1] + j * w.in[1],
                    ib = w.at[2] + j * w.in[2];
            if (!floats) {
                ok &= int_binary(k, a->i[ia], b->i[ib], &y->i[i]);
                if (y->type == TB_GT_BOOL) y->i[i] = y->i[i] != 0;
            } else if (f->flags & TO_BOOL) {
                y->i[i] = f->f(a->f[ia], b->f[ib], param) != 0;
            } else {
                y->f[i] = tb_ground(type, f->f(a->f[ia], b->f[ib], param));
            }
        }
    if (!ok) {
        tb_gfail(r, TB_EINVAL,
                 k == TB_GB_POW ? "an integer to a negative power" : "an integer division by zero");
        return NULL;
    }
    struct tb_gstep *s = tb_gt_step(r, y, a, b, NULL, back_binary);
    if (s) {
        s->p = f;
        s->d[0] = param;
    }
    return r->rc ? NULL : y;
}

/* ---- where */

static int back_where(struct tb_grun *r, struct tb_gstep *s)
{
    struct tb_gtensor *y = s->out, *a = s->a, *b = s->b;
    int64_t st[4][TB_G_RANK];
    struct tb_gwalk w;
    double *ga = a->needs ? tb_gt_grad(r, a) : NULL;
    double *gb = b->needs ? tb_gt_grad(r, b) : NULL;
    if (r->rc) return r->rc;
    tb_gt_strides(y, y->rank, st[0]);
    tb_gt_strides(a, y->rank, st[1]);
    tb_gt_strides(b, y->rank, st[2]);
    tb_gt_strides(s->c, y->rank, st[3]);
    for (tb_gwalk_init(&w, y->rank, y->shape, 4, st); w.left > 0; tb_gwalk_next(&w))
        for (int64_t j = 0; j < w.len; j++) {
            double g = y->g[w.at[0] + j * w.in[0]];
            bool first = s->c->i[w.at[3] + j * w.in[3]] != 0;
            if (first && ga) ga[w.at[1] + j * w.in[1]] += g;
            if (!first && gb) gb[w.at[2] + j * w.in[2]] += g;
        }
    return 0;
}

struct tb_gtensor *tb_gt_where(struct tb_grun *r, struct tb_gtensor *c, struct tb_gtensor *a,
                               struct tb_gtensor *b, enum tb_gtype type)
{
    const struct tb_gtensor *all[] = {a, b, c};
    int64_t shape[TB_G_RANK], st[4][TB_G_RANK];
    int rank;
    struct tb_gwalk w;
    if (!a || !b || !c) return NULL;
    if (c->type != TB_GT_BOOL) {
        tb_gfail(r, TB_EINVAL, "its condition must be a bool tensor, not %s",
                 tb_gtype_name(c->type));
        return NULL;
    }
    if (tb_gt_broadcast(r, all, 3, &rank, shape)) return NULL;
    a = tb_gt_cast(r, a, type);
    b = tb_gt_cast(r, b, type);
    struct tb_gtensor *y = a && b ? tb_gt_new(r, type, rank, shape) : NULL;
    if (!y) return NULL;
    tb_gt_strides(y, rank, st[0]);
    tb_gt_strides(a, rank, st[1]);
    tb_gt_strides(b, rank, st[2]);
    tb_gt_strides(c, rank, st[3]);
    for (tb_gwalk_init(&w, rank, shape, 4, st); w.left > 0; tb_gwalk_next(&w))
        for (int64_t j = 0; j < w.len; j++) {
            bool first = c->i[w.at[3] + j * w.in[3]] != 0;
            const struct tb_gtensor *from = first ? a : b;
            int64_t at = first ? w.at[1] + j * w.in[1] : w.at[2] + j * w.in[2];
            y->i[w.at[0] + j * w.in[0]] = from->i[at]; /* a cell, whatever its type */
        }
    tb_gt_step(r, y, a, b, c, back_where);
    return r->rc ? NULL : y;
}

/* ---- operations */

static enum tb_gbinary kind_of(const struct tb_grun *r)
{
    return (enum tb_gbinary)((const struct binary *)r->op->p - binaries);
}

static int run_binary(struct tb_grun *r, struct tb_gvalue *out)
{
    enum tb_gbinary k = kind_of(r);
    if (tb_gvalue_is_number(&r->args[0]) && tb_gvalue_is_number(&r->args[1]))
        return tb_gscalar_binary(r, k, &r->args[0], &r->args[1], out);
    struct tb_gtensor *a = tb_garg_operand(r, 0), *b = tb_garg_operand(r, 1);
    return tb_gout(r, out, tb_gt_binary(r, k, a, b, 0));
}

/* input op alpha * other */
static int run_scaled(struct tb_grun *r, struct tb_gvalue *out)
{
    if (!tb_garg_given(r, 2)) return run_binary(r, out);
    struct tb_gtensor *a = tb_garg_operand(r, 0);
    struct tb_gtensor *b =
        tb_gt_binary(r, TB_GB_MUL, tb_garg_operand(r, 1), tb_garg_operand(r, 2), 0);
    return tb_gout(r, out, tb_gt_binary(r, kind_of(r), a, b, 0));
}

static int run_rsub(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *a = tb_garg_operand(r, 0), *b = tb_garg_operand(r, 1);
    if (tb_garg_given(r, 2)) a = tb_gt_binary(r, TB_GB_MUL, a, tb_garg_operand(r, 2), 0);
    return tb_gout(r, out, tb_gt_binary(r, TB_GB_SUB, b, a, 0));
}

static int run_div(struct tb_grun *r, struct tb_gvalue *out)
{
    const char *mode = NULL;
    if (tb_garg_str(r, 2, &mode)) return r->rc;
    if (!mode) return run_binary(r, out);
    struct tb_gtensor *a = tb_garg_operand(r, 0), *b = tb_garg_operand(r, 1);
    if (!strcmp(mode, "floor")) return tb_gout(r, out, tb_gt_binary(r, TB_GB_FLOORDIV, a, b, 1));
    if (strcmp(mode, "trunc"))
        return tb_gfail(r, TB_EINVAL, "rounding_mode %.32s is unknown", mode);
    const struct tb_gtensor *ab[] = {a, b};
    if (!a || !b) return r->rc;
    enum tb_gtype type = tb_gt_promote(ab, 2);
    struct tb_gtensor *q = tb_gt_unary(r, TB_GU_TRUNC, tb_gt_binary(r, TB_GB_DIV, a, b, 0));
    return tb_gout(r, out, tb_gt_cast(r, q, type));
}

static int run_clamp(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    if (!x) return r->rc;
    if (!tb_garg_given(r, 1) && !tb_garg_given(r, 2))
        return tb_gfail(r, TB_EINVAL, "needs min or max");
    if (tb_garg_given(r, 1)) x = tb_gt_binary(r, TB_GB_CLAMP_MIN, x, tb_garg_operand(r, 1), 0);
    if (tb_garg_given(r, 2)) x = tb_gt_binary(r, TB_GB_CLAMP_MAX, x, tb_garg_operand(r, 2), 0);
    return tb_gout(r, out, x);
}

/* torch.where(c, a, b), or p: a.where(c, b) */
static int run_where(struct tb_grun *r, struct tb_gvalue *out)
{
    bool method = r->op->p != NULL;
    struct tb_gtensor *c = tb_garg_tensor(r, method ? 1 : 0);
    struct tb_gtensor *a = c ? tb_garg_operand(r, method ? 0 : 1) : NULL;
    struct tb_gtensor *b = a ? tb_garg_operand(r, 2) : NULL;
    const struct tb_gtensor *ab[] = {a, b};
    return b ? tb_gout(r, out, tb_gt_where(r, c, a, b, tb_gt_promote(ab, 2))) : r->rc;
}

static int run_masked_fill(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0), *mask = x ? tb_garg_tensor(r, 1) : NULL;
    struct tb_gtensor *v = mask ? tb_garg_operand(r, 2) : NULL;
    if (!v) return r->rc;
    if (v->rank) return tb_gfail(r, TB_EINVAL, "value must be a number");
    return tb_gout(r, out, tb_gt_where(r, mask, v, x, x->type));
}

/* input + weight * (end - input) */
static int run_lerp(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *a = tb_garg_tensor(r, 0), *b = a ? tb_garg_tensor(r, 1) : NULL;
    struct tb_gtensor *w = b ? tb_garg_operand(r, 2) : NULL;
    struct tb_gtensor *d = tb_gt_binary(r, TB_GB_SUB, b, a, 0);
    return tb_gout(r, out, tb_gt_binary(r, TB_GB_ADD, a, tb_gt_binary(r, TB_GB_MUL, w, d, 0), 0));
}

/* input + value * tensor1 (p) tensor2 */
static int run_addc(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0), *a = x ? tb_garg_tensor(r, 1) : NULL;
    struct tb_gtensor *b = a ? tb_garg_tensor(r, 2) : NULL;
    struct tb_gtensor *y = tb_gt_binary(r, kind_of(r), a, b, 0);
    if (y && tb_garg_given(r, 3)) y = tb_gt_binary(r, TB_GB_MUL, y, tb_garg_operand(r, 3), 0);
    return tb_gout(r, out, tb_gt_binary(r, TB_GB_ADD, x, y, 0));
}

static int run_float_power(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *a = tb_gt_cast(r, tb_garg_operand(r, 0), TB_GT_F64);
    struct tb_gtensor *b = a ? tb_gt_cast(r, tb_garg_operand(r, 1), TB_GT_F64) : NULL;
    return tb_gout(r, out, tb_gt_binary(r, TB_GB_POW, a, b, 0));
}

#define OP2(names, kind)                                                                           \
    {                                                                                              \
        names, "input other !out", run_binary, &binaries[TB_GB_##kind]                             \
    }
#define METHOD "method"

static const struct tb_gop ops[] = {
    {"operator.add torch.add .add", "input other ?alpha !out", run_scaled, &binaries[TB_GB_ADD]},
    {"operator.sub torch.sub torch.subtract .sub .subtract", "input other ?alpha !out", run_scaled,
     &binaries[TB_GB_SUB]},
    {"torch.rsub", "input other ?alpha", run_rsub, NULL},
    OP2("operator.mul torch.mul torch.multiply .mul .multiply", MUL),
    {"operator.truediv torch.div torch.divide torch.true_divide .div .divide .true_divide",
     "input other ?rounding_mode !out", run_div, &binaries[TB_GB_DIV]},
    OP2("operator.floordiv torch.floor_divide .floor_divide", FLOORDIV),
    OP2("operator.mod torch.remainder .remainder", MOD),
    OP2("torch.fmod .fmod", FMOD),
    {"operator.pow torch.pow .pow", "input exponent !out", run_binary, &binaries[TB_GB_POW]},
    {"torch.float_power .float_power", "input exponent !out", run_float_power, NULL},
    OP2("operator.gt torch.gt torch.greater .gt .greater", GT),
    OP2("operator.ge torch.ge torch.greater_equal .ge .greater_equal", GE),
    OP2("operator.lt torch.lt torch.less .lt .less", LT),
    OP2("operator.le torch.le torch.less_equal .le .less_equal", LE),
    OP2("operator.eq torch.eq .eq", EQ),
    OP2("operator.ne torch.ne torch.not_equal .ne .not_equal", NE),
    OP2("operator.and_ torch.bitwise_and .bitwise_and", AND),
    OP2("operator.or_ torch.bitwise_or .bitwise_or", OR),
    OP2("operator.xor torch.bitwise_xor .bitwise_xor", XOR),
    OP2("torch.logical_and .logical_and", LAND),
    OP2("torch.logical_or .logical_or", LOR),
    OP2("torch.logical_xor .logical_xor", LXOR),
    OP2("torch.minimum .minimum", MIN),
    OP2("torch.maximum .maximum", MAX),
    OP2("torch.atan2 torch.arctan2 .atan2", ATAN2),
    OP2("torch.hypot .hypot", HYPOT),
    OP2("torch.logaddexp .logaddexp", LOGADDEXP),
    OP2("torch.xlogy torch._C._special.special_xlogy .xlogy", XLOGY),
    {"torch.clamp torch.clip .clamp .clip", "input ?min ?max !out", run_clamp, NULL},
    {"torch.clamp_min .clamp_min", "input min !out", run_binary, &binaries[TB_GB_CLAMP_MIN]},
    {"torch.clamp_max .clamp_max", "input max !out", run_binary, &binaries[TB_GB_CLAMP_MAX]},
    {"torch.where", "condition input other", run_where, NULL},
    {".where", "input condition other", run_where, METHOD},
    {"torch.masked_fill .masked_fill", "input mask value", run_masked_fill, NULL},
    {"torch.lerp .lerp", "input end weight !out", run_lerp, NULL},
    {"torch.addcmul .addcmul", "input tensor1 tensor2 ?value !out", run_addc, &binaries[TB_GB_MUL]},
    {"torch.addcdiv .addcdiv", "input tensor1 tensor2 ?value !out", run_addc, &binaries[TB_GB_DIV]},
};

const struct tb_gops tb_gops_binary = {ops, (int)TB_ARRAY_LEN(ops)};
