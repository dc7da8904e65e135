"""FSDP: a module of which every rank has a piece, whole only where it is being computed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NoReturn

from ferro import ProcessGroup, UsageError

from ..nn.arrays import Array, quiet_overflow
from ..nn.module import Module, Pullback, replace_modules
from ..optim import LossScaler, Optimizer
from ..optim.clip import check_max_norm, scale_grads, squared_norm
from .checks import check_replicas, check_trained, check_wrappable
from .cutting import cut
from .joining import Joining
from .passes import Passes
from .plan import make_plan
from .precision import MixedPrecision
from .sharded import ShardedState
from .sharding import ShardingStrategy
from .state import entries_of
from .unit import Pacer, Unit, no_copy
from .units import UnitPolicy, choose_units


class FSDP(ShardedState):
    """A module of which every rank has a piece, trained on each rank's part of every batch.

    Parameters are cut into one piece per rank, and so are gradients and the optimizer's state
    (see `ShardingStrategy` for what exactly, and how much memory it takes). For each half of a
    pass the parameters of one unit are gathered, while the unit before computes, and freed again;
    gradients are reduced while the next unit computes. When a pullback returns, every
    `parameter.grad` is this rank's piece of the mean over the ranks, and `optimizer.step()`
    changes this rank's piece.

    The parameters are the objects that they were, so an optimizer may be made before or after.
    Outside a pass, `data` and `grad` are flat pieces, perhaps empty. Layers that are units are
    wrapped, in place, in the module given; names stay.

    All ranks make the same passes in the same order, also `model(x)`, which gathers. A parameter
    that a pass leaves out in a unit that it uses gets zeros; if the whole unit is left out, on
    all ranks, `grad` stays None.

    Accumulation. Each pullback whose forward half was outside `no_sync` reduces, and adds to the
    piece in `grad`. With `no_sync` for all but the last microbatch there is one reduction instead
    of several, and each unit's whole gradient stays until then. Several may be in flight.

    Buffers are not cut: they are rank 0's at first, each rank's move on by its own batches, and
    rank 0's are the ones to save.

    Args:
        module: the model; parameters and buffers get rank 0's values. Gradients in it are lost.
        group: the ranks that share it.
        sharding: what is cut, see `ShardingStrategy`.
        units: submodules that are gathered by themselves, which may nest: a function
            (name, module) -> bool, or the modules. None: elements of lists (layers of a
            `Sequential`), see `choose_units`. What is in no unit is gathered for the whole pass.
        mixed_precision: types of the computation and of what is sent.
        replicas: for HYBRID_SHARD, the ranks that have the same piece: `group` and `replicas`
            are rows and columns of a mesh.
        prefetch: gather a unit while the one before it computes.
        offload: keep pieces in host memory, where the optimizer then works. It is for CuPy;
            NumPy's arrays are there already, and nothing changes.

    Attributes:
        module: the wrapped module.

    Raises:
        UsageError: ranks gave different models or options (on every rank, with the first
            difference), the model is in pieces already, or arguments do not fit each other.
            Nothing was changed.

    Source: Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel",
    2023; but pieces are held by the parameters themselves, and ranks may run out of batches.
    """

    transparent = True

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
    ) -> None:
        plan = make_plan(
            group,
            sharding=sharding,
            replicas=replicas,
            precision=mixed_precision,
            prefetch=prefetch,
            offload=offload,
        )
        check_wrappable(module)
        chosen = choose_units(module, units)
        check_replicas(
            module, plan, [name for name, m in module.named_modules() if id(m) in chosen]
        )
        self.module = module
        self.training = module.training
        self._plan = plan
        shards = cut(module, chosen, plan)
        self._entries = entries_of(module, shards.values())
        self._passes = Passes(list(shards.values()), plan)
        self._pacer = Pacer(shards[id(module)], self._passes)
        pacers = {key: Pacer(item, self._passes) for key, item in shards.items()}
        del pacers[id(module)]
        replace_modules(
            module, lambda _, item: Unit(item, pacers[id(item)]) if id(item) in pacers else item
        )
        plan.broadcast((buffer.data for buffer in self.buffers()), [0] * len(plan.groups))
        self._roll_groups = [_twin(group) for group in plan.groups]

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Compute the wrapped module's output and pullback; see the class.

        Raises:
            UsageError: an earlier backward pass failed, or a parameter that was frozen when the
                module was wrapped requires a gradient.
        """
        check_trained(self._entries)
        precision = self._plan.precision
        y, pull = self._pacer.vjp(self.module, precision.cast_input(x))
        inner, outer = y.dtype, x.dtype

        def pullback(grad_y: Array) -> Array | None:
            with quiet_overflow(inner):
                grad_x = pull(grad_y.astype(inner, copy=False))
            return None if grad_x is None else grad_x.astype(outer, copy=False)

        return precision.cast_output(y), pullback

    def __call__(self, x: Array) -> Array:
        """Compute the output alone. All ranks call it, for they gather."""
        precision = self._plan.precision
        return precision.cast_output(self._pacer.call(self.module, precision.cast_input(x)))

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate whole gradients here: passes that go forward inside do not reduce.

        with model.no_sync():
            for x, labels in microbatches[:-1]: ...     # vjp and pullback
        ...                                             # the last one reduces the sum of all

        Until they are reduced, `grad` does not show them; only the model's own `zero_grad`
        forgets them. Their products may be put off (`nn.deferring`), which others' may not.
        """
        before, self._passes.sync = self._passes.sync, False
        try:
            yield
        finally:
            self._passes.sync = before

    def sync_gradients(self) -> None:
        """Reduce what has been accumulated under `no_sync`, now.

        For whoever runs all passes under `no_sync`, as a pipeline does. All ranks call it.
        """
        self._passes.check()
        self._passes.reduce_all()

    def zero_grad(self) -> None:
        """Mark every parameter's gradient absent, also what `no_sync` has accumulated."""
        super().zero_grad()
        for entry in self._entries.values():
            entry.flat.whole_grad.drop()

    def clip_grad_norm(self, max_norm: float) -> float:
        """Scale all gradients so that together they are no longer than `max_norm`.

        As `optim.clip_grad_norm`, also inside `join`. All ranks call it, after the pullback.

        Returns:
            The norm before, of the whole model's gradient, the same on all ranks.

        Raises:
            UsageError: `max_norm` is not positive.
        """
        check_max_norm(max_norm)
        if self._passes.joining is not None:
            self._passes.joining.tell_clip(max_norm)
        held = list(self.parameters())
        norm = math.sqrt(squared_norm(held))
        scale_grads(held, max_norm, norm)
        return norm

    @contextmanager
    def join(
        self,
        *optimizers: Optimizer,
        scaler: LossScaler | None = None,
        divide_by_initial_world_size: bool = False,
    ) -> Iterator[None]:
        """Let ranks have different numbers of batches, also none.

        with model.join(optimizer):
            for x, labels in my_batches: ...            # vjp, pullback, step, zero_grad

        A rank that leaves the block goes on giving its pieces, and updates them as the others
        do, until all have left. Gradients are means over the ranks that contributed. Afterwards
        buffers are those of a rank that was last. Inside, clip by `model.clip_grad_norm`; other
        collectives, also state dicts, and changes to gradients do not belong there: ranks that
        have left would not take part.

        Args:
            optimizers: that step inside the block; of their settings, `lr` may change there.
            scaler: by which they step, if by one.
            divide_by_initial_world_size: divide sums of gradients by the number of all ranks
                throughout, so that every batch has the same weight.

        Raises:
            UsageError: no optimizer is given in training; ranks are at different steps (raised
                on every rank); or this rank leaves with gradients that `no_sync` has accumulated.
        """
        if self._passes.joining is not None:
            raise UsageError("FSDP.join: this model is inside join() already.")
        if self.training and not optimizers:
            raise UsageError(
                "FSDP.join: no optimizer is given. A rank that has no more batches must go on "
                "updating its pieces of the parameters: model.join(optimizer). (To evaluate "
                "only, call model.eval() before.)"
            )
        joining = Joining(
            self._passes,
            list(self.parameters()),
            self._roll_groups,
            optimizers,
            self.clip_grad_norm,
            scaler=scaler,
            divide_by_all=divide_by_initial_world_size,
        )
        self._passes.joining = joining
        with ExitStack() as stack:
            stack.callback(setattr, self._passes, "joining", None)
            for index, optimizer in enumerate(optimizers):
                stack.callback(optimizer.before_step(partial(joining.tell_step, index)))
            if scaler is not None:
                stack.enter_context(scaler.notifying(joining))
            yield
            self._passes.check()
            joining.finish(self._plan, (buffer.data for buffer in self.buffers()))

    def __deepcopy__(self, memo: dict[int, object]) -> NoReturn:
        """Refuse: see the message."""
        raise no_copy()

    def __repr__(self) -> str:
        return f"FSDP({self.module!r}, {self._plan.sharding})"


def _twin(group: ProcessGroup) -> ProcessGroup:
    """Return a group of the same ranks, with an order of operations of its own."""
    twin = group.split(0)
    assert twin is not None
    return twin
