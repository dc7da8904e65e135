/* RootedSteps: persistent broadcast, scatter, reduce and gather, whose ranks run ahead of each other.

       rooted.c        the slots of such a collective, and who may write and read them
       rooted_steps.c  the Python type, described in ../rooted/native_steps.py

   The data goes one way: from the root to all others in a broadcast or scatter, from all others to the root in a reduce
   or gather. So a rank is a writer or a reader, and waits for nothing but room, or data. All of it lies in one area of
   memory, which ../rooted/area.py describes:

       a RootedCounter of every rank: of a writer, how many steps it has written; of a reader, how many it has read
       `depth` slots of every writer, used in turn

   A writer writes step s into slot s % depth when all its readers have read step s - depth. A reader reads step s when
   its writers have written it. Memory is ordered as counters.c says.

   Each step also has its order in the group: the number of collectives that the rank had issued before it. It is the
   same on all ranks, unless one has skipped a step, or has made another call. The writer stores it beside the data, and
   the reader compares it with its own. */

#ifndef FERRO_GLOO_ROOTED_H
#define FERRO_GLOO_ROOTED_H

#include "native.h"

#define NUMBER_BITS 24 /* of a persistent operation in `late_call` */

typedef struct {
    int64_t value;     /* with the sleepers that counters.c describes */
    uint32_t sleepers, unused;
    int64_t deferred;  /* 1 while this rank has started a step that it could not write yet */
    int64_t closed;    /* 1 when this rank uses the area no more */
    char rest[96];     /* some processors fetch two cache lines at a time */
} RootedCounter;

typedef struct {
    int64_t step; /* one more than the number of the step in the slot; stored last, with release */
    int64_t order;
    char data[];
} RootedSlot;

typedef struct {
    PyObject_HEAD
    PyObject *ring, *late;
    Py_buffer state; /* of the turn */
    Py_buffer source, target, area;
    Collective collective;
    int writes; /* this rank writes slots; the others read them */
    RootedCounter *counters;
    char *slots;
    Py_ssize_t stride; /* bytes from one slot to the next */
    int64_t depth;
    int64_t number;      /* of the persistent operation, the same on all ranks */
    int64_t step, order; /* of the step under way, or `step` of the next one */
    int64_t freed;       /* how many steps all readers are known to have read, which a writer keeps */
    int64_t told;        /* how many steps a reader has said that it has read */
    int other;           /* the writer whose slot has another order, once it was found */
    int under_way, closed, waiting;
} RootedSteps;

extern PyType_Spec rooted_steps_spec;

/* ---- rooted.c */

static inline int is_from_root(const Collective *c)
{
    return c->operation == BROADCAST || c->operation == SCATTER;
}

Py_ssize_t rooted_stride(const Collective *collective);
/* The size of the area with so many slots for each writer. */
Py_ssize_t rooted_bytes(const RootedSteps *steps, Py_ssize_t depth);
/* The lines of others that keep the step from ending: slots for a reader, counters for a writer. */
Awaited missing_steps(const RootedSteps *steps);
/* Do what can be done of the step that is under way; READY at its end. Called with the GIL. */
Arrival advance_rooted(RootedSteps *steps);
RootedSlot *rooted_slot(const RootedSteps *steps, int writer, int64_t step);
/* How many collectives a rank had issued when it ended its latest rooted step, or 0. Beside it: in which step the rank
   has waited for long, as `late_call` packs it. */
int64_t *order_of_rank(const RootedSteps *steps, int rank);
/* The order of the step under way, with the number of this persistent operation in the low bits. */
int64_t late_call(const RootedSteps *steps);

#endif
