"""The documented tools; each check passes what is right and refuses every way of being wrong."""

import inspect
import math

import pytest
import torch

from hessquik import layers as lay
from hessquik import networks as net
from hessquik import utils
from hessquik.activations import ACTIVATIONS, identityActivation, softplusActivation, tanhActivation
from hessquik.errors import ShapeError
from hessquik.utils import taylor, training
from tests.engine.random_networks import tame

#: What ``from hessQuik.utils import *`` gives with the original.
ORIGINAL = {
    "convert_to_base",
    "extract_data",
    "insert_data",
    "module_getattr",
    "module_setattr",
    "input_derivative_check",
    "input_derivative_check_finite_difference",
    "input_derivative_check_finite_difference_laplacian",
    "network_derivative_check",
    "timing_test",
    "peaks",
    "train_one_epoch",
    "test",
    "print_headers",
    "directional_derivative_check",
    "directional_derivative_laplacian_check",
}
T = tanhActivation()
NETWORKS = {
    "resnet": lambda: net.NN(lay.singleLayer(4, 6, T), net.resnetNN(6, 2, 0.5, T), lay.singleLayer(6, 3)),
    "convex": lambda: net.NN(net.ICNN(4, [None, 5, 7]), lay.quadraticICNNLayer(4, 7, 2)),
    "convex open": lambda: net.ICNN(4, [None, 5, 3]),
    "linear": lambda: net.NN(lay.singleLayer(4, 2, identityActivation())),
    "quadratic": lambda: net.NN(lay.quadraticLayer(4, 2)),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def case(name, n=5):
    return tame(NETWORKS[name](), 0), torch.randn(n, 4, dtype=torch.float64)


def wrong(network, place, change):
    """Return a function that evaluates the network and changes one of its results."""

    def f(x, **asked):
        results = list(network(x, **asked))
        if results[place] is not None:
            results[place] = change(results[place])
        return tuple(results)

    return f


def scaled(factor):
    return lambda tensor: factor * tensor


def shifted(by):
    return lambda tensor: tensor + by


def noisy(tensor):
    return torch.randn_like(tensor)


def nan(tensor):
    return torch.full_like(tensor, math.nan)


WRONG = {
    "negative": scaled(-1.0),
    "zero": scaled(0.0),
    "1 % off": scaled(1.01),
    "0.2 shift": shifted(0.2),
    "noise": noisy,
    "nan": nan,
}
GRADIENT, SECOND = 1, 2


def test_everything_the_original_exports_is_here():
    assert set(utils.__all__) >= ORIGINAL
    for name in ORIGINAL:
        assert callable(getattr(utils, name))


def test_the_documented_test_is_none_for_pytest():
    assert utils.test.__test__ is False


@pytest.mark.parametrize("forward_mode", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_taylor_and_differences_pass_what_is_right(name, forward_mode):
    f, x = case(name)
    asked = {"do_Hessian": True, "forward_mode": forward_mode}
    assert utils.input_derivative_check(f, x, **asked) == (True, True)
    assert utils.input_derivative_check_finite_difference(f, x, **asked) == (True, True)
    assert utils.input_derivative_check_finite_difference_laplacian(f, x, do_Laplacian=True) == (True, True)
    assert utils.network_derivative_check(f, x, **asked) is True


@pytest.mark.parametrize("name", NETWORKS)
def test_directions_pass_what_is_right(name):
    f, x = case(name)
    assert utils.directional_derivative_check(f, x) == (True, True, True, True)
    assert utils.directional_derivative_laplacian_check(f, x) == (True, True)


def test_what_was_not_asked_for_is_not_judged():
    f, x = case("resnet")
    assert utils.input_derivative_check(f, x) == (True, None)
    assert utils.input_derivative_check_finite_difference(f, x) == (True, None)
    assert utils.input_derivative_check_finite_difference_laplacian(f, x) == (True, None)
    assert utils.network_derivative_check(f, x) is True


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_taylor_passes_every_activation(name):
    x = torch.randn(11, 4, dtype=torch.float64)
    assert utils.input_derivative_check(ACTIVATIONS[name](), x, do_Hessian=True) == (True, True)


def test_taylor_refuses_an_activation_with_wrong_derivatives():
    class wrongTanh(tanhActivation):
        def compute_derivatives(self, *args, do_Hessian=False):
            dsigma, d2sigma = super().compute_derivatives(*args, do_Hessian=do_Hessian)
            return 1.01 * dsigma, d2sigma

    assert utils.input_derivative_check(wrongTanh(), torch.randn(11, 4, dtype=torch.float64), do_Hessian=True) == (
        False,
        False,
    )


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", ["resnet", "convex"])
def test_taylor_refuses_a_wrong_gradient(name, kind):
    f, x = case(name)
    assert utils.input_derivative_check(wrong(f, GRADIENT, WRONG[kind]), x)[0] is False


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", ["resnet", "convex"])
def test_taylor_refuses_a_wrong_hessian(name, kind):
    f, x = case(name)
    assert utils.input_derivative_check(wrong(f, SECOND, WRONG[kind]), x, do_Hessian=True) == (True, False)


@pytest.mark.parametrize("seed", range(20))
def test_taylor_refuses_a_gradient_that_is_nearly_right(seed):
    """A gradient that is wrong by 0.1 % is refused, although for large steps its error decreases as expected."""
    torch.manual_seed(seed)
    f, x = case("resnet")
    assert utils.input_derivative_check(wrong(f, GRADIENT, scaled(1.001)), x)[0] is False


@pytest.mark.parametrize("seed", range(20))
def test_taylor_passes_whatever_the_direction(seed):
    torch.manual_seed(seed)
    for name in NETWORKS:
        f, x = case(name)
        assert utils.input_derivative_check(f, x, do_Hessian=True) == (True, True)


@pytest.mark.parametrize("kind", WRONG)
def test_differences_refuse_what_is_wrong(kind):
    f, x = case("resnet")
    check = utils.input_derivative_check_finite_difference
    assert check(wrong(f, GRADIENT, WRONG[kind]), x, do_Hessian=True) == (False, True)
    assert check(wrong(f, SECOND, WRONG[kind]), x, do_Hessian=True) == (True, False)


@pytest.mark.parametrize("kind", WRONG)
def test_differences_refuse_a_wrong_laplacian(kind):
    f, x = case("resnet")
    check = utils.input_derivative_check_finite_difference_laplacian
    assert check(wrong(f, GRADIENT, WRONG[kind]), x, do_Laplacian=True) == (False, True)
    assert check(wrong(f, SECOND, WRONG[kind]), x, do_Laplacian=True) == (True, False)


def test_differences_refuse_a_small_wrong_gradient():
    """The gradient's error is below the absolute bound, but not below the relative one."""
    f = net.NN(lay.singleLayer(4, 1, identityActivation(), dtype=torch.float64))
    with torch.no_grad():
        f[0].K.mul_(1e-6)
    x = torch.randn(3, 4, dtype=torch.float64)
    assert utils.input_derivative_check_finite_difference(f, x)[0] is True
    assert utils.input_derivative_check_finite_difference(wrong(f, GRADIENT, scaled(-1.0)), x)[0] is False


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("forward_mode", [True, False])
@pytest.mark.parametrize("place", [GRADIENT, SECOND])
def test_directions_refuse_what_is_wrong(place, forward_mode, kind):
    """Each of the four flags sees its own derivative and no other."""
    f, x = case("resnet")
    changed = wrong(f, place, WRONG[kind])

    def g(x, v=None, **asked):
        return (changed if v is not None and asked["forward_mode"] is forward_mode else f)(x, v=v, **asked)

    flags = [True] * 4
    flags[2 * (not forward_mode) + place - 1] = False
    assert utils.directional_derivative_check(g, x) == tuple(flags)


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("place", [GRADIENT, SECOND])
def test_directional_laplacians_refuse_what_is_wrong(place, kind):
    f, x = case("resnet")
    changed = wrong(f, place, WRONG[kind])

    def g(x, v=None, **asked):
        return (f if v is None else changed)(x, v=v, **asked)

    assert utils.directional_derivative_laplacian_check(g, x) == (place != GRADIENT, place != SECOND)


class Detached(torch.nn.Module):
    """A network whose derivatives are right, but detached from the weights."""

    def __init__(self, network, place):
        super().__init__()
        self.network, self.place = network, place

    def forward(self, x, **asked):
        results = list(self.network(x, **asked))
        results[self.place] = results[self.place].detach()
        return tuple(results)


@pytest.mark.parametrize("place", [0, GRADIENT, SECOND], ids=["value", "gradient", "hessian"])
@pytest.mark.parametrize("forward_mode", [True, False])
def test_weights_refuse_derivatives_that_are_not_differentiable(place, forward_mode):
    f, x = case("resnet")
    assert utils.network_derivative_check(Detached(f, place), x, do_Hessian=True, forward_mode=forward_mode) is False


def test_weights_are_left_as_they_were():
    f, x = case("convex")
    before = {name: tensor.clone() for name, tensor in f.state_dict().items()}
    utils.network_derivative_check(f, x, do_Hessian=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in f.state_dict().items())
    assert all(parameter.grad is None for parameter in f.parameters())


def test_printouts_are_as_documented(capsys):
    f, x = case("resnet")
    utils.input_derivative_check(f, x, do_Hessian=True, verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["h", "E0", "E1", "E2"]
    assert lines[1].startswith("1.00 x 2^(00)\t\t")
    assert lines[15].startswith("1.00 x 2^(-14)\t\t")
    assert lines[16:] == ["Gradient PASSED!", "Hessian PASSED!"]

    utils.input_derivative_check(wrong(f, GRADIENT, noisy), x, verbose=True, base=10.0, num_test=6)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("1.00 x 10^(-01)\t\t")
    assert lines[-1] == "Gradient FAILED."

    utils.input_derivative_check_finite_difference(f, x, do_Hessian=True, verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Gradient Finite Difference: Error = ")
    assert ", Relative Error = " in lines[0]
    assert lines[1] == "Gradient PASSED!"
    assert lines[2].startswith("Hessian Finite Difference: Error = ")
    assert lines[3] == "Hessian PASSED!"

    utils.input_derivative_check_finite_difference_laplacian(f, x, do_Laplacian=True, verbose=True)
    assert "Laplacian Finite Difference: Error = " in capsys.readouterr().out

    utils.network_derivative_check(f, x, verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["h", "E0", "E1"]
    assert lines[-1] == "Gradient PASSED!"

    utils.directional_derivative_check(f, x, verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FORWARD MODE: grad = ")
    assert "\t hess = " in lines[0]
    assert lines[1:3] == ["\t Gradient PASSED!", "\t Hessian PASSED!"]
    assert lines[3].startswith("BACKWARD MODE: grad = ")

    utils.directional_derivative_laplacian_check(f, x, verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert "\t lap = " in lines[0]
    assert lines[2] == "\t Laplacian PASSED!"


@pytest.mark.parametrize("num_test", [-1, 0, 1, 2, 3, 4, 5, 30])
def test_any_number_of_steps_judges(num_test, capsys):
    f, x = case("resnet")
    asked = {"do_Hessian": True, "num_test": num_test, "verbose": True}
    assert utils.input_derivative_check(f, x, **asked) == (True, True)
    assert len(capsys.readouterr().out.splitlines()) == 1 + max(num_test, 0) + 2
    assert utils.input_derivative_check(wrong(f, GRADIENT, scaled(1.01)), x, **asked) == (False, False)
    assert utils.input_derivative_check(wrong(f, SECOND, scaled(1.01)), x, **asked) == (True, False)
    assert utils.network_derivative_check(f, x, num_test=num_test) is True


def test_too_few_errors_show_no_order():
    with pytest.raises(ValueError, match="at least 5 steps, got 3"):
        taylor.observed_order([1.0, 0.5, 0.25], order=1, base=2.0, noise=0.0)


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([4.0**-k for k in range(15)], 2.0),
        ([2.0**-k for k in range(15)], 1.0),
        ([8.0**-k + 1e-9 for k in range(15)], 3.0),  # rounding inside f stops the fall
        ([1e-13] * 15, math.inf),
        ([1.0] * 15, 0.0),
        ([math.nan] * 15, 0.0),
        ([1.0, math.inf] + [0.0] * 13, 0.0),
    ],
    ids=["two", "one", "three above rounding", "rounding alone", "constant", "nan", "inf"],
)
def test_the_observed_order_is_that_of_the_smallest_readable_steps(errors, expected):
    assert taylor.observed_order(errors, 2, 2.0, 1e-12) == pytest.approx(expected, abs=0.05)


def peaks_by_hand(points):
    """Return peaks by the formula in MATLAB's documentation."""
    x, y = points[:, 0], points[:, 1]
    return (
        3 * (1 - x) ** 2 * torch.exp(-(x**2) - (y + 1) ** 2)
        - 10 * (x / 5 - x**3 - y**5) * torch.exp(-(x**2) - y**2)
        - torch.exp(-((x + 1) ** 2) - y**2) / 3
    )


def test_peaks_and_its_derivatives():
    points = 6 * torch.rand(50, 2, dtype=torch.float64) - 3
    f, gradient, hessian = utils.peaks(points, do_gradient=True, do_Hessian=True)
    torch.testing.assert_close(f, peaks_by_hand(points).unsqueeze(1))
    jacobian = torch.func.jacrev(lambda p: peaks_by_hand(p).sum())
    torch.testing.assert_close(gradient.squeeze(-1), jacobian(points))
    torch.testing.assert_close(
        hessian.squeeze(-1), torch.func.jacrev(lambda p: jacobian(p).sum(0))(points).transpose(0, 1)
    )
    assert (f.shape, gradient.shape, hessian.shape) == ((50, 1), (50, 2, 1), (50, 2, 2, 1))


def test_peaks_gives_what_is_asked():
    points = torch.zeros(3, 2)
    assert utils.peaks(points)[1:] == (None, None)
    assert utils.peaks(points, do_gradient=True)[2] is None
    assert utils.peaks(points, do_Hessian=True)[1] is None
    assert utils.peaks(points[:0], do_gradient=True)[1].shape == (0, 2, 1)
    points = torch.randn(5, 2, dtype=torch.float64)
    assert utils.input_derivative_check(utils.peaks, points, do_Hessian=True) == (True, True)
    assert utils.input_derivative_check_finite_difference(utils.peaks, points, do_Hessian=True)[0] is True


def data(n, m=1):
    x = 6 * torch.rand(n, 2, dtype=torch.float64) - 3
    parts = utils.peaks(x, do_gradient=True, do_Hessian=True)
    return x, torch.cat([part.expand(*part.shape[:-1], m).flatten(1) for part in parts], dim=1)


def test_training_lowers_every_part_of_the_loss():
    x, y = data(203)
    f = net.NN(lay.singleLayer(2, 32, T), net.resnetNN(32, 2, 0.5, T), lay.singleLayer(32, 1)).double()
    optimizer = torch.optim.Adam(f.parameters(), lr=1e-2)
    asked = {"do_gradient": True, "do_Hessian": True, "loss_weights": (1.0, 1.0, 0.1)}
    before = utils.test(f, x, y, **asked)
    for _ in range(15):
        running = utils.train_one_epoch(f, x, y, optimizer, batch_size=20, **asked)
    after = utils.test(f, x, y, **asked)
    assert len(before) == len(running) == len(after) == 4
    assert all(new < 0.7 * old for new, old in zip(after, before, strict=True))


@pytest.mark.parametrize("m", [1, 3])
def test_the_loss_is_the_documented_one(m):
    x, y = data(7, m)
    f = tame(net.fullyConnectedNN([2, 8, m], softplusActivation()), 0)
    value, gradient, hessian = f(x, do_gradient=True, do_Hessian=True)
    targets = y.split([m, 2 * m, 4 * m], dim=1)
    parts = [
        float((got.detach().flatten(1) - target).square().sum()) / (2 * 7)
        for got, target in zip((value, gradient, hessian), targets, strict=True)
    ]
    weights = (2.0, 3.0, 5.0)
    found = utils.test(f, x, y, do_gradient=True, do_Hessian=True, loss_weights=weights)
    total = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    assert found == pytest.approx((total, *parts))
    assert utils.test(f, x, y) == pytest.approx((parts[0], parts[0]))
    assert utils.test(f, x, y, do_Hessian=True) == pytest.approx((parts[0] + parts[2], parts[0], parts[2]))


def test_an_epoch_sees_every_sample_once():
    """With a step size of zero the running loss equals the loss; 7 samples make batches of 2, 2, 2 and 1."""
    x, y = data(7)
    f = tame(net.fullyConnectedNN([2, 8, 1]), 0)
    running = utils.train_one_epoch(f, x, y, torch.optim.SGD(f.parameters(), lr=0.0), batch_size=2, do_gradient=True)
    assert running == pytest.approx(utils.test(f, x, y, do_gradient=True))


def test_automatic_differentiation_can_be_trained_too():
    x, y = data(8)
    f = net.NNPytorchAD(tame(net.fullyConnectedNN([2, 8, 1]), 0))
    optimizer = torch.optim.SGD(f.parameters(), lr=1e-3)
    first = utils.train_one_epoch(f, x, y, optimizer, batch_size=8, do_gradient=True, do_Hessian=True)
    assert utils.test(f, x, y, do_gradient=True, do_Hessian=True)[0] < first[0]


def test_too_few_targets_are_refused():
    x, y = data(4)
    f = net.fullyConnectedNN([2, 8, 1], dtype=torch.float64)
    with pytest.raises(ShapeError, match="at least 7 columns, got 3"):
        utils.test(f, x, y[:, :3], do_gradient=True, do_Hessian=True)


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ({}, ["loss", "loss_f", "loss_df"]),
        ({"do_gradient": False}, ["loss", "loss_f"]),
        ({"do_Hessian": True}, ["loss", "loss_f", "loss_df", "loss_d2f"]),
        ({"do_gradient": False, "do_Hessian": True}, ["loss", "loss_f", "loss_d2f"]),
    ],
    ids=["gradient", "value", "all", "hessian"],
)
def test_headers_fit_the_losses(asked, names, capsys):
    headers, printouts, row = utils.print_headers(**asked, verbose=True, loss_weights=(1.0, 2.0, 3.0))
    assert list(printouts) == ["epoch", "time", *3 * ["|", *names]]
    assert len(headers) == len(printouts)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == list(printouts)
    assert "weights" in lines[1]
    losses = [0.5] * len(names)
    assert row.format(1, 2.5, "|", *losses, "|", *losses, "|", *losses).count("5.0000e-01") == 3 * len(names)
    assert len(lines[0].rstrip()) < len(lines[2])


def test_headers_are_silent_unless_asked(capsys):
    utils.print_headers()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("wrapper", ["hessQuik", "PytorchAD", "PytorchHessian"])
@pytest.mark.parametrize("network_type", ["resnet", "fully_connected", "icnn"])
def test_timing_gives_seconds_for_every_pair(network_type, wrapper):
    outputs = torch.tensor([1]) if network_type == "icnn" else torch.tensor([1, 2])
    found = utils.timing_test(
        torch.tensor([1, 3]),
        outputs,
        clear_memory=False,
        nex=3,
        num_trials=2,
        width=4,
        depth=1,
        network_type=network_type,
        network_wrapper=wrapper,
    )
    trials = found["timing_trials"]
    assert trials.shape == (2, len(outputs), 2)
    assert bool((trials > 0).all())
    torch.testing.assert_close(found["timing_trials_mean"], trials.mean(-1))
    torch.testing.assert_close(found["timing_trials_std"], trials.std(-1))
    assert (found["nex"], found["num_trials"]) == (3, 2)
    assert found["out_feature_range"] is outputs


def test_one_trial_has_no_deviation():
    assert float(utils.timing_test([1], [1], num_trials=1)["timing_trials_std"]) == 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_timing_on_a_gpu():
    assert bool((utils.timing_test([2], [1], num_trials=3, device="cuda")["timing_trials"] > 0).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"network_type": "transformer"},
            "network_type must be one of resnet, fully_connected, icnn, got 'transformer'",
        ),
        ({"network_wrapper": "JAX"}, "network_wrapper must be one of hessQuik, PytorchAD, PytorchHessian, got 'JAX'"),
        ({"network_type": "icnn"}, "out_features of an ICNN must be 1, got 2"),
    ],
    ids=["type", "wrapper", "outputs"],
)
def test_what_cannot_be_set_up_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        utils.setup_network(3, 2, 4, 1, **arguments)


