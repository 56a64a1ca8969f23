/*
 * JSON Schema to rules (grammar.h). What is known and cannot be enforced while text is made from
 * left to right is refused by name. Thread: the builder's.
 */
#include <float.h>
#include <jansson.h>
#include <string.h>

#include "grammar/rules.h"
#include "util/arena.h"
#include "util/limits.h"
#include "wire/json.h"

#define MAX_TEXT    (1 << 20)
#define MAX_LENGTH  (1 << 20) /* characters, items */
#define MAX_DEPTH   256       /* schemas in schemas, through $ref too */
#define MAX_MEMBERS 1024      /* of an object */
#define MAX_KEY     1024      /* bytes of a name that other names are told from */
#define MAX_ONE_OF  64
#define MAX_REFS    4096

struct ref { /* a place that $ref names */
    struct ref *next;
    const json_t *at;
    uint32_t node;
};

struct schema {
    struct tb_grammar *g;
    struct tb_json_rules r;
    struct tb_json_doc doc;
    struct tb_arena arena;
    struct ref *refs;
    int depth, n_refs;
    struct tb_error *err;
};

static const char *const REFUSED[] = {"not",
                                      "if",
                                      "then",
                                      "else",
                                      "dependentRequired",
                                      "dependentSchemas",
                                      "dependencies",
                                      "patternProperties",
                                      "propertyNames",
                                      "minProperties",
                                      "maxProperties",
                                      "contains",
                                      "minContains",
                                      "maxContains",
                                      "multipleOf",
                                      "unevaluatedProperties",
                                      "unevaluatedItems",
                                      "$dynamicRef",
                                      "$recursiveRef",
                                      "additionalItems"};

static const struct {
    const char *name, *pattern;
} FORMATS[] = {
    {"date", "^[0-9]{4}-((0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])|(0[13-9]|1[0-2])-(29|30)|"
             "(0[13578]|1[02])-31)$"},
    {"time", "^([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):"
             "[0-5][0-9])$"},
    {"date-time", "^[0-9]{4}-((0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])|(0[13-9]|1[0-2])-(29|30)|"
                  "(0[13578]|1[02])-31)T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,6})?"
                  "(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$"},
    {"uuid", "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"},
    {"ipv4", "^((25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\\.){3}"
             "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])$"},
    {"email", "^[A-Za-z0-9_%+-]{1,20}(\\.[A-Za-z0-9_%+-]{1,20}){0,2}@([A-Za-z0-9]{1,20}\\.){1,3}"
              "[A-Za-z]{2,10}$"},
    {"uri", "^https?://[a-z0-9]{1,30}(\\.[a-z0-9]{1,30}){0,4}(/[A-Za-z0-9_.~-]{0,60}){0,8}$"},
};

static int compile(struct schema *s, const struct tb_json *at, uint32_t *out);

static uint32_t text(struct schema *s, const char *t)
{
    return tb_rule_text(s->g, t, strlen(t));
}

static uint32_t alt(struct schema *s, uint32_t n, uint32_t all, uint32_t one)
{
    return n ? tb_rule_alt(s->g, all, one) : one;
}

/* A value as it is written, without spaces. */
static int literal(struct schema *s, const struct tb_json *at, const json_t *v, uint32_t *out)
{
    char *t = json_dumps(v, JSON_COMPACT | JSON_ENCODE_ANY);
    if (!t) return tb_json_fail(at, s->err, TB_ENOMEM, "cannot be written as JSON");
    *out = text(s, t);
    free(t); /* jansson's own memory */
    return 0;
}

static bool is_a(const json_t *v, const char *type)
{
    if (!type) return false;
    switch (json_typeof(v)) {
    case JSON_OBJECT: return strcmp(type, "object") == 0;
    case JSON_ARRAY: return strcmp(type, "array") == 0;
    case JSON_STRING: return strcmp(type, "string") == 0;
    case JSON_INTEGER: return strcmp(type, "integer") == 0 || strcmp(type, "number") == 0;
    case JSON_REAL: return strcmp(type, "number") == 0;
    case JSON_TRUE:
    case JSON_FALSE: return strcmp(type, "boolean") == 0;
    case JSON_NULL: return strcmp(type, "null") == 0;
    }
    return false;
}

