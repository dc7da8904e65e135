"""The errors of ferro, sorted by what the reader can do about them.

All derive from `FerroError` and carry where they happened: `op`, `group`, `rank`, `peer`. A message has three parts:
what happened, where, and what to do. After an error "the group is good" means that further calls on it work; "the group
is dead" means that each further call raises `GroupClosed`, and only `close()`, `abort()` and `shrink()` are of use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

_Raised = TypeVar("_Raised", bound=BaseException)


def with_awaited(error: _Raised, ranks: Iterable[int]) -> _Raised:
    """Note in a backend's error the ranks of its group that the call still waited for; return the error.

    By following these waits ferro names the rank that was truly missing.
    """
    error.awaited = tuple(ranks)  # type: ignore[attr-defined]
    return error


class FerroError(Exception):
    """Base of all errors that ferro raises on purpose.

    Attributes:
        op: the collective or call that failed, such as "all_reduce", or None.
        group: name of the process group, or None.
        rank: this process's rank in that group, or None.
        peer: the other rank concerned, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        op: str | None = None,
        group: str | None = None,
        rank: int | None = None,
        peer: int | None = None,
    ) -> None:
        super().__init__(message)
        self.op = op
        self.group = group
        self.rank = rank
        self.peer = peer


class UsageError(FerroError, ValueError):
    """The call is wrong: fix the call. Nothing was sent, and the group is good."""


class UnsupportedError(FerroError):
    """The backend does not offer this operation, dtype or device: choose another one. The group is good."""


class PluginError(FerroError):
    """A plugin cannot be loaded or broke its contract: repair, update or uninstall the distribution that is named."""


class BackendUnavailable(FerroError):
    """A backend cannot be used on this machine: install or configure what `hint` says.

    Attributes:
        backend: the backend's name.
        reason: what ferro looked for and did not find.
        hint: what to do about it.
    """

    def __init__(self, backend: str, reason: str, hint: str = "") -> None:
        text = f"backend {backend!r} cannot be used here: {reason}."
        super().__init__(f"{text} {hint}" if hint else text)
        self.backend = backend
        self.reason = reason
        self.hint = hint


class BackendError(FerroError):
    """A native library failed; `code` is its own error code, or None. The group is dead."""

    def __init__(self, message: str, *, code: int | None = None, op: str | None = None) -> None:
        super().__init__(message, op=op)
        self.code = code


class RendezvousError(FerroError):
    """The ranks did not find each other, or do not fit together: start them alike. No group was made."""


class AuthenticationError(RendezvousError):
    """The other end of a connection does not hold this job's secret: give all ranks the same FERRO_SECRET."""


class CollectiveMismatch(FerroError):
    """Ranks made different calls: fix the program. Every rank raises this error, with both calls. The group is dead."""


class CollectiveTimeout(FerroError, TimeoutError):
    """A deadline passed: read the logs of the missing ranks first. The group is dead.

    Attributes:
        seq: sequence number of the call in its group, or None.
        seconds: the time allowed, or None.
        arrived: ranks known to have entered the call.
        missing: ranks that had not entered the call.
    """

    def __init__(
        self,
        message: str,
        *,
        seq: int | None = None,
        seconds: float | None = None,
        arrived: Sequence[int] = (),
        missing: Sequence[int] = (),
        **where: Any,
    ) -> None:
        super().__init__(message, **where)
        self.seq = seq
        self.seconds = seconds
        self.arrived = tuple(arrived)
        self.missing = tuple(missing)


class PeerLost(FerroError, ConnectionError):
    """A rank left or died: read its log first. `peer` is its rank, `host` where it ran. The group is dead."""

    def __init__(self, message: str, *, host: str | None = None, **where: Any) -> None:
        super().__init__(message, **where)
        self.host = host


class GroupClosed(FerroError):
    """The group was closed or aborted, or died of an earlier failure, which is this error's `__cause__`."""


class ThreadLimitError(FerroError, RuntimeError):
    """The system refuses a thread: raise the limit that is named, or have less outstanding. The group is good."""


class RankKilled(BaseException):
    """Ends the thread of a simulated rank that is killed on purpose; no `except Exception` stops it."""
