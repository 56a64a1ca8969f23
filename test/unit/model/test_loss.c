/* Loss functions by themselves: derivatives by differences, thresholds by position, odd inputs. */
#include "helper.h"

#include <math.h>
#include <string.h>

#include "model/loss.h"
#include "util/mem.h"
#include "util/philox.h"

enum { N = 40 };
static const char *const names[] = {"cross_entropy", "importance_sampling", "ppo", "cispo", "dro",
                                    "gspo"};

static float noise(uint32_t i, uint32_t stream)
{
    return tb_philox_draw(9, i, stream, 3) * 2 - 1;
}

static const struct tb_loss *find(const char *name)
{
    const struct tb_loss *l = NULL;
    CHECK_OK(tb_loss_find(name, &l, &check_err));
    return l;
}

struct data {
    float lp[N], w[N], q[N], A[N], mask[N], lo[N], hi[N];
    struct tb_loss_inputs in;
};

static void fill(struct data *d, const struct tb_loss *l)
{
    for (uint32_t i = 0; i < N; i++) {
        d->lp[i] = -2 + noise(i, 1);
        d->w[i] = i % 5 ? noise(i, 2) : 0;
        d->q[i] = d->lp[i] + 0.5f * noise(i, 3);
        d->A[i] = i % 4 ? noise(i, 4) : 0;
        d->mask[i] = i % 3 ? 1 : 0;
        d->lo[i] = 0.7f;
        d->hi[i] = 1.1f;
    }
    d->in = (struct tb_loss_inputs){.n = N,
                                    .k = 1,
                                    .weights = d->w,
                                    .logprobs = d->q,
                                    .advantages = d->A,
                                    .mask = d->mask,
                                    .lo = l->lo,
                                    .hi = l->hi,
                                    .beta = l->beta};
}

static double total(const struct tb_loss *l, const struct data *d, float *g)
{
    double loss = 0;
    float scratch[N];
    assert_int_equal(l->eval(&d->in, 0, N, d->lp, g ? g : scratch, &loss), -1);
    return loss;
}

/* cispo and gspo stop the gradient at the ratio, so their loss's own slope is another; the others
 * must agree with differences away from their kinks. */
static void test_derivatives(void **state)
{
    (void)state;
    for (size_t k = 0; k < TB_ARRAY_LEN(names); k++) {
        const struct tb_loss *l = find(names[k]);
        struct data d;
        fill(&d, l);
        float g[N];
        total(l, &d, g);
        int zeros = 0, checked = 0;
        for (int i = 0; i < N; i++) {
            double r = exp((double)d.lp[i] - (double)d.q[i]), h = 1e-3;
            zeros += g[i] == 0;
            if (!strcmp(names[k], "cispo")) {
                double c = fmin(fmax(r, 0.0), 4.0);
                assert_true(fabs((double)g[i] + c * (double)d.A[i]) < 1e-6);
                continue;
            }
            if (!strcmp(names[k], "gspo")) continue;
            if (fabs(r - 0.8) < 0.01 || fabs(r - 1.2) < 0.01) continue;
            struct data e = d;
            e.lp[i] = d.lp[i] + (float)h;
            double up = total(l, &e, NULL);
            double step_up = (double)e.lp[i];
            e.lp[i] = d.lp[i] - (float)h;
            double slope = (up - total(l, &e, NULL)) / (step_up - (double)e.lp[i]);
            if (fabs(slope - (double)g[i]) > 1e-4 * (1 + fabs(slope)))
                fail_msg("%s at %d: %g, by differences %g", names[k], i, (double)g[i], slope);
            checked++;
        }
        assert_true(checked > 25 || k == 3 || k == 5);
        if (k < 4) assert_true(zeros > 0);
    }
}

/* Blocks give what the whole gives. */
static void test_blocks(void **state)
{
    (void)state;
    for (size_t k = 0; k < TB_ARRAY_LEN(names); k++) {
        const struct tb_loss *l = find(names[k]);
        if (l->whole) continue;
        struct data d;
        fill(&d, l);
        float g[N], h[N];
        double whole = total(l, &d, g), sum = 0;
        for (int i = 0; i < N; i += 7)
            assert_int_equal(l->eval(&d.in, i, TB_MIN(i + 7, N), d.lp, h, &sum), -1);
        assert_true(whole == sum);
        assert_memory_equal(g, h, sizeof(g));
    }
}

static void test_gspo(void **state)
{
    (void)state;
    const struct tb_loss *l = find("gspo");
    struct data d;
    fill(&d, l);
    double s = 0;
    int n = 0;
    for (int i = 0; i < N; i++)
        if (d.mask[i] != 0) {
            s += (double)d.lp[i] - (double)d.q[i];
            n++;
        }
    s = exp(s / n);
    float g[N];
    double want = 0, loss = total(l, &d, g);
    for (int i = 0; i < N; i++) {
        double A = (double)d.A[i], c = fmin(fmax(s, 0.8), 1.2);
        want -= fmin(s * A, c * A);
        bool off = (A > 0 && s > 1.2) || (A < 0 && s < 0.8);
        assert_true(fabs((double)g[i] + (off ? 0 : s * A)) < 1e-6);
    }
    assert_true(fabs(want - loss) < 1e-6);
}

