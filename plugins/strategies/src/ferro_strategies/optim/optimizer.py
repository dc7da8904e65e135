"""Optimizer: the base of all optimizers, with parameter groups, state, schedules, and updates in place."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ferro.errors import UsageError

from ..nn.arrays import Array
from ..nn.checks import first_few
from ..nn.module import Module
from ..nn.parameter import Parameter, check_step
from .blocks import cached_wide_dtype
from .checkpointed_state import CheckpointedState
from .group_values import matched_groups, merged_groups, with_group_names
from .groups import GroupSetting, ParameterGroup, Parameters, Settings, make_groups
from .schedules import Schedule, check_schedule

MASTER = "master"


class Optimizer(CheckpointedState):
    """The base of optimizers, which change parameters in place by their gradients.

    State and arithmetic of a parameter in half precision are float32. With `master_weights` the optimizer also keeps
    its value in float32, updates that, and rounds it to the parameter; changes too small for half precision then add
    up. A complex number is updated as two real ones.

    Args:
        parameters: a module, whose parameters are then compared with the optimizer's at every step, so that a layer
            that was added or replaced is noticed; or parameters; or groups of them with settings of their own, as
            [{"params": [...], "weight_decay": 0.0}, {"params": [...], "lr": 0.01}].
        settings: the settings of all groups, which are not given in a group itself.
        master_weights: whether parameters in half precision have a float32 copy, the state "master".

    Attributes:
        parameters: the parameters of all groups, in the order given.
        groups: the groups, whose settings may be changed between steps: `optimizer.groups[0]["lr"] = 0.1`.
        lr: learning rate of all groups; assign to it, or `follow` a schedule.
        state: see `ParameterState`.

    Raises:
        UsageError: a parameter is given twice, or another object is given; or a setting is unknown or out of its range.
    """

    whole_arrays = frozenset({"t"})
    lr = GroupSetting[float]()

    def __init__(self, parameters: Parameters, settings: Settings, *, master_weights: bool = True) -> None:
        self.groups = make_groups(type(self).__name__, parameters, settings, self._check_settings)
        module = parameters if isinstance(parameters, Module) else None
        super().__init__([parameter for group in self.groups for parameter in group.parameters], module)
        self.master_weights = master_weights
        self._schedule: Schedule | None = None
        self._schedule_step = 0
        self._base_lrs = self._scheduled_lrs = self.lrs
        self._listeners: list[Callable[[], None]] = []
        self._after_step: list[Callable[[], None]] = []

    def before_step(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener()` at the start of every step; returns a function that removes it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def after_step(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener()` at the end of every step; returns a function that removes it."""
        self._after_step.append(listener)
        return lambda: self._after_step.remove(listener)

    def step(self) -> None:
        """Update every parameter that has a gradient; other parameters and their state stay.

        Raises:
            UsageError: the state does not fit what a parameter holds, or the model no longer has a parameter; nothing
                was updated.
        """
        self.check_fits()
        check_step(self.parameters, max(self.lrs, default=0.0))
        if self._schedule is not None and self.lrs != self._scheduled_lrs:
            raise UsageError(
                f"{type(self).__name__}: lr was changed to {self.lrs} while it follows a schedule, which would change "
                "it back. Call follow(None) before, or follow another schedule from the new lr on."
            )
        for listener in tuple(self._listeners):
            listener()
        index = 0
        for group in self.groups:
            for parameter in group.parameters:
                grad, state = parameter.grad, self.state[index]
                if grad is not None:
                    if not state or (self.master_weights and self._lacks_master(parameter, state)):
                        self._complete_state(index)
                    self._update(parameter, grad, state, group.settings)
                    parameter.grad_is_used = True
                index += 1
        self._schedule_step += 1
        self._apply_schedule()
        for listener in tuple(self._after_step):
            listener()

    def __getstate__(self) -> dict[str, object]:
        """Leave out, for copies and pickle, what listens to this optimizer."""
        return {**super().__getstate__(), "_listeners": [], "_after_step": []}

    def note_gradients_used(self) -> None:
        """Note that no step waits for the present gradients, because it was skipped; a checkpoint can be saved then."""
        for parameter in self.parameters:
            parameter.grad_is_used = True

    def zero_grad(self) -> None:
        """Mark every parameter's gradient absent."""
        for parameter in self.parameters:
            parameter.zero_grad()

    def follow(self, schedule: Schedule | None) -> None:
        """Let each step's learning rates be the present ones times `schedule(number of the step)`, from 0 on.

        The number of the step, and the present learning rates, become a part of the state dict.

        Args:
            schedule: a function of the number of steps that were made since now, such as `CosineSchedule(1000)`; None:
                the learning rates stay as they are.

        Raises:
            UsageError: `schedule` is no function, or the class of a schedule.
        """
        if schedule is not None:
            check_schedule(type(self).__name__, schedule)
        self._schedule, self._schedule_step, self._base_lrs = schedule, 0, self.lrs
        self._apply_schedule()

    @property
    def lrs(self) -> list[float]:
        """The learning rate of each group; assign to it to change all of them."""
        return [group["lr"] for group in self.groups]

    @lrs.setter
    def lrs(self, values: list[float]) -> None:
        for group, lr in zip(self.groups, values, strict=True):
            group["lr"] = lr

    # -- saving and loading ----------------------------------------------------------------------

    def initial_state(self, index: int) -> dict[str, Array]:
        """Make the state that the parameter at this position has before its first step."""
        return self._new_state(self.parameters[index], self._group_of(index))

    def keeps_state(self, index: int) -> bool:
        """Say whether the parameter at this position has state after its first step."""
        dtype = self.parameters[index].dtype
        has_master = self.master_weights and cached_wide_dtype(dtype) != dtype
        return has_master or self._keeps_state(self._group_of(index).settings)

    def settings_state(self) -> dict[str, Array]:
        """Copy the settings: "lr" of the first group, "groups.<index>.<setting>", and the place in the schedule."""
        state = {"lr": np.array(self.groups[0]["lr"], np.float64)}
        for index, group in enumerate(self.groups):
            state |= {f"groups.{index}.{name}": np.array(value) for name, value in group.settings.items()}
        if self._schedule is not None:
            state["schedule.step"] = np.array(self._schedule_step, np.int64)
            state["schedule.lrs"] = np.array(self._base_lrs, np.float64)
        return state

    def settings_faults(self, state: Mapping[str, Array]) -> list[str]:
        """List the reasons why `load_settings` cannot take these arrays; empty if it can."""
        lr = state.get("lr")
        if lr is None or lr.shape != ():
            return [
                "'lr' is missing or no single number",
                *(f"unexpected {name!r}" for name in state if "." not in name),
            ]
        if set(state) == {"lr"}:
            return [] if len(self.groups) == 1 else [f"it has settings of one group, and there are {len(self.groups)}"]
        own = self.settings_state()
        faults = [f"missing {name!r}" for name in own if name not in state]
        faults += [f"unexpected {name!r}" for name in state if name not in own]
        if any("schedule." in fault for fault in faults):
            faults.append("call follow(schedule) before loading exactly if the saved optimizer followed one")
        faults += [
            f"{name!r} has shape {own[name].shape}, given {np.shape(value)}"
            for name, value in state.items()
            if name in own and own[name].shape != np.shape(value)
        ]
        if not faults:
            try:
                for index in range(len(self.groups)):
                    self._check_settings(self._loaded_settings(index, state))
            except UsageError as error:
                faults.append(str(error))
        return faults

    def load_settings(self, state: Mapping[str, Array]) -> None:
        """Restore what `settings_state` copied; a state with "lr" alone changes only that."""
        if set(state) == {"lr"}:
            self.lr = float(state["lr"])
            return
        for index, group in enumerate(self.groups):
            group.update(self._loaded_settings(index, state))
        if self._schedule is not None:
            self._schedule_step = int(state["schedule.step"])
            self._base_lrs = np.asarray(state["schedule.lrs"]).tolist()
            self._apply_schedule()

    # -- for checkpoints -------------------------------------------------------------------------

    def checkpoint_values(self) -> dict[str, object]:
        """Copy settings, the place in a schedule, and which parameters each of several groups has, by their names.

        The names are those of the last call of `checkpoint_optimizer_arrays`.
        """
        return with_group_names(super().checkpoint_values(), self._names_of_groups())

    def merged_checkpoint_values(self, values: Sequence[Any]) -> Any:
        """Unite the values of ranks that had some of the parameters each; None where they had other settings."""
        return merged_groups(values)

    def fitted_checkpoint_values(self, value: Any) -> Any:
        """Bring the settings of groups that were saved in another order into the order of this optimizer's groups."""
        return matched_groups(type(self).__name__, value, self._names_of_groups())

    def finish_checkpoint_load(self) -> None:
        """Drop gradients from before the load: they are those of other weights."""
        self.zero_grad()

    def _check_savable(self) -> None:
        super()._check_savable()
        waiting = [
            parameter.name or str(index)
            for index, parameter in enumerate(self.parameters)
            if parameter.grad is not None and not parameter.grad_is_used
        ]
        if waiting:
            raise UsageError(
                f"{type(self).__name__}: parameters have gradients that no step has used: "
                f"{', '.join(first_few([repr(name) for name in waiting]))}. A checkpoint does not hold gradients, so "
                "a training that is resumed would lack them. Save after optimizer.step(), or drop them by "
                "optimizer.zero_grad() before. Nothing was saved."
            )

    def _names_of_groups(self) -> list[list[str]]:
        """List the names of each group's parameters in a checkpoint, without those that it does not name."""
        names = iter(self.names_in_checkpoint())
        return [[name for _ in group.parameters if (name := next(names)) is not None] for group in self.groups]

    # -- for subclasses --------------------------------------------------------------------------

    @classmethod
    def _check_settings(cls, settings: Settings) -> None:
        """Refuse settings out of their range."""
        check_at_least_zero(cls.__name__, lr=settings["lr"])

    def _keeps_state(self, settings: Settings) -> bool:
        """Say whether `_initial_state` makes arrays."""
        return True

    @abstractmethod
    def _initial_state(self, parameter: Parameter, settings: Settings) -> dict[str, Array]:
        """Make the arrays that the update of a parameter needs, of the wide dtype of its value."""

    @abstractmethod
    def _update(self, parameter: Parameter, grad: Array, state: dict[str, Array], settings: Settings) -> None:
        """Make one step: change the parameter's `data` and `state` in place, and leave `grad` as it is."""

    # -- inside ----------------------------------------------------------------------------------

    def _apply_schedule(self) -> None:
        if self._schedule is not None:
            factor = float(self._schedule(self._schedule_step))
            self.lrs = self._scheduled_lrs = [lr * factor for lr in self._base_lrs]

    def _complete_state(self, index: int) -> None:
        parameter, state = self.parameters[index], self.state[index]
        if not state or (self.master_weights and self._lacks_master(parameter, state)):
            for name, array in self.initial_state(index).items():
                state.setdefault(name, array)

    def _new_state(self, parameter: Parameter, group: ParameterGroup) -> dict[str, Array]:
        state, data = self._initial_state(parameter, group.settings), parameter.data
        wide = cached_wide_dtype(data.dtype)
        if self.master_weights and wide != data.dtype:
            state[MASTER] = data.astype(wide)
        return state

    @staticmethod
    def _lacks_master(parameter: Parameter, state: dict[str, Array]) -> bool:
        """Say whether a parameter was converted to half precision after its first step."""
        dtype = parameter.data.dtype
        return dtype.itemsize < 4 and MASTER not in state

    def _group_of(self, index: int) -> ParameterGroup:
        """Find the group of the parameter at this position."""
        for group in self.groups:
            if index < len(group.parameters):
                return group
            index -= len(group.parameters)
        raise IndexError(index)

    @staticmethod
    def _loaded_settings(index: int, state: Mapping[str, Array]) -> Settings:
        prefix = f"groups.{index}."
        return {
            name[len(prefix) :]: np.asarray(value).tolist() for name, value in state.items() if name.startswith(prefix)
        }


def check_at_least_zero(optimizer: str, **settings: float) -> None:
    """Refuse settings below zero or NaN.

    Raises:
        UsageError: a setting is negative or NaN; the message names the optimizer and the setting.
    """
    for name, value in settings.items():
        if not value >= 0:
            raise UsageError(f"{optimizer}: {name} must be at least 0, got {value}.")
