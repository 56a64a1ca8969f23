/*
 * config.json and generation_config.json of a Hugging Face folder, read into a plain struct. The
 * table of families says what differs between architectures; what cannot be served is refused by
 * name.
 *
 * Owner: the caller. Thread: any.
 */
#ifndef TB_MODEL_CONFIG_H
#define TB_MODEL_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "model/rope.h"
#include "util/error.h"

#define TB_MAX_EOS 32

struct tb_family {
    const char *arch;       /* architectures[0] */
    const char *model_type; /* used when there is no architectures */
    const char *prefix;     /* of tensor names: "model." */
    bool qkv_bias;          /* q, k, v always have biases */
    bool attention_bias;    /* the key attention_bias exists: biases on q, k, v and o */
    bool qk_norm;           /* RMSNorm on each head of q and k before rope */
    bool windows;           /* use_sliding_window, layer_types exist */
    double rope_theta;      /* default when the config has none */
    double norm_eps;
};

struct tb_model_config {
    const struct tb_family *family;
    int vocab, hidden, n_layers, n_heads, n_kv_heads, head_dim, ffn;
    int max_positions;
    bool tied;
    bool qkv_bias, o_bias, qk_norm;
    float norm_eps;
    struct tb_rope_config rope;
    int window;             /* tokens; 0: no layer has one */
    int window_from;        /* layers >= this one use it, unless layer_windows says otherwise */
    uint8_t *layer_windows; /* [n_layers] from layer_types, or NULL; tb_free */
    int n_eos;
    int32_t eos[TB_MAX_EOS]; /* of the two JSON files; the tokenizer's is added by the loader */
};

int tb_config_read(struct tb_model_config *out, const char *dir, struct tb_error *err);
/* The same from JSON texts; generation may be NULL. */
int tb_config_parse(struct tb_model_config *out, const char *config_json,
                    const char *generation_json, struct tb_error *err);
void tb_config_fini(struct tb_model_config *c);
int tb_config_window(const struct tb_model_config *c, int layer);

#endif
