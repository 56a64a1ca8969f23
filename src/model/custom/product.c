/*
 * Products that sum: dot, matmul and einsum, all as one contraction of two tensors over labelled
 * dimensions. See custom.h.
 *
 * Owner: the run's arena. Thread: the run's.
 */
#include <ctype.h>
#include <string.h>

#include "model/custom/custom.h"
#include "util/mem.h"

#define MAX_LABELS 26

/* Sizes and strides for each label; a stride is 0 where a tensor lacks it, and the sum of strides
 * where it has it twice (a diagonal). The labels of the result come first. */
struct contraction {
    int n, n_out;
    int64_t size[MAX_LABELS], a[MAX_LABELS], b[MAX_LABELS], y[MAX_LABELS];
};

struct cursor {
    int64_t pos[MAX_LABELS], a, b, y, left;
};

static int64_t count(const struct contraction *c)
{
    int64_t n = 1;
    for (int l = 0; l < c->n; l++)
        if (__builtin_mul_overflow(n, c->size[l], &n)) return INT64_MAX;
    return n;
}

static void next(const struct contraction *c, struct cursor *k)
{
    k->left--;
    for (int l = c->n - 1; l >= 0; l--) {
        k->a += c->a[l];
        k->b += c->b[l];
        k->y += c->y[l];
        if (++k->pos[l] < c->size[l]) return;
        k->a -= c->a[l] * c->size[l];
        k->b -= c->b[l] * c->size[l];
        k->y -= c->y[l] * c->size[l];
        k->pos[l] = 0;
    }
}

static int back_contract(struct tb_grun *r, struct tb_gstep *s)
{
    const struct contraction *c = s->p;
    struct cursor k = {.left = count(c)};
    double *ga = s->a->needs ? tb_gt_grad(r, s->a) : NULL;
    double *gb = s->b->needs ? tb_gt_grad(r, s->b) : NULL;
    if (r->rc || tb_gwork(r, k.left)) return r->rc;
    for (; k.left > 0; next(c, &k)) {
        double g = s->out->g[k.y];
        if (ga) ga[k.a] += g * s->b->f[k.b];
        if (gb) gb[k.b] += g * s->a->f[k.a];
    }
    return 0;
}

static struct tb_gtensor *contract(struct tb_grun *r, struct tb_gtensor *a, struct tb_gtensor *b,
                                   const struct contraction *given)
{
    int64_t shape[TB_G_RANK];
    if (given->n_out > TB_G_RANK) {
        tb_gfail(r, TB_ETOOBIG, "a result of too many dimensions");
        return NULL;
    }
    if (a->type != b->type) {
        tb_gfail(r, TB_EINVAL, "its tensors must have one type, not %s and %s",
                 tb_gtype_name(a->type), tb_gtype_name(b->type));
        return NULL;
    }
    if (a->type == TB_GT_BOOL) {
        tb_gfail(r, TB_EINVAL, "is not defined for bool tensors");
        return NULL;
    }
    struct contraction *c = tb_galloc(r, 1, sizeof(*c));
    if (!c) return NULL;
    *c = *given;
    for (int l = 0; l < c->n_out; l++)
        shape[l] = c->size[l];
    int64_t stride = 1;
    for (int l = c->n_out - 1; l >= 0; l--) {
        c->y[l] = stride;
        stride *= TB_MAX(c->size[l], 1);
    }
    struct cursor k = {.left = count(c)};
    struct tb_gtensor *y = tb_gt_new(r, a->type, c->n_out, shape);
    if (!y || tb_gwork(r, k.left)) return NULL;
    memset(y->f, 0, (size_t)y->n * sizeof(*y->f));
    if (!tb_gt_is_float(a->type)) {
        for (; k.left > 0; next(c, &k))
            y->i[k.y] = (int64_t)((uint64_t)y->i[k.y] + (uint64_t)a->i[k.a] * (uint64_t)b->i[k.b]);
        return y;
    }
    for (; k.left > 0; next(c, &k))
        y->f[k.y] += a->f[k.a] * b->f[k.b];
    for (int64_t i = 0; i < y->n; i++)
        y->f[i] = tb_ground(y->type, y->f[i]);
    struct tb_gstep *s = tb_gt_step(r, y, a, b, NULL, back_contract);
    if (s) s->p = c;
    return r->rc ? NULL : y;
}

