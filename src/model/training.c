/*
 * One op in training: its validation, its shards and the memory of their gradients, and how it
 * ends. The passes that compute its data are train.c's. See model.h.
 *
 * An op's data are cut into shards, by their tokens alone. Each has sums of its own (gradient,
 * loss, metrics), and they are added up in order; so devices that compute shards at the same time
 * give the bits of one that computes them in turn.
 *
 * Owner: the caller of tb_training_create. Thread: the model's.
 */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "model/custom/graph.h"
#include "model/train.h"
#include "util/mem.h"

/* A gradient comes from another device by pieces of so many bytes. */
#define COLLECT_BYTES ((size_t)32 << 20)

void tb_train_fail(struct tb_training *t, int code, const char *fmt, ...)
{
    if (t->failed) return;
    t->failed = true;
    char msg[sizeof(t->error->msg)];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(msg, sizeof(msg), fmt, ap);
    va_end(ap);
    tb_error_set(t->error, code, "%s", msg);
}

/* ---- the op */

/* Checks the data against the graph of a custom loss. */
static int check_graph(const struct tb_training *t, struct tb_error *err)
{
    const struct tb_forward_backward *fb = &t->op->u.forward_backward;
    if (!t->graph)
        return tb_error_set(err, TB_ENOTFOUND, "there is no custom loss '%.128s' in this session",
                            fb->config[0].text);
    for (int i = 0; i < fb->n_data; i++)
        if (tb_graph_check_datum(t->graph, &fb->data[i], t->inputs[i].two_d, err))
            return tb_error_prefix(err, "datum %d", i);
    return 0;
}

/* Arrays of the op's results. */
static int make_outputs(struct tb_training *t, struct tb_error *err)
{
    const struct tb_forward_backward *fb = &t->op->u.forward_backward;
    struct tb_output *out = tb_arena_try_array(&t->op->arena, (size_t)fb->n_data, sizeof(*out));
    for (int i = 0; i < fb->n_data && out; i++) {
        const struct tb_loss_inputs *in = &t->inputs[i];
        out[i] = (struct tb_output){.n = in->n, .k = in->two_d ? in->k : 0};
        out[i].logprobs =
            tb_arena_try_array(&t->op->arena, (size_t)in->n * (size_t)in->k, sizeof(float));
        if (!out[i].logprobs) out = NULL;
    }
    if (!out) return tb_error_set(err, TB_ENOMEM, "no memory for %d results", fb->n_data);
    t->outputs = out;
    return 0;
}

/* Cuts the data where the tokens before them pass a multiple of a shard's. */
static void cut_shards(struct tb_training *t)
{
    const struct tb_forward_backward *fb = &t->op->u.forward_backward;
    uint64_t total = 0, at = 0, size, cut = 0;
    for (int i = 0; i < fb->n_data; i++)
        total += (uint64_t)t->inputs[i].n;
    size = TB_MAX((uint64_t)t->m->shard_tokens, (total + TB_MAX_SHARDS - 1) / TB_MAX_SHARDS);
    t->shards = tb_arena_calloc(&t->arena, TB_MAX_SHARDS, sizeof(*t->shards));
    for (int i = 0; i < fb->n_data; i++) {
        if (t->m->shard_tokens && at / size > cut && t->n_shards < TB_MAX_SHARDS - 1) {
            cut = at / size;
            t->shards[t->n_shards++].end = i;
        }
        at += (uint64_t)t->inputs[i].n;
    }
    t->shards[t->n_shards++].end = fb->n_data;
}

/* Sums of a custom loss's metrics: of each shard, of the op, and of one datum. */
static void make_metrics(struct tb_training *t)
{
    size_t n = (size_t)tb_graph_n_metrics(t->graph);
    for (int i = 0; i < t->n_shards; i++)
        t->shards[i].metrics = tb_arena_calloc(&t->arena, n, sizeof(double));
    t->metrics = tb_arena_calloc(&t->arena, n, sizeof(double));
    t->one = tb_arena_calloc(&t->arena, n, sizeof(double));
}

static int prepare(struct tb_training *t, struct tb_error *err)
{
    const struct tb_model *m = t->m;
    const struct tb_forward_backward *fb = &t->op->u.forward_backward;
    int rc = tb_loss_find(fb->loss_fn, &t->loss, err);
    if (rc) return rc;
    struct tb_loss_inputs *inputs =
        tb_arena_try_array(&t->arena, (size_t)TB_MAX(fb->n_data, 1), sizeof(*inputs));
    if (!inputs) return tb_error_set(err, TB_ENOMEM, "no memory for %d data", fb->n_data);
    t->inputs = inputs;
    rc = tb_loss_prepare(t->loss, fb, m->cfg.vocab, m->opt.max_context, &t->arena, inputs, err);
    if (!rc && t->loss->custom) rc = check_graph(t, err);
    if (!rc) rc = make_outputs(t, err);
    if (rc) return rc;
    cut_shards(t);
    if (t->graph) make_metrics(t);
    tb_training_compute_to(t, t->n_shards);
    return 0;
}

