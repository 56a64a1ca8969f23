/*
 * Embedding, norms, rope, SwiGLU and the optimizer: every instruction set against the plain one,
 * the plain one against finite differences and known numbers.
 */
#include "common.h"

static double tol_of(enum tb_dtype act)
{
    return act == TB_BF16 ? 8e-3 : 1e-5;
}

struct both {
    struct tb_backend *ref, *be;
    enum tb_dtype act;
    double tol;
};

static bool open_both(struct both *b, const struct target *t)
{
    *b = (struct both){.act = t->act, .tol = tol_of(t->act)};
    b->be = open_backend(t->isa, t->act, 2);
    if (!b->be) return false;
    b->ref = open_backend("plain", t->act, 1);
    return true;
}

static void close_both(struct both *b)
{
    b->be->ops->destroy(b->be);
    b->ref->ops->destroy(b->ref);
}

static void test_embed(void **state)
{
    enum { V = 11, DIM = 37, T = 40 };
    for (int i = 0; i < N_TARGETS; i++) {
        struct tb_backend *be = open_backend(targets[i].isa, targets[i].act, 2);
        if (!be) continue;
        float *table = random_f32(V * DIM), x[T * DIM];
        int32_t tokens[T];
        for (int t = 0; t < T; t++)
            tokens[t] = t * 7 % V;
        for (int d = 0; d < 2; d++) {
            void *src = to_act(d ? TB_BF16 : TB_F32, table, V * DIM);
            be->ops->embed(be, src, d ? TB_BF16 : TB_F32, tokens, T, DIM, x);
            for (int j = 0; j < T * DIM; j++)
                assert_true(x[j] == tb_load(d ? TB_BF16 : TB_F32, src,
                                            (size_t)(tokens[j / DIM] * DIM + j % DIM)));
            free(src);
        }
        free(table);
        be->ops->destroy(be);
    }
}

static void test_rmsnorm(void **state)
{
    static const int dims[] = {1, 16, 37, 64, 1024, 1031}, counts[] = {1, 3, 100};
    for (int i = 0; i < N_TARGETS; i++) {
        struct both b;
        if (!open_both(&b, &targets[i])) continue;
        for (int d = 0; d < 6; d++) {
            for (int c = 0; c < 3; c++) {
                int dim = dims[d], T = counts[c];
                size_t n = (size_t)T * (size_t)dim, esz = tb_dtype_size(b.act);
                float *x = random_f32(n), *w = random_f32((size_t)dim), *dy = random_f32(n),
                      *dx = random_f32(n);
                float *dxr = malloc(n * 4), r0[100], r1[100];
                void *y = malloc(n * esz), *yr = malloc(n * esz);
                memcpy(dxr, dx, n * 4);
                b.ref->ops->rmsnorm(b.ref, x, w, T, dim, 1e-6f, yr, r0);
                b.be->ops->rmsnorm(b.be, x, w, T, dim, 1e-6f, y, r1);
                assert_close("rstd", r1, r0, (size_t)T, 1e-6);
                assert_close_act("rmsnorm", b.act, y, yr, n, b.tol);
                b.be->ops->rmsnorm(b.be, x, w, T, dim, 1e-6f, y, NULL);
                b.ref->ops->rmsnorm_bwd(b.ref, x, w, r0, dy, T, dim, dxr);
                b.be->ops->rmsnorm_bwd(b.be, x, w, r0, dy, T, dim, dx);
                assert_close("rmsnorm_bwd", dx, dxr, n, 1e-5);
                free(x);
                free(w);
                free(dy);
                free(dx);
                free(dxr);
                free(y);
                free(yr);
            }
        }
        close_both(&b);
    }
}

