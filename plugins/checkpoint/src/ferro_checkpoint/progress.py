"""A bar on the terminal for saves and loads that take long."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeAlias

from tqdm import tqdm  # type: ignore[import-untyped]

Progress: TypeAlias = "Callable[[int, int], None]"
"""It is given the bytes that are done, and all bytes."""

_DELAY_S = 3.0


@contextmanager
def byte_progress(what: str, nbytes: int, rank: int, progress: Progress | None) -> Iterator[Callable[[int], None]]:
    """Return a function that is told of bytes that are done; any thread may call it.

    Args:
        what: is done, for the bar.
        nbytes: how many bytes this rank does.
        rank: of this process; rank 0 shows a bar, if it has a terminal and the work takes more than a few seconds.
        progress: is called instead, if given.
    """
    if progress is None and (rank != 0 or sys.stderr is None or not sys.stderr.isatty()):
        # Even a hidden bar would take a lock that forked processes share, and that one of them may have died with.
        yield lambda more: None
        return
    lock, done = threading.Lock(), 0
    shown = None
    if progress is None:
        shown = tqdm(total=nbytes, desc=what, unit="B", unit_scale=True, delay=_DELAY_S, leave=False)

    def advance(more: int) -> None:
        nonlocal done
        with lock:
            done += more
            if shown is not None:
                shown.update(more)
            if progress is not None:
                progress(done, nbytes)

    with shown or nullcontext():
        yield advance
