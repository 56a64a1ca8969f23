/*
 * The team of threads: every task runs exactly once, calls follow each other closely or after a
 * sleep.
 */
#include <unistd.h>

#include "backend/cpu/team.h"
#include "common.h"

struct job {
    int *ran, n_threads;
    int base;
};

static void count(void *arg, int task, int thread)
{
    struct job *j = arg;
    if (thread < 0 || thread >= j->n_threads) abort();
    j->ran[task] += j->base; /* a task's own cell: no race */
}

static void test_tasks_once(void **state)
{
    for (int threads = 1; threads <= 5; threads++) {
        struct tb_team *t = tb_team_create(threads);
        assert_non_null(t);
        assert_int_equal(tb_team_size(t), threads);
        int ran[64] = {0}, want[64] = {0};
        for (int call = 0; call < (SLOW ? 3000 : 30000); call++) {
            int n = call % 65;
            struct job j = {ran, threads, call};
            tb_team_run(t, count, &j, n);
            for (int i = 0; i < n; i++) {
                want[i] += call;
                assert_int_equal(ran[i], want[i]);
            }
            if (call % 1000 == 0) usleep(1000); /* let the workers sleep */
        }
        tb_team_destroy(t);
    }
    tb_team_destroy(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_tasks_once)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
