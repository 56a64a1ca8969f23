/*
 * The CUDA backend's elementwise functions, norms and optimizer where their two ways through memory
 * make a difference: each array in turn unaligned, widths that are no whole quads, rows of several
 * blocks, a row alone against the same row among many; all of it bit for bit, and against the plain
 * backend.
 */
#include "../unit/backend/common.h"

#define MAX_ARRAYS 10
#define MAX_POS    40

enum type { F32, ACT, INDEX };
struct array {
    enum type type;
    size_t n;    /* elements of a row */
    bool shared; /* n are all: not by rows */
};
/* A call of the table on arrays by rows. */
struct call {
    const char *name;
    void (*fn)(struct tb_backend *be, const struct call *c, char **p, int T);
    int width, rope;
    struct tb_attn_shape s;
    bool norm;
    enum tb_dtype table;
    struct array a[MAX_ARRAYS];
};

static int n_arrays(const struct call *c)
{
    int n = 0;
    while (n < MAX_ARRAYS && c->a[n].n)
        n++;
    return n;
}

static size_t element(const struct array *a, enum tb_dtype act)
{
    return a->type == ACT ? tb_dtype_size(act) : 4;
}

/* Runs the call on copies of rows [row, row + T), the array `shifted` at an odd address; got takes
 * what all arrays hold afterwards, each in memory of exactly its size. */
static void run(struct tb_backend *be, const struct call *c, char *const *init, int row, int T,
                int shifted, char **got)
{
    char *base[MAX_ARRAYS], *p[MAX_ARRAYS] = {0};
    for (int i = 0; i < n_arrays(c); i++) {
        const struct array *a = &c->a[i];
        size_t e = element(a, be->act), bytes = a->n * e * (a->shared ? 1 : (size_t)T);
        base[i] = malloc(bytes + e);
        p[i] = base[i] + (shifted == i ? e : 0);
        memcpy(p[i], init[i] + (a->shared ? 0 : (size_t)row * a->n * e), bytes);
    }
    c->fn(be, c, p, T);
    for (int i = 0; i < n_arrays(c); i++) {
        const struct array *a = &c->a[i];
        size_t bytes = a->n * element(a, be->act) * (a->shared ? 1 : (size_t)T);
        got[i] = malloc(bytes);
        memcpy(got[i], p[i], bytes);
        free(base[i]);
    }
}

static void drop(const struct call *c, char **arrays)
{
    for (int i = 0; i < n_arrays(c); i++)
        free(arrays[i]);
}

static void check_act(const struct call *c, int T, enum tb_dtype act)
{
    struct tb_backend *be = open_backend("cuda", act, 1), *ref = open_backend("plain", act, 1);
    char *init[MAX_ARRAYS] = {0}, *want[MAX_ARRAYS], *got[MAX_ARRAYS];
    int n = n_arrays(c);
    for (int i = 0; i < n; i++) {
        size_t all = c->a[i].n * (c->a[i].shared ? 1 : (size_t)T);
        init[i] = c->a[i].type == ACT ? random_act(act, all) : (char *)random_f32(all);
        for (size_t k = 0; c->a[i].type == INDEX && k < all; k++)
            ((int32_t *)(void *)init[i])[k] = (int32_t)(k * 7 % MAX_POS);
    }
    run(be, c, init, 0, T, -1, want);

    run(ref, c, init, 0, T, -1, got);
    for (int i = 0; i < n; i++) {
        size_t all = c->a[i].n * (c->a[i].shared ? 1 : (size_t)T);
        if (c->a[i].type != INDEX)
            assert_close_act(c->name, c->a[i].type == F32 ? TB_F32 : act, want[i], got[i], all,
                             c->a[i].type == ACT && act == TB_BF16 ? 8e-3 : 2e-6);
    }
    drop(c, got);
    for (int s = 0; s < n && T < 1000; s++) {
        run(be, c, init, 0, T, s, got);
        for (int i = 0; i < n; i++)
            assert_same_bits(c->name, got[i], want[i],
                             c->a[i].n * element(&c->a[i], act) * (c->a[i].shared ? 1 : (size_t)T));
        drop(c, got);
    }
    const int rows[] = {0, T / 2, T - 1};
    for (int r = 0; r < 3; r++) {
        run(be, c, init, rows[r], 1, -1, got);
        for (int i = 0; i < n; i++) {
            size_t bytes = c->a[i].n * element(&c->a[i], act);
            assert_same_bits(c->name, got[i],
                             want[i] + (c->a[i].shared ? 0 : (size_t)rows[r] * bytes), bytes);
        }
        drop(c, got);
    }
    drop(c, init);
    drop(c, want);
    be->ops->destroy(be);
    ref->ops->destroy(ref);
}

