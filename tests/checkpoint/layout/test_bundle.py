"""A bundle's files are those that loaders of sharded safetensors expect."""

from __future__ import annotations

import json

from ferro_checkpoint.layout.bundle import encode_index, layout_bundle
from ferro_checkpoint.layout.header import ALIGNMENT, decode_header

TENSORS = {"w": ("F32", (10, 10)), "b": ("F16", (7,)), "n": ("I64", ()), "flags": ("BOOL", (3,)), "none": ("F32", (0,))}


def test_one_file():
    (file,) = layout_bundle("model", TENSORS)
    assert file.name == "model.safetensors"
    assert file.nbytes == len(file.header) + 400 + 14 + 8 + 3
    assert decode_header(file.header, file.nbytes, "f")[0] == dict(file.tensors)
    for name, tensor in file.tensors.items():
        size = {"F32": 4, "F16": 2, "I64": 8, "BOOL": 1}[TENSORS[name][0]]
        assert tensor.begin % size == 0
        assert tensor.begin >= ALIGNMENT


def test_several_files_and_their_index():
    files = layout_bundle("model", TENSORS, file_bytes=100)
    assert [file.name for file in files] == [f"model-0000{k}-of-0000{len(files)}.safetensors" for k in (1, 2, 3)]
    index = json.loads(encode_index(files))
    assert index["metadata"] == {"total_size": 425}
    assert set(index["weight_map"]) == set(TENSORS)
    for file in files:
        for name in file.tensors:
            assert index["weight_map"][name] == file.name


def test_the_same_on_every_rank_whatever_the_order():
    turned = dict(reversed(TENSORS.items()))
    assert layout_bundle("m", TENSORS, 100) == layout_bundle("m", turned, 100)


def test_nothing_needs_no_file():
    assert layout_bundle("model", {}) == []
