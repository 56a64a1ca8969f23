/*
 * Batch invariance, as equality of bits: a row alone, in a batch of 5 and of 300, with 1, 2 and 3
 * threads.
 */
#include "common.h"

#define ROWS 300
#define PICK 7 /* a row that the batches of 5 and of 1 hold */

struct made {
    struct tb_backend *be;
    struct tb_weight *w;
    const void *parts[1];
    int n_in, n_out;
};

static void weight(struct made *m, const struct target *t, int threads, const void *src,
                   enum tb_dtype dtype, int n_out, int n_in)
{
    int rows[1] = {n_out};
    enum tb_dtype dtypes[1] = {dtype};
    *m = (struct made){
        .be = open_backend(t->isa, t->act, threads), .parts = {src}, .n_in = n_in, .n_out = n_out};
    if (!m->be) return;
    assert_int_equal(m->be->ops->weight_create(m->be, 1, m->parts, dtypes, rows, n_in, &m->w, NULL),
                     0);
    assert_int_equal(m->be->ops->weight_prepare_bwd(m->be, m->w, 1, m->parts, dtypes, rows, NULL),
                     0);
}

static void check_products(const struct target *t, int n_out, int n_in, bool with_bias)
{
    float *src = random_f32((size_t)n_out * (size_t)n_in), *bias = random_f32((size_t)n_out);
    size_t esz = tb_dtype_size(t->act);
    char *x = random_act(t->act, (size_t)ROWS * (size_t)n_in),
         *dy = random_act(t->act, (size_t)ROWS * (size_t)n_out);
    size_t ny = (size_t)ROWS * (size_t)n_out, nx = (size_t)ROWS * (size_t)n_in;
    float *y0 = NULL, *dx0 = NULL, *y = random_f32(ny), *dx = random_f32(nx);
    for (int threads = 1; threads <= 3; threads++) {
        struct made m;
        weight(&m, t, threads, src, TB_F32, n_out, n_in);
        if (!m.be) break;
        const struct tb_backend_ops *o = m.be->ops;
        memset(y, 0, ny * 4);
        memset(dx, 0, nx * 4);
        for (int pass = 0; pass < 2; pass++) { /* overwrite, then accumulate */
            o->matmul(m.be, m.w, x, ROWS, with_bias ? bias : NULL, y, n_out, pass);
            o->matmul_bwd(m.be, m.w, dy, ROWS, dx, n_in, pass);
        }
        if (!y0) {
            y0 = malloc(ny * 4);
            dx0 = malloc(nx * 4);
            memcpy(y0, y, ny * 4);
            memcpy(dx0, dx, nx * 4);
        }
        assert_same_bits("product, threads", y, y0, ny * 4);
        assert_same_bits("backward product, threads", dx, dx0, nx * 4);
        static const int first[] = {PICK, PICK - 2, 0, PICK, 3}, count[] = {1, 5, 17, 33, 2};
        for (int c = 0; c < 5; c++) {
            size_t r = (size_t)first[c], n = (size_t)count[c];
            for (int pass = 0; pass < 2; pass++) {
                o->matmul(m.be, m.w, x + r * (size_t)n_in * esz, (int)n, with_bias ? bias : NULL, y,
                          n_out, pass);
                o->matmul_bwd(m.be, m.w, dy + r * (size_t)n_out * esz, (int)n, dx, n_in, pass);
            }
            assert_same_bits("product, rows", y, y0 + r * (size_t)n_out, n * (size_t)n_out * 4);
            assert_same_bits("backward product, rows", dx, dx0 + r * (size_t)n_in,
                             n * (size_t)n_in * 4);
        }
        o->weight_free(m.be, m.w);
        o->destroy(m.be);
    }
    free(src);
    free(bias);
    free(x);
    free(dy);
    free(y);
    free(dx);
    free(y0);
    free(dx0);
}

