/*
 * A checkpoint as one uncompressed tar, made while it is sent: the pool reads a piece of the
 * folder, the loop writes it, and the next piece is read when the socket has taken most of what was
 * written.
 *
 * Owner: a struct archive lives until its last piece or the client's end; the pool has it while a
 * piece is being read. Thread: the loop's, fill() in the pool.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "api/tinker/tinker.h"
#include "util/log.h"
#include "util/mem.h"

enum { PIECE = 256 * 1024, BLOCK = 512, MAX_FILES = 64, HIGH_WATER = 1 << 20, WAIT_MS = 5 };

struct archive {
    uv_work_t work;
    uv_timer_t timer; /* waits for the socket */
    struct tb_api *a;
    struct tb_http_request *req; /* NULL: the client is gone */
    bool begun, working, done;
    /* the pool's while working */
    char *dir_path;
    DIR *dir;
    char *names[MAX_FILES];
    int n_names, next;
    int fd;         /* of the file being read, or -1 */
    uint64_t left;  /* its bytes still to come */
    size_t padding; /* zeros after it */
    struct tb_error err;
    char *buf; /* [PIECE] */
    size_t n;
};

/* ---- in the pool */

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static int list_files(struct archive *s)
{
    s->dir = opendir(s->dir_path);
    if (!s->dir)
        return tb_error_set(&s->err, errno == ENOENT ? TB_ENOTFOUND : TB_EIO,
                            "the checkpoint cannot be read: %s", strerror(errno));
    for (struct dirent *d; s->n_names < MAX_FILES && (d = readdir(s->dir));) {
        struct stat st;
        if (d->d_name[0] == '.' || strlen(d->d_name) > 99) continue;
        if (fstatat(dirfd(s->dir), d->d_name, &st, AT_SYMLINK_NOFOLLOW) || !S_ISREG(st.st_mode))
            continue;
        s->names[s->n_names++] = tb_strdup(d->d_name);
    }
    qsort(s->names, (size_t)s->n_names, sizeof(s->names[0]), by_name);
    return 0;
}

/* A ustar header; sizes beyond eleven octal digits go in base 256. */
static void put_header(char *h, const char *name, const struct stat *st)
{
    memset(h, 0, BLOCK);
    memcpy(h, name, strlen(name));
    snprintf(h + 100, 8, "%07o", 0644u);
    snprintf(h + 108, 8, "%07o", 0u);
    snprintf(h + 116, 8, "%07o", 0u);
    unsigned long long size = (unsigned long long)st->st_size;
    if (size < 1ull << 33) {
        snprintf(h + 124, 12, "%011llo", size);
    } else {
        h[124] = (char)0x80;
        for (int i = 0; i < 8; i++)
            h[135 - i] = (char)(size >> (8 * i));
    }
    snprintf(h + 136, 12, "%011llo", (unsigned long long)st->st_mtime & 077777777777ull);
    memset(h + 148, ' ', 8);
    h[156] = '0';
    memcpy(h + 257, "ustar\00000", 8);
    unsigned sum = 0;
    for (int i = 0; i < BLOCK; i++)
        sum += (unsigned char)h[i];
    snprintf(h + 148, 7, "%06o", sum & 0777777u);
    h[155] = ' ';
}

