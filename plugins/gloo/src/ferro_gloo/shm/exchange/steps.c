/* Steps: many messages between ranks of one host, sent and received again and again, through shared memory.

   A message has a channel of its own, in memory of its sender (see channels.py):

       byte   0  int64 taken     how many blocks the receiver has read, which it stores
       byte   8  int64 closed    1 when the receiver reads and writes this channel no more, which it stores
       byte  64  int64 starved   1 while the sender may sleep until blocks are taken, which it stores
       byte 128  slots, each a multiple of 128 bytes:
                     int64 number   one more than the number of the block in the slot, stored last, with release
                     data           the block

   Blocks are numbered on from step to step, and use the slots in turn. The sender writes block b when the receiver has
   taken block b - slots, so it may be that many blocks ahead, and overwrites nothing that was not read. The receiver
   loads `number` with acquire, and sees the data when it sees the number, on weak memory models as well as on x86-64.
   Where the message itself lies in memory that both ranks map, the block is not copied: the receiver reads it at its
   source, and the sender's step ends when it has been taken.

   A process has one bell, on which its threads sleep: a futex word, and the number of sleepers. A rank first stores
   numbers, then loads the other's sleepers; a sleeper first counts itself, then loads the numbers. Between the two is a
   full fence on both sides, so at least one of them sees the other.

   Several threads may advance one exchange: `locked` is held while one does. Its holder never waits for the
   interpreter lock, so a thread that has the interpreter lock may spin for it.
*/

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#if !defined(__linux__) || __SIZEOF_POINTER__ != 8
#error "the native helper of ferro-gloo is for 64-bit Linux; elsewhere ferro-gloo is pure Python"
#endif

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define HEADER_BYTES 128
#define SLOT_ALIGNMENT 128
#define NUMBER_BYTES 8
#define BELL_BYTES 64
#define HEAVY_BYTES (64 << 10) /* a step of more bytes lets other threads run while it copies */
#define MOST_TRIES 1000000
#define MOST_SECONDS 86400

typedef struct {
    int64_t taken, closed;
    char other_line[48];
    int64_t starved;
} Header;

typedef struct {
    uint32_t rings, sleepers;
} Bell;

typedef struct {
    Py_buffer user, memory, bell, source; /* source.obj is NULL where blocks go through slots */
    int sends;
    Py_ssize_t block, stride;
    int64_t slots, blocks; /* a power of two; blocks of one step */
    int64_t total;         /* blocks moved in all steps */
    int64_t done;          /* blocks moved in this step */
    int64_t taken;         /* the last value of `taken` that a sender has seen */
    int ended, moved, starved;
} Channel;

typedef struct {
    PyObject_HEAD
    Channel *channels; /* the sends, then the receives */
    Py_ssize_t count, sends, left;
    Py_buffer bell;
    long spins, yields;
    int locked, closed, heavy, waiting;
} Steps;

static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield" ::: "memory");
#endif
}

static inline int try_lock(Steps *steps)
{
    return !__atomic_exchange_n(&steps->locked, 1, __ATOMIC_ACQUIRE);
}

static inline void lock(Steps *steps)
{
    while (!try_lock(steps))
        sched_yield();
}

static inline void unlock(Steps *steps)
{
    __atomic_store_n(&steps->locked, 0, __ATOMIC_RELEASE);
}

static inline int has_ended(const Steps *steps)
{
    return __atomic_load_n(&steps->left, __ATOMIC_ACQUIRE) == 0;
}

/* ---- moving blocks */

