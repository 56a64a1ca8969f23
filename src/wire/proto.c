/* protobuf-c over an arena and one allocation (see proto.h). Owners and threads: the caller's. */
#include "wire/proto.h"

#include "util/mem.h"

struct budget {
    struct tb_arena *a;
    size_t left;
};

static void *budget_alloc(void *data, size_t n)
{
    struct budget *b = data;
    if (n > b->left) return NULL;
    b->left -= n;
    return tb_arena_try_alloc(b->a, n);
}

static void budget_free(void *data, void *p)
{
    (void)data;
    (void)p; /* the arena's end is everyone's end */
}

int tb_proto_unpack(const ProtobufCMessageDescriptor *d, struct tb_arena *a, const void *p,
                    size_t n, size_t budget, ProtobufCMessage **out, struct tb_error *err)
{
    struct budget b = {a, budget};
    ProtobufCAllocator alloc = {budget_alloc, budget_free, &b};
    ProtobufCMessage *m = protobuf_c_message_unpack(d, &alloc, n, p);
    if (!m)
        return tb_error_set(err, TB_EPARSE, "body of %zu bytes is not a valid %s message", n,
                            d->short_name);
    *out = m;
    return 0;
}

int tb_proto_pack(const ProtobufCMessage *m, void **out, size_t *out_n, struct tb_error *err)
{
    size_t n = protobuf_c_message_get_packed_size(m);
    void *p = tb_try_malloc(n ? n : 1);
    if (!p) return tb_error_set(err, TB_ENOMEM, "no memory for an answer of %zu bytes", n);
    size_t written = protobuf_c_message_pack(m, p);
    TB_BUG_ON(written != n);
    *out = p;
    *out_n = n;
    return 0;
}
