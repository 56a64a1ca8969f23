/*
 * Training: validation, micro-batches over data of any ops, gradients into each op's scratch and,
 * when an op is whole and finite, into its adapter. See model.h.
 *
 * How an op is split into calls and micro-batches never shows: every row is computed by itself, and
 * an op's gradient is one sum over its data in order, a run of rows per datum.
 *
 * Owner: the caller of tb_training_create. Thread: the model's.
 */
#include "model/train.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "model/custom/graph.h"
#include "util/mem.h"

/* Rows of a micro-batch: a layer's activations stay in the last-level cache, and the weights are
 * read often enough for the products to hide it. */
#define TB_MAX_MICRO_ROWS 512

void tb_train_fail(struct tb_training *t, int code, const char *fmt, ...)
{
    if (t->failed) return;
    t->failed = true;
    char msg[sizeof(t->op->error.msg)];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(msg, sizeof(msg), fmt, ap);
    va_end(ap);
    tb_error_set(&t->op->error, code, "%s", msg);
}

/* ---- one op */

/* Checks the data against the graph of a custom loss. */
static int prepare_graph(struct tb_training *t, const struct tb_graph *graph, struct tb_error *err)
{
    const struct tb_forward_backward *fb = &t->op->u.forward_backward;
    if (!graph)
        return tb_error_set(err, TB_ENOTFOUND, "there is no custom loss '%.128s' in this session",
                            fb->config[0].text);
    for (int i = 0; i < fb->n_data; i++)
        if (tb_graph_check_datum(graph, &fb->data[i], t->inputs[i].two_d, err))
            return tb_error_prefix(err, "datum %d", i);
    size_t n = (size_t)tb_graph_n_metrics(graph);
    t->graph = graph;
    t->metrics = tb_arena_calloc(&t->arena, n, sizeof(*t->metrics));
    t->one = tb_arena_calloc(&t->arena, n, sizeof(*t->one));
    return 0;
}

/* Checks the op and makes its result arrays. */
static int prepare_op(struct tb_training *t, const struct tb_graph *graph, struct tb_error *err)
{
    struct tb_op *op = t->op;
    const struct tb_model *m = t->adapter->m;
    const struct tb_forward_backward *fb = &op->u.forward_backward;
    int rc = tb_loss_find(fb->loss_fn, &t->loss, err);
    if (rc) return rc;
    t->inputs = tb_arena_try_array(&t->arena, (size_t)TB_MAX(fb->n_data, 1), sizeof(*t->inputs));
    if (!t->inputs) return tb_error_set(err, TB_ENOMEM, "no memory for %d data", fb->n_data);
    rc = tb_loss_prepare(t->loss, fb, m->cfg.vocab, m->opt.max_context, &t->arena, t->inputs, err);
    if (!rc && t->loss->custom) rc = prepare_graph(t, graph, err);
    if (rc) return rc;
    struct tb_output *out = tb_arena_try_array(&op->arena, (size_t)fb->n_data, sizeof(*out));
    for (int i = 0; i < fb->n_data && out; i++) {
        const struct tb_loss_inputs *in = &t->inputs[i];
        out[i] = (struct tb_output){.n = in->n, .k = in->two_d ? in->k : 0};
        out[i].logprobs =
            tb_arena_try_array(&op->arena, (size_t)in->n * (size_t)in->k, sizeof(float));
        if (!out[i].logprobs) out = NULL;
    }
    if (!out) return tb_error_set(err, TB_ENOMEM, "no memory for %d results", fb->n_data);
    op->result.n_outputs = fb->n_data;
    op->result.outputs = out;
    return 0;
}

/* ---- memory of an op: its adapter's, and that of its own gradient, which is a file of its own
 * when it is out between two calls. Before the first datum is through it is zero, and needs none.
 */

static void free_scratch(struct tb_training *t)
{
    tb_paged_forget(&t->page);
    tb_adapter_free_flat(t->adapter, t->scratch);
    t->scratch = NULL;
}

static struct tb_page_part scratch_part(const struct tb_training *t)
{
    return (struct tb_page_part){t->scratch, tb_adapter_flat_bytes(t->adapter)};
}