/* Is v of the type, or one of the types, that the schema names beside its values? */
static bool has_type(const json_t *v, const json_t *schema)
{
    const json_t *type = json_object_get(schema, "type");
    if (!json_is_array(type)) return !type || is_a(v, json_string_value(type));
    for (size_t i = 0; i < json_array_size(type); i++)
        if (is_a(v, json_string_value(json_array_get(type, i)))) return true;
    return false;
}

static int bounds(struct schema *s, const struct tb_json *at, const char *lo, const char *hi,
                  uint32_t *min, uint32_t *max);
static int limits(struct schema *s, const struct tb_json *at, double limit[4]);

/* *fits: does the schema hold for v, apart from const and enum? Keywords that cannot be told here
 * are refused. */
static int validate(struct schema *s, const struct tb_json *schema, const json_t *v, bool *fits)
{
    static const struct {
        const char *type, *keyword;
    } unknown[] = {{"string", "pattern"},    {"string", "format"},
                   {"array", "items"},       {"array", "prefixItems"},
                   {"array", "uniqueItems"}, {"object", "properties"},
                   {"object", "required"},   {"object", "additionalProperties"}};
    uint32_t min = 0, max = TB_GRAMMAR_UNBOUNDED;
    size_t size = 0;
    double limit[4], x = json_number_value(v);
    int rc = 0;
    *fits = has_type(v, schema->v);
    for (size_t i = 0; *fits && i < TB_ARRAY_LEN(unknown); i++)
        if (is_a(v, unknown[i].type) && json_object_get(schema->v, unknown[i].keyword))
            return tb_json_fail(schema, s->err, TB_EUNSUPPORTED,
                                "%s beside const or enum cannot be enforced", unknown[i].keyword);
    if (json_is_string(v)) {
        rc = bounds(s, schema, "minLength", "maxLength", &min, &max);
        size = tb_utf8_characters(json_string_value(v), json_string_length(v));
    } else if (json_is_array(v)) {
        rc = bounds(s, schema, "minItems", "maxItems", &min, &max);
        size = json_array_size(v);
    } else if (json_is_number(v)) {
        rc = limits(s, schema, limit);
        if (rc == 0)
            *fits = *fits && x >= limit[0] && x <= limit[1] && x > limit[2] && x < limit[3];
    }
    *fits = *fits && size >= min && size <= max;
    return rc;
}

/* The values, n of them, for which the rest of the schema holds. */
static int compile_values(struct schema *s, const struct tb_json *at, json_t *const *v, size_t n,
                          uint32_t *out)
{
    uint32_t k = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t one = TB_NODE_EMPTY;
        bool fits;
        int rc = validate(s, at->up, v[i], &fits);
        if (rc == 0 && !fits) continue;
        if (rc || (rc = literal(s, at, v[i], &one))) return rc;
        *out = alt(s, k++, *out, one);
    }
    return k ? 0
             : tb_json_fail(at, s->err, TB_EINVAL, "holds no value that fits what is beside it");
}

static int compile_enum(struct schema *s, const struct tb_json *at, uint32_t *out)
{
    size_t n = json_array_size(at->v);
    if (!json_is_array(at->v) || n == 0)
        return tb_json_fail(at, s->err, TB_EINVAL, "is not an array of values");
    json_t **v = tb_arena_try_array(&s->arena, n, sizeof(json_t *));
    if (!v) return tb_json_fail(at, s->err, TB_ENOMEM, "no memory for %zu values", n);
    for (size_t i = 0; i < n; i++)
        v[i] = json_array_get(at->v, i);
    return compile_values(s, at, v, n, out);
}

