/*
 * Weights, matrix products and LoRA in plain C: the reference that every other instruction set is
 * tested against, and what serves on a CPU without AVX2. Sums run in index order in float64.
 *
 * Owner: a weight owns one row-major copy in the activation type; both directions read it.
 */
#include <stdlib.h>

#include "backend/cpu/cpu.h"

static int plain_weight_create(struct tb_backend *be, int n_parts, const void *const *parts,
                               const enum tb_dtype *dtypes, const int *rows, int n_in,
                               struct tb_weight **out, struct tb_error *err)
{
    *out = NULL;
    struct tb_weight *w = calloc(1, sizeof(*w));
    if (!w) return tb_error_set(err, TB_ENOMEM, "no memory for a weight");
    w->n_in = n_in;
    for (int p = 0; p < n_parts; p++)
        w->n_out += rows[p];
    w->fwd_bytes = (size_t)w->n_out * (size_t)n_in * tb_dtype_size(be->act);
    w->fwd = tb_cpu_take(be, w->fwd_bytes);
    if (!w->fwd) {
        free(w);
        return tb_error_set(err, TB_ENOMEM, "no memory for a weight");
    }
    size_t at = 0;
    for (int p = 0; p < n_parts; p++) {
        size_t n = (size_t)rows[p] * (size_t)n_in;
        for (size_t i = 0; i < n; i++)
            tb_store(be->act, w->fwd, at + i, tb_load(dtypes[p], parts[p], i));
        at += n;
    }
    *out = w;
    return 0;
}

static void plain_weight_free(struct tb_backend *be, struct tb_weight *w)
{
    if (!w) return;
    tb_cpu_give(be, w->fwd, w->fwd_bytes);
    free(w);
}

static size_t plain_weight_bytes(const struct tb_weight *w)
{
    return w->fwd_bytes;
}

static int plain_weight_prepare_bwd(struct tb_backend *be, struct tb_weight *w, int n_parts,
                                    const void *const *parts, const enum tb_dtype *dtypes,
                                    const int *rows, struct tb_error *err)
{
    return 0;
}

static void plain_matmul(struct tb_backend *be, const struct tb_weight *w, const void *x, int T,
                         const float *bias, float *y, int ldy, bool accumulate)
{
    size_t K = (size_t)w->n_in;
    for (int t = 0; t < T; t++) {
        for (int n = 0; n < w->n_out; n++) {
            double s = 0;
            for (size_t k = 0; k < K; k++)
                s += (double)tb_load(be->act, x, (size_t)t * K + k) *
                     (double)tb_load(be->act, w->fwd, (size_t)n * K + k);
            float *d = y + (size_t)t * (size_t)ldy + n;
            float r = (float)s;
            if (bias) r += bias[n];
            *d = accumulate ? *d + r : r;
        }
    }
}

static void plain_matmul_bwd(struct tb_backend *be, const struct tb_weight *w, const void *dy,
                             int T, float *dx, int ld_dx, bool accumulate)
{
    size_t K = (size_t)w->n_in, N = (size_t)w->n_out;
    for (int t = 0; t < T; t++) {
        for (size_t k = 0; k < K; k++) {
            double s = 0;
            for (size_t n = 0; n < N; n++)
                s += (double)tb_load(be->act, dy, (size_t)t * N + n) *
                     (double)tb_load(be->act, w->fwd, n * K + k);
            float *d = dx + (size_t)t * (size_t)ld_dx + k;
            *d = accumulate ? *d + (float)s : (float)s;
        }
    }
}

static void term_down(struct tb_backend *be, const struct tb_lora_term *term, const void *x,
                      int ldx, int n_in)
{
    const struct tb_lora_span *s = term->spans;
    for (int i = 0; i < term->n_spans; i++) {
        const struct tb_lora_mat *m = s[i].mat;
        for (int t = s[i].row; t < s[i].row + s[i].n; t++) {
            for (int r = 0; r < m->rank; r++) {
                double a = 0;
                for (int k = 0; k < n_in; k++)
                    a += (double)tb_load(be->act, x, (size_t)t * (size_t)ldx + (size_t)k) *
                         (double)tb_load(be->act, m->a, (size_t)r * (size_t)n_in + (size_t)k);
                tb_store(be->act, term->u, (size_t)t * (size_t)term->ldu + (size_t)r, (float)a);
            }
        }
    }
}

static void plain_lora_down(struct tb_backend *be, const struct tb_lora_term *terms, int n_terms,
                            const void *x, int ldx, int n_in)
{
    for (int i = 0; i < n_terms; i++)
        term_down(be, terms + i, x, ldx, n_in);
}

