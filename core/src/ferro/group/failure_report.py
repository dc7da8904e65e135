"""FailureReport: what a rank was doing when its group failed, or how it left; other ranks read it from the store."""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import FrameType
from typing import NamedTuple

from ferro.collectives.label import OPS, Call
from ferro.group import codec
from ferro.group.thread_frames import thread_frames

_CLOCK_S = 0.01  # how much too early a backend may notice a deadline
_MAX_CHARACTERS = 2048


class UserCall(NamedTuple):
    """The program's own call that led to an operation: the function of ferro that it called, and its line."""

    function: str = ""  # such as "DDP.join"; a method of a group without its class
    line: str = ""  # such as "train.py:12"


NO_USER_CALL = UserCall()


@dataclass(frozen=True, slots=True)
class CallSite:
    """The call on this rank in which a failure was noticed."""

    call: Call
    peers: tuple[int, ...]  # the other ranks of a transfer; () for a collective, in which all take part
    timeout_s: float
    elapsed_s: float
    messages: str = ""  # of a transfer: how many bytes move to or from which rank
    user_call: UserCall = NO_USER_CALL
    collectives: int = 0  # how many collectives this rank has issued on the group

    def missed_deadline(self, error: BaseException) -> bool:
        """Say whether an error is the backend's for a missed deadline, and not a TimeoutError of the program's own."""
        return isinstance(error, TimeoutError) and self.elapsed_s >= self.timeout_s - _CLOCK_S

    def describe(self, group: str) -> str:
        """Name the call as the program made it, for messages: the line of the program comes first."""
        ranks = f"rank{'s' if len(self.peers) > 1 else ''} {', '.join(map(str, self.peers))}"
        name = f"{self.call.op} with {ranks}" if self.peers else f"{self.call.op} #{self.call.seq}"
        function = self.user_call.function
        name = name if function in ("", self.call.op) else f"{function} ({name})"
        return f"{self.user_call.line}: {name} on group {group!r}".removeprefix(": ")


class FailureReport(NamedTuple):
    """What one rank was doing when its group failed, or how it left.

    The default is a rank that said nothing: it was in no call of the group, or it is dead.
    """

    text: str = ""  # the call with its arguments and the line of the program
    label: str = ""  # a collective as other ranks read it in its label, which holds less than all arguments
    op: str = ""
    seq: int = 0  # of a collective
    collectives: int = 0  # how many collectives the rank has issued on the group
    peers: tuple[int, ...] = ()  # the other ranks of a transfer
    awaited: tuple[int, ...] = ()  # the ranks that the backend still waited for; () where it does not say
    left: bool = False  # the rank has left
    reason: str = ""  # the error because of which it left; "" where it left in good order
    cause: int | None = None  # the rank in the world whose loss made it leave

    @classmethod
    def of(cls, site: CallSite, error: BaseException) -> FailureReport:
        """Report the call that was under way when this rank noticed the failure or was woken."""
        call = site.call
        text = f"{call.op} of {site.messages}" if site.peers else f"{call} #{call.seq}"
        if site.user_call.function not in ("", call.op):
            text = f"{site.user_call.function} ({text})"
        if site.user_call.line:
            text += f" at {site.user_call.line}"
        label = str(Call.from_label(call.label())) if not site.peers and call.op in OPS else ""  # not of several calls
        awaited = tuple(getattr(error, "awaited", ()))
        return cls(text[:_MAX_CHARACTERS], label, call.op, call.seq, site.collectives, site.peers, awaited)

    def encode(self) -> bytes:
        return codec.encode(list(self))

    @classmethod
    def decode(cls, data: bytes) -> FailureReport:
        """Decode a report; no data means that the rank said nothing."""
        if not data:
            return cls()
        report = cls(*codec.decode(data))  # type: ignore[misc]
        return report._replace(peers=tuple(report.peers), awaited=tuple(report.awaited))

    def how_it_left(self) -> str:
        """Say how the rank left, for the middle of a sentence."""
        if self.reason:
            return f"left after an error of its own ({self.reason})"
        return f"left the group in good order after {self.collectives} collectives"


def find_user_call(thread: int) -> UserCall:
    """Find the call under way in a thread; an empty one where the thread is not in a function of ferro."""
    frame = thread_frames().get(thread)
    function = ""
    while frame is not None:
        package, name = frame.f_globals.get("__package__") or "", frame.f_globals.get("__name__", "")
        if package == "ferro" or package.startswith(("ferro.", "ferro_")):
            function = _function_name(frame)
        elif function and name not in ("contextlib", "functools", "threading"):
            path = os.path.relpath(frame.f_code.co_filename)
            path = frame.f_code.co_filename if path.startswith("..") else path
            return UserCall(function, f"{path}:{frame.f_lineno}")
        frame = frame.f_back
    return NO_USER_CALL


def _function_name(frame: FrameType) -> str:
    """Name a function as its user writes it: by the class of its object, which may have inherited it."""
    names = frame.f_code.co_qualname.replace("<locals>.", "").split(".")
    if names[-1] == "__call__" and frame.f_globals.get("__package__", "").startswith("ferro."):
        names.pop()  # core's own objects: the call of an operation
    if "self" in frame.f_locals and not frame.f_globals.get("__name__", "").startswith("ferro."):
        names = [type(frame.f_locals["self"]).__name__, names[-1]]
    return ".".join(names[-2:] if frame.f_globals.get("__package__", "").startswith("ferro_") else names[-1:])
