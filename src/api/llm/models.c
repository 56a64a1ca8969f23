/*
 * The served models as faces for text see them (see llm.h). A model's vocabulary is made with the
 * first grammar; grammars are kept, since clients ask with the same schema again and again.
 *
 * Owner: the api object. Thread: the list is constant; what it keeps is under a lock.
 */
#include <string.h>

#include "api/llm/llm.h"
#include "util/mem.h"

#define KEPT 16 /* grammars of a model */

struct kept {
    bool used;
    char *schema; /* NULL: any object */
    size_t n;
    struct tb_llm_grammar g;
    struct tb_error err; /* why there is no grammar */
};

struct tb_llm_model {
    struct tb_served_model info;
    const struct tb_renderer *renderer; /* NULL without tokenizer */
    struct keep {
        uv_mutex_t lock;
        struct tb_vocab *vocab;
        struct kept kept[KEPT];
        unsigned n_kept; /* ever; the oldest is overwritten */
    } * keep;
};

struct tb_llm_models {
    int n;
    struct tb_llm_model m[];
};

static int choose_renderer(struct tb_llm_model *m, const char *name, struct tb_error *err)
{
    if (!m->info.text) {
        if (!name) return 0;
        return tb_error_set(err, TB_EINVAL, "%s: renderer=%s, but there is no tokenizer: %s",
                            m->info.name, name, m->info.no_text);
    }
    m->renderer = name ? tb_renderer_find(name) : tb_renderer_choose(m->info.dir, m->info.text);
    if (!m->renderer)
        return tb_error_set(err, TB_EINVAL, "%s: renderer=%s is none of %s", m->info.name, name,
                            tb_renderer_names());
    if (!tb_renderer_has_tokens(m->renderer, m->info.text))
        return tb_error_set(err, TB_EINVAL,
                            "%s: renderer=%s, but the tokenizer has no token that ends its turns",
                            m->info.name, name);
    return 0;
}

int tb_llm_models_create(struct tb_api *a, const char *const *renderers, struct tb_error *err)
{
    int n = tb_core_n_models(a->core);
    struct tb_llm_models *l = tb_calloc(1, sizeof(*l) + (size_t)n * sizeof(l->m[0]));
    a->llm = l;
    int rc = 0;
    for (int i = 0; rc == 0 && i < n; i++) {
        struct tb_llm_model *m = &l->m[i];
        tb_core_served_model(a->core, i, &m->info);
        m->keep = tb_calloc(1, sizeof(*m->keep));
        TB_BUG_ON(uv_mutex_init(&m->keep->lock));
        l->n = i + 1;
        rc = choose_renderer(m, renderers ? renderers[i] : NULL, err);
    }
    return rc;
}

static void drop(struct kept *x)
{
    tb_grammar_unref(x->g.g);
    tb_free(x->schema);
    *x = (struct kept){0};
}

void tb_llm_models_destroy(struct tb_llm_models *l)
{
    for (int i = 0; l && i < l->n; i++) {
        struct keep *k = l->m[i].keep;
        for (int j = 0; j < KEPT; j++)
            drop(&k->kept[j]);
        tb_vocab_unref(k->vocab);
        uv_mutex_destroy(&k->lock);
        tb_free(k);
    }
    tb_free(l);
}

const struct tb_llm_model *tb_llm_model_find(struct tb_api *a, const char *name)
{
    static const char latest[] = ":latest";
    const struct tb_llm_models *l = a->llm;
    if (!name) return l->n ? &l->m[0] : NULL;
    size_t n = strlen(name), cut = sizeof(latest) - 1;
    for (int i = 0; i < l->n; i++) {
        const char *own = l->m[i].info.name;
        if (strcmp(own, name) == 0) return &l->m[i];
        if (n > cut && strcmp(name + n - cut, latest) == 0 && strlen(own) == n - cut &&
            strncmp(own, name, n - cut) == 0)
            return &l->m[i];
    }
    return NULL;
}

const struct tb_llm_model *tb_llm_model_at(struct tb_api *a, int i)
{
    return i < a->llm->n ? &a->llm->m[i] : NULL;
}

const struct tb_served_model *tb_llm_model_info(const struct tb_llm_model *m)
{
    return &m->info;
}

const struct tb_renderer *tb_llm_model_renderer(const struct tb_llm_model *m)
{
    return m->renderer;
}

int tb_llm_model_need_text(const struct tb_llm_model *m, struct tb_error *err)
{
    if (m->info.text) return 0;
    return tb_error_set(err, TB_EUNSUPPORTED, "%s has no tokenizer, so it takes no text: %s",
                        m->info.name, m->info.no_text);
}

/* ---- grammars */

static struct kept *find_kept(struct keep *k, bool json, struct tb_span schema)
{
    for (int i = 0; i < KEPT; i++) {
        struct kept *x = &k->kept[i];
        if (!x->used || json != !x->schema) continue;
        if (json || (x->n == schema.n && memcmp(x->schema, schema.p, schema.n) == 0)) return x;
    }
    return NULL;
}

