/*
 * The engine's public side: loads the base models onto a backend, makes the lane, and passes tasks
 * to it. There is one lane a device; today one device. See engine.h and lane.h.
 */
#include "engine/engine.h"

#include <stdio.h>
#include <string.h>

#include "engine/lane.h"
#include "util/clock.h"
#include "util/log.h"
#include "util/mem.h"

struct tb_engine {
    uv_loop_t *loop;
    struct tb_lane *lane;
    char **tokenizers; /* [n_models], entries may be NULL */
    int n_models;
    char describe[200];
    void (*closed_cb)(void *arg);
    void *closed_arg;
};

struct tb_task *tb_task_create(enum tb_task_type type)
{
    struct tb_task *t = tb_calloc(1, sizeof(*t));
    tb_list_init(&t->node);
    t->type = type;
    return t;
}

void tb_task_destroy(struct tb_task *t)
{
    if (!t) return;
    tb_adapter_state_destroy(t->state);
    tb_free(t);
}

struct tb_error *tb_task_error(struct tb_task *t)
{
    return t->op ? &t->op->error : &t->error;
}

int tb_engine_create(struct tb_engine **out, uv_loop_t *loop, const struct tb_engine_options *o,
                     struct tb_error *err)
{
    /* Without --memory a tenth is left to the rest of the machine. */
    uint64_t memory = o->memory ? o->memory : tb_mem_machine() / 10 * 9;
    struct tb_backend_options bo = {.n_threads = o->n_threads, .mem_limit = (size_t)memory};
    struct tb_model_options mo = {.max_rank = o->max_rank,
                                  .max_context = o->max_context,
                                  .kv_bytes = (size_t)memory / 8 / (size_t)TB_MAX(o->n_models, 1)};
    struct tb_backend *be = NULL;
    struct tb_pager *pager = NULL;
    struct tb_model **models = NULL;
    int n = 0, rc;
    struct tb_engine *e = tb_calloc(1, sizeof(*e));

    e->loop = loop;
    e->tokenizers = tb_calloc((size_t)TB_MAX(o->n_models, 1), sizeof(char *));
    models = tb_calloc((size_t)TB_MAX(o->n_models, 1), sizeof(models[0]));
    if ((rc = tb_backend_create(&be, o->backend, o->dtype, &bo, err))) goto fail;
    be->ops->describe(be, e->describe, sizeof(e->describe));
    if (o->paging_dir && (rc = tb_pager_create(&pager, be, o->paging_dir, err))) goto fail;
    mo.pager = pager;
    for (; n < o->n_models; n++) {
        const struct tb_engine_model *m = &o->models[n];
        uint64_t t0 = tb_clock_ms();
        if ((rc = tb_model_load(&models[n], be, m->name, m->dir, &mo, err))) {
            if (rc == TB_ENOMEM)
                tb_error_prefix(err, "the models do not fit into %llu MiB (--memory)",
                                (unsigned long long)memory >> 20);
            goto fail;
        }
        const struct tb_model_info *info = tb_model_info(models[n]);
        tb_log(TB_LOG_INFO, "engine", "loaded model=%s arch=%s weights_mb=%zu ms=%llu", m->name,
               info->arch, info->weight_bytes >> 20, (unsigned long long)(tb_clock_ms() - t0));
        if (m->tokenizer) e->tokenizers[n] = tb_strdup(m->tokenizer);
    }
    e->n_models = n;
    if ((rc = lane_create(&e->lane, loop, be, pager, models, n, err))) goto fail;
    *out = e;
    return 0;

fail:
    for (int i = 0; i < n; i++) {
        tb_model_free(models[i]);
        tb_free(e->tokenizers[i]);
    }
    tb_free(models);
    tb_pager_destroy(pager);
    if (be) be->ops->destroy(be);
    tb_free(e->tokenizers);
    tb_free(e);
    return rc;
}

static void engine_closed(void *arg)
{
    struct tb_engine *e = arg;
    void (*cb)(void *) = e->closed_cb;
    void *cb_arg = e->closed_arg;
    for (int i = 0; i < e->n_models; i++)
        tb_free(e->tokenizers[i]);
    tb_free(e->tokenizers);
    tb_free(e);
    if (cb) cb(cb_arg);
}

void tb_engine_close(struct tb_engine *e, void (*cb)(void *arg), void *arg)
{
    e->closed_cb = cb;
    e->closed_arg = arg;
    lane_close(e->lane, engine_closed, e);
}

int tb_engine_n_models(const struct tb_engine *e)
{
    return e->n_models;
}

const struct tb_model_info *tb_engine_model_info(const struct tb_engine *e, int model)
{
    return tb_model_info(e->lane->models[model]);
}

const char *tb_engine_model_tokenizer(const struct tb_engine *e, int model)
{
    return e->tokenizers[model];
}

int tb_engine_model_find(const struct tb_engine *e, const char *name)
{
    for (int i = 0; i < e->n_models; i++) {
        if (strcmp(tb_engine_model_info(e, i)->name, name) == 0) return i;
    }
    return -1;
}

const char *tb_engine_describe(const struct tb_engine *e)
{
    return e->describe;
}

void tb_engine_submit(struct tb_engine *e, struct tb_task *task)
{
    lane_submit(e->lane, task);
}

void tb_engine_cancel(struct tb_engine *e, struct tb_task *task)
{
    __atomic_store_n(&task->canceled, true, __ATOMIC_RELAXED);
}

void tb_engine_stats(const struct tb_engine *e, struct tb_engine_stats *out)
{
    struct tb_lane *l = e->lane;
    const struct lane_stats *s = &l->stats;
    memset(out, 0, sizeof(*out));
    for (int i = 0; i <= TB_TASK_SAMPLE; i++)
        out->tasks_done[i] = atomic_load_explicit(&s->tasks_done[i], memory_order_relaxed);
    out->train_tokens = atomic_load_explicit(&s->train_tokens, memory_order_relaxed);
    out->sample_rows = atomic_load_explicit(&s->sample_rows, memory_order_relaxed);
    out->steps = atomic_load_explicit(&s->steps, memory_order_relaxed);
    out->busy_us = atomic_load_explicit(&s->busy_us, memory_order_relaxed);
    for (int i = 0; i < TB_N_WORKS; i++) {
        const struct lane_work_stats *w = &s->work[i];
        out->work[i] = (struct tb_work_stats){
            .waiting = atomic_load_explicit(&w->waiting, memory_order_relaxed),
            .running = atomic_load_explicit(&w->running, memory_order_relaxed),
            .begun = atomic_load_explicit(&w->begun, memory_order_relaxed),
            .wait_us = atomic_load_explicit(&w->wait_us, memory_order_relaxed),
            .wait_us_max = atomic_load_explicit(&w->wait_us_max, memory_order_relaxed)};
    }
    for (int m = 0; m < e->n_models; m++)
        out->kv.n_pages += (uint64_t)tb_engine_model_info(e, m)->kv_pages_total;
    out->kv.n_free = atomic_load_explicit(&s->kv_free, memory_order_relaxed);
    out->kv.n_cached = atomic_load_explicit(&s->kv_cached, memory_order_relaxed);
    out->kv.n_preempted = atomic_load_explicit(&s->kv_preempted, memory_order_relaxed);
    out->kv.n_lookup_tokens = atomic_load_explicit(&s->lookup_tokens, memory_order_relaxed);
    out->kv.n_hit_tokens = atomic_load_explicit(&s->hit_tokens, memory_order_relaxed);
    uv_mutex_lock(&l->memory_lock);
    out->memory = l->memory;
    uv_mutex_unlock(&l->memory_lock);
}
