/* BoundShortPath: a ShortPath with its arrays, which it holds for many steps (see BoundFastPath in
   ferro.collectives.fast_path). */

#include "native.h"

PyObject *bind_path(ShortPath *path, PyObject *args)
{
    PyObject *from, *to;
    if (!PyArg_UnpackTuple(args, "bind", 2, 2, &from, &to))
        return NULL;
    ModuleState *module = PyType_GetModuleState(Py_TYPE((PyObject *)path));
    if (!module)
        return NULL;
    Bound *bound = (Bound *)((allocfunc)PyType_GetSlot(module->bound, Py_tp_alloc))(module->bound, 0);
    if (!bound)
        return NULL;
    bound->number = -1;
    bound->path = (ShortPath *)Py_NewRef((PyObject *)path);
    if (hold_arrays(&path->collective, &path->known, from, to, &bound->source, &bound->target))
        return (PyObject *)bound;
    bound->source.obj = bound->target.obj = NULL; /* nothing is held */
    Py_DECREF((PyObject *)bound);
    Py_RETURN_NONE;
}

static PyObject *call_bound(Bound *bound, PyObject *args, PyObject *keywords)
{
    if (PyTuple_Size(args) || (keywords && PyDict_Size(keywords))) {
        PyErr_SetString(PyExc_TypeError, "a bound ShortPath takes no arguments");
        return NULL;
    }
    int free = bound->closed ? 0 : is_free(bound->path);
    if (free > 0)
        return run_path(bound->path, bound->source.buf, bound->target.buf);
    return free < 0 ? NULL : Py_NewRef(Py_False);
}

static PyObject *start(Bound *bound, PyObject *Py_UNUSED(ignored))
{
    ShortPath *path = bound->path;
    if (state_of(path)[BUSY] || path->collective.ring->retracted || bound->number >= 0 || bound->closed)
        Py_RETURN_FALSE;
    if (path->collective.two_rounds && path->collective.ring->rank == 0)
        Py_RETURN_FALSE; /* it reduces for all, who must not wait until it has computed: the group's thread does */
    state_of(path)[NUMBER]++;
    bound->number = begin_collective(&path->collective, bound->source.buf, 1);
    Py_RETURN_TRUE;
}

static int is_started(const Bound *bound)
{
    if (bound->number < 0)
        PyErr_SetString(PyExc_RuntimeError, "this operation has not been started");
    return bound->number >= 0;
}

static PyObject *test(Bound *bound, PyObject *Py_UNUSED(ignored))
{
    if (!is_started(bound))
        return NULL;
    /* An error is at hand, too, when a rank makes another call. */
    return PyBool_FromLong(advance_collective(&bound->path->collective, bound->number) != LATE);
}

static PyObject *finish(Bound *bound, PyObject *Py_UNUSED(ignored))
{
    if (!is_started(bound))
        return NULL;
    Collective *c = &bound->path->collective;
    int64_t number = bound->number;
    bound->number = -1;
    if (spin(c, number) != READY && wait_longer(bound->path, number))
        return NULL;
    finish_collective(c, number, bound->source.buf, bound->target.buf, 1);
    prepare_next(c->ring);
    Py_RETURN_NONE;
}

static PyObject *close_bound(Bound *bound, PyObject *Py_UNUSED(ignored))
{
    if (bound->number >= 0) {
        PyErr_SetString(PyExc_RuntimeError, "a started operation must be finished first");
        return NULL;
    }
    bound->closed = 1;
    PyBuffer_Release(&bound->source);
    PyBuffer_Release(&bound->target);
    Py_RETURN_NONE;
}

static int visit_bound(Bound *bound, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE((PyObject *)bound));
    Py_VISIT(bound->path);
    Py_VISIT(bound->source.obj);
    Py_VISIT(bound->target.obj);
    return 0;
}

static void free_bound(Bound *bound)
{
    PyTypeObject *type = Py_TYPE((PyObject *)bound);
    PyObject_GC_UnTrack(bound);
    PyBuffer_Release(&bound->source);
    PyBuffer_Release(&bound->target);
    Py_XDECREF((PyObject *)bound->path);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(bound);
    Py_DECREF(type);
}

static PyMethodDef bound_methods[] = {
    {"start", (PyCFunction)start, METH_NOARGS, NULL},
    {"test", (PyCFunction)test, METH_NOARGS, NULL},
    {"finish", (PyCFunction)finish, METH_NOARGS, NULL},
    {"close", (PyCFunction)close_bound, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot bound_slots[] = {
    {Py_tp_dealloc, free_bound}, {Py_tp_traverse, visit_bound}, {Py_tp_call, call_bound},
    {Py_tp_methods, bound_methods}, {0, NULL},
};

PyType_Spec bound_spec = {
    .name = "ferro_gloo.shm._native.BoundShortPath",
    .basicsize = sizeof(Bound),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = bound_slots,
};
