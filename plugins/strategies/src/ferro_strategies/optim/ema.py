"""EMA: an exponential moving average of weights, to evaluate with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from ferro.errors import UsageError

from ..nn.arrays import Array, namespace_of, wide_dtype
from ..nn.module import Module
from ..nn.parameter import Parameter
from .blocks import update_blocks
from .checkpointed_state import CheckpointedState
from .optimizer import Optimizer


class EMA(CheckpointedState):
    """An exponential moving average of every parameter's values, which are often better than the last ones.

        ema = EMA(model, decay=0.999, optimizer=optimizer)
        for x, labels in batches: ...; optimizer.step(); optimizer.zero_grad()
        with ema.applied(): evaluate(model)

    It begins with the present values. Each rank averages what it holds, so that under FSDP, tensor parallelism and
    pipelines nothing is sent. It may be made before or after the model is wrapped. The averages of parameters in half
    precision are float32.

    `state_dict` has this rank's arrays; an FSDP module's `full_optimizer_state_dict(ema)` gathers whole ones.

    Args:
        parameters: a module, or parameters.
        decay: the weight of the old average in each update, from 0 to 1.
        optimizer: update at the end of each of its steps, also of those that a rank without batches makes inside
            `join`; a step that a loss scaler skips does not count. None: call `update` after each step.

    Attributes:
        decay: as given.
        updates: the number of updates.
        state: for each parameter, its average, "average".

    Raises:
        UsageError: `decay` is out of its range.

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992.
    """

    def __init__(
        self, parameters: Module | Iterable[Parameter], decay: float = 0.999, *, optimizer: Optimizer | None = None
    ) -> None:
        module = parameters if isinstance(parameters, Module) else None
        super().__init__(list(parameters.parameters() if isinstance(parameters, Module) else parameters), module)
        _check_decay(decay)
        self.decay = float(decay)
        self.updates = 0
        self.state = [self.initial_state(index) for index in range(len(self.parameters))]
        if optimizer is not None:
            optimizer.after_step(self.update)

    def update(self) -> None:
        """Move every average to its parameter's value: average = decay * average + (1 - decay) * value.

        Raises:
            UsageError: a parameter holds an array of another shape than its average; nothing was changed.
        """
        self.check_fits()
        self.updates += 1
        for parameter, state in zip(self.parameters, self.state, strict=True):
            average = state["average"]
            xp, value = namespace_of(average), parameter.data.astype(average.dtype, copy=False)
            for scratch, mean, new in update_blocks(average, value, []):
                xp.subtract(new, mean, out=scratch)
                scratch *= 1 - self.decay
                mean += scratch

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the parameters have their averages in the block, and their own values, bit for bit, afterwards.

        A checkpoint with an optimizer or an EMA in it cannot be saved or loaded in the block, as it would have the
        averages as the weights. One of the model alone can be saved, and has the averages.

        Raises:
            UsageError: a parameter was changed in the block; it has its own value again.
        """
        self.check_fits()
        own = [parameter.data.copy() for parameter in self.parameters]
        for parameter, state in zip(self.parameters, self.state, strict=True):
            parameter.data[...] = state["average"]
        self.is_applied = True
        changed = []
        try:
            yield
        finally:
            self.is_applied = False
            for index, (parameter, value) in enumerate(zip(self.parameters, own, strict=True)):
                average = self.state[index]["average"].astype(value.dtype)
                if not namespace_of(value).array_equal(parameter.data, average):
                    changed.append(parameter.name or str(index))
                parameter.data[...] = value
        if changed:
            raise UsageError(
                f"EMA.applied: parameters {changed[:4]} were changed while they had their averages. Train outside the "
                "block. They have the values from before it."
            )

    def initial_state(self, index: int) -> dict[str, Array]:
        """Begin the average of the parameter at this position with its value."""
        data = self.parameters[index].data
        return {"average": data.astype(wide_dtype(data.dtype))}

    def settings_state(self) -> dict[str, Array]:
        """Copy the settings: "decay" and "updates"."""
        return {"decay": np.array(self.decay, np.float64), "updates": np.array(self.updates, np.int64)}

    def settings_faults(self, state: Mapping[str, Array]) -> list[str]:
        """List the reasons why `load_settings` cannot take these arrays; empty if it can."""
        faults = [f"missing {name!r}" for name in ("decay", "updates") if name not in state]
        faults += [f"unexpected {name!r}" for name in state if name not in ("decay", "updates")]
        faults += [f"{name!r} is no single number" for name, value in state.items() if value.shape != ()]
        return faults

    def load_settings(self, state: Mapping[str, Array]) -> None:
        """Restore what `settings_state` copied."""
        self.decay, self.updates = float(state["decay"]), int(state["updates"])


def _check_decay(decay: float) -> None:
    if not 0 <= decay <= 1:
        raise UsageError(f"EMA: decay must be from 0 to 1, got {decay}.")
