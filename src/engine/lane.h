/*
 * Lane: the actor that owns one backend, the base models on it, and every adapter, published
 * version and sampling in progress. Private to engine/.
 *
 *   loop thread  ──post──▶ inbox ──drain──▶ worker (one uv_work_t at a time, lane_run)
 *   loop thread  ◀─uv_async── outbox ◀──post── worker
 *
 * What is marked "worker" is touched only inside lane_run, or by the loop when no work is in flight
 * at creation and close. Neither side waits for the other: the worker goes on while tasks arrive,
 * and the loop answers while a step runs.
 */
#ifndef TB_ENGINE_LANE_H
#define TB_ENGINE_LANE_H

#include <stdatomic.h>

#include "engine/engine.h"
#include "model/pager.h"
#include "util/mailbox.h"
#include "util/map.h"

/* One adapter and the tasks that wait for their turn on it. */
struct lane_adapter {
    struct tb_list node; /* lane->ready while it has tasks, in round-robin order, or waiting */
    uint64_t id;
    int model;
    struct tb_adapter *adapter; /* NULL until created */
    struct tb_list tasks;       /* struct tb_task, in order */
    uint64_t served;            /* tokens of training; see plan.c */
    uint64_t round;             /* of the last step that served it */
    struct tb_task *next;       /* while a step is planned: whose datum is next, or NULL */
    bool in_step;               /* it has data in the step */
    bool waits;                 /* among lane->waiting */
};

struct lane_version {
    uint64_t id;
    int model;
    struct tb_adapter_version *version;
};

/* A custom loss; a reference for the map and one for each training task that uses it. */
struct lane_loss {
    uint64_t id;
    int refs;
    struct tb_graph *graph;
};

struct lane_work_stats { /* as struct tb_work_stats */
    _Atomic uint64_t waiting, running, begun, wait_us, wait_us_max;
};

struct lane_stats {
    _Atomic uint64_t tasks_done[TB_N_SUBMITTED];
    _Atomic uint64_t train_tokens, sample_rows, steps, busy_us, shares;
    struct lane_work_stats work[TB_N_WORKS];
    _Atomic uint64_t kv_free, kv_cached, kv_preempted, lookup_tokens, hit_tokens;
};

struct tb_lane {
    uv_loop_t *loop;
    struct tb_backend *be;
    struct tb_pager *pager;   /* or NULL */
    struct tb_model **models; /* [n_models] of the engine; NULL: not here */
    int n_models;
    struct tb_lane **peers; /* other lanes with the same models, the next first; not owned */
    int n_peers;

    /* loop */
    uv_work_t work;
    uv_async_t async;
    bool working;
    bool async_open;
    void (*done)(void *arg, struct tb_task *t); /* a task is the loop's again */
    void *done_arg;
    void (*quiet_cb)(void *arg);
    void *quiet_arg;
    void (*closed_cb)(void *arg);
    void *closed_arg;

    /* both */
    struct tb_mailbox inbox, outbox;
    struct tb_mailbox told; /* struct tb_progress; a task's come before its place in outbox */
    _Atomic bool closing;
    _Atomic bool lost; /* the device is; set before the first task that fails of it is back */
    struct lane_stats stats;
    uv_mutex_t memory_lock;
    struct tb_memory_stats memory; /* after the last turn */

    /* worker */
    struct tb_map adapters; /* id → lane_adapter */
    struct tb_map versions; /* id → lane_version */
    struct tb_map losses;   /* id → lane_loss */
    struct tb_list ready;   /* lane_adapter with tasks */
    struct tb_list waiting; /* lane_adapter whose op waits for its shares */
    struct tb_list samples; /* struct tb_task in progress */
    size_t n_samples;
    struct tb_sampling **sampling_scratch; /* [sampling_cap] */
    size_t sampling_cap;
    struct tb_train_part *parts;  /* [train_rows] of the step that is planned */
    bool new_samples;             /* some came since the last sampling step */
    int n_training;               /* tasks with memory for a gradient */
    uint64_t round;               /* full training steps */
    uint64_t train_ns, sample_ns; /* time given to each kind while both wait; see lane_run */
};

static inline enum tb_work lane_work_of(enum tb_task_type type)
{
    return type == TB_TASK_TRAIN    ? TB_WORK_TRAIN
           : type == TB_TASK_SAMPLE ? TB_WORK_SAMPLE
                                    : TB_WORK_OTHER;
}

/* lane.c: the loop's side. Backend, pager and models are moved in. done is called with each task
 * that was submitted, and calls its callback. */
int lane_create(struct tb_lane **out, uv_loop_t *loop, struct tb_backend *be,
                struct tb_pager *pager, struct tb_model **models, int n_models,
                void (*done)(void *arg, struct tb_task *t), void *arg, struct tb_error *err);
/* The lanes that it may send shares to; before the first task. */
void lane_set_peers(struct tb_lane *l, struct tb_lane *const *peers, int n);
void lane_submit(struct tb_lane *l, struct tb_task *t);
/* Any thread: a task from another lane. */
void lane_send(struct tb_lane *l, struct tb_task *t);
/* Fails what waits. quiet is called, once or more, when nothing runs here and nothing has come; a
 * lane that is not quiet yet may send to one that is. When all are, each is ended. */
void lane_close(struct tb_lane *l, void (*quiet)(void *arg), void *arg);
bool lane_is_quiet(struct tb_lane *l);
void lane_end(struct tb_lane *l, void (*cb)(void *arg), void *arg);
static inline bool lane_is_closing(const struct tb_lane *l)
{
    return atomic_load_explicit(&l->closing, memory_order_relaxed);
}

static inline bool lane_is_lost(const struct tb_lane *l)
{
    return atomic_load_explicit(&l->lost, memory_order_relaxed);
}

/* plan.c: the worker's side. Runs until nothing is left to do; on closing fails what waits. */
void lane_run(struct tb_lane *l);
void lane_note_pages(struct tb_lane *l); /* the KV pools' counts into the statistics */
/* Frees adapters, versions; no work may be in flight. */
void lane_free_state(struct tb_lane *l);
/* Tells the loop what is in memory now. */
void lane_note_memory(struct tb_lane *l);
/* Hands a finished task back to the loop. */
void lane_post_done(struct tb_lane *l, struct tb_task *t);
/* Tells the loop what a task's sample has drawn; p moves. */
void lane_post_progress(struct tb_lane *l, struct tb_task *t, struct tb_progress *p);

#endif
