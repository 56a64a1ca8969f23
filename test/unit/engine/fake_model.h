/*
 * A model without numbers, for tests of the engine's planning: it records what was run in which
 * order and on which device, and takes a configurable time. Implements the functions of
 * model/model.h that the engine calls.
 *
 * Thread: lanes of several devices call it at the same time. What they write is atomic, or under a
 * lock and read when they are idle.
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
extern _Atomic int fake_live_adapters, fake_live_versions, fake_live_samplings, fake_live_trainings;
extern _Atomic int fake_live_graphs;
extern _Atomic int fake_with_graph; /* trainings with a custom loss */
extern _Atomic int fake_reserved;   /* gradients in memory, and the most there may be */
extern int fake_max_reserved;
extern unsigned fake_train_us, fake_sample_us; /* time of a pass, of a step */
extern bool fake_fail_create;

/* Steps so far, and in which of them an op first took part, by seq_id; -1: in none yet. */
#define FAKE_MAX_SEQ 4096
extern _Atomic int fake_steps, fake_first_step[FAKE_MAX_SEQ];

/* Devices have the kind "fake"; the last one may have another. */
#define FAKE_DEVICES 4
struct fake_device {
    _Atomic int adapters, versions; /* alive there */
    _Atomic int samples;            /* that were begun there */
    _Atomic bool full;              /* for a test to set: nothing can be borrowed there */
    _Atomic bool lost; /* for a test to set: what runs there fails from the next turn on */
};
extern struct fake_device fake_devices[FAKE_DEVICES];
extern const char *fake_last_kind;
/* A loan stands there while the test has it so. */
enum fake_hold { FAKE_HOLD_NONE, FAKE_HOLD_LEND, FAKE_HOLD_BORROW, FAKE_HOLD_RETURN };
extern _Atomic int fake_hold, fake_held; /* where one stands */
extern _Atomic int fake_loans;           /* that are out */
/* The device that a sample was begun on, and the content of its weights (each publish and load
 * makes another, counted from 1; 0: the base model), by seq_id; -1: it has not begun. */
extern _Atomic int fake_sampled_on[FAKE_MAX_SEQ], fake_content[FAKE_MAX_SEQ];

void fake_reset(void);

/* While the gate is closed every step stands at it before it ends, until it is let pass. What was
 * planned may be read meanwhile. Opening lets the one that stands there pass too. */
void fake_gate_close(void);
bool fake_gate_reached(void); /* true once for each step */
void fake_gate_pass(void);
void fake_gate_open(void);

#endif
