/*
 * A graph from JSON: format, inputs, nodes in execution order, arguments' encodings, the output and
 * its metric keys. What is refused here is refused by name of node and operation, before anything
 * is evaluated. References only go back, so there are no cycles and evaluation is one loop.
 *
 * Owner: the graph's arena. Thread: the creator's.
 */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/custom/custom.h"
#include "util/map.h"
#include "util/mem.h"
#include "wire/json.h"

#define MAX_DEPTH   8 /* of lists in arguments */
#define MAX_METRICS 256
#define MAX_TEXT    256

struct parse {
    struct tb_graph *g;
    struct tb_map names; /* node name -> 1 + its index */
    struct tb_arena tmp;
    struct tb_error *err;
    const char *node, *target; /* for messages */
    bool on_logprobs;          /* some reference of the node does */
};

/* ---- the table of operations */

static const struct tb_gops *const families[] = {
    &tb_gops_unary, &tb_gops_binary,  &tb_gops_reduce, &tb_gops_order, &tb_gops_shape,
    &tb_gops_make,  &tb_gops_product, &tb_gops_nn,     &tb_gops_scalar};

static bool has_word(const char *words, const char *w, size_t n)
{
    for (const char *p = words; *p;) {
        size_t len = strcspn(p, " ");
        if (len == n && !memcmp(p, w, n)) return true;
        p += len;
        p += strspn(p, " ");
    }
    return false;
}

const struct tb_gop *tb_gop_find(const char *target, bool method)
{
    char name[TB_GRAPH_MAX_NAME + 2];
    size_t n = strlen(target);
    if (n == 0 || n > TB_GRAPH_MAX_NAME || target[0] == '.' || strchr(target, ' ')) return NULL;
    name[0] = '.';
    memcpy(name + 1, target, n + 1);
    for (size_t f = 0; f < TB_ARRAY_LEN(families); f++)
        for (int i = 0; i < families[f]->n; i++)
            if (has_word(families[f]->rows[i].names, method ? name : target, method ? n + 1 : n))
                return &families[f]->rows[i];
    return NULL;
}

struct param {
    const char *name; /* not terminated */
    size_t n;
    char kind;        /* '!', '?', '*', '~' or 0: must be given */
    const char *same; /* after '=', with its length */
    size_t same_n;
};

static int split_params(const struct tb_gop *op, struct param *out)
{
    int n = 0;
    for (const char *p = op->params; *p && n < TB_G_PARAMS; n++) {
        struct param *q = &out[n];
        *q = (struct param){0};
        if (strchr("!?*~", *p)) q->kind = *p++;
        q->name = p;
        q->n = strcspn(p, " =");
        p += q->n;
        if (*p == '=') {
            q->same = ++p;
            q->same_n = strcspn(p, " ");
            p += q->same_n;
        }
        p += strspn(p, " ");
    }
    return n;
}

const char *tb_gop_param(const struct tb_gop *op, int i, char buf[32])
{
    struct param p[TB_G_PARAMS];
    size_t n = 0;
    if (i < split_params(op, p)) {
        n = TB_MIN(p[i].n, (size_t)31);
        memcpy(buf, p[i].name, n);
    }
    buf[n] = 0;
    return buf;
}

/* ---- arguments */

