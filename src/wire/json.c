/*
 * Strict JSON reading (see json.h). The document owns jansson's tree; nodes are small structs on
 * the caller's stack. Thread: one at a time per document.
 */
#include "wire/json.h"

#include <errno.h>
#include <float.h>
#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>

#include "util/buf.h"
#include "util/limits.h"
#include "util/mem.h"

/* ---- parsing */

/* Bounds what the tree will take before it is built: a tree of empty arrays is fifty times its
 * text. */
static int check_size(const char *p, size_t n, struct tb_error *err)
{
    size_t depth = 0, values = 1, containers = 0;
    bool in_string = false;
    for (size_t i = 0; i < n; i++) {
        char c = p[i];
        if (in_string) {
            if (c == '\\')
                i++;
            else if (c == '"')
                in_string = false;
            continue;
        }
        switch (c) {
        case '"': in_string = true; break;
        case '{':
        case '[':
            containers++;
            if (++depth > TB_MAX_JSON_DEPTH)
                return tb_error_set(err, TB_ETOOBIG, "JSON is nested deeper than %d levels",
                                    TB_MAX_JSON_DEPTH);
            break;
        case '}':
        case ']':
            if (depth) depth--;
            break;
        case ',': values++; break;
        default: break;
        }
    }
    if (values > TB_MAX_JSON_VALUES)
        return tb_error_set(err, TB_ETOOBIG, "JSON has %zu values, more than the limit of %d",
                            values, TB_MAX_JSON_VALUES);
    if (containers > TB_MAX_JSON_CONTAINERS)
        return tb_error_set(err, TB_ETOOBIG,
                            "JSON has %zu objects and arrays, more than the limit of %d",
                            containers, TB_MAX_JSON_CONTAINERS);
    return 0;
}

/* The key before a number that ended near `at`, and the number itself; for messages. */
static bool number_near(const char *p, size_t n, size_t at, struct tb_span *key,
                        struct tb_span *num)
{
    size_t i = TB_MIN(at, n);
    while (i < n && strchr("0123456789+-.eE", p[i]) && p[i])
        i++;
    while (i > 0 && (p[i - 1] == ',' || p[i - 1] == '}' || p[i - 1] == ']' || p[i - 1] == ' ' ||
                     p[i - 1] == '\n' || p[i - 1] == '\r' || p[i - 1] == '\t'))
        i--;
    size_t end = i;
    while (i > 0 && p[i - 1] && strchr("0123456789+-.eE", p[i - 1]))
        i--;
    *num = (struct tb_span){p + i, end - i};
    while (i > 0 && p[i - 1] && strchr("0123456789+-.eE, \n\r\t[", p[i - 1]))
        i--;
    if (i == 0 || p[i - 1] != ':') return false;
    i--;
    while (i > 0 && (p[i - 1] == ' ' || p[i - 1] == '\n' || p[i - 1] == '\t' || p[i - 1] == '\r'))
        i--;
    if (i == 0 || p[i - 1] != '"') return false;
    size_t close = i - 1;
    for (i = close; i > 0 && p[i - 1] != '"'; i--) {
    }
    if (i == 0) return false;
    *key = (struct tb_span){p + i, close - i};
    return true;
}

int tb_json_parse(struct tb_json_doc *doc, const char *p, size_t n, struct tb_error *err)
{
    *doc = (struct tb_json_doc){0};
    if (n == 0) return tb_error_set(err, TB_EPARSE, "body is empty, a JSON object was expected");
    int rc = check_size(p, n, err);
    if (rc) return rc;
    json_error_t e;
    json_t *v = json_loadb(p, n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &e);
    if (v) {
        doc->root.v = v;
        return 0;
    }
    if (json_error_code(&e) == json_error_out_of_memory)
        return tb_error_set(err, TB_ENOMEM, "no memory for a JSON body of %zu bytes", n);
    if (json_error_code(&e) == json_error_numeric_overflow) {
        struct tb_span key = {0}, num = {0};
        bool named = number_near(p, n, e.position > 0 ? (size_t)e.position : 0, &key, &num);
        bool real = num.n && (memchr(num.p, '.', num.n) || memchr(num.p, 'e', num.n) ||
                              memchr(num.p, 'E', num.n));
        return tb_error_set(err, TB_EPARSE, "%.*s%s%.*s is out of the range of %s",
                            (int)TB_MIN(key.n, 64), named ? key.p : "", named ? ": " : "",
                            (int)TB_MIN(num.n, 64), num.p, real ? "a double" : "a 64-bit integer");
    }
    return tb_error_set(err, TB_EPARSE, "invalid JSON at line %d, column %d: %s", e.line, e.column,
                        e.text);
}

