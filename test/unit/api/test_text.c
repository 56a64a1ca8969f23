/*
 * Tokens to text: stop strings within and across tokens, against a search in the whole text; whole
 * characters; special tokens. The demo model's tokenizer.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "api/llm/llm.h"
#include "util/philox.h"

static struct tb_tokenizer *tok;

static int setup(void **state)
{
    struct tb_error e;
    (void)state;
    if (tb_tokenizer_create(TB_DEMO_MODEL, &tok, &e)) fail_msg("%s", e.msg);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    tb_tokenizer_destroy(tok);
    return 0;
}

static struct tb_ids encode(const char *text)
{
    struct tb_ids ids;
    struct tb_error e;
    tb_ids_init(&ids);
    if (tb_tokenizer_encode(tok, tb_span_str(text), 0, &ids, &e)) fail_msg("%s", e.msg);
    return ids;
}

/* The token that is one byte. */
static int32_t byte_token(unsigned char c)
{
    struct tb_span s;
    for (int32_t id = 0; id < tb_tokenizer_vocab_size(tok); id++)
        if (!tb_tokenizer_token_bytes(tok, id, &s) && s.n == 1 && (unsigned char)s.p[0] == c)
            return id;
    fail_msg("no token is the byte %u alone", (unsigned)c);
    return -1;
}

/* Feeds tokens until a stop is found, as the engine does; every piece must be UTF-8 by itself. */
static void run(const int32_t *ids, size_t n, const struct tb_span *stops, size_t n_stops,
                struct tb_buf *out, int *hit)
{
    struct tb_stop_set *set = NULL;
    struct tb_llm_text x;
    struct tb_error e;
    if (n_stops) assert_int_equal(tb_stop_set_create(tok, stops, n_stops, &set, &e), 0);
    tb_llm_text_init(&x, tok, set);
    tb_buf_init(out, 1 << 20);
    tb_buf_puts(out, "");
    for (size_t i = 0; i < n && x.stop.hit < 0; i++) {
        size_t before = out->n;
        tb_llm_text_feed(&x, ids[i], out);
        struct tb_buf again;
        tb_buf_init(&again, 1 << 20);
        tb_buf_puts(&again, "");
        tb_utf8_append(&again, out->p + before, out->n - before);
        assert_int_equal(again.n, out->n - before);
        tb_buf_fini(&again);
    }
    tb_llm_text_end(&x, out);
    *hit = x.stop.hit;
    tb_llm_text_fini(&x);
    tb_stop_set_destroy(set);
}

static void expect(const char *fed, const char *stop, const char *want, bool found)
{
    struct tb_ids ids = encode(fed);
    struct tb_span s = stop ? tb_span_str(stop) : (struct tb_span){NULL, 0};
    struct tb_buf out;
    int hit;
    run(ids.p, ids.n, &s, stop != NULL, &out, &hit);
    assert_int_equal(out.n, strlen(want));
    assert_memory_equal(out.p, want, out.n);
    assert_int_equal(hit >= 0, found);
    tb_buf_fini(&out);
    tb_ids_fini(&ids);
}

static void test_stops(void **state)
{
    (void)state;
    expect("What is the capital of France?", NULL, "What is the capital of France?", false);
    expect("What is the capital of France?", "capital of", "What is the ", true);
    expect("What is the capital of France?", "t is", "Wha", true);
    expect("What is the capital of France?", "W", "", true);
    expect("What is the capital of France?", "?", "What is the capital of France", true);
    expect("What is the capital of France?", "France? ", "What is the capital of France?", false);
    expect("ababababc", "ababc", "abab", true);
    expect("na\xc3\xafve \xf0\x9f\x99\x82!", "\xf0\x9f\x99\x82", "na\xc3\xafve ", true);
}

static void test_any_stop(void **state)
{
    static const char text[] = "user: spell the word moon.\nassistant: m-o-o-n\nuser: and noon?";
    struct tb_ids ids = encode(text);
    (void)state;
    for (size_t from = 0; from + 1 < sizeof(text); from++) {
        for (size_t n = 1; n <= 8 && from + n < sizeof(text); n++) {
            struct tb_span stops[2] = {{text + from, n}, TB_SPAN_LIT("zzz")};
            char *stop = tb_strndup(text + from, n);
            struct tb_buf out;
            int hit;
            run(ids.p, ids.n, stops, 2, &out, &hit);
            assert_int_equal(hit, 0);
            assert_int_equal(out.n, (size_t)(strstr(text, stop) - text));
            assert_memory_equal(out.p, text, out.n);
            tb_buf_fini(&out);
            tb_free(stop);
        }
    }
    tb_ids_fini(&ids);
}

/* With byte fallback: a run of byte tokens is text once it is over, and is cut by a stop; the text
 * goes on from its prompt, so the space at its beginning stays. */
