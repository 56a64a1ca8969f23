/*
 * Python's own numbers in a graph: sizes and what is computed from them, with Python's arithmetic
 * on int64 and double, and the functions of math. See custom.h.
 *
 * Owner: nothing. Thread: the run's.
 */
#include <math.h>

#include "model/custom/custom.h"
#include "util/mem.h"

static int out_float(struct tb_gvalue *out, double v)
{
    *out = (struct tb_gvalue){.kind = TB_GV_FLOAT, .f = v};
    return 0;
}

static int too_large(struct tb_grun *r)
{
    return tb_gfail(r, TB_ETOOBIG, "an integer beyond 64 bits");
}

static int zero_division(struct tb_grun *r)
{
    return tb_gfail(r, TB_EINVAL, "a division of numbers by zero");
}

static int64_t as_int(const struct tb_gvalue *v)
{
    return v->kind == TB_GV_INT ? v->i : v->b;
}

static double as_double(const struct tb_gvalue *v)
{
    return v->kind == TB_GV_FLOAT ? v->f : (double)as_int(v);
}

static int int_power(struct tb_grun *r, int64_t a, int64_t b, struct tb_gvalue *out)
{
    int64_t y = 1;
    if (b < 0) return a == 0 ? zero_division(r) : out_float(out, pow((double)a, (double)b));
    if (a == 0 || a == 1 || a == -1) {
        tb_gout_int(out, b == 0 ? 1 : a == -1 && b % 2 == 0 ? 1 : a);
        return 0;
    }
    for (; b > 0; b--) /* at most 63 times before it is too large */
        if (__builtin_mul_overflow(y, a, &y)) return too_large(r);
    tb_gout_int(out, y);
    return 0;
}

static int of_ints(struct tb_grun *r, enum tb_gbinary k, int64_t a, int64_t b,
                   struct tb_gvalue *out)
{
    int64_t y = 0;
    bool big = false;
    switch (k) {
    case TB_GB_ADD: big = __builtin_add_overflow(a, b, &y); break;
    case TB_GB_SUB: big = __builtin_sub_overflow(a, b, &y); break;
    case TB_GB_MUL: big = __builtin_mul_overflow(a, b, &y); break;
    case TB_GB_DIV: return b == 0 ? zero_division(r) : out_float(out, (double)a / (double)b);
    case TB_GB_FLOORDIV:
    case TB_GB_MOD: {
        if (b == 0) return zero_division(r);
        if (a == INT64_MIN && b == -1) return too_large(r);
        int64_t m = a % b, q = a / b;
        bool down = m != 0 && (b < 0) != (m < 0);
        y = k == TB_GB_MOD ? (down ? m + b : m) : down ? q - 1 : q;
        break;
    }
    case TB_GB_POW: return int_power(r, a, b, out);
    case TB_GB_AND: y = a & b; break;
    case TB_GB_OR: y = a | b; break;
    case TB_GB_XOR: y = a ^ b; break;
    default: return tb_gfail(r, TB_EINVAL, "is not defined for two numbers");
    }
    if (big) return too_large(r);
    tb_gout_int(out, y);
    return 0;
}

static int of_doubles(struct tb_grun *r, enum tb_gbinary k, double a, double b,
                      struct tb_gvalue *out)
{
    switch (k) {
    case TB_GB_ADD: return out_float(out, a + b);
    case TB_GB_SUB: return out_float(out, a - b);
    case TB_GB_MUL: return out_float(out, a * b);
    case TB_GB_DIV: return b == 0 ? zero_division(r) : out_float(out, a / b);
    case TB_GB_POW: return out_float(out, pow(a, b));
    case TB_GB_FLOORDIV:
    case TB_GB_MOD: {
        if (b == 0) return zero_division(r);
        double m = fmod(a, b);
        if (m != 0 && (b < 0) != (m < 0)) m += b;
        return out_float(out, k == TB_GB_MOD ? m : floor((a - m) / b + 0.5));
    }
    default: return tb_gfail(r, TB_EINVAL, "is not defined for two numbers");
    }
}

