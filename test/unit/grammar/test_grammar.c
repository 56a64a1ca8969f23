/*
 * Grammars: texts that a schema takes and refuses, masks against every token tried one by one,
 * random texts made from masks (which must parse, match and end in time), and refusals.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <jansson.h>

#include "grammar/rules.h"
#include "util/buf.h"
#include "util/philox.h"

static struct tb_tokenizer *tok;
static struct tb_vocab *vocab;

static int setup(void **state)
{
    struct tb_error e;
    if (tb_tokenizer_create(TB_DEMO_MODEL, &tok, &e)) fail_msg("%s", e.msg);
    if (tb_vocab_create(tok, tb_tokenizer_vocab_size(tok) + 3, &vocab, &e)) fail_msg("%s", e.msg);
    return 0;
}

static int teardown(void **state)
{
    tb_vocab_unref(vocab);
    tb_tokenizer_destroy(tok);
    return 0;
}

static struct tb_grammar *make(const char *schema)
{
    struct tb_grammar *g;
    struct tb_error e;
    int rc = schema ? tb_grammar_create_schema(vocab, tb_span_str(schema), &g, &e)
                    : tb_grammar_create_json(vocab, &g, &e);
    if (rc) fail_msg("%s: %s", schema ? schema : "json", e.msg);
    return g;
}

static bool matches(struct tb_grammar *g, const char *text)
{
    uint32_t s = tb_grammar_feed(g, tb_grammar_start(g), tb_span_str(text));
    return s && tb_grammar_complete(g, s);
}

struct text {
    const char *schema, *yes[12], *no[14];
};

static const struct text TEXTS[] = {
    {NULL,
     {"{}", "{\"a\":1}", "{ \"a\": [1, 2.5e3, -0, true, null, \"\\u00e9\\n\"] }",
      "{\n  \"a\": {\n    \"b\": \"\xc3\xa9\xf0\x9f\x99\x82\"\n  }\n}", "{\"\\ud83d\\ude42\":{}}"},
     {"[]", "{\"a\"}", "{\"a\":01}", "{\"a\":1,}", "{'a':1}", "{\"a\":\"\n\"}", "{\"a\":\"\xff\"}",
      "{\"\\ud83d\":1}", "{\"a\":+1}", "{\"a\":.5}", "{\"a\":\"\xed\xa0\x80\"}", "{} ", ""}},
    {"{\"type\":\"object\",\"properties\":{\"n\":{\"type\":\"string\",\"minLength\":1,\"maxLength\":"
     "3},\"k\":{\"type\":\"integer\",\"minimum\":0},\"o\":{\"anyOf\":[{\"type\":\"string\"},{"
     "\"type\":\"null\"}]}},\"required\":[\"n\"]}",
     {"{\"n\":\"abc\"}", "{\"n\":\"\xc3\xa9\xc3\xa9\xc3\xa9\"}", "{\"n\":\"a\", \"k\":0}",
      "{\"n\":\"a\",\"k\":12,\"o\":null}", "{\"n\":\"a\",\"o\":\"\"}",
      "{\"n\":\"\\u00e9\\n\\\"\"}"},
     {"{}", "{\"n\":\"\"}", "{\"n\":\"abcd\"}", "{\"k\":1}", "{\"k\":1,\"n\":\"a\"}",
      "{\"n\":\"a\",\"k\":-1}", "{\"n\":\"a\",\"x\":1}", "{\"n\":\"a\",\"o\":1}",
      "{\"n\":\"a\",\"n\":\"a\"}"}},
    {"{\"type\":\"object\",\"additionalProperties\":{\"type\":\"string\"}}",
     {"{}", "{\"a\":\"b\",\"c\":\"d\"}"},
     {"{\"a\":1}", "[]"}},
    {"{\"type\":\"object\",\"properties\":{\"ab\":{\"type\":\"integer\"},\"ac\":{\"const\":1}},"
     "\"additionalProperties\":{\"type\":\"boolean\"}}",
     {"{}", "{\"ab\":1}", "{\"ab\":1,\"ac\":1,\"ad\":true}", "{\"a\":true}", "{\"abc\":false}",
      "{\"x\":true,\"y\":false}"},
     {"{\"ab\":true}", "{\"ac\":true}", "{\"ad\":1}", "{\"x\":true,\"ab\":1}"}},
    {"{\"type\":\"array\",\"items\":{\"enum\":[\"a\",1,null,{\"b\":[]}]},\"minItems\":1,"
     "\"maxItems\":3}",
     {"[\"a\"]", "[1, null]", "[{\"b\":[]},1,1]"},
     {"[]", "[1,1,1,1]", "[2]", "[\"a\""}},
    {"{\"prefixItems\":[{\"type\":\"integer\"},{\"type\":\"string\"}],\"items\":false}",
     {"[1,\"a\"]"},
     {"[1]", "[1,\"a\",2]", "[\"a\",1]", "[]"}},
    {"{\"type\":\"integer\",\"minimum\":-12,\"exclusiveMaximum\":105}",
     {"-12", "-9", "-1", "0", "7", "10", "99", "100", "104"},
     {"-13", "105", "-0", "1.0", "007", "1000", "-100", "999", "1e1"}},
    {"{\"type\":\"number\",\"minimum\":0,\"maximum\":10}",
     {"0", "0.5", "9.99", "10", "3"},
     {"-1", "10.5", "11", "-0.5", "1e2"}},
    {"{\"type\":\"number\",\"exclusiveMinimum\":-2.5,\"maximum\":-1}",
     {"-2", "-1.75", "-1"},
     {"-2.5", "-0.5", "0", "-3", "-2.25"}},
    {"{\"type\":\"number\",\"minimum\":0,\"exclusiveMaximum\":1}",
     {"0", "0.5", "0.0", "0.999"},
     {"1", "1.0", "-0.5", "-0.0", "2"}},
    {"{\"type\":\"number\",\"exclusiveMinimum\":0}",
     {"0.5", "0.01", "1", "12.75", "1.0"},
     {"0", "0.0", "0.00", "-1", "-0.5"}},
    {"{\"type\":\"number\",\"minimum\":-1,\"exclusiveMaximum\":0}",
     {"-1", "-0.5", "-0.01"},
     {"0", "-0.0", "-1.5", "0.5", "-2"}},
    {"{\"type\":[\"string\",\"number\"],\"enum\":[\"a\",null,1.5,2,true]}",
     {"\"a\"", "1.5", "2"},
     {"null", "true", "\"b\""}},
    {"{\"enum\":[\"\",\"ab\",\"\u00e9\u00e9\u00e9\",1,5,9,[1],[1,2],null],\"minLength\":2,\"maxLength\":3,"
     "\"minimum\":1,\"exclusiveMinimum\":1,\"maximum\":9,\"exclusiveMaximum\":9,\"minItems\":2}",
     {"\"ab\"", "\"\u00e9\u00e9\u00e9\"", "5", "[1,2]", "null"},
     {"\"\"", "1", "9", "[1]"}},
    {"{\"enum\":[1,2],\"pattern\":\"x\",\"items\":{},\"required\":[\"a\"]}", {"1", "2"}, {"3"}},
    {"{\"type\":\"string\",\"oneOf\":[{\"const\":\"a\",\"title\":\"A\"},{\"const\":\"b\"}]}",
     {"\"a\"", "\"b\""},
     {"\"c\"", "\"\""}},
    {"{\"$defs\":{\"a/b~ c\":{\"properties\":{\"\":{\"type\":\"null\"}},\"required\":[\"\"]}},"
     "\"type\":\"object\",\"allOf\":[{\"$ref\":\"#/$defs/a~1b~0 c\"}]}",
     {"{\"\":null}"},
     {"{}", "null"}},
    {"{\"type\":[\"boolean\",\"null\"]}", {"true", "false", "null"}, {"0", "nul", "\"true\""}},
    {"{\"$defs\":{\"t\":{\"type\":\"object\",\"properties\":{\"v\":{\"type\":\"integer\"},"
     "\"c\":{\"type\":\"array\",\"items\":{\"$ref\":\"#/$defs/t\"}}},\"required\":[\"v\",\"c\"]}},"
     "\"$ref\":\"#/$defs/t\"}",
     {"{\"v\":1,\"c\":[]}", "{\"v\":1,\"c\":[{\"v\":2,\"c\":[{\"v\":3,\"c\":[]}]}]}"},
     {"{\"v\":1}", "{\"v\":1,\"c\":[{}]}"}},
    {"{\"oneOf\":[{\"type\":\"object\",\"properties\":{\"k\":{\"const\":\"a\"},\"x\":{\"type\":"
     "\"integer\"}},\"required\":[\"k\"]},{\"type\":\"object\",\"properties\":{\"k\":{\"const\":"
     "\"b\"}},\"required\":[\"k\"]}]}",
     {"{\"k\":\"a\"}", "{\"k\":\"a\",\"x\":1}", "{\"k\":\"b\"}"},
     {"{\"k\":\"c\"}", "{\"k\":\"b\",\"x\":1}"}},
    {"{\"type\":\"string\",\"pattern\":\"^(ab|[x-z\\\\d]{2,3}|\\\\\\\"q.)$\"}",
     {"\"ab\"", "\"x1\"", "\"9zz\"", "\"\\\"qK\"", "\"\\\"q\xc3\xa9\""},
     {"\"a\"", "\"x\"", "\"xxxx\"", "\"abx1\"", "\"\\\"q\"", "\"\""}},
    {"{\"type\":\"string\",\"pattern\":\"b+\"}",
     {"\"b\"", "\"abbc\"", "\"\\nb\""},
     {"\"\"", "\"a\""}},
    {"{\"type\":\"string\",\"pattern\":\"^[^a\\\\s]$\"}",
     {"\"b\"", "\"\xe2\x82\xac\"", "\"\\\\\"", "\"\\\"\""},
     {"\"a\"", "\" \"", "\"\\n\"", "\"bb\"", "\"\\\""}},
    {"{\"type\":\"string\",\"format\":\"date\"}",
     {"\"2026-02-28\"", "\"2024-12-31\"", "\"1999-04-30\""},
     {"\"2026-02-30\"", "\"2026-04-31\"", "\"2026-13-01\"", "\"2026-00-10\"", "\"26-01-01\""}},
    {"{\"format\":\"ipv4\"}",
     {"\"0.0.0.0\"", "\"255.249.199.10\""},
     {"\"256.0.0.1\"", "\"1.2.3\"", "\"01.2.3.4\""}},
};

static void test_texts(void **state)
{
    for (size_t i = 0; i < TB_ARRAY_LEN(TEXTS); i++) {
        struct tb_grammar *g = make(TEXTS[i].schema);
        for (const char *const *p = TEXTS[i].yes; *p; p++)
            if (!matches(g, *p)) fail_msg("%s: refuses %s", TEXTS[i].schema, *p);
        for (const char *const *p = TEXTS[i].no; *p; p++)
            if (matches(g, *p)) fail_msg("%s: takes %s", TEXTS[i].schema, *p);
        tb_grammar_unref(g);
    }
}

static bool allowed(const uint64_t *mask, int32_t id)
{
    return mask[id / 64] >> id % 64 & 1;
}

/* A mask made and kept, with room for every token, and one with little room. */
static void expect_masks(const char *schema, const char *prefix)
{
    struct tb_grammar *g = make(schema);
    uint32_t s = tb_grammar_feed(g, tb_grammar_start(g), tb_span_str(prefix));
    assert_int_not_equal(s, 0);
    for (int again = 0; again < 2; again++) {
        const uint64_t *mask = tb_grammar_mask(g, s, 1000);
        assert_non_null(mask);
        for (int32_t id = 0; id < tb_vocab_size(vocab); id++)
            if (allowed(mask, id) != (tb_grammar_accept(g, s, id) != 0))
                fail_msg("after \"%s\", token %d", prefix, id);
    }
    for (uint32_t left = 1; left < 30; left++) {
        const uint64_t *mask = tb_grammar_mask(g, s, left);
        for (int32_t id = 0; id < tb_vocab_size(vocab); id++) {
            uint32_t to = tb_grammar_accept(g, s, id);
            if (allowed(mask, id) != (to && g->states[to].rest < left))
                fail_msg("after \"%s\", token %d, %u left", prefix, id, left);
        }
    }
    tb_grammar_unref(g);
}

