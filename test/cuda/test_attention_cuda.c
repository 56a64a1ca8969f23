/*
 * The CUDA backend's attention where its splits and tiles make a difference: a row's bits are the
 * same in training, in a chunk of a prompt and alone, walking or spread, in every company; every
 * class of head dimension and size of group, against the plain backend; memory that is not aligned,
 * more tiles than a launch takes.
 */
#include "../unit/backend/common.h"
#include "cuda/cuda.h"

#define LONG   1100 /* more than two splits */
#define POISON 0xff /* NaN everywhere */

struct text { /* a sequence and what attention gives for its rows */
    struct tb_attn_shape s;
    enum tb_dtype act;
    int n;
    size_t q_row, kv_row; /* bytes */
    char *q, *k, *v, *out;
    float *lse;
};

static void make(struct text *x, struct tb_backend *be, struct tb_attn_shape s, int n)
{
    size_t e = tb_dtype_size(be->act);
    *x = (struct text){.s = s, .act = be->act, .n = n};
    x->s.scale = 1.0f / sqrtf((float)s.head_dim);
    x->q_row = (size_t)(s.n_head * s.head_dim) * e;
    x->kv_row = (size_t)(s.n_kv_head * s.head_dim) * e;
    size_t nq = (size_t)(n * s.n_head * s.head_dim), nkv = (size_t)(n * s.n_kv_head * s.head_dim);
    float *q = random_f32(nq);
    for (size_t i = 0; i < nq; i++)
        q[i] *= 3; /* peaky enough to matter */
    x->q = to_act(be->act, q, nq);
    free(q);
    x->k = random_act(be->act, nkv);
    x->v = random_act(be->act, nkv);
    x->out = calloc(nq, e);
    x->lse = calloc((size_t)(n * s.n_head), sizeof(float));
    struct tb_attn_seq all = {.n = n};
    be->ops->attention(be, &x->s, &all, 1, x->q, x->k, x->v, NULL, x->out, x->lse);
}

static void drop(struct text *x)
{
    free(x->q);
    free(x->k);
    free(x->v);
    free(x->out);
    free(x->lse);
}

static void check_plain(const struct text *x)
{
    struct tb_backend *ref = open_backend("plain", x->act, 1);
    size_t nq = (size_t)(x->n * x->s.n_head * x->s.head_dim), nl = (size_t)(x->n * x->s.n_head);
    void *out = calloc(nq, tb_dtype_size(x->act));
    float *lse = calloc(nl, sizeof(float));
    struct tb_attn_seq all = {.n = x->n};
    ref->ops->attention(ref, &x->s, &all, 1, x->q, x->k, x->v, NULL, out, lse);
    assert_close_act("attention", x->act, x->out, out, nq, x->act == TB_BF16 ? 1.5e-2 : 2e-5);
    assert_close("lse", x->lse, lse, nl, x->act == TB_BF16 ? 1e-4 : 1e-5);
    free(out);
    free(lse);
    ref->ops->destroy(ref);
}

/* Rows [pos, pos + n) of the text, through pages. */
struct part {
    int pos, n;
};
#define MAX_PARTS 16

/* Computes the parts in one call, each with pages of its own that hold what comes before it and
 * nothing of what comes after, and compares with the text's rows. */
static void check_parts(struct tb_backend *be, const struct text *x, const struct part *parts,
                        int n_parts)
{
    const struct tb_backend_ops *o = be->ops;
    struct tb_attn_seq write[MAX_PARTS], read[MAX_PARTS];
    size_t page = o->kv_page_bytes(be, &x->s);
    int n_pages = 0, n_rows = 1; /* row 0 belongs to nobody */
    for (int i = 0; i < n_parts; i++) {
        n_rows += parts[i].n;
        n_pages += (parts[i].pos + parts[i].n + TB_KV_PAGE - 1) / TB_KV_PAGE;
    }
    int32_t *pages = malloc((size_t)n_pages * sizeof(*pages)), *at = pages;
    char *pool = o->alloc(be, (size_t)n_pages * page), *q = malloc((size_t)n_rows * x->q_row),
         *out = malloc((size_t)n_rows * x->q_row);
    memset(pool, POISON, (size_t)n_pages * page);
    memset(out, 0, (size_t)n_rows * x->q_row);
    for (int i = 0; i < n_pages; i++)
        pages[i] = n_pages - 1 - i;
    for (int i = 0, row = 1; i < n_parts; row += parts[i].n, i++) {
        int end = parts[i].pos + parts[i].n;
        write[i] = (struct tb_attn_seq){.n = end, .pages = at};
        read[i] = (struct tb_attn_seq){row, parts[i].n, parts[i].pos, at};
        memcpy(q + (size_t)row * x->q_row, x->q + (size_t)parts[i].pos * x->q_row,
               (size_t)parts[i].n * x->q_row);
        at += (end + TB_KV_PAGE - 1) / TB_KV_PAGE;
    }
    o->kv_write(be, &x->s, write, n_parts, x->k, x->v, pool);
    o->attention(be, &x->s, read, n_parts, q, NULL, NULL, pool, out, NULL);
    for (int i = 0; i < n_parts; i++)
        assert_same_bits("a part", out + (size_t)read[i].row * x->q_row,
                         x->out + (size_t)parts[i].pos * x->q_row, (size_t)parts[i].n * x->q_row);
    o->free(be, pool, (size_t)n_pages * page);
    free(pages);
    free(q);
    free(out);
}

