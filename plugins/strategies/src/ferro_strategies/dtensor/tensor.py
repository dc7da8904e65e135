"""DTensor: an array that is spread over a mesh of ranks and used as one array.

The table lists the operations that communicate and those that raise an error. All ranks of the mesh
must call a collective.

    redistribute, full_tensor               collectives, as planned (`explain_redistribute`)
    distribute                              sends nothing, unless source= is given
    from_local                              exchanges shapes, unless shape= is given
    elementwise, where, clip, matmul, @,    send nothing where operands are placed alike or
    einsum, dot, tensordot                  replicated; operands sharded along different dims
                                            are an error
    … of a Partial                          reduce it first, unless linear in it, and exact on the
                                            parts: + and - of two Partials, unary -, * and / by a
                                            number or a replicated array, @, all finite and in
                                            the dtype of the Partial or a wider floating one
    reductions                              send nothing: over a sharded dim the result is
                                            Partial. A Partial operand is reduced first, unless
                                            by the same operation
    var, std, norm, average, nansum, …      as reductions; over a sharded dim a mean or count
                                            is reduced first
    argmax, sort, cumsum, median, take, …   send nothing; an error along a sharded dim
    transpose, reshape, concatenate, …      send nothing; an error where parts would have to move
    indexing                                a view; integers and slices along dims that are not
                                            sharded, None for a new dim; a copy for one array of
                                            indices or a mask along such dims
    x += y, out=, x[...] = y, x[mask] = y   as the operation; the target must have the result's
                                            placements, or be Partial for x[...] = y
    integers to a power that may be         exchange whether a rank failed, so that all raise
    negative, take_along_axis
    float(x), int(x), bool(x), item(),      of one element; a collective unless replicated
    format(x, spec)
    allclose, array_equal, value in x       collectives unless replicated
    numpy.asarray(x), pickling              an error that says what to do
    the rest                                works where no axis shards an array, else an error
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from ferro import UnsupportedError, UsageError

from ..mesh import DeviceMesh
from ..nn.arrays import Array, namespace_of
from ..nn.checkpoint_piece import CheckpointPiece
from .array_methods import ArrayMethods
from .checkpoint import checkpoint_piece
from .dispatch import call_function, call_ufunc
from .from_local import from_local_parts, from_local_with_shape
from .local_shapes import Shape, local_shape, shape_of
from .ops.elementwise import Scalar
from .ops.functions import power
from .ops.indexing import assign_at, index
from .ops.statistics import cast_to
from .placed_array import PlacedArray, coordinates_in, replicated
from .placement import Partial, Placement, Placements, Replicate, all_replicated, checked_placements
from .redistribute import moved_itemsize, redistribute
from .redistribute_plan import RedistributePlan, plan_redistribute

_Value = TypeVar("_Value", bool, int, float, complex)


class DTensor(ArrayMethods):
    """An array that is spread over a mesh of ranks.

    x = distribute(array, mesh, (Shard(0), Replicate()))
    y = (x @ w).sum(axis=1)          # each rank computes on its rows
    y.full_tensor()                  # the whole array on every rank

    `distribute` and `DTensor.from_local` make DTensors. NumPy's functions and operators work on
    them as the table at the head of this module says. Arrays and numbers among the operands count
    as replicated and must be the same on every rank. A CuPy array must be the right operand,
    because CuPy's operators do not ask the other operand.

    Results are NumPy's on the whole array, except for the order of the terms in sums. Sums in half
    precision are added up in float32 and rounded once, so that a Partial of them has float32 parts.
    """

    __array_priority__ = 1000.0

    def __init__(self, placed: PlacedArray) -> None:
        self._placed = placed

    @classmethod
    def from_local(
        cls, local: Array, mesh: DeviceMesh, placements: Sequence[Placement], *, shape: Sequence[int] | None = None
    ) -> DTensor:
        """Make a DTensor of the parts that the ranks have, without a copy.

        Args:
            local: this rank's part, of full size for a Partial.
            mesh: the ranks.
            placements: one for each axis of the mesh; the same on every rank.
            shape: shape of the global array. If it is given, nothing is sent, and only the rank
                with a wrong part raises. Otherwise all ranks of the mesh call this together and
                exchange shapes, and every rank raises.

        Raises:
            UsageError: placements do not fit the mesh, or parts do not make up an array.
        """
        namespace_of(local)  # raises UsageError for an object that is no array
        if shape is None:
            return cls(from_local_parts(local, mesh, placements))
        whole = shape_of(shape)
        checked = checked_placements(placements, mesh.ndim, len(whole), "from_local")
        return cls(from_local_with_shape(local, mesh, checked, whole))

    @classmethod
    def full(
        cls,
        shape: int | Sequence[int],
        fill_value: Scalar,
        mesh: DeviceMesh,
        placements: Sequence[Placement],
        dtype: npt.DTypeLike | None = None,
    ) -> DTensor:
        """Make an array of one value; each rank makes only its part, and nothing is sent.

        Args:
            shape: shape of the global array.
            fill_value: the value.
            mesh: the ranks.
            placements: one for each axis of the mesh.
            dtype: None for that of the value.
        """
        whole = shape_of(shape)
        target = checked_placements(placements, mesh.ndim, len(whole), "full")
        reduced = tuple(Replicate() if isinstance(one, Partial) else one for one in target)
        local = np.full(local_shape(whole, mesh.shape, reduced, coordinates_in(mesh)), fill_value, dtype)
        return cls(redistribute(PlacedArray(local=local, mesh=mesh, shape=whole, placements=reduced), target))

    @classmethod
    def zeros(
        cls,
        shape: int | Sequence[int],
        mesh: DeviceMesh,
        placements: Sequence[Placement],
        dtype: npt.DTypeLike = np.float64,
    ) -> DTensor:
        """Make an array of zeros; see `full`."""
        return cls.full(shape, 0, mesh, placements, dtype)

    @classmethod
    def ones(
        cls,
        shape: int | Sequence[int],
        mesh: DeviceMesh,
        placements: Sequence[Placement],
        dtype: npt.DTypeLike = np.float64,
    ) -> DTensor:
        """Make an array of ones; see `full`."""
        return cls.full(shape, 1, mesh, placements, dtype)

    @classmethod
    def arange(
        cls,
        stop: float,
        mesh: DeviceMesh,
        placements: Sequence[Placement],
        *,
        start: float = 0,
        step: float = 1,
        dtype: npt.DTypeLike | None = None,
    ) -> DTensor:
        """Make numpy.arange(start, stop, step); each rank keeps its part, and nothing is sent."""
        whole = np.arange(start, stop, step, dtype=dtype)
        target = checked_placements(placements, mesh.ndim, 1, "arange")
        coordinates_in(mesh)  # raises UsageError on a rank outside the mesh
        return cls(redistribute(replicated(whole, mesh), target))

    @property
    def local(self) -> Array:
        """This rank's part, not a copy; a view where this DTensor is a view of another."""
        return self._placed.local

    @property
    def mesh(self) -> DeviceMesh:
        """The mesh of ranks that hold the parts."""
        return self._placed.mesh

    @property
    def placements(self) -> Placements:
        """The placement on each axis of the mesh."""
        return self._placed.placements

    @property
    def shape(self) -> Shape:
        """Shape of the global array."""
        return self._placed.shape

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self._placed.shape)

    @property
    def size(self) -> int:
        """Number of elements of the global array."""
        return math.prod(self._placed.shape)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the elements; the parts of a Partial sum in half precision are float32."""
        return self._placed.dtype

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the elements of the global array."""
        return self.size * self.itemsize

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
        """Return a view of part of the array; sharded dims must stay whole."""
        return DTensor(index(self._placed, _unwrap(key)))

    def __setitem__(self, key: object, value: DTensor | Array | Scalar) -> None:
        """Write `value`, broadcast, into part of the array; its placements must be the part's."""
        assign_at(self._placed, _unwrap(key), value._placed if isinstance(value, DTensor) else value)

    def __iter__(self) -> Iterator[DTensor]:
        """Iterate over the first dim: `self[0]`, `self[1]` and so on."""
        if not self.shape:
            raise TypeError("iteration over a DTensor without dims")
        return (self[at] for at in range(len(self)))

    # -- placements ------------------------------------------------------------------------------

    def redistribute(self, placements: Sequence[Placement]) -> DTensor:
        """Return the same array with other placements, moving as few bytes as possible.

        All ranks of the mesh call it. The result has memory of its own, except that this DTensor
        itself is returned if it has these placements already.

        Raises:
            UsageError: placements do not fit; nothing was sent.
        """
        target = self._checked(placements)
        return self if target == self.placements else DTensor(redistribute(self._placed, target))

    def full_tensor(self) -> Array:
        """Return the whole array on every rank; all ranks of the mesh call it.

        The result is `local` itself if every axis is Replicate.
        """
        return redistribute(self._placed, all_replicated(self.mesh.ndim)).local

    def redistribute_cost(self, placements: Sequence[Placement]) -> int:
        """Return the bytes that the busiest rank would send, or receive where that is more."""
        return self._plan(placements).cost(moved_itemsize(self._placed))

    def explain_redistribute(self, placements: Sequence[Placement]) -> str:
        """Describe each step that `redistribute` would take in one line, with its bytes."""
        return self._plan(placements).describe(self.mesh.names, moved_itemsize(self._placed))

    def checkpoint_arrays(self) -> dict[str, CheckpointPiece]:
        """Describe this rank's part, for a checkpoint; sends nothing. A Partial has to be reduced before."""
        return {"": checkpoint_piece(self._placed)}

    def _plan(self, placements: Sequence[Placement]) -> RedistributePlan:
        return plan_redistribute(self.placements, self._checked(placements), self.shape, self.mesh.shape)

    def _checked(self, placements: Sequence[Placement]) -> Placements:
        return checked_placements(placements, self.mesh.ndim, self.ndim, "redistribute")

    # -- NumPy's dispatch protocols --------------------------------------------------------------

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: object, **options: object) -> object:
        """Apply a ufunc; see the table at the head of this module."""
        operands = [_unwrap(one) for one in inputs]
        targets = options.get("out")
        unwrapped = {key: _unwrap(value) for key, value in options.items()}
        results: list[object] = [DTensor(placed) for placed in call_ufunc(ufunc, method, operands, unwrapped)]
        if isinstance(targets, tuple):
            given = (*targets, *(None,) * (len(results) - len(targets)))
            results = [new if old is None else old for old, new in zip(given, results, strict=True)]
        return results[0] if len(results) == 1 else tuple(results)

    def __array_function__(
        self, func: Callable[..., object], types: Iterable[type], args: Sequence[object], kwargs: Mapping[str, object]
    ) -> object:
        """Apply a NumPy function; see the table at the head of this module."""
        options = {key: _unwrap(value) for key, value in kwargs.items()}
        result = call_function(func, [_unwrap(one) for one in args], options)
        out = kwargs.get("out")
        return out if isinstance(out, DTensor) else _wrap(result)

    def __array__(self, dtype: object = None, copy: object = None) -> NoReturn:
        """Raise: to gather is a collective, and a conversion on one rank would hang in it."""
        raise UnsupportedError(
            f"{self!r} does not become an array by itself, for all ranks would have to take part. "
            "Call full_tensor() on every rank, or use .local.",
            op="__array__",
        )

    def astype(self, dtype: npt.DTypeLike) -> DTensor:
        """Return a copy of another dtype."""
        return DTensor(cast_to(self._placed, dtype))

    def __pow__(self, exponent: object) -> DTensor:
        """Raise to a power; the dtype is that of NumPy's operator, not always that of numpy.power."""
        return DTensor(power(self._placed, _unwrap(exponent)))

    def __rpow__(self, base: object) -> DTensor:
        """Raise a number or an array to the power of this DTensor."""
        return DTensor(power(_unwrap(base), self._placed))

    # -- one element -----------------------------------------------------------------------------

    def item(self) -> bool | int | float | complex:
        """Return the only element as a Python number; a collective unless replicated."""
        if self.size != 1:
            raise UsageError(f"item: {self!r} has {self.size} elements, not one", op="item")
        value: bool | int | float | complex = self.full_tensor().item()
        return value

    def __float__(self) -> float:
        return self._convert_item(float)

    def __int__(self) -> int:
        return self._convert_item(int)

    def __complex__(self) -> complex:
        return self._convert_item(complex)

    def __bool__(self) -> bool:
        if self.size != 1:
            raise UsageError(f"bool of {self!r}, which has {self.size} elements: use .any() or .all()", op="bool")
        return self._convert_item(bool)

    def __format__(self, spec: str) -> str:
        """Format the only element, which is a collective unless replicated; without a format, describe the DTensor."""
        if not spec:
            return str(self)
        if self.size != 1:
            raise TypeError(f"format {spec!r} is for one element; {self!r} has {self.size}")
        return format(self.item(), spec)

    def __contains__(self, value: object) -> bool:
        """Return True on every rank if an element equals `value`; a collective unless replicated."""
        return bool((self == value).any())

    def _convert_item(self, kind: Callable[..., _Value]) -> _Value:
        return kind(self.item())

    # -- copies ----------------------------------------------------------------------------------

    def __copy__(self) -> DTensor:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, object]) -> DTensor:
        """Copy this rank's part; the mesh, which has connections, stays the same."""
        return self.copy()

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            f"{self!r} cannot be pickled, because its mesh has connections. Save .local of every rank with the "
            "placements, and load with DTensor.from_local; or save full_tensor(), and load with distribute().",
            op="pickle",
        )


def _wrap(value: Any) -> Any:
    """Make DTensors of PlacedArrays, also inside a list or tuple."""
    if isinstance(value, PlacedArray):
        return DTensor(value)
    if isinstance(value, list | tuple):
        items = [_wrap(one) for one in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _unwrap(value: Any) -> Any:
    """Replace DTensors by their PlacedArrays, also inside a list or tuple."""
    if isinstance(value, DTensor):
        return value._placed
    if isinstance(value, list | tuple):
        return type(value)(_unwrap(one) for one in value)
    return value
