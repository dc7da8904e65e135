"""Posted transfers: outstanding ones that one thread begins and awaits together (see `Backend.posted_transfers`).

A transfer has several steps, such as the first frame, "clear to send" and the other frames. Each is a batch of frames;
when a batch has ended, the thread begins the transfer's next step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ferro.types import Array
from ferro_gloo.tcp.engine import ProgressEngine
from ferro_gloo.tcp.posted_batches import EndedBatches, Plan, PostedBatch, Step
from ferro_gloo.tcp.protocol import EngineError


class PostedTcpTransfers:
    """One rank's outstanding transfers in a group.

    Args:
        engine: moves the frames.
        context: the group's number.
        plan: gives a transfer's steps.
        post: begins a step; it is given a function that makes the batch of so many frames.
        translate: makes ferro's error of the engine's.
    """

    def __init__(
        self,
        engine: ProgressEngine,
        context: int,
        plan: Plan,
        post: Callable[[Step, Callable[[int], PostedBatch]], None],
        translate: Callable[[Exception], Exception],
    ) -> None:
        self._engine = engine
        self._plan = plan
        self._post = post
        self._translate = translate
        self._batches = EndedBatches(context)
        self._done: list[tuple[object, BaseException | None]] = []

    def isend(self, handle: object, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `PostedTransfers.isend`."""
        self._begin_step(handle, self._plan([(peer, buffer)], [], tag))

    def irecv(self, handle: object, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `PostedTransfers.irecv`."""
        self._begin_step(handle, self._plan([], [(peer, buffer)], tag))

    def wait_any(self, until: float) -> list[tuple[object, BaseException | None]]:
        """See `PostedTransfers.wait_any`."""
        try:
            ended = self._engine.wait_for_batches(self._batches, 0.0 if self._done else until)
        except EngineError as error:
            raise self._translate(error) from error
        for batch in ended:
            if batch.error is not None:
                self._done.append((batch.handle, self._translate(batch.error)))
                continue
            try:
                self._begin_step(batch.handle, batch.steps)
            except Exception as error:  # noqa: BLE001 - of this transfer alone
                self._done.append((batch.handle, error))
        done, self._done = self._done, []
        return done

    def wake(self) -> None:
        """See `PostedTransfers.wake`."""
        self._engine.wake(self._batches)

    def _begin_step(self, handle: object, steps: Iterator[Step]) -> None:
        step = next(steps, None)
        if step is None:
            self._done.append((handle, None))
        else:
            self._post(step, lambda remaining: PostedBatch(self._batches, remaining, handle, steps))
