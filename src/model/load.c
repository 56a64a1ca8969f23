/*
 * Loading a model folder: config, tensors checked by name, dtype and shape, weights packed from the
 * mapping, tables. See model.h.
 *
 * Owner: struct tb_model. Thread: tb_model_load on any thread; the rest on the model's.
 */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "model/internal.h"
#include "util/log.h"
#include "util/mem.h"

#define TB_ROPE_FIRST  4096
#define TB_PIECE_BYTES ((size_t)64 << 20)

/* True when the backend may read ordinary host memory where it takes device memory. */
static bool reads_host(const struct tb_backend *be)
{
    return strcmp(be->ops->name, "cpu") == 0;
}

/* ---- one weight: its tensors in the file, stacked along n_out */
struct weight_parts {
    int n, n_in;
    int rows[3];
    const struct tb_st_tensor *t[3];
    const void *data[3];
    enum tb_dtype dtypes[3];
};

static int part(struct tb_model *m, struct weight_parts *w, const char *name, int rows, int n_in,
                struct tb_error *err)
{
    const struct tb_st_tensor *t;
    int rc = tb_st_require(m->st, name, 2, rows, n_in, &t, err);
    if (rc) return rc;
    w->n_in = n_in;
    w->rows[w->n] = rows;
    w->t[w->n] = t;
    w->data[w->n] = t->data;
    w->dtypes[w->n] = t->dtype;
    w->n++;
    return 0;
}

static int layer_part(struct tb_model *m, struct weight_parts *w, int layer, const char *leaf,
                      int rows, int n_in, struct tb_error *err)
{
    char name[192];
    snprintf(name, sizeof(name), "%slayers.%d.%s.weight", m->cfg.family->prefix, layer, leaf);
    return part(m, w, name, rows, n_in, err);
}

enum which { W_QKV, W_O, W_GATE_UP, W_DOWN, W_HEAD };

static int find_parts(struct tb_model *m, int layer, enum which which, struct weight_parts *w,
                      struct tb_error *err)
{
    const struct tb_model_config *c = &m->cfg;
    int rc = 0, d = c->hidden;
    memset(w, 0, sizeof(*w));
    switch (which) {
    case W_QKV:
        if (!rc) rc = layer_part(m, w, layer, "self_attn.q_proj", tb_cfg_q(c), d, err);
        if (!rc) rc = layer_part(m, w, layer, "self_attn.k_proj", tb_cfg_kv(c), d, err);
        if (!rc) rc = layer_part(m, w, layer, "self_attn.v_proj", tb_cfg_kv(c), d, err);
        break;
    case W_O: rc = layer_part(m, w, layer, "self_attn.o_proj", d, tb_cfg_q(c), err); break;
    case W_GATE_UP:
        if (!rc) rc = layer_part(m, w, layer, "mlp.gate_proj", c->ffn, d, err);
        if (!rc) rc = layer_part(m, w, layer, "mlp.up_proj", c->ffn, d, err);
        break;
    case W_DOWN: rc = layer_part(m, w, layer, "mlp.down_proj", d, c->ffn, err); break;
    case W_HEAD: {
        char name[64];
        if (c->tied)
            snprintf(name, sizeof(name), "%sembed_tokens.weight", c->family->prefix);
        else
            snprintf(name, sizeof(name), "lm_head.weight");
        rc = part(m, w, name, c->vocab, d, err);
        break;
    }
    }
    return rc;
}

static struct tb_weight **weight_at(struct tb_model *m, int layer, enum which which)
{
    switch (which) {
    case W_QKV: return &m->layers[layer].qkv;
    case W_O: return &m->layers[layer].o;
    case W_GATE_UP: return &m->layers[layer].gate_up;
    case W_DOWN: return &m->layers[layer].down;
    case W_HEAD: break;
    }
    return &m->head;
}

static int pack(struct tb_model *m, int layer, enum which which, bool backward,
                struct tb_error *err)
{
    struct weight_parts w;
    int rc = find_parts(m, layer, which, &w, err);
    if (rc) return rc;
    struct tb_weight **at = weight_at(m, layer, which);
    const struct tb_backend_ops *ops = m->be->ops;
    if (backward)
        rc = ops->weight_prepare_bwd(m->be, *at, w.n, w.data, w.dtypes, w.rows, err);
    else
        rc = ops->weight_create(m->be, w.n, w.data, w.dtypes, w.rows, w.n_in, at, err);
    for (int i = 0; i < w.n; i++)
        tb_st_drop_pages(m->st, w.t[i]);
    return rc ? tb_error_prefix(err, "%s", w.t[0]->name) : 0;
}

