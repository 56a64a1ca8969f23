/*
 * sessions/search. The owner is a tenant, and sessions without a project are in "default".
 * Thread: the loop's.
 */
#include <string.h>
#include <time.h>

#include "api/tinker/tinker.h"

static bool digits(const char **p, int n, int *out)
{
    *out = 0;
    for (int i = 0; i < n; i++, (*p)++) {
        if (**p < '0' || **p > '9') return false;
        *out = *out * 10 + (**p - '0');
    }
    return true;
}

/* "2026-01-02T03:04:05.678901Z", with any number of decimals; also "+00:00" at the end, as Python
 * may write it. */
static bool parse_time(const char *p, int64_t *us)
{
    int year, month, day, h, min, sec;
    if (!digits(&p, 4, &year) || *p++ != '-' || !digits(&p, 2, &month) || *p++ != '-' ||
        !digits(&p, 2, &day) || *p++ != 'T' || !digits(&p, 2, &h) || *p++ != ':' ||
        !digits(&p, 2, &min) || *p++ != ':' || !digits(&p, 2, &sec))
        return false;
    int64_t fraction = 0, unit = 100000;
    if (*p == '.') {
        for (p++; *p >= '0' && *p <= '9'; p++, unit /= 10)
            fraction += (*p - '0') * unit;
    }
    if (strcmp(p, "Z") != 0 && strcmp(p, "+00:00") != 0) return false;
    struct tm t = {.tm_year = year - 1900,
                   .tm_mon = month - 1,
                   .tm_mday = day,
                   .tm_hour = h,
                   .tm_min = min,
                   .tm_sec = sec};
    *us = (int64_t)timegm(&t) * 1000000 + fraction;
    return true;
}

static int strings(const struct tb_json *root, const char *key, struct tb_arena *a,
                   const char *const **out, int32_t *n, struct tb_error *e)
{
    struct tb_json list, v;
    int rc = tb_json_array(root, key, false, &list, e);
    if (rc || !list.v) return rc;
    *n = (int32_t)tb_json_len(&list);
    const char **to = tb_arena_calloc(a, (size_t)*n + 1, sizeof(*to));
    for (int32_t i = 0; i < *n && !rc; i++) {
        tb_json_at(&list, (size_t)i, &v);
        rc = tb_json_as_string(&v, a, TB_MAX_ID, &to[i], e);
    }
    *out = to;
    return rc;
}

/* {"type": T, "reasons": [R]} as "T", or as "T:R" for every R. */
static int statuses(const struct tb_json *root, struct tb_arena *a, struct tb_session_query *q,
                    struct tb_error *e)
{
    enum { MAX = 64 };
    struct tb_json list, v, r;
    int rc = tb_json_array(root, "statuses", false, &list, e);
    if (rc || !list.v) return rc;
    const char **to = tb_arena_calloc(a, MAX, sizeof(*to)), *type, *reason;
    for (size_t i = 0; i < tb_json_len(&list) && !rc; i++) {
        tb_json_at(&list, i, &v);
        struct tb_json reasons = {0};
        rc = tb_json_string(&v, "type", true, a, 64, &type, e);
        if (!rc) rc = tb_json_array(&v, "reasons", false, &reasons, e);
        size_t n = !rc && reasons.v ? tb_json_len(&reasons) : 0;
        if (!rc && (size_t)q->n_statuses + n + 1 > MAX)
            rc = tb_json_fail(&list, e, TB_EINVAL, "more than %d statuses", MAX);
        if (!rc && n == 0) to[q->n_statuses++] = type;
        for (size_t k = 0; k < n && !rc; k++) {
            tb_json_at(&reasons, k, &r);
            if (tb_json_is_string(&r))
                rc = tb_json_as_string(&r, a, 64, &reason, e);
            else
                rc = tb_json_string(&r, "type", true, a, 64, &reason, e);
            if (!rc) to[q->n_statuses++] = tb_arena_printf(a, "%s:%s", type, reason);
        }
    }
    q->statuses = to;
    return rc;
}

static int cursor(const struct tb_json *root, struct tb_arena *a, struct tb_session_query *q,
                  struct tb_error *e)
{
    struct tb_json c;
    const char *at;
    int rc = tb_json_object(root, "cursor", false, &c, e);
    if (rc || !c.v) return rc;
    rc = tb_json_string(&c, "last_created_at", true, a, 64, &at, e);
    if (!rc) rc = tb_json_id(&c, "last_session_id", true, a, &q->before_id, e);
    if (!rc && !parse_time(at, &q->before_us))
        rc = tb_json_fail(&c, e, TB_EINVAL, "last_created_at is not a time in UTC");
    return rc;
}

