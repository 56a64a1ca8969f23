/*
 * Indexing as Python and PyTorch do it: x[i], slices, None, ellipsis, bool and integer tensors, in
 * any mix. A view (offset and strides into x) takes the plain parts; then the tensors look up.
 *
 * Owner: the run's arena. Thread: the run's.
 */
#include <string.h>

#include "model/custom/custom.h"
#include "util/mem.h"

#define MAX_VIEW (2 * TB_G_RANK)

struct look { /* an integer tensor in the place of a dimension */
    struct tb_gtensor *t;
    int dim; /* of the view */
};

struct view {
    int rank;
    int64_t at, shape[MAX_VIEW], stride[MAX_VIEW];
    struct look looks[MAX_VIEW];
    int n_looks;
};

/* Python's slice of n elements; a negative step is refused, as PyTorch does. */
int tb_gslice(struct tb_grun *r, const struct tb_gvalue *s, int64_t n, int64_t *start,
              int64_t *step, int64_t *len)
{
    int64_t v[3] = {0, n, 1};
    for (int i = 0; i < 3; i++)
        if (s->list.v[i].kind != TB_GV_NONE &&
            tb_gvalue_int(r, &s->list.v[i], "a part of a slice", &v[i]))
            return r->rc;
    if (v[2] < 1) return tb_gfail(r, TB_EINVAL, "the step of a slice must be positive");
    for (int i = 0; i < 2; i++) {
        if (v[i] < 0) v[i] = v[i] < -n ? 0 : v[i] + n;
        v[i] = TB_MIN(v[i], n);
    }
    *start = v[0];
    *step = v[2];
    *len = v[1] > v[0] ? (v[1] - v[0] - 1) / v[2] + 1 : 0;
    return 0;
}

/* Integer tensors of the positions where a bool tensor holds, one for each of its dimensions. */
static int nonzero(struct tb_grun *r, const struct tb_gtensor *b, struct tb_gtensor **out)
{
    int64_t n = 0, k = 0;
    for (int64_t i = 0; i < b->n; i++)
        n += b->i[i] != 0;
    for (int d = 0; d < b->rank; d++)
        if (!(out[d] = tb_gt_new(r, TB_GT_INT, 1, &n))) return r->rc;
    for (int64_t i = 0; i < b->n; i++) {
        if (!b->i[i]) continue;
        int64_t rest = i;
        for (int d = b->rank - 1; d >= 0; d--) {
            out[d]->i[k] = rest % b->shape[d];
            rest /= b->shape[d];
        }
        k++;
    }
    return 0;
}

static int room(struct tb_grun *r, const struct view *v)
{
    return v->rank < MAX_VIEW ? 0 : tb_gfail(r, TB_ETOOBIG, "an index of too many parts");
}

static int add_look(struct tb_grun *r, struct view *v, struct tb_gtensor *t, int64_t size,
                    int64_t stride)
{
    if (room(r, v)) return r->rc;
    v->looks[v->n_looks++] = (struct look){t, v->rank};
    v->shape[v->rank] = size;
    v->stride[v->rank++] = stride;
    return 0;
}

/* How many dimensions of x an index item takes. */
static int takes(const struct tb_gvalue *i)
{
    if (i->kind == TB_GV_NONE || i->kind == TB_GV_ELLIPSIS) return 0;
    return i->kind == TB_GV_TENSOR && i->t->type == TB_GT_BOOL ? i->t->rank : 1;
}

/* A list of integers is a tensor of them. */
static struct tb_gtensor *list_tensor(struct tb_grun *r, const struct tb_gvalue *v)
{
    int64_t n = v->list.n;
    struct tb_gtensor *t = tb_gt_new(r, TB_GT_INT, 1, &n);
    for (int64_t k = 0; t && k < n; k++)
        if (tb_gvalue_int(r, &v->list.v[k], "an index in a list", &t->i[k])) return NULL;
    return t;
}

static int add_tensor(struct tb_grun *r, struct view *v, const struct tb_gtensor *x,
                      const int64_t *strides, int *dim, struct tb_gtensor *t)
{
    struct tb_gtensor *at[TB_G_RANK];
    if (tb_gt_is_float(t->type))
        return tb_gfail(r, TB_EINVAL, "an index must be integers or bools, not floats");
    if (t->type != TB_GT_BOOL)
        return add_look(r, v, t, x->shape[*dim], strides[*dim]) ? r->rc : (++*dim, 0);
    if (t->rank == 0) return tb_gfail(r, TB_EUNSUPPORTED, "a single bool is no index here");
    for (int d = 0; d < t->rank; d++)
        if (t->shape[d] != x->shape[*dim + d]) {
            char a[96], b[96];
            return tb_gfail(r, TB_EINVAL, "a mask of shape %s on a tensor of shape %s",
                            tb_gshape(t, a), tb_gshape(x, b));
        }
    if (nonzero(r, t, at)) return r->rc;
    for (int d = 0; d < t->rank; d++, ++*dim)
        if (add_look(r, v, at[d], x->shape[*dim], strides[*dim])) return r->rc;
    return 0;
}

