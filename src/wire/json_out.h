/*
 * Streaming JSON writer over a tb_buf: no tree is built for large answers. Commas are placed by the
 * writer; begin and end must balance. Strings are escaped and made valid UTF-8 (bad bytes become
 * U+FFFD); numbers that JSON cannot say (NaN, infinities) become null. Check buf->failed once at
 * the end.
 *
 * key is NULL inside arrays. Owner: the caller owns the buffer. Thread: one at a time.
 */
#ifndef TB_WIRE_JSON_OUT_H
#define TB_WIRE_JSON_OUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "util/buf.h"

struct tb_json_out {
    struct tb_buf *b;
    bool comma; /* the next value at this level needs one before it */
};

void tb_jout_init(struct tb_json_out *j, struct tb_buf *b);
void tb_jout_object(struct tb_json_out *j, const char *key);
void tb_jout_object_end(struct tb_json_out *j);
void tb_jout_array(struct tb_json_out *j, const char *key);
void tb_jout_array_end(struct tb_json_out *j);
void tb_jout_str(struct tb_json_out *j, const char *key, const char *s); /* NULL: null */
void tb_jout_strn(struct tb_json_out *j, const char *key, const char *s, size_t n);
void tb_jout_int(struct tb_json_out *j, const char *key, int64_t v);
void tb_jout_double(struct tb_json_out *j, const char *key, double v);
void tb_jout_f32(struct tb_json_out *j, const char *key, float v);
void tb_jout_bool(struct tb_json_out *j, const char *key, bool v);
void tb_jout_null(struct tb_json_out *j, const char *key);
void tb_jout_raw(struct tb_json_out *j, const char *key, const char *json); /* text that is JSON */
void tb_jout_i32s(struct tb_json_out *j, const char *key, const int32_t *v, size_t n);
void tb_jout_i64s(struct tb_json_out *j, const char *key, const int64_t *v, size_t n);
void tb_jout_f32s(struct tb_json_out *j, const char *key, const float *v, size_t n);

#endif
