"""Finding, loading and calling libucc."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, byref, c_char_p, c_int, c_int32, c_uint, c_uint32, c_void_p
from dataclasses import dataclass
from typing import cast

from ferro.errors import BackendError, BackendUnavailable
from ferro.runtime.environment import variable
from ferro_ucc.abi import CollArgs, ContextParams, LibParams, TeamParams, UccStatus

VARIABLE = "FERRO_LIBUCC"
_NAME = "libucc.so.1"
_OLDEST, _NEWEST = (1, 1), (1, 8)
_HINT = (
    f"Install UCC {_OLDEST[0]}.{_OLDEST[1]} to {_NEWEST[0]}.{_NEWEST[1]}: the package libucc1 of "
    "Debian (sid), ucc of conda-forge, NVIDIA HPC-X, or its sources, github.com/openucx/ucc; and "
    f"where the loader does not find it, set {VARIABLE} to the path of {_NAME}"
)

# The program of a subprocess that prints the version of the library that it is given.
_PRINT_VERSION = """
import ctypes, sys
numbers = [ctypes.c_uint() for _ in range(3)]
ctypes.CDLL(sys.argv[1]).ucc_get_version(*map(ctypes.byref, numbers))
print(*(number.value for number in numbers))
"""
_SUBPROCESS_S = 10.0

# The functions that ferro calls; all but the last three return a status.
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


class UccLibrary:
    """libucc, loaded.

    Args:
        handle: the shared library.
        version: major, minor and patch.

    Attributes:
        version: major, minor and patch.
        has_gather: True when it has gather and scatter with sizes (1.1 has not).
        progress: `ucc_context_progress`, which is called most often.
    """

    def __init__(self, handle: ctypes.CDLL, version: tuple[int, int, int]) -> None:
        self.version = version
        self.has_gather = version >= (1, 2, 0)
        self._functions: dict[str, Callable[..., int]] = {
            name: prototype((name, handle)) for name, prototype in _FUNCTIONS.items()
        }
        self.progress = self._functions["ucc_context_progress"]

    @classmethod
    def load(cls) -> UccLibrary:
        """Load the file that FERRO_LIBUCC names, or else the one that the loader finds.

        Raises:
            BackendUnavailable: libucc cannot be loaded, or ferro-ucc does not know its version.
        """
        path, description = _path()
        try:
            handle = ctypes.CDLL(path)
            version = _version(handle)
            if (unusable := _check_version(description, version)) is None:
                return cls(handle, version)
        except (OSError, AttributeError) as error:
            unusable = _not_loaded(description, str(error))
        raise BackendUnavailable("ucc", unusable.reason, unusable.hint)

    def status(self, name: str, *arguments: object) -> int:
        """Call a function, and return its status, which is not negative.

        Raises:
            BackendError: the function failed.
        """
        status = self._functions[name](*arguments)
        if status < 0:
            raise self.error(status, name)
        return status

    def release(self, name: str, config: c_void_p) -> None:
        """Release a configuration by the function of this name."""
        self._functions[name](config)

    def error(self, status: int, what: str) -> BackendError:
        """Make the error for a negative status, in the library's words."""
        text = cast("bytes", self._functions["ucc_status_string"](status))
        return BackendError(
            f"UCC {dotted(self.version)}: {what} failed with {status} "
            f"({text.decode(errors='replace')}); UCC_LOG_LEVEL=info makes it say more",
            code=status,
        )


@dataclass(frozen=True, slots=True)
class UsableLibrary:
    """A libucc that can be used."""

    path: str
    version: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class UnusableLibrary:
    """The reason why no libucc can be used, and what to do."""

    reason: str
    hint: str = _HINT


def find_library() -> UsableLibrary | UnusableLibrary:
    """Find libucc and its version in a subprocess; never raises.

    Only the library itself tells its version, and loading it has side effects that a mere question must not
    have: UCX below it installs signal handlers and starts a thread.
    """
    import subprocess  # here, since most programs never probe for UCC

    path, description = _path()
    command = [sys.executable, "-I", "-S", "-c", _PRINT_VERSION, path]
    try:
        child = subprocess.run(  # noqa: S603 - this interpreter runs a constant program
            command, capture_output=True, text=True, errors="replace", timeout=_SUBPROCESS_S, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return _not_loaded(description, str(error))
    if child.returncode != 0:
        words = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
        return _not_loaded(description, words[-1])
    major, minor, patch = map(int, child.stdout.split())
    return _check_version(description, (major, minor, patch)) or UsableLibrary(path, (major, minor, patch))


def _path() -> tuple[str, str]:
    """Return the library's path or file name, and its description for messages."""
    named = variable(VARIABLE)
    return (named, f"{VARIABLE}={named}") if named else (_NAME, f"{_NAME} ({VARIABLE} is not set)")


def _version(handle: ctypes.CDLL) -> tuple[int, int, int]:
    """Ask a library for its version, as `_PRINT_VERSION` does in its subprocess."""
    major, minor, patch = c_uint(), c_uint(), c_uint()
    handle.ucc_get_version(byref(major), byref(minor), byref(patch))
    return major.value, minor.value, patch.value


def _not_loaded(description: str, why: str) -> UnusableLibrary:
    return UnusableLibrary(f"looked for {description}, which could not be loaded as libucc: {why}")


def _check_version(description: str, version: tuple[int, int, int]) -> UnusableLibrary | None:
    """Return None for a version that ferro-ucc knows, else the reason why it cannot be used."""
    if _OLDEST <= version[:2] <= _NEWEST:
        return None
    return UnusableLibrary(
        f"{description} is UCC {dotted(version)}; this ferro-ucc knows the interface of UCC "
        f"{dotted(_OLDEST)} to {dotted(_NEWEST)}"
    )


def dotted(version: tuple[int, ...]) -> str:
    """Format a version, such as "1.8.0"."""
    return ".".join(map(str, version))


def request_status(request: int) -> c_int32:
    """View the status field of a request, which the library changes."""
    return c_int32.from_address(request)


def is_running(status: int) -> bool:
    """Say whether an operation with this status has not ended."""
    return status in (UccStatus.IN_PROGRESS, UccStatus.INITIALIZED)
