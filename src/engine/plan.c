/*
 * Planning: what a lane's worker does with its tasks. One turn of lane_run
 *   1. takes everything from the inbox: adapter tasks go to their adapter's queue, samples begin;
 *   2. runs a training turn: the cheap tasks at the heads of the adapters' queues (create, optim,
 * publish, export, …), then one packed pass over the forward and forward_backward ops at the heads,
 * one op of every adapter in round-robin order until the pass is full;
 *   3. runs sampling steps; each advances every running sequence by one token and prefills a chunk.
 * While both kinds wait they share the machine by time: after a training pass of t seconds,
 * sampling gets steps until it has had t seconds too (at least one step), so a sample beside a
 * tenant with a hundred queued steps starts after at most the pass that runs.
 *
 * Thread: the worker's (see lane.h).
 */
#include <string.h>

#include "engine/lane.h"
#include "model/custom/graph.h"
#include "util/clock.h"
#include "util/log.h"
#include "util/mem.h"

/* Tokens of a training pass: enough to keep the products efficient, small enough for fair turns. An
 * op larger than this runs alone; tb_model_train splits it into micro-batches. */
#define TRAIN_PASS_TOKENS 4096
#define TRAIN_PASS_OPS    256
/* Prompt rows of one sampling step, beside the decoding rows. */
#define PREFILL_ROWS 256

#define KEY(id) (const char *)&(id), sizeof(id)

static void loss_unref(struct lane_loss *loss)
{
    if (!loss || --loss->refs) return;
    tb_graph_destroy(loss->graph);
    tb_free(loss);
}

static void finish(struct tb_lane *l, struct tb_task *t)
{
    loss_unref(t->loss);
    t->loss = NULL;
    atomic_fetch_sub_explicit(&l->stats.waiting, 1, memory_order_relaxed);
    lane_post_done(l, t);
}

static void fail(struct tb_lane *l, struct tb_task *t, int code, const char *what)
{
    tb_error_set(tb_task_error(t), code, "%s", what);
    finish(l, t);
}

static struct tb_model *task_model(struct tb_lane *l, const struct tb_task *t)
{
    return t->model >= 0 && t->model < l->n_models ? l->models[t->model] : NULL;
}

/* ---- inbox */

static void take_sample(struct tb_lane *l, struct tb_task *t)
{
    struct tb_adapter_version *version = NULL;
    if (t->version_id) {
        struct lane_version *v = tb_map_get(&l->versions, KEY(t->version_id));
        if (!v || v->model != t->model) {
            fail(l, t, TB_ENOTFOUND, "the sampler's weights are not loaded");
            return;
        }
        version = v->version;
    }
    if (tb_sampling_create(&t->sampling, task_model(l, t), version, t->op)) {
        finish(l, t); /* op->error is set */
        return;
    }
    tb_list_push(&l->samples, &t->node);
    l->n_samples++;
    atomic_fetch_add_explicit(&l->stats.running, 1, memory_order_relaxed);
}

static void version_put(struct tb_lane *l, struct tb_task *t, struct tb_adapter_version *version)
{
    struct lane_version *v = tb_calloc(1, sizeof(*v));
    v->id = t->version_id;
    v->model = t->model;
    v->version = version;
    struct lane_version *old = tb_map_put(&l->versions, KEY(v->id), v);
    if (old) { /* an inflight sampler's target: later samples see the new weights */
        tb_version_unref(old->version);
        tb_free(old);
    }
}

static void take_version(struct tb_lane *l, struct tb_task *t)
{
    if (t->type == TB_TASK_VERSION_LOAD) {
        struct tb_adapter_version *version = NULL;
        if (!tb_version_create_from(&version, task_model(l, t), t->state, &t->error))
            version_put(l, t, version);
    } else {
        struct lane_version *v = tb_map_del(&l->versions, KEY(t->version_id));
        if (v) {
            tb_version_unref(v->version);
            tb_free(v);
        }
    }
    finish(l, t);
}

static void take_loss(struct tb_lane *l, struct tb_task *t)
{
    if (t->type == TB_TASK_LOSS_CREATE) {
        const struct tb_create_custom_loss *c = &t->op->u.create_custom_loss;
        struct tb_graph *graph;
        if (!tb_graph_create(&graph, c->text, c->n_text, &t->op->error)) {
            struct lane_loss *loss = tb_calloc(1, sizeof(*loss));
            *loss = (struct lane_loss){.id = t->loss_id, .refs = 1, .graph = graph};
            loss_unref(tb_map_put(&l->losses, KEY(loss->id), loss));
        }
    } else {
        loss_unref(tb_map_del(&l->losses, KEY(t->loss_id)));
    }
    finish(l, t);
}

