/*
 * Reading config.json; see config.h.
 *
 * Owner: the caller's struct. Thread: any.
 */
#include "model/config.h"

#include <errno.h>
#include <jansson.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "util/mem.h"

static const struct tb_family families[] = {
    {.arch = "LlamaForCausalLM",
     .model_type = "llama",
     .prefix = "model.",
     .attention_bias = true,
     .rope_theta = 10000,
     .norm_eps = 1e-6},
    {.arch = "Qwen2ForCausalLM",
     .model_type = "qwen2",
     .prefix = "model.",
     .qkv_bias = true,
     .windows = true,
     .rope_theta = 10000,
     .norm_eps = 1e-6},
    {.arch = "Qwen3ForCausalLM",
     .model_type = "qwen3",
     .prefix = "model.",
     .attention_bias = true,
     .qk_norm = true,
     .windows = true,
     .rope_theta = 10000,
     .norm_eps = 1e-6},
};

static bool present(const json_t *o, const char *key)
{
    const json_t *v = json_object_get(o, key);
    return v && !json_is_null(v);
}

/* A required (def < 0) or optional positive integer. */
static int get_int(const json_t *o, const char *key, int max, int def, int *out,
                   struct tb_error *err)
{
    if (!present(o, key)) {
        if (def < 0) return tb_error_set(err, TB_EINVAL, "config.json: %s is missing", key);
        *out = def;
        return 0;
    }
    const json_t *v = json_object_get(o, key);
    if (!json_is_integer(v))
        return tb_error_set(err, TB_EINVAL, "config.json: %s is not an integer", key);
    json_int_t i = json_integer_value(v);
    if (i < 1 || i > max)
        return tb_error_set(err, TB_EINVAL, "config.json: %s is %lld, outside of 1 to %d", key,
                            (long long)i, max);
    *out = (int)i;
    return 0;
}

static int get_bool(const json_t *o, const char *key, bool def, bool *out, struct tb_error *err)
{
    *out = def;
    if (!present(o, key)) return 0;
    const json_t *v = json_object_get(o, key);
    if (!json_is_boolean(v))
        return tb_error_set(err, TB_EINVAL, "config.json: %s is not true or false", key);
    *out = json_is_true(v);
    return 0;
}

/* A positive number; def is taken when the key is absent, and def <= 0 makes it required. */
static int get_num(const json_t *o, const char *key, double def, double *out, struct tb_error *err)
{
    if (!present(o, key)) {
        if (def <= 0) return tb_error_set(err, TB_EINVAL, "config.json: %s is missing", key);
        *out = def;
        return 0;
    }
    const json_t *v = json_object_get(o, key);
    if (!json_is_number(v) || !isfinite(json_number_value(v)) || json_number_value(v) <= 0)
        return tb_error_set(err, TB_EINVAL, "config.json: %s is not a positive number", key);
    *out = json_number_value(v);
    return 0;
}

static int find_family(const json_t *root, const struct tb_family **out, struct tb_error *err)
{
    const json_t *archs = json_object_get(root, "architectures");
    const char *arch = json_string_value(json_array_get(archs, 0));
    const char *type = json_string_value(json_object_get(root, "model_type"));
    for (size_t i = 0; i < TB_ARRAY_LEN(families); i++)
        if (arch ? !strcmp(arch, families[i].arch)
                 : type && !strcmp(type, families[i].model_type)) {
            *out = &families[i];
            return 0;
        }
    return tb_error_set(err, TB_EUNSUPPORTED,
                        "config.json: architectures: %s is not served; LlamaForCausalLM, "
                        "Qwen2ForCausalLM and Qwen3ForCausalLM are",
                        arch   ? arch
                        : type ? type
                               : "(missing)");
}

