/*
 * Rules of a grammar while it is built, and its states while it is used. Private to grammar/.
 *
 * A rule is a node in a graph: a set of bytes, a sequence, a choice, a repetition, or a reference
 * that is defined later (recursion). Nodes are immutable and shared freely.
 *
 * A place in the rules is a frame: a node still to be matched and the frame after it, so a frame is
 * a stack as a linked list. Equal frames are one frame (hash-consed). A state is the set of frames
 * that may come next, each at a set of bytes; equal states are one state, so states and the bytes
 * between them are a deterministic automaton, made as it is walked.
 */
#ifndef TB_GRAMMAR_RULES_H
#define TB_GRAMMAR_RULES_H

#include <stdatomic.h>

#include "grammar/grammar.h"
#include "util/mem.h"

#define TB_GRAMMAR_MAX_NODES (1 << 18)
#define TB_GRAMMAR_MAX_SETS  4096
#define TB_GRAMMAR_MAX_DEPTH 512         /* frames in a stack before nesting is brought to an end */
#define TB_GRAMMAR_MAX_BYTES (128 << 20) /* of frames and states */
#define TB_GRAMMAR_LEAST     (2 << 20)   /* of these, whatever other grammars take */
#define TB_GRAMMAR_MAX_WORK  (1 << 20)   /* frames looked at for one mask */
#define TB_GRAMMAR_MASKS     128         /* masks kept */
#define TB_GRAMMAR_NEVER     (1u << 30)  /* the shortest text of a rule that never ends */
#define TB_GRAMMAR_UNBOUNDED UINT32_MAX
#define TB_NODE_EMPTY        0u
#define TB_STATE_UNKNOWN     UINT32_MAX /* not walked yet */

enum tb_node_type {
    TB_NODE_NOTHING,
    TB_NODE_BYTES,
    TB_NODE_SEQ,
    TB_NODE_ALT,
    TB_NODE_REPEAT,
    TB_NODE_REF
};

struct tb_byte_set {
    uint64_t w[4];
};

struct tb_node {
    enum tb_node_type type;
    uint32_t a, b;     /* SEQ: a then b; ALT: a or b; REPEAT, REF: a; BYTES: a is a set's number */
    uint32_t min, max; /* REPEAT */
    uint32_t shortest; /* bytes of the shortest match */
};

struct tb_frame {
    uint32_t node, count, up; /* count: repetitions done */
    uint32_t rest;            /* bytes of the shortest match of this frame and those after it */
    uint32_t depth;
    uint32_t seen; /* the step that came here last */
};

struct tb_state {
    uint32_t first, n; /* in members */
    uint32_t rest;
    bool complete;
    uint32_t *next; /* [n_classes], 0: dead, or TB_STATE_UNKNOWN; NULL: none walked */
    uint32_t mask;  /* 1 + slot of its kept mask, or 0 */
};

struct tb_table { /* open addressing over numbers from 1; 0: free */
    uint32_t *slots;
    uint32_t cap, n;
};

struct tb_u32s {
    uint32_t *p;
    uint32_t n, cap;
};

struct tb_grammar {
    _Atomic int refs;
    struct tb_vocab *vocab;
    bool failed; /* memory ran out, or a limit was met */
    _Atomic bool worn, too_complex;

    struct tb_node *nodes;
    uint32_t n_nodes, cap_nodes;
    struct tb_byte_set *sets;
    uint32_t n_sets, cap_sets;
    uint8_t class_of[256]; /* bytes that no set tells apart are one class */
    uint32_t n_classes;
    uint8_t class_byte[256]; /* one byte of each class */

    struct tb_frame *frames; /* [0]: the end of the text */
    uint32_t n_frames, cap_frames;
    struct tb_table frame_table;
    struct tb_state *states; /* [0]: dead */
    uint32_t n_states, cap_states;
    struct tb_table state_table;
    struct tb_u32s members;        /* of all states: frames at BYTES, ascending */
    struct tb_u32s closure, queue; /* scratch */
    size_t bytes;                  /* of next tables */
    size_t counted;                /* in vocab->grammar_bytes */
    uint32_t step, work;           /* number of the step; frames looked at since the mask began */
    uint32_t start;

    uint64_t *masks; /* [TB_GRAMMAR_MASKS + 1][words], the last for masks that are not kept */
    uint32_t mask_owner[TB_GRAMMAR_MASKS]; /* state, 0: free */
    uint32_t mask_most[TB_GRAMMAR_MASKS];  /* the longest completion after one of its tokens */
    uint32_t next_mask;
    uint32_t *path; /* [longest token + 1] states along a token */
};

