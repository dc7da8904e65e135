"""ShardedSampler: choose the items of a data set that each rank trains on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

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

    `state_dict` tells which items of the epoch have been handed out, and after `load_state_dict` the next iteration
    goes on with those that follow, also where the number of ranks has changed.

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
        # Items of the epoch, of all ranks, that were handed out: in all, and before the next iteration begins.
        self._taken = self._resume_at = 0
        rest = length % self.world_size
        if drop_last:
            self._used = length - rest
        elif pad and rest:
            self._used = length + self.world_size - rest
        else:
            self._used = length

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew; call it on every rank before each epoch.

        The epoch of a loaded state goes on where it was left, if that epoch is given here.
        """
        if epoch != self.epoch:
            self._taken = self._resume_at = 0
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how much of it was handed out, the same on every rank after equal numbers of batches.

        Items count from the moment at which the sampler hands them out, so a program that reads batches ahead saves the
        state that it had when it took the batch it trains on.
        """
        return {"length": self.length, "seed": self.seed, "epoch": self.epoch, "taken": self._taken}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on in the epoch of a saved state: the next iteration begins with the items that were not handed out.

        Raises:
            UsageError: the state belongs to a data set of another length, or lacks something.
        """
        missing = {"length", "seed", "epoch", "taken"} - state.keys()
        if missing or state["length"] != self.length:
            found = f"lacks {', '.join(sorted(missing))}" if missing else f"is of {state['length']} items"
            raise UsageError(
                f"ShardedSampler.load_state_dict: the state {found}; this sampler has {self.length} items."
            )
        self.seed, self.epoch = state["seed"], state["epoch"]
        self._taken = self._resume_at = state["taken"]

    def __len__(self) -> int:
        return len(range(self.rank, self._used, self.world_size))

    def __iter__(self) -> Iterator[int]:
        return (int(batch[0]) for batch in self.batches(1))

    def indices(self) -> npt.NDArray[np.int64]:
        """Compute this rank's indices of this epoch, of shape (len(self),)."""
        return self._indices_from(0)

    def _indices_from(self, taken: int) -> npt.NDArray[np.int64]:
        """Compute this rank's indices of this epoch after the first `taken` items of all ranks."""
        order = np.arange(self.length)
        if self.shuffle:
            np.random.default_rng((self.seed, self.epoch)).shuffle(order)
        # np.resize pads by repeating from the start; an empty array has nothing to repeat.
        used = np.resize(order, self._used) if self._used else order[:0]
        return used[taken + self.rank :: self.world_size]

    def batches(self, batch_size: int) -> Iterator[npt.NDArray[np.int64]]:
        """Yield this rank's indices in batches of `batch_size`; the last may be smaller.

        Raises:
            UsageError: `batch_size` is less than 1.
        """
        if batch_size < 1:
            raise UsageError(f"ShardedSampler: batch_size must be at least 1, not {batch_size}.")
        return self._batches(batch_size)

    def _batches(self, batch_size: int) -> Iterator[npt.NDArray[np.int64]]:
        self._taken, self._resume_at = self._resume_at, 0
        indices = self._indices_from(self._taken)
        for at in range(0, len(indices), batch_size):
            batch = indices[at : at + batch_size]
            self._taken = min(self._taken + len(batch) * self.world_size, self._used)
            yield batch

    def __repr__(self) -> str:
        return f"ShardedSampler({self.length}, rank {self.rank} of {self.world_size}, epoch {self.epoch})"
