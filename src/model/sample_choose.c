/*
 * Which sequences advance in a step of sampling, with how many rows and which pages
 * (sample_step.h).
 *
 * Sequences that decode advance by a row each; the rows for prompts are shared equally by the
 * tenants that have prompts, and a tenant's by its sessions, so a hundred long ones of one do not
 * hold up a short one of another.
 *
 * Running sequences take pages in a fixed order of precedence: older sampling first, prompt before
 * samples, lower sample first. One that decodes may take the pages of one that comes later, which
 * is then computed again from its tokens. A waiting one only takes free pages, tenants with few
 * pages first, and nobody who waits overtakes it. Pages that are kept for later prompts and not in
 * use are as good as free. So the first running sequence advances, and with nobody running the
 * first waiting one fits.
 *
 * Weights of samplings are in memory for the length of a step. When there is no room for all of
 * them, some leave the step out, first those that hold no pages, of these the latest; and a step
 * has as many rows as its buffers find room.
 *
 * Owner: nothing. Thread: the model's.
 */
#include <stdlib.h>
#include <string.h>

#include "model/sample_step.h"
#include "util/mem.h"

#define TB_FEW_ROWS 256 /* of prompts: who has room for them is not left out */

struct tb_step_fill { /* a sequence with more to compute than the token it drew last */
    struct tb_seq *q;
    int order, n; /* of precedence; rows granted */
};

struct tb_step_turn { /* a session's fills */
    uint64_t tenant, session;
    struct tb_step_fill *next, *end;
    int order;                 /* of the first */
    int n_held, n_tenant_held; /* pages of its sequences; of all of its tenant's */
};

/* ---- pages */

/* The last running sequence in the order of precedence, if it comes after q. */
static struct tb_seq *find_victim(struct tb_model *m, const struct tb_seq *q)
{
    for (struct tb_list *it = m->samplings.prev; it != &m->samplings; it = it->prev) {
        struct tb_sampling *s = TB_LIST_ENTRY(it, struct tb_sampling, node);
        for (int i = s->req->n_samples - 1; i >= -1; i--) {
            struct tb_seq *v = i < 0 ? &s->root : &s->seqs[i];
            if (v == q) return NULL;
            if (v->state == TB_SEQ_RUNNING && v->n_pages) return v;
        }
    }
    return NULL;
}

static int32_t take_page(struct tb_model *m, const struct tb_seq *q)
{
    for (;;) {
        int32_t page = tb_kv_take(&m->kv);
        struct tb_seq *v = page < 0 ? find_victim(m, q) : NULL;
        if (!v) return page;
        tb_seq_release(v);
        v->state = TB_SEQ_WAITING;
        m->kv.n_preempted++;
    }
}

/* Pages for the next n positions of a running sequence, the first of them its own. */
static bool need_pages(struct tb_model *m, struct tb_seq *q, int n)
{
    int first = q->n_kv / TB_KV_PAGE, want = tb_kv_pages_for((int64_t)q->n_kv + n);
    if (!tb_seq_reserve_pages(q, want)) return false;
    if (first < q->n_pages && m->kv.refs[q->pages[first]] > 1) {
        int32_t page = take_page(m, q);
        if (page < 0) return false;
        int32_t old = q->pages[first];
        if (m->kv.refs[old] == 1) { /* whoever shared it was sent away */
            tb_kv_unref(&m->kv, page);
        } else {
            tb_kv_copy_page(&m->kv, m, page, old);
            tb_kv_unref(&m->kv, old);
            q->pages[first] = page;
        }
    }
    while (q->n_pages < want) {
        int32_t page = take_page(m, q);
        if (page < 0) return false;
        q->pages[q->n_pages++] = page;
    }
    return true;
}

/* Whether the next full page of a waiting prompt, after those that it has found, is being computed
 * for another prompt: then it is worth waiting for. */
