/*
 * The optimizer step: AdamW with clipping by the global norm (numerics: torch.optim.AdamW, torch's
 * clip_grad_norm_). The accumulated gradient is consumed by every step that reaches the arithmetic,
 * also by one that fails because the gradient is not finite: else the model could never step again.
 *
 * Owner: the adapter. Thread: the model's.
 */
#include <math.h>
#include <string.h>

#include "model/internal.h"
#include "util/mem.h"

struct range {
    const char *name;
    double value, lo, hi; /* lo <= value < hi, or lo < value when open */
    bool open;
};

static int check_ranges(const struct tb_optim_step *o, struct tb_error *err)
{
    const struct range r[] = {
        {"learning_rate", o->learning_rate, 0, HUGE_VAL, false},
        {"beta1", o->beta1, 0, 1, false},
        {"beta2", o->beta2, 0, 1, false},
        {"eps", o->eps, 0, HUGE_VAL, true},
        {"weight_decay", o->weight_decay, 0, HUGE_VAL, false},
        {"grad_clip_norm", o->grad_clip_norm, 0, HUGE_VAL, false},
    };
    if (o->type && strcmp(o->type, "adamw"))
        return tb_error_set(err, TB_EUNSUPPORTED, "optimizer %s is not supported; adamw is",
                            o->type);
    for (size_t i = 0; i < TB_ARRAY_LEN(r); i++) {
        double v = r[i].value;
        if (!isfinite(v) || v < r[i].lo || v >= r[i].hi || (r[i].open && v <= r[i].lo)) {
            if (isfinite(r[i].hi))
                return tb_error_set(err, TB_EINVAL, "%s is %g; it must be at least %g and below %g",
                                    r[i].name, v, r[i].lo, r[i].hi);
            return tb_error_set(err, TB_EINVAL, "%s is %g; it must be finite and %s %g", r[i].name,
                                v, r[i].open ? "above" : "at least", r[i].lo);
        }
    }
    if (!((float)o->eps > 0) || !isfinite((float)o->learning_rate) ||
        !isfinite((float)o->weight_decay))
        return tb_error_set(err, TB_EINVAL,
                            "learning_rate, eps or weight_decay is beyond the range of float32");
    return 0;
}

static void set_metrics(struct tb_op *op, double norm, double lr)
{
    struct tb_metric *m = tb_arena_calloc(&op->arena, 2, sizeof(*m));
    m[0] = (struct tb_metric){"optim/grad_norm", norm};
    m[1] = (struct tb_metric){"optim/lr", lr};
    op->result.n_metrics = 2;
    op->result.metrics = m;
}

/* Gradient and moments exist, zero where nothing was there yet. */
static int need_arrays(struct tb_adapter *a, struct tb_error *err)
{
    float **const arrays[] = {&a->mom, &a->var, &a->g};
    const struct tb_backend_ops *ops = a->m->be->ops;
    size_t bytes = tb_adapter_flat_bytes(a);
    for (size_t i = 0; i < TB_ARRAY_LEN(arrays); i++) {
        bool is_g = arrays[i] == &a->g;
        if (*arrays[i]) {
            if (is_g && !a->has_grad) ops->zero(a->m->be, a->g, bytes);
            continue;
        }
        float *p = tb_adapter_alloc_flat(a);
        if (!p) return tb_backend_no_memory(a->m->be, err, bytes, "an adapter's moments");
        ops->zero(a->m->be, p, bytes);
        *arrays[i] = p;
    }
    return 0;
}

static void step(struct tb_adapter *a, struct tb_op *op)
{
    const struct tb_optim_step *o = &op->u.optim_step;
    const struct tb_backend_ops *ops = a->m->be->ops;
    size_t n = (size_t)a->layout->n_floats;
    if (!a->has_grad && !a->mom && (o->weight_decay <= 0 || o->learning_rate <= 0)) {
        a->step++; /* nothing was ever accumulated: p, m and v stay as they are */
        set_metrics(op, 0, o->learning_rate);
        return;
    }
    if (need_arrays(a, &op->error) || tb_adapter_own_version(a, &op->error)) return;
    double norm = sqrt(ops->sum_squares(a->m->be, a->g, n));
    if (!isfinite(norm)) {
        a->has_grad = false;
        tb_error_set(
            &op->error, TB_ENONFINITE,
            "the accumulated gradient is not finite; it was dropped and the weights are unchanged");
        return;
    }
    double t = (double)(a->step + 1);
    double scale = 1;
    if (o->grad_clip_norm > 0) scale = TB_MIN(1, o->grad_clip_norm / (norm + 1e-6));
    struct tb_adamw w = {
        .lr = (float)o->learning_rate,
        .beta1 = (float)o->beta1,
        .beta2 = (float)o->beta2,
        .eps = (float)o->eps,
        .weight_decay = (float)o->weight_decay,
        .grad_scale = (float)scale,
        .bias1 = (float)(1 - pow(o->beta1, t)),
        .bias2 = (float)(1 - pow(o->beta2, t)),
    };
    ops->adamw(a->m->be, &w, a->p, a->mom, a->var, a->g, n);
    a->has_grad = false;
    a->step++;
    tb_adapter_refresh_act(a);
    if (ops->sync(a->m->be, &op->error)) return;
    set_metrics(op, norm, o->learning_rate);
}

void tb_adapter_optim_step(struct tb_adapter *a, struct tb_op *op)
{
    if (check_ranges(&op->u.optim_step, &op->error) || tb_adapter_hold(a, &op->error)) return;
    step(a, op);
    tb_adapter_release(a);
}
