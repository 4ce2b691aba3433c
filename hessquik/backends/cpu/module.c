/* The kernel as a module of Python: what a call costs beside the steps is a fraction of a microsecond. */

#include "bound.h"
#include "program.h"

void *const *hessquik_addresses(PyObject *bytes, I count) {
    void *const *found = (void *const *)PyBytes_AsString(bytes);
    if (!found || PyBytes_Size(bytes) == (Py_ssize_t)sizeof(I) * count) return found;
    return (void *)PyErr_Format(PyExc_ValueError, "expected %d addresses, as the program says", (int)count);
}

const Program *hessquik_program(PyObject *words) {
    const Program *program = (const Program *)PyBytes_AsString(words);
    if (!program) return NULL;
    const Py_ssize_t size = PyBytes_Size(words);
    if (size >= (Py_ssize_t)sizeof(Program) && size == (Py_ssize_t)sizeof(I) * program->size) return program;
    return (void *)PyErr_Format(PyExc_ValueError, "expected the words of a program");
}

static PyObject *run(PyObject *module, PyObject *arguments) {
    (void)module;
    PyObject *words, *constants, *arrays;
    long long start, stop;
    if (!PyArg_ParseTuple(arguments, "OOOLL", &words, &constants, &arrays, &start, &stop)) return NULL;
    const Program *program = hessquik_program(words);
    void *const *held = program ? hessquik_addresses(constants, program->constants) : NULL;
    void *const *given = held ? hessquik_addresses(arrays, program->arrays) : NULL;
    if (!given) return NULL;
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = hessquik_run(program, held, given, start, stop);
    Py_END_ALLOW_THREADS
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"run", run, METH_VARARGS,
     "run(program, constants, arrays, start, stop)\n--\n\nCompute rows start to stop of the arrays at these addresses."},
    {"bind", hessquik_bind, METH_VARARGS,
     "bind(owner, program, constants, tensor, most_rows, inputs, names, results)\n--\n\n"
     "Return a function of tensors for few rows."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {.m_name = "_kernel", .m_doc = "The CPU kernel.", .m_size = -1, .m_methods = methods};

#define NAME_TEXT(name) #name " "
#define SIZE_TEXT(name, value) #name " " #value "\n"
#define FIELD_TEXT(type, name) #type " " #name " "
#define STRUCTURE_TEXT(name, fields) #name " " fields "\n"

PyMODINIT_FUNC PyInit__kernel(void) {
    PyObject *module = PyModule_Create(&definition);
    const char *texts[][2] = {
        {"sources", HESSQUIK_SOURCES},
        {"numbered", SPACES(NAME_TEXT) "\n" KINDS(NAME_TEXT) "\n" PRIMITIVES(NAME_TEXT)},
        {"sizes", SIZES(SIZE_TEXT)},
        {"structures", STRUCTURES(STRUCTURE_TEXT, FIELD_TEXT)},
    };
    int failed = !module || PyModule_AddIntConstant(module, "vector_bytes", (long)hessquik_vector_bytes());
    for (size_t i = 0; !failed && i < sizeof texts / sizeof *texts; i++)
        failed = PyModule_AddStringConstant(module, texts[i][0], texts[i][1]);
    if (!failed) return module;
    Py_XDECREF(module);
    return NULL;
}
