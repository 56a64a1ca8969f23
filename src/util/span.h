/*
 * A borrowed run of bytes, not NUL-terminated. Whoever made it says how long it lives.
 * Thread: any.
 */
#ifndef TB_UTIL_SPAN_H
#define TB_UTIL_SPAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct tb_span {
    const char *p;
    size_t n;
};

#define TB_SPAN_LIT(s) ((struct tb_span){(s), sizeof(s) - 1})

static inline struct tb_span tb_span_str(const char *s)
{
    return (struct tb_span){s, s ? strlen(s) : 0};
}
static inline bool tb_span_eq(struct tb_span a, const char *s)
{
    size_t n = strlen(s);
    return a.n == n && (n == 0 || memcmp(a.p, s, n) == 0);
}
bool tb_span_ieq(struct tb_span a, const char *s); /* ASCII case-insensitive */
bool tb_span_starts(struct tb_span a, const char *prefix);
/* Substring search, ASCII case-insensitive; for header values such as Accept. */
bool tb_span_icontains(struct tb_span a, const char *needle);
/* The whole span as a decimal integer, without sign, spaces or overflow. */
bool tb_span_u64(struct tb_span a, uint64_t *out);
bool tb_span_i64(struct tb_span a, int64_t *out); /* with an optional '-' */

#endif
