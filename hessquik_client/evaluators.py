"""A saved network with an Evaluator per dtype, for workers and for local models of the client."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hessquik import EnsembleEvaluator, Evaluator, storage
from hessquik.ensemble import evaluator_of
from hessquik.errors import DerivativeError
from hessquik.evaluator import COMMON
from hessquik.networks import Ensemble
from hessquik.proof import Asked, prove_quickly
from hessquik.quantities import SPREADS
from hessquik_client.domain import Domain
from hessquik_client.quantities import DOMAIN_DISTANCE
from hessquik_client.question import Question, Shape

__all__ = ["TORCH_DTYPES", "Evaluators"]

Array = npt.NDArray[Any]
TORCH_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Evaluators:
    """A network or an ensemble on one device, with an evaluator for each dtype that was asked for.

    Each quantity of an evaluator is compared with automatic differentiation before it is used: when the evaluator is
    created or, if that takes many operations (:func:`hessquik.proof.prove_quickly`), when it is first asked for.

    Args:
        saved: The network or ensemble, and its metadata.
        device: Device to compute on.
        threads: Threads that share a large call, on a CPU.

    Attributes:
        members: Number of networks; 1 if it is not an ensemble.
    """

    def __init__(self, saved: storage.SavedNetwork, device: torch.device, threads: int) -> None:
        """Create the evaluator in the network's own dtype, and check its derivatives."""
        self.saved = saved
        self.device = device
        self.threads = threads
        self.domain = Domain.of(saved.metadata)
        self.members = len(saved.network.networks()) if isinstance(saved.network, Ensemble) else 1
        # Every evaluator works on this one copy.
        self._own_dtype = next(saved.network.parameters()).dtype
        self._network = saved.network.cpu().requires_grad_(False)
        self._evaluators: dict[torch.dtype, Evaluator | EnsembleEvaluator] = {}
        #: Quantities that are compared when they are first asked for, and errors of those that failed.
        self._unproven: dict[torch.dtype, frozenset[Asked]] = {}
        self._refused: dict[tuple[torch.dtype, Asked], DerivativeError] = {}
        self.dtype = self.evaluator(None).dtype

    def evaluator(self, dtype: torch.dtype | None) -> Evaluator | EnsembleEvaluator:
        """Return the evaluator in a dtype (``None``: the network's own); it is created and checked on first use."""
        if dtype is None or dtype not in self._evaluators:
            compiled = COMMON if dtype is None else ()  # when the model is loaded, and never in a request
            chosen = dtype or self._own_dtype
            made = evaluator_of(self._network, self.device, chosen, self.threads, compiled=compiled, owned=True)
            self._unproven[made.dtype] = prove_quickly(self._network, *self._bounds, evaluate=made)
            self._evaluators[made.dtype] = made
            return made
        return self._evaluators[dtype]

    @property
    def _bounds(self) -> tuple[Any, Any]:
        return self.saved.metadata.get("lower_bounds"), self.saved.metadata.get("upper_bounds")

    def unproven(self, dtype: torch.dtype, quantities: Sequence[str], is_weighted: bool) -> frozenset[Asked]:
        """Return what of a call has not been compared yet, as pairs of a quantity and whether it is weighted.

        Args:
            dtype: Dtype of an evaluator that exists.
            quantities: The call's quantities.
            is_weighted: Whether the call is for weighted sums of the outputs.
        """
        unproven = self._unproven[dtype]
        return unproven and unproven & {(SPREADS.get(name, name), is_weighted) for name in quantities}

    def prove(self, dtype: torch.dtype, quantities: Sequence[str], is_weighted: bool) -> None:
        """Compare what of a call has not been compared yet, which may take several times as long as a row.

        Raises:
            DerivativeError: a quantity is wrong, and stays refused.
        """
        evaluate = self.evaluator(dtype)
        for asked in self.unproven(dtype, quantities, is_weighted):
            if (dtype, asked) in self._refused:
                raise self._refused[dtype, asked]
            try:
                prove_quickly(self._network, *self._bounds, evaluate=evaluate, asked=[asked])
            except DerivativeError as error:
                self._refused[dtype, asked] = error
                raise
            self._unproven[dtype] -= {asked}

    def shape(self, max_rows: int, outside: str = "allow") -> Shape:
        """Return the sizes and limits that a question must fit."""
        evaluate = self.evaluator(self.dtype)
        dtype = str(self.dtype).removeprefix("torch.")
        return Shape(evaluate.d, evaluate.m, dtype, max_rows, self.domain, outside, self.members)

    def answer(self, question: Question) -> dict[str, Array]:
        """Return the quantities of a question, computed as in a worker of the service."""
        n, arrays = len(question.inputs), {}
        for name in ("inputs", "weights", "directions"):
            array = getattr(question, name)
            if array is not None:  # a row for each point, as a batch has them; torch wants it writable
                arrays[name] = np.require(np.broadcast_to(array, (n, *array.shape[1:])), requirements=["C", "W"])
        return self.evaluate(arrays, TORCH_DTYPES[question.dtype], question.quantities)

    def evaluate(
        self,
        given: Mapping[str, Array],
        dtype: torch.dtype,
        quantities: Sequence[str],
        between: Callable[[], None] | None = None,
        out: Mapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        """Return the quantities at points.

        Args:
            given: ``inputs`` (n, d) and optionally ``weights`` (n, m) and ``directions`` (n, k, d).
            dtype: Dtype to compute in.
            quantities: Names of the quantities.
            between: Called between tiles, see :class:`hessquik.Evaluator`.
            out: Arrays to write the results to; new ones if not given.
        """
        arrays = {name: torch.from_numpy(array) for name, array in given.items()}
        computed = [name for name in quantities if name != DOMAIN_DISTANCE]
        results: dict[str, Array] = {}
        if computed:
            evaluate = self.evaluator(dtype)
            if self._unproven[dtype]:
                self.prove(dtype, computed, "weights" in given)
            places = None if out is None else {name: torch.from_numpy(out[name]) for name in computed}
            weights, directions = arrays.get("weights"), arrays.get("directions")
            found = evaluate(arrays["inputs"], computed, weights, directions, between, places)
            results = {name: getattr(found, name).cpu().numpy() for name in computed}
        if DOMAIN_DISTANCE in quantities:
            x = given["inputs"]
            results[DOMAIN_DISTANCE] = np.zeros(len(x), x.dtype) if self.domain is None else self.domain.distance(x)
            if out is not None:
                out[DOMAIN_DISTANCE][...] = results[DOMAIN_DISTANCE]
        return {name: results[name] for name in quantities}
