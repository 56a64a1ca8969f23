/*
 * Elementwise operations of one tensor: the table of functions with their derivatives, and the
 * operations made of them. See custom.h.
 *
 * Owner: the run's arena. Thread: the run's.
 */
#include <float.h>
#include <math.h>
#include <string.h>

#include "model/custom/custom.h"
#include "util/mem.h"

enum {
    TO_BOOL = 1,  /* the result is bool */
    TO_FLOAT = 2, /* integers become float32 */
    NO_BOOL = 4,  /* bools are refused; without it they become int64 */
    SELECT = 8,   /* where the derivative is zero nothing flows, not even a NaN */
};

/* ---- functions: value of x (and y), derivatives; y is the rounded value, p parameters */

static double gelu_tanh(double x)
{
    return tanh(0.7978845608028654 * (x + 0.044715 * x * x * x));
}
static double clamp_to(double x, double lo, double hi)
{
    return x < lo ? lo : x > hi ? hi : x;
}

#define FN1(name, value, slope)                                                                    \
    static double u_##name(double x, const double *p)                                              \
    {                                                                                              \
        return value;                                                                              \
    }                                                                                              \
    static double du_##name(double x, double y, const double *p)                                   \
    {                                                                                              \
        return slope;                                                                              \
    }

FN1(neg, -x, -1)
FN1(abs, fabs(x), tb_gsign(x))
FN1(exp, exp(x), y)
FN1(exp2, exp2(x), y *M_LN2)
FN1(expm1, expm1(x), y + 1)
FN1(log, log(x), 1 / x)
FN1(log2, log2(x), 1 / (x * M_LN2))
FN1(log10, log10(x), 1 / (x * M_LN10))
FN1(log1p, log1p(x), 1 / (x + 1))
FN1(sqrt, sqrt(x), 1 / (2 * y))
FN1(rsqrt, 1 / sqrt(x), -0.5 * y * y * y)
FN1(square, x *x, 2 * x)
FN1(reciprocal, 1 / x, -y *y)
FN1(sigmoid, tb_gsigmoid(x), (1 - y) * y)
FN1(logsigmoid, fmin(x, 0) - log1p(exp(-fabs(x))), tb_gsigmoid(-x))
FN1(tanh, tanh(x), 1 - y * y)
FN1(relu, x > 0 || isnan(x) ? x : 0, x > 0 || isnan(x))
FN1(relu6, clamp_to(x, 0, 6), x > 0 && x < 6)
FN1(hardtanh, clamp_to(x, p[0], p[1]), x > p[0] && x < p[1])
FN1(leaky_relu, x > 0 ? x : x * p[0], x > 0 ? 1 : p[0])
FN1(elu, x > 0 ? x : p[0] * expm1(x), x > 0 ? 1 : p[0] * exp(x))
FN1(silu, x *tb_gsigmoid(x), tb_gsigmoid(x) * (1 + x * (1 - tb_gsigmoid(x))))
FN1(softplus, x *p[0] > p[1] ? x : log1p(exp(x * p[0])) / p[0],
    x *p[0] > p[1] ? 1 : tb_gsigmoid(x * p[0]))
FN1(gelu, 0.5 * x * (1 + erf(x * M_SQRT1_2)),
    0.5 * (1 + erf(x * M_SQRT1_2)) + x * exp(-0.5 * x * x) * 0.3989422804014327)
FN1(gelu_tanh, 0.5 * x * (1 + gelu_tanh(x)),
    0.5 * (1 + gelu_tanh(x)) + 0.5 * x * (1 - gelu_tanh(x) * gelu_tanh(x)) * 0.7978845608028654 *
                                   (1 + 3 * 0.044715 * x * x))
FN1(erf, erf(x), M_2_SQRTPI *exp(-x *x))
FN1(erfc, erfc(x), -M_2_SQRTPI *exp(-x *x))
FN1(sin, sin(x), cos(x))
FN1(cos, cos(x), -sin(x))
FN1(tan, tan(x), 1 + y * y)
FN1(atan, atan(x), 1 / (1 + x * x))
FN1(sinh, sinh(x), cosh(x))
FN1(cosh, cosh(x), sinh(x))
FN1(sign, tb_gsign(x), 0)
FN1(floor, floor(x), 0)
FN1(ceil, ceil(x), 0)
FN1(round, rint(x), 0)
FN1(trunc, trunc(x), 0)
FN1(frac, x - trunc(x), 1)
FN1(logit, log(x / (1 - x)), x<0 || x> 1 ? (double)NAN : 1 / (x * (1 - x)))
FN1(nan_to_num, isnan(x) ? p[0] : isinf(x) ? (x > 0 ? p[1] : p[2]) : x, isfinite(x))
FN1(isfinite, isfinite(x), 0)
FN1(isnan, isnan(x), 0)
FN1(isinf, isinf(x) != 0, 0)
FN1(not, x == 0, 0)

