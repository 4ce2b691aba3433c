"""Random ONNX graphs, each with the same function in torch, drawn from a seed."""

import random

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch.nn import functional

#: Versions of the operators from which models are drawn.
OPSETS = range(7, 27)
#: Versions from which on operators are there; the others are there from the first.
SINCE = {
    **dict.fromkeys(("Erf", "Shrink", "Where"), 9),
    "ThresholdedRelu": 10,
    **dict.fromkeys(("Celu", "Einsum"), 12),
    "HardSwish": 14,
    "LayerNormalization": 17,
    "Mish": 18,
    "Gelu": 20,
    "GroupNormalization": 21,
    "RMSNormalization": 23,
    "Swish": 24,
}
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
    "Swish": (lambda z: z * torch.sigmoid(0.75 * z), {"alpha": 0.75}),
}
KINKED = {
    "Relu": (torch.relu, {}),
    "LeakyRelu": (lambda z: functional.leaky_relu(z, 0.25), {"alpha": 0.25}),
    "Abs": (torch.abs, {}),
    "Selu": (lambda z: 2.0 * functional.elu(z, 0.5), {"alpha": 0.5, "gamma": 2.0}),
    "HardSigmoid": (lambda z: (0.25 * z + 0.5).clamp(0.0, 1.0), {"alpha": 0.25}),
    "HardSwish": (functional.hardswish, {}),
    "Shrink": (lambda z: functional.softshrink(z, 0.25), {"lambd": 0.25, "bias": 0.25}),
    "ThresholdedRelu": (torch.relu, {"alpha": 0.0}),
}


