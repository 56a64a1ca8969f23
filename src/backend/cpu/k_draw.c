/*
 * Drawing a token from a row of logits, fast: temperature, then top_k, then the smallest prefix of
 * the sorted list whose mass reaches top_p, then the inverse of the distribution function in index
 * order.
 *
 * Without filters nothing is sorted: the row is summed in pieces, the piece that holds u is walked.
 * With them only the tokens that can be in the prefix are sorted, by a radix sort (ties: lower id
 * first).
 */
#include <stdlib.h>

#include "backend/cpu/k.h"

#define PIECE 1024

struct draw {
    const float *logits;
    const struct tb_draw *draws;
    int32_t *tokens;
    int V;
    size_t ldv;
    struct tb_cpu *cpu;
};

struct cand {
    uint32_t key; /* ascending key = descending logit */
    int32_t id;
};

static uint32_t sort_key(float z)
{
    uint32_t u;
    if (isnan(z)) z = -INFINITY;
    if (z == 0) z = 0; /* -0 and 0 tie */
    memcpy(&u, &z, 4);
    return u & 0x80000000u ? u : ~(u | 0x80000000u);
}

/* Stable by key, so equal logits stay in index order. */
static void radix_sort(struct cand *a, struct cand *tmp, int n)
{
    for (int shift = 0; shift < 32; shift += 8) {
        int count[257] = {0};
        for (int i = 0; i < n; i++)
            count[((a[i].key >> shift) & 255) + 1]++;
        for (int i = 0; i < 256; i++)
            count[i + 1] += count[i];
        for (int i = 0; i < n; i++)
            tmp[count[(a[i].key >> shift) & 255]++] = a[i];
        struct cand *swap = a;
        a = tmp;
        tmp = swap;
    }
}

/* The largest logit (NaN counts as -inf) and its lowest index. */
static int argmax(const float *z, int V, float *top)
{
    int best = 0;
    *top = -INFINITY;
    for (int v = 0; v < V; v += VW) {
        int m = imin(VW, V - v);
        vf t = vf_set1(*top);
        unsigned bits = vf_gt_bits(vf_window(vf_loadn(z + v, m), t, 0, m), t);
        for (; bits; bits &= bits - 1) {
            int i = v + __builtin_ctz(bits);
            if (z[i] > *top) {
                *top = z[i];
                best = i;
            }
        }
    }
    return best;
}

/* exp((z - top) / T) of one piece; NaN gives 0. Returns the sum. */
static float piece_weights(const float *z, int n, float top, float inv_t, float *p)
{
    vf s = vf_zero(), vt = vf_set1(top), vi = vf_set1(inv_t), floor = vf_set1(-INFINITY);
    for (int i = 0; i < n; i += VW) {
        int m = imin(VW, n - i);
        vf x = vf_max(vf_mul(vf_sub(vf_loadn(z + i, m), vt), vi), floor); /* NaN becomes -inf */
        vf e = vf_window(vf_exp(x), vf_zero(), 0, m);
        vf_storen(p + i, e, m);
        s = vf_add(s, e);
    }
    return vf_hsum(s);
}

static int32_t draw_all(const float *z, int V, float top, float inv_t, float u)
{
    float p[PIECE];
    double total = 0, acc = 0;
    int32_t last = 0;
    for (int v = 0; v < V; v += PIECE)
        total += (double)piece_weights(z + v, imin(PIECE, V - v), top, inv_t, p);
    double want = (double)u * total;
    /* The pieces are summed again rather than remembered: the walk stops half way on average. */
    for (int v = 0; v < V; v += PIECE) {
        int n = imin(PIECE, V - v);
        double s = (double)piece_weights(z + v, n, top, inv_t, p);
        if (s <= 0) continue;
        bool here = acc + s > want;
        if (!here) { /* remember its last possible token: rounding may leave nothing behind it */
            for (int i = 0; i < n; i++)
                if (p[i] > 0) last = v + i;
            acc += s;
            continue;
        }
        for (int i = 0; i < n; i++) {
            if (!(p[i] > 0)) continue;
            last = v + i;
            acc += (double)p[i];
            if (acc > want) break;
        }
        break;
    }
    return last;
}

