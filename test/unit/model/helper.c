/* Helpers of the model tests; see helper.h. */
#include "helper.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "util/mem.h"
#include "util/philox.h"
#ifdef TB_TEST_CUDA /* test/cuda/ */
#    include "cuda/cuda.h"
#endif

static struct tb_backend *backends[2];
static bool tried[2];

struct tb_backend *new_backend(const char *dtype)
{
    struct tb_backend *be = NULL;
    struct tb_error err = {0};
#ifdef TB_TEST_CUDA
    struct tb_backend_options o = {.act = strcmp(dtype, "f32") ? TB_BF16 : TB_F32,
                                   .mem_limit = (size_t)256 << 20};
    if (tb_backend_cuda_create(&be, &o, &err)) fail_msg("%s", err.msg);
#else
    struct tb_backend_options o = {.n_threads = 2, .isa = getenv("TB_TEST_ISA")};
    if (tb_backend_create(&be, "cpu", dtype, &o, &err)) return NULL;
#endif
    return be;
}

static struct tb_backend *backend(int i, const char *dtype)
{
    if (!tried[i]) backends[i] = new_backend(dtype);
    tried[i] = true;
    return backends[i];
}

struct tb_backend *backend_f32(void)
{
    struct tb_backend *be = backend(0, "f32");
    assert_non_null(be);
    return be;
}
struct tb_backend *backend_bf16(void)
{
    return backend(1, "bf16");
}
void backends_fini(void)
{
    for (int i = 0; i < 2; i++)
        if (backends[i]) backends[i]->ops->destroy(backends[i]);
    memset(backends, 0, sizeof(backends));
    memset(tried, 0, sizeof(tried));
}

static struct tb_backend_ops failing_ops;
static const struct tb_backend_ops *real_ops;
static long fail_in;

static void *failing_alloc(struct tb_backend *be, size_t bytes)
{
    return --fail_in == 0 ? NULL : real_ops->alloc(be, bytes);
}

void fail_device_alloc(struct tb_backend *be, long n)
{
    if (n == 0) {
        be->ops = real_ops;
        return;
    }
    real_ops = be->ops;
    failing_ops = *be->ops;
    failing_ops.alloc = failing_alloc;
    fail_in = n;
    be->ops = &failing_ops;
}

/* ---- oracle */

const char *oracle_path(const char *fmt, ...)
{
    static char path[4][1024];
    static int at;
    char *out = path[at++ % 4];
    const char *root = getenv("TB_ORACLE");
    int n = snprintf(out, sizeof(path[0]), "%s/", root ? root : TB_TEST_DATA "/oracle");
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(out + n, sizeof(path[0]) - (size_t)n, fmt, ap);
    va_end(ap);
    return out;
}

json_t *oracle_json(const char *path)
{
    json_error_t je;
    json_t *j = json_load_file(path, 0, &je);
    if (!j) fail_msg("%s: %s", path, je.text);
    return j;
}

struct tb_model *load_dir(struct tb_backend *be, const char *dir, const struct tb_model_options *o)
{
    struct tb_model *m = NULL;
    struct tb_error err;
    if (tb_model_load(&m, be, "test", dir, o, &err)) fail_msg("%s", err.msg);
    return m;
}

struct tb_model *load_oracle(struct tb_backend *be, const char *name)
{
    return load_dir(be, oracle_path("%s/model", name), NULL);
}

static const char *strip(const char *name, const char *prefix)
{
    size_t n = strlen(prefix);
    return strncmp(name, prefix, n) ? NULL : name + n;
}

