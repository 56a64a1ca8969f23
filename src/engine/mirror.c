/*
 * Mirrors of versions on other replicas. See mirror.h.
 */
#include "engine/mirror.h"

#include "util/log.h"
#include "util/mem.h"

enum mirror_state { COMING, THERE, FAILED };

struct mirror {
    struct tb_list node; /* among its home's */
    struct route *route;
    uint64_t id; /* of the version */
    int model;
    struct route_lane *from, *at;
    enum mirror_state state;
    bool ended;             /* its home knows it no more */
    bool lent;              /* a task of the loan is under way */
    bool borrows;           /* `at` has been asked to borrow */
    struct tb_list waiting; /* samples */
    struct tb_loan loan;
};

/* ---- samples that wait */

static void keep_waiting(struct mirror *m, struct tb_task *t)
{
    t->mirror = m;
    m->route->n_waiting++;
    tb_list_push(&m->waiting, &t->node);
}

static void go(struct route_lane *l, struct tb_task *t)
{
    t->mirror->route->n_waiting--;
    t->mirror = NULL;
    tb_list_del(&t->node);
    route_assign(l, t);
    lane_submit(l->lane, t);
}

static void go_all(struct mirror *m, struct route_lane *l)
{
    while (!tb_list_empty(&m->waiting))
        go(l, TB_LIST_ENTRY(m->waiting.next, struct tb_task, node));
}

void mirror_cancel(struct tb_task *sample)
{
    if (sample->mirror) go(sample->mirror->from, sample);
}

/* ---- the loan */

static void free_ended(struct mirror *m)
{
    if (m->ended && !m->lent) tb_free(m);
}

static void settle(struct mirror *m, const struct tb_error *err)
{
    if (m->ended) return;
    m->state = err->code ? FAILED : THERE;
    go_all(m, err->code ? m->from : m->at);
    if (err->code)
        tb_log(TB_LOG_WARN, "engine", "a version cannot be copied to another device: %s", err->msg);
}

static void submit(struct mirror *m, struct route_lane *l, enum tb_task_type type,
                   void (*done)(struct tb_task *t))
{
    struct tb_task *t = tb_task_create(type);
    t->model = m->model;
    t->version_id = m->id;
    t->loan = &m->loan;
    t->cb = done;
    t->arg = m;
    lane_submit(l->lane, t);
}

static void returned(struct tb_task *t)
{
    struct mirror *m = t->arg;
    tb_task_destroy(t);
    m->lent = false;
    free_ended(m);
}

static void borrowed(struct tb_task *t)
{
    struct mirror *m = t->arg;
    settle(m, &t->error);
    tb_task_destroy(t);
    submit(m, m->from, TB_TASK_RETURN, returned);
}

static void lent(struct tb_task *t)
{
    struct mirror *m = t->arg;
    if (t->error.code) {
        m->lent = false;
        settle(m, &t->error);
        free_ended(m);
    } else if (m->ended || m->route->closing) {
        submit(m, m->from, TB_TASK_RETURN, returned);
    } else {
        m->borrows = true;
        submit(m, m->at, TB_TASK_BORROW, borrowed);
    }
    tb_task_destroy(t);
}

static struct mirror *begin(struct route *r, struct route_home *h, struct route_lane *at)
{
    struct mirror *m = tb_calloc(1, sizeof(*m));
    *m = (struct mirror){
        .route = r, .id = h->id, .model = h->model, .from = h->at, .at = at, .lent = true};
    tb_list_init(&m->waiting);
    tb_list_push(&h->mirrors, &m->node);
    submit(m, m->from, TB_TASK_LEND, lent);
    return m;
}

/* ---- the end */

static void freed(struct tb_task *t)
{
    tb_task_destroy(t);
}

static void end(struct mirror *m)
{
    go_all(m, m->from);
    if (m->borrows && m->state != FAILED && !m->route->closing)
        submit(m, m->at, TB_TASK_VERSION_FREE, freed);
    tb_list_del(&m->node);
    m->ended = true;
    free_ended(m);
}

void mirrors_end(struct route_home *h)
{
    TB_LIST_FOREACH_SAFE (it, next, &h->mirrors) {
        end(TB_LIST_ENTRY(it, struct mirror, node));
    }
}

void mirrors_close(struct route *r)
{
    size_t it = 0, len;
    const char *key;
    void *home;
    r->closing = true;
    while (tb_map_next(&r->versions, &it, &key, &len, &home)) {
        TB_LIST_FOREACH (n, &((struct route_home *)home)->mirrors) {
            struct mirror *m = TB_LIST_ENTRY(n, struct mirror, node);
            go_all(m, m->from);
        }
    }
}

void mirrors_free(struct route_home *h)
{
    for (struct tb_list *n; (n = tb_list_pop(&h->mirrors));)
        tb_free(TB_LIST_ENTRY(n, struct mirror, node));
}

/* ---- the choice */

static struct mirror *find(const struct route_home *h, const struct route_lane *at)
{
    TB_LIST_FOREACH (n, &h->mirrors) {
        struct mirror *m = TB_LIST_ENTRY(n, struct mirror, node);
        if (m->at == at) return m;
    }
    return NULL;
}

static bool draws_less(const struct route_lane *a, const struct route_lane *b)
{
    return !b || a->counts[ROUTE_SAMPLING] < b->counts[ROUTE_SAMPLING];
}

/* Where the sample goes; *m: a mirror, which may be new, or NULL: home. */
static struct route_lane *choose(struct route *r, struct route_home *h, struct mirror **m)
{
    struct route_lane *has = NULL, *could = NULL;
    if (!lane_is_lost(h->at->lane)) has = h->at;
    for (int i = h->model % r->stride; i < r->n_lanes; i += r->stride) {
        struct route_lane *l = &r->lanes[i];
        if (l == h->at || lane_is_lost(l->lane)) continue;
        const struct mirror *there = find(h, l);
        if (!there && draws_less(l, could)) could = l;
        if (there && there->state != FAILED && draws_less(l, has)) has = l;
    }
    if (!has) return h->at;
    bool stable = h->there && !h->n_changing && !lane_is_lost(h->at->lane);
    if (could && stable &&
        could->counts[ROUTE_SAMPLING] + r->mirror_tokens <= has->counts[ROUTE_SAMPLING]) {
        *m = begin(r, h, could);
        return could;
    }
    *m = find(h, has);
    return has;
}

void mirror_submit(struct route *r, struct route_home *h, struct tb_task *sample)
{
    struct mirror *m = NULL;
    struct route_lane *l = r->closing ? h->at : choose(r, h, &m);
    route_assign(l, sample);
    if (m && m->state == COMING)
        keep_waiting(m, sample);
    else
        lane_submit(l->lane, sample);
}
