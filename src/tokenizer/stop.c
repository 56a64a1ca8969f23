/*
 * Stop strings over a stream of tokens' bytes. Each string is followed by a Knuth-Morris-Pratt
 * automaton, so a string may begin in one token and end in another, nothing is searched twice and
 * no text is kept.
 *
 * struct tb_stop_set owns copies of the strings and their tables and is immutable; a matcher owns
 * one number for each string. Thread: a set any, a matcher one at a time.
 */
#include <string.h>

#include "tokenizer/tokenizer.h"
#include "util/limits.h"
#include "util/mem.h"

struct stop {
    const char *p;
    uint32_t n;
    const uint32_t *fail; /* [n] length of the longest proper border of p[0..i] */
};

struct tb_stop_set {
    const struct tb_tokenizer *tokenizer;
    size_t n;
    struct stop *stops;
    char *bytes;
    uint32_t *tables;
};

int tb_stop_set_create(const struct tb_tokenizer *t, const struct tb_span *stops, size_t n_stops,
                       struct tb_stop_set **out, struct tb_error *e)
{
    size_t total = 0;
    *out = NULL;
    if (n_stops > TB_MAX_STOPS)
        return tb_error_set(e, TB_EINVAL, "stop: %zu strings, more than %d", n_stops, TB_MAX_STOPS);
    for (size_t i = 0; i < n_stops; i++) {
        if (stops[i].n == 0) return tb_error_set(e, TB_EINVAL, "stop: string %zu is empty", i);
        if (stops[i].n > TB_MAX_STOP_BYTES)
            return tb_error_set(e, TB_EINVAL, "stop: string %zu has %zu bytes, more than %d", i,
                                stops[i].n, TB_MAX_STOP_BYTES);
        total += stops[i].n;
    }
    if (n_stops && !t)
        return tb_error_set(
            e, TB_EINVAL,
            "stop: the model's folder has no tokenizer.json, so stop strings cannot be "
            "matched; give token ids");

    struct tb_stop_set *s = tb_calloc(1, sizeof(*s));
    s->tokenizer = t;
    s->n = n_stops;
    s->stops = tb_calloc(n_stops + 1, sizeof(*s->stops));
    s->bytes = tb_try_malloc(total + 1);
    s->tables = tb_try_calloc(total + 1, sizeof(*s->tables));
    if (!s->bytes || !s->tables) {
        tb_stop_set_destroy(s);
        return tb_error_set(e, TB_ENOMEM, "stop: out of memory");
    }
    size_t at = 0;
    for (size_t i = 0; i < n_stops; i++) {
        char *p = s->bytes + at;
        uint32_t *fail = s->tables + at, k = 0;
        memcpy(p, stops[i].p, stops[i].n);
        for (size_t j = 1; j < stops[i].n; j++) {
            while (k && p[j] != p[k])
                k = fail[k - 1];
            if (p[j] == p[k]) k++;
            fail[j] = k;
        }
        s->stops[i] = (struct stop){p, (uint32_t)stops[i].n, fail};
        at += stops[i].n;
    }
    *out = s;
    return 0;
}

void tb_stop_set_destroy(struct tb_stop_set *s)
{
    if (!s) return;
    tb_free(s->stops);
    tb_free(s->bytes);
    tb_free(s->tables);
    tb_free(s);
}

size_t tb_stop_set_count(const struct tb_stop_set *s)
{
    return s ? s->n : 0;
}

void tb_stop_matcher_init(struct tb_stop_matcher *m, const struct tb_stop_set *set)
{
    *m = (struct tb_stop_matcher){.set = set, .hit = -1};
    if (set && set->n) m->state = tb_calloc(set->n, sizeof(*m->state));
}

void tb_stop_matcher_fini(struct tb_stop_matcher *m)
{
    tb_free(m->state);
    *m = (struct tb_stop_matcher){.hit = -1};
}

bool tb_stop_matcher_feed_bytes(struct tb_stop_matcher *m, const char *p, size_t n)
{
    if (!m->set || !m->set->n) return false;
    for (size_t j = 0; j < n && m->hit < 0; j++) {
        m->n_seen++;
        for (size_t i = 0; i < m->set->n; i++) {
            const struct stop *s = &m->set->stops[i];
            uint32_t k = m->state[i];
            while (k && s->p[k] != p[j])
                k = s->fail[k - 1];
            if (s->p[k] == p[j]) k++;
            m->state[i] = k;
            /* of the strings that end here, the longest began first */
            if (k == s->n && (m->hit < 0 || s->n > m->set->stops[m->hit].n)) m->hit = (int)i;
        }
        if (m->hit >= 0) m->hit_at = m->n_seen - m->set->stops[m->hit].n;
    }
    return m->hit >= 0;
}

bool tb_stop_matcher_feed(struct tb_stop_matcher *m, int32_t id)
{
    struct tb_span s;
    if (!m->set || !m->set->n) return false;
    if (tb_tokenizer_token_bytes(m->set->tokenizer, id, &s)) return m->hit >= 0;
    return tb_stop_matcher_feed_bytes(m, s.p, s.n);
}
