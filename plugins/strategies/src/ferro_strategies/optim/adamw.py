"""Adam and AdamW: steps divided by the root of the gradients' mean square; they differ in the weight decay."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ferro.errors import UsageError

from ..nn.arrays import Array, namespace_of, wide_dtype
from ..nn.parameter import Parameter
from .blocks import update_blocks
from .groups import GroupSetting, Parameters, Settings
from .optimizer import MASTER, Optimizer, check_at_least_zero


class AdamW(Optimizer):
    """Adam with decoupled weight decay; its results are those of torch.optim.AdamW.

        p = p * (1 - lr * weight_decay)
        m = beta1 * m + (1 - beta1) * grad         v = beta2 * v + (1 - beta2) * grad**2
        p = p - lr * (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)

    State per parameter: "m" and "v", of its shape, and "t", its number of steps, 0-d int64 in host memory.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2.
    """

    betas = GroupSetting[tuple[float, float]]()
    eps = GroupSetting[float]()
    weight_decay = GroupSetting[float]()
    _decay_in_gradient = False

    def __init__(
        self,
        parameters: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        master_weights: bool = True,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(parameters, settings, master_weights=master_weights)

    @classmethod
    def _check_settings(cls, settings: Settings) -> None:
        super()._check_settings(settings)
        name = cls.__name__
        check_at_least_zero(name, eps=settings["eps"], weight_decay=settings["weight_decay"])
        check_betas(name, settings["betas"])

    def _initial_state(self, parameter: Parameter, settings: Settings) -> dict[str, Array]:
        data = parameter.data
        xp, wide = namespace_of(data), wide_dtype(data.dtype)
        return {"m": xp.zeros(data.shape, wide), "v": xp.zeros(data.shape, wide), "t": np.zeros((), np.int64)}

    def _update(self, parameter: Parameter, grad: Array, state: dict[str, Array], settings: Settings) -> None:
        state["t"] += 1
        t, data, xp = int(state["t"]), parameter.data, namespace_of(parameter.data)
        lr, (beta1, beta2), eps, decay = settings["lr"], settings["betas"], settings["eps"], settings["weight_decay"]
        # Numerator and denominator of the formula are multiplied by the root, which saves one pass over the arrays.
        root = math.sqrt(1 - beta2**t)
        step, eps = lr / (1 - beta1**t) * root, eps * root
        for scratch, p, grad_block, m, v in update_blocks(data, grad, [state["m"], state["v"]], state.get(MASTER)):
            g = grad_block
            if not self._decay_in_gradient:
                p *= 1 - lr * decay
            elif decay != 0:
                g = p * decay
                g += grad_block
            m *= beta1
            m += xp.multiply(g, 1 - beta1, out=scratch)
            xp.multiply(g, g, out=scratch)
            scratch *= 1 - beta2
            v *= beta2
            v += scratch
            xp.sqrt(v, out=scratch)
            scratch += eps
            xp.divide(m, scratch, out=scratch)
            scratch *= step
            p -= scratch


class Adam(AdamW):
    """Adam; its results are those of torch.optim.Adam.

    Weight decay is added to the gradient, `grad + weight_decay * p`, before the moments; otherwise it is AdamW, which
    is what to use with weight decay. State per parameter: see `AdamW`.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015, algorithm 1.
    """

    _decay_in_gradient = True

    def __init__(
        self,
        parameters: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        master_weights: bool = True,
    ) -> None:
        super().__init__(parameters, lr, betas, eps, weight_decay, master_weights=master_weights)


def check_betas(optimizer: str, betas: tuple[float, ...]) -> None:
    """Refuse decay rates of moments that are not two numbers of [0, 1).

    Raises:
        UsageError: the message names the optimizer.
    """
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise UsageError(f"{optimizer}: betas must be two numbers, got {betas}.")
    if not all(0 <= beta < 1 for beta in betas):
        raise UsageError(f"{optimizer}: betas must be at least 0 and below 1, got {betas}.")
