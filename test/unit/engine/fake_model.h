/*
 * A model without numbers, for tests of the engine's planning: it records what was run in which
 * order and takes a configurable time. Implements the functions of model/model.h that the engine
 * calls.
 */
#ifndef TEST_FAKE_MODEL_H
#define TEST_FAKE_MODEL_H

#include "model/model.h"

enum fake_event_kind { FAKE_TRAIN, FAKE_OPTIM, FAKE_SAMPLE_STEP, FAKE_PUBLISH, FAKE_EXPORT };
struct fake_event {
    enum fake_event_kind kind;
    int n;             /* parts of the pass, samplings of the step */
    int64_t first_seq; /* seq_id of the first op */
};

#define FAKE_MAX_EVENTS 20000
extern struct fake_event fake_events[FAKE_MAX_EVENTS];
extern int fake_n_events;
extern int fake_live_adapters, fake_live_versions, fake_live_samplings, fake_live_trainings;
extern _Atomic int fake_live_graphs;           /* of several devices' lanes */
extern int fake_with_graph;                    /* trainings with a custom loss */
extern int fake_reserved, fake_max_reserved;   /* gradients in memory, and the most there may be */
extern unsigned fake_train_us, fake_sample_us; /* time of a pass, of a step */
extern bool fake_fail_create;

/* Steps so far, and in which of them an op first took part, by seq_id; -1: in none yet. */
#define FAKE_MAX_SEQ 4096
extern int fake_steps, fake_first_step[FAKE_MAX_SEQ];

void fake_reset(void);

/* While the gate is closed every step stands at it before it ends, until it is let pass. What was
 * planned may be read meanwhile. Opening lets the one that stands there pass too. */
void fake_gate_close(void);
bool fake_gate_reached(void); /* true once for each step */
void fake_gate_pass(void);
void fake_gate_open(void);

#endif
