/* Prefix reuse: what is found, and that finding it changes no bit of any result. */
#include "helper.h"

#include <string.h>

#include "util/mem.h"

enum { GEN = 40 };

static void same_bytes(const void *a, const void *b, size_t n)
{
    assert_true(!a == !b);
    if (a) assert_memory_equal(a, b, n);
}

/* All but the count of cached tokens. */
static void same_results(const struct tb_op *x, const struct tb_op *y)
{
    const struct tb_sample *r = &x->u.sample;
    const struct tb_result *a = &x->result, *b = &y->result;
    size_t P = (size_t)r->n_prompt, pk = (size_t)r->topk_prompt_logprobs;
    size_t sk = (size_t)r->topk_sample_logprobs;
    assert_true(P == (size_t)y->u.sample.n_prompt && a->n_sequences == r->n_samples);
    same_bytes(a->prompt_logprobs, b->prompt_logprobs, P * 4);
    same_bytes(a->topk_prompt_ids, b->topk_prompt_ids, P * pk * 4);
    same_bytes(a->topk_prompt_logprobs, b->topk_prompt_logprobs, P * pk * 4);
    assert_int_equal(a->n_sequences, b->n_sequences);
    for (int i = 0; i < a->n_sequences; i++) {
        const struct tb_sequence *p = &a->sequences[i], *q = &b->sequences[i];
        size_t n = (size_t)p->n;
        assert_int_equal(p->n, q->n);
        assert_int_equal(p->stopped, q->stopped);
        same_bytes(p->tokens, q->tokens, n * 4);
        same_bytes(p->logprobs, q->logprobs, n * 4);
        same_bytes(p->topk_ids, q->topk_ids, n * sk * 4);
        same_bytes(p->topk_logprobs, q->topk_logprobs, n * sk * 4);
    }
}

/* The pool's books between requests: nothing is in use, children are older than their parents. */
static void check_pool(const struct tb_model *m)
{
    const struct tb_kv *kv = &m->kv;
    const struct tb_prefix *p = &kv->prefix;
    bool *seen = tb_calloc((size_t)kv->n_pages, sizeof(*seen));
    int listed = 0, idle = 0;
    for (int i = 0; i < kv->n_pages; i++) {
        listed += p->pages[i].listed;
        assert_int_equal(kv->refs[i], p->pages[i].listed);
        if (p->pages[i].listed) assert_int_equal(tb_prefix_find(p, &p->pages[i].key), i);
    }
    for (int32_t i = p->oldest; i >= 0; i = p->pages[i].next, idle++) {
        int32_t parent = p->pages[i].key.parent;
        assert_true(p->pages[i].listed && p->pages[i].idle && !seen[i]);
        assert_true(parent < 0 || (p->pages[parent].listed && !seen[parent]));
        if (parent >= 0) assert_true(p->pages[parent].key.serial == p->pages[i].key.serial);
        seen[i] = true;
    }
    assert_true(idle == p->n_idle && idle == listed && listed == p->n);
    assert_int_equal(kv->n_free + p->n_idle, kv->n_pages);
    tb_free(seen);
}

static struct tb_model *without_reuse(struct tb_backend *be, const struct shape *s)
{
    struct tb_model *m = open_model(be, s, NULL);
    m->kv.no_reuse = true;
    return m;
}

/* Two models of the same weights, one that reuses pages, and a request to both. */
struct pair {
    struct tb_model *m, *ref;
};

static struct tb_op *copy_sample(const struct tb_op *op)
{
    const struct tb_sample *r = &op->u.sample;
    struct tb_op *c = op_sample(r->prompt, r->n_prompt, r->max_tokens, r->seed);
    const int32_t *prompt = c->u.sample.prompt;
    c->u.sample = *r;
    c->u.sample.prompt = prompt;
    return c;
}

/* Runs op with and without reuse (each model with its own copy of the version) and returns how
 * many tokens were found. after, if not NULL, receives prompt and first sample. */
