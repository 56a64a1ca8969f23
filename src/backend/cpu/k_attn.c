/*
 * Causal attention, fast: forward over rows of a batch or over pages, and the page pool.
 *
 * Training rows are first packed into pages of scratch memory, then both cases run the same code.
 * Keys are walked in blocks of BLOCK from position 0 with an online softmax; a block that a row
 * does not see leaves the row alone, so a row's bits do not depend on the rows that share its task.
 */
#include "backend/cpu/attn.h"

#define TASK_ROWS  96 /* query rows (positions x heads of a group) of a task, about */
#define MANY_PAGES 64 /* of training sequences that are packed at once, if they are several */

struct attn {
    const struct tb_attn_shape *s;
    const struct tb_attn_seq *seqs;
    int n_seqs;
    struct layout l;
    int group, q_block; /* query heads of a kv head; query positions of a task */
    int *first_task;    /* [n_seqs + 1] */
    size_t *page_at;    /* [n_seqs + 1] first scratch page of a training sequence */
    const act_t *q, *k, *v;
    uint32_t *pool;    /* pages of the caller */
    uint32_t *scratch; /* pages made of rows */
    act_t *out;
    float *lse;
    struct tb_cpu *cpu;
};

static int seq_of(const int *first, int n, int task)
{
    int lo = 0, hi = n - 1;
    while (lo < hi) {
        int mid = (lo + hi + 1) / 2;
        if (first[mid] <= task)
            lo = mid;
        else
            hi = mid - 1;
    }
    return lo;
}

/* The page of kv head h that holds keys 16 p .. of a sequence. */
static const uint32_t *page_of(const struct attn *a, int seq, int h, int p)
{
    const struct tb_attn_seq *sq = a->seqs + seq;
    size_t nk = (size_t)a->s->n_kv_head;
    if (sq->pages) return a->pool + ((size_t)sq->pages[p] * nk + (size_t)h) * a->l.words;
    return a->scratch + ((a->page_at[seq] + (size_t)p) * nk + (size_t)h) * a->l.words;
}

/* One page of all kv heads of one training sequence. */
static void pack_task(void *arg, int task, int thread)
{
    const struct attn *a = arg;
    int seq = 0;
    while (a->page_at[seq + 1] <= (size_t)task)
        seq++;
    const struct tb_attn_seq *sq = a->seqs + seq;
    int first = (task - (int)a->page_at[seq]) * PAGE, n = imin(PAGE, sq->n - first),
        nk = a->s->n_kv_head;
    size_t ld = (size_t)nk * (size_t)a->l.hd;
    for (int h = 0; h < nk; h++) {
        uint32_t *dst = a->scratch + ((size_t)task * (size_t)nk + (size_t)h) * a->l.words;
        size_t at = (size_t)(sq->row + first) * ld + (size_t)h * (size_t)a->l.hd;
        pack_keys(&a->l, a->k + at, ld, n, dst);
        pack_values(&a->l, a->v + at, ld, n, dst + a->l.k_words);
    }
}

/* A task's rows, in the thread's memory. */
struct rows_state {
    int n;          /* query rows */
    int block_keys; /* keys of this block that some row sees */
    float *s;       /* [n][BLOCK] */
    act_t *p;       /* [n][BLOCK] */
    float *o;       /* [n][hdv] */
    float *m, *sum; /* [n] running maximum and sum */
    act_t *q;       /* [n][hdw words] */
};

/* Lays the memory of r->n rows out and returns its size; with mem NULL only counts. */
static size_t lay_out(struct rows_state *r, const struct layout *l, char *mem)
{
    size_t rows = (size_t)r->n, o_bytes = rows * l->hdv * 4, s_bytes = rows * BLOCK * 4;
    size_t q_bytes = round_up(rows * (size_t)l->hdw * 4, 64), m_bytes = round_up(rows * 4, 64);
    size_t bytes = o_bytes + 2 * s_bytes + q_bytes + 2 * m_bytes;
    if (!mem) return bytes;
    r->o = (float *)(void *)mem;
    r->s = (float *)(void *)(mem + o_bytes);
    r->p = (act_t *)(void *)(mem + o_bytes + s_bytes);
    r->q = (act_t *)(void *)(mem + o_bytes + 2 * s_bytes);
    r->m = (float *)(void *)(mem + o_bytes + 2 * s_bytes + q_bytes);
    r->sum = (float *)(void *)(mem + o_bytes + 2 * s_bytes + q_bytes + m_bytes);
    return bytes;
}

