/*
 * Shared by the backend's tests: random arrays, backends of every instruction set of this machine,
 * and comparisons. Memory is malloc's; backends are destroyed by the test that made them.
 */
#ifndef TEST_UNIT_BACKEND_COMMON_H
#define TEST_UNIT_BACKEND_COMMON_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "backend/backend.h"
#include "backend/cpu/cpu.h"
#include "util/philox.h"
#ifdef TB_TEST_CUDA
#    include "cuda/cuda.h"
#endif

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#    define SLOW 1
#elif defined(__has_feature)
#    if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#        define SLOW 1
#    endif
#endif
#ifndef SLOW
#    define SLOW 0
#endif

struct target {
    const char *isa;
    enum tb_dtype act;
};
static const struct target targets[] = {
#ifdef TB_TEST_CUDA /* test/cuda/ */
    {"cuda", TB_F32},
    {"cuda", TB_BF16},
#else
    {"plain", TB_F32},  {"plain", TB_BF16},       {"avx2", TB_F32},
    {"avx512", TB_F32}, {"avx512_bf16", TB_BF16},
#endif
};
#define N_TARGETS (int)(sizeof(targets) / sizeof(targets[0]))

/* x A^T of one module. */
static inline void lora_down(struct tb_backend *be, const struct tb_lora_span *s, int n,
                             const void *x, int ldx, int n_in, void *u, int ldu)
{
    const struct tb_lora_term term = {s, n, u, ldu, 0, 0};
    be->ops->lora_down(be, &term, 1, x, ldx, n_in);
}

/* Memory for the kernels of any backend, one at a time: more than any test's calls need. */
static inline void lend(struct tb_backend *be)
{
    static char mem[(size_t)256 << 20] __attribute__((aligned(64)));
    struct tb_pass_size size = {
        .attn = {.n_head = 16, .n_kv_head = 8, .head_dim = 256}, .rows = 4096, .rank = 512};
    size.vocab = 200000;
    if (!be->ops->lend) return;
    assert_true(be->ops->lend(be, &size, NULL) <= sizeof(mem));
    be->ops->lend(be, &size, mem);
}

/* NULL where this machine lacks the instruction set. */
static inline struct tb_backend *open_backend(const char *isa, enum tb_dtype act, int threads)
{
    struct tb_backend *be = NULL;
    struct tb_error err = {0};
    struct tb_backend_options o = {.act = act, .n_threads = threads, .isa = isa};
    int rc;
#ifdef TB_TEST_CUDA
    o.mem_limit = (size_t)256 << 20;
    if (strcmp(isa, "cuda") == 0)
        rc = tb_backend_cuda_create(&be, &o, &err);
    else
#endif
        rc = tb_backend_cpu_create(&be, &o, &err);
    if (rc == TB_EUNSUPPORTED) return NULL;
    assert_int_equal(rc, 0);
    lend(be);
    return be;
}

static uint64_t rng_state = 1;
static inline float rnd(void) /* uniform in [-1, 1) */
{
    float u = tb_philox_draw(77, (uint32_t)rng_state, (uint32_t)(rng_state >> 32), 5);
    rng_state++;
    return 2.0f * u - 1.0f;
}

static inline float *random_f32(size_t n)
{
    float *p = malloc((n + 1) * sizeof(float));
    assert_non_null(p);
    for (size_t i = 0; i < n; i++)
        p[i] = rnd();
    return p;
}

/* Exactly n activations, so that a sanitizer sees a read beyond them. */
static inline void *to_act(enum tb_dtype act, const float *x, size_t n)
{
    void *p = malloc(n * tb_dtype_size(act) + (n == 0));
    assert_non_null(p);
    for (size_t i = 0; i < n; i++)
        tb_store(act, p, i, x[i]);
    return p;
}

static inline void *random_act(enum tb_dtype act, size_t n)
{
    float *x = random_f32(n);
    void *p = to_act(act, x, n);
    free(x);
    return p;
}

static inline float *widen(enum tb_dtype act, const void *p, size_t n)
{
    float *x = malloc((n + 1) * sizeof(float));
    assert_non_null(x);
    for (size_t i = 0; i < n; i++)
        x[i] = tb_load(act, p, i);
    return x;
}

static inline void assert_close(const char *what, const float *got, const float *want, size_t n,
                                double tol)
{
    double scale = 0;
    for (size_t i = 0; i < n; i++)
        scale = isinf(want[i]) ? scale : fmax(scale, fabs((double)want[i]));
    for (size_t i = 0; i < n; i++) {
        if (got[i] == want[i]) continue; /* infinities too */
        double d = fabs((double)got[i] - (double)want[i]);
        if (!(d <= tol * (scale + 1e-6)))
            fail_msg("%s[%zu of %zu]: got %.9g, want %.9g (scale %.3g, tolerance %.1e)", what, i, n,
                     (double)got[i], (double)want[i], scale, tol);
    }
}

static inline void assert_close_act(const char *what, enum tb_dtype act, const void *got,
                                    const void *want, size_t n, double tol)
{
    float *a = widen(act, got, n), *b = widen(act, want, n);
    assert_close(what, a, b, n, tol);
    free(a);
    free(b);
}

static inline void assert_same_bits(const char *what, const void *a, const void *b, size_t bytes)
{
    const unsigned char *x = a, *y = b;
    for (size_t i = 0; i < bytes; i++)
        if (x[i] != y[i]) fail_msg("%s: byte %zu of %zu differs", what, i, bytes);
}

#endif
