"""The choice of the algorithm that serves a call.

All ranks must choose the same algorithm, so the choice depends only on what they share: the collective, the number of
ranks, the size of the whole call, and whether all contributions must be combined at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from ferro.errors import PluginError, UsageError

if TYPE_CHECKING:
    from ferro.collectives.schedule import CollectiveInfo, Schedule

_DIRECT_RANKS = 16  # up to this many ranks, every rank talks to all others at once
_SMALL_BYTES = 32 * 1024
_TREE_BYTES = 256 * 1024
# Up to this size the number of messages counts for more than the bytes that pass one rank: measured over TCP with 4
# ranks on 2 cores, a star takes 60 to 70 % of the time of direct.
_STAR_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The rules by which a group chooses algorithms.

    Attributes:
        deterministic: always reduce in order of rank.
        fixed: collective -> the algorithm that the user asked for.
    """

    deterministic: bool = False
    fixed: Mapping[str, CollectiveInfo] = field(default_factory=dict)

    def check(self) -> None:
        """Raise UsageError if a fixed algorithm does not reduce in order of rank, but determinism is asked for."""
        for info in self.fixed.values():
            reduces = info.collective in ("all_reduce", "reduce", "reduce_scatter")
            if self.deterministic and reduces and not info.combines_once:
                raise UsageError(
                    f"deterministic=True reduces in order of rank, which the algorithm "
                    f"{info.algorithm!r} for {info.collective!r} does not: choose one of them"
                )

    def algorithm(self, collective: str, world_size: int, nbytes: int, *, at_once: bool = False) -> CollectiveInfo:
        """Choose the algorithm for a call whose whole buffer has `nbytes`, the same on every rank.

        With `at_once`, all contributions must be combined at once.
        """
        at_once = at_once or self.deterministic
        fixed = self.fixed.get(collective)
        if fixed is not None and (fixed.combines_once or not at_once):
            return fixed
        return _builtin(collective, _rule(collective, world_size, nbytes, at_once))


def _rule(collective: str, world_size: int, nbytes: int, at_once: bool) -> str:
    few = world_size <= _DIRECT_RANKS
    small = nbytes <= _SMALL_BYTES
    if collective == "all_reduce":
        if small and world_size <= 2:
            return "exchange"
        if few and nbytes <= _STAR_BYTES:
            return "star"
        if few or at_once:
            return "direct"
        return "tree" if small else "ring"
    if collective == "reduce_scatter":
        return "direct" if few or at_once else "ring"
    if collective == "reduce":
        return "direct" if at_once or world_size <= 4 else "tree"
    if collective == "all_gather":
        return "direct" if few or small else "ring"
    if collective == "broadcast":
        if world_size <= 4:
            return "direct"  # on one host: 1.1 ms for 1 MiB, where the others take 1.3 and 1.5
        return "tree" if nbytes <= _TREE_BYTES else "scatter_ring"
    if collective in ("gather", "scatter"):
        return "tree" if small and not few else "direct"
    if collective == "all_to_all":
        return "direct" if few else "pairwise"
    return "dissemination"


@lru_cache(maxsize=64)
def _builtin(collective: str, algorithm: str) -> CollectiveInfo:
    # The import stands here so that `import ferro` stays quick.
    from ferro.collectives.builtin import BUILTIN

    return next(info for info in BUILTIN if (info.collective, info.algorithm) == (collective, algorithm))


@lru_cache(maxsize=1024)
def build(info: CollectiveInfo, rank: int, world_size: int, root: int) -> Schedule:
    """Build the schedule of one rank, or take it from the cache.

    Raises:
        PluginError: the algorithm could not build it.
    """
    from ferro.collectives.schedule import Schedule  # here, so that `import ferro` stays quick

    name = f"the algorithm {info.algorithm!r} for {info.collective!r}"
    try:
        schedule = info.build(rank, world_size, root)
    except Exception as error:
        text = f"{name} could not build a schedule for rank {rank} of {world_size}: {type(error).__name__}: {error}"
        raise PluginError(f"{text}. Report this to its authors, or choose another algorithm") from error
    if not isinstance(schedule, Schedule):
        raise PluginError(f"{name} built a {type(schedule).__name__} for rank {rank} of {world_size}, not a Schedule")
    return schedule