static int parse_rope_kind(struct tb_rope_config *r, const json_t *rs, const char *where,
                           const char *kind, int max_positions, struct tb_error *err)
{
    int rc = 0;
    if (!strcmp(kind, "default")) {
        r->type = TB_ROPE_DEFAULT;
    } else if (!strcmp(kind, "linear")) {
        r->type = TB_ROPE_LINEAR;
        rc = get_num(rs, "factor", 0, &r->factor, err);
    } else if (!strcmp(kind, "llama3")) {
        r->type = TB_ROPE_LLAMA3;
        if (!rc) rc = get_num(rs, "factor", 0, &r->factor, err);
        if (!rc) rc = get_num(rs, "low_freq_factor", 0, &r->low_freq_factor, err);
        if (!rc) rc = get_num(rs, "high_freq_factor", 0, &r->high_freq_factor, err);
        if (!rc) rc = get_num(rs, "original_max_position_embeddings", 0, &r->original_max, err);
        if (!rc && r->high_freq_factor <= r->low_freq_factor)
            rc = tb_error_set(err, TB_EINVAL,
                              "config.json: %s: high_freq_factor is not above low_freq_factor",
                              where);
    } else if (!strcmp(kind, "yarn")) {
        bool truncate = true;
        r->type = TB_ROPE_YARN;
        if (!rc) rc = get_num(rs, "factor", 0, &r->factor, err);
        if (!rc)
            rc = get_num(rs, "original_max_position_embeddings", max_positions, &r->original_max,
                         err);
        if (!rc) rc = get_num(rs, "beta_fast", 32, &r->beta_fast, err);
        if (!rc) rc = get_num(rs, "beta_slow", 1, &r->beta_slow, err);
        if (!rc && present(rs, "mscale")) rc = get_num(rs, "mscale", 0, &r->mscale, err);
        if (!rc && present(rs, "mscale_all_dim"))
            rc = get_num(rs, "mscale_all_dim", 0, &r->mscale_all_dim, err);
        if (!rc && present(rs, "attention_factor"))
            rc = get_num(rs, "attention_factor", 0, &r->attention_factor, err);
        if (!rc) rc = get_bool(rs, "truncate", true, &truncate, err);
        r->no_truncate = !truncate;
        if (!rc && r->theta <= 1)
            rc = tb_error_set(err, TB_EINVAL, "config.json: rope_theta must be above 1 for yarn");
    } else {
        rc =
            tb_error_set(err, TB_EUNSUPPORTED,
                         "config.json: %s: rope type %s is not served; default, linear, llama3 and "
                         "yarn are",
                         where, kind);
    }
    return rc;
}

/* rope_parameters (new form) or rope_scaling (old form), with rope_theta inside or outside. */
static int parse_rope(struct tb_model_config *c, const json_t *root, struct tb_error *err)
{
    struct tb_rope_config *r = &c->rope;
    *r = (struct tb_rope_config){.type = TB_ROPE_DEFAULT, .factor = 1};
    const char *where = present(root, "rope_parameters") ? "rope_parameters" : "rope_scaling";
    const json_t *rs = json_object_get(root, where);
    if (rs && json_is_null(rs)) rs = NULL;
    if (rs && !json_is_object(rs))
        return tb_error_set(err, TB_EINVAL, "config.json: %s is not an object", where);
    const json_t *theta = present(rs, "rope_theta") ? rs : root;
    int rc = get_num(theta, "rope_theta", c->family->rope_theta, &r->theta, err);
    if (rc) return rc;
    const json_t *partial = present(rs, "partial_rotary_factor") ? rs : root;
    double p = 1;
    if (!rc) rc = get_num(partial, "partial_rotary_factor", 1, &p, err);
    if (!rc && p != 1)
        rc = tb_error_set(err, TB_EUNSUPPORTED,
                          "config.json: partial_rotary_factor other than 1 is not served");
    if (rc || !rs || json_object_size(rs) == 0) return rc;
    const json_t *kind = json_object_get(rs, "rope_type");
    if (!kind) kind = json_object_get(rs, "type");
    if (!kind) return 0; /* only rope_theta: the default kind */
    if (!json_is_string(kind))
        return tb_error_set(err, TB_EINVAL, "config.json: %s: rope_type is not a string", where);
    return parse_rope_kind(r, rs, where, json_string_value(kind), c->max_positions, err);
}

