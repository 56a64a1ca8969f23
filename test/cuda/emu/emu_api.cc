/*
 * The emulation's runtime API: memory, streams, events, graphs, errors; see emu.h.
 *
 * Owner: what a create or alloc function returned is its caller's. Thread: calls of any threads,
 * one at a time a device; the lists of memory are under a lock.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <map>
#include <mutex>
#include <vector>

#include "cuda_runtime.h"

struct node {
    const char *what;
    std::function<void()> work;
};
struct CUgraph_st {
    std::vector<node> nodes;
};
struct CUgraphExec_st {
    std::vector<node> nodes;
};
struct capture {
    CUgraph_st *graph = new CUgraph_st;
    CUstream_st *origin;
    std::vector<CUstream_st *> streams;
    bool strict; /* no allocation meanwhile */
    bool valid = true;
};
static thread_local int current_device;
struct CUstream_st {
    capture *into = NULL;
    int device = current_device;
    std::vector<std::function<void()>> late; /* queued copies between devices */
};
struct CUevent_st {
    capture *into = NULL;       /* recorded while a stream captured */
    CUstream_st *stream = NULL; /* that has yet to come to it */
};

#define MAX_SHARED     (99 << 10) /* the least that a GPU of 8.0 or later has */
#define SHARED_UNASKED (48 << 10)

static std::mutex lock;
struct device_block {
    size_t bytes;
    int device;
};
static std::map<char *, device_block> device_memory; /* by its start */
static std::map<char *, size_t> pinned_memory;
static std::map<const void *, int> shared_asked;
static size_t device_bytes;
static int n_capturing_strictly;
static thread_local cudaError_t last_error;

/* ---- errors */
static size_t environment(const char *name, size_t otherwise);
static long fail_in = (long)environment("TB_EMU_FAIL_AFTER", 0);
static bool failed;
static unsigned long failed_devices; /* a bit each */

void emu_fail_after(long n)
{
    fail_in = n;
    failed = false;
    if (!n) failed_devices = 0;
}
void emu_fail_device(int device)
{
    failed_devices |= 1ul << device;
}
static bool has_failed(int device)
{
    return failed || failed_devices >> device & 1;
}
static cudaError_t device_state(void)
{
    if (fail_in > 0 && --fail_in == 0) failed = true;
    return has_failed(current_device) ? cudaErrorLaunchFailure : cudaSuccess;
}
void emu_set_error(cudaError_t e)
{
    if (e) last_error = e;
}
static cudaError_t result(cudaError_t e)
{
    emu_set_error(e);
    return e;
}
cudaError_t cudaGetLastError(void)
{
    cudaError_t e = last_error;
    last_error = cudaSuccess;
    return has_failed(current_device) ? cudaErrorLaunchFailure : e;
}
cudaError_t cudaPeekAtLastError(void)
{
    return has_failed(current_device) ? cudaErrorLaunchFailure : last_error;
}
const char *cudaGetErrorName(cudaError_t e)
{
    switch (e) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    case cudaErrorPeerAccessAlreadyEnabled: return "cudaErrorPeerAccessAlreadyEnabled";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorGraphExecUpdateFailure: return "cudaErrorGraphExecUpdateFailure";
    }
    return "an unknown error";
}
const char *cudaGetErrorString(cudaError_t e)
{
    return cudaGetErrorName(e);
}

/* ---- devices */
static size_t environment(const char *name, size_t otherwise)
{
    const char *s = getenv(name);
    return s && *s ? (size_t)strtoull(s, NULL, 10) : otherwise;
}
static int n_devices(void)
{
    return (int)environment("TB_EMU_DEVICES", 1);
}
static size_t memory_total(void)
{
    return environment("TB_EMU_MEMORY", (size_t)1 << 30);
}
static bool protecting(void)
{
    return environment("TB_EMU_PROTECT", 0) != 0;
}

