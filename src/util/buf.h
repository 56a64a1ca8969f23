/*
 * A growing byte buffer with a mandatory maximum (curl's dynbuf): it cannot grow without bound.
 * Once an append fails the buffer is marked failed and further appends fail too, so that a writer
 * may check once at the end.
 *
 * Owner: the caller. Thread: one at a time.
 */
#ifndef TB_UTIL_BUF_H
#define TB_UTIL_BUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct tb_buf {
    char *p; /* always NUL-terminated after the first append */
    size_t n, cap, max;
    bool failed;
};

void tb_buf_init(struct tb_buf *b, size_t max);
void tb_buf_fini(struct tb_buf *b);
void tb_buf_reset(struct tb_buf *b);                          /* n = 0, keeps the memory */
int tb_buf_append(struct tb_buf *b, const void *p, size_t n); /* 0, TB_ETOOBIG or TB_ENOMEM */
int tb_buf_puts(struct tb_buf *b, const char *s);
int tb_buf_printf(struct tb_buf *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
int tb_buf_reserve(struct tb_buf *b, size_t extra); /* room for extra more bytes */
/* Hands the memory to the caller (tb_free) and leaves the buffer empty. */
char *tb_buf_steal(struct tb_buf *b, size_t *n);

#endif
