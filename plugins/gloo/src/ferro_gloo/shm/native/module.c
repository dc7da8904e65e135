/* The module: its functions and types, which ../native.py describes. */

#include "rooted.h"

static PyMethodDef functions[] = {
    {"publish", (PyCFunction)(void (*)(void))publish, METH_FASTCALL, NULL},
    {"wait", (PyCFunction)(void (*)(void))wait_for, METH_FASTCALL, NULL},
    {"copy", (PyCFunction)(void (*)(void))copy, METH_FASTCALL, NULL},
    {"sum_half", sum_half, METH_VARARGS, NULL},
    {"has_arithmetic", has_arithmetic, METH_VARARGS, NULL},
    {"reduce", reduce, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

/* Make a type and, unless `name` is NULL, add it to the module. */
static PyTypeObject *add_type(PyObject *module, PyType_Spec *spec, const char *name)
{
    PyObject *type = PyType_FromModuleAndSpec(module, spec, NULL);
    if (type && name && PyModule_AddObjectRef(module, name, type)) {
        Py_DECREF(type);
        return NULL;
    }
    return (PyTypeObject *)type;
}

static int add_types(PyObject *module)
{
    ModuleState *state = PyModule_GetState(module);
    state->ring = add_type(module, &ring_spec, "Ring");
    state->short_path = state->ring ? add_type(module, &short_path_spec, "ShortPath") : NULL;
    state->bound = state->short_path ? add_type(module, &bound_spec, NULL) : NULL;
    state->announced = state->bound ? add_type(module, &announced_spec, "AnnouncedScatter") : NULL;
    state->chunked_plan = state->announced ? add_type(module, &chunked_plan_spec, "ChunkedPlan") : NULL;
    state->rooted_steps = state->chunked_plan ? add_type(module, &rooted_steps_spec, "RootedSteps") : NULL;
    return state->rooted_steps ? 0 : -1;
}

static int visit_types(PyObject *module, visitproc visit, void *arg)
{
    ModuleState *state = PyModule_GetState(module);
    Py_VISIT(state->ring);
    Py_VISIT(state->short_path);
    Py_VISIT(state->bound);
    Py_VISIT(state->announced);
    Py_VISIT(state->chunked_plan);
    Py_VISIT(state->rooted_steps);
    return 0;
}

static int clear_types(PyObject *module)
{
    ModuleState *state = PyModule_GetState(module);
    Py_CLEAR(state->ring);
    Py_CLEAR(state->short_path);
    Py_CLEAR(state->bound);
    Py_CLEAR(state->announced);
    Py_CLEAR(state->chunked_plan);
    Py_CLEAR(state->rooted_steps);
    return 0;
}

static void free_module(void *module)
{
    clear_types(module);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, add_types},
    {0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_native",
    .m_size = sizeof(ModuleState),
    .m_methods = functions,
    .m_slots = slots,
    .m_traverse = visit_types,
    .m_clear = clear_types,
    .m_free = free_module,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&definition);
}
