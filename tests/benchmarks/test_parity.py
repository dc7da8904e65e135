"""The parity table: every strategy equals one process, and a strategy that differs is noticed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DEADLINE_S = 60
LIMITS = {"bfloat16": 2e-2, "float32": 2e-6, "float64": 1e-14}


@pytest.fixture
def parity(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import parity

    return parity


def check(records):
    for record in records:
        limit = LIMITS[record["dtype"]]
        assert max(record["parameters"], record["loss"]) < limit, record


@pytest.mark.parametrize("arguments", [["--simulate", "--ranks=3"], ["--ranks=1,2"]])
def test_strategies_equal_one_process(tmp_path, arguments):
    out = tmp_path / "parity.json"
    program = [sys.executable, str(BENCHMARKS / "parity.py"), f"--out={out}", *arguments]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=DEADLINE_S)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(out.read_text())
    check(result["records"])
    dtypes = {}
    for record in result["records"]:
        dtypes.setdefault(record["strategy"], set()).add(record["dtype"])
    shardings = ("full_shard", "shard_grad_op", "shard_optimizer", "no_shard", "hybrid_shard")
    pipelines = ("gpipe", "1f1b", "interleaved_1f1b", "zb_h1")
    others = ("ddp", "tensor_parallel", "sequence_parallel", "sync_batchnorm", "dtensor")
    assert dtypes == {
        **{f"fsdp {name}": {"bfloat16", "float32", "float64"} for name in shardings},
        **{f"pipeline {name}": {"float32", "float64"} for name in pipelines},
        **{name: {"float32", "float64"} for name in others},
    }
    assert result["by"] == ("simulated ranks" if "--simulate" in arguments else "gloo")


def test_combined_strategies_equal_one_process(parity):
    result = parity.measure([8], simulate=True)
    check(result["records"])
    assert {record["strategy"] for record in result["records"]} == {"ddp x tp x pp", "fsdp x sp x pp"}


def test_the_table_has_a_row_for_every_strategy_and_dtype(parity):
    row = {"strategy": "ddp", "dtype": "float32", "parameters": 1e-7, "loss": 2e-8}
    records = [{**row, "ranks": 2}, {**row, "ranks": 1}, {**row, "strategy": "all", "ranks": 8}]
    head, _, first, second = parity.table({"records": records}).splitlines()
    assert head == "| strategy | dtype | 1 rank | 2 ranks | 8 ranks |"
    assert first == "| ddp | float32 | 1.0e-07 / 2.0e-08 | 1.0e-07 / 2.0e-08 |  |"
    assert second == "| all | float32 |  |  | 1.0e-07 / 2.0e-08 |"


def measured(parity, monkeypatch, run):
    import parity_rank

    expected = (2.0, {"a": np.array([1.0, -4.0]), "b": np.array([3.0])})
    fake = parity_rank.Strategy(run=run, in_one_process=lambda _: expected, dtypes=("float64",))
    monkeypatch.setattr(parity_rank, "STRATEGIES", {"fake": fake})
    [record] = parity.measure([2], simulate=True)["records"]
    return record


def test_differences_are_of_the_rank_and_element_that_is_farthest_off(parity, monkeypatch):
    def run(group, _dtype):
        return 2.0 + 0.5 * group.rank, {"a": np.array([1.0, -4.0 + group.rank]), "b": np.ones(1)}

    record = measured(parity, monkeypatch, run)
    assert record["parameters"] == 2 / 4  # b: 1 instead of 3, and the largest element is 4
    assert record["loss"] == 0.5 / 2


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda *_: (2.0, {"a": np.zeros(2)}), r"\['b'\] are on one side"),
        (lambda *_: (2.0, {"a": np.zeros(2), "b": np.full(1, np.nan)}), "not finite"),
        (lambda g, _: (np.nan if g.rank else 2.0, {"a": np.zeros(2), "b": np.ones(1)}), "not finite"),
    ],
    ids=["missing", "not a number", "loss"],
)
def test_other_arrays_and_no_numbers_are_errors(parity, monkeypatch, run, message):
    with pytest.raises(ValueError, match=message):
        measured(parity, monkeypatch, run)


def test_training_moves_parameters_far_more_than_any_limit(parity):
    import parity_models

    for model in (parity_models.PERCEPTRON, parity_models.CONVOLUTIONAL, parity_models.TRANSFORMER):
        _, trained = parity_models.train_in_one_process(model, "float64")
        before = model.build("float64").state_dict()
        moved = max(float(np.abs(array - before[name]).max()) for name, array in trained.items())
        assert moved > 0.03
