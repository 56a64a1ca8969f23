/* See fake_engine.h. One thread. */
#include "unit/core/fake_engine.h"

#include "unit/store/store_help.h"

struct adapter {
    struct tb_list node;
    uint64_t id;
    struct tb_lora_config lora;
    int64_t param, grad, step;
};

struct version {
    struct tb_list node;
    uint64_t id;
    int64_t param;
};

struct loss {
    struct tb_list node;
    uint64_t id;
    int64_t length; /* of its text */
};

struct tb_engine {
    struct tb_list tasks, adapters, versions, losses;
    struct tb_task *begun;
    size_t done[TB_TASK_SAMPLE + 1];
    struct tb_kv_stats kv;
};

static const struct tb_model_info infos[] = {
    {.name = "m0",
     .dir = "/models/m0",
     .arch = "FakeForCausalLM",
     .vocab = 100,
     .max_rank = 64,
     .max_context = 128},
    {.name = "m1",
     .dir = "/models/m1",
     .arch = "FakeForCausalLM",
     .max_rank = 16,
     .max_context = 128},
};

struct tb_engine *fake_engine_create(void)
{
    struct tb_engine *e = tb_calloc(1, sizeof(*e));
    tb_list_init(&e->tasks);
    tb_list_init(&e->adapters);
    tb_list_init(&e->versions);
    tb_list_init(&e->losses);
    return e;
}

void fake_progress(struct tb_engine *e, int32_t n)
{
    struct tb_task *t = TB_LIST_ENTRY(e->tasks.next, struct tb_task, node);
    assert_true(!tb_list_empty(&e->tasks) && t->op->u.sample.stream);
    struct tb_progress *p = tb_calloc(1, sizeof(*p) + (size_t)n * sizeof(p->tokens[0]));
    for (; p->n < n; p->n++)
        p->tokens[p->n].token = (int32_t)t->op->seq_id + p->n;
    t->progress(t, p);
    tb_free(p);
}

static size_t length(const struct tb_list *l)
{
    size_t n = 0;
    TB_LIST_FOREACH (it, l)
        n++;
    return n;
}

void fake_engine_destroy(struct tb_engine *e)
{
    assert_true(tb_list_empty(&e->tasks));
    for (struct tb_list *n; (n = tb_list_pop(&e->adapters));)
        tb_free(TB_LIST_ENTRY(n, struct adapter, node));
    for (struct tb_list *n; (n = tb_list_pop(&e->versions));)
        tb_free(TB_LIST_ENTRY(n, struct version, node));
    for (struct tb_list *n; (n = tb_list_pop(&e->losses));)
        tb_free(TB_LIST_ENTRY(n, struct loss, node));
    tb_free(e);
}

void fake_kv(struct tb_engine *e, uint64_t n_pages, uint64_t n_free)
{
    e->kv = (struct tb_kv_stats){.n_pages = n_pages, .n_free = n_free};
}

size_t fake_waiting(const struct tb_engine *e)
{
    return length(&e->tasks);
}

size_t fake_waiting_of(const struct tb_engine *e, enum tb_task_type type)
{
    size_t n = 0;
    TB_LIST_FOREACH (it, &e->tasks)
        n += TB_LIST_ENTRY(it, struct tb_task, node)->type == type;
    return n;
}

size_t fake_adapters(const struct tb_engine *e)
{
    return length(&e->adapters);
}

size_t fake_versions(const struct tb_engine *e)
{
    return length(&e->versions);
}

size_t fake_losses(const struct tb_engine *e)
{
    return length(&e->losses);
}

size_t fake_done(const struct tb_engine *e, enum tb_task_type type)
{
    return e->done[type];
}

int64_t fake_next_param(int64_t param, int64_t grad)
{
    return (31 * param + grad) % 100003;
}

static struct adapter *find_adapter(struct tb_engine *e, uint64_t id)
{
    TB_LIST_FOREACH (it, &e->adapters) {
        struct adapter *a = TB_LIST_ENTRY(it, struct adapter, node);
        if (a->id == id) return a;
    }
    fail_msg("adapter %llu does not live", (unsigned long long)id);
    return NULL;
}

static struct version *find_version(struct tb_engine *e, uint64_t id)
{
    TB_LIST_FOREACH (it, &e->versions) {
        struct version *v = TB_LIST_ENTRY(it, struct version, node);
        if (v->id == id) return v;
    }
    fail_msg("version %llu does not live", (unsigned long long)id);
    return NULL;
}

static struct loss *find_loss(struct tb_engine *e, uint64_t id)
{
    TB_LIST_FOREACH (it, &e->losses) {
        struct loss *l = TB_LIST_ENTRY(it, struct loss, node);
        if (l->id == id) return l;
    }
    return NULL;
}

