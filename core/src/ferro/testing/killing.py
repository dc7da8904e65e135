"""Killing a rank on purpose, and telling a launcher that ends the whole job for it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from typing import NoReturn

from ferro.simulated.board import RankKilled
from ferro.testing.outcome import Outcome, RanksFailed

_ENDED = ("Killed", "Exited")


class JobEnded(RanksFailed):
    """Ranks that were to survive another's death were ended themselves, from outside.

    So does a launcher (a plain mpiexec) that ends a job with its first rank.
    """


def end_this_rank() -> NoReturn:
    """End a rank as a crash would: a process by SIGKILL, a simulated one by its own exception."""
    if threading.current_thread() is threading.main_thread():
        os.kill(os.getpid(), signal.SIGKILL)
    raise RankKilled("it was to die")


def require_survivors(what: str, outcomes: Sequence[Outcome], lost: Sequence[int]) -> None:
    """Raise when ranks that were not to be lost are gone without a word.

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
