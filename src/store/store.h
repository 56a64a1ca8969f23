/*
 * Store: what survives a restart. SQLite (WAL) holds sessions, runs, samplers and checkpoint rows;
 * checkpoint folders hold the tensors. A checkpoint is written to a temporary folder, fsynced,
 * renamed, and only then gets its row, so that a crash never leaves a listed half-written
 * checkpoint; leftovers are swept at open.
 *
 *   DATA/tinkerbell.db
 *   DATA/tmp/                                        folders being written
 *   DATA/checkpoints/<run>/<kind>/<name>/            kind: weights, sampler_weights,
 * external_weights adapter_model.safetensors  adapter_config.json   Tinker's key names; external:
 * PEFT's optimizer.safetensors (exp_avg.*, exp_avg_sq.*)   weights saved with optimizer
 *       checkpoint.json                                  format version, rank, flags, seed, step,
 * ...
 *
 * Every row has an owner, a tenant. A call that takes an id of a client's takes the tenant who
 * asks, too: what belongs to another is answered as if it were not there, except that the
 * checkpoints which their owner has published may be read (tb_store_get_ckpt, _read_ckpt,
 * _copy_ckpt).
 *
 * Thread: every call is made on the loop's thread and returns at once; the work runs as one
 * uv_work_t at a time per store (so SQLite has one writer and jobs keep their order), and the
 * callback comes on the loop's thread. Pointers given to a callback are valid during it only.
 * Strings passed in are copied.
 */
#ifndef TB_STORE_STORE_H
#define TB_STORE_STORE_H

#include <stdbool.h>
#include <stdint.h>
#include <uv.h>

#include "op/state.h"
#include "util/error.h"

struct tb_store;

enum tb_ckpt_kind { TB_CKPT_TRAINING, TB_CKPT_SAMPLER, TB_CKPT_EXTERNAL };
const char *
tb_ckpt_kind_dir(enum tb_ckpt_kind k); /* "weights", "sampler_weights", "external_weights" */
const char *tb_ckpt_kind_type(enum tb_ckpt_kind k); /* "training", "sampler", "external" */

/* tinker://{run}/{kind}/{name}, exactly three parts. out spans point into text. TB_EINVAL with a
 * message that shows the text and the expected form. */
struct tb_tinker_path {
    char run[264];
    enum tb_ckpt_kind kind;
    char name[136];
};
int tb_tinker_path_parse(const char *text, size_t n, struct tb_tinker_path *out,
                         struct tb_error *err);
/* A checkpoint's name: 1..TB_MAX_NAME of [A-Za-z0-9._-], not beginning with '.'. */
int tb_ckpt_name_check(const char *name, struct tb_error *err);

/* Opens or creates; sweeps DATA/tmp and rows without folder; blocking (start only). Refuses a
 * folder that another live process has open (lock file) with one clear line. */
int tb_store_open(struct tb_store **out, uv_loop_t *loop, const char *data_dir,
                  struct tb_error *err);
/* Finishes queued jobs, then closes and calls cb. */
void tb_store_close(struct tb_store *s, void (*cb)(void *arg), void *arg);

typedef void (*tb_store_done_cb)(void *arg, const struct tb_error *err); /* err->code 0 = done */

/* The owner of what was made before there were tenants, and of keys without a name. */
#define TB_TENANT_DEFAULT "default"

/* ---- sessions */
struct tb_session_row {
    const char *id, *tenant;
    const char *tags_json, *user_metadata_json;          /* "[]", "{}" */
    const char *sdk_version, *project_id, *display_name; /* may be NULL */
    int64_t created_us, last_seen_us;
    const char *status;        /* "active", "client_finished", "cancelled" */
    const char *finish_reason; /* "success" ... or NULL */
    const char *finish_detail;
};
void tb_store_put_session(struct tb_store *s, const struct tb_session_row *row);
/* New status of a session (first one wins). */
void tb_store_end_session(struct tb_store *s, const char *id, const char *status,
                          const char *reason, const char *detail);