static int hits(struct pair *p, struct tb_adapter_version *v, struct tb_adapter_version *ref_v,
                struct tb_op *op, int32_t *after)
{
    struct tb_op *ref = copy_sample(op);
    run_samples(p->m, &v, &op, 1, 23);
    run_samples(p->ref, &ref_v, &ref, 1, 1000);
    same_results(op, ref);
    check_pool(p->m);
    assert_int_equal(ref->result.prompt_cache_hit_tokens, 0);
    assert_int_equal(p->ref->kv.n_free, p->ref->kv.n_pages);
    const struct tb_sequence *q = &op->result.sequences[0];
    int n = op->result.prompt_cache_hit_tokens;
    if (after) {
        memcpy(after, op->u.sample.prompt, (size_t)op->u.sample.n_prompt * 4);
        memcpy(after + op->u.sample.n_prompt, q->tokens, (size_t)q->n * 4);
    }
    tb_op_destroy(op);
    tb_op_destroy(ref);
    return n;
}

static struct tb_op *scored(const int32_t *prompt, int n, int last_n)
{
    struct tb_op *op = op_sample(prompt, n, 3, 5);
    op->u.sample.prompt_logprobs = true;
    op->u.sample.prompt_logprobs_last_n = last_n;
    return op;
}

static void counts(struct tb_backend *be, const struct shape *s)
{
    struct pair p = {open_model(be, s, NULL), without_reuse(be, s)};
    int32_t a[80], b[80], after[80 + GEN];
    random_tokens(a, 80, s->vocab, 1);
    /* The last token is always computed; only full pages are found. */
    assert_int_equal(hits(&p, NULL, NULL, op_sample(a, 70, GEN, 1), after), 0);
    assert_int_equal(hits(&p, NULL, NULL, op_sample(a, 70, GEN, 1), NULL), 64);
    assert_int_equal(hits(&p, NULL, NULL, op_sample(a, 70, 1, 2), NULL), 64);
    assert_int_equal(hits(&p, NULL, NULL, op_sample(a, 65, 5, 2), NULL), 64);
    assert_int_equal(hits(&p, NULL, NULL, op_sample(a, 64, 5, 2), NULL), 48);
    assert_int_equal(hits(&p, NULL, NULL, op_sample(a, 16, 5, 2), NULL), 0);
    assert_int_equal(hits(&p, NULL, NULL, op_sample(a, 17, 5, 2), NULL), 16);
    /* Samples are found too: 109 tokens had keys, six full pages of them. */
    assert_int_equal(hits(&p, NULL, NULL, op_sample(after, 70 + GEN, 20, 3), NULL), 96);
    memcpy(b, a, sizeof(b));
    b[40] = (b[40] + 1) % s->vocab;
    assert_int_equal(hits(&p, NULL, NULL, op_sample(b, 70, 5, 1), NULL), 32);
    assert_int_equal(hits(&p, NULL, NULL, op_sample(b, 70, 5, 1), NULL), 64);
    memcpy(b, a, sizeof(b));
    b[0] = (b[0] + 1) % s->vocab;
    assert_int_equal(hits(&p, NULL, NULL, op_sample(b, 70, 5, 1), NULL), 0);
    /* Scored rows are computed: last_n of 5 scores rows from 64 on. */
    assert_int_equal(hits(&p, NULL, NULL, scored(a, 70, 0), NULL), 0);
    assert_int_equal(hits(&p, NULL, NULL, scored(a, 70, 5), NULL), 64);
    assert_int_equal(hits(&p, NULL, NULL, scored(a, 70, 6), NULL), 48);
    assert_int_equal(hits(&p, NULL, NULL, scored(a, 70, 69), NULL), 0);
    struct tb_op *op = op_sample(a, 70, 5, 1);
    op->u.sample.topk_prompt_logprobs = 3;
    assert_int_equal(hits(&p, NULL, NULL, op, NULL), 0);
    op = op_sample(a, 70, 30, 1);
    op->u.sample.n_samples = 4;
    op->u.sample.topk_sample_logprobs = 2;
    assert_int_equal(hits(&p, NULL, NULL, op, NULL), 64);
    tb_kv_forget(&p.m->kv, 0);
    assert_int_equal(p.m->kv.n_free, p.m->kv.n_pages);
    assert_int_equal(hits(&p, NULL, NULL, op_sample(a, 70, 5, 1), NULL), 0);
    tb_model_free(p.m);
    tb_model_free(p.ref);
}

