/*
 * The emulation's blocks: fibers that take turns, barriers, exchanges between the lanes of a warp;
 * see emu.h.
 *
 * Owner: each OS thread that launches has its own fibers, made at their first use and freed when
 * the thread ends. Thread: the caller's.
 */
#include "cuda_runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#    define EMU_ASAN 1
#elif defined(__has_feature)
#    if __has_feature(address_sanitizer)
#        define EMU_ASAN 1
#    endif
#endif
#ifdef EMU_ASAN
#    include <sanitizer/asan_interface.h>
#    include <sanitizer/common_interface_defs.h>
#else
#    define ASAN_POISON_MEMORY_REGION(p, n)   ((void)(p), (void)(n))
#    define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#    define __sanitizer_start_switch_fiber(save, bottom, size)
#    define __sanitizer_finish_switch_fiber(save, bottom, size)
#endif

/* ---- switching stacks */
#if defined(__x86_64__)
typedef void *context;
extern "C" void emu_switch(context *save, context *to);
asm(".text\n"
    ".p2align 4\n"
    ".globl emu_switch\n"
    ".hidden emu_switch\n"
    ".type emu_switch, @function\n"
    "emu_switch:\n"
    "  push %rbp\n  push %rbx\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"
    "  mov %rsp, (%rdi)\n"
    "  mov (%rsi), %rsp\n"
    "  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbx\n  pop %rbp\n"
    "  ret\n"
    ".size emu_switch, . - emu_switch\n");
static void make_context(context *c, char *stack, size_t size, void (*entry)(void))
{
    void **top = (void **)(stack + size);
    *--top = NULL; /* entry's return address: a stack is 16-byte aligned before a call */
    *--top = (void *)entry;
    top -= 6; /* the saved registers */
    memset(top, 0, 6 * sizeof(*top));
    *c = top;
}
#else
#    include <ucontext.h>
typedef ucontext_t context;
static void emu_switch(context *save, context *to)
{
    swapcontext(save, to);
}
static void make_context(context *c, char *stack, size_t size, void (*entry)(void))
{
    getcontext(c);
    c->uc_stack.ss_sp = stack;
    c->uc_stack.ss_size = size;
    c->uc_link = NULL;
    makecontext(c, entry, 0);
}
#endif

#define STACK      ((size_t)256 << 10)
#define MAX_BLOCK  1024
#define GUARD      64
#define GUARD_BYTE 0xa5

enum wait { READY, AT_WARP, AT_BLOCK, ENDED };

struct copy16 {
    void *to;
    const void *from; /* NULL: zeros */
};
struct fiber {
    context at;
    char *stack;
    void *fake; /* AddressSanitizer's */
    emu_indices where;
    enum wait wait;
    emu_place stopped;
    unsigned exchanges;          /* of its warp, so far */
    std::vector<copy16> copies;  /* not waited for */
    std::vector<size_t> commits; /* ends of groups in it */
};

struct engine {
    fiber *fibers = NULL; /* MAX_BLOCK, stacks beside */
    char *stacks = NULL;
    context home;
    const void *home_bottom = NULL;
    size_t home_size = 0;
    fiber *now = NULL;
    bool from_home = false; /* it was switched to from there */
    /* The warp that runs: its lanes take turns until each has stopped once. */
    fiber *lanes = NULL;
    int n_lanes = 0, turn = 0;
    bool reverse = false;
    const std::function<void()> *body = NULL;
    emu_place kernel = {};
    int n_threads = 0;
    unsigned char *shared = NULL;
    alignas(32) unsigned char exchange[MAX_BLOCK / 32][2][32][32];
    engine();
    ~engine();
};

__thread emu_indices *emu_at;
static __thread engine *eng;
static long n_launches;

static void report(const char *what)
{
    fprintf(stderr, "emulation: %s\n", what);
    if (eng && eng->kernel.what)
        fprintf(stderr, "  kernel %s, launched at %s:%d, %d threads a block\n", eng->kernel.what,
                eng->kernel.file, eng->kernel.line, eng->n_threads);
}
static void report_thread(const fiber *f, const char *word)
{
    fprintf(stderr, "  %s thread (%u,%u,%u) of block (%u,%u,%u): ", word, f->where.thread.x,
            f->where.thread.y, f->where.thread.z, f->where.block.x, f->where.block.y,
            f->where.block.z);
    if (f->wait == ENDED)
        fprintf(stderr, "has returned\n");
    else
        fprintf(stderr, "%s at %s:%d\n", f->stopped.what, f->stopped.file, f->stopped.line);
}

void emu_abort(const char *what, const char *file, int line)
{
    report(what);
    fprintf(stderr, "  at %s:%d\n", file, line);
    if (eng && eng->now) {
        eng->now->stopped = {what, file, line};
        report_thread(eng->now, "the");
    }
    abort();
}

