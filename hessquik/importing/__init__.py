"""Import of networks of torch, ONNX and scikit-learn, with exact derivatives; others are refused.

A reader per library builds a graph of the source (:mod:`hessquik.importing.graph`), which is lowered to layers
(:mod:`hessquik.importing.lowering`). Files are read as data: no pickle is opened and no code of a file is run.
"""

from hessquik.importing.onnx_model import from_onnx
from hessquik.importing.sklearn_estimator import from_sklearn
from hessquik.importing.torch_module import from_torch

__all__ = ["from_onnx", "from_sklearn", "from_torch"]
