/*
 * Recovery at open: makes rows and folders agree after a crash. Loop thread, before any job.
 *
 *  1. Each `pending` row is a save whose files were complete. If the folder in place is that save's
 *     (write_id), its row is written; if nothing is in place, the save's folder is moved in; else
 * the save had not happened and is dropped (its client never heard that it had).
 *  2. DATA/tmp is emptied.
 *  3. Rows whose folder is missing are deleted.
 *  4. Folders without a row are adopted from their checkpoint.json: our own crashes leave none, so
 * they come from a restored backup or a lost database. Folders that cannot be read are left alone.
 *  5. Sessions that were active are not any more.
 */
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "store/store_internal.h"
#include "util/log.h"
#include "util/mem.h"

struct key {
    char write_id[TB_WRITE_ID + 1];
    struct tb_tinker_path path;
    char tmp[64];
};

static int gather(struct tb_store *s, enum tb_sql q, struct key **out, size_t *n_out,
                  struct tb_error *err)
{
    sqlite3_stmt *st = tb_sql_get(s, q, err);
    if (!st) return err->code;
    bool pending = q == TB_SQL_ALL_PENDING;
    struct key *list = NULL;
    size_t n = 0, cap = 0;
    int rc;
    while ((rc = tb_sql_row(s, st, err)) == 1) {
        if (n == cap) list = tb_realloc(list, (cap = cap ? cap * 2 : 64) * sizeof(*list));
        struct key *k = &list[n++];
        memset(k, 0, sizeof(*k));
        int c = pending ? 1 : 0;
        const char *run = (const char *)sqlite3_column_text(st, c);
        const char *name = (const char *)sqlite3_column_text(st, c + 2);
        snprintf(k->path.run, sizeof(k->path.run), "%s", run ? run : "");
        k->path.kind = (enum tb_ckpt_kind)sqlite3_column_int(st, c + 1);
        snprintf(k->path.name, sizeof(k->path.name), "%s", name ? name : "");
        if (!pending) continue;
        const char *id = (const char *)sqlite3_column_text(st, 0);
        const char *tmp = (const char *)sqlite3_column_text(st, 4);
        snprintf(k->write_id, sizeof(k->write_id), "%s", id ? id : "");
        snprintf(k->tmp, sizeof(k->tmp), "%s", tmp ? tmp : "");
    }
    *out = list;
    *n_out = n;
    return rc;
}

static int adopt(struct tb_store *s, const struct tb_ckpt_row *row, struct tb_error *err)
{
    struct tb_run_row run = {.id = row->run_id,
                             .tenant = row->tenant,
                             .base_model = row->base_model,
                             .lora = row->lora,
                             .created_us = row->time_us,
                             .last_request_us = row->time_us};
    int rc = tb_ckpt_put_row(s, row, err);
    if (!rc) rc = tb_run_put(s, &run, true, err);
    return rc;
}

static int finish_pending(struct tb_store *s, const struct key *k, struct tb_error *err)
{
    struct tb_arena a = {0};
    struct tb_ckpt_row row;
    char id[TB_WRITE_ID + 1];
    char *final = tb_ckpt_path(s, k->path.run, k->path.kind, k->path.name);
    char *tmp = tb_asprintf("%s/tmp/%s", s->dir, k->tmp);
    int rc = 0;
    bool in_place = tb_is_dir(final);
    const char *dir = in_place ? final : tmp;
    bool ours = tb_ckpt_read_json(dir, &a, &row, id, NULL) == 0 && !strcmp(id, k->write_id);
    if (ours && !in_place) {
        if (rename(tmp, final)) {
            tb_log(TB_LOG_WARN, "store", "cannot finish the save of %s: %s", final,
                   strerror(errno));
            ours = false;
        }
    }
    if (ours) rc = adopt(s, &row, err);
    tb_free(tmp);
    tb_free(final);
    tb_arena_fini(&a);
    return rc;
}

static int finish_all_pending(struct tb_store *s, struct tb_error *err)
{
    struct key *list = NULL;
    size_t n = 0;
    int rc = gather(s, TB_SQL_ALL_PENDING, &list, &n, err);
    for (size_t i = 0; i < n && !rc; i++)
        rc = finish_pending(s, &list[i], err);
    if (!rc) rc = tb_sql_exec(s, "DELETE FROM pending", err);
    tb_free(list);
    return rc;
}

