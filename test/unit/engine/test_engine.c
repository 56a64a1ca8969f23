/*
 * The engine's planning over a model without numbers: order per adapter, packing across tenants,
 * turns between training and sampling, cancellation, life cycle. Run under TSan this also checks
 * the lane's hand-overs.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#include "engine/engine.h"
#include "fake_model.h"
#include "util/mem.h"

struct fixture {
    uv_loop_t loop;
    struct tb_engine *engine;
    int done, failed;
    bool closed;
    int64_t order[4096]; /* seq_ids in the order of their callbacks */
};

static void on_closed(void *arg)
{
    ((struct fixture *)arg)->closed = true;
}

static int open_engine(void **state, int n_devices)
{
    static const int devices[] = {0, 1, 2};
    struct fixture *f = tb_calloc(1, sizeof(*f));
    struct tb_engine_model models[2] = {{.name = "a", .dir = "x", .tokenizer = "tok"},
                                        {.name = "b", .dir = "y"}};
    struct tb_engine_options o = {.models = models,
                                  .n_models = 2,
                                  .backend = "cpu",
                                  .dtype = "f32",
                                  .devices = devices,
                                  .n_devices = n_devices};
    struct tb_error err = {0};
    fake_reset();
    uv_loop_init(&f->loop);
    assert_int_equal(tb_engine_create(&f->engine, &f->loop, &o, &err), 0);
    *state = f;
    return 0;
}

static int setup(void **state)
{
    return open_engine(state, 0);
}

/* One more than there are models. */
static int setup_devices(void **state)
{
    return open_engine(state, 3);
}

static void close_engine(struct fixture *f)
{
    tb_engine_close(f->engine, on_closed, f);
    uv_run(&f->loop, UV_RUN_DEFAULT);
    assert_true(f->closed);
    assert_int_equal(uv_loop_close(&f->loop), 0);
    assert_int_equal(fake_live_adapters, 0);
    assert_int_equal(fake_live_versions, 0);
    assert_int_equal(fake_live_samplings, 0);
    assert_int_equal(fake_live_graphs, 0);
    assert_int_equal(fake_live_trainings, 0);
    assert_int_equal(fake_reserved, 0);
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    fake_gate_open(); /* of a test that failed */
    if (!f->closed) close_engine(f);
    tb_free(f);
    return 0;
}

static void on_done(struct tb_task *t)
{
    struct fixture *f = t->arg;
    if (t->op) f->order[f->done] = t->op->seq_id;
    f->done++;
    if (tb_task_error(t)->code) f->failed++;
    tb_op_destroy(t->op);
    tb_task_destroy(t);
}

static struct tb_op *op_train(int n_data, int32_t tokens)
{
    struct tb_op *op = tb_op_create(TB_OP_FORWARD_BACKWARD);
    op->u.forward_backward.n_data = n_data;
    op->u.forward_backward.data =
        tb_arena_calloc(&op->arena, (size_t)n_data, sizeof(struct tb_datum));
    for (int i = 0; i < n_data; i++)
        op->u.forward_backward.data[i].n_tokens = tokens;
    return op;
}

static struct tb_task *submit(struct fixture *f, enum tb_task_type type, uint64_t id, int64_t seq,
                              int32_t tokens)
{
    struct tb_task *t = tb_task_create(type);
    t->adapter_id = id;
    t->lora.rank = 4;
    t->cb = on_done;
    t->arg = f;
    if (type == TB_TASK_TRAIN) {
        t->op = tokens > 512 ? op_train(tokens / 512, 512) : op_train(1, tokens);
    } else if (type == TB_TASK_OPTIM) {
        t->op = tb_op_create(TB_OP_OPTIM_STEP);
    } else if (type == TB_TASK_SAMPLE) {
        t->op = tb_op_create(TB_OP_SAMPLE);
        t->op->u.sample.max_tokens = tokens;
        t->version_id = id;
    } else if (type == TB_TASK_PUBLISH || type == TB_TASK_VERSION_FREE) {
        t->version_id = (uint64_t)seq;
    }
    if (t->op) t->op->seq_id = seq;
    tb_engine_submit(f->engine, t);
    return t;
}

