/*
 * The CUDA backend's attention_bwd where its tiles make a difference: sequences of lengths around a
 * tile's, every class of head dimension, groups, windows, more tiles than a launch takes, memory
 * that is not aligned; against the plain backend, against differences of the loss, and against
 * itself bit for bit.
 */
#include "../unit/backend/common.h"

#define MAX_SEQS 12

struct pack {
    struct tb_attn_shape s;
    struct tb_attn_seq seqs[MAX_SEQS];
    int n_seqs, T;
    enum tb_dtype act;
    size_t nq, nkv;
    char *q, *k, *v, *out;
    float *lse, *dout;
};

static bool is_own(const struct tb_attn_seq *seqs, int n_seqs, size_t row)
{
    for (int i = 0; i < n_seqs; i++)
        if (row >= (size_t)seqs[i].row && row < (size_t)(seqs[i].row + seqs[i].n)) return true;
    return false;
}

/* Random values; infinity in the rows that no sequence has, which nobody may read. */
static float *random_rows(const struct pack *p, size_t n, float scale)
{
    float *x = random_f32(n);
    for (size_t i = 0; i < n; i++)
        x[i] = is_own(p->seqs, p->n_seqs, i / (n / (size_t)p->T)) ? x[i] * scale : INFINITY;
    return x;
}
static char *random_acts(const struct pack *p, size_t n, float scale)
{
    float *x = random_rows(p, n, scale);
    char *y = to_act(p->act, x, n);
    free(x);
    return y;
}

/* Sequences of the given lengths (0: the end) with a row of nobody around each, and the plain
 * backend's outputs. */
static void make(struct pack *p, enum tb_dtype act, struct tb_attn_shape s, const int *lengths)
{
    *p = (struct pack){.s = s, .act = act};
    p->s.scale = 1.0f / sqrtf((float)s.head_dim);
    for (; p->n_seqs < MAX_SEQS && lengths[p->n_seqs]; p->n_seqs++) {
        p->seqs[p->n_seqs] = (struct tb_attn_seq){.row = p->T + 1, .n = lengths[p->n_seqs]};
        p->T += 1 + lengths[p->n_seqs];
    }
    p->T++;
    p->nq = (size_t)(p->T * s.n_head * s.head_dim);
    p->nkv = (size_t)(p->T * s.n_kv_head * s.head_dim);
    p->q = random_acts(p, p->nq, 3); /* peaky enough to matter */
    p->k = random_acts(p, p->nkv, 1);
    p->v = random_acts(p, p->nkv, 1);
    p->dout = random_rows(p, p->nq, 1);
    p->out = calloc(p->nq, tb_dtype_size(act));
    p->lse = calloc((size_t)(p->T * s.n_head), sizeof(float));
    struct tb_backend *ref = open_backend("plain", act, 1);
    ref->ops->attention(ref, &p->s, p->seqs, p->n_seqs, p->q, p->k, p->v, NULL, p->out, p->lse);
    ref->ops->destroy(ref);
}

static void drop(struct pack *p)
{
    free(p->q);
    free(p->k);
    free(p->v);
    free(p->out);
    free(p->lse);
    free(p->dout);
}

static size_t grad_floats(const struct pack *p)
{
    return p->nq + 2 * p->nkv;
}

/* dq, dk, dv behind each other; what no sequence has stays infinite. */
static float *backward(struct pack *p, struct tb_backend *be, const struct tb_attn_seq *seqs,
                       int n_seqs)
{
    float *d = malloc(grad_floats(p) * sizeof(float));
    assert_non_null(d);
    for (size_t i = 0; i < grad_floats(p); i++)
        d[i] = INFINITY;
    be->ops->attention_bwd(be, &p->s, seqs, n_seqs, p->q, p->k, p->v, p->out, p->lse, p->dout, d,
                           d + p->nq, d + p->nq + p->nkv);
    struct tb_error err = {0};
    assert_int_equal(be->ops->sync(be, &err), 0);
    return d;
}

static void compare(struct pack *p, const float *d)
{
    struct tb_backend *ref = open_backend("plain", p->act, 1);
    float *want = backward(p, ref, p->seqs, p->n_seqs);
    double tol = p->act == TB_BF16 ? 2e-2 : 5e-5;
    assert_close("dq", d, want, p->nq, tol);
    assert_close("dk", d + p->nq, want + p->nq, p->nkv, tol);
    assert_close("dv", d + p->nq + p->nkv, want + p->nq + p->nkv, p->nkv, tol);
    ref->ops->destroy(ref);
    free(want);
}

