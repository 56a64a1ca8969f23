/* Strict JSON reading: what is taken, what is refused, and what errors name. */
#include "wire/json.h"

#include <float.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "util/limits.h"
#include "util/mem.h"
#include "util/philox.h"

static int parse(struct tb_json_doc *d, const char *s, struct tb_error *e)
{
    return tb_json_parse(d, s, strlen(s), e);
}

static void assert_refused(const char *s, int code, const char *part)
{
    struct tb_json_doc d;
    struct tb_error e = {0};
    int rc = parse(&d, s, &e);
    if (rc != code || !strstr(e.msg, part)) fail_msg("%s: rc %d, \"%s\"", s, rc, e.msg);
    tb_json_free(&d);
}

static void test_malformed(void **state)
{
    (void)state;
    assert_refused("", TB_EPARSE, "empty");
    assert_refused("{", TB_EPARSE, "line 1");
    assert_refused("{\"a\":1}x", TB_EPARSE, "invalid JSON");
    assert_refused("{\"a\":NaN}", TB_EPARSE, "invalid JSON");
    assert_refused("{\"a\":Infinity}", TB_EPARSE, "invalid JSON");
    assert_refused("{\"a\":-Infinity}", TB_EPARSE, "invalid JSON");
    assert_refused("{\"a\":01}", TB_EPARSE, "invalid JSON");
    assert_refused("{\"a\":1,\"a\":2}", TB_EPARSE, "duplicate");
    assert_refused("{'a':1}", TB_EPARSE, "invalid JSON");
    assert_refused("{\"a\":\"\xff\"}", TB_EPARSE, "decode byte 0xff");
    assert_refused("\"text\"", TB_EPARSE, "invalid JSON");
    assert_refused("{\"p\":{\"seed\":9223372036854775808}}", TB_EPARSE,
                   "seed: 9223372036854775808 is out of the range of a 64-bit integer");
    assert_refused("{\"t\" : [ 1, 99999999999999999999, 3 ]}", TB_EPARSE,
                   "t: 99999999999999999999");
    assert_refused("{\"lr\":1e999}", TB_EPARSE, "lr: 1e999 is out of the range of a double");
}

static void test_bounds(void **state)
{
    (void)state;
    char deep[3 * TB_MAX_JSON_DEPTH + 8];
    for (int extra = 0; extra < 2; extra++) {
        size_t n = TB_MAX_JSON_DEPTH + (size_t)extra;
        memset(deep, '[', n);
        memset(deep + n, ']', n);
        struct tb_json_doc d;
        struct tb_error e = {0};
        assert_int_equal(tb_json_parse(&d, deep, 2 * n, &e), extra ? TB_ETOOBIG : 0);
        tb_json_free(&d);
    }
    size_t n = 2 * (TB_MAX_JSON_CONTAINERS + 2);
    char *many = tb_malloc(3 * n);
    size_t k = 0;
    many[k++] = '[';
    for (size_t i = 0; i < TB_MAX_JSON_CONTAINERS + 1; i++) {
        if (i) many[k++] = ',';
        many[k++] = '[';
        many[k++] = ']';
    }
    many[k++] = ']';
    struct tb_json_doc d;
    struct tb_error e = {0};
    assert_int_equal(tb_json_parse(&d, many, k, &e), TB_ETOOBIG);
    assert_non_null(strstr(e.msg, "1048576"));
    tb_free(many);
}

