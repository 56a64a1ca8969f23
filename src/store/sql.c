/*
 * The database: schema, statements, and the few calls of SQLite that the store uses. Statements are
 * prepared at their first use and kept. Thread: whoever runs a job (see store_internal.h).
 */
#include <string.h>

#include "store/store_internal.h"
#include "util/mem.h"

/* Steps of the schema: a database of version n gets those from n on, a new one all. What has been
 * released is never changed; a new version is one step more. */
static const char *const steps[] = {
    "CREATE TABLE sessions(id TEXT PRIMARY KEY, tags TEXT, user_metadata TEXT, sdk_version TEXT,"
    " project_id TEXT, display_name TEXT, created_us INTEGER NOT NULL, last_seen_us INTEGER,"
    " status TEXT NOT NULL, finish_reason TEXT, finish_detail TEXT);"
    "CREATE INDEX sessions_time ON sessions(created_us);"
    "CREATE INDEX sessions_active ON sessions(status) WHERE status = 'active';"
    "CREATE TABLE runs(id TEXT PRIMARY KEY, session_id TEXT, base_model TEXT NOT NULL,"
    " rank INTEGER, alpha REAL, has_seed INTEGER, seed INTEGER, train_attn INTEGER,"
    " train_mlp INTEGER, train_unembed INTEGER, user_metadata TEXT, created_us INTEGER NOT NULL,"
    " last_request_us INTEGER, corrupted INTEGER NOT NULL DEFAULT 0);"
    "CREATE INDEX runs_time ON runs(created_us);"
    "CREATE INDEX runs_session ON runs(session_id, created_us);"
    "CREATE TABLE samplers(id TEXT PRIMARY KEY, session_id TEXT, base_model TEXT NOT NULL,"
    " model_path TEXT, created_us INTEGER NOT NULL);"
    "CREATE INDEX samplers_session ON samplers(session_id, created_us);"
    "CREATE TABLE checkpoints(run_id TEXT NOT NULL, kind INTEGER NOT NULL, name TEXT NOT NULL,"
    " base_model TEXT NOT NULL, rank INTEGER, alpha REAL, has_seed INTEGER, seed INTEGER,"
    " train_attn INTEGER, train_mlp INTEGER, train_unembed INTEGER, has_optimizer INTEGER,"
    " step INTEGER, time_us INTEGER NOT NULL, size_bytes INTEGER NOT NULL,"
    " expires_us INTEGER NOT NULL DEFAULT 0, public INTEGER NOT NULL DEFAULT 0,"
    " user_metadata TEXT, PRIMARY KEY(run_id, kind, name));"
    "CREATE INDEX ckpts_time ON checkpoints(time_us, expires_us);"
    "CREATE INDEX ckpts_run ON checkpoints(run_id, time_us, expires_us);"
    "CREATE INDEX ckpts_kind ON checkpoints(run_id, kind, time_us, expires_us);"
    "CREATE INDEX ckpts_expires ON checkpoints(expires_us) WHERE expires_us > 0;"
    /* folders about to be moved into place: recovery looks here first */
    "CREATE TABLE pending(write_id TEXT PRIMARY KEY, run_id TEXT, kind INTEGER, name TEXT,"
    " tmp TEXT);"
    "PRAGMA user_version = 1;",
    /* tenants: what was there belongs to the default one */
    "ALTER TABLE sessions ADD COLUMN tenant TEXT NOT NULL DEFAULT '" TB_TENANT_DEFAULT "';"
    "ALTER TABLE runs ADD COLUMN tenant TEXT NOT NULL DEFAULT '" TB_TENANT_DEFAULT "';"
    "ALTER TABLE samplers ADD COLUMN tenant TEXT NOT NULL DEFAULT '" TB_TENANT_DEFAULT "';"
    "ALTER TABLE checkpoints ADD COLUMN tenant TEXT NOT NULL DEFAULT '" TB_TENANT_DEFAULT "';"
    "DROP INDEX sessions_time; DROP INDEX runs_time; DROP INDEX ckpts_time;"
    "CREATE INDEX sessions_tenant ON sessions(tenant, created_us);"
    "CREATE INDEX runs_tenant ON runs(tenant, created_us);"
    "CREATE INDEX ckpts_tenant ON checkpoints(tenant, time_us, expires_us);"
    "PRAGMA user_version = 2;",
    /* copies go to a project without a session */
    "ALTER TABLE runs ADD COLUMN project_id TEXT; PRAGMA user_version = 3;",
};

