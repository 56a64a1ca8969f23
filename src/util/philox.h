/*
 * Philox4x32-10 (Salmon et al., SC11): a counter-based generator. The same (key, counter) gives the
 * same numbers on every thread, in every order and on the GPU, which is what makes seeds repeat
 * under load. Verified against the known-answer vectors of the Random123 distribution.
 *
 * Thread: any (pure functions).
 */
#ifndef TB_UTIL_PHILOX_H
#define TB_UTIL_PHILOX_H

#include <stdint.h>

static inline void tb_philox4x32(const uint32_t ctr[4], const uint32_t key[2], uint32_t out[4])
{
    uint32_t c0 = ctr[0], c1 = ctr[1], c2 = ctr[2], c3 = ctr[3], k0 = key[0], k1 = key[1];
    for (int i = 0; i < 10; i++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

/* Uniform in [0, 1) with 24 bits, from one 32-bit word. */
static inline float tb_philox_unit(uint32_t x)
{
    return (float)(x >> 8) * 0x1.0p-24f;
}

/* The uniform that draws token number `step` of sample `sample` under `seed`. */
static inline float tb_philox_draw(uint64_t seed, uint32_t sample, uint32_t step, uint32_t stream)
{
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    uint32_t ctr[4] = {step, sample, stream, 0}, out[4];
    tb_philox4x32(ctr, key, out);
    return tb_philox_unit(out[0]);
}

/* 64-bit FNV-1a of a name: keys a stream by a tensor's name, for initialisation. */
static inline uint64_t tb_fnv1a(const char *s)
{
    uint64_t h = 0xcbf29ce484222325ull;
    for (; *s; s++)
        h = (h ^ (unsigned char)*s) * 0x100000001b3ull;
    return h;
}

#endif