static void check(enum tb_dtype act, struct tb_attn_shape s, const int *lengths)
{
    struct tb_backend *be = open_backend("cuda", act, 1);
    struct pack p;
    make(&p, act, s, lengths);
    float *d = backward(&p, be, p.seqs, p.n_seqs);
    compare(&p, d);
    free(d);
    drop(&p);
    be->ops->destroy(be);
}

/* n_head, n_kv_head, head_dim, scale, window */
static void test_against_plain(void **state)
{
    static const int edges[] = {1, 15, 16, 17, 31, 33, 63, 64, 65, 0}, few[] = {33, 1, 66, 0};
    static const struct tb_attn_shape all[] = {{2, 1, 32, 0, 0}, {4, 1, 16, 0, 20}},
                                      some[] = {{7, 1, 40, 0, 0},   {2, 2, 64, 0, 33},
                                                {2, 1, 80, 0, 0},   {2, 2, 96, 0, 2},
                                                {2, 1, 128, 0, 16}, {1, 1, 192, 0, 0},
                                                {2, 1, 256, 0, 32}, {2, 1, 33, 0, 0},
                                                {2, 2, 4, 0, 50},   {1, 1, 131, 0, 17}};
    for (int t = 0; t < N_TARGETS; t++) {
        for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
            check(targets[t].act, all[i], edges);
        for (size_t i = 0; i < sizeof(some) / sizeof(some[0]); i++)
            check(targets[t].act, some[i], few);
    }
}

/* A long sequence: many tiles of queries for a tile of keys, with a window and without. */
static void test_long(void **state)
{
    static const int length[] = {330, 0};
    for (int t = 0; t < N_TARGETS; t++) {
        check(targets[t].act, (struct tb_attn_shape){2, 1, 16, 0, 0}, length);
        check(targets[t].act, (struct tb_attn_shape){1, 1, 128, 0, 70}, length);
    }
}

static double loss(struct tb_backend *be, struct pack *p)
{
    double sum = 0;
    float *out = calloc(p->nq, sizeof(float));
    assert_non_null(out);
    be->ops->attention(be, &p->s, p->seqs, p->n_seqs, p->q, p->k, p->v, NULL, out, NULL);
    for (size_t i = 0; i < p->nq; i++)
        if (isfinite(p->dout[i])) /* somebody's */
            sum += (double)out[i] * (double)p->dout[i];
    free(out);
    return sum;
}

static void test_gradient(void **state)
{
    static const int lengths[] = {7, 18, 0};
    for (int window = 0; window <= 5; window += 5) {
        struct tb_backend *ref = open_backend("plain", TB_F32, 1),
                          *be = open_backend("cuda", TB_F32, 1);
        struct pack p;
        make(&p, TB_F32, (struct tb_attn_shape){4, 2, 6, 0, window}, lengths);
        float *d = backward(&p, be, p.seqs, p.n_seqs),
              *x[] = {(float *)(void *)p.q, (float *)(void *)p.k, (float *)(void *)p.v};
        size_t n[] = {p.nq, p.nkv, p.nkv}, at = 0;
        for (int a = 0; a < 3; at += n[a++]) {
            size_t row = n[a] / (size_t)p.T;
            for (size_t i = 0; i < n[a]; i++) {
                if (!is_own(p.seqs, p.n_seqs, i / row)) continue;
                float old = x[a][i];
                x[a][i] = old + 1e-2f;
                double up = loss(ref, &p);
                x[a][i] = old - 1e-2f;
                double down = loss(ref, &p), want = (up - down) / 2e-2;
                x[a][i] = old;
                if (fabs(want - (double)d[at + i]) > 1e-3)
                    fail_msg("input %d, %zu: %g, differences say %g", a, i, (double)d[at + i],
                             want);
            }
        }
        free(d);
        drop(&p);
        ref->ops->destroy(ref);
        be->ops->destroy(be);
    }
}

/* One sequence a call, all in the reverse order, and rows copied element by element because memory
 * is not aligned. */
