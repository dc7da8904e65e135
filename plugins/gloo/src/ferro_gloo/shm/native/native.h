/* What the files of the native helper share.

       module.c      the module's functions and types, described in ../native.py
       counters.c    counters in shared memory: publishing them, and waiting for them
       copy.c        copies of large arrays, past the caches or through them
       operands.c    the arrays of a call that reduces them
       half.c        sums and products of 16-bit floats
       arithmetic.c  the other reductions
       ring.c        Ring: the slots of a region, and whose turn each is (see ../slot_ring.py)
       collective.c  what each collective writes into this rank's slot, and reads from all of them
       arrays.c      the arrays of a short path
       short_path.c  ShortPath: a small collective in one call
       bound.c       a ShortPath with its arrays
       announced.c   AnnouncedScatter: a small scatter and the broadcast before it, in one call
       chunked.c     a large collective, chunk by chunk
       chunked_plan.c  ChunkedPlan: such a collective, for Python
       rooted.h        RootedSteps: persistent collectives whose ranks run ahead of each other
*/

#ifndef FERRO_GLOO_NATIVE_H
#define FERRO_GLOO_NATIVE_H

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#if !defined(__linux__) || __SIZEOF_POINTER__ != 8
#error "the native helper of ferro-gloo is for 64-bit Linux; elsewhere ferro-gloo is pure Python"
#endif

#include <stdint.h>
#include <string.h>

/* ---- module.c */

typedef struct {
    PyTypeObject *ring, *short_path, *bound, *announced, *chunked_plan, *rooted_steps;
} ModuleState;

/* ---- counters.c */

#define COUNTER_STRIDE 256
#define SLEEPERS 8 /* byte offset in a counter */

/* int64 values in shared memory, `stride` bytes apart, that are to reach `value`.

   They are counters, or lines of slots. A rank sleeps on a counter in any case, which its owner stores after the line. */
typedef struct {
    char *first;
    Py_ssize_t stride, count;
    int64_t value;
    char *counters;
    Py_ssize_t counter_stride;
} Awaited;

static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield" ::: "memory");
#endif
}

/* Find the first value that is behind, from `index` on; -1 if none is. */
static inline Py_ssize_t first_behind(const Awaited *awaited, Py_ssize_t index)
{
    for (; index < awaited->count; index++) {
        int64_t *value = (int64_t *)(awaited->first + index * awaited->stride);
        if (__atomic_load_n(value, __ATOMIC_ACQUIRE) < awaited->value)
            return index;
    }
    return -1;
}

void wake_sleepers(char *counter);

/* Store a counter so that others see all that was written before, and wake its sleepers. */
static inline void publish_counter(char *counter, int64_t value)
{
    __atomic_store_n((int64_t *)counter, value, __ATOMIC_SEQ_CST);
    if (__atomic_load_n((uint32_t *)(counter + SLEEPERS), __ATOMIC_SEQ_CST))
        wake_sleepers(counter);
}

/* Spin, then yield, then sleep, from value `index` on; return the first behind, or -1. Called without the GIL. */
Py_ssize_t wait_without_gil(const Awaited *awaited, Py_ssize_t index, long spins, long yields, double seconds,
                            int *interrupted);

PyObject *publish(PyObject *module, PyObject *const *args, Py_ssize_t given);
PyObject *wait_for(PyObject *module, PyObject *const *args, Py_ssize_t given);

/* ---- copy.c */

/* Copy between apart arrays; `past` the caches where the target is large and is not read soon. */
void copy_through_caches(char *to, const char *from, size_t length);
void copy_past_caches(char *to, const char *from, size_t length);
PyObject *copy(PyObject *module, PyObject *const *args, Py_ssize_t given);

/* ---- operands.c */

/* The arrays that a Python call reduces, held as long as they are used. */
typedef struct {
    Py_buffer *held;
    const char **arrays;
    Py_ssize_t count;
} Operands;

/* Hold the arrays of a sequence, each as `out`: aligned numbers of `itemsize` bytes, of which an element has as many as
   `numbers` says, two where it is complex. Set an error if one is not so. */
int hold_operands(Operands *operands, PyObject *sources, const Py_buffer *out, Py_ssize_t itemsize, int numbers);
void release_operands(Operands *operands); /* also after a failure */

/* ---- half.c */

/* Reduce 16-bit floats in float32, from left to right, divide (by 0: not), and round once. */
typedef struct {
    const char *const *sources;
    Py_ssize_t count, length;
    uint16_t *out;
    int brain, multiply;
    float divisor;
} HalfReduction;

void reduce_halves(const HalfReduction *reduction);
PyObject *sum_half(PyObject *module, PyObject *args);

/* ---- arithmetic.c */

typedef void (*Combine)(void *out, const void *left, const void *right, size_t count);
typedef void (*Divide)(void *numbers, size_t count, int divisor);

/* How the elements of one dtype are reduced. */
typedef struct {
    Combine combine; /* NULL for sums and products of 16-bit floats */
    Divide divide;   /* NULL but for a mean */
    size_t itemsize; /* of a real number: a complex one counts as two */
    int brain, multiply, divisor;
} Arithmetic;