static void check(const struct call *c, int T)
{
    check_act(c, T, TB_F32);
    check_act(c, T, TB_BF16);
}

#define FLOATS(p) ((float *)(void *)(p))

/* ---- rows */

static void call_rmsnorm(struct tb_backend *be, const struct call *c, char **p, int T)
{
    be->ops->rmsnorm(be, FLOATS(p[0]), FLOATS(p[1]), T, c->width, 1e-6f, p[2], FLOATS(p[3]));
    be->ops->rmsnorm(be, FLOATS(p[0]), FLOATS(p[1]), T, c->width, 1e-6f, p[4], NULL);
}

static void call_rmsnorm_bwd(struct tb_backend *be, const struct call *c, char **p, int T)
{
    be->ops->rmsnorm_bwd(be, FLOATS(p[0]), FLOATS(p[1]), FLOATS(p[2]), FLOATS(p[3]), T, c->width,
                         FLOATS(p[4]));
}

static void check_norms(int width, int T)
{
    size_t n = (size_t)width;
    struct call f = {.name = "rmsnorm",
                     .fn = call_rmsnorm,
                     .width = width,
                     .a = {{F32, n}, {F32, n, true}, {ACT, n}, {F32, 1}, {ACT, n}}};
    struct call b = {.name = "rmsnorm_bwd",
                     .fn = call_rmsnorm_bwd,
                     .width = width,
                     .a = {{F32, n}, {F32, n, true}, {F32, 1}, {F32, n}, {F32, n}}};
    check(&f, T);
    check(&b, T);
}

static void call_swiglu(struct tb_backend *be, const struct call *c, char **p, int T)
{
    be->ops->swiglu(be, FLOATS(p[0]), T, c->width, p[1], p[2]);
    be->ops->swiglu(be, FLOATS(p[0]), T, c->width, p[3], NULL);
    be->ops->swiglu_again(be, p[2], T, c->width, p[4]);
    be->ops->swiglu_bwd(be, p[2], FLOATS(p[5]), T, c->width, p[6]);
    size_t bytes = (size_t)T * (size_t)c->width * tb_dtype_size(be->act);
    assert_same_bits("swiglu without gu_act", p[3], p[1], bytes);
    assert_same_bits("swiglu_again", p[4], p[1], bytes);
}

static void check_swiglu(int width, int T)
{
    size_t n = (size_t)width;
    struct call c = {
        .name = "swiglu",
        .fn = call_swiglu,
        .width = width,
        .a = {{F32, 2 * n}, {ACT, n}, {ACT, 2 * n}, {ACT, n}, {ACT, n}, {F32, n}, {ACT, 2 * n}}};
    check(&c, T);
}

static void call_embed(struct tb_backend *be, const struct call *c, char **p, int T)
{
    be->ops->embed(be, p[0], c->table, (int32_t *)(void *)p[1], T, c->width, FLOATS(p[2]));
}

static void check_embed(int width, int T)
{
    size_t n = (size_t)width;
    struct call c = {.name = "embed",
                     .fn = call_embed,
                     .width = width,
                     .a = {{F32, n * MAX_POS, true}, {INDEX, 1}, {F32, n}}};
    check(&c, T);
    c.table = TB_BF16;
    c.a[0].type = ACT;
    check_act(&c, T, TB_BF16);
}

static void test_rows(void **state)
{
    static const int widths[] = {1, 5, 24, 40, 126, 1024, 2050, 8200, 16388};
    for (int i = 0; i < 9; i++) {
        check_norms(widths[i], 5);
        if (widths[i] > 4096) continue; /* two blocks a row are as good as eight */
        check_swiglu(widths[i], 5);
        check_embed(widths[i], 5);
    }
}

/* More rows than a grid's second dimension takes. */
static void test_many_rows(void **state)
{
    int T = SLOW ? 1000 : 65537;
    check_norms(4, T);
    check_embed(3, T);
}

/* ---- heads */

