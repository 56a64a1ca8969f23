/*
 * Custom losses: the registry of a session. The graph itself is checked and kept in the engine,
 * named by a number; here is who may use it. A loss lives as long as its session.
 *
 * Creations are deduped by (session, custom_loss_seq_id). The loss id is "{session}:loss:{n}".
 * A training op may name a loss whose creation has not finished: the engine takes both in order.
 *
 * Thread: the loop's.
 */
#include <stdio.h>
#include <string.h>

#include "core/core_internal.h"
#include "util/mem.h"

struct tb_core_loss {
    struct tb_list in_session;
    char *id;
    uint64_t engine_id;
};

static struct tb_core_loss *find(const struct tb_core_session *s, const char *id)
{
    TB_LIST_FOREACH (n, &s->losses) {
        struct tb_core_loss *l = TB_LIST_ENTRY(n, struct tb_core_loss, in_session);
        if (!strcmp(l->id, id)) return l;
    }
    return NULL;
}

static void forget(struct tb_core_session *s, struct tb_core_loss *l)
{
    tb_list_del(&l->in_session);
    s->n_losses--;
    tb_free(l->id);
    tb_free(l);
}

static void created(struct tb_future *f, struct tb_task *t)
{
    struct tb_op *op = f->op;
    char id[TB_ID_BYTES];
    snprintf(id, sizeof(id), "%s:loss:%lld", f->session->id,
             (long long)op->u.create_custom_loss.seq_id);
    struct tb_core_loss *l = find(f->session, id);
    (void)t;
    if (op->error.code) {
        if (l) forget(f->session, l);
    } else if (!l) {
        tb_error_set(&op->error, TB_ECANCELED, "the session has ended");
    } else {
        op->result.loss_id = tb_arena_strdup(&op->arena, id);
    }
    tb_future_finish(f);
}

int tb_loss_submit(struct tb_core *c, struct tb_tenant *who, struct tb_op *op,
                   struct tb_ticket *out, bool *kept, struct tb_error *err)
{
    int64_t seq = op->u.create_custom_loss.seq_id;
    struct tb_core_session *s;
    char id[TB_ID_BYTES];
    int rc = tb_session_get(c, who, op->session_id, &s, err);
    if (rc) return rc;
    if (seq < 0)
        return tb_error_set(err, TB_EINVAL, "custom_loss_seq_id must be a number from 0 on");
    tb_session_seen(s);
    snprintf(id, sizeof(id), "%s:loss:%lld", s->id, (long long)seq);
    int n = snprintf(c->scratch, sizeof(c->scratch), "%s:create", id);
    struct tb_future *f = tb_future_find(c, c->scratch, (size_t)n);
    if (f || find(s, id)) { /* a repeat; maybe of one whose result has expired */
        out->request_id = f ? f->id : c->scratch;
        return 0;
    }
    if (s->n_losses >= TB_MAX_SESSION_LOSSES)
        return tb_error_set(err, TB_EINVAL, "the session has %d custom losses, the most allowed",
                            TB_MAX_SESSION_LOSSES);
    rc = tb_core_admit(c, who, op, false, err);
    if (rc) return rc;
    *kept = true;
    struct tb_core_loss *l = tb_calloc(1, sizeof(*l));
    l->id = tb_strdup(id);
    l->engine_id = ++c->next_loss;
    tb_list_push(&s->losses, &l->in_session);
    s->n_losses++;
    f = tb_future_create(c, c->scratch, op, s);
    f->phase = TB_PHASE_RUNNING;
    out->request_id = f->id;
    struct tb_task *t = tb_core_task(TB_TASK_LOSS_CREATE, 0);
    t->loss_id = l->engine_id;
    t->op = op;
    tb_core_run(f, t, created);
    return 0;
}

int tb_loss_of_op(const struct tb_core_session *s, const struct tb_op *op, uint64_t *engine_id,
                  struct tb_error *err)
{
    *engine_id = 0;
    if (op->type != TB_OP_FORWARD && op->type != TB_OP_FORWARD_BACKWARD) return 0;
    const struct tb_forward_backward *fb = &op->u.forward_backward;
    if (!fb->loss_fn || strcmp(fb->loss_fn, "custom")) return 0;
    for (int32_t i = 0; i < fb->n_config; i++) {
        const struct tb_config_value *v = &fb->config[i];
        if (!v->is_text || strcmp(v->key, "loss_id")) continue;
        const struct tb_core_loss *l = find(s, v->text);
        if (!l)
            return tb_error_set(err, TB_ENOTFOUND, "there is no custom loss '%.128s' in session %s",
                                v->text, s->id);
        *engine_id = l->engine_id;
    }
    return 0; /* without a loss_id the engine says what is wrong */
}

void tb_losses_end(struct tb_core_session *s)
{
    TB_LIST_FOREACH_SAFE (n, tmp, &s->losses) {
        struct tb_core_loss *l = TB_LIST_ENTRY(n, struct tb_core_loss, in_session);
        struct tb_task *t = tb_core_task(TB_TASK_LOSS_FREE, 0);
        t->loss_id = l->engine_id;
        tb_core_run_free(s->core, t);
        forget(s, l);
    }
}
