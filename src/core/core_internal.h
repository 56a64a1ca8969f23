/*
 * Inside of core: its structs and what its files offer each other. See core.h for the rules.
 *
 *   core     tables, timers, closing                    core.c
 *   future   one submitted op, its state, who waits      future.c
 *   tenant   owners of sessions, their limits            tenant.c
 *   session  models, samplers and futures of a client    session.c
 *   model    one queue ordered by seq_id                  model.c, weights.c
 *   sampler  a sampling session; versions of weights      sampler.c
 *   loss     custom losses of a session               loss.c
 *   feed     what is over of a sampler, for one poll      feed.c
 *
 * Callbacks are never made from the middle of a change: a future that is over goes to
 * core->resolved, its sampler's feed to core->changed, the answer to who creates a sampling session
 * to core->answers, and every way into core (a call, a timer, a completion) ends with
 * tb_core_leave, which calls them. So only there, and in tb_core_wait and tb_core_feed_wait, may
 * foreign code come back in.
 *
 * Thread: the loop's. Nothing here has a lock.
 */
#ifndef TB_CORE_INTERNAL_H
#define TB_CORE_INTERNAL_H

#include "core/core.h"
#include "util/limits.h"
#include "util/map.h"

#define TB_ID_BYTES         (TB_MAX_ID + 64)
#define TB_SESSION_ID_CHARS 16 /* after "sess-" */
#define TB_ANON_LEASE_FACTOR                                                                       \
    144 /* sessions of clients without heartbeats live this much longer                            \
         */
#define TB_FIRST_SPARE   1000000000LL /* far from what clients count */
#define TB_COMPACT_BYTES (64u * 1024) /* a training op this big is cut down to its result */

struct tb_tenant {
    struct tb_list node; /* core->tenants */
    char *name;
    uint64_t number;                   /* from 1 */
    struct tb_core_session *anonymous; /* of samplers addressed without a session */
    size_t queued_bytes, n_pending;    /* of futures not over */
    double tokens;                     /* submits that it may make now */
    uint64_t refilled_ms;
    int refusal; /* TB_ERATE, TB_EBUSY: why a submit was refused last, at */
    uint64_t refused_ms;
};

struct tb_core_session {
    struct tb_core *core;
    struct tb_tenant *tenant;
    struct tb_list node; /* core->sessions */
    char *id, *idem;
    bool ended, anonymous;
    uint64_t seen_ms, lease_ms, ended_ms;
    struct tb_list futures, models, samplers;
    struct tb_list losses; /* custom losses (loss.c) */
    int n_losses;
    size_t n_pending;   /* futures not over */
    int64_t next_spare; /* sampler numbers for ids that are taken */
    uint64_t share;     /* its number: what the engine shares the machine by */
};

/* An adapter's copy in host memory, or the wait for room for one. All zero: none. */
struct tb_core_copy {
    struct tb_list node; /* of core->copies, while it waits */
    size_t bytes;
    bool taken;
    void (*go)(struct tb_core_copy *y); /* there is room now, and it was taken */
};

enum tb_phase {
    TB_PHASE_BLOCKED, /* a smaller seq_id has not come yet */
    TB_PHASE_READY,   /* its turn will come */
    TB_PHASE_RUNNING, /* in the engine or the store */
    TB_PHASE_OVER,
};

struct tb_future {
    struct tb_core *core;
    char *id;
    struct tb_op *op;
    enum tb_phase phase;
    enum tb_future_state state;
    struct tb_core_session *session;
    struct tb_list in_session;
    struct tb_core_model *model;     /* while not over */
    struct tb_core_sampler *sampler; /* while not over */
    struct tb_list in_queue;         /* of the model or sampler */
    int64_t seq;
    bool canceled; /* the session ended while it ran, or its client gave it up */

    struct tb_task *task;                                 /* in the engine now */
    void (*step)(struct tb_future *f, struct tb_task *t); /* its end */
    uint64_t version_id;                                  /* of a publish */

    struct tb_list in_feed; /* of its sampler, when over, until acknowledged */
    uint64_t cursor;        /* its place there */

    struct tb_list waiters;        /* tb_waiter.node */
    struct tb_core_stream *stream; /* or NULL */
    struct tb_list in_resolved;    /* over, waiters not called yet */
    struct tb_list in_expiry;      /* core->unread or core->read */
    uint64_t expires_ms;
    bool was_read;
    bool drop; /* destroy as soon as nobody uses it */
    int busy;
    size_t queued_bytes, held_bytes;
    struct tb_core_copy copy; /* of a save or load, until it is over */
    char *idem;               /* key in core->idem */
};

