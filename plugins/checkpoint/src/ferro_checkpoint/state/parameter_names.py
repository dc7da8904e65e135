"""The names of modules' parameters, by which optimizers name their arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping


class ParameterNames:
    """The parameters of all modules of a state; which names an optimizer gets does not depend on the modules' order.

    An optimizer's arrays have the names of the module that holds most of its parameters; of several, the largest. If it
    has parameters of other modules, too, the path of each module in the state comes first: "encoder.0.weight".
    """

    def __init__(self) -> None:
        self._modules: dict[str, Mapping[str, object]] = {}
        self._owners: dict[int, list[str]] = {}

    def add(self, path: str, parameters: Mapping[str, object]) -> None:
        """Add the parameters of the module at a path of the state."""
        self._modules[path] = parameters
        for parameter in parameters.values():
            self._owners.setdefault(id(parameter), []).append(path)

    def of(self, parameters: Iterable[object] | None) -> dict[int, str]:
        """Name parameters, by their `id`, for one optimizer.

        Args:
            parameters: those of the optimizer; None if it does not tell.

        Returns:
            The names of all parameters of the modules to which these belong.
        """
        left = None if parameters is None else {id(each) for each in parameters if id(each) in self._owners}
        chosen: list[str] = []
        while left:
            counts = Counter(path for each in left for path in self._owners[each])
            best = min(counts, key=lambda path: (-counts[path], *self._order(path)))
            chosen.append(best)
            left -= {id(each) for each in self._modules[best].values()}
        are_many = len(chosen) > 1
        names: dict[int, str] = {}
        for path in chosen or sorted(self._modules, key=self._order):
            for name, parameter in self._modules[path].items():
                names.setdefault(id(parameter), f"{path}.{name}" if are_many else name)
        return names

    def frozen(self, names: Mapping[int, str]) -> set[str]:
        """List those of these names whose parameters are not trained."""
        return {
            names[id(each)]
            for parameters in self._modules.values()
            for each in parameters.values()
            if id(each) in names and not getattr(each, "requires_grad", True)
        }

    def _order(self, path: str) -> tuple[int, str]:
        return -len(self._modules[path]), path
