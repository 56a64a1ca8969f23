/*
 * Paging: with room for one or two adapters of twelve, training, sampling and saving in any order
 * give the bits that they give with ample memory; and what happens when files cannot be written or
 * read.
 */
#include "helper.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "model/pass.h"
#include "util/mem.h"

#define N_ADAPTERS 12
#define SHAPE      (&shapes[2])

/* The same model twice: with ample memory, and with a pager and little. */
struct pair {
    struct tb_backend *be[2];
    struct tb_model *m[2];
    struct tb_pager *pager;
    char dir[64];
    size_t bare; /* be->mem_used of a new backend */
    struct tb_adapter *a[2][N_ADAPTERS];
    struct tb_adapter_version *v[2][N_ADAPTERS]; /* or NULL */
};

static int rank_of(int i)
{
    return 3 + i % 5;
}

/* All of an adapter's memory: parameters, gradient, moments, an op's gradient, its version. */
static size_t full_bytes(const struct tb_adapter *a)
{
    return 5 * tb_adapter_flat_bytes(a) + tb_version_bytes(a->cur);
}

/* dtype: f32 or bf16. Memory for `adapters` of the largest beside a pass over the longest datum. */
static void open_pair(struct pair *p, const char *dtype, double adapters)
{
    memset(p, 0, sizeof(*p));
    snprintf(p->dir, sizeof(p->dir), "/tmp/tb-pager-XXXXXX");
    assert_non_null(mkdtemp(p->dir));
    struct tb_model_options o = {.max_rank = 1024, .kv_bytes = 1 << 18, .logits_bytes = 1 << 13};
    for (int k = 0; k < 2; k++) {
        p->be[k] = new_backend(dtype);
        assert_non_null(p->be[k]);
        p->bare = p->be[k]->mem_used;
        if (k) CHECK_OK(tb_pager_create(&p->pager, p->be[k], p->dir, &check_err));
        o.pager = p->pager;
        p->m[k] = open_model(p->be[k], SHAPE, &o);
        CHECK_OK(tb_model_prepare_bwd(p->m[k], &check_err));
    }
    struct tb_backend *be = p->be[1];
    size_t base = be->mem_used;
    for (int i = 0; i < N_ADAPTERS; i++) {
        for (int k = 0; k < 2; k++)
            p->a[k][i] = random_adapter(p->m[k], rank_of(i), (uint64_t)i, 0.1f);
        be->mem_limit = base + tb_pass_bytes(p->m[1], TB_PASS_RECOMPUTE, true, 80, rank_of(4)) +
                        (size_t)(adapters * (double)full_bytes(p->a[1][TB_MIN(i, 4)]));
    }
}

static void close_pair(struct pair *p)
{
    for (int k = 0; k < 2; k++) {
        for (int i = 0; i < N_ADAPTERS; i++) {
            tb_adapter_free(p->a[k][i]);
            tb_version_unref(p->v[k][i]);
        }
        tb_model_free(p->m[k]);
    }
    struct tb_pager_stats st;
    tb_pager_stats(p->pager, &st);
    print_message("%llu page-outs, %llu page-ins\n", (unsigned long long)st.page_outs,
                  (unsigned long long)st.page_ins);
    tb_pager_destroy(p->pager); /* removes its folder, which is empty */
    assert_int_equal(access(p->dir, F_OK), -1);
    assert_int_equal(p->be[1]->mem_used, p->bare);
    for (int k = 0; k < 2; k++)
        p->be[k]->ops->destroy(p->be[k]);
}

static void same_states(struct pair *p, int i)
{
    struct tb_adapter_state *s[2];
    for (int k = 0; k < 2; k++)
        CHECK_OK(tb_adapter_export(p->a[k][i], true, &s[k], &check_err));
    size_t bytes = (size_t)s[0]->n_floats * 4;
    assert_int_equal(s[0]->step, s[1]->step);
    assert_memory_equal(s[0]->p, s[1]->p, bytes);
    assert_memory_equal(s[0]->m, s[1]->m, bytes);
    assert_memory_equal(s[0]->v, s[1]->v, bytes);
    for (int k = 0; k < 2; k++)
        tb_adapter_state_destroy(s[k]);
}

