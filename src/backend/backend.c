/*
 * Choice of a backend by the names that --backend and --dtype take.
 *
 * Owner: the caller owns the backend and ends it with ops->destroy. Thread: any, before the backend
 * is shared.
 */
#include "backend/backend.h"

#include <string.h>

#include "backend/cpu/cpu.h"

int tb_backend_create(struct tb_backend **out, const char *name, const char *dtype,
                      const struct tb_backend_options *options, struct tb_error *err)
{
    struct tb_backend_options o = {0};
    if (options) o = *options;
    *out = NULL;
    if (name && strcmp(name, "cuda") == 0)
        return tb_error_set(err, TB_EUNSUPPORTED, "this build has no CUDA backend");
    if (name && strcmp(name, "auto") != 0 && strcmp(name, "cpu") != 0)
        return tb_error_set(err, TB_EINVAL, "unknown backend '%s': auto, cpu or cuda", name);
    if (!dtype || strcmp(dtype, "auto") == 0)
        o.act = tb_cpu_has_bf16(o.isa) ? TB_BF16 : TB_F32;
    else if (strcmp(dtype, "bf16") == 0)
        o.act = TB_BF16;
    else if (strcmp(dtype, "f32") == 0)
        o.act = TB_F32;
    else
        return tb_error_set(err, TB_EINVAL, "unknown dtype '%s': auto, bf16 or f32", dtype);
    return tb_backend_cpu_create(out, &o, err);
}