static int add_item(struct tb_grun *r, struct view *v, const struct tb_gtensor *x,
                    const int64_t *strides, int *dim, int fill, const struct tb_gvalue *i)
{
    int64_t start, step, len, n = *dim < x->rank ? x->shape[*dim] : 0;
    if (i->kind == TB_GV_NONE) {
        if (room(r, v)) return r->rc;
        v->shape[v->rank] = 1;
        v->stride[v->rank++] = 0;
        return 0;
    }
    if (i->kind == TB_GV_ELLIPSIS) {
        for (; fill > 0; fill--, ++*dim) {
            if (room(r, v)) return r->rc;
            v->shape[v->rank] = x->shape[*dim];
            v->stride[v->rank++] = strides[*dim];
        }
        return 0;
    }
    if (i->kind == TB_GV_SLICE) {
        if (tb_gslice(r, i, n, &start, &step, &len) || room(r, v)) return r->rc;
        v->at += start * strides[*dim];
        v->shape[v->rank] = len;
        v->stride[v->rank++] = step * strides[(*dim)++];
        return 0;
    }
    if (i->kind == TB_GV_LIST) {
        struct tb_gtensor *t = list_tensor(r, i);
        return t ? add_tensor(r, v, x, strides, dim, t) : r->rc;
    }
    if (i->kind == TB_GV_TENSOR && (i->t->rank || i->t->type == TB_GT_BOOL))
        return add_tensor(r, v, x, strides, dim, i->t);
    if (i->kind == TB_GV_BOOL) return tb_gfail(r, TB_EUNSUPPORTED, "a bool is no index here");
    if (tb_gvalue_int(r, i, "an index", &start)) return r->rc;
    if (start < -n || start >= n)
        return tb_gfail(r, TB_EINVAL, "index %lld is out of range for %lld elements",
                        (long long)start, (long long)n);
    v->at += (start < 0 ? start + n : start) * strides[(*dim)++];
    return 0;
}

/* Offsets of the looked-up elements, for each position of the tensors' common shape. */
static int64_t *look_up(struct tb_grun *r, struct view *v, int *rank, int64_t *shape, int64_t *n)
{
    const struct tb_gtensor *all[MAX_VIEW];
    *n = 1;
    for (int i = 0; i < v->n_looks; i++)
        all[i] = v->looks[i].t;
    if (tb_gt_broadcast(r, all, v->n_looks, rank, shape)) return NULL;
    for (int d = 0; d < *rank; d++)
        *n = shape[d] && *n > TB_G_ELEMENTS / shape[d] ? -1 : *n * shape[d];
    int64_t *off = tb_galloc(r, *n, sizeof(*off));
    if (!off || tb_gwork(r, *n * v->n_looks)) return NULL;
    memset(off, 0, (size_t)*n * sizeof(*off));
    for (int i = 0; i < v->n_looks; i++) {
        int64_t st[1][TB_G_RANK], k = 0, size = v->shape[v->looks[i].dim];
        struct tb_gwalk w;
        tb_gt_strides(all[i], *rank, st[0]);
        for (tb_gwalk_init(&w, *rank, shape, 1, st); w.left > 0; tb_gwalk_next(&w))
            for (int64_t j = 0; j < w.len; j++, k++) {
                int64_t at = all[i]->i[w.at[0] + j * w.in[0]];
                if (at < -size || at >= size) {
                    tb_gfail(r, TB_EINVAL, "index %lld is out of range for %lld elements",
                             (long long)at, (long long)size);
                    return NULL;
                }
                off[k] += (at < 0 ? at + size : at) * v->stride[v->looks[i].dim];
            }
    }
    return off;
}

/* The looked-up dimensions become one, marked by a stride of its own kind, where the first was if
 * they are neighbours, else in front. Returns its place. */
