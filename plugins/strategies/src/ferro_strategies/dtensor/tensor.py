"""DTensor: an array that is spread over a mesh of ranks, and used as one array.

What communicates, and what is refused; a collective must be called by all ranks of the mesh.

    redistribute, full_tensor               collectives, as planned (`explain_redistribute`)
    distribute                              sends nothing, unless source= is given
    from_local                              tells shapes, unless shape= is given
    elementwise, where, clip, matmul, @     send nothing where operands lie alike, or are cut
                                            from what is replicated; operands cut along other
                                            dims are an error
    … of a Partial                          reduce it first, unless linear in it: + and - of two
                                            Partials, unary -, * and / by what is no Partial, @
    reductions                              send nothing: over a cut dim the result is Partial.
                                            A Partial operand is reduced first, unless by the same
                                            operation
    transpose, reshape, concatenate, …      send nothing; an error where parts would have to move
    indexing                                integers and slices, along dims that are not cut; a
                                            view. None for a new dim
    x += y, out=, x[...] = y                as the operation; the result must lie as the target
    float(x), int(x), bool(x), item()       of one element; a collective unless replicated
    numpy.asarray(x), the rest              an error that names .local and full_tensor()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NoReturn, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numpy.lib.mixins import NDArrayOperatorsMixin

from ferro import UnsupportedError, UsageError

from ..mesh import DeviceMesh
from ..nn.arrays import Array, namespace_of
from . import functions, shaping, spreading
from .elementwise import Scalar, assign
from .indexing import index
from .layout import Shape
from .piece import Piece
from .placement import Placement, Placements, checked_placements, everywhere
from .planner import Plan, plan
from .protocol import call_function, call_ufunc
from .reductions import Axis, Name, reduce
from .transfer import redistributed

_Value = TypeVar("_Value", bool, int, float, complex)


class DTensor(NDArrayOperatorsMixin):
    """An array that is spread over a mesh of ranks.

    x = distribute(array, mesh, (Shard(0), Replicate()))
    y = (x @ w).sum(axis=1)          # on each rank with its part of the rows
    y.full_tensor()                  # the whole, on every rank

    Made by `distribute` or `DTensor.from_local`. It works with numpy's functions and operators,
    as the table at the head of this module says; arrays and numbers among the operands count as
    replicated and must be the same on every rank; a CuPy array is written to the right of the
    operator, for CuPy's own do not ask the other side.

    Results are those of numpy on the whole array, but for the order in which sums are added; as
    long as signed integers do not overflow, ranks' parts of a Partial among them, and such parts
    are not multiplied by infinity or divided by zero.
    """

    __array_priority__ = 1000.0

    def __init__(self, piece: Piece) -> None:
        self._piece = piece

    @classmethod
    def from_local(
        cls,
        local: Array,
        mesh: DeviceMesh,
        placements: Sequence[Placement],
        *,
        shape: Sequence[int] | None = None,
    ) -> DTensor:
        """Make a DTensor of the parts that ranks have, without a copy.

        Args:
            local: this rank's part. For a Partial, of full size.
            mesh: the ranks.
            placements: how the parts lie, one placement for each axis; the same on every rank.
            shape: of the global array, if known: then nothing is sent, and a wrong part is an
                error on its rank only. Otherwise all ranks of the mesh call this together, tell
                each other their shapes, and a wrong part is an error on all.

        Raises:
            UsageError: placements do not fit the mesh, or parts do not make up an array.
        """
        namespace_of(local)  # refuses what is no array
        if shape is None:
            return cls(spreading.part_of_unknown(local, mesh, placements))
        found = checked_placements(placements, mesh.ndim, len(shape), "from_local")
        return cls(spreading.checked_part(local, mesh, found, tuple(shape)))

    @property
    def local(self) -> Array:
        """This rank's part, itself; a view where this DTensor was made by a view."""
        return self._piece.local

    @property
    def mesh(self) -> DeviceMesh:
        """The ranks."""
        return self._piece.mesh

    @property
    def placements(self) -> Placements:
        """What the ranks along each axis of the mesh hold."""
        return self._piece.placements

    @property
    def shape(self) -> Shape:
        """Of the global array."""
        return self._piece.shape

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self._piece.shape)

    @property
    def size(self) -> int:
        """Number of elements of the global array."""
        return math.prod(self._piece.shape)

    @property
    def dtype(self) -> np.dtype:
        """Of the elements."""
        return self._piece.local.dtype

    def __repr__(self) -> str:
        return (
            f"DTensor(shape={self.shape}, dtype={self.dtype}, placements={self.placements}, "
            f"mesh={dict(zip(self.mesh.names, self.mesh.shape, strict=True))})"
        )

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a DTensor without dims")
        return self.shape[0]

    # -- elements --------------------------------------------------------------------------------

    def __getitem__(self, key: object) -> DTensor:
        """Return part of the array, a view; dims that are cut must stay whole."""
        return DTensor(index(self._piece, key))

    def __setitem__(self, key: object, value: DTensor | Array | Scalar) -> None:
        """Write over part of the array; `value`, broadcast to it, must lie as the part does."""
        target = index(self._piece, key)
        assign(target, value._piece if isinstance(value, DTensor) else value)

    def __iter__(self) -> Iterator[DTensor]:
        """Go through the first dim, as `self[0]` and so on."""
        return (self[at] for at in range(len(self)))

    # -- placements ------------------------------------------------------------------------------

    def redistribute(self, placements: Sequence[Placement]) -> DTensor:
        """Return the same array, placed otherwise, moving as little as possible.

        All ranks of the mesh call it. The result has memory of its own, but where the placements
        are those there are: then it is this DTensor.

        Raises:
            UsageError: placements do not fit; nothing was sent.
        """
        target = self._checked(placements)
        return self if target == self.placements else DTensor(redistributed(self._piece, target))

    def full_tensor(self) -> Array:
        """Return the whole array on every rank; all ranks of the mesh call it.

        It is `local` itself where every axis is Replicate.
        """
        return redistributed(self._piece, everywhere(self.mesh.ndim)).local

    def redistribute_cost(self, placements: Sequence[Placement]) -> int:
        """Return how many bytes the busiest rank would send, or receive where that is more."""
        return self._plan(placements).cost(self.dtype.itemsize)

    def explain_redistribute(self, placements: Sequence[Placement]) -> str:
        """Return, for people, what `redistribute` would do: a line for each step, with bytes."""
        return self._plan(placements).describe(self.mesh.names, self.dtype.itemsize)

    def _plan(self, placements: Sequence[Placement]) -> Plan:
        return plan(self.placements, self._checked(placements), self.shape, self.mesh.shape)

    def _checked(self, placements: Sequence[Placement]) -> Placements:
        return checked_placements(placements, self.mesh.ndim, self.ndim, "redistribute")

    # -- numpy's protocols -----------------------------------------------------------------------

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: object, **options: object
    ) -> object:
        """Carry out a ufunc; see the table at the head of this module."""
        plain = [_unwrapped(one) for one in inputs]
        targets = options.get("out")
        chosen = {key: _unwrapped(value) for key, value in options.items()}
        results: list[object] = [
            DTensor(piece) for piece in call_ufunc(ufunc, method, plain, chosen)
        ]
        if isinstance(targets, tuple):
            given = (*targets, *(None,) * (len(results) - len(targets)))
            results = [new if old is None else old for old, new in zip(given, results, strict=True)]
        return results[0] if len(results) == 1 else tuple(results)

    def __array_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: Sequence[object],
        kwargs: Mapping[str, object],
    ) -> object:
        """Carry out a numpy function; see the table at the head of this module."""
        options = {key: _unwrapped(value) for key, value in kwargs.items()}
        result = call_function(func, [_unwrapped(one) for one in args], options)
        return DTensor(result) if isinstance(result, Piece) else result

    def __array__(self, dtype: object = None, copy: object = None) -> NoReturn:
        """Refuse: gathering is a collective, which a conversion on one rank would hang in."""
        raise UnsupportedError(
            f"{self!r} does not become an array by itself, for all ranks would have to take part. "
            "Call full_tensor() on every rank, or use .local.",
            op="__array__",
        )

    # -- methods as arrays have them -------------------------------------------------------------

    def sum(
        self, axis: Axis = None, dtype: npt.DTypeLike | None = None, *, keepdims: bool = False
    ) -> DTensor:
        """Add up over dims, all when `axis` is None; Partial over cut dims."""
        return self._reduce("sum", axis, dtype, keepdims)

    def mean(
        self, axis: Axis = None, dtype: npt.DTypeLike | None = None, *, keepdims: bool = False
    ) -> DTensor:
        """Average over dims, by the global count; Partial sum over cut dims."""
        return self._reduce("mean", axis, dtype, keepdims)

    def prod(
        self, axis: Axis = None, dtype: npt.DTypeLike | None = None, *, keepdims: bool = False
    ) -> DTensor:
        """Multiply over dims; Partial over cut dims."""
        return self._reduce("prod", axis, dtype, keepdims)

    def max(self, axis: Axis = None, *, keepdims: bool = False) -> DTensor:
        """Return the largest over dims; Partial over cut dims."""
        return self._reduce("max", axis, None, keepdims)

    def min(self, axis: Axis = None, *, keepdims: bool = False) -> DTensor:
        """Return the smallest over dims; Partial over cut dims."""
        return self._reduce("min", axis, None, keepdims)

    def any(self, axis: Axis = None, *, keepdims: bool = False) -> DTensor:
        """Say whether any is true over dims; Partial("max") over cut dims."""
        return self._reduce("any", axis, None, keepdims)

    def all(self, axis: Axis = None, *, keepdims: bool = False) -> DTensor:
        """Say whether all are true over dims; Partial("min") over cut dims."""
        return self._reduce("all", axis, None, keepdims)

    def _reduce(
        self, name: Name, axis: Axis, dtype: npt.DTypeLike | None, keepdims: bool
    ) -> DTensor:
        return DTensor(reduce(self._piece, name, axis, dtype, keepdims=keepdims))

    @property
    def T(self) -> DTensor:  # noqa: N802 - arrays have it by this name
        """The dims in reverse order; a view."""
        return self.transpose()

    def transpose(self, *axes: int | Sequence[int]) -> DTensor:
        """Return the dims in another order, as one argument or several; a view.

        They are reversed when none is given.
        """
        return DTensor(shaping.transpose(self._piece, _numbers(axes) if axes else None))

    def reshape(self, *shape: int | Sequence[int]) -> DTensor:
        """Return the elements in another shape, where parts stay where they are; a view if can be.

        The shape may be one argument, or one for each dim.

        Raises:
            UsageError: sizes do not fit, or parts would have to move.
        """
        return DTensor(shaping.reshape(self._piece, _numbers(shape)))

    def astype(self, dtype: npt.DTypeLike) -> DTensor:
        """Return a copy of another dtype."""
        return DTensor(functions.cast_to(self._piece, dtype))

    def copy(self) -> DTensor:
        """Return a copy, placed alike."""
        return DTensor(functions.copy(self._piece))

    # -- one element -----------------------------------------------------------------------------

    def item(self) -> bool | int | float | complex:
        """Return the one element, as a Python number; a collective unless it is replicated."""
        if self.size != 1:
            raise UsageError(f"item: {self!r} has {self.size} elements, not one", op="item")
        value: bool | int | float | complex = self.full_tensor().item()
        return value

    def __float__(self) -> float:
        return self._number(float)

    def __int__(self) -> int:
        return self._number(int)

    def __complex__(self) -> complex:
        return self._number(complex)

    def __bool__(self) -> bool:
        return self._number(bool)

    def _number(self, kind: Callable[..., _Value]) -> _Value:
        return kind(self.item())


def _numbers(given: Sequence[int | Sequence[int]]) -> Sequence[int]:
    """Return numbers that were given as one sequence, or each as an argument."""
    one = given[0] if len(given) == 1 else given
    return cast("Sequence[int]", one if isinstance(one, Sequence) else given)


def _unwrapped(value: object) -> object:
    """Return pieces in place of DTensors, also within a list or tuple."""
    if isinstance(value, DTensor):
        return value._piece
    if isinstance(value, list | tuple):
        return type(value)(_unwrapped(one) for one in value)
    return value
