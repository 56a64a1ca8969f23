/* Map: against a plain array under random operations; iteration with deletion; odd keys. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include <stdio.h>

#include "util/map.h"
#include "util/mem.h"
#include "util/philox.h"

enum { KEYS = 3000 };

static size_t key_text(char *out, size_t size, unsigned k)
{
    return (size_t)snprintf(out, size, "key-%u-%s", k, k % 3 ? "x" : "a longer tail than others");
}

static void test_random_operations(void **state)
{
    static int values[KEYS];
    static int *model[KEYS];
    memset(model, 0, sizeof(model));
    struct tb_map m;
    tb_map_init(&m);
    size_t live = 0;
    for (uint32_t step = 0; step < 60000; step++) {
        uint32_t ctr[4] = {step}, key[2] = {7, 7}, r[4];
        tb_philox4x32(ctr, key, r);
        unsigned k = r[0] % KEYS;
        char text[64];
        size_t n = key_text(text, sizeof(text), k);
        int *value = &values[r[2] % KEYS];
        switch (r[1] % 4) {
        case 0: assert_ptr_equal(tb_map_get(&m, text, n), model[k]); break;
        case 1:
        case 2:
            live += model[k] == NULL;
            assert_ptr_equal(tb_map_put(&m, text, n, value), model[k]);
            model[k] = value;
            break;
        default:
            live -= model[k] != NULL;
            assert_ptr_equal(tb_map_del(&m, text, n), model[k]);
            model[k] = NULL;
        }
        assert_int_equal(m.n, live);
        assert_true(m.used < m.cap || m.cap == 0);
    }
    assert_true(m.cap <= 16384); /* tombstones do not make it grow */
    tb_map_fini(&m);
    tb_map_fini(&m);
}

static void test_iteration_with_deletion(void **state)
{
    struct tb_map m;
    tb_map_init(&m);
    static int seen[KEYS];
    for (unsigned k = 0; k < KEYS; k++) {
        tb_map_put(&m, (const char *)&k, sizeof(k), &seen[k]); /* binary keys */
    }
    size_t it = 0, key_len;
    const char *key;
    void *value;
    while (tb_map_next(&m, &it, &key, &key_len, &value)) {
        unsigned k;
        assert_int_equal(key_len, sizeof(k));
        memcpy(&k, key, sizeof(k));
        assert_ptr_equal(value, &seen[k]);
        seen[k]++;
        if (k % 2) assert_ptr_equal(tb_map_del(&m, key, key_len), &seen[k]); /* the map's own key */
    }
    for (unsigned k = 0; k < KEYS; k++) {
        assert_int_equal(seen[k], 1);
        assert_ptr_equal(tb_map_get(&m, (const char *)&k, sizeof(k)), k % 2 ? NULL : &seen[k]);
    }
    tb_map_fini(&m);
}

static void test_odd_keys(void **state)
{
    struct tb_map m = {0}; /* a zeroed map works */
    int a, b, c;
    assert_null(tb_map_get(&m, "x", 1));
    assert_null(tb_map_del(&m, "x", 1));
    assert_null(tb_map_put(&m, "", 0, &a));
    assert_null(tb_map_put(&m, "a\0b", 3, &b));
    assert_null(tb_map_put(&m, "a\0c", 3, &c));
    assert_ptr_equal(tb_map_get(&m, "", 0), &a);
    assert_ptr_equal(tb_map_get(&m, "a\0b", 3), &b);
    assert_ptr_equal(tb_map_get(&m, "a\0c", 3), &c);
    assert_null(tb_map_get(&m, "a", 1));
    tb_map_fini(&m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_operations),
        cmocka_unit_test(test_iteration_with_deletion),
        cmocka_unit_test(test_odd_keys),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
