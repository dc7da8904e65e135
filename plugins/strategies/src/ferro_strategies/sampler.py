"""ShardedSampler: choose the items of a data set that each rank trains on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ferro import ProcessGroup, UsageError


class ShardedSampler:
    """Divide the indices of a data set among n ranks: rank r gets every n-th one, from the r-th on.

    All ranks shuffle in the same order, so each item goes to exactly one rank. The first b items of all ranks are the
    first n * b of the shuffled data set, so the ranks' batches of size b together are the batches of size n * b that
    one process would make.

    If `length` is no multiple of n, the first ranks get one item more by default: no item is lost or repeated, and
    numbers of batches may differ by one between ranks (see `DDP.join`). With `drop_last` or `pad` every rank gets the
    same number of items.

    Args:
        length: items in the data set.
        group: the ranks, or (rank, world_size).
        shuffle: whether the order is random.
        seed: seed of the random order, the same on every rank.
        drop_last: leave the last `length % n` items out of the epoch.
        pad: repeat the first items at the end.
    """

    def __init__(
        self,
        length: int,
        group: ProcessGroup | tuple[int, int],
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        pad: bool = False,
    ) -> None:
        if isinstance(group, tuple):
            self.rank, self.world_size = group
        else:
            self.rank, self.world_size = group.rank, group.world_size
        if not 0 <= self.rank < self.world_size:
            raise UsageError(
                f"ShardedSampler: rank must be from 0 to world_size - 1, got rank {self.rank} of {self.world_size}."
            )
        if length < 0:
            raise UsageError(f"ShardedSampler: length must be at least 0, not {length}.")
        if drop_last and pad:
            raise UsageError("ShardedSampler: choose drop_last or pad, not both.")
        self.length = length
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        rest = length % self.world_size
        if drop_last:
            self._used = length - rest
        elif pad and rest:
            self._used = length + self.world_size - rest
        else:
            self._used = length

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew; call it on every rank before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(range(self.rank, self._used, self.world_size))

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices().tolist())

    def indices(self) -> npt.NDArray[np.int64]:
        """Compute this rank's indices of this epoch, of shape (len(self),)."""
        order = np.arange(self.length)
        if self.shuffle:
            np.random.default_rng((self.seed, self.epoch)).shuffle(order)
        # np.resize pads by repeating from the start; an empty array has nothing to repeat.
        used = np.resize(order, self._used) if self._used else order[:0]
        return used[self.rank :: self.world_size]

    def batches(self, batch_size: int) -> Iterator[npt.NDArray[np.int64]]:
        """Yield this rank's indices in batches of `batch_size`; the last may be smaller.

        Raises:
            UsageError: `batch_size` is less than 1.
        """
        if batch_size < 1:
            raise UsageError(f"ShardedSampler: batch_size must be at least 1, not {batch_size}.")
        indices = self.indices()
        return (indices[at : at + batch_size] for at in range(0, len(indices), batch_size))

    def __repr__(self) -> str:
        return f"ShardedSampler({self.length}, rank {self.rank} of {self.world_size}, epoch {self.epoch})"
