/*
 * Calls that only make sense for a hosted service with accounts: they say truthfully that there is
 * nothing here. Thread: the loop's.
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
    (void)a;
    (void)m;
    refuse(req, TB_ENOTFOUND, "this server issues no tokens; send the API key itself");
}

/* Whoever comes here has shown a key that is accepted. */
void tb_tinker_key_info(struct tb_api *a, struct tb_http_request *req,
                        const struct tb_route_match *m)
{
    static const char key[] = "{\"key_id\":0,\"name\":\"local\",\"note\":\"an API key of this "
                              "server\",\"details\":{\"org_details\":{\"name\":\"local\"},"
                              "\"user_details\":{\"email\":\"local@localhost\"}}}";
    (void)a;
    (void)m;
    answer_text(req, key, sizeof(key) - 1);
}

void tb_tinker_key_delete(struct tb_api *a, struct tb_http_request *req,
                          const struct tb_route_match *m)
{
    (void)a;
    (void)m;
    refuse(req, TB_EINVAL, "this server's keys are its operator's to change");
}
