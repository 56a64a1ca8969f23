/*
 * Custom-loss graphs: the oracle's graphs and every spelling of test/data/custom_loss against what
 * PyTorch made of them (loss, gradient, or refusal), hostile graphs, and limits.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <jansson.h>

#include "model/custom/graph.h"
#include "util/mem.h"

#define MAX_N 64

static json_t *load(const char *name)
{
    char path[512];
    json_error_t e;
    snprintf(path, sizeof(path), TB_TEST_DATA "/custom_loss/%s", name);
    json_t *j = json_load_file(path, 0, &e);
    if (!j) fail_msg("%s:%d: %s", path, e.line, e.text);
    return j;
}

static int create(struct tb_graph **g, const json_t *j, struct tb_error *err)
{
    char *text = json_dumps(j, JSON_ENCODE_ANY);
    int rc = tb_graph_create(g, text, strlen(text), err);
    free(text);
    return rc;
}

static int create_text(struct tb_graph **g, const char *text, struct tb_error *err)
{
    return tb_graph_create(g, text, strlen(text), err);
}

/* Numbers of any nesting, flat. */
static int flatten(const json_t *j, float *out, int n)
{
    size_t i;
    json_t *v;
    if (!json_is_array(j)) {
        assert_true(n < MAX_N);
        out[n] = (float)json_number_value(j);
        return n + 1;
    }
    json_array_foreach(j, i, v) n = flatten(v, out, n);
    return n;
}

/* ---- a datum with up to four inputs, and a run over it */

struct fixture {
    float logprobs[MAX_N], d[MAX_N], data[4][MAX_N];
    double metrics[8];
    struct tb_tensor inputs[4];
    struct tb_datum datum;
    struct tb_graph_run run;
};

static void set_logprobs(struct fixture *f, int n, int k, bool two_d)
{
    f->datum.inputs = f->inputs;
    f->run.datum = &f->datum;
    f->run.logprobs = f->logprobs;
    f->run.n = n;
    f->run.k = k;
    f->run.two_d = two_d;
    f->run.metrics = f->metrics;
    f->run.d_logprobs = f->d;
}

static void add_input(struct fixture *f, const char *name, int rank, const int64_t *shape)
{
    struct tb_tensor *t = &f->inputs[f->datum.n_inputs];
    *t = (struct tb_tensor){.name = name, .type = TB_TENSOR_F32, .n_dims = rank, .n = 1};
    for (int d = 0; d < rank; d++) {
        t->shape[d] = shape[d];
        t->n *= shape[d];
    }
    t->data.f32 = f->data[f->datum.n_inputs++];
}

static bool near(double a, double b, double scale, double tolerance)
{
    return fabs(a - b) <= tolerance * fmax(fmax(fabs(a), fabs(b)), scale);
}

static double largest(const json_t *list)
{
    double most = 0;
    size_t i;
    json_t *v;
    json_array_foreach(list, i, v) most = fmax(most, fabs(json_number_value(v)));
    return most;
}

/* ---- the oracle's graphs */

static void check_example(const struct tb_graph *g, const json_t *inputs, const json_t *ex,
                          const char *name)
{
    struct fixture f = {0};
    struct tb_error err = {0};
    size_t i, k;
    json_t *in, *v;
    json_array_foreach(inputs, i, in)
    {
        const char *key = json_string_value(json_object_get(in, "name"));
        const json_t *t = json_object_get(json_object_get(ex, "inputs"), key);
        int64_t shape[2] = {1, 1};
        json_array_foreach(json_object_get(t, "shape"), k, v) shape[k] = json_integer_value(v);
        int rank = (int)json_array_size(json_object_get(t, "shape"));
        if (i == 0) {
            flatten(json_object_get(t, "data"), f.logprobs, 0);
            set_logprobs(&f, (int)shape[0], (int)shape[1], rank == 2);
        } else {
            flatten(json_object_get(t, "data"), f.data[f.datum.n_inputs], 0);
            add_input(&f, key, rank, shape);
        }
    }
    assert_int_equal(tb_graph_check_datum(g, &f.datum, f.run.two_d, &err), 0);
    if (tb_graph_eval(g, &f.run, &err)) fail_msg("%s: %s", name, err.msg);
    assert_true(near(f.run.loss, json_number_value(json_object_get(ex, "loss")), 1e-3, 1e-6));
    const json_t *metrics = json_object_get(ex, "metrics"),
                 *d = json_object_get(ex, "dloss_dlogprobs");
    assert_int_equal(json_object_size(metrics), tb_graph_n_metrics(g));
    for (int m = 0; m < tb_graph_n_metrics(g); m++) {
        double want = json_number_value(json_object_get(metrics, tb_graph_metric(g, m, NULL)));
        assert_true(near(f.metrics[m], want, 1e-3, 1e-6));
    }
    json_array_foreach(d, k, v)
    {
        if (!near((double)f.d[k], json_number_value(v), largest(d) * 1e-2, 2e-6))
            fail_msg("%s: derivative %zu is %g, not %g", name, k, (double)f.d[k],
                     json_number_value(v));
    }
}

