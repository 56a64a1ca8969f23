/*
 * The module's one visible name (backend/module.h).
 *
 * Owner: the caller owns the backend. Thread: any.
 */
#include "backend/module.h"

#include <string.h>

#include "cuda/cuda.h"

__attribute__((visibility("default"))) tb_module_entry tb_cuda_entry;

int tb_cuda_entry(const char *stamp, enum tb_log_level level, tb_log_cb log,
                  struct tb_backend **out, const struct tb_backend_options *options,
                  struct tb_error *err)
{
    char mine[TB_MODULE_STAMP];
    tb_module_stamp(mine, TB_VERSION);
    if (strcmp(stamp, mine) != 0)
        return tb_error_set(err, TB_EUNSUPPORTED,
                            TB_MODULE_FILE " is of another build (%s) than the program (%s)", mine,
                            stamp);
    tb_log_set(level, log, NULL);
    return tb_backend_cuda_create(out, options, err);
}
