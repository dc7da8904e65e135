"""WholeNames: the names that a stage's parameters, buffers and generators have in the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ...nn.containers import Sequential
from ...nn.module import Module
from .ties import Tie


class WholeNames:
    """The names in the model that the stages together are.

    If `split_model` has made all stages, it is the Sequential that was split; otherwise it is `Sequential(*stages)`.
    All copies of a tied parameter have the name of the first.

    Args:
        first_layers: for each stage of the pipeline, the index of its first layer in the model that `split_model` has
            split; -1 for another stage.
        ties: all ties of the pipeline.
    """

    def __init__(self, first_layers: Sequence[int], ties: Sequence[Tie]) -> None:
        self._first_layers = first_layers
        self._was_split = min(first_layers) >= 0
        self._tied: dict[str, str] = {}
        for tie in ties:
            whole = self.of(f"{min(tie)}.{tie[min(tie)]}")
            self._tied |= {f"{stage}.{name}": whole for stage, name in tie.items()}

    def of(self, name: str) -> str:
        """Translate a name that begins with a stage's number, such as "3.layers.0.weight"."""
        if name in self._tied:
            return self._tied[name]
        stage, _, inner = name.partition(".")
        container, _, rest = inner.partition(".")
        index, _, rest = rest.partition(".")
        if not self._was_split or container != "layers" or not index.isdecimal():
            return f"layers.{stage}.{inner}"
        return f"layers.{self._first_layers[int(stage)] + int(index)}.{rest}"


def own_first_layers(stages: Mapping[int, Module], count: int) -> npt.NDArray[np.int64]:
    """Find the first layers of this rank's stages, for `WholeNames`; -1 for others.

    Args:
        stages: this rank's stages by their numbers.
        count: the number of stages of the pipeline.
    """
    found = np.full(count, -1, np.int64)
    for number, stage in stages.items():
        for name, module in stage.named_modules():
            if name:
                break
            # A wrapper such as DDP has the same name as the stage in it.
            if isinstance(module, Sequential) and module.first_layer is not None:
                found[number] = module.first_layer
    return found
