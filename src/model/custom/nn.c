/*
 * Losses and other functions of torch.nn.functional, made of the primitives. See custom.h.
 *
 * Owner: the run's arena. Thread: the run's.
 */
#include <string.h>

#include "model/custom/custom.h"
#include "util/mem.h"

static struct tb_gtensor *add(struct tb_grun *r, struct tb_gtensor *a, struct tb_gtensor *b)
{
    return tb_gt_binary(r, TB_GB_ADD, a, b, 0);
}
static struct tb_gtensor *sub(struct tb_grun *r, struct tb_gtensor *a, struct tb_gtensor *b)
{
    return tb_gt_binary(r, TB_GB_SUB, a, b, 0);
}
static struct tb_gtensor *mul(struct tb_grun *r, struct tb_gtensor *a, struct tb_gtensor *b)
{
    return tb_gt_binary(r, TB_GB_MUL, a, b, 0);
}
static struct tb_gtensor *divide(struct tb_grun *r, struct tb_gtensor *a, struct tb_gtensor *b)
{
    return tb_gt_binary(r, TB_GB_DIV, a, b, 0);
}

/* none, mean, sum or batchmean */
static int reduced(struct tb_grun *r, int arg, struct tb_gtensor *x, struct tb_gvalue *out)
{
    const char *how = "mean";
    if (!x || tb_garg_str(r, arg, &how)) return r->rc;
    if (!strcmp(how, "none")) return tb_gout(r, out, x);
    bool batch = !strcmp(how, "batchmean") && x->rank > 0;
    if (strcmp(how, "mean") && strcmp(how, "sum") && !batch)
        return tb_gfail(r, TB_EINVAL, "reduction %.32s is unknown", how);
    struct tb_gtensor *y =
        tb_gt_reduce(r, strcmp(how, "mean") ? TB_GR_SUM : TB_GR_MEAN, x, tb_gt_all_dims(x), false);
    if (batch) y = divide(r, y, tb_gt_int(r, x->shape[0]));
    return tb_gout(r, out, y);
}

/* A function of input and target. p: which; args: input, target, reduction, parameter, weight */
struct pair_loss {
    enum tb_gbinary k, at_zero; /* at_zero: instead of k when the parameter is 0 */
    bool probability;           /* input is from 0 to 1, and target has its shape */
};

static int same_shape(struct tb_grun *r, const struct tb_gtensor *x, const struct tb_gtensor *t)
{
    bool same = x->rank == t->rank;
    for (int d = 0; d < x->rank && same; d++)
        same = x->shape[d] == t->shape[d];
    return same ? 0 : tb_gfail(r, TB_EINVAL, "input and target must have one shape");
}

static int run_pair(struct tb_grun *r, struct tb_gvalue *out)
{
    const struct pair_loss *l = r->op->p;
    struct tb_gtensor *x = tb_garg_tensor(r, 0), *t = x ? tb_garg_tensor(r, 1) : NULL;
    double param = 1;
    if (!t || tb_garg_double(r, 3, &param)) return r->rc;
    for (int64_t i = 0; i < x->n && l->probability; i++)
        if (!(tb_gt_at(x, i) >= 0 && tb_gt_at(x, i) <= 1))
            return tb_gfail(r, TB_EINVAL, "input must be from 0 to 1");
    if (l->probability && same_shape(r, x, t)) return r->rc;
    if (param < 0 || param != param) return tb_gfail(r, TB_EINVAL, "its parameter is negative");
    struct tb_gtensor *y = tb_gt_binary(r, param == 0 ? l->at_zero : l->k, x, t, param);
    if (y && tb_garg_given(r, 4)) y = mul(r, y, tb_garg_tensor(r, 4));
    return reduced(r, 2, y, out);
}

/* input, target, weight, reduction, pos_weight */
static int run_bce_logits(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0), *t = x ? tb_garg_tensor(r, 1) : NULL;
    if (!t || same_shape(r, x, t)) return r->rc;
    struct tb_gtensor *ls = tb_gt_unary(r, TB_GU_LOGSIGMOID, x);
    if (tb_garg_given(r, 4)) {
        struct tb_gtensor *w = tb_garg_tensor(r, 4);
        w = w ? mul(r, sub(r, w, tb_gt_int(r, 1)), t) : NULL;
        ls = mul(r, add(r, w, tb_gt_int(r, 1)), ls);
    }
    struct tb_gtensor *y = sub(r, mul(r, sub(r, tb_gt_int(r, 1), t), x), ls);
    if (y && tb_garg_given(r, 2)) y = mul(r, y, tb_garg_tensor(r, 2));
    return reduced(r, 3, y, out);
}

/* input, target, reduction, log_target */
static int run_kl_div(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0), *t = x ? tb_garg_tensor(r, 1) : NULL;
    bool log_target = false;
    if (!t || tb_garg_bool(r, 3, &log_target)) return r->rc;
    struct tb_gtensor *y = log_target ? mul(r, tb_gt_unary(r, TB_GU_EXP, t), sub(r, t, x))
                                      : sub(r, tb_gt_binary(r, TB_GB_XLOGY, t, t, 0), mul(r, t, x));
    return reduced(r, 2, y, out);
}