static void same_samples(const struct tb_op *x, const struct tb_op *y, int n_prompt)
{
    assert_int_equal(x->result.n_sequences, y->result.n_sequences);
    assert_memory_equal(x->result.prompt_logprobs + 1, y->result.prompt_logprobs + 1,
                        (size_t)(n_prompt - 1) * 4);
    for (int i = 0; i < x->result.n_sequences; i++) {
        const struct tb_sequence *a = &x->result.sequences[i], *b = &y->result.sequences[i];
        assert_int_equal(a->n, b->n);
        assert_memory_equal(a->tokens, b->tokens, (size_t)a->n * 4);
        assert_memory_equal(a->logprobs, b->logprobs, (size_t)a->n * 4);
    }
}

/* ---- what clients do, on both models */

static void train(struct pair *p, const int *which, int n, uint64_t seed, bool backward)
{
    struct tb_op *ops[2][N_ADAPTERS];
    for (int k = 0; k < 2; k++) {
        struct tb_adapter *a[N_ADAPTERS];
        for (int i = 0; i < n; i++) {
            a[i] = p->a[k][which[i]];
            ops[k][i] = batch_op(SHAPE, seed + (uint64_t)i, backward, i % 2);
        }
        run_ops(p->m[k], a, ops[k], n);
    }
    for (int i = 0; i < n; i++) {
        same_outputs(ops[0][i], ops[1][i]);
        assert_true(metric(ops[0][i], "loss:sum") == metric(ops[1][i], "loss:sum"));
        for (int k = 0; k < 2; k++)
            tb_op_destroy(ops[k][i]);
    }
}

/* The same with little memory in steps of a datum each, so that gradients go to files half done. */
static void train_in_steps(struct pair *p, const int *which, int n, uint64_t seed)
{
    enum { N_DATA = 4 };
    struct tb_op *ops[2][N_ADAPTERS];
    struct tb_adapter *a[N_ADAPTERS];
    struct tb_train_part parts[N_ADAPTERS];
    for (int i = 0; i < n; i++) {
        a[i] = p->a[0][which[i]];
        for (int k = 0; k < 2; k++)
            ops[k][i] = batch_op(SHAPE, seed + (uint64_t)i, true, i % 2);
        parts[i].n_data = 1;
        assert_int_equal(tb_training_create(&parts[i].training, p->a[1][which[i]], ops[1][i], NULL),
                         0);
    }
    run_ops(p->m[0], a, ops[0], n);
    for (int step = 0; step < N_DATA; step++) {
        for (int i = 0; i < n; i++)
            CHECK_OK(tb_training_reserve(parts[i].training, &check_err));
        CHECK_OK(tb_model_train(p->m[1], parts, n, &check_err));
    }
    for (int i = 0; i < n; i++) {
        if (ops[1][i]->error.code) fail_msg("%s", ops[1][i]->error.msg);
        assert_true(tb_training_done(parts[i].training));
        same_outputs(ops[0][i], ops[1][i]);
        tb_training_destroy(parts[i].training);
        for (int k = 0; k < 2; k++)
            tb_op_destroy(ops[k][i]);
    }
}

static void optim(struct pair *p, int i)
{
    double norm[2];
    for (int k = 0; k < 2; k++) {
        struct tb_op *op = op_adam(0.02);
        tb_adapter_optim_step(p->a[k][i], op);
        if (op->error.code) fail_msg("%s", op->error.msg);
        norm[k] = metric(op, "optim/grad_norm");
        tb_op_destroy(op);
    }
    assert_true(norm[0] == norm[1]);
}

static void publish(struct pair *p, int i)
{
    for (int k = 0; k < 2; k++) {
        tb_version_unref(p->v[k][i]);
        CHECK_OK(tb_adapter_publish(p->a[k][i], &p->v[k][i], &check_err));
    }
}

static void sample(struct pair *p, const int *which, int n, uint64_t seed)
{
    struct tb_op *ops[2][N_ADAPTERS];
    for (int k = 0; k < 2; k++) {
        struct tb_adapter_version *v[N_ADAPTERS];
        for (int i = 0; i < n; i++) {
            int32_t prompt[20];
            v[i] = p->v[k][which[i]];
            random_tokens(prompt, 20, SHAPE->vocab, seed % 3);
            ops[k][i] = op_sample(prompt, 20, 9, seed + (uint64_t)i);
            ops[k][i]->u.sample.n_samples = 1 + i % 2;
            ops[k][i]->u.sample.prompt_logprobs = true;
        }
        run_samples(p->m[k], v, ops[k], n, 33);
    }
    for (int i = 0; i < n; i++) {
        same_samples(ops[0][i], ops[1][i], 20);
        for (int k = 0; k < 2; k++)
            tb_op_destroy(ops[k][i]);
    }
}