static void ring(Bell *bell)
{
    if (__atomic_load_n(&bell->sleepers, __ATOMIC_SEQ_CST)) {
        __atomic_fetch_add(&bell->rings, 1, __ATOMIC_SEQ_CST);
        syscall(SYS_futex, &bell->rings, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    }
}

static inline int64_t *slot_of(const Channel *channel)
{
    char *first = (char *)channel->memory.buf + HEADER_BYTES;
    return (int64_t *)(first + (channel->total & (channel->slots - 1)) * channel->stride);
}

static inline size_t block_bytes(const Channel *channel)
{
    Py_ssize_t left = channel->user.len - (Py_ssize_t)channel->done * channel->block;
    return (size_t)(left < channel->block ? left : channel->block);
}

/* Return 1 if the receiver has taken all blocks but so many of the last ones. */
static inline int has_taken(Channel *channel, int64_t but)
{
    if (channel->total - channel->taken > but)
        channel->taken = __atomic_load_n(&((Header *)channel->memory.buf)->taken, __ATOMIC_ACQUIRE);
    return channel->total - channel->taken <= but;
}

static int send_blocks(Channel *channel)
{
    for (; channel->done < channel->blocks; channel->done++) {
        if (!has_taken(channel, channel->slots - 1))
            return 0;
        int64_t *slot = slot_of(channel);
        if (!channel->source.obj)
            memcpy(slot + 1, (char *)channel->user.buf + channel->done * channel->block, block_bytes(channel));
        channel->total++;
        channel->moved = 1;
        __atomic_store_n(slot, channel->total, __ATOMIC_RELEASE);
    }
    return !channel->source.obj || has_taken(channel, 0);
}

static int receive_blocks(Channel *channel)
{
    for (; channel->done < channel->blocks; channel->done++) {
        int64_t *slot = slot_of(channel);
        if (__atomic_load_n(slot, __ATOMIC_ACQUIRE) <= channel->total)
            return 0;
        const char *from = channel->source.obj ? channel->source.buf : (char *)(slot + 1);
        memcpy((char *)channel->user.buf + channel->done * channel->block, from, block_bytes(channel));
        channel->total++;
        channel->moved = 1;
        __atomic_store_n(&((Header *)channel->memory.buf)->taken, channel->total, __ATOMIC_RELEASE);
    }
    return 1;
}

/* Move all blocks that can be moved, and wake the ranks that wait for them. The caller holds the lock. */
static void advance(Steps *steps)
{
    int moved = 0;
    Py_ssize_t left = 0;
    for (Py_ssize_t index = 0; index < steps->count; index++) {
        Channel *channel = &steps->channels[index];
        if (channel->ended)
            continue;
        channel->ended = channel->sends ? send_blocks(channel) : receive_blocks(channel);
        moved |= channel->moved;
        left += !channel->ended;
    }
    if (moved) {
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        for (Py_ssize_t index = 0; index < steps->count; index++) {
            Channel *channel = &steps->channels[index];
            Header *header = channel->memory.buf;
            if (channel->moved && (channel->sends || __atomic_load_n(&header->starved, __ATOMIC_SEQ_CST)))
                ring(channel->bell.buf);
            channel->moved = 0;
        }
    }
    if (left == 0 && steps->left != 0) {
        __atomic_store_n(&steps->left, 0, __ATOMIC_SEQ_CST);
        if (steps->bell.obj)
            ring(steps->bell.buf); /* another thread of this process may wait for the step's end */
    } else {
        steps->left = left;
    }
}

/* Advance, unless another thread does; return 1 if the step has ended. */
static int progress(Steps *steps)
{
    if (has_ended(steps))
        return 1;
    if (!try_lock(steps))
        return 0;
    if (!steps->closed)
        advance(steps);
    unlock(steps);
    return has_ended(steps);
}

/* Begin a step and advance; return -1 if one is under way, or the exchange is closed. */
static int begin(Steps *steps)
{
    lock(steps);
    if (steps->left || steps->closed) {
        unlock(steps);
        return -1;
    }
    for (Py_ssize_t index = 0; index < steps->count; index++) {
        Channel *channel = &steps->channels[index];
        channel->done = channel->ended = 0;
        if (channel->starved) {
            channel->starved = 0;
            __atomic_store_n(&((Header *)channel->memory.buf)->starved, 0, __ATOMIC_RELAXED);
        }
    }
    steps->left = steps->count;
    advance(steps);
    unlock(steps);
    return has_ended(steps);
}

/* ---- waiting */

/* Tell the receivers of messages that have not ended that this rank is about to sleep. */
static void tell_receivers(Steps *steps)
{
    if (!try_lock(steps))
        return; /* the thread that holds the lock waits, too */
    for (Py_ssize_t index = 0; index < steps->sends && !steps->closed; index++) {
        Channel *channel = &steps->channels[index];
        if (!channel->ended && !channel->starved) {
            channel->starved = 1;
            __atomic_store_n(&((Header *)channel->memory.buf)->starved, 1, __ATOMIC_SEQ_CST);
        }
    }
    unlock(steps);
}

/* Sleep until a peer has moved a block, or `until`, or a signal; return 0 when one of the latter two came. */
static int sleep_on_bell(Steps *steps, const struct timespec *until)
{
    Bell *bell = steps->bell.buf;
    __atomic_fetch_add(&bell->sleepers, 1, __ATOMIC_SEQ_CST);
    uint32_t seen = __atomic_load_n(&bell->rings, __ATOMIC_SEQ_CST);
    tell_receivers(steps);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    int woken = 1;
    if (!progress(steps))
        woken = !syscall(SYS_futex, &bell->rings, FUTEX_WAIT_BITSET, seen, until, NULL, FUTEX_BITSET_MATCH_ANY) ||
                errno == EAGAIN;
    __atomic_fetch_sub(&bell->sleepers, 1, __ATOMIC_SEQ_CST);
    return woken;
}

/* Advance until the step has ended: spin, then yield the core, then sleep. Called without the interpreter lock. */
static int wait_without_gil(Steps *steps, long spins, long yields, double seconds)
{
    struct timespec until = {0, 0};
    while (!progress(steps)) {
        if (spins > 0) {
            spins--;
            relax();
        } else if (yields > 0) {
            yields--;
            sched_yield();
        } else if (!(seconds > 0)) {
            return 0;
        } else {
            if (!until.tv_sec) {
                clock_gettime(CLOCK_MONOTONIC, &until);
                long nanoseconds = until.tv_nsec + (long)((seconds - (double)(time_t)seconds) * 1e9);
                until.tv_sec += (time_t)seconds + nanoseconds / 1000000000;
                until.tv_nsec = nanoseconds % 1000000000;
            }
            if (!sleep_on_bell(steps, &until))
                return progress(steps);
        }
    }
    return 1;
}

/* ---- the type */

static void release_channels(Steps *steps)
{
    for (Py_ssize_t index = 0; index < steps->count; index++) {
        Channel *channel = &steps->channels[index];
        Py_buffer *held[] = {&channel->user, &channel->memory, &channel->bell, &channel->source};
        for (int which = 0; which < 4; which++)
            if (held[which]->obj)
                PyBuffer_Release(held[which]);
    }
    free(steps->channels);
    steps->channels = NULL;
    steps->count = steps->sends = 0;
}

static void release_bell(Steps *steps)
{
    if (steps->bell.obj && !steps->waiting)
        PyBuffer_Release(&steps->bell);
}

static void steps_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    release_channels((Steps *)self);
    release_bell((Steps *)self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static int refuse(const char *reason)
{
    PyErr_Format(PyExc_ValueError, "Steps() takes channels as channels.py describes them: %s", reason);
    return 0;
}

/* Hold the memory of a channel, described by a tuple, and check it; return 0 with an error set if it is wrong. */
static int hold_channel(Channel *channel, PyObject *described, int sends)
{
    PyObject *user, *memory, *bell, *source;
    Py_ssize_t block, slots;
    if (!PyTuple_Check(described))
        return refuse("each is a tuple");
    if (!PyArg_ParseTuple(described, "OOOnnO", &user, &memory, &bell, &block, &slots, &source) ||
        PyObject_GetBuffer(user, &channel->user, sends ? PyBUF_SIMPLE : PyBUF_WRITABLE) ||
        PyObject_GetBuffer(memory, &channel->memory, PyBUF_WRITABLE) ||
        PyObject_GetBuffer(bell, &channel->bell, PyBUF_WRITABLE) ||
        (source != Py_None && PyObject_GetBuffer(source, &channel->source, PyBUF_SIMPLE)))
        return 0;
    Py_ssize_t length = channel->user.len;
    if (slots < 2 || slots & (slots - 1) || slots > 1 << 20 || block < 1 || block > PY_SSIZE_T_MAX / 2)
        return refuse("the slots are a power of two, and blocks have at least one byte");
    if (source != Py_None && (channel->source.len != length || block < length))
        return refuse("a source has the size of the message, and is one block");
    Py_ssize_t data = source == Py_None ? block : 0;
    channel->stride = (NUMBER_BYTES + data + SLOT_ALIGNMENT - 1) / SLOT_ALIGNMENT * SLOT_ALIGNMENT;
    if (channel->memory.len < HEADER_BYTES || (channel->memory.len - HEADER_BYTES) / channel->stride < slots)
        return refuse("the memory is too small");
    if ((uintptr_t)channel->memory.buf % 64 || (uintptr_t)channel->bell.buf % 64 || channel->bell.len < BELL_BYTES)
        return refuse("channels and bells are aligned to 64 bytes, and a bell has as many");
    channel->sends = sends;
    channel->block = block;
    channel->slots = slots;
    channel->blocks = length ? (length - 1) / block + 1 : 1;
    return 1;
}

static int hold_channels(Steps *steps, PyObject *sends, PyObject *recvs)
{
    steps->channels = calloc((size_t)(PyList_Size(sends) + PyList_Size(recvs)) + 1, sizeof(Channel));
    if (!steps->channels) {
        PyErr_NoMemory();
        return 0;
    }
    Py_ssize_t bytes = 0;
    for (int which = 0; which < 2; which++) {
        PyObject *list = which ? recvs : sends;
        for (Py_ssize_t index = 0; index < PyList_Size(list); index++) {
            Channel *channel = &steps->channels[steps->count++]; /* counted also where it is held in part */
            if (!hold_channel(channel, PyList_GetItem(list, index), !which))
                return 0;
            bytes += channel->user.len < HEAVY_BYTES ? channel->user.len : HEAVY_BYTES;
        }
        if (!which)
            steps->sends = steps->count;
    }
    steps->heavy = bytes >= HEAVY_BYTES;
    return 1;
}

static PyObject *steps_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *bell, *sends, *recvs;
    long spins, yields;
    if (kwargs && PyDict_Size(kwargs))
        return PyErr_Format(PyExc_TypeError, "Steps() takes no keyword arguments");
    if (!PyArg_ParseTuple(args, "OO!O!ll", &bell, &PyList_Type, &sends, &PyList_Type, &recvs, &spins, &yields))
        return NULL;
    if (spins < 0 || yields < 0 || spins > MOST_TRIES || yields > MOST_TRIES)
        return PyErr_Format(PyExc_ValueError, "Steps() takes at most %d spins and as many yields", MOST_TRIES);
    Steps *self = (Steps *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!self)
        return NULL;
    self->spins = spins;
    self->yields = yields;
    int valid = hold_channels(self, sends, recvs) && !PyObject_GetBuffer(bell, &self->bell, PyBUF_WRITABLE);
    if (valid && (self->bell.len < BELL_BYTES || (uintptr_t)self->bell.buf % 64))
        valid = refuse("channels and bells are aligned to 64 bytes, and a bell has as many");
    if (!valid) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static PyObject *under_way(void)
{
    PyErr_SetString(PyExc_ValueError, "a step of this exchange is under way, or the exchange is closed");
    return NULL;
}

/* Begin a step, without the interpreter lock where it copies much. */
static int begin_step(Steps *self)
{
    int ended;
    if (!self->heavy)
        return begin(self);
    self->waiting++;
    Py_BEGIN_ALLOW_THREADS
    ended = begin(self);
    Py_END_ALLOW_THREADS
    self->waiting--;
    return ended;
}

static int wait_for_end(Steps *self, long spins, long yields, double seconds)
{
    int ended;
    if (!self->bell.obj)
        return has_ended(self); /* closed */
    self->waiting++;
    Py_BEGIN_ALLOW_THREADS
    ended = wait_without_gil(self, spins, yields, seconds);
    Py_END_ALLOW_THREADS
    self->waiting--;
    if (self->closed)
        release_bell(self);
    return ended;
}

static PyObject *steps_call(PyObject *object, PyObject *Py_UNUSED(args), PyObject *Py_UNUSED(kwargs))
{
    Steps *self = (Steps *)object;
    int ended = begin_step(self);
    if (ended < 0)
        return under_way();
    for (long spins = self->heavy ? 0 : self->spins / 16; spins > 0 && !ended; spins--) {
        relax();
        ended = progress(self);
    }
    if (!ended)
        ended = wait_for_end(self, self->spins, self->yields, 0);
    return PyBool_FromLong(ended);
}

static PyObject *steps_begin(PyObject *self, PyObject *Py_UNUSED(none))
{
    int ended = begin_step((Steps *)self);
    return ended < 0 ? under_way() : PyBool_FromLong(ended);
}

static PyObject *steps_progress(PyObject *object, PyObject *Py_UNUSED(none))
{
    Steps *self = (Steps *)object;
    return PyBool_FromLong(self->heavy ? wait_for_end(self, 0, 0, 0) : progress(self));
}

static PyObject *steps_wait(PyObject *self, PyObject *args)
{
    long spins, yields;
    double seconds;
    if (!PyArg_ParseTuple(args, "lld", &spins, &yields, &seconds))
        return NULL;
    if (spins < 0 || yields < 0 || spins > MOST_TRIES || yields > MOST_TRIES || !(seconds <= MOST_SECONDS))
        return PyErr_Format(PyExc_ValueError, "wait() takes at most %d spins, as many yields, and %d seconds",
                            MOST_TRIES, MOST_SECONDS);
    int ended = wait_for_end((Steps *)self, spins, yields, seconds);
    return PyErr_CheckSignals() ? NULL : PyBool_FromLong(ended);
}

static PyObject *steps_awaited(PyObject *object, PyObject *Py_UNUSED(none))
{
    Steps *self = (Steps *)object;
    PyObject *list = PyList_New(0);
    for (Py_ssize_t index = 0; list && index < self->count; index++) {
        PyObject *number = self->channels[index].ended ? NULL : PyLong_FromSsize_t(index);
        if (number && PyList_Append(list, number))
            Py_CLEAR(list);
        Py_XDECREF(number);
    }
    return list;
}

static PyObject *steps_close(PyObject *object, PyObject *tell)
{
    Steps *self = (Steps *)object;
    int telling = PyObject_IsTrue(tell);
    if (telling < 0)
        return NULL;
    lock(self);
    self->closed = 1;
    for (Py_ssize_t index = self->sends; index < self->count && telling; index++)
        __atomic_store_n(&((Header *)self->channels[index].memory.buf)->closed, 1, __ATOMIC_RELEASE);
    unlock(self);
    release_channels(self); /* no thread uses them without the lock, and none when it is closed */
    release_bell(self);
    return Py_NewRef(Py_None);
}

static PyMethodDef methods[] = { /* described in native_steps.py */
    {"begin", steps_begin, METH_NOARGS, NULL},
    {"progress", steps_progress, METH_NOARGS, NULL},
    {"wait", steps_wait, METH_VARARGS, NULL},
    {"awaited", steps_awaited, METH_NOARGS, NULL},
    {"close", steps_close, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot steps_slots[] = {
    {Py_tp_new, (void *)steps_new},
    {Py_tp_dealloc, (void *)steps_dealloc},
    {Py_tp_call, (void *)steps_call},
    {Py_tp_methods, methods},
    {0, NULL},
};

static PyType_Spec steps_spec = {
    .name = "ferro_gloo.shm.exchange._steps.Steps",
    .basicsize = sizeof(Steps),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = steps_slots,
};

static int add_types(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &steps_spec, NULL);
    int failed = !type || PyModule_AddObjectRef(module, "Steps", type);
    Py_XDECREF(type);
    return failed ? -1 : 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)add_types},
    {0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_steps",
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__steps(void)
{
    return PyModuleDef_Init(&definition);
}
