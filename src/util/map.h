/*
 * Hash map from a byte string (copied) to a pointer (borrowed). Keys are hashed with a per-process
 * random seed (SipHash-1-3), so that clients cannot choose collisions.
 *
 * Owner: the caller; values are never freed by the map. Thread: one at a time.
 */
#ifndef TB_UTIL_MAP_H
#define TB_UTIL_MAP_H

#include <stdbool.h>
#include <stddef.h>

struct tb_map_slot;
struct tb_map {
    struct tb_map_slot *slots;
    size_t n, cap, used; /* live entries, slots, live + deleted */
};

void tb_map_init(struct tb_map *m);
void tb_map_fini(struct tb_map *m);
void *tb_map_get(const struct tb_map *m, const char *key, size_t key_len); /* NULL if absent */
/* Sets and returns the old value (NULL if new). value must not be NULL. */
void *tb_map_put(struct tb_map *m, const char *key, size_t key_len, void *value);
void *tb_map_del(struct tb_map *m, const char *key, size_t key_len); /* returns the old value */
/* Iteration in unspecified order; *it starts at 0; the entry just returned may be deleted. */
bool tb_map_next(const struct tb_map *m, size_t *it, const char **key, size_t *key_len,
                 void **value);

#endif