struct tb_adapter_state *load_state(const struct tb_model *m, const char *path)
{
    struct tb_st *st;
    struct tb_error err;
    if (tb_st_open(&st, path, &err)) fail_msg("%s", err.msg);
    struct tb_adapter_state *s = tb_adapter_state_create();
    size_t n = tb_st_count(st);
    s->tensors = tb_arena_calloc(&s->arena, n, sizeof(*s->tensors));
    bool moments = false;
    for (size_t i = 0; i < n; i++) {
        const struct tb_st_tensor *t = tb_st_at(st, i);
        const char *name = strip(t->name, "base_model.model.");
        moments |= strip(t->name, "exp_avg.") != NULL;
        if (!name) continue;
        s->tensors[s->n_tensors++] =
            (struct tb_state_tensor){tb_arena_strdup(&s->arena, name), (int32_t)t->shape[0],
                                     (int32_t)t->shape[1], s->n_floats};
        s->n_floats += t->shape[0] * t->shape[1];
        if (strstr(name, "lora_A")) s->lora.rank = (int32_t)t->shape[0];
        s->lora.train_attn |= strstr(name, "self_attn") != NULL;
        s->lora.train_mlp |= strstr(name, "mlp") != NULL;
        s->lora.train_unembed |= strstr(name, "unembed") != NULL;
    }
    s->lora.alpha = 32;
    s->p = tb_malloc((size_t)s->n_floats * 4);
    if (moments) {
        s->m = tb_malloc((size_t)s->n_floats * 4);
        s->v = tb_malloc((size_t)s->n_floats * 4);
    }
    for (int i = 0; i < s->n_tensors; i++) {
        const struct tb_state_tensor *t = &s->tensors[i];
        const char *const prefixes[] = {"", "exp_avg.", "exp_avg_sq."};
        float *const to[] = {s->p, s->m, s->v};
        for (int k = 0; k < (moments ? 3 : 1); k++) {
            char name[256];
            snprintf(name, sizeof(name), "%sbase_model.model.%s", prefixes[k], t->name);
            const struct tb_st_tensor *x = tb_st_find(st, name);
            assert_non_null(x);
            tb_st_to_float(x, to[k] + t->offset, (size_t)t->rows * (size_t)t->cols);
        }
    }
    tb_st_close(st);
    (void)m;
    return s;
}

struct tb_adapter *load_adapter(struct tb_model *m, const char *path)
{
    struct tb_adapter_state *s = load_state(m, path);
    struct tb_adapter *a = NULL;
    struct tb_error err;
    if (tb_adapter_create_from(&a, m, s, false, &err)) fail_msg("%s", err.msg);
    tb_adapter_state_destroy(s);
    return a;
}

float *load_tensor(const char *path, const char *name, size_t *n)
{
    struct tb_st *st;
    struct tb_error err;
    if (tb_st_open(&st, path, &err)) fail_msg("%s", err.msg);
    const struct tb_st_tensor *t = tb_st_find(st, name);
    if (!t) fail_msg("%s: no %s", path, name);
    *n = 1;
    for (int i = 0; i < t->n_dims; i++)
        *n *= (size_t)t->shape[i];
    float *out = tb_malloc(*n * 4 + 4);
    tb_st_to_float(t, out, *n);
    tb_st_close(st);
    return out;
}

/* ---- ops */

static struct tb_tensor tensor_from_json(struct tb_op *op, const char *name, const json_t *v)
{
    bool two_d = json_is_array(json_array_get(v, 0)), ids = !strcmp(name, "target_tokens");
    struct tb_tensor t = {.name = tb_arena_strdup(&op->arena, name), .n_dims = two_d ? 2 : 1};
    size_t n = json_array_size(v), k = two_d ? json_array_size(json_array_get(v, 0)) : 1;
    t.type = ids ? TB_TENSOR_I64 : TB_TENSOR_F32;
    t.shape[0] = (int64_t)n;
    t.shape[1] = (int64_t)k;
    t.n = (int64_t)(n * k);
    int64_t *i64 = tb_arena_calloc(&op->arena, n * k, sizeof(*i64));
    float *f32 = tb_arena_calloc(&op->arena, n * k, sizeof(*f32));
    for (size_t i = 0; i < n * k; i++) {
        const json_t *e = json_array_get(v, i / k);
        if (two_d) e = json_array_get(e, i % k);
        i64[i] = json_is_integer(e) ? json_integer_value(e) : 0;
        f32[i] = (float)json_number_value(e);
    }
    if (ids)
        t.data.i64 = i64;
    else
        t.data.f32 = f32;
    return t;
}

