/*
 * Bump arena: a request's or an op's memory, freed in one go. Blocks grow from 4 KiB; a request
 * larger than a block gets a block of its own. The bytes beyond what was handed out are poisoned
 * under ASan.
 *
 * Owner: whoever owns the request or op; it moves with it from thread to thread and is never
 * shared.
 */
#ifndef TB_UTIL_ARENA_H
#define TB_UTIL_ARENA_H

#include <stddef.h>

#include "util/span.h"

struct tb_arena_block;
struct tb_arena {
    struct tb_arena_block *head;
    char *cur, *end;
    size_t total; /* bytes held in blocks */
};

void tb_arena_init(struct tb_arena *a);
void tb_arena_fini(
    struct tb_arena *a); /* frees all; accepts a zeroed arena; may be used again after */
/* 16-byte aligned, uninitialised. tb_arena_alloc aborts when memory is out (small, fixed sizes);
 * the try_ form returns NULL (sizes that a client decides). n = 0 gives a valid pointer. */
void *tb_arena_alloc(struct tb_arena *a, size_t n);
void *tb_arena_calloc(struct tb_arena *a, size_t n, size_t size); /* aborts */
void *tb_arena_try_alloc(struct tb_arena *a, size_t n);
/* n * size with overflow check; NULL on overflow or when memory is out. */
void *tb_arena_try_array(struct tb_arena *a, size_t n, size_t size);
char *tb_arena_strdup(struct tb_arena *a, const char *s);
char *tb_arena_strndup(struct tb_arena *a, const char *s, size_t n); /* NUL-terminated copy */
char *tb_arena_printf(struct tb_arena *a, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

#endif
