/*
 * One step of sampling: what advances is chosen, its rows run as one packed pass, and tokens are
 * drawn and prompts scored from the head's rows. See model.h and sampling.h.
 *
 * Owner: struct tb_step lives for one call. Thread: the model's.
 */
#include <stdlib.h>

#include "model/sample_step.h"
#include "util/mem.h"

/* Entries of one version next to each other: fewer, longer LoRA runs. */
static int by_version(const void *a, const void *b)
{
    const struct tb_step_entry *x = a, *y = b;
    uintptr_t vx = (uintptr_t)x->q->s->version, vy = (uintptr_t)y->q->s->version;
    if (vx != vy) return vx < vy ? -1 : 1;
    return (x->order > y->order) - (x->order < y->order);
}

/* ---- packing */

static int alloc_edits(struct tb_step *st)
{
    size_t V = (size_t)st->m->cfg.vocab;
    st->edits = tb_try_malloc(V * sizeof(*st->edits));
    st->edit_at = tb_try_calloc(V, sizeof(*st->edit_at));
    st->allow = tb_try_malloc((V / 64 + 1) * sizeof(*st->allow));
    return st->edits && st->edit_at && st->allow ? 0 : TB_ENOMEM;
}

static int alloc_step(struct tb_step *st)
{
    size_t T = (size_t)st->T, n = (size_t)st->n, R = (size_t)st->m->head_rows, k = 1;
    for (int i = 0; i < st->n; i++) {
        const struct tb_sample *r = st->entries[i].q->s->req;
        st->edits_logits |= st->entries[i].last && tb_step_edits_logits(r);
        k = TB_MAX(k, (size_t)r->topk_prompt_logprobs);
        k = TB_MAX(k, (size_t)r->topk_sample_logprobs);
        st->top = TB_MAX(st->top, TB_MIN(r->topk_sample_logprobs, st->m->cfg.vocab));
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
    st->top_ids = tb_try_calloc(R * (size_t)st->top + 1, sizeof(*st->top_ids));
    st->top_lps = tb_try_calloc(R * (size_t)st->top + 1, sizeof(*st->top_lps));
    bool ok = st->tokens && st->pos && st->seqs && st->lora && st->out_lora && st->out &&
              st->draws && st->drawn && st->lse && st->lp && st->k_ids && st->k_lps &&
              st->top_ids && st->top_lps;
    if (!ok) return TB_ENOMEM;
    return st->edits_logits ? alloc_edits(st) : 0;
}

static void free_step(struct tb_step *st)
{
    void *const all[] = {st->entries,  st->tokens, st->pos,   st->seqs,    st->lora,
                         st->out_lora, st->out,    st->draws, st->drawn,   st->lse,
                         st->lp,       st->k_ids,  st->k_lps, st->top_ids, st->top_lps,
                         st->fills,    st->turns,  st->edits, st->edit_at, st->allow};
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

static int pack(struct tb_step *st, struct tb_pass *p)
{
    int row = 0, n_lora = 0, far = 0;
    for (int i = 0; i < st->n; i++) {
        struct tb_step_entry *e = &st->entries[i];
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
static struct tb_seq *single_draw(const struct tb_step_entry *e)
{
    if (!e->last) return NULL;
    if (e->q->index >= 0) return e->q;
    return e->q->s->req->n_samples == 1 ? &e->q->s->seqs[0] : NULL;
}

/* Lists the rows that need logits and gathers their final norm into p->h. Scores come first: a
 * sample's last token may complete the op. */
static void gather_out(struct tb_step *st, struct tb_pass *p)
{
    struct tb_model *m = st->m;
    for (int i = 0; i < st->n; i++) {
        const struct tb_step_entry *e = &st->entries[i];
        const struct tb_sampling *s = e->q->s;
        int from = TB_MAX(s->score_from, e->q->n_kv),
            to = TB_MIN(s->n_prompt - 1, e->q->n_kv + e->n);
        for (int at = from; e->q->index < 0 && at < to; at++)
            st->out[st->n_out++] = (struct tb_step_row){e->q, e->row + at - e->q->n_kv, at};
    }
    st->n_score = st->n_out;
    for (int i = 0; i < st->n; i++) {
        const struct tb_step_entry *e = &st->entries[i];
        struct tb_seq *q = single_draw(e);
        if (q)
            st->out[st->n_out++] =
                (struct tb_step_row){q, e->row + e->n - 1, e->q->n_kv + e->n - 1};
    }
    st->n_single = st->n_out - st->n_score;
    for (int i = 0; i < st->n; i++) {
        const struct tb_step_entry *e = &st->entries[i];
        if (e->last && !single_draw(e))
            st->out[st->n_out++] =
                (struct tb_step_row){e->q, e->row + e->n - 1, e->q->n_kv + e->n - 1};
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

/* ---- running */

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
static int run(struct tb_step *st, struct tb_error *err)
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
        tb_step_block(st, &p, i, TB_MIN(m->head_rows, st->n_out - i));
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
        struct tb_step st = {.m = m, .budget = prefill_budget};
        tb_step_hold_weights(&st);
        tb_step_choose(&st);
        rc = st.n ? run(&st, &e) : 0;
        if (!rc) *n_rows = st.T;
        for (int i = 0; i < n && rc; i++)
            if (s[i]->ready || rc == TB_EDEVICE) tb_sampling_fail(s[i], rc, e.msg);
        tb_step_release_weights(s, n);
        free_step(&st);
    } while (rc && rc != TB_EDEVICE);
    for (int i = 0; i < n; i++)
        s[i]->chosen = false;
    tb_backend_use(m->be, TB_QUEUE_TRAIN);
    return rc == TB_EDEVICE ? tb_error_set(err, rc, "%s", e.msg) : 0;
}
