"""The message for bytes that are not those that were written."""

from __future__ import annotations

from collections.abc import Sequence

from ferro_checkpoint.layout.json_text import shown


def damage_text(path: str, begin: int, end: int, tensors: Sequence[str]) -> str:
    """Say that a range of a file is damaged, and which tensors are in it."""
    named = ", ".join(shown(name) for name in tensors[:3])
    more = f" and {len(tensors) - 3} more" if len(tensors) > 3 else ""
    what = f"tensors {named}{more}" if len(tensors) > 1 else f"tensor {named}" if tensors else "no tensor's data"
    return (
        f"{path}: bytes {begin} to {end - 1} ({what}) are not those that were written: load an older checkpoint; "
        f"`ferro checkpoint verify` lists all damage"
    )