static int parse_windows(struct tb_model_config *c, const json_t *root, struct tb_error *err)
{
    bool use = false;
    int rc = get_bool(root, "use_sliding_window", false, &use, err);
    if (rc) return rc;
    if (use && !c->family->windows)
        return tb_error_set(err, TB_EUNSUPPORTED,
                            "config.json: use_sliding_window is not served for %s",
                            c->family->arch);
    const json_t *types = json_object_get(root, "layer_types");
    if (types && !json_is_null(types)) {
        if (!json_is_array(types) || json_array_size(types) != (size_t)c->n_layers)
            return tb_error_set(
                err, TB_EINVAL,
                "config.json: layer_types is not a list of num_hidden_layers entries");
        c->layer_windows = tb_calloc((size_t)c->n_layers, 1);
        for (int i = 0; i < c->n_layers; i++) {
            const char *s = json_string_value(json_array_get(types, (size_t)i));
            bool sliding = s && !strcmp(s, "sliding_attention");
            if (!s || (!sliding && strcmp(s, "full_attention")))
                return tb_error_set(err, TB_EUNSUPPORTED,
                                    "config.json: layer_types[%d]: %s is not served", i,
                                    s ? s : "(not a string)");
            if (sliding && !use)
                return tb_error_set(err, TB_EUNSUPPORTED,
                                    "config.json: layer_types[%d]: sliding_attention without "
                                    "use_sliding_window is not served",
                                    i);
            c->layer_windows[i] = sliding;
        }
    }
    if (!use) return 0;
    if (!present(root, "sliding_window")) return 0;
    rc = get_int(root, "sliding_window", INT_MAX, -1, &c->window, err);
    /* max_window_layers may be 0 (every layer has a window). */
    const json_t *from = json_object_get(root, "max_window_layers");
    if (!rc && from && !json_is_null(from)) {
        if (!json_is_integer(from) || json_integer_value(from) < 0 ||
            json_integer_value(from) > INT_MAX)
            return tb_error_set(err, TB_EINVAL,
                                "config.json: max_window_layers is not a whole number");
        c->window_from = (int)json_integer_value(from);
    } else {
        c->window_from = 28; /* transformers' default */
    }
    return rc;
}

static int refuse_unserved(const struct tb_model_config *c, const json_t *root,
                           struct tb_error *err)
{
    const char *act = json_string_value(json_object_get(root, "hidden_act"));
    if (present(root, "hidden_act") && (!act || strcmp(act, "silu")))
        return tb_error_set(err, TB_EUNSUPPORTED,
                            "config.json: hidden_act: %s is not served; silu is",
                            act ? act : "(not a string)");
    if (present(root, "quantization_config"))
        return tb_error_set(err, TB_EUNSUPPORTED,
                            "config.json: quantization_config: quantized weights are not served");
    bool mlp_bias = false;
    int rc = get_bool(root, "mlp_bias", false, &mlp_bias, err);
    if (rc) return rc;
    if (mlp_bias)
        return tb_error_set(err, TB_EUNSUPPORTED, "config.json: mlp_bias true is not served");
    static const char *const absent[] = {"num_experts", "num_local_experts", "text_config",
                                         "no_rope_layers"};
    for (size_t i = 0; i < TB_ARRAY_LEN(absent); i++)
        if (present(root, absent[i]))
            return tb_error_set(err, TB_EUNSUPPORTED, "config.json: %s is not served for %s",
                                absent[i], c->family->arch);
    return 0;
}

static int add_eos(struct tb_model_config *c, const json_t *v, const char *file,
                   struct tb_error *err)
{
    size_t n = json_is_array(v) ? json_array_size(v) : 1;
    if (n > TB_MAX_EOS)
        return tb_error_set(err, TB_EINVAL, "%s: eos_token_id: more than %d ids", file, TB_MAX_EOS);
    for (size_t i = 0; i < n; i++) {
        const json_t *e = json_is_array(v) ? json_array_get(v, i) : v;
        if (!json_is_integer(e) || json_integer_value(e) < 0 || json_integer_value(e) > INT32_MAX)
            return tb_error_set(err, TB_EINVAL,
                                "%s: eos_token_id is not a token id or a list of them", file);
        bool seen = false;
        for (int k = 0; k < c->n_eos; k++)
            seen |= c->eos[k] == json_integer_value(e);
        if (!seen) c->eos[c->n_eos++] = (int32_t)json_integer_value(e);
    }
    return 0;
}

