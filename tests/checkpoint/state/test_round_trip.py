"""What is in a state comes back: values of all kinds, objects, random generators, by any number of ranks."""

from __future__ import annotations

import math
from collections import OrderedDict
from enum import IntEnum

import numpy as np
import pytest

import ferro
import ferro_checkpoint
from ferro_checkpoint import ArrayPiece, CheckpointError, StateError
from ferro_checkpoint.state.values import decode_value, encode_value


class Color(IntEnum):
    RED = 3


class Sampler:
    """An object with a state dict of values and arrays, of which each rank may have its own."""

    def __init__(self, state, by_rank=False):
        self.state, self.checkpoint_values_by_rank = state, by_rank

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


class Module:
    """An object with arrays and values, which counts the calls of a load."""

    def __init__(self, arrays, values=None):
        self.arrays, self.values, self.calls = arrays, values, []

    def checkpoint_arrays(self):
        self.calls.append("arrays")
        return self.arrays

    def checkpoint_values(self):
        return self.values

    def load_checkpoint_values(self, values):
        self.calls.append("values")
        self.values = values

    def prepare_checkpoint_load(self):
        self.calls.append("prepare")

    def finish_checkpoint_load(self):
        self.calls.append("finish")


class OnlyDLPack:
    """An array of another library."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def on_ranks(world_size, function):
    return ferro.simulate(function, world_size, timeout_s=20, run_timeout_s=40)


VALUES = {
    "none": None,
    "flags": [True, False],
    "ints": [0, -1, 1 << 64, -(1 << 200)],
    "floats": [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf],
    "text": 'ünï\n\x00 "\\ 😀',
    "tuple": (1, (2.5, "x"), [()]),
    "bytes": b"\x00\xff",
    "complex": [1 + 2j, complex(math.inf, -0.0)],
    "keys": {1: "a", (2, 3): "b", "$tuple": [1], "$float": "x", None: {}},
    "empty": [[], {}, (), ""],
    "deep": {"a": {"b": {"c": {"d": [{"e": 1}]}}}},
    "like a record": {"$by_rank": [1, 2]},
    "numbers": [np.float16(0.1), np.int8(-3), np.uint64(1 << 63), np.bool_(True), np.complex64(1 + 2j)],
}


def same(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for item, of_other in zip(one, other, strict=True):
            same(item, of_other)
    else:
        assert repr(one) == repr(other)


def test_values_of_all_kinds(tmp_path):
    plain = {key: value for key, value in VALUES.items() if key != "numbers"}
    nan = {"nan": [math.nan, (math.nan,)]}
    ferro_checkpoint.save(tmp_path / "c", {"all": plain, "enum": Color.RED, **nan, "top": 7})
    loaded = ferro_checkpoint.load(tmp_path / "c")
    same(loaded["all"], plain)
    assert loaded["enum"] == 3
    assert loaded["top"] == 7
    assert math.isnan(loaded["nan"][0])
    assert math.isnan(loaded["nan"][1][0])
    into = {"all": dict.fromkeys(plain, 0), "enum": 0, "nan": None, "top": 0}
    inner = into["all"]
    assert ferro_checkpoint.load(tmp_path / "c", into) is into
    assert into["all"] is inner
    same(into["all"], plain)
    for value in VALUES.values():
        same(decode_value(encode_value(value, "x")), value)


@pytest.mark.parametrize(
    "value", [{"$float": []}, {"$tuple": 3}, {"$bytes": "zz"}, {"$scalar": ["float32", "00"]}, {"$dict": [[[], 1]]}]
)
def test_values_that_nothing_has_written(value):
    with pytest.raises(ValueError, match="is no value of a checkpoint"):
        decode_value(value)


def test_arrays_within_values_keep_their_bytes():
    for array in (np.arange(6, dtype=">i4").reshape(2, 3).T, np.array(1.5, ">f8"), np.ones((0, 2), bool)):
        found = decode_value(encode_value(array, "x"))
        assert found.shape == array.shape
        assert (found == array).all()


def test_containers_keep_their_identity(tmp_path):
    def state(fill):
        return {
            "nest": OrderedDict(x=np.full(3, fill), n=fill, more=[{"y": np.full((), fill), "k": (fill, fill)}]),
            "scalar": np.float32(fill),
            "list": [np.int16(fill), np.full(2, fill)],
            "own": {"x": np.full(2, fill), "kept": "same"},
        }

    ferro_checkpoint.save(tmp_path / "c", state(1))
    into = state(2)
    nest, array, inner = into["nest"], into["nest"]["x"], into["nest"]["more"][0]
    ferro_checkpoint.load(tmp_path / "c", into)
    assert into["nest"] is nest
    assert nest["x"] is array
    assert nest["more"][0] is inner
    assert array.tolist() == [1, 1, 1]
    assert nest["n"] == 1
    assert inner == {"y": 1.0, "k": (1, 1)}
    assert type(into["scalar"]) is np.float32
    assert into["scalar"] == 1
    assert into["list"][0] == 1
    assert into["list"][1].tolist() == [1, 1]
    assert into["own"]["kept"] == "same"


def test_a_tuple_takes_nothing_else_and_nothing_is_changed(tmp_path):
    ferro_checkpoint.save(tmp_path / "c", {"a": {"t": (np.ones(2), 1, math.nan)}})
    into = {"a": {"t": (np.zeros(2), 2, math.nan)}}
    with pytest.raises(StateError, match=r"a tuple holds value 'a\.t\.1'.*use a list"):
        ferro_checkpoint.load(tmp_path / "c", into)
    assert into["a"]["t"][0].tolist() == [0, 0]
    into = {"a": {"t": (np.zeros(2), 1, math.nan)}}
    ferro_checkpoint.load(tmp_path / "c", into)
    assert into["a"]["t"][0].tolist() == [1, 1]


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_other_libraries_arrays_and_all_memory_orders(tmp_path):
    values = np.arange(24.0).reshape(4, 6)
    own, fortran, holes = values.copy(), np.asfortranarray(values), np.zeros((4, 12))[:, ::2]
    holes[...] = values
    frozen = {"b": np.broadcast_to(values[0], (3, 6)), "o": np.broadcast_to(1 + 2j, (2, 2))}
    ferro_checkpoint.save(tmp_path / "frozen", {"a": frozen, "none": {}})
    whole = ferro_checkpoint.load(tmp_path / "frozen")["a"]
    assert all((whole[name] == array).all() for name, array in frozen.items())
    state = {"a": {"d": OnlyDLPack(own), "f": fortran, "h": holes, "r": values[::-1], "m": np.asmatrix(values.copy())}}
    ferro_checkpoint.save(tmp_path / "c", state)
    for array in (own, fortran, holes):
        array[...] = 0
    state["a"]["r"] = values.copy()[::-1]
    ferro_checkpoint.load(tmp_path / "c", state)
    assert (own == values).all()
    assert (fortran == values).all()
    assert (holes == values).all()
    assert (state["a"]["r"] == values[::-1]).all()
    assert (state["a"]["m"] == values).all()


def test_an_object_is_asked_and_told_in_order(tmp_path):
    module = Module({"w": np.ones(3), "b": ArrayPiece.whole(np.ones(()))}, {"steps": 4, "lr": math.inf})
    ferro_checkpoint.save(tmp_path / "c", {"model": module})
    module = Module({"w": np.zeros(3), "b": ArrayPiece.whole(np.zeros(()))}, {"steps": 0, "lr": 0.0})
    ferro_checkpoint.load(tmp_path / "c", {"model": module})
    assert module.calls == ["prepare", "arrays", "values", "finish"]
    assert module.arrays["w"].tolist() == [1, 1, 1]
    assert module.values == {"steps": 4, "lr": math.inf}
    alone = Module({"w": np.zeros(3), "b": np.zeros(())}, {"steps": 0, "lr": 0.0})
    ferro_checkpoint.load(tmp_path / "c", alone)  # a module as the whole state
    assert alone.arrays["w"].tolist() == [1, 1, 1]


class Optimizer:
    """An optimizer of parameters, which names its arrays by theirs, and has none before its first step."""

    def __init__(self, *parameters):
        self.parameters, self.moments, self.steps = parameters, {}, 0

    def step(self):
        self.steps += 1
        self.moments = {place: np.full(p.shape, self.steps + 0.5) for place, p in enumerate(self.parameters)}

    def checkpoint_optimizer_arrays(self, names):
        return {f"{names.get(id(self.parameters[at]), at)}.m": array for at, array in self.moments.items()}

    def checkpoint_values(self):
        return {"steps": self.steps}

    def load_checkpoint_values(self, values):
        self.steps = values["steps"]

    def prepare_checkpoint_load(self):
        self.moments = self.moments or {place: np.zeros(p.shape) for place, p in enumerate(self.parameters)}


class Linear(Module):
    def checkpoint_parameters(self):
        return self.arrays


def test_an_optimizer_names_its_arrays_by_the_parameters(tmp_path):
    def state():
        model = Linear({"w": np.ones((2, 3)), "b": np.ones(3)})
        return {"model": model, "optimizer": Optimizer(model.arrays["b"], model.arrays["w"], np.zeros(()))}

    saved = state()
    saved["optimizer"].step()
    ferro_checkpoint.save(tmp_path / "c", saved)
    assert ferro_checkpoint.load(tmp_path / "c")["optimizer"].keys() == {"w.m", "b.m", "2.m"}
    loaded = state()
    ferro_checkpoint.load(tmp_path / "c", loaded)
    assert loaded["optimizer"].steps == 1
    assert [float(array.ravel()[0]) for array in loaded["optimizer"].moments.values()] == [1.5] * 3
    other = {"optimizer": Optimizer(loaded["model"].arrays["b"])}  # no module is there to name its parameter
    with pytest.raises(StateError, match=r"lacks tensor 'optimizer\.0\.m'"):
        ferro_checkpoint.load(tmp_path / "c", other, only="optimizer")


def test_states_without_arrays(tmp_path):
    for state in ({}, {"epoch": 3}, {"model": {}, "epoch": 3}):
        on_ranks(2, lambda group: ferro_checkpoint.save(tmp_path / "c", state, group, overwrite=True))  # noqa: B023
        assert ferro_checkpoint.load(tmp_path / "c").get("epoch", 3) == 3
        on_ranks(2, lambda group: ferro_checkpoint.load(tmp_path / "c", dict(state), group))  # noqa: B023


def test_a_state_dict_may_have_changed(tmp_path):
    saved = {"order": np.arange(5), "at": 3, "nested": {"x": [np.ones(2, np.float32), (1, np.zeros(()))]}, 7: "int key"}
    ferro_checkpoint.save(tmp_path / "c", {"sampler": Sampler(saved)})
    sampler = Sampler({"another": 1, "order": np.arange(9.0)})
    ferro_checkpoint.load(tmp_path / "c", {"sampler": sampler})
    found = sampler.state
    assert found.keys() == saved.keys()
    assert found["at"] == 3
    assert found[7] == "int key"
    assert found["order"].tolist() == [0, 1, 2, 3, 4]
    assert found["order"].dtype == saved["order"].dtype
    assert found["nested"]["x"][0].tolist() == [1, 1]
    assert isinstance(found["nested"]["x"][1], tuple)
    whole = ferro_checkpoint.load(tmp_path / "c")
    assert whole["sampler"]["order"].tolist() == [0, 1, 2, 3, 4]
    assert whole["sampler.values"]["order"] is whole["sampler"]["order"]


GENERATORS = [np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64]


def test_a_generator_of_another_kind(tmp_path):
    ferro_checkpoint.save(tmp_path / "c", {"x": np.ones(2), "g": np.random.default_rng(1), "h": 3})
    for state, message in (
        ({"g": np.random.Generator(np.random.Philox(1)), "h": 0}, "'g' is a generator of Philox, and PCG64 in the"),
        ({"g": np.random.default_rng(2), "h": np.random.default_rng(2)}, "'h' is a generator of PCG64, and int in the"),
    ):
        array = np.zeros(2)
        with pytest.raises(StateError, match=message):
            ferro_checkpoint.load(tmp_path / "c", {"x": array, **state})
        assert array.tolist() == [0, 0]


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 2), (2, 3)])
def test_each_rank_has_its_own(tmp_path, n, m, caplog):
    def state(rank, seed):
        own = {"order": np.arange(rank + 1) + 10 * rank, "at": rank}
        return {
            "generators": {kind.__name__: np.random.Generator(kind(seed + rank)) for kind in GENERATORS},
            "sampler": Sampler(own, by_rank=True),
            "differs": {"at": [rank], "same": "x"},
            "shared": Sampler({"order": np.arange(4), "at": rank}),
        }

    def save(group):
        of_rank = state(group.rank, 0)
        ferro_checkpoint.save(tmp_path / "c", of_rank, group)
        return [float(each.random()) for each in of_rank["generators"].values()]

    def load(group):
        of_rank = state(group.rank, 100)
        own = [float(each.random()) for each in state(group.rank, 100)["generators"].values()]
        ferro_checkpoint.load(tmp_path / "c", of_rank, group)
        drawn = [float(each.random()) for each in of_rank["generators"].values()]
        sampler, shared = of_rank["sampler"].state, of_rank["shared"].state
        return own, drawn, sampler["order"].tolist(), sampler["at"], of_rank["differs"], shared["at"]

    saved = on_ranks(n, save)
    for rank, (own, drawn, order, at, differs, shared_at) in enumerate(on_ranks(m, load)):
        assert drawn == (saved[rank] if rank < n else own)
        assert order == [10 * rank + k for k in range(rank + 1)]
        assert at == rank == shared_at
        assert differs == {"at": [rank], "same": "x"}
    assert ("keeps its own" in caplog.text) is (m > n)


def test_partial_and_renamed_loads(tmp_path):
    x, y = np.arange(3.0), np.arange(2, dtype=np.float32)
    ferro_checkpoint.save(tmp_path / "c", {"model": {"layer.x": x, "head.y": y}, "optimizer": {"m": x}, "epoch": 3})

    def into(*names, **more):
        return {"model": {name: np.zeros_like(y if name.endswith("y") else x) for name in names}, **more}

    def loaded(state, **options):
        ferro_checkpoint.load(tmp_path / "c", state, **options)
        return {name: array.tolist() for name, array in state["model"].items()}, state.get("epoch")

    both = {"layer.x": [0, 1, 2], "head.y": [0, 1]}
    assert loaded(into("layer.x", "head.y"), only="model") == (both, None)
    assert loaded(into("layer.x", "head.y", epoch=0), only=["model", "epoch"]) == (both, 3)
    assert loaded(into("layer.x"), only="model.layer") == ({"layer.x": [0, 1, 2]}, None)
    assert loaded(into("layer.x", "head.y"), only="*.head.*") == ({"layer.x": [0, 0, 0], "head.y": [0, 1]}, None)
    assert loaded(into("a.x", "head.y"), only="model", rename={"model.layer": "model.a"})[0]["a.x"] == [0, 1, 2]
    assert loaded(into("X"), only="model.X", rename=lambda name: name.replace("layer.x", "X")) == (
        {"X": [0, 1, 2]},
        None,
    )
    assert loaded(into("new.x", "layer.x", epoch=1), strict=False) == ({"new.x": [0, 0, 0], "layer.x": [0, 1, 2]}, 3)
    assert loaded(into("layer.x", "head.y", when=0), strict=False)[0] == both
    fetched = ferro_checkpoint.load(tmp_path / "c", only="optimizer")
    assert fetched.keys() == {"optimizer"}
    assert fetched["optimizer"]["m"].tolist() == [0, 1, 2]

    refused = [
        (into("layer.x", "head.z", epoch=1), {}, "lacks tensor 'model.head.z' .it has 'model.head.y'."),
        (into("layer.x", "head.y", epoch=1), {}, "nothing in the state takes tensor 'optimizer.m'"),
        (into("layer.x", "head.y"), {"only": ["model", "epoch"]}, "nothing in the state takes value 'epoch'"),
        (into("layer.x", "head.y", epoc=1), {"only": ["model", "epoc*"]}, "lacks value 'epoc' .it has 'epoch'."),
        (
            {"model": {"layer.x": np.zeros(4)}},
            {"only": "model.layer"},
            r"is F64 \(3,\) in the checkpoint, and F64 \(4,\)",
        ),
        ({"model": {"layer.x": np.zeros(3, "f4")}}, {"strict": False}, "is F64 .* in the checkpoint, and F32"),
        ({"model": {"layer.x": np.broadcast_to(0.0, 3)}}, {"only": "model.layer"}, "is read-only in the state"),
        (into("layer.x"), {"only": []}, "loads nothing"),
        (into("layer.x"), {"rename": lambda _: "model.x"}, "rename gives 'model.x' to both"),
        (into("layer.x"), {"rename": lambda name: None}, "rename"),
    ]
    for state, options, message in refused:
        with pytest.raises(StateError, match=message):
            ferro_checkpoint.load(tmp_path / "c", state, **options)
        assert all(not array.any() for array in state["model"].values())


def test_a_checkpoint_of_unknown_values_is_one_clear_error(tmp_path):
    ferro_checkpoint.save(tmp_path / "c", {"a": {"x": np.ones(2)}, "v": [1]})
    import json

    from ferro_checkpoint.layout.record import Record

    path = tmp_path / "c" / "ferro.json"
    record = Record.decode(path.read_bytes(), "c")
    for value in ({"$new": 1}, {"$float": []}, {"$by_rank": [{"$tuple": 4}]}):
        path.write_bytes(
            Record(
                step=None, bundles=record.bundles, files=record.files, values={"v": value}, digest=record.digest
            ).encode()
        )
        assert json.loads(path.read_bytes())["values"] == {"v": value}
        state = {"a": {"x": np.zeros(2)}, "v": [2]}
        with pytest.raises(CheckpointError, match="'v'"):
            ferro_checkpoint.load(tmp_path / "c", state)
        assert state["a"]["x"].tolist() == [0, 0]
