/*
 * Weights and products, fast: a weight is packed in panels of NW outputs, panel[k][NW] words, for
 * the forward product, and the same with the roles of n_in and n_out exchanged for the backward
 * product.
 *
 * A sum over K runs in blocks (K_BLOCK), each from zero, and the block sums are added in order to
 * what y starts from. Nothing in it depends on the number of rows, so a row's bits do not either.
 *
 * Owner: the weight owns its two packings. Thread: see backend.h; packing and products use the
 * team.
 */
#include <stdlib.h>

#include "backend/cpu/gemm.h"
#include "backend/cpu/pack.h"

#define FEW_ROWS 32 /* up to here a weight from memory is what takes the time */
/* Activations of one block of a sum: 128 KiB of a bf16 panel stay in the second-level cache. */
#define K_BLOCK 1024

/* ---- packing */

struct pack {
    const struct tb_weight *w;
    const void *const *parts;
    const enum tb_dtype *dtypes;
    const int *rows;
    int n_parts;
    act_t *even; /* forward: NW rows of the source in whole words, for each thread */
    uint32_t *dst;
};

/* n elements from column c of row r of the stacked source, as activations. */
static void source_row(const struct pack *p, int r, int c, int n, act_t *dst)
{
    int part = 0;
    while (r >= p->rows[part])
        r -= p->rows[part++];
    size_t at = (size_t)r * (size_t)p->w->n_in + (size_t)c;
    if (p->dtypes[part] == ACT) {
        memcpy(dst, (const act_t *)p->parts[part] + at, (size_t)n * sizeof(act_t));
        return;
    }
    for (int i = 0; i < n; i++)
        tb_store(ACT, dst, (size_t)i, tb_load(p->dtypes[part], p->parts[part], at + (size_t)i));
}

/* One panel of the forward packing: NW rows of the source, transposed word by word. */
static void pack_fwd_task(void *arg, int task, int thread)
{
    const struct pack *p = arg;
    int n_in = p->w->n_in, kw = words(n_in), first = task * NW;
    size_t ld = (size_t)kw * KP;
    act_t *rows = p->even + (size_t)thread * ld * NW;
    int n = imin(NW, p->w->n_out - first);
    for (int r = 0; r < n; r++) {
        rows[(size_t)r * ld + ld - 1] = 0;
        source_row(p, first + r, 0, n_in, rows + (size_t)r * ld);
    }
    uint32_t *dst = p->dst + (size_t)task * (size_t)kw * NW;
    for (int k = 0; k < kw; k += VW) {
        uint32_t tile[VW * VW];
        int kn = imin(VW, kw - k);
        for (int r = 0; r < NW; r += VW) {
            tile_transpose((const tb_word *)(const void *)(rows + (size_t)r * ld) + k, (size_t)kw,
                           imax(0, imin(VW, n - r)), kn, tile, VW);
            for (int i = 0; i < kn; i++)
                memcpy(dst + (size_t)(k + i) * NW + r, tile + i * VW, VW * 4);
        }
    }
}

/* One panel of the backward packing: NW columns of the source, in pairs of rows. */
static void pack_bwd_task(void *arg, int task, int thread)
{
    const struct pack *p = arg;
    int n_out = p->w->n_out, kw = words(n_out), first = task * NW, n = imin(NW, p->w->n_in - first);
    uint32_t *dst = p->dst + (size_t)task * (size_t)kw * NW;
    for (int k = 0; k < kw; k++) {
        act_t lo[NW] = {0}, hi[NW] = {0};
        source_row(p, k * KP, first, n, lo);
        if (KP == 2 && k * KP + 1 < n_out) source_row(p, k * KP + 1, first, n, hi);
        for (int j = 0; j < NW; j += VW)
            vw_pair(dst + (size_t)k * NW + j, lo + j, hi + j, VW);
    }
}

