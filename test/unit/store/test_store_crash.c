/* A child saves, overwrites and deletes in a loop and is killed at a random moment, again and
 * again; after each kill every checkpoint that is listed must load, and hold what one save wrote.
 */
#include "unit/store/store_help.h"

#include <signal.h>
#include <sys/wait.h>
#include <time.h>

#define RUN    "sess-0123456789abcdef:train:0"
#define ROUNDS 25

/* The child, a process of its own: never returns. Three names, so that overwrites and deletes
 * happen often. */
static void child(const char *dir, uint64_t seed)
{
    uv_loop_t loop;
    uv_loop_init(&loop);
    struct tb_store *s = NULL;
    if (tb_store_open(&s, &loop, dir, NULL)) _exit(3);
    for (uint64_t i = 0;; i++) {
        char name[8], path[200];
        snprintf(name, sizeof(name), "c%d", (int)((seed + i) % 3));
        struct tb_ckpt_write w = {.tenant = TB_TENANT_DEFAULT,
                                  .run_id = RUN,
                                  .name = name,
                                  .kind = TB_CKPT_TRAINING,
                                  .overwrite = true};
        store_save(&loop, s, &w, make_state(8, seed * 100000 + i, true));
        if (i % 5 == 4) {
            struct answer a = {0};
            snprintf(path, sizeof(path), "tinker://" RUN "/weights/%s", name);
            tb_store_delete_ckpt(s, TB_TENANT_DEFAULT, path, on_done, &a);
            RUN_UNTIL(&loop, a.done);
        }
    }
}

struct listed {
    int done, n;
    char paths[8][200];
    int64_t steps[8];
};

static void on_list(void *arg, const struct tb_error *err, const struct tb_ckpt_list *l)
{
    struct listed *o = arg;
    assert_int_equal(err->code, 0);
    assert_true(l->n <= 8);
    o->n = l->n;
    for (int i = 0; i < l->n; i++) {
        snprintf(o->paths[i], sizeof(o->paths[i]), "%s", l->rows[i].path);
        o->steps[i] = l->rows[i].step;
    }
    o->done = 1;
}

/* The contents must be those of one seed, in all three arrays; the row must be that save's too. */
static void check_one(const struct tb_adapter_state *st, int64_t row_step)
{
    assert_int_equal(st->step, row_step);
    bool found = false;
    for (uint64_t round = 1; round <= ROUNDS && !found; round++) {
        for (uint64_t i = 0; i < 2000 && !found; i++) {
            uint64_t seed = round * 100000 + i;
            if (st->p[0] != value_at(seed, 0, 0)) continue;
            struct tb_adapter_state *want = make_state(8, seed, true);
            size_t bytes = (size_t)want->n_floats * sizeof(float);
            found = want->n_floats == st->n_floats && !memcmp(want->p, st->p, bytes) &&
                    !memcmp(want->m, st->m, bytes) && !memcmp(want->v, st->v, bytes) &&
                    want->step == st->step;
            tb_adapter_state_destroy(want);
        }
    }
    assert_true(found);
}

static void test_kill(void **state)
{
    (void)state;
    char *dir = make_dir();
    unsigned checked = 0;
    for (int round = 1; round <= ROUNDS; round++) {
        pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0) {
            char text[16];
            snprintf(text, sizeof(text), "%d", round);
            execl("/proc/self/exe", "child", dir, text, (char *)NULL);
            _exit(4);
        }
        uint32_t ms = 5 + (uint32_t)(tb_philox_draw(42, (uint32_t)round, 0, 0) * 120);
        struct timespec t = {0, ms * 1000000L};
        nanosleep(&t, NULL);
        kill(pid, SIGKILL);
        int status;
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_true(WIFSIGNALED(status));

        uv_loop_t loop;
        uv_loop_init(&loop);
        struct tb_store *s = store_open(&loop, dir);
        struct listed l = {0};
        tb_store_list_ckpts(s, TB_TENANT_DEFAULT, NULL, 0, 0, on_list, &l);
        RUN_UNTIL(&loop, l.done);
        for (int i = 0; i < l.n; i++) {
            struct answer a = store_load(&loop, s, l.paths[i], true);
            if (a.err.code) fail_msg("round %d, %s: %s", round, l.paths[i], a.err.msg);
            check_one(a.state, l.steps[i]);
            tb_adapter_state_destroy(a.state);
            checked++;
        }
        store_close(&loop, s);
        assert_int_equal(uv_loop_close(&loop), 0);
        /* nothing half-written stays */
        char *tmp = tb_asprintf("%s/tmp", dir);
        assert_int_equal(rmdir(tmp), 0);
        tb_free(tmp);
    }
    print_message("%u checkpoints checked after %d kills\n", checked, ROUNDS);
    assert_true(checked > 0);
    remove_dir(dir);
    tb_free(dir);
}

int main(int argc, char **argv)
{
    if (argc == 3) child(argv[1], strtoull(argv[2], NULL, 10));
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_kill)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
