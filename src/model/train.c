/*
 * Training calls: validation, micro-batches over the data of all ops, gradients into each op's
 * scratch and, when an op is whole and finite, into its adapter. See model.h.
 *
 * How a batch is split never shows: every row is computed by itself, and an op's gradient is one
 * sum over its data in order, a run of rows per datum.
 *
 * Owner: tb_model_train for the length of the call. Thread: the model's.
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

void tb_train_fail(struct tb_train_op *op, int code, const char *fmt, ...)
{
    if (op->failed) return;
    op->failed = true;
    char msg[sizeof(op->op->error.msg)];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(msg, sizeof(msg), fmt, ap);
    va_end(ap);
    tb_error_set(&op->op->error, code, "%s", msg);
}

/* ---- one op */

/* Checks the data against the graph of a custom loss. */
static int prepare_graph(struct tb_train_op *t, const struct tb_graph *graph,
                         struct tb_arena *arena, struct tb_error *err)
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
    t->metrics = tb_arena_calloc(arena, n, sizeof(*t->metrics));
    t->one = tb_arena_calloc(arena, n, sizeof(*t->one));
    return 0;
}

/* Checks the op and makes its result arrays. Failures are left in op->error. */
static void prepare_op(struct tb_model *m, struct tb_train_op *t, struct tb_train_item *item,
                       struct tb_arena *arena)
{
    struct tb_op *op = item->op;
    const struct tb_forward_backward *fb = &op->u.forward_backward;
    struct tb_error err = {0};
    *t = (struct tb_train_op){.adapter = item->adapter, .op = op, .n_data = fb->n_data};
    t->backward = op->type == TB_OP_FORWARD_BACKWARD && !fb->forward_only;
    int rc = tb_loss_find(fb->loss_fn, &t->loss, &err);
    t->inputs =
        rc ? NULL : tb_arena_try_array(arena, (size_t)TB_MAX(fb->n_data, 1), sizeof(*t->inputs));
    if (!rc && !t->inputs) rc = tb_error_set(&err, TB_ENOMEM, "no memory for %d data", fb->n_data);
    if (!rc)
        rc = tb_loss_prepare(t->loss, fb, m->cfg.vocab, m->opt.max_context, arena, t->inputs, &err);
    if (!rc && t->loss->custom) rc = prepare_graph(t, item->graph, arena, &err);
    struct tb_output *out = NULL;
    if (!rc && !(out = tb_arena_try_array(&op->arena, (size_t)fb->n_data, sizeof(*out))))
        rc = tb_error_set(&err, TB_ENOMEM, "no memory for %d results", fb->n_data);
    for (int i = 0; i < fb->n_data && !rc; i++) {
        const struct tb_loss_inputs *in = &t->inputs[i];
        out[i] = (struct tb_output){.n = in->n, .k = in->two_d ? in->k : 0};
        out[i].logprobs =
            tb_arena_try_array(&op->arena, (size_t)in->n * (size_t)in->k, sizeof(float));
        if (!out[i].logprobs)
            rc = tb_error_set(&err, TB_ENOMEM, "no memory for %d results", fb->n_data);
    }
    if (rc) {
        tb_train_fail(t, rc, "%s", err.msg);
        return;
    }
    op->result.n_outputs = fb->n_data;
    op->result.outputs = out;
}

static void free_scratch(struct tb_train_op *t)
{
    if (!t->scratch) return;
    t->adapter->m->be->ops->free(t->adapter->m->be, t->scratch, tb_adapter_flat_bytes(t->adapter));
    t->scratch = NULL;
}

static void need_scratch(struct tb_train_op *t)
{
    const struct tb_backend_ops *ops = t->adapter->m->be->ops;
    size_t bytes = tb_adapter_flat_bytes(t->adapter);
    if (t->scratch || t->failed) return;
    t->scratch = ops->alloc(t->adapter->m->be, bytes);
    if (t->scratch)
        ops->zero(t->adapter->m->be, t->scratch, bytes);
    else
        tb_train_fail(t, TB_ENOMEM, "no memory for %zu MiB of gradients", bytes >> 20);
}

