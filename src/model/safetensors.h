/*
 * safetensors: a reader over mmap for one file or a sharded folder, and a writer of float32
 * matrices. The header is untrusted: sizes, offsets and shapes are checked before anything points
 * into the file.
 *
 * Owner: the caller of open closes it; tensors and their data live until then. Thread: a struct
 * tb_st is immutable after open, so any thread may read it; the writer keeps no state.
 */
#ifndef TB_MODEL_SAFETENSORS_H
#define TB_MODEL_SAFETENSORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "backend/backend.h"
#include "util/error.h"

#define TB_ST_MAX_DIMS 8

struct tb_st_tensor {
    const char *name;
    bool readable; /* dtype is one of F32, BF16, F16; others are only listed */
    enum tb_dtype dtype;
    const char *dtype_name; /* as in the file */
    int n_dims;
    int64_t shape[TB_ST_MAX_DIMS];
    const void *data; /* aligned to the element */
    size_t bytes;
};

struct tb_st;

/* One file. name_in_errors is what messages call it. */
int tb_st_open(struct tb_st **out, const char *path, struct tb_error *err);
/* A model folder: model.safetensors.index.json and its shards, else model.safetensors. */
int tb_st_open_dir(struct tb_st **out, const char *dir, struct tb_error *err);
void tb_st_close(struct tb_st *st); /* accepts NULL */

size_t tb_st_count(const struct tb_st *st);
const struct tb_st_tensor *tb_st_at(const struct tb_st *st, size_t i);           /* in file order */
const struct tb_st_tensor *tb_st_find(const struct tb_st *st, const char *name); /* NULL: none */
/* A value of the (first) file's __metadata__, or NULL. */
const char *tb_st_metadata(const struct tb_st *st, const char *key);
/* Finds a readable tensor of exactly this shape (n_dims 1: cols is ignored). The error names the
 * tensor. */
int tb_st_require(const struct tb_st *st, const char *name, int n_dims, int64_t rows, int64_t cols,
                  const struct tb_st_tensor **out, struct tb_error *err);
/* Tells the kernel that the pages of a tensor are not needed now; they come back when read. */
void tb_st_drop_pages(const struct tb_st *st, const struct tb_st_tensor *t);
/* A tensor's elements as float32 (n = elements). */
void tb_st_to_float(const struct tb_st_tensor *t, float *out, size_t n);

struct tb_st_out { /* one tensor to write: float32, row-major */
    const char *name;
    int32_t rows, cols; /* cols 0: one dimension */
    const float *data;
};
struct tb_st_meta {
    const char *key, *value;
};
/* Writes a whole file to fd from its start. fsync and close are the caller's. */
int tb_st_write_fd(int fd, const struct tb_st_out *tensors, size_t n, const struct tb_st_meta *meta,
                   size_t n_meta, struct tb_error *err);
/* The same to a path, created or truncated, without fsync. */
int tb_st_write_path(const char *path, const struct tb_st_out *tensors, size_t n,
                     const struct tb_st_meta *meta, size_t n_meta, struct tb_error *err);

#endif
