"""`ferro checkpoint verify` finds damage, names it, and says so by its exit status."""

from __future__ import annotations

from ferro_checkpoint.layout.record import RECORD_NAME
from ferro_checkpoint.opened.checkpoint import OpenedCheckpoint
from ferro_checkpoint.storage.opening import split_path

from .conftest import flip


def test_a_whole_one(command, checkpoint):
    ran = command("verify", checkpoint)
    assert (ran.status, ran.error) == (0, "")
    assert f"{checkpoint} is whole: 2 files" in ran.out
    content = command("verify", checkpoint, "--json").json
    assert (content["whole"], content["findings"], content["files"]) == (True, [], 2)


def test_a_damaged_one(command, checkpoint):
    with OpenedCheckpoint.open(*split_path(checkpoint)) as opened:
        place = opened.tensors["model.0.weight"]
    flip(checkpoint / place.file, place.begin + 5)
    ran = command("verify", checkpoint, "--threads", "1")
    assert ran.status == 1
    assert f"{checkpoint / place.file}: bytes " in ran.out
    assert "'model.0.weight'" in ran.out
    assert ran.out.endswith(f"{checkpoint} is damaged: 1 place; load an older checkpoint\n")
    ran = command("verify", checkpoint, "--json")
    (finding,) = ran.json["findings"]
    assert ran.status == 1
    assert finding["begin"] <= place.begin + 5 < finding["end"]
    assert "model.0.weight" in finding["tensors"]


def test_a_damaged_record_is_damage_too(command, checkpoint):
    flip(checkpoint / RECORD_NAME, 60)
    ran = command("verify", checkpoint, "--json")
    assert (ran.status, ran.json["whole"], ran.json["findings"][0]["file"]) == (1, False, RECORD_NAME)
    assert "is damaged: 1 place" in command("verify", checkpoint).out


def test_what_has_no_digests(command, checkpoint):
    (checkpoint / RECORD_NAME).unlink()
    ran = command("verify", checkpoint)
    assert (ran.status, ran.out) == (1, "")
    assert "there are safetensors files and no ferro.json" in ran.error