/* The kept one, with a reference, or in *err why there is none; false when it is not known. */
static bool take_kept(struct keep *k, bool json, struct tb_span schema, struct tb_llm_grammar *out,
                      struct tb_error *err)
{
    struct kept *x = find_kept(k, json, schema);
    if (x && x->g.g && tb_grammar_too_complex(x->g.g)) {
        tb_grammar_unref(x->g.g);
        x->g.g = NULL;
        tb_error_set(&x->err, TB_EUNSUPPORTED,
                     "the schema has too many ways to go on: finding the "
                     "tokens that may come next takes too long");
    } else if (x && x->g.g && tb_grammar_worn(x->g.g)) { /* it would fail before long */
        drop(x);
        x = NULL;
    }
    if (!x) return false;
    *out = x->g;
    if (out->g)
        tb_grammar_ref(out->g);
    else
        *err = x->err;
    return true;
}

static void put_kept(struct keep *k, bool json, struct tb_span schema,
                     const struct tb_llm_grammar *g, const struct tb_error *err)
{
    struct kept *x = &k->kept[k->n_kept++ % KEPT];
    drop(x);
    *x = (struct kept){true, json ? NULL : tb_strndup(schema.p, schema.n), schema.n, *g, *err};
    if (g->g) tb_grammar_ref(g->g);
}

/* Gives up the oldest while all take much. Those that are in use live on until they are not. */
static void make_room(struct keep *k)
{
    for (unsigned i = 0; k->vocab && i < KEPT && tb_vocab_crowded(k->vocab); i++)
        drop(&k->kept[(k->n_kept + i) % KEPT]);
}

/* A schema is compiled without the lock: it may take long, and whoever waits for the lock takes a
 * thread from the pool. Refusals are kept too, as clients repeat what was refused; want of memory
 * may pass. */
int tb_llm_grammar_get(const struct tb_llm_model *m, bool json, struct tb_span schema,
                       struct tb_llm_grammar *out, struct tb_error *err)
{
    struct keep *k = m->keep;
    struct tb_llm_grammar made = {0};
    struct tb_error e = {0};
    int rc = 0;
    uv_mutex_lock(&k->lock);
    bool found = take_kept(k, json, schema, out, err);
    if (!found) make_room(k);
    if (!found && !k->vocab) rc = tb_vocab_create(m->info.text, m->info.vocab, &k->vocab, err);
    uv_mutex_unlock(&k->lock);
    if (found) return out->g ? 0 : err->code;
    if (rc) return rc;
    rc = json ? tb_grammar_create_json(k->vocab, &made.g, &e)
              : tb_grammar_create_schema(k->vocab, schema, &made.g, &e);
    if (rc == 0) {
        made.start = tb_grammar_start(made.g);
        made.shortest = tb_grammar_shortest(made.g);
    }
    e.code = rc;
    uv_mutex_lock(&k->lock);
    if (take_kept(k, json, schema, out, err)) { /* another request made the same meanwhile */
        tb_grammar_unref(made.g);
        rc = out->g ? 0 : err->code;
    } else {
        if (rc != TB_ENOMEM) put_kept(k, json, schema, &made, &e);
        *out = made;
        *err = e;
    }
    uv_mutex_unlock(&k->lock);
    return rc;
}

/* ---- a grammar as the filter of a sample; runs on the engine's thread, which alone uses the
 * grammar's states */

struct filter {
    struct tb_token_filter f;
    struct tb_grammar *g;
};

static const uint64_t *filter_mask(struct tb_token_filter *f, uint64_t state, int32_t left,
                                   bool *may_end)
{
    struct tb_grammar *g = TB_CONTAINER_OF(f, struct filter, f)->g;
    *may_end = tb_grammar_complete(g, (uint32_t)state);
    return tb_grammar_mask(g, (uint32_t)state, (uint32_t)left);
}

static uint64_t filter_accept(struct tb_token_filter *f, uint64_t state, int32_t token, bool *over)
{
    struct tb_grammar *g = TB_CONTAINER_OF(f, struct filter, f)->g;
    uint32_t to = tb_grammar_accept(g, (uint32_t)state, token);
    *over = tb_grammar_final(g, to);
    return to;
}

static void filter_destroy(struct tb_token_filter *f)
{
    struct filter *x = TB_CONTAINER_OF(f, struct filter, f);
    tb_grammar_unref(x->g);
    tb_free(x);
}

struct tb_token_filter *tb_llm_filter(const struct tb_llm_grammar *g)
{
    struct filter *x = tb_calloc(1, sizeof(*x));
    tb_grammar_ref(g->g);
    x->g = g->g;
    x->f = (struct tb_token_filter){g->start, filter_mask, filter_accept, filter_destroy};
    return &x->f;
}
