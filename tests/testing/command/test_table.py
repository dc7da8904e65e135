"""The table of docs/backends.md: made of what was measured, which is still what is found."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[3] / "docs"
DEADLINE_S = 90


@pytest.fixture(scope="module")
def matrix():
    spec = importlib.util.spec_from_file_location("docs_matrix", DOCS / "matrix.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("backend", "ranks"), [("simulated", 4), ("gloo", 3)])
def test_what_the_table_says_is_so(backend, ranks):
    options = ["-n", str(ranks), "--quick", "--json", "-"]
    ended = subprocess.run(
        [sys.executable, "-m", "ferro", "conformance", backend, *options],
        timeout=DEADLINE_S,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "rough times" in ended.stderr  # the tables make room for the JSON
    assert "check_usage_errors" not in ended.stderr  # for it is tried quickly
    found = json.loads(ended.stdout)
    assert found["ranks"] == ranks
    committed = json.loads((DOCS / "conformance" / f"{backend}.json").read_text("utf-8"))
    for part in ("backend", "device", "collectives", "reductions", "features", "reasons"):
        assert found[part] == committed[part]
    assert found["findings"] == committed["findings"] == []


@pytest.mark.parametrize("file", sorted((DOCS / "conformance").glob("*.json")), ids=lambda f: f.stem)
def test_what_is_committed_is_whole_and_names_no_place(file):
    found = json.loads(file.read_text("utf-8"))
    assert found["backend"] == file.stem or ":" in found["backend"]  # a map, of hybrid
    assert found["findings"] == []
    words = file.read_text("utf-8")
    assert "/" not in words.replace("://", "")
    assert set(found["versions"]) >= {"ferro"}


def survey(name, **changes):
    base = {
        "backend": name,
        "versions": {"ferro": "1.0"},
        "ranks": 2,
        "device": "cpu",
        "collectives": {"all_reduce": {"int8": "ok", "bool": "ok"}, "sendrecv": {"int8": "ok"}},
        "reductions": {"sum": {"int8": "ok"}, "prod": {"int8": "ok"}},
        "features": {"barrier": "ok", "shrink": "ok"},
        "reasons": {},
    }
    return base | changes


def rows(text):
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


def test_gaps_have_notes_and_what_was_not_measured_says_so(matrix):
    gappy = survey(
        "nccl",
        device="cuda",
        collectives={
            "all_reduce": {"int8": "ok", "bool": "refused"},
            "sendrecv": {"int8": "refused", "bool": "refused"},
        },
        reductions={"sum": {"int8": "ok"}, "prod": {"int8": "refused"}},
        features={"barrier": "ok", "shrink": "refused", "tags": "wrong"},
        reasons={
            "all_reduce:bool": "no booleans",
            "sendrecv": "no transfers",
            "all_reduce:prod": "no booleans",
            "shrink": "ends",
        },
    )
    text = matrix.table({"gloo": survey("gloo"), "nccl": gappy})
    found = rows(text)
    at = [*matrix.BACKENDS].index("nccl")
    assert found["`all_reduce`"][at] == "all but bool <sup>1</sup>"
    assert found["`sendrecv`"][at] == "– <sup>2</sup>"
    assert found["reductions"][at] == "all but prod <sup>1</sup>"  # for the same reason
    assert found["`shrink()` after it"][at] == "– <sup>3</sup>"
    assert found["tags in any order"][at] == "wrong"
    assert found["`async_op`"][at] == "not asked"
    gloo = [*matrix.BACKENDS].index("gloo")
    assert [found[row][gloo] for row in ("`all_reduce`", "reductions", "barrier")] == [*("all", "all", "yes")]
    assert found["barrier"][[*matrix.BACKENDS].index("ucc")] == "·"
    assert "1. nccl: no booleans\n2. nccl: no transfers\n3. nccl: ends" in text
    assert "gloo with 2 ranks on cpu (ferro 1.0); nccl with 2 ranks on cuda" in text
    assert "· not measured here: simulated (needs nothing), mpi (needs an MPI and mpiexec)" in text


def test_a_backend_that_nobody_thought_of_has_a_column(matrix, tmp_path):
    (tmp_path / "pipes.json").write_text(json.dumps(survey("pipes")))
    found = matrix.surveys(tmp_path)
    assert rows(matrix.table(found))[""][-1] == "pipes"