/* Packs one direction; *bytes is set. NULL when there is no memory. */
static void *pack(struct tb_cpu *cpu, const struct tb_weight *w, bool bwd, int n_parts,
                  const void *const *parts, const enum tb_dtype *dtypes, const int *rows,
                  size_t *bytes)
{
    int outs = bwd ? w->n_in : w->n_out, kw = words(bwd ? w->n_out : w->n_in);
    int panels = (outs + NW - 1) / NW;
    *bytes = (size_t)panels * (size_t)kw * NW * 4;
    size_t even_bytes = bwd ? 0 : (size_t)cpu->be.n_threads * (size_t)kw * NW * 4;
    struct pack p = {w, parts, dtypes, rows, n_parts, .dst = tb_cpu_take(&cpu->be, *bytes)};
    if (!p.dst) return NULL;
    p.even = tb_cpu_take(&cpu->be, even_bytes);
    if (!p.even) {
        tb_cpu_give(&cpu->be, p.dst, *bytes);
        return NULL;
    }
    tb_team_run(cpu->team, bwd ? pack_bwd_task : pack_fwd_task, &p, panels);
    tb_cpu_give(&cpu->be, p.even, even_bytes);
    return p.dst;
}

static int weight_create(struct tb_backend *be, int n_parts, const void *const *parts,
                         const enum tb_dtype *dtypes, const int *rows, int n_in,
                         struct tb_weight **out, struct tb_error *err)
{
    *out = NULL;
    struct tb_weight *w = calloc(1, sizeof(*w));
    if (!w) return tb_error_set(err, TB_ENOMEM, "no memory for a weight");
    w->n_in = n_in;
    for (int i = 0; i < n_parts; i++)
        w->n_out += rows[i];
    w->fwd = pack(tb_cpu(be), w, false, n_parts, parts, dtypes, rows, &w->fwd_bytes);
    if (!w->fwd) {
        size_t bytes = w->fwd_bytes;
        free(w);
        return tb_error_set(err, TB_ENOMEM, "no memory for a weight of %zu bytes", bytes);
    }
    *out = w;
    return 0;
}

static void weight_free(struct tb_backend *be, struct tb_weight *w)
{
    if (!w) return;
    tb_cpu_give(be, w->fwd, w->fwd_bytes);
    tb_cpu_give(be, w->bwd, w->bwd_bytes);
    free(w);
}

static size_t weight_bytes(const struct tb_weight *w)
{
    return w->fwd_bytes + w->bwd_bytes;
}

static int weight_prepare_bwd(struct tb_backend *be, struct tb_weight *w, int n_parts,
                              const void *const *parts, const enum tb_dtype *dtypes,
                              const int *rows, struct tb_error *err)
{
    if (w->bwd) return 0;
    size_t bytes;
    w->bwd = pack(tb_cpu(be), w, true, n_parts, parts, dtypes, rows, &bytes);
    if (!w->bwd)
        return tb_error_set(err, TB_ENOMEM,
                            "no memory for a weight's backward packing of %zu bytes", bytes);
    w->bwd_bytes = bytes;
    return 0;
}

/* ---- products */

struct product {
    const uint32_t *panels;
    const act_t *x;
    size_t ldx;
    int T, n_k, n_out;  /* rows, inner size, outputs */
    int rows, n_panels; /* rows of a task, panels of the weight */
    int panels_each, panel_tasks;
    const float *bias;
    float *y;
    size_t ldy;
    bool accumulate;
    const struct tb_lora_term *terms;
    int n_terms;
    struct tb_cpu *cpu;
};

/* y[0, cols) += scale * u B^T of one row; B's rows have kw words, of which KW = VW, or all of them,
 * are taken at a time. Whole vectors of columns. */