static void take_adapter_task(struct tb_lane *l, struct tb_task *t)
{
    if (t->loss_id) { /* held until the task is done: its session may end before */
        t->loss = tb_map_get(&l->losses, KEY(t->loss_id));
        if (t->loss) t->loss->refs++;
    }
    struct lane_adapter *a = tb_map_get(&l->adapters, KEY(t->adapter_id));
    if (!a) {
        a = tb_calloc(1, sizeof(*a));
        a->id = t->adapter_id;
        a->model = t->model;
        tb_list_init(&a->node);
        tb_list_init(&a->tasks);
        tb_map_put(&l->adapters, KEY(a->id), a);
    }
    if (tb_list_empty(&a->tasks)) tb_list_push(&l->ready, &a->node);
    tb_list_push(&a->tasks, &t->node);
}

static void take_inbox(struct tb_lane *l)
{
    struct tb_list in;
    tb_list_init(&in);
    if (!tb_mailbox_drain(&l->inbox, &in)) return;
    struct tb_list *n;
    while ((n = tb_list_pop(&in))) {
        struct tb_task *t = TB_LIST_ENTRY(n, struct tb_task, node);
        if (!task_model(l, t)) {
            fail(l, t, TB_EINTERNAL, "the task names no loaded model");
            continue;
        }
        switch (t->type) {
        case TB_TASK_SAMPLE: take_sample(l, t); break;
        case TB_TASK_VERSION_LOAD:
        case TB_TASK_VERSION_FREE: take_version(l, t); break;
        case TB_TASK_LOSS_CREATE:
        case TB_TASK_LOSS_FREE: take_loss(l, t); break;
        default: take_adapter_task(l, t); break;
        }
    }
}

/* ---- training */

static void adapter_forget(struct tb_lane *l, struct lane_adapter *a)
{
    tb_map_del(&l->adapters, KEY(a->id));
    tb_list_del(&a->node);
    tb_adapter_free(a->adapter);
    tb_free(a);
}

/* Runs one task that is not a training pass. */
static void run_small(struct tb_lane *l, struct lane_adapter *a, struct tb_task *t)
{
    struct tb_model *m = l->models[a->model];
    struct tb_adapter_version *version = NULL;
    struct tb_error *err = tb_task_error(t);

    if (!a->adapter && t->type != TB_TASK_ADAPTER_CREATE && t->type != TB_TASK_ADAPTER_FREE &&
        !(t->type == TB_TASK_ADAPTER_LOAD && t->create)) {
        tb_error_set(err, TB_ENOTFOUND, "the model's adapter does not exist");
        return;
    }
    switch (t->type) {
    case TB_TASK_ADAPTER_CREATE: tb_adapter_create(&a->adapter, m, &t->lora, err); break;
    case TB_TASK_ADAPTER_LOAD:
        if (t->create)
            tb_adapter_create_from(&a->adapter, m, t->state, t->with_optimizer, err);
        else
            tb_adapter_restore(a->adapter, t->state, t->with_optimizer, err);
        break;
    case TB_TASK_OPTIM: tb_adapter_optim_step(a->adapter, t->op); break;
    case TB_TASK_EXPORT: tb_adapter_export(a->adapter, t->with_optimizer, &t->state, err); break;
    case TB_TASK_PUBLISH:
        if (!tb_adapter_publish(a->adapter, &version, err)) version_put(l, t, version);
        break;
    default: tb_error_set(err, TB_EINTERNAL, "unexpected task type %d", (int)t->type); break;
    }
}

static bool is_train(const struct tb_task *t)
{
    return t->type == TB_TASK_TRAIN;
}

static struct tb_task *head(const struct lane_adapter *a)
{
    return tb_list_empty(&a->tasks) ? NULL : TB_LIST_ENTRY(a->tasks.next, struct tb_task, node);
}

/* Runs the cheap tasks at the head of an adapter's queue. */
static void drain_small(struct tb_lane *l, struct lane_adapter *a, bool *did)
{
    struct tb_task *t;
    while ((t = head(a)) && !is_train(t)) {
        *did = true;
        tb_list_del(&t->node);
        if (t->type == TB_TASK_ADAPTER_FREE) {
            while (!tb_list_empty(&a->tasks)) {
                struct tb_task *late = head(a);
                tb_list_del(&late->node);
                fail(l, late, TB_ECANCELED, "the model was unloaded");
            }
            adapter_forget(l, a);
            finish(l, t);
            return;
        }
        run_small(l, a, t);
        finish(l, t);
    }
}