struct unary {
    double (*f)(double x, const double *p);
    double (*d)(double x, double y, const double *p);
    unsigned flags;
    double p[3]; /* defaults of parameters 1.. */
};

#define ROW1(name, ...)                                                                            \
    static const struct unary row1_##name = {.f = u_##name, .d = du_##name, __VA_ARGS__}
ROW1(neg, .flags = NO_BOOL);
ROW1(abs, .flags = 0);
ROW1(exp, .flags = TO_FLOAT);
ROW1(exp2, .flags = TO_FLOAT);
ROW1(expm1, .flags = TO_FLOAT);
ROW1(log, .flags = TO_FLOAT);
ROW1(log2, .flags = TO_FLOAT);
ROW1(log10, .flags = TO_FLOAT);
ROW1(log1p, .flags = TO_FLOAT);
ROW1(sqrt, .flags = TO_FLOAT);
ROW1(rsqrt, .flags = TO_FLOAT);
ROW1(square, .flags = 0);
ROW1(reciprocal, .flags = TO_FLOAT);
ROW1(sigmoid, .flags = TO_FLOAT);
ROW1(logsigmoid, .flags = TO_FLOAT);
ROW1(tanh, .flags = TO_FLOAT);
ROW1(relu, .flags = SELECT);
ROW1(relu6, .flags = SELECT);
ROW1(hardtanh, .flags = SELECT, .p = {-1, 1});
ROW1(leaky_relu, .flags = TO_FLOAT, .p = {0.01});
ROW1(elu, .flags = TO_FLOAT, .p = {1});
ROW1(silu, .flags = TO_FLOAT);
ROW1(softplus, .flags = TO_FLOAT, .p = {1, 20});
ROW1(gelu, .flags = TO_FLOAT);
ROW1(gelu_tanh, .flags = TO_FLOAT);
ROW1(erf, .flags = TO_FLOAT);
ROW1(erfc, .flags = TO_FLOAT);
ROW1(sin, .flags = TO_FLOAT);
ROW1(cos, .flags = TO_FLOAT);
ROW1(tan, .flags = TO_FLOAT);
ROW1(atan, .flags = TO_FLOAT);
ROW1(sinh, .flags = TO_FLOAT);
ROW1(cosh, .flags = TO_FLOAT);
ROW1(sign, .flags = SELECT);
ROW1(floor, .flags = SELECT);
ROW1(ceil, .flags = SELECT);
ROW1(round, .flags = SELECT);
ROW1(trunc, .flags = SELECT);
ROW1(frac, .flags = 0);
ROW1(logit, .flags = TO_FLOAT);
ROW1(nan_to_num, .flags = SELECT);
ROW1(isfinite, .flags = TO_BOOL);
ROW1(isnan, .flags = TO_BOOL);
ROW1(isinf, .flags = TO_BOOL);
ROW1(not, .flags = TO_BOOL);

static const struct unary *const named[TB_GU_N_NAMED] = {
    [TB_GU_NEG] = &row1_neg,         [TB_GU_ABS] = &row1_abs,
    [TB_GU_EXP] = &row1_exp,         [TB_GU_LOG] = &row1_log,
    [TB_GU_LOG1P] = &row1_log1p,     [TB_GU_SQRT] = &row1_sqrt,
    [TB_GU_SIGMOID] = &row1_sigmoid, [TB_GU_LOGSIGMOID] = &row1_logsigmoid,
    [TB_GU_TRUNC] = &row1_trunc,     [TB_GU_NOT] = &row1_not,
};

static int back_unary(struct tb_grun *r, struct tb_gstep *s)
{
    const struct unary *u = s->p;
    double *g = tb_gt_grad(r, s->a);
    if (!g) return r->rc;
    for (int64_t i = 0; i < s->a->n; i++) {
        double d = u->d(s->a->f[i], s->out->f[i], s->d);
        if (d != 0 || !(u->flags & SELECT)) g[i] += s->out->g[i] * d;
    }
    return 0;
}

