/*
 * The product kernel: C[R rows][NV * VW columns] from rows of words and a packed panel of words.
 * Every output is one running sum over the words in order, so its bits do not depend on R or on the
 * other rows.
 *
 * Included by the k_*.c files only (see simd.h).
 */
#ifndef TB_BACKEND_CPU_GEMM_H
#define TB_BACKEND_CPU_GEMM_H

#include "backend/cpu/simd.h"

#if defined(TB_K_AVX2)
#    define NVMAX     2 /* vectors of a weight's panel */
#    define RMAX_WIDE 6
#    define RMAX_HALF 6
#    define RMAX_ONE  8
#else
#    define NVMAX     4
#    define RMAX_WIDE 6
#    define RMAX_HALF 12
#    define RMAX_ONE  12
#endif
#define NW (NVMAX * VW) /* outputs of a weight's panel */

/* How C starts: 0, the bias, or what is there. */
enum mk_init { MK_ZERO, MK_BIAS, MK_ADD };

struct mk {
    const act_t *a;           /* rows of activations, KP * kw of them are read */
    size_t lda;               /* activations from row to row */
    const uint32_t *const *b; /* pages of kw_page rows of words each */
    size_t ldb;               /* words from row to row */
    int kw, kw_page;          /* words in all, words in a page */
    float *c;
    size_t ldc;
    enum mk_init init;
    const float *bias; /* NV * VW, for MK_BIAS */
    float scale;       /* of the product, before C is added */
    /* A weight's panel of kw rows that is multiplied after this one, or NULL: it and C are far
     * away, and are fetched while this panel's rows are computed. */
    const void *ahead;
};

/* Runs all rows against nv vectors of columns, nv <= NVMAX, of at most 16 pages; b's pages hold at
 * least nv * VW columns. The caller's C has room for nv * VW columns. */
void K(mk_rows)(const struct mk *m, int rows, int nv);
/* The same for a whole panel, nv = NVMAX; ahead is used here only. */
void K(mk_rows_wide)(const struct mk *m, int rows);
#if NVMAX == 4
/* C = A B where each of the four vectors of a row of B comes from a page of its own, b[0..3]. init,
 * bias and scale are not used. */
void K(mk_rows_pages)(const struct mk *m, int rows);
#endif

/* Columns of the widest C tile that mk_rows may write for n columns. */
INLINE int vecs(int n)
{
    return (n + VW - 1) / VW;
}

#endif
