"""Ensembles: means and standard deviations against members by torch.func, files, proof, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import hessquik
from hessquik import EnsembleEvaluator, Evaluator, activations, layers, storage
from hessquik.architecture import MAX_MEMBERS, describe
from hessquik.ensemble import SPREADS
from hessquik.errors import ArchitectureError, CompositionError, DerivativeError, FormatError, ShapeError
from hessquik.networks import NN, Ensemble, fullyConnectedNN, resnetNN
from hessquik.proof import prove, prove_quickly
from tests import oracle

D, M, MEMBERS = 3, 2, 3
#: Means and deviations of numbers that agree to rounding.
TOLERANCE = 1e-12


def ensemble(dtype: torch.dtype = torch.float64) -> Ensemble:
    torch.manual_seed(4)
    tanh = activations.tanhActivation
    return Ensemble(
        fullyConnectedNN([D, 8, M], act=tanh(), dtype=dtype),
        fullyConnectedNN([D, 5, 6, M], act=activations.softplusActivation(), dtype=dtype),
        NN(resnetNN(D, 2, h=0.5, act=tanh(), dtype=dtype), layers.singleLayer(D, M, act=tanh(), dtype=dtype)),
    )


def points(n: int) -> Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def expected(network: Ensemble, x: Tensor) -> dict[str, Tensor]:
    """Return means and standard deviations of the members' results by torch.func."""
    members = zip(*(oracle.derivatives(member, x) for member in network.members), strict=True)
    found = {}
    for name, parts in zip(("value", "gradient", "hessian"), members, strict=True):
        stack = torch.stack(parts)
        mean = stack.sum(0) / MEMBERS
        found[name] = mean
        found[f"{name}_std"] = ((stack - mean).square().sum(0) / (MEMBERS - 1)).sqrt()
    return found


@pytest.mark.parametrize("backend", hessquik.backends.names("cpu"))
def test_means_and_deviations_are_those_of_the_members(backend: str) -> None:
    network, x = ensemble(), points(40)
    truth = expected(network, x)
    evaluate = EnsembleEvaluator(network, backend=backend)
    found = evaluate(x, tuple(truth))
    for name, true in truth.items():
        assert oracle.difference(getattr(found, name), true) <= TOLERANCE, name
    alone = evaluate(x, ("hessian_std",))
    assert oracle.difference(alone.hessian_std, truth["hessian_std"]) <= TOLERANCE
    assert alone.hessian is None


def test_other_quantities_are_means_too_and_weights_come_before_deviations() -> None:
    network, x = ensemble(), points(6)
    truth, parts = expected(network, x), [oracle.derivatives(member, x) for member in network.members]
    v, weights = points(4), torch.tensor([0.3, -2.0], dtype=torch.float64)
    found = EnsembleEvaluator(network)(x, ("laplacian", "hvp", "jvp"), directions=v)
    assert oracle.difference(found.laplacian, truth["hessian"].diagonal(dim1=1, dim2=2).sum(-1)) <= TOLERANCE
    assert oracle.difference(found.hvp, torch.einsum("nabm,kb->nkam", truth["hessian"], v)) <= TOLERANCE
    assert oracle.difference(found.jvp, torch.einsum("nam,ka->nkm", truth["gradient"], v)) <= TOLERANCE
    weighted = EnsembleEvaluator(network)(x, ("gradient", "gradient_std"), weights=weights)
    sums = torch.stack([gradient @ weights for _, gradient, _ in parts])
    assert oracle.difference(weighted.gradient[..., 0], sums.mean(0)) <= TOLERANCE
    assert oracle.difference(weighted.gradient_std[..., 0], sums.std(0)) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rows_bits_do_not_depend_on_the_other_rows(dtype: torch.dtype) -> None:
    evaluate, x = EnsembleEvaluator(ensemble(dtype)), points(137).to(dtype)
    asked = ("value", "gradient", "value_std", "gradient_std")
    whole = evaluate(x, asked)
    for rows in (slice(0, 1), slice(5, 12), slice(100, 137)):
        part = evaluate(x[rows], asked)
        for name in asked:
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows]), name


def test_equal_members_have_no_spread() -> None:
    member = fullyConnectedNN([D, 8, M]).double()
    found = EnsembleEvaluator(Ensemble(member, member, member))(points(9), ("hessian", *SPREADS))
    assert torch.equal(found.hessian, Evaluator(member)(points(9), ("value", "gradient", "hessian")).hessian)
    for name in SPREADS:
        assert not getattr(found, name).any(), name


def test_results_are_written_where_the_caller_wants_them() -> None:
    evaluate, x = EnsembleEvaluator(ensemble()), points(5)
    out = {"value_std": torch.full((5, M), 9.0, dtype=torch.float64), "value": torch.empty(5, M, dtype=torch.float64)}
    found = evaluate(x, ("value", "value_std"), out=out)
    assert found.value_std is out["value_std"]
    assert torch.equal(out["value_std"], evaluate(x, ("value_std",)).value_std)


def test_the_documented_interface_gives_the_mean() -> None:
    network, x = ensemble(), points(7)
    truth = expected(network, x)
    for got, name in zip(
        network(x, do_gradient=True, do_Hessian=True), ("value", "gradient", "hessian"), strict=True
    ):
        assert oracle.difference(got, truth[name]) <= TOLERANCE