static void test_not_finite(void **state)
{
    (void)state;
    struct data d;
    double loss = 0;
    float g[N];
    const struct tb_loss *is = find("importance_sampling"), *ppo = find("ppo"),
                         *cispo = find("cispo");
    fill(&d, is);
    d.q[6] = -2000;
    assert_int_equal(is->eval(&d.in, 0, N, d.lp, g, &loss), 6);
    d.A[6] = 0; /* 0 times a huge ratio is 0 */
    loss = 0;
    assert_int_equal(is->eval(&d.in, 0, N, d.lp, g, &loss), -1);
    assert_true(isfinite(loss) && g[6] == 0);
    fill(&d, ppo);
    d.q[6] = -2000;
    d.A[6] = 1; /* clipped from above: finite, no slope */
    assert_int_equal(ppo->eval(&d.in, 0, N, d.lp, g, &loss), -1);
    assert_true(g[6] == 0);
    d.A[6] = -1;
    assert_int_equal(ppo->eval(&d.in, 0, N, d.lp, g, &loss), 6);
    fill(&d, cispo);
    d.q[6] = -2000;
    d.A[6] = -1;
    assert_int_equal(cispo->eval(&d.in, 0, N, d.lp, g, &loss), -1);
    assert_true(g[6] == 4);
}

/* ---- inputs in their forms */

static struct tb_tensor f32(const char *name, const float *v, int n)
{
    return (struct tb_tensor){
        .name = name, .type = TB_TENSOR_F32, .n_dims = 1, .shape = {n}, .n = n, .data.f32 = v};
}

static void test_forms(void **state)
{
    (void)state;
    static const int32_t tokens[3] = {1, 2, 3};
    static const int64_t targets[6] = {2, 3, 4, 5, 6, 7}, int_weights[3] = {1, 0, -2};
    static const float q[3] = {-1, -1, -1}, lo[1] = {0.5f}, hi[3] = {1, 2, 3};
    struct tb_tensor ids = {.name = "target_tokens",
                            .type = TB_TENSOR_I64,
                            .n_dims = 1,
                            .shape = {3},
                            .n = 3,
                            .data.i64 = targets};
    struct tb_tensor in[6] = {ids,
                              f32("logprobs", q, 3),
                              f32("advantages", q, 3),
                              f32("clip_low_threshold", lo, 1),
                              f32("clip_high_threshold", hi, 3),
                              f32("mask", q, 2)}; /* unknown: ignored, whatever its shape */
    struct tb_datum d = {3, tokens, 6, in};
    struct tb_forward_backward fb = {.n_data = 1, .data = &d, .loss_fn = "ppo"};
    struct tb_arena arena;
    tb_arena_init(&arena);
    struct tb_loss_inputs out;
    CHECK_OK(tb_loss_prepare(find("ppo"), &fb, 10, 10, &arena, &out, &check_err));
    assert_true(out.lo_at[0] == 0.5f && out.lo_at[2] == 0.5f && out.hi_at[2] == 3);
    assert_int_equal(out.targets[2], 4);
    assert_false(out.two_d);
    /* Thresholds in the config, and none in the inputs. */
    struct tb_config_value c[2] = {{.key = "clip_low_threshold", .number = 0.25},
                                   {.key = "clip_high_threshold", .number = 9}};
    fb.config = c;
    fb.n_config = 2;
    d.n_inputs = 3;
    CHECK_OK(tb_loss_prepare(find("ppo"), &fb, 10, 10, &arena, &out, &check_err));
    assert_true(!out.lo_at && out.lo == 0.25 && out.hi == 9);
    /* Cross entropy: integer weights, no weights, two dimensions. */
    fb.n_config = 0;
    in[1] = (struct tb_tensor){.name = "weights",
                               .type = TB_TENSOR_I64,
                               .n_dims = 1,
                               .shape = {3},
                               .n = 3,
                               .data.i64 = int_weights};
    d.n_inputs = 2;
    CHECK_OK(tb_loss_prepare(find("cross_entropy"), &fb, 10, 10, &arena, &out, &check_err));
    assert_true(out.weights[0] == 1 && out.weights[2] == -2);
    d.n_inputs = 1;
    CHECK_OK(tb_loss_prepare(find("cross_entropy"), &fb, 10, 10, &arena, &out, &check_err));
    assert_null(out.weights);
    in[0].n_dims = 2;
    in[0].shape[1] = 2;
    in[0].n = 6;
    CHECK_OK(tb_loss_prepare(find("cross_entropy"), &fb, 10, 10, &arena, &out, &check_err));
    assert_true(out.two_d && out.k == 2 && out.targets[5] == 7);
    float lp[6] = {-1, -2, -3, -4, -5, -6}, g[6];
    double loss = 0;
    assert_int_equal(find("cross_entropy")->eval(&out, 0, 3, lp, g, &loss), -1);
    assert_true(loss == 21 && g[5] == -1);
    tb_arena_fini(&arena);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_derivatives), cmocka_unit_test(test_blocks),
        cmocka_unit_test(test_gspo),        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_forms),
    };
    return cmocka_run_group_tests_name("model losses", tests, NULL, NULL);
}
