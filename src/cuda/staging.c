/*
 * Copies between host and device through pinned memory.
 *
 * Host arrays and uploads go through a ring of segments. A piece is copied into the ring at once,
 * so the caller's memory is free when the call returns, and from there to the device in the order
 * of the queue. A segment's pinned memory is written again when an event says that the copies out
 * of it are done; its device memory needs no event, as the queue runs the next copy into it after
 * the kernels that read the last.
 *
 * What was staged not long ago is not staged again: all layers of a step have the same positions,
 * pages and tasks. The bytes are compared, so that the caller need not know.
 *
 * While a step is captured nothing runs, so nothing in the ring would ever be done. What is staged
 * then gathers in memory of its own, at most TB_CUDA_STEP bytes, and goes over in one copy before
 * the graph is launched.
 *
 * Owner: struct tb_cuda. Thread: the backend's.
 */
#include <string.h>

#include "cuda/host.h"

#define N_SEGMENTS   4
#define SEGMENT      TB_CUDA_STAGE
#define UPLOAD_PIECE ((size_t)1 << 20)
#define FETCH_PIECE  ((size_t)1 << 20)
#define TB_CUDA_STEP ((size_t)16 << 20)

#define N_KNOWN 64

struct known { /* what was staged last into some memory: offsets and sizes */
    size_t at[N_KNOWN], bytes[N_KNOWN];
    unsigned n;
};

struct tb_cuda_ring {
    char *pinned; /* the segments, what a captured step stages, two pieces of fetches */
    char *device; /* the segments, what a captured step stages */
    int segment;  /* written now, so many bytes of it: */
    size_t used;
    struct known known;           /* in this segment: it outlives the call that finds it */
    cudaEvent_t left[N_SEGMENTS]; /* the copies out of it are done */
    char *step, *step_device;
    size_t step_used;
    struct known step_known;
    cudaEvent_t step_read;
    char *fetch[2];
    cudaEvent_t fetched[2];
};

#define DEVICE_BYTES (N_SEGMENTS * SEGMENT + TB_CUDA_STEP)
#define PINNED_BYTES (DEVICE_BYTES + 2 * FETCH_PIECE)

int tb_cuda_ring_create(struct tb_cuda *c, struct tb_error *err)
{
    struct tb_cuda_ring *r = c->ring = tb_calloc(1, sizeof(*r));
    r->device = tb_cuda_alloc(&c->be, DEVICE_BYTES);
    if (!r->device) return tb_backend_no_memory(&c->be, err, DEVICE_BYTES, "staging buffers");
    void *pinned = NULL;
    bool ok = tb_cuda_ok(c, cudaMallocHost(&pinned, PINNED_BYTES), "page-locked host memory");
    r->pinned = pinned;
    for (int i = 0; i < N_SEGMENTS && ok; i++)
        ok = tb_cuda_ok(c, cudaEventCreateWithFlags(&r->left[i], cudaEventDisableTiming), "events");
    for (int i = 0; i < 2 && ok; i++)
        ok = tb_cuda_ok(c, cudaEventCreateWithFlags(&r->fetched[i], cudaEventDisableTiming),
                        "events");
    if (ok)
        ok = tb_cuda_ok(c, cudaEventCreateWithFlags(&r->step_read, cudaEventDisableTiming),
                        "events");
    if (!ok) return tb_error_set(err, c->lost.code, "%s", c->lost.msg);
    r->step = r->pinned + N_SEGMENTS * SEGMENT;
    r->step_device = r->device + N_SEGMENTS * SEGMENT;
    for (size_t i = 0; i < 2; i++)
        r->fetch[i] = r->pinned + DEVICE_BYTES + i * FETCH_PIECE;
    return 0;
}

void tb_cuda_ring_destroy(struct tb_cuda *c)
{
    struct tb_cuda_ring *r = c->ring;
    if (!r) return;
    cudaEvent_t events[N_SEGMENTS + 3] = {r->step_read, r->fetched[0], r->fetched[1]};
    memcpy(events + 3, r->left, sizeof(r->left));
    for (size_t i = 0; i < TB_ARRAY_LEN(events); i++)
        if (events[i]) (void)cudaEventDestroy(events[i]);
    if (r->pinned) (void)cudaFreeHost(r->pinned);
    tb_cuda_free(&c->be, r->device, DEVICE_BYTES);
    tb_free(r);
    c->ring = NULL;
}

/* ---- to the device */

