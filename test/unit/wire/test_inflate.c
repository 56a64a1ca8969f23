/* Compressed bodies: they come back whole, and nothing malformed, truncated, padded or bomb-like
 * does. */
#include "wire/inflate.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <zlib.h>
#include <zstd.h>

#include <cmocka.h>

#include "util/mem.h"
#include "util/philox.h"

static size_t compress_as(enum tb_encoding e, const void *in, size_t n, char **out)
{
    size_t cap = ZSTD_compressBound(n) + n / 10 + 1024;
    char *p = tb_malloc(cap);
    *out = p;
    if (e == TB_ENC_ZSTD) {
        size_t r = ZSTD_compress(p, cap, in, n, 3);
        assert_false(ZSTD_isError(r));
        return r;
    }
    z_stream z = {0};
    assert_int_equal(
        deflateInit2(&z, 6, Z_DEFLATED, e == TB_ENC_GZIP ? 31 : 15, 8, Z_DEFAULT_STRATEGY), Z_OK);
    z.next_in = (z_const Bytef *)(uintptr_t)in;
    z.avail_in = (uInt)n;
    z.next_out = (Bytef *)p;
    z.avail_out = (uInt)cap;
    assert_int_equal(deflate(&z, Z_FINISH), Z_STREAM_END);
    size_t r = z.total_out;
    deflateEnd(&z);
    return r;
}

static const enum tb_encoding ALL[] = {TB_ENC_ZSTD, TB_ENC_GZIP, TB_ENC_DEFLATE};

static char *data(size_t n) /* compressible, but not absurdly so */
{
    char *p = tb_malloc(n + 1);
    for (size_t i = 0; i < n; i++)
        p[i] = (char)((i * i >> 7) + (i % 5));
    return p;
}

static void test_round_trip(void **state)
{
    (void)state;
    static const size_t sizes[] = {0, 1, 1000, 300000, 3 << 20};
    for (size_t k = 0; k < 3; k++)
        for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
            char *in = data(sizes[i]), *c, *out = NULL;
            size_t cn = compress_as(ALL[k], in, sizes[i], &c), n = 99;
            struct tb_error e = {0};
            if (tb_inflate(ALL[k], c, cn, 4 << 20, &out, &n, &e)) fail_msg("%s", e.msg);
            assert_int_equal(n, sizes[i]);
            assert_memory_equal(out, in, n);
            tb_free(out);
            if (sizes[i] > 0) { /* exactly at and just below its size */
                assert_int_equal(tb_inflate(ALL[k], c, cn, sizes[i], &out, &n, &e), 0);
                tb_free(out);
                assert_int_equal(tb_inflate(ALL[k], c, cn, sizes[i] - 1, &out, &n, &e), TB_ETOOBIG);
            }
            tb_free(in);
            tb_free(c);
        }
}

static void test_broken(void **state)
{
    (void)state;
    char *in = data(5000), *c, *out;
    size_t n;
    for (size_t k = 0; k < 3; k++) {
        size_t cn = compress_as(ALL[k], in, 5000, &c);
        struct tb_error e = {0};
        for (size_t cut = 0; cut < cn; cut++)
            assert_int_equal(tb_inflate(ALL[k], c, cut, 1 << 20, &out, &n, &e), TB_EPARSE);
        c[cn] = 'x';
        assert_int_equal(tb_inflate(ALL[k], c, cn + 1, 1 << 20, &out, &n, &e), TB_EPARSE);
        assert_non_null(strstr(e.msg, "1 bytes follow"));
        for (uint32_t i = 0; i < 3000; i++) {
            uint32_t ctr[4] = {i, 0, 0, 0}, key[2] = {5, 6}, r[4];
            tb_philox4x32(ctr, key, r);
            size_t at = r[0] % cn;
            char was = c[at];
            c[at] = (char)(c[at] ^ (1 << (r[1] % 8)));
            int rc = tb_inflate(ALL[k], c, cn, 1 << 20, &out, &n, &e);
            if (rc == 0)
                tb_free(out);
            else
                assert_true(rc == TB_EPARSE || rc == TB_ETOOBIG);
            c[at] = was;
        }
        tb_free(c);
    }
    tb_free(in);
}

static void test_bomb(void **state)
{
    (void)state;
    size_t n = 200u << 20, on;
    char *zeros = tb_calloc(1, n), *c, *out;
    size_t cn = compress_as(TB_ENC_ZSTD, zeros, n, &c);
    struct tb_error e = {0};
    assert_true(cn < n / 4096);
    assert_int_equal(tb_inflate(TB_ENC_ZSTD, c, cn, 256u << 20, &out, &on, &e), TB_ETOOBIG);
    assert_non_null(strstr(e.msg, "4096-fold"));
    tb_free(c);
    tb_free(zeros);
}

static void test_names(void **state)
{
    (void)state;
    enum tb_encoding e;
    struct tb_error err = {0};
    assert_int_equal(tb_encoding_parse((struct tb_span){NULL, 0}, &e, &err), 0);
    assert_int_equal(e, TB_ENC_IDENTITY);
    assert_int_equal(tb_encoding_parse(TB_SPAN_LIT("ZSTD"), &e, &err), 0);
    assert_int_equal(e, TB_ENC_ZSTD);
    assert_int_equal(tb_encoding_parse(TB_SPAN_LIT("x-gzip"), &e, &err), 0);
    assert_int_equal(e, TB_ENC_GZIP);
    assert_int_equal(tb_encoding_parse(TB_SPAN_LIT("deflate"), &e, &err), 0);
    assert_int_equal(e, TB_ENC_DEFLATE);
    assert_int_equal(tb_encoding_parse(TB_SPAN_LIT("gzip, zstd"), &e, &err), TB_EUNSUPPORTED);
    assert_non_null(strstr(err.msg, "\"gzip, zstd\""));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_broken),
        cmocka_unit_test(test_bomb),
        cmocka_unit_test(test_names),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
