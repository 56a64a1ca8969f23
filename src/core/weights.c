/*
 * Saves, loads and publishes: state machines of one future over the engine and the store.
 *
 *   save      EXPORT → tb_store_write_ckpt → done
 *   publish   PUBLISH → a sampling session on that version (nothing on disk)
 *   load      tb_store_get_ckpt → room for a copy → tb_store_read_ckpt → ADAPTER_LOAD → done
 *   unload    ADAPTER_FREE → the model is gone
 *
 * Thread: the loop's.
 */
#include <stdio.h>
#include <string.h>

#include "core/core_internal.h"
#include "util/mem.h"

bool tb_weights_is_ephemeral(const struct tb_op *op)
{
    return op->type == TB_OP_SAVE_WEIGHTS_FOR_SAMPLER && !op->u.save_weights.name &&
           op->u.save_weights.sampling_session_seq_id >= 0;
}

/* Ends a model's future as failed. */
static void fail(struct tb_future *f, const struct tb_error *e)
{
    f->op->error = *e;
    tb_model_op_done(f);
}

static void fail_text(struct tb_future *f, int code, const char *text)
{
    struct tb_error e;
    tb_error_set(&e, code, "%s", text);
    fail(f, &e);
}

/* Ends it as done, with what all of them tell. */
static void succeed(struct tb_future *f, const char *path)
{
    struct tb_op *op = f->op;
    if (path) op->result.path = tb_arena_strdup(&op->arena, path);
    op->result.model_id = tb_arena_strdup(&op->arena, f->model->id);
    tb_model_op_done(f);
}

/* ---- save */

static enum tb_ckpt_kind kind_of(const struct tb_op *op)
{
    return op->type == TB_OP_SAVE_WEIGHTS               ? TB_CKPT_TRAINING
           : op->type == TB_OP_SAVE_WEIGHTS_FOR_SAMPLER ? TB_CKPT_SAMPLER
                                                        : TB_CKPT_EXTERNAL;
}

static void written(void *arg, const struct tb_error *err, const struct tb_ckpt_row *row)
{
    struct tb_future *f = arg;
    struct tb_core *c = f->core;
    c->n_async--;
    if (err->code) {
        fail(f, err);
    } else {
        f->op->result.size_bytes = row->size_bytes;
        tb_sampler_path_changed(c, row->path);
        succeed(f, row->path);
    }
    tb_core_leave(c);
}

static void exported(struct tb_future *f, struct tb_task *t)
{
    struct tb_core_model *m = f->model;
    struct tb_core *c = f->core;
    const struct tb_error *e = tb_task_error(t);
    if (e->code) {
        fail(f, e);
        return;
    }
    struct tb_adapter_state *state = t->state;
    t->state = NULL;
    state->base_model = tb_arena_strdup(&state->arena, m->base_model);
    const struct tb_save_weights *p = &f->op->u.save_weights;
    struct tb_ckpt_write w = {
        .run_id = m->id,
        .tenant = f->session->tenant->name,
        .name = p->name,
        .kind = kind_of(f->op),
        .overwrite = p->overwrite,
        .ttl_seconds = p->has_ttl ? p->ttl_seconds : 0,
        .user_metadata_json = p->user_metadata,
        .model_dir = tb_engine_model_info(c->engine, m->engine_model)->dir,
    };
    c->n_async++;
    tb_store_write_ckpt(c->store, &w, state, written, f);
}

void tb_weights_save(struct tb_future *f)
{
    struct tb_core_model *m = f->model;
    struct tb_save_weights *p = &f->op->u.save_weights;
    struct tb_error e = {0};
    /* unique, as no two ops of a run share a number */
    if (!p->name) p->name = tb_arena_printf(&f->op->arena, "save-%06lld", (long long)f->seq);
    if (p->inflight)
        tb_error_set(&e, TB_EINVAL, "kind inflight is for saves without a name");
    else if (p->has_ttl && p->ttl_seconds < 1)
        tb_error_set(&e, TB_EINVAL, "ttl_seconds must be positive");
    else
        tb_ckpt_name_check(p->name, &e);
    if (e.code) {
        /* start_head goes on with the queue, so the model is not pumped from here */
        tb_future_fail(f, &e);
        return;
    }
    struct tb_task *t = tb_core_task(TB_TASK_EXPORT, m->engine_model);
    t->adapter_id = m->adapter_id;
    t->with_optimizer = f->op->type == TB_OP_SAVE_WEIGHTS;
    tb_core_run(f, t, exported);
}

/* ---- publish */

