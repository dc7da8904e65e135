/* RootedSteps: the Python type, which checks and holds all memory. ../rooted/native_steps.py describes it. */

#include "rooted.h"

#define SPINS_WITH_GIL 100 /* as in short_path.c */
#define YIELDS 1000
#define FIRST_WAIT_S 0.01
#define MOST_SECONDS 86400
#define MOST_DEPTH 1024

/* ---- steps */

static int64_t *turn_of(const RootedSteps *steps)
{
    return steps->state.buf;
}

static PyObject *refuse_step(const RootedSteps *steps)
{
    PyErr_SetString(PyExc_ValueError, steps->under_way ? "a step of this collective is under way"
                                                       : "this collective has no memory, or was closed");
    return NULL;
}

/* Take the step's order in the group, and do what can be done without waiting. */
static Arrival begin_rooted(RootedSteps *steps)
{
    steps->order = turn_of(steps)[NUMBER]++;
    steps->under_way = 1;
    return advance_rooted(steps);
}

/* Give the memory back, and tell the root that this rank uses it no more. */
static void release_area(RootedSteps *steps)
{
    if (steps->area.obj && !steps->waiting) {
        __atomic_store_n(&steps->counters[steps->collective.ring->rank].closed, 1, __ATOMIC_RELEASE);
        PyBuffer_Release(&steps->area);
    }
}

/* Wait without the GIL, unless the step has ended or meets another one. */
static Arrival wait_for_step(RootedSteps *steps, long spins, long yields, double seconds)
{
    Arrival arrival = advance_rooted(steps);
    if (arrival != LATE || steps->closed)
        return arrival;
    Awaited missing = missing_steps(steps);
    Py_ssize_t behind = first_behind(&missing, 0);
    int interrupted = 0;
    steps->waiting++; /* the memory stays there, whoever closes this meanwhile */
    Py_BEGIN_ALLOW_THREADS
    if (behind >= 0)
        wait_without_gil(&missing, behind, spins, yields, seconds, &interrupted);
    Py_END_ALLOW_THREADS
    steps->waiting--;
    if (!steps->closed)
        return advance_rooted(steps);
    release_area(steps);
    return LATE;
}

/* Try for some microseconds, with the GIL, where every rank has a core of its own. */
static Arrival spin_for_step(RootedSteps *steps)
{
    Awaited missing = missing_steps(steps);
    for (int tries = 0; tries < SPINS_WITH_GIL && first_behind(&missing, 0) >= 0; tries++)
        relax();
    return advance_rooted(steps);
}

static PyObject *step_rooted(RootedSteps *steps, PyObject *Py_UNUSED(none))
{
    if (turn_of(steps)[BUSY])
        Py_RETURN_FALSE;
    if (!steps->area.obj || steps->closed || steps->under_way)
        return refuse_step(steps);
    long spins = steps->collective.ring->spins;
    Arrival arrival = begin_rooted(steps);
    if (arrival == LATE && spins)
        arrival = spin_for_step(steps);
    if (arrival == LATE)
        arrival = wait_for_step(steps, spins, YIELDS, FIRST_WAIT_S);
    if (arrival != READY) {
        PyObject *done = PyObject_CallFunctionObjArgs(steps->late, (PyObject *)steps, NULL);
        if (!done)
            return NULL;
        Py_DECREF(done);
    }
    Py_RETURN_TRUE;
}

static PyObject *begin_method(RootedSteps *steps, PyObject *Py_UNUSED(none))
{
    if (!steps->area.obj || steps->closed || steps->under_way)
        return refuse_step(steps);
    Arrival arrival = begin_rooted(steps);
    if (arrival == LATE && steps->writes) {
        RootedCounter *own = &steps->counters[steps->collective.ring->rank];
        __atomic_store_n(&own->deferred, 1, __ATOMIC_RELEASE);
    }
    return PyBool_FromLong(arrival == READY);
}

static PyObject *progress_method(RootedSteps *steps, PyObject *Py_UNUSED(none))
{
    return PyBool_FromLong(advance_rooted(steps) == READY);
}