enum tb_model_state { TB_MODEL_CREATING, TB_MODEL_READY, TB_MODEL_FAILED, TB_MODEL_GONE };

struct tb_core_model {
    struct tb_core *core;
    struct tb_core_session *session;
    struct tb_list in_session;
    char *id, *base_model, *user_metadata;
    int engine_model; /* -1 until known */
    uint64_t adapter_id;
    bool adapter_alive;
    struct tb_lora_config lora;
    enum tb_model_state state;
    struct tb_error error;

    int64_t next_seq, last_seq; /* the next in turn; the greatest seen */
    struct tb_list blocked;     /* futures by seq, beyond a gap */
    uint64_t stuck_ms;          /* when the tick first saw that only a gap holds it; 0: none does */
    struct tb_list ready;       /* futures in turn, not started */
    size_t running, n_pending;
    struct tb_future *barrier; /* a load or unload: nothing else runs */
    struct tb_future
        *saving; /* one save at a time, so that at most one exported copy is in memory */
    struct tb_core_target
        *inflight; /* what inflight samplers read; NULL until the first such save */
};

enum tb_version_state { TB_VERSION_LOADING, TB_VERSION_READY, TB_VERSION_FAILED };

/* A published version of weights in the engine, counted by the samplers that use it. */
struct tb_core_version {
    struct tb_core *core;
    int refs;
    uint64_t id;
    int engine_model;
    enum tb_version_state state;
    struct tb_error error;
    char *path; /* of a checkpoint, else NULL; in core->versions while mapped */
    int64_t time_us;
    bool mapped;
    struct tb_core_copy copy; /* while it is loaded */
    const char *reader;       /* the tenant as whom it is read */
    struct tb_list samplers;  /* tb_core_sampler.in_version, of those that load from a path */
};

/* The mutable version behind a model's inflight samplers. */
struct tb_core_target {
    int refs;
    struct tb_core_version *version;
};

/* What is over of a sampler's clone (a block of seq_ids), in the order of its end. */
struct tb_core_feed {
    struct tb_core *core;
    struct tb_core_sampler *sampler; /* NULL: it has ended */
    struct tb_list in_sampler, in_changed;
    int64_t clone;
    uint64_t cursor;        /* of the latest event */
    struct tb_list events;  /* tb_future.in_feed, not acknowledged */
    struct tb_list waiters; /* tb_feed_waiter.node */
};

struct tb_core_sampler {
    struct tb_core *core;
    struct tb_core_session *session;
    struct tb_list in_session, in_version;
    char *id, *base_model, *model_path;
    char *key;    /* in core->by_address, for clients that name no sampling session */
    char *opened; /* in core->opened, for those of create_sampling_session */
    int engine_model;
    struct tb_core_version *version; /* NULL: the base model, or not known yet, or target */
    struct tb_core_target *target;
    bool looking; /* the checkpoint's row is being read */
    bool ended;
    size_t n_pending;
    struct tb_list waiting;  /* futures */
    struct tb_list creators; /* struct creator: who waits for the row */
    struct tb_list feeds;
    int64_t next_label, next_clone;
    uint64_t used_ms;
};

struct tb_core {
    uv_loop_t *loop;
    struct tb_engine *engine;
    struct tb_store *store;
    struct tb_core_options o;

    struct tb_map session_map, model_map, sampler_map, future_map; /* by id */
    struct tb_map session_keys; /* tenant and idempotency key → session */
    struct tb_map idem;         /* tenant, scope and idempotency key → future */
    struct tb_map versions;     /* checkpoint path → version */
    struct tb_map by_address;   /* tenant and base model or path → sampler */
    struct tb_map opened;       /* session and sampling_session_seq_id → sampler */
    struct tb_list sessions, tenants;
    uint64_t n_tenants;

    struct tb_list waiters;      /* tb_waiter.deadline_node, earliest first */
    struct tb_list unread, read; /* futures over, by expiry */
    struct tb_list resolved;     /* futures over, waiters not called yet */
    struct tb_list answers;      /* to those who create sampling sessions */
    struct tb_list changed;      /* feeds whose waiters are to be called */
    struct tb_list feed_waiters; /* tb_feed_waiter.deadline_node, earliest first */
    struct tb_list copies;       /* tb_core_copy that wait for room */
    bool leaving;
    size_t queued_bytes, held_bytes, copy_bytes;
    uint64_t next_adapter, next_version, next_loss, next_anonymous, next_share;
    struct tb_core_stats stats;
    uint64_t sampled_tokens;
    char scratch[TB_ID_BYTES];

