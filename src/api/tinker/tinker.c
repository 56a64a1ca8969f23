/* The Tinker face's routes. */
#include "api/tinker/tinker.h"

#include "util/mem.h"

#define V1   "/api/v1/"
#define CKPT V1 "training_runs/{}/checkpoints/{}/{}"
#define GET(p, h)                                                                                  \
    {                                                                                              \
        .method = TB_HTTP_GET, .pattern = (p), .handle = (h)                                       \
    }
#define POST(p, h)                                                                                 \
    {                                                                                              \
        .method = TB_HTTP_POST, .pattern = (p), .handle = (h)                                      \
    }
#define PUT(p, h)                                                                                  \
    {                                                                                              \
        .method = TB_HTTP_PUT, .pattern = (p), .handle = (h)                                       \
    }
#define DEL(p, h)                                                                                  \
    {                                                                                              \
        .method = TB_HTTP_DELETE, .pattern = (p), .handle = (h)                                    \
    }

static const struct tb_route ROUTES[] = {
    POST(V1 "retrieve_future", tb_tinker_retrieve_future),
    POST(V1 "retrieve_futures", tb_tinker_retrieve_futures),
    POST(V1 "asample", tb_tinker_asample),
    POST(V1 "cancel_future", tb_tinker_cancel_future),
    POST(V1 "forward_backward", tb_tinker_forward_backward),
    POST(V1 "forward", tb_tinker_forward),
    POST(V1 "optim_step", tb_tinker_optim_step),
    POST(V1 "session_heartbeat", tb_tinker_heartbeat),
    POST(V1 "telemetry", tb_tinker_telemetry),

    POST(V1 "client/config", tb_tinker_client_config),
    POST(V1 "client/dynamic_config", tb_tinker_dynamic_config),
    GET(V1 "get_server_capabilities", tb_tinker_capabilities),
    {.method = TB_HTTP_GET, .pattern = V1 "healthz", .handle = tb_tinker_healthz, .open = true},

    POST(V1 "create_session", tb_tinker_create_session),
    POST(V1 "sessions/{}/finish", tb_tinker_finish_session),
    PUT(V1 "sessions/{}/project", tb_tinker_session_project),
    POST(V1 "sessions/search", tb_tinker_search_sessions),
    GET(V1 "sessions/{}/trace_export", tb_tinker_trace_export),
    GET(V1 "sessions", tb_tinker_list_sessions),
    GET(V1 "sessions/{}", tb_tinker_get_session),

    POST(V1 "create_model", tb_tinker_create_model),
    POST(V1 "create_custom_loss", tb_tinker_create_custom_loss),
    POST(V1 "unload_model", tb_tinker_unload_model),
    POST(V1 "get_info", tb_tinker_get_info),

    POST(V1 "save_weights", tb_tinker_save_weights),
    POST(V1 "save_weights_for_sampler", tb_tinker_save_sampler),
    POST(V1 "save_weights_external", tb_tinker_save_external),
    POST(V1 "load_weights", tb_tinker_load_weights),
    POST(V1 "weights_info", tb_tinker_weights_info),
    POST(V1 "copy_weights", tb_tinker_copy_weights),

    POST(V1 "create_sampling_session", tb_tinker_create_sampling_session),
    POST(V1 "join_sampling_session", tb_tinker_join_sampling_session),
    GET(V1 "samplers/{}", tb_tinker_get_sampler),

    GET(V1 "training_runs", tb_tinker_list_runs),
    GET(V1 "training_runs/{}", tb_tinker_get_run),
    GET(V1 "training_runs/{}/checkpoints", tb_tinker_run_checkpoints),
    GET(V1 "models/{}/checkpoints", tb_tinker_run_checkpoints), /* the SDK before 0.6 */
    GET(V1 "checkpoints", tb_tinker_list_checkpoints),
    DEL(CKPT, tb_tinker_delete_checkpoint),
    POST(CKPT "/publish", tb_tinker_publish),
    DEL(CKPT "/publish", tb_tinker_unpublish),
    PUT(CKPT "/ttl", tb_tinker_set_ttl),
    GET(CKPT "/archive", tb_tinker_archive),
    GET(V1 "training_runs/{}/checkpoints/external_weights/{}/external_weights_urls",
        tb_tinker_external_urls),
    GET(V1 "audit", tb_tinker_audit),
    GET(V1 "billing/usage/events", tb_tinker_billing),
    GET(V1 "billing/usage/checkpoints/current", tb_tinker_billing),
    POST(V1 "auth/token", tb_tinker_auth_token),
    GET(V1 "auth/apikey/me", tb_tinker_key_info),
    DEL(V1 "auth/apikey/me", tb_tinker_key_delete),
    {.method = TB_HTTP_GET,
     .pattern = V1 "downloads/{}/{}",
     .handle = tb_tinker_download,
     .open = true},
};

const struct tb_face tb_face_tinker = {"tinker", ROUTES, TB_ARRAY_LEN(ROUTES)};
