"""Workers that make batches ahead: threads, each of which may drive a process.

    the loader's thread          worker thread w               worker process w
    submit(task) -> queue  ->    takes the task     ->  pipe   make_batch
    result()  <-  done event <-  keeps the batch    <-  pipe   pickled batch

Worker w makes the batches w, w + n, w + 2n, … of n workers, so who makes a batch does not depend on time.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ferro import FerroError

from .fetching import BatchTask, Collate, Dataset, make_batch, seed_globals

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

_STOP_S = 5.0  # for a process to end by itself
_POLL_S = 0.2
_PARENT_CHECK_S = 1.0


class DataWorkerError(FerroError):
    """A worker of a DataLoader died, or did not make a batch in time: read its output; the loader can be used again."""


class PendingBatch:
    """A batch that a worker makes."""

    def __init__(self, task: BatchTask, worker: str) -> None:
        self.task = task
        self._worker = worker
        self._done = threading.Event()
        self._batch: Any = None
        self._error: BaseException | None = None

    def finish(self, batch: Any, error: BaseException | None) -> None:
        """Give the batch, or the error that making it raised."""
        self._batch, self._error = batch, error
        self._done.set()

    def result(self, timeout_s: float) -> Any:
        """Wait for the batch.

        Raises:
            DataWorkerError: it did not come in time, or the worker died.
            Exception: the data set, or `collate`, raised it.
        """
        if not self._done.wait(timeout_s):
            raise DataWorkerError(
                f"{self._worker} of the DataLoader has not made {self.task} in {timeout_s:g} s: look what the data "
                "set waits for, or give DataLoader a longer timeout_s."
            )
        if self._error is not None:
            raise self._error
        return self._batch


class ThreadWorker:
    """A thread that makes batches, one after the other."""

    def __init__(self, number: int, dataset: Dataset, collate: Collate) -> None:
        self.name = f"worker {number} (a thread)"
        self._tasks: queue.SimpleQueue[PendingBatch | None] = queue.SimpleQueue()
        self._dataset, self._collate = dataset, collate
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"ferro-data-{number}", daemon=True)
        self._thread.start()

    def submit(self, task: BatchTask) -> PendingBatch:
        """Make a batch after those that were submitted before."""
        pending = PendingBatch(task, self.name)
        self._tasks.put(pending)
        return pending

    def close(self) -> None:
        """End the thread; a thread in the data set's own code ends when that returns."""
        self._closed.set()
        self._tasks.put(None)
        self._thread.join(_POLL_S)

    def _run(self) -> None:
        while (pending := self._tasks.get()) is not None:
            try:
                if not self._closed.is_set():
                    pending.finish(self._make(pending.task), None)
            except BaseException as error:  # noqa: BLE001 - the loader's thread raises it
                if not isinstance(error, DataWorkerError):
                    error.add_note(f"(in {self.name} of the DataLoader, in {pending.task})")
                pending.finish(None, error)

    def _make(self, task: BatchTask) -> Any:
        return make_batch(self._dataset, self._collate, task)


class ProcessWorker(ThreadWorker):
    """A process that makes batches, and the thread that hands it tasks and takes the batches."""

    def __init__(self, number: int, dataset: Dataset, collate: Collate, start_method: str) -> None:
        import multiprocessing  # here, since it is slow to import and not always needed

        context = multiprocessing.get_context(start_method)
        self._pipe, theirs = context.Pipe()
        self._is_busy = False
        self._process = context.Process(  # type: ignore[attr-defined]
            target=_serve,
            args=(theirs, self._pipe, os.getpid(), dataset, collate),
            name=f"ferro-data-{number}",
            daemon=True,
        )
        with warnings.catch_warnings():
            # Since 3.12 Python warns of a fork where there are threads; the child touches nothing of theirs.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        theirs.close()
        super().__init__(number, dataset, collate)
        self.name = f"worker {number} (process {self._process.pid})"

    def close(self) -> None:
        """End the process and the thread."""
        super().close()
        self._thread.join(_STOP_S)  # it may be in the middle of a message
        was_busy = self._is_busy
        with contextlib.suppress(OSError):
            self._pipe.send_bytes(b"")
        self._pipe.close()
        if not was_busy:
            self._process.join(_STOP_S)
        self._process.terminate()
        self._process.join(_STOP_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()

    def _make(self, task: BatchTask) -> Any:
        self._is_busy = True
        try:
            self._pipe.send_bytes(pickle.dumps(task))
            while not self._pipe.poll(_POLL_S):
                if self._closed.is_set():
                    return None
            answer = self._pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise self._death(task) from error
        self._is_busy = False
        made, value = pickle.loads(answer)  # noqa: S301 - of our own child, over a pipe that only both have
        if made:
            return value
        raised, text = value
        raised.add_note(text)
        raise raised

    def _death(self, task: BatchTask) -> DataWorkerError:
        self._process.join(_STOP_S)
        code = self._process.exitcode
        if code is not None and code < 0:
            ended = f"was ended by {signal.Signals(-code).name}"
            hint = " (the system may have run out of memory)" if -code == signal.SIGKILL else ""
        else:
            ended, hint = f"ended with exit status {code}", ""
        return DataWorkerError(f"{self.name} of the DataLoader {ended}{hint} before it had made {task}.")


def _serve(pipe: Connection, parents_end: Connection, parent: int, dataset: Dataset, collate: Collate) -> None:
    """Make batches until the parent says that there are no more, or has gone: the program of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parents_end.close()
    with contextlib.suppress(EOFError, OSError):
        while True:
            # Other forked processes may have the parent's end of the pipe open, which then does not end with it.
            while not pipe.poll(_PARENT_CHECK_S):
                if os.getppid() != parent:
                    return
            if not (order := pipe.recv_bytes()):
                return
            task = pickle.loads(order)  # noqa: S301 - of our own parent
            try:
                seed_globals(task)
                answer = _pickled((True, make_batch(dataset, collate, task)))
            except Exception as error:  # noqa: BLE001 - the parent raises it
                answer = _pickled_error(error)
            pipe.send_bytes(answer)


def _pickled(value: object) -> bytes:
    return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)


def _pickled_error(error: BaseException) -> bytes:
    text = "".join(traceback.format_exception(error)).rstrip()
    try:
        data = _pickled((False, (error, text)))
        pickle.loads(data)  # noqa: S301 - some errors can be pickled, but not loaded
    except Exception:  # noqa: BLE001 - whatever the error's class raises
        data = _pickled((False, (RuntimeError(f"{type(error).__name__}: {error}"), text)))
    return data


def make_workers(
    count: int, dataset: Dataset, collate: Collate, *, start_method: str | None
) -> tuple[list[ThreadWorker], Callable[[], None]]:
    """Start workers, as processes if there is a start method; return them, and a function that ends all of them."""
    workers: list[ThreadWorker] = []
    started_in = os.getpid()

    def close_all() -> None:
        if os.getpid() != started_in:  # a forked child has no part in its parent's workers
            return
        while workers:
            workers.pop().close()

    try:
        for number in range(count):
            if start_method is None:
                workers.append(ThreadWorker(number, dataset, collate))
            else:
                workers.append(ProcessWorker(number, dataset, collate, start_method))
    except BaseException:
        close_all()
        raise
    return workers, close_all