/* Room for at most SEGMENT bytes, an offset in the ring; SIZE_MAX when the device is lost. */
static size_t take(struct tb_cuda *c, size_t bytes)
{
    struct tb_cuda_ring *r = c->ring;
    TB_BUG_ON(bytes > SEGMENT);
    if (r->used + bytes > SEGMENT) {
        if (!tb_cuda_ok(c, cudaEventRecord(r->left[r->segment], c->stream), "staging"))
            return SIZE_MAX;
        r->segment = (r->segment + 1) % N_SEGMENTS;
        r->used = r->known.n = 0;
        if (!tb_cuda_ok(c, cudaEventSynchronize(r->left[r->segment]), "staging")) return SIZE_MAX;
    }
    size_t at = (size_t)r->segment * SEGMENT + r->used;
    r->used += tb_cuda_round_up(bytes);
    return at;
}

/* Where memory has these bytes, or SIZE_MAX. */
static size_t find(const struct known *k, const char *memory, const void *host, size_t bytes)
{
    for (unsigned i = 0; i < k->n && i < N_KNOWN; i++)
        if (k->bytes[i] == bytes && !memcmp(memory + k->at[i], host, bytes)) return k->at[i];
    return SIZE_MAX;
}

static void remember(struct known *k, size_t at, size_t bytes)
{
    unsigned i = k->n++ % N_KNOWN;
    k->at[i] = at;
    k->bytes[i] = bytes;
}

static const void *stage_captured(struct tb_cuda *c, const void *host, size_t bytes)
{
    struct tb_cuda_ring *r = c->ring;
    size_t at = find(&r->step_known, r->step, host, bytes);
    if (at != SIZE_MAX) return r->step_device + at;
    size_t room = tb_cuda_round_up(tb_cuda_steady(bytes));
    at = r->step_used;
    if (room > TB_CUDA_STEP - at) {
        tb_cuda_fail(c, "a decode step", "its arrays are too large");
        return NULL;
    }
    memcpy(r->step + at, host, bytes);
    r->step_used = at + room;
    remember(&r->step_known, at, bytes);
    return r->step_device + at;
}

const void *tb_cuda_stage(struct tb_cuda *c, const void *host, size_t bytes)
{
    struct tb_cuda_ring *r = c->ring;
    if (c->capturing) return stage_captured(c, host, bytes);
    if (!tb_cuda_ok(c, cudaSuccess, "staging")) return NULL;
    size_t at = find(&r->known, r->pinned, host, bytes);
    if (at != SIZE_MAX) return r->device + at;
    at = take(c, bytes);
    if (at == SIZE_MAX) return NULL;
    memcpy(r->pinned + at, host, bytes);
    cudaError_t e =
        cudaMemcpyAsync(r->device + at, r->pinned + at, bytes, cudaMemcpyHostToDevice, c->stream);
    if (!tb_cuda_ok(c, e, "staging")) return NULL;
    remember(&r->known, at, bytes);
    return r->device + at;
}

static void upload(struct tb_backend *be, void *dst, const void *host, size_t bytes)
{
    struct tb_cuda *c = tb_cuda(be);
    for (size_t done = 0, n; done < bytes && tb_cuda_ok(c, cudaSuccess, "upload"); done += n) {
        n = TB_MIN(UPLOAD_PIECE, bytes - done);
        size_t at = take(c, n);
        if (at == SIZE_MAX) return;
        memcpy(c->ring->pinned + at, (const char *)host + done, n);
        tb_cuda_ok(c,
                   cudaMemcpyAsync((char *)dst + done, c->ring->pinned + at, n,
                                   cudaMemcpyHostToDevice, c->stream),
                   "upload");
    }
}

bool tb_cuda_ring_capture(struct tb_cuda *c)
{
    c->ring->step_used = c->ring->step_known.n = 0;
    return tb_cuda_ok(c, cudaEventSynchronize(c->ring->step_read), "a decode step");
}

void tb_cuda_ring_send(struct tb_cuda *c)
{
    struct tb_cuda_ring *r = c->ring;
    if (r->step_used)
        tb_cuda_ok(c,
                   cudaMemcpyAsync(r->step_device, r->step, r->step_used, cudaMemcpyHostToDevice,
                                   c->stream),
                   "a decode step");
}

void tb_cuda_ring_sent(struct tb_cuda *c)
{
    tb_cuda_ok(c, cudaEventRecord(c->ring->step_read, c->stream), "a decode step");
}

/* ---- from the device */

/* Queues the copy of a piece and notes when it has come. */
static bool fetch_piece(struct tb_cuda *c, int slot, const char *device, size_t bytes)
{
    struct tb_cuda_ring *r = c->ring;
    return tb_cuda_ok(
               c, cudaMemcpyAsync(r->fetch[slot], device, bytes, cudaMemcpyDeviceToHost, c->stream),
               "download") &&
           tb_cuda_ok(c, cudaEventRecord(r->fetched[slot], c->stream), "download");
}

