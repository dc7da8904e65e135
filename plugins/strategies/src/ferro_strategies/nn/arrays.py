"""The arrays that layers work on, and the namespace (NumPy or CuPy) that computes on them."""

from __future__ import annotations

from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ferro.errors import UsageError

# Element types are checked at run time. A CuPy array goes by the same name, for it has the same
# methods, and CuPy need not be installed for this code to be type-checked.
Array: TypeAlias = npt.NDArray[Any]


def namespace_of(array: Array) -> ModuleType:
    """Return the module whose functions work on `array`: numpy, or cupy for a CuPy array.

    Raises:
        UsageError: it is neither a NumPy nor a CuPy array.
    """
    if isinstance(array, np.ndarray):
        return np
    kind = type(array)
    if kind.__module__.partition(".")[0] == "cupy":
        import cupy  # present, since the array is its own

        namespace: ModuleType = cupy
        return namespace
    raise UsageError(
        f"expected a NumPy or CuPy array, got {kind.__module__}.{kind.__qualname__}. "
        "Convert it first, for instance with numpy.asarray."
    )
