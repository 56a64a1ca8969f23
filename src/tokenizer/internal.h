/*
 * What the tokenizer's files share: the table of tokens (tokenizer.c), the merges (bpe.c), the
 * steps before and after them (encode.c) and the way back (decode.c). Immutable after creation, so
 * any thread may read.
 */
#ifndef TB_TOKENIZER_INTERNAL_H
#define TB_TOKENIZER_INTERNAL_H

#include <jansson.h>

#include "tokenizer/tokenizer.h"

#define TB_MAX_TOKEN_ID ((1 << 24) - 1) /* an id above this is taken for a damaged file */
#define TB_BYTE_MAP_MAX 324             /* code points U+0000 to U+0143 spell the bytes */

#define TB_MARK "\xE2\x96\x81" /* U+2581, which stands for a space */

enum tb_token_flags {
    TB_TOKEN_USED = 1,
    TB_TOKEN_ADDED = 2,
    TB_TOKEN_SPECIAL = 4,
    TB_TOKEN_BYTE = 8 /* "<0x0A>" */
};

struct tb_token {
    uint32_t at, n; /* in pool */
    uint8_t flags;
};

struct tb_added { /* as the file spells it */
    int32_t id;
    uint32_t at, n; /* in pool */
};

struct tb_bpe;     /* merges; NULL where text cannot be encoded */
struct tb_encoder; /* normalizer, splits, added tokens, template */

struct tb_tokenizer {
    int32_t n; /* rows of tokens: the highest id + 1 */
    int32_t n_added;
    int32_t eos;
    struct tb_token *tokens; /* [n] */
    struct tb_added *added;  /* [n_added] in file order */
    char *pool;
    size_t pool_n, pool_cap;
    bool byte_level; /* else SentencePiece-style: */
    bool marks;      /* U+2581 decodes to a space */
    int32_t strip;   /* spaces that a text does not begin with */
    uint16_t map[TB_BYTE_MAP_MAX];
    struct tb_bpe *bpe;
    struct tb_encoder *encoder;
    char *no_encode; /* why text cannot be encoded, or NULL */
};

/* The bytes that a byte-level token's characters stand for; out has room for n. False when a
 * character is not in the byte map. */
bool tb_tokenizer_unmap(const struct tb_tokenizer *t, const char *s, size_t n, char *out,
                        size_t *n_out);

/* Sets how tokens become text; TB_EUNSUPPORTED names what is not served. */
int tb_decoder_load(struct tb_tokenizer *t, const char *name, const json_t *decoder,
                    struct tb_error *e);

/* Builds the merges from model.merges and model.vocab. */
int tb_bpe_create(const struct tb_tokenizer *t, const char *name, const json_t *model,
                  struct tb_bpe **out, struct tb_error *e);
void tb_bpe_destroy(struct tb_bpe *b); /* accepts NULL */
/* Appends the ids of one pre-token, valid UTF-8. O(n log n). */
int tb_bpe_encode(const struct tb_bpe *b, const char *p, size_t n, struct tb_ids *out);

/* TB_EUNSUPPORTED names the part that is not served; decoding then still works. */
int tb_encoder_create(const struct tb_tokenizer *t, const char *name, json_t *root,
                      struct tb_encoder **out, struct tb_error *e);
void tb_encoder_destroy(struct tb_encoder *c); /* accepts NULL */

#endif
