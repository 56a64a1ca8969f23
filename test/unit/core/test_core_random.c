/*
 * Core against a reference: 1,000 random schedules. Each makes a program of ops for two or three
 * models, computes what every op must answer when it runs by seq_id, then submits it with ids
 * shuffled within a window, with repeats, while tasks complete in any order that keeps an
 * adapter's; and compares.
 */
#include "unit/core/core_help.h"

#define SCHEDULES 1000
#define MAX_OPS   24
#define MODELS    3

struct step {
    enum tb_op_type type;
    int n;              /* data of a forward_backward */
    bool fail, refused; /* by the engine, by the decoder */
    int from;           /* of a load: the step that saved, or -1: a path that is not there */
    /* expected */
    bool ok;
    double metric;
    int64_t param; /* of saves and publishes */
    char req[400];
    bool submitted;
};

struct program {
    char id[100], create[400];
    int n;
    struct step s[MAX_OPS + 1]; /* by seq_id */
    int64_t publishes;
};

static uint64_t rng;

static uint32_t pick(uint32_t n)
{
    static const uint64_t mul = 6364136223846793005ull;
    rng = rng * mul + 1442695040888963407ull;
    return (uint32_t)(rng >> 33) % n;
}

static void make_program(struct program *p)
{
    int64_t param = 0, grad = 0;
    int last_save = -1;
    memset(p->s, 0, sizeof(p->s));
    p->n = 3 + (int)pick(MAX_OPS - 3);
    for (int i = 1; i <= p->n; i++) {
        struct step *s = &p->s[i];
        uint32_t what = pick(100);
        s->refused = pick(20) == 0;
        s->ok = !s->refused;
        s->metric = -1;
        s->from = -1;
        if (what < 50) {
            s->type = TB_OP_FORWARD_BACKWARD;
            s->n = 1 + (int)pick(9);
            s->fail = pick(10) == 0;
            s->ok = s->ok && !s->fail;
            if (s->ok) s->metric = (double)param, grad += s->n;
        } else if (what < 60) {
            s->type = TB_OP_FORWARD;
            if (s->ok) s->metric = (double)param;
        } else if (what < 85) {
            s->type = TB_OP_OPTIM_STEP;
            if (s->ok) param = fake_next_param(param, grad), grad = 0, s->metric = (double)param;
        } else if (what < 95) {
            s->type = TB_OP_SAVE_WEIGHTS_FOR_SAMPLER;
            s->param = param;
        } else if (what < 97) {
            s->type = TB_OP_SAVE_WEIGHTS;
            s->param = param;
            if (s->ok) last_save = i;
        } else {
            s->type = TB_OP_LOAD_WEIGHTS;
            s->from = last_save;
            if (s->from < 0) s->ok = false;
            if (s->ok) param = p->s[s->from].param, grad = 0;
        }
    }
}

static struct tb_op *make_op(struct env *e, struct program *p, int i)
{
    const struct step *s = &p->s[i];
    char name[40];
    struct tb_op *op;
    (void)e;
    switch (s->type) {
    case TB_OP_FORWARD_BACKWARD: op = op_fb(p->id, i, s->n, s->fail ? "fail" : "x"); break;
    case TB_OP_SAVE_WEIGHTS_FOR_SAMPLER:
        op = op_publish(p->id, i, (p->id[strlen(p->id) - 1] - '0') * 1000 + i, pick(2));
        op->u.save_weights.inflight = false;
        break;
    case TB_OP_SAVE_WEIGHTS: op = op_save(s->type, p->id, i, NULL); break;
    case TB_OP_LOAD_WEIGHTS:
        snprintf(name, sizeof(name), "%s", "none");
        if (s->from > 0) snprintf(name, sizeof(name), "save-%06d", s->from);
        char path[200];
        snprintf(path, sizeof(path), "tinker://%s/weights/%s", p->id, name);
        op = op_load(p->id, i, path, true);
        break;
    default: op = op_of(s->type, p->id, i); break;
    }
    if (s->refused) tb_error_set(&op->error, TB_EPARSE, "refused");
    return op;
}

/* Submits one op not far beyond those already there, and now and then an old one again. */
static bool submit_some(struct env *e, struct program *p)
{
    int first = 1;
    while (first <= p->n && p->s[first].submitted)
        first++;
    if (first > 1 && pick(6) == 0) {
        int i = 1 + (int)pick((uint32_t)(first - 1));
        char again[400];
        must_submit(e, make_op(e, p, i), again);
        assert_string_equal(again, p->s[i].req);
    }
    if (first > p->n) return false;
    int i = first + (int)pick(6);
    if (i > p->n || p->s[i].submitted) i = first;
    must_submit(e, make_op(e, p, i), p->s[i].req);
    p->s[i].submitted = true;
    return true;
}

static void check_program(struct env *e, struct program *p, int round)
{
    for (int i = 1; i <= p->n; i++) {
        const struct step *s = &p->s[i];
        struct waited a = result(e, p->s[i].req);
        if ((a.state == TB_FUTURE_DONE) != s->ok)
            fail_msg("round %d, %s seq %d: state %d: %s", round, tb_op_type_name(s->type), i,
                     a.state, a.err.msg);
        if (s->ok && s->metric >= 0 && a.metric != s->metric)
            fail_msg("round %d, seq %d: %g instead of %g", round, i, a.metric, s->metric);
        if (s->ok && s->type == TB_OP_SAVE_WEIGHTS_FOR_SAMPLER) {
            char r[400];
            must_submit(e, op_sample(a.sampler, 0), r);
            assert_int_equal(result(e, r).cached, s->param);
        }
    }
}

static void one_schedule(struct env *e, int round)
{
    struct program p[MODELS];
    int n = 1 + (int)pick(MODELS);
    struct tb_session_params sp = {0};
    const char *sid;
    tb_core_create_session(e->core, e->tenant, &sp, &sid, NULL);
    copy_text(e->session, sizeof(e->session), sid);
    for (int k = 0; k < n; k++) {
        memset(&p[k], 0, sizeof(p[k]));
        must_submit(e, op_create(e->session, k, 8), p[k].create);
        snprintf(p[k].id, sizeof(p[k].id), "%s:train:%d", e->session, k);
        make_program(&p[k]);
    }
    bool more = true;
    while (more) {
        more = false;
        for (int k = 0; k < n; k++)
            more |= submit_some(e, &p[k]);
        for (uint32_t i = pick(5); i > 0; i--)
            fake_step_any(e->engine, pick(1000));
        if (pick(3) == 0) uv_run(&e->loop, UV_RUN_NOWAIT);
    }
    while (fake_waiting(e->engine))
        fake_step_any(e->engine, pick(1000));
    for (int k = 0; k < n; k++)
        check_program(e, &p[k], round);
    tb_core_finish_session(e->core, e->tenant, e->session, "success", NULL, NULL);
}

static void test_schedules(void **state)
{
    (void)state;
    struct env e;
    env_start(&e, NULL);
    for (int i = 0; i < SCHEDULES; i++) {
        rng = 1000003ull * (uint64_t)(i + 1);
        one_schedule(&e, i);
    }
    settle(&e);
    assert_int_equal(fake_adapters(e.engine), 0);
    assert_int_equal(fake_versions(e.engine), 0);
    assert_int_equal(stats(&e).queued_bytes, 0);
    assert_int_equal(stats(&e).futures_pending, 0);
    env_stop(&e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_schedules)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
