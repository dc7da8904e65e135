"""Checkpoint: keep a module's input, and compute its activations again in the backward pass."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np

from ferro.errors import UsageError

from .arrays import Array, namespace_of
from .batchnorm import BatchNorm, ignoring_statistics
from .checks import check_gradient, check_input_gradient
from .containers import checked_module
from .module import Module, Pullback
from .module_state import GeneratorState
from .parameter import Use
from .trees import Arrays, leaves, shapes_of

# The number of elements of each output by which the second pass is compared with the first.
_SAMPLES = 256


class Checkpoint(Module):
    """Activation checkpointing: the function of `module`, in less memory and more time.

    The forward pass keeps only its input; the pullback runs the forward pass again, and then the second pass's
    pullback. Output and gradients are those of `module`, bit for bit: the second pass draws the same random numbers
    (from NumPy generators that modules hold, and from the global ones of NumPy and Python), runs with the same
    `training` flags, and leaves buffers unchanged. A module that draws from another generator, such as a global
    variable, computes another output the second time; this is noticed, and refused.

    Names are those of the wrapped module, so a state dict fits with and without Checkpoint.

    Args:
        module: the module that is computed twice.

    Attributes:
        module: the wrapped module.

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, section 3.
    """

    transparent = True

    def __init__(self, module: Module) -> None:
        self.module = checked_module("Checkpoint", module)
        self.training = module.training
        # The `training` flags with which a forward pass was seen to leave the global generators alone. Their states are
        # large, so later passes with these flags do not keep them.
        self._quiet_flags: tuple[bool, ...] | None = None

    def vjp(self, x: Arrays) -> tuple[Arrays, Pullback]:
        """Compute the wrapped module's output; `x` may not be changed before the pullback."""
        # The set keeps earlier uses alive, so that a rising count shows that this pass made a new one.
        before = [(item, frozenset(item._uses)) for item in self.module.parameters()]
        state = _ForwardState(self.module)
        if state.flags != self._quiet_flags:
            state.keep_global_generators()
        y, dropped = self.module.vjp(x)
        if state.drop_unused_global_generators():
            self._quiet_flags = state.flags
        # Each parameter of this pass keeps a use until the second pass has made its own: without one, another
        # pullback would find the gradient complete.
        uses = [item.use() for item, old in before if item.outstanding_uses > len(old)]
        del dropped
        kept, shape, taken = [(x, state, uses, _samples(y))], shapes_of(y), shapes_of(x)

        def pullback(grad_y: Arrays) -> Arrays | None:
            check_gradient(self, grad_y, shape)
            if not kept:
                raise UsageError(f"{self!r}: this pullback has been run. Call vjp again for another.")
            pull = self._recompute(*kept.pop())
            grad = pull(grad_y)
            check_input_gradient(self.module, grad, taken)
            return grad

        return y, pullback

    def __call__(self, x: Arrays) -> Arrays:
        """Compute the output alone."""
        return self.module(x)

    def __repr__(self) -> str:
        return f"Checkpoint({self.module!r})"

    def _recompute(self, x: Arrays, state: _ForwardState, uses: list[Use], samples: list[Array]) -> Pullback:
        with state.restored():
            y, pull = self.module.vjp(x)
        if not _alike(samples, _samples(y)):
            raise UsageError(
                f"{self!r}: the second forward pass gave another output than the first, so gradients would be wrong. "
                "Either the input or a parameter was changed in between, or a module draws from a random generator "
                "that it does not hold: make the numpy.random.Generator an attribute of the module."
            )
        uses.clear()  # so that the last gradient which the pullback adds is complete
        return pull


class _ForwardState:
    """The state besides input and parameters on which a forward pass depends: `training`, generators.

    Attributes:
        flags: the `training` flags of all modules.
    """

    def __init__(self, module: Module) -> None:
        self._module = module
        self._modules = list(module.modules())
        self._norms = [item for item in self._modules if isinstance(item, BatchNorm)]
        self.flags = tuple(item.training for item in self._modules)
        self._generators = [item for _, item in module.named_generators()]
        self._states = [generator.bit_generator.state for generator in self._generators]
        self._global_states: _GlobalStates | None = None

    def keep_global_generators(self) -> None:
        """Keep the states of the global generators of NumPy and Python, too."""
        self._global_states = _global_states()

    def drop_unused_global_generators(self) -> bool:
        """Drop these states again if nothing was drawn since; return whether they were kept and are dropped."""
        if self._global_states is None or not _equal(self._global_states, _global_states()):
            return False
        self._global_states = None
        return True

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restore the state inside the block; afterwards undo this, and the block's changes of buffers."""
        flags = [item.training for item in self._modules]
        states = [generator.bit_generator.state for generator in self._generators]
        global_states = None if self._global_states is None else _global_states()
        buffers = [(item.data, item.data.copy()) for item in self._module.buffers()]
        self._restore(self.flags, self._states, self._global_states)
        try:
            with ignoring_statistics(self._norms):
                yield
        finally:
            self._restore(flags, states, global_states)
            for array, values in buffers:
                array[...] = values

    def _restore(
        self, flags: Iterable[bool], states: Iterable[GeneratorState], global_states: _GlobalStates | None
    ) -> None:
        for module, flag in zip(self._modules, flags, strict=True):
            module.training = flag
        for generator, state in zip(self._generators, states, strict=True):
            generator.bit_generator.state = state
        if global_states is not None:
            np.random.set_state(global_states[0])
            random.setstate(global_states[1])


# The states of the global functions of numpy.random, and of the module random.
_GlobalStates: TypeAlias = tuple[dict[str, Any], tuple[Any, ...]]


def _global_states() -> _GlobalStates:
    of_numpy: Any = np.random.get_state(legacy=False)
    return of_numpy, random.getstate()


def _equal(first: _GlobalStates, second: _GlobalStates) -> bool:
    return first[1] == second[1] and all(
        np.array_equal(first[0]["state"][key], second[0]["state"][key]) for key in ("key", "pos")
    )


def _samples(tree: Arrays) -> list[Array]:
    """Copy a few elements of each array, evenly spread, by which another output is noticed."""
    samples = []
    for leaf in leaves(tree):
        if hasattr(leaf, "reshape"):
            step = max(1, leaf.size // _SAMPLES)
            samples.append(leaf.reshape(leaf.size)[::step].copy())
    return samples


def _alike(first: list[Array], second: list[Array]) -> bool:
    """Compare samples. The last bits may differ, as a library may compute them in another order the second time."""
    if [(array.shape, array.dtype) for array in first] != [(array.shape, array.dtype) for array in second]:
        return False
    return all(_close(a, b) for a, b in zip(first, second, strict=True))


def _close(a: Array, b: Array) -> bool:
    xp = namespace_of(a)
    if a.dtype.kind in "iub" or bool((a == b).all()):
        return bool((a == b).all())
    wide = np.promote_types(a.dtype, np.float32)
    a, b = a.astype(wide), b.astype(wide)
    finite = xp.isfinite(a)
    if not bool((finite == xp.isfinite(b)).all()):
        return False
    a, b = a[finite], b[finite]
    return a.size == 0 or bool(abs(a - b).max() <= 1e-3 * abs(a).max())