static int pack_all(struct tb_model *m, bool backward, struct tb_error *err)
{
    int rc = 0;
    for (int l = 0; l < m->cfg.n_layers && !rc; l++)
        for (int which = W_QKV; which < W_HEAD && !rc; which++)
            rc = pack(m, l, (enum which)which, backward, err);
    if (!rc) rc = pack(m, 0, W_HEAD, backward, err);
    return rc;
}

static void count_bytes(struct tb_model *m)
{
    const struct tb_backend_ops *ops = m->be->ops;
    size_t n = ops->weight_bytes(m->head) + (m->embed_copy ? m->embed_bytes : 0);
    for (int l = 0; l < m->cfg.n_layers; l++)
        n += ops->weight_bytes(m->layers[l].qkv) + ops->weight_bytes(m->layers[l].o) +
             ops->weight_bytes(m->layers[l].gate_up) + ops->weight_bytes(m->layers[l].down);
    m->info.weight_bytes = n;
}

int tb_model_prepare_bwd(struct tb_model *m, struct tb_error *err)
{
    if (m->bwd_ready) return 0;
    int rc = pack_all(m, true, err);
    if (rc) return rc;
    m->bwd_ready = true;
    count_bytes(m);
    return 0;
}

/* ---- vectors: norms and biases, as float32 on the device */
static int vector(struct tb_model *m, float **out, int n_names, const char *const *names,
                  const int *sizes, struct tb_error *err)
{
    size_t total = 0;
    for (int i = 0; i < n_names; i++)
        total += (size_t)sizes[i];
    float *host = tb_try_malloc(total * 4), *at = host;
    if (!host) return tb_error_set(err, TB_ENOMEM, "no memory for tensor %s", names[0]);
    int rc = 0;
    for (int i = 0; i < n_names && !rc; i++) {
        const struct tb_st_tensor *t;
        rc = tb_st_require(m->st, names[i], 1, sizes[i], 0, &t, err);
        if (!rc) tb_st_to_float(t, at, (size_t)sizes[i]);
        at += sizes[i];
    }
    if (!rc) {
        *out = m->be->ops->alloc(m->be, total * 4);
        if (*out)
            m->be->ops->upload(m->be, *out, host, total * 4);
        else
            rc = tb_backend_no_memory(m->be, err, total * 4, names[0]);
    }
    tb_free(host);
    return rc;
}

static int layer_vector(struct tb_model *m, float **out, int layer, const char *leaf, int n,
                        struct tb_error *err)
{
    char name[192];
    snprintf(name, sizeof(name), "%slayers.%d.%s", m->cfg.family->prefix, layer, leaf);
    const char *names = name;
    return vector(m, out, 1, &names, &n, err);
}

static int load_layer_vectors(struct tb_model *m, int l, struct tb_error *err)
{
    const struct tb_model_config *c = &m->cfg;
    struct tb_layer *y = &m->layers[l];
    int rc = layer_vector(m, &y->norm_attn, l, "input_layernorm.weight", c->hidden, err);
    if (!rc)
        rc = layer_vector(m, &y->norm_mlp, l, "post_attention_layernorm.weight", c->hidden, err);
    if (!rc && c->qk_norm)
        rc = layer_vector(m, &y->q_norm, l, "self_attn.q_norm.weight", c->head_dim, err);
    if (!rc && c->qk_norm)
        rc = layer_vector(m, &y->k_norm, l, "self_attn.k_norm.weight", c->head_dim, err);
    if (!rc && c->o_bias)
        rc = layer_vector(m, &y->o_bias, l, "self_attn.o_proj.bias", c->hidden, err);
    if (!rc && c->qkv_bias) {
        char text[3][192];
        const char *names[3];
        int sizes[3] = {tb_cfg_q(c), tb_cfg_kv(c), tb_cfg_kv(c)};
        for (int i = 0; i < 3; i++) {
            snprintf(text[i], sizeof(text[i]), "%slayers.%d.self_attn.%c_proj.bias",
                     c->family->prefix, l, "qkv"[i]);
            names[i] = text[i];
        }
        rc = vector(m, &y->qkv_bias, 3, names, sizes, err);
    }
    y->window = tb_config_window(c, l);
    return rc;
}