static int compile_any_of(struct schema *s, const struct tb_json *at, uint32_t *out)
{
    size_t n = tb_json_len(at);
    if (!tb_json_is_array(at) || n == 0)
        return tb_json_fail(at, s->err, TB_EINVAL, "is not an array of schemas");
    for (size_t i = 0; i < n; i++) {
        struct tb_json one;
        uint32_t node = TB_NODE_EMPTY;
        tb_json_at(at, i, &one);
        int rc = compile(s, &one, &node);
        if (rc) return rc;
        *out = alt(s, (uint32_t)i, *out, node);
    }
    return 0;
}

/* ---- $ref: "#", or a JSON pointer within the document */

/* A part of a pointer as the key that it stands for. */
static const char *unescape(struct schema *s, const char *p, size_t n)
{
    char *key = tb_arena_strndup(&s->arena, p, n), *to = key;
    for (const char *c = key; *c; c++) {
        if (c[0] == '~' && (c[1] == '0' || c[1] == '1'))
            *to++ = *++c == '1' ? '/' : '~';
        else
            *to++ = *c;
    }
    *to = 0;
    return key;
}

/* Walks the pointer path; *way[n] is the place. Returns n, or -1 when it is not there. */
static int find_place(struct schema *s, const char *path, struct tb_json way[TB_MAX_JSON_DEPTH + 1])
{
    int n = 0;
    way[0] = s->doc.root;
    if (*path++ != '#' || (*path && *path != '/')) return -1;
    for (; *path == '/'; n++) {
        size_t len = strcspn(path + 1, "/");
        const char *key = unescape(s, path + 1, len);
        if (n == TB_MAX_JSON_DEPTH || !tb_json_find(&way[n], key, &way[n + 1])) return -1;
        path += 1 + len;
    }
    return n;
}

static int compile_ref(struct schema *s, const struct tb_json *at, uint32_t *out)
{
    struct tb_json way[TB_MAX_JSON_DEPTH + 1];
    const char *path;
    int rc = tb_json_as_string(at, &s->arena, 1024, &path, s->err);
    if (rc) return rc;
    int n = find_place(s, path, way);
    if (n < 0)
        return tb_json_fail(at, s->err, TB_EINVAL,
                            "\"%s\" is no place in this schema (\"#/$defs/name\" would be)", path);
    for (struct ref *r = s->refs; r; r = r->next) {
        if (r->at == way[n].v) {
            *out = r->node;
            return 0;
        }
    }
    if (s->n_refs++ == MAX_REFS)
        return tb_json_fail(at, s->err, TB_ETOOBIG, "there are more than %d places that $ref names",
                            MAX_REFS);
    struct ref *r = tb_arena_alloc(&s->arena, sizeof(*r));
    *r = (struct ref){s->refs, way[n].v, tb_rule_ref(s->g)};
    s->refs = r;
    uint32_t node = TB_NODE_EMPTY;
    if ((rc = compile(s, &way[n], &node))) return rc;
    tb_rule_define(s->g, r->node, node);
    *out = r->node;
    return 0;
}

static bool is_required(const json_t *required, const char *name)
{
    for (size_t i = 0; i < json_array_size(required); i++) {
        const char *r = json_string_value(json_array_get(required, i));
        if (r && strcmp(r, name) == 0) return true;
    }
    return false;
}

/* ---- oneOf: alternatives of which a value can match only one */

/* The schema itself, or the one that its $ref names. */
static json_t *behind_ref(struct schema *s, json_t *schema)
{
    struct tb_json way[TB_MAX_JSON_DEPTH + 1];
    const char *path = json_string_value(json_object_get(schema, "$ref"));
    int n = path ? find_place(s, path, way) : -1;
    return n < 0 ? schema : way[n].v;
}

/* What a schema without a type is about, by its keywords; NULL: anything. */
static const char *implied_type(const json_t *schema)
{
    static const struct {
        const char *keyword, *type;
    } implied[] = {{"properties", "object"},
                   {"required", "object"},
                   {"additionalProperties", "object"},
                   {"items", "array"},
                   {"prefixItems", "array"},
                   {"minItems", "array"},
                   {"maxItems", "array"},
                   {"uniqueItems", "array"},
                   {"pattern", "string"},
                   {"format", "string"},
                   {"minLength", "string"},
                   {"maxLength", "string"},
                   {"minimum", "number"},
                   {"maximum", "number"},
                   {"exclusiveMinimum", "number"},
                   {"exclusiveMaximum", "number"}};
    for (size_t i = 0; i < TB_ARRAY_LEN(implied); i++)
        if (json_object_get(schema, implied[i].keyword)) return implied[i].type;
    return NULL;
}

