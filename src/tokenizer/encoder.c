/*
 * An encoder from tokenizer.json: the normalizer's steps, the pre-tokenizer's expressions and
 * marks, added tokens, the template around the text (encoder.h). Thread: any.
 */
#include "tokenizer/encoder.h"

#include <string.h>

#include "util/mem.h"

#define GPT2_SPLIT                                                                                 \
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

/* ---- added tokens */

static void finder_add(struct tb_finder *f, const char *s, size_t n, int32_t id)
{
    size_t i = 0;
    tb_map_put(&f->ids, s, n, (void *)(intptr_t)(id + 1));
    f->first[(unsigned char)s[0]] = true;
    while (i < f->n_lengths && f->lengths[i] > n)
        i++;
    if (i < f->n_lengths && f->lengths[i] == n) return;
    f->lengths = tb_realloc(f->lengths, (f->n_lengths + 1) * sizeof(*f->lengths));
    memmove(f->lengths + i + 1, f->lengths + i, (f->n_lengths - i) * sizeof(*f->lengths));
    f->lengths[i] = n;
    f->n_lengths++;
}

static int load_added(struct tb_encoder *c, const char *name, const json_t *added,
                      struct tb_error *e)
{
    for (size_t i = 0; i < json_array_size(added); i++) {
        const json_t *a = json_array_get(added, i), *content = json_object_get(a, "content");
        int32_t id = (int32_t)json_integer_value(json_object_get(a, "id"));
        if (json_is_true(json_object_get(a, "single_word")))
            return tb_error_set(e, TB_EUNSUPPORTED,
                                "%s: added_tokens[%zu].single_word is not served", name, i);
        if (!json_string_length(content)) continue; /* an empty token is never found in text */
        c->lstrip[id] = json_is_true(json_object_get(a, "lstrip"));
        c->rstrip[id] = json_is_true(json_object_get(a, "rstrip"));
        struct tb_span s = {json_string_value(content), json_string_length(content)};
        if (!json_is_true(json_object_get(a, "normalized"))) {
            finder_add(&c->raw, s.p, s.n, id);
            continue;
        }
        struct tb_buf work[2];
        tb_buf_init(&work[0], SIZE_MAX / 2);
        tb_buf_init(&work[1], SIZE_MAX / 2);
        int rc = tb_normalize(c, &s, work);
        if (!rc && s.n) finder_add(&c->normalized, s.p, s.n, id);
        tb_buf_fini(&work[0]);
        tb_buf_fini(&work[1]);
        if (rc) return tb_error_set(e, rc, "%s: added_tokens[%zu].content", name, i);
    }
    return 0;
}

/* ---- loading */

static const char *type_of(const json_t *o)
{
    const char *s = json_string_value(json_object_get(o, "type"));
    return s ? s : "";
}

static int load_step(struct tb_encoder *c, const char *name, const json_t *o, struct tb_error *e)
{
    const char *type = type_of(o);
    const json_t *from = json_object_get(json_object_get(o, "pattern"), "String");
    const json_t *to = json_object_get(o, strcmp(type, "Prepend") == 0 ? "prepend" : "content");
    struct tb_normal_step step = {0};
    if (c->n_steps == TB_MAX_NORMAL_STEPS)
        return tb_error_set(e, TB_EUNSUPPORTED, "%s: normalizer has more than %d steps", name,
                            TB_MAX_NORMAL_STEPS);
    if (strcmp(type, "NFC") == 0)
        step.kind = STEP_NFC;
    else if (strcmp(type, "Prepend") == 0)
        step.kind = STEP_PREPEND;
    else if (strcmp(type, "Replace") == 0 && json_string_length(from))
        step.kind = STEP_REPLACE;
    else
        return tb_error_set(e, TB_EUNSUPPORTED, "%s: normalizer %.64s%s is not served", name, type,
                            strcmp(type, "Replace") == 0 ? " without a pattern.String" : "");
    if (step.kind != STEP_NFC && !json_is_string(to))
        return tb_error_set(e, TB_ECORRUPT, "%s: normalizer %.64s has no text", name, type);
    if (step.kind == STEP_REPLACE) step.from = tb_strdup(json_string_value(from));
    if (step.kind != STEP_NFC) step.to = tb_strdup(json_string_value(to));
    c->steps[c->n_steps++] = step;
    return 0;
}

