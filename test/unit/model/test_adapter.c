/* Adapters: optimizer steps, published versions, saved states, which modules train. */
#include "helper.h"

#include <math.h>
#include <string.h>

#include "util/mem.h"

static void test_optimizer(void **state)
{
    (void)state;
    struct tb_model *m = open_model(backend_f32(), &shapes[0], NULL);
    struct tb_adapter *a = random_adapter(m, 4, 1, 0.1f);
    size_t bytes = tb_adapter_flat_bytes(a), before = tb_adapter_bytes(a);
    float *p0 = params_of(a);
    struct tb_op *z = op_adam(1e-3);
    tb_adapter_optim_step(a, z); /* nothing accumulated: counts, and nothing else */
    assert_int_equal(z->error.code, 0);
    assert_int_equal(tb_adapter_step(a), 1);
    assert_true(metric(z, "optim/grad_norm") == 0 && metric(z, "optim/lr") == 1e-3);
    float *p1 = params_of(a);
    assert_memory_equal(p0, p1, bytes);
    assert_int_equal(tb_adapter_bytes(a), before);
    tb_free(p1);
    tb_op_destroy(z);
    static const struct {
        int field;
        double value;
        const char *text;
    } bad[] = {{0, -1, "learning_rate is -1"},
               {1, 1, "beta1 is 1; it must be at least 0 and below 1"},
               {2, -0.1, "beta2 is -0.1"},
               {3, 0, "eps is 0; it must be finite and above 0"},
               {4, (double)NAN, "weight_decay is"},
               {5, (double)INFINITY, "grad_clip_norm is inf"}};
    for (size_t i = 0; i < TB_ARRAY_LEN(bad); i++) {
        struct tb_op *b = op_adam(1e-3);
        double *f[] = {&b->u.optim_step.learning_rate, &b->u.optim_step.beta1,
                       &b->u.optim_step.beta2,         &b->u.optim_step.eps,
                       &b->u.optim_step.weight_decay,  &b->u.optim_step.grad_clip_norm};
        *f[bad[i].field] = bad[i].value;
        tb_adapter_optim_step(a, b);
        assert_int_equal(b->error.code, TB_EINVAL);
        if (!strstr(b->error.msg, bad[i].text)) fail_msg("%s", b->error.msg);
        assert_int_equal(tb_adapter_step(a), 1);
        tb_op_destroy(b);
    }
    /* A gradient that is not finite fails the step, is dropped, and the next step works. */
    struct tb_op *x = batch_op(&shapes[0], 1, true, false);
    run_train(m, a, x);
    float *g = grad_of(a), inf = INFINITY;
    m->be->ops->upload(m->be, a->g + 5, &inf, 4);
    struct tb_op *f = op_adam(1e-3);
    tb_adapter_optim_step(a, f);
    assert_int_equal(f->error.code, TB_ENONFINITE);
    p1 = params_of(a);
    assert_memory_equal(p0, p1, bytes);
    assert_int_equal(tb_adapter_step(a), 1);
    assert_false(a->has_grad);
    tb_free(p1);
    tb_op_destroy(f);
    /* Accumulation: the same op twice is twice the gradient. */
    struct tb_op *y = batch_op(&shapes[0], 1, true, false),
                 *w = batch_op(&shapes[0], 1, true, false);
    run_train(m, a, y);
    run_train(m, a, w);
    float *g2 = grad_of(a);
    for (size_t i = 0; i < bytes / 4; i++)
        assert_true(g2[i] == 2 * g[i]);
    tb_free(g);
    tb_free(g2);
    tb_free(p0);
    tb_op_destroy(x);
    tb_op_destroy(y);
    tb_op_destroy(w);
    tb_adapter_free(a);
    tb_model_free(m);
}

