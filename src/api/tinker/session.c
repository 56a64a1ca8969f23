/* Sessions: creation, heartbeat, finish, project, and what the store lists of them. */
#include <string.h>

#include "api/tinker/tinker.h"

void tb_tinker_create_session(struct tb_api *a, struct tb_http_request *req,
                              const struct tb_route_match *m)
{
    struct tb_json_doc doc;
    struct tb_error e = {0};
    struct tb_session_params p = {.idempotency_key = tb_api_idempotency_key(req)};
    struct tb_json tags, t;
    const char *ignored = NULL, *id = NULL;
    (void)m;
    if (tb_api_body(a, req, false, &doc)) return;
    const struct tb_json *root = &doc.root;
    struct tb_arena *ar = &req->arena;
    int rc = tb_json_array(root, "tags", false, &tags, &e);
    for (size_t i = 0; rc == 0 && i < tb_json_len(&tags); i++) {
        tb_json_at(&tags, i, &t);
        rc = tb_json_as_string(&t, ar, TB_MAX_ID, &ignored, &e);
    }
    if (rc == 0 && tags.v) rc = tb_json_as_text(&tags, ar, TB_MAX_METADATA, &p.tags_json, &e);
    if (rc == 0) rc = tb_json_metadata(root, "user_metadata", false, ar, &p.user_metadata_json, &e);
    if (rc == 0) rc = tb_json_string(root, "sdk_version", false, ar, TB_MAX_ID, &p.sdk_version, &e);
    if (rc == 0) rc = tb_json_string(root, "project_id", false, ar, TB_MAX_ID, &p.project_id, &e);
    if (rc == 0) rc = tb_json_string(root, "display_name", false, ar, 1024, &p.display_name, &e);
    if (rc == 0) rc = tb_tinker_check_type(root, "create_session", &e);
    tb_json_free(&doc);
    if (rc == 0) rc = tb_core_create_session(tb_api_core(a), tb_api_who(req), &p, &id, &e);
    if (rc) {
        tb_api_error(req, &e);
        return;
    }
    struct tb_buf b;
    struct tb_json_out j;
    tb_api_answer_begin(&b, &j);
    tb_jout_str(&j, "session_id", id);
    tb_jout_str(&j, "type", "create_session");
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}

void tb_tinker_heartbeat(struct tb_api *a, struct tb_http_request *req,
                         const struct tb_route_match *m)
{
    static const char beat[] = "{\"type\":\"session_heartbeat\"}";
    struct tb_error e = {0};
    const char *id = tb_tinker_body_id(a, req, "session_id", "session_heartbeat");
    (void)m;
    if (!id) return;
    if (tb_core_heartbeat(tb_api_core(a), tb_api_who(req), id, &e))
        tb_api_error(req, &e);
    else
        tb_http_respond(req, 200, "application/json", beat, sizeof(beat) - 1, NULL, 0);
}

void tb_tinker_finish_session(struct tb_api *a, struct tb_http_request *req,
                              const struct tb_route_match *m)
{
    struct tb_json_doc doc;
    struct tb_error e = {0};
    struct tb_json reason;
    const char *type = "success", *detail = NULL;
    if (tb_api_body(a, req, true, &doc)) return;
    int rc = tb_json_object(&doc.root, "reason", false, &reason, &e);
    if (rc == 0 && reason.v) rc = tb_json_string(&reason, "type", true, &req->arena, 64, &type, &e);
    if (rc == 0 && strcmp(type, "success") != 0 && strcmp(type, "errored") != 0 &&
        strcmp(type, "interrupted") != 0)
        rc = tb_json_fail(&reason, &e, TB_EINVAL,
                          "type \"%s\" is not \"success\", \"errored\" or \"interrupted\"", type);
    if (rc == 0)
        rc = tb_json_string(&doc.root, "detail", false, &req->arena, TB_MAX_METADATA, &detail, &e);
    tb_json_free(&doc);
    if (rc == 0)
        rc = tb_core_finish_session(tb_api_core(a), tb_api_who(req), tb_api_text(req, m->params[0]),
                                    type, detail, &e);
    if (rc)
        tb_api_error(req, &e);
    else
        tb_api_answer_empty(req);
}

/* ---- through the store */

void tb_tinker_session_project(struct tb_api *a, struct tb_http_request *req,
                               const struct tb_route_match *m)
{
    const char *project = tb_tinker_body_id(a, req, "project_id", NULL);
    if (!project) return;
    tb_store_set_session_project(tb_core_store(tb_api_core(a)), tb_api_tenant(req),
                                 tb_api_text(req, m->params[0]), project, tb_tinker_on_store_done,
                                 tb_tinker_call(a, req));
}

static void on_sessions(void *arg, const struct tb_error *err, const struct tb_session_list *l)
{
    struct tb_buf b;
    struct tb_json_out j;
    struct tb_http_request *req = tb_tinker_call_answer(arg, err, &b, &j);
    if (!req) return;
    tb_jout_array(&j, "sessions");
    for (int32_t i = 0; i < l->n; i++)
        tb_jout_str(&j, NULL, l->rows[i].id);
    tb_tinker_list_end(req, &b, &j, &l->page);
}

void tb_tinker_list_sessions(struct tb_api *a, struct tb_http_request *req,
                             const struct tb_route_match *m)
{
    int64_t limit, offset;
    (void)m;
    if (tb_tinker_query_page(req, 20, &limit, &offset)) return;
    tb_store_list_sessions(tb_core_store(tb_api_core(a)), tb_api_tenant(req), offset, limit,
                           on_sessions, tb_tinker_call(a, req));
}

static void on_session(void *arg, const struct tb_error *err, const struct tb_session_list *l)
{
    struct tb_buf b;
    struct tb_json_out j;
    struct tb_http_request *req = tb_tinker_call_answer(arg, err, &b, &j);
    if (!req) return;
    tb_jout_array(&j, "training_run_ids");
    for (int32_t i = 0; i < l->n_runs; i++)
        tb_jout_str(&j, NULL, l->run_ids[i]);
    tb_jout_array_end(&j);
    tb_jout_array(&j, "sampler_ids");
    for (int32_t i = 0; i < l->n_samplers; i++)
        tb_jout_str(&j, NULL, l->sampler_ids[i]);
    tb_jout_array_end(&j);
    if (l->rows[0].user_metadata_json)
        tb_jout_raw(&j, "user_metadata", l->rows[0].user_metadata_json);
    if (l->rows[0].display_name) tb_jout_str(&j, "display_name", l->rows[0].display_name);
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}

void tb_tinker_get_session(struct tb_api *a, struct tb_http_request *req,
                           const struct tb_route_match *m)
{
    tb_store_get_session(tb_core_store(tb_api_core(a)), tb_api_tenant(req),
                         tb_api_text(req, m->params[0]), on_session, tb_tinker_call(a, req));
}