def test_networks_for_timing_are_as_wide_and_deep_as_asked():
    assert [layer.dim_output() for layer in utils.setup_resnet(3, 2, 5, 4).layers()] == [5, 5, 5, 5, 5, 2]
    assert utils.setup_fully_connected(3, 2, 5, 2).widths == [3, 5, 5, 2]
    convex = utils.setup_icnn(3, 1, 5, 2)
    assert [len(convex[0]), convex.dim_input(), convex.dim_output()] == [2, 3, 1]
    assert isinstance(utils.setup_network(3, 2, 5, 2, network_wrapper="PytorchHessian"), net.NNPytorchHessian)


def test_parameters_go_out_and_in():
    f = NETWORKS["convex"]()
    theta = utils.extract_data(f)
    assert theta.shape == (sum(parameter.numel() for parameter in f.parameters()),)
    utils.insert_data(f, 2 * theta)
    assert torch.equal(utils.extract_data(f), 2 * theta)
    assert float(utils.extract_data(f, "grad").abs().max()) == 0.0
    f(torch.randn(3, 4))[0].sum().backward()
    grad = utils.extract_data(f, "grad")
    assert torch.equal(grad[: f[0][0].K.numel()], f[0][0].K.grad.flatten())
    theta.zero_()
    assert float(utils.extract_data(f).abs().max()) > 0.0
    with pytest.raises(ShapeError, match="theta must have the shape"):
        utils.insert_data(f, theta[1:])
    assert utils.extract_data(torch.nn.Identity()).shape == (0,)


