/*
 * Grammar: which tokens may come next in a text that must match a JSON Schema (or be any JSON
 * object). A schema is compiled into rules over bytes; a sequence's place in them is a state, made
 * on demand; a state gives the set of tokens that some completion allows.
 *
 *   tb_vocab     the tokens' bytes in lexicographic order; immutable; one for each tokenizer
 *   tb_grammar   rules and the states found so far; for one tokenizer
 *   state        a number; 0 is dead: nothing that begins so can match
 *
 * Every state knows how many bytes its shortest completion takes. A mask for `left` more tokens
 * holds only tokens after which that completion still fits, so a text that may take n tokens is
 * complete after n tokens at the latest. For that every byte that the rules may need must be a
 * token of its own, as byte-level tokenizers have them.
 *
 * Owner: the caller, by references. Thread: references from any; everything else of a grammar from
 * one thread at a time (it grows while it is used); a vocabulary from any.
 */
#ifndef TB_GRAMMAR_GRAMMAR_H
#define TB_GRAMMAR_GRAMMAR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tokenizer/tokenizer.h"
#include "util/error.h"
#include "util/span.h"

/* ---- vocabulary */
struct tb_vocab;
/* n_tokens: columns of the model's logits, at least tb_tokenizer_vocab_size(t). Special tokens and
 * columns without a token belong to no text. t must outlive the vocabulary. Sorts (tens of
 * milliseconds for 150,000 tokens). TB_EUNSUPPORTED: a byte that is no token of its own. */
int tb_vocab_create(const struct tb_tokenizer *t, int32_t n_tokens, struct tb_vocab **out,
                    struct tb_error *err);
void tb_vocab_unref(struct tb_vocab *v); /* accepts NULL; grammars hold references of their own */
int32_t tb_vocab_size(const struct tb_vocab *v);
/* What all grammars of a vocabulary may take: beyond it those that have more than a small share
 * grow no more. Beyond half of it none should be kept for later. */
#define TB_VOCAB_GRAMMAR_BYTES ((size_t)512 << 20)
bool tb_vocab_crowded(const struct tb_vocab *v); /* beyond that half. Any thread. */

/* ---- grammar */
struct tb_grammar;
/* Any JSON object. */
int tb_grammar_create_json(struct tb_vocab *v, struct tb_grammar **out, struct tb_error *err);
/* What the schema (JSON text) describes. TB_EINVAL and TB_EUNSUPPORTED name the place and the
 * keyword: what is known and cannot be enforced is refused; annotations (title, description,
 * default, ...) and unknown keys are ignored. Objects have their members in the schema's order. */
int tb_grammar_create_schema(struct tb_vocab *v, struct tb_span schema, struct tb_grammar **out,
                             struct tb_error *err);
void tb_grammar_ref(struct tb_grammar *g);
void tb_grammar_unref(struct tb_grammar *g); /* accepts NULL */

uint32_t tb_grammar_start(const struct tb_grammar *g);
/* Tokens that the shortest text takes at most. */
uint32_t tb_grammar_shortest(const struct tb_grammar *g);
/* The state after more bytes, or after a token; 0 when nothing matches. */
uint32_t tb_grammar_feed(struct tb_grammar *g, uint32_t state, struct tb_span bytes);
uint32_t tb_grammar_accept(struct tb_grammar *g, uint32_t state, int32_t token);
bool tb_grammar_complete(const struct tb_grammar *g, uint32_t state); /* the text may end here */
bool tb_grammar_final(const struct tb_grammar *g, uint32_t state);    /* and cannot go on */
/* The tokens allowed in state when `left` tokens may still come (this one included); bit i of
 * word i / 64. Borrowed until the next call. NULL: the states take more memory, or finding them
 * more work, than a grammar may have. */
const uint64_t *tb_grammar_mask(struct tb_grammar *g, uint32_t state, uint32_t left);
/* A mask needed more work than that: a new one of the same schema would too. Any thread. */
bool tb_grammar_too_complex(const struct tb_grammar *g);
/* Its states take more than half of what they may: texts to come should have a new one. Any thread.
 */
bool tb_grammar_worn(const struct tb_grammar *g);

#endif
