/*
 * Models: creation, and the queue that runs a model's ops strictly by seq_id.
 *
 * Compute ops (forward, forward_backward, optim_step, a publish for sampling) go to the engine as
 * soon as it is their turn, without waiting for the results of those before them: the engine keeps
 * the order on an adapter. A save's export goes the same way; only one save at a time is under way,
 * so that one exported copy is in memory. Loads and unloads wait until nothing runs, and run alone.
 *
 * Thread: the loop's.
 */
#include <stdio.h>
#include <string.h>

#include "core/core_internal.h"
#include "util/clock.h"
#include "util/log.h"
#include "util/mem.h"

struct tb_core_model *tb_model_find(const struct tb_core *c, const struct tb_tenant *who,
                                    const char *id)
{
    struct tb_core_model *m = id ? tb_map_get(&c->model_map, id, strlen(id)) : NULL;
    return m && m->session->tenant == who ? m : NULL;
}

/* ---- the queue */

static void start(struct tb_future *f)
{
    struct tb_core_model *m = f->model;
    tb_list_del(&f->in_queue);
    f->phase = TB_PHASE_RUNNING;
    m->running++;
}

void tb_model_op_done(struct tb_future *f)
{
    struct tb_core_model *m = f->model;
    tb_future_finish(f);
    tb_model_pump(m);
    tb_model_maybe_free(m);
}

static void compute_done(struct tb_future *f, struct tb_task *t)
{
    (void)t;
    tb_model_op_done(f);
}

static void start_compute(struct tb_future *f, uint64_t loss_id)
{
    struct tb_core_model *m = f->model;
    bool optim = f->op->type == TB_OP_OPTIM_STEP;
    struct tb_task *t = tb_core_task(optim ? TB_TASK_OPTIM : TB_TASK_TRAIN, m->engine_model);
    t->adapter_id = m->adapter_id;
    t->loss_id = loss_id;
    t->op = f->op;
    tb_core_run(f, t, compute_done);
}

static bool other_optimizer(const struct tb_op *op, struct tb_error *e)
{
    if (op->type != TB_OP_OPTIM_STEP) return false;
    const char *type = op->u.optim_step.type;
    if (!type || !strcmp(type, "adamw")) return false;
    tb_error_set(e, TB_EINVAL, "optimizer '%s' does not match the model's, adamw", type);
    return true;
}

static void go_on(struct tb_core_copy *y)
{
    tb_model_pump(TB_CONTAINER_OF(y, struct tb_future, copy)->model);
}

/* Room for the copy that f saves; false: the queue goes on when there is. */
static bool copy_fits(struct tb_core_model *m, struct tb_future *f)
{
    bool optimizer = f->op->type == TB_OP_SAVE_WEIGHTS;
    size_t bytes = tb_copy_bytes(m->core, m->engine_model, m->lora.rank, optimizer);
    return tb_copy_begin(m->core, &f->copy, bytes, go_on);
}

/* Starts the op at the head of the queue; false if it must wait. */
static bool start_head(struct tb_core_model *m, struct tb_future *f, uint64_t loss_id)
{
    switch (f->op->type) {
    case TB_OP_FORWARD:
    case TB_OP_FORWARD_BACKWARD:
    case TB_OP_OPTIM_STEP:
        start(f);
        start_compute(f, loss_id);
        return true;
    case TB_OP_SAVE_WEIGHTS:
    case TB_OP_SAVE_WEIGHTS_FOR_SAMPLER:
    case TB_OP_SAVE_WEIGHTS_EXTERNAL:
        if (tb_weights_is_ephemeral(f->op)) {
            start(f);
            tb_weights_publish(f);
            return true;
        }
        if (m->saving || !copy_fits(m, f)) return false;
        m->saving = f;
        start(f);
        tb_weights_save(f);
        return true;
    default: /* load, unload */
        if (m->running) return false;
        m->barrier = f;
        start(f);
        if (f->op->type == TB_OP_LOAD_WEIGHTS)
            tb_weights_load(f);
        else
            tb_weights_unload(f);
        return true;
    }
}

