/*
 * Attention: every instruction set against the plain one, against finite differences, and pages
 * against rows bit for bit.
 */
#include "common.h"

struct shape {
    int nh, nk, hd, window;
};
static const struct shape shapes[] = {
    {2, 2, 16, 0},  {4, 2, 32, 0}, {4, 1, 64, 0}, {8, 1, 80, 0},
    {2, 1, 128, 0}, {4, 2, 33, 0}, {2, 2, 8, 20}, {4, 2, 64, 7},
};
#define N_SHAPES (int)(sizeof(shapes) / sizeof(shapes[0]))
#define STEP     (SLOW ? 3 : 1) /* under a sanitizer some of them */

#define N_SEQS 6
static const int lengths[N_SEQS] = {1, 70, 16, 33, 2, 65};
/* More than the fast kernels pack at once: pages forward, keys backward. */
static const int long_lengths[N_SEQS] = {5, 1090, 2, 0, 33, 64};

struct batch {
    struct tb_attn_shape s;
    struct tb_attn_seq seqs[N_SEQS];
    int T;
    void *q, *k, *v;
    float *dout;
};

static void make(struct batch *b, enum tb_dtype act, const struct shape *sh, const int *n)
{
    b->s = (struct tb_attn_shape){sh->nh, sh->nk, sh->hd, 1.0f / sqrtf((float)sh->hd), sh->window};
    b->T = 1; /* row 0 belongs to nobody */
    for (int i = 0; i < N_SEQS; i++) {
        b->seqs[i] = (struct tb_attn_seq){.row = b->T, .n = n[i]};
        b->T += n[i];
    }
    size_t nq = (size_t)(b->T * sh->nh * sh->hd), nkv = (size_t)(b->T * sh->nk * sh->hd);
    float *q = random_f32(nq);
    for (size_t i = 0; i < nq; i++)
        q[i] *= 3; /* peaky enough to matter */
    b->q = to_act(act, q, nq);
    free(q);
    b->k = random_act(act, nkv);
    b->v = random_act(act, nkv);
    b->dout = random_f32(nq);
}

static void drop(struct batch *b)
{
    free(b->q);
    free(b->k);
    free(b->v);
    free(b->dout);
}

static void check(const struct target *t, const struct shape *sh, const int *n)
{
    struct tb_backend *ref = open_backend("plain", t->act, 1),
                      *be = open_backend(t->isa, t->act, 2);
    if (be) {
        struct batch b;
        make(&b, t->act, sh, n);
        size_t nq = (size_t)(b.T * sh->nh * sh->hd), nkv = (size_t)(b.T * sh->nk * sh->hd),
               nl = (size_t)(b.T * sh->nh);
        size_t esz = tb_dtype_size(t->act);
        void *out = calloc(nq, esz), *outr = calloc(nq, esz);
        float *lse = calloc(nl, 4), *lser = calloc(nl, 4), *d = calloc(nq + 2 * nkv, 4),
              *dr = calloc(nq + 2 * nkv, 4);
        ref->ops->attention(ref, &b.s, b.seqs, N_SEQS, b.q, b.k, b.v, NULL, outr, lser);
        be->ops->attention(be, &b.s, b.seqs, N_SEQS, b.q, b.k, b.v, NULL, out, lse);
        assert_close_act("attention", t->act, out, outr, nq, t->act == TB_BF16 ? 1.5e-2 : 2e-5);
        assert_close("lse", lse, lser, nl, t->act == TB_BF16 ? 1e-4 : 1e-5);
        memset(out, 0, nq * esz);
        be->ops->attention(be, &b.s, b.seqs, N_SEQS, b.q, b.k, b.v, NULL, out, NULL);
        assert_close_act("attention without lse", t->act, out, outr, nq,
                         t->act == TB_BF16 ? 1.5e-2 : 2e-5);
        ref->ops->attention_bwd(ref, &b.s, b.seqs, N_SEQS, b.q, b.k, b.v, outr, lser, b.dout, dr,
                                dr + nq, dr + nq + nkv);
        be->ops->attention_bwd(be, &b.s, b.seqs, N_SEQS, b.q, b.k, b.v, outr, lser, b.dout, d,
                               d + nq, d + nq + nkv);
        double tol = t->act == TB_BF16 ? 2e-2 : 5e-5;
        assert_close("dq", d, dr, nq, tol);
        assert_close("dk", d + nq, dr + nq, nkv, tol);
        assert_close("dv", d + nq + nkv, dr + nq + nkv, nkv, tol);
        free(out);
        free(outr);
        free(lse);
        free(lser);
        free(d);
        free(dr);
        drop(&b);
        be->ops->destroy(be);
    }
    ref->ops->destroy(ref);
}

