"""Run one marked test on its ranks.

Ranks of the simulated backend are threads, and pytest shows a failing assertion as in any test.
Ranks of other backends are processes, which load the test's function by file and name and receive
its other arguments by `ferro.group.codec`; their tracebacks come as text.
"""

from __future__ import annotations

import inspect
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from ferro import ProcessGroup, backends
from ferro.errors import CollectiveTimeout, FerroError, GroupClosed, PeerLost, UsageError
from ferro.group import codec
from ferro.group.thread_frames import thread_frames
from ferro.simulated import simulate
from ferro_testing.functions import load, locate
from ferro_testing.outcome import Outcome, RanksFailed
from ferro_testing.ranks import run_ranks

_SIMULATED = "simulated"
_MARGIN_S = 2.0  # collectives time out before the test does, so that their errors name the missing ranks
_CONSEQUENCES = (PeerLost, GroupClosed, CollectiveTimeout)  # errors that follow from another rank's failure
_PATH = "pathlib.Path"


def check_backends(names: Sequence[str]) -> None:
    """Make sure that all of these backends can be used here.

    Raises:
        pytest.UsageError: one of them cannot be used; the message says why and what to do.
    """
    for name in names:
        try:
            found = backends.probe(backends.get(name))
        except FerroError as error:
            raise pytest.UsageError(f"--ferro-backend {name}: {error}") from None
        if not found.ok:
            raise pytest.UsageError(f"--ferro-backend {name}: it cannot be used here: {found.reason}. {found.hint}")


def run_test(item: pytest.Function, backend: str, world_size: int, timeout_s: float) -> None:
    """Run a test's function on every rank; raise an error that makes pytest report its failure.

    Args:
        item: the test.
        backend: name of the backend.
        world_size: number of ranks.
        timeout_s: deadline of the whole test in seconds.
    """
    function = item.obj
    names = [name for name in inspect.signature(function).parameters if name != "group"]
    arguments = {name: item.funcargs[name] for name in names if name in item.funcargs}
    if backend == _SIMULATED:
        _on_threads(function, arguments, world_size, timeout_s)
    else:
        _on_processes(function, arguments, backend, world_size, timeout_s)


def _on_threads(
    function: Callable[..., object], arguments: Mapping[str, object], world_size: int, timeout_s: float
) -> None:
    """Run the function on simulated ranks; raise the first cause, with the other ranks' in its notes."""
    __tracebackhide__ = True
    failures: dict[int, BaseException] = {}
    running: dict[int, int] = {}  # rank -> its thread

    def on_rank(group: ProcessGroup) -> None:
        running[group.rank] = threading.get_ident()
        try:
            function(group=group, **arguments)
        except BaseException as error:  # noqa: BLE001 - shown as the test's, whatever it is
            failures[group.rank] = error
            raise _RankFailed from None
        finally:
            del running[group.rank]

    late = ""
    try:
        simulate(on_rank, world_size, timeout_s=_collective_s(timeout_s), run_timeout_s=timeout_s)
    except _RankFailed:
        pass
    except CollectiveTimeout:  # `run_timeout_s` passed
        late = _stacks(dict(running), timeout_s)
    if failures:
        raise _combined_failure(dict(failures), late, world_size)
    if late:
        pytest.fail(late, pytrace=False)


class _RankFailed(BaseException):
    """Ends a simulated rank whose failure is known."""


def _combined_failure(failures: Mapping[int, BaseException], late: str, world_size: int) -> BaseException:
    """Return the first cause: failures come before skips, and skips before consequences of a failure."""
    skips = (pytest.skip.Exception, pytest.xfail.Exception)

    def order(rank: int) -> tuple[bool, bool]:
        return isinstance(failures[rank], _CONSEQUENCES), isinstance(failures[rank], skips)

    first, *others = sorted(failures, key=order)
    cause = failures[first]
    if isinstance(cause, skips):
        return cause
    cause.add_note(f"(on rank {first} of {world_size}, {_SIMULATED})")
    for rank in others:
        if isinstance(failures[rank], _CONSEQUENCES) and not isinstance(cause, _CONSEQUENCES):
            line = str(failures[rank]).partition("\n")[0]
            cause.add_note(f"--- rank {rank}: {type(failures[rank]).__name__}: {line}")
        elif failures[rank] is not cause:
            text = "".join(traceback.format_exception(failures[rank]))
            cause.add_note(f"--- rank {rank}:\n{text}")
    if late:
        cause.add_note(late)
    return cause