INLINE void row_term(const int KW, const tb_word *u, const tb_word *b, int kw, int cols,
                     float scale, float *y)
{
    for (int c = 0; c < cols; c += VW, b += (size_t)VW * (size_t)kw) {
        vf acc = vf_zero();
        for (int k = 0; k < kw; k += KW) {
            vw w[VW], t[VW];
            UNROLL for (int i = 0; i < KW; i++) w[i] = vw_load(
                (const uint32_t *)(const void *)(b + k + (size_t)i * (size_t)(KW == VW ? kw : VW)));
            /* Halving steps: in the end w[i] has word i with its bits reversed of all columns. */
            UNROLL for (int half = KW / 2; half >= 1; half /= 2)
            {
                UNROLL for (int i = 0; i < KW; i++) t[i] = w[i];
                UNROLL for (int i = 0; i < KW / 2; i++)
                {
                    int at = i / half * 2 * half, j = i % half;
                    w[at + j] = vw_unzip(t[at + 2 * j], t[at + 2 * j + 1], 0);
                    w[at + half + j] = vw_unzip(t[at + 2 * j], t[at + 2 * j + 1], 1);
                }
            }
            UNROLL for (int i = 0; i < KW; i++)
            {
                int at = 0;
                UNROLL for (int bit = 1; bit < KW; bit *= 2) at = at * 2 + (i & bit ? 1 : 0);
                acc = vdot(acc, vw_set1(u + k + i), w[at]);
            }
        }
        vf_store(y + c, vf_add(vf_load(y + c), vf_mul(acc, vf_set1(scale))));
    }
}

/* Adds a term's part in one row without packing B, with the bits of the product kernel. false: the
 * rank or the columns do not suit. */
static bool add_row_term(const struct tb_lora_mat *mat, const act_t *u, const act_t *b, int cols,
                         float *y)
{
    int kw = words(mat->rank);
    const tb_word *uw = (const tb_word *)(const void *)u, *bw = (const tb_word *)(const void *)b;
    if (mat->rank % KP || cols % VW) return false;
    if (kw % VW == 0)
        row_term(VW, uw, bw, kw, cols, mat->scale, y);
    else if (kw == 1)
        row_term(1, uw, bw, kw, cols, mat->scale, y);
    else if (kw == 2)
        row_term(2, uw, bw, kw, cols, mat->scale, y);
    else if (kw == 4)
        row_term(4, uw, bw, kw, cols, mat->scale, y);
#if VW == 16
    else if (kw == 8)
        row_term(8, uw, bw, kw, cols, mat->scale, y);
#endif
    else
        return false;
    return true;
}

/* Adds one term to columns [c0, c1) of rows [row, row + n): lora_up's arithmetic, while y is in
 * cache. */
static void add_term(const struct product *p, const struct tb_lora_term *t, int row, int n, int c0,
                     int c1, int thread)
{
    const struct tb_lora_mat *packed = NULL;
    int lo = 0, hi = t->n_spans, end = row + n;
    while (lo < hi) { /* the first span that ends behind row */
        int mid = (lo + hi) / 2;
        if (t->spans[mid].row + t->spans[mid].n > row)
            hi = mid;
        else
            lo = mid + 1;
    }
    for (; lo < t->n_spans && t->spans[lo].row < end; lo++) {
        const struct tb_lora_span *s = t->spans + lo;
        int first = imax(row, s->row), last = imin(end, s->row + s->n);
        while (lo + 1 < t->n_spans && t->spans[lo + 1].mat == s->mat &&
               t->spans[lo + 1].row == last && last < end)
            last = imin(end, last + t->spans[++lo].n);
        if (first >= last) continue;
        int rank = s->mat->rank, kw = words(rank);
        const act_t *b0 = (const act_t *)s->mat->b + (size_t)(c0 - t->col) * (size_t)rank;
        if (last - first == 1 &&
            add_row_term(s->mat, (const act_t *)t->u + (size_t)first * (size_t)t->ldu, b0, c1 - c0,
                         p->y + (size_t)first * p->ldy + (size_t)c0))
            continue;
        char *mem = tb_scratch_get(&p->cpu->own[thread], rank_bytes(rank));
        uint32_t *b = (uint32_t *)(void *)mem;
        act_t *tmp = (act_t *)(void *)(mem + rank_panel_bytes(rank));
        if (packed != s->mat) pack_rows(b0, (size_t)rank, c1 - c0, rank, b, NW, tmp);
        packed = s->mat;
        const uint32_t *page = b;
        struct mk m = {.b = &page,
                       .ldb = NW,
                       .kw = kw,
                       .kw_page = kw,
                       .ldc = p->ldy,
                       .init = MK_ADD,
                       .scale = s->mat->scale};
        m.a = even(t->u, (size_t)t->ldu, first, last - first, rank, tmp + (size_t)kw * KP * NW,
                   &m.lda);
        m.c = p->y + (size_t)first * p->ldy + (size_t)c0;
        run_edge(&m, last - first, c1 - c0);
    }
}

