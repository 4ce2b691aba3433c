"""Triton's interpreter with a GPU's order of summation: import this before ``hessquik.backends.triton``.

The interpreter multiplies matrices by NumPy, whose order of summation depends on the shape; a GPU sums over ascending
indices.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest

triton = pytest.importorskip("triton")
from triton.runtime import interpreter  # noqa: E402


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
    assert input_precision.name == "IEEE"
    total = d.data.copy()
    for k in range(a.data.shape[-1]):
        total += a.data[..., :, k : k + 1] * b.data[..., k : k + 1, :]
    return interpreter.TensorHandle(total, d.dtype.scalar)


interpreter.InterpreterBuilder.create_dot = _dot
np.seterr(all="ignore")
