/*
 * Mirrors: copies of a version on other replicas than its home, so that many samples of one version
 * are drawn on all devices. Private to engine/.
 *
 * A mirror is made when a sample comes for which another replica has clearly less to draw than
 * those that have the version: the home lends its weights, the other lane borrows them, and the
 * loan goes back, each by a task. Samples for it wait meanwhile, in order. When it cannot be made
 * they go home, and it is not tried again.
 *
 * Before a version is published or loaded anew, or freed, its mirrors end: samples that wait go
 * home ahead of that task, and the copies are freed. So every sample sees what it would see with
 * the home alone.
 *
 * Owner: the version's home (route.h) until it ends; then itself until its loan is back. The lanes
 * write its loan, one at a time, while a task of it is with them. Thread: the loop's.
 */
#ifndef TB_ENGINE_MIRROR_H
#define TB_ENGINE_MIRROR_H

#include "engine/route.h"

/* Passes a sample to its version's home or a mirror, or keeps it until the mirror is there. */
void mirror_submit(struct route *r, struct route_home *h, struct tb_task *sample);
/* A sample that waits for a mirror goes home, where it is canceled. */
void mirror_cancel(struct tb_task *sample);
/* A task that changes the version comes next. */
void mirrors_end(struct route_home *h);
/* The lanes close next: all that waits goes home, and nothing new is begun. */
void mirrors_close(struct route *r);
/* The lanes are closed. */
void mirrors_free(struct route_home *h);

#endif
