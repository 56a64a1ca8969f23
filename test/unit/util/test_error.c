/* Errors: the table, messages that are cut, prefixed or hold control characters. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include <uv.h>

#include "util/error.h"

static void test_table(void **state)
{
    assert_string_equal(tb_error_name(0), "OK");
    assert_string_equal(tb_error_name(TB_EINVAL), "EINVAL");
    assert_string_equal(tb_error_name(UV_ECONNRESET), "ECONNRESET");
    assert_string_equal(tb_error_name(-4242424), "UNKNOWN");
    assert_int_equal(tb_error_status(TB_OK), 200);
    assert_int_equal(tb_error_status(TB_EGONE), 410);
    assert_int_equal(tb_error_status(TB_EBUSY), 429);
    assert_int_equal(tb_error_status(UV_EPIPE), 500);
    assert_int_equal(tb_error_category(TB_EINVAL), TB_CAT_USER);
    assert_int_equal(tb_error_category(TB_EDEVICE), TB_CAT_SERVER);
    assert_int_equal(tb_error_category(UV_EPIPE), TB_CAT_SERVER);
    assert_string_equal(tb_category_name(TB_CAT_USER), "user");
    assert_string_equal(tb_category_name(TB_CAT_SERVER), "server");
    assert_string_equal(tb_category_name(TB_CAT_UNKNOWN), "unknown");
#define XX(name, num, status, cat, text)                                                           \
    assert_string_equal(tb_error_name(TB_##name), #name);                                          \
    assert_true((status) >= 400 && (status) < 600);
    TB_ERROR_MAP(XX)
#undef XX
}

static void test_messages(void **state)
{
    struct tb_error e = {0};
    assert_int_equal(tb_error_set(&e, TB_EINVAL, "bad %s", "thing"), TB_EINVAL);
    assert_int_equal(e.code, TB_EINVAL);
    assert_string_equal(e.msg, "bad thing");
    assert_int_equal(tb_error_prefix(&e, "field %d", 3), TB_EINVAL);
    assert_string_equal(e.msg, "field 3: bad thing");
    tb_error_set(&e, TB_EIO, "again: %s", e.msg); /* from its own message */
    assert_string_equal(e.msg, "again: field 3: bad thing");
    tb_error_set(&e, TB_EIO, "two\nlines\r\n");
    assert_string_equal(e.msg, "two lines");
    assert_int_equal(tb_error_set(NULL, TB_EIO, "x"), TB_EIO);
}

static void test_cut(void **state)
{
    struct tb_error e = {0};
    char text[1024];
    /* Shifted so that every alignment of a three-byte character meets the end of the buffer. */
    for (size_t shift = 0; shift < 3; shift++) {
        memset(text, 'x', shift);
        for (size_t i = shift; i + 3 < sizeof(text); i += 3)
            memcpy(text + i, "\xe2\x82\xac", 4);
        tb_error_set(&e, TB_EINVAL, "%s", text);
        size_t n = strlen(e.msg);
        assert_true(n < sizeof(e.msg) && n > sizeof(e.msg) - 5);
        assert_int_equal((n - shift) % 3, 0);
        assert_memory_equal(e.msg, text, n);
        tb_error_prefix(&e, "p");
        n = strlen(e.msg);
        assert_int_equal((n - shift) % 3, 0);
        assert_memory_equal(e.msg, "p: ", 3);
    }
    tb_error_set(&e, TB_EINVAL, "%600s", "x");
    assert_int_equal(strspn(e.msg, " "), strlen(e.msg));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_table),
        cmocka_unit_test(test_messages),
        cmocka_unit_test(test_cut),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
