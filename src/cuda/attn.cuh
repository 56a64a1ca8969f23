/*
 * What attention's forward and backward kernels share: tiles of rows on their way to shared memory,
 * and a warp's products of such tiles on tensor cores. Device code but for aligned16.
 */
#ifndef TB_CUDA_ATTN_CUH
#define TB_CUDA_ATTN_CUH

#include "cuda/device.cuh"

/* The first key that a query at pos sees. */
__host__ __device__ static inline int first_key(int window, int pos)
{
    return window > 0 && pos >= window ? pos - window + 1 : 0;
}

/* Whether copy16 may take p's bytes 16 at once. */
static inline bool aligned16(const void *p)
{
    return (uintptr_t)p % 16 == 0;
}
/* 16 bytes to shared memory: the n <= 0 or more elements that there are, then zeros. vec: all of
 * them or none, aligned, asynchronously. */
template <typename act>
__device__ static inline void copy16(act *to, const act *from, int n, bool vec)
{
    if (vec) {
        copy16_async(to, from, n <= 0);
        return;
    }
    for (int e = 0; e < (int)(16 / sizeof(act)); e++)
        store_act(to + e, e < n ? load_act(from + e) : 0.0f);
}

/* ---- products of a warp. Rows of bf16 lie ld elements apart in shared memory. A float32 matrix
 * [16 M, N] is spread over the warp as mma_bf16's d: its rows [16 m, 16 m + 16) and columns
 * [n, n + 8) are d[m N / 2 + n / 2 .. + 3]. */

/* d = a [16 M, K] b [N, K]^T */
template <int M, int N, int K, int ld>
__device__ static inline void rows_by_rows(float *d, const bf16 *a, const bf16 *b)
{
    int lane = (int)threadIdx.x % TB_WARP;
    const bf16 *a_row = a + lane % 16 * ld + lane / 16 * 8;
    const bf16 *b_row = b + (lane / 16 * 8 + lane % 8) * ld + lane / 8 % 2 * 8;
#pragma unroll
    for (int i = 0; i < M * N / 2; i++)
        d[i] = 0;
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        uint32_t x[M][4], y[4];
#pragma unroll
        for (int m = 0; m < M; m++)
            ldmatrix_x4(x[m], a_row + m * 16 * ld + k);
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            ldmatrix_x4(y, b_row + n * ld + k);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(d + m * (N / 2) + n / 2, x[m], y);
                mma_bf16(d + m * (N / 2) + n / 2 + 4, x[m], y + 2);
            }
        }
    }
}
/* d += a [16 M, K] b [K, N], a float32 and rounded to bf16 here */
template <int M, int N, int K, int ld>
__device__ static inline void add_product(float *d, const float *a, const bf16 *b)
{
    int lane = (int)threadIdx.x % TB_WARP;
    const bf16 *b_row = b + lane % 16 * ld + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        uint32_t x[M][4], y[4];
#pragma unroll
        for (int m = 0; m < M; m++) {
            const float *from = a + m * (K / 2) + k / 2;
#pragma unroll
            for (int i = 0; i < 4; i++)
                x[m][i] = pack_bf16(from[2 * i], from[2 * i + 1]);
        }
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            ldmatrix_x4_trans(y, b_row + k * ld + n);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(d + m * (N / 2) + n / 2, x[m], y);
                mma_bf16(d + m * (N / 2) + n / 2 + 4, x[m], y + 2);
            }
        }
    }
}

#endif
