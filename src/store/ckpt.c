/*
 * Checkpoints: writing, reading, deleting, listing. See store.h.
 *
 * A write goes: all files into DATA/tmp/<new>, fsync; a row in `pending` that names them; rename
 * (or exchange with the old folder); fsync of the parent; the checkpoint's row in, the pending row
 * out, in one transaction; the old folder is removed. Whatever a crash leaves of that, recover.c
 * finishes or undoes. A delete goes: folder to DATA/tmp, fsync, row out, remove. So a folder
 * without a row never comes from a crash of ours.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "store/store_internal.h"
#include "util/clock.h"
#include "util/limits.h"
#include "util/log.h"
#include "util/mem.h"

/* The live row of j->path into j->ckpt, or j->err. To change one, one must own it. */
static int find_readable(struct tb_store *s, struct tb_job *j)
{
    return tb_ckpt_find_live(s, &j->arena, &j->path, j->tenant, true, &j->ckpt, &j->err);
}

static int find_own(struct tb_store *s, struct tb_job *j)
{
    return tb_ckpt_find_live(s, &j->arena, &j->path, j->tenant, false, &j->ckpt, &j->err);
}

static struct tb_job *job_of_path(const char *tenant, const char *path,
                                  void (*work)(struct tb_store *s, struct tb_job *j),
                                  void (*done)(struct tb_job *j))
{
    struct tb_job *j = tb_job_of(tenant, NULL, work, done);
    tb_job_path(j, path);
    return j;
}

static void done_ckpt(struct tb_job *j)
{
    if (j->cb.ckpt)
        j->cb.ckpt(j->arg, &j->err, j->err.code ? NULL : &j->ckpt);
    else if (j->err.code)
        tb_log(TB_LOG_ERROR, "store", "%s", j->err.msg);
}

/* ---- write */

static int put_pending(struct tb_store *s, const char *write_id, const struct tb_ckpt_row *row,
                       const char *tmp, struct tb_error *err)
{
    sqlite3_stmt *st = tb_sql_get(s, TB_SQL_PUT_PENDING, err);
    if (!st) return err->code;
    const char *base = strrchr(tmp, '/');
    tb_sql_text(st, 1, write_id);
    tb_sql_text(st, 2, row->run_id);
    sqlite3_bind_int(st, 3, (int)row->kind);
    tb_sql_text(st, 4, row->name);
    tb_sql_text(st, 5, base ? base + 1 : tmp);
    return tb_sql_run(s, st, err);
}

static int delete_pending(struct tb_store *s, const char *write_id, struct tb_error *err)
{
    sqlite3_stmt *st = tb_sql_get(s, TB_SQL_DELETE_PENDING, err);
    if (!st) return err->code;
    tb_sql_text(st, 1, write_id);
    return tb_sql_run(s, st, err);
}

static int commit_row(struct tb_store *s, const char *write_id, const struct tb_ckpt_row *row,
                      struct tb_error *err)
{
    int rc = tb_sql_exec(s, "BEGIN IMMEDIATE", err);
    if (rc) return rc;
    rc = tb_ckpt_put_row(s, row, err);
    if (!rc) rc = delete_pending(s, write_id, err);
    if (!rc) rc = tb_sql_exec(s, "COMMIT", err);
    if (rc && !sqlite3_get_autocommit(s->db)) tb_sql_exec(s, "ROLLBACK", NULL);
    return rc;
}

/* Puts the finished folder tmp in its place. *swapped: tmp now holds what was there before. */
static int move_in(struct tb_store *s, const char *tmp, const char *final, bool *swapped,
                   struct tb_error *err)
{
    int rc = 0;
    *swapped = tb_is_dir(final);
    if (*swapped)
        rc = tb_dir_exchange(s, tmp, final, err);
    else if (rename(tmp, final))
        rc = tb_error_set(err, TB_EIO, "cannot move %s to %s: %s", tmp, final, strerror(errno));
    if (rc) return rc;
    char *parent = tb_strndup(final, (size_t)(strrchr(final, '/') - final));
    char *tmp_dir = tb_path_join(s->dir, "tmp");
    rc = tb_fsync_path(parent, err);
    if (!rc) rc = tb_fsync_path(tmp_dir, err);
    tb_free(tmp_dir);
    tb_free(parent);
    return rc;
}

