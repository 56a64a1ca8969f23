/*
 * States of a grammar, made as they are walked (rules.h). Thread: one at a time.
 */
#include "grammar/rules.h"

#include <stdlib.h>
#include <string.h>

size_t tb_states_bytes(const struct tb_grammar *g)
{
    return g->bytes + (size_t)g->cap_frames * sizeof(*g->frames) +
           (size_t)g->cap_states * sizeof(*g->states) +
           ((size_t)g->members.cap + g->closure.cap + g->queue.cap + g->frame_table.cap +
            g->state_table.cap) *
               sizeof(uint32_t);
}

void tb_states_count(struct tb_grammar *g, size_t bytes)
{
    g->counted += bytes;
    atomic_fetch_add_explicit(&g->vocab->grammar_bytes, bytes, memory_order_relaxed);
}

/* Counts bytes more; false, with failed set, beyond the grammar's limit or that of all. */
static bool take(struct tb_grammar *g, size_t bytes)
{
    const struct tb_vocab *v = g->vocab;
    size_t own = tb_states_bytes(g) + bytes;
    size_t all = atomic_load_explicit(&v->grammar_bytes, memory_order_relaxed) + bytes;
    if (own > TB_GRAMMAR_MAX_BYTES || (own > TB_GRAMMAR_LEAST && all > v->max_grammar_bytes)) {
        g->failed = true;
        return false;
    }
    tb_states_count(g, bytes);
    return true;
}

/* Room for one more of size bytes in an array of n; false beyond the limit. */
static bool grow(struct tb_grammar *g, void **p, uint32_t n, uint32_t *cap, size_t size)
{
    if (n < *cap) return true;
    uint32_t more = *cap ? 2 * *cap : 64;
    if (!take(g, (more - *cap) * size)) return false;
    *p = tb_realloc(*p, more * size);
    *cap = more;
    return true;
}

static bool push(struct tb_grammar *g, struct tb_u32s *v, uint32_t x)
{
    if (!grow(g, (void **)&v->p, v->n, &v->cap, sizeof(*v->p))) return false;
    v->p[v->n++] = x;
    return true;
}

static uint32_t mix(uint32_t h, uint32_t x)
{
    h = (h ^ x) * 0x9e3779b1u;
    return h ^ h >> 15;
}

/* Doubles the table when it is half full; hash gives the hash of entry i. */
static bool table_room(struct tb_grammar *g, struct tb_table *t,
                       uint32_t (*hash)(const struct tb_grammar *g, uint32_t i))
{
    if (2 * (t->n + 1) <= t->cap) return true;
    uint32_t cap = t->cap ? 2 * t->cap : 128;
    if (!take(g, (cap - t->cap) * sizeof(uint32_t))) return false;
    uint32_t *slots = tb_calloc(cap, sizeof(*slots));
    for (uint32_t i = 0; i < t->cap; i++) {
        if (!t->slots[i]) continue;
        uint32_t at = hash(g, t->slots[i]) & (cap - 1);
        while (slots[at])
            at = (at + 1) & (cap - 1);
        slots[at] = t->slots[i];
    }
    tb_free(t->slots);
    t->slots = slots;
    t->cap = cap;
    return true;
}

static uint32_t frame_hash(const struct tb_grammar *g, uint32_t i)
{
    const struct tb_frame *f = &g->frames[i];
    return mix(mix(mix(17, f->node), f->count), f->up);
}

/* The frame "match node, of which count repetitions are done, then go on with up"; 0 (with failed
 * set) beyond the limit. */
