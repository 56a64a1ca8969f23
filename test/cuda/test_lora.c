/*
 * LoRA on CUDA beyond test_product.c: many modules of different rank in one call, tiles of both
 * sizes, rows alone and in company, gradients whatever else is packed, and what does not fit in one
 * launch.
 */
#include "../unit/backend/common.h"
#include "cuda/cuda.h"

#define N_MATS  7
#define N_SPANS 14
static const int ranks[N_MATS] = {1, 3, 8, 17, 32, 64, 200};
static const int lengths[N_SPANS] = {1, 1, 5, 1, 600, 33, 1, 0, 16, 47, 2, 1, 70, 1};
static const int mat_of[N_SPANS] = {0, 4, 4, 1, 4, 2, 6, 3, 3, 5, 6, 2, 1, 4};
#define FROZEN 9 /* a span without gradient */

struct arrays { /* of rows; what the functions write */
    char *u, *du;
    float *y, *dx;
    float *ga[N_MATS], *gb[N_MATS];
};
struct lora {
    enum tb_dtype act;
    size_t esz;
    int T, n_in, n_out, ldx, ldu, ldy;
    struct tb_lora_mat mats[N_MATS];
    struct tb_lora_span spans[N_SPANS];
    char *x, *dy;
};

static void make(struct lora *c, enum tb_dtype act, int n_in, int n_out, int pad)
{
    *c = (struct lora){.act = act,
                       .esz = tb_dtype_size(act),
                       .T = 2,
                       .n_in = n_in,
                       .n_out = n_out,
                       .ldx = n_in + pad,
                       .ldu = 200 + pad,
                       .ldy = n_out + pad};
    for (int m = 0; m < N_MATS; m++) {
        size_t r = (size_t)ranks[m];
        c->mats[m] = (struct tb_lora_mat){random_act(act, r * (size_t)n_in),
                                          random_act(act, r * (size_t)n_out), ranks[m],
                                          0.25f + 0.3f * (float)m};
    }
    for (int s = 0; s < N_SPANS; s++) {
        c->spans[s] =
            (struct tb_lora_span){.row = c->T, .n = lengths[s], .mat = &c->mats[mat_of[s]]};
        c->T += lengths[s] + (s % 4 == 3); /* rows without adapter between some */
    }
    c->T += 3;
    c->x = random_act(act, (size_t)c->T * (size_t)c->ldx);
    c->dy = random_act(act, (size_t)c->T * (size_t)c->ldy);
}

static void drop(struct lora *c)
{
    for (int m = 0; m < N_MATS; m++) {
        free((void *)(uintptr_t)c->mats[m].a);
        free((void *)(uintptr_t)c->mats[m].b);
    }
    free(c->x);
    free(c->dy);
}

/* The same garbage each time. */
static void arrays_make(const struct lora *c, struct arrays *o)
{
    size_t T = (size_t)c->T;
    rng_state = 4242;
    o->u = random_act(c->act, T * (size_t)c->ldu);
    o->du = random_act(c->act, T * (size_t)c->ldu);
    o->y = random_f32(T * (size_t)c->ldy);
    o->dx = random_f32(T * (size_t)c->ldx);
    for (int m = 0; m < N_MATS; m++) {
        o->ga[m] = random_f32((size_t)ranks[m] * (size_t)c->n_in);
        o->gb[m] = random_f32((size_t)ranks[m] * (size_t)c->n_out);
    }
}

static void arrays_drop(struct arrays *o)
{
    free(o->u);
    free(o->du);
    free(o->y);
    free(o->dx);
    for (int m = 0; m < N_MATS; m++) {
        free(o->ga[m]);
        free(o->gb[m]);
    }
}

/* All four functions on some spans, whose rows count from `row` of the arrays. */
static void run(struct tb_backend *be, const struct lora *c, const struct tb_lora_span *s, int n,
                int row, struct arrays *o)
{
    size_t r = (size_t)row, ldx = (size_t)c->ldx, ldy = (size_t)c->ldy,
           ru = r * (size_t)c->ldu * c->esz;
    const struct tb_backend_ops *f = be->ops;
    lora_down(be, s, n, c->x + r * ldx * c->esz, c->ldx, c->n_in, o->u + ru, c->ldu);
    f->lora_up(be, s, n, o->u + ru, c->ldu, o->y + r * ldy, c->ldy, c->n_out);
    f->lora_up_bwd(be, s, n, c->dy + r * ldy * c->esz, c->ldy, c->n_out, o->u + ru, o->du + ru,
                   c->ldu);
    f->lora_down_bwd(be, s, n, o->du + ru, c->ldu, c->x + r * ldx * c->esz, c->ldx, c->n_in,
                     o->dx + r * ldx, c->ldx);
}

