/*
 * Byte-pair encoding: the bytes of a pre-token (byte-level), or its characters
 * (SentencePiece-style), become ids, then the adjacent pair of lowest rank is merged, leftmost
 * first, until none can be. A heap of candidate merges over a linked list of symbols keeps a
 * pre-token of any length at O(n log n).
 *
 * struct tb_bpe owns its tables and is immutable; the working memory of a call is its own. Thread:
 * any.
 */
#include <string.h>

#include <utf8proc.h>

#include "tokenizer/internal.h"
#include "util/map.h"
#include "util/mem.h"

struct merge {
    uint64_t pair; /* left id << 32 | right id; EMPTY where free */
    uint32_t rank;
    int32_t id; /* what the pair becomes */
};
#define EMPTY UINT64_MAX

struct tb_bpe {
    struct merge *merges; /* [mask + 1], open addressing */
    size_t mask;
    int32_t byte_id[256]; /* -1 where the vocabulary lacks the byte */
    struct tb_map whole;  /* bytes of a token to its id + 1 */
    bool ignore_merges;   /* a pre-token that is a token is taken at once */
    bool byte_level;      /* symbols are bytes; else characters, and what follows */
    bool fallback;        /* a character that is no token becomes its bytes' tokens */
    bool fuse_unk;        /* neighbours without a token are one unknown token */
    bool words;           /* no merge joins a word's end and the U+2581 of the next */
    int32_t unk;          /* -1 without */
    int32_t *near;        /* [NEAR] ids of the first characters; -1 where there is none */
};
#define NEAR 0x3100 /* ids of characters below it are looked up without hashing */

struct symbol {
    int32_t id;
    int32_t prev, next; /* -1 at the ends */
    bool gone;
};

struct candidate {
    uint32_t rank;
    int32_t at; /* left symbol */
    int32_t id; /* what the pair became when this was pushed */
};

static size_t slot_of(uint64_t pair)
{
    pair ^= pair >> 31;
    pair *= 0x9E3779B97F4A7C15ull;
    return (size_t)(pair >> 20);
}

static const struct merge *find_merge(const struct tb_bpe *b, int32_t left, int32_t right)
{
    uint64_t pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    for (size_t i = slot_of(pair) & b->mask; b->merges[i].pair != EMPTY; i = (i + 1) & b->mask)
        if (b->merges[i].pair == pair) return &b->merges[i];
    return NULL;
}

/* Later duplicates of a pair replace the earlier one, as they do in a dictionary. */
static void add_merge(struct tb_bpe *b, int32_t left, int32_t right, uint32_t rank, int32_t id)
{
    uint64_t pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    size_t i = slot_of(pair) & b->mask;
    while (b->merges[i].pair != EMPTY && b->merges[i].pair != pair)
        i = (i + 1) & b->mask;
    b->merges[i] = (struct merge){pair, rank, id};
}

static int32_t find_whole(const struct tb_bpe *b, const char *p, size_t n)
{
    return (int32_t)(intptr_t)tb_map_get(&b->whole, p, n) - 1;
}

/* The id of a token as the file spells it, or -1. tmp has room for n bytes. */
static int32_t find_spelt(const struct tb_bpe *b, const struct tb_tokenizer *t, const char *s,
                          size_t n, char *tmp)
{
    size_t k;
    if (!b->byte_level) return find_whole(b, s, n);
    return tb_tokenizer_unmap(t, s, n, tmp, &k) ? find_whole(b, tmp, k) : -1;
}

/* Entry i of model.merges, "a b" or ["a","b"], as two runs of bytes. */
static bool merge_parts(const json_t *m, struct tb_span part[2])
{
    if (json_is_string(m)) {
        const char *s = json_string_value(m), *space = strchr(s, ' ');
        size_t n = json_string_length(m);
        if (!space) return false;
        part[0] = (struct tb_span){s, (size_t)(space - s)};
        part[1] = (struct tb_span){space + 1, n - part[0].n - 1};
        return part[0].n && part[1].n && !memchr(part[1].p, ' ', part[1].n);
    }
    if (!json_is_array(m) || json_array_size(m) != 2) return false;
    for (size_t k = 0; k < 2; k++) {
        const json_t *s = json_array_get(m, k);
        if (!json_is_string(s) || !json_string_length(s)) return false;
        part[k] = (struct tb_span){json_string_value(s), json_string_length(s)};
    }
    return true;
}

