"""Reduce half precision in float32, in blocks that stay in the cache, and round the result once.

NumPy's own casts from and to float16 convert one number at a time, and slowly where numbers are subnormal, as small
gradients are: with them, reducing four operands of a million numbers takes 7 ms, and 80 ms where the numbers are
subnormal. So float16 is widened through a table of all its values and rounded with arithmetic on whole blocks: 3 ms for
both. The casts of bfloat16 (by ml_dtypes) are quick. Results have the same bits as those of the casts.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from ferro.types import Array

if TYPE_CHECKING:
    import numpy.typing as npt

_BLOCK = 32 * 1024  # elements: the scratch of a block is 512 KiB, the table of values 256 KiB
_SMALL = 256  # elements for which preparing blocks takes longer than casting them one by one

# The bits of float32 and float16.
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_EXPONENT = np.uint32(0x7F800000)
_LEAST_NORMAL = np.uint32(0x38800000)  # 2**-14, below which a float16 is subnormal
_TOO_LARGE = 0x477FF000  # 65520, which rounds to infinity; infinity and NaN are above
_EXTRA_BITS = np.uint32(13)  # the significand of float32 has so many more bits than that of float16
_SIGN = np.uint32(0x8000)


class _Scratch(threading.local):
    """Memory for a block; each thread has its own, so that threads may reduce at the same time."""

    def __init__(self) -> None:
        self.total = np.empty(_BLOCK, np.float32)
        self.operand = np.empty(_BLOCK, np.float32)
        self.bits = np.empty(_BLOCK, np.uint32)
        self.magic = np.empty(_BLOCK, np.uint32)


_scratch = _Scratch()


def reduce_half_precision(function: np.ufunc, operands: Sequence[Array], out: Array, divisor: int) -> None:
    """Reduce float16 or bfloat16 operands, left to right, by a function on float32; divide the result, and round it.

    The operands are one-dimensional and of equal length. No operand but `out` is changed.
    """
    # Infinities and NaN are results like others, without a warning.
    with np.errstate(all="ignore"):
        if out.size <= _SMALL or not isinstance(out, np.ndarray):
            _reduce_whole(function, operands, out, divisor)
        else:
            _reduce_blocks(function, operands, out, divisor)


def _reduce_blocks(function: np.ufunc, operands: Sequence[Array], out: Array, divisor: int) -> None:
    widen, narrow = (_widen, _narrow) if out.dtype == np.float16 else (_cast, _cast)
    for start in range(0, out.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        total = _scratch.total[: out.size - start]
        operand = _scratch.operand[: out.size - start]
        widen(operands[0][block], total)
        for other in operands[1:]:
            widen(other[block], operand)
            function(total, operand, out=total)
        if divisor != 1:
            np.true_divide(total, divisor, out=total)
        narrow(total, out[block])


def _reduce_whole(function: np.ufunc, operands: Sequence[Array], out: Array, divisor: int) -> None:
    """Reduce whole arrays, which is best for small ones and for those on a GPU."""
    total = operands[0].astype(np.float32)
    for operand in operands[1:]:
        function(total, operand.astype(np.float32), out=total)
    if divisor != 1:
        total /= divisor
    out[...] = total


def _cast(numbers: Array, out: Array) -> None:
    """Copy numbers to another dtype, rounded to the nearest, halfway to even."""
    np.copyto(out, numbers, casting="unsafe")


def _widen(halves: Array, out: npt.NDArray[np.float32]) -> None:
    """Copy float16 to float32."""
    _values().take(halves.view(np.uint16), out=out, mode="wrap")  # "raise" would make a copy


@lru_cache(maxsize=1)
def _values() -> npt.NDArray[np.float32]:
    """List the values of all float16 numbers, in the order of their bits."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def _narrow(numbers: npt.NDArray[np.float32], out: Array) -> None:
    """Round float32 to float16; `numbers` is scratch memory.

    A number with exponent e is rounded to the nearest multiple of 2**(e-10), or of 2**-24 where it is subnormal in
    float16. That is the last place of m = 2**(e+13), so adding m rounds the number, and the multiple is the difference
    between the bits of the sum and those of m. The difference contains the leading bit, which counts as one more in the
    exponent, so the exponent added to it is e + 14.
    """
    signed = numbers.view(np.uint32)
    bits = np.bitwise_and(signed, _MAGNITUDE, out=_scratch.bits[: signed.size])
    if bits.max() >= _TOO_LARGE:
        _cast(numbers, out)
        return
    magic = np.bitwise_and(bits, _EXPONENT, out=_scratch.magic[: bits.size])
    np.maximum(magic, _LEAST_NORMAL, out=magic)
    np.add(magic, _EXTRA_BITS << np.uint32(23), out=magic)
    np.add(bits.view(np.float32), magic.view(np.float32), out=bits.view(np.float32))
    np.subtract(bits, magic, out=bits)
    np.right_shift(magic, _EXTRA_BITS, out=magic)
    np.add(bits, magic, out=bits)
    np.subtract(bits, np.uint32((127 - 14 + 13) << 10), out=bits)
    np.right_shift(signed, np.uint32(16), out=signed)
    np.bitwise_and(signed, _SIGN, out=signed)
    np.bitwise_or(bits, signed, out=bits)
    np.copyto(out.view(np.uint16), bits, casting="unsafe")
