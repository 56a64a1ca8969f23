/*
 * Bump arena (see arena.h). The arena owns every block; whoever owns the arena may call, one thread
 * at a time.
 */
#include "util/arena.h"

#include <stdarg.h>
#include <stdio.h>

#include "util/mem.h"

#if defined(__SANITIZE_ADDRESS__)
#    define ARENA_ASAN 1
#elif defined(__has_feature)
#    if __has_feature(address_sanitizer)
#        define ARENA_ASAN 1
#    endif
#endif
#ifdef ARENA_ASAN
#    include <sanitizer/asan_interface.h>
#    define POISON(p, n)   ASAN_POISON_MEMORY_REGION(p, n)
#    define UNPOISON(p, n) ASAN_UNPOISON_MEMORY_REGION(p, n)
enum { REDZONE = 16 };
#else
#    define POISON(p, n)   ((void)(p))
#    define UNPOISON(p, n) ((void)(p))
enum { REDZONE = 0 };
#endif

enum { ALIGN = 16, FIRST_BLOCK = 512, LAST_BLOCK = 256 * 1024 };

struct tb_arena_block {
    struct tb_arena_block *next;
    size_t size; /* of the whole block, header included */
} __attribute__((aligned(ALIGN)));

void tb_arena_init(struct tb_arena *a)
{
    *a = (struct tb_arena){0};
}

void tb_arena_fini(struct tb_arena *a)
{
    for (struct tb_arena_block *b = a->head, *next; b; b = next) {
        next = b->next;
        UNPOISON(b, b->size);
        tb_free(b);
    }
    *a = (struct tb_arena){0};
}

/* `need` is rounded and holds the redzone. A request that would waste most of a block goes into a
 * block of its own behind the current one, so that small requests keep filling the current one. */
static char *alloc_slow(struct tb_arena *a, size_t need, bool may_fail)
{
    size_t block = a->total < FIRST_BLOCK ? FIRST_BLOCK : TB_MIN(a->total, (size_t)LAST_BLOCK);
    block = (block + ALIGN - 1) & ~(size_t)(ALIGN - 1);
    bool own = need > (block - sizeof(struct tb_arena_block)) / 2;
    size_t size = block;
    if (own && !tb_add_size(need, sizeof(struct tb_arena_block), &size)) {
        TB_BUG_ON(!may_fail);
        return NULL;
    }
    struct tb_arena_block *b = may_fail ? tb_try_malloc(size) : tb_malloc(size);
    if (!b) return NULL;
    b->size = size;
    a->total += size;
    char *p = (char *)(b + 1);
    POISON(p, size - sizeof(*b));
    if (own && a->head) {
        b->next = a->head->next;
        a->head->next = b;
        return p;
    }
    b->next = a->head;
    a->head = b;
    a->cur = p + need;
    a->end = (char *)b + size;
    return p;
}

static void *alloc(struct tb_arena *a, size_t n, bool may_fail)
{
    size_t need;
    if (!tb_add_size(n ? n : 1, REDZONE + ALIGN - 1, &need)) {
        TB_BUG_ON(!may_fail);
        return NULL;
    }
    need &= ~(size_t)(ALIGN - 1);
    char *p;
    if (a->cur && (size_t)(a->end - a->cur) >= need) {
        p = a->cur;
        a->cur += need;
    } else {
        p = alloc_slow(a, need, may_fail);
        if (!p) return NULL;
    }
    UNPOISON(p, n ? n : 1);
    return p;
}

void *tb_arena_alloc(struct tb_arena *a, size_t n)
{
    return alloc(a, n, false);
}

void *tb_arena_try_alloc(struct tb_arena *a, size_t n)
{
    return alloc(a, n, true);
}

void *tb_arena_calloc(struct tb_arena *a, size_t n, size_t size)
{
    size_t bytes;
    TB_BUG_ON(!tb_mul_size(n, size, &bytes));
    void *p = alloc(a, bytes, false);
    memset(p, 0, bytes);
    return p;
}

void *tb_arena_try_array(struct tb_arena *a, size_t n, size_t size)
{
    size_t bytes;
    return tb_mul_size(n, size, &bytes) ? alloc(a, bytes, true) : NULL;
}

char *tb_arena_strndup(struct tb_arena *a, const char *s, size_t n)
{
    char *p = alloc(a, n + 1, false);
    if (n) memcpy(p, s, n);
    p[n] = '\0';
    return p;
}

char *tb_arena_strdup(struct tb_arena *a, const char *s)
{
    return tb_arena_strndup(a, s, strlen(s));
}

char *tb_arena_printf(struct tb_arena *a, const char *fmt, ...)
{
    va_list ap, again;
    TB_BUG_ON(!fmt);
    va_start(ap, fmt);
    va_copy(again, ap);
    int n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    TB_BUG_ON(n < 0);
    char *p = alloc(a, (size_t)n + 1, false);
    vsnprintf(p, (size_t)n + 1, fmt, again);
    va_end(again);
    return p;
}
