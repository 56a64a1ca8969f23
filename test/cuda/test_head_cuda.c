/*
 * The CUDA backend's head on rows that are hostile to it: ties, infinities, NaN, every filter at
 * its edges, vocabularies of one piece and of many; against the plain backend, and a row alone
 * against the same row among others.
 */
#include "../unit/backend/common.h"

static const int vocabs[] = {1, 7, 1000, 4099};
#define N_VOCABS (int)(sizeof(vocabs) / sizeof(vocabs[0]))
#define LARGE    151936

static int pick(int n) /* uniform in [0, n) */
{
    int i = (int)((rnd() + 1) / 2 * (float)n);
    return i < n ? i : n - 1;
}

enum kind { SMOOTH, TIES, EQUAL, FEW, ONE, NOTHING, NANS, INFINITE, ZEROS, HUGE_, N_KINDS };

static void fill(float *z, int V, enum kind kind)
{
    int one = pick(V);
    for (int v = 0; v < V; v++) {
        float x = 4 * (rnd() + rnd() + rnd());
        bool few = pick(V) < 5;
        switch (kind) {
        case SMOOTH: z[v] = x; break;
        case TIES: z[v] = roundf(x); break;
        case EQUAL: z[v] = -3.7f; break;
        case FEW: z[v] = few ? x : -INFINITY; break;
        case ONE: z[v] = v == one ? x : -INFINITY; break;
        case NOTHING: z[v] = few ? NAN : -INFINITY; break;
        case NANS: z[v] = v % 3 ? NAN : x; break;
        case INFINITE: z[v] = v == one ? INFINITY : x; break;
        case ZEROS: z[v] = few ? -1.0f : x > 0 ? 0.0f : -0.0f; break;
        default: z[v] = x * 1e30f; break;
        }
    }
}

static struct tb_draw random_draw(int V)
{
    static const float temperatures[] = {1, 0.7f, 0, 1, 0.05f, 1e-30f, 3, 100, 1e30f},
                       top_ps[] = {1, 0.9f, 1, 0.5f, 0.999f, 0.1f, 1e-6f, 0},
                       min_ps[] = {0, 0, 0, 0.05f, 0.5f, 1, 1.5f};
    const int top_ks[] = {-1, 20, -1, 1, 2, V - 1, V, V + 5, 1 + pick(V)};
    int u = pick(20);
    return (struct tb_draw){temperatures[pick(9)], top_ks[pick(9)], top_ps[pick(8)],
                            u == 0   ? 0
                            : u == 1 ? 0x1.fffffep-1f
                            : u == 2 ? 1
                                     : (rnd() + 1) / 2,
                            min_ps[pick(7)]};
}

/* T rows of every kind, each with a random draw: the tokens of the plain backend. */
static void check_draws(int V, int T)
{
    int ldv = V + 1;
    float *z = malloc(sizeof(*z) * (size_t)ldv * (size_t)T);
    struct tb_draw *d = malloc(sizeof(*d) * (size_t)T);
    int32_t *got = malloc(4 * (size_t)T), *want = malloc(4 * (size_t)T);
    struct tb_backend *be = open_backend("cuda", TB_F32, 1),
                      *ref = open_backend("plain", TB_F32, 1);
    for (int t = 0; t < T; t++) {
        fill(z + (size_t)t * (size_t)ldv, V, t % N_KINDS);
        d[t] = random_draw(V);
        if (V == LARGE && t % N_KINDS <= TIES) /* where a small error of the mass shows */
            d[t] = (struct tb_draw){.temperature = 1, .top_p = 0.9f, .u = (rnd() + 1) / 2};
    }
    be->ops->draw(be, z, T, V, ldv, d, got);
    ref->ops->draw(ref, z, T, V, ldv, d, want);
    for (int t = 0; t < T; t++)
        if (got[t] != want[t])
            fail_msg("V %d, row %d of kind %d: got %d, want %d (temperature %g, top_k %d, top_p "
                     "%g, min_p %g, u %.9g)",
                     V, t, t % N_KINDS, got[t], want[t], (double)d[t].temperature, d[t].top_k,
                     (double)d[t].top_p, (double)d[t].min_p, (double)d[t].u);
    for (int t = 0; t < T; t += 1 + T / 10) { /* alone */
        int32_t one;
        be->ops->draw(be, z + (size_t)t * (size_t)ldv, 1, V, ldv, d + t, &one);
        assert_int_equal(one, got[t]);
    }
    be->ops->destroy(be);
    ref->ops->destroy(ref);
    free(z);
    free(d);
    free(got);
    free(want);
}

