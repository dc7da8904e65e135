/* AnnouncedScatter: a small scatter in one call, with the broadcast of its header (see AnnouncedScatter in
   ferro.collectives.fast_path). The two are collectives of their own, and other ranks may run them one by one:

       chunk        root                             another rank
       number       writes and publishes the header  publishes; waits for the root's chunk, and compares the header
       number + 1   writes and publishes the blocks  publishes; waits for all ranks' chunks, and takes its block

   The root waits only for chunk number + 1. It may write that before it has waited for chunk number, as in an operation
   of two chunks (../slot_ring.py). Another rank publishes chunk number + 1 only if the header is the one that it
   expects. Otherwise the broadcast alone has taken place, and the call returns what the root has told. */

#include "native.h"

#define YIELDS 1000         /* see ../counters.py */
#define LONGEST_WAIT_S 0.01 /* as PEER_CHECK_S in ../slot_ring.py */
#define SPINS_WITH_GIL 100  /* as in short_path.c */

typedef struct {
    PyObject_HEAD
    ShortPath *tell, *blocks;
    size_t length;
    char header[LINE_DATA_BYTES];
} Announced;

/* Take the turn's lock before the first wait without the interpreter lock. */
static int take_lock(Announced *announced, int *locked)
{
    if (*locked)
        return 0;
    if (change_lock(announced->blocks->acquire))
        return -1;
    *locked = 1;
    return 0;
}

/* Wait until the root's header is there; return -1 with an error set if that fails. */
static int wait_for_header(Announced *announced, int64_t number, int *locked)
{
    Collective *c = &announced->tell->collective;
    Ring *ring = c->ring;
    Awaited all = awaited_lines(ring, number), root = all;
    root.first += c->root * all.stride;
    root.counters += c->root * all.counter_stride;
    root.count = 1;
    for (int tries = 0; ring->spins && tries < SPINS_WITH_GIL && first_behind(&root, 0) >= 0; tries++)
        relax();
    if (first_behind(&root, 0) >= 0) {
        Py_ssize_t behind;
        int interrupted = 0;
        if (take_lock(announced, locked))
            return -1;
        Py_BEGIN_ALLOW_THREADS
        behind = wait_without_gil(&root, 0, ring->spins, YIELDS, LONGEST_WAIT_S, &interrupted);
        Py_END_ALLOW_THREADS
        if (behind >= 0)
            return wait_longer(announced->tell, number); /* for all ranks, of which one may be gone */
    }
    if (line_of(ring, c->root, number)->digest == c->digest)
        return 0;
    return take_lock(announced, locked) ? -1 : wait_longer(announced->tell, number);
}

/* Wait until all ranks have published a chunk; return -1 with an error set if that fails. */
static int complete(Announced *announced, ShortPath *path, int64_t number, int *locked)
{
    if (spin(&path->collective, number) == READY)
        return 0;
    return take_lock(announced, locked) ? -1 : wait_longer(path, number);
}

/* Run both collectives; return True, the header that the root has told instead, or NULL with an error set. */
static PyObject *run_both(Announced *announced, const char *source, char *target, int *locked)
{
    Collective *tell = &announced->tell->collective, *blocks = &announced->blocks->collective;
    int at_root = tell->source > 0;
    int64_t *begun = state_of(announced->blocks) + NUMBER;
    ++*begun;
    int64_t number = begin_collective(tell, announced->header, 1);
    if (!at_root) {
        if (wait_for_header(announced, number, locked))
            return NULL;
        const char *told = data_of(tell->ring, tell->root, number, tell->published);
        if (memcmp(told, announced->header, announced->length)) {
            if (complete(announced, announced->tell, number, locked))
                return NULL;
            return PyBytes_FromStringAndSize(told, (Py_ssize_t)announced->length);
        }
    }
    int whole = needs_whole(blocks, source, target);
    int64_t next = begin_collective(blocks, source, whole);
    /* All lines of the first chunk are there when those of the second are; the labels of both must be right. */
    if (spin(blocks, next) != READY || advance_collective(tell, number) != READY) {
        if (complete(announced, announced->tell, number, locked))
            return NULL;
        ++*begun;
        if (complete(announced, announced->blocks, next, locked))
            return NULL;
    } else {
        ++*begun;
    }
    finish_collective(blocks, next, source, target, whole);
    prepare_next(blocks->ring);
    Py_RETURN_TRUE;
}

