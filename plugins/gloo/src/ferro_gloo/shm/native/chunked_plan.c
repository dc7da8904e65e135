/* ChunkedPlan: this rank's part in a collective of large arrays (see chunked.c), checked once and run on any arrays. */

#include "native.h"

#include <limits.h>
#include <stddef.h>
#include <structmember.h>

#define MOST_TRIES 1000000

/* Read `count` numbers, none below -1, from a tuple; set an error if it does not hold them. */
static int read_numbers(PyObject *tuple, Py_ssize_t count, Py_ssize_t *numbers)
{
    Py_ssize_t size = tuple ? PyTuple_Size(tuple) : -1;
    if (size != count) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "here are %zd numbers, not %zd", size, count);
        return 0;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        numbers[i] = PyLong_AsSsize_t(PyTuple_GetItem(tuple, i));
        if (numbers[i] < -1 || (numbers[i] == -1 && PyErr_Occurred())) {
            if (!PyErr_Occurred())
                PyErr_SetString(PyExc_ValueError, "a plan has no negative numbers");
            return 0;
        }
    }
    return 1;
}

/* Return 1 if `bytes` bytes from `start` on are within `limit` bytes. */
static int is_within(Py_ssize_t start, Py_ssize_t bytes, Py_ssize_t limit)
{
    return start >= 0 && bytes >= 0 && bytes <= limit && start <= limit - bytes;
}

/* Return 1 if a chunk of as many bytes is within a slot. */
static int fits_slot(const ChunkedPlan *plan, Py_ssize_t start, Py_ssize_t bytes)
{
    return is_within(start, bytes < plan->length ? bytes : plan->length, plan->ring->slot_bytes);
}

static int is_valid(const ChunkedPlan *plan, const Move *move, char kind)
{
    int reads = kind == 't' ? fits_slot(plan, move->from, move->bytes)
                            : is_within(move->from, move->bytes, plan->source_bytes);
    int writes = kind == 's' ? fits_slot(plan, move->to, move->bytes)
                             : is_within(move->to, move->bytes, plan->target_bytes);
    return reads && writes && move->rank >= 0 && move->rank < plan->ring->ranks;
}

/* Read moves (to, from, bytes, rank) of kind 's'tage, 'o'wn or 't'ake. */
static int read_moves(ChunkedPlan *plan, Moves *moves, PyObject *items, char kind)
{
    Py_ssize_t count = PyTuple_Size(items);
    if (count < 0 || !(moves->moves = PyMem_Calloc((size_t)count + 1, sizeof *moves->moves)))
        return count < 0 ? 0 : (PyErr_NoMemory(), 0);
    for (; moves->count < count; moves->count++) {
        Move *move = &moves->moves[moves->count];
        Py_ssize_t numbers[4];
        if (!read_numbers(PyTuple_GetItem(items, moves->count), 4, numbers))
            return 0;
        *move = (Move){numbers[0], numbers[1], numbers[2], numbers[3]};
        if (!is_valid(plan, move, kind)) {
            PyErr_SetString(PyExc_ValueError, "a move of this plan leaves its array or its slot");
            return 0;
        }
    }
    return 1;
}

/* Read (own, out or -1, bytes, the offset in each rank's slot, dtype, reduction). */
static int read_reduction(ChunkedPlan *plan, PyObject *tuple)
{
    PyObject *own, *out, *bytes, *offsets;
    const char *dtype, *reduction;
    if (!PyArg_ParseTuple(tuple, "OOOOss", &own, &out, &bytes, &offsets, &dtype, &reduction))
        return 0;
    plan->own = PyLong_AsSsize_t(own);
    plan->out = PyLong_AsSsize_t(out);
    plan->reduced = PyLong_AsSsize_t(bytes);
    if (PyErr_Occurred() || !read_numbers(offsets, plan->ring->ranks, plan->offsets))
        return 0;
    int valid = find_arithmetic(dtype, reduction, plan->ring->ranks, &plan->arithmetic) &&
                is_within(plan->own, plan->reduced, plan->source_bytes) && fits_slot(plan, 0, plan->reduced) &&
                (plan->out < 0 ? plan->two_phase : is_within(plan->out, plan->reduced, plan->target_bytes));
    Py_ssize_t size = valid ? (Py_ssize_t)plan->arithmetic.itemsize : 1;
    valid = valid && !(plan->own % size || plan->reduced % size || plan->length % size);
    valid = valid && (plan->out < 0 || plan->out % size == 0);
    /* In one phase the result is written over an operand, which may be one of the first two only. */
    valid = valid && (plan->two_phase || plan->in_place < 0 || plan->ring->rank < 2);
    for (Py_ssize_t rank = 0; valid && rank < plan->ring->ranks; rank++)
        valid = fits_slot(plan, plan->offsets[rank], plan->reduced) && plan->offsets[rank] % size == 0;
    if (!valid)
        PyErr_SetString(PyExc_ValueError, "this plan has a reduction that is unknown, or leaves an array or a slot");
    plan->reduces = valid;
    return valid;
}

