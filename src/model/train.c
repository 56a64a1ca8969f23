/*
 * Training passes: micro-batches over data of any ops. See model.h, and training.c for an op.
 *
 * How an op is split into calls and micro-batches never shows: every row is computed by itself, and
 * a shard's gradient is one sum over its data in order, a run of rows per datum.
 *
 * Owner: nothing lasts beyond a call. Thread: the model's.
 */
#include "model/train.h"

#include <string.h>

#include "model/custom/graph.h"
#include "util/mem.h"

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
        struct tb_adapter_version *ver = r->op->ver;
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
        a->grads[i] = (struct tb_lora_rows){row, n, ver, r->op->scratch};
        if (n_lora && a->lora[n_lora - 1].ver == ver)
            a->lora[n_lora - 1].n += n;
        else
            a->lora[n_lora++] = (struct tb_lora_rows){row, n, ver, NULL};
        const struct tb_lora_config *c = &ver->layout->config;
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
    for (int i = 0; i < b->n; i++) {
        struct tb_training *t = b->runs[i].op;
        t->shards[t->shard].loss_sum += b->runs[i].loss;
    }
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
    b->max_rows = (int)TB_MIN(rows, (size_t)m->be->sizes.train_rows);
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
    size_t room = tb_backend_room(b->m->be), own = tb_training_hold_bytes(t) + spare, need;
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
        tb_training_through(mb->runs[i].op);
    mb->n = mb->T = 0;
    if (rc == TB_EDEVICE) return tb_error_set(err, rc, "%s", e.msg);
    return 0;
}

static void release_all(struct batch *b)
{
    for (int i = 0; i < b->n_parts; i++)
        tb_training_release(b->parts[i].training);
}

/* Adds a datum to the micro-batch, which runs first when there is no room for it. */
static int add_datum(struct batch *b, struct micro *mb, struct tb_training *t, struct tb_error *err)
{
    struct tb_error e = {0};
    int rc = tb_training_at_shard(t) ? flush(b, mb, err) : 0;
    int index = t->n_begun++, n = t->inputs[index].n;
    /* What a custom loss takes is known when it runs: without much room its data run alone. */
    size_t spare = b->any_graph ? TB_GRAPH_MAX_BYTES : 0;
    if (!rc && mb->n && (mb->T + n > b->max_rows || !fits(b, t, mb->T + n, spare)))
        rc = flush(b, mb, err);
    if (!mb->n && !fits(b, t, n, spare)) release_all(b); /* held from micro-batches before */
    if (!rc && !t->failed && tb_training_hold(t, &e)) tb_train_fail(t, e.code, "%s", e.msg);
    if (rc || t->failed) return rc;
    if (mb->n == mb->cap) {
        mb->cap = mb->cap ? mb->cap * 2 : 64;
        mb->runs = tb_realloc(mb->runs, (size_t)mb->cap * sizeof(*mb->runs));
    }
    mb->runs[mb->n++] = (struct tb_datum_run){
        .op = t, .index = index, .in = &t->inputs[index], .lp = t->outputs[index].logprobs};
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
        b.ru = TB_MAX(b.ru, t->ver->layout->config.rank);
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
        if (!t->done) tb_training_finish(t);
    }
    return rc;
}
