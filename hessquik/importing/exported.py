"""Programs that ``torch.export.save`` wrote: a zip archive of JSON and raw arrays, which is all that is read of it.

torch's own reader rebuilds operators by name and opens pickles beside the JSON; nothing of that happens here. The
sample inputs of the archive, which are a pickle, are not opened, and tensors that are stored as pickles are refused.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hessquik.errors import FormatError, UnsupportedError
from hessquik.importing.capture import ROWS, one_input, one_output
from hessquik.importing.torch_constants import MAX_NUMBERS
from hessquik.importing.torch_reader import Call, Program, Ref

__all__ = ["read_archive"]

MAX_ARCHIVE_BYTES = 1 << 30
MAX_JSON_BYTES = 64 << 20
MAX_NODES = 65536
#: The bit of an encrypted file among the flags of its entry.
ENCRYPTED = 1
#: Types of numbers by their codes in the schema of the archive.
DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}


def read_archive(path: str | Path) -> Program:
    """Read an exported program.

    Raises:
        FormatError: the file is not such an archive, or has tensors that are stored as pickles.
        UnsupportedError: the program takes or returns anything but one tensor.
    """
    name = Path(path).name
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive)
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from None
    except (UnsupportedError, OSError):
        raise
    except Exception as error:  # any error that a broken or hostile archive causes
        raise FormatError(
            f"{name}: the file must be an archive that torch.export.save of torch 2.8 or later wrote "
            f"({type(error).__name__}: {str(error)[:100]})"
        ) from None


def _read(archive: zipfile.ZipFile) -> Program:
    if sum(entry.file_size for entry in archive.infolist()) > MAX_ARCHIVE_BYTES:
        raise FormatError(f"the archive must have at most {MAX_ARCHIVE_BYTES} bytes")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & ENCRYPTED for entry in archive.infolist()):
        raise FormatError("the archive must hold its files as they are, neither compressed nor encrypted")
    files = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}

    def parsed(name: str) -> Any:
        if files[name].file_size > MAX_JSON_BYTES:
            raise FormatError(f"{name} must have at most {MAX_JSON_BYTES} bytes")
        return json.loads(archive.read(files[name]))

    models = [name for name in files if name.startswith("models/") and name.endswith(".json")]
    if len(models) != 1:
        raise FormatError(
            f"the archive must have one model, as torch.export.save of 2.8 or later has it, got {len(models)}"
        )
    if "byteorder" in files and archive.read(files["byteorder"]).strip() != b"little":
        raise FormatError("numbers in the archive must be in little-endian order")
    key = models[0].removeprefix("models/").removesuffix(".json")
    module = parsed(models[0])["graph_module"]
    tensors = {
        kind: _tensors(archive, files, f"data/{kind}/", parsed(f"data/{kind}/{key}_{kind}_config.json"))
        for kind in ("weights", "constants")
    }
    return _program(module, {**tensors["constants"], **tensors["weights"]})


def _tensors(
    archive: zipfile.ZipFile, files: Mapping[str, zipfile.ZipInfo], folder: str, entries: Any
) -> dict[str, Tensor]:
    """Return the tensors of a folder."""
    found, numbers = {}, 0
    for name, entry in entries["config"].items():
        if entry["use_pickle"] or entry["tensor_meta"] is None:
            raise FormatError(f"tensor {name} must be stored as raw numbers, got a pickle; export the module anew")
        meta = entry["tensor_meta"]
        dtype = DTYPES[meta["dtype"]]
        shape, strides = ([int(size["as_int"]) for size in meta[key]] for key in ("sizes", "strides"))
        start = int(meta["storage_offset"]["as_int"])
        data = archive.read(files[folder + entry["path_name"]])
        flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.zeros(0, dtype=dtype)
        last = start + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if min([start, *shape, *strides], default=0) < 0 or (0 not in shape and last >= flat.numel()):
            raise FormatError(f"tensor {name} must lie within its {flat.numel()} numbers")
        numbers += math.prod(shape)
        if numbers > MAX_NUMBERS:
            raise FormatError(f"tensors must have at most {MAX_NUMBERS} numbers together")
        found[name] = flat.as_strided(shape, strides, start).clone()
    return found


def _program(module: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Program:
    """Return the program of a graph and the tensors that its signature names."""
    graph, signature = module["graph"], module["signature"]
    constants, inputs = {}, []
    for spec in signature["input_specs"]:
        ((kind, each),) = spec.items()
        if kind == "user_input":
            inputs.append(_argument(each["arg"]))
            continue
        key = each.get("parameter_name", each.get("buffer_name", each.get("tensor_constant_name")))
        if key not in tensors:
            raise FormatError(f"the program needs {kind} {str(key)[:60]!r}, which the archive does not have")
        constants[each["arg"]["name"]] = tensors[key]
    outputs = [_argument(spec["user_output"]["arg"]) for spec in signature["output_specs"] if "user_output" in spec]
    one_input([each.name if isinstance(each, Ref) else each for each in inputs])
    one_output([each.name if isinstance(each, Ref) else each for each in outputs])
    if len(graph["nodes"]) > MAX_NODES:
        raise FormatError(f"a program must have at most {MAX_NODES} nodes, got {len(graph['nodes'])}")
    meta = graph["tensor_values"][inputs[0].name]
    rows, *shape = (size.get("as_int") for size in meta["sizes"])
    if None in shape:
        raise FormatError("a program must have a fixed number of inputs; only the number of points may be dynamic")
    sizes = (ROWS if rows is None else int(rows), *map(int, shape))
    if min(sizes) < 1 or math.prod(sizes) > MAX_NUMBERS:
        raise FormatError(f"a program must take 1 to {MAX_NUMBERS} numbers, got an array of the shape {sizes}")
    dtype = DTYPES[meta["dtype"]]
    calls = [_call(node) for node in graph["nodes"]]
    return Program(inputs[0].name, sizes, dtype, constants, calls, outputs[0].name, takes_any_rows=rows is None)


def _call(node: Mapping[str, Any]) -> Call:
    """Return a node as a call."""
    args = [_argument(each["arg"]) for each in node["inputs"] if each.get("kind", 1) == 1]
    kwargs = {each["name"]: _argument(each["arg"]) for each in node["inputs"] if each.get("kind", 1) != 1}
    outputs = []
    for output in node["outputs"]:
        found = _argument(output)
        outputs += [each.name for each in (found if isinstance(found, list) else [found]) if isinstance(each, Ref)]
    target = node["target"].removeprefix("torch.ops.")
    return Call(target, tuple(args), kwargs, tuple(outputs), _place(node.get("metadata", {})))


def _ref(name: Any) -> Ref:
    """Return the reference to a value."""
    if not isinstance(name, str):
        raise FormatError(f"the name of a value must be text, got {name!r:.60}")
    return Ref(name)


#: Kinds of arguments whose value is used as it is.
_PLAIN = {"as_int", "as_bool", "as_ints", "as_bools", "as_string", "as_strings"}
#: Devices, layouts and memory formats, none of which changes a number.
_IGNORED = {"as_none", "as_device", "as_layout", "as_memory_format"}
_READ: dict[str, Callable[[Any], Any]] = {
    "as_tensor": lambda value: _ref(value["name"]),
    "as_tensors": lambda value: [_ref(each["name"]) for each in value],
    "as_optional_tensors": lambda value: [_argument(each) for each in value],
    "as_float": float,
    "as_floats": lambda value: [float(each) for each in value],
    "as_sym_int": lambda value: _ref(value["as_name"]) if "as_name" in value else value["as_int"],
    "as_sym_bool": lambda value: _ref(value["as_name"]) if "as_name" in value else value["as_bool"],
    "as_sym_ints": lambda value: [_READ["as_sym_int"](each) for each in value],
    "as_scalar_type": lambda value: DTYPES.get(value, torch.complex128),
}


def _argument(argument: Mapping[str, Any]) -> Any:
    """Return an argument, with :class:`Ref` in the places of values."""
    ((kind, value),) = argument.items()
    if kind in _PLAIN:
        return value
    if kind in _IGNORED:
        return None
    if kind == "as_graph":
        raise UnsupportedError(
            "the program has a program within it, as torch.no_grad, torch.cond and loops make; remove these and "
            "export the module anew"
        )
    if kind not in _READ:
        raise FormatError(f"an argument must be a tensor, a number or a list of these, got {str(kind)[:60]!r}")
    return _READ[kind](value)


def _place(metadata: Mapping[str, str]) -> str:
    """Return the path of the module that makes a call: the last entry of its stack, ``id,path,class;…``."""
    entries = [entry.split(",") for entry in metadata.get("nn_module_stack", "").split(";") if entry.count(",") >= 2]
    return entries[-1][1] if entries else ""
