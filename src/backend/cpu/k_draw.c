/*
 * Drawing a token from a row of logits, fast: temperature, then top_k, then the smallest prefix of
 * the sorted list whose mass reaches top_p, then min_p, then the inverse of the distribution
 * function in index order.
 *
 * Without filters nothing is sorted: the row is summed in pieces, the piece that holds u is walked.
 * With them only the tokens that can be in the prefix are sorted, by a radix sort (ties: lower id
 * first).
 */
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

/* What a filtered draw works in: weights by id, and three lists of candidates. */
struct room {
    float *p;
    struct cand *c, *sorted, *tmp;
};

/* The tokens with logits of at least low (all for -inf), in index order, into c and sorted. */
static int collect(const struct room *r, const float *z, int V, float low)
{
    int n = 0;
    if (low == -INFINITY) {
        for (; n < V; n++)
            r->c[n] = (struct cand){sort_key(z[n]), n};
    } else {
        vf below = vf_set1(nextafterf(low, -INFINITY));
        for (int v = 0; v < V; v += VW) {
            int m = imin(VW, V - v);
            unsigned bits = vf_gt_bits(vf_window(vf_loadn(z + v, m), below, 0, m), below);
            for (; bits; bits &= bits - 1) {
                int id = v + __builtin_ctz(bits);
                r->c[n++] = (struct cand){sort_key(z[id]), id};
            }
        }
    }
    memcpy(r->sorted, r->c, (size_t)n * sizeof(*r->c));
    return n;
}

/* A value that at least k logits reach: the k-th largest of the maxima of runs of 64; -inf if
 * unknown. */
static float reached_by(const struct room *r, const float *z, int V, int k)
{
    int n = V / 64;
    if (k > n) return -INFINITY;
    for (int i = 0; i < n; i++) {
        vf top = vf_set1(-INFINITY);
        for (int j = 0; j < 64; j += VW)
            top = vf_max(vf_load(z + i * 64 + j), top); /* NaN: the rest stays */
        r->sorted[i] = (struct cand){sort_key(vf_hmax(top)), i};
    }
    radix_sort(r->sorted, r->tmp, n);
    int run = r->sorted[k - 1].id;
    float low = -INFINITY;
    for (int j = 0; j < 64; j++)
        if (z[run * 64 + j] > low) low = z[run * 64 + j];
    return low;
}

/* Sorts what the filters may keep and returns how many of r->sorted they do keep; *n_all: how many
 * lie in c. */
static int filter(const struct room *r, const float *z, int V, float top, const struct tb_draw *d,
                  float inv_t, double all, int *n_all)
{
    bool by_k = d->top_k > 0 && d->top_k < V;
    int n, keep = 0;
    double mass = 0;
    if (by_k) {
        *n_all = collect(r, z, V, reached_by(r, z, V, d->top_k));
        radix_sort(r->sorted, r->tmp, *n_all);
        n = d->top_k;
        all = 0;
        for (int i = 0; i < n; i++)
            all += (double)r->p[r->sorted[i].id];
    } else {
        /* The prefix lies within those above a threshold once they hold enough mass: try few first.
         */
        for (double drop = 4;; drop *= 3) {
            float low = drop > 200 ? -INFINITY : (float)((double)top - drop / (double)inv_t);
            double held = 0;
            n = collect(r, z, V, low);
            for (int i = 0; i < n; i++)
                held += (double)r->p[r->c[i].id];
            if (low == -INFINITY || held > (double)d->top_p * all) break;
            if (exp(-drop) < 0.999 * (double)d->min_p) break; /* the rest is too unlikely */
        }
        *n_all = n;
        radix_sort(r->sorted, r->tmp, n);
    }
    for (; keep < n; keep++) {
        if (keep > 0 && d->top_p < 1 && !(mass < (double)d->top_p * all)) break;
        if (keep > 0 && r->p[r->sorted[keep].id] < d->min_p) break;
        mass += (double)r->p[r->sorted[keep].id];
    }
    return keep;
}

static int32_t draw_filtered(const float *z, int V, float top, const struct tb_draw *d, float inv_t,
                             const struct room *r)
{
    double all = 0, mass = 0, acc = 0;
    int n;
    for (int v = 0; v < V; v += PIECE)
        all += (double)piece_weights(z + v, imin(PIECE, V - v), top, inv_t, r->p + v);
    int keep = filter(r, z, V, top, d, inv_t, all, &n);
    struct cand last = r->sorted[keep - 1];
    /* c is in index order: those that sort up to `last` are kept. */
    for (int pass = 0; pass < 2; pass++) {
        int32_t pick = last.id;
        double want = (double)d->u * mass;
        for (int i = 0; i < n; i++) {
            struct cand c = r->c[i];
            if (c.key > last.key || (c.key == last.key && c.id > last.id) || !(r->p[c.id] > 0))
                continue;
            if (pass == 0) {
                mass += (double)r->p[c.id];
                continue;
            }
            pick = c.id;
            acc += (double)r->p[c.id];
            if (acc > want) break;
        }
        if (pass == 1) return pick;
    }
    return last.id;
}

static size_t room_bytes(size_t V)
{
    return V * (3 * sizeof(struct cand) + sizeof(float));
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
    } else if ((d->top_k > 0 && d->top_k < a->V) || d->top_p < 1 || d->min_p > 0) {
        size_t V = (size_t)a->V;
        struct cand *c = tb_scratch_get(&a->cpu->own[thread], room_bytes(V));
        struct room r = {(float *)(void *)(c + 3 * V), c, c + V, c + 2 * V};
        a->tokens[t] = draw_filtered(z, a->V, top, d, inv_t, &r);
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

void K(draw_needs)(const struct tb_pass_size *size, struct tb_needs *n)
{
    tb_need(&n->own, room_bytes((size_t)size->vocab));
}

void K(draw_ops)(struct tb_backend_ops *o)
{
    o->draw = draw;
}
