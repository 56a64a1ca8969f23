/*
 * What the files of the custom-loss interpreter share: values, tensors, the tape, and the table of
 * operations.
 *
 * A tensor's elements are cells of eight bytes, dense and row-major: doubles for float types (held
 * to float32 by rounding) and int64 for bool and int. Every operation that has a derivative leaves
 * a step on the tape; steps run backwards once. Composite operations are written with the
 * primitives and need no derivative of their own.
 *
 * Functions that return a tensor return NULL on failure, with the run's error set.
 *
 * Owner: a run's arena owns all that it makes. Thread: a run has one.
 */
#ifndef TB_MODEL_CUSTOM_CUSTOM_H
#define TB_MODEL_CUSTOM_CUSTOM_H

#include <math.h>

#include "model/custom/graph.h"
#include "util/arena.h"

#define TB_G_RANK     8           /* dimensions of a tensor */
#define TB_G_PARAMS   16          /* parameters of an operation */
#define TB_G_ELEMENTS (1ll << 28) /* of a tensor; positions fit an int32 */

enum tb_gtype { TB_GT_BOOL, TB_GT_INT, TB_GT_F32, TB_GT_F64 };

struct tb_gtensor {
    enum tb_gtype type;
    int rank;
    bool weak;  /* made from a Python number: gives way in type promotion */
    bool needs; /* a derivative may flow through it */
    int64_t shape[TB_G_RANK];
    int64_t n;
    union {
        double *f;
        int64_t *i;
    };
    double *g; /* derivative of the loss, NULL until one arrives */
};

enum tb_gkind {
    TB_GV_ABSENT,
    TB_GV_NONE,
    TB_GV_BOOL,
    TB_GV_INT,
    TB_GV_FLOAT,
    TB_GV_STR,
    TB_GV_LIST,  /* list or tuple */
    TB_GV_SLICE, /* list.v[3] */
    TB_GV_ELLIPSIS,
    TB_GV_DTYPE,
    TB_GV_OTHER, /* device, layout, memory_format: of no consequence here */
    TB_GV_REF,   /* only in a node's arguments */
    TB_GV_TENSOR,
};

struct tb_gvalue {
    enum tb_gkind kind;
    bool named; /* a list with values and indices, as max(dim) returns */
    bool tuple; /* a list that was a tuple: as an index, several */
    union {
        bool b;
        int64_t i;
        double f;
        const char *s;
        enum tb_gtype type;
        int ref;
        struct tb_gtensor *t;
        struct {
            struct tb_gvalue *v;
            int n;
        } list;
    };
};

struct tb_grun;

/* One operation. Its names are separated by spaces; ".x" is a method. Parameters likewise: "x"
 * must be given, "?x" may be, "*x" takes the positional arguments that are left, "!x" may only have
 * a value that changes nothing (null, false or the default after '='), "~x" is ignored. */
struct tb_gop {
    const char *names;
    const char *params;
    int (*run)(struct tb_grun *r, struct tb_gvalue *out);
    const void *p; /* of the family: a row of another table */
};

struct tb_gops {
    const struct tb_gop *rows;
    int n;
};
extern const struct tb_gops tb_gops_unary, tb_gops_binary, tb_gops_reduce, tb_gops_order,
    tb_gops_shape, tb_gops_make, tb_gops_product, tb_gops_nn, tb_gops_scalar;

struct tb_gnode {
    const char *name, *target;
    const struct tb_gop *op; /* NULL: placeholder */
    int input;               /* of a placeholder */
    bool on_logprobs;        /* depends on logprobs */
    struct tb_gvalue *args;  /* one for each parameter of op */
};

struct tb_ginput {
    const char *name;
    int rank;
};

struct tb_gmetric {
    const char *key;
    bool mean;
    int node;
};