void tb_store_set_session_project(struct tb_store *s, const char *tenant, const char *id,
                                  const char *project, tb_store_done_cb cb, void *arg);

/* ---- runs (training_run_id = model_id) */
struct tb_run_row {
    const char *id, *tenant, *session_id, *base_model;
    struct tb_lora_config lora;
    const char *user_metadata_json; /* or NULL */
    const char *project_id;         /* NULL: its session's */
    int64_t created_us, last_request_us;
    bool corrupted;
};
void tb_store_put_run(struct tb_store *s, const struct tb_run_row *row);
void tb_store_touch_run(struct tb_store *s, const char *id,
                        int64_t last_request_us); /* coalesced */

/* ---- samplers (sampling sessions) */
struct tb_sampler_row {
    const char *id, *tenant, *session_id, *base_model;
    const char *model_path; /* NULL for the base model */
    int64_t created_us;
};
void tb_store_put_sampler(struct tb_store *s, const struct tb_sampler_row *row);

/* ---- checkpoints */
struct tb_ckpt_row {
    const char *run_id, *name, *tenant;
    enum tb_ckpt_kind kind;
    const char *base_model;
    struct tb_lora_config lora;
    bool has_optimizer;
    int64_t step;
    int64_t time_us, size_bytes;
    int64_t expires_us; /* 0 = never */
    bool is_public;
    const char *user_metadata_json; /* or NULL */
    const char *path;               /* "tinker://…" */
};
struct tb_ckpt_write {
    const char *run_id, *name, *tenant;
    enum tb_ckpt_kind kind;
    bool overwrite;
    int64_t ttl_seconds; /* 0 = never */
    const char *user_metadata_json;
    bool tied_head;        /* for the PEFT export's names */
    const char *model_dir; /* base_model_name_or_path of the PEFT export */
};
typedef void (*tb_store_ckpt_cb)(void *arg, const struct tb_error *err,
                                 const struct tb_ckpt_row *row);
/* Writes state (ownership moves) as a checkpoint. TB_EEXIST when the name exists and not overwrite.
 */
void tb_store_write_ckpt(struct tb_store *s, const struct tb_ckpt_write *w,
                         struct tb_adapter_state *state, tb_store_ckpt_cb cb, void *arg);
/* Reads a training or sampler checkpoint. The state's ownership moves to the callback. TB_ENOTFOUND
 * names the path (expired ones included); with_optimizer on a checkpoint without is TB_EINVAL. */
typedef void (*tb_store_state_cb)(void *arg, const struct tb_error *err,
                                  const struct tb_ckpt_row *row, struct tb_adapter_state *state);
void tb_store_read_ckpt(struct tb_store *s, const char *tenant, const char *path,
                        bool with_optimizer, tb_store_state_cb cb, void *arg);
/* The row alone. */
void tb_store_get_ckpt(struct tb_store *s, const char *tenant, const char *path,
                       tb_store_ckpt_cb cb, void *arg);
void tb_store_delete_ckpt(struct tb_store *s, const char *tenant, const char *path,
                          tb_store_done_cb cb, void *arg);
void tb_store_publish_ckpt(struct tb_store *s, const char *tenant, const char *path, bool is_public,
                           tb_store_done_cb cb, void *arg);
void tb_store_set_ckpt_ttl(struct tb_store *s, const char *tenant, const char *path,
                           int64_t ttl_seconds /* 0 = never */, tb_store_done_cb cb, void *arg);
/* Folder of a checkpoint on disk; NULL-terminated into out; TB_ENOTFOUND is left to the caller's
 * open. */
int tb_store_ckpt_dir(const struct tb_store *s, const char *path, char *out, size_t n,
                      struct tb_error *err);

/* Makes `path`, which `reader` may read, a checkpoint of the tenant's run run_id (new; of
 * session_id or NULL), with the same kind and name. A live checkpoint of the tenant's that is there
 * already is the answer: run_id identifies the request. */