/* ---- fibers */
static void arrive(void *fake)
{
    (void)fake;
    __sanitizer_finish_switch_fiber(fake, eng->from_home ? &eng->home_bottom : NULL,
                                    eng->from_home ? &eng->home_size : NULL);
    eng->from_home = false;
}
/* Makes a lane the one that runs. */
static fiber *take_turn(int turn)
{
    fiber *f = &eng->lanes[eng->reverse ? eng->n_lanes - 1 - turn : turn];
    eng->turn = turn;
    eng->now = f;
    emu_at = &f->where;
    f->wait = READY;
    return f;
}
/* From a lane that has stopped to the next one, or home. */
static void pass_on(fiber *f)
{
    if (eng->turn + 1 < eng->n_lanes) {
        fiber *next = take_turn(eng->turn + 1);
        __sanitizer_start_switch_fiber(&f->fake, next->stack, STACK);
        emu_switch(&f->at, &next->at);
    } else {
        __sanitizer_start_switch_fiber(&f->fake, eng->home_bottom, eng->home_size);
        emu_switch(&f->at, &eng->home);
    }
    arrive(f->fake);
}
/* Each lane runs until it stops. */
static void run_lanes(void)
{
    void *fake = NULL;
    (void)fake;
    fiber *f = take_turn(0);
    eng->from_home = true;
    __sanitizer_start_switch_fiber(&fake, f->stack, STACK);
    emu_switch(&eng->home, &f->at);
    __sanitizer_finish_switch_fiber(fake, NULL, NULL);
    eng->now = NULL;
}
static void fiber_main(void)
{
    arrive(NULL);
    for (;;) {
        fiber *f = eng->now;
        (*eng->body)();
        f->wait = ENDED;
        pass_on(f);
    }
}

engine::engine()
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    fibers = new fiber[MAX_BLOCK];
    stacks = (char *)mmap(NULL, MAX_BLOCK * STACK, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) emu_abort("no memory for stacks", __FILE__, __LINE__);
    for (int i = 0; i < MAX_BLOCK; i++) {
        fibers[i].stack = stacks + (size_t)i * STACK;
        fibers[i].fake = NULL;
        mprotect(fibers[i].stack, page, PROT_NONE); /* an overflow crashes */
        /* Tops of different places in a page: stacks a power of two apart would share cache lines'
         * sets. */
        make_context(&fibers[i].at, fibers[i].stack, STACK - (size_t)(i % 61) * 320, fiber_main);
    }
}
engine::~engine()
{
    delete[] fibers;
    munmap(stacks, MAX_BLOCK * STACK);
}

static void stop_at(enum wait wait, const char *what, const char *file, int line)
{
    fiber *f = eng->now;
    f->wait = wait;
    f->stopped = {what, file, line};
    pass_on(f);
}
void emu_sync_block(const char *file, int line)
{
    stop_at(AT_BLOCK, "__syncthreads", file, line);
}
void emu_sync_warp(const char *what, const char *file, int line)
{
    stop_at(AT_WARP, what, file, line);
}

static bool same_text(const char *a, const char *b)
{
    return a == b || strcmp(a, b) == 0;
}
static bool same_place(const fiber *a, const fiber *b)
{
    if (a->wait != b->wait) return false;
    return a->wait == ENDED ||
           (a->stopped.line == b->stopped.line && same_text(a->stopped.file, b->stopped.file) &&
            same_text(a->stopped.what, b->stopped.what));
}
static void must_meet(const fiber *a, const fiber *b, const char *who)
{
    if (same_place(a, b)) return;
    report(who);
    report_thread(a, "one");
    report_thread(b, "another");
    abort();
}

/* Until its lanes have all ended or wait for the block. */
static void run_warp(fiber *lanes, int n, bool reverse)
{
    eng->lanes = lanes;
    eng->n_lanes = n;
    eng->reverse = reverse;
    do {
        run_lanes();
        for (int i = 1; i < n; i++)
            must_meet(&lanes[0], &lanes[i], "lanes of a warp do not meet");
    } while (lanes[0].wait == AT_WARP);
}

static void run_block(engine *e, dim3 grid, dim3 block, uint3 at, bool reverse)
{
    int n = e->n_threads, n_warps = (n + 31) / 32;
    for (int i = 0; i < n; i++) {
        fiber *f = &e->fibers[i];
        unsigned u = (unsigned)i;
        f->where = {{u % block.x, u / block.x % block.y, u / block.x / block.y}, at, block, grid};
        f->wait = READY;
        f->exchanges = 0;
        f->copies.clear();
        f->commits.clear();
    }
    do {
        for (int w = 0; w < n_warps; w++) {
            int first = 32 * (reverse ? n_warps - 1 - w : w);
            run_warp(&e->fibers[first], n - first < 32 ? n - first : 32, reverse);
        }
        for (int i = 32; i < n; i += 32)
            must_meet(&e->fibers[0], &e->fibers[i], "warps of a block do not meet");
    } while (e->fibers[0].wait != ENDED);
}

