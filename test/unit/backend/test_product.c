/*
 * Products and LoRA: every instruction set against the plain one over ragged shapes, and against
 * finite differences.
 */
#include "common.h"

static double tol_of(enum tb_dtype act)
{
    return act == TB_BF16 ? 1e-2 : 2e-5;
}

static void check_weight(const struct target *t, int n_in, int r0, int r1, enum tb_dtype src)
{
    struct tb_backend *ref = open_backend("plain", t->act, 1),
                      *be = open_backend(t->isa, t->act, 2);
    if (!be) {
        ref->ops->destroy(ref);
        return;
    }
    static const int counts[] = {1, 2, 3, 7, 15, 16, 17, 33, 100};
    int n_out = r0 + r1, rows[2] = {r0, r1};
    float *w0 = random_f32((size_t)r0 * (size_t)n_in), *w1 = random_f32((size_t)r1 * (size_t)n_in);
    void *p0 = to_act(src == TB_F16 ? TB_F32 : src, w0, (size_t)r0 * (size_t)n_in);
    void *p1 = to_act(TB_F32, w1, (size_t)r1 * (size_t)n_in);
    const void *parts[2] = {p0, p1};
    enum tb_dtype dtypes[2] = {src, TB_F32};
    if (src == TB_F16) /* any bits but infinities and NaN: 0x1000..0x3bff */
        for (size_t i = 0; i < (size_t)r0 * (size_t)n_in; i++)
            ((uint16_t *)p0)[i] = (uint16_t)((i & 1 ? 0x8000 : 0) + 0x1000 + (i * 977) % 0x2bff);
    struct tb_weight *wr, *wb;
    assert_int_equal(ref->ops->weight_create(ref, 2, parts, dtypes, rows, n_in, &wr, NULL), 0);
    assert_int_equal(be->ops->weight_create(be, 2, parts, dtypes, rows, n_in, &wb, NULL), 0);
    size_t held = be->ops->weight_bytes(wb);
    assert_true(held >= (size_t)n_out * (size_t)n_in * tb_dtype_size(t->act));
    assert_int_equal(be->ops->weight_prepare_bwd(be, wb, 2, parts, dtypes, rows, NULL), 0);
    assert_int_equal(be->ops->weight_prepare_bwd(be, wb, 2, parts, dtypes, rows, NULL), 0);
    assert_int_equal(ref->ops->weight_prepare_bwd(ref, wr, 2, parts, dtypes, rows, NULL), 0);
    float *bias = random_f32((size_t)n_out);
    for (size_t c = 0; c < sizeof(counts) / sizeof(counts[0]); c++) {
        int T = counts[c], ldy = n_out + 3, ldx = n_in + 5;
        size_t ny = (size_t)T * (size_t)ldy, nx = (size_t)T * (size_t)ldx;
        void *x = random_act(t->act, (size_t)T * (size_t)n_in),
             *dy = random_act(t->act, (size_t)T * (size_t)n_out);
        for (int mode = 0; mode < 4; mode++) {
            float *y = random_f32(ny), *yr = malloc(ny * 4);
            memcpy(yr, y, ny * 4);
            const float *b = mode & 1 ? bias : NULL;
            ref->ops->matmul(ref, wr, x, T, b, yr, ldy, mode & 2);
            be->ops->matmul(be, wb, x, T, b, y, ldy, mode & 2);
            assert_close("matmul", y, yr, ny, tol_of(t->act));
            free(y);
            free(yr);
            float *dx = random_f32(nx), *dxr = malloc(nx * 4);
            memcpy(dxr, dx, nx * 4);
            ref->ops->matmul_bwd(ref, wr, dy, T, dxr, ldx, mode & 2);
            be->ops->matmul_bwd(be, wb, dy, T, dx, ldx, mode & 2);
            assert_close("matmul_bwd", dx, dxr, nx, tol_of(t->act));
            free(dx);
            free(dxr);
        }
        free(x);
        free(dy);
    }
    be->ops->weight_free(be, wb);
    be->ops->weight_free(be, NULL);
    ref->ops->weight_free(ref, wr);
    free(bias);
    free(w0);
    free(w1);
    free(p0);
    free(p1);
    be->ops->destroy(be);
    ref->ops->destroy(ref);
}

static void test_matmul(void **state)
{
    for (int i = 0; i < N_TARGETS; i++) {
        check_weight(&targets[i], 48, 40, 24, TB_BF16);
        check_weight(&targets[i], 33, 65, 36, TB_F32);
        check_weight(&targets[i], 97, 1, 128, TB_F16);
        if (!SLOW) check_weight(&targets[i], 1100, 60, 5, TB_BF16);
        if (!SLOW) check_weight(&targets[i], 30, 1030, 5, TB_BF16);
    }
}

