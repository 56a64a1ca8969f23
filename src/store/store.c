/*
 * Store: opening, closing, and the queue of jobs. See store.h and store_internal.h.
 *
 * One uv_work_t runs at a time. It takes either one large job (a checkpoint's files) or up to
 * TB_STORE_BATCH consecutive small ones, which share a transaction, so that a burst of bookkeeping
 * costs one fsync. Jobs keep their order in every case.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include "store/store_internal.h"
#include "util/clock.h"
#include "util/log.h"
#include "util/mem.h"

/* ---- opening */

static int make_data_dir(const char *dir, struct tb_error *err)
{
    char *p = tb_strdup(dir);
    int rc = 0;
    for (char *c = p + 1; *c && !rc; c++) {
        if (*c != '/') continue;
        *c = '\0';
        if (access(p, F_OK)) rc = tb_mkdir(p, err);
        *c = '/';
    }
    if (!rc) rc = tb_mkdir(p, err);
    tb_free(p);
    return rc;
}

static int take_lock(struct tb_store *s, struct tb_error *err)
{
    char *path = tb_path_join(s->dir, "lock");
    int rc = 0;
    s->lock_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (s->lock_fd < 0) {
        rc = tb_error_set(err, TB_EIO, "cannot open %s: %s", path, strerror(errno));
    } else if (flock(s->lock_fd, LOCK_EX | LOCK_NB)) {
        char pid[24] = "";
        ssize_t n = pread(s->lock_fd, pid, sizeof(pid) - 1, 0);
        pid[n > 0 ? n : 0] = '\0';
        pid[strcspn(pid, "\n")] = '\0';
        rc = errno == EWOULDBLOCK
                 ? tb_error_set(err, TB_EBUSY,
                                "data folder %s is in use by another process (pid %s)", s->dir, pid)
                 : tb_error_set(err, TB_EIO, "cannot lock %s: %s", path, strerror(errno));
    } else {
        char pid[24];
        int n = snprintf(pid, sizeof(pid), "%ld\n", (long)getpid());
        if (ftruncate(s->lock_fd, 0) || pwrite(s->lock_fd, pid, (size_t)n, 0) != n)
            rc = tb_error_set(err, TB_EIO, "cannot write %s: %s", path, strerror(errno));
    }
    tb_free(path);
    return rc;
}

static void store_free(struct tb_store *s)
{
    tb_sql_close(s);
    if (s->lock_fd >= 0) close(s->lock_fd);
    tb_map_fini(&s->touches);
    tb_free(s->dir);
    tb_free(s);
}

int tb_store_open(struct tb_store **out, uv_loop_t *loop, const char *data_dir,
                  struct tb_error *err)
{
    struct tb_store *s = tb_calloc(1, sizeof(*s));
    s->loop = loop;
    s->lock_fd = -1;
    s->dir = tb_strdup(data_dir && *data_dir ? data_dir : ".");
    for (size_t n = strlen(s->dir); n > 1 && s->dir[n - 1] == '/'; n--)
        s->dir[n - 1] = '\0';
    tb_list_init(&s->queue);
    tb_list_init(&s->running);
    tb_map_init(&s->touches);

    char *tmp = tb_path_join(s->dir, "tmp"), *ckpts = tb_path_join(s->dir, "checkpoints");
    int rc = make_data_dir(s->dir, err);
    if (!rc) rc = take_lock(s, err);
    if (!rc) rc = tb_mkdir(tmp, err);
    if (!rc) rc = tb_mkdir(ckpts, err);
    if (!rc) rc = tb_sql_open(s, err);
    if (!rc) rc = tb_store_recover(s, err);
    tb_free(tmp);
    tb_free(ckpts);
    if (rc) {
        store_free(s);
        return rc;
    }
    uv_timer_init(loop, &s->touch_timer);
    s->touch_timer.data = s;
    uv_unref((uv_handle_t *)&s->touch_timer);
    *out = s;
    return 0;
}

/* ---- jobs */

struct tb_job *tb_job_create(void (*work)(struct tb_store *s, struct tb_job *j),
                             void (*done)(struct tb_job *j), bool small)
{
    struct tb_job *j = tb_calloc(1, sizeof(*j));
    tb_list_init(&j->node);
    tb_arena_init(&j->arena);
    tb_map_init(&j->touches);
    j->work = work;
    j->done = done;
    j->small = small;
    return j;
}

struct tb_job *tb_job_of(const char *tenant, const char *id,
                         void (*work)(struct tb_store *s, struct tb_job *j),
                         void (*done)(struct tb_job *j))
{
    struct tb_job *j = tb_job_create(work, done, true);
    j->tenant = tb_job_dup(j, tenant);
    j->id = tb_job_dup(j, id);
    return j;
}

static void job_destroy(struct tb_job *j)
{
    size_t it = 0, n;
    const char *key;
    void *v;
    while (tb_map_next(&j->touches, &it, &key, &n, &v))
        tb_free(v);
    tb_map_fini(&j->touches);
    tb_adapter_state_destroy(j->state);
    tb_arena_fini(&j->arena);
    tb_free(j);
}

const char *tb_job_dup(struct tb_job *j, const char *s)
{
    return s ? tb_arena_strdup(&j->arena, s) : NULL;
}

