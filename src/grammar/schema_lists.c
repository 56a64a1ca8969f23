/*
 * Arrays and objects of a schema (schema.h). Thread: the builder's.
 */
#include "grammar/schema.h"

#define MAX_MEMBERS 1024 /* of an object */
#define MAX_KEY     1024 /* bytes of a name that other names are told from */

int tb_schema_array(struct tb_schema *s, const struct tb_json *at, uint32_t *out)
{
    struct tb_json items, prefix;
    bool unique = false;
    uint32_t min, max, item = s->r.value;
    int rc = tb_schema_bounds(s, at, "minItems", "maxItems", &min, &max);
    if (rc || (rc = tb_json_bool(at, "uniqueItems", false, &unique, s->err))) return rc;
    if (unique) return tb_json_fail(at, s->err, TB_EUNSUPPORTED, "uniqueItems cannot be enforced");
    bool has_items = tb_json_find(at, "items", &items);
    bool no_more = has_items && json_is_false(items.v);
    if (has_items && !no_more && (rc = tb_schema_compile(s, &items, &item))) return rc;
    if (!tb_json_find(at, "prefixItems", &prefix)) {
        if (no_more && min)
            return tb_json_fail(at, s->err, TB_EINVAL, "minItems %d but no items", (int)min);
        *out = tb_json_rule_list(s->g, &s->r, "[", item, min, no_more ? 0 : max, "]");
        return 0;
    }
    /* a tuple: all of the prefix, then items where the schema has them */
    uint32_t n = (uint32_t)tb_json_len(&prefix), body = TB_NODE_EMPTY;
    if (!tb_json_is_array(&prefix) || n == 0)
        return tb_json_fail(&prefix, s->err, TB_EINVAL, "is not an array of schemas");
    if (max < n)
        return tb_json_fail(at, s->err, TB_EUNSUPPORTED,
                            "maxItems %u is below the number of prefixItems, %u", max, n);
    if (!has_items && min <= n) no_more = true;
    uint32_t comma = tb_rule_seq(s->g, tb_schema_text(s, ","), s->r.space);
    for (uint32_t i = 0; i < n; i++) {
        struct tb_json one;
        uint32_t node = TB_NODE_EMPTY;
        tb_json_at(&prefix, i, &one);
        if ((rc = tb_schema_compile(s, &one, &node))) return rc;
        node = tb_rule_seq(s->g, node, s->r.space);
        body = i ? tb_rule_seq(s->g, body, tb_rule_seq(s->g, comma, node)) : node;
    }
    if (no_more && min > n)
        return tb_json_fail(at, s->err, TB_EINVAL, "minItems %u but %u items", min, n);
    if (!no_more) {
        uint32_t more = tb_rule_seq(s->g, comma, tb_rule_seq(s->g, item, s->r.space));
        body = tb_rule_seq(s->g, body,
                           tb_rule_repeat(s->g, more, min > n ? min - n : 0,
                                          max == TB_GRAMMAR_UNBOUNDED ? max : max - n));
    }
    *out =
        tb_rule_seq(s->g, tb_schema_text(s, "["),
                    tb_rule_seq(s->g, s->r.space, tb_rule_seq(s->g, body, tb_schema_text(s, "]"))));
    return 0;
}

bool tb_schema_is_required(const json_t *required, const char *name)
{
    for (size_t i = 0; i < json_array_size(required); i++) {
        const char *r = json_string_value(json_array_get(required, i));
        if (r && strcmp(r, name) == 0) return true;
    }
    return false;
}

/* The rest of a key, with its closing quote, that is none of names[0..n), all of which have their
 * first `at` bytes in common with it. Where it first differs it is an ASCII character; then comes
 * any_rest. */
static uint32_t other_key(struct tb_schema *s, const char **names, size_t n, size_t at,
                          uint32_t any_rest)
{
    struct tb_byte_set others = {{0}};
    uint32_t out = 0, k = 0;
    bool taken[128] = {false}, ends = false;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)names[i][at];
        ends |= c == 0;
        if (c < 128) taken[c] = true;
    }
    for (unsigned c = 0x20; c < 0x7f; c++)
        if (!taken[c] && c != '"' && c != '\\') others.w[c / 64] |= 1ull << c % 64;
    out = tb_schema_alt(s, k++, out, tb_rule_seq(s->g, tb_rule_set(s->g, others), any_rest));
    if (!ends) out = tb_schema_alt(s, k++, out, tb_schema_text(s, "\""));
    for (unsigned c = 0x20; c < 0x7f; c++) {
        if (!taken[c] || c == '"' || c == '\\') continue;
        const char **some = tb_arena_alloc(&s->arena, n * sizeof(*some));
        size_t n_some = 0;
        for (size_t i = 0; i < n; i++)
            if ((unsigned char)names[i][at] == c) some[n_some++] = names[i];
        uint32_t rest = other_key(s, some, n_some, at + 1, any_rest);
        out = tb_schema_alt(s, k++, out, tb_rule_seq(s->g, tb_rule_range(s->g, c, c), rest));
    }
    return out;
}

