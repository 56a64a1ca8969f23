/*
 * Helpers of the store's and core's tests: a loop that runs until something has happened, folders
 * that vanish, and small adapter states whose contents are known.
 */
#ifndef TEST_STORE_HELP_H
#define TEST_STORE_HELP_H

#include <ftw.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>
#include <uv.h>

#include "op/state.h"
#include "store/store.h"
#include "util/mem.h"
#include "util/philox.h"

static inline int remove_one(const char *path, const struct stat *sb, int flag, struct FTW *ftw)
{
    (void)sb;
    (void)flag;
    (void)ftw;
    return remove(path);
}

static inline void remove_dir(const char *path)
{
    nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

static inline char *make_dir(void)
{
    /* memory if there is such a folder: what is tested is not how fast a disk syncs */
    const char *base = getenv("TMPDIR");
    if (!base || !*base) base = access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm";
    char *p = tb_asprintf("%s/tb-store-XXXXXX", base);
    assert_non_null(mkdtemp(p));
    return p;
}

#define RUN_UNTIL(loop, cond)                                                                      \
    do {                                                                                           \
        while (!(cond))                                                                            \
            uv_run((loop), UV_RUN_ONCE);                                                           \
    } while (0)

static inline float value_at(uint64_t seed, uint32_t i, uint32_t what)
{
    return tb_philox_draw(seed, i, what, 7) - 0.5f;
}

/* Two layers' q_proj and the head, of the given rank; contents follow from seed. */
static inline struct tb_adapter_state *make_state(int32_t rank, uint64_t seed, bool optimizer)
{
    static const struct {
        const char *name;
        int32_t rows, cols; /* 0: the rank */
    } t[] = {
        {"model.layers.0.self_attn.q_proj.lora_A.weight", 0, 16},
        {"model.layers.0.self_attn.q_proj.lora_B.weight", 24, 0},
        {"model.layers.1.mlp.down_proj.lora_A.weight", 0, 40},
        {"model.layers.1.mlp.down_proj.lora_B.weight", 16, 0},
        {"model.unembed_tokens.lora_A.weight", 0, 16},
        {"model.unembed_tokens.lora_B.weight", 50, 0},
    };
    struct tb_adapter_state *s = tb_adapter_state_create();
    s->base_model = tb_arena_strdup(&s->arena, "m0");
    s->lora = (struct tb_lora_config){.rank = rank,
                                      .alpha = 32,
                                      .has_seed = true,
                                      .seed = 0xfedcba9876543210ull,
                                      .train_attn = true,
                                      .train_mlp = true,
                                      .train_unembed = true};
    s->step = (int64_t)(seed % 1000);
    s->n_tensors = 6;
    s->tensors = tb_arena_calloc(&s->arena, 6, sizeof(*s->tensors));
    for (int i = 0; i < 6; i++) {
        s->tensors[i].name = t[i].name;
        s->tensors[i].rows = t[i].rows ? t[i].rows : rank;
        s->tensors[i].cols = t[i].cols ? t[i].cols : rank;
        s->tensors[i].offset = s->n_floats;
        s->n_floats += (int64_t)s->tensors[i].rows * s->tensors[i].cols;
    }
    size_t bytes = (size_t)s->n_floats * sizeof(float);
    s->p = tb_malloc(bytes);
    if (optimizer) s->m = tb_malloc(bytes), s->v = tb_malloc(bytes);
    for (int64_t i = 0; i < s->n_floats; i++) {
        s->p[i] = value_at(seed, (uint32_t)i, 0);
        if (optimizer) s->m[i] = value_at(seed, (uint32_t)i, 1);
        if (optimizer) s->v[i] = value_at(seed, (uint32_t)i, 2);
    }
    return s;
}

static inline void assert_same_state(const struct tb_adapter_state *a,
                                     const struct tb_adapter_state *b, bool optimizer)
{
    assert_string_equal(a->base_model, b->base_model);
    assert_int_equal(a->lora.rank, b->lora.rank);
    assert_true(a->lora.alpha == b->lora.alpha);
    assert_int_equal(a->lora.has_seed, b->lora.has_seed);
    assert_true(a->lora.seed == b->lora.seed);
    assert_int_equal(a->lora.train_attn, b->lora.train_attn);
    assert_int_equal(a->lora.train_mlp, b->lora.train_mlp);
    assert_int_equal(a->lora.train_unembed, b->lora.train_unembed);
    assert_int_equal(a->step, b->step);
    assert_int_equal(a->n_tensors, b->n_tensors);
    assert_int_equal(a->n_floats, b->n_floats);
    for (int i = 0; i < a->n_tensors; i++) {
        assert_string_equal(a->tensors[i].name, b->tensors[i].name);
        assert_int_equal(a->tensors[i].rows, b->tensors[i].rows);
        assert_int_equal(a->tensors[i].cols, b->tensors[i].cols);
        assert_int_equal(a->tensors[i].offset, b->tensors[i].offset);
    }
    size_t bytes = (size_t)a->n_floats * sizeof(float);
    assert_memory_equal(a->p, b->p, bytes);
    if (optimizer) {
        assert_memory_equal(a->m, b->m, bytes);
        assert_memory_equal(a->v, b->v, bytes);
    } else {
        assert_null(b->m);
        assert_null(b->v);
    }
}

static inline void set_flag(void *arg)
{
    *(int *)arg = 1;
}

/* An answer of the store, copied. */
struct answer {
    int done;
    struct tb_error err;
    bool has_row;
    struct tb_ckpt_row row; /* numbers only */
    char path[600], metadata[200];
    struct tb_adapter_state *state;
};

static inline void on_done(void *arg, const struct tb_error *err)
{
    struct answer *a = arg;
    a->done = 1;
    a->err = *err;
}

static inline void on_ckpt(void *arg, const struct tb_error *err, const struct tb_ckpt_row *row)
{
    struct answer *a = arg;
    a->done = 1;
    a->err = *err;
    assert_int_equal(row == NULL, err->code != 0);
    if (!row) return;
    a->has_row = true;
    a->row = *row;
    snprintf(a->path, sizeof(a->path), "%s", row->path);
    snprintf(a->metadata, sizeof(a->metadata), "%s",
             row->user_metadata_json ? row->user_metadata_json : "");
}

static inline void on_state(void *arg, const struct tb_error *err, const struct tb_ckpt_row *row,
                            struct tb_adapter_state *state)
{
    struct answer *a = arg;
    on_ckpt(arg, err, row);
    assert_int_equal(state == NULL, err->code != 0);
    a->state = state;
}

static inline struct tb_store *store_open(uv_loop_t *loop, const char *dir)
{
    struct tb_store *s = NULL;
    struct tb_error err = {0};
    int rc = tb_store_open(&s, loop, dir, &err);
    if (rc) fail_msg("%s", err.msg);
    return s;
}

static inline void store_close(uv_loop_t *loop, struct tb_store *s)
{
    int closed = 0;
    tb_store_close(s, set_flag, &closed);
    RUN_UNTIL(loop, closed);
}

static inline struct answer store_save(uv_loop_t *loop, struct tb_store *s,
                                       const struct tb_ckpt_write *w, struct tb_adapter_state *st)
{
    struct answer a = {0};
    tb_store_write_ckpt(s, w, st, on_ckpt, &a);
    RUN_UNTIL(loop, a.done);
    return a;
}

static inline struct answer store_load(uv_loop_t *loop, struct tb_store *s, const char *path,
                                       bool optimizer)
{
    struct answer a = {0};
    tb_store_read_ckpt(s, TB_TENANT_DEFAULT, path, optimizer, on_state, &a);
    RUN_UNTIL(loop, a.done);
    return a;
}

#endif
