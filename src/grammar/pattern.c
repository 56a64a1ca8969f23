/*
 * Rules of a JSON string from a regular expression (ECMA-262's, as JSON Schema has them): the part
 * of the language that needs no memory. Thread: the builder's.
 */
#include <string.h>

#include "grammar/rules.h"

#define MAX_GROUPS 64 /* one inside the other */
#define MAX_REPEAT 10000

struct parser {
    struct tb_grammar *g;
    const struct tb_json_rules *r;
    const char *begin, *p, *end;
    int depth;
    struct tb_error *err;
};

struct set { /* a class of characters: those of ASCII, and whether all others are in it */
    bool ascii[128];
    bool wide;
};

static int fail(struct parser *s, const char *what)
{
    return tb_error_set(s->err, TB_EUNSUPPORTED, "pattern \"%.*s\": %s (at character %d)",
                        (int)TB_MIN(s->end - s->begin, 200), s->begin, what,
                        (int)(s->p - s->begin) + 1);
}

/* One ASCII character as it stands in a JSON string. */
static uint32_t character(struct parser *s, unsigned c)
{
    static const char escaped[] = "\"\\\b\f\n\r\t", letter[] = "\"\\bfnrt";
    const char *at = c ? strchr(escaped, (int)c) : NULL;
    if (at) return tb_rule_text(s->g, (char[]){'\\', letter[at - escaped]}, 2);
    char plain = (char)c;
    return tb_rule_text(s->g, &plain, 1);
}

static uint32_t of_set(struct parser *s, const struct set *c)
{
    struct tb_byte_set plain = {{0}};
    uint32_t out = 0, n = 0;
    bool any = false;
    for (unsigned i = 0; i < 128; i++) {
        if (!c->ascii[i]) continue;
        bool control = i < 0x20 || i == 0x7f;
        if (!control && i != '"' && i != '\\') {
            plain.w[i / 64] |= 1ull << i % 64;
            any = true;
        } else if (!control || (i && strchr("\b\f\n\r\t", (int)i))) {
            uint32_t one = character(s, i);
            out = n++ ? tb_rule_alt(s->g, out, one) : one;
        }
    }
    if (any) {
        uint32_t set = tb_rule_set(s->g, plain);
        out = n++ ? tb_rule_alt(s->g, out, set) : set;
    }
    if (c->wide) out = n++ ? tb_rule_alt(s->g, out, s->r->wide) : s->r->wide;
    return out;
}

static void add_range(struct set *c, unsigned lo, unsigned hi)
{
    for (unsigned i = lo; i <= hi; i++)
        c->ascii[i] = true;
}

/* \d \w \s and their opposites; false for another letter. */
static bool add_named(struct set *c, char name)
{
    struct set add = {{false}, false};
    switch (name | 0x20) {
    case 'd': add_range(&add, '0', '9'); break;
    case 'w':
        add_range(&add, '0', '9');
        add_range(&add, 'a', 'z');
        add_range(&add, 'A', 'Z');
        add_range(&add, '_', '_');
        break;
    case 's':
        add_range(&add, ' ', ' ');
        add_range(&add, '\t', '\r');
        break;
    default: return false;
    }
    bool opposite = !(name & 0x20);
    for (int i = 0; i < 128; i++)
        c->ascii[i] |= add.ascii[i] != opposite;
    c->wide |= opposite;
    return true;
}

/* The character of an escape such as \n or \. */
static int escaped(struct parser *s, unsigned *out)
{
    static const char letters[] = "bfnrtv", values[] = "\b\f\n\r\t\v";
    unsigned char c = (unsigned char)*s->p;
    const char *at = strchr(letters, c);
    if (c && at) {
        *out = (unsigned char)values[at - letters];
    } else if (c < 128 && !(c >= '0' && c <= '9') && !((c | 0x20) >= 'a' && (c | 0x20) <= 'z')) {
        *out = c;
    } else {
        return fail(s, "this escape is not supported");
    }
    s->p++;
    return 0;
}

static int parse_class(struct parser *s, uint32_t *out)
{
    struct set c = {{false}, false};
    bool negated = s->p < s->end && *s->p == '^';
    if (negated) s->p++;
    while (s->p < s->end && *s->p != ']') {
        unsigned lo, hi;
        for (int k = 0; k < 2; k++) {
            unsigned x = (unsigned char)*s->p;
            if (x >= 128) return fail(s, "classes of characters beyond ASCII are not supported");
            s->p++;
            if (x == '\\') {
                if (s->p == s->end) return fail(s, "it ends in a backslash");
                if (k == 0 && add_named(&c, *s->p)) {
                    s->p++;
                    goto next;
                }
                int rc = escaped(s, &x);
                if (rc) return rc;
            }
            if (k == 0) lo = hi = x;
            if (k == 1) hi = x;
            if (k == 1 || s->end - s->p < 2 || s->p[0] != '-' || s->p[1] == ']') break;
            s->p++;
        }
        if (hi < lo) return fail(s, "a range of characters is reversed");
        add_range(&c, lo, hi);
next:;
    }
    if (s->p == s->end) return fail(s, "a class is not closed");
    s->p++;
    if (negated) {
        for (int i = 0; i < 128; i++)
            c.ascii[i] = !c.ascii[i];
        c.wide = !c.wide;
    }
    *out = of_set(s, &c);
    if (*out == TB_NODE_EMPTY) return fail(s, "a class holds no character");
    return 0;
}

static int parse_choice(struct parser *s, uint32_t *out);

