/*
 * Rows of sessions, runs and samplers: put, get, list. Arguments are copied on the loop's thread,
 * SQL runs on a pool thread; see store_internal.h.
 */
#include <string.h>

#include "store/store_internal.h"
#include "util/clock.h"
#include "util/log.h"
#include "util/mem.h"

/* Rows gathered into an arena: a chunk that doubles; old chunks stay in the arena. */
static void *grow(struct tb_arena *a, void *rows, int32_t n, int32_t *cap, size_t size)
{
    if (n < *cap) return rows;
    int32_t c = *cap ? *cap * 2 : 16;
    void *p = tb_arena_calloc(a, (size_t)c, size);
    if (n > 0) memcpy(p, rows, (size_t)n * size);
    *cap = c;
    return p;
}

/* Fills the page's total; `project` NULL: of all. */
static int count(struct tb_store *s, struct tb_job *j, enum tb_sql q, const char *project,
                 struct tb_page *page)
{
    sqlite3_stmt *st = tb_sql_get(s, q, &j->err);
    if (!st) return j->err.code;
    tb_sql_text(st, 1, j->tenant);
    if (project) tb_sql_text(st, 2, project);
    int rc = tb_sql_row(s, st, &j->err);
    if (rc < 0) return rc;
    if (rc == 1) {
        page->total = sqlite3_column_int64(st, 0);
        tb_sql_reset(st);
    }
    return 0;
}

/* The statement of a list, for one page of the tenant's rows. */
static sqlite3_stmt *list_stmt(struct tb_store *s, struct tb_job *j, enum tb_sql q,
                               struct tb_page *page)
{
    sqlite3_stmt *st = tb_sql_get(s, q, &j->err);
    page->offset = j->offset;
    page->limit = j->limit;
    if (!st) return NULL;
    sqlite3_bind_int64(st, 1, j->limit);
    sqlite3_bind_int64(st, 2, j->offset);
    tb_sql_text(st, 3, j->tenant);
    return st;
}

/* The statement of one of the tenant's rows. */
static sqlite3_stmt *get_stmt(struct tb_store *s, struct tb_job *j, enum tb_sql q)
{
    sqlite3_stmt *st = tb_sql_get(s, q, &j->err);
    if (!st) return NULL;
    tb_sql_text(st, 1, j->id);
    tb_sql_text(st, 2, j->tenant);
    return st;
}

/* ---- sessions */

static void work_put_session(struct tb_store *s, struct tb_job *j)
{
    const struct tb_session_row *r = &j->session;
    sqlite3_stmt *st = tb_sql_get(s, TB_SQL_PUT_SESSION, &j->err);
    if (!st) return;
    tb_sql_text(st, 1, r->id);
    tb_sql_text(st, 2, r->tags_json);
    tb_sql_text(st, 3, r->user_metadata_json);
    tb_sql_text(st, 4, r->sdk_version);
    tb_sql_text(st, 5, r->project_id);
    tb_sql_text(st, 6, r->display_name);
    sqlite3_bind_int64(st, 7, r->created_us);
    sqlite3_bind_int64(st, 8, r->last_seen_us);
    tb_sql_text(st, 9, r->status ? r->status : "active");
    tb_sql_text(st, 10, r->finish_reason);
    tb_sql_text(st, 11, r->finish_detail);
    tb_sql_text(st, 12, r->tenant);
    tb_sql_run(s, st, &j->err);
}

void tb_store_put_session(struct tb_store *s, const struct tb_session_row *row)
{
    struct tb_job *j = tb_job_create(work_put_session, tb_job_done_plain, true);
    struct tb_session_row *r = &j->session;
    *r = *row;
    r->id = tb_job_dup(j, row->id);
    r->tenant = tb_job_dup(j, row->tenant);
    r->tags_json = tb_job_dup(j, row->tags_json ? row->tags_json : "[]");
    r->user_metadata_json = tb_job_dup(j, row->user_metadata_json ? row->user_metadata_json : "{}");
    r->sdk_version = tb_job_dup(j, row->sdk_version);
    r->project_id = tb_job_dup(j, row->project_id);
    r->display_name = tb_job_dup(j, row->display_name);
    r->status = tb_job_dup(j, row->status);
    r->finish_reason = tb_job_dup(j, row->finish_reason);
    r->finish_detail = tb_job_dup(j, row->finish_detail);
    tb_job_submit(s, j);
}