void tb_json_free(struct tb_json_doc *doc)
{
    json_decref(doc->root.v);
    doc->root.v = NULL;
}

/* ---- nodes */

bool tb_json_is_object(const struct tb_json *n)
{
    return json_is_object(n->v);
}

bool tb_json_is_array(const struct tb_json *n)
{
    return json_is_array(n->v);
}

bool tb_json_is_string(const struct tb_json *n)
{
    return json_is_string(n->v);
}

bool tb_json_is_int(const struct tb_json *n)
{
    return json_is_integer(n->v);
}

bool tb_json_is_number(const struct tb_json *n)
{
    return json_is_number(n->v);
}

bool tb_json_is_bool(const struct tb_json *n)
{
    return json_is_boolean(n->v);
}

static json_t *present(json_t *v)
{
    return json_is_null(v) ? NULL : v;
}

bool tb_json_find(const struct tb_json *obj, const char *key, struct tb_json *out)
{
    json_t *v = json_is_object(obj->v) ? present(json_object_get(obj->v, key)) : NULL;
    *out = (struct tb_json){v, obj, key, 0};
    return v != NULL;
}

size_t tb_json_len(const struct tb_json *n)
{
    return json_is_object(n->v) ? json_object_size(n->v) : json_array_size(n->v);
}

void tb_json_at(const struct tb_json *array, size_t i, struct tb_json *out)
{
    *out = (struct tb_json){present(json_array_get(array->v, i)), array, NULL, i};
}

bool tb_json_next(const struct tb_json *obj, void **it, struct tb_json *out)
{
    for (;;) {
        *it = *it ? json_object_iter_next(obj->v, *it) : json_object_iter(obj->v);
        if (!*it) return false;
        json_t *v = present(json_object_iter_value(*it));
        *out = (struct tb_json){v, obj, json_object_iter_key(*it), 0};
        if (v) return true;
    }
}

/* ---- messages */

static void put_path(const struct tb_json *n, struct tb_buf *b)
{
    if (!n->up) return;
    put_path(n->up, b);
    if (!n->key)
        tb_buf_printf(b, "[%zu]", n->i);
    else
        tb_buf_printf(b, "%s%.64s", b->n ? "." : "", n->key);
}

int tb_json_fail(const struct tb_json *n, struct tb_error *err, int code, const char *fmt, ...)
{
    struct tb_buf b;
    tb_buf_init(&b, 8192); /* 64 levels of 64 bytes at most: cut, never refused */
    put_path(n, &b);
    char text[384];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    int rc = tb_error_set(err, code, "%.200s: %s", b.n ? b.p : "body", text);
    tb_buf_fini(&b);
    return rc;
}

void tb_json_show(const struct tb_json *n, char out[TB_JSON_SHOW])
{
    if (!n->v || json_is_null(n->v))
        snprintf(out, TB_JSON_SHOW, "null");
    else if (json_is_object(n->v))
        snprintf(out, TB_JSON_SHOW, "an object");
    else if (json_is_array(n->v))
        snprintf(out, TB_JSON_SHOW, "an array of %zu", json_array_size(n->v));
    else if (json_is_string(n->v))
        snprintf(out, TB_JSON_SHOW, "\"%.60s\"", json_string_value(n->v));
    else if (json_is_real(n->v))
        snprintf(out, TB_JSON_SHOW, "%.12g", json_real_value(n->v));
    else if (json_is_integer(n->v))
        snprintf(out, TB_JSON_SHOW, "%" JSON_INTEGER_FORMAT, json_integer_value(n->v));
    else
        snprintf(out, TB_JSON_SHOW, "%s", json_is_true(n->v) ? "true" : "false");
}

