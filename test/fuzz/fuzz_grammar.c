/* Schemas with their patterns: what compiles gives a text in the tokens it promised, whichever of
 * the allowed tokens are taken. */
#include "fuzz.h"
#include "grammar/grammar.h"
#include "util/buf.h"
#include "util/mem.h"

static struct tb_tokenizer *tok;
static struct tb_vocab *vocab;

/* Each printable character is a token, and a few longer texts are. */
static void make_vocab(void)
{
    static const char *const words[] = {"{\\\"", "\\\":", "true", "null",
                                        ",\\\"", "ab",    "0.",   "]}"};
    struct tb_error e;
    struct tb_buf b;
    int id = 0;
    tb_buf_init(&b, 1 << 16);
    tb_buf_puts(&b, "{\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false},"
                    "\"decoder\":{\"type\":\"ByteLevel\"},\"model\":{\"type\":\"BPE\",\"merges\":[]"
                    ",\"vocab\":{\"\\u0120\":0"); /* the space */
    for (int c = 0x21; c < 0x7f; c++)
        tb_buf_printf(&b, ",\"%s%c\":%d", c == '"' || c == '\\' ? "\\" : "", c, ++id);
    for (size_t i = 0; i < TB_ARRAY_LEN(words); i++)
        tb_buf_printf(&b, ",\"%s\":%d", words[i], ++id);
    tb_buf_puts(&b, "}}}");
    TB_BUG_ON(
        tb_tokenizer_create_from_json("tokenizer.json", (struct tb_span){b.p, b.n}, &tok, &e));
    TB_BUG_ON(tb_vocab_create(tok, tb_tokenizer_vocab_size(tok), &vocab, &e));
    tb_buf_fini(&b);
}

/* The allowed token number `pick` (modulo how many there are), -1 when there is none. */
static int32_t choose(const uint64_t *mask, uint32_t pick)
{
    int32_t n = tb_vocab_size(vocab), count = 0;
    for (int32_t i = 0; i < n; i++)
        count += mask[i / 64] >> i % 64 & 1;
    for (int32_t i = 0, k = count ? (int32_t)(pick % (uint32_t)count) : 0; count && i < n; i++)
        if (mask[i / 64] >> i % 64 & 1 && k-- == 0) return i;
    return -1;
}

static void walk(struct tb_grammar *g, uint32_t left, uint32_t seed)
{
    uint32_t state = tb_grammar_start(g);
    for (; !tb_grammar_final(g, state); left--) {
        if (left == 0) {
            TB_BUG_ON(!tb_grammar_complete(g, state));
            return;
        }
        const uint64_t *mask = tb_grammar_mask(g, state, left);
        if (!mask) return; /* too much memory */
        int32_t token = choose(mask, seed = seed * 1664525 + 1013904223);
        if (token < 0) {
            TB_BUG_ON(!tb_grammar_complete(g, state));
            return;
        }
        state = tb_grammar_accept(g, state, token);
        TB_BUG_ON(state == 0);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct tb_grammar *g = NULL;
    struct tb_error err = {0};
    if (!vocab) make_vocab();
    int rc = tb_grammar_create_schema(vocab, (struct tb_span){(const char *)data, n}, &g, &err);
    TB_BUG_ON((rc == 0) != (g != NULL) || (rc != 0) != (err.code != 0));
    if (!g) return 0;
    uint32_t shortest = tb_grammar_shortest(g);
    for (uint32_t more = 0; shortest < 200 && more < 40; more += 13)
        walk(g, shortest + more, more + (uint32_t)n);
    tb_grammar_unref(g);
    return 0;
}
