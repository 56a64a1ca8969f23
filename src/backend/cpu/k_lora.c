/*
 * LoRA over spans, fast. The factors lie row-major, so what a product needs packed is packed on the
 * way, into the thread's scratch; x A^T has both sides along its sum and reads them as they are.
 *
 * Sums: x A^T runs VW words at a time over n_in, lanes added at the end; the others are running
 * sums over the words in order. Gradients sum a span's rows in blocks of GRAD_ROWS from the span's
 * first row and add the blocks in order.
 */
#include <stdlib.h>

#include "backend/cpu/gemm.h"
#include "backend/cpu/pack.h"

#define DOWN_ROWS   48 /* rows of a task of x A^T */
#define GRAD_ROWS   512
#define PANELS_EACH 4 /* panels of a task of y += u B^T */

/* ---- work lists: one entry is a run of rows of one module */

struct run {
    int row, n;
    const struct tb_lora_mat *mat;
    const struct tb_lora_term *term; /* of x A^T */
    int first_task, chunk;           /* its first task, rows a task */
};

struct lora {
    const struct tb_lora_span *spans;
    int n_spans;
    struct run *runs;
    int n_runs, n_tasks;
    int n_in, n_out;
    const act_t *x, *u;
    act_t *v;
    size_t ldx, ldu, ldv;
    float *y;
    size_t ldy;
    int n_panels;
    act_t *t;     /* transposed rows of all spans */
    size_t *t_at; /* where a span's begin */
    struct tb_cpu *cpu;
};

/* Joins neighbouring spans of one module and cuts the runs into tasks of at most chunk rows. */
static void add_runs(struct lora *l, const struct tb_lora_span *spans, int n_spans,
                     const struct tb_lora_term *term, int chunk, int tasks_per_chunk)
{
    int first = l->n_runs;
    for (int i = 0; i < n_spans; i++) {
        const struct tb_lora_span *s = spans + i;
        struct run *last = l->n_runs > first ? &l->runs[l->n_runs - 1] : NULL;
        if (s->n <= 0) continue;
        if (last && last->mat == s->mat && last->row + last->n == s->row)
            last->n += s->n;
        else
            l->runs[l->n_runs++] =
                (struct run){.row = s->row, .n = s->n, .mat = s->mat, .term = term};
    }
    for (int i = first; i < l->n_runs; i++) {
        struct run *r = l->runs + i;
        int chunks = (r->n + chunk - 1) / chunk;
        r->chunk = (r->n + chunks - 1) / chunks;
        r->first_task = l->n_tasks;
        l->n_tasks += (r->n + r->chunk - 1) / r->chunk * tasks_per_chunk;
    }
}

static void make_runs(struct lora *l, int chunk, int tasks_per_chunk)
{
    l->runs = tb_scratch_get(&l->cpu->shared[0], (size_t)l->n_spans * sizeof(*l->runs));
    add_runs(l, l->spans, l->n_spans, NULL, chunk, tasks_per_chunk);
}

static const struct run *run_of(const struct lora *l, int task)
{
    int lo = 0, hi = l->n_runs - 1;
    while (lo < hi) {
        int mid = (lo + hi + 1) / 2;
        if (l->runs[mid].first_task <= task)
            lo = mid;
        else
            hi = mid - 1;
    }
    return l->runs + lo;
}

/* ---- u = x A^T */

/* Adds the lanes of VW (or fewer) vectors, one sum a lane. */
INLINE vf lane_sums(const vf *v, int n)
{
    float rows[VW * VW], cols[VW * VW];
    for (int i = 0; i < n; i++)
        vf_store(rows + i * VW, v[i]);
    tile_transpose((const tb_word *)(const void *)rows, VW, n, VW, (uint32_t *)(void *)cols, VW);
    vf s[VW];
    UNROLL for (int i = 0; i < VW; i++) s[i] = vf_load(cols + i * VW);
    UNROLL for (int w = VW / 2; w > 0; w /= 2)
    {
        UNROLL for (int i = 0; i < w; i++) s[i] = vf_add(s[i], s[i + w]);
    }
    return s[0];
}