def _stacks(running: Mapping[int, int], timeout_s: float) -> str:
    """Describe the stacks of the ranks that have not ended in time."""
    frames = thread_frames()
    parts = [
        f"--- rank {rank} did not end within {timeout_s:g} s; it is here:\n"
        + "".join(traceback.format_stack(frames[thread]))
        for rank, thread in sorted(running.items())
        if thread in frames
    ]
    return "\n".join(parts) or f"the ranks did not end within {timeout_s:g} s"


def _on_processes(
    function: Callable[..., object], arguments: Mapping[str, object], backend: str, world_size: int, timeout_s: float
) -> None:
    """Run the function on processes; fail with every rank's traceback."""
    __tracebackhide__ = True
    try:
        task = [locate(function), {name: _encode_argument(arguments[name], name) for name in arguments}]
        codec.encode(task)
    except UsageError as error:
        pytest.fail(f"this test cannot run on {backend}, whose ranks are processes: {error}", False)
    failed: Sequence[Outcome] = ()
    try:
        results: list[object] = run_ranks(
            run_on_rank,
            world_size,
            backend=backend,
            args=task,
            timeout_s=timeout_s,
            init_options={"timeout_s": _collective_s(timeout_s)},
        )
    except RanksFailed as error:
        failed = error.outcomes
        results = [outcome.result for outcome in failed]
    left_early = [result for result in results if isinstance(result, list)]
    if failed and not (left_early and _are_consequences(failed)):
        what = f"{function.__name__} on {world_size} ranks of {backend}"
        pytest.fail(str(RanksFailed(what, failed)), pytrace=False)
    if left_early:
        _skip_test(*left_early[0])


def _are_consequences(outcomes: Sequence[Outcome]) -> bool:
    """Say whether all ranks that failed did so because another rank left early."""
    consequences = {"", "Late", *(kind.__name__ for kind in _CONSEQUENCES)}
    return {outcome.error_type for outcome in outcomes} <= consequences


def _collective_s(timeout_s: float) -> float:
    """Return the timeout of one collective in a test with this timeout."""
    return max(timeout_s - _MARGIN_S, timeout_s / 2)


def run_on_rank(group: ProcessGroup, place: dict[str, str], arguments: dict[str, object]) -> list[str] | None:
    """Run a test's function in a rank's process; return "skip" or "xfail" with its reason if it left early."""
    function = load(place)
    try:
        function(group=group, **{name: _decode_argument(value) for name, value in arguments.items()})
    except (pytest.skip.Exception, pytest.xfail.Exception) as left:
        return ["skip" if isinstance(left, pytest.skip.Exception) else "xfail", str(left.msg)]
    return None


def _skip_test(how: str, why: str) -> NoReturn:
    """Leave the test as one of its ranks did."""
    __tracebackhide__ = True
    if how == "skip":
        pytest.skip(why)
    pytest.xfail(why)


def _encode_argument(value: object, name: str) -> object:
    """Encode an argument for another process.

    Raises:
        UsageError: the argument cannot be encoded.
    """
    if isinstance(value, Path):
        return {_PATH: str(value)}
    try:
        codec.encode(value)
    except UsageError as error:
        raise UsageError(
            f"its argument {name!r} does not travel ({error}): give numbers, strings, bytes, "
            "lists, dicts, NumPy arrays and paths, or make it in the test"
        ) from None
    return value


def _decode_argument(value: object) -> object:
    """Decode an argument that `_encode_argument` made."""
    if isinstance(value, dict) and value.keys() == {_PATH}:
        return Path(value[_PATH])
    return value
