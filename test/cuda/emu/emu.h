/*
 * A small emulation of CUDA, so that src/cuda/ compiles for the host with a plain C++ compiler and
 * every kernel can be compared with the CPU backend on a machine without a GPU or the toolkit. The
 * headers in this folder have the names of CUDA's and declare what src/cuda/ uses.
 *
 * What it does. A kernel runs at its launch: blocks one after the other, the threads of a block as
 * fibers on the caller's thread. Odd launches take blocks and threads in the reverse order, so
 * that a missing barrier or a dependence on the order shows. It aborts, with the place, when
 * threads of a block or lanes of a warp do not meet at the same barrier or shuffle, at a misaligned
 * 16-byte copy, and at a write behind dynamic shared memory; copy16_async copies when it is waited
 * for. Shared memory of a block starts as NaNs. Device memory is host memory of exactly the size
 * asked for, so AddressSanitizer sees what goes beyond. A stream that captures only records, and a
 * graph's launch runs what was recorded. Sizes that a GPU refuses at a launch are refused.
 *
 * Memory belongs to a device: a copy between two must name where each end is, and happens only
 * when its stream is waited for or comes to other work.
 *
 * What it does not. Streams do not overlap: work runs when it is queued. Memory is coherent and
 * atomics are plain. Bank conflicts, registers and time mean nothing. mma sums in float64, cuBLASLt
 * in float32 in the order of K: a GPU's bits differ. Not for ThreadSanitizer.
 *
 * Environment: TB_EMU_DEVICES devices (1), with names by TB_EMU_NAMES (by commas; else all one);
 * TB_EMU_MEMORY bytes of each (1 GiB); TB_EMU_PROTECT=1 makes device memory accessible only while
 * kernels and copies run, so that a host's access to it is a crash; TB_EMU_FAIL_AFTER as
 * emu_fail_after at the start.
 *
 * Thread: any, one at a time a device.
 */
#ifndef TEST_CUDA_EMU_EMU_H
#define TEST_CUDA_EMU_EMU_H

#include <stdlib.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The n-th launch or call from now (1: the next) that works on a device fails, and all after it; 0:
 * all is well again. */
void emu_fail_after(long n);
/* All that works on this device fails from now on, until emu_fail_after(0). */
void emu_fail_device(int device);
/* The first n of cuBLASLt's two candidates (1 at the start) sum in another order where a product
 * has more than 32 columns, as a library's may. */
void emu_vary_products(int n);
/* Kernels run since the program began. */
long emu_launches(void);

/* Of tests that run on GPUs too (test/gpu/emu.h). At the start of one that needs the emulation. */
static inline void emu_only(void) {}
/* How many devices there are from now on, of at most n. */
static inline int emu_devices(int n)
{
    char text[2] = {(char)('0' + n), 0};
    setenv("TB_EMU_DEVICES", text, 1);
    return n;
}

#ifdef __cplusplus
}

#    include <functional>

#    include "cuda_runtime_api.h"

struct emu_place {
    const char *what, *file;
    int line;
};

/* Runs work now, or records it when the stream captures. launch: fails as a launch. */
cudaError_t emu_enqueue(cudaStream_t stream, const char *what, std::function<void()> work);
/* Runs a grid on the caller's thread. */
void emu_grid(const emu_place &at, dim3 grid, dim3 block, size_t shared,
              const std::function<void()> &thread);
/* What cudaGetLastError tells next. */
void emu_set_error(cudaError_t e);
/* Whether a GPU would take this launch. */
cudaError_t emu_check_launch(const void *kernel, dim3 grid, dim3 block, size_t shared);

#endif
#endif
