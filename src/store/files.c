/*
 * File system helpers of the store (see store_internal.h). They run on a pool thread, or on the
 * loop's during open; nothing is kept between calls.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include "store/store_internal.h"
#include "util/clock.h"
#include "util/log.h"
#include "util/mem.h"

static int io_error(struct tb_error *err, const char *what, const char *path)
{
    return tb_error_set(err, TB_EIO, "%s %s: %s", what, path, strerror(errno));
}

char *tb_path_join(const char *a, const char *b)
{
    return tb_asprintf("%s/%s", a, b);
}

char *tb_ckpt_path(const struct tb_store *s, const char *run, enum tb_ckpt_kind kind,
                   const char *name)
{
    return tb_asprintf("%s/checkpoints/%s/%s/%s", s->dir, run, tb_ckpt_kind_dir(kind), name);
}

bool tb_is_dir(const char *path)
{
    struct stat sb;
    return lstat(path, &sb) == 0 && S_ISDIR(sb.st_mode);
}

int tb_mkdir(const char *path, struct tb_error *err)
{
    if (mkdir(path, 0777) == 0) return 0;
    if (errno == EEXIST) {
        struct stat sb;
        if (stat(path, &sb) == 0 && S_ISDIR(sb.st_mode)) return 0;
        errno = ENOTDIR;
    }
    return io_error(err, "cannot make folder", path);
}

int tb_fsync_path(const char *path, struct tb_error *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return io_error(err, "cannot open", path);
    int rc = 0;
    if (fsync(fd)) rc = io_error(err, "cannot sync", path);
    close(fd);
    return rc;
}

int tb_ckpt_mkdirs(const struct tb_store *s, const char *run, enum tb_ckpt_kind kind,
                   struct tb_error *err)
{
    char *base = tb_path_join(s->dir, "checkpoints");
    char *a = tb_path_join(base, run), *b = tb_path_join(a, tb_ckpt_kind_dir(kind));
    bool new_a = !tb_is_dir(a), new_b = !tb_is_dir(b);
    int rc = tb_mkdir(a, err);
    if (!rc) rc = tb_mkdir(b, err);
    if (!rc && new_a) rc = tb_fsync_path(base, err);
    if (!rc && new_b) rc = tb_fsync_path(a, err);
    tb_free(base);
    tb_free(a);
    tb_free(b);
    return rc;
}

int tb_write_file(const char *path, const void *p, size_t n, struct tb_error *err)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) return io_error(err, "cannot create", path);
    const char *c = p;
    int rc = 0;
    while (n && !rc) {
        ssize_t w = write(fd, c, n);
        if (w < 0 && errno == EINTR) continue;
        if (w < 0) {
            rc = io_error(err, "cannot write", path);
            break;
        }
        c += w;
        n -= (size_t)w;
    }
    if (!rc && fsync(fd)) rc = io_error(err, "cannot sync", path);
    if (close(fd) && !rc) rc = io_error(err, "cannot close", path);
    return rc;
}

int tb_read_file(const char *path, size_t max, char **out, size_t *n, struct tb_error *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return io_error(err, "cannot open", path);
    struct stat sb;
    int rc = 0;
    char *p = NULL;
    if (fstat(fd, &sb)) {
        rc = io_error(err, "cannot stat", path);
        goto out;
    }
    if (!S_ISREG(sb.st_mode) || sb.st_size < 0 || (uint64_t)sb.st_size > max) {
        rc = tb_error_set(err, TB_ECORRUPT, "%s: not a file of at most %zu bytes", path, max);
        goto out;
    }
    size_t size = (size_t)sb.st_size, have = 0;
    p = tb_try_malloc(size + 1);
    if (!p) {
        rc = tb_error_set(err, TB_ENOMEM, "%s: no memory for %zu bytes", path, size);
        goto out;
    }
    while (have < size) {
        ssize_t r = read(fd, p + have, size - have);
        if (r < 0 && errno == EINTR) continue;
        if (r < 0) {
            rc = io_error(err, "cannot read", path);
            goto out;
        }
        if (r == 0) break;
        have += (size_t)r;
    }
    p[have] = '\0';
    *out = p;
    *n = have;
    p = NULL;
out:
    tb_free(p);
    close(fd);
    return rc;
}

int tb_file_crc(const char *path, int64_t *size, uint32_t *crc, struct tb_error *err)
{
    enum { CHUNK = 1 << 20 };
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return io_error(err, "cannot open", path);
    unsigned char *p = tb_malloc(CHUNK);
    uLong c = crc32_z(0, NULL, 0);
    int64_t total = 0;
    int rc = 0;
    for (;;) {
        ssize_t r = read(fd, p, CHUNK);
        if (r < 0 && errno == EINTR) continue;
        if (r < 0) rc = io_error(err, "cannot read", path);
        if (r <= 0) break;
        c = crc32_z(c, p, (size_t)r);
        total += r;
    }
    tb_free(p);
    close(fd);
    *size = total;
    *crc = (uint32_t)c;
    return rc;
}

char *tb_tmp_path(const struct tb_store *s, const char *prefix)
{
    char id[TB_WRITE_ID + 1];
    tb_random_id(id, TB_WRITE_ID);
    return tb_asprintf("%s/tmp/%s-%s", s->dir, prefix, id);
}

int tb_dir_exchange(const struct tb_store *s, const char *a, const char *b, struct tb_error *err)
{
    if (renameat2(AT_FDCWD, a, AT_FDCWD, b, RENAME_EXCHANGE) == 0) return 0;
    if (errno != EINVAL && errno != ENOSYS) return io_error(err, "cannot replace", b);
    /* b is missing for a moment here; recovery finds a through its pending row */
    char *old = tb_tmp_path(s, "old");
    int rc = 0;
    if (rename(b, old)) {
        rc = io_error(err, "cannot move", b);
    } else if (rename(a, b)) {
        rc = io_error(err, "cannot move", a);
        if (rename(old, b))
            tb_log(TB_LOG_ERROR, "store", "cannot move back %s: %s", old, strerror(errno));
    } else if (rename(old, a)) {
        tb_log(TB_LOG_WARN, "store", "cannot move %s: %s", old, strerror(errno));
    }
    tb_free(old);
    return rc;
}

void tb_remove_tree(const char *path)
{
    struct stat sb;
    if (lstat(path, &sb)) return;
    if (!S_ISDIR(sb.st_mode)) {
        if (unlink(path))
            tb_log(TB_LOG_WARN, "store", "cannot remove %s: %s", path, strerror(errno));
        return;
    }
    DIR *d = opendir(path);
    if (d) {
        for (struct dirent *e; (e = readdir(d));) {
            if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
            char *p = tb_path_join(path, e->d_name);
            tb_remove_tree(p);
            tb_free(p);
        }
        closedir(d);
    }
    if (rmdir(path)) tb_log(TB_LOG_WARN, "store", "cannot remove %s: %s", path, strerror(errno));
}

int tb_move_to_tmp(const struct tb_store *s, const char *path, char **moved, struct tb_error *err)
{
    char *to = tb_tmp_path(s, "del");
    if (rename(path, to)) {
        int rc = io_error(err, "cannot move", path);
        tb_free(to);
        return rc;
    }
    const char *slash = strrchr(path, '/');
    char *parent = tb_strndup(path, (size_t)(slash - path));
    int rc = tb_fsync_path(parent, err);
    tb_free(parent);
    *moved = to;
    return rc;
}
