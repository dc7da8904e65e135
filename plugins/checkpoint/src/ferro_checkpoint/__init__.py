"""Checkpoints: the training state of any strategy as safetensors files, atomic, checked, for any number of ranks."""

from __future__ import annotations

from ferro_checkpoint.errors import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointIncomplete,
    CheckpointTooNew,
    SaveFailed,
    StateError,
)
from ferro_checkpoint.placement.placed_array import PlacedArray

__all__ = [
    "CheckpointDamaged",
    "CheckpointError",
    "CheckpointIncomplete",
    "CheckpointTooNew",
    "PlacedArray",
    "SaveFailed",
    "StateError",
]
