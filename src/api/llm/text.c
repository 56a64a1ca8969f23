/*
 * Tokens to text, one at a time: a stop string and what follows it is cut off, special tokens do
 * not show, and text comes out in whole characters (see llm.h). Stop strings are found where the
 * engine finds them: in the text with its special tokens. Thread: one at a time.
 */
#include <string.h>

#include "api/llm/llm.h"

#define MAX_TEXT ((size_t)1 << 30)

enum mark { HIDDEN = 1, BYTE = 2 }; /* of a held byte: a special token's, a byte token's */

void tb_llm_text_init(struct tb_llm_text *x, const struct tb_tokenizer *t,
                      const struct tb_stop_set *stops)
{
    *x = (struct tb_llm_text){.t = t};
    tb_stop_matcher_init(&x->stop, stops);
    tb_buf_init(&x->held, MAX_TEXT);
    tb_buf_init(&x->marks, MAX_TEXT);
    tb_decoder_init(&x->decoder, t, TB_DECODE_GOES_ON);
}

void tb_llm_text_fini(struct tb_llm_text *x)
{
    tb_stop_matcher_fini(&x->stop);
    tb_buf_fini(&x->held);
    tb_buf_fini(&x->marks);
    tb_decoder_fini(&x->decoder);
}

static void drop(struct tb_buf *b, size_t n)
{
    b->n -= n;
    memmove(b->p, b->p + n, b->n);
}

/* Lets the first n held bytes go to the decoder, alike ones together. */
static void release(struct tb_llm_text *x, size_t n, struct tb_buf *out)
{
    if (n == 0) return;
    for (size_t i = 0, end; i < n; i = end) {
        char mark = x->marks.p[i];
        for (end = i + 1; end < n && x->marks.p[end] == mark;)
            end++;
        if (!(mark & HIDDEN))
            tb_decoder_feed_bytes(&x->decoder, x->held.p + i, end - i, mark & BYTE, out);
    }
    drop(&x->held, n);
    drop(&x->marks, n);
    x->n_out += n;
}

void tb_llm_text_feed(struct tb_llm_text *x, int32_t token, struct tb_buf *out)
{
    struct tb_span s;
    if (x->stop.hit >= 0 || tb_tokenizer_token_bytes(x->t, token, &s) || s.n == 0) return;
    size_t at = x->marks.n;
    if (tb_buf_append(&x->held, s.p, s.n) || tb_buf_append(&x->marks, s.p, s.n)) return;
    memset(x->marks.p + at,
           (tb_tokenizer_is_special(x->t, token) ? HIDDEN : 0) |
               (tb_tokenizer_is_byte(x->t, token) ? BYTE : 0),
           s.n);
    if (tb_stop_matcher_feed_bytes(&x->stop, s.p, s.n)) {
        release(x, (size_t)(x->stop.hit_at - x->n_out), out);
        tb_buf_reset(&x->held);
        tb_buf_reset(&x->marks);
        return;
    }
    size_t n_stops = x->stop.set ? tb_stop_set_count(x->stop.set) : 0;
    size_t keep = 0;
    for (size_t i = 0; i < n_stops; i++)
        keep = TB_MAX(keep, (size_t)x->stop.state[i]);
    release(x, x->held.n - TB_MIN(keep, x->held.n), out);
}

bool tb_llm_text_failed(const struct tb_llm_text *x)
{
    return x->held.failed || x->marks.failed || x->decoder.held.failed;
}

void tb_llm_text_end(struct tb_llm_text *x, struct tb_buf *out)
{
    release(x, x->held.n, out);
    tb_decoder_end(&x->decoder, out);
}
