/*
 * Encoding against cases recorded with the Hugging Face tokenizers library (test/data/tokenizer),
 * long pre-tokens against a plain quadratic merge, and files whose text steps are not served.
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

#include "tokenizer/tokenizer.h"
#include "util/mem.h"
#include "util/philox.h"

static json_t *read_json(const char *name, bool nul)
{
    json_error_t je;
    char *path = tb_asprintf("%s/tokenizer/%s", TB_TEST_DATA, name);
    json_t *o = json_load_file(path, nul ? JSON_ALLOW_NUL : 0, &je);
    if (!o) fail_msg("%s: %s", path, je.text);
    tb_free(path);
    return o;
}

static struct tb_tokenizer *from_json(const json_t *o)
{
    struct tb_tokenizer *t;
    struct tb_error e;
    char *text = json_dumps(o, JSON_COMPACT);
    int rc = tb_tokenizer_create_from_json("tokenizer.json", tb_span_str(text), &t, &e);
    if (rc) fail_msg("%s", e.msg);
    free(text);
    return t;
}

static struct tb_tokenizer *load(const char *name)
{
    json_t *o = read_json(name, true);
    struct tb_tokenizer *t = from_json(o);
    json_decref(o);
    return t;
}

static void expect_ids(const struct tb_tokenizer *t, const json_t *text, unsigned flags,
                       const json_t *want)
{
    struct tb_ids got;
    struct tb_error e;
    tb_ids_init(&got);
    struct tb_span s = {json_string_value(text), json_string_length(text)};
    int rc = tb_tokenizer_encode(t, s, flags, &got, &e);
    if (rc) fail_msg("%s: %s", s.p, e.msg);
    if (got.n != json_array_size(want))
        fail_msg("\"%s\": %zu ids instead of %zu", s.p, got.n, json_array_size(want));
    for (size_t i = 0; i < got.n; i++)
        assert_int_equal(got.p[i], json_integer_value(json_array_get(want, i)));
    tb_ids_fini(&got);
}

static void test_recorded_cases(void **state)
{
    static const char *const names[] = {"qwen", "llama3", "qwen35"};
    for (size_t k = 0; k < TB_ARRAY_LEN(names); k++) {
        char file[64];
        size_t i, seen = 0;
        json_t *c;
        snprintf(file, sizeof(file), "%s.json", names[k]);
        struct tb_tokenizer *t = load(file);
        snprintf(file, sizeof(file), "%s_cases.json", names[k]);
        json_t *cases = read_json(file, true);
        json_array_foreach(json_object_get(cases, "cases"), i, c)
        {
            const json_t *text = json_object_get(c, "text");
            expect_ids(t, text, 0, json_object_get(c, "ids"));
            expect_ids(t, text, TB_ENCODE_TEMPLATE, json_object_get(c, "ids_with_special"));
            seen++;
        }
        assert_int_equal(seen, 28);
        json_decref(cases);
        tb_tokenizer_destroy(t);
    }
}

/* Text that spells an added token stays text under TB_ENCODE_PLAIN, and decodes to itself. */
static void test_plain(void **state)
{
    struct tb_tokenizer *t = load("qwen.json");
    struct tb_span text = TB_SPAN_LIT("a<|im_end|>\n");
    struct tb_ids ids;
    struct tb_buf back;
    tb_ids_init(&ids);
    assert_int_equal(tb_tokenizer_encode(t, text, 0, &ids, NULL), 0);
    bool special = false;
    for (size_t i = 0; i < ids.n; i++)
        special |= ids.p[i] == 317;
    assert_true(special);
    ids.n = 0;
    assert_int_equal(tb_tokenizer_encode(t, text, TB_ENCODE_PLAIN, &ids, NULL), 0);
    tb_buf_init(&back, 100);
    for (size_t i = 0; i < ids.n; i++) {
        struct tb_span s;
        assert_true(ids.p[i] < 315);
        assert_int_equal(tb_tokenizer_token_bytes(t, ids.p[i], &s), 0);
        assert_int_equal(tb_buf_append(&back, s.p, s.n), 0);
    }
    assert_int_equal(back.n, text.n);
    assert_memory_equal(back.p, text.p, text.n);
    tb_buf_fini(&back);
    tb_ids_fini(&ids);
    tb_tokenizer_destroy(t);
}

/* The definition, in O(n^2): merge the lowest-ranked adjacent pair, leftmost on ties, until none is
 * left. */
