"""parallelize: replace layers of a serial model by parallel ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import TypeAlias

from ferro import ProcessGroup, UsageError

from ..nn.arrays import Array
from ..nn.checks import first_few
from ..nn.module import Module, replace_modules
from ..nn.parameter import Parameter
from ..nn.state import Slices, cut_dims, slice_dims
from .generators import draw_alike, draw_per_rank, seed_generators
from .replicated_values import WholeGradientCheck, broadcast_whole_values, check_same_model, is_whole

# A function that makes a parallel layer from a serial one, as `ColumnParallelLinear.from_serial`.
Convert: TypeAlias = Callable[[Module, ProcessGroup], Module]


def parallelize(
    module: Module, group: ProcessGroup, plan: Mapping[str, Convert], *, check_gradients: bool = True
) -> Module:
    """Replace layers by name; return the module, which is changed in place.

        parallelize(model, group, {
            "*.attention": ParallelAttention.from_serial,
            "*.up": ColumnParallelLinear.from_serial,
            "*.down": RowParallelLinear.from_serial,
            "head": partial(ColumnParallelLinear.from_serial, gather_output=True),
        })

    All ranks call it, with models of the same structure; rank 0's parameters and buffers are broadcast. Parameters are
    the same objects afterwards, each with this rank's piece of its array, so an optimizer may be made before or after;
    its state and gradients that exist are cut like the parameters.
    If an Embedding and its Unembedding are both replaced, the new layers share a table, too.

    Layers that are not replaced stay equal on all ranks: their generators draw alike, and their gradients are compared
    (see WholeGradientCheck). Generators of layers that see activations in pieces, such as a Dropout between a
    ColumnParallelLinear and a RowParallelLinear, draw other numbers on each rank. Which layers these are is seen from
    the order of definition; where a model defines its layers in another order than it calls them, put `draw_alike` or
    `draw_per_rank` into the plan.

    Args:
        module: a serial model, or one with parallel layers made by their constructors.
        group: the ranks that share each layer.
        plan: maps patterns of qualified names (`*`, `?`, `[...]`) to functions that make the parallel layer; if several
            patterns match, the first one is used. It may be empty.
        check_gradients: compare the gradients of whole parameters; False: for a model that sums some of them by itself.

    Raises:
        UsageError: a pattern matches nothing, the ranks' models differ in structure, or a layer to be replaced shares
            a parameter with one that is not (nothing was changed); or a layer cannot be converted, or layers that
            share a parameter would shard it differently.
    """
    chosen = _chosen(module, plan)
    for name, layer in module.named_modules():
        if id(layer) in chosen:
            _check_unshared(module, name, layer, chosen)
    before = list(module.parameters())
    for parameter in before:
        for owner in parameter.state_owners:
            owner.check_reshape(parameter)
    check_same_model(module, group, "parallelize")
    per_rank = {
        key: convert is draw_per_rank for key, convert in chosen.items() if convert in (draw_alike, draw_per_rank)
    }
    tied = _tied_parameters(module, chosen)
    made_first: dict[int, Parameter | None] = {}
    pairs: list[tuple[Module, Module]] = []

    def replacement(name: str, layer: Module) -> Module:
        convert = chosen.get(id(layer))
        if convert is None or id(layer) in per_rank:
            return layer
        broadcast_whole_values(layer, group)
        made = convert(layer, group)
        _tie(name, layer, made, made_first)
        if tied.isdisjoint(map(id, layer.parameters())):
            _keep_parameters(layer, made)  # frees the whole arrays before the next layer is converted
        else:
            pairs.append((layer, made))
        return made

    new = replace_modules(module, replacement)
    for layer, made in pairs:
        _keep_parameters(layer, made)
    _retire(before, new)
    broadcast_whole_values(new, group)
    seed_generators(new, group, per_rank)
    if check_gradients and group.world_size > 1:
        WholeGradientCheck([(name, p) for name, p in new.named_parameters() if is_whole(p, group)], group)
    return new


def _chosen(module: Module, plan: Mapping[str, Convert]) -> dict[int, Convert]:
    """Find the function for each layer that the plan names, by the layer's identity.

    Raises:
        UsageError: a pattern matches nothing.
    """
    chosen: dict[int, Convert] = {}
    unused = set(plan)
    for name, layer in module.named_modules():
        if layer.transparent:
            continue  # The wrapped module has the same name, and is the one to replace.
        matching = [pattern for pattern in plan if fnmatchcase(name, pattern)]
        if matching:
            unused.difference_update(matching)
            chosen[id(layer)] = plan[matching[0]]
    if unused:
        names = ", ".join(first_few([name for name, _ in module.named_modules() if name]))
        raise UsageError(f"parallelize: no module is called like {sorted(unused)}. There are: {names}.")
    return chosen


def _tied_parameters(module: Module, chosen: Container[int]) -> set[int]:
    """Find the identities of parameters that several of the chosen layers hold."""
    counts = Counter(
        id(parameter)
        for layer in module.modules()
        if id(layer) in chosen
        for parameter in _own_parameters(layer).values()
    )
    return {key for key, count in counts.items() if count > 1}


def _keep_parameters(layer: Module, made: Module) -> None:
    """Let the serial layer's parameters hold the parallel layer's values, and take their place in it.

    Optimizers that were made before refer to these objects. A parameter without a counterpart of its name stays as it
    is, as do those of a layer that was not replaced by another one.
    """
    serial = dict(layer.named_parameters())
    for name, piece in list(made.named_parameters()):
        parameter = serial.get(name)
        if parameter is None or parameter is piece:
            continue
        holders = [(part, key) for part in made.modules() for key, value in vars(part).items() if value is piece]
        if holders and parameter.data is not piece.data:  # the first of the layers that share it
            place = slice_dims(piece.data.shape, piece.data, cut_dims(piece))
            grad = None if parameter.grad is None else _own_piece(place, parameter.grad)
            parameter.hold(piece.data, grad=None, grad_memory=None)
            parameter.grad = grad
            parameter.splits = piece.splits
            for owner in parameter.state_owners:
                owner.reshape_state(parameter, partial(_own_piece, place))
        for part, key in holders:
            setattr(part, key, parameter)


def _own_piece(place: Slices, whole: Array) -> Array:
    """Copy this rank's piece of an array, in C order."""
    return place.view(whole).copy(order="C")


