/*
 * Rows of checkpoints: SQL only, no folders. On a pool thread, or on the loop's at open.
 */
#include <string.h>

#include "store/store_internal.h"
#include "util/clock.h"

bool tb_ckpt_expired(const struct tb_ckpt_row *row, int64_t now_us)
{
    return row->expires_us > 0 && row->expires_us <= now_us;
}

int64_t tb_ckpt_expiry(int64_t now_us, int64_t ttl_seconds)
{
    int64_t us;
    if (ttl_seconds <= 0 || __builtin_mul_overflow(ttl_seconds, 1000000, &us) ||
        __builtin_add_overflow(us, now_us, &us))
        return 0;
    return us;
}

void tb_ckpt_from_row(struct tb_arena *a, sqlite3_stmt *st, struct tb_ckpt_row *r)
{
    r->run_id = tb_sql_str(a, st, 0);
    r->kind = (enum tb_ckpt_kind)sqlite3_column_int(st, 1);
    r->name = tb_sql_str(a, st, 2);
    r->base_model = tb_sql_str(a, st, 3);
    tb_lora_from_row(st, 4, &r->lora);
    r->has_optimizer = sqlite3_column_int(st, 11) != 0;
    r->step = sqlite3_column_int64(st, 12);
    r->time_us = sqlite3_column_int64(st, 13);
    r->size_bytes = sqlite3_column_int64(st, 14);
    r->expires_us = sqlite3_column_int64(st, 15);
    r->is_public = sqlite3_column_int(st, 16) != 0;
    r->user_metadata_json = tb_sql_str(a, st, 17);
    r->tenant = tb_sql_str(a, st, 18);
    r->path =
        tb_arena_printf(a, "tinker://%s/%s/%s", r->run_id, tb_ckpt_kind_dir(r->kind), r->name);
}

int tb_ckpt_put_row(struct tb_store *s, const struct tb_ckpt_row *r, struct tb_error *err)
{
    sqlite3_stmt *st = tb_sql_get(s, TB_SQL_PUT_CKPT, err);
    if (!st) return err->code;
    tb_sql_text(st, 1, r->run_id);
    sqlite3_bind_int(st, 2, (int)r->kind);
    tb_sql_text(st, 3, r->name);
    tb_sql_text(st, 4, r->base_model);
    tb_lora_bind(st, 5, &r->lora);
    sqlite3_bind_int(st, 12, r->has_optimizer);
    sqlite3_bind_int64(st, 13, r->step);
    sqlite3_bind_int64(st, 14, r->time_us);
    sqlite3_bind_int64(st, 15, r->size_bytes);
    sqlite3_bind_int64(st, 16, r->expires_us);
    sqlite3_bind_int(st, 17, r->is_public);
    tb_sql_text(st, 18, r->user_metadata_json);
    tb_sql_text(st, 19, r->tenant);
    return tb_sql_run(s, st, err);
}

static void bind_key(sqlite3_stmt *st, const char *run, enum tb_ckpt_kind kind, const char *name)
{
    tb_sql_text(st, 1, run);
    sqlite3_bind_int(st, 2, (int)kind);
    tb_sql_text(st, 3, name);
}

int tb_ckpt_delete_row(struct tb_store *s, const char *run, enum tb_ckpt_kind kind,
                       const char *name, struct tb_error *err)
{
    sqlite3_stmt *st = tb_sql_get(s, TB_SQL_DELETE_CKPT, err);
    if (!st) return err->code;
    bind_key(st, run, kind, name);
    return tb_sql_run(s, st, err);
}

int tb_ckpt_find_row(struct tb_store *s, struct tb_arena *a, const struct tb_tinker_path *p,
                     struct tb_ckpt_row *out, bool *found, struct tb_error *err)
{
    *found = false;
    sqlite3_stmt *st = tb_sql_get(s, TB_SQL_GET_CKPT, err);
    if (!st) return err->code;
    bind_key(st, p->run, p->kind, p->name);
    int rc = tb_sql_row(s, st, err);
    if (rc < 0) return rc;
    if (rc == 1) {
        tb_ckpt_from_row(a, st, out);
        *found = true;
        tb_sql_reset(st);
    }
    return 0;
}

int tb_ckpt_find_live(struct tb_store *s, struct tb_arena *a, const struct tb_tinker_path *p,
                      const char *tenant, bool shared, struct tb_ckpt_row *out,
                      struct tb_error *err)
{
    bool found;
    int rc = tb_ckpt_find_row(s, a, p, out, &found, err);
    if (rc) return rc;
    if (found && !tb_ckpt_expired(out, tb_clock_wall_us()) &&
        (strcmp(out->tenant, tenant) == 0 || (shared && out->is_public)))
        return 0;
    return tb_error_set(err, TB_ENOTFOUND, "there is no checkpoint tinker://%s/%s/%s", p->run,
                        tb_ckpt_kind_dir(p->kind), p->name);
}
