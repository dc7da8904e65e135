"""Parameter: an array that is learnt, its gradient, and when that gradient is complete.

A pullback adds its share to each parameter's gradient. Whoever reduces gradients between ranks
while the backward pass still runs has to know which share was the last. So a layer announces
each use in its forward half, and adds through what it was handed:

    weight = self.weight.use()              # in vjp: one use is outstanding
    def pullback(grad_y):
        weight.add_grad(...)                # in the pullback: it no longer is

The rule: **a gradient is complete when an addition leaves no use of the parameter outstanding.**
A use is outstanding from `use()` until its addition, or until nothing refers to it any more.
What follows from the rule:

- a parameter used k times (tied weights, a layer called twice) is complete after the k-th
  addition;
- uses are counted over all pullbacks in flight: with several microbatches forward before the
  first goes backward, the gradient is complete after the last of them;
- a pullback that is dropped without being run takes its uses along, so evaluation through `vjp`
  and abandoned microbatches leave nothing behind; `module(x)` keeps no pullback and so no use;
- a pullback that is kept, but never run, keeps its parameters incomplete: drop it;
- right after a forward pass, a parameter with `outstanding_uses == 0` took no part in it;
- a module that drops its pullback to run `vjp` again later holds a `use()` of each of its
  parameters meanwhile, and lets go of it once the second `vjp` has announced its own;
- `zero_grad()` forgets no use, so it may stand between the forward and the backward half.

A strategy that keeps a parameter in pieces lets it `hold` the whole during a pass, and this
rank's piece otherwise: the object, which optimizers know, stays. So a pullback reads `data`
through its use when it needs it, and keeps no reference to the array.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ferro import ProcessGroup, UsageError

from .arrays import Array, matmul, namespace_of


class Parameter:
    """An array that is learnt, and its gradient.

    The gradient lives in one piece of memory for as long as the parameter does: the parameter's
    own, or memory preset by a parallel strategy (see `set_grad_memory`). The first addition
    after `zero_grad()` writes there, later ones add.

    Args:
        data: floating-point NumPy or CuPy array, C-contiguous; kept, not copied.
        name: what messages call it; a strategy sets the qualified name here.
        requires_grad: when False, nothing is accumulated and nobody is told.

    Attributes:
        name: as given.
        requires_grad: as given; may be changed between steps.
        splits: of what this rank holds a piece: each strategy that splits the parameter over
            ranks adds one. () when every rank holds the whole.
        deferred: while a list, products for the gradient are queued there: see `deferring`.
    """

    def __init__(self, data: Array, *, name: str = "", requires_grad: bool = True) -> None:
        self.name = name
        self.data = data
        self.requires_grad = requires_grad
        self.splits: tuple[Split, ...] = ()
        self.deferred: list[Callable[[], None]] | None = None
        self._grad: Array | None = None
        self._memory: Array | None = None
        self._uses: weakref.WeakSet[Use] = weakref.WeakSet()
        self._listeners: list[Callable[[Parameter], None]] = []

    @property
    def data(self) -> Array:
        """The value, which an optimizer changes in place.

        Another array may be assigned, to move the parameter to a GPU or to gather a shard;
        gradient memory that no longer fits is then replaced by `set_grad_memory`.
        """
        return self._data

    @data.setter
    def data(self, value: Array) -> None:
        namespace_of(value)
        if value.dtype.kind in "iub" or not value.flags.c_contiguous:
            raise UsageError(
                f"parameter {self.name!r} needs a C-contiguous floating-point array, got "
                f"{value.dtype}, C-contiguous: {value.flags.c_contiguous}. Convert it with "
                "astype or numpy.ascontiguousarray, or make it a Buffer."
            )
        self._data = value

    @property
    def grad(self) -> Array | None:
        """The gradient, or None until something has been added since `zero_grad()`.

        Assigning an array copies it into the gradient's memory, so `parameter.grad *= scale`
        works in place; assigning None is `zero_grad()`.
        """
        return self._grad

    @grad.setter
    def grad(self, value: Array | None) -> None:
        if value is None:
            self.zero_grad()
        elif value is not self._grad:
            self._check_shape(value.shape)
            self._grad = self._reserve()
            self._grad[...] = value

    @property
    def outstanding_uses(self) -> int:
        """How many uses, over all pullbacks alive, have not added their gradient yet."""
        return len(self._uses)

    def use(self) -> Use:
        """Announce one use in a forward pass; the pullback adds its gradient through it."""
        use = Use(self)
        self._uses.add(use)
        return use

    def add_grad(self, grad: Array) -> None:
        """Add `grad` (of the shape of `data`; never kept) and tell the listeners if it was last.

        A pullback of a layer adds through its `use()`. Adding here is for gradients that belong
        to no announced use; with no use outstanding, each addition then counts as the last.

        Raises:
            UsageError: the shapes differ; nothing was added.
        """
        if not self.requires_grad:
            return
        self._check_shape(grad.shape)
        if self._grad is None:
            self._grad = self._reserve()
            self._grad[...] = grad
        else:
            self._grad += grad
        self._notify()

    def add_grad_product(self, a: Array, b: Array) -> None:
        """Add the matrix product `a @ b`, reshaped to the shape of `data`.

        The same as `add_grad`, but the first product of a step is computed in the gradient's
        memory: no array of the parameter's size is made beside it.
        """
        if not self.requires_grad:
            return
        if a.shape[0] * b.shape[1] != self.data.size:
            self._check_shape((a.shape[0], b.shape[1]))
        if self._grad is None:
            self._grad = self._reserve()
            flat = self._grad.reshape(a.shape[0], b.shape[1])
            matmul(a, b, out=flat)
        else:
            self._grad += matmul(a, b).reshape(self._grad.shape)
        self._notify()

    def add_grad_rows(self, rows: Array, grads: Array) -> None:
        """Add `grads[i]` to row `rows[i]` of the gradient; no row may be named twice.

        The same as `add_grad` of an array that is zero elsewhere, without making that array.
        """
        if not self.requires_grad:
            return
        self._check_shape((self.data.shape[0], *grads.shape[1:]))
        if self._grad is None:
            self._grad = self._reserve()
            self._grad.fill(0)
        self._grad[rows] += grads
        self._notify()

    def zero_grad(self) -> None:
        """Mark the gradient absent; its memory is kept for the next one."""
        self._grad = None

    def set_grad_memory(self, memory: Array | None) -> None:
        """Keep the gradient in `memory` from now on; a gradient already there is copied over.

        Args:
            memory: shape and dtype of `data`, C-contiguous, writeable: a slice of a bucket, say.
                Its owner may read and reduce it in place once the gradient is complete. None:
                the next gradient after `zero_grad()` gets memory of the parameter's own again.

        Raises:
            UsageError: `memory` does not fit; nothing was changed.
        """
        if memory is not None:
            self._check_shape(memory.shape)
            flags = memory.flags
            if memory.dtype != self.data.dtype or not flags.c_contiguous:
                raise UsageError(
                    f"gradient memory of parameter {self.name!r} must be C-contiguous "
                    f"{self.data.dtype}, got {memory.dtype}, C-contiguous: {flags.c_contiguous}."
                )
            # CuPy arrays have no such flag: they are always writeable.
            if not getattr(flags, "writeable", True):
                raise UsageError(f"gradient memory of parameter {self.name!r} is read-only.")
            if self._grad is not None:
                memory[...] = self._grad
                self._grad = memory
        self._memory = memory

    def hold(self, data: Array, *, grad: Array | None, grad_memory: Array | None) -> None:
        """Hold other arrays from now on, of another shape perhaps; uses and listeners stay.

        Args:
            data: the value.
            grad: the gradient so far, of the shape and dtype of `data`; None when there is none.
            grad_memory: where the gradient goes (see `set_grad_memory`), `grad` itself if there
                is one; None: memory of the parameter's own.
        """
        self.data = data
        self._grad = None
        self.set_grad_memory(grad_memory)
        self._grad = grad

    def on_complete(self, listener: Callable[[Parameter], None]) -> Callable[[], None]:
        """Call `listener(parameter)` whenever the gradient is complete, inside that addition.

        Listeners are called in the order they came; what one raises ends the backward pass.

        Returns:
            A function that removes the listener again; call it once.
        """
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def __deepcopy__(self, memo: dict[int, object]) -> Parameter:
        """Copy value and gradient; memory, uses and listeners belong to the original."""
        twin = Parameter(self.data.copy(), name=self.name, requires_grad=self.requires_grad)
        twin.splits = self.splits
        twin.grad = self._grad
        return twin

    def __repr__(self) -> str:
        return f"Parameter({self.name!r}, shape={self.data.shape}, dtype={self.data.dtype})"

    def _reserve(self) -> Array:
        """Return the memory where the gradient goes, whatever it holds now."""
        if self._memory is None:
            data = self.data
            memory: Array = namespace_of(data).empty(data.shape, data.dtype)
            self._memory = memory
        return self._memory

    def _notify(self) -> None:
        if not self._uses:
            for listener in tuple(self._listeners):
                listener(self)

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if shape != self.data.shape:
            raise UsageError(
                f"gradient of parameter {self.name!r} has shape {shape}, "
                f"but the parameter has {self.data.shape}. Correct the pullback that added it."
            )


class Use:
    """One use of a parameter in a forward pass: its value, and where its gradient goes.

    Held by the pullback, and good for one addition.
    """

    __slots__ = ("__weakref__", "_parameter")

    def __init__(self, parameter: Parameter) -> None:
        self._parameter = parameter

    @property
    def data(self) -> Array:
        """The parameter's value as it is now."""
        return self._parameter.data

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient is wanted; when not, a pullback need not compute one."""
        return self._parameter.requires_grad

    def add_grad(self, grad: Array) -> None:
        """Add this use's gradient: see `Parameter.add_grad`."""
        self._spend()
        self._parameter.add_grad(grad)

    def add_grad_product(self, a: Array, b: Array) -> None:
        """Add this use's gradient `a @ b`: see `Parameter.add_grad_product`.

        Where products are deferred, the addition, and so the end of the use, comes later.
        """
        deferred = self._parameter.deferred
        if deferred is None:
            self._add_product(a, b)
        else:
            deferred.append(lambda: self._add_product(a, b))

    def add_grad_rows(self, rows: Array, grads: Array) -> None:
        """Add this use's gradient, rows only: see `Parameter.add_grad_rows`."""
        self._spend()
        self._parameter.add_grad_rows(rows, grads)

    def _add_product(self, a: Array, b: Array) -> None:
        self._spend()
        self._parameter.add_grad_product(a, b)

    def _spend(self) -> None:
        uses = self._parameter._uses
        if self not in uses:
            raise UsageError(
                f"a second gradient for one use of parameter {self._parameter.name!r}: "
                "a pullback can be run only once. Call vjp again for another."
            )
        uses.discard(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How a parameter's pieces lie.

    Attributes:
        group: the ranks that hold pieces, in their order.
        dim: of the whole, along which it is cut; None when it is cut as one flat row.
    """

    group: ProcessGroup
    dim: int | None


@contextmanager
def deferring(parameters: Iterable[Parameter]) -> Iterator[list[Callable[[], None]]]:
    """Queue the products that pullbacks add to these parameters' gradients, instead of adding.

    with deferring(module.parameters()) as products:
        grad_x = pullback(grad_y)
    ...                                     # hand grad_x on
    for product in products: product()      # now the gradients are complete

    A product that is queued keeps its two factors, and its use outstanding. What a layer adds in
    another way than `Use.add_grad_product` is added at once.
    """
    products: list[Callable[[], None]] = []
    held = list(parameters)
    for parameter in held:
        parameter.deferred = products
    try:
        yield products
    finally:
        for parameter in held:
            parameter.deferred = None
