"""Every error class of ferro, sorted by what the reader can do about it.

All derive from `FerroError` and carry where it happened: `op`, `group`, `rank`, `peer`.
A message has three parts: what happened, where, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


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
    """The call is wrong: fix the call. Nothing was sent, and the group is still good."""


class PluginError(FerroError):
    """A plugin could not be loaded or broke its contract; the message names its distribution."""


class BackendUnavailable(FerroError):
    """A backend cannot be used here: install or configure what `hint` says.

    Attributes:
        backend: the backend's name.
        reason: what was looked for and not found.
        hint: what to do about it.
    """

    def __init__(self, backend: str, reason: str, hint: str = "") -> None:
        text = f"backend {backend!r} cannot be used here: {reason}."
        super().__init__(f"{text} {hint}" if hint else text)
        self.backend = backend
        self.reason = reason
        self.hint = hint


class UnsupportedError(FerroError):
    """This backend, dtype or device does not offer that; choose another one."""


class BackendError(FerroError):
    """A native library failed; its own code is kept in `code`."""

    def __init__(self, message: str, *, code: int | None = None, op: str | None = None) -> None:
        super().__init__(message, op=op)
        self.code = code


class RendezvousError(FerroError):
    """The ranks could not find each other, or do not fit together; no group was made."""


class AuthenticationError(RendezvousError):
    """The other end of a connection does not hold this job's secret."""


class CollectiveMismatch(FerroError):
    """Ranks made different calls; raised on every rank with both calls. The group is dead."""


class CollectiveTimeout(FerroError, TimeoutError):
    """A deadline passed. The group is dead.

    Attributes:
        seq: sequence number of the call in its group.
        seconds: the time allowed.
        arrived: ranks known to have entered the call.
        missing: ranks that had not.
    """

    def __init__(
        self,
        message: str,
        *,
        op: str | None = None,
        group: str | None = None,
        rank: int | None = None,
        peer: int | None = None,
        seq: int | None = None,
        seconds: float | None = None,
        arrived: Sequence[int] = (),
        missing: Sequence[int] = (),
    ) -> None:
        super().__init__(message, op=op, group=group, rank=rank, peer=peer)
        self.seq = seq
        self.seconds = seconds
        self.arrived = tuple(arrived)
        self.missing = tuple(missing)


class PeerLost(FerroError, ConnectionError):
    """A rank left or died: `peer` is its rank, `host` where it ran. The group is dead."""

    def __init__(
        self,
        message: str,
        *,
        op: str | None = None,
        group: str | None = None,
        rank: int | None = None,
        peer: int | None = None,
        host: str | None = None,
    ) -> None:
        super().__init__(message, op=op, group=group, rank=rank, peer=peer)
        self.host = host


class GroupClosed(FerroError):
    """The group was closed, aborted, or died of an earlier failure (its `__cause__`)."""
