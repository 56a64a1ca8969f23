/*
 * The number formats of weights and activations on the host.
 *
 * Owns nothing. Thread: any.
 */
#ifndef TB_BACKEND_NUMBER_H
#define TB_BACKEND_NUMBER_H

#include <stdint.h>
#include <string.h>

#include "backend/backend.h"

/* bf16 <-> float32, round to nearest even; NaN stays NaN. */
static inline float tb_bf16_to_f32(uint16_t h)
{
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static inline uint16_t tb_f32_to_bf16(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40u);
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
static inline float tb_f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, e = (h >> 10) & 31u, m = h & 0x3ffu, u;
    float f;
    if (e == 31) {
        u = sign | 0x7f800000u | (m << 13);
    } else if (e != 0) {
        u = sign | ((e + 112u) << 23) | (m << 13);
    } else {
        f = (float)m * 0x1.0p-24f;
        return sign ? -f : f;
    }
    memcpy(&f, &u, 4);
    return f;
}

/* Element i of an array of the given type, widened. */
static inline float tb_load(enum tb_dtype t, const void *p, size_t i)
{
    if (t == TB_F32) return ((const float *)p)[i];
    uint16_t h = ((const uint16_t *)p)[i];
    return t == TB_BF16 ? tb_bf16_to_f32(h) : tb_f16_to_f32(h);
}
static inline void tb_store(enum tb_dtype t, void *p, size_t i, float f)
{
    if (t == TB_F32)
        ((float *)p)[i] = f;
    else
        ((uint16_t *)p)[i] = tb_f32_to_bf16(f);
}

#endif