static void test_heads(void **state)
{
    enum { T = 33, MAX = 40 };
    static const int hds[] = {16, 32, 64, 80, 128, 10};
    for (int i = 0; i < N_TARGETS; i++) {
        struct both b;
        if (!open_both(&b, &targets[i])) continue;
        for (int h = 0; h < 6; h++) {
            for (int mode = 0; mode < 4; mode++) {
                int hd = hds[h], rope = mode & 1 ? hd / 2 / 2 * 2 : hd;
                struct tb_attn_shape s = {4, 2, hd, 1, 0};
                size_t nq = (size_t)(T * 4 * hd), nk = (size_t)(T * 2 * hd), all = nq + 2 * nk,
                       esz = tb_dtype_size(b.act);
                float *raw = random_f32(all), *cs = random_f32((size_t)(MAX * hd)),
                      *sn = random_f32((size_t)(MAX * hd));
                float *norms = random_f32((size_t)(2 * hd)), *d = random_f32(all);
                const float *qn = mode & 2 ? norms : NULL, *kn = mode & 2 ? norms + hd : NULL;
                int32_t pos[T];
                for (int t = 0; t < T; t++)
                    pos[t] = t * 11 % MAX;
                char *o[2], *r[2], *g[2];
                for (int k = 0; k < 2; k++) {
                    struct tb_backend *be = k ? b.be : b.ref;
                    o[k] = calloc(all, esz);
                    r[k] = calloc(nq + nk, esz);
                    g[k] = calloc(all, esz);
                    be->ops->qkv_post(be, &s, raw, T, pos, cs, sn, rope, qn, kn, 1e-6f, o[k],
                                      o[k] + nq * esz, o[k] + (nq + nk) * esz, r[k]);
                    char *again = calloc(all, esz);
                    be->ops->qkv_post(be, &s, raw, T, pos, cs, sn, rope, qn, kn, 1e-6f, again,
                                      again + nq * esz, again + (nq + nk) * esz, NULL);
                    assert_same_bits("qkv_post without raw_act", again, o[k], all * esz);
                    free(again);
                    be->ops->qkv_post_bwd(be, &s, d, d + nq, d + nq + nk, T, pos, cs, sn, rope, qn,
                                          kn, 1e-6f, r[0], g[k]);
                }
                assert_close_act("qkv_post", b.act, o[1], o[0], all, b.tol);
                assert_close_act("raw_act", b.act, r[1], r[0], nq + nk, 0);
                assert_close_act("qkv_post_bwd", b.act, g[1], g[0], all, b.tol);
                for (int k = 0; k < 2; k++) {
                    free(o[k]);
                    free(r[k]);
                    free(g[k]);
                }
                free(raw);
                free(cs);
                free(sn);
                free(norms);
                free(d);
            }
        }
        close_both(&b);
    }
}

