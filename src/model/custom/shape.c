/*
 * Operations on shapes: attributes and sizes, views, transpositions, expansions, indexing and
 * gathering. See custom.h.
 *
 * Owner: the run's arena. Thread: the run's.
 */
#include <string.h>

#include "model/custom/custom.h"
#include "util/mem.h"

static int out_shape(struct tb_grun *r, struct tb_gvalue *out, const struct tb_gtensor *x)
{
    struct tb_gvalue *v = tb_galloc(r, x->rank, sizeof(*v));
    if (!v) return r->rc;
    for (int d = 0; d < x->rank; d++)
        tb_gout_int(&v[d], x->shape[d]);
    *out = (struct tb_gvalue){.kind = TB_GV_LIST, .tuple = true};
    out->list.v = v;
    out->list.n = x->rank;
    return 0;
}

/* ---- transpositions: new dimension d is order[d] of x */

static struct tb_gtensor *permute(struct tb_grun *r, struct tb_gtensor *x, const int *order)
{
    int64_t shape[TB_G_RANK], st[1][TB_G_RANK], own[TB_G_RANK], at = 0;
    struct tb_gwalk w;
    bool same = true;
    tb_gt_strides(x, x->rank, own);
    for (int d = 0; d < x->rank; d++) {
        shape[d] = x->shape[order[d]];
        st[0][d] = own[order[d]];
        same &= order[d] == d;
    }
    if (same) return x;
    int32_t *map = tb_galloc(r, x->n, sizeof(*map));
    if (!map) return NULL;
    for (tb_gwalk_init(&w, x->rank, shape, 1, st); w.left > 0; tb_gwalk_next(&w))
        for (int64_t j = 0; j < w.len; j++)
            map[at++] = (int32_t)(w.at[0] + j * w.in[0]);
    return tb_gt_pick(r, x, x->rank, shape, map, 0);
}

static struct tb_gtensor *swap(struct tb_grun *r, struct tb_gtensor *x, int a, int b)
{
    int order[TB_G_RANK];
    for (int d = 0; d < TB_G_RANK; d++)
        order[d] = d == a ? b : d == b ? a : d;
    return permute(r, x, order);
}

static struct tb_gtensor *reversed(struct tb_grun *r, struct tb_gtensor *x)
{
    int order[TB_G_RANK];
    for (int d = 0; d < x->rank; d++)
        order[d] = x->rank - 1 - d;
    return permute(r, x, order);
}

static int run_transpose(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    int a = 0, b = 0;
    if (!x || tb_garg_dim(r, 1, x->rank, &a) || tb_garg_dim(r, 2, x->rank, &b)) return r->rc;
    return tb_gout(r, out, swap(r, x, a, b));
}

static int run_t(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    if (!x) return r->rc;
    if (x->rank > 2) return tb_gfail(r, TB_EINVAL, "takes at most two dimensions");
    return tb_gout(r, out, reversed(r, x));
}

static int run_permute(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    int64_t dims[TB_G_RANK];
    int n, order[TB_G_RANK];
    unsigned seen = 0;
    if (!x || tb_garg_ints(r, 1, TB_G_RANK, dims, &n)) return r->rc;
    if (n != x->rank) return tb_gfail(r, TB_EINVAL, "needs all %d dimensions", x->rank);
    for (int d = 0; d < n; d++) {
        if (tb_gdim(r, dims[d], x->rank, &order[d])) return r->rc;
        seen |= 1u << order[d];
    }
    if (seen != tb_gt_all_dims(x)) return tb_gfail(r, TB_EINVAL, "a dimension is there twice");
    return tb_gout(r, out, permute(r, x, order));
}

/* ---- attributes and sizes */

