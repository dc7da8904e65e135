"""`ferro checkpoint merge` and `convert` write whole files or nothing, with the same bits, in bounded memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import load_file

from ferro_checkpoint.command import convert, source
from ferro_checkpoint.formats import write_safetensors
from ferro_checkpoint.loading.load import load
from ferro_checkpoint.saving.save import save

from .conftest import flip, state


def same(arrays, expected):
    assert set(arrays) == set(expected)
    for name, array in expected.items():
        assert (arrays[name].dtype, arrays[name].shape) == (array.dtype, array.shape)
        assert arrays[name].tobytes() == array.tobytes()


def test_merge(command, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "PIECE_BYTES", 512)
    ran = command("merge", checkpoint, tmp_path / "out")
    assert (ran.status, ran.error) == (0, "")
    assert sorted(it.name for it in (tmp_path / "out").iterdir()) == ["model.safetensors", "optimizer.safetensors"]
    model = dict(state()["model"])
    same(load_file(tmp_path / "out" / "model.safetensors"), model | {"flags": state()["flags"]})
    z = load_file(tmp_path / "out" / "optimizer.safetensors")["z"]
    assert (z == [[1, 2], [3, -4]]).all()


def test_merge_of_one_bundle_is_a_file(command, checkpoint, tmp_path):
    out = tmp_path / "m.safetensors"
    assert command("merge", checkpoint, out, "--only", "model.0").status == 0
    same(load_file(out), state()["model"])
    ran = command("merge", checkpoint, tmp_path / "n.safetensors")
    assert ran.status == 2
    assert "is one file, for one bundle, and there are" in ran.error


def test_nothing_is_replaced_unless_asked_for(command, checkpoint, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    file = tmp_path / "m.safetensors"
    file.write_bytes(b"old")
    for target in (out, file):
        ran = command("merge", checkpoint, target, "--only", "model")
        assert (ran.status, "is there: choose another path, or give --overwrite" in ran.error) == (2, True)
    ran = command("merge", checkpoint, out, "--overwrite")
    assert (ran.status, "has 'notes.txt' in it" in ran.error) == (2, True)
    assert command("merge", checkpoint, file, "--only", "model.0", "--overwrite").status == 0
    (out / "notes.txt").rename(out / "old.safetensors")
    assert command("convert", checkpoint, out, "--overwrite").status == 0
    assert [it.name for it in out.iterdir()] == ["model.safetensors"]
    ran = command("convert", file, checkpoint)
    assert (ran.status, "is there" in ran.error) == (2, True)
    assert sorted(it.name for it in tmp_path.iterdir()) == ["m.safetensors", "out", "run"]


@pytest.mark.parametrize("to", ["safetensors", "ferro"])
def test_damage_leaves_nothing_behind(command, checkpoint, tmp_path, to):
    flip(checkpoint / "optimizer.safetensors", -1)
    ran = command("convert", checkpoint, tmp_path / "out", "--to", to)
    assert (ran.status, "are not those that were written" in ran.error) == (1, True)
    assert [it.name for it in tmp_path.iterdir()] == ["run"]


def test_to_a_checkpoint_and_back(command, tmp_path, monkeypatch):
    arrays = {f"layer.{k}": np.full((k, 5), k, np.float32) for k in range(6)} | {"z": np.array(3, np.int8)}
    write_safetensors(tmp_path / "in", arrays, {"author": "somebody"}, file_bytes=100)
    ran = command("convert", tmp_path / "in", tmp_path / "ours", "--bundle", "net")
    assert (ran.status, ran.error) == (0, "")
    loaded = load(tmp_path / "ours")
    same(loaded["net"], arrays)
    assert loaded["author"] == "somebody"
    assert command("verify", tmp_path / "ours").status == 0
    monkeypatch.setattr(convert, "FILE_BYTES", 100)
    assert command("convert", tmp_path / "ours", tmp_path / "back", "--bundle", "net").status == 0
    assert len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 2
    assert command("diff", tmp_path / "in", tmp_path / "back").status == 0


def test_bundles_by_the_names(command, tmp_path):
    write_safetensors(tmp_path / "in.safetensors", {"model.a": np.ones(2), "optimizer.b.c": np.ones(3)})
    assert command("convert", tmp_path / "in.safetensors", tmp_path / "ours", "--bundle", "*").status == 0
    loaded = load(tmp_path / "ours")
    same(loaded["model"], {"a": np.ones(2)})
    same(loaded["optimizer"], {"b.c": np.ones(3)})
    write_safetensors(tmp_path / "bad.safetensors", {"alone": np.ones(2)})
    ran = command("convert", tmp_path / "bad.safetensors", tmp_path / "other", "--bundle", "*")
    assert (ran.status, "cannot be the name of a bundle" in ran.error) == (2, True)


def test_a_part_of_a_checkpoint_as_a_checkpoint(command, checkpoint, tmp_path):
    ran = command("convert", checkpoint, tmp_path / "part", "--to", "ferro", "--only", "*.z", "--only", "model.0.bias")
    assert (ran.status, ran.error) == (0, "")
    content = command("inspect", tmp_path / "part", "--json").json
    assert (content["step"], content["values"]) == (7, {})
    assert {it["name"]: it["dtype"] for it in content["tensors"]} == {
        "model.0.bias": "F16",
        "optimizer.z": "complex128",
    }
    assert command("convert", checkpoint, tmp_path / "all", "--to", "ferro").status == 0
    assert command("diff", checkpoint, tmp_path / "all").status == 0


def test_memory_is_bounded(command, tmp_path):
    save(tmp_path / "large", {"model": {"w": np.ones(24 << 20, np.uint8), "v": np.zeros(1000)}})
    for arguments in (
        ["merge", tmp_path / "large", tmp_path / "merged"],
        ["convert", tmp_path / "large", tmp_path / "again", "--to", "ferro"],
        ["diff", tmp_path / "large", tmp_path / "again"],
    ):
        tracemalloc.start()
        assert command(*arguments).status == 0
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 << 20


def test_from_torch(command, torch_files, tmp_path):
    ran = command("convert", torch_files / "nested", tmp_path / "ours", "--bundle", "*")
    assert ran.status == 0
    assert "ferro checkpoint: left out 'values.device': " in ran.error
    loaded = load(tmp_path / "ours")
    assert loaded["dtypes"]["complex128"].dtype == np.complex128
    assert loaded["model"]["number"].shape == ()
    assert command("diff", torch_files / "nested", tmp_path / "ours").status == 0


def test_an_object_store(command, checkpoint):
    out = "memory://command/step-7"
    assert command("convert", checkpoint, out, "--to", "ferro").status == 0
    assert command("verify", out).status == 0
    assert command("diff", out, checkpoint).status == 0
    assert "step-7" in command("inspect", "memory://command").out
    assert "there is nothing of this name" in command("inspect", "memory://command/step-8").error
