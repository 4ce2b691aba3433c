"""Networks of torch, ONNX and scikit-learn as networks of ours, with exact derivatives or not at all.

Each reader makes a graph of the source (:mod:`hessquik.importing.graph`); one lowering makes layers of it
(:mod:`hessquik.importing.lowering`). What is read is data: no pickle is opened and nothing of a file is run.
"""

from hessquik.importing.onnx_model import from_onnx
from hessquik.importing.sklearn_estimator import from_sklearn
from hessquik.importing.torch_module import from_torch

__all__ = ["from_onnx", "from_sklearn", "from_torch"]