static int run_getattr(struct tb_grun *r, struct tb_gvalue *out)
{
    const char *name = "";
    const struct tb_gvalue *v = &r->args[0];
    if (tb_garg_str(r, 1, &name)) return r->rc;
    if (v->kind == TB_GV_LIST && v->named) {
        bool values = !strcmp(name, "values");
        if (!values && strcmp(name, "indices"))
            return tb_gfail(r, TB_EUNSUPPORTED, "attribute %.32s is not supported", name);
        *out = v->list.v[values ? 0 : 1];
        return 0;
    }
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    if (!x) return r->rc;
    if (!strcmp(name, "shape")) return out_shape(r, out, x);
    if (!strcmp(name, "ndim"))
        tb_gout_int(out, x->rank);
    else if (!strcmp(name, "dtype"))
        *out = (struct tb_gvalue){.kind = TB_GV_DTYPE, .type = x->type};
    else if (!strcmp(name, "device"))
        *out = (struct tb_gvalue){.kind = TB_GV_OTHER, .s = "cpu"};
    else if (!strcmp(name, "requires_grad"))
        tb_gout_bool(out, x->needs);
    else if (!strcmp(name, "T"))
        return tb_gout(r, out, reversed(r, x));
    else if (!strcmp(name, "mT") && x->rank >= 2)
        return tb_gout(r, out, swap(r, x, x->rank - 1, x->rank - 2));
    else
        return tb_gfail(r, TB_EUNSUPPORTED, "attribute %.32s is not supported", name);
    return 0;
}

static int run_size(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    int dim = 0;
    if (!x) return r->rc;
    if (!tb_garg_given(r, 1)) return out_shape(r, out, x);
    if (tb_garg_dim(r, 1, x->rank, &dim)) return r->rc;
    if (x->rank == 0) return tb_gfail(r, TB_EINVAL, "a number has no dimensions");
    tb_gout_int(out, x->shape[dim]);
    return 0;
}

static int run_numel(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    if (x) tb_gout_int(out, r->op->p ? x->rank : x->n);
    return r->rc;
}

static int run_is_float(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    if (x) tb_gout_bool(out, tb_gt_is_float(x->type));
    return r->rc;
}

/* ---- views */

static int run_view(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    int64_t shape[TB_G_RANK], known = 1;
    int n, free_dim = -1;
    if (!x || tb_garg_ints(r, 1, TB_G_RANK, shape, &n)) return r->rc;
    for (int d = 0; d < n; d++) {
        if (shape[d] == -1) {
            if (free_dim >= 0) return tb_gfail(r, TB_EINVAL, "only one size may be -1");
            free_dim = d;
        } else if (shape[d] < 0 || __builtin_mul_overflow(known, shape[d], &known)) {
            return tb_gfail(r, TB_EINVAL, "a size is negative or too large");
        }
    }
    if (free_dim >= 0) {
        if (known == 0) return tb_gfail(r, TB_EINVAL, "-1 is ambiguous here");
        shape[free_dim] = x->n / known;
    }
    return tb_gout(r, out, tb_gt_view(r, x, TB_MAX(n, 0), shape));
}

static int run_view_as(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0), *y = x ? tb_garg_tensor(r, 1) : NULL;
    if (!y) return r->rc;
    return tb_gout(r, out, tb_gt_view(r, x, y->rank, y->shape));
}

static int run_flatten(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    int64_t from = 0, to = -1, shape[TB_G_RANK];
    int a, b, n = 0;
    if (!x || tb_garg_int(r, 1, &from) || tb_garg_int(r, 2, &to) || tb_gdim(r, from, x->rank, &a) ||
        tb_gdim(r, to, x->rank, &b))
        return r->rc;
    if (a > b) return tb_gfail(r, TB_EINVAL, "start_dim is after end_dim");
    if (x->rank == 0) {
        shape[n++] = 1;
    } else {
        for (int d = 0; d < x->rank; d++) {
            if (d > a && d <= b)
                shape[n - 1] *= x->shape[d];
            else
                shape[n++] = x->shape[d];
        }
    }
    return tb_gout(r, out, tb_gt_view(r, x, n, shape));
}

static int run_unsqueeze(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    int64_t shape[TB_G_RANK + 1], at = 0;
    int dim, n = 0;
    if (!x || tb_garg_int(r, 1, &at) || tb_gdim(r, at, x->rank + 1, &dim)) return r->rc;
    for (int d = 0; d <= x->rank; d++)
        shape[d] = d == dim ? 1 : x->shape[n++];
    return tb_gout(r, out, tb_gt_view(r, x, x->rank + 1, shape));
}