void tb_model_pump(struct tb_core_model *m)
{
    while (!tb_list_empty(&m->blocked)) {
        struct tb_future *f = TB_LIST_ENTRY(m->blocked.next, struct tb_future, in_queue);
        if (f->seq != m->next_seq) break;
        tb_list_del(&f->in_queue);
        tb_list_push(&m->ready, &f->in_queue);
        f->phase = TB_PHASE_READY;
        m->next_seq++;
    }
    if (m->state == TB_MODEL_FAILED) {
        tb_model_fail_queue(m, &m->error);
        return;
    }
    if (m->state != TB_MODEL_READY) return;
    while (!tb_list_empty(&m->ready) && !m->barrier) {
        struct tb_future *f = TB_LIST_ENTRY(m->ready.next, struct tb_future, in_queue);
        struct tb_error e;
        uint64_t loss_id = 0;
        if (f->op->error.code)
            tb_future_finish(f); /* refused by the decoder: it only keeps its place */
        else if (other_optimizer(f->op, &e) || tb_loss_of_op(m->session, f->op, &loss_id, &e))
            tb_future_fail(f, &e);
        else if (!start_head(m, f, loss_id))
            return;
    }
}

bool tb_model_stuck(const struct tb_core_model *m)
{
    return m->running == 0 && tb_list_empty(&m->ready) && !tb_list_empty(&m->blocked);
}

void tb_model_fail_queue(struct tb_core_model *m, const struct tb_error *e)
{
    struct tb_list *lists[] = {&m->ready, &m->blocked};
    for (int i = 0; i < 2; i++) {
        while (!tb_list_empty(lists[i])) {
            struct tb_future *f = TB_LIST_ENTRY(lists[i]->next, struct tb_future, in_queue);
            if (f->seq >= m->next_seq) m->next_seq = f->seq + 1;
            if (f->op->error.code)
                tb_future_finish(f);
            else
                tb_future_fail(f, e);
        }
    }
}

/* Blocked futures are kept by seq; most come in order, so the place is sought from the end. */
static void enqueue(struct tb_core_model *m, struct tb_future *f)
{
    struct tb_list *at = m->blocked.prev;
    while (at != &m->blocked && TB_LIST_ENTRY(at, struct tb_future, in_queue)->seq > f->seq)
        at = at->prev;
    tb_list_push_front(at, &f->in_queue); /* behind at */
    f->phase = TB_PHASE_BLOCKED;
    f->model = m;
    m->n_pending++;
    if (f->seq > m->last_seq) m->last_seq = f->seq;
}

static void ticket(struct tb_ticket *out, const struct tb_future *f, const char *model_id)
{
    out->request_id = f->id;
    out->model_id = model_id;
}

int tb_model_submit(struct tb_core *c, struct tb_tenant *who, struct tb_op *op,
                    struct tb_ticket *out, bool *kept, struct tb_error *err)
{
    struct tb_core_model *m = tb_model_find(c, who, op->model_id);
    if (!m)
        return tb_error_set(err, TB_ENOTFOUND,
                            "there is no live model '%s': its session ended, or the server was "
                            "restarted",
                            op->model_id ? op->model_id : "");
    tb_session_seen(m->session);
    tb_store_touch_run(c->store, m->id, tb_clock_wall_us());
    struct tb_future *f = NULL;
    bool unnumbered = op->seq_id == -1;
    if (op->seq_id < -1 || op->seq_id == 0)
        return tb_error_set(err, TB_EINVAL, "seq_id %lld: they begin at 1", (long long)op->seq_id);
    if (unnumbered) { /* the oldest SDK: order of arrival */
        f = tb_future_by_key(c, who, m->id, op->idempotency_key);
        if (f) {
            ticket(out, f, m->id);
            return 0;
        }
        op->seq_id = m->last_seq + 1;
    }
    if (op->seq_id == INT64_MAX) return tb_error_set(err, TB_EINVAL, "seq_id is too large");
    int n = snprintf(c->scratch, sizeof(c->scratch), "%s:%lld", m->id, (long long)op->seq_id);
    f = tb_future_find(c, c->scratch, (size_t)n);
    if (f || op->seq_id < m->next_seq) { /* a repeat; maybe of one whose result has expired */
        out->request_id = f ? f->id : c->scratch;
        out->model_id = m->id;
        return 0;
    }
    bool in_turn = op->seq_id == m->next_seq && m->running == 0 && tb_list_empty(&m->ready);
    int rc = tb_core_admit(c, who, op, in_turn, err);
    if (rc) return rc;
    *kept = true;
    f = tb_future_create(c, c->scratch, op, m->session);
    if (unnumbered) tb_future_set_key(f, m->id, op->idempotency_key);
    enqueue(m, f);
    ticket(out, f, m->id);
    tb_model_pump(m);
    return 0;
}

/* ---- creation */

