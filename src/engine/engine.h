/*
 * Engine: lanes, one a device, that own base models and everything computed on them. A lane is an
 * actor: a mailbox of tasks and at most one uv_work_t in flight, whose work function drains the
 * mailbox, plans steps across tenants (a packed training pass, a sampling step, in turn), runs
 * them, and posts each finished task to a list; uv_async wakes the loop, which calls the tasks'
 * callbacks.
 *
 * A task is a small struct that core/ makes for an op (or a part of one: saving is export, then the
 * store writes). Adapters, published versions and custom losses are named by ids that core/
 * chooses, so the loop never holds a pointer into a lane. A version's id is one adapter's, or one
 * checkpoint's: it may be published or loaded anew, and samples submitted when that is done see it.
 *
 * A model may be on several devices. Which of its replicas computes a task shows in no result.
 *
 * Order: tasks on one adapter run in the order submitted. Tasks of different adapters, and samples,
 * are independent. Errors: task->op->error for tasks with an op, else task->error; a failed task
 * changes nothing.
 *
 * Thread: submit/cancel/close and all callbacks on the loop's thread.
 */
#ifndef TB_ENGINE_ENGINE_H
#define TB_ENGINE_ENGINE_H

#include <stdbool.h>
#include <stdint.h>
#include <uv.h>

#include "model/model.h"
#include "op/op.h"
#include "op/state.h"
#include "util/error.h"
#include "util/list.h"

struct tb_engine;

enum tb_task_type {
    TB_TASK_ADAPTER_CREATE, /* adapter_id, lora → */
    TB_TASK_ADAPTER_LOAD, /* adapter_id, state, with_optimizer, create → (create: new adapter) */
    TB_TASK_ADAPTER_FREE, /* adapter_id */
    TB_TASK_TRAIN,        /* adapter_id, op FORWARD | FORWARD_BACKWARD, loss_id (0 = none) */
    TB_TASK_OPTIM,        /* adapter_id, op OPTIM_STEP */
    TB_TASK_EXPORT,       /* adapter_id, with_optimizer → state */
    TB_TASK_PUBLISH,      /* adapter_id, version_id: the adapter's weights become that version */
    TB_TASK_VERSION_LOAD, /* version_id, state: a version from a checkpoint */
    TB_TASK_VERSION_FREE, /* version_id; samples in progress keep it alive */
    TB_TASK_LOSS_CREATE,  /* loss_id, op CREATE_CUSTOM_LOSS */
    TB_TASK_LOSS_FREE,    /* loss_id; training ops submitted before keep it alive */
    TB_TASK_SAMPLE,       /* version_id (0 = base model), op SAMPLE */
    TB_N_SUBMITTED,       /* core/ submits those above, the engine those of mirrors: */
    TB_TASK_LEND = TB_N_SUBMITTED, /* version_id → loan */
    TB_TASK_BORROW,                /* version_id, loan: the version is there too */
    TB_TASK_RETURN,                /* loan */
    TB_TASK_SHARE,                 /* lanes send each other these (spread.h): */
    TB_TASK_COLLECT,
    TB_TASK_SHARE_END,
};

struct tb_task {
    struct tb_list node; /* engine's while submitted */
    enum tb_task_type type;
    int model; /* index of the base model, tb_engine_model_find */
    uint64_t adapter_id, version_id, loss_id;
    struct tb_lora_config lora;
    bool with_optimizer, create;
    struct tb_adapter_state
        *state;       /* in: owned by the task, freed with it; out (EXPORT): taken by cb */
    struct tb_op *op; /* borrowed until the callback */
    struct tb_error error;
    /* SAMPLE of an op that streams: the tokens of a step, before cb; p is freed after the call. */
    void (*progress)(struct tb_task *task, const struct tb_progress *p);
    void (*cb)(
        struct tb_task *task); /* loop thread, exactly once; the task is the caller's again */
    void *arg;
    /* engine's */
    struct route_lane *at;   /* the lane that it was passed to, */
    struct route_home *home; /* what it makes or ends there, */
    uint64_t n_drawn;        /* and the tokens that it may draw */
    struct mirror *mirror;   /* a sample waits for it */
    struct tb_loan *loan;
    bool canceled;
    struct tb_sampling *sampling;
    struct lane_loss *loss;
    uint64_t submitted_ns;
    bool begun; /* it does not wait any more */
    struct tb_training *training;
    uint64_t n_tokens;         /* of a training op */
    int32_t n_begun, n_end;    /* its data that have been in a step; those of this lane end here */
    bool reserved;             /* it has the memory of its gradient */
    struct tb_spread *spread;  /* of an op with shares, and of a share; else NULL */
    const struct tb_task *of;  /* of a share: the op's */
    int from_shard, end_shard; /* of a share, */
    int32_t n_from;            /* and where its data begin */
};

