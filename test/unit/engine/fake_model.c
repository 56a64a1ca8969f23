/* See fake_model.h. */
#include "fake_model.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <uv.h>

#include "model/custom/graph.h"
#include "model/pager.h"
#include "util/mem.h"

struct fake_backend {
    struct tb_backend be;
    int device;
};
struct tb_model {
    struct tb_model_info info;
    struct tb_backend *be;
    int device;
};
struct tb_adapter {
    int rank;
    int device;
};
struct tb_adapter_version {
    int refs;
    int device;
    int content;
};
struct tb_graph {
    int nothing;
};
struct tb_sampling {
    struct tb_op *op;
    struct tb_adapter_version *version;
    int32_t done, told;
};

struct tb_training {
    struct tb_op *op;
    int n_through;
    bool reserved;
};

struct fake_event fake_events[FAKE_MAX_EVENTS];
int fake_n_events;
_Atomic int fake_live_adapters, fake_live_versions, fake_live_samplings, fake_live_trainings;
_Atomic int fake_live_graphs;
_Atomic int fake_steps, fake_first_step[FAKE_MAX_SEQ];
_Atomic int fake_reserved;
int fake_max_reserved;
_Atomic int fake_with_graph;
unsigned fake_train_us, fake_sample_us;
bool fake_fail_create;
struct fake_device fake_devices[FAKE_DEVICES];
const char *fake_last_kind;
_Atomic int fake_sampled_on[FAKE_MAX_SEQ], fake_content[FAKE_MAX_SEQ];

_Atomic int fake_hold, fake_held, fake_loans;

static _Atomic int last_content;
static uv_once_t once = UV_ONCE_INIT;
static uv_mutex_t events_lock;

static void init_once(void)
{
    uv_mutex_init(&events_lock);
}

void fake_reset(void)
{
    uv_once(&once, init_once);
    fake_n_events = 0;
    fake_train_us = fake_sample_us = 0;
    fake_fail_create = false;
    fake_with_graph = 0;
    fake_steps = 0;
    for (int i = 0; i < FAKE_MAX_SEQ; i++)
        fake_first_step[i] = fake_sampled_on[i] = fake_content[i] = -1;
    for (int i = 0; i < FAKE_DEVICES; i++) {
        fake_devices[i].samples = 0;
        fake_devices[i].lost = fake_devices[i].full = false;
    }
    fake_hold = fake_held = FAKE_HOLD_NONE;
    last_content = 0;
    fake_last_kind = "fake";
    fake_max_reserved = 1000;
}

/* ---- the gate */

static atomic_bool gated;
static uv_sem_t arrived, go;

void fake_gate_close(void)
{
    uv_sem_init(&arrived, 0);
    uv_sem_init(&go, 0);
    gated = true;
}

bool fake_gate_reached(void)
{
    return uv_sem_trywait(&arrived) == 0;
}

void fake_gate_pass(void)
{
    uv_sem_post(&go);
}

void fake_gate_open(void)
{
    if (!gated) return;
    gated = false;
    uv_sem_post(&go);
}

static void pause_at_gate(void)
{
    fake_steps++;
    if (!gated) return;
    uv_sem_post(&arrived);
    uv_sem_wait(&go);
}

static void note_start(int64_t seq)
{
    if (seq >= 0 && seq < FAKE_MAX_SEQ && fake_first_step[seq] < 0)
        fake_first_step[seq] = fake_steps;
}

static void record(enum fake_event_kind kind, int n, int64_t first_seq)
{
    uv_mutex_lock(&events_lock);
    TB_BUG_ON(fake_n_events == FAKE_MAX_EVENTS);
    fake_events[fake_n_events++] = (struct fake_event){kind, n, first_seq};
    uv_mutex_unlock(&events_lock);
}

static void destroy(struct tb_backend *be)
{
    tb_free(be);
}

static void describe(struct tb_backend *be, char *out, size_t n)
{
    if (n) out[0] = '\0';
}

static void use(struct tb_backend *be, enum tb_queue queue)
{
    be->lost |= fake_devices[((struct fake_backend *)be)->device].lost;
}

static int sync_device(struct tb_backend *be, struct tb_error *err)
{
    return be->lost ? tb_error_set(err, TB_EDEVICE, "the fake device is lost") : 0;
}

static const struct tb_backend_ops fake_ops = {
    .name = "fake", .destroy = destroy, .describe = describe, .use = use, .sync = sync_device};

int tb_backend_create(struct tb_backend **out, const char *name, const char *dtype,
                      const struct tb_backend_options *options, struct tb_error *err)
{
    struct fake_backend *f = tb_calloc(1, sizeof(*f));
    f->device = options->device;
    f->be.kind = f->device == FAKE_DEVICES - 1 ? fake_last_kind : "fake";
    *out = &f->be;
    (*out)->ops = &fake_ops;
    (*out)->sizes = (struct tb_backend_sizes){.train_rows = 512, .prefill_rows = 256};
    return 0;
}

