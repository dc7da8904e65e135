"""ShardedState: the state dicts of a module in pieces, and of its optimizer."""

from __future__ import annotations

from collections.abc import Mapping

from ferro import UsageError

from ..nn.arrays import Array
from ..nn.module import Module
from ..optim import Optimizer
from . import optimizer_state, state
from .passes import Passes
from .plan import Plan
from .state import Entry, FlatShard


class ShardedState(Module):
    """The part of `FSDP` that saves and loads.

    Whole states fit any number of ranks, and programs without FSDP; pieces fit as many ranks.
    Everything is gathered one parameter at a time.
    """

    _entries: Mapping[str, Entry]
    _passes: Passes
    _plan: Plan

    def full_state_dict(self, *, rank0_only: bool = False) -> dict[str, Array]:
        """Gather all parameters, one at a time, and rank 0's buffers; all ranks call it.

        Args:
            rank0_only: give the others an empty dict, and spare them the memory.

        Returns:
            What `state_dict()` of the module without FSDP would be.
        """
        self._check_outside("full_state_dict")
        return state.full(self._entries, dict(self.named_buffers()), self._plan, rank0_only)

    def load_full_state_dict(self, state_dict: Mapping[str, Array]) -> None:
        """Load whole arrays; all ranks call it with the same ones, and keep their pieces.

        Raises:
            UsageError: a name is missing or unexpected, or a shape or dtype differs, on any
                rank; raised on every rank, and nothing was changed.
        """
        self._check_outside("load_full_state_dict")
        state.load_full(self._entries, dict(self.named_buffers()), self._plan, state_dict)

    def sharded_state_dict(self) -> dict[str, FlatShard | Array]:
        """Copy this rank's pieces, and the buffers, which are no pieces. Nothing is sent."""
        return state.sharded(self._entries, dict(self.named_buffers()), self._plan)

    def load_sharded_state_dict(self, state_dict: Mapping[str, FlatShard | Array]) -> None:
        """Load what `sharded_state_dict` gave on as many ranks; all ranks call it.

        Raises:
            UsageError: as from `load_full_state_dict`.
        """
        self._check_outside("load_sharded_state_dict")
        state.load_sharded(self._entries, dict(self.named_buffers()), self._plan, state_dict)

    def state_dict(self) -> dict[str, Array]:
        """Return `full_state_dict()`, which fits the module with and without FSDP."""
        return self.full_state_dict()

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Load a whole state: see `load_full_state_dict`."""
        self.load_full_state_dict(state)

    def full_optimizer_state_dict(
        self, optimizer: Optimizer, *, rank0_only: bool = False
    ) -> dict[str, Array]:
        """Gather the state of an optimizer of this module's parameters; all ranks call it.

        Returns:
            Arrays of the parameters' whole shapes by "<parameter name>.<name of state>", and
            "lr"; nothing of parameters that have not been updated yet.
        """
        self._check_outside("full_optimizer_state_dict")
        return optimizer_state.full(self._entries, optimizer, self._plan, rank0_only)

    def load_full_optimizer_state_dict(
        self, optimizer: Optimizer, state_dict: Mapping[str, Array]
    ) -> None:
        """Load what `full_optimizer_state_dict` gave, on any number of ranks; all ranks call it.

        Raises:
            UsageError: as from `load_full_state_dict`.
        """
        self._check_outside("load_full_optimizer_state_dict")
        optimizer_state.load_full(self._entries, optimizer, self._plan, state_dict)

    def sharded_optimizer_state_dict(self, optimizer: Optimizer) -> dict[str, FlatShard | Array]:
        """Copy this rank's state of an optimizer. Nothing is sent."""
        return optimizer_state.sharded(self._entries, optimizer, self._plan)

    def load_sharded_optimizer_state_dict(
        self, optimizer: Optimizer, state_dict: Mapping[str, FlatShard | Array]
    ) -> None:
        """Load what `sharded_optimizer_state_dict` gave on as many ranks; all ranks call it.

        Raises:
            UsageError: as from `load_full_state_dict`.
        """
        self._check_outside("load_sharded_optimizer_state_dict")
        optimizer_state.load_sharded(self._entries, optimizer, self._plan, state_dict)

    def _check_outside(self, what: str) -> None:
        if self._passes.joining is not None or not self._passes.is_outside:
            raise UsageError(
                f"FSDP.{what}: not inside join() or a pass, where the other ranks would not take "
                "part. Call it between steps, on every rank."
            )