/* After move_in: back to what was there, so that a save that failed left nothing. */
static void move_back(struct tb_store *s, const char *tmp, const char *final, bool swapped)
{
    struct tb_error err = {0};
    int rc = swapped ? tb_dir_exchange(s, tmp, final, &err) : rename(final, tmp);
    if (rc) tb_log(TB_LOG_ERROR, "store", "cannot undo the save of %s: %s", final, err.msg);
}

int tb_ckpt_install(struct tb_store *s, const char *write_id, const char *tmp, const char *final,
                    const struct tb_ckpt_row *row, struct tb_error *err)
{
    bool swapped = false;
    int rc = tb_ckpt_mkdirs(s, row->run_id, row->kind, err);
    if (!rc) rc = put_pending(s, write_id, row, tmp, err);
    if (rc) return rc;
    rc = move_in(s, tmp, final, &swapped, err);
    bool moved = !rc;
    if (!rc) rc = commit_row(s, write_id, row, err);
    if (rc) {
        if (moved) move_back(s, tmp, final, swapped);
        delete_pending(s, write_id, NULL);
    }
    return rc;
}

/* Whether the name is free, or may be taken from its present holder. */
static int check_free(struct tb_store *s, struct tb_job *j, const char *final, int64_t now)
{
    struct tb_ckpt_row old = {0};
    bool found;
    int rc = tb_ckpt_find_row(s, &j->arena, &j->path, &old, &found, &j->err);
    if (rc || j->write.overwrite) return rc;
    if (found && !tb_ckpt_expired(&old, now))
        return tb_error_set(&j->err, TB_EEXIST,
                            "checkpoint %s exists; save with overwrite or under another name",
                            j->id);
    if (!found && tb_is_dir(final))
        return tb_error_set(&j->err, TB_EEXIST, "folder %s exists but is not a known checkpoint",
                            final);
    return 0;
}

static void fill_row(struct tb_job *j, int64_t now)
{
    const struct tb_adapter_state *st = j->state;
    struct tb_ckpt_row *r = &j->ckpt;
    r->run_id = j->write.run_id;
    r->name = j->write.name;
    r->tenant = j->write.tenant;
    r->kind = j->write.kind;
    r->base_model = tb_arena_strdup(&j->arena, st->base_model ? st->base_model : "");
    r->lora = st->lora;
    r->has_optimizer = r->kind == TB_CKPT_TRAINING && st->m && st->v;
    r->step = st->step;
    r->time_us = now;
    r->expires_us = tb_ckpt_expiry(now, j->write.ttl_seconds);
    r->user_metadata_json = j->write.user_metadata_json;
    r->path = j->id;
}

static void work_write(struct tb_store *s, struct tb_job *j)
{
    int64_t now = tb_clock_wall_us();
    char write_id[TB_WRITE_ID + 1];
    tb_random_id(write_id, TB_WRITE_ID);
    char *final = tb_ckpt_path(s, j->path.run, j->path.kind, j->path.name);
    char *tmp = tb_tmp_path(s, "new");
    if (check_free(s, j, final, now)) goto out;
    fill_row(j, now);
    int rc = tb_mkdir(tmp, &j->err);
    if (!rc) rc = tb_ckpt_write_files(tmp, write_id, &j->ckpt, &j->write, j->state, &j->err);
    if (!rc) rc = tb_ckpt_install(s, write_id, tmp, final, &j->ckpt, &j->err);
    if (rc && !j->err.code) tb_error_set(&j->err, rc, "cannot save %s", j->id);
    tb_remove_tree(tmp); /* what failed, or what was replaced */
out:
    tb_adapter_state_destroy(j->state); /* large: not kept until the callback */
    j->state = NULL;
    tb_free(tmp);
    tb_free(final);
}