static void work_end_session(struct tb_store *s, struct tb_job *j)
{
    sqlite3_stmt *st = tb_sql_get(s, TB_SQL_END_SESSION, &j->err);
    if (!st) return;
    tb_sql_text(st, 1, j->id);
    for (int i = 0; i < 3; i++)
        tb_sql_text(st, 2 + i, j->text[i]);
    sqlite3_bind_int64(st, 5, j->number);
    tb_sql_run(s, st, &j->err);
}

void tb_store_end_session(struct tb_store *s, const char *id, const char *status,
                          const char *reason, const char *detail)
{
    struct tb_job *j = tb_job_create(work_end_session, tb_job_done_plain, true);
    j->id = tb_job_dup(j, id);
    j->text[0] = tb_job_dup(j, status);
    j->text[1] = tb_job_dup(j, reason);
    j->text[2] = tb_job_dup(j, detail);
    j->number = tb_clock_wall_us();
    tb_job_submit(s, j);
}

static void work_set_project(struct tb_store *s, struct tb_job *j)
{
    sqlite3_stmt *st = tb_sql_get(s, TB_SQL_SET_PROJECT, &j->err);
    if (!st) return;
    tb_sql_text(st, 1, j->id);
    tb_sql_text(st, 2, j->text[0]);
    tb_sql_text(st, 3, j->tenant);
    if (tb_sql_run(s, st, &j->err) == 0 && sqlite3_changes(s->db) == 0)
        tb_error_set(&j->err, TB_ENOTFOUND, "there is no session '%s'", j->id);
}

void tb_store_set_session_project(struct tb_store *s, const char *tenant, const char *id,
                                  const char *project, tb_store_done_cb cb, void *arg)
{
    struct tb_job *j = tb_job_of(tenant, id, work_set_project, tb_job_done_plain);
    j->text[0] = tb_job_dup(j, project);
    j->cb.done = cb;
    j->arg = arg;
    tb_job_submit(s, j);
}

void tb_session_from_row(struct tb_arena *a, sqlite3_stmt *st, struct tb_session_row *r)
{
    r->id = tb_sql_str(a, st, 0);
    r->tags_json = tb_sql_str(a, st, 1);
    r->user_metadata_json = tb_sql_str(a, st, 2);
    r->sdk_version = tb_sql_str(a, st, 3);
    r->project_id = tb_sql_str(a, st, 4);
    r->display_name = tb_sql_str(a, st, 5);
    r->created_us = sqlite3_column_int64(st, 6);
    r->last_seen_us = sqlite3_column_int64(st, 7);
    r->status = tb_sql_str(a, st, 8);
    r->finish_reason = tb_sql_str(a, st, 9);
    r->finish_detail = tb_sql_str(a, st, 10);
    r->tenant = tb_sql_str(a, st, 11);
}

static int gather_sessions(struct tb_store *s, struct tb_job *j, sqlite3_stmt *st)
{
    struct tb_session_row *rows = NULL;
    int32_t n = 0, cap = 0;
    int rc;
    while ((rc = tb_sql_row(s, st, &j->err)) == 1) {
        rows = grow(&j->arena, rows, n, &cap, sizeof(*rows));
        tb_session_from_row(&j->arena, st, &rows[n++]);
    }
    j->sessions.rows = rows;
    j->sessions.n = n;
    return rc;
}

static void done_sessions(struct tb_job *j)
{
    j->cb.sessions(j->arg, &j->err, &j->sessions);
}

static void work_list_sessions(struct tb_store *s, struct tb_job *j)
{
    struct tb_page *p = &j->sessions.page;
    sqlite3_stmt *st = list_stmt(s, j, TB_SQL_LIST_SESSIONS, p);
    if (st && gather_sessions(s, j, st) == 0) count(s, j, TB_SQL_COUNT_SESSIONS, NULL, p);
}

