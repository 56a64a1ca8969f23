/*
 * Inside of the store: its struct, its jobs, and what the files of this folder offer each other.
 *
 * A job is made on the loop's thread, holds copies of its arguments in its arena, runs its `work`
 * on one pool thread at a time, and ends with `done` on the loop's thread. The database handle, the
 * cached statements and the checkpoint folders belong to whoever runs a job (open and close run
 * while there is none).
 */
#ifndef TB_STORE_INTERNAL_H
#define TB_STORE_INTERNAL_H

#include <sqlite3.h>

#include "store/store.h"
#include "util/arena.h"
#include "util/list.h"
#include "util/map.h"

#define TB_STORE_TOUCH_MS 1000 /* runs' last_request_us reach the disk this late at most */
#define TB_STORE_BATCH    256  /* small jobs that share a uv_work and a transaction */

enum tb_sql {
    TB_SQL_PUT_SESSION,
    TB_SQL_END_SESSION,
    TB_SQL_SET_PROJECT,
    TB_SQL_LIST_SESSIONS,
    TB_SQL_GET_SESSION,
    TB_SQL_COUNT_SESSIONS,
    TB_SQL_SESSION_RUNS,
    TB_SQL_SESSION_SAMPLERS,
    TB_SQL_SEARCH_SESSIONS,
    TB_SQL_SESSION_CKPTS,
    TB_SQL_PUT_RUN,
    TB_SQL_TOUCH_RUN,
    TB_SQL_LIST_RUNS,
    TB_SQL_LIST_PROJECT_RUNS,
    TB_SQL_GET_RUN,
    TB_SQL_COUNT_RUNS,
    TB_SQL_COUNT_PROJECT_RUNS,
    TB_SQL_PUT_SAMPLER,
    TB_SQL_GET_SAMPLER,
    TB_SQL_PUT_CKPT,
    TB_SQL_GET_CKPT,
    TB_SQL_LAST_CKPT,
    TB_SQL_LIST_CKPTS,
    TB_SQL_LIST_RUN_CKPTS,
    TB_SQL_COUNT_CKPTS,
    TB_SQL_COUNT_RUN_CKPTS,
    TB_SQL_DELETE_CKPT,
    TB_SQL_PUBLISH_CKPT,
    TB_SQL_TTL_CKPT,
    TB_SQL_EXPIRED_CKPTS,
    TB_SQL_ALL_CKPTS,
    TB_SQL_PUT_PENDING,
    TB_SQL_DELETE_PENDING,
    TB_SQL_ALL_PENDING,
    TB_SQL_N
};

struct tb_store {
    uv_loop_t *loop;
    char *dir;
    int lock_fd;
    sqlite3 *db;
    sqlite3_stmt *stmts[TB_SQL_N];

    /* the loop's */
    struct tb_list queue, running; /* jobs */
    uv_work_t work;
    bool busy, calling; /* a uv_work is out; callbacks are being made */
    uv_timer_t touch_timer;
    struct tb_map touches; /* run id → struct touch */
    bool closing;
    void (*close_cb)(void *arg);
    void *close_arg;
};

struct tb_job {
    struct tb_list node;
    struct tb_arena arena;
    struct tb_error err;
    bool small; /* may share a uv_work and a transaction with others */
    void (*work)(struct tb_store *s, struct tb_job *j);
    void (*done)(struct tb_job *j);

    /* arguments; which are set depends on the job */
    const char *tenant; /* who asks */
    const char *id, *text[3];
    int64_t number, offset, limit;
    bool flag;
    struct tb_tinker_path path;
    struct tb_session_row session;
    struct tb_run_row run;
    struct tb_sampler_row sampler;
    struct tb_ckpt_row ckpt;
    struct tb_ckpt_write write;
    struct tb_ckpt_copy copy;
    const struct tb_session_query *query;
    struct tb_adapter_state *state; /* the job's until handed over */
    struct tb_map touches;          /* of a touch job: run id → struct touch */

    /* results */
    struct tb_run_list runs;
    struct tb_ckpt_list ckpts;
    struct tb_session_list sessions;
    struct tb_session_search search;
    bool found;

