"""MixedPrecision: in what types FSDP computes and sends, while it keeps the master values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..nn.arrays import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedPrecision:
    """Types of floating-point values; None leaves them as they are.

    The pieces that ranks own, and that the optimizer changes, keep the type that the parameters
    had: float32, usually. Complex parameters are never converted.

    Attributes:
        param_dtype: of gathered parameters, and so of the computation and of its gradients.
        reduce_dtype: in which gradients are reduced; None: that of the computation.
        output_dtype: of the model's output.
        cast_inputs: whether the model's floating input is converted to `param_dtype`.
    """

    param_dtype: npt.DTypeLike | None = None
    reduce_dtype: npt.DTypeLike | None = None
    output_dtype: npt.DTypeLike | None = None
    cast_inputs: bool = True

    def computed(self, dtype: np.dtype) -> np.dtype:
        """Return the type in which a parameter of this type takes part in the computation."""
        return _chosen(self.param_dtype, dtype)

    def reduced(self, dtype: np.dtype) -> np.dtype:
        """Return the type in which the gradient of a parameter of this type is reduced."""
        return _chosen(self.reduce_dtype, self.computed(dtype))

    def cast_input(self, x: Array) -> Array:
        """Convert the model's input, if so told."""
        return x.astype(
            _chosen(self.param_dtype if self.cast_inputs else None, x.dtype), copy=False
        )

    def cast_output(self, y: Array) -> Array:
        """Convert the model's output, if so told."""
        return y.astype(_chosen(self.output_dtype, y.dtype), copy=False)


def _chosen(wanted: npt.DTypeLike | None, dtype: np.dtype) -> np.dtype:
    # bfloat16 comes from outside NumPy, which does not know that it is floating.
    floating = dtype.kind == "f" or dtype.name == "bfloat16"
    return dtype if wanted is None or not floating else np.dtype(wanted)
