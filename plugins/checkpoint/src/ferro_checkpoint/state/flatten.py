"""A state, flattened: the pieces of its arrays, and its values, each with its name.

A state is a nested dict. Its first-level keys name the bundles: tensor "0.weight" of bundle "model" is what
`state["model"]` calls "0.weight", and its full name is "model.0.weight". Arrays that are in the state itself are in
bundle "model".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ferro.arrays import InputArray, SupportsDLPack, output_array
from ferro.errors import FerroError
from ferro.types import Array
from ferro_checkpoint.errors import StateError
from ferro_checkpoint.layout.header import name_fault
from ferro_checkpoint.placement.array_piece import ArrayPiece
from ferro_checkpoint.state import objects
from ferro_checkpoint.state.parameter_names import ParameterNames
from ferro_checkpoint.state.skeleton import put_arrays, take_arrays
from ferro_checkpoint.state.values import Json, check_text, encode_value

DEFAULT_BUNDLE = "model"
_BUNDLE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
_MOST_DEPTH = 64
_Path = tuple[str, ...]


@dataclass(slots=True)
class FlatState:
    """The contents of a state on this rank.

    Attributes:
        pieces: full names and pieces of arrays; a name may have several pieces.
        values: what is no array, by path.
        by_rank: paths of values of which every rank has its own.
        checks: for some paths, the function that raises an error for a value that does not fit the object there.
        puts: for each path, the function that puts a value that was loaded back into the state.
        fixed: paths of values in tuples, which cannot take another value.
        finishes: functions to call when everything has been loaded.
        merges: for some paths, the function that unites the values of all ranks that saved.
        taken_over: paths of values that this rank lacks, and takes over from another one.
        states: optimizers, by path, that can begin the state of a parameter anew.
        of_parameters: full names of those optimizers' arrays, and those of their parameters, "optimizer.0.weight".
        frozen: names like these, of parameters that are not trained, so that their state is not needed.
    """

    pieces: list[tuple[str, ArrayPiece]] = field(default_factory=list)
    values: dict[str, Json] = field(default_factory=dict)
    by_rank: set[str] = field(default_factory=set)
    checks: dict[str, Callable[[Any], object]] = field(default_factory=dict)
    puts: dict[str, Callable[[Any], object]] = field(default_factory=dict)
    fixed: set[str] = field(default_factory=set)
    finishes: list[Callable[[], object]] = field(default_factory=list)
    merges: dict[str, Callable[[list[Any]], Any]] = field(default_factory=dict)
    taken_over: set[str] = field(default_factory=set)
    states: dict[str, Any] = field(default_factory=dict)
    of_parameters: dict[str, str] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Stored:
    """What a checkpoint has, for a state that is to be loaded: objects whose arrays it decides ask for them.

    Attributes:
        values: by path, as this rank loads them, decoded.
        empty: makes an array for a tensor, by full name, or None if there is none.
        of_other_rank: the first rank's value, by path, which this rank lacks; None if there is none.
    """

    values: Mapping[str, Any]
    empty: Callable[[str], Array | None]
    of_other_rank: Callable[[str], Any]


def flatten(state: object, rank: int, stored: Stored | None = None) -> FlatState:
    """Flatten a state.

    Args:
        state: a nested dict, or an object with arrays, which is then bundle "model".
        rank: of this process; arrays that every rank has its own of are named by it.
        stored: given when the state is to be loaded.

    Raises:
        StateError: something in it cannot be in a checkpoint, or two things have one name.
    """
    if not isinstance(state, Mapping):
        if not objects.has_arrays(state):
            raise StateError(
                f"the state is a {type(state).__name__}: give a dict, such as {{'model': model, 'step': 3}}"
            )
        state = {DEFAULT_BUNDLE: state}
    flattener = _Flattener(rank, stored)
    try:
        flattener.name_parameters(state, (), set())
        flattener.nest(state, (), 0)
    except RecursionError as error:
        raise StateError("the state is nested too deeply; does it contain itself?") from error
    flattener.check_names()
    return flattener.flat


class _Flattener:
    def __init__(self, rank: int, stored: Stored | None) -> None:
        self.flat = FlatState()
        self._rank, self._stored = rank, stored
        self._parameters = ParameterNames()
        self._owners: dict[str, _Path] = {}  # of each full name
        self._bundles: set[str] = set()

    def name_parameters(self, value: object, path: _Path, seen: set[int]) -> None:
        """Note the names of all modules' parameters, by which optimizers name their arrays.

        Args:
            value: of the state.
            path: where it is in the state.
            seen: the `id` of each container that was visited, so that none is visited twice.
        """
        if objects.has_parameters(value):
            self._parameters.add(_dotted(path), value.checkpoint_parameters())
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            if _has_only_plain_items(value):
                return
            for key, item in _items(value):
                if type(item) is not np.ndarray:
                    self.name_parameters(item, (*path, str(key)), seen)

    def nest(self, value: Any, path: _Path, depth: int) -> None:
        """Flatten the items of a dict, a list or a tuple."""
        if depth > _MOST_DEPTH:
            raise StateError(f"{_dotted(path)!r} is nested more than {_MOST_DEPTH} deep; does it contain itself?")
        for key, item in _items(value):
            if type(key) is not str and not isinstance(value, list | tuple):
                raise StateError(f"the key {key!r} in {_dotted(path) or 'the state'!r} is no text, as names must be")
            if not path and str(key).startswith("$"):
                raise StateError(
                    f"the state's key {key!r} begins with '$', as names of ferro-checkpoint do: give another"
                )
            if type(item) is np.ndarray:
                own = (*path, str(key))
                self._add_array(_own_name(own), own, item)
                continue

            def put(loaded: Any, key: Any = key, item: Any = item) -> None:
                _put(value, key, item, loaded)

            own = (*path, str(key))
            self._add(item, own, put, depth)
            if isinstance(value, tuple) and self.flat.puts.get(_dotted(own)) is put:
                self.flat.fixed.add(_dotted(own))

    def check_names(self) -> None:
        """Check that bundles are names of files."""
        for bundle in self._bundles:
            if not _BUNDLE.fullmatch(bundle):
                raise StateError(
                    f"the state's key {bundle!r} names files, so it must be letters, digits, '_' and '-': give another"
                )

    def _add(self, value: Any, path: _Path, put: Callable[[Any], object], depth: int) -> None:
        if isinstance(value, np.ndarray | ArrayPiece):
            self._add_array(_own_name(path), path, value)
        elif objects.has_optimizer_arrays(value) or objects.has_arrays(value):
            self._add_object(value, path)
        elif isinstance(value, np.generic) and value.dtype.kind != "O":
            self._add_scalar(value, path, put)
        elif isinstance(value, np.random.Generator):
            self._add_generator(value.bit_generator, path)
        elif objects.has_state_dict(value):
            self._add_state_dict(value, path)
        elif isinstance(value, SupportsDLPack) or hasattr(value, "__cuda_array_interface__"):
            self._add_array(_own_name(path), path, self._view(value, path))
        elif isinstance(value, Mapping | list | tuple) and not _is_plain(value, set()):
            self.nest(value, path, depth + 1)
        else:
            self._add_value(value, path, put)

    def _add_value(self, value: object, path: _Path, put: Callable[[Any], object], *, by_rank: bool = False) -> None:
        name = _dotted(path)
        check_text(name, name)
        if name in self.flat.values:
            raise StateError(f"two values of the state are called {name!r}")
        self.flat.values[name] = encode_value(value, name)
        self.flat.puts[name] = put
        if by_rank:
            self.flat.by_rank.add(name)

    def _add_array(self, name: str, path: _Path, value: Any) -> None:
        """Add an array, or what describes a piece of one, under its full name."""
        own = self._owners.setdefault(name, path)
        if own is not path:
            raise StateError(f"two arrays of the state are called {name!r}: in {_dotted(own)!r} and {_dotted(path)!r}")
        check_text(name, name)
        bundle, _, tensor = name.partition(".")
        if fault := name_fault(tensor):
            raise StateError(f"{name!r}: {fault}")
        self._bundles.add(bundle)
        pieces = value if isinstance(value, list) else [value]
        for piece in pieces:
            if isinstance(piece, np.ndarray):
                _check_unmasked(name, piece)
                self.flat.pieces.append((name, ArrayPiece.whole(piece.view(np.ndarray))))
            elif hasattr(piece, "extent"):
                self.flat.pieces.append((name, ArrayPiece.checked(name, piece)))
            else:
                self.flat.pieces.append((name, ArrayPiece.whole(self._view(piece, path))))

    def _add_object(self, value: Any, path: _Path) -> None:
        loading = self._stored is not None
        if loading and callable(prepare := getattr(value, "prepare_checkpoint_load", None)):
            prepare()
        prefix = _dotted(path)
        if objects.has_optimizer_arrays(value):
            arrays = self._optimizer_arrays(value, prefix)
        else:
            arrays = value.checkpoint_arrays()
        for name, array in arrays.items():
            self._add_array(f"{prefix}.{name}" if name else _own_name(path), path, array)
        if callable(values := getattr(value, "checkpoint_values", None)):
            by_rank = bool(getattr(value, "checkpoint_values_by_rank", False))
            current = values()
            if current is not None or loading:
                self._add_value(current, path, getattr(value, "load_checkpoint_values"), by_rank=by_rank)  # noqa: B009
            if callable(check := getattr(value, "check_checkpoint_values", None)):
                self.flat.checks[prefix] = check
            if callable(merge := getattr(value, "merged_checkpoint_values", None)):
                self.flat.merges[prefix] = merge
        if loading and callable(finish := getattr(value, "finish_checkpoint_load", None)):
            self.flat.finishes.append(finish)

    def _optimizer_arrays(self, value: objects.HasOptimizerArrays, prefix: str) -> Mapping[str, Any]:
        """Ask an optimizer for its arrays, under the names of its parameters."""
        own = getattr(value, "checkpoint_optimizer_parameters", None)
        names = self._parameters.of(own() if callable(own) else None)
        arrays = value.checkpoint_optimizer_arrays(names)
        if self._stored is not None and callable(getattr(value, "begin_checkpoint_states", None)):
            self.flat.states[prefix] = value
            self.flat.of_parameters |= {f"{prefix}.{key}": f"{prefix}.{key.rpartition('.')[0]}" for key in arrays}
            self.flat.frozen |= {f"{prefix}.{name}" for name in self._parameters.frozen(names)}
        return arrays

    def _add_scalar(self, value: np.generic, path: _Path, put: Callable[[Any], object]) -> None:
        """Add a NumPy number, as an array without dimensions."""
        array = np.array(value)
        self._add_array(_own_name(path), path, array)
        self.flat.finishes.append(lambda: put(array[()]))

    def _add_generator(self, generator: np.random.BitGenerator, path: _Path) -> None:
        """Add the state of a random generator, of which every rank has its own."""
        name, kind = _dotted(path), type(generator).__name__

        def restore(state: Any) -> None:
            generator.state = state

        self._add_value(generator.state, path, restore, by_rank=True)
        if self._stored is not None and name in self._stored.values:
            saved = self._stored.values[name]
            saved_kind = saved.get("bit_generator") if isinstance(saved, dict) else type(saved).__name__
            if saved_kind != kind:
                raise StateError(f"{name!r} is a generator of {kind}, and {saved_kind} in the checkpoint")
            try:
                type(generator)(0).state = saved
            except (TypeError, ValueError, LookupError, AttributeError) as error:
                raise StateError(
                    f"{name!r} is a generator of {kind}, and the checkpoint has no state of one"
                ) from error

    def _add_state_dict(self, value: objects.HasStateDict, path: _Path) -> None:
        """Add the state dict of an object; its arrays are tensors of their own."""
        name = _dotted(path)
        by_rank = bool(getattr(value, "checkpoint_values_by_rank", False))
        if self._stored is None:

            def take(tensor: str, array: Array) -> None:
                _check_unmasked(tensor, array)
                self._add_array(tensor, (*path, tensor), ArrayPiece.whole(array)._replace(on_all_ranks=not by_rank))

            tensors = f"{name}.{self._rank}" if by_rank else name
            self._add_value(
                take_arrays(value.state_dict(), tensors, take), path, value.load_state_dict, by_rank=by_rank
            )
            return
        # What is loaded says which arrays there are, and not what the object has now.
        self._add_value(True, path, lambda _: None, by_rank=by_rank)
        if name in self._stored.values:
            saved, convert = self._stored.values[name], None
        else:
            convert = getattr(value, "checkpoint_state_of_new_rank", None)
            saved = self._stored.of_other_rank(name) if callable(convert) else None
            if saved is None:
                return
            self.flat.taken_over.add(name)
        loaded = put_arrays(saved, lambda tensor: self._empty(tensor, path))
        self.flat.finishes.append(lambda: value.load_state_dict(convert(loaded) if convert else loaded))

    def _empty(self, tensor: str, path: _Path) -> Array:
        """Make an array for a tensor that the saved state dict of the object at `path` names."""
        assert self._stored is not None
        array = self._stored.empty(tensor)
        if array is None:
            raise StateError(f"the checkpoint lacks tensor {tensor!r}, which its values of {_dotted(path)!r} name")
        # Ranks that have none of the saved values keep what they have, and know nothing of this array.
        self._add_array(tensor, (*path, tensor), ArrayPiece.whole(array)._replace(on_all_ranks=False))
        return array

    def _view(self, value: Any, path: _Path) -> Array:
        """View another library's array; to load it, its memory must be writable."""
        name = _dotted(path)
        try:
            array: Array = InputArray(value, what=name).array
            if self._stored is not None:
                array = output_array(value, array.shape, array.dtype, what=name)
        except FerroError as error:
            raise StateError(f"{name!r}: {error}") from error
        return array


