/*
 * Mailbox: how a struct crosses threads. Any thread posts; one thread drains the whole list. The
 * poster that made it non-empty is told so (returns true) and does the wake-up, so wake-ups
 * coalesce.
 *
 * Ownership of the node passes with tb_mailbox_post and comes back with tb_mailbox_drain.
 */
#ifndef TB_UTIL_MAILBOX_H
#define TB_UTIL_MAILBOX_H

#include <uv.h>

#include "util/list.h"

struct tb_mailbox {
    uv_mutex_t lock;
    struct tb_list list;
};

int tb_mailbox_init(struct tb_mailbox *m); /* 0 or a libuv code */
void tb_mailbox_fini(struct tb_mailbox *m);
bool tb_mailbox_post(struct tb_mailbox *m,
                     struct tb_list *node); /* true: was empty, wake the reader */
bool tb_mailbox_empty(struct tb_mailbox *m);
/* Moves everything to the tail of *out (in posting order); false if there was nothing. */
bool tb_mailbox_drain(struct tb_mailbox *m, struct tb_list *out);

#endif