static void run_all(struct tb_backend *be, const struct lora *c, struct arrays *o)
{
    struct tb_lora_span s[N_SPANS];
    arrays_make(c, o);
    memcpy(s, c->spans, sizeof(s));
    for (int i = 0; i < N_SPANS; i++) {
        s[i].ga = i == FROZEN ? NULL : o->ga[mat_of[i]];
        s[i].gb = i == FROZEN ? NULL : o->gb[mat_of[i]];
    }
    run(be, c, s, N_SPANS, 0, o);
}

static void assert_same_rows(const struct lora *c, const struct arrays *a, const struct arrays *b,
                             int row, int n)
{
    size_t r = (size_t)row, k = (size_t)n, lu = (size_t)c->ldu * c->esz, lx = (size_t)c->ldx,
           ly = (size_t)c->ldy;
    assert_same_bits("u", a->u + r * lu, b->u + r * lu, k * lu);
    assert_same_bits("du", a->du + r * lu, b->du + r * lu, k * lu);
    assert_same_bits("y", a->y + r * ly, b->y + r * ly, k * ly * 4);
    assert_same_bits("dx", a->dx + r * lx, b->dx + r * lx, k * lx * 4);
}

static void assert_same_gradient(const struct lora *c, const struct arrays *a,
                                 const struct arrays *b, int m)
{
    size_t r = (size_t)ranks[m] * 4;
    assert_same_bits("ga", a->ga[m], b->ga[m], r * (size_t)c->n_in);
    assert_same_bits("gb", a->gb[m], b->gb[m], r * (size_t)c->n_out);
}

static void check_plain(const struct lora *c, const struct arrays *got)
{
    struct tb_backend *ref = open_backend("plain", c->act, 1);
    struct arrays want;
    size_t T = (size_t)c->T;
    double tol = c->act == TB_BF16 ? 1e-2 : 2e-5;
    run_all(ref, c, &want);
    assert_close_act("u", c->act, got->u, want.u, T * (size_t)c->ldu, tol);
    assert_close_act("du", c->act, got->du, want.du, T * (size_t)c->ldu, tol);
    assert_close("y", got->y, want.y, T * (size_t)c->ldy, tol);
    assert_close("dx", got->dx, want.dx, T * (size_t)c->ldx, tol);
    for (int m = 0; m < N_MATS; m++) {
        assert_close("ga", got->ga[m], want.ga[m], (size_t)ranks[m] * (size_t)c->n_in, tol);
        assert_close("gb", got->gb[m], want.gb[m], (size_t)ranks[m] * (size_t)c->n_out, tol);
    }
    arrays_drop(&want);
    ref->ops->destroy(ref);
}

/* Rows without adapter and columns behind the rank and the width stay as they were. */
static void check_untouched(const struct lora *c, const struct arrays *got)
{
    struct arrays was;
    arrays_make(c, &was);
    for (int row = 0, s = 0; row < c->T; row++) {
        while (s < N_SPANS && row >= c->spans[s].row + c->spans[s].n)
            s++;
        bool in = s < N_SPANS && row >= c->spans[s].row;
        size_t r = (size_t)row, rank = in ? (size_t)c->spans[s].mat->rank : 0, ldu = (size_t)c->ldu,
               n_out = in ? (size_t)c->n_out : 0, ldy = (size_t)c->ldy,
               n_in = in ? (size_t)c->n_in : 0, ldx = (size_t)c->ldx;
        size_t u = (r * ldu + rank) * c->esz, y = r * ldy + n_out, x = r * ldx + n_in;
        assert_same_bits("u outside", got->u + u, was.u + u, (ldu - rank) * c->esz);
        assert_same_bits("du outside", got->du + u, was.du + u, (ldu - rank) * c->esz);
        assert_same_bits("y outside", got->y + y, was.y + y, (ldy - n_out) * 4);
        assert_same_bits("dx outside", got->dx + x, was.dx + x, (ldx - n_in) * 4);
    }
    arrays_drop(&was);
}

static void check_alone(struct tb_backend *be, const struct lora *c, const struct arrays *all)
{
    struct arrays o;
    arrays_make(c, &o);
    for (int s = 0; s < N_SPANS; s++)
        for (int i = 0; i < lengths[s]; i += lengths[s] < 20 ? 1 : 31) {
            struct tb_lora_span one = {.n = 1, .mat = c->spans[s].mat};
            run(be, c, &one, 1, c->spans[s].row + i, &o);
            assert_same_rows(c, &o, all, c->spans[s].row + i, 1);
        }
    arrays_drop(&o);
}