/* The terms' parts in a panel of rows [row, row + n). */
static void add_terms(const struct product *p, int row, int n, int panel, int thread)
{
    int col = panel * NW, cols = imin(NW, p->n_out - col);
    for (int i = 0; i < p->n_terms; i++) {
        const struct tb_lora_term *t = p->terms + i;
        int c0 = imax(col, t->col), c1 = imin(col + cols, t->col + t->n_out);
        if (c0 < c1) add_term(p, t, row, n, c0, c1, thread);
    }
}

/* The last block of rows whose length is no whole number of words. */
#define TAIL_BYTES (KP > 1 ? ROWS_CHUNK * K_BLOCK * sizeof(act_t) : 0)

/* One panel for rows [row, row + n). */
static void product_panel(const struct product *p, int row, int n, int panel, int thread)
{
    int col = panel * NW, cols = imin(NW, p->n_out - col);
    int kw = words(p->n_k);
    float edge[ROWS_CHUNK * NW], bias[NW] = {0};
    float *y = p->y + (size_t)row * p->ldy + (size_t)col;
    bool partial = cols < NW;
    if (p->bias) memcpy(bias, p->bias + col, (size_t)cols * sizeof(float));
    struct mk m = {.ldb = NW, .c = y, .ldc = p->ldy, .bias = bias, .scale = 1.0f};
    m.init = p->accumulate ? MK_ADD : p->bias ? MK_BIAS : MK_ZERO;
    if (partial) {
        m.c = edge;
        m.ldc = NW;
        for (int r = 0; p->accumulate && r < n; r++) {
            memset(edge + r * NW, 0, NW * sizeof(float));
            memcpy(edge + r * NW, y + (size_t)r * p->ldy, (size_t)cols * sizeof(float));
        }
    }
    if (p->bias && p->accumulate) { /* y + bias first, then the blocks */
        for (int r = 0; r < n; r++)
            for (int j = 0; j < NW; j++)
                m.c[(size_t)r * m.ldc + (size_t)j] += bias[j];
    }
    const int block = K_BLOCK / KP;
    for (int k = 0; k < kw; k += block) {
        const uint32_t *b = p->panels + ((size_t)panel * (size_t)kw + (size_t)k) * NW;
        m.b = &b;
        m.kw = m.kw_page = imin(block, kw - k);
        m.a = p->x + (size_t)row * p->ldx + (size_t)k * KP;
        m.lda = p->ldx;
        if (p->n_k % KP && k + block >= kw)
            m.a = even(p->x + (size_t)k * KP, p->ldx, row, n, p->n_k - k * KP,
                       (act_t *)tb_scratch_get(&p->cpu->own[thread], TAIL_BYTES), &m.lda);
        bool behind = panel + 1 < p->n_panels || k + m.kw < kw;
        m.ahead = behind ? b + (size_t)m.kw * NW : NULL;
        K(mk_rows_wide)(&m, n);
        m.init = MK_ADD;
    }
    for (int r = 0; partial && r < n; r++)
        memcpy(y + (size_t)r * p->ldy, edge + r * NW, (size_t)cols * sizeof(float));
    if (p->T > FEW_ROWS) add_terms(p, row, n, panel, thread);
}

static void product_task(void *arg, int task, int thread)
{
    const struct product *p = arg;
    int row = task / p->panel_tasks * p->rows, first = task % p->panel_tasks * p->panels_each;
    int n = imin(p->rows, p->T - row), end = imin(first + p->panels_each, p->n_panels);
    for (int panel = first; panel < end; panel++)
        product_panel(p, row, n, panel, thread);
}

/* ---- the terms of few rows: each adapter's B is one stretch of memory then, read from end to end
 */