struct tb_op *op_from_json(const json_t *run, bool backward, int from, int to)
{
    struct tb_op *op = tb_op_create(backward ? TB_OP_FORWARD_BACKWARD : TB_OP_FORWARD);
    struct tb_forward_backward *fb = &op->u.forward_backward;
    const json_t *data = json_object_get(run, "data");
    const char *loss = json_string_value(json_object_get(run, "loss_fn"));
    if (to < 0) to = (int)json_array_size(data);
    fb->loss_fn = tb_arena_strdup(&op->arena, loss ? loss : "cross_entropy");
    fb->n_data = to - from;
    fb->data = tb_arena_calloc(&op->arena, (size_t)(to - from), sizeof(*fb->data));
    json_t *cfg = json_object_get(run, "loss_fn_config"), *v;
    const char *key;
    fb->config = tb_arena_calloc(&op->arena, json_object_size(cfg) + 1, sizeof(*fb->config));
    json_object_foreach(cfg, key, v) fb->config[fb->n_config++] = (struct tb_config_value){
        .key = tb_arena_strdup(&op->arena, key), .number = json_number_value(v)};
    for (int i = from; i < to; i++) {
        json_t *d = json_array_get(data, (size_t)i);
        struct tb_datum *out = &fb->data[i - from];
        json_t *ids = json_object_get(d, "model_input");
        out->n_tokens = (int32_t)json_array_size(ids);
        int32_t *t = tb_arena_calloc(&op->arena, json_array_size(ids), sizeof(*t));
        for (int j = 0; j < out->n_tokens; j++)
            t[j] = (int32_t)json_integer_value(json_array_get(ids, (size_t)j));
        out->tokens = t;
        out->inputs = tb_arena_calloc(&op->arena, 8, sizeof(*out->inputs));
        json_object_foreach(d, key, v) if (strcmp(key, "model_input"))
            out->inputs[out->n_inputs++] = tensor_from_json(op, key, v);
    }
    return op;
}

struct tb_op *op_cross_entropy(const int32_t *tokens, int n, bool backward)
{
    struct tb_op *op = tb_op_create(backward ? TB_OP_FORWARD_BACKWARD : TB_OP_FORWARD);
    struct tb_forward_backward *fb = &op->u.forward_backward;
    fb->loss_fn = "cross_entropy";
    fb->n_data = 1;
    fb->data = tb_arena_calloc(&op->arena, 1, sizeof(*fb->data));
    struct tb_datum *d = fb->data;
    int32_t *t = tb_arena_calloc(&op->arena, (size_t)n, sizeof(*t));
    int64_t *y = tb_arena_calloc(&op->arena, (size_t)n, sizeof(*y));
    memcpy(t, tokens, (size_t)(n - 1) * sizeof(*t));
    for (int i = 0; i + 1 < n; i++)
        y[i] = tokens[i + 1];
    d->n_tokens = n - 1;
    d->tokens = t;
    d->inputs = tb_arena_calloc(&op->arena, 8, sizeof(*d->inputs));
    d->n_inputs = 1;
    d->inputs[0] = (struct tb_tensor){.name = "target_tokens",
                                      .type = TB_TENSOR_I64,
                                      .n_dims = 1,
                                      .shape = {n - 1},
                                      .n = n - 1,
                                      .data.i64 = y};
    return op;
}

void add_input(struct tb_op *op, int datum, const char *name, const float *v, int n)
{
    struct tb_datum *d = &op->u.forward_backward.data[datum];
    float *c = tb_arena_calloc(&op->arena, (size_t)n, sizeof(*c));
    memcpy(c, v, (size_t)n * sizeof(*c));
    d->inputs[d->n_inputs++] = (struct tb_tensor){
        .name = name, .type = TB_TENSOR_F32, .n_dims = 1, .shape = {n}, .n = n, .data.f32 = c};
}