/* LOSS_CREATE (text NULL: one that fails), LOSS_FREE, or a TRAIN of adapter 1, which is on that
 * model, that uses the loss. */
static void submit_loss_on(struct fixture *f, int model, enum tb_task_type type, uint64_t loss,
                           const char *text)
{
    struct tb_task *t = tb_task_create(type);
    t->model = model;
    t->adapter_id = 1;
    t->loss_id = loss;
    t->cb = on_done;
    t->arg = f;
    if (type == TB_TASK_TRAIN) {
        t->op = op_train(1, 8);
    } else if (type == TB_TASK_LOSS_CREATE) {
        t->op = tb_op_create(TB_OP_CREATE_CUSTOM_LOSS);
        t->op->u.create_custom_loss.text = text;
        t->op->u.create_custom_loss.n_text = text ? strlen(text) : 0;
    }
    tb_engine_submit(f->engine, t);
}

static void submit_loss(struct fixture *f, enum tb_task_type type, uint64_t loss, const char *text)
{
    submit_loss_on(f, 0, type, loss, text);
}

static void run_until(struct fixture *f, int done)
{
    while (f->done < done)
        uv_run(&f->loop, UV_RUN_ONCE);
}

static void test_models(void **state)
{
    struct fixture *f = *state;
    assert_int_equal(tb_engine_n_models(f->engine), 2);
    assert_int_equal(tb_engine_model_find(f->engine, "b"), 1);
    assert_int_equal(tb_engine_model_find(f->engine, "c"), -1);
    assert_string_equal(tb_engine_model_tokenizer(f->engine, 0), "tok");
    assert_null(tb_engine_model_tokenizer(f->engine, 1));
}

static void test_load_error(void **state)
{
    uv_loop_t loop;
    struct tb_engine *e = NULL;
    struct tb_error err = {0};
    struct tb_engine_model models[2] = {{.name = "a", .dir = "x"}, {.name = "b", .dir = "missing"}};
    struct tb_engine_options o = {.models = models, .n_models = 2};
    uv_loop_init(&loop);
    assert_int_equal(tb_engine_create(&e, &loop, &o, &err), TB_ENOTFOUND);
    assert_null(e);
    assert_string_equal(err.msg, "missing: no such folder");
    assert_int_equal(uv_loop_close(&loop), 0);
}

/* Ops of one adapter run and answer in order, whatever their kinds. */
static void test_order(void **state)
{
    struct fixture *f = *state;
    submit(f, TB_TASK_ADAPTER_CREATE, 1, 0, 0);
    for (int i = 1; i <= 200; i++)
        submit(f, i % 3 ? TB_TASK_TRAIN : TB_TASK_OPTIM, 1, i, 10);
    run_until(f, 201);
    assert_int_equal(f->failed, 0);
    for (int i = 1; i <= 200; i++)
        assert_int_equal(f->order[i], i);
}

/* Ops that wait together share a pass; a pass is bounded in tokens. */
static void test_packing(void **state)
{
    struct fixture *f = *state;
    for (uint64_t id = 1; id <= 16; id++)
        submit(f, TB_TASK_ADAPTER_CREATE, id, 0, 0);
    for (uint64_t id = 1; id <= 16; id++)
        submit(f, TB_TASK_TRAIN, id, (int64_t)id, 128);
    run_until(f, 32);
    assert_int_equal(f->failed, 0);
    int passes = 0, ops = 0;
    for (int i = 0; i < fake_n_events; i++) {
        if (fake_events[i].kind != FAKE_TRAIN) continue;
        passes++;
        ops += fake_events[i].n;
        assert_in_range(fake_events[i].n, 1, 512 / 128);
    }
    assert_int_equal(ops, 16);
    assert_in_range(passes, 1, 16);
}

