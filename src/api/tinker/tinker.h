/*
 * The Tinker face: /api/v1/… as the Tinker SDKs and tinkex speak it. A handler decodes its body
 * into an op (decode_*.c), core takes it (submit.c) and answers with a request id; the result is
 * fetched by retrieve_future (future.c) and encoded there (encode_*.c).
 *
 * Thread: the loop's, except for decoders, which are pure and also run in the pool.
 */
#ifndef TB_API_TINKER_H
#define TB_API_TINKER_H

#include "api/datum.h"
#include "api/internal.h"
#include "op/op.h"

/* ---- decoding: a body into an op of its own arena */
struct tb_body {
    struct tb_span bytes;        /* not compressed */
    bool proto;                  /* application/x-protobuf */
    const char *idempotency_key; /* copied; NULL when absent */
};
/* 0 and an op, which may carry op->error: its place in an order is known, so it must be submitted
 * and fail there. Or an error for an immediate answer. */
typedef int (*tb_decoder)(const struct tb_body *b, struct tb_op **out, struct tb_error *err);

int tb_tinker_decode_create_model(const struct tb_body *b, struct tb_op **out,
                                  struct tb_error *err);
int tb_tinker_decode_forward(const struct tb_body *b, struct tb_op **out, struct tb_error *err);
int tb_tinker_decode_forward_backward(const struct tb_body *b, struct tb_op **out,
                                      struct tb_error *err);
int tb_tinker_decode_create_custom_loss(const struct tb_body *b, struct tb_op **out,
                                        struct tb_error *err);
int tb_tinker_decode_optim_step(const struct tb_body *b, struct tb_op **out, struct tb_error *err);
int tb_tinker_decode_save_weights(const struct tb_body *b, struct tb_op **out,
                                  struct tb_error *err);
int tb_tinker_decode_save_sampler(const struct tb_body *b, struct tb_op **out,
                                  struct tb_error *err);
int tb_tinker_decode_save_external(const struct tb_body *b, struct tb_op **out,
                                   struct tb_error *err);
int tb_tinker_decode_load_weights(const struct tb_body *b, struct tb_op **out,
                                  struct tb_error *err);
int tb_tinker_decode_unload_model(const struct tb_body *b, struct tb_op **out,
                                  struct tb_error *err);
int tb_tinker_decode_sample(const struct tb_body *b, struct tb_op **out, struct tb_error *err);

/* Parts shared by decode_*.c. */

/* What an op may hold after CSR tensors were made dense. */
#define TB_MAX_OP_BYTES ((size_t)1 << 30)

struct tb_raw_tensor { /* as the wire has it; borrowed */
    enum tb_tensor_type type;
    const void *values; /* f32 or i64, aligned */
    size_t n_values;
    const int64_t *shape; /* n_shape == 0: one-dimensional by n_values */
    size_t n_shape;
    bool sparse; /* CSR: values at (row, col), the rest is `fill` */
    const int64_t *crow, *col;
    size_t n_crow, n_col;
    int64_t fill;
};
/* Checks shapes, CSR indices and finiteness; a dense tensor keeps pointing at values, a CSR one is
 * written into the arena. The message has no path: the caller prefixes it. */
int tb_tensor_finish(const struct tb_raw_tensor *raw, struct tb_arena *a, struct tb_tensor *out,
                     struct tb_error *err);
int tb_json_metadata(const struct tb_json *obj, const char *key, bool strings_only,
                     struct tb_arena *a, const char **out, struct tb_error *err);
/* 1..TB_MAX_ID bytes without control characters. */
int tb_json_id(const struct tb_json *obj, const char *key, bool required, struct tb_arena *a,
               const char **out, struct tb_error *err);

/* The body's `type`, when it is sent, must be the literal; NULL: it may be anything. */
int tb_tinker_check_type(const struct tb_json *root, const char *literal, struct tb_error *err);

/* The frame of JSON ops: the address first (errors there are immediate), then the rest (errors
 * there go into op->error when the address gives the op a place in an order). */
typedef int (*tb_json_part)(const struct tb_json *root, struct tb_op *op, struct tb_error *err);
int tb_json_op(const struct tb_body *b, enum tb_op_type type, const char *literal,
               tb_json_part address, tb_json_part rest, struct tb_op **out, struct tb_error *err);
/* A small op with the address of `op` and the error; destroys op. */
struct tb_op *tb_op_failed(struct tb_op *op, const struct tb_error *e);
int tb_json_address_model(const struct tb_json *root, struct tb_op *op, struct tb_error *err);

int tb_proto_forward_backward(const struct tb_body *b, struct tb_op **out, struct tb_error *err);
int tb_json_forward_backward(const struct tb_body *b, bool forward_only, struct tb_op **out,
                             struct tb_error *err);

/* ---- encoding: a result into bytes of the caller's (tb_free) */
int tb_encode_output_proto(const struct tb_op *op, void **out, size_t *n, struct tb_error *err);
int tb_encode_sample_proto(const struct tb_op *op, void **out, size_t *n, struct tb_error *err);
/* What the result's arrays of numbers take as protobuf, nearly. */
uint64_t tb_encode_size(const struct tb_op *op);
/* Any op's result as a JSON object, with what tinkex needs and others refuse when the client is
 * tinkex. */
void tb_encode_result_json(const struct tb_op *op, bool tinkex, struct tb_json_out *j);

/* ---- submits */
void tb_tinker_submit(struct tb_api *a, struct tb_http_request *req, tb_decoder decode);