static void test_same_bits(void **state)
{
    static const int lengths[] = {40, 1, 70, 16, 2, 0};
    static const struct tb_attn_shape shapes[] = {{4, 2, 16, 0, 0}, {2, 1, 72, 0, 19}};
    for (int t = 0; t < N_TARGETS; t++) {
        for (int i = 0; i < 2; i++) {
            struct tb_backend *be = open_backend("cuda", targets[t].act, 1);
            struct tb_attn_seq reverse[MAX_SEQS];
            struct pack p;
            make(&p, targets[t].act, shapes[i], lengths);
            size_t bytes = grad_floats(&p) * sizeof(float), esz = tb_dtype_size(p.act);
            float *all = backward(&p, be, p.seqs, p.n_seqs);
            for (int s = 0; s < p.n_seqs; s++) {
                reverse[p.n_seqs - 1 - s] = p.seqs[s];
                float *one = backward(&p, be, p.seqs + s, 1);
                for (size_t j = 0; j < grad_floats(&p); j++) {
                    bool q = j < p.nq;
                    size_t row = (q ? j : (j - p.nq) % p.nkv) /
                                 (size_t)((q ? p.s.n_head : p.s.n_kv_head) * p.s.head_dim);
                    float want = is_own(p.seqs + s, 1, row) ? all[j] : INFINITY;
                    assert_same_bits("alone", &one[j], &want, sizeof(want));
                }
                free(one);
            }
            float *other = backward(&p, be, reverse, p.n_seqs);
            assert_same_bits("in the reverse order", other, all, bytes);
            free(other);
            char *aligned = p.q;
            p.q = malloc((p.nq + 1) * esz);
            assert_non_null(p.q);
            memcpy(p.q + esz, aligned, p.nq * esz);
            p.q += esz;
            other = backward(&p, be, p.seqs, p.n_seqs);
            assert_same_bits("not aligned", other, all, bytes);
            free(other);
            free(p.q - esz);
            p.q = aligned;
            free(all);
            drop(&p);
            be->ops->destroy(be);
        }
    }
}

/* More sequences than one launch has tiles for. */
static void test_many(void **state)
{
    enum { N = 2100, HD = 8 };
    for (int t = 0; t < N_TARGETS; t++) {
        static const int length[] = {N, 0};
        struct tb_backend *ref = open_backend("plain", targets[t].act, 1),
                          *be = open_backend("cuda", targets[t].act, 1);
        struct tb_attn_seq *seqs = calloc(N, sizeof(*seqs));
        struct pack p;
        make(&p, targets[t].act, (struct tb_attn_shape){1, 1, HD, 0, 1}, length);
        for (int i = 0; i < N; i++)
            seqs[i] = (struct tb_attn_seq){.row = 1 + i, .n = 1 - i % 50 / 49};
        ref->ops->attention(ref, &p.s, seqs, N, p.q, p.k, p.v, NULL, p.out, p.lse);
        float *d = backward(&p, be, seqs, N), *want = backward(&p, ref, seqs, N);
        assert_close("many sequences", d, want, grad_floats(&p), targets[t].act ? 2e-2 : 5e-5);
        free(d);
        free(want);
        free(seqs);
        drop(&p);
        ref->ops->destroy(ref);
        be->ops->destroy(be);
    }
}

/* What the kernels are not made for is the device's error, not wrong numbers. */
static void test_head_dim(void **state)
{
    static const int length[] = {3, 0};
    struct tb_backend *be = open_backend("cuda", TB_F32, 1);
    struct tb_error err = {0};
    struct pack p;
    make(&p, TB_F32, (struct tb_attn_shape){1, 1, 258, 0, 0}, length);
    float *d = calloc(grad_floats(&p), sizeof(float));
    be->ops->attention_bwd(be, &p.s, p.seqs, 1, p.q, p.k, p.v, p.out, p.lse, p.dout, d, d + p.nq,
                           d + p.nq + p.nkv);
    assert_int_equal(be->ops->sync(be, &err), TB_EDEVICE);
    assert_non_null(strstr(err.msg, "head_dim"));
    free(d);
    drop(&p);
    be->ops->destroy(be);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_against_plain), cmocka_unit_test(test_long),
        cmocka_unit_test(test_gradient),      cmocka_unit_test(test_same_bits),
        cmocka_unit_test(test_many),          cmocka_unit_test(test_head_dim),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
