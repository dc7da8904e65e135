"""The running of one marked test on its ranks.

On the simulated backend ranks are threads, and a failing assertion is shown as pytest shows it
anywhere. On others they are processes, which load the test's function by file and name and get
its other arguments by `ferro.group.codec`; their tracebacks come as text.
"""

from __future__ import annotations

import inspect
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from ferro import ProcessGroup, backends
from ferro.errors import CollectiveTimeout, FerroError, GroupClosed, PeerLost, UsageError
from ferro.group import codec
from ferro.simulated import simulate
from ferro_testing.functions import load, locate
from ferro_testing.outcome import Outcome, RanksFailed
from ferro_testing.ranks import run_ranks

_SIMULATED = "simulated"
_MARGIN_S = 2.0  # collectives time out before the test does, so that they tell who is missing
_CONSEQUENCES = (PeerLost, GroupClosed, CollectiveTimeout)  # of another rank's failure
_PATH = "pathlib.Path"


def check_backends(names: Sequence[str]) -> None:
    """Make sure that all of these backends can be used here.

    Raises:
        pytest.UsageError: one cannot; says why and what to do.
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
        timeout_s: seconds that all of it may take.
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
    """Run it on simulated ranks; raise the first cause, with the other ranks' in its notes."""
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
    except CollectiveTimeout:  # of the simulation itself
        late = _stacks(dict(running), timeout_s)
    if failures:
        raise _told_together(dict(failures), late, world_size)
    if late:
        pytest.fail(late, pytrace=False)


class _RankFailed(BaseException):
    """Ends a simulated rank whose failure is known."""


def _told_together(failures: Mapping[int, BaseException], late: str, world_size: int) -> BaseException:
    """Return the first cause; skips come after failures, and before the consequences of one."""
    skips = (pytest.skip.Exception, pytest.xfail.Exception)

    def order(rank: int) -> tuple[bool, bool]:
        return isinstance(failures[rank], _CONSEQUENCES), isinstance(failures[rank], skips)

    first, *others = sorted(failures, key=order)
    cause = failures[first]
    if isinstance(cause, skips):
        return cause
    cause.add_note(f"(on rank {first} of {world_size}, {_SIMULATED})")
    for rank in others:
        if failures[rank] is not cause:
            text = "".join(traceback.format_exception(failures[rank]))
            cause.add_note(f"--- rank {rank}:\n{text}")
    if late:
        cause.add_note(late)
    return cause


def _stacks(running: Mapping[int, int], timeout_s: float) -> str:
    """Describe the stacks of the ranks that have not ended in time."""
    frames = sys._current_frames()
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
    """Run it on processes; fail with every rank's traceback."""
    __tracebackhide__ = True
    try:
        task = [locate(function), {name: _travelling(arguments[name], name) for name in arguments}]
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
    if failed and not (left_early and _only_follows(failed)):
        what = f"{function.__name__} on {world_size} ranks of {backend}"
        pytest.fail(str(RanksFailed(what, failed)), pytrace=False)
    if left_early:
        _leave(*left_early[0])


def _only_follows(outcomes: Sequence[Outcome]) -> bool:
    """Say whether all ranks that failed did so because another one left."""
    consequences = {"", "Late", *(kind.__name__ for kind in _CONSEQUENCES)}
    return {outcome.error_type for outcome in outcomes} <= consequences


def _collective_s(timeout_s: float) -> float:
    """Return the seconds that one collective may take in a test of so many."""
    return max(timeout_s - _MARGIN_S, timeout_s / 2)


def run_on_rank(group: ProcessGroup, place: dict[str, str], arguments: dict[str, object]) -> list[str] | None:
    """Run a test's function in a rank's process; return the way in which it was left early, None if not."""
    function = load(place)
    try:
        function(group=group, **{name: _arrived(value) for name, value in arguments.items()})
    except (pytest.skip.Exception, pytest.xfail.Exception) as left:
        return ["skip" if isinstance(left, pytest.skip.Exception) else "xfail", str(left.msg)]
    return None


def _leave(how: str, why: str) -> NoReturn:
    """Leave the test as one of its ranks did."""
    __tracebackhide__ = True
    if how == "skip":
        pytest.skip(why)
    pytest.xfail(why)


def _travelling(value: object, name: str) -> object:
    """Return an argument as it travels to another process.

    Raises:
        UsageError: it cannot.
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


def _arrived(value: object) -> object:
    """Return an argument as the test expects it."""
    if isinstance(value, dict) and value.keys() == {_PATH}:
        return Path(value[_PATH])
    return value
