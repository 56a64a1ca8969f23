/*
 * The masks of a grammar's states over a vocabulary's tokens, and walking its states by tokens
 * (grammar.h). Thread: one at a time, but references and what says so.
 */
#include <string.h>

#include "grammar/rules.h"

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

/* ---- plain tokens */

struct range {
    uint8_t lo, hi;
};

/* The characters that plain tokens consist of. */
static const struct {
    uint8_t n;
    struct range byte[4];
} PLAIN[] = {
    {1, {{0x20, 0x21}}},
    {1, {{0x23, 0x5b}}},
    {1, {{0x5d, 0x7e}}},
    {2, {{0xc2, 0xdf}, {0x80, 0xbf}}},
    {3, {{0xe0, 0xe0}, {0xa0, 0xbf}, {0x80, 0xbf}}},
    {3, {{0xe1, 0xec}, {0x80, 0xbf}, {0x80, 0xbf}}},
    {3, {{0xed, 0xed}, {0x80, 0x9f}, {0x80, 0xbf}}},
    {3, {{0xee, 0xef}, {0x80, 0xbf}, {0x80, 0xbf}}},
    {4, {{0xf0, 0xf0}, {0x90, 0xbf}, {0x80, 0xbf}, {0x80, 0xbf}}},
    {4, {{0xf1, 0xf3}, {0x80, 0xbf}, {0x80, 0xbf}, {0x80, 0xbf}}},
    {4, {{0xf4, 0xf4}, {0x80, 0x8f}, {0x80, 0xbf}, {0x80, 0xbf}}},
};

#define MAX_PLACES 16
struct places {
    uint32_t n, state[MAX_PLACES];
    bool dead, full; /* some characters lead nowhere; to more places than these */
};

static void add_place(struct places *p, uint32_t state)
{
    for (uint32_t i = 0; i < p->n; i++)
        if (p->state[i] == state) return;
    if (p->n < MAX_PLACES)
        p->state[p->n++] = state;
    else
        p->full = true;
}

/* Where the bytes in the n ranges lead to; one byte stands for all of its class. */
static void follow(struct tb_grammar *g, uint32_t state, const struct range *byte, unsigned n,
                   struct places *to)
{
    struct tb_byte_set seen = {{0}};
    for (unsigned b = byte->lo; b <= byte->hi && !to->full; b++) {
        unsigned c = g->class_of[b];
        if (seen.w[c / 64] >> c % 64 & 1) continue;
        seen.w[c / 64] |= 1ull << c % 64;
        uint32_t next = tb_states_step(g, state, (unsigned char)b);
        if (!next)
            to->dead = true;
        else if (n > 1)
            follow(g, next, byte + 1, n - 1, to);
        else
            add_place(to, next);
    }
}

static void follow_plain(struct tb_grammar *g, const struct places *from, struct places *to)
{
    *to = (struct places){0};
    for (uint32_t i = 0; i < from->n; i++)
        for (size_t k = 0; k < TB_ARRAY_LEN(PLAIN); k++)
            follow(g, from->state[i], PLAIN[k].byte, PLAIN[k].n, to);
}

/* Adds the plain tokens to the mask, those of one length together. False when some of a length may
 * come and some not: then all tokens are to be walked. */
static bool fill_plain(struct tb_grammar *g, uint32_t state, uint32_t left, uint64_t *mask,
                       uint32_t *most)
{
    const struct tb_vocab *v = g->vocab;
    size_t words = ((size_t)v->n + 63) / 64;
    struct places at = {.n = 1, .state = {state}}, next;
    for (int k = 1; k <= TB_GRAMMAR_PLAIN; k++) {
        follow_plain(g, &at, &next);
        if (next.full || (next.n && next.dead)) return false;
        if (next.n == 0) return true;
        uint32_t lo = UINT32_MAX, hi = 0;
        for (uint32_t i = 0; i < next.n; i++) {
            lo = TB_MIN(lo, g->states[next.state[i]].rest);
            hi = TB_MAX(hi, g->states[next.state[i]].rest);
        }
        if (v->plain[k]) {
            if (lo < left && hi >= left) return false;
            *most = TB_MAX(*most, hi);
            for (size_t i = 0; hi < left && i < words; i++)
                mask[i] |= v->plain[k][i];
        }
        at = next;
    }
    return true;
}

/* ---- masks */

static inline uint32_t step(struct tb_grammar *g, uint32_t state, unsigned char byte)
{
    const uint32_t *next = g->states[state].next;
    uint32_t to = next ? next[g->class_of[byte]] : TB_STATE_UNKNOWN;
    return to != TB_STATE_UNKNOWN ? to : tb_states_step(g, state, byte);
}

/* Walks tokens in order, from the states along the token before as far as they share bytes.
 * Returns the longest completion that any token asks for. */
static uint32_t fill(struct tb_grammar *g, uint32_t state, uint32_t left, uint64_t *mask)
{
    const struct tb_vocab *v = g->vocab;
    size_t dead = SIZE_MAX; /* the first so many bytes of the last token match nothing */
    uint32_t most = 0;
    memset(mask, 0, ((size_t)v->n + 63) / 64 * sizeof(*mask));
    g->path[0] = state;
    g->work = 0;
    const struct tb_token_list *l = fill_plain(g, state, left, mask, &most) ? &v->rough : &v->all;
    for (int32_t i = 0; i < l->n; i++) {
        size_t at = l->shared[i];
        if (at >= dead) continue;
        dead = SIZE_MAX;
        const uint8_t *p = l->bytes + l->at[i], *end = l->bytes + l->at[i + 1];
        for (; p < end; p++, at++) {
            uint32_t to = step(g, g->path[at], *p);
            if (!to) {
                dead = at + 1;
                break;
            }
            g->path[at + 1] = to;
        }
        if (dead != SIZE_MAX) continue;
        uint32_t rest = g->states[g->path[at]].rest;
        most = TB_MAX(most, rest);
        if (rest < left) mask[l->ids[i] / 64] |= 1ull << l->ids[i] % 64;
    }
    return most;
}

const uint64_t *tb_grammar_mask(struct tb_grammar *g, uint32_t state, uint32_t left)
{
    size_t words = ((size_t)g->vocab->n + 63) / 64;
    if (!g->masks) {
        g->masks = tb_try_calloc((TB_GRAMMAR_MASKS + 1) * words, sizeof(*g->masks));
        if (g->masks) tb_states_count(g, (TB_GRAMMAR_MASKS + 1) * words * sizeof(*g->masks));
    }
    if (!g->path) g->path = tb_try_calloc((size_t)g->vocab->longest + 1, sizeof(*g->path));
    if (!g->masks || !g->path) return NULL;
    struct tb_state *s = &g->states[state];
    if (s->mask && g->mask_most[s->mask - 1] < left) return g->masks + (s->mask - 1) * words;
    uint32_t most = fill(g, state, left, g->masks + TB_GRAMMAR_MASKS * words);
    size_t bytes = tb_states_bytes(g);
    if (g->failed || bytes > TB_GRAMMAR_MAX_BYTES / 2 ||
        (bytes > TB_GRAMMAR_LEAST && tb_vocab_crowded(g->vocab)))
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