static int by_id(const void *a, const void *b)
{
    const struct cand *x = a, *y = b;
    return (x->id > y->id) - (x->id < y->id);
}

/* The tokens with logits of at least low (all for -inf, NaN included), in index order. */
static int collect(const float *z, int V, float low, struct cand *out)
{
    int n = 0;
    for (int v = 0; v < V; v++)
        if (z[v] >= low || low == -INFINITY) out[n++] = (struct cand){sort_key(z[v]), v};
    return n;
}

static double weight(const float *z, int32_t id, float top, float inv_t)
{
    return isnan(z[id]) ? 0 : exp(((double)z[id] - (double)top) * (double)inv_t);
}

/* The candidates that survive the filters are c[0..keep), best first. */
static int32_t draw_filtered(const float *z, int V, float top, const struct tb_draw *d, float inv_t,
                             struct cand *c, struct cand *tmp)
{
    bool by_k = d->top_k > 0 && d->top_k < V, by_p = d->top_p < 1;
    int n = 0, keep = 0;
    double all = 0, mass = 0;
    if (by_k) {
        n = collect(z, V, -INFINITY, c);
        radix_sort(c, tmp, n);
        n = d->top_k;
        for (int i = 0; i < n; i++)
            all += weight(z, c[i].id, top, inv_t);
    } else {
        for (int v = 0; v < V; v++)
            all += weight(z, v, top, inv_t);
        /* The prefix lies within those above a threshold once they hold enough mass: try few first.
         */
        for (double drop = 8;; drop *= 4) {
            float low = drop > 200 ? -INFINITY : (float)((double)top - drop / (double)inv_t);
            double held = 0;
            n = collect(z, V, low, c);
            for (int i = 0; i < n; i++)
                held += weight(z, c[i].id, top, inv_t);
            if (low == -INFINITY || held > (double)d->top_p * all) break;
        }
        radix_sort(c, tmp, n);
    }
    for (; keep < n; keep++) {
        if (keep > 0 && by_p && !(mass < (double)d->top_p * all)) break;
        mass += weight(z, c[keep].id, top, inv_t);
    }
    qsort(c, (size_t)keep, sizeof(*c), by_id);
    double want = (double)d->u * mass, acc = 0;
    int32_t pick = 0;
    for (int i = 0; i < keep; i++) {
        double p = weight(z, c[i].id, top, inv_t);
        if (!(p > 0)) continue;
        pick = c[i].id;
        acc += p;
        if (acc > want) break;
    }
    return pick;
}

static void draw_task(void *arg, int t, int thread)
{
    const struct draw *a = arg;
    const struct tb_draw *d = a->draws + t;
    const float *z = a->logits + (size_t)t * a->ldv;
    float top, inv_t = 1.0f / d->temperature;
    int best = argmax(z, a->V, &top);
    /* greedy; or nothing finite to scale by; or colder than float32 can divide by */
    if (!(d->temperature > 0) || isinf(top) || isinf(inv_t)) {
        a->tokens[t] = best;
    } else if ((d->top_k > 0 && d->top_k < a->V) || d->top_p < 1) {
        struct cand *c = tb_scratch_get(&a->cpu->own[thread], 2 * (size_t)a->V * sizeof(*c));
        a->tokens[t] = draw_filtered(z, a->V, top, d, inv_t, c, c + a->V);
    } else {
        a->tokens[t] = draw_all(z, a->V, top, inv_t, d->u);
    }
}

static void draw(struct tb_backend *be, const float *logits, int T, int V, int ldv,
                 const struct tb_draw *draws, int32_t *tokens)
{
    struct draw a = {logits, draws, tokens, V, (size_t)ldv, tb_cpu(be)};
    tb_team_run(a.cpu->team, draw_task, &a, T);
}

void K(draw_ops)(struct tb_backend_ops *o)
{
    o->draw = draw;
}
