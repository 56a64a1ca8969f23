/*
 * The pager; see pager.h.
 *
 * Owner: the engine's lane. Thread: the models'.
 */
#include "model/pager.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "model/internal.h"
#include "util/log.h"

#define PAGE_MAGIC  "TBPAGE1"
#define PAGE_SUFFIX ".page"
#define COPY_BYTES  ((size_t)1 << 20)

struct tb_pager {
    struct tb_backend *be;
    char *dir;
    struct tb_list idle;   /* struct tb_paged, least recently used first */
    struct tb_list models; /* struct tb_model */
    size_t idle_bytes;
    uint64_t last_file;
    char *copy; /* [COPY_BYTES] between device and file */
    struct tb_pager_stats stats;
};

struct page_header {
    char magic[8];
    uint64_t file;
    uint64_t bytes; /* of what follows */
};

/* ---- the folder */

static void page_path(const struct tb_pager *p, uint64_t file, char *out, size_t n)
{
    snprintf(out, n, "%s/%llu" PAGE_SUFFIX, p->dir, (unsigned long long)file);
}

static int io_error(struct tb_error *err, const char *what, const char *path)
{
    return tb_error_set(err, TB_EIO, "cannot %s %s: %s", what, path, strerror(errno));
}

/* Removes what a crash left. */
static int sweep(const char *dir, struct tb_error *err)
{
    if (mkdir(dir, 0700) && errno != EEXIST) return io_error(err, "make folder", dir);
    DIR *d = opendir(dir);
    if (!d) return io_error(err, "open folder", dir);
    for (const struct dirent *e; (e = readdir(d));) {
        size_t n = strlen(e->d_name), k = strlen(PAGE_SUFFIX);
        if (n > k && !strcmp(e->d_name + n - k, PAGE_SUFFIX))
            (void)unlinkat(dirfd(d), e->d_name, 0);
    }
    closedir(d);
    return 0;
}

static void delete_file(struct tb_paged *x)
{
    char path[4096];
    if (!x->file) return;
    page_path(x->pager, x->file, path, sizeof(path));
    (void)unlink(path); /* what stays is swept at the next start */
    x->file = 0;
}

/* ---- reading and writing */

static int transfer(int fd, bool out, char *p, size_t n)
{
    while (n) {
        ssize_t got = out ? write(fd, p, n) : read(fd, p, n);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return -1;
        if (got == 0) {
            errno = EIO; /* the file is too short */
            return -1;
        }
        p += got;
        n -= (size_t)got;
    }
    return 0;
}

static int transfer_parts(struct tb_pager *p, int fd, bool out, const struct tb_page_part *parts,
                          int n)
{
    const struct tb_backend_ops *ops = p->be->ops;
    for (int i = 0; i < n; i++) {
        for (size_t at = 0; at < parts[i].bytes; at += COPY_BYTES) {
            size_t k = TB_MIN(COPY_BYTES, parts[i].bytes - at);
            char *dev = (char *)parts[i].p + at;
            if (out) ops->download(p->be, p->copy, dev, k);
            if (transfer(fd, out, p->copy, k)) return -1;
            if (!out) ops->upload(p->be, dev, p->copy, k);
        }
    }
    return 0;
}

static struct page_header header_of(uint64_t file, const struct tb_page_part *parts, int n)
{
    struct page_header h = {PAGE_MAGIC, file, 0};
    for (int i = 0; i < n; i++)
        h.bytes += parts[i].bytes;
    return h;
}

int tb_page_write(struct tb_paged *x, const struct tb_page_part *parts, int n, struct tb_error *err)
{
    struct tb_pager *p = x->pager;
    struct page_header h = header_of(++p->last_file, parts, n);
    char path[4096];
    page_path(p, h.file, path, sizeof(path));
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0) return io_error(err, "create", path);
    x->file = h.file;
    int rc = 0;
    if (transfer(fd, true, (char *)&h, sizeof(h)) || transfer_parts(p, fd, true, parts, n))
        rc = io_error(err, "write", path);
    if (close(fd) && !rc) rc = io_error(err, "write", path);
    if (rc)
        delete_file(x);
    else
        p->stats.page_outs++;
    return rc;
}

