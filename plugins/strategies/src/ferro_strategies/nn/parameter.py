"""Parameter: a trained array and its gradient, with a notification when the gradient is complete.

Each pullback adds a term to a parameter's gradient. A strategy that reduces gradients between ranks
while the backward pass runs has to know which term was the last. So a layer announces each use of
a parameter in its forward pass, and adds the gradient through that `Use`:

    weight = self.weight.use()              # in vjp: one use is outstanding
    def pullback(grad_y):
        weight.add_grad(...)                # in the pullback: the use is no longer outstanding

The rule: **a gradient is complete when an addition leaves no use of the parameter outstanding.**
A use is outstanding from `use()` until its addition, or until nothing refers to it any more.
The rule has these consequences:

- The gradient of a parameter used k times (tied weights, a layer called twice) is complete after
  the k-th addition.
- Uses are counted over all pullbacks in flight: when several microbatches go forward before the
  first goes backward, the gradient is complete after the last of them.
- Dropping a pullback that has not run drops its uses, so evaluation through `vjp` and abandoned microbatches have no
  effect; `module(x)` keeps no pullback and so no use.
- A pullback that is kept but never run keeps its parameters' gradients incomplete: drop it.
- Right after a forward pass, a parameter with `outstanding_uses == 0` took no part in it.
- A module that drops its pullback to run `vjp` again later holds a `use()` of each parameter in
  between, and drops it when the second `vjp` has announced its own.
- `zero_grad()` keeps uses, so it may be called between the forward and the backward pass.

A strategy that splits a parameter makes it `hold` the whole array during a pass, and this rank's piece otherwise; the
Parameter object, which optimizers refer to, stays the same. So a pullback reads `data` through its use when it needs
the value, and keeps no reference to the array.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np

from ferro import ProcessGroup, UsageError

from .arrays import Array, matmul, namespace_of, wide_dtype
from .gradient_checks import check_grad, check_grad_product, check_grad_rows, check_grad_shape
from .initialization import DeferredValue
from .split import Split as Split
from .state_owner import StateOwner


class Parameter:
    """A trained array and its gradient.

    The gradient always lives in the same memory: the parameter's own, or memory given by a
    strategy (see `set_grad_memory`). The first addition after `zero_grad()` overwrites that
    memory, later ones add to it. The gradient of a parameter in half precision is float32, because
    many microbatches add up in it.

    Args:
        data: floating-point NumPy or CuPy array, C-contiguous; it is not copied. Or a value from `nn.drawn`, for a
            layer that can be built inside `deferred()`.
        name: name for messages; a strategy sets the qualified name.
        requires_grad: whether gradients are accumulated and listeners called.

    Attributes:
        name: as given.
        requires_grad: as given; may be changed between steps.
        splits: one entry for each strategy that split the parameter over ranks; () when every
            rank holds the whole parameter.
        stages: in a pipeline, the ranks that have the model's other parameters; None elsewhere.
        tied_copy: whether another stage of the pipeline has the copy of this parameter that counts in norms.
        deferred: a list while `deferring` queues products for the gradient there, otherwise None.
        times_zeroed: the number of calls of `zero_grad()`. A strategy that keeps a part of the gradient elsewhere
            drops that part when this number has changed.
        grad_is_used: whether an optimizer's step has used the present gradient, or skipped it; an addition ends that.
        step_guards: functions by the kind of strategy, which an optimizer calls with its learning rate before it
            changes the parameter; a strategy refuses a step there whose gradients are not those of all ranks.
    """

    def __init__(self, data: Array | DeferredValue, *, name: str = "", requires_grad: bool = True) -> None:
        self.name = name
        self._deferred_value: DeferredValue | None = None
        if isinstance(data, DeferredValue):
            self._deferred_value = data
        else:
            self.data = data
        self.requires_grad = requires_grad
        self.splits: tuple[Split, ...] = ()
        self.stages: ProcessGroup | None = None
        self.tied_copy = False
        self.deferred: list[Callable[[], None]] | None = None
        self._grad: Array | None = None
        self._memory: Array | None = None
        self._uses: weakref.WeakSet[Use] = weakref.WeakSet()
        self._listeners: list[Callable[[Parameter], None]] = []
        self.step_guards: dict[str, Callable[[float], None]] = {}
        self._state_owners: list[weakref.ref[StateOwner[Parameter]]] = []
        self.times_zeroed = 0
        self.grad_is_used = False

    @property
    def data(self) -> Array:
        """The value, which an optimizer changes in place.

        Another array may be assigned, to move the parameter to a GPU for example; replace gradient
        memory that no longer fits by `set_grad_memory`.

        Raises:
            UsageError: on reading, the parameter was built inside `deferred()` and has no array yet.
        """
        # A deferred parameter has no attribute _data, so that reading needs no test in the others.
        try:
            return self._data
        except AttributeError:
            raise self._missing_value() from None

    @data.setter
    def data(self, value: Array) -> None:
        if isinstance(value, np.generic):
            value = np.asarray(value)
        namespace_of(value)
        if value.dtype.kind not in "fcV" or not value.flags.c_contiguous:  # V: dtypes of ml_dtypes
            raise UsageError(
                f"parameter {self.name!r} needs a C-contiguous floating-point array, got "
                f"{value.dtype}, C-contiguous: {value.flags.c_contiguous}. Convert it with "
                "astype or numpy.ascontiguousarray, or make it a Buffer."
            )
        self._data = value
        self._deferred_value = None

    @property
    def is_deferred(self) -> bool:
        """Whether the parameter was built inside `deferred()`, and has no array yet."""
        return self._deferred_value is not None

    def materialize(self) -> None:
        """Draw the value of a deferred parameter; others stay as they are."""
        if self._deferred_value is not None:
            self.data = self.draw()

    def draw(self) -> Array:
        """Return the value; that of a deferred parameter is drawn, and not kept."""
        return self.data if self._deferred_value is None else self._deferred_value.draw()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what this parameter holds on this rank, also while it is deferred."""
        return self.data.shape if self._deferred_value is None else self._deferred_value.shape

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the value, also while it is deferred."""
        return self.data.dtype if self._deferred_value is None else self._deferred_value.dtype

    @property
    def grad(self) -> Array | None:
        """The gradient, or None until the first addition after `zero_grad()`.

        Assigning an array copies it into the gradient's memory, so `parameter.grad *= scale`
        works in place; assigning None is `zero_grad()`.
        """
        return self._grad

    @grad.setter
    def grad(self, value: Array | None) -> None:
        if value is None:
            self.zero_grad()
        elif value is not self._grad:
            check_grad_shape(self.name, self.data, value.shape)
            self._grad = self._reserve()
            self._grad[...] = value
            self.grad_is_used = False

    @property
    def grad_dtype(self) -> np.dtype:
        """The dtype of the gradient: float32 for half precision, otherwise that of the value."""
        return _grad_dtype(self.dtype)

    @property
    def outstanding_uses(self) -> int:
        """The number of uses, over all existing pullbacks, that have not added their gradient."""
        return len(self._uses)

    def use(self) -> Use:
        """Announce one use in a forward pass; the pullback adds its gradient through it."""
        use = Use(self)
        self._uses.add(use)
        return use

    def add_grad(self, grad: Array) -> None:
        """Add `grad`, and call the listeners if the gradient is then complete.

        A layer's pullback adds through its `use()`. Call this directly for gradients that belong
        to no announced use; with no use outstanding, each addition completes the gradient.

        Args:
            grad: an array of the shape of `data`; the parameter keeps no reference to it.

        Raises:
            UsageError: the shapes differ; nothing was added.
        """
        if not self.requires_grad:
            return
        check_grad(self.name, self.data, grad)
        self._add(grad)

    def _add(self, grad: Array) -> None:
        if self._grad is None:
            self._grad = self._reserve()
            self._grad[...] = grad
        else:
            self._grad += grad
        self._notify()

    def add_grad_product(self, a: Array, b: Array) -> None:
        """Add the matrix product `a @ b`, reshaped to the shape of `data`.

        This equals `add_grad`, but computes the first product of a step in the gradient's memory,
        without another array of the parameter's size. The rows of the product stand for the first dimensions of
        `data`, its columns for the others.

        Raises:
            UsageError: the product does not fit so; nothing was added.
        """
        if not self.requires_grad:
            return
        check_grad_product(self.name, self.data, a, b)
        self._add_product(a, b)

    def _add_product(self, a: Array, b: Array) -> None:
        if self._grad is None:
            self._grad = self._reserve()
            flat = self._grad.reshape(a.shape[0], b.shape[1])
            matmul(a, b, out=flat)
        else:
            self._grad += matmul(a, b).reshape(self._grad.shape)
        self._notify()

    def add_grad_rows(self, rows: Array, grads: Array) -> None:
        """Add `grads[i]` to row `rows[i]` of the gradient; `rows` has no duplicates.

        This equals `add_grad` of an array that is zero elsewhere, without making that array.
        """
        if not self.requires_grad:
            return
        check_grad_rows(self.name, self.data, rows, grads)
        self._add_rows(rows, grads)

    def _add_rows(self, rows: Array, grads: Array) -> None:
        if self._grad is None:
            self._grad = self._reserve()
            self._grad.fill(0)
        self._grad[rows] += grads
        self._notify()

    def zero_grad(self) -> None:
        """Set the gradient to None, and keep its memory for the next one."""
        self._grad = None
        self.times_zeroed += 1

    def set_grad_memory(self, memory: Array | None) -> None:
        """Keep the gradient in `memory` from now on, and copy the present gradient there.

        Args:
            memory: a C-contiguous, writeable array of the shape of `data`, of `grad_dtype` or the dtype of `data`,
                such as a part of a bucket. Its owner may reduce it in place once the gradient is complete. None: the
                next gradient after `zero_grad()` gets memory of the parameter's own.

        Raises:
            UsageError: `memory` does not fit; nothing was changed.
        """
        if memory is not None:
            check_grad_shape(self.name, self.data, memory.shape)
            flags = memory.flags
            if (memory.dtype != self._data.dtype and memory.dtype != self.grad_dtype) or not flags.c_contiguous:
                raise UsageError(
                    f"gradient memory of parameter {self.name!r} must be C-contiguous "
                    f"{self.grad_dtype}, got {memory.dtype}, C-contiguous: {flags.c_contiguous}."
                )
            # CuPy arrays have no such flag: they are always writeable.
            if not getattr(flags, "writeable", True):
                raise UsageError(f"gradient memory of parameter {self.name!r} is read-only.")
            if self._grad is not None:
                memory[...] = self._grad
                self._grad = memory
        self._memory = memory

    def hold(self, data: Array, *, grad: Array | None, grad_memory: Array | None) -> None:
        """Replace value and gradient by arrays of any other shape; uses and listeners stay.

        Args:
            data: the value.
            grad: the present gradient, of the shape of `data`, or None.
            grad_memory: memory for the gradient (see `set_grad_memory`), which is `grad` itself
                unless that is None; None: memory of the parameter's own.
        """
        self.data = data
        self._grad = None
        self.set_grad_memory(grad_memory)
        self._grad = grad

    def on_complete(self, listener: Callable[[Parameter], None]) -> Callable[[], None]:
        """Call `listener(parameter)` whenever the gradient is complete, inside that addition.

        Listeners are called in the order in which they were added; an exception of a listener ends
        the backward pass.

        Returns:
            A function that removes the listener again; call it once.
        """
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def add_state_owner(self, owner: StateOwner[Parameter]) -> None:
        """Record an object that keeps state for this parameter, such as an optimizer; it is not kept alive."""
        self._state_owners = [ref for ref in self._state_owners if ref() is not None]
        self._state_owners.append(weakref.ref(owner))

    @property
    def state_owners(self) -> list[StateOwner[Parameter]]:
        """The objects that keep state for this parameter, in the order in which they were made."""
        return [owner for ref in self._state_owners if (owner := ref()) is not None]

    def __deepcopy__(self, memo: dict[int, object]) -> Parameter:
        """Copy value and gradient; gradient memory, uses and listeners stay with the original."""
        value = self._deferred_value or self.data.copy()
        twin = Parameter(value, name=self.name, requires_grad=self.requires_grad)
        twin.splits = self.splits
        twin.grad = self._grad
        twin.grad_is_used = self.grad_is_used
        return twin

    def __getstate__(self) -> dict[str, object]:
        """Keep value and gradient for pickle; gradient memory, uses and listeners stay with the original.

        Raises:
            UsageError: the parameter is in pieces, of which this rank has one.
        """
        if self.splits:
            raise UsageError(
                f"parameter {self.name!r} is in pieces over the ranks of group {self.splits[0].group.name!r}, so it "
                "cannot be pickled. Save model.state_dict(), or for a tensor-parallel model its full_state_dict."
            )
        return {"data": self.draw(), "name": self.name, "requires_grad": self.requires_grad, "grad": self._grad}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a parameter of what `__getstate__` kept."""
        Parameter.__init__(self, state["data"], name=state["name"], requires_grad=state["requires_grad"])
        self.grad = state["grad"]

    def __repr__(self) -> str:
        return f"Parameter({self.name!r}, shape={self.shape}, dtype={self.dtype}{', deferred' * self.is_deferred})"

    def _missing_value(self) -> UsageError:
        return UsageError(
            f"parameter {self.name!r} of shape {self.shape} was built inside deferred(), and has no value yet. Call "
            "model.materialize() to draw all values, load a state, or give the model to FSDP, Pipeline or tensor "
            "parallelism, which draw what they keep."
        )

    def _reserve(self) -> Array:
        """Allocate the gradient's memory if there is none; its content is arbitrary."""
        if self._memory is None:
            data = self.data
            memory: Array = namespace_of(data).empty(data.shape, self.grad_dtype)
            self._memory = memory
        return self._memory

    def _notify(self) -> None:
        self.grad_is_used = False
        if not self._uses:
            for listener in tuple(self._listeners):
                listener(self)