int tb_model_load(struct tb_model **out, struct tb_backend *be, const char *name, const char *dir,
                  const struct tb_model_options *options, struct tb_error *err)
{
    if (strcmp(dir, "missing") == 0)
        return tb_error_set(err, TB_ENOTFOUND, "%s: no such folder", dir);
    *out = tb_calloc(1, sizeof(**out));
    (*out)->info.name = tb_strdup(name);
    (*out)->info.arch = "Fake";
    (*out)->info.max_context = 1 << 20;
    (*out)->be = be;
    (*out)->device = ((struct fake_backend *)be)->device;
    return 0;
}

void tb_model_free(struct tb_model *m)
{
    if (!m) return;
    tb_free((void *)(uintptr_t)m->info.name);
    tb_free(m);
}

const struct tb_model_info *tb_model_info(const struct tb_model *m)
{
    return &m->info;
}

struct tb_model_usage tb_model_usage(const struct tb_model *m)
{
    return (struct tb_model_usage){0};
}

int tb_pager_create(struct tb_pager **out, struct tb_backend *be, const char *dir,
                    struct tb_error *err)
{
    return 0;
}

void tb_pager_destroy(struct tb_pager *p) {}

void tb_pager_stats(const struct tb_pager *p, struct tb_pager_stats *out) {}

int tb_adapter_create(struct tb_adapter **out, struct tb_model *m,
                      const struct tb_lora_config *config, struct tb_error *err)
{
    if (fake_fail_create) return tb_error_set(err, TB_ENOMEM, "no room");
    *out = tb_calloc(1, sizeof(**out));
    (*out)->rank = config->rank;
    (*out)->device = m->device;
    fake_live_adapters++;
    fake_devices[m->device].adapters++;
    return 0;
}

int tb_adapter_create_from(struct tb_adapter **out, struct tb_model *m,
                           const struct tb_adapter_state *s, bool with_optimizer,
                           struct tb_error *err)
{
    return tb_adapter_create(out, m, &s->lora, err);
}

int tb_adapter_restore(struct tb_adapter *a, const struct tb_adapter_state *s, bool with_optimizer,
                       struct tb_error *err)
{
    return 0;
}

int tb_adapter_export(struct tb_adapter *a, bool with_optimizer, struct tb_adapter_state **out,
                      struct tb_error *err)
{
    *out = tb_adapter_state_create();
    (*out)->lora.rank = a->rank;
    record(FAKE_EXPORT, 1, 0);
    return 0;
}

void tb_adapter_free(struct tb_adapter *a)
{
    if (!a) return;
    fake_live_adapters--;
    fake_devices[a->device].adapters--;
    tb_free(a);
}

static struct tb_adapter_version *new_version(int device, int content)
{
    struct tb_adapter_version *v = tb_calloc(1, sizeof(*v));
    v->refs = 1;
    v->device = device;
    v->content = content;
    fake_live_versions++;
    fake_devices[device].versions++;
    return v;
}

int tb_adapter_publish(struct tb_adapter *a, struct tb_adapter_version **out, struct tb_error *err)
{
    *out = new_version(a->device, ++last_content);
    record(FAKE_PUBLISH, 1, 0);
    return 0;
}

int tb_version_create_from(struct tb_adapter_version **out, struct tb_model *m,
                           const struct tb_adapter_state *s, struct tb_error *err)
{
    *out = new_version(m->device, ++last_content);
    return 0;
}

void tb_version_unref(struct tb_adapter_version *v)
{
    if (!v || --v->refs) return;
    fake_live_versions--;
    fake_devices[v->device].versions--;
    tb_free(v);
}

static void stand(enum fake_hold at)
{
    while (fake_hold == (int)at) {
        fake_held = at;
        usleep(100);
    }
    fake_held = FAKE_HOLD_NONE;
}

int tb_version_lend(struct tb_adapter_version *v, struct tb_loan *out, struct tb_error *err)
{
    stand(FAKE_HOLD_LEND);
    v->refs++;
    fake_loans++;
    *out = (struct tb_loan){.version = v};
    return 0;
}

int tb_version_borrow(struct tb_adapter_version **out, struct tb_model *m,
                      const struct tb_loan *loan, struct tb_error *err)
{
    stand(FAKE_HOLD_BORROW);
    use(m->be, TB_QUEUE_TRAIN);
    if (m->be->lost) return sync_device(m->be, err);
    if (fake_devices[m->device].full) return tb_error_set(err, TB_ENOMEM, "no room");
    TB_BUG_ON(loan->version->device == m->device);
    *out = new_version(m->device, loan->version->content);
    return 0;
}

void tb_loan_return(struct tb_loan *loan)
{
    stand(FAKE_HOLD_RETURN);
    tb_version_unref(loan->version);
    fake_loans--;
}

int tb_training_create(struct tb_training **out, struct tb_adapter *a, struct tb_op *op,
                       const struct tb_graph *graph)
{
    fake_with_graph += graph != NULL;
    if (op->u.forward_backward.n_data == 0)
        return tb_error_set(&op->error, TB_EINVAL, "there are no data");
    *out = tb_calloc(1, sizeof(**out));
    (*out)->op = op;
    fake_live_trainings++;
    return 0;
}

