/*
 * API: the routes of all faces on one port, authentication, and what faces share. A face is a
 * folder with a table of routes and the code that turns its JSON or protobuf into ops and results
 * back. Faces never call each other; a new face is one row in api.c's table of faces.
 *
 * Thread: the loop's. Decoding of large bodies is moved to the uv pool by the face.
 */
#ifndef TB_API_API_H
#define TB_API_API_H

#include <stdbool.h>
#include <uv.h>

#include "core/core.h"
#include "http/http.h"

struct tb_api;

struct tb_api_options {
    const char *const *api_keys; /* "KEY" or "KEY=TENANT"; none: any key, or none, is accepted */
    int n_api_keys;
    const char *const *renderers; /* of each served model, entries NULL: by its folder; or NULL */
    const char
        *public_url; /* base of absolute URLs, without trailing '/'; NULL: from the request */
    bool loopback;   /* listening on loopback only: get_info may name local folders */
    size_t max_body; /* also the bound of an inflated body */
    const char *version;
};

/* "KEY=TENANT" in its parts; TB_EINVAL says what a key looks like, without showing it. */
int tb_api_key_split(const char *text, struct tb_span *key, struct tb_span *tenant,
                     struct tb_error *err);

int tb_api_create(struct tb_api **out, uv_loop_t *loop, struct tb_core *core,
                  const struct tb_api_options *o, struct tb_error *err);
/* The server listens beyond loopback now: clients may not share its file system. */
void tb_api_set_remote(struct tb_api *a);
/* The server of the port, for /metrics; it must outlive the api object, or NULL must be set. */
void tb_api_set_http(struct tb_api *a, const struct tb_http_server *http);
/* cb when no work of ours is left in the pool. */
void tb_api_close(struct tb_api *a, void (*cb)(void *arg), void *arg);

/* The tb_http_handler of the server. */
void tb_api_handle(void *api, struct tb_http_request *req);

/* An embedder's own route, matched before the faces: exact path. */
typedef void (*tb_api_route_cb)(void *arg, struct tb_http_request *req);
int tb_api_add_route(struct tb_api *a, enum tb_http_method method, const char *path,
                     tb_api_route_cb cb, void *arg, struct tb_error *err);

/* ---- for faces ---- */
struct tb_route_match {
    struct tb_span params[4]; /* the {…} parts of the pattern, percent-decoded */
};
struct tb_route {
    enum tb_http_method method;
    const char *pattern; /* "/api/v1/training_runs/{}/checkpoints/{}/{}"; {*}: all the rest */
    void (*handle)(struct tb_api *a, struct tb_http_request *req, const struct tb_route_match *m);
    bool open; /* no API key needed */
    /* On a path that faces share: is this request ours? NULL: all are. Reads it only. */
    bool (*ours)(const struct tb_http_request *req);
};
struct tb_face {
    const char *name;
    const struct tb_route *routes;
    int n_routes;
    /* How a missing key is told; NULL: tb_api_error */
    void (*error)(struct tb_http_request *req, const struct tb_error *err);
};

struct tb_core *tb_api_core(struct tb_api *a);
const struct tb_api_options *tb_api_options_get(const struct tb_api *a);
uv_loop_t *tb_api_loop(struct tb_api *a);
/* {"detail": T, "message": T, "category": C} with the status of err->code. */
void tb_api_error(struct tb_http_request *req, const struct tb_error *err);
/* --public-url, else X-Forwarded-Proto/Host, else Host; into the request's arena, without trailing
 * '/'. */
const char *tb_api_base_url(struct tb_api *a, struct tb_http_request *req);

#endif
