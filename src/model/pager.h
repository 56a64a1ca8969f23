/*
 * Pager: when memory is short, adapters and published versions that nothing computes on right now
 * go to files, the least recently used first, and come back at their next use. What comes back is
 * bit for bit what went, so a client sees only time. When that is not enough, the workspaces that
 * no pass is using are given up too.
 *
 * It is the backend's reclaimer: whoever allocates need not know of it. What a call computes on is
 * held for that time (tb_adapter_hold, tb_version_hold in internal.h), and what is held stays.
 *
 * Files: one for each thing that is out, in a folder of the pager's own, without meaning to anyone
 * else; what a crash left is swept when the pager is made. When a file cannot be written the thing
 * stays in memory, and what needed the room fails; when one cannot be read back, the op that needed
 * it fails, and the file stays for the next try.
 *
 * Owner: the engine's lane; models of one backend share one. Thread: the models'.
 */
#ifndef TB_MODEL_PAGER_H
#define TB_MODEL_PAGER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "util/error.h"
#include "util/list.h"

struct tb_backend;
struct tb_pager;

/* Makes the folder, sweeps it and becomes the backend's reclaimer. */
int tb_pager_create(struct tb_pager **out, struct tb_backend *be, const char *dir,
                    struct tb_error *err);
void tb_pager_destroy(struct tb_pager *p); /* accepts NULL; the models are gone */

struct tb_pager_stats {
    uint64_t page_ins, page_outs;
};
void tb_pager_stats(const struct tb_pager *p, struct tb_pager_stats *out);

/* ---- within model/ */

/* The part of an adapter or version that the pager knows. Without a pager it stays in memory. */
struct tb_paged {
    struct tb_list node;    /* among the idle while in memory and not held */
    struct tb_pager *pager; /* or NULL */
    int (*page_out)(struct tb_paged *x, struct tb_error *err); /* frees its memory, or fails */
    size_t idle_bytes; /* memory that page_out would free, while idle */
    int holds;
    uint64_t file; /* number of its file; 0: none */
};

/* From now on it may be paged out, as the most recently used; freed memory: bytes. */
void tb_paged_idle(struct tb_paged *x, size_t bytes);
/* It may not be paged out any more. */
void tb_paged_busy(struct tb_paged *x);
/* It ends: not idle, no file. */
void tb_paged_forget(struct tb_paged *x);

/* A piece of device memory of a thing that is paged. */
struct tb_page_part {
    void *p;
    size_t bytes;
};
/* Writes the parts to a new file of x. On failure there is none. */
int tb_page_write(struct tb_paged *x, const struct tb_page_part *parts, int n,
                  struct tb_error *err);
/* Reads the parts back and deletes the file. On failure it stays. */
int tb_page_read(struct tb_paged *x, const struct tb_page_part *parts, int n, struct tb_error *err);

/* Models, for their workspaces. */
struct tb_model;
void tb_pager_add_model(struct tb_pager *p, struct tb_list *node);

#endif