cudaError_t cudaDriverGetVersion(int *version)
{
    *version = n_devices() ? CUDART_VERSION : 0;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *version)
{
    *version = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int *n)
{
    *n = n_devices();
    return result(*n ? cudaSuccess : cudaErrorNoDevice);
}
cudaError_t cudaSetDevice(int device)
{
    if (device < 0 || device >= n_devices()) return result(cudaErrorInvalidDevice);
    current_device = device;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *device)
{
    *device = current_device;
    return cudaSuccess;
}
/* The device's part of TB_EMU_NAMES; those behind the last have the usual one. */
static void name_device(char *out, size_t n, int device)
{
    const char *s = getenv("TB_EMU_NAMES");
    for (; s && device; device--)
        if ((s = strchr(s, ','))) s++;
    snprintf(out, n, "%.*s", s ? (int)strcspn(s, ",") : 12, s ? s : "emulated GPU");
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device)
{
    if (device < 0 || device >= n_devices()) return result(cudaErrorInvalidDevice);
    memset(p, 0, sizeof(*p));
    name_device(p->name, sizeof(p->name), device);
    p->totalGlobalMem = memory_total();
    p->sharedMemPerBlock = SHARED_UNASKED;
    p->sharedMemPerBlockOptin = MAX_SHARED;
    p->major = 9;
    p->multiProcessorCount = 3; /* few and odd: grids go round more than once */
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr a, int device)
{
    struct cudaDeviceProp p;
    cudaError_t e = cudaGetDeviceProperties(&p, device);
    if (e) return e;
    switch (a) {
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = MAX_SHARED; return cudaSuccess;
    }
    return result(cudaErrorInvalidValue);
}
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total)
{
    std::lock_guard<std::mutex> g(lock);
    *total = memory_total();
    *free_bytes = *total - device_bytes;
    return cudaSuccess;
}

/* ---- memory. Protected: pages of its own, the end of the memory at the end of the last. */
static size_t page_round(size_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return (bytes + page - 1) / page * page;
}
static char *page_start(char *p)
{
    return (char *)((uintptr_t)p & ~(uintptr_t)(sysconf(_SC_PAGESIZE) - 1));
}

/* Device memory is accessible while one of these lives. */
struct device_access {
    static int depth;
    device_access() { change(1, PROT_READ | PROT_WRITE); }
    ~device_access() { change(-1, PROT_NONE); }
    void change(int by, int to)
    {
        if (!protecting()) return;
        std::lock_guard<std::mutex> g(lock);
        int before = depth;
        depth += by;
        if (before && depth) return;
        for (auto &m : device_memory)
            mprotect(page_start(m.first), page_round(m.second.bytes), to);
    }
};
int device_access::depth;

static cudaError_t may_allocate(void)
{
    return n_capturing_strictly ? cudaErrorStreamCaptureUnsupported : device_state();
}

