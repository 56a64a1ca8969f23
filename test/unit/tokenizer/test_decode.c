/*
 * Decoding against cases recorded with the Hugging Face tokenizers library (test/data/tokenizer),
 * damaged files, and UTF-8 at its edges.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>
#include <jansson.h>

#include "tokenizer/tokenizer.h"
#include "util/mem.h"

static char *slurp(const char *name, size_t *n)
{
    char *path = tb_asprintf("%s/tokenizer/%s", TB_TEST_DATA, name);
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    assert_int_equal(fseek(f, 0, SEEK_END), 0);
    long size = ftell(f);
    assert_true(size > 0);
    rewind(f);
    char *p = tb_malloc((size_t)size + 1);
    assert_int_equal(fread(p, 1, (size_t)size, f), size);
    p[size] = '\0';
    fclose(f);
    tb_free(path);
    *n = (size_t)size;
    return p;
}

static struct tb_tokenizer *load(const char *name)
{
    struct tb_tokenizer *t;
    struct tb_error e;
    size_t n;
    char *p = slurp(name, &n);
    int rc = tb_tokenizer_create_from_json(name, (struct tb_span){p, n}, &t, &e);
    if (rc) fail_msg("%s", e.msg);
    tb_free(p);
    return t;
}

static void decode(const struct tb_tokenizer *t, const json_t *ids, bool skip_special,
                   struct tb_buf *text)
{
    struct tb_ids list;
    tb_ids_init(&list);
    for (size_t i = 0; i < json_array_size(ids); i++)
        tb_ids_push(&list, (int32_t)json_integer_value(json_array_get(ids, i)));
    tb_buf_init(text, 1 << 20);
    assert_int_equal(
        tb_tokenizer_decode(t, list.p, list.n, skip_special ? TB_DECODE_VISIBLE : 0, text), 0);
    tb_ids_fini(&list);
}

static void expect(const struct tb_tokenizer *t, const json_t *ids, const json_t *want, bool skip)
{
    struct tb_buf text;
    decode(t, ids, skip, &text);
    assert_int_equal(text.n, json_string_length(want));
    if (text.n) assert_memory_equal(text.p, json_string_value(want), text.n);
    tb_buf_fini(&text);
}

static void test_recorded_cases(void **state)
{
    static const char *const names[] = {"qwen", "llama3", "qwen35"};
    for (size_t k = 0; k < TB_ARRAY_LEN(names); k++) {
        char file[64];
        size_t n, seen = 0;
        json_error_t je;
        snprintf(file, sizeof(file), "%s.json", names[k]);
        struct tb_tokenizer *t = load(file);
        snprintf(file, sizeof(file), "%s_cases.json", names[k]);
        char *p = slurp(file, &n);
        json_t *cases = json_loadb(p, n, JSON_ALLOW_NUL, &je), *c;
        size_t i;
        assert_non_null(cases);
        tb_free(p);
        json_array_foreach(json_object_get(cases, "cases"), i, c)
        {
            expect(t, json_object_get(c, "ids"), json_object_get(c, "decoded"), false);
            expect(t, json_object_get(c, "ids"), json_object_get(c, "decoded_skip_special"), true);
            seen++;
        }
        assert_int_equal(seen, 28);
        json_array_foreach(json_object_get(cases, "invalid_utf8"), i, c)
        {
            expect(t, json_object_get(c, "ids"), json_object_get(c, "decoded"), false);
        }
        /* incremental: text up to an incomplete tail, null where a step gives none */
        json_array_foreach(json_object_get(cases, "decode_stream"), i, c)
        {
            struct tb_buf held;
            size_t step;
            json_t *want;
            tb_buf_init(&held, 1 << 16);
            json_array_foreach(json_object_get(c, "chunks"), step, want)
            {
                struct tb_span s;
                int32_t id =
                    (int32_t)json_integer_value(json_array_get(json_object_get(c, "ids"), step));
                assert_int_equal(tb_tokenizer_token_bytes(t, id, &s), 0);
                assert_int_equal(tb_buf_append(&held, s.p, s.n), 0);
                size_t tail = tb_utf8_incomplete_tail(held.p, held.n);
                if (json_is_null(want)) {
                    assert_int_equal(tail, held.n);
                    continue;
                }
                assert_int_equal(tail, 0);
                assert_string_equal(held.p, json_string_value(want));
                tb_buf_reset(&held);
            }
            tb_buf_fini(&held);
        }
        json_decref(cases);
        tb_tokenizer_destroy(t);
    }
}

