"""Hold a rank's traceback back until it is known whether the rank fails, and who failed first.

When one rank fails the others lose their peer and fail too, a moment later; printed as they
come, the tracebacks would bury the one that matters. So from the line that begins a traceback on,
a rank's stderr is held: until the launcher's report, until the rank ends well, or for a second,
as many a traceback is only logged.
"""

from __future__ import annotations

import re

HOLD_S = 1.0
MAX_HELD_BYTES = 1024 * 1024

_HEADER = re.compile(rb"(?:  \+ Exception Group )?Traceback \(most recent call last\)")
_CONSEQUENCES = re.compile(r"(?:ferro\.errors\.)?(?:PeerLost|GroupClosed|CollectiveTimeout)\b")


class HeldTraceback:
    """One rank's stderr, passed through until a traceback begins.

    Attributes:
        began: `time.monotonic()` when the latest traceback began, or None.
        error: that traceback's line after the frames, such as "ValueError: no such key".
        holding: it, and what followed it, has not been shown.
    """

    def __init__(self) -> None:
        self.holding = False
        self.began: float | None = None
        self.error = ""
        self._error_follows = False
        self._held: list[bytes] = []
        self._held_bytes = 0

    def take(self, segment: bytes, now: float) -> list[bytes]:
        """Take a segment; return what may be shown now."""
        if _HEADER.match(segment):
            self.began = now
            self.error = ""
            self._error_follows = True
            self.holding = True
        elif self._error_follows and segment.strip() and not segment[:1].isspace():
            # Frames are indented: the first line that is not names the exception.
            self.error = segment.decode(errors="replace").strip()
            self._error_follows = False
        if not self.holding:
            return [segment]
        self._held.append(segment)
        self._held_bytes += len(segment)
        return self.release() if self._held_bytes > MAX_HELD_BYTES else []

    def release(self) -> list[bytes]:
        """What was held; from now on segments pass through until the next traceback."""
        held, self._held = self._held, []
        self._held_bytes = 0
        self.holding = False
        return held

    def release_at(self) -> float | None:
        """When what is held is to be shown if the rank has not failed by then, or None."""
        return self.began + HOLD_S if self.holding and self.began is not None else None

    def is_consequence(self) -> bool:
        """Whether the traceback says that another rank is to blame."""
        return _CONSEQUENCES.match(self.error) is not None