class Graph:
    """An ONNX graph that is built node by node, with the equivalent torch function."""

    def __init__(self, seed, dtype=np.float64):
        self.draw, self.rng = random.Random(seed), np.random.default_rng(seed)
        self.dtype, self.nodes, self.constants, self.steps = dtype, [], [], []
        self.d, self.opset = self.draw.choice((1, 2, 3, 4)), self.draw.choice(OPSETS)

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

    def has(self, operator):
        """Return True if the operators of this version have this one."""
        return SINCE.get(operator, 1) <= self.opset

    def moved(self, operator, value, f, width, since, **lists):
        """Add an operator whose lists are attributes before version ``since``, and inputs from it on."""
        if self.opset < since:
            return self.add(operator, [value], f, (), lists), width
        return self.add(operator, [value], f, [np.array(each) for each in lists.values()]), width

    def pointwise(self, value, kinds):
        operator = self.draw.choice([name for name in sorted(kinds) if self.has(name)])
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

    def standardised(self, value):
        """Add a normalisation of a row by its own mean and variance; ε is large, since rows are short."""
        value, w = self.linear(value, 4), 4
        kinds = {
            "LayerNormalization": lambda u, s, o: functional.layer_norm(u, (w,), s, o, 0.5),
            "RMSNormalization": lambda u, s, o: functional.rms_norm(u, (w,), s, 0.5),
            "GroupNormalization": lambda u, s, o: functional.group_norm(u, 2, s, o, 0.5),
            "InstanceNormalization": lambda u, s, o: functional.instance_norm(
                u.reshape(-1, 2, 2), None, None, s[:2], o[:2], True, 0.0, 0.5
            ),
        }
        operator = self.draw.choice([name for name in kinds if self.has(name)])
        scale, offset = (self.rng.uniform(0.5, 1.5, w).astype(self.dtype) for _ in range(2))
        constants, attributes = [scale, offset], {"epsilon": 0.5}
        if operator == "RMSNormalization":
            constants = [scale]
        if operator == "GroupNormalization":
            attributes["num_groups"] = 2
        ts, to = (torch.as_tensor(array).double() for array in (scale, offset))
        if operator == "InstanceNormalization":
            constants = [scale[:2], offset[:2]]
            shape = self.add("Reshape", [value], lambda u: u.reshape(-1, 2, 2), (np.array([0, 2, 2]),)), w
            normal = self.add(operator, [shape], lambda u: kinds[operator](u, ts, to), constants, attributes), w
            return self.add("Flatten", [normal], lambda u: u.reshape(len(u), -1)), w
        return self.add(operator, [value], lambda u: kinds[operator](u, ts, to), constants, attributes), w

    def matrix(self, value):
        """Add the product of two matrices that both depend on the inputs."""
        a, b = ((self.linear(value, 4)) for _ in range(2))
        shape = np.array([0, 2, 2])
        a, b = ((self.add("Reshape", [each], lambda u: u.reshape(-1, 2, 2), (shape,)), 4) for each in (a, b))
        if self.has("Einsum") and self.draw.random() < 0.5:
            name = self.add("Einsum", [a, b], lambda u, v: (u * v).sum(-1), (), {"equation": "nij,nij->ni"})
            return name, 2
        product = self.add("MatMul", [a, b], torch.matmul), 4
        return self.add("Flatten", [product], lambda u: u.reshape(len(u), -1)), 4

    def masked(self, value):
        """Add a choice between two values by a constant mask."""
        other, mask = self.pointwise(value, SMOOTH), self.rng.random(value[1]) < 0.5
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node("Where", [self.constant(mask), value[0], other[0]], [name]))
        self.steps.append((name, lambda u, v: torch.where(torch.as_tensor(mask), u, v), [value[0], other[0]]))
        return name, value[1]

    def reduced(self, value):
        """Add one of the reductions of the features to one number, next to the value."""
        kinds = {
            "ReduceSum": (13, lambda u: u.sum(1, keepdim=True)),
            "ReduceMean": (18, lambda u: u.mean(1, keepdim=True)),
            "ReduceSumSquare": (18, lambda u: (u * u).sum(1, keepdim=True)),
        }
        operator = self.draw.choice(sorted(kinds))
        since, f = kinds[operator]
        one = self.moved(operator, value, f, 1, since, axes=[1])
        return self.add("Add", [value, one], torch.add), value[1]

    def halves(self, value):
        """Add a gated linear unit from a split."""
        w = self.draw.choice((1, 2))
        both = self.linear(value, 2 * w)
        parts = [f"v{len(self.nodes)}_{side}" for side in "ab"]
        inputs, attributes = [both[0]], {"axis": 1}
        if self.opset < 13:
            attributes["split"] = [w, w]
        else:
            inputs.append(self.constant(np.array([w, w])))
        self.nodes.append(helper.make_node("Split", inputs, parts, **attributes))
        self.steps += [(part, lambda u, i=i: u.chunk(2, 1)[i], [both[0]]) for i, part in enumerate(parts)]
        gate = self.add("Sigmoid", [(parts[1], w)], torch.sigmoid), w
        return self.add("Mul", [(parts[0], w), gate], torch.mul), w

    def dropped(self, value):
        attributes = {"ratio": 0.5} if self.opset < 12 else {}
        return self.add("Dropout", [value], lambda u: u, (), attributes), value[1]

    def clipped(self, value):
        if self.opset < 11:
            return self.add("Clip", [value], lambda u: u.clamp(-1, 1), (), {"min": -1.0, "max": 1.0}), value[1]
        bounds = [self.dtype(-1), self.dtype(1)]
        return self.add("Clip", [value], lambda u: u.clamp(-1, 1), bounds), value[1]

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
        return self.moved("Squeeze", cube, lambda u: u.squeeze(1), value[1], 13, axes=[1])

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
        makers += [
            lambda f=f: f(value)
            for f in (self.scaled, self.normalised, self.reshaped, self.reduced, self.halves, self.dropped)
        ]
        if kinds is SMOOTH:
            makers += [lambda: self.swish(self.linear(value, w)), lambda: self.standardised(value)]
            makers += [lambda: self.gelu(self.linear(value, w))] if self.has("Erf") else []
            makers += [lambda: self.masked(self.linear(value, w))] if self.has("Where") else []
            makers += [lambda: self.matrix(value)]
        else:
            makers += [lambda: self.clipped(value)]
        return self.draw.choice(makers)()


def model(seed, kinds=SMOOTH, dtype=np.float64):
    """Return a model, its number of inputs, and the same function of float64 tensors."""
    graph = Graph(seed, dtype)
    value = ("x", graph.d)
    for _ in range(graph.draw.choice((1, 2, 3))):
        value = graph.block(value, kinds)
    graph.add("Floor", [value], torch.floor)  # which nothing needs
    value = graph.linear(value, graph.draw.choice((1, 2)))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    made = helper.make_graph(
        graph.nodes,
        "random",
        [helper.make_tensor_value_info("x", kind, ["n", graph.d])],
        [helper.make_tensor_value_info(value[0], kind, ["n", value[1]])],
        graph.constants,
    )
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", graph.opset)], ir_version=9)
    onnx.checker.check_model(proto)

    def f(x):
        values = {"x": x}
        for name, step, inputs in graph.steps:
            values[name] = step(*(values[each] for each in inputs))
        return values[value[0]]

    return proto, graph.d, f