void tb_store_list_sessions(struct tb_store *s, const char *tenant, int64_t offset, int64_t limit,
                            tb_store_sessions_cb cb, void *arg)
{
    struct tb_job *j = tb_job_of(tenant, NULL, work_list_sessions, done_sessions);
    j->offset = TB_MAX(offset, 0);
    j->limit = TB_MAX(limit, 0);
    j->cb.sessions = cb;
    j->arg = arg;
    tb_job_submit(s, j);
}

static int gather_ids(struct tb_store *s, struct tb_job *j, enum tb_sql q, int32_t *n,
                      const char *const **out)
{
    sqlite3_stmt *st = tb_sql_get(s, q, &j->err);
    if (!st) return j->err.code;
    tb_sql_text(st, 1, j->id);
    const char **ids = NULL;
    int32_t cap = 0;
    int rc;
    while ((rc = tb_sql_row(s, st, &j->err)) == 1) {
        ids = grow(&j->arena, ids, *n, &cap, sizeof(*ids));
        ids[(*n)++] = tb_sql_str(&j->arena, st, 0);
    }
    *out = ids;
    return rc;
}

static void work_get_session(struct tb_store *s, struct tb_job *j)
{
    struct tb_session_list *l = &j->sessions;
    l->page = (struct tb_page){0, 1, 0};
    sqlite3_stmt *st = get_stmt(s, j, TB_SQL_GET_SESSION);
    if (!st || gather_sessions(s, j, st)) return;
    l->page.total = l->n;
    if (l->n == 0) {
        tb_error_set(&j->err, TB_ENOTFOUND, "there is no session '%s'", j->id);
        return;
    }
    if (gather_ids(s, j, TB_SQL_SESSION_RUNS, &l->n_runs, &l->run_ids)) return;
    gather_ids(s, j, TB_SQL_SESSION_SAMPLERS, &l->n_samplers, &l->sampler_ids);
}

void tb_store_get_session(struct tb_store *s, const char *tenant, const char *id,
                          tb_store_sessions_cb cb, void *arg)
{
    struct tb_job *j = tb_job_of(tenant, id, work_get_session, done_sessions);
    j->cb.sessions = cb;
    j->arg = arg;
    tb_job_submit(s, j);
}

/* ---- runs */

void tb_lora_from_row(sqlite3_stmt *st, int col, struct tb_lora_config *out)
{
    out->rank = sqlite3_column_int(st, col);
    out->alpha = (float)sqlite3_column_double(st, col + 1);
    out->has_seed = sqlite3_column_int(st, col + 2) != 0;
    out->seed = (uint64_t)sqlite3_column_int64(st, col + 3);
    out->train_attn = sqlite3_column_int(st, col + 4) != 0;
    out->train_mlp = sqlite3_column_int(st, col + 5) != 0;
    out->train_unembed = sqlite3_column_int(st, col + 6) != 0;
}

void tb_lora_bind(sqlite3_stmt *st, int i, const struct tb_lora_config *l)
{
    sqlite3_bind_int(st, i, l->rank);
    sqlite3_bind_double(st, i + 1, (double)l->alpha);
    sqlite3_bind_int(st, i + 2, l->has_seed);
    sqlite3_bind_int64(st, i + 3, (int64_t)l->seed);
    sqlite3_bind_int(st, i + 4, l->train_attn);
    sqlite3_bind_int(st, i + 5, l->train_mlp);
    sqlite3_bind_int(st, i + 6, l->train_unembed);
}

int tb_run_put(struct tb_store *s, const struct tb_run_row *r, bool only_new, struct tb_error *err)
{
    sqlite3_stmt *st = tb_sql_get(s, TB_SQL_PUT_RUN, err);
    if (!st) return err->code;
    tb_sql_text(st, 1, r->id);
    tb_sql_text(st, 2, r->session_id);
    tb_sql_text(st, 3, r->base_model);
    tb_lora_bind(st, 4, &r->lora);
    tb_sql_text(st, 11, r->user_metadata_json);
    sqlite3_bind_int64(st, 12, r->created_us);
    sqlite3_bind_int64(st, 13, r->last_request_us);
    sqlite3_bind_int(st, 14, r->corrupted);
    tb_sql_text(st, 15, r->tenant);
    sqlite3_bind_int(st, 16, only_new);
    tb_sql_text(st, 17, r->project_id);
    return tb_sql_run(s, st, err);
}

