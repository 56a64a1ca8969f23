/*
 * A thousand random schedules of mixed ops of several tenants on a small real model, run as they
 * come and against the same ops submitted one by one, each awaited: outputs, losses, samples and
 * exported states are equal to the bit, whatever was packed, split, cached, preempted or canceled
 * beside them.
 */
#include "unit/model/helper.h"

#include <string.h>

#include "engine/engine.h"
#include "util/buf.h"
#include "util/mem.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#    define N_SCHEDULES 200
#elif defined(__has_feature)
#    if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#        define N_SCHEDULES 200
#    endif
#endif
#ifndef N_SCHEDULES
#    define N_SCHEDULES 1000
#endif
#define MAX_ITEMS 48
#define N_TENANTS 4

static const struct shape shape = {.arch = "Qwen3ForCausalLM",
                                   .vocab = 37,
                                   .hidden = 16,
                                   .ffn = 24,
                                   .layers = 2,
                                   .heads = 2,
                                   .kv_heads = 1,
                                   .head_dim = 8,
                                   .max_pos = 128,
                                   .tied = true};

enum kind { CREATE, TRAIN, OPTIM, PUBLISH, SAMPLE, EXPORT, LOAD, FREE, VERSION_FREE };

struct item {
    enum kind kind;
    int tenant;
    int needs; /* item whose end it waits for, or -1 */
    int of;    /* the creation, publish or export it refers to, or -1 */
    uint64_t seed;
    bool cancel;
    /* of one run */
    struct tb_task *task; /* submitted */
    bool done;
    struct tb_adapter_state *state; /* of an export */
    struct tb_buf result;
    int code;
};

struct schedule {
    int n;
    struct item items[MAX_ITEMS];
};

struct runner {
    uv_loop_t loop;
    struct tb_engine *engine;
    struct tb_model *model; /* to look at its pages */
    uint64_t first_id;      /* of this run's adapters and versions */
};

struct rng {
    uint64_t state;
};

static uint32_t below(struct rng *r, uint32_t n)
{
    r->state += 0x9e3779b97f4a7c15u;
    uint64_t z = r->state;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (uint32_t)((z ^ z >> 31) % n);
}

/* ---- schedules */

static int add(struct schedule *s, struct item it)
{
    s->items[s->n] = it;
    return s->n++;
}

static void make_tenant(struct schedule *s, int tenant, struct rng *r)
{
    int n = 3 + (int)below(r, MAX_ITEMS / N_TENANTS - 3);
    int creation = -1, versions[MAX_ITEMS], n_versions = 0, exports[MAX_ITEMS], n_exports = 0;
    for (int i = 0; i < n; i++) {
        struct item it = {.tenant = tenant, .needs = -1, .of = creation, .seed = r->state};
        uint32_t x = below(r, 100);
        it.seed = ((uint64_t)x << 32) + below(r, 1u << 30);
        if (creation < 0 && x < 60) {
            it.kind = n_exports && x < 20 ? LOAD : CREATE;
            if (it.kind == LOAD) it.needs = it.of = exports[below(r, (uint32_t)n_exports)];
            creation = add(s, it);
        } else if (creation >= 0 && x < 35) {
            it.kind = TRAIN;
            add(s, it);
        } else if (creation >= 0 && x < 50) {
            it.kind = OPTIM;
            add(s, it);
        } else if (creation >= 0 && x < 60) {
            it.kind = PUBLISH;
            versions[n_versions++] = add(s, it);
        } else if (creation >= 0 && x < 68) {
            it.kind = EXPORT;
            exports[n_exports++] = add(s, it);
        } else if (creation >= 0 && x < 72) {
            it.kind = FREE;
            add(s, it);
            creation = -1;
        } else if (n_versions && x < 75) {
            it.kind = VERSION_FREE;
            it.needs = it.of = versions[--n_versions];
            add(s, it);
        } else {
            it.kind = SAMPLE;
            it.of = -1; /* the base model */
            if (n_versions && x % 4) it.needs = it.of = versions[below(r, (uint32_t)n_versions)];
            it.cancel = x % 5 == 0;
            add(s, it);
        }
    }
    if (creation >= 0)
        add(s, (struct item){.kind = EXPORT, .tenant = tenant, .needs = -1, .of = creation});
}

