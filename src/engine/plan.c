/*
 * Planning: what a lane's worker does with its tasks. One turn of lane_run
 *   1. takes everything from the inbox: adapter tasks go to their adapter's queue, samples begin;
 *   2. runs the cheap tasks at the heads of the adapters' queues (create, optim, publish, export);
 *   3. runs a training step: one packed pass over data of the ops at the heads of the queues;
 *   4. runs a sampling step: every running sequence advances by a token, and prompts by a chunk.
 *
 * Training shares by tokens. An adapter's level counts the quanta of tokens that it was served, one
 * that comes anew begins at the lowest of those that wait, and a datum of the lowest level goes
 * first: of equal ones small ops, then ops that are under way, then in turn. So a long op yields
 * between steps, and a small one is in the next step whatever waits. Sampling shares in the model.
 *
 * Training and sampling share by time: whichever had less goes on alone until it has had as much as
 * the other. But one sampling step comes before that when a sample is new, and a step of small ops
 * when these are of adapters that had none since training stopped; so neither waits for more than
 * the step that runs and one of the other kind.
 *
 * An op that is spread over several devices (spread.h) stays at the head of its queue until all of
 * it is there; what another lane sends as its share is a training task like others here.
 *
 * Thread: the worker's (see lane.h).
 */
#include <string.h>

#include "engine/spread.h"
#include "model/custom/graph.h"
#include "util/clock.h"
#include "util/log.h"
#include "util/mem.h"

#define SMALL_TOKENS 256 /* of an op that goes first */

#define KEY(id) (const char *)&(id), sizeof(id)

static void loss_unref(struct lane_loss *loss)
{
    if (!loss || --loss->refs) return;
    tb_graph_destroy(loss->graph);
    tb_free(loss);
}