static size_t plain_merge(char (*sym)[64], size_t n, const json_t *merges)
{
    for (;;) {
        size_t best = SIZE_MAX, at = 0;
        for (size_t i = 0; i + 1 < n; i++) {
            size_t rank;
            const json_t *m;
            json_array_foreach(merges, rank, m)
            {
                if (rank >= best) break;
                if (strcmp(sym[i], json_string_value(json_array_get(m, 0))) == 0 &&
                    strcmp(sym[i + 1], json_string_value(json_array_get(m, 1))) == 0) {
                    best = rank;
                    at = i;
                }
            }
        }
        if (best == SIZE_MAX) return n;
        memcpy(sym[at] + strlen(sym[at]), sym[at + 1], strlen(sym[at + 1]) + 1);
        memmove(sym + at + 1, sym + at + 2, (n - at - 2) * sizeof(*sym));
        n--;
    }
}

static void test_merge_order(void **state)
{
    json_t *file = read_json("qwen.json", true);
    struct tb_tokenizer *t = from_json(file);
    const json_t *model = json_object_get(file, "model"), *vocab = json_object_get(model, "vocab");
    static const char letters[] = "theriandosgl";
    for (uint32_t round = 0; round < 200; round++) {
        char text[97], sym[96][64];
        size_t n = 1 + (size_t)(tb_philox_draw(5, round, 0, 0) * 96.0f);
        n = TB_MIN(n, (size_t)96);
        for (size_t i = 0; i < n; i++) {
            float u = tb_philox_draw(5, round, (uint32_t)i + 1, 0);
            text[i] = letters[(size_t)(u * (float)(sizeof(letters) - 1))];
            sym[i][0] = text[i];
            sym[i][1] = '\0';
        }
        text[n] = '\0';
        size_t want = plain_merge(sym, n, json_object_get(model, "merges"));
        struct tb_ids ids;
        tb_ids_init(&ids);
        assert_int_equal(tb_tokenizer_encode(t, (struct tb_span){text, n}, 0, &ids, NULL), 0);
        assert_int_equal(ids.n, want);
        for (size_t i = 0; i < want; i++)
            assert_int_equal(ids.p[i], json_integer_value(json_object_get(vocab, sym[i])));
        tb_ids_fini(&ids);
    }
    tb_tokenizer_destroy(t);
    json_decref(file);
}

/* One pre-token of 300,000 letters; quadratic work would take hours. */
static void test_long_pre_token(void **state)
{
    struct tb_tokenizer *t = load("qwen.json");
    size_t n = 300000, bytes = 0;
    char *text = tb_malloc(n);
    for (size_t i = 0; i < n; i++)
        text[i] = "the"[i % 3];
    struct tb_ids ids;
    tb_ids_init(&ids);
    assert_int_equal(tb_tokenizer_encode(t, (struct tb_span){text, n}, 0, &ids, NULL), 0);
    assert_true(ids.n > 0 && ids.n < n);
    for (size_t i = 0; i < ids.n; i++) {
        struct tb_span s;
        assert_int_equal(tb_tokenizer_token_bytes(t, ids.p[i], &s), 0);
        assert_memory_equal(s.p, text + bytes, s.n);
        bytes += s.n;
    }
    assert_int_equal(bytes, n);
    memset(text, ' ', n); /* a long run of spaces takes the expressions' backtracking paths */
    text[n - 1] = 'x';
    ids.n = 0;
    assert_int_equal(tb_tokenizer_encode(t, (struct tb_span){text, n}, 0, &ids, NULL), 0);
    assert_true(ids.n > 0);
    tb_ids_fini(&ids);
    tb_free(text);
    tb_tokenizer_destroy(t);
}

static void test_bad_text(void **state)
{
    struct tb_tokenizer *t = load("qwen.json");
    struct tb_ids ids;
    struct tb_error e;
    tb_ids_init(&ids);
    assert_int_equal(tb_ids_push(&ids, 7), 0);
    assert_int_equal(tb_tokenizer_encode(t, TB_SPAN_LIT("a\xFF"), 0, &ids, &e), TB_EINVAL);
    assert_non_null(strstr(e.msg, "UTF-8"));
    assert_int_equal(tb_tokenizer_encode(t, TB_SPAN_LIT("\xED\xA0\x80"), 0, &ids, &e), TB_EINVAL);
    assert_int_equal(ids.n, 1);
    assert_int_equal(tb_tokenizer_encode(t, TB_SPAN_LIT(""), TB_ENCODE_TEMPLATE, &ids, &e), 0);
    assert_int_equal(tb_tokenizer_encode(t, (struct tb_span){NULL, 0}, 0, &ids, &e), 0);
    assert_int_equal(ids.n, 1);
    tb_ids_fini(&ids);
    tb_tokenizer_destroy(t);
}

