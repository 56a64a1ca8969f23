/*
 * Hash map (see map.h): open addressing with linear probing and tombstones, SipHash-1-3 keyed once
 * per process. The map owns the key copies, never the values; one thread at a time (the seed is set
 * once for all threads).
 */
#include "util/map.h"

#include <stdint.h>
#include <string.h>
#include <uv.h>

#include "util/clock.h"
#include "util/mem.h"

struct tb_map_slot {
    char *key; /* NULL = never used; tombstone = deleted */
    size_t key_len;
    uint64_t hash;
    void *value;
};

static char tombstone[1];
static uint64_t seed[2];
static uv_once_t seed_once = UV_ONCE_INIT;

static void seed_make(void)
{
    tb_random_bytes(seed, sizeof(seed));
}

#define ROTL(x, b) (((x) << (b)) | ((x) >> (64 - (b))))
#define SIPROUND                                                                                   \
    do {                                                                                           \
        v0 += v1, v1 = ROTL(v1, 13), v1 ^= v0, v0 = ROTL(v0, 32);                                  \
        v2 += v3, v3 = ROTL(v3, 16), v3 ^= v2;                                                     \
        v0 += v3, v3 = ROTL(v3, 21), v3 ^= v0;                                                     \
        v2 += v1, v1 = ROTL(v1, 17), v1 ^= v2, v2 = ROTL(v2, 32);                                  \
    } while (0)

static uint64_t siphash13(const char *p, size_t n)
{
    uint64_t v0 = seed[0] ^ 0x736f6d6570736575ull, v1 = seed[1] ^ 0x646f72616e646f6dull;
    uint64_t v2 = seed[0] ^ 0x6c7967656e657261ull, v3 = seed[1] ^ 0x7465646279746573ull;
    size_t i = 0;
    uint64_t m;
    for (; i + 8 <= n; i += 8) {
        memcpy(&m, p + i, 8);
        v3 ^= m;
        SIPROUND;
        v0 ^= m;
    }
    m = 0;
    if (n > i) memcpy(&m, p + i, n - i);
    m |= (uint64_t)n << 56;
    v3 ^= m;
    SIPROUND;
    v0 ^= m;
    v2 ^= 0xff;
    SIPROUND;
    SIPROUND;
    SIPROUND;
    return v0 ^ v1 ^ v2 ^ v3;
}

void tb_map_init(struct tb_map *m)
{
    uv_once(&seed_once, seed_make);
    *m = (struct tb_map){0};
}

void tb_map_fini(struct tb_map *m)
{
    if (!m) return;
    for (size_t i = 0; i < m->cap; i++) {
        if (m->slots[i].key != tombstone) tb_free(m->slots[i].key);
    }
    tb_free(m->slots);
    *m = (struct tb_map){0};
}

static struct tb_map_slot *find(const struct tb_map *m, const char *key, size_t key_len, uint64_t h)
{
    if (m->cap == 0) return NULL;
    for (size_t i = h & (m->cap - 1);; i = (i + 1) & (m->cap - 1)) {
        struct tb_map_slot *s = &m->slots[i];
        if (!s->key) return NULL;
        if (s->key != tombstone && s->hash == h && s->key_len == key_len &&
            memcmp(s->key, key, key_len) == 0) {
            return s;
        }
    }
}

/* First free slot of the probe sequence; there is always one. */
static struct tb_map_slot *place(struct tb_map_slot *slots, size_t cap, uint64_t h)
{
    size_t i = h & (cap - 1);
    while (slots[i].key && slots[i].key != tombstone)
        i = (i + 1) & (cap - 1);
    return &slots[i];
}

/* Sized by the live entries, so that a map with much coming and going only sweeps its tombstones.
 */
static void rehash(struct tb_map *m)
{
    size_t cap = 16;
    while (cap / 2 < m->n + 1)
        cap *= 2;
    struct tb_map_slot *slots = tb_calloc(cap, sizeof(*slots));
    for (size_t i = 0; i < m->cap; i++) {
        struct tb_map_slot *s = &m->slots[i];
        if (s->key && s->key != tombstone) *place(slots, cap, s->hash) = *s;
    }
    tb_free(m->slots);
    m->slots = slots;
    m->cap = cap;
    m->used = m->n;
}

void *tb_map_get(const struct tb_map *m, const char *key, size_t key_len)
{
    if (m->n == 0) return NULL;
    const struct tb_map_slot *s = find(m, key, key_len, siphash13(key, key_len));
    return s ? s->value : NULL;
}

void *tb_map_put(struct tb_map *m, const char *key, size_t key_len, void *value)
{
    TB_BUG_ON(!value);
    uv_once(&seed_once, seed_make); /* a zeroed map works too */
    uint64_t h = siphash13(key, key_len);
    struct tb_map_slot *s = find(m, key, key_len, h);
    if (s) {
        void *old = s->value;
        s->value = value;
        return old;
    }
    if ((m->used + 1) * 4 > m->cap * 3) rehash(m);
    s = place(m->slots, m->cap, h);
    if (!s->key) m->used++;
    *s = (struct tb_map_slot){tb_strndup(key, key_len), key_len, h, value};
    m->n++;
    return NULL;
}

void *tb_map_del(struct tb_map *m, const char *key, size_t key_len)
{
    if (m->n == 0) return NULL;
    struct tb_map_slot *s = find(m, key, key_len, siphash13(key, key_len));
    if (!s) return NULL;
    void *old = s->value;
    tb_free(s->key); /* after find: key may be the stored one */
    *s = (struct tb_map_slot){.key = tombstone};
    m->n--;
    return old;
}

bool tb_map_next(const struct tb_map *m, size_t *it, const char **key, size_t *key_len,
                 void **value)
{
    for (; *it < m->cap; (*it)++) {
        const struct tb_map_slot *s = &m->slots[*it];
        if (!s->key || s->key == tombstone) continue;
        if (key) *key = s->key;
        if (key_len) *key_len = s->key_len;
        if (value) *value = s->value;
        (*it)++;
        return true;
    }
    return false;
}
