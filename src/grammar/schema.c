/*
 * JSON Schema to rules (grammar.h): any schema, $ref, and choices of schemas. What is known and
 * cannot be enforced while text is made from left to right is refused by name. Thread: the
 * builder's.
 */
#include "grammar/schema.h"
#include "util/limits.h"

#define MAX_TEXT   (1 << 20)
#define MAX_DEPTH  256 /* schemas in schemas, through $ref too */
#define MAX_ONE_OF 64
#define MAX_REFS   4096

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

static int compile_any_of(struct tb_schema *s, const struct tb_json *at, uint32_t *out)
{
    size_t n = tb_json_len(at);
    if (!tb_json_is_array(at) || n == 0)
        return tb_json_fail(at, s->err, TB_EINVAL, "is not an array of schemas");
    for (size_t i = 0; i < n; i++) {
        struct tb_json one;
        uint32_t node = TB_NODE_EMPTY;
        tb_json_at(at, i, &one);
        int rc = tb_schema_compile(s, &one, &node);
        if (rc) return rc;
        *out = tb_schema_alt(s, (uint32_t)i, *out, node);
    }
    return 0;
}

/* ---- $ref: "#", or a JSON pointer within the document */

/* A part of a pointer as the key that it stands for. */
static const char *unescape(struct tb_schema *s, const char *p, size_t n)
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
static int find_place(struct tb_schema *s, const char *path,
                      struct tb_json way[TB_MAX_JSON_DEPTH + 1])
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

static int compile_ref(struct tb_schema *s, const struct tb_json *at, uint32_t *out)
{
    struct tb_json way[TB_MAX_JSON_DEPTH + 1];
    const char *path;
    int rc = tb_json_as_string(at, &s->arena, 1024, &path, s->err);
    if (rc) return rc;
    int n = find_place(s, path, way);
    if (n < 0)
        return tb_json_fail(at, s->err, TB_EINVAL,
                            "\"%s\" is no place in this schema (\"#/$defs/name\" would be)", path);
    for (struct tb_schema_ref *r = s->refs; r; r = r->next) {
        if (r->at == way[n].v) {
            *out = r->node;
            return 0;
        }
    }
    if (s->n_refs++ == MAX_REFS)
        return tb_json_fail(at, s->err, TB_ETOOBIG, "there are more than %d places that $ref names",
                            MAX_REFS);
    struct tb_schema_ref *r = tb_arena_alloc(&s->arena, sizeof(*r));
    *r = (struct tb_schema_ref){s->refs, way[n].v, tb_rule_ref(s->g)};
    s->refs = r;
    uint32_t node = TB_NODE_EMPTY;
    if ((rc = tb_schema_compile(s, &way[n], &node))) return rc;
    tb_rule_define(s->g, r->node, node);
    *out = r->node;
    return 0;
}

/* ---- oneOf: alternatives of which a value can match only one */

/* The schema itself, or the one that its $ref names. */
static json_t *behind_ref(struct tb_schema *s, json_t *schema)
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
        if (ca && cb && !json_equal(ca, cb) &&
            tb_schema_is_required(json_object_get(a, "required"), key) &&
            tb_schema_is_required(json_object_get(b, "required"), key))
            return true;
    }
    return false;
}

static bool exclusive(struct tb_schema *s, json_t *list)
{
    for (size_t i = 0; i < json_array_size(list); i++)
        for (size_t j = 0; j < i; j++)
            if (!apart(behind_ref(s, json_array_get(list, i)),
                       behind_ref(s, json_array_get(list, j))))
                return false;
    return true;
}

/* Is all that one matches of the type beside it in schema? */
static bool keeps_type(struct tb_schema *s, const json_t *schema, json_t *one)
{
    const json_t *type = json_object_get(schema, "type");
    one = behind_ref(s, one);
    json_t *own = json_object_get(one, "type"), *value = json_object_get(one, "const");
    if (!type || (own && json_equal(type, own))) return true;
    if (value) return tb_schema_has_type(value, schema);
    const char *implied = own ? NULL : implied_type(one), *name = json_string_value(type);
    return implied && name && strcmp(implied, name) == 0;
}

/* ---- any schema */

static int compile_type(struct tb_schema *s, const struct tb_json *at, const char *type,
                        uint32_t *out)
{
    if (strcmp(type, "object") == 0) return tb_schema_object(s, at, out);
    if (strcmp(type, "array") == 0) return tb_schema_array(s, at, out);
    if (strcmp(type, "string") == 0) return tb_schema_string(s, at, out);
    if (strcmp(type, "integer") == 0) return tb_schema_number(s, at, true, out);
    if (strcmp(type, "number") == 0) return tb_schema_number(s, at, false, out);
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

static int compile_types(struct tb_schema *s, const struct tb_json *at, uint32_t *out)
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
        *out = tb_schema_alt(s, (uint32_t)i, *out, one);
    }
    return 0;
}

/* The one keyword that alone says what a value is; others beside it could not be enforced. */
static int compile_schema(struct tb_schema *s, const struct tb_json *at, uint32_t *out)
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
    if (strcmp(one, "const") == 0) return tb_schema_values(s, &v, &v.v, 1, out);
    if (strcmp(one, "enum") == 0) return tb_schema_enum(s, &v, out);
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

int tb_schema_compile(struct tb_schema *s, const struct tb_json *at, uint32_t *out)
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
    struct tb_schema s = {.err = err};
    uint32_t root;
    if (schema.n > MAX_TEXT)
        return tb_error_set(err, TB_ETOOBIG, "the schema has %zu bytes, more than %d", schema.n,
                            MAX_TEXT);
    int rc = tb_json_parse(&s.doc, schema.p, schema.n, err);
    if (rc) return rc;
    tb_rules_create(v, &s.g);
    tb_arena_init(&s.arena);
    tb_json_rules_make(s.g, &s.r);
    rc = tb_schema_compile(&s, &s.doc.root, &root);
    if (!rc) rc = tb_rules_finish(s.g, root, err);
    tb_arena_fini(&s.arena);
    tb_json_free(&s.doc);
    if (rc)
        tb_grammar_unref(s.g);
    else
        *out = s.g;
    return rc;
}