static int load_normalizer(struct tb_encoder *c, const char *name, const json_t *o,
                           struct tb_error *e)
{
    int rc = 0;
    if (!o || json_is_null(o)) return 0;
    if (strcmp(type_of(o), "Sequence") != 0) return load_step(c, name, o, e);
    const json_t *list = json_object_get(o, "normalizers");
    for (size_t i = 0; i < json_array_size(list) && !rc; i++)
        rc = load_step(c, name, json_array_get(list, i), e);
    return rc;
}

/* \s in these files is Unicode White_Space; pcre2's own also takes U+180E. */
static int rewrite_spaces(const char *pattern, size_t n, struct tb_buf *out)
{
    for (size_t i = 0; i < n; i++) {
        if (pattern[i] == '\\' && i + 1 < n) {
            char next = pattern[++i], pair[2] = {'\\', next};
            int rc = next == 's'   ? tb_buf_puts(out, "\\p{White_Space}")
                     : next == 'S' ? tb_buf_puts(out, "\\P{White_Space}")
                                   : tb_buf_append(out, pair, 2);
            if (rc) return rc;
        } else if (tb_buf_append(out, pattern + i, 1)) {
            return TB_ENOMEM;
        }
    }
    return 0;
}

static int add_split(struct tb_encoder *c, const char *name, const char *pattern, size_t n,
                     bool literal, struct tb_error *e)
{
    int code;
    PCRE2_SIZE at;
    struct tb_buf text;
    uint32_t flags = PCRE2_UTF | (literal ? PCRE2_LITERAL : PCRE2_UCP);
    if (c->n_splits == TB_MAX_SPLITS)
        return tb_error_set(e, TB_EUNSUPPORTED, "%s: pre_tokenizer has more than %d splits", name,
                            TB_MAX_SPLITS);
    tb_buf_init(&text, 1 << 20);
    int rc = literal ? tb_buf_append(&text, pattern, n) : rewrite_spaces(pattern, n, &text);
    if (rc) {
        tb_buf_fini(&text);
        return tb_error_set(e, rc, "%s: pre_tokenizer pattern is too long", name);
    }
    pcre2_code *re = pcre2_compile((PCRE2_SPTR)text.p, text.n, flags, &code, &at, NULL);
    if (!re && !literal) /* before 10.40 pcre2 does not know White_Space */
        re = pcre2_compile((PCRE2_SPTR)pattern, n, flags, &code, &at, NULL);
    tb_buf_fini(&text);
    if (!re) {
        char why[128];
        pcre2_get_error_message(code, (PCRE2_UCHAR *)why, sizeof(why));
        return tb_error_set(e, TB_EUNSUPPORTED, "%s: pre_tokenizer pattern: %s at %zu", name, why,
                            (size_t)at);
    }
    (void)pcre2_jit_compile(re,
                            PCRE2_JIT_COMPLETE); /* without it matching is slower, not different */
    c->splits[c->n_splits++] = re;
    return 0;
}

static int load_metaspace(struct tb_encoder *c, const char *name, const json_t *o,
                          struct tb_error *e)
{
    static const char *const schemes[] = {"never", "first", "always"};
    const json_t *mark = json_object_get(o, "replacement"), *split = json_object_get(o, "split");
    const json_t *scheme = json_object_get(o, "prepend_scheme");
    const char *want = scheme ? json_string_value(scheme) : "always";
    size_t i = 0;
    if (!json_string_length(mark) || c->meta.mark)
        return tb_error_set(e, TB_EUNSUPPORTED, "%s: pre_tokenizer Metaspace %s", name,
                            c->meta.mark ? "comes twice" : "has no replacement");
    while (i < TB_ARRAY_LEN(schemes) && (!want || strcmp(want, schemes[i]) != 0))
        i++;
    if (i == TB_ARRAY_LEN(schemes))
        return tb_error_set(e, TB_EUNSUPPORTED, "%s: prepend_scheme %.64s is not served", name,
                            want ? want : "that is no string");
    c->meta.mark = tb_strdup(json_string_value(mark));
    c->meta.prepend = i;
    c->meta.split = !split || json_is_true(split);
    return 0;
}

