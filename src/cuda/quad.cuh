/*
 * Rows and flat arrays in quads of four elements: with vec a quad of float32 is one access of 16
 * bytes and one of bf16 of 8, without it four accesses. A quad holds the same elements either way,
 * zeros beyond the end, so sums over quads have one order.
 */
#ifndef TB_CUDA_QUAD_CUH
#define TB_CUDA_QUAD_CUH

#include "cuda/device.cuh"

struct quad {
    float v[4];
};
template <typename T> struct alignas(4 * sizeof(T)) quad_of {
    T v[4];
};

/* Elements [i, i + 4) of p's n, i < n a multiple of 4. */
template <bool vec, typename T>
__device__ static inline quad load_quad(const T *p, size_t i, size_t n)
{
    quad q;
    if (vec) {
        quad_of<T> w = *(const quad_of<T> *)(p + i);
        for (int e = 0; e < 4; e++)
            q.v[e] = load_act(&w.v[e]);
    } else {
        for (int e = 0; e < 4; e++)
            q.v[e] = i + e < n ? load_act(p + i + e) : 0;
    }
    return q;
}

template <bool vec, typename T>
__device__ static inline void store_quad(T *p, size_t i, size_t n, quad q)
{
    if (vec) {
        quad_of<T> w;
        for (int e = 0; e < 4; e++)
            store_act(&w.v[e], q.v[e]);
        *(quad_of<T> *)(p + i) = w;
    } else {
        for (int e = 0; e < 4 && i + e < n; e++)
            store_act(p + i + e, q.v[e]);
    }
}

template <typename act> __device__ static inline quad round_quad(quad q)
{
    for (int e = 0; e < 4; e++)
        q.v[e] = round_act<act>(q.v[e]);
    return q;
}

__device__ static inline quad add_quads(quad a, quad b)
{
    for (int e = 0; e < 4; e++)
        a.v[e] += b.v[e];
    return a;
}

/* May arrays or rows of that many elements at these pointers be read with vec? NULL may. */
template <typename... P> static inline bool whole_quads(size_t n, P... p)
{
    return n % 4 == 0 && ((... | (uintptr_t)p) % 16) == 0;
}

/* As TB_ACT: runs the rest with a constant `vec` of that value. */
#define TB_VEC(value, vec, ...)                                                                    \
    do {                                                                                           \
        if (value) {                                                                               \
            constexpr bool vec = true;                                                             \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            constexpr bool vec = false;                                                            \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    } while (0)

/* A grid over T rows of some width, a thread a quad: blocks of at most 128 threads, several a row
 * when it is long. */
struct row_grid {
    int threads, pieces;
};
static inline row_grid row_grid_of(int width)
{
    int quads = div_up(width, 4), warps = div_up(quads, TB_WARP);
    int threads = TB_WARP * (warps < 4 ? warps : 4);
    return {threads, div_up(quads, threads)};
}
/* This thread's row, and its quad's first element, which may lie beyond the row. */
struct row_place {
    size_t t;
    int i;
};
__device__ static inline row_place row_place_of(int pieces)
{
    unsigned piece = blockIdx.x % (unsigned)pieces;
    return {blockIdx.x / (unsigned)pieces, 4 * (int)(piece * blockDim.x + threadIdx.x)};
}

/* A grid over a flat array, a thread a quad. */
#define TB_FLAT_THREADS 256
static inline unsigned flat_grid(size_t n)
{
    return (unsigned)((n + 4 * TB_FLAT_THREADS - 1) / (4 * TB_FLAT_THREADS));
}
__device__ static inline size_t flat_place(void)
{
    return 4 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
}

#endif