struct tb_op *op_sample(const int32_t *prompt, int n_prompt, int max_tokens, uint64_t seed)
{
    struct tb_op *op = tb_op_create(TB_OP_SAMPLE);
    struct tb_sample *s = &op->u.sample;
    int32_t *p = tb_arena_calloc(&op->arena, (size_t)n_prompt + 1, sizeof(*p));
    memcpy(p, prompt, (size_t)n_prompt * sizeof(*p));
    s->prompt = p;
    s->n_prompt = n_prompt;
    s->n_samples = 1;
    s->max_tokens = max_tokens;
    s->has_seed = true;
    s->seed = seed;
    s->temperature = 1;
    s->top_p = 1;
    s->top_k = -1;
    s->stop_given = true; /* nothing stops unless the test says so */
    return op;
}

struct tb_op *op_adam(double lr)
{
    struct tb_op *op = tb_op_create(TB_OP_OPTIM_STEP);
    op->u.optim_step = (struct tb_optim_step){"adamw", lr, 0.9, 0.95, 1e-12, 0, 0};
    return op;
}

void run_items(struct tb_model *m, const struct train_item *items, int n)
{
    struct tb_train_part *parts = tb_calloc((size_t)n, sizeof(*parts));
    int n_parts = 0;
    for (int i = 0; i < n; i++) {
        struct tb_train_part *p = &parts[n_parts];
        p->n_data = items[i].op->u.forward_backward.n_data;
        if (!tb_training_create(&p->training, items[i].adapter, items[i].op, items[i].graph))
            n_parts++;
    }
    struct tb_error err = {0};
    int rc = tb_model_train(m, parts, n_parts, &err);
    for (int i = 0; i < n_parts; i++) {
        assert_true(tb_training_done(parts[i].training));
        tb_training_destroy(parts[i].training);
    }
    tb_free(parts);
    if (rc) fail_msg("train: %s", err.msg);
}

void run_ops(struct tb_model *m, struct tb_adapter **a, struct tb_op **ops, int n)
{
    struct train_item *items = tb_calloc((size_t)n, sizeof(*items));
    for (int i = 0; i < n; i++)
        items[i] = (struct train_item){a[i], ops[i], NULL};
    run_items(m, items, n);
    tb_free(items);
}

void run_train(struct tb_model *m, struct tb_adapter *a, struct tb_op *op)
{
    run_ops(m, &a, &op, 1);
    if (op->error.code) fail_msg("op: %s", op->error.msg);
}

void run_samples(struct tb_model *m, struct tb_adapter_version **v, struct tb_op **ops, int n,
                 int budget)
{
    struct tb_sampling **s = tb_calloc((size_t)n, sizeof(*s));
    for (int i = 0; i < n; i++)
        if (tb_sampling_create(&s[i], m, v ? v[i] : NULL, ops[i]))
            fail_msg("%s", ops[i]->error.msg);
    for (int step = 0;; step++) {
        bool open = false;
        for (int i = 0; i < n; i++)
            open |= !tb_sampling_done(s[i]);
        if (!open) break;
        int rows = 0;
        struct tb_error err;
        if (tb_model_sample_step(m, s, n, budget, &rows, &err)) fail_msg("%s", err.msg);
        if (rows == 0 || step > 100000) fail_msg("sampling does not advance (step %d)", step);
    }
    for (int i = 0; i < n; i++) {
        if (ops[i]->error.code) fail_msg("%s", ops[i]->error.msg);
        tb_sampling_destroy(s[i]);
    }
    tb_free(s);
    assert_int_equal(tb_kv_room(&m->kv), m->kv.n_pages);
}

double metric(const struct tb_op *op, const char *key)
{
    for (int i = 0; i < op->result.n_metrics; i++)
        if (!strcmp(op->result.metrics[i].key, key)) return op->result.metrics[i].value;
    fail_msg("no metric %s", key);
    return 0;
}