static void test_products(void **state)
{
    for (int i = SLOW ? 2 : 0; i < N_TARGETS; i++) {
        check_products(&targets[i], 70, 48, false);
        check_products(&targets[i], 65, 33, true);
        if (i < 2) continue; /* plain is slow */
        check_products(&targets[i], 200, SLOW ? 130 : 2304, true);
        check_products(&targets[i], SLOW ? 130 : 1536, 100, false);
    }
}

/* Rows of one module in one span, in spans of one row, and alone. */
static void check_lora(const struct target *t, int n_out, int n_in, int rank)
{
    size_t esz = tb_dtype_size(t->act), R = (size_t)rank;
    char *x = random_act(t->act, ROWS * (size_t)n_in),
         *dy = random_act(t->act, ROWS * (size_t)n_out);
    void *a = random_act(t->act, R * (size_t)n_in), *b = random_act(t->act, R * (size_t)n_out);
    struct tb_lora_mat mat = {a, b, rank, 0.7f}, twin = mat;
    float *y0 = NULL, *dx0 = NULL;
    char *u0 = NULL, *du0 = NULL;
    size_t ny = ROWS * (size_t)n_out, nx = ROWS * (size_t)n_in, nu = ROWS * R * esz;
    for (int threads = 1; threads <= 3; threads++) {
        struct tb_backend *be = open_backend(t->isa, t->act, threads);
        if (!be) break;
        const struct tb_backend_ops *o = be->ops;
        for (int cut = 0; cut < 3;
             cut++) { /* one span; spans of a row; odd spans of two equal modules */
            struct tb_lora_span spans[ROWS];
            int n = 0;
            for (int row = 0; row < ROWS; n++) {
                int len = cut == 0 ? ROWS : cut == 1 ? 1 : 1 + n % 37;
                if (len > ROWS - row) len = ROWS - row;
                spans[n] =
                    (struct tb_lora_span){row, len, cut == 2 && n % 2 ? &twin : &mat, NULL, NULL};
                row += len;
            }
            float *y = calloc(ny, 4), *dx = calloc(nx, 4);
            char *u = calloc(1, nu), *du = calloc(1, nu);
            lora_down(be, spans, n, x, n_in, n_in, u, rank);
            o->lora_up(be, spans, n, u, rank, y, n_out, n_out);
            o->lora_up_bwd(be, spans, n, dy, n_out, n_out, u, du, rank);
            o->lora_down_bwd(be, spans, n, du, rank, x, n_in, n_in, dx, n_in);
            if (!y0) {
                y0 = y;
                dx0 = dx;
                u0 = u;
                du0 = du;
                continue;
            }
            assert_same_bits("lora u", u, u0, nu);
            assert_same_bits("lora du", du, du0, nu);
            assert_same_bits("lora y", y, y0, ny * 4);
            assert_same_bits("lora dx", dx, dx0, nx * 4);
            free(y);
            free(dx);
            free(u);
            free(du);
        }
        be->ops->destroy(be);
    }
    free(y0);
    free(dx0);
    free(u0);
    free(du0);
    free(a);
    free(b);
    free(x);
    free(dy);
}

