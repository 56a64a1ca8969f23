/*
 * The product kernel's tiles: see gemm.h. One instance of mk_tile is one shape of register block;
 * which one runs depends on the rows at hand, but every output is the same running sum in all of
 * them.
 */
#include "backend/cpu/gemm.h"

/* Steps between two looks at what to fetch. */
#define FETCH_STEPS 8

/* What a tile fetches of the panel behind its own: lines every FETCH_STEPS steps, from at. */
struct fetch {
    const char *at;
    int lines;
};

INLINE void mk_tile(const int R, const int NV, const struct mk *m, const int row, struct fetch *f)
{
    vf acc[12][4];
    const size_t lda = m->lda, ldb = m->ldb;
    const act_t *a = m->a + (size_t)row * lda;
    float *c = m->c + (size_t)row * m->ldc;
    UNROLL for (int r = 0; r < R; r++)
    {
        UNROLL for (int j = 0; j < NV; j++) acc[r][j] = vf_zero();
    }
    if (f) {
        UNROLL for (int r = 0; r < R; r++)
        {
            UNROLL for (int j = 0; j < NV * VW; j += 64 / 4)
                __builtin_prefetch(c + (size_t)r * m->ldc + j, 1);
        }
    }
    for (int k0 = 0, page = 0; k0 < m->kw; k0 += m->kw_page, page++) {
        const uint32_t *b = m->b[page];
        int kn = m->kw - k0 < m->kw_page ? m->kw - k0 : m->kw_page;
        for (int k = 0; k < kn; k++, b += ldb, a += KP) {
            vw w[4];
            UNROLL for (int j = 0; j < NV; j++)
            {
                w[j] = vw_load(b + j * VW);
            }
            if (f && k % FETCH_STEPS == 0) {
                for (int i = 0; i < f->lines; i++, f->at += 64)
                    _mm_prefetch(f->at, _MM_HINT_T1);
            }
            UNROLL for (int r = 0; r < R; r++)
            {
                vw x = vw_set1((const tb_word *)(const void *)(a + (size_t)r * lda));
                UNROLL for (int j = 0; j < NV; j++) acc[r][j] = vdot(acc[r][j], x, w[j]);
            }
        }
    }
    vf s = vf_set1(m->scale);
    UNROLL for (int r = 0; r < R; r++)
    {
        UNROLL for (int j = 0; j < NV; j++)
        {
            float *d = c + (size_t)r * m->ldc + j * VW;
            vf v = vf_mul(acc[r][j], s);
            if (m->init == MK_ADD)
                v = vf_add(vf_load(d), v);
            else if (m->init == MK_BIAS)
                v = vf_add(vf_load(m->bias + j * VW), v);
            vf_store(d, v);
        }
    }
}

#if NVMAX == 4
/* As mk_tile with NV 4, but vector j of a step comes from its own page b[j], whose rows are ldb
 * apart. */
