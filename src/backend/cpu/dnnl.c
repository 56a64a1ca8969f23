/* oneDNN's matmul on our packed panels; see dnnl.h. */
#include "backend/cpu/dnnl.h"

#include <oneapi/dnnl/dnnl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define PANEL 64

void omp_set_num_threads(int n); /* <omp.h> is the compiler's own and not there for all of them */

#define N_SLOTS 64 /* shapes remembered by a thread; a model has about ten */

struct slot {
    int k, cols;
    size_t ldx, ldy;
    dnnl_primitive_t prim; /* NULL: the library does not take the shape */
    dnnl_memory_t x, w, y, scratch;
};

/* One a thread of the team. Scratch memory is ours, since the library's own belongs to the
 * operating system's thread that made the primitive, and the team's first thread is whoever calls
 * the backend. */
struct own {
    dnnl_stream_t stream;
    int n;
    struct slot slots[N_SLOTS];
};

struct tb_dnnl {
    enum tb_dtype act;
    dnnl_engine_t engine;
    pthread_mutex_t
        making; /* one primitive at a time: the library shares its parts between threads */
    int n_threads;
    struct own own[];
};

struct tb_dnnl *tb_dnnl_create(enum tb_dtype act, int n_threads)
{
    struct tb_dnnl *d = calloc(1, sizeof(*d) + (size_t)n_threads * sizeof(d->own[0]));
    if (!d) return NULL;
    d->act = act;
    d->n_threads = n_threads;
    if (dnnl_engine_create(&d->engine, dnnl_cpu, 0) != dnnl_success) {
        free(d);
        return NULL;
    }
    pthread_mutex_init(&d->making, NULL);
    return d;
}

static void slot_free(struct slot *s)
{
    if (s->prim) dnnl_primitive_destroy(s->prim);
    if (s->x) dnnl_memory_destroy(s->x);
    if (s->w) dnnl_memory_destroy(s->w);
    if (s->y) dnnl_memory_destroy(s->y);
    if (s->scratch) dnnl_memory_destroy(s->scratch);
    memset(s, 0, sizeof(*s));
}

void tb_dnnl_destroy(struct tb_dnnl *d)
{
    if (!d) return;
    for (int t = 0; t < d->n_threads; t++) {
        struct own *o = &d->own[t];
        for (int i = 0; i < o->n; i++)
            slot_free(&o->slots[i]);
        if (o->stream) dnnl_stream_destroy(o->stream);
    }
    dnnl_engine_destroy(d->engine);
    pthread_mutex_destroy(&d->making);
    free(d);
}

/* Whether md is our panels: over K and N, panels of 64 outputs outermost, then K, then the outputs,
 * and in bf16 pairs of K innermost. */
static bool is_panels(const dnnl_memory_desc_t *md, enum tb_dtype act)
{
    const dnnl_blocking_desc_t *b = &md->format_desc.blocking;
    if (md->format_kind != dnnl_blocked || md->extra.flags != 0 || md->offset0 != 0) return false;
    if (md->padded_dims[0] != md->dims[0] || md->padded_dims[1] != md->dims[1]) return false;
    /* inner blocks: some of K, 64 of N, and in bf16 two of K */
    bool pairs = act == TB_BF16;
    if (b->inner_nblks != (pairs ? 3 : 2) || b->inner_idxs[0] != 0 || b->inner_idxs[1] != 1 ||
        b->inner_blks[1] != PANEL)
        return false;
    if (pairs && (b->inner_idxs[2] != 0 || b->inner_blks[2] != 2)) return false;
    /* blocks of K follow each other, panels come one after the other */
    dnnl_dim_t block = b->inner_blks[0] * PANEL * (pairs ? 2 : 1);
    return (b->strides[0] == block) && (b->strides[1] == md->dims[0] * PANEL);
}