/* ---- rules.c. Building never fails visibly: it sets g->failed, which tb_rules_finish reports. */
int tb_rules_create(struct tb_vocab *v, struct tb_grammar **out);
void tb_rules_destroy(struct tb_grammar *g);
uint32_t tb_rule_set(struct tb_grammar *g, struct tb_byte_set s);
uint32_t tb_rule_range(struct tb_grammar *g, unsigned lo, unsigned hi);
uint32_t tb_rule_one_of(struct tb_grammar *g, const char *chars);
uint32_t tb_rule_text(struct tb_grammar *g, const char *p, size_t n);
uint32_t tb_rule_seq(struct tb_grammar *g, uint32_t a, uint32_t b);
uint32_t tb_rule_alt(struct tb_grammar *g, uint32_t a, uint32_t b);
uint32_t tb_rule_repeat(struct tb_grammar *g, uint32_t a, uint32_t min, uint32_t max);
uint32_t tb_rule_ref(struct tb_grammar *g); /* to be defined */
void tb_rule_define(struct tb_grammar *g, uint32_t ref, uint32_t node);
static inline uint32_t tb_rule_optional(struct tb_grammar *g, uint32_t a)
{
    return tb_rule_repeat(g, a, 0, 1);
}
/* Fixes the rules; root is the whole text. TB_EINVAL when no text is finite or a rule begins with
 * itself. */
int tb_rules_finish(struct tb_grammar *g, uint32_t root, struct tb_error *err);

/* ---- states.c */
int tb_states_start(struct tb_grammar *g, uint32_t root);
uint32_t tb_states_step(struct tb_grammar *g, uint32_t state, unsigned char byte);
size_t tb_states_bytes(const struct tb_grammar *g);       /* of frames and states */
void tb_states_count(struct tb_grammar *g, size_t bytes); /* of anything that the grammar holds */

/* ---- vocab.c */
struct tb_token_list { /* by bytes */
    int32_t n;
    int32_t *ids;     /* [n] */
    uint16_t *shared; /* [n] bytes in common with the one before */
    uint32_t *at;     /* [n + 1] the others, in bytes */
    uint8_t *bytes;
};

/* Most tokens are plain: whole characters that stand for themselves in a string of JSON. Inside of
 * one they are allowed by their number of characters, so nothing has to be walked. */
#define TB_GRAMMAR_PLAIN 16 /* characters; longer ones count as rough */
struct tb_vocab {
    _Atomic int refs;
    const struct tb_tokenizer *t;
    _Atomic size_t grammar_bytes; /* of the grammars that live */
    size_t max_grammar_bytes;     /* TB_VOCAB_GRAMMAR_BYTES; tests set less */
    int32_t n;                    /* columns */
    int32_t longest;
    struct tb_token_list all, rough;       /* with bytes; of these, those that are not plain */
    uint64_t *plain[TB_GRAMMAR_PLAIN + 1]; /* by characters: bits [n]; NULL: there are none */
};

/* ---- json.c: rules of JSON. The space between tokens of JSON is at most one blank, or a line's
 * end and an indent. */
struct tb_json_rules {
    uint32_t space;
    uint32_t wide;      /* a character beyond ASCII */
    uint32_t plain;     /* a character that stands for itself in a string */
    uint32_t character; /* of a string, escapes included */
    uint32_t string, number, integer, boolean, null;
    uint32_t value, object, array; /* anything */
};
void tb_json_rules_make(struct tb_grammar *g, struct tb_json_rules *r);
/* "x": of characters between min and max */
uint32_t tb_json_rule_string(struct tb_grammar *g, uint32_t character, uint32_t min, uint32_t max);
uint32_t tb_json_rule_list(struct tb_grammar *g, const struct tb_json_rules *r, const char *open,
                           uint32_t item, uint32_t min, uint32_t max, const char *close);
/* Integers from lo to hi, both within 18 digits. */
uint32_t tb_json_rule_integer(struct tb_grammar *g, int64_t lo, int64_t hi);
#define TB_JSON_INTEGER_MAX 999999999999999999LL

/* ---- pattern.c */
/* A string (with its quotes) that a regular expression matches: characters, classes, groups,
 * choices, repetitions, anchors at both ends. */
int tb_json_rule_pattern(struct tb_grammar *g, const struct tb_json_rules *r, struct tb_span re,
                         uint32_t *out, struct tb_error *err);

#endif