static void test_mask_is_each_token(void **state)
{
    static const char *const members[] = {"",
                                          "{",
                                          "{\"n",
                                          "{\"n\": \"a",
                                          "{\"n\":\"\xc3",
                                          "{\"n\":\"abc",
                                          "{\"n\":\"a\", \"k\":1",
                                          "{\"n\":\"a\"}"},
                             *const any[] = {"{\"", "{\"a\":\"b", "{\"a\":\"\\",
                                             "{\"a\":\"\xe2\x82", "{\"a\":[[-"},
                             *const strings[] = {"\"", "\"abcdefghijkl", "\"abcdefghijklmnopqrs"};
    for (size_t i = 0; i < TB_ARRAY_LEN(members); i++)
        expect_masks(TEXTS[1].schema, members[i]);
    for (size_t i = 0; i < TB_ARRAY_LEN(any); i++)
        expect_masks(NULL, any[i]);
    for (size_t i = 0; i < TB_ARRAY_LEN(strings); i++)
        expect_masks("{\"type\":\"string\",\"minLength\":3,\"maxLength\":20}", strings[i]);
    expect_masks("{\"type\":\"string\",\"pattern\":\"^[^aeiou]{1,9}$\"}", "\"x");
    expect_masks("{\"anyOf\":[{\"type\":\"string\"},{\"enum\":[\"the\"]}]}", "\"t");
    struct tb_grammar *g = make(TEXTS[1].schema);
    assert_true(
        tb_grammar_final(g, tb_grammar_feed(g, tb_grammar_start(g), tb_span_str("{\"n\":\"a\"}"))));
    tb_grammar_unref(g);
}

