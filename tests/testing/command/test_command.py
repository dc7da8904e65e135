"""`ferro conformance` as a user runs it: right backends, absent ones, and broken strangers."""

import json
import os
import subprocess
import sys

import pytest

from ferro.errors import UsageError
from ferro.types import Device
from ferro_testing.command import parse_options
from ferro_testing.command.cells import Cell
from ferro_testing.command.report import report
from ferro_testing.command.survey import Survey

DEADLINE_S = 90


def conformance(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "ferro", "conformance", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, **environment},
    )


def test_all_that_simulated_ranks_do_is_shown():
    ended = conformance("simulated", "-n", 3)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("simulated: 3 ranks, arrays on cpu; ferro ")
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert rows["complex128"] == ["ok"] * 3  # of the reductions: sum, mean, prod
    assert rows["lost_peer"][0] == rows["overlapping"][0] == rows["shrink"][0] == "ok"
    assert rows["all_to_all"][1] == rows["all_to_all"][3] == "us"
    assert lines[-1] == "nothing is wrong"
    told = [line.split()[:2] for line in ended.stderr.splitlines()]
    assert ["check_usage_errors", "ok"] in told
    assert ["check_shrink", "ok"] in told


def test_what_cannot_be_used_here_is_told_with_its_reason():
    ended = conformance("nonesuch")
    assert ended.returncode == 2
    assert ended.stderr.startswith("ferro: backend 'nonesuch' cannot be used here: no plugin")
    assert "Check the spelling" in ended.stderr
    ended = conformance("simulated", "-n", 1)
    assert ended.returncode == 2
    assert "-n 1: give 2 to 64 ranks" in ended.stderr


def test_one_finding_is_one_and_a_refusal_is_no_number():
    cells = [
        Cell(op="broadcast", dtype="int8", status="refused", text="no kernel"),
        Cell(op="gather", dtype="int8", status="wrong", text="it is wrong"),
    ]
    given = {"backend": "pipes", "versions": {}, "ranks": 2, "device": "cpu", "verdicts": {}}
    lines = report(Survey(dtypes=("int8",), cells=tuple(cells), **given)).splitlines()
    assert "1 finding" in lines
    assert "1  broadcast: no kernel" in lines
    assert any("– ¹" in line for line in lines)


def test_without_ml_dtypes_bfloat16_is_not_asked_for(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['ml_dtypes'] = None\n")
    ended = conformance("simulated", "-n", 2, "--quick", PYTHONPATH=str(tmp_path))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "bfloat16 was not asked for: ml_dtypes is not installed\n" in ended.stderr
    assert "bfloat16" not in ended.stdout


def installed(folder, name, backend, probe="Availability(ok=True)"):
    """Install a distribution that offers `name`; `backend` is Python that defines create."""
    package = folder / f"ferro_{name}"
    info = folder / f"ferro_{name}-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").touch()
    (package / "backend.py").write_text(backend)
    (package / "plugin.py").write_text(
        "from ferro import Availability, BackendInfo, hookimpl\n"
        "def create(config):\n"
        f"    from ferro_{name}.backend import create\n"
        "    return create(config)\n"
        "@hookimpl\n"
        "def ferro_backends():\n"
        f"    return [BackendInfo(name={name!r}, summary='', create=create,"
        f" probe=lambda: {probe})]\n"
    )
    (info / "METADATA").write_text(f"Name: ferro-{name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[ferro]\n{name} = ferro_{name}.plugin\n")
    return str(folder)


# Gloo's ranks, with gaps and mistakes of a stranger's.
STRANGE = """
from ferro import UnsupportedError
from ferro_gloo.backend import GlooBackend


def create(config):
    made = GlooBackend.connect(config)
    all_reduce, gather = made.all_reduce, made.gather

    def reduce_most(buffer, reduction, *, deadline):
        if buffer.dtype.name == "float16":
            raise UnsupportedError("float16 is moved, but not added")
        all_reduce(buffer, reduction, deadline=deadline)

    def gather_wrongly(block, out, counts, root, *, deadline):
        gather(block, out, counts, root, deadline=deadline)
        if out is not None and out.dtype.name == "int16":
            out[0] += 1

    def refuse(*args, deadline):
        raise UnsupportedError("no native all_to_all")

    made.all_reduce, made.gather, made.all_to_all = reduce_most, gather_wrongly, refuse
    return made
"""