static void make_schedule(struct schedule *s, uint64_t seed)
{
    struct rng r = {seed};
    memset(s, 0, sizeof(*s));
    for (int t = 0; t < N_TENANTS; t++)
        make_tenant(s, t, &r);
}

/* ---- ops */

static struct tb_op *make_train(struct rng *r)
{
    static const char *const losses[] = {"cross_entropy", "importance_sampling", "ppo", "cispo",
                                         "dro"};
    bool backward = below(r, 4) > 0;
    uint32_t loss = below(r, TB_ARRAY_LEN(losses)), invalid = below(r, 20);
    int n_data = 1 + (int)below(r, 4);
    struct tb_op *op = tb_op_create(backward ? TB_OP_FORWARD_BACKWARD : TB_OP_FORWARD);
    struct tb_forward_backward *fb = &op->u.forward_backward;
    fb->loss_fn = losses[loss];
    fb->n_data = n_data;
    fb->data = tb_arena_calloc(&op->arena, (size_t)n_data, sizeof(*fb->data));
    for (int i = 0; i < n_data; i++) {
        int32_t tokens[100];
        float a[100], b[100];
        int n = 1 + (int)below(r, below(r, 8) ? 24 : 90);
        random_tokens(tokens, n + 1, shape.vocab, below(r, 1u << 30));
        if (invalid == 0 && i == n_data - 1) tokens[n / 2] = shape.vocab;
        int64_t *targets = tb_arena_calloc(&op->arena, (size_t)n, sizeof(*targets));
        int32_t *input = tb_arena_calloc(&op->arena, (size_t)n, sizeof(*input));
        for (int j = 0; j < n; j++) {
            input[j] = tokens[j];
            targets[j] = tokens[j + 1] % shape.vocab;
            a[j] = below(r, 3) ? (float)below(r, 200) / 100 - 1 : 0;
            b[j] = -(float)below(r, 400) / 100;
        }
        fb->data[i] = (struct tb_datum){.n_tokens = n, .tokens = input};
        fb->data[i].inputs = tb_arena_calloc(&op->arena, 4, sizeof(struct tb_tensor));
        fb->data[i].n_inputs = 1;
        fb->data[i].inputs[0] = (struct tb_tensor){.name = "target_tokens",
                                                   .type = TB_TENSOR_I64,
                                                   .n_dims = 1,
                                                   .shape = {n},
                                                   .n = n,
                                                   .data.i64 = targets};
        if (loss == 0) {
            add_input(op, i, "weights", a, n);
        } else {
            add_input(op, i, "logprobs", b, n);
            add_input(op, i, "advantages", a, n);
        }
    }
    return op;
}

static struct tb_op *make_sample(struct rng *r)
{
    int32_t prompt[100];
    int n = 1 + (int)below(r, below(r, 6) ? 40 : 90), max = 1 + (int)below(r, 30);
    uint32_t text = below(r, 3); /* few texts, so that prefixes are found */
    random_tokens(prompt, n, shape.vocab, text);
    struct tb_op *op = op_sample(prompt, n, max, below(r, 1000));
    struct tb_sample *q = &op->u.sample;
    q->n_samples = below(r, 3) ? 1 : 1 + (int)below(r, 5);
    q->temperature = (float)below(r, 4) / 2;
    if (below(r, 3) == 0) q->top_k = 5;
    if (below(r, 3) == 0) q->top_p = 0.8f;
    if (below(r, 4) == 0) q->min_p = 0.05f;
    if (below(r, 4) == 0) q->presence_penalty = 0.5f;
    if (below(r, 6) == 0) q->repetition_penalty = 1.2f;
    if (below(r, 3) == 0) q->topk_sample_logprobs = 3;
    q->prompt_logprobs = below(r, 4) == 0;
    if (q->prompt_logprobs && n > 5 && below(r, 2)) q->prompt_logprobs_last_n = 4;
    if (below(r, 4) == 0 && n > 1) q->prompt_alt_tokens_k = 2;
    if (below(r, 4) == 0) q->topk_prompt_logprobs = 2;
    if (below(r, 40) == 0) q->max_tokens = 1000; /* beyond the context */
    q->stream = below(r, 2);
    static const int32_t stops[] = {7};
    if (below(r, 2)) {
        q->stop_tokens = stops;
        q->n_stop_tokens = 1;
    }
    return op;
}

/* ---- running */

