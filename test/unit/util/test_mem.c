/* Memory: failing calls, size arithmetic, strings. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "util/mem.h"

static void test_fail_after(void **state)
{
    tb_mem_fail_after(3);
    void *a = tb_try_malloc(1), *b = tb_try_calloc(1, 1);
    assert_non_null(a);
    assert_non_null(b);
    assert_null(tb_try_realloc(a, 100)); /* the third; a stays valid */
    a = tb_try_realloc(a, 100);          /* once only */
    assert_non_null(a);
    tb_mem_fail_after(1);
    void *c = tb_malloc(1); /* the aborting form never fails on purpose */
    assert_non_null(c);
    assert_null(tb_try_malloc(1));
    tb_mem_fail_after(5);
    tb_mem_fail_after(0);
    for (int i = 0; i < 10; i++) {
        void *p = tb_try_malloc(8);
        assert_non_null(p);
        tb_free(p);
    }
    tb_free(a);
    tb_free(b);
    tb_free(c);
    tb_free(NULL);
}

static void test_sizes(void **state)
{
    size_t v = 0;
    assert_true(tb_mul_size(1000, 1000, &v));
    assert_int_equal(v, 1000000);
    assert_false(tb_mul_size(SIZE_MAX / 2, 3, &v));
    assert_true(tb_add_size(SIZE_MAX - 1, 1, &v));
    assert_true(v == SIZE_MAX);
    assert_false(tb_add_size(SIZE_MAX, 1, &v));
    assert_null(tb_try_malloc(SIZE_MAX));
    assert_null(tb_try_calloc(SIZE_MAX / 2, 4));
    assert_null(tb_try_calloc(SIZE_MAX, 1));
    assert_null(tb_try_realloc(NULL, SIZE_MAX - 100));
    void *zero[] = {tb_malloc(0), tb_calloc(0, 8), tb_try_malloc(0), tb_try_calloc(8, 0),
                    tb_realloc(NULL, 0)};
    for (size_t i = 0; i < TB_ARRAY_LEN(zero); i++) {
        assert_non_null(zero[i]);
        tb_free(zero[i]);
    }
}

static void test_strings(void **state)
{
    char *s = tb_strdup("hello");
    assert_string_equal(s, "hello");
    tb_free(s);
    s = tb_strndup("hello", 2);
    assert_string_equal(s, "he");
    tb_free(s);
    s = tb_asprintf("%s-%0500d", "x", 7);
    assert_int_equal(strlen(s), 502);
    assert_int_equal(s[501], '7');
    tb_free(s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_fail_after),
        cmocka_unit_test(test_sizes),
        cmocka_unit_test(test_strings),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
