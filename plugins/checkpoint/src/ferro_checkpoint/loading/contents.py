"""Contents: what a checkpoint has for a state, under the names that the state has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ferro.types import Array
from ferro_checkpoint.errors import CheckpointError
from ferro_checkpoint.loading.names import Chooser, Rename, renamed_names, renamer
from ferro_checkpoint.opened.checkpoint import OpenedCheckpoint
from ferro_checkpoint.opened.place import COMPLEX128, StoredPlace
from ferro_checkpoint.state.skeleton import TENSOR_KEY, put_arrays, rename_arrays
from ferro_checkpoint.state.value_agreement import BY_RANK, values_of_rank
from ferro_checkpoint.state.values import Json, decode_value, encode_value


class Contents:
    """The tensors and values of a checkpoint that one rank may load.

    Args:
        opened: the checkpoint.
        rank: this rank.
        only, rename: see `load`.

    Attributes:
        path: of the checkpoint.
        chosen: says whether a name of the state is to be loaded.
        tensors: the chosen tensors, by their names in the state.
        values: the chosen values of this rank, as JSON.
        decoded: the same, as they were saved.
        lacking: paths of values that other ranks have and this one has not.

    Raises:
        StateError: `only` or `rename` makes no sense.
        CheckpointError: a value is of a kind that this version does not know.
    """

    def __init__(
        self, opened: OpenedCheckpoint, rank: int, only: str | Iterable[str] | None, rename: Rename | None
    ) -> None:
        self.path = opened.path
        self.chosen = Chooser(only)
        self._record_values = opened.record.values
        self._to_state = renamer(rename)
        self._all = {new: opened.tensors[old] for new, old in renamed_names(opened.tensors, rename).items()}
        self.tensors: dict[str, StoredPlace] = {name: place for name, place in self._all.items() if self.chosen(name)}
        values, lacking = values_of_rank(opened.record.values, rank)
        self.lacking = [self._to_state(name) for name in lacking]
        values.pop(COMPLEX128, None)
        renamed = renamed_names(values, rename)
        self.chosen.check([*self._all, *renamed_names(opened.record.values, rename)])
        self.values: dict[str, Json] = {new: values[old] for new, old in renamed.items() if self.chosen(new)}
        self.decoded: dict[str, Any] = {name: self._decoded(name, value) for name, value in self.values.items()}

    def of_other_rank(self, name: str) -> Any:
        """Return the value of the first rank that has one, if this rank lacks it; None if none is there."""
        found = [value for value in self._of_ranks(name) if value is not None] if name in self.lacking else []
        return found[0] if found and self.chosen(name) else None

    def merge(self, name: str, merge: Callable[[list[Any]], Any]) -> None:
        """Take, in the place of this rank's value, what `merge` makes of those of all ranks, if that is not None."""
        found = [value for value in self._of_ranks(name) if value is not None]
        merged = merge(found) if found and self.chosen(name) else None
        if merged is not None:
            self.decoded[name], self.values[name] = merged, encode_value(merged, name)
            self.lacking = [each for each in self.lacking if each != name]

    def empty(self, name: str) -> Array | None:
        """Make an array for a tensor; None if there is none of this name."""
        place = self._all.get(name)
        return None if place is None else np.empty(place.array_shape, place.array_dtype(name, self.path))

    def empty_state(self) -> dict[str, Any]:
        """Make a state of arrays for all chosen tensors: a dict of the bundles, each a dict of arrays."""
        state: dict[str, Any] = {}
        for name in self.tensors:
            bundle, _, tensor = name.partition(".")
            state.setdefault(bundle, {})[tensor] = self.empty(name)
        return state

    def add_values(self, state: dict[str, Any]) -> None:
        """Add the values to a state of arrays: those of an object that is a bundle as "BUNDLE.values"."""
        arrays = {f"{bundle}.{name}": array for bundle, own in state.items() for name, array in own.items()}
        for name, value in self.decoded.items():
            state[f"{name}.values" if name in state else name] = put_arrays(value, arrays.get)

    def of_single_ranks(self) -> set[str]:
        """List tensors of objects of which every rank has its own; on fewer ranks nobody takes some of them."""
        names: set[str] = set()
        for value in self._record_values.values():
            if isinstance(value, dict) and BY_RANK in value:
                _find_tensors(value, names)
        return {self._to_state(name) for name in names}

    def _of_ranks(self, name: str) -> list[Any]:
        """Decode the values of all ranks, None for those that have none; [] if all have the same."""
        for old, value in self._record_values.items():
            each = value.get(BY_RANK) if isinstance(value, dict) and len(value) == 1 else None
            if isinstance(each, list) and self._to_state(old) == name:
                return [None if item == {"$none": True} else self._decoded(name, item) for item in each]
        return []

    def _decoded(self, name: str, value: Json) -> Any:
        try:
            return rename_arrays(decode_value(value), self._to_state)
        except ValueError as error:
            text = f"{self.path}: value {name!r}: {error}: update ferro-checkpoint, or leave it out with only="
            raise CheckpointError(text, path=self.path) from error


def _find_tensors(value: Json, names: set[str]) -> None:
    """Add the names of tensors that a saved state dict has in the place of arrays."""
    if isinstance(value, dict):
        pairs = value.get("$dict")
        if isinstance(pairs, list) and len(pairs) == 1:
            pair = pairs[0]
            if isinstance(pair, list) and len(pair) == 2 and pair[0] == TENSOR_KEY and isinstance(pair[1], str):
                names.add(pair[1])
        for item in value.values():
            _find_tensors(item, names)
    elif isinstance(value, list):
        for item in value:
            _find_tensors(item, names)
