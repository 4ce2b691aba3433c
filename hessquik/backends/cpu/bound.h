/* Programs as functions of tensors, for calls with few rows. */

#ifndef HESSQUIK_BOUND_H
#define HESSQUIK_BOUND_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "program.h"

/* The program in an object of bytes, and the addresses in one; null with an error set if they are not there. */
const Program *hessquik_program(PyObject *words);
void *const *hessquik_addresses(PyObject *bytes, I count);

/* bind(owner, program, constants, tensor, most_rows, inputs, names, results): a function of x, weights and directions,
 * all of the class `tensor` or None, that returns a dictionary of new tensors, or None where the inputs are not plain.
 * `owner` keeps the program's constants. Inputs and results are bytes, a Slot each; `names` are those of the results. */
PyObject *hessquik_bind(PyObject *module, PyObject *arguments);

#endif