static int merge_looks(struct view *v, int64_t n)
{
    int first = v->looks[0].dim, last = v->looks[v->n_looks - 1].dim, k = 0;
    bool together = last - first + 1 == v->n_looks;
    struct view m = {.at = v->at};
    int place = together ? first : 0;
    for (int d = 0; d < v->rank; d++) {
        if (m.rank == place && k == 0) {
            m.shape[m.rank] = n;
            m.stride[m.rank++] = 0;
        }
        if (k < v->n_looks && v->looks[k].dim == d) {
            k++;
            continue;
        }
        m.shape[m.rank] = v->shape[d];
        m.stride[m.rank++] = v->stride[d];
    }
    v->rank = m.rank;
    memcpy(v->shape, m.shape, sizeof(v->shape));
    memcpy(v->stride, m.stride, sizeof(v->stride));
    return place;
}

static struct tb_gtensor *take(struct tb_grun *r, struct tb_gtensor *x, struct view *v)
{
    int64_t common[TB_G_RANK], n_common = 1, shape[MAX_VIEW], *off = NULL, n = 1;
    int n_dims = 0, place = -1, rank = 0;
    if (v->n_looks) {
        if (!(off = look_up(r, v, &n_dims, common, &n_common))) return NULL;
        place = merge_looks(v, n_common);
    }
    for (int d = 0; d < v->rank; d++) {
        n = v->shape[d] && n > TB_G_ELEMENTS / v->shape[d] ? -1 : n * v->shape[d];
        if (n < 0) break;
    }
    if (v->rank + TB_MAX(n_dims - 1, 0) > MAX_VIEW || n < 0) {
        tb_gfail(r, TB_ETOOBIG, "a tensor of too many elements");
        return NULL;
    }
    for (int d = 0; d < v->rank; d++) {
        if (d != place)
            shape[rank++] = v->shape[d];
        else
            for (int c = 0; c < n_dims; c++)
                shape[rank++] = common[c];
    }
    int32_t *map = tb_galloc(r, n, sizeof(*map));
    if (!map) return NULL;
    int64_t pos[MAX_VIEW] = {0};
    for (int64_t i = 0; i < n; i++) {
        int64_t at = v->at;
        for (int d = 0; d < v->rank; d++)
            at += d == place ? off[pos[d]] : pos[d] * v->stride[d];
        map[i] = (int32_t)at;
        for (int d = v->rank - 1; d >= 0 && ++pos[d] == v->shape[d]; d--)
            pos[d] = 0;
    }
    return tb_gt_pick(r, x, rank, shape, map, 0);
}

int tb_gt_getitem(struct tb_grun *r, struct tb_gtensor *x, const struct tb_gvalue *index,
                  struct tb_gvalue *out)
{
    const struct tb_gvalue *items = index;
    int n = 1, dim = 0, used = 0, dots = 0;
    if (index->kind == TB_GV_LIST && index->tuple) {
        items = index->list.v;
        n = index->list.n;
    }
    int64_t strides[TB_G_RANK], s = 1;
    for (int d = x->rank - 1; d >= 0; d--) {
        strides[d] = s;
        s *= x->shape[d];
    }
    for (int i = 0; i < n; i++) {
        used += takes(&items[i]);
        dots += items[i].kind == TB_GV_ELLIPSIS;
    }
    if (used > x->rank) {
        char buf[96];
        return tb_gfail(r, TB_EINVAL, "too many indices for a tensor of shape %s",
                        tb_gshape(x, buf));
    }
    if (dots > 1) return tb_gfail(r, TB_EINVAL, "an index has one ellipsis at most");
    struct view v = {0};
    for (int i = 0; i < n; i++)
        if (add_item(r, &v, x, strides, &dim, x->rank - used, &items[i])) return r->rc;
    static const struct tb_gvalue rest = {.kind = TB_GV_ELLIPSIS};
    if (add_item(r, &v, x, strides, &dim, x->rank - dim, &rest)) return r->rc;
    return tb_gout(r, out, take(r, x, &v));
}

struct tb_gtensor *tb_gt_narrow(struct tb_grun *r, struct tb_gtensor *x, int dim, int64_t from,
                                int64_t len)
{
    struct view v = {0};
    int64_t s = 1;
    if (!x) return NULL;
    if (x->rank == 0 || from < 0 || len < 0 || from > x->shape[dim] - len) {
        tb_gfail(r, TB_EINVAL, "a part that is not inside the tensor");
        return NULL;
    }
    v.rank = x->rank;
    for (int d = x->rank - 1; d >= 0; d--) {
        v.shape[d] = d == dim ? len : x->shape[d];
        v.stride[d] = s;
        if (d == dim) v.at = from * s;
        s *= x->shape[d];
    }
    return take(r, x, &v);
}