void emu_grid(const emu_place &at, dim3 grid, dim3 block, size_t shared,
              const std::function<void()> &thread)
{
    static thread_local engine mine;
    eng = &mine;
    eng->kernel = at;
    eng->body = &thread;
    eng->n_threads = (int)(block.x * block.y * block.z);
    void *p = NULL;
    if (posix_memalign(&p, 128, shared + GUARD)) emu_abort("no memory", at.file, at.line);
    eng->shared = (unsigned char *)p;
    memset(eng->shared + shared, GUARD_BYTE, GUARD);
    bool reverse = n_launches++ % 2 == 1;
    size_t n = (size_t)grid.x * grid.y * grid.z;
    for (size_t i = 0; i < n; i++) {
        size_t b = reverse ? n - 1 - i : i;
        uint3 where = {(unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y),
                       (unsigned)(b / grid.x / grid.y)};
        memset(eng->shared, 0xff, shared); /* NaNs */
        ASAN_POISON_MEMORY_REGION(eng->shared + shared, GUARD);
        run_block(eng, grid, block, where, reverse);
        ASAN_UNPOISON_MEMORY_REGION(eng->shared + shared, GUARD);
        for (int g = 0; g < GUARD; g++)
            if (eng->shared[shared + (size_t)g] != GUARD_BYTE)
                emu_abort("a write behind dynamic shared memory", at.file, at.line);
    }
    free(p);
    eng->shared = NULL;
    eng->kernel = {};
}

void *emu_dynamic_shared(void)
{
    return eng->shared;
}
long emu_launches(void)
{
    return n_launches;
}

/* ---- warps. Two sets of slots in turn: a lane comes to a slot's next use only after all have met
 * once more, so all have read it. */
const unsigned char *emu_exchange(const char *what, unsigned mask, const void *mine, size_t bytes,
                                  const char *file, int line)
{
    fiber *f = eng->now;
    int i = (int)(f - eng->fibers);
    if (mask != 0xffffffffu) emu_abort("a warp function with a part of the mask", file, line);
    if (i / 32 * 32 + 32 > eng->n_threads)
        emu_abort("a warp function in a warp that is not full", file, line);
    unsigned char(*slots)[32] = eng->exchange[i / 32][f->exchanges++ % 2];
    if (bytes == 4)
        memcpy(slots[i % 32], mine, 4); /* an instruction */
    else
        memcpy(slots[i % 32], mine, bytes);
    stop_at(AT_WARP, what, file, line);
    return slots[0];
}

void emu_mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2], const char *file, int line)
{
    uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const unsigned char *all = emu_exchange("mma", 0xffffffffu, mine, sizeof(mine), file, line);
    int g = emu_lane() / 4, t = emu_lane() % 4;
    float x[2][16], y[2][16]; /* two rows of a, two columns of b */
    for (int k = 0; k < 16; k++) {
        for (int i = 0; i < 2; i++) {
            const uint32_t *row = (const uint32_t *)(all + 32 * (g * 4 + k % 8 / 2));
            const uint32_t *col = (const uint32_t *)(all + 32 * ((2 * t + i) * 4 + k % 8 / 2));
            int shift = k % 2 * 16;
            x[i][k] = __bfloat162float({(unsigned short)(row[i + k / 8 * 2] >> shift)});
            y[i][k] = __bfloat162float({(unsigned short)(col[4 + k / 8] >> shift)});
        }
    }
    for (int i = 0; i < 4; i++) {
        double sum = 0;
        for (int k = 0; k < 16; k++)
            sum += (double)x[i / 2][k] * (double)y[i % 2][k];
        d[i] = (float)((double)d[i] + sum);
    }
}

void emu_ldmatrix(uint32_t *r, const void *row, int n, bool trans, const char *file, int line)
{
    if ((uintptr_t)row % 16) emu_abort("ldmatrix of an address that is not aligned", file, line);
    const unsigned char *all = emu_exchange("ldmatrix", 0xffffffffu, row, 16, file, line);
    struct bits {
        uint16_t x[8];
    };
    int i = emu_lane() / 4, j = emu_lane() % 4 * 2;
    for (int m = 0; m < n; m++) {
        uint16_t lo = emu_from<bits>(all, m * 8 + (trans ? j : i)).x[trans ? i : j];
        uint16_t hi = emu_from<bits>(all, m * 8 + (trans ? j + 1 : i)).x[trans ? i : j + 1];
        r[m] = (uint32_t)lo | (uint32_t)hi << 16;
    }
}

void emu_copy16(void *shared, const void *global, bool zero, const char *file, int line)
{
    if ((uintptr_t)shared % 16 || (!zero && (uintptr_t)global % 16))
        emu_abort("a copy of 16 bytes that is not aligned", file, line);
    eng->now->copies.push_back({shared, zero ? NULL : global});
}
void emu_copy_commit(void)
{
    eng->now->commits.push_back(eng->now->copies.size());
}
void emu_copy_wait(int open)
{
    fiber *f = eng->now;
    size_t done = f->commits.size() > (size_t)open ? f->commits.size() - (size_t)open : 0;
    if (!done) return;
    size_t end = f->commits[done - 1];
    for (size_t i = 0; i < end; i++)
        if (f->copies[i].from)
            memcpy(f->copies[i].to, f->copies[i].from, 16);
        else
            memset(f->copies[i].to, 0, 16);
    f->copies.erase(f->copies.begin(), f->copies.begin() + (long)end);
    f->commits.erase(f->commits.begin(), f->commits.begin() + (long)done);
    for (size_t &c : f->commits)
        c -= end;
}
