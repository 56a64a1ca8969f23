/*
 * Fields that several dialects have (see llm.h). Thread: the pool's; pure but for the request's
 * arena.
 */
#include <jansson.h>
#include <string.h>

#include "api/llm/llm.h"

int tb_llm_float(const struct tb_json *obj, const char *key, double min, double max, float *out,
                 struct tb_error *err)
{
    double v = (double)*out;
    int rc = tb_json_double(obj, key, false, min, max, &v, err);
    *out = (float)v;
    return rc;
}

int tb_llm_int32(const struct tb_json *obj, const char *key, int32_t min, int32_t max, int32_t *out,
                 struct tb_error *err)
{
    int64_t v = *out;
    int rc = tb_json_int(obj, key, false, min, max, &v, err);
    *out = (int32_t)v;
    return rc;
}

int tb_llm_span(struct tb_arena *a, const struct tb_json *v, struct tb_span *out,
                struct tb_error *err)
{
    if (!tb_json_is_string(v)) return tb_json_fail(v, err, TB_EINVAL, "is not a string");
    size_t n = json_string_length(v->v);
    char *p = tb_arena_try_alloc(a, n + 1);
    if (!p) return tb_json_fail(v, err, TB_ENOMEM, "no memory for %zu bytes", n);
    memcpy(p, json_string_value(v->v), n);
    *out = (struct tb_span){p, n};
    return 0;
}

int tb_llm_stops(struct tb_llm *l, const struct tb_json *obj, const char *key, size_t max,
                 struct tb_error *err)
{
    struct tb_json stop, one;
    if (!tb_json_find(obj, key, &stop)) return 0;
    bool list = tb_json_is_array(&stop);
    size_t n = list ? tb_json_len(&stop) : 1;
    if (n > max)
        return tb_json_fail(&stop, err, TB_EINVAL, "%zu strings are more than the limit of %zu", n,
                            max);
    l->stops = tb_arena_calloc(&l->arena, n + 1, sizeof(*l->stops));
    for (size_t i = 0; i < n; i++) {
        if (list)
            tb_json_at(&stop, i, &one);
        else
            one = stop;
        int rc = tb_json_as_string(&one, &l->arena, TB_MAX_STOP_BYTES, &l->stops[l->n_stops], err);
        if (rc) return rc;
        if (l->stops[l->n_stops][0]) l->n_stops++; /* "" stops nothing, and clients send it */
    }
    return 0;
}

int tb_llm_logit_bias(struct tb_llm *l, const struct tb_json *obj, const char *key,
                      struct tb_error *err)
{
    struct tb_json bias, one;
    void *it = NULL;
    int rc = tb_json_object(obj, key, false, &bias, err);
    if (rc || !bias.v) return rc;
    size_t n = tb_json_len(&bias);
    if (n > 1024)
        return tb_json_fail(&bias, err, TB_EINVAL, "%zu tokens are more than the limit of 1024", n);
    int32_t *tokens = tb_arena_calloc(&l->arena, n + 1, sizeof(*tokens));
    float *values = tb_arena_calloc(&l->arena, n + 1, sizeof(*values));
    for (; tb_json_next(&bias, &it, &one); l->sample.n_logit_bias++) {
        int64_t id;
        double v;
        if (!tb_span_i64(tb_span_str(one.key), &id) || id < 0 || id > INT32_MAX)
            return tb_json_fail(&one, err, TB_EINVAL, "is not named by a token's id");
        if ((rc = tb_json_as_double(&one, -100, 100, &v, err))) return rc;
        tokens[l->sample.n_logit_bias] = (int32_t)id;
        values[l->sample.n_logit_bias] = (float)v;
    }
    l->sample.logit_bias_tokens = tokens;
    l->sample.logit_bias = values;
    return 0;
}