/* The ways to compute a call: walking or spread, with room for all partial sums or for few. */
static const struct way {
    int n_sm;
    size_t scratch;
} ways[] = {{0, TB_CUDA_SCRATCH}, {1000, TB_CUDA_SCRATCH}, {1000, (size_t)64 << 10}};
#define N_WAYS (int)(sizeof(ways) / sizeof(ways[0]))

static void set_way(struct tb_backend *be, int i)
{
    tb_cuda(be)->n_sm = ways[i].n_sm;
    tb_cuda(be)->scratch_bytes = ways[i].scratch;
}

/* n_head, n_kv_head, head_dim, scale, window */
static const struct tb_attn_shape long_shapes[] = {
    {2, 1, 16, 0, 0}, {1, 1, 24, 0, 600}, {5, 1, 8, 0, 513}};
#define N_LONG (int)(sizeof(long_shapes) / sizeof(long_shapes[0]))

static void test_chunks(void **state)
{
    static const int sizes[] = {1, 3, 16, 17, 64, 65, 511, 512, 513};
    for (int t = 0; t < N_TARGETS; t++) {
        struct tb_backend *be = open_backend("cuda", targets[t].act, 1);
        for (int s = 0; s < N_LONG; s += SLOW ? N_LONG : 1) {
            struct text x;
            set_way(be, s % N_WAYS);
            make(&x, be, long_shapes[s], LONG);
            if (s < 2) check_plain(&x);
            for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
                int n = sizes[i];
                set_way(be, (int)i % N_WAYS);
                check_parts(be, &x, &(struct part){LONG - n, n}, 1);
                set_way(be, (int)(i + 1) % N_WAYS);
                if (s == 0) check_parts(be, &x, &(struct part){600 - n, n}, 1);
            }
            if (s == 0) check_parts(be, &x, &(struct part){0, LONG}, 1);
            drop(&x);
        }
        be->ops->destroy(be);
    }
}

/* Single rows at every kind of position, alone and together with chunks. */
static void test_decode(void **state)
{
    static const int pos[] = {0,   1,   15,  16,  31,  32,  63,   64,   65,   127,
                              510, 511, 512, 513, 599, 639, 1023, 1024, 1025, LONG - 1};
    static const struct part company[] = {{0, 1},    {1050, 1}, {500, 40}, {511, 1},
                                          {1023, 2}, {0, 130},  {64, 1},   {900, 17},
                                          {512, 1},  {1020, 9}, {1099, 1}, {16, 16}};
    for (int t = 0; t < N_TARGETS; t++) {
        struct tb_backend *be = open_backend("cuda", targets[t].act, 1);
        for (int s = 0; s < N_LONG; s += SLOW ? N_LONG : 1) {
            struct text x;
            make(&x, be, long_shapes[s], LONG);
            for (size_t i = 0; i < sizeof(pos) / sizeof(pos[0]); i++) {
                set_way(be, (int)i % N_WAYS);
                check_parts(be, &x, &(struct part){pos[i], 1}, 1);
            }
            for (int w = 0; w < N_WAYS; w++) {
                set_way(be, w);
                check_parts(be, &x, company, (int)(sizeof(company) / sizeof(company[0])));
            }
            drop(&x);
        }
        be->ops->destroy(be);
    }
}

