"""DataLoader: each rank's batches, made ahead, in an order that no worker changes."""

from __future__ import annotations

import operator
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sized
from types import TracebackType
from typing import Any

from ferro import UsageError

from ..sampler import ShardedSampler
from .collate import collate as collate_trees
from .fetching import BatchTask, Collate, Dataset, make_batch
from .workers import PendingBatch, ThreadWorker, make_workers

_START_METHODS = ("fork", "forkserver", "spawn")


class DataLoader:
    """Iterate over this rank's batches of an epoch, which workers make ahead.

    The batches and their order are those that the sampler gives, whatever the number and the kind of the workers.
    After each complete iteration the sampler's epoch is the next one, so no call of `set_epoch` is needed.

    `state_dict` counts the batches that were handed out, not those made ahead: after `load_state_dict` the next
    iteration goes on behind them, also on another number of ranks. With `item_rng` random augmentations are the same
    ones then, too.

    An error of the data set is raised where the batch would have come. A worker that dies, or needs longer than
    `timeout_s`, is a `DataWorkerError` that names it. `close`, the end of a `with` block, or the garbage collector ends
    all workers; the next iteration starts new ones.

    Args:
        dataset: `dataset[index]` is an item. If it has `__getitems__`, that gets the list of a batch's indices, and
            `item_rng` is that of the first.
        sampler: chooses the items of this rank.
        batch_size: items in a batch of this rank; the last one may have fewer.
        workers: how many threads or processes make batches; 0 makes each when it is asked for.
        processes: make batches in processes, for data sets whose Python code needs most of the time. Batches are
            pickled on their way; threads hand them over as they are.
        ahead: how many batches each worker may be ahead.
        collate: makes a batch of a list of items; stacks arrays by default, see `ferro_strategies.data.collate`.
        drop_last: leave out last batches that would have fewer items on any rank. Then all ranks have as many batches.
        timeout_s: how long to wait for one batch.
        start_method: of `multiprocessing`; "fork" by default where the system has it, else "spawn".
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: ShardedSampler,
        batch_size: int,
        *,
        workers: int = 0,
        processes: bool = False,
        ahead: int = 2,
        collate: Collate = collate_trees,
        drop_last: bool = False,
        timeout_s: float = 300.0,
        start_method: str | None = None,
    ) -> None:
        self.batch_size = _whole("batch_size", batch_size, 1)
        if not isinstance(sampler, ShardedSampler):
            raise UsageError(
                f"DataLoader: the sampler is a {type(sampler).__name__}. Give a ShardedSampler(len(dataset), group), "
                "which chooses this rank's items."
            )
        if not timeout_s > 0:
            raise UsageError(f"DataLoader: timeout_s must be above 0, not {timeout_s}.")
        self.dataset, self.sampler, self.drop_last = dataset, sampler, drop_last
        self._workers_wanted, self._ahead = _whole("workers", workers, 0), _whole("ahead", ahead, 1)
        self._collate, self._timeout_s = collate, timeout_s
        if processes and not self._workers_wanted:
            raise UsageError("DataLoader: processes=True needs workers=, the number of processes.")
        if start_method is not None and (start_method not in _START_METHODS or not processes):
            raise UsageError(
                f"DataLoader: start_method={start_method!r} needs processes=True; one of {_START_METHODS}."
            )
        default = "fork" if hasattr(os, "fork") else "spawn"
        self._start_method = (start_method or default) if processes else None
        if isinstance(dataset, Sized) and len(dataset) != sampler.length:
            raise UsageError(f"DataLoader: the data set has {len(dataset)} items, the sampler {sampler.length}.")
        self._state = sampler.state_dict()
        self._workers: list[ThreadWorker] = []
        self._end_workers: Callable[[], object] = lambda: None
        self._started_in = 0

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration goes through."""
        return self.sampler.epoch

    def batch_counts(self) -> list[int]:
        """Compute how many batches each rank has in a whole epoch, by rank; where they differ, see `DDP.join`."""
        return self.sampler.batch_counts(self.batch_size, full=self.drop_last)

    def __len__(self) -> int:
        return self.batch_counts()[self.sampler.rank]

    def state_dict(self) -> dict[str, int]:
        """Return the place in the data behind the last batch that was handed out; the same on every rank."""
        is_of_epoch = self._state["epoch"] == self.sampler.epoch  # not so where the program has called set_epoch
        return dict(self._state) if is_of_epoch else self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on behind the place of a saved state; see `ShardedSampler.load_state_dict`."""
        self.sampler.load_state_dict(state)
        self._state = self.sampler.state_dict()

    def __iter__(self) -> Iterator[Any]:
        return self._iterate()

    def _iterate(self) -> Iterator[Any]:
        tasks = self._tasks()
        workers = self._running_workers()
        pending: deque[tuple[PendingBatch, dict[str, int]]] = deque()
        if not workers:
            for task, state in tasks:
                batch = make_batch(self.dataset, self._collate, task)
                self._state = state
                yield batch
        else:
            try:
                for task, state in tasks:
                    pending.append((workers[task.number % len(workers)].submit(task), state))
                    if len(pending) > self._ahead * len(workers):
                        yield self._take(pending)
                while pending:
                    yield self._take(pending)
            except BaseException:
                self.close()  # batches that are made ahead are of no use
                raise
        self.sampler.set_epoch(self.sampler.epoch + 1)
        self._state = self.sampler.state_dict()

    def _take(self, pending: deque[tuple[PendingBatch, dict[str, int]]]) -> Any:
        """Wait for the first of the pending batches; from now on it counts as handed out."""
        first, state = pending.popleft()
        batch = first.result(self._timeout_s)
        self._state = state
        return batch

    def _tasks(self) -> Iterator[tuple[BatchTask, dict[str, int]]]:
        """Yield the batches to make, each with the sampler's state behind it."""
        sampler = self.sampler
        seeds = (sampler.seed, sampler.epoch)
        for number, (indices, places) in enumerate(sampler.placed_batches(self.batch_size, full=self.drop_last)):
            yield BatchTask(number, indices, places, seeds), sampler.state_dict()

    def _running_workers(self) -> list[ThreadWorker]:
        """Return the workers, which are started by the first iteration of each process."""
        if self._workers and self._started_in != os.getpid():
            self._workers = []  # a forked child has its own
        if not self._workers and self._workers_wanted:
            self._workers, end = make_workers(
                self._workers_wanted, self.dataset, self._collate, start_method=self._start_method
            )
            self._started_in = os.getpid()
            self._end_workers = weakref.finalize(self, end)
        return list(self._workers)

    def close(self) -> None:
        """End all workers; the next iteration starts new ones."""
        self._workers = []
        self._end_workers()

    def __enter__(self) -> DataLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"DataLoader({self.sampler!r}, batches of {self.batch_size}, {self._workers_wanted} workers)"


def _whole(name: str, value: object, least: int) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise UsageError(f"DataLoader: {name} must be a whole number, not {value!r}.") from None
    if number < least:
        raise UsageError(f"DataLoader: {name} must be at least {least}, not {number}.")
    return number
