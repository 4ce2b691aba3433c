"""Files of other libraries, read by their suffixes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hessquik import strict_json
from hessquik.errors import FormatError, UnsupportedError
from hessquik.importing import onnx_model, torch_module
from hessquik.importing.exported import read_archive
from hessquik.importing.scaling import Scaling
from hessquik.importing.sequential import read_sequential
from hessquik.importing.source import Imported, Source, by_rows, import_source
from hessquik.importing.torch_reader import Program, read, run

__all__ = ["describe", "import_file", "read_scaling"]

#: Files that are pickles of code, and what to do instead.
PICKLES = {
    ".pkl": "call hessquik.from_sklearn(estimator) in Python, or export it with skl2onnx",
    ".pickle": "call hessquik.from_sklearn(estimator) in Python, or export it with skl2onnx",
    ".joblib": "call hessquik.from_sklearn(estimator) in Python, or export it with skl2onnx",
    ".h5": "export the Keras model with model.export(path, format='onnx')",
    ".keras": "export the Keras model with model.export(path, format='onnx')",
}


def read_scaling(path: str | Path) -> Scaling:
    """Return the scaling that a JSON file describes.

    Raises:
        FormatError: the file is not a JSON object.
        ShapeError: a key is not a field of :class:`Scaling`.
    """
    given = strict_json.parse("scale", Path(path).read_bytes())
    if not isinstance(given, dict):
        raise FormatError(f"{Path(path).name}: a scaling must be a JSON object such as {{'input_mean': [0.5, 2.0]}}")
    return Scaling.of(given)


def import_file(
    path: str | Path,
    scaling: Scaling | None = None,
    architecture: str | Path | None = None,
    allow_kinks: bool = False,
    dtype: torch.dtype | None = None,
    bounds: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Imported:
    """Return the network of a file: ``.onnx``, ``.pt2``, or a state dict with its architecture.

    Args:
        path: The file.
        scaling: The scaling of the data before training.
        architecture: JSON that describes the module of a state dict, see :func:`read_sequential`.
        allow_kinks: See :func:`hessquik.from_torch`.
        dtype: See :func:`hessquik.from_torch`.
        bounds: See :func:`hessquik.from_torch`.

    Raises:
        ArchitectureError: the architecture is not one, or is missing.
        FormatError: the file is none of these.
        ShapeError: a scaling or the bounds do not fit.
        UnsupportedError: the network cannot be exact here; the message names the node.
    """
    path, scaling = Path(path), scaling or Scaling()
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise FormatError(f"{path.name}: files of this kind can hold code, and are not opened; {PICKLES[suffix]}")
    if architecture is not None and suffix in {".onnx", ".pt2"}:
        raise FormatError(f"{path.name}: an architecture (--architecture) is for state dicts, this file has its own")
    if suffix == ".onnx":
        return onnx_model.import_model(path, None, scaling, allow_kinks, dtype, bounds)
    if suffix == ".pt2":
        return import_source(_exported(read_archive(path)), scaling, allow_kinks, dtype, bounds)
    if architecture is None:
        raise FormatError(
            f"{path.name}: the file must be .onnx or .pt2 (torch.export.save), or a state dict beside --architecture "
            "FILE.json; a whole module or TorchScript holds code: export it with torch.export.save; networks of the "
            "original hessQuik are for hessquik convert"
        )
    module = read_sequential(path, architecture)
    return torch_module.import_module(module, None, scaling, allow_kinks, dtype, bounds)


def _exported(program: Program) -> Source:
    """Return an exported program as a source, which torch's operators compute call by call."""

    def evaluate(x: Tensor) -> Tensor:
        return run(program, x)

    if program.dtype not in {torch.float32, torch.float64}:
        raise UnsupportedError(
            f"the program must take float32 or float64, since derivatives with respect to others do not exist, got "
            f"{program.dtype}"
        )
    at_all = evaluate if program.takes_any_rows else by_rows(evaluate, program.shape[0])
    return Source(program.width, program.dtype, "torch", lambda point: read(program, point), at_all)


def describe(imported: Imported) -> list[tuple[str, Any]]:
    """Return the rows of a table that describes an imported network: names and values."""
    network = imported.network
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return [
        *((f"layer {name}", _layer(layer)) for name, layer in network.named_layers()),
        ("inputs d, outputs m", f"{network.dim_input()}, {network.dim_output()}"),
        ("parameters", f"{parameters} of {next(network.parameters()).dtype}".replace("torch.", "")),
        (f"largest error against {imported.runtime}", f"{imported.error:.1e} at {imported.points} points"),
    ]


def _layer(layer: Any) -> str:
    hidden = layer.form().hidden
    act = layer.form().activation
    return f"{type(layer).__name__} {layer.dim_input()} → {layer.dim_output()}, {hidden} × {type(act).__name__}"
