"""What the parity table trains: small models with fixed batches, and how in one process.

With SGD, momentum and clipped gradients. SGD, because it is linear in the gradients: AdamW would
blow up the rounding of those that are zero by nature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

import ferro
from ferro_strategies import nn
from ferro_strategies.optim import SGD, clip_grad_norm

STEPS, ROWS = 5, 12
LR, MOMENTUM, MAX_NORM = 0.1, 0.9, 0.5
_FEATURES, _WIDTH, _CLASSES = 6, 10, 5
_VOCABULARY, _DIM, _HEADS, _LENGTH = 11, 12, 4, 7

State = dict[str, nn.Array]
Found = tuple[float, State]  # the loss, and arrays by name
Loss = Callable[[nn.Array, nn.Array], tuple[float, nn.Array]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is trained.

    Attributes:
        parts: makes its layers, first to last, in a dtype; always with the same values.
        batch: a step's inputs and labels, in that dtype.
    """

    parts: Callable[[str], list[nn.Module]]
    batch: Callable[[int, str], tuple[nn.Array, nn.Array]]

    def build(self, dtype: str) -> nn.Sequential:
        """Return the whole."""
        return nn.Sequential(*self.parts(dtype))


def _perceptron(dtype: str) -> list[nn.Module]:
    """Eight parts with sizes that no number of ranks divides."""
    wide = {"dtype": dtype, "rng": np.random.default_rng(0)}
    middle = [
        nn.Residual(
            nn.Sequential(
                nn.LayerNorm(_WIDTH, dtype=dtype),
                nn.Linear(_WIDTH, 23, **wide),
                nn.GELU(),
                nn.Linear(23, _WIDTH, **wide),
            )
        )
        for _ in range(6)
    ]
    return [nn.Linear(_FEATURES, _WIDTH, **wide), *middle, nn.Linear(_WIDTH, _CLASSES, **wide)]


def _images(dtype: str) -> list[nn.Module]:
    wide = {"dtype": dtype, "rng": np.random.default_rng(1)}
    first = [nn.Conv2d(1, 3, 3, **wide), nn.BatchNorm(3, dtype=dtype), nn.GELU(), nn.Flatten()]
    second = [nn.Linear(27, 7, **wide), nn.BatchNorm(7, dtype=dtype), nn.GELU()]
    return [*first, *second, nn.Linear(7, _CLASSES, **wide)]


def _transformer(dtype: str) -> list[nn.Module]:
    """Embedding, two blocks of attention and perceptron, scores: six parts."""
    wide = {"dtype": dtype, "rng": np.random.default_rng(2)}

    def norm() -> nn.Module:
        return nn.LayerNorm(_DIM, dtype=dtype)

    def perceptron() -> list[nn.Module]:
        return [nn.Linear(_DIM, 22, **wide), nn.GELU(), nn.Linear(22, _DIM, **wide)]

    blocks = [
        nn.Residual(nn.Sequential(norm(), *layers))
        for layers in (
            [nn.Attention(_DIM, _HEADS, **wide)],
            perceptron(),
            [nn.Attention(_DIM, _HEADS, **wide)],
            perceptron(),
        )
    ]
    scores = nn.Sequential(norm(), nn.Linear(_DIM, _VOCABULARY, **wide))
    return [nn.Embedding(_VOCABULARY, _DIM, **wide), *blocks, scores]


def _rows(shape: tuple[int, ...], step: int, dtype: str) -> tuple[nn.Array, nn.Array]:
    rng = np.random.default_rng((3, step))
    return rng.standard_normal((ROWS, *shape)).astype(dtype), rng.integers(0, _CLASSES, ROWS)


def _text(step: int, _dtype: str) -> tuple[nn.Array, nn.Array]:
    rng = np.random.default_rng((4, step))
    words = rng.integers(0, _VOCABULARY, (ROWS, _LENGTH + 1))
    return words[:, :-1], words[:, 1:]


PERCEPTRON = Model(parts=_perceptron, batch=partial(_rows, (_FEATURES,)))
IMAGES = Model(parts=_images, batch=partial(_rows, (1, 5, 5)))
TRANSFORMER = Model(parts=_transformer, batch=_text)


def train(
    module: nn.Module,
    model: Model,
    dtype: str,
    group: ferro.ProcessGroup | None = None,
    loss_of: Loss = nn.cross_entropy,
) -> float:
    """Train on this rank's rows (all without group); return the last loss over the whole batch."""
    rank, ranks = (group.rank, group.world_size) if group else (0, 1)
    optimizer = SGD(module.parameters(), lr=LR, momentum=MOMENTUM)
    loss = 0.0
    for step in range(STEPS):
        x, labels = model.batch(step, dtype)
        y, pullback = module.vjp(x[rank::ranks])
        loss, grad = loss_of(y, labels[rank::ranks])
        pullback(grad)
        clip_grad_norm(module.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return loss if group is None else float(group.all_reduce(loss, "mean"))


def floating(state: State) -> State:
    """Leave out the counts of batches."""
    return {name: array for name, array in state.items() if array.dtype.kind == "f"}


def alone(model: Model, dtype: str) -> Found:
    """Train in one process."""
    module = model.build(dtype)
    loss = train(module, model, dtype)
    return loss, floating(module.state_dict())
