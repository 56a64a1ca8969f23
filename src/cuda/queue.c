/*
 * Queues: a stream for training and all else, and one for sampling; decode steps as graphs.
 *
 * Everything runs in the order in which the host asked for it: whoever begins to use a queue makes
 * it wait, on the device, for all that is on the other. So memory that one queue frees may be taken
 * on the other at once, and no kernel sees a buffer before it is written or after. A lane trains
 * and samples in turn and waits at the end of each, so nothing is lost by that.
 *
 * A decode step asks for hundreds of small kernels. The work of a class of steps (a power of two of
 * rows) is captured into a graph, which updates the class's executable graph, and that is launched:
 * the device goes from kernel to kernel without the host. Where the update is refused, as the
 * kernels are others, a new executable is made. A capture that fails has run nothing; its work is
 * asked for again, plainly.
 *
 * Capturing costs the host as much as launching, while the device waits. So a step is first only
 * compared with those before: its calls stage what they stage, and a print is made of all kernels,
 * grids, arguments and copies. Where it is the executable's, that is launched as it is: most steps,
 * as what differs (tokens, positions, pages) is staged. A step that is new runs plainly, and is
 * captured when the next one is the same; so what loads at a kernel's first launch is loaded then.
 *
 * Owner: struct tb_cuda. Thread: the backend's; the current device is the thread's.
 */
#include <stdio.h>
#include <string.h>

#include "cuda/host.h"
#include "util/log.h"

#define N_CLASSES    16 /* of steps, by the power of two at or above their rows */
#define MAX_FAILURES 8  /* after so many captures that failed in a row, none is tried */

struct graph_class {
    cudaGraphExec_t exec; /* or NULL */
    uint64_t print;       /* of what exec does */
    uint64_t seen;        /* of the last step that ran plainly */
};

struct tb_cuda_queues {
    cudaStream_t streams[TB_N_QUEUES];
    cudaEvent_t end; /* of what was asked for before a switch */
    enum tb_queue now;
    struct graph_class classes[N_CLASSES];
    int n_failures; /* of captures, in a row */
    bool told;      /* why a step cannot be captured */
};

int tb_cuda_queues_create(struct tb_cuda *c, struct tb_error *err)
{
    struct tb_cuda_queues *q = c->queues = tb_calloc(1, sizeof(*q));
    bool ok = tb_cuda_ok(c, cudaEventCreateWithFlags(&q->end, cudaEventDisableTiming), "an event");
    for (int i = 0; i < TB_N_QUEUES && ok; i++)
        ok = tb_cuda_ok(c, cudaStreamCreateWithFlags(&q->streams[i], cudaStreamNonBlocking),
                        "a stream");
    c->stream = q->streams[q->now];
    return ok ? 0 : tb_error_set(err, c->lost.code, "%s", c->lost.msg);
}

void tb_cuda_queues_destroy(struct tb_cuda *c)
{
    struct tb_cuda_queues *q = c->queues;
    if (!q) return;
    for (int i = 0; i < N_CLASSES; i++)
        if (q->classes[i].exec) (void)cudaGraphExecDestroy(q->classes[i].exec);
    for (int i = 0; i < TB_N_QUEUES; i++)
        if (q->streams[i]) (void)cudaStreamDestroy(q->streams[i]);
    if (q->end) (void)cudaEventDestroy(q->end);
    tb_free(q);
    c->queues = NULL;
}

static void use(struct tb_backend *be, enum tb_queue queue)
{
    struct tb_cuda *c = tb_cuda(be);
    struct tb_cuda_queues *q = c->queues;
    if (!tb_cuda_ok(c, cudaSuccess, "a queue")) return;
    tb_cuda_ok(c, cudaSetDevice(c->device), "the device");
    if (queue == q->now) return;
    tb_cuda_ok(c, cudaEventRecord(q->end, c->stream), "a queue");
    tb_cuda_ok(c, cudaStreamWaitEvent(q->streams[queue], q->end, 0), "a queue");
    c->stream = q->streams[queue];
    q->now = queue;
}

/* ---- decode steps */

void tb_cuda_note(struct tb_cuda *c, const void *what, size_t bytes)
{
    for (size_t at = 0, n; at < bytes && c->capturing; at += n) {
        uint64_t x = 0;
        n = TB_MIN(sizeof(x), bytes - at);
        memcpy(&x, (const char *)what + at, n);
        c->print = (c->print ^ x) * 0x9e3779b97f4a7c15u;
        c->print ^= c->print >> 32;
    }
}