/* ---- gradients, which are a file of their own when they are out between two calls. Before the
 * first datum of a shard is through its gradient is zero, and needs none. */

static size_t flat_bytes(const struct tb_training *t)
{
    return tb_lora_flat_bytes(t->ver->layout);
}

static float *alloc_flat(struct tb_training *t, struct tb_error *err)
{
    float *p = tb_lora_alloc_flat(t->m, t->ver->layout);
    if (!p) tb_backend_no_memory(t->m->be, err, flat_bytes(t), "the gradients");
    return p;
}

static void free_flat(struct tb_training *t, float **p)
{
    tb_lora_free_flat(t->m, t->ver->layout, *p);
    *p = NULL;
}

static void free_gradients(struct tb_training *t)
{
    tb_paged_forget(&t->page);
    free_flat(t, &t->sum);
    free_flat(t, &t->scratch);
    for (int i = 0; i < t->n_shards; i++)
        free_flat(t, &t->shards[i].grad);
}

static size_t gradient_bytes(const struct tb_training *t) /* in memory, that page_out frees */
{
    return (size_t)((t->sum != NULL) + (t->scratch != NULL)) * flat_bytes(t);
}

static bool shard_has_begun(const struct tb_training *t)
{
    return t->n_through > (t->shard ? t->shards[t->shard - 1].end : 0);
}

static int page_out(struct tb_paged *x, struct tb_error *err)
{
    struct tb_training *t = TB_CONTAINER_OF(x, struct tb_training, page);
    struct tb_page_part parts[2];
    unsigned out = 0;
    int n = 0;
    if (t->sum) {
        parts[n++] = (struct tb_page_part){t->sum, flat_bytes(t)};
        out |= 1;
    }
    if (t->scratch && shard_has_begun(t)) {
        parts[n++] = (struct tb_page_part){t->scratch, flat_bytes(t)};
        out |= 2;
    }
    int rc = n ? tb_page_write(x, parts, n, err) : 0;
    if (rc) return rc;
    free_flat(t, &t->sum);
    free_flat(t, &t->scratch);
    t->out = out;
    return 0;
}

static int page_in(struct tb_training *t, struct tb_error *err)
{
    struct tb_page_part parts[2];
    float **arrays[2] = {&t->sum, &t->scratch};
    int n = 0, rc = 0;
    for (unsigned i = 0; i < 2 && !rc; i++) {
        if (!(t->out & 1u << i)) continue;
        *arrays[i] = alloc_flat(t, err);
        if (!*arrays[i]) rc = TB_ENOMEM;
        parts[n++] = (struct tb_page_part){*arrays[i], flat_bytes(t)};
    }
    if (!rc) rc = tb_page_read(&t->page, parts, n, err);
    if (rc) {
        free_flat(t, &t->sum);
        free_flat(t, &t->scratch);
        return rc;
    }
    t->out = 0;
    return 0;
}

/* The sums that there are, and room for the shard that is computed now. */
static int need_gradients(struct tb_training *t, struct tb_error *err)
{
    int rc = t->page.file ? page_in(t, err) : 0;
    if (rc || !t->backward || t->scratch || t->shard == t->end_shard) return rc;
    t->scratch = alloc_flat(t, err);
    if (!t->scratch) return TB_ENOMEM;
    t->m->be->ops->zero(t->m->be, t->scratch, flat_bytes(t));
    return 0;
}

int tb_training_hold(struct tb_training *t, struct tb_error *err)
{
    if (!t->held) {
        int rc = t->adapter ? tb_adapter_hold(t->adapter, err) : tb_version_hold(t->ver, err);
        if (rc) return rc;
        t->held = true;
        tb_paged_busy(&t->page);
    }
    return need_gradients(t, err);
}

void tb_training_release(struct tb_training *t)
{
    if (!t->held) return;
    t->held = false;
    if (t->adapter)
        tb_adapter_release(t->adapter);
    else
        tb_version_release(t->ver);
    if (gradient_bytes(t)) tb_paged_idle(&t->page, gradient_bytes(t));
}

