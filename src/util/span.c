/*
 * Comparison and integer parsing of spans (see span.h). Pure functions; any thread.
 */
#include "util/span.h"

/* tolower() depends on the locale; HTTP's comparisons do not. */
static inline unsigned char lower(char c)
{
    unsigned char u = (unsigned char)c;
    return u >= 'A' && u <= 'Z' ? (unsigned char)(u | 0x20) : u;
}

bool tb_span_ieq(struct tb_span a, const char *s)
{
    size_t i = 0;
    for (; i < a.n && s[i]; i++) {
        if (lower(a.p[i]) != lower(s[i])) return false;
    }
    return i == a.n && s[i] == '\0';
}

bool tb_span_starts(struct tb_span a, const char *prefix)
{
    size_t n = strlen(prefix);
    return a.n >= n && (n == 0 || memcmp(a.p, prefix, n) == 0);
}

bool tb_span_icontains(struct tb_span a, const char *needle)
{
    size_t n = strlen(needle);
    if (n == 0) return true;
    for (size_t i = 0; i + n <= a.n; i++) {
        size_t k = 0;
        while (k < n && lower(a.p[i + k]) == lower(needle[k]))
            k++;
        if (k == n) return true;
    }
    return false;
}

bool tb_span_u64(struct tb_span a, uint64_t *out)
{
    uint64_t v = 0;
    if (a.n == 0) return false;
    for (size_t i = 0; i < a.n; i++) {
        if (a.p[i] < '0' || a.p[i] > '9') return false;
        if (__builtin_mul_overflow(v, (uint64_t)10, &v) ||
            __builtin_add_overflow(v, (uint64_t)(a.p[i] - '0'), &v)) {
            return false;
        }
    }
    *out = v;
    return true;
}

bool tb_span_i64(struct tb_span a, int64_t *out)
{
    bool neg = a.n > 0 && a.p[0] == '-';
    uint64_t v;
    if (neg) a = (struct tb_span){a.p + 1, a.n - 1};
    if (!tb_span_u64(a, &v)) return false;
    if (v > (uint64_t)INT64_MAX + (neg ? 1 : 0)) return false;
    *out = neg ? (int64_t)(0 - v) : (int64_t)v;
    return true;
}
