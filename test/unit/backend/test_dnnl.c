/*
 * oneDNN on our packed panels: it takes the shapes that models have, and gives the bits of our own
 * kernels, which compute the same rows one by one. Skipped where the CPU has no AVX-512.
 */
#include "common.h"

#include "backend/cpu/cpu.h"
#include "backend/cpu/dnnl.h"

static void check(enum tb_dtype act, const char *isa, int n_in, int n_out)
{
    struct tb_backend_options o = {.act = act, .n_threads = 2, .isa = isa};
    struct tb_backend *be;
    struct tb_error err = {0};
    if (tb_backend_cpu_create(&be, &o, &err)) skip();
    size_t e = tb_dtype_size(act), rows = TB_DNNL_ROWS;
    char *w = test_malloc((size_t)n_out * (size_t)n_in * e);
    char *x = test_malloc(rows * (size_t)n_in * e);
    float *y = test_malloc(rows * (size_t)n_out * 4), *z = test_malloc(rows * (size_t)n_out * 4);
    uint32_t r = 7;
    for (size_t i = 0; i < (size_t)n_out * (size_t)n_in; i++) {
        r = r * 1664525u + 1013904223u;
        tb_store(act, w, i, (float)(r >> 8) * 0x1p-24f - 0.5f);
    }
    for (size_t i = 0; i < rows * (size_t)n_in; i++) {
        r = r * 1664525u + 1013904223u;
        tb_store(act, x, i, (float)(r >> 8) * 0x1p-24f - 0.5f);
    }
    const void *parts[] = {w};
    struct tb_weight *weight;
    assert_int_equal(be->ops->weight_create(be, 1, parts, &act, &n_out, n_in, &weight, &err), 0);

    /* the library on whole panels, our kernels row by row */
    struct tb_dnnl *d = tb_dnnl_create(act, 1);
    assert_non_null(d);
    assert_true(tb_dnnl_tile(d, 0, weight->fwd, n_in, n_out, x, (size_t)n_in, y, (size_t)n_out));
    for (size_t i = 0; i < rows; i++)
        be->ops->matmul(be, weight, x + i * (size_t)n_in * e, 1, NULL, z + i * (size_t)n_out, n_out,
                        false);
    assert_memory_equal(y, z, rows * (size_t)n_out * 4);
    /* and through the table, which chooses the library for so many rows */
    memset(y, 0, rows * (size_t)n_out * 4);
    be->ops->matmul(be, weight, x, (int)rows, NULL, y, n_out, false);
    assert_memory_equal(y, z, rows * (size_t)n_out * 4);
    bool agreed = false;
    for (int i = 0; i < tb_cpu(be)->n_agreed; i++)
        agreed |= tb_cpu(be)->agreed[i].k == n_in && tb_cpu(be)->agreed[i].ok;
    assert_true(agreed);

    tb_dnnl_destroy(d);
    be->ops->weight_free(be, weight);
    be->ops->destroy(be);
    test_free(w);
    test_free(x);
    test_free(y);
    test_free(z);
}

static const int sizes[] = {64, 96, 512, 768, 896, 1024, 1536, 2048, 3072};

static void test_bf16(void **state)
{
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
        check(TB_BF16, "avx512_bf16", sizes[i], 192);
}

static void test_f32(void **state)
{
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
        check(TB_F32, "avx512", sizes[i], 128);
}

/* A shape that the library packs otherwise is left alone. */
static void test_refused(void **state)
{
    struct tb_dnnl *d = tb_dnnl_create(TB_BF16, 1);
    float y[1] = {3.0f};
    assert_non_null(d);
    assert_false(tb_dnnl_tile(d, 0, y, 100, 64, y, 100, y, 64));
    assert_true(y[0] == 3.0f);
    tb_dnnl_destroy(d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bf16),
        cmocka_unit_test(test_f32),
        cmocka_unit_test(test_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
