/*
 * The normalizer: NFC, Prepend, Replace, in the file's order (encoder.h). Thread: any.
 */
#include <string.h>
#include <utf8proc.h>

#include "tokenizer/encoder.h"
#include "util/mem.h"

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

int tb_normal_replace(struct tb_span s, const char *from, const char *to, struct tb_buf *out)
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

int tb_normalize(const struct tb_encoder *c, struct tb_span *s, struct tb_buf work[2])
{
    bool composed = true; /* below U+0300 every character is its own NFC */
    for (size_t i = 0; i < s->n && composed; i++)
        composed = (unsigned char)s->p[i] < 0xCC;
    for (size_t i = 0; i < c->n_steps && s->n; i++) {
        const struct tb_normal_step *step = &c->steps[i];
        struct tb_buf *to = s->p == work[0].p ? &work[1] : &work[0];
        int rc = 0;
        if (step->kind == STEP_NFC && composed) continue;
        tb_buf_reset(to);
        if (step->kind == STEP_NFC) {
            rc = compose(*s, to);
        } else if (step->kind == STEP_REPLACE) {
            rc = tb_normal_replace(*s, step->from, step->to, to);
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
