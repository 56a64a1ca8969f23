/*
 * Log: one line per event, `2026-01-02T03:04:05.678Z INFO  http: text key=value`, to stderr by
 * default or to an embedder's callback. Nothing secret (keys, prompts) is ever logged.
 *
 * Thread: any; a line is written with one call. The level and the sink are set before threads
 * start.
 */
#ifndef TB_UTIL_LOG_H
#define TB_UTIL_LOG_H

enum tb_log_level { TB_LOG_ERROR, TB_LOG_WARN, TB_LOG_INFO, TB_LOG_DEBUG, TB_LOG_TRACE };

typedef void (*tb_log_cb)(void *arg, enum tb_log_level level, const char *module, const char *text);

void tb_log_set(enum tb_log_level level, tb_log_cb cb, void *arg); /* cb NULL = stderr */
int tb_log_level_parse(const char *s, enum tb_log_level *out);     /* 0 or TB_EINVAL */
enum tb_log_level tb_log_level(void);
void tb_log_write(enum tb_log_level level, const char *module, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

#define tb_log(level, module, ...)                                                                 \
    do {                                                                                           \
        if ((level) <= tb_log_level()) tb_log_write((level), (module), __VA_ARGS__);               \
    } while (0)

#endif
