"""Installed distributions for tests: real ones, thrown away after each test."""

import sys
import textwrap

import importlib_metadata
import pytest

from ferro.plugins import registry as plugins

HEAD = """
from ferro import Availability, BackendInfo, CollectiveInfo, StrategyInfo, hookimpl

def backend(name, probe=lambda: Availability(ok=True, reason="it is there"), under=()):
    return BackendInfo(
        name=name, summary=name, probe=probe, create=print, default_under=under
    )
"""


class Site:
    """A folder of installed distributions, the only ones there are besides ferro itself."""

    def __init__(self, folder):
        self.folder = folder
        self.modules = []

    def install(self, distribution, entry, source):
        """Install a distribution with one module and one entry point."""
        name = distribution.replace("-", "_")
        module = f"throwaway_{name}"
        (self.folder / f"{module}.py").write_text(HEAD + textwrap.dedent(source))
        info = self.folder / f"{name}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5")
        (info / "entry_points.txt").write_text(f"[ferro]\n{entry} = {module}\n")
        self.modules.append(module)

    def entry_points(self, group):
        """Return the entry points of these distributions and of ferro."""
        found = [*importlib_metadata.distributions(path=[str(self.folder)]), importlib_metadata.distribution("ferro")]
        return [entry for d in found for entry in d.entry_points if entry.group == group]


@pytest.fixture
def site(tmp_path, monkeypatch):
    site = Site(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importlib_metadata, "entry_points", site.entry_points)
    plugins.installed.cache_clear()
    yield site
    plugins.installed.cache_clear()
    for module in site.modules:
        sys.modules.pop(module, None)
