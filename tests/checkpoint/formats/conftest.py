"""Checkpoints that torch 2.13.0 has written; see make_torch_fixtures.py."""

from __future__ import annotations

import pathlib
import tarfile

import pytest


@pytest.fixture(scope="session")
def torch_files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("torch")
    with tarfile.open(pathlib.Path(__file__).with_name("torch_fixtures.tar.xz")) as archive:
        archive.extractall(directory, filter="data")
    return directory
