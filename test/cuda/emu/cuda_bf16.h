/* bf16 under the emulation (emu.h): conversions round to nearest, ties to even; a NaN becomes
 * 0x7fff, as CUDA's do. */
#ifndef TEST_CUDA_EMU_CUDA_BF16_H
#define TEST_CUDA_EMU_CUDA_BF16_H

#include <string.h>

struct __nv_bfloat16 {
    unsigned short bits;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x)
{
    return x.bits;
}
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits)
{
    return {bits};
}
static inline float __bfloat162float(__nv_bfloat16 x)
{
    unsigned u = (unsigned)x.bits << 16;
    float f;
    memcpy(&f, &u, sizeof(f));
    return f;
}
static inline __nv_bfloat16 __float2bfloat16_rn(float f)
{
    unsigned u;
    memcpy(&u, &f, sizeof(u));
    if (f != f) return {0x7fff};
    return {(unsigned short)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
static inline __nv_bfloat16 __float2bfloat16(float f)
{
    return __float2bfloat16_rn(f);
}
static inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y)
{
    return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
static inline float __low2float(__nv_bfloat162 v)
{
    return __bfloat162float(v.x);
}
static inline float __high2float(__nv_bfloat162 v)
{
    return __bfloat162float(v.y);
}

#endif
