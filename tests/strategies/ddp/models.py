"""Models of one number per layer, for tests of what DDP sends and when."""

import numpy as np

import ferro
from ferro_strategies.nn import Module, Parameter

TINY = {"bucket_bytes": 8, "first_bucket_bytes": 8}  # a bucket for each parameter


def simulate(function, world_size, **options):
    return ferro.simulate(function, world_size, timeout_s=10, run_timeout_s=30, **options)


class Scale(Module):
    """y = factor * x, one number."""

    def __init__(self):
        self.factor = Parameter(np.ones(1))

    def vjp(self, x):
        factor = self.factor.use()

        def pullback(grad):
            factor.add_grad(np.array([(grad * x).sum()]))
            return grad * factor.data

        return x * factor.data, pullback


class Switch(Module):
    """Run the branches whose indices are in `chosen`, and add their outputs."""

    def __init__(self, count=3):
        self.branches = [Scale() for _ in range(count)]
        self.chosen = list(range(count))

    def vjp(self, x):
        runs = [self.branches[index].vjp(x) for index in self.chosen]

        def pullback(grad):
            for _, pull in reversed(runs):
                pull(grad)

        return sum((y for y, _ in runs), np.zeros_like(x)), pullback


def backward(model, value=1.0):
    y, pullback = model.vjp(np.array([value]))
    pullback(np.ones_like(y))


def grads(model):
    return [None if item.grad is None else float(item.grad[0]) for item in model.parameters()]
