/*
 * The engine's public side: loads the base models onto the devices and makes a lane for each. Which
 * models a device has, and which lane a task goes to, is route.h's. See engine.h and lane.h.
 */
#include "engine/engine.h"

#include <stdio.h>
#include <string.h>

#include "engine/mirror.h"
#include "util/clock.h"
#include "util/log.h"
#include "util/mem.h"

/* Tokens: some seconds of a sample, which a copy of an adapter takes no part of. */
#define MIRROR_TOKENS 2048

struct tb_engine {
    uv_loop_t *loop;
    struct route route;
    int n_lanes, n_open; /* that there are, and that are not closed */
    bool ending;         /* the lanes are */
    char **tokenizers;   /* [n_models], entries may be NULL */
    int n_models;
    char describe[512];
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

/* ---- life */

/* What a lane is made of. */
struct device {
    struct tb_backend *be;
    struct tb_pager *pager;
    struct tb_model **models; /* [n_models], NULL: not on this device */
};

static int open_backend(struct tb_engine *e, struct device *d, int at,
                        const struct tb_engine_options *o, struct tb_error *err)
{
    struct tb_backend_options bo = {.n_threads = o->n_threads,
                                    .mem_limit = (size_t)o->memory,
                                    .device = o->n_devices ? o->devices[at] : 0};
    int rc = tb_backend_create(&d->be, o->backend, o->dtype, &bo, err);
    if (rc) return rc;
    if (o->n_devices && !strcmp(d->be->ops->name, "cpu"))
        return tb_error_set(err, TB_EINVAL, "--devices: the cpu backend has none to choose from");
    /* Without --memory a tenth is left to the rest of the machine; a GPU's backend leaves it. */
    if (!d->be->mem_limit) d->be->mem_limit = (size_t)(tb_mem_machine() / 10 * 9);
    size_t n = strlen(e->describe);
    if (n) n += (size_t)snprintf(e->describe + n, sizeof(e->describe) - n, "; ");
    if (n < sizeof(e->describe))
        d->be->ops->describe(d->be, e->describe + n, sizeof(e->describe) - n);
    if (!o->paging_dir) return 0;
    char *dir = at ? tb_asprintf("%s-%d", o->paging_dir, at) : tb_strdup(o->paging_dir);
    rc = tb_pager_create(&d->pager, d->be, dir, err);
    tb_free(dir);
    return rc;
}

/* Numbers must not depend on which replica they come from. */
static int check_kinds(const struct device *devices, int n, int stride,
                       const struct tb_engine_options *o, struct tb_error *err)
{
    for (int i = stride; i < n; i++) {
        int first = i % stride;
        const char *a = devices[first].be->kind, *b = devices[i].be->kind;
        if (strcmp(a, b) != 0)
            return tb_error_set(err, TB_EINVAL,
                                "--devices: GPU %d (%s) and GPU %d (%s) share a model, so they "
                                "must be of one kind",
                                o->devices[first], a, o->devices[i], b);
    }
    return 0;
}

/* Nor what fits: a replica gets the memory that the least of them has. */
static void level_memory(const struct device *devices, int n, int stride)
{
    for (int i = n - 1; i >= stride; i--) {
        struct tb_backend *a = devices[i - stride].be, *b = devices[i].be;
        a->mem_limit = TB_MIN(a->mem_limit, b->mem_limit);
    }
    for (int i = stride; i < n; i++)
        devices[i].be->mem_limit = devices[i - stride].be->mem_limit;
}

static int load_model(struct tb_model **out, const struct device *d, int n_beside,
                      const struct tb_engine_model *m, const struct tb_engine_options *o,
                      struct tb_error *err)
{
    struct tb_model_options mo = {.max_rank = o->max_rank,
                                  .max_context = o->max_context,
                                  .kv_bytes = (size_t)o->kv_memory / (size_t)n_beside,
                                  .kv_shares = n_beside,
                                  .pager = d->pager,
                                  .shard_tokens = o->shard_tokens};
    uint64_t t0 = tb_clock_ms();
    int rc = tb_model_load(out, d->be, m->name, m->dir, &mo, err);
    char of_kv[64] = "";
    if (o->kv_memory)
        snprintf(of_kv, sizeof(of_kv), ", %llu MiB of it for the KV cache (--kv-memory)",
                 (unsigned long long)(o->kv_memory >> 20));
    if (rc == TB_ENOMEM)
        tb_error_prefix(err, "the models do not fit into %zu MiB (--memory)%s",
                        d->be->mem_limit >> 20, of_kv);
    if (rc) return rc;
    const struct tb_model_info *info = tb_model_info(*out);
    tb_log(TB_LOG_INFO, "engine", "loaded model=%s arch=%s weights_mb=%zu ms=%llu", m->name,
           info->arch, info->weight_bytes >> 20, (unsigned long long)(tb_clock_ms() - t0));
    return 0;
}

/* Loads the models of the device-th of n devices. */
static int load_models(struct device *d, int device, int stride, const struct tb_engine_options *o,
                       struct tb_error *err)
{
    int n_beside = 0, rc = 0;
    for (int i = device % stride; i < o->n_models; i += stride)
        n_beside++;
    for (int i = device % stride; i < o->n_models && !rc; i += stride)
        rc = load_model(&d->models[i], d, n_beside, &o->models[i], o, err);
    return rc;
}

static void close_device(struct device *d, int n_models)
{
    for (int i = 0; d->models && i < n_models; i++)
        tb_model_free(d->models[i]);
    tb_free(d->models);
    tb_pager_destroy(d->pager);
    if (d->be) d->be->ops->destroy(d->be);
}

static void engine_free(struct tb_engine *e)
{
    for (int i = 0; i < e->n_models; i++)
        tb_free(e->tokenizers[i]);
    tb_free(e->tokenizers);
    route_fini(&e->route);
    tb_free(e);
}

static void lane_closed(void *arg)
{
    struct tb_engine *e = arg;
    if (--e->n_open) return;
    void (*cb)(void *) = e->closed_cb;
    void *cb_arg = e->closed_arg;
    engine_free(e);
    if (cb) cb(cb_arg);
}

static void task_done(void *arg, struct tb_task *t)
{
    struct tb_engine *e = arg;
    route_done(&e->route, t);
    t->cb(t);
}

/* Lanes may send to each other until none has anything to do. */
static void lane_quiet(void *arg)
{
    struct tb_engine *e = arg;
    if (e->ending) return;
    for (int i = 0; i < e->n_lanes; i++)
        if (!lane_is_quiet(e->route.lanes[i].lane)) return;
    e->ending = true;
    for (int i = 0, n = e->n_lanes; i < n; i++)
        lane_end(e->route.lanes[i].lane, lane_closed, e);
}

static void close_lanes(struct tb_engine *e)
{
    for (int i = 0; i < e->n_lanes; i++)
        lane_close(e->route.lanes[i].lane, lane_quiet, e);
}

/* Each lane to the others with its models. */
static void introduce_lanes(struct tb_engine *e)
{
    struct tb_lane **peers = tb_calloc((size_t)e->n_lanes, sizeof(struct tb_lane *));
    for (int i = 0; i < e->n_lanes; i++) {
        int n = 0;
        for (int j = 1; j < e->n_lanes; j++) {
            int k = (i + j) % e->n_lanes;
            if (k % e->route.stride == i % e->route.stride) peers[n++] = e->route.lanes[k].lane;
        }
        lane_set_peers(e->route.lanes[i].lane, peers, n);
    }
    tb_free(peers);
}

int tb_engine_create(struct tb_engine **out, uv_loop_t *loop, const struct tb_engine_options *o,
                     struct tb_error *err)
{
    int n = TB_MAX(o->n_devices, 1), n_models = o->n_models, rc = 0;
    struct device *devices = tb_calloc((size_t)n, sizeof(*devices));
    struct tb_engine *e = tb_calloc(1, sizeof(*e));
    struct route *r = &e->route;

