/*
 * What can be named as a model: the served base models and the checkpoints that can be sampled
 * from, for each face's list and for questions about one of them. Thread: the loop's.
 */
#include <string.h>

#include "api/llm/llm.h"
#include "util/mem.h"

#define MAX_LISTED 1000 /* checkpoints, the newest */

struct list {
    struct tb_api *a;
    struct tb_http_request *req;
    tb_llm_list_cb cb;
};

static struct list *begin(struct tb_api *a, struct tb_http_request *req, tb_llm_list_cb cb)
{
    struct list *l = tb_calloc(1, sizeof(*l));
    *l = (struct list){a, req, cb};
    tb_api_work_begin(a);
    return l;
}

static void end(struct list *l, const struct tb_error *err, const struct tb_llm_name *names,
                size_t n)
{
    struct tb_api *a = l->a;
    l->cb(a, l->req, err, names, n);
    tb_free(l);
    tb_api_work_end(a);
}

static struct tb_llm_name served(struct tb_api *a, const struct tb_llm_model *m)
{
    const struct tb_served_model *info = tb_llm_model_info(m);
    return (struct tb_llm_name){.name = info->name, .base = info, .time_us = a->started_us};
}

/* False for checkpoints that cannot be sampled from here. */
static bool checkpoint(struct tb_api *a, const struct tb_ckpt_row *row, struct tb_llm_name *out)
{
    const struct tb_llm_model *m =
        row->kind == TB_CKPT_EXTERNAL ? NULL : tb_llm_model_find(a, row->base_model);
    if (!m) return false;
    *out = (struct tb_llm_name){.name = row->path,
                                .base = tb_llm_model_info(m),
                                .is_checkpoint = true,
                                .time_us = row->time_us,
                                .size_bytes = row->size_bytes};
    return true;
}

static void on_list(void *arg, const struct tb_error *err, const struct tb_ckpt_list *rows)
{
    struct list *l = arg;
    const struct tb_llm_model *m;
    int n_served = 0;
    while (tb_llm_model_at(l->a, n_served))
        n_served++;
    if (err->code) {
        end(l, err, NULL, 0);
        return;
    }
    size_t n = 0, cap = (size_t)n_served + (size_t)rows->n;
    struct tb_llm_name *names = tb_arena_calloc(&l->req->arena, cap + 1, sizeof(*names));
    for (int i = 0; (m = tb_llm_model_at(l->a, i)); i++)
        names[n++] = served(l->a, m);
    for (int32_t i = 0; i < rows->n; i++)
        n += checkpoint(l->a, &rows->rows[i], &names[n]);
    end(l, err, names, n);
}

void tb_llm_list(struct tb_api *a, struct tb_http_request *req, tb_llm_list_cb cb)
{
    tb_store_list_ckpts(tb_core_store(a->core), tb_api_tenant(req), NULL, 0, MAX_LISTED, on_list,
                        begin(a, req, cb));
}

static void on_ckpt(void *arg, const struct tb_error *err, const struct tb_ckpt_row *row)
{
    struct list *l = arg;
    struct tb_error e = *err;
    struct tb_llm_name name;
    if (!e.code && !checkpoint(l->a, row, &name))
        tb_error_set(&e, TB_ENOTFOUND, "model '%s' not found", row->path);
    end(l, &e, &name, e.code == 0);
}

void tb_llm_list_one(struct tb_api *a, struct tb_http_request *req, const char *name,
                     tb_llm_list_cb cb)
{
    const struct tb_llm_model *m = tb_llm_model_find(a, name);
    struct list *l = begin(a, req, cb);
    struct tb_error e = {0};
    if (m) {
        struct tb_llm_name found = served(a, m);
        end(l, &e, &found, 1);
    } else if (strncmp(name, TB_LLM_CHECKPOINT, strlen(TB_LLM_CHECKPOINT)) == 0) {
        tb_store_get_ckpt(tb_core_store(a->core), tb_api_tenant(req), name, on_ckpt, l);
    } else {
        tb_error_set(&e, TB_ENOTFOUND, "model '%s' not found", name);
        end(l, &e, NULL, 0);
    }
}