static void add_loss(struct tb_engine *e, const struct tb_task *t)
{
    const struct tb_create_custom_loss *c = &t->op->u.create_custom_loss;
    if (!strcmp(c->text, "bad")) {
        tb_error_set(&t->op->error, TB_EUNSUPPORTED, "a bad graph");
        return;
    }
    struct loss *l = tb_calloc(1, sizeof(*l));
    l->id = t->loss_id;
    l->length = (int64_t)c->n_text;
    tb_list_push(&e->losses, &l->node);
}

static void free_loss(struct loss *l)
{
    if (!l) return; /* its creation failed */
    tb_list_del(&l->node);
    tb_free(l);
}

static struct adapter *add_adapter(struct tb_engine *e, const struct tb_task *t)
{
    struct adapter *a = tb_calloc(1, sizeof(*a));
    a->id = t->adapter_id;
    a->lora = t->lora;
    tb_list_push(&e->adapters, &a->node);
    return a;
}

static void add_version(struct tb_engine *e, const struct tb_task *t, int64_t param)
{
    struct version *v = tb_calloc(1, sizeof(*v));
    assert_true(t->version_id != 0);
    v->id = t->version_id;
    v->param = param;
    tb_list_push(&e->versions, &v->node);
}

static void metric(struct tb_op *op, double value)
{
    op->result.metrics = tb_arena_calloc(&op->arena, 1, sizeof(*op->result.metrics));
    op->result.metrics[0] = (struct tb_metric){"param:sum", value};
    op->result.n_metrics = 1;
}

static void train(struct adapter *a, struct tb_op *op)
{
    const struct tb_forward_backward *p = &op->u.forward_backward;
    if (p->loss_fn && !strcmp(p->loss_fn, "fail")) {
        tb_error_set(&op->error, TB_EINVAL, "loss fail");
        return;
    }
    if (op->type == TB_OP_FORWARD_BACKWARD) a->grad += p->n_data;
    struct tb_output *o = tb_arena_calloc(&op->arena, 1, sizeof(*o));
    o->n = 3;
    o->logprobs = tb_arena_calloc(&op->arena, 3, sizeof(float));
    o->logprobs[2] = -1.5f;
    op->result.outputs = o;
    op->result.n_outputs = 1;
    metric(op, (double)a->param);
}

static struct tb_adapter_state *export_state(const struct adapter *a, bool optimizer)
{
    struct tb_adapter_state *s = make_state(a->lora.rank, 1, optimizer);
    s->base_model = NULL;
    s->lora = a->lora;
    s->step = a->step;
    s->p[0] = (float)a->param;
    return s;
}

static void load(struct tb_engine *e, struct tb_task *t)
{
    struct adapter *a;
    if (t->create) {
        a = add_adapter(e, t);
        a->lora = t->state->lora;
    } else {
        a = find_adapter(e, t->adapter_id);
        if (a->lora.rank != t->state->lora.rank) {
            tb_error_set(tb_task_error(t), TB_EINVAL, "rank %d is not %d", t->state->lora.rank,
                         a->lora.rank);
            return;
        }
    }
    assert_int_equal(t->with_optimizer, t->state->m != NULL);
    a->param = (int64_t)t->state->p[0];
    a->grad = 0;
    a->step = t->with_optimizer ? t->state->step : 0;
}

static void execute(struct tb_engine *e, struct tb_task *t)
{
    struct adapter *a;
    struct version *v;
    switch (t->type) {
    case TB_TASK_ADAPTER_CREATE:
        if (t->lora.rank == 13)
            tb_error_set(tb_task_error(t), TB_ENOMEM, "no memory for the adapter");
        else
            add_adapter(e, t);
        break;
    case TB_TASK_ADAPTER_LOAD: load(e, t); break;
    case TB_TASK_ADAPTER_FREE:
        a = find_adapter(e, t->adapter_id);
        tb_list_del(&a->node);
        tb_free(a);
        break;
    case TB_TASK_TRAIN:
        train(find_adapter(e, t->adapter_id), t->op);
        if (t->loss_id) metric(t->op, (double)find_loss(e, t->loss_id)->length);
        break;
    case TB_TASK_LOSS_CREATE: add_loss(e, t); break;
    case TB_TASK_LOSS_FREE: free_loss(find_loss(e, t->loss_id)); break;
    case TB_TASK_OPTIM:
        a = find_adapter(e, t->adapter_id);
        a->param = fake_next_param(a->param, a->grad);
        a->grad = 0;
        a->step++;
        metric(t->op, (double)a->param);
        break;
    case TB_TASK_EXPORT:
        t->state = export_state(find_adapter(e, t->adapter_id), t->with_optimizer);
        break;
    case TB_TASK_PUBLISH: add_version(e, t, find_adapter(e, t->adapter_id)->param); break;
    case TB_TASK_VERSION_LOAD: add_version(e, t, (int64_t)t->state->p[0]); break;
    case TB_TASK_VERSION_FREE:
        v = find_version(e, t->version_id);
        tb_list_del(&v->node);
        tb_free(v);
        break;
    case TB_TASK_SAMPLE:
        assert_true(t->op->u.sample.has_seed);
        t->op->result.prompt_cache_hit_tokens =
            t->version_id ? (int32_t)find_version(e, t->version_id)->param : -1;
        break;
    default: fail_msg("task type %d is for lanes only", (int)t->type);
    }
}

