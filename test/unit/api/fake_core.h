/*
 * A core of the test's own: it keeps what was submitted and answers as the test says, so that the
 * face can be seen alone. The store behind it is the real one. Included by one test only.
 */
#ifndef TEST_API_FAKE_CORE_H
#define TEST_API_FAKE_CORE_H

#include <stdio.h>
#include <string.h>

#include "core/core.h"
#include "util/mem.h"

struct tb_tenant {
    char name[64];
};

struct tb_core {
    struct tb_tenant tenants[4], *who; /* all; of the last call */
    struct tb_feed_waiter *feed;       /* a poll that waits */
    int64_t feed_clone;
    uint64_t feed_prev, feed_timeout;
    int n_feed_unwaits;
    char canceled[64], retrieved[256]; /* the last id; all ids */
    struct tb_store *store;
    struct tb_op *op; /* the last one submitted */
    int n_submitted, n_sessions, n_waits, n_unwaits, n_delivered, n_held, n_released;
    struct tb_error refuse; /* the next submit's answer */
    struct tb_waiter *waiter;
    struct tb_core_stream *streams[8]; /* that are open: a creation's, its model's ops' */
    int n_streams;
    enum tb_future_state state; /* of every future */
    char finish_reason[32], session_key[64], last_id[600];
};

static struct tb_core fake;

struct tb_tenant *tb_core_tenant(struct tb_core *c, const char *name)
{
    struct tb_tenant *t = c->tenants;
    while (t->name[0] && strcmp(t->name, name))
        t++;
    snprintf(t->name, sizeof(t->name), "%s", name);
    return t;
}

const char *tb_tenant_name(const struct tb_tenant *t)
{
    return t->name;
}

int tb_core_create_session(struct tb_core *c, struct tb_tenant *who,
                           const struct tb_session_params *p, const char **id, struct tb_error *err)
{
    c->who = who;
    (void)err;
    c->n_sessions++;
    snprintf(c->session_key, sizeof(c->session_key), "%s",
             p->idempotency_key ? p->idempotency_key : "-");
    *id = "sess-1";
    return 0;
}

int tb_core_heartbeat(struct tb_core *c, struct tb_tenant *who, const char *id,
                      struct tb_error *err)
{
    c->who = who;
    return strcmp(id, "sess-1") ? tb_error_set(err, TB_EGONE, "session %s is gone", id) : 0;
}

int tb_core_finish_session(struct tb_core *c, struct tb_tenant *who, const char *id,
                           const char *reason, const char *detail, struct tb_error *err)
{
    c->who = who;
    if (strcmp(id, "sess-1")) return tb_error_set(err, TB_ENOTFOUND, "no session %s", id);
    snprintf(c->finish_reason, sizeof(c->finish_reason), "%s/%s", reason, detail ? detail : "-");
    return 0;
}

int tb_core_submit(struct tb_core *c, struct tb_tenant *who, struct tb_op *op,
                   struct tb_ticket *out, struct tb_error *err)
{
    c->who = who;
    tb_op_destroy(c->op);
    c->op = NULL;
    if (c->refuse.code) {
        *err = c->refuse;
        c->refuse.code = 0;
        tb_op_destroy(op);
        return err->code;
    }
    c->op = op;
    c->n_submitted++;
    out->request_id = "req-1";
    out->model_id = op->model_id ? op->model_id : "sess-1:train:0";
    return 0;
}

void tb_core_wait(struct tb_core *c, struct tb_tenant *who, const char *id, size_t n,
                  struct tb_waiter *w)
{
    c->who = who;
    c->n_waits++;
    snprintf(c->last_id, sizeof(c->last_id), "%.*s", (int)n, id);
    c->waiter = w;
    if (c->state != TB_FUTURE_PENDING) {
        c->waiter = NULL;
        w->cb(w, c->state, c->op, NULL, NULL);
    }
}

void tb_core_unwait(struct tb_core *c, struct tb_waiter *w)
{
    (void)w;
    c->n_unwaits++;
    c->waiter = NULL;
}

void tb_core_hold(const struct tb_op *op)
{
    (void)op;
    fake.n_held++;
}

void tb_core_release(const struct tb_op *op)
{
    (void)op;
    fake.n_held--;
    fake.n_released++;
}

void tb_core_delivered(struct tb_core *c, const char *id, size_t n)
{
    (void)id;
    (void)n;
    c->n_delivered++;
}

int tb_core_model_info(struct tb_core *c, struct tb_tenant *who, const char *id,
                       struct tb_model_answer *out, struct tb_error *err)
{
    c->who = who;
    if (strcmp(id, "sess-1:train:0")) return tb_error_set(err, TB_ENOTFOUND, "no model %s", id);
    *out = (struct tb_model_answer){
        .model_id = "sess-1:train:0", .base_model = "tiny", .arch = "llama", .lora = {.rank = 8}};
    return 0;
}

