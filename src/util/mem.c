/*
 * Allocation (see mem.h). Memory belongs to the caller; any thread.
 */
#include "util/mem.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <uv.h>

static atomic_long fail_after; /* tb_try_* calls until one fails; 0 = off */

void tb_bug(const char *what, const char *file, int line)
{
    fprintf(stderr, "tinkerbell: bug at %s:%d: %s\n", file, line, what);
    abort();
}

static void *die(size_t n)
{
    fprintf(stderr, "tinkerbell: out of memory allocating %zu bytes\n", n);
    abort();
}

static bool must_fail(void)
{
    /* The common case costs one relaxed load. */
    if (__builtin_expect(atomic_load_explicit(&fail_after, memory_order_relaxed) == 0, 1)) {
        return false;
    }
    long left = atomic_fetch_sub(&fail_after, 1);
    if (left > 1) return false;
    atomic_store(&fail_after, 0);
    return left == 1;
}

void tb_mem_fail_after(long n)
{
    atomic_store(&fail_after, n > 0 ? n : 0);
}

/* Sizes beyond PTRDIFF_MAX are refused here: sanitizers report them instead of returning NULL. */
void *tb_try_malloc(size_t n)
{
    return must_fail() || n > PTRDIFF_MAX ? NULL : malloc(n ? n : 1);
}

void *tb_try_calloc(size_t n, size_t size)
{
    size_t bytes;
    if (must_fail() || !tb_mul_size(n, size, &bytes) || bytes > PTRDIFF_MAX) return NULL;
    return bytes ? calloc(n, size) : calloc(1, 1);
}

void *tb_try_realloc(void *p, size_t n)
{
    return must_fail() || n > PTRDIFF_MAX ? NULL : realloc(p, n ? n : 1);
}

void *tb_malloc(size_t n)
{
    void *p = malloc(n ? n : 1);
    return p ? p : die(n);
}

void *tb_calloc(size_t n, size_t size)
{
    void *p = n && size ? calloc(n, size) : calloc(1, 1);
    return p ? p : die(n);
}

void *tb_realloc(void *p, size_t n)
{
    void *q = realloc(p, n ? n : 1);
    return q ? q : die(n);
}

void tb_free(void *p)
{
    free(p);
}

char *tb_strndup(const char *s, size_t n)
{
    char *p = tb_malloc(n + 1);
    if (n) memcpy(p, s, n);
    p[n] = '\0';
    return p;
}

char *tb_strdup(const char *s)
{
    return tb_strndup(s, strlen(s));
}

char *tb_asprintf(const char *fmt, ...)
{
    va_list ap, again;
    va_start(ap, fmt);
    va_copy(again, ap);
    int n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    TB_BUG_ON(n < 0);
    char *p = tb_malloc((size_t)n + 1);
    vsnprintf(p, (size_t)n + 1, fmt, again);
    va_end(again);
    return p;
}

static uint64_t read_number(const char *path)
{
    char line[32], *end = line;
    unsigned long long v = 0;
    FILE *f = fopen(path, "re");
    if (!f) return UINT64_MAX;
    if (fgets(line, sizeof(line), f)) v = strtoull(line, &end, 10);
    fclose(f);
    return end == line ? UINT64_MAX : v; /* "max" is no number */
}

uint64_t tb_mem_machine(void)
{
    uint64_t all = uv_get_total_memory();
    uint64_t v2 = read_number("/sys/fs/cgroup/memory.max");
    uint64_t v1 = read_number("/sys/fs/cgroup/memory/memory.limit_in_bytes");
    return TB_MIN(all, TB_MIN(v1, v2));
}
