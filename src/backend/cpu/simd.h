/*
 * The vector words that the fast kernels are written in. The k_*.c files are compiled once for each
 * of three targets, which differ in vector width and activation type:
 *
 *   TB_K_AVX2     8 lanes,  float32 activations
 *   TB_K_AVX512   16 lanes, float32 activations
 *   TB_K_BF16     16 lanes, bf16 activations (AVX-512 BF16)
 *
 * A "word" is what one step of a product eats: 32 bits, a pair of bf16 values or one float32.
 * Packed operands are arrays of words, so the kernels are the same text for both types.
 */
#ifndef TB_BACKEND_CPU_SIMD_H
#define TB_BACKEND_CPU_SIMD_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#include "backend/cpu/cpu.h"

#if defined(TB_K_BF16)
#    define K(name) tb_k_##name##_bf16
typedef uint16_t act_t;
#    define KP  2 /* activations in a word */
#    define ACT TB_BF16
#elif defined(TB_K_AVX512)
#    define K(name) tb_k_##name##_avx512
typedef float act_t;
#    define KP      1
#    define ACT     TB_F32
#elif defined(TB_K_AVX2)
#    define K(name) tb_k_##name##_avx2
typedef float act_t;
#    define KP      1
#    define ACT     TB_F32
#endif

/* A word at any address: rows of activations are only aligned to their own type. */
typedef uint32_t __attribute__((aligned(1), may_alias)) tb_word;

#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

#if defined(TB_K_AVX2)
#    define VW 8
typedef __m256 vf;