static int wrong_type(const struct tb_json *n, struct tb_error *err, const char *want)
{
    char shown[TB_JSON_SHOW];
    tb_json_show(n, shown);
    return tb_json_fail(n, err, TB_EINVAL, "%s is not %s", shown, want);
}

/* ---- values */

int tb_json_as_string(const struct tb_json *n, struct tb_arena *a, size_t max, const char **out,
                      struct tb_error *err)
{
    if (!json_is_string(n->v)) return wrong_type(n, err, "a string");
    const char *s = json_string_value(n->v);
    size_t len = json_string_length(n->v);
    if (len > max)
        return tb_json_fail(n, err, TB_EINVAL,
                            "string of %zu bytes is longer than the limit of %zu", len, max);
    if (memchr(s, 0, len)) return tb_json_fail(n, err, TB_EINVAL, "string holds a NUL character");
    char *p = tb_arena_try_alloc(a, len + 1);
    if (!p) return tb_json_fail(n, err, TB_ENOMEM, "no memory for a string of %zu bytes", len);
    memcpy(p, s, len + 1);
    *out = p;
    return 0;
}

int tb_json_as_int(const struct tb_json *n, int64_t min, int64_t max, int64_t *out,
                   struct tb_error *err)
{
    if (!json_is_integer(n->v)) return wrong_type(n, err, "an integer");
    int64_t v = json_integer_value(n->v);
    if (v < min && max == INT64_MAX)
        return tb_json_fail(n, err, TB_EINVAL, "%" PRId64 " is less than %" PRId64, v, min);
    if (v < min || v > max)
        return tb_json_fail(n, err, TB_EINVAL, "%" PRId64 " is not in %" PRId64 "..%" PRId64, v,
                            min, max);
    *out = v;
    return 0;
}

int tb_json_as_double(const struct tb_json *n, double min, double max, double *out,
                      struct tb_error *err)
{
    if (!json_is_number(n->v)) return wrong_type(n, err, "a number");
    double v = json_number_value(n->v);
    if (v < min && max >= DBL_MAX)
        return tb_json_fail(n, err, TB_EINVAL, "%.12g is less than %.12g", v, min);
    if (!(v >= min && v <= max))
        return tb_json_fail(n, err, TB_EINVAL, "%.12g is not in %.12g..%.12g", v, min, max);
    *out = v;
    return 0;
}

int tb_json_as_bool(const struct tb_json *n, bool *out, struct tb_error *err)
{
    if (!json_is_boolean(n->v)) return wrong_type(n, err, "true or false");
    *out = json_is_true(n->v);
    return 0;
}

static int no_memory(const struct tb_json *n, struct tb_error *err)
{
    return tb_json_fail(n, err, TB_ENOMEM, "no memory for %zu numbers", json_array_size(n->v));
}

int tb_json_as_i32s(const struct tb_json *n, struct tb_arena *a, int32_t min, int32_t max,
                    int32_t **out, size_t *count, struct tb_error *err)
{
    if (!json_is_array(n->v)) return wrong_type(n, err, "an array of integers");
    size_t len = json_array_size(n->v);
    int32_t *p = tb_arena_try_array(a, len, sizeof(*p));
    if (!p) return no_memory(n, err);
    for (size_t i = 0; i < len; i++) {
        const json_t *v = json_array_get(n->v, i);
        if (json_is_integer(v) && json_integer_value(v) >= min && json_integer_value(v) <= max) {
            p[i] = (int32_t)json_integer_value(v);
            continue;
        }
        struct tb_json e = {json_array_get(n->v, i), n, NULL, i};
        int64_t ignored;
        return tb_json_as_int(&e, min, max, &ignored, err);
    }
    *out = p;
    *count = len;
    return 0;
}

int tb_json_as_i64s(const struct tb_json *n, struct tb_arena *a, int64_t **out, size_t *count,
                    struct tb_error *err)
{
    if (!json_is_array(n->v)) return wrong_type(n, err, "an array of integers");
    size_t len = json_array_size(n->v);
    int64_t *p = tb_arena_try_array(a, len, sizeof(*p));
    if (!p) return no_memory(n, err);
    for (size_t i = 0; i < len; i++) {
        struct tb_json e = {json_array_get(n->v, i), n, NULL, i};
        if (!json_is_integer(e.v)) return wrong_type(&e, err, "an integer");
        p[i] = json_integer_value(e.v);
    }
    *out = p;
    *count = len;
    return 0;
}

