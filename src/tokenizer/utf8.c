/*
 * UTF-8 at the edges of tokens: what is incomplete, what is invalid. Well-formedness is that of the
 * Unicode standard's table 3-7, so overlong forms, surrogates and anything above U+10FFFF are
 * invalid.
 *
 * Owns: nothing. Thread: any.
 */
#include "tokenizer/tokenizer.h"

/* Examines the sequence at p (n > 0). Returns its length, and in *state: 0 complete, 1 cut short by
 * the end of the text but right so far, 2 invalid (the length is then that of the maximal invalid
 * prefix). */
static size_t sequence(const unsigned char *p, size_t n, int *state)
{
    unsigned lo = 0x80, hi = 0xBF;
    size_t len;
    *state = 0;
    if (p[0] < 0x80) return 1;
    if (p[0] >= 0xC2 && p[0] <= 0xDF) {
        len = 2;
    } else if (p[0] >= 0xE0 && p[0] <= 0xEF) {
        len = 3;
        if (p[0] == 0xE0) lo = 0xA0;
        if (p[0] == 0xED) hi = 0x9F;
    } else if (p[0] >= 0xF0 && p[0] <= 0xF4) {
        len = 4;
        if (p[0] == 0xF0) lo = 0x90;
        if (p[0] == 0xF4) hi = 0x8F;
    } else {
        *state = 2;
        return 1;
    }
    for (size_t i = 1; i < len; i++) {
        if (i == n) {
            *state = 1;
            return n;
        }
        if (p[i] < lo || p[i] > hi) {
            *state = 2;
            return i;
        }
        lo = 0x80;
        hi = 0xBF;
    }
    return len;
}

size_t tb_utf8_incomplete_tail(const char *p, size_t n)
{
    const unsigned char *u = (const unsigned char *)p;
    for (size_t back = 1; back <= 3 && back <= n; back++) {
        int state;
        if ((u[n - back] & 0xC0) == 0x80) continue;
        return sequence(u + n - back, back, &state) == back && state == 1 ? back : 0;
    }
    return 0;
}

size_t tb_utf8_characters(const char *p, size_t n)
{
    size_t count = 0;
    for (size_t i = 0; i < n; i++)
        count += ((unsigned char)p[i] & 0xc0) != 0x80;
    return count;
}

bool tb_utf8_valid(const char *p, size_t n)
{
    const unsigned char *u = (const unsigned char *)p;
    int state = 0;
    for (size_t i = 0; i < n && state == 0;)
        i += sequence(u + i, n - i, &state);
    return state == 0;
}

int tb_utf8_append(struct tb_buf *out, const char *p, size_t n)
{
    const unsigned char *u = (const unsigned char *)p;
    size_t start = 0, i = 0;
    int rc;
    while (i < n) {
        int state;
        size_t len = sequence(u + i, n - i, &state);
        if (state) {
            if ((rc = tb_buf_append(out, p + start, i - start))) return rc;
            if ((rc = tb_buf_append(out, "\xEF\xBF\xBD", 3))) return rc;
            start = i + len;
        }
        i += len;
    }
    return start < n ? tb_buf_append(out, p + start, n - start) : 0;
}
