"""ModuleCheckpoint: the part of Module that lets a checkpoint save and load what each rank holds, without messages."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

from ferro import ProcessGroup
from ferro.errors import UsageError

from .checkpoint_piece import CheckpointPiece, piece_like_parameter
from .checks import first_few
from .module_state import ModuleState
from .module_tree import Buffer, Part, members, walk
from .parameter import Parameter

_log = logging.getLogger("ferro.strategies")


class ModuleCheckpoint(ModuleState):
    """The methods by which a checkpoint reads and writes a module; none of them sends anything.

    They describe this rank's pieces of the arrays of the plain module: names, shapes and dtypes are those that it has
    without any strategy. So a checkpoint of one strategy loads into another, and on another number of ranks.

    A strategy whose pieces follow from `Parameter.splits` needs no method of its own. One that has others overrides
    `checkpoint_arrays`, and `finish_checkpoint_load` if it keeps copies of what is loaded; both are honoured where the
    strategy is a part of another module.

    Attributes:
        checkpoint_values_by_rank: True: each rank has random generators of its own.
    """

    checkpoint_values_by_rank: ClassVar[bool] = True

    def checkpoint_arrays(self) -> Mapping[str, CheckpointPiece]:
        """Describe this rank's pieces of all parameters and buffers, by their names in the plain module.

        Raises:
            UsageError: a parameter has no value yet, or it is not known where this rank's piece of it lies.
        """
        _check_overrides(self)
        pieces: dict[str, CheckpointPiece] = {}
        for name, item in members(self, *_overriding()):
            if isinstance(item, Part):
                given = _module(item).checkpoint_arrays()
                pieces |= {item.prefix + key: piece for key, piece in given.items() if key not in item.aliases}
            elif isinstance(item, Parameter):
                pieces[name] = piece_like_parameter(item, item.data)
            elif isinstance(item, Buffer):
                # Between two synchronisations, ranks may have running statistics of their own batches.
                pieces[name] = CheckpointPiece.whole(item.data, replicas_may_differ=True)
        return pieces

    def checkpoint_parameters(self) -> Mapping[str, Parameter]:
        """List the parameters by the names of `checkpoint_arrays`, by which optimizers name their state."""
        found: dict[str, Parameter] = {}
        for name, item in members(self, ModuleCheckpoint.checkpoint_parameters):
            if isinstance(item, Part):
                given = _module(item).checkpoint_parameters()
                found |= {item.prefix + key: each for key, each in given.items() if key not in item.aliases}
            elif isinstance(item, Parameter):
                found[name] = item
        return found

    def checkpoint_values(self) -> object:
        """Copy the states of this rank's random generators; None if there are none."""
        generators = {self._whole_name(name): state for name, state in self.generator_state_dict().items()}
        return {"generators": generators, "layout": _layout(self)} if generators else None

    def load_checkpoint_values(self, value: Any) -> None:
        """Set the states of this rank's random generators, after `check_checkpoint_values`.

        Which ranks draw the same numbers, and which draw others, depends on the strategy. So the generators keep their
        states if the checkpoint was saved by another strategy, or with other groups of ranks; a training cannot go on
        bit for bit then. A generator that the checkpoint lacks keeps its state, too, and a warning is logged if it has
        others.
        """
        self.check_checkpoint_values(value)
        saved, own = _saved_generators(value), self.generator_state_dict()
        if not value or not own:
            return  # The rank that saved had no generators, or this one has none.
        if value.get("layout") != _layout(self):
            _log.info(
                "%s: its random generators keep their states, as the layout of ranks is another", type(self).__name__
            )
            return
        names = {name: self._whole_name(name) for name in own}
        self.load_generator_state_dict({name: saved.get(whole, own[name]) for name, whole in names.items()})
        changes = [f"{name!r} is new" for name in names.values() if name not in saved]
        changes += [f"{name!r} is gone" for name in saved if name not in names.values()]
        if changes:
            _log.warning(
                "%s: its random generators are not those of the checkpoint: %s; so it draws other numbers than the "
                "training that was saved",
                type(self).__name__,
                "; ".join(first_few(changes)),
            )

    def check_checkpoint_values(self, value: Any) -> None:
        """Refuse values that cannot be loaded.

        Raises:
            UsageError: `value` is of another kind of object, or a generator is of another kind.
        """
        saved = _saved_generators(value)
        for name, state in self.generator_state_dict().items():
            whole = self._whole_name(name)
            here, there = state["bit_generator"], saved.get(whole, state).get("bit_generator")
            if here != there:
                raise UsageError(
                    f"{type(self).__name__}: random generator {whole!r} is a {here}, and a {there} in the checkpoint."
                )

    def prepare_checkpoint_load(self) -> None:
        """Make the arrays into which a checkpoint is loaded: parameters that were built inside `deferred()` are drawn.

        A load that fails after this leaves a model that has its first values.
        """
        for _, item in walk(self):
            if isinstance(item, Parameter):
                item.materialize()

    def finish_checkpoint_load(self) -> None:
        """Bring what depends on the loaded arrays up to date; a strategy overrides this if it keeps copies of them."""
        for _, item in members(self, ModuleCheckpoint.finish_checkpoint_load):
            if isinstance(item, Part):
                _module(item).finish_checkpoint_load()

    def _whole_name(self, name: str) -> str:
        """Translate the name of a random generator to that in the plain module."""
        return name


def _overriding() -> tuple[Callable[..., object], ...]:
    """List the methods whose overriding makes a submodule answer for all that it holds."""
    return ModuleCheckpoint.checkpoint_arrays, ModuleState.state_dict


def _check_overrides(module: ModuleCheckpoint) -> None:
    """Refuse a module that saves something else than its parameters and buffers, and does not say what.

    Raises:
        UsageError: its class overrides `state_dict` alone.
    """
    kind = type(module)
    if kind.state_dict is not ModuleState.state_dict and kind.checkpoint_arrays is ModuleCheckpoint.checkpoint_arrays:
        raise UsageError(
            f"{kind.__name__} overrides state_dict and not checkpoint_arrays, so it is not known what a checkpoint is "
            "to hold of it. Override checkpoint_arrays, too; `return super().checkpoint_arrays()` saves its parameters "
            "and buffers."
        )


def _layout(module: ModuleState) -> str:
    """Digest the groups of ranks over which this module is spread, and by what; "" if it is not."""
    found: set[tuple[str, tuple[int, ...]]] = set()
    for _, item in walk(module):
        if isinstance(item, ModuleState):
            groups = [(type(item).__name__, value) for value in vars(item).values() if isinstance(value, ProcessGroup)]
        else:
            groups = [("split", split.group) for split in item.splits] if isinstance(item, Parameter) else []
        found.update((kind, group.global_ranks) for kind, group in groups if group.world_size > 1)
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()[:16] if found else ""


def _saved_generators(value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not isinstance(generators := value.get("generators"), Mapping):
        raise UsageError(f"load_checkpoint_values: expected the random generators of a module, got {value!r:.80}.")
    return generators


def _module(part: Part) -> ModuleCheckpoint:
    return cast(ModuleCheckpoint, part.module)