static int mismatch(struct tb_grun *r, const struct tb_gtensor *a, const struct tb_gtensor *b)
{
    char x[96], y[96];
    return tb_gfail(r, TB_EINVAL, "shapes %s and %s do not fit", tb_gshape(a, x), tb_gshape(b, y));
}

/* ---- dot, matmul */

/* Vectors get a dimension that the result lacks; what is in front broadcasts. */
static struct tb_gtensor *matmul(struct tb_grun *r, struct tb_gtensor *a, struct tb_gtensor *b)
{
    struct contraction c = {0};
    int64_t sa[TB_G_RANK], sb[TB_G_RANK];
    if (!a || !b) return NULL;
    if (a->rank == 0 || b->rank == 0) {
        tb_gfail(r, TB_EINVAL, "needs at least one dimension");
        return NULL;
    }
    tb_gt_strides(a, a->rank, sa);
    tb_gt_strides(b, b->rank, sb);
    int batch_a = TB_MAX(a->rank - 2, 0), batch_b = TB_MAX(b->rank - 2, 0);
    int batch = TB_MAX(batch_a, batch_b);
    for (int d = 0; d < batch; d++) {
        int da = d - (batch - batch_a), db = d - (batch - batch_b);
        int64_t na = da < 0 ? 1 : a->shape[da], nb = db < 0 ? 1 : b->shape[db];
        if (na != nb && na != 1 && nb != 1) {
            mismatch(r, a, b);
            return NULL;
        }
        c.size[c.n] = na == 1 ? nb : na;
        c.a[c.n] = da < 0 ? 0 : sa[da];
        c.b[c.n++] = db < 0 ? 0 : sb[db];
    }
    int inner_a = a->rank - 1, inner_b = b->rank == 1 ? 0 : b->rank - 2;
    if (a->rank > 1) {
        c.size[c.n] = a->shape[a->rank - 2];
        c.a[c.n++] = sa[a->rank - 2];
    }
    if (b->rank > 1) {
        c.size[c.n] = b->shape[b->rank - 1];
        c.b[c.n++] = sb[b->rank - 1];
    }
    c.n_out = c.n;
    if (a->shape[inner_a] != b->shape[inner_b]) {
        mismatch(r, a, b);
        return NULL;
    }
    c.size[c.n] = a->shape[inner_a];
    c.a[c.n] = sa[inner_a];
    c.b[c.n++] = sb[inner_b];
    return contract(r, a, b, &c);
}

/* p: "abab", the ranks that are allowed, one pair after the other; NULL: any */
static int run_matmul(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *a = tb_garg_tensor(r, 0), *b = a ? tb_garg_tensor(r, 1) : NULL;
    const char *ranks = r->op->p;
    if (!b) return r->rc;
    if (ranks && (a->rank != ranks[0] - '0' || b->rank != ranks[1] - '0'))
        return tb_gfail(r, TB_EINVAL, "needs tensors of %c and %c dimensions", ranks[0], ranks[1]);
    return tb_gout(r, out, matmul(r, a, b));
}

static int run_outer(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *a = tb_garg_tensor(r, 0), *b = a ? tb_garg_tensor(r, 1) : NULL;
    if (!b) return r->rc;
    if (a->rank != 1 || b->rank != 1) return tb_gfail(r, TB_EINVAL, "needs two vectors");
    int64_t column[2] = {a->n, 1};
    return tb_gout(r, out, tb_gt_binary(r, TB_GB_MUL, tb_gt_view(r, a, 2, column), b, 0));
}

/* Sum over the last dimension of both; what is in front of it in a, then in b, stays. */
static int run_inner(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *a = tb_garg_tensor(r, 0), *b = a ? tb_garg_tensor(r, 1) : NULL;
    struct contraction c = {0};
    int64_t sa[TB_G_RANK], sb[TB_G_RANK];
    if (!b) return r->rc;
    if (a->rank == 0 || b->rank == 0) return tb_gfail(r, TB_EINVAL, "needs dimensions");
    int la = a->rank - 1, lb = b->rank - 1;
    if (a->shape[la] != b->shape[lb]) return mismatch(r, a, b);
    tb_gt_strides(a, a->rank, sa);
    tb_gt_strides(b, b->rank, sb);
    for (int d = 0; d < la; d++, c.n++) {
        c.size[c.n] = a->shape[d];
        c.a[c.n] = sa[d];
    }
    for (int d = 0; d < lb; d++, c.n++) {
        c.size[c.n] = b->shape[d];
        c.b[c.n] = sb[d];
    }
    c.n_out = c.n;
    c.size[c.n] = a->shape[la];
    c.a[c.n] = sa[la];
    c.b[c.n++] = sb[lb];
    return tb_gout(r, out, contract(r, a, b, &c));
}