static void complete(struct tb_engine *e, struct tb_task *t)
{
    tb_list_del(&t->node);
    bool stop = t->canceled && (t->type == TB_TASK_SAMPLE || t != e->begun);
    if (t == e->begun) e->begun = NULL;
    if (stop)
        tb_error_set(tb_task_error(t), TB_ECANCELED, "canceled");
    else
        execute(e, t);
    e->done[t->type]++;
    t->cb(t);
}

bool fake_step(struct tb_engine *e)
{
    if (tb_list_empty(&e->tasks)) return false;
    complete(e, TB_LIST_ENTRY(e->tasks.next, struct tb_task, node));
    return true;
}

static bool oldest_of_its_adapter(const struct tb_engine *e, const struct tb_task *t)
{
    TB_LIST_FOREACH (it, &e->tasks) {
        const struct tb_task *o = TB_LIST_ENTRY(it, struct tb_task, node);
        if (o == t) return true;
        bool same = t->adapter_id
                        ? o->adapter_id == t->adapter_id
                        : t->type == TB_TASK_VERSION_FREE && o->version_id == t->version_id;
        if (same) return false;
    }
    return true;
}

bool fake_step_any(struct tb_engine *e, uint64_t pick)
{
    size_t n = fake_waiting(e);
    if (n == 0) return false;
    for (size_t k = 0; k < n; k++) {
        struct tb_list *it = e->tasks.next;
        for (size_t i = (size_t)((pick + k) % n); i > 0; i--)
            it = it->next;
        struct tb_task *t = TB_LIST_ENTRY(it, struct tb_task, node);
        if (!oldest_of_its_adapter(e, t)) continue;
        complete(e, t);
        return true;
    }
    return false;
}

void fake_begin(struct tb_engine *e)
{
    e->begun = TB_LIST_ENTRY(e->tasks.next, struct tb_task, node);
}

/* ---- engine.h */

struct tb_task *tb_task_create(enum tb_task_type type)
{
    struct tb_task *t = tb_calloc(1, sizeof(*t));
    tb_list_init(&t->node);
    t->type = type;
    return t;
}

void tb_task_destroy(struct tb_task *t)
{
    if (!t) return;
    tb_adapter_state_destroy(t->state);
    tb_free(t);
}

struct tb_error *tb_task_error(struct tb_task *t)
{
    return t->op ? &t->op->error : &t->error;
}

int tb_engine_create(struct tb_engine **out, uv_loop_t *loop, const struct tb_engine_options *o,
                     struct tb_error *err)
{
    (void)loop;
    (void)o;
    (void)err;
    *out = fake_engine_create();
    return 0;
}

void tb_engine_close(struct tb_engine *e, void (*cb)(void *arg), void *arg)
{
    fake_engine_destroy(e);
    cb(arg);
}

int tb_engine_n_models(const struct tb_engine *e)
{
    (void)e;
    return 2;
}

const struct tb_model_info *tb_engine_model_info(const struct tb_engine *e, int model)
{
    (void)e;
    return &infos[model];
}

const char *tb_engine_model_tokenizer(const struct tb_engine *e, int model)
{
    (void)e;
    return model == 0 ? "tok0" : NULL;
}

int tb_engine_model_find(const struct tb_engine *e, const char *name)
{
    (void)e;
    return !strcmp(name, "m0") ? 0 : !strcmp(name, "m1") ? 1 : -1;
}

const char *tb_engine_describe(const struct tb_engine *e)
{
    (void)e;
    return "fake";
}

void tb_engine_submit(struct tb_engine *e, struct tb_task *task)
{
    tb_list_push(&e->tasks, &task->node);
}

void tb_engine_cancel(struct tb_engine *e, struct tb_task *task)
{
    (void)e;
    task->canceled = true;
}

void tb_engine_stats(const struct tb_engine *e, struct tb_engine_stats *out)
{
    memset(out, 0, sizeof(*out));
    for (int i = 0; i <= TB_TASK_SAMPLE; i++)
        out->tasks_done[i] = e->done[i];
    out->kv = e->kv;
}
