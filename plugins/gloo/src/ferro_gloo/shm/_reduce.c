/* TEMPORARY: float32 sums, for measurements. */
#include "_native.h"

static void sum_float(const Reduction *r, char *out, const char *const *operands, Py_ssize_t count, Py_ssize_t bytes)
{
    float *to = (float *)out;
    Py_ssize_t n = bytes / 4;
    if (count == 2) {
        const float *a = (const float *)operands[0], *b = (const float *)operands[1];
#pragma GCC ivdep
        for (Py_ssize_t i = 0; i < n; i++) to[i] = a[i] + b[i];
        return;
    }
    for (Py_ssize_t at = 0; at < n; at += 1024) {
        Py_ssize_t end = at + 1024 < n ? at + 1024 : n;
        float part[1024];
        const float *a = (const float *)operands[0];
        for (Py_ssize_t i = at; i < end; i++) part[i - at] = a[i];
        for (Py_ssize_t s = 1; s < count; s++) {
            const float *b = (const float *)operands[s];
            for (Py_ssize_t i = at; i < end; i++) part[i - at] += b[i];
        }
        for (Py_ssize_t i = at; i < end; i++) to[i] = part[i - at];
    }
}

HIDDEN int find_reduction(PyObject *description, Reduction *reduction)
{
    reduction->kernel = sum_float;
    reduction->divisor = 0;
    return 1;
}
