/*
 * LoRA adapters: the layout of their tensors in flat float32 arrays, creation, export and import,
 * and published versions. See model.h and internal.h.
 *
 * Owner: adapters and versions belong to whoever created or referenced them; an adapter holds one
 * reference to its current version. Thread: the model's.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "model/internal.h"
#include "util/clock.h"
#include "util/mem.h"
#include "util/philox.h"

static const char *const proj_names[TB_N_PROJ] = {
    [TB_Q] = "self_attn.q_proj", [TB_K] = "self_attn.k_proj", [TB_V] = "self_attn.v_proj",
    [TB_O] = "self_attn.o_proj", [TB_GATE] = "mlp.gate_proj", [TB_UP] = "mlp.up_proj",
    [TB_DOWN] = "mlp.down_proj",
};

/* ---- layout */

static void module_shape(const struct tb_model *m, int module, int *n_in, int *n_out)
{
    const struct tb_model_config *c = &m->cfg;
    if (module == tb_model_unembed(m)) {
        *n_in = c->hidden;
        *n_out = c->vocab;
        return;
    }
    int in[TB_N_PROJ] = {c->hidden, c->hidden, c->hidden, tb_cfg_q(c),
                         c->hidden, c->hidden, c->ffn};
    int out[TB_N_PROJ] = {tb_cfg_q(c), tb_cfg_kv(c), tb_cfg_kv(c), c->hidden,
                          c->ffn,      c->ffn,       c->hidden};
    *n_in = in[module % TB_N_PROJ];
    *n_out = out[module % TB_N_PROJ];
}

static void module_name(const struct tb_model *m, int module, char *out, size_t n)
{
    if (module == tb_model_unembed(m))
        snprintf(out, n, "model.unembed_tokens");
    else
        snprintf(out, n, "model.layers.%d.%s", module / TB_N_PROJ, proj_names[module % TB_N_PROJ]);
}

static bool module_on(const struct tb_model *m, const struct tb_lora_config *c, int module)
{
    if (module == tb_model_unembed(m)) return c->train_unembed;
    return module % TB_N_PROJ <= TB_O ? c->train_attn : c->train_mlp;
}

static int check_config(const struct tb_model *m, const struct tb_lora_config *c,
                        struct tb_error *err)
{
    if (c->rank < 1 || c->rank > m->opt.max_rank)
        return tb_error_set(err, TB_EINVAL, "lora_config.rank is %d; it must be from 1 to %d",
                            c->rank, m->opt.max_rank);
    if (!(c->alpha > 0) || !isfinite(c->alpha))
        return tb_error_set(err, TB_EINVAL, "lora_config.alpha is %g; it must be positive",
                            (double)c->alpha);
    if (!c->train_attn && !c->train_mlp && !c->train_unembed)
        return tb_error_set(
            err, TB_EINVAL,
            "lora_config: at least one of train_attn, train_mlp and train_unembed must "
            "be true");
    return 0;
}

static int layout_create(struct tb_lora_layout **out, const struct tb_model *m,
                         const struct tb_lora_config *config, struct tb_error *err)
{
    int rc = check_config(m, config, err);
    if (rc) return rc;
    int n = tb_model_n_modules(m);
    struct tb_lora_layout *l = tb_calloc(1, sizeof(*l) + (size_t)n * sizeof(l->slots[0]));
    l->refs = 1;
    l->config = *config;
    l->n_modules = n;
    for (int i = 0; i < n; i++) {
        struct tb_lora_slot *s = &l->slots[i];
        module_shape(m, i, &s->n_in, &s->n_out);
        s->a = s->b = -1;
        if (!module_on(m, config, i)) continue;
        s->a = l->n_floats;
        s->b = s->a + (int64_t)config->rank * s->n_in;
        l->n_floats = s->b + (int64_t)config->rank * s->n_out;
    }
    *out = l;
    return 0;
}

static void layout_unref(struct tb_lora_layout *l)
{
    if (l && --l->refs == 0) tb_free(l);
}