static int scratch_page_out(struct tb_paged *x, struct tb_error *err)
{
    struct tb_training *t = TB_CONTAINER_OF(x, struct tb_training, page);
    struct tb_page_part part = scratch_part(t);
    int rc = t->n_through ? tb_page_write(x, &part, 1, err) : 0;
    if (rc) return rc;
    tb_adapter_free_flat(t->adapter, t->scratch);
    t->scratch = NULL;
    return 0;
}

static int scratch_page_in(struct tb_training *t, struct tb_error *err)
{
    struct tb_backend *be = t->adapter->m->be;
    t->scratch = tb_adapter_alloc_flat(t->adapter);
    struct tb_page_part part = scratch_part(t);
    if (!t->scratch) return tb_backend_no_memory(be, err, part.bytes, "the gradients");
    int rc = 0;
    if (t->page.file)
        rc = tb_page_read(&t->page, &part, 1, err);
    else
        be->ops->zero(be, t->scratch, part.bytes);
    if (!rc) return 0;
    tb_adapter_free_flat(t->adapter, t->scratch);
    t->scratch = NULL;
    return rc;
}

/* What is computed on stays in memory until release. */
static int hold(struct tb_training *t, struct tb_error *err)
{
    if (t->held) return 0;
    int rc = tb_adapter_hold(t->adapter, err);
    if (rc) return rc;
    t->held = true;
    tb_paged_busy(&t->page);
    return t->backward && !t->scratch ? scratch_page_in(t, err) : 0;
}

static void release(struct tb_training *t)
{
    if (!t->held) return;
    t->held = false;
    tb_adapter_release(t->adapter);
    if (t->scratch) tb_paged_idle(&t->page, scratch_part(t).bytes);
}

/* Bytes that hold takes, or keeps from being freed. */
static size_t hold_bytes(const struct tb_training *t)
{
    if (t->held) return 0;
    size_t own = t->backward && (t->page.pager || !t->scratch) ? scratch_part(t).bytes : 0;
    return own + tb_adapter_idle_bytes(t->adapter);
}

int tb_training_create(struct tb_training **out, struct tb_adapter *a, struct tb_op *op,
                       const struct tb_graph *graph)
{
    const struct tb_forward_backward *fb = &op->u.forward_backward;
    struct tb_training *t = tb_calloc(1, sizeof(*t));
    t->adapter = a;
    t->op = op;
    t->n_data = fb->n_data;
    t->backward = op->type == TB_OP_FORWARD_BACKWARD && !fb->forward_only;
    t->page = (struct tb_paged){.pager = a->m->opt.pager, .page_out = scratch_page_out};
    tb_list_init(&t->page.node);
    tb_arena_init(&t->arena);
    int rc = prepare_op(t, graph, &op->error);
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
    free_scratch(t);
    tb_arena_fini(&t->arena);
    tb_free(t);
}

bool tb_training_done(const struct tb_training *t)
{
    return t->done;
}

int tb_training_reserve(struct tb_training *t, struct tb_error *err)
{
    if (!t->backward || t->scratch || t->page.file) return 0;
    int rc = scratch_page_in(t, err);
    if (!rc) tb_paged_idle(&t->page, scratch_part(t).bytes);
    return rc;
}

/* All data are through, or one failed: the gradient joins the adapter's, or leaves no trace. */
static void finish_op(struct tb_training *t)
{
    struct tb_op *op = t->op;
    struct tb_model *m = t->adapter->m;
    struct tb_error err = {0};
    t->done = true;
    if (!t->failed && t->backward && hold(t, &err)) tb_train_fail(t, err.code, "%s", err.msg);
    if (!t->failed && !isfinite(t->loss_sum))
        tb_train_fail(t, TB_ENONFINITE, "the loss of the batch is not finite");
    if (!t->failed && t->scratch &&
        !isfinite(m->be->ops->sum_squares(m->be, t->scratch, (size_t)t->adapter->layout->n_floats)))
        tb_train_fail(t, TB_ENONFINITE, "the gradient is not finite");
    if (!t->failed && m->be->ops->sync(m->be, &err)) tb_train_fail(t, err.code, "%s", err.msg);
    if (t->failed) {
        release(t);
        free_scratch(t);
        op->result.n_outputs = 0;
        op->result.outputs = NULL;
        return;
    }
    if (t->scratch) tb_adapter_add_grad(t->adapter, t->scratch);
    t->scratch = NULL;
    release(t);
    int n = t->graph ? tb_graph_n_metrics(t->graph) : 0;
    struct tb_metric *metrics = tb_arena_calloc(&op->arena, 1 + (size_t)n, sizeof(*metrics));
    metrics[0] = (struct tb_metric){"loss:sum", t->loss_sum};
    for (int i = 0; i < n; i++) {
        bool mean;
        const char *key = tb_graph_metric(t->graph, i, &mean);
        metrics[1 + i].key = tb_arena_strdup(&op->arena, key); /* the graph may go before the op */
        metrics[1 + i].value = mean ? t->metrics[i] / t->n_data : t->metrics[i];
    }
    op->result.n_metrics = 1 + n;
    op->result.metrics = metrics;
}

