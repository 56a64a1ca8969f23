/*
 * The forward pass over packed rows: buffers, embedding, layers; see pass.h.
 *
 * Owner: the model's workspace blocks hold the buffers. Thread: the model's.
 */
#include "model/pass.h"

#include <math.h>
#include <string.h>

#include "util/mem.h"

/* ---- layout: the same walk counts bytes (base NULL) and places pointers */
struct carve {
    char *base;
    size_t used;
};

static void *take(struct carve *c, size_t rows, size_t width, size_t elem)
{
    size_t at = c->used;
    c->used += (rows * width * elem + 63) / 64 * 64;
    return c->base ? c->base + at : NULL;
}

static void carve_saved(struct carve *c, const struct tb_pass *p, struct tb_saved *s)
{
    const struct tb_model_config *f = &p->m->cfg;
    size_t T = (size_t)p->T, e = tb_dtype_size(p->m->be->act);
    size_t nq = (size_t)tb_cfg_q(f), nkv = (size_t)tb_cfg_kv(f);
    s->raw = f->qk_norm ? take(c, T, nq + nkv, e) : NULL;
    s->q = take(c, T, nq, e);
    s->k = take(c, T, nkv, e);
    s->v = take(c, T, nkv, e);
    s->att = take(c, T, nq, e);
    s->gu = take(c, T, 2 * (size_t)f->ffn, e);
    for (int i = 0; i < TB_N_PROJ; i++)
        s->u[i] = take(c, T, (size_t)p->ru, e);
    s->lse = take(c, T, (size_t)f->n_heads, 4);
}

static void carve_backward(struct carve *c, struct tb_pass *p)
{
    const struct tb_model_config *f = &p->m->cfg;
    size_t T = (size_t)p->T, e = tb_dtype_size(p->m->be->act), d = (size_t)f->hidden;
    size_t nq = (size_t)tb_cfg_q(f), nkv = (size_t)tb_cfg_kv(f);
    p->dh = take(c, T, d, 4);
    p->dy = take(c, T, d, e);
    p->rstd = take(c, T, 1, 4);
    p->da = take(c, T, (size_t)f->ffn, 4);
    p->dgu = take(c, T, 2 * (size_t)f->ffn, e);
    p->dao = take(c, T, nq, 4);
    p->dq = take(c, T, nq, 4);
    p->dk = take(c, T, nkv, 4);
    p->dv = take(c, T, nkv, 4);
    p->draw = take(c, T, nq + 2 * nkv, e);
}

/* Memory for the backend's kernels: lends it, or with NULL says how much. Sampling draws too; a
 * layer's window does not matter. */
static size_t lend(const struct tb_pass *p, void *mem)
{
    struct tb_backend *be = p->m->be;
    struct tb_pass_size size = {.attn = tb_pass_shape(p, 0),
                                .rows = p->T,
                                .rank = p->ru,
                                .vocab = p->kind == TB_PASS_INFER ? p->m->cfg.vocab : 0};
    return be->ops->lend ? be->ops->lend(be, &size, mem) : 0;
}

static size_t carve_all(struct tb_pass *p, char *base, bool backward)
{
    const struct tb_model_config *f = &p->m->cfg;
    struct carve c = {base, 0};
    size_t T = (size_t)p->T, R = (size_t)p->m->head_rows, e = tb_dtype_size(p->m->be->act);
    size_t d = (size_t)f->hidden, V = (size_t)f->vocab, ru = (size_t)p->ru;
    bool keep = p->kind != TB_PASS_INFER;
    p->kernels = take(&c, 1, lend(p, NULL), 1);
    for (int l = 0; l <= f->n_layers; l++)
        p->x[l] = keep || l == 0 ? take(&c, T, d, 4) : p->x[0];
    for (int l = 0; l < f->n_layers; l++)
        p->x_mid[l] = p->kind == TB_PASS_KEEP || (keep && l == 0) ? take(&c, T, d, 4)
                      : keep                                      ? p->x_mid[0]
                                                                  : p->x[0];
    int n_saved = p->kind == TB_PASS_KEEP ? f->n_layers : 1;
    for (int l = 0; l < n_saved; l++)
        carve_saved(&c, p, &p->saved[l]);
    p->xn = take(&c, T, d, e);
    p->rstd_final = take(&c, T, 1, 4);
    p->logits = take(&c, R + (p->kind == TB_PASS_INFER), V, 4);
    p->u_head = take(&c, R, ru, e);
    p->a = take(&c, T, (size_t)f->ffn, e); /* a and h are made again in the backward pass */
    p->h = take(&c, T, d, e);
    if (backward) {
        p->dx = take(&c, T, d, 4);
        p->dxn = take(&c, T, d, 4);
        p->du = take(&c, TB_MAX(T, R), ru, e);
        p->dl = take(&c, R, V, e);
        p->xg = take(&c, R, d, e);
        p->ug = take(&c, R, ru, e);
        p->dxg = take(&c, R, d, 4);
    }
    /* A layer's forward temporaries are dead before its backward ones live. */
    struct carve f1 = c;
    p->raw = take(&f1, T, (size_t)tb_cfg_qkv(f), 4);
    p->gu = take(&f1, T, 2 * (size_t)f->ffn, 4);
    if (backward) carve_backward(&c, p);
    return TB_MAX(c.used, f1.used);
}