static int run_squeeze(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    int64_t list[TB_G_RANK], shape[TB_G_RANK];
    int n, dim, rank = 0;
    unsigned dims = 0;
    if (!x || tb_garg_ints(r, 1, TB_G_RANK, list, &n)) return r->rc;
    for (int i = 0; i < n; i++) {
        if (tb_gdim(r, list[i], x->rank, &dim)) return r->rc;
        dims |= 1u << dim;
    }
    if (n < 0) dims = ~0u;
    for (int d = 0; d < x->rank; d++)
        if (x->shape[d] != 1 || !(dims & (1u << d))) shape[rank++] = x->shape[d];
    return tb_gout(r, out, tb_gt_view(r, x, rank, shape));
}

/* ---- expansions */

static int run_expand(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    int64_t shape[TB_G_RANK];
    int n;
    if (!x || tb_garg_ints(r, 1, TB_G_RANK, shape, &n)) return r->rc;
    for (int d = 0; d < n; d++) {
        int from = d - (n - x->rank);
        if (shape[d] == -1 && from >= 0) shape[d] = x->shape[from];
    }
    return tb_gout(r, out, tb_gt_expand(r, x, TB_MAX(n, 0), shape));
}

static int run_expand_as(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0), *y = x ? tb_garg_tensor(r, 1) : NULL;
    if (!y) return r->rc;
    return tb_gout(r, out, tb_gt_expand(r, x, y->rank, y->shape));
}

/* Maps each position of shape to x; at[] gives the position, and the callback the element. */
struct mapper {
    const struct tb_gtensor *x;
    int64_t strides[TB_G_RANK];
    int64_t a[TB_G_RANK]; /* what the operation needs for each dimension */
    int64_t k;
};

static struct tb_gtensor *map_all(struct tb_grun *r, struct mapper *m, int rank,
                                  const int64_t *shape, double fill,
                                  int64_t (*element)(const struct mapper *, const int64_t *pos))
{
    int64_t pos[TB_G_RANK] = {0}, n = 1, s = 1;
    if (rank > TB_G_RANK) {
        tb_gfail(r, TB_ETOOBIG, "too many dimensions");
        return NULL;
    }
    for (int d = 0; d < rank; d++)
        if (shape[d] < 0 || __builtin_mul_overflow(n, shape[d], &n) || n > TB_G_ELEMENTS) {
            tb_gfail(r, TB_ETOOBIG, "a tensor of too many elements");
            return NULL;
        }
    for (int d = m->x->rank - 1; d >= 0; d--) {
        m->strides[d] = s;
        s *= m->x->shape[d];
    }
    int32_t *map = tb_galloc(r, n, sizeof(*map));
    if (!map) return NULL;
    for (int64_t i = 0; i < n; i++) {
        map[i] = (int32_t)element(m, pos);
        for (int d = rank - 1; d >= 0 && ++pos[d] == shape[d]; d--)
            pos[d] = 0;
    }
    return tb_gt_pick(r, (struct tb_gtensor *)(uintptr_t)m->x, rank, shape, map, fill);
}

static int64_t repeat_at(const struct mapper *m, const int64_t *pos)
{
    int64_t at = 0;
    for (int d = 0; d < m->x->rank; d++)
        at += pos[d + m->k] % m->x->shape[d] * m->strides[d];
    return at;
}

/* p: tile, which takes fewer repeats than dimensions */
static int run_repeat(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    int64_t times[TB_G_RANK], shape[TB_G_RANK];
    int n;
    if (!x || tb_garg_ints(r, 1, TB_G_RANK, times, &n)) return r->rc;
    n = TB_MAX(n, 0);
    if (n < x->rank && !r->op->p)
        return tb_gfail(r, TB_EINVAL, "needs a number for each dimension");
    int rank = TB_MAX(n, x->rank);
    struct mapper m = {.x = x, .k = rank - x->rank};
    for (int d = 0; d < rank; d++) {
        int64_t t = d < rank - n ? 1 : times[d - (rank - n)];
        int64_t size = d < m.k ? 1 : x->shape[d - m.k];
        if (t < 0 || __builtin_mul_overflow(t, size, &shape[d]))
            return tb_gfail(r, TB_ETOOBIG, "too many repeats");
    }
    return tb_gout(r, out, map_all(r, &m, rank, shape, 0, repeat_at));
}