def test_a_strangers_gaps_are_shown_and_its_mistakes_are_findings(tmp_path):
    path = installed(tmp_path, "strange", STRANGE)
    file = tmp_path / "found.json"
    ended = conformance("strange", "-n", 2, "--quick", "--json", file, PYTHONPATH=path)
    assert ended.returncode == 1, ended.stderr
    lines = ended.stdout.splitlines()
    assert "2  all_to_all: no native all_to_all" in lines
    assert "1  all_reduce:float16: float16 is moved, but not added" in lines
    assert "gather int16: 1 of 14 elements differ; element 0 is " in ended.stdout
    found = json.loads(file.read_text())
    assert found["collectives"]["all_reduce"]["float16"] == "refused"
    assert found["collectives"]["all_reduce"]["float32"] == "ok"
    assert set(found["collectives"]["all_to_all"].values()) == {"refused"}
    assert found["collectives"]["gather"]["int16"] == "wrong"
    assert found["collectives"]["gather"]["int8"] == "ok"
    assert found["features"]["deterministic"] == "ok"  # checked with what is left
    assert found["features"]["overlapping"] == "unknown"  # two ranks have no such groups
    assert len(found["findings"]) == 1
    assert found["findings"][0].startswith("rank 1: gather int16")


def test_an_unavailable_backend_says_what_to_do(tmp_path):
    probe = "Availability(ok=False, reason='no libstrange.so', hint='Install libstrange.')"
    path = installed(tmp_path, "strange", "", probe)
    ended = conformance("strange", PYTHONPATH=path)
    assert ended.returncode == 2
    assert ended.stderr == ("ferro: backend 'strange' cannot be used here: no libstrange.so. Install libstrange.\n")


def test_a_probe_that_raises_and_a_plugin_that_cannot_be_loaded(tmp_path):
    path = installed(tmp_path, "strange", "", "1 / 0")
    ended = conformance("strange", PYTHONPATH=path)
    assert ended.returncode == 2
    assert ended.stderr == (
        "ferro: backend 'strange' cannot be used here: its probe raised ZeroDivisionError: "
        "division by zero. Report this to the authors of ferro-strange 1.0.\n"
    )
    (tmp_path / "ferro_strange" / "plugin.py").write_text("1 / 0")
    ended = conformance("strange", PYTHONPATH=path)
    assert ended.returncode == 2
    assert ended.stderr.startswith(
        "ferro: no plugin that works offers the backend name 'strange'; and plugin 'strange' of "
    )
    assert "ferro-strange 1.0 failed to import (ferro_strange.plugin): ZeroDivisionError" in ended.stderr


LATE = """
from ferro import BackendUnavailable

def create(config):
    raise BackendUnavailable("strange", "the device is busy", "Wait.")
"""
LATE_ON_ONE = LATE.replace("    raise", "    if config.rank == 0: return 0\n    raise")
DEAD = """
def create(config):
    raise ZeroDivisionError("no ranks")
"""


@pytest.mark.parametrize(
    ("backend", "status", "words"),
    [
        (LATE, 2, "cannot be used here: on its ranks: the device is busy. Wait.\n"),
        (LATE_ON_ONE, 2, "cannot be used here: on its ranks: the device is busy. Wait.\n"),
        (DEAD, 1, "the calls could not be tried: 2 of 2 ranks failed; rank"),
    ],
)
def test_a_backend_that_does_not_begin(tmp_path, backend, status, words):
    path = installed(tmp_path, "strange", backend)
    ended = conformance("strange", "-n", 2, "--timeout", 20, PYTHONPATH=path)
    assert ended.returncode == status
    assert words in (ended.stderr if status == 2 else ended.stdout)


def test_options_are_read_or_refused(tmp_path):
    given = parse_options(["pipes", "-n", "3", "--device", "cuda", "--timeout", "5", "--quick"])
    assert (given.backend, given.ranks, given.device) == ("pipes", 3, Device.CUDA)
    assert (given.timeout_s, given.quick, given.json) == (5.0, True, None)
    assert parse_options(["pipes"]).device is None
    assert parse_options(["pipes", "-np", "3"]).ranks == 3
    for wrong, words in (
        (["pipes", "-n", "65"], "-n 65: give 2 to 64 ranks"),
        (["pipes", "--timeout", "0"], "--timeout 0"),
        (["pipes", "--json", str(tmp_path / "no" / "x")], "make it first"),
        ([], "the following arguments are required: BACKEND"),
    ):
        with pytest.raises(UsageError, match=words):
            parse_options(wrong)


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from ferro.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in sys.modules if name.startswith(('ferro_testing.command', "
        "'ferro_testing.c', 'ferro.launch.')) and name != 'ferro.launch.cluster'])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout.endswith("[]\n")
    assert "conformance" in ended.stdout
