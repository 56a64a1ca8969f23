/*
 * The head in training: logits of a block of rows, their logprobs, the loss and its derivative, and
 * the way back, block by block, so that the logits of a batch are never there at once.
 *
 * Rows whose derivative is zero take no part in the backward product: the others are gathered. A
 * datum's rows go through in pieces of fixed size from its first row, and each piece is one run of
 * the LoRA gradient's sum, so that neither the block nor the batch around it shows in the result.
 *
 * Owner: the pass. Thread: the model's.
 */
#include <math.h>
#include <string.h>

#include "model/custom/graph.h"
#include "model/train.h"
#include "util/mem.h"

struct piece {
    struct tb_datum_run *run;
    int i0, n; /* positions of the datum */
};

struct head {
    struct tb_pass *p;
    bool backward;
    bool any;   /* some derivative is not zero */
    int row, n; /* the block: packed rows */
    int n_pieces;
    struct piece *pieces;      /* [head_rows] */
    float *lse;                /* [head_rows] */
    struct tb_lora_rows *rows; /* [head_rows] gathered, for the spans */
    struct tb_lora_span *spans;
    struct stretch { /* gathered rows: src in the block, dst in the gathered arrays */
        int src, dst, n;
        const struct tb_datum_run *run;
        int at;    /* position of the datum */
    } * stretches; /* [head_rows] */
};

static size_t act_size(const struct tb_pass *p)
{
    return tb_dtype_size(p->m->be->act);
}

static void *act_row(const struct tb_pass *p, void *base, int row, int width)
{
    return (char *)base + (size_t)row * (size_t)width * act_size(p);
}

void tb_head_logits(struct tb_pass *p, int row, int n)
{
    struct tb_model *m = p->m;
    const struct tb_backend_ops *ops = m->be->ops;
    int d = m->cfg.hidden, V = m->cfg.vocab;
    const void *x = act_row(p, p->xn, row, d);
    int n_spans = tb_pass_spans(p, tb_model_unembed(m), false), k = 0;
    for (int i = 0; i < n_spans; i++) { /* clip to the block */
        struct tb_lora_span s = p->spans[i];
        int lo = TB_MAX(s.row, row), hi = TB_MIN(s.row + s.n, row + n);
        if (lo >= hi) continue;
        s.row = lo - row;
        s.n = hi - lo;
        p->spans[k++] = s;
    }
    const struct tb_lora_term term = {p->spans, k, p->u_head, p->ru, 0, V};
    if (k) ops->lora_down(m->be, &term, 1, x, d, d);
    if (k && ops->matmul_lora) {
        ops->matmul_lora(m->be, m->head, x, n, NULL, p->logits, V, false, &term, 1);
        return;
    }
    ops->matmul(m->be, m->head, x, n, NULL, p->logits, V, false);
    if (k) ops->lora_up(m->be, p->spans, k, p->u_head, p->ru, p->logits, V, V);
}

/* The block's, a datum's pieces at once. */
static void block_logprobs(struct head *h)
{
    struct tb_model *m = h->p->m;
    size_t V = (size_t)m->cfg.vocab;
    for (int i = 0, n; i < h->n_pieces; i += n) {
        const struct piece *c = &h->pieces[i];
        const struct tb_loss_inputs *in = c->run->in;
        size_t at = (size_t)c->i0 * (size_t)in->k;
        int row = c->run->row + c->i0 - h->row /* in the block */, rows = c->n;
        for (n = 1; i + n < h->n_pieces && c[n].run == c->run; n++)
            rows += c[n].n;
        m->be->ops->logprobs(m->be, h->p->logits + (size_t)row * V, rows, (int)V, (int)V,
                             in->targets + at, in->k, h->lse + row, c->run->lp + at);
    }
}

/* A custom loss of one whole datum, with its metrics. */
static int eval_graph(struct tb_datum_run *r, float *g, struct tb_error *err)
{
    struct tb_training *op = r->op;
    struct tb_graph_run run = {.datum = &op->op->u.forward_backward.data[r->index],
                               .logprobs = r->lp,
                               .n = r->in->n,
                               .k = r->in->k,
                               .two_d = r->in->two_d,
                               .be = op->m->be,
                               .metrics = op->one,
                               .d_logprobs = op->backward ? g : NULL};
    int rc = tb_graph_eval(op->graph, &run, err);
    if (rc) return rc;
    r->loss += run.loss;
    for (int i = 0; i < tb_graph_n_metrics(op->graph); i++)
        op->shards[op->shard].metrics[i] += op->one[i];
    return 0;
}

