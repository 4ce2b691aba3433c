"""Capture of torch modules with ``torch.export``."""

from __future__ import annotations

import io
import itertools
import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hessquik.errors import UnsupportedError
from hessquik.importing.torch_reader import COLLECT, Call, Program, Ref

__all__ = ["capture", "example_of", "one_input", "one_output"]

#: Rows of the points that a module is captured with; an axis of another length is one of features.
ROWS = 7
#: Functions in programs that differentiate by torch.func.
DERIVATIVES = {"_jvp_increment_nesting", "_grad_increment_nesting"}
#: Parts of torch's messages about programs that use values outside of their graph.
OUTSIDE = ("fake tensor in the exported program constant's list", "'Tensor' object has no attribute 'constant'")


def example_of(module: nn.Module, example_input: Any) -> Tensor:
    """Return :data:`ROWS` equal points to capture a module with, on the CPU and in the dtype of its weights.

    Args:
        module: The module.
        example_input: One point (d,) or several (n, d); if ``None``, a layer of the module must have ``in_features``
            or ``num_features``, and the points are zeros of that width.

    Raises:
        UnsupportedError: no layer has a number of inputs, the points are not one tensor of real numbers, or the
            module has no numbers that can be read, as quantized, lazy and TorchScript modules have none.
    """
    if not isinstance(module, nn.Module):
        raise UnsupportedError(
            f"the module must be a torch.nn.Module, got {type(module).__name__}; call it in the forward of one"
        )
    for name, part in module.named_modules():
        is_quantized = ".quantized." in type(part).__module__
        if is_quantized or isinstance(part, torch.jit.ScriptModule):
            does = "is quantized, so that it rounds values" if is_quantized else "is TorchScript"
            raise UnsupportedError(
                f"{name or 'the module'} ({type(part).__name__}) {does}; import the module that it was made from"
            )
    for name, tensor in _tensors(module):
        _expect_numbers(name, tensor)
    points = None if example_input is None else _points_of(module, example_input)
    weights = (part.dtype for _, part in _tensors(module) if part.is_floating_point())
    dtype = next(weights, torch.get_default_dtype() if points is None else points.dtype)
    if dtype not in {torch.float32, torch.float64}:
        raise UnsupportedError(
            f"the module computes in {dtype}, which has too few digits for derivatives; call module.float() or "
            "module.double() before"
        )
    if points is None:
        for part in module.modules():
            width = getattr(part, "in_features", getattr(part, "num_features", None))
            if isinstance(width, int):
                return torch.zeros(ROWS, width, dtype=dtype)
        raise UnsupportedError(
            f"{type(module).__name__} has no layer that tells the number of inputs; pass example_input, one point "
            "(d,) or several (n, d)"
        )
    point = points.detach().to("cpu", dtype)
    point = point if point.ndim == 1 else point[0]
    return point.expand(ROWS, *point.shape).clone()


def _points_of(module: nn.Module, example_input: Any) -> Tensor:
    """Return the example as a tensor of one point or several."""
    if isinstance(example_input, tuple | list) and any(isinstance(part, Tensor) for part in example_input):
        if len(example_input) > 1:
            raise UnsupportedError(
                f"{type(module).__name__} takes {len(example_input)} inputs; wrap it in a module that takes one "
                "tensor (n, d) and splits it"
            )
        (example_input,) = example_input
    try:
        points = torch.as_tensor(example_input)
    except (TypeError, ValueError, RuntimeError):
        points = torch.zeros(())
    if not points.ndim or 0 in points.shape or points.layout is not torch.strided or points.is_meta:
        raise UnsupportedError(
            f"example_input must be one point (d,) or several (n, d), got {example_input!r:.60}".replace("\n", " ")
        )
    if not points.is_floating_point():
        raise UnsupportedError(
            f"example_input must hold real numbers such as 0.5, since only these have derivatives, got {points.dtype}"
        )
    return points


