/* Finding and loading the CUDA backend's module (module.h). */
#include "backend/module.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdlib.h>
#include <unistd.h>

#include "util/mem.h"

static void log_line(void *arg, enum tb_log_level level, const char *module, const char *text)
{
    (void)arg;
    tb_log(level, module, "%s", text);
}

/* The build tree has src/server/tinkerbell and src/cuda/tb-cuda.so. NULL: it is not there. */
static char *beside_program(void)
{
    char exe[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", exe, sizeof(exe));
    while (n > 0 && exe[n - 1] != '/')
        n--;
    if (n <= 0) return NULL;
    char *path = tb_asprintf("%.*s../cuda/" TB_MODULE_FILE, (int)n, exe);
    if (access(path, R_OK) == 0) return path;
    tb_free(path);
    return NULL;
}

static char *find(void)
{
    const char *named = getenv("TB_CUDA_MODULE");
    char *path = named ? NULL : beside_program();
    return path ? path : tb_strdup(named ? named : TB_MODULE_DIR "/" TB_MODULE_FILE);
}

static int load(const char *path, tb_module_entry **entry, struct tb_error *err)
{
    if (access(path, R_OK) != 0)
        return tb_error_set(err, TB_EUNSUPPORTED, "the CUDA backend is not installed: no %s", path);
    /* CUDA's libraries leave threads and exit handlers behind: it is never unloaded. */
    void *module = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (!module)
        return tb_error_set(err, TB_EUNSUPPORTED, "the CUDA backend cannot be loaded: %s",
                            dlerror());
    *(void **)entry = dlsym(module, TB_MODULE_ENTRY);
    if (!*entry) return tb_error_set(err, TB_EUNSUPPORTED, "%s is no CUDA backend", path);
    return 0;
}

int tb_module_create(struct tb_backend **out, const struct tb_backend_options *options,
                     struct tb_error *err)
{
    char stamp[TB_MODULE_STAMP], *path = find();
    tb_module_entry *entry;
    int rc = load(path, &entry, err);
    tb_free(path);
    if (rc) return rc;
    tb_module_stamp(stamp, TB_VERSION);
    return entry(stamp, tb_log_level(), log_line, out, options, err);
}