int tb_lora_spans(const struct tb_lora_rows *rows, int n_rows, int module, bool backward,
                  struct tb_lora_span *out)
{
    int n = 0;
    for (int i = 0; i < n_rows; i++) {
        const struct tb_adapter_version *v = rows[i].ver;
        if (!v || v->mats[module].rank == 0) continue;
        const struct tb_lora_slot *s = &v->layout->slots[module];
        out[n] = (struct tb_lora_span){.row = rows[i].row, .n = rows[i].n, .mat = &v->mats[module]};
        if (backward && rows[i].grad) {
            out[n].ga = rows[i].grad + s->a;
            out[n].gb = rows[i].grad + s->b;
        }
        n++;
    }
    return n;
}

/* ---- versions */

size_t tb_version_bytes(const struct tb_adapter_version *v)
{
    return (size_t)v->layout->n_floats * tb_dtype_size(v->m->be->act);
}

int tb_version_alloc_act(struct tb_adapter_version *v, struct tb_error *err)
{
    const struct tb_lora_layout *l = v->layout;
    size_t elem = tb_dtype_size(v->m->be->act), bytes = tb_version_bytes(v);
    v->act = v->m->be->ops->alloc(v->m->be, bytes);
    if (!v->act) return tb_backend_no_memory(v->m->be, err, bytes, "an adapter's weights");
    v->m->usage.versions += bytes;
    for (int i = 0; i < l->n_modules; i++) {
        const struct tb_lora_slot *s = &l->slots[i];
        if (s->a < 0) continue;
        v->mats[i].a = (char *)v->act + (size_t)s->a * elem;
        v->mats[i].b = (char *)v->act + (size_t)s->b * elem;
        v->mats[i].rank = l->config.rank;
        v->mats[i].scale = l->config.alpha / (float)l->config.rank;
    }
    return 0;
}

void tb_version_free_act(struct tb_adapter_version *v)
{
    if (!v->act) return;
    v->m->be->ops->free(v->m->be, v->act, tb_version_bytes(v));
    v->m->usage.versions -= tb_version_bytes(v);
    v->act = NULL;
}

/* An adapter's current version, held. */
static int version_create(struct tb_adapter_version **out, struct tb_model *m,
                          struct tb_lora_layout *layout, struct tb_error *err)
{
    size_t n = (size_t)layout->n_modules;
    struct tb_adapter_version *v = tb_calloc(1, sizeof(*v) + n * sizeof(v->mats[0]));
    v->m = m;
    v->layout = layout;
    int rc = tb_version_alloc_act(v, err);
    if (rc) {
        tb_free(v);
        return rc;
    }
    v->refs = 1;
    v->serial = ++m->last_serial;
    v->is_cur = true;
    layout->refs++;
    tb_version_page_init(v);
    *out = v;
    return 0;
}

void tb_version_ref(struct tb_adapter_version *v)
{
    v->refs++;
}

void tb_version_unref(struct tb_adapter_version *v)
{
    if (!v || --v->refs > 0) return;
    if (v->sampled) tb_kv_forget(&v->m->kv, v->serial);
    tb_paged_forget(&v->page);
    v->m->usage.n_versions--;
    v->m->usage.versions_out -= !v->act;
    tb_version_free_act(v);
    layout_unref(v->layout);
    tb_free(v);
}

/* ---- loans */

int tb_version_lend(struct tb_adapter_version *v, struct tb_loan *out, struct tb_error *err)
{
    int rc = tb_version_hold(v, err);
    if (rc) return rc;
    rc = v->m->be->ops->sync(v->m->be, err);
    if (rc) {
        tb_version_release(v);
        return rc;
    }
    tb_version_ref(v);
    *out = (struct tb_loan){v, v->m->be, v->act, tb_version_bytes(v), v->layout->config};
    return 0;
}

void tb_loan_return(struct tb_loan *loan)
{
    tb_version_release(loan->version);
    tb_version_unref(loan->version);
}

int tb_version_borrow(struct tb_adapter_version **out, struct tb_model *m,
                      const struct tb_loan *loan, struct tb_error *err)
{
    struct tb_backend *be = m->be;
    struct tb_lora_layout *layout;
    struct tb_adapter_version *v;
    int rc = layout_create(&layout, m, &loan->lora, err);
    if (rc) return rc;
    rc = version_create(&v, m, layout, err);
    layout_unref(layout);
    if (rc) return rc;
    v->is_cur = false;
    rc = be->ops->copy_from(be, v->act, loan->be, loan->act, loan->bytes, err);
    if (!rc) rc = be->ops->sync(be, err);
    tb_version_release(v);
    if (rc)
        tb_version_unref(v);
    else
        *out = v;
    return rc;
}