static void test_counts(void **state)
{
    (void)state;
    for (size_t k = 0; k < N_SHAPES; k++) {
        counts(backend_f32(), &shapes[k]);
        if (backend_bf16()) counts(backend_bf16(), &shapes[k]);
    }
}

/* The same training step on both models' adapters. */
static void train(struct pair *p, struct tb_adapter *a[2], const int32_t *tokens, int n)
{
    struct tb_model *ms[2] = {p->m, p->ref};
    for (int i = 0; i < 2; i++) {
        struct tb_op *f = op_cross_entropy(tokens, n, true), *o = op_adam(0.05);
        run_train(ms[i], a[i], f);
        tb_adapter_optim_step(a[i], o);
        assert_int_equal(o->error.code, 0);
        tb_op_destroy(f);
        tb_op_destroy(o);
    }
}

/* A tenant finds its own prompts only, also while another computes the same one. */
static void test_tenants(void **state)
{
    (void)state;
    struct pair p = {open_model(backend_f32(), &shapes[0], NULL),
                     without_reuse(backend_f32(), &shapes[0])};
    int32_t x[70];
    random_tokens(x, 70, shapes[0].vocab, 1);
    for (uint64_t tenant = 1; tenant <= 2; tenant++) {
        for (int again = 0; again < 2; again++) {
            struct tb_op *op = op_sample(x, 70, 9, 1);
            op->tenant = tenant;
            assert_int_equal(hits(&p, NULL, NULL, op, NULL), again ? 64 : 0);
        }
    }
    struct tb_op *ops[2] = {op_sample(x, 70, 3, 1), op_sample(x, 70, 3, 1)};
    ops[0]->tenant = 3;
    ops[1]->tenant = 4;
    run_samples(p.m, NULL, ops, 2, 16);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(ops[i]->error.code, 0);
        assert_int_equal(ops[i]->result.prompt_cache_hit_tokens, 0);
        tb_op_destroy(ops[i]);
    }
    tb_model_free(p.m);
    tb_model_free(p.ref);
}

/* Weights that differ share nothing: base and adapters, versions of one adapter, and a version that
 * is overwritten in place after all of its samples are gone. */
static void test_versions(void **state)
{
    (void)state;
    struct tb_backend *bes[2] = {backend_f32(), backend_bf16()};
    for (int t = 0; t < 2 && bes[t]; t++) {
        struct pair p = {open_model(bes[t], &shapes[0], NULL), without_reuse(bes[t], &shapes[0])};
        struct tb_adapter *a[2] = {random_adapter(p.m, 4, 1, 0.1f),
                                   random_adapter(p.ref, 4, 1, 0.1f)};
        struct tb_adapter_version *v1[2], *v2[2], *v3[2];
        int32_t x[70];
        random_tokens(x, 70, shapes[0].vocab, 1);
        for (int i = 0; i < 2; i++)
            CHECK_OK(tb_adapter_publish(a[i], &v1[i], &check_err));
        assert_int_equal(hits(&p, NULL, NULL, op_sample(x, 70, 9, 1), NULL), 0);
        assert_int_equal(hits(&p, v1[0], v1[1], op_sample(x, 70, 9, 1), NULL), 0);
        assert_int_equal(hits(&p, v1[0], v1[1], op_sample(x, 70, 9, 1), NULL), 64);
        train(&p, a, x, 70); /* copies: v1 is in use */
        for (int i = 0; i < 2; i++)
            CHECK_OK(tb_adapter_publish(a[i], &v2[i], &check_err));
        assert_true(v1[0] != v2[0]);
        assert_int_equal(hits(&p, v2[0], v2[1], op_sample(x, 70, 9, 1), NULL), 0);
        assert_int_equal(hits(&p, v2[0], v2[1], op_sample(x, 70, 9, 1), NULL), 64);
        assert_int_equal(hits(&p, v1[0], v1[1], op_sample(x, 70, 9, 1), NULL), 64);
        assert_int_equal(hits(&p, NULL, NULL, op_sample(x, 70, 9, 1), NULL), 64);
        int n = p.m->kv.prefix.n;
        for (int i = 0; i < 2; i++)
            tb_version_unref(v1[i]); /* the last reference: its four pages are free again */
        assert_int_equal(p.m->kv.prefix.n, n - 4);
        check_pool(p.m);
        for (int i = 0; i < 2; i++)
            tb_version_unref(v2[i]);
        train(&p, a, x, 70); /* in place */
        for (int i = 0; i < 2; i++)
            CHECK_OK(tb_adapter_publish(a[i], &v3[i], &check_err));
        assert_true(v3[0] == v2[0]);
        assert_int_equal(hits(&p, v3[0], v3[1], op_sample(x, 70, 9, 1), NULL), 0);
        assert_int_equal(hits(&p, v3[0], v3[1], op_sample(x, 70, 9, 1), NULL), 64);
        assert_int_equal(p.m->kv.prefix.n, 8);
        for (int i = 0; i < 2; i++) {
            tb_version_unref(v3[i]);
            tb_adapter_free(a[i]);
        }
        assert_int_equal(p.m->kv.prefix.n, 4);
        check_pool(p.m);
        tb_model_free(p.m);
        tb_model_free(p.ref);
    }
}