static struct tb_core_target *target_update(struct tb_core_model *m, struct tb_core_version *v)
{
    if (!m->inflight) {
        m->inflight = tb_calloc(1, sizeof(*m->inflight));
        m->inflight->refs = 1;
    }
    tb_version_put(m->inflight->version);
    m->inflight->version = v; /* takes the reference */
    m->inflight->refs++;
    return m->inflight;
}

static void published(struct tb_future *f, struct tb_task *t)
{
    struct tb_core_model *m = f->model;
    struct tb_op *op = f->op;
    const struct tb_error *e = tb_task_error(t);
    if (e->code) {
        fail(f, e);
        return;
    }
    struct tb_core_version *v = tb_version_new(f->core, m->engine_model, f->version_id);
    v->state = TB_VERSION_READY;
    if (f->canceled) {
        tb_version_put(v);
        fail_text(f, TB_ECANCELED, "the session has ended");
        return;
    }
    char id[TB_ID_BYTES];
    tb_sampler_free_id(m->session, op->u.save_weights.sampling_session_seq_id, id);
    struct tb_core_target *target = op->u.save_weights.inflight ? target_update(m, v) : NULL;
    tb_sampler_publish(m, id, target ? NULL : v, target);
    op->result.sampling_session_id = tb_arena_strdup(&op->arena, id);
    succeed(f, NULL);
}

void tb_weights_publish(struct tb_future *f)
{
    struct tb_core_model *m = f->model;
    struct tb_task *t = tb_core_task(TB_TASK_PUBLISH, m->engine_model);
    f->version_id = ++f->core->next_version;
    t->adapter_id = m->adapter_id;
    t->version_id = f->version_id;
    tb_core_run(f, t, published);
}

/* ---- load */

static const char *reader_of(const struct tb_future *f)
{
    const char *reader = f->op->u.load_weights.reader;
    return reader ? reader : f->session->tenant->name;
}

static int check_load(const struct tb_op *op, struct tb_error *e)
{
    const struct tb_load_weights *p = &op->u.load_weights;
    struct tb_tinker_path path;
    const char *text = p->path ? p->path : "";
    int rc = tb_tinker_path_parse(text, strlen(text), &path, e);
    if (rc) return rc;
    if (p->optimizer_type && p->optimizer)
        return tb_error_set(
            e, TB_EINVAL, "optimizer_config is only legal when the optimizer state is not loaded");
    if (p->optimizer_type && strcmp(p->optimizer_type, "adamw"))
        return tb_error_set(e, TB_EINVAL, "optimizer '%s' is not supported; adamw is",
                            p->optimizer_type);
    return 0;
}

static void start_read(struct tb_future *f, tb_store_state_cb cb)
{
    const struct tb_load_weights *p = &f->op->u.load_weights;
    f->core->n_async++;
    tb_store_read_ckpt(f->core->store, reader_of(f), p->path, p->optimizer, cb, f);
}

/* Calls go when there is room for a copy of what row describes. */
static void read_in_turn(struct tb_future *f, const struct tb_ckpt_row *row,
                         void (*go)(struct tb_core_copy *y))
{
    struct tb_core *c = f->core;
    int model = tb_engine_model_find(c->engine, row->base_model);
    size_t bytes = (size_t)row->size_bytes; /* of a base that is not served: it will be refused */
    if (model >= 0)
        bytes = tb_copy_bytes(c, model, row->lora.rank, f->op->u.load_weights.optimizer);
    if (tb_copy_begin(c, &f->copy, bytes, go)) go(&f->copy);
}

static void loaded(struct tb_future *f, struct tb_task *t)
{
    const struct tb_error *e = tb_task_error(t);
    if (e->code)
        fail(f, e);
    else
        succeed(f, f->op->u.load_weights.path);
}

static struct tb_task *load_task(struct tb_future *f, struct tb_adapter_state *state, bool create)
{
    struct tb_task *t = tb_core_task(TB_TASK_ADAPTER_LOAD, f->model->engine_model);
    t->adapter_id = f->model->adapter_id;
    t->lora = state->lora;
    t->with_optimizer = f->op->u.load_weights.optimizer;
    t->create = create;
    t->state = state;
    return t;
}

static void read_for_load(void *arg, const struct tb_error *err, const struct tb_ckpt_row *row,
                          struct tb_adapter_state *state)
{
    struct tb_future *f = arg;
    struct tb_core *c = f->core;
    struct tb_core_model *m = f->model;
    struct tb_error e = *err;
    c->n_async--;
    if (!e.code && f->canceled) tb_error_set(&e, TB_ECANCELED, "the session has ended");
    if (!e.code && strcmp(row->base_model, m->base_model))
        tb_error_set(&e, TB_EINVAL, "%s was trained on %s, but the model's base is %s", row->path,
                     row->base_model, m->base_model);
    if (e.code) {
        tb_adapter_state_destroy(state);
        fail(f, &e);
    } else {
        tb_core_run(f, load_task(f, state, false), loaded);
    }
    tb_core_leave(c);
}