/* R rows of x against C rows of A; out[r * C + c]. */
INLINE void dot_tile(const int R, const int C, const act_t *x, size_t ldx, const act_t *a,
                     size_t lda, int n, float *out)
{
    vf acc[4 * 4];
    UNROLL for (int i = 0; i < R * C; i++) acc[i] = vf_zero();
    int k = 0, step = VW * KP;
    for (; k + step <= n; k += step) {
        vw w[4];
        UNROLL for (int c = 0; c < C; c++) w[c] =
            vw_load((const uint32_t *)(const void *)(a + (size_t)c * lda + k));
        UNROLL for (int r = 0; r < R; r++)
        {
            vw v = vw_load((const uint32_t *)(const void *)(x + (size_t)r * ldx + k));
            UNROLL for (int c = 0; c < C; c++) acc[r * C + c] = vdot(acc[r * C + c], v, w[c]);
        }
    }
    if (k < n) {
        act_t tail[2][VW * KP];
        for (int r = 0; r < R; r++) {
            memset(tail, 0, sizeof(tail));
            memcpy(tail[0], x + (size_t)r * ldx + k, (size_t)(n - k) * sizeof(act_t));
            for (int c = 0; c < C; c++) {
                memcpy(tail[1], a + (size_t)c * lda + k, (size_t)(n - k) * sizeof(act_t));
                acc[r * C + c] =
                    vdot(acc[r * C + c], vw_load((const uint32_t *)(const void *)tail[0]),
                         vw_load((const uint32_t *)(const void *)tail[1]));
            }
        }
    }
    for (int i = 0; i < R * C; i += VW) {
        int m = imin(VW, R * C - i);
        vf_storen(out + i, lane_sums(acc + i, m), m);
    }
}

#define DOT_CASE(R, C)                                                                             \
    case R * 8 + C: dot_tile(R, C, x, ldx, a, lda, n, out); break;

static void dot_any(int R, int C, const act_t *x, size_t ldx, const act_t *a, size_t lda, int n,
                    float *out)
{
    switch (R * 8 + C) {
        DOT_CASE(1, 1)
        DOT_CASE(1, 2)
        DOT_CASE(1, 3)
        DOT_CASE(1, 4)
        DOT_CASE(2, 1)
        DOT_CASE(2, 2)
        DOT_CASE(2, 3)
        DOT_CASE(2, 4)
        DOT_CASE(3, 1)
        DOT_CASE(3, 2)
        DOT_CASE(3, 3)
        DOT_CASE(3, 4)
        DOT_CASE(4, 1)
        DOT_CASE(4, 2)
        DOT_CASE(4, 3)
        DOT_CASE(4, 4)
    }
}

static void down_task(void *arg, int task, int thread)
{
    const struct lora *l = arg;
    const struct run *run = run_of(l, task);
    int row = run->row + (task - run->first_task) * run->chunk,
        end = imin(row + run->chunk, run->row + run->n);
    size_t n_in = (size_t)l->n_in, ldu = (size_t)run->term->ldu;
    for (; row < end; row += 4) {
        int R = imin(4, end - row);
        for (int c = 0; c < run->mat->rank; c += 4) {
            int C = imin(4, run->mat->rank - c);
            float out[16];
            dot_any(R, C, l->x + (size_t)row * l->ldx, l->ldx,
                    (const act_t *)run->mat->a + (size_t)c * n_in, n_in, l->n_in, out);
            for (int r = 0; r < R; r++)
                for (int j = 0; j < C; j++)
                    tb_store(ACT, run->term->u, (size_t)(row + r) * ldu + (size_t)(c + j),
                             out[r * C + j]);
        }
    }
}

static void lora_down(struct tb_backend *be, const struct tb_lora_term *terms, int n_terms,
                      const void *x, int ldx, int n_in)
{
    struct tb_cpu *c = tb_cpu(be);
    struct lora l = {.n_in = n_in, .x = x, .ldx = (size_t)ldx, .cpu = c};
    size_t n_spans = 0;
    for (int i = 0; i < n_terms; i++)
        n_spans += (size_t)terms[i].n_spans;
    l.runs = tb_scratch_get(&c->shared[0], n_spans * sizeof(*l.runs));
    for (int i = 0; i < n_terms; i++)
        add_runs(&l, terms[i].spans, terms[i].n_spans, terms + i, DOWN_ROWS, 1);
    tb_team_run(c->team, down_task, &l, l.n_tasks);
}

/* ---- products with a sum over the rank or over n_out */

/* One panel of columns of y += scale * u B^T (up) or dx += du A (down_bwd) for rows [row, row + n).
 */
