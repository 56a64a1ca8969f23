/*
 * Decoding of compressed request bodies, always with a limit on what comes out.
 *
 * Owner: the output is the caller's (tb_free). Thread: any; CPU-bound, so large bodies go to the
 * pool.
 */
#ifndef TB_WIRE_INFLATE_H
#define TB_WIRE_INFLATE_H

#include <stddef.h>

#include "util/error.h"
#include "util/span.h"

enum tb_encoding { TB_ENC_IDENTITY, TB_ENC_ZSTD, TB_ENC_GZIP, TB_ENC_DEFLATE };

/* A Content-Encoding header's value (an absent one is identity). TB_EUNSUPPORTED names the value.
 */
int tb_encoding_parse(struct tb_span value, enum tb_encoding *out, struct tb_error *err);

/* One zstd frame, or one gzip member or zlib stream, that must end exactly with the input.
 * TB_EPARSE for malformed or truncated input and for trailing bytes, TB_ETOOBIG for more than
 * max_out bytes or for a body that grows so much that it can only be meant to (see inflate.c). Not
 * for TB_ENC_IDENTITY. */
int tb_inflate(enum tb_encoding e, const void *in, size_t n, size_t max_out, char **out,
               size_t *out_n, struct tb_error *err);

#endif