/* A file with a part that is not served still decodes, and says what it is when asked to encode. */
static void test_unsupported(void **state)
{
    static const struct {
        const char *key, *value, *names;
    } cases[] = {
        {"normalizer", "{\"type\":\"Lowercase\"}", "Lowercase"},
        {"normalizer", "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFKC\"}]}", "NFKC"},
        {"pre_tokenizer", "{\"type\":\"Metaspace\"}", "Metaspace"},
        {"pre_tokenizer", "null", "pre_tokenizer missing"},
        {"pre_tokenizer",
         "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"a\"},\"behavior\":\"Removed\"}", "Removed"},
        {"pre_tokenizer",
         "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(\"},\"behavior\":\"Isolated\"}", "pattern"},
        {"post_processor", "{\"type\":\"BertProcessing\"}", "BertProcessing"},
        {"model.dropout", "0.1", "model.dropout"},
        {"model.end_of_word_suffix", "\"</w>\"", "model.end_of_word_suffix"},
        {"model.continuing_subword_prefix", "\"##\"", "model.continuing_subword_prefix"},
    };
    for (size_t i = 0; i < TB_ARRAY_LEN(cases); i++) {
        json_t *file = read_json("qwen.json", true);
        bool model = strncmp(cases[i].key, "model.", 6) == 0;
        assert_int_equal(json_object_set_new(model ? json_object_get(file, "model") : file,
                                             cases[i].key + (model ? 6 : 0),
                                             json_loads(cases[i].value, JSON_DECODE_ANY, NULL)),
                         0);
        struct tb_tokenizer *t = from_json(file);
        struct tb_ids ids;
        struct tb_error e;
        struct tb_span s;
        tb_ids_init(&ids);
        assert_int_equal(tb_tokenizer_encode(t, TB_SPAN_LIT("a"), 0, &ids, &e), TB_EUNSUPPORTED);
        assert_non_null(strstr(e.msg, "tokenizer.json: "));
        if (!strstr(e.msg, cases[i].names)) fail_msg("%s lacks %s", e.msg, cases[i].names);
        assert_int_equal(tb_tokenizer_token_bytes(t, 64, &s), 0);
        assert_true(tb_span_eq(s, "a"));
        tb_ids_fini(&ids);
        tb_tokenizer_destroy(t);
        json_decref(file);
    }
}

static void test_malformed_merges(void **state)
{
    static const char *const merges[] = {
        "null",           "[3]",      "[\"a\"]",  "[\"a b c\"]", "[[\"a\"]]",         "[[1,2]]",
        "[[\"\",\"a\"]]", "[\" a\"]", "[\"a \"]", "[\"q zzz\"]", "[[\"th\",\"zq\"]]", "{}"};
    for (size_t i = 0; i < TB_ARRAY_LEN(merges); i++) {
        json_t *file = read_json("qwen.json", true);
        json_t *m = json_loads(merges[i], JSON_DECODE_ANY, NULL);
        assert_non_null(m);
        json_object_set_new(json_object_get(file, "model"), "merges", m);
        char *text = json_dumps(file, JSON_COMPACT);
        struct tb_tokenizer *t;
        struct tb_error e;
        assert_int_equal(tb_tokenizer_create_from_json("f", tb_span_str(text), &t, &e),
                         TB_ECORRUPT);
        assert_null(t);
        assert_non_null(strstr(e.msg, "f: model.merges"));
        free(text);
        json_decref(file);
    }
}

/* Added tokens: longest first, lstrip and rstrip take the whitespace with them. */
static void test_added(void **state)
{
    json_t *file = read_json("qwen.json", true), *added = json_object_get(file, "added_tokens");
    json_array_append_new(added,
                          json_pack("{s:i,s:s,s:b}", "id", 320, "content", "<x>", "lstrip", 1));
    json_array_append_new(added,
                          json_pack("{s:i,s:s,s:b}", "id", 321, "content", "<x>>", "rstrip", 1));
    json_array_append_new(
        added, json_pack("{s:i,s:s,s:b}", "id", 322, "content", "\xC3\xA9", "normalized", 1));
    struct tb_tokenizer *t = from_json(file);
    static const struct {
        const char *text;
        size_t n;
        int32_t ids[4];
    } cases[] = {
        {"a \t<x>b", 3, {64, 320, 65}},
        {"a<x>>\xC2\xA0 b", 3, {64, 321, 65}},
        {"<x>><x>", 2, {321, 320}},
        {"e\xCC\x81", 1, {322}}, /* after NFC */
        {"a\xC3\xA9"
         "b",
         3,
         {64, 322, 65}},
    };
    for (size_t i = 0; i < TB_ARRAY_LEN(cases); i++) {
        struct tb_ids ids;
        tb_ids_init(&ids);
        assert_int_equal(tb_tokenizer_encode(t, tb_span_str(cases[i].text), 0, &ids, NULL), 0);
        assert_int_equal(ids.n, cases[i].n);
        for (size_t k = 0; k < ids.n; k++)
            assert_int_equal(ids.p[k], cases[i].ids[k]);
        tb_ids_fini(&ids);
    }
    tb_tokenizer_destroy(t);
    json_decref(file);
}