static void test_byte_map(void **state)
{
    struct tb_tokenizer *t = load("qwen.json");
    bool seen[256] = {false};
    int one_byte = 0;
    for (int32_t id = 0; id < 256; id++) {
        struct tb_span s;
        assert_int_equal(tb_tokenizer_token_bytes(t, id, &s), 0);
        assert_int_equal(s.n, 1);
        one_byte += !seen[(unsigned char)s.p[0]];
        seen[(unsigned char)s.p[0]] = true;
    }
    assert_int_equal(one_byte, 256);
    struct tb_span s;
    assert_int_equal(tb_tokenizer_token_bytes(t, 220, &s), 0); /* U+0120 */
    assert_int_equal(s.p[0], ' ');
    tb_tokenizer_destroy(t);
}

static void test_ids(void **state)
{
    struct tb_tokenizer *t = load("qwen.json");
    static const int32_t bad[] = {-1, INT32_MIN, 320, 100000, INT32_MAX};
    struct tb_span s;
    assert_int_equal(tb_tokenizer_vocab_size(t), 320);
    for (size_t i = 0; i < TB_ARRAY_LEN(bad); i++) {
        assert_int_equal(tb_tokenizer_token_bytes(t, bad[i], &s), TB_ENOTFOUND);
        assert_int_equal(s.n, 0);
        assert_false(tb_tokenizer_is_special(t, bad[i]));
    }
    assert_int_equal(tb_tokenizer_added_id(t, TB_SPAN_LIT("<|im_end|>")), 317);
    assert_int_equal(tb_tokenizer_added_id(t, TB_SPAN_LIT("<think>")), 318);
    assert_int_equal(tb_tokenizer_added_id(t, TB_SPAN_LIT("a")),
                     -1); /* a token, not an added one */
    assert_true(tb_tokenizer_is_special(t, 317));
    assert_false(tb_tokenizer_is_special(t, 318));
    assert_int_equal(tb_tokenizer_token_bytes(t, 317, &s), 0);
    assert_true(tb_span_eq(s, "<|im_end|>"));
    assert_int_equal(tb_tokenizer_eos_id(t), -1); /* known from tokenizer_config.json only */
    tb_tokenizer_destroy(t);
    tb_tokenizer_destroy(NULL);
}

#define MARKS "{\"type\":\"Replace\",\"pattern\":{\"String\":\"\\u2581\"},\"content\":\" \"}"

static void test_sentencepiece(void **state)
{
    static const char json[] =
        "{\"decoder\":{\"type\":\"Sequence\",\"decoders\":[" MARKS ","
        "{\"type\":\"ByteFallback\"},{\"type\":\"Fuse\"}]},\"model\":{\"type\":\"BPE\","
        "\"byte_fallback\":true,\"vocab\":{\"<0x0A>\":0,\"\\u2581the\":1,\"<0xF0>\":2,\"<0xZZ>\":3,"
        "\"\\u00e9\":7},\"merges\":[]},\"added_tokens\":null}";
    static const char *const want[] = {"\n", " the", "\xF0", "<0xZZ>"};
    struct tb_tokenizer *t;
    struct tb_span s;
    assert_int_equal(tb_tokenizer_create_from_json("sp", TB_SPAN_LIT(json), &t, NULL), 0);
    assert_int_equal(tb_tokenizer_vocab_size(t), 8);
    for (int32_t i = 0; i < 4; i++) {
        assert_int_equal(tb_tokenizer_token_bytes(t, i, &s), 0);
        assert_true(tb_span_eq(s, want[i]));
    }
    assert_int_equal(tb_tokenizer_token_bytes(t, 7, &s), 0);
    assert_true(tb_span_eq(s, "\xC3\xA9"));
    assert_int_equal(tb_tokenizer_token_bytes(t, 5, &s), TB_ENOTFOUND); /* a gap */
    tb_tokenizer_destroy(t);
}

