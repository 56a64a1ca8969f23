/*
 * What the files of the fast kernels share beyond the vector words: parallel loops and scratch
 * memory.
 */
#ifndef TB_BACKEND_CPU_K_H
#define TB_BACKEND_CPU_K_H

#include "backend/cpu/simd.h"
#include "backend/cpu/team.h"

static inline int imin(int a, int b)
{
    return a < b ? a : b;
}
static inline int imax(int a, int b)
{
    return a > b ? a : b;
}
static inline size_t round_up(size_t n, size_t to)
{
    return (n + to - 1) / to * to;
}

/* Words that K activations fill. */
static inline int words(int n)
{
    return (n + KP - 1) / KP;
}

/* Walks n elements a vector at a time; m is VW, and what is left in the last round. The two rounds
 * of the outer loop are there so that the compiler sees a constant m in the long one and drops the
 * masks. */
#define EACH(i, m, n)                                                                              \
    _Pragma("GCC unroll 2") for (int last_ = 0, n_ = (n); last_ < 2;                               \
                                 last_++) for (int i = last_ ? n_ / VW * VW : 0,                   \
                                               m = last_ ? n_ % VW : VW;                           \
                                               last_ ? i < n_ : i + VW <= n_; i += VW)

#endif