/* A target's spans without the others, counted from the first; and one call a span. */
static void check_gradients(struct tb_backend *be, const struct lora *c, const struct arrays *all)
{
    for (int one_each = 0; one_each < 2; one_each++) {
        struct arrays o;
        arrays_make(c, &o);
        for (int m = 0; m < N_MATS; m++) {
            struct tb_lora_span s[N_SPANS];
            int n = 0;
            for (int i = 0; i < N_SPANS; i++) {
                if (mat_of[i] != m || i == FROZEN) continue;
                s[n] = c->spans[i];
                s[n].ga = o.ga[m];
                s[n++].gb = o.gb[m];
            }
            if (n == 0) continue;
            int row = s[0].row;
            for (int i = 0; i < n; i++)
                s[i].row -= row;
            for (int i = 0; i < n; i += one_each ? 1 : n)
                run(be, c, s + i, one_each ? 1 : n, row, &o);
            assert_same_gradient(c, &o, all, m);
        }
        arrays_drop(&o);
    }
}

static void check_case(enum tb_dtype act, int n_in, int n_out, int pad)
{
    struct tb_backend *be = open_backend("cuda", act, 1);
    struct lora c;
    struct arrays few, many;
    make(&c, act, n_in, n_out, pad);
    tb_cuda(be)->n_sm = 1; /* tiles of 32 rows */
    run_all(be, &c, &many);
    check_alone(be, &c, &many);
    tb_cuda(be)->n_sm = 1000; /* of 16 */
    run_all(be, &c, &few);
    assert_same_rows(&c, &few, &many, 0, c.T);
    for (int m = 0; m < N_MATS; m++)
        assert_same_gradient(&c, &few, &many, m);
    check_plain(&c, &few);
    check_untouched(&c, &few);
    check_gradients(be, &c, &few);
    arrays_drop(&few);
    arrays_drop(&many);
    drop(&c);
    be->ops->destroy(be);
}

static void test_spans(void **state)
{
    static const enum tb_dtype acts[] = {TB_F32, TB_BF16};
    for (int i = 0; i < 2; i++) {
        check_case(acts[i], 40, 72, 8);
        check_case(acts[i], 63, 70, 3);
        if (!SLOW) check_case(acts[i], 300, 136, 0);
    }
}

/* More rows of different modules, and more targets, than a launch takes. */
static void test_many_spans(void **state)
{
    enum { T = 1100, IN = 9, OUT = 11, RANK = 2, N = RANK * (IN + OUT) };
    struct tb_backend *be[2] = {open_backend("cuda", TB_F32, 1), open_backend("plain", TB_F32, 1)};
    float *x = random_f32((size_t)T * IN), *dy = random_f32((size_t)T * OUT),
          *w = random_f32((size_t)T * N);
    struct tb_lora_mat mats[T];
    struct tb_lora_span s[T];
    float *u[2], *y[2], *du[2], *dx[2], *g[2];
    for (int b = 0; b < 2; b++) {
        u[b] = calloc((size_t)T * RANK, 4);
        du[b] = calloc((size_t)T * RANK, 4);
        y[b] = calloc((size_t)T * OUT, 4);
        dx[b] = calloc((size_t)T * IN, 4);
        g[b] = calloc((size_t)T * N, 4);
        for (int i = 0; i < T; i++) {
            float *to =
                g[b] + (size_t)(i < 1080 ? i : i - 1080) * N; /* the last share the first's */
            mats[i] =
                (struct tb_lora_mat){w + (size_t)i * N, w + (size_t)i * N + RANK * IN, RANK, 0.5f};
            s[i] = (struct tb_lora_span){i, 1, &mats[i], to, to + RANK * IN};
        }
        const struct tb_backend_ops *f = be[b]->ops;
        lora_down(be[b], s, T, x, IN, IN, u[b], RANK);
        f->lora_up(be[b], s, T, u[b], RANK, y[b], OUT, OUT);
        f->lora_up_bwd(be[b], s, T, dy, OUT, OUT, u[b], du[b], RANK);
        f->lora_down_bwd(be[b], s, T, du[b], RANK, x, IN, IN, dx[b], IN);
    }
    assert_close("u", u[0], u[1], (size_t)T * RANK, 2e-5);
    assert_close("y", y[0], y[1], (size_t)T * OUT, 2e-5);
    assert_close("du", du[0], du[1], (size_t)T * RANK, 2e-5);
    assert_close("dx", dx[0], dx[1], (size_t)T * IN, 2e-5);
    assert_close("gradient", g[0], g[1], (size_t)T * N, 2e-5);
    for (int b = 0; b < 2; b++) {
        free(u[b]);
        free(y[b]);
        free(du[b]);
        free(dx[b]);
        free(g[b]);
        be[b]->ops->destroy(be[b]);
    }
    free(x);
    free(dy);
    free(w);
}

