/* ShortPath: runs a small collective in one call, as ferro.collectives.fast_path describes it.

   A call declines while the turn is another's. Otherwise it publishes this rank's data and waits some microseconds, with
   the interpreter lock. When the others are late it takes the turn's lock, so that no other thread begins a collective,
   and waits without the interpreter lock. When they are later still, or make another call, it leaves the waiting, and
   the error, to Python: `late(number, awaited)` waits for chunk `awaited` of all ranks and compares the labels of chunk
   `number`. */

#include "native.h"

#define SPINS_WITH_GIL 100  /* with pauses of some tens of nanoseconds */
#define YIELDS 1000         /* see ../counters.py */
#define LONGEST_WAIT_S 0.01 /* as PEER_CHECK_S in ../slot_ring.py */

/* ---- the turn */

int is_free(ShortPath *path)
{
    if (state_of(path)[BUSY] || path->collective.ring->retracted)
        return 0;
    Py_ssize_t pending = PyObject_Size(path->pending);
    if (pending)
        return pending < 0 ? -1 : 0;
    PyObject *locked = PyObject_CallNoArgs(path->is_locked);
    if (!locked)
        return -1;
    int free = locked == Py_False;
    Py_DECREF(locked);
    return free;
}

int change_lock(PyObject *method)
{
    PyObject *result = PyObject_CallNoArgs(method);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

/* ---- waiting */

Arrival spin(Collective *c, int64_t number)
{
    Arrival arrival = advance_collective(c, number);
    if (arrival != LATE || !c->ring->spins)
        return arrival;
    Awaited missing = missing_lines(c, number);
    for (int tries = 0; tries < SPINS_WITH_GIL && first_behind(&missing, 0) >= 0; tries++)
        relax();
    return advance_collective(c, number);
}

/* Leave the waiting to Python; return -1 with an error set if that raises one. */
static int wait_in_python(ShortPath *path, int64_t number, int64_t awaited)
{
    PyObject *result = PyObject_CallFunction(path->late, "LL", (long long)number, (long long)awaited);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

int wait_longer(ShortPath *path, int64_t number)
{
    Collective *c = &path->collective;
    Arrival arrival;
    while ((arrival = advance_collective(c, number)) == LATE) {
        Awaited missing = missing_lines(c, number);
        Py_ssize_t behind;
        int interrupted = 0; /* the handler of a signal runs in Python */
        Py_BEGIN_ALLOW_THREADS
        behind = wait_without_gil(&missing, first_behind(&missing, 0), c->ring->spins, YIELDS, LONGEST_WAIT_S,
                                  &interrupted);
        Py_END_ALLOW_THREADS
        if (behind >= 0 && wait_in_python(path, number, missing.value - 1))
            return -1;
    }
    if (arrival == READY)
        return 0;
    if (!wait_in_python(path, number, number))
        PyErr_SetString(PyExc_RuntimeError, "ranks whose labels are equal have different digests of them");
    return -1;
}

/* ---- a call */

PyObject *run_path(ShortPath *path, const char *source, char *target)
{
    Collective *c = &path->collective;
    state_of(path)[NUMBER]++;
    int whole = needs_whole(c, source, target);
    int64_t number = begin_collective(c, source, whole);
    if (spin(c, number) != READY) {
        if (change_lock(path->acquire))
            return NULL;
        if (wait_longer(path, number)) {
            PyObject *type, *value, *traceback;
            PyErr_Fetch(&type, &value, &traceback);
            if (change_lock(path->release))
                PyErr_Clear();
            PyErr_Restore(type, value, traceback);
            return NULL;
        }
        finish_collective(c, number, source, target, whole);
        if (change_lock(path->release))
            return NULL;
    } else {
        finish_collective(c, number, source, target, whole);
    }
    prepare_next(c->ring);
    Py_RETURN_TRUE;
}

static PyObject *call_path(ShortPath *path, PyObject *args, PyObject *keywords)
{
    PyObject *from, *to;
    Py_buffer source, target;
    if (!PyArg_UnpackTuple(args, "ShortPath", 2, 2, &from, &to))
        return NULL;
    if (keywords && PyDict_Size(keywords)) {
        PyErr_SetString(PyExc_TypeError, "a ShortPath takes positional arguments only");
        return NULL;
    }
    if (!hold_arrays(&path->collective, &path->known, from, to, &source, &target))
        Py_RETURN_FALSE;
    PyObject *result = NULL;
    int free = is_free(path);
    if (free > 0)
        result = run_path(path, source.buf, target.buf);
    else if (free == 0)
        result = Py_NewRef(Py_False);
    PyBuffer_Release(&source);
    PyBuffer_Release(&target);
    return result;
}

/* ---- the life of a ShortPath */

static PyObject *new_path(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"ring", "operation", "dtype", "reduction", "block_bytes", "root", "label",
                            "lock", "pending",   "state", "late",      "sample",      NULL};
    PyObject *ring, *lock, *pending, *state, *late, *sample;
    int operation, root;
    const char *dtype, *reduction;
    Py_ssize_t block, length;
    const unsigned char *label;
    ModuleState *module = PyType_GetModuleState(type);
    if (!module || !PyArg_ParseTupleAndKeywords(args, keywords, "O!issniy#OOOOO:ShortPath", names, module->ring, &ring,
                                                &operation, &dtype, &reduction, &block, &root, &label, &length, &lock,
                                                &pending, &state, &late, &sample))
        return NULL;
    ShortPath *path = (ShortPath *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!path)
        return NULL;
    Collective *c = &path->collective;
    path->ring = Py_NewRef(ring);
    path->lock = Py_NewRef(lock);
    path->pending = Py_NewRef(pending);
    path->late = Py_NewRef(late);
    c->ring = (Ring *)ring;
    c->operation = (Operation)operation;
    c->root = root;
    c->block = (size_t)block;
    c->parts = PyMem_Calloc((size_t)c->ring->ranks, sizeof *c->parts);
    int valid = operation >= 0 && operation < OPERATIONS && block >= 0 && length == LABEL_BYTES;
    int reduces = valid && (operation == ALL_REDUCE || operation == REDUCE || operation == REDUCE_SCATTER);
    valid = valid && (reduces ? find_arithmetic(dtype, reduction, c->ring->ranks, &c->arithmetic) : !*reduction) &&
            plan_collective(c);
    if (!c->parts) {
        PyErr_NoMemory();
    } else if (!valid) {
        PyErr_SetString(PyExc_ValueError, "there is no short path for this collective");
    } else {
        memcpy(c->label, label, LABEL_BYTES);
        c->digest = digest_of(label);
        path->is_locked = PyObject_GetAttrString(lock, "locked");
        path->acquire = path->is_locked ? PyObject_GetAttrString(lock, "acquire") : NULL;
        path->release = path->acquire ? PyObject_GetAttrString(lock, "release") : NULL;
        if (path->release && !learn_arrays(&path->known, sample) &&
            !PyObject_GetBuffer(state, &path->state, PyBUF_WRITABLE)) {
            if (path->state.len >= 16 && (uintptr_t)path->state.buf % 8 == 0)
                return (PyObject *)path;
            PyErr_SetString(PyExc_ValueError, "the state of a turn has at least two aligned int64");
        }
    }
    Py_DECREF((PyObject *)path);
    return NULL;
}

static int visit_path(ShortPath *path, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE((PyObject *)path));
    Py_VISIT(path->ring);
    Py_VISIT(path->lock);
    Py_VISIT(path->is_locked);
    Py_VISIT(path->acquire);
    Py_VISIT(path->release);
    Py_VISIT(path->pending);
    Py_VISIT(path->late);
    Py_VISIT(path->known.type);
    Py_VISIT(path->known.dtype);
    return 0;
}