static uint32_t next_random(uint32_t *n)
{
    return (uint32_t)(tb_philox_draw(7, (*n)++, 0, 0) * 16777216.0f);
}

/* A text of at most `budget` tokens, each drawn evenly from the mask. */
static void draw_text(struct tb_grammar *g, uint32_t *rng, uint32_t budget, struct tb_buf *out)
{
    uint32_t s = tb_grammar_start(g);
    for (uint32_t left = budget; left > 0 && !tb_grammar_final(g, s); left--) {
        const uint64_t *mask = tb_grammar_mask(g, s, left);
        int32_t n = 0, pick = -1;
        assert_non_null(mask);
        for (int32_t id = 0; id < tb_vocab_size(vocab); id++)
            if (allowed(mask, id) && next_random(rng) % (uint32_t)++n == 0) pick = id;
        if (pick < 0) {
            if (!tb_grammar_complete(g, s)) fail_msg("stuck after %s", out->p);
            return;
        }
        struct tb_span bytes;
        assert_int_equal(tb_tokenizer_token_bytes(tok, pick, &bytes), 0);
        tb_buf_append(out, bytes.p, bytes.n);
        s = tb_grammar_accept(g, s, pick);
        assert_int_not_equal(s, 0);
    }
    if (!tb_grammar_complete(g, s)) fail_msg("%u tokens did not suffice: %s", budget, out->p);
}

