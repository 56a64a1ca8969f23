/*
 * A fake engine for the tests of core: it implements tb_engine_* in memory and completes a task
 * only when the test says so. An adapter is one number: forward_backward adds the op's n_data to a
 * gradient, optim_step makes param = (31 * param + grad) mod 100003, so that the order of execution
 * shows in every result. A version is a copy of that number; a sample reports it as
 * prompt_cache_hit_tokens (base model: -1).
 *
 * A custom loss is the length of its text, which is the metric of the training ops that use it.
 *
 * Failures on order: loss_fn "fail" fails its op, rank 13 fails creation, the text "bad" a loss.
 */
#ifndef TEST_FAKE_ENGINE_H
#define TEST_FAKE_ENGINE_H

#include "engine/engine.h"

struct tb_engine *fake_engine_create(void);
void fake_engine_destroy(struct tb_engine *e); /* asserts that no task is left */
/* Completes the oldest task; false if there is none. */
bool fake_step(struct tb_engine *e);
/* Completes any task that is the oldest of its adapter, chosen by pick. */
bool fake_step_any(struct tb_engine *e, uint64_t pick);
void fake_begin(
    struct tb_engine *e); /* the oldest task is running now: canceling does not stop it */
/* The oldest task, a sample, has drawn n tokens more: seq_id + 0, seq_id + 1, ... */
void fake_progress(struct tb_engine *e, int32_t n);
void fake_kv(struct tb_engine *e, uint64_t n_pages, uint64_t n_free); /* what its stats tell */
size_t fake_waiting(const struct tb_engine *e);
size_t fake_waiting_of(const struct tb_engine *e, enum tb_task_type type);
size_t fake_adapters(const struct tb_engine *e);
size_t fake_versions(const struct tb_engine *e);
size_t fake_losses(const struct tb_engine *e);
size_t fake_done(const struct tb_engine *e, enum tb_task_type type);
int64_t fake_next_param(int64_t param, int64_t grad);

#endif