/* qkv_post, rmsnorm and swiglu's gradients by central differences in float32. */
static void test_gradients(void **state)
{
    enum { T = 3, HD = 8, N = T * 4 * HD, DIM = 9, F = 7 };
    struct tb_backend *be = open_backend("plain", TB_F32, 1);
    struct tb_attn_shape s = {2, 1, HD, 1, 0};
    float *raw = random_f32(N), *d = random_f32(N), *norms = random_f32(2 * HD), g[N], o[N],
          keep[N];
    float cs[8 * HD], sn[8 * HD];
    int32_t pos[T] = {0, 5, 2};
    for (int i = 0; i < 8 * HD; i++) {
        cs[i] = cosf((float)i);
        sn[i] = sinf((float)i);
    }
    size_t nq = T * 2 * HD, nk = T * HD;
    be->ops->qkv_post(be, &s, raw, T, pos, cs, sn, HD, norms, norms + HD, 1e-3f, o, o + nq,
                      o + nq + nk, keep);
    be->ops->qkv_post_bwd(be, &s, d, d + nq, d + nq + nk, T, pos, cs, sn, HD, norms, norms + HD,
                          1e-3f, keep, g);
    for (int p = 0; p < N; p++) {
        float old = raw[p];
        double f[2] = {0, 0};
        for (int k = 0; k < 2; k++) {
            raw[p] = old + (k ? 1e-2f : -1e-2f);
            be->ops->qkv_post(be, &s, raw, T, pos, cs, sn, HD, norms, norms + HD, 1e-3f, o, o + nq,
                              o + nq + nk, NULL);
            for (int j = 0; j < N; j++)
                f[k] += (double)o[j] * (double)d[j];
        }
        raw[p] = old;
        if (fabs((f[1] - f[0]) / 2e-2 - (double)g[p]) > 5e-3)
            fail_msg("qkv %d: %g, %g", p, (f[1] - f[0]) / 2e-2, (double)g[p]);
    }
    float *x = raw, rstd[T], y[T * DIM], dx[T * DIM] = {0};
    be->ops->rmsnorm(be, x, norms, T, DIM, 1e-3f, y, rstd);
    be->ops->rmsnorm_bwd(be, x, norms, rstd, d, T, DIM, dx);
    for (int p = 0; p < T * DIM; p++) {
        float old = x[p];
        double f[2] = {0, 0};
        for (int k = 0; k < 2; k++) {
            x[p] = old + (k ? 1e-2f : -1e-2f);
            be->ops->rmsnorm(be, x, norms, T, DIM, 1e-3f, y, NULL);
            for (int j = 0; j < T * DIM; j++)
                f[k] += (double)y[j] * (double)d[j];
        }
        x[p] = old;
        assert_true(fabs((f[1] - f[0]) / 2e-2 - (double)dx[p]) < 5e-3);
    }
    float dgu[T * 2 * F], a[T * F];
    be->ops->swiglu_bwd(be, x, d, T, F, dgu);
    for (int p = 0; p < T * 2 * F; p++) {
        float old = x[p];
        double f[2] = {0, 0};
        for (int k = 0; k < 2; k++) {
            x[p] = old + (k ? 1e-2f : -1e-2f);
            be->ops->swiglu(be, x, T, F, a, NULL);
            for (int j = 0; j < T * F; j++)
                f[k] += (double)a[j] * (double)d[j];
        }
        x[p] = old;
        assert_true(fabs((f[1] - f[0]) / 2e-2 - (double)dgu[p]) < 2e-3);
    }
    free(raw);
    free(d);
    free(norms);
    be->ops->destroy(be);
}

static void test_swiglu(void **state)
{
    static const int dims[] = {1, 16, 37, 300}, counts[] = {1, 17};
    for (int i = 0; i < N_TARGETS; i++) {
        struct both b;
        if (!open_both(&b, &targets[i])) continue;
        for (int d = 0; d < 4; d++) {
            for (int c = 0; c < 2; c++) {
                int F = dims[d], T = counts[c];
                size_t n = (size_t)(T * F), esz = tb_dtype_size(b.act);
                float *gu = random_f32(2 * n), *da = random_f32(n);
                for (size_t k = 0; k < 2 * n; k++)
                    gu[k] *= k % 13 == 0 ? 200 : 5; /* saturated ones too */
                void *a[2], *keep[2], *dgu[2], *again = malloc(n * esz);
                for (int k = 0; k < 2; k++) {
                    struct tb_backend *be = k ? b.be : b.ref;
                    a[k] = malloc(n * esz);
                    keep[k] = malloc(2 * n * esz);
                    dgu[k] = malloc(2 * n * esz);
                    be->ops->swiglu(be, gu, T, F, a[k], keep[k]);
                    be->ops->swiglu(be, gu, T, F, again, NULL);
                    assert_same_bits("swiglu without gu_act", again, a[k], n * esz);
                    be->ops->swiglu_again(be, keep[k], T, F, again);
                    assert_same_bits("swiglu_again", again, a[k], n * esz);
                    be->ops->swiglu_bwd(be, keep[0], da, T, F, dgu[k]);
                }
                assert_close_act("gu_act", b.act, keep[1], keep[0], 2 * n, 0);
                assert_close_act("swiglu", b.act, a[1], a[0], n, b.tol);
                assert_close_act("swiglu_bwd", b.act, dgu[1], dgu[0], 2 * n, b.tol);
                for (int k = 0; k < 2; k++) {
                    free(a[k]);
                    free(keep[k]);
                    free(dgu[k]);
                }
                free(again);
                free(gu);
                free(da);
            }
        }
        close_both(&b);
    }
}

