"""Split: says that a parameter is one rank's piece of a larger one."""

from __future__ import annotations

from dataclasses import dataclass

from ferro import ProcessGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How a parameter's pieces lie.

    Attributes:
        group: the ranks that hold pieces, in their order.
        dim: of the whole, along which it is cut; None when it is cut as one flat row.
    """

    group: ProcessGroup
    dim: int | None