/* ---- LoRA */

#define N_SPANS 6
struct lora_case {
    int T, n_in, n_out, ldu;
    struct tb_lora_mat mats[3];
    struct tb_lora_span spans[N_SPANS];
    void *a[3], *b[3], *x, *dy;
    float *ga[3], *gb[3];
};

static void lora_make(struct lora_case *c, enum tb_dtype act, int n_in, int n_out, const int *ranks,
                      const int *lengths)
{
    memset(c, 0, sizeof(*c));
    c->n_in = n_in;
    c->n_out = n_out;
    for (int m = 0; m < 3; m++) {
        c->a[m] = random_act(act, (size_t)ranks[m] * (size_t)n_in);
        c->b[m] = random_act(act, (size_t)ranks[m] * (size_t)n_out);
        c->ga[m] = random_f32((size_t)ranks[m] * (size_t)n_in);
        c->gb[m] = random_f32((size_t)ranks[m] * (size_t)n_out);
        c->mats[m] = (struct tb_lora_mat){c->a[m], c->b[m], ranks[m], 0.5f + (float)m};
        if (ranks[m] > c->ldu) c->ldu = ranks[m];
    }
    c->ldu += 3;
    static const int which[N_SPANS] = {0, 0, 1, 2, 1, 0};
    c->T = 2;
    for (int s = 0; s < N_SPANS; s++) {
        int m = which[s];
        c->spans[s] = (struct tb_lora_span){c->T, lengths[s], &c->mats[m], c->ga[m], c->gb[m]};
        if (s == 3) c->spans[s].ga = c->spans[s].gb = NULL; /* a frozen span */
        c->T += lengths[s] + (s == 2);                      /* a row without adapter */
    }
    c->T += 1;
    c->x = random_act(act, (size_t)c->T * (size_t)n_in);
    c->dy = random_act(act, (size_t)c->T * (size_t)n_out);
}

static void lora_drop(struct lora_case *c)
{
    for (int m = 0; m < 3; m++) {
        free(c->a[m]);
        free(c->b[m]);
        free(c->ga[m]);
        free(c->gb[m]);
    }
    free(c->x);
    free(c->dy);
}

struct lora_out {
    void *u, *du;
    float *y, *dx, *ga[3], *gb[3];
};

static void lora_run(struct tb_backend *be, const struct lora_case *c, struct lora_out *o)
{
    struct tb_lora_span spans[N_SPANS];
    size_t T = (size_t)c->T, nu = T * (size_t)c->ldu;
    rng_state = 4242;
    o->u = random_act(be->act, nu); /* garbage between the ranks and outside of the spans */
    o->du = random_act(be->act, nu);
    o->y = random_f32(T * (size_t)(c->n_out + 1));
    o->dx = random_f32(T * (size_t)(c->n_in + 2));
    memcpy(spans, c->spans, sizeof(spans));
    for (int m = 0; m < 3; m++) {
        size_t na = (size_t)c->mats[m].rank * (size_t)c->n_in,
               nb = (size_t)c->mats[m].rank * (size_t)c->n_out;
        o->ga[m] = malloc(na * 4);
        o->gb[m] = malloc(nb * 4);
        memcpy(o->ga[m], c->ga[m], na * 4);
        memcpy(o->gb[m], c->gb[m], nb * 4);
        for (int s = 0; s < N_SPANS; s++) {
            if (spans[s].ga == c->ga[m]) spans[s].ga = o->ga[m];
            if (spans[s].gb == c->gb[m]) spans[s].gb = o->gb[m];
        }
    }
    lora_down(be, spans, N_SPANS, c->x, c->n_in, c->n_in, o->u, c->ldu);
    be->ops->lora_up(be, spans, N_SPANS, o->u, c->ldu, o->y, c->n_out + 1, c->n_out);
    be->ops->lora_up_bwd(be, spans, N_SPANS, c->dy, c->n_out, c->n_out, o->u, o->du, c->ldu);
    be->ops->lora_down_bwd(be, spans, N_SPANS, o->du, c->ldu, c->x, c->n_in, c->n_in, o->dx,
                           c->n_in + 2);
}

static void lora_out_drop(struct lora_out *o)
{
    free(o->u);
    free(o->du);
    free(o->y);
    free(o->dx);
    for (int m = 0; m < 3; m++) {
        free(o->ga[m]);
        free(o->gb[m]);
    }
}

