/*
 * Ops: what a client asks for, as plain data. A face decodes its JSON or protobuf into an op; core/
 * orders it; engine/ runs it; its result goes back through a future to the face, which encodes it.
 *
 * An op owns an arena in which everything it points to lives (strings, tokens, tensors), so freeing
 * the op frees all. It names models, samplers and checkpoints by id, never by pointer, so that it
 * has one canonical encoding and can be journalled. It moves from owner to owner (face → core →
 * engine → core) and is never shared: whoever has it may change it, nobody else.
 *
 * Thread: the owner's.
 */
#ifndef TB_OP_OP_H
#define TB_OP_OP_H

#include <stdbool.h>
#include <stdint.h>

#include "util/arena.h"
#include "util/error.h"
#include "util/list.h"

enum tb_op_type {
    TB_OP_CREATE_MODEL,
    TB_OP_LOAD_WEIGHTS,
    TB_OP_FORWARD,
    TB_OP_FORWARD_BACKWARD,
    TB_OP_OPTIM_STEP,
    TB_OP_SAVE_WEIGHTS,
    TB_OP_SAVE_WEIGHTS_FOR_SAMPLER,
    TB_OP_SAVE_WEIGHTS_EXTERNAL,
    TB_OP_SAMPLE,
    TB_OP_UNLOAD_MODEL,
    TB_OP_CREATE_CUSTOM_LOSS,
    TB_OP_N_TYPES,
};
/* "create_model", ... as the wire's `type` literals */
const char *tb_op_type_name(enum tb_op_type t);

/* ---- LoRA settings of a model */
struct tb_lora_config {
    int32_t rank;
    float alpha; /* 32 */
    bool has_seed;
    uint64_t seed;
    bool train_attn, train_mlp, train_unembed;
};

struct tb_kv_text { /* metadata pair; value is JSON text for create_model, plain text for
                       checkpoints */
    const char *key, *value;
};

struct tb_create_model {
    const char *base_model;
    struct tb_lora_config lora;
    const char *optimizer;     /* "adamw"; anything else is refused */
    const char *user_metadata; /* JSON object text or NULL */
};

/* ---- training */
enum tb_tensor_type { TB_TENSOR_F32, TB_TENSOR_I64 };

/* A named dense input of a datum; CSR has been made dense by the decoder. */
struct tb_tensor {
    const char *name;
    enum tb_tensor_type type;
    int32_t n_dims; /* 0, 1 or 2 */
    int64_t shape[2];
    int64_t n; /* elements */
    union {
        const float *f32;
        const int64_t *i64;
    } data;
};

struct tb_datum {
    int32_t n_tokens;
    const int32_t *tokens; /* model_input, chunks concatenated */
    int32_t n_inputs;
    struct tb_tensor *inputs; /* loss_fn_inputs */
};

struct tb_config_value { /* one entry of loss_fn_config */
    const char *key;
    bool is_text;
    double number;
    const char *text;
};

/* A loss as a graph (model/custom/graph.h checks it), of a session. */
struct tb_create_custom_loss {
    int64_t seq_id; /* custom_loss_seq_id: 0, 1, ... in its session */
    const char *name;
    const char *text; /* a JSON object with inputs and graph */
    size_t n_text;
};

struct tb_forward_backward { /* TB_OP_FORWARD and TB_OP_FORWARD_BACKWARD */
    int32_t n_data;
    struct tb_datum *data;
    const char *loss_fn;
    int32_t n_config;
    struct tb_config_value *config;
    bool forward_only;
};

struct tb_optim_step {
    const char *type; /* "adamw" */
    double learning_rate, beta1, beta2, eps, weight_decay, grad_clip_norm;
};

/* ---- weights */
struct tb_save_weights { /* the three saves */
    const char *name;    /* NULL: ephemeral sampler save */
    bool has_ttl;
    int64_t ttl_seconds;
    bool overwrite;
    const char *user_metadata;       /* JSON object text or NULL */
    bool inflight;                   /* kind == "inflight" */
    int64_t sampling_session_seq_id; /* ephemeral only, else -1 */
};

struct tb_load_weights {
    const char *path;           /* tinker://run/kind/name */
    const char *access_token;   /* a key that may read it, or NULL */
    const char *reader;         /* who that is: the face's to fill in; NULL: the model's owner */
    bool optimizer;             /* restore moments too */
    const char *base_model;     /* create-via-load only, may be NULL */
    const char *optimizer_type; /* NULL or "adamw"; only legal without `optimizer` */
    const char *user_metadata;  /* create-via-load only */
};

/* ---- sampling */
/* Which tokens a sample may draw: a grammar, say. What has been drawn is a number, its state, so
 * that samples of one op share the filter. Owner: the op, whose end calls destroy (any thread). The
 * other two are called by the thread that samples, one at a time. */
struct tb_token_filter {
    uint64_t start; /* state of a sample without tokens */
    /* The tokens that may come next in a sample that may have `left` more (this one included): bit
     * id % 64 of word id / 64, for every id of the model's vocabulary. *may_end: the text is
     * complete, so the tokens that end a sample may come too. Borrowed until the next call; NULL
     * fails the op with TB_ENOMEM. */
    const uint64_t *(*mask)(struct tb_token_filter *f, uint64_t state, int32_t left, bool *may_end);
    /* The state after a token. *over: nothing may follow, the sample stops here. */
    uint64_t (*accept)(struct tb_token_filter *f, uint64_t state, int32_t token, bool *over);
    void (*destroy)(struct tb_token_filter *f);
};

