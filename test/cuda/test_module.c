/* Loading a backend's module by name, and one that does not fit the program. TB_CUDA_MODULE is the
 * emulation's. */
#include <dlfcn.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "backend/module.h"

static void test_load(void **state)
{
    static const char *const names[] = {"auto", "bf16", "f32"};
    static const enum tb_dtype acts[] = {TB_BF16, TB_BF16, TB_F32};
    for (int i = 0; i < 3; i++) {
        struct tb_backend *be = NULL;
        struct tb_error err = {0};
        struct tb_backend_options o = {.mem_limit = (size_t)256 << 20};
        if (tb_backend_create(&be, "cuda", names[i], &o, &err)) fail_msg("%s", err.msg);
        assert_string_equal(be->ops->name, "cuda");
        assert_int_equal(be->act, acts[i]);
        be->ops->destroy(be);
    }
}

static void test_stamp(void **state)
{
    struct tb_backend *be = NULL;
    struct tb_error err = {0};
    struct tb_backend_options o = {0};
    tb_module_entry *entry;
    void *module = dlopen(getenv("TB_CUDA_MODULE"), RTLD_NOW | RTLD_LOCAL);
    assert_non_null(module);
    *(void **)&entry = dlsym(module, TB_MODULE_ENTRY);
    assert_non_null(entry);
    assert_int_equal(entry("0.0.1-1-2-3-4", TB_LOG_INFO, NULL, &be, &o, &err), TB_EUNSUPPORTED);
    assert_null(be);
    assert_non_null(strstr(err.msg, "of another build ("));
    assert_null(dlsym(module, "tb_backend_cuda_create")); /* nothing else is visible */
    dlclose(module);
}

static void test_no_module(void **state)
{
    struct tb_backend *be = NULL;
    struct tb_error err = {0};
    setenv("TB_CUDA_MODULE", "/dev/null", 1);
    assert_int_equal(tb_backend_create(&be, "cuda", "auto", NULL, &err), TB_EUNSUPPORTED);
    assert_non_null(strstr(err.msg, "the CUDA backend cannot be loaded: "));
    assert_null(be);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_load),
        cmocka_unit_test(test_stamp),
        cmocka_unit_test(test_no_module),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
