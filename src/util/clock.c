/*
 * Clocks and random bytes (see clock.h). No state; any thread.
 */
#include "util/clock.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <uv.h>

#include "util/mem.h"

uint64_t tb_clock_ns(void)
{
    return uv_hrtime();
}

uint64_t tb_clock_ms(void)
{
    return uv_hrtime() / 1000000;
}

int64_t tb_clock_wall_us(void)
{
    struct timespec ts;
    TB_BUG_ON(clock_gettime(CLOCK_REALTIME, &ts) != 0);
    return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

/* Splits into calendar fields and microseconds, rounding towards the past (also before 1970); years
 * that do not fit four digits are held at the border. */
static int split(int64_t wall_us, struct tm *tm)
{
    const int64_t first = -62135596800ll, last = 253402300799ll; /* 0001-01-01, 9999-12-31 */
    int64_t s = wall_us / 1000000, us = wall_us % 1000000;
    if (us < 0) {
        us += 1000000;
        s--;
    }
    time_t t = (time_t)TB_MIN(TB_MAX(s, first), last);
    TB_BUG_ON(!gmtime_r(&t, tm));
    return (int)us;
}

void tb_clock_format(int64_t wall_us, char out[TB_TIME_TEXT])
{
    struct tm tm;
    unsigned us = (unsigned)split(wall_us, &tm);
    snprintf(out, TB_TIME_TEXT, "%04u-%02u-%02uT%02u:%02u:%02u.%06uZ",
             (unsigned)(tm.tm_year + 1900) % 10000, (unsigned)(tm.tm_mon + 1) % 100,
             (unsigned)tm.tm_mday % 100, (unsigned)tm.tm_hour % 100, (unsigned)tm.tm_min % 100,
             (unsigned)tm.tm_sec % 100, us % 1000000);
}

void tb_clock_http_date(int64_t wall_us, char out[TB_TIME_TEXT])
{
    /* strftime's names depend on the locale. */
    static const char day[7][4] = {"Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"};
    static const char month[12][4] = {"Jan", "Feb", "Mar", "Apr", "May", "Jun",
                                      "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"};
    struct tm tm;
    split(wall_us, &tm);
    snprintf(out, TB_TIME_TEXT, "%s, %02u %s %04u %02u:%02u:%02u GMT", day[tm.tm_wday % 7],
             (unsigned)tm.tm_mday % 100, month[tm.tm_mon % 12],
             (unsigned)(tm.tm_year + 1900) % 10000, (unsigned)tm.tm_hour % 100,
             (unsigned)tm.tm_min % 100, (unsigned)tm.tm_sec % 100);
}

void tb_random_bytes(void *p, size_t n)
{
    char *at = p;
    while (n > 0) {
        ssize_t got = getrandom(at, n, 0);
        if (got < 0) {
            TB_BUG_ON(errno != EINTR);
            continue;
        }
        at += got;
        n -= (size_t)got;
    }
}

uint64_t tb_random_u64(void)
{
    uint64_t v;
    tb_random_bytes(&v, sizeof(v));
    return v;
}

void tb_random_id(char *out, size_t n)
{
    static const char digits[] = "0123456789abcdefghijklmnopqrstuvwxyz";
    unsigned char raw[64];
    size_t have = 0;
    for (size_t i = 0; i < n;) {
        if (have == 0) {
            have = sizeof(raw);
            tb_random_bytes(raw, have);
        }
        unsigned char c = raw[--have];
        if (c >= 252) continue; /* 252 = 7 * 36: no character is likelier than another */
        out[i++] = digits[c % 36];
    }
    out[n] = '\0';
    memset(raw, 0, sizeof(raw));
}
