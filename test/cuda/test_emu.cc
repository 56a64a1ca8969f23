/*
 * The emulation itself: that its tensor-core tiles, shuffles and copies do what PTX says, and that
 * it reports kernels that a GPU would hang on or that write where they may not.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

extern "C" {
#include <cmocka.h>
}

#include "cuda/device.cuh"

static struct tb_cuda dev;

extern "C" bool tb_cuda_ok(struct tb_cuda *c, cudaError_t e, const char *what)
{
    if (e) c->lost.code = (int)e;
    return !c->lost.code;
}
extern "C" void tb_cuda_note(struct tb_cuda *, const void *, size_t) {}

/* ---- tiles: D = A B + D by mma from tiles that ldmatrix loaded, against three loops */
__global__ static void k_tile(const bf16 *a, const bf16 *b, float *d)
{
    __shared__ __align__(16) bf16 ta[16 * 16], tb[16 * 8];
    int lane = (int)threadIdx.x;
    copy16_async(&ta[lane * 8], &a[lane * 8], false);
    if (lane < 16) copy16_async(&tb[lane * 8], &b[lane * 8], false);
    copy_async_commit();
    copy_async_wait<0>();
    __syncwarp();
    uint32_t ra[4], rb[4];
    ldmatrix_x4(ra, &ta[(lane % 16) * 16 + lane / 16 * 8]);
    ldmatrix_x4_trans(rb, &tb[lane % 16 * 8]);
    float sum[4];
    int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++)
        sum[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    mma_bf16(sum, ra, rb);
    for (int i = 0; i < 4; i++)
        d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}
static void test_tile(void **)
{
    bf16 *a, *b;
    float want[16 * 8], d[16 * 8];
    assert_int_equal(posix_memalign((void **)&a, 16, 16 * 16 * 2), 0);
    assert_int_equal(posix_memalign((void **)&b, 16, 16 * 8 * 2), 0);
    for (int i = 0; i < 256; i++)
        a[i] = __float2bfloat16_rn((float)(i * 37 % 101 - 50));
    for (int i = 0; i < 128; i++)
        b[i] = __float2bfloat16_rn((float)(i * 53 % 97 - 48));
    for (int i = 0; i < 128; i++) {
        want[i] = d[i] = (float)i;
        for (int k = 0; k < 16; k++)
            want[i] += __bfloat162float(a[i / 8 * 16 + k]) * __bfloat162float(b[k * 8 + i % 8]);
    }
    TB_LAUNCH(&dev, k_tile, 1, 32, 0, a, b, d);
    assert_memory_equal(d, want, sizeof(d));
    free(a);
    free(b);
}

/* ---- warps and blocks */
__global__ static void k_sums(int *out, double *sum)
{
    int i = (int)threadIdx.x;
    int x = __shfl_up_sync(TB_ALL, i, 1) + 1000 * __shfl_down_sync(TB_ALL, i, 3, 8);
    out[i] = x + 1000000 * __shfl_sync(TB_ALL, i, 5, 16);
    unsigned odd = __ballot_sync(TB_ALL, i % 2);
    if (odd != 0xaaaaaaaau || !__any_sync(TB_ALL, i % 32 == 31) || __all_sync(TB_ALL, i % 2))
        out[i] = -1;
    double s = block_sum((double)i);
    if (i == 0) *sum = s;
    atomicAdd(&out[96], 1);
}
static void test_warps(void **)
{
    int out[97] = {0};
    double sum = 0;
    for (int turn = 0; turn < 2; turn++) { /* both orders */
        out[96] = 0;
        TB_LAUNCH(&dev, k_sums, 1, 96, 0, out, &sum);
        for (int i = 0; i < 96; i++) {
            int up = i % 32 ? i - 1 : i, down = i % 8 + 3 < 8 ? i + 3 : i;
            assert_int_equal(out[i], up + 1000 * down + 1000000 * (i / 16 * 16 + 5));
        }
        assert_int_equal(out[96], 96);
        assert_true(sum == 95 * 96 / 2);
    }
}

__global__ static void k_where(unsigned *out)
{
    TB_DYN_SHARED(float, s);
    bool fresh = s[threadIdx.x] != s[threadIdx.x]; /* a NaN */
    __syncthreads();
    s[threadIdx.x] = 1;
    unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    out[block * 24 + thread] = fresh ? block * 100 + thread : 0;
}
static void test_indices(void **)
{
    unsigned out[30 * 24];
    TB_LAUNCH(&dev, k_where, dim3(2, 3, 5), dim3(4, 3, 2), 16, out);
    for (unsigned i = 0; i < 30 * 24; i++)
        assert_int_equal(out[i], i / 24 * 100 + i % 24);
}

/* ---- what must be reported */
__global__ static void k_leaves(int)
{
    if (threadIdx.x == 40) return;
    __syncthreads();
}
__global__ static void k_parts(int)
{
    if (threadIdx.x < 16) __syncwarp();
}
__global__ static void k_two_barriers(int)
{
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
}
__global__ static void k_short_warp(int)
{
    warp_sum(1.0f);
}
__global__ static void k_mask(int)
{
    __shfl_sync(0xffff, 1, 0);
}
__global__ static void k_behind(int)
{
    TB_DYN_SHARED(char, s);
    s[blockDim.x] = 1;
}
__global__ static void k_misaligned(const char *p)
{
    __shared__ __align__(16) char s[32];
    copy16_async(s, p + 1, false);
}

