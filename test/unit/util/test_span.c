/* Spans: comparison and integers at their borders; lists, which are as small. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "util/list.h"
#include "util/mem.h"
#include "util/span.h"

static void test_compare(void **state)
{
    struct tb_span s = TB_SPAN_LIT("Content-Type");
    assert_true(tb_span_eq(s, "Content-Type"));
    assert_false(tb_span_eq(s, "content-type"));
    assert_true(tb_span_ieq(s, "content-type"));
    assert_false(tb_span_ieq(s, "content-typ"));
    assert_false(tb_span_ieq(s, "content-types"));
    assert_false(tb_span_ieq(TB_SPAN_LIT("@"), "`")); /* differ in bit 5, no letters */
    assert_true(tb_span_starts(s, "Content"));
    assert_false(tb_span_starts(s, "Content-Type-"));
    assert_true(tb_span_starts(s, ""));
    assert_true(tb_span_icontains(s, "TENT"));
    assert_true(tb_span_icontains(s, "type"));
    assert_true(tb_span_icontains(s, ""));
    assert_false(tb_span_icontains(s, "types"));
    struct tb_span none = {NULL, 0};
    assert_true(tb_span_eq(none, ""));
    assert_true(tb_span_ieq(none, ""));
    assert_false(tb_span_icontains(none, "a"));
    assert_int_equal(tb_span_str(NULL).n, 0);
}

static void test_integers(void **state)
{
    uint64_t u = 77;
    int64_t i = 77;
    assert_true(tb_span_u64(TB_SPAN_LIT("18446744073709551615"), &u));
    assert_true(u == UINT64_MAX);
    static const char *bad[] = {
        "", "-1", "+1", " 1", "1 ", "0x1", "1e3", "18446744073709551616", "99999999999999999999",
        "-"};
    u = 77;
    for (size_t k = 0; k < TB_ARRAY_LEN(bad); k++) {
        assert_false(tb_span_u64(tb_span_str(bad[k]), &u));
    }
    assert_int_equal(u, 77); /* untouched */
    assert_true(tb_span_i64(TB_SPAN_LIT("-9223372036854775808"), &i));
    assert_true(i == INT64_MIN);
    assert_true(tb_span_i64(TB_SPAN_LIT("9223372036854775807"), &i));
    assert_true(i == INT64_MAX);
    assert_false(tb_span_i64(TB_SPAN_LIT("9223372036854775808"), &i));
    assert_false(tb_span_i64(TB_SPAN_LIT("-9223372036854775809"), &i));
    assert_false(tb_span_i64(TB_SPAN_LIT("--1"), &i));
    assert_true(tb_span_i64(TB_SPAN_LIT("-0"), &i));
    assert_int_equal(i, 0);
    assert_true(tb_span_u64((struct tb_span){"12345", 3}, &u)); /* the span's end counts */
    assert_int_equal(u, 123);
}

static void test_list(void **state)
{
    struct tb_list a, b, n[4];
    tb_list_init(&a);
    tb_list_init(&b);
    assert_null(tb_list_pop(&a));
    tb_list_push(&a, &n[1]);
    tb_list_push(&a, &n[2]);
    tb_list_push_front(&a, &n[0]);
    tb_list_push(&b, &n[3]);
    tb_list_move(&b, &a);
    tb_list_move(&b, &a); /* empty */
    assert_true(tb_list_empty(&a));
    tb_list_del(&n[1]);
    tb_list_del(&n[1]); /* again */
    int count = 0;
    TB_LIST_FOREACH_SAFE (it, tmp, &b) {
        count++;
        tb_list_del(it);
    }
    assert_int_equal(count, 3);
    assert_true(tb_list_empty(&b));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_compare),
        cmocka_unit_test(test_integers),
        cmocka_unit_test(test_list),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