static int parse_root(struct tb_model_config *c, const json_t *root, const json_t *gen,
                      struct tb_error *err)
{
    if (!json_is_object(root)) return tb_error_set(err, TB_EINVAL, "config.json: not an object");
    int rc = find_family(root, &c->family, err);
    if (rc) return rc;
    rc = refuse_unserved(c, root, err);
    if (!rc) rc = get_int(root, "vocab_size", 1 << 24, -1, &c->vocab, err);
    if (!rc) rc = get_int(root, "hidden_size", 1 << 20, -1, &c->hidden, err);
    if (!rc) rc = get_int(root, "intermediate_size", 1 << 22, -1, &c->ffn, err);
    if (!rc) rc = get_int(root, "num_hidden_layers", 4096, -1, &c->n_layers, err);
    if (!rc) rc = get_int(root, "num_attention_heads", 4096, -1, &c->n_heads, err);
    if (!rc) rc = get_int(root, "num_key_value_heads", 4096, c->n_heads, &c->n_kv_heads, err);
    if (!rc) rc = get_int(root, "max_position_embeddings", 1 << 24, -1, &c->max_positions, err);
    if (rc) return rc;
    if (c->n_heads % c->n_kv_heads)
        return tb_error_set(err, TB_EINVAL,
                            "config.json: num_attention_heads %d is not a multiple of "
                            "num_key_value_heads %d",
                            c->n_heads, c->n_kv_heads);
    if (!present(root, "head_dim") && c->hidden % c->n_heads)
        return tb_error_set(
            err, TB_EINVAL,
            "config.json: hidden_size %d is not a multiple of num_attention_heads %d", c->hidden,
            c->n_heads);
    rc = get_int(root, "head_dim", TB_ROPE_MAX_DIM, TB_MIN(c->hidden / c->n_heads, TB_ROPE_MAX_DIM),
                 &c->head_dim, err);
    if (rc) return rc;
    if (c->head_dim % 2 || (!present(root, "head_dim") && c->head_dim != c->hidden / c->n_heads))
        return tb_error_set(err, TB_EUNSUPPORTED,
                            "config.json: head_dim %d is not served; it must be even "
                            "and at most %d",
                            c->head_dim, TB_ROPE_MAX_DIM);
    bool bias = false;
    double eps = 0;
    rc = get_bool(root, "tie_word_embeddings", false, &c->tied, err);
    if (!rc) rc = get_bool(root, "attention_bias", false, &bias, err);
    if (!rc) rc = get_num(root, "rms_norm_eps", c->family->norm_eps, &eps, err);
    if (rc) return rc;
    bias = bias && c->family->attention_bias;
    c->qkv_bias = c->family->qkv_bias || bias;
    c->o_bias = bias;
    c->qk_norm = c->family->qk_norm;
    c->norm_eps = (float)eps;
    rc = parse_rope(c, root, err);
    if (!rc) rc = parse_windows(c, root, err);
    if (rc) return rc;
    if (present(gen, "eos_token_id"))
        return add_eos(c, json_object_get(gen, "eos_token_id"), "generation_config.json", err);
    if (present(root, "eos_token_id"))
        return add_eos(c, json_object_get(root, "eos_token_id"), "config.json", err);
    return 0;
}

static int parse(struct tb_model_config *out, const json_t *root, const json_t *gen,
                 struct tb_error *err)
{
    memset(out, 0, sizeof(*out));
    int rc = parse_root(out, root, gen, err);
    if (rc) tb_config_fini(out);
    return rc;
}

int tb_config_parse(struct tb_model_config *out, const char *config_json,
                    const char *generation_json, struct tb_error *err)
{
    json_error_t je;
    json_t *root = json_loads(config_json, JSON_REJECT_DUPLICATES, &je), *gen = NULL;
    if (!root) return tb_error_set(err, TB_EINVAL, "config.json: line %d: %s", je.line, je.text);
    int rc = 0;
    if (generation_json && !(gen = json_loads(generation_json, JSON_REJECT_DUPLICATES, &je)))
        rc = tb_error_set(err, TB_EINVAL, "generation_config.json: line %d: %s", je.line, je.text);
    if (!rc) rc = parse(out, root, gen, err);
    json_decref(root);
    json_decref(gen);
    return rc;
}

/* Reads dir/name; an absent file is an error only when required. */
static int load_json(const char *dir, const char *name, bool required, json_t **out,
                     struct tb_error *err)
{
    char *path = tb_asprintf("%s/%s", dir, name);
    json_error_t je;
    int rc = 0;
    *out = NULL;
    if (access(path, F_OK)) {
        if (required) rc = tb_error_set(err, TB_ENOTFOUND, "%s: %s", path, strerror(errno));
    } else if (!(*out = json_load_file(path, JSON_REJECT_DUPLICATES, &je))) {
        rc = tb_error_set(err, TB_EINVAL, "%s: line %d: %s", name, je.line, je.text);
    }
    tb_free(path);
    return rc;
}

int tb_config_read(struct tb_model_config *out, const char *dir, struct tb_error *err)
{
    json_t *root = NULL, *gen = NULL;
    int rc = load_json(dir, "config.json", true, &root, err);
    if (!rc) rc = load_json(dir, "generation_config.json", false, &gen, err);
    if (!rc) rc = parse(out, root, gen, err);
    json_decref(root);
    json_decref(gen);
    return rc;
}

void tb_config_fini(struct tb_model_config *c)
{
    tb_free(c->layer_windows);
    c->layer_windows = NULL;
}

int tb_config_window(const struct tb_model_config *c, int layer)
{
    if (c->window <= 0) return 0;
    bool on = c->layer_windows ? c->layer_windows[layer] != 0 : layer >= c->window_from;
    return on ? c->window : 0;
}
