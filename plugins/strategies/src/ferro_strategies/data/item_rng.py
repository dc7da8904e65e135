"""The random generator of the item that is being loaded."""

from __future__ import annotations

import threading

import numpy as np

from ferro import UsageError

_SALT = 0x17E3  # keeps these seeds apart from those of the sampler's order


class _Current(threading.local):
    seeds: tuple[int, ...] | None = None
    generator: np.random.Generator | None = None


_current = _Current()


def item_rng() -> np.random.Generator:
    """Return the random generator of the item that a `DataLoader` is loading in this thread.

    Its numbers depend on the sampler's seed, the epoch and the item's place in it alone: not on workers, ranks, or
    where a training was interrupted. So a data set that draws from it augments in the same way each time.

    Raises:
        UsageError: no loader is loading an item in this thread.
    """
    if _current.generator is None:
        if _current.seeds is None:
            raise UsageError("item_rng: only a data set that a DataLoader asks for an item may draw from it.")
        _current.generator = np.random.default_rng((*_current.seeds, _SALT))
    return _current.generator


def begin_item(*seeds: int) -> None:
    """Let `item_rng` begin anew for an item in this thread."""
    _current.seeds, _current.generator = seeds, None


def end_items() -> None:
    """Let `item_rng` raise again."""
    _current.seeds = _current.generator = None
