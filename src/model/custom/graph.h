/*
 * Custom losses: a torch.fx graph that a client sends as data, checked once and then evaluated for
 * each datum with its derivative by logprobs. No code of the client runs: a node names one of the
 * operations of the tables in this folder, or the graph is refused.
 *
 * Float tensors are float32 (float64 where the graph asks for it) with PyTorch's semantics: each
 * operation computes in double and rounds its result once. A datum's numbers depend on nothing but
 * the datum.
 *
 * Owner: the caller. Thread: a graph is immutable after tb_graph_create and may be evaluated by
 * several threads at once.
 */
#ifndef TB_MODEL_CUSTOM_GRAPH_H
#define TB_MODEL_CUSTOM_GRAPH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "op/op.h"
#include "util/error.h"

#define TB_GRAPH_MAX_NODES  2000
#define TB_GRAPH_MAX_INPUTS 16
#define TB_GRAPH_MAX_ARGS   (64 * 1024) /* values in all arguments of a graph */
#define TB_GRAPH_MAX_NAME   128
#define TB_GRAPH_MAX_BYTES  (512ull << 20) /* memory of one evaluation */
#define TB_GRAPH_MAX_WORK   (1ull << 30)   /* elementary steps of the largest evaluation */

struct tb_graph;

/* text: a JSON object with `inputs` and `graph` as create_custom_loss has them; other members are
 * ignored. TB_EPARSE for what is not JSON, TB_EINVAL or TB_EUNSUPPORTED naming the node. */
int tb_graph_create(struct tb_graph **out, const char *text, size_t n, struct tb_error *err);
void tb_graph_destroy(struct tb_graph *g); /* accepts NULL */

int tb_graph_n_inputs(const struct tb_graph *g);
const char *tb_graph_input(const struct tb_graph *g, int i, int *rank); /* 0 is logprobs */
int tb_graph_n_metrics(const struct tb_graph *g);
/* The whole key, "custom/kl:mean"; *is_mean tells how it combines over data. */
const char *tb_graph_metric(const struct tb_graph *g, int i, bool *is_mean);

/* Checks that the datum has every input but logprobs at its rank, and that the logprobs of its
 * targets ([n], or [n, k] when two_d) have theirs. */
int tb_graph_check_datum(const struct tb_graph *g, const struct tb_datum *d, bool two_d,
                         struct tb_error *err);

struct tb_graph_run {
    const struct tb_datum *datum;
    const float *logprobs; /* [n], or [n, k] when two_d */
    int n, k;
    bool two_d;
    struct tb_backend *be; /* whose limit the memory counts against; NULL: nobody's */
    size_t max_bytes;      /* 0: TB_GRAPH_MAX_BYTES */
    uint64_t max_work;     /* 0: by the number of logprobs, up to TB_GRAPH_MAX_WORK */
    /* results */
    double loss;
    double *metrics;   /* [tb_graph_n_metrics], the caller's */
    float *d_logprobs; /* [n*k], the caller's; NULL: no derivative */
};
/* Errors name the node. A loss or a derivative that is not finite is TB_ENONFINITE. */
int tb_graph_eval(const struct tb_graph *g, struct tb_graph_run *run, struct tb_error *err);

#endif