static void test_fixture_graphs(void **state)
{
    json_t *all = load("graphs.json"), *c, *ex;
    size_t i, k;
    (void)state;
    assert_int_equal(json_array_size(all), 3);
    json_array_foreach(all, i, c)
    {
        struct tb_graph *g;
        struct tb_error err = {0};
        const json_t *inputs = json_object_get(c, "inputs");
        if (create(&g, c, &err)) fail_msg("%s", err.msg);
        assert_int_equal(tb_graph_n_inputs(g), json_array_size(inputs));
        for (int j = 0; j < tb_graph_n_inputs(g); j++) {
            int rank;
            const json_t *in = json_array_get(inputs, (size_t)j);
            assert_string_equal(tb_graph_input(g, j, &rank),
                                json_string_value(json_object_get(in, "name")));
            assert_int_equal(rank, json_integer_value(json_object_get(in, "rank")));
        }
        json_array_foreach(json_object_get(c, "examples"), k, ex)
            check_example(g, inputs, ex, json_string_value(json_object_get(c, "name")));
        tb_graph_destroy(g);
    }
    json_decref(all);
}

/* ---- every spelling */

static void add_node(json_t *nodes, bool method, const char *name, const char *target, json_t *args)
{
    json_array_append_new(nodes, json_pack("{s:s, s:s, s:s, s:o}", "op",
                                           method ? "call_method" : "call_function", "name", name,
                                           "target", target, "args", args));
}

static json_t *ref(const char *name)
{
    return json_pack("{s:s}", "ref", name);
}

/* What make.py does with the value: an odd weight for each element, so that none can hide. */
static void add_loss(json_t *nodes, const char *mode, const char *value)
{
    add_node(nodes, true, "w_all", "sum", json_pack("[o]", ref("logprobs")));
    add_node(nodes, false, "w_half", "operator.mul", json_pack("[f, o]", 0.5, ref("w_all")));
    if (!strcmp(mode, "tensor")) {
        add_node(nodes, true, "w_to", "to",
                 json_pack("[o, {s:s}]", ref(value), "dtype", "float32"));
        add_node(nodes, false, "w_nan", "torch.nan_to_num",
                 json_pack("[o, f, f, f]", ref("w_to"), 0.25, 3.0, -5.0));
        add_node(nodes, true, "w_flat", "flatten", json_pack("[o]", ref("w_nan")));
        add_node(nodes, false, "w_ones", "torch.ones_like", json_pack("[o]", ref("w_flat")));
        add_node(nodes, true, "w_count", "cumsum", json_pack("[o, i]", ref("w_ones"), 0));
        add_node(nodes, false, "w_mul", "operator.mul", json_pack("[f, o]", 0.7, ref("w_count")));
        add_node(nodes, false, "w_sin", "torch.sin", json_pack("[o]", ref("w_mul")));
        add_node(nodes, false, "w_each", "operator.mul",
                 json_pack("[o, o]", ref("w_flat"), ref("w_sin")));
    } else if (!strcmp(mode, "number")) {
        add_node(nodes, false, "w_each", "operator.mul",
                 json_pack("[o, o]", ref("logprobs"), ref(value)));
    }
    if (strcmp(mode, "unused")) {
        add_node(nodes, true, "w_sum", "sum", json_pack("[o]", ref("w_each")));
        add_node(nodes, false, "w_loss", "operator.add",
                 json_pack("[o, o]", ref("w_sum"), ref("w_half")));
    }
}

static json_t *placeholder(const char *name)
{
    return json_pack("{s:s, s:s, s:s, s:[]}", "op", "placeholder", "name", name, "target", name,
                     "args");
}

static json_t *graph_of(const json_t *entry, int rank)
{
    json_t *nodes = json_pack("[o, o]", placeholder("logprobs"), placeholder("y"));
    const char *mode = json_string_value(json_object_get(entry, "mode"));
    json_array_extend(nodes, json_object_get(entry, "nodes"));
    add_loss(nodes, mode, json_string_value(json_object_get(entry, "value")));
    json_array_append_new(nodes,
                          json_pack("{s:s, s:s, s:s, s:[{s:[o, {s:{}}]}]}", "op", "output", "name",
                                    "output", "target", "output", "args", "tuple",
                                    ref(strcmp(mode, "unused") ? "w_loss" : "w_half"), "dict"));
    return json_pack("{s:[{s:s, s:i}, {s:s, s:i}], s:{s:i, s:o}}", "inputs", "name", "logprobs",
                     "rank", rank, "name", "y", "rank", 1, "graph", "format", 1, "nodes", nodes);
}

/* Evaluates the entry on a case's inputs. */
static int run_case(const json_t *entry, const json_t *inputs, struct fixture *f,
                    struct tb_error *err)
{
    const json_t *x = json_object_get(inputs, "x"), *y = json_object_get(inputs, "y");
    int rank = json_is_array(json_array_get(x, 0)) ? 2 : 1;
    int64_t n = (int64_t)json_array_size(y);
    struct tb_graph *g;
    json_t *text = graph_of(entry, rank);
    memset(f, 0, sizeof(*f));
    int rc = create(&g, text, err);
    json_decref(text);
    if (rc) return rc;
    int all = flatten(x, f->logprobs, 0);
    flatten(y, f->data[0], 0);
    set_logprobs(f, (int)json_array_size(x), all / (int)json_array_size(x), rank == 2);
    add_input(f, "y", 1, &n);
    rc = tb_graph_eval(g, &f->run, err);
    tb_graph_destroy(g);
    return rc;
}