static uint32_t frame(struct tb_grammar *g, uint32_t node, uint32_t count, uint32_t up)
{
    if (!table_room(g, &g->frame_table, frame_hash) ||
        !grow(g, (void **)&g->frames, g->n_frames, &g->cap_frames, sizeof(*g->frames)))
        return 0;
    const struct tb_node *n = &g->nodes[node];
    uint64_t own = n->shortest;
    if (n->type == TB_NODE_REPEAT)
        own = count < n->min ? (uint64_t)(n->min - count) * g->nodes[n->a].shortest : 0;
    struct tb_frame f = {.node = node, .count = count, .up = up};
    f.depth = g->frames[up].depth + 1;
    f.rest = (uint32_t)TB_MIN(own + g->frames[up].rest, (uint64_t)TB_GRAMMAR_NEVER);
    struct tb_table *t = &g->frame_table;
    g->frames[g->n_frames] = f;
    uint32_t at = frame_hash(g, g->n_frames) & (t->cap - 1);
    for (; t->slots[at]; at = (at + 1) & (t->cap - 1)) {
        const struct tb_frame *o = &g->frames[t->slots[at]];
        if (o->node == node && o->count == count && o->up == up) return t->slots[at];
    }
    t->slots[at] = g->n_frames;
    t->n++;
    return g->n_frames++;
}

/* Queues frame f, once in a step. */
static void visit(struct tb_grammar *g, uint32_t f)
{
    if (g->frames[f].seen == g->step) return;
    g->frames[f].seen = g->step;
    if (++g->work <= TB_GRAMMAR_MAX_WORK) {
        push(g, &g->queue, f);
        return;
    }
    g->failed = true;
    atomic_store_explicit(&g->too_complex, true, memory_order_relaxed);
}

/* Adds what begins with frame f to the closure: the frames at BYTES that it may come to, and frame
 * 0 when the text may end. In a deep stack only the shortest way is left, so that nesting ends. */
static void expand(struct tb_grammar *g, uint32_t f)
{
    g->queue.n = 0;
    visit(g, f);
    for (uint32_t i = 0; i < g->queue.n; i++) {
        uint32_t at = g->queue.p[i];
        struct tb_frame fr = g->frames[at];
        struct tb_node n = g->nodes[fr.node];
        bool deep = fr.depth > TB_GRAMMAR_MAX_DEPTH;
        uint32_t to[2], n_to = 0;
        if (at == 0 || n.type == TB_NODE_BYTES) {
            push(g, &g->closure, at);
            continue;
        }
        switch (n.type) {
        case TB_NODE_SEQ: {
            uint32_t then = frame(g, n.b, 0, fr.up);
            if (then) to[n_to++] = frame(g, n.a, 0, then);
            break;
        }
        case TB_NODE_ALT: {
            uint32_t a = g->nodes[n.a].shortest, b = g->nodes[n.b].shortest;
            if (!deep || a <= b) to[n_to++] = frame(g, n.a, 0, fr.up);
            if (!deep || a > b) to[n_to++] = frame(g, n.b, 0, fr.up);
            break;
        }
        case TB_NODE_REF: to[n_to++] = frame(g, n.a, 0, fr.up); break;
        case TB_NODE_REPEAT: {
            if (fr.count < n.min || (!deep && fr.count < n.max)) {
                /* counting stops where it no longer matters, so that states repeat */
                uint32_t count = fr.count + 1;
                if (n.max == TB_GRAMMAR_UNBOUNDED) count = TB_MIN(count, n.min);
                uint32_t again = frame(g, fr.node, count, fr.up);
                if (again) to[n_to++] = frame(g, n.a, 0, again);
            }
            if (fr.count >= n.min) {
                if (fr.up == 0) push(g, &g->closure, 0);
                to[n_to++] = fr.up;
            }
            break;
        }
        case TB_NODE_NOTHING:
        case TB_NODE_BYTES:
            if (fr.up == 0) push(g, &g->closure, 0);
            to[n_to++] = fr.up;
            break;
        }
        for (uint32_t k = 0; k < n_to; k++) {
            if (to[k] != 0) visit(g, to[k]);
        }
    }
}

