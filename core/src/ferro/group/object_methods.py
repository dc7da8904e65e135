"""The methods of a group that move small Python values; each call is made of several operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ferro.group import objects
from ferro.group.objects import Codec
from ferro.group.transfer_methods import TransferMethods
from ferro.types import Array


class ObjectMethods(TransferMethods):
    """The methods of `ProcessGroup` for Python values."""

    def broadcast_object(
        self, value: object = None, root: int = 0, *, codec: Codec = "msgpack", timeout_s: float | None = None
    ) -> Any:
        """Return the root's `value` on every rank.

        Args:
            value: None, numbers, strings, bytes, lists, dicts, NumPy arrays, nested; anything with codec="pickle".
                Tuples come back as lists. At most 8 GiB, which travel in pieces.
            root: the rank that gives it.
            codec: "msgpack" runs no code. "pickle" lets every rank run code on every other: only where all are trusted.
            timeout_s: deadline in seconds; the group's when None.
        """
        self._check_rank(root, "root")
        with self._dispatcher.sequence("broadcast_object", timeout_s) as remaining_s:
            objects.check_codec(codec)
            data = objects.encode(value, codec) if self.rank == root else None
            size = self.broadcast(np.array(0 if data is None else data.size), root, timeout_s=remaining_s())

            def move(place: slice, counts: list[int]) -> Array:
                piece = np.empty(counts[0], np.uint8) if data is None else data[place]
                return self.broadcast(piece, root, timeout_s=remaining_s())  # type: ignore[no-any-return]

            return objects.decode(objects.in_pieces(objects.checked_sizes(size), move)[0], codec)

    def all_gather_object(
        self, value: object, *, codec: Codec = "msgpack", timeout_s: float | None = None
    ) -> list[Any]:
        """Return the list of every rank's `value`, in order of rank. See `broadcast_object`."""
        with self._dispatcher.sequence("all_gather_object", timeout_s) as remaining_s:
            data = objects.encode(value, codec)
            sizes = objects.checked_sizes(self.all_gather(np.array(data.size), timeout_s=remaining_s()))
            values = objects.in_pieces(
                sizes, lambda place, counts: self.all_gather(data[place], sizes=counts, timeout_s=remaining_s())
            )
            return [objects.decode(gathered, codec) for gathered in values]

    def gather_object(
        self, value: object, root: int = 0, *, codec: Codec = "msgpack", timeout_s: float | None = None
    ) -> list[Any] | None:
        """Return the list of every rank's `value` at `root`, None elsewhere."""
        self._check_rank(root, "root")
        with self._dispatcher.sequence("gather_object", timeout_s) as remaining_s:
            data = objects.encode(value, codec)
            sizes = objects.checked_sizes(self.all_gather(np.array(data.size), timeout_s=remaining_s()))
            values = objects.in_pieces(
                sizes, lambda place, counts: self.gather(data[place], root, sizes=counts, timeout_s=remaining_s())
            )
            return [objects.decode(gathered, codec) for gathered in values] if self.rank == root else None

    def scatter_object(
        self,
        values: Sequence[object] | None = None,
        root: int = 0,
        *,
        codec: Codec = "msgpack",
        timeout_s: float | None = None,
    ) -> Any:
        """Return this rank's item of the root's list of n `values`."""
        self._check_rank(root, "root")
        with self._dispatcher.sequence("scatter_object", timeout_s) as remaining_s:
            objects.check_codec(codec)
            parts = objects.encode_all(values, self.world_size, codec) if self.rank == root else None
            own = np.array([part.size for part in parts]) if parts else np.empty(self.world_size, np.int64)
            sizes = objects.checked_sizes(self.broadcast(own, root, timeout_s=remaining_s()))

            def move(place: slice, counts: list[int]) -> Array:
                pieces = np.concatenate([part[place] for part in parts]) if parts else None
                return self.scatter(pieces, root, sizes=counts, timeout_s=remaining_s())  # type: ignore[no-any-return]

            return objects.decode(objects.in_pieces(sizes, move, [self.rank])[0], codec)

    def send_object(
        self, value: object, dst: int, tag: int = 0, *, codec: Codec = "msgpack", timeout_s: float | None = None
    ) -> None:
        """Send a small Python value to rank `dst`."""
        with self._dispatcher.sequence("send_object", timeout_s) as remaining_s:
            data = objects.encode(value, codec)
            self.send(np.array(data.size), dst, tag, timeout_s=remaining_s())
            objects.in_pieces([data.size], lambda place, _: self.send(data[place], dst, tag, timeout_s=remaining_s()))

    def recv_object(self, src: int, tag: int = 0, *, codec: Codec = "msgpack", timeout_s: float | None = None) -> Any:
        """Return the value that rank `src` sends with `send_object`."""
        with self._dispatcher.sequence("recv_object", timeout_s) as remaining_s:
            objects.check_codec(codec)
            sizes = objects.checked_sizes(self.recv(np.array(0), src, tag, timeout_s=remaining_s()))

            def move(_: slice, counts: list[int]) -> Array:
                buffer = np.empty(counts[0], np.uint8)
                return self.recv(buffer, src, tag, timeout_s=remaining_s())  # type: ignore[no-any-return]

            return objects.decode(objects.in_pieces(sizes, move)[0], codec)
