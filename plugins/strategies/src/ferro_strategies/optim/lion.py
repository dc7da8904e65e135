"""Lion: steps of one size in the direction of the sign of a mean of gradients."""

from __future__ import annotations

from ..nn.arrays import Array, namespace_of, wide_dtype
from ..nn.parameter import Parameter
from .adamw import check_betas
from .blocks import update_blocks
from .groups import GroupSetting, Parameters, Settings
from .optimizer import MASTER, Optimizer, check_at_least_zero


class Lion(Optimizer):
    """Lion, with decoupled weight decay.

        p = p * (1 - lr * weight_decay)
        p = p - lr * sign(beta1 * m + (1 - beta1) * grad)
        m = beta2 * m + (1 - beta2) * grad

    Every element moves by lr, so lr is 3 to 10 times smaller, and weight_decay as much larger, than for AdamW.
    State per parameter: "m", of its shape.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, algorithm 2.
    """

    betas = GroupSetting[tuple[float, float]]()
    weight_decay = GroupSetting[float]()

    def __init__(
        self,
        parameters: Parameters,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        master_weights: bool = True,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(parameters, settings, master_weights=master_weights)

    def _check_settings(self, settings: Settings) -> None:
        super()._check_settings(settings)
        check_at_least_zero("Lion", weight_decay=settings["weight_decay"])
        check_betas("Lion", settings["betas"])

    def _initial_state(self, parameter: Parameter, settings: Settings) -> dict[str, Array]:
        data = parameter.data
        return {"m": namespace_of(data).zeros(data.shape, wide_dtype(data.dtype))}

    def _update(self, parameter: Parameter, grad: Array, state: dict[str, Array], settings: Settings) -> None:
        data, xp = parameter.data, namespace_of(parameter.data)
        lr, (beta1, beta2) = settings["lr"], settings["betas"]
        for scratch, p, g, m in update_blocks(data, grad, [state["m"]], state.get(MASTER)):
            p *= 1 - lr * settings["weight_decay"]
            xp.multiply(g, 1 - beta1, out=scratch)
            scratch += beta1 * m
            xp.sign(scratch, out=scratch)
            scratch *= lr
            p -= scratch
            m *= beta2
            m += xp.multiply(g, 1 - beta2, out=scratch)
