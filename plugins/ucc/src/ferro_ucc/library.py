"""Finding libucc and calling it: which file, which version, which functions."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, byref, c_char_p, c_int, c_int32, c_uint, c_uint32, c_void_p
from dataclasses import dataclass
from typing import cast

from ferro.errors import BackendError, BackendUnavailable
from ferro.runtime.environment import variable
from ferro_ucc.abi import CollArgs, ContextParams, LibParams, Status, TeamParams

VARIABLE = "FERRO_LIBUCC"
_NAME = "libucc.so.1"
_OLDEST, _NEWEST = (1, 1), (1, 8)
_HINT = (
    f"Install UCC {_OLDEST[0]}.{_OLDEST[1]} to {_NEWEST[0]}.{_NEWEST[1]}: the package libucc1 of "
    "Debian (sid), ucc of conda-forge, NVIDIA HPC-X, or its sources, github.com/openucx/ucc; and "
    f"where the loader does not find it, set {VARIABLE} to the path of {_NAME}"
)

# What a process of its own does to find out the version of the library it is given.
_ASK = """
import ctypes, sys
numbers = [ctypes.c_uint() for _ in range(3)]
ctypes.CDLL(sys.argv[1]).ucc_get_version(*map(ctypes.byref, numbers))
print(*(number.value for number in numbers))
"""
_ASK_S = 10.0

# The functions that we call; all but the last three return a status.
_FUNCTIONS = {
    "ucc_lib_config_read": CFUNCTYPE(c_int, c_char_p, c_char_p, POINTER(c_void_p)),
    "ucc_init_version": CFUNCTYPE(c_int, c_uint, c_uint, POINTER(LibParams), c_void_p, POINTER(c_void_p)),
    "ucc_finalize": CFUNCTYPE(c_int, c_void_p),
    "ucc_context_config_read": CFUNCTYPE(c_int, c_void_p, c_char_p, POINTER(c_void_p)),
    "ucc_context_create": CFUNCTYPE(c_int, c_void_p, POINTER(ContextParams), c_void_p, POINTER(c_void_p)),
    "ucc_context_progress": CFUNCTYPE(c_int, c_void_p),
    "ucc_context_destroy": CFUNCTYPE(c_int, c_void_p),
    "ucc_team_create_post": CFUNCTYPE(c_int, POINTER(c_void_p), c_uint32, POINTER(TeamParams), POINTER(c_void_p)),
    "ucc_team_create_test": CFUNCTYPE(c_int, c_void_p),
    "ucc_team_destroy": CFUNCTYPE(c_int, c_void_p),
    "ucc_collective_init": CFUNCTYPE(c_int, POINTER(CollArgs), POINTER(c_void_p), c_void_p),
    "ucc_collective_post": CFUNCTYPE(c_int, c_void_p),
    "ucc_collective_finalize": CFUNCTYPE(c_int, c_void_p),
    "ucc_lib_config_release": CFUNCTYPE(None, c_void_p),
    "ucc_context_config_release": CFUNCTYPE(None, c_void_p),
    "ucc_status_string": CFUNCTYPE(c_char_p, c_int),
}


class Library:
    """libucc, loaded.

    Args:
        handle: the shared library.
        version: major, minor and patch.

    Attributes:
        version: major, minor and patch.
        gathers: whether it has gather and scatter with sizes (1.1 has not).
        progress: `ucc_context_progress`, which is called most.
    """

    def __init__(self, handle: ctypes.CDLL, version: tuple[int, int, int]) -> None:
        self.version = version
        self.gathers = version >= (1, 2, 0)
        self._functions: dict[str, Callable[..., int]] = {
            name: prototype((name, handle)) for name, prototype in _FUNCTIONS.items()
        }
        self.progress = self._functions["ucc_context_progress"]

    @classmethod
    def load(cls) -> Library:
        """Load what FERRO_LIBUCC names, or else what the loader finds.

        Raises:
            BackendUnavailable: there is none, or not one of the versions known.
        """
        path, asked = _wanted()
        try:
            handle = ctypes.CDLL(path)
            version = _version(handle)
            if (unfit := _unfit(asked, version)) is None:
                return cls(handle, version)
        except (OSError, AttributeError) as error:
            unfit = _unloadable(asked, str(error))
        raise BackendUnavailable("ucc", unfit.reason, unfit.hint)

    def status(self, name: str, *arguments: object) -> int:
        """Call a function; return its status, which is no error.

        Raises:
            BackendError: it failed.
        """
        status = self._functions[name](*arguments)
        if status < 0:
            raise self.error(status, name)
        return status

    def release(self, name: str, config: c_void_p) -> None:
        """Give a configuration back."""
        self._functions[name](config)

    def error(self, status: int, what: str) -> BackendError:
        """Return the error for a status, in the library's words."""
        text = cast("bytes", self._functions["ucc_status_string"](status))
        return BackendError(
            f"UCC {dotted(self.version)}: {what} failed with {status} "
            f"({text.decode(errors='replace')}); UCC_LOG_LEVEL=info makes it say more",
            code=status,
        )


@dataclass(frozen=True, slots=True)
class Found:
    """A libucc that can be used."""

    path: str
    version: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Absent:
    """No libucc that can be used: what was looked for, and what to do."""

    reason: str
    hint: str = _HINT


def find() -> Found | Absent:
    """Look for libucc, in a process of its own; never raises.

    Nothing but the library tells its version, and loading it is no small thing: UCX below it
    installs signal handlers and starts a thread, which a program that only asks does not want.
    """
    import subprocess  # here, for most programs never ask

    path, asked = _wanted()
    command = [sys.executable, "-I", "-S", "-c", _ASK, path]
    try:
        child = subprocess.run(  # noqa: S603 - this interpreter, our own lines
            command, capture_output=True, text=True, errors="replace", timeout=_ASK_S, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return _unloadable(asked, str(error))
    if child.returncode != 0:
        words = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
        return _unloadable(asked, words[-1])
    major, minor, patch = map(int, child.stdout.split())
    return _unfit(asked, (major, minor, patch)) or Found(path, (major, minor, patch))


def _wanted() -> tuple[str, str]:
    """Return what to load, and how to speak of it."""
    named = variable(VARIABLE)
    return (named, f"{VARIABLE}={named}") if named else (_NAME, f"{_NAME} ({VARIABLE} is not set)")


def _version(handle: ctypes.CDLL) -> tuple[int, int, int]:
    """Ask a library for its version, as `_ASK` does in its process."""
    major, minor, patch = c_uint(), c_uint(), c_uint()
    handle.ucc_get_version(byref(major), byref(minor), byref(patch))
    return major.value, minor.value, patch.value


def _unloadable(asked: str, why: str) -> Absent:
    return Absent(f"looked for {asked}, which could not be loaded as libucc: {why}")


def _unfit(asked: str, version: tuple[int, int, int]) -> Absent | None:
    """Say what is wrong with a version, if anything is."""
    if _OLDEST <= version[:2] <= _NEWEST:
        return None
    return Absent(
        f"{asked} is UCC {dotted(version)}; this ferro-ucc knows the interface of UCC "
        f"{dotted(_OLDEST)} to {dotted(_NEWEST)}"
    )


def dotted(version: tuple[int, ...]) -> str:
    """Return a version as people write it."""
    return ".".join(map(str, version))


def request_status(request: int) -> c_int32:
    """Return the place where a request's status is, which the library changes."""
    return c_int32.from_address(request)


def is_running(status: int) -> bool:
    """Say whether an operation with this status has not ended."""
    return status in (Status.IN_PROGRESS, Status.INITIALIZED)
