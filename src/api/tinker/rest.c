/* Training runs and checkpoints: lists, publish, ttl, delete. All through the store. */
#include <string.h>

#include "api/tinker/tinker.h"
#include "util/clock.h"
#include "util/mem.h"

/* ---- parts */

void tb_tinker_put_time(struct tb_json_out *j, const char *key, int64_t us)
{
    char text[TB_TIME_TEXT];
    tb_clock_format(us, text);
    tb_jout_str(j, key, text);
}

/* The API types this as a map of strings, but create_model takes any JSON: other values become
 * their text. */
void tb_tinker_put_metadata(struct tb_json_out *j, const char *json)
{
    struct tb_json_doc doc;
    struct tb_json v;
    struct tb_arena a;
    struct tb_error e = {0};
    if (!json || tb_json_parse(&doc, json, strlen(json), &e)) return;
    tb_arena_init(&a);
    tb_jout_object(j, "user_metadata");
    void *it = NULL;
    while (tb_json_is_object(&doc.root) && tb_json_next(&doc.root, &it, &v)) {
        const char *text = "";
        int rc = tb_json_is_string(&v) ? tb_json_as_string(&v, &a, TB_MAX_METADATA, &text, &e)
                                       : tb_json_as_text(&v, &a, TB_MAX_METADATA, &text, &e);
        if (rc == 0) tb_jout_str(j, v.key, text);
    }
    tb_jout_object_end(j);
    tb_arena_fini(&a);
    tb_json_free(&doc);
}

static void put_ckpt(struct tb_json_out *j, const char *key, const struct tb_ckpt_row *r)
{
    char id[TB_MAX_ID * 2];
    snprintf(id, sizeof(id), "%s/%s", tb_ckpt_kind_dir(r->kind), r->name);
    tb_jout_object(j, key);
    tb_jout_str(j, "checkpoint_id", id);
    tb_jout_str(j, "checkpoint_type", tb_ckpt_kind_type(r->kind));
    tb_tinker_put_time(j, "time", r->time_us);
    tb_jout_str(j, "tinker_path", r->path);
    tb_jout_str(j, "training_run_id", r->run_id);
    tb_jout_int(j, "size_bytes", r->size_bytes);
    tb_jout_bool(j, "public", r->is_public);
    tb_tinker_put_metadata(j, r->user_metadata_json);
    if (r->expires_us)
        tb_tinker_put_time(j, "expires_at", r->expires_us);
    else
        tb_jout_null(j, "expires_at");
    tb_jout_object_end(j);
}

static void put_run(struct tb_json_out *j, const struct tb_run_row *r,
                    const struct tb_ckpt_row *last, const struct tb_ckpt_row *sampler)
{
    tb_jout_str(j, "training_run_id", r->id);
    tb_jout_str(j, "base_model", r->base_model);
    tb_jout_str(j, "model_owner", "local");
    tb_jout_bool(j, "is_lora", true);
    tb_jout_int(j, "lora_rank", r->lora.rank);
    tb_jout_bool(j, "corrupted", r->corrupted);
    tb_tinker_put_time(j, "last_request_time", r->last_request_us);
    if (last) put_ckpt(j, "last_checkpoint", last);
    if (sampler) put_ckpt(j, "last_sampler_checkpoint", sampler);
    tb_tinker_put_metadata(j, r->user_metadata_json);
}

/* ---- runs */

static void on_runs(void *arg, const struct tb_error *err, const struct tb_run_list *l)
{
    struct tb_buf b;
    struct tb_json_out j;
    struct tb_http_request *req = tb_tinker_call_answer(arg, err, &b, &j);
    if (!req) return;
    tb_jout_array(&j, "training_runs");
    for (int32_t i = 0; i < l->n; i++) {
        tb_jout_object(&j, NULL);
        put_run(&j, &l->rows[i], l->last_ckpt ? l->last_ckpt[i] : NULL,
                l->last_sampler ? l->last_sampler[i] : NULL);
        tb_jout_object_end(&j);
    }
    tb_tinker_list_end(req, &b, &j, &l->page);
}

void tb_tinker_list_runs(struct tb_api *a, struct tb_http_request *req,
                         const struct tb_route_match *m)
{
    int64_t limit, offset;
    (void)m;
    struct tb_span project = tb_http_query_get(req, "project_id");
    if (tb_tinker_query_page(req, 20, &limit, &offset)) return;
    tb_store_list_runs(tb_core_store(tb_api_core(a)), tb_api_tenant(req),
                       project.n ? tb_api_text(req, project) : NULL, offset, limit, on_runs,
                       tb_tinker_call(a, req));
}

