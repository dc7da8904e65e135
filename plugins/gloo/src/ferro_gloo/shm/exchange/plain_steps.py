"""PlainSteps: the steps of an exchange in pure Python, as the native ones (see `native_steps`).

It has only plain loads and stores, which are enough where `pure_python_is_safe` says so, and wakes nobody: a rank that
waits looks again after a short sleep.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence

from ferro.types import Array
from ferro_gloo.shm.exchange.channels import CLOSED_AT, HEADER_BYTES, NUMBER_BYTES, ChannelLayout
from ferro_gloo.shm.exchange.native_steps import Channel

_MIN_SLEEP_S = 20e-6
_MAX_SLEEP_S = 1e-3


class PlainSteps:
    """See `native_steps.Steps`."""

    def __init__(
        self, bell: Array, sends: Sequence[Channel], recvs: Sequence[Channel], spins: int, yields: int
    ) -> None:
        self._messages = [_Message(channel, sends=True) for channel in sends]
        self._messages += [_Message(channel, sends=False) for channel in recvs]
        self._left: list[_Message] = []
        self._lock = threading.Lock()
        self._looks = (spins, yields)
        self._closed = False

    def __call__(self) -> bool:
        """See `native_steps.Steps`."""
        return self.begin() or self.wait(*self._looks, 0.0)

    def begin(self) -> bool:
        """See `native_steps.Steps`."""
        with self._lock:
            if self._left or self._closed:
                raise ValueError("a step of this exchange is under way, or the exchange is closed")
            for message in self._messages:
                message.done = 0
            self._left = [message for message in self._messages if not message.advance()]
            return not self._left

    def progress(self) -> bool:
        """See `native_steps.Steps`."""
        if self._left and self._lock.acquire(blocking=False):
            try:
                if not self._closed:
                    self._left = [message for message in self._left if not message.advance()]
            finally:
                self._lock.release()
        return not self._left

    def wait(self, spins: int, yields: int, seconds: float) -> bool:
        """See `native_steps.Steps`."""
        for look in range(spins + yields):
            if self.progress():
                return True
            if look >= spins:
                os.sched_yield()
        deadline, sleep_s = time.monotonic() + seconds, _MIN_SLEEP_S
        while not self.progress():
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                return False
            time.sleep(min(sleep_s, remaining_s))
            sleep_s = min(2 * sleep_s, _MAX_SLEEP_S)
        return True

    def awaited(self) -> list[int]:
        """See `native_steps.Steps`."""
        left = self._left
        return [index for index, message in enumerate(self._messages) if message in left]

    def close(self, tell: bool) -> None:
        """See `native_steps.Steps`."""
        if not tell:
            self._lock = threading.Lock()
        with self._lock:
            self._closed = True
            for message in self._messages:
                if tell:
                    message.tell_closed()
            self._messages = []
            self._left = []


class _Message:
    """One message, sent or received, and its channel."""

    def __init__(self, channel: Channel, *, sends: bool) -> None:
        self._user, memory, _, block, slots, source = channel
        assert not isinstance(source, tuple), "only the native steps read other processes' memory"
        self._source = source
        layout = ChannelLayout(block, slots, self._source is not None)
        self._block, self._slots, self._stride = block, slots, layout.stride
        self._blocks = layout.blocks(self._user.size)
        self._memory = memory
        self._words = memory.data.cast("q")
        self._sends = sends
        self._total = 0
        self.done = 0

    def advance(self) -> bool:
        """Move all blocks that can be moved; return True if the step's message has ended."""
        return self._send() if self._sends else self._receive()

    def tell_closed(self) -> None:
        """Tell the sender that this rank uses its channel no more."""
        if not self._sends:
            self._words[CLOSED_AT // 8] = 1

    def _send(self) -> bool:
        """Write all blocks for which there is room; return True if the step's message has been sent."""
        while self.done < self._blocks:
            if self._total - self._words[0] >= self._slots:
                return False
            at = HEADER_BYTES + self._total % self._slots * self._stride
            if self._source is None:
                part = self._part()
                self._memory[at + NUMBER_BYTES : at + NUMBER_BYTES + part.size] = part
            self._total += 1
            self.done += 1
            self._words[at // 8] = self._total
        return self._source is None or self._words[0] == self._total

    def _receive(self) -> bool:
        """Read all blocks that are there; return True if the step's message has been received."""
        while self.done < self._blocks:
            at = HEADER_BYTES + self._total % self._slots * self._stride
            if self._words[at // 8] <= self._total:
                return False
            part = self._part()
            part[...] = self._memory[at + NUMBER_BYTES :][: part.size] if self._source is None else self._source
            self._total += 1
            self.done += 1
            self._words[0] = self._total
        return True

    def _part(self) -> Array:
        """Slice the next block of the message."""
        start = self.done * self._block
        return self._user[start : start + self._block]