/* Loss and derivative of positions [i0, i1); a number that is not finite fails the op. */
static void eval_loss(struct tb_datum_run *r, int i0, int i1, float *g)
{
    int k = r->in->k;
    size_t from = (size_t)i0 * (size_t)k, to = (size_t)i1 * (size_t)k;
    for (size_t i = from; i < to && !r->op->failed; i++)
        if (!isfinite(r->lp[i]))
            tb_train_fail(r->op, TB_ENONFINITE,
                          "datum %d: the model's logprob at position %zu is not finite", r->index,
                          i / (size_t)k);
    if (r->op->failed) {
        memset(g + from, 0, (to - from) * sizeof(*g));
        return;
    }
    if (r->op->graph) {
        struct tb_error err = {0};
        int rc = eval_graph(r, g, &err);
        if (!rc) return;
        memset(g + from, 0, (to - from) * sizeof(*g));
        tb_train_fail(r->op, rc, "datum %d: %s", r->index, err.msg);
        return;
    }
    int bad = r->op->loss->eval(r->in, i0, i1, r->lp, g, &r->loss);
    if (bad < 0) return;
    memset(g + from, 0, (to - from) * sizeof(*g));
    tb_train_fail(r->op, TB_ENONFINITE,
                  "datum %d: %s is not finite at position %d; the ratio of logprobs is too large",
                  r->index, r->op->loss->name, bad);
}

static bool row_is_zero(const float *g, int k)
{
    for (int j = 0; j < k; j++)
        if (g[j] != 0) return false;
    return true;
}

/* Neighbouring rows of a datum are one stretch. */
static void add_stretch(struct head *h, int *n, struct stretch s)
{
    struct stretch *last = *n ? &h->stretches[*n - 1] : NULL;
    if (last && last->run == s.run && last->src + last->n == s.src)
        last->n += s.n;
    else
        h->stretches[(*n)++] = s;
}

/* dlogits of the rows that count into p->dl, gathered; returns how many rows. */
static int gather_dlogits(struct head *h, int *n_stretches, int *n_rows)
{
    struct tb_pass *p = h->p;
    struct tb_model *m = p->m;
    size_t V = (size_t)m->cfg.vocab;
    int c = 0;
    *n_stretches = *n_rows = 0;
    for (int i = 0; i < h->n_pieces; i++) {
        const struct piece *q = &h->pieces[i];
        const struct tb_loss_inputs *in = q->run->in;
        int start = c, base = q->run->row - h->row;
        for (int a = q->i0; a < q->i0 + q->n;) {
            if (row_is_zero(q->run->g + (size_t)a * (size_t)in->k, in->k)) {
                a++;
                continue;
            }
            int b = a + 1;
            while (b < q->i0 + q->n && !row_is_zero(q->run->g + (size_t)b * (size_t)in->k, in->k))
                b++;
            add_stretch(h, n_stretches, (struct stretch){base + a, c, b - a, q->run, a});
            c += b - a;
            a = b;
        }
        if (c > start)
            h->rows[(*n_rows)++] =
                (struct tb_lora_rows){start, c - start, q->run->op->ver, q->run->op->scratch};
    }
    for (int i = 0; i < *n_stretches; i++) {
        const struct stretch *s = &h->stretches[i];
        const struct tb_loss_inputs *in = s->run->in;
        size_t at = (size_t)s->at * (size_t)in->k;
        m->be->ops->dlogits(m->be, p->logits + (size_t)s->src * V, s->n, (int)V, (int)V,
                            h->lse + s->src, in->targets + at, s->run->g + at, in->k,
                            act_row(p, p->dl, s->dst, (int)V));
    }
    return c;
}

static void block_backward(struct head *h)
{
    struct tb_pass *p = h->p;
    struct tb_model *m = p->m;
    const struct tb_backend_ops *ops = m->be->ops;
    int d = m->cfg.hidden, V = m->cfg.vocab, n_st, n_rows;
    int n = gather_dlogits(h, &n_st, &n_rows);
    if (n == 0) return;
    h->any = true;
    bool whole = n == h->n; /* nothing to gather: work in place */
    bool need_dx = p->grad_attn || p->grad_mlp;
    void *xg = whole ? act_row(p, p->xn, h->row, d) : p->xg;
    void *ug = whole ? p->u_head : p->ug;
    float *dxg = whole ? p->dxn + (size_t)h->row * (size_t)d : p->dxg;
    int n_spans = tb_lora_spans(h->rows, n_rows, tb_model_unembed(m), true, h->spans);
    for (int i = 0; i < n_st && !whole && n_spans; i++) {
        const struct stretch *s = &h->stretches[i];
        size_t e = act_size(p), rows = (size_t)s->n;
        ops->copy(m->be, act_row(p, xg, s->dst, d), act_row(p, p->xn, h->row + s->src, d),
                  rows * (size_t)d * e);
        ops->copy(m->be, act_row(p, ug, s->dst, p->ru), act_row(p, p->u_head, s->src, p->ru),
                  rows * (size_t)p->ru * e);
    }
    if (need_dx) ops->matmul_bwd(m->be, m->head, p->dl, n, dxg, d, false);
    if (n_spans) {
        ops->lora_up_bwd(m->be, h->spans, n_spans, p->dl, V, V, ug, p->du, p->ru);
        ops->lora_down_bwd(m->be, h->spans, n_spans, p->du, p->ru, xg, d, d, need_dx ? dxg : NULL,
                           d);
    }
    for (int i = 0; i < n_st && !whole && need_dx; i++) {
        const struct stretch *s = &h->stretches[i];
        ops->copy(m->be, p->dxn + (size_t)(h->row + s->src) * (size_t)d,
                  dxg + (size_t)s->dst * (size_t)d, (size_t)s->n * (size_t)d * 4);
    }
}

