/*
 * Files and sources as answers: opened, examined and read piece by piece in the uv pool; the next
 * piece is read when the socket has taken the last one, so a slow client costs one piece of memory.
 *
 * Owner: the exchange, except while a pool request is in flight: if the exchange goes away then,
 * the request's callback frees the file or source. The server waits for such files before it goes.
 * Thread: the loop's.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "http/internal.h"
#include "util/log.h"

enum { PIECE = 256 * 1024 };

struct tb_http_file {
    struct tb_http_server *server;
    struct tb_http_exchange *x;    /* NULL: detached */
    struct tb_http_source *source; /* NULL: a file */
    uv_fs_t fs;
    uv_work_t work; /* reads the source */
    ssize_t got;    /* of the source */
    bool busy;      /* fs or work is in flight */
    bool sending;   /* a piece (or the head) is on its way */
    uv_file fd;
    uint64_t at, left; /* what is still to be read */
    char *content_type;
    struct tb_http_field *fields; /* with room for ours */
    size_t n_fields;
    char *buf;
};

enum { OUR_FIELDS = 3 };

static void file_free(struct tb_http_file *f)
{
    struct tb_http_server *s = f->server;
    if (f->source) f->source->free(f->source);
    for (size_t i = 0; f->fields && i < f->n_fields; i++) {
        tb_free((char *)(uintptr_t)f->fields[i].name);
        tb_free((char *)(uintptr_t)f->fields[i].value);
    }
    tb_free(f->fields);
    tb_free(f->content_type);
    tb_free(f->buf);
    tb_free(f);
    s->n_files--;
    tb_http_server_check(s);
}

static void file_closed(uv_fs_t *fs)
{
    struct tb_http_file *f = TB_CONTAINER_OF(fs, struct tb_http_file, fs);
    uv_fs_req_cleanup(fs);
    file_free(f);
}

static void file_destroy(struct tb_http_file *f)
{
    if (f->fd < 0) {
        file_free(f);
        return;
    }
    f->busy = true;
    if (uv_fs_close(f->server->loop, &f->fs, f->fd, file_closed)) file_closed(&f->fs);
}

void tb_http_file_detach(struct tb_http_file *f)
{
    f->x->file = NULL;
    f->x = NULL;
    if (!f->busy) file_destroy(f);
}

/* Ends the answer: completely, or (when the bytes cannot be had any more) by cutting it off. */
static void finish(struct tb_http_file *f, bool complete)
{
    struct tb_http_exchange *x = f->x;
    struct tb_http_conn *c = x->req.conn;
    bool call = x->call != NULL;
    tb_http_file_detach(f);
    if (call && complete) {
        tb_http_call_done(x);
    } else if (call) {
        tb_http_call_cut(x);
    } else if (complete) {
        tb_http_conn_sent(c);
    } else {
        tb_http_conn_close(c);
    }
}

static void read_next(struct tb_http_file *f);

/* A piece has been read. */
static void read_end(struct tb_http_file *f, ssize_t n)
{
    f->busy = false;
    if (!f->x) {
        file_destroy(f);
        return;
    }
    if (n <= 0) { /* an error, or the file shrank: the announced length cannot be kept */
        tb_log(TB_LOG_ERROR, "http", "cannot read a file: %s",
               n < 0 ? tb_error_name((int)n) : "unexpected end");
        finish(f, false);
        return;
    }
    f->at += (uint64_t)n;
    f->left -= (uint64_t)n;
    struct tb_http_conn *c = f->x->req.conn;
    if (!c) {
        tb_http_call_body(f->x, f->buf, (size_t)n);
        f->sending = true;
        tb_http_file_sent(f);
        return;
    }
    uv_buf_t buf = {.base = f->buf, .len = (size_t)n};
    f->sending = true;
    if (tb_http_conn_send(c, &buf, 1, true)) tb_http_conn_sent(c);
}

static void file_read(uv_fs_t *fs)
{
    struct tb_http_file *f = TB_CONTAINER_OF(fs, struct tb_http_file, fs);
    ssize_t n = fs->result;
    uv_fs_req_cleanup(fs);
    read_end(f, n);
}

static size_t piece(const struct tb_http_file *f)
{
    return (size_t)TB_MIN(f->left, (uint64_t)PIECE);
}

