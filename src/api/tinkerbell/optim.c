/*
 * optim_step of the Tinkerbell face (see tinkerbell.h). Thread: prepare runs in the pool, else the
 * loop's.
 */
#include <string.h>

#include "api/tinkerbell/tinkerbell.h"

static int known_adam(const struct tb_json *params, struct tb_error *err)
{
    static const char *const known[] = {"learning_rate", "beta1", "beta2", "eps", "weight_decay"};
    struct tb_json one;
    for (void *it = NULL; tb_json_next(params, &it, &one);) {
        bool found = false;
        for (size_t i = 0; i < TB_ARRAY_LEN(known); i++)
            found |= strcmp(one.key, known[i]) == 0;
        if (!found) return tb_json_fail(&one, err, TB_EINVAL, "is not a parameter of AdamW here");
    }
    return 0;
}

static int prepare_optim(struct tb_bell_job *j, const struct tb_json *root, struct tb_error *err)
{
    struct tb_optim_step *s = j->own = tb_arena_calloc(&j->arena, 1, sizeof(*s));
    struct tb_json params;
    int rc = tb_bell_named(j, root, err);
    if (!j->model_id) j->model_id = "base";
    *s = (struct tb_optim_step){.type = "adamw",
                                .learning_rate = 5e-4,
                                .beta1 = 0.9,
                                .beta2 = 0.999,
                                .eps = 1e-8,
                                .weight_decay = 0.01};
    if (rc == 0) rc = tb_json_object(root, "adam_params", false, &params, err);
    if (rc || (params.v && (rc = known_adam(&params, err)))) return rc;
    const struct tb_json *from = params.v ? &params : root;
    if ((rc = tb_json_double(from, "learning_rate", false, 0, 1e6, &s->learning_rate, err)) ||
        (rc = tb_json_double(from, "beta1", false, 0, 1, &s->beta1, err)) ||
        (rc = tb_json_double(from, "beta2", false, 0, 1, &s->beta2, err)) ||
        (rc = tb_json_double(from, "eps", false, 0, 1e6, &s->eps, err)) ||
        (rc = tb_json_double(from, "weight_decay", false, 0, 1e6, &s->weight_decay, err)))
        return rc;
    return 0;
}

static void answer_step(struct tb_bell_job *j)
{
    const struct tb_optim_step *s = j->own;
    struct tb_json_out o = tb_bell_result(j);
    tb_jout_object(&o, "metrics");
    tb_jout_double(&o, "learning_rate", s->learning_rate);
    tb_jout_double(&o, "step_completed", 1);
    tb_jout_object_end(&o);
    tb_jout_str(&o, "model_id", j->model_id);
    tb_jout_str(&o, "backend", "tinkerbell");
    tb_jout_object_end(&o);
    tb_bell_done(j);
}

static void stepped(struct tb_bell_job *j, const struct tb_op *op)
{
    (void)op;
    answer_step(j);
}

/* Without gradients there is nothing to do: three forward_backwards may come before three steps. */
static void step(struct tb_bell_job *j)
{
    struct tb_bell_adapter *ad = j->adapter;
    if (ad->n_gradients == 0) {
        answer_step(j);
        return;
    }
    j->n_gradients = ad->n_gradients;
    tb_bell_adapter_no_gradients(ad);
    j->epoch = ad->epoch;
    struct tb_op *op = tb_bell_op(j, tb_op_create(TB_OP_OPTIM_STEP));
    op->u.optim_step = *(const struct tb_optim_step *)j->own;
    if (tb_bell_run(j, op, stepped)) tb_bell_adapter_changed(ad);
}

static void start_optim(struct tb_bell_job *j)
{
    tb_bell_with_adapter(j, j->model_id, step);
}

const struct tb_bell_kind tb_bell_optim_step = {"Optimizer step", prepare_optim, start_optim};
