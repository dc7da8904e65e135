"""Buffer: an array of a module's state that is not learnt."""

from __future__ import annotations

from .arrays import Array, namespace_of


class Buffer:
    """An array that belongs to a module's state but is not learnt, such as running statistics.

    Attributes:
        data: NumPy or CuPy array of any dtype; change it in place.
    """

    def __init__(self, data: Array) -> None:
        namespace_of(data)
        self.data = data

    def __repr__(self) -> str:
        return f"Buffer(shape={self.data.shape}, dtype={self.data.dtype})"
