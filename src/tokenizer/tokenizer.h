/*
 * tokenizer.json: byte-level BPE (Qwen, Llama-3, gpt-oss) and SentencePiece-style BPE with or
 * without byte fallback (Llama-2, Mistral, Gemma). Every token is a fixed run of bytes, and stop
 * strings are searched in the concatenation of these. Text is made of it by a decoder, which knows
 * what is no character and which space at a text's beginning is none of the text's.
 *
 * struct tb_tokenizer is immutable after tb_tokenizer_create: any number of threads may read it.
 * Its owner destroys it after the last reader. struct tb_stop_set is immutable too and is shared by
 * the samples of one request; struct tb_decoder and struct tb_stop_matcher belong to one sample and
 * one thread at a time.
 *
 * A model folder need not have a tokenizer.json: then there is no tb_tokenizer, token stops work,
 * and a stop string is the user's error.
 */
#ifndef TB_TOKENIZER_TOKENIZER_H
#define TB_TOKENIZER_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "util/buf.h"
#include "util/error.h"
#include "util/span.h"

struct tb_tokenizer;

/* Reads <dir>/tokenizer.json, and tokenizer_config.json beside it for eos_token when there is one.
 * TB_ENOTFOUND when the folder has no tokenizer, TB_EUNSUPPORTED for one of another format, which
 * the message names with what to do; TB_ECORRUPT for a file that is not JSON or whose keys are
 * wrong, TB_EUNSUPPORTED for a tokenizer kind that is not served; the message names file and key.
 */
int tb_tokenizer_create(const char *dir, struct tb_tokenizer **out, struct tb_error *e);
/* The same from the text of a tokenizer.json; name is what error messages call it. */
int tb_tokenizer_create_from_json(const char *name, struct tb_span json, struct tb_tokenizer **out,
                                  struct tb_error *e);
void tb_tokenizer_destroy(struct tb_tokenizer *t); /* accepts NULL */

/* One more than the highest token id, added tokens included. The model's vocab_size may be larger
 * (padding rows) and ids in between may be unused. */
int32_t tb_tokenizer_vocab_size(const struct tb_tokenizer *t);
/* The token's bytes, borrowed from t. Special tokens are rendered, not skipped. TB_ENOTFOUND (and
 * an empty span) for an id that has no token. */
int tb_tokenizer_token_bytes(const struct tb_tokenizer *t, int32_t id, struct tb_span *out);
/* True for an added token marked special. */
bool tb_tokenizer_is_special(const struct tb_tokenizer *t, int32_t id);
/* True for a token that is one byte of a character that has no token (byte fallback). */
bool tb_tokenizer_is_byte(const struct tb_tokenizer *t, int32_t id);
/* The id of the added token with this content, or -1. */
int32_t tb_tokenizer_added_id(const struct tb_tokenizer *t, struct tb_span content);
/* eos_token of tokenizer_config.json as an id, or -1. */
int32_t tb_tokenizer_eos_id(const struct tb_tokenizer *t);

/* A growing list of ids. */
struct tb_ids {
    int32_t *p;
    size_t n, cap;
};
void tb_ids_init(struct tb_ids *v);
void tb_ids_fini(struct tb_ids *v);
int tb_ids_push(struct tb_ids *v, int32_t id); /* 0 or TB_ENOMEM */

enum tb_encode_flags {
    TB_ENCODE_TEMPLATE =
        1, /* put the file's special tokens around the text (Llama-3's begin of text) */
    TB_ENCODE_PLAIN =
        2, /* special tokens in the text are text: what users write cannot inject them (the
              library's split_special_tokens); other added tokens, such as <think>, are found */
};
/* Appends the ids of text (UTF-8) to out, as the Hugging Face tokenizers library gives them. On
 * failure out is as it was: TB_EINVAL for text that is not UTF-8, TB_EUNSUPPORTED (with the file's
 * name and key) for a tokenizer that can only decode. Costs O(n log n); long texts belong in a
 * worker. */
