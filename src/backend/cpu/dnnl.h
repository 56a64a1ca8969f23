/*
 * oneDNN for the base model's large products. Our packed panels have the very layout that oneDNN's
 * matmul asks for on AVX-512 (K in words, 64 outputs side by side), and our own kernels repeat its
 * order of summation, so whole tiles of rows go to the library and what is left, few rows and
 * edges, to our own kernels: the same bits, whichever computed a row. That is not taken on trust:
 * each inner size is compared on random numbers before the library is used for it (tb_dnnl_agrees).
 *
 * The library runs single-threaded inside our team's threads: its OpenMP pool is never started.
 *
 * Owner: struct tb_cpu. Thread: tb_dnnl_tile by the team, each thread with its own number.
 */
#ifndef TB_BACKEND_CPU_DNNL_H
#define TB_BACKEND_CPU_DNNL_H

#include <stdbool.h>
#include <stddef.h>

#include "backend/backend.h"

#define TB_DNNL_ROWS 128 /* rows of a tile */

struct tb_dnnl;

/* NULL when the library cannot be used; everything then runs on our own kernels. */
struct tb_dnnl *tb_dnnl_create(enum tb_dtype act, int n_threads);
void tb_dnnl_destroy(struct tb_dnnl *d); /* accepts NULL */

/* y[TB_DNNL_ROWS, cols] = x[TB_DNNL_ROWS, k] times whole panels of 64 outputs. false: the library
 * does not take this shape in our layout; nothing was written. ldx, ldy in elements. */
bool tb_dnnl_tile(struct tb_dnnl *d, int thread, const void *panels, int k, int cols, const void *x,
                  size_t ldx, float *y, size_t ldy);

#endif