/* Only `late` can lead back here. The rest stays as it is, so that a path in a cycle is never half a path. */
static int clear_path(ShortPath *path)
{
    Py_CLEAR(path->late);
    path->late = Py_NewRef(Py_None);
    return 0;
}

/* Another collective may get the memory of this one, and its address. */
static void forget_writer(Collective *c)
{
    for (int slot = 0; c->ring && slot < SLOTS; slot++)
        if (c->ring->writers[slot] == c || c->ring->writers[slot] == c->label)
            c->ring->writers[slot] = NULL;
}

static void free_path(ShortPath *path)
{
    PyTypeObject *type = Py_TYPE((PyObject *)path);
    PyObject_GC_UnTrack(path);
    forget_writer(&path->collective);
    PyBuffer_Release(&path->state);
    PyMem_Free(path->collective.parts);
    Py_XDECREF(path->ring);
    Py_XDECREF(path->lock);
    Py_XDECREF(path->is_locked);
    Py_XDECREF(path->acquire);
    Py_XDECREF(path->release);
    Py_XDECREF(path->pending);
    Py_XDECREF(path->late);
    Py_XDECREF((PyObject *)path->known.type);
    Py_XDECREF(path->known.dtype);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(path);
    Py_DECREF(type);
}

static PyMethodDef path_methods[] = { /* described in ../native.py */
    {"bind", (PyCFunction)bind_path, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot path_slots[] = {
    {Py_tp_new, new_path},       {Py_tp_dealloc, free_path}, {Py_tp_traverse, visit_path},
    {Py_tp_clear, clear_path},   {Py_tp_call, call_path},    {Py_tp_methods, path_methods},
    {0, NULL},
};

PyType_Spec short_path_spec = {
    .name = "ferro_gloo.shm._native.ShortPath",
    .basicsize = sizeof(ShortPath),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = path_slots,
};