    e->loop = loop;
    e->n_models = n_models;
    e->tokenizers = tb_calloc((size_t)TB_MAX(n_models, 1), sizeof(char *));
    for (int i = 0; i < n_models; i++)
        if (o->models[i].tokenizer) e->tokenizers[i] = tb_strdup(o->models[i].tokenizer);
    route_init(r, n_models, n, o->mirror_tokens ? o->mirror_tokens : MIRROR_TOKENS);
    for (int i = 0; i < n && !rc; i++) {
        devices[i].models = tb_calloc((size_t)TB_MAX(n_models, 1), sizeof(struct tb_model *));
        rc = open_backend(e, &devices[i], i, o, err);
    }
    if (!rc) rc = check_kinds(devices, n, r->stride, o, err);
    if (!rc) level_memory(devices, n, r->stride);
    for (int i = 0; i < n && !rc; i++)
        rc = load_models(&devices[i], i, r->stride, o, err);
    for (int i = 0; i < n && !rc; i++) {
        struct device *d = &devices[i];
        rc = lane_create(&r->lanes[i].lane, loop, d->be, d->pager, d->models, n_models, task_done,
                         e, err);
        if (rc) break;
        *d = (struct device){0};
        e->n_lanes = e->n_open = i + 1;
    }
    for (int i = 0; i < n; i++)
        close_device(&devices[i], n_models);
    tb_free(devices);
    if (!rc) introduce_lanes(e);
    if (!rc)
        *out = e;
    else if (e->n_open) /* the lanes that there are close in the loop's next turns */
        close_lanes(e);
    else
        engine_free(e);
    return rc;
}

void tb_engine_close(struct tb_engine *e, void (*cb)(void *arg), void *arg)
{
    e->closed_cb = cb;
    e->closed_arg = arg;
    mirrors_close(&e->route);
    close_lanes(e);
}

/* ---- facts */

int tb_engine_n_models(const struct tb_engine *e)
{
    return e->n_models;
}

const struct tb_model_info *tb_engine_model_info(const struct tb_engine *e, int model)
{
    return tb_model_info(route_first(&e->route, model)->lane->models[model]);
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

static void copy_done(struct tb_task *t)
{
    tb_op_destroy(t->op);
    tb_task_destroy(t);
}

/* A session's losses are for models on all lanes; each lane keeps its own. */
static void tell_other_lanes(struct tb_engine *e, const struct tb_task *task)
{
    const struct route *r = &e->route;
    for (int i = 0; i < r->n_lanes; i++) {
        if (&r->lanes[i] == route_first(r, task->model)) continue;
        struct tb_task *t = tb_task_create(task->type);
        t->model = i % r->stride; /* one that is there */
        t->loss_id = task->loss_id;
        t->cb = copy_done;
        if (task->op) {
            const struct tb_create_custom_loss *from = &task->op->u.create_custom_loss;
            t->op = tb_op_create(task->op->type);
            t->op->u.create_custom_loss = *from;
            t->op->u.create_custom_loss.text =
                tb_arena_strndup(&t->op->arena, from->text, from->n_text);
        }
        lane_submit(r->lanes[i].lane, t);
    }
}

void tb_engine_submit(struct tb_engine *e, struct tb_task *task)
{
    if (task->type == TB_TASK_LOSS_CREATE || task->type == TB_TASK_LOSS_FREE)
        tell_other_lanes(e, task);
    task->submitted_ns = uv_hrtime();
    route_submit(&e->route, task);
}

void tb_engine_cancel(struct tb_engine *e, struct tb_task *task)
{
    __atomic_store_n(&task->canceled, true, __ATOMIC_RELAXED);
    mirror_cancel(task);
}

/* Adds a lane's numbers to those of the others. */
static void add_stats(struct tb_lane *l, struct tb_engine_stats *out)
{
    const struct lane_stats *s = &l->stats;
    for (int i = 0; i < TB_N_SUBMITTED; i++)
        out->tasks_done[i] += atomic_load_explicit(&s->tasks_done[i], memory_order_relaxed);
    out->shares += atomic_load_explicit(&s->shares, memory_order_relaxed);
    out->train_tokens += atomic_load_explicit(&s->train_tokens, memory_order_relaxed);
    out->sample_rows += atomic_load_explicit(&s->sample_rows, memory_order_relaxed);
    out->steps += atomic_load_explicit(&s->steps, memory_order_relaxed);
    out->busy_us += atomic_load_explicit(&s->busy_us, memory_order_relaxed);
    for (int i = 0; i < TB_N_WORKS; i++) {
        const struct lane_work_stats *w = &s->work[i];
        struct tb_work_stats *sum = &out->work[i];
        uint64_t max = atomic_load_explicit(&w->wait_us_max, memory_order_relaxed);
        sum->waiting += atomic_load_explicit(&w->waiting, memory_order_relaxed);
        sum->running += atomic_load_explicit(&w->running, memory_order_relaxed);
        sum->begun += atomic_load_explicit(&w->begun, memory_order_relaxed);
        sum->wait_us += atomic_load_explicit(&w->wait_us, memory_order_relaxed);
        sum->wait_us_max = TB_MAX(sum->wait_us_max, max);
    }
    for (int i = 0; i < l->n_models; i++)
        if (l->models[i]) out->kv.n_pages += (uint64_t)tb_model_info(l->models[i])->kv_pages_total;
    out->kv.n_free += atomic_load_explicit(&s->kv_free, memory_order_relaxed);
    out->kv.n_cached += atomic_load_explicit(&s->kv_cached, memory_order_relaxed);
    out->kv.n_preempted += atomic_load_explicit(&s->kv_preempted, memory_order_relaxed);
    out->kv.n_lookup_tokens += atomic_load_explicit(&s->lookup_tokens, memory_order_relaxed);
    out->kv.n_hit_tokens += atomic_load_explicit(&s->hit_tokens, memory_order_relaxed);
    uv_mutex_lock(&l->memory_lock);
    const struct tb_memory_stats m = l->memory;
    uv_mutex_unlock(&l->memory_lock);
    struct tb_memory_stats *sum = &out->memory;
    sum->limit += m.limit;
    sum->used += m.used;
    sum->weights += m.weights;
    sum->adapters += m.adapters;
    sum->versions += m.versions;
    sum->kv += m.kv;
    sum->workspaces += m.workspaces;
    sum->n_adapters += m.n_adapters;
    sum->n_versions += m.n_versions;
    sum->adapters_out += m.adapters_out;
    sum->versions_out += m.versions_out;
    sum->page_ins += m.page_ins;
    sum->page_outs += m.page_outs;
}

void tb_engine_stats(const struct tb_engine *e, struct tb_engine_stats *out)
{
    memset(out, 0, sizeof(*out));
    for (int i = 0; i < e->route.n_lanes; i++)
        add_stats(e->route.lanes[i].lane, out);
    out->work[TB_WORK_SAMPLE].waiting += e->route.n_waiting;
}
