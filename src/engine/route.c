/*
 * Homes of adapters and versions, and the choice among replicas. See route.h.
 */
#include "engine/route.h"

#include "engine/mirror.h"
#include "util/limits.h"
#include "util/mem.h"

#define KEY(id) (const char *)&(id), sizeof(id)

void route_init(struct route *r, int n_models, int n_lanes, uint64_t mirror_tokens)
{
    r->mirror_tokens = mirror_tokens;
    r->n_models = n_models;
    r->n_lanes = n_lanes;
    r->stride = TB_MAX(TB_MIN(n_models, n_lanes), 1);
    r->lanes = tb_calloc((size_t)n_lanes, sizeof(*r->lanes));
    tb_map_init(&r->adapters);
    tb_map_init(&r->versions);
}

static void free_homes(struct tb_map *homes)
{
    size_t it = 0, len;
    const char *key;
    void *home;
    while (tb_map_next(homes, &it, &key, &len, &home)) {
        mirrors_free(home);
        tb_free(home);
    }
    tb_map_fini(homes);
}

void route_fini(struct route *r)
{
    free_homes(&r->adapters);
    free_homes(&r->versions);
    tb_free(r->lanes);
}

/* ---- replicas */

struct route_lane *route_first(const struct route *r, int model)
{
    return &r->lanes[model % r->stride];
}

/* The replica that lives and has the least; of equals the first. When none lives, any. */
static struct route_lane *least(const struct route *r, int model, enum route_count what)
{
    struct route_lane *best = NULL;
    for (int i = model % r->stride; i < r->n_lanes; i += r->stride) {
        struct route_lane *l = &r->lanes[i];
        if (lane_is_lost(l->lane)) continue;
        if (!best || l->counts[what] < best->counts[what]) best = l;
    }
    return best ? best : route_first(r, model);
}

/* ---- homes */

static enum route_count kind_of(const struct route *r, const struct tb_map *homes)
{
    return homes == &r->adapters ? ROUTE_ADAPTERS : ROUTE_VERSIONS;
}

static struct route_home *find(const struct tb_map *homes, uint64_t id, int model)
{
    struct route_home *h = tb_map_get(homes, KEY(id));
    return h && h->model == model ? h : NULL;
}

/* The task changes what lives there. */
static struct route_lane *change(struct route_home *h, struct tb_task *t)
{
    mirrors_end(h);
    h->n_changing++;
    t->home = h;
    return h->at;
}

/* The task makes what has this id, at its home or, if it has none, there. */
static struct route_lane *make(struct route *r, struct tb_map *homes, uint64_t id,
                               struct route_lane *there, struct tb_task *t)
{
    struct route_home *h = tb_map_get(homes, KEY(id));
    if (!h) {
        h = tb_calloc(1, sizeof(*h));
        *h = (struct route_home){.id = id, .model = t->model, .at = there};
        tb_list_init(&h->mirrors);
        tb_map_put(homes, KEY(h->id), h);
        there->counts[kind_of(r, homes)]++;
    }
    return change(h, t);
}

/* The task ends what has this id, if it is known. */
static struct route_lane *end(struct route *r, const struct tb_map *homes, uint64_t id,
                              struct tb_task *t)
{
    struct route_home *h = find(homes, id, t->model);
    return h ? change(h, t) : route_first(r, t->model);
}

static void end_change(struct route *r, struct tb_map *homes, struct tb_task *t, bool there)
{
    struct route_home *h = t->home;
    t->home = NULL;
    if (!tb_task_error(t)->code) {
        TB_BUG_ON(h->at != t->at); /* an id is one adapter's, or one checkpoint's */
        h->there = there;
    }
    if (--h->n_changing || h->there) return;
    h->at->counts[kind_of(r, homes)]--;
    tb_map_del(homes, KEY(h->id));
    tb_free(h);
}

/* ---- tasks */

static bool has_model(const struct route *r, const struct tb_task *t)
{
    return t->model >= 0 && t->model < r->n_models;
}

/* Tokens that a sample may draw. It is not checked yet: the lane refuses what makes no sense. */
static uint64_t drawn_by(const struct route *r, const struct tb_task *t)
{
    const struct tb_sample *s = &t->op->u.sample;
    int most = tb_model_info(route_first(r, t->model)->lane->models[t->model])->max_context;
    int n = TB_MIN(TB_MAX(s->n_samples, 1), TB_MAX_SAMPLES);
    int tokens = s->max_tokens < 0 ? most : TB_MIN(s->max_tokens, most);
    return (uint64_t)n * (uint64_t)tokens;
}

static struct route_lane *home_of(const struct route *r, const struct tb_map *homes, uint64_t id,
                                  int model)
{
    const struct route_home *h = find(homes, id, model);
    return h ? h->at : route_first(r, model);
}

static struct route_lane *lane_of(struct route *r, struct tb_task *t)
{
    int m = t->model;
    if (!has_model(r, t)) return &r->lanes[0]; /* which refuses it */
    switch (t->type) {
    case TB_TASK_ADAPTER_CREATE:
    case TB_TASK_ADAPTER_LOAD:
        if (t->type == TB_TASK_ADAPTER_LOAD && !t->create)
            return home_of(r, &r->adapters, t->adapter_id, m);
        return make(r, &r->adapters, t->adapter_id, least(r, m, ROUTE_ADAPTERS), t);
    case TB_TASK_ADAPTER_FREE: return end(r, &r->adapters, t->adapter_id, t);
    case TB_TASK_PUBLISH: {
        struct route_lane *at = home_of(r, &r->adapters, t->adapter_id, m);
        (void)make(r, &r->versions, t->version_id, at, t);
        return at;
    }
    case TB_TASK_VERSION_LOAD:
        return make(r, &r->versions, t->version_id, least(r, m, ROUTE_VERSIONS), t);
    case TB_TASK_VERSION_FREE: return end(r, &r->versions, t->version_id, t);
    case TB_TASK_LOSS_CREATE:
    case TB_TASK_LOSS_FREE: return route_first(r, m);
    case TB_TASK_SAMPLE: return t->version_id ? route_first(r, m) : least(r, m, ROUTE_SAMPLING);
    default: return home_of(r, &r->adapters, t->adapter_id, m);
    }
}

void route_assign(struct route_lane *l, struct tb_task *sample)
{
    if (sample->at) sample->at->counts[ROUTE_SAMPLING] -= sample->n_drawn;
    sample->at = l;
    l->counts[ROUTE_SAMPLING] += sample->n_drawn;
}

void route_submit(struct route *r, struct tb_task *t)
{
    struct route_home *h = NULL;
    if (t->type == TB_TASK_SAMPLE && has_model(r, t)) {
        t->n_drawn = drawn_by(r, t);
        h = find(&r->versions, t->version_id, t->model);
    }
    if (h) {
        mirror_submit(r, h, t);
    } else {
        route_assign(lane_of(r, t), t);
        lane_submit(t->at->lane, t);
    }
}

void route_done(struct route *r, struct tb_task *t)
{
    bool of_version = t->type == TB_TASK_PUBLISH || t->type == TB_TASK_VERSION_LOAD ||
                      t->type == TB_TASK_VERSION_FREE;
    bool ends = t->type == TB_TASK_ADAPTER_FREE || t->type == TB_TASK_VERSION_FREE;
    if (t->at) t->at->counts[ROUTE_SAMPLING] -= t->n_drawn;
    if (t->home) end_change(r, of_version ? &r->versions : &r->adapters, t, !ends);
    t->at = NULL;
}
