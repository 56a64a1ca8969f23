/*
 * Choice of a backend by the names that --backend and --dtype take.
 *
 * Owner: the caller owns the backend and ends it with ops->destroy. Thread: any, before the backend
 * is shared.
 */
#include "backend/backend.h"

#include <string.h>
#include <unistd.h>

#include "backend/cpu/cpu.h"
#include "backend/module.h"
#include "util/log.h"

/* Whether there is a driver to ask: a look that costs nothing, unlike CUDA's libraries. */
static bool has_nvidia_device(void)
{
    return access("/dev/nvidiactl", F_OK) == 0 || access("/dev/dxg", F_OK) == 0;
}

/* bf16 where the device has instructions for it. */
static int parse_dtype(const char *dtype, bool has_bf16, enum tb_dtype *out, struct tb_error *err)
{
    if (!dtype || strcmp(dtype, "auto") == 0)
        *out = has_bf16 ? TB_BF16 : TB_F32;
    else if (strcmp(dtype, "bf16") == 0)
        *out = TB_BF16;
    else if (strcmp(dtype, "f32") == 0)
        *out = TB_F32;
    else
        return tb_error_set(err, TB_EINVAL, "unknown dtype '%s': auto, bf16 or f32", dtype);
    return 0;
}

int tb_backend_create(struct tb_backend **out, const char *name, const char *dtype,
                      const struct tb_backend_options *options, struct tb_error *err)
{
    struct tb_backend_options o = {0};
    if (options) o = *options;
    if (!name) name = "auto";
    *out = NULL;
    bool cpu = strcmp(name, "cpu") == 0, cuda = strcmp(name, "cuda") == 0;
    if (!cpu && !cuda && strcmp(name, "auto") != 0)
        return tb_error_set(err, TB_EINVAL, "unknown backend '%s': auto, cpu or cuda", name);
    int rc = parse_dtype(dtype, true, &o.act, err);
    if (rc) return rc;
    if (!cpu) {
        struct tb_error why = {0};
        rc = cuda || has_nvidia_device()
                 ? tb_module_create(out, &o, &why)
                 : tb_error_set(&why, TB_EUNSUPPORTED, "no NVIDIA device is there");
        if (rc == 0) return 0;
        if (cuda) {
            *err = why;
            return rc;
        }
        tb_log(TB_LOG_INFO, "backend", "auto takes the CPU: %s", why.msg);
    }
    (void)parse_dtype(dtype, tb_cpu_has_bf16(o.isa), &o.act, err);
    return tb_backend_cpu_create(out, &o, err);
}