static void put(struct tb_buf *b, const void *p, size_t n)
{
    if (p && n) tb_buf_append(b, p, n);
}

static void put_result(struct tb_buf *b, const struct tb_op *op)
{
    const struct tb_result *r = &op->result;
    const struct tb_sample *q = &op->u.sample;
    for (int i = 0; i < r->n_outputs; i++)
        put(b, r->outputs[i].logprobs,
            (size_t)r->outputs[i].n * (size_t)TB_MAX(r->outputs[i].k, 1) * sizeof(float));
    for (int i = 0; i < r->n_metrics; i++)
        put(b, &r->metrics[i].value, sizeof(double));
    if (op->type != TB_OP_SAMPLE || op->error.code) return;
    size_t P = (size_t)q->n_prompt;
    put(b, r->prompt_logprobs, P * 4);
    put(b, r->topk_prompt_ids, P * (size_t)q->topk_prompt_logprobs * 4);
    put(b, r->topk_prompt_logprobs, P * (size_t)q->topk_prompt_logprobs * 4);
    put(b, r->alt_tokens, (P - 1) * (size_t)q->prompt_alt_tokens_k * 4);
    put(b, r->alt_logprobs, (P - 1) * (size_t)q->prompt_alt_tokens_k * 4);
    for (int i = 0; i < r->n_sequences; i++) {
        const struct tb_sequence *s = &r->sequences[i];
        size_t n = (size_t)s->n, k = (size_t)q->topk_sample_logprobs;
        put(b, &s->stopped, sizeof(s->stopped));
        put(b, s->tokens, n * 4);
        put(b, s->logprobs, n * 4);
        put(b, s->topk_ids, n * k * 4);
        put(b, s->topk_logprobs, n * k * 4);
    }
}

static void on_done(struct tb_task *t)
{
    struct item *it = t->arg;
    const struct tb_error *e = tb_task_error(t);
    it->code = e->code;
    if (e->code && e->code != TB_ECANCELED) put(&it->result, e->msg, strlen(e->msg));
    if (t->op) put_result(&it->result, t->op);
    if (it->kind == EXPORT && !e->code) {
        const struct tb_adapter_state *s = it->state = t->state;
        t->state = NULL;
        put(&it->result, &s->step, sizeof(s->step));
        put(&it->result, s->p, (size_t)s->n_floats * 4);
        put(&it->result, s->m, s->m ? (size_t)s->n_floats * 4 : 0);
        put(&it->result, s->v, s->v ? (size_t)s->n_floats * 4 : 0);
    }
    it->done = true;
    it->task = NULL;
    tb_op_destroy(t->op);
    tb_task_destroy(t);
}

static float *copy_floats(const float *p, int64_t n)
{
    float *c = p ? tb_malloc((size_t)n * sizeof(*c)) : NULL;
    if (c) memcpy(c, p, (size_t)n * sizeof(*c));
    return c;
}

static struct tb_adapter_state *copy_state(const struct tb_adapter_state *s)
{
    struct tb_adapter_state *c = tb_adapter_state_create();
    c->base_model = s->base_model;
    c->lora = s->lora;
    c->step = s->step;
    c->n_tensors = s->n_tensors;
    c->n_floats = s->n_floats;
    c->tensors = tb_arena_calloc(&c->arena, (size_t)s->n_tensors, sizeof(*c->tensors));
    for (int i = 0; i < s->n_tensors; i++) {
        c->tensors[i] = s->tensors[i];
        c->tensors[i].name = tb_arena_strdup(&c->arena, s->tensors[i].name);
    }
    c->p = copy_floats(s->p, s->n_floats);
    c->m = copy_floats(s->m, s->n_floats);
    c->v = copy_floats(s->v, s->n_floats);
    return c;
}

