"""The digests of segments: the algorithms by name, as the record names them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Protocol

import xxhash

DEFAULT = "xxh3_64"


class Hasher(Protocol):
    """A digest that is being computed; `update` releases the interpreter's lock on large pieces."""

    def update(self, data: memoryview, /) -> None: ...  # noqa: D102
    def hexdigest(self) -> str: ...  # noqa: D102


ALGORITHMS: dict[str, Callable[[], Hasher]] = {
    "xxh3_64": xxhash.xxh3_64,
    "blake2b": partial(hashlib.blake2b, digest_size=16),
}
