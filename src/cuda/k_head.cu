/*
 * The output head: log-probabilities, their gradient, and changes of a row before a draw.
 *
 * The log of a row's sum of exponentials takes two steps: every piece's maximum and sum, then all
 * pieces', added in float64. Which thread adds what depends on the vocabulary's size alone.
 *
 * Owner: nothing. Thread: the backend's caller.
 */
#include "cuda/logits.cuh"

#define ROW_THREADS 64    /* of a block that works on a whole row's pieces */
#define MAX_ROWS    32768 /* of one launch */

/* A piece's largest logit, and the sum of exp(z - base_of(top)). */
struct part {
    double sum;
    float top;
};

/* Where nothing is above -inf all exponentials are to be 0, not NaN. */
__device__ static inline float base_of(float top)
{
    return top == -INFINITY ? 0 : top;
}

__global__ static void k_parts(const float *logits, int V, int ldv, part *parts)
{
    piece p = my_piece(logits, V, ldv);
    float z[PIECE / PIECE_THREADS], top = -INFINITY, sum = 0;
    for (int j = 0; j < PIECE / PIECE_THREADS; j++) {
        int i = (int)threadIdx.x + j * PIECE_THREADS;
        z[j] = i < p.n ? p.z[i] : -INFINITY;
        top = fmaxf(top, z[j]);
    }
    top = block_max(top);
    for (int j = 0; j < PIECE / PIECE_THREADS; j++)
        sum += expf(z[j] - base_of(top));
    double all = block_sum((double)sum);
    if (threadIdx.x == 0) parts[(size_t)p.row * gridDim.y + blockIdx.y] = {all, top};
}

/* From a row's parts: lse [T], and lp [T, K] of its targets. */
__global__ static void k_logprobs(const float *logits, int V, int ldv, const part *parts,
                                  int n_parts, const int32_t *targets, int K, float *lse, float *lp)
{
    size_t row = blockIdx.x;
    const float *z = logits + row * (size_t)ldv;
    float top = -INFINITY;
    double sum = 0;
    parts += row * (size_t)n_parts;
    for (int i = (int)threadIdx.x; i < n_parts; i += ROW_THREADS)
        top = fmaxf(top, parts[i].top);
    top = block_max(top);
    for (int i = (int)threadIdx.x; i < n_parts; i += ROW_THREADS)
        sum += parts[i].sum * exp((double)parts[i].top - (double)base_of(top));
    float l = top + (float)log(block_sum(sum));
    if (threadIdx.x == 0) lse[row] = l;
    for (int j = (int)threadIdx.x; j < K; j += ROW_THREADS) {
        int32_t id = targets[row * (size_t)K + j];
        lp[row * (size_t)K + j] = id < 0 || id >= V ? 0 : z[id] - l;
    }
}

/* As many rows as fit a launch, what may be staged and the scratch memory at those bytes a row. */
static int rows_at_once(const struct tb_cuda *c, size_t staged, size_t scratch)
{
    size_t n = MAX_ROWS;
    if (staged * n > TB_CUDA_STAGE) n = TB_CUDA_STAGE / staged;
    if (scratch * n > c->scratch_bytes) n = c->scratch_bytes / scratch;
    return n ? (int)n : 1;
}

static void logprobs(struct tb_backend *be, const float *logits, int T, int V, int ldv,
                     const int32_t *targets, int K, float *lse, float *lp)
{
    struct tb_cuda *c = tb_cuda(be);
    size_t k = (size_t)K;
    int parts = n_pieces(V);
    int step = rows_at_once(c, k * 4, (size_t)parts * sizeof(part) + 4 + k * 4);
    for (int t = 0; t < T; t += step) {
        int n = T - t < step ? T - t : step;
        part *row_parts = (part *)c->scratch;
        float *row_lse = (float *)(row_parts + (size_t)n * (size_t)parts), *row_lp = row_lse + n;
        const float *z = logits + (size_t)t * (size_t)ldv;
        const int32_t *ids = NULL;
        if (K) ids = (const int32_t *)tb_cuda_stage(c, targets + (size_t)t * k, (size_t)n * k * 4);
        if (ids || !K) {
            TB_LAUNCH(c, k_parts, piece_grid(n, V), PIECE_THREADS, 0, z, V, ldv, row_parts);
            TB_LAUNCH(c, k_logprobs, n, ROW_THREADS, 0, z, V, ldv, row_parts, parts, ids, K,
                      row_lse, row_lp);
        }
        tb_cuda_fetch(c, lse + t, row_lse, (size_t)n * 4);
        if (K) tb_cuda_fetch(c, lp + (size_t)t * k, row_lp, (size_t)n * k * 4);
    }
}

