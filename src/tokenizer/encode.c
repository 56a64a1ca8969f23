/*
 * Text to ids: added tokens are cut out of the text, the rest is normalised (normalize.c), cut into
 * pre-tokens by the file's own expressions (pcre2) or at its marks for spaces (Metaspace) and
 * merged (bpe.c); a template may put tokens around the result.
 *
 * Owner: each call has its own match data. Thread: any.
 */
#include "tokenizer/encoder.h"

#include <string.h>
#include <utf8proc.h>

#include "util/mem.h"

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

/* ---- encoding */

/* The id of the longest added token at p, or -1. */
static int32_t finder_at(const struct tb_finder *f, const char *p, size_t n, size_t *len)
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
    const struct tb_metaspace *m = &k->c->meta;
    struct tb_buf text;
    bool first = s.p == k->first;
    tb_buf_init(&text, SIZE_MAX / 2);
    bool add = m->prepend == PREPEND_ALWAYS || (m->prepend == PREPEND_FIRST && first);
    int rc = add && s.p[0] != ' ' && !tb_span_starts(s, m->mark) ? tb_buf_puts(&text, m->mark) : 0;
    if (!rc) rc = tb_normal_replace(s, " ", m->mark, &text);
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
static int cut_added(struct call *k, const struct tb_finder *f, struct tb_span s,
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
    int rc = tb_normalize(k->c, &s, work);
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
