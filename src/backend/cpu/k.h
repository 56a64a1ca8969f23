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

#endif