static void work_put_run(struct tb_store *s, struct tb_job *j)
{
    tb_run_put(s, &j->run, false, &j->err);
}

void tb_store_put_run(struct tb_store *s, const struct tb_run_row *row)
{
    struct tb_job *j = tb_job_create(work_put_run, tb_job_done_plain, true);
    j->run = *row;
    j->run.id = tb_job_dup(j, row->id);
    j->run.tenant = tb_job_dup(j, row->tenant);
    j->run.session_id = tb_job_dup(j, row->session_id);
    j->run.project_id = tb_job_dup(j, row->project_id);
    j->run.base_model = tb_job_dup(j, row->base_model);
    j->run.user_metadata_json = tb_job_dup(j, row->user_metadata_json);
    tb_job_submit(s, j);
}

static void run_from_row(struct tb_arena *a, sqlite3_stmt *st, struct tb_run_row *r)
{
    r->id = tb_sql_str(a, st, 0);
    r->session_id = tb_sql_str(a, st, 1);
    r->base_model = tb_sql_str(a, st, 2);
    tb_lora_from_row(st, 3, &r->lora);
    r->user_metadata_json = tb_sql_str(a, st, 10);
    r->created_us = sqlite3_column_int64(st, 11);
    r->last_request_us = sqlite3_column_int64(st, 12);
    r->corrupted = sqlite3_column_int(st, 13) != 0;
    r->tenant = tb_sql_str(a, st, 14);
    r->project_id = tb_sql_str(a, st, 15);
}

static int last_ckpt(struct tb_store *s, struct tb_job *j, const char *run, enum tb_ckpt_kind kind,
                     const struct tb_ckpt_row **out)
{
    sqlite3_stmt *st = tb_sql_get(s, TB_SQL_LAST_CKPT, &j->err);
    if (!st) return j->err.code;
    sqlite3_bind_int64(st, 1, j->number);
    tb_sql_text(st, 2, run);
    sqlite3_bind_int(st, 3, (int)kind);
    int rc = tb_sql_row(s, st, &j->err);
    if (rc == 1) {
        struct tb_ckpt_row *r = tb_arena_calloc(&j->arena, 1, sizeof(*r));
        tb_ckpt_from_row(&j->arena, st, r);
        *out = r;
        tb_sql_reset(st);
        rc = 0;
    }
    return rc;
}

static int gather_runs(struct tb_store *s, struct tb_job *j, sqlite3_stmt *st)
{
    struct tb_run_row *rows = NULL;
    int32_t n = 0, cap = 0;
    int rc;
    while ((rc = tb_sql_row(s, st, &j->err)) == 1) {
        rows = grow(&j->arena, rows, n, &cap, sizeof(*rows));
        run_from_row(&j->arena, st, &rows[n++]);
    }
    if (rc) return rc;
    const struct tb_ckpt_row **a = tb_arena_calloc(&j->arena, (size_t)n + 1, sizeof(*a));
    const struct tb_ckpt_row **b = tb_arena_calloc(&j->arena, (size_t)n + 1, sizeof(*b));
    j->number = tb_clock_wall_us();
    for (int32_t i = 0; i < n && !rc; i++) {
        rc = last_ckpt(s, j, rows[i].id, TB_CKPT_TRAINING, &a[i]);
        if (!rc) rc = last_ckpt(s, j, rows[i].id, TB_CKPT_SAMPLER, &b[i]);
    }
    if (rc) return rc;
    j->runs.rows = rows;
    j->runs.last_ckpt = a;
    j->runs.last_sampler = b;
    j->runs.n = n;
    return 0;
}

static void done_runs(struct tb_job *j)
{
    j->cb.runs(j->arg, &j->err, &j->runs);
}

static void work_list_runs(struct tb_store *s, struct tb_job *j)
{
    struct tb_page *p = &j->runs.page;
    const char *project = j->text[0];
    sqlite3_stmt *st = list_stmt(s, j, project ? TB_SQL_LIST_PROJECT_RUNS : TB_SQL_LIST_RUNS, p);
    if (!st) return;
    if (project) tb_sql_text(st, 4, project);
    if (gather_runs(s, j, st) == 0)
        count(s, j, project ? TB_SQL_COUNT_PROJECT_RUNS : TB_SQL_COUNT_RUNS, project, p);
}

