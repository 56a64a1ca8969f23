/* Configuration of clients, capabilities, health, telemetry. Only what exists is announced. */
#include <limits.h>

#include "api/tinker/tinker.h"
#include "util/mem.h"

/* One request per batch is what a single server wants; a body stays well below the limit, because
 * the SDK counts four bytes a token and the raw tensors, and the rest of the message comes on top.
 */
enum { FIRST_WHOAMI = 25 };

enum { CHUNK_LEN = 8192, CHUNK_BYTES = 32 << 20, DISPATCH_BYTES = 128 << 20 };

void tb_tinker_client_config(struct tb_api *a, struct tb_http_request *req,
                             const struct tb_route_match *m)
{
    struct tb_buf b;
    struct tb_json_out j;
    int minor = tb_tinker_sdk_minor(req);
    size_t chunk = TB_MIN((size_t)CHUNK_BYTES, tb_api_options_get(a)->max_body / 4);
    (void)m;
    tb_api_answer_begin(&b, &j);
    /* for whoami, which reads the token that a key is exchanged for; older SDKs have none */
    tb_jout_bool(&j, "pjwt_auth_enabled", minor >= FIRST_WHOAMI && minor < INT_MAX);
    tb_jout_str(&j, "credential_default_source", "api_key");
    tb_jout_bool(&j, "parallel_fwdbwd_chunks", true);
    tb_jout_bool(&j, "proto_compress_fwdbwd", false);
    tb_jout_bool(&j, "proto_write_fwdbwd", true);
    tb_jout_bool(&j, "fwd_via_fwdbwd", true);
    tb_jout_bool(&j, "create_model_via_load_weights", true);
    tb_jout_int(&j, "fwdbwd_max_chunk_len", CHUNK_LEN);
    tb_jout_int(&j, "fwdbwd_max_chunk_bytes_count", (int64_t)chunk);
    tb_jout_int(&j, "fwdbwd_dispatch_bytes_semaphore_size", DISPATCH_BYTES);
    tb_jout_bool(&j, "sample_use_retrieve_futures", true);
    tb_jout_bool(&j, "custom_loss_server_side", true);
    tb_jout_bool(&j, "sample_join_sampling_session", true);
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}

void tb_tinker_dynamic_config(struct tb_api *a, struct tb_http_request *req,
                              const struct tb_route_match *m)
{
    struct tb_buf b;
    struct tb_json_out j;
    (void)a;
    (void)m;
    tb_api_answer_begin(&b, &j);
    tb_jout_int(&j, "refresh_interval_sec", 3600); /* it never changes */
    tb_jout_bool(&j, "sample_cancel_enabled", true);
    tb_jout_int(&j, "sample_cancel_max_batch_size", 64);
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}

void tb_tinker_healthz(struct tb_api *a, struct tb_http_request *req,
                       const struct tb_route_match *m)
{
    static const char ok[] = "{\"status\":\"ok\"}";
    (void)a;
    (void)m;
    tb_http_respond(req, 200, "application/json", ok, sizeof(ok) - 1, NULL, 0);
}

void tb_tinker_capabilities(struct tb_api *a, struct tb_http_request *req,
                            const struct tb_route_match *m)
{
    struct tb_buf b;
    struct tb_json_out j;
    struct tb_core *c = tb_api_core(a);
    (void)m;
    tb_api_answer_begin(&b, &j);
    tb_jout_array(&j, "supported_models");
    for (int i = 0; i < tb_core_n_models(c); i++) {
        struct tb_served_model s;
        tb_core_served_model(c, i, &s);
        tb_jout_object(&j, NULL);
        tb_jout_str(&j, "model_name", s.name);
        if (s.arch) tb_jout_str(&j, "arch", s.arch);
        tb_jout_int(&j, "max_context_length", s.max_context);
        tb_jout_bool(&j, "trainable", true);
        tb_jout_bool(&j, "sampleable", true);
        tb_jout_object_end(&j);
    }
    tb_jout_array_end(&j);
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}

/* Taken and dropped: nobody here reads it, and clients only want to be rid of it quickly. */
void tb_tinker_telemetry(struct tb_api *a, struct tb_http_request *req,
                         const struct tb_route_match *m)
{
    static const char accepted[] = "{\"status\":\"accepted\"}";
    (void)a;
    (void)m;
    tb_http_respond(req, 200, "application/json", accepted, sizeof(accepted) - 1, NULL, 0);
}
