/*
 * The tests' main on a GPU. It skips them where there is none. Tests of the backend hand their own
 * arrays to kernels: their malloc is one of memory that the device reads too, and their stack is
 * such memory.
 *
 * Owner: the process. Thread: main, and the one that runs the tests.
 */
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STACK ((size_t)16 << 20)
#define SKIP  77

int test_main(void);
void *gpu_malloc(size_t n);
void *gpu_calloc(size_t n, size_t size);
void gpu_free(void *p);

void *gpu_malloc(size_t n)
{
    void *p = NULL;
    return cudaHostAlloc(&p, n ? n : 1, cudaHostAllocPortable) ? NULL : p;
}
void *gpu_calloc(size_t n, size_t size)
{
    void *p = gpu_malloc(n * size);
    return p ? memset(p, 0, n * size) : NULL;
}
void gpu_free(void *p)
{
    if (!p || cudaDeviceSynchronize() || !cudaFreeHost(p)) return;
    (void)cudaGetLastError(); /* it was the C library's */
    free(p);
}

static void *run(void *result)
{
    *(int *)result = test_main();
    return NULL;
}

int main(void)
{
    int n = 0, result = 1;
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e || n == 0) {
        printf("skipped: %s\n", e ? cudaGetErrorString(e) : "no CUDA device");
        return SKIP;
    }
    pthread_t thread;
    pthread_attr_t attr;
    void *stack = gpu_malloc(STACK);
    if (!stack || pthread_attr_init(&attr) || pthread_attr_setstack(&attr, stack, STACK) ||
        pthread_create(&thread, &attr, run, &result) || pthread_join(thread, NULL)) {
        fprintf(stderr, "no thread on memory of the device\n");
        return 1;
    }
    pthread_attr_destroy(&attr);
    gpu_free(stack);
    return result;
}
