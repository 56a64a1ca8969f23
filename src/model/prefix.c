/*
 * The index of cached KV pages; see prefix.h.
 *
 * Owner: struct tb_kv. Thread: the model's.
 */
#include "model/prefix.h"

#include <string.h>

#include "util/clock.h"
#include "util/error.h"
#include "util/mem.h"

int tb_prefix_init(struct tb_prefix *p, int n_pages)
{
    size_t n = 16;
    while (n < (size_t)n_pages)
        n *= 2;
    *p = (struct tb_prefix){.mask = n - 1, .seed = tb_random_u64()};
    p->oldest = p->newest = TB_PREFIX_NONE;
    p->buckets = tb_try_malloc(n * sizeof(*p->buckets));
    p->pages = tb_try_calloc((size_t)n_pages, sizeof(*p->pages));
    if (!p->buckets || !p->pages) {
        tb_prefix_fini(p);
        return TB_ENOMEM;
    }
    for (size_t i = 0; i < n; i++)
        p->buckets[i] = TB_PREFIX_NONE;
    return 0;
}

void tb_prefix_fini(struct tb_prefix *p)
{
    tb_free(p->buckets);
    tb_free(p->pages);
    *p = (struct tb_prefix){0};
}

static uint64_t mix(uint64_t h, uint64_t v)
{
    h = (h ^ v) * 0x9e3779b97f4a7c15u;
    return h ^ h >> 32;
}

static int32_t *bucket(const struct tb_prefix *p, const struct tb_prefix_key *key)
{
    uint64_t h = mix(mix(mix(p->seed, key->serial), key->tenant), (uint32_t)key->parent);
    for (int i = 0; i < 16; i += 2)
        h = mix(h, (uint64_t)(uint32_t)key->tokens[i] << 32 | (uint32_t)key->tokens[i + 1]);
    return &p->buckets[h & p->mask];
}

int32_t tb_prefix_find(const struct tb_prefix *p, const struct tb_prefix_key *key)
{
    int32_t at = *bucket(p, key);
    for (; at != TB_PREFIX_NONE; at = p->pages[at].chain) {
        const struct tb_prefix_key *k = &p->pages[at].key;
        if (k->serial == key->serial && k->tenant == key->tenant && k->parent == key->parent &&
            !memcmp(k->tokens, key->tokens, sizeof(k->tokens)))
            break;
    }
    return at;
}

void tb_prefix_add(struct tb_prefix *p, const struct tb_prefix_key *key, int32_t page)
{
    struct tb_prefix_page *e = &p->pages[page];
    int32_t *head = bucket(p, key);
    TB_BUG_ON(e->listed);
    *e = (struct tb_prefix_page){.key = *key, .listed = true, .chain = *head};
    *head = page;
    p->n++;
}

void tb_prefix_set_idle(struct tb_prefix *p, int32_t page, bool idle)
{
    struct tb_prefix_page *e = &p->pages[page];
    TB_BUG_ON(!e->listed || e->idle == idle);
    e->idle = idle;
    if (idle) {
        e->prev = p->newest;
        e->next = TB_PREFIX_NONE;
        *(p->newest == TB_PREFIX_NONE ? &p->oldest : &p->pages[p->newest].next) = page;
        p->newest = page;
        p->n_idle++;
        return;
    }
    *(e->prev == TB_PREFIX_NONE ? &p->oldest : &p->pages[e->prev].next) = e->next;
    *(e->next == TB_PREFIX_NONE ? &p->newest : &p->pages[e->next].prev) = e->prev;
    p->n_idle--;
}

void tb_prefix_remove(struct tb_prefix *p, int32_t page)
{
    struct tb_prefix_page *e = &p->pages[page];
    int32_t *at = bucket(p, &e->key);
    if (e->idle) tb_prefix_set_idle(p, page, false);
    while (*at != page)
        at = &p->pages[*at].chain;
    *at = e->chain;
    e->listed = false;
    p->n--;
}