const struct tb_error *tb_training_error(const struct tb_training *t)
{
    return &t->op->error;
}

void tb_training_fail(struct tb_training *t, const struct tb_error *why)
{
    t->op->error = *why;
}

/* One shard: nothing is ever spread. */
int tb_training_n_shards(const struct tb_training *t)
{
    return 1;
}

int tb_training_shard_end(const struct tb_training *t, int shard)
{
    abort();
}

void tb_training_compute_to(struct tb_training *t, int shard)
{
    abort();
}

bool tb_training_waits(const struct tb_training *t)
{
    abort();
}

void tb_training_share(struct tb_training **out, const struct tb_training *of,
                       struct tb_adapter_version *ver, int from, int to)
{
    abort();
}

int tb_training_collect(struct tb_training *t, const struct tb_training *share,
                        struct tb_error *err)
{
    abort();
}

int tb_training_reserve(struct tb_training *t, struct tb_error *err)
{
    if (!t->reserved && fake_reserved == fake_max_reserved)
        return tb_error_set(err, TB_ENOMEM, "no room");
    fake_reserved += !t->reserved;
    t->reserved = true;
    return 0;
}

void tb_training_destroy(struct tb_training *t)
{
    if (!t) return;
    fake_reserved -= t->reserved;
    fake_live_trainings--;
    tb_free(t);
}

bool tb_training_done(const struct tb_training *t)
{
    return t->n_through == t->op->u.forward_backward.n_data;
}

int tb_model_train(struct tb_model *m, const struct tb_train_part *parts, int n,
                   struct tb_error *err)
{
    record(FAKE_TRAIN, n, parts[0].training->op->seq_id);
    for (int i = 0; i < n; i++) {
        struct tb_training *t = parts[i].training;
        TB_BUG_ON(!t->reserved);
        t->n_through += parts[i].n_data;
        note_start(t->op->seq_id);
    }
    pause_at_gate();
    if (fake_train_us) usleep(fake_train_us);
    return 0;
}

int tb_graph_create(struct tb_graph **out, const char *text, size_t n, struct tb_error *err)
{
    if (n == 0) return tb_error_set(err, TB_EPARSE, "no text");
    *out = tb_calloc(1, sizeof(**out));
    fake_live_graphs++;
    return 0;
}

void tb_graph_destroy(struct tb_graph *g)
{
    if (!g) return;
    fake_live_graphs--;
    tb_free(g);
}

void tb_adapter_optim_step(struct tb_adapter *a, struct tb_op *op)
{
    record(FAKE_OPTIM, 1, op->seq_id);
}

int tb_sampling_create(struct tb_sampling **out, struct tb_model *m,
                       struct tb_adapter_version *version, struct tb_op *op)
{
    if (op->u.sample.max_tokens < 1)
        return tb_error_set(&op->error, TB_EINVAL, "max_tokens %d", op->u.sample.max_tokens);
    *out = tb_calloc(1, sizeof(**out));
    (*out)->op = op;
    (*out)->version = version;
    TB_BUG_ON(version && version->device != m->device);
    if (version) version->refs++;
    fake_live_samplings++;
    fake_devices[m->device].samples++;
    if (op->seq_id >= 0 && op->seq_id < FAKE_MAX_SEQ) {
        fake_sampled_on[op->seq_id] = m->device;
        fake_content[op->seq_id] = version ? version->content : 0;
    }
    return 0;
}

void tb_sampling_destroy(struct tb_sampling *s)
{
    tb_version_unref(s->version);
    fake_live_samplings--;
    tb_free(s);
}

bool tb_sampling_begun(const struct tb_sampling *s)
{
    return s->done > 0;
}

void tb_model_kv_stats(const struct tb_model *m, struct tb_kv_stats *sum)
{
    sum->n_pages += 5;
    sum->n_free += 5;
}

bool tb_sampling_done(const struct tb_sampling *s)
{
    return s->done >= s->op->u.sample.max_tokens;
}

struct tb_progress *tb_sampling_progress(struct tb_sampling *s)
{
    size_t n = (size_t)(s->done - s->told);
    if (!s->op->u.sample.stream || n == 0) return NULL;
    struct tb_progress *p = tb_calloc(1, sizeof(*p) + n * sizeof(p->tokens[0]));
    for (; s->told < s->done; s->told++)
        p->tokens[p->n++].token = s->told;
    return p;
}

int tb_model_sample_step(struct tb_model *m, struct tb_sampling *const *s, int n,
                         int prefill_budget, int *n_rows, struct tb_error *err)
{
    use(m->be, TB_QUEUE_SAMPLE);
    if (m->be->lost) return sync_device(m->be, err);
    record(FAKE_SAMPLE_STEP, n, s[0]->op->seq_id);
    for (int i = 0; i < n; i++) {
        s[i]->done++;
        note_start(s[i]->op->seq_id);
    }
    *n_rows = n;
    pause_at_gate();
    if (fake_sample_us) usleep(fake_sample_us);
    return 0;
}
