"""Checkpoints that the commands are tried on, and the commands themselves."""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
import pytest

from ferro_checkpoint.command.main import main
from ferro_checkpoint.saving.save import save

from ..formats.conftest import torch_files  # noqa: F401 - a fixture


class Ran(NamedTuple):
    status: int
    out: str
    error: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def command(capsys):
    """Run `ferro checkpoint` in this process; return status and output."""

    def run(*arguments):
        status = main([str(it) for it in arguments])
        return Ran(status, *capsys.readouterr())

    return run


def state(**changes):
    """A state with two bundles; the array of none is in the bundle "model"."""
    model = {
        "0.weight": np.arange(600, dtype=np.float32).reshape(20, 30),
        "0.bias": np.linspace(0, 1, 20).astype(np.float16),
    }
    optimizer = {"z": np.array([1 + 2j, 3 - 4j]), "n": np.array(7), "none": np.zeros((0, 3), np.int8)}
    return {"model": model, "optimizer": optimizer, "epoch": 3, "rate": 0.5, "flags": np.array([True, False])} | changes


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "run" / "step-7"
    save(path, state(), step=7)
    return path


def flip(path, place):
    """Change a byte of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
