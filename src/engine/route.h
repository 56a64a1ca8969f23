/*
 * Routes: which lane a task goes to, where models have replicas. Private to engine/.
 *
 * With as many devices as models, or more, each has one model, and model i is on every device j
 * with j % n_models == i; with fewer, each model is on one device. In both cases model i is on the
 * lanes that are i modulo the stride, the lesser of the two numbers.
 *
 * An adapter lives on one replica, its home: that with the fewest adapters when it was made. All
 * its tasks go there, and the versions that it publishes live there too. A version from a
 * checkpoint goes where the fewest are, a sample of the base model where the least is drawn, and
 * one of a version to its home or a mirror of that (mirror.h). A lane whose device is lost gets
 * none of these while another replica lives.
 *
 * Owner: the engine. Thread: the loop's.
 */
#ifndef TB_ENGINE_ROUTE_H
#define TB_ENGINE_ROUTE_H

#include "engine/lane.h"

enum route_count {
    ROUTE_ADAPTERS, /* that live there */
    ROUTE_VERSIONS, /* that live there */
    ROUTE_SAMPLING, /* tokens that the samples in flight there may draw */
    ROUTE_N_COUNTS
};

struct route_lane {
    struct tb_lane *lane;
    uint64_t counts[ROUTE_N_COUNTS];
};

/* Where an adapter, or a version, lives. It is known from the submit of the task that makes it
 * until it is not there and no task that could change that is under way. */
struct route_home {
    uint64_t id;
    int model;
    struct route_lane *at;
    int n_changing;         /* tasks under way that make it, make it anew or end it */
    bool there;             /* so the last of them that succeeded left it */
    struct tb_list mirrors; /* of a version */
};

struct route {
    struct route_lane *lanes; /* [n_lanes]; the lanes are the engine's to make and close */
    int n_lanes, n_models, stride;
    struct tb_map adapters, versions; /* id → route_home */
    uint64_t mirror_tokens; /* how much less a replica must have to draw, to get a mirror */
    uint64_t n_waiting;     /* samples, for mirrors */
    bool closing;
};

void route_init(struct route *r, int n_models, int n_lanes, uint64_t mirror_tokens);
void route_fini(struct route *r);
/* A lane that has the model. */
struct route_lane *route_first(const struct route *r, int model);

/* What the sample may draw counts as this lane's from now on. */
void route_assign(struct route_lane *l, struct tb_task *sample);

/* Passes a task to its lane. */
void route_submit(struct route *r, struct tb_task *t);
/* What was passed on is done; its callback comes next. */
void route_done(struct route *r, struct tb_task *t);

#endif