/* Query positions of a task. */
static int q_block_of(const struct tb_attn_shape *s)
{
    return imax(1, TASK_ROWS / (s->n_head / s->n_kv_head));
}

/* Scores of keys [key0, key0 + BLOCK) to probabilities for the row at pos; rescales what was
 * summed. */
static void softmax_step(const struct attn *a, struct rows_state *r, int i, int pos, int key0)
{
    int lo = first_key(a->s->window, pos) - key0, hi = pos + 1 - key0;
    float *s = r->s + (size_t)i * BLOCK, *o = r->o + (size_t)i * a->l.hdv;
    act_t *p = r->p + (size_t)i * BLOCK;
    if (hi <= 0 || lo >= BLOCK) { /* sees none of them */
        memset(p, 0, BLOCK * sizeof(act_t));
        return;
    }
    vf none = vf_set1(-INFINITY), scale = vf_set1(a->s->scale), v[BLOCK / VW], top = none;
    bool whole = lo <= 0 && hi >= BLOCK;
    UNROLL for (int j = 0; j < BLOCK / VW; j++)
    {
        v[j] = vf_mul(vf_load(s + j * VW), scale);
        if (!whole) v[j] = vf_window(v[j], none, lo - j * VW, hi - j * VW);
        top = vf_max(top, v[j]);
    }
    float m = r->m[i], hm = vf_hmax(top);
    if (hm > m) m = hm;
    float old = r->m[i], corr = 1.0f;
    if (m > old) {
        float c[VW];
        vf_store(c, vf_exp(vf_set1(old - m)));
        corr = c[0];
        vf vc = vf_set1(corr);
        for (size_t d = 0; d < a->l.hdv; d += VW)
            vf_store(o + d, vf_mul(vf_load(o + d), vc));
        r->m[i] = m;
    }
    vf vm = vf_set1(m), sum = vf_zero();
    if (m == -INFINITY) vm = vf_zero(); /* all scores -inf: no weight, not NaN */
    UNROLL for (int j = 0; j < BLOCK / VW; j++)
    {
        vf e = vf_exp(vf_sub(v[j], vm));
        sum = vf_add(sum, e);
        va_store(p + j * VW, e);
    }
    r->sum[i] = r->sum[i] * corr + vf_hsum(sum);
}

static void store_rows(const struct attn *a, const struct rows_state *r,
                       const struct tb_attn_seq *sq, int first, int h)
{
    int nh = a->s->n_head;
    for (int i = 0; i < r->n; i++) {
        size_t at = (size_t)(sq->row + first + i / a->group) * (size_t)nh +
                    (size_t)(h * a->group + i % a->group);
        vf inv = vf_set1(r->sum[i] > 0 ? 1.0f / r->sum[i] : r->sum[i]);
        for (int d = 0; d < a->l.hd; d += VW)
            va_storen(a->out + at * (size_t)a->l.hd + d,
                      vf_mul(vf_load(r->o + (size_t)i * a->l.hdv + d), inv), imin(VW, a->l.hd - d));
        if (a->lse) a->lse[at] = r->m[i] + logf(r->sum[i]);
    }
}

static void load_queries(const struct attn *a, struct rows_state *r, const struct tb_attn_seq *sq,
                         int first, int h)
{
    size_t hd = (size_t)a->l.hd, ld = (size_t)a->l.hdw * KP;
    for (int i = 0; i < r->n; i++) {
        size_t at = (size_t)(sq->row + first + i / a->group) * (size_t)a->s->n_head +
                    (size_t)(h * a->group + i % a->group);
        r->q[(size_t)i * ld + ld - 1] = 0;
        memcpy(r->q + (size_t)i * ld, a->q + at * hd, hd * sizeof(act_t));
        r->m[i] = -INFINITY;
        r->sum[i] = 0;
    }
    memset(r->o, 0, (size_t)r->n * a->l.hdv * sizeof(float));
}

