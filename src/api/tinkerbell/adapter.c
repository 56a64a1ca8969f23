/*
 * Names of adapters and the models behind them; add_lora, remove_lora and the weights jobs (see
 * tinkerbell.h). Thread: the loop's.
 */
#include <stdio.h>
#include <string.h>

#include "api/tinkerbell/tinkerbell.h"
#include "util/clock.h"

struct tb_bell_tenant *tb_bell_tenant(struct tb_api *a, struct tb_tenant *who)
{
    const char *name = tb_tenant_name(who);
    struct tb_bell_tenant *t = tb_map_get(&a->bell->tenants, name, strlen(name));
    if (t) return t;
    t = tb_calloc(1, sizeof(*t));
    t->who = who;
    tb_map_init(&t->adapters);
    tb_map_init(&t->losses);
    tb_list_init(&t->over);
    tb_map_put(&a->bell->tenants, name, strlen(name), t);
    return t;
}

const struct tb_llm_model *tb_bell_base(struct tb_api *a, const char *name)
{
    const struct tb_llm_model *m = tb_llm_model_find(a, name);
    const char *end = NULL;
    char base[TB_MAX_ID + 1];
    for (const char *p = name; !m && (p = strstr(p, TB_BELL_LORA)); p++)
        end = p;
    if (end && (size_t)(end - name) < sizeof(base)) {
        snprintf(base, sizeof(base), "%.*s", (int)(end - name), name);
        m = tb_llm_model_find(a, base);
    }
    return m ? m : tb_llm_model_find(a, NULL);
}

struct tb_bell_adapter *tb_bell_adapter_find(struct tb_bell_tenant *t, const char *name)
{
    return name ? tb_map_get(&t->adapters, name, strlen(name)) : NULL;
}

void tb_bell_adapter_changed(struct tb_bell_adapter *ad)
{
    ad->changes++;
    if (ad->sampler_id)
        tb_core_end_sampling_session(tb_api_core(ad->a), ad->tenant->who, ad->sampler_id);
    tb_free(ad->sampler_id);
    ad->sampler_id = NULL;
}

void tb_bell_adapter_no_gradients(struct tb_bell_adapter *ad)
{
    ad->n_gradients = 0;
    ad->epoch = ++ad->a->bell->n_epochs;
}

void tb_bell_adapter_free(struct tb_bell_adapter *ad)
{
    if (ad->creation_id) tb_core_unstream(tb_api_core(ad->a), &ad->creation);
    tb_free(ad->creation_id);
    tb_free(ad->name);
    tb_free(ad->model_id);
    tb_free(ad->sampler_id);
    tb_free(ad);
}

struct tb_op *tb_bell_op(struct tb_bell_job *j, struct tb_op *op)
{
    op->model_id = tb_arena_strdup(&op->arena, j->adapter->model_id);
    op->seq_id = j->adapter->next_seq++;
    return op;
}

/* Its name is free again. */
static void forget(struct tb_bell_adapter *ad)
{
    struct tb_bell_job *adder = ad->adder;
    struct tb_error e = {0};
    tb_bell_adapter_changed(ad);
    tb_map_del(&ad->tenant->adapters, ad->name, strlen(ad->name));
    if (adder) tb_error_set(&e, TB_EGONE, "%s was removed meanwhile", ad->name);
    tb_bell_adapter_free(ad);
    if (adder) tb_bell_fail(adder, &e);
}

/* ---- creation */

static int session(struct tb_bell_job *j, struct tb_error *e)
{
    struct tb_bell_tenant *t = j->tenant;
    struct tb_session_params p = {.sdk_version = "tinkerbell", .lasting = true};
    const char *id;
    if (t->session_id && !tb_core_heartbeat(tb_api_core(j->a), t->who, t->session_id, e)) return 0;
    int rc = tb_core_create_session(tb_api_core(j->a), t->who, &p, &id, e);
    if (rc) return rc;
    tb_free(t->session_id);
    t->session_id = tb_strdup(id);
    return 0;
}

static struct tb_bell_adapter *adapter_new(struct tb_bell_job *j, const char *name)
{
    struct tb_bell_adapter *ad = tb_calloc(1, sizeof(*ad));
    ad->a = j->a;
    ad->tenant = j->tenant;
    ad->name = tb_strdup(name);
    ad->base = tb_bell_base(j->a, name);
    ad->next_seq = 1;
    ad->rank = j->lora.rank;
    tb_bell_adapter_no_gradients(ad);
    tb_map_put(&j->tenant->adapters, name, strlen(name), ad);
    return ad;
}

static void after_add(struct tb_bell_job *j, const char *name)
{
    struct tb_json_out o = tb_bell_result(j);
    tb_jout_str(&o, "model_id", name);
    tb_jout_object_end(&o);
    tb_bell_done(j);
}