static bool slot_make(struct tb_dnnl *d, struct slot *s)
{
    dnnl_data_type_t t = d->act == TB_BF16 ? dnnl_bf16 : dnnl_f32;
    dnnl_dims_t dx = {TB_DNNL_ROWS, s->k}, dw = {s->k, s->cols}, dy = {TB_DNNL_ROWS, s->cols};
    dnnl_dims_t sx = {(dnnl_dim_t)s->ldx, 1}, sy = {(dnnl_dim_t)s->ldy, 1};
    dnnl_memory_desc_t x, w, y;
    dnnl_matmul_desc_t op;
    dnnl_primitive_desc_t pd = NULL;
    dnnl_primitive_attr_t attr = NULL;
    bool ok = false;

    if (dnnl_memory_desc_init_by_strides(&x, 2, dx, t, sx) != dnnl_success ||
        dnnl_memory_desc_init_by_tag(&w, 2, dw, t, dnnl_format_tag_any) != dnnl_success ||
        dnnl_memory_desc_init_by_strides(&y, 2, dy, dnnl_f32, sy) != dnnl_success ||
        dnnl_matmul_desc_init(&op, &x, &w, NULL, &y) != dnnl_success ||
        dnnl_primitive_attr_create(&attr) != dnnl_success ||
        dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user) != dnnl_success ||
        dnnl_primitive_desc_create(&pd, &op, attr, d->engine, NULL) != dnnl_success)
        goto out;
    const dnnl_memory_desc_t *asked = dnnl_primitive_desc_query_md(pd, dnnl_query_weights_md, 0);
    const dnnl_memory_desc_t *room = dnnl_primitive_desc_query_md(pd, dnnl_query_scratchpad_md, 0);
    if (!asked || !room || !is_panels(asked, d->act)) goto out;
    ok = dnnl_memory_create(&s->x, &x, d->engine, DNNL_MEMORY_NONE) == dnnl_success &&
         dnnl_memory_create(&s->w, asked, d->engine, DNNL_MEMORY_NONE) == dnnl_success &&
         dnnl_memory_create(&s->y, &y, d->engine, DNNL_MEMORY_NONE) == dnnl_success &&
         dnnl_memory_create(&s->scratch, room, d->engine, DNNL_MEMORY_ALLOCATE) == dnnl_success &&
         dnnl_primitive_create(&s->prim, pd) == dnnl_success;
out:
    if (attr) dnnl_primitive_attr_destroy(attr);
    if (pd) dnnl_primitive_desc_destroy(pd);
    if (!ok) {
        struct slot empty = {.k = s->k, .cols = s->cols, .ldx = s->ldx, .ldy = s->ldy};
        slot_free(s);
        *s = empty;
    }
    return ok;
}

static struct slot *slot_find(struct tb_dnnl *d, struct own *o, int k, int cols, size_t ldx,
                              size_t ldy)
{
    for (int i = 0; i < o->n; i++) {
        struct slot *s = &o->slots[i];
        if (s->k == k && s->cols == cols && s->ldx == ldx && s->ldy == ldy) return s;
    }
    if (!o->stream &&
        dnnl_stream_create(&o->stream, d->engine, dnnl_stream_default_flags) != dnnl_success)
        return NULL;
    int at = o->n < N_SLOTS ? o->n++ : 0; /* more shapes than that: the first makes room */
    struct slot *s = &o->slots[at];
    slot_free(s);
    *s = (struct slot){.k = k, .cols = cols, .ldx = ldx, .ldy = ldy};
    pthread_mutex_lock(&d->making);
    slot_make(d, s);
    pthread_mutex_unlock(&d->making);
    return s;
}

/* The library's handles are not const; x and w are only read. */
static void *handle(const void *p)
{
    union {
        const void *c;
        void *m;
    } u = {.c = p};
    return u.m;
}

bool tb_dnnl_tile(struct tb_dnnl *d, int thread, const void *panels, int k, int cols, const void *x,
                  size_t ldx, float *y, size_t ldy)
{
    struct own *o = &d->own[thread];
    omp_set_num_threads(1); /* this thread's own setting; the team is what runs in parallel */
    struct slot *s = slot_find(d, o, k, cols, ldx, ldy);
    if (!s || !s->prim) return false;
    dnnl_memory_set_data_handle(s->x, handle(x));
    dnnl_memory_set_data_handle(s->w, handle(panels));
    dnnl_memory_set_data_handle(s->y, y);
    const dnnl_exec_arg_t args[4] = {{DNNL_ARG_SRC, s->x},
                                     {DNNL_ARG_WEIGHTS, s->w},
                                     {DNNL_ARG_DST, s->y},
                                     {DNNL_ARG_SCRATCHPAD, s->scratch}};
    return dnnl_primitive_execute(s->prim, o->stream, 4, args) == dnnl_success &&
           dnnl_stream_wait(o->stream) == dnnl_success;
}
