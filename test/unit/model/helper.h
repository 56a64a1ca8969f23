/*
 * What the model tests share: backends, oracle fixtures, ops made from JSON or from arrays, random
 * model folders of odd shapes. Everything aborts the test on failure.
 *
 * Owner: the caller frees what is returned. Thread: one.
 */
#ifndef TEST_MODEL_HELPER_H
#define TEST_MODEL_HELPER_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <jansson.h>

#include "model/internal.h"

/* ---- backends; isa NULL: the best. Freed at exit of the test program by backends_fini. */
struct tb_backend *backend_f32(void);
struct tb_backend *backend_bf16(void); /* NULL when this machine has none */
void backends_fini(void);
struct tb_backend *new_backend(const char *dtype); /* "f32", "bf16"; the caller's */

/* How often a test repeats: a tenth under the emulation of CUDA, which is slow. */
static inline int repeats(int n)
{
#ifdef TB_CUDA_EMU
    return n / 10;
#else
    return n;
#endif
}

/* Of many cases a test takes one in n under the emulation. */
static inline int sparse(int n)
{
#ifdef TB_CUDA_EMU
    return n;
#else
    return 1;
#endif
}

/* ---- oracle */
const char *oracle_path(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
json_t *oracle_json(const char *path);
struct tb_model *load_dir(struct tb_backend *be, const char *dir, const struct tb_model_options *o);
struct tb_model *load_oracle(struct tb_backend *be, const char *name);
/* An adapter state from a safetensors file; prefix is stripped from names ("base_model.model.").
 * Tensors named exp_avg.*, exp_avg_sq.* become m and v. */
struct tb_adapter_state *load_state(const struct tb_model *m, const char *path);
struct tb_adapter *load_adapter(struct tb_model *m, const char *path);
/* A tensor of a file as floats (tb_free). */
float *load_tensor(const char *path, const char *name, size_t *n);

/* ---- ops */
struct tb_op *op_from_json(const json_t *run, bool backward, int from,
                           int to); /* data [from, to) */
struct tb_op *op_cross_entropy(const int32_t *tokens, int n,
                               bool backward); /* targets: shifted by one */
void add_input(struct tb_op *op, int datum, const char *name, const float *v, int n);
struct tb_op *op_sample(const int32_t *prompt, int n_prompt, int max_tokens, uint64_t seed);
struct tb_op *op_adam(double lr);
void run_train(struct tb_model *m, struct tb_adapter *a, struct tb_op *op); /* must succeed */
/* Runs ops in one call of tb_model_train; what fails has op->error set. */
struct train_item {
    struct tb_adapter *adapter;
    struct tb_op *op;
    const struct tb_graph *graph;
};
void run_items(struct tb_model *m, const struct train_item *items, int n);
void run_ops(struct tb_model *m, struct tb_adapter **a, struct tb_op **ops, int n);
/* Runs samplings to their end; versions may be NULL. */
void run_samples(struct tb_model *m, struct tb_adapter_version **v, struct tb_op **ops, int n,
                 int budget);
double metric(const struct tb_op *op, const char *key);
/* The adapter's accumulated gradient (tb_free). */
float *grad_of(const struct tb_adapter *a);
float *params_of(const struct tb_adapter *a);

/* ---- random models */
struct shape {
    const char *arch;
    int vocab, hidden, ffn, layers, heads, kv_heads, head_dim, max_pos;
    bool tied;
    int window; /* use_sliding_window from layer 1 on */
};
/* Writes a folder with float32 weights of the given spread and returns its path (tb_free);
 * remove_dir deletes it. */
char *random_model(const struct shape *s, uint64_t seed, float spread);
void remove_dir(char *dir);
/* Three shapes without round numbers. open_model writes one, loads it and removes the folder. */
#define N_SHAPES 3
extern const struct shape shapes[N_SHAPES];
struct tb_model *open_model(struct tb_backend *be, const struct shape *s,
                            const struct tb_model_options *o);
/* Four data of 70, 5, 33 and 18 tokens; `from` picks them. ratio: gspo with logprobs, advantages
 * and a mask, else cross_entropy with weights; some weights and advantages are zero. */
struct tb_op *batch_op(const struct shape *s, uint64_t from, bool backward, bool ratio);
void same_outputs(const struct tb_op *x, const struct tb_op *y); /* to the bit */
void same_grads(const struct tb_adapter *a, const struct tb_adapter *b);
void random_tokens(int32_t *out, int n, int vocab, uint64_t seed);
/* Adds noise to every parameter of an adapter, B included. */
struct tb_adapter *random_adapter(struct tb_model *m, int rank, uint64_t seed, float noise);

/* Makes the n-th next device allocation of a backend fail (0: none does). */
void fail_device_alloc(struct tb_backend *be, long n);

#define CHECK_OK(expr)                                                                             \
    do {                                                                                           \
        struct tb_error check_err = {0};                                                           \
        int check_rc = (expr);                                                                     \
        if (check_rc) fail_msg("%s: %d %s", #expr, check_rc, check_err.msg);                       \
    } while (0)

#endif
