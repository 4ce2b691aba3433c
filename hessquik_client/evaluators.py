"""A saved network with an Evaluator per dtype, for workers and for local models of the client."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hessquik import EnsembleEvaluator, Evaluator, storage
from hessquik.ensemble import evaluator_of
from hessquik.evaluator import COMMON
from hessquik.networks import Ensemble
from hessquik.proof import prove_quickly
from hessquik_client.domain import Domain
from hessquik_client.quantities import DOMAIN_DISTANCE

__all__ = ["TORCH_DTYPES", "Evaluators"]

Array = npt.NDArray[Any]
TORCH_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Evaluators:
    """A network or an ensemble on one device, with an evaluator for each dtype that was asked for.

    Each evaluator's derivatives are compared with automatic differentiation before it is used.

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
        # Every evaluator works on this one copy, which is in float64 whatever the network's own dtype is.
        self._own_dtype = next(saved.network.parameters()).dtype
        self._network = saved.network.to("cpu", torch.float64).requires_grad_(False)
        self._evaluators: dict[torch.dtype, Evaluator | EnsembleEvaluator] = {}
        self.dtype = self.evaluator(None).dtype

    def evaluator(self, dtype: torch.dtype | None) -> Evaluator | EnsembleEvaluator:
        """Return the evaluator in a dtype (``None``: the network's own); it is created and checked on first use."""
        if dtype is None or dtype not in self._evaluators:
            compiled = COMMON if dtype is None else ()  # when the model is loaded, and never in a request
            chosen = dtype or self._own_dtype
            made = evaluator_of(self._network, self.device, chosen, self.threads, compiled=compiled, owned=True)
            bounds = (self.saved.metadata.get("lower_bounds"), self.saved.metadata.get("upper_bounds"))
            prove_quickly(self._network, *bounds, evaluate=made)
            self._evaluators[made.dtype] = made
            return made
        return self._evaluators[dtype]

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