int tb_tokenizer_encode(const struct tb_tokenizer *t, struct tb_span text, unsigned flags,
                        struct tb_ids *out, struct tb_error *e);

enum tb_decode_flags {
    TB_DECODE_VISIBLE = 1, /* without special tokens */
    TB_DECODE_GOES_ON = 2, /* the text follows another, so the space at its beginning is its own */
};
/* Appends the text of the ids to out, valid UTF-8, as the Hugging Face tokenizers library gives it.
 * Ids without a token have none. 0 or out's error code. */
int tb_tokenizer_decode(const struct tb_tokenizer *t, const int32_t *ids, size_t n, unsigned flags,
                        struct tb_buf *out);

/* The same, token by token. A byte-level text holds an incomplete character back; with byte
 * fallback all byte tokens in a row are, as one that is wrong makes all of them U+FFFD. */
struct tb_decoder {
    const struct tb_tokenizer *t;
    unsigned flags;
    int32_t strip; /* spaces still to be dropped */
    struct tb_buf held;
};
void tb_decoder_init(struct tb_decoder *d, const struct tb_tokenizer *t, unsigned flags);
void tb_decoder_fini(struct tb_decoder *d);
/* Append to out what is certain now; 0 or a buffer's error code. */
int tb_decoder_feed(struct tb_decoder *d, int32_t id, struct tb_buf *out);
/* A part of a token's bytes; is_byte: as tb_tokenizer_is_byte says of it. */
int tb_decoder_feed_bytes(struct tb_decoder *d, const char *p, size_t n, bool is_byte,
                          struct tb_buf *out);
int tb_decoder_end(struct tb_decoder *d, struct tb_buf *out); /* all that was held back */

/* The end of a run of bytes that is an incomplete UTF-8 sequence (0 to 3 bytes): what a stream of
 * text holds back until the next token. An invalid tail is not held back. */
size_t tb_utf8_incomplete_tail(const char *p, size_t n);
bool tb_utf8_valid(const char *p, size_t n);
size_t tb_utf8_characters(const char *p, size_t n); /* that begin in it */
/* Appends p as valid UTF-8: every maximal invalid prefix becomes one U+FFFD. 0 or out's error code.
 */
int tb_utf8_append(struct tb_buf *out, const char *p, size_t n);

struct tb_stop_set; /* the stop strings of one request, copied */

/* stops may be empty. TB_EINVAL for an empty string or a breach of TB_MAX_STOPS, TB_MAX_STOP_BYTES.
 * t is the model's tokenizer or NULL; stop strings without one are refused with TB_EINVAL. t must
 * outlive the set. */
int tb_stop_set_create(const struct tb_tokenizer *t, const struct tb_span *stops, size_t n_stops,
                       struct tb_stop_set **out, struct tb_error *e);
void tb_stop_set_destroy(struct tb_stop_set *s); /* accepts NULL */
size_t tb_stop_set_count(const struct tb_stop_set *s);

struct tb_stop_matcher {
    const struct tb_stop_set *set; /* borrowed; NULL matches nothing */
    uint32_t *state;               /* [stops] bytes of each stop that the end of the text matches */
    uint64_t n_seen;               /* bytes fed in all */
    int hit;                       /* index of the stop that was found first, -1 if none */
    uint64_t hit_at;               /* offset in the fed text at which that stop begins */
};

void tb_stop_matcher_init(struct tb_stop_matcher *m, const struct tb_stop_set *set);
void tb_stop_matcher_fini(struct tb_stop_matcher *m); /* accepts a zeroed matcher */
/* Appends the bytes of one sampled token (an unknown id has none). True once a stop string has been
 * completed; hit and hit_at then tell which (the one that ends first; of those, the longest). */
bool tb_stop_matcher_feed(struct tb_stop_matcher *m, int32_t id);
bool tb_stop_matcher_feed_bytes(struct tb_stop_matcher *m, const char *p, size_t n);

#endif
