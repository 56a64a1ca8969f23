/*
 * How keys and values lie in a page (16 positions of one kv head), for the KV pool and for training
 * alike:
 *
 *   keys:   [words(head_dim)][16]        words along head_dim, one key a lane
 *   values: [16 / KP][head_dim rounded]  words along positions, one dimension a lane
 *
 * A page of the pool holds the kv heads after each other. Included by the k_attn*.c files only.
 */
#ifndef TB_BACKEND_CPU_ATTN_H
#define TB_BACKEND_CPU_ATTN_H

#include "backend/cpu/gemm.h"
#include "backend/cpu/k.h"

#define PAGE        TB_KV_PAGE
#define BLOCK_PAGES 4
#define BLOCK       (PAGE * BLOCK_PAGES) /* keys of one step of the online softmax */
#define V_ROWS      (PAGE / KP)          /* rows of words of a value page */

struct layout {
    int hd, hdw;    /* head_dim; its words */
    size_t hdv;     /* head_dim in whole vectors */
    size_t k_words; /* of a key page */
    size_t words;   /* of a key and a value page */
};

static inline struct layout layout_of(const struct tb_attn_shape *s)
{
    struct layout l = {.hd = s->head_dim, .hdw = words(s->head_dim)};
    l.hdv = round_up((size_t)s->head_dim, VW);
    l.k_words = (size_t)l.hdw * PAGE;
    l.words = l.k_words + V_ROWS * l.hdv;
    return l;
}

/* Packs n <= 16 rows (stride ld activations) as keys; positions beyond n become zeros. */
static inline void pack_keys(const struct layout *l, const act_t *rows, size_t ld, int n,
                             uint32_t *dst)
{
    act_t tmp[PAGE * 2];
    uint32_t tile[VW * VW];
    bool plain = l->hd % KP == 0 && ld % KP == 0;
    for (int d = 0; d < l->hdw; d += VW) {
        int dn = imin(VW, l->hdw - d);
        for (int r = 0; r < PAGE; r += VW) {
            int rn = imax(0, imin(VW, n - r));
            if (plain) {
                tile_transpose((const tb_word *)(const void *)(rows + (size_t)r * ld) + d, ld / KP,
                               rn, dn, tile, VW);
                for (int i = 0; i < dn; i++)
                    memcpy(dst + (size_t)(d + i) * PAGE + r, tile + i * VW, VW * 4);
                continue;
            }
            for (int i = 0; i < dn; i++) {
                memset(tmp, 0, sizeof(tmp));
                for (int j = 0; j < rn; j++)
                    for (int k = 0; k < KP && (d + i) * KP + k < l->hd; k++)
                        tmp[j * KP + k] = rows[(size_t)(r + j) * ld + (size_t)((d + i) * KP + k)];
                memcpy(dst + (size_t)(d + i) * PAGE + r, tmp, VW * 4);
            }
        }
    }
}

/* Packs n rows as rows of words over positions: dst[words(n)][hdv]. */
static inline void pack_values(const struct layout *l, const act_t *rows, size_t ld, int n,
                               uint32_t *dst)
{
    for (int i = 0; i < n; i += KP) {
        const act_t *lo = rows + (size_t)i * ld, *hi = KP == 2 && i + 1 < n ? lo + ld : NULL;
        for (int d = 0; d < (int)l->hdv; d += VW) {
            int m = imin(VW, l->hd - d);
            vw_pair(dst + (size_t)(i / KP) * l->hdv + d, lo + d, hi ? hi + d : NULL, m);
        }
    }
}

/* First position that the query at pos sees. */
static inline int first_key(int window, int pos)
{
    return window > 0 && pos - window + 1 > 0 ? pos - window + 1 : 0;
}

/* S[rows][BLOCK] = rows of words (stride hdw words) against the keys of up to BLOCK_PAGES pages. */
static inline void scores(const struct layout *l, const act_t *q, int rows,
                          const uint32_t *const *pages, int n_pages, float *s)
{
    struct mk m = {.a = q,
                   .lda = (size_t)l->hdw * KP,
                   .ldb = PAGE,
                   .kw = l->hdw,
                   .kw_page = l->hdw,
                   .ldc = BLOCK,
                   .init = MK_ZERO,
                   .scale = 1.0f};
#if NVMAX == 4
    const uint32_t *four[4];
    for (int p = 0; p < 4; p++)
        four[p] = pages[imin(p, n_pages - 1)]; /* what is too much gets masked */
    m.b = four;
    m.c = s;
    K(mk_rows_pages)(&m, rows);
#else
    for (int p = 0; p < n_pages; p++) {
        m.b = pages + p;
        m.c = s + p * PAGE;
        K(mk_rows)(&m, rows, PAGE / VW);
    }
#endif
}

#endif
