/*
 * What the engine's tests on devices share: an engine on a loop of its own, over the backend that
 * is linked into the test, and tasks that count until they are back.
 *
 * Owner: the test. Thread: one. Included once a program.
 */
#ifndef TEST_CUDA_ENGINE_FIXTURE_H
#define TEST_CUDA_ENGINE_FIXTURE_H

#include "../unit/model/helper.h"
#include "backend/cpu/cpu.h"
#include "engine/engine.h"
#include "util/mem.h"
#ifndef TB_NO_CUDA
#    include "cuda/cuda.h"
#    include "emu.h"
#endif

/* In the place of the module's loading. TB_NO_CUDA: CPU backends in the place of GPUs. */
int tb_module_create(struct tb_backend **out, const struct tb_backend_options *options,
                     struct tb_error *err);
int tb_module_create(struct tb_backend **out, const struct tb_backend_options *options,
                     struct tb_error *err)
{
#ifndef TB_NO_CUDA
    return tb_backend_cuda_create(out, options, err);
#else
    static struct tb_backend_ops ops; /* the same for all */
    int rc = tb_backend_cpu_create(out, options, err);
    if (rc) return rc;
    ops = *(*out)->ops;
    ops.name = "cuda";
    (*out)->ops = &ops;
    return 0;
#endif
}

struct fixture {
    uv_loop_t loop;
    struct tb_engine *engine;
    uint64_t memory; /* of a device */
    char *dir;       /* of a model, removed at the end; or NULL */
    int open;        /* tasks that are not back */
    bool closed;
};

static inline int create_engine(struct fixture *f, const struct tb_engine_options *o,
                                struct tb_error *err)
{
    uv_loop_init(&f->loop);
    return tb_engine_create(&f->engine, &f->loop, o, err);
}

static inline void on_closed(void *arg)
{
    ((struct fixture *)arg)->closed = true;
}

static inline void close_engine(struct fixture *f)
{
    tb_engine_close(f->engine, on_closed, f);
    uv_run(&f->loop, UV_RUN_DEFAULT);
    assert_true(f->closed);
    assert_int_equal(f->open, 0);
    assert_int_equal(uv_loop_close(&f->loop), 0);
    if (f->dir) remove_dir(f->dir);
}

static inline void on_done(struct tb_task *t)
{
    ((struct fixture *)t->arg)->open--;
    t->cb = NULL; /* it is back */
}

/* A task that is not submitted yet; an adapter that it creates has rank 3. */
static inline struct tb_task *make_task(struct fixture *f, enum tb_task_type type, uint64_t adapter,
                                        uint64_t version, uint64_t seed, struct tb_op *op)
{
    struct tb_task *t = tb_task_create(type);
    t->adapter_id = adapter;
    t->version_id = version;
    t->lora = (struct tb_lora_config){.rank = 3,
                                      .alpha = 8,
                                      .has_seed = true,
                                      .seed = seed,
                                      .train_attn = true,
                                      .train_mlp = true,
                                      .train_unembed = true};
    t->op = op;
    t->cb = on_done;
    t->arg = f;
    return t;
}

static inline struct tb_task *submit_task(struct fixture *f, struct tb_task *t)
{
    f->open++;
    tb_engine_submit(f->engine, t);
    return t;
}

static inline void wait_all(struct fixture *f)
{
    while (f->open)
        uv_run(&f->loop, UV_RUN_ONCE);
}

/* Returns the task's error code. */
static inline int drop(struct tb_task *t)
{
    int code = tb_task_error(t)->code;
    tb_op_destroy(t->op);
    tb_task_destroy(t);
    return code;
}

#endif