static int64_t flip_at(const struct mapper *m, const int64_t *pos)
{
    int64_t at = 0;
    for (int d = 0; d < m->x->rank; d++)
        at += (m->a[d] ? m->x->shape[d] - 1 - pos[d] : pos[d]) * m->strides[d];
    return at;
}

static int run_flip(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    int64_t dims[TB_G_RANK];
    int n, dim;
    if (!x || tb_garg_ints(r, 1, TB_G_RANK, dims, &n)) return r->rc;
    struct mapper m = {.x = x};
    for (int i = 0; i < n; i++) {
        if (tb_gdim(r, dims[i], x->rank, &dim)) return r->rc;
        m.a[dim] = 1;
    }
    return tb_gout(r, out, map_all(r, &m, x->rank, x->shape, 0, flip_at));
}

static int64_t roll_at(const struct mapper *m, const int64_t *pos)
{
    int64_t at = 0;
    for (int d = 0; d < m->x->rank; d++) {
        int64_t n = m->x->shape[d], i = (pos[d] - m->a[d]) % n;
        at += (i < 0 ? i + n : i) * m->strides[d];
    }
    return at;
}

static int run_roll(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0), *flat;
    int64_t by[TB_G_RANK], dims[TB_G_RANK];
    int n, n_dims, dim;
    if (!x || tb_garg_ints(r, 1, TB_G_RANK, by, &n) || tb_garg_ints(r, 2, TB_G_RANK, dims, &n_dims))
        return r->rc;
    struct mapper m = {.x = x};
    if (n_dims <= 0) { /* over all elements in their order */
        int64_t shape[1] = {x->n};
        if (n != 1) return tb_gfail(r, TB_EINVAL, "needs one shift without dims");
        if (!(m.x = flat = tb_gt_view(r, x, 1, shape))) return r->rc;
        m.a[0] = x->n ? by[0] % x->n : 0;
        flat = map_all(r, &m, 1, shape, 0, roll_at);
        return tb_gout(r, out, tb_gt_view(r, flat, x->rank, x->shape));
    }
    if (n != n_dims) return tb_gfail(r, TB_EINVAL, "needs a shift for each of dims");
    for (int i = 0; i < n; i++) {
        if (tb_gdim(r, dims[i], x->rank, &dim)) return r->rc;
        if (x->rank && x->shape[dim]) m.a[dim] = (m.a[dim] + by[i] % x->shape[dim]);
    }
    return tb_gout(r, out, map_all(r, &m, x->rank, x->shape, 0, roll_at));
}

static int64_t pad_at(const struct mapper *m, const int64_t *pos)
{
    int64_t at = 0;
    for (int d = 0; d < m->x->rank; d++) {
        int64_t i = pos[d] - m->a[d];
        if (i < 0 || i >= m->x->shape[d]) return -1;
        at += i * m->strides[d];
    }
    return at;
}

static int run_pad(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    int64_t pad[2 * TB_G_RANK], shape[TB_G_RANK];
    const char *mode = "constant";
    double value = 0;
    int n;
    if (!x || tb_garg_ints(r, 1, 2 * TB_G_RANK, pad, &n) || tb_garg_str(r, 2, &mode) ||
        tb_garg_double(r, 3, &value))
        return r->rc;
    if (strcmp(mode, "constant"))
        return tb_gfail(r, TB_EUNSUPPORTED, "mode %.32s is not supported", mode);
    if (n < 0 || n % 2 || n / 2 > x->rank)
        return tb_gfail(r, TB_EINVAL, "pad does not fit the tensor");
    struct mapper m = {.x = x};
    memcpy(shape, x->shape, sizeof(shape));
    for (int i = 0; i < n / 2; i++) {
        int d = x->rank - 1 - i;
        m.a[d] = pad[2 * i];
        if (pad[2 * i] < -TB_G_ELEMENTS ||
            __builtin_add_overflow(shape[d], pad[2 * i], &shape[d]) ||
            __builtin_add_overflow(shape[d], pad[2 * i + 1], &shape[d]) || shape[d] < 0)
            return tb_gfail(r, TB_EINVAL, "pad does not fit the tensor");
    }
    return tb_gout(r, out, map_all(r, &m, x->rank, shape, value, pad_at));
}