static void test_random_texts_end_in_time(void **state)
{
    uint32_t rng = 1;
    for (size_t i = 0; i < TB_ARRAY_LEN(TEXTS); i++) {
        struct tb_grammar *g = make(TEXTS[i].schema);
        for (int k = 0; k < 20; k++) {
            uint32_t budget = tb_grammar_shortest(g) + next_random(&rng) % 80;
            struct tb_buf text;
            json_error_t je;
            tb_buf_init(&text, 1 << 20);
            tb_buf_puts(&text, "");
            draw_text(g, &rng, budget, &text);
            if (!matches(g, text.p)) fail_msg("%s does not match", text.p);
            json_t *v = json_loads(text.p, JSON_DECODE_ANY | JSON_ALLOW_NUL, &je);
            if (!v) fail_msg("%s: %s", text.p, je.text);
            json_decref(v);
            tb_buf_fini(&text);
        }
        tb_grammar_unref(g);
    }
}

static void test_nesting_ends(void **state)
{
    struct tb_grammar *g = make(NULL);
    uint32_t s = tb_grammar_feed(g, tb_grammar_start(g), tb_span_str("{\"a\":"));
    int depth = 0;
    for (; depth < 5000; depth++) {
        uint32_t to = tb_grammar_feed(g, s, tb_span_str("["));
        if (!to) break;
        s = to;
    }
    assert_in_range(depth, 50, 500);
    for (int i = 0; i < depth; i++)
        s = tb_grammar_feed(g, s, tb_span_str("]"));
    s = tb_grammar_feed(g, s, tb_span_str("}"));
    assert_true(tb_grammar_final(g, s));
    tb_grammar_unref(g);
}

