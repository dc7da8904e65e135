"""The ranks of one attempt on this node: started together, watched, and ended together."""

from __future__ import annotations

import selectors
import signal
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from ferro.launch.guard import Guard
from ferro.launch.signals import PASSED_ON, STOPPING, SignalPipe
from ferro.launch.worker import Worker

END_GRACE_S = 2.5
"""Between the signal that asks ranks to end and the one that makes them."""

_TICK_S = 0.5
_GROUP_POLL_S = 0.02


class Crew:
    """Processes under watch; leaving the context ends all that is left of them."""

    def __init__(self, signals: SignalPipe) -> None:
        self.workers: list[Worker] = []
        self._signals = signals
        self._selector = selectors.DefaultSelector()
        self._selector.register(signals.fileno(), selectors.EVENT_READ)
        self._guard: Guard | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        try:
            self.end(signal.SIGTERM)
        finally:
            for worker in self.workers:
                worker.signal(signal.SIGKILL)
                worker.close()
            if self._guard is not None:
                self._guard.close()
            self._selector.close()

    def add(self, worker: Worker) -> None:
        """Watch a worker."""
        self.workers.append(worker)
        for pipe in worker.pipes():
            self._selector.register(pipe, selectors.EVENT_READ, worker)

    def guard(self) -> None:
        """Have all workers killed if the launcher is; call it once, when all are added."""
        self._guard = Guard([worker.group for worker in self.workers])

    def running(self) -> list[Worker]:
        """The workers that have not ended."""
        return [worker for worker in self.workers if worker.code is None]

    def failed(self) -> list[Worker]:
        """The workers that ended badly, of themselves."""
        return [worker for worker in self.workers if worker.code and worker.told_at is None]

    def watch(self, timeout_s: float = _TICK_S) -> Sequence[signal.Signals]:
        """Wait for output, the end of a worker or a signal to the launcher.

        Args:
            timeout_s: the longest wait.

        Returns:
            The signals that asked the launcher to stop.
        """
        for key, _ in self._selector.select(timeout_s):
            worker = key.data
            # One piece per turn, so that a rank that writes without end starves nobody.
            if worker is not None and worker.read(key.fd) == 0:
                self._selector.unregister(key.fd)
        for worker in self.workers:
            if worker.notice_end() and worker.gone and self._guard is not None:
                self._guard.forget(worker.group)
        if not self.failed():
            now = time.monotonic()
            for worker in self.workers:
                worker.output.release_due(now)
        return self._pass_on(self._signals.take())

    def _pass_on(self, received: Sequence[signal.Signals]) -> list[signal.Signals]:
        """Give the ranks what is theirs; return the signals that are to stop the launcher."""
        for signum in received:
            if signum in PASSED_ON:
                for worker in self.running():
                    worker.pass_on(signum)
        return [signum for signum in received if signum in STOPPING]

    def end(self, signum: signal.Signals) -> None:
        """Signal all groups, wait, and kill what is left; a second signal to us cuts the wait."""
        self.watch(0)  # who has failed by now has failed by itself
        for worker in self.workers:
            worker.signal(signum)
        deadline = time.monotonic() + END_GRACE_S
        while not all(worker.check_gone() for worker in self.workers):
            if time.monotonic() > deadline or self.watch(_GROUP_POLL_S):
                self._kill()
                return

    def _kill(self) -> None:
        for worker in self.workers:
            worker.signal(signal.SIGKILL)
        # Descendants die as surely, but where nobody reaps orphans their group never goes.
        deadline = time.monotonic() + END_GRACE_S
        while self.running() and time.monotonic() < deadline:
            self.watch(_GROUP_POLL_S)
