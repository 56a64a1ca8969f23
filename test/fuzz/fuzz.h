/*
 * What a fuzz target is: libFuzzer's entry point, which replay.c calls too. A target aborts
 * (TB_BUG_ON) when a promise of the code under test does not hold; the sanitizers watch the rest.
 * Its corpus lies in corpus/<name>.
 *
 * Owner: the input is the caller's. Thread: one.
 */
#ifndef TB_TEST_FUZZ_H
#define TB_TEST_FUZZ_H

#include <stddef.h>
#include <stdint.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

#endif