static bool page_is_coming(const struct tb_model *m, const struct tb_seq *q, int limit)
{
    int at = q->n_pages, end = (at + 1) * TB_KV_PAGE;
    if (end > limit || m->kv.no_reuse) return false;
    TB_LIST_FOREACH (it, &m->samplings) {
        const struct tb_sampling *s = TB_LIST_ENTRY(it, struct tb_sampling, node);
        const struct tb_seq *r = &s->root;
        if (r->state != TB_SEQ_RUNNING || s->forked || s->version != q->s->version ||
            s->op->tenant != q->s->op->tenant)
            continue;
        if (r->n_kv >= end || s->n_prompt < end || (at && r->pages[at - 1] != q->pages[at - 1]))
            continue;
        if (!memcmp(s->req->prompt + at * TB_KV_PAGE, q->s->req->prompt + at * TB_KV_PAGE,
                    TB_KV_PAGE * sizeof(*s->req->prompt)))
            return true;
    }
    return false;
}

enum admission { ADMITTED, LATER, NO_ROOM };

/* Gives a waiting sequence all pages of its tokens, kept ones as far as they hold its tokens and
 * the rest from the free ones, leaving those that run one each. The rows from the first scored one
 * on, or the last row, are computed in any case. */
static enum admission admit(struct tb_model *m, struct tb_seq *q, int n_running)
{
    int want = tb_kv_pages_for(tb_seq_tokens(q));
    int limit = q->index < 0 ? q->s->score_from : tb_seq_tokens(q) - 1;
    if (!tb_seq_reserve_pages(q, want)) return NO_ROOM;
    tb_seq_find_pages(q, limit);
    int fresh = want - q->n_pages, room = tb_kv_room(&m->kv);
    bool later = q->index < 0 && page_is_coming(m, q, limit);
    if (later || (room < fresh + n_running && !(n_running == 0 && room >= fresh))) {
        tb_seq_release(q);
        return later ? LATER : NO_ROOM;
    }
    while (q->n_pages < want)
        q->pages[q->n_pages++] = tb_kv_take(&m->kv);
    q->state = TB_SEQ_RUNNING;
    if (!q->s->admitted) {
        q->s->op->result.prompt_cache_hit_tokens = q->n_kv;
        m->kv.n_hit_tokens += q->n_kv;
        m->kv.n_lookup_tokens += q->s->n_prompt;
    }
    q->s->admitted = true;
    return ADMITTED;
}

/* ---- weights */

static size_t step_bytes(struct tb_model *m, int T, int ru)
{
    return tb_pass_bytes(m, TB_PASS_INFER, false, T, ru);
}

static bool holds_pages(const struct tb_sampling *s)
{
    if (s->root.n_pages) return true;
    for (int i = 0; i < s->req->n_samples; i++)
        if (s->seqs[i].n_pages) return true;
    return false;
}

/* Holds a sampling's weights beside those held before, if there is room for the rows too; the first
 * one fails when it cannot. */
static void hold_one(struct tb_step *st, struct tb_sampling *s)
{
    struct tb_backend *be = st->m->be;
    struct tb_error err = {0};
    if (s->version) {
        int ru = TB_MAX(st->ru, s->version->layout->config.rank);
        size_t need = tb_version_idle_bytes(s->version), room = tb_backend_room(be);
        int rows = st->rows - st->budget + TB_MIN(st->budget, TB_FEW_ROWS);
        if (st->n_ready && need && room < SIZE_MAX &&
            (need > room || step_bytes(st->m, rows, ru) > room - need))
            return;
        if (tb_version_hold(s->version, &err)) {
            tb_sampling_fail(s, err.code, err.msg);
            return;
        }
        st->ru = ru;
    }
    s->ready = true;
    st->rows += s->req->n_samples;
    st->n_ready++;
}

void tb_step_hold_weights(struct tb_step *st)
{
    struct tb_model *m = st->m;
    bool blocked = false;
    st->rows = st->budget;
    TB_LIST_FOREACH (it, &m->samplings) {
        struct tb_sampling *s = TB_LIST_ENTRY(it, struct tb_sampling, node);
        if (s->chosen && !s->done && holds_pages(s)) hold_one(st, s);
    }
    TB_LIST_FOREACH (it, &m->samplings) {
        struct tb_sampling *s = TB_LIST_ENTRY(it, struct tb_sampling, node);
        if (!s->chosen || s->done || s->ready || blocked || holds_pages(s)) continue;
        hold_one(st, s);
        blocked = !s->ready && !s->done; /* nobody who waits overtakes it */
    }
    size_t room = tb_backend_room(m->be);
    while (st->rows > 1 && room < SIZE_MAX && step_bytes(m, st->rows, st->ru) > room)
        st->rows /= 2;
}

