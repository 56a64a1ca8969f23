/* Stop strings: matches across tokens, ties, limits, against a plain search of the whole text. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tokenizer/tokenizer.h"
#include "util/limits.h"
#include "util/mem.h"
#include "util/philox.h"

static const char TINY[] =
    "{\"added_tokens\":[{\"id\":4,\"content\":\"<end>\",\"special\":true}],"
    "\"decoder\":{\"type\":\"ByteLevel\"},\"model\":{\"type\":\"BPE\","
    "\"vocab\":{\"ab\":0,\"c\":1,\"\\u0120d\":2,\"\\u010a\":3},\"merges\":[]}}";

static struct tb_tokenizer *tiny(void)
{
    struct tb_tokenizer *t;
    struct tb_error e;
    assert_int_equal(tb_tokenizer_create_from_json("tiny", TB_SPAN_LIT(TINY), &t, &e), 0);
    return t;
}

static void test_across_tokens(void **state)
{
    struct tb_tokenizer *t = tiny();
    struct tb_span stops[] = {TB_SPAN_LIT("c d"), TB_SPAN_LIT("bc\nX"), TB_SPAN_LIT("<end>")};
    struct tb_stop_set *set;
    struct tb_stop_matcher m;
    assert_int_equal(tb_stop_set_create(t, stops, 3, &set, NULL), 0);
    assert_int_equal(tb_stop_set_count(set), 3);

    tb_stop_matcher_init(&m, set);
    assert_false(tb_stop_matcher_feed(&m, 0)); /* "ab" */
    assert_false(tb_stop_matcher_feed(&m, 1)); /* "abc" */
    assert_true(tb_stop_matcher_feed(&m, 2));  /* "abc d" */
    assert_int_equal(m.hit, 0);
    assert_int_equal(m.hit_at, 2);
    assert_true(tb_stop_matcher_feed(&m, 0)); /* stays found */
    assert_int_equal(m.hit_at, 2);
    tb_stop_matcher_fini(&m);

    tb_stop_matcher_init(&m, set);
    assert_false(tb_stop_matcher_feed(&m, 0));
    assert_false(tb_stop_matcher_feed(&m, 77)); /* an unknown id has no bytes */
    assert_false(tb_stop_matcher_feed(&m, -1));
    assert_true(tb_stop_matcher_feed(&m, 4)); /* special tokens are rendered */
    assert_int_equal(m.hit, 2);
    assert_int_equal(m.hit_at, 2);
    tb_stop_matcher_fini(&m);

    tb_stop_set_destroy(set);
    tb_tokenizer_destroy(t);
}

static void test_inside_one_token_and_ties(void **state)
{
    struct tb_tokenizer *t = tiny();
    struct tb_span stops[] = {TB_SPAN_LIT("b"), TB_SPAN_LIT("ab"), TB_SPAN_LIT("abcd")};
    struct tb_stop_set *set;
    struct tb_stop_matcher m;
    assert_int_equal(tb_stop_set_create(t, stops, 3, &set, NULL), 0);
    tb_stop_matcher_init(&m, set);
    assert_true(tb_stop_matcher_feed_bytes(&m, "xxabcd", 6));
    assert_int_equal(m.hit, 1); /* ends first; of the two that end there, the longer */
    assert_int_equal(m.hit_at, 2);
    tb_stop_matcher_fini(&m);
    tb_stop_set_destroy(set);
    tb_tokenizer_destroy(t);
}

