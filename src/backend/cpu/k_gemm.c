/*
 * The product kernel's tiles: see gemm.h. One instance of mk_tile is one shape of register block;
 * which one runs depends on the rows at hand, but every output is the same running sum in all of
 * them.
 */
#include "backend/cpu/gemm.h"

/* prefetch: fetch two cache lines of m->ahead with each step. */
INLINE void mk_tile(const int R, const int NV, const bool prefetch, const struct mk *m,
                    const int row)
{
    const char *ahead = (const char *)m->ahead;
    vf acc[12][4];
    const size_t lda = m->lda, ldb = m->ldb;
    const act_t *a = m->a + (size_t)row * lda;
    UNROLL for (int r = 0; r < R; r++)
    {
        UNROLL for (int j = 0; j < NV; j++) acc[r][j] = vf_zero();
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
            if (prefetch) {
                _mm_prefetch(ahead, _MM_HINT_T1);
                _mm_prefetch(ahead + 64, _MM_HINT_T1);
                ahead += NV * VW * 4;
            }
            UNROLL for (int r = 0; r < R; r++)
            {
                vw x = vw_set1((const tb_word *)(const void *)(a + (size_t)r * lda));
                UNROLL for (int j = 0; j < NV; j++) acc[r][j] = vdot(acc[r][j], x, w[j]);
            }
        }
    }
    float *c = m->c + (size_t)row * m->ldc;
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

#define MK_CASE(R, NV, PF)                                                                         \
    case R: mk_tile(R, NV, PF, m, row); break;

static void mk_wide(const struct mk *m, int row, int R)
{
    switch (R) {
        MK_CASE(1, NVMAX, false)
        MK_CASE(2, NVMAX, false)
        MK_CASE(3, NVMAX, false)
        MK_CASE(4, NVMAX, false)
        MK_CASE(5, NVMAX, false)
        MK_CASE(6, NVMAX, false)
    }
}

/* Runs all rows against one panel of NVMAX vectors, in groups as even as can be. */
void K(mk_rows_wide)(const struct mk *m, int rows)
{
    int groups = (rows + RMAX_WIDE - 1) / RMAX_WIDE;
    for (int row = 0; groups > 0; groups--) {
        int R = (rows - row + groups - 1) / groups;
        mk_wide(m, row, R);
        row += R;
    }
}

#if NVMAX == 4
static void mk_ahead(const struct mk *m, int row, int R)
{
    switch (R) {
        MK_CASE(4, NVMAX, true)
        MK_CASE(5, NVMAX, true)
        MK_CASE(6, NVMAX, true)
    default: mk_wide(m, row, R);
    }
}
#endif

void K(mk_rows_ahead)(const struct mk *m, int rows, const void *ahead)
{
#if NVMAX == 4
    int groups = (rows + RMAX_WIDE - 1) / RMAX_WIDE;
    if ((groups == 2 || groups == 3) && ahead) {
        struct mk part = *m;
        for (int row = 0, g = 0; g < groups; g++) {
            int R = (rows - row + groups - g - 1) / (groups - g);
            int lines = g < 2 ? 2 : 0; /* a step's panel row has four */
            part.ahead = (const char *)ahead + g * lines * 64;
            if (lines)
                mk_ahead(&part, row, R);
            else
                mk_wide(m, row, R);
            row += R;
        }
        return;
    }
#endif
    K(mk_rows_wide)(m, rows);
}

#if NVMAX == 4
static void mk_half(const struct mk *m, int row, int R)
{
    switch (R) {
        MK_CASE(1, 2, false)
        MK_CASE(2, 2, false)
        MK_CASE(4, 2, false)
        MK_CASE(8, 2, false)
        MK_CASE(12, 2, false)
    }
}
#endif

static void mk_one(const struct mk *m, int row, int R)
{
    switch (R) {
        MK_CASE(1, 1, false)
        MK_CASE(2, 1, false)
        MK_CASE(4, 1, false)
        MK_CASE(8, 1, false)
#if NVMAX == 4
        MK_CASE(12, 1, false)
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
