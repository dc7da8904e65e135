/* Collectives of large arrays, chunk by chunk, as `chunked.py` and `slot_ring.py` describe them: all chunks in one call.

   An operation is a list of moves, each of which treats chunk k of its array for every k in turn:

       stage    array                -> this rank's slot
       own      array                -> another array of this rank
       reduce   all ranks' slots     -> array, and, in two phases, this rank's next slot
       take     another rank's slot  -> array

   One phase                                    Two phases
       number + k      chunk k is staged            number + 2 k      chunk k is staged
                                                    number + 2 k + 1  its parts are reduced

   The ring's rules make this safe: chunk k + 1 is written before chunk k is awaited, and a rank publishes chunk k + 1
   only after it has read chunk k - 1. */

#include "native.h"

typedef struct {
    char *to;
    const char *from;
    Py_ssize_t bytes, rank, offset;
} Move;

typedef struct {
    Move *moves;
    Py_ssize_t count;
} Moves;

typedef struct {
    Ring *ring;
    Moves stages, owns, takes;
    Arithmetic arithmetic;
    char *out;
    const char *own;
    Py_ssize_t out_bytes;
    Py_ssize_t *offsets;   /* of the parts that are reduced, in each rank's slot */
    const char **operands; /* of one chunk */
    Py_ssize_t length, chunks;
    int64_t number;
    int reduces, two_phase, past_caches;
    long spins, yields;
    double seconds;
    Py_buffer *held;
    Py_ssize_t held_count;
} Chunked;

static inline Py_ssize_t chunk_bytes(const Chunked *op, Py_ssize_t bytes, Py_ssize_t k)
{
    Py_ssize_t rest = bytes - k * op->length;
    return rest < 0 ? 0 : rest < op->length ? rest : op->length;
}

static inline char *slot(const Chunked *op, Py_ssize_t rank, int64_t number)
{
    return (char *)(line_of(op->ring, (int)rank, number) + 1);
}

static void fill(const Chunked *op, char *to, const char *from, Py_ssize_t bytes)
{
    if (op->past_caches)
        copy_past_caches(to, from, (size_t)bytes);
    else
        copy_through_caches(to, from, (size_t)bytes);
}

/* Wait until all ranks have published a chunk; return 1 if they have. */
static int wait_for_number(const Chunked *op, int64_t number)
{
    char *counters = op->ring->counters;
    Awaited awaited = {counters, COUNTER_STRIDE, op->ring->ranks, number + 1, counters, COUNTER_STRIDE};
    Py_ssize_t behind = first_behind(&awaited, 0);
    int interrupted;
    if (behind >= 0)
        behind = wait_without_gil(&awaited, behind, op->spins, op->yields, op->seconds, &interrupted);
    return behind < 0;
}

static void stage_chunk(const Chunked *op, Py_ssize_t k, int64_t number)
{
    char *target = slot(op, op->ring->rank, number);
    for (const Move *move = op->stages.moves; move < op->stages.moves + op->stages.count; move++)
        copy_through_caches(target + move->offset, move->from + k * op->length,
                            (size_t)chunk_bytes(op, move->bytes, k));
    publish_chunk(op->ring, number);
}

/* Copy this rank's own blocks, whose source has just been staged and is in the caches. */
static void copy_own_chunk(const Chunked *op, Py_ssize_t k)
{
    for (const Move *move = op->owns.moves; move < op->owns.moves + op->owns.count; move++)
        fill(op, move->to + k * op->length, move->from + k * op->length, chunk_bytes(op, move->bytes, k));
}

static void take_chunk(const Chunked *op, Py_ssize_t k, int64_t number)
{
    for (const Move *move = op->takes.moves; move < op->takes.moves + op->takes.count; move++)
        fill(op, move->to + k * op->length, slot(op, move->rank, number) + move->offset,
             chunk_bytes(op, move->bytes, k));
}

