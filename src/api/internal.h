/*
 * What the files of api/ and its faces share: the api object, answers in JSON, request bodies, and
 * the counting of work that is out in the pool or in the store.
 *
 * Work that takes its time (pool, store callbacks) leaves the request's on_abort unset: the request
 * and its arena then stay valid until the answer, even when the client has gone. Only waiting
 * (retrieve_future) sets it.
 *
 * Thread: the loop's, unless said.
 */
#ifndef TB_API_INTERNAL_H
#define TB_API_INTERNAL_H

#include "api/api.h"
#include "util/buf.h"
#include "util/limits.h"
#include "util/map.h"
#include "wire/inflate.h"
#include "wire/json.h"
#include "wire/json_out.h"

struct tb_api_own_route; /* an embedder's */
struct tb_api_key;       /* key.c */
struct tb_llm_models;
struct tb_bell;

struct tb_api {
    uv_loop_t *loop;
    struct tb_core *core;
    const struct tb_http_server *http; /* NULL: no counters of it */
    struct tb_api_options o;           /* strings in `strings` */
    struct tb_arena strings;
    struct tb_api_own_route *own;
    struct tb_api_key *keys; /* in `strings` */
    int n_keys;
    struct tb_tenant *everyone; /* when there are no keys */
    int64_t started_us;
    struct tb_bell *bell;      /* the Tinkerbell face's */
    struct tb_llm_models *llm; /* what the faces for text know of the models */
    struct tb_map downloads;   /* token → struct tb_download (download.c) */
    struct tb_list downloads_by_age;
    unsigned pending; /* jobs in the pool and callbacks we wait for */
    bool closing;
    void (*close_cb)(void *arg);
    void *close_arg;
};

/* Between begin and end the api object stays. end may free it: do not touch it afterwards. */
void tb_api_work_begin(struct tb_api *a);
void tb_api_work_end(struct tb_api *a);

/* ---- key.c */
int tb_api_keys_init(struct tb_api *a, const char *const *keys, int n, struct tb_error *err);
/* Finds out who asks: fills in req->client, or false. */
bool tb_api_authorize(const struct tb_api *a, struct tb_http_request *req);
/* In the face's shape; face NULL: tb_api_error's. */
void tb_api_refuse_key(struct tb_http_request *req, const struct tb_face *face);
/* Whose key or token it is, or NULL. */
struct tb_tenant *tb_api_key_tenant(const struct tb_api *a, struct tb_arena *arena,
                                    struct tb_span given);
/* What the SDK exchanges the request's key for, in the request's arena. */
const char *tb_api_token(struct tb_http_request *req);
int tb_api_key_number(const struct tb_api *a, struct tb_http_request *req);

/* Who asks, in handlers of routes that need a key. */
static inline struct tb_tenant *tb_api_who(const struct tb_http_request *req)
{
    return req->client;
}
static inline const char *tb_api_tenant(const struct tb_http_request *req)
{
    return tb_tenant_name(req->client);
}

/* The faces by number, in order; NULL beyond the last. */
const struct tb_face *tb_api_face(int i);
const char *tb_api_method_name(enum tb_http_method m);

/* Does `path` match a pattern of the route table? Parameters are spans of path. */
bool tb_route_match_path(const char *pattern, struct tb_span path, struct tb_route_match *m);

/* tb_api_error with header fields. */
void tb_api_error_with(struct tb_http_request *req, const struct tb_error *err,
                       const struct tb_http_field *fields, size_t n_fields);
/* Answers with what the writer filled; the buffer's memory moves. A buffer that ran full is a 500.
 */
void tb_api_answer(struct tb_http_request *req, int status, struct tb_buf *b);
void tb_api_answer_empty(struct tb_http_request *req); /* 200, "{}" */
/* A buffer and a writer for an answer, with the opening brace written. */
#define TB_API_MAX_ANSWER ((size_t)1 << 30)
void tb_api_answer_begin(struct tb_buf *b, struct tb_json_out *j);

/* The JSON object of a small request (not of an op); on failure the request has been answered. An
 * empty body reads as {} when `optional`. */
int tb_api_body(struct tb_api *a, struct tb_http_request *req, bool optional,
                struct tb_json_doc *doc);
/* The same without an answer. On failure doc is empty: tb_json_free takes it. */
int tb_api_body_parse(struct tb_http_request *req, bool optional, struct tb_json_doc *doc,
                      struct tb_error *err);
/* The body without its encoding; *own is to be freed and holds it, or is NULL. Any thread. */
int tb_api_inflate(const struct tb_api *a, enum tb_encoding enc, struct tb_span *body, char **own,
                   struct tb_error *err);

/* ?name= as an integer in min..max, `otherwise` when absent; on failure the request has been
 * answered. */
int tb_api_query_int(struct tb_http_request *req, const char *name, int64_t min, int64_t max,
                     int64_t otherwise, int64_t *out);

/* A header's or path parameter's text as a string in the request's arena. */
const char *tb_api_text(struct tb_http_request *req, struct tb_span s);

/* X-Idempotency-Key into the arena; NULL when absent, empty or longer than TB_MAX_ID. */
const char *tb_api_idempotency_key(struct tb_http_request *req);

/* The faces (tables in their folders). */
extern const struct tb_face tb_face_tinker;
extern const struct tb_face tb_face_admin;
extern const struct tb_face tb_face_openai;
extern const struct tb_face tb_face_tinkerbell;
extern const struct tb_face tb_face_ollama;
extern const struct tb_face tb_face_llamacpp;

#endif