/* Query positions [first, first + n) of one sequence against one kv head. */
static void attn_task(void *arg, int task, int thread)
{
    const struct attn *a = arg;
    int seq = seq_of(a->first_task, a->n_seqs, task), local = task - a->first_task[seq];
    const struct tb_attn_seq *sq = a->seqs + seq;
    int h = local % a->s->n_kv_head, first = local / a->s->n_kv_head * a->q_block;
    int n = imin(a->q_block, sq->n - first), pos0 = sq->pos + first, end = pos0 + n;
    struct rows_state r = {.n = n * a->group};
    lay_out(&r, &a->l, tb_scratch_get(&a->cpu->own[thread], lay_out(&r, &a->l, NULL)));
    load_queries(a, &r, sq, first, h);
    for (int key0 = first_key(a->s->window, pos0) / BLOCK * BLOCK; key0 < end; key0 += BLOCK) {
        const uint32_t *kp[BLOCK_PAGES], *vp[BLOCK_PAGES];
        int keys = imin(BLOCK, end - key0), n_pages = (keys + PAGE - 1) / PAGE;
        for (int p = 0; p < n_pages; p++) {
            kp[p] = page_of(a, seq, h, key0 / PAGE + p);
            vp[p] = kp[p] + a->l.k_words;
        }
        /* rows before the block's first key see none of it */
        int skip = imax(0, key0 - pos0) * a->group, live = r.n - skip;
        scores(&a->l, r.q + (size_t)skip * (size_t)a->l.hdw * KP, live, kp, n_pages,
               r.s + (size_t)skip * BLOCK);
        for (int i = skip; i < r.n; i++)
            softmax_step(a, &r, i, pos0 + i / a->group, key0);
        struct mk m = {.a = r.p + (size_t)skip * BLOCK,
                       .lda = BLOCK,
                       .b = vp,
                       .ldb = a->l.hdv,
                       .kw = words(keys),
                       .kw_page = V_ROWS,
                       .ldc = a->l.hdv,
                       .init = MK_ADD,
                       .scale = 1.0f};
        for (int d = 0; d < (int)a->l.hdv; d += NW) {
            const uint32_t *col[BLOCK_PAGES];
            for (int p = 0; p < n_pages; p++)
                col[p] = vp[p] + d;
            m.b = col;
            m.c = r.o + (size_t)skip * a->l.hdv + d;
            K(mk_rows)(&m, live, imin(NVMAX, ((int)a->l.hdv - d) / VW));
        }
    }
    store_rows(a, &r, sq, first, h);
}

/* Pages that a sequence's own rows are packed into. */
static size_t own_pages(const struct tb_attn_seq *sq)
{
    return sq->pages ? 0 : ((size_t)sq->n + PAGE - 1) / PAGE;
}

/* The sequences from the first on whose pages are packed at once; returns how many. */
static int attend(struct attn *a)
{
    struct tb_cpu *c = a->cpu;
    int nk = a->s->n_kv_head, n = 0;
    size_t list = (size_t)a->n_seqs + 1;
    char *mem = tb_scratch_get(&c->shared[0], list * (sizeof(size_t) + sizeof(int)));
    a->page_at = (size_t *)(void *)mem;
    a->first_task = (int *)(void *)(mem + list * sizeof(size_t));
    a->page_at[0] = 0;
    a->first_task[0] = 0;
    for (; n < a->n_seqs; n++) {
        size_t pages = a->page_at[n] + own_pages(&a->seqs[n]);
        if (n && pages > MANY_PAGES) break;
        a->page_at[n + 1] = pages;
        a->first_task[n + 1] = a->first_task[n] + (a->seqs[n].n + a->q_block - 1) / a->q_block * nk;
    }
    a->n_seqs = n;
    size_t pages = a->page_at[n];
    if (pages) {
        a->scratch = tb_scratch_get(&c->shared[1], pages * (size_t)nk * a->l.words * 4);
        tb_team_run(c->team, pack_task, a, (int)pages);
    }
    tb_team_run(c->team, attn_task, a, a->first_task[n]);
    return n;
}

static void attention(struct tb_backend *be, const struct tb_attn_shape *s,
                      const struct tb_attn_seq *seqs, int n_seqs, const void *q, const void *k,
                      const void *v, const void *kv_pages, void *out, float *lse)
{
    struct attn a = {.s = s,
                     .l = layout_of(s),
                     .group = s->n_head / s->n_kv_head,
                     .q_block = q_block_of(s),
                     .q = q,
                     .k = k,
                     .v = v,
                     .pool = (uint32_t *)(uintptr_t)kv_pages,
                     .out = out,
                     .lse = lse,
                     .cpu = tb_cpu(be)};
    for (int first = 0; first < n_seqs;) {
        a.seqs = seqs + first;
        a.n_seqs = n_seqs - first;
        first += attend(&a);
    }
}

