/*
 * The output head in plain C (see plain_product.c): log-probabilities, their gradient, top-k and
 * drawing.
 */
#include <math.h>
#include <stdlib.h>

#include "backend/cpu/cpu.h"

/* NaN counts as -inf, so that a broken row never breaks an order. */
static float clean(float z)
{
    return isnan(z) ? -INFINITY : z;
}

static void plain_logprobs(struct tb_backend *be, const float *logits, int T, int V, int ldv,
                           const int32_t *targets, int K, float *lse, float *lp)
{
    for (int t = 0; t < T; t++) {
        const float *z = logits + (size_t)t * (size_t)ldv;
        float m = -INFINITY;
        double s = 0;
        for (int v = 0; v < V; v++)
            if (z[v] > m) m = z[v];
        for (int v = 0; v < V; v++)
            s += (double)expf(z[v] - m);
        lse[t] = m + (float)log(s);
        for (int j = 0; targets && j < K; j++) {
            int32_t id = targets[(size_t)t * (size_t)K + (size_t)j];
            lp[(size_t)t * (size_t)K + (size_t)j] = id < 0 || id >= V ? 0 : z[id] - lse[t];
        }
    }
}

static void plain_dlogits(struct tb_backend *be, const float *logits, int T, int V, int ldv,
                          const float *lse, const int32_t *targets, const float *g, int K, void *dl)
{
    float *row = malloc((size_t)V * sizeof(float));
    if (!row) abort();
    for (int t = 0; t < T; t++) {
        const float *z = logits + (size_t)t * (size_t)ldv, *gt = g + (size_t)t * (size_t)K;
        const int32_t *tt = targets + (size_t)t * (size_t)K;
        float sum = 0;
        for (int j = 0; j < K; j++)
            if (tt[j] >= 0) sum += gt[j];
        for (int v = 0; v < V; v++)
            row[v] = sum == 0 ? 0 : -sum * expf(z[v] - lse[t]);
        for (int j = 0; j < K; j++)
            if (tt[j] >= 0 && tt[j] < V) row[tt[j]] += gt[j];
        for (int v = 0; v < V; v++)
            tb_store(be->act, dl, (size_t)t * (size_t)ldv + (size_t)v, row[v]);
    }
    free(row);
}

struct cand {
    float z;
    int32_t id;
};

static int cand_cmp(const void *a, const void *b)
{
    const struct cand *x = a, *y = b;
    if (x->z != y->z) return x->z > y->z ? -1 : 1;
    return x->id < y->id ? -1 : 1;
}

static struct cand *sorted(const float *z, int V)
{
    struct cand *c = malloc((size_t)V * sizeof(*c));
    if (!c) abort();
    for (int v = 0; v < V; v++)
        c[v] = (struct cand){clean(z[v]), v};
    qsort(c, (size_t)V, sizeof(*c), cand_cmp);
    return c;
}

static int32_t draw_row(const float *z, int V, const struct tb_draw *d)
{
    struct cand *c = sorted(z, V);
    int32_t best = c[0].id, pick = best;
    float top = c[0].z;
    if (!(d->temperature > 0) || isinf(top))
        goto out; /* greedy; or no finite maximum to scale by */
    double *p = calloc((size_t)V, sizeof(*p));
    if (!p) abort();
    int n = d->top_k > 0 && d->top_k < V ? d->top_k : V, keep = 0;
    double sum = 0, mass = 0;
    for (int i = 0; i < n; i++)
        sum += exp(((double)c[i].z - (double)top) / (double)d->temperature);
    for (; keep < n; keep++) {
        double w = exp(((double)c[keep].z - (double)top) / (double)d->temperature);
        if (keep > 0 && d->top_p < 1 && !(mass < (double)d->top_p * sum)) break;
        if (keep > 0 && w < (double)d->min_p) break;
        p[c[keep].id] = w;
        mass += w;
    }
    double want = (double)d->u * mass, acc = 0;
    for (int v = 0; v < V; v++) {
        if (p[v] <= 0) continue;
        pick = v; /* rounding at the far end falls back to the last possible id */
        acc += p[v];
        if (acc > want) break;
    }
    free(p);
out:
    free(c);
    return pick;
}

static void plain_edit_logits(struct tb_backend *be, float *logits, int V,
                              const struct tb_logit_edit *edits, int n, const uint64_t *allow)
{
    for (int i = 0; i < n; i++) {
        const struct tb_logit_edit *e = edits + i;
        float z = logits[e->id] + e->bias;
        logits[e->id] = (z > 0 ? z / e->repeat : z * e->repeat) - e->minus;
    }
    for (int v = 0; allow && v < V; v++)
        if (!(allow[v / 64] >> (v % 64) & 1)) logits[v] = -INFINITY;
}

static void plain_draw(struct tb_backend *be, const float *logits, int T, int V, int ldv,
                       const struct tb_draw *draws, int32_t *tokens)
{
    for (int t = 0; t < T; t++)
        tokens[t] = draw_row(logits + (size_t)t * (size_t)ldv, V, draws + t);
}

static void plain_topk(struct tb_backend *be, const float *logits, int T, int V, int ldv,
                       const float *lse, int k, int32_t *ids, float *lps)
{
    for (int t = 0; t < T; t++) {
        struct cand *c = sorted(logits + (size_t)t * (size_t)ldv, V);
        for (int j = 0; j < k; j++) {
            ids[(size_t)t * (size_t)k + (size_t)j] = j < V ? c[j].id : -1;
            lps[(size_t)t * (size_t)k + (size_t)j] = j < V ? c[j].z - lse[t] : -INFINITY;
        }
        free(c);
    }
}

void tb_plain_head_ops(struct tb_backend_ops *o)
{
    o->logprobs = plain_logprobs;
    o->dlogits = plain_dlogits;
    o->edit_logits = plain_edit_logits;
    o->draw = plain_draw;
    o->topk = plain_topk;
}
