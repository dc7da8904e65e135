"""Values without behaviour that the contracts speak of."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# In quotes, for numpy.typing takes milliseconds to import that `import ferro` should not.
Array: TypeAlias = "npt.NDArray[np.generic]"


class ReduceOp(enum.StrEnum):
    """The named reductions; anywhere one is accepted its string is, too."""

    SUM = "sum"
    MEAN = "mean"
    PROD = "prod"
    MIN = "min"
    MAX = "max"
    BAND = "band"
    BOR = "bor"
    BXOR = "bxor"


class Device(enum.StrEnum):
    """Where an array's memory is."""

    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Availability:
    """Whether something installed can be used here, and if not, why and what to do.

    Attributes:
        ok: True when it can be used.
        reason: one phrase: what was found, or what was looked for and not found.
        hint: what to do about it; empty when `ok`.
        version: version of the library behind it, when known.
    """

    ok: bool
    reason: str = ""
    hint: str = ""
    version: str | None = None