/* Pool thread. */
static void source_work(uv_work_t *w)
{
    struct tb_http_file *f = TB_CONTAINER_OF(w, struct tb_http_file, work);
    int rc = f->source->read(f->source, f->at, f->buf, piece(f));
    f->got = rc ? rc : (ssize_t)piece(f);
}

static void source_read(uv_work_t *w, int status)
{
    struct tb_http_file *f = TB_CONTAINER_OF(w, struct tb_http_file, work);
    read_end(f, status ? status : f->got);
}

static void read_next(struct tb_http_file *f)
{
    uv_buf_t buf = {.base = f->buf, .len = piece(f)};
    uv_loop_t *loop = f->server->loop;
    f->busy = true;
    int rc = f->source ? uv_queue_work(loop, &f->work, source_work, source_read)
                       : uv_fs_read(loop, &f->fs, f->fd, &buf, 1, (int64_t)f->at, file_read);
    if (rc) {
        f->busy = false;
        finish(f, false);
    }
}

void tb_http_file_sent(struct tb_http_file *f)
{
    if (f->busy || !f->sending) return;
    f->sending = false;
    if (f->left == 0) {
        finish(f, true);
        return;
    }
    struct tb_http_conn *c = f->x->req.conn;
    if (c && c->wait != TB_HTTP_WAIT_ANSWER) tb_http_conn_wait(c, TB_HTTP_WAIT_ANSWER);
    read_next(f);
}

/* ---- ranges */

enum range { RANGE_NONE, RANGE_OK, RANGE_BAD };

/* One byte range of RFC 9110 14.1.2. What is malformed, or several ranges, counts as none. */
static enum range range_parse(struct tb_span v, uint64_t size, uint64_t *first, uint64_t *last)
{
    if (v.n < 6 || !tb_span_ieq((struct tb_span){v.p, 6}, "bytes=")) return RANGE_NONE;
    struct tb_span r = {v.p + 6, v.n - 6};
    const char *dash = memchr(r.p, '-', r.n);
    if (!dash) return RANGE_NONE;
    struct tb_span a = {r.p, (size_t)(dash - r.p)}, b = {dash + 1, r.n - a.n - 1};
    uint64_t x, y;
    if (a.n == 0) { /* the last y bytes */
        if (!tb_span_u64(b, &y)) return RANGE_NONE;
        if (y == 0 || size == 0) return RANGE_BAD;
        *first = y >= size ? 0 : size - y;
        *last = size - 1;
        return RANGE_OK;
    }
    if (!tb_span_u64(a, &x)) return RANGE_NONE;
    if (b.n == 0) {
        y = UINT64_MAX;
    } else if (!tb_span_u64(b, &y) || y < x) {
        return RANGE_NONE;
    }
    if (x >= size) return RANGE_BAD;
    *first = x;
    *last = TB_MIN(y, size - 1);
    return RANGE_OK;
}

/* ---- opening */

static void fail(struct tb_http_file *f, int status, const char *text)
{
    struct tb_http_exchange *x = f->x;
    tb_http_file_detach(f);
    tb_http_respond_error(x, status, text, true);
}

static void field_add(struct tb_http_file *f, const char *name, const char *value)
{
    f->fields[f->n_fields++] = (struct tb_http_field){tb_strdup(name), tb_strdup(value)};
}

