/*
 * Clocks and random bytes. tb_clock_ms is monotonic (time-outs, leases); tb_clock_wall_us is UTC
 * (what people see). Thread: any.
 */
#ifndef TB_UTIL_CLOCK_H
#define TB_UTIL_CLOCK_H

#include <stddef.h>
#include <stdint.h>

uint64_t tb_clock_ms(void);
uint64_t tb_clock_ns(void);
int64_t tb_clock_wall_us(void);
#define TB_TIME_TEXT 32
/* "2026-01-02T03:04:05.678901Z" */
void tb_clock_format(int64_t wall_us, char out[TB_TIME_TEXT]);
/* HTTP date, "Fri, 02 Jan 2026 03:04:05 GMT" */
void tb_clock_http_date(int64_t wall_us, char out[TB_TIME_TEXT]);

void tb_random_bytes(void *p, size_t n); /* from the kernel; aborts if there are none */
uint64_t tb_random_u64(void);
/* n random characters of [0-9a-z] and a NUL; for ids and tokens. out has n + 1 bytes. */
void tb_random_id(char *out, size_t n);

#endif