/* The input embedding stays mapped where the device reads host memory. */
static int load_embedding(struct tb_model *m, struct tb_error *err)
{
    char name[64];
    snprintf(name, sizeof(name), "%sembed_tokens.weight", m->cfg.family->prefix);
    const struct tb_st_tensor *t;
    int rc = tb_st_require(m->st, name, 2, m->cfg.vocab, m->cfg.hidden, &t, err);
    if (rc) return rc;
    m->embed = t->data;
    m->embed_dtype = t->dtype;
    m->embed_bytes = t->bytes;
    if (reads_host(m->be)) return 0;
    m->embed_copy = m->be->ops->alloc(m->be, t->bytes);
    if (!m->embed_copy) return tb_backend_no_memory(m->be, err, t->bytes, name);
    m->be->ops->upload(m->be, m->embed_copy, t->data, t->bytes);
    m->embed = m->embed_copy;
    tb_st_drop_pages(m->st, t);
    return 0;
}

static int load_tokenizer(struct tb_model *m, struct tb_error *err)
{
    struct tb_error e = {0};
    int rc = tb_tokenizer_create(m->dir, &m->tokenizer, &e);
    if (rc == TB_EUNSUPPORTED) /* tokens work all the same; text and stop strings do not */
        tb_log(TB_LOG_WARN, "model", "%s: no tokenizer: %s", m->name, e.msg);
    if (rc) m->no_tokenizer = tb_strdup(e.msg);
    if (rc == 0 || rc == TB_ENOTFOUND || rc == TB_EUNSUPPORTED) return 0;
    return tb_error_set(err, rc, "%s", e.msg);
}

static void collect_eos(struct tb_model *m)
{
    const struct tb_model_config *c = &m->cfg;
    int n = 0;
    for (int i = 0; i < c->n_eos; i++)
        if (c->eos[i] < c->vocab) m->eos[n++] = c->eos[i];
    int32_t t = m->tokenizer ? tb_tokenizer_eos_id(m->tokenizer) : -1;
    bool seen = t < 0 || t >= c->vocab;
    for (int i = 0; i < n; i++)
        seen |= m->eos[i] == t;
    if (!seen) m->eos[n++] = t;
    m->info.n_eos = n;
    m->info.eos = m->eos;
}

static void set_limits(struct tb_model *m)
{
    const struct tb_model_config *c = &m->cfg;
    struct tb_model_options *o = &m->opt;
    if (o->max_rank <= 0) o->max_rank = 256;
    if (o->max_context <= 0 || o->max_context > c->max_positions) o->max_context = c->max_positions;
    m->shard_tokens = o->shard_tokens ? o->shard_tokens : m->be->shard_tokens;
    /* Pieces of 64 rows where these bytes hold them; the piece depends on nothing but the model and
     * this option, so gradients depend neither on what shares the batch nor on the device's memory.
     */
    const struct tb_backend_sizes *sizes = &m->be->sizes;
    size_t row = (size_t)c->vocab * 4;
    size_t piece = (o->logits_bytes ? o->logits_bytes : TB_PIECE_BYTES) / row;
    size_t rows = (o->logits_bytes ? o->logits_bytes : sizes->logits_bytes) / row;
    m->head_piece = (int)TB_MIN(TB_MAX(piece, 1), 64);
    m->head_rows = (int)TB_MIN(rows, 2048) / m->head_piece * m->head_piece;
    m->head_rows = TB_MAX(m->head_rows, m->head_piece);
    size_t phys = tb_model_memory(m);
    size_t soft = TB_MIN(phys / (size_t)sizes->activation_part, sizes->activation_bytes);
    m->soft_bytes = o->activation_bytes ? o->activation_bytes : soft;
    m->hard_bytes = o->activation_bytes ? o->activation_bytes : TB_MAX(m->soft_bytes, phys / 5 * 3);
}

