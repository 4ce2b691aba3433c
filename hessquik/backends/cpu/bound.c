/* A program bound to the tensors of a call with few rows: one call of C checks the inputs, allocates the results and
 * computes them. In Python, the same takes as long as a small network does.
 */

#include "bound.h"

#include <stdlib.h>

#include "dlpack.h"

enum { MOST_INPUTS = 3, MOST_RESULTS = 16, OF_ROWS = -1, UNREAD = -1 };

/* Number of the program's array, or UNREAD, and its shape, of which the first extent may be OF_ROWS. */
typedef struct {
    I external, ndim, shape[MOST_AXES];
} Slot;

/* `arguments` are those of bind(), which hold what the pointers point to. */
typedef struct {
    PyObject *arguments, *tensor, *names;
    const DlpackFunctions *functions;
    const Program *program;
    void *const *constants;
    const Slot *input, *result;
    I inputs, results, most_rows;
} Bound;

/* A result: what torch is told about it, and 64 bytes aligned behind it the numbers.
 *   is_freed   where to note that torch has freed it, as long as we have not finished with it */
typedef struct {
    DlpackManaged managed;
    int64_t shape[MOST_AXES], strides[MOST_AXES];
    int *is_freed;
} Result;

static void free_result(DlpackManaged *managed) {
    Result *result = managed->context;
    if (result->is_freed) *result->is_freed = 1;
    free(result);
}

/* A new tensor for a result, and where its numbers are; null with an error set if there is no memory. */
static PyObject *new_result(const Bound *bound, const Slot *slot, int64_t rows, void **numbers) {
    const size_t head = (sizeof(Result) + 63) & ~(size_t)63, real = bound->program->is_double ? 8 : 4;
    int64_t shape[MOST_AXES], strides[MOST_AXES], count = 1;
    for (int axis = slot->ndim - 1; axis >= 0; axis--) {
        shape[axis] = slot->shape[axis] == OF_ROWS ? rows : slot->shape[axis];
        strides[axis] = count;
        count *= shape[axis];
    }
    Result *result = NULL;
    if (posix_memalign((void **)&result, 64, head + (size_t)count * real)) return PyErr_NoMemory();
    *numbers = (char *)result + head;
    result->managed = (DlpackManaged){
        {DLPACK_MAJOR, DLPACK_MINOR}, result, free_result, 0,
        {*numbers, DLPACK_CPU, 0, (int32_t)slot->ndim, DLPACK_FLOAT, (uint8_t)(8 * real), 1, result->shape, result->strides, 0},
    };
    for (int axis = 0; axis < slot->ndim; axis++) result->shape[axis] = shape[axis], result->strides[axis] = strides[axis];
    void *tensor = NULL;
    int is_freed = 0;
    result->is_freed = &is_freed;
    if (!bound->functions->import_tensor(&result->managed, &tensor)) {
        result->is_freed = NULL;
        return tensor;
    }
    if (!is_freed) free(result); /* a failed import may have freed it, or not */
    return NULL;
}

/* Whether an input is a dense tensor in main memory, of the program's numbers and of a shape that fits. */
static int is_plain(const Bound *bound, const Slot *slot, PyObject *input, int64_t *rows, void **numbers) {
    static PyObject *is_neg;
    DlpackTensor t;
    if (slot->ndim == 0) return input == Py_None;
    if ((PyObject *)Py_TYPE(input) != bound->tensor || bound->functions->describe(input, &t)) return 0;
    const int is_of_kind = t.device_type == DLPACK_CPU && t.code == DLPACK_FLOAT && t.lanes == 1 &&
                           t.bits == (bound->program->is_double ? 64 : 32) && t.ndim == slot->ndim;
    if (!is_of_kind) return 0;
    int64_t count = 1;
    for (int axis = t.ndim - 1; axis >= 0; axis--) {
        if (slot->shape[axis] == OF_ROWS && *rows < 0) *rows = t.shape[axis];
        const int64_t extent = slot->shape[axis] == OF_ROWS ? *rows : slot->shape[axis];
        if (t.shape[axis] != extent || (extent != 1 && t.strides[axis] != count)) return 0;
        count *= extent;
    }
    /* A lazily negated tensor has the numbers of another one. */
    if (!is_neg && !(is_neg = PyUnicode_InternFromString("is_neg"))) return 0;
    PyObject *found = PyObject_CallMethodObjArgs(input, is_neg, NULL);
    Py_XDECREF(found);
    *numbers = (char *)t.data + t.offset;
    return found == Py_False;
}