/* ---- an adapter's version */

/* The held version becomes one of those that others have, or goes. */
static void drop_cur(struct tb_adapter *a)
{
    a->cur->is_cur = false;
    tb_version_release(a->cur);
    tb_version_unref(a->cur);
}

int tb_adapter_own_version(struct tb_adapter *a, struct tb_error *err)
{
    if (a->cur->refs == 1) { /* nobody uses it now */
        if (a->cur->sampled) tb_kv_forget(&a->m->kv, a->cur->serial);
        a->cur->serial = ++a->m->last_serial;
        a->cur->sampled = false;
        return 0;
    }
    struct tb_adapter_version *v;
    int rc = version_create(&v, a->m, a->layout, err);
    if (rc) return rc;
    a->m->be->ops->copy(a->m->be, v->act, a->cur->act, tb_version_bytes(v));
    drop_cur(a);
    a->cur = v;
    return 0;
}

void tb_adapter_refresh_act(struct tb_adapter *a)
{
    a->m->be->ops->to_act(a->m->be, a->p, (size_t)a->layout->n_floats, a->cur->act);
}

int tb_adapter_publish(struct tb_adapter *a, struct tb_adapter_version **out, struct tb_error *err)
{
    int rc = tb_adapter_hold(a, err);
    if (rc) return rc;
    tb_version_ref(a->cur);
    *out = a->cur;
    tb_adapter_release(a);
    return 0;
}

/* ---- adapters */

size_t tb_lora_flat_bytes(const struct tb_lora_layout *l)
{
    return (size_t)l->n_floats * 4;
}

size_t tb_adapter_flat_bytes(const struct tb_adapter *a)
{
    return tb_lora_flat_bytes(a->layout);
}

/* A held adapter with uninitialised parameters; takes over the layout reference, also when it
 * fails. */
static int adapter_alloc(struct tb_adapter **out, struct tb_model *m, struct tb_lora_layout *layout,
                         struct tb_error *err)
{
    struct tb_adapter *a = tb_calloc(1, sizeof(*a));
    a->m = m;
    a->layout = layout;
    tb_adapter_page_init(a);
    a->p = tb_adapter_alloc_flat(a);
    int rc = a->p ? version_create(&a->cur, m, layout, err)
                  : tb_backend_no_memory(m->be, err, tb_adapter_flat_bytes(a),
                                         "an adapter's parameters");
    if (rc) {
        tb_adapter_free(a);
        return rc;
    }
    *out = a;
    return 0;
}

float *tb_lora_alloc_flat(struct tb_model *m, const struct tb_lora_layout *l)
{
    float *p = m->be->ops->alloc(m->be, tb_lora_flat_bytes(l));
    if (p) m->usage.adapters += tb_lora_flat_bytes(l);
    return p;
}

void tb_lora_free_flat(struct tb_model *m, const struct tb_lora_layout *l, float *p)
{
    if (!p) return;
    m->be->ops->free(m->be, p, tb_lora_flat_bytes(l));
    m->usage.adapters -= tb_lora_flat_bytes(l);
}

float *tb_adapter_alloc_flat(struct tb_adapter *a)
{
    return tb_lora_alloc_flat(a->m, a->layout);
}

void tb_adapter_free_flat(struct tb_adapter *a, float *p)
{
    tb_lora_free_flat(a->m, a->layout, p);
}

void tb_adapter_free(struct tb_adapter *a)
{
    if (!a) return;
    tb_paged_forget(&a->page);
    a->m->usage.n_adapters--;
    a->m->usage.adapters_out -= a->out != 0;
    tb_adapter_free_flat(a, a->p);
    tb_adapter_free_flat(a, a->g);
    tb_adapter_free_flat(a, a->mom);
    tb_adapter_free_flat(a, a->var);
    if (a->cur) a->cur->is_cur = false;
    tb_version_unref(a->cur);
    layout_unref(a->layout);
    tb_free(a);
}

/* A ~ U(-1/sqrt(n_in), 1/sqrt(n_in)); element i depends on the seed, the tensor's name and i alone.
 */