static void fill_info(struct tb_model *m)
{
    const struct tb_model_config *c = &m->cfg;
    struct tb_model_info *i = &m->info;
    i->name = m->name;
    i->dir = m->dir;
    i->arch = c->family->arch;
    i->vocab = c->vocab;
    i->hidden = c->hidden;
    i->n_layers = c->n_layers;
    i->n_heads = c->n_heads;
    i->n_kv_heads = c->n_kv_heads;
    i->head_dim = c->head_dim;
    i->ffn = c->ffn;
    i->max_context = m->opt.max_context;
    i->max_rank = m->opt.max_rank;
    i->tokenizer = m->tokenizer;
    i->no_tokenizer = m->no_tokenizer;
    i->kv_pages_total = m->kv.n_pages;
}

static int check_head_dim(const struct tb_model *m, struct tb_error *err)
{
    const struct tb_backend_ops *ops = m->be->ops;
    int n = m->cfg.head_dim;
    if (n >= ops->min_head_dim && (!ops->max_head_dim || n <= ops->max_head_dim)) return 0;
    return tb_error_set(err, TB_EUNSUPPORTED,
                        "config.json: head_dim %d is not served by the %s backend; it must be %d "
                        "to %d",
                        n, ops->name, ops->min_head_dim, ops->max_head_dim);
}

static int load(struct tb_model *m, struct tb_error *err)
{
    int rc = tb_config_read(&m->cfg, m->dir, err);
    if (!rc) rc = check_head_dim(m, err);
    if (!rc) rc = tb_st_open_dir(&m->st, m->dir, err);
    if (rc) return rc;
    m->layers = tb_calloc((size_t)m->cfg.n_layers, sizeof(*m->layers));
    set_limits(m);
    /* All shapes first: a bad tensor at the end is told before minutes of packing. */
    for (int l = 0; l < m->cfg.n_layers && !rc; l++) {
        struct weight_parts w;
        for (int which = W_QKV; which < W_HEAD && !rc; which++)
            rc = find_parts(m, l, (enum which)which, &w, err);
        if (!rc) rc = load_layer_vectors(m, l, err);
    }
    char name[64];
    snprintf(name, sizeof(name), "%snorm.weight", m->cfg.family->prefix);
    const char *names = name;
    if (!rc) rc = load_embedding(m, err);
    if (!rc) rc = vector(m, &m->norm, 1, &names, &m->cfg.hidden, err);
    if (!rc) rc = load_tokenizer(m, err);
    if (!rc) rc = pack_all(m, false, err);
    if (!rc) rc = tb_model_need_rope(m, TB_MIN(m->opt.max_context, TB_ROPE_FIRST), err);
    if (rc) return rc;
    rc = tb_kv_init(&m->kv, m, err);
    if (rc) return rc;
    collect_eos(m);
    fill_info(m);
    count_bytes(m);
    return m->be->ops->sync(m->be, err);
}

int tb_model_load(struct tb_model **out, struct tb_backend *be, const char *name, const char *dir,
                  const struct tb_model_options *options, struct tb_error *err)
{
    struct tb_model *m = tb_calloc(1, sizeof(*m));
    m->be = be;
    m->name = tb_strdup(name);
    m->dir = tb_strdup(dir);
    if (options) m->opt = *options;
    tb_backend_use(be, TB_QUEUE_TRAIN);
    tb_list_init(&m->samplings);
    tb_list_init(&m->in_pager);
    if (m->opt.pager) tb_pager_add_model(m->opt.pager, &m->in_pager);
    int rc = load(m, err);
    if (rc) {
        tb_model_free(m);
        return tb_error_prefix(err, "model %s (%s)", name, dir);
    }
    *out = m;
    return 0;
}

static void free_vector(struct tb_model *m, float *v, size_t n)
{
    if (v) m->be->ops->free(m->be, v, n * 4);
}

