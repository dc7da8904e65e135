/* Copies past the caches. */

#include "native.h"

#ifdef __x86_64__
#include <emmintrin.h>
#endif

/* Copy past the caches: the processor need not read lines that it overwrites as a whole. */
static void copy_nontemporal(char *to, const char *from, size_t length)
{
#ifdef __x86_64__
    size_t done = -(uintptr_t)to % 64;
    done = done < length ? done : length;
    memcpy(to, from, done);
    for (; done + 64 <= length; done += 64)
        for (int part = 0; part < 64; part += 16)
            _mm_stream_si128((__m128i *)(to + done + part),
                             _mm_loadu_si128((const __m128i *)(from + done + part)));
    memcpy(to + done, from + done, length - done);
    _mm_sfence(); /* non-temporal stores have no order with others */
#else
    memcpy(to, from, length);
#endif
}

PyObject *copy(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t given)
{
    if (given != 2)
        return PyErr_Format(PyExc_TypeError, "copy() takes 2 arguments, not %zd", given);
    Py_buffer to, from;
    if (PyObject_GetBuffer(args[0], &to, PyBUF_WRITABLE))
        return NULL;
    if (PyObject_GetBuffer(args[1], &from, PyBUF_SIMPLE)) {
        PyBuffer_Release(&to);
        return NULL;
    }
    const char *start = from.buf, *target = to.buf;
    int valid = to.len == from.len && (start + from.len <= target || target + to.len <= start);
    if (valid) {
        Py_BEGIN_ALLOW_THREADS
        copy_nontemporal(to.buf, from.buf, (size_t)to.len);
        Py_END_ALLOW_THREADS
    } else {
        PyErr_SetString(PyExc_ValueError, "copy() takes two apart arrays of one size");
    }
    PyBuffer_Release(&to);
    PyBuffer_Release(&from);
    return valid ? Py_NewRef(Py_None) : NULL;
}