/* What was queued behind a creation that fails has failed with it. */
static void on_created(struct tb_core_stream *s, enum tb_future_state state, const struct tb_op *op)
{
    struct tb_bell_adapter *ad = s->arg;
    struct tb_bell_job *adder = ad->adder;
    struct tb_error e = {0};
    if (state == TB_FUTURE_FAILED) e = op->error;
    tb_core_delivered(tb_api_core(ad->a), ad->creation_id, strlen(ad->creation_id));
    tb_free(ad->creation_id);
    ad->creation_id = NULL;
    ad->adder = NULL;
    if (state == TB_FUTURE_DONE) {
        if (adder) after_add(adder, ad->name);
        return;
    }
    if (!e.code) tb_error_set(&e, TB_EGONE, "the server gave the creation up");
    forget(ad);
    if (adder) tb_bell_fail(adder, &e);
}

static int submit_creation(struct tb_bell_job *j, struct tb_bell_adapter *ad, struct tb_error *e)
{
    struct tb_ticket ticket;
    int rc = session(j, e);
    if (rc) return rc;
    struct tb_op *op = tb_op_create(TB_OP_CREATE_MODEL);
    op->session_id = tb_arena_strdup(&op->arena, j->tenant->session_id);
    op->model_seq_id = j->tenant->next_model++;
    op->u.create_model = (struct tb_create_model){
        .base_model = tb_arena_strdup(&op->arena, tb_llm_model_info(ad->base)->name),
        .lora = j->lora,
        .optimizer = "adamw"};
    rc = tb_core_submit(tb_api_core(j->a), j->tenant->who, op, &ticket, e);
    if (rc) return rc;
    ad->model_id = tb_strdup(ticket.model_id);
    ad->creation_id = tb_strdup(ticket.request_id);
    ad->creation = (struct tb_core_stream){.end = on_created, .arg = ad};
    return 0;
}

/* A new adapter's creation is watched after what follows it was submitted. */
void tb_bell_with_adapter(struct tb_bell_job *j, const char *name,
                          void (*then)(struct tb_bell_job *j))
{
    struct tb_error e = {0};
    int rc = 0;
    j->adapter = tb_bell_adapter_find(j->tenant, name);
    if (j->adapter) {
        then(j);
        return;
    }
    if (j->tenant->adapters.n >= TB_BELL_ADAPTERS)
        rc = tb_error_set(&e, TB_EBUSY, "there are %d adapters already; remove one",
                          TB_BELL_ADAPTERS);
    struct tb_bell_adapter *ad = rc ? NULL : adapter_new(j, name);
    if (ad && (rc = submit_creation(j, ad, &e))) forget(ad);
    if (rc) {
        tb_bell_fail(j, &e);
        return;
    }
    struct tb_tenant *who = j->tenant->who;
    j->adapter = ad;
    then(j);
    tb_core_stream(tb_api_core(ad->a), who, ad->creation_id, strlen(ad->creation_id),
                   &ad->creation);
}

/* ---- add_lora, remove_lora */

int tb_bell_lora(struct tb_bell_job *j, const struct tb_json *root, struct tb_error *err)
{
    static const char *const unserved[] = {"target_modules", "lora_dropout"};
    int64_t seed = 0;
    int rc;
    if ((rc = tb_llm_refuse(root, unserved, TB_ARRAY_LEN(unserved), err)) ||
        (rc = tb_json_int(root, "seed", false, 0, INT64_MAX, &seed, err)) ||
        (rc = tb_llm_int32(root, "rank", 1, INT32_MAX, &j->lora.rank, err)) ||
        (rc = tb_llm_float(root, "alpha", 1e-6, 1e6, &j->lora.alpha, err)))
        return rc;
    j->lora.seed = (uint64_t)seed;
    return 0;
}

static int prepare_add(struct tb_bell_job *j, const struct tb_json *root, struct tb_error *err)
{
    int rc = tb_json_string(root, "base_model", false, &j->arena, TB_MAX_ID, &j->base_model, err);
    j->echo = j->base_model;
    return rc ? rc : tb_bell_lora(j, root, err);
}

static void wait_for_creation(struct tb_bell_job *j)
{
    j->adapter->adder = j;
}

static void start_add(struct tb_bell_job *j)
{
    char name[TB_MAX_ID + 32];
    do {
        snprintf(name, sizeof(name), "%s" TB_BELL_LORA "%08x",
                 j->base_model ? j->base_model : "base", (unsigned)tb_random_u64());
    } while (tb_bell_adapter_find(j->tenant, name));
    tb_bell_with_adapter(j, name, wait_for_creation);
}