/* Saves adapter i and loads it into j, where rank allows, or as a new adapter. */
static void load(struct pair *p, int i, int j, bool with_optimizer)
{
    for (int k = 0; k < 2; k++) {
        struct tb_adapter_state *s;
        CHECK_OK(tb_adapter_export(p->a[k][i], true, &s, &check_err));
        if (rank_of(i) == rank_of(j)) {
            CHECK_OK(tb_adapter_restore(p->a[k][j], s, with_optimizer, &check_err));
        } else {
            tb_adapter_free(p->a[k][i]);
            CHECK_OK(tb_adapter_create_from(&p->a[k][i], p->m[k], s, with_optimizer, &check_err));
        }
        tb_adapter_state_destroy(s);
    }
}

static void mixed(const char *dtype, double adapters, int shard_tokens, int n_ops)
{
    struct pair p;
    open_pair(&p, dtype, adapters);
    p.m[0]->shard_tokens = p.m[1]->shard_tokens = shard_tokens;
    uint64_t dice = 7;
    int all[N_ADAPTERS];
    for (int i = 0; i < N_ADAPTERS; i++)
        all[i] = (i * 5) % N_ADAPTERS;
    for (int op = 0; op < n_ops; op++) {
        dice = dice * 6364136223846793005u + 1442695040888963407u;
        int i = (int)(dice >> 33) % N_ADAPTERS, j = (int)(dice >> 40) % N_ADAPTERS;
        int n = 1 + (int)(dice >> 50) % N_ADAPTERS;
        switch ((int)(dice >> 60)) {
        case 0: train_in_steps(&p, all, n, dice % 100); break;
        case 1: train(&p, all, n, dice % 100, true); break;
        case 2: train(&p, &i, 1, dice % 100, false); break;
        case 3:
        case 4:
        case 5: train(&p, &i, 1, dice % 100, true); break;
        case 6:
        case 7: optim(&p, i); break;
        case 8:
        case 9:
        case 10: publish(&p, i); break;
        case 11: sample(&p, &i, 1, dice % 100); break;
        case 12: sample(&p, all, n, dice % 100); break;
        case 13: same_states(&p, i); break;
        default: load(&p, i, j, dice % 2); break;
        }
        assert_true(p.be[1]->mem_used <= p.be[1]->mem_limit);
    }
    for (int i = 0; i < N_ADAPTERS; i++) {
        same_states(&p, i);
        optim(&p, i); /* what was accumulated is there too */
        same_states(&p, i);
    }
    struct tb_pager_stats st;
    tb_pager_stats(p.pager, &st);
    assert_true(st.page_outs > (uint64_t)n_ops / 2 && st.page_ins > (uint64_t)n_ops / 2);
    close_pair(&p);
}

static void test_f32(void **state)
{
    (void)state;
    mixed("f32", 1, 0, repeats(300));
    mixed("f32", 2.5, 0, repeats(150));
}

static void test_bf16(void **state)
{
    (void)state;
    if (!backend_bf16()) skip();
    mixed("bf16", 1, 0, repeats(150));
}

/* Ops in shards: what is out between two steps is a sum and the gradient of a shard. */
static void test_shards(void **state)
{
    (void)state;
    mixed("f32", 1.5, 30, repeats(200));
}

/* ---- errors */

static struct tb_op *try_train(struct pair *p, int i)
{
    struct tb_op *op = batch_op(SHAPE, 1, true, false);
    run_items(p->m[1], &(struct train_item){p->a[1][i], op, NULL}, 1);
    return op;
}

static void assert_fails(struct tb_op *op, int code, const char *text)
{
    assert_int_equal(op->error.code, code);
    if (!strstr(op->error.msg, text)) fail_msg("%s", op->error.msg);
    tb_op_destroy(op);
}

/* The first adapter that is out, or is in memory. */
static int find(const struct pair *p, bool out)
{
    for (int i = 0; i < N_ADAPTERS; i++)
        if (!p->a[1][i]->p == out) return i;
    fail_msg("no adapter is %s", out ? "out" : "in memory");
    return 0;
}