    union {
        tb_store_done_cb done;
        tb_store_ckpt_cb ckpt;
        tb_store_state_cb state;
        tb_store_runs_cb runs;
        tb_store_ckpts_cb ckpts;
        tb_store_sessions_cb sessions;
        tb_store_sampler_cb sampler;
        tb_store_search_cb search;
    } cb;
    void *arg;
};

struct touch {
    int64_t us;
};

/* ---- store.c */
struct tb_job *tb_job_create(void (*work)(struct tb_store *s, struct tb_job *j),
                             void (*done)(struct tb_job *j), bool small);
/* A job that answers a tenant's question about `id` (or NULL). */
struct tb_job *tb_job_of(const char *tenant, const char *id,
                         void (*work)(struct tb_store *s, struct tb_job *j),
                         void (*done)(struct tb_job *j));
void tb_job_submit(struct tb_store *s, struct tb_job *j);
void tb_job_done_plain(struct tb_job *j); /* calls cb.done if there is one, else logs a failure */
const char *tb_job_dup(struct tb_job *j, const char *s); /* NULL stays NULL */
/* Parses a tinker path into j->path or sets j->err. */
void tb_job_path(struct tb_job *j, const char *path);

/* ---- sql.c: statements are prepared once, at their first use */
int tb_sql_open(struct tb_store *s, struct tb_error *err);
void tb_sql_close(struct tb_store *s);
sqlite3_stmt *tb_sql_get(struct tb_store *s, enum tb_sql q, struct tb_error *err); /* NULL: err */
int tb_sql_exec(struct tb_store *s, const char *sql, struct tb_error *err);
int tb_sql_fail(struct tb_store *s, struct tb_error *err); /* the handle's last error */
void tb_sql_reset(sqlite3_stmt *st); /* for the next use; forgets what was bound */
/* Steps a statement that gives no rows, and resets it. */
int tb_sql_run(struct tb_store *s, sqlite3_stmt *st, struct tb_error *err);
/* 1: a row, 0: no more (reset), negative: error (reset). */
int tb_sql_row(struct tb_store *s, sqlite3_stmt *st, struct tb_error *err);
void tb_sql_text(sqlite3_stmt *st, int i,
                 const char *v); /* NULL: null; v must live until the reset */
const char *tb_sql_str(struct tb_arena *a, sqlite3_stmt *st, int col); /* NULL for null */

/* ---- ckpt_rows.c, on a pool thread */
#define TB_CKPT_COLUMNS                                                                            \
    "run_id, kind, name, base_model, rank, alpha, has_seed, seed, train_attn, train_mlp, "         \
    "train_unembed, has_optimizer, step, time_us, size_bytes, expires_us, public, "                \
    "user_metadata, tenant"
void tb_ckpt_from_row(struct tb_arena *a, sqlite3_stmt *st, struct tb_ckpt_row *out);
int tb_ckpt_put_row(struct tb_store *s, const struct tb_ckpt_row *row, struct tb_error *err);
int tb_ckpt_delete_row(struct tb_store *s, const char *run, enum tb_ckpt_kind kind,
                       const char *name, struct tb_error *err);
/* *found false: no row. Expired rows are found too. */
int tb_ckpt_find_row(struct tb_store *s, struct tb_arena *a, const struct tb_tinker_path *p,
                     struct tb_ckpt_row *out, bool *found, struct tb_error *err);
/* 0 and the row, when it is there, has not expired, and the tenant may see it: an owner always,
 * another (`shared`) when it is published. Else TB_ENOTFOUND. */
int tb_ckpt_find_live(struct tb_store *s, struct tb_arena *a, const struct tb_tinker_path *p,
                      const char *tenant, bool shared, struct tb_ckpt_row *out,
                      struct tb_error *err);
