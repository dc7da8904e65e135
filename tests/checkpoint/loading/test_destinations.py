"""What is loaded into: arrays that share memory, and errors after arrays have changed; misspelt choices; names."""

from __future__ import annotations

import numpy as np
import pytest

import ferro
from ferro_checkpoint import StateError, load, save

ONE, TWO = np.arange(6.0), np.arange(6.0) + 10


def test_an_array_under_two_names_is_loaded_once(tmp_path):
    save(tmp_path / "same", {"m": {"a": ONE, "b": ONE, "c": TWO * 1j}})
    save(tmp_path / "apart", {"m": {"a": ONE, "b": TWO, "c": TWO * 1j}})
    shared, pairs = np.zeros(6), np.zeros(6, complex)
    state = {"m": {"a": shared, "b": shared, "c": pairs}}
    load(tmp_path / "same", into=state)
    assert (shared == ONE).all()
    assert (pairs == TWO * 1j).all()
    with pytest.raises(StateError, match=r"'m\.a' and 'm\.b' are one array in the state, and differ"):
        load(tmp_path / "apart", into=state)


def test_memory_that_is_shared_in_part_is_refused(tmp_path):
    save(tmp_path / "c", {"m": {"a": ONE, "b": TWO}})
    memory = np.zeros(12)
    with pytest.raises(StateError, match=r"'m\.a' and 'm\.b' share memory"):
        load(tmp_path / "c", into={"m": {"a": memory[:6], "b": memory[5:11]}})
    itself = np.lib.stride_tricks.as_strided(memory, (6,), (4,))
    with pytest.raises(StateError, match=r"elements of 'm\.a' share memory"):
        load(tmp_path / "c", into={"m": {"a": itself, "b": np.zeros(6)}})
    assert not memory.any()
    load(tmp_path / "c", into={"m": {"a": memory[::2], "b": memory[::-2]}})  # they alternate
    assert (memory[::2] == ONE).all()
    assert (memory[::-2] == TWO).all()


@pytest.mark.parametrize("only", ["mm", ["m", "optimzer"], "", ["m.*.a"], 3, ["m", 3]])
def test_a_choice_of_nothing_is_refused(tmp_path, only):
    save(tmp_path / "c", {"m": {"a": ONE}, "optimizer": {"b": TWO}})
    with pytest.raises(StateError, match="only"):
        load(tmp_path / "c", only=only)


class Counter:
    def __init__(self):
        self.state = {"q": np.arange(3), "n": 5}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_an_object_with_arrays_in_its_state_dict_is_renamed(tmp_path):
    save(tmp_path / "c", {"old": Counter()})
    counter = Counter()
    counter.state = {}
    load(tmp_path / "c", into={"new": counter}, rename={"old": "new"})
    assert (counter.state["q"] == np.arange(3)).all()
    assert counter.state["n"] == 5
    assert (load(tmp_path / "c", rename={"old": "new"})["new.values"]["q"] == np.arange(3)).all()
    with pytest.raises(StateError, match="rename returned 3"):
        load(tmp_path / "c", rename=lambda name: 3)


def test_a_value_that_cannot_be_put_back_on_one_rank_is_told_by_all(tmp_path):
    def job(group):
        save(tmp_path / "c", {"s": Counter(), "rng": np.random.default_rng(0)}, group)
        counter = Counter()
        if group.rank == 1:
            counter.load_state_dict = lambda state: 1 / 0
        with pytest.raises(StateError, match=r"ZeroDivisionError.*Arrays of the state have changed"):
            load(tmp_path / "c", {"s": counter, "rng": np.random.default_rng(1)}, group)
        other = np.random.Generator(np.random.MT19937(0))
        with pytest.raises(StateError, match="'rng' is a generator of MT19937, and PCG64 in the checkpoint"):
            load(tmp_path / "c", {"s": Counter(), "rng": other if group.rank else np.random.default_rng(1)}, group)

    ferro.simulate(job, 2)