/* bound(x, weights, directions): the results by name, or None if the inputs are not plain or have more rows. */
static PyObject *call(PyObject *self, PyObject *const *inputs, Py_ssize_t count) {
    const Bound *bound = PyCapsule_GetPointer(self, "bound");
    if (!bound) return NULL;
    if (count != bound->inputs) return PyErr_Format(PyExc_TypeError, "expected %d inputs", (int)bound->inputs);
    void *arrays[MOST_INPUTS + MOST_RESULTS] = {0}, *numbers = NULL;
    int64_t rows = -1;
    for (I i = 0; i < bound->inputs; i++) {
        const Slot *slot = &bound->input[i];
        if (!is_plain(bound, slot, inputs[i], &rows, &numbers)) {
            PyErr_Clear(); /* of a tensor without memory; the caller reports it */
            Py_RETURN_NONE;
        }
        if (slot->external != UNREAD) arrays[slot->external] = numbers;
    }
    if (rows > bound->most_rows) Py_RETURN_NONE;
    PyObject *results = PyDict_New();
    for (I i = 0; results && i < bound->results; i++) {
        PyObject *tensor = new_result(bound, &bound->result[i], rows, &numbers);
        if (!tensor || PyDict_SetItem(results, PyTuple_GetItem(bound->names, i), tensor)) {
            Py_DECREF(results);
            results = NULL;
        } else if (bound->result[i].external != UNREAD) arrays[bound->result[i].external] = numbers;
        Py_XDECREF(tensor);
    }
    if (!results) return NULL;
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = hessquik_run(bound->program, bound->constants, arrays, 0, rows);
    Py_END_ALLOW_THREADS
    if (!failed) return results;
    Py_DECREF(results);
    return PyErr_NoMemory();
}

static void free_bound(PyObject *capsule) {
    Bound *bound = PyCapsule_GetPointer(capsule, "bound");
    if (bound) Py_DECREF(bound->arguments);
    PyMem_Free(bound);
}

/* The slots in an object of bytes, and their number; null with an error set if one does not fit the program. */
static const Slot *read_slots(const Program *program, PyObject *bytes, I most, I *count) {
    const Slot *slots = (const Slot *)PyBytes_AsString(bytes);
    if (!slots) return NULL;
    *count = PyBytes_Size(bytes) / (Py_ssize_t)sizeof(Slot);
    int fits = *count <= most;
    for (I i = 0; fits && i < *count; i++)
        fits = slots[i].ndim >= 0 && slots[i].ndim <= MOST_AXES && slots[i].external >= UNREAD &&
               slots[i].external < program->arrays;
    return fits ? slots : (void *)PyErr_Format(PyExc_ValueError, "expected at most %d arrays of the program", (int)most);
}

static PyMethodDef method = {
    "bound", (PyCFunction)(void (*)(void))call, METH_FASTCALL,
    "bound(x, weights, directions)\n--\n\nReturn the results by name, or None if the inputs are not plain or have "
    "more rows."};

PyObject *hessquik_bind(PyObject *module, PyObject *arguments) {
    (void)module;
    Bound given = {.arguments = arguments};
    PyObject *owner, *words, *addresses, *inputs, *results;
    long long most_rows;
    if (!PyArg_ParseTuple(arguments, "OOOOLOO!O", &owner, &words, &addresses, &given.tensor, &most_rows, &inputs,
                          &PyTuple_Type, &given.names, &results) ||
        !(given.program = hessquik_program(words)) ||
        !(given.constants = hessquik_addresses(addresses, given.program->constants)) ||
        !(given.input = read_slots(given.program, inputs, MOST_INPUTS, &given.inputs)) ||
        !(given.result = read_slots(given.program, results, MOST_RESULTS, &given.results)))
        return NULL;
    given.most_rows = most_rows;
    PyObject *capsule = PyObject_GetAttrString(given.tensor, "__dlpack_c_exchange_api__");
    given.functions = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : NULL;
    Py_XDECREF(capsule); /* the functions live as long as torch */
    if (!given.functions) return NULL;
    if (given.functions->version.major != DLPACK_MAJOR || !given.functions->describe ||
        given.results != PyTuple_Size(given.names) || given.program->arrays > MOST_INPUTS + MOST_RESULTS)
        return PyErr_Format(PyExc_ValueError, "expected version 1 of DLPack, and a name for each result");
    Bound *bound = PyMem_Malloc(sizeof(Bound));
    PyObject *held = bound ? PyCapsule_New(bound, "bound", free_bound) : NULL;
    if (!held) {
        PyMem_Free(bound);
        return PyErr_NoMemory();
    }
    *bound = given;
    Py_INCREF(arguments);
    PyObject *function = PyCFunction_New(&method, held);
    Py_DECREF(held);
    return function;
}
