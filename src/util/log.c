/*
 * Log lines (see log.h). The level and the sink are process-wide and set before threads start;
 * writing is safe from any thread since a line is one write(2).
 */
#include "util/log.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "util/clock.h"
#include "util/error.h"
#include "util/mem.h"
#include "util/span.h"

static atomic_int max_level = TB_LOG_INFO;
static tb_log_cb sink;
static void *sink_arg;

static const char level_name[][6] = {"ERROR", "WARN", "INFO", "DEBUG", "TRACE"};

void tb_log_set(enum tb_log_level level, tb_log_cb cb, void *arg)
{
    sink = cb;
    sink_arg = arg;
    atomic_store(&max_level, (int)level);
}

int tb_log_level_parse(const char *s, enum tb_log_level *out)
{
    for (size_t i = 0; i < TB_ARRAY_LEN(level_name); i++) {
        if (tb_span_ieq(tb_span_str(s), level_name[i])) {
            *out = (enum tb_log_level)i;
            return 0;
        }
    }
    return TB_EINVAL;
}

enum tb_log_level tb_log_level(void)
{
    return (enum tb_log_level)atomic_load_explicit(&max_level, memory_order_relaxed);
}

void tb_log_write(enum tb_log_level level, const char *module, const char *fmt, ...)
{
    char line[2048];
    size_t at = 0;
    if (!sink) {
        char when[TB_TIME_TEXT];
        tb_clock_format(tb_clock_wall_us(), when);
        /* Milliseconds are enough: drop the last three digits. */
        int n = snprintf(line, sizeof(line), "%.23sZ %-5s %s: ", when, level_name[level], module);
        at = n > 0 ? TB_MIN((size_t)n, sizeof(line) / 2) : 0;
    }
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(line + at, sizeof(line) - at - 1, fmt, ap);
    va_end(ap);
    size_t end = n < 0 ? at : TB_MIN(at + (size_t)n, sizeof(line) - 2);
    /* A client's bytes may be in the text: they must not forge lines or move the terminal. */
    for (size_t i = at; i < end; i++) {
        if ((unsigned char)line[i] < 0x20 || line[i] == 0x7F) line[i] = ' ';
    }
    if (sink) {
        line[end] = '\0';
        sink(sink_arg, level, module, line + at);
        return;
    }
    line[end++] = '\n';
    ssize_t ignored = write(STDERR_FILENO, line, end);
    (void)ignored;
}