/* First -sum_j g_j softmax everywhere, then the targets' cells again with their g added, in the
 * order of the targets; the first of several equal targets does it for all. */
template <typename act>
__global__ static void k_dlogits(const float *logits, int V, int ldv, const float *lse,
                                 const int32_t *targets, const float *g, int K, act *dl)
{
    piece p = my_piece(logits, V, ldv);
    float l = lse[p.row], sum = 0;
    targets += (size_t)p.row * K;
    g += (size_t)p.row * K;
    dl += (size_t)p.row * ldv + p.first;
    for (int j = 0; j < K; j++)
        if (targets[j] >= 0) sum += g[j];
    auto all = [=](float z) { return sum == 0 ? 0 : -sum * expf(z - l); };
    each_logit(p, [=](float z, int i) { store_act(dl + i, all(z)); });
    __syncthreads();
    for (int j = (int)threadIdx.x; j < K; j += PIECE_THREADS) {
        int i = targets[j] - p.first;
        if (targets[j] < 0 || i < 0 || i >= p.n) continue;
        bool first = true;
        for (int k = 0; k < j && first; k++)
            first = targets[k] != targets[j];
        if (!first) continue;
        float x = all(p.z[i]);
        for (int k = j; k < K; k++)
            if (targets[k] == targets[j]) x += g[k];
        store_act(dl + i, x);
    }
}

static void dlogits(struct tb_backend *be, const float *logits, int T, int V, int ldv,
                    const float *lse, const int32_t *targets, const float *g, int K, void *dl)
{
    struct tb_cuda *c = tb_cuda(be);
    size_t k = (size_t)K;
    int step = rows_at_once(c, 4 + k * 8, 0);
    for (int t = 0; t < T; t += step) {
        int n = T - t < step ? T - t : step;
        size_t at = (size_t)t * (size_t)ldv;
        const float *l = (const float *)tb_cuda_stage(c, lse + t, (size_t)n * 4);
        const int32_t *ids =
            (const int32_t *)tb_cuda_stage(c, targets + (size_t)t * k, (size_t)n * k * 4);
        const float *gs = (const float *)tb_cuda_stage(c, g + (size_t)t * k, (size_t)n * k * 4);
        if (!l || !ids || !gs) return;
        TB_ACT(be, act,
               TB_LAUNCH(c, k_dlogits<act>, piece_grid(n, V), PIECE_THREADS, 0, logits + at, V, ldv,
                         l, ids, gs, K, (act *)dl + at));
    }
}

__global__ static void k_edit(float *logits, const struct tb_logit_edit *edits, int n)
{
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n) return;
    struct tb_logit_edit e = edits[i];
    float z = logits[e.id] + e.bias;
    logits[e.id] = (z > 0 ? z / e.repeat : z * e.repeat) - e.minus;
}

__global__ static void k_allow(float *logits, int V, const uint64_t *allow)
{
    int v = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (v < V && !(allow[v / 64] >> (v % 64) & 1)) logits[v] = -INFINITY;
}

static void edit_logits(struct tb_backend *be, float *logits, int V,
                        const struct tb_logit_edit *edits, int n, const uint64_t *allow)
{
    struct tb_cuda *c = tb_cuda(be);
    const void *staged;
    if (n && (staged = tb_cuda_stage(c, edits, (size_t)n * sizeof(*edits))))
        TB_LAUNCH(c, k_edit, div_up(n, PIECE_THREADS), PIECE_THREADS, 0, logits,
                  (const struct tb_logit_edit *)staged, n);
    if (allow && (staged = tb_cuda_stage(c, allow, (size_t)div_up(V, 64) * sizeof(*allow))))
        TB_LAUNCH(c, k_allow, div_up(V, PIECE_THREADS), PIECE_THREADS, 0, logits, V,
                  (const uint64_t *)staged);
}

void tb_cuda_head_ops(struct tb_backend_ops *o)
{
    o->logprobs = logprobs;
    o->dlogits = dlogits;
    o->edit_logits = edit_logits;
}
