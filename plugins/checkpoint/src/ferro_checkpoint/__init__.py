"""Checkpoints: the training state of any strategy as safetensors files, atomic, checked, for any number of ranks."""

from __future__ import annotations

from ferro_checkpoint.checkpointer.checkpointer import Checkpointer
from ferro_checkpoint.checkpointer.every import Continuous, Every
from ferro_checkpoint.checkpointer.keep import Best, Last
from ferro_checkpoint.checkpointer.preemption import Preempted
from ferro_checkpoint.checkpointer.save_result import SaveResult
from ferro_checkpoint.errors import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointIncomplete,
    CheckpointTooNew,
    SaveFailed,
    StateError,
)
from ferro_checkpoint.loading.load import load
from ferro_checkpoint.opened.latest import latest
from ferro_checkpoint.placement.array_piece import ArrayPiece
from ferro_checkpoint.saving.save import save

__all__ = [
    "ArrayPiece",
    "Best",
    "CheckpointDamaged",
    "CheckpointError",
    "CheckpointIncomplete",
    "CheckpointTooNew",
    "Checkpointer",
    "Continuous",
    "Every",
    "Last",
    "Preempted",
    "SaveFailed",
    "SaveResult",
    "StateError",
    "latest",
    "load",
    "save",
]