static void test_flat(void **state)
{
    static const size_t sizes[] = {0, 1, 15, 33, 70000};
    for (int i = 0; i < N_TARGETS; i++) {
        struct both b;
        if (!open_both(&b, &targets[i])) continue;
        for (int k = 0; k < 5; k++) {
            size_t n = sizes[k], esz = tb_dtype_size(b.act);
            float *x = random_f32(n), *y = random_f32(n), *z = malloc(n * 4 + 1);
            void *a = malloc(n * esz + 1), *ar = malloc(n * esz + 1);
            memcpy(z, y, n * 4);
            b.be->ops->to_act(b.be, x, n, a);
            b.ref->ops->to_act(b.ref, x, n, ar);
            assert_same_bits("to_act", a, ar, n * esz);
            b.be->ops->add(b.be, y, x, n);
            for (size_t j = 0; j < n; j++)
                assert_true(y[j] == z[j] + x[j]);
            double got = b.be->ops->sum_squares(b.be, x, n),
                   want = b.ref->ops->sum_squares(b.ref, x, n);
            assert_true(fabs(got - want) <= 1e-12 * want);
            if (n) {
                x[n / 2] = INFINITY;
                assert_true(isinf(b.be->ops->sum_squares(b.be, x, n)));
                x[n / 2] = NAN;
                assert_true(isnan(b.be->ops->sum_squares(b.be, x, n)));
            }
            free(x);
            free(y);
            free(z);
            free(a);
            free(ar);
        }
        close_both(&b);
    }
}

/* Three steps, float64 numbers of an independent computation. */
static void test_adamw(void **state)
{
    static const double want_p[3][3] = {
        {0.4895000000001, -0.23975000000005, 0.0999},
        {0.4796175693172856, -0.2419753807888818, 0.10714969992040471},
        {0.4832626168260194, -0.24366359737432938, 0.1039612528163411}};
    static const float grads[3][3] = {
        {0.1f, -0.2f, 0.0f}, {0.05f, 0.3f, -0.0001f}, {-0.4f, 0.0f, 0.0002f}};
    for (int i = 0; i < N_TARGETS; i++) {
        struct tb_backend *be = open_backend(targets[i].isa, targets[i].act, 1);
        if (!be) continue;
        float p[3] = {0.5f, -0.25f, 0.1f}, m[3] = {0}, v[3] = {0}, g[3];
        for (int t = 0; t < 3; t++) {
            struct tb_adamw o = {0.01f,
                                 0.9f,
                                 0.95f,
                                 1e-12f,
                                 0.1f,
                                 0.5f,
                                 (float)(1 - pow(0.9, t + 1)),
                                 (float)(1 - pow(0.95, t + 1))};
            for (int j = 0; j < 3; j++)
                g[j] = 2 * grads[t][j]; /* grad_scale halves it */
            be->ops->adamw(be, &o, p, m, v, g, 3);
            for (int j = 0; j < 3; j++) {
                assert_true(fabs((double)p[j] - want_p[t][j]) < 2e-6);
                assert_true(g[j] == 2 * grads[t][j]);
            }
        }
        be->ops->destroy(be);
    }
    for (int i = 0; i < N_TARGETS; i++) {
        struct both b;
        if (!open_both(&b, &targets[i])) continue;
        enum { N = 40001 };
        float *x[2][4];
        struct tb_adamw o = {1e-3f, 0.9f, 0.95f, 1e-8f, 0.01f, 0.7f, 0.19f, 0.0975f};
        for (int k = 0; k < 2; k++) {
            rng_state = 31;
            for (int j = 0; j < 4; j++)
                x[k][j] = random_f32(N);
            for (int j = 0; j < N; j++)
                x[k][2][j] = fabsf(x[k][2][j]) + 0.01f;
            struct tb_backend *be = k ? b.be : b.ref;
            be->ops->adamw(be, &o, x[k][0], x[k][1], x[k][2], x[k][3], N);
        }
        for (int j = 0; j < 3; j++)
            assert_close("adamw", x[1][j], x[0][j], N, 1e-6);
        for (int k = 0; k < 2; k++)
            for (int j = 0; j < 4; j++)
                free(x[k][j]);
        close_both(&b);
    }
}

