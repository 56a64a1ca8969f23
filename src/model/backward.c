/*
 * The backward pass through the layers; see pass.h. Frozen weights only pass the gradient on; each
 * adapted projection adds its LoRA gradient to the op's scratch, one run of rows a datum, in datum
 * order.
 *
 * Owner: nothing. Thread: the model's.
 */
#include "model/pass.h"

/* The LoRA part of one projection's backward. dy act [T, n_out] with stride ld_dy, x act [T, n_in],
 * u = x A^T of the forward; dx float32 [T, n_in] += du A, or NULL. */
static void lora_bwd(struct tb_pass *p, int module, const void *dy, int ld_dy, int n_out,
                     const void *u, const void *x, int n_in, float *dx)
{
    int n = tb_pass_spans(p, module, true);
    if (n == 0) return;
    const struct tb_backend_ops *ops = p->m->be->ops;
    ops->lora_up_bwd(p->m->be, p->spans, n, dy, ld_dy, n_out, u, p->du, p->ru);
    ops->lora_down_bwd(p->m->be, p->spans, n, p->du, p->ru, x, n_in, n_in, dx, n_in);
}

static const char *act_at(const struct tb_pass *p, const void *base, int column)
{
    return (const char *)base + (size_t)column * tb_dtype_size(p->m->be->act);
}

/* dx: gradient of the layer's output -> gradient of x_mid. */
static void mlp_bwd(struct tb_pass *p, int l, const struct tb_saved *s, const float *x_mid,
                    bool need_dx)
{
    struct tb_model *m = p->m;
    const struct tb_backend_ops *ops = m->be->ops;
    const struct tb_layer *y = &m->layers[l];
    int T = p->T, d = m->cfg.hidden, F = m->cfg.ffn, mod = l * TB_N_PROJ;
    ops->to_act(m->be, p->dx, (size_t)T * (size_t)d, p->dy);
    ops->matmul_bwd(m->be, y->down, p->dy, T, p->da, F, false);
    ops->swiglu_again(m->be, s->gu, T, F, p->a);
    lora_bwd(p, mod + TB_DOWN, p->dy, d, d, s->u[TB_DOWN], p->a, F, p->da);
    ops->swiglu_bwd(m->be, s->gu, p->da, T, F, p->dgu);
    ops->rmsnorm(m->be, x_mid, y->norm_mlp, T, d, m->cfg.norm_eps, p->h, p->rstd);
    if (need_dx) ops->matmul_bwd(m->be, y->gate_up, p->dgu, T, p->dh, d, false);
    float *dh = need_dx ? p->dh : NULL;
    lora_bwd(p, mod + TB_GATE, p->dgu, 2 * F, F, s->u[TB_GATE], p->h, d, dh);
    lora_bwd(p, mod + TB_UP, act_at(p, p->dgu, F), 2 * F, F, s->u[TB_UP], p->h, d, dh);
    if (need_dx) ops->rmsnorm_bwd(m->be, x_mid, y->norm_mlp, p->rstd, p->dh, T, d, p->dx);
}

/* dx: gradient of x_mid -> gradient of the layer's input (when need_dx). */
static void attn_bwd(struct tb_pass *p, int l, const struct tb_saved *s, const float *x_in,
                     bool need_dx)
{
    struct tb_model *m = p->m;
    const struct tb_model_config *c = &m->cfg;
    const struct tb_backend_ops *ops = m->be->ops;
    const struct tb_layer *y = &m->layers[l];
    int T = p->T, d = c->hidden, nq = tb_cfg_q(c), nkv = tb_cfg_kv(c), nqkv = tb_cfg_qkv(c);
    int mod = l * TB_N_PROJ;
    struct tb_attn_shape shape = tb_pass_shape(p, l);
    ops->to_act(m->be, p->dx, (size_t)T * (size_t)d, p->dy);
    ops->matmul_bwd(m->be, y->o, p->dy, T, p->dao, nq, false);
    lora_bwd(p, mod + TB_O, p->dy, d, d, s->u[TB_O], s->att, nq, p->dao);
    ops->attention_bwd(m->be, &shape, p->seqs, p->n_seqs, s->q, s->k, s->v, s->att, s->lse, p->dao,
                       p->dq, p->dk, p->dv);
    ops->qkv_post_bwd(m->be, &shape, p->dq, p->dk, p->dv, T, p->pos, m->rope_cos, m->rope_sin,
                      c->head_dim, y->q_norm, y->k_norm, c->norm_eps, s->raw, p->draw);
    ops->rmsnorm(m->be, x_in, y->norm_attn, T, d, c->norm_eps, p->h, p->rstd);
    if (need_dx) ops->matmul_bwd(m->be, y->qkv, p->draw, T, p->dh, d, false);
    float *dh = need_dx ? p->dh : NULL;
    lora_bwd(p, mod + TB_Q, p->draw, nqkv, nq, s->u[TB_Q], p->h, d, dh);
    lora_bwd(p, mod + TB_K, act_at(p, p->draw, nq), nqkv, nkv, s->u[TB_K], p->h, d, dh);
    lora_bwd(p, mod + TB_V, act_at(p, p->draw, nq + nkv), nqkv, nkv, s->u[TB_V], p->h, d, dh);
    if (need_dx) ops->rmsnorm_bwd(m->be, x_in, y->norm_attn, p->rstd, p->dh, T, d, p->dx);
}

void tb_pass_backward(struct tb_pass *p)
{
    for (int l = p->m->cfg.n_layers - 1; l >= 0; l--) {
        struct tb_saved *s = &p->saved[p->kind == TB_PASS_KEEP ? l : 0];
        /* Recomputed: the same kernels on the same rows give the same bits as the forward pass did.
         * The layer's output goes over x[l + 1], which is dead, with what it already holds. */
        if (p->kind == TB_PASS_RECOMPUTE) tb_pass_layer(p, l, s, p->x[l], p->x_mid[l], p->x[l + 1]);
        bool attn = l > 0 || p->grad_attn;
        mlp_bwd(p, l, s, p->x_mid[l], attn);
        if (attn) attn_bwd(p, l, s, p->x[l], l > 0);
    }
}