static const char *type_name(const json_t *schema)
{
    const json_t *type = json_object_get(schema, "type");
    if (!type) return implied_type(schema);
    const char *name = json_string_value(type);
    return name && strcmp(name, "integer") == 0 ? "number" : name;
}

/* True when the types differ, or the constants, or those of a member that both require. */
static bool apart(json_t *a, json_t *b)
{
    const char *ta = type_name(a), *tb = type_name(b), *key;
    if (ta && tb && strcmp(ta, tb) != 0) return true;
    json_t *va = json_object_get(a, "const"), *vb = json_object_get(b, "const");
    if (va && vb) return !json_equal(va, vb);
    json_t *pb = json_object_get(b, "properties"), *value;
    json_object_foreach(json_object_get(a, "properties"), key, value)
    {
        json_t *ca = json_object_get(value, "const");
        json_t *cb = json_object_get(json_object_get(pb, key), "const");
        if (ca && cb && !json_equal(ca, cb) && is_required(json_object_get(a, "required"), key) &&
            is_required(json_object_get(b, "required"), key))
            return true;
    }
    return false;
}

static bool exclusive(struct schema *s, json_t *list)
{
    for (size_t i = 0; i < json_array_size(list); i++)
        for (size_t j = 0; j < i; j++)
            if (!apart(behind_ref(s, json_array_get(list, i)),
                       behind_ref(s, json_array_get(list, j))))
                return false;
    return true;
}

/* Is all that one matches of the type beside it in schema? */
static bool keeps_type(struct schema *s, const json_t *schema, json_t *one)
{
    const json_t *type = json_object_get(schema, "type");
    one = behind_ref(s, one);
    json_t *own = json_object_get(one, "type"), *value = json_object_get(one, "const");
    if (!type || (own && json_equal(type, own))) return true;
    if (value) return has_type(value, schema);
    const char *implied = own ? NULL : implied_type(one), *name = json_string_value(type);
    return implied && name && strcmp(implied, name) == 0;
}

/* ---- strings and numbers */

static int bounds(struct schema *s, const struct tb_json *at, const char *lo, const char *hi,
                  uint32_t *min, uint32_t *max)
{
    int64_t a = 0, b = -1;
    *min = 0;
    *max = TB_GRAMMAR_UNBOUNDED;
    int rc = tb_json_int(at, lo, false, 0, MAX_LENGTH, &a, s->err);
    if (rc || (rc = tb_json_int(at, hi, false, 0, INT32_MAX, &b, s->err))) return rc;
    if (b >= 0 && b < a)
        return tb_json_fail(at, s->err, TB_EINVAL, "%s %d is above %s %d", lo, (int)a, hi, (int)b);
    *min = (uint32_t)a;
    if (b >= 0 && b <= MAX_LENGTH) *max = (uint32_t)b;
    if (b > MAX_LENGTH)
        return tb_json_fail(at, s->err, TB_EUNSUPPORTED, "%s %d is above %d", hi, (int)b,
                            MAX_LENGTH);
    return 0;
}