float *grad_of(const struct tb_adapter *a)
{
    float *out = tb_calloc(1, tb_adapter_flat_bytes(a));
    if (a->has_grad) a->m->be->ops->download(a->m->be, out, a->g, tb_adapter_flat_bytes(a));
    return out;
}

float *params_of(const struct tb_adapter *a)
{
    float *out = tb_calloc(1, tb_adapter_flat_bytes(a));
    a->m->be->ops->download(a->m->be, out, a->p, tb_adapter_flat_bytes(a));
    return out;
}

/* ---- random models */

static float uniform(uint64_t seed, uint64_t stream, size_t i)
{
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)}, r[4];
    uint32_t ctr[4] = {(uint32_t)i, (uint32_t)((uint64_t)i >> 32), (uint32_t)stream,
                       (uint32_t)(stream >> 32)};
    tb_philox4x32(ctr, key, r);
    return 2 * tb_philox_unit(r[0]) - 1;
}

struct writer {
    struct tb_st_out out[512];
    size_t n;
    uint64_t seed;
};

/* Values are rounded to bf16, so that both dtypes start from the same weights. */
static void put(struct writer *w, char *name, int rows, int cols, float center, float spread)
{
    size_t n = (size_t)rows * (size_t)(cols ? cols : 1);
    float *p = tb_malloc(n * 4);
    for (size_t i = 0; i < n; i++) {
        float x = center + spread * uniform(w->seed, tb_fnv1a(name), i);
        uint32_t b;
        memcpy(&b, &x, 4);
        b = (b + 0x8000u) & 0xffff0000u;
        memcpy(&p[i], &b, 4);
    }
    assert_true(w->n < TB_ARRAY_LEN(w->out));
    w->out[w->n++] = (struct tb_st_out){name, rows, cols, p};
}

static void put_layer(struct writer *w, const struct shape *s, int l, float spread)
{
    int q = s->heads * s->head_dim, kv = s->kv_heads * s->head_dim, d = s->hidden;
    char *p = tb_asprintf("model.layers.%d.", l);
    put(w, tb_asprintf("%sinput_layernorm.weight", p), d, 0, 1, 0.2f);
    put(w, tb_asprintf("%spost_attention_layernorm.weight", p), d, 0, 1, 0.2f);
    put(w, tb_asprintf("%sself_attn.q_proj.weight", p), q, d, 0, spread);
    put(w, tb_asprintf("%sself_attn.k_proj.weight", p), kv, d, 0, spread);
    put(w, tb_asprintf("%sself_attn.v_proj.weight", p), kv, d, 0, spread);
    put(w, tb_asprintf("%sself_attn.o_proj.weight", p), d, q, 0, spread);
    put(w, tb_asprintf("%smlp.gate_proj.weight", p), s->ffn, d, 0, spread);
    put(w, tb_asprintf("%smlp.up_proj.weight", p), s->ffn, d, 0, spread);
    put(w, tb_asprintf("%smlp.down_proj.weight", p), d, s->ffn, 0, spread);
    if (!strcmp(s->arch, "Qwen3ForCausalLM")) {
        put(w, tb_asprintf("%sself_attn.q_norm.weight", p), s->head_dim, 0, 1, 0.2f);
        put(w, tb_asprintf("%sself_attn.k_norm.weight", p), s->head_dim, 0, 1, 0.2f);
    }
    if (!strcmp(s->arch, "Qwen2ForCausalLM")) {
        put(w, tb_asprintf("%sself_attn.q_proj.bias", p), q, 0, 0, 0.3f);
        put(w, tb_asprintf("%sself_attn.k_proj.bias", p), kv, 0, 0, 0.3f);
        put(w, tb_asprintf("%sself_attn.v_proj.bias", p), kv, 0, 0, 0.3f);
    }
    tb_free(p);
}