static int64_t tri_at(const struct mapper *m, const int64_t *pos)
{
    int64_t at = 0, off = pos[m->x->rank - 1] - pos[m->x->rank - 2];
    for (int d = 0; d < m->x->rank; d++)
        at += pos[d] * m->strides[d];
    return (m->a[0] ? off >= m->k : off <= m->k) ? at : -1;
}

static int run_tri(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    struct mapper m = {.x = x, .a = {r->op->p != NULL}};
    if (!x || tb_garg_int(r, 1, &m.k)) return r->rc;
    if (x->rank < 2) return tb_gfail(r, TB_EINVAL, "needs at least two dimensions");
    return tb_gout(r, out, map_all(r, &m, x->rank, x->shape, 0, tri_at));
}

/* ---- indexing and gathering */

static int run_getitem(struct tb_grun *r, struct tb_gvalue *out)
{
    const struct tb_gvalue *v = &r->args[0];
    int64_t i = 0, step, len;
    if (v->kind == TB_GV_TENSOR) return tb_gt_getitem(r, v->t, &r->args[1], out);
    if (v->kind != TB_GV_LIST)
        return tb_gfail(r, TB_EINVAL, "%s cannot be indexed", tb_gkind_name(v));
    if (r->args[1].kind == TB_GV_SLICE) {
        if (tb_gslice(r, &r->args[1], v->list.n, &i, &step, &len)) return r->rc;
        *out = (struct tb_gvalue){.kind = TB_GV_LIST, .tuple = true};
        out->list.n = (int)len;
        if (!(out->list.v = tb_galloc(r, len, sizeof(*v)))) return r->rc;
        for (int64_t k = 0; k < len; k++)
            out->list.v[k] = v->list.v[i + k * step];
        return 0;
    }
    if (tb_gvalue_int(r, &r->args[1], "an index", &i)) return r->rc;
    if (i < -v->list.n || i >= v->list.n)
        return tb_gfail(r, TB_EINVAL, "index %lld is out of range for %d elements", (long long)i,
                        v->list.n);
    *out = v->list.v[i < 0 ? i + v->list.n : i];
    return 0;
}

static struct tb_gtensor *index_arg(struct tb_grun *r, int i)
{
    struct tb_gtensor *t = tb_garg_tensor(r, i);
    if (t && t->type != TB_GT_INT) {
        tb_gfail(r, TB_EINVAL, "index must be int64, not %s", tb_gtype_name(t->type));
        return NULL;
    }
    return t;
}

/* input, dim, index: out[i][j] = input[index[i][j]][j] for dim 0 */
static int run_gather(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0), *index;
    int dim = 0;
    int64_t pos[TB_G_RANK] = {0}, own[TB_G_RANK], s = 1;
    if (!x || tb_garg_dim(r, 1, x->rank, &dim) || !(index = index_arg(r, 2))) return r->rc;
    if (index->rank != x->rank)
        return tb_gfail(r, TB_EINVAL, "index has %d dimensions, input %d", index->rank, x->rank);
    for (int d = x->rank - 1; d >= 0; d--) {
        own[d] = s;
        s *= x->shape[d];
        if (d != dim && index->shape[d] > x->shape[d])
            return tb_gfail(r, TB_EINVAL, "index is larger than input in dimension %d", d);
    }
    int32_t *map = tb_galloc(r, index->n, sizeof(*map));
    if (!map) return r->rc;
    int64_t size = x->rank ? x->shape[dim] : 1;
    for (int64_t i = 0; i < index->n; i++) {
        int64_t at = 0, k = index->i[i];
        if (k < 0 || k >= size)
            return tb_gfail(r, TB_EINVAL, "index %lld is out of range for %lld elements",
                            (long long)k, (long long)size);
        for (int d = 0; d < x->rank; d++)
            at += (d == dim ? k : pos[d]) * own[d];
        map[i] = (int32_t)at;
        for (int d = x->rank - 1; d >= 0 && ++pos[d] == index->shape[d]; d--)
            pos[d] = 0;
    }
    return tb_gout(r, out, tb_gt_pick(r, x, index->rank, index->shape, map, 0));
}

