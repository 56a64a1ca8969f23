/*
 * The team of threads: see team.h.
 *
 * A call is opened and closed in one 64-bit word: generation, an open bit, and the number of
 * workers that joined. A worker that wakes too late finds the call closed and does not touch it, so
 * the caller never waits for sleepers, only for those who joined.
 */
#include "backend/cpu/team.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SPIN_NS      50000
#define STATE_OPEN   (1ull << 31)
#define STATE_JOINED (STATE_OPEN - 1)

struct worker {
    struct tb_team *team;
    pthread_t thread;
    int index;
};

struct tb_team {
    int n_threads, n_started;
    struct worker *workers;
    /* of the open call; written before the call is opened, read by those who joined */
    tb_team_fn fn;
    void *arg;
    int n_tasks;
    _Alignas(64) _Atomic uint64_t state;
    _Alignas(64) _Atomic int next;
    _Alignas(64) _Atomic uint32_t done;     /* workers that left the call */
    _Atomic uint32_t caller_waits;          /* the caller sleeps on done */
    _Alignas(64) _Atomic uint32_t wake_seq; /* workers sleep on it */
    _Atomic uint32_t sleepers;
    _Atomic bool stop;
};

static void futex_wait(_Atomic uint32_t *word, uint32_t expected)
{
    (void)syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, expected, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word, int n)
{
    (void)syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, n, NULL, NULL, 0);
}

static void cpu_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static uint64_t now_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static void take_tasks(struct tb_team *t, int thread)
{
    for (;;) {
        int i = atomic_fetch_add_explicit(&t->next, 1, memory_order_relaxed);
        if (i >= t->n_tasks) return;
        t->fn(t->arg, i, thread);
    }
}

/* Joins the open call if it is newer than *seen. */
static bool join(struct tb_team *t, uint32_t *seen)
{
    uint64_t s = atomic_load_explicit(&t->state, memory_order_acquire);
    for (;;) {
        if (!(s & STATE_OPEN) || (uint32_t)(s >> 32) == *seen) return false;
        if (atomic_compare_exchange_weak_explicit(&t->state, &s, s + 1, memory_order_acq_rel,
                                                  memory_order_acquire)) {
            *seen = (uint32_t)(s >> 32);
            return true;
        }
    }
}

/* Waits until there may be a call to join; spins first. */
static void wait_for_call(struct tb_team *t, uint32_t seen)
{
    uint64_t end = 0;
    for (unsigned i = 0;; i++) {
        uint64_t s = atomic_load_explicit(&t->state, memory_order_relaxed);
        if ((s & STATE_OPEN) && (uint32_t)(s >> 32) != seen) return;
        if (atomic_load_explicit(&t->stop, memory_order_relaxed)) return;
        cpu_relax();
        if (i % 64 != 63) continue;
        uint64_t now = now_ns();
        if (!end) end = now + SPIN_NS;
        if (now >= end) break;
    }
    uint32_t seq = atomic_load(&t->wake_seq);
    atomic_fetch_add(&t->sleepers, 1);
    uint64_t s = atomic_load(&t->state);
    if (!atomic_load(&t->stop) && !((s & STATE_OPEN) && (uint32_t)(s >> 32) != seen))
        futex_wait(&t->wake_seq, seq);
    atomic_fetch_sub(&t->sleepers, 1);
}

static void *worker_main(void *arg)
{
    struct worker *w = arg;
    struct tb_team *t = w->team;
    uint32_t seen = 0;
    while (!atomic_load_explicit(&t->stop, memory_order_acquire)) {
        if (!join(t, &seen)) {
            wait_for_call(t, seen);
            continue;
        }
        take_tasks(t, w->index);
        atomic_fetch_add(&t->done, 1);
        if (atomic_load(&t->caller_waits)) futex_wake(&t->done, 1);
    }
    return NULL;
}

struct tb_team *tb_team_create(int n_threads)
{
    void *mem = NULL;
    if (n_threads < 1 || posix_memalign(&mem, 64, sizeof(struct tb_team)) != 0) return NULL;
    struct tb_team *t = mem;
    *t = (struct tb_team){.n_threads = n_threads, .n_started = 1};
    t->workers = calloc((size_t)n_threads, sizeof(*t->workers));
    if (!t->workers) goto fail;
    for (int i = 1; i < n_threads; i++) {
        t->workers[i] = (struct worker){.team = t, .index = i};
        if (pthread_create(&t->workers[i].thread, NULL, worker_main, &t->workers[i]) != 0)
            goto fail;
        t->n_started++;
    }
    return t;
fail:
    tb_team_destroy(t);
    return NULL;
}

void tb_team_destroy(struct tb_team *t)
{
    if (!t) return;
    atomic_store(&t->stop, true);
    atomic_fetch_add(&t->wake_seq, 1);
    futex_wake(&t->wake_seq, INT_MAX);
    for (int i = 1; i < t->n_started; i++)
        pthread_join(t->workers[i].thread, NULL);
    free(t->workers);
    free(t);
}

int tb_team_size(const struct tb_team *t)
{
    return t->n_threads;
}

void tb_team_run(struct tb_team *t, tb_team_fn fn, void *arg, int n_tasks)
{
    if (n_tasks <= 1 || t->n_threads == 1) {
        for (int i = 0; i < n_tasks; i++)
            fn(arg, i, 0);
        return;
    }
    t->fn = fn;
    t->arg = arg;
    t->n_tasks = n_tasks;
    atomic_store_explicit(&t->next, 0, memory_order_relaxed);
    atomic_store_explicit(&t->done, 0, memory_order_relaxed);
    uint32_t gen = (uint32_t)(atomic_load_explicit(&t->state, memory_order_relaxed) >> 32) + 1;
    if (gen == 0) gen = 1; /* 0 is what a new worker has seen */
    atomic_store(&t->state, ((uint64_t)gen << 32) | STATE_OPEN);
    atomic_fetch_add(&t->wake_seq, 1);
    if (atomic_load(&t->sleepers)) futex_wake(&t->wake_seq, n_tasks - 1);
    take_tasks(t, 0);
    uint32_t joined = (uint32_t)(atomic_fetch_and(&t->state, ~STATE_OPEN) & STATE_JOINED);
    for (unsigned i = 0; atomic_load_explicit(&t->done, memory_order_acquire) != joined; i++) {
        cpu_relax();
        if (i < 4000) continue;
        atomic_store(&t->caller_waits, 1);
        uint32_t d = atomic_load(&t->done);
        if (d != joined) futex_wait(&t->done, d);
        atomic_store(&t->caller_waits, 0);
    }
}
