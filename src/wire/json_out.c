/* Streaming JSON writer (see json_out.h). The caller owns the buffer. */
#include "wire/json_out.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "util/mem.h"

static const char HEX[] = "0123456789abcdef";

void tb_jout_init(struct tb_json_out *j, struct tb_buf *b)
{
    *j = (struct tb_json_out){.b = b};
}

/* Length of the valid UTF-8 sequence at p, 0 when there is none. */
static size_t utf8_len(const unsigned char *p, size_t n)
{
    if (p[0] < 0x80) return 1;
    size_t len = p[0] >= 0xf0 ? 4 : p[0] >= 0xe0 ? 3 : 2;
    if (p[0] < 0xc2 || p[0] > 0xf4 || n < len) return 0;
    for (size_t i = 1; i < len; i++)
        if ((p[i] & 0xc0) != 0x80) return 0;
    if ((p[0] == 0xe0 && p[1] < 0xa0) || (p[0] == 0xed && p[1] > 0x9f) ||
        (p[0] == 0xf0 && p[1] < 0x90) || (p[0] == 0xf4 && p[1] > 0x8f))
        return 0;
    return len;
}

static void quoted(struct tb_buf *b, const char *s, size_t n)
{
    const unsigned char *p = (const unsigned char *)s;
    tb_buf_append(b, "\"", 1);
    for (size_t i = 0; i < n;) {
        size_t run = i, len = 0;
        while (run < n && p[run] >= 0x20 && p[run] != '"' && p[run] != '\\' &&
               (len = utf8_len(p + run, n - run)) > 0)
            run += len;
        tb_buf_append(b, s + i, run - i);
        i = run;
        if (i == n) break;
        char esc[8] = {'\\', (char)p[i], 0};
        switch (p[i]) {
        case '"':
        case '\\': break;
        case '\n': esc[1] = 'n'; break;
        case '\r': esc[1] = 'r'; break;
        case '\t': esc[1] = 't'; break;
        default:
            if (p[i] < 0x20) {
                memcpy(esc, "\\u00", 5);
                esc[4] = HEX[p[i] >> 4];
                esc[5] = HEX[p[i] & 15];
                esc[6] = 0;
            } else {
                memcpy(esc, "\xef\xbf\xbd", 4);
            }
        }
        tb_buf_puts(b, esc);
        i++;
    }
    tb_buf_append(b, "\"", 1);
}

static void before(struct tb_json_out *j, const char *key)
{
    if (j->comma) tb_buf_append(j->b, ",", 1);
    j->comma = true;
    if (!key) return;
    quoted(j->b, key, strlen(key));
    tb_buf_append(j->b, ":", 1);
}

static void begin(struct tb_json_out *j, const char *key, const char *open)
{
    before(j, key);
    tb_buf_append(j->b, open, 1);
    j->comma = false;
}

static void end(struct tb_json_out *j, const char *close)
{
    tb_buf_append(j->b, close, 1);
    j->comma = true;
}

void tb_jout_object(struct tb_json_out *j, const char *key)
{
    begin(j, key, "{");
}

void tb_jout_object_end(struct tb_json_out *j)
{
    end(j, "}");
}

void tb_jout_array(struct tb_json_out *j, const char *key)
{
    begin(j, key, "[");
}

void tb_jout_array_end(struct tb_json_out *j)
{
    end(j, "]");
}

void tb_jout_strn(struct tb_json_out *j, const char *key, const char *s, size_t n)
{
    before(j, key);
    quoted(j->b, s, n);
}

void tb_jout_str(struct tb_json_out *j, const char *key, const char *s)
{
    if (s)
        tb_jout_strn(j, key, s, strlen(s));
    else
        tb_jout_null(j, key);
}

void tb_jout_null(struct tb_json_out *j, const char *key)
{
    before(j, key);
    tb_buf_append(j->b, "null", 4);
}

void tb_jout_bool(struct tb_json_out *j, const char *key, bool v)
{
    before(j, key);
    tb_buf_puts(j->b, v ? "true" : "false");
}

void tb_jout_raw(struct tb_json_out *j, const char *key, const char *json)
{
    before(j, key);
    tb_buf_puts(j->b, json);
}

/* Decimal digits of v, right-aligned in a 20-byte field; returns where they begin. */
static char *digits(uint64_t v, char *end_of_field)
{
    char *p = end_of_field;
    do {
        *--p = (char)('0' + v % 10);
        v /= 10;
    } while (v);
    return p;
}

