/*
 * Tokens by their bytes, and the masks of a grammar's states over them (grammar.h).
 */
#include <stdlib.h>
#include <string.h>

#include "grammar/rules.h"

/* ---- vocabulary */

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

int tb_vocab_create(const struct tb_tokenizer *t, int32_t n_tokens, struct tb_vocab **out,
                    struct tb_error *err)
{
    int32_t n_known = TB_MIN(tb_tokenizer_vocab_size(t), n_tokens), n = 0;
    bool single[256] = {false};
    struct entry *e = tb_try_calloc((size_t)n_known + 1, sizeof(*e));
    struct tb_vocab *v = tb_try_calloc(1, sizeof(*v));
    int rc = TB_ENOMEM;
    if (!e || !v) goto out;
    atomic_init(&v->refs, 1);
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
    v->order = tb_try_calloc((size_t)n + 1, sizeof(*v->order));
    v->shared = tb_try_calloc((size_t)n + 1, sizeof(*v->shared));
    if (!v->order || !v->shared) goto out;
    v->t = t;
    v->n = n_tokens;
    v->n_text = n;
    for (int32_t i = 0; i < n; i++) {
        v->order[i] = e[i].id;
        v->shared[i] = i ? (uint16_t)common(e[i - 1].bytes, e[i].bytes) : 0;
        v->longest = TB_MAX(v->longest, (int32_t)e[i].bytes.n);
    }
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
    tb_free(v->order);
    tb_free(v->shared);
    tb_free(v);
}

int32_t tb_vocab_size(const struct tb_vocab *v)
{
    return v->n;
}

/* ---- grammar */

void tb_grammar_ref(struct tb_grammar *g)
{
    atomic_fetch_add_explicit(&g->refs, 1, memory_order_relaxed);
}

void tb_grammar_unref(struct tb_grammar *g)
{
    if (g && atomic_fetch_sub_explicit(&g->refs, 1, memory_order_acq_rel) == 1) tb_rules_destroy(g);
}

uint32_t tb_grammar_start(const struct tb_grammar *g)
{
    return g->start;
}

uint32_t tb_grammar_shortest(const struct tb_grammar *g)
{
    return g->states[g->start].rest;
}

uint32_t tb_grammar_feed(struct tb_grammar *g, uint32_t state, struct tb_span bytes)
{
    g->work = 0;
    for (size_t i = 0; i < bytes.n && state; i++)
        state = tb_states_step(g, state, (unsigned char)bytes.p[i]);
    return state;
}

uint32_t tb_grammar_accept(struct tb_grammar *g, uint32_t state, int32_t token)
{
    struct tb_span s;
    if (tb_tokenizer_is_special(g->vocab->t, token) ||
        tb_tokenizer_token_bytes(g->vocab->t, token, &s) || s.n == 0)
        return 0;
    return tb_grammar_feed(g, state, s);
}

bool tb_grammar_complete(const struct tb_grammar *g, uint32_t state)
{
    return g->states[state].complete;
}

bool tb_grammar_final(const struct tb_grammar *g, uint32_t state)
{
    return g->states[state].complete && g->states[state].n == 0;
}

/* Walks all tokens in order, from the states along the token before as far as they share bytes.
 * Returns the longest completion that any of them asks for. */
static uint32_t fill(struct tb_grammar *g, uint32_t state, uint32_t left, uint64_t *mask)
{
    const struct tb_vocab *v = g->vocab;
    size_t dead = SIZE_MAX; /* the first so many bytes of the last token match nothing */
    uint32_t most = 0;
    memset(mask, 0, ((size_t)v->n + 63) / 64 * sizeof(*mask));
    g->path[0] = state;
    g->work = 0;
    for (int32_t i = 0; i < v->n_text; i++) {
        size_t at = v->shared[i];
        if (at >= dead) continue;
        dead = SIZE_MAX;
        struct tb_span s;
        tb_tokenizer_token_bytes(v->t, v->order[i], &s);
        for (; at < s.n; at++) {
            uint32_t to = tb_states_step(g, g->path[at], (unsigned char)s.p[at]);
            if (!to) {
                dead = at + 1;
                break;
            }
            g->path[at + 1] = to;
        }
        if (dead != SIZE_MAX) continue;
        uint32_t rest = g->states[g->path[s.n]].rest;
        most = TB_MAX(most, rest);
        if (rest < left) mask[v->order[i] / 64] |= 1ull << v->order[i] % 64;
    }
    return most;
}

const uint64_t *tb_grammar_mask(struct tb_grammar *g, uint32_t state, uint32_t left)
{
    size_t words = ((size_t)g->vocab->n + 63) / 64;
    if (!g->masks) g->masks = tb_try_calloc((TB_GRAMMAR_MASKS + 1) * words, sizeof(*g->masks));
    if (!g->path) g->path = tb_try_calloc((size_t)g->vocab->longest + 1, sizeof(*g->path));
    if (!g->masks || !g->path) return NULL;
    struct tb_state *s = &g->states[state];
    if (s->mask && g->mask_most[s->mask - 1] < left) return g->masks + (s->mask - 1) * words;
    uint32_t most = fill(g, state, left, g->masks + TB_GRAMMAR_MASKS * words);
    if (g->failed || tb_states_bytes(g) > TB_GRAMMAR_MAX_BYTES / 2)
        atomic_store_explicit(&g->worn, true, memory_order_relaxed);
    if (g->failed) return NULL;
    s = &g->states[state];
    if (most >= left || s->mask) return g->masks + TB_GRAMMAR_MASKS * words;
    /* nothing was left out: keep it for the next time */
    uint32_t slot = g->next_mask++ % TB_GRAMMAR_MASKS;
    if (g->mask_owner[slot]) g->states[g->mask_owner[slot]].mask = 0;
    g->mask_owner[slot] = state;
    g->mask_most[slot] = most;
    s->mask = slot + 1;
    memcpy(g->masks + slot * words, g->masks + TB_GRAMMAR_MASKS * words, words * sizeof(uint64_t));
    return g->masks + slot * words;
}

bool tb_grammar_worn(const struct tb_grammar *g)
{
    return atomic_load_explicit(&g->worn, memory_order_relaxed);
}

bool tb_grammar_too_complex(const struct tb_grammar *g)
{
    return atomic_load_explicit(&g->too_complex, memory_order_relaxed);
}
