/* On a GPU, in the place of the emulation's: tests that need that one are skipped. */
#ifndef TEST_GPU_EMU_H
#define TEST_GPU_EMU_H

#include <cuda_runtime_api.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

static inline void emu_only(void)
{
    skip();
}
static inline int emu_devices(int n)
{
    int found = 0;
    return cudaGetDeviceCount(&found) == cudaSuccess && found < n ? found : n;
}

/* Behind emu_only. */
static inline void emu_fail_after(long n) {}
static inline void emu_fail_device(int device) {}
static inline void emu_vary_products(int n) {}

#endif
