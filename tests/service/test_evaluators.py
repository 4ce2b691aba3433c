"""The evaluators of a worker's model share one copy of its weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hessquik import Evaluator, storage
from hessquik.activations import tanhActivation
from hessquik.ensemble import evaluator_of
from hessquik.networks import NN, Ensemble, fullyConnectedNN
from hessquik_client.evaluators import TORCH_DTYPES, Evaluators


def network(dtype: torch.dtype) -> NN:
    torch.manual_seed(1)
    return fullyConnectedNN([3, 16, 16, 2], tanhActivation(), dtype=dtype)


@pytest.mark.parametrize("is_ensemble", [False, True], ids=["network", "ensemble"])
@pytest.mark.parametrize("own", TORCH_DTYPES)
def test_both_dtypes_work_on_one_copy_and_give_the_same_bits(own: str, is_ensemble: bool) -> None:
    member = network(TORCH_DTYPES[own])
    made = Ensemble(member, network(TORCH_DTYPES[own])) if is_ensemble else member
    held = Evaluators(storage.parse(storage.serialize(made)), torch.device("cpu"), 1)
    assert held.dtype == TORCH_DTYPES[own]
    weights = {parameter.data_ptr() for parameter in held._network.parameters()}
    x = np.random.default_rng(1).uniform(-1, 1, (5, 3))
    for dtype in TORCH_DTYPES.values():
        evaluator = held.evaluator(dtype)
        members = [evaluator] if isinstance(evaluator, Evaluator) else evaluator.members
        assert {place for one in members for place in one._own_data} == weights
        found = held.evaluate({"inputs": x}, dtype, ["value", "gradient", "hessian"])
        expected = evaluator_of(made, "cpu", dtype)(torch.from_numpy(x), ("value", "gradient", "hessian"))
        for name, array in found.items():
            assert np.array_equal(array, getattr(expected, name).numpy()), name


def test_an_evaluator_of_its_own_copies_the_weights() -> None:
    made = network(torch.float64)
    evaluate, x = Evaluator(made), torch.ones(1, 3, dtype=torch.float64)
    before = evaluate(x).value.clone()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2)
    assert torch.equal(evaluate(x, ("value", "gradient")).value, before)
    assert all(parameter.requires_grad for parameter in made.parameters())
