/*
 * Feeds: the ends of a sampler's samples in their order, for clients that wait for thousands of
 * them with one long poll. An event is the future itself, linked by in_feed: it costs no memory,
 * and goes when it is acknowledged or when its result expires. A feed is made by the first end or
 * the first poll, and goes with its sampler. Thread: the loop's.
 */
#include <string.h>

#include "core/core_internal.h"
#include "util/clock.h"
#include "util/mem.h"

static struct tb_core_feed *feed_find(const struct tb_core_sampler *sp, int64_t clone)
{
    TB_LIST_FOREACH (n, &sp->feeds) {
        struct tb_core_feed *d = TB_LIST_ENTRY(n, struct tb_core_feed, in_sampler);
        if (d->clone == clone) return d;
    }
    return NULL;
}

static struct tb_core_feed *feed_get(struct tb_core_sampler *sp, int64_t clone)
{
    struct tb_core_feed *d = feed_find(sp, clone);
    if (d) return d;
    d = tb_calloc(1, sizeof(*d));
    d->core = sp->core;
    d->sampler = sp;
    d->clone = clone;
    tb_list_init(&d->in_changed);
    tb_list_init(&d->events);
    tb_list_init(&d->waiters);
    tb_list_push(&sp->feeds, &d->in_sampler);
    return d;
}

static void feed_changed(struct tb_core_feed *d)
{
    tb_list_del(&d->in_changed);
    tb_list_push(&d->core->changed, &d->in_changed);
}

void tb_feed_add(struct tb_core_sampler *sp, struct tb_future *f)
{
    if (sp->ended) return;
    struct tb_core_feed *d = feed_get(sp, f->seq / TB_CLONE_BLOCK);
    f->cursor = ++d->cursor;
    tb_list_push(&d->events, &f->in_feed);
    if (!tb_list_empty(&d->waiters)) feed_changed(d);
}

void tb_feeds_end(struct tb_core_sampler *sp)
{
    for (struct tb_list *n; (n = tb_list_pop(&sp->feeds));) {
        struct tb_core_feed *d = TB_LIST_ENTRY(n, struct tb_core_feed, in_sampler);
        while (tb_list_pop(&d->events)) {
        }
        d->sampler = NULL;
        feed_changed(d); /* which frees it */
    }
}

/* ---- answers */

static void unlink_waiter(struct tb_core *c, struct tb_feed_waiter *w)
{
    tb_list_del(&w->node);
    tb_list_del(&w->deadline_node);
    w->feed = NULL;
    c->stats.waiters--;
}

/* Every event that is left lies beyond the cursors of all polls, as each of them acknowledges. */
static void answer(struct tb_core_feed *d, struct tb_feed_waiter *w)
{
    struct tb_error none = {0};
    struct tb_feed_event few[16] = {{0}}, *ev = few;
    size_t n = 0, cap = TB_ARRAY_LEN(few);
    uint64_t cursor = w->prev;
    TB_LIST_FOREACH (it, &d->events) {
        const struct tb_future *f = TB_LIST_ENTRY(it, struct tb_future, in_feed);
        if (n == TB_MAX_FEED_EVENTS) break;
        if (n == cap) {
            cap *= 2;
            struct tb_feed_event *more = tb_malloc(cap * sizeof(*more));
            memcpy(more, ev, n * sizeof(*more));
            if (ev != few) tb_free(ev);
            ev = more;
        }
        ev[n++] = (struct tb_feed_event){f->id, f->op};
        cursor = f->cursor;
    }
    w->cb(w, &none, ev, n, cursor);
    if (ev != few) tb_free(ev);
}

static int no_sampler(const char *id, struct tb_error *err)
{
    if (tb_sampler_id_well_formed(id))
        return tb_error_set(err, TB_EGONE, "sampling session %.200s has ended", id);
    return tb_error_set(err, TB_ENOTFOUND, "there is no sampling session '%.200s'", id);
}

static void answer_ended(struct tb_feed_waiter *w)
{
    struct tb_error e;
    tb_error_set(&e, TB_EGONE, "the sampling session has ended");
    w->cb(w, &e, NULL, 0, w->prev);
}

void tb_feeds_answer(struct tb_core *c)
{
    for (struct tb_list *n; (n = tb_list_pop(&c->changed));) {
        struct tb_core_feed *d = TB_LIST_ENTRY(n, struct tb_core_feed, in_changed);
        while (!tb_list_empty(&d->waiters)) {
            struct tb_feed_waiter *w = TB_LIST_ENTRY(d->waiters.next, struct tb_feed_waiter, node);
            if (d->sampler && tb_list_empty(&d->events)) break;
            unlink_waiter(c, w);
            if (d->sampler)
                answer(d, w);
            else
                answer_ended(w);
        }
        if (d->sampler) continue;
        tb_list_del(&d->in_changed); /* it may have ended in one of the calls */
        tb_free(d);
    }
}