/* input [n, c] and target [n]: the rows' picks, weighted by nothing */
static int nll(struct tb_grun *r, struct tb_gtensor *x, int reduction, int64_t ignore,
               struct tb_gvalue *out)
{
    struct tb_gtensor *t = x ? tb_garg_tensor(r, 1) : NULL;
    if (!t) return r->rc;
    if (x->rank != 2 || t->rank != 1 || t->type != TB_GT_INT || t->n != x->shape[0])
        return tb_gfail(r, TB_EUNSUPPORTED,
                        "is supported for input [n, classes] and int64 target [n] only");
    int32_t *map = tb_galloc(r, t->n, sizeof(*map));
    int64_t counted = 0;
    const char *how = "mean";
    if (!map || tb_garg_str(r, reduction, &how)) return r->rc;
    for (int64_t i = 0; i < t->n; i++) {
        int64_t c = t->i[i];
        map[i] = -1;
        if (c == ignore) continue;
        if (c < 0 || c >= x->shape[1])
            return tb_gfail(r, TB_EINVAL, "target %lld is out of range", (long long)c);
        map[i] = (int32_t)(i * x->shape[1] + c);
        counted++;
    }
    struct tb_gtensor *y = tb_gt_unary(r, TB_GU_NEG, tb_gt_pick(r, x, 1, t->shape, map, 0));
    if (!y || strcmp(how, "mean")) return reduced(r, reduction, y, out);
    y = tb_gt_reduce(r, TB_GR_SUM, y, 1, false);
    return tb_gout(r, out, divide(r, y, tb_gt_int(r, counted)));
}

/* input, target, reduction, ignore_index; p: with log_softmax first */
static int run_nll(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    int64_t ignore = -100;
    if (!x || tb_garg_int(r, 3, &ignore)) return r->rc;
    if (r->op->p && x->rank == 2) x = tb_gt_softmax(r, x, 1, true);
    return nll(r, x, 2, ignore, out);
}

/* input, p, dim, eps */
static int run_normalize(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    double p = 2, eps = 1e-12;
    int64_t d = 1;
    int dim;
    if (!x || tb_garg_double(r, 1, &p) || tb_garg_int(r, 2, &d) || tb_gdim(r, d, x->rank, &dim) ||
        tb_garg_double(r, 3, &eps))
        return r->rc;
    struct tb_gtensor *n = tb_gt_norm(r, x, p, x->rank ? 1u << dim : 0, true);
    n = tb_gt_binary(r, TB_GB_CLAMP_MIN, n, n ? tb_gt_number(r, eps) : NULL, 0);
    return tb_gout(r, out, divide(r, x, n));
}

/* x1, x2, dim, eps */
static int run_cosine(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *t[2] = {tb_garg_tensor(r, 0), NULL};
    int64_t shape[TB_G_RANK], d = 1;
    int dim, rank;
    double eps = 1e-8;
    if (!t[0] || !(t[1] = tb_garg_tensor(r, 1)) || tb_garg_int(r, 2, &d) ||
        tb_garg_double(r, 3, &eps))
        return r->rc;
    const struct tb_gtensor *both[] = {t[0], t[1]};
    if (tb_gt_broadcast(r, both, 2, &rank, shape) || tb_gdim(r, d, rank, &dim)) return r->rc;
    enum tb_gtype type = tb_gt_promote(both, 2);
    for (int i = 0; i < 2; i++) {
        t[i] = tb_gt_expand(r, tb_gt_cast(r, t[i], type), rank, shape);
        struct tb_gtensor *n = tb_gt_norm(r, t[i], 2, rank ? 1u << dim : 0, true);
        n = tb_gt_binary(r, TB_GB_CLAMP_MIN, n, n ? tb_gt_number(r, eps) : NULL, 0);
        if (!(t[i] = divide(r, t[i], n))) return r->rc;
    }
    struct tb_gtensor *y = mul(r, t[0], t[1]);
    return tb_gout(r, out, tb_gt_reduce(r, TB_GR_SUM, y, rank ? 1u << dim : 0, false));
}

static const struct pair_loss mse = {TB_GB_SQ_DIFF, TB_GB_SQ_DIFF, false},
                              l1 = {TB_GB_ABS_DIFF, TB_GB_ABS_DIFF, false},
                              huber = {TB_GB_HUBER, TB_GB_HUBER, false},
                              smooth_l1 = {TB_GB_SMOOTH_L1, TB_GB_ABS_DIFF, false},
                              bce = {TB_GB_BCE, TB_GB_BCE, true};

#define FNN "torch.nn.functional."
#define OLD "!size_average !reduce"

static const struct tb_gop ops[] = {
    {FNN "mse_loss", "input target ?reduction ~_none ?weight " OLD, run_pair, &mse},
    {FNN "l1_loss", "input target ?reduction ~_none ?weight " OLD, run_pair, &l1},
    {FNN "huber_loss", "input target ?reduction ?delta ?weight", run_pair, &huber},
    {FNN "smooth_l1_loss", "input target ?reduction ?beta !weight " OLD, run_pair, &smooth_l1},
    {FNN "binary_cross_entropy", "input target ?reduction ~_none ?weight " OLD, run_pair, &bce},
    {FNN "binary_cross_entropy_with_logits", "input target ?weight ?reduction ?pos_weight " OLD,
     run_bce_logits, NULL},
    {FNN "kl_div", "input target ?reduction ?log_target " OLD, run_kl_div, NULL},
    {FNN "nll_loss", "input target ?reduction ?ignore_index !weight " OLD, run_nll, NULL},
    {FNN "cross_entropy", "input target ?reduction ?ignore_index !weight !label_smoothing=0 " OLD,
     run_nll, "log_softmax"},
    {FNN "normalize", "input ?p ?dim ?eps !out", run_normalize, NULL},
    {"torch.cosine_similarity " FNN "cosine_similarity", "x1 x2 ?dim ?eps", run_cosine, NULL},
};

const struct tb_gops tb_gops_nn = {ops, (int)TB_ARRAY_LEN(ops)};