/* Takes adapters without tasks off the ready list; one whose creation failed is forgotten. */
static void prune_ready(struct tb_lane *l)
{
    TB_LIST_FOREACH_SAFE (it, next, &l->ready) {
        struct lane_adapter *a = TB_LIST_ENTRY(it, struct lane_adapter, node);
        if (head(a)) continue;
        tb_list_del(&a->node);
        if (!a->adapter) adapter_forget(l, a);
    }
}

static uint64_t op_tokens(const struct tb_op *op)
{
    uint64_t n = 0;
    for (int32_t i = 0; i < op->u.forward_backward.n_data; i++)
        n += (uint64_t)op->u.forward_backward.data[i].n_tokens;
    return n;
}

/* Fills a pass with training ops of one base model: the first of every ready adapter in turn, then
 * the next ones, until the pass is full. Returns how many. */
static int plan_pass(struct tb_lane *l, struct tb_train_item *items, struct tb_task **tasks,
                     uint64_t *n_tokens)
{
    int n = 0, model = -1;
    bool more = true;

    *n_tokens = 0;
    while (more && n < TRAIN_PASS_OPS) {
        more = false;
        TB_LIST_FOREACH_SAFE (it, next, &l->ready) {
            struct lane_adapter *a = TB_LIST_ENTRY(it, struct lane_adapter, node);
            struct tb_task *t = head(a);
            if (!t || !is_train(t) || n == TRAIN_PASS_OPS) continue;
            if (model >= 0 && a->model != model) continue;
            uint64_t tokens = op_tokens(t->op);
            if (n > 0 && *n_tokens + tokens > TRAIN_PASS_TOKENS) continue;
            tb_list_del(&t->node);
            if (!a->adapter) {
                fail(l, t, TB_ENOTFOUND, "the model's adapter does not exist");
                more = true;
                continue;
            }
            model = a->model;
            items[n].adapter = a->adapter;
            items[n].op = t->op;
            items[n].graph = t->loss ? t->loss->graph : NULL;
            tasks[n++] = t;
            *n_tokens += tokens;
            more = true;
        }
    }
    return n;
}

/* One training turn. false: there was nothing to do. */
static bool train_turn(struct tb_lane *l)
{
    struct tb_train_item items[TRAIN_PASS_OPS];
    struct tb_task *tasks[TRAIN_PASS_OPS];
    uint64_t n_tokens;
    bool did = false;

    TB_LIST_FOREACH_SAFE (it, next, &l->ready) {
        drain_small(l, TB_LIST_ENTRY(it, struct lane_adapter, node), &did);
    }
    int n = plan_pass(l, items, tasks, &n_tokens);
    prune_ready(l);
    if (n == 0) return did;

    struct tb_error err = {0};
    uint64_t t0 = uv_hrtime();
    int rc = tb_model_train(l->models[tasks[0]->model], items, n, &err);
    l->train_ns += uv_hrtime() - t0;
    if (rc) tb_log(TB_LOG_ERROR, "engine", "training pass failed: %s", err.msg);
    atomic_fetch_add_explicit(&l->stats.train_tokens, n_tokens, memory_order_relaxed);
    atomic_fetch_add_explicit(&l->stats.steps, 1, memory_order_relaxed);
    for (int i = 0; i < n; i++)
        finish(l, tasks[i]);

    /* Whoever led this pass goes to the end of the round. */
    if (!tb_list_empty(&l->ready)) {
        struct tb_list *first = tb_list_pop(&l->ready);
        tb_list_push(&l->ready, first);
    }
    TB_LIST_FOREACH_SAFE (it, next, &l->ready) {
        struct lane_adapter *a = TB_LIST_ENTRY(it, struct lane_adapter, node);
        if (!head(a)) tb_list_del(&a->node);
    }
    return true;
}

/* ---- sampling */

static void end_sample(struct tb_lane *l, struct tb_task *t)
{
    tb_sampling_destroy(t->sampling);
    t->sampling = NULL;
    tb_list_del(&t->node);
    l->n_samples--;
    atomic_fetch_sub_explicit(&l->stats.running, 1, memory_order_relaxed);
    finish(l, t);
}

static void drop_canceled(struct tb_lane *l)
{
    TB_LIST_FOREACH_SAFE (it, next, &l->samples) {
        struct tb_task *t = TB_LIST_ENTRY(it, struct tb_task, node);
        if (!__atomic_load_n(&t->canceled, __ATOMIC_RELAXED)) continue;
        tb_error_set(&t->op->error, TB_ECANCELED, "canceled");
        end_sample(l, t);
    }
}

