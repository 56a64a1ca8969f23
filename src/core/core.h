/*
 * Core: everything between the faces and the engine, on the loop's thread, without a lock: sessions
 * and their leases, live models with one queue each ordered by seq_id, sampling sessions, futures
 * and those who wait for them, dedupe, back-pressure.
 *
 * The rules (contract: Tinker wire API):
 *  - A submit is answered at once with a request id; the result comes through the future of that
 * id.
 *  - Training and weights ops of one model run strictly by seq_id, starting at 1 (number 0 is the
 * creation); ids ahead of turn wait; a repeat of (model, seq_id) gets the same request id and its
 * body is dropped. An op that failed consumed its number. A number that does not come for the
 * length of a lease fails those that wait behind it. seq_id -1 (oldest SDK): order of arrival,
 * dedupe by the idempotency key. An op that ran is never run again.
 *  - asample's seq_ids are labels without order; repeats of (sampler, seq_id) get the same request
 * id.
 *  - create_model and create-via-load are deduped by (session, model_seq_id); their model id is
 *    "{session}:train:{model_seq_id}"; ops may be submitted before the creation has finished.
 *  - custom losses are deduped by (session, custom_loss_seq_id) and belong to their session, under
 *    the id "{session}:loss:{custom_loss_seq_id}".
 *  - create_sampling_session is deduped by (session, sampling_session_seq_id), ephemeral sampler
 *    saves as ops of their model. Some clients count the two apart, so neither finds the other's:
 *    the sampler id is "{session}:sample:{n}", with another n when that id is taken.
 *  - request ids are deterministic: "{model_id}:{seq_id}", "{sampler_id}:{seq_id}",
 * "{model_id}:create", "{loss_id}:create".
 *
 *  - Everything belongs to a tenant, through its session. Each call takes the tenant who asks, and
 *    what is another's is answered as if it were not known. Tenants have limits of their own.
 *  - A label of a sample is remembered as long as its result: one that is repeated after that runs
 *    anew. (A training number is remembered for ever.)
 *
 * Thread: the loop's. Owner: strings in answers are core's and valid until the loop turns, unless
 * said.
 */
#ifndef TB_CORE_CORE_H
#define TB_CORE_CORE_H

#include <stdbool.h>
#include <stdint.h>
#include <uv.h>

#include "engine/engine.h"
#include "op/op.h"
#include "store/store.h"
#include "util/error.h"
#include "util/list.h"

struct tb_core;
struct tb_tenant;

struct tb_core_options {
    uint64_t session_lease_ms; /* 0 = the defaults of util/limits.h, for all */
    uint64_t long_poll_ms;
    uint64_t result_ttl_ms;        /* after the first delivery */
    uint64_t result_unread_ttl_ms; /* never fetched */
    uint64_t max_queued_bytes;
    /* of each tenant; 0 = no limit */
    uint64_t tenant_rate, tenant_burst; /* submits a second, and how many at once */
    uint64_t tenant_queued_bytes;       /* of requests without a result */
    uint64_t tenant_pending;            /* requests without a result */
};

int tb_core_create(struct tb_core **out, uv_loop_t *loop, struct tb_engine *engine,
                   struct tb_store *store, const struct tb_core_options *o, struct tb_error *err);
/* Answers all waiters with try_again so that connections can drain. */
void tb_core_drain(struct tb_core *c);
/* Stops timers and frees; engine and store must outlive the call and are closed by the server after
 * cb. Tasks still in the engine are canceled first. */
void tb_core_close(struct tb_core *c, void (*cb)(void *arg), void *arg);

/* ---- tenants: made when first named; core's, until it closes. Names are checked by the caller. */
struct tb_tenant *tb_core_tenant(struct tb_core *c, const char *name);
const char *tb_tenant_name(const struct tb_tenant *t);

/* ---- sessions */
struct tb_session_params {
    const char *tags_json, *user_metadata_json; /* JSON texts or NULL */
    const char *sdk_version, *project_id, *display_name;
    const char *idempotency_key; /* or NULL: the same key gives the same session */
    bool lasting;                /* of a face: silence does not end it */
};
int tb_core_create_session(struct tb_core *c, struct tb_tenant *who,
                           const struct tb_session_params *p, const char **id,
                           struct tb_error *err);
/* TB_EGONE when it ended or is unknown (a restart). Renews the lease. */
int tb_core_heartbeat(struct tb_core *c, struct tb_tenant *who, const char *session_id,
                      struct tb_error *err);
/* First reason wins; repeating is fine. Waiting ops fail, running ones finish; memory is freed. A
 * session of before a restart has ended, so that is fine too; TB_ENOTFOUND for an id that cannot
 * be one of ours. */