int tb_model_check_lora(struct tb_core *c, int engine_model, const struct tb_lora_config *l,
                        struct tb_error *err)
{
    const struct tb_model_info *info = tb_engine_model_info(c->engine, engine_model);
    if (l->rank < 1 || l->rank > info->max_rank)
        return tb_error_set(err, TB_EINVAL, "lora rank %d is outside of 1 to %d", (int)l->rank,
                            info->max_rank);
    if (!l->train_attn && !l->train_mlp && !l->train_unembed)
        return tb_error_set(err, TB_EINVAL,
                            "at least one of train_attn, train_mlp, train_unembed must be true");
    return 0;
}

static int check_create(struct tb_core *c, const struct tb_op *op, int *engine_model,
                        struct tb_error *err)
{
    const struct tb_create_model *p = &op->u.create_model;
    *engine_model = p->base_model ? tb_engine_model_find(c->engine, p->base_model) : -1;
    if (*engine_model < 0) return tb_core_no_base_model(c, TB_EINVAL, p->base_model, err);
    int rc = tb_model_check_lora(c, *engine_model, &p->lora, err);
    if (!rc && p->optimizer && strcmp(p->optimizer, "adamw"))
        rc =
            tb_error_set(err, TB_EINVAL, "optimizer '%s' is not supported; adamw is", p->optimizer);
    return rc;
}

static struct tb_core_model *model_new(struct tb_core *c, struct tb_core_session *s, const char *id)
{
    struct tb_core_model *m = tb_calloc(1, sizeof(*m));
    m->core = c;
    m->session = s;
    m->id = tb_strdup(id);
    m->engine_model = -1;
    m->adapter_id = ++c->next_adapter;
    m->state = TB_MODEL_CREATING;
    m->next_seq = 1;
    tb_list_init(&m->blocked);
    tb_list_init(&m->ready);
    tb_list_push(&s->models, &m->in_session);
    tb_map_put(&c->model_map, m->id, strlen(m->id), m);
    return m;
}

static void put_run(struct tb_core_model *m)
{
    int64_t now = tb_clock_wall_us();
    struct tb_run_row row = {.id = m->id,
                             .tenant = m->session->tenant->name,
                             .session_id = m->session->id,
                             .base_model = m->base_model,
                             .lora = m->lora,
                             .user_metadata_json = m->user_metadata,
                             .created_us = now,
                             .last_request_us = now};
    tb_store_put_run(m->core->store, &row);
}

void tb_model_created(struct tb_future *f, const struct tb_error *e)
{
    struct tb_core_model *m = f->model;
    struct tb_op *op = f->op;
    struct tb_error canceled;
    if (!e && f->canceled) {
        tb_error_set(&canceled, TB_ECANCELED, "the session has ended");
        e = &canceled;
    }
    if (e) {
        m->error = *e;
        if (m->state == TB_MODEL_CREATING) m->state = TB_MODEL_FAILED;
        op->error = *e;
    } else {
        m->state = TB_MODEL_READY;
        op->result.model_id = tb_arena_strdup(&op->arena, m->id);
        if (op->type == TB_OP_LOAD_WEIGHTS)
            op->result.path = tb_arena_strdup(&op->arena, op->u.load_weights.path);
        put_run(m);
    }
    tb_model_op_done(f);
}

static void adapter_created(struct tb_future *f, struct tb_task *t)
{
    const struct tb_error *e = tb_task_error(t);
    if (!e->code) f->model->adapter_alive = true;
    tb_model_created(f, e->code ? e : NULL);
}

static void start_create(struct tb_future *f, int engine_model)
{
    struct tb_core_model *m = f->model;
    const struct tb_create_model *p = &f->op->u.create_model;
    m->engine_model = engine_model;
    m->base_model = tb_strdup(p->base_model);
    m->user_metadata = p->user_metadata ? tb_strdup(p->user_metadata) : NULL;
    m->lora = p->lora;
    if (m->lora.alpha == 0) m->lora.alpha = 32;
    if (!m->lora.has_seed) { /* recorded with the run and its checkpoints */
        m->lora.has_seed = true;
        m->lora.seed = tb_random_u64();
    }
    struct tb_task *t = tb_core_task(TB_TASK_ADAPTER_CREATE, engine_model);
    t->adapter_id = m->adapter_id;
    t->lora = m->lora;
    tb_core_run(f, t, adapter_created);
}

/* The model's id, and in core->scratch that of its creation. */
static void name_model(struct tb_core_session *s, int64_t seq, char id[TB_ID_BYTES])
{
    snprintf(id, TB_ID_BYTES, "%s:train:%lld", s->id, (long long)seq);
    snprintf(s->core->scratch, TB_ID_BYTES, "%s:train:%lld:create", s->id, (long long)seq);
}

