/*
 * Rotary position embedding: the frequencies of the served kinds and tables of cos and sin by
 * position. Everything is computed in double and rounded once to float32.
 *
 * Thread: any (pure functions).
 */
#ifndef TB_MODEL_ROPE_H
#define TB_MODEL_ROPE_H

#include <stdbool.h>

#define TB_ROPE_MAX_DIM 1024 /* head_dim */

enum tb_rope_type { TB_ROPE_DEFAULT, TB_ROPE_LINEAR, TB_ROPE_LLAMA3, TB_ROPE_YARN };

struct tb_rope_config {
    enum tb_rope_type type;
    double theta;
    double factor;
    double original_max; /* original_max_position_embeddings; llama3 and yarn */
    double low_freq_factor, high_freq_factor; /* llama3 */
    double beta_fast, beta_slow;              /* yarn */
    double mscale, mscale_all_dim;            /* yarn; 0 = absent */
    double attention_factor;                  /* yarn; 0 = computed */
    bool no_truncate;                         /* yarn: truncate = false */
};

/* inv [dim/2] and the factor that multiplies cos and sin. dim is even, at most TB_ROPE_MAX_DIM. */
void tb_rope_inv_freq(const struct tb_rope_config *c, int dim, double *inv,
                      double *attention_factor);
/* Rows pos0 .. pos0+n-1 of the tables: cos, sin [n, dim/2]. */
void tb_rope_table(const struct tb_rope_config *c, int dim, int pos0, int n, float *cos_out,
                   float *sin_out);

#endif