static void test_refused(void **state)
{
    static const struct {
        const char *schema, *says;
        int code;
    } bad[] = {
        {"{", "", TB_EPARSE},
        {"[]", "schema", TB_EINVAL},
        {"{\"type\":\"thing\"}", "thing", TB_EINVAL},
        {"{\"not\":{}}", "not cannot", TB_EUNSUPPORTED},
        {"{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"number\",\"multipleOf\":2}}}",
         "properties.a: multipleOf", TB_EUNSUPPORTED},
        {"{\"type\":\"string\",\"pattern\":\"(?=a)\"}", "pattern", TB_EUNSUPPORTED},
        {"{\"type\":\"string\",\"pattern\":\"a(b\"}", "not closed", TB_EUNSUPPORTED},
        {"{\"type\":\"string\",\"pattern\":\"^a|b$\"}", "group", TB_EUNSUPPORTED},
        {"{\"type\":\"string\",\"format\":\"hostname\"}", "hostname", TB_EUNSUPPORTED},
        {"{\"type\":\"string\",\"minLength\":3,\"maxLength\":2}", "minLength 3", TB_EINVAL},
        {"{\"type\":\"array\",\"uniqueItems\":true}", "uniqueItems", TB_EUNSUPPORTED},
        {"{\"$ref\":\"#/$defs/x\"}", "#/$defs/x", TB_EINVAL},
        {"{\"$ref\":\"#\"}", "", TB_EINVAL},
        {"{\"$ref\":\"http://x/y\"}", "http://x/y", TB_EINVAL},
        {"{\"type\":\"object\",\"properties\":{\"a\":{\"$ref\":\"#\"}},\"required\":[\"a\"]}",
         "no finite text", TB_EINVAL},
        {"{\"anyOf\":[{\"type\":\"string\"}],\"minimum\":1}", "anyOf beside minimum",
         TB_EUNSUPPORTED},
        {"{\"oneOf\":[{\"type\":\"integer\"},{\"type\":\"number\"}]}", "oneOf", TB_EUNSUPPORTED},
        {"{\"allOf\":[{\"type\":\"string\"},{\"type\":\"string\"}]}", "allOf", TB_EUNSUPPORTED},
        {"{\"type\":\"integer\",\"minimum\":5,\"maximum\":4}", "no whole number", TB_EUNSUPPORTED},
        {"{\"enum\":[]}", "enum", TB_EINVAL},
        {"{\"type\":\"string\",\"anyOf\":[{\"type\":\"string\"},{\"type\":\"null\"}]}",
         "type beside anyOf", TB_EUNSUPPORTED},
        {"{\"oneOf\":[{\"const\":1},{\"const\":1}]}", "oneOf", TB_EUNSUPPORTED},
        {"{\"type\":\"string\",\"const\":1}", "const", TB_EINVAL},
        {"{\"enum\":[\"a\",\"bc\"],\"minLength\":3}", "enum: holds no value", TB_EINVAL},
        {"{\"const\":5,\"maximum\":4}", "const: holds no value", TB_EINVAL},
        {"{\"enum\":[1,\"a\"],\"pattern\":\"a\"}", "pattern beside", TB_EUNSUPPORTED},
        {"{\"const\":{\"a\":1},\"required\":[\"b\"]}", "required beside", TB_EUNSUPPORTED},
        {"{\"const\":[1],\"items\":{\"type\":\"string\"}}", "items beside", TB_EUNSUPPORTED},
        {"{\"enum\":[\"a\"],\"minLength\":\"x\"}", "minLength", TB_EINVAL},
        {"{\"uniqueItems\":true}", "uniqueItems", TB_EUNSUPPORTED},
        {"{\"anyOf\":[{\"type\":\"array\"}],\"minItems\":1}", "anyOf beside minItems",
         TB_EUNSUPPORTED},
    };
    for (size_t i = 0; i < TB_ARRAY_LEN(bad); i++) {
        struct tb_grammar *g = NULL;
        struct tb_error e = {0};
        int rc = tb_grammar_create_schema(vocab, tb_span_str(bad[i].schema), &g, &e);
        if (rc != bad[i].code || !strstr(e.msg, bad[i].says))
            fail_msg("%s: %d \"%s\"", bad[i].schema, rc, e.msg);
    }
}

