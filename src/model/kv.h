/*
 * The pool of KV pages: 16 tokens of keys and values of every layer each, counted references, so
 * that samples of one prompt share its pages. The memory is taken at the first use.
 *
 * Owner: the model. Thread: the model's.
 */
#ifndef TB_MODEL_KV_H
#define TB_MODEL_KV_H

#include <stddef.h>
#include <stdint.h>

#include "util/error.h"

struct tb_model;

struct tb_kv {
    int n_pages, n_free;
    size_t page_bytes; /* of one layer */
    size_t bytes;      /* of all layers and pages */
    char *mem;         /* [n_layers][n_pages][page_bytes]; NULL until tb_kv_ready */
    int32_t *free_list;
    int32_t *refs;
    int64_t n_preempted; /* sequences that were sent away and computed again */
};

void tb_kv_init(struct tb_kv *kv, struct tb_model *m); /* decides n_pages; takes no memory */
void tb_kv_fini(struct tb_kv *kv, struct tb_model *m);
int tb_kv_ready(struct tb_kv *kv, struct tb_model *m, struct tb_error *err);

int32_t tb_kv_take(struct tb_kv *kv); /* a page with one reference, or -1 */
void tb_kv_ref(struct tb_kv *kv, int32_t page);
void tb_kv_unref(struct tb_kv *kv, int32_t page);
void tb_kv_copy_page(struct tb_kv *kv, struct tb_model *m, int32_t dst, int32_t src);
void *tb_kv_layer(const struct tb_kv *kv, int layer);
static inline int tb_kv_pages_for(int64_t tokens)
{
    return (int)((tokens + 15) / 16);
}

#endif