/* Runs of byte tokens, the space at the beginning, and special tokens, as the library has them. */
static void test_sentencepiece_text(void **state)
{
    static const char json[] =
        "{\"decoder\":{\"type\":\"Sequence\",\"decoders\":[" MARKS ",{\"type\":\"ByteFallback\"},"
        "{\"type\":\"Fuse\"},{\"type\":\"Strip\",\"content\":\" \",\"start\":1,\"stop\":0}]},"
        "\"model\":{\"type\":\"BPE\",\"vocab\":{\"<0xC3>\":0,\"<0xA9>\":1,\"\\u2581the\":2,"
        "\"\\u2581\":3,\"a\":4,\"<0x20>\":5},\"merges\":[]},\"added_tokens\":[{\"id\":6,"
        "\"content\":\"<s>\",\"special\":true},{\"id\":7,\"content\":\"x\\u2581y\"}]}";
    static const struct {
        unsigned flags;
        const char *want;
        size_t n;
        int32_t ids[8];
    } cases[] = {
        {0, "the", 1, {2}},
        {TB_DECODE_GOES_ON, " the", 1, {2}},
        {0, "  the", 4, {3, 3, 2, 9}},
        {0, "", 1, {5}},
        {0, "<s> the", 2, {6, 2}},
        {TB_DECODE_VISIBLE, "the", 2, {6, 2}},
        {0, "\u00e9\u00e9", 4, {0, 1, 0, 1}},
        {0, "\ufffd\ufffd\ufffd", 3, {0, 1, 0}}, /* one that is wrong spoils the run */
        {0, "\u00e9a\ufffd", 4, {0, 1, 4, 0}},
        {0, "\ufffd<s>\ufffd", 3, {0, 6, 1}},
        {TB_DECODE_VISIBLE, "\u00e9", 3, {0, 6, 1}},
        {0, "x y", 1, {7}},
    };
    struct tb_tokenizer *t;
    assert_int_equal(tb_tokenizer_create_from_json("sp", TB_SPAN_LIT(json), &t, NULL), 0);
    assert_int_equal(tb_tokenizer_added_id(t, TB_SPAN_LIT("x\u2581y")), 7);
    for (size_t i = 0; i < TB_ARRAY_LEN(cases); i++) {
        struct tb_buf text;
        tb_buf_init(&text, 100);
        assert_int_equal(tb_tokenizer_decode(t, cases[i].ids, cases[i].n, cases[i].flags, &text),
                         0);
        tb_buf_puts(&text, "");
        assert_string_equal(text.p, cases[i].want);
        tb_buf_fini(&text);
    }
    tb_tokenizer_destroy(t);
}

/* Decoders whose text would be another are refused. */
static void test_refused_decoders(void **state)
{
    static const char *const lists[] = {
        "{\"type\":\"ByteFallback\"}," MARKS,
        "{\"type\":\"Replace\"},{\"type\":\"ByteFallback\"}",
        "{\"type\":\"ByteFallback\"},{\"type\":\"Strip\",\"content\":\" \",\"start\":1,\"stop\":0}",
        "{\"type\":\"ByteFallback\"},{\"type\":\"Fuse\"},{\"type\":\"Strip\",\"content\":\" \","
        "\"start\":1,\"stop\":1}",
        "{\"type\":\"ByteFallback\"},{\"type\":\"Metaspace\"}",
        "{\"type\":\"ByteLevel\"},{\"type\":\"ByteFallback\"}",
        "{\"type\":\"Fuse\"}",
        "",
    };
    for (size_t i = 0; i < TB_ARRAY_LEN(lists); i++) {
        struct tb_tokenizer *t;
        struct tb_error e;
        char *json =
            tb_asprintf("{\"decoder\":{\"type\":\"Sequence\",\"decoders\":[%s]},\"model\":{"
                        "\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[]}}",
                        lists[i]);
        assert_int_equal(tb_tokenizer_create_from_json("sp", tb_span_str(json), &t, &e),
                         TB_EUNSUPPORTED);
        assert_non_null(strstr(e.msg, "decoder"));
        tb_free(json);
    }
}