static void submit(struct runner *u, struct schedule *s, int at)
{
    static const enum tb_task_type types[] = {[CREATE] = TB_TASK_ADAPTER_CREATE,
                                              [TRAIN] = TB_TASK_TRAIN,
                                              [OPTIM] = TB_TASK_OPTIM,
                                              [PUBLISH] = TB_TASK_PUBLISH,
                                              [SAMPLE] = TB_TASK_SAMPLE,
                                              [EXPORT] = TB_TASK_EXPORT,
                                              [LOAD] = TB_TASK_ADAPTER_LOAD,
                                              [FREE] = TB_TASK_ADAPTER_FREE,
                                              [VERSION_FREE] = TB_TASK_VERSION_FREE};
    struct item *it = &s->items[at];
    struct rng r = {it->seed};
    struct tb_task *t = tb_task_create(types[it->kind]);
    bool creates = it->kind == CREATE || it->kind == LOAD;
    tb_buf_init(&it->result, 64u << 20);
    t->cb = on_done;
    t->arg = it;
    t->adapter_id = u->first_id + (uint64_t)(creates ? at : TB_MAX(it->of, 0));
    switch (it->kind) {
    case CREATE:
        t->lora = (struct tb_lora_config){
            1 + (int)below(&r, 6), 32, true, below(&r, 100), true, true, below(&r, 2)};
        break;
    case LOAD:
        t->state = copy_state(s->items[it->of].state);
        t->create = true;
        t->with_optimizer = t->state->m && below(&r, 2);
        t->lora = t->state->lora;
        break;
    case TRAIN: t->op = make_train(&r); break;
    case OPTIM:
        t->op = op_adam(0.01 * (1 + below(&r, 5)));
        if (below(&r, 3) == 0) t->op->u.optim_step.grad_clip_norm = 0.5;
        break;
    case PUBLISH: t->version_id = u->first_id + (uint64_t)at; break;
    case SAMPLE:
        t->version_id = it->of >= 0 ? u->first_id + (uint64_t)it->of : 0;
        t->op = make_sample(&r);
        t->op->share = (uint64_t)it->tenant;
        break;
    case EXPORT: t->with_optimizer = true; break;
    case VERSION_FREE: t->version_id = u->first_id + (uint64_t)it->of; break;
    case FREE: break;
    }
    it->task = t;
    tb_engine_submit(u->engine, t);
}

static bool may_submit(const struct schedule *s, int at)
{
    const struct item *it = &s->items[at];
    return it->needs < 0 || s->items[it->needs].done;
}

static void run_alone(struct runner *u, struct schedule *s)
{
    for (int i = 0; i < s->n; i++) {
        submit(u, s, i);
        while (!s->items[i].done)
            uv_run(&u->loop, UV_RUN_ONCE);
    }
}

static void run_together(struct runner *u, struct schedule *s, uint64_t seed)
{
    struct rng r = {seed};
    int next[N_TENANTS], open = s->n;
    for (int t = 0; t < N_TENANTS; t++)
        for (next[t] = 0; next[t] < s->n && s->items[next[t]].tenant != t;)
            next[t]++;
    while (open) {
        int t = (int)below(&r, N_TENANTS), at = next[t];
        bool mine = at < s->n && s->items[at].tenant == t;
        if (mine && may_submit(s, at)) {
            submit(u, s, at);
            next[t]++;
        } else {
            uv_run(&u->loop, UV_RUN_NOWAIT);
        }
        if (below(&r, 4) == 0) uv_run(&u->loop, UV_RUN_NOWAIT);
        struct item *it = &s->items[below(&r, (uint32_t)s->n)];
        if (it->task && it->cancel && below(&r, 3) == 0) tb_engine_cancel(u->engine, it->task);
        open = 0;
        for (int i = 0; i < s->n; i++)
            open += !s->items[i].done;
    }
}

/* What the run left in the engine goes; then only kept pages are in use. */
static void clean_up(struct runner *u, const struct schedule *s)
{
    struct schedule rest = {.n = 0};
    for (int i = 0; i < s->n; i++) {
        enum kind k = s->items[i].kind;
        struct item it = {.needs = -1, .of = i};
        if (k == PUBLISH) it.kind = VERSION_FREE;
        if (k == CREATE || k == LOAD) it.kind = FREE;
        if (it.kind) add(&rest, it);
    }
    run_alone(u, &rest);
    for (int i = 0; i < rest.n; i++)
        tb_buf_fini(&rest.items[i].result);
    assert_int_equal(tb_kv_room(&u->model->kv), u->model->kv.n_pages);
}