static void call_qkv_post(struct tb_backend *be, const struct call *c, char **p, int T)
{
    float *norm = FLOATS(p[4]);
    be->ops->qkv_post(be, &c->s, FLOATS(p[0]), T, (int32_t *)(void *)p[1], FLOATS(p[2]),
                      FLOATS(p[3]), c->rope, c->norm ? norm : NULL,
                      c->norm ? norm + c->s.head_dim : NULL, 1e-6f, p[5], p[6], p[7], p[8]);
    if (!c->norm) return;
    /* The norms see rounded values. */
    size_t raw_row = c->a[0].n, kept_row = c->a[8].n, e = tb_dtype_size(be->act);
    float *raw = malloc((size_t)T * raw_row * sizeof(*raw));
    memcpy(raw, p[0], (size_t)T * raw_row * sizeof(*raw));
    for (size_t i = 0; i < (size_t)T * kept_row; i++)
        raw[i / kept_row * raw_row + i % kept_row] = tb_load(be->act, p[8], i);
    char *q = malloc((size_t)T * c->a[5].n * e), *k = malloc((size_t)T * c->a[6].n * e);
    be->ops->qkv_post(be, &c->s, raw, T, (int32_t *)(void *)p[1], FLOATS(p[2]), FLOATS(p[3]),
                      c->rope, norm, norm + c->s.head_dim, 1e-6f, q, k, p[7], NULL);
    assert_same_bits("q of rounded values", q, p[5], (size_t)T * c->a[5].n * e);
    assert_same_bits("k of rounded values", k, p[6], (size_t)T * c->a[6].n * e);
    free(raw);
    free(q);
    free(k);
}

static void call_qkv_post_bwd(struct tb_backend *be, const struct call *c, char **p, int T)
{
    float *norm = FLOATS(p[4]);
    be->ops->qkv_post_bwd(be, &c->s, FLOATS(p[5]), FLOATS(p[6]), FLOATS(p[7]), T,
                          (int32_t *)(void *)p[1], FLOATS(p[2]), FLOATS(p[3]), c->rope,
                          c->norm ? norm : NULL, c->norm ? norm + c->s.head_dim : NULL, 1e-6f,
                          c->norm ? p[0] : NULL, p[8]);
}

static void check_heads(int hd, int rope, int n_head, int n_kv, bool norm, int T)
{
    size_t n = (size_t)hd, nq = n * (size_t)n_head, nk = n * (size_t)n_kv,
           turns = (size_t)(rope / 2 * MAX_POS) + 1;
    struct call f = {.name = "qkv_post",
                     .fn = call_qkv_post,
                     .rope = rope,
                     .s = {n_head, n_kv, hd, 1, 0},
                     .norm = norm,
                     .a = {{F32, nq + 2 * nk},
                           {INDEX, 1},
                           {F32, turns, true},
                           {F32, turns, true},
                           {F32, 2 * n, true},
                           {ACT, nq},
                           {ACT, nk},
                           {ACT, nk},
                           {ACT, nq + nk}}};
    struct call b = f;
    b.name = "qkv_post_bwd";
    b.fn = call_qkv_post_bwd;
    b.a[0] = (struct array){ACT, nq + nk};
    b.a[5].type = b.a[6].type = b.a[7].type = F32;
    b.a[8].n = nq + 2 * nk;
    check(&f, T);
    check(&b, T);
}

static void test_heads(void **state)
{
    static const int hds[] = {2, 10, 16, 20, 64, 80, 128, 256, 300, 1024};
    for (int i = 0; i < 10; i++) {
        check_heads(hds[i], hds[i], 3, 1, false, 7);
        check_heads(hds[i], hds[i], 2, 2, true, 7);
        check_heads(hds[i], hds[i] / 4 * 2, 2, 1, true, 3);
        check_heads(hds[i], 0, 1, 1, true, 2);
    }
    check_heads(4, 4, 1, 1, true, SLOW ? 1000 : 65537);
}

/* ---- flat arrays, whose elements are the rows */

static const struct tb_adamw step = {1e-3f, 0.9f, 0.95f, 1e-8f, 0.01f, 0.7f, 0.19f, 0.0975f};

static void call_flat(struct tb_backend *be, const struct call *c, char **p, int T)
{
    size_t n = (size_t)T;
    be->ops->to_act(be, FLOATS(p[0]), n, p[1]);
    be->ops->add(be, FLOATS(p[2]), FLOATS(p[0]), n);
    for (int i = 0; i < T; i++) /* a mean of squares */
        FLOATS(p[5])[i] = fabsf(FLOATS(p[5])[i]);
    be->ops->adamw(be, &step, FLOATS(p[3]), FLOATS(p[4]), FLOATS(p[5]), FLOATS(p[0]), n);
}

static void test_flat(void **state)
{
    static const int sizes[] = {1, 3, 4, 999, 1024, 40002, 65536};
    struct call c = {.name = "flat",
                     .fn = call_flat,
                     .a = {{F32, 1}, {ACT, 1}, {F32, 1}, {F32, 1}, {F32, 1}, {F32, 1}}};
    for (int i = 0; i < 7; i++)
        check(&c, sizes[i]);
}

