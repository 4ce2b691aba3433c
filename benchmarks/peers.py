"""Other programs for the same derivatives: the original hessQuik, automatic differentiation in torch and JAX, folx.

A peer is a call on points and directions, in the layout that is its own, and a way to read its answer as ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from hessquik.activations import identityActivation, quadraticActivation, softplusActivation, tanhActivation
from hessquik.layers import ICNNLayer, quadraticICNNLayer, resnetLayer, singleLayer
from hessquik.networks import NN

try:
    import folx
except ImportError:
    folx = None
try:
    import hessQuik.activations as original_activations
    import hessQuik.layers as original_layers
    import hessQuik.networks as original_networks
except ImportError:
    original_networks = None

__all__ = ["NAMES", "QUANTITIES", "Peer", "exact", "peers"]

jax.config.update("jax_enable_x64", True)  # for rows in float64; what is given in float32 stays so

NAMES = ["hessQuik 0.0.6", "its NNPytorchAD", "torch.func", "torch.compile", "JAX", "folx"]
#: The original holds w³ numbers per point for a Hessian, several times; above this it is left out.
MOST_BYTES = 5 << 29
#: Columns one at a time: above this many autograd passes, that way is left out.
MOST_PASSES = 2100
QUANTITIES = {
    "hessian": ("value", "gradient", "hessian"),
    "laplacian": ("laplacian",),
    "hvp": ("hvp",),
    "curvature": ("curvature",),
    "jvp": ("jvp",),
}


@dataclass
class Peer:
    """One implementation that computes the requested quantities.

    Attributes:
        call: (x, v) ↦ its answer.
        takes_jax: Whether it is given JAX's arrays.
        outputs_first: Whether the outputs' axis stands before those of the inputs, and not last as in ours.
        compile_s: How long it took to compile.
    """

    call: Callable[[Any, Any], Any]
    takes_jax: bool = False
    outputs_first: bool = True
    compile_s: float = 0.0

    def arrays(self, *tensors: Tensor) -> tuple[Any, ...]:
        """Return the inputs in the implementation's own types."""
        return tuple(jnp.array(tensor.numpy()) for tensor in tensors) if self.takes_jax else tensors

    def read(self, out: Any, what: str) -> list[Tensor]:
        """Return an answer in our layout and float64, in the order of QUANTITIES."""
        found = [torch.from_numpy(np.array(part)) if self.takes_jax else part for part in out]
        # How many axes of inputs stand behind the outputs.
        axes = {"hessian": (0, 1, 2), "hvp": (1,)}.get(what, (0,))
        if self.outputs_first:
            found = [part.movedim(-1 - behind, -1) for part, behind in zip(found, axes, strict=True)]
        return [part.detach().double() for part in found]


