/*
 * One step of sampling: choose the sequences that advance and find them pages, run their rows as
 * one packed pass, draw tokens and score prompts from the head's rows. See model.h and sampling.h.
 *
 * Sequences that decode advance by a row each; the rows for prompts are shared equally by the
 * tenants that have prompts, so a hundred long ones of one tenant do not hold up a short one of
 * another.
 *
 * Running sequences take pages in a fixed order of precedence: older sampling first, prompt before
 * samples, lower sample first. One that decodes may take the pages of one that comes later, which
 * is then computed again from its tokens. A waiting one only takes free pages, tenants with few
 * pages first, and nobody who waits overtakes it. Pages that are kept for later prompts and not in
 * use are as good as free. So the first running sequence advances, and with nobody running the
 * first waiting one fits.
 *
 * Weights of samplings are in memory for the length of a step. When there is no room for all of
 * them, some leave the step out, first those that hold no pages, of these the latest; and a step
 * has as many rows as its buffers find room.
 *
 * Owner: struct step lives for one call. Thread: the model's.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/pass.h"
#include "model/sampling.h"
#include "model/train.h"
#include "util/mem.h"
#include "util/philox.h"

#define TB_FEW_ROWS   256 /* of prompts: who has room for them is not left out */
#define TB_ALT_STREAM 1   /* Philox stream of prompt_alt_tokens; 0 draws the samples */

struct entry { /* a sequence's rows in this step */
    struct tb_seq *q;
    int n;     /* rows */
    int row;   /* first packed row */
    int order; /* of choice */
    bool last; /* reaches its last token: a draw follows */
};

struct out_row { /* a row whose logits are wanted */
    struct tb_seq *q;
    int row; /* packed */
    int pos; /* position in the sequence */
};

struct fill { /* a sequence with more to compute than the token it drew last */
    struct tb_seq *q;
    int order, n; /* of precedence; rows granted */
};

struct turn { /* a tenant's fills */
    struct fill *next, *end;
    int n_held; /* pages of its sequences */
};

struct step {
    struct tb_model *m;
    int budget;  /* prefill rows */
    int rows;    /* in all, at most */
    int n_ready; /* samplings whose weights are held, and their largest rank */
    int ru;
    int n_running; /* sequences that hold pages */
    int n_fills, cap_fills, n_turns;
    struct fill *fills;
    struct turn *turns; /* [n_turns] */
    int n, cap;
    struct entry *entries;
    int T;
    int32_t *tokens, *pos;
    struct tb_attn_seq *seqs;
    struct tb_lora_rows *lora, *out_lora;
    int n_out; /* rows with logits: those that score a prompt, then n_single that draw one token
                  each, then ends of prompts with several samples */
    int n_score, n_single;
    struct out_row *out;
    struct tb_draw *draws; /* [head_rows] */
    int32_t *drawn;        /* [head_rows] */
    float *lse, *lp;       /* [head_rows] */
    int32_t *k_ids;        /* [TB_MAX(k)] scratch */
    float *k_lps;
    bool edits_logits; /* some draw does; then there is also */
    float *edit_row;   /* device [vocab]: a row's copy to change */
    struct tb_logit_edit *edits;
    int32_t *edit_at; /* [vocab]: 1 + an id's place in edits, or 0 */
    uint64_t *allow;  /* [vocab / 64 + 1] */
};

/* ---- pages */

/* The last running sequence in the order of precedence, if it comes after q. */
static struct tb_seq *find_victim(struct tb_model *m, const struct tb_seq *q)
{
    for (struct tb_list *it = m->samplings.prev; it != &m->samplings; it = it->prev) {
        struct tb_sampling *s = TB_LIST_ENTRY(it, struct tb_sampling, node);
        for (int i = s->req->n_samples - 1; i >= -1; i--) {
            struct tb_seq *v = i < 0 ? &s->root : &s->seqs[i];
            if (v == q) return NULL;
            if (v->state == TB_SEQ_RUNNING && v->n_pages) return v;
        }
    }
    return NULL;
}

static int32_t take_page(struct tb_model *m, const struct tb_seq *q)
{
    for (;;) {
        int32_t page = tb_kv_take(&m->kv);
        struct tb_seq *v = page < 0 ? find_victim(m, q) : NULL;
        if (!v) return page;
        tb_seq_release(v);
        v->state = TB_SEQ_WAITING;
        m->kv.n_preempted++;
    }
}