int tb_gscalar_binary(struct tb_grun *r, enum tb_gbinary k, const struct tb_gvalue *a,
                      const struct tb_gvalue *b, struct tb_gvalue *out)
{
    bool ints = a->kind != TB_GV_FLOAT && b->kind != TB_GV_FLOAT;
    if (k >= TB_GB_GT && k <= TB_GB_NE) {
        double x = as_double(a), y = as_double(b);
        int c = ints ? (as_int(a) > as_int(b)) - (as_int(a) < as_int(b)) : (x > y) - (x < y);
        bool nan = isnan(x) || isnan(y);
        bool is = k == TB_GB_GT   ? c > 0
                  : k == TB_GB_GE ? c >= 0
                  : k == TB_GB_LT ? c < 0
                  : k == TB_GB_LE ? c <= 0
                                  : c == 0;
        if (nan) is = false;
        tb_gout_bool(out, k == TB_GB_NE ? !is : is);
        return 0;
    }
    bool logic = k == TB_GB_AND || k == TB_GB_OR || k == TB_GB_XOR;
    int rc = ints ? of_ints(r, k, as_int(a), as_int(b), out)
                  : of_doubles(r, k, as_double(a), as_double(b), out);
    if (!rc && logic && a->kind == TB_GV_BOOL && b->kind == TB_GV_BOOL)
        tb_gout_bool(out, out->i != 0);
    return rc;
}

int tb_gscalar_unary(struct tb_grun *r, enum tb_gunary k, const struct tb_gvalue *a,
                     struct tb_gvalue *out)
{
    bool negate = k == TB_GU_NEG || (k == TB_GU_ABS && as_double(a) < 0);
    if (k != TB_GU_NEG && k != TB_GU_ABS)
        return tb_gfail(r, TB_EINVAL, "needs a tensor, not %s", tb_gkind_name(a));
    if (a->kind == TB_GV_FLOAT) return out_float(out, negate ? -a->f : a->f);
    if (negate && as_int(a) == INT64_MIN) return too_large(r);
    tb_gout_int(out, negate ? -as_int(a) : as_int(a));
    return 0;
}

/* ---- math */

struct fn1 {
    double (*f)(double);
    bool to_int;
};

/* A function of one number; like Python, a result that is no number is an error. */
static int run_math1(struct tb_grun *r, struct tb_gvalue *out)
{
    const struct fn1 *f = r->op->p;
    double x = 0;
    if (tb_garg_double(r, 0, &x)) return r->rc;
    double y = f->f(x);
    if (!isfinite(y) && isfinite(x)) return tb_gfail(r, TB_EINVAL, "math domain or range error");
    if (!f->to_int) return out_float(out, y);
    if (!(fabs(y) < 9e18)) return too_large(r);
    tb_gout_int(out, (int64_t)y);
    return 0;
}

static int run_log(struct tb_grun *r, struct tb_gvalue *out)
{
    double x = 0, base = M_E;
    if (tb_garg_double(r, 0, &x) || tb_garg_double(r, 1, &base)) return r->rc;
    if (!(x > 0) || !(base > 0) || base == 1)
        return tb_gfail(r, TB_EINVAL, "math domain or range error");
    return out_float(out, tb_garg_given(r, 1) ? log(x) / log(base) : log(x));
}

static int run_pow(struct tb_grun *r, struct tb_gvalue *out)
{
    double a = 0, b = 0;
    if (tb_garg_double(r, 0, &a) || tb_garg_double(r, 1, &b)) return r->rc;
    return out_float(out, pow(a, b));
}

#define FN(name, to_int) static const struct fn1 fn_##name = {name, to_int}
FN(sqrt, false);
FN(exp, false);
FN(expm1, false);
FN(log1p, false);
FN(log2, false);
FN(log10, false);
FN(fabs, false);
FN(sin, false);
FN(cos, false);
FN(tanh, false);
FN(floor, true);
FN(ceil, true);
FN(trunc, true);

#define OP(name)                                                                                   \
    {                                                                                              \
        "math." #name, "x", run_math1, &fn_##name                                                  \
    }

static const struct tb_gop ops[] = {
    OP(sqrt),
    OP(exp),
    OP(expm1),
    OP(log1p),
    OP(log2),
    OP(log10),
    OP(fabs),
    OP(sin),
    OP(cos),
    OP(tanh),
    OP(floor),
    OP(ceil),
    OP(trunc),
    {"math.log", "x ?base", run_log, NULL},
    {"math.pow", "x y", run_pow, NULL},
};

const struct tb_gops tb_gops_scalar = {ops, (int)TB_ARRAY_LEN(ops)};