/* True if the normalizer leaves no such text, so that a split by it cuts nothing. */
static bool replaced(const struct tb_encoder *c, const json_t *text)
{
    for (size_t i = 0; i < c->n_steps && json_is_string(text); i++) {
        const struct tb_normal_step *s = &c->steps[i];
        if (s->kind == STEP_REPLACE && strcmp(s->from, json_string_value(text)) == 0 &&
            !strstr(s->to, s->from) && i + 1 == c->n_steps)
            return true;
    }
    return false;
}

static int load_pre_tokenizer(struct tb_encoder *c, const char *name, const json_t *o,
                              struct tb_error *e)
{
    const char *type = type_of(o);
    if (!c->t->byte_level && (!o || json_is_null(o))) return 0;
    if (strcmp(type, "Metaspace") == 0 && !c->t->byte_level) return load_metaspace(c, name, o, e);
    if (strcmp(type, "Sequence") == 0) {
        const json_t *list = json_object_get(o, "pretokenizers");
        int rc = 0;
        for (size_t i = 0; i < json_array_size(list) && !rc; i++) {
            const json_t *one = json_array_get(list, i);
            if (strcmp(type_of(one), "Sequence") == 0)
                return tb_error_set(e, TB_EUNSUPPORTED, "%s: pre_tokenizer has a nested Sequence",
                                    name);
            rc = load_pre_tokenizer(c, name, one, e);
        }
        return rc;
    }
    if (strcmp(type, "ByteLevel") == 0) {
        const json_t *use = json_object_get(o, "use_regex");
        if (json_is_true(json_object_get(o, "add_prefix_space"))) c->prefix_space = true;
        if (use && !json_is_true(use)) return 0;
        return add_split(c, name, GPT2_SPLIT, strlen(GPT2_SPLIT), false, e);
    }
    if (strcmp(type, "Digits") == 0) {
        const char *re =
            json_is_true(json_object_get(o, "individual_digits")) ? "\\p{N}" : "\\p{N}+";
        return add_split(c, name, re, strlen(re), false, e);
    }
    if (strcmp(type, "Split") == 0) {
        const json_t *pattern = json_object_get(o, "pattern");
        const json_t *re = json_object_get(pattern, "Regex"),
                     *plain = json_object_get(pattern, "String");
        const char *behavior = json_string_value(json_object_get(o, "behavior"));
        if (replaced(c, plain)) return 0;
        if (!behavior || strcmp(behavior, "Isolated") != 0 ||
            json_is_true(json_object_get(o, "invert")))
            return tb_error_set(
                e, TB_EUNSUPPORTED,
                "%s: pre_tokenizer Split with behavior %.32s or invert is not served", name,
                behavior ? behavior : "missing");
        if (!json_is_string(re) && !json_is_string(plain))
            return tb_error_set(e, TB_ECORRUPT, "%s: pre_tokenizer Split has no pattern", name);
        const json_t *s = json_is_string(re) ? re : plain;
        return add_split(c, name, json_string_value(s), json_string_length(s), s == plain, e);
    }
    return tb_error_set(e, TB_EUNSUPPORTED, "%s: pre_tokenizer %.64s is not served", name,
                        *type ? type : "missing");
}