/* The answer of the creation that has the id in c->scratch already; false: there is none. */
static bool created_before(struct tb_core *c, struct tb_tenant *who, const char *model_id,
                           struct tb_ticket *out)
{
    const struct tb_future *f = tb_future_find(c, c->scratch, strlen(c->scratch));
    const struct tb_core_model *m = tb_model_find(c, who, model_id);
    if (!f && !m) return false;
    out->request_id = f ? f->id : c->scratch;
    out->model_id = f ? f->op->model_id : m->id;
    return true;
}

int tb_model_submit_create(struct tb_core *c, struct tb_tenant *who, struct tb_op *op,
                           struct tb_ticket *out, bool *kept, struct tb_error *err)
{
    bool load = op->type == TB_OP_LOAD_WEIGHTS, anonymous = !op->session_id;
    int engine_model = -1, rc = 0;
    struct tb_core_session *s = NULL;
    struct tb_future *f = NULL;
    char id[TB_ID_BYTES];
    if (anonymous && (f = tb_future_by_key(c, who, "create", op->idempotency_key))) {
        out->request_id = f->id;
        out->model_id = f->op->model_id;
        return 0;
    }
    if (!load && !op->error.code) rc = check_create(c, op, &engine_model, err);
    if (!rc && !anonymous) rc = tb_session_get(c, who, op->session_id, &s, err);
    if (!rc && !anonymous && op->model_seq_id < 0)
        rc = tb_error_set(err, TB_EINVAL, "model_seq_id must be a number from 0 on");
    if (rc) return rc;
    if (s) {
        tb_session_seen(s);
        name_model(s, op->model_seq_id, id);
        if (created_before(c, who, id, out)) return 0;
    }
    rc = tb_core_admit(c, who, op, false, err);
    if (rc) return rc;
    if (!s) { /* clients of before sessions get one for each model */
        s = tb_session_create(c, who, NULL, true);
        op->model_seq_id = 0;
        name_model(s, 0, id);
    }
    *kept = true;
    struct tb_core_model *m = model_new(c, s, id);
    op->model_id = tb_arena_strdup(&op->arena, id);
    op->seq_id = 0;
    f = tb_future_create(c, c->scratch, op, s);
    if (anonymous) tb_future_set_key(f, "create", op->idempotency_key);
    f->model = m;
    f->phase = TB_PHASE_RUNNING;
    m->n_pending++;
    m->running++;
    out->request_id = f->id;
    out->model_id = op->model_id;
    if (op->error.code)
        tb_model_created(f, &op->error);
    else if (load)
        tb_weights_load_new(f);
    else
        start_create(f, engine_model);
    return 0;
}

/* ---- the end */

void tb_model_maybe_free(struct tb_core_model *m)
{
    if (m->state != TB_MODEL_GONE || m->n_pending) return;
    if (m->adapter_alive) {
        struct tb_task *t = tb_core_task(TB_TASK_ADAPTER_FREE, m->engine_model);
        t->adapter_id = m->adapter_id;
        tb_core_run_free(m->core, t);
    }
    tb_free(m->user_metadata);
    tb_free(m->base_model);
    tb_free(m->id);
    tb_free(m);
}

void tb_model_end(struct tb_core_model *m, const char *message)
{
    struct tb_error e;
    tb_error_set(&e, TB_ECANCELED, "model %s is gone: %s", m->id, message);
    tb_model_fail_queue(m, &e);
    m->state = TB_MODEL_GONE;
    tb_map_del(&m->core->model_map, m->id, strlen(m->id));
    tb_list_del(&m->in_session);
    tb_target_put(m->inflight);
    m->inflight = NULL;
    tb_model_maybe_free(m);
}

int tb_core_model_info(struct tb_core *c, struct tb_tenant *who, const char *model_id,
                       struct tb_model_answer *out, struct tb_error *err)
{
    struct tb_core_model *m = tb_model_find(c, who, model_id);
    if (!m)
        return tb_error_set(err, TB_ENOTFOUND, "there is no live model '%s'",
                            model_id ? model_id : "");
    tb_session_seen(m->session);
    if (m->state == TB_MODEL_FAILED) return tb_error_set(err, m->error.code, "%s", m->error.msg);
    if (m->engine_model < 0)
        return tb_error_set(err, TB_EBUSY, "model %s is still being loaded; try again", m->id);
    const struct tb_model_info *info = tb_engine_model_info(c->engine, m->engine_model);
    *out = (struct tb_model_answer){.model_id = m->id,
                                    .base_model = m->base_model,
                                    .arch = info->arch,
                                    .tokenizer_id =
                                        tb_engine_model_tokenizer(c->engine, m->engine_model),
                                    .optimizer = "adamw",
                                    .lora = m->lora};
    return 0;
}