static void test_against_plain(void **state)
{
    for (int i = 0; i < N_TARGETS; i++)
        for (int s = 0; s < N_SHAPES; s += STEP)
            check(&targets[i], &shapes[s], lengths);
}

static void test_long(void **state)
{
    static const struct shape few[] = {{4, 2, 16, 0}, {2, 1, 33, 1030}, {2, 2, 16, 20}};
    for (int i = 0; i < N_TARGETS; i++)
        for (int s = 0; s < 3; s += STEP)
            check(&targets[i], &few[s], long_lengths);
}

static void test_gradient(void **state)
{
    enum { N = 7 };
    struct tb_backend *be = open_backend("plain", TB_F32, 1);
    for (int w = 0; w < 2; w++) {
        struct tb_attn_shape s = {4, 2, 6, 0.4f, w ? 3 : 0};
        struct tb_attn_seq seq = {.row = 0, .n = N};
        size_t nq = N * 4 * 6, nkv = N * 2 * 6, all = nq + 2 * nkv;
        float *x = random_f32(all), *dout = random_f32(nq), *out = calloc(nq, 4),
              *d = calloc(all, 4), lse[N * 4];
        be->ops->attention(be, &s, &seq, 1, x, x + nq, x + nq + nkv, NULL, out, lse);
        be->ops->attention_bwd(be, &s, &seq, 1, x, x + nq, x + nq + nkv, out, lse, dout, d, d + nq,
                               d + nq + nkv);
        for (size_t p = 0; p < all; p++) {
            float old = x[p];
            double f[2] = {0, 0};
            for (int k = 0; k < 2; k++) {
                x[p] = old + (k ? 1e-2f : -1e-2f);
                be->ops->attention(be, &s, &seq, 1, x, x + nq, x + nq + nkv, NULL, out, NULL);
                for (size_t i = 0; i < nq; i++)
                    f[k] += (double)out[i] * (double)dout[i];
            }
            x[p] = old;
            double num = (f[1] - f[0]) / 2e-2;
            if (fabs(num - (double)d[p]) > 1e-3)
                fail_msg("parameter %zu: %g, differences say %g", p, (double)d[p], num);
        }
        free(x);
        free(dout);
        free(out);
        free(d);
    }
    be->ops->destroy(be);
}

/* The same sequences through pages, written and queried in steps of `step` tokens, give the rows'
 * bits. */
