/*
 * Error codes and messages (see error.h). Pure functions over the caller's struct; any thread.
 */
#include "util/error.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <uv.h>

/* Makes a formatted message presentable: one line, and never cut inside of a UTF-8 sequence, since
 * it goes into JSON as it is. `full` tells that vsnprintf had more to say than the buffer holds. */
static void tidy(char *s, bool full)
{
    size_t n = strlen(s);
    if (full) {
        size_t k = n;
        while (k > 0 && n - k < 4 && ((unsigned char)s[k - 1] & 0xC0) == 0x80)
            k--;
        if (k > 0) {
            unsigned char lead = (unsigned char)s[k - 1];
            size_t need = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : lead >= 0xC0 ? 2 : 1;
            if (n - (k - 1) < need) n = k - 1;
        }
    }
    while (n > 0 && (s[n - 1] == '\n' || s[n - 1] == '\r' || s[n - 1] == ' '))
        n--;
    s[n] = '\0';
    for (size_t i = 0; i < n; i++) {
        if ((unsigned char)s[i] < 0x20 || s[i] == 0x7F) s[i] = ' ';
    }
}

int tb_error_set(struct tb_error *e, int code, const char *fmt, ...)
{
    if (!e) return code;
    char text[sizeof(e->msg)]; /* the arguments may point into e->msg */
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    if (n < 0) text[0] = '\0';
    tidy(text, n >= (int)sizeof(text));
    memcpy(e->msg, text, strlen(text) + 1);
    e->code = code;
    return code;
}

int tb_error_prefix(struct tb_error *e, const char *fmt, ...)
{
    if (!e) return TB_EINTERNAL;
    char text[sizeof(e->msg)];
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    if (n < 0) n = 0;
    size_t at = (size_t)n < sizeof(text) ? (size_t)n : sizeof(text) - 1;
    int m = snprintf(text + at, sizeof(text) - at, ": %s", e->msg);
    tidy(text, at + (size_t)m >= sizeof(text));
    memcpy(e->msg, text, strlen(text) + 1);
    return e->code;
}

const char *tb_error_name(int code)
{
    switch (code) {
    case TB_OK: return "OK";
#define XX(name, num, status, cat, text)                                                           \
    case num: return #name;
        TB_ERROR_MAP(XX)
#undef XX
#define XX(name, text)                                                                             \
    case UV_##name: return #name;
        UV_ERRNO_MAP(XX)
#undef XX
    default: return "UNKNOWN";
    }
}

int tb_error_status(int code)
{
    switch (code) {
    case TB_OK: return 200;
#define XX(name, num, status, cat, text)                                                           \
    case num: return status;
        TB_ERROR_MAP(XX)
#undef XX
    default: return 500;
    }
}

enum tb_category tb_error_category(int code)
{
    switch (code) {
    case TB_OK: return TB_CAT_UNKNOWN;
#define XX(name, num, status, cat, text)                                                           \
    case num: return TB_CAT_##cat;
        TB_ERROR_MAP(XX)
#undef XX
    default: return TB_CAT_SERVER;
    }
}

const char *tb_category_name(enum tb_category cat)
{
    switch (cat) {
    case TB_CAT_USER: return "user";
    case TB_CAT_SERVER: return "server";
    case TB_CAT_UNKNOWN: break;
    }
    return "unknown";
}