void tb_store_write_ckpt(struct tb_store *s, const struct tb_ckpt_write *w,
                         struct tb_adapter_state *state, tb_store_ckpt_cb cb, void *arg)
{
    struct tb_job *j = tb_job_create(work_write, done_ckpt, false);
    j->state = state;
    j->cb.ckpt = cb;
    j->arg = arg;
    j->write = *w;
    j->write.run_id = tb_job_dup(j, w->run_id);
    j->write.name = tb_job_dup(j, w->name);
    j->write.tenant = tb_job_dup(j, w->tenant);
    j->write.user_metadata_json = tb_job_dup(j, w->user_metadata_json);
    j->write.model_dir = tb_job_dup(j, w->model_dir);
    if (tb_ckpt_name_check(w->name, &j->err) == 0) {
        char *path =
            tb_asprintf("tinker://%s/%s/%s", w->run_id, tb_ckpt_kind_dir(w->kind), w->name);
        tb_job_path(j, path);
        tb_free(path);
    }
    tb_job_submit(s, j);
}

/* ---- read */

static void work_read(struct tb_store *s, struct tb_job *j)
{
    if (j->path.kind == TB_CKPT_EXTERNAL) {
        tb_error_set(&j->err, TB_EINVAL,
                     "%s holds external weights, which can be downloaded but not loaded", j->id);
        return;
    }
    if (find_readable(s, j)) return;
    if (j->flag && !j->ckpt.has_optimizer) {
        tb_error_set(&j->err, TB_EINVAL,
                     "%s was saved without optimizer state; load it without the optimizer", j->id);
        return;
    }
    char *dir = tb_ckpt_path(s, j->path.run, j->path.kind, j->path.name);
    tb_ckpt_read_files(dir, j->flag, &j->state, &j->err);
    tb_free(dir);
}

static void done_read(struct tb_job *j)
{
    struct tb_adapter_state *st = j->state;
    j->state = NULL;
    j->cb.state(j->arg, &j->err, j->err.code ? NULL : &j->ckpt, st);
}

void tb_store_read_ckpt(struct tb_store *s, const char *tenant, const char *path,
                        bool with_optimizer, tb_store_state_cb cb, void *arg)
{
    struct tb_job *j = job_of_path(tenant, path, work_read, done_read);
    j->small = false;
    j->flag = with_optimizer;
    j->cb.state = cb;
    j->arg = arg;
    tb_job_submit(s, j);
}

static void work_get(struct tb_store *s, struct tb_job *j)
{
    find_readable(s, j);
}

void tb_store_get_ckpt(struct tb_store *s, const char *tenant, const char *path,
                       tb_store_ckpt_cb cb, void *arg)
{
    struct tb_job *j = job_of_path(tenant, path, work_get, done_ckpt);
    j->cb.ckpt = cb;
    j->arg = arg;
    tb_job_submit(s, j);
}

/* ---- delete, publish, ttl, sweep */

static int delete_one(struct tb_store *s, const struct tb_tinker_path *p, struct tb_error *err)
{
    char *dir = tb_ckpt_path(s, p->run, p->kind, p->name), *moved = NULL;
    int rc = tb_is_dir(dir) ? tb_move_to_tmp(s, dir, &moved, err) : 0;
    if (!rc) rc = tb_ckpt_delete_row(s, p->run, p->kind, p->name, err);
    if (rc && moved) {
        if (rename(moved, dir))
            tb_log(TB_LOG_ERROR, "store", "cannot move %s back: %s", moved, strerror(errno));
    } else if (moved) {
        tb_remove_tree(moved);
    }
    tb_free(moved);
    tb_free(dir);
    return rc;
}

static void work_delete(struct tb_store *s, struct tb_job *j)
{
    if (find_own(s, j) == 0) delete_one(s, &j->path, &j->err);
}