/* ---- many requests on few pages */

struct dice {
    uint64_t at;
};
static int roll(struct dice *d, int n) /* 0 .. n-1 */
{
    int32_t x;
    random_tokens(&x, 1, n, 7000 + d->at++);
    return x;
}

enum { N_TRUNKS = 2, TRUNK = 110 };

static struct tb_op *random_request(struct dice *d, int32_t trunks[N_TRUNKS][TRUNK], int vocab)
{
    int32_t x[TRUNK];
    int n = 1 + roll(d, TRUNK), cut = roll(d, 2 * TRUNK);
    memcpy(x, trunks[roll(d, N_TRUNKS)], sizeof(x));
    if (cut < n) random_tokens(x + cut, n - cut, vocab, (uint64_t)roll(d, 3));
    struct tb_op *op = op_sample(x, n, 1 + roll(d, 40), (uint64_t)roll(d, 1000));
    struct tb_sample *s = &op->u.sample;
    s->n_samples = 1 + roll(d, 3);
    if (roll(d, 4) == 0) s->temperature = 0;
    if (roll(d, 3) == 0) s->topk_sample_logprobs = 2;
    s->prompt_logprobs = roll(d, 3) == 0;
    if (s->prompt_logprobs && n > 1 && roll(d, 3)) s->prompt_logprobs_last_n = 1 + roll(d, n - 1);
    if (roll(d, 10) == 0) s->topk_prompt_logprobs = 2;
    return op;
}