static int load_merges(struct tb_bpe *b, const struct tb_tokenizer *t, const char *name,
                       const json_t *merges, struct tb_error *e)
{
    struct tb_buf tmp;
    int rc = 0;
    tb_buf_init(&tmp, SIZE_MAX / 2);
    for (size_t i = 0; i < json_array_size(merges) && !rc; i++) {
        struct tb_span part[2];
        if (!merge_parts(json_array_get(merges, i), part)) {
            rc = tb_error_set(e, TB_ECORRUPT, "%s: model.merges[%zu] is not a pair of tokens", name,
                              i);
            break;
        }
        size_t n = part[0].n + part[1].n;
        tb_buf_reset(&tmp);
        if (tb_buf_reserve(&tmp, 2 * n)) {
            rc = tb_error_set(e, TB_ENOMEM, "%s: out of memory for model.merges", name);
            break;
        }
        char *joined = tmp.p + n;
        memcpy(joined, part[0].p, part[0].n);
        memcpy(joined + part[0].n, part[1].p, part[1].n);
        bool word_ends =
            part[0].n < strlen(TB_MARK) ||
            memcmp(part[0].p + part[0].n - strlen(TB_MARK), TB_MARK, strlen(TB_MARK)) != 0;
        if (word_ends && tb_span_starts(part[1], TB_MARK)) b->words = false;
        int32_t left = find_spelt(b, t, part[0].p, part[0].n, tmp.p);
        int32_t right = find_spelt(b, t, part[1].p, part[1].n, tmp.p);
        int32_t id = find_spelt(b, t, joined, n, tmp.p);
        if (left < 0 || right < 0 || id < 0)
            rc = tb_error_set(e, TB_ECORRUPT,
                              "%s: model.merges[%zu] names a token that is not in model.vocab",
                              name, i);
        else
            add_merge(b, left, right, (uint32_t)i, id);
    }
    tb_buf_fini(&tmp);
    return rc;
}

static bool empty(const json_t *o)
{
    return !o || json_is_null(o) || (json_is_string(o) && json_string_length(o) == 0);
}

/* What the model says beside vocabulary and merges. */
static int load_options(struct tb_bpe *b, const char *name, const json_t *model, struct tb_error *e)
{
    static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    const json_t *dropout = json_object_get(model, "dropout");
    for (size_t i = 0; i < TB_ARRAY_LEN(affixes); i++) {
        if (!empty(json_object_get(model, affixes[i])))
            return tb_error_set(e, TB_EUNSUPPORTED, "%s: model.%s is not served", name, affixes[i]);
    }
    if (dropout && !json_is_null(dropout) && json_number_value(dropout) != 0.0)
        return tb_error_set(e, TB_EUNSUPPORTED, "%s: model.dropout is not served", name);
    b->ignore_merges = json_is_true(json_object_get(model, "ignore_merges"));
    b->fallback = json_is_true(json_object_get(model, "byte_fallback"));
    b->fuse_unk = json_is_true(json_object_get(model, "fuse_unk"));
    b->unk = -1;
    return 0;
}

/* Once the vocabulary is there: the ids of bytes and of the first characters, and of the unknown.
 */
static int load_characters(struct tb_bpe *b, const char *name, const json_t *model,
                           struct tb_error *e)
{
    const json_t *unk = json_object_get(model, "unk_token");
    char s[8];
    for (int i = 0; i < 256; i++) {
        int n = snprintf(s, sizeof(s), "<0x%02X>", (unsigned)i);
        b->byte_id[i] = find_whole(b, s, (size_t)n);
    }
    b->near = tb_malloc(NEAR * sizeof(*b->near));
    for (int c = 0; c < NEAR; c++) {
        utf8proc_ssize_t n = utf8proc_encode_char(c, (utf8proc_uint8_t *)s);
        b->near[c] = find_whole(b, s, (size_t)n);
    }
    b->words = b->near[0x2581] >= 0;
    if (empty(unk)) return 0;
    b->unk = find_whole(b, json_string_value(unk), json_string_length(unk));
    return b->unk >= 0
               ? 0
               : tb_error_set(e, TB_ECORRUPT, "%s: model.unk_token is not in model.vocab", name);
}