/* Pages for the next n positions of a running sequence, the first of them its own. */
static bool need_pages(struct tb_model *m, struct tb_seq *q, int n)
{
    int first = q->n_kv / TB_KV_PAGE, want = tb_kv_pages_for((int64_t)q->n_kv + n);
    if (!tb_seq_reserve_pages(q, want)) return false;
    if (first < q->n_pages && m->kv.refs[q->pages[first]] > 1) {
        int32_t page = take_page(m, q);
        if (page < 0) return false;
        int32_t old = q->pages[first];
        if (m->kv.refs[old] == 1) { /* whoever shared it was sent away */
            tb_kv_unref(&m->kv, page);
        } else {
            tb_kv_copy_page(&m->kv, m, page, old);
            tb_kv_unref(&m->kv, old);
            q->pages[first] = page;
        }
    }
    while (q->n_pages < want) {
        int32_t page = take_page(m, q);
        if (page < 0) return false;
        q->pages[q->n_pages++] = page;
    }
    return true;
}

/* Whether the next full page of a waiting prompt, after those that it has found, is being computed
 * for another prompt: then it is worth waiting for. */
static bool page_is_coming(const struct tb_model *m, const struct tb_seq *q, int limit)
{
    int at = q->n_pages, end = (at + 1) * TB_KV_PAGE;
    if (end > limit || m->kv.no_reuse) return false;
    TB_LIST_FOREACH (it, &m->samplings) {
        const struct tb_sampling *s = TB_LIST_ENTRY(it, struct tb_sampling, node);
        const struct tb_seq *r = &s->root;
        if (r->state != TB_SEQ_RUNNING || s->forked || s->version != q->s->version ||
            s->op->tenant != q->s->op->tenant)
            continue;
        if (r->n_kv >= end || s->n_prompt < end || (at && r->pages[at - 1] != q->pages[at - 1]))
            continue;
        if (!memcmp(s->req->prompt + at * TB_KV_PAGE, q->s->req->prompt + at * TB_KV_PAGE,
                    TB_KV_PAGE * sizeof(*s->req->prompt)))
            return true;
    }
    return false;
}

enum admission { ADMITTED, LATER, NO_ROOM };

/* Gives a waiting sequence all pages of its tokens, kept ones as far as they hold its tokens and
 * the rest from the free ones, leaving those that run one each. The rows from the first scored one
 * on, or the last row, are computed in any case. */
static enum admission admit(struct tb_model *m, struct tb_seq *q, int n_running)
{
    int want = tb_kv_pages_for(tb_seq_tokens(q));
    int limit = q->index < 0 ? q->s->score_from : tb_seq_tokens(q) - 1;
    if (!tb_seq_reserve_pages(q, want)) return NO_ROOM;
    tb_seq_find_pages(q, limit);
    int fresh = want - q->n_pages, room = tb_kv_room(&m->kv);
    bool later = q->index < 0 && page_is_coming(m, q, limit);
    if (later || (room < fresh + n_running && !(n_running == 0 && room >= fresh))) {
        tb_seq_release(q);
        return later ? LATER : NO_ROOM;
    }
    while (q->n_pages < want)
        q->pages[q->n_pages++] = tb_kv_take(&m->kv);
    q->state = TB_SEQ_RUNNING;
    if (!q->s->admitted) {
        q->s->op->result.prompt_cache_hit_tokens = q->n_kv;
        m->kv.n_hit_tokens += q->n_kv;
        m->kv.n_lookup_tokens += q->s->n_prompt;
    }
    q->s->admitted = true;
    return ADMITTED;
}

/* ---- weights */

/* Buffers of a step of T rows. */
static size_t step_bytes(struct tb_model *m, int T, int ru)
{
    return tb_pass_bytes(m, TB_PASS_INFER, false, T, ru) + (size_t)m->cfg.vocab * sizeof(float);
}

static bool holds_pages(const struct tb_sampling *s)
{
    if (s->root.n_pages) return true;
    for (int i = 0; i < s->req->n_samples; i++)
        if (s->seqs[i].n_pages) return true;
    return false;
}

/* Holds a sampling's weights beside those held before, if there is room for the rows too; the first
 * one fails when it cannot. */
static void hold_one(struct step *st, struct tb_sampling *s)
{
    struct tb_backend *be = st->m->be;
    struct tb_error err = {0};
    if (s->version) {
        int ru = TB_MAX(st->ru, s->version->layout->config.rank);
        size_t need = tb_version_idle_bytes(s->version), room = tb_backend_room(be);
        int rows = st->rows - st->budget + TB_MIN(st->budget, TB_FEW_ROWS);
        if (st->n_ready && need && room < SIZE_MAX &&
            (need > room || step_bytes(st->m, rows, ru) > room - need))
            return;
        if (tb_version_hold(s->version, &err)) {
            tb_sampling_fail(s, err.code, err.msg);
            return;
        }
        st->ru = ru;
    }
    s->ready = true;
    st->rows += s->req->n_samples;
    st->n_ready++;
}