def test_a_saved_ensemble_is_read_again(tmp_path: Path) -> None:
    network, x = ensemble(), points(5)
    hessquik.save(network, tmp_path / "f.safetensors", input_names=["a", "b", "c"])
    again = hessquik.load(tmp_path / "f.safetensors")
    assert isinstance(again, Ensemble)
    assert describe(again) == describe(network)
    assert describe(network)["type"] == "ensemble"
    assert len(describe(network)["members"]) == MEMBERS
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    asked = ("value", "hessian", "gradient_std")
    before, after = (EnsembleEvaluator(one)(x, asked) for one in (network, again))
    assert all(torch.equal(getattr(before, name), getattr(after, name)) for name in asked)


def test_what_is_no_ensemble_is_refused() -> None:
    one, other = fullyConnectedNN([2, 4, 1]), fullyConnectedNN([2, 4, 3])
    with pytest.raises(CompositionError, match="at least two members, got 1"):
        Ensemble(one)
    with pytest.raises(CompositionError, match=r"members\[0\] has 2 and 1, members\[1\] has 2 and 3"):
        Ensemble(one, other)
    with pytest.raises(CompositionError, match=r"members\[1\] must be a network, got singleLayer"):
        Ensemble(one, layers.singleLayer(2, 1))  # type: ignore[arg-type]
    with pytest.raises(ArchitectureError, match=f"at most {MAX_MEMBERS}, got {MAX_MEMBERS + 1}"):
        describe(Ensemble(*[one] * (MAX_MEMBERS + 1)))
    with pytest.raises(TypeError, match="EnsembleEvaluator"):
        Evaluator(Ensemble(one, one))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="value_std"):
        EnsembleEvaluator(Ensemble(one, one))(torch.zeros(1, 2), ("laplacian_std",))
    with pytest.raises(ShapeError, match="expected quantities out of"):
        Evaluator(one)(torch.zeros(1, 2), ("value_std",))


MEMBER = {"type": "fullyConnectedNN", "widths": [2, 4, 1]}
WRONG = {
    "one member": ({"type": "ensemble", "members": [MEMBER]}, "list of 2 to 64 networks"),
    "no list": ({"type": "ensemble", "members": MEMBER}, "list of 2 to 64 networks"),
    "something else": ({"type": "ensemble", "members": [MEMBER, MEMBER], "weights": [1, 2]}, "'members' only"),
    "in a network": ({"type": "NN", "layers": [{"type": "ensemble", "members": [MEMBER, MEMBER]}]}, "must be one of"),
    "nested": ({"type": "ensemble", "members": [MEMBER, {"type": "ensemble", "members": [MEMBER] * 2}]}, "one of"),
    "other widths": ({"type": "ensemble", "members": [MEMBER, {**MEMBER, "widths": [2, 4, 2]}]}, "equal inputs"),
    "other weights": ({"type": "ensemble", "members": [MEMBER, {**MEMBER, "widths": [2, 5, 1]}]}, "members.1.0.K"),
    "very many": ({"type": "ensemble", "members": [{**MEMBER, "widths": [2] * 900}] * 64}, "tensors for"),
}


@pytest.mark.parametrize(("architecture", "message"), WRONG.values(), ids=WRONG)
def test_descriptions_of_no_ensemble_are_refused(architecture: dict[str, object], message: str) -> None:
    tensors = Ensemble(fullyConnectedNN([2, 4, 1]), fullyConnectedNN([2, 4, 1])).state_dict()
    with pytest.raises((ArchitectureError, CompositionError, FormatError), match=message):
        storage.assemble(architecture, tensors)


def test_members_of_different_types_cannot_be_saved() -> None:
    mixed = Ensemble(fullyConnectedNN([2, 4, 1]), fullyConnectedNN([2, 4, 1]).double())
    with pytest.raises(FormatError, match="all float32 or all float64"):
        storage.serialize(mixed)


@pytest.mark.slow
def test_an_ensemble_is_proven_and_a_wrong_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Ensemble(*(fullyConnectedNN([D, 6, M], act=activations.tanhActivation()).double() for _ in range(2)))
    rows = prove(network, samples=2)
    assert all(row.passed for row in rows)
    assert {row.quantity for row in rows} >= set(SPREADS)
    assert any("member 1" in row.computed_by for row in rows)
    prove_quickly(network)

    right = EnsembleEvaluator.__call__

    def without_bessel(self: EnsembleEvaluator, *args: object, **options: object) -> hessquik.Derivatives:
        found = right(self, *args, **options)  # type: ignore[arg-type]
        found._found["value_std"] = found._found["value_std"] * 0.7071
        return found

    monkeypatch.setattr(EnsembleEvaluator, "__call__", without_bessel)
    assert {row.quantity for row in prove(network, samples=2) if not row.passed} == {"value_std"}
    monkeypatch.undo()

    wrong = EnsembleEvaluator(network)
    wrong.members.reverse()
    with pytest.raises(DerivativeError):
        prove_quickly(network, evaluate=wrong)
