"""DDP: the module that every rank has, with gradients averaged while the backward pass runs."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Self

from ferro import ProcessGroup, UsageError

from ..nn.arrays import Array, quiet_overflow
from ..nn.module import Module, Pullback
from ..nn.parameter import Parameter
from ..replicas import broadcast_arrays, check_same
from ..uneven_inputs import JOINED, UnevenInputs
from .bucket import Hook
from .pending_backwards import PendingBackward, PendingBackwards
from .reducer import Reducer


class _Step(enum.IntEnum):
    """What a rank is about to do, in terms of the roll call."""

    BUFFERS = 1
    BACKWARD = 2


class DDP(Module):
    """A module of which every rank has a replica, trained on its own part of each batch.

    When a pullback returns, every parameter's `grad` is the mean over the ranks of their
    gradients, the same bits on every rank; so are the parameters after an optimizer's step. It
    is the gradient of the whole batch where all ranks' parts are of one size and the loss is a
    mean.

    Gradients live in buckets of memory from `group.empty`: a parameter's `grad` is a view, and
    there is no second copy. Each bucket is reduced as soon as its gradients are complete.

    Accumulation. Each pullback outside `no_sync` reduces what has been accumulated since
    `zero_grad()`. Without `zero_grad()` between two of them, the second adds to the mean of the
    first, which is the same on all ranks and so its own mean: `grad` is then the sum of both
    means, as it should be. With `no_sync` for all but the last microbatch there is one reduction
    instead of several. When several microbatches are in flight, there is one reduction in any
    case: in the last pullback that runs.

    All ranks make the same passes in the same order. `model(x)` computes the output alone and
    communicates nothing, so one rank may call it by itself.

    Names in `named_parameters`, `state_dict` and so on are those of the wrapped module, so a
    state fits the module with and without DDP.

    Parameters and buffers are looked up once, at the wrapping. Later their `data` may be replaced,
    and modules that hold them; a parameter or buffer added later is neither averaged nor shared.

    Args:
        module: the model; parameters and buffers get rank 0's values.
        group: the replicas.
        bucket_bytes: most bytes in a bucket.
        first_bucket_bytes: most bytes in the first one, which is the first to be sent.
        hook: how a bucket is averaged, see `ferro_strategies.hooks`; None for an exact mean.
        broadcast_buffers: give rank 0's buffers to all before each forward pass in training,
            but for those under `no_sync`. Afterwards each rank's move on by its own batch, so
            rank 0's are the ones to save.
        find_unused: let forward passes leave parameters out. A parameter that some ranks used
            gets the mean with zeros for the others; what no rank used keeps `grad` None. Costs
            one more small reduction. Modules must announce their uses (`Parameter.use`).

    Attributes:
        module: the wrapped module.

    Raises:
        UsageError: ranks gave different models or options (on every rank, with the first
            difference), or no parameter requires a gradient. Nothing was changed.
    """

    transparent = True

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
    ) -> None:
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
        }
        check_same("DDP", module, group, options)
        named = dict(module.named_parameters())
        trained = {name: item for name, item in named.items() if item.requires_grad}
        if not trained:
            raise UsageError(
                f"DDP: {type(module).__name__} has no parameter that requires a gradient, so "
                "there is nothing to average. Use it without DDP."
            )
        self.module = module
        self.training = module.training
        self._group = group
        self._chunk_bytes = bucket_bytes
        self._broadcast_buffers = broadcast_buffers
        self._sync = True
        self._roll: UnevenInputs | None = None
        self._divide_by_all = False
        self._flights = PendingBackwards("DDP")
        # A training step uses these tables, and so need not walk the tree of modules.
        self._parameters = tuple(named.values())
        self._frozen = tuple(item for item in named.values() if not item.requires_grad)
        self._buffers = tuple(module.buffers())
        for name, parameter in named.items():
            parameter.name = name
        self._replicate(0)
        self._reducer = Reducer(
            trained,
            group,
            first_bucket_bytes=first_bucket_bytes,
            bucket_bytes=bucket_bytes,
            hook=hook,
            find_unused=find_unused,
        )

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Compute the wrapped module's output and pullback; see the class.

        Raises:
            UsageError: an earlier backward pass is not over, or failed. From the pullback: a
                rank lacks gradients (on every rank, with their names), see `find_unused`.
        """
        self._flights.check_start()
        self._check_frozen(self._frozen)
        if self._sync and self.training and self._broadcast_buffers:
            self._share_buffers()
        y, pull = self.module.vjp(x)
        flight = self._flights.start(pull, sync=self._sync)
        if self._flights.due:
            self._reducer.expect()

        def pullback(grad_y: Array) -> Array | None:
            with quiet_overflow(grad_y.dtype):
                return self._run(flight, grad_y)

        return y, pullback

    def train(self) -> Self:
        """Set this module and all below it to training; returns the module.

        Raises:
            UsageError: a parameter that requires a gradient was added since the wrapping.
        """
        known = {id(item) for item in self._parameters}
        self._check_frozen(item for item in self.parameters() if id(item) not in known)
        return super().train()

    def __call__(self, x: Array) -> Array:
        """Compute the output alone. Communicates nothing."""
        return self.module(x)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients here: forward passes made inside do not ask for a reduction.

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
    def join(self, *, divide_by_initial_world_size: bool = False) -> Iterator[None]:
        """Let ranks have different numbers of batches, also none.

        with model.join():
            for x, labels in my_batches: ...            # vjp, pullback, step, zero_grad

        A rank that leaves the block shadows the others' reductions until all have left; then
        all get the parameters and buffers of the ranks that were last. (State of the optimizer
        stays where it stopped.) Collectives of your own do not belong inside.

        Args:
            divide_by_initial_world_size: divide sums of gradients by `group.world_size`
                throughout, so that every batch has the same weight, instead of by the number of
                ranks that contributed.
        """
        if self._roll is not None:
            raise UsageError("DDP.join: this model is inside join() already.")
        self._roll = UnevenInputs("DDP", (self._group,), lambda step: _Step(step).name)
        self._divide_by_all = divide_by_initial_world_size
        try:
            yield
            self._flights.check_start()
            self._shadow(self._roll)
        finally:
            self._roll = None

    def sync_gradients(self) -> None:
        """Average what has been accumulated under `no_sync`, now.

        For whoever runs all passes under `no_sync`, as a pipeline does. All ranks call it.

        Raises:
            UsageError: as from a pullback.
        """
        self._flights.check_start()
        self._announce(_Step.BACKWARD)
        self._reducer.expect()
        self._reducer.finish(self._divisor())

    def __repr__(self) -> str:
        return f"DDP({self.module!r}, {self._group!r})"

    def _run(self, flight: PendingBackward, grad_y: Array) -> Array | None:
        if flight.has_run:
            raise UsageError("DDP: this pullback has been run. Call vjp again for another.")
        if not self._flights.due:
            return self._flights.run(flight, grad_y)
        if not self._flights.begun:
            self._announce(_Step.BACKWARD)
        with self._reducer.listening():
            grad_x = self._flights.run(flight, grad_y)
        if self._flights.all_landed:
            self._flights.settle()
            self._reducer.finish(self._divisor())
        return grad_x

    def _shadow(self, roll: UnevenInputs) -> None:
        """Take part in the others' steps until nobody has a batch."""
        while (step := roll.announce(JOINED)[0]) != JOINED:
            if step == _Step.BUFFERS:
                self._replicate_buffers(roll.active[0])
            else:
                self._reducer.shadow(self._divisor())
        self._replicate(roll.active[0])

    def _announce(self, step: _Step) -> None:
        if self._roll is not None:
            self._roll.announce(step)

    def _divisor(self) -> int:
        if self._roll is None or self._divide_by_all:
            return self._group.world_size
        return len(self._roll.active)

    def _share_buffers(self) -> None:
        if self._buffers:
            self._announce(_Step.BUFFERS)
            self._replicate_buffers(self._roll.active[0] if self._roll is not None else 0)

    def _replicate_buffers(self, root: int) -> None:
        arrays = (buffer.data for buffer in self._buffers)
        broadcast_arrays(self._group, arrays, root, self._chunk_bytes)

    def _replicate(self, root: int) -> None:
        arrays = (parameter.data for parameter in self._parameters)
        broadcast_arrays(self._group, arrays, root, self._chunk_bytes)
        self._replicate_buffers(root)

    def _check_frozen(self, parameters: Iterable[Parameter]) -> None:
        """Refuse to train parameters that the reducer does not know."""
        for parameter in parameters:
            if parameter.requires_grad:
                raise UsageError(
                    f"DDP: parameter {parameter.name!r} was frozen or absent when the module was "
                    "wrapped, and now requires a gradient, which has no bucket. Wrap the module "
                    "again."
                )