/* Reduce chunk k of all ranks, in order of rank, into `out`. */
static void reduce_chunk(const Chunked *op, Py_ssize_t k, int64_t number, char *out)
{
    for (Py_ssize_t rank = 0; rank < op->ring->ranks; rank++)
        op->operands[rank] = slot(op, rank, number) + op->offsets[rank];
    op->operands[op->ring->rank] = op->own + k * op->length;
    reduce_arrays(&op->arithmetic, out, op->operands, op->ring->ranks, (size_t)chunk_bytes(op, op->out_bytes, k));
}

/* Run from the awaited number on; return the number of a chunk for which others are late, or -1. */
static int64_t run_one_phase(const Chunked *op, int64_t awaited)
{
    Py_ssize_t k = (Py_ssize_t)(awaited - op->number);
    if (k == 0) {
        if (op->chunks > 1)
            stage_chunk(op, 1, awaited + 1);
        copy_own_chunk(op, 0);
    }
    for (;;) {
        if (op->reduces)
            reduce_chunk(op, k, op->number + k, op->out + k * op->length);
        take_chunk(op, k, op->number + k);
        if (++k == op->chunks)
            return -1;
        if (k + 1 < op->chunks)
            stage_chunk(op, k + 1, op->number + k + 1);
        copy_own_chunk(op, k);
        if (!wait_for_number(op, op->number + k))
            return op->number + k;
    }
}

static int64_t run_two_phase(const Chunked *op, int64_t awaited)
{
    Py_ssize_t k = (Py_ssize_t)((awaited - op->number) / 2);
    int reduced = (awaited - op->number) % 2 != 0;
    for (;; reduced = 0) {
        int64_t staged = op->number + 2 * k;
        if (!reduced) {
            char *result = slot(op, op->ring->rank, staged + 1);
            reduce_chunk(op, k, staged, result);
            publish_chunk(op->ring, staged + 1);
            if (op->out)
                memcpy(op->out + k * op->length, result, (size_t)chunk_bytes(op, op->out_bytes, k));
            if (k + 1 < op->chunks)
                stage_chunk(op, k + 1, staged + 2);
            if (!wait_for_number(op, staged + 1))
                return staged + 1;
        }
        take_chunk(op, k, staged + 1);
        if (++k == op->chunks)
            return -1;
        if (!wait_for_number(op, staged + 2))
            return staged + 2;
    }
}

/* Hold the buffer of an array; return it, or NULL with an error set. */
static const Py_buffer *hold(Chunked *op, PyObject *array, int writable)
{
    Py_buffer *buffer = &op->held[op->held_count];
    if (!array || PyObject_GetBuffer(array, buffer, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE))
        return NULL;
    op->held_count++;
    return buffer;
}

static Py_ssize_t whole_number(PyObject *tuple, Py_ssize_t index)
{
    PyObject *item = PyTuple_GetItem(tuple, index);
    return item ? PyLong_AsSsize_t(item) : -1;
}

/* Set an error unless the bytes that a move uses of a slot lie within it. */
static int fits_slot(const Chunked *op, Py_ssize_t offset, Py_ssize_t bytes)
{
    Py_ssize_t used = bytes < op->length ? bytes : op->length;
    if (offset >= 0 && offset <= op->ring->slot_bytes - used)
        return 1;
    if (!PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "a slot has %zd bytes, and not %zd at offset %zd", op->ring->slot_bytes, used,
                     offset);
    return 0;
}