static void init_a(const struct tb_model *m, int module, uint64_t seed, float *out, size_t n,
                   int n_in)
{
    char name[160];
    module_name(m, module, name, sizeof(name) - 20);
    size_t len = strlen(name);
    snprintf(name + len, sizeof(name) - len, ".lora_A.weight");
    uint64_t h = tb_fnv1a(name);
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    double bound = 1 / sqrt((double)n_in);
    for (size_t i = 0; i < n; i += 4) {
        uint32_t ctr[4] = {(uint32_t)(i / 4), (uint32_t)((uint64_t)i / 4 >> 32), (uint32_t)h,
                           (uint32_t)(h >> 32)};
        uint32_t r[4];
        tb_philox4x32(ctr, key, r);
        for (size_t j = 0; j < 4 && i + j < n; j++)
            out[i + j] = (float)((((double)r[j] + 0.5) * 0x1p-31 - 1) * bound);
    }
}

/* The weights of a held adapter whose parameters are there. */
static int finish_create(struct tb_adapter **out, struct tb_adapter *a, struct tb_error *err)
{
    tb_adapter_refresh_act(a);
    int rc = a->m->be->ops->sync(a->m->be, err);
    tb_adapter_release(a);
    if (rc)
        tb_adapter_free(a);
    else
        *out = a;
    return rc;
}

int tb_adapter_create(struct tb_adapter **out, struct tb_model *m,
                      const struct tb_lora_config *config, struct tb_error *err)
{
    struct tb_lora_config c = *config;
    if (c.alpha == 0) c.alpha = 32;
    if (!c.has_seed) {
        c.seed = tb_random_u64();
        c.has_seed = true;
    }
    struct tb_lora_layout *layout;
    struct tb_adapter *a = NULL;
    int rc = layout_create(&layout, m, &c, err);
    if (!rc) rc = adapter_alloc(&a, m, layout, err);
    if (rc) return rc;
    float *host = tb_try_calloc((size_t)layout->n_floats, 4);
    if (!host) {
        rc = tb_error_set(err, TB_ENOMEM, "no memory for %zu MiB of adapter weights",
                          tb_adapter_flat_bytes(a) >> 20);
        tb_adapter_free(a);
        return rc;
    }
    for (int i = 0; i < layout->n_modules; i++) {
        const struct tb_lora_slot *s = &layout->slots[i];
        if (s->a >= 0) init_a(m, i, c.seed, host + s->a, (size_t)(s->b - s->a), s->n_in);
    }
    m->be->ops->upload(m->be, a->p, host, tb_adapter_flat_bytes(a));
    tb_free(host);
    return finish_create(out, a, err);
}

const struct tb_lora_config *tb_adapter_config(const struct tb_adapter *a)
{
    return &a->layout->config;
}

int64_t tb_adapter_step(const struct tb_adapter *a)
{
    return a->step;
}

void tb_adapter_add_grad(struct tb_adapter *a, float *scratch)
{
    if (!a->has_grad) { /* 0 + scratch */
        tb_adapter_free_flat(a, a->g);
        a->g = scratch;
        a->has_grad = true;
        return;
    }
    a->m->be->ops->add(a->m->be, a->g, scratch, (size_t)a->layout->n_floats);
    tb_adapter_free_flat(a, scratch);
}

/* ---- states */