static void test_draws(void **state)
{
    for (int i = 0; i < N_VOCABS; i++)
        check_draws(vocabs[i], SLOW ? 100 : vocabs[i] > 1000 ? 700 : 1500);
    check_draws(LARGE, SLOW ? 2 : N_KINDS);
}

static void check_topk(struct tb_backend *be, struct tb_backend *ref, int V, int k)
{
    enum { T = 2 * N_KINDS };
    size_t n = (size_t)(T * k);
    float *z = malloc(sizeof(*z) * (size_t)V * T), lse[T], *lps[2];
    int32_t *ids[2];
    for (int t = 0; t < T; t++) {
        fill(z + (size_t)t * (size_t)V, V, t % N_KINDS);
        lse[t] = rnd();
    }
    for (int b = 0; b < 2; b++) {
        lps[b] = malloc(n * 4);
        ids[b] = malloc(n * 4);
        (b ? ref : be)->ops->topk(b ? ref : be, z, T, V, V, lse, k, ids[b], lps[b]);
    }
    assert_same_bits("topk ids", ids[0], ids[1], n * 4);
    for (size_t i = 0; i < n; i++)
        assert_true(lps[0][i] == lps[1][i]);
    for (int b = 0; b < 2; b++) {
        free(lps[b]);
        free(ids[b]);
    }
    free(z);
}

static void test_topk(void **state)
{
    struct tb_backend *be = open_backend("cuda", TB_F32, 1),
                      *ref = open_backend("plain", TB_F32, 1);
    static const int ks[] = {1, 2, 20, 300};
    for (int i = 0; i < N_VOCABS; i++) {
        for (int j = 0; j < 4; j++)
            check_topk(be, ref, vocabs[i], ks[j]);
        check_topk(be, ref, vocabs[i], vocabs[i] - (vocabs[i] > 1));
    }
    be->ops->destroy(be);
    ref->ops->destroy(ref);
}

/* Log-probabilities and their gradient with more targets than threads, many of them equal. */
static void check_probs(int V, int T, int K, enum tb_dtype act)
{
    struct tb_backend *be = open_backend("cuda", act, 1), *ref = open_backend("plain", act, 1);
    size_t ldv = (size_t)V + 3, n = ldv * (size_t)T, nk = (size_t)T * (size_t)K,
           e = tb_dtype_size(act);
    float *z = random_f32(n), *g = random_f32(nk), *lse[2], *lp[2], lse1, *lp1 = malloc(nk * 4);
    int32_t *ids = malloc(nk * 4);
    char *dl[2], *dl1 = malloc((size_t)V * e);
    for (size_t i = 0; i < n; i++)
        z[i] = i % 1000 < 5 ? -INFINITY : z[i] * 9;
    for (int v = 0; v < V && V > 5000; v++) /* whole pieces of nothing */
        if (v < 4096 || v > 9000) z[v] = -INFINITY;
    for (size_t i = 0; i < nk; i++)
        ids[i] = pick(5) ? pick(V) : pick(2) ? -1 : (int32_t)ldv;
    if (V > 5000) ids[0] = 5000;
    for (int j = 0; j < K && T > 2; j++) /* these cancel, so their row is zero but for targets */
        g[2 * K + j] = j < K / 2 * 2 && ids[2 * K + j] >= 0 ? (float)(1 - 2 * (j % 2)) : 0;
    for (int b = 0; b < 2; b++) {
        struct tb_backend *x = b ? ref : be;
        lse[b] = malloc((size_t)T * 4);
        lp[b] = malloc(nk * 4);
        dl[b] = calloc(n, e);
        x->ops->logprobs(x, z, T, V, (int)ldv, ids, K, lse[b], lp[b]);
        x->ops->dlogits(x, z, T, V, (int)ldv, lse[0], ids, g, K, dl[b]);
    }
    assert_close("lse", lse[0], lse[1], (size_t)T, 1e-6);
    assert_close("logprobs", lp[0], lp[1], nk, 1e-6);
    assert_close_act("dlogits", act, dl[0], dl[1], n, act == TB_BF16 ? 8e-3 : 1e-5);
    for (int t = 0; t < T; t += 1 + T / 5) {
        size_t at = (size_t)t * ldv, k = (size_t)t * (size_t)K;
        be->ops->logprobs(be, z + at, 1, V, (int)ldv, ids + k, K, &lse1, lp1);
        be->ops->dlogits(be, z + at, 1, V, (int)ldv, lse[0] + t, ids + k, g + k, K, dl1);
        assert_same_bits("lse", &lse1, lse[0] + t, 4);
        assert_same_bits("logprobs", lp1, lp[0] + k, (size_t)K * 4);
        assert_same_bits("dlogits", dl1, dl[0] + at * e, (size_t)V * e);
    }
    for (int b = 0; b < 2; b++) {
        free(lse[b]);
        free(lp[b]);
        free(dl[b]);
    }
    free(z);
    free(g);
    free(lp1);
    free(ids);
    free(dl1);
    be->ops->destroy(be);
    ref->ops->destroy(ref);
}