static PyObject *wait_method(RootedSteps *steps, PyObject *args)
{
    long spins, yields;
    double seconds;
    if (!PyArg_ParseTuple(args, "lld", &spins, &yields, &seconds))
        return NULL;
    if (!(seconds <= MOST_SECONDS))
        return PyErr_Format(PyExc_ValueError, "wait() takes at most %d seconds", MOST_SECONDS);
    Arrival arrival = wait_for_step(steps, spins, yields, seconds < 0 ? 0 : seconds);
    return PyErr_CheckSignals() ? NULL : PyBool_FromLong(arrival == READY);
}

/* ---- reasons why a step has not ended */

static PyObject *awaited_method(RootedSteps *steps, PyObject *Py_UNUSED(none))
{
    PyObject *list = PyList_New(0);
    if (!list || !steps->under_way || steps->closed)
        return list;
    Awaited missing = missing_steps(steps);
    for (Py_ssize_t index = first_behind(&missing, 0); index >= 0; index = first_behind(&missing, index + 1)) {
        PyObject *rank = PyLong_FromSsize_t(missing.count == 1 ? steps->collective.root : index);
        if (!rank || PyList_Append(list, rank))
            Py_CLEAR(list);
        Py_XDECREF(rank);
        if (!list)
            return NULL;
    }
    return list;
}

/* Read a rank; -1 with an error set if there is none. */
static int read_rank(const RootedSteps *steps, PyObject *argument)
{
    long rank = PyLong_AsLong(argument);
    if (rank >= 0 && rank < steps->collective.ring->ranks)
        return (int)rank;
    if (!PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "there is no rank %ld", rank);
    return -1;
}

static PyObject *passed_method(RootedSteps *steps, PyObject *argument)
{
    int rank = read_rank(steps, argument);
    if (rank < 0)
        return NULL;
    if (!steps->under_way || steps->closed || steps->writes)
        return Py_NewRef(Py_None);
    int64_t order = __atomic_load_n(order_of_rank(steps, rank), __ATOMIC_ACQUIRE);
    return order > steps->order ? PyLong_FromLongLong(order) : Py_NewRef(Py_None);
}

static PyObject *tell_late_method(RootedSteps *steps, PyObject *Py_UNUSED(none))
{
    if (steps->under_way && !steps->closed)
        __atomic_store_n(order_of_rank(steps, steps->collective.ring->rank) + 1, late_call(steps), __ATOMIC_RELEASE);
    Py_RETURN_NONE;
}

static PyObject *late_elsewhere_method(RootedSteps *steps, PyObject *argument)
{
    int rank = read_rank(steps, argument);
    if (rank < 0)
        return NULL;
    if (!steps->under_way || steps->closed)
        return Py_NewRef(Py_None);
    int64_t theirs = __atomic_load_n(order_of_rank(steps, rank) + 1, __ATOMIC_ACQUIRE), own = late_call(steps);
    if (theirs >> NUMBER_BITS != own >> NUMBER_BITS || theirs == own)
        return Py_NewRef(Py_None);
    return PyLong_FromLongLong(theirs & ((1 << NUMBER_BITS) - 1));
}

static PyObject *is_deferred_method(RootedSteps *steps, PyObject *argument)
{
    int rank = read_rank(steps, argument);
    if (rank < 0)
        return NULL;
    int open = !steps->closed && steps->area.obj;
    return PyBool_FromLong(open && __atomic_load_n(&steps->counters[rank].deferred, __ATOMIC_ACQUIRE));
}

static PyObject *other_method(RootedSteps *steps, PyObject *Py_UNUSED(none))
{
    if (!steps->under_way || steps->closed || steps->other < 0)
        return Py_NewRef(Py_None);
    RootedSlot *slot = rooted_slot(steps, steps->other, steps->step);
    return Py_BuildValue("iLL", steps->other, (long long)slot->order, (long long)steps->order);
}

static PyObject *order_method(RootedSteps *steps, PyObject *Py_UNUSED(none))
{
    return PyLong_FromLongLong(steps->order);
}

static PyObject *left_out_method(RootedSteps *steps, PyObject *Py_UNUSED(none))
{
    if (steps->writes || !steps->area.obj || steps->closed || steps->under_way)
        return Py_NewRef(Py_None);
    Awaited writers = missing_steps(steps);
    for (Py_ssize_t index = 0; index < writers.count; index++) {
        int writer = writers.count == 1 ? steps->collective.root : (int)index;
        RootedSlot *slot = rooted_slot(steps, writer, steps->step);
        if (__atomic_load_n(&slot->step, __ATOMIC_ACQUIRE) == steps->step + 1)
            return Py_BuildValue("iL", writer, (long long)slot->order);
    }
    return Py_NewRef(Py_None);
}

