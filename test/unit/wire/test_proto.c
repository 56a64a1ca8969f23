/* protobuf-c in an arena: packed and unpacked shapes, unknown fields, the memory budget, broken
 * bytes. */
#include "wire/proto.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "util/mem.h"
#include "wire/tinker_public.pb-c.h"

static int unpack_tensor(struct tb_arena *a, const void *p, size_t n, TinkerPublic__Tensor **t)
{
    struct tb_error e;
    return tb_proto_unpack(&tinker_public__tensor__descriptor, a, p, n, 1 << 20,
                           (ProtobufCMessage **)t, &e);
}

static void test_shape_forms(void **state)
{
    (void)state;
    static const uint8_t packed[] = {0x18, 1, 0x22, 2, 2, 3};
    static const uint8_t unpacked[] = {0x20, 2, 0x18, 1, 0x20, 3};
    static const uint8_t unknown[] = {0x18, 1, 0x22, 2,   2,    3,    0xfa,
                                      0x01, 2, 'h',  'i', 0xf8, 0x02, 5};
    const struct {
        const uint8_t *p;
        size_t n;
    } cases[] = {
        {packed, sizeof(packed)}, {unpacked, sizeof(unpacked)}, {unknown, sizeof(unknown)}};
    for (size_t i = 0; i < 3; i++) {
        struct tb_arena a;
        tb_arena_init(&a);
        TinkerPublic__Tensor *t = NULL;
        assert_int_equal(unpack_tensor(&a, cases[i].p, cases[i].n, &t), 0);
        assert_int_equal(t->dtype, TINKER_PUBLIC__DTYPE__DTYPE_FLOAT32);
        assert_int_equal(t->n_shape, 2);
        assert_int_equal(t->shape[0], 2);
        assert_int_equal(t->shape[1], 3);
        tb_arena_fini(&a);
    }
}

static void test_bytes_are_aligned(void **state)
{
    (void)state;
    static const uint8_t one[] = {0x0a, 4, 1, 2, 3, 4};
    struct tb_arena a;
    tb_arena_init(&a);
    for (int i = 0; i < 5; i++) {
        TinkerPublic__Tensor *t = NULL;
        assert_int_equal(unpack_tensor(&a, one, sizeof(one), &t), 0);
        assert_int_equal(t->dense.len, 4);
        assert_int_equal((uintptr_t)t->dense.data % 16, 0);
    }
    tb_arena_fini(&a);
}

/* Two bytes on the wire are a whole message in memory: the budget, not the body, bounds it. */
static void test_budget(void **state)
{
    (void)state;
    size_t n = 100000;
    uint8_t *p = tb_malloc(2 * n);
    for (size_t i = 0; i < n; i++) {
        p[2 * i] = 0x1a; /* data: Datum, empty */
        p[2 * i + 1] = 0;
    }
    struct tb_arena a;
    struct tb_error e = {0};
    ProtobufCMessage *m = NULL;
    tb_arena_init(&a);
    const ProtobufCMessageDescriptor *d = &tinker_public__forward_backward_request__descriptor;
    assert_int_equal(tb_proto_unpack(d, &a, p, 2 * n, 1 << 20, &m, &e), TB_EPARSE);
    assert_non_null(strstr(e.msg, "ForwardBackwardRequest"));
    assert_true(a.total < 4 << 20);
    assert_int_equal(tb_proto_unpack(d, &a, p, 2 * n, 64 << 20, &m, &e), 0);
    tb_arena_fini(&a);
    tb_free(p);
}

static void test_pack(void **state)
{
    (void)state;
    TinkerPublic__Tensor t;
    tinker_public__tensor__init(&t);
    int64_t shape[2] = {2, 300};
    t.shape = shape;
    t.n_shape = 2;
    t.dtype = TINKER_PUBLIC__DTYPE__DTYPE_INT32;
    void *p;
    size_t n;
    struct tb_error e;
    assert_int_equal(tb_proto_pack(&t.base, &p, &n, &e), 0);
    static const uint8_t want[] = {0x18, 3, 0x22, 3, 2, 0xac, 0x02}; /* shape is packed */
    assert_int_equal(n, sizeof(want));
    assert_memory_equal(p, want, n);
    tb_free(p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shape_forms),
        cmocka_unit_test(test_bytes_are_aligned),
        cmocka_unit_test(test_budget),
        cmocka_unit_test(test_pack),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