/* ---- einsum */

struct einsum {
    int64_t size[MAX_LABELS]; /* -1: not seen */
    char out[TB_G_RANK + 1];
};

static int label_of(struct tb_grun *r, char ch)
{
    if (ch >= 'a' && ch <= 'z') return ch - 'a';
    tb_gfail(r, TB_EUNSUPPORTED, "the equation may only have small letters, commas and an arrow");
    return -1;
}

/* The labels of operand t, n characters at p, into strides; sizes are gathered. */
static int operand(struct tb_grun *r, struct einsum *e, const struct tb_gtensor *t, const char *p,
                   int n, int64_t *strides)
{
    int64_t own[TB_G_RANK];
    memset(strides, 0, MAX_LABELS * sizeof(*strides));
    if (n != t->rank)
        return tb_gfail(r, TB_EINVAL, "the equation has %d labels for a tensor of %d dimensions", n,
                        t->rank);
    tb_gt_strides(t, t->rank, own);
    for (int d = 0; d < n; d++) {
        int l = label_of(r, p[d]);
        if (l < 0) return r->rc;
        if (e->size[l] < 0 || e->size[l] == 1) e->size[l] = t->shape[d];
        if (t->shape[d] != e->size[l] && t->shape[d] != 1)
            return tb_gfail(r, TB_EINVAL, "label %c has sizes %lld and %lld", p[d],
                            (long long)e->size[l], (long long)t->shape[d]);
        strides[l] += own[d];
    }
    return 0;
}

/* One step: a and b to the labels in keep. */
static struct tb_gtensor *einsum_pair(struct tb_grun *r, struct tb_gtensor *a, const char *la,
                                      struct tb_gtensor *b, const char *lb, const char *keep)
{
    struct einsum e;
    struct contraction c = {0};
    int64_t sa[MAX_LABELS], sb[MAX_LABELS];
    unsigned taken = 0;
    for (int l = 0; l < MAX_LABELS; l++)
        e.size[l] = -1;
    if (operand(r, &e, a, la, (int)strlen(la), sa) || operand(r, &e, b, lb, (int)strlen(lb), sb))
        return NULL;
    for (const char *p = keep; *p; p++, c.n++) {
        int l = label_of(r, *p);
        if (l < 0) return NULL;
        if (e.size[l] < 0 || (taken & (1u << l))) {
            tb_gfail(r, TB_EINVAL, "label %c of the result is unknown or twice there", *p);
            return NULL;
        }
        taken |= 1u << l;
        c.size[c.n] = e.size[l];
        c.a[c.n] = sa[l];
        c.b[c.n] = sb[l];
    }
    c.n_out = c.n;
    for (int l = 0; l < MAX_LABELS; l++) {
        if (e.size[l] < 0 || (taken & (1u << l))) continue;
        c.size[c.n] = e.size[l];
        c.a[c.n] = sa[l];
        c.b[c.n++] = sb[l];
    }
    return contract(r, a, b, &c);
}