/* Holds the weights of as many samplings as there is room for, those with pages first, else in the
 * order of precedence, and decides how many rows the step may have. */
static void hold_weights(struct step *st)
{
    struct tb_model *m = st->m;
    bool blocked = false;
    st->rows = st->budget;
    TB_LIST_FOREACH (it, &m->samplings) {
        struct tb_sampling *s = TB_LIST_ENTRY(it, struct tb_sampling, node);
        if (s->chosen && !s->done && holds_pages(s)) hold_one(st, s);
    }
    TB_LIST_FOREACH (it, &m->samplings) {
        struct tb_sampling *s = TB_LIST_ENTRY(it, struct tb_sampling, node);
        if (!s->chosen || s->done || s->ready || blocked || holds_pages(s)) continue;
        hold_one(st, s);
        blocked = !s->ready && !s->done; /* nobody who waits overtakes it */
    }
    size_t room = tb_backend_room(m->be);
    while (st->rows > 1 && room < SIZE_MAX && step_bytes(m, st->rows, st->ru) > room)
        st->rows /= 2;
}

static void release_weights(struct tb_sampling *const *s, int n)
{
    for (int i = 0; i < n; i++) {
        if (s[i]->ready && s[i]->version) tb_version_release(s[i]->version);
        s[i]->ready = false;
    }
}

/* ---- choosing */

static void add_entry(struct step *st, struct tb_seq *q, int n)
{
    if (st->n == st->cap) {
        st->cap = st->cap ? st->cap * 2 : 64;
        st->entries = tb_realloc(st->entries, (size_t)st->cap * sizeof(*st->entries));
    }
    st->entries[st->n] =
        (struct entry){.q = q, .n = n, .order = st->n, .last = q->n_kv + n == tb_seq_tokens(q)};
    st->n++;
    st->T += n;
}

/* Calls fn for what may advance in this step: prompts, then their samples, in the order of
 * precedence. */
static void for_each_open(struct step *st, void (*fn)(struct step *st, struct tb_seq *q))
{
    TB_LIST_FOREACH (it, &st->m->samplings) {
        struct tb_sampling *s = TB_LIST_ENTRY(it, struct tb_sampling, node);
        if (!s->ready || s->done) continue;
        if (!s->forked) fn(st, &s->root);
        for (int i = 0; s->forked && i < s->req->n_samples; i++)
            if (s->seqs[i].state != TB_SEQ_DONE) fn(st, &s->seqs[i]);
    }
}

static bool decodes(const struct tb_seq *q)
{
    return q->state == TB_SEQ_RUNNING && q->n_kv > 0 && tb_seq_tokens(q) - q->n_kv == 1;
}

static void add_decode(struct step *st, struct tb_seq *q)
{
    if (decodes(q) && st->T < st->rows && need_pages(st->m, q, 1)) add_entry(st, q, 1);
}

static void add_fill(struct step *st, struct tb_seq *q)
{
    if (q->state == TB_SEQ_RUNNING) st->n_running++;
    if (decodes(q)) return;
    if (st->n_fills == st->cap_fills) {
        st->cap_fills = st->cap_fills ? st->cap_fills * 2 : 64;
        st->fills = tb_realloc(st->fills, (size_t)st->cap_fills * sizeof(*st->fills));
    }
    st->fills[st->n_fills] = (struct fill){q, st->n_fills, 0};
    st->n_fills++;
}

static uint64_t tenant_of(const struct tb_seq *q)
{
    return q->s->op->share;
}

/* By tenant; of one tenant those that run first, then the oldest. */
static int by_tenant(const void *a, const void *b)
{
    const struct fill *x = a, *y = b;
    if (tenant_of(x->q) != tenant_of(y->q)) return tenant_of(x->q) < tenant_of(y->q) ? -1 : 1;
    bool wx = x->q->state == TB_SEQ_WAITING, wy = y->q->state == TB_SEQ_WAITING;
    return wx != wy ? wx - wy : x->order - y->order;
}

static void add_held(struct step *st, struct tb_seq *q)
{
    for (int i = 0; i < st->n_turns; i++)
        if (tenant_of(st->turns[i].next->q) == tenant_of(q)) st->turns[i].n_held += q->n_pages;
}

/* Whoever holds the fewest pages comes first, so that tenants get pages in turn. */
static int by_held(const void *a, const void *b)
{
    const struct turn *x = a, *y = b;
    return x->n_held != y->n_held ? x->n_held - y->n_held : x->next->order - y->next->order;
}