/* A datum that is longer than a step is a step of its own. */
static void test_oversized_datum_runs_alone(void **state)
{
    struct fixture *f = *state;
    submit(f, TB_TASK_ADAPTER_CREATE, 1, 0, 0);
    for (int i = 0; i < 3; i++) {
        struct tb_task *t = tb_task_create(TB_TASK_TRAIN);
        t->op = op_train(1, i == 1 ? 8 : 100000);
        t->adapter_id = 1;
        t->cb = on_done;
        t->arg = f;
        tb_engine_submit(f->engine, t);
    }
    run_until(f, 4);
    assert_int_equal(f->failed, 0);
    for (int i = 0; i < fake_n_events; i++)
        assert_int_equal(fake_events[i].n, 1);
}

static void wait_at_gate(struct fixture *f)
{
    while (!fake_gate_reached())
        uv_run(&f->loop, UV_RUN_NOWAIT);
}

/* Submits while a step stands at the gate, and counts the steps from there to the first with it. */
static int steps_until(struct fixture *f, enum tb_task_type type, uint64_t id, int64_t seq,
                       int32_t tokens)
{
    wait_at_gate(f);
    int now = fake_steps, n = 0;
    submit(f, type, id, seq, tokens);
    while (fake_first_step[seq] < 0) {
        if (++n == 100) fail_msg("task type %d, seq %lld did not start", (int)type, (long long)seq);
        fake_gate_pass();
        wait_at_gate(f);
    }
    fake_gate_pass();
    return fake_first_step[seq] - now + 1;
}

/* A small op, or a sample, beside tenants with a hundred steps waiting starts within two steps,
 * whatever runs when it comes and however long each kind takes. */
static void test_small_ops_start_soon(void **state)
{
    struct fixture *f = *state;
    int n = 0;
    for (int slow = 0; slow < 3; slow++) {
        fake_train_us = slow == 1 ? 1000 : 0;
        fake_sample_us = slow == 2 ? 1000 : 0;
        for (uint64_t id = 1; id <= 2; id++)
            submit(f, TB_TASK_ADAPTER_CREATE, (uint64_t)slow * 10 + id, 0, 0);
        n += 2;
        run_until(f, n);
        fake_gate_close();
        for (int i = 0; i < 100; i++, n += 2) {
            submit(f, TB_TASK_TRAIN, (uint64_t)slow * 10 + 1, 0, 4096);
            submit(f, TB_TASK_TRAIN, (uint64_t)slow * 10 + 2, 0, 200);
        }
        for (int i = 0; i < 20; i++, n++)
            submit(f, TB_TASK_SAMPLE, 0, 0, 1000);
        int64_t seq = 1 + slow * 1000;
        for (int i = 0; i < 60; i++, n += 2) {
            assert_in_range(steps_until(f, TB_TASK_SAMPLE, 0, seq++, 3), 1, 2);
            submit(f, TB_TASK_ADAPTER_CREATE, 100 + (uint64_t)seq, 0, 0);
            n++;
            assert_in_range(steps_until(f, TB_TASK_TRAIN, 100 + (uint64_t)seq, seq, 16), 1, 2);
            seq++;
            for (int k = 0; k < i % 5; k++) { /* come at any moment */
                wait_at_gate(f);
                fake_gate_pass();
            }
        }
        fake_gate_open();
        run_until(f, n);
        assert_int_equal(f->failed, 0);
    }
}