static void dies(void (*f)(void))
{
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        (void)!freopen("/dev/null", "w", stderr);
        f();
        _exit(0);
    }
    int status = 0;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_false(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
static void test_reports(void **)
{
    dies([] { TB_LAUNCH(&dev, k_leaves, 1, 64, 0, 0); });
    dies([] { TB_LAUNCH(&dev, k_parts, 1, 32, 0, 0); });
    dies([] { TB_LAUNCH(&dev, k_two_barriers, 1, 64, 0, 0); });
    dies([] { TB_LAUNCH(&dev, k_short_warp, 1, 40, 0, 0); });
    dies([] { TB_LAUNCH(&dev, k_mask, 1, 32, 0, 0); });
    dies([] { TB_LAUNCH(&dev, k_behind, 1, 32, 32, 0); });
    dies([] {
        char *p = NULL;
        setenv("TB_EMU_PROTECT", "1", 1);
        if (!cudaMalloc((void **)&p, 100) && !cudaMemset(p, 1, 100)) p[50] = 2;
    });
    dies([] { TB_LAUNCH(&dev, k_misaligned, 1, 32, 0, (const char *)&dev); });
}

/* ---- launches that are refused, failures, captures */
__global__ static void k_count(int *n)
{
    if (threadIdx.x == 0) ++*n;
}
static int launch_code(dim3 grid, dim3 block, size_t shared)
{
    int n = 0;
    dev.lost.code = 0;
    TB_LAUNCH(&dev, k_count, grid, block, shared, &n);
    int code = dev.lost.code;
    dev.lost.code = 0;
    return code;
}
static void test_launches(void **)
{
    assert_int_equal(launch_code(1, 1024, 48 << 10), cudaSuccess);
    assert_int_equal(launch_code(1, 1025, 0), cudaErrorInvalidConfiguration);
    assert_int_equal(launch_code(0, 32, 0), cudaErrorInvalidConfiguration);
    assert_int_equal(launch_code(dim3(1, 65536), 32, 0), cudaErrorInvalidConfiguration);
    assert_int_equal(launch_code(1, 32, (48 << 10) + 1), cudaErrorInvalidValue);
    TB_ALLOW_SHARED(&dev, k_count, 99 << 10);
    assert_int_equal(launch_code(1, 32, 99 << 10), cudaSuccess);
    assert_int_equal(cudaFuncSetAttribute((const void *)k_count,
                                          cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          (99 << 10) + 1),
                     cudaErrorInvalidValue);
    (void)cudaGetLastError();
    emu_fail_after(2);
    assert_int_equal(launch_code(1, 32, 0), cudaSuccess);
    assert_int_equal(launch_code(1, 32, 0), cudaErrorLaunchFailure);
    assert_int_equal(launch_code(1, 32, 0), cudaErrorLaunchFailure);
    emu_fail_after(0);
    assert_int_equal(launch_code(1, 32, 0), cudaSuccess);
}

static void test_capture(void **)
{
    cudaStream_t a, b;
    cudaEvent_t e;
    cudaGraph_t g;
    cudaGraphExec_t exec;
    int n = 0;
    assert_int_equal(cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking), 0);
    assert_int_equal(cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking), 0);
    assert_int_equal(cudaEventCreateWithFlags(&e, cudaEventDisableTiming), 0);
    assert_int_equal(cudaStreamBeginCapture(a, cudaStreamCaptureModeThreadLocal), 0);
    dev.stream = a;
    TB_LAUNCH(&dev, k_count, 2, 32, 0, &n);
    assert_int_equal(cudaEventRecord(e, a), 0);
    assert_int_equal(cudaStreamWaitEvent(b, e, 0), 0);
    dev.stream = b; /* joined the capture */
    TB_LAUNCH(&dev, k_count, 3, 32, 0, &n);
    void *p;
    assert_int_equal(cudaMalloc(&p, 1), cudaErrorStreamCaptureUnsupported);
    (void)cudaGetLastError();
    assert_int_equal(cudaStreamEndCapture(a, &g), 0);
    assert_int_equal(n, 0);
    assert_int_equal(cudaGraphInstantiate(&exec, g, 0), 0);
    assert_int_equal(cudaGraphDestroy(g), 0);
    for (int i = 1; i <= 3; i++) {
        assert_int_equal(cudaGraphLaunch(exec, a), 0);
        assert_int_equal(n, 5 * i);
    }
    assert_int_equal(cudaGraphExecDestroy(exec), 0);
    /* waiting for what is being captured ends the capture */
    assert_int_equal(cudaStreamBeginCapture(a, cudaStreamCaptureModeThreadLocal), 0);
    assert_int_equal(cudaStreamSynchronize(a), cudaErrorStreamCaptureUnsupported);
    assert_int_equal(cudaStreamEndCapture(a, &g), cudaErrorStreamCaptureInvalidated);
    (void)cudaGetLastError();
    dev.stream = NULL;
    cudaEventDestroy(e);
    cudaStreamDestroy(a);
    cudaStreamDestroy(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tile),     cmocka_unit_test(test_warps),
        cmocka_unit_test(test_indices),  cmocka_unit_test(test_reports),
        cmocka_unit_test(test_launches), cmocka_unit_test(test_capture),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