int tb_core_finish_session(struct tb_core *c, struct tb_tenant *who, const char *session_id,
                           const char *reason, const char *detail, struct tb_error *err);

/* ---- submits. The op moves in every case (it is freed on error). Immediate errors are for what
 * has no place in an order: unknown session/model/sampler (TB_ENOTFOUND), unknown base model or
 * rank at creation (TB_EINVAL), TB_EBUSY when the queues hold too much, TB_ERATE beyond the
 * tenant's rate. Anything else wrong becomes a failed future. */
struct tb_ticket {
    const char *request_id;
    const char *model_id; /* creations: the model's id; else the op's, may be NULL */
};
int tb_core_submit(struct tb_core *c, struct tb_tenant *who, struct tb_op *op,
                   struct tb_ticket *out, struct tb_error *err);

/* ---- futures */
enum tb_future_state {
    TB_FUTURE_PENDING,
    TB_FUTURE_DONE,   /* op->result */
    TB_FUTURE_FAILED, /* op->error */
    TB_FUTURE_GONE,   /* expired, or lost with a restart: 410 */
    TB_FUTURE_UNKNOWN /* the id is malformed: 404 */
};
struct tb_waiter {
    struct tb_list node, deadline_node; /* core's, with the next two */
    struct tb_future *future;
    uint64_t deadline_ms;
    /* Called once: with DONE/FAILED and the op (borrowed during the call; core keeps it for
     * re-reads), or PENDING at the deadline (queue_state: "active", "paused_capacity",
     * "paused_rate_limit"; reason may be NULL), or GONE/UNKNOWN. May be called from inside
     * tb_core_wait. */
    void (*cb)(struct tb_waiter *w, enum tb_future_state state, const struct tb_op *op,
               const char *queue_state, const char *reason);
    void *arg;
};
void tb_core_wait(struct tb_core *c, struct tb_tenant *who, const char *request_id, size_t id_len,
                  struct tb_waiter *w);
void tb_core_unwait(struct tb_core *c,
                    struct tb_waiter *w); /* the client went away; cb is not called */
/* Keeps the op that a callback was given beyond the call, until the release: it may be read from
 * any thread then, since nobody changes an op that is over. */
void tb_core_hold(const struct tb_op *op);
void tb_core_release(const struct tb_op *op);
/* The face delivered the payload whole: starts the result's ttl. */
void tb_core_delivered(struct tb_core *c, const char *request_id, size_t id_len);

/* ---- streams: a sample's tokens as they are drawn, and its end without a deadline. The op has
 * `stream` set, else only the end comes. Called in the turn of the loop that submitted the op, it
 * misses no token. A future has one stream at most: a second takes the place of the first, which
 * hears no more. */
struct tb_core_stream {
    struct tb_future *future; /* core's */
    /* Some more tokens (borrowed during the call); may be NULL. May call back into core. */
    void (*tokens)(struct tb_core_stream *s, const struct tb_sampled_token *tokens, int32_t n);
    /* Called once and last: DONE or FAILED with the op (borrowed during the call), GONE or UNKNOWN.
     * May be called from inside tb_core_stream. tb_core_retrieved frees the result early. */
    void (*end)(struct tb_core_stream *s, enum tb_future_state state, const struct tb_op *op);
    void *arg;
};
void tb_core_stream(struct tb_core *c, struct tb_tenant *who, const char *request_id, size_t id_len,
                    struct tb_core_stream *s);
/* The client went away: nothing is called any more. tb_core_cancel ends the sample itself. */
void tb_core_unstream(struct tb_core *c, struct tb_core_stream *s);

/* Gives up a sample: it fails with TB_ECANCELED soon. Anything else runs on. */
void tb_core_cancel(struct tb_core *c, struct tb_tenant *who, const char *request_id,
                    size_t id_len);

/* ---- feeds: what is over of one sampler, for clients that wait for many samples with one poll.
 * A feed is of a (sampler, clone), clone = seq_id / TB_CLONE_BLOCK. Events have cursors 1, 2, ...;
 * those up to a poll's `prev` are acknowledged and will not be told again. */
#define TB_CLONE_BLOCK     1000000000LL
#define TB_MAX_FEED_EVENTS 4096 /* in one answer */
struct tb_feed_event {
    const char *request_id;
    const struct tb_op *op; /* op->error.code: it failed */
};
struct tb_core_feed;
struct tb_feed_waiter {
    struct tb_list node, deadline_node; /* core's, with the next two */
    struct tb_core_feed *feed;
    uint64_t prev, deadline_ms;
    /* Called once: with events (borrowed during the call; none at the deadline) and the cursor of
     * the last of them, or with an error: TB_EGONE, the sampler ended; TB_ENOTFOUND, no such id. */
    void (*cb)(struct tb_feed_waiter *w, const struct tb_error *err,
               const struct tb_feed_event *events, size_t n, uint64_t cursor);
    void *arg;
};
/* timeout_ms is cut to the long poll's; 0: the answer comes from inside the call. */
void tb_core_feed_wait(struct tb_core *c, struct tb_tenant *who, const char *sampler_id,
                       int64_t clone, uint64_t prev, uint64_t timeout_ms, struct tb_feed_waiter *w);
