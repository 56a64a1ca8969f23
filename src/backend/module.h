/*
 * A backend in a shared object of its own, loaded when it is asked for: tb-cuda.so. It has its own
 * copy of the few functions of util/ and backend/ that it needs; its log lines go to the program's.
 *
 * Owner: a loaded module stays for good; a backend that it made is its caller's. Thread: any.
 */
#ifndef TB_BACKEND_MODULE_H
#define TB_BACKEND_MODULE_H

#include <stdio.h>

#include "backend/backend.h"
#include "util/log.h"

#define TB_MODULE_FILE  "tb-cuda.so"
#define TB_MODULE_ENTRY "tb_cuda_entry"

/* What the module exports. stamp: the caller's tb_module_stamp; another than the module's own means
 * that the two do not fit together, and is refused. */
typedef int tb_module_entry(const char *stamp, enum tb_log_level level, tb_log_cb log,
                            struct tb_backend **out, const struct tb_backend_options *options,
                            struct tb_error *err);

#define TB_MODULE_STAMP 96

static inline void tb_module_stamp(char out[TB_MODULE_STAMP], const char *version)
{
    snprintf(out, TB_MODULE_STAMP, "%s-%zu-%zu-%zu-%zu", version, sizeof(struct tb_backend),
             sizeof(struct tb_backend_ops), sizeof(struct tb_backend_options),
             sizeof(struct tb_error));
}

/* A CUDA backend from the module. It is looked for at TB_CUDA_MODULE if the environment has that,
 * else in the build tree that the program runs from, else where it is installed. */
int tb_module_create(struct tb_backend **out, const struct tb_backend_options *options,
                     struct tb_error *err);

#endif