INLINE vf vf_zero(void)
{
    return _mm256_setzero_ps();
}
INLINE vf vf_set1(float x)
{
    return _mm256_set1_ps(x);
}
INLINE vf vf_load(const float *p)
{
    return _mm256_loadu_ps(p);
}
INLINE void vf_store(float *p, vf x)
{
    _mm256_storeu_ps(p, x);
}
INLINE __m256i vf_mask(int n) /* the first n lanes */
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE vf vf_loadn(const float *p, int n)
{
    return _mm256_maskload_ps(p, vf_mask(n));
}
INLINE void vf_storen(float *p, vf x, int n)
{
    _mm256_maskstore_ps(p, vf_mask(n), x);
}
INLINE vf vf_add(vf a, vf b)
{
    return _mm256_add_ps(a, b);
}
INLINE vf vf_sub(vf a, vf b)
{
    return _mm256_sub_ps(a, b);
}
INLINE vf vf_mul(vf a, vf b)
{
    return _mm256_mul_ps(a, b);
}
INLINE vf vf_div(vf a, vf b)
{
    return _mm256_div_ps(a, b);
}
INLINE vf vf_fma(vf a, vf b, vf c) /* a b + c */
{
    return _mm256_fmadd_ps(a, b, c);
}
INLINE vf vf_max(vf a, vf b) /* b where either is NaN */
{
    return _mm256_max_ps(a, b);
}
INLINE vf vf_sqrt(vf a)
{
    return _mm256_sqrt_ps(a);
}
/* Lanes lo <= i < hi keep x, the others become y. */
INLINE vf vf_window(vf x, vf y, int lo, int hi)
{
    __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i in = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(lo), lanes),
                                     _mm256_cmpgt_epi32(_mm256_set1_epi32(hi), lanes));
    return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(in));
}
INLINE unsigned vf_gt_bits(vf a, vf b)
{
    return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
INLINE float vf_hsum(vf a)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
INLINE float vf_hmax(vf a)
{
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
/* Sums in float64, VW lanes. */
struct vd {
    __m256d lo, hi;
};
INLINE struct vd vd_zero(void)
{
    return (struct vd){_mm256_setzero_pd(), _mm256_setzero_pd()};
}
INLINE struct vd vd_add_squares(struct vd s, vf x)
{
    __m256d a = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
    __m256d b = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
    return (struct vd){_mm256_fmadd_pd(a, a, s.lo), _mm256_fmadd_pd(b, b, s.hi)};
}
INLINE void vd_store(double *p, struct vd s)
{
    _mm256_storeu_pd(p, s.lo);
    _mm256_storeu_pd(p + 4, s.hi);
}
/* p 2^n for integer-valued n in [-126, 127] */
INLINE vf vf_scale2(vf p, vf n)
{
    __m256i e = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), e));
}
INLINE vf vf_round(vf x)
{
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE vf vf_zero_below(vf r, vf x, vf lo) /* 0 where x < lo */
{
    return _mm256_andnot_ps(_mm256_cmp_ps(x, lo, _CMP_LT_OQ), r);
}
#    define EXP_LO (-87.33f)

#else
#    define VW     16
typedef __m512 vf;

INLINE vf vf_zero(void)
{
    return _mm512_setzero_ps();
}
INLINE vf vf_set1(float x)
{
    return _mm512_set1_ps(x);
}
INLINE vf vf_load(const float *p)
{
    return _mm512_loadu_ps(p);
}
INLINE void vf_store(float *p, vf x)
{
    _mm512_storeu_ps(p, x);
}
INLINE __mmask16 vf_mask(int n)
{
    return n >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << n) - 1);
}
INLINE vf vf_loadn(const float *p, int n)
{
    return _mm512_maskz_loadu_ps(vf_mask(n), p);
}
INLINE void vf_storen(float *p, vf x, int n)
{
    _mm512_mask_storeu_ps(p, vf_mask(n), x);
}
INLINE vf vf_add(vf a, vf b)
{
    return _mm512_add_ps(a, b);
}
INLINE vf vf_sub(vf a, vf b)
{
    return _mm512_sub_ps(a, b);
}
INLINE vf vf_mul(vf a, vf b)
{
    return _mm512_mul_ps(a, b);
}
INLINE vf vf_div(vf a, vf b)
{
    return _mm512_div_ps(a, b);
}
INLINE vf vf_fma(vf a, vf b, vf c)
{
    return _mm512_fmadd_ps(a, b, c);
}
INLINE vf vf_max(vf a, vf b)
{
    return _mm512_max_ps(a, b);
}
INLINE vf vf_sqrt(vf a)
{
    return _mm512_sqrt_ps(a);
}
INLINE vf vf_window(vf x, vf y, int lo, int hi)
{
    unsigned m = (hi >= 16  ? 0xffffu
                  : hi <= 0 ? 0u
                            : (1u << hi) - 1) &
                 (lo <= 0    ? 0xffffu
                  : lo >= 16 ? 0u
                             : ~((1u << lo) - 1));
    return _mm512_mask_blend_ps((__mmask16)m, y, x);
}
INLINE unsigned vf_gt_bits(vf a, vf b)
{
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
}
INLINE float vf_hsum(vf a)
{
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
INLINE float vf_hmax(vf a)
{
    __m256 h = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
struct vd {
    __m512d lo, hi;
};
INLINE struct vd vd_zero(void)
{
    return (struct vd){_mm512_setzero_pd(), _mm512_setzero_pd()};
}
INLINE struct vd vd_add_squares(struct vd s, vf x)
{
    __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
    __m512d b = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
    return (struct vd){_mm512_fmadd_pd(a, a, s.lo), _mm512_fmadd_pd(b, b, s.hi)};
}
INLINE void vd_store(double *p, struct vd s)
{
    _mm512_storeu_pd(p, s.lo);
    _mm512_storeu_pd(p + 8, s.hi);
}
INLINE vf vf_scale2(vf p, vf n)
{
    return _mm512_scalef_ps(p, n);
}
INLINE vf vf_round(vf x)
{
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE vf vf_zero_below(vf r, vf x, vf lo)
{
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, lo, _CMP_NLT_UQ), r);
}
#    define EXP_LO (-87.33f)
#endif

/* e^x within 2 ulp; 0 below -87.33 (so exactly 0 at -inf), inf above 88.72, NaN stays NaN. */
INLINE vf vf_exp(vf x0)
{
    vf x = vf_max(vf_set1(EXP_LO), x0);
#if defined(TB_K_AVX2)
    x = _mm256_min_ps(vf_set1(88.72f), x);
#else
    x = _mm512_min_ps(vf_set1(88.73f), x);
#endif
    vf n = vf_round(vf_mul(x, vf_set1(1.44269504088896341f)));
#if defined(TB_K_AVX2)
    n = _mm256_min_ps(vf_set1(127.0f), n); /* 2^128 cannot be built in the exponent */
#endif
    vf r = vf_fma(n, vf_set1(-0.693359375f), x);
    r = vf_fma(n, vf_set1(2.12194440e-4f), r);
    vf p = vf_set1(1.9875691500e-4f);
    p = vf_fma(p, r, vf_set1(1.3981999507e-3f));
    p = vf_fma(p, r, vf_set1(8.3334519073e-3f));
    p = vf_fma(p, r, vf_set1(4.1665795894e-2f));
    p = vf_fma(p, r, vf_set1(1.6666665459e-1f));
    p = vf_fma(p, r, vf_set1(5.0000001201e-1f));
    p = vf_fma(p, vf_mul(r, r), vf_add(r, vf_set1(1.0f)));
    return vf_zero_below(vf_scale2(p, n), x0, vf_set1(EXP_LO));
}

/* ---- activations: VW (or n < VW) of them as float32 lanes */
#if defined(TB_K_BF16)
typedef __m512i vw; /* a vector of words */

INLINE vf va_load(const act_t *p)
{
    __m256i h = _mm256_loadu_si256((const __m256i *)(const void *)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
INLINE vf va_loadn(const act_t *p, int n)
{
    __m256i h = _mm256_maskz_loadu_epi16(vf_mask(n), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
INLINE __m256i va_narrow(vf x)
{
    return (__m256i)_mm512_cvtneps_pbh(x);
}
INLINE void va_store(act_t *p, vf x)
{
    _mm256_storeu_si256((__m256i *)(void *)p, va_narrow(x));
}
INLINE void va_storen(act_t *p, vf x, int n)
{
    _mm256_mask_storeu_epi16(p, vf_mask(n), va_narrow(x));
}
INLINE vf va_round(vf x)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(va_narrow(x)), 16));
}
INLINE vw vw_load(const uint32_t *p)
{
    return _mm512_loadu_si512(p);
}
INLINE vw vw_set1(const tb_word *p)
{
    return _mm512_set1_epi32((int)*p);
}
INLINE vf vdot(vf acc, vw a, vw b)
{
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}
INLINE vw vw_unzip(vw a, vw b, const int odd)
{
    __m512i i = _mm512_add_epi32(
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
        _mm512_set1_epi32(odd));
    return _mm512_permutex2var_epi32(a, i, b);
}
/* Words of two rows of n <= VW activations: lane i is (lo[i], hi[i]). hi NULL = zeros. */
INLINE void vw_pair(uint32_t *dst, const act_t *lo, const act_t *hi, int n)
{
    __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(vf_mask(n), lo));
    if (hi) {
        __m512i b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(vf_mask(n), hi));
        a = _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
    }
    _mm512_storeu_si512(dst, a);
}
#else
typedef vf vw;