#define LIVE "(expires_us = 0 OR expires_us > ?1)"
#define RUN_COLUMNS                                                                                \
    "id, session_id, base_model, rank, alpha, has_seed, seed, train_attn, train_mlp, "             \
    "train_unembed, user_metadata, created_us, last_request_us, corrupted, tenant, project_id"
#define SESSION_COLUMNS                                                                            \
    "id, tags, user_metadata, sdk_version, project_id, display_name, created_us, last_seen_us, "   \
    "status, finish_reason, finish_detail, tenant"
#define RUN_PROJECT                                                                                \
    "COALESCE(runs.project_id, (SELECT s.project_id FROM sessions s WHERE s.id = session_id), "    \
    "'default')"

static const char *const texts[TB_SQL_N] = {
    [TB_SQL_PUT_SESSION] = "INSERT OR REPLACE INTO sessions(" SESSION_COLUMNS
                           ") VALUES(?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12)",
    [TB_SQL_END_SESSION] =
        "UPDATE sessions SET status = ?2, finish_reason = ?3, finish_detail = ?4,"
        " last_seen_us = ?5 WHERE id = ?1 AND status = 'active'",
    [TB_SQL_SET_PROJECT] = "UPDATE sessions SET project_id = ?2 WHERE id = ?1 AND tenant = ?3",
    [TB_SQL_LIST_SESSIONS] = "SELECT " SESSION_COLUMNS " FROM sessions"
                             " WHERE tenant = ?3"
                             " ORDER BY created_us DESC, rowid DESC LIMIT ?1 OFFSET ?2",
    [TB_SQL_GET_SESSION] = "SELECT " SESSION_COLUMNS " FROM sessions"
                           " WHERE id = ?1 AND tenant = ?2",
    [TB_SQL_COUNT_SESSIONS] = "SELECT COUNT(*) FROM sessions WHERE tenant = ?1",
    [TB_SQL_SESSION_RUNS] = "SELECT id FROM runs WHERE session_id = ?1 ORDER BY created_us, rowid",
    [TB_SQL_SESSION_SAMPLERS] =
        "SELECT id FROM samplers WHERE session_id = ?1 ORDER BY created_us, rowid",
    [TB_SQL_SEARCH_SESSIONS] = "SELECT " SESSION_COLUMNS " FROM sessions"
                               " WHERE tenant = ?3 AND created_us <= ?1"
                               " AND (created_us < ?1 OR id < ?2)"
                               " ORDER BY created_us DESC, id DESC",
    [TB_SQL_SESSION_CKPTS] = "SELECT COUNT(*), COALESCE(SUM(c.size_bytes), 0) FROM runs r"
                             " JOIN checkpoints c ON c.run_id = r.id WHERE r.session_id = ?1",
    [TB_SQL_PUT_RUN] =
        "INSERT INTO runs(" RUN_COLUMNS ") VALUES(?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12,?13,?14,"
        "?15,?17)"
        " ON CONFLICT(id) DO UPDATE SET session_id = ?2, base_model = ?3, rank = ?4,"
        " alpha = ?5, has_seed = ?6, seed = ?7, train_attn = ?8, train_mlp = ?9,"
        " train_unembed = ?10, user_metadata = ?11, last_request_us = ?13,"
        " corrupted = ?14 WHERE ?16 = 0",
    [TB_SQL_TOUCH_RUN] =
        "UPDATE runs SET last_request_us = ?2 WHERE id = ?1 AND last_request_us < ?2",
    [TB_SQL_LIST_RUNS] = "SELECT " RUN_COLUMNS " FROM runs WHERE tenant = ?3"
                         " ORDER BY created_us DESC, rowid DESC LIMIT ?1 OFFSET ?2",
    [TB_SQL_LIST_PROJECT_RUNS] = "SELECT " RUN_COLUMNS " FROM runs WHERE tenant = ?3"
                                 " AND " RUN_PROJECT " = ?4"
                                 " ORDER BY created_us DESC, rowid DESC LIMIT ?1 OFFSET ?2",
    [TB_SQL_GET_RUN] = "SELECT " RUN_COLUMNS " FROM runs WHERE id = ?1 AND tenant = ?2",
    [TB_SQL_COUNT_RUNS] = "SELECT COUNT(*) FROM runs WHERE tenant = ?1",
    [TB_SQL_COUNT_PROJECT_RUNS] =
        "SELECT COUNT(*) FROM runs WHERE tenant = ?1 AND " RUN_PROJECT " = ?2",
    [TB_SQL_PUT_SAMPLER] = "INSERT OR REPLACE INTO samplers(id, session_id, base_model, model_path,"
                           " created_us, tenant) VALUES(?1,?2,?3,?4,?5,?6)",
    [TB_SQL_GET_SAMPLER] = "SELECT id, session_id, base_model, model_path, created_us FROM samplers"
                           " WHERE id = ?1 AND tenant = ?2",
    [TB_SQL_PUT_CKPT] = "INSERT INTO checkpoints(" TB_CKPT_COLUMNS
                        ") VALUES(?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12,?13,?14,?15,?16,?17,?18,"
                        "?19)"
                        " ON CONFLICT(run_id, kind, name) DO UPDATE SET base_model = ?4, rank = ?5,"
                        " alpha = ?6, has_seed = ?7, seed = ?8, train_attn = ?9, train_mlp = ?10,"
                        " train_unembed = ?11, has_optimizer = ?12, step = ?13, time_us = ?14,"
                        " size_bytes = ?15, expires_us = ?16, public = ?17, user_metadata = ?18,"
                        " tenant = ?19",
    [TB_SQL_GET_CKPT] = "SELECT " TB_CKPT_COLUMNS " FROM checkpoints"
                        " WHERE run_id = ?1 AND kind = ?2 AND name = ?3",
    [TB_SQL_LAST_CKPT] =
        "SELECT " TB_CKPT_COLUMNS " FROM checkpoints WHERE run_id = ?2 AND kind = ?3"
        " AND " LIVE " ORDER BY time_us DESC, expires_us DESC, rowid DESC LIMIT 1",
    [TB_SQL_LIST_CKPTS] = "SELECT " TB_CKPT_COLUMNS " FROM checkpoints"
                          " WHERE tenant = ?4 AND " LIVE
                          " ORDER BY time_us DESC, expires_us DESC, rowid DESC LIMIT ?2 OFFSET ?3",
    [TB_SQL_LIST_RUN_CKPTS] =
        "SELECT " TB_CKPT_COLUMNS " FROM checkpoints WHERE run_id = ?4 AND " LIVE
        " ORDER BY time_us DESC, expires_us DESC, rowid DESC LIMIT ?2 OFFSET ?3",
    /* both counts walk an index only */
    [TB_SQL_COUNT_CKPTS] = "SELECT COUNT(*) FROM checkpoints WHERE tenant = ?2 AND " LIVE,
    [TB_SQL_COUNT_RUN_CKPTS] = "SELECT COUNT(*) FROM checkpoints WHERE run_id = ?2 AND " LIVE,
    [TB_SQL_DELETE_CKPT] = "DELETE FROM checkpoints WHERE run_id = ?1 AND kind = ?2 AND name = ?3",
    [TB_SQL_PUBLISH_CKPT] =
        "UPDATE checkpoints SET public = ?4 WHERE run_id = ?1 AND kind = ?2 AND name = ?3",
    [TB_SQL_TTL_CKPT] =
        "UPDATE checkpoints SET expires_us = ?4 WHERE run_id = ?1 AND kind = ?2 AND name = ?3",
    [TB_SQL_EXPIRED_CKPTS] = "SELECT run_id, kind, name FROM checkpoints"
                             " WHERE expires_us > 0 AND expires_us <= ?1 LIMIT ?2",
    [TB_SQL_ALL_CKPTS] = "SELECT run_id, kind, name FROM checkpoints",
    [TB_SQL_PUT_PENDING] =
        "INSERT INTO pending(write_id, run_id, kind, name, tmp) VALUES(?1,?2,?3,?4,?5)",
    [TB_SQL_DELETE_PENDING] = "DELETE FROM pending WHERE write_id = ?1",
    [TB_SQL_ALL_PENDING] = "SELECT write_id, run_id, kind, name, tmp FROM pending",
};