void tb_step_release_weights(struct tb_sampling *const *s, int n)
{
    for (int i = 0; i < n; i++) {
        if (s[i]->ready && s[i]->version) tb_version_release(s[i]->version);
        s[i]->ready = false;
    }
}

/* ---- choosing */

static void add_entry(struct tb_step *st, struct tb_seq *q, int n)
{
    if (st->n == st->cap) {
        st->cap = st->cap ? st->cap * 2 : 64;
        st->entries = tb_realloc(st->entries, (size_t)st->cap * sizeof(*st->entries));
    }
    st->entries[st->n] = (struct tb_step_entry){
        .q = q, .n = n, .order = st->n, .last = q->n_kv + n == tb_seq_tokens(q)};
    st->n++;
    st->T += n;
}

/* Calls fn for what may advance in this step: prompts, then their samples, in the order of
 * precedence. */
static void for_each_open(struct tb_step *st, void (*fn)(struct tb_step *st, struct tb_seq *q))
{
    TB_LIST_FOREACH (it, &st->m->samplings) {
        struct tb_sampling *s = TB_LIST_ENTRY(it, struct tb_sampling, node);
        if (!s->ready || s->done) continue;
        if (!s->forked) fn(st, &s->root);
        for (int i = 0; s->forked && i < s->req->n_samples; i++)
            if (s->seqs[i].state != TB_SEQ_DONE) fn(st, &s->seqs[i]);
    }
}

static bool decodes(const struct tb_seq *q)
{
    return q->state == TB_SEQ_RUNNING && q->n_kv > 0 && tb_seq_tokens(q) - q->n_kv == 1;
}

static void add_decode(struct tb_step *st, struct tb_seq *q)
{
    if (decodes(q) && st->T < st->rows && need_pages(st->m, q, 1)) add_entry(st, q, 1);
}

static void add_fill(struct tb_step *st, struct tb_seq *q)
{
    if (q->state == TB_SEQ_RUNNING) st->n_running++;
    if (decodes(q)) return;
    if (st->n_fills == st->cap_fills) {
        st->cap_fills = st->cap_fills ? st->cap_fills * 2 : 64;
        st->fills = tb_realloc(st->fills, (size_t)st->cap_fills * sizeof(*st->fills));
    }
    st->fills[st->n_fills] = (struct tb_step_fill){q, st->n_fills, 0};
    st->n_fills++;
}

/* By session; of one session those that run first, then the oldest. */
static int by_session(const void *a, const void *b)
{
    const struct tb_step_fill *x = a, *y = b;
    uint64_t sx = x->q->s->op->share, sy = y->q->s->op->share;
    if (sx != sy) return sx < sy ? -1 : 1;
    bool wx = x->q->state == TB_SEQ_WAITING, wy = y->q->state == TB_SEQ_WAITING;
    return wx != wy ? wx - wy : x->order - y->order;
}

static void add_turns(struct tb_step *st)
{
    qsort(st->fills, (size_t)st->n_fills, sizeof(*st->fills), by_session);
    st->turns = tb_calloc((size_t)st->n_fills, sizeof(*st->turns));
    for (int i = 0; i < st->n_fills; i++) {
        struct tb_step_fill *f = &st->fills[i];
        const struct tb_op *op = f->q->s->op;
        if (!st->n_turns || st->turns[st->n_turns - 1].session != op->share)
            st->turns[st->n_turns++] = (struct tb_step_turn){
                .tenant = op->tenant, .session = op->share, .next = f, .order = f->order};
        st->turns[st->n_turns - 1].end = f + 1;
    }
}

static void add_held(struct tb_step *st, struct tb_seq *q)
{
    for (int i = 0; i < st->n_turns; i++) {
        struct tb_step_turn *t = &st->turns[i];
        if (t->session == q->s->op->share) t->n_held += q->n_pages;
        if (t->tenant == q->s->op->tenant) t->n_tenant_held += q->n_pages;
    }
}

