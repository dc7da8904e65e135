"""A small checkpoint in a directory of its own."""

from __future__ import annotations

import numpy as np
import pytest

from ferro_checkpoint.storage.local import LocalStorage

from .written import write

ARRAYS = {
    "model": {
        "0.weight": np.arange(600, dtype=np.float32).reshape(20, 30),
        "0.bias": np.arange(20, dtype=np.float16),
        "z": np.array([1 + 2j, 3 - 4j]),
        "none": np.zeros((0, 3), np.int8),
    },
    "optimizer": {"step": np.array(7), "flags": np.array([True, False, True])},
}


@pytest.fixture
def storage(tmp_path):
    write(tmp_path / "step-7", ARRAYS, values={"epoch": 3}, step=7, file_bytes=2000, segment_bytes=512)
    return LocalStorage(str(tmp_path))