static int compile_string(struct schema *s, const struct tb_json *at, uint32_t *out)
{
    struct tb_json pattern, format;
    bool has_pattern = tb_json_find(at, "pattern", &pattern);
    bool has_format = tb_json_find(at, "format", &format);
    uint32_t min, max;
    const char *re = NULL;
    int rc = bounds(s, at, "minLength", "maxLength", &min, &max);
    if (rc) return rc;
    if (!has_pattern && !has_format) {
        *out = tb_json_rule_string(s->g, s->r.character, min, max);
        return 0;
    }
    if (min || max != TB_GRAMMAR_UNBOUNDED || (has_pattern && has_format))
        return tb_json_fail(at, s->err, TB_EUNSUPPORTED,
                            "only one of pattern, format and minLength or maxLength can be "
                            "enforced in one string");
    rc = tb_json_as_string(has_pattern ? &pattern : &format, &s->arena, 4096, &re, s->err);
    if (rc) return rc;
    if (has_format) {
        size_t i = 0;
        while (i < TB_ARRAY_LEN(FORMATS) && strcmp(FORMATS[i].name, re) != 0)
            i++;
        if (i == TB_ARRAY_LEN(FORMATS))
            return tb_json_fail(&format, s->err, TB_EUNSUPPORTED,
                                "\"%s\" cannot be enforced (date, time, date-time, uuid, ipv4, "
                                "email and uri can)",
                                re);
        re = FORMATS[i].pattern;
    }
    struct tb_error e = {0};
    rc = tb_json_rule_pattern(s->g, &s->r, tb_span_str(re), out, &e);
    return rc ? tb_json_fail(at, s->err, rc, "%s", e.msg) : 0;
}

/* Adds the numbers with a fraction whose size is from lo (`above`: more than lo) to hi: whole
 * numbers with all of the way to the next one between lo and hi, and any digits behind the point.
 */
static void fractions(struct schema *s, const char *sign, double lo, bool above, double hi,
                      uint32_t *out, uint32_t *n)
{
    const double most = (double)TB_JSON_INTEGER_MAX;
    uint32_t any = tb_rule_range(s->g, '0', '9');
    if (lo < 0) {
        lo = 0;
        above = false;
    }
    if (lo > most || hi < 1) return;
    int64_t from = (int64_t)lo, to = (hi > most ? TB_JSON_INTEGER_MAX : (int64_t)hi) - 1;
    if ((double)from < lo) {
        from++;
        above = false;
    }
    if (above && from <= to) { /* lo itself may not be written with zeros */
        uint32_t rest =
            tb_rule_seq(s->g, tb_rule_range(s->g, '1', '9'), tb_rule_repeat(s->g, any, 0, 7));
        rest = tb_rule_seq(s->g, tb_rule_repeat(s->g, text(s, "0"), 0, 7), rest);
        rest = tb_rule_seq(s->g, text(s, "."), rest);
        rest = tb_rule_seq(s->g, tb_json_rule_integer(s->g, from, from), rest);
        *out = alt(s, (*n)++, *out, tb_rule_seq(s->g, text(s, sign), rest));
        from++;
    }
    if (from <= to) {
        uint32_t rest = tb_rule_seq(s->g, text(s, "."), tb_rule_repeat(s->g, any, 1, 15));
        rest = tb_rule_seq(s->g, tb_json_rule_integer(s->g, from, to), rest);
        *out = alt(s, (*n)++, *out, tb_rule_seq(s->g, text(s, sign), rest));
    }
}

/* minimum, maximum, exclusiveMinimum, exclusiveMaximum; +-DBL_MAX where there is none. */
static int limits(struct schema *s, const struct tb_json *at, double limit[4])
{
    static const char *const keys[4] = {"minimum", "maximum", "exclusiveMinimum",
                                        "exclusiveMaximum"};
    int rc = 0;
    for (int i = 0; rc == 0 && i < 4; i++) {
        limit[i] = i % 2 ? DBL_MAX : -DBL_MAX;
        rc = tb_json_double(at, keys[i], false, -DBL_MAX, DBL_MAX, &limit[i], s->err);
    }
    return rc;
}

