"""ModuleState: the part of Module that saves and loads, and that strategies override."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, TypeAlias, cast

import numpy as np

from ferro.errors import UsageError

from .arrays import Array
from .checks import first_few
from .module_tree import Buffer, ModuleBase, Part, members, route, walk
from .parameter import Parameter
from .state import OptimizerWithState, StateDifference, StateLoad, gather_optimizer_state, plan_optimizer_load

# The state of a random generator: nested dicts of strings and integers, whose form NumPy does not specify.
GeneratorState: TypeAlias = Mapping[str, Any]


class ModuleState(ModuleBase):
    """The methods of `Module` that are honoured where a strategy overrides them.

    A strategy, such as one that keeps parameters in pieces, may be a part of another module, at any depth and beside
    other strategies. Each method here does its work for the objects of this module's own tree, and calls the same
    method of every submodule whose class overrides it; names that come back get the submodule's name as a prefix.
    A strategy therefore

    - overrides `state_dict` and `prepare_load_state_dict`, `gather_optimizer_state` and `prepare_load_optimizer_state`,
      if what it saves is not what its parameters hold;
    - overrides `zero_grad`, `train`, `eval`, `generator_state_dict` and `load_generator_state_dict`, if it has to do
      more, and calls `super()` for its own tree;
    - wraps one module without care for that module's kind, since the base's methods ask the wrapped module.

    A collective in such a method runs on the ranks that have the strategy, in the order in which modules hold their
    parts, which is the same on all of them.
    """

    def train(self, mode: bool = True) -> Self:
        """Set this module and all submodules to training, or with False to evaluation; returns the module."""
        _set_training(self, mode)
        return self

    def eval(self) -> Self:
        """Set this module and all submodules to evaluation; returns the module."""
        _set_training(self, False)
        return self

    def zero_grad(self) -> None:
        """Set every parameter's gradient to None."""
        for _, item in members(self, ModuleState.zero_grad):
            if isinstance(item, Part):
                _state(item).zero_grad()
            elif isinstance(item, Parameter):
                item.zero_grad()

    def state_dict(self) -> dict[str, Array]:
        """Copy all parameters and buffers into a dict, by qualified name."""
        state: dict[str, Array] = {}
        for name, item in members(self, ModuleState.state_dict):
            if isinstance(item, Part):
                given = _state(item).state_dict()
                state |= {item.prefix + key: array for key, array in given.items() if key not in item.aliases}
            elif isinstance(item, Parameter | Buffer):
                state[name] = item.data.copy()
        return state

    def load_state_dict(self, state: Mapping[str, Array], *, strict: bool = True) -> StateDifference:
        """Copy the arrays of `state` into the parameters and buffers, in place.

        Args:
            state: from `state_dict`, or what `numpy.load` returns for a file of it.
            strict: False: let names pass that only the state or only the module has, for instance to load the layers
                that a pretrained model and this one have in common.

        Returns:
            The names that were missing and unexpected.

        Raises:
            UsageError: a name is missing or unexpected, or a shape or dtype differs; the first few of each are listed,
                and nothing was changed. Where a strategy shards the module, it is raised on every rank.
        """
        load = self.prepare_load_state_dict(state)
        return load.finish(f"load_state_dict: the state does not fit {type(self).__name__}", strict=strict)

    def prepare_load_state_dict(self, state: Mapping[str, Array]) -> StateLoad:
        """Check a state and plan its loading, for `load_state_dict` of this module or of one that contains it.

        A strategy with a `state_dict` of its own overrides this, and not `load_state_dict`.
        """
        load = StateLoad()
        own: set[str] = set()
        found: list[Part] = []
        methods = ModuleState.state_dict, ModuleState.load_state_dict, ModuleState.prepare_load_state_dict
        for name, item in members(self, *methods):
            if isinstance(item, Part):
                found.append(item)
            elif isinstance(item, Parameter | Buffer):
                load.expect(name, item, state)
                own.add(name)
        routed, load.unexpected = route((name for name in state if name not in own), found)
        for part, names in zip(found, routed, strict=True):
            given = {name: state[part.prefix + name] for name in names}
            given |= {inner: state[outer] for inner, outer in part.aliases.items() if outer in state}
            load.add(part.prefix, _prepared(_state(part), given))
        return load

    def full_optimizer_state_dict(self, optimizer: OptimizerWithState) -> dict[str, Array]:
        """Copy the state of an optimizer of this module's parameters, by parameter names.

        It fits the same model under any strategy and on any number of ranks. Where parameters are in pieces, all ranks
        call it.

        Returns:
            Arrays of the parameters' whole shapes by "<parameter name>.<name of state>", such as
            "layers.0.weight.momentum", and "lr" and the other settings. Parameters that have not been updated yet have
            no state.

        Raises:
            UsageError: the optimizer has a parameter that is not of this module.
        """
        self._check_owns_parameters(optimizer)
        return optimizer.settings_state() | self.gather_optimizer_state(optimizer)

    def load_full_optimizer_state_dict(self, optimizer: OptimizerWithState, state: Mapping[str, Array]) -> None:
        """Load a `full_optimizer_state_dict`; all ranks call it with the same arrays, and keep their pieces.

        Raises:
            UsageError: a name is missing or unexpected, or a shape or dtype differs, and nothing was changed. Where a
                strategy shards the module, it is raised on every rank.
        """
        self._check_owns_parameters(optimizer)
        # Keys of states begin with the names of parameters; all others are settings, which the optimizer checks.
        prefixes = tuple(f"{name}." for name, item in walk(self) if isinstance(item, Parameter))
        settings = {name: state[name] for name in state if not name.startswith(prefixes)}
        load = self.prepare_load_optimizer_state(
            optimizer, {name: state[name] for name in state if name not in settings}
        )
        what = f"load_full_optimizer_state_dict: the state does not fit {type(self).__name__}"
        load.finish_optimizer(what, optimizer, settings)

    def gather_optimizer_state(self, optimizer: OptimizerWithState) -> dict[str, Array]:
        """Copy an optimizer's state of this module's parameters, whole, without its settings.

        A strategy overrides this for `full_optimizer_state_dict`, also of a module that contains it. The optimizer may
        have other modules' parameters, too.
        """
        state: dict[str, Array] = {}
        for name, item in members(self, ModuleState.gather_optimizer_state):
            if isinstance(item, Part):
                for key, array in _state(item).gather_optimizer_state(optimizer).items():
                    if key.rpartition(".")[0] not in item.aliases:
                        state[item.prefix + key] = array
            elif isinstance(item, Parameter):
                state |= gather_optimizer_state(name, item, optimizer)
        return state

    def prepare_load_optimizer_state(self, optimizer: OptimizerWithState, state: Mapping[str, Array]) -> StateLoad:
        """Check a state from `gather_optimizer_state`, and cut this rank's pieces as the load's `optimizer_state`.

        A strategy overrides this for `load_full_optimizer_state_dict`, also of a module that contains it.
        """
        load = StateLoad()
        used: set[str] = set()
        found: list[Part] = []
        for name, item in members(self, ModuleState.gather_optimizer_state, ModuleState.prepare_load_optimizer_state):
            if isinstance(item, Part):
                found.append(item)
            elif isinstance(item, Parameter):
                used |= plan_optimizer_load(load, name, item, optimizer, state)
        routed, load.unexpected = route((name for name in state if name not in used), found)
        for part, names in zip(found, routed, strict=True):
            given = {name: state[part.prefix + name] for name in names}
            load.add(part.prefix, _state(part).prepare_load_optimizer_state(optimizer, given))
        return load

    def generator_state_dict(self) -> dict[str, GeneratorState]:
        """Copy the states of all random generators, such as those of Dropout, by qualified name.

        Together with `state_dict`, and the optimizer's and the sampler's, this is what a training goes on from, bit for
        bit. Ranks have different generators, so each saves its own. A state consists of dicts, strings and integers,
        which `json.dumps` takes.
        """
        state: dict[str, GeneratorState] = {}
        for name, item in members(self, ModuleState.generator_state_dict):
            if isinstance(item, Part):
                state |= {item.prefix + key: each for key, each in _state(item).generator_state_dict().items()}
            elif isinstance(item, np.random.Generator):
                state[name] = item.bit_generator.state
        return state

    def load_generator_state_dict(self, state: Mapping[str, GeneratorState]) -> None:
        """Set the states of all random generators.

        Raises:
            UsageError: a name is missing or unexpected, or a generator is of another kind. Nothing was changed, except
                in submodules with a method of their own that come before the one that is named.
        """
        own: dict[str, np.random.Generator] = {}
        found: list[Part] = []
        for name, item in members(self, ModuleState.generator_state_dict, ModuleState.load_generator_state_dict):
            if isinstance(item, Part):
                found.append(item)
            elif isinstance(item, np.random.Generator):
                own[name] = item
        routed, unexpected = route((name for name in state if name not in own), found)
        faults = [f"missing {name!r}" for name in own if name not in state]
        faults += [f"unexpected {name!r}" for name in unexpected]
        for name in own.keys() & state.keys():
            here, there = own[name].bit_generator.state["bit_generator"], state[name].get("bit_generator")
            if here != there:
                faults.append(f"{name!r} is a {here}, given a {there}")
        if faults:
            raise UsageError(
                f"load_generator_state_dict: the state does not fit {type(self).__name__}: "
                f"{'; '.join(first_few(faults))}. Nothing was loaded."
            )
        for part, names in zip(found, routed, strict=True):
            _state(part).load_generator_state_dict({name: state[part.prefix + name] for name in names})
        for name, generator in own.items():
            generator.bit_generator.state = state[name]

    def _check_owns_parameters(self, optimizer: OptimizerWithState) -> None:
        own = {id(item) for _, item in walk(self) if isinstance(item, Parameter)}
        for parameter in optimizer.parameters:
            # A pipeline's rank that has nothing to train gives its optimizer an empty parameter.
            stands_for_none = parameter.stages is not None and parameter.data.size == 0
            if id(parameter) not in own and not stands_for_none:
                raise UsageError(
                    f"{type(self).__name__}: the optimizer's parameter {parameter.name!r} is none of this module. "
                    "Give an optimizer of model.parameters()."
                )


def _set_training(module: ModuleState, training: bool) -> None:
    for _, item in members(module, ModuleState.train, ModuleState.eval):
        if isinstance(item, Part):
            _ = _state(item).train() if training else _state(item).eval()
        elif isinstance(item, ModuleBase):
            item.training = training


def _prepared(module: ModuleState, state: Mapping[str, Array]) -> StateLoad:
    """Prepare a load by the module's own method; a class with `load_state_dict` alone checks while it loads."""
    kind = type(module)
    whole = kind.load_state_dict is ModuleState.load_state_dict
    if whole or kind.prepare_load_state_dict is not ModuleState.prepare_load_state_dict:
        return module.prepare_load_state_dict(state)
    load = StateLoad()
    load.loads.append(lambda: module.load_state_dict(state) and None)
    return load


def _state(part: Part) -> ModuleState:
    return cast(ModuleState, part.module)