/* The tenant that holds the fewest pages comes first, and of its sessions the one that does, so
 * that all get pages in turn. A tenant's turns are next to each other. */
static int by_held(const void *a, const void *b)
{
    const struct tb_step_turn *x = a, *y = b;
    if (x->n_tenant_held != y->n_tenant_held) return x->n_tenant_held - y->n_tenant_held;
    if (x->tenant != y->tenant) return x->tenant < y->tenant ? -1 : 1;
    return x->n_held != y->n_held ? x->n_held - y->n_held : x->order - y->order;
}

/* Grants a session up to n rows; returns how many it took. */
static int grant(struct tb_step *st, struct tb_step_turn *t, int n, bool *no_room)
{
    int left = n;
    while (left > 0 && t->next < t->end) {
        struct tb_step_fill *f = t->next;
        enum admission a = ADMITTED;
        if (f->q->state == TB_SEQ_WAITING) {
            a = *no_room ? NO_ROOM : admit(st->m, f->q, st->n_running);
            *no_room |= a == NO_ROOM;
            st->n_running += a == ADMITTED;
        }
        int pending = tb_seq_tokens(f->q) - f->q->n_kv - f->n;
        int rows = a == ADMITTED ? TB_MIN(pending, left) : 0;
        f->n += rows;
        left -= rows;
        if (rows < pending && a == ADMITTED) break;
        t->next++;
    }
    return n - left;
}

/* How many of n turns have rows to compute. */
static int n_open(const struct tb_step_turn *t, int n)
{
    int open = 0;
    for (int i = 0; i < n; i++)
        open += t[i].next < t[i].end;
    return open;
}

/* The turns of t's tenant, t the first. */
static int n_of_tenant(const struct tb_step *st, const struct tb_step_turn *t)
{
    int n = 1, most = (int)(st->turns + st->n_turns - t);
    while (n < most && t[n].tenant == t->tenant)
        n++;
    return n;
}

/* Grants a tenant's turns up to n_rows, the same part to each, and what one does not need to the
 * others; returns how many it took. */
static int grant_tenant(struct tb_step *st, struct tb_step_turn *t, int n, int n_rows,
                        bool *no_room)
{
    int left = n_rows;
    for (int took = 1; left > 0 && took > 0; left -= took) {
        int open = n_open(t, n), part = open ? TB_MAX(left / open, 1) : 0;
        took = 0;
        for (int i = 0; i < n && took < left; i++)
            took += grant(st, &t[i], TB_MIN(part, left - took), no_room);
    }
    return n_rows - left;
}

/* Shares the step's prefill rows: every tenant with tokens to compute gets the same part, and of it
 * each of its sessions; what one does not need goes to the others. Of one session the oldest comes
 * first. When a sequence has to wait for pages, none that waits overtakes it. */
static void share_rows(struct tb_step *st)
{
    bool no_room = false;
    add_turns(st);
    for_each_open(st, add_held);
    qsort(st->turns, (size_t)st->n_turns, sizeof(*st->turns), by_held);
    struct tb_step_turn *t, *end = st->turns + st->n_turns;
    for (int left = TB_MIN(st->budget, st->rows - st->T), took = 1; left > 0 && took > 0;) {
        int open = 0;
        for (t = st->turns; t < end; t += n_of_tenant(st, t))
            open += n_open(t, n_of_tenant(st, t)) > 0;
        int part = open ? TB_MAX(left / open, 1) : 0;
        took = 0;
        for (t = st->turns; t < end && took < left; t += n_of_tenant(st, t))
            took += grant_tenant(st, t, n_of_tenant(st, t), TB_MIN(part, left - took), &no_room);
        left -= took;
    }
}

/* Those that decode come first; what is left of the prompts gets the prefill rows. A
 * prompt that runs has all its pages, so nothing after the decoding ones takes pages from anybody.
 */
void tb_step_choose(struct tb_step *st)
{
    for_each_open(st, add_decode);
    for_each_open(st, add_fill);
    if (st->n_fills) share_rows(st);
    for (int i = 0; i < st->n_fills; i++)
        if (st->fills[i].n) add_entry(st, st->fills[i].q, st->fills[i].n);
}