void tb_store_delete_ckpt(struct tb_store *s, const char *tenant, const char *path,
                          tb_store_done_cb cb, void *arg)
{
    struct tb_job *j = job_of_path(tenant, path, work_delete, tb_job_done_plain);
    j->small = false;
    j->cb.done = cb;
    j->arg = arg;
    tb_job_submit(s, j);
}

static void set_column(struct tb_store *s, struct tb_job *j, enum tb_sql q, int64_t value)
{
    if (find_own(s, j)) return;
    sqlite3_stmt *st = tb_sql_get(s, q, &j->err);
    if (!st) return;
    tb_sql_text(st, 1, j->path.run);
    sqlite3_bind_int(st, 2, (int)j->path.kind);
    tb_sql_text(st, 3, j->path.name);
    sqlite3_bind_int64(st, 4, value);
    tb_sql_run(s, st, &j->err);
}

static void work_publish(struct tb_store *s, struct tb_job *j)
{
    set_column(s, j, TB_SQL_PUBLISH_CKPT, j->flag);
}

void tb_store_publish_ckpt(struct tb_store *s, const char *tenant, const char *path, bool is_public,
                           tb_store_done_cb cb, void *arg)
{
    struct tb_job *j = job_of_path(tenant, path, work_publish, tb_job_done_plain);
    j->flag = is_public;
    j->cb.done = cb;
    j->arg = arg;
    tb_job_submit(s, j);
}

static void work_ttl(struct tb_store *s, struct tb_job *j)
{
    set_column(s, j, TB_SQL_TTL_CKPT, tb_ckpt_expiry(tb_clock_wall_us(), j->number));
}

void tb_store_set_ckpt_ttl(struct tb_store *s, const char *tenant, const char *path,
                           int64_t ttl_seconds, tb_store_done_cb cb, void *arg)
{
    struct tb_job *j = job_of_path(tenant, path, work_ttl, tb_job_done_plain);
    if (!j->err.code && ttl_seconds < 0)
        tb_error_set(&j->err, TB_EINVAL, "ttl_seconds must not be negative");
    j->number = ttl_seconds;
    j->cb.done = cb;
    j->arg = arg;
    tb_job_submit(s, j);
}

/* At most so many at once, as other jobs wait behind it. */
enum { SWEEP = 1000 };

static void work_sweep(struct tb_store *s, struct tb_job *j)
{
    struct tb_tinker_path *list = NULL;
    size_t n = 0, cap = 0;
    sqlite3_stmt *st = tb_sql_get(s, TB_SQL_EXPIRED_CKPTS, &j->err);
    if (!st) return;
    sqlite3_bind_int64(st, 1, tb_clock_wall_us());
    sqlite3_bind_int64(st, 2, SWEEP);
    while (tb_sql_row(s, st, &j->err) == 1) {
        if (n == cap) list = tb_realloc(list, (cap = cap ? cap * 2 : 16) * sizeof(*list));
        struct tb_tinker_path *p = &list[n++];
        snprintf(p->run, sizeof(p->run), "%s", (const char *)sqlite3_column_text(st, 0));
        p->kind = (enum tb_ckpt_kind)sqlite3_column_int(st, 1);
        snprintf(p->name, sizeof(p->name), "%s", (const char *)sqlite3_column_text(st, 2));
    }
    for (size_t i = 0; i < n; i++) {
        struct tb_error err = {0};
        if (delete_one(s, &list[i], &err)) {
            j->err = err;
        } else {
            tb_log(TB_LOG_INFO, "store", "expired tinker://%s/%s/%s", list[i].run,
                   tb_ckpt_kind_dir(list[i].kind), list[i].name);
        }
    }
    tb_free(list);
    j->flag = n == SWEEP && !j->err.code;
}

static void done_sweep(struct tb_job *j)
{
    tb_job_done_plain(j);
    struct tb_store *s = j->arg;
    if (j->flag && !s->closing) tb_store_sweep(s);
}

void tb_store_sweep(struct tb_store *s)
{
    struct tb_job *j = tb_job_create(work_sweep, done_sweep, false);
    j->arg = s;
    tb_job_submit(s, j);
}

