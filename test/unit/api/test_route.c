/* Matching of paths against patterns, and that the tables hold together. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "api/internal.h"
#include "util/mem.h"

static bool match(const char *pattern, const char *path, struct tb_route_match *m)
{
    *m = (struct tb_route_match){0};
    return tb_route_match_path(pattern, tb_span_str(path), m);
}

static void test_params(void **state)
{
    (void)state;
    struct tb_route_match m;
    assert_true(match("/a/b", "/a/b", &m));
    assert_false(match("/a/b", "/a/b/", &m));
    assert_false(match("/a/b", "/a/bc", &m));
    assert_false(match("/a/b", "/a", &m));
    assert_true(match("/r/{}/c", "/r/s:train:0/c", &m));
    assert_true(tb_span_eq(m.params[0], "s:train:0"));
    assert_false(match("/r/{}/c", "/r//c", &m));
    assert_false(match("/r/{}/c", "/r/x/y/c", &m));
    assert_true(match("/r/{}/{}/{}", "/r/1/22/333", &m));
    assert_true(tb_span_eq(m.params[0], "1"));
    assert_true(tb_span_eq(m.params[1], "22"));
    assert_true(tb_span_eq(m.params[2], "333"));
    assert_false(match("/{}/{}/{}/{}/{}", "/1/2/3/4/5", &m)); /* more than a match holds */
    assert_true(match("/{}", "/{}", &m));
}

/* No two rows answer the same request, in one face or in two: an earlier row that takes all
 * requests never hides a later one. */
static void test_tables(void **state)
{
    (void)state;
    const struct tb_route *rows[512];
    size_t n = 0;
    const struct tb_face *face;
    for (int f = 0; (face = tb_api_face(f)); f++) {
        for (int i = 0; i < face->n_routes; i++) {
            const struct tb_route *r = &face->routes[i];
            struct tb_route_match m;
            assert_non_null(r->handle);
            assert_true(r->pattern[0] == '/');
            for (size_t k = 0; k < n; k++)
                if (rows[k]->method == r->method && !rows[k]->ours &&
                    match(rows[k]->pattern, r->pattern, &m))
                    fail_msg("%s hides %s of %s", rows[k]->pattern, r->pattern, face->name);
            assert_true(n < TB_ARRAY_LEN(rows));
            rows[n++] = r;
        }
    }
    assert_true(n > 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_params),
        cmocka_unit_test(test_tables),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