/* One piece crosses while the one before is copied on. */
void tb_cuda_fetch(struct tb_cuda *c, void *host, const void *device, size_t bytes)
{
    struct tb_cuda_ring *r = c->ring;
    size_t n = (bytes + FETCH_PIECE - 1) / FETCH_PIECE;
    bool ok = tb_cuda_ok(c, cudaSuccess, "download");
    for (size_t i = 0; i <= n && bytes && ok; i++) {
        size_t at = i * FETCH_PIECE, before = at - FETCH_PIECE;
        if (i < n)
            ok = fetch_piece(c, i % 2, (const char *)device + at, TB_MIN(FETCH_PIECE, bytes - at));
        if (i == 0 || !ok) continue;
        ok = tb_cuda_ok(c, cudaEventSynchronize(r->fetched[(i - 1) % 2]), "download");
        memcpy((char *)host + before, r->fetch[(i - 1) % 2], TB_MIN(FETCH_PIECE, bytes - before));
    }
    if (!ok && bytes) memset(host, 0, bytes);
}

static void download(struct tb_backend *be, void *host, const void *src, size_t bytes)
{
    tb_cuda_fetch(tb_cuda(be), host, src, bytes);
}

/* ---- on the device */

static void copy(struct tb_backend *be, void *dst, const void *src, size_t bytes)
{
    struct tb_cuda *c = tb_cuda(be);
    const size_t what[] = {(size_t)dst, (size_t)src, bytes};
    tb_cuda_note(c, what, sizeof(what));
    if (bytes && !c->comparing && tb_cuda_ok(c, cudaSuccess, "copy"))
        tb_cuda_ok(c, cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, c->stream),
                   "copy");
}

/* Copies from that device go straight where the machine can do so, else through the host. */
static void open_peer(struct tb_cuda *c, int peer)
{
    int can = 0;
    uint64_t bit = peer < 64 ? (uint64_t)1 << peer : 0;
    if (peer == c->device || c->peers & bit) return;
    c->peers |= bit;
    if (!cudaDeviceCanAccessPeer(&can, c->device, peer) && can)
        (void)cudaDeviceEnablePeerAccess(peer, 0);
    (void)cudaGetLastError(); /* it may be open already */
}

static int copy_from(struct tb_backend *be, void *dst, struct tb_backend *src_be, const void *src,
                     size_t bytes, struct tb_error *err)
{
    struct tb_cuda *c = tb_cuda(be), *from = tb_cuda(src_be);
    if (bytes && tb_cuda_ok(c, cudaSuccess, "copy")) {
        open_peer(c, from->device);
        cudaError_t e = cudaMemcpyPeerAsync(dst, c->device, src, from->device, bytes, c->stream);
        (void)cudaGetLastError();
        /* This device is well if its own work still is. */
        if (e && tb_cuda_ok(c, cudaStreamSynchronize(c->stream), "a copy from another device"))
            return tb_error_set(err, TB_EDEVICE, "CUDA device %d cannot copy from device %d: %s",
                                c->device, from->device, cudaGetErrorString(e));
    }
    return c->lost.code ? tb_error_set(err, c->lost.code, "%s", c->lost.msg) : 0;
}

static void zero(struct tb_backend *be, void *dst, size_t bytes)
{
    struct tb_cuda *c = tb_cuda(be);
    const size_t what[] = {(size_t)dst, bytes};
    tb_cuda_note(c, what, sizeof(what));
    if (bytes && !c->comparing && tb_cuda_ok(c, cudaSuccess, "zero"))
        tb_cuda_ok(c, cudaMemsetAsync(dst, 0, bytes, c->stream), "zero");
}

static int sync(struct tb_backend *be, struct tb_error *err)
{
    struct tb_cuda *c = tb_cuda(be);
    if (tb_cuda_ok(c, cudaSuccess, "sync"))
        tb_cuda_ok(c, cudaStreamSynchronize(c->stream), "the queued work");
    return c->lost.code ? tb_error_set(err, c->lost.code, "%s", c->lost.msg) : 0;
}

void tb_cuda_memory_ops(struct tb_backend_ops *o)
{
    o->alloc = tb_cuda_alloc;
    o->free = tb_cuda_free;
    o->upload = upload;
    o->download = download;
    o->copy = copy;
    o->copy_from = copy_from;
    o->zero = zero;
    o->sync = sync;
}
