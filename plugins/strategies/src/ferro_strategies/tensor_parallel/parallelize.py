"""parallelize: put parallel layers in the place of a serial model's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import TypeAlias

from ferro import ProcessGroup, UsageError

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

    Args:
        module: a serial model.
        group: the ranks that share each layer.
        plan: from a pattern of qualified names (`*`, `?`, `[...]`) to what makes the parallel
            layer; of several that match, the first counts.

    Raises:
        UsageError: a pattern matches nothing, or a layer to be replaced shares a parameter with
            one that is not (nothing was changed); or a layer cannot be converted.
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
            _check_own(module, name, layer)
    if unused:
        names = ", ".join(name for name, _ in module.named_modules() if name)
        raise UsageError(
            f"parallelize: no module is called like {sorted(unused)}. There are: {names}."
        )

    def replacement(_: str, layer: Module) -> Module:
        convert = chosen.get(id(layer))
        return layer if convert is None else convert(layer, group)

    return replace_modules(module, replacement)


def _check_own(root: Module, name: str, layer: Module) -> None:
    """See that nothing outside `layer` has its parameters, which would be torn apart."""
    inside = {id(item) for item in layer.modules()}
    own = {id(parameter): parameter for parameter in layer.parameters()}
    for other_name, other in root.named_modules():
        if id(other) in inside:
            continue
        for held in vars(other).values():
            if isinstance(held, Parameter) and id(held) in own:
                raise UsageError(
                    f"parallelize: {name!r} and {other_name!r} share parameter {held.name!r}; in "
                    "pieces of its own it would no longer be shared. Leave both out of the plan, "
                    "and put ParallelEmbedding and ParallelUnembedding there, which share theirs."
                )
