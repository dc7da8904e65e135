"""The models and batches of the parity table, and their training in one process.

The optimizer is SGD with momentum and clipped gradients. SGD is linear in the gradients, while
AdamW would amplify the rounding errors of gradients that are zero in exact arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

import ferro
from ferro_strategies import DeviceMesh, DTensor, Replicate, Shard, distribute, nn
from ferro_strategies.optim import SGD, clip_grad_norm

STEPS, ROWS = 3, 12
LR, MOMENTUM, MAX_NORM = 0.1, 0.9, 0.5
_FEATURES, _WIDTH, _CLASSES = 6, 10, 5
_VOCABULARY, _DIM, _HEADS, _LENGTH = 11, 12, 4, 7

State = dict[str, nn.Array]
LossAndState = tuple[float, State]
Matrix = npt.NDArray[np.floating]
T = TypeVar("T", Matrix, DTensor)
LossFunction = Callable[[nn.Array, nn.Array], tuple[float, nn.Array]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model and its batches.

    Attributes:
        layers: makes the layers in a dtype, always with the same values.
        batch: makes a step's inputs and labels in a dtype.
    """

    layers: Callable[[str], list[nn.Module]]
    batch: Callable[[int, str], tuple[nn.Array, nn.Array]]

    def build(self, dtype: str) -> nn.Sequential:
        """Return the whole model."""
        return nn.Sequential(*self.layers(dtype))


def _perceptron(dtype: str) -> list[nn.Module]:
    """Return eight layers with sizes that no number of ranks divides."""
    options = {"dtype": dtype, "rng": np.random.default_rng(0)}
    middle = [
        nn.Residual(
            nn.Sequential(
                nn.LayerNorm(_WIDTH, dtype=dtype),
                nn.Linear(_WIDTH, 23, **options),
                nn.GELU(),
                nn.Linear(23, _WIDTH, **options),
            )
        )
        for _ in range(6)
    ]
    return [nn.Linear(_FEATURES, _WIDTH, **options), *middle, nn.Linear(_WIDTH, _CLASSES, **options)]


def _convolutional(dtype: str) -> list[nn.Module]:
    options = {"dtype": dtype, "rng": np.random.default_rng(1)}
    first = [nn.Conv2d(1, 3, 3, **options), nn.BatchNorm(3, dtype=dtype), nn.GELU(), nn.Flatten()]
    second = [nn.Linear(27, 7, **options), nn.BatchNorm(7, dtype=dtype), nn.GELU()]
    return [*first, *second, nn.Linear(7, _CLASSES, **options)]


def _transformer(dtype: str) -> list[nn.Module]:
    """Return six layers: embedding, two blocks of attention and perceptron, and the logits."""
    options = {"dtype": dtype, "rng": np.random.default_rng(2)}

    def norm() -> nn.Module:
        return nn.LayerNorm(_DIM, dtype=dtype)

    def perceptron() -> list[nn.Module]:
        return [nn.Linear(_DIM, 22, **options), nn.GELU(), nn.Linear(22, _DIM, **options)]

    blocks = [
        nn.Residual(nn.Sequential(norm(), *layers))
        for layers in (
            [nn.Attention(_DIM, _HEADS, **options)],
            perceptron(),
            [nn.Attention(_DIM, _HEADS, **options)],
            perceptron(),
        )
    ]
    logits = nn.Sequential(norm(), nn.Linear(_DIM, _VOCABULARY, **options))
    return [nn.Embedding(_VOCABULARY, _DIM, **options), *blocks, logits]


def _random_batch(shape: tuple[int, ...], step: int, dtype: str) -> tuple[nn.Array, nn.Array]:
    rng = np.random.default_rng((3, step))
    return rng.standard_normal((ROWS, *shape)).astype(dtype), rng.integers(0, _CLASSES, ROWS)


def _text_batch(step: int, _dtype: str) -> tuple[nn.Array, nn.Array]:
    rng = np.random.default_rng((4, step))
    words = rng.integers(0, _VOCABULARY, (ROWS, _LENGTH + 1))
    return words[:, :-1], words[:, 1:]


PERCEPTRON = Model(layers=_perceptron, batch=partial(_random_batch, (_FEATURES,)))
CONVOLUTIONAL = Model(layers=_convolutional, batch=partial(_random_batch, (1, 5, 5)))
TRANSFORMER = Model(layers=_transformer, batch=_text_batch)


def train(
    module: nn.Module,
    model: Model,
    dtype: str,
    group: ferro.ProcessGroup | None = None,
    loss_function: LossFunction = nn.cross_entropy,
) -> float:
    """Train on this rank's rows (all without a group); return the last loss of the whole batch."""
    rank, ranks = (group.rank, group.world_size) if group else (0, 1)
    optimizer = SGD(module.parameters(), lr=LR, momentum=MOMENTUM)
    loss = 0.0
    for step in range(STEPS):
        x, labels = model.batch(step, dtype)
        y, pullback = module.vjp(x[rank::ranks])
        loss, grad = loss_function(y, labels[rank::ranks])
        pullback(grad)
        clip_grad_norm(module.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return loss if group is None else float(group.all_reduce(loss, "mean"))


def floating(state: State) -> State:
    """Return only the floating-point arrays, without BatchNorm's counters."""
    return {name: array for name, array in state.items() if array.dtype.kind == "f"}


@functools.cache
def train_in_one_process(model: Model, dtype: str) -> LossAndState:
    module = model.build(dtype)
    loss = train(module, model, dtype)
    return loss, floating(module.state_dict())


# -- two matrices, trained as arrays and as DTensors -----------------------------------------------


def train_matrices_in_one_process(dtype: str) -> LossAndState:
    """Fit two matrices in one process."""
    x, target, first, second = _matrices(dtype)
    loss = _fit(x, target, first, second)
    return loss, {"first": first, "second": second}


def train_matrices_as_dtensors(group: ferro.ProcessGroup, dtype: str) -> LossAndState:
    """Fit two matrices that are spread over a mesh, with the same code."""
    ranks = group.world_size
    rows = 2 if ranks % 2 == 0 else 1
    mesh = DeviceMesh((rows, ranks // rows), ("dp", "tp"), group)
    replicate, by_row, by_column = Replicate(), Shard(0), Shard(1)
    placements = ((by_row, replicate), (by_row, replicate), (replicate, by_column), (replicate, by_row))
    x, target, first, second = (
        distribute(array, mesh, placement) for array, placement in zip(_matrices(dtype), placements, strict=True)
    )
    loss = _fit(x, target, first, second)
    return loss, {"first": first.full_tensor(), "second": second.full_tensor()}


def _matrices(dtype: str) -> list[Matrix]:
    rng = np.random.default_rng(5)
    shapes = ((ROWS, 7), (ROWS, 5), (7, 9), (9, 5))
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def _fit(x: T, target: T, first: T, second: T) -> float:
    """Descend the gradient of the mean of (tanh(x @ first) @ second - target)^2; return it."""
    loss = 0.0
    for _ in range(STEPS):
        hidden = np.tanh(x @ first)
        error = hidden @ second - target
        loss = float((error * error).mean())
        grad = error * (2 / target.size)
        grad_hidden = (grad @ second.T) * (1 - hidden * hidden)
        second -= LR * _placed_as(second, hidden.T @ grad)
        first -= LR * _placed_as(first, x.T @ grad_hidden)
    return loss


def _placed_as(target: T, value: T) -> T:
    return value.redistribute(target.placements) if isinstance(target, DTensor) else value