/* A published version does not change when the adapter is trained on. */
static void test_publish(void **state)
{
    (void)state;
    struct tb_model *m = open_model(backend_f32(), &shapes[0], NULL);
    struct tb_adapter *a = random_adapter(m, 4, 1, 0.1f);
    struct tb_adapter_version *v, *w;
    CHECK_OK(tb_adapter_publish(a, &v, &check_err));
    int32_t prompt[9];
    random_tokens(prompt, 9, 61, 4);
    struct tb_op *s[3];
    for (int i = 0; i < 3; i++) {
        s[i] = op_sample(prompt, 9, 12, 3);
        s[i]->u.sample.prompt_logprobs = true;
    }
    run_samples(m, &v, &s[0], 1, 100);
    struct tb_op *x = batch_op(&shapes[0], 1, true, false), *z = op_adam(0.05);
    run_train(m, a, x);
    tb_adapter_optim_step(a, z);
    assert_int_equal(z->error.code, 0);
    CHECK_OK(tb_adapter_publish(a, &w, &check_err));
    assert_true(v != w);
    run_samples(m, &v, &s[1], 1, 100);
    run_samples(m, &w, &s[2], 1, 100);
    assert_memory_equal(s[0]->result.prompt_logprobs + 1, s[1]->result.prompt_logprobs + 1, 8 * 4);
    assert_memory_equal(s[0]->result.sequences[0].tokens, s[1]->result.sequences[0].tokens, 12 * 4);
    assert_memory_not_equal(s[0]->result.prompt_logprobs + 1, s[2]->result.prompt_logprobs + 1,
                            8 * 4);
    for (int i = 0; i < 3; i++)
        tb_op_destroy(s[i]);
    tb_op_destroy(x);
    tb_op_destroy(z);
    tb_adapter_free(a); /* the versions outlive it */
    tb_version_unref(v);
    tb_version_unref(w);
    tb_model_free(m);
}

static void test_states(void **state)
{
    (void)state;
    struct tb_model *m = open_model(backend_f32(), &shapes[1], NULL);
    struct tb_adapter *a = random_adapter(m, 4, 1, 0.1f), *b, *c = random_adapter(m, 4, 9, 0.1f);
    struct tb_op *x = batch_op(&shapes[1], 1, true, false), *z = op_adam(0.01);
    run_train(m, a, x);
    tb_adapter_optim_step(a, z);
    tb_op_destroy(x);
    tb_op_destroy(z);
    struct tb_adapter_state *s, *bare;
    CHECK_OK(tb_adapter_export(a, true, &s, &check_err));
    CHECK_OK(tb_adapter_export(a, false, &bare, &check_err));
    assert_int_equal(s->step, 1);
    assert_int_equal(s->n_tensors, 2 * (3 * 7 + 1));
    assert_string_equal(s->tensors[0].name, "model.layers.0.self_attn.q_proj.lora_A.weight");
    assert_string_equal(s->tensors[s->n_tensors - 1].name, "model.unembed_tokens.lora_B.weight");
    assert_null(bare->m);
    CHECK_OK(tb_adapter_create_from(&b, m, s, true, &check_err));
    CHECK_OK(tb_adapter_restore(c, s, true, &check_err));
    /* Both go on to the same bits as the original. */
    struct tb_adapter *as[3] = {a, b, c};
    for (int i = 0; i < 3; i++) {
        struct tb_op *y = batch_op(&shapes[1], 2, true, false), *o = op_adam(0.01);
        run_train(m, as[i], y);
        tb_adapter_optim_step(as[i], o);
        assert_int_equal(tb_adapter_step(as[i]), 2);
        tb_op_destroy(y);
        tb_op_destroy(o);
    }
    float *p = params_of(a), *q = params_of(b), *r = params_of(c);
    assert_memory_equal(p, q, tb_adapter_flat_bytes(a));
    assert_memory_equal(p, r, tb_adapter_flat_bytes(a));
    tb_free(q);
    /* Refusals name what differs and change nothing. */
    struct tb_error err;
    assert_int_equal(tb_adapter_restore(c, bare, true, &err), TB_EINVAL);
    assert_non_null(strstr(err.msg, "has no optimizer state"));
    bare->lora.rank = 5;
    assert_int_equal(tb_adapter_restore(c, bare, false, &err), TB_EINVAL);
    assert_non_null(strstr(err.msg, "rank is 5, the model's is 4"));
    bare->lora.rank = 4;
    bare->lora.train_mlp = false;
    assert_int_equal(tb_adapter_restore(c, bare, false, &err), TB_EINVAL);
    assert_non_null(strstr(err.msg, "train_mlp is false, the model's is true"));
    bare->lora.train_mlp = true;
    bare->tensors[3].cols++;
    assert_int_equal(tb_adapter_restore(c, bare, false, &err), TB_EINVAL);
    assert_non_null(strstr(err.msg, "model.layers.0.self_attn.k_proj.lora_B.weight is [24, 5]"));
    bare->tensors[3].cols--;
    bare->tensors[3].name = "x";
    assert_int_equal(tb_adapter_restore(c, bare, false, &err), TB_EINVAL);
    assert_non_null(strstr(err.msg, "k_proj.lora_B.weight is missing"));
    bare->tensors[3].name = s->tensors[3].name;
    bare->p[7] = NAN;
    assert_int_equal(tb_adapter_restore(c, bare, false, &err), TB_ENONFINITE);
    q = params_of(c);
    assert_memory_equal(q, r, tb_adapter_flat_bytes(a));
    assert_int_equal(tb_adapter_step(c), 2);
    bare->p[7] = 0;
    CHECK_OK(tb_adapter_restore(c, bare, false, &check_err));
    assert_int_equal(tb_adapter_step(c), 0);
    tb_free(p);
    tb_free(q);
    tb_free(r);
    tb_adapter_state_destroy(s);
    tb_adapter_state_destroy(bare);
    tb_adapter_free(a);
    tb_adapter_free(b);
    tb_adapter_free(c);
    tb_model_free(m);
}