    uv_timer_t wait_timer, feed_timer, tick_timer;
    size_t n_async; /* engine tasks and store calls that will call back */
    bool draining, closing, closed;
    int open_handles;
    void (*close_cb)(void *arg);
    void *close_arg;
};

/* ---- core.c */
void tb_core_leave(struct tb_core *c);
/* Engine tasks: of a future (f->step is called), or free-standing (nothing is called). */
struct tb_task *tb_core_task(enum tb_task_type type, int engine_model);
void tb_core_run(struct tb_future *f, struct tb_task *t,
                 void (*step)(struct tb_future *f, struct tb_task *t));
void tb_core_run_free(struct tb_core *c, struct tb_task *t);
/* Whether there is room for one more op; in_turn: it is next, so refusing it could block others. */
int tb_core_admit(struct tb_core *c, struct tb_tenant *t, const struct tb_op *op, bool in_turn,
                  struct tb_error *err);
/* "base model 'x' is not served here; served: a, b" */
int tb_core_no_base_model(const struct tb_core *c, int code, const char *name,
                          struct tb_error *err);

/* ---- copy.c */
/* Parameters of an adapter on all that it may be on, for each unit of rank. */
int64_t tb_core_lora_width(const struct tb_model_info *m);
size_t tb_copy_bytes(const struct tb_core *c, int engine_model, int32_t rank, bool with_optimizer);
/* Whether there is room for a copy, which is taken then; else go is called when there is. */
bool tb_copy_begin(struct tb_core *c, struct tb_core_copy *y, size_t bytes,
                   void (*go)(struct tb_core_copy *y));
void tb_copy_end(struct tb_core *c, struct tb_core_copy *y); /* of one that waits, too, or none */
bool tb_copies_go(struct tb_core *c);                        /* one that waited; false: none can */

/* ---- tenant.c */
char *tb_tenant_scoped(const struct tb_tenant *t, const char *key); /* unique among all; tb_free */
int tb_tenant_admit(struct tb_core *c, struct tb_tenant *t, const struct tb_op *op, bool in_turn,
                    struct tb_error *err);
/* The queue state for those who wait while submits of the tenant are refused; NULL: none are. */
const char *tb_tenant_paused(const struct tb_core *c, const struct tb_tenant *t, char *reason,
                             size_t n);
void tb_tenants_destroy(struct tb_core *c);

/* ---- future.c */
struct tb_future *tb_future_find(const struct tb_core *c, const char *id, size_t n);
/* NULL when it is another tenant's. */
struct tb_future *tb_future_find_of(const struct tb_core *c, const struct tb_tenant *who,
                                    const char *id, size_t n);
struct tb_future *tb_future_by_key(const struct tb_core *c, const struct tb_tenant *who,
                                   const char *scope, const char *key);
/* Takes the op. */
struct tb_future *tb_future_create(struct tb_core *c, const char *id, struct tb_op *op,
                                   struct tb_core_session *s);
void tb_future_set_key(struct tb_future *f, const char *scope, const char *key);
/* Over: done, or failed when op->error is set. Leaves its queue, model and sampler. */
void tb_future_finish(struct tb_future *f);
void tb_future_fail(struct tb_future *f, const struct tb_error *e);
/* Of a sample's task: the tokens go to the future's stream. */
void tb_future_progress(struct tb_task *t, const struct tb_progress *p);
void tb_future_drop(struct tb_future *f); /* only when over */
void tb_future_destroy(struct tb_future *f);
void tb_futures_resolve(struct tb_core *c);
void tb_futures_expire(struct tb_core *c, uint64_t now_ms);
void tb_waiters_all_pending(struct tb_core *c);
void tb_wait_timer(uv_timer_t *t);
bool tb_request_id_well_formed(const char *id, size_t n);
bool tb_sampler_id_well_formed(const char *id);

/* ---- feed.c */
void tb_feed_add(struct tb_core_sampler *sp, struct tb_future *f); /* f is over */
void tb_feeds_end(struct tb_core_sampler *sp);
void tb_feeds_answer(struct tb_core *c);
void tb_feeds_all_pending(struct tb_core *c);