static void test_cannot_write(void **state)
{
    (void)state;
    struct pair p;
    open_pair(&p, "f32", 1);
    char away[80];
    snprintf(away, sizeof(away), "%s-away", p.dir);
    for (int i = 0; i < N_ADAPTERS; i++)
        train(&p, &i, 1, 3, true);
    int in = find(&p, false), out = find(&p, true);
    assert_int_equal(rename(p.dir, away), 0);
    struct tb_pager_stats before, after;
    tb_pager_stats(p.pager, &before);
    struct tb_adapter *a = NULL;
    struct tb_error err;
    struct tb_lora_config big = {.rank = 9, .alpha = 32, .train_mlp = true, .train_attn = true};
    tb_model_free_workspaces(p.m[1]);
    p.be[1]->mem_limit = p.be[1]->mem_used; /* nothing is free */
    assert_int_equal(tb_adapter_create(&a, p.m[1], &big, &err), TB_ENOMEM);
    if (!strstr(err.msg, "an adapter's parameters need 0.1 MiB; ") ||
        !strstr(err.msg, "MiB are free, but cannot create "))
        fail_msg("%s", err.msg);
    tb_pager_stats(p.pager, &after);
    assert_int_equal(before.page_outs, after.page_outs);
    assert_non_null(p.a[1][in]->p); /* stays */
    assert_fails(try_train(&p, out), TB_ENOMEM, "cannot create ");
    assert_int_equal(rename(away, p.dir), 0);
    /* A full disk: a file may be begun, not finished. */
    struct rlimit was, small = {4096, 0};
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &was), 0);
    small.rlim_max = was.rlim_max;
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    int rc = tb_adapter_create(&a, p.m[1], &big, &err);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &was), 0);
    signal(SIGXFSZ, SIG_DFL);
    assert_int_equal(rc, TB_ENOMEM);
    if (!strstr(err.msg, "cannot write ")) fail_msg("%s", err.msg);
    assert_non_null(p.a[1][in]->p);
    /* Nothing was lost. */
    p.be[1]->mem_limit *= 2;
    CHECK_OK(tb_adapter_create(&a, p.m[1], &big, &check_err));
    tb_adapter_free(a);
    for (int i = 0; i < N_ADAPTERS; i++)
        same_states(&p, i);
    close_pair(&p);
}

static void test_cannot_read(void **state)
{
    (void)state;
    struct pair p;
    open_pair(&p, "f32", 1);
    for (int i = 0; i < N_ADAPTERS; i++)
        train(&p, &i, 1, 3, true);
    int out = find(&p, true), in = find(&p, false);
    char path[128], away[140];
    snprintf(path, sizeof(path), "%s/%llu.page", p.dir, (unsigned long long)p.a[1][out]->page.file);
    snprintf(away, sizeof(away), "%s.away", path);
    assert_int_equal(rename(path, away), 0);
    assert_fails(try_train(&p, out), TB_EIO, "cannot open ");
    struct stat sb;
    assert_int_equal(stat(away, &sb), 0);
    FILE *f = fopen(path, "wb"); /* too short */
    assert_non_null(f);
    assert_int_equal(fwrite("TBPAGE1", 1, 8, f), 8);
    fclose(f);
    assert_fails(try_train(&p, out), TB_EIO, "cannot read ");
    f = fopen(path, "wb"); /* not ours */
    assert_non_null(f);
    for (int i = 0; i < 100; i++)
        fputc(i, f);
    fclose(f);
    struct tb_op *op = op_adam(0.1);
    tb_adapter_optim_step(p.a[1][out], op);
    assert_fails(op, TB_ECORRUPT, "is not what was written");
    train(&p, &in, 1, 5, true); /* others are not disturbed */
    assert_int_equal(rename(away, path), 0);
    for (int i = 0; i < N_ADAPTERS; i++)
        same_states(&p, i);
    close_pair(&p);
}

/* What cannot fit at all is refused with both numbers, and moves nobody. */
static void test_never_fits(void **state)
{
    (void)state;
    struct pair p;
    open_pair(&p, "f32", 1);
    for (int i = 0; i < N_ADAPTERS; i++)
        train(&p, &i, 1, 3, true);
    struct tb_pager_stats before, after;
    tb_pager_stats(p.pager, &before);
    struct tb_lora_config big = {.rank = 1024, .alpha = 32, .train_mlp = true, .train_attn = true};
    struct tb_adapter *a = NULL;
    struct tb_error err;
    assert_int_equal(tb_adapter_create(&a, p.m[1], &big, &err), TB_ENOMEM);
    if (!strstr(err.msg, "an adapter's parameters need 7.8 MiB; ") ||
        !strstr(err.msg, " MiB are free"))
        fail_msg("%s", err.msg);
    tb_pager_stats(p.pager, &after);
    assert_int_equal(before.page_outs, after.page_outs);
    int32_t tokens[199];
    random_tokens(tokens, 199, SHAPE->vocab, 1);
    struct tb_op *op = op_cross_entropy(tokens, 199, true);
    run_items(p.m[1], &(struct train_item){p.a[1][0], op, NULL}, 1);
    assert_fails(op, TB_ENOMEM, "198 tokens need ");
    for (int i = 0; i < N_ADAPTERS; i++)
        same_states(&p, i);
    close_pair(&p);
}