static void plain_lora_up(struct tb_backend *be, const struct tb_lora_span *s, int n_spans,
                          const void *u, int ldu, float *y, int ldy, int n_out)
{
    for (int i = 0; i < n_spans; i++) {
        const struct tb_lora_mat *m = s[i].mat;
        size_t R = (size_t)m->rank;
        for (int t = s[i].row; t < s[i].row + s[i].n; t++) {
            for (int n = 0; n < n_out; n++) {
                double a = 0;
                for (size_t r = 0; r < R; r++)
                    a += (double)tb_load(be->act, u, (size_t)t * (size_t)ldu + r) *
                         (double)tb_load(be->act, m->b, (size_t)n * R + r);
                y[(size_t)t * (size_t)ldy + (size_t)n] += m->scale * (float)a;
            }
        }
    }
}

static void plain_lora_up_bwd(struct tb_backend *be, const struct tb_lora_span *s, int n_spans,
                              const void *dy, int ld_dy, int n_out, const void *u, void *du,
                              int ldu)
{
    for (int i = 0; i < n_spans; i++) {
        const struct tb_lora_mat *m = s[i].mat;
        size_t R = (size_t)m->rank, N = (size_t)n_out;
        for (int t = s[i].row; t < s[i].row + s[i].n; t++) {
            for (size_t r = 0; r < R; r++) {
                double a = 0;
                for (size_t n = 0; n < N; n++)
                    a += (double)tb_load(be->act, dy, (size_t)t * (size_t)ld_dy + n) *
                         (double)tb_load(be->act, m->b, n * R + r);
                tb_store(be->act, du, (size_t)t * (size_t)ldu + r, m->scale * (float)a);
            }
        }
        if (!s[i].gb) continue;
        for (size_t n = 0; n < N; n++) {
            for (size_t r = 0; r < R; r++) {
                double a = 0;
                for (int t = s[i].row; t < s[i].row + s[i].n; t++)
                    a += (double)tb_load(be->act, dy, (size_t)t * (size_t)ld_dy + n) *
                         (double)tb_load(be->act, u, (size_t)t * (size_t)ldu + r);
                s[i].gb[n * R + r] += m->scale * (float)a;
            }
        }
    }
}

static void plain_lora_down_bwd(struct tb_backend *be, const struct tb_lora_span *s, int n_spans,
                                const void *du, int ldu, const void *x, int ldx, int n_in,
                                float *dx, int ld_dx)
{
    for (int i = 0; i < n_spans; i++) {
        const struct tb_lora_mat *m = s[i].mat;
        size_t R = (size_t)m->rank, K = (size_t)n_in;
        for (int t = s[i].row; dx && t < s[i].row + s[i].n; t++) {
            for (size_t k = 0; k < K; k++) {
                double a = 0;
                for (size_t r = 0; r < R; r++)
                    a += (double)tb_load(be->act, du, (size_t)t * (size_t)ldu + r) *
                         (double)tb_load(be->act, m->a, r * K + k);
                dx[(size_t)t * (size_t)ld_dx + k] += (float)a;
            }
        }
        if (!s[i].ga) continue;
        for (size_t r = 0; r < R; r++) {
            for (size_t k = 0; k < K; k++) {
                double a = 0;
                for (int t = s[i].row; t < s[i].row + s[i].n; t++)
                    a += (double)tb_load(be->act, du, (size_t)t * (size_t)ldu + r) *
                         (double)tb_load(be->act, x, (size_t)t * (size_t)ldx + k);
                s[i].ga[r * K + k] += (float)a;
            }
        }
    }
}

static void plain_matmul_lora(struct tb_backend *be, const struct tb_weight *w, const void *x,
                              int T, const float *bias, float *y, int ldy, bool accumulate,
                              const struct tb_lora_term *terms, int n_terms)
{
    plain_matmul(be, w, x, T, bias, y, ldy, accumulate);
    for (int i = 0; i < n_terms; i++)
        plain_lora_up(be, terms[i].spans, terms[i].n_spans, terms[i].u, terms[i].ldu,
                      y + terms[i].col, ldy, terms[i].n_out);
}

void tb_plain_product_ops(struct tb_backend_ops *o)
{
    o->weight_create = plain_weight_create;
    o->weight_free = plain_weight_free;
    o->weight_bytes = plain_weight_bytes;
    o->weight_prepare_bwd = plain_weight_prepare_bwd;
    o->matmul = plain_matmul;
    o->matmul_lora = plain_matmul_lora;
    o->matmul_bwd = plain_matmul_bwd;
    o->lora_down = plain_lora_down;
    o->lora_up = plain_lora_up;
    o->lora_up_bwd = plain_lora_up_bwd;
    o->lora_down_bwd = plain_lora_down_bwd;
}
