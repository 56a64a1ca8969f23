/*
 * Compiling a JSON Schema into rules. Private to grammar/: schema.c is any schema, and hands what a
 * value of one type may be to schema_scalars.c and schema_lists.c, const and enum to
 * schema_values.c. Functions put a rule into *out, or return an error with s->err set.
 *
 * Owner: struct tb_schema is tb_grammar_create_schema's. Thread: the builder's.
 */
#ifndef TB_GRAMMAR_SCHEMA_H
#define TB_GRAMMAR_SCHEMA_H

#include <jansson.h>
#include <string.h>

#include "grammar/rules.h"
#include "util/arena.h"
#include "wire/json.h"

struct tb_schema_ref { /* a place that $ref names */
    struct tb_schema_ref *next;
    const json_t *at;
    uint32_t node;
};

struct tb_schema {
    struct tb_grammar *g;
    struct tb_json_rules r;
    struct tb_json_doc doc;
    struct tb_arena arena;
    struct tb_schema_ref *refs;
    int depth, n_refs;
    struct tb_error *err;
};

static inline uint32_t tb_schema_text(struct tb_schema *s, const char *t)
{
    return tb_rule_text(s->g, t, strlen(t));
}

/* The n + 1-th alternative. */
static inline uint32_t tb_schema_alt(struct tb_schema *s, uint32_t n, uint32_t all, uint32_t one)
{
    return n ? tb_rule_alt(s->g, all, one) : one;
}

/* ---- schema.c */
int tb_schema_compile(struct tb_schema *s, const struct tb_json *at, uint32_t *out);

/* ---- schema_values.c: values that are written in the schema */
/* A value as it is written, without spaces. */
int tb_schema_literal(struct tb_schema *s, const struct tb_json *at, const json_t *v,
                      uint32_t *out);
/* Is v of the type, or one of the types, that the schema names beside its values? */
bool tb_schema_has_type(const json_t *v, const json_t *schema);
/* The values, n of them, for which the rest of the schema holds; at: const or enum. */
int tb_schema_values(struct tb_schema *s, const struct tb_json *at, json_t *const *v, size_t n,
                     uint32_t *out);
int tb_schema_enum(struct tb_schema *s, const struct tb_json *at, uint32_t *out);

/* ---- schema_scalars.c: strings and numbers */
int tb_schema_string(struct tb_schema *s, const struct tb_json *at, uint32_t *out);
int tb_schema_number(struct tb_schema *s, const struct tb_json *at, bool whole, uint32_t *out);
/* A pair of keywords that bound a length; without them 0 and TB_GRAMMAR_UNBOUNDED. */
int tb_schema_bounds(struct tb_schema *s, const struct tb_json *at, const char *lo, const char *hi,
                     uint32_t *min, uint32_t *max);
/* minimum, maximum, exclusiveMinimum, exclusiveMaximum; +-DBL_MAX where there is none. */
int tb_schema_limits(struct tb_schema *s, const struct tb_json *at, double limit[4]);

/* ---- schema_lists.c: arrays and objects */
int tb_schema_array(struct tb_schema *s, const struct tb_json *at, uint32_t *out);
int tb_schema_object(struct tb_schema *s, const struct tb_json *at, uint32_t *out);
bool tb_schema_is_required(const json_t *required, const char *name);

#endif