static int compile_number(struct schema *s, const struct tb_json *at, bool whole, uint32_t *out)
{
    const double none = DBL_MAX, most = (double)TB_JSON_INTEGER_MAX;
    double limit[4];
    int rc = limits(s, at, limit);
    if (rc) return rc;
    double lo = limit[0], hi = limit[1], above = limit[2], below = limit[3];
    if (lo == -none && hi == none && above == -none && below == none) {
        *out = whole ? s->r.integer : s->r.number;
        return 0;
    }
    /* whole numbers from a to b */
    double a = lo > above ? lo : above, b = hi < below ? hi : below;
    int64_t from = a < -most ? -TB_JSON_INTEGER_MAX : a > most ? TB_JSON_INTEGER_MAX : (int64_t)a;
    int64_t to = b < -most ? -TB_JSON_INTEGER_MAX : b > most ? TB_JSON_INTEGER_MAX : (int64_t)b;
    if ((double)from < a || ((double)from == above && above >= lo)) from++;
    if ((double)to > b || ((double)to == below && below <= hi)) to--;
    uint32_t n = from <= to && a <= most && b >= -most;
    if (n) *out = tb_json_rule_integer(s->g, from, to);
    if (!whole) {
        fractions(s, "", a, above >= lo, b, out, &n);
        fractions(s, "-", -b, below <= hi, -a, out, &n);
    }
    if (n == 0)
        return tb_json_fail(at, s->err, TB_EUNSUPPORTED,
                            "no whole number lies between its minimum and maximum");
    return 0;
}

/* ---- arrays and objects */

