/*
 * The language of kernels under the emulation (emu.h): qualifiers, built-in variables, vector
 * types, barriers, shuffles, atomics, arithmetic, and the twins of device.cuh's tensor-core and
 * copy primitives. Warp functions take the full mask, and every lane of a full warp must call them.
 */
#ifndef TEST_CUDA_EMU_CUDA_RUNTIME_H
#define TEST_CUDA_EMU_CUDA_RUNTIME_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cuda_bf16.h"
#include "cuda_runtime_api.h"
#include "emu.h"

#define __host__
#define __device__
#define __global__
#define __constant__
#define __grid_constant__
#define __shared__      static thread_local
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__    __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

/* ---- where a thread is */
struct emu_indices {
    uint3 thread, block;
    dim3 block_dim, grid_dim;
};
extern __thread struct emu_indices *emu_at;
#define threadIdx (emu_at->thread)
#define blockIdx  (emu_at->block)
#define blockDim  (emu_at->block_dim)
#define gridDim   (emu_at->grid_dim)
#define warpSize  32

void *emu_dynamic_shared(void);

/* As <<<grid, block, shared, stream>>>: arguments are evaluated now. */
template <class T> struct emu_type {
    typedef T type;
};
template <class... P>
void emu_launch(const char *name, const char *file, int line, dim3 grid, dim3 block, size_t shared,
                cudaStream_t stream, void (*kernel)(P...), typename emu_type<P>::type... args)
{
    emu_place at = {name, file, line};
    cudaError_t e = emu_check_launch((const void *)kernel, grid, block, shared);
    if (!e)
        e = emu_enqueue(stream, name,
                        [=] { emu_grid(at, grid, block, shared, [&] { kernel(args...); }); });
    if (e) emu_set_error(e);
}

/* ---- vectors */
#define EMU_VECTORS(type, name, bytes)                                                             \
    struct alignas(2 * bytes) name##2                                                              \
    {                                                                                              \
        type x, y;                                                                                 \
    };                                                                                             \
    struct name##3                                                                                 \
    {                                                                                              \
        type x, y, z;                                                                              \
    };                                                                                             \
    struct alignas(4 * bytes > 16 ? 16 : 4 * bytes) name##4                                        \
    {                                                                                              \
        type x, y, z, w;                                                                           \
    };                                                                                             \
    static inline name##2 make_##name##2(type x, type y)                                           \
    {                                                                                              \
        return {x, y};                                                                             \
    }                                                                                              \
    static inline name##4 make_##name##4(type x, type y, type z, type w)                           \
    {                                                                                              \
        return {x, y, z, w};                                                                       \
    }
#define uint3 emu_uint3 /* it is in cuda_runtime_api.h */
EMU_VECTORS(float, float, 4)
EMU_VECTORS(int, int, 4)
EMU_VECTORS(unsigned, uint, 4)
EMU_VECTORS(unsigned short, ushort, 2)
EMU_VECTORS(double, double, 8)
#undef uint3

/* ---- barriers. file, line: the caller's, for the report when not all came. */
#define EMU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
void emu_sync_block(const char *file, int line);
void emu_sync_warp(const char *what, const char *file, int line);
/* Gives every lane of the warp the bytes (at most 32) of all lanes; lane i's at 32 i. */
const unsigned char *emu_exchange(const char *what, unsigned mask, const void *mine, size_t bytes,
                                  const char *file, int line);
void emu_abort(const char *what, const char *file, int line) __attribute__((noreturn));

static inline void __syncthreads(EMU_HERE)
{
    emu_sync_block(file, line);
}
static inline void __syncwarp(unsigned mask = 0xffffffffu, EMU_HERE)
{
    if (mask != 0xffffffffu) emu_abort("__syncwarp of a part of a warp", file, line);
    emu_sync_warp("__syncwarp", file, line);
}
static inline void __threadfence(void) {}
static inline void __threadfence_block(void) {}