def _expect_numbers(name: str, tensor: Tensor) -> None:
    """Refuse a parameter or buffer that has no numbers, or not on the CPU."""
    if nn.parameter.is_lazy(tensor):
        raise UnsupportedError(f"{name} has no shape yet; call the module on points first")
    if tensor.device.type != "cpu":
        raise UnsupportedError(
            f"{name} is on the device {tensor.device}; call module.cpu() before"
            + (", and load_state_dict, since there are no numbers on this device" if tensor.is_meta else "")
        )
    if 0 in tensor.shape and isinstance(tensor, nn.Parameter):
        raise UnsupportedError(
            f"parameter {name} has no numbers, but the shape {tuple(tensor.shape)}; take out layers of width 0"
        )


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return parameters and buffers with their names."""
    return itertools.chain(module.named_parameters(), module.named_buffers())


def capture(module: nn.Module, example: Tensor, is_guess: bool = False) -> Program:
    """Capture a module as a program of calls of ATen operators.

    Args:
        module: The module.
        example: Points to capture it with.
        is_guess: Whether the number of inputs is that of a layer, which need not be the first one.

    Raises:
        UnsupportedError: the module cannot be captured; the message names the line of its code.
    """
    try:
        with _silence(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(module, (example,))
            called = {getattr(node.target, "__name__", "") for node in exported.graph.nodes}
            if "_add_batch_dim" in called and called.isdisjoint(DERIVATIVES):
                exported = exported.run_decompositions({})  # calls of torch.func.vmap become those of its operators
    except Exception as error:  # any error that the module's code causes
        guess = (
            f"; it was tried with {example.shape[1]} inputs, as a layer has; pass example_input, one point (d,), if "
            "it takes others"
        )
        raise UnsupportedError(_fault(module, error) + (guess if is_guess else "")) from None
    return _program(exported)


@contextmanager
def _silence() -> Iterator[None]:
    """Keep torch from logging and printing the traces of what is refused with a message of its own."""

    def refuse_all(record: logging.LogRecord) -> bool:
        return False

    loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.startswith("torch")]
    for logger in loggers:
        logger.addFilter(refuse_all)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(refuse_all)


def _program(exported: Any) -> Program:
    """Convert a program of ``torch.export``."""
    signature, graph = exported.graph_signature, exported.graph
    names = {
        **{name: exported.state_dict[target] for name, target in signature.inputs_to_parameters.items()},
        **{
            name: exported.state_dict.get(target, exported.constants.get(target))
            for name, target in signature.inputs_to_buffers.items()
        },
        **{name: exported.constants[t] for name, t in signature.inputs_to_lifted_tensor_constants.items()},
    }
    titles = {
        **{name: f"parameter {target}" for name, target in signature.inputs_to_parameters.items()},
        **{name: f"buffer {target}" for name, target in signature.inputs_to_buffers.items()},
    }
    one_input(signature.user_inputs)
    one_output(signature.user_outputs)
    calls = [call for node in graph.nodes if node.op == "call_function" for call in _calls(node)]
    source = next(node for node in graph.nodes if node.name == signature.user_inputs[0])
    example = source.meta["val"]
    return Program(
        source.name,
        tuple(map(int, example.shape)),
        example.dtype,
        names,
        calls,
        signature.user_outputs[0],
        titles=titles,
    )


def _calls(node: torch.fx.Node) -> list[Call]:
    """Return a node as calls: one, or those of the program within torch.no_grad that it runs."""
    if getattr(node.target, "__name__", "") != "wrap_with_set_grad_enabled":
        kwargs = {key: _plain(value) for key, value in node.kwargs.items()}
        return [Call(_target(node.target), _plain(node.args), kwargs, (node.name,), _place(node))]
    is_enabled, part, *arguments = node.args
    graph = getattr(node.graph.owning_module, str(part.target)).graph  # type: ignore[union-attr]
    return _inlined(node.name, graph, arguments, "alias" if is_enabled else "detach")


def _inlined(prefix: str, graph: torch.fx.Graph, arguments: Any, entry: str) -> list[Call]:
    """Return the calls of a program that another one runs, with its arguments passed through an operator."""

    def renamed(argument: Any) -> Any:
        if isinstance(argument, Ref):
            return Ref(f"{prefix}.{argument.name}")
        return type(argument)(map(renamed, argument)) if isinstance(argument, list | tuple) else argument

    placeholders = (node for node in graph.nodes if node.op == "placeholder")
    calls = [
        Call(f"aten.{entry}.default", (_plain(argument),), {}, (f"{prefix}.{node.name}",), _place(node))
        for node, argument in zip(placeholders, arguments, strict=True)
    ]
    for node in graph.nodes:
        if node.op == "call_function":
            for call in _calls(node):
                kwargs = {key: renamed(value) for key, value in call.kwargs.items()}
                outputs = tuple(f"{prefix}.{name}" for name in call.outputs)
                calls.append(Call(call.target, renamed(call.args), kwargs, outputs, call.place))
        elif node.op == "output":
            calls.append(Call(COLLECT, (renamed(_plain(node.args[0])),), {}, (prefix,), ""))
    return calls


def one_input(names: Any) -> None:
    """Check that a program takes exactly one tensor.

    Raises:
        UnsupportedError: the program has another number of inputs, or its input is not a tensor.
    """
    _expect_one(names, "takes {} inputs", "takes one tensor (n, d) and splits it")


def one_output(names: Any) -> None:
    """Check that a program returns exactly one tensor.

    Raises:
        UnsupportedError: the program returns another number of values, or a value that is not a tensor.
    """
    _expect_one(names, "returns {} values", "returns one tensor, such as torch.cat of them")


def _expect_one(names: Any, does: str, instead: str) -> None:
    if len(names) != 1 or not isinstance(names[0], str):
        listed = ", ".join(map(str, names))
        raise UnsupportedError(f"the module {does.format(len(names))} ({listed}); wrap it in a module that {instead}")


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"


def _plain(argument: Any) -> Any:
    """Return an argument with every node replaced by a reference to its name."""
    if isinstance(argument, torch.fx.Node):
        return Ref(argument.name)
    if isinstance(argument, list | tuple):
        return type(argument)(_plain(part) for part in argument)
    return argument


def _place(node: torch.fx.Node) -> str:
    """Return the path of the submodule that makes a call, such as ``layers.0``."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return str(paths[-1]) if paths else ""


def _fault(module: nn.Module, error: Exception) -> str:
    """Return the error message for a module that cannot be captured, with the line of its code."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(part in frame.filename for part in ("/torch/", "hessquik/importing"))
        and Path(frame.filename).parent != Path(traceback.__file__).parent
    ]
    where = f" at {frames[-1].name}, line {frames[-1].lineno}: {frames[-1].line}" if frames else ""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if any(part in str(error) for part in OUTSIDE):
        reason = "it differentiates, or takes values out of their graph (.data): return the function that it derives"
    if "DataDependent" in type(error).__name__ or "data-dependent" in str(error):
        reason = "it decides by values that depend on the inputs, so that its derivatives jump"
    return (
        f"{type(module).__name__} cannot be captured by torch.export{where} ({reason[:200]}); write forward with "
        "tensor operations alone, without branches on values"
    )