static PyObject *is_closed_method(RootedSteps *steps, PyObject *Py_UNUSED(none))
{
    return PyBool_FromLong(steps->closed);
}

/* ---- the life of RootedSteps */

static PyObject *new_steps(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"ring",  "operation", "dtype", "reduction", "block_bytes", "root",
                            "source", "target",   "state", "late",      "sample",      "number", NULL};
    PyObject *ring, *source, *target, *state, *late, *sample;
    int operation, root;
    const char *dtype, *reduction;
    Py_ssize_t block;
    long long number;
    ModuleState *module = PyType_GetModuleState(type);
    if (!module || !PyArg_ParseTupleAndKeywords(args, keywords, "O!issniOOOOOL:RootedSteps", names, module->ring, &ring,
                                                &operation, &dtype, &reduction, &block, &root, &source, &target, &state,
                                                &late, &sample, &number))
        return NULL;
    RootedSteps *steps = (RootedSteps *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!steps)
        return NULL;
    Collective *c = &steps->collective;
    KnownArrays known = {NULL, NULL, 0};
    steps->ring = Py_NewRef(ring);
    steps->late = Py_NewRef(late);
    steps->other = -1;
    steps->number = number;
    c->ring = (Ring *)ring;
    c->operation = (Operation)operation;
    c->root = root;
    c->block = (size_t)block;
    c->parts = PyMem_Calloc((size_t)c->ring->ranks, sizeof *c->parts);
    int rooted = operation == BROADCAST || operation == SCATTER || operation == REDUCE || operation == GATHER;
    int reducible = operation != REDUCE ? !*reduction
                                        : find_arithmetic(dtype, reduction, c->ring->ranks, &c->arithmetic);
    int valid = rooted && block >= 0 && reducible && plan_collective(c);
    if (!c->parts) {
        PyErr_NoMemory();
    } else if (!valid) {
        PyErr_SetString(PyExc_ValueError, "there are no rooted steps for this collective");
    } else if (!learn_arrays(&known, sample) && !PyObject_GetBuffer(state, &steps->state, PyBUF_WRITABLE)) {
        steps->writes = (c->ring->rank == root) == (operation == BROADCAST || operation == SCATTER);
        steps->stride = rooted_stride(c);
        if (steps->state.len < 16 || (uintptr_t)steps->state.buf % 8)
            PyErr_SetString(PyExc_ValueError, "the state of a turn has at least two aligned int64");
        else if (!hold_arrays(c, &known, source, target, &steps->source, &steps->target))
            PyErr_SetString(PyExc_ValueError, "these arrays do not fit the collective");
    }
    Py_XDECREF((PyObject *)known.type);
    Py_XDECREF(known.dtype);
    if (!PyErr_Occurred())
        return (PyObject *)steps;
    Py_DECREF((PyObject *)steps);
    return NULL;
}

/* Read how many slots there are; -1 with an error set if that is no sane number. */
static Py_ssize_t read_depth(const RootedSteps *steps, PyObject *argument)
{
    Py_ssize_t depth = PyLong_AsSsize_t(argument);
    if (depth == -1 && PyErr_Occurred())
        return -1;
    Py_ssize_t slots = 2 * MOST_DEPTH * (Py_ssize_t)steps->collective.ring->ranks;
    if (depth >= 2 && depth <= MOST_DEPTH && steps->stride <= PY_SSIZE_T_MAX / slots)
        return depth;
    PyErr_Format(PyExc_ValueError, "a writer has 2 to %d slots", MOST_DEPTH);
    return -1;
}

static PyObject *area_bytes_method(RootedSteps *steps, PyObject *argument)
{
    Py_ssize_t depth = read_depth(steps, argument);
    return depth < 0 ? NULL : PyLong_FromSsize_t(rooted_bytes(steps, depth));
}