#define TERM_COLS (16 * NW)

/* Tasks of one span of a term. */
static int term_tasks(const struct tb_lora_term *t)
{
    return (t->n_out + TERM_COLS - 1) / TERM_COLS;
}

static void term_task(void *arg, int task, int thread)
{
    const struct product *p = arg;
    const struct tb_lora_term *t = p->terms;
    for (; task >= t->n_spans * term_tasks(t); t++)
        task -= t->n_spans * term_tasks(t);
    const struct tb_lora_span *s = t->spans + task / term_tasks(t);
    int c = task % term_tasks(t) * TERM_COLS, end = imin(c + TERM_COLS, t->n_out);
    for (; c < end; c += NW)
        add_term(p, t, s->row, s->n, t->col + c, t->col + imin(c + NW, end), thread);
}

static void add_terms_of_few(struct product *p)
{
    int n = 0;
    for (int i = 0; i < p->n_terms; i++)
        n += p->terms[i].n_spans * term_tasks(&p->terms[i]);
    tb_team_run(p->cpu->team, term_task, p, n);
}

static void product(struct tb_backend *be, struct product *p)
{
    struct tb_cpu *c = tb_cpu(be);
    if (p->T <= 0) return;
    p->cpu = c;
    p->ldx = (size_t)p->n_k;
    p->n_panels = (p->n_out + NW - 1) / NW;
    int chunks = (p->T + ROWS_CHUNK - 1) / ROWS_CHUNK;
    p->rows = ((p->T + chunks - 1) / chunks + RMAX_WIDE - 1) / RMAX_WIDE * RMAX_WIDE;
    chunks = (p->T + p->rows - 1) / p->rows;
    /* Neighbouring panels to one thread, as long as there are enough tasks to share out evenly. */
    p->panels_each = imax(1, imin(4, p->n_panels * chunks / (8 * be->n_threads)));
    p->panel_tasks = (p->n_panels + p->panels_each - 1) / p->panels_each;
    tb_team_run(c->team, product_task, p, chunks * p->panel_tasks);
    if (p->n_terms && p->T <= FEW_ROWS) add_terms_of_few(p);
}

static void matmul_lora(struct tb_backend *be, const struct tb_weight *w, const void *x, int T,
                        const float *bias, float *y, int ldy, bool accumulate,
                        const struct tb_lora_term *terms, int n_terms)
{
    struct product p = {.panels = w->fwd,
                        .x = x,
                        .T = T,
                        .n_k = w->n_in,
                        .n_out = w->n_out,
                        .bias = bias,
                        .y = y,
                        .ldy = (size_t)ldy,
                        .accumulate = accumulate,
                        .terms = terms,
                        .n_terms = n_terms};
    product(be, &p);
}

static void matmul(struct tb_backend *be, const struct tb_weight *w, const void *x, int T,
                   const float *bias, float *y, int ldy, bool accumulate)
{
    matmul_lora(be, w, x, T, bias, y, ldy, accumulate, NULL, 0);
}

static void matmul_bwd(struct tb_backend *be, const struct tb_weight *w, const void *dy, int T,
                       float *dx, int ld_dx, bool accumulate)
{
    struct product p = {.panels = w->bwd,
                        .x = dy,
                        .T = T,
                        .n_k = w->n_out,
                        .n_out = w->n_in,
                        .y = dx,
                        .ldy = (size_t)ld_dx,
                        .accumulate = accumulate};
    product(be, &p);
}

void K(product_needs)(const struct tb_pass_size *size, struct tb_needs *n)
{
    tb_need(&n->own, rank_bytes(size->rank));
    tb_need(&n->own, TAIL_BYTES);
}

void K(product_ops)(struct tb_backend_ops *o)
{
    o->weight_create = weight_create;
    o->weight_free = weight_free;
    o->weight_bytes = weight_bytes;
    o->weight_prepare_bwd = weight_prepare_bwd;
    o->matmul = matmul;
    o->matmul_lora = matmul_lora;
    o->matmul_bwd = matmul_bwd;
}