static PyObject *call_announced(Announced *announced, PyObject *args, PyObject *keywords)
{
    PyObject *from, *to;
    Py_buffer source, target;
    if (!PyArg_UnpackTuple(args, "AnnouncedScatter", 2, 2, &from, &to))
        return NULL;
    if (keywords && PyDict_Size(keywords)) {
        PyErr_SetString(PyExc_TypeError, "an AnnouncedScatter takes positional arguments only");
        return NULL;
    }
    ShortPath *blocks = announced->blocks;
    if (!hold_arrays(&blocks->collective, &blocks->known, from, to, &source, &target))
        Py_RETURN_FALSE;
    PyObject *result = NULL;
    int free = is_free(blocks), locked = 0;
    if (free > 0)
        result = run_both(announced, source.buf, target.buf, &locked);
    else if (free == 0)
        result = Py_NewRef(Py_False);
    if (locked) {
        PyObject *type, *value, *traceback;
        PyErr_Fetch(&type, &value, &traceback);
        if (change_lock(blocks->release))
            PyErr_Clear(); /* the lock was taken here, and is released by nobody else */
        PyErr_Restore(type, value, traceback);
    }
    PyBuffer_Release(&source);
    PyBuffer_Release(&target);
    return result;
}

static PyObject *new_announced(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"tell", "blocks", "header", NULL};
    PyObject *tell, *blocks;
    const char *header;
    Py_ssize_t length;
    ModuleState *module = PyType_GetModuleState(type);
    if (!module || !PyArg_ParseTupleAndKeywords(args, keywords, "O!O!y#:AnnouncedScatter", names, module->short_path,
                                                &tell, module->short_path, &blocks, &header, &length))
        return NULL;
    const Collective *first = &((ShortPath *)tell)->collective, *second = &((ShortPath *)blocks)->collective;
    if (first->operation != BROADCAST || second->operation != SCATTER || first->ring != second->ring ||
        first->root != second->root || length < 1 || length > LINE_DATA_BYTES || first->block != (size_t)length) {
        PyErr_SetString(PyExc_ValueError, "these are no scatter and the broadcast of its header");
        return NULL;
    }
    Announced *announced = (Announced *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!announced)
        return NULL;
    announced->tell = (ShortPath *)Py_NewRef(tell);
    announced->blocks = (ShortPath *)Py_NewRef(blocks);
    announced->length = (size_t)length;
    memcpy(announced->header, header, (size_t)length);
    return (PyObject *)announced;
}

static int visit_announced(Announced *announced, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE((PyObject *)announced));
    Py_VISIT(announced->tell);
    Py_VISIT(announced->blocks);
    return 0;
}

static void free_announced(Announced *announced)
{
    PyTypeObject *type = Py_TYPE((PyObject *)announced);
    PyObject_GC_UnTrack(announced);
    Py_XDECREF((PyObject *)announced->tell);
    Py_XDECREF((PyObject *)announced->blocks);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(announced);
    Py_DECREF(type);
}

static PyType_Slot announced_slots[] = {
    {Py_tp_new, new_announced},
    {Py_tp_dealloc, free_announced},
    {Py_tp_traverse, visit_announced},
    {Py_tp_call, call_announced},
    {0, NULL},
};

PyType_Spec announced_spec = {
    .name = "ferro_gloo.shm._native.AnnouncedScatter",
    .basicsize = sizeof(Announced),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = announced_slots,
};