static int compile_array(struct schema *s, const struct tb_json *at, uint32_t *out)
{
    struct tb_json items, prefix;
    bool unique = false;
    uint32_t min, max, item = s->r.value;
    int rc = bounds(s, at, "minItems", "maxItems", &min, &max);
    if (rc || (rc = tb_json_bool(at, "uniqueItems", false, &unique, s->err))) return rc;
    if (unique) return tb_json_fail(at, s->err, TB_EUNSUPPORTED, "uniqueItems cannot be enforced");
    bool has_items = tb_json_find(at, "items", &items);
    bool no_more = has_items && json_is_false(items.v);
    if (has_items && !no_more && (rc = compile(s, &items, &item))) return rc;
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
    uint32_t comma = tb_rule_seq(s->g, text(s, ","), s->r.space);
    for (uint32_t i = 0; i < n; i++) {
        struct tb_json one;
        uint32_t node = TB_NODE_EMPTY;
        tb_json_at(&prefix, i, &one);
        if ((rc = compile(s, &one, &node))) return rc;
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
    *out = tb_rule_seq(s->g, text(s, "["),
                       tb_rule_seq(s->g, s->r.space, tb_rule_seq(s->g, body, text(s, "]"))));
    return 0;
}

/* The rest of a key, with its closing quote, that is none of names[0..n), all of which have their
 * first `at` bytes in common with it. Where it first differs it is an ASCII character; then comes
 * any_rest. */
static uint32_t other_key(struct schema *s, const char **names, size_t n, size_t at,
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
    out = alt(s, k++, out, tb_rule_seq(s->g, tb_rule_set(s->g, others), any_rest));
    if (!ends) out = alt(s, k++, out, text(s, "\""));
    for (unsigned c = 0x20; c < 0x7f; c++) {
        if (!taken[c] || c == '"' || c == '\\') continue;
        const char **some = tb_arena_alloc(&s->arena, n * sizeof(*some));
        size_t n_some = 0;
        for (size_t i = 0; i < n; i++)
            if ((unsigned char)names[i][at] == c) some[n_some++] = names[i];
        uint32_t rest = other_key(s, some, n_some, at + 1, any_rest);
        out = alt(s, k++, out, tb_rule_seq(s->g, tb_rule_range(s->g, c, c), rest));
    }
    return out;
}

/* "name": value and the space behind it */
static int member(struct schema *s, const struct tb_json *at, const char *name, uint32_t value,
                  uint32_t *out)
{
    json_t *key = json_string(name);
    int rc = literal(s, at, key, out);
    json_decref(key);
    uint32_t colon = tb_rule_seq(s->g, text(s, ":"), s->r.space);
    *out = tb_rule_seq(s->g, *out, tb_rule_seq(s->g, colon, tb_rule_seq(s->g, value, s->r.space)));
    return rc;
}

static int compile_object(struct schema *s, const struct tb_json *at, uint32_t *out)
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
        must[n] = has_required && is_required(required.v, one.key);
        if ((rc = compile(s, &one, &value)) ||
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
    uint32_t comma = tb_rule_seq(s->g, text(s, ","), s->r.space);
    uint32_t first = TB_NODE_EMPTY, next = TB_NODE_EMPTY;
    if (free_members) {
        uint32_t value = s->r.value;
        if (has_extra && !json_is_true(extra.v) && (rc = compile(s, &extra, &value))) return rc;
        for (size_t i = 0; i < n; i++)
            if (strlen(names[i]) > MAX_KEY)
                return tb_json_fail(at, s->err, TB_ETOOBIG,
                                    "a name of %zu bytes is longer than %d, beside others that "
                                    "are not listed",
                                    strlen(names[i]), MAX_KEY);
        uint32_t quote = text(s, "\""), key = s->r.string;
        uint32_t rest = tb_rule_repeat(s->g, s->r.plain, 0, TB_GRAMMAR_UNBOUNDED);
        rest = tb_rule_seq(s->g, rest, quote);
        if (n) key = tb_rule_seq(s->g, quote, other_key(s, names, n, 0, rest));
        uint32_t m =
            tb_rule_seq(s->g, tb_rule_seq(s->g, key, text(s, ":")),
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
    *out = tb_rule_seq(s->g, text(s, "{"),
                       tb_rule_seq(s->g, s->r.space, tb_rule_seq(s->g, first, text(s, "}"))));
    return 0;
}

/* ---- any schema */

static int compile_type(struct schema *s, const struct tb_json *at, const char *type, uint32_t *out)
{
    if (strcmp(type, "object") == 0) return compile_object(s, at, out);
    if (strcmp(type, "array") == 0) return compile_array(s, at, out);
    if (strcmp(type, "string") == 0) return compile_string(s, at, out);
    if (strcmp(type, "integer") == 0) return compile_number(s, at, true, out);
    if (strcmp(type, "number") == 0) return compile_number(s, at, false, out);
    if (strcmp(type, "boolean") == 0) {
        *out = s->r.boolean;
        return 0;
    }
    if (strcmp(type, "null") == 0) {
        *out = s->r.null;
        return 0;
    }
    return tb_json_fail(at, s->err, TB_EINVAL, "type \"%s\" is not one of JSON's", type);
}

static int compile_types(struct schema *s, const struct tb_json *at, uint32_t *out)
{
    struct tb_json type;
    if (!tb_json_find(at, "type", &type)) {
        const char *name = implied_type(at->v);
        if (name) return compile_type(s, at, name, out);
        *out = s->r.value;
        return 0;
    }
    if (json_is_string(type.v)) return compile_type(s, at, json_string_value(type.v), out);
    size_t n = tb_json_len(&type);
    if (!tb_json_is_array(&type) || n == 0)
        return tb_json_fail(&type, s->err, TB_EINVAL, "is not a type or an array of types");
    for (size_t i = 0; i < n; i++) {
        const char *name = json_string_value(json_array_get(type.v, i));
        uint32_t one = TB_NODE_EMPTY;
        if (!name) return tb_json_fail(&type, s->err, TB_EINVAL, "is not an array of types");
        int rc = compile_type(s, at, name, &one);
        if (rc) return rc;
        *out = alt(s, (uint32_t)i, *out, one);
    }
    return 0;
}

/* The one keyword that alone says what a value is; others beside it could not be enforced. */
static int compile_schema(struct schema *s, const struct tb_json *at, uint32_t *out)
{
    static const char *const whole[] = {"$ref", "const", "enum", "anyOf", "oneOf", "allOf"};
    static const char *const typed[] = {"properties",       "additionalProperties",
                                        "required",         "items",
                                        "prefixItems",      "minItems",
                                        "maxItems",         "uniqueItems",
                                        "pattern",          "format",
                                        "minLength",        "maxLength",
                                        "minimum",          "maximum",
                                        "exclusiveMinimum", "exclusiveMaximum"};
    *out = s->r.value;
    if (json_is_true(at->v)) return 0;
    if (!tb_json_is_object(at))
        return tb_json_fail(at, s->err, TB_EINVAL, "is not a schema (an object or true)");
    for (size_t i = 0; i < TB_ARRAY_LEN(REFUSED); i++)
        if (json_object_get(at->v, REFUSED[i]))
            return tb_json_fail(at, s->err, TB_EUNSUPPORTED, "%s cannot be enforced", REFUSED[i]);
    const char *one = NULL;
    struct tb_json v = {NULL, at, NULL, 0};
    for (size_t i = 0; i < TB_ARRAY_LEN(whole); i++) {
        json_t *found = json_object_get(at->v, whole[i]);
        if (!found) continue;
        if (one)
            return tb_json_fail(at, s->err, TB_EUNSUPPORTED, "%s beside %s cannot be enforced", one,
                                whole[i]);
        one = v.key = whole[i];
        v.v = found;
    }
    if (!one) return compile_types(s, at, out);
    bool literal_value = strcmp(one, "const") == 0 || strcmp(one, "enum") == 0;
    for (size_t i = 0; !literal_value && i < TB_ARRAY_LEN(typed); i++)
        if (json_object_get(at->v, typed[i]))
            return tb_json_fail(at, s->err, TB_EUNSUPPORTED, "%s beside %s cannot be enforced", one,
                                typed[i]);
    bool list = json_is_array(v.v), kept = true;
    for (size_t i = 0; !literal_value && i < (list ? json_array_size(v.v) : 1); i++)
        kept = kept && keeps_type(s, at->v, list ? json_array_get(v.v, i) : at->v);
    if (!kept)
        return tb_json_fail(at, s->err, TB_EUNSUPPORTED,
                            "type beside %s cannot be enforced where that has another", one);
    if (strcmp(one, "$ref") == 0) return compile_ref(s, &v, out);
    if (strcmp(one, "const") == 0) return compile_values(s, &v, &v.v, 1, out);
    if (strcmp(one, "enum") == 0) return compile_enum(s, &v, out);
    if (strcmp(one, "anyOf") == 0) return compile_any_of(s, &v, out);
    if (strcmp(one, "oneOf") == 0 && tb_json_len(&v) > MAX_ONE_OF)
        return tb_json_fail(&v, s->err, TB_ETOOBIG, "has more than %d schemas", MAX_ONE_OF);
    if (strcmp(one, "oneOf") == 0 && !exclusive(s, v.v))
        return tb_json_fail(&v, s->err, TB_EUNSUPPORTED,
                            "cannot be enforced where two alternatives may both match; use anyOf");
    if (strcmp(one, "allOf") == 0 && tb_json_len(&v) != 1)
        return tb_json_fail(&v, s->err, TB_EUNSUPPORTED,
                            "cannot be enforced with other than one schema in it");
    return compile_any_of(s, &v, out);
}

static int compile(struct schema *s, const struct tb_json *at, uint32_t *out)
{
    if (s->depth == MAX_DEPTH)
        return tb_json_fail(at, s->err, TB_ETOOBIG,
                            "schemas are nested deeper than %d through their $refs", MAX_DEPTH);
    s->depth++;
    int rc = compile_schema(s, at, out);
    s->depth--;
    return rc;
}

int tb_grammar_create_schema(struct tb_vocab *v, struct tb_span schema, struct tb_grammar **out,
                             struct tb_error *err)
{
    struct schema s = {.err = err};
    uint32_t root;
    if (schema.n > MAX_TEXT)
        return tb_error_set(err, TB_ETOOBIG, "the schema has %zu bytes, more than %d", schema.n,
                            MAX_TEXT);
    int rc = tb_json_parse(&s.doc, schema.p, schema.n, err);
    if (rc) return rc;
    tb_rules_create(v, &s.g);
    tb_arena_init(&s.arena);
    tb_json_rules_make(s.g, &s.r);
    rc = compile(&s, &s.doc.root, &root);
    if (!rc) rc = tb_rules_finish(s.g, root, err);
    tb_arena_fini(&s.arena);
    tb_json_free(&s.doc);
    if (rc)
        tb_grammar_unref(s.g);
    else
        *out = s.g;
    return rc;
}