static void put_int(struct tb_buf *b, int64_t v)
{
    char t[24];
    char *p = digits(v < 0 ? 0 - (uint64_t)v : (uint64_t)v, t + sizeof(t));
    if (v < 0) *--p = '-';
    tb_buf_append(b, p, (size_t)(t + sizeof(t) - p));
}

/* %g as JSON; a number without point or exponent gets ".0" so that readers see a float. */
static void put_g(struct tb_buf *b, double v, int precision)
{
    char t[40];
    int n = snprintf(t, sizeof(t) - 2, "%.*g", precision, v);
    if (!strpbrk(t, ".e")) {
        memcpy(t + n, ".0", 3);
        n += 2;
    }
    tb_buf_append(b, t, (size_t)n);
}

/* A float with nine significant digits, enough to read it back to the same bits. Logprobs come in
 * arrays of millions, so the usual range goes by integers instead of snprintf: the product below is
 * exact to 2^-52, far below half a unit of the ninth digit. */
static void put_f32(struct tb_buf *b, float f)
{
    static const double pow10[] = {1e0, 1e1, 1e2,  1e3,  1e4,  1e5,  1e6, 1e7,
                                   1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14};
    if (!isfinite(f)) {
        tb_buf_append(b, "null", 4);
        return;
    }
    double v = fabs((double)f);
    if (v < 1e-5 || v >= 1e8) {
        put_g(b, (double)f, 9);
        return;
    }
    int whole = 1; /* digits before the point; 0, -1, ... for 0.0ddd */
    if (v >= 1)
        while (v >= pow10[whole])
            whole++;
    else
        for (whole = 0; v * pow10[1 - whole] < 1; whole--) {
        }
    uint64_t n = (uint64_t)(v * pow10[9 - whole] + 0.5);
    char t[40], d[24];
    char *p = digits(n, d + sizeof(d));
    int nd = (int)(d + sizeof(d) - p);
    if (nd > 9) whole++; /* rounded up to the next power of ten */
    while (nd > 1 && nd > whole && p[nd - 1] == '0')
        nd--;
    size_t k = 0;
    if (f < 0) t[k++] = '-';
    if (whole <= 0) {
        t[k++] = '0';
        t[k++] = '.';
        for (int i = whole; i < 0; i++)
            t[k++] = '0';
        memcpy(t + k, p, (size_t)nd);
        k += (size_t)nd;
    } else {
        memcpy(t + k, p, (size_t)whole);
        k += (size_t)whole;
        t[k++] = '.';
        if (nd > whole) {
            memcpy(t + k, p + whole, (size_t)(nd - whole));
            k += (size_t)(nd - whole);
        } else {
            t[k++] = '0';
        }
    }
    tb_buf_append(b, t, k);
}

void tb_jout_int(struct tb_json_out *j, const char *key, int64_t v)
{
    before(j, key);
    put_int(j->b, v);
}

void tb_jout_double(struct tb_json_out *j, const char *key, double v)
{
    before(j, key);
    if (isfinite(v))
        put_g(j->b, v, 17);
    else
        tb_buf_append(j->b, "null", 4);
}

void tb_jout_f32(struct tb_json_out *j, const char *key, float v)
{
    before(j, key);
    put_f32(j->b, v);
}

void tb_jout_i32s(struct tb_json_out *j, const char *key, const int32_t *v, size_t n)
{
    begin(j, key, "[");
    for (size_t i = 0; i < n; i++) {
        if (i) tb_buf_append(j->b, ",", 1);
        put_int(j->b, v[i]);
    }
    end(j, "]");
}

void tb_jout_i64s(struct tb_json_out *j, const char *key, const int64_t *v, size_t n)
{
    begin(j, key, "[");
    for (size_t i = 0; i < n; i++) {
        if (i) tb_buf_append(j->b, ",", 1);
        put_int(j->b, v[i]);
    }
    end(j, "]");
}

void tb_jout_f32s(struct tb_json_out *j, const char *key, const float *v, size_t n)
{
    begin(j, key, "[");
    for (size_t i = 0; i < n; i++) {
        if (i) tb_buf_append(j->b, ",", 1);
        put_f32(j->b, v[i]);
    }
    end(j, "]");
}