/* ---- one micro-batch */

struct micro {
    int n, cap, T, ru;
    enum tb_pass_kind kind;
    bool backward;
    struct tb_datum_run *runs;
};

struct micro_host { /* host arrays of a micro-batch */
    int32_t *tokens, *pos;
    struct tb_attn_seq *seqs;
    struct tb_lora_rows *lora, *grads;
    float *g;
};

static int alloc_micro(struct micro_host *a, const struct micro *b, struct tb_error *err)
{
    size_t T = (size_t)b->T, n = (size_t)b->n, n_g = 0;
    for (int i = 0; i < b->n; i++)
        n_g += (size_t)b->runs[i].in->n * (size_t)b->runs[i].in->k;
    a->tokens = tb_try_malloc(T * sizeof(*a->tokens));
    a->pos = tb_try_malloc(T * sizeof(*a->pos));
    a->seqs = tb_try_calloc(n, sizeof(*a->seqs));
    a->lora = tb_try_calloc(n, sizeof(*a->lora));
    a->grads = tb_try_calloc(n, sizeof(*a->grads));
    if (b->backward) a->g = tb_try_calloc(n_g, sizeof(*a->g));
    if (!a->tokens || !a->pos || !a->seqs || !a->lora || !a->grads || (b->backward && !a->g))
        return tb_error_set(err, TB_ENOMEM, "no memory for a batch of %d tokens", b->T);
    return 0;
}

static void free_micro(struct micro_host *a)
{
    tb_free(a->tokens);
    tb_free(a->pos);
    tb_free(a->seqs);
    tb_free(a->lora);
    tb_free(a->grads);
    tb_free(a->g);
}

/* Packs the data's rows: tokens, positions, sequences and LoRA runs. */
static void pack_micro(struct micro_host *a, const struct micro *b, struct tb_pass *p)
{
    int row = 0, n_lora = 0;
    float *g = a->g;
    for (int i = 0; i < b->n; i++) {
        struct tb_datum_run *r = &b->runs[i];
        const struct tb_datum *d = &r->op->op->u.forward_backward.data[r->index];
        const struct tb_adapter *ad = r->op->adapter;
        int n = r->in->n;
        r->row = row;
        if (g) {
            r->g = g;
            g += (size_t)n * (size_t)r->in->k;
        }
        memcpy(a->tokens + row, d->tokens, (size_t)n * sizeof(*a->tokens));
        for (int j = 0; j < n; j++)
            a->pos[row + j] = j;
        a->seqs[i] = (struct tb_attn_seq){.row = row, .n = n};
        a->grads[i] = (struct tb_lora_rows){row, n, ad->cur, r->op->scratch};
        if (n_lora && a->lora[n_lora - 1].ver == ad->cur)
            a->lora[n_lora - 1].n += n;
        else
            a->lora[n_lora++] = (struct tb_lora_rows){row, n, ad->cur, NULL};
        const struct tb_lora_config *c = &ad->layout->config;
        p->grad_attn |= c->train_attn;
        p->grad_mlp |= c->train_mlp;
        p->grad_unembed |= c->train_unembed;
        row += n;
    }
    p->tokens = a->tokens;
    p->pos = a->pos;
    p->seqs = a->seqs;
    p->n_seqs = b->n;
    p->lora = a->lora;
    p->n_lora = n_lora;
    p->grads = a->grads;
    p->n_grads = b->n;
}