/* Groups of up to four requests at once; now and then a sampling is dropped midway. */
static void many(struct tb_backend *be, const struct shape *s, int n_requests, int n_pages,
                 bool collide)
{
    struct pair p = {NULL, without_reuse(be, s)};
    size_t page = p.ref->kv.bytes / (size_t)p.ref->kv.n_pages;
    struct tb_model_options o = {.kv_bytes = (size_t)n_pages * page};
    p.m = open_model(be, s, &o);
    if (collide) p.m->kv.prefix.mask = 0; /* all keys in one bucket */
    int32_t trunks[N_TRUNKS][TRUNK];
    for (int i = 0; i < N_TRUNKS; i++)
        random_tokens(trunks[i], TRUNK, s->vocab, (uint64_t)i);
    struct tb_adapter_version *v[2][2];
    for (int k = 0; k < 2; k++)
        for (int i = 0; i < 2; i++) {
            struct tb_adapter *a = random_adapter(k ? p.ref : p.m, 3, (uint64_t)i, 0.1f);
            CHECK_OK(tb_adapter_publish(a, &v[k][i], &check_err));
            tb_adapter_free(a);
        }
    struct dice d = {0};
    int64_t found = 0;
    for (int done = 0; done < n_requests;) {
        enum { MAX = 4 };
        struct tb_op *x[MAX], *y[MAX];
        struct tb_adapter_version *vx[MAX], *vy[MAX];
        int n = TB_MIN(1 + roll(&d, MAX), n_requests - done);
        for (int i = 0; i < n; i++) {
            int which = roll(&d, 3);
            x[i] = random_request(&d, trunks, s->vocab);
            y[i] = copy_sample(x[i]);
            vx[i] = which < 2 ? v[0][which] : NULL;
            vy[i] = which < 2 ? v[1][which] : NULL;
        }
        if (roll(&d, 8) == 0) {
            struct tb_op *op = copy_sample(x[0]);
            struct tb_sampling *drop;
            int rows;
            CHECK_OK(tb_sampling_create(&drop, p.m, vx[0], op));
            for (int i = 0; i < 3; i++)
                CHECK_OK(tb_model_sample_step(p.m, &drop, 1, 20, &rows, &check_err));
            tb_sampling_destroy(drop);
            tb_op_destroy(op);
            check_pool(p.m);
        }
        run_samples(p.m, vx, x, n, 5 + roll(&d, 60));
        run_samples(p.ref, vy, y, n, 1000);
        check_pool(p.m);
        for (int i = 0; i < n; i++) {
            same_results(x[i], y[i]);
            found += x[i]->result.prompt_cache_hit_tokens;
            const struct tb_sequence *q = x[i]->result.sequences;
            if (roll(&d, 4) == 0 && x[i]->u.sample.n_prompt + q->n <= TRUNK) { /* talks on */
                int32_t *t = trunks[roll(&d, N_TRUNKS)];
                memcpy(t, x[i]->u.sample.prompt, (size_t)x[i]->u.sample.n_prompt * 4);
                memcpy(t + x[i]->u.sample.n_prompt, q->tokens, (size_t)q->n * 4);
            }
            tb_op_destroy(x[i]);
            tb_op_destroy(y[i]);
        }
        done += n;
    }
    assert_true(found > 4 * n_requests);
    assert_true(p.m->kv.n_preempted > 2 && p.ref->kv.n_preempted == 0);
    for (int k = 0; k < 2; k++)
        for (int i = 0; i < 2; i++)
            tb_version_unref(v[k][i]);
    check_pool(p.m);
    for (int i = 0; i < p.m->kv.n_pages; i++)
        assert_true(!p.m->kv.refs[i] || p.m->kv.prefix.pages[i].key.serial == 0);
    tb_kv_forget(&p.m->kv, 0);
    assert_int_equal(p.m->kv.n_free, p.m->kv.n_pages);
    tb_model_free(p.m);
    tb_model_free(p.ref);
}

static void test_random(void **state)
{
    (void)state;
    many(backend_f32(), &shapes[0], 200 / sparse(2), 24, false);
    many(backend_f32(), &shapes[1], 100 / sparse(2), 12, true);
    if (backend_bf16()) many(backend_bf16(), &shapes[0], 200 / sparse(2), 16, false);
}

/* A pool that one prompt fills: the next one takes all pages from what was kept, none waits. */
static void test_eviction(void **state)
{
    (void)state;
    struct pair p = {NULL, without_reuse(backend_f32(), &shapes[0])};
    size_t page = p.ref->kv.bytes / (size_t)p.ref->kv.n_pages;
    struct tb_model_options o = {.kv_bytes = 6 * page};
    p.m = open_model(backend_f32(), &shapes[0], &o);
    int32_t x[3][80];
    for (int i = 0; i < 3; i++)
        random_tokens(x[i], 80, 61, (uint64_t)i);
    for (int i = 0; i < 6; i++) {
        assert_int_equal(hits(&p, NULL, NULL, op_sample(x[i % 3], 80, 17, 1), NULL), 0);
        assert_int_equal(p.m->kv.prefix.n, 6);
    }
    /* The oldest go first, and of a prefix its end: three new pages leave three of x[2]. */
    assert_int_equal(hits(&p, NULL, NULL, op_sample(x[0], 40, 9, 1), NULL), 0);
    assert_int_equal(hits(&p, NULL, NULL, op_sample(x[2], 80, 1, 1), NULL), 48);
    assert_int_equal(p.m->kv.n_preempted, 0);
    /* Samples that wait for each other find their own pages again. */
    struct tb_op *op = op_sample(x[1], 30, 60, 3);
    op->u.sample.n_samples = 5;
    assert_int_equal(hits(&p, NULL, NULL, op, NULL), 0);
    assert_true(p.m->kv.n_preempted > 0);
    tb_kv_forget(&p.m->kv, 0);
    assert_int_equal(p.m->kv.n_free, 6);
    tb_model_free(p.m);
    tb_model_free(p.ref);
}