/* One step of all samplings of one base model. */
static void sample_model(struct tb_lane *l, int model)
{
    size_t n = 0;
    TB_LIST_FOREACH (it, &l->samples) {
        struct tb_task *t = TB_LIST_ENTRY(it, struct tb_task, node);
        if (t->model == model) l->sampling_scratch[n++] = t->sampling;
    }
    if (n == 0) return;
    struct tb_error err = {0};
    int rows = 0;
    int rc = tb_model_sample_step(l->models[model], l->sampling_scratch, (int)n, PREFILL_ROWS,
                                  &rows, &err);
    if (rc) tb_log(TB_LOG_ERROR, "engine", "sampling step failed: %s", err.msg);
    atomic_fetch_add_explicit(&l->stats.sample_rows, (uint64_t)rows, memory_order_relaxed);
    atomic_fetch_add_explicit(&l->stats.steps, 1, memory_order_relaxed);
    TB_LIST_FOREACH_SAFE (it, next, &l->samples) {
        struct tb_task *t = TB_LIST_ENTRY(it, struct tb_task, node);
        if (t->model != model) continue;
        struct tb_progress *p = tb_sampling_progress(t->sampling);
        if (p) lane_post_progress(l, t, p);
        bool done = tb_sampling_done(t->sampling);
        if (!done && (rc || rows == 0)) { /* cannot go on: never leave it waiting for ever */
            tb_error_set(&t->op->error, rc ? rc : TB_EINTERNAL, "%s",
                         rc ? err.msg : "sampling made no progress");
            done = true;
        }
        if (done) end_sample(l, t);
    }
}

/* false: no sample waits. */
static bool sample_turn(struct tb_lane *l)
{
    drop_canceled(l);
    if (l->n_samples == 0) return false;
    if (l->sampling_cap < l->n_samples) {
        l->sampling_cap = 2 * l->n_samples;
        l->sampling_scratch =
            tb_realloc(l->sampling_scratch, l->sampling_cap * sizeof(l->sampling_scratch[0]));
    }
    uint64_t t0 = uv_hrtime();
    for (int m = 0; m < l->n_models; m++)
        sample_model(l, m);
    l->sample_ns += uv_hrtime() - t0;
    return true;
}

/* ---- the worker */

static void fail_all(struct tb_lane *l)
{
    TB_LIST_FOREACH_SAFE (it, next, &l->samples) {
        struct tb_task *t = TB_LIST_ENTRY(it, struct tb_task, node);
        tb_error_set(&t->op->error, TB_ECANCELED, "the server is shutting down");
        end_sample(l, t);
    }
    TB_LIST_FOREACH_SAFE (it, next, &l->ready) {
        struct lane_adapter *a = TB_LIST_ENTRY(it, struct lane_adapter, node);
        struct tb_task *t;
        while ((t = head(a))) {
            tb_list_del(&t->node);
            fail(l, t, TB_ECANCELED, "the server is shutting down");
        }
        tb_list_del(&a->node);
    }
}

void lane_run(struct tb_lane *l)
{
    for (;;) {
        take_inbox(l);
        if (atomic_load_explicit(&l->closing, memory_order_relaxed)) {
            fail_all(l);
            return;
        }
        bool trained = train_turn(l);
        bool sampled = false;
        /* Sampling catches up with the time that training had; alone it runs one step a turn. */
        do {
            if (!sample_turn(l)) break;
            sampled = true;
            take_inbox(l);
        } while (trained && l->sample_ns < l->train_ns &&
                 !atomic_load_explicit(&l->closing, memory_order_relaxed));
        if (!trained || !sampled) l->train_ns = l->sample_ns = 0;
        if (!trained && !sampled && tb_list_empty(&l->ready) && tb_mailbox_empty(&l->inbox)) return;
    }
}

void lane_free_state(struct tb_lane *l)
{
    size_t it = 0, len;
    const char *key;
    void *value;
    while (tb_map_next(&l->adapters, &it, &key, &len, &value)) {
        struct lane_adapter *a = value;
        tb_adapter_free(a->adapter);
        tb_free(a);
    }
    it = 0;
    while (tb_map_next(&l->versions, &it, &key, &len, &value)) {
        struct lane_version *v = value;
        tb_version_unref(v->version);
        tb_free(v);
    }
    it = 0;
    while (tb_map_next(&l->losses, &it, &key, &len, &value))
        loss_unref(value);
}