/* Of tenants with data of one size each gets as many as the others, and a long op yields. */
static void test_tokens_in_turn(void **state)
{
    struct fixture *f = *state;
    for (uint64_t id = 1; id <= 3; id++)
        submit(f, TB_TASK_ADAPTER_CREATE, id, 0, 0);
    run_until(f, 3);
    fake_gate_close();
    submit(f, TB_TASK_TRAIN, 1, 1, 512 * 100); /* one long op */
    wait_at_gate(f);
    for (int i = 0; i < 100; i++)
        submit(f, TB_TASK_TRAIN, 2, 1000 + i, 512); /* many ops of one step */
    for (int i = 0; i < 25; i++)
        submit(f, TB_TASK_TRAIN, 3, 2000 + i, 2048);
    fake_gate_open();
    run_until(f, 3 + 1 + 100 + 25);
    int served[3] = {0};
    for (int i = 0; i < fake_n_events; i++) {
        if (fake_events[i].kind != FAKE_TRAIN) continue;
        int64_t seq = fake_events[i].first_seq;
        served[seq >= 2000 ? 2 : seq >= 1000 ? 1 : 0]++;
        for (int a = 0; a < 3; a++)
            for (int b = 0; b < 3; b++) /* a quantum, and one that began before the others came */
                assert_in_range(served[a] - served[b] + 8, 0, 16);
    }
    assert_true(served[0] == 100 && served[1] == 100 && served[2] == 100);
}

/* When there is memory for two gradients only, the third op waits; alone it would fail. */
static void test_memory_for_gradients(void **state)
{
    struct fixture *f = *state;
    fake_max_reserved = 2;
    for (uint64_t id = 1; id <= 5; id++)
        submit(f, TB_TASK_ADAPTER_CREATE, id, 0, 0);
    for (uint64_t id = 1; id <= 5; id++)
        for (int i = 0; i < 5; i++)
            submit(f, TB_TASK_TRAIN, id, (int64_t)id, 5000);
    run_until(f, 30);
    assert_int_equal(f->failed, 0);
    fake_max_reserved = 0;
    submit(f, TB_TASK_TRAIN, 1, 1, 8);
    run_until(f, 31);
    assert_int_equal(f->failed, 1);
}

static void test_statistics(void **state)
{
    struct fixture *f = *state;
    struct tb_engine_stats s;
    tb_engine_stats(f->engine, &s);
    assert_true(s.kv.n_free == 10 && s.work[TB_WORK_TRAIN].waiting == 0);
    submit(f, TB_TASK_ADAPTER_CREATE, 1, 0, 0);
    run_until(f, 1);
    fake_gate_close();
    submit(f, TB_TASK_TRAIN, 1, 1, 1024);
    wait_at_gate(f);
    for (int i = 0; i < 2; i++)
        submit(f, TB_TASK_TRAIN, 1, 2, 512);
    submit(f, TB_TASK_SAMPLE, 0, 3, 10);
    tb_engine_stats(f->engine, &s);
    assert_true(s.work[TB_WORK_TRAIN].running == 1 && s.work[TB_WORK_TRAIN].waiting == 2);
    assert_true(s.work[TB_WORK_SAMPLE].running == 0 && s.work[TB_WORK_SAMPLE].waiting == 1);
    fake_gate_open();
    run_until(f, 5);
    tb_engine_stats(f->engine, &s);
    for (int i = 0; i < TB_N_WORKS; i++)
        assert_true(s.work[i].running == 0 && s.work[i].waiting == 0);
    assert_int_equal(s.work[TB_WORK_TRAIN].begun, 3);
    assert_int_equal(s.work[TB_WORK_SAMPLE].begun, 1);
    assert_int_equal(s.train_tokens, 2048);
    assert_true(s.work[TB_WORK_TRAIN].wait_us >= s.work[TB_WORK_TRAIN].wait_us_max);
}

