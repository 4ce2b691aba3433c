/* Programs as functions of tensors, for calls with few rows. */

#ifndef HESSQUIK_BOUND_H
#define HESSQUIK_BOUND_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "program.h"

/* The program and the addresses of its constants in two objects of bytes; null with an error set if they are not. */
const Program *hessquik_program(PyObject *words, PyObject *addresses, void *const **constants);

/* bind(owner, program, constants, tensor, most_rows, inputs, results): a function of x, weights and directions, all of the class
 * `tensor` or None, that returns a dictionary of new tensors, or None where the inputs are not plain. `owner` keeps the
 * program's constants. Inputs are (index, shape), results (name, (index, shape)); an index is that of the program's array,
 * or -1 if it has none; an extent of -1 is the number of rows. */
PyObject *hessquik_bind(PyObject *module, PyObject *arguments);

#endif
