/*
 * The Tinkerbell face: the routes of the Tinkerbell server, each job twice, as one that answers
 * when it is done and as one that answers at once with a future's id. Its names for adapters stand
 * for models of core in a session that this face keeps for each tenant; an adapter that is not
 * known is made on first use, as the original does.
 *
 *   tinkerbell.c  routes, which requests are ours, simple answers
 *   job.c         jobs and their futures
 *   adapter.c     names and models; add_lora, remove_lora, weights
 *   train_data.c  chat messages and Datums into training ops; losses
 *   train.c       training ops run, and what is told of their results
 *   optim.c       optimizer steps
 *   sample.c      prompts into samples
 *
 * Owner: the api object owns the face's state, which owns adapters and jobs. Thread: the loop's,
 * but what a job prepares in the pool.
 */
#ifndef TB_API_TINKERBELL_H
#define TB_API_TINKERBELL_H

#include "api/internal.h"
#include "api/llm/llm.h"
#include "util/list.h"

/* of a tenant */
#define TB_BELL_JOBS     10000        /* finished ones that are kept */
#define TB_BELL_RESULTS  (256u << 20) /* bytes of their results */
#define TB_BELL_ADAPTERS 1024
#define TB_BELL_LOSSES   256

struct tb_bell_tenant {
    struct tb_tenant *who;
    char *session_id;
    int64_t next_model;
    struct tb_map adapters; /* name → tb_bell_adapter */
    struct tb_map losses;   /* names of uploaded losses → (char *) itself */
    struct tb_list over;    /* jobs that ended, oldest first */
    size_t n_over, over_bytes;
};

struct tb_bell_job;
struct tb_bell_adapter {
    struct tb_api *a;
    struct tb_bell_tenant *tenant;
    char *name;
    const struct tb_llm_model *base;
    char *model_id;
    int64_t next_seq, next_sampler, next_sample;
    char *sampler_id; /* of the weights as they are now; NULL: to be published */
    uint64_t changes; /* of the weights */
    int32_t rank;
    /* forward_backwards that were submitted since the last step or load, and have not failed. */
    int64_t n_gradients;
    uint64_t epoch;    /* since then; no two adapters share one */
    char *creation_id; /* of the future of its creation, until it is over */
    struct tb_core_stream creation;
    struct tb_bell_job *adder; /* add_lora, which waits for that */
};

struct tb_bell {
    struct tb_map tenants; /* name → tb_bell_tenant */
    struct tb_map jobs;    /* id → tb_bell_job */
    uint64_t n_epochs;
};

/* A kind of job. prepare runs in the pool on the job's arena alone, start and step on the loop. */
struct tb_bell_kind {
    const char *title; /* "Forward-backward", as errors name it */
    int (*prepare)(struct tb_bell_job *j, const struct tb_json *root, struct tb_error *err);
    void (*start)(struct tb_bell_job *j);
};

struct tb_bell_job {
    struct tb_list node; /* of its tenant's that are over */
    struct tb_api *a;
    struct tb_bell_tenant *tenant;
    const struct tb_bell_kind *kind;
    struct tb_http_request *req; /* to be answered: at the end (sync), or with the id */
    bool sync;
    char id[16]; /* "future_" and 8 hex digits */
    struct tb_arena arena;
    uv_work_t work;
    void (*in_pool)(struct tb_bell_job *j);
    void (*then)(struct tb_bell_job *j);
    struct tb_span body;
    enum tb_encoding encoding; /* of the body */
    struct tb_error err;
    bool over;
    struct tb_buf result; /* JSON, when over without an error */

    /* what the body said */
    const char *echo;     /* model_id of the submit's answer */
    const char *model_id; /* name of an adapter, or of a base model */
    const char *base_model, *path, *loss_name;
    struct tb_lora_config lora;
    void *own;           /* the kind's */
    struct tb_list made; /* ops that prepare made, in the order in which they run */

    /* the op that runs */
    struct tb_core_stream stream;
    char *request_id;
    void (*step)(struct tb_bell_job *j, const struct tb_op *op);
    struct tb_bell_adapter *adapter;
    uint64_t epoch;      /* of the adapter, when it was submitted */
    int64_t n_gradients; /* what the op's failure adds to the adapter's */
};

