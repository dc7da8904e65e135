"""A bar on the terminal for saves and loads that take long."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    lock, done = threading.Lock(), 0
    hidden = progress is not None or rank != 0 or not sys.stderr.isatty()
    with tqdm(total=nbytes, desc=what, unit="B", unit_scale=True, delay=_DELAY_S, disable=hidden, leave=False) as bar:

        def advance(more: int) -> None:
            nonlocal done
            with lock:
                done += more
                bar.update(more)
                if progress is not None:
                    progress(done, nbytes)

        yield advance
