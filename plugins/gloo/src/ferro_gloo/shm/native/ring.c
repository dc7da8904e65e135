/* Ring: this rank's view of the slots of a region. ../slot_ring.py describes the protocol, and says why it is right. */

#include "native.h"

#include <limits.h>
#include <stddef.h>
#include <structmember.h>

uint64_t digest_of(const unsigned char *label)
{
    uint64_t digest = 0x9E3779B97F4A7C15u;
    for (int i = 0; i < LABEL_BYTES; i += 8) {
        uint64_t word;
        memcpy(&word, label + i, 8);
        digest = (digest ^ word) * 0xBF58476D1CE4E5B9u;
        digest ^= digest >> 29;
    }
    return digest;
}

static char *header_of(const Ring *ring, int rank, int64_t number)
{
    return ring->headers + ((Py_ssize_t)rank * SLOTS + (Py_ssize_t)(number % SLOTS)) * HEADER_BYTES;
}

void write_header(Ring *ring, int64_t number, const unsigned char *header, size_t length, uint64_t digest,
                  const void *writer)
{
    unsigned char *written = ring->written[number % SLOTS];
    unsigned char whole[HEADER_BYTES] = {0};
    memcpy(whole, header, length);
    if (memcmp(written, whole, HEADER_BYTES)) {
        memcpy(written, whole, HEADER_BYTES);
        memcpy(header_of(ring, ring->rank, number), whole, HEADER_BYTES);
    }
    line_of(ring, ring->rank, number)->digest = digest;
    ring->writers[number % SLOTS] = writer;
}

void publish_chunk(Ring *ring, int64_t number)
{
    if (ring->retracted)
        return;
    __atomic_store_n(&line_of(ring, ring->rank, number)->number, number + 1, __ATOMIC_RELEASE);
    publish_counter(ring->counters + (Py_ssize_t)ring->rank * COUNTER_STRIDE, number + 1);
}

static PyObject *begin(Ring *ring, PyObject *header)
{
    char *bytes;
    Py_ssize_t length;
    if (PyBytes_AsStringAndSize(header, &bytes, &length))
        return NULL;
    if (length < LABEL_BYTES || length > HEADER_BYTES || length % 8)
        return PyErr_Format(PyExc_ValueError, "a header has %d to %d bytes, a multiple of 8, not %zd", LABEL_BYTES,
                            HEADER_BYTES, length);
    const unsigned char *label = (const unsigned char *)bytes;
    long long number = ring->next++;
    write_header(ring, number, label, (size_t)length, digest_of(label), NULL);
    return PyLong_FromLongLong(number);
}

static PyObject *publish_method(Ring *ring, PyObject *argument)
{
    long long number = PyLong_AsLongLong(argument);
    if (number == -1 && PyErr_Occurred())
        return NULL;
    if (number < 0 || number > LLONG_MAX - 2)
        return PyErr_Format(PyExc_ValueError, "there is no chunk %lld", number);
    publish_chunk(ring, number);
    Py_RETURN_NONE;
}

static PyObject *retract(Ring *ring, PyObject *Py_UNUSED(ignored))
{
    ring->retracted = 1;
    /* The counter goes first: a rank that sleeps on it expects no line to be missing whose counter is there. */
    publish_counter(ring->counters + (Py_ssize_t)ring->rank * COUNTER_STRIDE, -1);
    for (int slot = 0; slot < SLOTS; slot++)
        __atomic_store_n(&line_of(ring, ring->rank, slot)->number, -1, __ATOMIC_RELEASE);
    Py_RETURN_NONE;
}

/* Return 1 if `nbytes` bytes from `offset` on are within the memory, which begins at a multiple of the alignment. */
static int is_within(const Py_buffer *memory, Py_ssize_t offset, Py_ssize_t count, Py_ssize_t nbytes)
{
    return offset >= 0 && offset % LINE_BYTES == 0 && offset <= memory->len && nbytes > 0 &&
           count <= (memory->len - offset) / nbytes;
}

static PyObject *new_ring(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"memory", "ranks", "rank", "headers_at", "slots_at", "slot_bytes", "spins", NULL};
    PyObject *memory;
    int ranks, rank, spins;
    Py_ssize_t headers_at, slots_at, slot_bytes;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "Oiinnni:Ring", names, &memory, &ranks, &rank, &headers_at,
                                     &slots_at, &slot_bytes, &spins))
        return NULL;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Ring *ring = (Ring *)allocate(type, 0);
    if (!ring)
        return NULL;
    if (PyObject_GetBuffer(memory, &ring->memory, PyBUF_WRITABLE)) {
        Py_DECREF((PyObject *)ring);
        return NULL;
    }
    const Py_buffer *held = &ring->memory;
    if (ranks < 1 || rank < 0 || rank >= ranks || spins < 0 || slot_bytes < LINE_BYTES || slot_bytes % LINE_BYTES ||
        slot_bytes > held->len || (uintptr_t)held->buf % LINE_BYTES ||
        !is_within(held, 0, ranks, COUNTER_STRIDE) || !is_within(held, headers_at, ranks, SLOTS * HEADER_BYTES) ||
        !is_within(held, slots_at, ranks, SLOTS * (LINE_BYTES + slot_bytes))) {
        PyErr_Format(PyExc_ValueError, "%zd bytes are no region of rank %d of %d", held->len, rank, ranks);
        Py_DECREF((PyObject *)ring);
        return NULL;
    }
    ring->ranks = ranks;
    ring->rank = rank;
    ring->spins = spins;
    ring->slot_bytes = slot_bytes;
    ring->counters = held->buf;
    ring->headers = (char *)held->buf + headers_at;
    ring->lines = (char *)held->buf + slots_at;
    return (PyObject *)ring;
}

static void free_ring(Ring *ring)
{
    PyTypeObject *type = Py_TYPE((PyObject *)ring);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    PyBuffer_Release(&ring->memory);
    release(ring);
    Py_DECREF(type);
}

static PyMethodDef methods[] = { /* described in ../native.py */
    {"begin", (PyCFunction)begin, METH_O, NULL},
    {"publish", (PyCFunction)publish_method, METH_O, NULL},
    {"retract", (PyCFunction)retract, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef members[] = {
    {"next", T_LONGLONG, offsetof(Ring, next), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, new_ring},
    {Py_tp_dealloc, free_ring},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {0, NULL},
};

PyType_Spec ring_spec = {
    .name = "ferro_gloo.shm._native.Ring",
    .basicsize = sizeof(Ring),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};
