/*
 * Ids to text, as the library's decoders do it: byte-level tokens are bytes of one text, in which
 * what is no character becomes U+FFFD; SentencePiece-style tokens are text, and a run of byte
 * tokens ("<0x0A>") between them is text when it is UTF-8, else one U+FFFD for each.
 *
 * A decoder owns the bytes that it holds back. Thread: a decoder one at a time.
 */
#include <string.h>

#include "tokenizer/internal.h"
#include "util/mem.h"

#define MAX_HELD    ((size_t)1 << 30)
#define REPLACEMENT "\xEF\xBF\xBD" /* U+FFFD */

/* ---- decoder of tokenizer.json */

struct steps { /* that were seen */
    bool bytes, fallback, fused;
};

static bool is_text(const json_t *o, const char *key, const char *want)
{
    const char *s = json_string_value(json_object_get(o, key));
    return s && strcmp(s, want) == 0;
}

/* Takes one decoder; false when it is not served at its place. */
static bool take_step(struct tb_tokenizer *t, const json_t *step, struct steps *seen)
{
    if (is_text(step, "type", "ByteLevel")) {
        seen->bytes = true;
        return !seen->fallback && !t->marks;
    }
    if (is_text(step, "type", "Fuse")) {
        seen->fused = true;
        return true;
    }
    if (seen->bytes) return false;
    if (is_text(step, "type", "ByteFallback")) {
        seen->fallback = true;
        return !seen->fused;
    }
    if (is_text(step, "type", "Replace")) {
        t->marks = true;
        return !seen->fallback && !seen->fused && is_text(step, "content", " ") &&
               is_text(json_object_get(step, "pattern"), "String", TB_MARK);
    }
    if (!is_text(step, "type", "Strip")) return false;
    const json_t *stop = json_object_get(step, "stop");
    json_int_t start = json_integer_value(json_object_get(step, "start"));
    t->strip = (int32_t)TB_MIN(TB_MAX(start, 0), INT32_MAX);
    return seen->fused && is_text(step, "content", " ") && start >= 0 && json_is_integer(stop) &&
           json_integer_value(stop) == 0;
}

int tb_decoder_load(struct tb_tokenizer *t, const char *name, const json_t *decoder,
                    struct tb_error *e)
{
    const json_t *list = json_object_get(decoder, "decoders");
    struct steps seen = {0};
    size_t n = list ? json_array_size(list) : 1;
    if (t->byte_level && (!decoder || json_is_null(decoder))) return 0;
    for (size_t i = 0; i < n; i++) {
        const json_t *step = list ? json_array_get(list, i) : decoder;
        const char *type = json_string_value(json_object_get(step, "type"));
        if (!take_step(t, step, &seen))
            return tb_error_set(e, TB_EUNSUPPORTED,
                                "%s: decoder is %.64s; only ByteLevel and ByteFallback are served, "
                                "the latter with Replace before it, Fuse and Strip after it",
                                name, type ? type : "missing");
    }
    if (t->byte_level ? seen.fallback : !seen.bytes && !seen.fallback)
        return tb_error_set(e, TB_EUNSUPPORTED, "%s: decoder has %s ByteFallback", name,
                            t->byte_level ? "not ByteLevel but" : "neither ByteLevel nor");
    t->byte_level = !seen.fallback;
    return 0;
}

/* ---- decoding */

void tb_decoder_init(struct tb_decoder *d, const struct tb_tokenizer *t, unsigned flags)
{
    *d = (struct tb_decoder){.t = t, .flags = flags};
    if (t && !(flags & TB_DECODE_GOES_ON)) d->strip = t->strip;
    tb_buf_init(&d->held, MAX_HELD);
}

void tb_decoder_fini(struct tb_decoder *d)
{
    tb_buf_fini(&d->held);
}

/* Text that is complete; what is no UTF-8 in it is replaced. */
static int put(struct tb_decoder *d, const char *p, size_t n, struct tb_buf *out)
{
    while (n && d->strip && *p == ' ') {
        p++;
        n--;
        d->strip--;
    }
    if (n == 0) return 0;
    d->strip = 0;
    return tb_utf8_append(out, p, n);
}

/* A run of byte tokens is over. */
static int end_run(struct tb_decoder *d, struct tb_buf *out)
{
    struct tb_buf *run = &d->held;
    int rc = 0;
    if (run->n == 0) return 0;
    if (tb_utf8_valid(run->p, run->n))
        rc = put(d, run->p, run->n, out);
    else
        for (size_t i = 0; rc == 0 && i < run->n; i++)
            rc = put(d, REPLACEMENT, strlen(REPLACEMENT), out);
    tb_buf_reset(run);
    return rc;
}

int tb_decoder_feed_bytes(struct tb_decoder *d, const char *p, size_t n, bool is_byte,
                          struct tb_buf *out)
{
    struct tb_buf *held = &d->held;
    if (n == 0) return 0;
    if (d->t->byte_level) {
        int rc = tb_buf_append(held, p, n);
        size_t whole = rc ? 0 : held->n - tb_utf8_incomplete_tail(held->p, held->n);
        if (whole == 0) return rc;
        rc = put(d, held->p, whole, out);
        held->n -= whole;
        memmove(held->p, held->p + whole, held->n);
        return rc;
    }
    if (is_byte) return tb_buf_append(held, p, n);
    int rc = end_run(d, out);
    return rc ? rc : put(d, p, n, out);
}

int tb_decoder_feed(struct tb_decoder *d, int32_t id, struct tb_buf *out)
{
    struct tb_span s;
    if (tb_tokenizer_token_bytes(d->t, id, &s)) return 0;
    if ((d->flags & TB_DECODE_VISIBLE) && tb_tokenizer_is_special(d->t, id)) return 0;
    /* a token without bytes parts a run of byte tokens */
    if (s.n == 0 && !d->t->byte_level) return end_run(d, out);
    return tb_decoder_feed_bytes(d, s.p, s.n, tb_tokenizer_is_byte(d->t, id), out);
}

int tb_decoder_end(struct tb_decoder *d, struct tb_buf *out)
{
    if (!d->t || d->held.n == 0) return 0;
    if (!d->t->byte_level) return end_run(d, out);
    int rc = put(d, d->held.p, d->held.n, out);
    tb_buf_reset(&d->held);
    return rc;
}

int tb_tokenizer_decode(const struct tb_tokenizer *t, const int32_t *ids, size_t n, unsigned flags,
                        struct tb_buf *out)
{
    struct tb_decoder d;
    int rc = 0;
    tb_decoder_init(&d, t, flags);
    for (size_t i = 0; rc == 0 && i < n; i++)
        rc = tb_decoder_feed(&d, ids[i], out);
    if (rc == 0) rc = tb_decoder_end(&d, out);
    tb_decoder_fini(&d);
    return rc;
}