/* "name": value and the space behind it */
static int member(struct tb_schema *s, const struct tb_json *at, const char *name, uint32_t value,
                  uint32_t *out)
{
    json_t *key = json_string(name);
    int rc = tb_schema_literal(s, at, key, out);
    json_decref(key);
    uint32_t colon = tb_rule_seq(s->g, tb_schema_text(s, ":"), s->r.space);
    *out = tb_rule_seq(s->g, *out, tb_rule_seq(s->g, colon, tb_rule_seq(s->g, value, s->r.space)));
    return rc;
}

int tb_schema_object(struct tb_schema *s, const struct tb_json *at, uint32_t *out)
{
    struct tb_json properties, required, extra, one;
    bool has_properties = tb_json_find(at, "properties", &properties);
    bool has_required = tb_json_find(at, "required", &required);
    bool has_extra = tb_json_find(at, "additionalProperties", &extra);
    if (has_properties && !tb_json_is_object(&properties))
        return tb_json_fail(&properties, s->err, TB_EINVAL, "is not an object of schemas");
    if (has_required && !tb_json_is_array(&required))
        return tb_json_fail(&required, s->err, TB_EINVAL, "is not an array of names");
    size_t n_listed = has_properties ? tb_json_len(&properties) : 0, n = 0;
    size_t n_required = has_required ? tb_json_len(&required) : 0, cap = n_listed + n_required;
    if (n_listed > MAX_MEMBERS || n_required > MAX_MEMBERS)
        return tb_json_fail(at, s->err, TB_ETOOBIG,
                            "%zu properties, %zu of them required, are more than %d", n_listed,
                            n_required, MAX_MEMBERS);
    const char **names = tb_arena_calloc(&s->arena, cap + 1, sizeof(*names));
    uint32_t *members = tb_arena_calloc(&s->arena, cap + 1, sizeof(*members));
    bool *must = tb_arena_calloc(&s->arena, cap + 1, sizeof(*must));
    int rc;
    void *it = NULL;
    while (has_properties && tb_json_next(&properties, &it, &one)) {
        uint32_t value = TB_NODE_EMPTY;
        names[n] = one.key;
        must[n] = has_required && tb_schema_is_required(required.v, one.key);
        if ((rc = tb_schema_compile(s, &one, &value)) ||
            (rc = member(s, &one, one.key, value, &members[n++])))
            return rc;
    }
    for (size_t i = 0; i < n_required; i++) {
        const char *name = json_string_value(json_array_get(required.v, i));
        if (!name) return tb_json_fail(&required, s->err, TB_EINVAL, "is not an array of names");
        size_t k = 0;
        while (k < n && strcmp(names[k], name) != 0)
            k++;
        if (k < n) continue;
        names[n] = name;
        must[n] = true;
        if ((rc = member(s, &required, name, s->r.value, &members[n++]))) return rc;
    }

    /* Members that the schema does not list come last, and only where it speaks of them. */
    bool free_members = has_extra ? !json_is_false(extra.v) : !has_properties;
    uint32_t comma = tb_rule_seq(s->g, tb_schema_text(s, ","), s->r.space);
    uint32_t first = TB_NODE_EMPTY, next = TB_NODE_EMPTY;
    if (free_members) {
        uint32_t value = s->r.value;
        if (has_extra && !json_is_true(extra.v) && (rc = tb_schema_compile(s, &extra, &value)))
            return rc;
        for (size_t i = 0; i < n; i++)
            if (strlen(names[i]) > MAX_KEY)
                return tb_json_fail(at, s->err, TB_ETOOBIG,
                                    "a name of %zu bytes is longer than %d, beside others that "
                                    "are not listed",
                                    strlen(names[i]), MAX_KEY);
        uint32_t quote = tb_schema_text(s, "\""), key = s->r.string;
        uint32_t rest = tb_rule_repeat(s->g, s->r.plain, 0, TB_GRAMMAR_UNBOUNDED);
        rest = tb_rule_seq(s->g, rest, quote);
        if (n) key = tb_rule_seq(s->g, quote, other_key(s, names, n, 0, rest));
        uint32_t m =
            tb_rule_seq(s->g, tb_rule_seq(s->g, key, tb_schema_text(s, ":")),
                        tb_rule_seq(s->g, s->r.space, tb_rule_seq(s->g, value, s->r.space)));
        next = tb_rule_repeat(s->g, tb_rule_seq(s->g, comma, m), 0, TB_GRAMMAR_UNBOUNDED);
        first = tb_rule_optional(s->g, tb_rule_seq(s->g, m, next));
    }
    /* first: what may follow "{" from member i on; next: what may follow another member */
    for (size_t i = n; i-- > 0;) {
        uint32_t begin = tb_rule_seq(s->g, members[i], next);
        uint32_t go_on = tb_rule_seq(s->g, tb_rule_seq(s->g, comma, members[i]), next);
        first = must[i] ? begin : tb_rule_alt(s->g, begin, first);
        next = must[i] ? go_on : tb_rule_alt(s->g, go_on, next);
    }
    *out = tb_rule_seq(
        s->g, tb_schema_text(s, "{"),
        tb_rule_seq(s->g, s->r.space, tb_rule_seq(s->g, first, tb_schema_text(s, "}"))));
    return 0;
}
