/* What the files of the native helper use of each other. */

#ifndef FERRO_GLOO_NATIVE_H
#define FERRO_GLOO_NATIVE_H

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>
#include <stdint.h>

#if !defined(__linux__) || __SIZEOF_POINTER__ != 8
#error "the native helper of ferro-gloo is for 64-bit Linux; elsewhere ferro-gloo is pure Python"
#endif

#define HIDDEN __attribute__((visibility("hidden")))

/* Counters, `stride` bytes apart, that are to reach `value`; described in _native.c. */
typedef struct {
    char *first;
    Py_ssize_t stride, count;
    int64_t value;
} Awaited;

/* Find the first counter that is behind, from `index` on; -1 if none is. */
HIDDEN Py_ssize_t first_behind(const Awaited *awaited, Py_ssize_t index);

/* Spin, then yield, then sleep, from counter `index` on; return the first behind, or -1. */
HIDDEN Py_ssize_t wait_without_gil(const Awaited *awaited, Py_ssize_t index, long spins,
                                   long yields, double seconds, int *interrupted);

/* Store a counter with release, and wake its sleepers. */
HIDDEN void publish_counter(char *counter, int64_t value);

/* Copy past the caches, so that the processor need not read the lines that it overwrites. */
HIDDEN void copy_past_caches(char *to, const char *from, size_t length);

/* The arithmetic of a reduction: left to right over `count` operands of `bytes` bytes each, into `out`, which is an
   operand itself or overlaps none. */
typedef struct Reduction Reduction;
struct Reduction {
    void (*kernel)(const Reduction *reduction, char *out, const char *const *operands, Py_ssize_t count,
                   Py_ssize_t bytes);
    double divisor; /* of a mean; 0 for other reductions */
};

/* Find the reduction (name, kind and size of the dtype, divisor); return 0 with an error set if there is none. */
HIDDEN int find_reduction(PyObject *description, Reduction *reduction);

/* Functions of the module, in files of their own. */
HIDDEN PyObject *copy(PyObject *module, PyObject *const *args, Py_ssize_t given);
HIDDEN PyObject *run_chunks(PyObject *module, PyObject *const *args, Py_ssize_t given);

#endif