cudaError_t cudaMalloc(void **p, size_t bytes)
{
    *p = NULL;
    cudaError_t e = may_allocate();
    if (e) return result(e);
    std::lock_guard<std::mutex> g(lock);
    if (bytes > memory_total() - device_bytes) return result(cudaErrorMemoryAllocation);
    if (!bytes) return cudaSuccess;
    char *at = NULL;
    if (protecting()) {
        size_t room = page_round(bytes);
        void *pages = mmap(NULL, room, device_access::depth ? PROT_READ | PROT_WRITE : PROT_NONE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (pages == MAP_FAILED) return result(cudaErrorMemoryAllocation);
        madvise(pages, room, MADV_HUGEPAGE); /* fewer pages to protect */
        at = (char *)pages + (room - bytes) / 256 * 256;
    } else if (posix_memalign((void **)&at, 256, bytes)) {
        return result(cudaErrorMemoryAllocation);
    } else if (bytes <= (size_t)64 << 20) {
        memset(at, 0xff, bytes); /* NaNs */
    }
    device_memory[at] = {bytes, current_device};
    device_bytes += bytes;
    *p = at;
    return cudaSuccess;
}
cudaError_t cudaFree(void *p)
{
    if (!p) return cudaSuccess;
    std::lock_guard<std::mutex> g(lock);
    auto m = device_memory.find((char *)p);
    if (m == device_memory.end()) return result(cudaErrorInvalidValue);
    device_bytes -= m->second.bytes;
    if (protecting())
        munmap(page_start(m->first), page_round(m->second.bytes));
    else
        free(p);
    device_memory.erase(m);
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned flags)
{
    (void)flags;
    *p = NULL;
    cudaError_t e = may_allocate();
    if (!e && posix_memalign(p, 256, bytes ? bytes : 1)) e = cudaErrorMemoryAllocation;
    if (e) return result(e);
    std::lock_guard<std::mutex> g(lock);
    pinned_memory[(char *)*p] = bytes;
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void **p, size_t bytes)
{
    return cudaHostAlloc(p, bytes, cudaHostAllocDefault);
}
cudaError_t cudaFreeHost(void *p)
{
    if (!p) return cudaSuccess;
    std::lock_guard<std::mutex> g(lock);
    if (!pinned_memory.erase((char *)p)) return result(cudaErrorInvalidValue);
    free(p);
    return cudaSuccess;
}

/* ---- work */

/* The stream comes to what it was left with. */
static void catch_up(cudaStream_t s)
{
    if (!s || s->late.empty()) return;
    device_access open;
    for (auto &work : s->late)
        work();
    s->late.clear();
}

cudaError_t emu_enqueue(cudaStream_t s, const char *what, std::function<void()> work)
{
    cudaError_t e = device_state();
    if (!e && s && s->device != current_device) e = cudaErrorInvalidResourceHandle;
    if (e) return result(e);
    if (s && s->into) {
        if (!s->into->valid) return result(cudaErrorStreamCaptureInvalidated);
        s->into->graph->nodes.push_back({what, std::move(work)});
        return cudaSuccess;
    }
    catch_up(s);
    device_access open;
    work();
    return cudaSuccess;
}

cudaError_t emu_check_launch(const void *kernel, dim3 grid, dim3 block, size_t shared)
{
    size_t threads = (size_t)block.x * block.y * block.z;
    std::lock_guard<std::mutex> g(lock);
    auto asked = shared_asked.find(kernel);
    size_t limit = asked == shared_asked.end() ? SHARED_UNASKED : (size_t)asked->second;
    if (!threads || threads > 1024 || block.z > 64 || !grid.x || !grid.y || !grid.z ||
        grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
        return cudaErrorInvalidConfiguration;
    return shared > limit ? cudaErrorInvalidValue : cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute a, int value)
{
    if (a != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || value > MAX_SHARED) return result(cudaErrorInvalidValue);
    std::lock_guard<std::mutex> g(lock);
    shared_asked[kernel] = value;
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, enum cudaMemcpyKind,
                            cudaStream_t s)
{
    return emu_enqueue(s, "copy", [=] {
        if (bytes) memmove(dst, src, bytes);
    });
}
cudaError_t cudaMemcpy2DAsync(void *dst, size_t dst_pitch, const void *src, size_t src_pitch,
                              size_t width, size_t height, enum cudaMemcpyKind, cudaStream_t s)
{
    if (width > dst_pitch || width > src_pitch) return result(cudaErrorInvalidValue);
    return emu_enqueue(s, "copy", [=] {
        for (size_t i = 0; i < height; i++)
            memmove((char *)dst + i * dst_pitch, (const char *)src + i * src_pitch, width);
    });
}
cudaError_t cudaMemcpy(void *dst, const void *src, size_t bytes, enum cudaMemcpyKind kind)
{
    return cudaMemcpyAsync(dst, src, bytes, kind, NULL);
}
cudaError_t cudaMemsetAsync(void *dst, int value, size_t bytes, cudaStream_t s)
{
    return emu_enqueue(s, "memset", [=] {
        if (bytes) memset(dst, value, bytes);
    });
}
/* Whether a device has this memory, in one piece that cudaMalloc gave. */
static bool is_on(const void *p, size_t bytes, int device)
{
    std::lock_guard<std::mutex> g(lock);
    auto m = device_memory.upper_bound((char *)p);
    if (m == device_memory.begin()) return false;
    --m;
    size_t at = (size_t)((char *)p - m->first);
    return m->second.device == device && at <= m->second.bytes && bytes <= m->second.bytes - at;
}
/* Copies when the stream is waited for, or comes to its next work. */
cudaError_t cudaMemcpyPeerAsync(void *dst, int dst_device, const void *src, int src_device,
                                size_t bytes, cudaStream_t s)
{
    cudaError_t e = device_state();
    if (!e && has_failed(src_device)) e = cudaErrorLaunchFailure;
    if (!e && (!s || s->device != current_device)) e = cudaErrorInvalidResourceHandle;
    if (!e && s->into) e = cudaErrorStreamCaptureUnsupported;
    if (!e && (!is_on(dst, bytes, dst_device) || !is_on(src, bytes, src_device)))
        e = cudaErrorInvalidValue;
    if (!e)
        s->late.push_back([=] {
            if (!is_on(dst, bytes, dst_device) || !is_on(src, bytes, src_device))
                emu_abort("memory of a copy between devices was freed", __FILE__, __LINE__);
            memmove(dst, src, bytes);
        });
    return result(e);
}
static bool are_peers(int device, int peer)
{
    return device != peer && device >= 0 && peer >= 0 && device < n_devices() && peer < n_devices();
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer)
{
    *can = are_peers(device, peer);
    return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned)
{
    static unsigned long enabled[64];
    if (!are_peers(current_device, peer)) return result(cudaErrorInvalidDevice);
    if (enabled[current_device] >> peer & 1) return result(cudaErrorPeerAccessAlreadyEnabled);
    enabled[current_device] |= 1ul << peer;
    return cudaSuccess;
}
cudaError_t cudaMemset(void *dst, int value, size_t bytes)
{
    return cudaMemsetAsync(dst, value, bytes, NULL);
}

/* ---- streams and events */
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned, int)
{
    *s = NULL;
    cudaError_t e = device_state();
    if (!e) *s = new CUstream_st;
    return result(e);
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags)
{
    return cudaStreamCreateWithPriority(s, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t *s)
{
    return cudaStreamCreateWithPriority(s, 0, 0);
}
cudaError_t cudaStreamDestroy(cudaStream_t s)
{
    if (!s) return result(cudaErrorInvalidResourceHandle);
    delete s;
    return cudaSuccess;
}
/* A call that may not be made while s captures ends the capture. */
static cudaError_t not_while_capturing(cudaStream_t s)
{
    if (!s || !s->into) return cudaSuccess;
    s->into->valid = false;
    return cudaErrorStreamCaptureUnsupported;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s)
{
    cudaError_t e = not_while_capturing(s);
    if (!e) e = device_state();
    if (!e) catch_up(s);
    return result(e);
}
cudaError_t cudaStreamQuery(cudaStream_t s)
{
    return cudaStreamSynchronize(s);
}
cudaError_t cudaDeviceSynchronize(void)
{
    return result(may_allocate());
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned)
{
    *event = NULL;
    cudaError_t e = device_state();
    if (!e) *event = new CUevent_st;
    return result(e);
}
cudaError_t cudaEventCreate(cudaEvent_t *e)
{
    return cudaEventCreateWithFlags(e, 0);
}
cudaError_t cudaEventDestroy(cudaEvent_t e)
{
    if (!e) return result(cudaErrorInvalidResourceHandle);
    delete e;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s)
{
    e->into = s ? s->into : NULL;
    e->stream = s && !s->late.empty() ? s : NULL;
    return result(device_state());
}
cudaError_t cudaEventSynchronize(cudaEvent_t e)
{
    if (!e->into) {
        catch_up(e->stream);
        e->stream = NULL;
        return result(device_state());
    }
    e->into->valid = false;
    return result(cudaErrorStreamCaptureUnsupported);
}
cudaError_t cudaEventQuery(cudaEvent_t e)
{
    return cudaEventSynchronize(e);
}
/* A stream that waits for one that captures joins it. */
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned)
{
    if (e->into && s->into != e->into) {
        if (s->into) return result(cudaErrorStreamCaptureInvalidated);
        s->into = e->into;
        s->into->streams.push_back(s);
    }
    catch_up(e->stream);
    e->stream = NULL;
    return result(device_state());
}

/* ---- graphs */
cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode)
{
    cudaError_t e = device_state();
    if (e) return result(e);
    if (!s || s->into) return result(cudaErrorStreamCaptureUnsupported);
    s->into = new capture;
    s->into->origin = s;
    s->into->streams.push_back(s);
    s->into->strict = mode != cudaStreamCaptureModeRelaxed;
    n_capturing_strictly += s->into->strict;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g)
{
    *g = NULL;
    capture *c = s->into;
    if (!c || c->origin != s) return result(cudaErrorInvalidValue);
    n_capturing_strictly -= c->strict;
    for (cudaStream_t joined : c->streams)
        joined->into = NULL;
    cudaError_t e = c->valid ? device_state() : cudaErrorStreamCaptureInvalidated;
    if (e)
        delete c->graph;
    else
        *g = c->graph;
    delete c;
    return result(e);
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status)
{
    *status = !s->into         ? cudaStreamCaptureStatusNone
              : s->into->valid ? cudaStreamCaptureStatusActive
                               : cudaStreamCaptureStatusInvalidated;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t g, unsigned long long)
{
    *exec = NULL;
    cudaError_t e = device_state();
    if (!e) *exec = new CUgraphExec_st{g->nodes};
    return result(e);
}
cudaError_t cudaGraphExecUpdate(cudaGraphExec_t exec, cudaGraph_t g,
                                cudaGraphExecUpdateResultInfo *info)
{
    info->result = exec->nodes.size() != g->nodes.size();
    for (size_t i = 0; !info->result && i < g->nodes.size(); i++)
        info->result = strcmp(exec->nodes[i].what, g->nodes[i].what) != 0;
    if (info->result) return result(cudaErrorGraphExecUpdateFailure);
    exec->nodes = g->nodes;
    return result(device_state());
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s)
{
    std::vector<node> nodes = exec->nodes;
    return emu_enqueue(s, "graph", [nodes] {
        for (const node &n : nodes)
            n.work();
    });
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t)
{
    return result(device_state());
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec)
{
    delete exec;
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t g)
{
    delete g;
    return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t g, void **nodes, size_t *n)
{
    if (nodes) return result(cudaErrorNotSupported);
    *n = g->nodes.size();
    return cudaSuccess;
}