/* Prints and counts a difference from PyTorch. */
static int differs(const char *expr, const char *name, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

static int differs(const char *expr, const char *name, const char *fmt, ...)
{
    va_list ap;
    print_error("%s, %s: ", expr, name);
    va_start(ap, fmt);
    vprint_error(fmt, ap);
    va_end(ap);
    print_error("\n");
    return 1;
}

static int check_case(const json_t *entry, const char *name, const json_t *inputs)
{
    const char *expr = json_string_value(json_object_get(entry, "expr"));
    const json_t *want = json_object_get(json_object_get(entry, "results"), name);
    const json_t *loss = json_object_get(want, "loss"), *grad = json_object_get(want, "grad");
    struct fixture f;
    struct tb_error err = {0};
    size_t i;
    json_t *v;
    int rc = run_case(entry, inputs, &f, &err);
    if (!grad) /* an error there, or a loss or a derivative that is no number */
        return rc ? 0 : differs(expr, name, "%g where PyTorch has none", f.run.loss);
    if (rc) return differs(expr, name, "%s", err.msg);
    if (!near(f.run.loss, json_number_value(loss), 1e-2, 2e-6))
        return differs(expr, name, "loss %.9g, not %.9g", f.run.loss, json_number_value(loss));
    json_array_foreach(grad, i, v)
    {
        if (!near((double)f.d[i], json_number_value(v), largest(grad) * 1e-1, 3e-6))
            return differs(expr, name, "derivative %zu is %.9g, not %.9g", i, (double)f.d[i],
                           json_number_value(v));
    }
    return 0;
}

static void check_all(const char *key, size_t at_least)
{
    json_t *all = load("ops.json"), *entry, *inputs;
    const char *name;
    int bad = 0;
    size_t i, n = json_array_size(json_object_get(all, key));
    assert_true(n >= at_least);
    json_array_foreach(json_object_get(all, key), i, entry)
    {
        json_object_foreach(json_object_get(all, "cases"), name, inputs) bad +=
            check_case(entry, name, inputs);
    }
    json_decref(all);
    assert_int_equal(bad, 0);
}

static void test_common_spellings(void **state)
{
    (void)state;
    check_all("common", 169);
}

static void test_more_spellings(void **state)
{
    (void)state;
    check_all("more", 400);
}

/* What is not served says so by node and operation, whatever the inputs. */
static void test_refused_spellings(void **state)
{
    json_t *all = load("ops.json"), *entry;
    size_t i;
    (void)state;
    json_array_foreach(json_object_get(all, "refused"), i, entry)
    {
        struct fixture f;
        struct tb_error err = {0};
        const char *expr = json_string_value(json_object_get(entry, "expr"));
        const json_t *inputs = json_object_get(json_object_get(all, "cases"), "positive");
        int rc = run_case(entry, inputs, &f, &err);
        if (rc != TB_EUNSUPPORTED && rc != TB_EINVAL) fail_msg("%s: %d %s", expr, rc, err.msg);
        if (!strstr(err.msg, "graph node ")) fail_msg("%s: %s", expr, err.msg);
    }
    json_decref(all);
}

/* ---- what the fixtures do not say */

#define LOGPROBS                                                                                   \
    "{\"op\":\"placeholder\",\"name\":\"logprobs\",\"target\":\"logprobs\",\"args\":[]}"
#define INPUTS "\"inputs\":[{\"name\":\"logprobs\",\"rank\":1}]"
#define OUTPUT(loss)                                                                                      \
    "{\"op\":\"output\",\"name\":\"output\",\"target\":\"output\",\"args\":[{\"tuple\":[{\"ref\":\"" loss \
    "\"},{\"dict\":{}}]}]}"
#define CALL(kind, name, target, args)                                                             \
    "{\"op\":\"call_" kind "\",\"name\":\"" name "\",\"target\":\"" target "\",\"args\":[" args "]}"
#define METHOD(name, target, args) CALL("method", name, target, args)
#define FUNC(name, target, args)   CALL("function", name, target, args)
#define REF(name)                  "{\"ref\":\"" name "\"}"
#define GRAPH(nodes)               "{" INPUTS ",\"graph\":{\"format\":1,\"nodes\":[" LOGPROBS "," nodes "]}}"
#define SUM                        METHOD("s", "sum", REF("logprobs"))

/* Evaluates a graph over logprobs only. */
static int eval_text(const char *text, const float *logprobs, int n, struct fixture *f,
                     struct tb_error *err)
{
    struct tb_graph *g;
    size_t bytes = f->run.max_bytes;
    uint64_t work = f->run.max_work;
    if (create_text(&g, text, err)) fail_msg("%s", err->msg);
    memset(f, 0, sizeof(*f));
    memcpy(f->logprobs, logprobs, (size_t)n * sizeof(*logprobs));
    set_logprobs(f, n, 1, false);
    f->run.max_bytes = bytes;
    f->run.max_work = work;
    int rc = tb_graph_eval(g, &f->run, err);
    tb_graph_destroy(g);
    return rc;
}

/* On its bounds clamp passes the derivative on. */
static void test_clamp_bounds(void **state)
{
    static const char text[] = GRAPH(METHOD("c", "clamp", REF("logprobs") ",-2,-1") "," METHOD(
        "s", "sum", REF("c")) "," OUTPUT("s"));
    const float x[] = {-2.5f, -2, -1.5f, -1, -0.5f}, want[] = {0, 1, 1, 1, 0};
    struct fixture f = {0};
    struct tb_error err = {0};
    (void)state;
    assert_int_equal(eval_text(text, x, 5, &f, &err), 0);
    assert_memory_equal(f.d, want, sizeof(want));
    assert_true(f.run.loss == -7.5);
}

static void test_input_kinds(void **state)
{
    static const char text[] =
        "{\"inputs\":[{\"name\":\"logprobs\",\"rank\":2},{\"name\":\"ids\",\"rank\":1},"
        "{\"name\":\"beta\",\"rank\":0}],\"graph\":{\"format\":1,\"nodes\":[" LOGPROBS ","
        "{\"op\":\"placeholder\",\"name\":\"i\",\"target\":\"ids\",\"args\":[]},"
        "{\"op\":\"placeholder\",\"name\":\"b\",\"target\":\"beta\",\"args\":[]}," FUNC("third", "operator.truediv", REF("i") ",3") "," FUNC("half", "operator.floordiv", REF("i") ",2") "," METHOD(
            "rows", "sum",
            REF("logprobs") ",-1") "," FUNC("m", "operator.mul",
                                            REF("rows") "," REF(
                                                "third")) "," METHOD("s", "sum",
                                                                     REF("m")) "," FUNC("l",
                                                                                        "operator.mul",
                                                                                        REF("s") "," REF(
                                                                                            "b")) "," METHOD("halves",
                                                                                                             "sum",
                                                                                                             REF("half")) ","
                                                                                                                          "{\"op\":\"output\",\"name\":\"output\",\"target\":\"output\",\"args\":[[" REF("l") ",{\"dict\":{\"custom/a.b-c/d:sum\":" REF(
                                                                                                                              "halves") ",\"custom/s:mean\":" REF("s") "}}]]}]}}";
    static const int64_t ids[] = {3, 5};
    struct fixture f = {.logprobs = {-1, -2, -3, -4}};
    struct tb_error err = {0};
    struct tb_graph *g;
    const int64_t two = 2;
    bool mean;
    (void)state;
    if (create_text(&g, text, &err)) fail_msg("%s", err.msg);
    set_logprobs(&f, 2, 2, true);
    add_input(&f, "ids", 1, &two);
    f.inputs[0].type = TB_TENSOR_I64;
    f.inputs[0].data.i64 = ids;
    assert_int_equal(tb_graph_check_datum(g, &f.datum, true, &err), TB_EINVAL);
    assert_non_null(strstr(err.msg, "no beta"));
    add_input(&f, "beta", 0, NULL);
    f.data[1][0] = 0.5f;
    assert_int_equal(tb_graph_check_datum(g, &f.datum, true, &err), 0);
    assert_int_equal(tb_graph_check_datum(g, &f.datum, false, &err), TB_EINVAL);
    assert_non_null(strstr(err.msg, "rank 2"));
    if (tb_graph_eval(g, &f.run, &err)) fail_msg("%s", err.msg);
    assert_true(near(f.run.loss, 0.5 * (-3 * 1 - 7 * 5 / 3.0), 0, 1e-7));
    assert_true(near((double)f.d[3], 5 / 6.0, 0, 1e-7));
    assert_int_equal(tb_graph_n_metrics(g), 2);
    assert_string_equal(tb_graph_metric(g, 0, &mean), "custom/a.b-c/d:sum");
    assert_false(mean);
    assert_true(f.metrics[0] == 1 + 2); /* integers stay integers */
    assert_string_equal(tb_graph_metric(g, 1, &mean), "custom/s:mean");
    assert_true(mean);
    f.inputs[0].n_dims = 2;
    assert_int_equal(tb_graph_check_datum(g, &f.datum, true, &err), TB_EINVAL);
    assert_non_null(strstr(err.msg, "ids has 2 dimensions"));
    tb_graph_destroy(g);
}

/* Failures of an evaluation name the node. */
static void test_failures(void **state)
{
    static const struct {
        const char *text, *says;
        int code;
    } cases[] = {
        {GRAPH(FUNC("m", "operator.mul", REF("logprobs") ",2") "," OUTPUT("m")),
         "m (operator.mul): the loss must be a scalar, not of shape [2]", TB_EINVAL},
        {GRAPH(METHOD("a", "argmax", REF("logprobs")) "," OUTPUT("a")), "a tensor of floats",
         TB_EINVAL},
        {GRAPH(METHOD("d", "detach", REF("logprobs")) "," METHOD("s", "sum",
                                                                 REF("d")) "," OUTPUT("s")),
         "does not depend on logprobs", TB_EINVAL},
        {GRAPH(
             METHOD("n", "log", REF("logprobs")) "," METHOD("s", "sum", REF("n")) "," OUTPUT("s")),
         "graph node n (log) is the first", TB_ENONFINITE},
        {GRAPH(FUNC("z", "operator.mul", REF("logprobs") ",0") "," METHOD(
             "q", "sqrt", REF("z")) "," METHOD("s", "sum", REF("q")) "," OUTPUT("s")),
         "derivative of the loss is not finite at position 0", TB_ENONFINITE},
        {GRAPH(FUNC("i", "operator.getitem", REF("logprobs") ",7") "," OUTPUT("i")),
         "i (operator.getitem): index 7 is out of range", TB_EINVAL},
        {GRAPH(FUNC(
             "i", "operator.getitem",
             REF("logprobs") ",{\"slice\":[null,null,-1]}") "," METHOD("s", "sum",
                                                                       REF("i")) "," OUTPUT("s")),
         "must be positive", TB_EINVAL},
        {GRAPH(SUM "," FUNC("t", "operator.add", REF("s") ",\"x\"") "," OUTPUT("t")),
         "t (operator.add): other must be a tensor or a number, not a string", TB_EINVAL},
        {GRAPH(
             METHOD("n", "numel", REF("logprobs")) "," FUNC("z", "operator.sub", REF("n") ",2") "," FUNC(
                 "d", "operator.truediv",
                 REF("n") "," REF("z")) "," FUNC("m", "operator.mul",
                                                 REF("logprobs") "," REF(
                                                     "d")) "," METHOD("s", "sum",
                                                                      REF("m")) "," OUTPUT("s")),
         "d (operator.truediv)", TB_EINVAL},
        {GRAPH(METHOD("n", "numel", REF("logprobs")) "," FUNC(
             "p", "operator.pow",
             REF("n") ",9999") "," FUNC("m", "operator.mul",
                                        REF("logprobs") "," REF(
                                            "p")) "," METHOD("s", "sum", REF("m")) "," OUTPUT("s")),
         "beyond 64 bits", TB_ETOOBIG},
        {GRAPH(METHOD("f", "floor_divide",
                      REF("logprobs") ",2") "," METHOD("s", "sum", REF("f")) "," OUTPUT("s")),
         "f (floor_divide): has no derivative", TB_EINVAL},
        {GRAPH(METHOD("r", "reshape",
                      REF("logprobs") ",-1,0") "," METHOD("s", "sum", REF("r")) "," OUTPUT("s")),
         "ambiguous", TB_EINVAL},
    };
    const float x[] = {-1, -2};
    (void)state;
    for (size_t i = 0; i < TB_ARRAY_LEN(cases); i++) {
        struct fixture f = {0};
        struct tb_error err = {0};
        int rc = eval_text(cases[i].text, x, 2, &f, &err);
        if (rc != cases[i].code || !strstr(err.msg, cases[i].says))
            fail_msg("%s: %d %s", cases[i].says, rc, err.msg);
        assert_int_equal(err.code, rc);
    }
}

/* ---- hostile graphs */

static void test_malformed(void **state)
{
    static const struct {
        const char *text, *says;
        int code;
    } cases[] = {
        {"", "", TB_EPARSE},
        {"[]", "an object", TB_EINVAL},
        {"{\"inputs\":[]}", "1 to 16", TB_EINVAL},
        {"{\"inputs\":[1]}", "must be an object", TB_EINVAL},
        {"{\"inputs\":[{\"name\":\"logprobs\",\"rank\":0}]}", "rank 1 or 2", TB_EINVAL},
        {"{\"inputs\":[{\"name\":\"logprobs\",\"rank\":3}]}", "rank", TB_EINVAL},
        {"{\"inputs\":[{\"name\":\"y\",\"rank\":1}]}", "logprobs", TB_EINVAL},
        {"{\"inputs\":[{\"name\":\"logprobs\",\"rank\":1},{\"name\":\"A\",\"rank\":1}]}",
         "lowercase", TB_EINVAL},
        {"{\"inputs\":[{\"name\":\"logprobs\",\"rank\":1},{\"name\":\"a\",\"rank\":1},"
         "{\"name\":\"a\",\"rank\":1}]}",
         "a is there twice", TB_EINVAL},
        {"{" INPUTS ",\"graph\":{\"format\":2,\"nodes\":[]}}", "format 2", TB_EUNSUPPORTED},
        {"{" INPUTS ",\"graph\":{\"format\":1,\"nodes\":[]}}", "must be the output", TB_EINVAL},
        {GRAPH(SUM), "must be the output", TB_EINVAL},
        {GRAPH(SUM "," OUTPUT("s") "," METHOD("t", "sum", REF("s"))), "after the output",
         TB_EINVAL},
        {GRAPH(SUM "," OUTPUT("nowhere")), "refers to nowhere", TB_EINVAL},
        {GRAPH(FUNC("a", "torch.exp", REF("a")) "," OUTPUT("a")), "node a (torch.exp): refers to a",
         TB_EINVAL},
        {GRAPH(
             FUNC("a", "torch.exp", REF("b")) "," FUNC("b", "torch.exp", REF("a")) "," OUTPUT("b")),
         "refers to b", TB_EINVAL},
        {GRAPH(SUM "," SUM "," OUTPUT("s")), "another node of this name", TB_EINVAL},
        {GRAPH(LOGPROBS "," OUTPUT("logprobs")), "another node of this name", TB_EINVAL},
        {GRAPH(FUNC("bad", "os.system", "\"ls\"") "," OUTPUT("bad")),
         "graph node bad (os.system): this server has no such function", TB_EUNSUPPORTED},
        {GRAPH(METHOD("bad", "backward", REF("logprobs")) "," OUTPUT("bad")),
         "graph node bad (backward): this server has no such method", TB_EUNSUPPORTED},
        {GRAPH(FUNC("bad", ".sum", REF("logprobs")) "," OUTPUT("bad")), "no such function",
         TB_EUNSUPPORTED},
        {GRAPH(FUNC("bad", "torch.exp torch.log", REF("logprobs")) "," OUTPUT("bad")),
         "no such function", TB_EUNSUPPORTED},
        {GRAPH(CALL("module", "bad", "l1", REF("logprobs")) "," OUTPUT("bad")),
         "op call_module is not allowed", TB_EUNSUPPORTED},
        {GRAPH("{\"op\":\"get_attr\",\"name\":\"c\",\"target\":\"c\",\"args\":[]}," OUTPUT("c")),
         "op get_attr is not allowed", TB_EUNSUPPORTED},
        {GRAPH("{\"op\":\"placeholder\",\"name\":\"z\",\"target\":\"z\",\"args\":[]}"),
         "not among the inputs", TB_EINVAL},
        {GRAPH("{\"op\":\"call_method\",\"name\":\"a b\",\"target\":\"sum\",\"args\":[]}"),
         "name must be a word", TB_EINVAL},
        {GRAPH(FUNC("a", "torch.exp", "")), "lacks its argument input", TB_EINVAL},
        {GRAPH(FUNC("a", "torch.exp", REF("logprobs") ",null,2")), "at most 2 arguments",
         TB_EINVAL},
        {GRAPH("{\"op\":\"call_function\",\"name\":\"a\",\"target\":\"torch.exp\",\"args\":[" REF(
             "logprobs") "],\"kwargs\":{\"input\":" REF("logprobs") "}}"),
         "input is given twice", TB_EINVAL},
        {GRAPH("{\"op\":\"call_function\",\"name\":\"a\",\"target\":\"torch.exp\",\"args\":[" REF(
             "logprobs") "],\"kwargs\":{\"out\":" REF("logprobs") "}}"),
         "argument out is not supported", TB_EUNSUPPORTED},
        {GRAPH("{\"op\":\"call_function\",\"name\":\"a\",\"target\":\"torch.exp\",\"args\":[" REF(
             "logprobs") "],\"kwargs\":{\"evil\":1}}"),
         "no argument evil", TB_EUNSUPPORTED},
        {GRAPH(FUNC("a", "torch.exp", "{\"code\":\"x\"}")), "unknown argument encoding code",
         TB_EINVAL},
        {GRAPH(FUNC("a", "torch.exp", "{\"ref\":1}")), "ref must be a string", TB_EINVAL},
        {GRAPH(FUNC("a", "torch.exp", "{}")), "exactly one key", TB_EINVAL},
        {GRAPH(FUNC("a", "torch.exp", "{\"float\":\"1\"}")), "float must be", TB_EINVAL},
        {GRAPH(METHOD("a", "to", REF("logprobs") ",{\"dtype\":\"complex64\"}")),
         "dtype complex64 is not supported", TB_EUNSUPPORTED},
        {GRAPH(FUNC("a", "operator.getitem", REF("logprobs") ",{\"slice\":[1]}")), "three parts",
         TB_EINVAL},
        {GRAPH(FUNC("a", "torch.exp", "[[[[[[[[[[1]]]]]]]]]]")), "nested too deep", TB_EINVAL},
        {GRAPH(SUM
               ",{\"op\":\"output\",\"name\":\"o\",\"target\":\"output\",\"args\":[" REF("s") "]}"),
         "a tuple of the loss", TB_EINVAL},
        {GRAPH(
             SUM
             ",{\"op\":\"output\",\"name\":\"o\",\"target\":\"output\",\"args\":[{\"tuple\":[" REF(
                 "s") ",{\"dict\":{\"loss:sum\":" REF("s") "}}]}]}"),
         "metric loss:sum must be named", TB_EINVAL},
        {GRAPH(
             SUM
             ",{\"op\":\"output\",\"name\":\"o\",\"target\":\"output\",\"args\":[{\"tuple\":[" REF(
                 "s") ",{\"dict\":{\"custom/a:sum\":null}}]}]}"),
         "metric", TB_EINVAL},
        {GRAPH(
             SUM
             ",{\"op\":\"output\",\"name\":\"o\",\"target\":\"output\",\"args\":[{\"tuple\":[" REF(
                 "s") ",{\"dict\":{\"custom/a:sum\":1}}]}]}"),
         "custom/a:sum must be a node", TB_EINVAL},
        {GRAPH(FUNC("o", "torch.ones", "2") "," OUTPUT("o")), "does not depend on logprobs",
         TB_EINVAL},
    };
    (void)state;
    for (size_t i = 0; i < TB_ARRAY_LEN(cases); i++) {
        struct tb_graph *g = NULL;
        struct tb_error err = {0};
        int rc = create_text(&g, cases[i].text, &err);
        if (rc != cases[i].code || !strstr(err.msg, cases[i].says))
            fail_msg("%zu, %s: %d %s", i, cases[i].says, rc, err.msg);
        assert_null(g);
    }
    tb_graph_destroy(NULL);
}

/* A graph of n calls, each of the one before; the first argument of the last is the loss. */
static char *chain(int n, const char *kind, const char *target, const char *args)
{
    size_t cap = 1024 + (size_t)n * 256, at;
    char *text = malloc(cap);
    at = (size_t)snprintf(text, cap, "{%s,\"graph\":{\"format\":1,\"nodes\":[%s", INPUTS, LOGPROBS);
    for (int i = 0; i < n; i++) {
        char from[32];
        snprintf(from, sizeof(from), i ? "n%d" : "logprobs", i - 1);
        at += (size_t)snprintf(text + at, cap - at,
                               ",{\"op\":\"call_%s\",\"name\":\"n%d\",\"target\":\"%s\",\"args\":[",
                               kind, i, target);
        for (const char *p = args; *p; p++) {
            if (*p == '$')
                at += (size_t)snprintf(text + at, cap - at, "{\"ref\":\"%s\"}", from);
            else
                text[at++] = *p;
        }
        at += (size_t)snprintf(text + at, cap - at, "]}");
    }
    snprintf(
        text + at, cap - at,
        ",{\"op\":\"call_method\",\"name\":\"s\",\"target\":\"sum\",\"args\":[{\"ref\":\"n%d\"}]}," OUTPUT(
            "s") "]}}",
        n - 1);
    return text;
}

/* Doublings and huge shapes end at the limits, before the machine does. */
static void test_bombs(void **state)
{
    static const struct {
        int n;
        const char *kind, *target, *args;
        int code;
    } cases[] = {
        {60, "function", "torch.cat", "[$,$]", TB_ETOOBIG},
        {60, "function", "torch.stack", "[$,$]", TB_ETOOBIG},
        {40, "method", "repeat", "$,1000", TB_ETOOBIG},
        {1, "method", "expand", "$,9000000000,2", TB_ETOOBIG},
        {1, "method", "expand", "$,4611686018427387904,4611686018427387904,2", TB_ETOOBIG},
        {1, "method", "repeat", "$,9223372036854775807,9223372036854775807", TB_ETOOBIG},
        {1, "method", "new_zeros", "$,1000000,1000000", TB_ETOOBIG},
        {1, "function", "torch.nn.functional.pad", "$,[9223372036854775807,9223372036854775807]",
         TB_EINVAL},
        {1, "function", "torch.nn.functional.pad", "$,[900000000000,0]", TB_ETOOBIG},
        {20, "method", "unsqueeze", "$,0", TB_ETOOBIG},
        {1, "method", "view", "$,1,1,1,1,1,1,1,1,2", TB_EINVAL},
        {1, "method", "view", "$,9223372036854775807,9223372036854775807,-1", TB_EINVAL},
        {1, "method", "roll", "$,9223372036854775807", 0},
        {1, "method", "roll", "$,-9223372036854775807", 0},
        {1, "function", "operator.getitem", "$,9223372036854775807", TB_EINVAL},
        {1, "function", "operator.getitem",
         "$,{\"slice\":[-9223372036854775807,9223372036854775807,9223372036854775807]}", 0},
        {1, "method", "topk", "$,9223372036854775807", TB_EINVAL},
        {1, "method", "narrow", "$,0,9223372036854775807,9223372036854775807", TB_EINVAL},
        {1, "method", "split", "$,9223372036854775807", TB_EINVAL},
        {1, "method", "sum", "$,9223372036854775807", TB_EINVAL},
        {1, "method", "softmax", "$,-9223372036854775807", TB_EINVAL},
        {1, "function", "torch.functional.einsum", "\"i,j,k,l,m,n,o,p,q->\",$", TB_EINVAL},
        {1, "function", "torch.functional.einsum", "\"i,j,k,l,m,n,o,p->ijklmnop\",$,$,$,$,$,$,$,$",
         0},
        {1990, "function", "operator.mul", "$,1.0", 0},
        {1990, "function", "operator.add", "$,$", TB_ENONFINITE}, /* 2 to the 1990th */
    };
    const float x[] = {-1, -2};
    (void)state;
    for (size_t i = 0; i < TB_ARRAY_LEN(cases); i++) {
        char *text = chain(cases[i].n, cases[i].kind, cases[i].target, cases[i].args);
        struct fixture f = {.run = {.max_bytes = 64 << 20, .max_work = 1 << 26}};
        struct tb_error err = {0};
        int rc = eval_text(text, x, 2, &f, &err);
        free(text);
        if (rc != cases[i].code)
            fail_msg("%s(%s): %d %s", cases[i].target, cases[i].args, rc, err.msg);
    }
}

static void test_limits(void **state)
{
    const float x[] = {-1, -2};
    struct tb_graph *g;
    struct tb_error err = {0};
    (void)state;
    char *text = chain(TB_GRAPH_MAX_NODES, "function", "operator.mul", "$,1.0");
    assert_int_equal(create_text(&g, text, &err), TB_ETOOBIG);
    assert_non_null(strstr(err.msg, "nodes"));
    free(text);
    /* a list of more values than a graph may have */
    size_t cap = 400000, at;
    text = malloc(cap);
    at =
        (size_t)snprintf(text, cap, "{%s,\"graph\":{\"format\":1,\"nodes\":[%s,", INPUTS, LOGPROBS);
    at += (size_t)snprintf(text + at, cap - at,
                           "{\"op\":\"call_function\",\"name\":\"c\","
                           "\"target\":\"torch.cat\",\"args\":[[1");
    for (int i = 0; i < TB_GRAPH_MAX_ARGS; i++)
        at += (size_t)snprintf(text + at, cap - at, ",1");
    snprintf(text + at, cap - at, "]]}]}}");
    assert_int_equal(create_text(&g, text, &err), TB_ETOOBIG);
    free(text);
    /* too little memory, too little work */
    static const char exp_sum[] = GRAPH(
        FUNC("e", "torch.exp", REF("logprobs")) "," METHOD("s", "sum", REF("e")) "," OUTPUT("s"));
    struct fixture f = {.run.max_bytes = 256};
    assert_int_equal(eval_text(exp_sum, x, 2, &f, &err), TB_ETOOBIG);
    f = (struct fixture){.run.max_work = 20};
    assert_int_equal(eval_text(exp_sum, x, 2, &f, &err), TB_ETOOBIG);
    assert_non_null(strstr(err.msg, "steps"));
    f = (struct fixture){0};
    assert_int_equal(eval_text(exp_sum, x, 2, &f, &err), 0);
    double loss = f.run.loss;
    /* without a derivative the loss is the same */
    if (create_text(&g, exp_sum, &err)) fail_msg("%s", err.msg);
    f.run.d_logprobs = NULL;
    assert_int_equal(tb_graph_eval(g, &f.run, &err), 0);
    assert_true(f.run.loss == loss);
    tb_graph_destroy(g);
}

/* Memory that runs out anywhere fails the evaluation and leaks nothing. */
static void test_no_memory(void **state)
{
    json_t *all = load("graphs.json");
    struct tb_graph *g;
    struct tb_error err = {0};
    struct fixture f = {.logprobs = {-1, -2, -3}};
    const int64_t n = 3;
    int failures = 0;
    (void)state;
    if (create(&g, json_array_get(all, 0), &err)) fail_msg("%s", err.msg);
    json_decref(all);
    set_logprobs(&f, 3, 1, false);
    add_input(&f, "old_logprobs", 1, &n);
    add_input(&f, "advantages", 1, &n);
    add_input(&f, "mask", 1, &n);
    for (long k = 1; k < 1000; k++) {
        tb_mem_fail_after(k);
        int rc = tb_graph_eval(g, &f.run, &err);
        tb_mem_fail_after(0);
        if (rc == 0) break;
        assert_int_equal(rc, TB_ENOMEM);
        failures++;
    }
    assert_true(failures > 0 && failures < 999);
    tb_graph_destroy(g);
}

/* Texts with bytes changed or cut: refused or evaluated, never more. */
static void test_mutations(void **state)
{
    json_t *all = load("graphs.json");
    uint64_t seed = 12345;
    int created = 0;
    (void)state;
    for (int i = 0; i < 3000; i++) {
        char *text = json_dumps(json_array_get(all, (size_t)i % 3), 0);
        size_t n = strlen(text);
        struct tb_graph *g = NULL;
        struct tb_error err = {0};
        for (int k = 0; k <= i % 3; k++) {
            seed = seed * 6364136223846793005ull + 1442695040888963407ull;
            size_t at = (size_t)(seed >> 33) % n;
            text[at] = "0123456789abcdefmnrst\"{}[],:-.einul"[(seed >> 20) % 35];
        }
        if (tb_graph_create(&g, text, i % 7 ? n : n / 2, &err) == 0) {
            struct fixture f = {.logprobs = {-1, -2, -3, -4}};
            const int64_t shape[2] = {2, 2};
            int rank;
            created++;
            tb_graph_input(g, 0, &rank);
            set_logprobs(&f, 2, rank, rank == 2);
            for (int j = 1; j < tb_graph_n_inputs(g) && j <= 4; j++) {
                const char *name = tb_graph_input(g, j, &rank);
                add_input(&f, name, rank, shape);
            }
            if (tb_graph_n_metrics(g) <= 8 && tb_graph_n_inputs(g) <= 5)
                tb_graph_eval(g, &f.run, &err);
        }
        tb_graph_destroy(g);
        free(text);
    }
    json_decref(all);
    assert_true(created > 100);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_fixture_graphs), cmocka_unit_test(test_common_spellings),
        cmocka_unit_test(test_more_spellings), cmocka_unit_test(test_refused_spellings),
        cmocka_unit_test(test_clamp_bounds),   cmocka_unit_test(test_input_kinds),
        cmocka_unit_test(test_failures),       cmocka_unit_test(test_malformed),
        cmocka_unit_test(test_bombs),          cmocka_unit_test(test_limits),
        cmocka_unit_test(test_no_memory),      cmocka_unit_test(test_mutations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
