"""Digests do not depend on how bytes are cut, and differ where bytes do."""

from __future__ import annotations

import pytest

from ferro_checkpoint.errors import CheckpointTooNew
from ferro_checkpoint.layout.digest import DIGEST, digest_of, digester


def test_digests():
    content = bytes(range(256)) * 20
    whole = digest_of([memoryview(content)])
    for cut in (0, 1, 1000, len(content)):
        assert digest_of([memoryview(content)[:cut], memoryview(content)[cut:]]) == whole
    assert digest_of([]) == digest_of([memoryview(b"")]) == "2d06800538d394c2"
    changed = bytearray(content)
    for bit in range(0, 8 * len(content), 37):
        changed[bit // 8] ^= 1 << bit % 8
        assert digest_of([memoryview(changed)]) != whole
        changed[bit // 8] ^= 1 << bit % 8
    assert digester(DIGEST, "run/a") is digest_of
    with pytest.raises(CheckpointTooNew, match=r"run/a.*sha3.*update"):
        digester("sha3", "run/a")
