"""Who waits for which key in the store's server, and until when."""

from __future__ import annotations

from ferro.rendezvous.store.connection import Member


class Parking:
    """Members whose `get` found nothing: each waits for one key, until its deadline."""

    def __init__(self) -> None:
        self._by_key: dict[bytes, dict[Member, float]] = {}
        self._key_of: dict[Member, bytes] = {}
        # A lower bound of all deadlines. Leaving does not raise it: that would mean a search
        # each time, where one needless wake-up does.
        self._due: float | None = None

    def park(self, member: Member, key: bytes, deadline: float) -> None:
        """Let `member` wait for `key` until `deadline` (`time.monotonic()`)."""
        self._by_key.setdefault(key, {})[member] = deadline
        self._key_of[member] = key
        self._due = deadline if self._due is None else min(self._due, deadline)

    def release(self, key: bytes) -> list[Member]:
        """Take out all who wait for `key`."""
        members = list(self._by_key.pop(key, ()))
        for member in members:
            del self._key_of[member]
        return members

    def forget(self, member: Member) -> None:
        """Take out `member`, if it waits."""
        key = self._key_of.pop(member, None)
        if key is not None:
            waiting = self._by_key[key]
            del waiting[member]
            if not waiting:
                del self._by_key[key]

    def expire(self, now: float) -> list[Member]:
        """Take out all whose deadline has passed."""
        if self._due is None or now < self._due:
            return []
        deadlines = {m: at for waiting in self._by_key.values() for m, at in waiting.items()}
        late = [member for member, at in deadlines.items() if at <= now]
        for member in late:
            self.forget(member)
            del deadlines[member]
        self._due = min(deadlines.values(), default=None)
        return late

    @property
    def due(self) -> float | None:
        """The second by which to call `expire` again, or None when nobody waits."""
        return self._due
