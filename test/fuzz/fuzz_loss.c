/* Custom-loss graphs: checked, then evaluated on small data with their derivatives. */
#include <math.h>
#include <string.h>

#include "fuzz.h"
#include "model/custom/graph.h"
#include "util/mem.h"

enum { N = 5, K = 3 };

static void eval(const struct tb_graph *g, bool two_d)
{
    float values[N * K], d_logprobs[N * K];
    double metrics[64] = {0};
    struct tb_tensor inputs[TB_GRAPH_MAX_INPUTS];
    int n_inputs = tb_graph_n_inputs(g), rank;
    for (int i = 0; i < N * K; i++)
        values[i] = -0.25f * (float)(i + 1);
    for (int i = 1; i < n_inputs; i++) {
        struct tb_tensor *t = &inputs[i - 1];
        *t = (struct tb_tensor){.type = TB_TENSOR_F32, .shape = {N, K}, .data = {.f32 = values}};
        t->name = tb_graph_input(g, i, &rank);
        t->n_dims = rank;
        t->n = rank == 0 ? 1 : rank == 1 ? N : N * K;
    }
    struct tb_datum datum = {.n_tokens = N, .n_inputs = n_inputs - 1, .inputs = inputs};
    struct tb_graph_run run = {
        .datum = &datum, .logprobs = values, .n = N, .k = two_d ? K : 1, .two_d = two_d};
    run.max_bytes = 16 << 20;
    run.max_work = 1 << 20;
    run.metrics = metrics;
    run.d_logprobs = d_logprobs;
    struct tb_error err = {0};
    if (tb_graph_n_metrics(g) > (int)TB_ARRAY_LEN(metrics) ||
        tb_graph_check_datum(g, &datum, two_d, &err))
        return;
    if (tb_graph_eval(g, &run, &err)) {
        TB_BUG_ON(err.code == 0 || err.msg[0] == '\0');
        return;
    }
    TB_BUG_ON(!isfinite(run.loss));
    for (int i = 0; i < run.n * run.k; i++)
        TB_BUG_ON(!isfinite(d_logprobs[i]));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct tb_graph *g = NULL;
    struct tb_error err = {0};
    if (tb_graph_create(&g, (const char *)data, n, &err)) {
        TB_BUG_ON(err.code == 0 || err.msg[0] == '\0');
        return 0;
    }
    eval(g, false);
    eval(g, true);
    tb_graph_destroy(g);
    return 0;
}
