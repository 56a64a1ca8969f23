/*
 * Building the rules of a grammar (rules.h). Thread: the builder's, until tb_rules_finish.
 */
#include "grammar/rules.h"

#include <string.h>

int tb_rules_create(struct tb_vocab *v, struct tb_grammar **out)
{
    struct tb_grammar *g = tb_calloc(1, sizeof(*g));
    atomic_init(&g->refs, 1);
    atomic_fetch_add_explicit(&v->refs, 1, memory_order_relaxed);
    g->vocab = v;
    g->cap_nodes = 64;
    g->nodes = tb_calloc(g->cap_nodes, sizeof(*g->nodes));
    g->n_nodes = 1; /* TB_NODE_EMPTY */
    *out = g;
    return 0;
}

void tb_rules_destroy(struct tb_grammar *g)
{
    for (uint32_t i = 0; i < g->n_states; i++)
        tb_free(g->states[i].next);
    tb_free(g->nodes);
    tb_free(g->sets);
    tb_free(g->frames);
    tb_free(g->frame_table.slots);
    tb_free(g->states);
    tb_free(g->state_table.slots);
    tb_free(g->members.p);
    tb_free(g->closure.p);
    tb_free(g->queue.p);
    tb_free(g->masks);
    tb_free(g->path);
    atomic_fetch_sub_explicit(&g->vocab->grammar_bytes, g->counted, memory_order_relaxed);
    tb_vocab_unref(g->vocab);
    tb_free(g);
}

static uint32_t add(struct tb_grammar *g, struct tb_node node)
{
    if (g->n_nodes == TB_GRAMMAR_MAX_NODES) {
        g->failed = true;
        return TB_NODE_EMPTY;
    }
    if (g->n_nodes == g->cap_nodes) {
        g->cap_nodes *= 2;
        g->nodes = tb_realloc(g->nodes, g->cap_nodes * sizeof(*g->nodes));
    }
    g->nodes[g->n_nodes] = node;
    return g->n_nodes++;
}

uint32_t tb_rule_set(struct tb_grammar *g, struct tb_byte_set s)
{
    uint32_t i = 0;
    while (i < g->n_sets && memcmp(&g->sets[i], &s, sizeof(s)) != 0)
        i++;
    if (i == TB_GRAMMAR_MAX_SETS) {
        g->failed = true;
        return TB_NODE_EMPTY;
    }
    if (i == g->n_sets) {
        if (g->n_sets == g->cap_sets) {
            g->cap_sets = g->cap_sets ? 2 * g->cap_sets : 32;
            g->sets = tb_realloc(g->sets, g->cap_sets * sizeof(*g->sets));
        }
        g->sets[g->n_sets++] = s;
    }
    return add(g, (struct tb_node){.type = TB_NODE_BYTES, .a = i, .shortest = 1});
}

static void set_add(struct tb_byte_set *s, unsigned c)
{
    s->w[c / 64] |= 1ull << c % 64;
}

uint32_t tb_rule_range(struct tb_grammar *g, unsigned lo, unsigned hi)
{
    struct tb_byte_set s = {{0}};
    for (unsigned c = lo; c <= hi; c++)
        set_add(&s, c);
    return tb_rule_set(g, s);
}

uint32_t tb_rule_one_of(struct tb_grammar *g, const char *chars)
{
    struct tb_byte_set s = {{0}};
    for (; *chars; chars++)
        set_add(&s, (unsigned char)*chars);
    return tb_rule_set(g, s);
}

uint32_t tb_rule_text(struct tb_grammar *g, const char *p, size_t n)
{
    uint32_t node = TB_NODE_EMPTY;
    while (n--)
        node = tb_rule_seq(g, tb_rule_range(g, (unsigned char)p[n], (unsigned char)p[n]), node);
    return node;
}

uint32_t tb_rule_seq(struct tb_grammar *g, uint32_t a, uint32_t b)
{
    if (a == TB_NODE_EMPTY) return b;
    if (b == TB_NODE_EMPTY) return a;
    return add(g, (struct tb_node){.type = TB_NODE_SEQ, .a = a, .b = b});
}

uint32_t tb_rule_alt(struct tb_grammar *g, uint32_t a, uint32_t b)
{
    if (a == b) return a;
    return add(g, (struct tb_node){.type = TB_NODE_ALT, .a = a, .b = b});
}

uint32_t tb_rule_repeat(struct tb_grammar *g, uint32_t a, uint32_t min, uint32_t max)
{
    if (a == TB_NODE_EMPTY || max == 0) return TB_NODE_EMPTY;
    return add(g, (struct tb_node){.type = TB_NODE_REPEAT, .a = a, .min = min, .max = max});
}

uint32_t tb_rule_ref(struct tb_grammar *g)
{
    return add(g, (struct tb_node){.type = TB_NODE_REF});
}

