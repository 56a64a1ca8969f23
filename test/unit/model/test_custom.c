/* Training by custom losses: against the built-in loss, beside other ops, and failures. */
#include "helper.h"

#include <math.h>
#include <string.h>

#include "model/custom/graph.h"
#include "model/pass.h"
#include "util/mem.h"

#define NODE(kind, name, target, args)                                                             \
    "{\"op\":\"" kind "\",\"name\":\"" name "\",\"target\":\"" target "\",\"args\":[" args "]},"
#define REF(name)             "{\"ref\":\"" name "\"}"
#define FUNC(name, f, args)   NODE("call_function", name, f, args)
#define METHOD(name, f, args) NODE("call_method", name, f, args)
#define GRAPH(nodes, loss)                                                                                        \
    "{\"inputs\":[{\"name\":\"logprobs\",\"rank\":1},{\"name\":\"weights\",\"rank\":1}],\"graph\":{\"format\":1," \
    "\"nodes\":[" NODE("placeholder", "logprobs", "logprobs", "")                                                 \
        NODE("placeholder", "weights", "weights", "") nodes                                                       \
        "{\"op\":\"output\",\"name\":\"output\",\"target\":\"output\",\"args\":[{\"tuple\":[" REF(                \
            loss) ",{\"dict\":{\"custom/loss:sum\":" REF(loss) ",\"custom/loss:mean\":" REF(loss) "}}]}]}]}}"

#define MUL FUNC("mul", "operator.mul", REF("logprobs") "," REF("weights"))
/* cross_entropy */
static const char nll[] =
    GRAPH(MUL METHOD("s", "sum", REF("mul")) FUNC("neg", "operator.neg", REF("s")), "neg");
/* couples all positions of a datum */
static const char coupled[] = GRAPH(
    MUL METHOD("p", "softmax", REF("mul") ",-1") FUNC("q", "torch.logsumexp", REF("p") ",0")
        METHOD("std", "std", REF("logprobs")) FUNC("add", "operator.add", REF("q") "," REF("std")),
    "add");
/* fails where a datum is short */
static const char far[] = GRAPH(FUNC("far", "operator.getitem", REF("logprobs") ",30"), "far");

static struct tb_graph *graph_of(const char *text)
{
    struct tb_graph *g;
    struct tb_error err = {0};
    if (tb_graph_create(&g, text, strlen(text), &err)) fail_msg("%s", err.msg);
    return g;
}

static struct tb_op *custom_op(const struct shape *s, uint64_t from, bool backward)
{
    static struct tb_config_value id = {.key = "loss_id", .is_text = true, .text = "mine"};
    struct tb_op *op = batch_op(s, from, backward, false);
    op->u.forward_backward.loss_fn = "custom";
    op->u.forward_backward.config = &id;
    op->u.forward_backward.n_config = 1;
    return op;
}

static void test_equals_built_in(void **state)
{
    (void)state;
    struct tb_graph *g = graph_of(nll);
    for (size_t k = 0; k < N_SHAPES; k++) {
        struct tb_model *m = open_model(backend_f32(), &shapes[k], NULL);
        struct tb_adapter *a = random_adapter(m, 4, 1, 0.1f), *b = random_adapter(m, 4, 1, 0.1f);
        struct tb_op *x = custom_op(&shapes[k], 1, true), *y = batch_op(&shapes[k], 1, true, false);
        run_items(m, &(struct train_item){a, x, g}, 1);
        if (x->error.code) fail_msg("%s", x->error.msg);
        run_train(m, b, y);
        for (int i = 0; i < 4; i++)
            assert_memory_equal(x->result.outputs[i].logprobs, y->result.outputs[i].logprobs,
                                (size_t)x->result.outputs[i].n * sizeof(float));
        same_grads(a, b);
        double want = metric(y, "loss:sum");
        assert_true(fabs(metric(x, "loss:sum") - want) <= 1e-6 * fabs(want));
        assert_true(metric(x, "custom/loss:sum") == metric(x, "loss:sum"));
        assert_true(metric(x, "custom/loss:mean") == metric(x, "loss:sum") / 4);
        assert_int_equal(x->result.n_metrics, 3);
        tb_op_destroy(x);
        tb_op_destroy(y);
        tb_adapter_free(a);
        tb_adapter_free(b);
        tb_model_free(m);
    }
    tb_graph_destroy(g);
}

