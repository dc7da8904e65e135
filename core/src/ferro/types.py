"""Small values that users, plugins and ferro exchange: arrays' type, reduce operations, devices, availability."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# A NumPy or CuPy array. It is a string, since importing numpy.typing would add milliseconds to `import ferro`.
Array: TypeAlias = "npt.NDArray[np.generic]"

# (rank, world_size, rank 0's message and elsewhere None, deadline) -> rank 0's message
BootstrapBroadcast: TypeAlias = Callable[[int, int, bytes | None, float], bytes]


class ReduceOp(enum.StrEnum):
    """The named reductions. Every argument that takes one takes its string as well: `op="sum"`."""

    SUM = "sum"
    MEAN = "mean"
    PROD = "prod"
    MIN = "min"
    MAX = "max"
    BAND = "band"  # this one and the next two are bitwise, for integers and booleans
    BOR = "bor"
    BXOR = "bxor"

    __hash__ = str.__hash__  # every call hashes its reduction, and Enum's way takes as long as the rest of the lookup


class Device(enum.StrEnum):
    """The device that holds an array's memory."""

    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Availability:
    """Whether an installed backend can be used on this machine, and if not, why and what to do.

    Attributes:
        ok: True when it can be used.
        reason: one phrase that says what was found, or what was looked for and not found.
        hint: what to do about it; empty when `ok`.
        version: version of the native library behind it, where known.
    """

    ok: bool
    reason: str = ""
    hint: str = ""
    version: str | None = None