static int by_number(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static uint32_t state_hash(const struct tb_grammar *g, uint32_t i)
{
    const struct tb_state *s = &g->states[i];
    uint32_t h = s->complete;
    for (uint32_t k = 0; k < s->n; k++)
        h = mix(h, g->members.p[s->first + k]);
    return h;
}

/* The state of the frames in the closure; 0 when there are none. */
static uint32_t intern(struct tb_grammar *g)
{
    struct tb_u32s *c = &g->closure;
    if (c->n) qsort(c->p, c->n, sizeof(*c->p), by_number);
    struct tb_state s = {.first = g->members.n, .rest = TB_GRAMMAR_NEVER};
    for (uint32_t i = 0; i < c->n; i++) {
        if (i && c->p[i] == c->p[i - 1]) continue;
        s.rest = TB_MIN(s.rest, g->frames[c->p[i]].rest);
        if (c->p[i] == 0)
            s.complete = true;
        else if (!push(g, &g->members, c->p[i]))
            return 0;
    }
    s.n = g->members.n - s.first;
    if ((s.n == 0 && !s.complete) || s.rest >= TB_GRAMMAR_NEVER) goto none;
    if (!table_room(g, &g->state_table, state_hash) ||
        !grow(g, (void **)&g->states, g->n_states, &g->cap_states, sizeof(*g->states)))
        goto none;
    g->states[g->n_states] = s;
    struct tb_table *t = &g->state_table;
    uint32_t at = state_hash(g, g->n_states) & (t->cap - 1);
    for (; t->slots[at]; at = (at + 1) & (t->cap - 1)) {
        const struct tb_state *o = &g->states[t->slots[at]];
        if (o->n == s.n && o->complete == s.complete &&
            (s.n == 0 || memcmp(g->members.p + o->first, g->members.p + s.first,
                                s.n * sizeof(uint32_t)) == 0)) {
            g->members.n = s.first;
            return t->slots[at];
        }
    }
    t->slots[at] = g->n_states;
    t->n++;
    return g->n_states++;
none:
    g->members.n = s.first;
    return 0;
}

int tb_states_start(struct tb_grammar *g, uint32_t root)
{
    if (!grow(g, (void **)&g->frames, 0, &g->cap_frames, sizeof(*g->frames)) ||
        !grow(g, (void **)&g->states, 0, &g->cap_states, sizeof(*g->states)))
        return TB_ETOOBIG;
    memset(&g->frames[0], 0, sizeof(g->frames[0]));
    memset(&g->states[0], 0, sizeof(g->states[0]));
    g->n_frames = g->n_states = 1;
    g->closure.n = 0;
    g->step = 1;
    expand(g, frame(g, root, 0, 0));
    g->start = intern(g);
    return g->failed || g->start == 0 ? TB_ETOOBIG : 0;
}

uint32_t tb_states_step(struct tb_grammar *g, uint32_t state, unsigned char byte)
{
    if (state == 0) return 0;
    uint32_t class = g->class_of[byte];
    uint32_t *next = g->states[state].next;
    if (!next) {
        size_t size = g->n_classes * sizeof(*next);
        if (!take(g, size)) return 0;
        next = g->states[state].next = tb_malloc(size);
        memset(next, 0xff, size); /* TB_STATE_UNKNOWN */
        g->bytes += size;
    }
    if (next[class] != TB_STATE_UNKNOWN) return next[class];
    g->closure.n = 0;
    g->step++;
    struct tb_state s = g->states[state];
    for (uint32_t i = 0; i < s.n; i++) {
        const struct tb_frame *f = &g->frames[g->members.p[s.first + i]];
        const struct tb_byte_set *set = &g->sets[g->nodes[f->node].a];
        if (!(set->w[byte / 64] >> byte % 64 & 1)) continue;
        if (f->up == 0)
            push(g, &g->closure, 0);
        else
            expand(g, f->up);
    }
    uint32_t to = intern(g);
    if (g->failed) return 0;
    return next[class] = to;
}
