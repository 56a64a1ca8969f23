/*
 * Search of sessions, newest first: rows are read in their order from the cursor on, and filtered
 * here, as metadata is JSON. Pool threads; see store_internal.h.
 */
#include <jansson.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

#include "store/store_internal.h"
#include "util/mem.h"

/* Every word of `words` appears somewhere in the name, whatever the case. */
static bool name_matches(const char *name, const char *words)
{
    if (!name) return false;
    for (const char *w = words; *w;) {
        size_t skip = strspn(w, " \t\n"), n = strcspn(w + skip, " \t\n"), len = strlen(name);
        w += skip;
        if (n == 0) break;
        bool found = false;
        for (size_t i = 0; i + n <= len && !found; i++)
            found = strncasecmp(name + i, w, n) == 0;
        if (!found) return false;
        w += n;
    }
    return true;
}

static bool in_list(const char *s, const char *const *list, int32_t n)
{
    for (int32_t i = 0; i < n; i++)
        if (s && strcmp(s, list[i]) == 0) return true;
    return n == 0;
}

static bool has_metadata(const char *text, json_t *wanted)
{
    const char *key;
    json_t *v;
    if (json_object_size(wanted) == 0) return true;
    json_t *have = text ? json_loads(text, JSON_REJECT_DUPLICATES, NULL) : NULL;
    bool ok = json_is_object(have);
    json_object_foreach(wanted, key, v)
    {
        if (!ok) break;
        ok = json_equal(json_object_get(have, key), v);
    }
    json_decref(have);
    return ok;
}

static bool matches(const struct tb_session_row *r, const struct tb_session_query *q,
                    json_t *metadata)
{
    if (q->session_id || q->display_name) {
        bool by_id = q->session_id && strcmp(r->id, q->session_id) == 0;
        bool by_name = q->display_name && name_matches(r->display_name, q->display_name);
        if (!by_id && !by_name) return false;
    }
    char reason[128];
    snprintf(reason, sizeof(reason), "%s:%s", r->status, r->finish_reason ? r->finish_reason : "");
    return in_list(r->project_id ? r->project_id : "default", q->project_ids, q->n_project_ids) &&
           (in_list(r->status, q->statuses, q->n_statuses) ||
            in_list(reason, q->statuses, q->n_statuses)) &&
           has_metadata(r->user_metadata_json, metadata);
}

static int count_ckpts(struct tb_store *s, struct tb_session_summary *r, struct tb_error *err)
{
    sqlite3_stmt *st = tb_sql_get(s, TB_SQL_SESSION_CKPTS, err);
    if (!st) return err->code;
    tb_sql_text(st, 1, r->session.id);
    int rc = tb_sql_row(s, st, err);
    if (rc < 0) return rc;
    if (rc == 1) {
        r->n_ckpts = sqlite3_column_int64(st, 0);
        r->ckpt_bytes = sqlite3_column_int64(st, 1);
        tb_sql_reset(st);
    }
    return 0;
}

static void work_search(struct tb_store *s, struct tb_job *j)
{
    const struct tb_session_query *q = j->query;
    struct tb_session_search *out = &j->search;
    sqlite3_stmt *st = tb_sql_get(s, TB_SQL_SEARCH_SESSIONS, &j->err);
    if (!st) return;
    json_t *metadata =
        q->user_metadata_json ? json_loads(q->user_metadata_json, 0, NULL) : json_object();
    struct tb_session_summary *rows =
        tb_arena_calloc(&j->arena, (size_t)q->limit + 1, sizeof(*rows));
    sqlite3_bind_int64(st, 1, q->before_id ? q->before_us : INT64_MAX);
    tb_sql_text(st, 2, q->before_id ? q->before_id : "");
    tb_sql_text(st, 3, q->tenant);
    int rc;
    while ((rc = tb_sql_row(s, st, &j->err)) == 1) {
        struct tb_session_row r;
        tb_session_from_row(&j->arena, st, &r);
        if (!matches(&r, q, metadata)) continue;
        if (out->n == q->limit) {
            out->more = true;
            tb_sql_reset(st);
            rc = 0;
            break;
        }
        rows[out->n++].session = r;
    }
    for (int32_t i = 0; i < out->n && !rc; i++)
        rc = count_ckpts(s, &rows[i], &j->err);
    out->rows = rows;
    json_decref(metadata);
}

static void done_search(struct tb_job *j)
{
    j->cb.search(j->arg, &j->err, &j->search);
}

static const char *const *dup_list(struct tb_job *j, const char *const *list, int32_t n)
{
    const char **to = tb_arena_calloc(&j->arena, (size_t)n + 1, sizeof(*to));
    for (int32_t i = 0; i < n; i++)
        to[i] = tb_job_dup(j, list[i]);
    return to;
}

void tb_store_search_sessions(struct tb_store *s, const struct tb_session_query *q,
                              tb_store_search_cb cb, void *arg)
{
    struct tb_job *j = tb_job_create(work_search, done_search, true);
    struct tb_session_query *k = tb_arena_calloc(&j->arena, 1, sizeof(*k));
    *k = *q;
    k->tenant = tb_job_dup(j, q->tenant);
    k->session_id = tb_job_dup(j, q->session_id);
    k->display_name = tb_job_dup(j, q->display_name);
    k->user_metadata_json = tb_job_dup(j, q->user_metadata_json);
    k->before_id = tb_job_dup(j, q->before_id);
    k->project_ids = dup_list(j, q->project_ids, q->n_project_ids);
    k->statuses = dup_list(j, q->statuses, q->n_statuses);
    k->limit = TB_MIN(TB_MAX(q->limit, 1), 1000);
    j->query = k;
    j->cb.search = cb;
    j->arg = arg;
    tb_job_submit(s, j);
}
