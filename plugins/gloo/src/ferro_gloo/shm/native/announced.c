/* AnnouncedScatter: a small scatter in one call, with the broadcast of its header (see AnnouncedScatter in
   ferro.collectives.fast_path). The two are collectives of their own, and other ranks may run them one by one:

       chunk        root                             another rank
       number       writes and publishes the header  publishes; waits for all ranks' chunks, and compares the header
       number + 1   writes and publishes the blocks  publishes; waits for the root's chunk, and takes its block

   The root publishes both at once, and waits for chunk number of all ranks. No rank waits for chunk number + 1 of ranks
   that write nothing into it: ../slot_ring.py says why that is right. A rank publishes chunk number + 1 only if the
   header is the one that it expects. Otherwise the broadcast alone has taken place, and the call returns what the root
   has told. */

#include "native.h"

#define SPINS_WITH_GIL 100 /* as in short_path.c */

typedef struct {
    PyObject_HEAD
    ShortPath *tell, *blocks;
    size_t length;
    char header[LINE_DATA_BYTES];
} Announced;

/* Wait until all ranks have published a chunk, with equal labels; return -1 with an error set if that fails. */
static int complete(Announced *announced, ShortPath *path, int64_t number, int *locked)
{
    if (spin(&path->collective, number) == READY)
        return 0;
    if (!*locked && change_lock(announced->blocks->acquire))
        return -1;
    *locked = 1; /* until the call ends */
    return wait_longer(path, number);
}

/* Wait until the root has published its blocks; return -1 with an error set if that fails. */
static int wait_for_blocks(Announced *announced, int64_t number, int *locked)
{
    const Collective *c = &announced->blocks->collective;
    const Line *line = line_of(c->ring, c->root, number);
    Awaited root = {(char *)&line->number, 0, 1, number + 1, NULL, 0};
    for (int tries = 0; c->ring->spins && tries < SPINS_WITH_GIL && first_behind(&root, 0) >= 0; tries++)
        relax();
    if (first_behind(&root, 0) < 0 && line->digest == c->digest)
        return 0;
    return complete(announced, announced->blocks, number, locked);
}

/* Say whether a rank may still read the chunk before the last one, in whose slot the second of two chunks goes. */
static int is_behind(const Ring *ring, int64_t number)
{
    Awaited last = awaited_lines(ring, number - 1);
    return ring->unawaited == number - 1 && first_behind(&last, 0) >= 0;
}

/* Run both collectives; return True, the header that the root has told instead, or NULL with an error set. */
static PyObject *run_both(Announced *announced, const char *source, char *target, int *locked)
{
    Collective *tell = &announced->tell->collective, *blocks = &announced->blocks->collective;
    Ring *ring = tell->ring;
    int at_root = tell->source > 0, whole = needs_whole(blocks, source, target);
    int64_t *begun = state_of(announced->blocks) + NUMBER;
    ++*begun;
    int64_t number = write_collective(tell, announced->header, 1), next = -1;
    if (at_root && !is_behind(ring, number))
        next = write_collective(blocks, source, whole);
    publish_written(ring, next < 0 ? number : next);
    if (complete(announced, announced->tell, number, locked))
        return NULL;
    const char *told = data_of(ring, tell->root, number, tell->published);
    if (!at_root && memcmp(told, announced->header, announced->length))
        return PyBytes_FromStringAndSize(told, (Py_ssize_t)announced->length);
    ++*begun;
    if (next < 0)
        next = begin_collective(blocks, source, whole);
    if (!at_root && wait_for_blocks(announced, next, locked))
        return NULL;
    ring->unawaited = next;
    finish_collective(blocks, next, source, target, whole);
    prepare_line(ring, ring->next);
    prepare_line(ring, ring->next + 1);
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