char *random_model(const struct shape *s, uint64_t seed, float spread)
{
    const char *tmp = getenv("TMPDIR");
    char *dir = tb_asprintf("%s/tb-model-XXXXXX", tmp ? tmp : "/tmp");
    assert_non_null(mkdtemp(dir));
    json_t *c = json_pack(
        "{s:[s],s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:b,s:f,s:f}", "architectures", s->arch,
        "vocab_size", s->vocab, "hidden_size", s->hidden, "intermediate_size", s->ffn,
        "num_hidden_layers", s->layers, "num_attention_heads", s->heads, "num_key_value_heads",
        s->kv_heads, "head_dim", s->head_dim, "max_position_embeddings", s->max_pos,
        "tie_word_embeddings", (int)s->tied, "rms_norm_eps", 1e-6, "rope_theta", 10000.0);
    if (s->window) {
        json_object_set_new(c, "use_sliding_window", json_true());
        json_object_set_new(c, "sliding_window", json_integer(s->window));
        json_object_set_new(c, "max_window_layers", json_integer(1));
    }
    char *path = tb_asprintf("%s/config.json", dir);
    assert_int_equal(json_dump_file(c, path, 0), 0);
    json_decref(c);
    tb_free(path);
    struct writer w = {.seed = seed};
    put(&w, tb_strdup("model.embed_tokens.weight"), s->vocab, s->hidden, 0, 1);
    for (int l = 0; l < s->layers; l++)
        put_layer(&w, s, l, spread);
    put(&w, tb_strdup("model.norm.weight"), s->hidden, 0, 1, 0.2f);
    if (!s->tied) put(&w, tb_strdup("lm_head.weight"), s->vocab, s->hidden, 0, spread);
    path = tb_asprintf("%s/model.safetensors", dir);
    struct tb_error err;
    if (tb_st_write_path(path, w.out, w.n, NULL, 0, &err)) fail_msg("%s", err.msg);
    tb_free(path);
    for (size_t i = 0; i < w.n; i++) {
        free((void *)(uintptr_t)w.out[i].data);
        free((void *)(uintptr_t)w.out[i].name);
    }
    return dir;
}

void remove_dir(char *dir)
{
    const char *const names[] = {"config.json",
                                 "model.safetensors",
                                 "generation_config.json",
                                 "model.safetensors.index.json",
                                 "a.safetensors",
                                 "b.safetensors"};
    for (size_t i = 0; i < TB_ARRAY_LEN(names); i++) {
        char *path = tb_asprintf("%s/%s", dir, names[i]);
        unlink(path);
        tb_free(path);
    }
    rmdir(dir);
    tb_free(dir);
}

void random_tokens(int32_t *out, int n, int vocab, uint64_t seed)
{
    for (int i = 0; i < n; i++)
        out[i] = (int32_t)((uniform(seed, 77, (size_t)i) + 1) / 2 * (float)vocab) % vocab;
}

struct tb_adapter *random_adapter(struct tb_model *m, int rank, uint64_t seed, float noise)
{
    struct tb_lora_config c = {.rank = rank,
                               .alpha = 32,
                               .has_seed = true,
                               .seed = seed,
                               .train_attn = true,
                               .train_mlp = true,
                               .train_unembed = true};
    struct tb_adapter *a;
    struct tb_error err;
    if (tb_adapter_create(&a, m, &c, &err)) fail_msg("%s", err.msg);
    float *p = params_of(a);
    for (int64_t i = 0; i < a->layout->n_floats; i++)
        p[i] += noise * uniform(seed, 5, (size_t)i);
    m->be->ops->upload(m->be, a->p, p, tb_adapter_flat_bytes(a));
    tb_adapter_refresh_act(a);
    tb_free(p);
    return a;
}

/* Odd sizes on purpose: nothing is a multiple of a vector, one KV head, head_dim != hidden / heads.
 */
const struct shape shapes[N_SHAPES] = {
    {"Qwen3ForCausalLM", 61, 37, 53, 2, 3, 1, 10, 200, false, 0},
    {"Qwen2ForCausalLM", 131, 48, 40, 3, 4, 2, 12, 200, true, 7},
    {"LlamaForCausalLM", 77, 64, 96, 2, 4, 4, 16, 200, false, 0},
};

