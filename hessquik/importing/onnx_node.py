"""One node of an ONNX graph; onnx's reference evaluates it where it depends on constants alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessquik.errors import UnsupportedError
from hessquik.importing.graph import refuse
from hessquik.importing.interpreting import as_float64
from hessquik.importing.onnx_operations import RANDOM, REFUSED

__all__ = ["Call", "as_tensor", "graphs_in", "unknown"]

#: Operators that the reference implementation computes to few digits.
_PRECISE: dict[str, Callable[..., Tensor]] = {"Erf": torch.erf, "Gelu": torch.nn.functional.gelu}


class Call:
    """One node of a graph.

    Attributes:
        attributes: Values by name; a graph for a branch.
        operator: Name of the operator; with its domain if it is none of the standard's.
        version: Of the operators of its domain.
        place: Name for messages.
    """

    def __init__(self, node: Any, number: int, opsets: Sequence[Any]) -> None:
        """Keep the node and the versions of the operators."""
        import onnx

        self.node, self.opsets = node, opsets
        name, kind, domain = map(_text, (node.name, node.op_type, node.domain))
        self.domain: str = "" if domain == "ai.onnx" else domain
        self.attributes: Mapping[str, Any] = {
            each.name: _text(onnx.helper.get_attribute_value(each)) for each in node.attribute
        }
        self.is_standard = not self.domain or self.domain.startswith("ai.onnx.")
        self.operator: str = kind if self.is_standard else f"{domain}.{kind}"
        self.version = next((each.version for each in opsets if each.domain == self.domain), 1)
        self.place = f"{name or number} ({domain + '.' if domain else ''}{kind})"
        self._run: Callable[..., Any] | None = None

    def compute(self, *args: Any) -> Any:
        """Evaluate the node on tensors, with the reference implementation of the standard."""
        import onnx
        from onnx.reference import ReferenceEvaluator

        if not self.is_standard or self.operator in {"If", "Loop", "Scan", *RANDOM}:
            raise unknown(self)
        if self.operator in _PRECISE:
            return _PRECISE[self.operator](*args, **self.attributes)
        names = [f"{i}" if name else "" for i, name in enumerate(self.node.input)]  # a value may be taken twice
        if self._run is None:
            node = onnx.NodeProto()
            node.CopyFrom(self.node)
            node.domain = self.domain
            node.input[:] = names
            inputs = [onnx.ValueInfoProto(name=name) for name in names if name]
            node.output[:] = [f"result {i}" for i in range(len(node.output))]  # some may have no name
            outputs = [onnx.ValueInfoProto(name=name) for name in node.output]
            graph = onnx.helper.make_graph([node], "node", inputs, outputs)
            self._run = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=self.opsets)).run
        feeds = {name: arg.numpy() for name, arg in zip(names, args, strict=True) if name and arg is not None}
        results = [as_float64(as_tensor(np.asarray(result))) for result in self._run(None, feeds)]
        return results[0] if len(results) == 1 else results


def as_tensor(array: Any) -> Tensor:
    """Return a copy of an array; bfloat16 and types of 8 bits or fewer, which numpy itself lacks, become wider."""
    if array.dtype.isbuiltin != 1:
        array = array.astype(np.int8 if "int" in array.dtype.name else np.float64)
    return torch.as_tensor(array.copy())


def graphs_in(graph: Any) -> list[Any]:
    """Return a graph or a function, and the branches and bodies inside its nodes."""
    inner = (each.g for node in graph.node for each in node.attribute if each.HasField("g"))
    return [graph, *(part for each in inner for part in graphs_in(each))]


def _text(value: Any) -> Any:
    """Return text that protobuf gives as bytes, as it does where they are not UTF-8; keep other values."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def unknown(call: Call) -> UnsupportedError:
    """Return the error for an operator that cannot be exact."""
    if call.operator in REFUSED:
        return refuse(call.place, *REFUSED[call.operator])
    if call.domain.startswith("com.microsoft"):
        return refuse(
            call.place,
            "is an operator of onnxruntime's own, as its optimiser writes them",
            "import the model as it was before onnxruntime optimised it",
        )
    if not call.is_standard:
        return refuse(call.place, "is an operator of your own", "write it with the standard's operators")
    return refuse(
        call.place,
        "is not among the operators that can be exact here",
        "write it with those that the table of supported operations lists",
    )