/* Sends the head, and the first piece when there is one. */
static void send_head(struct tb_http_file *f, uint64_t size, int64_t modified_s)
{
    struct tb_http_exchange *x = f->x;
    char text[96], modified[TB_TIME_TEXT];
    tb_clock_http_date(modified_s * 1000000, modified);
    uint64_t first = 0, last = size ? size - 1 : 0;
    enum range range = RANGE_NONE;
    struct tb_span want = tb_http_header_get(&x->req, "range");
    struct tb_span condition = tb_http_header_get(&x->req, "if-range");
    if (want.p && x->req.method == TB_HTTP_GET &&
        (!condition.p || tb_span_eq(condition, modified))) {
        range = range_parse(want, size, &first, &last);
    }
    int status = 200;
    f->at = first;
    f->left = size;
    if (range == RANGE_BAD) {
        status = 416;
        f->left = 0;
        snprintf(text, sizeof(text), "bytes */%llu", (unsigned long long)size);
        field_add(f, "Content-Range", text);
    } else if (range == RANGE_OK) {
        status = 206;
        f->left = last - first + 1;
        snprintf(text, sizeof(text), "bytes %llu-%llu/%llu", (unsigned long long)first,
                 (unsigned long long)last, (unsigned long long)size);
        field_add(f, "Content-Range", text);
    }
    field_add(f, "Accept-Ranges", "bytes");
    field_add(f, "Last-Modified", modified);
    uint64_t length = f->left;
    if (x->head) f->left = 0;
    if (f->left) f->buf = tb_try_malloc((size_t)TB_MIN(f->left, (uint64_t)PIECE));
    if (f->left && !f->buf) {
        fail(f, 503, "out of memory");
        return;
    }
    f->sending = true;
    const char *type = status == 416 ? NULL : f->content_type;
    x->file = NULL; /* the 500 of an invalid head is an ordinary answer */
    bool ok = tb_http_respond_head(x, status, type, length, f->fields, f->n_fields);
    if (!ok) {
        f->x = NULL;
        file_destroy(f);
        return;
    }
    x->file = f;
    struct tb_http_conn *c = x->req.conn;
    if (c) {
        tb_http_conn_sent(c);
    } else {
        tb_http_file_sent(f);
    }
}

static void stat_done(uv_fs_t *fs)
{
    struct tb_http_file *f = TB_CONTAINER_OF(fs, struct tb_http_file, fs);
    ssize_t rc = fs->result;
    uv_stat_t st = fs->statbuf;
    uv_fs_req_cleanup(fs);
    f->busy = false;
    if (!f->x)
        file_destroy(f);
    else if (rc < 0 || (st.st_mode & S_IFMT) != S_IFREG)
        fail(f, 404, "file not found");
    else
        send_head(f, st.st_size, st.st_mtim.tv_sec);
}

static void open_done(uv_fs_t *fs)
{
    struct tb_http_file *f = TB_CONTAINER_OF(fs, struct tb_http_file, fs);
    f->fd = fs->result < 0 ? -1 : (uv_file)fs->result;
    uv_fs_req_cleanup(fs);
    f->busy = false;
    if (!f->x) {
        file_destroy(f);
        return;
    }
    int rc = UV_ENOENT;
    if (f->fd >= 0) {
        f->busy = true;
        rc = uv_fs_fstat(f->server->loop, &f->fs, f->fd, stat_done);
        if (rc) f->busy = false;
    }
    if (rc) fail(f, 404, "file not found");
}

static struct tb_http_file *file_create(struct tb_http_exchange *x, const char *content_type,
                                        const struct tb_http_field *fields, size_t n_fields)
{
    struct tb_http_server *s = x->server;
    struct tb_http_file *f = tb_calloc(1, sizeof(*f));
    f->server = s;
    f->x = x;
    f->fd = -1;
    f->content_type = content_type ? tb_strdup(content_type) : NULL;
    f->fields = tb_calloc(n_fields + OUR_FIELDS, sizeof(*f->fields));
    for (size_t i = 0; i < n_fields; i++)
        field_add(f, fields[i].name, fields[i].value);
    x->file = f;
    s->n_files++;
    return f;
}

void tb_http_respond_source(struct tb_http_request *req, struct tb_http_source *s,
                            const char *content_type, const struct tb_http_field *fields,
                            size_t n_fields)
{
    struct tb_http_exchange *x = tb_http_exchange_of(req);
    if (!tb_http_answer_begin(x)) {
        s->free(s);
        return;
    }
    struct tb_http_file *f = file_create(x, content_type, fields, n_fields);
    f->source = s;
    send_head(f, s->size, s->modified_s);
}

void tb_http_respond_file(struct tb_http_request *req, const char *path, const char *content_type,
                          const struct tb_http_field *fields, size_t n_fields)
{
    struct tb_http_exchange *x = tb_http_exchange_of(req);
    if (!tb_http_answer_begin(x)) return;
    struct tb_http_file *f = file_create(x, content_type, fields, n_fields);
    /* Not blocking: a FIFO must not hold a pool thread. It is refused once it is examined. */
    f->busy = true;
    int rc = uv_fs_open(x->server->loop, &f->fs, path, O_RDONLY | O_NONBLOCK, 0, open_done);
    if (rc) {
        f->busy = false;
        fail(f, 404, "file not found");
    }
}