static PyObject *open_method(RootedSteps *steps, PyObject *args)
{
    PyObject *area, *number;
    if (!PyArg_UnpackTuple(args, "open", 2, 2, &area, &number))
        return NULL;
    Py_ssize_t depth = read_depth(steps, number);
    if (depth < 0)
        return NULL;
    if (steps->area.obj || steps->closed)
        return PyErr_Format(PyExc_ValueError, "this collective has its memory already, or was closed");
    if (PyObject_GetBuffer(area, &steps->area, PyBUF_WRITABLE))
        return NULL;
    if (steps->area.len < rooted_bytes(steps, depth) || (uintptr_t)steps->area.buf % sizeof(RootedCounter)) {
        PyBuffer_Release(&steps->area);
        return PyErr_Format(PyExc_ValueError, "the area has %zd bytes, aligned to %zu", rooted_bytes(steps, depth),
                            sizeof(RootedCounter));
    }
    const Ring *ring = steps->collective.ring;
    steps->counters = steps->area.buf;
    steps->slots = (char *)(steps->counters + ring->ranks);
    steps->depth = depth;
    if (!steps->writes && ring->rank == steps->collective.root) /* it waits for all writers, but not for itself */
        for (int64_t slot = 0; slot < depth; slot++)
            rooted_slot(steps, ring->rank, slot)->step = INT64_MAX;
    Py_RETURN_NONE;
}

static PyObject *close_method(RootedSteps *steps, PyObject *tell)
{
    int telling = PyObject_IsTrue(tell);
    if (telling < 0)
        return NULL;
    steps->closed = 1;
    PyBuffer_Release(&steps->source);
    PyBuffer_Release(&steps->target);
    if (telling) {
        release_area(steps);
    } else { /* a forked child, which has no other thread */
        steps->waiting = 0;
        PyBuffer_Release(&steps->area);
    }
    Py_RETURN_NONE;
}

static int visit_steps(RootedSteps *steps, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE((PyObject *)steps));
    Py_VISIT(steps->ring);
    Py_VISIT(steps->late);
    Py_VISIT(steps->source.obj);
    Py_VISIT(steps->target.obj);
    return 0;
}

/* Only `late` can lead back here; the rest stays as it is. */
static int clear_steps(RootedSteps *steps)
{
    Py_CLEAR(steps->late);
    steps->late = Py_NewRef(Py_None);
    return 0;
}

static void free_steps(RootedSteps *steps)
{
    PyTypeObject *type = Py_TYPE((PyObject *)steps);
    PyObject_GC_UnTrack(steps);
    PyBuffer_Release(&steps->source);
    PyBuffer_Release(&steps->target);
    PyBuffer_Release(&steps->area);
    PyBuffer_Release(&steps->state);
    PyMem_Free(steps->collective.parts);
    Py_XDECREF(steps->ring);
    Py_XDECREF(steps->late);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(steps);
    Py_DECREF(type);
}

static PyMethodDef methods[] = { /* described in ../rooted/native_steps.py */
    {"area_bytes", (PyCFunction)area_bytes_method, METH_O, NULL},
    {"open", (PyCFunction)open_method, METH_VARARGS, NULL},
    {"step", (PyCFunction)step_rooted, METH_NOARGS, NULL},
    {"begin", (PyCFunction)begin_method, METH_NOARGS, NULL},
    {"progress", (PyCFunction)progress_method, METH_NOARGS, NULL},
    {"wait", (PyCFunction)wait_method, METH_VARARGS, NULL},
    {"awaited", (PyCFunction)awaited_method, METH_NOARGS, NULL},
    {"passed", (PyCFunction)passed_method, METH_O, NULL},
    {"tell_late", (PyCFunction)tell_late_method, METH_NOARGS, NULL},
    {"late_elsewhere", (PyCFunction)late_elsewhere_method, METH_O, NULL},
    {"is_deferred", (PyCFunction)is_deferred_method, METH_O, NULL},
    {"other", (PyCFunction)other_method, METH_NOARGS, NULL},
    {"order", (PyCFunction)order_method, METH_NOARGS, NULL},
    {"left_out", (PyCFunction)left_out_method, METH_NOARGS, NULL},
    {"is_closed", (PyCFunction)is_closed_method, METH_NOARGS, NULL},
    {"close", (PyCFunction)close_method, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, new_steps},       {Py_tp_dealloc, free_steps}, {Py_tp_traverse, visit_steps},
    {Py_tp_clear, clear_steps},   {Py_tp_methods, methods},    {0, NULL},
};

PyType_Spec rooted_steps_spec = {
    .name = "ferro_gloo.shm._native.RootedSteps",
    .basicsize = sizeof(RootedSteps),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};
