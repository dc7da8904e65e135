"""Adafactor: mean squares of gradients by rows and columns, which take little memory."""

from __future__ import annotations

import math

import numpy as np

from ferro.errors import UsageError

from ..nn.arrays import Array, namespace_of, wide_dtype
from ..nn.parameter import Parameter
from .blocks import blocks, update_blocks
from .groups import GroupSetting, Parameters, Settings
from .optimizer import MASTER, Optimizer, check_at_least_zero
from .pieces import gather_whole, sum_over_pieces, whole_shape


class Adafactor(Optimizer):
    """Adafactor; its results are those of torch.optim.Adafactor.

        b = t**beta2_decay
        row = row + b * (mean of grad**2 over columns - row)       column = … over rows
        v = row @ column / mean(row)                               v is kept itself for vectors
        u = grad / sqrt(v)                                         u = u / max(1, rms(u) / d)
        p = p * (1 - lr * weight_decay) - max(eps[1], rms(p)) * min(lr, 1 / sqrt(t)) * u

    State per parameter: "row" and "column" of the last two dimensions of the whole array, or "v" for vectors and
    numbers; and "t", its number of steps, 0-d int64 in host memory. Every rank has the whole of them: the gradient of a
    parameter that FSDP or tensor parallelism has split is gathered in each step, one parameter after another.

    Args:
        parameters: see `Optimizer`; they are real.
        lr: largest relative size of a step.
        beta2_decay: exponent of the weight of the newest gradient, at most 0.
        eps: the least root of a mean square, 0 for the epsilon of the dtype; and the least rms of a parameter.
        d: the largest rms of u.
        weight_decay: decoupled weight decay.
        master_weights: see `Optimizer`.

    Source: Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018.
    """

    whole_arrays = frozenset({"row", "column", "v", "t"})
    beta2_decay = GroupSetting[float]()
    eps = GroupSetting[tuple[float, float]]()
    d = GroupSetting[float]()
    weight_decay = GroupSetting[float]()

    def __init__(
        self,
        parameters: Parameters,
        lr: float = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float, float] = (0.0, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        master_weights: bool = True,
    ) -> None:
        settings = {"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay}
        super().__init__(parameters, settings, master_weights=master_weights)
        for parameter in self.parameters:
            if parameter.data.dtype.kind == "c":
                raise UsageError(f"Adafactor: {parameter!r} is complex; use AdamW for it.")

    def _check_settings(self, settings: Settings) -> None:
        super()._check_settings(settings)
        eps1, eps2 = settings["eps"]
        check_at_least_zero("Adafactor", eps=min(eps1, eps2), weight_decay=settings["weight_decay"])
        if not settings["beta2_decay"] <= 0 or not settings["d"] > 0:
            raise UsageError(
                f"Adafactor: beta2_decay must be at most 0 and d above 0, got {settings['beta2_decay']} and "
                f"{settings['d']}."
            )

    def _initial_state(self, parameter: Parameter, settings: Settings) -> dict[str, Array]:
        xp, wide, shape = namespace_of(parameter.data), wide_dtype(parameter.data.dtype), whole_shape(parameter)
        state: dict[str, Array] = {"t": np.zeros((), np.int64)}
        if len(shape) < 2:
            return state | {"v": xp.zeros(shape, wide)}
        row, column = (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])
        return state | {"row": xp.zeros(row, wide), "column": xp.zeros(column, wide)}

    def _update(self, parameter: Parameter, grad: Array, state: dict[str, Array], settings: Settings) -> None:
        state["t"] += 1
        t, data, lr = int(state["t"]), parameter.data, settings["lr"]
        xp, wide = namespace_of(data), wide_dtype(data.dtype)
        g, own_piece = gather_whole(grad.astype(wide, copy=False), parameter.splits)
        value = state.get(MASTER, data)
        squares = sum(float(xp.vdot(b, b)) for b in (block.astype(np.float64) for _, block in blocks(value)))
        rms = math.sqrt(sum_over_pieces(squares, parameter.splits) / max(g.size, 1))
        step = max(settings["eps"][1], rms) * min(lr, 1 / math.sqrt(t))
        update = g / self._root_mean_square(g, state, t ** settings["beta2_decay"], settings)
        step /= max(1.0, math.sqrt(float((update * update).mean())) / settings["d"]) if g.size else 1.0
        direction = xp.ascontiguousarray(own_piece(update))
        for scratch, p, u in update_blocks(data, direction, [], state.get(MASTER)):
            p *= 1 - lr * settings["weight_decay"]
            p -= xp.multiply(u, step, out=scratch)

    @staticmethod
    def _root_mean_square(g: Array, state: dict[str, Array], weight: float, settings: Settings) -> Array:
        """Update the mean squares of a whole gradient, and compute the root of the estimate for each element."""
        xp = namespace_of(g)
        eps = settings["eps"][0] or float(np.finfo(g.dtype).eps)
        squares = g * g
        if "v" in state:
            state["v"] += weight * (squares - state["v"])
            estimate = state["v"]
        else:
            row, column = state["row"], state["column"]
            row += weight * (squares.mean(axis=-1, keepdims=True) - row)
            column += weight * (squares.mean(axis=-2, keepdims=True) - column)
            estimate = row * column / xp.maximum(row.mean(axis=-2, keepdims=True), eps)
        root: Array = xp.sqrt(xp.maximum(estimate, eps * eps))
        return root