static void test_malformed(void **state)
{
#define BL "\"decoder\":{\"type\":\"ByteLevel\"}"
    static const struct {
        const char *json;
        int code;
        const char *names;
    } cases[] = {
        {"", TB_ECORRUPT, "not JSON"},
        {"{", TB_ECORRUPT, "not JSON"},
        {"[]", TB_ECORRUPT, "model is not an object"},
        {"{\"model\":7}", TB_ECORRUPT, "model is not an object"},
        {"{\"model\":{\"type\":3}}", TB_ECORRUPT, "model.type"},
        {"{\"model\":{\"type\":\"Unigram\",\"vocab\":[]}}", TB_EUNSUPPORTED, "Unigram"},
        {"{\"model\":{\"vocab\":{}}}", TB_EUNSUPPORTED, "model.type is missing"},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0}}}", TB_EUNSUPPORTED,
         "decoder is missing"},
        {"{\"decoder\":{\"type\":\"WordPiece\"},\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0}}}",
         TB_EUNSUPPORTED, "WordPiece"},
        {"{" BL ",\"model\":{\"type\":\"BPE\"}}", TB_ECORRUPT, "model.vocab is not an object"},
        {"{" BL ",\"model\":{\"type\":\"BPE\",\"vocab\":[]}}", TB_ECORRUPT,
         "model.vocab is not an object"},
        {"{" BL ",\"model\":{\"type\":\"BPE\",\"vocab\":{}}}", TB_ECORRUPT, "model.vocab is empty"},
        {"{" BL ",\"model\":{\"type\":\"BPE\",\"vocab\":{\"ab\":-1}}}", TB_ECORRUPT,
         "model.vocab[\"ab\"]"},
        {"{" BL ",\"model\":{\"type\":\"BPE\",\"vocab\":{\"ab\":\"x\"}}}", TB_ECORRUPT,
         "model.vocab[\"ab\"]"},
        {"{" BL ",\"model\":{\"type\":\"BPE\",\"vocab\":{\"ab\":2147483647}}}", TB_ECORRUPT,
         "model.vocab[\"ab\"]"},
        {"{" BL ",\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":1,\"b\":1}}}", TB_ECORRUPT,
         "two tokens with id 1"},
        {"{" BL ",\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":1}},\"added_tokens\":{}}",
         TB_ECORRUPT, "added_tokens is not an array"},
        {"{" BL ",\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":1}},\"added_tokens\":[3]}",
         TB_ECORRUPT, "added_tokens[0].id"},
        {"{" BL ",\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":1}},\"added_tokens\":[{\"id\":2}]}",
         TB_ECORRUPT, "added_tokens[0].content"},
        {"{" BL ",\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":1}},\"added_tokens\":[{\"id\":2,"
         "\"content\":\"x\",\"special\":1}]}",
         TB_ECORRUPT, "added_tokens[0].special"},
        {"{" BL ",\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":1}},\"added_tokens\":[{\"id\":2,"
         "\"content\":\"x\"},{\"id\":2,\"content\":\"y\"}]}",
         TB_ECORRUPT, "two tokens with id 2"},
    };
    for (size_t i = 0; i < TB_ARRAY_LEN(cases); i++) {
        struct tb_tokenizer *t = NULL;
        struct tb_error e;
        int rc =
            tb_tokenizer_create_from_json("a/tokenizer.json", tb_span_str(cases[i].json), &t, &e);
        assert_int_equal(rc, cases[i].code);
        assert_null(t);
        assert_non_null(strstr(e.msg, "a/tokenizer.json: "));
        if (!strstr(e.msg, cases[i].names)) fail_msg("%s lacks %s", e.msg, cases[i].names);
    }
}