/* What would take a stack, or hours, is refused. */
static void refused(struct tb_buf *schema, const char *says)
{
    struct tb_grammar *g = NULL;
    struct tb_error e = {0};
    int rc = tb_grammar_create_schema(vocab, (struct tb_span){schema->p, schema->n}, &g, &e);
    if (rc != TB_ETOOBIG || !strstr(e.msg, says)) fail_msg("%s: %d \"%s\"", says, rc, e.msg);
    tb_buf_fini(schema);
}

static void test_limits(void **state)
{
    struct tb_buf b;
    tb_buf_init(&b, 1 << 20);
    tb_buf_puts(&b, "{\"$defs\":{");
    for (int i = 0; i < 20000; i++)
        tb_buf_printf(&b, "\"%d\":{\"$ref\":\"#/$defs/%d\"},", i, i + 1);
    tb_buf_puts(&b, "\"20000\":{\"type\":\"null\"}},\"$ref\":\"#/$defs/0\"}");
    refused(&b, "nested deeper");

    tb_buf_init(&b, 1 << 20);
    tb_buf_puts(&b, "{\"properties\":{\"");
    for (int i = 0; i < 500000; i++)
        tb_buf_puts(&b, "k");
    tb_buf_puts(&b, "\":true},\"additionalProperties\":true}");
    refused(&b, "500000 bytes");

    tb_buf_init(&b, 1 << 20);
    tb_buf_puts(&b, "{\"properties\":{\"\":true");
    for (int i = 0; i < 1024; i++)
        tb_buf_printf(&b, ",\"%d\":true", i);
    tb_buf_puts(&b, "}}");
    refused(&b, "1025 properties");

    struct tb_grammar *g = make("{\"type\":\"string\",\"pattern\":\"^((a?){1,10000}){1,10000}$\"}");
    assert_int_equal(tb_grammar_feed(g, tb_grammar_start(g), tb_span_str("\"")), 0);
    assert_null(tb_grammar_mask(g, tb_grammar_start(g), 10));
    assert_true(tb_grammar_too_complex(g));
    tb_grammar_unref(g);
}

/* Values by the thousand are no work to speak of. */
static void test_large_enum(void **state)
{
    struct tb_buf b;
    tb_buf_init(&b, 1 << 20);
    tb_buf_puts(&b, "{\"type\":\"array\",\"items\":{\"enum\":[0");
    for (int i = 1; i < 10000; i++)
        tb_buf_printf(&b, ",\"v%d\"", i);
    tb_buf_puts(&b, "]}}");
    struct tb_grammar *g = make(b.p);
    assert_true(matches(g, "[\"v1\",\"v9999\",0]"));
    assert_false(matches(g, "[\"v10000\"]"));
    assert_non_null(tb_grammar_mask(g, tb_grammar_start(g), 100));
    tb_grammar_unref(g);
    tb_buf_fini(&b);
}