static PyObject *new_plan(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"ring", "stage", "own", "take", "reduction", "sizes", "two_phase", "past_caches", "arena",
                            "header", NULL};
    PyObject *ring, *stage, *own, *take, *reduction, *sizes;
    int two_phase, past_caches;
    unsigned long long arena, arena_end;
    const unsigned char *header;
    Py_ssize_t header_bytes, numbers[5];
    ModuleState *module = PyType_GetModuleState(type);
    if (!module || !PyArg_ParseTupleAndKeywords(args, keywords, "O!OOOOOpp(KK)y#:ChunkedPlan", names, module->ring, &ring,
                                                &stage, &own, &take, &reduction, &sizes, &two_phase, &past_caches,
                                                &arena, &arena_end, &header, &header_bytes) ||
        !read_numbers(sizes, 5, numbers))
        return NULL;
    ChunkedPlan *plan = (ChunkedPlan *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!plan)
        return NULL;
    plan->ring = (Ring *)Py_NewRef(ring);
    plan->source_bytes = numbers[0];
    plan->target_bytes = numbers[1];
    plan->in_place = numbers[2];
    plan->length = numbers[3];
    plan->chunks = numbers[4];
    plan->two_phase = two_phase;
    plan->past_caches = past_caches;
    plan->arena = (uintptr_t)arena;
    plan->arena_end = (uintptr_t)arena_end;
    plan->offsets = PyMem_Calloc((size_t)plan->ring->ranks, sizeof *plan->offsets);
    plan->operands = PyMem_Calloc((size_t)plan->ring->ranks, sizeof *plan->operands);
    if (!plan->offsets || !plan->operands)
        PyErr_NoMemory();
    else if (plan->source_bytes < 0 || plan->target_bytes < 0 || plan->length < 1 || plan->chunks < 1 ||
             plan->chunks > PY_SSIZE_T_MAX / 4 / plan->length || header_bytes < LABEL_BYTES ||
             header_bytes > HEADER_BYTES || header_bytes % 8)
        PyErr_SetString(PyExc_ValueError, "a plan has arrays, chunks and a header");
    else if (read_moves(plan, &plan->stages, stage, 's') && read_moves(plan, &plan->owns, own, 'o') &&
             read_moves(plan, &plan->takes, take, 't') && (reduction == Py_None || read_reduction(plan, reduction))) {
        memcpy(plan->header, header, (size_t)header_bytes);
        plan->header_bytes = (size_t)header_bytes;
        plan->digest = digest_of(header);
        if (plan->reduces || !two_phase)
            return (PyObject *)plan;
        PyErr_SetString(PyExc_ValueError, "a plan of two phases reduces");
    }
    Py_DECREF((PyObject *)plan);
    return NULL;
}

static void free_plan(ChunkedPlan *plan)
{
    PyTypeObject *type = Py_TYPE((PyObject *)plan);
    PyMem_Free(plan->stages.moves);
    PyMem_Free(plan->owns.moves);
    PyMem_Free(plan->takes.moves);
    PyMem_Free(plan->offsets);
    PyMem_Free(plan->operands);
    Py_XDECREF((PyObject *)plan->ring);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(plan);
    Py_DECREF(type);
}

/* Hold an array; return 0, with an error set, if it is not one of so many bytes. */
static int hold(const ChunkedPlan *plan, PyObject *array, Py_ssize_t nbytes, int flags, Py_buffer *held)
{
    *held = (Py_buffer){.buf = NULL, .obj = NULL};
    if (!nbytes)
        return 1;
    if (PyObject_GetBuffer(array, held, flags))
        return 0;
    if (held->len == nbytes && (!plan->reduces || (uintptr_t)held->buf % plan->arithmetic.itemsize == 0))
        return 1;
    PyErr_SetString(PyExc_ValueError, "this is no aligned array of the plan's size");
    PyBuffer_Release(held);
    return 0;
}