int tb_bpe_create(const struct tb_tokenizer *t, const char *name, const json_t *model,
                  struct tb_bpe **out, struct tb_error *e)
{
    const json_t *merges = json_object_get(model, "merges");
    *out = NULL;
    if (!json_is_array(merges))
        return tb_error_set(e, TB_ECORRUPT, "%s: model.merges is not an array", name);
    size_t slots = 16;
    while (slots < json_array_size(merges) * 2)
        slots *= 2;
    struct tb_bpe *b = tb_calloc(1, sizeof(*b));
    tb_map_init(&b->whole);
    b->mask = slots - 1;
    b->byte_level = t->byte_level;
    b->merges = tb_try_malloc(slots * sizeof(*b->merges));
    int rc = b->merges ? 0 : tb_error_set(e, TB_ENOMEM, "%s: out of memory for model.merges", name);
    if (!rc) rc = load_options(b, name, model, e);
    if (rc) goto out;
    for (size_t i = 0; i < slots; i++)
        b->merges[i].pair = EMPTY;
    for (int i = 0; i < 256; i++)
        b->byte_id[i] = -1;

    /* from the file again: an added token may have taken the id's place in the table, and a token
     * that is not spelt with the byte map can never come out of bytes */
    const char *key;
    json_t *v;
    json_t *vocab = json_object_get(model, "vocab");
    struct tb_buf tmp;
    tb_buf_init(&tmp, SIZE_MAX / 2);
    json_object_foreach(vocab, key, v)
    {
        size_t n = strlen(key), k;
        int32_t id = (int32_t)json_integer_value(v);
        tb_buf_reset(&tmp);
        if (tb_buf_reserve(&tmp, n)) {
            rc = tb_error_set(e, TB_ENOMEM, "%s: out of memory for model.vocab", name);
            break;
        }
        if (!t->byte_level) {
            tb_map_put(&b->whole, key, n, (void *)(intptr_t)(id + 1));
            continue;
        }
        if (!tb_tokenizer_unmap(t, key, n, tmp.p, &k)) continue;
        tb_map_put(&b->whole, tmp.p, k, (void *)(intptr_t)(id + 1));
        if (k == 1) b->byte_id[(unsigned char)tmp.p[0]] = id;
    }
    tb_buf_fini(&tmp);
    if (!rc && !t->byte_level) rc = load_characters(b, name, model, e);
    if (!rc) rc = load_merges(b, t, name, merges, e);
out:
    if (rc) {
        tb_bpe_destroy(b);
        return rc;
    }
    *out = b;
    return 0;
}

void tb_bpe_destroy(struct tb_bpe *b)
{
    if (!b) return;
    tb_map_fini(&b->whole);
    tb_free(b->merges);
    tb_free(b->near);
    tb_free(b);
}

/* ---- a heap ordered by rank, then position */

static bool before(struct candidate a, struct candidate b)
{
    return a.rank != b.rank ? a.rank < b.rank : a.at < b.at;
}

static void heap_push(struct candidate *h, size_t *n, struct candidate c)
{
    size_t i = (*n)++;
    while (i && before(c, h[(i - 1) / 2])) {
        h[i] = h[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    h[i] = c;
}

static struct candidate heap_pop(struct candidate *h, size_t *n)
{
    struct candidate top = h[0], last = h[--*n];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= *n) break;
        if (child + 1 < *n && before(h[child + 1], h[child])) child++;
        if (!before(h[child], last)) break;
        h[i] = h[child];
        i = child;
    }
    h[i] = last;
    return top;
}

static void consider(const struct tb_bpe *b, const struct symbol *s, int32_t at,
                     struct candidate *heap, size_t *n_heap)
{
    if (at < 0 || s[at].next < 0) return;
    const struct merge *m = find_merge(b, s[at].id, s[s[at].next].id);
    if (m) heap_push(heap, n_heap, (struct candidate){m->rank, at, m->id});
}

/* s[0..n) holds the symbols, linked. Every merge pushes at most two candidates: 3 n suffice.
 */
static void merge_all(const struct tb_bpe *b, struct symbol *s, int32_t n, struct candidate *heap)
{
    size_t n_heap = 0;
    for (int32_t i = 0; i + 1 < n; i++)
        consider(b, s, i, heap, &n_heap);
    while (n_heap) {
        struct candidate c = heap_pop(heap, &n_heap);
        int32_t right = s[c.at].next;
        if (s[c.at].gone || right < 0) continue;
        const struct merge *m = find_merge(b, s[c.at].id, s[right].id);
        if (!m || m->id != c.id || m->rank != c.rank) continue; /* a neighbour has changed since */
        s[c.at].id = m->id;
        s[c.at].next = s[right].next;
        s[right].gone = true;
        if (s[right].next >= 0) s[s[right].next].prev = c.at;
        consider(b, s, s[c.at].prev, heap, &n_heap);
        consider(b, s, c.at, heap, &n_heap);
    }
}

