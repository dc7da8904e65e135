"""Muon: momentum for matrices, made orthogonal before each step."""

from __future__ import annotations

import math

from ferro.errors import UsageError

from ..nn.arrays import Array, namespace_of, wide_dtype
from ..nn.parameter import Parameter
from .blocks import update_blocks
from .groups import GroupSetting, Parameters, Settings
from .optimizer import MASTER, Optimizer, check_at_least_zero
from .pieces import gather_whole, whole_shape

# The coefficients of the iteration, from the source.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_EPS = 1e-7


class Muon(Optimizer):
    """Muon, for the matrices of hidden layers; its results are those of torch.optim.Muon, which rounds to bfloat16.

        m = momentum * m + (1 - momentum) * grad
        d = momentum * m + (1 - momentum) * grad   if nesterov, else   m
        p = p * (1 - lr * weight_decay)
        p = p - lr * sqrt(max(1, columns / rows)) * orthogonal(d)

    The orthogonal matrix next to d is found by `iterations` of a polynomial in d d^T. Weights of `nn.Linear` have shape
    (inputs, outputs); torch's are the transposed ones. Update biases, norms, embeddings and the output layer by another
    optimizer, such as AdamW: see `matrices_and_others`.

    A matrix that FSDP or tensor parallelism has split is gathered in each step, one after another, and every rank
    computes the whole orthogonal matrix. State per parameter: "m", of its shape.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """

    momentum = GroupSetting[float]()
    weight_decay = GroupSetting[float]()
    nesterov = GroupSetting[bool]()

    def __init__(
        self,
        parameters: Parameters,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        iterations: int = 5,
        *,
        master_weights: bool = True,
    ) -> None:
        settings = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        super().__init__(parameters, settings, master_weights=master_weights)
        self.iterations = iterations
        for parameter in self.parameters:
            if len(whole_shape(parameter)) != 2 or parameter.data.dtype.kind == "c":
                raise UsageError(
                    f"Muon: {parameter!r} is no real matrix. Give it to another optimizer, such as AdamW: see "
                    "matrices_and_others."
                )

    def _check_settings(self, settings: Settings) -> None:
        super()._check_settings(settings)
        check_at_least_zero("Muon", weight_decay=settings["weight_decay"])
        if not 0 <= settings["momentum"] < 1:
            raise UsageError(f"Muon: momentum must be at least 0 and below 1, got {settings['momentum']}.")

    def _initial_state(self, parameter: Parameter, settings: Settings) -> dict[str, Array]:
        data = parameter.data
        return {"m": namespace_of(data).zeros(data.shape, wide_dtype(data.dtype))}

    def _update(self, parameter: Parameter, grad: Array, state: dict[str, Array], settings: Settings) -> None:
        data, m, momentum, lr = parameter.data, state["m"], settings["momentum"], settings["lr"]
        wide_grad = grad.astype(m.dtype, copy=False)
        m *= momentum
        m += (1 - momentum) * wide_grad
        descent = momentum * m + (1 - momentum) * wide_grad if settings["nesterov"] else m
        whole, own_piece = gather_whole(descent, parameter.splits)
        rows, columns = whole.shape
        step = lr * math.sqrt(max(1.0, columns / rows))
        direction = namespace_of(data).ascontiguousarray(own_piece(orthogonalized(whole, self.iterations)))
        for scratch, p, d in update_blocks(data, direction, [], state.get(MASTER)):
            p *= 1 - lr * settings["weight_decay"]
            p -= namespace_of(data).multiply(d, step, out=scratch)


def orthogonalized(matrix: Array, iterations: int) -> Array:
    """Move the singular values of a matrix near to 1 by an iteration of Newton and Schulz, of degree 5."""
    xp = namespace_of(matrix)
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / max(float(xp.linalg.norm(x)), _EPS)
    for _ in range(iterations):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * (gram @ gram)) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
