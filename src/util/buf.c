/*
 * Bounded byte buffer (see buf.h). The buffer owns its memory until tb_buf_steal; one thread at a
 * time.
 */
#include "util/buf.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "util/error.h"
#include "util/mem.h"

void tb_buf_init(struct tb_buf *b, size_t max)
{
    *b = (struct tb_buf){.max = max};
}

void tb_buf_fini(struct tb_buf *b)
{
    if (!b) return;
    tb_free(b->p);
    b->p = NULL;
    b->n = b->cap = 0;
    b->failed = false;
}

void tb_buf_reset(struct tb_buf *b)
{
    b->n = 0;
    b->failed = false;
    if (b->p) b->p[0] = '\0';
}

int tb_buf_reserve(struct tb_buf *b, size_t extra)
{
    size_t want;
    if (!tb_add_size(b->n, extra, &want) || want > b->max || want == SIZE_MAX) {
        b->failed = true;
        return TB_ETOOBIG;
    }
    want++; /* the NUL */
    if (want <= b->cap) return 0;
    /* Doubling, but never beyond the maximum. */
    size_t cap = b->cap ? b->cap : 64;
    while (cap < want)
        cap = cap > SIZE_MAX / 2 ? want : cap * 2;
    if (b->max < SIZE_MAX && cap > b->max + 1) cap = b->max + 1;
    char *p = tb_try_realloc(b->p, cap);
    if (!p) {
        b->failed = true;
        return TB_ENOMEM;
    }
    b->p = p;
    b->cap = cap;
    return 0;
}

int tb_buf_append(struct tb_buf *b, const void *p, size_t n)
{
    if (b->failed) return TB_ETOOBIG;
    int rc = tb_buf_reserve(b, n);
    if (rc) return rc;
    if (n) memcpy(b->p + b->n, p, n);
    b->n += n;
    b->p[b->n] = '\0';
    return 0;
}

int tb_buf_puts(struct tb_buf *b, const char *s)
{
    return tb_buf_append(b, s, strlen(s));
}

int tb_buf_printf(struct tb_buf *b, const char *fmt, ...)
{
    if (b->failed) return TB_ETOOBIG;
    va_list ap, again;
    va_start(ap, fmt);
    va_copy(again, ap);
    size_t room = b->cap > b->n ? b->cap - b->n : 0;
    int n = vsnprintf(room ? b->p + b->n : NULL, room, fmt, ap);
    va_end(ap);
    int rc = n < 0 ? TB_EINVAL : 0;
    if (n < 0) b->failed = true;
    if (rc == 0 && ((size_t)n >= room || b->n + (size_t)n > b->max)) {
        rc = tb_buf_reserve(b, (size_t)n);
        if (rc == 0) vsnprintf(b->p + b->n, (size_t)n + 1, fmt, again);
    }
    va_end(again);
    if (rc == 0) b->n += (size_t)n;
    if (b->p) b->p[b->n] = '\0'; /* also after a failed attempt that wrote a part */
    return rc;
}

char *tb_buf_steal(struct tb_buf *b, size_t *n)
{
    char *p = b->p;
    if (n) *n = b->failed ? 0 : b->n;
    if (b->failed) {
        tb_free(p);
        p = NULL;
    } else if (!p) {
        p = tb_calloc(1, 1); /* nothing appended: the empty string */
    }
    b->p = NULL;
    b->n = b->cap = 0;
    b->failed = false;
    return p;
}
