"""An activation as users write it, in a file of their own."""

import torch

from hessquik.activations import hessQuikActivationFunction


class mishActivation(hessQuikActivationFunction):
    """σ(x) = x tanh(log(1 + eˣ))."""

    def evaluate(self, x):
        t = torch.tanh(torch.nn.functional.softplus(x))
        return x * t, (x, t)

    def compute_derivatives(self, *args, do_Hessian=False):
        x, t = args
        s = torch.sigmoid(x)
        dt = (1 - t * t) * s
        d2t = dt * (1 - s) - 2 * t * dt * s
        return t + x * dt, 2 * dt + x * d2t if do_Hessian else None
