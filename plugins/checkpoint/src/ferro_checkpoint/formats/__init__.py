"""Formats of other programs: plain safetensors, torch.distributed.checkpoint, and the Rust crate's."""

from __future__ import annotations

from ferro_checkpoint.formats.open_foreign import Format, open_foreign
from ferro_checkpoint.formats.source import TensorSource
from ferro_checkpoint.formats.write_safetensors import write_safetensors

__all__ = ["Format", "TensorSource", "open_foreign", "write_safetensors"]
