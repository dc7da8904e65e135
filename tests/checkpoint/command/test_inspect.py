"""`ferro checkpoint inspect` prints what is in a checkpoint, or which checkpoints are in a directory."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from ferro_checkpoint.command.text import size_text
from ferro_checkpoint.formats import write_safetensors
from ferro_checkpoint.saving.save import save
from ferro_checkpoint.storage.saver import TOKEN_NAME

from .conftest import state


def test_a_checkpoint(command, checkpoint):
    ran = command("inspect", checkpoint)
    assert ran.status == 0
    assert f"{checkpoint}: checkpoint of step 7 saved 20" in ran.out
    assert "by 1 rank\n" in ran.out
    lines = [line.split("  ") for line in ran.out.splitlines()]
    cells = {cells[0]: [cell.strip() for cell in cells if cell.strip()] for cells in lines if cells[0]}
    assert cells["model.0.weight"] == ["model.0.weight", "F32", "20 x 30", "2.344 KiB", "model.safetensors"]
    assert cells["optimizer.z"] == ["optimizer.z", "complex128", "2", "32 B", "optimizer.safetensors"]
    assert cells["optimizer.n"][2] == "()"
    assert "6 tensors, 2.424 KiB in 2 files" in ran.out
    assert cells["epoch"] == ["epoch", "3"]


def test_as_json(command, checkpoint):
    content = command("inspect", checkpoint, "--json").json
    assert (content["kind"], content["step"], content["saved_by"]["world_size"]) == ("checkpoint", 7, 1)
    assert content["values"] == {"epoch": 3, "rate": 0.5}
    tensors = {it.pop("name"): it for it in content["tensors"]}
    assert tensors["model.0.bias"] == {"dtype": "F16", "shape": [20], "bytes": 40, "file": "model.safetensors"}
    assert sum(content["files"].values()) > 2400


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["optimizer"], {"optimizer.z", "optimizer.n", "optimizer.none"}),
        (["model.0", "*.z"], {"model.0.weight", "model.0.bias", "optimizer.z"}),
        (["*.weight"], {"model.0.weight"}),
    ],
)
def test_some_tensors(command, checkpoint, patterns, names):
    options = [option for pattern in patterns for option in ("--only", pattern)]
    assert {it["name"] for it in command("inspect", checkpoint, "--json", *options).json["tensors"]} == names


def test_a_directory_of_checkpoints(command, checkpoint):
    run = checkpoint.parent
    save(run / "step-12", state(), step=12)
    save(run / "unnumbered", {"model": {"w": np.ones(3)}})
    shutil.copytree(run / "step-12", run / "cut")
    with (run / "cut" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    (run / "begun").mkdir()
    (run / "begun" / TOKEN_NAME).write_bytes(b"")
    (run / "begun" / "model.safetensors").write_bytes(b"")
    (run / "logs").mkdir()
    content = command("inspect", run, "--json").json
    listed = {it["name"]: it for it in content["checkpoints"]}
    assert list(listed) == ["begun", "cut", "unnumbered", "step-7", "step-12"]
    assert [it["whole"] for it in listed.values()] == [False, False, True, True, True]
    assert "the file has" in listed["cut"]["fault"]
    assert "was interrupted" in listed["begun"]["fault"]
    text = command("inspect", run).out
    assert "5 checkpoints, 3 whole" in text
    assert f"{run}/begun: the save of this checkpoint goes on or was interrupted" in text


def test_other_formats(command, tmp_path):
    write_safetensors(tmp_path / "plain", {"a": np.zeros((2, 3), np.int16), "b": np.zeros(())}, file_bytes=1)
    ran = command("inspect", tmp_path / "plain")
    assert ran.status == 0
    assert f"{tmp_path / 'plain'}: plain safetensors\n" in ran.out
    assert "8 B  model-00001-of-00002.safetensors" in ran.out
    assert "2 tensors, 20 B" in ran.out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["inspect"], 2, "required: DIR; see `ferro checkpoint inspect --help`"),
        ([], 2, "give a command: inspect, verify, diff, merge, convert"),
        (["look"], 2, "invalid choice: 'look'"),
        (["inspect", "DIR", "--only", "modl"], 2, "--only modl: no tensor has such a name; there are: model"),
        (["inspect", "DIR", "--only", "nope"], 2, "there are: model, optimizer"),
        (["inspect", "RUN", "--only", "model"], 2, "is a directory of checkpoints: choose one of step-7"),
        (["inspect", "/etc/passwd"], 1, "--from safetensors"),
        (["diff", "RUN", "DIR"], 1, "choose one of step-7"),
        (["convert", "RUN", "NOTHING"], 1, "choose one of step-7"),
        (["verify", "RECORD"], 2, "is the commit record of a checkpoint: give its directory"),
        (["verify", "C:\\x"], 2, r"choose one without '/' and '\\'"),
        (["verify", "ab::c:/d"], 2, "is no address"),
        (["verify", "zip://nothing/x"], 1, "zip://nothing cannot be opened"),
        (["inspect", "NOTHING"], 1, "there is nothing of this name"),
        (["inspect", "EMPTY"], 1, "is of no format that is read"),
        (["verify", "DIR", "--threads", "0"], 2, "give 1 to 64 threads"),
    ],
)
def test_an_error_is_one_line(command, checkpoint, tmp_path, arguments, status, message):
    (tmp_path / "empty").mkdir()
    places = {"DIR": checkpoint, "RUN": checkpoint.parent, "RECORD": checkpoint / "ferro.json"}
    places |= {"NOTHING": tmp_path / "nothing", "EMPTY": tmp_path / "empty"}
    ran = command(*(places.get(it, it) for it in arguments))
    assert (ran.status, ran.out) == (status, "")
    assert ran.error.startswith("ferro checkpoint: ")
    assert message in ran.error
    assert ran.error.count("\n") == 1


def test_every_command_has_help(capsys, command):
    for name in ("inspect", "verify", "diff", "merge", "convert"):
        with pytest.raises(SystemExit):
            command(name, "--help")
        assert f"usage: ferro checkpoint {name} " in capsys.readouterr().out


def test_names_do_not_move_the_cursor(command, tmp_path):
    save(tmp_path / "odd", {"model": {"a\x1b[2J\nb": np.ones(1)}})
    assert "model.a\\x1b[2J\\nb " in command("inspect", tmp_path / "odd").out


def test_sizes():
    sizes = {0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1536: "1.5 KiB", 5 << 30: "5 GiB", 1 << 70: "1.049e+06 PiB"}
    assert {nbytes: size_text(nbytes) for nbytes in sizes} == sizes


def test_one_endless_name_does_not_make_all_rows_as_long(command, tmp_path):
    save(tmp_path / "c", {"model": {"a" * 50_000: np.ones(1)} | {f"b{k}": np.ones(1) for k in range(100)}})
    assert len(command("inspect", tmp_path / "c").out) < 100_000
    assert len(command("inspect", tmp_path / "c", "--only", "c" * 50_000).error) < 51_000
