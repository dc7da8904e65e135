/* What the files of the native steps share: the types, and what the others call.

       moving.c  moving blocks through channels
       waiting.c waiting until a step has ended
       steps.c   the Python type, described in native_steps.py
*/

#ifndef FERRO_GLOO_STEPS_H
#define FERRO_GLOO_STEPS_H

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#if !defined(__linux__) || __SIZEOF_POINTER__ != 8
#error "the native helper of ferro-gloo is for 64-bit Linux; elsewhere ferro-gloo is pure Python"
#endif

#include <stdint.h>
#include <sys/types.h>

#define HEADER_BYTES 128
#define NUMBER_BYTES 8

typedef struct {
    int64_t taken, closed;
    char other_line[48];
    int64_t starved;
} Header;

typedef struct {
    uint32_t rings, sleepers;
} Bell;

typedef struct {
    Py_buffer user, memory, bell, source;
    int sends;
    int direct;    /* the receiver reads the message where it is, in `source` or in the sender's own memory */
    pid_t sender;  /* the process whose memory it reads; 0 for `source` */
    void *address; /* in that process */
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

/* A pause of some tens of nanoseconds. */
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

static inline void unlock(Steps *steps)
{
    __atomic_store_n(&steps->locked, 0, __ATOMIC_RELEASE);
}

static inline int has_ended(const Steps *steps)
{
    return __atomic_load_n(&steps->left, __ATOMIC_ACQUIRE) == 0;
}

/* ---- moving.c */

void lock(Steps *steps);
/* Begin a step and advance; return whether it has ended, or -1 if one is under way or the exchange is closed. */
int begin(Steps *steps);
/* Move what can be moved, unless another thread does; return 1 if the step has ended. */
int progress(Steps *steps);

/* Read memory of another process; return 0 if that fails. */
int read_process(pid_t process, const void *address, void *target, size_t nbytes);

/* ---- waiting.c */

/* Advance until the step has ended: spin, then yield the core, then sleep. Called without the interpreter lock.

   Return 1 if it has ended, 0 after `seconds` or a signal. */
int wait_without_gil(Steps *steps, long spins, long yields, double seconds);

#endif
