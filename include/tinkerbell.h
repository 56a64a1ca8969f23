/*
 * libtinkerbell: the Tinker API server inside a program of yours that runs a libuv loop.
 *
 *     tb_options_t o;
 *     tb_options_init(&o);
 *     tb_options_add_model(&o, "demo", "examples/demo-model");
 *     o.data_dir = "data";
 *     tb_server_t *s;
 *     char err[TB_ERROR_SIZE];
 *     if (tb_server_create(&s, uv_default_loop(), &o, err)) die(err);
 *     if (tb_server_listen(s, "127.0.0.1", 0, &port, err)) die(err);
 *     uv_run(uv_default_loop(), UV_RUN_DEFAULT);
 *
 * What the library does to its host: nothing global. It never prints (unless you set no log
 * callback and a log level), exits, changes signals, locale, environment or the working directory,
 * and uses only the loop it is given. As every program that writes to sockets through libuv, the
 * host must ignore SIGPIPE.
 *
 * Threads: every function is called on the loop's thread, every callback comes on it. Computing
 * runs in the uv pool, which belongs to the whole process: the server keeps one pool thread busy
 * per device while there is work, and needs TB_POOL_THREADS in all, and one more for each device
 * beyond the first, to answer without delay; set UV_THREADPOOL_SIZE (before the pool's first use)
 * to that plus what your program needs. The CPU backend adds its own n_threads - 1 computing
 * threads.
 *
 * Errors: int, 0 or negative; err (may be NULL) receives one line of text.
 */
#ifndef TINKERBELL_H
#define TINKERBELL_H

#include <stddef.h>
#include <stdint.h>
#include <uv.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TB_API          __attribute__((visibility("default")))
#define TB_ERROR_SIZE   512
#define TB_POOL_THREADS 4

typedef struct tb_server tb_server_t;

typedef struct tb_model_option {
    const char *name;      /* as clients name it */
    const char *dir;       /* Hugging Face folder */
    const char *tokenizer; /* what get_info tells clients to load, or NULL */
    const char
        *renderer; /* how chats become tokens: "qwen3", ...; NULL: by the folder's template */
} tb_model_option_t;

#define TB_MAX_MODELS   16
#define TB_MAX_API_KEYS 256
#define TB_MAX_DEVICES  16

typedef struct tb_options {
    tb_model_option_t models[TB_MAX_MODELS];
    int n_models;
    const char *data_dir; /* metadata and checkpoints; created when missing */
    const char *backend;  /* "auto", "cpu", "cuda" */
    const char *dtype;    /* "auto", "bf16", "f32" */
    /* GPUs by CUDA's numbers. Model i goes to the (i mod n_devices)-th; with more devices than
     * models, to all whose place is i modulo n_models, which must be of one kind. None: the first.
     */
    int devices[TB_MAX_DEVICES];
    int n_devices;
    /* "KEY" or "KEY=TENANT". A tenant (without a name: "default") sees only what is its own. */
    const char *api_keys[TB_MAX_API_KEYS];
    int n_api_keys; /* 0: every key is accepted, and all are one tenant */
    /* limits of each tenant; 0: none */
    uint64_t tenant_rate, tenant_burst; /* submits a second, and at once (0: as many as a second) */
    uint64_t tenant_queue;              /* bytes of requests without a result */
    uint64_t tenant_pending;            /* requests without a result */
    const char *public_url;             /* base of URLs in answers; NULL: from the request */
    uint64_t memory;                    /* bytes, of each GPU; 0: what there is */
    uint64_t kv_memory;                 /* of it for the KV cache; 0: an eighth */
    int n_threads;                      /* computing threads; 0: all cores */
    int max_rank;                       /* 256 */
    int max_context;                    /* tokens; 0: the model's own limit */
    uint64_t max_body;                  /* bytes; 256 MiB */
    uint64_t long_poll_ms;              /* how long retrieve_future waits; 25,000 */
    uint64_t session_lease_ms;          /* a session without heartbeat ends after this; 600,000 */
} tb_options_t;

/* Fills in the defaults above. */
TB_API void tb_options_init(tb_options_t *o);
/* Strings are borrowed until tb_server_create returns. TB_EINVAL when there are too many. */
TB_API int tb_options_add_model(tb_options_t *o, const char *name, const char *dir);

TB_API const char *tb_version(void);

/* Loads the models (blocking) and opens the data folder. Strings in o are copied. */
TB_API int tb_server_create(tb_server_t **out, uv_loop_t *loop, const tb_options_t *o,
                            char err[TB_ERROR_SIZE]);
/* May be called several times. port 0 takes a free one; bound_port may be NULL. */
TB_API int tb_server_listen(tb_server_t *s, const char *host, int port, int *bound_port,
                            char err[TB_ERROR_SIZE]);

/* Stops accepting and answers waiting polls with try_again; cb when the last answer is written or
 * after grace_ms. The server is then still to be closed. */
TB_API void tb_server_drain(tb_server_t *s, unsigned grace_ms, void (*cb)(void *arg), void *arg);
/* Ends everything: running work finishes its step, waiting work fails, checkpoints being written
 * are completed. cb when no handle or work of the server is left on the loop and its memory is
 * free. */
TB_API void tb_server_close(tb_server_t *s, void (*cb)(void *arg), void *arg);

/* ---- in-process requests: the same routes without a socket */
typedef struct tb_reply {
    int status;
    const char *content_type; /* NULL when there is no body */
    const char *body;         /* not NUL-terminated; valid during the callback */
    size_t body_len;
} tb_reply_t;
typedef void (*tb_reply_cb)(void *arg, const tb_reply_t *reply);
/* method: "GET", "POST", …; target: "/api/v1/healthz"; body is JSON (or NULL) and is copied. cb
 * comes once, on the loop, never from inside this call. The call is made with the first key, when
 * there are any, and so for that one's tenant. */
TB_API int tb_server_call(tb_server_t *s, const char *method, const char *target, const char *body,
                          size_t body_len, tb_reply_cb cb, void *arg, char err[TB_ERROR_SIZE]);

/* ---- the host's own routes on the server's port (exact path, matched first; they need a key
 * when there are any) */
typedef struct tb_request {
    const char *method, *path, *query, *body; /* body is not NUL-terminated */
    size_t body_len;
    void *internal;
} tb_request_t;
/* Answer exactly once with tb_respond, in the callback or later; gone is set (through tb_on_gone)
 * when the client went away first, and the request must then not be used again. */
typedef void (*tb_route_cb)(void *arg, tb_request_t *req);
TB_API int tb_server_route(tb_server_t *s, const char *method, const char *path, tb_route_cb cb,
                           void *arg, char err[TB_ERROR_SIZE]);
TB_API void tb_on_gone(tb_request_t *req, void (*cb)(void *arg), void *arg);
TB_API void tb_respond(tb_request_t *req, int status, const char *content_type, const void *body,
                       size_t body_len);

/* ---- log: one line per event; level 0 error … 4 trace; process-wide */
typedef void (*tb_log_line_cb)(void *arg, int level, const char *module, const char *text);
TB_API void tb_set_log(int level, tb_log_line_cb cb, void *arg);

#ifdef __cplusplus
}
#endif
#endif
