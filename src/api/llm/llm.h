/*
 * What the faces for text have in common (OpenAI, Ollama, llama.cpp): prompts in text or messages
 * become tokens, tokens become text again, as a whole or as a stream. A face decodes its JSON into
 * a tb_llm and writes its answers; all between is here.
 *
 *   llm.c      a request's way: pool (JSON), loop (model), pool (tokens, grammar), loop (core), and
 *              the pool once more for a large answer
 *   models.c   served models by name, their renderers, vocabularies and grammars
 *   text.c     tokens to text: stop strings, UTF-8, special tokens
 *   logprobs.c tokens with their log-probabilities
 *   options.c  fields that several dialects have
 *   list.c     the names of all models
 *
 * Owner: a tb_llm belongs to the loop, and to the pool while its work is queued; it lives until it
 * is answered or its client has gone, which cancels its samples. Thread: the loop's, but decode.
 */
#ifndef TB_API_LLM_LLM_H
#define TB_API_LLM_LLM_H

#include "api/internal.h"
#include "chat/chat.h"
#include "grammar/grammar.h"
#include "op/op.h"
#include "tokenizer/tokenizer.h"
#include "util/mem.h"

#define TB_LLM_MAX_PROMPTS 256
#define TB_LLM_MAX_CHOICES 1024 /* prompts times n */

struct tb_llm;

/* ---- text.c */
struct tb_llm_text {
    const struct tb_tokenizer *t;
    struct tb_stop_matcher stop;
    struct tb_buf held;  /* bytes that may still become a stop string */
    struct tb_buf marks; /* for each of them, what kind of token's it is */
    struct tb_decoder decoder;
    uint64_t n_out; /* bytes that are no longer held */
};
void tb_llm_text_init(struct tb_llm_text *x, const struct tb_tokenizer *t,
                      const struct tb_stop_set *stops);
void tb_llm_text_fini(struct tb_llm_text *x);
/* Appends to out what is certain after one more token. */
void tb_llm_text_feed(struct tb_llm_text *x, int32_t token, struct tb_buf *out);
void tb_llm_text_end(struct tb_llm_text *x, struct tb_buf *out); /* all that is left */
bool tb_llm_text_failed(const struct tb_llm_text *x); /* found no memory; out may have, too */

/* ---- a request */
struct tb_llm_prompt {
    struct tb_span text; /* as it is; p NULL: tokens or messages */
    const int32_t *tokens;
    int32_t n_tokens;
    struct tb_chat_message *messages;
    size_t n_messages;

    struct tb_llm *llm; /* the rest is llm.c's */
    char *request_id;
    struct tb_core_stream stream;
    bool over;
    int32_t n_cached;  /* tokens found in the prompt cache */
    float *logprobs;   /* [n_tokens] with echo and logprobs, the first is NaN */
    int32_t *topk_ids; /* [n_tokens, llm->top_logprobs] */
    float *topk_logprobs;
};

struct tb_llm_choice {
    int index, prompt;
    struct tb_llm_text text;
    struct tb_buf whole; /* valid UTF-8 */
    size_t told;         /* bytes of whole that were streamed */
    size_t offset;       /* the face's: characters of the tokens that were told */
    int32_t n, cap;      /* tokens so far */
    int32_t *tokens;
    float *logprobs;
    int32_t *topk_ids; /* [n, llm->top_logprobs] */
    float *topk_logprobs;
    int32_t n_told;
    bool over, stopped, began; /* began: the face's mark that its first event is out */
};

/* One way to speak. Functions run on the loop's thread, but decode and prepare, which run in
 * the pool, and answer, which does when the answer is large. One that samples nothing has no
 * stream: no stream_type, broken and more. */
struct tb_llm_face {
    const char *stream_type; /* content type */
    int (*decode)(struct tb_llm *l, const struct tb_json *root, struct tb_error *err);
    /* May be NULL: what there is to do once the model is known. */
    int (*prepare)(struct tb_llm *l, struct tb_error *err);
    /* A request that is not answered yet fails; model may be NULL. */
    void (*refuse)(struct tb_http_request *req, const struct tb_error *err);
    /* A stream fails after its beginning. */
    void (*broken)(struct tb_llm *l, const struct tb_error *err);
    /* A stream: c has more, or is over. */
    void (*more)(struct tb_llm *l, struct tb_llm_choice *c);
    /* All choices are over: writes the answer to l->out, or sends what a stream ends with (llm.c
     * ends it). NULL: prepare has written it. */
    void (*answer)(struct tb_llm *l);
};

struct tb_llm_model;
struct tb_llm {
    struct tb_api *a;
    struct tb_tenant *who;
    struct tb_http_request *req; /* NULL when it was answered */
    const struct tb_llm_face *face;
    struct tb_arena arena;
    int kind;       /* the face's */
    void *face_own; /* the face's, in the arena */

    /* set by decode */
    const char *model_name; /* NULL: the first one */
    struct tb_llm_prompt *prompts;
    int n_prompts, n;        /* n: choices of each */
    struct tb_sample sample; /* without prompt, stops and filter */
    const char **stops;
    size_t n_stops;
    bool stream, echo, no_thinking;
    bool logprobs;    /* wanted in the answer */
    int top_logprobs; /* of each token */
    bool json;        /* any object, or: */
    struct tb_span schema;