/* Read a move of kind 's'tage (array, offset), 'o'wn (target, source) or 't'ake (target, rank, offset). */
static int read_move(Chunked *op, Move *move, PyObject *item, char kind)
{
    const Py_buffer *array = hold(op, PyTuple_GetItem(item, 0), kind != 's');
    if (!array)
        return 0;
    move->to = array->buf;
    move->from = array->buf;
    move->bytes = array->len;
    if (kind == 'o') {
        const Py_buffer *source = hold(op, PyTuple_GetItem(item, 1), 0);
        if (!source)
            return 0;
        const char *from = source->buf, *to = array->buf;
        move->from = from;
        if (source->len == array->len && (from + source->len <= to || to + array->len <= from))
            return 1;
        PyErr_SetString(PyExc_ValueError, "this rank's own block is copied between two apart arrays of one size");
        return 0;
    }
    if (kind == 't') {
        move->rank = whole_number(item, 1);
        if (move->rank < 0 || move->rank >= op->ring->ranks) {
            if (!PyErr_Occurred())
                PyErr_Format(PyExc_ValueError, "there is no rank %zd of %zd", move->rank, op->ring->ranks);
            return 0;
        }
    }
    move->offset = whole_number(item, kind == 's' ? 1 : 2);
    return fits_slot(op, move->offset, move->bytes);
}

static int read_moves(Chunked *op, Moves *moves, PyObject *items, char kind)
{
    for (; moves->count < PyTuple_Size(items); moves->count++)
        if (!read_move(op, &moves->moves[moves->count], PyTuple_GetItem(items, moves->count), kind))
            return 0;
    return 1;
}

/* Find the arithmetic of a dtype and a reduction, by their names, for arrays that are aligned for it. */
static int read_arithmetic(Chunked *op, PyObject *dtype, PyObject *name)
{
    const char *kind = dtype ? PyUnicode_AsUTF8AndSize(dtype, NULL) : NULL;
    const char *reduction = name ? PyUnicode_AsUTF8AndSize(name, NULL) : NULL;
    if (!kind || !reduction)
        return 0;
    if (!find_arithmetic(kind, reduction, op->ring->ranks, &op->arithmetic)) {
        PyErr_Format(PyExc_ValueError, "there is no %s of %s", reduction, kind);
        return 0;
    }
    size_t size = op->arithmetic.itemsize, misplaced = (size_t)op->length % size + (size_t)op->out_bytes % size;
    misplaced += (uintptr_t)op->own % size + (uintptr_t)op->out % size;
    for (Py_ssize_t rank = 0; rank < op->ring->ranks; rank++)
        misplaced += (size_t)op->offsets[rank] % size;
    if (misplaced)
        PyErr_Format(PyExc_ValueError, "numbers of %zu bytes must be aligned", size);
    return !misplaced;
}

/* Read (out or None, own, offsets, dtype, reduction). */
static int read_reduction(Chunked *op, PyObject *tuple)
{
    PyObject *out = PyTuple_GetItem(tuple, 0), *offsets = PyTuple_GetItem(tuple, 2);
    const Py_buffer *own = hold(op, PyTuple_GetItem(tuple, 1), 0), *result = NULL;
    if (!out || !own || !offsets || (out != Py_None && !(result = hold(op, out, 1))))
        return 0;
    op->own = own->buf;
    op->out = result ? result->buf : NULL;
    op->out_bytes = own->len;
    /* In one phase the result is written over an operand, which may be one of the first two only. */
    int overlap = result && op->out < op->own + own->len && op->own < op->out + result->len;
    if (PyTuple_Size(offsets) != op->ring->ranks || (result ? result->len != own->len : !op->two_phase) ||
        (overlap && !op->two_phase && (op->out != op->own || op->ring->rank > 1))) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "a reduction takes this rank's array, a result of its size, n offsets");
        return 0;
    }
    for (Py_ssize_t rank = 0; rank < op->ring->ranks; rank++) {
        op->offsets[rank] = whole_number(offsets, rank);
        if (!fits_slot(op, op->offsets[rank], op->out_bytes))
            return 0;
    }
    op->reduces = 1;
    return fits_slot(op, 0, op->out_bytes) &&
           read_arithmetic(op, PyTuple_GetItem(tuple, 3), PyTuple_GetItem(tuple, 4));
}

