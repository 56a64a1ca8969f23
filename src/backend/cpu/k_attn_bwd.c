/*
 * The gradient of causal attention, fast. One task is one kv head of one sequence: it walks the
 * keys in chunks, the query heads of the group, the queries in blocks and the chunk's keys in
 * blocks, always in the same order, and is the only one that adds to its dk and dv. P and dS are
 * rounded to the activation type before they are multiplied.
 */
#include "backend/cpu/attn.h"

#define QB    BLOCK /* queries of a step */
#define CHUNK 512   /* keys that are packed at once; whole steps */

struct bwd {
    const struct tb_attn_shape *s;
    const struct tb_attn_seq *seqs;
    struct layout l;
    const act_t *q, *k, *v, *out;
    const float *lse, *dout;
    float *dq, *dk, *dv;
    struct tb_cpu *cpu;
};

/* A task's memory. Row strides: S, dP, P, dS are [QB][BLOCK]; transposed ones [BLOCK][QB]. */
struct work {
    uint32_t *k_keys, *v_keys, *k_vals; /* a chunk of keys packed three ways */
    float *dk, *dv;                     /* [keys][hdv] sums */
    act_t *q, *o;                       /* [QB][hdw words] queries, dout */
    uint32_t *q_vals, *o_vals;          /* [QB / KP][hdv] */
    float *s, *dp, *dq;                 /* dq: [QB][hdv] */
    act_t *ds, *pt, *dst;
    float lse[QB], delta[QB];
};

static void copy_rows(const float *src, size_t ld_src, float *dst, size_t ld_dst, int n, int hd)
{
    for (int i = 0; i < n; i++)
        memcpy(dst + (size_t)i * ld_dst, src + (size_t)i * ld_src, (size_t)hd * sizeof(float));
}

static char *carve(char *mem, size_t *at, size_t bytes)
{
    char *p = mem ? mem + *at : NULL;
    *at += round_up(bytes, 64);
    return p;
}

/* Lays the memory for n keys out and returns its size; with mem NULL only counts. */
static size_t lay_out(struct work *w, const struct layout *l, int n, char *mem)
{
    size_t keys = round_up((size_t)n, BLOCK), row = (size_t)l->hdw * 4, hdv = l->hdv * 4, at = 0;
    size_t square = (size_t)QB * BLOCK;
    w->k_keys = (uint32_t *)(void *)carve(mem, &at, keys * row);
    w->v_keys = (uint32_t *)(void *)carve(mem, &at, keys * row);
    w->k_vals = (uint32_t *)(void *)carve(mem, &at, keys / KP * hdv);
    w->dk = (float *)(void *)carve(mem, &at, keys * hdv);
    w->dv = (float *)(void *)carve(mem, &at, keys * hdv);
    w->q = (act_t *)(void *)carve(mem, &at, QB * row);
    w->o = (act_t *)(void *)carve(mem, &at, QB * row);
    w->q_vals = (uint32_t *)(void *)carve(mem, &at, QB / KP * hdv);
    w->o_vals = (uint32_t *)(void *)carve(mem, &at, QB / KP * hdv);
    w->s = (float *)(void *)carve(mem, &at, square * 4);
    w->dp = (float *)(void *)carve(mem, &at, square * 4);
    w->dq = (float *)(void *)carve(mem, &at, QB * hdv);
    w->ds = (act_t *)(void *)carve(mem, &at, square * sizeof(act_t));
    w->pt = (act_t *)(void *)carve(mem, &at, square * sizeof(act_t));
    w->dst = (act_t *)(void *)carve(mem, &at, square * sizeof(act_t));
    return at;
}

/* Queries [first, first + n) of head h: packed both ways, with dout, its dot product with out, and
 * lse; and dq so far, if some. */
static void load_block(const struct bwd *b, struct work *w, const struct tb_attn_seq *sq, int first,
                       int n, int h, bool some)
{
    size_t hd = (size_t)b->l.hd, ld = (size_t)b->l.hdw * KP, ld_q = (size_t)b->s->n_head * hd;
    size_t at = (size_t)(sq->row + first) * ld_q + (size_t)h * hd;
    memset(w->q_vals, 0, QB / KP * b->l.hdv * 4);
    memset(w->o_vals, 0, QB / KP * b->l.hdv * 4);
    for (int i = 0; i < n; i++) {
        size_t row = (size_t)(sq->row + first + i) * (size_t)b->s->n_head + (size_t)h;
        const float *dout = b->dout + row * hd;
        const act_t *out = b->out + row * hd;
        act_t *o = w->o + (size_t)i * ld, *q = w->q + (size_t)i * ld;
        vf delta = vf_zero();
        o[ld - 1] = q[ld - 1] = 0;
        for (int d = 0; d < b->l.hd; d += VW) {
            int m = imin(VW, b->l.hd - d);
            vf x = vf_loadn(dout + d, m);
            delta = vf_fma(x, va_loadn(out + d, m), delta);
            va_storen(o + d, x, m);
        }
        memcpy(q, b->q + row * hd, hd * sizeof(act_t));
        w->delta[i] = vf_hsum(delta);
        w->lse[i] = b->lse[row];
    }
    pack_values(&b->l, b->q + at, ld_q, n, w->q_vals);
    pack_values(&b->l, w->o, ld, n, w->o_vals);
    memset(w->dq, 0, (size_t)n * b->l.hdv * 4);
    if (some) copy_rows(b->dq + at, ld_q, w->dq, b->l.hdv, n, b->l.hd);
}

