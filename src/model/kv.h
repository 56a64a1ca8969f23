/*
 * The pool of KV pages: 16 tokens of keys and values of every layer each, counted references, so
 * that samples of one prompt share its pages. The pool is taken when the model is loaded, so that
 * nothing later can be in its way; the machine gives the memory when a page is first written.
 *
 * A full page may be kept after its sequences are gone, for those to come that begin with the same
 * tokens under the same weights (prefix.h). Keys and values of a token are the same bits however
 * they were computed, so using a kept page changes no result. Kept pages that nobody uses count as
 * room: tb_kv_take gives up the one unused for longest when none is free.
 *
 * Owner: the model. Thread: the model's.
 */
#ifndef TB_MODEL_KV_H
#define TB_MODEL_KV_H

#include <stddef.h>
#include <stdint.h>

#include "backend/backend.h"
#include "model/prefix.h"
#include "util/error.h"

struct tb_model;

/* So that the number of a token's place in the pool is an int too. */
#define TB_KV_MAX_PAGES (INT32_MAX / TB_KV_PAGE)

struct tb_kv {
    int n_pages, n_free;
    size_t page_bytes; /* of one layer */
    size_t bytes;      /* of all layers and pages */
    char *mem;         /* [n_layers][n_pages][page_bytes] */
    int32_t *free_list;
    int32_t *refs;
    int64_t n_preempted;                   /* sequences that were sent away and computed again */
    int64_t n_lookup_tokens, n_hit_tokens; /* of prompts; of these found in kept pages */
    struct tb_prefix prefix;
    bool no_reuse; /* neither keep nor find pages: what they hold cannot be trusted */
};

int tb_kv_init(struct tb_kv *kv, struct tb_model *m, struct tb_error *err);
void tb_kv_fini(struct tb_kv *kv, struct tb_model *m);

int32_t tb_kv_take(struct tb_kv *kv); /* a page with one reference, or -1 */
void tb_kv_ref(struct tb_kv *kv, int32_t page);
void tb_kv_unref(struct tb_kv *kv, int32_t page);
/* The kept page of this key with one more reference, or -1. */
int32_t tb_kv_find(struct tb_kv *kv, const struct tb_prefix_key *key);
/* Keeps a full page of which the caller has a reference. Returns the page to go on with: this one,
 * or one that was kept before with the same content; the caller's reference moves to it. */
int32_t tb_kv_keep(struct tb_kv *kv, const struct tb_prefix_key *key, int32_t page);
/* Gives up what is kept of these weights; nobody may be using it. */
void tb_kv_forget(struct tb_kv *kv, uint64_t serial);
static inline int tb_kv_room(const struct tb_kv *kv) /* pages that tb_kv_take would give */
{
    return kv->n_free + kv->prefix.n_idle;
}
void tb_kv_copy_page(struct tb_kv *kv, struct tb_model *m, int32_t dst, int32_t src);
void *tb_kv_layer(const struct tb_kv *kv, int layer);
static inline int tb_kv_pages_for(int64_t tokens)
{
    return (int)((tokens + TB_KV_PAGE - 1) / TB_KV_PAGE);
}

#endif