static int alloc_host(struct tb_pass *p)
{
    size_t L = (size_t)p->m->cfg.n_layers;
    p->saved = tb_calloc(L, sizeof(*p->saved));
    p->x = tb_calloc(2 * L + 1, sizeof(*p->x));
    p->x_mid = p->x + L + 1;
    /* Sampling lists its rows with logits in three groups (scored, drawn once, drawn several
     * times), each with the pass's versions. */
    size_t n = (size_t)TB_MAX(3 * p->n_lora, p->n_grads) + 1;
    p->spans = tb_try_calloc(TB_LORA_TERMS * n, sizeof(*p->spans));
    return p->spans ? 0 : TB_ENOMEM;
}

size_t tb_pass_bytes(struct tb_model *m, enum tb_pass_kind kind, bool backward, int T, int ru)
{
    struct tb_pass p = {.m = m, .kind = kind, .T = T, .ru = ru};
    size_t n = alloc_host(&p) ? SIZE_MAX : carve_all(&p, NULL, backward);
    tb_pass_fini(&p);
    return n;
}

int tb_pass_init(struct tb_pass *p, struct tb_block *block, bool backward, struct tb_error *err)
{
    if (alloc_host(p)) return tb_error_set(err, TB_ENOMEM, "no memory for %d sequences", p->n_lora);
    int rc = tb_block_reserve(p->m->be, block, carve_all(p, NULL, backward), "activations", err);
    if (rc) return rc;
    carve_all(p, block->p, backward);
    lend(p, p->kernels);
    p->block = block;
    block->busy = true;
    return 0;
}

void tb_pass_fini(struct tb_pass *p)
{
    if (p->block) p->block->busy = false;
    p->block = NULL;
    tb_free(p->saved);
    tb_free(p->x);
    tb_free(p->spans);
    p->saved = NULL;
    p->x = NULL;
    p->spans = NULL;
}

/* ---- layers */

struct tb_attn_shape tb_pass_shape(const struct tb_pass *p, int layer)
{
    const struct tb_model_config *c = &p->m->cfg;
    return (struct tb_attn_shape){c->n_heads, c->n_kv_heads, c->head_dim,
                                  (float)(1 / sqrt((double)c->head_dim)),
                                  p->m->layers[layer].window};
}

int tb_pass_spans(struct tb_pass *p, int module, bool backward)
{
    return backward ? tb_lora_spans(p->grads, p->n_grads, module, true, p->spans)
                    : tb_lora_spans(p->lora, p->n_lora, module, false, p->spans);
}

/* An adapted module within a (stacked) product: u keeps x A^T, its outputs lie at columns [col, col
 * + n_out).
 */
struct part {
    int module;
    void *u;
    int col, n_out;
};

/* y (+)= x W^T + bias, and scale (x A^T) B^T of each part. */
static void product(struct tb_pass *p, const struct tb_weight *w, const void *x, int n_in,
                    const float *bias, float *y, int ldy, bool accumulate, const struct part *parts,
                    int n_parts)
{
    const struct tb_backend_ops *ops = p->m->be->ops;
    struct tb_backend *be = p->m->be;
    struct tb_lora_term terms[TB_LORA_TERMS];
    struct tb_lora_span *spans = p->spans;
    int n = 0;
    for (int i = 0; i < n_parts; i++) {
        const struct part *a = &parts[i];
        int n_spans = tb_lora_spans(p->lora, p->n_lora, a->module, false, spans);
        if (n_spans == 0) continue;
        terms[n++] = (struct tb_lora_term){spans, n_spans, a->u, p->ru, a->col, a->n_out};
        spans += n_spans;
    }
    if (n) ops->lora_down(be, terms, n, x, n_in, n_in);
    if (n && ops->matmul_lora) {
        ops->matmul_lora(be, w, x, p->T, bias, y, ldy, accumulate, terms, n);
        return;
    }
    ops->matmul(be, w, x, p->T, bias, y, ldy, accumulate);
    for (int i = 0; i < n; i++)
        ops->lora_up(be, terms[i].spans, terms[i].n_spans, terms[i].u, p->ru, y + terms[i].col, ldy,
                     terms[i].n_out);
}

