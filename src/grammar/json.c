/*
 * Rules of JSON's own grammar (RFC 8259), which those of a schema are made from. Thread: the
 * builder's.
 */
#include <stdio.h>
#include <string.h>

#include "grammar/rules.h"

static uint32_t text(struct tb_grammar *g, const char *s)
{
    return tb_rule_text(g, s, strlen(s));
}

static uint32_t seq3(struct tb_grammar *g, uint32_t a, uint32_t b, uint32_t c)
{
    return tb_rule_seq(g, a, tb_rule_seq(g, b, c));
}

static uint32_t range_then(struct tb_grammar *g, unsigned lo, unsigned hi, uint32_t then)
{
    return tb_rule_seq(g, tb_rule_range(g, lo, hi), then);
}

/* A character beyond ASCII: UTF-8 without surrogates and overlong forms. */
static uint32_t make_wide(struct tb_grammar *g)
{
    uint32_t tail = tb_rule_range(g, 0x80, 0xbf), tail2 = tb_rule_seq(g, tail, tail);
    uint32_t c = range_then(g, 0xc2, 0xdf, tail);
    c = tb_rule_alt(g, c, range_then(g, 0xe0, 0xe0, range_then(g, 0xa0, 0xbf, tail)));
    c = tb_rule_alt(g, c, range_then(g, 0xe1, 0xec, tail2));
    c = tb_rule_alt(g, c, range_then(g, 0xed, 0xed, range_then(g, 0x80, 0x9f, tail)));
    c = tb_rule_alt(g, c, range_then(g, 0xee, 0xef, tail2));
    c = tb_rule_alt(g, c, range_then(g, 0xf0, 0xf0, range_then(g, 0x90, 0xbf, tail2)));
    c = tb_rule_alt(g, c, range_then(g, 0xf1, 0xf3, tb_rule_seq(g, tail, tail2)));
    return tb_rule_alt(g, c, range_then(g, 0xf4, 0xf4, range_then(g, 0x80, 0x8f, tail2)));
}

/* What follows a backslash; escaped surrogates come in pairs only. */
static uint32_t make_escape(struct tb_grammar *g)
{
    uint32_t hex = tb_rule_one_of(g, "0123456789abcdefABCDEF");
    uint32_t hex2 = tb_rule_seq(g, hex, hex), d = tb_rule_one_of(g, "dD");
    uint32_t high = seq3(g, d, tb_rule_one_of(g, "89abAB"), hex2);
    uint32_t low = seq3(g, d, tb_rule_one_of(g, "cdefCDEF"), hex2);
    uint32_t unit = seq3(g, tb_rule_one_of(g, "0123456789abcefABCEF"), hex, hex2);
    unit = tb_rule_alt(g, unit, seq3(g, d, tb_rule_range(g, '0', '7'), hex2));
    unit = tb_rule_alt(g, unit, seq3(g, high, text(g, "\\u"), low));
    return tb_rule_alt(g, tb_rule_one_of(g, "\"\\/bfnrt"), tb_rule_seq(g, text(g, "u"), unit));
}

uint32_t tb_json_rule_string(struct tb_grammar *g, uint32_t character, uint32_t min, uint32_t max)
{
    uint32_t quote = text(g, "\"");
    return seq3(g, quote, tb_rule_repeat(g, character, min, max), quote);
}

uint32_t tb_json_rule_list(struct tb_grammar *g, const struct tb_json_rules *r, const char *open,
                           uint32_t item, uint32_t min, uint32_t max, const char *close)
{
    uint32_t items = TB_NODE_EMPTY;
    if (max > 0) {
        uint32_t more = seq3(g, text(g, ","), r->space, tb_rule_seq(g, item, r->space));
        uint32_t most = max == TB_GRAMMAR_UNBOUNDED ? max : max - 1;
        items = seq3(g, item, r->space, tb_rule_repeat(g, more, min ? min - 1 : 0, most));
        if (min == 0) items = tb_rule_optional(g, items);
    }
    return seq3(g, text(g, open), r->space, tb_rule_seq(g, items, text(g, close)));
}

/* ---- numbers */

static uint32_t digits(struct tb_grammar *g, uint32_t min, uint32_t max)
{
    return tb_rule_repeat(g, tb_rule_range(g, '0', '9'), min, max);
}