struct tb_graph {
    struct tb_arena arena;
    int n_inputs, n_nodes, n_metrics;
    struct tb_ginput inputs[TB_GRAPH_MAX_INPUTS];
    struct tb_gnode *nodes; /* without the output node */
    struct tb_gmetric *metrics;
    int loss;
    int n_args;
};

/* A step of the tape; what a step needs beyond its tensors is its own business. */
struct tb_gstep {
    struct tb_gstep *before;
    int node; /* that made it */
    /* Adds to the g of its inputs from out->g; 0 or the run's error. */
    int (*back)(struct tb_grun *r, struct tb_gstep *s);
    struct tb_gtensor *out, *a, *b, *c;
    const void *p;
    double d[3];
    int64_t k[2];
    int32_t *map;
    double *aux;
    struct tb_gtensor **many;
};

struct tb_grun {
    const struct tb_graph *graph;
    struct tb_arena arena;
    size_t bytes, max_bytes;
    struct tb_backend *be; /* or NULL */
    size_t charged;        /* of bytes, to be */
    uint64_t work, max_work;
    struct tb_gvalue *values; /* of the nodes so far */
    int node;                 /* being evaluated */
    const struct tb_gop *op;
    struct tb_gvalue args[TB_G_PARAMS]; /* of that node, references resolved */
    struct tb_gstep *tape;
    struct tb_error *err;
    int rc;
};

