"""Adagrad: steps divided by the root of the sum of all squared gradients."""

from __future__ import annotations

import numpy as np

from ..nn.arrays import Array, namespace_of, wide_dtype
from ..nn.parameter import Parameter
from .blocks import update_blocks
from .groups import GroupSetting, Parameters, Settings
from .optimizer import MASTER, Optimizer, check_at_least_zero


class Adagrad(Optimizer):
    """Adagrad; its results are those of torch.optim.Adagrad.

        d = grad + weight_decay * p
        s = s + d**2                               (s is initial_accumulator at first)
        p = p - lr / (1 + (t - 1) * lr_decay) * d / (sqrt(s) + eps)

    State per parameter: "sum", of its shape, and "t", its number of steps, 0-d int64 in host memory.

    Source: Duchi, Hazan and Singer, "Adaptive Subgradient Methods", 2011.
    """

    lr_decay = GroupSetting[float]()
    weight_decay = GroupSetting[float]()
    initial_accumulator = GroupSetting[float]()
    eps = GroupSetting[float]()

    def __init__(
        self,
        parameters: Parameters,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator: float = 0.0,
        eps: float = 1e-10,
        *,
        master_weights: bool = True,
    ) -> None:
        settings = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator": initial_accumulator,
            "eps": eps,
        }
        super().__init__(parameters, settings, master_weights=master_weights)

    def _check_settings(self, settings: Settings) -> None:
        check_at_least_zero("Adagrad", **settings)

    def _initial_state(self, parameter: Parameter, settings: Settings) -> dict[str, Array]:
        data = parameter.data
        start, wide = settings["initial_accumulator"], wide_dtype(data.dtype)
        total = namespace_of(data).full(data.shape, complex(start, start) if wide.kind == "c" else start, wide)
        return {"sum": total, "t": np.zeros((), np.int64)}

    def _update(self, parameter: Parameter, grad: Array, state: dict[str, Array], settings: Settings) -> None:
        state["t"] += 1
        data, xp = parameter.data, namespace_of(parameter.data)
        decay, eps = settings["weight_decay"], settings["eps"]
        step = settings["lr"] / (1 + (int(state["t"]) - 1) * settings["lr_decay"])
        for scratch, p, grad_block, total in update_blocks(data, grad, [state["sum"]], state.get(MASTER)):
            g = grad_block
            if decay != 0:
                g = p * decay
                g += grad_block
            total += xp.multiply(g, g, out=scratch)
            xp.sqrt(total, out=scratch)
            scratch += eps
            xp.divide(g, scratch, out=scratch)
            scratch *= step
            p -= scratch
