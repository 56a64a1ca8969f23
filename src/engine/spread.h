/*
 * Spread: a big training op on all devices that have its model. Private to engine/.
 *
 *   home lane (the adapter's)                           another lane of the model
 *   begins the op, keeps the first shards for itself,
 *   lends its weights                 ── TB_TASK_SHARE ──▶  borrows them, computes its shards among
 *                                                           its other work
 *   adds their gradients, in order   ◀─ TB_TASK_COLLECT ──
 *   is done with them              ── TB_TASK_SHARE_END ─▶  frees them
 *
 * These three are one task that goes to and fro between the lanes' inboxes; no callback is called.
 * While shares are away their op stays at the head of its adapter's queue, and the adapter waits.
 * What a device could not do (no memory, lost) is done at home, so no op fails for being spread.
 *
 * Owner: the home lane has the struct tb_spread and its tasks, but for a task that is away; the
 * other lane has a share's training. Thread: the lanes' workers.
 */
#ifndef TB_ENGINE_SPREAD_H
#define TB_ENGINE_SPREAD_H

#include "engine/lane.h"

/* Gives shards of t, which has just begun, to the other devices, if it has so many and these are
 * there. */
void spread_begin(struct tb_lane *l, struct lane_adapter *a, struct tb_task *t);
/* Collects what has come back and is next. False: shares are away, and nothing is left to do here
 * before one is back. */
bool spread_go_on(struct tb_lane *l, struct tb_task *t);
/* A share is back; returns its op's adapter. */
struct lane_adapter *spread_take_back(struct tb_task *share);
/* The op is done and no share is away. */
void spread_end(struct tb_task *t);

/* On the other lane: makes share->training; fails with the share's error set. */
int share_begin(struct tb_lane *l, struct tb_task *share);
/* It is through, or failed: back to its home. */
void share_send_back(struct tb_task *share);
/* Home is done with it. */
void share_free(struct tb_task *share);

#endif
