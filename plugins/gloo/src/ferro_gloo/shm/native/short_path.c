/* ShortPath: runs a small collective in one call, as ferro.collectives.fast_path describes it.

   A call declines while the turn is another's. Otherwise it publishes this rank's data and waits some microseconds, with
   the interpreter lock. When the others are late it takes the turn's lock, so that no other thread begins a collective,
   and waits without the interpreter lock. When they are later still, or make another call, it leaves the waiting, and
   the error, to Python: `late(number, awaited)` waits for chunk `awaited` of all ranks and compares the labels of chunk
   `number`. */

#include "native.h"

#define BUSY 0
#define NUMBER 1
#define SPINS_WITH_GIL 100  /* with pauses of some tens of nanoseconds */
#define YIELDS 1000         /* see ../counters.py */
#define LONGEST_WAIT_S 0.01 /* as PEER_CHECK_S in ../slot_ring.py */

typedef struct {
    PyObject_HEAD
    PyObject *ring, *lock, *is_locked, *acquire, *release, *pending, *late;
    Py_buffer state; /* of the turn */
    Collective collective;
} ShortPath;

typedef struct {
    PyObject_HEAD
    ShortPath *path;
    Py_buffer source, target; /* `buf` is NULL where this rank has none */
    int64_t number;           /* of a started collective; -1: none is started */
    int closed;               /* and nothing is held */
} Bound;

/* ---- the turn */

static inline int64_t *state_of(const ShortPath *path)
{
    return path->state.buf;
}

/* Return 1 if a collective may begin now, 0 if not, -1 with an error set. */
static int is_free(ShortPath *path)
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

