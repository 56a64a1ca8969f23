/*
 * Evaluation of a checked graph for one datum: nodes in order, then the tape backwards. Memory and
 * work are counted, and what goes over the limits fails the evaluation.
 *
 * Owner: the run's arena, freed at the end. Thread: any, one a run.
 */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "backend/backend.h"
#include "model/custom/custom.h"
#include "util/mem.h"

#define CHARGE_BYTES ((size_t)64 << 10)

int tb_gfail(struct tb_grun *r, int code, const char *fmt, ...)
{
    char msg[384];
    if (r->rc) return r->rc;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(msg, sizeof(msg), fmt, ap);
    va_end(ap);
    const struct tb_gnode *n = &r->graph->nodes[r->node];
    r->rc = tb_error_set(r->err, code, "graph node %s (%s): %s", n->name, n->target, msg);
    return r->rc;
}

/* Counts bytes in all against the backend's limit, some ahead. */
static int charge(struct tb_grun *r, size_t bytes)
{
    if (!r->be || bytes <= r->charged) return 0;
    size_t more = TB_MAX(bytes - r->charged, CHARGE_BYTES);
    struct tb_error e;
    if (tb_backend_charge(r->be, more)) {
        r->charged += more;
        return 0;
    }
    tb_backend_no_memory(r->be, &e, more, "its values");
    return tb_gfail(r, TB_ENOMEM, "%s", e.msg);
}

void *tb_galloc(struct tb_grun *r, int64_t n, size_t size)
{
    size_t bytes;
    if (r->rc) return NULL;
    if (n < 0 || !tb_mul_size((size_t)n, size, &bytes) || bytes > r->max_bytes - r->bytes) {
        tb_gfail(r, TB_ETOOBIG, "the loss needs more than %zu MiB for one datum",
                 r->max_bytes >> 20);
        return NULL;
    }
    if (charge(r, r->bytes + bytes)) return NULL;
    void *p = tb_arena_try_alloc(&r->arena, bytes);
    r->bytes += bytes;
    if (!p) tb_gfail(r, TB_ENOMEM, "no memory for %zu bytes", bytes);
    return p;
}

int tb_gwork(struct tb_grun *r, int64_t n)
{
    if (r->rc) return r->rc;
    if (n < 0 || (uint64_t)n > r->max_work - r->work)
        return tb_gfail(r, TB_ETOOBIG, "the loss needs more than %llu steps for one datum",
                        (unsigned long long)r->max_work);
    r->work += (uint64_t)n;
    return 0;
}

/* ---- inputs */

static const struct tb_tensor *find_input(const struct tb_datum *d, const char *name)
{
    for (int i = 0; i < d->n_inputs; i++)
        if (!strcmp(d->inputs[i].name, name)) return &d->inputs[i];
    return NULL;
}

int tb_graph_check_datum(const struct tb_graph *g, const struct tb_datum *d, bool two_d,
                         struct tb_error *err)
{
    if (g->inputs[0].rank != (two_d ? 2 : 1))
        return tb_error_set(err, TB_EINVAL,
                            "target_tokens has %d dimensions, but the loss declared logprobs of "
                            "rank %d",
                            two_d ? 2 : 1, g->inputs[0].rank);
    for (int i = 1; i < g->n_inputs; i++) {
        const struct tb_tensor *t = find_input(d, g->inputs[i].name);
        if (!t)
            return tb_error_set(err, TB_EINVAL, "loss_fn_inputs has no %s, which the loss takes",
                                g->inputs[i].name);
        if (t->n_dims != g->inputs[i].rank)
            return tb_error_set(err, TB_EINVAL, "%s has %d dimensions, but the loss declared %d",
                                t->name, t->n_dims, g->inputs[i].rank);
    }
    return 0;
}

static struct tb_gtensor *bind_input(struct tb_grun *r, int i, const struct tb_graph_run *run)
{
    if (i == 0) {
        int64_t shape[2] = {run->n, run->k};
        struct tb_gtensor *t = tb_gt_new(r, TB_GT_F32, run->two_d ? 2 : 1, shape);
        if (!t) return NULL;
        for (int64_t k = 0; k < t->n; k++)
            t->f[k] = (double)run->logprobs[k];
        t->needs = run->d_logprobs != NULL;
        return t;
    }
    const struct tb_tensor *in = find_input(run->datum, r->graph->inputs[i].name);
    if (!in) {
        tb_gfail(r, TB_EINVAL, "the datum has no such input");
        return NULL;
    }
    bool ints = in->type == TB_TENSOR_I64;
    struct tb_gtensor *t = tb_gt_new(r, ints ? TB_GT_INT : TB_GT_F32, in->n_dims, in->shape);
    if (!t) return NULL;
    if (t->n != in->n) {
        tb_gfail(r, TB_EINVAL, "the input has %lld elements, its shape says %lld", (long long)in->n,
                 (long long)t->n);
        return NULL;
    }
    for (int64_t k = 0; k < t->n; k++) {
        if (ints)
            t->i[k] = in->data.i64[k];
        else
            t->f[k] = (double)in->data.f32[k];
    }
    return t;
}

/* ---- nodes */

/* An argument with its references replaced; lists are copied. Depth is bounded by the parser. */
static int resolve(struct tb_grun *r, const struct tb_gvalue *a, struct tb_gvalue *out)
{
    *out = *a;
    if (a->kind == TB_GV_REF) {
        *out = r->values[a->ref];
    } else if (a->kind == TB_GV_LIST || a->kind == TB_GV_SLICE) {
        out->list.v = tb_galloc(r, a->list.n, sizeof(*out->list.v));
        if (!out->list.v || tb_gwork(r, a->list.n)) return r->rc;
        for (int i = 0; i < a->list.n; i++)
            if (resolve(r, &a->list.v[i], &out->list.v[i])) return r->rc;
    }
    return 0;
}

