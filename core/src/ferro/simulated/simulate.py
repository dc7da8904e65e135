"""simulate: run a function on every rank of a simulated world."""

from __future__ import annotations

import math
import os.path
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

from ferro.collectives.choice import Choice
from ferro.collectives.network import Network
from ferro.errors import CollectiveTimeout, GroupClosed, PeerLost, RankKilled, UsageError
from ferro.group.group_info import GroupInfo
from ferro.group.process_group import ProcessGroup
from ferro.observers import Observer
from ferro.simulated.backend import Fault, SimulatedBackend

Result = TypeVar("Result")
_SIGNALS_SEEN_S = 0.5  # how often the caller's thread looks for signals
_this_thread = threading.local()


def group_of_this_thread() -> ProcessGroup | None:
    """Return the group of the simulated rank that runs in this thread; None in other threads."""
    return getattr(_this_thread, "group", None)


def simulate(
    function: Callable[[ProcessGroup], Result],
    world_size: int,
    *,
    timeout_s: float = 60.0,
    deterministic: bool = False,
    observers: Sequence[Observer] = (),
    faults: Sequence[Fault] = (),
    network: Network | None = None,
    run_timeout_s: float | None = None,
) -> list[Result | None]:
    """Run `function(group)` on `world_size` ranks, each a thread; return their results by rank.

    `ferro.init()` in the function returns the rank's group, so that a program runs here as it is.

    Args:
        function: the program of every rank.
        world_size: number of ranks, at least 1.
        timeout_s: deadline of each collective in seconds.
        deterministic: reduce in order of rank, always.
        observers: told of every rank's operations.
        faults: faults to inject; a killed rank's result is None.
        network: model by which the ranks' virtual clocks advance.
        run_timeout_s: deadline of the whole run in seconds; unbounded when None.

    Raises:
        UsageError: `world_size` is less than 1.
        CollectiveTimeout: a rank has not ended by `run_timeout_s`.
        Exception: the error of the rank that failed first of itself, with a line for the others' errors in its notes.
    """
    if not isinstance(world_size, int) or not callable(function):
        raise UsageError(f"simulate takes a function and a number of ranks, not {function!r} and {world_size!r}")
    choice = Choice(deterministic=deterministic)
    backends = SimulatedBackend.create_group(world_size, choice=choice, faults=faults, network=network)
    from ferro.rendezvous import MemoryStore  # imported here, for `import ferro` does without the rendezvous

    store = MemoryStore()
    results: list[Result | None] = [None] * world_size
    failures: list[tuple[int, BaseException]] = []
    groups: list[ProcessGroup] = []

    def run(rank: int) -> None:
        info = GroupInfo(
            name="world",
            backend_name="simulated",
            global_ranks=tuple(range(world_size)),
            hosts=("simulated",) * world_size,
            job_store=store,
            store=store.prefix("group/0"),
            local_rank=rank,
            timeout_s=timeout_s,
            observers=tuple(observers),
        )
        try:
            with ProcessGroup(backends[rank], info) as group:
                groups.append(group)
                _this_thread.group = group
                results[rank] = function(group)
        except RankKilled:
            return
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            failures.append((rank, error))

    threads = [threading.Thread(target=run, args=(n,), name=f"rank {n}", daemon=True) for n in range(world_size)]
    try:
        for thread in threads:
            thread.start()
        deadline = math.inf if run_timeout_s is None else time.monotonic() + run_timeout_s
        for thread in threads:
            # A signal that comes just before the wait does not end it, so no wait is long.
            while thread.is_alive() and (left_s := deadline - time.monotonic()) > 0:
                thread.join(min(left_s, _SIGNALS_SEEN_S))
    except BaseException:  # KeyboardInterrupt: the ranks must not go on behind the user's back
        for group in groups:
            group.abort()
        raise
    running = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    if running:
        text = f"the simulation did not end within {run_timeout_s} s: ranks {running} are still running"
        raise CollectiveTimeout(text, op="simulate", seconds=run_timeout_s, missing=running)
    if failures:
        raise _root_cause(failures)
    return results


def _root_cause(failures: list[tuple[int, BaseException]]) -> BaseException:
    """Choose the error of the function itself before errors that follow from it; note the others in it, a line each."""
    (rank, cause), *others = sorted(failures, key=lambda item: _follows(item[1]))
    cause.add_note(f"(raised on rank {rank} of the simulation)")
    alike: dict[tuple[str, str], list[tuple[int, BaseException]]] = {}
    for other, error in others:
        alike.setdefault((type(error).__name__, _place(error)), []).append((other, error))
    for (name, place), group in alike.items():
        ranks = sorted(other for other, _ in group)
        text = str(group[0][1]).partition("\n")[0]
        cause.add_note(f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}, {place}: {name}: {text}")
    return cause


def _follows(error: BaseException | None) -> bool:
    """Say whether an error, or one that it was raised from or during, is the consequence of another rank's."""
    while error is not None:
        if isinstance(error, PeerLost | GroupClosed | CollectiveTimeout):
            return True
        error = error.__cause__ or error.__context__
    return False


def _place(error: BaseException) -> str:
    """Find the last line outside of ferro that led to an error."""
    own = os.path.dirname(os.path.dirname(__file__)) + os.sep
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if not frame.filename.startswith(own)] or frames
    return f"{outside[-1].filename}:{outside[-1].lineno}"
