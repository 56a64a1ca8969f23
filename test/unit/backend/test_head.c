/*
 * The output head: log-probabilities, their gradient, top k and drawing, against the plain
 * instruction set and against exact distributions.
 */
#include "common.h"

#ifdef TB_TEST_CUDA
#    define FEW 1 /* the emulation takes its time */
#else
#    define FEW SLOW
#endif

static const int vocabs[] = {1, 7, 16, 100, 5003, 20000};
#define N_VOCABS (int)(sizeof(vocabs) / sizeof(vocabs[0]))

static void check_probs(const struct target *t, int V, int K)
{
    enum { T = 5 };
    struct tb_backend *ref = open_backend("plain", t->act, 1),
                      *be = open_backend(t->isa, t->act, 2);
    if (be) {
        int ldv = V + 3;
        size_t n = (size_t)T * (size_t)ldv, esz = tb_dtype_size(t->act), nk = (size_t)(T * K);
        float *z = random_f32(n), *g = random_f32(nk), lse[2][T], *lp[2];
        int32_t *targets_ = malloc((nk + 1) * 4), *ids[2];
        void *dl[2];
        int top = V < 50 ? V + 2 : 50;
        for (size_t i = 0; i < n; i++)
            z[i] *= 8;
        for (size_t i = 0; i < nk; i++)
            targets_[i] = i % 5 == 3 ? -1 : (int32_t)((i * 7919) % (size_t)V);
        z[2] = -INFINITY;
        for (int k = 0; k < 2; k++) {
            struct tb_backend *b = k ? be : ref;
            lp[k] = calloc(nk + (size_t)(T * top), 4);
            ids[k] = calloc((size_t)(T * top), 4);
            dl[k] = calloc(n, esz);
            b->ops->logprobs(b, z, T, V, ldv, NULL, 0, lse[k], NULL);
            b->ops->logprobs(b, z, T, V, ldv, targets_, K, lse[k], lp[k]);
            b->ops->dlogits(b, z, T, V, ldv, lse[0], targets_, g, K, dl[k]);
            b->ops->topk(b, z, T, V, ldv, lse[0], top, ids[k], lp[k] + nk);
        }
        assert_close("lse", lse[1], lse[0], T, 1e-6);
        assert_close("logprobs", lp[1], lp[0], nk, 1e-6);
        if (V > 1) /* with one id all cancels */
            assert_close_act("dlogits", t->act, dl[1], dl[0], n, t->act == TB_BF16 ? 8e-3 : 1e-5);
        assert_same_bits("topk ids", ids[1], ids[0], (size_t)(T * top) * 4);
        for (int i = 0; i < T * top; i++) {
            float a = lp[1][nk + (size_t)i], b = lp[0][nk + (size_t)i];
            assert_true(a == b || fabsf(a - b) < 1e-4f);
        }
        for (int k = 0; k < 2; k++) {
            free(lp[k]);
            free(ids[k]);
            free(dl[k]);
        }
        free(z);
        free(g);
        free(targets_);
        be->ops->destroy(be);
    }
    ref->ops->destroy(ref);
}

static void test_probs(void **state)
{
    for (int i = 0; i < N_TARGETS; i++)
        for (int v = 0; v < N_VOCABS; v++) {
            check_probs(&targets[i], vocabs[v], 1);
            check_probs(&targets[i], vocabs[v], 5);
        }
}

