/*
 * Text to ids: added tokens are cut out of the text, the rest is normalised (NFC, Prepend,
 * Replace), cut into pre-tokens by the file's own expressions (pcre2) or at its marks for spaces
 * (Metaspace) and merged (bpe.c); a template may put tokens around the result.
 *
 * struct tb_encoder owns its compiled expressions and lists and is immutable; each call has its own
 * match data. Thread: any.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <string.h>
#include <utf8proc.h>

#include "tokenizer/internal.h"
#include "util/map.h"
#include "util/mem.h"

#define MAX_SPLITS 8
#define MAX_STEPS  8
#define GPT2_SPLIT                                                                                 \
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

/* Added tokens of one kind, found by content: longest first at every position. */
struct finder {
    struct tb_map ids; /* content to id + 1 */
    size_t *lengths;   /* [n_lengths] distinct, descending */
    size_t n_lengths;
    bool first[256]; /* some content begins with this byte */
};

/* A step of the normalizer. */
struct step {
    enum { STEP_NFC, STEP_PREPEND, STEP_REPLACE } kind;
    char *from, *to; /* STEP_REPLACE: both; STEP_PREPEND: to */
};

/* The Metaspace pre-tokenizer. */
struct metaspace {
    char *mark; /* stands for a space; NULL without the pre-tokenizer */
    enum { PREPEND_NEVER, PREPEND_FIRST, PREPEND_ALWAYS } prepend;
    bool split; /* a pre-token begins at each mark */
};

struct tb_encoder {
    const struct tb_tokenizer *t;
    bool prefix_space;
    struct step steps[MAX_STEPS];
    size_t n_steps;
    struct metaspace meta;
    pcre2_code *splits[MAX_SPLITS];
    size_t n_splits;
    struct finder raw, normalized; /* by the token's `normalized` */
    bool *lstrip, *rstrip;         /* [t->n] by id */
    int32_t *before, *after;       /* the template around the text */
    size_t n_before, n_after;
};

/* ---- ids */

void tb_ids_init(struct tb_ids *v)
{
    *v = (struct tb_ids){0};
}

void tb_ids_fini(struct tb_ids *v)
{
    tb_free(v->p);
    *v = (struct tb_ids){0};
}

int tb_ids_push(struct tb_ids *v, int32_t id)
{
    if (v->n == v->cap) {
        size_t cap = v->cap ? v->cap * 2 : 64, bytes;
        int32_t *p = tb_mul_size(cap, sizeof(*p), &bytes) ? tb_try_realloc(v->p, bytes) : NULL;
        if (!p) return TB_ENOMEM;
        v->p = p;
        v->cap = cap;
    }
    v->p[v->n++] = id;
    return 0;
}

/* ---- normalizer */

/* The tokenizers library normalizes by Unicode 9: marks and pairs that came later, up to Unicode
 * 15, neither move nor compose. First and last, ascending. */
static const uint32_t LATER[][2] = {
    {0x7FD, 0x7FD},     {0x898, 0x89F},     {0x8CA, 0x8D3},     {0x9FE, 0x9FE},
    {0xC3C, 0xC3C},     {0xD3B, 0xD3C},     {0xEBA, 0xEBA},     {0xECE, 0xECE},
    {0x1715, 0x1715},   {0x1ABF, 0x1ACE},   {0x1DF6, 0x1DFA},   {0xA82C, 0xA82C},
    {0x10D24, 0x10D27}, {0x10EAB, 0x10EAC}, {0x10EFD, 0x10EFF}, {0x10F46, 0x10F50},
    {0x10F82, 0x10F85}, {0x11070, 0x11070}, {0x1133B, 0x1133B}, {0x1145E, 0x1145E},
    {0x11839, 0x1183A}, {0x11930, 0x11930}, {0x11938, 0x11938}, {0x1193D, 0x1193E},
    {0x11943, 0x11943}, {0x119E0, 0x119E0}, {0x11A34, 0x11A34}, {0x11A47, 0x11A47},
    {0x11A99, 0x11A99}, {0x11D42, 0x11D42}, {0x11D44, 0x11D45}, {0x11D97, 0x11D97},
    {0x11F41, 0x11F42}, {0x16FF0, 0x16FF1}, {0x1E08F, 0x1E08F}, {0x1E130, 0x1E136},
    {0x1E2AE, 0x1E2AE}, {0x1E2EC, 0x1E2EF}, {0x1E4EC, 0x1E4EF},
};