/* ---- job.c */
void tb_bell_begin(struct tb_api *a, struct tb_http_request *req, const struct tb_bell_kind *kind,
                   bool sync);
/* An op for later, at the end of j->made; belongs into prepare, as data are copied. */
struct tb_op *tb_bell_make(struct tb_bell_job *j, enum tb_op_type type);
struct tb_op *tb_bell_take(struct tb_bell_job *j); /* the first of these; moves */
/* Submits op (which moves); step is called with it when it is done, and the job fails when it
 * fails. False when it was not taken, so nothing of it will happen and the job has failed. */
bool tb_bell_run(struct tb_bell_job *j, struct tb_op *op,
                 void (*step)(struct tb_bell_job *j, const struct tb_op *op));
/* Calls work in the pool, then `then` on the loop; j->err is set when the work was not done. */
void tb_bell_work(struct tb_bell_job *j, void (*work)(struct tb_bell_job *j),
                  void (*then)(struct tb_bell_job *j));
/* n zeroed values in the arena; NULL, with err set, when memory is out. */
void *tb_bell_room(struct tb_arena *a, size_t n, size_t size, struct tb_error *err);
/* The end; the result is what was written to j->result. */
void tb_bell_done(struct tb_bell_job *j);
void tb_bell_fail(struct tb_bell_job *j, const struct tb_error *e);
struct tb_json_out tb_bell_result(struct tb_bell_job *j); /* with the opening brace written */
void tb_bell_retrieve(struct tb_api *a, struct tb_http_request *req,
                      const struct tb_route_match *m);
/* A string of a small body, NULL when absent; on failure the request has been answered. */
int tb_bell_body_string(struct tb_http_request *req, const char *key, const char **out);
void tb_bell_error(struct tb_http_request *req, const struct tb_error *e);
void tb_bell_detail(struct tb_http_request *req, int status, const char *text);

/* ---- adapter.c */
struct tb_bell_tenant *tb_bell_tenant(struct tb_api *a, struct tb_tenant *who);
/* The base model that an adapter of this name has: the one of that name, or of the part before
 * "_lora_", which add_lora makes names with; else the first. Any thread. */
#define TB_BELL_LORA "_lora_"
const struct tb_llm_model *tb_bell_base(struct tb_api *a, const char *name);
struct tb_bell_adapter *tb_bell_adapter_find(struct tb_bell_tenant *t, const char *name);
/* Finds j's adapter by name, or submits its creation with j->lora; then calls then, or fails j. */
void tb_bell_with_adapter(struct tb_bell_job *j, const char *name,
                          void (*then)(struct tb_bell_job *j));
/* Makes op the next in the order of j's adapter; returns it. */
struct tb_op *tb_bell_op(struct tb_bell_job *j, struct tb_op *op);
void tb_bell_adapter_free(struct tb_bell_adapter *ad);
/* No gradient is there any more: a new epoch begins. */
void tb_bell_adapter_no_gradients(struct tb_bell_adapter *ad);
/* Its weights become other than what was published. */
void tb_bell_adapter_changed(struct tb_bell_adapter *ad);
/* model_id or adapter_id, both for j and for the answer to its submit. */
int tb_bell_named(struct tb_bell_job *j, const struct tb_json *root, struct tb_error *err);
extern const struct tb_bell_kind tb_bell_add_lora, tb_bell_remove_lora, tb_bell_load, tb_bell_save,
    tb_bell_save_sampler;
int tb_bell_lora(struct tb_bell_job *j, const struct tb_json *root, struct tb_error *err);

/* ---- train.c, optim.c, sample.c */
extern const struct tb_bell_kind tb_bell_forward, tb_bell_forward_backward, tb_bell_optim_step;
extern const struct tb_bell_kind tb_bell_sample, tb_bell_register_loss;
void tb_bell_sample_forget(struct tb_bell_job *j); /* core calls its samples no more */

void tb_bell_create(struct tb_api *a);
void tb_bell_destroy(struct tb_bell *b);

#endif
