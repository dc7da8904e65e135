"""Random generators of a tensor-parallel model: alike where activations are whole, one per rank where they are cut."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ferro import ProcessGroup

from ..nn.module import Module
from ..nn.module_state import GeneratorState
from .column import ColumnParallelLinear
from .conversion import generator_of_rank
from .embedding import ParallelEmbedding
from .layernorm import SequenceParallelLayerNorm
from .regions import CopyIn, GatherIn, GatherOut, ReduceOut, ScatterOut, SplitIn
from .row import RowParallelLinear
from .unembedding import ParallelUnembedding


def draw_alike(layer: Module, group: ProcessGroup) -> Module:
    """Stand in a plan for a layer whose random numbers are the same on all ranks; the layer stays as it is."""
    return layer


def draw_per_rank(layer: Module, group: ProcessGroup) -> Module:
    """Stand in a plan for a layer whose random numbers differ between the ranks; the layer stays as it is."""
    return layer


def seed_generators(module: Module, group: ProcessGroup, per_rank: Mapping[int, bool]) -> None:
    """Derive all generators in the module from rank 0's; all ranks call it.

    Generators of layers that see whole activations take rank 0's state, and so draw the same numbers on all ranks,
    those of the serial model. Generators of layers that see activations in pieces are replaced by new ones: each rank's
    is seeded by rank 0's state, the generator's position in the model, and the rank. A generator that layers of both
    kinds share is replaced in the latter alone.

    A layer sees pieces if it is defined after a layer that cuts activations (a ColumnParallelLinear, or a
    sequence-parallel layer) and before the one that makes them whole again (a RowParallelLinear).

    Args:
        module: after its layers were replaced.
        group: the ranks.
        per_rank: for the identities of some modules, whether their generators differ between ranks, which is otherwise
            decided by their place.

    Source: Megatron-LM's CudaRNGStatesTracker has a state for each kind, too; numpy.random.SeedSequence derives them.
    """
    own = module.generator_state_dict()
    if not own:
        return
    states: dict[str, GeneratorState] = group.broadcast_object(own)
    for name, generator in module.named_generators():
        generator.bit_generator.state = states[name]
    replaced: dict[int, np.random.Generator] = {}
    for position, (_, generator) in enumerate(module.named_generators()):
        replaced[id(generator)] = generator_of_rank(generator, position, group.rank)
    for layer in _layers_of_pieces(module, per_rank):
        for key, value in list(vars(layer).items()):
            new = _replace(value, replaced)
            if new is not value:
                setattr(layer, key, new)


def _layers_of_pieces(root: Module, per_rank: Mapping[int, bool]) -> list[Module]:
    found, cut = [], False
    for layer in root.modules():
        if per_rank.get(id(layer), cut):
            found.append(layer)
        cut = _cuts(layer, cut)
    return found


def _cuts(layer: Module, before: bool) -> bool:
    """Say whether activations are in pieces after this layer, given whether they were so before it."""
    if isinstance(layer, ColumnParallelLinear):
        return not layer.gather_output
    if isinstance(layer, RowParallelLinear | ParallelEmbedding):
        return layer.sequence_parallel
    if isinstance(layer, ParallelUnembedding | SequenceParallelLayerNorm | SplitIn | ScatterOut):
        return True
    if isinstance(layer, ReduceOut | GatherOut | CopyIn | GatherIn):
        return False
    return before


def _replace(value: object, replaced: Mapping[int, np.random.Generator]) -> object:
    """Replace generators in an attribute's value, also inside lists, tuples and dicts."""
    if isinstance(value, np.random.Generator):
        return replaced[id(value)]
    if isinstance(value, dict):
        value.update({key: _replace(child, replaced) for key, child in value.items()})
    elif isinstance(value, list):
        value[:] = [_replace(child, replaced) for child in value]
    elif type(value) is tuple:
        items = tuple(_replace(child, replaced) for child in value)
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return value