static void read_load(struct tb_core_copy *y)
{
    start_read(TB_CONTAINER_OF(y, struct tb_future, copy), read_for_load);
}

static void row_for_load(void *arg, const struct tb_error *err, const struct tb_ckpt_row *row)
{
    struct tb_future *f = arg;
    struct tb_core *c = f->core;
    c->n_async--;
    if (err->code)
        fail(f, err);
    else
        read_in_turn(f, row, read_load);
    tb_core_leave(c);
}

void tb_weights_load(struct tb_future *f)
{
    struct tb_error e = {0};
    const struct tb_load_weights *p = &f->op->u.load_weights;
    if (check_load(f->op, &e)) {
        tb_future_fail(f, &e); /* the pump that called goes on */
        return;
    }
    f->core->n_async++;
    tb_store_get_ckpt(f->core->store, reader_of(f), p->path, row_for_load, f);
}

static void new_loaded(struct tb_future *f, struct tb_task *t)
{
    const struct tb_error *e = tb_task_error(t);
    if (!e->code) f->model->adapter_alive = true;
    tb_model_created(f, e->code ? e : NULL);
}

static void read_for_new(void *arg, const struct tb_error *err, const struct tb_ckpt_row *row,
                         struct tb_adapter_state *state)
{
    struct tb_future *f = arg;
    struct tb_core *c = f->core;
    struct tb_core_model *m = f->model;
    const struct tb_load_weights *p = &f->op->u.load_weights;
    struct tb_error e = *err;
    int engine_model = -1;
    c->n_async--;
    if (!e.code && f->canceled) tb_error_set(&e, TB_ECANCELED, "the session has ended");
    if (!e.code && p->base_model && strcmp(p->base_model, row->base_model))
        tb_error_set(&e, TB_EINVAL, "%s was trained on %s, not on %s", row->path, row->base_model,
                     p->base_model);
    if (!e.code) {
        engine_model = tb_engine_model_find(c->engine, row->base_model);
        if (engine_model < 0)
            tb_error_set(&e, TB_EINVAL, "%s was trained on %s, which is not served here", row->path,
                         row->base_model);
        else
            tb_model_check_lora(c, engine_model, &state->lora, &e);
    }
    if (e.code) {
        tb_adapter_state_destroy(state);
        tb_model_created(f, &e);
    } else {
        m->engine_model = engine_model;
        m->base_model = tb_strdup(row->base_model);
        m->lora = state->lora;
        m->user_metadata = p->user_metadata ? tb_strdup(p->user_metadata) : NULL;
        tb_core_run(f, load_task(f, state, true), new_loaded);
    }
    tb_core_leave(c);
}

static void read_new(struct tb_core_copy *y)
{
    start_read(TB_CONTAINER_OF(y, struct tb_future, copy), read_for_new);
}

static void row_for_new(void *arg, const struct tb_error *err, const struct tb_ckpt_row *row)
{
    struct tb_future *f = arg;
    struct tb_core *c = f->core;
    c->n_async--;
    if (err->code)
        tb_model_created(f, err);
    else
        read_in_turn(f, row, read_new);
    tb_core_leave(c);
}

void tb_weights_load_new(struct tb_future *f)
{
    struct tb_error e = {0};
    const struct tb_load_weights *p = &f->op->u.load_weights;
    if (check_load(f->op, &e)) {
        tb_model_created(f, &e);
        return;
    }
    f->core->n_async++;
    tb_store_get_ckpt(f->core->store, reader_of(f), p->path, row_for_new, f);
}

/* ---- unload */

static void unloaded(struct tb_future *f, struct tb_task *t)
{
    struct tb_core_model *m = f->model;
    struct tb_op *op = f->op;
    const struct tb_error *e = tb_task_error(t);
    if (e->code) {
        fail(f, e);
        return;
    }
    m->adapter_alive = false;
    op->result.model_id = tb_arena_strdup(&op->arena, m->id);
    bool gone = m->state == TB_MODEL_GONE; /* the session ended meanwhile */
    if (!gone) tb_model_end(m, "it was unloaded");
    tb_model_op_done(f);
}

void tb_weights_unload(struct tb_future *f)
{
    struct tb_core_model *m = f->model;
    struct tb_task *t = tb_core_task(TB_TASK_ADAPTER_FREE, m->engine_model);
    t->adapter_id = m->adapter_id;
    tb_core_run(f, t, unloaded);
}