INLINE vf va_load(const act_t *p)
{
    return vf_load(p);
}
INLINE vf va_loadn(const act_t *p, int n)
{
    return vf_loadn(p, n);
}
INLINE void va_store(act_t *p, vf x)
{
    vf_store(p, x);
}
INLINE void va_storen(act_t *p, vf x, int n)
{
    vf_storen(p, x, n);
}
INLINE vf va_round(vf x)
{
    return x;
}
INLINE vw vw_load(const uint32_t *p)
{
    return vf_load((const float *)(const void *)p);
}
INLINE vw vw_set1(const tb_word *p)
{
    float f;
    __builtin_memcpy(&f, p, 4);
    return vf_set1(f);
}
INLINE vf vdot(vf acc, vw a, vw b)
{
    return vf_fma(a, b, acc);
}
/* The even or the odd words of a and b, in order. */
INLINE vw vw_unzip(vw a, vw b, const int odd)
{
#    if defined(TB_K_AVX2)
    vf v = odd ? _mm256_shuffle_ps(a, b, 0xdd) : _mm256_shuffle_ps(a, b, 0x88);
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8));
#    else
    __m512i i = _mm512_add_epi32(
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
        _mm512_set1_epi32(odd));
    return _mm512_permutex2var_ps(a, i, b);
#    endif
}
INLINE void vw_pair(uint32_t *dst, const act_t *lo, const act_t *hi, int n)
{
    vf_store((float *)(void *)dst, vf_loadn(lo, n));
}
#endif

/* Transposes a VW x VW tile of words in registers' width. src rows are stride words apart (any
 * address), rows < n_rows and columns < n_cols are read, the others are 0; dst rows are ld words
 * apart. */
INLINE void tile_transpose(const tb_word *src, size_t stride, int n_rows, int n_cols, uint32_t *dst,
                           size_t ld)
{
#if defined(TB_K_AVX2)
    __m256 r[8], t[8];
    UNROLL for (int i = 0; i < 8; i++)
    {
        r[i] = vf_zero();
        if (i < n_rows)
            r[i] = vf_loadn((const float *)(const void *)(src + (size_t)i * stride), n_cols);
    }
    UNROLL for (int i = 0; i < 8; i += 2)
    {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    UNROLL for (int i = 0; i < 8; i += 4)
    {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    UNROLL for (int i = 0; i < 4; i++)
    {
        t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
    UNROLL for (int i = 0; i < 8; i++) vf_store((float *)(void *)(dst + (size_t)i * ld), t[i]);
#else
    __m512i r[16], t[16];
    __mmask16 m = vf_mask(n_cols);
    UNROLL for (int i = 0; i < 16; i++)
    {
        r[i] = _mm512_setzero_si512();
        if (i < n_rows) r[i] = _mm512_maskz_loadu_epi32(m, src + (size_t)i * stride);
    }
    UNROLL for (int i = 0; i < 16; i += 2)
    {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4)
    {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++)
    {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    UNROLL for (int i = 0; i < 8; i++)
    {
        int a = i & 3, b = (i >> 2) * 4; /* t[0..7] hold keys of rows 0-7, t[8..15] of rows 8-15 */
        r[a + b] = _mm512_shuffle_i32x4(t[a + b], t[a + b + 8], 0x88);
        r[a + b + 8] = _mm512_shuffle_i32x4(t[a + b], t[a + b + 8], 0xdd);
    }
    UNROLL for (int i = 0; i < 16; i++) _mm512_storeu_si512(dst + (size_t)i * ld, r[i]);
#endif
}

#endif