/* Other people's sessions are nobody's business. */
static int owner(const struct tb_json *root, struct tb_arena *a, const char *us, bool *ours,
                 struct tb_error *e)
{
    struct tb_json o;
    const char *type = "own";
    const char *const *urns = NULL;
    int32_t n = 0;
    int rc = tb_json_object(root, "owner", false, &o, e);
    if (!rc && o.v) rc = tb_json_string(&o, "type", true, a, 64, &type, e);
    if (!rc && o.v) rc = strings(&o, "owner_urns", a, &urns, &n, e);
    *ours = strcmp(type, "user") != 0;
    for (int32_t i = 0; i < n && !rc; i++)
        *ours |= strcmp(urns[i], us) == 0;
    return rc;
}

static void put_status(struct tb_json_out *j, const struct tb_session_row *r)
{
    tb_jout_object(j, "status");
    tb_jout_str(j, "type", r->status);
    if (strcmp(r->status, "client_finished") == 0) {
        tb_jout_object(j, "reason");
        tb_jout_str(j, "type", r->finish_reason ? r->finish_reason : "success");
        tb_jout_object_end(j);
    }
    if (r->finish_detail) tb_jout_str(j, "detail", r->finish_detail);
    tb_jout_object_end(j);
}

static void on_found(void *arg, const struct tb_error *err, const struct tb_session_search *l)
{
    struct tb_buf b;
    struct tb_json_out j;
    struct tb_http_request *req = tb_tinker_call_answer(arg, err, &b, &j);
    if (!req) return;
    tb_jout_array(&j, "sessions");
    for (int32_t i = 0; i < l->n; i++) {
        const struct tb_session_row *r = &l->rows[i].session;
        tb_jout_object(&j, NULL);
        tb_jout_str(&j, "session_id", r->id);
        tb_tinker_put_time(&j, "created_at", r->created_us);
        tb_jout_str(&j, "owner", r->tenant);
        tb_jout_str(&j, "project_id", r->project_id ? r->project_id : "default");
        put_status(&j, r);
        tb_jout_int(&j, "checkpoints_count", l->rows[i].n_ckpts);
        tb_jout_int(&j, "checkpoint_storage_bytes", l->rows[i].ckpt_bytes);
        if (r->display_name) tb_jout_str(&j, "display_name", r->display_name);
        tb_tinker_put_metadata(&j, r->user_metadata_json);
        tb_jout_object_end(&j);
    }
    tb_jout_array_end(&j);
    if (l->more) {
        const struct tb_session_row *last = &l->rows[l->n - 1].session;
        tb_jout_object(&j, "next_cursor");
        tb_tinker_put_time(&j, "last_created_at", last->created_us);
        tb_jout_str(&j, "last_session_id", last->id);
        tb_jout_object_end(&j);
    }
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}

void tb_tinker_search_sessions(struct tb_api *a, struct tb_http_request *req,
                               const struct tb_route_match *m)
{
    struct tb_json_doc doc;
    struct tb_error e = {0};
    struct tb_session_query q = {.tenant = tb_api_tenant(req)};
    int64_t limit = 50;
    bool ours = true;
    (void)m;
    if (tb_api_body(a, req, true, &doc)) return;
    const struct tb_json *root = &doc.root;
    struct tb_arena *ar = &req->arena;
    int rc = tb_json_id(root, "session_id", false, ar, &q.session_id, &e);
    if (!rc) rc = tb_json_string(root, "display_name", false, ar, 1024, &q.display_name, &e);
    if (!rc) rc = strings(root, "project_ids", ar, &q.project_ids, &q.n_project_ids, &e);
    if (!rc) rc = tb_json_metadata(root, "user_metadata", true, ar, &q.user_metadata_json, &e);
    if (!rc) rc = owner(root, ar, q.tenant, &ours, &e);
    if (!rc) rc = statuses(root, ar, &q, &e);
    if (!rc) rc = cursor(root, ar, &q, &e);
    if (!rc) rc = tb_json_int(root, "limit", false, 1, 200, &limit, &e);
    tb_json_free(&doc);
    q.limit = (int32_t)limit;
    if (rc) {
        tb_api_error(req, &e);
    } else if (!ours) {
        static const char none[] = "{\"sessions\":[]}";
        tb_http_respond(req, 200, "application/json", none, sizeof(none) - 1, NULL, 0);
    } else {
        tb_store_search_sessions(tb_core_store(tb_api_core(a)), &q, on_found,
                                 tb_tinker_call(a, req));
    }
}
