/* Finding and loading the CUDA backend's module (module.h). */
#include "backend/module.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void log_line(void *arg, enum tb_log_level level, const char *module, const char *text)
{
    (void)arg;
    tb_log(level, module, "%s", text);
}

/* The build tree has src/server/tinkerbell and src/cuda/tb-cuda.so. */
static bool beside_program(char out[PATH_MAX])
{
    ssize_t n = readlink("/proc/self/exe", out, PATH_MAX - sizeof("/../cuda/" TB_MODULE_FILE));
    if (n <= 0) return false;
    out[n] = '\0';
    char *name = strrchr(out, '/');
    if (!name) return false;
    strcpy(name, "/../cuda/" TB_MODULE_FILE);
    return access(out, R_OK) == 0;
}

static int find(char out[PATH_MAX], struct tb_error *err)
{
    const char *named = getenv("TB_CUDA_MODULE");
    const char *installed = TB_MODULE_DIR "/" TB_MODULE_FILE;
    if (!named && beside_program(out)) return 0;
    const char *path = named ? named : installed;
    if (access(path, R_OK) != 0)
        return tb_error_set(err, TB_EUNSUPPORTED, "the CUDA backend is not installed: no %s", path);
    if (strlen(path) >= PATH_MAX)
        return tb_error_set(err, TB_EINVAL, "TB_CUDA_MODULE: more than %d bytes", PATH_MAX - 1);
    strcpy(out, path);
    return 0;
}

int tb_module_create(struct tb_backend **out, const struct tb_backend_options *options,
                     struct tb_error *err)
{
    char path[PATH_MAX], stamp[TB_MODULE_STAMP];
    tb_module_entry *entry;
    int rc = find(path, err);
    if (rc) return rc;
    /* CUDA's libraries leave threads and exit handlers behind: it is never unloaded. */
    void *module = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (!module) return tb_error_set(err, TB_EUNSUPPORTED, "the CUDA backend: %s", dlerror());
    *(void **)&entry = dlsym(module, TB_MODULE_ENTRY);
    if (!entry) return tb_error_set(err, TB_EUNSUPPORTED, "%s is no backend of Tinkerbell's", path);
    tb_module_stamp(stamp, TB_VERSION);
    return entry(stamp, tb_log_level(), log_line, out, options, err);
}