/* A datum's gradient is the same alone and behind others, and whatever the number of threads. */
static void check_gradient(const struct target *t)
{
    enum { N_IN = 70, N_OUT = 90, RANK = 5, T = 97 };
    char *x = random_act(t->act, T * N_IN), *dy = random_act(t->act, T * N_OUT);
    void *a = random_act(t->act, RANK * N_IN), *b = random_act(t->act, RANK * N_OUT),
         *u = random_act(t->act, T * RANK);
    void *du = random_act(t->act, T * RANK);
    size_t esz = tb_dtype_size(t->act);
    struct tb_lora_mat mat = {a, b, RANK, 0.7f};
    float first[RANK * (N_IN + N_OUT)];
    for (int threads = 1; threads <= 3; threads++) {
        struct tb_backend *be = open_backend(t->isa, t->act, threads);
        if (!be) break;
        for (int alone = 0; alone < 2; alone++) {
            float other[RANK * (N_IN + N_OUT)] = {0}, got[RANK * (N_IN + N_OUT)] = {0};
            struct tb_lora_span s[2] = {{0, 33, &mat, other, other + (size_t)RANK * N_IN},
                                        {33, T - 33, &mat, got, got + (size_t)RANK * N_IN}};
            size_t skip = alone ? 33 : 0;
            char *du_ = malloc(T * RANK * esz);
            if (alone) s[1].row = 0;
            be->ops->lora_up_bwd(be, s + alone, 2 - alone, dy + skip * N_OUT * esz, N_OUT, N_OUT,
                                 (char *)u + skip * RANK * esz, du_, RANK);
            be->ops->lora_down_bwd(be, s + alone, 2 - alone, (char *)du + skip * RANK * esz, RANK,
                                   x + skip * N_IN * esz, N_IN, N_IN, NULL, 0);
            free(du_);
            if (threads == 1 && !alone) memcpy(first, got, sizeof(got));
            assert_same_bits("gradient", got, first, sizeof(got));
        }
        be->ops->destroy(be);
    }
    free(x);
    free(dy);
    free(a);
    free(b);
    free(u);
    free(du);
}

static void test_lora(void **state)
{
    for (int i = 0; i < N_TARGETS; i++) {
        check_lora(&targets[i], 70, 33, 3);
        check_lora(&targets[i], 64, 96, 32);
        check_gradient(&targets[i]);
    }
}

/* Elementwise functions and the head: rows alone against rows of a batch. */
static void test_rows(void **state)
{
    enum { T = 40, DIM = 1030, V = 6000 };
    for (int i = 0; i < N_TARGETS; i++) {
        struct tb_backend *be = open_backend(targets[i].isa, targets[i].act, 3);
        if (!be) continue;
        const struct tb_backend_ops *o = be->ops;
        size_t esz = tb_dtype_size(be->act);
        float *x = random_f32((size_t)T * V), *w = random_f32(DIM), lse[T], lse1, lp[T], lp1;
        int32_t ids[T], token[T], one;
        struct tb_draw d[T];
        char *y = malloc((size_t)T * DIM * esz), *y1 = malloc(DIM * esz);
        o->rmsnorm(be, x, w, T, DIM, 1e-6f, y, NULL);
        for (int t = 0; t < T; t++) {
            o->rmsnorm(be, x + (size_t)t * DIM, w, 1, DIM, 1e-6f, y1, NULL);
            assert_same_bits("rmsnorm", y1, y + (size_t)t * DIM * esz, DIM * esz);
        }
        o->swiglu(be, x, T, DIM, y, NULL);
        for (int t = 0; t < T; t++) {
            o->swiglu(be, x + (size_t)t * 2 * DIM, 1, DIM, y1, NULL);
            assert_same_bits("swiglu", y1, y + (size_t)t * DIM * esz, DIM * esz);
        }
        for (int t = 0; t < T; t++) {
            ids[t] = t * 31 % V;
            d[t] = (struct tb_draw){1, -1, t % 2 ? 1 : 0.8f, ((float)t + 0.5f) / T};
        }
        o->logprobs(be, x, T, V, V, ids, 1, lse, lp);
        o->draw(be, x, T, V, V, d, token);
        for (int t = 0; t < T; t++) {
            o->logprobs(be, x + (size_t)t * V, 1, V, V, ids + t, 1, &lse1, &lp1);
            assert_same_bits("lse", &lse1, lse + t, 4);
            assert_same_bits("logprob", &lp1, lp + t, 4);
            o->draw(be, x + (size_t)t * V, 1, V, V, d + t, &one);
            assert_int_equal(one, token[t]);
        }
        free(x);
        free(w);
        free(y);
        free(y1);
        be->ops->destroy(be);
    }
}

/* Several terms at once give the bits of one after the other, and the fused product those of matmul
 * and lora_up; single rows have a way of their own. */