/* An n_out that several blocks share, and partial sums that do not fit in the scratch at once. */
static void test_long_sum(void **state)
{
    enum {
        T = 70,
        OUT = 2 * 32768 + 40,
        RANK = 9,
        LDU = 10,
        FEW = 3 * 32 * 32 * 4 * 2 /* two tiles of three parts */
    };
    static const enum tb_dtype acts[] = {TB_F32, TB_BF16};
    for (int a = 0; a < 2; a++) {
        struct tb_backend *be = open_backend("cuda", acts[a], 1),
                          *ref = open_backend("plain", acts[a], 1);
        size_t esz = tb_dtype_size(acts[a]);
        char *dy = random_act(acts[a], (size_t)T * OUT), *u = random_act(acts[a], T * LDU);
        void *b = random_act(acts[a], (size_t)RANK * OUT);
        struct tb_lora_mat mat = {NULL, b, RANK, 0.7f};
        struct tb_lora_span s[3] = {
            {0, 1, &mat, NULL, NULL}, {2, 8, &mat, NULL, NULL}, {10, 60, &mat, NULL, NULL}};
        char *want = calloc(T * LDU, esz), *got = calloc(T * LDU, esz), *one = calloc(LDU, esz);
        ref->ops->lora_up_bwd(ref, s, 3, dy, OUT, OUT, u, want, LDU);
        struct tb_cuda *c = tb_cuda(be);
        char *scratch = c->scratch, *few = calloc(2, FEW);
        size_t scratch_bytes = c->scratch_bytes;
        c->scratch = few;
        c->scratch_bytes = FEW;
        be->ops->lora_up_bwd(be, s, 3, dy, OUT, OUT, u, got, LDU);
        for (int i = FEW; i < 2 * FEW; i++)
            assert_int_equal(few[i], 0);
        c->scratch = scratch;
        c->scratch_bytes = scratch_bytes;
        assert_close_act("du", acts[a], got, want, T * LDU, acts[a] == TB_BF16 ? 1e-2 : 2e-5);
        static const int rows[] = {0, 2, 50, 69};
        for (int i = 0; i < 4; i++) {
            size_t row = (size_t)rows[i];
            be->ops->lora_up_bwd(be, s, 1, dy + row * OUT * esz, OUT, OUT, u, one, LDU);
            assert_same_bits("du alone", one, got + row * LDU * esz, LDU * esz);
        }
        free(dy);
        free(u);
        free(b);
        free(want);
        free(got);
        free(one);
        free(few);
        be->ops->destroy(be);
        ref->ops->destroy(ref);
    }
}

/* However long n_out is, a tile's partial sums fit in the scratch. */
static void test_longest_sum(void **state)
{
    enum { OUT = 64 * 32768 + 40, RANK = 2, MOST = 64 * 32 * 32 * 4 };
    struct tb_backend *be = open_backend("cuda", TB_BF16, 1),
                      *ref = open_backend("plain", TB_BF16, 1);
    void *dy = random_act(TB_BF16, OUT), *b = random_act(TB_BF16, (size_t)RANK * OUT);
    struct tb_lora_mat mat = {NULL, b, RANK, 0.01f};
    struct tb_lora_span s = {0, 1, &mat, NULL, NULL};
    uint16_t u[RANK] = {0}, want[RANK], got[RANK];
    struct tb_cuda *c = tb_cuda(be);
    char *scratch = c->scratch, *most = calloc(2, MOST);
    size_t scratch_bytes = c->scratch_bytes;
    c->scratch = most;
    c->scratch_bytes = MOST;
    ref->ops->lora_up_bwd(ref, &s, 1, dy, OUT, OUT, u, want, RANK);
    be->ops->lora_up_bwd(be, &s, 1, dy, OUT, OUT, u, got, RANK);
    c->scratch = scratch;
    c->scratch_bytes = scratch_bytes;
    for (int i = MOST; i < 2 * MOST; i++)
        assert_int_equal(most[i], 0);
    assert_close_act("du", TB_BF16, got, want, RANK, 1e-2);
    free(dy);
    free(b);
    free(most);
    be->ops->destroy(be);
    ref->ops->destroy(ref);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_spans),
        cmocka_unit_test(test_many_spans),
        cmocka_unit_test(test_long_sum),
        cmocka_unit_test(test_longest_sum),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