static void test_edits(void **state)
{
    enum { V = 70 };
    for (int i = 0; i < N_TARGETS; i++) {
        struct tb_backend *be = open_backend(targets[i].isa, targets[i].act, 1);
        if (!be) continue;
        float z[V];
        for (int v = 0; v < V; v++)
            z[v] = (float)(v - 35);
        static const struct tb_logit_edit edits[] = {
            {69, 1, 2, 3}, {0, 1, 2, 3}, {36, -2, 4, 0.5f}, {5, 0, 1, 0}};
        const uint64_t allow[2] = {0x8000001000000021u, 0x20};
        be->ops->edit_logits(be, z, V, edits, 4, NULL);
        assert_true(z[69] == 14.5f && z[0] == -71 && z[36] == -4.5f && z[5] == -30);
        be->ops->edit_logits(be, z, V, NULL, 0, allow);
        for (int v = 0; v < V; v++)
            if (v != 0 && v != 5 && v != 36 && v != 63 && v != 69) assert_true(z[v] == -INFINITY);
        assert_true(z[69] == 14.5f && z[0] == -71 && z[36] == -4.5f && z[5] == -30 && z[63] == 28);
        be->ops->destroy(be);
    }
}

/* min_p keeps what is at least that part of the largest. */
static void test_min_p(void **state)
{
    static const float z[6] = {0, -1, -2, -3, 1, -0.5f}; /* of e^1: .37 .14 .05 .02 1 .22 */
    static const struct {
        float min_p;
        int kept[6];
    } cases[] = {
        {0.03f, {1, 1, 1, 0, 1, 1}}, {0.2f, {1, 0, 0, 0, 1, 1}}, {0.4f, {0, 0, 0, 0, 1, 0}}};
    for (int i = 0; i < N_TARGETS; i++) {
        struct tb_backend *be = open_backend(targets[i].isa, targets[i].act, 1);
        if (!be) continue;
        for (int c = 0; c < 3; c++) {
            int count[6] = {0};
            for (int k = 0; k < 1000; k++) {
                struct tb_draw d = {1, -1, 1, ((float)k + 0.5f) / 1000, cases[c].min_p};
                int32_t token;
                be->ops->draw(be, z, 1, 6, 6, &d, &token);
                count[token]++;
            }
            for (int v = 0; v < 6; v++)
                assert_int_equal(count[v] > 0, cases[c].kept[v]);
        }
        be->ops->destroy(be);
    }
}

static int32_t draw_one(struct tb_backend *be, const float *z, int V, float temperature, int top_k,
                        float top_p, float u)
{
    struct tb_draw d = {temperature, top_k, top_p, u};
    int32_t token = -77;
    be->ops->draw(be, z, 1, V, V, &d, &token);
    assert_true(token >= 0 && token < V);
    return token;
}