static int run_micro(struct tb_model *m, const struct micro *b, struct tb_error *err)
{
    struct micro_host a = {0};
    struct tb_pass p = {.m = m, .kind = b->kind, .T = b->T, .ru = b->ru};
    const struct tb_backend_ops *ops = m->be->ops;
    bool any = false;
    int longest = 0;
    for (int i = 0; i < b->n; i++)
        longest = TB_MAX(longest, b->runs[i].in->n);
    int rc = alloc_micro(&a, b, err);
    if (!rc) rc = tb_model_need_rope(m, longest, err);
    if (!rc) pack_micro(&a, b, &p);
    if (!rc) rc = tb_pass_init(&p, &m->train_ws, b->backward, err);
    if (rc) goto out;
    tb_pass_forward(&p);
    rc = tb_head_train(&p, b->runs, b->n, b->backward, &any, err);
    if (!rc && any && (p.grad_attn || p.grad_mlp)) {
        int d = m->cfg.hidden;
        ops->zero(m->be, p.dx, (size_t)p.T * (size_t)d * 4);
        ops->rmsnorm_bwd(m->be, p.x[m->cfg.n_layers], m->norm, p.rstd_final, p.dxn, p.T, d, p.dx);
        tb_pass_backward(&p);
    }
    if (!rc) rc = ops->sync(m->be, err);
    for (int i = 0; i < b->n; i++)
        b->runs[i].op->loss_sum += b->runs[i].loss;
out:
    tb_pass_fini(&p);
    free_micro(&a);
    return rc;
}

/* ---- splitting */

struct batch {
    struct tb_model *m;
    const struct tb_train_part *parts;
    int n_parts;
    int ru;
    bool backward;
    bool any_graph; /* some op has a custom loss */
    int max_rows;
};

static void plan(struct batch *b)
{
    struct tb_model *m = b->m;
    enum tb_pass_kind kind = b->backward ? TB_PASS_KEEP : TB_PASS_INFER;
    size_t fixed = tb_pass_bytes(m, kind, b->backward, 16, b->ru);
    size_t per_row = (tb_pass_bytes(m, kind, b->backward, 1040, b->ru) - fixed) / 1024 + 1;
    size_t rows = m->soft_bytes > fixed ? (m->soft_bytes - fixed) / per_row : 0;
    b->max_rows = (int)TB_MIN(rows, TB_MAX_MICRO_ROWS);
}

/* How a micro-batch of T rows runs, or -1 when it would take too much memory (*need bytes). One
 * long datum keeps its activations where that moves nobody out of memory, else it computes them
 * twice. */
static int choose_kind(const struct batch *b, int T, size_t room, size_t *need)
{
    struct tb_model *m = b->m;
    size_t most = TB_MIN(m->hard_bytes, room);
    if (b->backward) {
        *need = tb_pass_bytes(m, TB_PASS_KEEP, true, T, b->ru);
        if (*need <= room && (T <= b->max_rows || *need <= m->soft_bytes ||
                              (*need <= m->hard_bytes && tb_backend_fits(m->be, *need))))
            return TB_PASS_KEEP;
        *need = tb_pass_bytes(m, TB_PASS_RECOMPUTE, true, T, b->ru);
        return *need <= most ? TB_PASS_RECOMPUTE : -1;
    }
    *need = tb_pass_bytes(m, TB_PASS_INFER, false, T, b->ru);
    return *need <= most ? TB_PASS_INFER : -1;
}

/* Whether there is memory for t and a micro-batch of T rows beside what is held and `spare`. */
static bool fits(const struct batch *b, const struct tb_training *t, int T, size_t spare)
{
    size_t room = tb_backend_room(b->m->be), own = hold_bytes(t) + spare, need;
    if (room == SIZE_MAX) return true;
    return own <= room && choose_kind(b, T, room - own, &need) >= 0;
}