static int parse_atom(struct parser *s, uint32_t *out)
{
    unsigned c = (unsigned char)*s->p++;
    struct set any = {{false}, true};
    int rc;
    switch (c) {
    case '(':
        if (++s->depth > MAX_GROUPS) return fail(s, "groups are nested too deep");
        if (s->p < s->end && *s->p == '?') {
            if (s->end - s->p < 2 || s->p[1] != ':')
                return fail(s, "groups that look around or have names are not supported");
            s->p += 2;
        }
        if ((rc = parse_choice(s, out))) return rc;
        if (s->p == s->end) return fail(s, "a group is not closed");
        s->p++;
        s->depth--;
        return 0;
    case '[': return parse_class(s, out);
    case '.':
        add_range(&any, 0x20, 0x7e);
        *out = of_set(s, &any);
        return 0;
    case '\\':
        if (s->p == s->end) return fail(s, "it ends in a backslash");
        any.wide = false;
        if (add_named(&any, *s->p)) {
            s->p++;
            *out = of_set(s, &any);
            return 0;
        }
        if ((rc = escaped(s, &c))) return rc;
        *out = character(s, c);
        return 0;
    case '^':
    case '$': s->p--; return fail(s, "an anchor is supported at the beginning and at the end only");
    case '*':
    case '+':
    case '?':
    case '{': s->p--; return fail(s, "nothing stands before this repetition");
    default:
        if (c < 0x20 || c == 0x7f) return fail(s, "control characters are not supported");
        if (c < 128) {
            *out = character(s, c);
        } else { /* a whole UTF-8 sequence: a repetition after it is of the character */
            const char *from = s->p - 1;
            while (s->p < s->end && ((unsigned char)*s->p & 0xc0) == 0x80)
                s->p++;
            *out = tb_rule_text(s->g, from, (size_t)(s->p - from));
        }
        return 0;
    }
}

static bool number(struct parser *s, uint32_t *out)
{
    const char *from = s->p;
    uint32_t n = 0;
    while (s->p < s->end && *s->p >= '0' && *s->p <= '9' && n <= MAX_REPEAT)
        n = n * 10 + (uint32_t)(*s->p++ - '0');
    *out = n;
    return s->p > from && n <= MAX_REPEAT;
}

static int parse_repeat(struct parser *s, uint32_t *node)
{
    uint32_t min = 0, max = TB_GRAMMAR_UNBOUNDED;
    if (s->p == s->end || !strchr("*+?{", *s->p)) return 0;
    char c = *s->p++;
    if (c == '+') min = 1;
    if (c == '?') max = 1;
    if (c == '{') {
        if (!number(s, &min)) return fail(s, "a repetition has no number, or one above 10000");
        max = min;
        if (s->p < s->end && *s->p == ',') {
            s->p++;
            max = TB_GRAMMAR_UNBOUNDED;
            if (s->p < s->end && *s->p != '}' && (!number(s, &max) || max < min))
                return fail(s, "a repetition's bounds are wrong");
        }
        if (s->p == s->end || *s->p++ != '}') return fail(s, "a repetition is not closed");
    }
    if (s->p < s->end && strchr("?+*{", *s->p))
        return fail(s, "a repetition follows another, which is not supported");
    *node = tb_rule_repeat(s->g, *node, min, max);
    return 0;
}

static int parse_choice(struct parser *s, uint32_t *out)
{
    uint32_t all = 0, seq = TB_NODE_EMPTY;
    bool first = true;
    for (;;) {
        if (s->p == s->end || *s->p == ')' || *s->p == '|') {
            all = first ? seq : tb_rule_alt(s->g, all, seq);
            first = false;
            seq = TB_NODE_EMPTY;
            if (s->p == s->end || *s->p == ')') break;
            s->p++;
            continue;
        }
        uint32_t atom;
        int rc = parse_atom(s, &atom);
        if (rc || (rc = parse_repeat(s, &atom))) return rc;
        seq = tb_rule_seq(s->g, seq, atom);
    }
    *out = all;
    return 0;
}

int tb_json_rule_pattern(struct tb_grammar *g, const struct tb_json_rules *r, struct tb_span re,
                         uint32_t *out, struct tb_error *err)
{
    struct parser s = {g, r, re.p, re.p, re.p + re.n, 0, err};
    uint32_t node, any = tb_rule_repeat(g, r->character, 0, TB_GRAMMAR_UNBOUNDED);
    bool from_start = re.n && re.p[0] == '^', to_end = false;
    if (from_start) s.p++;
    if (s.end > s.p && s.end[-1] == '$') {
        const char *q = s.end - 1;
        while (q > s.p && q[-1] == '\\')
            q--;
        to_end = (s.end - 1 - q) % 2 == 0;
    }
    if (to_end) s.end--;
    int rc = parse_choice(&s, &node);
    if (rc) return rc;
    if (s.p < s.end) return fail(&s, "a group is closed that was not opened");
    if ((from_start || to_end) && memchr(re.p, '|', re.n) && s.depth == 0) {
        /* "^a|b$" anchors one alternative each, and means it rarely */
        int depth = 0;
        for (const char *p = re.p; p < re.p + re.n; p++) {
            if (*p == '\\')
                p++;
            else if (*p == '(' || *p == '[')
                depth++;
            else if (*p == ')' || *p == ']')
                depth--;
            else if (*p == '|' && depth == 0)
                return fail(&s, "an anchor beside a choice needs a group: ^(a|b)$");
        }
    }
    if (!from_start) node = tb_rule_seq(g, any, node);
    if (!to_end) node = tb_rule_seq(g, node, any);
    uint32_t quote = tb_rule_text(g, "\"", 1);
    *out = tb_rule_seq(g, quote, tb_rule_seq(g, node, quote));
    return 0;
}