/* ---- run: errors, memory, work (eval.c) */
int tb_gfail(struct tb_grun *r, int code, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
void *tb_galloc(struct tb_grun *r, int64_t n, size_t size); /* not cleared */
int tb_gwork(struct tb_grun *r, int64_t n);

/* ---- operations (parse.c) */
const struct tb_gop *tb_gop_find(const char *target, bool method);
/* Name of parameter i, cut into buf. */
const char *tb_gop_param(const struct tb_gop *op, int i, char buf[32]);

/* ---- arguments of the node being evaluated (value.c) */
bool tb_garg_given(const struct tb_grun *r, int i); /* not absent and not None */
bool tb_garg_is_tensor(const struct tb_grun *r, int i);
int tb_garg_bool(struct tb_grun *r, int i, bool *out); /* keeps *out when not given */
int tb_garg_int(struct tb_grun *r, int i, int64_t *out);
int tb_garg_double(struct tb_grun *r, int i, double *out);
int tb_garg_str(struct tb_grun *r, int i, const char **out);
int tb_garg_type(struct tb_grun *r, int i, enum tb_gtype *out);
/* A number, or a list of them: *n is -1 when not given. */
int tb_garg_ints(struct tb_grun *r, int i, int max, int64_t *out, int *n);
int tb_garg_dim(struct tb_grun *r, int i, int rank, int *dim); /* made positive */
struct tb_gtensor *tb_garg_tensor(struct tb_grun *r, int i);   /* a tensor only */
struct tb_gtensor *tb_garg_operand(struct tb_grun *r, int i);  /* or a number, made weak */
int tb_gvalue_int(struct tb_grun *r, const struct tb_gvalue *v, const char *what, int64_t *out);
int tb_gvalue_double(struct tb_grun *r, const struct tb_gvalue *v, const char *what, double *out);
int tb_gdim(struct tb_grun *r, int64_t dim, int rank, int *out);
const char *tb_gkind_name(const struct tb_gvalue *v);
static inline bool tb_gvalue_is_number(const struct tb_gvalue *v)
{
    return v->kind == TB_GV_BOOL || v->kind == TB_GV_INT || v->kind == TB_GV_FLOAT;
}
int tb_gout(struct tb_grun *r, struct tb_gvalue *out, struct tb_gtensor *t); /* t NULL: failed */
int tb_gout_pair(struct tb_grun *r, struct tb_gvalue *out, struct tb_gtensor *values,
                 struct tb_gtensor *indices);
void tb_gout_int(struct tb_gvalue *out, int64_t v);
void tb_gout_bool(struct tb_gvalue *out, bool v);

/* ---- tensors (tensor.c) */
static inline bool tb_gt_is_float(enum tb_gtype t)
{
    return t >= TB_GT_F32;
}
static inline double tb_ground(enum tb_gtype t, double v)
{
    return t == TB_GT_F32 ? (double)(float)v : v;
}
static inline double tb_gt_at(const struct tb_gtensor *t, int64_t i)
{
    return tb_gt_is_float(t->type) ? t->f[i] : (double)t->i[i];
}
/* As a C cast, without its undefined cases. */
static inline int64_t tb_gto_int(double v)
{
    return v >= -9.2e18 && v <= 9.2e18 ? (int64_t)v : INT64_MIN;
}
const char *tb_gtype_name(enum tb_gtype t);
const char *tb_gshape(const struct tb_gtensor *t, char buf[96]); /* "[2, 3]" */
struct tb_gtensor *tb_gt_new(struct tb_grun *r, enum tb_gtype type, int rank, const int64_t *shape);
struct tb_gtensor *tb_gt_like(struct tb_grun *r, enum tb_gtype type, const struct tb_gtensor *x);
struct tb_gtensor *tb_gt_number(struct tb_grun *r, double v); /* weak float */
struct tb_gtensor *tb_gt_int(struct tb_grun *r, int64_t v);   /* weak int */
void tb_gt_fill(struct tb_gtensor *t, double v);
double *tb_gt_grad(struct tb_grun *r, struct tb_gtensor *t); /* cleared when new */
/* A step for out, when an input needs one; NULL when none is needed or memory is out (r->rc). */
struct tb_gstep *tb_gt_step(struct tb_grun *r, struct tb_gtensor *out, struct tb_gtensor *a,
                            struct tb_gtensor *b, struct tb_gtensor *c,
                            int (*back)(struct tb_grun *, struct tb_gstep *));
enum tb_gtype tb_gt_promote(const struct tb_gtensor *const *t, int n);
struct tb_gtensor *tb_gt_cast(struct tb_grun *r, struct tb_gtensor *x, enum tb_gtype type);
struct tb_gtensor *tb_gt_detach(struct tb_grun *r, struct tb_gtensor *x);
/* The same cells in another shape of as many elements. */
struct tb_gtensor *tb_gt_view(struct tb_grun *r, struct tb_gtensor *x, int rank,
                              const int64_t *shape);
/* out[i] = x[map[i]], or fill where map[i] < 0; the one primitive of indexing. */
struct tb_gtensor *tb_gt_pick(struct tb_grun *r, struct tb_gtensor *x, int rank,
                              const int64_t *shape, int32_t *map, double fill);
int tb_gt_broadcast(struct tb_grun *r, const struct tb_gtensor *const *t, int n, int *rank,
                    int64_t *shape);
struct tb_gtensor *tb_gt_expand(struct tb_grun *r, struct tb_gtensor *x, int rank,
                                const int64_t *shape);

/* Runs over a shape with up to four operands: rows of len elements at at[k], in steps of in[k]. */
struct tb_gwalk {
    int rank, n;
    int64_t len, left;
    int64_t shape[TB_G_RANK], pos[TB_G_RANK], step[4][TB_G_RANK];
    int64_t at[4], in[4];
};
/* Strides of x under a broadcast to rank; 0 where it is spread. */
void tb_gt_strides(const struct tb_gtensor *x, int rank, int64_t *out);
void tb_gwalk_init(struct tb_gwalk *w, int rank, const int64_t *shape, int n,
                   int64_t strides[][TB_G_RANK]);
void tb_gwalk_next(struct tb_gwalk *w);

/* ---- elementwise (unary.c, binary.c) */
static inline double tb_gsign(double x)
{
    return (double)((x > 0) - (x < 0));
}
static inline double tb_gsigmoid(double x)
{
    return x >= 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x));
}
enum tb_gbinary {
    TB_GB_ADD,
    TB_GB_SUB,
    TB_GB_MUL,
    TB_GB_DIV,
    TB_GB_FLOORDIV,
    TB_GB_MOD,
    TB_GB_POW,
    TB_GB_GT,
    TB_GB_GE,
    TB_GB_LT,
    TB_GB_LE,
    TB_GB_EQ,
    TB_GB_NE,
    TB_GB_AND,
    TB_GB_OR,
    TB_GB_XOR,
    TB_GB_FMOD,
    TB_GB_MIN,
    TB_GB_MAX,
    TB_GB_CLAMP_MIN,
    TB_GB_CLAMP_MAX,
    TB_GB_ATAN2,
    TB_GB_HYPOT,
    TB_GB_LOGADDEXP,
    TB_GB_XLOGY,
    TB_GB_LAND,
    TB_GB_LOR,
    TB_GB_LXOR,
    TB_GB_SQ_DIFF,
    TB_GB_ABS_DIFF,
    TB_GB_HUBER,
    TB_GB_SMOOTH_L1,
    TB_GB_BCE,
    TB_GB_N,
};
enum tb_gunary {
    TB_GU_NEG,
    TB_GU_ABS,
    TB_GU_EXP,
    TB_GU_LOG,
    TB_GU_LOG1P,
    TB_GU_SQRT,
    TB_GU_SIGMOID,
    TB_GU_LOGSIGMOID,
    TB_GU_TRUNC,
    TB_GU_NOT,
    TB_GU_N_NAMED,
};
struct tb_gtensor *tb_gt_binary(struct tb_grun *r, enum tb_gbinary k, struct tb_gtensor *a,
                                struct tb_gtensor *b, double param);