/* Words of rows i, i + 1 (KP of them) of src, transposed: dst[key][QB] activations. */
static void transpose_block(const float *src, act_t *dst)
{
    uint32_t pairs[VW * VW], tile[VW * VW];
    for (int j = 0; j < BLOCK; j += VW) {
        for (int i = 0; i < QB; i += VW * KP) {
            for (int r = 0; r < VW; r++) {
                act_t a[2][VW];
                for (int p = 0; p < KP; p++)
                    va_store(a[p], vf_load(src + (size_t)(i + r * KP + p) * BLOCK + j));
                vw_pair(pairs + r * VW, a[0], KP == 2 ? a[1] : NULL, VW);
            }
            tile_transpose(pairs, VW, VW, VW, tile, VW);
            for (int r = 0; r < VW; r++)
                memcpy(dst + (size_t)(j + r) * QB + i, tile + r * VW, VW * 4);
        }
    }
}

/* C[rows][hdv] += A[rows][k words] B[k words][hdv] */
static void accumulate(const struct layout *l, const act_t *a, size_t lda, int rows,
                       const uint32_t *b, int kw, float *c)
{
    struct mk m = {.a = a,
                   .lda = lda,
                   .ldb = l->hdv,
                   .kw = kw,
                   .kw_page = kw,
                   .ldc = l->hdv,
                   .init = MK_ADD,
                   .scale = 1.0f};
    for (int d = 0; d < (int)l->hdv; d += NW) {
        const uint32_t *page = b + d;
        m.b = &page;
        m.c = c + d;
        K(mk_rows)(&m, rows, imin(NVMAX, ((int)l->hdv - d) / VW));
    }
}

/* P and dS of one row in place of S and dP; keys [lo, hi) of the block are seen. */
static void row_grad(const struct bwd *b, struct work *w, int i, int lo, int hi)
{
    vf scale = vf_set1(b->s->scale), lse = vf_set1(w->lse[i]), delta = vf_set1(w->delta[i]),
       zero = vf_zero();
    float *s = w->s + (size_t)i * BLOCK, *dp = w->dp + (size_t)i * BLOCK;
    bool whole = lo <= 0 && hi >= BLOCK;
    UNROLL for (int j = 0; j < BLOCK / VW; j++)
    {
        vf p = vf_exp(vf_sub(vf_mul(vf_load(s + j * VW), scale), lse));
        vf d = vf_mul(vf_mul(p, vf_sub(vf_load(dp + j * VW), delta)), scale);
        if (!whole) {
            p = vf_window(p, zero, lo - j * VW, hi - j * VW);
            d = vf_window(d, zero, lo - j * VW, hi - j * VW);
        }
        vf_store(s + j * VW, p);
        vf_store(dp + j * VW, d);
        va_store(w->ds + (size_t)i * BLOCK + j * VW, d);
    }
}

/* Queries [first, first + n) against keys [key0, key0 + keys) of the chunk; positions count from
 * its first. */
