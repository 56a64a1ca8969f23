/*
 * Adapters and versions as the pager sees them: what of one goes to its file and comes back, and
 * what is held while a call computes on it. See pager.h.
 *
 * An adapter's file has its arrays: parameters, accumulated gradient, moments. Its version's
 * weights are the parameters rounded, so they are made again, and need no file while nobody else
 * has a reference to that version; otherwise they have one of their own.
 *
 * Owner: as in adapter.c. Thread: the model's.
 */
#include "model/internal.h"

enum { N_ARRAYS = 4 };

static void list_arrays(struct tb_adapter *a, float **out[N_ARRAYS])
{
    out[0] = &a->p;
    out[1] = &a->g;
    out[2] = &a->mom;
    out[3] = &a->var;
}

/* ---- adapters */

static int adapter_page_out(struct tb_paged *x, struct tb_error *err)
{
    struct tb_adapter *a = TB_CONTAINER_OF(x, struct tb_adapter, page);
    struct tb_page_part parts[N_ARRAYS];
    float **arrays[N_ARRAYS];
    unsigned out = 0;
    int n = 0;
    list_arrays(a, arrays);
    for (int i = 0; i < N_ARRAYS; i++) {
        if (!*arrays[i] || (*arrays[i] == a->g && !a->has_grad)) continue;
        parts[n++] = (struct tb_page_part){*arrays[i], tb_adapter_flat_bytes(a)};
        out |= 1u << i;
    }
    int rc = tb_page_write(x, parts, n, err);
    if (rc) return rc;
    for (int i = 0; i < N_ARRAYS; i++) {
        tb_adapter_free_flat(a, *arrays[i]);
        *arrays[i] = NULL;
    }
    a->out = out;
    a->m->usage.adapters_out++;
    return 0;
}

static int adapter_page_in(struct tb_adapter *a, struct tb_error *err)
{
    size_t bytes = tb_adapter_flat_bytes(a);
    struct tb_page_part parts[N_ARRAYS];
    float **arrays[N_ARRAYS];
    int n = 0, rc = 0;
    list_arrays(a, arrays);
    for (int i = 0; i < N_ARRAYS && !rc; i++) {
        if (!(a->out & 1u << i)) continue;
        *arrays[i] = tb_adapter_alloc_flat(a);
        if (!*arrays[i]) rc = tb_backend_no_memory(a->m->be, err, bytes, "an adapter's arrays");
        parts[n++] = (struct tb_page_part){*arrays[i], bytes};
    }
    if (!rc) rc = tb_page_read(&a->page, parts, n, err);
    for (int i = 0; i < N_ARRAYS && rc; i++) {
        tb_adapter_free_flat(a, *arrays[i]);
        *arrays[i] = NULL;
    }
    if (rc) return rc;
    a->out = 0;
    a->m->usage.adapters_out--;
    return 0;
}

size_t tb_adapter_bytes(const struct tb_adapter *a)
{
    size_t n = (a->p || a->out & 1) + (a->g || a->out & 2) + (a->mom || a->out & 4) +
               (a->var || a->out & 8);
    return n * tb_adapter_flat_bytes(a) + tb_version_bytes(a->cur);
}

/* ---- versions */

static int version_page_out(struct tb_paged *x, struct tb_error *err)
{
    struct tb_adapter_version *v = TB_CONTAINER_OF(x, struct tb_adapter_version, page);
    struct tb_page_part part = {v->act, tb_version_bytes(v)};
    int rc = v->is_cur && v->refs == 1 ? 0 : tb_page_write(x, &part, 1, err);
    if (rc) return rc;
    tb_version_free_act(v);
    v->m->usage.versions_out++;
    return 0;
}

/* Its memory, of undefined content when it was out. */
static int version_hold_act(struct tb_adapter_version *v, struct tb_error *err)
{
    if (v->page.holds++ == 0) tb_paged_busy(&v->page);
    if (v->act) return 0;
    int rc = tb_version_alloc_act(v, err);
    if (rc)
        v->page.holds--;
    else
        v->m->usage.versions_out--;
    return rc;
}

int tb_version_hold(struct tb_adapter_version *v, struct tb_error *err)
{
    if (!v->page.pager) return 0;
    bool out = !v->act;
    int rc = version_hold_act(v, err);
    if (rc || !out) return rc;
    struct tb_page_part part = {v->act, tb_version_bytes(v)};
    rc = tb_page_read(&v->page, &part, 1, err);
    if (rc) {
        v->page.holds--;
        tb_version_free_act(v);
        v->m->usage.versions_out++;
    }
    return rc;
}

void tb_version_release(struct tb_adapter_version *v)
{
    if (v->page.pager && --v->page.holds == 0) tb_paged_idle(&v->page, tb_version_bytes(v));
}

/* ---- an adapter and its version */

void tb_adapter_idle(struct tb_adapter *a)
{
    tb_paged_idle(&a->page, tb_adapter_bytes(a) - tb_version_bytes(a->cur));
}

void tb_adapter_release(struct tb_adapter *a)
{
    if (!a->page.pager) return;
    tb_version_release(a->cur);
    if (--a->page.holds == 0) tb_adapter_idle(a);
}

int tb_adapter_hold(struct tb_adapter *a, struct tb_error *err)
{
    if (!a->page.pager) return 0;
    if (a->page.holds++ == 0) tb_paged_busy(&a->page);
    int rc = a->p ? 0 : adapter_page_in(a, err);
    if (rc) {
        a->page.holds--;
        return rc;
    }
    bool out = !a->cur->act;
    rc = version_hold_act(a->cur, err);
    if (rc) {
        if (--a->page.holds == 0) tb_adapter_idle(a);
        return rc;
    }
    if (out) {
        tb_paged_forget(&a->cur->page);
        tb_adapter_refresh_act(a);
    }
    return 0;
}

size_t tb_version_idle_bytes(const struct tb_adapter_version *v)
{
    return v->page.pager && !v->page.holds ? tb_version_bytes(v) : 0;
}

size_t tb_adapter_idle_bytes(const struct tb_adapter *a)
{
    return a->page.pager && !a->page.holds ? tb_adapter_bytes(a) : 0;
}

void tb_adapter_page_init(struct tb_adapter *a)
{
    a->page.pager = a->m->opt.pager;
    a->page.page_out = adapter_page_out;
    a->page.holds = 1;
    a->m->usage.n_adapters++;
    tb_list_init(&a->page.node);
}

void tb_version_page_init(struct tb_adapter_version *v)
{
    v->page.pager = v->m->opt.pager;
    v->page.page_out = version_page_out;
    v->page.holds = 1;
    v->m->usage.n_versions++;
    tb_list_init(&v->page.node);
}