void tb_core_create_sampling_session(struct tb_core *c, struct tb_tenant *who,
                                     const struct tb_sampling_session_params *p,
                                     tb_core_sampler_cb cb, void *arg)
{
    c->who = who;
    struct tb_error e = {0};
    if (p->base_model && strcmp(p->base_model, "tiny"))
        tb_error_set(&e, TB_EINVAL, "no base model %s", p->base_model);
    cb(arg, &e, "sess-1:sample:1");
}

void tb_core_cancel(struct tb_core *c, struct tb_tenant *who, const char *id, size_t n)
{
    c->who = who;
    snprintf(c->canceled, sizeof(c->canceled), "%.*s", (int)n, id);
}

void tb_core_stream(struct tb_core *c, struct tb_tenant *who, const char *id, size_t n,
                    struct tb_core_stream *s)
{
    (void)id;
    (void)n;
    c->who = who;
    c->streams[c->n_streams++] = s;
}

static void fake_forget(struct tb_core *c, const struct tb_core_stream *s)
{
    for (int i = 0; i < c->n_streams; i++) {
        if (c->streams[i] != s) continue;
        c->streams[i] = c->streams[--c->n_streams];
        return;
    }
    fail_msg("no such stream");
}

void tb_core_unstream(struct tb_core *c, struct tb_core_stream *s)
{
    fake_forget(c, s);
}

/* The future behind the stream ends. */
static void fake_end(struct tb_core_stream *s, enum tb_future_state state, const struct tb_op *op)
{
    fake_forget(&fake, s);
    s->end(s, state, op);
}

void tb_core_feed_wait(struct tb_core *c, struct tb_tenant *who, const char *sampler, int64_t clone,
                       uint64_t prev, uint64_t timeout_ms, struct tb_feed_waiter *w)
{
    c->who = who;
    c->feed_clone = clone;
    c->feed_prev = prev;
    c->feed_timeout = timeout_ms;
    struct tb_error e = {0};
    if (strcmp(sampler, "sess-1:sample:1")) tb_error_set(&e, TB_EGONE, "no sampler %s", sampler);
    if (e.code || timeout_ms == 0)
        w->cb(w, &e, NULL, 0, prev);
    else
        c->feed = w;
}

void tb_core_feed_unwait(struct tb_core *c, struct tb_feed_waiter *w)
{
    (void)w;
    c->n_feed_unwaits++;
    c->feed = NULL;
}

void tb_core_retrieved(struct tb_core *c, struct tb_tenant *who, const char *id, size_t n)
{
    c->who = who;
    size_t at = strlen(c->retrieved);
    snprintf(c->retrieved + at, sizeof(c->retrieved) - at, "%.*s ", (int)n, id);
}

int tb_core_join_sampling_session(struct tb_core *c, struct tb_tenant *who, const char *sampler,
                                  int64_t *clone, struct tb_error *err)
{
    c->who = who;
    *clone = 7;
    return strcmp(sampler, "sess-1:sample:1") ? tb_error_set(err, TB_EGONE, "no %s", sampler) : 0;
}

void tb_core_end_sampling_session(struct tb_core *c, struct tb_tenant *who, const char *sampler_id)
{
    (void)sampler_id;
    c->who = who;
}

void tb_core_compute_stats(const struct tb_core *c, struct tb_compute_stats *out)
{
    (void)c;
    *out = (struct tb_compute_stats){.sampled_tokens = 11, .busy_us = 2500000};
    static const char *const kinds[] = {"weights", "adapters",   "versions",
                                        "kv",      "workspaces", "other"};
    for (int i = 0; i < TB_N_MEMORY; i++)
        out->memory[i] = (struct tb_memory_use){kinds[i], (uint64_t)i};
}

struct tb_store *tb_core_store(struct tb_core *c)
{
    return c->store;
}

int tb_core_n_models(const struct tb_core *c)
{
    (void)c;
    return 1;
}

void tb_core_served_model(const struct tb_core *c, int i, struct tb_served_model *out)
{
    (void)c;
    (void)i;
    *out = (struct tb_served_model){
        .name = "tiny", .dir = "/models/tiny", .arch = "llama", .max_context = 512, .max_rank = 64};
}

void tb_core_stats(const struct tb_core *c, struct tb_core_stats *out)
{
    *out = (struct tb_core_stats){.sessions = (uint64_t)c->n_sessions};
    out->submitted[TB_OP_SAMPLE] = 3;
}

#endif
