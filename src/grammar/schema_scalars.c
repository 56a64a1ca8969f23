/*
 * Strings and numbers of a schema (schema.h). Thread: the builder's.
 */
#include <float.h>

#include "grammar/schema.h"

#define MAX_LENGTH (1 << 20) /* characters, items */

static const struct {
    const char *name, *pattern;
} FORMATS[] = {
    {"date", "^[0-9]{4}-((0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])|(0[13-9]|1[0-2])-(29|30)|"
             "(0[13578]|1[02])-31)$"},
    {"time", "^([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):"
             "[0-5][0-9])$"},
    {"date-time", "^[0-9]{4}-((0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])|(0[13-9]|1[0-2])-(29|30)|"
                  "(0[13578]|1[02])-31)T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,6})?"
                  "(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$"},
    {"uuid", "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"},
    {"ipv4", "^((25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\\.){3}"
             "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])$"},
    {"email", "^[A-Za-z0-9_%+-]{1,20}(\\.[A-Za-z0-9_%+-]{1,20}){0,2}@([A-Za-z0-9]{1,20}\\.){1,3}"
              "[A-Za-z]{2,10}$"},
    {"uri", "^https?://[a-z0-9]{1,30}(\\.[a-z0-9]{1,30}){0,4}(/[A-Za-z0-9_.~-]{0,60}){0,8}$"},
};

int tb_schema_bounds(struct tb_schema *s, const struct tb_json *at, const char *lo, const char *hi,
                     uint32_t *min, uint32_t *max)
{
    int64_t a = 0, b = -1;
    *min = 0;
    *max = TB_GRAMMAR_UNBOUNDED;
    int rc = tb_json_int(at, lo, false, 0, MAX_LENGTH, &a, s->err);
    if (rc || (rc = tb_json_int(at, hi, false, 0, INT32_MAX, &b, s->err))) return rc;
    if (b >= 0 && b < a)
        return tb_json_fail(at, s->err, TB_EINVAL, "%s %d is above %s %d", lo, (int)a, hi, (int)b);
    *min = (uint32_t)a;
    if (b >= 0 && b <= MAX_LENGTH) *max = (uint32_t)b;
    if (b > MAX_LENGTH)
        return tb_json_fail(at, s->err, TB_EUNSUPPORTED, "%s %d is above %d", hi, (int)b,
                            MAX_LENGTH);
    return 0;
}

int tb_schema_string(struct tb_schema *s, const struct tb_json *at, uint32_t *out)
{
    struct tb_json pattern, format;
    bool has_pattern = tb_json_find(at, "pattern", &pattern);
    bool has_format = tb_json_find(at, "format", &format);
    uint32_t min, max;
    const char *re = NULL;
    int rc = tb_schema_bounds(s, at, "minLength", "maxLength", &min, &max);
    if (rc) return rc;
    if (!has_pattern && !has_format) {
        *out = tb_json_rule_string(s->g, s->r.character, min, max);
        return 0;
    }
    if (min || max != TB_GRAMMAR_UNBOUNDED || (has_pattern && has_format))
        return tb_json_fail(at, s->err, TB_EUNSUPPORTED,
                            "only one of pattern, format and minLength or maxLength can be "
                            "enforced in one string");
    rc = tb_json_as_string(has_pattern ? &pattern : &format, &s->arena, 4096, &re, s->err);
    if (rc) return rc;
    if (has_format) {
        size_t i = 0;
        while (i < TB_ARRAY_LEN(FORMATS) && strcmp(FORMATS[i].name, re) != 0)
            i++;
        if (i == TB_ARRAY_LEN(FORMATS))
            return tb_json_fail(&format, s->err, TB_EUNSUPPORTED,
                                "\"%s\" cannot be enforced (date, time, date-time, uuid, ipv4, "
                                "email and uri can)",
                                re);
        re = FORMATS[i].pattern;
    }
    struct tb_error e = {0};
    rc = tb_json_rule_pattern(s->g, &s->r, tb_span_str(re), out, &e);
    return rc ? tb_json_fail(at, s->err, rc, "%s", e.msg) : 0;
}