static int open_next(struct archive *s)
{
    struct stat st;
    const char *name = s->names[s->next++];
    s->fd = openat(dirfd(s->dir), name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    if (s->fd < 0 || fstat(s->fd, &st))
        return tb_error_set(&s->err, TB_EIO, "cannot read %s: %s", name, strerror(errno));
    put_header(s->buf + s->n, name, &st);
    s->n += BLOCK;
    s->left = (uint64_t)st.st_size;
    s->padding = (size_t)(-s->left & (BLOCK - 1));
    return 0;
}

/* Fills the buffer; a multiple of BLOCK, so that headers never split. */
static int fill(struct archive *s)
{
    s->n = 0;
    if (!s->dir) {
        int rc = list_files(s);
        if (rc) return rc;
    }
    while (s->n < PIECE) {
        if (s->fd < 0 && s->padding == 0) {
            if (s->next < s->n_names) {
                int rc = open_next(s);
                if (rc) return rc;
                continue;
            }
            if (PIECE - s->n < 2 * BLOCK) return 0;
            memset(s->buf + s->n, 0, 2 * BLOCK); /* the end of a tar */
            s->n += 2 * BLOCK;
            s->done = true;
            return 0;
        }
        if (s->left > 0) {
            size_t want = (size_t)TB_MIN(s->left, (uint64_t)(PIECE - s->n));
            ssize_t r = read(s->fd, s->buf + s->n, want);
            if (r < 0 && errno == EINTR) continue;
            if (r <= 0)
                return tb_error_set(&s->err, TB_EIO, "cannot read %s: %s", s->names[s->next - 1],
                                    r ? strerror(errno) : "it became shorter");
            s->n += (size_t)r;
            s->left -= (uint64_t)r;
            continue;
        }
        if (s->fd >= 0) close(s->fd);
        s->fd = -1;
        memset(s->buf + s->n, 0, s->padding); /* fits: the buffer is a multiple of BLOCK */
        s->n += s->padding;
        s->padding = 0;
    }
    return 0;
}

static void on_work(uv_work_t *w)
{
    fill(TB_CONTAINER_OF(w, struct archive, work));
}

/* ---- on the loop */

static void on_closed(uv_handle_t *h)
{
    struct archive *s = TB_CONTAINER_OF((uv_timer_t *)h, struct archive, timer);
    struct tb_api *a = s->a;
    if (s->fd >= 0) close(s->fd);
    if (s->dir) closedir(s->dir);
    for (int i = 0; i < s->n_names; i++)
        tb_free(s->names[i]);
    tb_free(s->dir_path);
    tb_free(s->buf);
    tb_free(s);
    tb_api_work_end(a);
}

static void finish(struct archive *s)
{
    if (s->req) {
        s->req->on_abort = NULL;
        s->req->user = NULL;
    }
    uv_close((uv_handle_t *)&s->timer, on_closed);
}

static void on_done(uv_work_t *w, int status);

static void next_piece(struct archive *s)
{
    s->working = true;
    if (uv_queue_work(tb_api_loop(s->a), &s->work, on_work, on_done) == 0) return;
    tb_error_set(&s->err, TB_EINTERNAL, "cannot queue work");
    on_done(&s->work, 0);
}

static void on_timer(uv_timer_t *t)
{
    struct archive *s = TB_CONTAINER_OF(t, struct archive, timer);
    if (tb_http_stream_pending(s->req) > HIGH_WATER) {
        uv_timer_start(&s->timer, on_timer, WAIT_MS, 0);
        return;
    }
    next_piece(s);
}

static void on_done(uv_work_t *w, int status)
{
    struct archive *s = TB_CONTAINER_OF(w, struct archive, work);
    (void)status;
    s->working = false;
    if (s->req && s->err.code) {
        struct tb_http_request *req = s->req;
        finish(s);
        if (!s->begun) {
            tb_api_error(req, &s->err);
        } else { /* too late for a status */
            tb_log(TB_LOG_ERROR, "api", "archive cut short: %s", s->err.msg);
            tb_http_stream_cut(req);
        }
        return;
    }
    if (s->req && !s->begun) {
        s->begun = true;
        tb_http_stream_begin(s->req, 200, "application/x-tar", NULL, 0);
    }
    if (s->req) tb_http_stream_chunk(s->req, s->buf, s->n);
    if (!s->req) {
        finish(s);
    } else if (s->done) {
        struct tb_http_request *req = s->req;
        finish(s);
        tb_http_stream_end(req);
    } else {
        on_timer(&s->timer);
    }
}

static void on_abort(struct tb_http_request *req)
{
    struct archive *s = req->user;
    s->req = NULL;
    if (!s->working && uv_is_active((uv_handle_t *)&s->timer)) finish(s);
}

void tb_tinker_send_archive(struct tb_api *a, struct tb_http_request *req, const char *dir)
{
    struct archive *s = tb_calloc(1, sizeof(*s));
    s->a = a;
    s->req = req;
    s->fd = -1;
    s->dir_path = tb_strdup(dir);
    s->buf = tb_malloc(PIECE);
    uv_timer_init(tb_api_loop(a), &s->timer);
    tb_api_work_begin(a);
    req->user = s;
    req->on_abort = on_abort;
    next_piece(s);
}
