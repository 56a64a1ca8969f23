/*
 * Rows of logits [T, V], in pieces of fixed size: a block works on one piece of one row, so a
 * single row of a large vocabulary still keeps many multiprocessors busy.
 */
#ifndef TB_CUDA_LOGITS_CUH
#define TB_CUDA_LOGITS_CUH

#include "cuda/device.cuh"

#define PIECE         4096
#define PIECE_THREADS 256

static inline int n_pieces(int V)
{
    return div_up(V, PIECE);
}

/* Block (row, piece) of a grid over rows and pieces. */
static inline dim3 piece_grid(int rows, int V)
{
    return dim3((unsigned)rows, (unsigned)n_pieces(V));
}

/* Logits [first, first + n) of a row. */
struct piece {
    int row, first, n;
    const float *z;
};
__device__ static inline piece piece_at(const float *logits, int V, int ldv, int row, int i)
{
    int first = i * PIECE, n = V - first < PIECE ? V - first : PIECE;
    return {row, first, n, logits + (size_t)row * ldv + first};
}
__device__ static inline piece my_piece(const float *logits, int V, int ldv)
{
    return piece_at(logits, V, ldv, (int)blockIdx.x, (int)blockIdx.y);
}

/* f(logit, index in the piece) for every logit of a piece, spread over the block, in ascending
 * order in each thread, with four loads in flight. */
template <typename F> __device__ static inline void each_logit(piece p, F f)
{
    int step = (int)blockDim.x;
    for (int i = (int)threadIdx.x; i < p.n; i += 4 * step) {
        float z[4];
        for (int j = 0; j < 4; j++)
            z[j] = i + j * step < p.n ? p.z[i + j * step] : 0;
        for (int j = 0; j < 4; j++)
            if (i + j * step < p.n) f(z[j], i + j * step);
    }
}

#endif
