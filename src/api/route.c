/* Matching of a path against a pattern with {} segments, or {*} at its end. Pure; parameters borrow
 * from the path. */
#include <string.h>

#include "api/internal.h"
#include "util/mem.h"

bool tb_route_match_path(const char *pattern, struct tb_span path, struct tb_route_match *m)
{
    const char *p = path.p, *end = path.p + path.n;
    size_t n = 0;
    while (*pattern) {
        if (strcmp(pattern, "{*}") == 0) {
            if (p == end || n == TB_ARRAY_LEN(m->params)) return false;
            m->params[n] = (struct tb_span){p, (size_t)(end - p)};
            return true;
        }
        if (pattern[0] == '{' && pattern[1] == '}') {
            const char *from = p;
            while (p < end && *p != '/')
                p++;
            if (p == from || n == TB_ARRAY_LEN(m->params)) return false;
            m->params[n++] = (struct tb_span){from, (size_t)(p - from)};
            pattern += 2;
        } else {
            if (p == end || *p != *pattern) return false;
            p++;
            pattern++;
        }
    }
    return p == end;
}
