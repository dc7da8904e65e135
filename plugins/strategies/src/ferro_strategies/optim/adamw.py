"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from ferro.errors import UsageError

from ..nn.arrays import Array, namespace_of
from ..nn.parameter import Parameter
from .optimizer import Optimizer, blocks, check_at_least_zero


class AdamW(Optimizer):
    """Adam with decoupled weight decay; its results are those of torch.optim.AdamW.

        p = p * (1 - lr * weight_decay)
        m = beta1 * m + (1 - beta1) * grad         v = beta2 * v + (1 - beta2) * grad**2
        p = p - lr * (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)

    State per parameter: "m" and "v", of its shape and dtype, and "t", its number of steps,
    0-d int64 in host memory.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2.
    """

    def __init__(
        self,
        parameters: Iterable[Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(parameters, lr)
        check_at_least_zero("AdamW", eps=eps, weight_decay=weight_decay)
        if not all(0 <= beta < 1 for beta in betas):
            raise UsageError(f"AdamW: betas must be at least 0 and below 1, got {betas}.")
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay

    def _initial_state(self, data: Array) -> dict[str, Array]:
        xp = namespace_of(data)
        return {
            "m": xp.zeros(data.shape, data.dtype),
            "v": xp.zeros(data.shape, data.dtype),
            "t": np.zeros((), np.int64),
        }

    def _update(self, data: Array, grad: Array, state: dict[str, Array]) -> None:
        state["t"] += 1
        t, xp = int(state["t"]), namespace_of(data)
        beta1, beta2 = self.betas
        step = self.lr / (1 - beta1**t)
        root_correction = math.sqrt(1 - beta2**t)
        for scratch, p, g, m, v in blocks(data, grad, state["m"], state["v"]):
            p *= 1 - self.lr * self.weight_decay
            m *= beta1
            m += xp.multiply(g, 1 - beta1, out=scratch)
            xp.multiply(g, g, out=scratch)
            scratch *= 1 - beta2
            v *= beta2
            v += scratch
            xp.sqrt(v, out=scratch)
            scratch /= root_correction
            scratch += self.eps
            xp.divide(m, scratch, out=scratch)
            scratch *= step
            p -= scratch