/* SentencePiece-style, in small: ids of characters and merges across and within words, bytes of
 * what has no token, the unknown token, marks put first; all as the library gives them. */
static void test_sentencepiece(void **state)
{
#define MODEL(more)                                                                                \
    "\"decoder\":{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"ByteFallback\"}]},"              \
    "\"model\":{\"type\":\"BPE\"," more                                                            \
    "\"vocab\":{\"<unk>\":0,\"<0xC3>\":1,\"<0xA9>\":2,\"\u2581\":3,\"a\":4,\"b\":5,\"ab\":6,"      \
    "\"\u2581a\":7,\"\u2581ab\":8},\"merges\":[\"a b\",\"\u2581 ab\",\"\u2581 a\"]}}"
#define LLAMA                                                                                      \
    "{\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Prepend\",\"prepend\":"   \
    "\"\u2581\"},{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"\u2581\"}]},"
#define FIRST                                                                                      \
    "{\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"\u2581\",\"prepend_scheme\":"    \
    "\"first\",\"split\":false},\"added_tokens\":[{\"id\":9,\"content\":\"[x]\"}],"
    static const struct {
        const char *json, *text;
        int32_t n, ids[8];
    } cases[] = {
        {LLAMA MODEL("\"byte_fallback\":true,"), "ab  a", 3, {8, 3, 7}},
        {LLAMA MODEL("\"byte_fallback\":true,"), "a\u00e9\u00ff", 3, {7, 1, 2}},
        {LLAMA MODEL("\"unk_token\":\"<unk>\","), "\u00e9\u00ffb", 4, {3, 0, 0, 5}},
        {LLAMA MODEL("\"unk_token\":\"<unk>\",\"fuse_unk\":true,"), "\u00e9\u00ffb", 3, {3, 0, 5}},
        {FIRST MODEL(""), "ab[x]ab", 3, {8, 9, 6}},
        {FIRST MODEL(""), " ab", 1, {8}},
        {FIRST MODEL(""), "", 0, {0}},
    };
    for (size_t i = 0; i < TB_ARRAY_LEN(cases); i++) {
        struct tb_tokenizer *t;
        struct tb_error e;
        struct tb_ids ids;
        if (tb_tokenizer_create_from_json("sp", tb_span_str(cases[i].json), &t, &e))
            fail_msg("%s", e.msg);
        tb_ids_init(&ids);
        int rc = tb_tokenizer_encode(t, tb_span_str(cases[i].text), 0, &ids, &e);
        if (rc) fail_msg("case %zu: %s", i, e.msg);
        assert_int_equal(ids.n, cases[i].n);
        for (size_t k = 0; k < ids.n; k++)
            assert_int_equal(ids.p[k], cases[i].ids[k]);
        tb_ids_fini(&ids);
        tb_tokenizer_destroy(t);
    }
}

/* The demo model's folder, with ids recorded with transformers. */
static void test_demo_model(void **state)
{
    static const int32_t want[] = {1022, 272, 273, 220, 18, 283, 220, 19, 30, 1023};
    struct tb_tokenizer *t;
    struct tb_error e;
    struct tb_ids ids;
    if (tb_tokenizer_create(TB_DEMO_MODEL, &t, &e)) fail_msg("%s", e.msg);
    assert_int_equal(tb_tokenizer_vocab_size(t), 1024);
    assert_int_equal(tb_tokenizer_eos_id(t), 1023);
    assert_true(tb_tokenizer_is_special(t, 1023));
    tb_ids_init(&ids);
    assert_int_equal(
        tb_tokenizer_encode(t, TB_SPAN_LIT("<|im_start|>What is 3 + 4?<|im_end|>"), 0, &ids, &e),
        0);
    assert_int_equal(ids.n, TB_ARRAY_LEN(want));
    for (size_t i = 0; i < ids.n; i++)
        assert_int_equal(ids.p[i], want[i]);
    tb_ids_fini(&ids);
    tb_tokenizer_destroy(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_recorded_cases),   cmocka_unit_test(test_plain),
        cmocka_unit_test(test_merge_order),      cmocka_unit_test(test_long_pre_token),
        cmocka_unit_test(test_bad_text),         cmocka_unit_test(test_unsupported),
        cmocka_unit_test(test_malformed_merges), cmocka_unit_test(test_added),
        cmocka_unit_test(test_sentencepiece),    cmocka_unit_test(test_demo_model),
    };
    return cmocka_run_group_tests_name("tokenizer encode", tests, NULL, NULL);
}