/* Many steps from the same start as in float64, with gradients of every size. */
static void test_adamw(void **state)
{
    enum { N = 1026, STEPS = 20 };
    struct tb_backend *be = open_backend("cuda", TB_F32, 1);
    float *p = random_f32(N), *g = random_f32(N), m[N] = {0}, v[N] = {0};
    double dp[N], dm[N] = {0}, dv[N] = {0};
    for (int i = 0; i < N; i++)
        dp[i] = (double)p[i];
    for (int t = 1; t <= STEPS; t++) {
        struct tb_adamw o = {1e-2f,
                             0.9f,
                             0.95f,
                             1e-12f,
                             0.1f,
                             0.5f,
                             (float)(1 - pow((double)0.9f, t)),
                             (float)(1 - pow((double)0.95f, t))};
        for (int i = 0; i < N; i++)
            g[i] = i % 5 ? rnd() * powf(10, (float)(i % 13 - 9)) : 0;
        be->ops->adamw(be, &o, p, m, v, g, N);
        for (int i = 0; i < N; i++) {
            double x = (double)g[i] * 0.5, b1 = (double)o.beta1, b2 = (double)o.beta2;
            dm[i] = b1 * dm[i] + (1 - b1) * x;
            dv[i] = b2 * dv[i] + (1 - b2) * x * x;
            dp[i] = dp[i] * (1 - (double)o.lr * (double)o.weight_decay) -
                    (double)o.lr * (dm[i] / (double)o.bias1) /
                        (sqrt(dv[i] / (double)o.bias2) + (double)o.eps);
        }
    }
    for (int i = 0; i < N; i++)
        if (fabs((double)p[i] - dp[i]) > 4e-6)
            fail_msg("adamw[%d]: got %.9g, want %.9g", i, (double)p[i], dp[i]);
    be->ops->destroy(be);
    free(p);
    free(g);
}

static void test_sum_squares(void **state)
{
    static const size_t sizes[] = {0, 1, 2, 1023, 16383, 16384, 16385, 5 * 16384 + 7, 300001};
    struct tb_backend *be = open_backend("cuda", TB_BF16, 1);
    for (int i = 0; i < 9; i++) {
        size_t n = sizes[i];
        float *x = random_f32(n), *moved = malloc((n + 4) * sizeof(*moved));
        long double want = 0;
        for (size_t k = 0; k < n; k++) {
            x[k] *= k % 97 ? 1 : 1e15f; /* beyond float32 when squared and added */
            want += (long double)x[k] * (long double)x[k];
        }
        double got = be->ops->sum_squares(be, x, n);
        assert_true(fabsl((long double)got - want) <= 1e-14L * want);
        for (size_t shift = 0; shift < 4; shift++) {
            memcpy(moved + shift, x, n * sizeof(*x));
            double again = be->ops->sum_squares(be, moved + shift, n);
            assert_same_bits("sum_squares", &again, &got, sizeof(got));
        }
        const size_t places[] = {0, n / 2, n - 1};
        for (int k = 0; k < 3 && n; k++) {
            float old = x[places[k]];
            x[places[k]] = -INFINITY;
            assert_true(isinf(be->ops->sum_squares(be, x, n)));
            x[places[k]] = NAN;
            assert_true(isnan(be->ops->sum_squares(be, x, n)));
            x[places[k]] = old;
        }
        free(x);
        free(moved);
    }
    be->ops->destroy(be);
}

/* Every float16 there is. */
static void test_embed_f16(void **state)
{
    enum { V = 64, DIM = 1024 };
    struct tb_backend *be = open_backend("cuda", TB_F32, 1);
    uint16_t *table = malloc(V * DIM * sizeof(*table));
    float *x = malloc(V * DIM * sizeof(*x));
    int32_t tokens[V];
    for (int i = 0; i < V * DIM; i++)
        table[i] = (uint16_t)i;
    for (int i = 0; i < V; i++)
        tokens[i] = V - 1 - i;
    be->ops->embed(be, table, TB_F16, tokens, V, DIM, x);
    for (int i = 0; i < V * DIM; i++) {
        float want = tb_f16_to_f32((uint16_t)(tokens[i / DIM] * DIM + i % DIM));
        if (isnan(want))
            assert_true(isnan(x[i]));
        else
            assert_same_bits("float16", &x[i], &want, sizeof(want));
    }
    be->ops->destroy(be);
    free(table);
    free(x);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows),      cmocka_unit_test(test_many_rows),
        cmocka_unit_test(test_heads),     cmocka_unit_test(test_flat),
        cmocka_unit_test(test_adamw),     cmocka_unit_test(test_sum_squares),
        cmocka_unit_test(test_embed_f16),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
