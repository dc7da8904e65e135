/* The arrays of a call that reduces them: checked, and held until it is done. */

#include "native.h"

/* Return 1 if a buffer can be an operand of `out`; set an error if not. */
static int fits(const Py_buffer *operand, const Py_buffer *out, Py_ssize_t itemsize, int numbers)
{
    const char *from = operand->buf, *to = out->buf;
    if (operand->len != out->len || operand->len % itemsize || (uintptr_t)from % (uintptr_t)itemsize ||
        operand->itemsize > numbers * itemsize) {
        PyErr_Format(PyExc_ValueError, "an operand must be %zd bytes of aligned numbers of %zd bytes, not %zd bytes",
                     out->len, itemsize, operand->len);
        return 0;
    }
    if (from != to && from < to + out->len && to < from + operand->len) {
        PyErr_SetString(PyExc_ValueError, "`out` may be a source, but not overlap one in part");
        return 0;
    }
    return 1;
}

int hold_operands(Operands *operands, PyObject *sources, const Py_buffer *out, Py_ssize_t itemsize, int numbers)
{
    *operands = (Operands){NULL, NULL, 0};
    if (!fits(out, out, itemsize, numbers))
        return 0;
    PyObject *arrays = PySequence_Tuple(sources);
    if (!arrays)
        return 0;
    Py_ssize_t count = PyTuple_Size(arrays);
    operands->held = PyMem_Calloc((size_t)count + 1, sizeof *operands->held);
    operands->arrays = PyMem_Calloc((size_t)count + 1, sizeof *operands->arrays);
    int valid = operands->held && operands->arrays;
    if (!valid) {
        PyErr_NoMemory();
    } else if (!count) {
        PyErr_SetString(PyExc_ValueError, "there must be at least one source");
        valid = 0;
    }
    while (valid && operands->count < count) {
        Py_ssize_t index = operands->count;
        Py_buffer *held = &operands->held[index];
        valid = !PyObject_GetBuffer(PyTuple_GetItem(arrays, index), held, PyBUF_SIMPLE);
        if (valid) {
            operands->count++;
            operands->arrays[index] = held->buf;
            valid = fits(held, out, itemsize, numbers);
        }
    }
    Py_DECREF(arrays);
    return valid;
}

void release_operands(Operands *operands)
{
    while (operands->count)
        PyBuffer_Release(&operands->held[--operands->count]);
    PyMem_Free(operands->held);
    PyMem_Free(operands->arrays);
}