size_t tb_training_hold_bytes(const struct tb_training *t)
{
    bool missing = t->backward && !t->scratch && !(t->out & 2) && t->shard < t->end_shard;
    size_t n = 0, more = missing;
    if (t->held) return more * flat_bytes(t);
    if (t->backward && t->page.pager) n = gradient_bytes(t) / flat_bytes(t);
    n += (t->out & 1) + (t->out >> 1) + more;
    return n * flat_bytes(t) +
           (t->adapter ? tb_adapter_idle_bytes(t->adapter) : tb_version_idle_bytes(t->ver));
}

int tb_training_reserve(struct tb_training *t, struct tb_error *err)
{
    if (t->sum || t->scratch || t->page.file) return 0;
    int rc = need_gradients(t, err);
    if (!rc && t->scratch) tb_paged_idle(&t->page, gradient_bytes(t));
    return rc;
}

/* ---- shards */

int tb_training_n_shards(const struct tb_training *t)
{
    return t->n_shards;
}

int tb_training_shard_end(const struct tb_training *t, int shard)
{
    return t->shards[shard].end;
}

void tb_training_compute_to(struct tb_training *t, int shard)
{
    t->end_shard = shard;
    t->n_data = t->shards[shard - 1].end;
}

bool tb_training_waits(const struct tb_training *t)
{
    return !t->done && t->shard == t->end_shard;
}

bool tb_training_at_shard(const struct tb_training *t)
{
    return t->n_begun >= t->shards[t->shard].end;
}

static void add_sums(struct tb_training *t, const struct tb_shard *s)
{
    t->loss_sum += s->loss_sum;
    for (int i = 0; t->graph && i < tb_graph_n_metrics(t->graph); i++)
        t->metrics[i] += s->metrics[i];
}

/* The present shard is through. */
static void end_shard(struct tb_training *t)
{
    struct tb_shard *s = &t->shards[t->shard++];
    if (t->failed) return;
    if (!t->adapter) {
        s->grad = t->scratch;
    } else {
        add_sums(t, s);
        if (!t->sum) {
            t->sum = t->scratch;
        } else {
            t->m->be->ops->add(t->m->be, t->sum, t->scratch, flat_bytes(t) / 4);
            free_flat(t, &t->scratch);
        }
    }
    t->scratch = NULL;
}

void tb_training_through(struct tb_training *t)
{
    t->n_through++;
    if (t->n_through == t->shards[t->shard].end) end_shard(t);
}

/* ---- shares: shards that another device computes */

void tb_training_share(struct tb_training **out, const struct tb_training *of,
                       struct tb_adapter_version *ver, int from, int to)
{
    struct tb_training *t = tb_calloc(1, sizeof(*t));
    t->m = ver->m;
    t->ver = ver;
    tb_version_ref(ver);
    t->op = of->op;
    t->error = &t->own_error;
    t->outputs = of->outputs;
    t->loss = of->loss;
    t->inputs = of->inputs;
    t->graph = of->graph;
    t->backward = of->backward;
    t->page.pager = NULL; /* collected soon */
    tb_list_init(&t->page.node);
    tb_arena_init(&t->arena);
    t->n_shards = of->n_shards;
    t->shards = tb_arena_calloc(&t->arena, TB_MAX_SHARDS, sizeof(*t->shards));
    for (int i = 0; i < t->n_shards; i++)
        t->shards[i].end = of->shards[i].end;
    if (t->graph) make_metrics(t);
    t->shard = from;
    t->n_begun = t->n_through = from ? t->shards[from - 1].end : 0;
    tb_training_compute_to(t, to);
    *out = t;
}

const struct tb_error *tb_training_error(const struct tb_training *t)
{
    return t->error;
}

void tb_training_fail(struct tb_training *t, const struct tb_error *why)
{
    tb_train_fail(t, why->code, "%s", why->msg);
    tb_training_finish(t);
}

/* sum += a gradient of another device. */
static int add_gradient(struct tb_training *t, const struct tb_training *share, const float *g,
                        struct tb_error *err)
{
    struct tb_backend *be = t->m->be;
    size_t n = flat_bytes(t), most = TB_MIN(n, COLLECT_BYTES);
    float *piece = be->ops->alloc(be, most);
    if (!piece) return tb_backend_no_memory(be, err, most, "gradients of another device");
    int rc = 0;
    for (size_t at = 0; at < n && !rc; at += most) {
        size_t bytes = TB_MIN(most, n - at);
        rc = be->ops->copy_from(be, piece, share->m->be, g + at / 4, bytes, err);
        if (!rc) be->ops->add(be, t->sum + at / 4, piece, bytes / 4);
    }
    if (!rc) rc = be->ops->sync(be, err);
    be->ops->free(be, piece, most);
    return rc;
}