/* Grants a tenant up to n rows; returns how many it took. */
static int grant(struct step *st, struct turn *t, int n, bool *no_room)
{
    int left = n;
    while (left > 0 && t->next < t->end) {
        struct fill *f = t->next;
        enum admission a = ADMITTED;
        if (f->q->state == TB_SEQ_WAITING) {
            a = *no_room ? NO_ROOM : admit(st->m, f->q, st->n_running);
            *no_room |= a == NO_ROOM;
            st->n_running += a == ADMITTED;
        }
        int pending = tb_seq_tokens(f->q) - f->q->n_kv - f->n;
        int rows = a == ADMITTED ? TB_MIN(pending, left) : 0;
        f->n += rows;
        left -= rows;
        if (rows < pending && a == ADMITTED) break;
        t->next++;
    }
    return n - left;
}

/* Shares the step's prefill rows: every tenant with tokens to compute gets the same part, and what
 * one does not need goes to the others. Of one tenant the oldest comes first. When a sequence has
 * to wait for pages, none that waits overtakes it. */
static void share_rows(struct step *st)
{
    bool no_room = false;
    qsort(st->fills, (size_t)st->n_fills, sizeof(*st->fills), by_tenant);
    st->turns = tb_calloc((size_t)st->n_fills, sizeof(*st->turns));
    for (int i = 0; i < st->n_fills; i++) {
        struct turn *last = st->n_turns ? &st->turns[st->n_turns - 1] : NULL;
        if (!last || tenant_of(last->next->q) != tenant_of(st->fills[i].q)) {
            last = &st->turns[st->n_turns++];
            last->next = &st->fills[i];
        }
        last->end = &st->fills[i + 1];
    }
    for_each_open(st, add_held);
    qsort(st->turns, (size_t)st->n_turns, sizeof(*st->turns), by_held);
    for (int left = TB_MIN(st->budget, st->rows - st->T), took = 1; left > 0 && took > 0;) {
        int n_open = 0;
        for (int i = 0; i < st->n_turns; i++)
            n_open += st->turns[i].next < st->turns[i].end;
        int part = n_open ? TB_MAX(left / n_open, 1) : 0;
        took = 0;
        for (int i = 0; i < st->n_turns && took < left; i++)
            took += grant(st, &st->turns[i], TB_MIN(part, left - took), &no_room);
        left -= took;
    }
}

/* Those that decode come first; what is left of the prompts gets the prefill rows. A
 * prompt that runs has all its pages, so nothing after the decoding ones takes pages from anybody.
 */
static void choose(struct step *st)
{
    for_each_open(st, add_decode);
    for_each_open(st, add_fill);
    if (st->n_fills) share_rows(st);
    for (int i = 0; i < st->n_fills; i++)
        if (st->fills[i].n) add_entry(st, st->fills[i].q, st->fills[i].n);
}

/* Entries of one version next to each other: fewer, longer LoRA runs. */
static int by_version(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;
    uintptr_t vx = (uintptr_t)x->q->s->version, vy = (uintptr_t)y->q->s->version;
    if (vx != vy) return vx < vy ? -1 : 1;
    return (x->order > y->order) - (x->order < y->order);
}

/* ---- packing */

static bool edits_logits(const struct tb_sample *r)
{
    return r->filter || r->n_logit_bias || r->presence_penalty || r->frequency_penalty ||
           (r->repetition_penalty && r->repetition_penalty != 1);
}

static int alloc_edits(struct step *st)
{
    size_t V = (size_t)st->m->cfg.vocab;
    st->edit_row = st->m->be->ops->alloc(st->m->be, V * sizeof(*st->edit_row));
    st->edits = tb_try_malloc(V * sizeof(*st->edits));
    st->edit_at = tb_try_calloc(V, sizeof(*st->edit_at));
    st->allow = tb_try_malloc((V / 64 + 1) * sizeof(*st->allow));
    return st->edit_row && st->edits && st->edit_at && st->allow ? 0 : TB_ENOMEM;
}

