"""Where a tensor of a checkpoint is stored, and what array it is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ferro_checkpoint.errors import CheckpointError
from ferro_checkpoint.layout.dtypes import dtype_of

COMPLEX128 = "$complex128"
"""The key among the record's values whose value lists the full names of tensors that are complex128."""


class StoredPlace(NamedTuple):
    """Where a tensor is.

    Attributes:
        file: its name.
        dtype: its name in the file, such as "F32".
        shape: in the file.
        begin: the tensor's first byte in the file.
        end: one more than its last.
        complex128: whether the file's last dimension, of 2, holds the parts of complex numbers.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    complex128: bool

    @property
    def array_shape(self) -> tuple[int, ...]:
        """The shape of the array that was saved."""
        return self.shape[:-1] if self.complex128 else self.shape

    def array_dtype(self, name: str, path: str) -> np.dtype:
        """Return the dtype of the array that was saved; `name` and `path` are for the message.

        Raises:
            CheckpointError: NumPy has no such dtype without ml_dtypes, which is not installed.
        """
        if self.complex128:
            return np.dtype(np.complex128)
        dtype = dtype_of(self.dtype)
        if dtype is None:
            text = f"{path}: tensor {name!r} has dtype {self.dtype}: install ml_dtypes to read it"
            raise CheckpointError(text, path=path, tensor=name)
        return dtype
