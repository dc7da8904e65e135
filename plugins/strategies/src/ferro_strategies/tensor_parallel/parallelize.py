"""parallelize: replace layers of a serial model by parallel ones."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from fnmatch import fnmatchcase
from typing import TypeAlias

from ferro import ProcessGroup, UsageError

from ..nn.checks import first_few
from ..nn.module import Module, replace_modules
from ..nn.parameter import Parameter

# A function that makes a parallel layer from a serial one, as `ColumnParallelLinear.from_serial`.
Convert: TypeAlias = Callable[[Module, ProcessGroup], Module]


def parallelize(module: Module, group: ProcessGroup, plan: Mapping[str, Convert]) -> Module:
    """Replace layers by name; return the module, which is changed in place.

        parallelize(model, group, {
            "*.attention": ParallelAttention.from_serial,
            "*.up": ColumnParallelLinear.from_serial,
            "*.down": RowParallelLinear.from_serial,
            "head": partial(ColumnParallelLinear.from_serial, gather_output=True),
        })

    All ranks call it, with equal models. Make the optimizer afterwards: the parameters are new. If an Embedding and its
    Unembedding are both replaced, the new layers share a table, too.

    Args:
        module: a serial model.
        group: the ranks that share each layer.
        plan: maps patterns of qualified names (`*`, `?`, `[...]`) to functions that make the parallel layer; if several
            patterns match, the first one is used.

    Raises:
        UsageError: a pattern matches nothing, or a layer to be replaced shares a parameter with
            one that is not (nothing was changed); or a layer cannot be converted, or layers that
            share a parameter would shard it differently.
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
    for name, layer in module.named_modules():
        if id(layer) in chosen:
            _check_unshared(module, name, layer, chosen)
    made_first: dict[int, Parameter | None] = {}

    def replacement(name: str, layer: Module) -> Module:
        convert = chosen.get(id(layer))
        if convert is None:
            return layer
        made = convert(layer, group)
        _tie(name, layer, made, made_first)
        return made

    return replace_modules(module, replacement)


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
