/*
 * How a backend's memory is counted against its limit (backend.h).
 *
 * Owner: nothing. Thread: the backend's.
 */
#include "backend/backend.h"

size_t tb_backend_room(const struct tb_backend *be)
{
    if (!be->mem_limit) return SIZE_MAX;
    size_t freed = be->reclaimer ? be->reclaimer->reclaimable(be->reclaimer_arg) : 0;
    size_t kept = be->mem_used - freed;
    return kept < be->mem_limit ? be->mem_limit - kept : 0;
}

bool tb_backend_charge(struct tb_backend *be, size_t bytes)
{
    if (!tb_backend_fits(be, bytes) && be->reclaimer) {
        be->reclaim_error.code = 0;
        be->reclaimer->reclaim(be->reclaimer_arg, bytes);
    }
    if (!tb_backend_fits(be, bytes)) return false;
    be->mem_used += bytes;
    return true;
}

void tb_backend_uncharge(struct tb_backend *be, size_t bytes)
{
    be->mem_used -= bytes;
}

int tb_backend_no_memory(const struct tb_backend *be, struct tb_error *err, size_t bytes,
                         const char *what)
{
    const double mib = 1 << 20;
    if (tb_backend_fits(be, bytes) || !be->mem_limit)
        return tb_error_set(err, TB_ENOMEM, "%s need %.1f MiB; the machine has no more", what,
                            (double)bytes / mib);
    const struct tb_error *why = &be->reclaim_error;
    return tb_error_set(
        err, TB_ENOMEM, "%s need %.1f MiB; %.1f MiB of the limit of %.1f MiB are free%s%s", what,
        (double)bytes / mib, (double)tb_backend_room(be) / mib, (double)be->mem_limit / mib,
        why->code ? ", but " : "", why->code ? why->msg : "");
}
