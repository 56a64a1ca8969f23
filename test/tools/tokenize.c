/*
 * Encodes texts from standard input, or decodes ids, for test/e2e/test_tokenizer.py, which compares
 * with another implementation; or measures how fast one file is encoded.
 *
 *     tokenize TOKENIZER.JSON           texts and ids are preceded by their number, all int32
 *     tokenize -d TOKENIZER.JSON        the other way; before the number come decoding's flags
 *     tokenize TOKENIZER.JSON FILE      prints the best of 5 runs, by lines and in pieces of 1 MiB
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tokenizer/tokenizer.h"
#include "util/mem.h"

#define RUNS 5

static struct tb_span read_all(const char *path)
{
    FILE *f = fopen(path, "rb");
    struct tb_buf b;
    size_t n;
    if (!f) exit((perror(path), 2));
    tb_buf_init(&b, 1u << 30);
    while (!tb_buf_reserve(&b, 1 << 16) && (n = fread(b.p + b.n, 1, 1 << 16, f)) > 0)
        b.n += n;
    fclose(f);
    return (struct tb_span){b.p, b.n};
}

static void encode(const struct tb_tokenizer *t, struct tb_span text, struct tb_ids *ids)
{
    struct tb_error e;
    ids->n = 0;
    if (tb_tokenizer_encode(t, text, 0, ids, &e)) exit((fprintf(stderr, "%s\n", e.msg), 1));
}

/* Seconds for all of the text, in pieces that end at a line's end and have `piece` bytes or more.
 */
static double seconds(const struct tb_tokenizer *t, struct tb_span text, size_t piece,
                      struct tb_ids *ids)
{
    struct timespec a, b;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &a);
    while (text.n) {
        size_t n = TB_MIN(piece, text.n);
        const char *end = memchr(text.p + n - 1, '\n', text.n - n + 1);
        n = end ? (size_t)(end - text.p) + 1 : text.n;
        encode(t, (struct tb_span){text.p, n}, ids);
        text = (struct tb_span){text.p + n, text.n - n};
    }
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &b);
    return (double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec);
}

/* Token by token, whose pieces must be UTF-8 by themselves. */
static void stream(const struct tb_tokenizer *t, const int32_t *ids, size_t n, unsigned flags,
                   struct tb_buf *out)
{
    struct tb_decoder d;
    tb_decoder_init(&d, t, flags);
    for (size_t i = 0; i <= n; i++) {
        size_t at = out->n;
        if (i < n ? tb_decoder_feed(&d, ids[i], out) : tb_decoder_end(&d, out)) exit(1);
        if (out->n > at && !tb_utf8_valid(out->p + at, out->n - at))
            exit((fprintf(stderr, "a piece is no UTF-8\n"), 1));
    }
    tb_decoder_fini(&d);
}

static void decode_all(const struct tb_tokenizer *t)
{
    int32_t head[2], *ids = NULL;
    struct tb_buf whole, pieces;
    tb_buf_init(&whole, 1u << 30);
    tb_buf_init(&pieces, 1u << 30);
    while (fread(head, sizeof(head), 1, stdin) == 1) {
        size_t n = (size_t)head[1];
        ids = tb_realloc(ids, (n + 1) * sizeof(*ids));
        if (fread(ids, sizeof(*ids), n, stdin) != n) exit(2);
        tb_buf_reset(&whole);
        tb_buf_reset(&pieces);
        if (tb_tokenizer_decode(t, ids, n, (unsigned)head[0], &whole)) exit(1);
        stream(t, ids, n, (unsigned)head[0], &pieces);
        if (whole.n != pieces.n || (whole.n && memcmp(whole.p, pieces.p, whole.n) != 0))
            exit((fprintf(stderr, "a stream is not the whole\n"), 1));
        int32_t size = (int32_t)whole.n;
        fwrite(&size, sizeof(size), 1, stdout);
        if (whole.n) fwrite(whole.p, 1, whole.n, stdout);
    }
    tb_buf_fini(&whole);
    tb_buf_fini(&pieces);
    tb_free(ids);
}

int main(int argc, char **argv)
{
    struct tb_tokenizer *t;
    struct tb_error e;
    struct tb_ids ids;
    int32_t n;
    bool decode = argc == 3 && strcmp(argv[1], "-d") == 0;
    tb_ids_init(&ids);
    if (argc != 2 && argc != 3) return 2;
    if (decode) argv++;
    struct tb_span json = read_all(argv[1]);
    if (tb_tokenizer_create_from_json(argv[1], json, &t, &e))
        exit((fprintf(stderr, "%s\n", e.msg), 2));
    if (decode) {
        decode_all(t);
    } else if (argc == 3) {
        struct tb_span text = read_all(argv[2]);
        double lines = 1e9, whole = 1e9;
        for (int i = 0; i < RUNS; i++) {
            lines = TB_MIN(lines, seconds(t, text, 1, &ids));
            whole = TB_MIN(whole, seconds(t, text, 1 << 20, &ids));
        }
        printf("lines %.1f MB/s, 1 MiB pieces %.1f MB/s\n", (double)text.n / lines / 1e6,
               (double)text.n / whole / 1e6);
        tb_free((void *)(uintptr_t)text.p);
    }
    char *text = NULL;
    while (argc == 2 && fread(&n, sizeof(n), 1, stdin) == 1) {
        text = tb_realloc(text, (size_t)n + 1);
        if (fread(text, 1, (size_t)n, stdin) != (size_t)n) return 2;
        encode(t, (struct tb_span){text, (size_t)n}, &ids);
        n = (int32_t)ids.n;
        fwrite(&n, sizeof(n), 1, stdout);
        fwrite(ids.p, sizeof(*ids.p), ids.n, stdout);
    }
    tb_free(text);
    tb_ids_fini(&ids);
    tb_tokenizer_destroy(t);
    tb_free((void *)(uintptr_t)json.p);
    return 0;
}