/* Hold source and target as the plan needs them; return 0, with an error set, if they are not. */
static int hold_both(const ChunkedPlan *plan, PyObject *from, PyObject *to, Py_buffer *source, Py_buffer *target)
{
    if (!hold(plan, from, plan->source_bytes, PyBUF_SIMPLE, source))
        return 0;
    if (hold(plan, to, plan->target_bytes, PyBUF_WRITABLE, target)) {
        const char *start = source->buf, *result = target->buf;
        int fits = !start || !result ||
                   (plan->in_place < 0 ? start + source->len <= result || result + target->len <= start
                                       : start == result + plan->in_place);
        if (fits)
            return 1;
        PyErr_SetString(PyExc_ValueError, "the source is elsewhere than the plan says");
        PyBuffer_Release(target);
    }
    PyBuffer_Release(source);
    return 0;
}

static int lies_in_arena(const ChunkedPlan *plan, const Py_buffer *array)
{
    uintptr_t start = (uintptr_t)array->buf;
    return array->buf && start >= plan->arena && start < plan->arena_end;
}

static PyObject *accepts(ChunkedPlan *plan, PyObject *args)
{
    PyObject *from, *to;
    Py_buffer source, target;
    if (!PyArg_UnpackTuple(args, "accepts", 2, 2, &from, &to))
        return NULL;
    if (plan->ring->retracted)
        Py_RETURN_FALSE;
    if (!hold_both(plan, from, to, &source, &target)) {
        PyErr_Clear();
        Py_RETURN_FALSE;
    }
    int accepted = !lies_in_arena(plan, &source) && !lies_in_arena(plan, &target);
    PyBuffer_Release(&source);
    PyBuffer_Release(&target);
    return PyBool_FromLong(accepted);
}

/* Run without the GIL: from the beginning, or from an awaited chunk on. */
static PyObject *run(ChunkedPlan *plan, PyObject *from, PyObject *to, int64_t awaited)
{
    Py_buffer source, target;
    if (!hold_both(plan, from, to, &source, &target))
        return NULL;
    plan->source = source.buf;
    plan->target = target.buf;
    Py_BEGIN_ALLOW_THREADS
    if (awaited < 0) {
        begin_chunked(plan);
        awaited = plan->number;
    }
    awaited = continue_chunked(plan, awaited);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&source);
    PyBuffer_Release(&target);
    return awaited < 0 ? Py_NewRef(Py_None) : PyLong_FromLongLong(awaited);
}

static int has_sane_numbers(const ChunkedPlan *plan)
{
    if (plan->spins >= 0 && plan->spins <= MOST_TRIES && plan->yields >= 0 && plan->yields <= MOST_TRIES &&
        plan->chunks >= 1 && plan->chunks <= PY_SSIZE_T_MAX / 4 / plan->length && plan->number >= 0 &&
        plan->number <= LLONG_MAX / 2)
        return 1;
    PyErr_SetString(PyExc_ValueError, "a plan has a number, chunks, and up to a million spins and yields");
    return 0;
}

static PyObject *start(ChunkedPlan *plan, PyObject *args)
{
    PyObject *from, *to;
    if (!PyArg_UnpackTuple(args, "start", 2, 2, &from, &to) || !has_sane_numbers(plan))
        return NULL;
    return run(plan, from, to, -1);
}

static PyObject *resume(ChunkedPlan *plan, PyObject *args)
{
    PyObject *from, *to;
    long long awaited;
    if (!PyArg_ParseTuple(args, "OOL:resume", &from, &to, &awaited) || !has_sane_numbers(plan))
        return NULL;
    if (awaited < plan->number || awaited - plan->number >= plan->chunks * (1 + plan->two_phase))
        return PyErr_Format(PyExc_ValueError, "chunk %lld is none of this operation", awaited);
    return run(plan, from, to, awaited);
}

static PyMethodDef methods[] = { /* described in ../native.py */
    {"accepts", (PyCFunction)accepts, METH_VARARGS, NULL},
    {"start", (PyCFunction)start, METH_VARARGS, NULL},
    {"resume", (PyCFunction)resume, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef members[] = {
    {"number", T_LONGLONG, offsetof(ChunkedPlan, number), 0, NULL},
    {"chunks", T_LONGLONG, offsetof(ChunkedPlan, chunks), 0, NULL},
    {"syncing", T_BOOL, offsetof(ChunkedPlan, syncing), READONLY, NULL},
    {"announced", T_BOOL, offsetof(ChunkedPlan, announced), READONLY, NULL},
    {"spins", T_LONG, offsetof(ChunkedPlan, spins), 0, NULL},
    {"yields", T_LONG, offsetof(ChunkedPlan, yields), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, new_plan}, {Py_tp_dealloc, free_plan}, {Py_tp_methods, methods}, {Py_tp_members, members}, {0, NULL},
};

PyType_Spec chunked_plan_spec = {
    .name = "ferro_gloo.shm._native.ChunkedPlan",
    .basicsize = sizeof(ChunkedPlan),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};