def test_attributes_are_found_at_any_level():
    f = net.NN(net.resnetNN(4, 2), lay.singleLayer(4, 1))
    assert utils.module_getattr(f, ["0", "1", "layer", "b"]) is f[0][1].layer.b
    assert utils.module_getattr(f, "training") is True
    utils.module_setattr(f, ("0", "1", "h"), 0.5)
    assert f[0][1].h == 0.5
    with pytest.raises(AttributeError):
        utils.module_getattr(f, ("2",))


@pytest.mark.parametrize("number", [1e-300, 0.3, 1.0, 2.0**-1074, 1024.0, 9.99e307])
@pytest.mark.parametrize("base", [2.0, 10.0, 3.0])
def test_numbers_are_written_to_a_base(number, base):
    c, e = utils.convert_to_base((number,), base)
    assert 1.0 <= c < base
    assert c * base**e == pytest.approx(number) or number < 1e-300


def test_numbers_without_such_a_form_are_written_too():
    assert utils.convert_to_base((0.0, -1.0)) == (-1, 0, -1, 0)
    c, e = utils.convert_to_base((math.inf,))
    assert (c, e) == (math.inf, 0)


def test_signatures_are_as_documented():
    documented = {
        "input_derivative_check": ["f", "x", "do_Hessian", "forward_mode", "num_test", "base", "tol", "verbose"],
        "network_derivative_check": ["f", "x", "do_Hessian", "forward_mode", "num_test", "base", "tol", "verbose"],
        "input_derivative_check_finite_difference": [
            "f",
            "x",
            "do_Hessian",
            "forward_mode",
            "eps",
            "atol",
            "rtol",
            "verbose",
        ],
        "input_derivative_check_finite_difference_laplacian": [
            "f",
            "x",
            "do_Laplacian",
            "eps",
            "atol",
            "rtol",
            "verbose",
        ],
        "directional_derivative_check": ["f", "x", "k", "tol", "verbose"],
        "directional_derivative_laplacian_check": ["f", "x", "k", "tol", "verbose"],
        "train_one_epoch": ["f", "x", "y", "optimizer", "batch_size", "do_gradient", "do_Hessian", "loss_weights"],
        "test": ["f", "x", "y", "do_gradient", "do_Hessian", "loss_weights"],
        "print_headers": ["do_gradient", "do_Hessian", "verbose", "loss_weights"],
        "timing_test_cpu": ["f", "x", "num_trials", "clear_memory"],
        "setup_resnet": ["in_features", "out_features", "width", "depth"],
        "convert_to_base": ["a", "b"],
        "extract_data": ["net", "attr"],
        "insert_data": ["net", "theta"],
        "module_getattr": ["obj", "names"],
        "module_setattr": ["obj", "names", "val"],
    }
    for name, arguments in documented.items():
        assert list(inspect.signature(getattr(utils, name)).parameters) == arguments
    assert training.train_one_epoch is utils.train_one_epoch