/* Find the arithmetic of a dtype and a reduction, by their names; return 0 if there is none. */
int find_arithmetic(const char *dtype, const char *reduction, int ranks, Arithmetic *found);
/* Reduce `count` arrays, in order, into `out`, which may be one of the first two, and overlaps no other. */
void reduce_arrays(const Arithmetic *arithmetic, char *out, const char *const *arrays, Py_ssize_t count,
                   size_t nbytes);
PyObject *has_arithmetic(PyObject *module, PyObject *args);
PyObject *reduce(PyObject *module, PyObject *args);

/* ---- ring.c */

#define SLOTS 4
#define HEADER_BYTES 128
#define LABEL_BYTES 56
#define LINE_BYTES 64
#define LINE_DATA 16
#define LINE_DATA_BYTES (LINE_BYTES - LINE_DATA)

/* The cache line before a slot. */
typedef struct {
    int64_t number;  /* one more than the number of the chunk in the slot; stored last, with release */
    uint64_t digest; /* of the operation's label, in the first chunk of an operation */
    char data[LINE_DATA_BYTES];
} Line;

typedef struct {
    PyObject_HEAD
    Py_buffer memory; /* of the region, which it keeps mapped */
    int ranks, rank, spins;
    Py_ssize_t slot_bytes;
    char *counters, *headers, *lines;
    long long next; /* the number of the next chunk */
    int64_t unawaited; /* the last chunk of an operation that has ended before all ranks published it; 0: none */
    char retracted;
    unsigned char written[SLOTS][HEADER_BYTES]; /* this rank's headers */
    const void *writers[SLOTS]; /* the Collective that wrote each header, or its label; NULL where another did */
} Ring;

extern PyType_Spec ring_spec;

static inline Line *line_of(const Ring *ring, int rank, int64_t number)
{
    Py_ssize_t index = (Py_ssize_t)rank * SLOTS + (Py_ssize_t)(number % SLOTS);
    return (Line *)(ring->lines + index * (LINE_BYTES + ring->slot_bytes));
}

/* The place of a rank's data of `nbytes`: a small message is all in the line. */
static inline char *data_of(const Ring *ring, int rank, int64_t number, size_t nbytes)
{
    Line *line = line_of(ring, rank, number);
    return nbytes <= LINE_DATA_BYTES ? line->data : (char *)(line + 1);
}

/* The lines of all ranks' slots with this chunk, awaited. */
static inline Awaited awaited_lines(const Ring *ring, int64_t number)
{
    return (Awaited){(char *)line_of(ring, 0, number), SLOTS * (LINE_BYTES + ring->slot_bytes), ring->ranks,
                     number + 1, ring->counters, COUNTER_STRIDE};
}

uint64_t digest_of(const unsigned char *label);
/* Write the header of an operation whose first chunk is `number`, `length` bytes and zeros, unless it is there.
   `writer` stands for the header: no two have one. */
void write_header(Ring *ring, int64_t number, const unsigned char *header, size_t length, uint64_t digest,
                  const void *writer);
/* Tell the others that this rank has written chunk `number`, and has read chunk `number - 2`. */
void publish_chunk(Ring *ring, int64_t number);

/* Tell the same of chunks up to `number`, whose lines have been written, to those that wait for counters. */
static inline void publish_written(const Ring *ring, int64_t number)
{
    if (!ring->retracted)
        publish_counter(ring->counters + (Py_ssize_t)ring->rank * COUNTER_STRIDE, number + 1);
}

/* ---- collective.c */

typedef enum {
    BARRIER, ALL_REDUCE, REDUCE, BROADCAST, ALL_GATHER, GATHER, SCATTER, REDUCE_SCATTER, ALL_TO_ALL, OPERATIONS
} Operation;

/* One kind of collective, as this rank takes part in it. */
typedef struct {
    Ring *ring;
    Operation operation;
    Arithmetic arithmetic;
    int root;
    int two_rounds;     /* rank 0 reduces, and publishes the result in the next chunk */
    size_t block;       /* bytes of one block */
    size_t source, target; /* bytes of this rank's arrays; 0 where it has none */
    size_t published;   /* bytes that a rank that sends data publishes */
    uint64_t digest;
    unsigned char label[LABEL_BYTES];
    const char **parts; /* scratch memory, a pointer for every rank */
} Collective;

typedef enum { DIFFERENT = -1, LATE, READY } Arrival;

/* Choose the sizes; return 0 if the arguments do not fit each other or the ring. */
int plan_collective(Collective *collective);
/* Say whether this rank must write all its data into its slot, also what it alone reads, with these arrays. */
int needs_whole(const Collective *collective, const char *source, const char *target);
/* Write this rank's contribution, and its line; return the number of the first chunk. */
int64_t write_collective(Collective *collective, const char *source, int whole);
/* Begin: write and publish this rank's contribution; return the number of the first chunk. */
int64_t begin_collective(Collective *collective, const char *source, int whole);
/* Find out whether all that this rank needs is there. Rank 0 reduces for all, where it does so. */
Arrival advance_collective(Collective *collective, int64_t number);
/* Read the result into `target`; `whole` is what it was at the beginning. */
void finish_collective(Collective *collective, int64_t number, const char *source, char *target, int whole);
/* The lines of which one is missing when `advance_collective` says LATE. */
Awaited missing_lines(const Collective *collective, int64_t number);