static void rank_panel(const struct lora *l, const struct run *run, int row, int n, int panel,
                       int thread, bool up)
{
    int rank = run->mat->rank, kw = words(rank), width = up ? l->n_out : l->n_in;
    int col = panel * NW, cols = imin(NW, width - col);
    char *mem = tb_scratch_get(&l->cpu->own[thread], rank_bytes(rank));
    uint32_t *b = (uint32_t *)(void *)mem;
    act_t *tmp_b = (act_t *)(void *)(mem + rank_panel_bytes(rank)),
          *tmp_u = tmp_b + (size_t)kw * KP * NW;
    if (up && n <= 16) { /* the time goes into fetching B: the panel after the next */
        const char *next =
            (const char *)run->mat->b + (size_t)(col + 2 * NW) * (size_t)rank * sizeof(act_t);
        for (size_t at = 0; at < (size_t)NW * (size_t)rank * sizeof(act_t); at += 64)
            _mm_prefetch(next + at, _MM_HINT_T1);
    }
    if (up)
        pack_rows((const act_t *)run->mat->b + (size_t)col * (size_t)rank, (size_t)rank, cols, rank,
                  b, NW, tmp_b);
    else
        pack_cols((const act_t *)run->mat->a + col, (size_t)width, rank, cols, b, NW);
    const uint32_t *page = b;
    struct mk m = {.b = &page,
                   .ldb = NW,
                   .kw = kw,
                   .kw_page = kw,
                   .ldc = l->ldy,
                   .init = MK_ADD,
                   .scale = up ? run->mat->scale : 1.0f};
    m.a = even(l->u, l->ldu, row, n, rank, tmp_u, &m.lda);
    m.c = l->y + (size_t)row * l->ldy + (size_t)col;
    run_edge(&m, n, cols);
}

/* Neighbouring panels for a chunk of rows. */
static void rank_task(const struct lora *l, int task, int thread, bool up)
{
    const struct run *run = run_of(l, task);
    int tasks = (l->n_panels + PANELS_EACH - 1) / PANELS_EACH, local = task - run->first_task;
    int row = run->row + local / tasks * run->chunk, n = imin(run->chunk, run->row + run->n - row);
    int first = local % tasks * PANELS_EACH, end = imin(first + PANELS_EACH, l->n_panels);
    for (int panel = first; panel < end; panel++)
        rank_panel(l, run, row, n, panel, thread, up);
}

static void up_task(void *arg, int task, int thread)
{
    rank_task(arg, task, thread, true);
}

static void down_bwd_task(void *arg, int task, int thread)
{
    rank_task(arg, task, thread, false);
}

static void lora_up(struct tb_backend *be, const struct tb_lora_span *s, int n_spans, const void *u,
                    int ldu, float *y, int ldy, int n_out)
{
    struct tb_cpu *c = tb_cpu(be);
    struct lora l = {.spans = s,
                     .n_spans = n_spans,
                     .n_out = n_out,
                     .u = u,
                     .ldu = (size_t)ldu,
                     .y = y,
                     .ldy = (size_t)ldy,
                     .cpu = c,
                     .n_panels = (n_out + NW - 1) / NW};
    make_runs(&l, ROWS_CHUNK, (l.n_panels + PANELS_EACH - 1) / PANELS_EACH);
    tb_team_run(c->team, up_task, &l, l.n_tasks);
}

/* A thread's memory for it: a block of B, and of n rows the sums and the block's columns. */
#define DU_BLOCK 1024
struct du {
    size_t ld, pack_bytes, sum_bytes, bytes;
};
static struct du du_of(int rank, int n)
{
    struct du d = {.ld = round_up((size_t)rank, VW)};
    d.pack_bytes = DU_BLOCK / KP * d.ld * 4;
    d.sum_bytes = (size_t)n * d.ld * 4;
    d.bytes = d.pack_bytes + d.sum_bytes + (size_t)n * DU_BLOCK * sizeof(act_t);
    return d;
}