/* input, dim, index [n] */
static int run_index_select(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0), *index;
    struct tb_gvalue items[TB_G_RANK] = {{0}}, tuple = {.kind = TB_GV_LIST, .tuple = true};
    struct tb_gvalue none[3] = {{.kind = TB_GV_NONE}, {.kind = TB_GV_NONE}, {.kind = TB_GV_NONE}};
    int dim = 0;
    if (!x || tb_garg_dim(r, 1, x->rank, &dim) || !(index = index_arg(r, 2))) return r->rc;
    if (index->rank != 1) return tb_gfail(r, TB_EINVAL, "index must have one dimension");
    for (int d = 0; d < dim; d++) {
        items[d].kind = TB_GV_SLICE;
        items[d].list.v = none;
        items[d].list.n = 3;
    }
    items[dim] = (struct tb_gvalue){.kind = TB_GV_TENSOR, .t = index};
    tuple.list.v = items;
    tuple.list.n = dim + 1;
    return tb_gt_getitem(r, x, &tuple, out);
}

static int run_masked_select(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0), *mask = x ? tb_garg_tensor(r, 1) : NULL;
    const struct tb_gtensor *both[] = {x, mask};
    int64_t shape[TB_G_RANK];
    int rank;
    if (!mask || tb_gt_broadcast(r, both, 2, &rank, shape)) return r->rc;
    if (mask->type != TB_GT_BOOL) return tb_gfail(r, TB_EINVAL, "mask must be bool");
    x = tb_gt_expand(r, x, rank, shape);
    mask = tb_gt_expand(r, mask, rank, shape);
    if (!x || !mask) return r->rc;
    int64_t n = 0, k = 0;
    for (int64_t i = 0; i < mask->n; i++)
        n += mask->i[i] != 0;
    int32_t *map = tb_galloc(r, n, sizeof(*map));
    for (int64_t i = 0; map && i < mask->n; i++)
        if (mask->i[i]) map[k++] = (int32_t)i;
    return tb_gout(r, out, tb_gt_pick(r, x, 1, &n, map, 0));
}

/* input, dim, start, length */
static int run_narrow(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    int64_t from = 0, len = 0;
    int dim = 0;
    if (!x || tb_garg_dim(r, 1, x->rank, &dim) || tb_garg_int(r, 2, &from) ||
        tb_garg_int(r, 3, &len))
        return r->rc;
    if (from < 0 && x->rank) from += x->shape[dim];
    return tb_gout(r, out, tb_gt_narrow(r, x, dim, from, len));
}

/* Parts of given sizes along dim as a tuple; drop: without that dimension. */
static int parts(struct tb_grun *r, struct tb_gtensor *x, int dim, int64_t each, bool drop,
                 struct tb_gvalue *out)
{
    int64_t size = x->rank ? x->shape[dim] : 0, shape[TB_G_RANK];
    if (x->rank == 0 || each < 1)
        return tb_gfail(r, TB_EINVAL, "parts of %lld elements", (long long)each);
    int64_t n = size ? (size - 1) / each + 1 : 1;
    if (n > TB_GRAPH_MAX_ARGS) return tb_gfail(r, TB_ETOOBIG, "%lld parts", (long long)n);
    struct tb_gvalue *v = tb_galloc(r, n, sizeof(*v));
    for (int64_t i = 0; v && i < n; i++) {
        struct tb_gtensor *t = tb_gt_narrow(r, x, dim, i * each, TB_MIN(each, size - i * each));
        int rank = 0;
        for (int d = 0; t && drop && d < t->rank; d++)
            if (d != dim) shape[rank++] = t->shape[d];
        if (tb_gout(r, &v[i], drop ? tb_gt_view(r, t, rank, shape) : t)) return r->rc;
    }
    *out = (struct tb_gvalue){.kind = TB_GV_LIST, .tuple = true};
    out->list.v = v;
    out->list.n = (int)n;
    return r->rc;
}

