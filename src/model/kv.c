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

static size_t default_pages(const struct tb_model *m, size_t page_bytes)
{
    size_t bytes = tb_model_memory(m) / 8 / (size_t)TB_MAX(m->opt.kv_shares, 1);
    size_t full = (size_t)tb_kv_pages_for(m->opt.max_context) * 64;
    return TB_MAX(TB_MIN(TB_MIN(bytes, m->be->sizes.kv_bytes) / page_bytes, full), 1);
}

static int set_size(struct tb_kv *kv, const struct tb_model *m, struct tb_error *err)
{
    struct tb_attn_shape s = shape_of(m);
    kv->page_bytes = m->be->ops->kv_page_bytes(m->be, &s);
    size_t all = kv->page_bytes * (size_t)m->cfg.n_layers, asked = m->opt.kv_bytes;
    if (asked && asked < all)
        return tb_error_set(err, TB_EINVAL,
                            "%zu bytes of KV cache do not hold a page of %d tokens, which takes "
                            "%zu",
                            asked, TB_KV_PAGE, all);
    size_t n = asked ? asked / all : default_pages(m, all);
    kv->n_pages = (int)TB_MIN(n, (size_t)TB_KV_MAX_PAGES);
    kv->bytes = (size_t)kv->n_pages * all;
    return 0;
}

int tb_kv_init(struct tb_kv *kv, struct tb_model *m, struct tb_error *err)
{
    int rc = set_size(kv, m, err);
    if (rc) return rc;
    size_t n = (size_t)kv->n_pages;
    int32_t *list = tb_try_calloc(n, sizeof(*list)), *refs = tb_try_calloc(n, sizeof(*refs));
    char *mem = list && refs ? m->be->ops->alloc(m->be, kv->bytes) : NULL;
    if (!mem || tb_prefix_init(&kv->prefix, kv->n_pages)) {
        if (mem) m->be->ops->free(m->be, mem, kv->bytes);
        tb_free(list);
        tb_free(refs);
        return tb_backend_no_memory(m->be, err, kv->bytes, "the KV pages");
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
    tb_prefix_fini(&kv->prefix);
    *kv = (struct tb_kv){0};
}

int32_t tb_kv_take(struct tb_kv *kv)
{
    if (kv->n_free == 0) {
        int32_t idle = kv->prefix.n_idle ? kv->prefix.oldest : -1;
        if (idle < 0) return -1;
        tb_prefix_remove(&kv->prefix, idle);
        tb_kv_unref(kv, idle);
    }
    int32_t page = kv->free_list[--kv->n_free];
    TB_BUG_ON(kv->refs[page] != 0);
    kv->refs[page] = 1;
    return page;
}

void tb_kv_ref(struct tb_kv *kv, int32_t page)
{
    TB_BUG_ON(kv->refs[page] <= 0);
    if (kv->refs[page]++ == 1 && tb_prefix_listed(&kv->prefix, page))
        tb_prefix_set_idle(&kv->prefix, page, false);
}

void tb_kv_unref(struct tb_kv *kv, int32_t page)
{
    TB_BUG_ON(kv->refs[page] <= 0);
    if (--kv->refs[page] == 0)
        kv->free_list[kv->n_free++] = page;
    else if (kv->refs[page] == 1 && tb_prefix_listed(&kv->prefix, page))
        tb_prefix_set_idle(&kv->prefix, page, true);
}

int32_t tb_kv_find(struct tb_kv *kv, const struct tb_prefix_key *key)
{
    int32_t page = kv->no_reuse ? -1 : tb_prefix_find(&kv->prefix, key);
    if (page >= 0) tb_kv_ref(kv, page);
    return page;
}

int32_t tb_kv_keep(struct tb_kv *kv, const struct tb_prefix_key *key, int32_t page)
{
    if (kv->no_reuse) return page;
    int32_t same = tb_kv_find(kv, key);
    if (same >= 0) {
        tb_kv_unref(kv, page);
        return same;
    }
    kv->refs[page]++;
    tb_prefix_add(&kv->prefix, key, page);
    return page;
}

void tb_kv_forget(struct tb_kv *kv, uint64_t serial)
{
    for (int32_t i = 0; kv->prefix.n && i < kv->n_pages; i++) {
        if (!tb_prefix_listed(&kv->prefix, i) || kv->prefix.pages[i].key.serial != serial) continue;
        TB_BUG_ON(kv->refs[i] != 1);
        tb_prefix_remove(&kv->prefix, i);
        tb_kv_unref(kv, i);
    }
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

void tb_model_kv_stats(const struct tb_model *m, struct tb_kv_stats *sum)
{
    const struct tb_kv *kv = &m->kv;
    sum->n_pages += (uint64_t)kv->n_pages;
    sum->n_free += (uint64_t)kv->n_free;
    sum->n_cached += (uint64_t)kv->prefix.n_idle;
    sum->n_preempted += (uint64_t)kv->n_preempted;
    sum->n_lookup_tokens += (uint64_t)kv->n_lookup_tokens;
    sum->n_hit_tokens += (uint64_t)kv->n_hit_tokens;
}
