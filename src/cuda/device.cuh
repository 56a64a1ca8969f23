/*
 * What kernels share: the activation types, launches, sums over a warp and a block, tensor-core
 * tiles, asynchronous copies. The same text compiles for a GPU with nvcc, and for the host under
 * the emulation in test/cuda/ (TB_CUDA_EMU), so kernels use what is here and the plain CUDA
 * language (threads, __shared__ arrays, __syncthreads, __syncwarp, warp shuffles with full masks),
 * no inline assembly of their own, and no thread may leave a kernel before a barrier that others
 * wait at.
 *
 * BATCH INVARIANCE. nvcc runs with -fmad=false: a product and a sum are one instruction only where
 * fmaf says so, thus two kernels that write the same formula compute the same bits. Orders of sums
 * depend on shapes of weights and on positions, never on the grid, the number of rows or on
 * atomics.
 */
#ifndef TB_CUDA_DEVICE_CUH
#define TB_CUDA_DEVICE_CUH

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "cuda/cuda.h"

typedef __nv_bfloat16 bf16;

template <typename T> static inline void note_argument(struct tb_cuda *c, const T &x)
{
    tb_cuda_note(c, &x, sizeof(x));
}
template <typename... T, typename... A>
static inline void note_launch(struct tb_cuda *c, void (*kernel)(T...), dim3 grid, dim3 block,
                               size_t smem, A... arguments)
{
    if (!c->capturing) return;
    const size_t head[] = {(size_t)kernel, grid.x, grid.y, grid.z, block.x, block.y, block.z, smem};
    note_argument(c, head);
    (note_argument<T>(c, arguments), ...);
}

/* TB_LAUNCH(c, kernel, grid, block, dynamic shared bytes, arguments...) on the current stream. A
 * kernel that is a template with commas goes in parentheses. Arguments that are structures have
 * zeros between their members, where a step may launch them: all bytes are compared. */
