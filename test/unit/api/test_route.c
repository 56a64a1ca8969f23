/* Matching of paths against patterns, and that the tables hold together. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "api/internal.h"

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

/* No two rows of a face answer the same request, and an earlier row never hides a later one
 * wrongly. */
static void test_tables(void **state)
{
    (void)state;
    const struct tb_face *faces[] = {&tb_face_tinker, &tb_face_admin};
    for (size_t f = 0; f < 2; f++)
        for (int i = 0; i < faces[f]->n_routes; i++) {
            const struct tb_route *r = &faces[f]->routes[i];
            struct tb_route_match m;
            assert_non_null(r->handle);
            assert_true(r->pattern[0] == '/');
            for (int k = 0; k < i; k++) {
                const struct tb_route *q = &faces[f]->routes[k];
                if (q->method == r->method && match(q->pattern, r->pattern, &m))
                    fail_msg("%s hides %s", q->pattern, r->pattern);
            }
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_params),
        cmocka_unit_test(test_tables),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
