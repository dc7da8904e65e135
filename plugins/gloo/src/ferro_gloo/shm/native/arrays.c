/* The arrays of a short path: checked, and held while they are used.

   The buffer protocol takes NumPy 60 to 150 ns, half of what a whole step takes. So the head of a NumPy array is read as
   NumPy's own C macros read it (PyArray_DATA and others): its layout belongs to NumPy's binary interface, and is the same
   in NumPy 1 and 2. It is compared with what the buffer protocol says of a sample first, and not used if it differs. */

#include "native.h"

#define CONTIGUOUS 0x0001
#define ALIGNED 0x0100
#define WRITEABLE 0x0400
#define WARN_ON_WRITE (1u << 31)

typedef struct {
    PyObject_HEAD
    char *data;
    int dimensions;
    Py_ssize_t *shape, *strides;
    PyObject *base, *dtype;
    unsigned flags;
} ArrayHead;

int learn_arrays(KnownArrays *known, PyObject *sample)
{
    Py_buffer buffer;
    *known = (KnownArrays){NULL, NULL, 0};
    if (PyObject_GetBuffer(sample, &buffer, PyBUF_WRITABLE | PyBUF_ND))
        return -1;
    PyObject *dtype = PyObject_GetAttrString(sample, "dtype");
    const ArrayHead *head = (const ArrayHead *)sample;
    unsigned needed = CONTIGUOUS | ALIGNED | WRITEABLE;
    /* Two unequal lengths, so that no other pair of numbers is taken for them. */
    if (dtype && buffer.ndim == 2 && head->data == buffer.buf && head->dimensions == 2 &&
        head->shape[0] == buffer.shape[0] && head->shape[1] == buffer.shape[1] && head->dtype == dtype &&
        (head->flags & needed) == needed)
        *known = (KnownArrays){Py_TYPE(sample), dtype, (size_t)buffer.itemsize};
    PyBuffer_Release(&buffer);
    if (known->dtype)
        Py_INCREF((PyObject *)known->type);
    else
        Py_XDECREF(dtype);
    return dtype ? 0 : -1;
}

/* Take an array whose head can be read; return 0 if the buffer protocol must be asked. */
static int take_known(const KnownArrays *known, PyObject *array, size_t nbytes, unsigned flags, Py_buffer *held)
{
    const ArrayHead *head = (const ArrayHead *)array;
    flags |= CONTIGUOUS | ALIGNED;
    if (Py_TYPE(array) != known->type || head->dtype != known->dtype ||
        (head->flags & (flags | WARN_ON_WRITE)) != flags)
        return 0;
    size_t size = known->itemsize;
    for (int i = 0; i < head->dimensions; i++)
        size *= (size_t)head->shape[i]; /* it cannot overflow: this is the size of the array's memory */
    if (size != nbytes)
        return 0;
    held->buf = head->data;
    held->len = (Py_ssize_t)size;
    held->obj = Py_NewRef(array);
    return 1;
}

/* Hold an array of `nbytes`; return 0, without an error, if it is not what is needed. */
static int hold(const KnownArrays *known, PyObject *array, size_t nbytes, size_t itemsize, int writes, Py_buffer *held)
{
    if (take_known(known, array, nbytes, writes ? WRITEABLE : 0, held))
        return 1;
    if (PyObject_GetBuffer(array, held, writes ? PyBUF_WRITABLE : PyBUF_SIMPLE)) {
        PyErr_Clear();
        held->obj = NULL;
        held->buf = NULL;
        return 0;
    }
    int fits = (size_t)held->len == nbytes && (!itemsize || (uintptr_t)held->buf % itemsize == 0);
    if (!fits)
        PyBuffer_Release(held);
    return fits;
}

/* Return 1 if the arrays are apart, or the same, or in a gathering the source is this rank's block of the target. */
static int are_apart(const Collective *c, const Py_buffer *source, const Py_buffer *target)
{
    const char *from = source->buf, *to = target->buf;
    if (!from || !to || from + source->len <= to || to + target->len <= from)
        return 1;
    if (c->operation == ALL_GATHER || c->operation == GATHER)
        return from == to + (size_t)c->ring->rank * c->block;
    return from == to && source->len == target->len;
}

int hold_arrays(const Collective *c, const KnownArrays *known, PyObject *from, PyObject *to, Py_buffer *source,
              Py_buffer *target)
{
    size_t itemsize = c->arithmetic.itemsize;
    int is_root = c->operation == BROADCAST && c->source; /* it has its result already where that is the source */
    int has_target = c->target && !(is_root && (to == from || to == Py_None));
    source->buf = target->buf = NULL;
    source->obj = target->obj = NULL;
    if (has_target && !hold(known, to, c->target, itemsize, 1, target))
        return 0;
    if (c->source && has_target && from == to && c->source == c->target) {
        source->buf = target->buf; /* and it is held */
        source->len = target->len;
        return 1;
    }
    int valid = !c->source || hold(known, from, c->source, itemsize, 0, source);
    if (valid && are_apart(c, source, target))
        return 1;
    if (valid)
        PyBuffer_Release(source);
    PyBuffer_Release(target);
    return 0;
}