/* Runs the micro-batch; a failure other than a lost device fails the ops in it. */
static int flush(struct batch *b, struct micro *mb, struct tb_error *err)
{
    if (mb->n == 0) return 0;
    struct tb_error e = {0};
    size_t need, room = tb_backend_room(b->m->be);
    int kind = choose_kind(b, mb->T, room, &need), rc;
    if (kind < 0) {
        rc = tb_error_set(
            &e, TB_ENOMEM,
            "datum %d: %d tokens need %.1f MiB of activations; there is room for %.1f MiB",
            mb->runs[0].index, mb->T, (double)need / (1 << 20),
            (double)TB_MIN(room, b->m->hard_bytes) / (1 << 20));
    } else {
        mb->kind = (enum tb_pass_kind)kind;
        rc = run_micro(b->m, mb, &e);
    }
    for (int i = 0; i < mb->n && rc; i++)
        tb_train_fail(mb->runs[i].op, rc, "%s", e.msg);
    for (int i = 0; i < mb->n; i++)
        mb->runs[i].op->n_through++;
    mb->n = mb->T = 0;
    if (rc == TB_EDEVICE) return tb_error_set(err, rc, "%s", e.msg);
    return 0;
}

static void release_all(struct batch *b)
{
    for (int i = 0; i < b->n_parts; i++)
        release(b->parts[i].training);
}

/* Adds a datum to the micro-batch, which runs first when there is no room for it. */
static int add_datum(struct batch *b, struct micro *mb, struct tb_training *t, struct tb_error *err)
{
    int index = t->n_begun++, n = t->inputs[index].n, rc = 0;
    struct tb_error e = {0};
    /* What a custom loss takes is known when it runs: without much room its data run alone. */
    size_t spare = b->any_graph ? TB_GRAPH_MAX_BYTES : 0;
    if (mb->n && (mb->T + n > b->max_rows || !fits(b, t, mb->T + n, spare))) rc = flush(b, mb, err);
    if (!mb->n && !fits(b, t, n, spare)) release_all(b); /* held from micro-batches before */
    if (!rc && !t->failed && hold(t, &e)) tb_train_fail(t, e.code, "%s", e.msg);
    if (rc || t->failed) return rc;
    if (mb->n == mb->cap) {
        mb->cap = mb->cap ? mb->cap * 2 : 64;
        mb->runs = tb_realloc(mb->runs, (size_t)mb->cap * sizeof(*mb->runs));
    }
    mb->runs[mb->n++] = (struct tb_datum_run){.op = t,
                                              .index = index,
                                              .in = &t->inputs[index],
                                              .lp = t->op->result.outputs[index].logprobs};
    mb->T += n;
    return 0;
}

/* Runs the parts that want, or do not want, a gradient. */
static int run_parts(struct tb_model *m, const struct tb_train_part *parts, int n, bool backward,
                     struct tb_error *err)
{
    struct batch b = {.m = m, .parts = parts, .n_parts = n, .backward = backward};
    bool any = false;
    int rc = 0;
    for (int i = 0; i < n; i++) {
        const struct tb_training *t = parts[i].training;
        if (t->backward != backward || t->failed) continue;
        b.ru = TB_MAX(b.ru, t->adapter->layout->config.rank);
        b.any_graph |= t->graph != NULL;
        any = true;
    }
    if (!any) return 0;
    struct micro mb = {.ru = b.ru, .backward = backward};
    struct tb_error e = {0};
    if (backward && tb_model_prepare_bwd(m, &e)) {
        for (int i = 0; i < n; i++)
            if (parts[i].training->backward) tb_train_fail(parts[i].training, e.code, "%s", e.msg);
        return 0;
    }
    plan(&b);
    for (int i = 0; i < n && !rc; i++) {
        struct tb_training *t = parts[i].training;
        if (t->backward != backward) continue;
        for (int j = 0; j < parts[i].n_data && t->n_begun < t->n_data && !t->failed && !rc; j++)
            rc = add_datum(&b, &mb, t, err);
    }
    if (!rc) rc = flush(&b, &mb, err);
    release_all(&b);
    tb_free(mb.runs);
    return rc;
}

int tb_model_train(struct tb_model *m, const struct tb_train_part *parts, int n,
                   struct tb_error *err)
{
    int rc = run_parts(m, parts, n, true, err);
    if (!rc) rc = run_parts(m, parts, n, false, err);
    for (int i = 0; i < n; i++) {
        struct tb_training *t = parts[i].training;
        if (rc) tb_train_fail(t, rc, "%s", err->msg);
        if (!t->done && (t->failed || t->n_through == t->n_data)) finish_op(t);
    }
    return rc;
}