/* ---- handlers, by file */
#define TB_HANDLER(name)                                                                           \
    void name(struct tb_api *a, struct tb_http_request *req, const struct tb_route_match *m)
TB_HANDLER(tb_tinker_client_config); /* config.c */
TB_HANDLER(tb_tinker_dynamic_config);
TB_HANDLER(tb_tinker_healthz);
TB_HANDLER(tb_tinker_capabilities);
TB_HANDLER(tb_tinker_telemetry);
TB_HANDLER(tb_tinker_create_session); /* session.c */
TB_HANDLER(tb_tinker_heartbeat);
TB_HANDLER(tb_tinker_finish_session);
TB_HANDLER(tb_tinker_session_project);
TB_HANDLER(tb_tinker_list_sessions);
TB_HANDLER(tb_tinker_get_session);
TB_HANDLER(tb_tinker_create_model); /* train.c */
TB_HANDLER(tb_tinker_unload_model);
TB_HANDLER(tb_tinker_get_info);
TB_HANDLER(tb_tinker_create_custom_loss);
TB_HANDLER(tb_tinker_forward);
TB_HANDLER(tb_tinker_forward_backward);
TB_HANDLER(tb_tinker_optim_step);
TB_HANDLER(tb_tinker_save_weights); /* weights.c */
TB_HANDLER(tb_tinker_save_sampler);
TB_HANDLER(tb_tinker_save_external);
TB_HANDLER(tb_tinker_load_weights);
TB_HANDLER(tb_tinker_weights_info);
TB_HANDLER(tb_tinker_create_sampling_session); /* sample.c */
TB_HANDLER(tb_tinker_get_sampler);
TB_HANDLER(tb_tinker_asample);
TB_HANDLER(tb_tinker_retrieve_future);  /* future.c */
TB_HANDLER(tb_tinker_retrieve_futures); /* batch.c */
TB_HANDLER(tb_tinker_cancel_future);
TB_HANDLER(tb_tinker_join_sampling_session);
TB_HANDLER(tb_tinker_list_runs); /* rest.c */
TB_HANDLER(tb_tinker_get_run);
TB_HANDLER(tb_tinker_run_checkpoints);
TB_HANDLER(tb_tinker_list_checkpoints);
TB_HANDLER(tb_tinker_delete_checkpoint);
TB_HANDLER(tb_tinker_publish);
TB_HANDLER(tb_tinker_unpublish);
TB_HANDLER(tb_tinker_set_ttl);
TB_HANDLER(tb_tinker_copy_weights);    /* copy.c */
TB_HANDLER(tb_tinker_search_sessions); /* search.c */
TB_HANDLER(tb_tinker_audit);           /* hosted.c */
TB_HANDLER(tb_tinker_billing);
TB_HANDLER(tb_tinker_trace_export);
TB_HANDLER(tb_tinker_auth_token);
TB_HANDLER(tb_tinker_key_info);
TB_HANDLER(tb_tinker_key_delete);
TB_HANDLER(tb_tinker_external_urls); /* download.c */
TB_HANDLER(tb_tinker_archive);
TB_HANDLER(tb_tinker_download);
/* Answers with the folder's files as a tar. (archive.c) */
void tb_tinker_send_archive(struct tb_api *a, struct tb_http_request *req, const char *dir);

/* ---- call.c. Calls into the store or core: `tb_tinker_call` as the callback's arg; its end gives
 * the request back, or answers the error and gives NULL. The api object may go with the end. */
void *tb_tinker_call(struct tb_api *a, struct tb_http_request *req);
struct tb_http_request *tb_tinker_call_request(void *call, struct tb_api **a); /* until its end */
struct tb_http_request *tb_tinker_call_end(void *call, const struct tb_error *err);
/* Its end; when there is a request, an answer has been begun. */
struct tb_http_request *tb_tinker_call_answer(void *call, const struct tb_error *err,
                                              struct tb_buf *b, struct tb_json_out *j);
void tb_tinker_on_store_done(void *call, const struct tb_error *err); /* answers {} */
/* `key` of the body, an id; the body's `type`, when it is sent, must be the literal. NULL: the
 * request has been answered. */
const char *tb_tinker_body_id(struct tb_api *a, struct tb_http_request *req, const char *key,
                              const char *literal);
/* N of a Python SDK 0.N, which says so; INT_MAX for others. */
int tb_tinker_sdk_minor(const struct tb_http_request *req);
bool tb_tinker_is_tinkex(const struct tb_http_request *req);
/* ?limit=&offset=; on failure the request has been answered */
int tb_tinker_query_page(struct tb_http_request *req, int64_t otherwise, int64_t *limit,
                         int64_t *offset);
void tb_tinker_put_time(struct tb_json_out *j, const char *key, int64_t us);
void tb_tinker_put_metadata(struct tb_json_out *j,
                            const char *json); /* "user_metadata", or nothing */
/* Ends the answer's array of rows, tells the page, and sends. */
void tb_tinker_list_end(struct tb_http_request *req, struct tb_buf *b, struct tb_json_out *j,
                        const struct tb_page *p);

void tb_tinker_downloads_fini(struct tb_api *a);

/* "tinker://{run}/{kind}/{name}" of three path parameters, in the request's arena; NULL when they
 * are no such path, and the request has been answered. */
const char *tb_tinker_route_path(struct tb_http_request *req, struct tb_span run,
                                 struct tb_span kind, struct tb_span name);

/* ttl_seconds: an hour to ten years */
#define TB_MIN_TTL 3600
#define TB_MAX_TTL (10LL * 365 * 86400)

#endif
