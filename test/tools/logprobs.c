/*
 * logprobs DIR DTYPE: loads a model folder on the CPU backend (DTYPE: f32 or bf16), reads one
 * sequence of token ids a line from stdin and prints the logprob of each token after the first, one
 * line a sequence. It is the base model: what runs is a training forward pass with a fresh adapter,
 * whose B is zero.
 *
 * Owner: main. Thread: one.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/model.h"
#include "util/mem.h"

#define MAX_LINE (1 << 22)

static int die(const char *what, const struct tb_error *err)
{
    fprintf(stderr, "logprobs: %s: %s\n", what, err ? err->msg : "");
    return 2;
}

/* The numbers of a line; returns how many. */
static int parse(const char *line, int64_t *out, int max)
{
    int n = 0;
    char *end;
    for (const char *p = line; n < max; p = end) {
        long v = strtol(p, &end, 10);
        if (end == p) break;
        out[n++] = v;
    }
    return n;
}

static int score(struct tb_model *m, struct tb_adapter *a, const int64_t *ids, int n)
{
    struct tb_op *op = tb_op_create(TB_OP_FORWARD);
    int32_t *tokens = tb_calloc((size_t)n, sizeof(*tokens));
    for (int i = 0; i < n; i++)
        tokens[i] = (int32_t)ids[i];
    struct tb_tensor t = {.name = "target_tokens",
                          .type = TB_TENSOR_I64,
                          .n_dims = 1,
                          .shape = {n - 1},
                          .n = n - 1,
                          .data.i64 = ids + 1};
    struct tb_datum d = {.n_tokens = n - 1, .tokens = tokens, .n_inputs = 1, .inputs = &t};
    op->u.forward_backward =
        (struct tb_forward_backward){.n_data = 1, .data = &d, .loss_fn = "cross_entropy"};
    struct tb_train_part part = {NULL, 1};
    struct tb_error err = {0};
    int rc = tb_training_create(&part.training, a, op, NULL);
    if (!rc) rc = tb_model_train(m, &part, 1, &err);
    tb_training_destroy(part.training);
    if (op->error.code) {
        err = op->error;
        rc = err.code;
    }
    for (int i = 0; !rc && i < n - 1; i++)
        printf("%.9g%c", (double)op->result.outputs[0].logprobs[i], i == n - 2 ? '\n' : ' ');
    tb_free(tokens);
    tb_op_destroy(op);
    return rc ? die("forward", &err) : 0;
}

int main(int argc, char **argv)
{
    struct tb_backend *be = NULL;
    struct tb_model *m = NULL;
    struct tb_adapter *a = NULL;
    struct tb_error err = {0};
    struct tb_backend_options o = {.isa = getenv("TB_TEST_ISA")};
    struct tb_lora_config c = {.rank = 1, .alpha = 32, .has_seed = true, .train_mlp = true};
    if (argc != 3) return die("usage: logprobs DIR f32|bf16 < tokens", NULL);
    if (tb_backend_create(&be, "cpu", argv[2], &o, &err)) return die("backend", &err);
    if (tb_model_load(&m, be, "model", argv[1], NULL, &err)) return die("load", &err);
    if (tb_adapter_create(&a, m, &c, &err)) return die("adapter", &err);
    char *line = tb_malloc(MAX_LINE);
    int64_t *ids = tb_calloc(MAX_LINE / 2, sizeof(*ids));
    int rc = 0;
    while (!rc && fgets(line, MAX_LINE, stdin)) {
        int n = parse(line, ids, MAX_LINE / 2);
        if (n >= 2) rc = score(m, a, ids, n);
    }
    tb_free(line);
    tb_free(ids);
    tb_adapter_free(a);
    tb_model_free(m);
    be->ops->destroy(be);
    return rc;
}