bool tb_ckpt_expired(const struct tb_ckpt_row *row, int64_t now_us);
/* The moment ttl seconds after now; 0, which is never, for ttl 0 and beyond the end of time. */
int64_t tb_ckpt_expiry(int64_t now_us, int64_t ttl_seconds);
void tb_lora_from_row(sqlite3_stmt *st, int col, struct tb_lora_config *out); /* 7 columns */
void tb_lora_bind(sqlite3_stmt *st, int i, const struct tb_lora_config *l);
int tb_run_put(struct tb_store *s, const struct tb_run_row *row, bool only_new,
               struct tb_error *err);

/* ---- ckpt_files.c: the contents of a checkpoint's folder */
#define TB_CKPT_JSON    "checkpoint.json"
#define TB_CKPT_ADAPTER "adapter_model.safetensors"
#define TB_CKPT_CONFIG  "adapter_config.json"
#define TB_CKPT_OPTIM   "optimizer.safetensors"
#define TB_WRITE_ID     24
/* Writes and fsyncs all files of a checkpoint into dir; row->size_bytes receives the sum. */
int tb_ckpt_write_files(const char *dir, const char *write_id, struct tb_ckpt_row *row,
                        const struct tb_ckpt_write *w, const struct tb_adapter_state *state,
                        struct tb_error *err);
/* Reads checkpoint.json. write_id (TB_WRITE_ID + 1 bytes) may be NULL. row's strings live in a. */
int tb_ckpt_read_json(const char *dir, struct tb_arena *a, struct tb_ckpt_row *row, char *write_id,
                      struct tb_error *err);
int tb_ckpt_read_files(const char *dir, bool with_optimizer, struct tb_adapter_state **out,
                       struct tb_error *err);

/* A folder of links to a checkpoint's files, with the description of row. */
int tb_ckpt_link_files(const char *from, const char *to, const char *write_id,
                       const struct tb_ckpt_row *row, struct tb_error *err);

/* ---- ckpt.c: puts a finished folder and its row in place, all or nothing */
int tb_ckpt_install(struct tb_store *s, const char *write_id, const char *tmp, const char *final,
                    const struct tb_ckpt_row *row, struct tb_error *err);

/* ---- copy.c */
int tb_link_or_copy(const char *from, const char *to, struct tb_error *err);

/* ---- rows.c */
void tb_session_from_row(struct tb_arena *a, sqlite3_stmt *st, struct tb_session_row *r);

/* ---- recover.c: at open */
int tb_store_recover(struct tb_store *s, struct tb_error *err);

/* ---- files.c: small file system helpers; messages name the path and the reason */
char *tb_path_join(const char *a, const char *b); /* tb_free */
char *tb_ckpt_path(const struct tb_store *s, const char *run, enum tb_ckpt_kind kind,
                   const char *name);                 /* folder; tb_free */
int tb_mkdir(const char *path, struct tb_error *err); /* existing folders are fine */
/* Makes DATA/checkpoints/<run>/<kind>, durably. */
int tb_ckpt_mkdirs(const struct tb_store *s, const char *run, enum tb_ckpt_kind kind,
                   struct tb_error *err);
int tb_fsync_path(const char *path, struct tb_error *err); /* file or folder */
int tb_write_file(const char *path, const void *p, size_t n, struct tb_error *err); /* and fsync */
int tb_read_file(const char *path, size_t max, char **out, size_t *n, struct tb_error *err);
int tb_file_crc(const char *path, int64_t *size, uint32_t *crc, struct tb_error *err);
/* Swaps two folders. Atomic where the file system can; else over a third name in DATA/tmp. */
int tb_dir_exchange(const struct tb_store *s, const char *a, const char *b, struct tb_error *err);
void tb_remove_tree(const char *path); /* best effort, logs what stays */
bool tb_is_dir(const char *path);
char *tb_tmp_path(const struct tb_store *s, const char *prefix); /* a new name; tb_free */
/* Moves a folder to DATA/tmp and makes that durable; *moved is its new place (tb_free). */
int tb_move_to_tmp(const struct tb_store *s, const char *path, char **moved, struct tb_error *err);
int tb_ckpt_kind_parse(const char *dir, size_t n, enum tb_ckpt_kind *out); /* 0 or TB_EINVAL */

#endif
