"""Killing a rank on purpose, and failures of the others that are then no fault of the backend."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from typing import NoReturn

from ferro.simulated import RankKilled
from ferro_testing.outcome import Outcome, RanksFailed

_PATIENCE_S = 10.0  # plenty to notice a death on a busy machine
_ENDED = ("Killed", "Exited")


class JobEnded(RanksFailed):
    """Ranks that were to survive another's death were ended themselves, from outside.

    So does a launcher (a plain mpiexec) that ends a job with its first rank.
    """


class DeathNoticedLate(AssertionError):
    """Ranks were told that another one died by nothing but their own deadline.

    So it is where the library below never notices.
    """

    def __init__(self, what: str, lost: int) -> None:
        super().__init__(
            f"{what}: nobody noticed that rank {lost} died, it was named only when the deadline "
            'had passed. Ask `BackendConfig.lost` while waiting, or declare "lost_peer"'
        )


def patience_s(run_s: float) -> float:
    """Return the seconds that operations are given in which a death is to be noticed.

    Well within the deadline of the run, `run_s`, after which nobody is left to tell of it.
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