static void train_others(struct pair *p, int but)
{
    for (int i = 0; i < N_ADAPTERS; i++)
        if (i != but) train(p, &i, 1, 3, true);
}

/* Weights that are lent stay in memory until they are back, and are the same where they went. */
static void test_loans(void **state)
{
    (void)state;
    enum { LENT = 3 };
    struct pair p;
    struct tb_loan loan;
    struct tb_error err;
    struct tb_adapter_version *v, *borrowed = NULL;
    open_pair(&p, "f32", 2);
    publish(&p, LENT);
    v = p.v[1][LENT];
    train_others(&p, LENT);
    assert_null(v->act); /* it is in a file */
    CHECK_OK(tb_version_lend(v, &loan, &check_err));
    tb_version_unref(v); /* freed meanwhile */
    p.v[1][LENT] = NULL;
    train_others(&p, LENT);
    assert_non_null(v->act);

    struct tb_model *to = p.m[0];
    size_t used = to->be->mem_used;
    int n = to->usage.n_versions;
    fail_device_alloc(to->be, 1);
    assert_int_equal(tb_version_borrow(&borrowed, to, &loan, &err), TB_ENOMEM);
    fail_device_alloc(to->be, 0);
    assert_null(borrowed);
    assert_true(to->be->mem_used == used && to->usage.n_versions == n);
    CHECK_OK(tb_version_borrow(&borrowed, to, &loan, &check_err));
    tb_loan_return(&loan);
    train_others(&p, LENT);
    assert_null(v->act);

    struct tb_op *ops[2];
    struct tb_adapter_version *versions[] = {p.v[0][LENT], borrowed};
    int32_t prompt[20];
    random_tokens(prompt, 20, SHAPE->vocab, 1);
    for (int k = 0; k < 2; k++) {
        ops[k] = op_sample(prompt, 20, 9, 5);
        ops[k]->u.sample.prompt_logprobs = true;
    }
    run_samples(to, versions, ops, 2, 33);
    same_samples(ops[0], ops[1], 20);
    for (int k = 0; k < 2; k++)
        tb_op_destroy(ops[k]);
    tb_version_unref(borrowed);
    close_pair(&p);
}

/* What a crash left is swept; a folder that cannot be is told. */
static void test_folder(void **state)
{
    (void)state;
    char dir[] = "/tmp/tb-pager-XXXXXX", path[64], other[64];
    assert_non_null(mkdtemp(dir));
    snprintf(path, sizeof(path), "%s/17.page", dir);
    snprintf(other, sizeof(other), "%s/notes", dir);
    fclose(fopen(path, "wb"));
    fclose(fopen(other, "wb"));
    struct tb_backend *be = new_backend("f32");
    struct tb_pager *pager;
    struct tb_error err;
    assert_non_null(be);
    assert_int_equal(tb_pager_create(&pager, be, other, &err), TB_EIO);
    assert_non_null(strstr(err.msg, "cannot open folder "));
    CHECK_OK(tb_pager_create(&pager, be, dir, &check_err));
    assert_int_equal(access(path, F_OK), -1);
    assert_int_equal(access(other, F_OK), 0); /* not ours */
    tb_pager_destroy(pager);
    assert_int_equal(unlink(other), 0);
    assert_int_equal(rmdir(dir), 0);
    be->ops->destroy(be);
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
        cmocka_unit_test(test_f32),         cmocka_unit_test(test_bf16),
        cmocka_unit_test(test_shards),      cmocka_unit_test(test_cannot_write),
        cmocka_unit_test(test_cannot_read), cmocka_unit_test(test_never_fits),
        cmocka_unit_test(test_loans),       cmocka_unit_test(test_folder),
    };
    return cmocka_run_group_tests_name("paging", tests, NULL, teardown);
}