/* Every prefix and many one-byte changes of a real file: an error or a tokenizer, never a crash. */
static void test_damage(void **state)
{
    size_t n;
    char *p = slurp("qwen.json", &n);
    for (size_t cut = 0; cut < n; cut += cut < 400 || cut > n - 400 ? 1 : 37) {
        char *copy = tb_malloc(cut + 1); /* its own block, so that a read past the end is seen */
        struct tb_tokenizer *t;
        memcpy(copy, p, cut);
        int rc = tb_tokenizer_create_from_json("cut", (struct tb_span){copy, cut}, &t, NULL);
        assert_int_equal(rc, TB_ECORRUPT);
        tb_free(copy);
    }
    for (size_t i = 0; i < n; i += 23) {
        static const char with[] = "\"}]0\\\x80";
        char old = p[i];
        p[i] = with[i / 23 % (sizeof(with) - 1)];
        struct tb_tokenizer *t;
        int rc = tb_tokenizer_create_from_json("changed", (struct tb_span){p, n}, &t, NULL);
        if (rc == 0) {
            struct tb_span s;
            for (int32_t id = 0; id < tb_tokenizer_vocab_size(t) && id < 1000; id++)
                (void)tb_tokenizer_token_bytes(t, id, &s);
            tb_tokenizer_destroy(t);
        } else {
            assert_true(rc == TB_ECORRUPT || rc == TB_EUNSUPPORTED);
        }
        p[i] = old;
    }
    for (long k = 1; k < 5; k++) {
        struct tb_tokenizer *t = NULL;
        tb_mem_fail_after(k);
        int rc = tb_tokenizer_create_from_json("mem", (struct tb_span){p, n}, &t, NULL);
        tb_mem_fail_after(0);
        assert_true(rc == TB_ENOMEM || rc == 0);
        tb_tokenizer_destroy(t);
    }
    tb_free(p);
}

