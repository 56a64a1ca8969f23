/*
 * A training op's shards on several devices. See spread.h for the way of a share, who owns what and
 * on which thread.
 */
#include "engine/spread.h"

#include "util/mem.h"

#define MAX_SHARES (TB_MAX_SHARDS - 1) /* home has one shard at least */

struct tb_spread {
    struct tb_lane *home;
    struct tb_task *task;         /* the op's */
    struct lane_adapter *adapter; /* waits when it is not among the lane's ready ones */
    struct tb_loan loan;          /* of the weights, until no share is away */
    struct share {
        struct tb_task *task;
        struct tb_lane *lane;
        bool back;
    } shares[MAX_SHARES]; /* in order of their shards */
    int n, next;          /* the next to be collected */
};

/* ---- home */

/* Lends the adapter's weights, which do not change while the op is in training. */
static int lend(struct tb_spread *sp, struct tb_error *err)
{
    struct tb_adapter_version *ver;
    int rc = tb_adapter_publish(sp->adapter->adapter, &ver, err);
    if (rc) return rc;
    rc = tb_version_lend(ver, &sp->loan, err);
    tb_version_unref(ver);
    return rc;
}

static void send_share(struct tb_spread *sp, struct tb_lane *to, int from_shard, int end_shard)
{
    const struct tb_task *of = sp->task;
    struct tb_task *s = tb_task_create(TB_TASK_SHARE);
    s->model = of->model;
    s->adapter_id = of->adapter_id;
    s->spread = sp;
    s->of = of;
    s->from_shard = from_shard;
    s->end_shard = end_shard;
    s->n_from = s->n_begun = tb_training_shard_end(of->training, from_shard - 1);
    s->n_end = tb_training_shard_end(of->training, end_shard - 1);
    for (int32_t i = s->n_begun; i < s->n_end; i++)
        s->n_tokens += (uint64_t)of->op->u.forward_backward.data[i].n_tokens;
    sp->shares[sp->n++] = (struct share){.task = s, .lane = to};
    lane_send(to, s);
}

void spread_begin(struct tb_lane *l, struct lane_adapter *a, struct tb_task *t)
{
    struct tb_lane *lanes[MAX_SHARES];
    struct tb_error err = {0};
    int n_shards = tb_training_n_shards(t->training), n = 0;
    for (int i = 0; i < l->n_peers && n < TB_MIN(n_shards - 1, MAX_SHARES); i++)
        if (!lane_is_lost(l->peers[i])) lanes[n++] = l->peers[i];
    if (n == 0) return;
    struct tb_spread *sp = tb_calloc(1, sizeof(*sp));
    *sp = (struct tb_spread){.home = l, .task = t, .adapter = a};
    if (lend(sp, &err)) { /* no room even for the weights: then in turn, by what there is */
        tb_free(sp);
        return;
    }
    t->spread = sp;
    int home = n_shards / (n + 1);
    tb_training_compute_to(t->training, home);
    t->n_end = tb_training_shard_end(t->training, home - 1);
    for (int i = 0; i < n; i++)
        send_share(sp, lanes[i], n_shards * (i + 1) / (n + 1), n_shards * (i + 2) / (n + 1));
}

/* Collects one, or takes its shards over. */
static void collect(struct tb_task *t, const struct tb_task *s)
{
    struct tb_error err = s->error;
    int rc = s->training ? tb_training_collect(t->training, s->training, &err) : err.code;
    if (rc) tb_training_compute_to(t->training, s->end_shard);
    t->n_begun = rc ? s->n_from : s->n_end;
    t->n_end = s->n_end;
}

bool spread_go_on(struct tb_lane *l, struct tb_task *t)
{
    struct tb_spread *sp = t->spread;
    bool closing = lane_is_closing(l);
    while (sp->next < sp->n && sp->shares[sp->next].back) {
        struct share *s = &sp->shares[sp->next];
        bool done = closing || tb_training_done(t->training);
        if (!done && !tb_training_waits(t->training)) break;
        if (!done) collect(t, s->task);
        s->task->type = TB_TASK_SHARE_END;
        lane_send(s->lane, s->task);
        sp->next++;
    }
    if (sp->next == sp->n) return true;
    return !closing && !tb_training_done(t->training) && !tb_training_waits(t->training);
}

struct lane_adapter *spread_take_back(struct tb_task *share)
{
    struct tb_spread *sp = share->spread;
    for (int i = 0; i < sp->n; i++)
        if (sp->shares[i].task == share) sp->shares[i].back = true;
    return sp->adapter;
}

void spread_end(struct tb_task *t)
{
    struct tb_spread *sp = t->spread;
    if (!sp) return;
    TB_BUG_ON(sp->next < sp->n);
    tb_loan_return(&sp->loan);
    tb_free(sp);
    t->spread = NULL;
}

/* ---- the other lane */

int share_begin(struct tb_lane *l, struct tb_task *share)
{
    struct tb_adapter_version *ver;
    struct tb_model *m = l->models[share->model];
    int rc = tb_version_borrow(&ver, m, &share->spread->loan, &share->error);
    if (rc) return rc;
    tb_training_share(&share->training, share->of->training, ver, share->from_shard,
                      share->end_shard);
    tb_version_unref(ver);
    return 0;
}

void share_send_back(struct tb_task *share)
{
    share->type = TB_TASK_COLLECT;
    lane_send(share->spread->home, share);
}

void share_free(struct tb_task *share)
{
    tb_training_destroy(share->training);
    tb_task_destroy(share);
}