int tb_sql_fail(struct tb_store *s, struct tb_error *err)
{
    int code = sqlite3_errcode(s->db) & 0xff;
    int tb = code == SQLITE_NOMEM                              ? TB_ENOMEM
             : code == SQLITE_CORRUPT || code == SQLITE_NOTADB ? TB_ECORRUPT
                                                               : TB_EIO;
    return tb_error_set(err, tb, "%s/tinkerbell.db: %s", s->dir, sqlite3_errmsg(s->db));
}

int tb_sql_exec(struct tb_store *s, const char *sql, struct tb_error *err)
{
    if (sqlite3_exec(s->db, sql, NULL, NULL, NULL) != SQLITE_OK) return tb_sql_fail(s, err);
    return 0;
}

sqlite3_stmt *tb_sql_get(struct tb_store *s, enum tb_sql q, struct tb_error *err)
{
    if (!s->stmts[q] && sqlite3_prepare_v3(s->db, texts[q], -1, SQLITE_PREPARE_PERSISTENT,
                                           &s->stmts[q], NULL) != SQLITE_OK) {
        tb_sql_fail(s, err);
        s->stmts[q] = NULL;
    }
    return s->stmts[q];
}

void tb_sql_reset(sqlite3_stmt *st)
{
    sqlite3_reset(st);
    sqlite3_clear_bindings(st);
}