void tb_model_free(struct tb_model *m)
{
    if (!m) return;
    const struct tb_backend_ops *ops = m->be->ops;
    const struct tb_model_config *c = &m->cfg;
    TB_BUG_ON(!tb_list_empty(&m->samplings));
    for (int l = 0; m->layers && l < c->n_layers; l++) {
        struct tb_layer *y = &m->layers[l];
        struct tb_weight *w[] = {y->qkv, y->o, y->gate_up, y->down};
        for (size_t i = 0; i < TB_ARRAY_LEN(w); i++)
            if (w[i]) ops->weight_free(m->be, w[i]);
        free_vector(m, y->norm_attn, (size_t)c->hidden);
        free_vector(m, y->norm_mlp, (size_t)c->hidden);
        free_vector(m, y->q_norm, (size_t)c->head_dim);
        free_vector(m, y->k_norm, (size_t)c->head_dim);
        free_vector(m, y->o_bias, (size_t)c->hidden);
        free_vector(m, y->qkv_bias, (size_t)tb_cfg_qkv(c));
    }
    tb_free(m->layers);
    if (m->head) ops->weight_free(m->be, m->head);
    free_vector(m, m->norm, (size_t)c->hidden);
    if (m->embed_copy) ops->free(m->be, m->embed_copy, m->embed_bytes);
    free_vector(m, m->rope_cos, (size_t)m->rope_len * (size_t)c->head_dim / 2);
    free_vector(m, m->rope_sin, (size_t)m->rope_len * (size_t)c->head_dim / 2);
    tb_list_del(&m->in_pager);
    tb_model_free_workspaces(m);
    tb_kv_fini(&m->kv, m);
    tb_tokenizer_destroy(m->tokenizer);
    tb_free(m->no_tokenizer);
    tb_st_close(m->st);
    tb_config_fini(&m->cfg);
    tb_free(m->name);
    tb_free(m->dir);
    tb_free(m);
}

const struct tb_model_info *tb_model_info(const struct tb_model *m)
{
    return &m->info;
}

/* ---- tables and workspaces */

int tb_model_need_rope(struct tb_model *m, int n, struct tb_error *err)
{
    if (n <= m->rope_len) return 0;
    int len = TB_MAX(m->rope_len, 64);
    while (len < n)
        len = len > m->opt.max_context / 2 ? TB_MAX(n, m->opt.max_context) : len * 2;
    size_t half = (size_t)m->cfg.head_dim / 2, bytes = (size_t)len * half * 4;
    float *host = tb_try_malloc(2 * bytes);
    float *c = host ? m->be->ops->alloc(m->be, bytes) : NULL;
    float *s = c ? m->be->ops->alloc(m->be, bytes) : NULL;
    if (!s) {
        if (c) m->be->ops->free(m->be, c, bytes);
        tb_free(host);
        return tb_backend_no_memory(m->be, err, 2 * bytes, "the rope tables");
    }
    float *host_sin = host + (size_t)len * half;
    tb_rope_table(&m->cfg.rope, m->cfg.head_dim, 0, len, host, host_sin);
    m->be->ops->upload(m->be, c, host, bytes);
    m->be->ops->upload(m->be, s, host_sin, bytes);
    tb_free(host);
    free_vector(m, m->rope_cos, (size_t)m->rope_len * half);
    free_vector(m, m->rope_sin, (size_t)m->rope_len * half);
    m->rope_cos = c;
    m->rope_sin = s;
    m->rope_len = len;
    return 0;
}

int tb_block_reserve(struct tb_backend *be, struct tb_block *b, size_t bytes, const char *what,
                     struct tb_error *err)
{
    if (bytes <= b->cap) return 0;
    tb_block_free(be, b);
    /* some ahead while there is plenty, as steps grow by a row */
    size_t want = bytes + bytes / 4;
    if (!tb_backend_fits(be, 2 * want)) want = bytes;
    b->p = be->ops->alloc(be, want);
    if (!b->p) return tb_backend_no_memory(be, err, want, what);
    b->cap = want;
    return 0;
}

void tb_block_free(struct tb_backend *be, struct tb_block *b)
{
    if (b->p) be->ops->free(be, b->p, b->cap);
    b->p = NULL;
    b->cap = 0;
}

size_t tb_model_idle_workspaces(const struct tb_model *m)
{
    return (m->train_ws.busy ? 0 : m->train_ws.cap) + (m->sample_ws.busy ? 0 : m->sample_ws.cap);
}

void tb_model_free_workspaces(struct tb_model *m)
{
    if (!m->train_ws.busy) tb_block_free(m->be, &m->train_ws);
    if (!m->sample_ws.busy) tb_block_free(m->be, &m->sample_ws);
}

struct tb_model_usage tb_model_usage(const struct tb_model *m)
{
    struct tb_model_usage u = m->usage;
    u.weights = m->info.weight_bytes;
    u.kv = m->kv.bytes;
    u.workspaces = m->train_ws.cap + m->sample_ws.cap;
    return u;
}