/* Read the arguments: stages, owns, takes, reduction, numbers, seconds. */
static int read_arguments(Chunked *op, PyObject *const *args, int64_t *awaited)
{
    enum { LENGTH, CHUNKS, FIRST, AWAITED, TWO_PHASE, PAST_CACHES, SPINS, YIELDS };
    PyObject *numbers = args[4];
    op->length = whole_number(numbers, LENGTH);
    op->chunks = whole_number(numbers, CHUNKS);
    op->number = whole_number(numbers, FIRST);
    *awaited = whole_number(numbers, AWAITED);
    op->two_phase = whole_number(numbers, TWO_PHASE) > 0;
    op->past_caches = whole_number(numbers, PAST_CACHES) > 0;
    op->spins = (long)whole_number(numbers, SPINS);
    op->yields = (long)whole_number(numbers, YIELDS);
    op->seconds = PyFloat_AsDouble(args[5]);
    if (PyErr_Occurred())
        return 0;
    if (op->length < 1 || op->chunks < 1 || op->chunks > PY_SSIZE_T_MAX / 4 / op->length || op->number < 0 ||
        *awaited < op->number || *awaited - op->number >= op->chunks * (1 + op->two_phase) ||
        !(op->seconds >= 0 && op->seconds <= 1)) {
        PyErr_SetString(PyExc_ValueError, "an operation has chunks, and awaits one of them for at most a second");
        return 0;
    }
    if (!read_moves(op, &op->stages, args[0], 's') || !read_moves(op, &op->owns, args[1], 'o') ||
        !read_moves(op, &op->takes, args[2], 't') || (args[3] != Py_None && !read_reduction(op, args[3])))
        return 0;
    if (op->two_phase && !op->reduces)
        PyErr_SetString(PyExc_ValueError, "an operation of two phases reduces");
    return !op->two_phase || op->reduces;
}

/* Allocate room for as many moves as the tuples hold, and for the buffers that they use. */
static int allocate(Chunked *op, PyObject *const *args)
{
    Py_ssize_t stages = PyTuple_Size(args[0]), owns = PyTuple_Size(args[1]), takes = PyTuple_Size(args[2]);
    if (stages < 0 || owns < 0 || takes < 0)
        return 0;
    size_t moves = (size_t)(stages + owns + takes), ranks = (size_t)op->ring->ranks;
    op->held = PyMem_Calloc(2 * moves + 2, sizeof *op->held);
    op->stages.moves = PyMem_Calloc(moves + 1, sizeof *op->stages.moves);
    op->offsets = PyMem_Calloc(ranks, sizeof *op->offsets);
    op->operands = PyMem_Calloc(ranks, sizeof *op->operands);
    if (!op->held || !op->stages.moves || !op->offsets || !op->operands) {
        PyErr_NoMemory();
        return 0;
    }
    op->owns.moves = op->stages.moves + stages;
    op->takes.moves = op->owns.moves + owns;
    return 1;
}

PyObject *run_chunks(Ring *ring, PyObject *const *args, Py_ssize_t given)
{
    if (given != 6)
        return PyErr_Format(PyExc_TypeError, "run_chunks() takes 6 arguments, not %zd", given);
    Chunked op = {.ring = ring};
    int64_t awaited = -1;
    int valid = allocate(&op, args) && read_arguments(&op, args, &awaited);
    if (valid) {
        Py_BEGIN_ALLOW_THREADS
        awaited = op.two_phase ? run_two_phase(&op, awaited) : run_one_phase(&op, awaited);
        Py_END_ALLOW_THREADS
    }
    while (op.held_count)
        PyBuffer_Release(&op.held[--op.held_count]);
    PyMem_Free(op.held);
    PyMem_Free(op.stages.moves);
    PyMem_Free(op.offsets);
    PyMem_Free(op.operands);
    if (!valid)
        return NULL;
    return awaited < 0 ? Py_NewRef(Py_None) : PyLong_FromLongLong(awaited);
}
