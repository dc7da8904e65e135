"""`ferro checkpoint diff` finds what differs, by how much, and reads no more than a piece at a time."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from ferro_checkpoint.command import source
from ferro_checkpoint.command.difference import difference
from ferro_checkpoint.formats import write_safetensors
from ferro_checkpoint.saving.save import save

from .conftest import state


def test_equal_ones_saved_at_the_same_step(command, checkpoint, tmp_path):
    save(tmp_path / "other", state(), step=7)
    ran = command("diff", checkpoint, tmp_path / "other")
    assert (ran.status, ran.out) == (0, "equal: 6 tensors, bit for bit\n")
    content = command("diff", checkpoint, tmp_path / "other", "--json").json
    assert (content["equal"], content["compared"], content["tensors"], content["values"]) == (True, 6, [], [])


def test_each_kind_of_difference(command, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "PIECE_BYTES", 512)
    other = state(epoch=4, rate=True)
    other["model"]["0.weight"] = other["model"]["0.weight"].copy()
    other["model"]["0.weight"][[0, 19], [3, 29]] += 2
    other["model"]["0.bias"] = other["model"]["0.bias"].reshape(4, 5)
    other["optimizer"]["n"] = np.array(7, np.int32)
    other["optimizer"]["new"] = other["optimizer"].pop("z")
    save(tmp_path / "other", other, step=8)
    ran = command("diff", checkpoint, tmp_path / "other")
    assert ran.status == 1
    for line in (
        "model.0.weight: 2 of 600 elements differ, by 2 at most, relative 0.4",
        "model.0.bias: other shape: 20 and 4 x 5",
        "optimizer.n: other dtype: I64 and I32",
        "optimizer.z: only in A",
        "optimizer.new: only in B",
        "epoch: other value: 3 and 4",
        "rate: other value: 0.5 and true",
        "step: other value: 7 and 8",
    ):
        assert f"{line}\n" in ran.out
    assert "5 of 7 tensors and 3 values differ" in ran.out
    entries = {it["name"]: it for it in command("diff", checkpoint, tmp_path / "other", "--json").json["tensors"]}
    assert (entries["model.0.weight"]["differing"], entries["model.0.weight"]["largest"]) == (2, 2.0)
    assert command("diff", checkpoint, tmp_path / "other", "--only", "model.flags").status == 0


def test_a_bundle_and_a_plain_file(command, checkpoint, tmp_path):
    write_safetensors(tmp_path / "m.safetensors", state()["model"] | {"flags": state()["flags"]})
    assert command("diff", checkpoint, tmp_path / "m.safetensors").status == 1
    ran = command("diff", tmp_path / "m.safetensors", checkpoint, "--bundle", "model")
    assert (ran.status, ran.out) == (0, "equal: 3 tensors, bit for bit\n")
    ran = command("diff", tmp_path / "m.safetensors", checkpoint, "--bundle", "modl")
    assert ran.status == 2
    assert "has the bundles model, optimizer" in ran.error


def differing(a, b):
    a, b = np.atleast_1d(a), np.atleast_1d(b)
    return difference([a.view(np.uint8)], [b.view(np.uint8)], a.dtype)


@pytest.mark.parametrize(
    ("dtype", "a", "b", "largest", "relative"),
    [
        ("int8", -128, 127, 255, 255 / 128),
        ("uint8", 3, 250, 247, 247 / 250),
        ("int64", -(1 << 63), (1 << 63) - 1, 2.0**64, 2),
        ("uint64", 0, (1 << 64) - 1, 2.0**64, 1),
        ("int64", 1 << 60, (1 << 60) + 1, 1, 2.0**-60),
        ("bool", False, True, 1, 1),
        ("float16", 1, 1.5, 0.5, 1 / 3),
        ("float64", 0.0, -0.0, 0, 0),
        ("complex64", 3, 4j, 5, 5 / 4),
        ("complex128", 3, 4j, 5, 5 / 4),
        (ml_dtypes.bfloat16, 1, 2, 1, 0.5),
        (ml_dtypes.float8_e4m3fn, 1, 2, 1, 0.5),
    ],
)
def test_how_much_numbers_differ(dtype, a, b, largest, relative):
    found = differing(np.array([a, 0, a], dtype), np.array([a, 0, b], dtype))
    assert (found.elements, found.differing, found.not_finite) == (3, 1, 0)
    assert found.largest == pytest.approx(largest)
    assert found.largest_relative == pytest.approx(relative)


def test_numbers_that_are_none():
    nan, inf = np.nan, np.inf
    found = differing(np.array([nan, nan, inf, 1.0, inf]), np.array([nan, 1.0, -inf, 2.0, inf]))
    assert (found.differing, found.not_finite, found.largest, found.largest_relative) == (3, 2, 1, 0.5)
