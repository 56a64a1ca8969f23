/*
 * Intrusive doubly linked list with a sentinel head. Thread: the owner's.
 */
#ifndef TB_UTIL_LIST_H
#define TB_UTIL_LIST_H

#include <stdbool.h>
#include <stddef.h>

struct tb_list {
    struct tb_list *next, *prev;
};

static inline void tb_list_init(struct tb_list *l)
{
    l->next = l->prev = l;
}
static inline bool tb_list_empty(const struct tb_list *l)
{
    return l->next == l;
}
static inline void tb_list_push(struct tb_list *l, struct tb_list *node) /* at the tail */
{
    node->prev = l->prev;
    node->next = l;
    l->prev->next = node;
    l->prev = node;
}
static inline void tb_list_push_front(struct tb_list *l, struct tb_list *node)
{
    tb_list_push(l->next, node);
}
static inline void tb_list_del(struct tb_list *node) /* the node may be deleted again */
{
    node->prev->next = node->next;
    node->next->prev = node->prev;
    node->next = node->prev = node;
}
static inline struct tb_list *tb_list_pop(struct tb_list *l) /* NULL when empty */
{
    struct tb_list *n = l->next;
    if (n == l) return NULL;
    tb_list_del(n);
    return n;
}
/* Moves all nodes of src to the tail of dst. */
static inline void tb_list_move(struct tb_list *dst, struct tb_list *src)
{
    if (tb_list_empty(src)) return;
    src->next->prev = dst->prev;
    dst->prev->next = src->next;
    src->prev->next = dst;
    dst->prev = src->prev;
    tb_list_init(src);
}

#define TB_LIST_ENTRY(node, type, member) ((type *)((char *)(node)-offsetof(type, member)))
#define TB_LIST_FOREACH(it, l)            for (struct tb_list *it = (l)->next; it != (l); it = it->next)
#define TB_LIST_FOREACH_SAFE(it, tmp, l)                                                           \
    for (struct tb_list *it = (l)->next, *tmp = it->next; it != (l); it = tmp, tmp = it->next)

#endif
