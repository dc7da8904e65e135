"""The fast path: a backend's own way to run a small collective at once, in the thread that calls it.

A group checks a call and hands it to the backend, which takes some microseconds of Python. A backend that can do better
returns a `FastPath` from `Backend.fast_path`. The group remembers it, by what it has checked, and tries it first in
calls of the same kind. It is always allowed to decline: the ordinary path follows.

All ranks of a group decide that by themselves, so both paths must be one protocol: a rank on the fast path meets ranks
on the ordinary one, and finds those that make another call.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from ferro.collectives.label import Call
from ferro.types import Array

if TYPE_CHECKING:
    from ferro.collectives.reduction import Reduction

# Indices of `Turn.state`.
BUSY = 0
NUMBER = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EvenCollective:
    """A collective on CPU arrays whose blocks have one size, as this rank has checked it.

    Attributes:
        op: "all_reduce", "reduce", "broadcast", "all_gather", "gather", "scatter", "reduce_scatter", "all_to_all" or
            "barrier".
        call: what every rank must call, without a number.
        dtype: of the elements; uint8 for a barrier.
        count: elements of one block: of the whole array for all_reduce, reduce and broadcast, of one rank's block for
            the others, 0 for a barrier.
        reduction: None where nothing is reduced.
        root: -1 where there is none.
    """

    op: str
    call: Call
    dtype: np.dtype
    count: int
    reduction: Reduction | None
    root: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """The order of one group's collectives, to which a fast path keeps.

    Code that holds the interpreter lock may run a collective at once if `state[BUSY]` is 0, `lock` is not locked and
    `pending` is empty; it then adds 1 to `state[NUMBER]`. Before it lets go of the interpreter lock it acquires `lock`.

    Attributes:
        lock: held while a collective is carried out, or is started and not yet finished.
        pending: the operations that wait for the group's own thread.
        state: two int64, format "q": not 0 where no collective may begin; how many were issued, the same on all ranks.
        late: called as `late(call, wait)`, by a path that takes turns with the lock held, when other ranks are late or
            make another call. It calls `wait(deadline=…)`, which waits for them or raises what methods of backends
            raise, and ends the group with the cause that all ranks report.
    """

    lock: threading.Lock
    pending: deque[Any]
    state: memoryview
    late: Callable[[Call, Callable[..., None]], None]


class BoundFastPath(Protocol):
    """A fast path with its buffers, which it holds."""

    def __call__(self) -> bool:
        """See `FastPath.__call__`."""

    def start(self) -> bool:
        """Show this rank's contribution to the others, or return False, having done nothing; never waits.

        The caller holds the turn's lock from then until `finish` has returned or raised.
        """

    def test(self) -> bool:
        """Say whether `finish` of a started collective would return at once."""

    def finish(self) -> None:
        """Wait for the other ranks of a started collective, and complete the result."""

    def close(self) -> None:
        """Let go of the buffers, and of what the library keeps; no method is called afterwards."""


class FastPath(Protocol):
    """A collective of one kind and size, for any buffers."""

    def __call__(self, source: Array | None, target: Array | None, /) -> bool:
        """Run the collective; or return False, having done nothing.

        It declines where the turn is another's, and buffers that are not contiguous, aligned and of the right size,
        that overlap in part, or that cannot be written.

        Args:
            source: this rank's input: `count` elements, or as many for every rank in scatter, reduce_scatter and
                all_to_all; None where it has none. It is not changed, unless it is the target.
            target: this rank's result: `count` elements, or as many from every rank in all_gather, gather and
                all_to_all; None where it has none. It may be the source; in all_gather the source may be this rank's
                block of it.
        """

    def bind(self, source: Array | None, target: Array | None, /) -> BoundFastPath | None:
        """Hold these buffers for many calls; None where the fast path would decline them."""


# A scatter after the broadcast of its header, called as a `FastPath`. It may also return the header that the root has
# told: then the broadcast alone was run, since another scatter was expected, or the buffers cannot be used.
FastScatter: TypeAlias = Callable[["Array | None", "Array | None"], bool | bytes]


class PersistentExchange(Protocol):
    """Many messages to and from other ranks, which are sent and received again and again.

    One thread at a time calls it. `has_progress` says whether started steps go on without a call of the program.
    """

    has_progress: bool

    def __call__(self) -> bool:
        """Begin a step, and carry it on for some microseconds; say whether it has ended. If not, `finish` follows."""

    def start(self) -> None:
        """Begin a step, without waiting."""

    def test(self) -> bool:
        """Carry a started step on, without waiting; say whether it has ended."""

    def finish(self, *, deadline: float) -> None:
        """Wait until the step has ended: the buffers sent may be used again, those received are full.

        Raises what `Backend.exchange` raises.
        """

    def close(self) -> None:
        """Let go of the buffers, and of what the library keeps; no method is called afterwards."""


class FastPaths:
    """The part of a backend's contract that is about calls which come again and again; nothing of it is needed."""

    rank: int

    def fast_path(self, collective: EvenCollective, turn: Turn) -> FastPath | None:
        """Make this backend's own way to run a collective of this kind at once; None where it has none.

        Each rank asks for itself, so this must not communicate.
        """
        return None

    def fast_scatter(self, header: EvenCollective, told: bytes, data: EvenCollective, turn: Turn) -> FastScatter | None:
        """Make this backend's own way to broadcast `told`, then to scatter; by default both fast paths, one by one."""
        tell, move = self.fast_path(header, turn), self.fast_path(data, turn)
        if tell is None or move is None:
            return None
        text, at_root = np.frombuffer(bytearray(told), np.uint8), self.rank == data.root

        def run(source: Array | None, target: Array | None) -> bool | bytes:
            if not tell(text if at_root else None, text):
                return False
            return text.tobytes() if text.tobytes() != told else move(source, target) or told

        return run

    def persistent_exchange(
        self, sends: Sequence[tuple[int, Array]], recvs: Sequence[tuple[int, Array]], *, number: int, deadline: float
    ) -> PersistentExchange | None:
        """Make this backend's own way to do these transfers many times; None, on all ranks, where it has none.

        Every rank of the group calls it as a collective, one with nothing to exchange as well. The ranks have compared
        what they send with what the others receive. Messages between two ranks match in the order given, apart from
        all other transfers.

        Each step sends what `sends` (peers and flat contiguous arrays) hold then, and fills `recvs`. `number` is that
        of this persistent operation in its group; `deadline`, an absolute `time.monotonic()` second, of this call.
        """
        return None

    def persistent_collective(
        self,
        collective: EvenCollective | None,
        buffers: Sequence[Array | None],
        turn: Turn,
        *,
        number: int,
        deadline: float,
    ) -> BoundFastPath | None:
        """Make a rooted collective whose ranks run ahead of each other; None, on all ranks, where there is none.

        Every rank calls it as a collective, one that must take another way without `collective`. `buffers` are those of
        `FastPath.bind`, `number` and `deadline` as in `persistent_exchange`. A step takes no turn: it never declines in
        an open group, but adds 1 to `turn.state[NUMBER]`, and finds a rank whose step has another number.
        """
        return None
