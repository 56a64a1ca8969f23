/*
 * Times a backend's kernels on the shapes of Qwen3-0.6B and prints what they reach beside the
 * device's limits: memory bandwidth and the rate of the largest product. Medians, each call waited
 * for; nothing is asserted.
 *
 *     bench/kernels [--backend cpu|cuda] [--threads N] [--dtype bf16|f32] [--isa NAME]
 *                   [--rows 1,8,...] [--only limits]
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "backend/backend.h"

enum {
    HIDDEN = 1024,
    FFN = 3072,
    HEADS = 16,
    KV_HEADS = 8,
    HD = 128,
    VOCAB = 151936,
    LAYERS = 28,
    RANK = 32
};

static struct tb_backend *be;
static const struct tb_backend_ops *ops;
static size_t esz;
/* What the limits are measured with: enough that starting a call and waiting for it is nothing. */
static size_t limit_floats = (size_t)96 << 20;
static int limit_rows = 512;

static double now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
}

static int cmp(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Waits for the device. */
static void done(void)
{
    struct tb_error err = {0};
    if (ops->sync(be, &err)) {
        fprintf(stderr, "%s\n", err.msg);
        exit(1);
    }
}

/* Median seconds of a statement. */
#define TIME(out, stmt)                                                                            \
    do {                                                                                           \
        double t_[15], spent_ = 0;                                                                 \
        int n_ = 0;                                                                                \
        stmt;                                                                                      \
        done();                                                                                    \
        while (n_ < 3 || (n_ < 15 && spent_ < 0.5)) {                                              \
            double a_ = now();                                                                     \
            stmt;                                                                                  \
            done();                                                                                \
            t_[n_] = now() - a_;                                                                   \
            spent_ += t_[n_++];                                                                    \
        }                                                                                          \
        qsort(t_, (size_t)n_, sizeof(double), cmp);                                                \
        (out) = t_[n_ / 2];                                                                        \
    } while (0)

static void *checked(void *p, size_t bytes)
{
    if (!p) {
        fprintf(stderr, "no memory for %zu bytes\n", bytes);
        exit(1);
    }
    return p;
}

/* The device's memory, and how long each piece is. */
static struct piece {
    void *p;
    size_t bytes;
} pieces[256];
static int n_pieces;

static void *memory(size_t bytes)
{
    if (n_pieces == (int)(sizeof(pieces) / sizeof(pieces[0]))) exit(1);
    struct piece *m = &pieces[n_pieces++];
    *m = (struct piece){checked(ops->alloc(be, bytes), bytes), bytes};
    return m->p;
}

static void drop(void *p)
{
    for (int i = 0; i < n_pieces; i++) {
        if (pieces[i].p != p) continue;
        ops->free(be, p, pieces[i].bytes);
        pieces[i] = pieces[--n_pieces];
        return;
    }
}

static float *floats(size_t n)
{
    float *host = checked(malloc(n * 4 + 1), n * 4), *p = memory(n * 4);
    uint32_t s = 12345;
    for (size_t i = 0; i < n; i++) {
        s = s * 1664525u + 1013904223u;
        host[i] = (float)(int32_t)s * 0x1p-31f;
    }
    ops->upload(be, p, host, n * 4);
    free(host);
    return p;
}

static void *acts(size_t n)
{
    float *f = floats(n);
    void *p = memory(n * esz);
    ops->to_act(be, f, n, p);
    drop(f);
    return p;
}

struct matrix {
    const char *name;
    int n_out, n_in;
    struct tb_weight *w;
};
static struct matrix matrices[] = {
    {"qkv", (HEADS + 2 * KV_HEADS) * HD, HIDDEN, NULL},
    {"o", HIDDEN, HEADS *HD, NULL},
    {"gate,up", 2 * FFN, HIDDEN, NULL},
    {"down", HIDDEN, FFN, NULL},
    {"head", VOCAB, HIDDEN, NULL},
};
enum { N_MATRICES = 5, N_LAYER_MATRICES = 4 };
/* A layer's matrices do not fill a GPU: its limit is measured with this one. */
static struct matrix large = {"large", 8192, 8192, NULL};

static void make_weights(struct matrix *list, int count)
{
    for (int i = 0; i < count; i++) {
        struct matrix *m = list + i;
        size_t n = (size_t)m->n_out * (size_t)m->n_in;
        void *src = acts(n), *host = checked(malloc(n * esz), n * esz);
        ops->download(be, host, src, n * esz);
        const void *parts[1] = {host};
        enum tb_dtype dtypes[1] = {be->act};
        struct tb_error err = {0};
        double a = now();
        if (ops->weight_create(be, 1, parts, dtypes, &m->n_out, m->n_in, &m->w, &err) ||
            ops->weight_prepare_bwd(be, m->w, 1, parts, dtypes, &m->n_out, &err)) {
            fprintf(stderr, "%s\n", err.msg);
            exit(1);
        }
        done();
        a = now() - a;
        printf("pack %-8s both ways: %.2f GB/s of source\n", m->name, 2e-9 * (double)(n * esz) / a);
        drop(src);
        free(host);
    }
}

static void bandwidth(void)
{
    size_t n = limit_floats;
    float *x = floats(n);
    double t;
    volatile double sum = 0;
    TIME(t, sum = sum + ops->sum_squares(be, x, n));
    printf("memory bandwidth, reading: %.1f GB/s\n", 4e-9 * (double)n / t);
    drop(x);
}

/* The fastest of their products of many rows. */
static void product_rate(struct matrix *list, int count)
{
    size_t rows = (size_t)limit_rows;
    double best = 0;
    for (int i = 0; i < count; i++) {
        struct matrix *m = list + i;
        void *x = acts(rows * (size_t)m->n_in);
        float *y = floats(rows * (size_t)m->n_out);
        double t;
        TIME(t, ops->matmul(be, m->w, x, limit_rows, NULL, y, m->n_out, false));
        double rate = 2e-9 * limit_rows * (double)m->n_in * m->n_out / t;
        best = rate > best ? rate : best;
        drop(x);
        drop(y);
    }
    printf("fastest product of %d rows: %.1f GFLOP/s\n", limit_rows, best);
}

static void matmuls(int T)
{
    for (int i = 0; i < N_MATRICES; i++) {
        struct matrix *m = matrices + i;
        int rows = m->n_out == VOCAB && T > 256 ? 256 : T;
        void *x = acts((size_t)rows * (size_t)m->n_in), *dy = acts((size_t)rows * (size_t)m->n_out);
        float *y = floats((size_t)rows * (size_t)m->n_out),
              *dx = floats((size_t)rows * (size_t)m->n_in);
        double f, b, flops = 2e-9 * rows * (double)m->n_in * m->n_out;
        double bytes = 1e-9 * (double)m->n_in * m->n_out * (double)esz;
        TIME(f, ops->matmul(be, m->w, x, rows, NULL, y, m->n_out, false));
        TIME(b, ops->matmul_bwd(be, m->w, dy, rows, dx, m->n_in, false));
        printf("T %4d %-8s fwd %8.1f us %6.1f GFLOP/s %5.1f GB/s | bwd %8.1f us %6.1f GFLOP/s\n",
               rows, m->name, f * 1e6, flops / f, bytes / f, b * 1e6, flops / b);
        drop(x);
        drop(dy);
        drop(y);
        drop(dx);
    }
}

/* One module of each matrix: spans of 256 rows of one adapter, or a row of each of T adapters. */
static void loras(int T)
{
    double total[4] = {0};
    for (int i = 0; i < N_MATRICES; i++) {
        struct matrix *m = matrices + i;
        int rows = m->n_out == VOCAB && T > 256 ? 256 : T,
            len = T <= 32      ? 1
                  : rows < 256 ? rows
                               : 256,
            n = rows / len;
        void *x = acts((size_t)rows * (size_t)m->n_in), *dy = acts((size_t)rows * (size_t)m->n_out);
        float *y = floats((size_t)rows * (size_t)m->n_out),
              *dx = floats((size_t)rows * (size_t)m->n_in);
        void *u = acts((size_t)rows * RANK), *du = acts((size_t)rows * RANK);
        float *ga = floats((size_t)RANK * (size_t)m->n_in),
              *gb = floats((size_t)RANK * (size_t)m->n_out);
        struct tb_lora_span *s = calloc((size_t)n, sizeof(*s));
        struct tb_lora_mat *mats = calloc((size_t)n, sizeof(*mats));
        if (!s || !mats) exit(1);
        for (int k = 0; k < n; k++) {
            if (len == 1 || k == 0)
                mats[k] = (struct tb_lora_mat){acts((size_t)RANK * (size_t)m->n_in),
                                               acts((size_t)RANK * (size_t)m->n_out), RANK, 1};
            s[k] = (struct tb_lora_span){k * len, len, len == 1 ? mats + k : mats, ga, gb};
        }
        double t[4] = {0};
        const struct tb_lora_term term = {s, n, u, RANK, 0, m->n_out};
        TIME(t[0], ops->lora_down(be, &term, 1, x, m->n_in, m->n_in));
        TIME(t[1], ops->lora_up(be, s, n, u, RANK, y, m->n_out, m->n_out));
        if (T > 32) {
            TIME(t[2], ops->lora_up_bwd(be, s, n, dy, m->n_out, m->n_out, u, du, RANK));
            TIME(t[3], ops->lora_down_bwd(be, s, n, du, RANK, x, m->n_in, m->n_in, dx, m->n_in));
        }
        printf(
            "T %4d lora %-8s %d modules: down %8.1f us, up %8.1f us, up_bwd %8.1f us, down_bwd %8.1f us\n",
            rows, m->name, len == 1 ? n : 1, t[0] * 1e6, t[1] * 1e6, t[2] * 1e6, t[3] * 1e6);
        for (int k = 0; k < 4; k++)
            total[k] += t[k];
        for (int k = 0; k < n; k++) {
            drop((void *)(uintptr_t)mats[k].a);
            drop((void *)(uintptr_t)mats[k].b);
        }
        free(s);
        free(mats);
        drop(x);
        drop(dy);
        drop(y);
        drop(dx);
        drop(u);
        drop(du);
        drop(ga);
        drop(gb);
    }
}

/* T <= 32: T sequences decode one token at position 511. Else sequences of 256 (or T) rows, fwd and
 * bwd. */
static void attention(int T)
{
    struct tb_attn_shape s = {HEADS, KV_HEADS, HD, 0.088f, 0};
    size_t nq = (size_t)T * HEADS * HD, nk = (size_t)T * KV_HEADS * HD;
    void *q = acts(nq), *k = acts(nk), *v = acts(nk), *out = acts(nq);
    float *dout = floats(nq), *dq = floats(nq), *dk = floats(nk), *dv = floats(nk),
          *lse = floats((size_t)T * HEADS);
    struct tb_attn_seq seqs[64];
    double f, b;
    if (T <= 32) {
        enum { POS = 511, PAGES = 32 };
        size_t page = ops->kv_page_bytes(be, &s);
        char *pool = memory(page * PAGES * (size_t)T);
        ops->zero(be, pool, page * PAGES * (size_t)T);
        int32_t *pages = malloc(sizeof(int32_t) * PAGES * (size_t)T);
        if (!pages) exit(1);
        for (int i = 0; i < PAGES * T; i++)
            pages[i] = i;
        for (int i = 0; i < T; i++)
            seqs[i] = (struct tb_attn_seq){i, 1, POS, pages + (size_t)i * PAGES};
        TIME(f, ops->attention(be, &s, seqs, T, q, NULL, NULL, pool, out, NULL));
        TIME(b, ops->kv_write(be, &s, seqs, T, k, v, pool));
        printf("T %4d decode attention at 512: %8.1f us %5.1f GB/s; kv_write %6.1f us\n", T,
               f * 1e6, 1e-9 * (double)(page * PAGES) * T / f, b * 1e6);
        drop(pool);
        free(pages);
    } else {
        int len = T < 256 ? T : 256, n = T / len;
        double flops = 1e-9 * n * (double)len * (len + 1) / 2 * HEADS * HD * 4;
        for (int i = 0; i < n; i++)
            seqs[i] = (struct tb_attn_seq){.row = i * len, .n = len};
        TIME(f, ops->attention(be, &s, seqs, n, q, k, v, NULL, out, lse));
        TIME(b, ops->attention_bwd(be, &s, seqs, n, q, k, v, out, lse, dout, dq, dk, dv));
        printf("T %4d attention %d x %d: fwd %8.1f us %6.1f GFLOP/s | bwd %8.1f us %6.1f GFLOP/s\n",
               T, n, len, f * 1e6, flops / f, b * 1e6, 2.5 * flops / b);
    }
    drop(q);
    drop(k);
    drop(v);
    drop(out);
    drop(dout);
    drop(dq);
    drop(dk);
    drop(dv);
    drop(lse);
}

static void elementwise(int T)
{
    struct tb_attn_shape s = {HEADS, KV_HEADS, HD, 0.088f, 0};
    size_t t = (size_t)T, wide = t * (HEADS + 2 * KV_HEADS) * HD;
    float *x = floats(t * HIDDEN), *w = floats(HIDDEN), *rstd = floats(t),
          *gu = floats(t * 2 * FFN), *raw = floats(wide);
    float *cs = floats(4096 * HD / 2);
    void *y = acts(t * HIDDEN), *a = acts(t * FFN), *ga = acts(t * 2 * FFN), *qkv = acts(wide),
         *ra = acts(wide);
    int32_t *pos = calloc(t, sizeof(*pos));
    if (!pos) exit(1);
    double d[8];
    char *q = qkv;
    TIME(d[0], ops->rmsnorm(be, x, w, T, HIDDEN, 1e-6f, y, rstd));
    TIME(d[1], ops->rmsnorm_bwd(be, x, w, rstd, x, T, HIDDEN, x));
    TIME(d[2], ops->swiglu(be, gu, T, FFN, a, ga));
    TIME(d[3], ops->swiglu_bwd(be, ga, gu, T, FFN, ga));
    TIME(d[4], ops->qkv_post(be, &s, raw, T, pos, cs, cs, HD, w, w, 1e-6f, q,
                             q + t * HEADS * HD * esz, q + t * (HEADS + KV_HEADS) * HD * esz, ra));
    TIME(d[5], ops->qkv_post_bwd(be, &s, raw, raw, raw, T, pos, cs, cs, HD, w, w, 1e-6f, ra, qkv));
    TIME(d[6], ops->to_act(be, x, t * HIDDEN, y));
    TIME(d[7], ops->add(be, raw, x, t * HIDDEN));
    printf(
        "T %4d rmsnorm %.1f us, bwd %.1f us; swiglu %.1f us, bwd %.1f us; qkv_post %.1f us, bwd %.1f us; to_act %.1f "
        "us, add %.1f us\n",
        T, d[0] * 1e6, d[1] * 1e6, d[2] * 1e6, d[3] * 1e6, d[4] * 1e6, d[5] * 1e6, d[6] * 1e6,
        d[7] * 1e6);
    void *all[] = {x, w, rstd, gu, raw, cs, y, a, ga, qkv, ra};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
        drop(all[i]);
    free(pos);
}

static void head(int T)
{
    int rows = T > 256 ? 256 : T;
    float *z = floats((size_t)rows * VOCAB), lse[256], lp[256], g[256];
    void *dl = acts((size_t)rows * VOCAB);
    int32_t targets[256], tokens[256], ids[256 * 8];
    float lps[256 * 8];
    struct tb_draw plain[256], top_p[256], top_k[256];
    for (int i = 0; i < rows; i++) {
        targets[i] = i * 37;
        g[i] = 1;
        plain[i] = (struct tb_draw){1, -1, 1, 0.5f};
        top_p[i] = (struct tb_draw){1, -1, 0.9f, 0.5f};
        top_k[i] = (struct tb_draw){1, 50, 1, 0.5f};
    }
    double t[6];
    TIME(t[0], ops->logprobs(be, z, rows, VOCAB, VOCAB, targets, 1, lse, lp));
    TIME(t[1], ops->dlogits(be, z, rows, VOCAB, VOCAB, lse, targets, g, 1, dl));
    TIME(t[2], ops->draw(be, z, rows, VOCAB, VOCAB, plain, tokens));
    TIME(t[3], ops->draw(be, z, rows, VOCAB, VOCAB, top_p, tokens));
    TIME(t[4], ops->draw(be, z, rows, VOCAB, VOCAB, top_k, tokens));
    TIME(t[5], ops->topk(be, z, rows, VOCAB, VOCAB, lse, 8, ids, lps));
    printf(
        "T %4d head: logprobs %.1f us, dlogits %.1f us, draw %.1f us, top_p %.1f us, top_k %.1f us, topk 8 %.1f us\n",
        rows, t[0] * 1e6, t[1] * 1e6, t[2] * 1e6, t[3] * 1e6, t[4] * 1e6, t[5] * 1e6);
    drop(z);
    drop(dl);
}

/* Memory for the kernels themselves, in calls of T rows. */
static void *lend(int T, size_t *bytes)
{
    struct tb_pass_size size = {.attn = {.n_head = HEADS, .n_kv_head = KV_HEADS, .head_dim = HD},
                                .rows = T,
                                .rank = RANK,
                                .vocab = VOCAB};
    *bytes = ops->lend ? ops->lend(be, &size, NULL) : 0;
    void *mem = *bytes ? ops->alloc(be, *bytes) : NULL;
    if (mem) ops->lend(be, &size, mem);
    return mem;
}

int main(int argc, char **argv)
{
    struct tb_backend_options o = {0};
    struct tb_error err = {0};
    const char *backend = "cpu", *dtype = "auto", *rows = "1,8,32,512,2048";
    char line[128];
    bool only_limits = false;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--backend") == 0)
            backend = argv[i + 1];
        else if (strcmp(argv[i], "--threads") == 0)
            o.n_threads = (int)strtol(argv[i + 1], NULL, 10);
        else if (strcmp(argv[i], "--dtype") == 0)
            dtype = argv[i + 1];
        else if (strcmp(argv[i], "--isa") == 0)
            o.isa = argv[i + 1];
        else if (strcmp(argv[i], "--rows") == 0)
            rows = argv[i + 1];
        else if (strcmp(argv[i], "--only") == 0)
            only_limits = strcmp(argv[i + 1], "limits") == 0;
    }
    if (tb_backend_create(&be, backend, dtype, &o, &err)) {
        fprintf(stderr, "%s\n", err.msg);
        return 2;
    }
    ops = be->ops;
    esz = tb_dtype_size(be->act);
    bool gpu = strcmp(ops->name, "cpu") != 0;
    if (gpu) {
        limit_floats *= 4;
        limit_rows = 16384;
    }
    ops->describe(be, line, sizeof(line));
    printf("%s\n", line);
    bandwidth();
    if (gpu) make_weights(&large, 1);
    if (!gpu || !only_limits) make_weights(matrices, only_limits ? N_LAYER_MATRICES : N_MATRICES);
    product_rate(gpu ? &large : matrices, gpu ? 1 : N_LAYER_MATRICES);
    for (const char *r = only_limits ? "" : rows; *r;) {
        char *end;
        int T = (int)strtol(r, &end, 10);
        if (T <= 0 || end == r) break;
        size_t bytes;
        void *mem = lend(T, &bytes);
        matmuls(T);
        loras(T);
        attention(T);
        elementwise(T);
        head(T);
        if (mem) ops->free(be, mem, bytes);
        r = end + (*end == ',');
    }
    for (int i = 0; i < N_MATRICES; i++)
        ops->weight_free(be, matrices[i].w);
    ops->weight_free(be, large.w);
    ops->destroy(be);
    return 0;
}