struct tb_ckpt_copy {
    const char *reader, *path;
    const char *tenant, *run_id, *session_id, *project_id; /* the last two may be NULL */
    int64_t ttl_seconds;                                   /* 0 = never */
};
void tb_store_copy_ckpt(struct tb_store *s, const struct tb_ckpt_copy *copy, tb_store_ckpt_cb cb,
                        void *arg);

/* ---- lists of a tenant's rows, newest first */
struct tb_page {
    int64_t offset, limit, total;
};
struct tb_run_list {
    struct tb_page page;
    int32_t n;
    const struct tb_run_row *rows;
    const struct tb_ckpt_row *const *last_ckpt, *const *last_sampler; /* [n], entries may be NULL */
};
typedef void (*tb_store_runs_cb)(void *arg, const struct tb_error *err,
                                 const struct tb_run_list *l);
/* project NULL: of all projects. */
void tb_store_list_runs(struct tb_store *s, const char *tenant, const char *project, int64_t offset,
                        int64_t limit, tb_store_runs_cb cb, void *arg);
void tb_store_get_run(struct tb_store *s, const char *tenant, const char *id, tb_store_runs_cb cb,
                      void *arg); /* n = 1, or TB_ENOTFOUND */

struct tb_ckpt_list {
    struct tb_page page;
    int32_t n;
    const struct tb_ckpt_row *rows;
};
typedef void (*tb_store_ckpts_cb)(void *arg, const struct tb_error *err,
                                  const struct tb_ckpt_list *l);
/* run_id NULL: all runs. limit 0: all. TB_ENOTFOUND for an unknown run_id. */
void tb_store_list_ckpts(struct tb_store *s, const char *tenant, const char *run_id, int64_t offset,
                         int64_t limit, tb_store_ckpts_cb cb, void *arg);

struct tb_session_list {
    struct tb_page page;
    int32_t n;
    const struct tb_session_row *rows;
    /* tb_store_get_session only: */
    int32_t n_runs, n_samplers;
    const char *const *run_ids, *const *sampler_ids;
};
typedef void (*tb_store_sessions_cb)(void *arg, const struct tb_error *err,
                                     const struct tb_session_list *l);
void tb_store_list_sessions(struct tb_store *s, const char *tenant, int64_t offset, int64_t limit,
                            tb_store_sessions_cb cb, void *arg);
void tb_store_get_session(struct tb_store *s, const char *tenant, const char *id,
                          tb_store_sessions_cb cb, void *arg); /* n = 1, or TB_ENOTFOUND */

struct tb_session_query {
    const char *tenant;
    const char *session_id, *display_name; /* either matches; NULL: not asked for */
    const char *user_metadata_json;        /* pairs that must hold, or NULL */
    const char *const *project_ids, *const *statuses;
    int32_t n_project_ids, n_statuses; /* 0: any */
    int32_t limit;
    int64_t before_us; /* the last page's last row, with its id; NULL: the first page */
    const char *before_id;
};
struct tb_session_summary {
    struct tb_session_row session;
    int64_t n_ckpts, ckpt_bytes;
};
struct tb_session_search {
    int32_t n;
    const struct tb_session_summary *rows;
    bool more;
};
typedef void (*tb_store_search_cb)(void *arg, const struct tb_error *err,
                                   const struct tb_session_search *r);
void tb_store_search_sessions(struct tb_store *s, const struct tb_session_query *q,
                              tb_store_search_cb cb, void *arg);

typedef void (*tb_store_sampler_cb)(void *arg, const struct tb_error *err,
                                    const struct tb_sampler_row *row);
void tb_store_get_sampler(struct tb_store *s, const char *tenant, const char *id,
                          tb_store_sampler_cb cb, void *arg);

/* Deletes expired checkpoints (rows and folders); the server calls it every minute. */
void tb_store_sweep(struct tb_store *s);

#endif
