/* Ops and adapter states: creation, destruction, names. See op.h and state.h. */
#include "op/op.h"

#include "op/state.h"
#include "util/mem.h"

const char *tb_op_type_name(enum tb_op_type t)
{
    static const char *const names[TB_OP_N_TYPES] = {
        [TB_OP_CREATE_MODEL] = "create_model",
        [TB_OP_LOAD_WEIGHTS] = "load_weights",
        [TB_OP_FORWARD] = "forward",
        [TB_OP_FORWARD_BACKWARD] = "forward_backward",
        [TB_OP_OPTIM_STEP] = "optim_step",
        [TB_OP_SAVE_WEIGHTS] = "save_weights",
        [TB_OP_SAVE_WEIGHTS_FOR_SAMPLER] = "save_weights_for_sampler",
        [TB_OP_SAVE_WEIGHTS_EXTERNAL] = "save_weights_external",
        [TB_OP_SAMPLE] = "sample",
        [TB_OP_UNLOAD_MODEL] = "unload_model",
        [TB_OP_CREATE_CUSTOM_LOSS] = "create_custom_loss",
    };
    return (unsigned)t < TB_OP_N_TYPES ? names[t] : "unknown";
}

struct tb_op *tb_op_create(enum tb_op_type type)
{
    struct tb_op *op = tb_calloc(1, sizeof(*op));
    tb_list_init(&op->node);
    tb_arena_init(&op->arena);
    op->type = type;
    op->model_seq_id = -1;
    op->seq_id = -1;
    op->result.size_bytes = -1;
    return op;
}

void tb_op_destroy(struct tb_op *op)
{
    if (!op) return;
    struct tb_token_filter *filter = op->type == TB_OP_SAMPLE ? op->u.sample.filter : NULL;
    if (filter) filter->destroy(filter);
    tb_arena_fini(&op->arena);
    tb_free(op);
}

struct tb_adapter_state *tb_adapter_state_create(void)
{
    struct tb_adapter_state *s = tb_calloc(1, sizeof(*s));
    tb_arena_init(&s->arena);
    return s;
}

void tb_adapter_state_destroy(struct tb_adapter_state *s)
{
    if (!s) return;
    tb_free(s->p);
    tb_free(s->m);
    tb_free(s->v);
    tb_arena_fini(&s->arena);
    tb_free(s);
}
