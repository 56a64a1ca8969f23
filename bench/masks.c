/*
 * Times the masks of grammars: which of a tokenizer's tokens may come next, at each step of texts
 * that are drawn at random from what is allowed.
 *
 *     bench/masks TOKENIZER.JSON [TEXTS]
 *
 * For each schema: compiling it, the masks of the first text, and those of the other TEXTS (100).
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "grammar/grammar.h"
#include "util/buf.h"
#include "util/mem.h"
#include "util/philox.h"

#define TOKENS 256 /* of a text, at most */

static const struct {
    const char *name, *schema;
} SCHEMAS[] = {
    {"any object", NULL},
    {"free strings",
     "{\"properties\":{\"name\":{\"type\":\"string\"},\"text\":{\"type\":\"string\"},\"tags\":{"
     "\"type\":\"array\",\"items\":{\"type\":\"string\"}}},\"required\":[\"name\",\"text\",\"tags\"]"
     "}"},
    {"bounded strings",
     "{\"properties\":{\"name\":{\"type\":\"string\",\"minLength\":1,\"maxLength\":30},\"text\":{"
     "\"type\":\"string\",\"maxLength\":200},\"n\":{\"type\":\"integer\",\"minimum\":0,\"maximum\":"
     "100000}},\"required\":[\"name\",\"text\",\"n\"]}"},
    {"patterns",
     "{\"properties\":{\"mail\":{\"type\":\"string\",\"format\":\"email\"},\"page\":{\"type\":"
     "\"string\",\"format\":\"uri\"},\"id\":{\"type\":\"string\",\"pattern\":\"^[a-z_]{1,40}$\"}},"
     "\"required\":[\"mail\",\"page\",\"id\"]}"},
    {"choices and dates",
     "{\"type\":\"array\",\"minItems\":2,\"maxItems\":4,\"items\":{\"properties\":{\"kind\":{"
     "\"enum\":[\"circle\",\"square\",\"triangle\"]},\"day\":{\"type\":\"string\",\"format\":"
     "\"date\"},\"size\":{\"type\":\"number\",\"minimum\":0,\"maximum\":100}},\"required\":["
     "\"kind\",\"day\",\"size\"]}}"},
};

static void read_all(const char *path, struct tb_buf *b)
{
    FILE *f = fopen(path, "rb");
    size_t n;
    if (!f) exit((perror(path), 2));
    tb_buf_init(b, 1u << 30);
    while (!tb_buf_reserve(b, 1 << 16) && (n = fread(b->p + b->n, 1, 1 << 16, f)) > 0)
        b->n += n;
    fclose(f);
}

static void die(const struct tb_error *e)
{
    fprintf(stderr, "%s\n", e->msg);
    exit(1);
}

/* Of this thread's time, so that others' work does not count. */
static double now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

/* One of the mask's tokens, any as likely as another. */
static int32_t draw(const uint64_t *mask, int32_t n_tokens, uint32_t text, uint32_t step)
{
    uint32_t ctr[4] = {text, step, 0, 0}, key[2] = {7, 11}, r[4];
    uint64_t n = 0;
    for (int32_t i = 0; i < n_tokens; i++)
        n += mask[i / 64] >> i % 64 & 1;
    tb_philox4x32(ctr, key, r);
    uint64_t k = n ? r[0] % n : 0;
    for (int32_t i = 0; n && i < n_tokens; i++)
        if ((mask[i / 64] >> i % 64 & 1) && k-- == 0) return i;
    return -1;
}

/* Appends the times of a text's masks to ms; returns how many. */
static size_t walk(struct tb_grammar *g, int32_t n_tokens, uint32_t text, double *ms)
{
    uint32_t state = tb_grammar_start(g), left = TOKENS;
    size_t n = 0;
    while (left && !tb_grammar_final(g, state)) {
        double began = now_ms();
        const uint64_t *mask = tb_grammar_mask(g, state, left);
        ms[n++] = now_ms() - began;
        int32_t token = mask ? draw(mask, n_tokens, text, left) : -1;
        if (token < 0) exit((fprintf(stderr, "no token\n"), 1));
        state = tb_grammar_accept(g, state, token);
        left--;
    }
    return n;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print(const char *what, double *ms, size_t n)
{
    double sum = 0;
    qsort(ms, n, sizeof(*ms), by_size);
    for (size_t i = 0; i < n; i++)
        sum += ms[i];
    printf("  %-12s %6zu masks, ms: mean %.3f, median %.3f, 99 %% %.3f, most %.3f\n", what, n,
           sum / (double)n, ms[n / 2], ms[n * 99 / 100], ms[n - 1]);
}

int main(int argc, char **argv)
{
    struct tb_tokenizer *t;
    struct tb_vocab *v;
    struct tb_error e = {0};
    struct tb_buf json;
    uint32_t texts = argc == 3 ? (uint32_t)strtoul(argv[2], NULL, 10) : 100;
    if (argc < 2 || argc > 3 || texts == 0) return 2;
    read_all(argv[1], &json);
    if (tb_tokenizer_create_from_json(argv[1], (struct tb_span){json.p, json.n}, &t, &e)) die(&e);
    double began = now_ms();
    int32_t n_tokens = tb_tokenizer_vocab_size(t);
    if (tb_vocab_create(t, n_tokens, &v, &e)) die(&e);
    printf("%d tokens, sorted in %.0f ms\n", n_tokens, now_ms() - began);
    double *ms = tb_calloc((size_t)texts * TOKENS + TOKENS, sizeof(*ms));
    for (size_t i = 0; i < TB_ARRAY_LEN(SCHEMAS); i++) {
        struct tb_grammar *g;
        const char *schema = SCHEMAS[i].schema;
        began = now_ms();
        int rc = schema ? tb_grammar_create_schema(v, tb_span_str(schema), &g, &e)
                        : tb_grammar_create_json(v, &g, &e);
        if (rc) die(&e);
        printf("%s: compiled in %.2f ms\n", SCHEMAS[i].name, now_ms() - began);
        size_t n = walk(g, n_tokens, 0, ms);
        print("first text", ms, n);
        n = 0;
        for (uint32_t k = 1; k <= texts; k++)
            n += walk(g, n_tokens, k, ms + n);
        print("others", ms, n);
        tb_grammar_unref(g);
    }
    tb_free(ms);
    tb_vocab_unref(v);
    tb_tokenizer_destroy(t);
    tb_buf_fini(&json);
    return 0;
}