static void test_edges(void **state)
{
    static const float us[] = {0, 0.25f, 0.5f, 0.75f, 0x1.fffffep-1f};
    for (int i = 0; i < N_TARGETS; i++) {
        struct tb_backend *be = open_backend(targets[i].isa, targets[i].act, 1);
        if (!be) continue;
        float ties[40], inf[40], nan_[40], far[40];
        for (int j = 0; j < 40; j++) {
            ties[j] = 1;
            inf[j] = j == 7 || j == 30 ? 2.0f : -INFINITY;
            nan_[j] = j % 3 ? NAN : (float)j;
            far[j] = j == 20 ? 0.0f : -1e30f;
        }
        for (int k = 0; k < 5; k++) {
            float u = us[k];
            assert_int_equal(draw_one(be, ties, 40, 0, -1, 1, u), 0); /* lowest index on ties */
            assert_int_equal(draw_one(be, ties, 40, 1, -1, 1, u), (int)((double)u * 40));
            assert_int_equal(draw_one(be, ties, 40, 1, 4, 1, u),
                             (int)((double)u * 4)); /* the lowest four */
            assert_int_equal(draw_one(be, ties, 40, 1, -1, 0.0999f, u), (int)((double)u * 4));
            assert_int_equal(draw_one(be, ties, 40, 2, 1, 1, u), 0);
            assert_int_equal(draw_one(be, inf, 40, 1, -1, 1, u), u < 0.5f ? 7 : 30);
            assert_int_equal(draw_one(be, inf, 40, 1, 5, 0.9f, u), u < 0.5f ? 7 : 30);
            assert_int_equal(draw_one(be, inf, 40, 0, -1, 1, u), 7);
            assert_int_equal(draw_one(be, far, 40, 1, -1, 1, u), 20);
            assert_int_equal(draw_one(be, far, 40, 1, 9, 0.999f, u), 20);
            assert_int_equal(draw_one(be, far, 40, 1e-30f, -1, 1, u), 20);
            for (int p = 0; p < 3; p++) { /* never one that is NaN */
                int32_t t = draw_one(be, nan_, 40, 5, p == 1 ? 30 : -1, p == 2 ? 0.95f : 1, u);
                assert_int_equal(t % 3, 0);
            }
            for (int j = 0; j < 40; j++)
                nan_[j] = NAN;
            (void)draw_one(be, nan_, 40, 1, -1, 1, u); /* any id will do */
            (void)draw_one(be, nan_, 40, 1, 3, 0.5f, u);
            for (int j = 0; j < 40; j++)
                nan_[j] = -INFINITY;
            (void)draw_one(be, nan_, 40, 1, -1, 1, u);
            for (int j = 0; j < 40; j++)
                nan_[j] = j == 39 ? INFINITY : 0;
            assert_int_equal(draw_one(be, nan_, 40, 1, -1, 0.5f, u), 39);
            for (int j = 0; j < 40; j++)
                nan_[j] = j % 3 ? NAN : (float)j;
        }
        float lse, lp[3];
        int32_t ids[3];
        be->ops->logprobs(be, inf, 1, 40, 40, NULL, 0, &lse, NULL);
        assert_true(fabsf(lse - 2.6931472f) < 1e-6f);
        be->ops->topk(be, inf, 1, 40, 40, &lse, 3, ids, lp);
        assert_int_equal(ids[0], 7);
        assert_int_equal(ids[1], 30);
        assert_int_equal(ids[2], 0);
        assert_true(isinf(lp[2]));
        be->ops->topk(be, nan_, 1, 40, 40, &lse, 3, ids, lp);
        assert_int_equal(ids[0], 39);
        assert_int_equal(ids[1], 36);
        be->ops->destroy(be);
    }
}

/* Draws with evenly spaced u meet the distribution: id i is drawn in proportion to its probability.
 */
static void check_distribution(const float *z, int V, float temperature, int top_k, float top_p,
                               const double *probs)
{
    enum { N = FEW ? 1000 : 4000 };
    for (int i = 0; i < N_TARGETS; i++) {
        struct tb_backend *be = open_backend(targets[i].isa, targets[i].act, 2);
        if (!be) continue;
        int *count = calloc((size_t)V, sizeof(int));
        struct tb_draw d[N];
        int32_t tokens[N];
        float *rows = malloc(sizeof(float) * (size_t)V * N);
        for (int k = 0; k < N; k++) {
            d[k] = (struct tb_draw){temperature, top_k, top_p, ((float)k + 0.5f) / N};
            memcpy(rows + (size_t)k * (size_t)V, z, sizeof(float) * (size_t)V);
        }
        be->ops->draw(be, rows, N, V, V, d, tokens);
        for (int k = 0; k < N; k++) {
            assert_in_range(tokens[k], 0, V - 1);
            count[tokens[k]]++;
            if (k) assert_true(tokens[k] >= tokens[k - 1]); /* index order */
        }
        for (int v = 0; v < V; v++) {
            if (fabs((double)count[v] / N - probs[v]) > 1.01 / N + 1e-6)
                fail_msg("%s: id %d drawn %d times of %d, probability %g (T %g, k %d, p %g)",
                         targets[i].isa, v, count[v], N, probs[v], (double)temperature, top_k,
                         (double)top_p);
            if (probs[v] == 0) assert_int_equal(count[v], 0);
        }
        free(rows);
        free(count);
        be->ops->destroy(be);
    }
}

/* Reads `key`: numbers of the next object of the fixture (an array of flat objects of number
 * lists). */