/* Adds the numbers with a fraction whose size is from lo (`above`: more than lo) to hi: whole
 * numbers with all of the way to the next one between lo and hi, and any digits behind the point.
 */
static void fractions(struct tb_schema *s, const char *sign, double lo, bool above, double hi,
                      uint32_t *out, uint32_t *n)
{
    const double most = (double)TB_JSON_INTEGER_MAX;
    uint32_t any = tb_rule_range(s->g, '0', '9');
    if (lo < 0) {
        lo = 0;
        above = false;
    }
    if (lo > most || hi < 1) return;
    int64_t from = (int64_t)lo, to = (hi > most ? TB_JSON_INTEGER_MAX : (int64_t)hi) - 1;
    if ((double)from < lo) {
        from++;
        above = false;
    }
    if (above && from <= to) { /* lo itself may not be written with zeros */
        uint32_t rest =
            tb_rule_seq(s->g, tb_rule_range(s->g, '1', '9'), tb_rule_repeat(s->g, any, 0, 7));
        rest = tb_rule_seq(s->g, tb_rule_repeat(s->g, tb_schema_text(s, "0"), 0, 7), rest);
        rest = tb_rule_seq(s->g, tb_schema_text(s, "."), rest);
        rest = tb_rule_seq(s->g, tb_json_rule_integer(s->g, from, from), rest);
        *out = tb_schema_alt(s, (*n)++, *out, tb_rule_seq(s->g, tb_schema_text(s, sign), rest));
        from++;
    }
    if (from <= to) {
        uint32_t rest = tb_rule_seq(s->g, tb_schema_text(s, "."), tb_rule_repeat(s->g, any, 1, 15));
        rest = tb_rule_seq(s->g, tb_json_rule_integer(s->g, from, to), rest);
        *out = tb_schema_alt(s, (*n)++, *out, tb_rule_seq(s->g, tb_schema_text(s, sign), rest));
    }
}

int tb_schema_limits(struct tb_schema *s, const struct tb_json *at, double limit[4])
{
    static const char *const keys[4] = {"minimum", "maximum", "exclusiveMinimum",
                                        "exclusiveMaximum"};
    int rc = 0;
    for (int i = 0; rc == 0 && i < 4; i++) {
        limit[i] = i % 2 ? DBL_MAX : -DBL_MAX;
        rc = tb_json_double(at, keys[i], false, -DBL_MAX, DBL_MAX, &limit[i], s->err);
    }
    return rc;
}

int tb_schema_number(struct tb_schema *s, const struct tb_json *at, bool whole, uint32_t *out)
{
    const double none = DBL_MAX, most = (double)TB_JSON_INTEGER_MAX;
    double limit[4];
    int rc = tb_schema_limits(s, at, limit);
    if (rc) return rc;
    double lo = limit[0], hi = limit[1], above = limit[2], below = limit[3];
    if (lo == -none && hi == none && above == -none && below == none) {
        *out = whole ? s->r.integer : s->r.number;
        return 0;
    }
    /* whole numbers from a to b */
    double a = lo > above ? lo : above, b = hi < below ? hi : below;
    int64_t from = a < -most ? -TB_JSON_INTEGER_MAX : a > most ? TB_JSON_INTEGER_MAX : (int64_t)a;
    int64_t to = b < -most ? -TB_JSON_INTEGER_MAX : b > most ? TB_JSON_INTEGER_MAX : (int64_t)b;
    if ((double)from < a || ((double)from == above && above >= lo)) from++;
    if ((double)to > b || ((double)to == below && below <= hi)) to--;
    uint32_t n = from <= to && a <= most && b >= -most;
    if (n) *out = tb_json_rule_integer(s->g, from, to);
    if (!whole) {
        fractions(s, "", a, above >= lo, b, out, &n);
        fractions(s, "-", -b, below <= hi, -a, out, &n);
    }
    if (n == 0)
        return tb_json_fail(at, s->err, TB_EUNSUPPORTED,
                            "no whole number lies between its minimum and maximum");
    return 0;
}
