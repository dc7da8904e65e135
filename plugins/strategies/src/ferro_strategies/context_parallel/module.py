"""ContextParallel: each rank has some positions of every sequence."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import ClassVar, Self

from ferro import ProcessGroup, UsageError

from ..ddp import DDP
from ..gradient_averaging import average_gradients
from ..nn.arrays import Array, namespace_of
from ..nn.attention import Attention
from ..nn.batchnorm import BatchNorm
from ..nn.checks import check_gradient, check_input
from ..nn.module import Module, Pullback, replace_modules
from ..nn.trees import Arrays, describe, has_gradient, leaves, map_leaves, shapes_of, structure
from ..replicas import check_module_and_group
from ..tensor_parallel.attention import ParallelAttention
from ..tensor_parallel.generators import seed_generators
from ..tensor_parallel.replicated_values import broadcast_whole_values, check_same_model, is_whole
from ..tensor_parallel.sharding import all_gather_along
from .attention import RingAttention
from .chunks import SequenceChunks


class ContextParallel(Module):
    """Run a model on this rank's positions of each sequence; its attention sees those of all ranks.

        model = ContextParallel(transformer, group)
        scores, pullback = model.vjp(words)         # (B, T), the same on all ranks; scores of all positions
        loss, grad = nn.cross_entropy(scores, following)
        pullback(grad)                              # gradients are complete, and equal on all ranks

    Activations take 1/n of the memory. Every `nn.Attention` becomes a `RingAttention`; all other layers must treat each
    position by itself, as Linear, LayerNorm and Embedding do. What depends on a position's place, such as an embedding
    of places, gets its input before it is divided, outside of ContextParallel, or asks `positions`.

    With gather_output=False each rank keeps the outputs of its positions, and makes its own loss:

        model = ContextParallel(transformer, group, gather_output=False)
        scores, pullback = model.vjp(words)
        loss, grad = nn.cross_entropy(scores, model.shard(following))
        pullback(grad)

    Gradients are then averaged over the ranks, as by DDP. They are those of the mean over all positions if all ranks
    have as many; otherwise weigh each rank's loss by its share of the positions times the number of ranks.

    Args:
        module: the model, the same on all ranks; rank 0's parameters and buffers are broadcast. It is changed in place;
            parameters are the same objects afterwards.
        group: the ranks. All run the same passes.
        zigzag: give each rank an early and a late part, so that causal attention is as much work on all ranks.
        gather_output: return the outputs of all positions, on every rank.
        reduce_gradients: False: leave the gradients to a DDP or FSDP over a group that contains this one, such as
            `DDP(ContextParallel(model, mesh["cp"], reduce_gradients=False), both)` with
            `both = mesh.flatten(("dp", "cp"), "both")["both"]`.

    Raises:
        UsageError: the models differ, or the module has no attention, or layers that cannot be divided.

    Source: see `ring_attend` and `SequenceChunks`.
    """

    transparent: ClassVar[bool] = True

    def __init__(
        self,
        module: Module,
        group: ProcessGroup,
        *,
        zigzag: bool = True,
        gather_output: bool = True,
        reduce_gradients: bool = True,
    ) -> None:
        check_module_and_group("ContextParallel", module, group)
        _check_layers(module)
        check_same_model(module, group, "ContextParallel")
        broadcast_whole_values(module, group)
        self.group = group
        self.zigzag = zigzag
        self.gather_output = gather_output
        self.training = module.training

        def replacement(_name: str, layer: Module) -> Module:
            return RingAttention(layer, group, zigzag=zigzag) if type(layer) is Attention else layer

        self.module = replace_modules(module, replacement)
        # Each rank has other positions, so all random numbers differ between ranks.
        seed_generators(self.module, group, {id(layer): True for layer in self.module.modules()})
        self._averages = reduce_gradients
        if reduce_gradients:
            self._average()

    def chunks(self, length: int) -> SequenceChunks:
        """The division of sequences of this length over the ranks."""
        return SequenceChunks(length, self.group.world_size, self.zigzag)

    def positions(self, length: int) -> Array:
        """The places in the sequence of this rank's positions, in its order."""
        return self.chunks(length).positions(self.group.rank)

    def shard(self, x: Array) -> Array:
        """Take this rank's positions from (B, T, ...), such as labels."""
        namespace_of(x)
        check_input(self, x, "(B, T >= 1, ...)", fits=x.ndim >= 2 and x.shape[1] > 0)
        return x[:, self.positions(x.shape[1])]

    def vjp(self, x: Arrays) -> tuple[Arrays, Pullback]:
        """Map sequences (B, T, ...), the same on all ranks, to (B, T, ...), or to this rank's (B, t, ...).

        Input and output may be trees of arrays, such as a tuple of sequences and their mask (B, T).
        """
        own = map_leaves(self.shard, x)
        lengths = {leaf.shape[1] for leaf in leaves(x) if leaf is not None}
        if len(lengths) != 1:
            raise UsageError(f"{self!r}: expected sequences of one length, got {describe(x)}.")
        chunks = self.chunks(lengths.pop())
        y, pull = self.module.vjp(own)
        size = chunks.size(self.group.rank)
        for leaf in leaves(y):
            fits = leaf.ndim >= 2 and leaf.shape[1] == size
            check_input(self, leaf, f"(B, {size}, ...) of its module's output", fits=fits)
        if self.gather_output:
            y = map_leaves(partial(self._whole, chunks=chunks), y)
        shapes, x_structure = shapes_of(y), structure(x)

        def pullback(grad_y: Arrays) -> Arrays | None:
            check_gradient(self, grad_y, shapes)
            if self.gather_output:
                grad_y = map_leaves(self._scaled_shard, grad_y)
            grad_x = pull(grad_y)
            if not has_gradient(grad_x):
                return None
            return x_structure.unflatten(
                [None if grad is None else self._whole_gradient(grad, chunks) for grad in x_structure.flatten(grad_x)]
            )

        return y, pullback

    def _whole(self, own: Array, chunks: SequenceChunks) -> Array:
        return all_gather_along(own, self.group, 1, chunks.sizes)[:, chunks.order()]

    def _scaled_shard(self, grad: Array) -> Array:
        """This rank's part of a gradient, times the ranks: gradients of parameters are averaged, and must be sums."""
        scaled: Array = self.shard(grad) * grad.dtype.type(self.group.world_size)
        return scaled

    def _whole_gradient(self, grad: Array, chunks: SequenceChunks) -> Array:
        whole = self._whole(grad, chunks)
        if self.gather_output:
            whole /= whole.dtype.type(self.group.world_size)
        return whole

    def _average(self) -> None:
        """Average the gradients of the parameters that every rank has, from now on."""
        whole = [(name, item) for name, item in self.named_parameters() if is_whole(item, self.group)]
        average_gradients(whole, self.group, "ContextParallel")

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Copy the model for the same ranks; the copy's gradients are averaged, too."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update({key: deepcopy(value, memo) for key, value in vars(self).items()})
        if self._averages:
            twin._average()
        return twin

    def __repr__(self) -> str:
        return f"ContextParallel({self.module!r}, {self.group!r})"


def _check_layers(module: Module) -> None:
    if any(isinstance(layer, DDP) for layer in module.modules()):
        raise UsageError(
            "ContextParallel: the module is in a DDP, which would average gradients before those of all positions "
            "are in them. Wrap the other way round: DDP(ContextParallel(model, ...), ...)."
        )
    layers = dict(module.named_modules())
    for name, layer in layers.items():
        if isinstance(layer, BatchNorm | ParallelAttention):
            raise UsageError(
                f"ContextParallel: layer {name!r}, a {type(layer).__name__}, does not work on some of the positions. "
                "Wrap the part of the model that does without it."
            )
    if not any(type(layer) is Attention for layer in layers.values()):
        raise UsageError(
            "ContextParallel: the module has no nn.Attention, which is what joins the positions of different ranks. "
            "Other attention cannot be divided."
        )