static void run_block(struct head *h, float *no_g)
{
    if (h->n_pieces == 0) return;
    tb_head_logits(h->p, h->row, h->n);
    block_logprobs(h);
    for (int i = 0; i < h->n_pieces; i++) {
        struct piece *c = &h->pieces[i];
        if (!c->run->op->loss->whole)
            eval_loss(c->run, c->i0, c->i0 + c->n, h->backward ? c->run->g : no_g);
    }
    if (h->backward) block_backward(h);
    h->n_pieces = 0;
    h->n = 0;
}

static void add_piece(struct head *h, struct tb_datum_run *r, int i0, int n, float *no_g)
{
    int row = r->row + i0;
    if (h->n_pieces && (row != h->row + h->n || h->n + n > h->p->m->head_rows)) run_block(h, no_g);
    if (h->n_pieces == 0) h->row = row;
    h->pieces[h->n_pieces++] = (struct piece){r, i0, n};
    h->n += n;
}

static void add_datum(struct head *h, struct tb_datum_run *r, float *no_g)
{
    int step = h->p->m->head_piece;
    for (int i = 0; i < r->in->n; i += step)
        add_piece(h, r, i, TB_MIN(step, r->in->n - i), no_g);
}

/* Losses that need the whole datum's logprobs: those first, then their derivative; the blocks that
 * follow then only use it. */
static void score_whole(struct head *h, struct tb_datum_run *runs, int n_runs, float *no_g)
{
    bool backward = h->backward;
    h->backward = false;
    for (int i = 0; i < n_runs; i++)
        if (runs[i].op->loss->whole) add_datum(h, &runs[i], no_g);
    run_block(h, no_g);
    h->backward = backward;
    for (int i = 0; i < n_runs; i++)
        if (runs[i].op->loss->whole)
            eval_loss(&runs[i], 0, runs[i].in->n, backward ? runs[i].g : no_g);
}

int tb_head_train(struct tb_pass *p, struct tb_datum_run *runs, int n_runs, bool backward,
                  bool *any, struct tb_error *err)
{
    struct tb_model *m = p->m;
    size_t R = (size_t)m->head_rows, most = 1;
    int T = p->T, d = m->cfg.hidden, rc = 0;
    for (int i = 0; i < n_runs; i++)
        most = TB_MAX(most, (size_t)runs[i].in->n * (size_t)runs[i].in->k);
    struct head h = {.p = p, .backward = backward};
    h.pieces = tb_try_calloc(R, sizeof(*h.pieces));
    h.lse = tb_try_calloc(R, sizeof(*h.lse));
    h.rows = tb_try_calloc(R, sizeof(*h.rows));
    h.spans = tb_try_calloc(R, sizeof(*h.spans));
    h.stretches = tb_try_calloc(R, sizeof(*h.stretches));
    float *no_g =
        backward ? NULL : tb_try_calloc(most, sizeof(*no_g)); /* derivative that nobody reads */
    if (!h.pieces || !h.lse || !h.rows || !h.spans || !h.stretches || (!backward && !no_g)) {
        rc = tb_error_set(err, TB_ENOMEM, "no memory for a block of %zu rows of logits", R);
        goto out;
    }
    m->be->ops->rmsnorm(m->be, p->x[m->cfg.n_layers], m->norm, T, d, m->cfg.norm_eps, p->xn,
                        p->rstd_final);
    if (backward) m->be->ops->zero(m->be, p->dxn, (size_t)T * (size_t)d * 4);
    score_whole(&h, runs, n_runs, no_g);
    for (int i = 0; i < n_runs; i++)
        if (backward || !runs[i].op->loss->whole) add_datum(&h, &runs[i], no_g);
    run_block(&h, no_g);
    *any = h.any;
out:
    tb_free(h.pieces);
    tb_free(h.lse);
    tb_free(h.rows);
    tb_free(h.spans);
    tb_free(h.stretches);
    tb_free(no_g);
    return rc;
}