struct tb_model *open_model(struct tb_backend *be, const struct shape *s,
                            const struct tb_model_options *o)
{
    char *dir = random_model(s, 11, 1.5f / sqrtf((float)s->hidden));
    struct tb_model *m = load_dir(be, dir, o);
    remove_dir(dir); /* the mapping stays */
    return m;
}

/* Four data of different lengths; `from` picks the tokens. */
struct tb_op *batch_op(const struct shape *s, uint64_t from, bool backward, bool ratio)
{
    struct tb_op *op = NULL;
    struct tb_datum data[4];
    static const int lens[4] = {70, 5, 33, 18};
    struct tb_op *all = tb_op_create(backward ? TB_OP_FORWARD_BACKWARD : TB_OP_FORWARD);
    for (int i = 0; i < 4; i++) {
        int32_t tokens[80];
        float w[80], q[80];
        random_tokens(tokens, lens[i] + 1, s->vocab, from * 10 + (uint64_t)i);
        op = op_cross_entropy(tokens, lens[i] + 1, backward);
        /* Zero weights first, in the middle and alone, so that the head gathers rows. */
        for (int j = 0; j < lens[i]; j++) {
            w[j] = j < 4 || j % 7 == 3 ? 0 : 0.5f - 0.1f * (float)(j % 9);
            q[j] = -4 + 0.1f * (float)(j % 13);
        }
        if (ratio) {
            add_input(op, 0, "logprobs", q, lens[i]);
            add_input(op, 0, "advantages", w, lens[i]);
            add_input(op, 0, "sequence_ratio_mask", w, lens[i]);
        } else {
            add_input(op, 0, "weights", w, lens[i]);
        }
        data[i] = op->u.forward_backward.data[0];
        /* Move what the datum points to into one op. */
        struct tb_datum *d = &data[i];
        int32_t *t = tb_arena_calloc(&all->arena, (size_t)lens[i], sizeof(*t));
        memcpy(t, d->tokens, (size_t)lens[i] * sizeof(*t));
        d->tokens = t;
        struct tb_tensor *in = tb_arena_calloc(&all->arena, 8, sizeof(*in));
        for (int j = 0; j < d->n_inputs; j++) {
            in[j] = d->inputs[j];
            size_t bytes = (size_t)in[j].n * (in[j].type == TB_TENSOR_I64 ? 8 : 4);
            void *c = tb_arena_alloc(&all->arena, bytes);
            memcpy(c, in[j].data.f32, bytes);
            in[j].data.f32 = c;
        }
        d->inputs = in;
        tb_op_destroy(op);
    }
    struct tb_forward_backward *fb = &all->u.forward_backward;
    fb->loss_fn = ratio ? "gspo" : "cross_entropy";
    fb->n_data = 4;
    fb->data = tb_arena_calloc(&all->arena, 4, sizeof(*fb->data));
    memcpy(fb->data, data, sizeof(data));
    return all;
}

void same_outputs(const struct tb_op *x, const struct tb_op *y)
{
    assert_int_equal(x->result.n_outputs, y->result.n_outputs);
    for (int i = 0; i < x->result.n_outputs; i++)
        assert_memory_equal(x->result.outputs[i].logprobs, y->result.outputs[i].logprobs,
                            (size_t)x->result.outputs[i].n * sizeof(float));
    assert_true(metric(x, "loss:sum") == metric(y, "loss:sum"));
}

void same_grads(const struct tb_adapter *a, const struct tb_adapter *b)
{
    float *x = grad_of(a), *y = grad_of(b);
    double norm = 0;
    for (int64_t i = 0; i < a->layout->n_floats; i++)
        norm += fabs((double)x[i]);
    assert_true(norm > 0 && isfinite(norm));
    assert_memory_equal(x, y, tb_adapter_flat_bytes(a));
    tb_free(x);
    tb_free(y);
}
