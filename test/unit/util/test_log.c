/* Log: levels, the callback, the stderr line, and that clients cannot forge lines. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include <stdio.h>
#include <unistd.h>

#include "util/error.h"
#include "util/log.h"

static struct {
    int n;
    enum tb_log_level level;
    char module[32], text[4096];
} got;

static void sink(void *arg, enum tb_log_level level, const char *module, const char *text)
{
    assert_ptr_equal(arg, &got);
    got.n++;
    got.level = level;
    snprintf(got.module, sizeof(got.module), "%s", module);
    snprintf(got.text, sizeof(got.text), "%s", text);
}

static void test_callback(void **state)
{
    memset(&got, 0, sizeof(got));
    tb_log_set(TB_LOG_WARN, sink, &got);
    assert_int_equal(tb_log_level(), TB_LOG_WARN);
    tb_log(TB_LOG_INFO, "x", "not this");
    assert_int_equal(got.n, 0);
    tb_log(TB_LOG_WARN, "mod", "a=%d b=%s", 1, "two\nERROR forged\x1b[2J");
    assert_int_equal(got.n, 1);
    assert_int_equal(got.level, TB_LOG_WARN);
    assert_string_equal(got.module, "mod");
    assert_string_equal(got.text, "a=1 b=two ERROR forged [2J");
    char big[8192];
    memset(big, 'y', sizeof(big) - 1);
    big[sizeof(big) - 1] = '\0';
    tb_log(TB_LOG_ERROR, "mod", "%s", big);
    assert_int_equal(got.n, 2);
    assert_int_equal(strspn(got.text, "y"), strlen(got.text));
    tb_log_set(TB_LOG_INFO, NULL, NULL);
}

static void test_stderr(void **state)
{
    FILE *f = tmpfile();
    assert_non_null(f);
    int saved = dup(2);
    dup2(fileno(f), 2);
    tb_log_set(TB_LOG_INFO, NULL, NULL);
    tb_log(TB_LOG_INFO, "http", "listening port=%d", 80);
    tb_log(TB_LOG_DEBUG, "http", "silent");
    dup2(saved, 2);
    close(saved);
    char line[256] = "";
    rewind(f);
    assert_non_null(fgets(line, sizeof(line), f));
    int y, mo, d, h, mi, s, ms, end = 0;
    assert_int_equal(sscanf(line, "%4d-%2d-%2dT%2d:%2d:%2d.%3dZ INFO  http: listening port=80\n%n",
                            &y, &mo, &d, &h, &mi, &s, &ms, &end),
                     7);
    assert_int_equal(end, strlen(line));
    assert_null(fgets(line, sizeof(line), f));
    fclose(f);
}

static void test_levels(void **state)
{
    enum tb_log_level level = TB_LOG_ERROR;
    assert_int_equal(tb_log_level_parse("debug", &level), 0);
    assert_int_equal(level, TB_LOG_DEBUG);
    assert_int_equal(tb_log_level_parse("TRACE", &level), 0);
    assert_int_equal(level, TB_LOG_TRACE);
    assert_int_equal(tb_log_level_parse("loud", &level), TB_EINVAL);
    assert_int_equal(tb_log_level_parse("", &level), TB_EINVAL);
    assert_int_equal(level, TB_LOG_TRACE);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_callback),
        cmocka_unit_test(test_stderr),
        cmocka_unit_test(test_levels),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
