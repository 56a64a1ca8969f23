/* Arena: alignment, growth, own blocks, failing allocations, poisoning. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "util/arena.h"
#include "util/mem.h"

static void test_alignment_and_contents(void **state)
{
    struct tb_arena a;
    tb_arena_init(&a);
    unsigned char *p[400];
    for (size_t i = 0; i < 400; i++) {
        p[i] = tb_arena_alloc(&a, i);
        assert_non_null(p[i]);
        assert_int_equal((uintptr_t)p[i] % 16, 0);
        memset(p[i], (int)(i & 0xff), i);
    }
    for (size_t i = 0; i < 400; i++) {
        for (size_t k = 0; k < i; k++)
            assert_int_equal(p[i][k], i & 0xff);
    }
    tb_arena_fini(&a);
    assert_null(a.head);
    assert_int_equal(a.total, 0);
    assert_non_null(tb_arena_alloc(&a, 8)); /* may be used again */
    tb_arena_fini(&a);
    tb_arena_fini(&a);
}

static void test_big_request_keeps_the_block(void **state)
{
    struct tb_arena a;
    tb_arena_init(&a);
    char *small = tb_arena_alloc(&a, 16);
    size_t before = a.total;
    char *big = tb_arena_alloc(&a, 1 << 20);
    memset(big, 1, 1 << 20);
    assert_true(a.total >= before + (1 << 20));
    size_t with_big = a.total;
    char *next = tb_arena_alloc(&a, 16);
    assert_int_equal(a.total, with_big); /* still from the first block */
    assert_true(next > small && next < small + 4096);
    tb_arena_fini(&a);
}

static void test_strings(void **state)
{
    struct tb_arena a;
    tb_arena_init(&a);
    assert_string_equal(tb_arena_strdup(&a, "abc"), "abc");
    assert_string_equal(tb_arena_strndup(&a, "abcdef", 3), "abc");
    assert_string_equal(tb_arena_strndup(&a, NULL, 0), "");
    assert_string_equal(tb_arena_printf(&a, "%d-%s", 42, "x"), "42-x");
    char *z = tb_arena_calloc(&a, 100, 10);
    for (int i = 0; i < 1000; i++)
        assert_int_equal(z[i], 0);
    tb_arena_fini(&a);
}

static void test_failures(void **state)
{
    struct tb_arena a;
    tb_arena_init(&a);
    tb_mem_fail_after(1);
    assert_null(tb_arena_try_alloc(&a, 100));
    assert_int_equal(a.total, 0);
    assert_non_null(tb_arena_try_alloc(&a, 100)); /* the arena is intact */
    tb_mem_fail_after(1);
    assert_null(tb_arena_try_alloc(&a, 1 << 20));
    assert_null(tb_arena_try_array(&a, SIZE_MAX / 4, 8));
    assert_null(tb_arena_try_alloc(&a, SIZE_MAX));
    assert_null(tb_arena_try_alloc(&a, SIZE_MAX - 40));
    tb_mem_fail_after(0);
    assert_non_null(tb_arena_try_array(&a, 10, 8));
    tb_arena_fini(&a);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_alignment_and_contents),
        cmocka_unit_test(test_big_request_keeps_the_block),
        cmocka_unit_test(test_strings),
        cmocka_unit_test(test_failures),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