int tb_sql_row(struct tb_store *s, sqlite3_stmt *st, struct tb_error *err)
{
    int rc = sqlite3_step(st);
    if (rc == SQLITE_ROW) return 1;
    rc = rc == SQLITE_DONE ? 0 : tb_sql_fail(s, err);
    tb_sql_reset(st);
    return rc;
}

int tb_sql_run(struct tb_store *s, sqlite3_stmt *st, struct tb_error *err)
{
    int rc = tb_sql_row(s, st, err);
    if (rc == 1) {
        tb_sql_reset(st);
        rc = 0;
    }
    return rc;
}

void tb_sql_text(sqlite3_stmt *st, int i, const char *v)
{
    if (v)
        sqlite3_bind_text(st, i, v, -1, SQLITE_STATIC);
    else
        sqlite3_bind_null(st, i);
}

const char *tb_sql_str(struct tb_arena *a, sqlite3_stmt *st, int col)
{
    const unsigned char *t = sqlite3_column_text(st, col);
    return t ? tb_arena_strndup(a, (const char *)t, (size_t)sqlite3_column_bytes(st, col)) : NULL;
}

static int user_version(struct tb_store *s, int *out, struct tb_error *err)
{
    sqlite3_stmt *st = NULL;
    if (sqlite3_prepare_v2(s->db, "PRAGMA user_version", -1, &st, NULL) != SQLITE_OK)
        return tb_sql_fail(s, err);
    int rc = sqlite3_step(st) == SQLITE_ROW ? 0 : tb_sql_fail(s, err);
    if (!rc) *out = sqlite3_column_int(st, 0);
    sqlite3_finalize(st);
    return rc;
}

int tb_sql_open(struct tb_store *s, struct tb_error *err)
{
    char *path = tb_path_join(s->dir, "tinkerbell.db");
    int flags = SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_NOMUTEX;
    int rc = sqlite3_open_v2(path, &s->db, flags, NULL);
    if (rc != SQLITE_OK) {
        rc = tb_error_set(err, TB_EIO, "cannot open %s: %s", path,
                          s->db ? sqlite3_errmsg(s->db) : "out of memory");
        tb_free(path);
        return rc;
    }
    tb_free(path);
    sqlite3_busy_timeout(s->db, 5000);
    /* a saved checkpoint is announced only when its row would survive a power cut, hence FULL */
    rc = tb_sql_exec(s,
                     "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;"
                     "PRAGMA temp_store = MEMORY; PRAGMA cache_size = -16384;",
                     err);
    int version = 0;
    if (!rc) rc = user_version(s, &version, err);
    if (rc) return rc;
    const int newest = (int)TB_ARRAY_LEN(steps);
    if (version > newest)
        return tb_error_set(err, TB_EINVAL,
                            "%s/tinkerbell.db has schema %d, newer than this program's %d", s->dir,
                            version, newest);
    if (version == newest) return 0;
    rc = tb_sql_exec(s, "BEGIN IMMEDIATE", err);
    while (!rc && version < newest)
        rc = tb_sql_exec(s, steps[version++], err);
    if (!rc) rc = tb_sql_exec(s, "COMMIT", err);
    if (rc && !sqlite3_get_autocommit(s->db)) tb_sql_exec(s, "ROLLBACK", NULL);
    return rc;
}

void tb_sql_close(struct tb_store *s)
{
    for (int i = 0; i < TB_SQL_N; i++) {
        sqlite3_finalize(s->stmts[i]);
        s->stmts[i] = NULL;
    }
    if (s->db) sqlite3_close(s->db);
    s->db = NULL;
}