void tb_core_feed_unwait(struct tb_core *c, struct tb_feed_waiter *w); /* cb is not called */
/* The client has the payload and will not ask again: a sample's result is freed. */
void tb_core_retrieved(struct tb_core *c, struct tb_tenant *who, const char *request_id,
                       size_t id_len);

/* ---- models and samplers */
struct tb_model_answer {
    const char *model_id, *base_model, *arch, *tokenizer_id,
        *optimizer; /* tokenizer_id NULL: name */
    struct tb_lora_config lora;
};
int tb_core_model_info(struct tb_core *c, struct tb_tenant *who, const char *model_id,
                       struct tb_model_answer *out, struct tb_error *err);

struct tb_sampling_session_params {
    const char *session_id;
    int64_t seq_id;
    const char *base_model, *model_path; /* exactly one */
};
/* cb once, maybe at once: sampler id, or an error (TB_ENOTFOUND unknown session/model/path,
 * TB_EINVAL). */
typedef void (*tb_core_sampler_cb)(void *arg, const struct tb_error *err, const char *sampler_id);
void tb_core_create_sampling_session(struct tb_core *c, struct tb_tenant *who,
                                     const struct tb_sampling_session_params *p,
                                     tb_core_sampler_cb cb, void *arg);

/* Lets go of a sampler's weights. Samples that run finish; one that is unknown is fine. */
void tb_core_end_sampling_session(struct tb_core *c, struct tb_tenant *who, const char *sampler_id);

/* A block of seq_ids for one more client of a sampler: 1, 2, ... TB_ENOTFOUND, or TB_EGONE for a
 * sampler that ended. */
int tb_core_join_sampling_session(struct tb_core *c, struct tb_tenant *who, const char *sampler_id,
                                  int64_t *clone, struct tb_error *err);

struct tb_store *tb_core_store(struct tb_core *c);
struct tb_engine *tb_core_engine(struct tb_core *c);

/* What a face may tell about the served models without seeing engine/ (faces include core only). */
struct tb_served_model {
    const char *name, *dir, *arch, *tokenizer; /* tokenizer: the option or NULL */
    int max_context, max_rank, vocab;
    int64_t lora_width; /* parameters of an adapter on all it may be on, for each unit of rank */
    int n_eos;
    const int32_t *eos;
    const struct tb_tokenizer *text; /* NULL when the folder has none that is served, */
    const char *no_text;             /* and then why */
};
int tb_core_n_models(const struct tb_core *c);
void tb_core_served_model(const struct tb_core *c, int i, struct tb_served_model *out);

struct tb_core_stats {
    uint64_t sessions, models, samplers, futures_pending, futures_done, waiters, queued_bytes,
        copy_bytes;
    uint64_t submitted[TB_OP_N_TYPES], executed[TB_OP_N_TYPES], failed[TB_OP_N_TYPES];
};
void tb_core_stats(const struct tb_core *c, struct tb_core_stats *out);

/* What is computed, for faces. */
struct tb_queue_stats {
    const char *kind;                     /* "train", "sample", "other" */
    uint64_t waiting, running;            /* now */
    uint64_t begun, wait_us, wait_us_max; /* begun, and their time in the queue */
};
#define TB_N_QUEUES 3
struct tb_memory_use {
    const char *kind; /* "weights", "adapters", "versions", "kv", "workspaces", "other" */
    uint64_t bytes;
};
#define TB_N_MEMORY 6
struct tb_compute_stats {
    uint64_t shares; /* of training ops, computed for another device */
    uint64_t train_tokens;
    uint64_t sample_positions; /* of prompts and of what was sampled, without what a cache held */
    uint64_t sampled_tokens;   /* in results */
    uint64_t steps;
    struct tb_queue_stats queues[TB_N_QUEUES];
    uint64_t kv_pages, kv_free, kv_cached, kv_preempted;
    uint64_t prompt_tokens, prompt_hit_tokens; /* of samples that began; of these found in pages */
    uint64_t memory_limit;
    struct tb_memory_use memory[TB_N_MEMORY]; /* that counts against the limit, now */
    uint64_t adapters, adapters_out, versions, versions_out; /* alive; of these in files */
    uint64_t page_ins, page_outs;                            /* reads and writes of these files */
    uint64_t busy_us;
};
void tb_core_compute_stats(const struct tb_core *c, struct tb_compute_stats *out);

#endif
