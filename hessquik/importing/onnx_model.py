"""Models in ONNX files, as torch, Keras, JAX and scikit-learn export them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hessquik.errors import FormatError, ShapeError, UnsupportedError
from hessquik.importing.onnx_node import graphs_in
from hessquik.importing.onnx_reader import Signature, expect_known, expect_size, read, signature
from hessquik.importing.scaling import Scaling
from hessquik.importing.source import BOUNDS, Imported, Source, by_rows, import_source
from hessquik.networks import NN

__all__ = ["from_onnx", "import_model"]

MAX_FILE_BYTES = 1 << 30
#: Nodes of a model with its functions written out.
MAX_NODES = 1 << 16
#: Of the error function in the reference implementation, which is a short series.
REFERENCE_PRECISION = 1e-6
#: Relative precision of operators in models of float64, where onnxruntime has their constants or sums in float32.
PRECISIONS = {
    **dict.fromkeys(("DequantizeLinear", "Gelu", "HardSigmoid", "HardSwish", "Shrink", "ThresholdedRelu"), 1e-6),
    **dict.fromkeys(("GroupNormalization", "LayerNormalization", "RMSNormalization"), BOUNDS[torch.float32]),
}


def from_onnx(
    path_or_model: Any,
    example_input: Any = None,
    *,
    allow_kinks: bool = False,
    dtype: torch.dtype | None = None,
    bounds: tuple[Sequence[float], Sequence[float]] | None = None,
    **scaling: Any,
) -> NN:
    """Return an ONNX model as a network with exact derivatives.

    The values are compared with those of onnxruntime, or of the standard's reference implementation where onnxruntime
    is not installed, before the network is returned.

    Args:
        path_or_model: A file, or an ``onnx.ModelProto``.
        example_input: A point (d,) or points (n, d); only needed where the model leaves the number of inputs open.
        allow_kinks: See :func:`hessquik.from_torch`.
        dtype: Of the weights. If not given, that of the model's input, or float64 where float32 would lose digits.
        bounds: See :func:`hessquik.from_torch`.
        scaling: See :func:`hessquik.from_torch`.

    Raises:
        FormatError: the file is not an ONNX model.
        UnsupportedError: the model cannot be exact here, and the message names the node; or onnx is not installed.
        ShapeError: a scaling, the bounds or the example do not fit.
    """
    return import_model(path_or_model, example_input, Scaling.of(scaling), allow_kinks, dtype, bounds).network


def import_model(
    path_or_model: Any,
    example_input: Any,
    scaling: Scaling,
    allow_kinks: bool = False,
    dtype: torch.dtype | None = None,
    bounds: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Imported:
    """Import a model as :func:`from_onnx` does; return the network with the comparison of its values."""
    model = _load(path_or_model)
    d = None if example_input is None else _inputs(example_input)
    what = signature(model, d)
    expect_known(model, what)
    expect_size(what)
    runtime, run = _runtime(model)

    def evaluate(x: Tensor) -> Tensor:
        try:
            result = run(what, x.reshape(-1, *what.shape[1:]).numpy())
            if len(result) != len(x):
                raise ValueError(f"it gives {len(result)} rows")
        except UnsupportedError:
            raise
        except Exception as error:  # onnxruntime has classes of its own for each kind of error
            reason = next(iter(str(error).splitlines()), "")[:200]
            raise UnsupportedError(
                f"{runtime} cannot compute the model for {len(x)} points ({reason}); export it with a number of "
                "points that is either free or fixed throughout"
            ) from None
        return torch.as_tensor(result).reshape(len(x), -1)

    at_all = evaluate if what.takes_any_rows else by_rows(evaluate, what.shape[0])
    precision = _precision(model, runtime)
    source = Source(what.width, what.dtype, runtime, lambda point: read(model, what, point), at_all, precision)
    return import_source(source, scaling, allow_kinks, dtype, bounds)


def _inputs(example_input: Any) -> int:
    """Return the number of inputs of a point, or of points.

    Raises:
        ShapeError: it is neither.
    """
    try:
        points = torch.as_tensor(example_input)
    except (TypeError, ValueError, RuntimeError):
        points = torch.tensor(0.0)
    if points.ndim not in {1, 2}:
        raise ShapeError("example_input must be a point (d,) or points (n, d) of numbers")
    return int(points.shape[-1])


def _load(path_or_model: Any) -> Any:
    """Return the model with its functions written out."""
    try:
        import onnx
    except ImportError:
        raise UnsupportedError(
            "ONNX models need the package onnx; pip install 'hessquik-service[server,onnx]'"
        ) from None
    model = path_or_model
    if isinstance(path_or_model, str | Path):
        path = Path(path_or_model)
        if path.stat().st_size > MAX_FILE_BYTES:
            raise FormatError(f"{path.name}: the file must have at most {MAX_FILE_BYTES} bytes")
        try:
            model = onnx.load(path, load_external_data=False)
        except OSError:
            raise
        except Exception as error:  # any error that a damaged file causes
            raise FormatError(f"{path.name}: the file must be an ONNX model ({str(error)[:100]})") from None
        _load_weights(model, path)
    if not isinstance(model, onnx.ModelProto) or not model.graph.node:
        raise FormatError("the model must be an ONNX model with at least one node")
    model = _inlined(model) if model.functions else model
    return _with_one_name(model) if any(each.domain == "ai.onnx" for each in model.opset_import) else model


def _inlined(model: Any) -> Any:
    """Return the model with its functions written out.

    Raises:
        FormatError: they call each other in a circle, or are too many nodes.
    """
    from onnx import inliner

    functions = {(each.domain, each.name): graphs_in(each) for each in model.functions}
    sizes = dict.fromkeys(functions, 0)
    for _ in functions:  # after k rounds, calls to a depth of k are counted
        before, sizes = sizes, {name: _count(graphs, sizes) for name, graphs in functions.items()}
        if sizes == before:
            break
    if _count(graphs_in(model.graph), sizes) > MAX_NODES:
        raise FormatError(f"the model must have at most {MAX_NODES} nodes with its functions written out, got more")
    try:
        return inliner.inline_local_functions(model)
    except Exception as error:  # any error that a damaged model causes
        raise FormatError(f"the model's functions must be those of an ONNX model ({str(error)[:200]})") from None


def _count(graphs: Sequence[Any], sizes: Mapping[tuple[str, str], int]) -> int:
    """Return the number of nodes, given those of functions; beyond the bound it need not be exact."""
    size = sum(1 + sizes.get((node.domain, node.op_type), 0) for graph in graphs for node in graph.node)
    return min(size, 2 * MAX_NODES)


def _with_one_name(model: Any) -> Any:
    """Return a copy of a model in which the standard's operators are of the domain "", which is "ai.onnx" as well."""
    found = type(model)()
    found.CopyFrom(model)
    for each in found.opset_import:
        each.domain = "" if each.domain == "ai.onnx" else each.domain
    return found