struct tb_gtensor *tb_gt_unary(struct tb_grun *r, enum tb_gunary k, struct tb_gtensor *x);
struct tb_gtensor *tb_gt_where(struct tb_grun *r, struct tb_gtensor *c, struct tb_gtensor *a,
                               struct tb_gtensor *b, enum tb_gtype type);

/* ---- reductions (reduce.c); dims: a bit for each dimension reduced */
enum tb_greduce { TB_GR_SUM, TB_GR_MEAN };
unsigned tb_gt_all_dims(const struct tb_gtensor *x);
struct tb_gtensor *tb_gt_reduce(struct tb_grun *r, enum tb_greduce k, struct tb_gtensor *x,
                                unsigned dims, bool keep);
struct tb_gtensor *tb_gt_norm(struct tb_grun *r, struct tb_gtensor *x, double p, unsigned dims,
                              bool keep);
struct tb_gtensor *tb_gt_softmax(struct tb_grun *r, struct tb_gtensor *x, int dim, bool logs);

/* ---- along one dimension (order.c): lanes of len elements, stride apart */
struct tb_glanes {
    int64_t outer, len, stride;
};
struct tb_glanes tb_glanes_of(const struct tb_gtensor *x, int dim);

/* ---- indexing (index.c) */
int tb_gt_getitem(struct tb_grun *r, struct tb_gtensor *x, const struct tb_gvalue *index,
                  struct tb_gvalue *out);
/* Elements [from, from + len) of a dimension. */
struct tb_gtensor *tb_gt_narrow(struct tb_grun *r, struct tb_gtensor *x, int dim, int64_t from,
                                int64_t len);
int tb_gslice(struct tb_grun *r, const struct tb_gvalue *s, int64_t n, int64_t *start,
              int64_t *step, int64_t *len);

/* ---- Python numbers (scalar.c) */
int tb_gscalar_binary(struct tb_grun *r, enum tb_gbinary k, const struct tb_gvalue *a,
                      const struct tb_gvalue *b, struct tb_gvalue *out);
int tb_gscalar_unary(struct tb_grun *r, enum tb_gunary k, const struct tb_gvalue *a,
                     struct tb_gvalue *out);

#endif