void tb_rule_define(struct tb_grammar *g, uint32_t ref, uint32_t node)
{
    g->nodes[ref].a = node;
}

/* ---- finishing */

static uint32_t sat(uint64_t x)
{
    return x < TB_GRAMMAR_NEVER ? (uint32_t)x : TB_GRAMMAR_NEVER;
}

static uint32_t shortest_now(const struct tb_grammar *g, const struct tb_node *n)
{
    const struct tb_node *a = &g->nodes[n->a], *b = &g->nodes[n->b];
    switch (n->type) {
    case TB_NODE_NOTHING: return 0;
    case TB_NODE_BYTES: return 1;
    case TB_NODE_SEQ: return sat((uint64_t)a->shortest + b->shortest);
    case TB_NODE_ALT: return TB_MIN(a->shortest, b->shortest);
    case TB_NODE_REPEAT: return n->min ? sat((uint64_t)n->min * a->shortest) : 0;
    case TB_NODE_REF: return a->shortest;
    }
    return 0;
}

/* Lengths only fall from NEVER; with the nodes' children mostly before them few rounds suffice. */
static void find_shortest(struct tb_grammar *g)
{
    for (uint32_t i = 1; i < g->n_nodes; i++)
        g->nodes[i].shortest = TB_GRAMMAR_NEVER;
    for (bool changed = true; changed;) {
        changed = false;
        for (uint32_t i = 1; i < g->n_nodes; i++) {
            uint32_t s = shortest_now(g, &g->nodes[i]);
            changed |= s != g->nodes[i].shortest;
            g->nodes[i].shortest = s;
        }
    }
}

/* True when a node can come back to itself without having matched a byte. marks: 0 new, 1 on the
 * way, 2 done; the way is kept in g->queue: deep rules must not overflow the C stack. */
static bool begins_with_itself(struct tb_grammar *g, uint32_t root)
{
    uint8_t *mark = tb_calloc(g->n_nodes, 1);
    uint32_t *way = tb_malloc((2u * g->n_nodes + 1) * sizeof(*way)), n = 0;
    bool found = false;
    way[n++] = root;
    while (n && !found) {
        uint32_t i = way[n - 1];
        const struct tb_node *node = &g->nodes[i];
        if (mark[i]) { /* back from its children, or there already by another way */
            mark[i] = 2;
            n--;
            continue;
        }
        mark[i] = 1;
        uint32_t kids[2], n_kids = 0;
        if (node->type >= TB_NODE_SEQ) kids[n_kids++] = node->a;
        if (node->type == TB_NODE_ALT ||
            (node->type == TB_NODE_SEQ && g->nodes[node->a].shortest == 0))
            kids[n_kids++] = node->b;
        for (uint32_t k = 0; k < n_kids; k++) {
            if (mark[kids[k]] == 1) found = true;
            if (mark[kids[k]] == 0) way[n++] = kids[k];
        }
    }
    tb_free(mark);
    tb_free(way);
    return found;
}

static bool in_set(const struct tb_byte_set *s, unsigned c)
{
    return s->w[c / 64] >> c % 64 & 1;
}

static void find_classes(struct tb_grammar *g)
{
    for (unsigned c = 0; c < 256; c++) {
        uint32_t k = 0;
        for (; k < g->n_classes; k++) {
            uint32_t s = 0;
            while (s < g->n_sets && in_set(&g->sets[s], c) == in_set(&g->sets[s], g->class_byte[k]))
                s++;
            if (s == g->n_sets) break;
        }
        if (k == g->n_classes) g->class_byte[g->n_classes++] = (uint8_t)c;
        g->class_of[c] = (uint8_t)k;
    }
}

int tb_rules_finish(struct tb_grammar *g, uint32_t root, struct tb_error *err)
{
    if (g->failed)
        return tb_error_set(err, TB_ETOOBIG,
                            "the grammar has more than %d rules or %d sets of bytes",
                            TB_GRAMMAR_MAX_NODES, TB_GRAMMAR_MAX_SETS);
    find_shortest(g);
    if (g->nodes[root].shortest >= TB_GRAMMAR_NEVER)
        return tb_error_set(err, TB_EINVAL, "no finite text matches the schema");
    if (begins_with_itself(g, root))
        return tb_error_set(err, TB_EINVAL, "a part of the schema refers to itself only");
    find_classes(g);
    tb_states_count(g, g->cap_nodes * sizeof(*g->nodes) + g->cap_sets * sizeof(*g->sets));
    if (tb_states_start(g, root))
        return tb_error_set(err, TB_ETOOBIG,
                            "the grammar needs more than %d bytes, or is in more than %d places "
                            "at once",
                            TB_GRAMMAR_MAX_BYTES, TB_GRAMMAR_MAX_WORK);
    return 0;
}