/* Alone, beside others, forward only, and in other micro-batches: the same bits. */
static void test_batch_mates(void **state)
{
    (void)state;
    const struct shape *s = &shapes[0];
    struct tb_graph *g = graph_of(coupled), *h = graph_of(nll);
    struct tb_model *m = open_model(backend_f32(), s, NULL);
    struct tb_model_options o = {.activation_bytes = tb_pass_bytes(m, TB_PASS_KEEP, true, 70, 4)};
    struct tb_model *small = open_model(backend_f32(), s, &o);
    struct tb_adapter *a = random_adapter(m, 4, 1, 0.1f), *b = random_adapter(m, 4, 1, 0.1f);
    struct tb_adapter *c = random_adapter(m, 7, 2, 0.1f), *d = random_adapter(small, 4, 1, 0.1f);
    struct tb_op *alone = custom_op(s, 1, true), *split = custom_op(s, 1, true);
    run_items(m, &(struct train_item){a, alone, g}, 1);
    if (alone->error.code) fail_msg("%s", alone->error.msg);
    struct train_item items[] = {{c, batch_op(s, 5, true, true), NULL},
                                 {b, custom_op(s, 1, true), g},
                                 {c, custom_op(s, 6, true), h},
                                 {b, custom_op(s, 1, false), g},
                                 {c, batch_op(s, 7, true, false), NULL}};
    run_items(m, items, 5);
    run_items(small, &(struct train_item){d, split, g}, 1);
    same_outputs(alone, items[1].op);
    same_outputs(alone, items[3].op);
    same_outputs(alone, split);
    same_grads(a, b);
    same_grads(a, d);
    for (int i = 0; i < 5; i++) {
        assert_int_equal(items[i].op->error.code, 0);
        tb_op_destroy(items[i].op);
    }
    tb_op_destroy(alone);
    tb_op_destroy(split);
    tb_adapter_free(a);
    tb_adapter_free(b);
    tb_adapter_free(c);
    tb_adapter_free(d);
    tb_model_free(m);
    tb_model_free(small);
    tb_graph_destroy(g);
    tb_graph_destroy(h);
}

static void fails(struct tb_model *m, struct tb_op *op, const struct tb_graph *g, int code,
                  const char *says)
{
    struct tb_adapter *a = random_adapter(m, 4, 1, 0.1f);
    run_items(m, &(struct train_item){a, op, g}, 1);
    if (op->error.code != code || !strstr(op->error.msg, says))
        fail_msg("%d %s, not %s", op->error.code, op->error.msg, says);
    assert_false(a->has_grad);
    assert_int_equal(op->result.n_outputs, 0);
    tb_op_destroy(op);
    tb_adapter_free(a);
}

/* What an evaluation takes counts against the limit while it runs. */
static void test_memory(void **state)
{
    (void)state;
    struct tb_graph *g = graph_of(coupled);
    struct tb_op *op = custom_op(&shapes[0], 1, true);
    const struct tb_datum *d = &op->u.forward_backward.data[0];
    struct tb_backend be = {.mem_limit = 1 << 20, .mem_used = 100};
    float logprobs[70], derivative[70];
    double metrics[2];
    struct tb_error err;
    for (int i = 0; i < 70; i++)
        logprobs[i] = -1 - (float)i / 64;
    struct tb_graph_run run = {.datum = d,
                               .logprobs = logprobs,
                               .n = d->n_tokens,
                               .k = 1,
                               .be = &be,
                               .metrics = metrics,
                               .d_logprobs = derivative};
    assert_int_equal(d->n_tokens, 70);
    CHECK_OK(tb_graph_eval(g, &run, &check_err));
    assert_int_equal(be.mem_used, 100);
    be.mem_used = be.mem_limit - 100;
    assert_int_equal(tb_graph_eval(g, &run, &err), TB_ENOMEM);
    if (!strstr(err.msg, "its values need 0.1 MiB; 0.0 MiB of the limit of 1.0 MiB are free"))
        fail_msg("%s", err.msg);
    assert_int_equal(be.mem_used, be.mem_limit - 100);
    tb_op_destroy(op);
    tb_graph_destroy(g);
}

static void test_failures(void **state)
{
    (void)state;
    const struct shape *s = &shapes[0];
    struct tb_model *m = open_model(backend_f32(), s, NULL);
    struct tb_graph *g = graph_of(nll), *h = graph_of(far);
    fails(m, custom_op(s, 1, true), NULL, TB_ENOTFOUND, "there is no custom loss 'mine'");
    fails(m, custom_op(s, 1, true), h, TB_EINVAL,
          "datum 1: graph node far (operator.getitem): index 30 is out of range");
    struct tb_op *op = custom_op(s, 1, true);
    for (int i = 0; i < op->u.forward_backward.data[2].n_inputs; i++)
        if (!strcmp(op->u.forward_backward.data[2].inputs[i].name, "weights"))
            op->u.forward_backward.data[2].inputs[i].name = "other";
    fails(m, op, g, TB_EINVAL, "datum 2: loss_fn_inputs has no weights");
    op = custom_op(s, 1, true);
    op->u.forward_backward.n_config = 0;
    fails(m, op, g, TB_EINVAL, "must be loss_id");
    op = custom_op(s, 1, true);
    struct tb_config_value number = {.key = "loss_id", .number = 1};
    op->u.forward_backward.config = &number;
    fails(m, op, g, TB_EINVAL, "must be loss_id");
    tb_model_free(m);
    tb_graph_destroy(g);
    tb_graph_destroy(h);
}

static int stop(void **state)
{
    (void)state;
    backends_fini();
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_equals_built_in),
        cmocka_unit_test(test_batch_mates),
        cmocka_unit_test(test_failures),
        cmocka_unit_test(test_memory),
    };
    return cmocka_run_group_tests(tests, NULL, stop);
}