static void put(struct symbol *s, int32_t *n, int32_t id)
{
    s[*n] = (struct symbol){id, *n - 1, *n + 1, false};
    ++*n;
}

/* One symbol a byte; without an unknown token one that the vocabulary lacks is dropped. */
static int32_t put_bytes(const struct tb_bpe *b, const char *p, size_t n, struct symbol *s)
{
    int32_t k = 0;
    for (size_t i = 0; i < n; i++) {
        int32_t id = b->byte_id[(unsigned char)p[i]];
        if (id >= 0) put(s, &k, id);
    }
    return k;
}

/* True if the n bytes at p all have tokens, which are then put. */
static bool put_fallback(const struct tb_bpe *b, const char *p, size_t n, struct symbol *s,
                         int32_t *k)
{
    for (size_t i = 0; i < n; i++) {
        if (b->byte_id[(unsigned char)p[i]] < 0) return false;
    }
    for (size_t i = 0; i < n; i++)
        put(s, k, b->byte_id[(unsigned char)p[i]]);
    return true;
}

/* One symbol a character of valid UTF-8. An unknown one waits for the next that is known or
 * unknown, as in the library: bytes of characters in between come before it. */
static int32_t put_characters(const struct tb_bpe *b, const char *p, size_t n, struct symbol *s)
{
    int32_t k = 0;
    bool unknown = false;
    for (size_t i = 0; i < n;) {
        utf8proc_int32_t c;
        size_t len = (size_t)utf8proc_iterate((const utf8proc_uint8_t *)p + i,
                                              (utf8proc_ssize_t)(n - i), &c);
        int32_t id = c < NEAR ? b->near[c] : find_whole(b, p + i, len);
        if (id >= 0) {
            if (unknown) put(s, &k, b->unk);
            unknown = false;
            put(s, &k, id);
        } else if (!(b->fallback && put_fallback(b, p + i, len, s, &k)) && b->unk >= 0) {
            if (unknown && !b->fuse_unk) put(s, &k, b->unk);
            unknown = true;
        }
        i += len;
    }
    if (unknown) put(s, &k, b->unk);
    return k;
}

static int encode_word(const struct tb_bpe *b, const char *p, size_t n, struct tb_ids *out)
{
    struct symbol few[64], *s = few;
    struct candidate few_heap[3 * TB_ARRAY_LEN(few)], *heap = few_heap;
    int rc = 0;
    if (n > INT32_MAX / 4) return TB_ETOOBIG;
    if (n > TB_ARRAY_LEN(few)) {
        s = tb_try_malloc(n * sizeof(*s));
        heap = tb_try_malloc(3 * n * sizeof(*heap));
        if (!s || !heap) {
            rc = TB_ENOMEM;
            goto out;
        }
    }
    int32_t k = b->byte_level ? put_bytes(b, p, n, s) : put_characters(b, p, n, s);
    if (k) {
        s[k - 1].next = -1;
        merge_all(b, s, k, heap);
    }
    for (int32_t i = k ? 0 : -1; i >= 0 && !rc; i = s[i].next)
        rc = tb_ids_push(out, s[i].id);
out:
    if (s != few) tb_free(s);
    if (heap != few_heap) tb_free(heap);
    return rc;
}

int tb_bpe_encode(const struct tb_bpe *b, const char *p, size_t n, struct tb_ids *out)
{
    if (b->ignore_merges) {
        int32_t id = find_whole(b, p, n);
        if (id >= 0) return tb_ids_push(out, id);
    }
    /* what no merge can join may as well be merged apart */
    while (b->words && n) {
        size_t at = 0;
        while (tb_span_starts((struct tb_span){p + at, n - at}, TB_MARK))
            at += strlen(TB_MARK);
        const char *next = memmem(p + at, n - at, TB_MARK, strlen(TB_MARK));
        if (!next) break;
        int rc = encode_word(b, p, (size_t)(next - p), out);
        if (rc) return rc;
        n -= (size_t)(next - p);
        p = next;
    }
    return encode_word(b, p, n, out);
}