/* Calls fn for what it stages and its print; false: the step cannot be captured. */
static bool compare(struct tb_cuda *c, void (*fn)(void *arg), void *arg)
{
    if (!tb_cuda_ring_capture(c)) return false;
    c->capturing = c->comparing = true;
    c->print = 0;
    fn(arg);
    bool failed = c->capture_failed;
    c->capturing = c->comparing = c->capture_failed = false;
    return !failed;
}

/* The graph of what fn asks for, or NULL: it cannot be captured. Nothing has run in any case. */
static cudaGraph_t capture(struct tb_cuda *c, void (*fn)(void *arg), void *arg)
{
    cudaGraph_t graph = NULL;
    if (!tb_cuda_ring_capture(c)) return NULL;
    c->capturing = true;
    c->print = 0;
    if (tb_cuda_ok(c, cudaStreamBeginCapture(c->stream, cudaStreamCaptureModeRelaxed),
                   "a capture")) {
        fn(arg);
        tb_cuda_ok(c, cudaStreamEndCapture(c->stream, &graph), "a capture");
    }
    bool failed = c->capture_failed;
    c->capturing = c->capture_failed = false;
    if (!failed) return graph;
    if (graph) (void)cudaGraphDestroy(graph);
    (void)cudaGetLastError(); /* the capture's; the device is well */
    return NULL;
}

/* Makes the class's executable run the graph, that of c->print. */
static bool update(struct tb_cuda *c, struct graph_class *k, cudaGraph_t graph)
{
    cudaGraphExecUpdateResultInfo info;
    k->print = c->print;
    if (k->exec && cudaGraphExecUpdate(k->exec, graph, &info) == cudaSuccess) return true;
    if (k->exec) (void)cudaGraphExecDestroy(k->exec);
    k->exec = NULL;
    (void)cudaGetLastError(); /* the update's: a graph of another form */
    cudaError_t e = cudaGraphInstantiate(&k->exec, graph, 0);
    if (!e) return true;
    snprintf(c->not_captured, sizeof(c->not_captured), "a graph: %s", cudaGetErrorString(e));
    k->exec = NULL;
    (void)cudaGetLastError();
    return false;
}

/* Makes the class's executable run what fn asks for. */
static bool renew(struct tb_cuda *c, struct graph_class *k, void (*fn)(void *arg), void *arg)
{
    struct tb_cuda_queues *q = c->queues;
    cudaGraph_t graph = capture(c, fn, arg);
    bool ok = graph && update(c, k, graph);
    if (graph) (void)cudaGraphDestroy(graph);
    q->n_failures = ok ? 0 : q->n_failures + 1;
    if (q->n_failures == MAX_FAILURES)
        tb_log(TB_LOG_WARN, "cuda", "device %d: decode steps run without graphs: %s", c->device,
               c->not_captured);
    return ok;
}

static void tell(struct tb_cuda *c, int rows)
{
    if (!c->queues->told && !c->lost.code)
        tb_log(TB_LOG_INFO, "cuda", "device %d: a decode step of %d rows has no graph: %s",
               c->device, rows, c->not_captured);
    c->queues->told = true;
}

/* False: nothing has run. */
static bool run_graph(struct tb_cuda *c, int rows, struct graph_class *k, void (*fn)(void *arg),
                      void *arg)
{
    bool ok = compare(c, fn, arg);
    if (ok && (!k->exec || c->print != k->print)) {
        bool again = c->print == k->seen;
        k->seen = c->print;
        if (!again) return false;
        ok = renew(c, k, fn, arg);
    }
    if (!ok) {
        tell(c, rows);
        return false;
    }
    tb_cuda_ring_send(c);
    tb_cuda_ok(c, cudaGraphLaunch(k->exec, c->stream), "a decode step");
    tb_cuda_ring_sent(c);
    return true;
}

static void step(struct tb_backend *be, int rows, void (*fn)(void *arg), void *arg)
{
    struct tb_cuda *c = tb_cuda(be);
    struct tb_cuda_queues *q = c->queues;
    int i = 0;
    while (i < N_CLASSES && (1 << i) < rows)
        i++;
    if (i == N_CLASSES || q->n_failures == MAX_FAILURES || c->lost.code ||
        !run_graph(c, rows, &q->classes[i], fn, arg))
        fn(arg);
}

void tb_cuda_queue_ops(struct tb_backend_ops *o)
{
    o->use = use;
    o->step = step;
}
