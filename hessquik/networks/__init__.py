"""The documented networks."""

import hessquik.original
from hessquik.networks.architectures import ICNN, fullyConnectedNN, resnetNN
from hessquik.networks.autodiff import NNPytorchAD, NNPytorchHessian
from hessquik.networks.ensemble import Ensemble
from hessquik.networks.network import NN

__all__ = ["ICNN", "NN", "Ensemble", "NNPytorchAD", "NNPytorchHessian", "fullyConnectedNN", "resnetNN"]

hessquik.original.register(__name__)