/* ---- warps */
static inline int emu_lane(void)
{
    const emu_indices *i = emu_at;
    return (int)(i->thread.x + i->block_dim.x * (i->thread.y + i->block_dim.y * i->thread.z)) % 32;
}
template <class T> static inline T emu_from(const unsigned char *all, int lane)
{
    T x;
    memcpy(&x, all + 32 * lane, sizeof(x));
    return x;
}
template <class T>
static inline T __shfl_sync(unsigned mask, T x, int from, int width = 32, EMU_HERE)
{
    const unsigned char *all = emu_exchange("__shfl_sync", mask, &x, sizeof(x), file, line);
    return emu_from<T>(all, (emu_lane() & ~(width - 1)) + (from & (width - 1)));
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T x, int lanes, int width = 32, EMU_HERE)
{
    const unsigned char *all = emu_exchange("__shfl_xor_sync", mask, &x, sizeof(x), file, line);
    int from = emu_lane() ^ lanes;
    return emu_from<T>(all, from < (emu_lane() & ~(width - 1)) + width ? from : emu_lane());
}
template <class T>
static inline T __shfl_up_sync(unsigned mask, T x, unsigned d, int width = 32, EMU_HERE)
{
    const unsigned char *all = emu_exchange("__shfl_up_sync", mask, &x, sizeof(x), file, line);
    int from = emu_lane() - (int)d;
    return emu_from<T>(all, from >= (emu_lane() & ~(width - 1)) ? from : emu_lane());
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T x, unsigned d, int width = 32, EMU_HERE)
{
    const unsigned char *all = emu_exchange("__shfl_down_sync", mask, &x, sizeof(x), file, line);
    int from = emu_lane() + (int)d;
    return emu_from<T>(all, from < (emu_lane() & ~(width - 1)) + width ? from : emu_lane());
}
static inline unsigned __ballot_sync(unsigned mask, int yes, EMU_HERE)
{
    const unsigned char *all = emu_exchange("__ballot_sync", mask, &yes, sizeof(yes), file, line);
    unsigned bits = 0;
    for (int i = 0; i < 32; i++)
        bits |= (emu_from<int>(all, i) != 0 ? 1u : 0u) << i;
    return bits;
}
static inline int __any_sync(unsigned mask, int yes, EMU_HERE)
{
    return __ballot_sync(mask, yes, file, line) != 0;
}
static inline int __all_sync(unsigned mask, int yes, EMU_HERE)
{
    return __ballot_sync(mask, yes, file, line) == 0xffffffffu;
}

/* ---- device.cuh's primitives */
void emu_mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2], EMU_HERE);
void emu_ldmatrix(uint32_t *r, const void *row, int n, bool trans, EMU_HERE);
void emu_copy16(void *shared, const void *global, bool zero, EMU_HERE);
void emu_copy_commit(void);
void emu_copy_wait(int open);

/* ---- atomics: threads take turns */
template <class T> static inline T atomicAdd(T *p, typename emu_type<T>::type x)
{
    static_assert(T(0.5) == T(0), "sums of floats by atomics have no fixed order");
    T old = *p;
    *p = old + x;
    return old;
}
template <class T> static inline T atomicMax(T *p, typename emu_type<T>::type x)
{
    T old = *p;
    *p = old > x ? old : x;
    return old;
}
template <class T> static inline T atomicMin(T *p, typename emu_type<T>::type x)
{
    T old = *p;
    *p = old < x ? old : x;
    return old;
}
template <class T> static inline T atomicOr(T *p, typename emu_type<T>::type x)
{
    T old = *p;
    *p = old | x;
    return old;
}
template <class T> static inline T atomicExch(T *p, typename emu_type<T>::type x)
{
    T old = *p;
    *p = x;
    return old;
}
template <class T>
static inline T atomicCAS(T *p, typename emu_type<T>::type want, typename emu_type<T>::type x)
{
    T old = *p;
    if (old == want) *p = x;
    return old;
}

/* ---- arithmetic */
template <class T> static inline T emu_bits(const void *p)
{
    T x;
    memcpy(&x, p, sizeof(x));
    return x;
}
static inline unsigned __float_as_uint(float x)
{
    return emu_bits<unsigned>(&x);
}
static inline int __float_as_int(float x)
{
    return emu_bits<int>(&x);
}
static inline float __uint_as_float(unsigned x)
{
    return emu_bits<float>(&x);
}
static inline float __int_as_float(int x)
{
    return emu_bits<float>(&x);
}
static inline int __popc(unsigned x)
{
    return __builtin_popcount(x);
}
static inline int __popcll(unsigned long long x)
{
    return __builtin_popcountll(x);
}
static inline int __clz(int x)
{
    return x ? __builtin_clz((unsigned)x) : 32;
}
static inline int __ffs(int x)
{
    return __builtin_ffs(x);
}
static inline float rsqrtf(float x)
{
    return 1.0f / sqrtf(x);
}
static inline float __fmul_rn(float a, float b)
{
    return a * b;
}
static inline float __fadd_rn(float a, float b)
{
    return a + b;
}
static inline float __fdiv_rn(float a, float b)
{
    return a / b;
}
static inline float __fsqrt_rn(float x)
{
    return sqrtf(x);
}
static inline float __fmaf_rn(float a, float b, float c)
{
    return fmaf(a, b, c);
}
template <class T> static inline T __ldg(const T *p)
{
    return *p;
}
#define EMU_MIN_MAX(type)                                                                          \
    static inline type min(type a, type b)                                                         \
    {                                                                                              \
        return a < b ? a : b;                                                                      \
    }                                                                                              \
    static inline type max(type a, type b)                                                         \
    {                                                                                              \
        return a > b ? a : b;                                                                      \
    }
EMU_MIN_MAX(int)
EMU_MIN_MAX(unsigned)
EMU_MIN_MAX(long)
EMU_MIN_MAX(unsigned long)
EMU_MIN_MAX(long long)
EMU_MIN_MAX(unsigned long long)

#endif