static void add(_Atomic uint64_t *counter, uint64_t n)
{
    atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

/* The task is being computed from now on. */
static void begin(struct tb_lane *l, struct tb_task *t)
{
    struct lane_work_stats *w = &l->stats.work[lane_work_of(t->type)];
    uint64_t us = (uv_hrtime() - t->submitted_ns) / 1000;
    t->begun = true;
    add(&w->waiting, -(uint64_t)1);
    add(&w->running, 1);
    add(&w->begun, 1);
    add(&w->wait_us, us);
    if (us > atomic_load_explicit(&w->wait_us_max, memory_order_relaxed))
        atomic_store_explicit(&w->wait_us_max, us, memory_order_relaxed);
}

/* Before the loop, or another lane, hears of what failed. */
static void note_lost(struct tb_lane *l)
{
    if (l->be->lost) atomic_store_explicit(&l->lost, true, memory_order_relaxed);
}

static void finish(struct tb_lane *l, struct tb_task *t)
{
    struct lane_work_stats *w = &l->stats.work[lane_work_of(t->type)];
    loss_unref(t->loss);
    t->loss = NULL;
    note_lost(l);
    add(t->begun ? &w->running : &w->waiting, -(uint64_t)1);
    lane_post_done(l, t);
}

static void fail(struct tb_lane *l, struct tb_task *t, int code, const char *what)
{
    tb_error_set(tb_task_error(t), code, "%s", what);
    finish(l, t);
}

/* Whether the device is gone for good, and why: what needs it fails at once. */
static bool is_lost(struct tb_lane *l, struct tb_error *err)
{
    return l->be->lost && l->be->ops->sync(l->be, err);
}

static struct tb_model *task_model(struct tb_lane *l, const struct tb_task *t)
{
    return t->model >= 0 && t->model < l->n_models ? l->models[t->model] : NULL;
}

/* ---- inbox */

static void take_sample(struct tb_lane *l, struct tb_task *t)
{
    struct tb_adapter_version *version = NULL;
    if (is_lost(l, &t->op->error)) {
        finish(l, t);
        return;
    }
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
    l->new_samples = true;
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
        if (!is_lost(l, &t->error) &&
            !tb_version_create_from(&version, task_model(l, t), t->state, &t->error))
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

static void take_loan(struct tb_lane *l, struct tb_task *t)
{
    struct tb_adapter_version *version = NULL;
    const struct lane_version *v;
    switch (t->type) {
    case TB_TASK_LEND:
        v = tb_map_get(&l->versions, KEY(t->version_id));
        if (!v)
            tb_error_set(&t->error, TB_ENOTFOUND, "the version is not loaded");
        else if (!is_lost(l, &t->error))
            tb_version_lend(v->version, t->loan, &t->error);
        break;
    case TB_TASK_BORROW:
        if (!is_lost(l, &t->error) &&
            !tb_version_borrow(&version, task_model(l, t), t->loan, &t->error))
            version_put(l, t, version);
        break;
    default: tb_loan_return(t->loan); break;
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

/* Tokens of a training step: a micro-batch of the model. A longer datum is a step of its own. */
static uint64_t step_tokens(const struct tb_lane *l)
{
    return (uint64_t)l->be->sizes.train_rows;
}

/* What an adapter may be ahead of the others: it lets ops of usual size end before the next begins.
 */
static uint64_t quantum(const struct tb_lane *l)
{
    return 4 * step_tokens(l);
}

static uint64_t op_tokens(const struct tb_op *op)
{
    uint64_t n = 0;
    for (int32_t i = 0; i < op->u.forward_backward.n_data; i++)
        n += (uint64_t)op->u.forward_backward.data[i].n_tokens;
    return n;
}

/* An adapter begins to wait: what it was not served while it had nothing to do is no credit. */
static void make_ready(struct tb_lane *l, struct lane_adapter *a)
{
    uint64_t least = UINT64_MAX;
    TB_LIST_FOREACH (it, &l->ready) {
        const struct lane_adapter *o = TB_LIST_ENTRY(it, struct lane_adapter, node);
        least = TB_MIN(least, o->served / quantum(l) * quantum(l));
    }
    if (!tb_list_empty(&l->ready)) a->served = TB_MAX(a->served, least);
    tb_list_push(&l->ready, &a->node);
}

static void take_adapter_task(struct tb_lane *l, struct tb_task *t)
{
    if (t->type == TB_TASK_TRAIN) {
        t->n_tokens = op_tokens(t->op);
        t->n_end = t->op->u.forward_backward.n_data;
    }
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
    if (tb_list_empty(&a->tasks)) make_ready(l, a);
    tb_list_push(&a->tasks, &t->node);
}

/* Its adapter may have something to do again. */
static void take_back(struct tb_lane *l, struct tb_task *share)
{
    struct lane_adapter *a = spread_take_back(share);
    if (!a->waits) return;
    a->waits = false;
    tb_list_del(&a->node);
    make_ready(l, a);
}

/* Whether there was something. */
static bool take_inbox(struct tb_lane *l)
{
    struct tb_list in;
    tb_list_init(&in);
    if (!tb_mailbox_drain(&l->inbox, &in)) return false;
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
        case TB_TASK_LEND:
        case TB_TASK_BORROW:
        case TB_TASK_RETURN: take_loan(l, t); break;
        case TB_TASK_LOSS_CREATE:
        case TB_TASK_LOSS_FREE: take_loss(l, t); break;
        case TB_TASK_COLLECT: take_back(l, t); break;
        case TB_TASK_SHARE_END: share_free(t); break;
        default: take_adapter_task(l, t); break;
        }
    }
    return true;
}

/* ---- cheap tasks */

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

    if (is_lost(l, err)) return;
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
    return t->type == TB_TASK_TRAIN || t->type == TB_TASK_SHARE;
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
        begin(l, t);
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

/* Cheap tasks of all adapters. */
static bool small_turn(struct tb_lane *l)
{
    bool did = false;
    TB_LIST_FOREACH_SAFE (it, next, &l->ready) {
        drain_small(l, TB_LIST_ENTRY(it, struct lane_adapter, node), &did);
    }
    prune_ready(l);
    return did;
}

/* ---- training. A training task stays at the head of its queue until all its data are through. */

struct train_step {
    int model; /* -1: none yet */
    int n;
    uint64_t n_tokens, max_tokens;
    bool newcomers; /* only small ops of adapters that had no step in this round */
    struct tb_train_part *parts;
};

static struct tb_task *train_task(const struct lane_adapter *a, struct tb_list *node)
{
    struct tb_task *t = TB_LIST_ENTRY(node, struct tb_task, node);
    return node != &a->tasks && is_train(t) ? t : NULL;
}

static uint64_t next_tokens(const struct tb_task *t)
{
    const struct tb_task *of = t->of ? t->of : t;
    return t->n_begun < t->n_end ? (uint64_t)of->op->u.forward_backward.data[t->n_begun].n_tokens
                                 : 1;
}

static int train_error(const struct tb_task *t)
{
    if (t->training) return tb_training_error(t->training)->code;
    return t->op ? t->op->error.code : t->error.code;
}

/* It is over without a result, or with one. */
static void end_training(struct tb_lane *l, struct tb_task *t)
{
    l->n_training -= t->reserved;
    t->reserved = false;
    tb_list_del(&t->node);
    if (t->type == TB_TASK_SHARE) {
        if (!train_error(t)) add(&l->stats.shares, 1);
        note_lost(l);
        share_send_back(t);
        return;
    }
    spread_end(t);
    tb_training_destroy(t->training);
    t->training = NULL;
    finish(l, t);
}

static bool is_small(const struct tb_task *t)
{
    return t->n_tokens <= SMALL_TOKENS;
}

static bool goes_before(const struct tb_lane *l, const struct lane_adapter *a,
                        const struct lane_adapter *b)
{
    uint64_t la = a->served / quantum(l), lb = b->served / quantum(l);
    if (la != lb) return la < lb;
    if (is_small(a->next) != is_small(b->next)) return is_small(a->next);
    return a->next->training && !b->next->training;
}

/* The adapter whose datum is next, or NULL: nothing more fits. */
static struct lane_adapter *pick(struct tb_lane *l, const struct train_step *st)
{
    struct lane_adapter *best = NULL;
    TB_LIST_FOREACH (it, &l->ready) {
        struct lane_adapter *a = TB_LIST_ENTRY(it, struct lane_adapter, node);
        if (!a->next || (st->model >= 0 && a->model != st->model)) continue;
        if (st->n && st->n_tokens + next_tokens(a->next) > st->max_tokens) continue;
        if (st->newcomers && (a->round == l->round || !is_small(a->next))) continue;
        if (!best || goes_before(l, a, best)) best = a;
    }
    return best;
}

static void create_training(struct tb_lane *l, struct lane_adapter *a, struct tb_task *t)
{
    if (t->type == TB_TASK_SHARE) {
        t->begun = true;
        if (!is_lost(l, &t->error)) share_begin(l, t);
        return;
    }
    struct tb_error *err = &t->op->error;
    begin(l, t);
    if (is_lost(l, err)) return;
    if (!a->adapter) {
        tb_error_set(err, TB_ENOTFOUND, "the model's adapter does not exist");
        return;
    }
    if (!tb_training_create(&t->training, a->adapter, t->op, t->loss ? t->loss->graph : NULL))
        spread_begin(l, a, t);
}

/* false: its turn is over, as it failed, or waits for memory that others in training hold. */
static bool begin_training(struct tb_lane *l, struct lane_adapter *a, struct tb_task *t)
{
    struct tb_error e = {0};
    if (!t->begun) create_training(l, a, t);
    if (train_error(t)) return false;
    if (!t->reserved && tb_training_reserve(t->training, &e)) {
        if (l->n_training == 0) tb_training_fail(t->training, &e);
        return false;
    }
    l->n_training += !t->reserved;
    t->reserved = true;
    return true;
}

/* Adds the adapter's next datum to the step. */
static void add_datum(struct train_step *st, struct lane_adapter *a)
{
    struct tb_task *t = a->next;
    struct tb_train_part *last = st->n ? &st->parts[st->n - 1] : NULL;
    uint64_t tokens = next_tokens(t);
    if (!last || last->training != t->training) {
        last = &st->parts[st->n++];
        *last = (struct tb_train_part){.training = t->training};
    }
    last->n_data++;
    st->model = a->model;
    st->n_tokens += tokens;
    a->served += tokens;
    a->in_step = true;
    if (++t->n_begun == t->n_end) a->next = t->spread ? NULL : train_task(a, t->node.next);
}

static void plan_step(struct tb_lane *l, struct train_step *st)
{
    struct lane_adapter *a;
    TB_LIST_FOREACH (it, &l->ready) {
        a = TB_LIST_ENTRY(it, struct lane_adapter, node);
        a->next = train_task(a, a->tasks.next);
        if (a->next && a->next->begun && a->next->n_begun == a->next->n_end) a->next = NULL;
    }
    while (st->n < l->be->sizes.train_rows && (a = pick(l, st))) {
        struct tb_task *t = a->next;
        if (begin_training(l, a, t))
            add_datum(st, a);
        else
            a->next = train_error(t) && !t->spread ? train_task(a, t->node.next) : NULL;
    }
}

/* Hands back the adapter's training tasks that are done. False: it waits for shares. */
static bool end_tasks(struct tb_lane *l, struct lane_adapter *a)
{
    struct tb_task *t;
    while ((t = train_task(a, a->tasks.next)) && t->begun) {
        bool share = t->type == TB_TASK_SHARE;
        if (t->spread && !share && !spread_go_on(l, t)) return false;
        if (!train_error(t) && !tb_training_done(t->training)) break;
        end_training(l, t);
    }
    return true;
}

/* Hands back what is done, and puts those that were served behind the others. */
static void end_step(struct tb_lane *l)
{
    struct tb_list served;
    tb_list_init(&served);
    TB_LIST_FOREACH_SAFE (it, next, &l->ready) {
        struct lane_adapter *a = TB_LIST_ENTRY(it, struct lane_adapter, node);
        bool waits = !end_tasks(l, a);
        if (!a->in_step && !waits) continue;
        if (a->in_step) a->round = l->round;
        a->in_step = false;
        tb_list_del(&a->node);
        tb_list_push(waits ? &l->waiting : &served, &a->node);
        a->waits = waits;
    }
    tb_list_move(&l->ready, &served);
    prune_ready(l);
}

/* One training step. false: there was nothing to do. */
static bool train_turn(struct tb_lane *l, bool newcomers)
{
    struct train_step st;
    struct tb_error err = {0};
    st.model = -1;
    st.n = 0;
    st.parts = l->parts;
    st.n_tokens = 0;
    st.max_tokens = newcomers ? SMALL_TOKENS : step_tokens(l);
    st.newcomers = newcomers;
    if (tb_list_empty(&l->ready)) return false;
    if (!newcomers) l->round++;
    plan_step(l, &st);
    if (st.n) {
        uint64_t t0 = uv_hrtime();
        int rc = tb_model_train(l->models[st.model], st.parts, st.n, &err);
        l->train_ns += uv_hrtime() - t0;
        if (rc) tb_log(TB_LOG_ERROR, "engine", "training pass failed: %s", err.msg);
        add(&l->stats.train_tokens, st.n_tokens);
        add(&l->stats.steps, 1);
    }
    end_step(l);
    return st.n > 0;
}

/* ---- sampling */

static void end_sample(struct tb_lane *l, struct tb_task *t)
{
    tb_sampling_destroy(t->sampling);
    t->sampling = NULL;
    tb_list_del(&t->node);
    l->n_samples--;
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
    int rc = tb_model_sample_step(l->models[model], l->sampling_scratch, (int)n,
                                  l->be->sizes.prefill_rows, &rows, &err);
    if (rc) tb_log(TB_LOG_ERROR, "engine", "sampling step failed: %s", err.msg);
    add(&l->stats.sample_rows, (uint64_t)rows);
    add(&l->stats.steps, 1);
    TB_LIST_FOREACH_SAFE (it, next, &l->samples) {
        struct tb_task *t = TB_LIST_ENTRY(it, struct tb_task, node);
        if (t->model != model) continue;
        if (!t->begun && tb_sampling_begun(t->sampling)) begin(l, t);
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

void lane_note_pages(struct tb_lane *l)
{
    struct tb_kv_stats sum = {0};
    for (int m = 0; m < l->n_models; m++)
        if (l->models[m]) tb_model_kv_stats(l->models[m], &sum);
    struct lane_stats *s = &l->stats;
    atomic_store_explicit(&s->kv_free, sum.n_free, memory_order_relaxed);
    atomic_store_explicit(&s->kv_cached, sum.n_cached, memory_order_relaxed);
    atomic_store_explicit(&s->kv_preempted, sum.n_preempted, memory_order_relaxed);
    atomic_store_explicit(&s->lookup_tokens, sum.n_lookup_tokens, memory_order_relaxed);
    atomic_store_explicit(&s->hit_tokens, sum.n_hit_tokens, memory_order_relaxed);
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
    l->new_samples = false;
    uint64_t t0 = uv_hrtime();
    for (int m = 0; m < l->n_models; m++)
        sample_model(l, m);
    l->sample_ns += uv_hrtime() - t0;
    return true;
}

/* ---- the worker */

/* False: it cannot end before its shares are back. */
static bool cancel_task(struct tb_lane *l, struct tb_task *t)
{
    if (t->type != TB_TASK_SHARE && t->spread && !spread_go_on(l, t)) return false;
    tb_error_set(tb_task_error(t), TB_ECANCELED, "the server is shutting down");
    if (is_train(t)) {
        if (t->type == TB_TASK_SHARE) {
            tb_training_destroy(t->training);
            t->training = NULL;
        }
        end_training(l, t);
    } else {
        tb_list_del(&t->node);
        finish(l, t);
    }
    return true;
}

static void fail_all(struct tb_lane *l)
{
    TB_LIST_FOREACH_SAFE (it, next, &l->samples) {
        struct tb_task *t = TB_LIST_ENTRY(it, struct tb_task, node);
        tb_error_set(&t->op->error, TB_ECANCELED, "the server is shutting down");
        end_sample(l, t);
    }
    tb_list_move(&l->ready, &l->waiting);
    TB_LIST_FOREACH_SAFE (it, next, &l->ready) {
        struct lane_adapter *a = TB_LIST_ENTRY(it, struct lane_adapter, node);
        struct tb_task *t;
        while ((t = head(a)) && cancel_task(l, t))
            ;
        tb_list_del(&a->node);
        if (t) tb_list_push(&l->waiting, &a->node);
        a->waits = t != NULL;
    }
}

void lane_run(struct tb_lane *l)
{
    tb_backend_use(l->be, TB_QUEUE_TRAIN);
    for (;;) {
        bool did = take_inbox(l);
        if (lane_is_closing(l)) {
            fail_all(l);
            return;
        }
        did |= small_turn(l);
        bool sampling = l->n_samples > 0;
        bool trained = train_turn(l, sampling && l->sample_ns < l->train_ns);
        if (trained) take_inbox(l);
        bool go_on = trained && l->train_ns < l->sample_ns && !l->new_samples;
        bool sampled = !go_on && sample_turn(l);
        /* Who has nothing to do gets no credit for it. */
        if (!trained && tb_list_empty(&l->ready)) l->sample_ns = TB_MIN(l->sample_ns, l->train_ns);
        if (!sampling) l->train_ns = TB_MIN(l->train_ns, l->sample_ns);
        lane_note_pages(l);
        lane_note_memory(l);
        /* What is ready and cannot go on waits for the memory of those that wait for shares. */
        bool idle = tb_list_empty(&l->ready) || !tb_list_empty(&l->waiting);
        if (!did && !trained && !sampled && idle && tb_mailbox_empty(&l->inbox)) return;
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
