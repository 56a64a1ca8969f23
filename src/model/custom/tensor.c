/*
 * Tensors of a custom loss: making them, type promotion, broadcasting, walks over shapes, casts,
 * views and picks. See custom.h.
 *
 * Owner: the run's arena. Thread: the run's.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "model/custom/custom.h"
#include "util/mem.h"

const char *tb_gtype_name(enum tb_gtype t)
{
    static const char *const names[] = {"bool", "int64", "float32", "float64"};
    return names[t];
}

const char *tb_gshape(const struct tb_gtensor *t, char buf[96])
{
    size_t n = 1;
    buf[0] = '[';
    buf[1] = 0;
    for (int i = 0; i < t->rank && n < 80; i++)
        n += (size_t)snprintf(buf + n, 96 - n, "%s%lld", i ? ", " : "", (long long)t->shape[i]);
    if (n < 95) snprintf(buf + n, 96 - n, "]");
    return buf;
}

/* Elements of a shape; the product of its sizes is bounded even where one is 0, so that strides
 * cannot overflow. */
static int count(struct tb_grun *r, int rank, const int64_t *shape, int64_t *out)
{
    int64_t n = 1;
    bool empty = false;
    if (rank > TB_G_RANK)
        return tb_gfail(r, TB_ETOOBIG, "a tensor of %d dimensions; at most %d are supported", rank,
                        TB_G_RANK);
    for (int i = 0; i < rank; i++) {
        if (shape[i] < 0)
            return tb_gfail(r, TB_EINVAL, "a dimension of size %lld", (long long)shape[i]);
        empty |= shape[i] == 0;
        if (__builtin_mul_overflow(n, TB_MAX(shape[i], 1), &n) || n > TB_G_ELEMENTS)
            return tb_gfail(r, TB_ETOOBIG, "a tensor of more than %lld elements", TB_G_ELEMENTS);
    }
    *out = empty ? 0 : n;
    return 0;
}

struct tb_gtensor *tb_gt_new(struct tb_grun *r, enum tb_gtype type, int rank, const int64_t *shape)
{
    int64_t n;
    if (count(r, rank, shape, &n)) return NULL;
    if (tb_gwork(r, n + 16)) return NULL;
    struct tb_gtensor *t = tb_galloc(r, 1, sizeof(*t));
    if (!t) return NULL;
    *t = (struct tb_gtensor){.type = type, .rank = rank, .n = n};
    if (rank) memcpy(t->shape, shape, (size_t)rank * sizeof(*shape));
    t->f = tb_galloc(r, n, sizeof(*t->f));
    return t->f ? t : NULL;
}

struct tb_gtensor *tb_gt_like(struct tb_grun *r, enum tb_gtype type, const struct tb_gtensor *x)
{
    return tb_gt_new(r, type, x->rank, x->shape);
}

struct tb_gtensor *tb_gt_number(struct tb_grun *r, double v)
{
    struct tb_gtensor *t = tb_gt_new(r, TB_GT_F64, 0, NULL);
    if (!t) return NULL;
    t->weak = true;
    t->f[0] = v;
    return t;
}

struct tb_gtensor *tb_gt_int(struct tb_grun *r, int64_t v)
{
    struct tb_gtensor *t = tb_gt_new(r, TB_GT_INT, 0, NULL);
    if (!t) return NULL;
    t->weak = true;
    t->i[0] = v;
    return t;
}

void tb_gt_fill(struct tb_gtensor *t, double v)
{
    for (int64_t i = 0; i < t->n; i++) {
        if (tb_gt_is_float(t->type))
            t->f[i] = tb_ground(t->type, v);
        else
            t->i[i] = t->type == TB_GT_BOOL ? v != 0 : tb_gto_int(v);
    }
}

double *tb_gt_grad(struct tb_grun *r, struct tb_gtensor *t)
{
    if (!t->g && (t->g = tb_galloc(r, t->n, sizeof(*t->g))))
        memset(t->g, 0, (size_t)t->n * sizeof(*t->g));
    return t->g;
}

struct tb_gstep *tb_gt_step(struct tb_grun *r, struct tb_gtensor *out, struct tb_gtensor *a,
                            struct tb_gtensor *b, struct tb_gtensor *c,
                            int (*back)(struct tb_grun *, struct tb_gstep *))
{
    if (!tb_gt_is_float(out->type) || !((a && a->needs) || (b && b->needs) || (c && c->needs)))
        return NULL;
    struct tb_gstep *s = tb_galloc(r, 1, sizeof(*s));
    if (!s) return NULL;
    *s = (struct tb_gstep){
        .before = r->tape, .node = r->node, .back = back, .out = out, .a = a, .b = b, .c = c};
    r->tape = s;
    out->needs = true;
    return s;
}