/* input, size or number of parts, dim; p: number of parts */
static int run_split(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    int64_t k = 0;
    int dim = 0;
    if (!x || tb_garg_int(r, 1, &k) || tb_garg_dim(r, 2, x->rank, &dim)) return r->rc;
    if (r->op->p && k > 0) k = x->rank ? TB_MAX((x->shape[dim] - 1) / k + 1, 1) : 0;
    return parts(r, x, dim, k, false, out);
}

static int run_unbind(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    int dim = 0;
    if (!x || tb_garg_dim(r, 1, x->rank, &dim)) return r->rc;
    return parts(r, x, dim, 1, true, out);
}

/* input, n, dim: differences of neighbours, n times */
static int run_diff(struct tb_grun *r, struct tb_gvalue *out)
{
    struct tb_gtensor *x = tb_garg_tensor(r, 0);
    int64_t n = 1, d = -1;
    int dim;
    if (!x || tb_garg_int(r, 1, &n) || tb_garg_int(r, 2, &d) || tb_gdim(r, d, x->rank, &dim))
        return r->rc;
    if (x->rank == 0 || n < 0 || n > 64) return tb_gfail(r, TB_EINVAL, "n or input do not fit");
    for (; n > 0 && x; n--) {
        int64_t len = TB_MAX(x->shape[dim] - 1, 0);
        struct tb_gtensor *b = tb_gt_narrow(r, x, dim, TB_MIN(x->shape[dim], 1), len);
        x = tb_gt_binary(r, TB_GB_SUB, b, tb_gt_narrow(r, x, dim, 0, len), 0);
    }
    return tb_gout(r, out, x);
}

#define SECOND "2" /* the other kind of a row, as in reduce.c */

static const struct tb_gop ops[] = {
    {"getattr builtins.getattr", "input name", run_getattr, NULL},
    {".size", "input ?dim", run_size, NULL},
    {"torch.numel .numel .nelement", "input", run_numel, NULL},
    {".dim .ndimension", "input", run_numel, SECOND},
    {"torch.is_floating_point .is_floating_point", "input", run_is_float, NULL},
    {"torch.transpose torch.swapaxes torch.swapdims .transpose .swapaxes .swapdims",
     "input dim0 dim1", run_transpose, NULL},
    {"torch.t .t", "input", run_t, NULL},
    {"torch.permute .permute", "input *dims", run_permute, NULL},
    {"torch.reshape .view .reshape", "input *shape", run_view, NULL},
    {".view_as .reshape_as", "input other", run_view_as, NULL},
    {"torch.flatten torch.ravel .flatten .ravel", "input ?start_dim ?end_dim", run_flatten, NULL},
    {"torch.unsqueeze .unsqueeze", "input dim", run_unsqueeze, NULL},
    {"torch.squeeze .squeeze", "input ?dim", run_squeeze, NULL},
    {"torch.broadcast_to .expand .broadcast_to", "input *size", run_expand, NULL},
    {".expand_as", "input other", run_expand_as, NULL},
    {".repeat", "input *repeats", run_repeat, NULL},
    {"torch.tile .tile", "input *dims", run_repeat, SECOND},
    {"torch.flip .flip", "input *dims", run_flip, NULL},
    {"torch.roll .roll", "input shifts ?dims", run_roll, NULL},
    {"torch.nn.functional.pad torch._C._nn.pad", "input pad ?mode ?value", run_pad, NULL},
    {"torch.triu .triu", "input ?diagonal", run_tri, SECOND},
    {"torch.tril .tril", "input ?diagonal", run_tri, NULL},
    {"operator.getitem", "input index", run_getitem, NULL},
    {"torch.gather .gather", "input dim index !sparse_grad", run_gather, NULL},
    {"torch.index_select .index_select", "input dim index", run_index_select, NULL},
    {"torch.masked_select .masked_select", "input mask", run_masked_select, NULL},
    {"torch.narrow .narrow", "input dim start length", run_narrow, NULL},
    {"torch.functional.split torch.split .split", "input split_size ?dim", run_split, NULL},
    {"torch.chunk .chunk", "input chunks ?dim", run_split, SECOND},
    {"torch.unbind .unbind", "input ?dim", run_unbind, NULL},
    {"torch.diff .diff", "input ?n ?dim", run_diff, NULL},
};

const struct tb_gops tb_gops_shape = {ops, (int)TB_ARRAY_LEN(ops)};
