/*
 * Memory: tb_malloc & co. abort through a hook when a small, fixed allocation fails (as redis and
 * h2o do); tb_try_* return NULL and are for every size that a client, a file or a model decides.
 * Size arithmetic on such sizes goes through tb_mul_size/tb_add_size.
 *
 * Thread: any. Memory is released with tb_free.
 */
#ifndef TB_UTIL_MEM_H
#define TB_UTIL_MEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

void *tb_malloc(size_t n);
void *tb_calloc(size_t n, size_t size);
void *tb_realloc(void *p, size_t n);
char *tb_strdup(const char *s);
char *tb_strndup(const char *s, size_t n);
char *tb_asprintf(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void *tb_try_malloc(size_t n);
void *tb_try_calloc(size_t n, size_t size);
void *tb_try_realloc(void *p, size_t n);
void tb_free(void *p);

/* What this machine has for the process: its memory, or less where a control group says so. */
uint64_t tb_mem_machine(void);

/* Makes the n-th next tb_try_* call fail (0 = never); for tests only. */
void tb_mem_fail_after(long n);

static inline bool tb_mul_size(size_t a, size_t b, size_t *out)
{
    return !__builtin_mul_overflow(a, b, out);
}
static inline bool tb_add_size(size_t a, size_t b, size_t *out)
{
    return !__builtin_add_overflow(a, b, out);
}

#define TB_ARRAY_LEN(a)                    (sizeof(a) / sizeof((a)[0]))
#define TB_CONTAINER_OF(ptr, type, member) ((type *)((char *)(ptr)-offsetof(type, member)))
#define TB_MIN(a, b)                       ((a) < (b) ? (a) : (b))
#define TB_MAX(a, b)                       ((a) > (b) ? (a) : (b))

/* A broken invariant: prints where and aborts. Never for input. */
#define TB_BUG_ON(cond)                                                                            \
    do {                                                                                           \
        if (__builtin_expect(!!(cond), 0)) tb_bug(#cond, __FILE__, __LINE__);                      \
    } while (0)
void tb_bug(const char *what, const char *file, int line) __attribute__((noreturn));

#endif