static void test_memory_is_bounded(void **state)
{
    struct tb_grammar *g =
        make("{\"type\":\"string\",\"minLength\":1000000,\"maxLength\":1000000}");
    uint32_t s = tb_grammar_feed(g, tb_grammar_start(g), tb_span_str("\""));
    for (int i = 0; s && i < 1000000; i++)
        s = tb_grammar_feed(g, s, tb_span_str("a"));
    if (s == 0) assert_null(tb_grammar_mask(g, tb_grammar_start(g), 10));
    assert_int_equal(tb_grammar_worn(g), s == 0);
    assert_false(tb_grammar_too_complex(g));
    tb_grammar_unref(g);
}

/* A grammar that served many texts says so while it still serves. */
static void test_worn_before_it_fails(void **state)
{
    struct tb_grammar *g =
        make("{\"type\":\"string\",\"minLength\":1000000,\"maxLength\":1000000}");
    uint32_t s = tb_grammar_feed(g, tb_grammar_start(g), tb_span_str("\""));
    assert_non_null(tb_grammar_mask(g, s, UINT32_MAX));
    assert_false(tb_grammar_worn(g));
    for (int n = 0; n < 1000000 && !tb_grammar_worn(g); n += 1000) {
        for (int i = 0; i < 1000; i++)
            s = tb_grammar_feed(g, s, tb_span_str("a"));
        assert_non_null(tb_grammar_mask(g, s, UINT32_MAX));
    }
    assert_true(tb_grammar_worn(g));
    tb_grammar_unref(g);
}

/* Many grammars at once have a limit too: beyond it the large ones grow no more, and small ones do.
 */
static void test_all_are_bounded(void **state)
{
    enum { N = 8 };
    const char *schema = "{\"type\":\"string\",\"minLength\":1000000,\"maxLength\":1000000}";
    struct tb_grammar *g[N];
    vocab->max_grammar_bytes = 16 << 20;
    assert_int_equal(vocab->grammar_bytes, 0);
    for (int i = 0; i < N; i++) {
        g[i] = make(schema);
        uint32_t s = tb_grammar_feed(g[i], tb_grammar_start(g[i]), tb_span_str("\""));
        while (s)
            s = tb_grammar_feed(g[i], s, tb_span_str("a"));
        assert_in_range(tb_states_bytes(g[i]), 1 << 20, 16 << 20);
        assert_null(tb_grammar_mask(g[i], tb_grammar_start(g[i]), 10));
        assert_true(tb_grammar_worn(g[i]) && tb_vocab_crowded(vocab));
        assert_in_range(vocab->grammar_bytes, 8 << 20, (16 + i * 2) << 20);
    }
    struct tb_grammar *small = make("{\"enum\":[\"a\",\"b\"]}");
    assert_true(matches(small, "\"a\""));
    assert_non_null(tb_grammar_mask(small, tb_grammar_start(small), 10));
    assert_false(tb_grammar_worn(small));
    tb_grammar_unref(small);
    for (int i = 0; i < N; i++)
        tb_grammar_unref(g[i]);
    assert_int_equal(vocab->grammar_bytes, 0);
    vocab->max_grammar_bytes = TB_VOCAB_GRAMMAR_BYTES;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_texts),
        cmocka_unit_test(test_mask_is_each_token),
        cmocka_unit_test(test_random_texts_end_in_time),
        cmocka_unit_test(test_nesting_ends),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_limits),
        cmocka_unit_test(test_large_enum),
        cmocka_unit_test(test_memory_is_bounded),
        cmocka_unit_test(test_worn_before_it_fails),
        cmocka_unit_test(test_all_are_bounded),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