static void start(struct runner *u, const char *dir, const char *dtype, int threads, int n_pages)
{
    struct tb_engine_model m = {.name = "m", .dir = dir};
    struct tb_engine_options o = {.models = &m,
                                  .n_models = 1,
                                  .backend = "cpu",
                                  .dtype = dtype,
                                  .n_threads = threads,
                                  .max_rank = 16};
    uv_loop_init(&u->loop);
    CHECK_OK(tb_engine_create(&u->engine, &u->loop, &o, &check_err));
    u->model = TB_LIST_ENTRY((uintptr_t)tb_engine_model_info(u->engine, 0), struct tb_model, info);
    u->first_id = 1;
    if (!n_pages) return;
    struct tb_kv *kv = &u->model->kv; /* not in use yet */
    u->model->opt.kv_bytes = kv->bytes / (size_t)kv->n_pages * (size_t)n_pages;
    tb_kv_fini(kv, u->model);
    CHECK_OK(tb_kv_init(kv, u->model, &check_err));
}

static void on_closed(void *arg)
{
    *(bool *)arg = true;
}

static void stop(struct runner *u)
{
    bool closed = false;
    tb_engine_close(u->engine, on_closed, &closed);
    while (!closed)
        uv_run(&u->loop, UV_RUN_ONCE);
    assert_int_equal(uv_loop_close(&u->loop), 0);
}

static void compare(const struct schedule *x, const struct schedule *y, int number)
{
    for (int i = 0; i < x->n; i++) {
        const struct item *a = &x->items[i], *b = &y->items[i];
        if (b->code == TB_ECANCELED && b->cancel) continue;
        if (a->code != b->code || a->result.n != b->result.n ||
            (a->result.n && memcmp(a->result.p, b->result.p, a->result.n)))
            fail_msg("schedule %d, item %d of tenant %d (kind %d): codes %d and %d, %zu and %zu "
                     "bytes differ",
                     number, i, a->tenant, (int)a->kind, a->code, b->code, a->result.n,
                     b->result.n);
    }
}

static void run_schedules(const char *dtype, int n)
{
    char *dir = random_model(&shape, 3, 0.4f);
    struct runner alone, together;
    start(&alone, dir, dtype, 1, 0);
    start(&together, dir, dtype, 2, 20);
    remove_dir(dir);
    int n_items = 0, n_failed = 0, n_canceled = 0;
    size_t n_bytes = 0;
    for (int k = 0; k < n; k++) {
        static struct schedule x, y;
        make_schedule(&x, (uint64_t)k);
        y = x;
        run_alone(&alone, &x);
        run_together(&together, &y, (uint64_t)k + 7);
        compare(&x, &y, k);
        n_items += x.n;
        for (int i = 0; i < x.n; i++) {
            n_bytes += x.items[i].result.n;
            n_failed += x.items[i].code != 0;
            n_canceled += y.items[i].code == TB_ECANCELED;
        }
        clean_up(&alone, &x);
        clean_up(&together, &y);
        for (int i = 0; i < x.n; i++) {
            tb_buf_fini(&x.items[i].result);
            tb_buf_fini(&y.items[i].result);
            tb_adapter_state_destroy(x.items[i].state);
            tb_adapter_state_destroy(y.items[i].state);
        }
        alone.first_id += MAX_ITEMS;
        together.first_id += MAX_ITEMS;
    }
    /* What the schedules are for did happen. */
    struct tb_engine_stats a, b;
    tb_engine_stats(alone.engine, &a);
    tb_engine_stats(together.engine, &b);
    print_message(
        "%d ops, %zu bytes of results, %d invalid, %d canceled; %llu steps alone, %llu together, "
        "%llu preemptions, %llu tokens found\n",
        n_items, n_bytes, n_failed, n_canceled, (unsigned long long)a.steps,
        (unsigned long long)b.steps, (unsigned long long)b.kv.n_preempted,
        (unsigned long long)b.kv.n_hit_tokens);
    assert_true(n_bytes > (size_t)n * 10000 && n_failed > 10 && n_canceled > 10 &&
                b.steps < a.steps);
    assert_true(b.kv.n_preempted > (uint64_t)n / 20 && b.kv.n_hit_tokens > (uint64_t)n * 10);
    stop(&alone);
    stop(&together);
}

static void test_f32(void **state)
{
    (void)state;
    run_schedules("f32", N_SCHEDULES);
}

static void test_bf16(void **state)
{
    (void)state;
    if (!backend_bf16()) skip();
    run_schedules("bf16", N_SCHEDULES / 5);
    backends_fini();
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_f32), cmocka_unit_test(test_bf16)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