static void check_fused(const int *ranks)
{
    enum { T = 230, IN = 45, OUT = 150 };
    static const int from[3] = {0, 64, 96}, n_out[3] = {64, 32, 54};
    for (int i = 0; i < N_TARGETS; i++) {
        struct made m;
        float *src = random_f32(OUT * IN), *y[2];
        weight(&m, &targets[i], 2, src, TB_F32, OUT, IN);
        if (m.be) {
            const struct tb_backend_ops *o = m.be->ops;
            enum tb_dtype act = m.be->act;
            void *x = random_act(act, T * IN), *u[3], *alone[3], *a[3], *b[3];
            struct tb_lora_mat mats[3][2];
            struct tb_lora_span spans[3][40];
            struct tb_lora_term terms[3];
            for (int k = 0; k < 3; k++) {
                size_t R = (size_t)ranks[k];
                u[k] = random_act(act, T * (R + 1));
                a[k] = random_act(act, IN * R * 2);
                b[k] = random_act(act, (size_t)n_out[k] * R * 2);
                for (int j = 0; j < 2; j++)
                    mats[k][j] = (struct tb_lora_mat){
                        (char *)a[k] + (size_t)j * IN * R * tb_dtype_size(act),
                        (char *)b[k] + (size_t)j * (size_t)n_out[k] * R * tb_dtype_size(act),
                        ranks[k], 0.3f};
                int n = 0;
                for (int row = k; row < T; n++) {
                    int len = n < 20 ? 1 + n % 3 : 70 - 20 * k;
                    if (len > T - row) len = T - row;
                    spans[k][n] =
                        (struct tb_lora_span){.row = row, .n = len, .mat = &mats[k][n % 5 % 2]};
                    row += len + (n % 7 == 6);
                }
                terms[k] =
                    (struct tb_lora_term){spans[k], n, u[k], ranks[k] + 1, from[k], n_out[k]};
            }
            for (int k = 0; k < 3; k++) {
                size_t bytes = T * ((size_t)ranks[k] + 1) * tb_dtype_size(act);
                alone[k] = malloc(bytes);
                memcpy(alone[k], u[k], bytes);
                lora_down(m.be, spans[k], terms[k].n_spans, x, IN, IN, alone[k], ranks[k] + 1);
            }
            o->lora_down(m.be, terms, 3, x, IN, IN);
            for (int k = 0; k < 3; k++)
                assert_same_bits("lora_down", u[k], alone[k],
                                 T * ((size_t)ranks[k] + 1) * tb_dtype_size(act));
            for (int k = 0; k < 2; k++)
                y[k] = calloc(T * OUT, 4);
            o->matmul(m.be, m.w, x, T, NULL, y[0], OUT, false);
            for (int k = 0; k < 3; k++)
                o->lora_up(m.be, spans[k], terms[k].n_spans, u[k], terms[k].ldu, y[0] + from[k],
                           OUT, n_out[k]);
            o->matmul_lora(m.be, m.w, x, T, NULL, y[1], OUT, false, terms, 3);
            assert_same_bits("matmul_lora", y[1], y[0], sizeof(float) * T * OUT);
            for (int k = 0; k < 3; k++) {
                free(u[k]);
                free(alone[k]);
                free(a[k]);
                free(b[k]);
            }
            free(y[0]);
            free(y[1]);
            free(x);
            o->weight_free(m.be, m.w);
            o->destroy(m.be);
        }
        free(src);
    }
}

static void test_fused(void **state)
{
    static const int ranks[][3] = {{8, 3, 33}, {2, 16, 64}, {32, 4, 1}, {3, 8, 6}};
    for (size_t i = 0; i < sizeof(ranks) / sizeof(ranks[0]); i++)
        check_fused(ranks[i]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_products),
        cmocka_unit_test(test_lora),
        cmocka_unit_test(test_fused),
        cmocka_unit_test(test_rows),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
