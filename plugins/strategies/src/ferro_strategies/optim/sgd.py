"""SGD: stochastic gradient descent, with momentum."""

from __future__ import annotations

from collections.abc import Iterable

from ferro.errors import UsageError

from ..nn.arrays import Array, namespace_of
from ..nn.parameter import Parameter
from .optimizer import Optimizer, blocks, check_at_least_zero


class SGD(Optimizer):
    """Stochastic gradient descent; its results are those of torch.optim.SGD without dampening.

        d = grad + weight_decay * p
        m = momentum * m + d                       (m is 0 at first)
        p = p - lr * (d + momentum * m   if nesterov, else   m)

    State per parameter: "momentum", of its shape and dtype; nothing without momentum.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep
    learning", 2013, in torch's variant: lr scales the step, not the momentum.
    """

    def __init__(
        self,
        parameters: Iterable[Parameter],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(parameters, lr)
        check_at_least_zero("SGD", momentum=momentum, weight_decay=weight_decay)
        if nesterov and momentum == 0:
            raise UsageError("SGD: nesterov needs a momentum above 0.")
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.nesterov = nesterov

    def _initial_state(self, data: Array) -> dict[str, Array]:
        if self.momentum == 0:
            return {}
        return {"momentum": namespace_of(data).zeros(data.shape, data.dtype)}

    def _update(self, data: Array, grad: Array, state: dict[str, Array]) -> None:
        xp, lr = namespace_of(data), self.lr
        for scratch, p, g, *rest in blocks(data, grad, *state.values()):
            descent = g
            if self.weight_decay != 0:
                descent = xp.multiply(p, self.weight_decay, out=scratch)
                descent += g
            if rest:
                (m,) = rest
                m *= self.momentum
                m += descent
            if not rest or self.nesterov:
                p -= xp.multiply(descent, lr, out=scratch)
            if rest:
                p -= xp.multiply(m, lr * self.momentum if self.nesterov else lr, out=scratch)
