"""Checkpoint: keep a module's input, and compute its activations again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ferro.errors import UsageError

from .batchnorm import BatchNorm, ignoring_statistics
from .checks import check_gradient
from .module import Module, Pullback
from .module_state import GeneratorState
from .parameter import Use
from .trees import Arrays, shapes_of


class Checkpoint(Module):
    """Activation checkpointing: the function of `module`, in less memory and more time.

    The forward pass keeps only its input; the pullback runs the forward pass again, and then the second pass's
    pullback. Output and gradients are those of `module`, bit for bit: the second pass draws the same random numbers
    (from NumPy generators that are attributes of modules), runs with the same `training` flags, and leaves buffers
    unchanged.

    Names are those of the wrapped module, so a state dict fits with and without Checkpoint.

    Args:
        module: the module that is computed twice.

    Attributes:
        module: the wrapped module.

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, section 3.
    """

    transparent = True

    def __init__(self, module: Module) -> None:
        self.module = module
        self.training = module.training

    def vjp(self, x: Arrays) -> tuple[Arrays, Pullback]:
        """Compute the wrapped module's output; `x` may not be changed before the pullback."""
        # The set keeps earlier uses alive, so that a rising count shows that this pass made a new one.
        before = [(item, frozenset(item._uses)) for item in self.module.parameters()]
        state = _ForwardState(self.module)
        y, dropped = self.module.vjp(x)
        # Each parameter of this pass keeps a use until the second pass has made its own: without one, another
        # pullback would find the gradient complete.
        uses = [item.use() for item, old in before if item.outstanding_uses > len(old)]
        del dropped
        kept, shape = [(x, state, uses)], shapes_of(y)

        def pullback(grad_y: Arrays) -> Arrays | None:
            check_gradient(self, grad_y, shape)
            if not kept:
                raise UsageError(f"{self!r}: this pullback has been run. Call vjp again for another.")
            return self._recompute(*kept.pop())(grad_y)

        return y, pullback

    def __call__(self, x: Arrays) -> Arrays:
        """Compute the output alone."""
        return self.module(x)

    def __repr__(self) -> str:
        return f"Checkpoint({self.module!r})"

    def _recompute(self, x: Arrays, state: _ForwardState, uses: list[Use]) -> Pullback:
        with state.restored():
            _, pull = self.module.vjp(x)
        uses.clear()  # so that the last gradient which the pullback adds is complete
        return pull


class _ForwardState:
    """The state besides input and parameters on which a forward pass depends: `training`, generators."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._training = [(item, item.training) for item in module.modules()]
        self._generators = _generator_states(module)
        self._norms = [item for item, _ in self._training if isinstance(item, BatchNorm)]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restore the state inside the block; afterwards undo this, and the block's changes of buffers."""
        training = [(item, item.training) for item, _ in self._training]
        generators = [(generator, generator.bit_generator.state) for generator, _ in self._generators]
        buffers = [(item.data, item.data.copy()) for item in self._module.buffers()]
        _restore(self._training, self._generators)
        try:
            with ignoring_statistics(self._norms):
                yield
        finally:
            _restore(training, generators)
            for array, values in buffers:
                array[...] = values


_GeneratorStates = list[tuple[np.random.Generator, GeneratorState]]


def _generator_states(module: Module) -> _GeneratorStates:
    """List the random generators that modules hold, each once, and their states."""
    return [(generator, generator.bit_generator.state) for _, generator in module.named_generators()]


def _restore(training: list[tuple[Module, bool]], generators: _GeneratorStates) -> None:
    for module, flag in training:
        module.training = flag
    for generator, state in generators:
        generator.bit_generator.state = state