int tb_page_read(struct tb_paged *x, const struct tb_page_part *parts, int n, struct tb_error *err)
{
    struct tb_pager *p = x->pager;
    struct page_header want = header_of(x->file, parts, n), h;
    char path[4096];
    page_path(p, x->file, path, sizeof(path));
    int fd = open(path, O_RDONLY | O_CLOEXEC), rc = 0;
    if (fd < 0) return io_error(err, "open", path);
    if (transfer(fd, false, (char *)&h, sizeof(h)))
        rc = io_error(err, "read", path);
    else if (memcmp(&h, &want, sizeof(h)))
        rc = tb_error_set(err, TB_ECORRUPT, "%s is not what was written", path);
    else if (transfer_parts(p, fd, false, parts, n))
        rc = io_error(err, "read", path);
    close(fd);
    if (rc) return rc;
    delete_file(x);
    p->stats.page_ins++;
    return 0;
}

/* ---- who is idle */

void tb_paged_idle(struct tb_paged *x, size_t bytes)
{
    if (!x->pager) return;
    tb_list_push(&x->pager->idle, &x->node);
    x->idle_bytes = bytes;
    x->pager->idle_bytes += bytes;
}

void tb_paged_busy(struct tb_paged *x)
{
    if (!x->pager) return;
    tb_list_del(&x->node);
    x->pager->idle_bytes -= x->idle_bytes;
    x->idle_bytes = 0;
}

void tb_paged_forget(struct tb_paged *x)
{
    tb_paged_busy(x);
    delete_file(x);
}

void tb_pager_add_model(struct tb_pager *p, struct tb_list *node)
{
    tb_list_push(&p->models, node);
}

/* ---- the backend's reclaimer */

static size_t reclaimable(void *arg)
{
    const struct tb_pager *p = arg;
    size_t n = p->idle_bytes;
    TB_LIST_FOREACH (it, &p->models) {
        n += tb_model_idle_workspaces(TB_LIST_ENTRY(it, struct tb_model, in_pager));
    }
    return n;
}

static void reclaim(void *arg, size_t bytes)
{
    struct tb_pager *p = arg;
    struct tb_backend *be = p->be;
    if (bytes > tb_backend_room(be)) return; /* in vain: let all stay where they are */
    while (!tb_backend_fits(be, bytes) && !tb_list_empty(&p->idle)) {
        struct tb_paged *x = TB_LIST_ENTRY(p->idle.next, struct tb_paged, node);
        if (x->page_out(x, &be->reclaim_error)) {
            tb_log(TB_LOG_ERROR, "pager", "%s", be->reclaim_error.msg);
            break;
        }
        tb_paged_busy(x);
    }
    TB_LIST_FOREACH (it, &p->models) {
        if (tb_backend_fits(be, bytes)) return;
        tb_model_free_workspaces(TB_LIST_ENTRY(it, struct tb_model, in_pager));
    }
}

static const struct tb_reclaimer reclaimer = {reclaimable, reclaim};

/* ---- life */

int tb_pager_create(struct tb_pager **out, struct tb_backend *be, const char *dir,
                    struct tb_error *err)
{
    int rc = sweep(dir, err);
    if (rc) return rc;
    struct tb_pager *p = tb_calloc(1, sizeof(*p));
    p->be = be;
    p->dir = tb_strdup(dir);
    p->copy = tb_malloc(COPY_BYTES);
    tb_list_init(&p->idle);
    tb_list_init(&p->models);
    be->reclaimer = &reclaimer;
    be->reclaimer_arg = p;
    *out = p;
    return 0;
}

void tb_pager_destroy(struct tb_pager *p)
{
    if (!p) return;
    TB_BUG_ON(!tb_list_empty(&p->idle) || !tb_list_empty(&p->models));
    p->be->reclaimer = NULL;
    (void)rmdir(p->dir);
    tb_free(p->dir);
    tb_free(p->copy);
    tb_free(p);
}

void tb_pager_stats(const struct tb_pager *p, struct tb_pager_stats *out)
{
    *out = p->stats;
}