/* ---- the page pool */

static size_t kv_page_bytes(const struct tb_backend *be, const struct tb_attn_shape *s)
{
    struct layout l = layout_of(s);
    return (size_t)s->n_kv_head * l.words * 4;
}

/* One position of one kv head. An even position also clears its partner's half of the value words,
 * so that what was in the page before is never multiplied (0 x NaN). */
static void write_position(const struct layout *l, uint32_t *page, int slot, const act_t *k,
                           const act_t *v)
{
    act_t *kp = (act_t *)(void *)page,
          *vp = (act_t *)(void *)(page + l->k_words + (size_t)(slot / KP) * l->hdv);
    if (l->hd % KP) {
        for (int j = 0; j < KP; j++)
            kp[(((size_t)l->hdw - 1) * PAGE + (size_t)slot) * KP + (size_t)j] = 0;
    }
    for (int d = 0; d < l->hd; d++)
        kp[((size_t)(d / KP) * PAGE + (size_t)slot) * KP + (size_t)(d % KP)] = k[d];
    if (slot % KP == 0) memset(vp, 0, l->hdv * 4);
    for (int d = 0; d < l->hd; d++)
        vp[(size_t)d * KP + (size_t)(slot % KP)] = v[d];
}

struct write {
    const struct tb_attn_shape *s;
    const struct tb_attn_seq *seqs;
    struct layout l;
    const act_t *k, *v;
    uint32_t *pool;
};

static void write_task(void *arg, int task, int thread)
{
    const struct write *w = arg;
    int nk = w->s->n_kv_head, h = task % nk;
    const struct tb_attn_seq *sq = w->seqs + task / nk;
    size_t ld = (size_t)nk * (size_t)w->l.hd;
    for (int t = 0; t < sq->n;) {
        int pos = sq->pos + t;
        uint32_t *page =
            w->pool + ((size_t)sq->pages[pos / PAGE] * (size_t)nk + (size_t)h) * w->l.words;
        size_t at = (size_t)(sq->row + t) * ld + (size_t)h * (size_t)w->l.hd;
        if (pos % PAGE == 0 && sq->n - t >= PAGE) {
            pack_keys(&w->l, w->k + at, ld, PAGE, page);
            pack_values(&w->l, w->v + at, ld, PAGE, page + w->l.k_words);
            t += PAGE;
        } else {
            write_position(&w->l, page, pos % PAGE, w->k + at, w->v + at);
            t++;
        }
    }
}

static void kv_write(struct tb_backend *be, const struct tb_attn_shape *s,
                     const struct tb_attn_seq *seqs, int n_seqs, const void *k, const void *v,
                     void *kv_pages)
{
    struct write w = {s, seqs, layout_of(s), k, v, kv_pages};
    int total = 0;
    for (int i = 0; i < n_seqs; i++)
        total += seqs[i].n;
    if (total <= 4) { /* decoding a few: not worth waking anyone */
        for (int i = 0; i < n_seqs * s->n_kv_head; i++)
            write_task(&w, i, 0);
        return;
    }
    tb_team_run(tb_cpu(be)->team, write_task, &w, n_seqs * s->n_kv_head);
}

/* No more sequences than rows. */
void K(attn_needs)(const struct tb_pass_size *size, struct tb_needs *n)
{
    const struct tb_attn_shape *s = &size->attn;
    struct layout l = layout_of(s);
    struct rows_state r = {.n = q_block_of(s) * (s->n_head / s->n_kv_head)};
    int pages = imax(MANY_PAGES, (size->rows + PAGE - 1) / PAGE);
    tb_need(&n->own, lay_out(&r, &l, NULL));
    tb_need(&n->shared[0], ((size_t)size->rows + 1) * (sizeof(size_t) + sizeof(int)));
    tb_need(&n->shared[1], (size_t)pages * (size_t)s->n_kv_head * l.words * 4);
}

void K(attn_ops)(struct tb_backend_ops *o)
{
    o->attention = attention;
    o->kv_page_bytes = kv_page_bytes;
    o->kv_write = kv_write;
}
