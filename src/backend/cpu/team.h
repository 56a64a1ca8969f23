/*
 * A fixed team of threads that shares out the tasks of one call. Tasks are taken from a counter, so
 * which thread runs which task is open; results must not depend on it.
 *
 * Owner: the backend. Thread: tb_team_run from one thread at a time; it takes part in the work and
 * returns when every task is done. Workers spin for some microseconds between calls, then sleep.
 */
#ifndef TB_BACKEND_CPU_TEAM_H
#define TB_BACKEND_CPU_TEAM_H

#include <stddef.h>

struct tb_team;

/* thread: 0 .. n_threads - 1, for scratch memory; the caller is 0. */
typedef void (*tb_team_fn)(void *arg, int task, int thread);

struct tb_team *tb_team_create(int n_threads); /* NULL: no memory or no threads */
void tb_team_destroy(struct tb_team *t);
int tb_team_size(const struct tb_team *t);
void tb_team_run(struct tb_team *t, tb_team_fn fn, void *arg, int n_tasks);

#endif
