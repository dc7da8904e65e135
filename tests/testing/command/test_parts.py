"""The parts of `ferro conformance`: cells and gaps, verdicts, bundles, tables."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import ferro
from ferro.errors import UnsupportedError
from ferro_testing.case import Case, run_simulated
from ferro_testing.command import verdicts
from ferro_testing.command.bundle import bundled
from ferro_testing.command.cells import Cell, all_cells, gaps, merge
from ferro_testing.command.rank import probe
from ferro_testing.command.report import report
from ferro_testing.command.survey import Survey, Timing
from ferro_testing.command.verdicts import CheckVerdict, judge
from ferro_testing.conformance import check_async, check_groups, check_movements
from ferro_testing.outcome import Outcome


def cell(op, dtype="", reduction="", status="ok", text=""):
    return Cell(op=op, dtype=dtype, reduction=reduction, status=status, text=text)


def test_every_collective_is_called_with_every_dtype_and_reduction():
    cells = [(it.op, it.dtype, it.reduction) for it in all_cells(["int8", "complex64"])]
    assert cells[:3] == [("barrier", "", ""), ("split", "", ""), ("subgroup", "", "")]
    assert [it[2] for it in cells if it[:2] == ("reduce", "complex64")] == ["sum", "mean", "prod"]
    assert ("all_reduce", "int8", "bxor") in cells
    assert ("sendrecv", "complex64", "") in cells
    assert len(cells) == len(set(cells)) == 3 + 3 * 7 + 3 * 3 + 2 * 6


@pytest.mark.parametrize(
    ("told", "status", "text"),
    [
        (("ok", "ok"), "ok", ""),
        (("refused", "refused"), "refused", "rank 0's text"),
        (("ok", "wrong"), "wrong", "rank 1's text"),
        (("refused", "wrong"), "wrong", "rank 1's text"),
        (("ok", "refused"), "wrong", "UnsupportedError on ranks [1] only: rank 1's text"),
        (("unknown", "ok"), "unknown", "the group had died before"),
    ],
)
def test_ranks_must_agree(told, status, text):
    ranks = [[[it, f"rank {rank}'s text"]] for rank, it in enumerate(told)]
    [merged] = merge([cell("gather", "int8")], ranks)
    assert (merged.op, merged.dtype, merged.status, merged.text) == ("gather", "int8", status, text)


def test_gaps_are_told_with_the_fewest_keys():
    refused = {"status": "refused", "text": "why"}
    cells = [
        cell("split", **refused),
        cell("gather", "int8"),
        cell("gather", "bool", **refused),
        *(cell("all_reduce", "int8", name) for name in ("sum", "prod")),
        cell("all_reduce", "int8", "bxor", **refused),
        cell("all_reduce", "int16", "sum"),
        cell("all_reduce", "int16", "prod", **refused),
        cell("all_reduce", "int16", "bxor", **refused),
        *(cell("all_reduce", "float16", name, **refused) for name in ("sum", "prod")),
    ]
    keys = {
        "split": "why",
        "gather:bool": "why",
        "all_reduce:bxor": "why",
        "all_reduce:float16": "why",
        "all_reduce:int16:prod": "why",
    }
    assert gaps(cells) == keys
    Case(backend="any", unsupported=keys)  # a case takes them as they are


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch):
    """Leave out the check that must wait for a deadline; the command's own tests have it."""
    monkeypatch.delitem(verdicts.FEATURES, "timeout")


def judged(spoil=None, *, launched=False, runner=None, **options):
    """Return the verdicts on simulated ranks whose backends are spoilt."""

    def spoilt(function, world_size, args, *, timeout_s, deterministic):
        def on_rank(group, *args):
            if spoil is not None:
                spoil(group.backend)
            return function(group, *args)

        return run_simulated(on_rank, world_size, args, timeout_s=timeout_s, deterministic=deterministic)

    case = Case(backend="spoilt", world_sizes=(3,), timeout_s=5, runner=runner or spoilt, **options)
    told = []
    found = judge(case, launched=launched, quick=True, told=told.append)
    assert told == list(found.values())
    return found


def no_functions(backend):
    right = backend.all_reduce

    def all_reduce(buffer, reduction, *, deadline):
        if reduction.name == "callable":
            raise UnsupportedError("no functions, \nplease")
        right(buffer, reduction, deadline=deadline)

    backend.all_reduce = all_reduce


def test_what_all_ranks_refuse_is_a_gap():
    found = judged(no_functions)
    refused = found.pop("check_reduction_functions")
    assert (refused.status, refused.text) == ("refused", "no functions,")
    assert {verdict.status for verdict in found.values()} == {"ok"}


def wrong_gathering(backend):
    backend.all_gather = lambda buffer, counts, *, deadline: None


def test_what_is_wrong_is_told_check_by_check():
    found = judged(wrong_gathering)
    assert found["check_async"].status == found["check_uneven"].status == "wrong"
    assert "async all_gather" in found["check_async"].text
    assert found["check_transfers"].status == "ok"


def test_a_check_whose_needs_are_refused_is_skipped():
    found = judged(unsupported={"all_reduce": "none"})
    assert found["check_async"].status == "skipped"
    assert found["check_lost_peer"].status == "skipped"
    assert found["check_tags"].status == "ok"


@pytest.mark.parametrize(
    ("launched", "status", "words"),
    [
        (True, "refused", "the launcher ends the whole job when a rank dies"),
        (False, "wrong", "ranks [0, 2] ended with them"),
    ],
)
def test_a_launcher_may_end_the_job_where_a_backend_may_not(launched, status, words):
    def runner(function, world_size, args, *, timeout_s, deterministic):
        if function.__name__ in ("_die", "_shrink_after_deaths"):
            return [Outcome(rank=rank, error_type="Killed") for rank in range(world_size)]
        return run_simulated(function, world_size, args, timeout_s=timeout_s, deterministic=deterministic)

    found = judged(launched=launched, runner=runner)
    for name in ("check_lost_peer", "check_shrink"):
        assert found[name].status == status
        assert words in found[name].text
    assert found["check_abort"].status == "ok"


