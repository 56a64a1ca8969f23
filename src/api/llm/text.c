/*
 * Tokens to text, one at a time: a stop string and what follows it is cut off, special tokens do
 * not show, and text comes out in whole characters (see llm.h). Thread: one at a time.
 */
#include <string.h>

#include "api/llm/llm.h"

#define MAX_TEXT ((size_t)1 << 30)

void tb_llm_text_init(struct tb_llm_text *x, const struct tb_tokenizer *t,
                      const struct tb_stop_set *stops)
{
    *x = (struct tb_llm_text){.t = t};
    tb_stop_matcher_init(&x->stop, stops);
    tb_buf_init(&x->held, MAX_TEXT);
}

void tb_llm_text_fini(struct tb_llm_text *x)
{
    tb_stop_matcher_fini(&x->stop);
    tb_buf_fini(&x->held);
}

/* Lets the first n held bytes go. */
static void release(struct tb_llm_text *x, size_t n, struct tb_buf *out)
{
    if (n == 0) return;
    tb_utf8_append(out, x->held.p, n);
    x->n_out += n;
    x->held.n -= n;
    memmove(x->held.p, x->held.p + n, x->held.n);
}

void tb_llm_text_feed(struct tb_llm_text *x, int32_t token, struct tb_buf *out)
{
    struct tb_span s;
    if (x->stop.hit >= 0 || tb_tokenizer_is_special(x->t, token) ||
        tb_tokenizer_token_bytes(x->t, token, &s))
        return;
    tb_buf_append(&x->held, s.p, s.n);
    if (tb_stop_matcher_feed_bytes(&x->stop, s.p, s.n)) {
        x->held.n = (size_t)(x->stop.hit_at - x->n_out);
        release(x, x->held.n, out);
        return;
    }
    size_t n_stops = x->stop.set ? tb_stop_set_count(x->stop.set) : 0;
    size_t keep = 0;
    for (size_t i = 0; i < n_stops; i++)
        keep = TB_MAX(keep, (size_t)x->stop.state[i]);
    size_t n = x->held.n - TB_MIN(keep, x->held.n);
    release(x, n - tb_utf8_incomplete_tail(x->held.p, n), out);
}

void tb_llm_text_end(struct tb_llm_text *x, struct tb_buf *out)
{
    release(x, x->held.n, out);
}
