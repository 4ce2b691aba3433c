"""``hessquik evaluate``: evaluates a saved network at the points of a file of any size, and writes another file.

Points and results are rows of ``.npy``, ``.csv`` or ``.parquet``. One tile is read and written at a time, so that
memory does not grow with the file. The result file appears under its name when it is complete.
"""

from __future__ import annotations

import csv
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib import import_module
from itertools import chain, islice, product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hessquik_client.errors import InvalidInput, OutsideDomain
from hessquik_client.evaluators import Evaluators
from hessquik_client.quantities import AXES, floats_per_row, row_shapes
from hessquik_client.question import DTYPES, make_question

__all__ = ["FORMATS", "Job", "evaluate_file"]

Array = npt.NDArray[Any]
FORMATS = (".npy", ".csv", ".parquet")
#: Bytes of a tile's results, and its most rows.
TILE_BYTES, TILE_ROWS = 8 << 20, 1 << 16


@dataclass(frozen=True)
class Job:
    """The quantities asked of every point.

    Attributes:
        quantities: Names of the quantities.
        dtype: ``float32`` or ``float64``; ``None`` means the network's own.
        weights: Weights of the outputs (m,), or ``None``.
        directions: Directions (k, d), or ``None``.
        outside: ``allow`` or ``refuse`` points outside the bounds.
    """

    quantities: tuple[str, ...]
    dtype: str | None = None
    weights: Array | None = None
    directions: Array | None = None
    outside: str = "allow"


class _Writer(Protocol):
    def write(self, results: dict[str, Array]) -> None:
        """Write a tile's results."""

    def close(self) -> None:
        """Complete and close the file."""


