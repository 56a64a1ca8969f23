/*
 * Rotary position embedding tables; see rope.h.
 *
 * Owner: nothing. Thread: any.
 */
#include "model/rope.h"

#include <math.h>
#include <stddef.h>

#include "util/mem.h"

static double yarn_mscale(double scale, double mscale)
{
    return scale <= 1 ? 1 : 0.1 * mscale * log(scale) + 1;
}

/* The (fractional) dimension that turns n times within the original context. */
static double yarn_dim(const struct tb_rope_config *c, int dim, double turns)
{
    return dim * log(c->original_max / (turns * 2 * M_PI)) / (2 * log(c->theta));
}

static void yarn(const struct tb_rope_config *c, int dim, double *inv, double *attention_factor)
{
    double lo = yarn_dim(c, dim, c->beta_fast), hi = yarn_dim(c, dim, c->beta_slow);
    if (!c->no_truncate) {
        lo = floor(lo);
        hi = ceil(hi);
    }
    lo = fmax(lo, 0);
    hi = fmin(hi, dim - 1);
    if (lo == hi) hi += 0.001;
    for (int i = 0; i < dim / 2; i++) {
        double ramp = fmin(fmax((i - lo) / (hi - lo), 0), 1);
        inv[i] = inv[i] / c->factor * ramp + inv[i] * (1 - ramp);
    }
    if (c->attention_factor > 0)
        *attention_factor = c->attention_factor;
    else if (c->mscale > 0 && c->mscale_all_dim > 0)
        *attention_factor =
            yarn_mscale(c->factor, c->mscale) / yarn_mscale(c->factor, c->mscale_all_dim);
    else
        *attention_factor = yarn_mscale(c->factor, 1);
}

static void llama3(const struct tb_rope_config *c, int dim, double *inv)
{
    double old = c->original_max, lo = c->low_freq_factor, hi = c->high_freq_factor;
    for (int i = 0; i < dim / 2; i++) {
        double wave = 2 * M_PI / inv[i];
        if (wave < old / hi) continue;
        if (wave > old / lo) {
            inv[i] /= c->factor;
        } else {
            double t = (old / wave - lo) / (hi - lo);
            inv[i] *= (1 - t) / c->factor + t;
        }
    }
}

void tb_rope_inv_freq(const struct tb_rope_config *c, int dim, double *inv,
                      double *attention_factor)
{
    *attention_factor = 1;
    for (int i = 0; i < dim / 2; i++)
        inv[i] = pow(c->theta, -2.0 * i / dim);
    switch (c->type) {
    case TB_ROPE_DEFAULT: break;
    case TB_ROPE_LINEAR:
        for (int i = 0; i < dim / 2; i++)
            inv[i] /= c->factor;
        break;
    case TB_ROPE_LLAMA3: llama3(c, dim, inv); break;
    case TB_ROPE_YARN: yarn(c, dim, inv, attention_factor); break;
    }
}

void tb_rope_table(const struct tb_rope_config *c, int dim, int pos0, int n, float *cos_out,
                   float *sin_out)
{
    double inv[TB_ROPE_MAX_DIM / 2], scale;
    TB_BUG_ON(dim > TB_ROPE_MAX_DIM);
    tb_rope_inv_freq(c, dim, inv, &scale);
    int half = dim / 2;
    for (int p = 0; p < n; p++)
        for (int i = 0; i < half; i++) {
            double angle = (double)(pos0 + p) * inv[i];
            cos_out[(size_t)p * (size_t)half + (size_t)i] = (float)(cos(angle) * scale);
            sin_out[(size_t)p * (size_t)half + (size_t)i] = (float)(sin(angle) * scale);
        }
}