static void put(const char *dir, const char *name, const char *text)
{
    char *path = tb_asprintf("%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_true(fputs(text, f) >= 0);
    assert_int_equal(fclose(f), 0);
    tb_free(path);
}

static void test_folder(void **state)
{
    static const char json[] =
        "{" BL ",\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1},"
        "\"merges\":[]},\"added_tokens\":[{\"id\":2,\"content\":\"<eos>\"}]}";
    char dir[] = "/tmp/tb-tokenizer-XXXXXX";
    struct tb_tokenizer *t;
    struct tb_error e;
    assert_non_null(mkdtemp(dir));
    assert_int_equal(tb_tokenizer_create(dir, &t, &e), TB_ENOTFOUND);
    assert_non_null(strstr(e.msg, "tokenizer.json"));
    static const char *const others[] = {"tokenizer.model", "tiktoken.model", "vocab.json"};
    for (size_t i = 0; i < TB_ARRAY_LEN(others); i++) {
        char *path = tb_asprintf("%s/%s", dir, others[i]);
        put(dir, others[i], "");
        assert_int_equal(tb_tokenizer_create(dir, &t, &e), TB_EUNSUPPORTED);
        assert_non_null(strstr(e.msg, others[i]));
        assert_int_equal(unlink(path), 0);
        tb_free(path);
    }
    put(dir, "tokenizer.json", json);
    assert_int_equal(tb_tokenizer_create(dir, &t, &e), 0);
    assert_int_equal(tb_tokenizer_eos_id(t), -1);
    tb_tokenizer_destroy(t);
    static const struct {
        const char *config;
        int32_t eos;
    } cases[] = {
        {"{\"eos_token\":\"<eos>\"}", 2},
        {"{\"eos_token\":{\"content\":\"b\"}}", 1},
        {"{\"eos_token\":null}", -1},
        {"{\"eos_token\":\"unknown\"}", -1},
        {"{}", -1},
    };
    for (size_t i = 0; i < TB_ARRAY_LEN(cases); i++) {
        put(dir, "tokenizer_config.json", cases[i].config);
        assert_int_equal(tb_tokenizer_create(dir, &t, &e), 0);
        assert_int_equal(tb_tokenizer_eos_id(t), cases[i].eos);
        tb_tokenizer_destroy(t);
    }
    put(dir, "tokenizer_config.json", "{\"eos_token\":");
    assert_int_equal(tb_tokenizer_create(dir, &t, &e), TB_ECORRUPT);
    assert_null(t);
    assert_non_null(strstr(e.msg, "tokenizer_config.json"));

    static const char *const files[] = {"tokenizer.json", "tokenizer_config.json"};
    for (size_t i = 0; i < TB_ARRAY_LEN(files); i++) {
        char *path = tb_asprintf("%s/%s", dir, files[i]);
        assert_int_equal(unlink(path), 0);
        tb_free(path);
    }
    char *path = tb_asprintf("%s/tokenizer.json", dir);
    assert_int_equal(mkdir(path, 0700), 0); /* a folder in the file's place */
    assert_int_equal(tb_tokenizer_create(dir, &t, &e), TB_EIO);
    assert_int_equal(rmdir(path), 0);
    tb_free(path);
    assert_int_equal(rmdir(dir), 0);
}

static void test_utf8(void **state)
{
    static const struct {
        const char *in;
        size_t n;
        const char *out;
        size_t tail;
    } cases[] = {
        {"", 0, "", 0},
        {"abc", 3, "abc", 0},
        {"\xC3\xA9", 2, "\xC3\xA9", 0},
        {"a\xC3", 2, "a\xEF\xBF\xBD", 1},
        {"\xF0\x9F\x98", 3, "\xEF\xBF\xBD", 3},
        {"\xF0\x9F\x98\x80", 4, "\xF0\x9F\x98\x80", 0},
        {"\xF0\x9F\x98x", 4, "\xEF\xBF\xBDx", 0},
        {"\xE2\x82", 2, "\xEF\xBF\xBD", 2},
        {"\x80", 1, "\xEF\xBF\xBD", 0},
        {"\x80\x80", 2, "\xEF\xBF\xBD\xEF\xBF\xBD", 0},
        {"\xC0\xAF", 2, "\xEF\xBF\xBD\xEF\xBF\xBD", 0},
        {"\xE0\x80", 2, "\xEF\xBF\xBD\xEF\xBF\xBD", 0},
        {"\xED\xA0\x80", 3, "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD", 0},
        {"\xF4\x90", 2, "\xEF\xBF\xBD\xEF\xBF\xBD", 0},
        {"\xF5", 1, "\xEF\xBF\xBD", 0},
        {"a\0b", 3, "a\0b", 0},
        {"\xC3\xC3\xA9", 3, "\xEF\xBF\xBD\xC3\xA9", 0},
    };
    for (size_t i = 0; i < TB_ARRAY_LEN(cases); i++) {
        struct tb_buf b;
        tb_buf_init(&b, 100);
        assert_int_equal(tb_utf8_append(&b, cases[i].in, cases[i].n), 0);
        if (memchr(cases[i].in, 0, cases[i].n)) {
            assert_int_equal(b.n, cases[i].n);
            assert_memory_equal(b.p, cases[i].out, b.n);
        } else {
            assert_int_equal(b.n, strlen(cases[i].out));
            if (b.n) assert_string_equal(b.p, cases[i].out);
        }
        assert_int_equal(tb_utf8_incomplete_tail(cases[i].in, cases[i].n), cases[i].tail);
        tb_buf_fini(&b);
    }
    struct tb_buf small;
    tb_buf_init(&small, 2);
    assert_int_equal(tb_utf8_append(&small, "\x80", 1), TB_ETOOBIG);
    tb_buf_fini(&small);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_recorded_cases),
        cmocka_unit_test(test_byte_map),
        cmocka_unit_test(test_ids),
        cmocka_unit_test(test_sentencepiece),
        cmocka_unit_test(test_sentencepiece_text),
        cmocka_unit_test(test_refused_decoders),
        cmocka_unit_test(test_malformed),
        cmocka_unit_test(test_damage),
        cmocka_unit_test(test_folder),
        cmocka_unit_test(test_utf8),
    };
    return cmocka_run_group_tests_name("tokenizer decode", tests, NULL, NULL);
}