def evaluate_file(
    evaluators: Evaluators, source: Path, target: Path, job: Job, advance: Callable[[int, int], None]
) -> int:
    """Evaluate a network at all points of a file.

    Args:
        evaluators: The network.
        source: The points: ``.npy`` (n, d), or ``.csv`` or ``.parquet`` with one column per input. Columns are found
            by the names of the inputs if the file has all of them, else by their order.
        target: The results: ``.npy`` for one quantity; ``.csv`` or ``.parquet`` with one column per number, such as
            ``gradient[x,f]``; or a folder with one ``.npy`` per quantity.
        job: The quantities and options.
        advance: Called after each tile with the number of points in it and in the whole file, 0 if unknown.

    Returns:
        The number of points.

    Raises:
        ValueError: a file has an unknown format, or its columns do not fit the network.
        InvalidInput: a point or an option does not fit; ``row`` counts from the file's first point.
        OutsideDomain: a point is outside the bounds, and ``job.outside`` is ``refuse``.
    """
    shape = evaluators.shape(TILE_ROWS, job.outside)
    dtype = job.dtype or shape.dtype
    k = 0 if job.directions is None else len(job.directions)
    sizes = (job.quantities, shape.d, shape.m, k, job.weights is not None)
    row_bytes = floats_per_row(*sizes) * DTYPES[dtype].itemsize
    rows = max(1, min(TILE_ROWS // max(1, k), TILE_BYTES // max(1, row_bytes)))
    names = evaluators.saved.metadata.get("input_names") or [f"x{a}" for a in range(shape.d)]
    outputs = evaluators.saved.metadata.get("output_names") or [f"f{j}" for j in range(shape.m)]
    tiles, total = _read(source, rows, shape.d, names)
    letters = {"d": names, "m": ["f"] if job.weights is not None else outputs}
    partial = target.with_name(f".{secrets.token_hex(8)}{target.suffix}")
    done = 0
    try:
        with ExitStack() as stack:
            stack.enter_context(closing(tiles))
            shapes = dict(zip(job.quantities, row_shapes(*sizes), strict=True))
            writer = _writer(partial, target, shapes, letters, dtype)
            stack.callback(writer.close)
            for points in tiles:
                given = {"inputs": points, "weights": job.weights, "directions": job.directions}
                arrays = {name: array for name, array in given.items() if array is not None}
                try:
                    question = make_question(arrays, list(job.quantities), None, dtype, shape)
                except (InvalidInput, OutsideDomain) as error:
                    raise _counted_from_the_start(error, done) from None
                writer.write(evaluators.answer(question))
                done += len(points)
                advance(len(points), total)
        partial.replace(target)
    finally:
        _remove(partial)
    return done


def _counted_from_the_start(error: InvalidInput | OutsideDomain, done: int) -> InvalidInput | OutsideDomain:
    """Return an error whose row, counted within a tile, is counted from the start of the file."""
    row = error.extra.get("row")
    if row is None:
        return error
    detail = error.detail.replace(f"row {row}:", f"row {row + done}:", 1)
    return type(error)(detail, **{**error.extra, "row": row + done})


# Reading.


def _read(source: Path, rows: int, d: int, names: Sequence[str]) -> tuple[Any, int]:
    """Return an iterator over a file's points, ``rows`` at a time, and their number, 0 if unknown."""
    match source.suffix:
        case ".npy":
            array = np.load(source, mmap_mode="r", allow_pickle=False)
            if array.ndim != 2 or array.shape[1] != d or array.dtype.kind not in "iuf":
                raise ValueError(f"{source}: expected numbers of shape (n, {d}), got {array.dtype} {array.shape}")
            return _rows_of(array, rows), len(array)
        case ".csv":
            return _rows_of_csv(source, rows, d, names), 0
        case ".parquet":
            return _rows_of_parquet(source, rows, d, names)
    raise ValueError(f"{source}: expected a file of points that ends in {', '.join(FORMATS)}")


def _rows_of(array: Array, rows: int) -> Iterator[Array]:
    for start in range(0, len(array), rows):
        part = np.array(array[start : start + rows])
        yield part if part.dtype == np.float32 else part.astype(np.float64)


def _rows_of_csv(source: Path, rows: int, d: int, names: Sequence[str]) -> Iterator[Array]:
    with source.open(newline="") as file:
        reader = csv.reader(file)
        numbered: Iterator[tuple[int, list[str]]] = (
            (reader.line_num, row) for row in reader if row
        )  # empty lines are skipped
        first = next(numbered, None)
        if first is None:
            return
        columns = None
        if _are_numbers(first[1]):
            numbered = chain([first], numbered)
        else:
            columns = _columns(source, [name.strip() for name in first[1]], d, names)
        while lines := list(islice(numbered, rows)):
            yield np.array([_numbers(source, line, row, columns, d) for line, row in lines], np.float64)


def _are_numbers(row: Sequence[str]) -> bool:
    try:
        return bool([float(entry) for entry in row])
    except ValueError:
        return False


def _numbers(source: Path, line: int, row: Sequence[str], columns: Sequence[int] | None, d: int) -> list[float]:
    try:
        numbers = [float(entry) for entry in (row if columns is None else [row[column] for column in columns])]
    except (ValueError, IndexError):
        raise ValueError(f"{source}, line {line}: expected {d} numbers, got {','.join(row)[:60]!r}") from None
    if len(numbers) != d:
        raise ValueError(f"{source}, line {line}: expected {d} numbers, got {len(numbers)}")
    return numbers


def _columns(source: Path, found: Sequence[str], d: int, names: Sequence[str]) -> list[int]:
    """Return the positions of the inputs' columns: by name if the file has all names, else by order."""
    if set(names) <= set(found):
        return [list(found).index(name) for name in names]
    if len(found) != d:
        raise ValueError(f"{source}: expected the columns {', '.join(names)}, got {', '.join(found)}")
    return list(range(d))


def _rows_of_parquet(source: Path, rows: int, d: int, names: Sequence[str]) -> tuple[Iterator[Array], int]:
    file = _pyarrow()[0].ParquetFile(source)
    found = file.schema_arrow.names
    chosen = [found[column] for column in _columns(source, found, d, names)]

    def read() -> Iterator[Array]:
        with file:
            for batch in file.iter_batches(batch_size=rows, columns=chosen):
                columns = [batch.column(name).to_numpy(zero_copy_only=False) for name in chosen]
                yield np.stack(columns, axis=1).astype(np.float64)

    return read(), file.metadata.num_rows


def _pyarrow() -> tuple[Any, Any]:
    """Return the modules ``pyarrow.parquet`` and ``pyarrow``."""
    try:
        return import_module("pyarrow.parquet"), import_module("pyarrow")
    except ImportError:
        raise ValueError("parquet: expected the package pyarrow; pip install 'hessquik-service[parquet]'") from None


# Writing.


def _writer(
    partial: Path,
    target: Path,
    shapes: dict[str, tuple[int, ...]],
    letters: dict[str, Sequence[str]],
    dtype: str,
) -> _Writer:
    match target.suffix:
        case ".npy" if len(shapes) == 1:
            return _Npy({next(iter(shapes)): partial}, shapes, dtype)
        case ".npy":
            raise ValueError(f"{target}: expected a folder, or .csv or .parquet, for {len(shapes)} quantities")
        case "":
            partial.mkdir()
            return _Npy({name: partial / f"{name}.npy" for name in shapes}, shapes, dtype)
        case ".csv":
            return _Csv(partial, _labels(shapes, letters))
        case ".parquet":
            return _Parquet(partial, _labels(shapes, letters), dtype)
    raise ValueError(f"{target}: expected a folder, or a file that ends in {', '.join(FORMATS)}")


def _labels(shapes: dict[str, tuple[int, ...]], letters: dict[str, Sequence[str]]) -> list[str]:
    """Return the column names of a row's numbers, such as ``gradient[x,f]``, with indices for unnamed axes."""
    labels = []
    for name, shape in shapes.items():
        axes = [
            letters.get(axis) or [str(i) for i in range(extent)]
            for axis, extent in zip(AXES[name], shape, strict=True)
        ]
        labels += [f"{name}[{','.join(entry)}]" if entry else name for entry in product(*axes)]
    return labels


def _flat(results: dict[str, Array]) -> Array:
    """Return a tile's results concatenated to shape (rows, numbers)."""
    return np.concatenate([array.reshape(len(array), -1) for array in results.values()], axis=1)


class _Npy:
    """Writer of one ``.npy`` file per quantity; numpy's headers leave room for any number of rows."""

    def __init__(self, paths: dict[str, Path], shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
        self._shapes, self._dtype, self._rows = shapes, np.lib.format.dtype_to_descr(np.dtype(dtype)), 0
        self._files = {name: path.open("w+b") for name, path in paths.items()}
        self._write_headers(0)

    def write(self, results: dict[str, Array]) -> None:
        for name, array in results.items():
            self._files[name].write(np.ascontiguousarray(array).data)
        self._rows += len(next(iter(results.values())))

    def close(self) -> None:
        self._write_headers(self._rows)
        for file in self._files.values():
            file.close()

    def _write_headers(self, rows: int) -> None:
        for name, file in self._files.items():
            file.seek(0)
            header = {"descr": self._dtype, "fortran_order": False, "shape": (rows, *self._shapes[name])}
            np.lib.format.write_array_header_1_0(file, header)


class _Csv:
    """Writer of a CSV file; every number has the shortest form that reads back as the same number."""

    def __init__(self, path: Path, labels: Sequence[str]) -> None:
        self._file = path.open("w", newline="")
        self._csv = csv.writer(self._file)
        self._csv.writerow(labels)

    def write(self, results: dict[str, Array]) -> None:
        self._csv.writerows(_flat(results).tolist())

    def close(self) -> None:
        self._file.close()


class _Parquet:
    """Writer of a Parquet file with one column per number and one row group per tile."""

    def __init__(self, path: Path, labels: Sequence[str], dtype: str) -> None:
        parquet, self._arrow = _pyarrow()
        kind = self._arrow.from_numpy_dtype(np.dtype(dtype))
        self._schema = self._arrow.schema([(label, kind) for label in labels])
        self._writer = parquet.ParquetWriter(path, self._schema)

    def write(self, results: dict[str, Array]) -> None:
        columns = [self._arrow.array(column) for column in _flat(results).T]
        self._writer.write_table(self._arrow.table(columns, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


def _remove(path: Path) -> None:
    """Remove an incomplete file or folder, if it exists."""
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