int tb_store_ckpt_dir(const struct tb_store *s, const char *path, char *out, size_t n,
                      struct tb_error *err)
{
    struct tb_tinker_path p;
    int rc = tb_tinker_path_parse(path, path ? strlen(path) : 0, &p, err);
    if (rc) return rc;
    char *dir = tb_ckpt_path(s, p.run, p.kind, p.name);
    int k = snprintf(out, n, "%s", dir);
    tb_free(dir);
    if (k < 0 || (size_t)k >= n)
        return tb_error_set(err, TB_ETOOBIG, "the folder of %s has too long a name", path);
    return 0;
}

/* ---- lists */

static int count_ckpts(struct tb_store *s, struct tb_job *j, int64_t now)
{
    enum tb_sql q = j->id ? TB_SQL_COUNT_RUN_CKPTS : TB_SQL_COUNT_CKPTS;
    sqlite3_stmt *st = tb_sql_get(s, q, &j->err);
    if (!st) return j->err.code;
    sqlite3_bind_int64(st, 1, now);
    tb_sql_text(st, 2, j->id ? j->id : j->tenant);
    int rc = tb_sql_row(s, st, &j->err);
    if (rc == 1) {
        j->ckpts.page.total = sqlite3_column_int64(st, 0);
        tb_sql_reset(st);
        rc = 0;
    }
    return rc;
}

static int run_exists(struct tb_store *s, struct tb_job *j)
{
    sqlite3_stmt *st = tb_sql_get(s, TB_SQL_GET_RUN, &j->err);
    if (!st) return j->err.code;
    tb_sql_text(st, 1, j->id);
    tb_sql_text(st, 2, j->tenant);
    int rc = tb_sql_row(s, st, &j->err);
    if (rc < 0) return rc;
    if (rc == 0) return tb_error_set(&j->err, TB_ENOTFOUND, "there is no training run '%s'", j->id);
    tb_sql_reset(st);
    return 0;
}

static void work_list(struct tb_store *s, struct tb_job *j)
{
    int64_t now = tb_clock_wall_us();
    j->ckpts.page.offset = j->offset;
    j->ckpts.page.limit = j->limit;
    if (j->id && run_exists(s, j)) return;
    sqlite3_stmt *st = tb_sql_get(s, j->id ? TB_SQL_LIST_RUN_CKPTS : TB_SQL_LIST_CKPTS, &j->err);
    if (!st) return;
    sqlite3_bind_int64(st, 1, now);
    sqlite3_bind_int64(st, 2, j->limit ? j->limit : -1);
    sqlite3_bind_int64(st, 3, j->offset);
    tb_sql_text(st, 4, j->id ? j->id : j->tenant);
    struct tb_ckpt_row *rows = NULL;
    size_t n = 0, cap = 0;
    int rc;
    while ((rc = tb_sql_row(s, st, &j->err)) == 1) {
        if (n == cap) {
            size_t c = cap ? cap * 2 : 16;
            struct tb_ckpt_row *p = tb_arena_calloc(&j->arena, c, sizeof(*p));
            if (n) memcpy(p, rows, n * sizeof(*p));
            rows = p;
            cap = c;
        }
        tb_ckpt_from_row(&j->arena, st, &rows[n++]);
    }
    if (rc || count_ckpts(s, j, now)) return;
    j->ckpts.rows = rows;
    j->ckpts.n = (int32_t)n;
}

static void done_list(struct tb_job *j)
{
    j->cb.ckpts(j->arg, &j->err, &j->ckpts);
}

void tb_store_list_ckpts(struct tb_store *s, const char *tenant, const char *run_id, int64_t offset,
                         int64_t limit, tb_store_ckpts_cb cb, void *arg)
{
    struct tb_job *j = tb_job_of(tenant, run_id, work_list, done_list);
    j->offset = TB_MAX(offset, 0);
    j->limit = TB_MAX(limit, 0);
    j->cb.ckpts = cb;
    j->arg = arg;
    tb_job_submit(s, j);
}
