/*
 * const and enum: the values that a schema writes out (schema.h). Thread: the builder's.
 */
#include "grammar/schema.h"

int tb_schema_literal(struct tb_schema *s, const struct tb_json *at, const json_t *v, uint32_t *out)
{
    char *t = json_dumps(v, JSON_COMPACT | JSON_ENCODE_ANY);
    if (!t) return tb_json_fail(at, s->err, TB_ENOMEM, "cannot be written as JSON");
    *out = tb_schema_text(s, t);
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

bool tb_schema_has_type(const json_t *v, const json_t *schema)
{
    const json_t *type = json_object_get(schema, "type");
    if (!json_is_array(type)) return !type || is_a(v, json_string_value(type));
    for (size_t i = 0; i < json_array_size(type); i++)
        if (is_a(v, json_string_value(json_array_get(type, i)))) return true;
    return false;
}

/* *fits: does the schema hold for v, apart from const and enum? Keywords that cannot be told here
 * are refused. */
static int validate(struct tb_schema *s, const struct tb_json *schema, const json_t *v, bool *fits)
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
    *fits = tb_schema_has_type(v, schema->v);
    for (size_t i = 0; *fits && i < TB_ARRAY_LEN(unknown); i++)
        if (is_a(v, unknown[i].type) && json_object_get(schema->v, unknown[i].keyword))
            return tb_json_fail(schema, s->err, TB_EUNSUPPORTED,
                                "%s beside const or enum cannot be enforced", unknown[i].keyword);
    if (json_is_string(v)) {
        rc = tb_schema_bounds(s, schema, "minLength", "maxLength", &min, &max);
        size = tb_utf8_characters(json_string_value(v), json_string_length(v));
    } else if (json_is_array(v)) {
        rc = tb_schema_bounds(s, schema, "minItems", "maxItems", &min, &max);
        size = json_array_size(v);
    } else if (json_is_number(v)) {
        rc = tb_schema_limits(s, schema, limit);
        if (rc == 0)
            *fits = *fits && x >= limit[0] && x <= limit[1] && x > limit[2] && x < limit[3];
    }
    *fits = *fits && size >= min && size <= max;
    return rc;
}

int tb_schema_values(struct tb_schema *s, const struct tb_json *at, json_t *const *v, size_t n,
                     uint32_t *out)
{
    uint32_t k = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t one = TB_NODE_EMPTY;
        bool fits;
        int rc = validate(s, at->up, v[i], &fits);
        if (rc == 0 && !fits) continue;
        if (rc || (rc = tb_schema_literal(s, at, v[i], &one))) return rc;
        *out = tb_schema_alt(s, k++, *out, one);
    }
    return k ? 0
             : tb_json_fail(at, s->err, TB_EINVAL, "holds no value that fits what is beside it");
}

int tb_schema_enum(struct tb_schema *s, const struct tb_json *at, uint32_t *out)
{
    size_t n = json_array_size(at->v);
    if (!json_is_array(at->v) || n == 0)
        return tb_json_fail(at, s->err, TB_EINVAL, "is not an array of values");
    json_t **v = tb_arena_try_array(&s->arena, n, sizeof(json_t *));
    if (!v) return tb_json_fail(at, s->err, TB_ENOMEM, "no memory for %zu values", n);
    for (size_t i = 0; i < n; i++)
        v[i] = json_array_get(at->v, i);
    return tb_schema_values(s, at, v, n, out);
}
