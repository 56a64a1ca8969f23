/*
 * Bounded decompression (see inflate.h). Besides the caller's limit on the size there is one on
 * growth: beyond FREE_BYTES of output a body may be at most MAX_RATIO times its compressed size,
 * which arrays of tokens and weights never reach, so that a small request cannot make us write its
 * whole allowance. Owner of the output: the caller. Thread: any.
 */
#include "wire/inflate.h"

#include <zlib.h>
#include <zstd.h>

#include "util/mem.h"

enum { FREE_BYTES = 16 << 20, MAX_RATIO = 4096, FIRST_STEP = 64 * 1024 };
enum { ZSTD_WINDOW_LOG = 27 }; /* 128 MiB of window memory at most */

int tb_encoding_parse(struct tb_span v, enum tb_encoding *out, struct tb_error *err)
{
    if (v.n == 0 || tb_span_ieq(v, "identity"))
        *out = TB_ENC_IDENTITY;
    else if (tb_span_ieq(v, "zstd"))
        *out = TB_ENC_ZSTD;
    else if (tb_span_ieq(v, "gzip") || tb_span_ieq(v, "x-gzip"))
        *out = TB_ENC_GZIP;
    else if (tb_span_ieq(v, "deflate"))
        *out = TB_ENC_DEFLATE;
    else
        return tb_error_set(err, TB_EUNSUPPORTED,
                            "Content-Encoding \"%.*s\" is not supported (zstd, gzip, deflate)",
                            (int)TB_MIN(v.n, 64), v.p);
    return 0;
}

struct out {
    char *p;
    size_t n, cap, limit;
    size_t asked; /* the caller's limit, for the message */
};

/* Room for at least one more byte, or an error. */
static int out_grow(struct out *o, struct tb_error *err)
{
    if (o->n < o->cap) return 0;
    if (o->cap >= o->limit) {
        if (o->limit < o->asked)
            return tb_error_set(err, TB_ETOOBIG,
                                "compressed body grows more than %d-fold beyond %d bytes",
                                MAX_RATIO, FREE_BYTES);
        return tb_error_set(err, TB_ETOOBIG, "decompressed body exceeds the limit of %zu bytes",
                            o->asked);
    }
    size_t cap = o->cap ? o->cap : FIRST_STEP;
    cap = cap > o->limit / 2 ? o->limit : cap * 2;
    char *p = tb_try_realloc(o->p, cap);
    if (!p)
        return tb_error_set(err, TB_ENOMEM, "no memory for a decompressed body of %zu bytes", cap);
    o->p = p;
    o->cap = cap;
    return 0;
}

static int inflate_zstd(const void *in, size_t n, struct out *o, struct tb_error *err)
{
    ZSTD_DCtx *d = ZSTD_createDCtx();
    if (!d) return tb_error_set(err, TB_ENOMEM, "no memory to decompress");
    ZSTD_DCtx_setParameter(d, ZSTD_d_windowLogMax, ZSTD_WINDOW_LOG);
    /* A truthful content size saves the growing; a false one costs nothing but its own allocation,
     * which the limit bounds. */
    unsigned long long size = ZSTD_getFrameContentSize(in, n);
    if (size != ZSTD_CONTENTSIZE_UNKNOWN && size != ZSTD_CONTENTSIZE_ERROR && size > 0 &&
        size <= o->limit) {
        o->p = tb_try_malloc((size_t)size);
        if (o->p) o->cap = (size_t)size;
    }
    ZSTD_inBuffer src = {in, n, 0};
    int rc = 0;
    for (;;) {
        ZSTD_outBuffer dst = {o->p, o->cap, o->n};
        size_t before = src.pos;
        size_t r = ZSTD_decompressStream(d, &dst, &src);
        if (ZSTD_isError(r)) {
            rc = tb_error_set(err, TB_EPARSE, "body is not valid zstd: %s", ZSTD_getErrorName(r));
            break;
        }
        bool progress = src.pos > before || dst.pos > o->n;
        o->n = dst.pos;
        if (r == 0) {
            if (src.pos < n)
                rc = tb_error_set(err, TB_EPARSE, "%zu bytes follow the zstd frame", n - src.pos);
            break;
        }
        if (o->n < o->cap && src.pos == n) {
            rc = tb_error_set(err, TB_EPARSE, "zstd body is truncated");
            break;
        }
        if (o->n == o->cap) {
            rc = out_grow(o, err);
            if (rc) break;
        } else if (!progress) {
            rc = tb_error_set(err, TB_EPARSE, "zstd body is malformed");
            break;
        }
    }
    ZSTD_freeDCtx(d);
    return rc;
}

static int inflate_zlib(enum tb_encoding e, const void *in, size_t n, struct out *o,
                        struct tb_error *err)
{
    z_stream z = {0};
    const char *name = e == TB_ENC_GZIP ? "gzip" : "deflate";
    if (inflateInit2(&z, e == TB_ENC_GZIP ? 15 + 16 : 15) != Z_OK)
        return tb_error_set(err, TB_ENOMEM, "no memory to decompress");
    const unsigned char *src = in;
    size_t left = n;
    int rc = 0;
    for (;;) {
        if (z.avail_in == 0 && left > 0) {
            uInt step = (uInt)TB_MIN(left, (size_t)1 << 30);
            z.next_in = (z_const Bytef *)(uintptr_t)src;
            z.avail_in = step;
            src += step;
            left -= step;
        }
        rc = out_grow(o, err);
        if (rc) break;
        uInt room = (uInt)TB_MIN(o->cap - o->n, (size_t)1 << 30);
        z.next_out = (Bytef *)o->p + o->n;
        z.avail_out = room;
        int r = inflate(&z, Z_NO_FLUSH);
        o->n += room - z.avail_out;
        if (r == Z_STREAM_END) {
            if (z.avail_in + left > 0)
                rc = tb_error_set(err, TB_EPARSE, "%zu bytes follow the %s body", z.avail_in + left,
                                  name);
            break;
        }
        if (r == Z_BUF_ERROR || (r == Z_OK && z.avail_in == 0 && left == 0 && z.avail_out > 0)) {
            rc = tb_error_set(err, TB_EPARSE, "%s body is truncated", name);
            break;
        }
        if (r != Z_OK) {
            rc = tb_error_set(err, TB_EPARSE, "body is not valid %s: %s", name,
                              z.msg ? z.msg : "malformed");
            break;
        }
    }
    inflateEnd(&z);
    return rc;
}

int tb_inflate(enum tb_encoding e, const void *in, size_t n, size_t max_out, char **out,
               size_t *out_n, struct tb_error *err)
{
    size_t by_ratio;
    if (!tb_mul_size(n, MAX_RATIO, &by_ratio)) by_ratio = SIZE_MAX;
    struct out o = {.limit = TB_MIN(max_out, TB_MAX(by_ratio, (size_t)FREE_BYTES)),
                    .asked = max_out};
    int rc;
    switch (e) {
    case TB_ENC_ZSTD: rc = inflate_zstd(in, n, &o, err); break;
    case TB_ENC_GZIP:
    case TB_ENC_DEFLATE: rc = inflate_zlib(e, in, n, &o, err); break;
    default: rc = tb_error_set(err, TB_EINTERNAL, "body is not compressed"); break;
    }
    if (rc) {
        tb_free(o.p);
        return rc;
    }
    if (!o.p) o.p = tb_malloc(1);
    *out = o.p;
    *out_n = o.n;
    return 0;
}
