"""StateDictMixin: the state dicts of an FSDP module and of its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ferro import UsageError

from ..nn.arrays import Array
from ..nn.checkpoint_piece import CheckpointPiece
from ..nn.module import Module, TreeSnapshot
from ..nn.state import OptimizerWithState, StateLoad, array_fault
from ..optim.state import ParameterState
from . import optimizer_state
from .buffer_pool import copy_into
from .checks import check_tree
from .config import FSDPConfig
from .sharded_parameter import FlatShard, ShardedParameter, array_faults
from .unit_scheduler import UnitScheduler


class StateDictMixin(Module):
    """The part of `FSDP` that saves and loads.

    Full state dicts fit any number of ranks, and programs without FSDP; sharded state dicts fit the same number of
    ranks. Parameters are gathered one at a time.
    """

    module: Module
    _tree: TreeSnapshot
    _sharded: Mapping[str, ShardedParameter]
    _scheduler: UnitScheduler
    _config: FSDPConfig

    def full_state_dict(self, *, rank0_only: bool = False) -> dict[str, Array]:
        """Gather all parameters, one at a time, and rank 0's buffers; all ranks call it.

        Args:
            rank0_only: return an empty dict on the other ranks, which saves their memory.

        Returns:
            The same as `state_dict()` of the module without FSDP.
        """
        self._check_between_passes("full_state_dict")
        config = self._config
        state: dict[str, Array] = {}
        for name, sharded in self._sharded.items():
            whole = sharded.gather(sharded.shard_view, config, rank0_only=rank0_only)
            if whole is not None:
                state[name] = whole
        if rank0_only and not config.is_first:
            return state
        buffers = self._copied_buffers()
        if not rank0_only:
            config.broadcast(buffers.values(), [0] * len(config.groups))
        return state | buffers

    def load_full_state_dict(self, state_dict: Mapping[str, Array]) -> None:
        """Load unsharded arrays; all ranks call it with the same arrays, and keep their shards.

        Raises:
            UsageError: a name is missing or unexpected, or a shape or dtype differs, on any
                rank; raised on every rank, and nothing was changed.
        """
        self.prepare_load_state_dict(state_dict).finish("FSDP.load_full_state_dict: the state does not fit")

    def prepare_load_state_dict(self, state: Mapping[str, Array]) -> StateLoad:
        """Check a full state and plan the loading of this rank's shards, also for a module that contains this one."""
        self._check_between_passes("load_full_state_dict")
        load = StateLoad(groups=list(self._config.groups))
        for name, sharded in self._sharded.items():
            if name not in state:
                load.missing.append(name)
            elif fault := array_fault(name, sharded.shard_view.dtype, sharded.span.shape, state[name]):
                load.faults.append(fault)
            else:
                load.loads.append(partial(self._load_part, sharded, name, state))
        buffers = dict(self.named_buffers())
        for name, buffer in buffers.items():
            load.expect(name, buffer, state)
        load.unexpected = [name for name in state if name not in self._sharded and name not in buffers]
        return load

    def _load_part(self, sharded: ShardedParameter, name: str, state: Mapping[str, Array]) -> None:
        copy_into(sharded.shard_view, sharded.local_part(state[name], self._config))

    def sharded_state_dict(self) -> dict[str, FlatShard | Array]:
        """Copy this rank's shards, and the buffers, which are not sharded. Nothing is sent."""
        self._check_unchanged()
        shards: dict[str, FlatShard | Array] = {
            name: sharded.flat_shard(sharded.shard_view, self._config) for name, sharded in self._sharded.items()
        }
        return shards | self._copied_buffers()

    def load_sharded_state_dict(self, state_dict: Mapping[str, FlatShard | Array]) -> None:
        """Load a `sharded_state_dict` that was made on the same number of ranks; all ranks call it.

        Raises:
            UsageError: as from `load_full_state_dict`.
        """
        self._check_between_passes("load_sharded_state_dict")
        buffers = dict(self.named_buffers())
        faults = _name_faults({*self._sharded, *buffers}, state_dict)
        loads: list[tuple[Array, Array]] = []
        for name, item in state_dict.items():
            if name in self._sharded:
                sharded = self._sharded[name]
                target = sharded.shard_view
                found = sharded.shard_faults(name, target.dtype, item, self._config)
                faults += found
                if isinstance(item, FlatShard) and not found:
                    loads.append((target, item.data.reshape(target.shape)))
            elif name in buffers:
                data = buffers[name].data
                if isinstance(item, FlatShard):
                    faults.append(f"{name!r} is a buffer, given a FlatShard")
                else:
                    faults += array_faults(name, data.dtype, data.shape, item)
                    loads.append((data, item))
        self._load(loads, faults, "load_sharded_state_dict")

    def state_dict(self) -> dict[str, Array]:
        """Gather a `full_state_dict()`, which fits the module with and without FSDP."""
        return self.full_state_dict()

    def checkpoint_arrays(self) -> Mapping[str, CheckpointPiece]:
        """Describe this rank's shards, in the dtype in which the optimizer changes them, and the buffers."""
        self._check_between_passes("checkpoint_arrays")
        if any(unit.has_unsharded_grad for unit in self._scheduler.units):
            raise UsageError(
                "FSDP.checkpoint_arrays: there are gradients that no_sync() has accumulated, which a checkpoint does "
                "not hold. Save and load after the step that uses them, or drop them by model.zero_grad() before."
            )
        return super().checkpoint_arrays()

    def full_optimizer_state_dict(self, optimizer: OptimizerWithState, *, rank0_only: bool = False) -> dict[str, Array]:
        """Gather the state of an optimizer of this module's parameters; all ranks call it.

        Args:
            optimizer: an optimizer of parameters of this module alone.
            rank0_only: return an empty dict on the other ranks, which saves their memory.

        Returns:
            Arrays of the parameters' whole shapes by "<parameter name>.<name of state>", and "lr". Parameters that have
            not been updated yet have no state.
        """
        self._check_between_passes("full_optimizer_state_dict")
        self._check_owns_parameters(optimizer)
        state = optimizer_state.gather(self._sharded, optimizer, self._config, rank0_only=rank0_only)
        return optimizer.settings_state() | state if self._config.is_first or not rank0_only else {}

    def gather_optimizer_state(self, optimizer: OptimizerWithState) -> dict[str, Array]:
        """Gather the state of this module's parameters, also for a module that contains this one."""
        self._check_between_passes("full_optimizer_state_dict")
        return optimizer_state.gather(self._sharded, optimizer, self._config, rank0_only=False)

    def prepare_load_optimizer_state(self, optimizer: OptimizerWithState, state: Mapping[str, Array]) -> StateLoad:
        """Check a state and cut this rank's parts, also for a module that contains this one."""
        self._check_between_passes("load_full_optimizer_state_dict")
        return optimizer_state.plan_load(self._sharded, optimizer, self._config, state)

    def sharded_optimizer_state_dict(self, optimizer: ParameterState) -> dict[str, FlatShard | Array]:
        """Copy this rank's state of an optimizer. Nothing is sent."""
        return optimizer_state.shards(self._sharded, optimizer, self._config)

    def load_sharded_optimizer_state_dict(
        self, optimizer: ParameterState, state_dict: Mapping[str, FlatShard | Array]
    ) -> None:
        """Load a `sharded_optimizer_state_dict` made on the same number of ranks; all ranks call it.

        Raises:
            UsageError: as from `load_full_state_dict`.
        """
        self._check_between_passes("load_sharded_optimizer_state_dict")
        optimizer_state.load_shards(self._sharded, optimizer, self._config, state_dict)

    def _copied_buffers(self) -> dict[str, Array]:
        return {name: buffer.data.copy() for name, buffer in self.named_buffers()}

    def _load(self, loads: list[tuple[Array, Array]], faults: list[str], what: str) -> None:
        """Load on all ranks, or on none."""
        self._config.raise_on_any_fault(faults, f"FSDP.{what}: the state does not fit")
        for target, source in loads:
            copy_into(target, source)

    def _check_tree(self) -> None:
        """Refuse parameters that were added or replaced since the module was wrapped; cheap while nothing changes."""
        if not self._tree.is_current():
            check_tree(self.module, self._sharded)
            self._tree = TreeSnapshot(self.module)

    def _check_unchanged(self) -> None:
        """Refuse to save or load after parameters or their arrays were replaced."""
        self._check_tree()
        for flat in {id(item.flat): item.flat for item in self._sharded.values()}.values():
            flat.check_values()

    def _check_between_passes(self, what: str) -> None:
        if self._scheduler.announcer is not None or self._scheduler.in_pass:
            raise UsageError(
                f"FSDP.{what}: not inside join() or a pass, where the other ranks would not take "
                "part. Call it between steps, on every rank."
            )
        self._check_unchanged()


def _name_faults(own: set[str], given: Mapping[str, object]) -> list[str]:
    missing = [f"missing {name!r}" for name in sorted(own - given.keys())]
    return missing + [f"unexpected {name!r}" for name in given if name not in own]
