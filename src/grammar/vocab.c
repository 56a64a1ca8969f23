/*
 * A tokenizer's tokens by their bytes, for the masks of grammars (grammar.h).
 */
#include <stdlib.h>
#include <string.h>

#include "grammar/rules.h"

struct entry {
    struct tb_span bytes;
    int32_t id;
};

static int by_bytes(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;
    int c = memcmp(x->bytes.p, y->bytes.p, TB_MIN(x->bytes.n, y->bytes.n));
    if (c) return c;
    if (x->bytes.n != y->bytes.n) return x->bytes.n < y->bytes.n ? -1 : 1;
    return (x->id > y->id) - (x->id < y->id);
}

static size_t common(struct tb_span a, struct tb_span b)
{
    size_t n = TB_MIN(a.n, b.n), i = 0;
    while (i < n && a.p[i] == b.p[i])
        i++;
    return i;
}

/* Characters of a token that is plain, else 0. */
static size_t plain_length(struct tb_span s)
{
    if (!tb_utf8_valid(s.p, s.n)) return 0;
    for (size_t i = 0; i < s.n; i++) {
        unsigned char c = (unsigned char)s.p[i];
        if (c < 0x20 || c == '"' || c == '\\' || c == 0x7f) return 0;
    }
    size_t n = tb_utf8_characters(s.p, s.n);
    return n <= TB_GRAMMAR_PLAIN ? n : 0;
}

static void list_fini(struct tb_token_list *l)
{
    tb_free(l->ids);
    tb_free(l->shared);
    tb_free(l->at);
    tb_free(l->bytes);
}

/* Of n sorted tokens; false when memory is out. */
static bool list_init(struct tb_token_list *l, const struct entry *e, int32_t n)
{
    size_t bytes = 0;
    l->ids = tb_try_calloc((size_t)n + 1, sizeof(*l->ids));
    l->shared = tb_try_calloc((size_t)n + 1, sizeof(*l->shared));
    l->at = tb_try_calloc((size_t)n + 1, sizeof(*l->at));
    if (!l->ids || !l->shared || !l->at) return false;
    l->n = n;
    for (int32_t i = 0; i < n; i++) {
        l->ids[i] = e[i].id;
        l->shared[i] = i ? (uint16_t)common(e[i - 1].bytes, e[i].bytes) : 0;
        l->at[i] = (uint32_t)bytes;
        bytes += e[i].bytes.n - l->shared[i];
    }
    l->at[n] = (uint32_t)bytes;
    l->bytes = bytes <= UINT32_MAX ? tb_try_malloc(bytes + 1) : NULL;
    for (int32_t i = 0; l->bytes && i < n; i++)
        memcpy(l->bytes + l->at[i], e[i].bytes.p + l->shared[i], e[i].bytes.n - l->shared[i]);
    return l->bytes != NULL;
}

/* Takes the plain tokens out of e, where the n_rough others then are. */
static bool take_plain(struct tb_vocab *v, struct entry *e, int32_t n, int32_t *n_rough)
{
    *n_rough = 0;
    for (int32_t i = 0; i < n; i++) {
        size_t k = plain_length(e[i].bytes), words = ((size_t)v->n + 63) / 64;
        if (k == 0) {
            e[(*n_rough)++] = e[i];
            continue;
        }
        if (!v->plain[k]) v->plain[k] = tb_try_calloc(words, sizeof(uint64_t));
        if (!v->plain[k]) return false;
        v->plain[k][e[i].id / 64] |= 1ull << e[i].id % 64;
    }
    return true;
}

int tb_vocab_create(const struct tb_tokenizer *t, int32_t n_tokens, struct tb_vocab **out,
                    struct tb_error *err)
{
    int32_t n_known = TB_MIN(tb_tokenizer_vocab_size(t), n_tokens), n = 0, n_rough;
    bool single[256] = {false};
    struct entry *e = tb_try_calloc((size_t)n_known + 1, sizeof(*e));
    struct tb_vocab *v = tb_try_calloc(1, sizeof(*v));
    int rc = TB_ENOMEM;
    if (!e || !v) goto out;
    atomic_init(&v->refs, 1);
    v->max_grammar_bytes = TB_VOCAB_GRAMMAR_BYTES;
    for (int32_t id = 0; id < n_known; id++) {
        struct tb_span s;
        if (tb_tokenizer_is_special(t, id) || tb_tokenizer_token_bytes(t, id, &s) || s.n == 0 ||
            s.n > UINT16_MAX)
            continue;
        if (s.n == 1) single[(unsigned char)s.p[0]] = true;
        e[n++] = (struct entry){s, id};
    }
    for (int c = 0x20; c < 0x7f; c++) { /* what a shortest text may consist of */
        if (single[c]) continue;
        rc = tb_error_set(err, TB_EUNSUPPORTED,
                          "the tokenizer has no token for the byte 0x%02x alone, so texts cannot "
                          "be held to a grammar",
                          (unsigned)c);
        goto out;
    }
    qsort(e, (size_t)n, sizeof(*e), by_bytes);
    v->t = t;
    v->n = n_tokens;
    for (int32_t i = 0; i < n; i++)
        v->longest = TB_MAX(v->longest, (int32_t)e[i].bytes.n);
    if (!list_init(&v->all, e, n) || !take_plain(v, e, n, &n_rough) ||
        !list_init(&v->rough, e, n_rough))
        goto out;
    rc = 0;
out:
    tb_free(e);
    if (rc) {
        tb_vocab_unref(v);
        return rc == TB_ENOMEM
                   ? tb_error_set(err, rc, "no memory for the order of %d tokens", (int)n_known)
                   : rc;
    }
    *out = v;
    return 0;
}

void tb_vocab_unref(struct tb_vocab *v)
{
    if (!v || atomic_fetch_sub_explicit(&v->refs, 1, memory_order_acq_rel) != 1) return;
    list_fini(&v->all);
    list_fini(&v->rough);
    for (int k = 0; k <= TB_GRAMMAR_PLAIN; k++)
        tb_free(v->plain[k]);
    tb_free(v);
}

bool tb_vocab_crowded(const struct tb_vocab *v)
{
    size_t bytes = atomic_load_explicit(&v->grammar_bytes, memory_order_relaxed);
    return bytes > v->max_grammar_bytes / 2;
}

int32_t tb_vocab_size(const struct tb_vocab *v)
{
    return v->n;
}
