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
from ferro_checkpoint.loading.load import load
from ferro_checkpoint.placement.array_piece import ArrayPiece
from ferro_checkpoint.saving.save import save

__all__ = [
    "ArrayPiece",
    "CheckpointDamaged",
    "CheckpointError",
    "CheckpointIncomplete",
    "CheckpointTooNew",
    "SaveFailed",
    "StateError",
    "load",
    "save",
]