#ifdef TB_CUDA_EMU
#    define TB_LAUNCH(c, kernel, grid, block, smem, ...)                                           \
        do {                                                                                       \
            note_launch((c), (kernel), (grid), (block), (smem), __VA_ARGS__);                      \
            if ((c)->comparing) break;                                                             \
            emu_launch(#kernel, __FILE__, __LINE__, (grid), (block), (smem), (c)->stream,          \
                       (kernel), __VA_ARGS__);                                                     \
            tb_cuda_ok((c), cudaGetLastError(), #kernel);                                          \
        } while (0)
#    define TB_DYN_SHARED(type, name) type *name = (type *)emu_dynamic_shared()
#else
#    define TB_LAUNCH(c, kernel, grid, block, smem, ...)                                           \
        do {                                                                                       \
            note_launch((c), (kernel), (grid), (block), (smem), __VA_ARGS__);                      \
            if ((c)->comparing) break;                                                             \
            (kernel)<<<(grid), (block), (smem), (c)->stream>>>(__VA_ARGS__);                       \
            tb_cuda_ok((c), cudaGetLastError(), #kernel);                                          \
        } while (0)
#    define TB_DYN_SHARED(type, name)                                                              \
        extern __shared__ __align__(128) unsigned char tb_dynamic_shared[];                        \
        type *name = (type *)tb_dynamic_shared
#endif

/* Lets a kernel use more than 48 KiB of dynamic shared memory. */
#define TB_ALLOW_SHARED(c, kernel, bytes)                                                          \
    ((c)->comparing ||                                                                             \
     tb_cuda_ok((c),                                                                               \
                cudaFuncSetAttribute((const void *)(kernel),                                       \
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, (int)(bytes)),   \
                #kernel))

#define TB_WARP 32
#define TB_ALL  0xffffffffu /* of a warp */

__host__ __device__ static inline int div_up(int a, int b)
{
    return (a + b - 1) / b;
}

/* ---- activations: float or bf16, widened to float32 */
__device__ static inline float load_act(const float *p)
{
    return *p;
}
__device__ static inline float load_act(const bf16 *p)
{
    return __bfloat162float(*p);
}
__device__ static inline void store_act(float *p, float x)
{
    *p = x;
}
__device__ static inline void store_act(bf16 *p, float x)
{
    *p = __float2bfloat16_rn(x);
}
/* x as it would be read back */
template <typename act> __device__ static inline float round_act(float x)
{
    act y;
    store_act(&y, x);
    return load_act(&y);
}

/* Calls f with a null pointer of the activation type: TB_ACT(be, [&](auto *t) { ... }); */
#define TB_ACT(be, act, ...)                                                                       \
    do {                                                                                           \
        if ((be)->act == TB_BF16) {                                                                \
            typedef bf16 act;                                                                      \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            typedef float act;                                                                     \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    } while (0)

/* ---- sums and maxima; every thread gets the result, in the same order for every block size's warp
 */
__device__ static inline float warp_sum(float x)
{
    for (int d = TB_WARP / 2; d > 0; d /= 2)
        x += __shfl_xor_sync(TB_ALL, x, d);
    return x;
}
__device__ static inline double warp_sum(double x)
{
    for (int d = TB_WARP / 2; d > 0; d /= 2)
        x += __shfl_xor_sync(TB_ALL, x, d);
    return x;
}
__device__ static inline float warp_max(float x)
{
    for (int d = TB_WARP / 2; d > 0; d /= 2)
        x = fmaxf(x, __shfl_xor_sync(TB_ALL, x, d));
    return x;
}
/* Over a block of whole warps, at most 32; all threads call. */
template <typename T> __device__ static inline T block_sum(T x)
{
    __shared__ T part[TB_WARP];
    int warp = (int)threadIdx.x / TB_WARP, lane = (int)threadIdx.x % TB_WARP;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) part[warp] = x;
    __syncthreads();
    T sum = part[0];
    for (int w = 1; w < (int)blockDim.x / TB_WARP; w++)
        sum += part[w];
    return sum;
}
__device__ static inline float block_max(float x)
{
    __shared__ float part[TB_WARP];
    int warp = (int)threadIdx.x / TB_WARP, lane = (int)threadIdx.x % TB_WARP;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) part[warp] = x;
    __syncthreads();
    float max = part[0];
    for (int w = 1; w < (int)blockDim.x / TB_WARP; w++)
        max = fmaxf(max, part[w]);
    return max;
}

/* ---- tensor cores: d += a b with a [16, 16] row-major, b [16, 8], bf16, and d [16, 8] float32,
 * spread over a warp as PTX's mma.m16n8k16 does: with g = lane / 4 and t = lane % 4, a[0] =
 * A[g][2t, 2t+1], a[1] = A[g+8][2t, 2t+1], a[2] = A[g][2t+8, 2t+9], a[3] = A[g+8][2t+8, 2t+9], b[0]
 * = B[2t, 2t+1][g], b[1] = B[2t+8, 2t+9][g], d[0] = D[g][2t], d[1] = D[g][2t+1], d[2] = D[g+8][2t],
 * d[3] = D[g+8][2t+1]; the lower half of a word is the element of lower index. All lanes call. */
__device__ static inline void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2])
{
#ifdef TB_CUDA_EMU
    emu_mma_bf16(d, a, b);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
                 "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
/* Four 8 x 8 matrices of bf16 from shared memory: lane l names row l % 8 of matrix l / 8 (16-byte
 * aligned); r[i] is this lane's word of matrix i: row lane / 4, columns 2 (lane % 4) and the next.
 * With trans each matrix is transposed. */
__device__ static inline void ldmatrix_x4(uint32_t r[4], const void *row)
{
#ifdef TB_CUDA_EMU
    emu_ldmatrix(r, row, 4, false);
#else
    uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
#endif
}
__device__ static inline void ldmatrix_x4_trans(uint32_t r[4], const void *row)
{
#ifdef TB_CUDA_EMU
    emu_ldmatrix(r, row, 4, true);
#else
    uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
#endif
}
/* Two floats rounded to bf16 in a word, lo in its lower half. */
__device__ static inline uint32_t pack_bf16(float lo, float hi)
{
    return (uint32_t)__bfloat16_as_ushort(__float2bfloat16_rn(lo)) |
           (uint32_t)__bfloat16_as_ushort(__float2bfloat16_rn(hi)) << 16;
}

/* 16 bytes of global memory that no thread of the kernel writes; zeros, and no access, when they
 * are not there. No branch, so that many are in flight. */
__device__ static inline uint4 load16(const void *global, bool there)
{
#ifdef TB_CUDA_EMU
    return there ? *(const uint4 *)global : make_uint4(0, 0, 0, 0);
#else
    uint4 v;
    asm("{\n"
        ".reg .pred there;\n"
        "setp.ne.b32 there, %5, 0;\n"
        "mov.b32 %0, 0;\n"
        "mov.b32 %1, 0;\n"
        "mov.b32 %2, 0;\n"
        "mov.b32 %3, 0;\n"
        "@there ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];\n"
        "}\n"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "l"(__cvta_generic_to_global(global)), "r"((int)there));
    return v;
#endif
}

/* ---- copies of 16 bytes from global to shared memory that run beside the arithmetic; zero: writes
 * zeros and reads nothing. Commit closes a group, wait<n> waits until at most n groups are open. */
__device__ static inline void copy16_async(void *shared, const void *global, bool zero)
{
#ifdef TB_CUDA_EMU
    emu_copy16(shared, global, zero);
#else
    uint32_t at = (uint32_t)__cvta_generic_to_shared(shared);
    int bytes = zero ? 0 : 16;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(at), "l"(global),
                 "r"(bytes)
                 : "memory");
#endif
}
__device__ static inline void copy_async_commit(void)
{
#ifdef TB_CUDA_EMU
    emu_copy_commit();
#else
    asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}
template <int n> __device__ static inline void copy_async_wait(void)
{
#ifdef TB_CUDA_EMU
    emu_copy_wait(n);
#else
    asm volatile("cp.async.wait_group %0;\n" ::"n"(n) : "memory");
#endif
}

#endif
