"""simulate: run a function on every rank of a simulated world."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from ferro.collectives.choice import Choice
from ferro.errors import CollectiveTimeout, GroupClosed, PeerLost
from ferro.group.group_info import GroupInfo
from ferro.group.process_group import ProcessGroup
from ferro.observers import Observer

if TYPE_CHECKING:
    from ferro.collectives.network import Network
    from ferro.simulated.board import Fault

Result = TypeVar("Result")


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

    Args:
        function: what every rank does.
        world_size: number of ranks, at least 1.
        timeout_s: deadline of each collective in seconds.
        deterministic: reduce in order of rank, always.
        observers: told of every rank's operations.
        faults: what goes wrong on purpose; a killed rank's result is None.
        network: model by which the ranks' virtual clocks advance.
        run_timeout_s: deadline of the whole run; unbounded when None.

    Raises:
        The error of the rank that failed first of itself, with every other rank's traceback in
        its notes. CollectiveTimeout when a rank has not ended by `run_timeout_s`.
    """
    # Here, for the simulation and the store cost time that `import ferro` should not.
    from ferro.rendezvous.store.memory import MemoryStore
    from ferro.simulated.backend import SimulatedBackend
    from ferro.simulated.board import RankKilled

    choice = Choice(deterministic=deterministic)
    backends = SimulatedBackend.create_group(world_size, choice=choice, faults=faults, network=network)
    store = MemoryStore()
    results: list[Result | None] = [None] * world_size
    failures: list[tuple[int, BaseException]] = []

    def run(rank: int) -> None:
        members = GroupInfo(
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
            with ProcessGroup(backends[rank], members) as group:
                results[rank] = function(group)
        except RankKilled:
            return
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            failures.append((rank, error))

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(world_size)
    ]
    for thread in threads:
        thread.start()
    _join(threads, run_timeout_s)
    if failures:
        raise _first(failures)
    return results


def _join(threads: Sequence[threading.Thread], timeout_s: float | None) -> None:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    for thread in threads:
        thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
    late = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    if late:
        raise CollectiveTimeout(
            f"the simulation did not end within {timeout_s} s: ranks {late} are still running",
            op="simulate",
            seconds=timeout_s,
            missing=late,
        )


def _first(failures: list[tuple[int, BaseException]]) -> BaseException:
    """Return the cause: an error of the function itself before what followed from it."""
    followed = (PeerLost, GroupClosed, CollectiveTimeout)
    rank, error = min(failures, key=lambda item: isinstance(item[1], followed))
    error.add_note(f"(raised on rank {rank} of the simulation)")
    for other, also in failures:
        if also is not error:
            text = "".join(traceback.format_exception(also))
            error.add_note(f"--- rank {other}:\n{text}")
    return error