static int run_node(struct tb_grun *r, const struct tb_gnode *n, const struct tb_graph_run *run)
{
    struct tb_gvalue *out = &r->values[r->node];
    *out = (struct tb_gvalue){.kind = TB_GV_NONE};
    if (!n->op) return tb_gout(r, out, bind_input(r, n->input, run));
    r->op = n->op;
    for (int i = 0; i < TB_G_PARAMS; i++)
        if (resolve(r, &n->args[i], &r->args[i])) return r->rc;
    int rc = n->op->run(r, out);
    TB_BUG_ON(rc != r->rc);
    return rc;
}

/* ---- results */

/* The first node whose value is not finite while none of what came before was. */
static const struct tb_gnode *first_bad(const struct tb_grun *r)
{
    for (int i = 0; i < r->graph->n_nodes; i++) {
        const struct tb_gvalue *v = &r->values[i];
        if (v->kind != TB_GV_TENSOR || !tb_gt_is_float(v->t->type)) continue;
        for (int64_t k = 0; k < v->t->n; k++)
            if (!isfinite(v->t->f[k])) return &r->graph->nodes[i];
    }
    return &r->graph->nodes[r->graph->loss];
}

static int take_loss(struct tb_grun *r, struct tb_graph_run *run)
{
    const struct tb_gvalue *v = &r->values[r->graph->loss];
    r->node = r->graph->loss;
    if (v->kind != TB_GV_TENSOR || !tb_gt_is_float(v->t->type))
        return tb_gfail(r, TB_EINVAL, "the loss must be a tensor of floats");
    if (v->t->rank != 0) {
        char buf[96];
        return tb_gfail(r, TB_EINVAL, "the loss must be a scalar, not of shape %s",
                        tb_gshape(v->t, buf));
    }
    run->loss = v->t->f[0];
    if (isfinite(run->loss)) return 0;
    const struct tb_gnode *bad = first_bad(r);
    return r->rc = tb_error_set(r->err, TB_ENONFINITE,
                                "the loss is not finite; graph node %s (%s) is the first that is "
                                "not",
                                bad->name, bad->target);
}

static int take_metrics(struct tb_grun *r, struct tb_graph_run *run)
{
    for (int i = 0; i < r->graph->n_metrics; i++) {
        const struct tb_gmetric *m = &r->graph->metrics[i];
        const struct tb_gvalue *v = &r->values[m->node];
        r->node = m->node;
        if (v->kind == TB_GV_TENSOR && v->t->n != 1) {
            char buf[96];
            return tb_gfail(r, TB_EINVAL, "the metric %s must be one number, not of shape %s",
                            m->key, tb_gshape(v->t, buf));
        }
        if (tb_gvalue_double(r, v, m->key, &run->metrics[i])) return r->rc;
    }
    return 0;
}

static int go_back(struct tb_grun *r, struct tb_graph_run *run)
{
    struct tb_gtensor *loss = r->values[r->graph->loss].t;
    size_t n = (size_t)run->n * (size_t)run->k;
    memset(run->d_logprobs, 0, n * sizeof(*run->d_logprobs));
    r->node = r->graph->loss;
    if (!loss->needs) return tb_gfail(r, TB_EINVAL, "the loss does not depend on logprobs");
    if (!tb_gt_grad(r, loss)) return r->rc;
    loss->g[0] = 1;
    for (struct tb_gstep *s = r->tape; s; s = s->before) {
        if (!s->out->g) continue;
        r->node = s->node;
        if (tb_gwork(r, s->out->n + 16) || s->back(r, s)) return r->rc;
    }
    for (int i = 0; i < r->graph->n_nodes; i++) {
        const struct tb_gnode *node = &r->graph->nodes[i];
        const double *g = node->op || node->input ? NULL : r->values[i].t->g;
        for (size_t k = 0; g && k < n; k++) {
            run->d_logprobs[k] = (float)g[k];
            if (!isfinite(run->d_logprobs[k]))
                return r->rc =
                           tb_error_set(r->err, TB_ENONFINITE,
                                        "the derivative of the loss is not finite at position %zu",
                                        k / (size_t)run->k);
        }
    }
    return 0;
}

/* Enough for thousands of operations on n logprobs, and hundreds on pairs of them; a small datum
 * gets little, because a request may have many. */
static uint64_t work_for(uint64_t n)
{
    if (n >= 1 << 16) return TB_GRAPH_MAX_WORK;
    return TB_MIN(TB_GRAPH_MAX_WORK, (1u << 22) + (n << 13) + (n * n << 8));
}

int tb_graph_eval(const struct tb_graph *g, struct tb_graph_run *run, struct tb_error *err)
{
    struct tb_grun r = {.graph = g, .err = err, .be = run->be};
    r.max_bytes = run->max_bytes ? run->max_bytes : TB_GRAPH_MAX_BYTES;
    r.max_work = run->max_work ? run->max_work : work_for((uint64_t)run->n * (uint64_t)run->k);
    tb_arena_init(&r.arena);
    r.values = tb_galloc(&r, g->n_nodes, sizeof(*r.values));
    for (r.node = 0; r.node < g->n_nodes && !r.rc; r.node++)
        if (run_node(&r, &g->nodes[r.node], run)) break;
    if (!r.rc) take_loss(&r, run);
    if (!r.rc) take_metrics(&r, run);
    if (!r.rc && run->d_logprobs) go_back(&r, run);
    tb_arena_fini(&r.arena);
    if (r.be) tb_backend_uncharge(r.be, r.charged);
    return r.rc;
}
