/*
 * Causal attention over packed sequences in plain C (see plain_product.c). One task is one query
 * row of one head; the page pool holds k then v of a token, row-major: [page][token][k: n_kv*hd |
 * v: n_kv*hd].
 */
#include <math.h>
#include <stdlib.h>

#include "backend/cpu/cpu.h"

/* Element d of head h of key (or value) number j of a sequence. */
static float kv_at(struct tb_backend *be, const struct tb_attn_shape *s,
                   const struct tb_attn_seq *q, const void *rows, const void *pages, bool value,
                   int j, int h, int d)
{
    size_t w = (size_t)s->n_kv_head * (size_t)s->head_dim,
           at = (size_t)h * (size_t)s->head_dim + (size_t)d;
    if (!q->pages) return tb_load(be->act, rows, (size_t)(q->row + j) * w + at);
    size_t slot = (size_t)q->pages[j / TB_KV_PAGE] * TB_KV_PAGE + (size_t)(j % TB_KV_PAGE);
    return tb_load(be->act, pages, slot * 2 * w + (value ? w : 0) + at);
}

static int first_key(const struct tb_attn_shape *s, int pos)
{
    return s->window > 0 && pos - s->window + 1 > 0 ? pos - s->window + 1 : 0;
}

static float score(struct tb_backend *be, const struct tb_attn_shape *s,
                   const struct tb_attn_seq *sq, const void *q, const void *k, const void *pages,
                   int row, int h, int j)
{
    double a = 0;
    int kvh = h / (s->n_head / s->n_kv_head);
    for (int d = 0; d < s->head_dim; d++)
        a += (double)tb_load(be->act, q,
                             (size_t)(row * s->n_head + h) * (size_t)s->head_dim + (size_t)d) *
             (double)kv_at(be, s, sq, k, pages, false, j, kvh, d);
    return (float)a * s->scale;
}

static void plain_attention(struct tb_backend *be, const struct tb_attn_shape *s,
                            const struct tb_attn_seq *seqs, int n_seqs, const void *q,
                            const void *k, const void *v, const void *kv_pages, void *out,
                            float *lse)
{
    int hd = s->head_dim;
    for (int i = 0; i < n_seqs; i++) {
        const struct tb_attn_seq *sq = seqs + i;
        float *p = malloc((size_t)(sq->pos + sq->n + 1) * sizeof(float));
        if (!p) abort();
        for (int t = 0; t < sq->n; t++) {
            int pos = sq->pos + t, j0 = first_key(s, pos), row = sq->row + t;
            for (int h = 0; h < s->n_head; h++) {
                float m = -INFINITY;
                double sum = 0;
                for (int j = j0; j <= pos; j++) {
                    p[j] = score(be, s, sq, q, k, kv_pages, row, h, j);
                    if (p[j] > m) m = p[j];
                }
                for (int j = j0; j <= pos; j++) {
                    p[j] = expf(p[j] - m);
                    sum += (double)p[j];
                }
                for (int d = 0; d < hd; d++) {
                    double a = 0;
                    for (int j = j0; j <= pos; j++)
                        a += (double)p[j] * (double)kv_at(be, s, sq, v, kv_pages, true, j,
                                                          h / (s->n_head / s->n_kv_head), d);
                    tb_store(be->act, out, (size_t)(row * s->n_head + h) * (size_t)hd + (size_t)d,
                             (float)(a / sum));
                }
                if (lse) lse[(size_t)row * (size_t)s->n_head + (size_t)h] = m + logf((float)sum);
            }
        }
        free(p);
    }
}

/* One query row of one head: adds to dk and dv, writes dq. */
static void row_bwd(struct tb_backend *be, const struct tb_attn_shape *s,
                    const struct tb_attn_seq *sq, const void *q, const void *k, const void *v,
                    const void *out, const float *lse, const float *dout, float *dq, float *dk,
                    float *dv, int t, int h)
{
    int hd = s->head_dim, row = sq->row + t, kvh = h / (s->n_head / s->n_kv_head);
    size_t qo = (size_t)(row * s->n_head + h) * (size_t)hd;
    double delta = 0;
    for (int d = 0; d < hd; d++) {
        delta += (double)dout[qo + (size_t)d] * (double)tb_load(be->act, out, qo + (size_t)d);
        dq[qo + (size_t)d] = 0;
    }
    for (int j = first_key(s, t); j <= t; j++) {
        size_t ko = (size_t)((sq->row + j) * s->n_kv_head + kvh) * (size_t)hd;
        float p = expf(score(be, s, sq, q, k, NULL, row, h, j) -
                       lse[(size_t)row * (size_t)s->n_head + (size_t)h]);
        double dp = 0;
        for (int d = 0; d < hd; d++)
            dp += (double)dout[qo + (size_t)d] * (double)tb_load(be->act, v, ko + (size_t)d);
        float ds = p * (float)(dp - delta) * s->scale;
        for (int d = 0; d < hd; d++) {
            dv[ko + (size_t)d] += p * dout[qo + (size_t)d];
            dq[qo + (size_t)d] += ds * tb_load(be->act, k, ko + (size_t)d);
            dk[ko + (size_t)d] += ds * tb_load(be->act, q, qo + (size_t)d);
        }
    }
}

static void plain_attention_bwd(struct tb_backend *be, const struct tb_attn_shape *s,
                                const struct tb_attn_seq *seqs, int n_seqs, const void *q,
                                const void *k, const void *v, const void *out, const float *lse,
                                const float *dout, float *dq, float *dk, float *dv)
{
    size_t w = (size_t)s->n_kv_head * (size_t)s->head_dim;
    for (int i = 0; i < n_seqs; i++) {
        memset(dk + (size_t)seqs[i].row * w, 0, (size_t)seqs[i].n * w * sizeof(float));
        memset(dv + (size_t)seqs[i].row * w, 0, (size_t)seqs[i].n * w * sizeof(float));
        for (int t = 0; t < seqs[i].n; t++)
            for (int h = 0; h < s->n_head; h++)
                row_bwd(be, s, seqs + i, q, k, v, out, lse, dout, dq, dk, dv, t, h);
    }
}

static size_t plain_kv_page_bytes(const struct tb_backend *be, const struct tb_attn_shape *s)
{
    return (size_t)TB_KV_PAGE * 2 * (size_t)s->n_kv_head * (size_t)s->head_dim *
           tb_dtype_size(be->act);
}

static void plain_kv_write(struct tb_backend *be, const struct tb_attn_shape *s,
                           const struct tb_attn_seq *seqs, int n_seqs, const void *k, const void *v,
                           void *kv_pages)
{
    size_t wb = (size_t)s->n_kv_head * (size_t)s->head_dim * tb_dtype_size(be->act);
    for (int i = 0; i < n_seqs; i++) {
        for (int t = 0; t < seqs[i].n; t++) {
            int j = seqs[i].pos + t;
            size_t slot =
                (size_t)seqs[i].pages[j / TB_KV_PAGE] * TB_KV_PAGE + (size_t)(j % TB_KV_PAGE);
            char *dst = (char *)kv_pages + slot * 2 * wb;
            memcpy(dst, (const char *)k + (size_t)(seqs[i].row + t) * wb, wb);
            memcpy(dst + wb, (const char *)v + (size_t)(seqs[i].row + t) * wb, wb);
        }
    }
}

void tb_plain_attn_ops(struct tb_backend_ops *o)
{
    o->attention = plain_attention;
    o->attention_bwd = plain_attention_bwd;
    o->kv_page_bytes = plain_kv_page_bytes;
    o->kv_write = plain_kv_write;
}
