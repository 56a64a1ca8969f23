/*
 * Mailbox (see mailbox.h). The box owns the nodes between post and drain; post from any thread,
 * drain from the reader's.
 */
#include "util/mailbox.h"

#include "util/mem.h"

int tb_mailbox_init(struct tb_mailbox *m)
{
    tb_list_init(&m->list);
    return uv_mutex_init(&m->lock);
}

void tb_mailbox_fini(struct tb_mailbox *m)
{
    TB_BUG_ON(!tb_list_empty(&m->list)); /* someone's struct would be lost */
    uv_mutex_destroy(&m->lock);
}

bool tb_mailbox_post(struct tb_mailbox *m, struct tb_list *node)
{
    uv_mutex_lock(&m->lock);
    bool was_empty = tb_list_empty(&m->list);
    tb_list_push(&m->list, node);
    uv_mutex_unlock(&m->lock);
    return was_empty;
}

bool tb_mailbox_drain(struct tb_mailbox *m, struct tb_list *out)
{
    uv_mutex_lock(&m->lock);
    bool any = !tb_list_empty(&m->list);
    tb_list_move(out, &m->list);
    uv_mutex_unlock(&m->lock);
    return any;
}

bool tb_mailbox_empty(struct tb_mailbox *m)
{
    uv_mutex_lock(&m->lock);
    bool empty = tb_list_empty(&m->list);
    uv_mutex_unlock(&m->lock);
    return empty;
}
