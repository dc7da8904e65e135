"""DDP: replicas of a module, whose gradients are averaged while the backward pass runs."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import ClassVar, Self

import numpy as np

from ferro import ProcessGroup, UsageError

from ..generators import separate_generators
from ..nn.checks import check_gradient
from ..nn.module import Module, Pullback, TreeSnapshot
from ..nn.parameter import Parameter
from ..nn.state_owner import SavesState
from ..nn.trees import Arrays, quiet_overflow_in, shapes_of
from ..replicas import broadcast_arrays, check_same, check_wrappable, copy_states
from ..uneven_inputs import JOINED, UnevenInputs
from .bucket import Hook
from .pending_backwards import PendingBackward, PendingBackwards
from .reducer import Reducer
from .wrapped_state import WrappedState


class _JoinStep(enum.IntEnum):
    """The steps in which ranks communicate, as they announce them inside `join`."""

    BUFFERS = 1
    BACKWARD = 2


class DDP(Module):
    """A module of which every rank has a replica, which it trains on its own part of each batch.

    When a pullback returns, every parameter's `grad` is the mean of the ranks' gradients. It has
    the same bits on every rank, and so have the parameters after an optimizer's step. The mean is
    the gradient of the whole batch where all parts have one size and the loss is a mean.

    Gradients live in buckets of memory from `group.empty`: a parameter's `grad` is a view, and
    there is no second copy. Each bucket is reduced as soon as its gradients are complete.

    Accumulation. Each pullback outside `no_sync` averages the gradients accumulated since `zero_grad()`. Without
    `zero_grad()` between two pullbacks, the second adds its gradients to the first one's mean, so `grad` becomes the
    sum of both means. With `no_sync` for all but the last microbatch there is one reduction instead of several. When
    several microbatches are in flight, only the last pullback reduces.

    All ranks run the same passes in the same order. `model(x)` computes the output alone and communicates nothing, so a
    single rank may call it.

    Names in `named_parameters`, `state_dict` and so on are those of the wrapped module, so a state dict fits the module
    with and without DDP.

    Parameters and buffers are looked up when the module is wrapped, and again when its tree of modules has changed. A
    parameter that is added later and requires a gradient is refused by the next forward pass. A module without trained
    parameters, such as a frozen stage of a pipeline, has nothing to average: passes communicate nothing but buffers.

    Args:
        module: the model; parameters and buffers get rank 0's values.
        group: the replicas.
        bucket_bytes: largest size of a bucket.
        first_bucket_bytes: largest size of the first bucket, which is sent first.
        hook: averages a bucket, see `ferro_strategies.hooks`; None for an exact mean.
        broadcast_buffers: give rank 0's buffers to all ranks before each forward pass in training
            outside `no_sync`. Each rank's pass then updates its buffers from its own batch, so
            save those of rank 0.
        find_unused: allow forward passes that do not use all parameters. If only some ranks use a parameter, the
            gradients of the others count as zero in the mean; if no rank uses it, `grad` stays None. It costs one more
            small reduction. Modules must announce their uses (`Parameter.use`).
        check_replicas: notice in each reduction if the parameters are no longer equal on all ranks, and name those that
            differ. A checksum of them travels with the gradients; of models larger than 1 MiB it covers another part
            each time, and a sample of the rest. CuPy arrays are not checked.

    Attributes:
        module: the wrapped module.

    Raises:
        UsageError: ranks gave different models or options (on every rank, with the first
            difference), or a part of the module is wrapped already. Nothing was changed.
    """

    transparent = True
    averages_gradients: ClassVar[bool] = True

    def __init__(
        self,
        module: Module,
        group: ProcessGroup,
        *,
        bucket_bytes: int = 25 * 2**20,
        first_bucket_bytes: int = 2**20,
        hook: Hook | None = None,
        broadcast_buffers: bool = True,
        find_unused: bool = False,
        check_replicas: bool = True,
    ) -> None:
        check_wrappable("DDP", module, group)
        if min(bucket_bytes, first_bucket_bytes) < 1:
            raise UsageError(
                "DDP: bucket_bytes and first_bucket_bytes must be at least 1, "
                f"not {bucket_bytes} and {first_bucket_bytes}."
            )
        options = {
            "bucket_bytes": bucket_bytes,
            "first_bucket_bytes": first_bucket_bytes,
            "hook": getattr(hook, "__qualname__", type(hook).__qualname__),
            "broadcast_buffers": broadcast_buffers,
            "find_unused": find_unused,
            "check_replicas": check_replicas,
        }
        check_same("DDP", module, group, options)
        named = dict(module.named_parameters())
        trained = {name: item for name, item in named.items() if item.requires_grad}
        self.module = module.materialize()
        self.training = module.training
        self._group = group
        self._chunk_bytes = bucket_bytes
        self._broadcast_buffers = broadcast_buffers
        self._sync = True
        self._joining: UnevenInputs | None = None
        self._divide_by_all = False
        self._make_reducer = partial(
            Reducer,
            group=group,
            first_bucket_bytes=first_bucket_bytes,
            bucket_bytes=bucket_bytes,
            hook=hook,
            find_unused=find_unused,
        )
        self._check_replicas = check_replicas
        separate_generators(module, group)
        self._watch(trained)
        self._copy_model_from(0)
        self._start_reducer()

    def vjp(self, x: Arrays) -> tuple[Arrays, Pullback]:
        """Compute the wrapped module's output, and a pullback that also averages the gradients.

        Raises:
            UsageError: an earlier backward pass has not ended, or failed. From the pullback: a
                parameter has no gradient on some rank (raised on every rank, with the names).
        """
        self._pending.check_forward_allowed()
        if not self._tree.is_current():
            self._look_up_again()
        self._check_frozen(self._state.frozen)
        if self._sync and self.training and self._broadcast_buffers:
            self._broadcast_buffers_of_root()
        y, pull = self.module.vjp(x)
        backward, shape = self._pending.add(pull, sync=self._sync), shapes_of(y)
        if self._pending.reduction_due:
            self._start_reducer().begin_step()

        def pullback(grad_y: Arrays) -> Arrays | None:
            check_gradient(self, grad_y, shape)
            with quiet_overflow_in(grad_y):
                return self._run(backward, grad_y)

        return y, pullback

    def train(self, mode: bool = True) -> Self:
        """Set this module and all submodules to training, or with False to evaluation; returns the module.

        Raises:
            UsageError: a parameter that requires a gradient was added since the wrapping.
        """
        self._look_up_again()
        return super().train(mode)

    def __call__(self, x: Arrays) -> Arrays:
        """Compute the output alone. Communicates nothing."""
        return self.module(x)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients: the forward passes inside do not lead to a reduction.

        with model.no_sync():
            for x, labels in microbatches[:-1]: ...     # vjp and pullback
        ...                                             # the last one reduces the sum of all
        """
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    @contextmanager
    def join(
        self, *optimizers: SavesState, scaler: SavesState | None = None, divide_by_initial_world_size: bool = False
    ) -> Iterator[None]:
        """Let ranks have different numbers of batches, or none at all.

        with model.join(optimizer):
            for x, labels in my_batches: ...            # vjp, pullback, step, zero_grad

        A rank that reaches the end of the block takes part in the other ranks' reductions, with zeros, until all ranks
        have reached it. Then all get the parameters and buffers of one of the last ranks, and the state of its
        optimizers. Do not call other collectives inside.

        Args:
            optimizers: the optimizers, and other objects with `state_dict` and `load_state_dict`, that change inside
                the block, in the same order on all ranks. Those that keep state for parameters of this model are found
                without being named.
            scaler: the loss scaler, if there is one.
            divide_by_initial_world_size: always divide sums of gradients by `group.world_size`,
                so that every batch has the same weight, and not by the number of ranks that
                still have batches.

        Raises:
            UsageError: ranks are at different steps, or have different optimizers (raised on every rank); or this rank
                leaves with gradients that `no_sync` has accumulated.
        """
        if self._joining is not None:
            raise UsageError("DDP.join: this model is inside join() already.")
        note_bytes = len(self._trained) if divide_by_initial_world_size else 0
        self._joining = UnevenInputs("DDP", (self._group,), lambda step: _JoinStep(step).name, note_bytes)
        self._divide_by_all = divide_by_initial_world_size
        try:
            yield
            self._pending.check_forward_allowed()
            if self._has_local_gradients():
                raise UsageError(
                    "DDP.join: this rank leaves with gradients that no_sync() has accumulated and nobody has reduced. "
                    "Make the last pass of a step outside no_sync()."
                )
            self._shadow(self._joining)
            found = [owner for item in self._state.parameters for owner in item.state_owners]
            scalers = () if scaler is None else (scaler,)
            owners = list({id(owner): owner for owner in (*optimizers, *scalers, *found)}.values())
            copy_states("DDP.join", self._group, owners, self._joining.active[0], self._chunk_bytes)
        finally:
            self._joining = None

    @property
    def averaging_groups(self) -> tuple[ProcessGroup, ...]:
        """The groups over which gradients are averaged: the group of the replicas."""
        return (self._group,)

    def sync_buffers(self) -> None:
        """Give rank 0's buffers to all ranks, in training and with `broadcast_buffers`.

        A caller that runs all passes in `no_sync`, such as a pipeline, calls this on all ranks before the first.
        """
        if self.training and self._broadcast_buffers:
            self._broadcast_buffers_of_root()

    def sync_gradients(self) -> None:
        """Average the gradients that were accumulated in `no_sync`.

        A caller that runs all passes in `no_sync`, such as a pipeline, calls this on all ranks.

        Raises:
            UsageError: as from a pullback.
        """
        self._pending.check_forward_allowed()
        self._announce_backward()
        reducer = self._start_reducer()
        reducer.begin_step()
        self._pending.end_reduction()
        reducer.finish(self._divisor(), self._counting())

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Copy the module, for the same group and with the same options; it has buckets of its own when it trains."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        rebuilt = ("_pending", "_tree", "_trained", "_state", "_reducer", "_joining", "_make_reducer")
        vars(twin).update({key: deepcopy(value, memo) for key, value in vars(self).items() if key not in rebuilt})
        options = self._make_reducer.keywords
        twin._make_reducer = partial(Reducer, **{**options, "hook": deepcopy(options["hook"], memo)})
        twin._joining = None
        twin._watch({name: item for name, item in twin.module.named_parameters() if item.requires_grad})
        return twin

    def __repr__(self) -> str:
        return f"DDP({self.module!r}, {self._group!r})"

    def _run(self, backward: PendingBackward, grad_y: Arrays) -> Arrays | None:
        if backward.has_run:
            raise UsageError("DDP: this pullback has been run. Call vjp again for another.")
        if not self._pending.reduction_due:
            return self._pending.run(backward, grad_y)
        if not self._pending.reduction_begun:
            self._announce_backward()
        reducer = self._start_reducer()
        with reducer.backward_pass():
            grad_x = self._pending.run(backward, grad_y)
        if self._pending.gradients_complete:
            self._pending.end_reduction()
            reducer.finish(self._divisor(), self._counting())
        return grad_x

    def _watch(self, trained: Mapping[str, Parameter]) -> None:
        """Look up what the module consists of, and guard the steps of its optimizers."""
        named = dict(self.module.named_parameters())
        self._pending = PendingBackwards()
        self._tree = TreeSnapshot(self.module)
        self._trained = {id(parameter): name for name, parameter in trained.items()}
        self._state = WrappedState(
            parameters=tuple(named.values()),
            frozen=tuple(item for item in named.values() if id(item) not in self._trained),
            buffers=tuple(self.module.buffers()),
        )
        self._reducer: Reducer | None = None
        guard = self._check_step
        for name, parameter in named.items():
            parameter.name = name
            parameter.step_guards["data parallel"] = guard

    def _start_reducer(self) -> Reducer:
        """Return the reducer; a copy of a DDP module makes it when it is trained for the first time."""
        if self._reducer is None:
            found = {id(parameter): parameter for parameter in self._state.parameters}
            trained = {name: found[key] for key, name in self._trained.items()}
            replica = (lambda: self._state.parameters) if self._check_replicas else None
            self._reducer = self._make_reducer(trained, replica=replica)
        return self._reducer

    def _check_step(self, lr: float) -> None:
        """Refuse a step with gradients of this rank alone; a step with learning rate 0 changes no parameter."""
        if lr != 0 and any(parameter.grad is not None for parameter in self._state.parameters):
            self._pending.check_step_allowed()

    def _has_local_gradients(self) -> bool:
        return self._pending.has_local_gradients and any(item.grad is not None for item in self._state.parameters)

    def _shadow(self, inputs: UnevenInputs) -> None:
        """Take part in the steps of the other ranks until none has a batch."""
        while True:
            step, note = inputs.announce(JOINED)
            if step == JOINED:
                break
            if step == _JoinStep.BUFFERS:
                self._copy_buffers_from(inputs.active[0])
            else:
                carried = note.astype(bool).tolist() or [False] * len(self._trained)
                self._start_reducer().shadow(self._divisor(), self._counting(), carried)
        self._copy_model_from(inputs.active[0])

    def _announce_backward(self) -> None:
        if self._joining is not None:
            carried = self._start_reducer().carried() if self._divide_by_all else []
            self._joining.announce(_JoinStep.BACKWARD, np.array(carried, np.uint8))

    def _divisor(self) -> int:
        if self._joining is None or self._divide_by_all:
            return self._group.world_size
        return len(self._joining.active)

    def _counting(self) -> int:
        """The number of ranks whose replicas must be equal."""
        return self._group.world_size if self._joining is None else len(self._joining.active)

    def _broadcast_buffers_of_root(self) -> None:
        if self._state.buffers:
            if self._joining is not None:
                self._joining.announce(_JoinStep.BUFFERS)
            self._copy_buffers_from(self._joining.active[0] if self._joining is not None else 0)

    def _copy_buffers_from(self, root: int) -> None:
        arrays = (buffer.data for buffer in self._state.buffers)
        broadcast_arrays(self._group, arrays, root, self._chunk_bytes)

    def _copy_model_from(self, root: int) -> None:
        arrays = (parameter.data for parameter in self._state.parameters)
        broadcast_arrays(self._group, arrays, root, self._chunk_bytes)
        self._copy_buffers_from(root)

    def _look_up_again(self) -> None:
        """Look up parameters and buffers after the module's tree has changed; refuse new ones that are trained."""
        named = dict(self.module.named_parameters())
        frozen = {name: item for name, item in named.items() if id(item) not in self._trained}
        for name, parameter in frozen.items():
            parameter.name = name
        self._check_frozen(frozen.values())
        self._state = WrappedState(
            parameters=tuple(named.values()), frozen=tuple(frozen.values()), buffers=tuple(self.module.buffers())
        )
        self._tree = TreeSnapshot(self.module)

    def _check_frozen(self, parameters: Iterable[Parameter]) -> None:
        """Refuse parameters that require a gradient and are in no bucket."""
        for parameter in parameters:
            if parameter.requires_grad:
                raise UsageError(
                    f"DDP: parameter {parameter.name!r} was frozen or absent when the module was "
                    "wrapped, and now requires a gradient, which has no bucket. Wrap the module "
                    "again."
                )
