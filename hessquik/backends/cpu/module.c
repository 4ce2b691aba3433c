/* The kernel as a module of Python: what a call costs beside the steps is a fraction of a microsecond. */

#include "bound.h"
#include "program.h"

enum { MOST_ARRAYS = 32 };

const Program *hessquik_program(PyObject *words, PyObject *addresses, void *const **constants) {
    const Program *program = (const Program *)PyBytes_AsString(words);
    *constants = (void *const *)PyBytes_AsString(addresses);
    if (!program || !*constants) return NULL;
    const Py_ssize_t size = PyBytes_Size(words), word = sizeof(I);
    if (size >= (Py_ssize_t)sizeof(Program) && size == word * program->size &&
        PyBytes_Size(addresses) == word * program->constants)
        return program;
    PyErr_SetString(PyExc_ValueError, "expected the words of a program and as many constants as it says");
    return NULL;
}

/* The address of an array's first number; null with an error set if there is none. */
static void *address(PyObject *arrays, PyObject *name) {
    static PyObject *method;
    if (!method && !(method = PyUnicode_InternFromString("data_ptr"))) return NULL;
    PyObject *array = PyObject_GetItem(arrays, name);
    PyObject *number = array ? PyObject_CallMethodObjArgs(array, method, NULL) : NULL;
    void *found = number ? PyLong_AsVoidPtr(number) : NULL;
    Py_XDECREF(array);
    Py_XDECREF(number);
    return found;
}

static PyObject *run(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
    (void)self;
    void *arrays[MOST_ARRAYS];
    if (count != 6 || !PyTuple_Check(arguments[2])) {
        PyErr_SetString(PyExc_TypeError,
                        "expected a program, its constants, a tuple of names, arrays by name, start and stop");
        return NULL;
    }
    void *const *constants;
    const Program *program = hessquik_program(arguments[0], arguments[1], &constants);
    const I start = PyLong_AsLongLong(arguments[4]), stop = PyLong_AsLongLong(arguments[5]);
    if (PyErr_Occurred()) return NULL;
    const Py_ssize_t names = PyTuple_Size(arguments[2]);
    if (program->arrays != names || names > MOST_ARRAYS) {
        PyErr_SetString(PyExc_ValueError, "expected as many names as the program has arrays, at most 32");
        return NULL;
    }
    for (Py_ssize_t i = 0; i < names; i++) {
        arrays[i] = address(arguments[3], PyTuple_GetItem(arguments[2], i));
        if (!arrays[i] && PyErr_Occurred()) return NULL;
    }
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = hessquik_run(program, constants, arrays, start, stop);
    Py_END_ALLOW_THREADS
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *vector_bytes(PyObject *self, PyObject *none) {
    (void)self, (void)none;
    return PyLong_FromLongLong(hessquik_vector_bytes());
}

/* {structure: (bytes, ((field, type), …))}, {constant: number} */
static PyObject *interface(PyObject *self, PyObject *none) {
    (void)self, (void)none;
    PyObject *structures = PyDict_New(), *constants = PyDict_New();
    if (!structures || !constants) goto failed;
#define ROW(type, name) {#name, #type},
#define STRUCTURE(structure, fields) { \
        static const char *const rows[][2] = {fields(ROW)}; \
        const Py_ssize_t size = sizeof rows / sizeof rows[0]; \
        PyObject *list = PyTuple_New(size); \
        for (Py_ssize_t i = 0; list && i < size; i++) \
            PyTuple_SetItem(list, i, Py_BuildValue("(ss)", rows[i][0], rows[i][1])); \
        PyObject *entry = Py_BuildValue("(nN)", (Py_ssize_t)sizeof(structure), list); \
        if (!entry || PyDict_SetItemString(structures, #structure, entry)) goto failed; \
        Py_DECREF(entry); \
    }
    STRUCTURES(STRUCTURE)
#define NUMBER(key, value) { \
        PyObject *number = PyLong_FromLong(value); \
        if (!number || PyDict_SetItemString(constants, key, number)) goto failed; \
        Py_DECREF(number); \
    }
#define CONSTANT_ROW(name) NUMBER(#name, name)
#define KIND_ROW(name) NUMBER(#name, IS_##name)
#define PRIMITIVE_ROW(name) NUMBER(#name, OP_##name)
    SPACES(CONSTANT_ROW)
    KINDS(KIND_ROW)
    PRIMITIVES(PRIMITIVE_ROW)
    CONSTANT_ROW(CHUNK_BYTES)
    CONSTANT_ROW(NV)
    CONSTANT_ROW(PAIRS)
    CONSTANT_ROW(BLOCK)
    return Py_BuildValue("(NN)", structures, constants);
failed:
    Py_XDECREF(structures);
    Py_XDECREF(constants);
    return NULL;
}

static PyMethodDef methods[] = {
    {"run", (PyCFunction)(void (*)(void))run, METH_FASTCALL,
     "run(program, constants, names, arrays, start, stop)\n--\n\nCompute rows start to stop of the arrays, in the program's order."},
    {"bind", hessquik_bind, METH_VARARGS,
     "bind(owner, program, constants, tensor, most_rows, inputs, results)\n--\n\nReturn a function of tensors for few rows."},
    {"vector_bytes", vector_bytes, METH_NOARGS,
     "vector_bytes()\n--\n\nReturn the bytes of this machine's vectors."},
    {"interface", interface, METH_NOARGS,
     "interface()\n--\n\nReturn the structures and the constants by name."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernel", "The CPU kernel.", -1, methods,
                                        NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernel(void) {
    PyObject *module = PyModule_Create(&definition);
    if (module && PyModule_AddStringConstant(module, "sources", HESSQUIK_SOURCES)) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