/* du = scale * dy B for a chunk of rows: B packed in blocks of its rows. */
static void du_task(void *arg, int task, int thread)
{
    const struct lora *l = arg;
    const struct run *run = run_of(l, task);
    int row = run->row + (task - run->first_task) * run->chunk,
        n = imin(run->chunk, run->row + run->n - row);
    int rank = run->mat->rank;
    struct du d = du_of(rank, n);
    size_t ld = d.ld;
    char *mem = tb_scratch_get(&l->cpu->own[thread], d.bytes);
    uint32_t *b = (uint32_t *)(void *)mem;
    float *sum = (float *)(void *)(mem + d.pack_bytes);
    act_t *tmp = (act_t *)(void *)(mem + d.pack_bytes + d.sum_bytes);
    memset(sum, 0, d.sum_bytes);
    for (int k = 0; k < l->n_out; k += DU_BLOCK) {
        int kn = imin(DU_BLOCK, l->n_out - k), kw = words(kn);
        pack_cols((const act_t *)run->mat->b + (size_t)k * (size_t)rank, (size_t)rank, kn, rank, b,
                  ld);
        struct mk m = {
            .ldb = ld, .kw = kw, .kw_page = kw, .ldc = ld, .init = MK_ADD, .scale = 1.0f};
        m.a = even(l->x + k, l->ldx, row, n, kn, tmp, &m.lda);
        for (int j = 0; j < (int)ld; j += NW) {
            const uint32_t *page = b + j;
            m.b = &page;
            m.c = sum + j;
            K(mk_rows)(&m, n, imin(NVMAX, ((int)ld - j) / VW));
        }
    }
    vf scale = vf_set1(run->mat->scale);
    for (int r = 0; r < n; r++) {
        act_t *du = l->v + (size_t)(row + r) * l->ldv;
        for (int j = 0; j < rank; j += VW)
            va_storen(du + j, vf_mul(scale, vf_load(sum + (size_t)r * ld + j)), imin(VW, rank - j));
    }
}

/* ---- gradients: rows of the span are the sum */

/* rank rows of words along a span: t[r][rows padded to KP]. */
static void transpose_span_task(void *arg, int task, int thread)
{
    const struct lora *l = arg;
    const struct tb_lora_span *s = l->spans + task;
    act_t *t = l->t + l->t_at[task];
    if (s->n <= 0) return;
    size_t ld = round_up((size_t)s->n, KP);
    for (int r = 0; r < s->mat->rank; r++) {
        t[(size_t)r * ld + ld - 1] = 0;
        for (int i = 0; i < s->n; i++)
            t[(size_t)r * ld + (size_t)i] = l->u[(size_t)(s->row + i) * l->ldu + (size_t)r];
    }
}

static bool wants(const struct tb_lora_span *s, bool up)
{
    return s->n > 0 && (up ? s->gb : s->ga) != NULL;
}

/* A thread's: a panel of words, and sums. */
#define GRAD_PACK_BYTES ((size_t)(GRAD_ROWS / KP) * NW * 4)
static size_t grad_bytes(int rank)
{
    return GRAD_PACK_BYTES + round_up((size_t)rank, VW) * NW * 4;
}

/* One panel of columns of every span's gradient: gb^T (up) or ga. */
static void grad_task(const struct lora *l, int panel, int thread, bool up)
{
    int width = up ? l->n_out : l->n_in, col = panel * NW, cols = imin(NW, width - col),
        nv = vecs(cols);
    int max_rank = 1;
    for (int i = 0; i < l->n_spans; i++)
        if (wants(l->spans + i, up)) max_rank = imax(max_rank, l->spans[i].mat->rank);
    char *mem = tb_scratch_get(&l->cpu->own[thread], grad_bytes(max_rank));
    uint32_t *b = (uint32_t *)(void *)mem;
    const uint32_t *page = b;
    float *sum = (float *)(void *)(mem + GRAD_PACK_BYTES);
    for (int i = 0; i < l->n_spans; i++) {
        const struct tb_lora_span *s = l->spans + i;
        if (!wants(s, up)) continue;
        int rank = s->mat->rank;
        struct mk m = {.b = &page,
                       .lda = round_up((size_t)s->n, KP),
                       .ldb = NW,
                       .c = sum,
                       .ldc = NW,
                       .scale = 1.0f};
        for (int t = 0; t < s->n; t += GRAD_ROWS) {
            int n = imin(GRAD_ROWS, s->n - t);
            pack_cols(l->x + (size_t)(s->row + t) * l->ldx + col, l->ldx, n, cols, b, NW);
            m.a = l->t + l->t_at[i] + t;
            m.kw = m.kw_page = words(n);
            m.init = t ? MK_ADD : MK_ZERO;
            K(mk_rows)(&m, rank, nv);
        }
        if (!up) {
            for (int r = 0; r < rank; r++) {
                float *d = s->ga + (size_t)r * (size_t)width + col;
                for (int j = 0; j < cols; j += VW) {
                    int k = imin(VW, cols - j);
                    vf_storen(d + j, vf_add(vf_loadn(d + j, k), vf_loadn(sum + r * NW + j, k)), k);
                }
            }
            continue;
        }
        vf scale = vf_set1(s->mat->scale);
        for (int r = 0; r < rank; r += VW) {
            int rn = imin(VW, rank - r);
            for (int j = 0; j < cols; j += VW) {
                float tile[VW * VW];
                tile_transpose((const tb_word *)(const void *)(sum + r * NW + j), NW, rn, VW,
                               (uint32_t *)(void *)tile, VW);
                for (int k = 0; k < imin(VW, cols - j); k++) {
                    float *d = s->gb + (size_t)(col + j + k) * (size_t)rank + r;
                    vf_storen(d, vf_fma(scale, vf_load(tile + k * VW), vf_loadn(d, rn)), rn);
                }
            }
        }
    }
}

