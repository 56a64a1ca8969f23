/*
 * A lane's loop side: submit, wake-ups, callbacks, close. See lane.h for who owns what.
 */
#include "engine/lane.h"

#include "util/log.h"
#include "util/mem.h"

static void lane_kick(struct tb_lane *l);

/* Calls the callbacks of everything finished, after those of its progress. A callback may submit
 * more. */
static void lane_flush(struct tb_lane *l)
{
    struct tb_list done, told;
    struct tb_list *n;
    tb_list_init(&done);
    tb_list_init(&told);
    tb_mailbox_drain(&l->outbox, &done);
    tb_mailbox_drain(&l->told, &told); /* second: it has all that was told before what is done */
    while ((n = tb_list_pop(&told))) {
        struct tb_progress *p = TB_LIST_ENTRY(n, struct tb_progress, node);
        struct tb_task *t = p->owner;
        if (t->progress) t->progress(t, p);
        tb_free(p);
    }
    while ((n = tb_list_pop(&done))) {
        struct tb_task *t = TB_LIST_ENTRY(n, struct tb_task, node);
        if (t->type < TB_N_SUBMITTED)
            atomic_fetch_add_explicit(&l->stats.tasks_done[t->type], 1, memory_order_relaxed);
        l->done(l->done_arg, t);
    }
}

static void lane_on_async(uv_async_t *a)
{
    struct tb_lane *l = a->data;
    lane_flush(l);
    if (!tb_mailbox_empty(&l->inbox)) lane_kick(l);
}

static void lane_work_cb(uv_work_t *w)
{
    struct tb_lane *l = w->data;
    uint64_t t0 = uv_hrtime();
    lane_run(l);
    atomic_fetch_add_explicit(&l->stats.busy_us, (uv_hrtime() - t0) / 1000, memory_order_relaxed);
}

static void lane_on_closed(uv_handle_t *h)
{
    struct tb_lane *l = h->data;
    lane_flush(l);
    lane_free_state(l);
    for (int i = 0; i < l->n_models; i++)
        tb_model_free(l->models[i]);
    tb_free(l->models);
    tb_free(l->peers);
    tb_free(l->sampling_scratch);
    tb_free(l->parts);
    tb_pager_destroy(l->pager);
    if (l->be) l->be->ops->destroy(l->be);
    tb_mailbox_fini(&l->inbox);
    tb_mailbox_fini(&l->outbox);
    tb_mailbox_fini(&l->told);
    uv_mutex_destroy(&l->memory_lock);
    tb_map_fini(&l->adapters);
    tb_map_fini(&l->versions);
    tb_map_fini(&l->losses);
    void (*cb)(void *) = l->closed_cb;
    void *arg = l->closed_arg;
    tb_free(l);
    if (cb) cb(arg);
}

static void lane_after_work(uv_work_t *w, int status)
{
    struct tb_lane *l = w->data;
    l->working = false;
    lane_flush(l);
    if (l->working) return; /* a callback submitted and restarted the work */
    if (!tb_mailbox_empty(&l->inbox)) {
        lane_kick(l);
        return;
    }
    if (lane_is_closing(l) && l->async_open) l->quiet_cb(l->quiet_arg);
}

static void lane_kick(struct tb_lane *l)
{
    if (l->working) return;
    l->working = true;
    int rc = uv_queue_work(l->loop, &l->work, lane_work_cb, lane_after_work);
    TB_BUG_ON(rc != 0);
}

void lane_note_memory(struct tb_lane *l)
{
    struct tb_memory_stats s = {.limit = l->be->mem_limit, .used = l->be->mem_used};
    struct tb_pager_stats p = {0};
    for (int i = 0; i < l->n_models; i++) {
        if (!l->models[i]) continue;
        struct tb_model_usage u = tb_model_usage(l->models[i]);
        s.weights += u.weights;
        s.adapters += u.adapters;
        s.versions += u.versions;
        s.kv += u.kv;
        s.workspaces += u.workspaces;
        s.n_adapters += (uint64_t)u.n_adapters;
        s.n_versions += (uint64_t)u.n_versions;
        s.adapters_out += (uint64_t)u.adapters_out;
        s.versions_out += (uint64_t)u.versions_out;
    }
    if (l->pager) tb_pager_stats(l->pager, &p);
    s.page_ins = p.page_ins;
    s.page_outs = p.page_outs;
    uv_mutex_lock(&l->memory_lock);
    l->memory = s;
    uv_mutex_unlock(&l->memory_lock);
}