int tb_json_as_f32s(const struct tb_json *n, struct tb_arena *a, float **out, size_t *count,
                    struct tb_error *err)
{
    if (!json_is_array(n->v)) return wrong_type(n, err, "an array of numbers");
    size_t len = json_array_size(n->v);
    float *p = tb_arena_try_array(a, len, sizeof(*p));
    if (!p) return no_memory(n, err);
    for (size_t i = 0; i < len; i++) {
        struct tb_json e = {json_array_get(n->v, i), n, NULL, i};
        if (!json_is_number(e.v)) return wrong_type(&e, err, "a number");
        double v = json_number_value(e.v);
        p[i] = (float)v;
        if (!isfinite(p[i]))
            return tb_json_fail(&e, err, TB_ENONFINITE, "%.12g is out of the range of a float32",
                                v);
    }
    *out = p;
    *count = len;
    return 0;
}

int tb_json_as_text(const struct tb_json *n, struct tb_arena *a, size_t max, const char **out,
                    struct tb_error *err)
{
    const size_t flags = JSON_COMPACT | JSON_ENCODE_ANY;
    size_t len = json_dumpb(n->v, NULL, 0, flags);
    if (len > max)
        return tb_json_fail(n, err, TB_EINVAL, "%zu bytes of JSON are more than the limit of %zu",
                            len, max);
    char *p = tb_arena_try_alloc(a, len + 1);
    if (!p) return no_memory(n, err);
    TB_BUG_ON(json_dumpb(n->v, p, len, flags) != len);
    p[len] = '\0';
    *out = p;
    return 0;
}

/* ---- members */

/* 1 present, 0 absent and allowed, < 0 an error. */
static int member(const struct tb_json *obj, const char *key, bool required, struct tb_json *out,
                  struct tb_error *err)
{
    if (!json_is_object(obj->v)) return wrong_type(obj, err, "an object");
    if (tb_json_find(obj, key, out)) return 1;
    if (required) return tb_json_fail(out, err, TB_EINVAL, "required, but absent");
    return 0;
}

int tb_json_object(const struct tb_json *obj, const char *key, bool required, struct tb_json *out,
                   struct tb_error *err)
{
    int rc = member(obj, key, required, out, err);
    if (rc <= 0) return rc;
    return json_is_object(out->v) ? 0 : wrong_type(out, err, "an object");
}

int tb_json_array(const struct tb_json *obj, const char *key, bool required, struct tb_json *out,
                  struct tb_error *err)
{
    int rc = member(obj, key, required, out, err);
    if (rc <= 0) return rc;
    return json_is_array(out->v) ? 0 : wrong_type(out, err, "an array");
}

int tb_json_string(const struct tb_json *obj, const char *key, bool required, struct tb_arena *a,
                   size_t max, const char **out, struct tb_error *err)
{
    struct tb_json n = {0};
    int rc = member(obj, key, required, &n, err);
    return rc <= 0 ? rc : tb_json_as_string(&n, a, max, out, err);
}

int tb_json_int(const struct tb_json *obj, const char *key, bool required, int64_t min, int64_t max,
                int64_t *out, struct tb_error *err)
{
    struct tb_json n = {0};
    int rc = member(obj, key, required, &n, err);
    return rc <= 0 ? rc : tb_json_as_int(&n, min, max, out, err);
}

int tb_json_double(const struct tb_json *obj, const char *key, bool required, double min,
                   double max, double *out, struct tb_error *err)
{
    struct tb_json n = {0};
    int rc = member(obj, key, required, &n, err);
    return rc <= 0 ? rc : tb_json_as_double(&n, min, max, out, err);
}

int tb_json_bool(const struct tb_json *obj, const char *key, bool required, bool *out,
                 struct tb_error *err)
{
    struct tb_json n = {0};
    int rc = member(obj, key, required, &n, err);
    return rc <= 0 ? rc : tb_json_as_bool(&n, out, err);
}