/* A content of parts is their texts, joined. */
static int content(struct tb_arena *a, const struct tb_json *c, struct tb_span *out,
                   struct tb_error *err)
{
    struct tb_json part, type, text;
    if (tb_json_is_string(c)) return tb_llm_span(a, c, out, err);
    if (!tb_json_is_array(c))
        return tb_json_fail(c, err, TB_EINVAL, "is neither a string nor a list of parts");
    struct tb_buf b;
    int rc = 0;
    tb_buf_init(&b, TB_MAX_BODY_DEFAULT);
    for (size_t i = 0; rc == 0 && i < tb_json_len(c); i++) {
        tb_json_at(c, i, &part);
        if (!tb_json_find(&part, "type", &type) || !tb_json_is_string(&type) ||
            strcmp(json_string_value(type.v), "text") != 0)
            rc = tb_json_fail(&part, err, TB_EUNSUPPORTED, "only parts of type text are served");
        else if (!tb_json_find(&part, "text", &text) || !tb_json_is_string(&text))
            rc = tb_json_fail(&part, err, TB_EINVAL, "text: required, but absent");
        else
            tb_buf_append(&b, json_string_value(text.v), json_string_length(text.v));
    }
    char *p = rc || b.failed ? NULL : tb_arena_try_alloc(a, b.n + 1);
    if (rc == 0 && !p) rc = tb_json_fail(c, err, TB_ENOMEM, "no memory for its text");
    if (p && b.n) memcpy(p, b.p, b.n);
    *out = (struct tb_span){p, p ? b.n : 0};
    tb_buf_fini(&b);
    return rc;
}

int tb_llm_messages(struct tb_arena *a, const struct tb_json *list, struct tb_chat_message **out,
                    size_t *n_out, struct tb_error *err)
{
    static const char *const unserved[] = {"tool_calls", "images", "function_call", "audio"};
    struct tb_json m, v;
    size_t n = tb_json_len(list);
    if (!tb_json_is_array(list) || n == 0)
        return tb_json_fail(list, err, TB_EINVAL, "is not a list of messages");
    if (n > TB_MAX_DATA)
        return tb_json_fail(list, err, TB_EINVAL, "%zu messages are more than the limit of %d", n,
                            TB_MAX_DATA);
    struct tb_chat_message *messages = *out = tb_arena_try_array(a, n, sizeof(*messages));
    if (!messages) return tb_json_fail(list, err, TB_ENOMEM, "no memory for %zu messages", n);
    memset(messages, 0, n * sizeof(*messages));
    for (size_t i = 0; i < n; i++) {
        struct tb_chat_message *to = &messages[i];
        const char *role = NULL;
        tb_json_at(list, i, &m);
        if (!tb_json_is_object(&m)) return tb_json_fail(&m, err, TB_EINVAL, "is not a message");
        int rc = tb_json_string(&m, "role", true, a, 64, &role, err);
        if (rc || (rc = tb_llm_refuse(&m, unserved, TB_ARRAY_LEN(unserved), err))) return rc;
        if (strcmp(role, "developer") == 0) role = "system";
        to->role = tb_span_str(role);
        to->content = tb_span_str("");
        if (!tb_json_find(&m, "content", &v)) {
            if (strcmp(role, "assistant") == 0) continue;
            return tb_json_fail(&m, err, TB_EINVAL, "content: required, but absent");
        }
        if ((rc = content(a, &v, &to->content, err))) return rc;
    }
    *n_out = n;
    return 0;
}

static bool is_nothing(const json_t *v)
{
    return json_is_null(v) || json_is_false(v) ||
           (json_is_number(v) && !(json_number_value(v) < 0) && !(json_number_value(v) > 0)) ||
           (json_is_string(v) && json_string_length(v) == 0) ||
           (json_is_array(v) && json_array_size(v) == 0) ||
           (json_is_object(v) && json_object_size(v) == 0);
}

int tb_llm_refuse(const struct tb_json *obj, const char *const *keys, size_t n,
                  struct tb_error *err)
{
    struct tb_json v;
    for (size_t i = 0; i < n; i++)
        if (tb_json_find(obj, keys[i], &v) && !is_nothing(v.v))
            return tb_json_fail(&v, err, TB_EUNSUPPORTED, "is not served here");
    return 0;
}
