"""parallelize: put parallel layers in the place of a serial model's."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from fnmatch import fnmatchcase
from typing import TypeAlias

from ferro import ProcessGroup, UsageError

from ..nn.checks import first_few
from ..nn.module import Module, replace_modules
from ..nn.parameter import Parameter

# Makes a parallel layer of a serial one, such as `ColumnParallelLinear.from_serial`.
Convert: TypeAlias = Callable[[Module, ProcessGroup], Module]


def parallelize(module: Module, group: ProcessGroup, plan: Mapping[str, Convert]) -> Module:
    """Replace layers by name; return the module, which is changed in place.

        parallelize(model, group, {
            "*.attention": ParallelAttention.from_serial,
            "*.up": ColumnParallelLinear.from_serial,
            "*.down": RowParallelLinear.from_serial,
            "head": partial(ColumnParallelLinear.from_serial, gather_output=True),
        })

    All ranks call it, with equal models. Make the optimizer afterwards: the parameters are new.
    What an Embedding and its Unembedding share they share afterwards, where both are replaced.

    Args:
        module: a serial model.
        group: the ranks that share each layer.
        plan: from a pattern of qualified names (`*`, `?`, `[...]`) to what makes the parallel
            layer; of several that match, the first counts.

    Raises:
        UsageError: a pattern matches nothing, or a layer to be replaced shares a parameter with
            one that is not (nothing was changed); or a layer cannot be converted, or layers that
            share a parameter would cut it differently.
    """
    chosen: dict[int, Convert] = {}
    unused = set(plan)
    for name, layer in module.named_modules():
        if layer.transparent:
            continue  # the module inside goes by the same name, and is what is meant
        matching = [pattern for pattern in plan if fnmatchcase(name, pattern)]
        if matching:
            unused.difference_update(matching)
            chosen[id(layer)] = plan[matching[0]]
    if unused:
        names = ", ".join(first_few([name for name, _ in module.named_modules() if name]))
        raise UsageError(
            f"parallelize: no module is called like {sorted(unused)}. There are: {names}."
        )
    for name, layer in module.named_modules():
        if id(layer) in chosen:
            _check_own(module, name, layer, chosen)
    pieces: dict[int, Parameter | None] = {}

    def replacement(name: str, layer: Module) -> Module:
        convert = chosen.get(id(layer))
        if convert is None:
            return layer
        made = convert(layer, group)
        _share_again(name, layer, made, pieces)
        return made

    return replace_modules(module, replacement)


def _check_own(root: Module, name: str, layer: Module, chosen: Container[int]) -> None:
    """See that nobody outside `layer` has its parameters, but layers that are replaced, too."""
    inside = {id(item) for item in layer.modules()}
    own = {id(parameter) for parameter in layer.parameters()}
    for other_name, other in root.named_modules():
        if id(other) in inside or id(other) in chosen:
            continue
        for held in _held(other).values():
            if id(held) in own:
                raise UsageError(
                    f"parallelize: {name!r} and {other_name!r} share parameter {held.name!r}; in "
                    "pieces of its own it would no longer be shared. Put both into the plan, or "
                    "neither: for an Embedding and its Unembedding, ParallelEmbedding.from_serial "
                    "and ParallelUnembedding.from_serial."
                )


def _share_again(
    name: str, layer: Module, made: Module, pieces: dict[int, Parameter | None]
) -> None:
    """Let what was made hold the pieces that an earlier layer with the same parameter has.

    Args:
        name: the qualified name.
        layer: the serial layer.
        made: the parallel one.
        pieces: by the identity of a serial parameter, the piece made first; completed here.
    """
    for key, whole in _held(layer).items():
        piece = _held(made).get(key)
        if id(whole) not in pieces:
            pieces[id(whole)] = piece
            continue
        first = pieces[id(whole)]
        if first is None or piece is None or first.splits != piece.splits:
            raise UsageError(
                f"parallelize: {name!r} shares parameter {whole.name!r} with another layer, and "
                "the parallel layers do not cut it alike. Leave both out of the plan."
            )
        setattr(made, key, first)


def _held(layer: Module) -> dict[str, Parameter]:
    """Return the parameters that are a layer's own attributes."""
    return {key: value for key, value in vars(layer).items() if isinstance(value, Parameter)}