int lane_create(struct tb_lane **out, uv_loop_t *loop, struct tb_backend *be,
                struct tb_pager *pager, struct tb_model **models, int n_models,
                void (*done)(void *arg, struct tb_task *t), void *arg, struct tb_error *err)
{
    struct tb_lane *l = tb_calloc(1, sizeof(*l));
    int rc;
    l->loop = loop;
    l->work.data = l;
    if ((rc = tb_mailbox_init(&l->inbox))) goto fail;
    if ((rc = tb_mailbox_init(&l->outbox))) goto fail_inbox;
    if ((rc = tb_mailbox_init(&l->told))) goto fail_outbox;
    if ((rc = uv_mutex_init(&l->memory_lock))) goto fail_told;
    if ((rc = uv_async_init(loop, &l->async, lane_on_async))) goto fail_lock;
    l->async.data = l;
    l->async_open = true;
    tb_map_init(&l->adapters);
    tb_map_init(&l->versions);
    tb_map_init(&l->losses);
    tb_list_init(&l->ready);
    tb_list_init(&l->waiting);
    tb_list_init(&l->samples);
    l->be = be;
    l->pager = pager;
    l->models = models;
    l->n_models = n_models;
    l->done = done;
    l->done_arg = arg;
    l->parts = tb_malloc((size_t)be->sizes.train_rows * sizeof(*l->parts));
    lane_note_pages(l);
    lane_note_memory(l);
    *out = l;
    return 0;

fail_lock:
    uv_mutex_destroy(&l->memory_lock);
fail_told:
    tb_mailbox_fini(&l->told);
fail_outbox:
    tb_mailbox_fini(&l->outbox);
fail_inbox:
    tb_mailbox_fini(&l->inbox);
fail:
    tb_free(l);
    return tb_error_set(err, rc, "cannot create an engine lane: %s", uv_strerror(rc));
}

void lane_submit(struct tb_lane *l, struct tb_task *t)
{
    TB_BUG_ON(!l->async_open);
    atomic_fetch_add_explicit(&l->stats.work[lane_work_of(t->type)].waiting, 1,
                              memory_order_relaxed);
    tb_mailbox_post(&l->inbox, &t->node);
    lane_kick(l);
}

void lane_post_done(struct tb_lane *l, struct tb_task *t)
{
    if (tb_mailbox_post(&l->outbox, &t->node)) uv_async_send(&l->async);
}

void lane_post_progress(struct tb_lane *l, struct tb_task *t, struct tb_progress *p)
{
    p->owner = t;
    if (tb_mailbox_post(&l->told, &p->node)) uv_async_send(&l->async);
}

void lane_set_peers(struct tb_lane *l, struct tb_lane *const *peers, int n)
{
    l->peers = tb_malloc((size_t)TB_MAX(n, 1) * sizeof(struct tb_lane *));
    l->n_peers = n;
    for (int i = 0; i < n; i++)
        l->peers[i] = peers[i];
}

void lane_send(struct tb_lane *l, struct tb_task *t)
{
    if (tb_mailbox_post(&l->inbox, &t->node)) uv_async_send(&l->async);
}

void lane_close(struct tb_lane *l, void (*quiet)(void *arg), void *arg)
{
    l->quiet_cb = quiet;
    l->quiet_arg = arg;
    atomic_store(&l->closing, true);
    lane_kick(l); /* when work is in flight, lane_after_work sees closing */
}

bool lane_is_quiet(struct tb_lane *l)
{
    return lane_is_closing(l) && !l->working && tb_mailbox_empty(&l->inbox) &&
           tb_mailbox_empty(&l->outbox);
}

void lane_end(struct tb_lane *l, void (*cb)(void *arg), void *arg)
{
    l->closed_cb = cb;
    l->closed_arg = arg;
    l->async_open = false;
    uv_close((uv_handle_t *)&l->async, lane_on_closed);
}
