/*
 * Tinker paths and checkpoint names: what may become a folder's name is decided here and nowhere
 * else. Pure functions; any thread.
 */
#include <string.h>

#include "store/store_internal.h"
#include "util/limits.h"

static const char *const kind_dirs[] = {"weights", "sampler_weights", "external_weights"};
static const char *const kind_types[] = {"training", "sampler", "external"};

const char *tb_ckpt_kind_dir(enum tb_ckpt_kind k)
{
    return (unsigned)k < 3 ? kind_dirs[k] : "unknown";
}

const char *tb_ckpt_kind_type(enum tb_ckpt_kind k)
{
    return (unsigned)k < 3 ? kind_types[k] : "unknown";
}

int tb_ckpt_kind_parse(const char *dir, size_t n, enum tb_ckpt_kind *out)
{
    for (unsigned k = 0; k < 3; k++) {
        if (strlen(kind_dirs[k]) == n && memcmp(kind_dirs[k], dir, n) == 0) {
            *out = (enum tb_ckpt_kind)k;
            return 0;
        }
    }
    return TB_EINVAL;
}

static bool name_chars(const char *p, size_t n, bool colon)
{
    for (size_t i = 0; i < n; i++) {
        char c = p[i];
        bool ok = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                  c == '.' || c == '_' || c == '-' || (colon && c == ':');
        if (!ok) return false;
    }
    return n > 0 && p[0] != '.';
}

int tb_ckpt_name_check(const char *name, struct tb_error *err)
{
    size_t n = name ? strlen(name) : 0;
    if (n == 0) return tb_error_set(err, TB_EINVAL, "a checkpoint's name must not be empty");
    if (n > TB_MAX_NAME)
        return tb_error_set(err, TB_EINVAL,
                            "checkpoint name '%.40s...' is longer than %d characters", name,
                            TB_MAX_NAME);
    if (!name_chars(name, n, false))
        return tb_error_set(err, TB_EINVAL,
                            "checkpoint name '%s' may have only letters, digits, '.', '_' and '-', "
                            "and must not begin with '.'",
                            name);
    return 0;
}

int tb_tinker_path_parse(const char *text, size_t n, struct tb_tinker_path *out,
                         struct tb_error *err)
{
    static const char scheme[] = "tinker://";
    const size_t ns = sizeof(scheme) - 1;
    if (!text || n <= ns || memcmp(text, scheme, ns) != 0) goto bad;
    const char *run = text + ns, *end = text + n;
    const char *s1 = memchr(run, '/', (size_t)(end - run));
    if (!s1) goto bad;
    const char *kind = s1 + 1;
    const char *s2 = memchr(kind, '/', (size_t)(end - kind));
    if (!s2) goto bad;
    const char *name = s2 + 1;
    size_t nr = (size_t)(s1 - run), nn = (size_t)(end - name);
    if (nr >= TB_MAX_ID || nn > TB_MAX_NAME) goto bad; /* a folder's name has at most 255 bytes */
    if (!name_chars(run, nr, true) || !name_chars(name, nn, false)) goto bad;
    if (tb_ckpt_kind_parse(kind, (size_t)(s2 - kind), &out->kind)) goto bad;
    memcpy(out->run, run, nr);
    out->run[nr] = '\0';
    memcpy(out->name, name, nn);
    out->name[nn] = '\0';
    return 0;
bad:
    return tb_error_set(
        err, TB_EINVAL,
        "'%.*s' is not a checkpoint path; expected tinker://RUN/KIND/NAME with KIND one "
        "of weights, sampler_weights, external_weights",
        (int)(n < 300 ? n : 300), text ? text : "");
}
