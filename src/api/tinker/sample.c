/* Sampling sessions and asample. */
#include <string.h>

#include "api/tinker/tinker.h"

void tb_tinker_asample(struct tb_api *a, struct tb_http_request *req,
                       const struct tb_route_match *m)
{
    (void)m;
    tb_tinker_submit(a, req, tb_tinker_decode_sample);
}

static void on_created(void *arg, const struct tb_error *err, const char *sampler_id)
{
    struct tb_buf b;
    struct tb_json_out j;
    struct tb_http_request *req = tb_tinker_call_answer(arg, err, &b, &j);
    if (!req) return;
    tb_jout_str(&j, "sampling_session_id", sampler_id);
    tb_jout_str(&j, "type", "create_sampling_session");
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}

void tb_tinker_create_sampling_session(struct tb_api *a, struct tb_http_request *req,
                                       const struct tb_route_match *m)
{
    struct tb_json_doc doc;
    struct tb_error e = {0};
    struct tb_tinker_path path;
    struct tb_sampling_session_params p = {0};
    (void)m;
    if (tb_api_body(a, req, false, &doc)) return;
    const struct tb_json *root = &doc.root;
    struct tb_arena *ar = &req->arena;
    int rc = tb_json_id(root, "session_id", true, ar, &p.session_id, &e);
    if (rc == 0)
        rc = tb_json_int(root, "sampling_session_seq_id", true, 0, INT64_MAX, &p.seq_id, &e);
    if (rc == 0) rc = tb_json_id(root, "base_model", false, ar, &p.base_model, &e);
    if (rc == 0) rc = tb_json_string(root, "model_path", false, ar, 4096, &p.model_path, &e);
    if (rc == 0) rc = tb_tinker_check_type(root, "create_sampling_session", &e);
    tb_json_free(&doc);
    if (rc == 0 && !p.base_model == !p.model_path)
        rc = tb_error_set(&e, TB_EINVAL, "exactly one of base_model and model_path must be given");
    if (rc == 0 && p.model_path)
        rc = tb_tinker_path_parse(p.model_path, strlen(p.model_path), &path, &e);
    if (rc) {
        tb_api_error(req, &e);
        return;
    }
    tb_core_create_sampling_session(tb_api_core(a), tb_api_who(req), &p, on_created,
                                    tb_tinker_call(a, req));
}

static void on_sampler(void *arg, const struct tb_error *err, const struct tb_sampler_row *row)
{
    struct tb_buf b;
    struct tb_json_out j;
    struct tb_http_request *req = tb_tinker_call_answer(arg, err, &b, &j);
    if (!req) return;
    tb_jout_str(&j, "sampler_id", row->id);
    tb_jout_str(&j, "base_model", row->base_model);
    if (row->model_path) tb_jout_str(&j, "model_path", row->model_path);
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}

void tb_tinker_get_sampler(struct tb_api *a, struct tb_http_request *req,
                           const struct tb_route_match *m)
{
    tb_store_get_sampler(tb_core_store(tb_api_core(a)), tb_api_tenant(req),
                         tb_api_text(req, m->params[0]), on_sampler, tb_tinker_call(a, req));
}