int tb_adapter_export(struct tb_adapter *a, bool with_optimizer, struct tb_adapter_state **out,
                      struct tb_error *err)
{
    int rc = tb_adapter_hold(a, err);
    if (rc) return rc;
    const struct tb_lora_layout *l = a->layout;
    struct tb_adapter_state *s = tb_adapter_state_create();
    size_t n = (size_t)l->n_floats, bytes = n * 4;
    s->lora = l->config;
    s->step = a->step;
    s->n_floats = l->n_floats;
    s->tensors = tb_arena_calloc(&s->arena, (size_t)l->n_modules * 2, sizeof(*s->tensors));
    for (int i = 0; i < l->n_modules; i++) {
        const struct tb_lora_slot *t = &l->slots[i];
        if (t->a < 0) continue;
        char name[128];
        module_name(a->m, i, name, sizeof(name));
        s->tensors[s->n_tensors++] = (struct tb_state_tensor){
            tb_arena_printf(&s->arena, "%s.lora_A.weight", name), l->config.rank, t->n_in, t->a};
        s->tensors[s->n_tensors++] = (struct tb_state_tensor){
            tb_arena_printf(&s->arena, "%s.lora_B.weight", name), t->n_out, l->config.rank, t->b};
    }
    s->p = tb_try_malloc(bytes);
    if (with_optimizer) {
        s->m = tb_try_calloc(n, 4);
        s->v = tb_try_calloc(n, 4);
    }
    if (!s->p || (with_optimizer && (!s->m || !s->v))) {
        tb_adapter_state_destroy(s);
        tb_adapter_release(a);
        return tb_error_set(err, TB_ENOMEM, "no memory for %zu MiB to save an adapter",
                            bytes >> 20);
    }
    const struct tb_backend_ops *ops = a->m->be->ops;
    ops->download(a->m->be, s->p, a->p, bytes);
    if (with_optimizer && a->mom && a->var) {
        ops->download(a->m->be, s->m, a->mom, bytes);
        ops->download(a->m->be, s->v, a->var, bytes);
    }
    tb_adapter_release(a);
    rc = ops->sync(a->m->be, err);
    if (rc)
        tb_adapter_state_destroy(s);
    else
        *out = s;
    return rc;
}

static const struct tb_state_tensor *find_tensor(const struct tb_adapter_state *s, const char *name,
                                                 int *hint)
{
    for (int i = 0; i < s->n_tensors; i++) { /* usually in our own order: the hint hits */
        int at = (*hint + i) % s->n_tensors;
        if (!strcmp(s->tensors[at].name, name)) {
            *hint = at + 1;
            return &s->tensors[at];
        }
    }
    return NULL;
}

static int match_tensor(const struct tb_adapter_state *s, const char *name, int rows, int cols,
                        int *hint, const struct tb_state_tensor **out, struct tb_error *err)
{
    const struct tb_state_tensor *t = find_tensor(s, name, hint);
    if (!t) return tb_error_set(err, TB_EINVAL, "checkpoint: tensor %s is missing", name);
    if (t->rows != rows || t->cols != cols)
        return tb_error_set(err, TB_EINVAL,
                            "checkpoint: tensor %s is [%d, %d], the model needs [%d, %d]", name,
                            t->rows, t->cols, rows, cols);
    if (t->offset < 0 || t->offset > s->n_floats - (int64_t)rows * cols)
        return tb_error_set(err, TB_ECORRUPT, "checkpoint: tensor %s lies outside of the data",
                            name);
    *out = t;
    return 0;
}

/* Gathers one of the state's arrays into our layout, checks it finite and uploads it to dst. */
static int import_flat(struct tb_model *m, const struct tb_lora_layout *l,
                       const struct tb_adapter_state *s, const float *src, const char *what,
                       float *dst, struct tb_error *err)
{
    size_t n = (size_t)l->n_floats;
    float *host = tb_try_malloc(n * 4);
    if (!host)
        return tb_error_set(err, TB_ENOMEM, "no memory for %zu MiB of a checkpoint", n >> 18);
    int rc = 0, hint = 0, used = 0;
    for (int i = 0; i < l->n_modules && !rc; i++) {
        const struct tb_lora_slot *slot = &l->slots[i];
        if (slot->a < 0) continue;
        char module[128], name[160];
        module_name(m, i, module, sizeof(module));
        for (int b = 0; b < 2 && !rc; b++) {
            const struct tb_state_tensor *t = NULL;
            int rows = b ? slot->n_out : l->config.rank, cols = b ? l->config.rank : slot->n_in;
            snprintf(name, sizeof(name), "%s.lora_%c.weight", module, "AB"[b]);
            rc = match_tensor(s, name, rows, cols, &hint, &t, err);
            if (rc) break;
            used++;
            memcpy(host + (b ? slot->b : slot->a), src + t->offset,
                   (size_t)rows * (size_t)cols * 4);
        }
    }
    if (!rc && used != s->n_tensors)
        rc = tb_error_set(
            err, TB_EINVAL,
            "checkpoint: has %d tensors, the model's adapter has %d; the trained modules "
            "differ",
            s->n_tensors, used);
    for (size_t i = 0; i < n && !rc; i++)
        if (!isfinite(host[i]))
            rc = tb_error_set(err, TB_ENONFINITE,
                              "checkpoint: %s holds a number that is not finite", what);
    if (!rc) m->be->ops->upload(m->be, dst, host, n * 4);
    tb_free(host);
    return rc;
}

