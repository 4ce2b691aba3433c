"""Models that others wrote: all ONNX files in the packages onnx and onnxruntime, each imported or refused by name.

onnx ships its tests' models, among them torch's own operators and modules as torch exported them years ago
(``backend/test/data``: pytorch-converted, pytorch-operator, simple, light), with inputs and outputs where they are
small; onnxruntime ships ``datasets/{logreg_iris,mul_1,sigmoid}.onnx``.
"""

import re
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, NotImplemented

import hessquik
from hessquik.errors import UnsupportedError
from tests.importing.comparison import error

ROOTS = (Path(onnx.__file__).parent / "backend" / "test" / "data", Path(onnxruntime.__file__).parent / "datasets")
FILES = {
    re.sub(r"(/model)?\.onnx$", "", str(path.relative_to(root))): path
    for root in ROOTS
    for path in sorted(root.rglob("*.onnx"))
}
#: Files of float32.
CLOSE = 1e-6

#: Imported as they are.
SMOOTH = {
    "pytorch-converted/test_": "BatchNorm1d_3d_input_eval BatchNorm2d_eval BatchNorm2d_momentum_eval "
    "BatchNorm3d_eval BatchNorm3d_momentum_eval ConstantPad2d GLU GLU_dim Linear Linear_no_bias PixelShuffle "
    "ReflectionPad2d ReplicationPad2d Sigmoid Softplus Softsign Tanh ZeroPad2d",
    "pytorch-operator/test_operator_": "addconstant exp flatten index pad permute2 reduced_mean reduced_mean_keepdim "
    "reduced_sum reduced_sum_keepdim repeat repeat_dim_overflow",
    "": "sigmoid",
}
#: Imported with allow_kinks alone.
KINKED = {
    "pytorch-converted/test_": "ELU LeakyReLU LeakyReLU_with_negval PReLU_1d PReLU_1d_multiparam PReLU_2d "
    "PReLU_2d_multiparam PReLU_3d PReLU_3d_multiparam ReLU SELU",
    "pytorch-operator/test_operator_": "clip selu",
    "simple/": "test_single_relu_model",
}
#: Imported, but not here: it normalises 10,240 features, so that its matrices take gigabytes.
LARGE = "pytorch-operator/test_operator_symbolic_override"
#: Refusals of the others: words of the message, and their number.
REFUSED = {
    r"node \w+ \(Conv\) is a convolution, .*; use MatMul": 36,
    r"node \w+ \(ConvTranspose\) is a convolution, .*; use MatMul": 3,
    r"node \w+ \(AveragePool\) is a pooling over places, .*; use MatMul": 7,
    r"node \w+ \(MaxPool\) takes a maximum over features, .*; use a smooth function": 9,
    r"node \w+ \((Log)?Softmax\) sums exponentials of the features, .* kinks; return the values before it": 7,
    r"node \w+ \(SplitToSequence\) is not among the operators .*; write it with those": 2,
    r"node \w+ \(Mul\) multiplies every row by another constant; multiply all rows by the same": 2,
    r"node \w+ \(Add\) adds another constant to every row; add the same constant to all rows": 1,
    r"input \w+ must hold real numbers, .*, got (INT64|STRING)": 9,
    r"input \w+ must have the shape \(n, d\), .*, got \[\d\]; export the model with an axis of rows": 3,
    r"must have one (input|output), an array .*, got [23] \(.*\); export it with one": 26,
    r"gives NaN or infinity at points .*; pass bounds": 1,
}


def listed(table):
    return [f"{folder}{name}" for folder, names in table.items() for name in names.split()]


@cache
def first_words(name):
    """Return the message with which a file is refused, or an empty string."""
    try:
        hessquik.from_onnx(FILES[name])
    except UnsupportedError as refusal:
        return str(refusal)
    return ""


def compare(name, network):
    """Compare with a runtime, and with the outputs that are stored with the file."""
    model = onnx.load(FILES[name])
    taken = model.graph.input[0]
    kind = taken.type.tensor_type
    x = np.random.default_rng(0).normal(size=[size.dim_value or 3 for size in kind.shape.dim])
    x = x.astype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    close(network, x, computed(model, {taken.name: x}))
    folder = FILES[name].parent / "test_data_set_0"
    if folder.is_dir():
        x, y = (numpy_helper.to_array(onnx.load_tensor(folder / f"{side}_0.pb")) for side in ("input", "output"))
        close(network, x, y)


def close(network, x, y):
    x, y = (torch.tensor(array).reshape(len(x), -1) for array in (x, y))
    assert error(network(x)[0].detach(), y) <= CLOSE


def computed(model, feeds):
    """Return the outputs by onnxruntime, or by the standard's reference for operators of versions that it lacks."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        data = model.SerializeToString()
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    except (NotImplemented, Fail):
        return ReferenceEvaluator(model).run(None, feeds)[0]


def test_smooth_models_have_the_values_of_their_authors():
    for name in listed(SMOOTH):
        compare(name, hessquik.from_onnx(FILES[name]))


def test_models_with_kinks_are_refused_unless_these_are_allowed():
    for name in listed(KINKED):
        assert re.search(
            r"node \w+ \(\w+\) is linear in pieces or has a kink .*allow_kinks=True", first_words(name)
        ), name
        compare(name, hessquik.from_onnx(FILES[name], allow_kinks=True))


def test_a_model_that_is_defined_on_a_half_line():
    name = "pytorch-operator/test_operator_sqrt"
    with pytest.raises(UnsupportedError, match="pass bounds"):
        hessquik.from_onnx(FILES[name])
    network = hessquik.from_onnx(FILES[name], bounds=([0.5] * 4, [2.0] * 4))
    x = torch.rand(3, 4) + 0.5
    assert error(network(x)[0].detach(), x.sqrt()) <= CLOSE


def test_all_other_models_are_refused_with_a_reason():
    others = sorted(FILES.keys() - {*listed(SMOOTH), *listed(KINKED), LARGE})
    counted = Counter()
    for name in others:
        message = first_words(name)
        reasons = [pattern for pattern in REFUSED if re.search(pattern, message)]
        assert len(reasons) == 1, (name, message)
        counted[reasons[0]] += 1
    assert counted == REFUSED
