"""Operands: what a group takes from its user, arrays, ranks and tags, or refuses."""

from __future__ import annotations

import numpy as np

from ferro.arrays import Entry, Input
from ferro.backend import Backend
from ferro.calls import MAX_TAG
from ferro.errors import UnsupportedError, UsageError
from ferro.members import Members
from ferro.types import Device


class Operands:
    """Checks what one group is given."""

    def __init__(self, backend: Backend, members: Members) -> None:
        self._members = members
        self._devices = members.devices
        self._rank = backend.rank
        self._world_size = backend.world_size
        self._told_host_copy = False

    def enter(self, value: Input, *, what: str = "input") -> Entry:
        """Take an array in, on a device from which the backend moves it.

        Raises:
            UsageError: it is not an array.
            UnsupportedError: the backend takes no such array.
        """
        entry = Entry(value, what=what)
        if entry.device in self._devices:
            return entry
        if entry.device is Device.CUDA and self._members.host_copies:
            self._tell_host_copy()
            entry.through_host()
            return entry
        raise UnsupportedError(
            f"backend {self._members.backend_name!r} takes arrays on {', '.join(self._devices)}, "
            f"and this one is on {entry.device}: use {_backends_for(entry.device)}, or set "
            "FERRO_ENABLE_GPU_FALLBACK=1 to copy through the host"
        )

    def check_rank(self, rank: int, what: str) -> None:
        """Refuse what is no rank of the group; `what` it is called is for the message."""
        if not isinstance(rank, int | np.integer) or not 0 <= rank < self._world_size:
            name = self._members.name
            raise UsageError(
                f"{what} is {rank!r}; group {name!r} has ranks 0 to {self._world_size - 1}",
                group=name,
                rank=self._rank,
            )

    def check_peer(self, peer: int, what: str, tag: int) -> None:
        """Refuse what is no other rank of the group, or no tag; `what` is to be done with it."""
        self.check_rank(peer, "peer")
        if peer == self._rank:
            raise UsageError(
                f"rank {self._rank} cannot {what} itself: copy the array instead",
                group=self._members.name,
                rank=self._rank,
                peer=peer,
            )
        if not isinstance(tag, int | np.integer) or not 0 <= tag <= MAX_TAG:
            raise UsageError(f"tag is {tag!r}; tags are whole numbers from 0 to {MAX_TAG}")

    def _tell_host_copy(self) -> None:
        """Log, once, that arrays take the slow way that the user allowed."""
        if not self._told_host_copy:
            self._told_host_copy = True
            import logging  # here, for it is slow to import and seldom needed

            logging.getLogger("ferro").warning(
                "group %r (%s) copies GPU arrays through the host",
                self._members.name,
                self._members.backend_name,
            )


def _backends_for(device: Device) -> str:
    """Name what is installed for arrays on a device."""
    from ferro import backends  # here, for it looks at all that is installed

    names = backends.taking(device)
    return f"a backend for {device}" + (f" ({' or '.join(names)})" if names else "")
