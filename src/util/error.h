/*
 * Errors: every fallible function returns int, 0 or a negative TB_E* code, and fills a caller-owned
 * struct tb_error where the cause is known. libuv's own negative codes pass through unchanged.
 * The table below is the one place that ties a code to its HTTP status and its user/server
 * category.
 *
 * Thread: any. Owns: nothing (the message lives inside the struct).
 */
#ifndef TB_UTIL_ERROR_H
#define TB_UTIL_ERROR_H

#include <stdarg.h>
#include <stddef.h>

enum tb_category { TB_CAT_UNKNOWN = 0, TB_CAT_USER, TB_CAT_SERVER };

/* name, number, HTTP status when it is an immediate answer, category when it fails a future, text
 */
#define TB_ERROR_MAP(XX)                                                                           \
    XX(EINVAL, -10001, 400, USER, "invalid argument")                                              \
    XX(EPARSE, -10002, 400, USER, "malformed input")                                               \
    XX(EAUTH, -10003, 401, USER, "unauthorized")                                                   \
    XX(EFORBIDDEN, -10004, 403, USER, "forbidden")                                                 \
    XX(ENOTFOUND, -10005, 404, USER, "not found")                                                  \
    XX(EMETHOD, -10006, 405, USER, "method not allowed")                                           \
    XX(EEXIST, -10007, 400, USER, "already exists")                                                \
    XX(EGONE, -10008, 410, USER, "gone")                                                           \
    XX(ETOOBIG, -10009, 413, USER, "too large")                                                    \
    XX(EUNSUPPORTED, -10010, 400, USER, "not supported")                                           \
    XX(EBUSY, -10011, 429, SERVER, "busy")                                                         \
    XX(ENONFINITE, -10012, 400, USER, "non-finite number")                                         \
    XX(ECANCELED, -10013, 400, USER, "canceled")                                                   \
    XX(ENOMEM, -10014, 503, SERVER, "out of memory")                                               \
    XX(EIO, -10015, 500, SERVER, "input/output error")                                             \
    XX(ECORRUPT, -10016, 500, SERVER, "corrupt data")                                              \
    XX(EDEVICE, -10017, 500, SERVER, "device error")                                               \
    XX(EINTERNAL, -10018, 500, SERVER, "internal error")                                           \
    XX(ERATE, -10019, 429, SERVER, "too many requests")

enum tb_error_code {
    TB_OK = 0,
#define XX(name, num, status, cat, text) TB_##name = (num),
    TB_ERROR_MAP(XX)
#undef XX
};

struct tb_error {
    int code; /* 0 or TB_E* or a libuv code */
    char msg[512];
};

/* Fills *e (which may be NULL) and returns code, so that `return tb_error_set(...)` works. A
 * message too long for the buffer is cut. The message is one line, without a final full stop. */
int tb_error_set(struct tb_error *e, int code, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* Prepends context, "prefix: old message", and returns e->code. */
int tb_error_prefix(struct tb_error *e, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

const char *tb_error_name(int code);            /* "EINVAL"; libuv's name for libuv codes */
int tb_error_status(int code);                  /* HTTP status; 500 for unknown codes */
enum tb_category tb_error_category(int code);   /* SERVER for unknown codes */
const char *tb_category_name(enum tb_category); /* "user", "server", "unknown" */

#endif