static void check_pages(const struct target *t, const struct shape *sh, int step)
{
    struct tb_backend *be = open_backend(t->isa, t->act, 2);
    if (!be) return;
    struct batch b;
    make(&b, t->act, sh, lengths);
    size_t row_q = (size_t)(sh->nh * sh->hd), row_kv = (size_t)(sh->nk * sh->hd),
           esz = tb_dtype_size(t->act);
    size_t nq = (size_t)b.T * row_q, page = be->ops->kv_page_bytes(be, &b.s);
    enum { PER = 5, POOL = N_SEQS * PER };
    void *out = calloc(nq, esz), *paged = calloc(nq, esz);
    char *pool = be->ops->alloc(be, page * POOL);
    memset(pool, 0xff, page * POOL); /* NaN everywhere */
    be->ops->attention(be, &b.s, b.seqs, N_SEQS, b.q, b.k, b.v, NULL, out, NULL);
    int32_t pages[N_SEQS][PER];
    for (int i = 0; i < N_SEQS; i++)
        for (int p = 0; p < PER; p++)
            pages[i][p] = (p * N_SEQS + i) * 7 % POOL;
    for (int from = 0; from < 70; from += step) {
        struct tb_attn_seq seqs[N_SEQS], write[N_SEQS];
        char *q = malloc((size_t)(step * N_SEQS) * row_q * esz),
             *k = malloc((size_t)(step * N_SEQS) * row_kv * esz);
        char *v = malloc((size_t)(step * N_SEQS) * row_kv * esz),
             *o = malloc((size_t)(step * N_SEQS) * row_q * esz);
        int n = 0, rows = 0, at[N_SEQS], count[N_SEQS];
        for (int i = 0; i < N_SEQS; i++) {
            int m = lengths[i] - from < step ? lengths[i] - from : step;
            if (m <= 0) continue;
            at[n] = b.seqs[i].row + from;
            count[n] = m;
            seqs[n] = (struct tb_attn_seq){.row = rows, .n = m, .pos = from, .pages = pages[i]};
            memcpy(q + (size_t)rows * row_q * esz, (char *)b.q + (size_t)at[n] * row_q * esz,
                   (size_t)m * row_q * esz);
            memcpy(k + (size_t)rows * row_kv * esz, (char *)b.k + (size_t)at[n] * row_kv * esz,
                   (size_t)m * row_kv * esz);
            memcpy(v + (size_t)rows * row_kv * esz, (char *)b.v + (size_t)at[n] * row_kv * esz,
                   (size_t)m * row_kv * esz);
            rows += m;
            write[n] = seqs[n];
            n++;
        }
        be->ops->kv_write(be, &b.s, write, n, k, v, pool);
        be->ops->attention(be, &b.s, seqs, n, q, NULL, NULL, pool, o, NULL);
        for (int i = 0; i < n; i++)
            memcpy((char *)paged + (size_t)at[i] * row_q * esz,
                   o + (size_t)seqs[i].row * row_q * esz, (size_t)count[i] * row_q * esz);
        free(q);
        free(k);
        free(v);
        free(o);
    }
    assert_same_bits("paged attention", paged, out, nq * esz);
    be->ops->free(be, pool, page * POOL);
    free(out);
    free(paged);
    drop(&b);
    be->ops->destroy(be);
}

static void test_pages(void **state)
{
    for (int i = 0; i < N_TARGETS; i++) {
        for (int s = 0; s < N_SHAPES; s += STEP) {
            check_pages(&targets[i], &shapes[s], 1);
            check_pages(&targets[i], &shapes[s], 5);
            check_pages(&targets[i], &shapes[s], 64);
        }
    }
}

/* A sequence alone, and with other numbers of threads, gives the same bits, forward and backward.
 */
static void test_alone(void **state)
{
    for (int i = 0; i < N_TARGETS; i++) {
        for (int s = 0; s < N_SHAPES; s += STEP) {
            const struct shape *sh = &shapes[s];
            enum tb_dtype act = targets[i].act;
            struct batch b;
            rng_state = 99;
            make(&b, act, sh, lengths);
            size_t nq = (size_t)(b.T * sh->nh * sh->hd), nkv = (size_t)(b.T * sh->nk * sh->hd);
            char *first = NULL;
            for (int threads = 1; threads <= 3; threads++) {
                struct tb_backend *be = open_backend(targets[i].isa, act, threads);
                if (!be) break;
                size_t esz = tb_dtype_size(act),
                       bytes = nq * esz + (nq + 2 * nkv + (size_t)(b.T * sh->nh)) * 4;
                char *mem = calloc(1, bytes);
                float *d = (float *)(void *)mem, *lse = d + nq + 2 * nkv;
                void *out = lse + (size_t)(b.T * sh->nh);
                int step = threads == 2 ? 1 : N_SEQS; /* one sequence a call, or all */
                for (int q = 0; q < N_SEQS; q += step) {
                    be->ops->attention(be, &b.s, b.seqs + q, step, b.q, b.k, b.v, NULL, out, lse);
                    be->ops->attention_bwd(be, &b.s, b.seqs + q, step, b.q, b.k, b.v, out, lse,
                                           b.dout, d, d + nq, d + nq + nkv);
                }
                if (!first) {
                    first = mem;
                } else {
                    assert_same_bits("attention", mem, first, bytes);
                    free(mem);
                }
                be->ops->destroy(be);
            }
            free(first);
            drop(&b);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_against_plain), cmocka_unit_test(test_long),
        cmocka_unit_test(test_gradient),      cmocka_unit_test(test_pages),
        cmocka_unit_test(test_alone),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
