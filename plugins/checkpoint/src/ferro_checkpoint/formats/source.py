"""TensorSource: named tensors that somebody else has written, in any of the formats that this package reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ferro_checkpoint.errors import CheckpointDamaged, CheckpointError, StateError
from ferro_checkpoint.layout.bundle import Described
from ferro_checkpoint.layout.dtypes import dtype_of
from ferro_checkpoint.layout.header import shape_fault

MOST_JSON_BYTES = 256 << 20  # of an index or of a metadata.json


class TensorSource(Protocol):
    """Tensors of a file or directory; opening it reads headers and metadata only.

    Attributes:
        path: of the file or directory.
        tensors: dtype and shape by name. A dtype has its name in safetensors files ("F32"); where these have none, it
            has NumPy's ("complex128", "float8_e4m3fnuz").
        values: what the source holds beside tensors, as JSON values by name.
        unreadable: entries that can be given neither as a tensor nor as a value: the reason by name.
    """

    @property
    def path(self) -> str: ...  # noqa: D102

    @property
    def tensors(self) -> Mapping[str, Described]: ...  # noqa: D102

    @property
    def values(self) -> Mapping[str, Any]: ...  # noqa: D102

    @property
    def unreadable(self) -> Mapping[str, str]: ...  # noqa: D102

    def read(self, name: str, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Read one tensor, and no byte of another; beside the array itself this needs a few MiB of memory.

        Args:
            name: one of `tensors`.
            out: an array of this shape and dtype, which is filled and returned; None: a new one.

        Raises:
            StateError: no tensor has this name, or `out` does not fit it.
            CheckpointDamaged: the file does not hold what its metadata say.
        """

    def close(self) -> None:
        """Close the files."""


def numpy_dtype(dtype: str, path: str, tensor: str) -> np.dtype[Any]:
    """Return the dtype of this name in a source.

    Raises:
        CheckpointError: it needs ml_dtypes, which is not installed or does not have it.
    """
    found = dtype_of(dtype)
    if found is None and dtype == "complex128":
        found = np.dtype(np.complex128)
    if found is None:
        try:
            import ml_dtypes

            found = np.dtype(getattr(ml_dtypes, dtype))
        except (ImportError, AttributeError, TypeError) as error:
            text = f"{path}: tensor {tensor!r} has dtype {dtype}, which NumPy alone does not have: install ml_dtypes"
            raise CheckpointError(text, path=path, tensor=tensor) from error
    return found


def destination(source: TensorSource, name: str, out: NDArray[Any] | None) -> NDArray[Any]:
    """Return the array that a tensor is to be read into: `out` if it fits, or a new one."""
    described = source.tensors.get(name)
    if described is None:
        reason = source.unreadable.get(name)
        raise StateError(f"{source.path} has no tensor {name!r}" + (f": {reason}" if reason else ""))
    dtype, shape = numpy_dtype(described[0], source.path, name), described[1]
    if fault := shape_fault(shape, dtype.itemsize):
        raise CheckpointDamaged(f"{source.path}: tensor {name!r}: {fault}", path=source.path, tensor=name)
    if out is None:
        return np.empty(shape, dtype)
    if out.shape != shape or out.dtype != dtype or not out.flags.writeable:
        raise StateError(
            f"{source.path}: tensor {name!r} is {dtype} {shape}, and the array for it is {out.dtype} {out.shape}"
            f"{'' if out.flags.writeable else ', which is read-only'}: pass one that fits"
        )
    return out