static int alloc_step(struct step *st)
{
    size_t T = (size_t)st->T, n = (size_t)st->n, R = (size_t)st->m->head_rows, k = 1;
    for (int i = 0; i < st->n; i++) {
        const struct tb_sample *r = st->entries[i].q->s->req;
        st->edits_logits |= st->entries[i].last && edits_logits(r);
        k = TB_MAX(k, (size_t)r->topk_prompt_logprobs);
        k = TB_MAX(k, (size_t)r->topk_sample_logprobs);
        k = TB_MAX(k, (size_t)r->prompt_alt_tokens_k);
        if (r->has_target_prompt_logprobs)
            k = TB_MAX(k, (size_t)r->target_prompt_logprobs.shape[1]);
    }
    st->tokens = tb_try_malloc(T * sizeof(*st->tokens));
    st->pos = tb_try_malloc(T * sizeof(*st->pos));
    st->seqs = tb_try_calloc(n, sizeof(*st->seqs));
    st->lora = tb_try_calloc(n, sizeof(*st->lora));
    st->out_lora = tb_try_calloc(T, sizeof(*st->out_lora));
    st->out = tb_try_calloc(T, sizeof(*st->out));
    st->draws = tb_try_calloc(R, sizeof(*st->draws));
    st->drawn = tb_try_calloc(R, sizeof(*st->drawn));
    st->lse = tb_try_calloc(R, sizeof(*st->lse));
    st->lp = tb_try_calloc(R, sizeof(*st->lp));
    st->k_ids = tb_try_calloc(k, sizeof(*st->k_ids));
    st->k_lps = tb_try_calloc(k, sizeof(*st->k_lps));
    bool ok = st->tokens && st->pos && st->seqs && st->lora && st->out_lora && st->out &&
              st->draws && st->drawn && st->lse && st->lp && st->k_ids && st->k_lps;
    if (!ok) return TB_ENOMEM;
    return st->edits_logits ? alloc_edits(st) : 0;
}

static void free_step(struct step *st)
{
    void *const all[] = {st->entries, st->tokens, st->pos,   st->seqs,  st->lora,    st->out_lora,
                         st->out,     st->draws,  st->drawn, st->lse,   st->lp,      st->k_ids,
                         st->k_lps,   st->fills,  st->turns, st->edits, st->edit_at, st->allow};
    if (st->edit_row)
        st->m->be->ops->free(st->m->be, st->edit_row,
                             (size_t)st->m->cfg.vocab * sizeof(*st->edit_row));
    for (size_t i = 0; i < TB_ARRAY_LEN(all); i++)
        tb_free(all[i]);
}

/* Adjacent rows of one version are one run. */
static void add_rows(struct tb_lora_rows *rows, int *n, int row, int count,
                     const struct tb_adapter_version *v)
{
    if (*n && rows[*n - 1].ver == v)
        rows[*n - 1].n += count;
    else
        rows[(*n)++] = (struct tb_lora_rows){row, count, v, NULL};
}

static int pack(struct step *st, struct tb_pass *p)
{
    int row = 0, n_lora = 0, far = 0;
    for (int i = 0; i < st->n; i++) {
        struct entry *e = &st->entries[i];
        const struct tb_adapter_version *v = e->q->s->version;
        e->row = row;
        for (int j = 0; j < e->n; j++) {
            st->tokens[row + j] = tb_seq_token(e->q, e->q->n_kv + j);
            st->pos[row + j] = e->q->n_kv + j;
        }
        st->seqs[i] =
            (struct tb_attn_seq){.row = row, .n = e->n, .pos = e->q->n_kv, .pages = e->q->pages};
        add_rows(st->lora, &n_lora, row, e->n, v);
        if (v) p->ru = TB_MAX(p->ru, v->layout->config.rank);
        far = TB_MAX(far, e->q->n_kv + e->n);
        row += e->n;
    }
    p->T = st->T;
    p->tokens = st->tokens;
    p->pos = st->pos;
    p->seqs = st->seqs;
    p->n_seqs = st->n;
    p->paged = true;
    p->lora = st->lora;
    p->n_lora = n_lora;
    return far;
}

/* One draw of one sample: a decode row, or the end of the prompt of a single sample. */
static struct tb_seq *single_draw(const struct entry *e)
{
    if (!e->last) return NULL;
    if (e->q->index >= 0) return e->q;
    return e->q->s->req->n_samples == 1 ? &e->q->s->seqs[0] : NULL;
}

/* Lists the rows that need logits and gathers their final norm into p->h. Scores come first: a
 * sample's last token may complete the op. */
static void gather_out(struct step *st, struct tb_pass *p)
{
    struct tb_model *m = st->m;
    for (int i = 0; i < st->n; i++) {
        const struct entry *e = &st->entries[i];
        const struct tb_sampling *s = e->q->s;
        int from = TB_MAX(s->score_from, e->q->n_kv),
            to = TB_MIN(s->n_prompt - 1, e->q->n_kv + e->n);
        for (int at = from; e->q->index < 0 && at < to; at++)
            st->out[st->n_out++] = (struct out_row){e->q, e->row + at - e->q->n_kv, at};
    }
    st->n_score = st->n_out;
    for (int i = 0; i < st->n; i++) {
        const struct entry *e = &st->entries[i];
        struct tb_seq *q = single_draw(e);
        if (q) st->out[st->n_out++] = (struct out_row){q, e->row + e->n - 1, e->q->n_kv + e->n - 1};
    }
    st->n_single = st->n_out - st->n_score;
    for (int i = 0; i < st->n; i++) {
        const struct entry *e = &st->entries[i];
        if (e->last && !single_draw(e))
            st->out[st->n_out++] = (struct out_row){e->q, e->row + e->n - 1, e->q->n_kv + e->n - 1};
    }
    size_t bytes = (size_t)m->cfg.hidden * tb_dtype_size(m->be->act);
    int n_lora = 0;
    for (int i = 0; i < st->n_out;) { /* stretches of adjacent rows at once */
        int k = 1;
        while (i + k < st->n_out && st->out[i + k].row == st->out[i].row + k)
            k++;
        m->be->ops->copy(m->be, (char *)p->h + (size_t)i * bytes,
                         (const char *)p->xn + (size_t)st->out[i].row * bytes, (size_t)k * bytes);
        for (int j = 0; j < k; j++)
            add_rows(st->out_lora, &n_lora, i + j, 1, st->out[i + j].q->s->version);
        i += k;
    }
    void *t = p->xn; /* tb_head_logits reads xn and lora */
    p->xn = p->h;
    p->h = t;
    p->lora = st->out_lora;
    p->n_lora = n_lora;
}