/* A sample beside queued training gets its steps in turn, and training goes on beside sampling. */
static void test_turns(void **state)
{
    struct fixture *f = *state;
    fake_train_us = 1000;
    fake_sample_us = 200;
    submit(f, TB_TASK_ADAPTER_CREATE, 1, 0, 0);
    for (int i = 0; i < 50; i++)
        submit(f, TB_TASK_TRAIN, 1, i, 4096);
    submit(f, TB_TASK_SAMPLE, 0, 500, 60);
    run_until(f, 52);
    assert_int_equal(f->failed, 0);
    int trains = 0, steps = 0, trains_at_last_step = 0;
    for (int i = 0; i < fake_n_events; i++) {
        if (fake_events[i].kind == FAKE_TRAIN) trains++;
        if (fake_events[i].kind == FAKE_SAMPLE_STEP) {
            steps++;
            trains_at_last_step = trains;
        }
    }
    assert_int_equal(steps, 60);
    assert_int_equal(trains, 50 * 8);
    assert_in_range(trains_at_last_step, 2,
                    50 * 8 - 1); /* interleaved, neither waited for all of the other */
}

static void test_publish_and_sample(void **state)
{
    struct fixture *f = *state;
    submit(f, TB_TASK_ADAPTER_CREATE, 1, 0, 0);
    submit(f, TB_TASK_PUBLISH, 1, 77, 0);
    run_until(f, 2);
    assert_int_equal(fake_live_versions, 1);
    submit(f, TB_TASK_SAMPLE, 77, 1, 30);
    submit(f, TB_TASK_VERSION_FREE, 0, 77, 0); /* the sample in progress keeps the weights */
    run_until(f, 4);
    assert_int_equal(f->failed, 0);
    assert_int_equal(fake_live_versions, 0);
    submit(f, TB_TASK_SAMPLE, 77, 2, 30);
    run_until(f, 5);
    assert_int_equal(f->failed, 1);
}

struct told {
    struct fixture *f;
    int n;
    bool out_of_order;
};

static void on_progress(struct tb_task *t, const struct tb_progress *p)
{
    struct told *told = t->arg;
    for (int32_t i = 0; i < p->n; i++)
        told->out_of_order |= p->tokens[i].token != told->n++;
}

static void on_told(struct tb_task *t)
{
    struct told *told = t->arg;
    t->arg = told->f;
    told->out_of_order |= told->n != t->op->u.sample.max_tokens;
    on_done(t);
}

/* Every token is told, in order, before the end. */
static void test_progress(void **state)
{
    struct fixture *f = *state;
    struct told told[8] = {{0}};
    for (int i = 0; i < 8; i++) {
        struct tb_task *t = tb_task_create(TB_TASK_SAMPLE);
        told[i].f = f;
        t->arg = &told[i];
        t->progress = on_progress;
        t->cb = on_told;
        t->op = tb_op_create(TB_OP_SAMPLE);
        t->op->u.sample.max_tokens = 50 + 100 * i;
        t->op->u.sample.stream = true;
        tb_engine_submit(f->engine, t);
    }
    run_until(f, 8);
    assert_int_equal(f->failed, 0);
    for (int i = 0; i < 8; i++)
        assert_false(told[i].out_of_order);
}

static void test_cancel(void **state)
{
    struct fixture *f = *state;
    fake_sample_us = 1000;
    struct tb_task *t = submit(f, TB_TASK_SAMPLE, 0, 1, 100000);
    uv_run(&f->loop, UV_RUN_NOWAIT);
    tb_engine_cancel(f->engine, t);
    run_until(f, 1);
    assert_int_equal(f->failed, 1);
    assert_int_equal(fake_live_samplings, 0);
}

static void test_failures(void **state)
{
    struct fixture *f = *state;
    submit(f, TB_TASK_TRAIN, 9, 1, 10); /* no such adapter */
    submit(f, TB_TASK_OPTIM, 9, 2, 0);
    submit(f, TB_TASK_SAMPLE, 0, 3, 0); /* invalid */
    run_until(f, 3);
    assert_int_equal(f->failed, 3);
    fake_fail_create = true;
    submit(f, TB_TASK_ADAPTER_CREATE, 10, 0, 0);
    submit(f, TB_TASK_TRAIN, 10, 4, 10);
    run_until(f, 5);
    assert_int_equal(f->failed, 5);
    fake_fail_create = false;
    submit(f, TB_TASK_ADAPTER_CREATE, 10, 0, 0);
    submit(f, TB_TASK_ADAPTER_FREE, 10, 0, 0);
    run_until(f, 7);
    assert_int_equal(f->failed, 5);
    assert_int_equal(fake_live_adapters, 0);
}