/* TemplateProcessing.single: special tokens before and after the text. */
static int load_template(struct tb_encoder *c, const char *name, const json_t *o,
                         struct tb_error *e)
{
    const json_t *single = json_object_get(o, "single"),
                 *known = json_object_get(o, "special_tokens");
    bool seen_text = false;
    for (size_t i = 0; i < json_array_size(single); i++) {
        const json_t *part = json_array_get(single, i);
        const json_t *special = json_object_get(part, "SpecialToken");
        if (!special) {
            seen_text = true;
            continue;
        }
        const char *id = json_string_value(json_object_get(special, "id"));
        const json_t *ids = json_object_get(json_object_get(known, id ? id : ""), "ids");
        if (!json_is_array(ids))
            return tb_error_set(e, TB_ECORRUPT, "%s: post_processor.special_tokens lacks %.64s",
                                name, id ? id : "an id");
        for (size_t k = 0; k < json_array_size(ids); k++) {
            int32_t **list = seen_text ? &c->after : &c->before;
            size_t *n = seen_text ? &c->n_after : &c->n_before;
            json_int_t v = json_integer_value(json_array_get(ids, k));
            if (v < 0 || v >= c->t->n || !c->t->tokens[v].flags)
                return tb_error_set(e, TB_ECORRUPT,
                                    "%s: post_processor names the id %lld, which is no token", name,
                                    (long long)v);
            *list = tb_realloc(*list, (*n + 1) * sizeof(**list));
            (*list)[(*n)++] = (int32_t)v;
        }
    }
    return 0;
}

static int load_post_processor(struct tb_encoder *c, const char *name, const json_t *o,
                               struct tb_error *e)
{
    const char *type = type_of(o);
    if (!o || json_is_null(o) || strcmp(type, "ByteLevel") == 0) return 0;
    if (strcmp(type, "TemplateProcessing") == 0) return load_template(c, name, o, e);
    if (strcmp(type, "Sequence") == 0) {
        const json_t *list = json_object_get(o, "processors");
        int rc = 0;
        for (size_t i = 0; i < json_array_size(list) && !rc; i++) {
            const json_t *one = json_array_get(list, i);
            if (strcmp(type_of(one), "TemplateProcessing") == 0)
                rc = load_template(c, name, one, e);
            else if (strcmp(type_of(one), "ByteLevel") != 0)
                rc = tb_error_set(e, TB_EUNSUPPORTED, "%s: post_processor %.64s is not served",
                                  name, type_of(one));
        }
        return rc;
    }
    return tb_error_set(e, TB_EUNSUPPORTED, "%s: post_processor %.64s is not served", name, type);
}

int tb_encoder_create(const struct tb_tokenizer *t, const char *name, json_t *root,
                      struct tb_encoder **out, struct tb_error *e)
{
    int rc;
    *out = NULL;
    struct tb_encoder *c = tb_calloc(1, sizeof(*c));
    c->t = t;
    tb_map_init(&c->raw.ids);
    tb_map_init(&c->normalized.ids);
    c->lstrip = tb_try_calloc((size_t)t->n, sizeof(*c->lstrip));
    c->rstrip = tb_try_calloc((size_t)t->n, sizeof(*c->rstrip));
    if (!c->lstrip || !c->rstrip) {
        rc = tb_error_set(e, TB_ENOMEM, "%s: out of memory", name);
        goto out;
    }
    if ((rc = load_normalizer(c, name, json_object_get(root, "normalizer"), e))) goto out;
    if ((rc = load_added(c, name, json_object_get(root, "added_tokens"), e))) goto out;
    if ((rc = load_pre_tokenizer(c, name, json_object_get(root, "pre_tokenizer"), e))) goto out;
    rc = load_post_processor(c, name, json_object_get(root, "post_processor"), e);
out:
    if (rc) {
        tb_encoder_destroy(c);
        return rc;
    }
    *out = c;
    return 0;
}

void tb_encoder_destroy(struct tb_encoder *c)
{
    if (!c) return;
    for (size_t i = 0; i < c->n_splits; i++)
        pcre2_code_free(c->splits[i]);
    for (size_t i = 0; i < c->n_steps; i++) {
        tb_free(c->steps[i].from);
        tb_free(c->steps[i].to);
    }
    tb_free(c->meta.mark);
    tb_map_fini(&c->raw.ids);
    tb_map_fini(&c->normalized.ids);
    tb_free(c->raw.lengths);
    tb_free(c->normalized.lengths);
    tb_free(c->lstrip);
    tb_free(c->rstrip);
    tb_free(c->before);
    tb_free(c->after);
    tb_free(c);
}