static int refuse(struct parse *p, int code, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

static int refuse(struct parse *p, int code, const char *fmt, ...)
{
    char msg[384];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(msg, sizeof(msg), fmt, ap);
    va_end(ap);
    return tb_error_set(p->err, code, "graph node %s (%s): %s", p->node, p->target, msg);
}

static int count_arg(struct parse *p)
{
    if (++p->g->n_args <= TB_GRAPH_MAX_ARGS) return 0;
    return refuse(p, TB_ETOOBIG, "the graph has more than %d arguments", TB_GRAPH_MAX_ARGS);
}

static int parse_value(struct parse *p, const struct tb_json *j, int depth, struct tb_gvalue *out);

static int parse_list(struct parse *p, const struct tb_json *j, int depth, struct tb_gvalue *out)
{
    if (!tb_json_is_array(j)) return refuse(p, TB_EINVAL, "a tuple must be an array");
    if (depth >= MAX_DEPTH) return refuse(p, TB_EINVAL, "arguments are nested too deep");
    size_t n = tb_json_len(j);
    if (n > TB_GRAPH_MAX_ARGS) return refuse(p, TB_ETOOBIG, "a list of %zu values", n);
    *out = (struct tb_gvalue){.kind = TB_GV_LIST};
    out->list.n = (int)n;
    out->list.v = tb_arena_try_array(&p->g->arena, n + 1, sizeof(*out->list.v));
    if (!out->list.v) return refuse(p, TB_ENOMEM, "no memory for its arguments");
    int rc = 0;
    for (size_t i = 0; i < n && !rc; i++) {
        struct tb_json at;
        tb_json_at(j, i, &at);
        rc = parse_value(p, &at, depth + 1, &out->list.v[i]);
    }
    return rc;
}

static int parse_text(struct parse *p, const struct tb_json *j, const char *what, const char **out)
{
    struct tb_error e = {0};
    if (!tb_json_is_string(j)) return refuse(p, TB_EINVAL, "%s must be a string", what);
    if (tb_json_as_string(j, &p->g->arena, MAX_TEXT, out, &e))
        return refuse(p, TB_EINVAL, "%s is too long", what);
    return 0;
}

static int parse_ref(struct parse *p, const struct tb_json *j, struct tb_gvalue *out)
{
    const char *name;
    int rc = parse_text(p, j, "ref", &name);
    if (rc) return rc;
    void *at = tb_map_get(&p->names, name, strlen(name));
    if (!at) return refuse(p, TB_EINVAL, "refers to %.64s, which no earlier node has", name);
    *out = (struct tb_gvalue){.kind = TB_GV_REF, .ref = (int)((intptr_t)at - 1)};
    p->on_logprobs |= p->g->nodes[out->ref].on_logprobs;
    return 0;
}

static int parse_dtype(struct parse *p, const struct tb_json *j, struct tb_gvalue *out)
{
    static const struct {
        const char *name;
        enum tb_gtype type;
    } types[] = {{"float32", TB_GT_F32}, {"float", TB_GT_F32}, {"float64", TB_GT_F64},
                 {"double", TB_GT_F64},  {"int64", TB_GT_INT}, {"long", TB_GT_INT},
                 {"int32", TB_GT_INT},   {"int", TB_GT_INT},   {"bool", TB_GT_BOOL}};
    const char *s;
    int rc = parse_text(p, j, "dtype", &s);
    for (size_t i = 0; i < TB_ARRAY_LEN(types) && !rc; i++)
        if (!strcmp(s, types[i].name)) {
            *out = (struct tb_gvalue){.kind = TB_GV_DTYPE, .type = types[i].type};
            return 0;
        }
    if (rc) return rc;
    return refuse(p, TB_EUNSUPPORTED, "dtype %.32s is not supported", s);
}

static int parse_float(struct parse *p, const struct tb_json *j, struct tb_gvalue *out)
{
    const char *s;
    int rc = parse_text(p, j, "float", &s);
    if (rc) return rc;
    *out = (struct tb_gvalue){.kind = TB_GV_FLOAT};
    if (!strcmp(s, "inf"))
        out->f = INFINITY;
    else if (!strcmp(s, "-inf"))
        out->f = -INFINITY;
    else if (!strcmp(s, "nan"))
        out->f = NAN;
    else
        return refuse(p, TB_EINVAL, "float must be inf, -inf or nan, not %.32s", s);
    return 0;
}

/* A one-key object. */
static int parse_tagged(struct parse *p, const struct tb_json *j, int depth, struct tb_gvalue *out)
{
    struct tb_json v;
    void *it = NULL;
    if (tb_json_len(j) != 1 || !tb_json_next(j, &it, &v))
        return refuse(p, TB_EINVAL, "an argument that is an object must have exactly one key");
    const char *tag = v.key;
    if (!strcmp(tag, "ref")) return parse_ref(p, &v, out);
    if (!strcmp(tag, "tuple")) {
        int rc = parse_list(p, &v, depth, out);
        out->tuple = true;
        return rc;
    }
    if (!strcmp(tag, "dtype")) return parse_dtype(p, &v, out);
    if (!strcmp(tag, "float")) return parse_float(p, &v, out);
    if (!strcmp(tag, "slice")) {
        int rc = parse_list(p, &v, depth, out);
        if (!rc && out->list.n != 3) rc = refuse(p, TB_EINVAL, "a slice has three parts");
        out->kind = TB_GV_SLICE;
        return rc;
    }
    if (!strcmp(tag, "ellipsis")) {
        *out = (struct tb_gvalue){.kind = TB_GV_ELLIPSIS};
        return 0;
    }
    if (!strcmp(tag, "device") || !strcmp(tag, "layout") || !strcmp(tag, "memory_format")) {
        *out = (struct tb_gvalue){.kind = TB_GV_OTHER};
        return parse_text(p, &v, tag, &out->s);
    }
    if (!strcmp(tag, "dict")) return refuse(p, TB_EUNSUPPORTED, "a dict is no argument here");
    return refuse(p, TB_EINVAL, "unknown argument encoding %.32s", tag);
}

static int parse_value(struct parse *p, const struct tb_json *j, int depth, struct tb_gvalue *out)
{
    int rc = count_arg(p);
    if (rc) return rc;
    struct tb_error e = {0};
    *out = (struct tb_gvalue){.kind = TB_GV_NONE};
    if (!j->v) return 0;
    if (tb_json_is_array(j)) return parse_list(p, j, depth, out);
    if (tb_json_is_object(j)) return parse_tagged(p, j, depth, out);
    if (tb_json_is_bool(j)) {
        out->kind = TB_GV_BOOL;
        rc = tb_json_as_bool(j, &out->b, &e);
    } else if (tb_json_is_int(j)) {
        out->kind = TB_GV_INT;
        rc = tb_json_as_int(j, INT64_MIN, INT64_MAX, &out->i, &e);
    } else if (tb_json_is_number(j)) {
        out->kind = TB_GV_FLOAT;
        rc = tb_json_as_double(j, -INFINITY, INFINITY, &out->f, &e);
    } else {
        out->kind = TB_GV_STR;
        return parse_text(p, j, "a string argument", &out->s);
    }
    return rc ? refuse(p, rc, "%s", e.msg) : 0;
}

/* ---- binding arguments to parameters */

/* A '!' parameter's value must be what the default does. */
static bool changes_nothing(const struct param *q, const struct tb_gvalue *v)
{
    if (v->kind == TB_GV_NONE) return true;
    if (v->kind == TB_GV_BOOL)
        return q->same ? (v->b && q->same_n == 4 && !memcmp(q->same, "true", 4)) : !v->b;
    if (!q->same) return false;
    if (v->kind == TB_GV_STR) return strlen(v->s) == q->same_n && !memcmp(v->s, q->same, q->same_n);
    double want = strtod(q->same, NULL);
    return (v->kind == TB_GV_INT && (double)v->i == want) ||
           (v->kind == TB_GV_FLOAT && v->f == want);
}

static int put_arg(struct parse *p, const struct param *q, struct tb_gvalue *slot,
                   const struct tb_gvalue *v)
{
    if (slot->kind != TB_GV_ABSENT)
        return refuse(p, TB_EINVAL, "%.*s is given twice", (int)q->n, q->name);
    if (q->kind == '~') return 0;
    if (q->kind == '!' && !changes_nothing(q, v))
        return refuse(p, TB_EUNSUPPORTED, "its argument %.*s is not supported", (int)q->n, q->name);
    *slot = *v;
    return 0;
}

static int bind_positional(struct parse *p, const struct tb_json *args, const struct param *params,
                           int n_params, struct tb_gvalue *slots)
{
    struct tb_gvalue list;
    int rc = parse_list(p, args, 0, &list), q = 0;
    for (int i = 0; i < list.list.n && !rc; i++) {
        if (q == n_params) return refuse(p, TB_EINVAL, "takes at most %d arguments", n_params);
        if (params[q].kind == '*') {
            slots[q] = (struct tb_gvalue){.kind = TB_GV_LIST};
            slots[q].list.v = list.list.v + i;
            slots[q].list.n = list.list.n - i;
            return 0;
        }
        rc = put_arg(p, &params[q], &slots[q], &list.list.v[i]);
        q++;
    }
    return rc;
}

static int bind_named(struct parse *p, const struct tb_json *kwargs, const struct param *params,
                      int n_params, struct tb_gvalue *slots)
{
    static const char *const same[][2] = {
        {"axis", "dim"}, {"keepdims", "keepdim"}, {"self", "input"}, {"ddof", "correction"}};
    struct tb_json v;
    void *it = NULL;
    while (tb_json_next(kwargs, &it, &v)) {
        const char *key = v.key;
        struct tb_gvalue value;
        int q = -1, rc;
        for (size_t a = 0; a <= TB_ARRAY_LEN(same) && q < 0; a++) {
            if (a && strcmp(v.key, same[a - 1][0])) continue;
            key = a ? same[a - 1][1] : v.key;
            for (int i = 0; i < n_params && q < 0; i++)
                if (strlen(key) == params[i].n && !memcmp(key, params[i].name, params[i].n)) q = i;
        }
        if (q < 0) return refuse(p, TB_EUNSUPPORTED, "has no argument %.32s here", v.key);
        if ((rc = parse_value(p, &v, 1, &value))) return rc;
        if (params[q].kind == '*' && value.kind != TB_GV_LIST) {
            struct tb_gvalue *one = tb_arena_alloc(&p->g->arena, sizeof(*one));
            *one = value;
            value = (struct tb_gvalue){.kind = TB_GV_LIST};
            value.list.v = one;
            value.list.n = 1;
        }
        if ((rc = put_arg(p, &params[q], &slots[q], &value))) return rc;
    }
    return 0;
}

static int bind(struct parse *p, const struct tb_json *node, struct tb_gnode *out)
{
    struct param params[TB_G_PARAMS];
    struct tb_json args, kwargs;
    int n = split_params(out->op, params);
    int rc = tb_json_array(node, "args", true, &args, p->err);
    if (!rc) rc = tb_json_object(node, "kwargs", false, &kwargs, p->err);
    if (rc) return rc;
    out->args = tb_arena_calloc(&p->g->arena, TB_G_PARAMS, sizeof(*out->args));
    rc = bind_positional(p, &args, params, n, out->args);
    if (!rc && kwargs.v) rc = bind_named(p, &kwargs, params, n, out->args);
    for (int i = 0; i < n && !rc; i++)
        if (!params[i].kind && out->args[i].kind == TB_GV_ABSENT)
            rc = refuse(p, TB_EINVAL, "lacks its argument %.*s", (int)params[i].n, params[i].name);
    return rc;
}

/* ---- nodes */

static bool is_word(const char *s, bool lower)
{
    size_t n = strlen(s);
    if (n == 0 || n > TB_GRAPH_MAX_NAME || (s[0] >= '0' && s[0] <= '9')) return false;
    for (; *s; s++)
        if (!((*s >= 'a' && *s <= 'z') || (*s >= '0' && *s <= '9') || *s == '_' ||
              (!lower && *s >= 'A' && *s <= 'Z')))
            return false;
    return true;
}

static int parse_placeholder(struct parse *p, const struct tb_json *node, struct tb_gnode *out)
{
    struct tb_json args;
    if (tb_json_find(node, "args", &args) && tb_json_len(&args))
        return refuse(p, TB_EUNSUPPORTED, "an input has no default");
    out->input = -1;
    for (int i = 0; i < p->g->n_inputs; i++)
        if (!strcmp(out->target, p->g->inputs[i].name)) out->input = i;
    if (out->input < 0) return refuse(p, TB_EINVAL, "is not among the inputs");
    for (struct tb_gnode *n = p->g->nodes; n < out; n++)
        if (!n->op && n->input == out->input) return refuse(p, TB_EINVAL, "is there twice");
    out->on_logprobs = out->input == 0;
    return 0;
}

static bool is_metric_key(const char *s)
{
    if (strncmp(s, "custom/", 7)) return false;
    s += 7;
    size_t n = strspn(s, "abcdefghijklmnopqrstuvwxyz0123456789_./-");
    return n >= 1 && n <= 64 && (!strcmp(s + n, ":sum") || !strcmp(s + n, ":mean"));
}

static int parse_metrics(struct parse *p, const struct tb_json *dict)
{
    struct tb_graph *g = p->g;
    struct tb_json v;
    void *it = NULL;
    size_t n = tb_json_len(dict);
    if (n > MAX_METRICS) return refuse(p, TB_ETOOBIG, "more than %d metrics", MAX_METRICS);
    g->metrics = tb_arena_calloc(&g->arena, n + 1, sizeof(*g->metrics));
    while (tb_json_next(dict, &it, &v)) {
        struct tb_gvalue ref;
        struct tb_gmetric *m = &g->metrics[g->n_metrics];
        if (!is_metric_key(v.key))
            return refuse(p, TB_EINVAL,
                          "metric %.80s must be named custom/<name>:sum or custom/<name>:mean",
                          v.key);
        int rc = parse_value(p, &v, 1, &ref);
        if (rc) return rc;
        if (ref.kind != TB_GV_REF) return refuse(p, TB_EINVAL, "metric %s must be a node", v.key);
        m->key = tb_arena_strdup(&g->arena, v.key);
        m->mean = !strcmp(v.key + strlen(v.key) - 5, ":mean");
        m->node = ref.ref;
        g->n_metrics++;
    }
    if ((size_t)g->n_metrics != n) return refuse(p, TB_EINVAL, "a metric is null");
    return 0;
}

/* args is one tuple (loss, metrics). */
static int parse_output(struct parse *p, const struct tb_json *node)
{
    struct tb_json args, pair, inner, loss, metrics, dict;
    void *it = NULL;
    struct tb_gvalue ref;
    int rc = tb_json_array(node, "args", true, &args, p->err);
    if (rc) return rc;
    tb_json_at(&args, 0, &pair);
    if (tb_json_is_object(&pair) && tb_json_find(&pair, "tuple", &inner)) pair = inner;
    if (tb_json_len(&args) != 1 || !tb_json_is_array(&pair) || tb_json_len(&pair) != 2)
        return refuse(p, TB_EINVAL, "must return a tuple of the loss and a dict of metrics");
    tb_json_at(&pair, 0, &loss);
    tb_json_at(&pair, 1, &metrics);
    p->on_logprobs = false;
    if ((rc = parse_value(p, &loss, 1, &ref))) return rc;
    if (ref.kind != TB_GV_REF) return refuse(p, TB_EINVAL, "the loss must be a node");
    if (!p->on_logprobs) return refuse(p, TB_EINVAL, "the loss does not depend on logprobs");
    p->g->loss = ref.ref;
    if (!tb_json_is_object(&metrics) || tb_json_len(&metrics) != 1 ||
        !tb_json_next(&metrics, &it, &dict) || strcmp(dict.key, "dict") ||
        !tb_json_is_object(&dict))
        return refuse(p, TB_EINVAL, "must return a tuple of the loss and a dict of metrics");
    return parse_metrics(p, &dict);
}

/* *last: it was the output. */
static int parse_node(struct parse *p, const struct tb_json *node, bool *last)
{
    struct tb_graph *g = p->g;
    struct tb_gnode *out = &g->nodes[g->n_nodes];
    const char *kind;
    int rc = tb_json_string(node, "op", true, &p->tmp, MAX_TEXT, &kind, p->err);
    if (!rc)
        rc = tb_json_string(node, "name", true, &g->arena, TB_GRAPH_MAX_NAME, &out->name, p->err);
    if (!rc)
        rc = tb_json_string(node, "target", true, &g->arena, TB_GRAPH_MAX_NAME, &out->target,
                            p->err);
    if (rc) return rc;
    if (!is_word(out->name, false))
        return tb_json_fail(node, p->err, TB_EINVAL, "name must be a word");
    p->node = out->name;
    p->target = out->target;
    p->on_logprobs = false;
    if (tb_map_get(&p->names, out->name, strlen(out->name)))
        return refuse(p, TB_EINVAL, "there is another node of this name");
    bool method = !strcmp(kind, "call_method");
    *last = !strcmp(kind, "output");
    if (*last) return parse_output(p, node);
    if (!strcmp(kind, "placeholder")) {
        rc = parse_placeholder(p, node, out);
    } else if (method || !strcmp(kind, "call_function")) {
        out->op = tb_gop_find(out->target, method);
        if (!out->op)
            return refuse(p, TB_EUNSUPPORTED, "this server has no such %s in custom losses",
                          method ? "method" : "function");
        rc = bind(p, node, out);
        out->on_logprobs = p->on_logprobs;
    } else {
        rc = refuse(p, TB_EUNSUPPORTED, "op %.32s is not allowed in a custom loss", kind);
    }
    if (rc) return rc;
    tb_map_put(&p->names, out->name, strlen(out->name), (void *)(intptr_t)(g->n_nodes + 1));
    g->n_nodes++;
    return 0;
}

static int parse_inputs(struct parse *p, const struct tb_json *root)
{
    struct tb_graph *g = p->g;
    struct tb_json list, item;
    int rc = tb_json_array(root, "inputs", true, &list, p->err);
    if (rc) return rc;
    size_t n = tb_json_len(&list);
    if (n < 1 || n > TB_GRAPH_MAX_INPUTS)
        return tb_json_fail(&list, p->err, TB_EINVAL, "%zu inputs; 1 to %d are allowed", n,
                            TB_GRAPH_MAX_INPUTS);
    for (size_t i = 0; i < n; i++) {
        struct tb_ginput *in = &g->inputs[i];
        int64_t rank;
        tb_json_at(&list, i, &item);
        if (!tb_json_is_object(&item))
            return tb_json_fail(&item, p->err, TB_EINVAL, "must be an object");
        rc = tb_json_string(&item, "name", true, &g->arena, 64, &in->name, p->err);
        if (!rc) rc = tb_json_int(&item, "rank", true, 0, 2, &rank, p->err);
        if (rc) return rc;
        in->rank = (int)rank;
        if (!is_word(in->name, true))
            return tb_json_fail(&item, p->err, TB_EINVAL, "name must be a lowercase word");
        for (size_t k = 0; k < i; k++)
            if (!strcmp(g->inputs[k].name, in->name))
                return tb_json_fail(&item, p->err, TB_EINVAL, "%s is there twice", in->name);
        if ((i == 0) != !strcmp(in->name, "logprobs") || (i == 0 && rank == 0))
            return tb_json_fail(&item, p->err, TB_EINVAL,
                                "the first input, and no other, is logprobs of rank 1 or 2");
        g->n_inputs++;
    }
    return 0;
}

static int parse_root(struct parse *p, const struct tb_json *root)
{
    struct tb_json graph, nodes, node;
    int64_t format;
    int rc = parse_inputs(p, root);
    if (!rc) rc = tb_json_object(root, "graph", true, &graph, p->err);
    if (!rc) rc = tb_json_int(&graph, "format", true, INT64_MIN, INT64_MAX, &format, p->err);
    if (!rc && format != 1)
        rc = tb_json_fail(&graph, p->err, TB_EUNSUPPORTED, "format %lld is unknown; there is 1",
                          (long long)format);
    if (!rc) rc = tb_json_array(&graph, "nodes", true, &nodes, p->err);
    if (rc) return rc;
    size_t n = tb_json_len(&nodes);
    if (n > TB_GRAPH_MAX_NODES)
        return tb_json_fail(&nodes, p->err, TB_ETOOBIG, "%zu nodes; at most %d are allowed", n,
                            TB_GRAPH_MAX_NODES);
    p->g->nodes = tb_arena_calloc(&p->g->arena, n + 1, sizeof(*p->g->nodes));
    bool last = false;
    for (size_t i = 0; i < n; i++) {
        tb_json_at(&nodes, i, &node);
        if (!tb_json_is_object(&node))
            return tb_json_fail(&node, p->err, TB_EINVAL, "must be an object");
        if (last) return tb_json_fail(&node, p->err, TB_EINVAL, "there is a node after the output");
        if ((rc = parse_node(p, &node, &last))) return rc;
    }
    if (!last) return tb_json_fail(&nodes, p->err, TB_EINVAL, "the last node must be the output");
    return 0;
}

int tb_graph_create(struct tb_graph **out, const char *text, size_t n, struct tb_error *err)
{
    struct tb_json_doc doc = {0};
    struct parse p = {.err = err};
    *out = NULL;
    int rc = tb_json_parse(&doc, text, n, err);
    if (rc) return rc;
    p.g = tb_calloc(1, sizeof(*p.g));
    tb_arena_init(&p.g->arena);
    tb_arena_init(&p.tmp);
    tb_map_init(&p.names);
    rc = tb_json_is_object(&doc.root) ? parse_root(&p, &doc.root)
                                      : tb_error_set(err, TB_EINVAL, "a custom loss is an object");
    tb_map_fini(&p.names);
    tb_arena_fini(&p.tmp);
    tb_json_free(&doc);
    if (rc)
        tb_graph_destroy(p.g);
    else
        *out = p.g;
    return rc;
}

void tb_graph_destroy(struct tb_graph *g)
{
    if (!g) return;
    tb_arena_fini(&g->arena);
    tb_free(g);
}

int tb_graph_n_inputs(const struct tb_graph *g)
{
    return g->n_inputs;
}

const char *tb_graph_input(const struct tb_graph *g, int i, int *rank)
{
    if (rank) *rank = g->inputs[i].rank;
    return g->inputs[i].name;
}

int tb_graph_n_metrics(const struct tb_graph *g)
{
    return g->n_metrics;
}

const char *tb_graph_metric(const struct tb_graph *g, int i, bool *is_mean)
{
    if (is_mean) *is_mean = g->metrics[i].mean;
    return g->metrics[i].key;
}
