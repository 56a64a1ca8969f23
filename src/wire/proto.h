/*
 * protobuf-c with our memory: unpacking into an arena under a budget, packing into one allocation.
 *
 * Messages unpacked here live in the arena, together with copies of all their bytes and strings
 * (16-byte aligned, so that packed arrays can be used in place); there is nothing to free. Thread:
 * the arena owner's.
 */
#ifndef TB_WIRE_PROTO_H
#define TB_WIRE_PROTO_H

#include <protobuf-c/protobuf-c.h>
#include <stddef.h>

#include "util/arena.h"
#include "util/error.h"

/* Arrays travel as little-endian bytes and are used in place. */
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "a little-endian machine is needed");

/* TB_EPARSE when p is no such message or when it would take more than budget bytes of memory. */
int tb_proto_unpack(const ProtobufCMessageDescriptor *d, struct tb_arena *a, const void *p,
                    size_t n, size_t budget, ProtobufCMessage **out, struct tb_error *err);
/* *out is the caller's (tb_free). */
int tb_proto_pack(const ProtobufCMessage *m, void **out, size_t *out_n, struct tb_error *err);

#endif
