/* Steps: the Python type, which checks and holds the memory of an exchange. native_steps.py describes it. */

#include "steps.h"

#include <stdlib.h>

#define SLOT_ALIGNMENT 128
#define BELL_BYTES 64
#define HEAVY_BYTES (64 << 10) /* a step of more bytes lets other threads run while it copies */
#define MOST_TRIES 1000000
#define MOST_SECONDS 86400
#define MOST_READ 64

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
    long sender = 0;
    unsigned long long address = 0;
    Py_ssize_t block, slots;
    if (!PyTuple_Check(described))
        return refuse("each is a tuple");
    if (!PyArg_ParseTuple(described, "OOOnnO", &user, &memory, &bell, &block, &slots, &source) ||
        PyObject_GetBuffer(user, &channel->user, sends ? PyBUF_SIMPLE : PyBUF_WRITABLE) ||
        PyObject_GetBuffer(memory, &channel->memory, PyBUF_WRITABLE) ||
        PyObject_GetBuffer(bell, &channel->bell, PyBUF_WRITABLE) ||
        (PyTuple_Check(source)    ? !PyArg_ParseTuple(source, "lK", &sender, &address)
         : source != Py_None ? PyObject_GetBuffer(source, &channel->source, PyBUF_SIMPLE)
                             : 0))
        return 0;
    Py_ssize_t length = channel->user.len;
    if (slots < 2 || slots & (slots - 1) || slots > 1 << 20 || block < 1 || block > PY_SSIZE_T_MAX / 2)
        return refuse("the slots are a power of two, and blocks have at least one byte");
    channel->direct = source != Py_None;
    channel->sender = (pid_t)sender;
    channel->address = (void *)(uintptr_t)address;
    if (channel->direct && (block < length || (channel->source.obj ? channel->source.len != length : sender < 1)))
        return refuse("a source has the size of the message, and is one block");
    if (sends && sender)
        return refuse("a message that is sent is in this process");
    Py_ssize_t data = channel->direct ? 0 : block;
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
    if (telling) {
        lock(self);
        self->closed = 1;
        for (Py_ssize_t index = self->sends; index < self->count; index++)
            __atomic_store_n(&((Header *)self->channels[index].memory.buf)->closed, 1, __ATOMIC_RELEASE);
        unlock(self);
    } else { /* a forked child, which has no other thread */
        self->closed = 1;
        self->locked = self->waiting = 0;
    }
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

static PyObject *read_memory(PyObject *Py_UNUSED(module), PyObject *args)
{
    long process;
    unsigned long long address;
    Py_ssize_t nbytes;
    if (!PyArg_ParseTuple(args, "lKn", &process, &address, &nbytes))
        return NULL;
    if (process < 1 || nbytes < 0 || nbytes > MOST_READ)
        return PyErr_Format(PyExc_ValueError, "read_memory() reads at most %d bytes of a process", MOST_READ);
    char found[MOST_READ];
    if (!read_process((pid_t)process, (void *)(uintptr_t)address, found, (size_t)nbytes))
        return Py_NewRef(Py_None);
    return PyBytes_FromStringAndSize(found, nbytes);
}

static PyMethodDef functions[] = { /* described in native_steps.py */
    {"read_memory", read_memory, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
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
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__steps(void)
{
    return PyModuleDef_Init(&definition);
}