static void test_close_in_the_middle(void **state)
{
    struct fixture *f = *state;
    fake_train_us = fake_sample_us = 1000;
    for (uint64_t id = 1; id <= 4; id++)
        submit(f, TB_TASK_ADAPTER_CREATE, id, 0, 0);
    for (int i = 0; i < 100; i++)
        submit(f, TB_TASK_TRAIN, (uint64_t)(1 + i % 4), i, 4096);
    for (int i = 0; i < 10; i++)
        submit(f, TB_TASK_SAMPLE, 0, i, 100000);
    run_until(f, 6);
    close_engine(f);
    assert_int_equal(f->done, 114); /* every callback came */
    assert_true(f->failed > 50);
}

/* A training op keeps its loss although it is freed before the op's turn. */
static void test_losses(void **state)
{
    struct fixture *f = *state;
    submit(f, TB_TASK_ADAPTER_CREATE, 1, 0, 0);
    submit_loss(f, TB_TASK_LOSS_CREATE, 7, "{}");
    submit_loss(f, TB_TASK_LOSS_CREATE, 8, NULL);
    run_until(f, 3);
    assert_int_equal(f->failed, 1);
    assert_int_equal(fake_live_graphs, 1);
    fake_train_us = 20000;
    submit(f, TB_TASK_TRAIN, 1, 1, 8000); /* a pass of its own, before the others */
    for (int i = 0; i < 3; i++)
        submit_loss(f, TB_TASK_TRAIN, 7, NULL);
    submit_loss(f, TB_TASK_LOSS_FREE, 7, NULL);
    submit_loss(f, TB_TASK_LOSS_FREE, 99, NULL); /* unknown ids are no matter */
    run_until(f, 9);
    assert_int_equal(fake_with_graph, 3);
    assert_int_equal(fake_live_graphs, 0);
    submit_loss(f, TB_TASK_TRAIN, 7, NULL); /* gone: the model refuses it */
    submit_loss(f, TB_TASK_LOSS_CREATE, 9, "{}");
    run_until(f, 11);
    assert_int_equal(fake_with_graph, 3);
    assert_int_equal(f->failed, 1);
}

/* A loss is there on every device, in the order in which things were submitted. */
static void test_losses_on_devices(void **state)
{
    struct fixture *f = *state;
    struct tb_task *t = tb_task_create(TB_TASK_ADAPTER_CREATE);
    t->model = 1;
    t->adapter_id = 1;
    t->cb = on_done;
    t->arg = f;
    tb_engine_submit(f->engine, t);
    submit_loss_on(f, 0, TB_TASK_LOSS_CREATE, 7, "{}");
    submit_loss_on(f, 1, TB_TASK_TRAIN, 7, NULL);
    submit_loss_on(f, 0, TB_TASK_LOSS_FREE, 7, NULL);
    submit_loss_on(f, 1, TB_TASK_TRAIN, 7, NULL); /* gone */
    run_until(f, 5);
    assert_int_equal(fake_with_graph, 1);
    close_engine(f);
}

int main(void)
{
#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(test_models),
        cmocka_unit_test(test_load_error),
        T(test_order),
        T(test_packing),
        T(test_oversized_datum_runs_alone),
        T(test_small_ops_start_soon),
        T(test_tokens_in_turn),
        T(test_memory_for_gradients),
        T(test_statistics),
        T(test_turns),
        T(test_publish_and_sample),
        T(test_progress),
        T(test_cancel),
        T(test_failures),
        T(test_losses),
        cmocka_unit_test_setup_teardown(test_losses_on_devices, setup_devices, teardown),
        T(test_close_in_the_middle),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
