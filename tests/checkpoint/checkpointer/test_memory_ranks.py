"""Checkpoints in the ranks' memories: after the loss of a rank, the others go on from them, without a disk."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import signal
from pathlib import Path

import numpy as np
import pytest

import ferro
from ferro_checkpoint import CheckpointIncomplete
from ferro_checkpoint.checkpointer import save_starter
from ferro_checkpoint.checkpointer.checkpointer import Checkpointer
from ferro_checkpoint.checkpointer.every import Every
from ferro_checkpoint.checkpointer.memory import neighbour
from ferro_checkpoint.placement.array_piece import ArrayPiece
from ferro_testing import run_ranks_outcomes

STEPS = 12
EVERY = 3
ROWS = 7 * 1024


class Sharded:
    """Rows of a matrix, each on one rank, as a strategy's module has them."""

    def __init__(self, group: ferro.ProcessGroup | None) -> None:
        rank, n = (0, 1) if group is None else (group.rank, group.world_size)
        self.first, last = rank * ROWS // n, (rank + 1) * ROWS // n
        self.rows = np.zeros((last - self.first, 33), np.float32)

    def checkpoint_arrays(self) -> dict[str, object]:
        start, extent = (self.first, 0), self.rows.shape
        return {"rows": ArrayPiece(shape=(ROWS, 33), data=self.rows, start=start, extent=extent)}


def new_state(group: ferro.ProcessGroup | None) -> dict:
    return {"model": Sharded(group), "optimizer": {"m": np.zeros(70_001)}, "step": 0}


def train_step(state: dict, step: int, total: float) -> None:
    """One step, of which the result does not depend on the number of ranks."""
    model = state["model"]
    model.rows += np.float32(step) * np.arange(model.first, model.first + len(model.rows), dtype=np.float32)[:, None]
    state["optimizer"]["m"] = state["optimizer"]["m"] * 0.5 + step * total  # a new array in each step
    state["step"] = step


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_second_copy(*arguments: object) -> None:
    """Take the place of `replicate`: make the copies of the first save, and die before those of the second."""
    save_starter.replicate = lambda *_: die()
    neighbour.replicate(*arguments)


def train(world: ferro.ProcessGroup, directory: str | None, victims: list[int], how: str) -> list:
    """Train until ranks are lost, then go on from memory or disk; with "rejoin", the last rank is a spare before."""
    members = range(world.world_size - (how == "rejoin"))
    every = None if directory is None else Every(steps=4)
    keeper = beside = None
    if world.rank in members:
        group = world.subgroup(members)
        if how == "from disk":
            beside = Checkpointer(None, group, in_memory=True, timeout_s=60)
            beside.save(1, new_state(group))
            beside.wait()
        keeper = Checkpointer(directory, group, every=every, in_memory=Every(steps=EVERY), timeout_s=60)
        if how == "in a save" and group.rank in victims:
            save_starter.replicate = die_in_second_copy
        with contextlib.suppress(ferro.FerroError):
            train_on(group, keeper, new_state(group), 0, victims)
    with contextlib.suppress(ferro.FerroError):
        while True:
            world.all_reduce(1.0, timeout_s=60)
    for _ in victims:
        group = world.shrink() if world.state == "dead" else group
        world = group
        with contextlib.suppress(ferro.FerroError):
            group.barrier()
    state = new_state(group)
    if beside is not None:
        with pytest.raises(CheckpointIncomplete, match="do not hold all of the checkpoint of step 1"):
            beside.resume(into=state, group=group)
    keeper = keeper or Checkpointer(None, group, in_memory=Every(steps=EVERY))
    with keeper:
        first = keeper.resume(into=state, group=group)
        train_on(group, keeper, state, first or 0, [])
        sizes = [
            (rank + 1) * ROWS // group.world_size - rank * ROWS // group.world_size for rank in range(len(members))
        ]
        rows = group.all_gather(state["model"].rows, sizes=sizes[: group.world_size])
    return [first, rows, state["optimizer"]["m"], state["step"]]


def train_on(group: ferro.ProcessGroup, keeper: Checkpointer, state: dict, first: int, victims: list[int]) -> None:
    for step in range(first + 1, STEPS + 1):
        if step == 8:
            keeper.wait()
            if group.rank in victims:
                die()
        train_step(state, step, float(group.all_reduce(1.0, op="max")))
        keeper.step(step, state)


def expected() -> dict:
    state = new_state(None)
    for step in range(1, STEPS + 1):
        train_step(state, step, 1.0)
    return state


@pytest.mark.parametrize(
    ("ranks", "victims", "how", "resumed"),
    [
        pytest.param(3, [1], "in training", 6, id="killed in training"),
        pytest.param(3, [1], "in a save", 3, id="killed in a save"),
        pytest.param(4, [1], "rejoin", 6, id="another process takes its place"),
        pytest.param(4, [1, 2], "from disk", 4, id="two neighbours are killed, and the disk has an older step"),
    ],
)
def test_survivors_go_on_with_the_bits_of_an_uninterrupted_run(ranks, victims, how, resumed, tmp_path):
    directory = str(tmp_path) if how == "from disk" else None
    outcomes = run_ranks_outcomes(train, ranks, backend="gloo", args=(directory, victims, how), timeout_s=120)
    reference = new_state(None)
    for step in range(1, STEPS + 1):
        train_step(reference, step, 1.0)
    for outcome in outcomes:
        if outcome.rank in victims:
            assert outcome.signal == "SIGKILL", outcome.describe()
            continue
        assert outcome.ok, outcome.describe()
        first, rows, m, step = outcome.result
        assert (first, step) == (resumed, STEPS), outcome.describe()
        np.testing.assert_array_equal(rows, reference["model"].rows)
        np.testing.assert_array_equal(m, reference["optimizer"]["m"])


LINES = {
    "the training": ("die", "all_reduce", "step"),
    "the keeper": ("all_reduce", "die", "step"),
    "the thread that writes": ("all_reduce", "step", "die"),
}


def run_program(group: ferro.ProcessGroup, path: str) -> None:
    """Run a program that joins the job itself, on a rank that is forked and need not import everything again."""
    group.close()
    runpy.run_path(path, run_name="__main__")
    ferro.shutdown()


@pytest.mark.parametrize("noticed_by", LINES)
def test_the_recovery_of_the_page_works_whoever_notices_the_loss(noticed_by, tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "checkpoint.md").read_text()
    [program] = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "# recover.py" in block]
    [loop] = re.findall(r"        if step == 20.*?keeper.step\(step, state\)\n", program, re.DOTALL)
    first, second, third, fourth = loop.splitlines(keepends=True)
    lines = {"die": first + second, "all_reduce": third, "step": fourth}
    path = tmp_path / "recover.py"
    path.write_text(program.replace(loop, "".join(lines[name] for name in LINES[noticed_by])))
    outcomes = run_ranks_outcomes(run_program, 3, backend="gloo", args=(str(path),), timeout_s=120)
    assert outcomes[1].signal == "SIGKILL", outcomes[1].describe()
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.ok, outcome.describe()
        assert re.search(r"of 2 goes on from step (10|15|20)", outcome.output), outcome.describe()