/* ---- session.c */
struct tb_core_session *tb_session_create(struct tb_core *c, struct tb_tenant *who,
                                          const struct tb_session_params *p, bool anonymous);
/* Live and the tenant's, or NULL. */
struct tb_core_session *tb_session_find(const struct tb_core *c, const struct tb_tenant *who,
                                        const char *id);
/* For a submit: TB_ENOTFOUND with its text. */
int tb_session_get(const struct tb_core *c, const struct tb_tenant *who, const char *id,
                   struct tb_core_session **out, struct tb_error *err);
bool tb_session_id_well_formed(const char *id, size_t n);
void tb_session_seen(struct tb_core_session *s);
void tb_session_end(struct tb_core_session *s, const char *status, const char *reason,
                    const char *detail, const char *message);
void tb_sessions_tick(struct tb_core *c, uint64_t now_ms);
void tb_session_destroy(struct tb_core_session *s);

/* ---- model.c. The submits keep the op and set *kept, or leave it to the caller to free. */
struct tb_core_model *tb_model_find(const struct tb_core *c, const struct tb_tenant *who,
                                    const char *id);
int tb_model_submit_create(struct tb_core *c, struct tb_tenant *who, struct tb_op *op,
                           struct tb_ticket *out, bool *kept, struct tb_error *err);
int tb_model_submit(struct tb_core *c, struct tb_tenant *who, struct tb_op *op,
                    struct tb_ticket *out, bool *kept, struct tb_error *err);
void tb_model_pump(struct tb_core_model *m);
void tb_model_created(struct tb_future *f, const struct tb_error *e); /* e NULL: success */
void tb_model_end(struct tb_core_model *m, const char *message);
void tb_model_maybe_free(struct tb_core_model *m);
bool tb_model_stuck(const struct tb_core_model *m); /* only a gap holds it */
void tb_model_fail_queue(struct tb_core_model *m, const struct tb_error *e);
int tb_model_check_lora(struct tb_core *c, int engine_model, const struct tb_lora_config *l,
                        struct tb_error *err);
/* Ends a future of a model and lets the model go on. */
void tb_model_op_done(struct tb_future *f);

/* ---- weights.c: saves, loads, publishes as small state machines; f is running and counted */
void tb_weights_save(struct tb_future *f);
void tb_weights_publish(struct tb_future *f);
void tb_weights_load(struct tb_future *f);
void tb_weights_load_new(struct tb_future *f); /* create-via-load */
void tb_weights_unload(struct tb_future *f);
bool tb_weights_is_ephemeral(const struct tb_op *op);

/* ---- loss.c */
int tb_loss_submit(struct tb_core *c, struct tb_tenant *who, struct tb_op *op,
                   struct tb_ticket *out, bool *kept, struct tb_error *err);
/* The engine's number of the custom loss that a training op names, 0 when it names none. */
int tb_loss_of_op(const struct tb_core_session *s, const struct tb_op *op, uint64_t *engine_id,
                  struct tb_error *err);
void tb_losses_end(struct tb_core_session *s);

/* ---- sampler.c */
struct tb_core_sampler *tb_sampler_find(const struct tb_core *c, const struct tb_tenant *who,
                                        const char *id);
/* "{session}:sample:{n}", or with a spare number when that id is taken. */
void tb_sampler_free_id(struct tb_core_session *s, int64_t n, char out[TB_ID_BYTES]);
int tb_sampler_submit(struct tb_core *c, struct tb_tenant *who, struct tb_op *op,
                      struct tb_ticket *out, bool *kept, struct tb_error *err);
/* A sampler of a published version; takes one reference of v, or of t when t is not NULL. */
struct tb_core_sampler *tb_sampler_publish(struct tb_core_model *m, const char *id,
                                           struct tb_core_version *v, struct tb_core_target *t);
void tb_sampler_end(struct tb_core_sampler *sp, const char *message);
void tb_sampler_maybe_free(struct tb_core_sampler *sp);
void tb_samplers_answer(struct tb_core *c);
void tb_samplers_tick(struct tb_core *c, uint64_t now_ms);
/* A checkpoint was written: address it anew. */
void tb_sampler_path_changed(struct tb_core *c, const char *path);
struct tb_core_version *tb_version_new(struct tb_core *c, int engine_model,
                                       uint64_t id); /* 1 ref */
void tb_version_put(struct tb_core_version *v);      /* accepts NULL; the last one frees it */
void tb_target_put(struct tb_core_target *t);        /* accepts NULL */

#endif
