/*
 * The CPU backend's life: which instruction set serves, memory, the table of functions.
 *
 * Owner: see cpu.h. Thread: create and destroy on any one thread.
 */
#include "backend/cpu/cpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#if defined(__x86_64__)
#    include <cpuid.h>
#endif

#include "backend/cpu/team.h"

/* ---- memory */

void *tb_cpu_alloc(size_t bytes)
{
    void *p = NULL;
    size_t align = bytes >= ((size_t)4 << 20) ? (size_t)2 << 20 : 64;
    if (bytes > SIZE_MAX - align) return NULL;
    bytes = (bytes + 63) & ~(size_t)63;
    if (posix_memalign(&p, align, bytes ? bytes : 64) != 0) return NULL;
    if (align > 64) (void)madvise(p, bytes, MADV_HUGEPAGE); /* a hint: 4 KiB pages serve too */
    return p;
}

void tb_cpu_free(void *p)
{
    free(p);
}

void *tb_scratch_get(const struct tb_scratch *s, size_t bytes)
{
    if (bytes > s->bytes) {
        fprintf(stderr, "tinkerbell: a kernel needs %zu bytes, %zu were lent\n", bytes, s->bytes);
        abort();
    }
    return s->p;
}

static size_t slice(struct tb_scratch *s, size_t bytes, char *mem, size_t at)
{
    bytes = (bytes + 63) & ~(size_t)63;
    if (mem) *s = (struct tb_scratch){mem + at, bytes};
    return at + bytes;
}

static size_t cpu_lend(struct tb_backend *be, const struct tb_pass_size *size, void *mem)
{
    struct tb_cpu *c = tb_cpu(be);
    struct tb_needs n = {0};
    size_t at = 0;
    for (size_t i = 0; i < sizeof(c->needs) / sizeof(c->needs[0]); i++)
        if (c->needs[i]) c->needs[i](size, &n);
    for (int i = 0; i < TB_N_SHARED; i++)
        at = slice(&c->shared[i], n.shared[i], mem, at);
    for (int i = 0; i < be->n_threads; i++)
        at = slice(&c->own[i], n.own, mem, at);
    return at;
}

void *tb_cpu_take(struct tb_backend *be, size_t bytes)
{
    if (!tb_backend_charge(be, bytes)) return NULL;
    void *p = tb_cpu_alloc(bytes);
    if (!p) tb_backend_uncharge(be, bytes);
    return p;
}

void tb_cpu_give(struct tb_backend *be, void *p, size_t bytes)
{
    if (!p) return;
    tb_backend_uncharge(be, bytes);
    tb_cpu_free(p);
}

static void cpu_copy(struct tb_backend *be, void *dst, const void *src, size_t bytes)
{
    if (bytes) memmove(dst, src, bytes);
}

static int cpu_copy_from(struct tb_backend *be, void *dst, struct tb_backend *src_be,
                         const void *src, size_t bytes, struct tb_error *err)
{
    cpu_copy(be, dst, src, bytes);
    return 0;
}

static void cpu_zero(struct tb_backend *be, void *dst, size_t bytes)
{
    if (bytes) memset(dst, 0, bytes);
}

static int cpu_sync(struct tb_backend *be, struct tb_error *err)
{
    return 0;
}

void tb_cpu_memory_ops(struct tb_backend_ops *o)
{
    o->lend = cpu_lend;
    o->alloc = tb_cpu_take;
    o->free = tb_cpu_give;
    o->upload = cpu_copy;
    o->download = cpu_copy;
    o->copy = cpu_copy;
    o->copy_from = cpu_copy_from;
    o->zero = cpu_zero;
    o->sync = cpu_sync;
}

/* ---- instruction set */

static const char *const isa_names[] = {"plain", "avx2", "avx512", "avx512_bf16"};

#if defined(__x86_64__)
static bool
cpuid_avx512_bf16(void) /* leaf 7, subleaf 1, EAX bit 5; the OS part is checked by the caller */
{
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
}
#endif

static int isa_best(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && cpuid_avx512_bf16()) return TB_ISA_AVX512_BF16;
    if (avx512) return TB_ISA_AVX512;
    if (avx2) return TB_ISA_AVX2;
#endif
    return TB_ISA_PLAIN;
}

static int isa_parse(const char *name, enum tb_isa *out, struct tb_error *err)
{
    int best = isa_best();
    if (!name) {
        *out = (enum tb_isa)best;
        return 0;
    }
    for (int i = 0; i < 4; i++) {
        if (strcmp(name, isa_names[i]) != 0) continue;
        if (i > best) return tb_error_set(err, TB_EUNSUPPORTED, "this machine has no %s", name);
        *out = (enum tb_isa)i;
        return 0;
    }
    return tb_error_set(err, TB_EINVAL, "unknown instruction set '%s'", name);
}