static void test_byte_tokens(void **state)
{
    static const char json[] =
        "{\"decoder\":{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Replace\",\"pattern\":{\"String\":"
        "\"\\u2581\"},\"content\":\" \"},{\"type\":\"ByteFallback\"},{\"type\":\"Fuse\"},{\"type\":\"Strip\","
        "\"content\":\" \",\"start\":1,\"stop\":0}]},\"model\":{\"type\":\"BPE\",\"vocab\":{\"<0xC3>\":0,"
        "\"<0xA9>\":1,\"\\u2581the\":2},\"merges\":[]},\"added_tokens\":[{\"id\":3,\"content\":\"<s>\","
        "\"special\":true}]}";
    static const struct {
        const char *stop, *want;
        size_t n;
        int32_t ids[8];
    } cases[] = {
        {NULL, " the\u00e9 the", 4, {2, 0, 1, 2}},  {NULL, "\u00e9", 3, {0, 3, 1}},
        {NULL, "\ufffd\ufffd\ufffd", 3, {0, 1, 0}}, {"\u00e9", " the\ufffd", 4, {2, 0, 0, 1}},
        {"e\u00e9", " th", 3, {2, 0, 1}},           {"<s>", "\u00e9", 3, {0, 1, 3}},
    };
    struct tb_tokenizer *demo = tok;
    struct tb_error e;
    (void)state;
    if (tb_tokenizer_create_from_json("sp", TB_SPAN_LIT(json), &tok, &e)) fail_msg("%s", e.msg);
    for (size_t i = 0; i < TB_ARRAY_LEN(cases); i++) {
        struct tb_span s = cases[i].stop ? tb_span_str(cases[i].stop) : (struct tb_span){NULL, 0};
        struct tb_buf out;
        int hit;
        run(cases[i].ids, cases[i].n, &s, cases[i].stop != NULL, &out, &hit);
        assert_string_equal(out.p, cases[i].want);
        assert_int_equal(hit >= 0, cases[i].stop != NULL);
        tb_buf_fini(&out);
    }
    tb_tokenizer_destroy(tok);
    tok = demo;
}

static void test_special_tokens(void **state)
{
    (void)state;
    expect("a<|im_end|>\n<|im_start|>user\nb", NULL, "a\nuser\nb", false);
    expect("a<|im_end|>\nb", "<|im_end|>", "a", true);
    expect("a<|im_end|>\nb", "im_end", "a", true);
    expect("abc<|im_end|>\nb", "c<|im_end|>\n", "ab", true);
    expect("a<|im_end|>\nb", "a\n", "a\nb", false); /* the engine does not stop here either */
    expect("a<|im_end|>\nb", "|>\nc", "a\nb", false);
}

static void test_characters(void **state)
{
    static const unsigned char emoji[] = {0xf0, 0x9f, 0x99, 0x82};
    struct tb_llm_text x;
    struct tb_buf out;
    (void)state;
    tb_llm_text_init(&x, tok, NULL);
    tb_buf_init(&out, 100);
    for (int i = 0; i < 4; i++) {
        assert_int_equal(out.n, 0);
        tb_llm_text_feed(&x, byte_token(emoji[i]), &out);
    }
    assert_memory_equal(out.p, emoji, 4);
    tb_llm_text_feed(&x, byte_token(0xe2), &out);
    assert_int_equal(out.n, 4);
    tb_llm_text_feed(&x, -1, &out); /* no token at all */
    tb_llm_text_feed(&x, tb_tokenizer_vocab_size(tok) + 7, &out);
    tb_llm_text_end(&x, &out);
    assert_int_equal(out.n, 7);
    assert_memory_equal(out.p + 4, "\xef\xbf\xbd", 3);
    tb_llm_text_fini(&x);
    tb_buf_fini(&out);
}

/* Whatever the tokens are, the pieces are UTF-8, and together the whole. */
static void test_random_tokens(void **state)
{
    struct tb_span stops[] = {TB_SPAN_LIT("\xe2\x82"), TB_SPAN_LIT("ab"), TB_SPAN_LIT("\n\n\n")};
    (void)state;
    for (uint64_t seed = 0; seed < 300; seed++) {
        int32_t ids[200];
        struct tb_buf all, want, out;
        int hit;
        tb_buf_init(&all, 1 << 20);
        for (size_t i = 0; i < TB_ARRAY_LEN(ids); i++) {
            struct tb_span s;
            ids[i] = (int32_t)(tb_philox_draw(seed, 0, (uint32_t)i, 0) *
                               (float)tb_tokenizer_vocab_size(tok));
            if (!tb_tokenizer_is_special(tok, ids[i]) && !tb_tokenizer_token_bytes(tok, ids[i], &s))
                tb_buf_append(&all, s.p, s.n);
        }
        tb_buf_init(&want, 1 << 20);
        tb_utf8_append(&want, all.p, all.n);
        run(ids, TB_ARRAY_LEN(ids), stops, 0, &out, &hit);
        assert_int_equal(out.n, want.n);
        assert_memory_equal(out.p, want.p, want.n);
        tb_buf_fini(&out);
        run(ids, TB_ARRAY_LEN(ids), stops, TB_ARRAY_LEN(stops), &out, &hit);
        assert_true(out.n <= want.n);
        tb_buf_fini(&out);
        tb_buf_fini(&want);
        tb_buf_fini(&all);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_stops),          cmocka_unit_test(test_any_stop),
        cmocka_unit_test(test_special_tokens), cmocka_unit_test(test_characters),
        cmocka_unit_test(test_random_tokens),  cmocka_unit_test(test_byte_tokens),
    };
    return cmocka_run_group_tests_name("text", tests, setup, teardown);
}
