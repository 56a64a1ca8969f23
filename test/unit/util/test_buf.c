/* Buffer: the maximum, the sticky failure, printf at every fill level, stealing. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include <stdio.h>

#include "util/buf.h"
#include "util/error.h"
#include "util/mem.h"

static void test_append(void **state)
{
    struct tb_buf b;
    tb_buf_init(&b, 1000);
    assert_int_equal(tb_buf_append(&b, NULL, 0), 0);
    assert_string_equal(b.p, "");
    for (int i = 0; i < 100; i++)
        assert_int_equal(tb_buf_puts(&b, "0123456789"), 0);
    assert_int_equal(b.n, 1000);
    assert_int_equal(strlen(b.p), 1000);
    assert_true(b.cap <= 1001);
    tb_buf_fini(&b);
    tb_buf_fini(&b);
}

static void test_maximum_is_sticky(void **state)
{
    struct tb_buf b;
    tb_buf_init(&b, 5);
    assert_int_equal(tb_buf_puts(&b, "12345"), 0);
    assert_int_equal(tb_buf_puts(&b, "6"), TB_ETOOBIG);
    assert_true(b.failed);
    assert_string_equal(b.p, "12345");
    assert_int_equal(tb_buf_puts(&b, ""), TB_ETOOBIG);
    assert_int_equal(tb_buf_printf(&b, "x"), TB_ETOOBIG);
    size_t n = 7;
    assert_null(tb_buf_steal(&b, &n));
    assert_int_equal(n, 0);
    assert_int_equal(tb_buf_puts(&b, "12345"), 0); /* usable again */
    tb_buf_reset(&b);
    assert_int_equal(b.n, 0);
    assert_int_equal(tb_buf_reserve(&b, SIZE_MAX), TB_ETOOBIG);
    tb_buf_fini(&b);
}

static void test_printf(void **state)
{
    for (size_t fill = 0; fill < 200; fill++) {
        struct tb_buf b;
        tb_buf_init(&b, 300);
        for (size_t i = 0; i < fill; i++)
            assert_int_equal(tb_buf_append(&b, "x", 1), 0);
        assert_int_equal(tb_buf_printf(&b, "%d/%s", 1234567, "abc"), 0);
        assert_int_equal(b.n, fill + 11);
        assert_string_equal(b.p + fill, "1234567/abc");
        tb_buf_fini(&b);
    }
    struct tb_buf b;
    tb_buf_init(&b, 4);
    assert_int_equal(tb_buf_printf(&b, "%s", "1234"), 0);
    assert_int_equal(tb_buf_printf(&b, "%d", 5), TB_ETOOBIG);
    assert_string_equal(b.p, "1234");
    tb_buf_fini(&b);
}

static void test_steal(void **state)
{
    struct tb_buf b;
    size_t n;
    tb_buf_init(&b, 100);
    char *p = tb_buf_steal(&b, &n);
    assert_string_equal(p, "");
    tb_free(p);
    tb_buf_puts(&b, "hello");
    p = tb_buf_steal(&b, &n);
    assert_int_equal(n, 5);
    assert_string_equal(p, "hello");
    tb_free(p);
    assert_null(b.p);
    tb_buf_fini(&b);
}

static void test_failing_allocations(void **state)
{
    /* Each allocation fails once; what was there before stays. */
    for (long k = 1; k < 8; k++) {
        struct tb_buf b;
        tb_buf_init(&b, 100000);
        tb_mem_fail_after(k);
        int rc = 0;
        size_t before = 0;
        for (int i = 0; i < 1000 && rc == 0; i++) {
            before = b.n;
            rc = tb_buf_puts(&b, "0123456789");
        }
        tb_mem_fail_after(0);
        assert_int_equal(rc, TB_ENOMEM);
        assert_true(b.failed);
        assert_int_equal(b.n, before);
        tb_buf_fini(&b);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_append),
        cmocka_unit_test(test_maximum_is_sticky),
        cmocka_unit_test(test_printf),
        cmocka_unit_test(test_steal),
        cmocka_unit_test(test_failing_allocations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