/* Splits the equation; labels[i] of each operand, out of the result. */
static int split_equation(struct tb_grun *r, const char *text, int n, char labels[][TB_G_RANK + 1],
                          char *out)
{
    int count[MAX_LABELS] = {0}, i = 0, len = 0, l;
    const char *p = text;
    labels[0][0] = 0;
    for (; *p && *p != '-'; p++) {
        if (isspace((unsigned char)*p)) continue;
        if (*p == ',') {
            if (++i >= n) break;
            labels[i][len = 0] = 0;
            continue;
        }
        if ((l = label_of(r, *p)) < 0) return r->rc;
        if (len >= TB_G_RANK) return tb_gfail(r, TB_ETOOBIG, "too many labels");
        count[l]++;
        labels[i][len++] = *p;
        labels[i][len] = 0;
    }
    if (i != n - 1) return tb_gfail(r, TB_EINVAL, "the equation does not have %d operands", n);
    len = 0;
    if (*p == '-') {
        if (*++p != '>') return tb_gfail(r, TB_EINVAL, "the equation has a lone '-'");
        for (p++; *p; p++) {
            if (isspace((unsigned char)*p)) continue;
            if (len >= TB_G_RANK) return tb_gfail(r, TB_ETOOBIG, "too many labels");
            out[len++] = *p;
        }
    } else {
        for (l = 0; l < MAX_LABELS; l++)
            if (count[l] == 1) {
                if (len >= TB_G_RANK) return tb_gfail(r, TB_ETOOBIG, "too many labels");
                out[len++] = (char)('a' + l);
            }
    }
    out[len] = 0;
    return 0;
}

#define MAX_OPERANDS 8

static int run_einsum(struct tb_grun *r, struct tb_gvalue *out)
{
    const char *text = "";
    const struct tb_gvalue *list = &r->args[1];
    char labels[MAX_OPERANDS][TB_G_RANK + 1], result[TB_G_RANK + 1], now[TB_G_RANK + 1];
    struct tb_gtensor *t;
    if (tb_garg_str(r, 0, &text)) return r->rc;
    if (list->kind == TB_GV_LIST && list->list.n == 1 && list->list.v[0].kind == TB_GV_LIST)
        list = &list->list.v[0];
    int n = list->kind == TB_GV_LIST ? list->list.n : 0;
    if (n < 1 || n > MAX_OPERANDS)
        return tb_gfail(r, TB_EINVAL, "needs 1 to %d tensors", MAX_OPERANDS);
    for (int i = 0; i < n; i++)
        if (list->list.v[i].kind != TB_GV_TENSOR)
            return tb_gfail(r, TB_EINVAL, "needs tensors, not %s", tb_gkind_name(&list->list.v[i]));
    if (split_equation(r, text, n, labels, result)) return r->rc;
    t = list->list.v[0].t;
    memcpy(now, labels[0], sizeof(now));
    for (int i = n == 1 ? 0 : 1; i < n; i++) {
        char keep[2 * TB_G_RANK + 1];
        int len = 0;
        struct tb_gtensor *b =
            i ? list->list.v[i].t : tb_gt_like(r, t->type, &(struct tb_gtensor){0});
        if (!b) return r->rc;
        if (!i) tb_gt_fill(b, 1);
        for (int l = 0; l < MAX_LABELS; l++) { /* what later operands or the result need */
            char ch = (char)('a' + l);
            bool here = strchr(now, ch) || (i && strchr(labels[i], ch)), later = strchr(result, ch);
            for (int j = i + 1; j < n; j++)
                later |= strchr(labels[j], ch) != NULL;
            if (here && later) keep[len++] = ch;
        }
        keep[len] = 0;
        if (i < n - 1 && len > TB_G_RANK) return tb_gfail(r, TB_ETOOBIG, "too many labels");
        const char *to = i == n - 1 ? result : keep;
        if (!(t = einsum_pair(r, t, now, b, i ? labels[i] : "", to))) return r->rc;
        memcpy(now, to, strlen(to) + 1);
    }
    return tb_gout(r, out, t);
}

static const struct tb_gop ops[] = {
    {"operator.matmul torch.matmul .matmul", "input other !out", run_matmul, NULL},
    {"torch.dot torch.vdot .dot .vdot", "input tensor !out", run_matmul, "11"},
    {"torch.mv .mv", "input vec !out", run_matmul, "21"},
    {"torch.mm .mm", "input mat2 !out", run_matmul, "22"},
    {"torch.bmm .bmm", "input mat2 !out", run_matmul, "33"},
    {"torch.outer torch.ger .outer", "input vec2 !out", run_outer, NULL},
    {"torch.inner .inner", "input other !out", run_inner, NULL},
    {"torch.functional.einsum torch.einsum", "equation *operands", run_einsum, NULL},
};

const struct tb_gops tb_gops_product = {ops, (int)TB_ARRAY_LEN(ops)};
