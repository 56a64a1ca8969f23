/*
 * Which KV pages hold which tokens: the index by which a sequence finds the pages of a prefix that
 * another one computed. A page is listed under the weights' serial, the tenant, the page before it
 * and its own 16 tokens, all compared in full, so a listed page's whole prefix is what its chain of
 * parents says. This file keeps numbers only; kv.c counts the references (the list holds one per
 * page).
 *
 * A listed page that nobody else holds is idle. Who holds a page holds its parents too, and gives
 * pages back from the last to the first; so the idle pages, in the order in which they became idle,
 * have children before parents, and the oldest is always without children and may be given up.
 *
 * Owner: struct tb_kv. Thread: the model's.
 */
#ifndef TB_MODEL_PREFIX_H
#define TB_MODEL_PREFIX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TB_PREFIX_NONE (-1)

struct tb_prefix_key {
    uint64_t serial; /* of the weights; 0: the base model */
    uint64_t tenant; /* who alone may find it, and so learn that the prompt was there */
    int32_t parent;  /* page before it, or TB_PREFIX_NONE */
    int32_t tokens[16];
};

struct tb_prefix_page {
    struct tb_prefix_key key;
    bool listed, idle;
    int32_t chain;      /* next page of its bucket */
    int32_t next, prev; /* among the idle, towards the newest and the oldest */
};

struct tb_prefix {
    int n, n_idle; /* pages listed, of which idle */
    uint64_t seed; /* of the hash */
    size_t mask;
    int32_t *buckets;             /* [mask + 1] */
    struct tb_prefix_page *pages; /* [n_pages], by page number */
    int32_t oldest, newest;       /* idle page, or TB_PREFIX_NONE */
};

int tb_prefix_init(struct tb_prefix *p, int n_pages); /* TB_ENOMEM leaves nothing behind */
void tb_prefix_fini(struct tb_prefix *p);

int32_t tb_prefix_find(const struct tb_prefix *p, const struct tb_prefix_key *key);
/* Lists a page that is not idle; the key must not be there. */
void tb_prefix_add(struct tb_prefix *p, const struct tb_prefix_key *key, int32_t page);
void tb_prefix_remove(struct tb_prefix *p, int32_t page);
void tb_prefix_set_idle(struct tb_prefix *p, int32_t page, bool idle);
static inline bool tb_prefix_listed(const struct tb_prefix *p, int32_t page)
{
    return p->pages[page].listed;
}

#endif
