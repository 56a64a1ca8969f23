/*
 * Strict JSON reading over jansson: one document, then typed getters whose errors name the field's
 * path, its value and what was expected ("sampling_params.top_p: 1.5 is not in 0..1").
 *
 * Rules for all faces: the text is one object or array, UTF-8, at most TB_MAX_JSON_DEPTH deep;
 * duplicate keys, NaN, Infinity and numbers out of the range of int64 or double are refused; null
 * is the same as absent; keys nobody asks for are ignored; an integer is not a real ("1.0") nor a
 * string.
 *
 * Owner: tb_json_doc owns the tree; nodes borrow from it (and from their parent node, which must
 * outlive them); getters copy strings and arrays into the caller's arena. Thread: one at a time per
 * document.
 */
#ifndef TB_WIRE_JSON_H
#define TB_WIRE_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "util/arena.h"
#include "util/error.h"
#include "util/span.h"

struct json_t; /* jansson's */

/* A value with the way that leads to it; v == NULL: absent (or null). */
struct tb_json {
    struct json_t *v;
    const struct tb_json *up; /* NULL for the root */
    const char *key;          /* in an object, else NULL */
    size_t i;                 /* in an array */
};

struct tb_json_doc {
    struct tb_json root;
};

/* TB_EPARSE for what is not JSON, TB_ETOOBIG for more values or depth than we take. */
int tb_json_parse(struct tb_json_doc *doc, const char *p, size_t n, struct tb_error *err);
void tb_json_free(struct tb_json_doc *doc); /* accepts a zeroed document */

bool tb_json_is_object(const struct tb_json *n);
bool tb_json_is_array(const struct tb_json *n);
bool tb_json_is_string(const struct tb_json *n);
bool tb_json_is_int(const struct tb_json *n);
bool tb_json_is_number(const struct tb_json *n);
bool tb_json_is_bool(const struct tb_json *n);

/* Member of an object; false (and out->v NULL) when absent, null, or obj is no object. */
bool tb_json_find(const struct tb_json *obj, const char *key, struct tb_json *out);
size_t tb_json_len(const struct tb_json *array_or_object);
/* Element of an array; v is NULL beyond the end, and a null element is NULL too. */
void tb_json_at(const struct tb_json *array, size_t i, struct tb_json *out);
/* Members of an object in the order of the text: *it starts NULL; null members are skipped. */
bool tb_json_next(const struct tb_json *obj, void **it, struct tb_json *out);

/* "a.b[3].c: " + message; returns code. */
int tb_json_fail(const struct tb_json *n, struct tb_error *err, int code, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
/* A short rendering of the value for messages: the scalar itself, or "an array", "an object". */
#define TB_JSON_SHOW 80
void tb_json_show(const struct tb_json *n, char out[TB_JSON_SHOW]);

/* A present value as a type. Limits are inclusive. */
int tb_json_as_string(const struct tb_json *n, struct tb_arena *a, size_t max, const char **out,
                      struct tb_error *err);
int tb_json_as_int(const struct tb_json *n, int64_t min, int64_t max, int64_t *out,
                   struct tb_error *err);
int tb_json_as_double(const struct tb_json *n, double min, double max, double *out,
                      struct tb_error *err);
int tb_json_as_bool(const struct tb_json *n, bool *out, struct tb_error *err);
/* Arrays of numbers; *out is never NULL on success. i32 and i64 take integers only. */
int tb_json_as_i32s(const struct tb_json *n, struct tb_arena *a, int32_t min, int32_t max,
                    int32_t **out, size_t *count, struct tb_error *err);
int tb_json_as_i64s(const struct tb_json *n, struct tb_arena *a, int64_t **out, size_t *count,
                    struct tb_error *err);
int tb_json_as_f32s(const struct tb_json *n, struct tb_arena *a, float **out, size_t *count,
                    struct tb_error *err); /* |x| > FLT_MAX: TB_ENONFINITE */
/* The value as compact JSON text. */
int tb_json_as_text(const struct tb_json *n, struct tb_arena *a, size_t max, const char **out,
                    struct tb_error *err);

/* Members as types. Absent: an error when required, else *out keeps the caller's default. */
int tb_json_object(const struct tb_json *obj, const char *key, bool required, struct tb_json *out,
                   struct tb_error *err);
int tb_json_array(const struct tb_json *obj, const char *key, bool required, struct tb_json *out,
                  struct tb_error *err);
int tb_json_string(const struct tb_json *obj, const char *key, bool required, struct tb_arena *a,
                   size_t max, const char **out, struct tb_error *err);
int tb_json_int(const struct tb_json *obj, const char *key, bool required, int64_t min, int64_t max,
                int64_t *out, struct tb_error *err);
int tb_json_double(const struct tb_json *obj, const char *key, bool required, double min,
                   double max, double *out, struct tb_error *err);
int tb_json_bool(const struct tb_json *obj, const char *key, bool required, bool *out,
                 struct tb_error *err);

#endif