def test_after_the_groups_death_nothing_more_is_asked():
    def on_rank(group):
        def gather(block, out, counts, root, *, deadline):
            raise ferro.PeerLost("it left", peer=1 - group.rank)

        group.backend.gather = gather
        calls = [["all_gather", "int8", ""], ["gather", "int8", ""], ["scatter", "int8", ""]]
        return probe(group, calls, "cpu")

    for rank, told in enumerate(ferro.simulate(on_rank, 2, run_timeout_s=20)):
        (good, _), (status, text), (after, _) = told["cells"]
        assert (good, status, after) == ("ok", "wrong", "unknown")
        assert text.startswith(f"gather int8: rank {rank} raised PeerLost: ")
        assert told["timings"] == []


def test_arrays_are_put_on_the_device_and_brought_back(monkeypatch):
    """A stand-in for CuPy counts what passes, and has no complex arrays."""
    placed = []

    def asarray(array):
        if array.dtype.kind == "c":
            raise TypeError("no complex numbers")
        placed.append(array.dtype.name)
        return array

    cupy = SimpleNamespace(asarray=asarray, asnumpy=lambda array: array)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    calls = [["all_reduce", "int8", "sum"], ["broadcast", "complex64", ""], ["barrier", "", ""]]
    [told] = ferro.simulate(lambda group: probe(group, calls, "cuda"), 1, run_timeout_s=20)
    assert told["cells"] == [["ok", ""], ["refused", "CuPy has no arrays of complex64: no complex numbers"], ["ok", ""]]
    assert placed[0] == "int8"
    assert [row[0] for row in told["timings"]] == ["barrier"]


def test_a_bundle_runs_all_at_once_and_tells_them_apart():
    runs = []

    def runner(function, world_size, args, **options):
        runs.append(function.__name__)
        return run_simulated(function, world_size, args, **options)

    case = Case(backend="bundled", world_sizes=(2,), timeout_s=20, runner=runner)
    cases = bundled([check_async, check_groups, check_movements], case, 2)
    assert runs == ["run_bundle"]
    for check, own in cases.items():
        check(own)
    assert runs == ["run_bundle"]


SURVEY = Survey(
    backend="pipes",
    versions={"ferro": "1.0", "pipes": "2.0"},
    ranks=2,
    device="cpu",
    dtypes=("int8", "float16"),
    cells=(
        *(cell(op) for op in ("barrier", "split")),
        cell("subgroup", status="refused", text="no groups"),
        *(cell(it.op, it.dtype, it.reduction) for it in all_cells(["int8", "float16"])[3:-1]),
        cell("sendrecv", "float16", status="refused", text="no halves"),
    ),
    verdicts={
        "check_groups": CheckVerdict(name="check_groups", status="ok"),
        "check_abort": CheckVerdict(name="check_abort", status="refused", text="no way"),
        "check_async": CheckVerdict(name="check_async", status="wrong", text="a\nb"),
    },
    timings=(Timing(op="all_reduce", small_s=12e-6, large_s=0.5e-3),),
)


def test_a_report_has_every_table():
    lines = report(SURVEY).splitlines()
    assert lines[0] == "pipes: 2 ranks, arrays on cpu; ferro 1.0, pipes 2.0"
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert rows["abort"][:2] == ["–", "³"]
    assert rows["subgroup"] == ["–", "¹"]
    assert rows["split"] == ["ok"]
    assert rows["async"] == ["WRONG"]
    assert rows["tags"][0] == "?"
    assert rows["all_reduce"] == ["12", "us", "500", "us"]
    first = next(line for line in lines if line.startswith("float16"))
    assert first.split()[1:] == ["ok"] * 8 + ["–", "²"]
    at = lines.index("refused")
    assert lines[at + 1 : at + 4] == ["1  subgroup: no groups", "2  sendrecv:float16: no halves", "3  abort: no way"]
    assert lines[-4:] == ["1 finding", "", "  check_async: a", "  b"]


def test_without_transfers_all_that_they_do_is_refused():
    refused = tuple(cell("sendrecv", dtype, status="refused") for dtype in ("int8", "float16"))
    features = replace(SURVEY, cells=refused).features()
    assert features["transfers"] == features["tags"] == "refused"
    partly = (cell("sendrecv", "int8"), *refused[1:])
    assert replace(SURVEY, cells=partly).features()["tags"] == "unknown"


def test_findings_name_each_mistake_once():
    wrong = cell("gather", "int8", status="wrong", text="rank 1: gather int8: …")
    survey = replace(SURVEY, cells=(wrong, wrong), verdicts={}, failure="the ranks died")
    assert survey.findings() == ["the ranks died", "rank 1: gather int8: …"]
    assert survey.collectives()["gather"] == {"int8": "wrong", "float16": "unknown"}


def test_a_reduction_that_one_collective_refuses_is_not_all_right():
    cells = (
        cell("all_reduce", "int8", "sum"),
        cell("all_reduce", "int8", "prod", status="refused"),
        cell("reduce", "int8", "sum", status="refused"),
    )
    survey = replace(SURVEY, dtypes=("int8",), cells=cells)
    assert survey.collectives()["all_reduce"]["int8"] == "ok"
    assert survey.reductions() == {"sum": {"int8": "refused"}, "prod": {"int8": "refused"}}
    assert np.dtype("int8").name in survey.as_json()