class Use:
    """One use of a parameter in a forward pass; the pullback adds one gradient through it."""

    __slots__ = ("__weakref__", "_parameter")

    def __init__(self, parameter: Parameter) -> None:
        self._parameter = parameter

    @property
    def data(self) -> Array:
        """The parameter's present value."""
        return self._parameter.data

    @property
    def requires_grad(self) -> bool:
        """True when the pullback has to compute a gradient."""
        return self._parameter.requires_grad

    def add_grad(self, grad: Array) -> None:
        """Add this use's gradient: see `Parameter.add_grad`. A gradient that is refused leaves the use outstanding."""
        self._check_outstanding()
        parameter = self._parameter
        if parameter.requires_grad:
            check_grad(parameter.name, parameter.data, grad)
        parameter._uses.discard(self)
        if parameter.requires_grad:
            parameter._add(grad)

    def add_grad_product(self, a: Array, b: Array) -> None:
        """Add this use's gradient `a @ b`: see `Parameter.add_grad_product`.

        Where products are deferred, the use is outstanding until the product is added.
        """
        self._check_outstanding()
        parameter = self._parameter
        if parameter.requires_grad:
            check_grad_product(parameter.name, parameter.data, a, b)
        if parameter.deferred is None:
            self._end_with_product(a, b)
        else:
            parameter.deferred.append(lambda: self._add_deferred_product(a, b))

    def add_grad_rows(self, rows: Array, grads: Array) -> None:
        """Add some rows of this use's gradient: see `Parameter.add_grad_rows`."""
        self._check_outstanding()
        parameter = self._parameter
        if parameter.requires_grad:
            check_grad_rows(parameter.name, parameter.data, rows, grads)
        parameter._uses.discard(self)
        if parameter.requires_grad:
            parameter._add_rows(rows, grads)

    def _add_deferred_product(self, a: Array, b: Array) -> None:
        self._check_outstanding()
        self._end_with_product(a, b)

    def _end_with_product(self, a: Array, b: Array) -> None:
        parameter = self._parameter
        parameter._uses.discard(self)
        if parameter.requires_grad:
            parameter._add_product(a, b)

    def _check_outstanding(self) -> None:
        if self not in self._parameter._uses:
            raise UsageError(
                f"a second gradient for one use of parameter {self._parameter.name!r}: "
                "a pullback can be run only once. Call vjp again for another."
            )


def check_step(parameters: Iterable[Parameter], lr: float) -> None:
    """Ask the strategies of these parameters whether an optimizer may change them now.

    Raises:
        UsageError: a strategy refuses the step.
    """
    guarded = (parameter.step_guards.values() for parameter in parameters if parameter.step_guards)
    guards = {id(guard): guard for held in guarded for guard in held}
    for guard in guards.values():
        guard(lr)


@cache
def _grad_dtype(dtype: np.dtype) -> np.dtype:
    return wide_dtype(dtype)