struct tb_sample {
    const char *base_model, *model_path; /* pre-0.3 addressing; else NULL */
    int32_t n_prompt;
    const int32_t *prompt;
    int32_t n_samples;
    int32_t max_tokens; /* -1: up to the context's end */
    bool has_seed;
    uint64_t seed; /* core/ fills it with entropy when the client gave none */
    float temperature, top_p;
    int32_t top_k; /* -1: off */
    float min_p;   /* tokens less likely than this times the likeliest are not drawn; 0: off */
    /* What changes the logits before the draw, in this order; all zero: nothing does. Returned
     * logprobs are of the unchanged ones. */
    int32_t n_logit_bias;
    const int32_t *logit_bias_tokens; /* each at most once */
    const float *logit_bias;
    float repetition_penalty;  /* logits of tokens seen: z / r if z > 0, else z * r; 0, 1: off */
    int32_t repetition_last_n; /* of the last n of prompt and sample; 0: of all */
    float presence_penalty;    /* taken from the logits of tokens in the sample */
    float frequency_penalty;   /* the same, once for each time */
    struct tb_token_filter *filter; /* or NULL */
    bool
        stop_given; /* false: stop at EOS; true and both lists empty: nothing stops, not even EOS */
    int32_t n_stop_tokens;
    const int32_t *stop_tokens;
    int32_t n_stop_strings;
    const char *const *stop_strings;
    bool ignore_eos; /* EOS does not stop, whatever else does */
    bool prompt_logprobs;
    int32_t prompt_logprobs_last_n; /* 0: all */
    int32_t topk_prompt_logprobs, topk_sample_logprobs;
    int32_t prompt_alt_tokens_k;
    bool has_target_prompt_logprobs;
    struct tb_tensor target_prompt_logprobs; /* i64 [P-1, K], -1 = nothing asked */
    /* The request came as CSR, so the answer goes as CSR with the same indices; else NULL. */
    const int64_t *target_crow, *target_col; /* [P], [target_crow[P-1]] */
    bool stream; /* tokens are told as they are drawn (struct tb_progress) */
};

/* What a step added to a sample that streams. One allocation (tb_free). Of each sequence the tokens
 * come in order, and none is left out. */
struct tb_sampled_token {
    int32_t sequence, token;
    float logprob;
    bool last, stopped;      /* the sequence ends with this token; as in struct tb_sequence */
    const int32_t *topk_ids; /* [topk_sample_logprobs] or NULL */
    const float *topk_logprobs;
};
struct tb_progress {
    struct tb_list node; /* the owner's, with the next one */
    void *owner;
    int32_t n;
    struct tb_sampled_token tokens[];
};

/* ---- results, filled by the engine or core into the op's arena */
struct tb_metric {
    const char *key; /* "loss:sum" */
    double value;
};

struct tb_output { /* of one datum */
    int32_t n, k;  /* logprobs is [n] (k == 0) or [n, k] */
    float *logprobs;
};

struct tb_sequence {
    bool stopped; /* stop_reason "stop", else "length" */
    int32_t n;
    int32_t *tokens;
    float *logprobs;
    int32_t *topk_ids; /* [n, topk_sample_logprobs] or NULL */
    float *topk_logprobs;
};

struct tb_result {
    /* forward, forward_backward */
    int32_t n_outputs;
    struct tb_output *outputs;
    /* forward, forward_backward, optim_step */
    int32_t n_metrics;
    struct tb_metric *metrics;
    /* sample */
    int32_t n_sequences;
    struct tb_sequence *sequences;
    float *prompt_logprobs;   /* [P], NaN = not computed; NULL if not asked for */
    int32_t *topk_prompt_ids; /* [P, topk_prompt_logprobs]; empty cells: id 0, logprob -99999 */
    float *topk_prompt_logprobs;
    float *target_prompt_logprobs; /* dense, [P-1, K] of the request; 0 in -1 cells; NULL if not
                                      asked */
    int32_t *alt_tokens;           /* [P-1, prompt_alt_tokens_k] or NULL */
    float *alt_logprobs;
    int32_t prompt_cache_hit_tokens;
    /* model and weights ops */
    const char *model_id;
    const char *path;
    const char *sampling_session_id;
    const char *loss_id;
    int64_t size_bytes; /* external weights; -1 = unknown */
};

struct tb_op {
    struct tb_list node; /* the owner's list */
    struct tb_arena arena;
    enum tb_op_type type;

    /* addressing; which are set depends on the type */
    const char *session_id;          /* create_model, create-via-load, create_custom_loss, sample's
                                        session when known */
    int64_t model_seq_id;            /* create_model, create-via-load; else -1 */
    const char *model_id;            /* training and weights ops; create ops get it from core */
    const char *sampling_session_id; /* sample */
    int64_t seq_id; /* training order or sample label; -1: none (0.1.5, arrival order) */
    const char *idempotency_key; /* X-Idempotency-Key or NULL */
    /* Of a sample; core/ fills them. Those of one share have a part of a step together; only those
     * of one tenant find each other's prompts in the KV cache. */
    uint64_t share, tenant;

    union {
        struct tb_create_model create_model;
        struct tb_load_weights load_weights;
        struct tb_create_custom_loss create_custom_loss;
        struct tb_forward_backward forward_backward;
        struct tb_optim_step optim_step;
        struct tb_save_weights save_weights;
        struct tb_sample sample;
    } u;

    /* A decoder that knows the seq_id but found the rest invalid sets this instead of refusing the
     * submit: the op takes its place in the order and its future fails with it. Also where the
     * engine puts a failure. code == 0: none. */
    struct tb_error error;
    struct tb_result result;

    size_t body_bytes; /* size of the request, for back-pressure accounting */
    void *owner;       /* core's bookkeeping; not part of the encoding */
};

struct tb_op *tb_op_create(enum tb_op_type type); /* zeroed, seq ids -1, arena ready */
void tb_op_destroy(struct tb_op *op);             /* accepts NULL */

#endif
