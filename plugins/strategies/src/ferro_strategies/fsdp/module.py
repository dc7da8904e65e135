"""FSDP: a module whose parameters are sharded over the ranks and gathered unit by unit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import ClassVar, NoReturn

import numpy as np

from ferro import ProcessGroup, UsageError

from ..generators import separate_generators
from ..nn.checks import check_gradient
from ..nn.module import Module, Pullback, TreeSnapshot, replace_modules
from ..nn.trees import Arrays, map_leaves, quiet_overflow_in, shapes_of
from ..optim import LossScaler, Optimizer
from ..optim.clip import check_norm_arguments, clip_grad_norm
from ..replicas import check_wrappable
from . import optimizer_state
from .checks import check_same_everywhere, check_trained, check_unsharded
from .config import MixedPrecision, ShardingStrategy, make_config
from .flat_parameter_group import shard_module
from .join import FSDPJoin
from .sharded_parameter import sharded_parameters
from .state_dicts import StateDictMixin
from .unit_hooks import Unit, UnitHooks, copy_error
from .unit_policy import UnitPolicy, choose_units
from .unit_scheduler import UnitScheduler


class FSDP(StateDictMixin):
    """A sharded module, trained on each rank's part of every batch.

    Each rank owns one shard of the parameters, of the gradients and of the optimizer's state (see `ShardingStrategy`
    for variants and memory). In the forward and in the backward pass each unit's parameters are gathered while the unit
    before computes, and then freed; gradients are reduced while the next unit computes. When a pullback returns, every
    `parameter.grad` is this rank's shard of the mean over the ranks, and `optimizer.step()` updates this rank's shard.

    The parameters stay the same objects, so an optimizer may be made before or after wrapping. Outside a pass, `data`
    and `grad` are flat shards, perhaps empty. Layers that are units are replaced by wrappers in the given module; names
    stay.

    All ranks run the same passes in the same order, also `model(x)`, which gathers. If a pass uses a unit but not all
    of its parameters, the others get zeros as gradients; if no rank uses the unit, `grad` stays None.

    Accumulation. Each pullback of a forward pass outside `no_sync` reduces the gradients, and adds to the shard in
    `grad`. With `no_sync` for all but the last microbatch there is one reduction instead of several, and each unit's
    unsharded gradient stays until then. Several pullbacks may be in flight.

    Buffers are not sharded. All ranks start with rank 0's buffers, each rank updates its own from
    its own batches, and rank 0's are saved.

    Args:
        module: the model; parameters and buffers get rank 0's values. Gradients in it are lost.
        group: the ranks over which it is sharded.
        sharding: see `ShardingStrategy`.
        units: the submodules that are gathered one by one: a function (name, module) -> bool, or the modules, which may
            nest. None: elements of lists (layers of a `Sequential`), see `choose_units`. Parameters in no unit stay
            gathered for the whole pass.
        mixed_precision: dtypes of the computation and of messages.
        replicas: for HYBRID_SHARD, the ranks that have the same shard: `group` and `replicas`
            are rows and columns of a mesh.
        prefetch: gather a unit while the one before it computes.
        offload: keep shards in host memory, and run the optimizer there. This is for CuPy arrays; it changes nothing
            for NumPy arrays.
        check_replicas: notice in each backward pass if optimizers have stepped with other learning rates on some ranks,
            or not at all; and, with HYBRID_SHARD and NO_SHARD, if ranks that hold the same shards no longer hold the
            same values, and name the parameters; see `DDP`.

    Attributes:
        module: the wrapped module.

    Raises:
        UsageError: ranks gave different models or options (on every rank, with the first
            difference), the model is sharded already, or arguments do not fit each other.
            Nothing was changed.

    Source: Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", 2023. Here, unlike there,
        the original parameter objects hold the shards, and ranks may run out of batches.
    """

    transparent = True
    averages_gradients: ClassVar[bool] = True

    def __init__(
        self,
        module: Module,
        group: ProcessGroup,
        *,
        sharding: ShardingStrategy = ShardingStrategy.FULL_SHARD,
        units: UnitPolicy | Iterable[Module] | None = None,
        mixed_precision: MixedPrecision | None = None,
        replicas: ProcessGroup | None = None,
        prefetch: bool = True,
        offload: bool = False,
        check_replicas: bool = True,
    ) -> None:
        check_wrappable("FSDP", module, group)
        config = make_config(
            group,
            sharding=sharding,
            replicas=replicas,
            precision=mixed_precision,
            prefetch=prefetch,
            offload=offload,
            check_replicas=check_replicas,
        )
        check_unsharded(module)
        chosen = choose_units(module, units)
        optimizer_state.check_states(module)
        check_same_everywhere(module, config, [name for name, m in module.named_modules() if id(m) in chosen])
        self.module = module
        self.training = module.training
        self._config = config
        groups = shard_module(module, chosen, config)
        self._sharded = sharded_parameters(module, groups.values())
        optimizer_state.shard_states(self._sharded, config)
        self._scheduler = UnitScheduler(list(groups.values()), config)
        self._join: FSDPJoin | None = None
        hooks = {key: UnitHooks(unit, self._scheduler) for key, unit in groups.items()}
        self._hooks = hooks.pop(id(module))
        replace_modules(module, lambda _, item: Unit(item, hooks[id(item)]) if id(item) in hooks else item)
        config.broadcast((buffer.data for buffer in self.buffers()), [0] * len(config.groups))
        for each in config.groups:
            separate_generators(module, each)
        self._join_groups = [_duplicate(group) for group in config.groups]
        self._tree = TreeSnapshot(module)
        guard = self._check_step
        for sharded in self._sharded.values():
            sharded.parameter.step_guards["data parallel"] = guard

    def vjp(self, x: Arrays) -> tuple[Arrays, Pullback]:
        """Compute the wrapped module's output and pullback.

        Raises:
            UsageError: an earlier backward pass failed; a parameter that was frozen when the module was wrapped
                requires a gradient; or parameters were added or replaced since.
        """
        self._check_tree()
        check_trained(self._sharded)
        precision = self._config.precision
        y, pull = self._hooks.vjp(self.module, map_leaves(precision.cast_input, x))
        inner, outer, shape = map_leaves(_dtype_of, y), map_leaves(_dtype_of, x), shapes_of(y)

        def pullback(grad_y: Arrays) -> Arrays | None:
            check_gradient(self, grad_y, shape)
            grad_y = _cast(grad_y, inner)
            with quiet_overflow_in(grad_y):
                grad_x = pull(grad_y)
            return None if grad_x is None else _cast(grad_x, outer)

        return map_leaves(precision.cast_output, y), pullback

    def __call__(self, x: Arrays) -> Arrays:
        """Compute the output alone. All ranks call it, because it gathers."""
        self._check_tree()
        precision = self._config.precision
        return map_leaves(precision.cast_output, self._hooks.call(self.module, map_leaves(precision.cast_input, x)))

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate unsharded gradients: passes whose forward pass runs inside do not reduce.

        with model.no_sync():
            for x, labels in microbatches[:-1]: ...     # vjp and pullback
        ...                                             # the last one reduces the sum of all

        Until the accumulated gradients are reduced, `grad` does not include them, and an optimizer refuses to step;
        `zero_grad` clears them. Products can be deferred (`nn.deferring`) only in such passes.
        """
        before, self._scheduler.sync = self._scheduler.sync, False
        try:
            yield
        finally:
            self._scheduler.sync = before

    def sync_gradients(self) -> None:
        """Reduce the gradients accumulated under `no_sync`. All ranks call it.

        A pipeline, for example, runs all passes in `no_sync` and then calls this.
        """
        self._scheduler.check()
        self._scheduler.reduce_all()

    @property
    def averaging_groups(self) -> tuple[ProcessGroup, ...]:
        """The groups over which gradients are averaged: that of the shards, that of the replicas, or both."""
        return tuple(self._config.groups)

    def scale_unreduced_gradients(self, factor: float) -> None:
        """Multiply the gradients accumulated under `no_sync`, which are not in `grad` yet."""
        for unit in self._scheduler.units:
            for flat in unit.trained:
                flat.unsharded_grad.scale(factor)

    def zero_grad(self) -> None:
        """Mark every parameter's gradient absent, including gradients accumulated by `no_sync`."""
        super().zero_grad()
        for sharded in self._sharded.values():
            sharded.flat.unsharded_grad.clear()

    def clip_grad_norm(self, max_norm: float, norm_type: float = 2.0) -> float:
        """Scale all gradients so that their global norm is at most `max_norm`.

        It does the same as `optim.clip_grad_norm`, and also works inside `join`. All ranks call
        it, after the pullback.

        Args:
            max_norm: largest norm allowed.
            norm_type: 2 for the Euclidean norm, any other positive number, or infinity; see `optim.grad_norm`.

        Returns:
            The norm of the whole model's gradient before scaling, the same on all ranks.

        Raises:
            UsageError: `max_norm` or `norm_type` is not positive.
        """
        check_norm_arguments(max_norm, norm_type)
        if self._join is not None:
            self._join.announce_clip(max_norm, norm_type)
        return clip_grad_norm(self.parameters(), max_norm, norm_type)

    @contextmanager
    def join(
        self, *optimizers: Optimizer, scaler: LossScaler | None = None, divide_by_initial_world_size: bool = False
    ) -> Iterator[None]:
        """Let ranks have different numbers of batches, also none.

        with model.join(optimizer):
            for x, labels in my_batches: ...            # vjp, pullback, step, zero_grad

        A rank that reaches the end of the block goes on sending and updating its shards until all ranks have. Gradients
        are means over the ranks that still have batches. Afterwards all ranks have the buffers of one of the last
        ranks. Inside the block, clip by `model.clip_grad_norm`; other collectives, state dicts and changes of gradients
        are not allowed, because ranks at its end would not take part.

        Args:
            optimizers: all optimizers that step inside the block; of their settings only `lr` may change there.
            scaler: the loss scaler that steps them, if any.
            divide_by_initial_world_size: divide sums of gradients by the number of all ranks
                throughout, so that every batch has the same weight.

        Raises:
            UsageError: no optimizer is given in training; ranks are at different steps (raised
                on every rank); or this rank leaves with gradients that `no_sync` has accumulated.
        """
        if self._join is not None:
            raise UsageError("FSDP.join: this model is inside join() already.")
        if self.training and not optimizers:
            raise UsageError(
                "FSDP.join: no optimizer is given. A rank that has no more batches must go on "
                "updating its pieces of the parameters: model.join(optimizer). (To evaluate "
                "only, call model.eval() before.)"
            )
        join = FSDPJoin(
            self._scheduler,
            list(self.parameters()),
            self._join_groups,
            optimizers,
            self.clip_grad_norm,
            scaler=scaler,
            divide_by_all=divide_by_initial_world_size,
        )
        self._join = self._scheduler.announcer = join
        with ExitStack() as stack:
            stack.callback(self._leave_join)
            for index, optimizer in enumerate(optimizers):
                stack.callback(optimizer.before_step(partial(join.announce_step, index)))
            if scaler is not None:
                stack.enter_context(scaler.notifying(join))
            yield
            self._scheduler.check()
            join.finish(self._config, (buffer.data for buffer in self.buffers()))

    def _check_step(self, lr: float) -> None:
        """Refuse a step without the gradients that `no_sync` has accumulated; with learning rate 0 nothing changes."""
        if lr == 0:
            return
        self._scheduler.check()
        if any(unit.has_unsharded_grad for unit in self._scheduler.units):
            raise UsageError(
                "FSDP: the optimizer is about to step without gradients that no_sync() has accumulated on this rank, "
                "and that nothing has reduced. Make the last forward pass of a step outside no_sync(), or call "
                "model.sync_gradients() before the step, on all ranks; model.zero_grad() drops them. Nothing was "
                "updated."
            )
        self._scheduler.note_step(lr)

    def _leave_join(self) -> None:
        self._join = self._scheduler.announcer = None

    def __deepcopy__(self, memo: dict[int, object]) -> NoReturn:
        """Refuse, because shards belong to a group of ranks."""
        raise copy_error()

    def __repr__(self) -> str:
        return f"FSDP({self.module!r}, {self._config.sharding})"


def _dtype_of(leaf: Arrays) -> np.dtype | None:
    return getattr(leaf, "dtype", None)


def _cast(tree: Arrays, dtypes: Arrays) -> Arrays:
    """Convert each leaf to the dtype at the same place in `dtypes`."""
    if isinstance(dtypes, np.dtype):
        return tree.astype(dtypes, copy=False)
    return map_leaves(lambda leaf, dtype: leaf if dtype is None else leaf.astype(dtype, copy=False), tree, dtypes)


def _duplicate(group: ProcessGroup) -> ProcessGroup:
    """Make another group of the same ranks, whose operations are not ordered with the first group's."""
    duplicate = group.split(0)
    assert duplicate is not None
    return duplicate