void tb_job_path(struct tb_job *j, const char *path)
{
    j->id = tb_job_dup(j, path ? path : "");
    tb_tinker_path_parse(j->id, strlen(j->id), &j->path, &j->err);
}

void tb_job_done_plain(struct tb_job *j)
{
    if (j->cb.done)
        j->cb.done(j->arg, &j->err);
    else if (j->err.code)
        tb_log(TB_LOG_ERROR, "store", "%s", j->err.msg);
}

/* Pool thread. */
static void run_batch(uv_work_t *w)
{
    struct tb_store *s = w->data;
    struct tb_job *first = TB_LIST_ENTRY(s->running.next, struct tb_job, node);
    struct tb_error err = {0};
    bool txn = first->small && first->node.next != &s->running;
    if (txn && tb_sql_exec(s, "BEGIN IMMEDIATE", &err)) txn = false;
    TB_LIST_FOREACH (n, &s->running) {
        struct tb_job *j = TB_LIST_ENTRY(n, struct tb_job, node);
        if (!j->err.code) j->work(s, j);
    }
    if (!txn) return;
    /* A full disk may have rolled everything back already; then COMMIT fails too. */
    if (tb_sql_exec(s, "COMMIT", &err) == 0) return;
    if (!sqlite3_get_autocommit(s->db)) tb_sql_exec(s, "ROLLBACK", NULL);
    TB_LIST_FOREACH (n, &s->running) {
        struct tb_job *j = TB_LIST_ENTRY(n, struct tb_job, node);
        if (!j->err.code) j->err = err;
    }
}

static void timer_closed(uv_handle_t *h)
{
    struct tb_store *s = h->data;
    void (*cb)(void *) = s->close_cb;
    void *arg = s->close_arg;
    store_free(s);
    if (cb) cb(arg);
}

static void pump(struct tb_store *s);

static void batch_done(uv_work_t *w, int status)
{
    struct tb_store *s = w->data;
    (void)status; /* work is never canceled */
    struct tb_list done;
    tb_list_init(&done);
    tb_list_move(&done, &s->running);
    s->busy = false;
    s->calling = true;
    pump(s); /* the next batch runs while the callbacks do */
    for (struct tb_list *n; (n = tb_list_pop(&done));) {
        struct tb_job *j = TB_LIST_ENTRY(n, struct tb_job, node);
        j->done(j);
        job_destroy(j);
    }
    s->calling = false;
    if (s->closing && !s->busy && !uv_is_closing((uv_handle_t *)&s->touch_timer))
        uv_close((uv_handle_t *)&s->touch_timer, timer_closed);
}

static void pump(struct tb_store *s)
{
    if (s->busy || tb_list_empty(&s->queue)) return;
    for (int n = 0; n < TB_STORE_BATCH && !tb_list_empty(&s->queue); n++) {
        struct tb_job *j = TB_LIST_ENTRY(s->queue.next, struct tb_job, node);
        if (!j->small && n > 0) break;
        tb_list_del(&j->node);
        tb_list_push(&s->running, &j->node);
        if (!j->small) break;
    }
    s->busy = true;
    s->work.data = s;
    int rc = uv_queue_work(s->loop, &s->work, run_batch, batch_done);
    TB_BUG_ON(rc != 0);
}

void tb_job_submit(struct tb_store *s, struct tb_job *j)
{
    TB_BUG_ON(uv_is_closing((uv_handle_t *)&s->touch_timer));
    tb_list_push(&s->queue, &j->node);
    pump(s);
}

/* ---- run touches, gathered for TB_STORE_TOUCH_MS */

static void work_touch(struct tb_store *s, struct tb_job *j)
{
    size_t it = 0, n;
    const char *id;
    void *v;
    while (tb_map_next(&j->touches, &it, &id, &n, &v)) {
        struct touch *t = v;
        sqlite3_stmt *st = tb_sql_get(s, TB_SQL_TOUCH_RUN, &j->err);
        if (!st) return;
        sqlite3_bind_text(st, 1, id, (int)n, SQLITE_STATIC);
        sqlite3_bind_int64(st, 2, t->us);
        if (tb_sql_run(s, st, &j->err)) return;
    }
}

static void flush_touches(struct tb_store *s)
{
    if (s->touches.n == 0) return;
    struct tb_job *j = tb_job_create(work_touch, tb_job_done_plain, true);
    j->touches = s->touches;
    tb_map_init(&s->touches);
    tb_job_submit(s, j);
}

static void touch_timer_cb(uv_timer_t *t)
{
    flush_touches(t->data);
}

void tb_store_touch_run(struct tb_store *s, const char *id, int64_t last_request_us)
{
    size_t n = strlen(id);
    struct touch *t = tb_map_get(&s->touches, id, n);
    if (!t) {
        t = tb_malloc(sizeof(*t));
        tb_map_put(&s->touches, id, n, t);
        if (!uv_is_active((uv_handle_t *)&s->touch_timer))
            uv_timer_start(&s->touch_timer, touch_timer_cb, TB_STORE_TOUCH_MS, 0);
    }
    t->us = last_request_us;
}

void tb_store_close(struct tb_store *s, void (*cb)(void *arg), void *arg)
{
    flush_touches(s);
    s->closing = true;
    s->close_cb = cb;
    s->close_arg = arg;
    if (!s->busy && !s->calling) uv_close((uv_handle_t *)&s->touch_timer, timer_closed);
}
