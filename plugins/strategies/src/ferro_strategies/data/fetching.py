"""Make one batch: read its items from the data set and put them together."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from .item_rng import begin_item, end_items

Collate: TypeAlias = Callable[[Sequence[Any]], Any]


class Dataset(Protocol):
    """Items by index; `__getitems__`, if there is one, takes a list of indices and returns a list of items."""

    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class _ManyItems(Protocol):
    def __getitems__(self, indices: list[int], /) -> Sequence[Any]: ...


@dataclass(frozen=True, slots=True)
class BatchTask:
    """A batch to make.

    Attributes:
        number: its place among this rank's batches of the iteration.
        indices: its items.
        places: their places in the epoch, see `ShardedSampler.placed_batches`.
        seeds: the sampler's seed and the epoch.
    """

    number: int
    indices: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    seeds: tuple[int, int]

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.indices[:4])) + (", …" if len(self.indices) > 4 else "")
        return f"batch {self.number} of epoch {self.seeds[1]} (items {shown})"


def make_batch(dataset: Dataset, collate: Collate, task: BatchTask) -> Any:
    """Read a batch's items, in order, and collate them."""
    try:
        if isinstance(dataset, _ManyItems):
            begin_item(*task.seeds, int(task.places[0]))
            return collate(dataset.__getitems__(task.indices.tolist()))
        items = []
        for index, place in zip(task.indices.tolist(), task.places.tolist(), strict=True):
            begin_item(*task.seeds, place)
            items.append(dataset[index])
        return collate(items)
    finally:
        end_items()


def seed_globals(task: BatchTask) -> None:
    """Seed the global generators of Python and NumPy in a worker process, so that no two processes draw the same."""
    seed = np.random.SeedSequence((*task.seeds, int(task.places[0]))).generate_state(4)
    random.seed(int(seed[0]))
    np.random.seed(seed[1:])
