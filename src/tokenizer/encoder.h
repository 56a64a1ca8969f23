/*
 * What encoding a text needs of a tokenizer's file. Private to tokenizer/: encoder.c reads it,
 * normalize.c and encode.c use it.
 *
 * Owner: struct tb_encoder owns its compiled expressions and lists and is immutable. Thread: any.
 */
#ifndef TB_TOKENIZER_ENCODER_H
#define TB_TOKENIZER_ENCODER_H

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "tokenizer/internal.h"
#include "util/map.h"

#define TB_MAX_SPLITS       8
#define TB_MAX_NORMAL_STEPS 8

/* Added tokens of one kind, found by content: longest first at every position. */
struct tb_finder {
    struct tb_map ids; /* content to id + 1 */
    size_t *lengths;   /* [n_lengths] distinct, descending */
    size_t n_lengths;
    bool first[256]; /* some content begins with this byte */
};

/* A step of the normalizer. */
struct tb_normal_step {
    enum { STEP_NFC, STEP_PREPEND, STEP_REPLACE } kind;
    char *from, *to; /* STEP_REPLACE: both; STEP_PREPEND: to */
};

/* The Metaspace pre-tokenizer. */
struct tb_metaspace {
    char *mark; /* stands for a space; NULL without the pre-tokenizer */
    enum { PREPEND_NEVER, PREPEND_FIRST, PREPEND_ALWAYS } prepend;
    bool split; /* a pre-token begins at each mark */
};

struct tb_encoder {
    const struct tb_tokenizer *t;
    bool prefix_space;
    struct tb_normal_step steps[TB_MAX_NORMAL_STEPS];
    size_t n_steps;
    struct tb_metaspace meta;
    pcre2_code *splits[TB_MAX_SPLITS];
    size_t n_splits;
    struct tb_finder raw, normalized; /* by the token's `normalized` */
    bool *lstrip, *rstrip;            /* [t->n] by id */
    int32_t *before, *after;          /* the template around the text */
    size_t n_before, n_after;
};

/* ---- normalize.c */
/* *s becomes its normal form, which lies in one of the buffers unless nothing changed. */
int tb_normalize(const struct tb_encoder *c, struct tb_span *s, struct tb_buf work[2]);
/* Appends s with every `from` replaced. */
int tb_normal_replace(struct tb_span s, const char *from, const char *to, struct tb_buf *out);

#endif
