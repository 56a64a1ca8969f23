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
    int n;             /* items of the pass, samplings of the step */
    int64_t first_seq; /* seq_id of the first op */
};

#define FAKE_MAX_EVENTS 20000
extern struct fake_event fake_events[FAKE_MAX_EVENTS];
extern int fake_n_events;
extern int fake_live_adapters, fake_live_versions, fake_live_samplings, fake_live_graphs;
extern int fake_with_graph;                    /* items of passes that had a custom loss */
extern unsigned fake_train_us, fake_sample_us; /* time of a pass, of a step */
extern bool fake_fail_create;

void fake_reset(void);

#endif
