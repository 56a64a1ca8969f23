/*
 * A checkpoint as one uncompressed tar that is nowhere stored: its files are opened, and their
 * sizes say what lies where in the tar, so that any part of it can be made when it is asked for.
 *
 * Owner: a struct archive is http's from the answer on. Thread: the pool's while it is being opened
 * or read, else the loop's.
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

enum { BLOCK = 512, END = 2 * BLOCK, MAX_FILES = 64 };

struct member {
    char *name;
    int fd;
    uint64_t at, size; /* of its header in the tar, and its bytes */
    char header[BLOCK];
};

struct archive {
    struct tb_http_source source;
    uv_work_t work;
    struct tb_api *a;
    struct tb_http_request *req;
    char *dir_path;
    struct member *members; /* by name, and so by place */
    int n;
    struct tb_error err;
};

static void archive_free(struct tb_http_source *source)
{
    struct archive *s = TB_CONTAINER_OF(source, struct archive, source);
    for (int i = 0; i < s->n; i++) {
        if (s->members[i].fd >= 0) close(s->members[i].fd);
        tb_free(s->members[i].name);
    }
    tb_free(s->members);
    tb_free(s->dir_path);
    tb_free(s);
}

/* ---- in the pool */

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct member *)a)->name, ((const struct member *)b)->name);
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

static int add_member(struct archive *s, int dir, const char *name)
{
    struct stat st;
    struct member *m = &s->members[s->n];
    if (fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW) || !S_ISREG(st.st_mode)) return 0;
    m->fd = openat(dir, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    if (m->fd < 0 || fstat(m->fd, &st)) {
        if (m->fd >= 0) close(m->fd);
        return tb_error_set(&s->err, TB_EIO, "cannot read %s: %s", name, strerror(errno));
    }
    m->name = tb_strdup(name);
    m->size = (uint64_t)st.st_size;
    put_header(m->header, name, &st);
    s->source.modified_s = TB_MAX(s->source.modified_s, (int64_t)st.st_mtime);
    s->n++;
    return 0;
}

static void open_members(uv_work_t *w)
{
    struct archive *s = TB_CONTAINER_OF(w, struct archive, work);
    DIR *dir = opendir(s->dir_path);
    if (!dir) {
        tb_error_set(&s->err, errno == ENOENT ? TB_ENOTFOUND : TB_EIO,
                     "the checkpoint cannot be read: %s", strerror(errno));
        return;
    }
    s->members = tb_calloc(MAX_FILES, sizeof(*s->members));
    for (struct dirent *d; !s->err.code && s->n < MAX_FILES && (d = readdir(dir));) {
        if (d->d_name[0] != '.' && strlen(d->d_name) < 100) add_member(s, dirfd(dir), d->d_name);
    }
    closedir(dir);
    qsort(s->members, (size_t)s->n, sizeof(*s->members), by_name);
    uint64_t at = 0;
    for (int i = 0; i < s->n; i++) {
        s->members[i].at = at;
        at += BLOCK + (s->members[i].size + BLOCK - 1) / BLOCK * BLOCK;
    }
    s->source.size = at + END;
}

static int read_file(const struct member *m, uint64_t at, char *to, size_t n)
{
    while (n > 0) {
        ssize_t r = pread(m->fd, to, n, (off_t)at);
        if (r < 0 && errno == EINTR) continue;
        if (r <= 0) {
            tb_log(TB_LOG_ERROR, "api", "archive cut short: cannot read %s: %s", m->name,
                   r ? strerror(errno) : "it became shorter");
            return TB_EIO;
        }
        to += r;
        at += (uint64_t)r;
        n -= (size_t)r;
    }
    return 0;
}

/* The part [from, from + len) of the tar, as far as it lies in [at, at + n): its start in the
 * buffer and in itself, and its length. */
static size_t overlap(uint64_t from, uint64_t len, uint64_t at, size_t n, size_t *in_buf,
                      uint64_t *in_part)
{
    uint64_t begin = TB_MAX(from, at), end = TB_MIN(from + len, at + n);
    if (begin >= end) return 0;
    *in_buf = (size_t)(begin - at);
    *in_part = begin - from;
    return (size_t)(end - begin);
}

static int archive_read(struct tb_http_source *source, uint64_t at, void *to, size_t n)
{
    const struct archive *s = TB_CONTAINER_OF(source, struct archive, source);
    char *buf = to;
    size_t in_buf, k;
    uint64_t from;
    memset(buf, 0, n); /* what pads the files, and the end */
    for (int i = 0; i < s->n; i++) {
        const struct member *m = &s->members[i];
        if ((k = overlap(m->at, BLOCK, at, n, &in_buf, &from)))
            memcpy(buf + in_buf, m->header + from, k);
        k = overlap(m->at + BLOCK, m->size, at, n, &in_buf, &from);
        if (k && read_file(m, from, buf + in_buf, k)) return TB_EIO;
    }
    return 0;
}

/* ---- on the loop */

static void on_opened(uv_work_t *w, int status)
{
    struct archive *s = TB_CONTAINER_OF(w, struct archive, work);
    struct tb_api *a = s->a;
    if (status) tb_error_set(&s->err, TB_EINTERNAL, "cannot queue work");
    if (s->err.code) {
        tb_api_error(s->req, &s->err);
        archive_free(&s->source);
    } else {
        tb_http_respond_source(s->req, &s->source, "application/x-tar", NULL, 0);
    }
    tb_api_work_end(a);
}

void tb_tinker_send_archive(struct tb_api *a, struct tb_http_request *req, const char *dir)
{
    struct archive *s = tb_calloc(1, sizeof(*s));
    s->source.read = archive_read;
    s->source.free = archive_free;
    s->a = a;
    s->req = req;
    s->dir_path = tb_strdup(dir);
    tb_api_work_begin(a);
    int rc = uv_queue_work(tb_api_loop(a), &s->work, open_members, on_opened);
    if (rc) on_opened(&s->work, rc);
}