static void test_create(void **state)
{
    struct tb_backend *be = NULL;
    struct tb_error err = {0};
    char line[128];
    setenv("TB_CUDA_MODULE", "/nowhere/tb-cuda.so", 1); /* auto is the CPU, whatever is here */
    assert_int_equal(tb_backend_create(&be, "cuda", "auto", NULL, &err), TB_EUNSUPPORTED);
    assert_string_equal(err.msg, "the CUDA backend is not installed: no /nowhere/tb-cuda.so");
    assert_null(be);
    assert_int_equal(tb_backend_create(&be, "tpu", "auto", NULL, &err), TB_EINVAL);
    assert_int_equal(tb_backend_create(&be, "cpu", "int8", NULL, &err), TB_EINVAL);
    struct tb_backend_options o = {.isa = "plain", .n_threads = 3};
    assert_int_equal(tb_backend_create(&be, "auto", "auto", &o, &err), 0);
    assert_int_equal(be->act, TB_F32);
    be->ops->describe(be, line, sizeof(line));
    assert_string_equal(line, "cpu plain, f32, 3 threads");
    be->ops->destroy(be);
    o.isa = "avx2";
    int rc = tb_backend_create(&be, "cpu", "bf16", &o, &err);
    assert_int_equal(rc, TB_EUNSUPPORTED);
    o.isa = "sse9";
    assert_int_equal(tb_backend_create(&be, "cpu", "f32", &o, &err), TB_EINVAL);
    assert_int_equal(tb_backend_create(&be, "auto", "auto", NULL, &err), 0);
    void *p = be->ops->alloc(be, 100);
    assert_int_equal((uintptr_t)p % 64, 0);
    be->ops->zero(be, p, 100);
    be->ops->upload(be, p, "abc", 3);
    be->ops->copy(be, (char *)p + 50, p, 3);
    char back[4] = {0};
    be->ops->download(be, back, (char *)p + 50, 3);
    assert_string_equal(back, "abc");
    assert_int_equal(be->ops->sync(be, &err), 0);
    be->ops->free(be, p, 100);
    if (!SLOW) assert_null(be->ops->alloc(be, SIZE_MAX / 2)); /* sanitizers abort instead */
    be->ops->destroy(be);
}

/* What one backend has computed comes to another of its kind. */
static void test_copy_from(void **state)
{
    enum { N = 70001 };
    for (int i = 0; i < N_TARGETS; i++) {
        struct tb_backend *a = open_backend(targets[i].isa, targets[i].act, 1),
                          *b = open_backend(targets[i].isa, targets[i].act, 1);
        if (!a) continue;
        assert_string_equal(a->kind, b->kind);
        float *x = random_f32(N), *got = malloc(N * 4);
        float *pa = a->ops->alloc(a, N * 4), *pb = b->ops->alloc(b, N * 4);
        a->ops->upload(a, pa, x, N * 4);
        a->ops->add(a, pa, pa, N);
        assert_int_equal(a->ops->sync(a, NULL), 0);
        b->ops->zero(b, pb, N * 4);
        assert_int_equal(b->ops->copy_from(b, pb, a, pa, N * 4, NULL), 0);
        assert_int_equal(b->ops->copy_from(b, pb, a, pa, 0, NULL), 0);
        b->ops->add(b, pb, pb, N); /* after the copy */
        assert_int_equal(b->ops->sync(b, NULL), 0);
        a->ops->zero(a, pa, N * 4);
        b->ops->download(b, got, pb, N * 4);
        for (int k = 0; k < N; k++)
            x[k] *= 4;
        assert_same_bits("copied", got, x, N * 4);
        a->ops->free(a, pa, N * 4);
        b->ops->free(b, pb, N * 4);
        a->ops->destroy(a);
        b->ops->destroy(b);
        free(x);
        free(got);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_create),    cmocka_unit_test(test_embed),
        cmocka_unit_test(test_rmsnorm),   cmocka_unit_test(test_heads),
        cmocka_unit_test(test_swiglu),    cmocka_unit_test(test_flat),
        cmocka_unit_test(test_gradients), cmocka_unit_test(test_adamw),
        cmocka_unit_test(test_copy_from),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
