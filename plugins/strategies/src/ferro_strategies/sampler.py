"""ShardedSampler: choose the items of a data set that each rank trains on."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ferro import ProcessGroup, UsageError

from .nn.checks import check_group

Indices = npt.NDArray[np.int64]


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

    With `weights` an epoch is a random draw: item i is drawn with a probability proportional to its weight.

    With `groups` a batch holds items of one group only, such as sentences of about the same length. The items of each
    group are cut into runs of `run_items`, and the runs are put in random order. The rules about the last items of the
    data set hold for the last items of each run: with neither `pad` nor `drop_last` ranks may be in different runs,
    and after `load_state_dict` some items that were handed out come again. Let `run_items` be a multiple of n times the
    batch size, also for the other numbers of ranks on which the training may go on.

    Args:
        length: items in the data set.
        group: the ranks, or (rank, world_size).
        shuffle: whether the order is random.
        seed: seed of the random order, the same on every rank.
        drop_last: leave the last `length % n` items out of the epoch.
        pad: repeat the first items at the end.
        weights: a weight for each item, at least 0, in any scale.
        draws: the number of items drawn in an epoch with `weights`; `length` when None.
        replacement: whether an item may be drawn more than once in an epoch.
        groups: a whole number for each item, its group.
        run_items: how many items of a group follow each other.
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
        weights: Sequence[float] | npt.ArrayLike | None = None,
        draws: int | None = None,
        replacement: bool = True,
        groups: Sequence[int] | npt.ArrayLike | None = None,
        run_items: int = 1024,
    ) -> None:
        if not isinstance(group, tuple):
            check_group("ShardedSampler", group)
        rank, size = group if isinstance(group, tuple) else (group.rank, group.world_size)
        self.rank, self.world_size = _whole("rank", rank), _whole("world_size", size)
        if not 0 <= self.rank < self.world_size:
            raise UsageError(
                f"ShardedSampler: rank must be from 0 to world_size - 1, got rank {self.rank} of {self.world_size}."
            )
        if drop_last and pad:
            raise UsageError("ShardedSampler: choose drop_last or pad, not both.")
        self.length = _whole("length", length, at_least=0)
        self.shuffle = shuffle
        self.seed = _whole("seed", seed, at_least=0)
        self.epoch = 0
        self._drop_last, self._pad = drop_last, pad
        self._replacement = replacement
        self._probabilities = None if weights is None else _probabilities(weights, self.length, shuffle)
        # The number of items in an epoch of all ranks, before any are dropped or repeated.
        self._total = self.length if draws is None else self._checked_draws(draws)
        if not replacement:
            self._checked_draws(self._total)
        self._groups = None if groups is None else _checked_groups(groups, self.length, self._probabilities is not None)
        self._run_items = _whole("run_items", run_items, at_least=1)
        self._runs = [(0, self._total)] if self._groups is None else self._cut_groups(self._groups)
        # Items of the epoch, of all ranks, that were handed out: in all, and before the next iteration begins.
        self._taken = self._resume_at = 0

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew; call it on every rank before each epoch.

        The epoch of a loaded state goes on where it was left, if that epoch is given here.
        """
        epoch = _whole("epoch", epoch, at_least=0)
        if epoch != self.epoch:
            self._taken = self._resume_at = 0
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how much of it was handed out, the same on every rank after equal numbers of batches.

        Items count from the moment at which the sampler hands them out, so a program that reads batches ahead saves the
        state that it had when it took the batch it trains on, as `DataLoader` does.
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
        self.seed, self.epoch = int(state["seed"]), int(state["epoch"])
        self._taken = self._resume_at = int(state["taken"])

    def __len__(self) -> int:
        return self.share_sizes()[self.rank]

    def __iter__(self) -> Iterator[int]:
        return (int(batch[0]) for batch in self.batches(1))

    def share_sizes(self) -> list[int]:
        """Compute how many items each rank gets in a whole epoch, by rank."""
        n, ends = self.world_size, self._runs
        return [sum(len(self._share(start, end, rank)) for start, end in ends) for rank in range(n)]

    def batch_counts(self, batch_size: int, *, full: bool = False) -> list[int]:
        """Compute how many batches each rank gets in a whole epoch, by rank; see `batches`."""
        size, ranks = _whole("batch_size", batch_size, at_least=1), range(self.world_size)
        return [sum(self._batch_count(start, end, rank, 0, size, full) for start, end in self._runs) for rank in ranks]

    def indices(self) -> Indices:
        """Compute this rank's indices of this epoch, of shape (len(self),)."""
        shares = [indices for indices, _, _ in self._shares(0)]
        return np.concatenate(shares) if shares else np.empty(0, np.int64)

    def batches(self, batch_size: int, *, full: bool = False) -> Iterator[Indices]:
        """Yield this rank's indices in batches of `batch_size`; the last may be smaller.

        With `full`, last batches are left out that have fewer items on any rank, so all ranks get as many batches.

        Raises:
            UsageError: `batch_size` is less than 1.
        """
        return (batch for batch, _ in self.placed_batches(batch_size, full=full))

    def placed_batches(self, batch_size: int, *, full: bool = False) -> Iterator[tuple[Indices, Indices]]:
        """Yield this rank's batches, each with the places of its items in the order of all ranks' items.

        A place does not depend on the number of ranks, so that random numbers drawn by place do not either.
        """
        return self._placed_batches(_whole("batch_size", batch_size, at_least=1), full)

    def _placed_batches(self, size: int, full: bool) -> Iterator[tuple[Indices, Indices]]:
        taken = self._taken = self._resume_at
        self._resume_at = 0
        # Rank 0 has the most batches of each run. All ranks count as it does, so that their states are the same, and no
        # item is lost where a rank that has no batch of a short run is in the next one.
        counts_of_all = self._counts_of_all(taken, size, full)
        end = taken
        for indices, places, (start, end) in self._shares(taken):
            for number in range(self._batch_count(start, end, self.rank, max(taken, start), size, full)):
                self._taken = next(counts_of_all)
                batch = slice(number * size, (number + 1) * size)
                yield indices[batch], places[batch]
        self._taken = end

    def _counts_of_all(self, taken: int, size: int, full: bool) -> Iterator[int]:
        """Compute how many items all ranks were given, with each batch of rank 0."""
        for start, end in self._runs if self._groups is None else self._order()[1]:
            begin = max(taken, start)
            for number in range(self._batch_count(start, end, 0, begin, size, full) if end > taken else 0):
                yield min(begin + (number + 1) * size * self.world_size, end)

    def _batch_count(self, start: int, end: int, rank: int, taken: int, size: int, full: bool) -> int:
        """Count a rank's batches in the rest of a run; the last rank has the smallest share."""
        if full:
            return len(self._share(start, end, self.world_size - 1, taken)) // size
        return -(-len(self._share(start, end, rank, taken)) // size)

    def _shares(self, taken: int) -> Iterator[tuple[Indices, Indices, tuple[int, int]]]:
        """Compute this rank's indices and places in each run that has more than the first `taken` items of all ranks.

        The last value is the run's beginning and end.
        """
        order, ends = self._order()
        for start, end in ends:
            if end <= taken:
                continue
            places = self._share(start, end, self.rank, taken)
            yield order[places], places, (start, end)

    def _share(self, start: int, end: int, rank: int, taken: int = 0) -> Indices:
        """Compute the places of a rank's items in one run, of which the first `taken` items are gone."""
        n, begin = self.world_size, max(start, taken)
        count = end - begin
        used = count // n * n if self._drop_last else -(-count // n) * n if self._pad else count
        places = begin + np.arange(rank, used, n)
        return np.where(places < end, places, start + (places - end) % max(1, end - start))  # padding: the run again

    def _order(self) -> tuple[Indices, list[tuple[int, int]]]:
        """Compute the indices of the epoch in order, and the beginning and end of each run of one group."""
        random = np.random.default_rng((self.seed, self.epoch))
        if self._probabilities is not None:
            drawn = random.choice(self.length, self._total, replace=self._replacement, p=self._probabilities)
            return drawn.astype(np.int64), self._runs
        order = np.arange(self.length)
        if self.shuffle:
            random.shuffle(order)
        if self._groups is None:
            return order, self._runs
        order = order[np.argsort(self._groups[order], kind="stable")]
        runs = [order[start:end] for start, end in self._runs]
        if self.shuffle:
            runs = [runs[index] for index in random.permutation(len(runs))]
        ends = np.cumsum([0, *map(len, runs)]).tolist()
        return np.concatenate([order[:0], *runs]), list(pairwise(ends))

    def _cut_groups(self, groups: npt.NDArray[np.generic]) -> list[tuple[int, int]]:
        """List the beginnings and ends of the runs, group by group; each epoch has them in another order."""
        _, counts = np.unique(groups, return_counts=True)  # in the order of np.argsort
        ends: list[tuple[int, int]] = []
        begin = 0
        for count in counts.tolist():
            starts = range(begin, begin + count, self._run_items)
            ends += [(start, min(start + self._run_items, begin + count)) for start in starts]
            begin += count
        return ends

    def _checked_draws(self, draws: int) -> int:
        count = _whole("draws", draws, at_least=0)
        if self._probabilities is None:
            raise UsageError("ShardedSampler: draws and replacement=False belong to weights=, and none are given.")
        possible = np.count_nonzero(self._probabilities)
        if not self._replacement and count > possible:
            raise UsageError(
                f"ShardedSampler: {count} draws without replacement of {possible} items of weight above 0."
            )
        return count

    def __repr__(self) -> str:
        return f"ShardedSampler({self.length}, rank {self.rank} of {self.world_size}, epoch {self.epoch})"


def _whole(name: str, value: object, *, at_least: int | None = None) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise UsageError(f"ShardedSampler: {name} must be a whole number, not {value!r}.") from None
    if at_least is not None and number < at_least:
        raise UsageError(f"ShardedSampler: {name} must be at least {at_least}, not {number}.")
    return number


def _probabilities(weights: object, length: int, shuffle: bool) -> npt.NDArray[np.float64]:
    array = np.asarray(weights, np.float64)
    if array.shape != (length,):
        raise UsageError(f"ShardedSampler: weights has shape {array.shape} for {length} items.")
    if not shuffle:
        raise UsageError("ShardedSampler: weights draw a random order, and shuffle is False.")
    total = float(array.sum())
    if length and not (bool((array >= 0).all()) and 0 < total < np.inf):
        raise UsageError("ShardedSampler: weights must be finite, at least 0, and not all 0.")
    return array / total if length else array


def _checked_groups(groups: object, length: int, has_weights: bool) -> npt.NDArray[np.generic]:
    array = np.asarray(groups)
    if array.shape != (length,) or (length and array.dtype.kind not in "iub"):
        raise UsageError(
            f"ShardedSampler: groups must be {length} whole numbers, not {array.dtype} of shape {array.shape}: "
            "np.digitize(lengths, edges) gives groups by length."
        )
    if has_weights:
        raise UsageError("ShardedSampler: choose weights or groups, not both.")
    return array