/* ---- what comes out of a block of logits */

static struct tb_draw draw_of(const struct tb_seq *q)
{
    const struct tb_sample *r = q->s->req;
    return (struct tb_draw){r->temperature, r->top_k, r->top_p,
                            tb_philox_draw(q->s->seed, (uint32_t)q->index, (uint32_t)q->n_gen, 0),
                            r->min_p};
}

static struct tb_logit_edit *edit_of(struct step *st, int32_t id, int *n)
{
    if (!st->edit_at[id]) {
        st->edits[*n] = (struct tb_logit_edit){.id = id, .repeat = 1};
        st->edit_at[id] = ++*n;
    }
    return &st->edits[st->edit_at[id] - 1];
}

/* Fills st->edits for the next token of q; returns how many. */
static int make_edits(struct step *st, const struct tb_seq *q)
{
    const struct tb_sample *r = q->s->req;
    int n = 0, total = tb_seq_tokens(q);
    for (int i = 0; i < r->n_logit_bias; i++)
        edit_of(st, r->logit_bias_tokens[i], &n)->bias = r->logit_bias[i];
    if (r->repetition_penalty && r->repetition_penalty != 1) {
        int from = r->repetition_last_n ? TB_MAX(total - r->repetition_last_n, 0) : 0;
        for (int at = from; at < total; at++)
            edit_of(st, tb_seq_token(q, at), &n)->repeat = r->repetition_penalty;
    }
    if (r->presence_penalty || r->frequency_penalty) {
        for (int i = 0; i < q->n_gen; i++)
            edit_of(st, q->gen[i], &n)->minus += 1;
        for (int i = 0; i < n; i++)
            if (st->edits[i].minus > 0)
                st->edits[i].minus =
                    r->presence_penalty + r->frequency_penalty * st->edits[i].minus;
    }
    for (int i = 0; i < n; i++)
        st->edit_at[st->edits[i].id] = 0;
    return n;
}

/* Fills st->allow from the op's filter; false when the op has failed. */
static bool make_allow(struct step *st, const struct tb_seq *q)
{
    const struct tb_model *m = st->m;
    struct tb_token_filter *f = q->s->req->filter;
    size_t words = (size_t)(m->cfg.vocab + 63) / 64;
    bool may_end = false, any = false;
    const uint64_t *mask = f->mask(f, q->filter_state, q->s->max_tokens - q->n_gen, &may_end);
    if (!mask) {
        tb_sampling_fail(q->s, TB_ENOMEM,
                         "the states of the sample's grammar take more than they may");
        return false;
    }
    memcpy(st->allow, mask, words * sizeof(*mask));
    for (int i = 0; may_end && q->s->eos_stops && i < m->info.n_eos; i++)
        if (m->eos[i] < m->cfg.vocab) st->allow[m->eos[i] / 64] |= (uint64_t)1 << (m->eos[i] % 64);
    for (size_t i = 0; i < words; i++)
        any |= st->allow[i] != 0;
    if (!any) tb_sampling_fail(q->s, TB_EINVAL, "the sample's grammar allows no token");
    return any;
}

/* Draws q's next token from a changed copy of its row; nothing when the op has failed. */
static void draw_edited(struct step *st, const struct tb_seq *q, const float *logits,
                        const struct tb_draw *d, int32_t *token)
{
    const struct tb_backend_ops *ops = st->m->be->ops;
    int V = st->m->cfg.vocab;
    bool filter = q->s->req->filter != NULL;
    if (filter && !make_allow(st, q)) return;
    int n = make_edits(st, q);
    ops->copy(st->m->be, st->edit_row, logits, (size_t)V * sizeof(*logits));
    ops->edit_logits(st->m->be, st->edit_row, V, st->edits, n, filter ? st->allow : NULL);
    ops->draw(st->m->be, st->edit_row, 1, V, V, d, token);
}