static void on_timer(uv_timer_t *t);

static void arm_timer(struct tb_core *c)
{
    if (c->closed || tb_list_empty(&c->feed_waiters)) return;
    struct tb_feed_waiter *w =
        TB_LIST_ENTRY(c->feed_waiters.next, struct tb_feed_waiter, deadline_node);
    uint64_t now = tb_clock_ms();
    uv_timer_start(&c->feed_timer, on_timer, w->deadline_ms > now ? w->deadline_ms - now : 1, 0);
}

static void end_waits(struct tb_core *c, uint64_t until_ms)
{
    while (!tb_list_empty(&c->feed_waiters)) {
        struct tb_feed_waiter *w =
            TB_LIST_ENTRY(c->feed_waiters.next, struct tb_feed_waiter, deadline_node);
        if (w->deadline_ms > until_ms) break;
        struct tb_core_feed *d = w->feed;
        unlink_waiter(c, w);
        answer(d, w);
    }
}

static void on_timer(uv_timer_t *t)
{
    struct tb_core *c = t->data;
    end_waits(c, tb_clock_ms());
    arm_timer(c);
    tb_core_leave(c);
}

void tb_feeds_all_pending(struct tb_core *c)
{
    end_waits(c, UINT64_MAX);
}

/* ---- polls */

static void acknowledge(struct tb_core_feed *d, uint64_t cursor)
{
    while (!tb_list_empty(&d->events)) {
        struct tb_future *f = TB_LIST_ENTRY(d->events.next, struct tb_future, in_feed);
        if (f->cursor > cursor) break;
        tb_list_del(&f->in_feed);
    }
}

void tb_core_feed_wait(struct tb_core *c, struct tb_tenant *who, const char *sampler_id,
                       int64_t clone, uint64_t prev, uint64_t timeout_ms, struct tb_feed_waiter *w)
{
    tb_list_init(&w->node);
    tb_list_init(&w->deadline_node);
    w->feed = NULL;
    w->prev = prev;
    struct tb_core_sampler *sp = tb_sampler_find(c, who, sampler_id);
    if (!sp) {
        struct tb_error e = {0};
        /* Without a wait a client only says what it has read, maybe while its session ends. */
        if (timeout_ms > 0 || !tb_sampler_id_well_formed(sampler_id)) no_sampler(sampler_id, &e);
        w->cb(w, &e, NULL, 0, prev);
        return;
    }
    tb_session_seen(sp->session);
    sp->used_ms = tb_clock_ms();
    struct tb_core_feed *d = feed_get(sp, clone);
    w->prev = TB_MIN(prev, d->cursor);
    acknowledge(d, w->prev);
    if (!tb_list_empty(&d->events) || timeout_ms == 0 || c->draining) {
        answer(d, w);
        return;
    }
    w->feed = d;
    w->deadline_ms = tb_clock_ms() + TB_MIN(timeout_ms, c->o.long_poll_ms);
    tb_list_push(&d->waiters, &w->node);
    struct tb_list *at = &c->feed_waiters; /* nearly always the last */
    while (at->prev != &c->feed_waiters &&
           TB_LIST_ENTRY(at->prev, struct tb_feed_waiter, deadline_node)->deadline_ms >
               w->deadline_ms)
        at = at->prev;
    tb_list_push(at, &w->deadline_node);
    c->stats.waiters++;
    if (c->feed_waiters.next == &w->deadline_node) arm_timer(c);
}

void tb_core_feed_unwait(struct tb_core *c, struct tb_feed_waiter *w)
{
    if (w->feed) unlink_waiter(c, w);
}

void tb_core_retrieved(struct tb_core *c, struct tb_tenant *who, const char *request_id,
                       size_t id_len)
{
    struct tb_future *f = tb_future_find_of(c, who, request_id, id_len);
    if (!f || f->phase != TB_PHASE_OVER || f->op->type != TB_OP_SAMPLE || f->drop) return;
    tb_future_drop(f);
}

/* ---- clients of one sampler */

int tb_core_join_sampling_session(struct tb_core *c, struct tb_tenant *who, const char *sampler_id,
                                  int64_t *clone, struct tb_error *err)
{
    struct tb_core_sampler *sp = tb_sampler_find(c, who, sampler_id);
    if (!sp) return no_sampler(sampler_id, err);
    tb_session_seen(sp->session);
    sp->used_ms = tb_clock_ms();
    do /* some clients choose their block themselves */
        *clone = ++sp->next_clone;
    while (feed_find(sp, *clone));
    return 0;
}