static bool is_later(uint32_t c)
{
    size_t lo = 0, hi = TB_ARRAY_LEN(LATER);
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (LATER[mid][1] < c)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo < TB_ARRAY_LEN(LATER) && LATER[lo][0] <= c;
}

static int compose_run(struct tb_span s, struct tb_buf *out)
{
    utf8proc_uint8_t *text = NULL;
    if (!s.n) return 0;
    utf8proc_ssize_t n = utf8proc_map((const utf8proc_uint8_t *)s.p, (utf8proc_ssize_t)s.n, &text,
                                      UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    if (n < 0) return n == UTF8PROC_ERROR_NOMEM ? TB_ENOMEM : TB_EINVAL;
    int rc = tb_buf_append(out, text, (size_t)n);
    free(text); /* utf8proc's own malloc */
    return rc;
}

static int compose(struct tb_span s, struct tb_buf *out)
{
    size_t done = 0;
    for (size_t i = 0; i < s.n;) {
        utf8proc_int32_t c;
        size_t n = (size_t)utf8proc_iterate((const utf8proc_uint8_t *)s.p + i,
                                            (utf8proc_ssize_t)(s.n - i), &c);
        if (is_later((uint32_t)c)) {
            int rc = compose_run((struct tb_span){s.p + done, i - done}, out);
            if (!rc) rc = tb_buf_append(out, s.p + i, n);
            if (rc) return rc;
            done = i + n;
        }
        i += n;
    }
    return compose_run((struct tb_span){s.p + done, s.n - done}, out);
}

static int replace(struct tb_span s, const char *from, const char *to, struct tb_buf *out)
{
    size_t n = strlen(from);
    int rc = 0;
    for (const char *at; !rc && (at = memmem(s.p, s.n, from, n));) {
        rc = tb_buf_append(out, s.p, (size_t)(at - s.p));
        if (!rc) rc = tb_buf_puts(out, to);
        s = (struct tb_span){at + n, s.n - (size_t)(at - s.p) - n};
    }
    return rc ? rc : tb_buf_append(out, s.p, s.n);
}

/* *s becomes its normal form, which lies in one of the buffers unless nothing changed. */
static int normalize(const struct tb_encoder *c, struct tb_span *s, struct tb_buf work[2])
{
    bool composed = true; /* below U+0300 every character is its own NFC */
    for (size_t i = 0; i < s->n && composed; i++)
        composed = (unsigned char)s->p[i] < 0xCC;
    for (size_t i = 0; i < c->n_steps && s->n; i++) {
        const struct step *step = &c->steps[i];
        struct tb_buf *to = s->p == work[0].p ? &work[1] : &work[0];
        int rc = 0;
        if (step->kind == STEP_NFC && composed) continue;
        tb_buf_reset(to);
        if (step->kind == STEP_NFC) {
            rc = compose(*s, to);
        } else if (step->kind == STEP_REPLACE) {
            rc = replace(*s, step->from, step->to, to);
        } else {
            rc = tb_buf_puts(to, step->to);
            if (!rc) rc = tb_buf_append(to, s->p, s->n);
        }
        if (rc) return rc;
        composed &= step->kind == STEP_NFC;
        *s = (struct tb_span){to->p, to->n};
    }
    return 0;
}

/* ---- added tokens */

static void finder_add(struct finder *f, const char *s, size_t n, int32_t id)
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

/* The id of the longest added token at p, or -1. */
static int32_t finder_at(const struct finder *f, const char *p, size_t n, size_t *len)
{
    if (!f->first[(unsigned char)*p]) return -1;
    for (size_t i = 0; i < f->n_lengths; i++) {
        if (f->lengths[i] > n) continue;
        int32_t id = (int32_t)(intptr_t)tb_map_get(&f->ids, p, f->lengths[i]) - 1;
        if (id < 0) continue;
        *len = f->lengths[i];
        return id;
    }
    return -1;
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
        int rc = normalize(c, &s, work);
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
    struct step step = {0};
    if (c->n_steps == MAX_STEPS)
        return tb_error_set(e, TB_EUNSUPPORTED, "%s: normalizer has more than %d steps", name,
                            MAX_STEPS);
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
    if (c->n_splits == MAX_SPLITS)
        return tb_error_set(e, TB_EUNSUPPORTED, "%s: pre_tokenizer has more than %d splits", name,
                            MAX_SPLITS);
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
        const struct step *s = &c->steps[i];
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

/* ---- encoding */

struct call {
    const struct tb_encoder *c;
    pcre2_match_data *match;
    struct tb_ids *out;
    struct tb_span text;
    const char *first; /* where the normalised text begins, in its first segment */
    bool plain;        /* special tokens in the text are text */
};

/* One match from `at`; 1 and its bounds, 0 if there is none, or a negative error. */
static int find(struct call *k, const pcre2_code *re, struct tb_span s, size_t at, size_t bounds[2])
{
    int rc = pcre2_match(re, (PCRE2_SPTR)s.p, s.n, at, PCRE2_NO_UTF_CHECK, k->match, NULL);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) /* the interpreter keeps its stack on the heap */
        rc = pcre2_match(re, (PCRE2_SPTR)s.p, s.n, at, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, k->match,
                         NULL);
    if (rc == PCRE2_ERROR_NOMATCH) return 0;
    if (rc == PCRE2_ERROR_NOMEMORY) return TB_ENOMEM;
    if (rc < 0) return TB_ETOOBIG; /* a limit of the matcher */
    const PCRE2_SIZE *v = pcre2_get_ovector_pointer(k->match);
    bounds[0] = v[0];
    bounds[1] = v[1];
    return 1;
}

/* Cuts s by split `level` and what lies between its matches, and every piece by the next split. */
static int cut(struct call *k, struct tb_span s, size_t level)
{
    if (!s.n) return 0;
    if (level == k->c->n_splits) return tb_bpe_encode(k->c->t->bpe, s.p, s.n, k->out);
    size_t done = 0, at = 0;
    while (at < s.n) {
        size_t b[2];
        int rc = find(k, k->c->splits[level], s, at, b);
        if (rc < 0) return rc;
        if (!rc) break;
        if (b[1] == b[0]) { /* an empty match cuts nothing; step over one character */
            at = b[1] + 1;
            while (at < s.n && ((unsigned char)s.p[at] & 0xC0) == 0x80)
                at++;
            continue;
        }
        rc = cut(k, (struct tb_span){s.p + done, b[0] - done}, level + 1);
        if (!rc) rc = cut(k, (struct tb_span){s.p + b[0], b[1] - b[0]}, level + 1);
        if (rc) return rc;
        done = at = b[1];
    }
    return cut(k, (struct tb_span){s.p + done, s.n - done}, level + 1);
}

/* Cuts s before each mark, as Metaspace with split does. */
static int cut_marks(struct call *k, struct tb_span s)
{
    const char *mark = k->c->meta.mark;
    size_t n = strlen(mark);
    while (k->c->meta.split && s.n) {
        const char *next = s.n > n ? memmem(s.p + 1, s.n - 1, mark, n) : NULL;
        if (!next) break;
        int rc = cut(k, (struct tb_span){s.p, (size_t)(next - s.p)}, 0);
        if (rc) return rc;
        s = (struct tb_span){next, s.n - (size_t)(next - s.p)};
    }
    return cut(k, s, 0);
}

static int encode_marked(struct call *k, struct tb_span s)
{
    const struct metaspace *m = &k->c->meta;
    struct tb_buf text;
    bool first = s.p == k->first;
    tb_buf_init(&text, SIZE_MAX / 2);
    bool add = m->prepend == PREPEND_ALWAYS || (m->prepend == PREPEND_FIRST && first);
    int rc = add && s.p[0] != ' ' && !tb_span_starts(s, m->mark) ? tb_buf_puts(&text, m->mark) : 0;
    if (!rc) rc = replace(s, " ", m->mark, &text);
    if (!rc) rc = cut_marks(k, (struct tb_span){text.p, text.n});
    tb_buf_fini(&text);
    return rc;
}

static int encode_plain(struct call *k, struct tb_span s)
{
    struct tb_buf text;
    if (!s.n) return 0;
    if (k->c->meta.mark) return encode_marked(k, s);
    if (!k->c->prefix_space || s.p[0] == ' ') return cut(k, s, 0);
    tb_buf_init(&text, SIZE_MAX / 2);
    int rc = tb_buf_puts(&text, " ");
    if (!rc) rc = tb_buf_append(&text, s.p, s.n);
    if (!rc) rc = cut(k, (struct tb_span){text.p, text.n}, 0);
    tb_buf_fini(&text);
    return rc;
}

/* Whitespace at the start (n = its bytes) or end of s, for lstrip and rstrip. */
static size_t space_at_start(struct tb_span s)
{
    size_t i = 0;
    while (i < s.n) {
        utf8proc_int32_t cp;
        utf8proc_ssize_t n =
            utf8proc_iterate((const utf8proc_uint8_t *)s.p + i, (utf8proc_ssize_t)(s.n - i), &cp);
        if (n <= 0) break;
        utf8proc_category_t cat = utf8proc_category(cp);
        bool white = (cp >= 9 && cp <= 13) || cp == 0x85 || cat == UTF8PROC_CATEGORY_ZS ||
                     cat == UTF8PROC_CATEGORY_ZL || cat == UTF8PROC_CATEGORY_ZP;
        if (!white) break;
        i += (size_t)n;
    }
    return i;
}

static size_t space_at_end(struct tb_span s)
{
    size_t end = s.n;
    while (end) {
        size_t i = end - 1;
        while (i && ((unsigned char)s.p[i] & 0xC0) == 0x80)
            i--;
        if (space_at_start((struct tb_span){s.p + i, end - i}) != end - i) break;
        end = i;
    }
    return s.n - end;
}

/* Cuts the added tokens of one kind out of s; what lies between goes to `rest`. */
static int cut_added(struct call *k, const struct finder *f, struct tb_span s,
                     int (*rest)(struct call *, struct tb_span))
{
    size_t done = 0;
    for (size_t i = 0; i < s.n && f->n_lengths;) {
        size_t len;
        int32_t id = finder_at(f, s.p + i, s.n - i, &len);
        if (id < 0 || (k->plain && tb_tokenizer_is_special(k->c->t, id))) {
            i += id < 0 ? 1 : len;
            continue;
        }
        size_t begin = i, end = i + len;
        if (k->c->lstrip[id]) begin -= space_at_end((struct tb_span){s.p + done, i - done});
        if (k->c->rstrip[id]) end += space_at_start((struct tb_span){s.p + end, s.n - end});
        int rc = rest(k, (struct tb_span){s.p + done, begin - done});
        if (!rc) rc = tb_ids_push(k->out, id);
        if (rc) return rc;
        done = i = end;
    }
    return rest(k, (struct tb_span){s.p + done, s.n - done});
}

static int encode_segment(struct call *k, struct tb_span s)
{
    struct tb_buf work[2];
    bool first = s.p == k->text.p;
    if (!s.n) return 0;
    tb_buf_init(&work[0], SIZE_MAX / 2);
    tb_buf_init(&work[1], SIZE_MAX / 2);
    int rc = normalize(k->c, &s, work);
    k->first = first ? s.p : NULL;
    if (!rc) rc = cut_added(k, &k->c->normalized, s, encode_plain);
    tb_buf_fini(&work[0]);
    tb_buf_fini(&work[1]);
    return rc;
}

int tb_tokenizer_encode(const struct tb_tokenizer *t, struct tb_span text, unsigned flags,
                        struct tb_ids *out, struct tb_error *e)
{
    const struct tb_encoder *c = t->encoder;
    if (t->no_encode) return tb_error_set(e, TB_EUNSUPPORTED, "%s", t->no_encode);
    if (!text.n) text.p = ""; /* a span of nothing may have no address */
    if (!tb_utf8_valid(text.p, text.n))
        return tb_error_set(e, TB_EINVAL, "text is not valid UTF-8");
    struct call k = {.c = c,
                     .match = pcre2_match_data_create(16, NULL),
                     .out = out,
                     .text = text,
                     .plain = flags & TB_ENCODE_PLAIN};
    size_t start = out->n;
    int rc = k.match ? 0 : TB_ENOMEM;
    bool around = flags & TB_ENCODE_TEMPLATE;
    for (size_t i = 0; around && i < c->n_before && !rc; i++)
        rc = tb_ids_push(out, c->before[i]);
    if (!rc) rc = cut_added(&k, &c->raw, text, encode_segment);
    for (size_t i = 0; around && i < c->n_after && !rc; i++)
        rc = tb_ids_push(out, c->after[i]);
    pcre2_match_data_free(k.match);
    if (!rc) return 0;
    out->n = start;
    return tb_error_set(e, rc, "the text of %zu bytes cannot be encoded", text.n);
}