static void attention(struct tb_pass *p, int l, struct tb_saved *s)
{
    const struct tb_backend_ops *ops = p->m->be->ops;
    struct tb_backend *be = p->m->be;
    struct tb_attn_shape shape = tb_pass_shape(p, l);
    if (!p->paged) {
        ops->attention(be, &shape, p->seqs, p->n_seqs, s->q, s->k, s->v, NULL, s->att, s->lse);
        return;
    }
    void *pages = tb_kv_layer(&p->m->kv, l);
    ops->kv_write(be, &shape, p->seqs, p->n_seqs, s->k, s->v, pages);
    ops->attention(be, &shape, p->seqs, p->n_seqs, s->q, s->k, s->v, pages, s->att, NULL);
}

void tb_pass_layer(struct tb_pass *p, int l, struct tb_saved *s, float *x_in, float *x_mid,
                   float *x_out)
{
    struct tb_model *m = p->m;
    const struct tb_model_config *c = &m->cfg;
    const struct tb_layer *y = &m->layers[l];
    const struct tb_backend_ops *ops = m->be->ops;
    int T = p->T, d = c->hidden, nq = tb_cfg_q(c), nkv = tb_cfg_kv(c), nqkv = tb_cfg_qkv(c),
        F = c->ffn;
    int mod = l * TB_N_PROJ;
    size_t x_bytes = (size_t)T * (size_t)d * 4;
    struct tb_attn_shape shape = tb_pass_shape(p, l);

    ops->rmsnorm(m->be, x_in, y->norm_attn, T, d, c->norm_eps, p->h, NULL);
    const struct part qkv[] = {{mod + TB_Q, s->u[TB_Q], 0, nq},
                               {mod + TB_K, s->u[TB_K], nq, nkv},
                               {mod + TB_V, s->u[TB_V], nq + nkv, nkv}};
    product(p, y->qkv, p->h, d, y->qkv_bias, p->raw, nqkv, false, qkv, 3);
    ops->qkv_post(m->be, &shape, p->raw, T, p->pos, m->rope_cos, m->rope_sin, c->head_dim,
                  y->q_norm, y->k_norm, c->norm_eps, s->q, s->k, s->v, s->raw);
    attention(p, l, s);
    if (x_mid != x_in) ops->copy(m->be, x_mid, x_in, x_bytes);
    const struct part o[] = {{mod + TB_O, s->u[TB_O], 0, d}};
    product(p, y->o, s->att, nq, y->o_bias, x_mid, d, true, o, 1);

    ops->rmsnorm(m->be, x_mid, y->norm_mlp, T, d, c->norm_eps, p->h, NULL);
    const struct part gate_up[] = {{mod + TB_GATE, s->u[TB_GATE], 0, F},
                                   {mod + TB_UP, s->u[TB_UP], F, F}};
    product(p, y->gate_up, p->h, d, NULL, p->gu, 2 * F, false, gate_up, 2);
    ops->swiglu(m->be, p->gu, T, F, p->a, p->kind == TB_PASS_INFER ? NULL : s->gu);
    if (x_out != x_mid) ops->copy(m->be, x_out, x_mid, x_bytes);
    const struct part down[] = {{mod + TB_DOWN, s->u[TB_DOWN], 0, d}};
    product(p, y->down, p->a, F, NULL, x_out, d, true, down, 1);
}

void tb_pass_forward(struct tb_pass *p)
{
    struct tb_model *m = p->m;
    m->be->ops->embed(m->be, m->embed, m->embed_dtype, p->tokens, p->T, m->cfg.hidden, p->x[0]);
    for (int l = 0; l < m->cfg.n_layers; l++) {
        struct tb_saved *s = &p->saved[p->kind == TB_PASS_KEEP ? l : 0];
        tb_pass_layer(p, l, s, p->x[l], p->x_mid[l], p->x[l + 1]);
    }
}
