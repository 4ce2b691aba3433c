"""Random ONNX graphs, each with the same function in torch, drawn from a seed."""

import random

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch.nn import functional

OPSET = 20
#: Operators of one variable with what torch computes, and the operator's attributes.
SMOOTH = {
    "Tanh": (torch.tanh, {}),
    "Sigmoid": (torch.sigmoid, {}),
    "Softplus": (lambda z: functional.softplus(z, 1.0, 40.0), {}),
    "Softsign": (functional.softsign, {}),
    "Mish": (lambda z: z * torch.tanh(functional.softplus(z, 1.0, 40.0)), {}),
    "Gelu": (functional.gelu, {}),
    "Elu": (functional.elu, {"alpha": 1.0}),
    "Celu": (lambda z: functional.celu(z, 0.5), {"alpha": 0.5}),
    "Sin": (torch.sin, {}),
    "Cos": (torch.cos, {}),
    "Atan": (torch.atan, {}),
    "Erf": (torch.erf, {}),
}
KINKED = {
    "Relu": (torch.relu, {}),
    "LeakyRelu": (lambda z: functional.leaky_relu(z, 0.25), {"alpha": 0.25}),
    "Abs": (torch.abs, {}),
    "Selu": (lambda z: 2.0 * functional.elu(z, 0.5), {"alpha": 0.5, "gamma": 2.0}),
}


class Graph:
    """An ONNX graph that is built node by node, with the equivalent torch function."""

    def __init__(self, seed, dtype=np.float64):
        self.draw, self.rng = random.Random(seed), np.random.default_rng(seed)
        self.dtype, self.nodes, self.constants, self.steps = dtype, [], [], []
        self.d = self.draw.choice((1, 2, 3, 4))

    def constant(self, array):
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def add(self, operator, inputs, f, constants=(), attributes=None):
        """Return a node: its inputs are values (name, width) and then constants; ``f`` is the same in torch."""
        name = f"v{len(self.nodes)}"
        names = [value for value, _ in inputs] + [self.constant(array) for array in constants]
        self.nodes.append(helper.make_node(operator, names, [name], f"node_{name}", **(attributes or {})))
        self.steps.append((name, f, [value for value, _ in inputs]))
        return name

    def normal(self, *shape):
        return (self.rng.standard_normal(shape) / max(1, shape[0]) ** 0.5).astype(self.dtype)

    def linear(self, value, q):
        p = value[1]
        W, b = self.normal(p, q), self.normal(q)
        tW, tb = torch.as_tensor(W).double(), torch.as_tensor(b).double()
        if self.draw.random() < 0.5:
            transposed = self.draw.random() < 0.5
            name = self.add(
                "Gemm", [value], lambda u: u @ tW + tb, (W.T if transposed else W, b), {"transB": int(transposed)}
            )
            return name, q
        product = self.add("MatMul", [value], lambda u: u @ tW, (W,)), q
        return self.add("Add", [product], lambda u: u + tb, (b,)), q

    def pointwise(self, value, kinds):
        operator = self.draw.choice(sorted(kinds))
        f, attributes = kinds[operator]
        return self.add(operator, [value], f, (), attributes), value[1]

    def scaled(self, value):
        operator = self.draw.choice(("Mul", "Div", "Add", "Sub"))
        c = self.rng.uniform(0.5, 1.5, value[1]).astype(self.dtype)
        f = {"Mul": torch.mul, "Div": torch.div, "Add": torch.add, "Sub": torch.sub}[operator]
        t = torch.as_tensor(c).double()
        return self.add(operator, [value], lambda u: f(u, t), (c,)), value[1]

    def normalised(self, value):
        w = value[1]
        arrays = [self.rng.uniform(0.5, 1.5, w).astype(self.dtype) for _ in range(4)]
        scale, offset, mean, var = (torch.as_tensor(array).double() for array in arrays)

        def f(u):
            return functional.batch_norm(u, mean, var, scale, offset, False, 0.0, float(np.float32(1e-5)))

        return self.add("BatchNormalization", [value], f, arrays, {"epsilon": 1e-5}), w

    def gelu(self, value):
        """Add 0.5 x (1 + erf(x / √2)), the form of older opsets."""
        root = self.dtype(2**0.5)
        inner = self.add("Div", [value], lambda u: u / float(root), (root,)), value[1]
        erf = self.add("Erf", [inner], torch.erf), value[1]
        one = self.add("Add", [erf], lambda u: u + 1, (self.dtype(1),)), value[1]
        product = self.add("Mul", [value, one], torch.mul), value[1]
        return self.add("Mul", [product], lambda u: 0.5 * u, (self.dtype(0.5),)), value[1]

    def swish(self, value):
        gate = self.add("Sigmoid", [value], torch.sigmoid), value[1]
        return self.add("Mul", [value, gate], torch.mul), value[1]

    def reshaped(self, value):
        shape = np.array([0, 1, -1])
        cube = self.add("Reshape", [value], lambda u: u.reshape(len(u), 1, -1), (shape,)), value[1]
        return self.add("Squeeze", [cube], lambda u: u.squeeze(1), (np.array([1]),)), value[1]

    def block(self, value, kinds):
        w = self.draw.choice((1, 2, 3, 5))

        def plain():
            return self.pointwise(self.linear(value, w), kinds)

        def residual():
            body = self.linear(plain(), value[1])
            return self.add("Add", [value, body], torch.add), value[1]

        def dense():
            body = plain()
            attributes = {"axis": self.draw.choice((1, -1))}
            name = self.add("Concat", [body, value], lambda a, b: torch.cat([a, b], 1), (), attributes)
            return name, body[1] + value[1]

        def product():
            return self.add("Mul", [plain_of(w), plain_of(w)], torch.mul), w

        def plain_of(q):
            return self.pointwise(self.linear(value, q), kinds)

        makers = [plain, plain, plain, residual, dense, product]
        makers += [lambda f=f: f(value) for f in (self.scaled, self.normalised, self.reshaped)]
        if kinds is SMOOTH:
            makers += [lambda: self.gelu(self.linear(value, w)), lambda: self.swish(self.linear(value, w))]
        return self.draw.choice(makers)()


def model(seed, kinds=SMOOTH, dtype=np.float64):
    """Return a model, its number of inputs, and the same function of float64 tensors."""
    graph = Graph(seed, dtype)
    value = ("x", graph.d)
    for _ in range(graph.draw.choice((1, 2, 3))):
        value = graph.block(value, kinds)
    value = graph.linear(value, graph.draw.choice((1, 2)))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    made = helper.make_graph(
        graph.nodes,
        "random",
        [helper.make_tensor_value_info("x", kind, ["n", graph.d])],
        [helper.make_tensor_value_info(value[0], kind, ["n", value[1]])],
        graph.constants,
    )
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    onnx.checker.check_model(proto)

    def f(x):
        values = {"x": x}
        for name, step, inputs in graph.steps:
            values[name] = step(*(values[each] for each in inputs))
        return values[value[0]]

    return proto, graph.d, f