/* The k best of one row, padded where the vocabulary is smaller. */
static void topk_row(struct step *st, const float *logits, const float *lse, int k, int32_t *ids,
                     float *lps)
{
    int V = st->m->cfg.vocab, n = TB_MIN(k, V);
    st->m->be->ops->topk(st->m->be, logits, 1, V, V, lse, n, ids, lps);
    for (int i = n; i < k; i++) {
        ids[i] = 0;
        lps[i] = -99999.0f;
    }
}

static void accept(struct step *st, struct tb_seq *q, int32_t token, float lp, const float *logits,
                   const float *lse)
{
    int k = q->s->req->topk_sample_logprobs;
    if (k) topk_row(st, logits, lse, k, st->k_ids, st->k_lps);
    if (st->m->be->lost) return; /* these are no results */
    tb_seq_accept(q, token, lp, st->k_ids, st->k_lps);
}

/* Row `pos` of a prompt scores the token after it. */
static void score_prompt(struct step *st, const struct out_row *o, const float *logits,
                         const float *lse, float lp)
{
    const struct tb_sampling *s = o->q->s;
    const struct tb_sample *r = s->req;
    struct tb_result *out = &s->op->result;
    const struct tb_backend_ops *ops = st->m->be->ops;
    int V = st->m->cfg.vocab;
    size_t at = (size_t)o->pos;
    float scratch;
    bool wanted =
        !r->prompt_logprobs_last_n || o->pos + 1 >= r->n_prompt - r->prompt_logprobs_last_n;
    if (out->prompt_logprobs && wanted) out->prompt_logprobs[at + 1] = lp;
    if (out->topk_prompt_ids) {
        size_t k = (size_t)r->topk_prompt_logprobs;
        topk_row(st, logits, lse, (int)k, out->topk_prompt_ids + (at + 1) * k,
                 out->topk_prompt_logprobs + (at + 1) * k);
    }
    if (out->target_prompt_logprobs) {
        size_t K = (size_t)r->target_prompt_logprobs.shape[1];
        for (size_t j = 0; j < K; j++)
            st->k_ids[j] = (int32_t)r->target_prompt_logprobs.data.i64[at * K + j];
        ops->logprobs(st->m->be, logits, 1, V, V, st->k_ids, (int)K, &scratch,
                      out->target_prompt_logprobs + at * K);
    }
    if (out->alt_tokens) {
        size_t k = (size_t)r->prompt_alt_tokens_k;
        int32_t *ids = out->alt_tokens + at * k;
        for (size_t j = 0; j < k; j++) {
            struct tb_draw d = {
                r->temperature, -1, 1,
                tb_philox_draw(s->seed, (uint32_t)j, (uint32_t)(at + 1), TB_ALT_STREAM)};
            ops->draw(st->m->be, logits, 1, V, V, &d, ids + j);
        }
        ops->logprobs(st->m->be, logits, 1, V, V, ids, (int)k, &scratch,
                      out->alt_logprobs + at * k);
    }
}

/* The end of a prompt with several samples: one draw each from the same row. */
static void first_draws(struct step *st, struct tb_sampling *s, const float *logits,
                        const float *lse)
{
    const struct tb_backend_ops *ops = st->m->be->ops;
    int V = st->m->cfg.vocab;
    for (int i = 0; i < s->req->n_samples && !s->done; i++) {
        struct tb_draw d = draw_of(&s->seqs[i]);
        int32_t token = 0;
        float scratch, lp;
        if (edits_logits(s->req))
            draw_edited(st, &s->seqs[i], logits, &d, &token);
        else
            ops->draw(st->m->be, logits, 1, V, V, &d, &token);
        ops->logprobs(st->m->be, logits, 1, V, V, &token, 1, &scratch, &lp);
        accept(st, &s->seqs[i], token, lp, logits, lse);
    }
}

