/*
 * Copies of adapters in host memory, on their way between the engine and checkpoints. They have a
 * limit of the size that requests and results have each; what would pass it waits, in order. One
 * alone always goes.
 *
 * Owner: a copy is part of what waits for it. Thread: the loop's.
 */
#include "core/core_internal.h"

int64_t tb_core_lora_width(const struct tb_model_info *m)
{
    int64_t h = m->hidden, q = (int64_t)m->n_heads * m->head_dim;
    int64_t kv = (int64_t)m->n_kv_heads * m->head_dim;
    int64_t layer = 2 * (h + q) + 2 * (h + kv) + 3 * (h + m->ffn);
    return m->n_layers * layer + h + m->vocab;
}

size_t tb_copy_bytes(const struct tb_core *c, int engine_model, int32_t rank, bool with_optimizer)
{
    int64_t n = tb_core_lora_width(tb_engine_model_info(c->engine, engine_model)) * rank;
    return (size_t)n * sizeof(float) * (with_optimizer ? 3 : 1);
}

static bool fits(const struct tb_core *c, size_t bytes)
{
    size_t max = c->o.max_queued_bytes;
    return !c->copy_bytes || (bytes <= max && c->copy_bytes <= max - bytes);
}

static void take(struct tb_core *c, struct tb_core_copy *y)
{
    y->taken = true;
    c->copy_bytes += y->bytes;
}

bool tb_copy_begin(struct tb_core *c, struct tb_core_copy *y, size_t bytes,
                   void (*go)(struct tb_core_copy *y))
{
    if (y->taken) return true;
    if (y->go) return false; /* waits already */
    y->bytes = bytes;
    y->go = go;
    tb_list_init(&y->node);
    if (tb_list_empty(&c->copies) && fits(c, bytes))
        take(c, y);
    else
        tb_list_push(&c->copies, &y->node);
    return y->taken;
}

void tb_copy_end(struct tb_core *c, struct tb_core_copy *y)
{
    if (!y->go) return;
    if (y->taken) c->copy_bytes -= y->bytes;
    tb_list_del(&y->node);
    *y = (struct tb_core_copy){0};
}

bool tb_copies_go(struct tb_core *c)
{
    if (tb_list_empty(&c->copies)) return false;
    struct tb_core_copy *y = TB_LIST_ENTRY(c->copies.next, struct tb_core_copy, node);
    if (!fits(c, y->bytes)) return false;
    tb_list_del(&y->node);
    take(c, y);
    y->go(y);
    return true;
}
