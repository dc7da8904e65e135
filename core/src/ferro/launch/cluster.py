"""Ranks behind a notebook: `spawn` runs one function on several processes, a `Cluster` keeps them for the next one.

Everything heavy is imported when the first rank is started, for `import ferro` brings this module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Self, TypeVar

from ferro.errors import UsageError

if TYPE_CHECKING:
    from ferro.launch.cluster_processes import RankProcesses

Result = TypeVar("Result")


class Cluster:
    """Ranks that run functions, one after another, each in a process of its own; `ferro.cluster` makes it.

    Attributes:
        world_size: the number of ranks.
    """

    def __init__(self, world_size: int, timeout_s: float | None = None) -> None:
        if not isinstance(world_size, int) or world_size < 1:
            raise UsageError(f"the number of ranks must be a whole number from 1, not {world_size!r}")
        from ferro.launch.cluster_processes import RankProcesses

        self.world_size = world_size
        self._processes: RankProcesses = RankProcesses(world_size, timeout_s)

    def run(self, function: Callable[..., Result], *arguments: object) -> list[Result]:
        """Call `function(*arguments)` on every rank; return the results by rank.

        In the function `ferro.init()` joins the world of these ranks, or returns its group where it is open from the
        call before. The ranks print what they write, with their rank before each line. They stay after an error and
        after KeyboardInterrupt, without the group.

        Raises:
            UsageError: the function or its arguments cannot be sent, or the ranks have ended.
            PeerLost: a rank has died; the others were ended.
            Exception: the error of the rank that failed first; its traceback is the cause of it.
        """
        return self._processes.run(function, arguments)

    def close(self) -> None:
        """Let the ranks leave their group and end. Idempotent."""
        self._processes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cluster(world_size: int, *, timeout_s: float | None = None) -> Cluster:
    """Start ranks on this host that stay, for a notebook: `ranks.run(function)` calls a function on each of them.

    Use it as a context, or close it at the end: whatever the ranks keep (modules, open groups) is gone then.

    Args:
        world_size: the number of ranks.
        timeout_s: deadline of joining, and of each operation that gives none, in seconds; FERRO_TIMEOUT_S or 60 when
            None.
    """
    return Cluster(world_size, timeout_s)


def spawn(
    function: Callable[..., Result], world_size: int, *arguments: object, timeout_s: float | None = None
) -> list[Result]:
    """Call `function(*arguments)` on ranks that are processes of their own on this host; return the results by rank.

    In the function `ferro.init()` joins the world of these ranks. Functions of a notebook or of the program itself need
    `pip install cloudpickle`; `functools.partial` gives them keyword arguments. `timeout_s` is as for `cluster`. The
    errors are those of `Cluster.run`, after which all ranks have ended.
    """
    with Cluster(world_size, timeout_s) as ranks:
        return ranks.run(function, *arguments)
