"""Faults at the calls that change the disk: counted, and any one made to fail, or to be the process's last.

    calls = faults.counted(save)                        # the calls of a save that succeeds
    for k in range(len(calls) + 1):
        with faults.injected(Fault(at=k, errno=errno.EIO)): ...
        kill = Fault(at=k)                              # in another process: faults.install(kill), then save

`install` works in any process, in which `ferro_checkpoint` makes these calls through `storage.system_calls` alone.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ferro_checkpoint.storage import system_calls

CHANGES = (
    "make_directory",
    "create_file",
    "reserve",
    "write",
    "sync_data",
    "sync_directory",
    "rename",
    "exchange",
    "remove_file",
    "remove_directory",
)
"""The functions of `storage.system_calls` that change the disk, or wait until a change is on it."""


@dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
        at: the index of the call, of this process, at which it happens; 0 is the first.
        errno: the error of this call, which does nothing. None: the process is killed before it by SIGKILL.
        only: the calls that are counted; a later call of another name is not.
        half: a call `write` first writes half of its bytes.
        lasting: each later counted call fails as well, as on a disk that stays full.
    """

    at: int
    errno: int | None = None
    only: tuple[str, ...] = CHANGES
    half: bool = False
    lasting: bool = False


@dataclass
class Calls:
    """The calls that were made, in order: their names and paths (or file descriptors)."""

    made: list[tuple[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.made)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.made]


def counted(function: Callable[[], object]) -> Calls:
    """Call a function, and return the calls that it made."""
    with injected(None) as calls:
        function()
    return calls


@contextmanager
def injected(fault: Fault | None) -> Iterator[Calls]:
    """Count calls, and let the fault happen, within this block, in all threads of this process."""
    before = {name: getattr(system_calls, name) for name in CHANGES}
    try:
        yield install(fault)
    finally:
        for name, function in before.items():
            setattr(system_calls, name, function)


def install(fault: Fault | None) -> Calls:
    """Count calls, and let the fault happen, from now on until this process ends."""
    calls, lock = Calls(), threading.Lock()
    for name in fault.only if fault else CHANGES:
        setattr(system_calls, name, _with_fault(name, getattr(system_calls, name), fault, calls, lock))
    return calls


@contextmanager
def without_exchange() -> Iterator[None]:
    """Let two directories not exchange their names, as on NFS, within this block."""
    before = system_calls.exchange
    system_calls.exchange = lambda one, other: False
    try:
        yield
    finally:
        system_calls.exchange = before


def _with_fault(
    name: str, function: Callable[..., Any], fault: Fault | None, calls: Calls, lock: threading.Lock
) -> Any:
    def call(*arguments: Any) -> Any:
        with lock:
            index = len(calls.made)
            calls.made.append((name, arguments[0]))
        if fault and (index == fault.at or (fault.lasting and index > fault.at)):
            if fault.half and name == "write":
                fd, buffers, offset = arguments
                whole = b"".join(buffers)
                os.pwrite(fd, whole[: len(whole) // 2], offset)
            if fault.errno is None:
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                raise OSError(fault.errno, os.strerror(fault.errno))
        return function(*arguments)

    return call
