"""Who of a world is lost: ranks that ended without a farewell, as the store noticed.

So ends a process that is killed, and so leaves one that fails: see `ProcessGroup.abandon`.
"""

from __future__ import annotations

import time

from ferro.errors import FerroError
from ferro.rendezvous.store.interface import Store

_KEY = "lost"  # holds ranks in decimal, each followed by a blank


class Lost:
    """Called, says who is lost; made, sees to it that the others learn of this rank's end.

    Each rank's last will appends it to one key, so that asking is one request.

    Args:
        store: the world's part of the job's store.
        rank: this process's rank.
        host: the rank whose process hosts the store, and with which it ends; None where the
            store is nobody's.

    Raises:
        RendezvousError: the store is gone.
    """

    def __init__(self, store: Store, rank: int, host: int | None) -> None:
        self._store = store
        self._rank = rank
        self._host = host
        self._gone = False
        self._known: frozenset[int] = frozenset()
        store.will(_KEY, b"%d " % rank)

    def __call__(self) -> frozenset[int]:
        """Return the lost ranks but this one; never raises.

        Where a rank hosts the store and the store is gone, so is that rank. Nothing is asked
        after that, and nobody else's end is noticed.
        """
        if not self._gone:
            try:
                told = self._store.get(_KEY, deadline=time.monotonic())
                self._known = frozenset(map(int, told.split()))
            except TimeoutError:  # nobody is, or the store is slow: another time
                pass
            except FerroError:
                self._gone = True
                self._known |= set() if self._host is None else {self._host}
        return self._known - {self._rank}