static int64_t int_unary(const struct unary *u, int64_t x, const double *p)
{
    uint64_t v = (uint64_t)x;
    if (u == &row1_neg) return (int64_t)(0 - v);
    if (u == &row1_abs) return x < 0 ? (int64_t)(0 - v) : x;
    if (u == &row1_square) return (int64_t)(v * v);
    if (u == &row1_relu) return x > 0 ? x : 0;
    return tb_gto_int(u->f((double)x, p)); /* sign, clamps: small */
}

static struct tb_gtensor *unary(struct tb_grun *r, const struct unary *u, struct tb_gtensor *x,
                                const double *p)
{
    if (!x) return NULL;
    bool keeps = u == &row1_floor || u == &row1_ceil || u == &row1_round || u == &row1_trunc ||
                 u == &row1_nan_to_num;
    if ((u->flags & NO_BOOL) && x->type == TB_GT_BOOL) {
        tb_gfail(r, TB_EINVAL, "is not defined for bool tensors");
        return NULL;
    }
    if (!tb_gt_is_float(x->type)) {
        if (keeps) return x;
        x = tb_gt_cast(r, x, (u->flags & TO_FLOAT) ? TB_GT_F32 : TB_GT_INT);
    }
    struct tb_gtensor *y = x ? tb_gt_like(r, (u->flags & TO_BOOL) ? TB_GT_BOOL : x->type, x) : NULL;
    if (!y) return NULL;
    if (u->flags & TO_BOOL) {
        for (int64_t i = 0; i < x->n; i++)
            y->i[i] = u->f(tb_gt_at(x, i), p) != 0;
        return y;
    }
    if (!tb_gt_is_float(x->type)) {
        for (int64_t i = 0; i < x->n; i++)
            y->i[i] = int_unary(u, x->i[i], p);
        return y;
    }
    for (int64_t i = 0; i < x->n; i++)
        y->f[i] = tb_ground(y->type, u->f(x->f[i], p));
    struct tb_gstep *s = tb_gt_step(r, y, x, NULL, NULL, back_unary);
    if (s) {
        s->p = u;
        memcpy(s->d, p, sizeof(s->d));
    }
    return r->rc ? NULL : y;
}

struct tb_gtensor *tb_gt_unary(struct tb_grun *r, enum tb_gunary k, struct tb_gtensor *x)
{
    return unary(r, named[k], x, named[k]->p);
}

/* ---- operations */

static int run_unary(struct tb_grun *r, struct tb_gvalue *out)
{
    const struct unary *u = r->op->p;
    if (tb_gvalue_is_number(&r->args[0]))
        for (int k = 0; k < TB_GU_N_NAMED; k++)
            if (named[k] == u) return tb_gscalar_unary(r, (enum tb_gunary)k, &r->args[0], out);
    return tb_gout(r, out, unary(r, u, tb_garg_tensor(r, 0), u->p));
}

static int run_unary_params(struct tb_grun *r, struct tb_gvalue *out)
{
    const struct unary *u = r->op->p;
    double p[3];
    memcpy(p, u->p, sizeof(p));
    for (int i = 0; i < 3; i++)
        if (tb_garg_double(r, i + 1, &p[i])) return r->rc;
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    if (x && u == &row1_nan_to_num) {
        double most = x->type == TB_GT_F64 ? DBL_MAX : (double)FLT_MAX;
        if (!tb_garg_given(r, 2)) p[1] = most;
        if (!tb_garg_given(r, 3)) p[2] = -most;
    }
    return tb_gout(r, out, unary(r, u, x, p));
}

static int run_gelu(struct tb_grun *r, struct tb_gvalue *out)
{
    const char *how = "none";
    if (tb_garg_str(r, 1, &how)) return r->rc;
    if (strcmp(how, "none") && strcmp(how, "tanh"))
        return tb_gfail(r, TB_EINVAL, "approximate %.32s is unknown", how);
    const struct unary *u = strcmp(how, "none") ? &row1_gelu_tanh : &row1_gelu;
    return tb_gout(r, out, unary(r, u, tb_garg_tensor(r, 0), u->p));
}

static int run_logit(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    double eps = -1;
    if (!x || tb_garg_double(r, 1, &eps)) return r->rc;
    if (eps >= 0) {
        x = tb_gt_binary(r, TB_GB_CLAMP_MIN, x, tb_gt_number(r, eps), 0);
        x = tb_gt_binary(r, TB_GB_CLAMP_MAX, x, tb_gt_number(r, 1 - eps), 0);
    }
    return tb_gout(r, out, unary(r, &row1_logit, x, row1_logit.p));
}