const struct tb_bell_kind tb_bell_add_lora = {"Add LoRA", prepare_add, start_add};

int tb_bell_named(struct tb_bell_job *j, const struct tb_json *root, struct tb_error *err)
{
    int rc = tb_json_string(root, "model_id", false, &j->arena, TB_MAX_ID, &j->model_id, err);
    if (rc == 0 && !j->model_id)
        rc = tb_json_string(root, "adapter_id", false, &j->arena, TB_MAX_ID, &j->model_id, err);
    j->echo = j->model_id;
    return rc;
}

static void say(struct tb_bell_job *j, const char *status, const char *path)
{
    struct tb_json_out o = tb_bell_result(j);
    tb_jout_str(&o, "status", status);
    if (path) tb_jout_str(&o, "path", path);
    tb_jout_object_end(&o);
    tb_bell_done(j);
}

static void removed(struct tb_bell_job *j, const struct tb_op *op)
{
    (void)op;
    say(j, "deleted", NULL);
}

static void start_remove(struct tb_bell_job *j)
{
    j->adapter = tb_bell_adapter_find(j->tenant, j->model_id);
    if (!j->adapter) { /* there is none, which is what was asked for */
        say(j, "deleted", NULL);
        return;
    }
    struct tb_bell_adapter *ad = j->adapter;
    if (tb_bell_run(j, tb_bell_op(j, tb_op_create(TB_OP_UNLOAD_MODEL)), removed)) forget(ad);
}

const struct tb_bell_kind tb_bell_remove_lora = {"Remove LoRA", tb_bell_named, start_remove};

/* ---- weights */

static int prepare_weights(struct tb_bell_job *j, const struct tb_json *root, struct tb_error *err)
{
    int rc = tb_bell_named(j, root, err);
    if (rc) return rc;
    if ((rc = tb_json_string(root, "path", false, &j->arena, 4096, &j->path, err))) return rc;
    if (!j->model_id) j->model_id = "base";
    return 0;
}

/* The last part of a path, as a checkpoint's name. */
static const char *name_of(const char *path)
{
    const char *slash = path ? strrchr(path, '/') : NULL;
    return slash ? slash + 1 : path && *path ? path : "weights";
}

static void saved(struct tb_bell_job *j, const struct tb_op *op)
{
    say(j, "saved", op->result.path);
}

static void save(struct tb_bell_job *j, enum tb_op_type type)
{
    struct tb_op *op = tb_bell_op(j, tb_op_create(type));
    op->u.save_weights = (struct tb_save_weights){
        .name = tb_arena_strdup(&op->arena, name_of(j->path)), .overwrite = true};
    op->u.save_weights.sampling_session_seq_id = -1;
    tb_bell_run(j, op, saved);
}

static void save_training(struct tb_bell_job *j)
{
    save(j, TB_OP_SAVE_WEIGHTS);
}

static void save_sampler(struct tb_bell_job *j)
{
    save(j, TB_OP_SAVE_WEIGHTS_FOR_SAMPLER);
}

static void start_save(struct tb_bell_job *j)
{
    tb_bell_with_adapter(j, j->model_id, save_training);
}

static void start_save_sampler(struct tb_bell_job *j)
{
    tb_bell_with_adapter(j, j->model_id, save_sampler);
}

static void loaded(struct tb_bell_job *j, const struct tb_op *op)
{
    say(j, "loaded", op->result.path);
}

static void load(struct tb_bell_job *j)
{
    struct tb_bell_adapter *ad = j->adapter;
    struct tb_op *op = tb_bell_op(j, tb_op_create(TB_OP_LOAD_WEIGHTS));
    struct tb_load_weights *l = &op->u.load_weights;
    l->optimizer = true;
    if (j->path && strncmp(j->path, TB_LLM_CHECKPOINT, strlen(TB_LLM_CHECKPOINT)) == 0)
        l->path = tb_arena_strdup(&op->arena, j->path);
    else
        l->path = tb_arena_printf(&op->arena, TB_LLM_CHECKPOINT "%s/weights/%s",
                                  j->adapter->model_id, name_of(j->path));
    if (!tb_bell_run(j, op, loaded)) return;
    tb_bell_adapter_changed(ad);
    tb_bell_adapter_no_gradients(ad);
}

static void start_load(struct tb_bell_job *j)
{
    tb_bell_with_adapter(j, j->model_id, load);
}

const struct tb_bell_kind tb_bell_load = {"Load weights", prepare_weights, start_load};
const struct tb_bell_kind tb_bell_save = {"Save weights", prepare_weights, start_save};
const struct tb_bell_kind tb_bell_save_sampler = {"Save weights", prepare_weights,
                                                  start_save_sampler};