static void empty_tmp(struct tb_store *s)
{
    char *tmp = tb_path_join(s->dir, "tmp");
    DIR *d = opendir(tmp);
    if (d) {
        for (struct dirent *e; (e = readdir(d));) {
            if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
            char *p = tb_path_join(tmp, e->d_name);
            tb_remove_tree(p);
            tb_free(p);
        }
        closedir(d);
    }
    tb_free(tmp);
}

/* known receives every "run/kind/name" that has a row and a folder. */
static int drop_rows_without_folder(struct tb_store *s, struct tb_map *known, struct tb_error *err)
{
    struct key *list = NULL;
    size_t n = 0;
    int rc = gather(s, TB_SQL_ALL_CKPTS, &list, &n, err);
    for (size_t i = 0; i < n && !rc; i++) {
        const struct tb_tinker_path *p = &list[i].path;
        char *dir = tb_ckpt_path(s, p->run, p->kind, p->name);
        if (tb_is_dir(dir)) {
            tb_map_put(known, dir, strlen(dir), s);
        } else {
            tb_log(TB_LOG_WARN, "store", "checkpoint folder %s is gone: forgotten", dir);
            rc = tb_ckpt_delete_row(s, p->run, p->kind, p->name, err);
        }
        tb_free(dir);
    }
    tb_free(list);
    return rc;
}

static int adopt_folder(struct tb_store *s, const char *dir, const char *run,
                        enum tb_ckpt_kind kind, const char *name, struct tb_error *err)
{
    struct tb_arena a = {0};
    struct tb_ckpt_row row;
    struct tb_error why = {0};
    int rc = 0;
    if (tb_ckpt_read_json(dir, &a, &row, NULL, &why))
        tb_log(TB_LOG_WARN, "store", "unknown folder left alone: %s", why.msg);
    else if (strcmp(row.run_id, run) || row.kind != kind || strcmp(row.name, name))
        tb_log(TB_LOG_WARN, "store", "unknown folder left alone: %s describes %s", dir, row.path);
    else if ((rc = adopt(s, &row, err)) == 0)
        tb_log(TB_LOG_INFO, "store", "adopted checkpoint %s", row.path);
    tb_arena_fini(&a);
    return rc;
}

static int adopt_in(struct tb_store *s, const struct tb_map *known, const char *run,
                    enum tb_ckpt_kind kind, struct tb_error *err)
{
    char *dir = tb_asprintf("%s/checkpoints/%s/%s", s->dir, run, tb_ckpt_kind_dir(kind));
    int rc = 0;
    DIR *d = opendir(dir);
    if (d) {
        for (struct dirent *e; !rc && (e = readdir(d));) {
            if (tb_ckpt_name_check(e->d_name, NULL)) continue;
            char *p = tb_path_join(dir, e->d_name);
            if (!tb_map_get(known, p, strlen(p)) && tb_is_dir(p))
                rc = adopt_folder(s, p, run, kind, e->d_name, err);
            tb_free(p);
        }
        closedir(d);
    }
    tb_free(dir);
    return rc;
}

static int adopt_all(struct tb_store *s, const struct tb_map *known, struct tb_error *err)
{
    char *base = tb_path_join(s->dir, "checkpoints");
    int rc = 0;
    DIR *d = opendir(base);
    if (d) {
        for (struct dirent *e; !rc && (e = readdir(d));) {
            if (e->d_name[0] == '.') continue;
            for (unsigned k = 0; k < 3 && !rc; k++)
                rc = adopt_in(s, known, e->d_name, (enum tb_ckpt_kind)k, err);
        }
        closedir(d);
    } else {
        rc = tb_error_set(err, TB_EIO, "cannot read %s: %s", base, strerror(errno));
    }
    tb_free(base);
    return rc;
}

int tb_store_recover(struct tb_store *s, struct tb_error *err)
{
    struct tb_map known;
    tb_map_init(&known);
    int rc = tb_sql_exec(s, "BEGIN IMMEDIATE", err);
    if (!rc) rc = finish_all_pending(s, err);
    if (!rc) rc = drop_rows_without_folder(s, &known, err);
    if (!rc) rc = adopt_all(s, &known, err);
    if (!rc)
        rc = tb_sql_exec(s,
                         "UPDATE sessions SET status = 'cancelled', finish_detail = 'the server "
                         "stopped' WHERE status = 'active'",
                         err);
    if (!rc) rc = tb_sql_exec(s, "COMMIT", err);
    if (rc && !sqlite3_get_autocommit(s->db)) tb_sql_exec(s, "ROLLBACK", NULL);
    if (!rc) empty_tmp(s);
    tb_map_fini(&known);
    return rc;
}