static void test_probs(void **state)
{
    for (int i = 0; i < 2; i++) {
        enum tb_dtype act = i ? TB_BF16 : TB_F32;
        check_probs(7, 50, 1, act);
        check_probs(1000, 20, 300, act);
        check_probs(4099, 20, 3, act);
        check_probs(8192, 3, 1, act);
        check_probs(LARGE, 2, 20, act);
    }
}

/* Sums that are not numbers stay so; nothing at all is -inf. A gradient that is not wanted is zero
 * even there. */
static void test_not_finite(void **state)
{
    struct tb_backend *be = open_backend("cuda", TB_F32, 1);
    enum { V = 9000 };
    float *z = malloc(sizeof(*z) * V), *dl = malloc(sizeof(*dl) * V), lse;
    const float g = 0;
    const int32_t id = 1;
    for (int v = 0; v < V; v++)
        z[v] = -INFINITY;
    be->ops->logprobs(be, z, 1, V, V, NULL, 0, &lse, NULL);
    assert_true(lse == -INFINITY);
    z[V - 1] = -2000;
    be->ops->logprobs(be, z, 1, V, V, NULL, 0, &lse, NULL);
    assert_true(lse == -2000);
    z[0] = NAN;
    be->ops->logprobs(be, z, 1, V, V, NULL, 0, &lse, NULL);
    assert_true(isnan(lse));
    be->ops->dlogits(be, z, 1, V, V, &lse, &id, &g, 1, dl);
    for (int v = 0; v < V; v++)
        assert_true(dl[v] == 0);
    z[0] = INFINITY;
    be->ops->logprobs(be, z, 1, V, V, NULL, 0, &lse, NULL);
    assert_true(isnan(lse));
    free(z);
    free(dl);
    be->ops->destroy(be);
}

static void test_edits(void **state)
{
    struct tb_backend *be = open_backend("cuda", TB_F32, 1),
                      *ref = open_backend("plain", TB_F32, 1);
    for (int i = 0; i < N_VOCABS; i++) {
        int V = vocabs[i], n = 0;
        size_t words = (size_t)(V + 63) / 64;
        float *z = random_f32((size_t)V), *want = malloc(sizeof(*z) * (size_t)V);
        struct tb_logit_edit *edits = malloc(sizeof(*edits) * (size_t)V);
        uint64_t *allow = calloc(words, sizeof(*allow));
        for (int v = V - 1; v >= 0; v--) {
            if (pick(2)) edits[n++] = (struct tb_logit_edit){v, rnd(), 1 + pick(3), rnd()};
            if (pick(3)) allow[v / 64] |= (uint64_t)1 << (v % 64);
        }
        memcpy(want, z, sizeof(*z) * (size_t)V);
        for (int b = 0; b < 2; b++) {
            struct tb_backend *x = b ? ref : be;
            x->ops->edit_logits(x, b ? want : z, V, edits, n, NULL);
            x->ops->edit_logits(x, b ? want : z, V, edits, 0, allow);
            x->ops->edit_logits(x, b ? want : z, V, edits, n, allow);
        }
        assert_same_bits("edited logits", z, want, sizeof(*z) * (size_t)V);
        free(z);
        free(want);
        free(edits);
        free(allow);
    }
    be->ops->destroy(be);
    ref->ops->destroy(ref);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_draws),      cmocka_unit_test(test_topk),
        cmocka_unit_test(test_probs),      cmocka_unit_test(test_edits),
        cmocka_unit_test(test_not_finite),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