def _check_unmasked(name: str, array: Array) -> None:
    if type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray):
        raise StateError(f"{name!r} is a masked array: save its data and its mask")


def _items(value: Any) -> Any:
    return value.items() if isinstance(value, Mapping) else enumerate(value)


def _dotted(path: _Path) -> str:
    return ".".join(path)


def _own_name(path: _Path) -> str:
    """Return the full name of an array at this path."""
    return f"{DEFAULT_BUNDLE}.{path[0]}" if len(path) == 1 else _dotted(path)


_PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes, bytearray))


def _has_only_plain_items(value: Mapping[Any, Any] | Sequence[Any]) -> bool:
    """Say, fast enough for millions of items, whether all are of simple types."""
    return set(map(type, value.values() if isinstance(value, Mapping) else value)) <= _PLAIN


def _is_plain(value: Any, seen: set[int]) -> bool:
    """Say whether a value has neither arrays nor objects in it, however nested; `seen` has the `id` of containers."""
    if isinstance(value, Mapping | list | tuple):
        if id(value) in seen:
            return True
        seen.add(id(value))
        return _has_only_plain_items(value) or all(_is_plain(item, seen) for _, item in _items(value))
    return value is None or isinstance(value, bool | int | float | complex | str | bytes | bytearray)


def _put(container: Any, key: Any, old: Any, loaded: Any) -> None:
    """Put a loaded value where `old` is; a dict or a list keeps its identity."""
    if isinstance(old, dict) and isinstance(loaded, dict):
        old.clear()
        old.update(loaded)
    elif isinstance(old, list) and isinstance(loaded, list):
        old[:] = loaded
    elif isinstance(container, tuple):
        if repr(old) != repr(loaded):  # a NumPy number; others are compared before anything is loaded
            raise StateError(f"a tuple of the state holds {old!r}, and {loaded!r} cannot be put there: use a list")
    else:
        container[key] = loaded