/* ---- types */

static int category(enum tb_gtype t)
{
    return TB_MIN((int)t, (int)TB_GT_F32);
}

/* Tensors with dimensions decide; those without, and then numbers, only lift the category. */
enum tb_gtype tb_gt_promote(const struct tb_gtensor *const *t, int n)
{
    int best[3] = {-1, -1, -1};
    for (int i = 0; i < n; i++) {
        int c = t[i]->weak ? 2 : t[i]->rank == 0 ? 1 : 0;
        int type = t[i]->weak ? category(t[i]->type) : (int)t[i]->type;
        best[c] = TB_MAX(best[c], type);
    }
    int out = best[0];
    for (int c = 1; c < 3; c++)
        if (best[c] >= 0 &&
            (out < 0 || category((enum tb_gtype)best[c]) > category((enum tb_gtype)out)))
            out = best[c];
    return (enum tb_gtype)out;
}

static int back_same(struct tb_grun *r, struct tb_gstep *s)
{
    double *g = tb_gt_grad(r, s->a);
    if (!g) return r->rc;
    for (int64_t i = 0; i < s->a->n; i++)
        g[i] += s->out->g[i];
    return 0;
}

struct tb_gtensor *tb_gt_cast(struct tb_grun *r, struct tb_gtensor *x, enum tb_gtype type)
{
    if (!x || x->type == type) return x;
    struct tb_gtensor *y = tb_gt_like(r, type, x);
    if (!y) return NULL;
    for (int64_t i = 0; i < x->n; i++) {
        if (tb_gt_is_float(type))
            y->f[i] = tb_ground(type, tb_gt_at(x, i));
        else if (type == TB_GT_BOOL)
            y->i[i] = tb_gt_is_float(x->type) ? x->f[i] != 0 : x->i[i] != 0;
        else
            y->i[i] = tb_gt_is_float(x->type) ? tb_gto_int(x->f[i]) : x->i[i];
    }
    tb_gt_step(r, y, x, NULL, NULL, back_same);
    return r->rc ? NULL : y;
}

/* A second tensor over the same cells. */
static struct tb_gtensor *share(struct tb_grun *r, struct tb_gtensor *x)
{
    struct tb_gtensor *y = tb_galloc(r, 1, sizeof(*y));
    if (!y || tb_gwork(r, 16)) return NULL;
    *y = *x;
    y->needs = y->weak = false;
    y->g = NULL;
    return y;
}

struct tb_gtensor *tb_gt_detach(struct tb_grun *r, struct tb_gtensor *x)
{
    return x ? share(r, x) : NULL;
}

struct tb_gtensor *tb_gt_view(struct tb_grun *r, struct tb_gtensor *x, int rank,
                              const int64_t *shape)
{
    int64_t n;
    if (!x || count(r, rank, shape, &n)) return NULL;
    if (n != x->n) {
        char buf[96];
        tb_gfail(r, TB_EINVAL, "a tensor of shape %s does not fit the new shape",
                 tb_gshape(x, buf));
        return NULL;
    }
    struct tb_gtensor *y = share(r, x);
    if (!y) return NULL;
    y->rank = rank;
    memmove(y->shape, shape, (size_t)rank * sizeof(*shape));
    tb_gt_step(r, y, x, NULL, NULL, back_same);
    return r->rc ? NULL : y;
}

/* ---- picks */

static int back_pick(struct tb_grun *r, struct tb_gstep *s)
{
    double *g = tb_gt_grad(r, s->a);
    if (!g) return r->rc;
    for (int64_t i = 0; i < s->out->n; i++)
        if (s->map[i] >= 0) g[s->map[i]] += s->out->g[i];
    return 0;
}

struct tb_gtensor *tb_gt_pick(struct tb_grun *r, struct tb_gtensor *x, int rank,
                              const int64_t *shape, int32_t *map, double fill)
{
    if (!x || !map) return NULL;
    struct tb_gtensor *y = tb_gt_new(r, x->type, rank, shape);
    if (!y) return NULL;
    if (tb_gt_is_float(x->type)) {
        fill = tb_ground(x->type, fill);
        for (int64_t i = 0; i < y->n; i++)
            y->f[i] = map[i] < 0 ? fill : x->f[map[i]];
    } else {
        int64_t f = x->type == TB_GT_BOOL ? fill != 0 : tb_gto_int(fill);
        for (int64_t i = 0; i < y->n; i++)
            y->i[i] = map[i] < 0 ? f : x->i[map[i]];
    }
    struct tb_gstep *s = tb_gt_step(r, y, x, NULL, NULL, back_pick);
    if (s) s->map = map;
    return r->rc ? NULL : y;
}

