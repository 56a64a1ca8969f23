/*
 * Packing of row-major operands into words on the way to the product kernel, and its ragged edges.
 * Included by the k_*.c files only.
 */
#ifndef TB_BACKEND_CPU_PACK_H
#define TB_BACKEND_CPU_PACK_H

#include "backend/cpu/gemm.h"
#include "backend/cpu/k.h"

#define ROWS_CHUNK 192 /* the most rows of one task */

/* A thread's memory for a product over the rank: a panel of words, and its rows and those of a task
 * with zeros behind. */
static inline size_t rank_panel_bytes(int rank)
{
    return (size_t)words(rank) * NW * 4;
}
static inline size_t rank_bytes(int rank)
{
    return rank_panel_bytes(rank) + (size_t)words(rank) * 4 * (NW + ROWS_CHUNK);
}

/* Packs n rows of k activations, row-major with no gap (ld_src == k), into words: dst[words of
 * k][ld]. */
static inline void pack_rows(const act_t *src, size_t ld_src, int n, int k, uint32_t *dst,
                             size_t ld, act_t *tmp)
{
    int kw = words(k);
    if (k % KP) { /* rows of no whole number of words: copy with a zero behind */
        for (int r = 0; r < n; r++) {
            memcpy(tmp + (size_t)r * (size_t)kw * KP, src + (size_t)r * ld_src,
                   (size_t)k * sizeof(act_t));
            tmp[(size_t)(r + 1) * (size_t)kw * KP - 1] = 0;
        }
        src = tmp;
        ld_src = (size_t)kw * KP;
    }
    for (int i = 0; i < kw; i += VW) {
        int kn = imin(VW, kw - i);
        uint32_t tile[VW * VW];
        for (int r = 0; r < (int)ld; r += VW) {
            uint32_t *d = dst + (size_t)i * ld + r;
            const act_t *row = src + (size_t)r * ld_src + (size_t)i * KP;
            int rn = imax(0, imin(VW, n - r));
            tile_transpose((const tb_word *)(const void *)row, ld_src / KP, rn, kn, tile, VW);
            for (int j = 0; j < kn; j++)
                memcpy(d + (size_t)j * ld, tile + j * VW, VW * 4);
        }
    }
}

/* Packs k rows x n columns of a row-major matrix into words of KP rows: dst[kw][ld]. ld >= n, whole
 * vectors. */
static inline void pack_cols(const act_t *src, size_t ld_src, int k, int n, uint32_t *dst,
                             size_t ld)
{
    for (int i = 0; i < k; i += KP) {
        const act_t *lo = src + (size_t)i * ld_src, *hi = KP == 2 && i + 1 < k ? lo + ld_src : NULL;
        for (int r = i + 16; r < imin(i + 16 + KP, k); r++) /* no stream that the CPU would see */
            for (int j = 0; j < n; j += 64 / (int)sizeof(act_t))
                _mm_prefetch((const char *)(src + (size_t)r * ld_src + j), _MM_HINT_T0);
        for (int j = 0; j < (int)ld; j += VW) {
            int m = imax(0, imin(VW, n - j));
            vw_pair(dst + (size_t)(i / KP) * ld + j, lo + (m ? j : 0), hi ? hi + (m ? j : 0) : NULL,
                    m);
        }
    }
}

/* Rows whose length is no whole number of words, copied with zeros behind, for rows [row, row + n).
 */
static inline const act_t *even(const act_t *x, size_t ldx, int row, int n, int k, act_t *tmp,
                                size_t *ld)
{
    x += (size_t)row * ldx;
    *ld = ldx;
    if (k % KP == 0) return x;
    *ld = (size_t)words(k) * KP;
    for (int r = 0; r < n; r++) {
        memcpy(tmp + (size_t)r * *ld, x + (size_t)r * ldx, (size_t)k * sizeof(act_t));
        tmp[(size_t)(r + 1) * *ld - 1] = 0;
    }
    return tmp;
}

/* Runs m (C = y at the columns of one panel) for n rows; columns beyond cols stay untouched. */
static inline void run_edge(struct mk *m, int n, int cols)
{
    float edge[ROWS_CHUNK * NW];
    float *y = m->c;
    size_t ldy = m->ldc;
    int nv = vecs(cols);
    if (cols == nv * VW) {
        K(mk_rows)(m, n, nv);
        return;
    }
    m->c = edge;
    m->ldc = NW;
    for (int r = 0; r < n; r++) {
        memset(edge + r * NW, 0, NW * sizeof(float));
        if (m->init == MK_ADD)
            memcpy(edge + r * NW, y + (size_t)r * ldy, (size_t)cols * sizeof(float));
    }
    K(mk_rows)(m, n, nv);
    for (int r = 0; r < n; r++)
        memcpy(y + (size_t)r * ldy, edge + r * NW, (size_t)cols * sizeof(float));
}

#endif
