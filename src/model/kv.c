/*
 * KV page pool; see kv.h.
 *
 * Owner: the model. Thread: the model's.
 */
#include "model/kv.h"

#include "model/internal.h"
#include "util/mem.h"

static struct tb_attn_shape shape_of(const struct tb_model *m)
{
    const struct tb_model_config *c = &m->cfg;
    return (struct tb_attn_shape){c->n_heads, c->n_kv_heads, c->head_dim, 1, 0};
}

void tb_kv_init(struct tb_kv *kv, struct tb_model *m)
{
    struct tb_attn_shape s = shape_of(m);
    kv->page_bytes = m->be->ops->kv_page_bytes(m->be, &s);
    size_t all = kv->page_bytes * (size_t)m->cfg.n_layers;
    size_t bytes = m->opt.kv_bytes;
    if (!bytes) { /* an eighth of the memory, at most 2 GiB, no more than 64 full contexts need */
        bytes = TB_MIN(tb_model_memory(m) / 8, (size_t)2 << 30);
        size_t full = (size_t)tb_kv_pages_for(m->opt.max_context) * 64;
        if (bytes / all > full) bytes = full * all;
    }
    kv->n_pages = (int)TB_MIN(TB_MAX(bytes / all, 1), (size_t)INT32_MAX);
    kv->bytes = (size_t)kv->n_pages * all;
}

int tb_kv_ready(struct tb_kv *kv, struct tb_model *m, struct tb_error *err)
{
    if (kv->mem) return 0;
    size_t n = (size_t)kv->n_pages;
    int32_t *list = tb_try_calloc(n, sizeof(*list)), *refs = tb_try_calloc(n, sizeof(*refs));
    char *mem = list && refs ? m->be->ops->alloc(m->be, kv->bytes) : NULL;
    if (!mem) {
        tb_free(list);
        tb_free(refs);
        return tb_error_set(err, TB_ENOMEM, "no memory for %zu MiB of KV pages", kv->bytes >> 20);
    }
    for (size_t i = 0; i < n; i++)
        list[i] = (int32_t)(n - 1 - i);
    kv->free_list = list;
    kv->refs = refs;
    kv->mem = mem;
    kv->n_free = kv->n_pages;
    return 0;
}

void tb_kv_fini(struct tb_kv *kv, struct tb_model *m)
{
    if (kv->mem) m->be->ops->free(m->be, kv->mem, kv->bytes);
    tb_free(kv->free_list);
    tb_free(kv->refs);
    *kv = (struct tb_kv){0};
}

int32_t tb_kv_take(struct tb_kv *kv)
{
    if (kv->n_free == 0) return -1;
    int32_t page = kv->free_list[--kv->n_free];
    TB_BUG_ON(kv->refs[page] != 0);
    kv->refs[page] = 1;
    return page;
}

void tb_kv_ref(struct tb_kv *kv, int32_t page)
{
    TB_BUG_ON(kv->refs[page] <= 0);
    kv->refs[page]++;
}

void tb_kv_unref(struct tb_kv *kv, int32_t page)
{
    TB_BUG_ON(kv->refs[page] <= 0);
    if (--kv->refs[page] == 0) kv->free_list[kv->n_free++] = page;
}

void *tb_kv_layer(const struct tb_kv *kv, int layer)
{
    return kv->mem + (size_t)layer * (size_t)kv->n_pages * kv->page_bytes;
}

void tb_kv_copy_page(struct tb_kv *kv, struct tb_model *m, int32_t dst, int32_t src)
{
    for (int l = 0; l < m->cfg.n_layers; l++) {
        char *base = tb_kv_layer(kv, l);
        m->be->ops->copy(m->be, base + (size_t)dst * kv->page_bytes,
                         base + (size_t)src * kv->page_bytes, kv->page_bytes);
    }
}