/* Whether another device might do what this one could not. */
static bool is_machines(int code)
{
    return code == TB_ENOMEM || code == TB_EDEVICE || code == TB_ECANCELED;
}

int tb_training_collect(struct tb_training *t, const struct tb_training *share,
                        struct tb_error *err)
{
    struct tb_error e = {0};
    if (share->failed && is_machines(share->error->code)) {
        *err = *share->error;
        return err->code;
    }
    if (share->failed) tb_train_fail(t, share->error->code, "%s", share->error->msg);
    if (!t->failed && tb_training_hold(t, &e)) tb_train_fail(t, e.code, "%s", e.msg);
    for (int i = t->shard; i < share->end_shard && !t->failed; i++) {
        const struct tb_shard *s = &share->shards[i];
        if (t->backward && add_gradient(t, share, s->grad, &e))
            tb_train_fail(t, e.code, "%s", e.msg);
        add_sums(t, s);
    }
    tb_training_compute_to(t, share->end_shard);
    t->shard = t->end_shard;
    t->n_begun = t->n_through = t->n_data;
    tb_training_finish(t);
    return 0;
}

/* ---- life */

int tb_training_create(struct tb_training **out, struct tb_adapter *a, struct tb_op *op,
                       const struct tb_graph *graph)
{
    const struct tb_forward_backward *fb = &op->u.forward_backward;
    struct tb_training *t = tb_calloc(1, sizeof(*t));
    t->m = a->m;
    t->adapter = a;
    t->ver = a->cur;
    t->op = op;
    t->error = &op->error;
    t->graph = graph;
    t->backward = op->type == TB_OP_FORWARD_BACKWARD && !fb->forward_only;
    t->page = (struct tb_paged){.pager = a->m->opt.pager, .page_out = page_out};
    tb_list_init(&t->page.node);
    tb_arena_init(&t->arena);
    int rc = prepare(t, &op->error);
    if (rc) {
        tb_training_destroy(t);
        return rc;
    }
    *out = t;
    return 0;
}

void tb_training_destroy(struct tb_training *t)
{
    if (!t) return;
    tb_training_release(t);
    free_gradients(t);
    if (!t->adapter) tb_version_unref(t->ver);
    tb_arena_fini(&t->arena);
    tb_free(t);
}

bool tb_training_done(const struct tb_training *t)
{
    return t->done;
}

static void set_result(struct tb_training *t)
{
    struct tb_op *op = t->op;
    int n = t->graph ? tb_graph_n_metrics(t->graph) : 0, n_data = op->u.forward_backward.n_data;
    struct tb_metric *metrics = tb_arena_calloc(&op->arena, 1 + (size_t)n, sizeof(*metrics));
    metrics[0] = (struct tb_metric){"loss:sum", t->loss_sum};
    for (int i = 0; i < n; i++) {
        bool mean;
        const char *key = tb_graph_metric(t->graph, i, &mean);
        metrics[1 + i].key = tb_arena_strdup(&op->arena, key); /* the graph may go before the op */
        metrics[1 + i].value = mean ? t->metrics[i] / n_data : t->metrics[i];
    }
    op->result.n_outputs = n_data;
    op->result.outputs = t->outputs;
    op->result.n_metrics = 1 + n;
    op->result.metrics = metrics;
}

/* Checks the sums, and gives the gradient to the adapter. */
static void finish_op(struct tb_training *t)
{
    struct tb_backend *be = t->m->be;
    struct tb_error err = {0};
    if (t->backward && tb_training_hold(t, &err)) tb_train_fail(t, err.code, "%s", err.msg);
    if (!t->failed && !isfinite(t->loss_sum))
        tb_train_fail(t, TB_ENONFINITE, "the loss of the batch is not finite");
    if (!t->failed && t->sum && !isfinite(be->ops->sum_squares(be, t->sum, flat_bytes(t) / 4)))
        tb_train_fail(t, TB_ENONFINITE, "the gradient is not finite");
    if (!t->failed && be->ops->sync(be, &err)) tb_train_fail(t, err.code, "%s", err.msg);
    if (t->failed) return;
    if (t->sum) tb_adapter_add_grad(t->adapter, t->sum);
    t->sum = NULL;
    set_result(t);
}

void tb_training_finish(struct tb_training *t)
{
    if (!t->failed && (t->n_through < t->n_data || (t->adapter && t->end_shard < t->n_shards)))
        return;
    t->done = true;
    if (!t->failed && t->adapter) finish_op(t);
    tb_training_release(t);
    if (t->failed) free_gradients(t);
}