static void on_run(void *arg, const struct tb_error *err, const struct tb_run_list *l)
{
    struct tb_buf b;
    struct tb_json_out j;
    struct tb_http_request *req = tb_tinker_call_answer(arg, err, &b, &j);
    if (!req) return;
    put_run(&j, &l->rows[0], l->last_ckpt ? l->last_ckpt[0] : NULL,
            l->last_sampler ? l->last_sampler[0] : NULL);
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}

void tb_tinker_get_run(struct tb_api *a, struct tb_http_request *req,
                       const struct tb_route_match *m)
{
    tb_store_get_run(tb_core_store(tb_api_core(a)), tb_api_tenant(req),
                     tb_api_text(req, m->params[0]), on_run, tb_tinker_call(a, req));
}

/* ---- checkpoints */

static void on_ckpts(void *arg, const struct tb_error *err, const struct tb_ckpt_list *l)
{
    struct tb_buf b;
    struct tb_json_out j;
    struct tb_http_request *req = tb_tinker_call_answer(arg, err, &b, &j);
    if (!req) return;
    bool external = tb_tinker_sdk_minor(req) >= 30; /* older ones refuse the whole list */
    tb_jout_array(&j, "checkpoints");
    for (int32_t i = 0; i < l->n; i++)
        if (external || l->rows[i].kind != TB_CKPT_EXTERNAL) put_ckpt(&j, NULL, &l->rows[i]);
    tb_tinker_list_end(req, &b, &j, &l->page);
}

void tb_tinker_list_checkpoints(struct tb_api *a, struct tb_http_request *req,
                                const struct tb_route_match *m)
{
    int64_t limit, offset;
    (void)m;
    if (tb_tinker_query_page(req, 100, &limit, &offset)) return;
    tb_store_list_ckpts(tb_core_store(tb_api_core(a)), tb_api_tenant(req), NULL, offset, limit,
                        on_ckpts, tb_tinker_call(a, req));
}

void tb_tinker_run_checkpoints(struct tb_api *a, struct tb_http_request *req,
                               const struct tb_route_match *m)
{
    tb_store_list_ckpts(tb_core_store(tb_api_core(a)), tb_api_tenant(req),
                        tb_api_text(req, m->params[0]), 0, 0, on_ckpts, tb_tinker_call(a, req));
}

const char *tb_tinker_route_path(struct tb_http_request *req, struct tb_span run,
                                 struct tb_span kind, struct tb_span name)
{
    struct tb_error e = {0};
    struct tb_tinker_path p;
    const char *path = tb_arena_printf(&req->arena, "tinker://%.*s/%.*s/%.*s", (int)run.n, run.p,
                                       (int)kind.n, kind.p, (int)name.n, name.p);
    if (tb_tinker_path_parse(path, strlen(path), &p, &e) == 0) return path;
    tb_api_error(req, &e);
    return NULL;
}

static const char *route_ckpt(struct tb_http_request *req, const struct tb_route_match *m)
{
    return tb_tinker_route_path(req, m->params[0], m->params[1], m->params[2]);
}

void tb_tinker_delete_checkpoint(struct tb_api *a, struct tb_http_request *req,
                                 const struct tb_route_match *m)
{
    const char *path = route_ckpt(req, m);
    if (path)
        tb_store_delete_ckpt(tb_core_store(tb_api_core(a)), tb_api_tenant(req), path,
                             tb_tinker_on_store_done, tb_tinker_call(a, req));
}

static void publish(struct tb_api *a, struct tb_http_request *req, const struct tb_route_match *m,
                    bool is_public)
{
    const char *path = route_ckpt(req, m);
    if (path)
        tb_store_publish_ckpt(tb_core_store(tb_api_core(a)), tb_api_tenant(req), path, is_public,
                              tb_tinker_on_store_done, tb_tinker_call(a, req));
}

void tb_tinker_publish(struct tb_api *a, struct tb_http_request *req,
                       const struct tb_route_match *m)
{
    publish(a, req, m, true);
}

void tb_tinker_unpublish(struct tb_api *a, struct tb_http_request *req,
                         const struct tb_route_match *m)
{
    publish(a, req, m, false);
}

void tb_tinker_set_ttl(struct tb_api *a, struct tb_http_request *req,
                       const struct tb_route_match *m)
{
    struct tb_json_doc doc;
    struct tb_error e = {0};
    int64_t ttl = 0; /* null clears */
    const char *path = route_ckpt(req, m);
    if (!path || tb_api_body(a, req, false, &doc)) return;
    int rc = tb_json_int(&doc.root, "ttl_seconds", false, TB_MIN_TTL, TB_MAX_TTL, &ttl, &e);
    tb_json_free(&doc);
    if (rc)
        tb_api_error(req, &e);
    else
        tb_store_set_ckpt_ttl(tb_core_store(tb_api_core(a)), tb_api_tenant(req), path, ttl,
                              tb_tinker_on_store_done, tb_tinker_call(a, req));
}