/* All data are through: the gradient joins the adapter's, or leaves no trace. */
static void finish_op(struct tb_train_op *t)
{
    struct tb_op *op = t->op;
    struct tb_model *m = t->adapter->m;
    if (!t->failed && !isfinite(t->loss_sum))
        tb_train_fail(t, TB_ENONFINITE, "the loss of the batch is not finite");
    if (!t->failed && t->scratch &&
        !isfinite(m->be->ops->sum_squares(m->be, t->scratch, (size_t)t->adapter->layout->n_floats)))
        tb_train_fail(t, TB_ENONFINITE, "the gradient is not finite");
    if (t->failed) {
        free_scratch(t);
        op->result.n_outputs = 0;
        op->result.outputs = NULL;
        return;
    }
    if (t->scratch) tb_adapter_add_grad(t->adapter, t->scratch);
    t->scratch = NULL;
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
    int n, T, ru;
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
    struct tb_train_op *ops;
    int n_ops, ru;
    bool backward;
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

/* How a micro-batch of T rows runs, or -1 when it would take too much memory (*need bytes). */
static int choose_kind(const struct batch *b, int T, size_t *need)
{
    struct tb_model *m = b->m;
    if (b->backward) {
        *need = tb_pass_bytes(m, TB_PASS_KEEP, true, T, b->ru);
        if (T <= b->max_rows || *need <= m->soft_bytes) return TB_PASS_KEEP;
        *need = tb_pass_bytes(m, TB_PASS_RECOMPUTE, true, T, b->ru);
        return *need <= m->hard_bytes ? TB_PASS_RECOMPUTE : -1;
    }
    *need = tb_pass_bytes(m, TB_PASS_INFER, false, T, b->ru);
    return *need <= m->hard_bytes ? TB_PASS_INFER : -1;
}

/* Runs the micro-batch; a failure other than a lost device fails the ops in it. */
static int flush(struct batch *b, struct micro *mb, struct tb_error *err)
{
    if (mb->n == 0) return 0;
    struct tb_error e = {0};
    size_t need;
    int kind = choose_kind(b, mb->T, &need), rc;
    if (kind < 0) {
        rc = tb_error_set(&e, TB_ENOMEM,
                          "datum %d: %d tokens need %zu MiB of activations; the limit is %zu MiB",
                          mb->runs[0].index, mb->T, need >> 20, b->m->hard_bytes >> 20);
    } else {
        mb->kind = (enum tb_pass_kind)kind;
        rc = run_micro(b->m, mb, &e);
    }
    for (int i = 0; i < mb->n && rc; i++)
        tb_train_fail(mb->runs[i].op, rc, "%s", e.msg);
    for (int i = 0; i < mb->n; i++) {
        struct tb_train_op *t = mb->runs[i].op;
        t->n_done++;
    }
    mb->n = mb->T = 0;
    if (rc == TB_EDEVICE) return tb_error_set(err, rc, "%s", e.msg);
    return 0;
}

static int run_batch(struct batch *b, struct tb_error *err)
{
    struct micro mb = {.ru = b->ru, .backward = b->backward};
    int cap = 0, rc = 0, first_open = 0;
    plan(b);
    for (int i = 0; i < b->n_ops && !rc; i++) {
        struct tb_train_op *t = &b->ops[i];
        if (t->backward != b->backward) continue;
        for (int j = 0; j < t->n_data && !rc && !t->failed; j++) {
            int n = t->inputs[j].n;
            if (mb.n && mb.T + n > b->max_rows) rc = flush(b, &mb, err);
            if (rc || t->failed) break;
            if (b->backward) need_scratch(t);
            if (t->failed) break;
            if (mb.n == cap) {
                cap = cap ? cap * 2 : 64;
                mb.runs = tb_realloc(mb.runs, (size_t)cap * sizeof(*mb.runs));
            }
            mb.runs[mb.n++] = (struct tb_datum_run){
                .op = t, .index = j, .in = &t->inputs[j], .lp = t->op->result.outputs[j].logprobs};
            mb.T += n;
        }
        /* Scratches live only from an op's first micro-batch to its last. */
        for (; first_open < i; first_open++) {
            struct tb_train_op *o = &b->ops[first_open];
            if (o->backward != b->backward) continue;
            if (!o->failed && o->n_done < o->n_data) break;
            if (mb.n && mb.runs[0].op <= o) break;
            finish_op(o);
        }
    }
    if (!rc) rc = flush(b, &mb, err);
    for (; first_open < b->n_ops && !rc; first_open++)
        if (b->ops[first_open].backward == b->backward) finish_op(&b->ops[first_open]);
    tb_free(mb.runs);
    return rc;
}

int tb_model_train(struct tb_model *m, struct tb_train_item *items, int n_items,
                   struct tb_error *err)
{
    struct tb_arena arena;
    tb_arena_init(&arena);
    struct tb_train_op *ops = tb_calloc((size_t)TB_MAX(n_items, 1), sizeof(*ops));
    struct batch b = {.m = m, .ops = ops, .n_ops = n_items};
    bool any_backward = false, any_forward = false;
    int rc = 0;
    for (int i = 0; i < n_items; i++) {
        prepare_op(m, &ops[i], &items[i], &arena);
        if (ops[i].failed) continue;
        b.ru = TB_MAX(b.ru, items[i].adapter->layout->config.rank);
        any_backward |= ops[i].backward;
        any_forward |= !ops[i].backward;
    }
    struct tb_error e = {0};
    if (any_backward && tb_model_prepare_bwd(m, &e)) {
        for (int i = 0; i < n_items; i++)
            if (ops[i].backward) tb_train_fail(&ops[i], e.code, "%s", e.msg);
        any_backward = false;
    }
    if (any_backward) {
        b.backward = true;
        rc = run_batch(&b, err);
    }
    if (any_forward && !rc) {
        b.backward = false;
        rc = run_batch(&b, err);
    }
    for (int i = 0; i < n_items; i++) {
        if (rc) tb_train_fail(&ops[i], rc, "%s", err ? err->msg : tb_error_name(rc));
        free_scratch(&ops[i]);
        if (ops[i].failed) {
            items[i].op->result.n_outputs = 0;
            items[i].op->result.outputs = NULL;
        }
    }
    tb_free(ops);
    tb_arena_fini(&arena);
    return rc;
}