def _retire(before: Sequence[Parameter], new: Module) -> None:
    """Tell optimizers which parameters the model no longer has, because a layer was replaced by one without them."""
    kept = set(map(id, new.parameters()))
    for parameter in before:
        if id(parameter) not in kept:
            for owner in parameter.state_owners:
                owner.retire_parameter(parameter)


def _check_unshared(root: Module, name: str, layer: Module, chosen: Container[int]) -> None:
    """Check that a layer shares parameters only with layers that are replaced, too."""
    inside = {id(item) for item in layer.modules()}
    own = {id(parameter) for parameter in layer.parameters()}
    for other_name, other in root.named_modules():
        if id(other) in inside or id(other) in chosen:
            continue
        for held in _own_parameters(other).values():
            if id(held) in own:
                raise UsageError(
                    f"parallelize: {name!r} and {other_name!r} share parameter {held.name!r}; in "
                    "pieces of its own it would no longer be shared. Put both into the plan, or "
                    "neither: for an Embedding and its Unembedding, ParallelEmbedding.from_serial "
                    "and ParallelUnembedding.from_serial."
                )


def _tie(name: str, layer: Module, made: Module, made_first: dict[int, Parameter | None]) -> None:
    """Make a new layer share parameters with earlier new layers where its serial layer shared them.

    Args:
        name: the qualified name.
        layer: the serial layer.
        made: the parallel layer.
        made_first: maps the identity of a serial parameter to the first parallel parameter made
            from it; extended here.
    """
    for key, whole in _own_parameters(layer).items():
        parameter = _own_parameters(made).get(key)
        if id(whole) not in made_first:
            made_first[id(whole)] = parameter
            continue
        first = made_first[id(whole)]
        if first is None or parameter is None or first.splits != parameter.splits:
            raise UsageError(
                f"parallelize: {name!r} shares parameter {whole.name!r} with another layer, and "
                "the parallel layers do not cut it alike. Leave both out of the plan."
            )
        setattr(made, key, first)


def _own_parameters(layer: Module) -> dict[str, Parameter]:
    """List the parameters that are a layer's own attributes."""
    return {key: value for key, value in vars(layer).items() if isinstance(value, Parameter)}