bool tb_cpu_has_bf16(const char *isa)
{
    enum tb_isa got = TB_ISA_PLAIN;
    return isa_parse(isa, &got, NULL) == 0 && got == TB_ISA_AVX512_BF16;
}

/* A layer's activations of so many rows stay in the last-level cache, and the weights are read
 * often enough for the products to hide it. */
static const struct tb_backend_sizes sizes = {.train_rows = 512,
                                              .prefill_rows = 256,
                                              .activation_bytes = (size_t)1 << 30,
                                              .activation_part = 8,
                                              .logits_bytes = (size_t)64 << 20,
                                              .kv_bytes = (size_t)2 << 30};

/* ---- life */

static void cpu_destroy(struct tb_backend *be)
{
    struct tb_cpu *c = tb_cpu(be);
    if (!c) return;
    tb_team_destroy(c->team);
    free(c->own);
    free(c);
}

static void cpu_describe(struct tb_backend *be, char *out, size_t n)
{
    struct tb_cpu *c = tb_cpu(be);
    snprintf(out, n, "cpu %s, %s, %d thread%s", isa_names[c->isa],
             be->act == TB_BF16 ? "bf16" : "f32", be->n_threads, be->n_threads == 1 ? "" : "s");
}

#if defined(__x86_64__)
#    define FILL(c, o, target)                                                                     \
        do {                                                                                       \
            tb_k_product_ops_##target(o);                                                          \
            tb_k_lora_ops_##target(o);                                                             \
            tb_k_elem_ops_##target(o);                                                             \
            tb_k_attn_ops_##target(o);                                                             \
            tb_k_attn_bwd_ops_##target(o);                                                         \
            tb_k_head_ops_##target(o);                                                             \
            tb_k_draw_ops_##target(o);                                                             \
            (c)->needs[0] = tb_k_lora_needs_##target;                                              \
            (c)->needs[1] = tb_k_attn_needs_##target;                                              \
            (c)->needs[2] = tb_k_attn_bwd_needs_##target;                                          \
            (c)->needs[3] = tb_k_draw_needs_##target;                                              \
            (c)->needs[4] = tb_k_product_needs_##target;                                           \
        } while (0)
#endif

static void fill_ops(struct tb_cpu *c)
{
    struct tb_backend_ops *o = &c->ops;
    o->name = "cpu";
    o->destroy = cpu_destroy;
    o->describe = cpu_describe;
    tb_cpu_memory_ops(o);
    tb_plain_product_ops(o);
    tb_plain_elem_ops(o);
    tb_plain_attn_ops(o);
    tb_plain_head_ops(o);
#if defined(__x86_64__)
    if (c->isa == TB_ISA_AVX2)
        FILL(c, o, avx2);
    else if (c->isa != TB_ISA_PLAIN && c->be.act == TB_F32)
        FILL(c, o, avx512);
    else if (c->isa == TB_ISA_AVX512_BF16)
        FILL(c, o, bf16);
#endif
    c->be.ops = o;
}

int tb_backend_cpu_create(struct tb_backend **out, const struct tb_backend_options *options,
                          struct tb_error *err)
{
    enum tb_isa isa = TB_ISA_PLAIN;
    int rc = isa_parse(options ? options->isa : NULL, &isa, err);
    *out = NULL;
    if (rc) return rc;
    enum tb_dtype act = options ? options->act : TB_F32;
    if (act != TB_F32 && act != TB_BF16)
        return tb_error_set(err, TB_EINVAL, "activations are bf16 or f32");
    if (act == TB_BF16 && isa != TB_ISA_AVX512_BF16 && isa != TB_ISA_PLAIN)
        return tb_error_set(err, TB_EUNSUPPORTED,
                            "bf16 needs a CPU with AVX-512 BF16; use --dtype f32");
    struct tb_cpu *c = calloc(1, sizeof(*c));
    if (!c) return tb_error_set(err, TB_ENOMEM, "no memory for the CPU backend");
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    c->isa = isa;
    c->be.kind = isa_names[isa];
    c->be.act = act;
    c->be.sizes = sizes;
    c->be.n_threads = options && options->n_threads > 0 ? options->n_threads : (int)cores;
    if (c->be.n_threads < 1) c->be.n_threads = 1;
    c->be.mem_limit = options ? options->mem_limit : 0;
    if (c->be.n_threads > 256) c->be.n_threads = 256;
    c->own = calloc((size_t)c->be.n_threads, sizeof(*c->own));
    c->team = c->own ? tb_team_create(c->be.n_threads) : NULL;
    if (!c->team) {
        cpu_destroy(&c->be);
        return tb_error_set(err, TB_ENOMEM, "cannot start %d threads for the CPU backend",
                            options ? options->n_threads : 0);
    }
    fill_ops(c);
    *out = &c->be;
    return 0;
}
