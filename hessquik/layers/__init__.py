"""The documented layers; :mod:`hessquik.layers.form` has the form that they share."""

import hessquik.original
from hessquik.layers.base import hessQuikLayer
from hessquik.layers.convex import ICNNLayer
from hessquik.layers.quadratic import quadraticICNNLayer, quadraticLayer
from hessquik.layers.residual import resnetLayer
from hessquik.layers.single import singleLayer
from hessquik.layers.skip import skipLayer

__all__ = [
    "ICNNLayer",
    "hessQuikLayer",
    "quadraticICNNLayer",
    "quadraticLayer",
    "resnetLayer",
    "singleLayer",
    "skipLayer",
]

hessquik.original.register(__name__)
