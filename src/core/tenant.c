/*
 * Tenants: who owns sessions and all that is made in them, and what each may take of the server: so
 * many requests without a result, so many bytes of them, so many submits a second (a token bucket).
 * They are few, as they come from the operator's keys. Thread: the loop's.
 */
#include <stdio.h>
#include <string.h>

#include "core/core_internal.h"
#include "util/clock.h"
#include "util/mem.h"

struct tb_tenant *tb_core_tenant(struct tb_core *c, const char *name)
{
    TB_LIST_FOREACH (n, &c->tenants) {
        struct tb_tenant *t = TB_LIST_ENTRY(n, struct tb_tenant, node);
        if (strcmp(t->name, name) == 0) return t;
    }
    struct tb_tenant *t = tb_calloc(1, sizeof(*t));
    t->name = tb_strdup(name);
    t->number = ++c->n_tenants;
    t->tokens = (double)c->o.tenant_burst;
    t->refilled_ms = tb_clock_ms();
    tb_list_push(&c->tenants, &t->node);
    return t;
}

const char *tb_tenant_name(const struct tb_tenant *t)
{
    return t->name;
}

void tb_tenants_destroy(struct tb_core *c)
{
    for (struct tb_list *n; (n = tb_list_pop(&c->tenants));) {
        struct tb_tenant *t = TB_LIST_ENTRY(n, struct tb_tenant, node);
        tb_free(t->name);
        tb_free(t);
    }
}

char *tb_tenant_scoped(const struct tb_tenant *t, const char *key)
{
    return tb_asprintf("%s\n%s", t->name, key); /* no name has a line's end */
}

/* ---- limits */

static bool take_token(const struct tb_core *c, struct tb_tenant *t)
{
    if (c->o.tenant_rate == 0) return true;
    uint64_t now = tb_clock_ms();
    if (now > t->refilled_ms) {
        t->tokens += (double)(now - t->refilled_ms) * (double)c->o.tenant_rate / 1000;
        t->tokens = TB_MIN(t->tokens, (double)c->o.tenant_burst);
        t->refilled_ms = now;
    }
    if (t->tokens < 1) return false;
    t->tokens--;
    return true;
}

int tb_tenant_admit(struct tb_core *c, struct tb_tenant *t, const struct tb_op *op, bool in_turn,
                    struct tb_error *err)
{
    const struct tb_core_options *o = &c->o;
    int rc = 0;
    if (o->tenant_pending && !in_turn && t->n_pending >= o->tenant_pending)
        rc = tb_error_set(err, TB_EBUSY,
                          "%zu requests of tenant %s have no result yet, %llu are allowed; try "
                          "again",
                          t->n_pending, t->name, (unsigned long long)o->tenant_pending);
    else if (o->tenant_queued_bytes && !in_turn && t->queued_bytes &&
             (op->body_bytes > o->tenant_queued_bytes ||
              t->queued_bytes > o->tenant_queued_bytes - op->body_bytes))
        rc = tb_error_set(err, TB_EBUSY,
                          "%zu bytes of requests of tenant %s wait, %llu are allowed; try again",
                          t->queued_bytes, t->name, (unsigned long long)o->tenant_queued_bytes);
    else if (!take_token(c, t))
        rc = tb_error_set(err, TB_ERATE, "tenant %s may submit %llu requests a second; try again",
                          t->name, (unsigned long long)o->tenant_rate);
    return rc;
}

const char *tb_tenant_paused(const struct tb_core *c, const struct tb_tenant *t, char *reason,
                             size_t n)
{
    enum { SHOWN_MS = 10000 };
    if (!t->refusal || tb_clock_ms() - t->refused_ms > TB_MAX(c->o.long_poll_ms, SHOWN_MS))
        return NULL;
    bool rate = t->refusal == TB_ERATE;
    if (rate)
        snprintf(reason, n, "submits beyond %llu a second are refused",
                 (unsigned long long)c->o.tenant_rate);
    else
        snprintf(reason, n, "submits are refused while %zu requests of %zu bytes wait",
                 t->n_pending, t->queued_bytes);
    return rate ? "paused_rate_limit" : "paused_capacity";
}