static struct tb_adapter *fresh(struct tb_model *m, uint64_t seed, bool attn, bool mlp,
                                bool unembed)
{
    struct tb_lora_config c = {4, 32, true, seed, attn, mlp, unembed};
    struct tb_adapter *a;
    CHECK_OK(tb_adapter_create(&a, m, &c, &check_err));
    return a;
}

/* Seeds give the same A whatever else is trained; parts trained alone get the same gradient bits as
 * in the whole (B is zero, so the others do not show in the forward pass). */
static void test_flags(void **state)
{
    (void)state;
    struct tb_model *m = open_model(backend_f32(), &shapes[0], NULL);
    struct tb_adapter *all = fresh(m, 42, true, true, true),
                      *other = fresh(m, 43, true, true, true);
    struct tb_op *x = batch_op(&shapes[0], 1, true, false);
    run_train(m, all, x);
    float *pa = params_of(all), *ga = grad_of(all), *po = params_of(other);
    assert_memory_not_equal(pa, po, 64);
    for (int part = 0; part < 3; part++) {
        struct tb_adapter *a = fresh(m, 42, part == 0, part == 1, part == 2);
        struct tb_op *y = batch_op(&shapes[0], 1, true, false);
        run_train(m, a, y);
        same_outputs(x, y);
        float *p = params_of(a), *g = grad_of(a);
        int n = 0;
        for (int i = 0; i < all->layout->n_modules; i++) {
            const struct tb_lora_slot *s = &a->layout->slots[i], *t = &all->layout->slots[i];
            if (s->a < 0) continue;
            size_t na = (size_t)(s->b - s->a), nb = 4 * (size_t)s->n_out;
            assert_memory_equal(p + s->a, pa + t->a, na * 4);
            assert_memory_equal(g + s->b, ga + t->b, nb * 4);
            double bound = 1 / sqrt((double)s->n_in), big = 0;
            for (size_t j = 0; j < na; j++)
                big = fmax(big, fabs((double)p[s->a + (int64_t)j]));
            assert_true(big <= bound && big > 0.8 * bound);
            for (size_t j = 0; j < nb; j++)
                assert_true(p[s->b + (int64_t)j] == 0);
            n++;
        }
        assert_int_equal(n, part == 0 ? 8 : part == 1 ? 6 : 1);
        tb_free(p);
        tb_free(g);
        tb_op_destroy(y);
        tb_adapter_free(a);
    }
    tb_free(pa);
    tb_free(ga);
    tb_free(po);
    tb_op_destroy(x);
    tb_adapter_free(all);
    tb_adapter_free(other);
    struct tb_lora_config c = {0, 32, true, 1, true, true, true};
    struct tb_adapter *a;
    struct tb_error err;
    assert_int_equal(tb_adapter_create(&a, m, &c, &err), TB_EINVAL);
    assert_non_null(strstr(err.msg, "rank is 0; it must be from 1 to 256"));
    c.rank = 257;
    assert_int_equal(tb_adapter_create(&a, m, &c, &err), TB_EINVAL);
    c = (struct tb_lora_config){4, 32, true, 1, false, false, false};
    assert_int_equal(tb_adapter_create(&a, m, &c, &err), TB_EINVAL);
    assert_non_null(strstr(err.msg, "at least one of"));
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
        cmocka_unit_test(test_optimizer),
        cmocka_unit_test(test_publish),
        cmocka_unit_test(test_states),
        cmocka_unit_test(test_flags),
    };
    return cmocka_run_group_tests_name("model adapters", tests, NULL, teardown);
}