/* Of equal prompts that come together one is computed; the others wait for its pages. */
static void test_side_by_side(void **state)
{
    (void)state;
    struct tb_model *m = open_model(backend_f32(), &shapes[0], NULL);
    int32_t x[50];
    random_tokens(x, 50, 61, 1);
    struct tb_op *ops[4];
    for (int i = 0; i < 4; i++)
        ops[i] = op_sample(x, 50, 1, 1);
    run_samples(m, NULL, ops, 4, 20);
    assert_int_equal(m->kv.prefix.n, 3);
    assert_true(m->kv.n_lookup_tokens == 200 && m->kv.n_hit_tokens == 144);
    check_pool(m);
    for (int i = 0; i < 4; i++) {
        assert_int_equal(ops[i]->result.prompt_cache_hit_tokens, i ? 48 : 0);
        same_results(ops[0], ops[i]);
    }
    for (int i = 0; i < 4; i++)
        tb_op_destroy(ops[i]);
    tb_model_free(m);
}

static int failing_sync(struct tb_backend *be, struct tb_error *err)
{
    (void)be;
    return tb_error_set(err, TB_EDEVICE, "the device is gone");
}

/* After a step that the device did not finish nothing is found or kept any more. */
static void test_failed_step(void **state)
{
    (void)state;
    struct tb_backend *be = backend_f32();
    struct tb_model *m = open_model(be, &shapes[0], NULL);
    const struct tb_backend_ops *good = be->ops;
    struct tb_backend_ops bad = *good;
    bad.sync = failing_sync;
    int32_t x[50];
    random_tokens(x, 50, 61, 1);
    struct tb_op *op = op_sample(x, 50, 20, 1), *again[2];
    struct tb_sampling *s;
    struct tb_error err;
    int rows;
    CHECK_OK(tb_sampling_create(&s, m, NULL, op));
    CHECK_OK(tb_model_sample_step(m, &s, 1, 20, &rows, &check_err));
    be->ops = &bad;
    assert_int_equal(tb_model_sample_step(m, &s, 1, 20, &rows, &err), TB_EDEVICE);
    be->ops = good;
    assert_int_equal(op->error.code, TB_EDEVICE);
    tb_sampling_destroy(s);
    tb_op_destroy(op);
    int n = m->kv.prefix.n;
    for (int i = 0; i < 2; i++) {
        again[i] = op_sample(x, 50, 20, 1);
        run_samples(m, NULL, &again[i], 1, 100);
        assert_int_equal(again[i]->result.prompt_cache_hit_tokens, 0);
    }
    same_results(again[0], again[1]);
    assert_int_equal(m->kv.prefix.n, n);
    check_pool(m);
    tb_op_destroy(again[0]);
    tb_op_destroy(again[1]);
    tb_model_free(m);
}

static int teardown(void **state)
{
    (void)state;
    backends_fini();
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_counts),       cmocka_unit_test(test_versions),
        cmocka_unit_test(test_tenants),      cmocka_unit_test(test_eviction),
        cmocka_unit_test(test_side_by_side), cmocka_unit_test(test_random),
        cmocka_unit_test(test_failed_step),
    };
    return cmocka_run_group_tests_name("model prefix", tests, NULL, teardown);
}