    /* then */
    const struct tb_llm_model *model;
    const char *model_path; /* of a checkpoint, or NULL */
    struct tb_stop_set *stop_set;
    struct tb_llm_choice *choices;
    int n_choices, n_running;
    bool streaming;  /* the answer's head is out */
    int64_t created; /* seconds */
    uint64_t received_ns, submitted_ns, first_ns, ended_ns;
    char id[25];
    struct tb_buf out; /* scratch for what is written */

    /* llm.c's */
    uv_work_t work;
    void (*phase)(struct tb_llm *l);
    struct tb_body_in {
        enum tb_encoding encoding;
        struct tb_span bytes;
    } body;
    struct tb_llm_grammar *grammar;
    struct tb_error err;
    bool busy, dead;
};

/* Serves the request as the face; the answer comes later. */
void tb_llm_begin(struct tb_api *a, struct tb_http_request *req, const struct tb_llm_face *face,
                  int kind);
/* Sends l->out as one chunk of the stream and empties it. */
void tb_llm_send(struct tb_llm *l);

/* ---- models.c */
struct tb_llm_models;
/* renderers as in struct tb_api_options. TB_EINVAL names the model and the renderer. */
int tb_llm_models_create(struct tb_api *a, const char *const *renderers, struct tb_error *err);
void tb_llm_models_destroy(struct tb_llm_models *m);
/* By served name, with or without ":latest"; NULL name: the first; NULL: there is none. */
const struct tb_llm_model *tb_llm_model_find(struct tb_api *a, const char *name);
const struct tb_served_model *tb_llm_model_info(const struct tb_llm_model *m);
const struct tb_renderer *tb_llm_model_renderer(const struct tb_llm_model *m);
/* TB_EUNSUPPORTED, with the reason, for a model without tokenizer. */
int tb_llm_model_need_text(const struct tb_llm_model *m, struct tb_error *err);
/* Names one by one, by i; NULL at the end. */
const struct tb_llm_model *tb_llm_model_at(struct tb_api *a, int i);

/* ---- list.c: what can be named as a model */
#define TB_LLM_CHECKPOINT "tinker://"
struct tb_llm_name {
    const char *name;
    const struct tb_served_model *base;
    bool is_checkpoint;
    int64_t time_us;    /* when it was saved; of a base model, when the server started */
    int64_t size_bytes; /* of a checkpoint */
};
/* Called once with an error or the names (borrowed); answers the request. */
typedef void (*tb_llm_list_cb)(struct tb_api *a, struct tb_http_request *req,
                               const struct tb_error *err, const struct tb_llm_name *names,
                               size_t n);
void tb_llm_list(struct tb_api *a, struct tb_http_request *req, tb_llm_list_cb cb);
/* The one of that name; TB_ENOTFOUND. */
void tb_llm_list_one(struct tb_api *a, struct tb_http_request *req, const char *name,
                     tb_llm_list_cb cb);

/* ---- logprobs.c */
enum tb_llm_token_parts {
    TB_LLM_TOKEN_ID = 1,
    TB_LLM_TOKEN_BYTES = 2,
    TB_LLM_TOKEN_TOPS = 4, /* "top_logprobs" also when none were asked for */
};
struct tb_span tb_llm_token_bytes(const struct tb_llm *l, int32_t id);           /* none: empty */
void tb_llm_put_bytes(struct tb_json_out *j, const char *key, struct tb_span s); /* as numbers */
/* A list of c's tokens from .. c->n: {token, logprob, top_logprobs} and the parts. */
void tb_llm_put_logprobs(struct tb_json_out *j, const char *key, const struct tb_llm *l,
                         const struct tb_llm_choice *c, int32_t from, unsigned parts);

/* A compiled grammar, kept for requests to come. */
struct tb_llm_grammar {
    struct tb_grammar *g;
    uint32_t start, shortest;
};
/* Pool or loop; takes a lock. json: any object; else the schema. The caller puts it. */
int tb_llm_grammar_get(const struct tb_llm_model *m, bool json, struct tb_span schema,
                       struct tb_llm_grammar *out, struct tb_error *err);
/* A filter that owns a reference of g's grammar. */
struct tb_token_filter *tb_llm_filter(const struct tb_llm_grammar *g);

/* ---- options.c: fields of requests; errors name the field */
int tb_llm_stops(struct tb_llm *l, const struct tb_json *obj, const char *key, size_t max,
                 struct tb_error *err);
int tb_llm_float(const struct tb_json *obj, const char *key, double min, double max, float *out,
                 struct tb_error *err);
int tb_llm_int32(const struct tb_json *obj, const char *key, int32_t min, int32_t max, int32_t *out,
                 struct tb_error *err);
/* {"token id": bias} */
int tb_llm_logit_bias(struct tb_llm *l, const struct tb_json *obj, const char *key,
                      struct tb_error *err);
/* [{role, content: text or [{type: text, text}]}] */
int tb_llm_messages(struct tb_arena *a, const struct tb_json *list, struct tb_chat_message **out,
                    size_t *n, struct tb_error *err);
/* TB_EUNSUPPORTED when the field is there with another value than null, false, 0, "" or empty. */
int tb_llm_refuse(const struct tb_json *obj, const char *const *keys, size_t n,
                  struct tb_error *err);
/* A string's bytes. */
int tb_llm_span(struct tb_arena *a, const struct tb_json *v, struct tb_span *out,
                struct tb_error *err);

#endif
