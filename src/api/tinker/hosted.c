/*
 * Calls about accounts: keys, which the operator gives out, and what only a hosted service has,
 * where the answers say truthfully that there is nothing here. Thread: the loop's.
 */
#include "api/tinker/tinker.h"

static void answer_text(struct tb_http_request *req, const char *json, size_t n)
{
    tb_http_respond(req, 200, "application/json", json, n, NULL, 0);
}

static void refuse(struct tb_http_request *req, int code, const char *text)
{
    struct tb_error e = {0};
    tb_error_set(&e, code, "%s", text);
    tb_api_error(req, &e);
}

void tb_tinker_audit(struct tb_api *a, struct tb_http_request *req, const struct tb_route_match *m)
{
    static const char none[] = "{\"entries\":[]}";
    (void)a;
    (void)m;
    answer_text(req, none, sizeof(none) - 1);
}

void tb_tinker_billing(struct tb_api *a, struct tb_http_request *req,
                       const struct tb_route_match *m)
{
    static const char none[] = "{\"data\":[]}";
    (void)a;
    (void)m;
    answer_text(req, none, sizeof(none) - 1);
}

void tb_tinker_trace_export(struct tb_api *a, struct tb_http_request *req,
                            const struct tb_route_match *m)
{
    static const char none[] =
        "{\"status\":\"failed\",\"error\":\"this server records no traces of sessions\"}";
    (void)a;
    (void)m;
    answer_text(req, none, sizeof(none) - 1);
}

void tb_tinker_auth_token(struct tb_api *a, struct tb_http_request *req,
                          const struct tb_route_match *m)
{
    struct tb_buf b;
    struct tb_json_out j;
    (void)a;
    (void)m;
    tb_api_answer_begin(&b, &j);
    tb_jout_str(&j, "jwt", tb_api_token(req));
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}

/* Whoever comes here has shown a key that is accepted. */
void tb_tinker_key_info(struct tb_api *a, struct tb_http_request *req,
                        const struct tb_route_match *m)
{
    struct tb_buf b;
    struct tb_json_out j;
    const char *name = tb_api_tenant(req);
    (void)m;
    tb_api_answer_begin(&b, &j);
    tb_jout_int(&j, "key_id", tb_api_key_number(a, req));
    tb_jout_str(&j, "name", name);
    tb_jout_str(&j, "note", "an API key of this server");
    tb_jout_object(&j, "details");
    tb_jout_object(&j, "org_details");
    tb_jout_str(&j, "name", name);
    tb_jout_object_end(&j);
    tb_jout_object(&j, "user_details");
    tb_jout_str(&j, "email", tb_arena_printf(&req->arena, "%s@localhost", name));
    tb_jout_object_end(&j);
    tb_jout_object_end(&j);
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}

void tb_tinker_key_delete(struct tb_api *a, struct tb_http_request *req,
                          const struct tb_route_match *m)
{
    (void)a;
    (void)m;
    refuse(req, TB_EINVAL, "this server's keys are its operator's to change");
}