/* Random texts over two letters, cut into random pieces, against strstr on the whole. */
static void test_against_plain_search(void **state)
{
    struct tb_tokenizer *t = tiny();
    for (uint32_t round = 0; round < 3000; round++) {
        char text[65], needles[3][9];
        struct tb_span stops[3];
        uint32_t draw = 0;
        for (int i = 0; i < 64; i++)
            text[i] = tb_philox_draw(1, round, draw++, 0) < 0.5f ? 'a' : 'b';
        text[64] = '\0';
        for (int k = 0; k < 3; k++) {
            int n = 2 + (int)(tb_philox_draw(1, round, draw++, 0) * 7.0f);
            for (int i = 0; i < n; i++)
                needles[k][i] = tb_philox_draw(1, round, draw++, 0) < 0.5f ? 'a' : 'b';
            needles[k][n] = '\0';
            stops[k] = tb_span_str(needles[k]);
        }
        size_t end = SIZE_MAX, begin = SIZE_MAX;
        for (int k = 0; k < 3; k++) {
            const char *p = strstr(text, needles[k]);
            size_t b = p ? (size_t)(p - text) : 0, e = b + stops[k].n;
            if (!p) continue;
            if (e < end || (e == end && b < begin)) {
                end = e;
                begin = b;
            }
        }
        struct tb_stop_set *set;
        struct tb_stop_matcher m;
        assert_int_equal(tb_stop_set_create(t, stops, 3, &set, NULL), 0);
        tb_stop_matcher_init(&m, set);
        bool hit = false;
        size_t at = 0;
        while (at < 64 && !hit) {
            size_t n = 1 + (size_t)(tb_philox_draw(1, round, draw++, 0) * 5.0f);
            n = TB_MIN(n, 64 - at);
            hit = tb_stop_matcher_feed_bytes(&m, text + at, n);
            at += n;
            assert_int_equal(hit, end <= at);
        }
        assert_int_equal(hit, end != SIZE_MAX);
        if (hit) assert_int_equal(m.hit_at, begin);
        tb_stop_matcher_fini(&m);
        tb_stop_set_destroy(set);
    }
    tb_tokenizer_destroy(t);
}

static void test_refusals(void **state)
{
    struct tb_tokenizer *t = tiny();
    struct tb_stop_set *set;
    struct tb_error e;
    struct tb_span one = TB_SPAN_LIT("x"), empty = TB_SPAN_LIT("");
    assert_int_equal(tb_stop_set_create(NULL, &one, 1, &set, &e), TB_EINVAL);
    assert_null(set);
    assert_non_null(strstr(e.msg, "tokenizer.json"));
    assert_int_equal(tb_stop_set_create(t, &empty, 1, &set, &e), TB_EINVAL);
    assert_non_null(strstr(e.msg, "empty"));

    struct tb_span many[TB_MAX_STOPS + 1];
    for (size_t i = 0; i < TB_ARRAY_LEN(many); i++)
        many[i] = one;
    assert_int_equal(tb_stop_set_create(t, many, TB_MAX_STOPS + 1, &set, &e), TB_EINVAL);
    assert_int_equal(tb_stop_set_create(t, many, TB_MAX_STOPS, &set, &e), 0);
    tb_stop_set_destroy(set);

    char *big = tb_malloc(TB_MAX_STOP_BYTES + 1);
    memset(big, 'x', TB_MAX_STOP_BYTES + 1);
    struct tb_span s = {big, TB_MAX_STOP_BYTES + 1};
    assert_int_equal(tb_stop_set_create(t, &s, 1, &set, &e), TB_EINVAL);
    s.n--;
    assert_int_equal(tb_stop_set_create(t, &s, 1, &set, &e), 0);
    tb_stop_set_destroy(set);

    tb_mem_fail_after(1);
    assert_int_equal(tb_stop_set_create(t, &s, 1, &set, &e), TB_ENOMEM);
    tb_mem_fail_after(0);
    tb_free(big);

    /* no stops need no tokenizer, and a matcher without a set finds nothing */
    struct tb_stop_matcher m;
    assert_int_equal(tb_stop_set_create(NULL, NULL, 0, &set, &e), 0);
    tb_stop_matcher_init(&m, set);
    assert_false(tb_stop_matcher_feed(&m, 0));
    tb_stop_matcher_fini(&m);
    tb_stop_set_destroy(set);
    tb_stop_matcher_init(&m, NULL);
    assert_false(tb_stop_matcher_feed(&m, 0));
    tb_stop_matcher_fini(&m);
    tb_stop_set_destroy(NULL);
    tb_tokenizer_destroy(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_across_tokens),
        cmocka_unit_test(test_inside_one_token_and_ties),
        cmocka_unit_test(test_against_plain_search),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests_name("tokenizer stop", tests, NULL, NULL);
}
