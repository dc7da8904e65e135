/* Counters in shared memory: publishing them, and waiting for them.

   This is right on weak memory models, ARM64 as well as x86-64. A rank writes its data with plain
   stores, then its counter with release; another rank loads the counter with acquire, and once it
   sees the value, it sees all that was written before. Sleeping needs one more order: a publisher
   stores the counter, then loads the number of sleepers; a sleeper adds itself to that number, then
   loads the counter. All four are sequentially consistent, so at least one of the two sees the
   other: the sleeper stays awake, or the publisher wakes it. The kernel compares the counter once
   more, under its lock, before the sleeper sleeps.

   One counter, aligned to 8 bytes:

       byte  0..7    int64   value, only grows; its low half is the futex word
       byte  8..11   uint32  the number of its sleepers; one that died asleep stays counted, which
                             costs the publisher a system call each time, and harms nothing
*/

#include "native.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define COUNTER_BYTES 16
#define LOW_HALF (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__ ? 4 : 0)
#define SPINS_PER_YIELD 64
#define MOST_TRIES 1000000
#define MOST_SECONDS 86400
#define LONGEST_SLEEP 0.1 /* in seconds */

void wake_sleepers(char *counter)
{
    syscall(SYS_futex, counter + LOW_HALF, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

/* Sleep until the counter has the value, or `until`, or a signal; return 1 if it has it. */
static int sleep_on(char *counter, int64_t value, const struct timespec *until)
{
    uint32_t *sleepers = (uint32_t *)(counter + SLEEPERS);
    int64_t seen;
    int ended = 0;
    __atomic_fetch_add(sleepers, 1, __ATOMIC_SEQ_CST);
    while ((seen = __atomic_load_n((int64_t *)counter, __ATOMIC_SEQ_CST)) < value && !ended) {
        long failed = syscall(SYS_futex, counter + LOW_HALF, FUTEX_WAIT_BITSET, (uint32_t)seen,
                              until, NULL, FUTEX_BITSET_MATCH_ANY);
        ended = failed && errno != EAGAIN;
    }
    __atomic_fetch_sub(sleepers, 1, __ATOMIC_SEQ_CST);
    return seen >= value;
}

static int has_passed(const struct timespec *until)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec > until->tv_sec || (now.tv_sec == until->tv_sec && now.tv_nsec >= until->tv_nsec);
}

Py_ssize_t wait_without_gil(const Awaited *awaited, Py_ssize_t index, long spins, long yields, double seconds,
                            int *interrupted)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    long nanoseconds = until.tv_nsec + (long)((seconds - (double)(time_t)seconds) * 1e9);
    until.tv_sec += (time_t)seconds + nanoseconds / 1000000000;
    until.tv_nsec = nanoseconds % 1000000000;
    for (; index >= 0; index = first_behind(awaited, index)) {
        if (spins > 0) {
            if (--spins % SPINS_PER_YIELD)
                relax();
            else
                sched_yield(); /* the awaited rank may be on this core, which it would not get while this one spins */
        } else if (yields > 0) {
            yields--;
            sched_yield();
        } else if (!sleep_on(awaited->counters + index * awaited->counter_stride, awaited->value, &until)) {
            *interrupted = errno == EINTR;
            break;
        } else if (first_behind(awaited, index) == index && has_passed(&until)) {
            break; /* the counter has come without its line: its owner is giving up */
        }
    }
    return index;
}

/* Return 1 if the counters lie within the memory, aligned; set an error if not. */
static int lie_within(const Py_buffer *memory, Py_ssize_t first, Py_ssize_t stride, Py_ssize_t count)
{
    if (first < 0 || first > memory->len - COUNTER_BYTES || count < 1 || stride < COUNTER_BYTES ||
        count - 1 > (memory->len - COUNTER_BYTES - first) / stride || stride % 8 ||
        ((uintptr_t)memory->buf + (uintptr_t)first) % 8) {
        PyErr_Format(PyExc_ValueError,
                     "%zd bytes hold no %zd aligned counters, %zd bytes apart, from offset %zd on",
                     memory->len, count, stride, first);
        return 0;
    }
    return 1;
}

PyObject *publish(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t given)
{
    if (given != 3)
        return PyErr_Format(PyExc_TypeError, "publish() takes 3 arguments, not %zd", given);
    Py_ssize_t offset = PyLong_AsSsize_t(args[1]);
    int64_t value = PyLong_AsLongLong(args[2]);
    Py_buffer memory;
    if (PyErr_Occurred() || PyObject_GetBuffer(args[0], &memory, PyBUF_WRITABLE))
        return NULL;
    int valid = lie_within(&memory, offset, COUNTER_BYTES, 1);
    if (valid)
        publish_counter((char *)memory.buf + offset, value);
    PyBuffer_Release(&memory);
    return valid ? Py_NewRef(Py_None) : NULL;
}

PyObject *wait_for(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t given)
{
    if (given != 8)
        return PyErr_Format(PyExc_TypeError, "wait() takes 8 arguments, not %zd", given);
    Py_ssize_t offset = PyLong_AsSsize_t(args[1]);
    Awaited awaited = {NULL, PyLong_AsSsize_t(args[2]), PyLong_AsSsize_t(args[3]),
                       PyLong_AsLongLong(args[4]), NULL, 0};
    long spins = PyLong_AsLong(args[5]), yields = PyLong_AsLong(args[6]);
    double seconds = PyFloat_AsDouble(args[7]);
    if (PyErr_Occurred())
        return NULL;
    if (spins > MOST_TRIES || yields > MOST_TRIES)
        return PyErr_Format(PyExc_ValueError, "wait() takes at most %d spins and as many yields",
                            MOST_TRIES);
    if (!(seconds > 0))
        seconds = 0;
    else if (seconds > MOST_SECONDS)
        seconds = MOST_SECONDS;
    Py_buffer memory;
    if (PyObject_GetBuffer(args[0], &memory, PyBUF_WRITABLE))
        return NULL;
    int valid = lie_within(&memory, offset, awaited.stride, awaited.count);
    Py_ssize_t behind = -1;
    if (valid) {
        awaited.first = awaited.counters = (char *)memory.buf + offset;
        awaited.counter_stride = awaited.stride;
        behind = first_behind(&awaited, 0);
    }
    /* A signal that comes just before the sleep does not end it, so no sleep is long. */
    while (behind >= 0 && valid) {
        double part = seconds < LONGEST_SLEEP ? seconds : LONGEST_SLEEP;
        int interrupted = 0;
        Py_BEGIN_ALLOW_THREADS
        behind = wait_without_gil(&awaited, behind, spins, yields, part, &interrupted);
        Py_END_ALLOW_THREADS
        seconds -= part;
        spins = yields = 0;
        valid = behind < 0 || PyErr_CheckSignals() == 0;
        if (seconds <= 0 || interrupted)
            break;
    }
    PyBuffer_Release(&memory);
    if (!valid)
        return NULL;
    return behind < 0 ? Py_NewRef(Py_None) : PyLong_FromSsize_t(behind);
}