static const char *numbers(const char *s, const char *key, double *out, int max, int *n)
{
    char quoted[64];
    snprintf(quoted, sizeof(quoted), "\"%s\"", key);
    s = strstr(s, quoted);
    if (!s) return NULL;
    s += strlen(quoted);
    s += strspn(s, ": \n");
    bool list = *s == '[';
    if (list) s++;
    for (*n = 0; *n < max;) {
        char *end;
        s += strspn(s, ", \n");
        if (*s == ']') break;
        out[(*n)++] = strtod(s, &end);
        assert_ptr_not_equal(s, end);
        s = end;
        if (!list) break;
    }
    return s;
}

static void test_fixture(void **state)
{
    FILE *f = fopen(FIXTURE, "rb");
    assert_non_null(f);
    char *text = calloc(1, 1 << 16);
    size_t len = fread(text, 1, (1 << 16) - 1, f);
    fclose(f);
    assert_true(len > 100);
    int cases = 0, n;
    for (const char *s = text; (s = strstr(s, "\"logits\""));) {
        double z[64], probs[64], x;
        float zf[64], t, p;
        int V, k;
        s = numbers(s, "logits", z, 64, &V);
        s = numbers(s, "temperature", &x, 1, &n);
        t = (float)x;
        s = numbers(s, "top_k", &x, 1, &n);
        k = (int)x;
        s = numbers(s, "top_p", &x, 1, &n);
        p = (float)x;
        s = numbers(s, "probs", probs, 64, &n);
        assert_int_equal(n, V);
        for (int i = 0; i < V; i++)
            zf[i] = (float)z[i];
        check_distribution(zf, V, t, k, p, probs);
        cases++;
    }
    assert_true(cases >= 5);
    free(text);
}

/* A long row: the same tokens as the plain one but for rounding at a boundary, for every kind of
 * filter. */
static void test_long_rows(void **state)
{
    enum { V = 30011, N = 40 };
    float *z = random_f32(V), *rows = malloc(sizeof(float) * V * N);
    static const struct tb_draw kinds[] = {
        {1, -1, 1, 0},         {0.7f, 0, 1, 0},         {1, 50, 1, 0},        {1, -1, 0.9f, 0},
        {1.5f, 2000, 0.5f, 0}, {3, -1, 0.999f, 0},      {0.05f, -1, 0.9f, 0}, {1, -1, 1, 0, 0.05f},
        {2, 500, 1, 0, 0.2f},  {1, -1, 0.95f, 0, 0.01f}};
    for (int i = 0; i < V; i++)
        z[i] = (float)(int)(z[i] * 1000) / 100 + (i % 97 == 0 ? 5.0f : 0.0f); /* ties */
    for (int k = 0; k < N; k++)
        memcpy(rows + (size_t)k * V, z, sizeof(float) * V);
    struct tb_backend *ref = open_backend("plain", TB_F32, 1);
    for (int i = 0; i < N_TARGETS; i++) {
        if (strcmp(targets[i].isa, "plain") == 0) continue;
        struct tb_backend *be = open_backend(targets[i].isa, targets[i].act, 2);
        if (!be) continue;
        for (size_t c = 0; c < sizeof(kinds) / sizeof(kinds[0]); c++) {
            struct tb_draw d[N];
            int32_t got[N], want[N], off = 0;
            int n = FEW ? 8 : N;
            for (int k = 0; k < n; k++) {
                d[k] = kinds[c];
                d[k].u = ((float)k + 0.37f) / N;
            }
            be->ops->draw(be, rows, n, V, V, d, got);
            ref->ops->draw(ref, rows, n, V, V, d, want);
            for (int k = 0; k < n; k++)
                off += got[k] != want[k];
            if (off > 1)
                fail_msg("%s, filter %zu: %d of %d draws differ", targets[i].isa, c, off, n);
        }
        be->ops->destroy(be);
    }
    ref->ops->destroy(ref);
    free(z);
    free(rows);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_probs),   cmocka_unit_test(test_edges),
        cmocka_unit_test(test_edits),   cmocka_unit_test(test_min_p),
        cmocka_unit_test(test_fixture), cmocka_unit_test(test_long_rows),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