static void test_getters(void **state)
{
    (void)state;
    struct tb_json_doc d;
    struct tb_error e = {0};
    struct tb_arena a;
    tb_arena_init(&a);
    assert_int_equal(parse(&d,
                           "{\"i\":7,\"neg\":-3,\"big\":9223372036854775807,\"x\":1.5,\"n\":null,"
                           "\"s\":\"h\\u00e9\",\"nul\":\"a\\u0000b\",\"t\":true,"
                           "\"o\":{\"list\":[1,2,{\"k\":\"v\"}]},\"f\":[1,2.5,-3e0],\"e\":[]}",
                           &e),
                     0);
    const struct tb_json *r = &d.root;
    int64_t i = 42;
    double x = 0;
    bool t = false;
    const char *s = NULL;
    assert_int_equal(tb_json_int(r, "i", true, 0, 10, &i, &e), 0);
    assert_int_equal(i, 7);
    assert_int_equal(tb_json_int(r, "big", true, 0, INT64_MAX, &i, &e), 0);
    assert_true(i == INT64_MAX);
    i = 42;
    assert_int_equal(tb_json_int(r, "n", false, 0, 10, &i, &e), 0);
    assert_int_equal(i, 42); /* null keeps the default */
    assert_int_equal(tb_json_int(r, "gone", false, 0, 10, &i, &e), 0);
    assert_int_equal(i, 42);
    assert_int_equal(tb_json_int(r, "gone", true, 0, 10, &i, &e), TB_EINVAL);
    assert_string_equal(e.msg, "gone: required, but absent");
    assert_int_equal(tb_json_int(r, "n", true, 0, 10, &i, &e), TB_EINVAL);
    assert_int_equal(tb_json_int(r, "i", true, 8, 10, &i, &e), TB_EINVAL);
    assert_string_equal(e.msg, "i: 7 is not in 8..10");
    assert_int_equal(tb_json_int(r, "neg", true, 0, INT64_MAX, &i, &e), TB_EINVAL);
    assert_string_equal(e.msg, "neg: -3 is less than 0");
    assert_int_equal(tb_json_int(r, "x", true, 0, 10, &i, &e), TB_EINVAL);
    assert_string_equal(e.msg, "x: 1.5 is not an integer");
    assert_int_equal(tb_json_int(r, "s", true, 0, 10, &i, &e), TB_EINVAL);
    assert_string_equal(e.msg, "s: \"h\xc3\xa9\" is not an integer");
    assert_int_equal(tb_json_double(r, "i", true, 0, 10, &x, &e), 0);
    assert_true(x == 7);
    assert_int_equal(tb_json_double(r, "x", true, 0, 1, &x, &e), TB_EINVAL);
    assert_string_equal(e.msg, "x: 1.5 is not in 0..1");
    assert_int_equal(tb_json_bool(r, "t", true, &t, &e), 0);
    assert_true(t);
    assert_int_equal(tb_json_bool(r, "i", true, &t, &e), TB_EINVAL);
    assert_int_equal(tb_json_string(r, "s", true, &a, 10, &s, &e), 0);
    assert_string_equal(s, "h\xc3\xa9");
    assert_int_equal(tb_json_string(r, "s", true, &a, 2, &s, &e), TB_EINVAL);
    assert_int_equal(tb_json_string(r, "nul", true, &a, 10, &s, &e), TB_EINVAL);
    assert_string_equal(e.msg, "nul: string holds a NUL character");

    struct tb_json o, list, item, k;
    assert_int_equal(tb_json_object(r, "o", true, &o, &e), 0);
    assert_int_equal(tb_json_object(r, "f", true, &k, &e), TB_EINVAL);
    assert_string_equal(e.msg, "f: an array of 3 is not an object");
    assert_int_equal(tb_json_array(&o, "list", true, &list, &e), 0);
    assert_int_equal(tb_json_len(&list), 3);
    tb_json_at(&list, 2, &item);
    assert_int_equal(tb_json_int(&item, "k", true, 0, 1, &i, &e), TB_EINVAL);
    assert_string_equal(e.msg, "o.list[2].k: \"v\" is not an integer");
    tb_json_at(&list, 3, &item);
    assert_null(item.v);

    int32_t *i32;
    int64_t *i64;
    float *f;
    size_t n;
    assert_int_equal(tb_json_as_i32s(&list, &a, 0, 9, &i32, &n, &e), TB_EINVAL);
    assert_string_equal(e.msg, "o.list[2]: an object is not an integer");
    tb_json_find(r, "f", &k);
    assert_int_equal(tb_json_as_f32s(&k, &a, &f, &n, &e), 0);
    assert_int_equal(n, 3);
    assert_true(f[0] == 1 && f[1] == 2.5f && f[2] == -3);
    assert_int_equal(tb_json_as_i64s(&k, &a, &i64, &n, &e), TB_EINVAL);
    assert_string_equal(e.msg, "f[1]: 2.5 is not an integer");
    tb_json_find(r, "e", &k);
    assert_int_equal(tb_json_as_i32s(&k, &a, 0, 9, &i32, &n, &e), 0);
    assert_int_equal(n, 0);
    assert_non_null(i32);
    assert_int_equal(tb_json_as_text(&o, &a, 100, &s, &e), 0);
    assert_string_equal(s, "{\"list\":[1,2,{\"k\":\"v\"}]}");
    assert_int_equal(tb_json_as_text(&o, &a, 10, &s, &e), TB_EINVAL);
    void *it = NULL;
    int members = 0;
    while (tb_json_next(r, &it, &k))
        members++;
    assert_int_equal(members, 10); /* null is skipped */
    tb_json_free(&d);
    tb_arena_fini(&a);
}

static void test_float_range(void **state)
{
    (void)state;
    struct tb_json_doc d;
    struct tb_error e = {0};
    struct tb_arena a;
    struct tb_json k;
    float *f;
    size_t n;
    tb_arena_init(&a);
    assert_int_equal(parse(&d, "{\"w\":[1,1e39]}", &e), 0);
    tb_json_find(&d.root, "w", &k);
    assert_int_equal(tb_json_as_f32s(&k, &a, &f, &n, &e), TB_ENONFINITE);
    assert_string_equal(e.msg, "w[1]: 1e+39 is out of the range of a float32");
    tb_json_free(&d);
    tb_arena_fini(&a);
}

/* Every truncation and many mutations of a valid text are taken or refused, never worse. */
static void test_mutations(void **state)
{
    (void)state;
    static const char text[] = "{\"a\":[1,2.5,-3e-7,\"x\\u00e9\\n\"],\"seed\":9223372036854775807,"
                               "\"b\":{\"c\":null,\"d\":true}}";
    struct tb_error e;
    struct tb_json_doc d;
    for (size_t n = 0; n < sizeof(text) - 1; n++) {
        assert_int_equal(tb_json_parse(&d, text, n, &e), TB_EPARSE);
        tb_json_free(&d);
    }
    for (uint32_t i = 0; i < 20000; i++) {
        char m[sizeof(text)];
        memcpy(m, text, sizeof(text));
        uint32_t ctr[4] = {i, 0, 0, 0}, key[2] = {1, 2}, r[4];
        tb_philox4x32(ctr, key, r);
        m[r[0] % (sizeof(text) - 1)] = (char)r[1];
        m[r[2] % (sizeof(text) - 1)] = "0123456789eE.,:[]{}\"\\"[r[3] % 21];
        int rc = tb_json_parse(&d, m, sizeof(text) - 1, &e);
        assert_true(rc == 0 || rc == TB_EPARSE);
        tb_json_free(&d);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_malformed), cmocka_unit_test(test_bounds),
        cmocka_unit_test(test_getters),   cmocka_unit_test(test_float_range),
        cmocka_unit_test(test_mutations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