/* A whole new adapter from a state. */
static int build(struct tb_adapter **out, struct tb_model *m, const struct tb_adapter_state *s,
                 bool with_optimizer, struct tb_error *err)
{
    if (with_optimizer && (!s->m || !s->v))
        return tb_error_set(err, TB_EINVAL,
                            "checkpoint: has no optimizer state; it was saved for sampling");
    struct tb_lora_layout *layout;
    struct tb_adapter *a = NULL;
    int rc = layout_create(&layout, m, &s->lora, err);
    if (!rc) rc = adapter_alloc(&a, m, layout, err);
    if (rc) return rc;
    rc = import_flat(m, layout, s, s->p, "the weights", a->p, err);
    if (!rc && with_optimizer) {
        a->mom = tb_adapter_alloc_flat(a);
        a->var = a->mom ? tb_adapter_alloc_flat(a) : NULL;
        if (!a->var)
            rc = tb_backend_no_memory(m->be, err, tb_adapter_flat_bytes(a), "an adapter's moments");
        if (!rc) rc = import_flat(m, layout, s, s->m, "the first moment", a->mom, err);
        if (!rc) rc = import_flat(m, layout, s, s->v, "the second moment", a->var, err);
        a->step = s->step;
    }
    if (rc) {
        tb_adapter_free(a);
        return rc;
    }
    return finish_create(out, a, err);
}

int tb_adapter_create_from(struct tb_adapter **out, struct tb_model *m,
                           const struct tb_adapter_state *s, bool with_optimizer,
                           struct tb_error *err)
{
    return build(out, m, s, with_optimizer, err);
}

int tb_adapter_restore(struct tb_adapter *a, const struct tb_adapter_state *s, bool with_optimizer,
                       struct tb_error *err)
{
    const struct tb_lora_config *c = &a->layout->config;
    if (s->lora.rank != c->rank)
        return tb_error_set(err, TB_EINVAL, "checkpoint: rank is %d, the model's is %d",
                            s->lora.rank, c->rank);
    if (s->lora.alpha < c->alpha || s->lora.alpha > c->alpha)
        return tb_error_set(err, TB_EINVAL, "checkpoint: alpha is %g, the model's is %g",
                            (double)s->lora.alpha, (double)c->alpha);
    const struct {
        const char *name;
        bool theirs, ours;
    } flags[] = {{"train_attn", s->lora.train_attn, c->train_attn},
                 {"train_mlp", s->lora.train_mlp, c->train_mlp},
                 {"train_unembed", s->lora.train_unembed, c->train_unembed}};
    for (size_t i = 0; i < TB_ARRAY_LEN(flags); i++)
        if (flags[i].theirs != flags[i].ours)
            return tb_error_set(err, TB_EINVAL, "checkpoint: %s is %s, the model's is %s",
                                flags[i].name, flags[i].theirs ? "true" : "false",
                                flags[i].ours ? "true" : "false");
    struct tb_adapter *b = NULL;
    int rc = build(&b, a->m, s, with_optimizer, err);
    if (rc) return rc;
    tb_paged_forget(&a->page); /* what it was is not wanted any more */
    tb_paged_busy(&b->page);
    struct tb_adapter old =
        *a; /* swap: versions published from the old one live on by their references */
    *a = *b;
    *b = old;
    tb_list_init(&a->page.node);
    tb_list_init(&b->page.node);
    tb_adapter_idle(a);
    a->layout->config.seed = old.layout->config.seed;
    a->layout->config.has_seed = old.layout->config.has_seed;
    tb_adapter_free(b);
    return 0;
}

int tb_version_create_from(struct tb_adapter_version **out, struct tb_model *m,
                           const struct tb_adapter_state *s, struct tb_error *err)
{
    struct tb_adapter *a;
    int rc = build(&a, m, s, false, err);
    if (rc) return rc;
    *out = a->cur;
    tb_version_ref(a->cur);
    tb_adapter_free(a);
    return 0;
}