/* n digits between those of lo and of hi; NULL: no bound on that side. */
static uint32_t between(struct tb_grammar *g, const char *lo, const char *hi, uint32_t n)
{
    if (n == 0) return TB_NODE_EMPTY;
    if (!lo && !hi) return digits(g, n, n);
    unsigned a = lo ? (unsigned char)*lo : '0', b = hi ? (unsigned char)*hi : '9';
    const char *lo1 = lo ? lo + 1 : NULL, *hi1 = hi ? hi + 1 : NULL;
    if (a == b) return range_then(g, a, a, between(g, lo1, hi1, n - 1));
    uint32_t first = a, last = b, out = TB_NODE_EMPTY;
    uint32_t part[3], n_parts = 0;
    if (lo) part[n_parts++] = range_then(g, first, first, between(g, lo1, NULL, n - 1)), first++;
    if (hi) part[n_parts++] = range_then(g, last, last, between(g, NULL, hi1, n - 1)), last--;
    if (first <= last) part[n_parts++] = range_then(g, first, last, digits(g, n - 1, n - 1));
    for (uint32_t i = 0; i < n_parts; i++)
        out = i ? tb_rule_alt(g, out, part[i]) : part[i];
    return out;
}

/* Whole numbers 0 <= lo <= x <= hi, without leading zeros. */
static uint32_t whole(struct tb_grammar *g, int64_t lo, int64_t hi)
{
    char a[24], b[24];
    size_t na = (size_t)snprintf(a, sizeof(a), "%lld", (long long)lo);
    size_t nb = (size_t)snprintf(b, sizeof(b), "%lld", (long long)hi);
    if (na == nb) return between(g, a, b, (uint32_t)na);
    uint32_t out = between(g, a, NULL, (uint32_t)na);
    for (size_t n = na + 1; n <= nb; n++) {
        static const char first[] = "100000000000000000000";
        out = tb_rule_alt(g, out, between(g, first, n == nb ? b : NULL, (uint32_t)n));
    }
    return out;
}

uint32_t tb_json_rule_integer(struct tb_grammar *g, int64_t lo, int64_t hi)
{
    uint32_t out = TB_NODE_EMPTY;
    if (hi >= 0) out = whole(g, TB_MAX(lo, 0), hi);
    if (lo < 0) {
        uint32_t below = tb_rule_seq(g, text(g, "-"), whole(g, hi < 0 ? -hi : 1, -lo));
        out = hi >= 0 ? tb_rule_alt(g, out, below) : below;
    }
    return out;
}

/* ---- all of JSON */

void tb_json_rules_make(struct tb_grammar *g, struct tb_json_rules *r)
{
    uint32_t indent = tb_rule_repeat(g, text(g, " "), 0, 16);
    r->space =
        tb_rule_optional(g, tb_rule_alt(g, text(g, " "), tb_rule_seq(g, text(g, "\n"), indent)));
    uint32_t ascii = tb_rule_alt(g, tb_rule_range(g, 0x20, 0x21), tb_rule_range(g, 0x23, 0x5b));
    r->wide = make_wide(g);
    r->plain = tb_rule_alt(g, tb_rule_alt(g, ascii, tb_rule_range(g, 0x5d, 0x7e)), r->wide);
    r->character = tb_rule_alt(g, r->plain, tb_rule_seq(g, text(g, "\\"), make_escape(g)));
    r->string = tb_json_rule_string(g, r->character, 0, TB_GRAMMAR_UNBOUNDED);
    r->integer =
        tb_rule_seq(g, tb_rule_optional(g, text(g, "-")), whole(g, 0, TB_JSON_INTEGER_MAX));
    uint32_t fraction = tb_rule_seq(g, text(g, "."), digits(g, 1, 17));
    uint32_t exponent = seq3(g, tb_rule_one_of(g, "eE"),
                             tb_rule_optional(g, tb_rule_one_of(g, "+-")), digits(g, 1, 2));
    r->number = seq3(g, r->integer, tb_rule_optional(g, fraction), tb_rule_optional(g, exponent));
    r->boolean = tb_rule_alt(g, text(g, "true"), text(g, "false"));
    r->null = text(g, "null");
    r->value = tb_rule_ref(g);
    uint32_t member = seq3(g, r->string, text(g, ":"), tb_rule_seq(g, r->space, r->value));
    r->object = tb_json_rule_list(g, r, "{", member, 0, TB_GRAMMAR_UNBOUNDED, "}");
    r->array = tb_json_rule_list(g, r, "[", r->value, 0, TB_GRAMMAR_UNBOUNDED, "]");
    uint32_t v =
        tb_rule_alt(g, tb_rule_alt(g, r->string, r->number), tb_rule_alt(g, r->object, r->array));
    v = tb_rule_alt(g, v, tb_rule_alt(g, r->boolean, r->null));
    tb_rule_define(g, r->value, v);
}

int tb_grammar_create_json(struct tb_vocab *v, struct tb_grammar **out, struct tb_error *err)
{
    struct tb_grammar *g;
    struct tb_json_rules r;
    tb_rules_create(v, &g);
    tb_json_rules_make(g, &r);
    int rc = tb_rules_finish(g, r.object, err);
    if (rc)
        tb_grammar_unref(g);
    else
        *out = g;
    return rc;
}