static void check_lora(const struct target *t, int n_in, int n_out, const int *ranks,
                       const int *lengths)
{
    struct tb_backend *ref = open_backend("plain", t->act, 1),
                      *be = open_backend(t->isa, t->act, 2);
    if (be) {
        struct lora_case c;
        struct lora_out want, got;
        lora_make(&c, t->act, n_in, n_out, ranks, lengths);
        lora_run(ref, &c, &want);
        lora_run(be, &c, &got);
        size_t T = (size_t)c.T;
        double tol = tol_of(t->act);
        assert_close_act("u", t->act, got.u, want.u, T * (size_t)c.ldu, tol);
        assert_close_act("du", t->act, got.du, want.du, T * (size_t)c.ldu, tol);
        assert_close("y", got.y, want.y, T * (size_t)(n_out + 1), tol);
        assert_close("dx", got.dx, want.dx, T * (size_t)(n_in + 2), tol);
        for (int m = 0; m < 3; m++) {
            assert_close("ga", got.ga[m], want.ga[m], (size_t)ranks[m] * (size_t)n_in, tol);
            assert_close("gb", got.gb[m], want.gb[m], (size_t)ranks[m] * (size_t)n_out, tol);
        }
        lora_out_drop(&want);
        lora_out_drop(&got);
        lora_drop(&c);
        be->ops->destroy(be);
    }
    ref->ops->destroy(ref);
}

static void test_lora(void **state)
{
    static const int ranks[][3] = {{1, 3, 8}, {32, 5, 64}, {16, 48, 100}};
    static const int lengths[][N_SPANS] = {
        {1, 1, 1, 1, 1, 1}, {5, 17, 2, 9, 33, 1}, {3, 0, 70, 16, 4, 40}};
    static const int dims[][2] = {{32, 64}, {33, 70}, {130, 31}};
    for (int i = 0; i < N_TARGETS; i++)
        for (int r = 0; r < 3; r++)
            for (int l = 0; l < 3; l++)
                for (int d = 0; d < 3; d++)
                    check_lora(&targets[i], dims[d][0], dims[d][1], ranks[r], lengths[l]);
    if (SLOW) return;
    static const int big[3] = {32, 256, 7}, many[N_SPANS] = {1, 600, 2, 9, 200, 1};
    for (int i = 0; i < N_TARGETS; i++)
        check_lora(&targets[i], 70, 66, big, many);
    for (int i = 0; i < N_TARGETS; i++)
        check_lora(&targets[i], 40, 1200, ranks[1], lengths[1]);
}

/* d/da and d/db of sum(dy . lora(x)) by central differences, float32, every instruction set. */
static void test_lora_gradient(void **state)
{
    enum { T = 5, IN = 12, OUT = 9, R = 3 };
    for (int i = 0; i < N_TARGETS; i++) {
        struct tb_backend *be =
            targets[i].act == TB_F32 ? open_backend(targets[i].isa, TB_F32, 1) : NULL;
        if (!be) continue;
        float *x = random_f32(T * IN), *dy = random_f32(T * OUT), *ab = random_f32(R * (IN + OUT));
        float u[T * R], du[T * R], ga[R * IN] = {0}, gb[OUT * R] = {0}, dx[T * IN] = {0},
                                          y[T * OUT];
        struct tb_lora_mat mat = {ab, ab + (size_t)R * IN, R, 0.7f};
        struct tb_lora_span span = {0, T, &mat, ga, gb};
        lora_down(be, &span, 1, x, IN, IN, u, R);
        be->ops->lora_up_bwd(be, &span, 1, dy, OUT, OUT, u, du, R);
        be->ops->lora_down_bwd(be, &span, 1, du, R, x, IN, IN, dx, IN);
        for (int p = 0; p < R * (IN + OUT) + T * IN; p++) {
            float *at = p < R * (IN + OUT) ? ab + p : x + (p - R * (IN + OUT)), old = *at;
            double f[2];
            for (int s = 0; s < 2; s++) {
                *at = old + (s ? 1e-2f : -1e-2f);
                memset(y, 0, sizeof(y));
                lora_down(be, &span, 1, x, IN, IN, u, R);
                be->ops->lora_up(be, &span, 1, u, R, y, OUT, OUT);
                f[s] = 0;
                for (int j = 0; j < T * OUT; j++)
                    f[s] += (double)y[j] * (double)dy[j];
            }
            *at = old;
            double num = (f[1] - f[0]) / 2e-2, got;
            if (p < R * IN)
                got = (double)ga[p];
            else if (p < R * (IN + OUT))
                got = (double)gb[p - R * IN];
            else
                got = (double)dx[p - R * (IN + OUT)];
            if (fabs(num - got) > 2e-3)
                fail_msg("%s: parameter %d: %g, differences say %g", targets[i].isa, p, got, num);
        }
        free(x);
        free(dy);
        free(ab);
        be->ops->destroy(be);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_matmul),
        cmocka_unit_test(test_lora),
        cmocka_unit_test(test_lora_gradient),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
