/* Core: custom losses: their creation, who may use them, and their end. */
#include "unit/core/core_help.h"

#include "util/limits.h"

static struct tb_op *op_loss(const char *session, int64_t seq, const char *graph)
{
    struct tb_op *op = tb_op_create(TB_OP_CREATE_CUSTOM_LOSS);
    op->session_id = text(op, session);
    op->body_bytes = 100;
    op->u.create_custom_loss = (struct tb_create_custom_loss){
        .seq_id = seq, .name = "mine", .text = text(op, graph), .n_text = strlen(graph)};
    return op;
}

static struct tb_op *op_custom(const char *model, int64_t seq, const char *loss)
{
    struct tb_op *op = op_fb(model, seq, 1, "custom");
    struct tb_config_value *v = tb_arena_calloc(&op->arena, 1, sizeof(*v));
    *v = (struct tb_config_value){.key = "loss_id", .is_text = true, .text = text(op, loss)};
    op->u.forward_backward.config = v;
    op->u.forward_backward.n_config = loss != NULL;
    return op;
}

static void make_loss(struct env *e, int64_t seq, const char *graph, char id[100])
{
    char r[400];
    must_submit(e, op_loss(e->session, seq, graph), r);
    struct waited a = result(e, r);
    assert_int_equal(a.state, TB_FUTURE_DONE);
    copy_text(id, 100, a.loss);
}

static void test_create_and_use(void **state)
{
    (void)state;
    struct env e;
    char model[100], one[100], two[100], r[400], again[400];
    env_start(&e, NULL);
    make_model(&e, 0, 8, model);
    make_loss(&e, 0, "1234567", one);
    make_loss(&e, 1, "123", two);
    assert_string_not_equal(one, two);
    assert_int_equal(fake_losses(e.engine), 2);
    must_submit(&e, op_custom(model, 1, one), r);
    assert_true(result(&e, r).metric == 7);
    must_submit(&e, op_custom(model, 2, two), r);
    assert_true(result(&e, r).metric == 3);
    /* a repeat finds the first, whatever it brings */
    must_submit(&e, op_loss(e.session, 1, "other"), r);
    must_submit(&e, op_loss(e.session, 1, "bad"), again);
    assert_string_equal(r, again);
    assert_string_equal(result(&e, r).loss, two);
    assert_int_equal(fake_losses(e.engine), 2);
    /* one that is used before it is known to be made */
    must_submit(&e, op_loss(e.session, 2, "12345"), r);
    snprintf(one, sizeof(one), "%s:loss:2", e.session);
    must_submit(&e, op_custom(model, 3, one), again);
    assert_true(result(&e, again).metric == 5);
    env_stop(&e);
}

static void test_refused(void **state)
{
    (void)state;
    struct env e;
    char model[100], loss[100], other[100], r[400];
    struct tb_error err = {0};
    env_start(&e, NULL);
    make_model(&e, 0, 8, model);
    make_loss(&e, 0, "1234567", loss);
    /* the engine refuses the graph: nothing is left of it */
    must_submit(&e, op_loss(e.session, 1, "bad"), r);
    struct waited a = result(&e, r);
    assert_int_equal(a.state, TB_FUTURE_FAILED);
    assert_int_equal(a.err.code, TB_EUNSUPPORTED);
    snprintf(other, sizeof(other), "%s:loss:1", e.session);
    must_submit(&e, op_custom(model, 1, other), r);
    a = result(&e, r);
    assert_int_equal(a.err.code, TB_ENOTFOUND);
    assert_non_null(strstr(a.err.msg, other));
    /* another session's; the queue goes on */
    struct tb_session_params p = {0};
    const char *id;
    char session[64], stranger[100];
    assert_int_equal(tb_core_create_session(e.core, e.tenant, &p, &id, NULL), 0);
    copy_text(session, sizeof(session), id);
    must_submit(&e, op_create(session, 0, 8), r);
    copy_text(stranger, sizeof(stranger), result(&e, r).model);
    must_submit(&e, op_custom(stranger, 1, loss), r);
    assert_int_equal(result(&e, r).err.code, TB_ENOTFOUND);
    must_submit(&e, op_fb(stranger, 2, 1, NULL), r);
    assert_int_equal(result(&e, r).state, TB_FUTURE_DONE);
    /* without an id the engine decides */
    must_submit(&e, op_custom(model, 2, NULL), r);
    assert_int_equal(result(&e, r).state, TB_FUTURE_DONE);
    /* no session, no number */
    assert_int_equal(submit(&e, op_loss("sess-0123456789abcdef", 0, "x"), r, &err), TB_ENOTFOUND);
    assert_int_equal(submit(&e, op_loss(NULL, 0, "x"), r, &err), TB_ENOTFOUND);
    assert_int_equal(submit(&e, op_loss(e.session, -1, "x"), r, &err), TB_EINVAL);
    /* as many as a session may have */
    for (int i = 2; i <= TB_MAX_SESSION_LOSSES; i++)
        must_submit(&e, op_loss(e.session, i, "x"), r);
    assert_int_equal(submit(&e, op_loss(e.session, 99999, "x"), r, &err), TB_EINVAL);
    settle(&e);
    assert_int_equal(fake_losses(e.engine), TB_MAX_SESSION_LOSSES);
    env_stop(&e);
}

/* The losses go with their session, also those that are being made. */
static void test_end(void **state)
{
    (void)state;
    struct env e;
    char loss[100], r[400];
    env_start(&e, NULL);
    make_loss(&e, 0, "1234567", loss);
    must_submit(&e, op_loss(e.session, 1, "12"), r);
    struct waited a;
    wait_on(&e, r, &a);
    assert_int_equal(tb_core_finish_session(e.core, e.tenant, e.session, "success", NULL, NULL), 0);
    settle(&e);
    assert_int_equal(fake_losses(e.engine), 0);
    assert_int_equal(a.calls, 1);
    assert_int_equal(a.err.code, TB_ECANCELED);
    struct tb_error err = {0};
    assert_int_equal(submit(&e, op_loss(e.session, 2, "12"), r, &err), TB_ENOTFOUND);
    env_stop(&e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_create_and_use),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