/* ~x: bits of integers, truth of bools. */
static int run_invert(struct tb_grun *r, struct tb_gvalue *out)
{
    if (r->args[0].kind == TB_GV_INT || r->args[0].kind == TB_GV_BOOL) {
        tb_gout_int(out, ~(r->args[0].kind == TB_GV_INT ? r->args[0].i : r->args[0].b));
        return 0;
    }
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    if (!x) return r->rc;
    if (tb_gt_is_float(x->type)) return tb_gfail(r, TB_EINVAL, "is not defined for floats");
    struct tb_gtensor *y = tb_gt_like(r, x->type, x);
    for (int64_t i = 0; y && i < x->n; i++)
        y->i[i] = x->type == TB_GT_BOOL ? !x->i[i] : ~x->i[i];
    return tb_gout(r, out, y);
}

#define OP1(names, row)                                                                            \
    {                                                                                              \
        names, "input !out", run_unary, &row1_##row                                                \
    }
#define FNN "torch.nn.functional."

static const struct tb_gop ops[] = {
    OP1("operator.neg torch.neg torch.negative .neg .negative", neg),
    OP1("operator.abs torch.abs torch.absolute .abs .absolute", abs),
    OP1("torch.exp .exp", exp),
    OP1("torch.exp2 torch._C._special.special_exp2 .exp2", exp2),
    OP1("torch.expm1 torch._C._special.special_expm1 .expm1", expm1),
    OP1("torch.log .log", log),
    OP1("torch.log2 .log2", log2),
    OP1("torch.log10 .log10", log10),
    OP1("torch.log1p torch._C._special.special_log1p .log1p", log1p),
    OP1("torch.sqrt .sqrt", sqrt),
    OP1("torch.rsqrt .rsqrt", rsqrt),
    OP1("torch.square .square", square),
    OP1("torch.reciprocal .reciprocal", reciprocal),
    OP1("torch.sigmoid torch._C._special.special_expit " FNN "sigmoid .sigmoid", sigmoid),
    OP1("torch._C._nn.log_sigmoid " FNN "logsigmoid", logsigmoid),
    OP1("torch.tanh " FNN "tanh .tanh", tanh),
    {"torch.relu " FNN "relu .relu", "input !inplace", run_unary, &row1_relu},
    {FNN "relu6", "input !inplace", run_unary, &row1_relu6},
    {FNN "silu torch._C._nn.silu", "input !inplace", run_unary, &row1_silu},
    {FNN "hardtanh", "input ?min_val ?max_val !inplace", run_unary_params, &row1_hardtanh},
    {FNN "leaky_relu", "input ?negative_slope !inplace", run_unary_params, &row1_leaky_relu},
    {FNN "elu", "input ?alpha !inplace", run_unary_params, &row1_elu},
    {"torch._C._nn.softplus " FNN "softplus", "input ?beta ?threshold", run_unary_params,
     &row1_softplus},
    {"torch._C._nn.gelu " FNN "gelu", "input ?approximate", run_gelu, NULL},
    OP1("torch.erf torch._C._special.special_erf .erf", erf),
    OP1("torch.erfc torch._C._special.special_erfc .erfc", erfc),
    OP1("torch.sin .sin", sin),
    OP1("torch.cos .cos", cos),
    OP1("torch.tan .tan", tan),
    OP1("torch.atan torch.arctan .atan .arctan", atan),
    OP1("torch.sinh .sinh", sinh),
    OP1("torch.cosh .cosh", cosh),
    OP1("torch.sign torch.sgn .sign .sgn", sign),
    OP1("torch.floor .floor", floor),
    OP1("torch.ceil .ceil", ceil),
    {"torch.round .round", "input !decimals=0", run_unary, &row1_round},
    OP1("torch.trunc torch.fix .trunc .fix", trunc),
    OP1("torch.frac .frac", frac),
    {"torch.logit torch._C._special.special_logit .logit", "input ?eps !out", run_logit, NULL},
    {"torch.nan_to_num .nan_to_num", "input ?nan ?posinf ?neginf !out", run_unary_params,
     &row1_nan_to_num},
    OP1("torch.isfinite .isfinite", isfinite),
    OP1("torch.isnan .isnan", isnan),
    OP1("torch.isinf .isinf", isinf),
    OP1("torch.logical_not .logical_not", not ),
    {"operator.invert operator.inv torch.bitwise_not .bitwise_not", "input", run_invert, NULL},
};

const struct tb_gops tb_gops_unary = {ops, (int)TB_ARRAY_LEN(ops)};
