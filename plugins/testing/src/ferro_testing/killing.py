"""Killing a rank on purpose, and the other ranks' failures that are then no fault of the backend."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from typing import NoReturn

from ferro.simulated import RankKilled
from ferro_testing.outcome import Outcome, RanksFailed

_PATIENCE_S = 10.0  # long enough to notice a death on a busy machine
_ENDED = ("Killed", "Exited")


class JobEnded(RanksFailed):
    """Ranks that should have survived another's death were ended from outside.

    A launcher such as a plain mpiexec does so: it ends the job when the first rank ends.
    """


class DeathNoticedLate(AssertionError):
    """Ranks noticed the death of another only by their own deadline.

    It is raised for backends whose library never notices a death.
    """

    def __init__(self, what: str, lost: int) -> None:
        super().__init__(
            f"{what}: nobody noticed that rank {lost} died, it was named only when the deadline "
            'had passed. Ask `BackendConfig.lost` while waiting, or declare "lost_peer"'
        )


def patience_s(run_s: float) -> float:
    """Return the timeout of operations that should notice a death.

    It is well below the deadline of the run, `run_s`, after which no rank could report.
    """
    return min(_PATIENCE_S, run_s / 3)


def end_this_rank() -> NoReturn:
    """End a rank as a crash would: a process by SIGKILL, a simulated one by its own exception."""
    if threading.current_thread() is threading.main_thread():
        os.kill(os.getpid(), signal.SIGKILL)
    raise RankKilled("it was to die")


def require_survivors(what: str, outcomes: Sequence[Outcome], lost: Sequence[int]) -> None:
    """Raise when ranks that were not to be lost have ended without a report.

    Raises:
        JobEnded: says which.
    """
    ended = [it.rank for it in outcomes if it.rank not in lost and it.error_type in _ENDED]
    if ended:
        raise JobEnded(
            f"{what}: ranks {list(lost)} were killed on purpose, and ranks {ended} ended with "
            'them. Where that is the launcher\'s way, declare "lost_peer" and "shrink"',
            outcomes,
        )
