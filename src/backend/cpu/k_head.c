/*
 * The output head, fast: log-probabilities, their gradient and the top k of rows of logits. One
 * task is one row. Sums of exponentials run in pieces of fixed size, each in float32 lanes, pieces
 * added in float64.
 */
#include "backend/cpu/k.h"

#define PIECE                                                                                      \
    4096 /* logits that stay in the first-level cache between their maximum and their sum */

/* log sum exp of n logits in one pass; -inf if all are, NaN if one is. */
static float row_lse(const float *z, int n)
{
    float top = -INFINITY;
    double sum = 0;
    for (int p = 0; p < n; p += PIECE) {
        int m = imin(PIECE, n - p), i = 0;
        vf v = vf_set1(-INFINITY), s = vf_zero();
        for (; i + VW <= m; i += VW)
            v = vf_max(v, vf_load(z + p + i));
        if (i < m) v = vf_max(v, vf_window(vf_loadn(z + p + i, m - i), v, 0, m - i));
        float piece_top = vf_hmax(v);
        if (piece_top > top) {
            sum = top == -INFINITY ? 0 : sum * exp((double)top - (double)piece_top);
            top = piece_top;
        }
        vf t = vf_set1(top == -INFINITY ? 0 : top);
        for (i = 0; i + VW <= m; i += VW)
            s = vf_add(s, vf_exp(vf_sub(vf_load(z + p + i), t)));
        if (i < m)
            s = vf_add(
                s, vf_window(vf_exp(vf_sub(vf_loadn(z + p + i, m - i), t)), vf_zero(), 0, m - i));
        sum += (double)vf_hsum(s);
    }
    return top + (float)log(sum);
}

struct head {
    const float *logits, *lse_in, *g;
    const int32_t *targets;
    float *lse, *lp;
    act_t *dl;
    int32_t *ids;
    int V, K;
    size_t ldv;
};

static void logprobs_task(void *arg, int t, int thread)
{
    const struct head *h = arg;
    const float *z = h->logits + (size_t)t * h->ldv;
    h->lse[t] = row_lse(z, h->V);
    for (int j = 0; h->targets && j < h->K; j++) {
        size_t at = (size_t)t * (size_t)h->K + (size_t)j;
        int32_t id = h->targets[at];
        h->lp[at] = id < 0 || id >= h->V ? 0 : z[id] - h->lse[t];
    }
}

static void logprobs(struct tb_backend *be, const float *logits, int T, int V, int ldv,
                     const int32_t *targets, int K, float *lse, float *lp)
{
    struct head h = {.logits = logits,
                     .targets = targets,
                     .lse = lse,
                     .lp = lp,
                     .V = V,
                     .K = K,
                     .ldv = (size_t)ldv};
    tb_team_run(tb_cpu(be)->team, logprobs_task, &h, T);
}

/* A row: first -sum_j g_j softmax everywhere, then the targets' cells again with their g added. */
static void dlogits_task(void *arg, int t, int thread)
{
    const struct head *h = arg;
    const float *z = h->logits + (size_t)t * h->ldv, *g = h->g + (size_t)t * (size_t)h->K;
    const int32_t *id = h->targets + (size_t)t * (size_t)h->K;
    act_t *dl = h->dl + (size_t)t * h->ldv;
    float sum = 0;
    for (int j = 0; j < h->K; j++)
        if (id[j] >= 0) sum += g[j];
    vf lse = vf_set1(h->lse_in[t]), c = vf_set1(-sum);
    if (sum == 0) memset(dl, 0, (size_t)h->V * sizeof(act_t));
    EACH(v, m, sum == 0 ? 0 : h->V)
    va_storen(dl + v, vf_mul(c, vf_exp(vf_sub(vf_loadn(z + v, m), lse))), m);
    for (int j = 0; j < h->K; j++) {
        if (id[j] < 0 || id[j] >= h->V) continue;
        float all = 0, p[VW];
        for (int i = 0; i < h->K; i++)
            if (id[i] == id[j]) all += g[i];
        vf_store(p, vf_exp(vf_sub(vf_set1(z[id[j]]), lse)));
        tb_store(ACT, dl, (size_t)id[j], all - (sum == 0 ? 0 : sum * p[0]));
    }
}

static void dlogits(struct tb_backend *be, const float *logits, int T, int V, int ldv,
                    const float *lse, const int32_t *targets, const float *g, int K, void *dl)
{
    struct head h = {.logits = logits,
                     .lse_in = lse,
                     .targets = targets,
                     .g = g,
                     .dl = dl,
                     .V = V,
                     .K = K,
                     .ldv = (size_t)ldv};
    tb_team_run(tb_cpu(be)->team, dlogits_task, &h, T);
}

/* ---- top k */

/* Puts (z, id) into the list of n <= k best, descending, after its equals; returns the new n. */
static int insert(float *best, int32_t *ids, int n, int k, float z, int32_t id)
{
    int lo = 0, hi = n;
    while (lo < hi) { /* the first entry that z beats */
        int mid = (lo + hi) / 2;
        if (z > best[mid])
            hi = mid;
        else
            lo = mid + 1;
    }
    if (lo >= k) return n;
    int move = (n < k ? n : k - 1) - lo;
    memmove(best + lo + 1, best + lo, (size_t)move * sizeof(float));
    memmove(ids + lo + 1, ids + lo, (size_t)move * sizeof(int32_t));
    best[lo] = z;
    ids[lo] = id;
    return n < k ? n + 1 : k;
}

static void topk_task(void *arg, int t, int thread)
{
    const struct head *h = arg;
    const float *z = h->logits + (size_t)t * h->ldv;
    float *best = h->lp + (size_t)t * (size_t)h->K;
    int32_t *ids = h->ids + (size_t)t * (size_t)h->K;
    int n = 0, v = 0;
    for (; v < h->V && n < h->K; v++)
        n = insert(best, ids, n, h->K, isnan(z[v]) ? -INFINITY : z[v], v);
    while (v < h->V) {
        int m = imin(VW, h->V - v);
        vf low = vf_set1(best[h->K - 1]);
        unsigned bits =
            vf_gt_bits(vf_window(vf_loadn(z + v, m), low, 0, m), low); /* false for NaN */
        for (; bits; bits &= bits - 1) {
            int i = v + __builtin_ctz(bits);
            n = insert(best, ids, n, h->K, z[i], i);
        }
        v += m;
    }
    for (int j = 0; j < h->K; j++) {
        if (j >= n) ids[j] = -1;
        best[j] = j < n ? best[j] - h->lse_in[t] : -INFINITY;
    }
}

static void topk(struct tb_backend *be, const float *logits, int T, int V, int ldv,
                 const float *lse, int k, int32_t *ids, float *lps)
{
    struct head h = {
        .logits = logits, .lse_in = lse, .ids = ids, .lp = lps, .V = V, .K = k, .ldv = (size_t)ldv};
    if (k > 0) tb_team_run(tb_cpu(be)->team, topk_task, &h, T);
}

void K(head_ops)(struct tb_backend_ops *o)
{
    o->logprobs = logprobs;
    o->dlogits = dlogits;
    o->topk = topk;
}
