/* The JSON writer: form, escaping, and that floats read back to the same bits. */
#include "wire/json_out.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "util/philox.h"

static void test_form(void **state)
{
    (void)state;
    struct tb_buf b;
    struct tb_json_out j;
    tb_buf_init(&b, 4096);
    tb_jout_init(&j, &b);
    tb_jout_object(&j, NULL);
    tb_jout_str(&j, "s", "a\"b\\c\n\x01\x7f");
    tb_jout_str(&j, "none", NULL);
    tb_jout_array(&j, "list");
    tb_jout_int(&j, NULL, INT64_MIN);
    tb_jout_int(&j, NULL, 0);
    tb_jout_object(&j, NULL);
    tb_jout_object_end(&j);
    tb_jout_array(&j, NULL);
    tb_jout_array_end(&j);
    tb_jout_bool(&j, NULL, true);
    tb_jout_array_end(&j);
    tb_jout_double(&j, "d", 0.1);
    tb_jout_double(&j, "one", 1);
    tb_jout_double(&j, "nan", NAN);
    tb_jout_f32(&j, "inf", -INFINITY);
    tb_jout_raw(&j, "raw", "{\"k\":1}");
    tb_jout_i32s(&j, "i", (const int32_t[]){1, -2, INT32_MIN}, 3);
    tb_jout_i64s(&j, "l", (const int64_t[]){INT64_MAX}, 1);
    tb_jout_f32s(&j, "f", (const float[]){0, -0.5f, NAN, 100, 1e30f}, 5);
    tb_jout_f32s(&j, "e", NULL, 0);
    tb_jout_object_end(&j);
    assert_false(b.failed);
    assert_string_equal(b.p,
                        "{\"s\":\"a\\\"b\\\\c\\n\\u0001\x7f\",\"none\":null,"
                        "\"list\":[-9223372036854775808,0,{},[],true],"
                        "\"d\":0.10000000000000001,\"one\":1.0,\"nan\":null,\"inf\":null,"
                        "\"raw\":{\"k\":1},\"i\":[1,-2,-2147483648],\"l\":[9223372036854775807],"
                        "\"f\":[0.0,-0.5,null,100.0,1.00000002e+30],\"e\":[]}");
    tb_buf_fini(&b);
}

static void test_utf8(void **state)
{
    (void)state;
    static const struct {
        const char *in, *out;
    } cases[] = {
        {"h\xc3\xa9", "\"h\xc3\xa9\""},
        {"\xf0\x9f\x98\x80", "\"\xf0\x9f\x98\x80\""},
        {"\xff", "\"\xef\xbf\xbd\""},
        {"a\xc3", "\"a\xef\xbf\xbd\""},
        {"\xc0\xaf", "\"\xef\xbf\xbd\xef\xbf\xbd\""},                 /* overlong */
        {"\xed\xa0\x80", "\"\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\""}, /* surrogate */
        {"\xf4\x90\x80\x80", "\"\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\""},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct tb_buf b;
        struct tb_json_out j;
        tb_buf_init(&b, 4096);
        tb_jout_init(&j, &b);
        tb_jout_str(&j, NULL, cases[i].in);
        assert_string_equal(b.p, cases[i].out);
        tb_buf_fini(&b);
    }
}

static void assert_round_trip(float f)
{
    struct tb_buf b;
    struct tb_json_out j;
    tb_buf_init(&b, 256);
    tb_jout_init(&j, &b);
    tb_jout_f32(&j, NULL, f);
    float back = strtof(b.p, NULL);
    if (memcmp(&back, &f, sizeof(f)) != 0 && !(f == 0 && back == 0))
        fail_msg("%a was written %s", (double)f, b.p);
    tb_buf_fini(&b);
}

static void test_float_round_trip(void **state)
{
    (void)state;
    static const float edges[] = {0,           1,           -1,         9.9999999f,  99999.99f,
                                  1e-5f,       9.99e-6f,    1e8f,       99999992.0f, 0.1f,
                                  0.99999994f, 1.00000012f, 1e-38f,     1e-45f,      3.4e38f,
                                  -99999.0f,   0.001f,      12345678.0f};
    for (size_t i = 0; i < sizeof(edges) / sizeof(edges[0]); i++)
        assert_round_trip(edges[i]);
    for (uint32_t i = 0; i < 200000; i++) {
        uint32_t ctr[4] = {i, 0, 0, 0}, key[2] = {3, 4}, r[4];
        tb_philox4x32(ctr, key, r);
        float f;
        memcpy(&f, &r[0], sizeof(f));
        if (isfinite(f)) assert_round_trip(f);
        assert_round_trip(-20.0f * tb_philox_unit(r[1]));
        assert_round_trip(ldexpf(tb_philox_unit(r[2]) + 0.5f, (int)(r[3] % 50) - 20));
    }
}

static void test_bounded(void **state)
{
    (void)state;
    struct tb_buf b;
    struct tb_json_out j;
    tb_buf_init(&b, 16);
    tb_jout_init(&j, &b);
    tb_jout_str(&j, NULL, "much more than sixteen bytes");
    assert_true(b.failed);
    tb_buf_fini(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_form),
        cmocka_unit_test(test_utf8),
        cmocka_unit_test(test_float_round_trip),
        cmocka_unit_test(test_bounded),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
