/* Philox4x32-10 against the known-answer vectors of the Random123 distribution. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "util/mem.h"
#include "util/philox.h"

static void test_known_answers(void **state)
{
    static const struct {
        uint32_t ctr[4], key[2], out[4];
    } kat[] = {
        {{0}, {0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < TB_ARRAY_LEN(kat); i++) {
        uint32_t out[4];
        tb_philox4x32(kat[i].ctr, kat[i].key, out);
        assert_memory_equal(out, kat[i].out, sizeof(out));
    }
}

static void test_unit(void **state)
{
    assert_true(tb_philox_unit(0) == 0.0f);
    assert_true(tb_philox_unit(0xffffffff) < 1.0f);
    assert_true(tb_philox_unit(0x80000000) == 0.5f);
    double sum = 0;
    for (uint32_t i = 0; i < 10000; i++) {
        float u = tb_philox_draw(123, 4, i, 0);
        assert_true(u >= 0.0f && u < 1.0f);
        sum += (double)u;
    }
    assert_true(sum > 4900 && sum < 5100); /* sigma is 29; the draws are fixed */
    assert_true(tb_philox_draw(1, 2, 3, 4) == tb_philox_draw(1, 2, 3, 4));
    assert_true(tb_philox_draw(1, 2, 3, 4) != tb_philox_draw(1, 2, 3, 5));
    assert_true(tb_philox_draw(1, 2, 3, 4) != tb_philox_draw(1ull << 32 | 1, 2, 3, 4));
}

static void test_fnv(void **state)
{
    assert_true(tb_fnv1a("") == 0xcbf29ce484222325ull);
    assert_true(tb_fnv1a("a") == 0xaf63dc4c8601ec8cull);
    assert_true(tb_fnv1a("foobar") == 0x85944171f73967e8ull);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_known_answers),
        cmocka_unit_test(test_unit),
        cmocka_unit_test(test_fnv),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