def _load_weights(model: Any, path: Path) -> None:
    """Load weights that an exporter put into files beside the model's.

    Raises:
        FormatError: they are too large, or not in regular files below that folder.
    """
    from onnx import external_data_helper as external

    graphs = [part for each in (model.graph, *model.functions) for part in graphs_in(each)]
    tensors = [attribute.t for graph in graphs for node in graph.node for attribute in node.attribute]
    tensors += [tensor for graph in graphs for tensor in getattr(graph, "initializer", ())]  # functions have none
    tensors = [tensor for tensor in tensors if external.uses_external_data(tensor)]
    try:
        size = sum(_size_beside(external.ExternalDataInfo(tensor), path.parent) for tensor in tensors)
        if size > MAX_FILE_BYTES:
            raise FormatError(f"{path.name}: the weights beside the file must have at most {MAX_FILE_BYTES} bytes")
        for tensor in tensors:
            external.load_external_data_for_tensor(tensor, str(path.parent))
    except (OSError, FormatError):
        raise
    except Exception as error:  # it has classes of its own
        raise FormatError(
            f"{path.name}: the weights beside the file must be in regular files in its folder ({str(error)[:300]})"
        ) from None


def _size_beside(info: Any, folder: Path) -> int:
    """Return the number of bytes of a tensor that is in another file."""
    file = folder / info.location
    return int(info.length) if info.length is not None else file.stat().st_size if file.is_file() else 0


def _runtime(model: Any) -> tuple[str, Callable[[Signature, Any], Any]]:
    """Return the name of the runtime of the source, and a function that evaluates the model with it."""
    try:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # some round weights
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, ["CPUExecutionProvider"], enable_fallback=0
        )
        return "onnxruntime", lambda what, x: session.run([what.output], {what.input: x})[0]
    except Exception:  # it is not there, or lacks an operator in this dtype
        from onnx.reference import ReferenceEvaluator

        return "onnx's reference implementation", lambda what, x: _by_reference(ReferenceEvaluator, model, what, x)


def _precision(model: Any, runtime: str) -> float:
    """Return the relative precision of a runtime's values in a model of float64."""
    import onnx

    found = 0.0 if runtime == "onnxruntime" else REFERENCE_PRECISION
    for node in (node for graph in graphs_in(model.graph) for node in graph.node):
        found = max(found, PRECISIONS.get(node.op_type, 0.0))
        if node.op_type == "Cast" and any(
            each.i == onnx.TensorProto.FLOAT for each in node.attribute if each.name == "to"
        ):
            found = max(found, BOUNDS[torch.float32])  # as torch exports what the standard has in float32 alone
    return found


def _by_reference(evaluator: Any, model: Any, what: Signature, x: Any) -> Any:
    try:
        return evaluator(model, new_ops=[_batch_norm()]).run([what.output], {what.input: x})[0]
    except Exception as error:  # an operator that it lacks; what can be imported has none of these
        raise UnsupportedError(f"the model cannot be computed by onnx's reference ({str(error)[:200]})") from None


def _batch_norm() -> type:
    """Return the operator in evaluation mode; onnx's reference takes the batch's own moments before version 14."""
    from onnx.reference.op_run import OpRun

    class BatchNormalization(OpRun):
        op_domain = ""

        def _run(self, x: Any, *numbers: Any, epsilon: float = 1e-5, spatial: int = 1, **_: Any) -> tuple[Any]:
            channels = (-1, *(1,) * (x.ndim - 2)) if spatial is None or spatial else x.shape[1:]
            scale, offset, mean, var = (each.reshape(channels) for each in numbers)
            return (((x - mean) / (var + epsilon) ** 0.5 * scale + offset).astype(x.dtype),)

    return BatchNormalization