static void ga_task(void *arg, int task, int thread)
{
    grad_task(arg, task, thread, false);
}

static void gb_task(void *arg, int task, int thread)
{
    grad_task(arg, task, thread, true);
}

static void gradients(struct lora *l, bool up)
{
    struct tb_cpu *c = l->cpu;
    l->t_at = tb_scratch_get(&c->shared[1], (size_t)l->n_spans * sizeof(size_t));
    size_t total = 0;
    bool any = false;
    for (int i = 0; i < l->n_spans; i++) {
        l->t_at[i] = total;
        if (l->spans[i].n > 0)
            total += round_up((size_t)l->spans[i].n, KP) * (size_t)l->spans[i].mat->rank;
        any = any || wants(l->spans + i, up);
    }
    if (!any) return;
    l->t = tb_scratch_get(&c->shared[2], total * sizeof(act_t));
    tb_team_run(c->team, transpose_span_task, l, l->n_spans);
    int width = up ? l->n_out : l->n_in;
    tb_team_run(c->team, up ? gb_task : ga_task, l, (width + NW - 1) / NW);
}

static void lora_up_bwd(struct tb_backend *be, const struct tb_lora_span *s, int n_spans,
                        const void *dy, int ld_dy, int n_out, const void *u, void *du, int ldu)
{
    struct tb_cpu *c = tb_cpu(be);
    struct lora l = {.spans = s,
                     .n_spans = n_spans,
                     .n_out = n_out,
                     .x = dy,
                     .ldx = (size_t)ld_dy,
                     .u = u,
                     .v = du,
                     .ldu = (size_t)ldu,
                     .ldv = (size_t)ldu,
                     .cpu = c};
    make_runs(&l, ROWS_CHUNK, 1);
    tb_team_run(c->team, du_task, &l, l.n_tasks);
    gradients(&l, true);
}

static void lora_down_bwd(struct tb_backend *be, const struct tb_lora_span *s, int n_spans,
                          const void *du, int ldu, const void *x, int ldx, int n_in, float *dx,
                          int ld_dx)
{
    struct tb_cpu *c = tb_cpu(be);
    struct lora l = {.spans = s,
                     .n_spans = n_spans,
                     .n_in = n_in,
                     .x = x,
                     .ldx = (size_t)ldx,
                     .u = du,
                     .ldu = (size_t)ldu,
                     .y = dx,
                     .ldy = (size_t)ld_dx,
                     .cpu = c,
                     .n_panels = (n_in + NW - 1) / NW};
    if (dx) {
        make_runs(&l, ROWS_CHUNK, (l.n_panels + PANELS_EACH - 1) / PANELS_EACH);
        tb_team_run(c->team, down_bwd_task, &l, l.n_tasks);
    }
    gradients(&l, false);
}

/* No more spans of a term than rows. */
void K(lora_needs)(const struct tb_pass_size *size, struct tb_needs *n)
{
    size_t rows = (size_t)size->rows;
    tb_need(&n->own, rank_bytes(size->rank));
    tb_need(&n->own, du_of(size->rank, ROWS_CHUNK).bytes);
    tb_need(&n->own, grad_bytes(size->rank));
    tb_need(&n->shared[0], TB_LORA_TERMS * rows * sizeof(struct run));
    tb_need(&n->shared[1], rows * sizeof(size_t));
    tb_need(&n->shared[2], rows * KP * (size_t)size->rank * sizeof(act_t));
}

void K(lora_ops)(struct tb_backend_ops *o)
{
    o->lora_down = lora_down;
    o->lora_up = lora_up;
    o->lora_up_bwd = lora_up_bwd;
    o->lora_down_bwd = lora_down_bwd;
}
