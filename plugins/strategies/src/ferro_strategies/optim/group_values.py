"""The settings of parameter groups in a checkpoint, which belong to groups by the names of their parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ferro.errors import UsageError

from ..nn.checks import first_few

_NAMES = "params"


def with_group_names(values: Mapping[str, object], names: Sequence[Sequence[str]]) -> dict[str, object]:
    """Add the names of each group's parameters to settings, as "groups.<index>.params"; one group needs none."""
    own = {f"groups.{index}.{_NAMES}": sorted(each) for index, each in enumerate(names)} if len(names) > 1 else {}
    return {**values, **own}


def merged_groups(values: Sequence[Any]) -> Any:
    """Unite the values of ranks that have some parameters each, as the stages of a pipeline.

    Returns:
        One value with the names of all; None if the ranks have other settings, too.
    """
    if not values or not all(isinstance(value, Mapping) for value in values):
        return None
    settings = [{key: item for key, item in value.items() if not _has_names(key)} for value in values]
    keys = [{key for key in value if _has_names(key)} for value in values]
    if any(each != settings[0] for each in settings) or any(each != keys[0] for each in keys):
        return None
    names = {key: sorted({name for value in values for name in value[key]}) for key in sorted(keys[0])}
    return {**settings[0], **names}


def matched_groups(optimizer: str, value: Any, names: Sequence[Sequence[str]]) -> Any:
    """Give each group the settings that the group of its parameters has in the checkpoint.

    A parameter that the checkpoint does not name, and one that is gone, are no obstacle. A group without parameters,
    as on a rank of a pipeline, gets what no other one has.

    Args:
        optimizer: its name, for messages.
        value: of the checkpoint, with the names of each group's parameters if there are several groups.
        names: of the parameters of each group now.

    Returns:
        The value in the order of the groups, without the names.

    Raises:
        UsageError: the groups of the checkpoint have other parameters.
    """
    if not isinstance(value, Mapping):
        return value
    saved = [value[key] for key in (f"groups.{index}.{_NAMES}" for index in range(len(value))) if key in value]
    if not all(isinstance(each, list) and all(isinstance(name, str) for name in each) for each in saved):
        raise UsageError(f"{optimizer}: the groups of the checkpoint do not name their parameters as texts.")
    rest = {key: item for key, item in value.items() if not _has_names(key)}
    if len(saved) != len(names) or len(saved) < 2:
        return rest  # There is one group, or the comparison of settings finds that there are more, or fewer.
    order = _order(optimizer, saved, names)
    changed = {key: item for key, item in rest.items() if not key.startswith("groups.")}
    for index, source in enumerate(order):
        old, new = f"groups.{source}.", f"groups.{index}."
        changed |= {new + key.removeprefix(old): item for key, item in rest.items() if key.startswith(old)}
    if "groups.0.lr" in changed:
        changed["lr"] = changed["groups.0.lr"]
    lrs = rest.get("schedule.lrs")
    if isinstance(lrs, list) and len(lrs) == len(order):
        changed["schedule.lrs"] = [lrs[source] for source in order]
    return changed


def _order(optimizer: str, saved: Sequence[Sequence[str]], names: Sequence[Sequence[str]]) -> list[int]:
    """Find, for each group, the position of its settings in the checkpoint."""
    group_of = {name: index for index, each in enumerate(saved) for name in each}
    order: list[int | None] = []
    for index, each in enumerate(names):
        found = {group_of[name] for name in each if name in group_of}
        if len(found) > 1 or (each and not found) or found & set(order):
            listed = ", ".join(first_few([repr(name) for name in each]))
            where = f"of its groups {sorted(found)}" if found else "of none of its groups"
            raise UsageError(
                f"{optimizer}: group {index} ({listed}) has parameters that are {where} in the checkpoint, which has "
                "other settings for each. Make groups of the same parameters; their order does not count. Nothing was "
                "loaded."
            )
        order.append(found.pop() if found else None)
    free = [index for index in range(len(saved)) if index not in order]
    result = []
    for index, source in enumerate(order):
        if source is None:
            source = index if index in free else free[0]
            free.remove(source)
        result.append(source)
    return result


def _has_names(key: str) -> bool:
    return key.startswith("groups.") and key.endswith(f".{_NAMES}")