/* ---- arrays.c */

/* The NumPy arrays whose head can be read; NULL where none can. */
typedef struct {
    PyTypeObject *type;
    PyObject *dtype;
    size_t itemsize;
} KnownArrays;

/* Learn whether the heads of arrays like `sample`, of shape (2, 3), can be read; return -1 with an error set. */
int learn_arrays(KnownArrays *known, PyObject *sample);
/* Hold both arrays, as far as this rank needs them; return 0, without an error, if they cannot be used.

   Py_buffers hold them: the fields `buf`, `len` and `obj` are set, and PyBuffer_Release lets go of them. */
int hold_arrays(const Collective *collective, const KnownArrays *known, PyObject *from, PyObject *to, Py_buffer *source,
              Py_buffer *target);

/* ---- chunked.c */

/* Bytes of the source, the target or a slot, of which chunk k is moved for every k in turn. */
typedef struct {
    Py_ssize_t to, from, bytes, rank;
} Move;

typedef struct {
    Move *moves;
    Py_ssize_t count;
} Moves;

/* This rank's part in a collective of large arrays. */
typedef struct {
    PyObject_HEAD
    Ring *ring;
    Moves stages, owns, takes; /* source to own slot, source to target, slot to target */
    int reduces;
    Arithmetic arithmetic;
    Py_ssize_t own, out, reduced; /* places in source and target (-1: there is none), and bytes */
    Py_ssize_t *offsets;          /* of what is reduced in each rank's slot */
    const char **operands;        /* scratch memory */
    Py_ssize_t length;            /* bytes of a chunk */
    int two_phase, past_caches;
    long spins, yields;
    Py_ssize_t source_bytes, target_bytes;
    Py_ssize_t in_place;     /* where in the target the source must be; -1: apart from it */
    uintptr_t arena, arena_end; /* the memory of this rank in which arrays can be used in place */
    size_t header_bytes;
    unsigned char header[HEADER_BYTES];
    uint64_t digest;
    /* of the present call */
    long long chunks, number; /* how many, and the number of the first */
    char syncing;             /* the first chunk is awaited, and the headers are not compared */
    char announced;           /* a rank's array can be used in place, which this does not do */
    const char *source;
    char *target;
} ChunkedPlan;

/* Publish the first chunk. */
void begin_chunked(ChunkedPlan *plan);
/* Go on when chunk `awaited` may be there; return the number of a chunk for which others are late, or -1 at the end. */
int64_t continue_chunked(ChunkedPlan *plan, int64_t awaited);

/* ---- chunked_plan.c */

extern PyType_Spec chunked_plan_spec;

/* ---- short_path.c */

#define BUSY 0 /* indices of a turn's state */
#define NUMBER 1

typedef struct {
    PyObject_HEAD
    PyObject *ring, *lock, *is_locked, *acquire, *release, *pending, *late;
    Py_buffer state; /* of the turn */
    KnownArrays known;
    Collective collective;
} ShortPath;

extern PyType_Spec short_path_spec;

static inline int64_t *state_of(const ShortPath *path)
{
    return path->state.buf;
}

/* Have this core own the line that this rank writes next, as soon as the others do not need it. */
static inline void prepare_line(const Ring *ring, int64_t number)
{
    __builtin_prefetch(line_of(ring, ring->rank, number), 1);
}

static inline void prepare_next(const Ring *ring)
{
    prepare_line(ring, ring->next);
}

/* Return 1 if a collective may begin now, 0 if not, -1 with an error set. */
int is_free(ShortPath *path);
/* Call the turn's `acquire`, where the lock is free, or its `release`; return -1 with an error set if that fails. */
int change_lock(PyObject *method);
/* Try for some microseconds, with the GIL, where every rank has a core of its own. */
Arrival spin(Collective *collective, int64_t number);
/* Wait until all that this rank needs is there; the turn's lock is held. Return -1 with an error set if that fails. */
int wait_longer(ShortPath *path, int64_t number);
/* Run the collective; return True, or NULL with an error set. */
PyObject *run_path(ShortPath *path, const char *source, char *target);

/* ---- bound.c */

typedef struct {
    PyObject_HEAD
    ShortPath *path;
    Py_buffer source, target; /* `buf` is NULL where this rank has none */
    int64_t number;           /* of a started collective; -1: none is started */
    int closed;               /* and nothing is held */
} Bound;

extern PyType_Spec bound_spec;

PyObject *bind_path(ShortPath *path, PyObject *args);

/* ---- announced.c */

extern PyType_Spec announced_spec;

#endif
