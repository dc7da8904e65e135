"""SGD: stochastic gradient descent, with momentum."""

from __future__ import annotations

from ferro.errors import UsageError

from ..nn.arrays import Array, namespace_of, wide_dtype
from ..nn.parameter import Parameter
from .blocks import update_blocks
from .groups import GroupSetting, Parameters, Settings
from .optimizer import MASTER, Optimizer, check_at_least_zero


class SGD(Optimizer):
    """Stochastic gradient descent; its results are those of torch.optim.SGD without dampening.

        d = grad + weight_decay * p
        m = momentum * m + d                       (m is 0 at first)
        p = p - lr * (d + momentum * m   if nesterov, else   m)

    State per parameter: "momentum", of its shape; nothing without momentum.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep
    learning", 2013, in torch's variant: lr scales the step, not the momentum.
    """

    momentum = GroupSetting[float]()
    weight_decay = GroupSetting[float]()
    nesterov = GroupSetting[bool]()

    def __init__(
        self,
        parameters: Parameters,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        master_weights: bool = True,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(parameters, settings, master_weights=master_weights)

    def _check_settings(self, settings: Settings) -> None:
        super()._check_settings(settings)
        check_at_least_zero("SGD", momentum=settings["momentum"], weight_decay=settings["weight_decay"])
        if settings["nesterov"] and settings["momentum"] == 0:
            raise UsageError("SGD: nesterov needs a momentum above 0.")

    def _keeps_state(self, settings: Settings) -> bool:
        return bool(settings["momentum"] != 0)

    def _initial_state(self, parameter: Parameter, settings: Settings) -> dict[str, Array]:
        if not self._keeps_state(settings):
            return {}
        data = parameter.data
        return {"momentum": namespace_of(data).zeros(data.shape, wide_dtype(data.dtype))}

    def _update(self, parameter: Parameter, grad: Array, state: dict[str, Array], settings: Settings) -> None:
        data, xp = parameter.data, namespace_of(parameter.data)
        lr, momentum, weight_decay = settings["lr"], settings["momentum"], settings["weight_decay"]
        nesterov = settings["nesterov"]
        moments = [state["momentum"]] if "momentum" in state else []
        for scratch, p, g, *rest in update_blocks(data, grad, moments, state.get(MASTER)):
            descent = g
            if weight_decay != 0:
                descent = xp.multiply(p, weight_decay, out=scratch)
                descent += g
            if rest:
                (m,) = rest
                m *= momentum
                m += descent
            if not rest or nesterov:
                p -= xp.multiply(descent, lr, out=scratch)
            if rest:
                p -= xp.multiply(m, lr * momentum if nesterov else lr, out=scratch)
