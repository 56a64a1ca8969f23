/* Clocks: formats at known instants, monotony; random bytes and ids. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "util/clock.h"
#include "util/mem.h"

static void test_formats(void **state)
{
    static const struct {
        int64_t us;
        const char *iso, *http;
    } cases[] = {
        {0, "1970-01-01T00:00:00.000000Z", "Thu, 01 Jan 1970 00:00:00 GMT"},
        {784111777000000, "1994-11-06T08:49:37.000000Z", "Sun, 06 Nov 1994 08:49:37 GMT"},
        {1709164800123456, "2024-02-29T00:00:00.123456Z", "Thu, 29 Feb 2024 00:00:00 GMT"},
        {-1, "1969-12-31T23:59:59.999999Z", "Wed, 31 Dec 1969 23:59:59 GMT"},
        {253402300799999999, "9999-12-31T23:59:59.999999Z", "Fri, 31 Dec 9999 23:59:59 GMT"},
    };
    char text[TB_TIME_TEXT];
    for (size_t i = 0; i < TB_ARRAY_LEN(cases); i++) {
        tb_clock_format(cases[i].us, text);
        assert_string_equal(text, cases[i].iso);
        tb_clock_http_date(cases[i].us, text);
        assert_string_equal(text, cases[i].http);
    }
    tb_clock_format(INT64_MAX, text); /* no overflow, whatever it says */
    assert_memory_equal(text, "9999-", 5);
    tb_clock_format(INT64_MIN, text);
    assert_memory_equal(text, "0001-", 5);
}

static void test_clocks(void **state)
{
    uint64_t ns = tb_clock_ns(), ms = tb_clock_ms();
    for (int i = 0; i < 1000; i++) {
        uint64_t now = tb_clock_ns();
        assert_true(now >= ns);
        ns = now;
    }
    assert_true(tb_clock_ms() >= ms);
    assert_true(tb_clock_wall_us() > 1700000000000000ll);
}

static void test_random(void **state)
{
    char a[33], b[33];
    int seen[256] = {0};
    for (int i = 0; i < 200; i++) {
        memset(a, '#', sizeof(a));
        tb_random_id(a, 32);
        tb_random_id(b, 32);
        assert_int_equal(strlen(a), 32);
        assert_int_equal(strspn(a, "0123456789abcdefghijklmnopqrstuvwxyz"), 32);
        assert_string_not_equal(a, b);
        for (int k = 0; k < 32; k++)
            seen[(unsigned char)a[k]]++;
    }
    for (const char *c = "0123456789abcdefghijklmnopqrstuvwxyz"; *c; c++) {
        assert_true(seen[(unsigned char)*c] > 0); /* 6,400 draws: missing one has odds of e-78 */
    }
    tb_random_id(a, 0);
    assert_string_equal(a, "");
    assert_true(tb_random_u64() != tb_random_u64());
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_formats),
        cmocka_unit_test(test_clocks),
        cmocka_unit_test(test_random),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