struct tb_task *tb_task_create(enum tb_task_type type);
void tb_task_destroy(struct tb_task *t);           /* frees state too; not the op */
struct tb_error *tb_task_error(struct tb_task *t); /* op's error or the task's own */

struct tb_engine_model { /* one --model */
    const char *name;    /* served name */
    const char *dir;
    const char *tokenizer; /* "tokenizer=ID" option or NULL */
};

struct tb_engine_options {
    const struct tb_engine_model *models;
    int n_models;
    const char *backend, *dtype; /* as on the command line */
    int n_threads, max_rank, max_context;
    uint64_t memory;        /* of each device; 0 = what it has */
    uint64_t kv_memory;     /* of it for KV pages, for its models in equal parts; 0 = a default */
    const char *paging_dir; /* where idle adapters go when memory is short; NULL: they stay */
    uint64_t mirror_tokens; /* a replica with so many fewer tokens to draw than those that have a
                               version gets a copy of it (mirror.h); 0 = a default */
    const int *devices;     /* GPUs to use (route.h says what goes where). None given: one */
    int n_devices;
    int shard_tokens; /* tests: of an op in training; 0 = the backend's */
};

/* Loads the models (blocking: at start only) on `loop`'s thread. */
int tb_engine_create(struct tb_engine **out, uv_loop_t *loop, const struct tb_engine_options *o,
                     struct tb_error *err);
/* Fails what waits with TB_ECANCELED, waits for the running step, frees all, then calls cb. */
void tb_engine_close(struct tb_engine *e, void (*cb)(void *arg), void *arg);

int tb_engine_n_models(const struct tb_engine *e);
const struct tb_model_info *tb_engine_model_info(const struct tb_engine *e, int model);
const char *tb_engine_model_tokenizer(const struct tb_engine *e, int model); /* option or NULL */
int tb_engine_model_find(const struct tb_engine *e, const char *name);       /* index or -1 */
const char *tb_engine_describe(const struct tb_engine *e);                   /* backend line */

void tb_engine_submit(struct tb_engine *e, struct tb_task *task);
/* Asks for an end: a waiting or running sample fails with TB_ECANCELED soon (its callback still
 * comes). Training tasks that have begun run on. */
void tb_engine_cancel(struct tb_engine *e, struct tb_task *task);

enum tb_work { TB_WORK_TRAIN, TB_WORK_SAMPLE, TB_WORK_OTHER, TB_N_WORKS }; /* kinds of tasks */
struct tb_work_stats {
    uint64_t waiting, running;            /* tasks now */
    uint64_t begun, wait_us, wait_us_max; /* tasks that began, and their time in queues */
};
struct tb_memory_stats {
    uint64_t limit, used; /* bytes; used is more than the sum of the kinds */
    uint64_t weights, adapters, versions, kv, workspaces;
    uint64_t n_adapters, n_versions, adapters_out, versions_out; /* alive, of these in files */
    uint64_t page_ins, page_outs;
};

struct tb_engine_stats {
    uint64_t tasks_done[TB_N_SUBMITTED];
    uint64_t shares;                           /* of training ops, computed for another device */
    uint64_t train_tokens, sample_rows, steps; /* sample_rows: prompt and decoding rows computed */
    struct tb_work_stats work[TB_N_WORKS];
    struct tb_kv_stats kv; /* of all models */
    uint64_t busy_us;
    struct tb_memory_stats memory; /* after the last turn */
};
void tb_engine_stats(const struct tb_engine *e, struct tb_engine_stats *out);

#endif