/* ---- broadcasting */

int tb_gt_broadcast(struct tb_grun *r, const struct tb_gtensor *const *t, int n, int *rank,
                    int64_t *shape)
{
    *rank = 0;
    for (int i = 0; i < n; i++)
        *rank = TB_MAX(*rank, t[i]->rank);
    for (int d = 0; d < *rank; d++) {
        shape[d] = 1;
        for (int i = 0; i < n; i++) {
            int at = d - (*rank - t[i]->rank);
            if (at < 0 || t[i]->shape[at] == 1 || t[i]->shape[at] == shape[d]) continue;
            if (shape[d] != 1) {
                char a[96], b[96];
                return tb_gfail(r, TB_EINVAL, "shapes %s and %s do not broadcast",
                                tb_gshape(t[0], a), tb_gshape(t[i], b));
            }
            shape[d] = t[i]->shape[at];
        }
    }
    return 0;
}

void tb_gt_strides(const struct tb_gtensor *x, int rank, int64_t *out)
{
    int64_t s = 1;
    for (int d = rank - 1; d >= 0; d--) {
        int at = d - (rank - x->rank);
        int64_t size = at < 0 ? 1 : x->shape[at];
        out[d] = size == 1 ? 0 : s;
        s *= size;
    }
}

void tb_gwalk_init(struct tb_gwalk *w, int rank, const int64_t *shape, int n,
                   int64_t strides[][TB_G_RANK])
{
    *w = (struct tb_gwalk){.rank = rank ? rank - 1 : 0, .n = n, .len = 1, .left = 1};
    if (rank) w->len = shape[rank - 1];
    for (int d = 0; d < w->rank; d++) {
        w->shape[d] = shape[d];
        w->left *= shape[d];
    }
    if (w->len == 0) w->left = 0;
    for (int k = 0; k < n; k++) {
        if (rank) w->in[k] = strides[k][rank - 1];
        for (int d = 0; d < w->rank; d++)
            w->step[k][d] = strides[k][d];
    }
}

void tb_gwalk_next(struct tb_gwalk *w)
{
    w->left--;
    for (int d = w->rank - 1; d >= 0; d--) {
        for (int k = 0; k < w->n; k++)
            w->at[k] += w->step[k][d];
        if (++w->pos[d] < w->shape[d]) return;
        for (int k = 0; k < w->n; k++)
            w->at[k] -= w->step[k][d] * w->shape[d];
        w->pos[d] = 0;
    }
}

struct tb_gtensor *tb_gt_expand(struct tb_grun *r, struct tb_gtensor *x, int rank,
                                const int64_t *shape)
{
    int64_t strides[1][TB_G_RANK], n = 1, at = 0;
    if (!x) return NULL;
    bool ok = rank >= x->rank && rank <= TB_G_RANK, same = rank == x->rank;
    for (int d = 0; d < rank && ok; d++) {
        int from = d - (rank - x->rank);
        int64_t size = from < 0 ? 1 : x->shape[from];
        ok = shape[d] >= 0 && (size == 1 || size == shape[d]) &&
             !__builtin_mul_overflow(n, shape[d], &n) && n <= TB_G_ELEMENTS;
        same &= size == shape[d];
    }
    if (!ok) {
        char buf[96];
        tb_gfail(r, n > TB_G_ELEMENTS ? TB_ETOOBIG : TB_EINVAL,
                 "a tensor of shape %s does not expand to the shape asked for", tb_gshape(x, buf));
        return NULL;
    }
    if (same) return x;
    int32_t *map = tb_galloc(r, n, sizeof(*map));
    if (!map) return NULL;
    struct tb_gwalk w;
    tb_gt_strides(x, rank, strides[0]);
    for (tb_gwalk_init(&w, rank, shape, 1, strides); w.left > 0; tb_gwalk_next(&w))
        for (int64_t j = 0; j < w.len; j++)
            map[at++] = (int32_t)(w.at[0] + j * w.in[0]);
    return tb_gt_pick(r, x, rank, shape, map, 0);
}