def function(network: NN, xp: Any, array: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    """The network as a function of one point, in torch or jax.numpy: z = Σ uᵢPᵢ + b, y = Σ uᵢSᵢ + σ(z)Q + μ."""
    softplus = torch.nn.functional.softplus if xp is torch else jax.nn.softplus
    joined = torch.cat if xp is torch else jnp.concatenate
    sigma = {tanhActivation: xp.tanh, softplusActivation: softplus, quadraticActivation: lambda z: 0.5 * z * z}

    def moved(linear: Any) -> Any:
        return array(linear.detach()) if isinstance(linear, Tensor) else linear

    forms = [
        (
            form,
            [moved(p) for p in form.into],
            [moved(s) for s in form.skip],
            *map(moved, (form.out, form.bias, form.offset)),
        )
        for form in network.forms()
    ]

    def term(u: Any, linear: Any) -> list[Any]:
        return [] if linear is None else [u * linear if isinstance(linear, float) else u @ linear]

    def f(x: Any) -> Any:
        parts = (x,)
        for form, into, skip, out, bias, offset in forms:
            if tuple(len(part) for part in parts) != form.widths:
                whole, cuts = joined(parts), [sum(form.widths[:i]) for i in range(len(form.widths) + 1)]
                parts = tuple(whole[a:b] for a, b in pairwise(cuts))
            z = sum(t for u, p in zip(parts, into, strict=True) for t in term(u, p))
            z = z if bias is None else z + bias
            s = z if isinstance(form.activation, identityActivation) else sigma[type(form.activation)](z)
            y = sum([*(t for u, p in zip(parts, skip, strict=True) for t in term(u, p)), *term(s, out)])
            y = y if offset is None else y + offset
            parts = (y, *(parts[-1:] if form.carries else ()))
        return parts[0]

    return f


def of_one_point(f: Callable[[Any], Any], what: str, transforms: Any) -> Callable[[Any, Any], Any]:
    """Return the derivatives of f at x by torch.func's or JAX's transforms, forward over reverse mode."""
    jacfwd, jacrev, jvp = transforms.jacfwd, transforms.jacrev, transforms.jvp

    def with_gradient(x: Any) -> Any:
        J, y = jacrev(lambda x: (f(x),) * 2, has_aux=True)(x)
        return J, (y, J)

    def hessian(x: Any, v: Any) -> Any:
        H, (y, J) = jacfwd(with_gradient, has_aux=True)(x)
        return y, J, H

    def laplacian(x: Any, v: Any) -> Any:
        return (jacfwd(jacrev(f))(x).diagonal(0, -2, -1).sum(-1),)

    def along(g: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
        return lambda x, v: (transforms.vmap(lambda v: jvp(g, (x,), (v,))[1])(v),)

    def curvature(x: Any, v: Any) -> Any:
        def bend(v: Any) -> Any:
            return jvp(lambda x: jvp(f, (x,), (v,))[1], (x,), (v,))[1]

        return (transforms.vmap(bend)(v),)

    ways = {"hessian": hessian, "laplacian": laplacian, "curvature": curvature}
    return {**ways, "jvp": along(f), "hvp": along(jacrev(f))}[what]


def exact(network: NN, what: str, x: Tensor, v: Tensor) -> list[Tensor]:
    """Return the quantities by automatic differentiation in float64."""
    one = of_one_point(function(network, torch, Tensor.double), what, torch.func)
    out = torch.func.vmap(one, (0, None))(x.double(), v.double())
    return Peer(lambda x, v: None).read(out, what)


def in_original(network: NN) -> Any:
    """Return the same network in hessQuik 0.0.6, which needs a separate activation object for each layer."""

    def copy(module: Any) -> Any:
        act = getattr(getattr(module, "layer", module), "act", None)
        own = getattr(original_activations, type(act).__name__)() if act is not None else None
        if isinstance(module, NN):
            return original_networks.NN(*map(copy, module))
        if isinstance(module, resnetLayer):
            return original_layers.resnetLayer(module.width, h=module.h, act=own)
        if isinstance(module, singleLayer):
            return original_layers.singleLayer(module.in_features, module.out_features, act=own)
        if isinstance(module, ICNNLayer):
            return original_layers.ICNNLayer(module.input_dim, module.in_features, module.out_features, act=own)
        assert isinstance(module, quadraticICNNLayer)
        return original_layers.quadraticICNNLayer(module.input_dim, module.in_features, module.rank)

    whole = copy(network).to(next(network.parameters()).dtype)
    whole.load_state_dict(network.state_dict())
    return whole


def originals(network: NN, what: str, n: int) -> dict[str, Peer]:
    """Return the original's implementations by name and mode."""
    if original_networks is None or what not in {"hessian", "laplacian"}:
        return {}
    copy, found = in_original(network), {}
    d, m = network.dim_input(), network.dim_output()
    is_convex = any(isinstance(module, ICNNLayer) for module in network.modules())
    hidden = [form.bias.shape[0] for form in network.forms() if form.bias is not None]
    if what == "laplacian":
        if is_convex:  # the original ignores what is asked of it
            return {}
        forward = {"do_gradient": True, "do_Laplacian": True, "forward_mode": True}
        return {NAMES[0]: Peer(lambda x, v: (copy(x, **forward)[2].reshape(-1, m),), outputs_first=False)}
    both = {"do_gradient": True, "do_Hessian": True}
    if n * max(hidden) ** 3 * 4 < MOST_BYTES:
        for mode in ("forward", "backward"):
            asked = {**both, "forward_mode": mode == "forward"}
            found[f"{NAMES[0]} {mode}"] = Peer(lambda x, v, asked=asked: copy(x, **asked), outputs_first=False)
    if d * m <= MOST_PASSES:
        by_columns = original_networks.NNPytorchAD(copy)
        # It marks its input, so it is given one of its own.
        found[NAMES[1]] = Peer(lambda x, v: by_columns(x.detach(), **both), outputs_first=False)
    return found


def compiled(way: Callable[[Any, Any], Any], x: Tensor, v: Tensor) -> Peer:
    """Return ``way``, traced and then compiled by torch; its compiler fails on the transforms themselves."""
    begin = time.perf_counter()
    torch._dynamo.reset()
    graph = torch.compile(make_fx(way)(x, v), dynamic=False, fullgraph=True)

    def call(x: Tensor, v: Tensor) -> Any:
        with torch.no_grad():
            return graph(x, v)

    call(x, v)
    return Peer(call, compile_s=time.perf_counter() - begin)


def peers(network: NN, what: str, x: Tensor, v: Tensor, may_compile: bool) -> dict[str, Peer]:
    """Return all implementations by name; those of the original are named by its modes."""
    found = originals(network, what, len(x))
    way = torch.func.vmap(of_one_point(function(network, torch, lambda tensor: tensor), what, torch.func), (0, None))
    found["torch.func"] = Peer(way)
    if may_compile:
        found["torch.compile"] = compiled(way, x, v)
    f = function(network, jnp, lambda tensor: jnp.array(tensor.numpy()))
    in_jax = [("JAX", of_one_point(f, what, jax))]
    if folx is not None and what == "laplacian":
        in_jax.append(("folx", lambda x, v: (folx.forward_laplacian(f)(x).laplacian,)))
    for name, one in in_jax:
        jit = jax.jit(jax.vmap(one, (0, None)))
        found[name] = Peer(lambda x, v, jit=jit: jax.block_until_ready(jit(x, v)), takes_jax=True)
    return found