void tb_store_list_runs(struct tb_store *s, const char *tenant, const char *project, int64_t offset,
                        int64_t limit, tb_store_runs_cb cb, void *arg)
{
    struct tb_job *j = tb_job_of(tenant, NULL, work_list_runs, done_runs);
    j->text[0] = tb_job_dup(j, project);
    j->offset = TB_MAX(offset, 0);
    j->limit = TB_MAX(limit, 0);
    j->cb.runs = cb;
    j->arg = arg;
    tb_job_submit(s, j);
}

static void work_get_run(struct tb_store *s, struct tb_job *j)
{
    j->runs.page = (struct tb_page){0, 1, 0};
    sqlite3_stmt *st = get_stmt(s, j, TB_SQL_GET_RUN);
    if (!st || gather_runs(s, j, st)) return;
    j->runs.page.total = j->runs.n;
    if (j->runs.n == 0) tb_error_set(&j->err, TB_ENOTFOUND, "there is no training run '%s'", j->id);
}

void tb_store_get_run(struct tb_store *s, const char *tenant, const char *id, tb_store_runs_cb cb,
                      void *arg)
{
    struct tb_job *j = tb_job_of(tenant, id, work_get_run, done_runs);
    j->cb.runs = cb;
    j->arg = arg;
    tb_job_submit(s, j);
}

/* ---- samplers */

static void work_put_sampler(struct tb_store *s, struct tb_job *j)
{
    const struct tb_sampler_row *r = &j->sampler;
    sqlite3_stmt *st = tb_sql_get(s, TB_SQL_PUT_SAMPLER, &j->err);
    if (!st) return;
    tb_sql_text(st, 1, r->id);
    tb_sql_text(st, 2, r->session_id);
    tb_sql_text(st, 3, r->base_model);
    tb_sql_text(st, 4, r->model_path);
    sqlite3_bind_int64(st, 5, r->created_us);
    tb_sql_text(st, 6, r->tenant);
    tb_sql_run(s, st, &j->err);
}

void tb_store_put_sampler(struct tb_store *s, const struct tb_sampler_row *row)
{
    struct tb_job *j = tb_job_create(work_put_sampler, tb_job_done_plain, true);
    j->sampler.id = tb_job_dup(j, row->id);
    j->sampler.tenant = tb_job_dup(j, row->tenant);
    j->sampler.session_id = tb_job_dup(j, row->session_id);
    j->sampler.base_model = tb_job_dup(j, row->base_model);
    j->sampler.model_path = tb_job_dup(j, row->model_path);
    j->sampler.created_us = row->created_us;
    tb_job_submit(s, j);
}

static void work_get_sampler(struct tb_store *s, struct tb_job *j)
{
    sqlite3_stmt *st = get_stmt(s, j, TB_SQL_GET_SAMPLER);
    if (!st) return;
    int rc = tb_sql_row(s, st, &j->err);
    if (rc < 0) return;
    if (rc == 0) {
        tb_error_set(&j->err, TB_ENOTFOUND, "there is no sampling session '%s'", j->id);
        return;
    }
    struct tb_sampler_row *r = &j->sampler;
    r->id = tb_sql_str(&j->arena, st, 0);
    r->session_id = tb_sql_str(&j->arena, st, 1);
    r->base_model = tb_sql_str(&j->arena, st, 2);
    r->model_path = tb_sql_str(&j->arena, st, 3);
    r->created_us = sqlite3_column_int64(st, 4);
    r->tenant = j->tenant;
    tb_sql_reset(st);
    j->found = true;
}

static void done_sampler(struct tb_job *j)
{
    j->cb.sampler(j->arg, &j->err, j->found ? &j->sampler : NULL);
}

void tb_store_get_sampler(struct tb_store *s, const char *tenant, const char *id,
                          tb_store_sampler_cb cb, void *arg)
{
    struct tb_job *j = tb_job_of(tenant, id, work_get_sampler, done_sampler);
    j->cb.sampler = cb;
    j->arg = arg;
    tb_job_submit(s, j);
}