static void run_block(struct step *st, struct tb_pass *p, int from, int n)
{
    const struct tb_backend_ops *ops = st->m->be->ops;
    int V = st->m->cfg.vocab;
    /* The block's rows [d0, d1) draw one token each. */
    int d0 = TB_MIN(TB_MAX(st->n_score - from, 0), n);
    int d1 = TB_MIN(TB_MAX(st->n_score + st->n_single - from, 0), n);
    tb_head_logits(p, from, n);
    for (int i = d0; i < d1; i++)
        st->draws[i] = draw_of(st->out[from + i].q);
    if (d1 > d0)
        ops->draw(st->m->be, p->logits + (size_t)d0 * (size_t)V, d1 - d0, V, V, st->draws + d0,
                  st->drawn + d0);
    for (int i = d0; i < d1; i++) {
        const struct tb_seq *q = st->out[from + i].q;
        if (edits_logits(q->s->req) && !q->s->done)
            draw_edited(st, q, p->logits + (size_t)i * (size_t)V, &st->draws[i], &st->drawn[i]);
    }
    for (int i = 0; i < d0; i++) {
        const struct out_row *o = &st->out[from + i];
        st->drawn[i] = o->q->s->req->prompt[o->pos + 1];
    }
    for (int i = d1; i < n; i++)
        st->drawn[i] = -1;
    ops->logprobs(st->m->be, p->logits, n, V, V, st->drawn, 1, st->lse, st->lp);
    for (int i = 0; i < n; i++) {
        struct out_row *o = &st->out[from + i];
        const float *row = p->logits + (size_t)i * (size_t)V;
        if (o->q->s->done || st->m->be->lost) continue;
        if (!isfinite(st->lse[i]))
            tb_sampling_fail(o->q->s, TB_ENONFINITE, "the model's logits are not finite");
        else if (i < d0)
            score_prompt(st, o, row, &st->lse[i], st->lp[i]);
        else if (i < d1)
            accept(st, o->q, st->drawn[i], st->lp[i], row, &st->lse[i]);
        else
            first_draws(st, o->q->s, row, &st->lse[i]);
    }
}

/* The rows through all layers and the final norm. */
static void queue_layers(void *arg)
{
    struct tb_pass *p = arg;
    struct tb_model *m = p->m;
    tb_pass_forward(p);
    m->be->ops->rmsnorm(m->be, p->x[m->cfg.n_layers], m->norm, p->T, m->cfg.hidden, m->cfg.norm_eps,
                        p->xn, NULL);
}

/* Runs the chosen rows and moves every sequence on. */
static int run(struct step *st, struct tb_error *err)
{
    struct tb_model *m = st->m;
    struct tb_pass p = {.m = m, .kind = TB_PASS_INFER};
    qsort(st->entries, (size_t)st->n, sizeof(*st->entries), by_version);
    if (alloc_step(st))
        return tb_error_set(err, TB_ENOMEM, "no memory for a step of %d rows", st->T);
    int rc = tb_model_need_rope(m, pack(st, &p), err);
    if (!rc) rc = tb_pass_init(&p, &m->sample_ws, false, err);
    if (rc) goto out;
    if (st->T == st->n) /* all decode */
        tb_backend_step(m->be, p.T, queue_layers, &p);
    else
        queue_layers(&p);
    gather_out(st, &p);
    for (int i = 0; i < st->n; i++) {
        st->entries[i].q->n_kv += st->entries[i].n;
        tb_seq_keep_pages(st->entries[i].q);
    }
    for (int i = 0; i < st->n_out; i += m->head_rows)
        run_block(st, &p, i, TB_MIN(m->head_rows, st->n_out - i));
    for (int i = 0; i < st->n; i++) {
        struct tb_sampling *s = st->entries[i].q->s;
        if (st->entries[i].q->index < 0 && st->entries[i].last && !s->forked) {
            if (s->done) {
                tb_seq_release(&s->root);
                s->root.state = TB_SEQ_DONE;
            } else {
                tb_sampling_fork(s);
            }
        }
    }
    rc = m->be->ops->sync(m->be, err);
    if (rc) m->kv.no_reuse = true; /* who knows what the pages hold */
out:
    tb_pass_fini(&p);
    return rc;
}

int tb_model_sample_step(struct tb_model *m, struct tb_sampling *const *s, int n,
                         int prefill_budget, int *n_rows, struct tb_error *err)
{
    struct tb_error e = {0};
    int rc = 0;
    *n_rows = 0;
    tb_backend_use(m->be, TB_QUEUE_SAMPLE);
    for (int i = 0; i < n; i++)
        s[i]->chosen = true;
    do { /* again for those that left a failed step out */
        struct step st = {.m = m, .budget = prefill_budget};
        hold_weights(&st);
        choose(&st);
        rc = st.n ? run(&st, &e) : 0;
        if (!rc) *n_rows = st.T;
        for (int i = 0; i < n && rc; i++)
            if (s[i]->ready || rc == TB_EDEVICE) tb_sampling_fail(s[i], rc, e.msg);
        release_weights(s, n);
        free_step(&st);
    } while (rc && rc != TB_EDEVICE);
    for (int i = 0; i < n; i++)
        s[i]->chosen = false;
    tb_backend_use(m->be, TB_QUEUE_TRAIN);
    return rc == TB_EDEVICE ? tb_error_set(err, rc, "%s", e.msg) : 0;
}