/* Groups of 1, 2, 4, 7, 16 and every class of head dimensions. */
static void test_shapes(void **state)
{
    static const struct tb_attn_shape shapes[] = {
        {2, 2, 16, 0, 0},   {4, 2, 40, 0, 33}, {4, 1, 64, 0, 0},  {7, 1, 80, 0, 0},
        {16, 1, 96, 0, 64}, {2, 2, 128, 0, 0}, {2, 1, 256, 0, 0}, {2, 1, 136, 0, 9},
        {2, 1, 33, 0, 0},   {3, 1, 2, 0, 0}};
    static const struct part parts[] = {{0, 70}, {69, 1}, {64, 6}, {3, 1}, {40, 30}, {0, 17}};
    for (int t = 0; t < N_TARGETS; t++) {
        struct tb_backend *be = open_backend("cuda", targets[t].act, 1);
        for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s += SLOW ? 3 : 1) {
            struct text x;
            make(&x, be, shapes[s], 70);
            check_plain(&x);
            check_parts(be, &x, parts, (int)(sizeof(parts) / sizeof(parts[0])));
            drop(&x);
        }
        /* a split and a bit of the largest */
        struct text x;
        make(&x, be, (struct tb_attn_shape){1, 1, 256, 0, 0}, SLOW ? 40 : 520);
        check_parts(be, &x, &(struct part){x.n - 1, 1}, 1);
        check_parts(be, &x, &(struct part){x.n - 30, 30}, 1);
        drop(&x);
        be->ops->destroy(be);
    }
}

/* Arrays that do not begin at 16 bytes give the same bits. */
static void test_alignment(void **state)
{
    for (int t = 0; t < N_TARGETS; t++) {
        struct tb_backend *be = open_backend("cuda", targets[t].act, 1);
        size_t e = tb_dtype_size(be->act);
        struct text x;
        make(&x, be, (struct tb_attn_shape){4, 2, 16, 0, 0}, 90);
        struct tb_attn_seq all = {.n = x.n};
        size_t nq = (size_t)x.n * x.q_row, nkv = (size_t)x.n * x.kv_row;
        char *q = malloc(nq + e), *kv = malloc(2 * nkv + e), *out = malloc(nq + e);
        memcpy(q + e, x.q, nq);
        memcpy(kv + e, x.k, nkv);
        memcpy(kv + e + nkv, x.v, nkv);
        be->ops->attention(be, &x.s, &all, 1, q + e, kv + e, kv + e + nkv, NULL, out + e, NULL);
        assert_same_bits("not aligned", out + e, x.out, nq);
        free(q);
        free(kv);
        free(out);
        drop(&x);
        be->ops->destroy(be);
    }
}

/* More sequences than a launch has tasks. */
static void test_many(void **state)
{
    enum { N = 2100, HD = 16 };
    for (int t = 0; t < N_TARGETS; t++) {
        struct tb_backend *be = open_backend("cuda", targets[t].act, 1);
        struct tb_attn_shape s = {1, 1, HD, 0.25f, 0};
        static struct tb_attn_seq seqs[N];
        static int32_t pages[N];
        size_t row = HD * tb_dtype_size(be->act), page = be->ops->kv_page_bytes(be, &s);
        char *q = random_act(be->act, N * HD), *kv = random_act(be->act, N * HD),
             *out = calloc(N, row), *pool = be->ops->alloc(be, N * page);
        memset(pool, POISON, N * page);
        for (int i = 0; i < N; i++) {
            pages[i] = i * 11 % N;
            seqs[i] = (struct tb_attn_seq){i, 1, 0, &pages[i]};
        }
        be->ops->kv_write(be, &s, seqs, N, kv, kv, pool);
        be->ops->attention(be, &s, seqs, N, q, NULL, NULL, pool, out, NULL);
        assert_close_act("of one key, its value", be->act, out, kv, N * HD, 1e-6);
        be->ops->free(be, pool, N * page);
        free(q);
        free(kv);
        free(out);
        be->ops->destroy(be);
    }
}

static void test_head_dim(void **state)
{
    struct tb_backend *be = open_backend("cuda", TB_F32, 1);
    struct tb_attn_shape s = {1, 1, 258, 1, 0};
    struct tb_attn_seq seq = {.n = 1};
    struct tb_error err = {0};
    float x[258] = {0};
    be->ops->attention(be, &s, &seq, 1, x, x, x, NULL, x, NULL);
    assert_int_equal(be->ops->sync(be, &err), TB_EDEVICE);
    assert_non_null(strstr(err.msg, "head_dim"));
    be->ops->destroy(be);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_chunks), cmocka_unit_test(test_decode),
        cmocka_unit_test(test_shapes), cmocka_unit_test(test_alignment),
        cmocka_unit_test(test_many),   cmocka_unit_test(test_head_dim),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