static void block_pair(const struct bwd *b, struct work *w, int first, int n, int key0, int keys)
{
    const uint32_t *kp[BLOCK_PAGES], *vp[BLOCK_PAGES];
    int n_pages = (keys + PAGE - 1) / PAGE;
    for (int p = 0; p < n_pages; p++) {
        kp[p] = w->k_keys + (size_t)(key0 / PAGE + p) * b->l.k_words;
        vp[p] = w->v_keys + (size_t)(key0 / PAGE + p) * b->l.k_words;
    }
    scores(&b->l, w->q, n, kp, n_pages, w->s);
    scores(&b->l, w->o, n, vp, n_pages, w->dp);
    for (int i = 0; i < n; i++) {
        int pos = first + i, lo = first_key(b->s->window, pos) - key0,
            hi = imin(keys, pos + 1 - key0);
        row_grad(b, w, i, lo, hi);
    }
    memset(w->s + (size_t)n * BLOCK, 0, (size_t)(QB - n) * BLOCK * 4);
    memset(w->dp + (size_t)n * BLOCK, 0, (size_t)(QB - n) * BLOCK * 4);
    transpose_block(w->s, w->pt);
    transpose_block(w->dp, w->dst);
    accumulate(&b->l, w->pt, QB, keys, w->o_vals, words(n), w->dv + (size_t)key0 * b->l.hdv);
    accumulate(&b->l, w->dst, QB, keys, w->q_vals, words(n), w->dk + (size_t)key0 * b->l.hdv);
    accumulate(&b->l, w->ds, BLOCK, n, w->k_vals + (size_t)(key0 / KP) * b->l.hdv, words(keys),
               w->dq);
}

/* Queries [first, first + n) of head h against the keys [base, base + keys) that they see. */
static void query_block(const struct bwd *b, struct work *w, const struct tb_attn_seq *sq, int h,
                        int first, int n, int base, int keys)
{
    size_t hd = (size_t)b->l.hd, ld = (size_t)b->s->n_head * hd;
    int key0 = first_key(b->s->window, first) / BLOCK * BLOCK, end = imin(first + n, base + keys);
    if (key0 >= end) return;
    load_block(b, w, sq, first, n, h, key0 < base);
    for (key0 = imax(key0, base); key0 < end; key0 += BLOCK)
        block_pair(b, w, first - base, n, key0 - base, imin(BLOCK, base + keys - key0));
    copy_rows(w->dq, b->l.hdv, b->dq + (size_t)(sq->row + first) * ld + (size_t)h * hd, ld, n,
              b->l.hd);
}

static void bwd_task(void *arg, int task, int thread)
{
    const struct bwd *b = arg;
    int nk = b->s->n_kv_head, h = task % nk, group = b->s->n_head / nk;
    const struct tb_attn_seq *sq = b->seqs + task / nk;
    const struct layout *l = &b->l;
    size_t hd = (size_t)l->hd, ld = (size_t)nk * hd;
    struct work w;
    if (sq->n <= 0) return;
    size_t bytes = lay_out(&w, l, imin(CHUNK, sq->n), NULL);
    lay_out(&w, l, imin(CHUNK, sq->n), tb_scratch_get(&b->cpu->own[thread], bytes));
    for (int base = 0; base < sq->n; base += CHUNK) {
        int n = imin(CHUNK, sq->n - base);
        size_t at = (size_t)(sq->row + base) * ld + (size_t)h * hd;
        size_t sum_bytes = round_up((size_t)n, BLOCK) * l->hdv * 4;
        for (int p = 0; p * PAGE < n; p++) {
            size_t row = at + (size_t)(p * PAGE) * ld, dst = (size_t)p * l->k_words;
            pack_keys(l, b->k + row, ld, imin(PAGE, n - p * PAGE), w.k_keys + dst);
            pack_keys(l, b->v + row, ld, imin(PAGE, n - p * PAGE), w.v_keys + dst);
        }
        pack_values(l, b->k + at, ld, n, w.k_vals);
        memset(w.dk, 0, sum_bytes);
        memset(w.dv, 0, sum_bytes);
        for (int head = h * group; head < (h + 1) * group; head++)
            for (int first = base; first < sq->n; first += QB)
                query_block(b, &w, sq, head, first, imin(QB, sq->n - first), base, n);
        copy_rows(w.dk, l->hdv, b->dk + at, ld, n, l->hd);
        copy_rows(w.dv, l->hdv, b->dv + at, ld, n, l->hd);
    }
}

static void attention_bwd(struct tb_backend *be, const struct tb_attn_shape *s,
                          const struct tb_attn_seq *seqs, int n_seqs, const void *q, const void *k,
                          const void *v, const void *out, const float *lse, const float *dout,
                          float *dq, float *dk, float *dv)
{
    struct tb_cpu *c = tb_cpu(be);
    struct bwd b = {s, seqs, layout_of(s), q, k, v, out, lse, dout, dq, dk, dv, c};
    tb_team_run(c->team, bwd_task, &b, n_seqs * s->n_kv_head);
}

void K(attn_bwd_needs)(const struct tb_pass_size *size, struct tb_needs *n)
{
    struct layout l = layout_of(&size->attn);
    struct work w;
    tb_need(&n->own, lay_out(&w, &l, CHUNK, NULL));
}

void K(attn_bwd_ops)(struct tb_backend_ops *o)
{
    o->attention_bwd = attention_bwd;
}