INLINE void mk_tile_pages(const int R, const struct mk *m, const int row)
{
    vf acc[6][4];
    const size_t lda = m->lda, ldb = m->ldb;
    const act_t *a = m->a + (size_t)row * lda;
    const uint32_t *b0 = m->b[0], *b1 = m->b[1], *b2 = m->b[2], *b3 = m->b[3];
    UNROLL for (int r = 0; r < R; r++)
    {
        UNROLL for (int j = 0; j < 4; j++) acc[r][j] = vf_zero();
    }
    for (int k = 0; k < m->kw; k++, a += KP) {
        size_t at = (size_t)k * ldb;
        vw w[4] = {vw_load(b0 + at), vw_load(b1 + at), vw_load(b2 + at), vw_load(b3 + at)};
        UNROLL for (int r = 0; r < R; r++)
        {
            vw x = vw_set1((const tb_word *)(const void *)(a + (size_t)r * lda));
            UNROLL for (int j = 0; j < 4; j++) acc[r][j] = vdot(acc[r][j], x, w[j]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
    {
        UNROLL for (int j = 0; j < 4; j++)
            vf_store(m->c + (size_t)(row + r) * m->ldc + j * VW, acc[r][j]);
    }
}

void K(mk_rows_pages)(const struct mk *m, int rows)
{
    int groups = (rows + 5) / 6;
    for (int row = 0; groups > 0; groups--) {
        int R = (rows - row + groups - 1) / groups;
        switch (R) {
        case 1: mk_tile_pages(1, m, row); break;
        case 2: mk_tile_pages(2, m, row); break;
        case 3: mk_tile_pages(3, m, row); break;
        case 4: mk_tile_pages(4, m, row); break;
        case 5: mk_tile_pages(5, m, row); break;
        case 6: mk_tile_pages(6, m, row); break;
        }
        row += R;
    }
}
#endif

#define MK_CASE(R, NV, F)                                                                          \
    case R: mk_tile(R, NV, m, row, F); break;

static void mk_wide(const struct mk *m, int row, int R)
{
    switch (R) {
        MK_CASE(1, NVMAX, NULL)
        MK_CASE(2, NVMAX, NULL)
        MK_CASE(3, NVMAX, NULL)
        MK_CASE(4, NVMAX, NULL)
        MK_CASE(5, NVMAX, NULL)
        MK_CASE(6, NVMAX, NULL)
    }
}

static void mk_ahead(const struct mk *m, int row, int R, struct fetch *f)
{
    switch (R) {
        MK_CASE(1, NVMAX, f)
        MK_CASE(2, NVMAX, f)
        MK_CASE(3, NVMAX, f)
        MK_CASE(4, NVMAX, f)
        MK_CASE(5, NVMAX, f)
        MK_CASE(6, NVMAX, f)
    }
}

/* Runs all rows against one panel of NVMAX vectors, in groups as even as can be. They share out the
 * fetching; one group alone is as fast as memory anyway. */
void K(mk_rows_wide)(const struct mk *m, int rows)
{
    int groups = (rows + RMAX_WIDE - 1) / RMAX_WIDE;
    struct fetch f = {m->ahead, (FETCH_STEPS * NW * 4 / 64 + groups - 1) / groups};
    bool ahead = m->ahead && groups > 1;
    const char *end = ahead ? f.at + (size_t)m->kw * NW * 4 : NULL;
    for (int row = 0; groups > 0; groups--) {
        int R = (rows - row + groups - 1) / groups;
        if (ahead)
            mk_ahead(m, row, R, &f);
        else
            mk_wide(m, row, R);
        if (f.at >= end) f.lines = 0;
        row += R;
    }
}

#if NVMAX == 4
static void mk_half(const struct mk *m, int row, int R)
{
    switch (R) {
        MK_CASE(1, 2, NULL)
        MK_CASE(2, 2, NULL)
        MK_CASE(4, 2, NULL)
        MK_CASE(8, 2, NULL)
        MK_CASE(12, 2, NULL)
    }
}
#endif

static void mk_one(const struct mk *m, int row, int R)
{
    switch (R) {
        MK_CASE(1, 1, NULL)
        MK_CASE(2, 1, NULL)
        MK_CASE(4, 1, NULL)
        MK_CASE(8, 1, NULL)
#if NVMAX == 4
        MK_CASE(12, 1, NULL)
#endif
    }
}

/* The rows of the next narrow tile. */
INLINE int mk_step(int left)
{
#if NVMAX == 4
    if (left >= 12) return 12;
#endif
    return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

void K(mk_rows)(const struct mk *m, int rows, int nv)
{
    const uint32_t *pages[16];
    int n_pages = (m->kw + m->kw_page - 1) / m->kw_page;
    if (nv == NVMAX) {
        K(mk_rows_wide)(m, rows);
        return;
    }
    struct mk part = *m;
    part.b = pages;
    for (int j = 0; j < nv;) {
        int step = NVMAX == 4 && nv - j >= 2 ? 2 : 1;
        for (int i = 0; i < n_pages; i++)
            pages[i] = m->b[i] + j * VW;
        part.c = m->c + j * VW;
        part.bias = m->bias ? m->bias + j * VW : NULL;
        for (int row = 0; row < rows;) {
            int R = mk_step(rows - row);
#if NVMAX == 4
            if (step == 2)
                mk_half(&part, row, R);
            else
#endif
                mk_one(&part, row, R);
            row += R;
        }
        j += step;
    }
}
