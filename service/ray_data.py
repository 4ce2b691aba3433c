"""Evaluation of a saved network at the rows of a Ray Dataset, on the machines of a cluster.

    points = ray.data.read_parquet("points/")                        # a column "x" of d numbers, or one per input
    evaluate_dataset(points, "models/peaks.safetensors", ["value", "gradient"]).write_parquet("results/")

The file is read once, here, and sent to the actors as bytes; each checks the derivatives before it evaluates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ray.data import Dataset

__all__ = ["evaluate_dataset"]

Array = np.ndarray[Any, Any]
#: Points that an actor evaluates at once.
BATCH_ROWS = 4096


class _Actor:
    """A Ray actor that evaluates a network at batches of rows.

    Args:
        data: Bytes of the model's file.
        quantities: Names of the quantities.
        columns: The column of points, or one column per input.
        options: ``weights`` (m), ``directions`` (k, d), ``dtype`` and ``outside``, as in a request.
        device: Device to compute on.
    """

    def __init__(
        self, data: bytes, quantities: Sequence[str], columns: Sequence[str], options: Mapping[str, Any], device: str
    ) -> None:
        """Load the network and check its derivatives."""
        import torch

        from hessquik import storage
        from hessquik_client.evaluators import Evaluators

        self._evaluators = Evaluators(storage.parse(data), torch.device(device), 1)
        self._shape = self._evaluators.shape(BATCH_ROWS * 1024, options.get("outside") or "allow")
        self._quantities, self._columns, self._options = list(quantities), list(columns), options

    def __call__(self, batch: dict[str, Array]) -> dict[str, Array]:
        """Return a batch with one more column for each quantity."""
        from hessquik_client.question import make_question

        points = _join(batch, self._columns)
        given = {name: self._options.get(name) for name in ("weights", "directions")}
        arrays = {name: np.asarray(array) for name, array in given.items() if array is not None}
        dtype = self._options.get("dtype")
        question = make_question({"inputs": points, **arrays}, self._quantities, None, dtype, self._shape)
        return {**batch, **self._evaluators.answer(question)}


def _join(batch: Mapping[str, Array], columns: Sequence[str]) -> Array:
    """Return the points (n, d) of a column of lists or arrays, or of one column per input.

    Raises:
        InvalidInput: the lists of a column have different lengths.
    """
    from hessquik_client.errors import InvalidInput

    found = [np.asarray(batch[name]) for name in columns]
    if len(found) > 1 or found[0].ndim == 2:
        return found[0] if len(found) == 1 else np.stack(found, axis=1)
    try:
        return np.stack([np.atleast_1d(row) for row in found[0]])  # Parquet's lists are arrays in an array
    except ValueError:
        raise InvalidInput(f"{columns[0]}: expected points of equal lengths, got different ones") from None


def evaluate_dataset(
    dataset: Dataset,
    model: str | Path,
    quantities: Sequence[str] = ("value",),
    columns: Sequence[str] = ("x",),
    actors: int | tuple[int, int] = 1,
    device: str = "cpu",
    **options: Any,
) -> Dataset:
    """Return the dataset with a column for each quantity; nothing is computed until it is read.

    Args:
        dataset: Rows with the points.
        model: A saved network or ensemble on this machine.
        quantities: Names out of :data:`hessquik_client.quantities.QUANTITIES`.
        columns: One column with d numbers per row, or one column per input, in order.
        actors: Number of actors, or the smallest and largest number.
        device: Device of each actor, ``cpu`` or ``cuda``; an actor on ``cuda`` reserves a GPU.
        options: ``weights`` (m), ``directions`` (k, d), ``dtype`` and ``outside``.

    Raises:
        InvalidInput: a point does not fit the model; raised as an error of Ray's task when the dataset is read.
        OSError: the file cannot be read.
    """
    given = (Path(model).read_bytes(), tuple(quantities), tuple(columns), options, device)
    return dataset.map_batches(
        _Actor,
        fn_constructor_args=given,
        batch_format="numpy",
        batch_size=BATCH_ROWS,
        concurrency=actors,
        num_gpus=1 if device.startswith("cuda") else None,
    )
