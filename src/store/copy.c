/*
 * Copies of checkpoints: a new folder with hard links to the old one's tensors, and a description
 * and rows of its own. Files of a checkpoint are never changed in place, so neither sees what
 * happens to the other; on a file system without links the bytes are copied. Pool threads.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "store/store_internal.h"
#include "util/clock.h"
#include "util/mem.h"

static int io(struct tb_error *err, const char *what, const char *path)
{
    return tb_error_set(err, TB_EIO, "cannot %s %s: %s", what, path, strerror(errno));
}

static int copy_bytes(const char *from, const char *to, struct tb_error *err)
{
    enum { CHUNK = 1 << 20 };
    int rc = 0, in = open(from, O_RDONLY | O_CLOEXEC), out = -1;
    char *buf = tb_malloc(CHUNK);
    if (in < 0) rc = io(err, "open", from);
    if (!rc && (out = open(to, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666)) < 0)
        rc = io(err, "create", to);
    while (!rc) {
        ssize_t n = read(in, buf, CHUNK), done = 0;
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) rc = io(err, "read", from);
        if (n <= 0) break;
        while (done < n && !rc) {
            ssize_t k = write(out, buf + done, (size_t)(n - done));
            if (k > 0)
                done += k;
            else if (k == 0 || errno != EINTR)
                rc = io(err, "write", to);
        }
    }
    if (!rc && fsync(out)) rc = io(err, "sync", to);
    if (in >= 0) close(in);
    if (out >= 0 && close(out) && !rc) rc = io(err, "close", to);
    tb_free(buf);
    return rc;
}

int tb_link_or_copy(const char *from, const char *to, struct tb_error *err)
{
    if (link(from, to) == 0) return 0;
    if (errno == ENOENT) return io(err, "link", from);
    return copy_bytes(from, to, err);
}

/* The copy's row; a repeat of the request finds what the first one made. */
static int prepare(struct tb_store *s, struct tb_job *j, const struct tb_tinker_path *to,
                   bool *there)
{
    const struct tb_ckpt_copy *c = &j->copy;
    struct tb_ckpt_row old;
    bool found;
    *there = false;
    int rc = tb_ckpt_find_row(s, &j->arena, to, &old, &found, &j->err);
    if (rc) return rc;
    if (found && strcmp(old.tenant, c->tenant) != 0) /* ids made of keys may meet */
        return tb_error_set(&j->err, TB_EEXIST, "%s is taken; copy with another key", j->text[0]);
    if (found && !tb_ckpt_expired(&old, tb_clock_wall_us())) {
        j->ckpt = old;
        *there = true;
        return 0;
    }
    rc = tb_ckpt_find_live(s, &j->arena, &j->path, c->reader, true, &j->ckpt, &j->err);
    if (rc) return rc;
    j->ckpt.run_id = c->run_id;
    j->ckpt.tenant = c->tenant;
    j->ckpt.path = j->text[0];
    j->ckpt.time_us = tb_clock_wall_us();
    j->ckpt.is_public = false;
    j->ckpt.expires_us = tb_ckpt_expiry(j->ckpt.time_us, c->ttl_seconds);
    return 0;
}

static void work_copy(struct tb_store *s, struct tb_job *j)
{
    char write_id[TB_WRITE_ID + 1];
    bool there;
    struct tb_tinker_path to = j->path;
    snprintf(to.run, sizeof(to.run), "%s", j->copy.run_id);
    j->text[0] =
        tb_arena_printf(&j->arena, "tinker://%s/%s/%s", to.run, tb_ckpt_kind_dir(to.kind), to.name);
    struct tb_tinker_path parsed;
    if (tb_tinker_path_parse(j->text[0], strlen(j->text[0]), &parsed, &j->err)) return;
    if (prepare(s, j, &to, &there) || there) return;
    struct tb_run_row run = {.id = to.run,
                             .tenant = j->copy.tenant,
                             .session_id = j->copy.session_id,
                             .project_id = j->copy.project_id,
                             .base_model = j->ckpt.base_model,
                             .lora = j->ckpt.lora,
                             .created_us = j->ckpt.time_us,
                             .last_request_us = j->ckpt.time_us};
    tb_random_id(write_id, TB_WRITE_ID);
    char *from = tb_ckpt_path(s, j->path.run, j->path.kind, j->path.name);
    char *final = tb_ckpt_path(s, to.run, to.kind, to.name);
    char *tmp = tb_tmp_path(s, "copy");
    int rc = tb_mkdir(tmp, &j->err);
    if (!rc) rc = tb_ckpt_link_files(from, tmp, write_id, &j->ckpt, &j->err);
    if (!rc) rc = tb_run_put(s, &run, true, &j->err);
    if (!rc) tb_ckpt_install(s, write_id, tmp, final, &j->ckpt, &j->err);
    tb_remove_tree(tmp); /* what failed, or an expired one that was there */
    tb_free(tmp);
    tb_free(final);
    tb_free(from);
}

static void done_copy(struct tb_job *j)
{
    j->cb.ckpt(j->arg, &j->err, j->err.code ? NULL : &j->ckpt);
}

void tb_store_copy_ckpt(struct tb_store *s, const struct tb_ckpt_copy *copy, tb_store_ckpt_cb cb,
                        void *arg)
{
    struct tb_job *j = tb_job_create(work_copy, done_copy, false);
    tb_job_path(j, copy->path);
    j->copy = (struct tb_ckpt_copy){.reader = tb_job_dup(j, copy->reader),
                                    .tenant = tb_job_dup(j, copy->tenant),
                                    .run_id = tb_job_dup(j, copy->run_id),
                                    .session_id = tb_job_dup(j, copy->session_id),
                                    .project_id = tb_job_dup(j, copy->project_id),
                                    .ttl_seconds = copy->ttl_seconds};
    j->cb.ckpt = cb;
    j->arg = arg;
    tb_job_submit(s, j);
}