/* Call the lock's `acquire`, which is free and does not block, or its `release`. */
static int change_lock(PyObject *method)
{
    PyObject *result = PyObject_CallNoArgs(method);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

/* ---- waiting */

/* Try for some microseconds, with the GIL, where every rank has a core of its own. */
static Arrival spin(Collective *c, int64_t number)
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

/* Wait until all that this rank needs is there; the turn's lock is held. Return -1 with an error set if that fails. */
static int wait_longer(ShortPath *path, int64_t number)
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

/* Have this core own the line that this rank writes next, as soon as the others do not need it. */
static inline void prepare_next(const Ring *ring)
{
    __builtin_prefetch(line_of(ring, ring->rank, ring->next), 1);
}

/* Run the collective; return None's or an error's object in the manner of Python calls. */
static PyObject *run(ShortPath *path, const char *source, char *target)
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

/* Hold an array of `nbytes`; return 0, without an error, if it is not what is needed. */
static int hold(PyObject *array, size_t nbytes, size_t itemsize, int flags, Py_buffer *held)
{
    if (PyObject_GetBuffer(array, held, flags)) {
        PyErr_Clear();
        held->obj = NULL;
        held->buf = NULL;
        return 0;
    }
    int fits = (size_t)held->len == nbytes && (!itemsize || (uintptr_t)held->buf % itemsize == 0);
    if (!fits)
        PyBuffer_Release(held);
    return fits;
}

/* Return 1 if the arrays are apart, or the same, or in a gathering the source is this rank's block of the target. */
static int are_apart(const Collective *c, const Py_buffer *source, const Py_buffer *target)
{
    const char *from = source->buf, *to = target->buf;
    if (!from || !to || from + source->len <= to || to + target->len <= from)
        return 1;
    if (c->operation == ALL_GATHER || c->operation == GATHER)
        return from == to + (size_t)c->ring->rank * c->block;
    return from == to && source->len == target->len;
}

/* Hold both arrays, as far as this rank needs them; return 0, without an error, if they cannot be used. */
static int hold_both(const Collective *c, PyObject *from, PyObject *to, Py_buffer *source, Py_buffer *target)
{
    size_t itemsize = c->arithmetic.itemsize;
    int is_root = c->operation == BROADCAST && c->source; /* it has its result already where that is the source */
    int has_target = c->target && !(is_root && (to == from || to == Py_None));
    *source = *target = (Py_buffer){.buf = NULL, .obj = NULL};
    if (has_target && !hold(to, c->target, itemsize, PyBUF_WRITABLE, target))
        return 0;
    if (c->source && has_target && from == to && c->source == c->target) {
        source->buf = target->buf; /* and it is held */
        source->len = target->len;
        return 1;
    }
    int valid = !c->source || hold(from, c->source, itemsize, PyBUF_SIMPLE, source);
    if (valid && are_apart(c, source, target))
        return 1;
    if (valid)
        PyBuffer_Release(source);
    PyBuffer_Release(target);
    return 0;
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
    if (!hold_both(&path->collective, from, to, &source, &target))
        Py_RETURN_FALSE;
    PyObject *result = NULL;
    int free = is_free(path);
    if (free > 0)
        result = run(path, source.buf, target.buf);
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
                            "lock", "pending",   "state", "late",      NULL};
    PyObject *ring, *lock, *pending, *state, *late;
    int operation, root;
    const char *dtype, *reduction;
    Py_ssize_t block, length;
    const unsigned char *label;
    ModuleState *module = PyType_GetModuleState(type);
    if (!module || !PyArg_ParseTupleAndKeywords(args, keywords, "O!issniy#OOOO:ShortPath", names, module->ring, &ring,
                                                &operation, &dtype, &reduction, &block, &root, &label, &length, &lock,
                                                &pending, &state, &late))
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
        if (path->release && !PyObject_GetBuffer(state, &path->state, PyBUF_WRITABLE)) {
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
        if (c->ring->writers[slot] == c)
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
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(path);
    Py_DECREF(type);
}

/* ---- Bound: a ShortPath with its arrays */

static PyObject *bind(ShortPath *path, PyObject *args)
{
    PyObject *from, *to;
    if (!PyArg_UnpackTuple(args, "bind", 2, 2, &from, &to))
        return NULL;
    ModuleState *module = PyType_GetModuleState(Py_TYPE((PyObject *)path));
    if (!module)
        return NULL;
    Bound *bound = (Bound *)((allocfunc)PyType_GetSlot(module->bound, Py_tp_alloc))(module->bound, 0);
    if (!bound)
        return NULL;
    bound->number = -1;
    bound->path = (ShortPath *)Py_NewRef((PyObject *)path);
    if (hold_both(&path->collective, from, to, &bound->source, &bound->target))
        return (PyObject *)bound;
    bound->source.obj = bound->target.obj = NULL; /* nothing is held */
    Py_DECREF((PyObject *)bound);
    Py_RETURN_NONE;
}

static PyObject *call_bound(Bound *bound, PyObject *args, PyObject *keywords)
{
    if (PyTuple_Size(args) || (keywords && PyDict_Size(keywords))) {
        PyErr_SetString(PyExc_TypeError, "a bound ShortPath takes no arguments");
        return NULL;
    }
    int free = bound->closed ? 0 : is_free(bound->path);
    if (free > 0)
        return run(bound->path, bound->source.buf, bound->target.buf);
    return free < 0 ? NULL : Py_NewRef(Py_False);
}

static PyObject *start(Bound *bound, PyObject *Py_UNUSED(ignored))
{
    ShortPath *path = bound->path;
    if (state_of(path)[BUSY] || path->collective.ring->retracted || bound->number >= 0 || bound->closed)
        Py_RETURN_FALSE;
    state_of(path)[NUMBER]++;
    bound->number = begin_collective(&path->collective, bound->source.buf, 1);
    Py_RETURN_TRUE;
}

static int is_started(const Bound *bound)
{
    if (bound->number < 0)
        PyErr_SetString(PyExc_RuntimeError, "this operation has not been started");
    return bound->number >= 0;
}

static PyObject *test(Bound *bound, PyObject *Py_UNUSED(ignored))
{
    if (!is_started(bound))
        return NULL;
    /* An error is at hand, too, when a rank makes another call. */
    return PyBool_FromLong(advance_collective(&bound->path->collective, bound->number) != LATE);
}

static PyObject *finish(Bound *bound, PyObject *Py_UNUSED(ignored))
{
    if (!is_started(bound))
        return NULL;
    Collective *c = &bound->path->collective;
    int64_t number = bound->number;
    bound->number = -1;
    if (spin(c, number) != READY && wait_longer(bound->path, number))
        return NULL;
    finish_collective(c, number, bound->source.buf, bound->target.buf, 1);
    prepare_next(c->ring);
    Py_RETURN_NONE;
}

static PyObject *close_bound(Bound *bound, PyObject *Py_UNUSED(ignored))
{
    if (bound->number >= 0) {
        PyErr_SetString(PyExc_RuntimeError, "a started operation must be finished first");
        return NULL;
    }
    bound->closed = 1;
    PyBuffer_Release(&bound->source);
    PyBuffer_Release(&bound->target);
    Py_RETURN_NONE;
}

static int visit_bound(Bound *bound, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE((PyObject *)bound));
    Py_VISIT(bound->path);
    Py_VISIT(bound->source.obj);
    Py_VISIT(bound->target.obj);
    return 0;
}

static void free_bound(Bound *bound)
{
    PyTypeObject *type = Py_TYPE((PyObject *)bound);
    PyObject_GC_UnTrack(bound);
    PyBuffer_Release(&bound->source);
    PyBuffer_Release(&bound->target);
    Py_XDECREF((PyObject *)bound->path);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(bound);
    Py_DECREF(type);
}

static PyMethodDef path_methods[] = { /* described in ../native.py */
    {"bind", (PyCFunction)bind, METH_VARARGS, NULL},
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

static PyMethodDef bound_methods[] = {
    {"start", (PyCFunction)start, METH_NOARGS, NULL},
    {"test", (PyCFunction)test, METH_NOARGS, NULL},
    {"finish", (PyCFunction)finish, METH_NOARGS, NULL},
    {"close", (PyCFunction)close_bound, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot bound_slots[] = {
    {Py_tp_dealloc, free_bound}, {Py_tp_traverse, visit_bound}, {Py_tp_call, call_bound},
    {Py_tp_methods, bound_methods}, {0, NULL},
};

PyType_Spec bound_spec = {
    .name = "ferro_gloo.shm._native.BoundShortPath",
    .basicsize = sizeof(Bound),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = bound_slots,
};
