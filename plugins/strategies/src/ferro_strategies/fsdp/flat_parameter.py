"""FlatParameter: parameters of one unit in one flat array, of which every rank owns a shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np

from ferro import UsageError

from ..nn.arrays import Array, namespace_of, wide_dtype
from ..nn.parameter import Parameter, Split
from .buffer_pool import PooledBuffer, copy_into, to_namespace, unpooled
from .config import FSDPConfig
from .kept_gather import PERSISTENT_BYTES, Gather, KeptGather
from .layout import FlatLayout, flat_layout
from .unsharded_gradient import UnshardedGradient


class FlatParameter:
    """Parameters of one dtype, all trained or all frozen, one after the other.

    Outside a pass, `parameter.data` and `grad` are views of this rank's shard. While the flat parameter is unsharded,
    they have their full shape and are views of memory from the pool.

    All ranks make it together. Afterwards the values are those of the configuration's first rank.

    Args:
        named: at least one parameter, with qualified names.
        config: the settings of the FSDP module.

    Attributes:
        parameters: the parameters.
        layout: their positions in the flat array.
        trained: whether they require gradients.
        shard: (layout.shard_size,), owned by this rank, in the dtype that the parameters had.
        shard_views: this rank's part of each parameter, views of the shard.
        namespace: the array namespace of the unsharded parameters.
        shard_namespace: that of the shards, which may be in host memory.
        unsharded_grad: gradients that this rank has accumulated and not yet reduced.
    """

    def __init__(self, named: Sequence[tuple[str, Parameter]], config: FSDPConfig) -> None:
        first = named[0][1]
        self.parameters = tuple(parameter for _, parameter in named)
        self.trained = first.requires_grad
        self.layout: FlatLayout = flat_layout(((n, p.shape) for n, p in named), config.num_shards)
        self._config = config
        self._dtype = first.dtype
        self._grad_dtype = first.grad_dtype
        self._unsharded_grad_dtype = wide_dtype(config.precision.reduce_dtype_of(self._dtype))
        self.namespace = value_namespace(first)
        self.shard_namespace = np if config.offload else self.namespace
        # The strategies that keep parameters unsharded need memory that stays.
        self._kept = self._allocate() if config.keeps_unsharded else None
        self._kept_gathers: dict[bool, KeptGather] = {}  # for passes that only evaluate, and for those that train
        rank = config.shard_rank
        self._slices_in_shard = [self.layout.slice_in_shard(span, rank) for span in self.layout.spans]
        self.shard: Array = self._shard_memory()
        self._scatter_values()
        self.shard_views = self._views_of_shard(self.shard)
        self._grad_shard: Array | None = None
        self._is_reducing_into_grad = False
        # An all_reduce overwrites the memory, which therefore cannot stay.
        keeps_memory = config.keeps_unsharded and config.shard_group is not None
        self.unsharded_grad = UnshardedGradient(
            self.parameters, self.layout, self._allocate_grad, keeps_memory=keeps_memory
        )
        self._saved: _ShardedState | None = None
        for parameter, view, span in zip(self.parameters, self.shard_views, self.layout.spans, strict=True):
            parameter.hold(view, grad=None, grad_memory=None)
            if config.shard_group is not None:
                start = self.layout.slice_in_parameter(span, rank).start
                parameter.splits += (Split(group=config.shard_group, dim=None, shape=span.shape, start=start),)

    @property
    def is_unsharded(self) -> bool:
        """True while the parameters view unsharded memory."""
        return self._saved is not None

    @property
    def largest_message_bytes(self) -> int:
        """The size of all shards or of an unsharded gradient, whichever is larger, as they are sent."""
        dtypes = self._config.precision.compute_dtype_of(self._dtype), self.reduce_dtype
        return self.layout.size * max(dtype.itemsize for dtype in dtypes)

    @property
    def reduce_dtype(self) -> np.dtype:
        """The dtype in which gradients are reduced."""
        return self._config.precision.reduce_dtype_of(self._dtype)

    # -- values ----------------------------------------------------------------------------------

    def allocate_unsharded(self) -> PooledBuffer:
        """Allocate the memory for `all_gather`; until the gather has run, only queued operations may use it."""
        if self._kept is None:
            return self._allocate(in_queue_order=True)
        return unpooled(self._kept.array)

    def all_gather(self, unsharded: Array, *, evaluating: bool, at_once: bool) -> tuple[Gather, PooledBuffer] | None:
        """Gather all shards into `unsharded`, or start to.

        A gather for a pass without backward pass is given columns, by which ranks notice that others train.

        Args:
            unsharded: the memory, from `allocate_unsharded`.
            evaluating: whether no backward pass follows.
            at_once: whether to gather in the caller's thread, before this returns.

        Returns:
            The operation, and the memory that it sends, which the caller holds until it has
            ended; None if `unsharded` has its values already.
        """
        own = unsharded[self.layout.shard_slice(self._config.shard_rank)]
        sent = unpooled(self.shard)
        if own.dtype != self.shard.dtype or namespace_of(self.shard) is not self.namespace:
            # Operations queued before may still use memory from the pool, so it is not written.
            kept = self._kept is not None
            sent = unpooled(own) if kept else self._allocate_shard(own.dtype)
            copy_into(sent.array, self.shard)
        if self._config.shard_group is None:
            return None
        shard, out = sent.array, unsharded
        if evaluating:
            shard, out = shard.reshape(-1, 1), out.reshape(-1, 1)
        if self._kept is not None and unsharded.nbytes >= PERSISTENT_BYTES:
            gather = self._kept_gathers.setdefault(evaluating, KeptGather(self._config.shard_group, shard, out))
            (gather.run if at_once else gather.start)()
            return None if at_once else (gather, sent)
        if at_once:
            try:
                self._config.shard_group.all_gather(shard, out=out)
            except BaseException:
                sent.abandon()
                raise
            return None
        work: Gather = self._config.shard_group.all_gather(shard, out=out, async_op=True, copy=False)
        return work, sent

    def use_unsharded(self, unsharded: Array, *, backward: bool, may_defer: bool = False) -> None:
        """Make the parameters views of the gathered array.

        Args:
            unsharded: the flat array, gathered.
            backward: whether gradients will be added, which needs unsharded memory for them.
            may_defer: whether gradients may be computed after the pass (`nn.deferring`).
        """
        assert self._saved is None, "a unit is unsharded already"
        self.check_values()
        self._saved = _ShardedState(self.parameters, backward=backward and self.trained)
        grads: list[tuple[Array | None, Array | None]] = [(None, None)] * len(self.parameters)
        if self._saved.backward:
            grads = [*self.unsharded_grad.views()]
        for parameter, view, (memory, grad) in zip(self.parameters, self.layout.views(unsharded), grads, strict=True):
            parameter.hold(view, grad=grad, grad_memory=memory)
            if self._saved.backward and parameter.deferred is not None:
                parameter.deferred = [] if may_defer else None

    def use_shards(self) -> None:
        """Make the parameters views of the shard again; the unsharded gradient keeps its content."""
        saved, self._saved = self._saved, None
        assert saved is not None
        for index, parameter in enumerate(self.parameters):
            if saved.backward:
                self.unsharded_grad.mark_if_set(index)
            grad, queue = saved.grads[index], saved.deferred[index]
            parameter.hold(self.shard_views[index], grad=grad, grad_memory=grad)
            if saved.backward and queue is not None:
                queue += self.unsharded_grad.defer(index, parameter.deferred or ())
                parameter.deferred = queue

    def check_values(self) -> None:
        """Check that every parameter still holds its part of the shard.

        Raises:
            UsageError: another array was assigned to a parameter's `data`.
        """
        for parameter, view in zip(self.parameters, self.shard_views, strict=True):
            if self._saved is None and parameter.data is not view:
                raise UsageError(
                    f"FSDP: another array was assigned to `data` of parameter {parameter.name!r}, which would be "
                    "ignored, for FSDP gathers the shard that it made. Copy values into it, `parameter.data[...] = "
                    "shard`, or load_full_state_dict() whole arrays."
                )

    # -- gradients -------------------------------------------------------------------------------

    @property
    def has_grad(self) -> list[bool]:
        """For each parameter, whether it has a reduced gradient."""
        return [grad is not None for grad in self._shard_grads()]

    def allocate_reduced(self) -> PooledBuffer:
        """Allocate memory for the shard of a reduced gradient: the memory of `grad` itself if possible."""
        fits = self._grad_dtype == self.reduce_dtype and self.shard_namespace is self.namespace
        if fits and not self._is_reducing_into_grad and not any(self.has_grad):
            self._is_reducing_into_grad = True
            return unpooled(self._grad_memory())
        return self._allocate_shard(self.reduce_dtype)

    def accumulate_reduced(self, reduced: Array) -> None:
        """Add the shard of a reduced gradient to each parameter's `grad`."""
        memory = self._grad_memory()
        reduced = to_namespace(reduced, self.shard_namespace)
        slots = self._views_of_shard(memory)
        addends = slots if reduced is memory else self._views_of_shard(reduced)
        grads = self._shard_grads()
        for index, parameter in enumerate(self.parameters):
            grad, addend, slot = grads[index], addends[index], slots[index]
            if not parameter.requires_grad:
                continue
            if grad is not None:
                grad += addend.astype(grad.dtype, copy=False)
                continue
            if reduced is not memory:
                slot[...] = addend
            if self._saved is not None:
                self._saved.grads[index] = slot
            else:
                parameter.hold(parameter.data, grad=slot, grad_memory=slot)
        if reduced is memory:
            self._is_reducing_into_grad = False

    # -- inside ----------------------------------------------------------------------------------

    def _scatter_values(self) -> None:
        """Fill the shards of all ranks from the first rank's parameters; this needs memory for one unit only.

        Deferred parameters are drawn one by one, on that rank alone.
        """
        config, xp = self._config, self.namespace
        # On a mesh, the first row scatters; the other rows get their shards along the columns.
        in_first_row = config.shard_group is None or config.replica_group is None or config.replica_group.rank == 0
        flat = None
        if config.shard_rank == 0 and in_first_row:
            flat = config.pool.allocate(xp, self.layout.size, self._dtype)
            flat.array[self.layout.unpadded_size :] = 0
            for span, parameter in zip(self.layout.spans, self.parameters, strict=True):
                flat.array[span.start : span.stop] = parameter.draw().reshape(-1)
        received: Array = self.shard
        if self.shard_namespace is not xp:
            received = xp.empty(self.shard.shape, self._dtype)
        if config.shard_group is None:
            assert flat is not None
            received[...] = flat.array
        elif in_first_row:
            config.shard_group.scatter(None if flat is None else flat.array, out=received)
        if config.replica_group is not None:
            config.replica_group.broadcast(received, out=received)
        if received is not self.shard:
            copy_into(self.shard, received)

    def _shard_grads(self) -> list[Array | None]:
        if self._saved is not None:
            return self._saved.grads
        return [parameter.grad for parameter in self.parameters]

    def _grad_memory(self) -> Array:
        if self._grad_shard is None:
            memory: Array = self.shard_namespace.empty(self.layout.shard_size, self._grad_dtype)
            self._grad_shard = memory
        return self._grad_shard

    def _allocate(self, *, in_queue_order: bool = False) -> PooledBuffer:
        """Allocate unsharded parameters, in the dtype of the computation."""
        pool, dtype = self._config.pool, self._config.precision.compute_dtype_of(self._dtype)
        allocate = pool.allocate_in_queue_order if in_queue_order else pool.allocate
        return allocate(self.namespace, self.layout.size, dtype)

    def _allocate_grad(self) -> PooledBuffer:
        """Allocate an unsharded gradient: in the dtype of its reduction, or in single precision if that is half."""
        return self._config.pool.allocate(self.namespace, self.layout.size, self._unsharded_grad_dtype)

    def _allocate_shard(self, dtype: np.dtype) -> PooledBuffer:
        return self._config.pool.allocate(self.namespace, self.layout.shard_size, dtype)

    def _shard_memory(self) -> Array:
        """Return memory for the shard: a part of the permanent unsharded memory, if there is one."""
        kept = None if self._kept is None else self._kept.array
        if kept is not None and kept.dtype == self._dtype and self.shard_namespace is self.namespace:
            return kept[self.layout.shard_slice(self._config.shard_rank)]
        shard: Array = self.shard_namespace.empty(self.layout.shard_size, self._dtype)
        return shard

    def _views_of_shard(self, shard: Array) -> list[Array]:
        """View a shard as one array per parameter: in its shape where nothing is sharded."""
        if self._config.shard_group is None:
            return self.layout.views(shard)
        return [shard[place] for place in self._slices_in_shard]


def value_namespace(parameter: Parameter) -> ModuleType:
    """Return the namespace of a parameter's value; deferred ones are drawn with NumPy."""
    return np if parameter.is_deferred else namespace_of(parameter.data)


class _ShardedState:
    """The gradients and deferred products of sharded parameters, saved while the parameters are unsharded."""

    def __init__(self, parameters: Sequence[Parameter], *, backward: bool) -> None:
        self.backward = backward
        self.grads = [parameter.grad for parameter in parameters]
        self.deferred: list[list[Callable[[], None]] | None] = [parameter.deferred for parameter in parameters]
